//! The clients: who they are, what they send, and what they write down about it.
//!
//! Every client has its own connection; most keep it, some open a new one for each request. A request is never sent
//! again, and counts as answered only when its answer has arrived to the last byte.

pub mod http;

use std::fs::File;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::client::http::{Answer, HttpError, parse, request};
use crate::record::{Asked, Outcome, Record};

/// Longest a client waits for one answer, in seconds; shorter than the patience of any browser.
const PATIENCE_S: u64 = 60;
/// Every so many requests of a client, one reads a page instead of storing an id.
const PAGE_EVERY: usize = 6;
/// Every so many clients, one opens a new connection for each request.
const FRESH_EVERY: usize = 5;

/// What the load looks like.
#[derive(Debug, Clone)]
pub struct Profile {
    /// How many clients.
    pub clients: usize,
    /// Pause of a client between an answer and its next request.
    pub think: Duration,
    /// Where they connect to.
    pub address: SocketAddr,
    /// The name they call it by.
    pub host: String,
    /// Where an id is posted.
    pub add_path: &'static str,
    /// The page they read.
    pub page_path: &'static str,
    /// Start of every id, unique to the run.
    pub tag: String,
}

/// Live counts, for the progress display.
#[derive(Debug, Default)]
pub struct Counts {
    /// Requests sent.
    pub sent: AtomicUsize,
    /// Requests acknowledged.
    pub acknowledged: AtomicUsize,
    /// Requests failed.
    pub failed: AtomicUsize,
}

/// A running load, on a thread in a network namespace of its own choice.
#[derive(Debug)]
pub struct Load {
    /// Its counts while it runs.
    pub counts: Arc<Counts>,
    /// When it began; the times of its records count from here.
    pub began: Instant,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<std::io::Result<Vec<Record>>>,
}

impl Load {
    /// Starts the clients in the network namespace pinned at `namespace`, or where the caller is.
    ///
    /// # Errors
    /// When the namespace or the thread cannot be had.
    pub fn start(profile: Profile, namespace: Option<&Path>) -> std::io::Result<Self> {
        let pinned = namespace.map(File::open).transpose()?;
        let (counts, stop, began) = (
            Arc::new(Counts::default()),
            Arc::new(AtomicBool::new(false)),
            Instant::now(),
        );
        let shared = Shared {
            profile: Arc::new(profile),
            counts: Arc::clone(&counts),
            stop: Arc::clone(&stop),
            began,
        };
        let thread = thread::Builder::new()
            .name("clients".into())
            .spawn(move || {
                if let Some(pinned) = pinned {
                    move_into_link_name_space(pinned.as_fd(), Some(LinkNameSpaceType::Network))?;
                }
                let runtime = tokio::runtime::Builder::new_current_thread()
                    .enable_all()
                    .build()?;
                Ok(runtime.block_on(all_clients(shared)))
            })?;
        Ok(Self {
            counts,
            began,
            stop,
            thread,
        })
    }

