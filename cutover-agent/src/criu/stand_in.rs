//! What a runtime finds in CRIU's place when it is started to restore, before there is anything to restore.
//!
//! The first thing runc does with CRIU is to ask for its version (`checkCriuVersion` in criu_linux.go), and it looks at
//! the root file system and the images only after that. So we answer that question, with what CRIU itself says, when
//! everything has arrived: clients wait neither for the start of the runtime nor for that of CRIU to be asked. Whatever is
//! asked after that goes to CRIU.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};

use rustix::io::{FdFlags, fcntl_setfd};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair,
};

use super::hook::{ERROR_FILE, park};

/// The folder in a park folder that comes first on the runtime's search path.
pub(super) const FOLDER: &str = "stand-in";
/// What it holds until the question was asked.
pub(super) const PROGRAM: &str = "criu";

/// A request for the version: the first field of `criu_req`, its type, is 10 (rpc.proto).
const VERSION_REQUEST: [u8; 2] = [0x08, 10];
/// Longer than any question or answer about versions.
const MESSAGE_BYTES_MAX: usize = 64 << 10;

/// The entry point of the hidden `stand-in` command. `folder` is the park folder, `arguments` what CRIU was given.
#[must_use]
pub fn run(folder: &Path, criu: &Path, arguments: &[OsString]) -> ExitCode {
    match answer_later(folder, criu, arguments) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            let _ = std::fs::write(folder.join(ERROR_FILE), error.to_string());
            ExitCode::FAILURE
        }
    }
}

fn answer_later(folder: &Path, criu: &Path, arguments: &[OsString]) -> io::Result<bool> {
    std::fs::remove_file(folder.join(FOLDER).join(PROGRAM))?;
    let asker = asker(arguments)
        .ok_or_else(|| io::Error::other(format!("the runtime calls CRIU with {arguments:?}")))?;
    // SAFETY: the runtime left it open for us, for as long as we run; what is no socket is refused by the first call.
    let runtime = unsafe { BorrowedFd::borrow_raw(asker) };
    let question = receive(runtime)?;
    if !question.starts_with(&VERSION_REQUEST) {
        return Err(io::Error::other(
            "the runtime does not ask for CRIU's version first",
        ));
    }
    let answer = ask(criu, &question)?;
    let released = park(folder)?;
    if released {
        send(runtime, &answer, SendFlags::empty())?;
    }
    Ok(released)
}

/// The socket over which the runtime asks: `criu swrk NUMBER`.
fn asker(arguments: &[OsString]) -> Option<i32> {
    match arguments {
        [verb, number] if verb == "swrk" => number.to_str()?.parse().ok().filter(|fd| *fd > 2),
        _ => None,
    }
}

/// What CRIU itself answers.
fn ask(criu: &Path, question: &[u8]) -> io::Result<Vec<u8>> {
    let (ours, theirs) = socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )?;
    let mut asked = start(criu, theirs)?;
    send(&ours, question, SendFlags::empty())?;
    let answer = receive(ours.as_fd())?;
    // It ends when there is nobody to ask it more.
    drop(ours);
    asked.wait()?;
    Ok(answer)
}

fn start(criu: &Path, socket: OwnedFd) -> io::Result<std::process::Child> {
    fcntl_setfd(&socket, FdFlags::empty())?;
    Command::new(criu)
        .arg("swrk")
        .arg(socket.as_raw_fd().to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
}

fn receive(socket: BorrowedFd<'_>) -> io::Result<Vec<u8>> {
    let mut message = vec![0; MESSAGE_BYTES_MAX];
    let (length, _) = recv(socket, message.as_mut_slice(), RecvFlags::empty())?;
    message.truncate(length);
    if message.is_empty() {
        return Err(io::Error::from(io::ErrorKind::UnexpectedEof));
    }
    Ok(message)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What comes of a runtime that says `question`, and why.
    fn asked(question: &[u8], verb: &str) -> (ExitCode, String, bool) {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join(FOLDER)).unwrap();
        let program = folder.path().join(FOLDER).join(PROGRAM);
        std::fs::write(&program, "").unwrap();
        let (runtime, ours) = socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .unwrap();
        send(&runtime, question, SendFlags::empty()).unwrap();
        let arguments = [verb.into(), ours.as_raw_fd().to_string().into()];
        let code = run(folder.path(), Path::new("/there/is/no/criu"), &arguments);
        let why = std::fs::read_to_string(folder.path().join(ERROR_FILE)).unwrap_or_default();
        (code, why, program.exists())
    }

    #[test]
    fn a_runtime_that_does_not_ask_for_the_version_first_is_told_so_and_finds_criu_the_next_time() {
        // A request to restore.
        for (question, verb, why) in [
            ([0x08, 2], "swrk", "does not ask for CRIU's version first"),
            ([0x08, 10], "restore", "calls CRIU with"),
            ([0x08, 10], "swrk", "No such file"),
        ] {
            let (code, said, is_there) = asked(&question, verb);
            assert_eq!(format!("{code:?}"), format!("{:?}", ExitCode::FAILURE));
            assert!(said.contains(why) && !is_there, "{said}");
        }
    }
}
