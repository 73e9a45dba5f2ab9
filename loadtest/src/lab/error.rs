//! Why the lab could not do something: what failed, on what, and what to do about it.

use std::path::{Path, PathBuf};

use crate::command::CommandError;

/// A failure of the lab itself, as opposed to a verdict that is not green.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    /// Namespaces, mounts and containers need it.
    #[error("the lab builds network namespaces and containers: run it as root")]
    NotRoot,
    /// A program failed.
    #[error(transparent)]
    Command(#[from] CommandError),
    /// A file operation failed.
    #[error("cannot {what} {path}: {source}")]
    File {
        /// The operation as a verb.
        what: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A program printed something unexpected.
    #[error("{program} printed something the lab does not understand: {what}")]
    Output {
        /// Which program.
        program: &'static str,
        /// What was wrong with it.
        what: String,
    },
    /// `--link` could not be read.
    #[error("--link {given}: {what}; write for example 800mbit,20ms,0.1% or none")]
    Link {
        /// As given.
        given: String,
        /// What is wrong.
        what: &'static str,
    },
    /// Something did not happen in time.
    #[error("{what} did not happen within {seconds} s{hint}")]
    NotInTime {
        /// What was waited for.
        what: String,
        /// How long.
        seconds: u64,
        /// What may explain it, starting with a separator, or nothing.
        hint: String,
    },
    /// A process of the lab ended although it should serve.
    #[error("{name} ended by itself ({status}); its last lines: {said}")]
    Ended {
        /// Which process.
        name: String,
        /// How.
        status: String,
        /// The end of its log.
        said: String,
    },
    /// CRIU can run neither here nor in a guest.
    #[error("CRIU cannot checkpoint here: {why}; try --where guest, or --engine restart")]
    NoCriu {
        /// The first error of the trial.
        why: String,
    },
    /// HTTP between the lab and an application failed.
    #[error("{what}: {why}")]
    Http {
        /// What was asked.
        what: String,
        /// What came instead.
        why: String,
    },
    /// The product did something else than it must.
    #[error("{what}")]
    Differs {
        /// What it did, and when.
        what: String,
    },
    /// The lab was asked to stop.
    #[error("interrupted")]
    Interrupted,
    /// The guest did not bring a result back.
    #[error("the guest ended without a result: {why}")]
    Guest {
        /// The last thing known about it.
        why: String,
    },
    /// A socket path would not fit the kernel's limit.
    #[error(
        "the path {path} is too long for unix sockets (108 bytes with a file name): move the checkout to a shorter path"
    )]
    PathTooLong {
        /// The run directory.
        path: PathBuf,
    },
    /// The cores cannot be shared out.
    #[error("a benchmark needs two cores, one for the proxy and one for client and origin: {why}")]
    Cores {
        /// What is in the way.
        why: String,
    },
    /// A configuration template asks for something the lab does not know.
    #[error("{path} has {{{{{name}}}}}, and the lab has no value for that")]
    Template {
        /// The template.
        path: PathBuf,
        /// The word.
        name: String,
    },
    /// Packages cannot be installed on this system.
    #[error(
        "the lab needs {missing}, and installs packages only with apt-get (Debian 12 or 13): install them by hand"
    )]
    NoApt {
        /// What is missing.
        missing: String,
    },
}

/// Shorthand of this module tree.
pub type Result<T> = std::result::Result<T, LabError>;

/// Gives a file operation's error its subject.
pub(crate) trait OnFile<T> {
    fn on(self, what: &'static str, path: &Path) -> Result<T>;
}

impl<T> OnFile<T> for std::io::Result<T> {
    fn on(self, what: &'static str, path: &Path) -> Result<T> {
        self.map_err(|source| LabError::File {
            what,
            path: path.to_owned(),
            source,
        })
    }
}

impl<T> OnFile<T> for std::result::Result<T, rustix::io::Errno> {
    fn on(self, what: &'static str, path: &Path) -> Result<T> {
        self.map_err(|errno| LabError::File {
            what,
            path: path.to_owned(),
            source: errno.into(),
        })
    }
}
