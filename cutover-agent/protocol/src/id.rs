//! Names and numbers with a meaning of their own, so that an epoch is never mistaken for a count.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Longest name of a service, a container or a hop, in bytes. Names become file names and label values.
pub const NAME_BYTES_MAX: usize = 64;

/// Why a name was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "the name {name:?} is not usable: use 1 to {NAME_BYTES_MAX} of a-z, A-Z, 0-9, '-', '_' and '.', starting with a letter or digit"
)]
pub struct NameError {
    /// The name as it was given.
    pub name: String,
}

fn check_name(name: &str) -> Result<(), NameError> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    let starts_well = name
        .as_bytes()
        .first()
        .is_some_and(u8::is_ascii_alphanumeric);
    if starts_well && name.len() <= NAME_BYTES_MAX && name.bytes().all(allowed) {
        Ok(())
    } else {
        Err(NameError {
            name: name.to_owned(),
        })
    }
}

macro_rules! name_type {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// The name as text; safe as a single path component.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl TryFrom<String> for $name {
            type Error = NameError;
            fn try_from(name: String) -> Result<Self, NameError> {
                check_name(&name).map(|()| Self(name))
            }
        }

        impl FromStr for $name {
            type Err = NameError;
            fn from_str(name: &str) -> Result<Self, NameError> {
                Self::try_from(name.to_owned())
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> Self {
                name.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str(&self.0)
            }
        }
    };
}

name_type! {
    /// What clients reach; it has exactly one hold gate.
    ServiceName
}
name_type! {
    /// One container of a hop, named alike at both sites.
    ContainerName
}
name_type! {
    /// One hop, unique for ever at the agent that drives it.
    HopId
}
name_type! {
    /// Who holds a gate and alone may decide about it: for an agent, the hop it drives.
    Holder
}

impl From<&HopId> for Holder {
    fn from(hop: &HopId) -> Self {
        // A name is a name.
        Self(hop.0.clone())
    }
}

/// One of the two sites of a hop.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Site {
    /// Where the service runs when the hop begins.
    Source,
    /// Where it is to run.
    Target,
}

impl Site {
    /// The word used in configuration, metrics and documentation.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Target => "target",
        }
    }
}

impl fmt::Display for Site {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.as_str())
    }
}

/// The number of who may serve. It only grows; a command that names an older one is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Epoch(pub u64);

impl Epoch {
    /// The epoch of a service that has never hopped.
    pub const FIRST: Self = Self(1);

    /// The epoch after this one.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(formatter)
    }
}

/// The arbiter's register of one service: the only truth about who may serve.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Register {
    /// Grows by one with every commit and every abort.
    pub epoch: Epoch,
    /// The site that may run unfenced.
    pub owner: Site,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_could_leave_its_folder_is_refused() {
        for bad in [
            "",
            ".",
            "..",
            "../x",
            "a/b",
            "a b",
            "-x",
            "a\n",
            &"x".repeat(65),
        ] {
            let error = bad.parse::<ServiceName>().unwrap_err();
            assert_eq!(error.name, bad);
        }
        assert_eq!(
            "web-1.prod".parse::<ServiceName>().unwrap().as_str(),
            "web-1.prod"
        );
    }
}
