//! A typed view of one TOML table that knows all the keys it may have.
//!
//! Unknown keys are refused when the view is opened, before any value is read, so that a misspelt required key is
//! reported as misspelt and not as missing.

use std::net::SocketAddr;
use std::ops::RangeInclusive;

use toml::{Table, Value};

use super::machine::FILES_RESERVED;

/// What is wrong with a configuration file, for a person.
#[derive(Debug, thiserror::Error)]
pub enum Problem {
    /// The file could not be read.
    #[error("cannot be read ({0}); check the path given to --config")]
    Unreadable(std::io::Error),
    /// Not TOML at all.
    #[error("line {line}: {message}")]
    Syntax {
        /// Counted from one.
        line: usize,
        /// What the TOML parser says, in one line.
        message: String,
    },
    /// A key nobody knows.
    #[error("unknown key \"{key}\" in {place}; did you mean \"{nearest}\"?")]
    UnknownKey {
        /// As written.
        key: String,
        /// The table it stands in.
        place: String,
        /// The known key that looks most like it.
        nearest: &'static str,
    },
    /// A key that has to be there.
    #[error("{place} lacks \"{key}\"; add for example {example}")]
    Missing {
        /// The table.
        place: String,
        /// The key.
        key: &'static str,
        /// A line that would do.
        example: &'static str,
    },
    /// A value of the wrong type.
    #[error("\"{key}\" in {place} is {found}, but must be {wanted}")]
    WrongType {
        /// The table.
        place: String,
        /// The key.
        key: &'static str,
        /// What stands there.
        found: &'static str,
        /// What should.
        wanted: &'static str,
    },
    /// A number outside its range.
    #[error("\"{key}\" in {place} is {found}, but must be between {least} and {most}")]
    OutOfRange {
        /// The table.
        place: String,
        /// The key.
        key: &'static str,
        /// The value.
        found: i64,
        /// Lower bound.
        least: i64,
        /// Upper bound.
        most: i64,
    },
    /// A number of connections for which the process cannot open enough files.
    #[error(
        "\"{key}\" in {place} is {wanted}, but this process may open only {open_files} files, and needs \
         {reserved} for itself; raise the limit (LimitNOFILE=, ulimit -n), or leave the key out"
    )]
    Files {
        /// The table.
        place: String,
        /// The key.
        key: &'static str,
        /// The value.
        wanted: usize,
        /// Files that may be open.
        open_files: u64,
        /// Those of them that are not for clients.
        reserved: u64,
    },
    /// A text that means nothing here.
    #[error("\"{key}\" in {place} is \"{found}\", but must be {wanted}")]
    BadText {
        /// The table.
        place: String,
        /// The key.
        key: &'static str,
        /// The text.
        found: String,
        /// What would be accepted.
        wanted: &'static str,
    },
    /// A list without entries, or with one of the wrong type.
    #[error("\"{key}\" in {place} must be a list of texts in quotes")]
    NotTexts {
        /// The table.
        place: String,
        /// The key.
        key: &'static str,
    },
    /// A name of something that is not there.
    #[error("\"{key}\" in {place} names the {what} \"{name}\", which does not exist{hint}", hint = hint(nearest.as_deref()))]
    NoSuch {
        /// The table.
        place: String,
        /// The key.
        key: &'static str,
        /// What it should name, such as `upstream`.
        what: &'static str,
        /// The name.
        name: Box<str>,
        /// The name that looks most like it, if there is any.
        nearest: Option<Box<str>>,
    },
    /// A key that has no effect here.
    #[error("\"{key}\" in {place} means nothing without {needs}")]
    Useless {
        /// The table.
        place: String,
        /// The key.
        key: &'static str,
        /// What would give it a meaning.
        needs: &'static str,
    },
    /// Two tables of a kind share a name.
    #[error("two {kind} have the name \"{name}\"; give each its own")]
    NameTwice {
        /// The tables, such as `[[upstream]]`.
        kind: &'static str,
        /// The name they share.
        name: String,
    },
    /// An entry that is there twice.
    #[error("{place} lists {value} twice; leave one out")]
    EntryTwice {
        /// The table.
        place: String,
        /// The entry.
        value: String,
    },
    /// Keys that exclude or need each other.
    #[error("{place} {what}")]
    Together {
        /// The table.
        place: String,
        /// What is wrong with the keys in it, and what to do.
        what: &'static str,
    },
    /// Two services share what must be their own.
    #[error("two services have the {what} \"{value}\"; give each its own")]
    Twice {
        /// `name` or `listen`.
        what: &'static str,
        /// The value they share.
        value: String,
    },
}

