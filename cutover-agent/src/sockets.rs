//! Unix sockets in folders of any depth. The kernel bounds a socket's path to 107 bytes; a longer one is reached
//! through the folder's descriptor under `/proc/self/fd`.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// `sun_path` is 108 bytes with its closing zero (unix(7)).
const PATH_BYTES_MAX: usize = 107;

/// Listens on a path, replacing a socket that nobody answers on. The socket is for its owner only.
///
/// # Errors
/// `AddrInUse` when somebody answers there; otherwise what the kernel says.
pub fn bind(path: &Path) -> io::Result<UnixListener> {
    match connect(path) {
        Ok(_) => {
            return Err(io::Error::new(
                io::ErrorKind::AddrInUse,
                "another process is listening there",
            ));
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(_) => std::fs::remove_file(path)?,
    }
    // Bound beside and renamed, so that nobody can connect before the permissions are set.
    let beside = path.with_extension("new");
    let _ = std::fs::remove_file(&beside);
    let listener = with_short_path(&beside, UnixListener::bind)?;
    std::fs::set_permissions(&beside, std::fs::Permissions::from_mode(0o600))?;
    std::fs::rename(&beside, path)?;
    Ok(listener)
}

/// Connects to a path.
///
/// # Errors
/// What the kernel says; `NotFound` and `ConnectionRefused` mean that nobody listens.
pub fn connect(path: &Path) -> io::Result<UnixStream> {
    with_short_path(path, UnixStream::connect)
}

/// Like [`bind`], for the runtime this is called in.
///
/// # Errors
/// As for [`bind`].
pub fn listen(path: &Path) -> io::Result<tokio::net::UnixListener> {
    let listener = bind(path)?;
    listener.set_nonblocking(true)?;
    tokio::net::UnixListener::from_std(listener)
}

/// Like [`connect`], for the runtime this is called in.
///
/// # Errors
/// As for [`connect`].
pub fn dial(path: &Path) -> io::Result<tokio::net::UnixStream> {
    let stream = connect(path)?;
    stream.set_nonblocking(true)?;
    tokio::net::UnixStream::from_std(stream)
}

fn with_short_path<T>(path: &Path, call: impl FnOnce(PathBuf) -> io::Result<T>) -> io::Result<T> {
    if path.as_os_str().len() <= PATH_BYTES_MAX {
        return call(path.to_owned());
    }
    let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "not a path of a socket",
        ));
    };
    let folder = File::open(folder)?;
    call(PathBuf::from(format!("/proc/self/fd/{}", folder.as_raw_fd())).join(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_deep_below_works_like_any_other() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("a".repeat(90)).join("b".repeat(90));
        std::fs::create_dir_all(&folder).unwrap();
        let path = folder.join("park.sock");
        let listener = bind(&path).unwrap();
        let client = connect(&path).unwrap();
        drop((listener, client));
    }

    #[test]
    fn a_socket_that_is_answered_is_not_taken_over() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("s");
        let listener = bind(&path).unwrap();
        assert_eq!(bind(&path).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        drop(listener);
        bind(&path).unwrap();
    }
}
