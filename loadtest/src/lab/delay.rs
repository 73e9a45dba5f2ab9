//! Delays packets on kernels without netem: takes every packet of a netfilter queue, holds it for a fixed time and
//! lets it go on, in order. Run as a process of its own (`lab delay`) in a site's network namespace.
//!
//! Packets stay in the kernel: only their numbers come here (copy range 0), and one verdict lets go a whole batch.
//! Protocol: linux/netfilter/nfnetlink_queue.h.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// Most packets the kernel keeps for us: 800 Mbit/s of small segments for 100 ms, rounded up.
const QUEUE_PACKETS_MAX: u32 = 1 << 17;
/// Bytes the kernel may buffer of its messages to us.
const RECEIVE_BYTES: libc::c_int = 64 << 20;
/// Messages of one queue are far smaller than this.
const BUFFER_BYTES: usize = 1 << 20;

const SUBSYS_QUEUE: u16 = 3;
const MSG_PACKET: u8 = 0;
const MSG_CONFIG: u8 = 2;
const MSG_VERDICT_BATCH: u8 = 3;
const CFG_CMD: u16 = 1;
const CFG_PARAMS: u16 = 2;
const CFG_QUEUE_MAXLEN: u16 = 3;
const CFG_MASK: u16 = 4;
const CFG_FLAGS: u16 = 5;
const FLAG_GSO: u32 = 1 << 2;
const PACKET_HEADER: u16 = 1;
const VERDICT_HEADER: u16 = 2;
const ACCEPT: u32 = 1;

/// Holds every packet of netfilter queue `queue` for `delay`, until the process is ended.
///
/// # Errors
/// When the kernel refuses the queue, or its socket fails.
pub fn run(queue: u16, delay: Duration) -> io::Result<()> {
    let socket = open()?;
    send(
        &socket,
        queue,
        MSG_CONFIG,
        &[attribute(CFG_CMD, &[1, 0, 0, 0])],
        true,
    )?;
    // Copy mode "meta" (1), range 0: no payload crosses.
    let params = attribute(CFG_PARAMS, &[0, 0, 0, 0, 1]);
    let length = attribute(CFG_QUEUE_MAXLEN, &QUEUE_PACKETS_MAX.to_be_bytes());
    let flags = attribute(CFG_FLAGS, &FLAG_GSO.to_be_bytes());
    let mask = attribute(CFG_MASK, &FLAG_GSO.to_be_bytes());
    send(
        &socket,
        queue,
        MSG_CONFIG,
        &[params, length, flags, mask],
        true,
    )?;
    let mut waiting: VecDeque<(u32, Instant)> = VecDeque::new();
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        let wait = waiting
            .front()
            .map(|(_, due)| due.saturating_duration_since(Instant::now()));
        let wait = wait.map(|wait| Timespec {
            tv_sec: wait.as_secs().cast_signed(),
            tv_nsec: wait.subsec_nanos().into(),
        });
        let ready = poll(&mut [PollFd::new(&socket, PollFlags::IN)], wait.as_ref())?;
        if ready > 0 {
            take(&socket, &mut buffer, &mut waiting, delay)?;
        }
        let (now, mut last) = (Instant::now(), None);
        while let Some((id, _)) = waiting.front().filter(|(_, due)| *due <= now) {
            last = Some(*id);
            waiting.pop_front();
        }
        if let Some(id) = last {
            let verdict = [ACCEPT.to_be_bytes(), id.to_be_bytes()].concat();
            send(
                &socket,
                queue,
                MSG_VERDICT_BATCH,
                &[attribute(VERDICT_HEADER, &verdict)],
                false,
            )?;
        }
    }
}

fn open() -> io::Result<OwnedFd> {
    // SAFETY: socket(2) takes no pointers; a non-negative result is a descriptor nobody else owns.
    let socket = unsafe {
        let fd = libc::socket(
            libc::AF_NETLINK,
            libc::SOCK_RAW | libc::SOCK_CLOEXEC,
            libc::NETLINK_NETFILTER,
        );
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        OwnedFd::from_raw_fd(fd)
    };
    let fd = socket.as_raw_fd();
    let option = |level: libc::c_int, name: libc::c_int, value: libc::c_int| {
        // SAFETY: the option's value is an int that lives through the call, and its size is given.
        let done = unsafe {
            libc::setsockopt(
                fd,
                level,
                name,
                (&raw const value).cast(),
                size_of_val(&value) as libc::socklen_t,
            )
        };
        if done == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    };
    option(libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, RECEIVE_BYTES)?;
    option(libc::SOL_NETLINK, libc::NETLINK_NO_ENOBUFS, 1)?;
    Ok(socket)
}

fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
    let mut bytes = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
    bytes.extend_from_slice(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

fn send(
    socket: &OwnedFd,
    queue: u16,
    kind: u8,
    attributes: &[Vec<u8>],
    acknowledged: bool,
) -> io::Result<()> {
    let body = attributes.concat();
    let length = u32::try_from(16 + 4 + body.len()).unwrap_or(u32::MAX);
    let flags: u16 = if acknowledged { 1 | 4 } else { 1 };
    let mut bytes = Vec::with_capacity(length as usize);
    bytes.extend_from_slice(&length.to_ne_bytes());
    bytes.extend_from_slice(&((SUBSYS_QUEUE << 8) | u16::from(kind)).to_ne_bytes());
    bytes.extend_from_slice(&flags.to_ne_bytes());
    bytes.extend_from_slice(&[0; 8]); // sequence and port: answers are told apart by their order
    bytes.extend_from_slice(&[0, 0]); // any family, version 0
    bytes.extend_from_slice(&queue.to_be_bytes());
    bytes.extend_from_slice(&body);
    rustix::net::send(socket, &bytes, rustix::net::SendFlags::empty())?;
    if acknowledged {
        acknowledge(socket)
    } else {
        Ok(())
    }
}

fn acknowledge(socket: &OwnedFd) -> io::Result<()> {
    let mut answer = [0_u8; 4096];
    let (read, _) = rustix::net::recv(
        socket,
        answer.as_mut_slice(),
        rustix::net::RecvFlags::empty(),
    )?;
    let is_error = read >= 20 && u16_at(&answer, 4) == 2;
    match (
        is_error,
        i32::from_ne_bytes([answer[16], answer[17], answer[18], answer[19]]),
    ) {
        (true, code) if code != 0 => Err(io::Error::from_raw_os_error(-code)),
        _ => Ok(()),
    }
}

fn take(
    socket: &OwnedFd,
    buffer: &mut [u8],
    waiting: &mut VecDeque<(u32, Instant)>,
    delay: Duration,
) -> io::Result<()> {
    // Bounded, so that verdicts are never put off for long by a steady stream of packets.
    for _ in 0..64 {
        let read = match rustix::net::recv(socket, &mut *buffer, rustix::net::RecvFlags::DONTWAIT) {
            Ok((read, _)) => read,
            Err(rustix::io::Errno::AGAIN) => return Ok(()),
            Err(errno) => return Err(errno.into()),
        };
        let due = Instant::now() + delay;
        waiting.extend(packets(&buffer[..read]).map(|id| (id, due)));
    }
    Ok(())
}

/// The numbers of the packets announced in `bytes`, in order.
fn packets(mut bytes: &[u8]) -> impl Iterator<Item = u32> + '_ {
    std::iter::from_fn(move || {
        while bytes.len() >= 20 {
            let length = u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]) as usize;
            let (message, rest) = bytes.split_at(length.clamp(16, bytes.len()));
            let packet = u16_at(message, 4) == (SUBSYS_QUEUE << 8) | u16::from(MSG_PACKET);
            // Messages are aligned to 4 bytes.
            bytes = rest
                .get(length.next_multiple_of(4) - length..)
                .unwrap_or_default();
            if let Some(id) = packet
                .then(|| packet_id(message.get(20..).unwrap_or_default()))
                .flatten()
            {
                return Some(id);
            }
        }
        None
    })
}

fn packet_id(mut attributes: &[u8]) -> Option<u32> {
    while attributes.len() >= 8 {
        let (length, kind) = (
            usize::from(u16_at(attributes, 0)),
            u16_at(attributes, 2) & 0x7fff,
        );
        if kind == PACKET_HEADER {
            return Some(u32::from_be_bytes([
                attributes[4],
                attributes[5],
                attributes[6],
                attributes[7],
            ]));
        }
        attributes = attributes
            .get(length.max(4).next_multiple_of(4)..)
            .unwrap_or_default();
    }
    None
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_ne_bytes([bytes[at], bytes[at + 1]])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_packets_of_a_batch_of_messages_are_found_in_order() {
        let mut bytes = Vec::new();
        for id in [7_u32, 8] {
            let header = attribute(PACKET_HEADER, &[&id.to_be_bytes()[..], &[8, 0, 0]].concat());
            bytes.extend_from_slice(&u32::try_from(20 + header.len()).unwrap().to_ne_bytes());
            bytes.extend_from_slice(&(SUBSYS_QUEUE << 8).to_ne_bytes());
            bytes.extend_from_slice(&[0; 14]);
            bytes.extend_from_slice(&header);
        }
        assert_eq!(packets(&bytes).collect::<Vec<_>>(), [7, 8]);
    }

    #[test]
    fn cut_off_messages_are_no_panic() {
        let whole = [
            vec![28, 0, 0, 0, 0, 3],
            vec![0; 14],
            attribute(PACKET_HEADER, &[0, 0, 0, 9]),
        ]
        .concat();
        for cut in 0..whole.len() {
            let _ = packets(&whole[..cut]).count();
        }
    }
}
