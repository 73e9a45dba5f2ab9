//! Clients that stay: connections from the edge, opened before the hop and used after it, that tell whether what comes
//! from outside goes on. A database session with a transaction that is open across the hop, by the container's own
//! address and through the proxy, which carries it; or a WebSocket through the proxy with a message a second.

use std::io::{self, BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, ChildStdin, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::command::{CommandError, Shell, kill_group};
use crate::lab::app::{App, ContainerKind};
use crate::lab::error::{LabError, OnFile, Result};
use crate::lab::netns;
use crate::lab::world::{HOST, World};
use crate::report::{Carried, Kept};
use crate::socket::{self, End};

/// Longest an answer may take, in seconds: a connection that moved is noticed with TCP's next try only.
const ANSWER_S: u64 = 60;
/// Lines that may wait to be read.
const LINES_MAX: usize = 64;

/// How often the WebSocket client says something.
const MESSAGE_EVERY: Duration = Duration::from_secs(1);
/// Where the proxy listens for WebSockets.
const SOCKET_AT: SocketAddr =
    SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 8080);

/// A client that stays.
#[derive(Debug)]
pub enum Witness {
    /// A database session.
    Session(Session),
    /// A WebSocket.
    Socket(Socket),
}

impl Witness {
    /// Those that an application has, connected.
    ///
    /// # Errors
    /// When one is not let in.
    pub fn all(world: &World) -> Result<Vec<Self>> {
        match world.app {
            App::Wordpress => {
                let direct = Session::begin(world, "10.44.0.2", "lab_direct")?;
                let carried = Session::begin(world, "127.0.0.1", "lab_carried")?;
                Ok(vec![Self::Session(direct), Self::Session(carried)])
            }
            App::Counter => Ok(vec![Self::Socket(Socket::begin(world)?)]),
            App::Counters => Ok(Vec::new()),
        }
    }

    /// Uses it once more, and tells how it fared.
    #[must_use]
    pub fn end(self) -> Carried {
        match self {
            Self::Session(session) => session.end(),
            Self::Socket(socket) => socket.end(),
        }
    }
}

/// A database session with an open transaction.
#[derive(Debug)]
pub struct Session {
    host: &'static str,
    table: &'static str,
    child: Child,
    statements: ChildStdin,
    lines: Receiver<String>,
    connection: String,
}

