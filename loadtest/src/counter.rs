//! The small stateful program the lab can move: an HTTP server that remembers ids and can prove its memory is whole.
//!
//! It is written for checkpoints: nothing but the standard library, one thread per connection up to a bound, one file open
//! for appending. Every byte of its memory pattern is a function of seed, page and generation, so that a page that
//! was lost, mixed up or left behind by a hop is found by `GET /check`.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use crate::socket;

/// Bytes of a page of the pattern; the generation it was written in is at its start.
const PAGE_BYTES: usize = 4096;
/// Pages under one lock.
const BLOCK_PAGES: usize = 256;
/// The part of the memory that is rewritten while it runs: one block of this many, so later rounds stay small.
const HOT_SHARE: usize = 16;
/// Connections served at once; more wait in the kernel.
const CONNECTIONS_MAX: u32 = 200;
/// Longest line of a request, in bytes.
const LINE_BYTES_MAX: u64 = 8192;
/// Largest request body, in bytes.
const BODY_BYTES_MAX: usize = 4096;
/// How often hot pages are rewritten, in milliseconds.
const TICK_MS: u64 = 50;

/// How the counter runs.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Address to listen on.
    #[arg(long)]
    pub listen: String,
    /// File the ids are appended to, and read back from at start.
    #[arg(long)]
    pub file: PathBuf,
    /// Size of the memory pattern, in MiB.
    #[arg(long, default_value_t = 64)]
    pub memory_mb: usize,
    /// How much of it is rewritten every second, in MiB.
    #[arg(long, default_value_t = 1)]
    pub write_mb_s: usize,
    /// How much of it is rewritten for each id, in KiB.
    #[arg(long, default_value_t = 0)]
    pub write_kb_id: usize,
    /// What the pattern is made from: two counters with different seeds have no page in common.
    #[arg(long, default_value_t = 0x5eed)]
    pub seed: u64,
    /// A file to keep open under a name that is taken away, while another name beside it stays.
    #[arg(long)]
    pub linked: Option<PathBuf>,
}

/// An open file whose name was taken away, and the name it still has.
#[derive(Debug)]
struct Linked {
    file: File,
    kept: PathBuf,
}

impl Linked {
    fn new(path: &Path) -> io::Result<Self> {
        let kept = path.with_extension("kept");
        let _ = fs::remove_file(&kept);
        let file = File::options()
            .create(true)
            .read(true)
            .append(true)
            .open(path)?;
        fs::hard_link(path, &kept)?;
        fs::remove_file(path)?;
        Ok(Self { file, kept })
    }

    /// Whether what is written to the open file can be read under the name, and the other name is gone.
    fn is_whole(&self) -> io::Result<bool> {
        (&self.file).write_all(b"+")?;
        let (open, named) = (self.file.metadata()?, fs::metadata(&self.kept)?);
        Ok((open.ino(), open.nlink()) == (named.ino(), 1) && open.len() == named.len())
    }
}

/// What one page must contain.
fn fill(page: &mut [u8], seed: u64, index: usize, generation: u64) {
    page[..8].copy_from_slice(&generation.to_le_bytes());
    let mut state = (index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15)
        ^ generation.wrapping_mul(0xd134_2543_de82_ef95)
        ^ seed.wrapping_mul(0xa076_1d64_78bd_642f).max(1);
    for word in page[8..].chunks_exact_mut(8) {
        // xorshift64*: cheap, and no page of it resembles another.
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        word.copy_from_slice(&state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes());
    }
}

/// The memory whose every byte is known.
#[derive(Debug)]
struct Pattern {
    seed: u64,
    blocks: Vec<Mutex<Vec<u8>>>,
}

impl Pattern {
    fn new(megabytes: usize, seed: u64) -> Self {
        let blocks = (0..megabytes.max(1)).map(|block| {
            let mut bytes = vec![0; BLOCK_PAGES * PAGE_BYTES];
            for (page, content) in bytes.chunks_exact_mut(PAGE_BYTES).enumerate() {
                fill(content, seed, block * BLOCK_PAGES + page, 1);
            }
            Mutex::new(bytes)
        });
        Self {
            seed,
            blocks: blocks.collect(),
        }
    }

