//! Clients that ask without a pause until they are told to stop, and count anything but the right answer as a failure.
//! They never ask twice: what a retry would hide is what is looked for.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::client::http::{parse, request};
use crate::lab::error::{LabError, Result};

/// Longest a client waits for one answer, in seconds.
const ANSWER_S: u64 = 20;
/// What is asked for, and how long its body is.
const PATH: &str = "/bytes/1000";
const BODY_BYTES: usize = 1000;

/// How a client treats its connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Manner {
    /// One for all requests. The proxy may end it, but only with an answer that says so.
    Keeps,
    /// One a request.
    Renews,
}

/// What clients of one manner have done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Done {
    pub(super) answered: u64,
    pub(super) connections: u64,
}

/// Running clients; dropping them without [`Load::finish`] lets them end by themselves.
#[derive(Debug)]
pub(super) struct Load {
    stop: Arc<AtomicBool>,
    clients: Vec<(Manner, JoinHandle<std::result::Result<Done, String>>)>,
}

impl Load {
    /// Starts so many clients of each manner.
    pub(super) fn start(to: SocketAddr, each: usize) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let manners = [Manner::Keeps, Manner::Renews]
            .into_iter()
            .flat_map(|manner| vec![manner; each]);
        let clients = manners.map(|manner| {
            let stop = Arc::clone(&stop);
            (manner, thread::spawn(move || client(to, manner, &stop)))
        });
        let clients = clients.collect();
        Self { stop, clients }
    }

    /// Whether a client has ended with a failure already.
    pub(super) fn has_failed(&self) -> bool {
        self.clients.iter().any(|(_, thread)| thread.is_finished())
    }

    /// Stops them; what those who keep theirs, and what those who renew it, have done.
    ///
    /// # Errors
    /// When any request of theirs failed.
    pub(super) fn finish(self) -> Result<(Done, Done)> {
        self.stop.store(true, Ordering::Relaxed);
        let (mut keeps, mut renews) = (Done::default(), Done::default());
        for (manner, thread) in self.clients {
            let done = thread
                .join()
                .unwrap_or_else(|_| Err("a client panicked".to_owned()));
            let done = done.map_err(|why| LabError::Http {
                what: format!("a request under load ({manner:?} its connection)"),
                why,
            })?;
            let sum = match manner {
                Manner::Keeps => &mut keeps,
                Manner::Renews => &mut renews,
            };
            sum.answered += done.answered;
            sum.connections += done.connections;
        }
        Ok((keeps, renews))
    }
}

fn client(to: SocketAddr, manner: Manner, stop: &AtomicBool) -> std::result::Result<Done, String> {
    let asked = request(PATH, "bench.test", None);
    let (mut done, mut kept) = (Done::default(), None);
    while !stop.load(Ordering::Relaxed) {
        let mut stream = match kept.take() {
            Some(stream) => stream,
            None => {
                done.connections += 1;
                connect(to).map_err(|error| format!("connection {}: {error}", done.connections))?
            }
        };
        let goes_on = ask(&mut stream, &asked)
            .map_err(|why| format!("request {}: {why}", done.answered + 1))?;
        done.answered += 1;
        kept = (goes_on && manner == Manner::Keeps).then_some(stream);
    }
    Ok(done)
}

fn connect(to: SocketAddr) -> std::io::Result<TcpStream> {
    let limit = Duration::from_secs(ANSWER_S);
    let stream = TcpStream::connect_timeout(&to, limit)?;
    stream.set_read_timeout(Some(limit))?;
    stream.set_write_timeout(Some(limit))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Asks once; whether the connection goes on.
fn ask(stream: &mut TcpStream, asked: &[u8]) -> std::result::Result<bool, String> {
    stream.write_all(asked).map_err(|error| error.to_string())?;
    let (mut received, mut buffer) = (Vec::new(), [0; 4096]);
    loop {
        let count = stream
            .read(&mut buffer)
            .map_err(|error| error.to_string())?;
        received.extend_from_slice(&buffer[..count]);
        let answer = parse(&received, count == 0).map_err(|error| error.to_string())?;
        if let Some(answer) = answer {
            let right = answer.status == 200 && answer.body.len() == BODY_BYTES;
            let found = format!("status {}, {} bytes", answer.status, answer.body.len());
            return if right {
                Ok(answer.keep_alive)
            } else {
                Err(found)
            };
        }
    }
}
