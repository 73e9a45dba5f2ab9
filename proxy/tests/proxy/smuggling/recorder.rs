//! The recording origin: it keeps every byte it is sent, and answers each request its strict reader finds.

use std::io::{Read as _, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use super::reading::{self, Kind, Read};
use crate::world::PATIENCE;

/// An answer that begins with this is sent as soon as the request's head is there.
const EARLY: &[u8] = b"<early>";
/// An answer that ends with this ends the connection, too.
const CLOSE: &[u8] = b"<close>";

pub(crate) struct Recorder {
    address: SocketAddr,
    accepting: JoinHandle<usize>,
    log: Arc<Log>,
}

/// What reached the origin.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    pub(crate) requests: Vec<Read>,
    /// Requests of which only the beginning came.
    pub(crate) broken_off: Vec<Read>,
    /// What the strict reader did not accept.
    pub(crate) wrong: Vec<String>,
    pub(crate) connections: usize,
    answered: usize,
}

struct Log {
    answers: Vec<Vec<u8>>,
    stops: AtomicBool,
    seen: Mutex<Seen>,
}

impl Recorder {
    pub(crate) fn new(answers: Vec<Vec<u8>>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let log = Arc::new(Log {
            answers,
            stops: AtomicBool::new(false),
            seen: Mutex::default(),
        });
        let shared = Arc::clone(&log);
        let accepting = thread::spawn(move || accept(&listener, &shared));
        Self {
            address,
            accepting,
            log,
        }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Everything seen, once nobody else will connect and all connections have ended.
    pub(crate) fn finish(self) -> Seen {
        // From now on a connection that brings nothing is the sign to stop; whoever came before is accepted before.
        self.log.stops.store(true, Ordering::Release);
        drop(TcpStream::connect(self.address).unwrap());
        let connections = self.accepting.join().unwrap();
        let mut seen = std::mem::take(&mut *self.log.seen.lock().unwrap());
        seen.connections = connections;
        seen
    }
}

/// Serves connections until it is told to stop; how many brought at least a byte.
fn accept(listener: &TcpListener, log: &Arc<Log>) -> usize {
    let mut serving = Vec::new();
    for stream in listener.incoming() {
        let stream = stream.unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        if stream.peek(&mut [0]).is_ok_and(|count| count == 0) {
            if log.stops.load(Ordering::Acquire) {
                break;
            }
            continue;
        }
        let log = Arc::clone(log);
        serving.push(thread::spawn(move || serve(stream, &log)));
    }
    let count = serving.len();
    serving
        .into_iter()
        .for_each(|thread| thread.join().unwrap());
    count
}

fn serve(mut stream: TcpStream, log: &Log) {
    let mut bytes = Vec::new();
    let mut block = [0; 4096];
    let mut answered_early = false;
    loop {
        let read = match reading::read(&bytes, Kind::Request, false) {
            Ok(read) => read,
            Err(wrong) => {
                let wrong = format!("{wrong} in {}", bytes.escape_ascii());
                log.seen.lock().unwrap().wrong.push(wrong);
                return;
            }
        };
        if read.is_whole {
            bytes.drain(..read.used);
            log.seen.lock().unwrap().requests.push(read);
            if !std::mem::take(&mut answered_early) {
                log.answer(&mut stream);
            }
            continue;
        }
        if read.has_head && !answered_early && log.next().starts_with(EARLY) {
            log.answer(&mut stream);
            answered_early = true;
        }
        match stream.read(&mut block) {
            Ok(count @ 1..) => bytes.extend_from_slice(&block[..count]),
            _ if bytes.is_empty() => return,
            _ => {
                log.seen.lock().unwrap().broken_off.push(read);
                return;
            }
        }
    }
}

impl Log {
    fn next(&self) -> Vec<u8> {
        let answered = self.seen.lock().unwrap().answered;
        let plain = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";
        let answer = self.answers.get(answered);
        answer.map_or_else(|| plain.to_vec(), Clone::clone)
    }

    fn answer(&self, stream: &mut TcpStream) {
        let answer = self.next();
        self.seen.lock().unwrap().answered += 1;
        let answer = answer.strip_prefix(EARLY).unwrap_or(&answer);
        // Whoever does not take it has closed, which the next read tells.
        let _ = stream.write_all(answer.strip_suffix(CLOSE).unwrap_or(answer));
        if answer.ends_with(CLOSE) {
            let _ = stream.shutdown(Shutdown::Write);
        }
    }
}