    fn rewrite(&self, page: usize, generation: u64) {
        let mut bytes = lock(&self.blocks[page / BLOCK_PAGES]);
        let start = page % BLOCK_PAGES * PAGE_BYTES;
        let content = &mut bytes[start..start + PAGE_BYTES];
        fill(content, self.seed, page, generation);
    }

    fn pages(&self) -> usize {
        self.blocks.len() * BLOCK_PAGES
    }

    fn hot_pages(&self) -> usize {
        self.blocks.len().div_ceil(HOT_SHARE) * BLOCK_PAGES
    }

    /// The first page that is not what its own generation says, if any.
    fn damaged(&self) -> Option<usize> {
        let mut wanted = vec![0; PAGE_BYTES];
        for (block, bytes) in self.blocks.iter().enumerate() {
            let bytes = lock(bytes);
            for (page, content) in bytes.chunks_exact(PAGE_BYTES).enumerate() {
                let index = block * BLOCK_PAGES + page;
                let generation = content
                    .first_chunk()
                    .map_or(0, |first| u64::from_le_bytes(*first));
                fill(&mut wanted, self.seed, index, generation);
                if generation == 0 || wanted != content {
                    return Some(index);
                }
            }
        }
        None
    }
}

#[derive(Debug)]
struct Store {
    ids: Vec<String>,
    file: File,
}

#[derive(Debug)]
struct Counter {
    pattern: Pattern,
    store: Mutex<Store>,
    generation: AtomicU32,
    /// Pages rewritten for each id.
    pages_per_id: usize,
    /// Pages rewritten for ids so far.
    rewritten: AtomicUsize,
    free: (Mutex<u32>, Condvar),
    linked: Option<Linked>,
}

impl Counter {
    /// What is not as it must be, if anything.
    fn damage(&self) -> Option<String> {
        if let Some(page) = self.pattern.damaged() {
            return Some(format!("page {page} is damaged"));
        }
        match self.linked.as_ref()?.is_whole() {
            Ok(true) => None,
            Ok(false) => Some("the file without its name is another one now".to_owned()),
            Err(error) => Some(format!("the file without its name is lost: {error}")),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Serves until SIGTERM, which ends the process with success.
///
/// # Errors
/// When the file or the listener cannot be opened.
pub fn run(options: &Options) -> io::Result<()> {
    end_on_sigterm()?;
    let text = match fs::read_to_string(&options.file) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
        read => read?,
    };
    let file = File::options()
        .create(true)
        .append(true)
        .open(&options.file)?;
    let store = Store {
        ids: text.lines().map(str::to_owned).collect(),
        file,
    };
    let counter = Arc::new(Counter {
        pattern: Pattern::new(options.memory_mb, options.seed),
        store: Mutex::new(store),
        generation: AtomicU32::new(1),
        pages_per_id: (options.write_kb_id << 10).div_ceil(PAGE_BYTES),
        rewritten: AtomicUsize::new(0),
        free: (Mutex::new(CONNECTIONS_MAX), Condvar::new()),
        linked: options.linked.as_deref().map(Linked::new).transpose()?,
    });
    let listener = TcpListener::bind(&options.listen)?;
    let writer = Arc::clone(&counter);
    let pages_per_tick = (options.write_mb_s * BLOCK_PAGES * TICK_MS as usize).div_ceil(1000);
    thread::Builder::new()
        .name("rewrite".into())
        .spawn(move || rewrite_for_ever(&writer, pages_per_tick))?;
    loop {
        wait_for_room(&counter);
        let (stream, _) = listener.accept()?;
        let served = Arc::clone(&counter);
        thread::Builder::new()
            .name("connection".into())
            .stack_size(256 << 10)
            .spawn(move || {
                // A client that breaks off is its own affair; the place it took is free again either way.
                let _ = serve(&served, stream);
                *lock(&served.free.0) += 1;
                served.free.1.notify_one();
            })?;
    }
}

fn wait_for_room(counter: &Counter) {
    let (free, freed) = &counter.free;
    let mut free = freed
        .wait_while(lock(free), |free| *free == 0)
        .unwrap_or_else(PoisonError::into_inner);
    *free -= 1;
}

fn rewrite_for_ever(counter: &Counter, pages_per_tick: usize) {
    let (hot, mut next) = (counter.pattern.hot_pages(), 0);
    loop {
        let generation = counter.generation.fetch_add(1, Ordering::Relaxed) + 1;
        for _ in 0..pages_per_tick {
            counter.pattern.rewrite(next % hot, u64::from(generation));
            next += 1;
        }
        thread::sleep(Duration::from_millis(TICK_MS));
    }
}

/// The first process of a container ignores SIGTERM unless it asks for it: block it everywhere, wait for it here.
fn end_on_sigterm() -> io::Result<()> {
    // SAFETY: an all-zero sigset_t is valid memory for sigemptyset, and each call gets a pointer that lives through it.
    let set = unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGTERM);
        if libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) != 0 {
            return Err(io::Error::last_os_error());
        }
        set
    };
    thread::Builder::new()
        .name("sigterm".into())
        .spawn(move || {
            let mut signal = 0;
            // SAFETY: both pointers live through the call; no other thread waits for this signal.
            while unsafe { libc::sigwait(&raw const set, &raw mut signal) } != 0 {}
            // SAFETY: _exit ends the process at once; every acknowledged id is in the file already.
            unsafe { libc::_exit(0) }
        })?;
    Ok(())
}

