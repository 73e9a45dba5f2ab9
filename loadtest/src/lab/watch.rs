//! Watches the proxy's gate from outside while a hop runs: when it held, who owned the service, how much was held.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use cutover_protocol::hold::{Answer, Command, Gate, LINE_BYTES_MAX, ServiceStatus, WritesStatus};

/// How often the gate is looked at, in milliseconds: well below any hold worth measuring.
const LOOK_MS: u64 = 10;
/// Longest the proxy may take for one answer, in seconds.
const ANSWER_S: u64 = 5;

/// What was seen of the gate.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    /// When it was first not open, and when it was open again, since the watch began.
    pub holds: Vec<(Duration, Option<Duration>)>,
    /// What had become of writes when it was open again the last time.
    pub writes_until_open: WritesStatus,
    /// The service at the last look.
    pub last: Option<ServiceStatus>,
}

/// A running watch.
#[derive(Debug)]
pub struct Watch {
    seen: Arc<Mutex<Seen>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    /// Watches the only service of the proxy at `socket`; times count from `began`.
    #[must_use]
    pub fn start(socket: PathBuf, began: Instant) -> Self {
        let (seen, stop) = (
            Arc::new(Mutex::new(Seen::default())),
            Arc::new(AtomicBool::new(false)),
        );
        let (shared, stopped) = (Arc::clone(&seen), Arc::clone(&stop));
        let thread = thread::spawn(move || {
            let mut connection = None;
            while !stopped.load(Ordering::Relaxed) {
                if let Some(status) = look(&mut connection, &socket) {
                    note(&shared, status, began.elapsed());
                }
                thread::sleep(Duration::from_millis(LOOK_MS));
            }
        });
        Self {
            seen,
            stop,
            thread: Some(thread),
        }
    }

    /// What was seen until now.
    #[must_use]
    pub fn seen(&self) -> Seen {
        self.seen
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Whether the gate was open at the last look.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.seen()
            .last
            .is_some_and(|status| status.gate == Gate::Open)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn note(seen: &Mutex<Seen>, status: ServiceStatus, now: Duration) {
    let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
    let (open, holding) = (
        status.gate == Gate::Open,
        seen.holds.last().is_some_and(|(_, end)| end.is_none()),
    );
    match (open, holding) {
        (false, false) => seen.holds.push((now, None)),
        (true, true) => {
            if let Some((_, end)) = seen.holds.last_mut() {
                *end = Some(now);
            }
            seen.writes_until_open = status.writes.clone();
        }
        _ => {}
    }
    seen.last = Some(status);
}

/// One look, on the kept connection; a broken one is opened anew at the next look.
fn look(connection: &mut Option<BufReader<UnixStream>>, socket: &Path) -> Option<ServiceStatus> {
    if connection.is_none() {
        let stream = UnixStream::connect(socket).ok()?;
        stream
            .set_read_timeout(Some(Duration::from_secs(ANSWER_S)))
            .ok()?;
        stream
            .set_write_timeout(Some(Duration::from_secs(ANSWER_S)))
            .ok()?;
        *connection = Some(BufReader::new(stream));
    }
    let answer = ask(connection.as_mut()?);
    if answer.is_none() {
        *connection = None;
    }
    answer
}

fn ask(connection: &mut BufReader<UnixStream>) -> Option<ServiceStatus> {
    let line = serde_json::to_string(&Command::Status { service: None }).ok()? + "\n";
    connection.get_mut().write_all(line.as_bytes()).ok()?;
    let mut answer = String::new();
    connection
        .by_ref()
        .take(LINE_BYTES_MAX as u64)
        .read_line(&mut answer)
        .ok()?;
    match serde_json::from_str(&answer).ok()? {
        Answer::Status { services } => services.into_iter().next(),
        _ => None,
    }
}

/// Asks once, on a connection of its own.
#[must_use]
pub fn status(socket: &Path) -> Option<ServiceStatus> {
    look(&mut None, socket)
}
