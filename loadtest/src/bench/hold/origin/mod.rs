//! An origin that writes down every id it executes. Each of the two sites is a process of its own.
//!
//! It has so many workers, and each request keeps one busy for so long: its capacity is known to the request. More
//! requests than workers wait inside it, as in any server with a backlog, and are counted. It never decides whether a
//! request may come: it executes what it is sent, also a second time.

mod desk;
mod serve;

use std::io::{self, Write};
use std::net::{Ipv4Addr, SocketAddr};
use std::rc::Rc;
use std::time::Duration;

use clap::Args;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::task::{LocalSet, spawn_local};

use desk::Desk;

/// Connections that may wait to be accepted.
const BACKLOG: u32 = 4096;
/// Pause after a failed accept, in milliseconds: the cause, too many open files, does not go away at once.
const ACCEPT_AGAIN_MS: u64 = 10;

/// How an origin works.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Args)]
pub struct Options {
    /// Requests that are worked on at the same time.
    #[arg(long, default_value_t = 1024)]
    pub workers: usize,
    /// How long each takes, in microseconds.
    #[arg(long, default_value_t = 0)]
    pub work_us: u64,
    /// What it does wrong, on purpose.
    #[arg(long, default_value = "nothing")]
    pub spoil: Spoil,
}

/// What an origin does wrong: a harness that stays green then proves nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Spoil {
    /// Nothing.
    Nothing,
    /// It acknowledges every tenth request without executing it.
    Lose,
    /// It executes every tenth request twice.
    Double,
}

impl Spoil {
    /// As it is written on a command line.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Nothing => "nothing",
            Self::Lose => "lose",
            Self::Double => "double",
        }
    }
}

/// Where an origin listens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Addresses {
    /// HTTP.
    pub http: SocketAddr,
    /// Raw TCP.
    pub raw: SocketAddr,
    /// Questions of the lab.
    pub desk: SocketAddr,
}

impl Addresses {
    /// Reads an origin's first line.
    #[must_use]
    pub fn read(text: &str) -> Option<Self> {
        let (line, _) = text.split_once('\n')?;
        let mut words = line.strip_prefix("listening ")?.split(' ');
        let mut next = || words.next()?.parse().ok();
        Some(Self {
            http: next()?,
            raw: next()?,
            desk: next()?,
        })
    }
}

/// Says where it listens, as its first line, and serves until the process is killed.
///
/// # Errors
/// When it cannot listen.
pub fn run(options: Options) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    LocalSet::new().block_on(&runtime, async {
        let desk = Desk::open(options)?;
        let (http, raw, questions) = (listen()?, listen()?, listen()?);
        let mut out = io::stdout().lock();
        writeln!(
            out,
            "listening {} {} {}",
            http.local_addr()?,
            raw.local_addr()?,
            questions.local_addr()?
        )?;
        out.flush()?;
        drop(out);
        let (http_desk, raw_desk) = (Rc::clone(&desk), Rc::clone(&desk));
        spawn_local(accept(http, move |stream| {
            serve::http(stream, Rc::clone(&http_desk))
        }));
        spawn_local(accept(raw, move |stream| {
            serve::raw(stream, Rc::clone(&raw_desk))
        }));
        accept(questions, move |stream| answer(stream, Rc::clone(&desk))).await;
        Ok(())
    })
}

fn listen() -> io::Result<TcpListener> {
    let socket = TcpSocket::new_v4()?;
    socket.bind((Ipv4Addr::LOCALHOST, 0).into())?;
    socket.listen(BACKLOG)
}

async fn accept<F: Future<Output = io::Result<()>> + 'static>(
    listener: TcpListener,
    serve: impl Fn(TcpStream) -> F,
) {
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(ACCEPT_AGAIN_MS)).await;
            continue;
        };
        // What it saves is latency; it works without.
        let _ = stream.set_nodelay(true);
        let serving = serve(stream);
        spawn_local(async move {
            // Whoever asks sees its connection close, and counts that.
            let _ = serving.await;
        });
    }
}

/// Answers the lab: a line each way.
async fn answer(mut stream: TcpStream, desk: Rc<Desk>) -> io::Result<()> {
    let (reader, mut writer) = stream.split();
    let mut lines = BufReader::new(reader).lines();
    while let Some(line) = lines.next_line().await? {
        let mut said = match line.as_str() {
            "report" => serde_json::to_vec(&desk.seen())?,
            "ready" => {
                desk.become_ready();
                b"ready".to_vec()
            }
            "count anew" => {
                desk.count_anew();
                b"counting".to_vec()
            }
            _ => b"what?".to_vec(),
        };
        said.push(b'\n');
        writer.write_all(&said).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_line_tells_where_an_origin_listens() {
        let read = Addresses::read("listening 127.0.0.1:1 127.0.0.1:2 127.0.0.1:3\n").unwrap();
        let ports = [read.http, read.raw, read.desk].map(|address| address.port());
        assert_eq!(ports, [1, 2, 3]);
        assert_eq!(Addresses::read("listening 127.0.0.1:1 127.0.0.1:2\n"), None);
        assert_eq!(Addresses::read("listening 127.0.0.1:1"), None);
    }
}
