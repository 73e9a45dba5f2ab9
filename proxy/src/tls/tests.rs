//! Sessions of ours against rustls' own on the other end of real sockets.

use std::future::poll_fn;
use std::io::{self, IoSlice, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream as StdStream};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rcgen::{CertifiedKey, generate_simple_self_signed};
use rustls::crypto::CryptoProvider;
use rustls::crypto::aws_lc_rs::{DEFAULT_CIPHER_SUITES, default_provider};
use rustls::pki_types::{PrivateKeyDer, ServerName};
use rustls::{
    ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection,
    SupportedCipherSuite,
};

use super::SessionError;
use super::client::UpstreamTls;
use super::stream::TlsStream;
use crate::config::Config;
use crate::stream::{Socket, Stream};

const PATIENCE: Duration = Duration::from_secs(20);

struct World {
    server: Arc<ServerConfig>,
    client: Arc<ClientConfig>,
    pem: String,
}

impl World {
    fn new() -> Self {
        Self::with(DEFAULT_CIPHER_SUITES)
    }

    fn with(suites: &[SupportedCipherSuite]) -> Self {
        let provider = Arc::new(CryptoProvider {
            cipher_suites: suites.to_vec(),
            ..default_provider()
        });
        let CertifiedKey { cert, signing_key } =
            generate_simple_self_signed(["site.example".to_owned()]).unwrap();
        let mut roots = RootCertStore::empty();
        roots.add(cert.der().clone()).unwrap();
        let mut server = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[suites[0].version()])
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(
                vec![cert.der().clone()],
                PrivateKeyDer::Pkcs8(signing_key.serialize_der().into()),
            )
            .unwrap();
        server.enable_secret_extraction = true;
        let mut client = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[suites[0].version()])
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        client.enable_secret_extraction = true;
        Self {
            server: Arc::new(server),
            client: Arc::new(client),
            pem: cert.pem(),
        }
    }
}

fn name() -> ServerName<'static> {
    "site.example".try_into().unwrap()
}

fn run<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
        .block_on(async { tokio::time::timeout(PATIENCE, future).await.unwrap() })
}

/// A client made of rustls' own parts.
type Client = rustls::StreamOwned<ClientConnection, StdStream>;
type Server = rustls::StreamOwned<ServerConnection, StdStream>;

/// Our server, and a client on a thread of its own.
async fn serve<T: Send + 'static>(
    world: &World,
    script: impl FnOnce(Client) -> T + Send + 'static,
) -> (io::Result<TlsStream>, JoinHandle<T>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let session = ClientConnection::new(Arc::clone(&world.client), name()).unwrap();
    let client = thread::spawn(move || {
        let socket = StdStream::connect(address).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        script(Client::new(session, socket))
    });
    let (socket, _) = listener.accept().unwrap();
    (
        TlsStream::accept(ours(socket), &world.server, PATIENCE).await,
        client,
    )
}

/// Our client, and a server on a thread of its own.
async fn call<T: Send + 'static>(
    world: &World,
    script: impl FnOnce(Server) -> T + Send + 'static,
) -> (io::Result<TlsStream>, JoinHandle<T>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let session = ServerConnection::new(Arc::clone(&world.server)).unwrap();
    let server = thread::spawn(move || {
        let (socket, _) = listener.accept().unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        script(Server::new(session, socket))
    });
    let socket = StdStream::connect(address).unwrap();
    (
        TlsStream::connect(ours(socket), &world.client, name(), PATIENCE).await,
        server,
    )
}

fn ours(socket: StdStream) -> Socket {
    socket.set_nonblocking(true).unwrap();
    Socket::new(socket.into())
}

async fn read(stream: &TlsStream, out: &mut [u8]) -> io::Result<usize> {
    loop {
        match stream.try_read(out) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                poll_fn(|context| stream.poll_readable(context)).await?;
            }
            other => return other,
        }
    }
}

async fn read_exact(stream: &TlsStream, count: usize, most: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    let mut filled = 0;
    while filled < count {
        let end = count.min(filled.saturating_add(most));
        let read = read(stream, &mut bytes[filled..end]).await.unwrap();
        assert!(read > 0, "closed after {filled} of {count}");
        filled += read;
    }
    bytes
}