    /// Lets every client finish the request it is at, and gives all records.
    ///
    /// # Errors
    /// When the clients could not run at all.
    pub fn stop(self) -> std::io::Result<Vec<Record>> {
        self.stop.store(true, Ordering::Relaxed);
        match self.thread.join() {
            Ok(records) => records,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
}

#[derive(Debug, Clone)]
struct Shared {
    profile: Arc<Profile>,
    counts: Arc<Counts>,
    stop: Arc<AtomicBool>,
    began: Instant,
}

async fn all_clients(shared: Shared) -> Vec<Record> {
    let mut clients = JoinSet::new();
    for number in 0..shared.profile.clients {
        clients.spawn(client(shared.clone(), number));
    }
    clients.join_all().await.into_iter().flatten().collect()
}

async fn client(shared: Shared, number: usize) -> Vec<Record> {
    let profile = &shared.profile;
    // Spread over one pause, so that the load is even from the start.
    sleep(
        profile
            .think
            .mul_f64(number as f64 / profile.clients.max(1) as f64),
    )
    .await;
    let (mut records, mut kept) = (Vec::new(), None);
    for turn in 1.. {
        if shared.stop.load(Ordering::Relaxed) {
            break;
        }
        let (asked, bytes) = if turn % PAGE_EVERY == 0 {
            (Asked::Page, request(profile.page_path, &profile.host, None))
        } else {
            let id = format!("{}-{number}-{turn}", profile.tag);
            let form = format!("id={id}");
            (
                Asked::Add(id),
                request(profile.add_path, &profile.host, Some(&form)),
            )
        };
        let sent_at = shared.began.elapsed();
        shared.counts.sent.fetch_add(1, Ordering::Relaxed);
        let answer = timeout(
            Duration::from_secs(PATIENCE_S),
            exchange(&mut kept, profile.address, &bytes),
        )
        .await;
        let outcome = match answer {
            Ok(Ok(status)) => Outcome::Answered(status),
            Ok(Err(error)) => Outcome::Broken(error.to_string()),
            Err(_) => Outcome::Broken(format!("no answer within {PATIENCE_S} s")),
        };
        if number % FRESH_EVERY == FRESH_EVERY - 1 || matches!(outcome, Outcome::Broken(_)) {
            kept = None;
        }
        let record = Record {
            client: number,
            asked,
            sent_at,
            ended_at: shared.began.elapsed(),
            outcome,
        };
        let counter = if record.acknowledged() {
            &shared.counts.acknowledged
        } else {
            &shared.counts.failed
        };
        counter.fetch_add(1, Ordering::Relaxed);
        records.push(record);
        sleep(profile.think).await;
    }
    records
}

/// One request and its whole answer, on the kept connection if it is still open.
async fn exchange(
    kept: &mut Option<TcpStream>,
    to: SocketAddr,
    bytes: &[u8],
) -> Result<u16, HttpError> {
    let mut stream = match kept.take().filter(still_open) {
        Some(stream) => stream,
        None => {
            let stream = TcpStream::connect(to).await?;
            stream.set_nodelay(true)?;
            stream
        }
    };
    stream.write_all(bytes).await?;
    let answer = read_answer(&mut stream).await?;
    if answer.keep_alive {
        *kept = Some(stream);
    }
    Ok(answer.status)
}

/// Whether nothing was closed between two requests. Nothing is in flight then, so opening a new connection is no
/// second attempt of anything.
fn still_open(stream: &TcpStream) -> bool {
    let mut byte = [0];
    matches!(stream.try_read(&mut byte), Err(error) if error.kind() == std::io::ErrorKind::WouldBlock)
}

async fn read_answer(stream: &mut TcpStream) -> Result<Answer, HttpError> {
    let mut received = Vec::with_capacity(8192);
    loop {
        let read = stream.read_buf(&mut received).await?;
        if let Some(answer) = parse(&received, read == 0)? {
            return Ok(answer);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Read, Write};
    use std::net::TcpListener;

    use super::*;

    fn profile(address: SocketAddr) -> Profile {
        Profile {
            clients: 3,
            think: Duration::from_millis(1),
            address,
            host: "test".into(),
            add_path: "/add",
            page_path: "/",
            tag: "t".into(),
        }
    }

    /// A server that answers `good` requests and then closes every connection without an answer.
    fn server(good: usize) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let served = Arc::new(AtomicUsize::new(0));
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let served = Arc::clone(&served);
                thread::spawn(move || {
                    let mut writer = stream.try_clone().unwrap();
                    let mut reader = BufReader::new(stream);
                    loop {
                        let (mut line, mut length) = (String::new(), 0);
                        while reader.read_line(&mut line).unwrap_or(0) > 2 {
                            if let Some(value) = line.strip_prefix("Content-Length: ") {
                                length = value.trim().parse().unwrap();
                            }
                            line.clear();
                        }
                        let mut body = vec![0; length];
                        reader.read_exact(&mut body).unwrap();
                        if served.fetch_add(1, Ordering::Relaxed) >= good {
                            return;
                        }
                        writer
                            .write_all(b"HTTP/1.1 201 Created\r\nContent-Length: 0\r\n\r\n")
                            .unwrap();
                    }
                });
            }
        });
        address
    }

    #[test]
    fn every_request_is_written_down_and_every_id_is_sent_once() {
        let load = Load::start(profile(server(40)), None).unwrap();
        let counts = Arc::clone(&load.counts);
        while counts.failed.load(Ordering::Relaxed) < 5 && !load.thread.is_finished() {
            thread::yield_now();
        }
        let records = load.stop().unwrap();
        let acknowledged = records
            .iter()
            .filter(|record| record.acknowledged())
            .count();
        assert_eq!(acknowledged, 40);
        let mut ids: Vec<&str> = records
            .iter()
            .filter_map(|record| {
                if let Asked::Add(id) = &record.asked {
                    Some(id.as_str())
                } else {
                    None
                }
            })
            .collect();
        let sent = ids.len();
        ids.sort_unstable();
        ids.dedup();
        assert_eq!(ids.len(), sent);
    }
}