fn serve(counter: &Counter, stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut answers = stream.try_clone()?;
    let mut requests = BufReader::new(stream);
    while let Some(request) = read_request(&mut requests)? {
        if request.line.starts_with("GET /socket ") && request.key == socket::UPGRADE_KEY {
            return echo(&mut requests, &mut answers);
        }
        let (status, text) = answer(counter, &request.line, &request.body);
        let keep_alive = request.keep_alive;
        let connection = if keep_alive { "keep-alive" } else { "close" };
        let head = format!(
            "HTTP/1.1 {status}\r\nContent-Type: text/plain\r\nConnection: {connection}\r\nContent-Length: {}\r\n\r\n",
            text.len()
        );
        answers.write_all(&[head.as_bytes(), text.as_bytes()].concat())?;
        if !keep_alive {
            break;
        }
    }
    Ok(())
}

/// Says back what a WebSocket client says, until it has said enough.
fn echo(messages: &mut BufReader<TcpStream>, answers: &mut TcpStream) -> io::Result<()> {
    let accept = socket::UPGRADE_ACCEPT;
    write!(
        answers,
        "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: {accept}\r\n\r\n"
    )?;
    loop {
        let (kind, payload) = socket::read(messages)?;
        socket::write(answers, socket::End::Server, kind, &payload)?;
        if kind == socket::CLOSE {
            return Ok(());
        }
    }
}

fn read_line(requests: &mut BufReader<TcpStream>) -> io::Result<String> {
    let mut line = String::new();
    requests
        .by_ref()
        .take(LINE_BYTES_MAX)
        .read_line(&mut line)?;
    Ok(line.trim_end().to_owned())
}

/// One request, as far as anything depends on it.
struct Request {
    line: String,
    body: String,
    /// Whether the connection stays.
    keep_alive: bool,
    /// Of a WebSocket client; empty for others.
    key: String,
}

