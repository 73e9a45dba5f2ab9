//! Pulls CRIU's cork. CRIU holds back packets that are not full, and never takes that back before its last word
//! (`criu/page-xfer.c`): the kernel would keep that word for 200 ms (`TCP_CORK` in tcp(7)) while the tasks are frozen.
//! So whoever waits for it pushes what CRIU's socket holds, by a second descriptor of that socket
//! (`lender.rs`). It is closed at once: while it is open, the connection would outlive CRIU. Where there is none to
//! be had, the word comes late and all is well.

use std::io::{self, ErrorKind, Read};
use std::net::{SocketAddr, SocketAddrV4, TcpStream};
use std::time::Duration;

use super::listen::socket_of;
use super::{Says, is_silent_for};
use crate::lender::Lender;

/// Silence after which something may be held back. While pages come, none is as long.
const SILENCE: Duration = Duration::from_millis(2);
/// A longer one means that CRIU is busy with something else, even where it has a slow machine to itself and us.
const PAUSE: Duration = Duration::from_millis(10);

/// What CRIU says, with nothing held back for long.
#[derive(Debug)]
pub(crate) struct Uncorked<'s> {
    stream: &'s TcpStream,
    far: Far,
}

/// Whose the other end of the connection is.
#[derive(Debug)]
enum Far {
    NotSought,
    Found { process: Lender, number: i32 },
    OutOfReach,
}

impl<'s> Uncorked<'s> {
    /// Reads from a connection whose other end is a process of this machine.
    ///
    /// # Errors
    /// When the stream takes no time limit.
    pub(crate) fn new(stream: &'s TcpStream) -> io::Result<Self> {
        stream.set_read_timeout(Some(SILENCE))?;
        Ok(Self {
            stream,
            far: Far::NotSought,
        })
    }

    fn pull(&mut self) {
        if matches!(self.far, Far::NotSought) {
            self.far = sought(self.stream).unwrap_or(Far::OutOfReach);
        }
        let Far::Found { process, number } = &self.far else {
            return;
        };
        let Ok(file) = process.borrow(*number) else {
            return;
        };
        let socket = TcpStream::from(file);
        // The number may have been given to another file meanwhile.
        if matches!((socket.local_addr(), self.stream.peer_addr()), (Ok(has), Ok(wanted)) if has == wanted)
        {
            // Sends what waits, each time it is set (tcp(7)).
            socket.set_nodelay(true).ok();
        }
    }
}

impl Says for Uncorked<'_> {
    fn is_silent(&mut self) -> bool {
        if !is_silent_for(self.stream, SILENCE) {
            return false;
        }
        self.pull();
        is_silent_for(self.stream, PAUSE)
    }
}

impl Read for Uncorked<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.stream.read(buffer) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.pull(),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                done => return done,
            }
        }
    }
}

/// The process that has the other end: most likely a young one.
fn sought(stream: &TcpStream) -> Option<Far> {
    let (far, near) = (ipv4(stream.peer_addr())?, ipv4(stream.local_addr())?);
    let inode = socket_of(far, near)?.inode;
    let entries = std::fs::read_dir("/proc").ok()?.flatten();
    let pid = |entry: std::fs::DirEntry| entry.file_name().to_str()?.parse().ok();
    let mut pids: Vec<i32> = entries.filter_map(pid).collect();
    pids.sort_unstable_by(|one, other| other.cmp(one));
    pids.into_iter().find_map(|pid| {
        let process = Lender::of(pid)?;
        let (number, _) = process.sockets().find(|(_, found)| *found == inode)?;
        Some(Far::Found { process, number })
    })
}

fn ipv4(address: io::Result<SocketAddr>) -> Option<SocketAddrV4> {
    match address {
        Ok(SocketAddr::V4(address)) => Some(address),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::net::TcpListener;

    use rustix::net::sockopt::set_tcp_cork;

    use super::*;

    /// CRIU's end of a connection, and ours.
    fn connection() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let criu = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (criu, listener.accept().unwrap().0)
    }

    /// Whether a corked word waited, and what came after a pull.
    fn corked() -> (bool, Vec<u8>) {
        let (mut criu, ours) = connection();
        set_tcp_cork(&criu, true).unwrap();
        criu.write_all(b"close").unwrap();
        let mut uncorked = Uncorked::new(&ours).unwrap();
        ours.set_nonblocking(true).unwrap();
        let mut room = [0; 16];
        let waits = ours.peek(&mut room).is_err();
        uncorked.pull();
        assert!(matches!(uncorked.far, Far::Found { .. }));
        let count = ours.peek(&mut room).unwrap_or(0);
        (waits, room[..count].to_vec())
    }

    #[test]
    fn a_word_that_is_held_back_comes_when_the_cork_is_pulled() {
        // The kernel holds it for 200 ms; a machine that stands still for longer in every attempt is broken.
        let waited = (0..50).any(|_| {
            let (waits, came) = corked();
            assert!(!waits || came == b"close");
            waits
        });
        assert!(waited);
    }

    #[test]
    fn silence_is_no_end_and_a_close_is() {
        let (mut criu, ours) = connection();
        let speaking = std::thread::spawn(move || {
            std::thread::sleep(SILENCE * 5);
            criu.write_all(b"late").unwrap();
        });
        let mut said = Vec::new();
        let mut uncorked = Uncorked::new(&ours).unwrap();
        uncorked.read_to_end(&mut said).unwrap();
        assert_eq!(said, b"late");
        speaking.join().unwrap();
    }
}
