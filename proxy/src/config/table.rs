//! A typed view of one TOML table that knows all the keys it may have.
//!
//! Unknown keys are refused when the view is opened, before any value is read, so that a misspelt required key is
//! reported as misspelt and not as missing.

use std::net::SocketAddr;
use std::ops::RangeInclusive;

use toml::{Table, Value};

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
        match self.table.get(key) {
            None => Ok(None),
            Some(Value::Table(table)) => Section::open(format!("[{key}]"), table, known).map(Some),
            Some(other) => Err(self.wrong_type(key, other, "a table")),
        }
    }

    /// The tables of an array, in order; empty when the key is absent.
    pub(super) fn sections(
        &self,
        key: &'static str,
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
            let place = match table.get("name") {
                Some(Value::String(name)) => format!("[[{key}]] \"{name}\""),
                _ => format!("[[{key}]] number {}", index + 1),
            };
            sections.push(Section::open(place, table, known)?);
        }
        Ok(sections)
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

    /// A text that must be there.
    pub(super) fn required_text(
        &self,
        key: &'static str,
        example: &'static str,
    ) -> Result<&'t str, Problem> {
        self.text(key)?.ok_or_else(|| self.missing(key, example))
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

    fn wrong_type(&self, key: &'static str, found: &Value, wanted: &'static str) -> Problem {
        Problem::WrongType {
            place: self.place.clone(),
            key,
            found: name_of(found),
            wanted,
        }
    }
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
