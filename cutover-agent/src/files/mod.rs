//! Trees of files: what is in them, what changed, and how to make another tree equal.
//!
//! `walk` reads a tree's structure, `rewalk` only what an `index` says has changed of it, `content` its blocks, `apply` changes a tree at the target; all three stay beneath
//! an open root ([`Root`]) whatever symlinks are planted in it. Nothing here knows about connections.
//!
//! One file system per tree: mount points inside are recorded as empty directories, as `rsync -x` does. Sockets are
//! skipped: they belong to a process, not to a tree.

pub(crate) mod apply;
pub mod blocks;
pub(crate) mod content;
pub(crate) mod cuts;
pub(crate) mod index;
pub mod manifest;
pub mod remembered;
pub(crate) mod rewalk;
mod root;
pub mod walk;

use std::path::PathBuf;

use thiserror::Error;

pub use manifest::{Entry, Kind, Manifest, ManifestError};
pub use root::Root;

/// What went wrong with a file on this machine.
#[derive(Debug, Error)]
pub enum FilesError {
    /// A file or folder cannot be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The entry.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A file or folder cannot be written.
    #[error("cannot write {path}: {source}")]
    Write {
        /// The entry.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The file system is full, or a quota is used up.
    #[error("no space left for {path}: free some at the target and try again")]
    NoSpace {
        /// The entry.
        path: PathBuf,
    },
    /// A file changed while everything was supposed to be frozen.
    #[error(
        "{path} changed while its container was frozen: some other process writes there; stop it and try again"
    )]
    Changed {
        /// The entry.
        path: PathBuf,
    },
    /// The manifest breaks a rule.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// Somebody lost interest in the result.
    #[error("given up before the end")]
    Cancelled,
}

impl FilesError {
    pub(crate) fn read(path: PathBuf, errno: rustix::io::Errno) -> Self {
        Self::Read {
            path,
            source: errno.into(),
        }
    }

    pub(crate) fn write(path: PathBuf, errno: rustix::io::Errno) -> Self {
        use rustix::io::Errno;
        match errno {
            Errno::NOSPC | Errno::DQUOT => Self::NoSpace { path },
            errno => Self::Write {
                path,
                source: errno.into(),
            },
        }
    }
}
