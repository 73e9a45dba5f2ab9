//! Builders for a world of one proxy, its origins and its clients. Every wait is for an event, with a limit that
//! only a failing test reaches.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use cutover_protocol::hold::{Answer, Command, Order, ServiceStatus};
use cutover_protocol::id::{Epoch, ServiceName, Site};
use hopgate_proxy::Proxy;
use hopgate_proxy::config::Config;
use hopgate_proxy::control::client::ControlClient;
use hopgate_proxy::control::words::{ProcessAnswer, ProcessCommand};
use tempfile::TempDir;

/// Longer than anything takes that works.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) fn web() -> ServiceName {
    "web".parse().unwrap()
}

/// A proxy with the service `web`, in a folder of its own.
pub(crate) struct World {
    pub(crate) proxy: Option<Proxy>,
    pub(crate) folder: TempDir,
}

/// What a configuration is made of.
pub(crate) struct Plan {
    pub(crate) source: SocketAddr,
    pub(crate) target: SocketAddr,
    pub(crate) protocol: &'static str,
    /// Names of groups that stand for the two sites' addresses.
    pub(crate) groups: Option<(&'static str, &'static str)>,
    pub(crate) workers: usize,
    pub(crate) more: String,
    /// Keys and tables of the service.
    pub(crate) service: String,
    /// What stands in a `[[service.listen]]`, if the service has one.
    pub(crate) listener: Option<&'static str>,
}

impl Plan {
    pub(crate) fn new(source: SocketAddr, target: SocketAddr) -> Self {
        Self {
            source,
            target,
            protocol: "http",
            groups: None,
            workers: 2,
            more: String::new(),
            service: String::new(),
            listener: None,
        }
    }

    pub(crate) fn tcp(self) -> Self {
        Self {
            protocol: "tcp",
            ..self
        }
    }

    pub(crate) fn named(self, source: &'static str, target: &'static str) -> Self {
        Self {
            groups: Some((source, target)),
            ..self
        }
    }

    pub(crate) fn limits(mut self, limits: &str) -> Self {
        self.more.push_str(&format!("[limits]\n{limits}\n"));
        self
    }

    /// Adds keys to the service, and tables such as its routes.
    pub(crate) fn service(mut self, text: &str) -> Self {
        self.service.push_str(text);
        self.service.push('\n');
        self
    }

    pub(crate) fn table(mut self, text: &str) -> Self {
        self.more.push_str(text);
        self.more.push('\n');
        self
    }

    pub(crate) fn write(&self, folder: &TempDir) -> PathBuf {
        let Self {
            source,
            target,
            protocol,
            groups,
            workers,
            more,
            service,
            listener,
        } = self;
        let (source, target) = match groups {
            Some((source, target)) => ((*source).to_owned(), (*target).to_owned()),
            None => (source.to_string(), target.to_string()),
        };
        let path = folder.path().join("proxy.toml");
        let (listen, listener) = match listener {
            None => ("listen = \"127.0.0.1:0\"\n", String::new()),
            Some(text) => ("", format!("[[service.listen]]\n{text}\n")),
        };
        let text = format!(
            "state_dir = \"state\"\ncontrol = \"control.sock\"\nworkers = {workers}\n{more}\n[[service]]\n\
             name = \"web\"\n{listen}protocol = \"{protocol}\"\nsource = \"{source}\"\ntarget = \"{target}\"\n{service}\n{listener}"
        );
        std::fs::write(&path, text).unwrap();
        path
    }

    pub(crate) fn start(self) -> World {
        self.start_in(tempfile::tempdir().unwrap())
    }

    pub(crate) fn start_in(self, folder: TempDir) -> World {
        let path = self.write(&folder);
        let config = Config::load(&path).unwrap();
        // The kernel gives a port for TCP; QUIC wants the same one of UDP, which another test may have.
        let started = (0..20).map(|_| Proxy::start(&config)).find(|started| {
            let error = started.as_ref().err().map(ToString::to_string);
            error.is_none_or(|error| !error.contains("in use"))
        });
        let proxy = started.unwrap().unwrap();
        World {
            proxy: Some(proxy),
            folder,
        }
    }
}

impl World {
    pub(crate) fn proxy(&self) -> &Proxy {
        self.proxy.as_ref().unwrap()
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.proxy().address("web").unwrap()
    }

    pub(crate) fn client(&self) -> Peer {
        Peer::connect(self.address())
    }

    pub(crate) fn status(&self) -> ServiceStatus {
        self.proxy().status(&web()).unwrap()
    }

    pub(crate) fn until(&self, wanted: impl Fn(&ServiceStatus) -> bool) -> ServiceStatus {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let name = web();
        runtime.block_on(async {
            let waited = tokio::time::timeout(PATIENCE, self.proxy().until(&name, wanted)).await;
            waited
                .unwrap_or_else(|_| panic!("never so: {:?}", self.status()))
                .unwrap()
        })
    }

    pub(crate) fn until_held(&self, count: u64) {
        self.until(|status| status.held_now == count);
    }