impl Session {
    /// Connects and begins a transaction.
    fn begin(world: &World, host: &'static str, table: &'static str) -> Result<Self> {
        let shell = Shell::new("chroot")
            .arg(world.run.path.join("images").join(ContainerKind::Db.name()))
            .args([
                "mariadb",
                "--no-defaults",
                "--unbuffered",
                "-N",
                "-B",
                "--skip-reconnect",
            ])
            .args(["-h", host, "-u", "wordpress", "-plab", "wordpress"]);
        let shell = shell.inside(&world.run.names.path("edge"));
        let log = world.run.path.join(format!("{table}.log"));
        let mut command = shell.prepare();
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(std::fs::File::create(&log).on("create", &log)?);
        let mut child = command.spawn().map_err(|source| CommandError::Start {
            line: shell.line(),
            source,
        })?;
        let (Some(statements), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(failed("it has no standard streams"));
        };
        let (sender, lines) = sync_channel(LINES_MAX);
        thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(io::Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        let mut session = Self {
            host,
            table,
            child,
            statements,
            lines,
            connection: String::new(),
        };
        let begin = format!(
            "CREATE TABLE IF NOT EXISTS {table} (moment VARCHAR(8)); TRUNCATE {table}; BEGIN; \
             INSERT INTO {table} VALUES ('before'); SELECT CONNECTION_ID();"
        );
        session.connection = session.ask(&begin)?;
        Ok(session)
    }

    /// Goes on with the same transaction and commits it.
    fn end(mut self) -> Carried {
        let table = self.table;
        let end = format!(
            "INSERT INTO {table} VALUES ('after'); COMMIT; \
             SELECT CONCAT(CONNECTION_ID(), ' ', COUNT(*), ' ', COUNT(DISTINCT moment)) FROM {table};"
        );
        let kept = match self.ask(&end) {
            Ok(answer) if answer == format!("{} 2 2", self.connection) => Kept::Survived,
            _ => Kept::Broken,
        };
        Carried {
            what: format!(
                "a database session by {}, with its open transaction",
                self.host
            ),
            kept,
        }
    }

    fn ask(&mut self, statements: &str) -> Result<String> {
        writeln!(self.statements, "{statements}").map_err(|error| failed(&error.to_string()))?;
        let answer = self.lines.recv_timeout(Duration::from_secs(ANSWER_S));
        answer.map_err(|_| failed("no answer"))
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        kill_group(&mut self.child);
    }
}

fn failed(why: &str) -> LabError {
    LabError::Http {
        what: "a connection that is held open across the hop".into(),
        why: why.to_owned(),
    }
}

/// A WebSocket with a message a second.
#[derive(Debug)]
pub struct Socket {
    stop: SyncSender<()>,
    talking: JoinHandle<io::Result<Talk>>,
}

/// What a conversation came to.
#[derive(Debug, Default)]
struct Talk {
    echoed: u64,
    /// The longest wait for an echo.
    longest: Duration,
}

impl Socket {
    fn begin(world: &World) -> Result<Self> {
        let connected = netns::within(&world.run.names.path("edge"), || connect(SOCKET_AT))?;
        let stream = connected.map_err(|error| failed(&error.to_string()))?;
        let (stop, stopped) = sync_channel(1);
        let talking = thread::spawn(move || talk(stream, &stopped));
        Ok(Self { stop, talking })
    }

    fn end(self) -> Carried {
        // It has ended by itself if the connection broke.
        let _ = self.stop.send(());
        let talk = self.talking.join().map_err(|_| io::ErrorKind::Other.into());
        let (told, kept) = match talk.and_then(|talk| talk) {
            Ok(Talk { echoed, longest }) => (
                format!(
                    "{echoed} messages echoed, the slowest after {} ms",
                    longest.as_millis()
                ),
                Kept::Survived,
            ),
            Err(error) => (error.to_string(), Kept::Broken),
        };
        Carried {
            what: format!("a WebSocket through the proxy ({told})"),
            kept,
        }
    }
}

fn connect(to: SocketAddr) -> io::Result<BufReader<TcpStream>> {
    let mut stream = TcpStream::connect(to)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(Duration::from_secs(ANSWER_S)))?;
    let key = socket::UPGRADE_KEY;
    write!(
        stream,
        "GET /socket HTTP/1.1\r\nHost: {HOST}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n\r\n"
    )?;
    let mut answers = BufReader::new(stream);
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        if answers.read_line(&mut head)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    if head.starts_with("HTTP/1.1 101 ") {
        Ok(answers)
    } else {
        Err(io::Error::other(
            head.lines().next().unwrap_or("").to_owned(),
        ))
    }
}

/// Says something and hears it back, again and again, once more when told to stop.
fn talk(mut messages: BufReader<TcpStream>, stopped: &Receiver<()>) -> io::Result<Talk> {
    let mut talk = Talk::default();
    loop {
        let is_last = stopped.recv_timeout(MESSAGE_EVERY) != Err(RecvTimeoutError::Timeout);
        let said = format!("message {}", talk.echoed + 1);
        let mask = (talk.echoed as u32).wrapping_mul(0x9e37_79b9).to_le_bytes();
        let began = Instant::now();
        socket::write(
            messages.get_mut(),
            End::Client(mask),
            socket::TEXT,
            said.as_bytes(),
        )?;
        if socket::read(&mut messages)? != (socket::TEXT, said.into_bytes()) {
            return Err(io::Error::other("another message came back than was sent"));
        }
        talk.echoed += 1;
        talk.longest = talk.longest.max(began.elapsed());
        if is_last {
            return Ok(talk);
        }
    }
}