/// Nothing at the end of the connection.
fn read_request(requests: &mut BufReader<TcpStream>) -> io::Result<Option<Request>> {
    let first = read_line(requests)?;
    if first.is_empty() {
        return Ok(None);
    }
    let (mut length, mut keep_alive) = (0, !first.ends_with("HTTP/1.0"));
    let mut key = String::new();
    loop {
        let line = read_line(requests)?;
        let Some((name, value)) = line.split_once(':') else {
            break;
        };
        let value = value.trim();
        match name.to_ascii_lowercase().as_str() {
            "content-length" => length = value.parse().unwrap_or(usize::MAX),
            "connection" if value.eq_ignore_ascii_case("close") => keep_alive = false,
            "connection" if value.eq_ignore_ascii_case("keep-alive") => keep_alive = true,
            "sec-websocket-key" => value.clone_into(&mut key),
            _ => {}
        }
    }
    if length > BODY_BYTES_MAX {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "the body is too long or its length is no number",
        ));
    }
    let mut body = vec![0; length];
    requests.read_exact(&mut body)?;
    Ok(Some(Request {
        line: first,
        body: String::from_utf8_lossy(&body).into_owned(),
        keep_alive,
        key,
    }))
}

fn answer(counter: &Counter, line: &str, body: &str) -> (&'static str, String) {
    let mut words = line.split(' ');
    match (words.next().unwrap_or(""), words.next().unwrap_or("")) {
        ("POST", "/add") => match body
            .strip_prefix("id=")
            .filter(|id| !id.is_empty() && !id.contains('\n'))
        {
            Some(id) => add(counter, id),
            None => ("400 Bad Request", "send id=…\n".to_owned()),
        },
        ("GET", "/ids") => (
            "200 OK",
            lock(&counter.store)
                .ids
                .iter()
                .flat_map(|id| [id.as_str(), "\n"])
                .collect(),
        ),
        ("GET", "/check") => match counter.damage() {
            None => (
                "200 OK",
                format!(
                    "every byte of {} MiB is right\n",
                    counter.pattern.blocks.len()
                ),
            ),
            Some(damage) => ("500 Internal Server Error", format!("{damage}\n")),
        },
        ("GET", "/") => (
            "200 OK",
            format!("{} ids\n", lock(&counter.store).ids.len()),
        ),
        _ => (
            "404 Not Found",
            "only /, /add, /ids, /check and /socket\n".to_owned(),
        ),
    }
}

fn add(counter: &Counter, id: &str) -> (&'static str, String) {
    let mut store = lock(&counter.store);
    // To the file first: what is acknowledged outlives the process.
    if let Err(error) = store.file.write_all(format!("{id}\n").as_bytes()) {
        return (
            "500 Internal Server Error",
            format!("not stored: {error}\n"),
        );
    }
    store.ids.push(id.to_owned());
    let count = store.ids.len();
    drop(store);
    rewrite_for_an_id(counter);
    ("201 Created", format!("{count}\n"))
}

/// Each id takes the pages behind those of the one before.
fn rewrite_for_an_id(counter: &Counter) {
    let (pattern, pages) = (&counter.pattern, counter.pages_per_id);
    let generation = counter.generation.fetch_add(1, Ordering::Relaxed) + 1;
    let first = counter.rewritten.fetch_add(pages, Ordering::Relaxed);
    for page in first..first + pages {
        pattern.rewrite(page % pattern.pages(), u64::from(generation));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_wrong_byte_in_the_memory_is_found() {
        let pattern = Pattern::new(2, 7);
        assert_eq!(pattern.damaged(), None);
        lock(&pattern.blocks[1])[5 * PAGE_BYTES + 4095] ^= 1;
        assert_eq!(pattern.damaged(), Some(BLOCK_PAGES + 5));
    }

    #[test]
    fn a_page_of_zeroes_is_found() {
        let pattern = Pattern::new(1, 7);
        lock(&pattern.blocks[0])[..PAGE_BYTES].fill(0);
        assert_eq!(pattern.damaged(), Some(0));
    }

    #[test]
    fn rewritten_pages_are_right_in_their_new_generation() {
        let pattern = Pattern::new(1, 7);
        pattern.rewrite(7, 99);
        assert_eq!(pattern.damaged(), None);
    }
}