/// One table of the file and the keys it may have.
pub(super) struct Section<'t> {
    place: String,
    table: &'t Table,
}

impl<'t> Section<'t> {
    /// Opens a table; `known` must not be empty.
    pub(super) fn open(
        place: String,
        table: &'t Table,
        known: &'static [&'static str],
    ) -> Result<Self, Problem> {
        for key in table.keys() {
            if !known.contains(&key.as_str()) {
                let nearest = nearest(key, known);
                return Err(Problem::UnknownKey {
                    key: key.clone(),
                    place,
                    nearest,
                });
            }
        }
        Ok(Self { place, table })
    }

    /// A table inside this one, if it is there.
    pub(super) fn section(
        &self,
        key: &'static str,
        known: &'static [&'static str],
    ) -> Result<Option<Section<'t>>, Problem> {
        self.section_at(key, format!("[{key}]"), known)
    }

    /// A table inside this one, if it is there, with a place that says inside which.
    pub(super) fn section_at(
        &self,
        key: &'static str,
        place: String,
        known: &'static [&'static str],
    ) -> Result<Option<Section<'t>>, Problem> {
        match self.table.get(key) {
            None => Ok(None),
            Some(Value::Table(table)) => Section::open(place, table, known).map(Some),
            Some(other) => Err(self.wrong_type(key, other, "a table")),
        }
    }

    /// The tables of an array, in order; empty when the key is absent.
    pub(super) fn sections(
        &self,
        key: &'static str,
        known: &'static [&'static str],
    ) -> Result<Vec<Section<'t>>, Problem> {
        let place = |index: usize, table: &Table| match table.get("name") {
            Some(Value::String(name)) => format!("[[{key}]] \"{name}\""),
            _ => format!("[[{key}]] number {}", index + 1),
        };
        self.sections_at(key, place, known)
    }

    /// The tables of an array, in order, with places that say where each is.
    pub(super) fn sections_at(
        &self,
        key: &'static str,
        place: impl Fn(usize, &Table) -> String,
        known: &'static [&'static str],
    ) -> Result<Vec<Section<'t>>, Problem> {
        let Some(value) = self.table.get(key) else {
            return Ok(Vec::new());
        };
        let Value::Array(entries) = value else {
            return Err(self.wrong_type(key, value, "a list of tables"));
        };
        let mut sections = Vec::with_capacity(entries.len());
        for (index, entry) in entries.iter().enumerate() {
            let Value::Table(table) = entry else {
                return Err(self.wrong_type(key, entry, "a list of tables"));
            };
            sections.push(Section::open(place(index, table), table, known)?);
        }
        Ok(sections)
    }

    /// The entries of a table whose keys anybody may choose; empty when it is absent.
    pub(super) fn entries(&self, key: &'static str) -> Result<Vec<(&'t str, &'t Value)>, Problem> {
        match self.table.get(key) {
            None => Ok(Vec::new()),
            Some(Value::Table(table)) => {
                let entries = table.iter().map(|(name, value)| (name.as_str(), value));
                Ok(entries.collect())
            }
            Some(other) => Err(self.wrong_type(key, other, "a table")),
        }
    }

    /// One text or a list of texts; `None` when the key is absent.
    pub(super) fn text_or_texts(&self, key: &'static str) -> Result<Option<Vec<&'t str>>, Problem> {
        const WANTED: &str = "a text in quotes or a list of them";
        let entries = match self.table.get(key) {
            None => return Ok(None),
            Some(Value::String(text)) => return Ok(Some(vec![text])),
            Some(Value::Array(entries)) => entries,
            Some(other) => return Err(self.wrong_type(key, other, WANTED)),
        };
        let texts = entries.iter().map(|entry| match entry {
            Value::String(text) => Ok(text.as_str()),
            other => Err(self.wrong_type(key, other, WANTED)),
        });
        texts.collect::<Result<_, _>>().map(Some)
    }

    /// A number in a range, whole or not, if it is there.
    pub(super) fn number(
        &self,
        key: &'static str,
        range: RangeInclusive<f64>,
        wanted: &'static str,
    ) -> Result<Option<f64>, Problem> {
        let number = match self.table.get(key) {
            None => return Ok(None),
            // Within the ranges of any setting a whole number is exact.
            #[allow(clippy::cast_precision_loss)]
            Some(Value::Integer(number)) => *number as f64,
            Some(Value::Float(number)) => *number,
            Some(other) => return Err(self.wrong_type(key, other, wanted)),
        };
        if range.contains(&number) {
            Ok(Some(number))
        } else {
            Err(self.bad_text(key, &number.to_string(), wanted))
        }
    }

    /// The problem of keys that exclude or need each other.
    /// A number that needs more open files than there may be.
    pub(super) fn more_than_files(
        &self,
        key: &'static str,
        wanted: usize,
        open_files: u64,
    ) -> Problem {
        Problem::Files {
            key,
            place: self.place.clone(),
            wanted,
            open_files,
            reserved: FILES_RESERVED,
        }
    }

    pub(super) fn together(&self, what: &'static str) -> Problem {
        Problem::Together {
            place: self.place.clone(),
            what,
        }
    }

    /// Whether the key is there and is a text.
    pub(super) fn holds_text(&self, key: &'static str) -> bool {
        matches!(self.table.get(key), Some(Value::String(_)))
    }

    /// A text, if it is there.
    pub(super) fn text(&self, key: &'static str) -> Result<Option<&'t str>, Problem> {
        match self.table.get(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(self.wrong_type(key, other, "a text in quotes")),
        }
    }

    /// What a text stands for, if it is there: one of these words.
    pub(super) fn choice<T: Copy>(
        &self,
        key: &'static str,
        choices: &[(&str, T)],
        wanted: &'static str,
    ) -> Result<Option<T>, Problem> {
        let Some(text) = self.text(key)? else {
            return Ok(None);
        };
        let chosen = choices.iter().find(|(word, _)| *word == text);
        chosen
            .map(|(_, meaning)| Some(*meaning))
            .ok_or_else(|| self.bad_text(key, text, wanted))
    }

    /// A text that must be there.
    pub(super) fn required_text(
        &self,
        key: &'static str,
        example: &'static str,
    ) -> Result<&'t str, Problem> {
        self.text(key)?.ok_or_else(|| self.missing(key, example))
    }

    /// A list of texts; empty when the key is absent.
    pub(super) fn texts(&self, key: &'static str) -> Result<Vec<&'t str>, Problem> {
        let not_texts = || Problem::NotTexts {
            place: self.place.clone(),
            key,
        };
        match self.table.get(key) {
            None => Ok(Vec::new()),
            Some(Value::Array(entries)) if !entries.is_empty() => entries
                .iter()
                .map(|entry| entry.as_str().ok_or_else(not_texts))
                .collect(),
            Some(_) => Err(not_texts()),
        }
    }

    /// True or false, if it is there.
    pub(super) fn flag(&self, key: &'static str) -> Result<Option<bool>, Problem> {
        match self.table.get(key) {
            None => Ok(None),
            Some(Value::Boolean(flag)) => Ok(Some(*flag)),
            Some(other) => Err(self.wrong_type(key, other, "true or false")),
        }
    }

    /// Whether the key is there.
    pub(super) fn has(&self, key: &'static str) -> bool {
        self.table.contains_key(key)
    }

    /// Where this is, for messages.
    pub(super) fn place(&self) -> &str {
        &self.place
    }

    /// An `address:port`, if it is there.
    pub(super) fn address(&self, key: &'static str) -> Result<Option<SocketAddr>, Problem> {
        let Some(text) = self.text(key)? else {
            return Ok(None);
        };
        let parsed = text.parse();
        parsed
            .map(Some)
            .map_err(|_| self.bad_text(key, text, "an address and a port such as 10.0.0.1:80"))
    }

    /// An `address:port` that must be there.
    pub(super) fn required_address(
        &self,
        key: &'static str,
        example: &'static str,
    ) -> Result<SocketAddr, Problem> {
        self.address(key)?.ok_or_else(|| self.missing(key, example))
    }

    /// A whole number in a range, if it is there.
    pub(super) fn whole(
        &self,
        key: &'static str,
        range: RangeInclusive<i64>,
    ) -> Result<Option<i64>, Problem> {
        match self.table.get(key) {
            None => Ok(None),
            Some(Value::Integer(number)) if range.contains(number) => Ok(Some(*number)),
            Some(Value::Integer(number)) => Err(Problem::OutOfRange {
                place: self.place.clone(),
                key,
                found: *number,
                least: *range.start(),
                most: *range.end(),
            }),
            Some(other) => Err(self.wrong_type(key, other, "a whole number")),
        }
    }

    /// The problem of a key that has no effect, if it is there.
    pub(super) fn refuse_useless(
        &self,
        keys: &[&'static str],
        needs: &'static str,
    ) -> Result<(), Problem> {
        match keys.iter().find(|key| self.has(key)) {
            None => Ok(()),
            Some(key) => Err(Problem::Useless {
                place: self.place.clone(),
                key,
                needs,
            }),
        }
    }

    /// The problem of a key that has no effect without another one, which is not there.
    pub(super) fn refuse_without(
        &self,
        key: &'static str,
        needs: &'static str,
    ) -> Result<(), Problem> {
        if self.has(needs) {
            return Ok(());
        }
        self.refuse_useless(&[key], needs)
    }

    /// The problem of a name that nothing has.
    pub(super) fn no_such<'n>(
        &self,
        key: &'static str,
        what: &'static str,
        name: &str,
        known: impl Iterator<Item = &'n str>,
    ) -> Problem {
        let nearest = known.min_by_key(|known| strsim::damerau_levenshtein(name, known));
        Problem::NoSuch {
            place: self.place.clone(),
            key,
            what,
            name: name.into(),
            nearest: nearest.map(Into::into),
        }
    }

    /// The problem of an absent key.
    pub(super) fn missing(&self, key: &'static str, example: &'static str) -> Problem {
        Problem::Missing {
            place: self.place.clone(),
            key,
            example,
        }
    }

    /// The problem of a text that means nothing here.
    pub(super) fn bad_text(&self, key: &'static str, found: &str, wanted: &'static str) -> Problem {
        Problem::BadText {
            place: self.place.clone(),
            key,
            found: found.to_owned(),
            wanted,
        }
    }

    /// The problem of a value of the wrong type.
    pub(super) fn wrong_type(
        &self,
        key: &'static str,
        found: &Value,
        wanted: &'static str,
    ) -> Problem {
        Problem::WrongType {
            place: self.place.clone(),
            key,
            found: name_of(found),
            wanted,
        }
    }
}

fn hint(nearest: Option<&str>) -> String {
    nearest.map_or_else(String::new, |nearest| {
        format!("; did you mean \"{nearest}\"?")
    })
}

fn nearest(key: &str, known: &'static [&'static str]) -> &'static str {
    let by_distance = known
        .iter()
        .min_by_key(|candidate| strsim::damerau_levenshtein(key, candidate));
    by_distance.copied().unwrap_or_default()
}

const fn name_of(value: &Value) -> &'static str {
    match value {
        Value::String(_) => "a text",
        Value::Integer(_) => "a whole number",
        Value::Float(_) => "a fraction",
        Value::Boolean(_) => "true or false",
        Value::Datetime(_) => "a date",
        Value::Array(_) => "a list",
        Value::Table(_) => "a table",
    }
}
