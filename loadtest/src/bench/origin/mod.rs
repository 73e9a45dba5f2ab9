//! The origin behind the proxies: one thread, one event queue, as little work for each request as can be, so that it
//! and the client together need less of their core than a proxy needs of its own.

pub mod content;
pub mod session;

use std::io::{self, ErrorKind, Write};
use std::net::{SocketAddr, TcpListener};

use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};

use crate::bench::origin::content::Content;
use crate::bench::origin::session::{Session, Speech};

/// Events taken from the kernel at once.
const EVENTS: usize = 256;
/// Most bytes read at once.
const BUFFER_BYTES: usize = 256 << 10;
/// The listeners' places in the event queue; connections have the numbers after them.
const LISTENERS: [Speech; 2] = [Speech::Http, Speech::Raw];

/// Where an origin listens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Addresses {
    /// HTTP/1 and WebSocket.
    pub http: SocketAddr,
    /// Raw TCP.
    pub raw: SocketAddr,
}

impl Addresses {
    /// Reads them from the first line an origin prints.
    #[must_use]
    pub fn read(text: &str) -> Option<Self> {
        let (line, _) = text.split_once('\n')?;
        let (http, raw) = line.strip_prefix("listening ")?.split_once(' ')?;
        Some(Self {
            http: http.parse().ok()?,
            raw: raw.parse().ok()?,
        })
    }
}

/// A server that listens.
#[derive(Debug)]
pub struct Origin {
    listeners: [TcpListener; 2],
    /// Where.
    pub addresses: Addresses,
}

impl Origin {
    /// Listens on ports of the kernel's choice.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn bind() -> io::Result<Self> {
        let listeners = [
            TcpListener::bind("127.0.0.1:0")?,
            TcpListener::bind("127.0.0.1:0")?,
        ];
        for listener in &listeners {
            // Again, with room for all the connections a proxy may open at once.
            rustix::net::listen(listener, 4096)?;
            listener.set_nonblocking(true)?;
        }
        let addresses = Addresses {
            http: listeners[0].local_addr()?,
            raw: listeners[1].local_addr()?,
        };
        Ok(Self {
            listeners,
            addresses,
        })
    }

    /// Serves for ever.
    ///
    /// # Errors
    /// When it cannot accept or wait for events.
    pub fn serve(&self) -> io::Result<()> {
        serve(&self.listeners)
    }
}

/// Says where it listens, as its first line, and serves until the process is killed.
///
/// # Errors
/// When it cannot listen, accept or wait for events.
pub fn run() -> io::Result<()> {
    let origin = Origin::bind()?;
    let mut out = io::stdout().lock();
    writeln!(
        out,
        "listening {} {}",
        origin.addresses.http, origin.addresses.raw
    )?;
    out.flush()?;
    origin.serve()
}

fn serve(listeners: &[TcpListener; 2]) -> io::Result<()> {
    let queue = epoll::create(CreateFlags::CLOEXEC)?;
    for (number, listener) in listeners.iter().enumerate() {
        let data = EventData::new_u64(number as u64);
        epoll::add(&queue, listener, data, EventFlags::IN)?;
    }
    let (content, mut buffer) = (Content::default(), vec![0; BUFFER_BYTES]);
    let mut sessions: Vec<Option<Session>> = Vec::new();
    let mut free: Vec<usize> = Vec::new();
    let mut events: Vec<Event> = Vec::with_capacity(EVENTS);
    loop {
        events.clear();
        match epoll::wait(&queue, rustix::buffer::spare_capacity(&mut events), None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        for event in &events {
            let number = usize::try_from(event.data.u64()).unwrap_or(usize::MAX);
            let Some(place) = number.checked_sub(LISTENERS.len()) else {
                accept_all(
                    &listeners[number],
                    LISTENERS[number],
                    &queue,
                    &mut sessions,
                    &mut free,
                )?;
                continue;
            };
            let Some(Some(session)) = sessions.get_mut(place) else {
                continue;
            };
            if session.advance(&content, &mut buffer).is_err() {
                sessions[place] = None;
                free.push(place);
            }
        }
    }
}

fn accept_all(
    listener: &TcpListener,
    speech: Speech,
    queue: &rustix::fd::OwnedFd,
    sessions: &mut Vec<Option<Session>>,
    free: &mut Vec<usize>,
) -> io::Result<()> {
    loop {
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
            // The other side gave up before we came to it.
            Err(error) if error.kind() == ErrorKind::ConnectionAborted => continue,
            Err(error) => return Err(error),
        };
        stream.set_nonblocking(true)?;
        stream.set_nodelay(true)?;
        let place = free.pop().unwrap_or_else(|| {
            sessions.push(None);
            sessions.len() - 1
        });
        let number = (place + LISTENERS.len()) as u64;
        let flags = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
        epoll::add(queue, &stream, EventData::new_u64(number), flags)?;
        sessions[place] = Some(Session::new(stream, speech));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_line_tells_where_an_origin_listens() {
        let read = Addresses::read("listening 127.0.0.1:4000 127.0.0.1:4001\n").unwrap();
        assert_eq!(read.http.port(), 4000);
        assert_eq!(read.raw.port(), 4001);
        assert_eq!(Addresses::read("listening 127.0.0.1:4000 127.0"), None);
    }
}
