//! The words between a runtime and the CRIU that it starts (rpc.proto in CRIU's sources): one message a packet, each
//! request answered before the next.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg,
    sendmsg, socketpair, sockopt,
};

use super::protobuf::{self, Value};

/// Fields of `criu_req`, and of `criu_resp` as far as they are the same.
const KIND: u64 = 1;
const OPTIONS: u64 = 2;
const NOTIFY_SUCCESS: u64 = 3;
/// Of `criu_resp`.
const NOTIFY: u64 = 5;
/// Of `criu_notify`.
const SCRIPT: u64 = 1;
/// Fields of `criu_opts`.
const IMAGES_DIR_FD: u64 = 1;
const PID: u64 = 2;
const WORK_DIR_FD: u64 = 17;

/// Of `criu_req_type`.
const NOTIFY_KIND: u64 = 6;

/// Longer than any message: the longest, runc's request to restore, names mounts and cgroups.
const MESSAGE_BYTES_MAX: usize = 1 << 20;
/// CRIU sends one descriptor at a time, a terminal's.
const DESCRIPTORS_MAX: usize = 4;

/// What a runtime asks for, as far as it matters here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Dump,
    Restore,
    Version,
    Other,
}

/// One message, and the descriptors that go with it.
#[derive(Debug)]
pub(super) struct Message {
    pub(super) bytes: Vec<u8>,
    descriptors: Vec<OwnedFd>,
}

impl Message {
    fn of(bytes: Vec<u8>) -> Self {
        Self {
            bytes,
            descriptors: Vec::new(),
        }
    }

    /// What a runtime says that does not want CRIU to go on after a notification.
    pub(super) fn refusal() -> Self {
        let mut bytes = Vec::new();
        protobuf::put(&mut bytes, KIND, Value::Number(NOTIFY_KIND));
        protobuf::put(&mut bytes, NOTIFY_SUCCESS, Value::Number(0));
        Self::of(bytes)
    }

    /// What a runtime asks for.
    pub(super) fn kind(&self) -> Kind {
        match protobuf::number(&self.bytes, KIND) {
            Some(1) => Kind::Dump,
            Some(2) => Kind::Restore,
            Some(10) => Kind::Version,
            _ => Kind::Other,
        }
    }

    /// The step that CRIU notifies its runtime of; nothing in an answer to a request.
    pub(super) fn step(&self) -> Option<String> {
        if protobuf::number(&self.bytes, KIND) != Some(NOTIFY_KIND) {
            return None;
        }
        let step = protobuf::bytes(protobuf::bytes(&self.bytes, NOTIFY)?, SCRIPT)?;
        Some(String::from_utf8_lossy(step).into_owned())
    }

    /// The first process of what is to be dumped.
    pub(super) fn init_pid(&self) -> Option<u32> {
        let options = protobuf::bytes(&self.bytes, OPTIONS)?;
        u32::try_from(protobuf::number(options, PID)?).ok()
    }

    /// Lets a request name its folders by descriptors of this process, which are kept in what is returned: CRIU looks for
    /// them at whoever made its socket (`resolve_images_dir_path` in cr-service.c), and the runtime has named its own.
    ///
    /// # Errors
    /// When a folder of the runtime cannot be opened.
    pub(super) fn adopt_folders(&mut self, runtime: u32) -> io::Result<Vec<File>> {
        let mut options = protobuf::bytes(&self.bytes, OPTIONS)
            .unwrap_or_default()
            .to_vec();
        let mut folders = Vec::new();
        for field in [IMAGES_DIR_FD, WORK_DIR_FD] {
            let named = protobuf::number(&options, field).and_then(|fd| u32::try_from(fd).ok());
            if let Some(fd) = named {
                let folder = File::open(format!("/proc/{runtime}/fd/{fd}"))?;
                let own = u64::from(folder.as_raw_fd().unsigned_abs());
                protobuf::put(&mut options, field, Value::Number(own));
                folders.push(folder);
            }
        }
        let mut bytes = Vec::new();
        for (field, value) in protobuf::fields(&self.bytes) {
            match field {
                OPTIONS => protobuf::put(&mut bytes, field, Value::Bytes(&options)),
                _ => protobuf::put(&mut bytes, field, value),
            }
        }
        self.bytes = bytes;
        Ok(folders)
    }
}

/// A pair of sockets as runtimes make it.
pub(super) fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let (kind, flags) = (SocketType::SEQPACKET, SocketFlags::CLOEXEC);
    Ok(socketpair(AddressFamily::UNIX, kind, flags, None)?)
}

/// The process that made this pair.
pub(super) fn maker(socket: impl AsFd) -> io::Result<u32> {
    Ok(sockopt::socket_peercred(socket)?
        .pid
        .as_raw_pid()
        .unsigned_abs())
}

/// Sends a message.
///
/// # Errors
/// What the kernel says; `BrokenPipe` when nobody is at the other end.
pub(super) fn send(socket: impl AsFd, message: &Message) -> io::Result<()> {
    let descriptors: Vec<BorrowedFd<'_>> = message.descriptors.iter().map(AsFd::as_fd).collect();
    send_with(socket, &message.bytes, &descriptors)
}