async fn write(stream: &TlsStream, slices: &[&[u8]]) {
    let mut slices: Vec<IoSlice<'_>> = slices.iter().map(|slice| IoSlice::new(slice)).collect();
    let mut slices = &mut slices[..];
    while !slices.is_empty() {
        match stream.try_write(slices) {
            Ok(count) => IoSlice::advance_slices(&mut slices, count),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                poll_fn(|context| stream.poll_writable(context))
                    .await
                    .unwrap();
            }
            Err(error) => panic!("{error}"),
        }
    }
    while stream.wants_write() {
        match stream.try_flush() {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                poll_fn(|context| stream.poll_writable(context))
                    .await
                    .unwrap();
            }
            other => other.unwrap(),
        }
    }
}

fn pattern(count: usize) -> Vec<u8> {
    (0..count)
        .map(|place| (place * 7 + place / 251) as u8)
        .collect()
}

fn session_error(error: &io::Error) -> &SessionError {
    error.get_ref().unwrap().downcast_ref().unwrap()
}

const LENGTHS: [usize; 6] = [1, 100, 16_383, 16_384, 16_385, 300_000];

#[test]
fn every_cipher_suite_carries_data_both_ways_in_either_role() {
    for suite in DEFAULT_CIPHER_SUITES {
        // The certificates of these tests have P-256 keys.
        if format!("{suite:?}").contains("RSA") {
            continue;
        }
        let world = World::with(&[*suite]);
        run(async {
            let (ours, theirs) = serve(&world, echo_client).await;
            let ours = ours.unwrap();
            for length in LENGTHS {
                let text = read_exact(&ours, length, usize::MAX).await;
                assert_eq!(text, pattern(length), "{suite:?} {length}");
                write(&ours, &[&text[..length / 3], &[], &text[length / 3..]]).await;
            }
            theirs.join().unwrap();
            let (ours, theirs) = call(&world, echo_server).await;
            let ours = ours.unwrap();
            for length in LENGTHS {
                write(&ours, &[&pattern(length)]).await;
                let text = read_exact(&ours, length, usize::MAX).await;
                assert_eq!(text, pattern(length), "{suite:?} {length}");
            }
            ours.finish();
            theirs.join().unwrap();
        });
    }
}

fn echo_client(mut client: Client) {
    for length in LENGTHS {
        client.write_all(&pattern(length)).unwrap();
        let mut text = vec![0; length];
        client.read_exact(&mut text).unwrap();
        assert_eq!(text, pattern(length));
    }
}

fn echo_server(mut server: Server) {
    let mut bytes = [0; 20_000];
    loop {
        match server.read(&mut bytes).unwrap() {
            0 => return,
            count => server.write_all(&bytes[..count]).unwrap(),
        }
    }
}

#[test]
fn a_reader_without_room_for_a_record_gets_all_of_it_in_time() {
    run(async {
        let (ours, theirs) = serve(&World::new(), |mut client| {
            client.write_all(&pattern(100_000)).unwrap();
            // Closed with our tickets unread it would reset the connection, and take back what is under way.
            client
        })
        .await;
        let text = read_exact(&ours.unwrap(), 100_000, 7).await;
        assert_eq!(text, pattern(100_000));
        drop(theirs.join().unwrap());
    });
}

#[test]
fn keys_change_in_both_directions_without_losing_a_byte() {
    run(async {
        let (ours, theirs) = serve(&World::new(), |mut client| {
            client.conn.complete_io(&mut client.sock).unwrap();
            for _ in 0..5 {
                client.conn.refresh_traffic_keys().unwrap();
                client.write_all(b"to").unwrap();
                let mut text = [0; 4];
                client.read_exact(&mut text).unwrap();
                assert_eq!(&text, b"back");
            }
        })
        .await;
        let ours = ours.unwrap();
        ours.renew_keys_after(1);
        for _ in 0..5 {
            assert_eq!(read_exact(&ours, 2, 2).await, b"to");
            write(&ours, &[b"ba", b"ck"]).await;
        }
        theirs.join().unwrap();
    });
}

