//! What a runtime finds in CRIU's place, and what becomes CRIU: it hands the runtime's socket to the shim, takes another in
//! its stead, and runs CRIU. So CRIU is the runtime's child, as it must be for the tasks it restores to be, and the shim
//! stands between the two.

use std::ffi::OsString;
use std::io;
use std::os::fd::{BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode};

use super::rpc;
use super::shim::{ERROR_FILE, SHIM_SOCKET, cannot_run};
use crate::sockets;

/// The folder in a park folder that comes first on the runtime's search path.
pub(super) const FOLDER: &str = "stand-in";
/// What it holds.
pub(super) const PROGRAM: &str = "criu";

/// The entry point of the hidden `stand-in` command. `folder` is the park folder, `arguments` what CRIU was given.
#[must_use]
pub fn run(folder: &Path, criu: &Path, arguments: &[OsString]) -> ExitCode {
    let error = match hand_over(folder, arguments) {
        // It comes back only when it failed.
        Ok(()) => cannot_run(criu, &Command::new(criu).args(arguments).exec()),
        Err(error) => error,
    };
    let _ = std::fs::write(folder.join(ERROR_FILE), error.to_string());
    ExitCode::FAILURE
}

fn hand_over(folder: &Path, arguments: &[OsString]) -> io::Result<()> {
    let number = asker(arguments)
        .ok_or_else(|| io::Error::other(format!("the runtime calls CRIU with {arguments:?}")))?;
    // SAFETY: the runtime left it open for us, for as long as we run; what is no socket is refused by the first call.
    let runtime = unsafe { BorrowedFd::borrow_raw(number) };
    let shim = sockets::connect(&folder.join(SHIM_SOCKET))?;
    rpc::send_with(&shim, b"x", &[runtime])?;
    let ours = rpc::receive_descriptor(&shim)?;
    // SAFETY: nobody else in this process has it.
    let mut place = unsafe { OwnedFd::from_raw_fd(number) };
    rustix::io::dup2(&ours, &mut place)?;
    // CRIU has it from here on.
    let _ = place.into_raw_fd();
    Ok(())
}

/// The socket over which the runtime asks: `criu swrk NUMBER`.
fn asker(arguments: &[OsString]) -> Option<i32> {
    match arguments {
        [verb, number] if verb == "swrk" => number.to_str()?.parse().ok().filter(|fd| *fd > 2),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_runtime_that_calls_criu_in_another_way_is_told_so() {
        let folder = tempfile::tempdir().unwrap();
        for arguments in [
            &["restore", "3"][..],
            &["swrk"],
            &["swrk", "2"],
            &["swrk", "x"],
        ] {
            let arguments: Vec<OsString> = arguments.iter().map(OsString::from).collect();
            let code = run(folder.path(), Path::new("/there/is/no/criu"), &arguments);
            assert_eq!(format!("{code:?}"), format!("{:?}", ExitCode::FAILURE));
            let said = std::fs::read_to_string(folder.path().join(ERROR_FILE)).unwrap();
            assert!(said.contains("calls CRIU with"), "{said}");
        }
    }
}