/// Sends bytes and descriptors, all at once.
///
/// # Errors
/// As [`send`].
pub(super) fn send_with(
    socket: impl AsFd,
    bytes: &[u8],
    descriptors: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::Error::other("too many descriptors for one message"));
    }
    sendmsg(
        socket,
        &[IoSlice::new(bytes)],
        &mut control,
        SendFlags::NOSIGNAL,
    )?;
    Ok(())
}

/// Waits for a message; nothing when the other end is closed.
///
/// # Errors
/// What the kernel says, or when the message is longer than any can be.
pub(super) fn receive(socket: impl AsFd) -> io::Result<Option<Message>> {
    let mut bytes = vec![0; MESSAGE_BYTES_MAX];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(
        socket,
        &mut [IoSliceMut::new(&mut bytes)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC,
    );
    let received = match received {
        Err(rustix::io::Errno::CONNRESET) => return Ok(None),
        received => received?,
    };
    if received.flags.contains(ReturnFlags::TRUNC) {
        return Err(io::Error::other("a message of CRIU's that is too long"));
    }
    bytes.truncate(received.bytes);
    let mut descriptors = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            descriptors.extend(rights);
        }
    }
    let ended = bytes.is_empty() && descriptors.is_empty();
    Ok((!ended).then_some(Message { bytes, descriptors }))
}

/// Waits for the one descriptor that comes with a byte.
///
/// # Errors
/// When nothing comes, or something else.
pub(super) fn receive_descriptor(socket: impl AsFd) -> io::Result<OwnedFd> {
    let came = receive(socket)?.and_then(|mut message| message.descriptors.pop());
    came.ok_or_else(|| io::Error::other("no socket was handed over"))
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn folders_of_the_runtime_become_ours_and_all_else_stays() {
        let (folder, file) = (tempfile::tempdir().unwrap(), tempfile::tempfile().unwrap());
        let theirs = File::open(folder.path()).unwrap();
        let mut options = Vec::new();
        let fd = theirs.as_raw_fd() as u64;
        protobuf::put(&mut options, IMAGES_DIR_FD, Value::Number(fd));
        protobuf::put(&mut options, PID, Value::Number(4711));
        protobuf::put(&mut options, 26, Value::Bytes(b"/root"));
        let mut request = Vec::new();
        protobuf::put(&mut request, KIND, Value::Number(1));
        protobuf::put(&mut request, OPTIONS, Value::Bytes(&options));
        protobuf::put(&mut request, 4, Value::Number(1));
        let mut request = Message::of(request);
        let folders = request.adopt_folders(std::process::id()).unwrap();
        assert_eq!(
            (request.kind(), request.init_pid()),
            (Kind::Dump, Some(4711))
        );
        assert_eq!(protobuf::number(&request.bytes, 4), Some(1));
        let options = protobuf::bytes(&request.bytes, OPTIONS).unwrap();
        assert_eq!(protobuf::bytes(options, 26), Some(&b"/root"[..]));
        let last = protobuf::fields(options).last();
        let own = folders[0].as_raw_fd() as u64;
        assert_eq!(
            (folders.len(), last),
            (1, Some((IMAGES_DIR_FD, Value::Number(own))))
        );
        // A folder that is not there is said so, and no descriptor is no folder.
        drop(file);
        let mut options = Vec::new();
        protobuf::put(&mut options, IMAGES_DIR_FD, Value::Number(u64::MAX));
        let mut request = Vec::new();
        protobuf::put(&mut request, OPTIONS, Value::Bytes(&options));
        let mut unnamed = Message::of(request);
        assert!(
            unnamed
                .adopt_folders(std::process::id())
                .unwrap()
                .is_empty()
        );
    }

    #[test]
    fn descriptors_pass_and_the_end_is_seen() {
        let (here, there) = pair().unwrap();
        let mut file = tempfile::tempfile().unwrap();
        io::Write::write_all(&mut file, b"terminal").unwrap();
        io::Seek::rewind(&mut file).unwrap();
        send_with(&here, b"x", &[file.as_fd()]).unwrap();
        let passed = receive(&there).unwrap().unwrap();
        send(&there, &passed).unwrap();
        let mut again = File::from(receive_descriptor(&here).unwrap());
        let mut text = String::new();
        again.read_to_string(&mut text).unwrap();
        assert_eq!(text, "terminal");
        assert_eq!(maker(&here).unwrap(), std::process::id());
        drop(here);
        assert!(receive(&there).unwrap().is_none());
        let broken = send(&there, &Message::refusal()).unwrap_err();
        assert_eq!(broken.kind(), io::ErrorKind::BrokenPipe);
    }

    #[test]
    fn requests_notifications_and_answers_are_told_apart() {
        assert_eq!(Message::refusal().bytes, [8, 6, 24, 0]);
        assert_eq!(Message::refusal().step(), None);
        assert_eq!(Message::of(vec![8, 10]).kind(), Kind::Version);
        let notification = [
            8, 6, 16, 1, 42, 8, 10, 6, b'a', b'-', b'd', b'u', b'm', b'p',
        ];
        assert_eq!(
            Message::of(notification.to_vec()).step().as_deref(),
            Some("a-dump")
        );
    }
}
