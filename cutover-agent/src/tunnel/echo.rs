//! Echoes through a tunnel: the target's end sends back what it gets, and the source's end finds out by them that the
//! tunnel is up and how large its packets may be. Nothing here changes a device.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use cutover_protocol::tunnel::mtu::Search;
use tokio::net::UdpSocket;

/// How long a tunnel may take until its first echo: a WireGuard handshake is tried again after five seconds.
const UP_MAX: Duration = Duration::from_secs(12);
/// Pause before an echo is asked for again while nothing has come back yet.
const UP_PAUSE: Duration = Duration::from_millis(200);
/// Times one size is tried: with one packet in a hundred lost each way, one search in ten thousand is misled.
const TRIES: u32 = 3;
/// The least time to wait for an echo, for a machine that is busy.
const WAIT_MIN: Duration = Duration::from_millis(150);
/// Bytes in front of the padding: the number of the question.
const NUMBER_BYTES: usize = 8;
/// Headers of UDP and of either IP.
const UDP: usize = 8;
const IPV4: usize = 20;
const IPV6: usize = 40;
/// `IP_PMTUDISC_PROBE`, the same for IPv6: never fragment, whatever is known of the path.
const PROBE: i32 = 3;

/// The target's side.
#[derive(Debug)]
pub(super) struct Echo {
    task: tokio::task::JoinHandle<()>,
    pub(super) port: u16,
}

impl Echo {
    /// Answers at `address` until it is dropped.
    pub(super) async fn at(address: IpAddr) -> io::Result<Self> {
        let socket = UdpSocket::bind((address, 0)).await?;
        never_fragment(&socket, address)?;
        let port = socket.local_addr()?.port();
        let task = tokio::spawn(async move {
            let mut buffer = vec![0; usize::from(u16::MAX)];
            loop {
                // What cannot be received or sent is not answered, which is an answer.
                if let Ok((read, from)) = socket.recv_from(&mut buffer).await {
                    let _ = socket.send_to(&buffer[..read], from).await;
                }
            }
        });
        Ok(Self { task, port })
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn never_fragment(socket: &UdpSocket, address: IpAddr) -> io::Result<()> {
    let (level, option) = if address.is_ipv4() {
        (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER)
    } else {
        (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER)
    };
    let (value, size) = (PROBE, size_of::<i32>() as libc::socklen_t);
    // SAFETY: the pointer and the size are those of a local of that type.
    let set = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            (&raw const value).cast(),
            size,
        )
    };
    if set == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// The source's side: what it asks, and how long an echo takes.
#[derive(Debug)]
pub(super) struct Asker {
    socket: UdpSocket,
    number: u64,
    round_trip: Duration,
    headers: usize,
}

impl Asker {
    /// Asks until the first echo comes back; nothing when none does within a few seconds.
    pub(super) async fn wait_for(from: IpAddr, to: SocketAddr) -> io::Result<Option<Self>> {
        let socket = UdpSocket::bind((from, 0)).await?;
        never_fragment(&socket, from)?;
        socket.connect(to).await?;
        let headers = UDP + if from.is_ipv4() { IPV4 } else { IPV6 };
        let mut asker = Self {
            socket,
            number: 0,
            round_trip: UP_PAUSE,
            headers,
        };
        let begun = Instant::now();
        while begun.elapsed() < UP_MAX {
            let asked = Instant::now();
            if asker.ask(NUMBER_BYTES + headers, UP_PAUSE).await {
                asker.round_trip = asked.elapsed();
                return Ok(Some(asker));
            }
        }
        Ok(None)
    }

    /// The largest packet that comes back, up to `most` bytes.
    pub(super) async fn largest(&mut self, most: u16) -> Option<u16> {
        let mut search = Search::new(most);
        while let Some(size) = search.next() {
            let arrived = self.passes(size).await;
            search.heard(size, arrived);
            if let Some(least) = search.fallback() {
                let arrived = self.passes(least).await;
                search.heard(least, arrived);
                search.found()?;
            }
        }
        search.found()
    }

    async fn passes(&mut self, size: u16) -> bool {
        for _ in 0..TRIES {
            let wait = (self.round_trip * 3).max(WAIT_MIN);
            if self.ask(usize::from(size), wait).await {
                return true;
            }
        }
        false
    }

