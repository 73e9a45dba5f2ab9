//! Patterns of file names, as a shell reads them.

use serde::{Deserialize, Serialize};

/// A pattern of the last part of a path, with `*`, `?` and `[...]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct NamePattern(glob::Pattern);

/// A pattern that is none.
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
pub enum BadPattern {
    /// It cannot be read.
    #[error("{pattern:?} is no pattern of file names: {reason}")]
    Syntax {
        /// As it was written.
        pattern: String,
        /// What is wrong.
        reason: &'static str,
    },
    /// It speaks of folders.
    #[error(
        "{0:?} is no pattern of file names: it is compared with the last part of a path, so leave out all up to the last '/'"
    )]
    Folder(String),
}

impl NamePattern {
    /// What MariaDB, MySQL and SQLite write in place.
    #[must_use]
    pub fn databases() -> Vec<Self> {
        const NAMES: [&str; 13] = [
            "*.ibd",
            "*.ibu",
            "ibdata*",
            "ibtmp*",
            "ib_logfile*",
            "#ib_*",
            "undo_*",
            "undo[0-9]*",
            "*.MA[DI]",
            "*.MY[DI]",
            "aria_log*",
            "*.sqlite*",
            "*.db",
        ];
        let patterns = NAMES
            .iter()
            .filter_map(|name| glob::Pattern::new(name).ok());
        patterns.map(Self).collect()
    }

    /// Whether the last part of a path fits.
    #[must_use]
    pub fn fits(&self, path: &[u8]) -> bool {
        let name = path.rsplit(|byte| *byte == b'/').next().unwrap_or(path);
        self.0.matches(&String::from_utf8_lossy(name))
    }
}

impl TryFrom<String> for NamePattern {
    type Error = BadPattern;

    fn try_from(pattern: String) -> Result<Self, BadPattern> {
        if pattern.contains('/') {
            return Err(BadPattern::Folder(pattern));
        }
        match glob::Pattern::new(&pattern) {
            Ok(parsed) => Ok(Self(parsed)),
            Err(error) => Err(BadPattern::Syntax {
                pattern,
                reason: error.msg,
            }),
        }
    }
}

impl From<NamePattern> for String {
    fn from(pattern: NamePattern) -> Self {
        pattern.0.as_str().to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pattern(text: &str) -> Result<NamePattern, BadPattern> {
        NamePattern::try_from(text.to_owned())
    }

    #[test]
    fn a_pattern_is_compared_with_the_last_part_of_a_path() {
        let tables = pattern("*.ibd").unwrap();
        assert!(tables.fits(b"wordpress/wp_posts.ibd"));
        assert!(tables.fits(b"mysql.ibd"));
        assert!(!tables.fits(b"a.ibd/readme"));
        assert!(!tables.fits(b"wordpress/wp_posts.ibd.gz"));
    }

    #[test]
    fn databases_write_these_in_place_and_applications_those_anew() {
        let is_in_place = |path: &str| {
            let known = NamePattern::databases();
            known.iter().any(|pattern| pattern.fits(path.as_bytes()))
        };
        for path in [
            "ibdata1",
            "ib_logfile0",
            "undo001",
            "w/wp_posts.ibd",
            "mysql/db.MAD",
            "aria_log.00000001",
            "app.sqlite3-wal",
        ] {
            assert!(is_in_place(path), "{path}");
        }
        for path in [
            "index.php",
            "access.log",
            "dump.sql",
            "app.js",
            "photo.jpeg",
            "database",
        ] {
            assert!(!is_in_place(path), "{path}");
        }
    }

    #[test]
    fn what_can_not_be_a_pattern_of_a_name_is_refused_with_a_reason() {
        let refused = pattern("mysql/*.ibd").unwrap_err().to_string();
        assert!(refused.contains("last part of a path"), "{refused}");
        let refused = pattern("[a").unwrap_err().to_string();
        assert!(refused.contains("[a"), "{refused}");
    }
}