#[test]
fn a_farewell_is_an_end_and_a_cut_is_an_error() {
    run(async {
        let (ours, theirs) = serve(&World::new(), |mut client| {
            client.write_all(b"x").unwrap();
            client.conn.send_close_notify();
            client.flush().unwrap();
            client
        })
        .await;
        let ours = ours.unwrap();
        assert_eq!(read_exact(&ours, 1, 1).await, b"x");
        assert_eq!(read(&ours, &mut [0; 8]).await.unwrap(), 0);
        assert_eq!(read(&ours, &mut [0; 8]).await.unwrap(), 0);
        drop(theirs.join().unwrap());

        let (ours, theirs) = serve(&World::new(), |mut client| {
            client.write_all(b"x").unwrap();
            client.sock.shutdown(Shutdown::Write).unwrap();
            client
        })
        .await;
        let ours = ours.unwrap();
        assert_eq!(read_exact(&ours, 1, 1).await, b"x");
        let cut = read(&ours, &mut [0; 8]).await.unwrap_err();
        assert_eq!(cut.kind(), io::ErrorKind::UnexpectedEof);
        drop(theirs.join().unwrap());
    });
}

#[test]
fn our_farewell_reaches_the_peer_behind_the_data() {
    run(async {
        let (ours, theirs) = serve(&World::new(), |mut client| {
            let mut text = String::new();
            client.read_to_string(&mut text).map(|_| text)
        })
        .await;
        let ours = ours.unwrap();
        write(&ours, &[b"the end"]).await;
        ours.finish();
        assert_eq!(theirs.join().unwrap().unwrap(), "the end");
    });
}

#[test]
fn a_forged_record_ends_the_session_and_the_peer_is_told_why() {
    run(async {
        let (ours, theirs) = serve(&World::new(), |mut client| {
            client.write_all(b"x").unwrap();
            let forged = [&[23, 3, 3, 0, 40][..], &[7; 40]].concat();
            client.sock.write_all(&forged).unwrap();
            client.read(&mut [0; 8]).unwrap_err().to_string()
        })
        .await;
        let ours = ours.unwrap();
        assert_eq!(read_exact(&ours, 1, 1).await, b"x");
        let error = read(&ours, &mut [0; 8]).await.unwrap_err();
        assert!(
            matches!(session_error(&error), SessionError::Undecipherable),
            "{error}"
        );
        assert_eq!(theirs.join().unwrap(), "received fatal alert: BadRecordMac");
    });
}

#[test]
fn a_record_longer_than_allowed_is_refused_before_it_has_come() {
    run(async {
        let (ours, theirs) = serve(&World::new(), |mut client| {
            client.flush().unwrap();
            client.sock.write_all(&[23, 3, 3, 0x7f, 0xff]).unwrap();
            client.read(&mut [0; 8]).unwrap_err().to_string()
        })
        .await;
        let error = read(&ours.unwrap(), &mut [0; 8]).await.unwrap_err();
        assert!(
            matches!(session_error(&error), SessionError::Overlong),
            "{error}"
        );
        assert_eq!(
            theirs.join().unwrap(),
            "received fatal alert: RecordOverflow"
        );
    });
}

#[test]
fn a_client_that_trusts_another_authority_gives_up_and_so_do_we() {
    run(async {
        let mut world = World::new();
        world.client = World::new().client;
        let (ours, theirs) =
            serve(&world, |mut client| client.flush().unwrap_err().to_string()).await;
        let error = ours.unwrap_err();
        assert!(
            matches!(
                session_error(&error),
                SessionError::Rustls(rustls::Error::AlertReceived(_))
            ),
            "{error}"
        );
        assert!(theirs.join().unwrap().contains("invalid peer certificate"));
    });
}

#[test]
fn a_client_that_says_nothing_is_left_after_the_limit() {
    run(async {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let _silent = StdStream::connect(listener.local_addr().unwrap()).unwrap();
        let socket = ours(listener.accept().unwrap().0);
        let limit = Duration::from_millis(10);
        let stream = TlsStream::accept(socket, &World::new().server, limit).await;
        assert_eq!(stream.unwrap_err().kind(), io::ErrorKind::TimedOut);
    });
}

#[test]
fn a_write_that_the_kernel_has_not_taken_has_provably_not_left_us() {
    run(async {
        let (ours, theirs) = call(&World::new(), |mut server| {
            server.conn.complete_io(&mut server.sock).unwrap();
            // Reads no further.
            server
        })
        .await;
        let ours = ours.unwrap();
        let before = ours.mark();
        assert!(!ours.left_since(before));
        let flood = pattern(60_000);
        write(&ours, &[b"x"]).await;
        while !ours.wants_write() {
            ours.try_write(&[IoSlice::new(&flood)]).unwrap();
        }
        assert!(ours.left_since(before));
        // The kernel may have made room since, for what it moves on to the peer; not for ever.
        loop {
            let after = ours.mark();
            if let Err(refused) = ours.try_write(&[IoSlice::new(b"request")]) {
                assert_eq!(refused.kind(), io::ErrorKind::WouldBlock);
                assert!(!ours.left_since(after));
                break;
            }
        }
        drop(theirs.join().unwrap());
    });
}