    pub(crate) fn control(&self) -> Control {
        Control::connect(&self.folder)
    }

    /// A scrape of the metrics, where the plan has a table for them.
    pub(crate) fn metrics(&self) -> String {
        let mut scraper = Peer::connect(self.proxy().metrics_address().unwrap());
        scraper.send("GET /metrics HTTP/1.1\r\nHost: m\r\n\r\n");
        scraper.message().body
    }

    pub(crate) fn hold(&self) -> ServiceStatus {
        self.control().hold(self.status().register.epoch)
    }

    pub(crate) fn move_to(&self, to: Site) {
        let epoch = self.status().register.epoch;
        let mut control = self.control();
        done(control.say(&Command::Commit {
            service: web(),
            epoch,
            to,
        }));
        done(control.say(&Command::Release {
            service: web(),
            epoch: epoch.next(),
            to,
        }));
    }

    pub(crate) fn reopen(&self) {
        let register = self.status().register;
        let mut control = self.control();
        done(control.say(&Command::Abort {
            service: web(),
            epoch: register.epoch,
        }));
        done(control.say(&Command::Release {
            service: web(),
            epoch: register.epoch.next(),
            to: register.owner,
        }));
    }
}

/// A connection to the control socket.
pub(crate) struct Control(ControlClient);

impl Control {
    pub(crate) fn connect(folder: &TempDir) -> Self {
        Self(ControlClient::connect(&folder.path().join("control.sock")).unwrap())
    }

    pub(crate) fn say(&mut self, command: &Command) -> Answer {
        self.0.command(command).unwrap()
    }

    pub(crate) fn order(&mut self, order: &Order) -> Answer {
        self.0.order(order).unwrap()
    }

    pub(crate) fn process(&mut self, command: &ProcessCommand) -> ProcessAnswer {
        self.0.process(command).unwrap()
    }

    pub(crate) fn hold(&mut self, epoch: Epoch) -> ServiceStatus {
        done(self.say(&hold(epoch, 60_000, 20_000)))
    }

    pub(crate) fn status(&mut self) -> ServiceStatus {
        match self.say(&Command::Status {
            service: Some(web()),
        }) {
            Answer::Status { mut services } => services.remove(0),
            other => panic!("{other:?}"),
        }
    }
}

pub(crate) fn hold(epoch: Epoch, lease_ms: u64, drain_ms_max: u64) -> Command {
    Command::Hold {
        service: web(),
        epoch,
        lease_ms,
        drain_ms_max,
    }
}

pub(crate) fn done(answer: Answer) -> ServiceStatus {
    match answer {
        Answer::Done { service } => service,
        other => panic!("{other:?}"),
    }
}

/// One end of a connection, as a script sees it.
pub(crate) struct Peer {
    stream: BufReader<TcpStream>,
}

/// A message as it came, head and decoded body apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Message {
    pub(crate) first_line: String,
    pub(crate) fields: Vec<(String, String)>,
    pub(crate) body: String,
}

impl Message {
    pub(crate) fn field(&self, name: &str) -> Option<&str> {
        let mut values = self
            .fields
            .iter()
            .filter(|(known, _)| known.eq_ignore_ascii_case(name));
        let value = values.next().map(|(_, value)| value.as_str());
        assert!(values.next().is_none(), "{name} twice in {self:?}");
        value
    }

    pub(crate) fn status(&self) -> u16 {
        self.first_line.split(' ').nth(1).unwrap().parse().unwrap()
    }
}

impl Peer {
    pub(crate) fn connect(address: SocketAddr) -> Self {
        Self::of(TcpStream::connect(address).unwrap())
    }

    pub(crate) fn of(stream: TcpStream) -> Self {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        stream.set_nodelay(true).unwrap();
        Self {
            stream: BufReader::new(stream),
        }
    }

    pub(crate) fn socket(&self) -> &TcpStream {
        self.stream.get_ref()
    }

    pub(crate) fn send(&mut self, bytes: impl AsRef<[u8]>) -> &mut Self {
        self.stream.get_mut().write_all(bytes.as_ref()).unwrap();
        self
    }

    pub(crate) fn get(&mut self, path: &str) -> &mut Self {
        self.send(format!("GET {path} HTTP/1.1\r\nHost: h\r\n\r\n"))
    }