    /// One question in a packet of `size` bytes; false when its echo does not come within `wait`.
    async fn ask(&mut self, size: usize, wait: Duration) -> bool {
        self.number += 1;
        let mut packet = vec![0; size.saturating_sub(self.headers).max(NUMBER_BYTES)];
        packet[..NUMBER_BYTES].copy_from_slice(&self.number.to_le_bytes());
        if self.socket.send(&packet).await.is_err() {
            // Too large for the device itself, or nobody listens there yet.
            tokio::time::sleep(wait / 4).await;
            return false;
        }
        let echo = async {
            let mut buffer = vec![0; usize::from(u16::MAX)];
            loop {
                match self.socket.recv(&mut buffer).await {
                    // An echo of an earlier question proves nothing about this size.
                    Ok(read) if buffer[..read] == packet[..] => return,
                    Ok(_) => {}
                    // "Nobody listens" is told once a packet: the next one may be the echo.
                    Err(_) => tokio::time::sleep(WAIT_MIN / 10).await,
                }
            }
        };
        tokio::time::timeout(wait, echo).await.is_ok()
    }
}

/// The largest packet of the link towards an address, as the kernel knows it now.
pub(super) fn link_mtu(to: IpAddr) -> io::Result<u16> {
    let any: IpAddr = if to.is_ipv4() {
        [0, 0, 0, 0].into()
    } else {
        [0_u16; 8].into()
    };
    let socket = std::net::UdpSocket::bind((any, 0))?;
    // Connecting a UDP socket sends nothing; port 9 throws away what it gets.
    socket.connect((to, 9))?;
    let (level, option) = if to.is_ipv4() {
        (libc::IPPROTO_IP, libc::IP_MTU)
    } else {
        (libc::IPPROTO_IPV6, libc::IPV6_MTU)
    };
    let mut mtu = 0_i32;
    let mut size = size_of::<i32>() as libc::socklen_t;
    // SAFETY: both pointers are to locals of the types that the kernel writes.
    let got = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            level,
            option,
            (&raw mut mtu).cast(),
            &raw mut size,
        )
    };
    if got != 0 {
        return Err(io::Error::last_os_error());
    }
    // Loopback's 65536 does not fit.
    Ok(u16::try_from(mtu).unwrap_or(u16::MAX))
}

/// Our own address towards another.
pub(super) fn own_address(towards: IpAddr) -> io::Result<IpAddr> {
    let any: IpAddr = if towards.is_ipv4() {
        [0, 0, 0, 0].into()
    } else {
        [0_u16; 8].into()
    };
    let socket = std::net::UdpSocket::bind((any, 0))?;
    socket.connect((towards, 9))?;
    Ok(socket.local_addr()?.ip())
}

#[cfg(test)]
mod tests {
    use super::*;

    const HERE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

    #[tokio::test]
    async fn a_path_that_carries_all_is_found_to_do_so() {
        let echo = Echo::at(HERE).await.unwrap();
        let mut asker = Asker::wait_for(HERE, (HERE, echo.port).into())
            .await
            .unwrap()
            .unwrap();
        assert_eq!(asker.largest(1400).await, Some(1400));
    }

    #[tokio::test]
    async fn a_path_that_carries_less_than_its_link_is_found_out() {
        // A host behind which packets above 1234 bytes are lost.
        let socket = UdpSocket::bind((HERE, 0)).await.unwrap();
        let at = socket.local_addr().unwrap();
        let host = tokio::spawn(async move {
            let mut buffer = vec![0; 9000];
            while let Ok((read, from)) = socket.recv_from(&mut buffer).await {
                if read + 28 <= 1234 {
                    socket.send_to(&buffer[..read], from).await.unwrap();
                }
            }
        });
        let mut asker = Asker::wait_for(HERE, at).await.unwrap().unwrap();
        let found = asker.largest(1440).await.unwrap();
        assert!((1227..=1234).contains(&found), "{found}");
        host.abort();
    }

    #[test]
    fn the_loopback_has_a_large_mtu_and_its_own_address() {
        assert!(link_mtu(HERE).unwrap() > 1500);
        assert_eq!(own_address(HERE).unwrap(), HERE);
    }
}