#[test]
fn tickets_that_come_later_do_not_count_as_talk_and_resume_the_session() {
    let world = World::new();
    let visit = || async {
        let (ours, theirs) = call(&world, |mut server| {
            server.flush().unwrap();
            let mut byte = [0];
            server.read_exact(&mut byte).unwrap();
            server.write_all(&byte).unwrap();
            server.read(&mut byte).unwrap()
        })
        .await;
        let ours = ours.unwrap();
        write(&ours, &[b"x"]).await;
        assert_eq!(read_exact(&ours, 1, 1).await, b"x");
        assert!(ours.is_silent());
        ours.finish();
        assert_eq!(theirs.join().unwrap(), 0);
        ours.agreed().resumed
    };
    assert_eq!(run(async { [visit().await, visit().await] }), [false, true]);
}

/// A group of servers that trusts what `world` trusts, spoken to at a server of `world`.
async fn upstream(
    world: &World,
    text: &str,
    address: &str,
) -> (io::Result<Stream>, JoinHandle<Option<String>>) {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("ca.pem"), &world.pem).unwrap();
    let config = format!(
        "state_dir = \"s\"\ncontrol = \"c\"\n[[service]]\nname = \"web\"\nlisten = \"127.0.0.1:0\"\n\
         source = \"127.0.0.1:1\"\ntarget = \"127.0.0.1:1\"\n[[upstream]]\nname = \"group\"\n\
         servers = [{{ address = \"{address}\" }}]\n[upstream.tls]\n{text}\n"
    );
    let path = folder.path().join("proxy.toml");
    std::fs::write(&path, config).unwrap();
    let group = Config::load(&path).unwrap().upstreams.remove(0);
    let tls = UpstreamTls::load(&group.name, &group.tls.unwrap(), group.protocol).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let place = listener.local_addr().unwrap();
    let session = ServerConnection::new(Arc::clone(&world.server)).unwrap();
    let server = thread::spawn(move || {
        let mut server = Server::new(session, listener.accept().unwrap().0);
        let heard = server.conn.complete_io(&mut server.sock);
        heard.ok()?;
        server.write_all(b"x").ok()?;
        server.conn.server_name().map(str::to_owned)
    });
    let socket = ours(StdStream::connect(place).unwrap());
    let stream = tls
        .connect(socket, &group.servers[0].address, PATIENCE)
        .await;
    if let Ok(stream) = &stream {
        // What is left of the handshake goes out with the first wait.
        poll_fn(|context| stream.poll_readable(context))
            .await
            .unwrap();
    }
    (stream, server)
}

#[test]
fn a_server_is_asked_for_and_verified_by_the_name_it_was_configured_by() {
    let world = World::new();
    for (text, address) in [
        ("ca = \"ca.pem\"", "site.example:443"),
        ("ca = \"ca.pem\"\nname = \"site.example\"", "127.0.0.1:443"),
        ("ca = \"ca.pem\"", "srv:_https._tcp.site.example"),
        (
            "ca = \"ca.pem\"\nname = \"site.example\"",
            "unix:/run/app.sock",
        ),
    ] {
        run(async {
            let (stream, server) = upstream(&world, text, address).await;
            stream.unwrap_or_else(|error| panic!("{address}: {error}"));
            assert_eq!(server.join().unwrap().as_deref(), Some("site.example"));
        });
    }
}

#[test]
fn a_server_with_another_name_or_another_authority_is_refused_with_the_reason() {
    let world = World::new();
    for (text, address, said) in [
        ("ca = \"ca.pem\"", "127.0.0.1:443", "not valid for name"),
        (
            "ca = \"ca.pem\"\nname = \"other.example\"",
            "site.example:443",
            "not valid for name",
        ),
        ("", "site.example:443", "UnknownIssuer"),
    ] {
        run(async {
            let (stream, server) = upstream(&world, text, address).await;
            let error = stream.unwrap_err().to_string();
            assert!(error.contains(said), "{error}");
            assert_eq!(server.join().unwrap(), None);
        });
    }
}