    pub(crate) fn post(&mut self, path: &str, body: &str) -> &mut Self {
        self.send(format!(
            "POST {path} HTTP/1.1\r\nHost: h\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        ))
    }

    pub(crate) fn head(&mut self) -> Message {
        let first_line = self.line();
        assert!(!first_line.is_empty(), "closed before a head");
        let mut fields = Vec::new();
        loop {
            let line = self.line();
            if line.is_empty() {
                return Message {
                    first_line,
                    fields,
                    body: String::new(),
                };
            }
            let (name, value) = line.split_once(':').unwrap();
            fields.push((name.to_owned(), value.trim().to_owned()));
        }
    }

    /// A line without its end; empty at the end of the stream, too.
    pub(crate) fn line(&mut self) -> String {
        let mut line = String::new();
        self.stream.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    /// A whole message; a body without framing is taken to be empty.
    pub(crate) fn message(&mut self) -> Message {
        let mut message = self.head();
        let body = match (
            message.field("Content-Length"),
            message.field("Transfer-Encoding"),
        ) {
            (Some(length), None) => self.bytes(length.parse().unwrap()),
            (None, Some("chunked")) => self.chunks(),
            (None, None) => Vec::new(),
            both => panic!("{both:?}"),
        };
        message.body = String::from_utf8(body).unwrap();
        message
    }

    pub(crate) fn bytes(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        self.stream.read_exact(&mut bytes).unwrap();
        bytes
    }

    /// The data, and the trailer lines in braces behind it if there are any.
    pub(crate) fn chunks(&mut self) -> Vec<u8> {
        let mut body = Vec::new();
        loop {
            let size = usize::from_str_radix(&self.line(), 16).unwrap();
            if size == 0 {
                break;
            }
            body.extend(self.bytes(size));
            assert_eq!(self.line(), "");
        }
        loop {
            match self.line() {
                line if line.is_empty() => return body,
                line => body.extend(format!("{{{line}}}").into_bytes()),
            }
        }
    }

    /// Whether the other end has closed, cleanly or not. Waits for it.
    pub(crate) fn is_closed(&mut self) -> bool {
        match self.stream.fill_buf() {
            Ok(rest) => rest.is_empty(),
            Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
        }
    }

    pub(crate) fn rest(&mut self) -> String {
        let mut rest = String::new();
        self.stream.read_to_string(&mut rest).unwrap();
        rest
    }
}

/// A place where a test plays the origin itself.
pub(crate) struct Stage {
    listener: TcpListener,
}

impl Stage {
    pub(crate) fn new() -> Self {
        Self {
            listener: TcpListener::bind("127.0.0.1:0").unwrap(),
        }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.listener.local_addr().unwrap()
    }

    pub(crate) fn listener(&self) -> &TcpListener {
        &self.listener
    }

    pub(crate) fn accept(&self) -> Peer {
        Peer::of(self.listener.accept().unwrap().0)
    }

    /// Whether nobody waits to be accepted.
    pub(crate) fn is_deserted(&self) -> bool {
        self.listener.set_nonblocking(true).unwrap();
        let nobody = self.listener.accept().is_err();
        self.listener.set_nonblocking(false).unwrap();
        nobody
    }
}

/// An address where nobody listens: bound, so that nobody else gets it, and not listening.
pub(crate) struct Nobody(socket2::Socket);

impl Nobody {
    pub(crate) fn new() -> Self {
        let socket =
            socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
        socket
            .bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into())
            .unwrap();
        Self(socket)
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.0.local_addr().unwrap().as_socket().unwrap()
    }

    /// From now on somebody does.
    pub(crate) fn becomes(self, name: &'static str) -> Origin {
        self.0.listen(128).unwrap();
        Origin::on(self.0.into(), name)
    }
}

/// An origin that answers every request with its own name, the request's line and its body.
pub(crate) struct Origin {
    address: SocketAddr,
    seen: Arc<Mutex<Vec<String>>>,
    connections: Arc<Mutex<usize>>,
    listener: TcpListener,
}

impl Origin {
    pub(crate) fn new(name: &'static str) -> Self {
        Self::on(TcpListener::bind("127.0.0.1:0").unwrap(), name)
    }

    fn on(listener: TcpListener, name: &'static str) -> Self {
        let address = listener.local_addr().unwrap();
        let (seen, connections) = (Arc::default(), Arc::default());
        let origin = Self {
            address,
            seen: Arc::clone(&seen),
            connections: Arc::clone(&connections),
            listener: listener.try_clone().unwrap(),
        };
        thread::spawn(move || {
            for stream in listener.incoming() {
                let Ok(stream) = stream else { return };
                *connections.lock().unwrap() += 1;
                let seen = Arc::clone(&seen);
                thread::spawn(move || serve(Peer::of(stream), name, &seen));
            }
        });
        origin
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// From now on nobody gets a connection any more.
    pub(crate) fn closes(&self) {
        let listener = socket2::SockRef::from(&self.listener);
        listener.shutdown(std::net::Shutdown::Both).unwrap();
    }

    /// `METHOD path body` of each request, in the order of their arrival.
    pub(crate) fn seen(&self) -> Vec<String> {
        self.seen.lock().unwrap().clone()
    }

    pub(crate) fn connections(&self) -> usize {
        *self.connections.lock().unwrap()
    }
}

fn serve(mut peer: Peer, name: &str, seen: &Mutex<Vec<String>>) {
    peer.socket().set_read_timeout(None).unwrap();
    while !peer.is_closed() {
        let request = peer.message();
        let line = request.first_line.trim_end_matches(" HTTP/1.1");
        let said = format!("{line} {}", request.body).trim_end().to_owned();
        seen.lock().unwrap().push(said.clone());
        let answer = format!("{name} {said}");
        peer.send(format!(
            "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{answer}",
            answer.len()
        ));
    }
}
