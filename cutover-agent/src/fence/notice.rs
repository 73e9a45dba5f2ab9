//! What the kernel says of a namespace's packet filters: a message for each transaction that has taken effect
//! (`NFNLGRP_NFTABLES`, linux/netfilter/nfnetlink.h).

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::Stdio;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::netlink::{NETFILTER, SocketAddrNetlink};
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, bind, recv, socket_with};

use crate::tunnel::within;

/// The bit of `NFNLGRP_NFTABLES`, the seventh group.
const NFTABLES_GROUP: u32 = 1 << 6;
/// Messages about one of our tables take a few hundred bytes each.
const RECEIVE_BYTES: usize = 8 << 10;

/// Notices of one table in one network namespace.
#[derive(Debug)]
pub(super) struct Notice {
    socket: OwnedFd,
    /// The table's name and its closing zero, as messages have it.
    table: Vec<u8>,
}

impl Notice {
    /// Hears of everything that happens to `table` from now on.
    ///
    /// # Errors
    /// When the namespace cannot be entered, or the kernel has no nftables.
    pub(super) fn subscribe(namespace: &Path, table: &str) -> io::Result<Self> {
        let open = || {
            let family = AddressFamily::NETLINK;
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let socket = socket_with(family, SocketType::RAW, flags, Some(NETFILTER))?;
            bind(&socket, &SocketAddrNetlink::new(0, NFTABLES_GROUP))?;
            Ok(socket)
        };
        let table = [table.as_bytes(), b"\0"].concat();
        within(namespace, open).map(|socket| Self { socket, table })
    }

    /// For a program that says nothing: whoever closes such a socket last waits for the kernel to let go of what was
    /// replaced (`nft_rcv_nl_event` in nf_tables_api.c), and that is then the program.
    pub(super) fn kept(&self) -> Stdio {
        self.socket
            .try_clone()
            .map_or_else(|_| Stdio::null(), Stdio::from)
    }

    /// Waits for a notice; false when whoever writes to `other` has something to say first, or is gone.
    pub(super) fn comes_before_end_of(&self, other: impl AsFd) -> bool {
        loop {
            let mut watched = [
                PollFd::new(&self.socket, PollFlags::IN),
                PollFd::new(&other, PollFlags::IN),
            ];
            match poll(&mut watched, None) {
                Ok(_) => {}
                Err(rustix::io::Errno::INTR) => continue,
                Err(_) => return false,
            }
            let (told, ended) = (watched[0].revents(), watched[1].revents());
            if !told.is_empty() && self.is_about_table() {
                return true;
            }
            if !ended.is_empty() {
                return false;
            }
        }
    }

    /// Takes one message; whether it is about our table. One that was lost for lack of room is about none.
    fn is_about_table(&self) -> bool {
        let mut message = [0; RECEIVE_BYTES];
        let Ok((length, _)) = recv(&self.socket, &mut message[..], RecvFlags::empty()) else {
            return false;
        };
        let message = &message[..length.min(RECEIVE_BYTES)];
        message
            .windows(self.table.len())
            .any(|bytes| bytes == self.table)
    }
}
