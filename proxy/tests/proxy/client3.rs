//! An HTTP/3 client as a test wants it: blocking, with every wait limited. A thread of its own keeps the connection
//! going meanwhile.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::sync::Arc;

use bytes::{Buf, Bytes, BytesMut};
use h3::client::{RequestStream, SendRequest};
use h3::error::{ConnectionError, StreamError};
use h3_quinn::{BidiStream, OpenStreams};
use http::{HeaderMap, Method, Request};
use quinn::crypto::rustls::QuicClientConfig;
use quinn::{ClientConfig, Endpoint, TransportConfig};
use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use tempfile::TempDir;
use tokio::runtime::Runtime;
use tokio::task::JoinHandle;

use crate::world::{PATIENCE, Plan, World};

/// A name that the certificate has.
pub(crate) const NAME: &str = "example.org";

/// A proxy that speaks HTTP/3, and whom its clients trust.
pub(crate) struct World3 {
    pub(crate) world: World,
    pub(crate) certificate: CertificateDer<'static>,
}

/// One connection.
pub(crate) struct Client3 {
    runtime: Runtime,
    endpoint: Endpoint,
    pub(crate) connection: quinn::Connection,
    send: SendRequest<OpenStreams, Bytes>,
    driver: Option<JoinHandle<ConnectionError>>,
}

/// One request under way.
pub(crate) type Stream3 = RequestStream<BidiStream<Bytes>, Bytes>;

/// A whole answer.
#[derive(Debug)]
pub(crate) struct Answer3 {
    pub(crate) status: u16,
    pub(crate) fields: HeaderMap,
    pub(crate) body: Bytes,
    pub(crate) trailer: Option<HeaderMap>,
}

impl Answer3 {
    pub(crate) fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }
}

impl Plan {
    /// Starts with one listener, which speaks HTTP/3 besides TLS.
    pub(crate) fn start_http3(self) -> World3 {
        let folder = tempfile::tempdir().unwrap();
        let certificate = certify(&folder);
        World3 {
            world: self.with_http3().start_in(folder),
            certificate,
        }
    }

    /// The same for a process that is started by the test.
    pub(crate) fn write_http3(self, folder: &TempDir) -> CertificateDer<'static> {
        let certificate = certify(folder);
        self.with_http3().write(folder);
        certificate
    }

    fn with_http3(self) -> Self {
        let mut plan = self.table(
            "[[tls]]\nname = \"public\"\ncertificates = [{ chain = \"a.pem\", key = \"a.key\" }]",
        );
        plan.listener = Some("address = \"127.0.0.1:0\"\ntls = \"public\"\nhttp3 = true");
        plan
    }
}

fn certify(folder: &TempDir) -> CertificateDer<'static> {
    let made = rcgen::generate_simple_self_signed([NAME.to_owned()]).unwrap();
    std::fs::write(folder.path().join("a.pem"), made.cert.pem()).unwrap();
    std::fs::write(
        folder.path().join("a.key"),
        made.signing_key.serialize_pem(),
    )
    .unwrap();
    made.cert.der().clone()
}

impl World3 {
    pub(crate) fn client(&self) -> Client3 {
        self.client_with(TransportConfig::default())
    }

    pub(crate) fn client_with(&self, transport: TransportConfig) -> Client3 {
        Client3::connect(self.world.address(), &self.certificate, transport).unwrap()
    }
}

fn config(certificate: &CertificateDer<'static>, transport: TransportConfig) -> ClientConfig {
    let mut roots = RootCertStore::empty();
    roots.add(certificate.clone()).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut tls = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    tls.alpn_protocols = vec![b"h3".to_vec()];
    let mut config = ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls).unwrap()));
    config.transport_config(Arc::new(transport));
    config
}

/// A request by hand, for what `h3`'s client cannot or would not send.
pub(crate) struct Raw3 {
    pub(crate) send: quinn::SendStream,
    pub(crate) receive: quinn::RecvStream,
}

/// HEADERS with these fields, as literals (RFC 9204, section 4.5.6).
pub(crate) fn headers(fields: &[(&str, &str)]) -> Vec<u8> {
    let mut block = vec![0, 0];
    for (name, value) in fields {
        integer(&mut block, 0x20, 3, name.len());
        block.extend(name.as_bytes());
        integer(&mut block, 0, 7, value.len());
        block.extend(value.as_bytes());
    }
    frame(1, &block)
}

/// A frame with the longer of the two usual lengths.
pub(crate) fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap() | 0x8000_0000;
    [&[kind], &length.to_be_bytes()[..], payload].concat()
}

/// An integer behind a prefix of so many bits (section 4.1.1).
fn integer(block: &mut Vec<u8>, first: u8, bits: u32, number: usize) {
    let most = (1_usize << bits) - 1;
    block.push(first | u8::try_from(number.min(most)).unwrap());
    let mut left = match number.checked_sub(most) {
        Some(left) => left,
        None => return,
    };
    while left >= 128 {
        block.push(u8::try_from(left % 128).unwrap() | 128);
        left /= 128;
    }
    block.push(u8::try_from(left).unwrap());
}

impl Client3 {
    /// A request of exactly these bytes.
    pub(crate) fn raw(&self, bytes: &[u8]) -> Raw3 {
        self.wait(async {
            let (mut send, receive) = self.connection.open_bi().await.unwrap();
            send.write_all(bytes).await.unwrap();
            Raw3 { send, receive }
        })
    }

    /// The next frame of an answer, its kind first; none at its end.
    pub(crate) fn frame(&self, raw: &mut Raw3) -> Option<(u8, Vec<u8>)> {
        self.wait(async {
            let mut kind = [0];
            raw.receive.read_exact(&mut kind).await.ok()?;
            let mut length = vec![0];
            raw.receive.read_exact(&mut length).await.unwrap();
            length.resize(1 << (length[0] >> 6), 0);
            raw.receive.read_exact(&mut length[1..]).await.unwrap();
            length[0] &= 0x3f;
            let count = length
                .iter()
                .fold(0, |sum, byte| sum << 8 | usize::from(*byte));
            let mut payload = vec![0; count];
            raw.receive.read_exact(&mut payload).await.unwrap();
            Some((kind[0], payload))
        })
    }

    pub(crate) fn connect(
        address: SocketAddr,
        certificate: &CertificateDer<'static>,
        transport: TransportConfig,
    ) -> Result<Self, quinn::ConnectionError> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let config = config(certificate, transport);
        let connected = runtime.block_on(async {
            let endpoint = Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
            let connecting = endpoint.connect_with(config, address, NAME).unwrap();
            let connected = tokio::time::timeout(PATIENCE, connecting).await;
            let connection = connected.expect("no handshake came about")?;
            let wire = h3_quinn::Connection::new(connection.clone());
            // It may have been let in and closed again before it could say anything.
            let Ok((driver, send)) = h3::client::new(wire).await else {
                return Err(connection.closed().await);
            };
            Ok::<_, quinn::ConnectionError>((endpoint, connection, driver, send))
        });
        let (endpoint, connection, mut driver, send) = connected?;
        let driver = runtime
            .spawn(async move { std::future::poll_fn(|context| driver.poll_close(context)).await });
        Ok(Self {
            runtime,
            endpoint,
            connection,
            send,
            driver: Some(driver),
        })
    }

    pub(crate) fn wait<T>(&self, future: impl Future<Output = T>) -> T {
        let limited = async { tokio::time::timeout(PATIENCE, future).await };
        self.runtime.block_on(limited).expect("it never came")
    }

    pub(crate) fn send(&mut self, request: Request<()>) -> Stream3 {
        let limit = PATIENCE;
        let sending = async { tokio::time::timeout(limit, self.send.send_request(request)).await };
        self.runtime.block_on(sending).unwrap().unwrap()
    }

    pub(crate) fn begin(&mut self, method: Method, path: &str) -> Stream3 {
        let request = Request::builder()
            .method(method)
            .uri(format!("https://{NAME}{path}"));
        self.send(request.body(()).unwrap())
    }

    pub(crate) fn get(&mut self, path: &str) -> Stream3 {
        let mut stream = self.begin(Method::GET, path);
        self.wait(stream.finish()).unwrap();
        stream
    }

    pub(crate) fn post(&mut self, path: &str, body: &str) -> Stream3 {
        let mut stream = self.begin(Method::POST, path);
        self.data(&mut stream, body);
        self.wait(stream.finish()).unwrap();
        stream
    }

    pub(crate) fn data(&self, stream: &mut Stream3, data: &str) {
        let data = Bytes::copy_from_slice(data.as_bytes());
        self.wait(stream.send_data(data)).unwrap();
    }

    pub(crate) fn whole(&self, mut stream: Stream3) -> Result<Answer3, StreamError> {
        self.wait(async {
            let (head, ()) = stream.recv_response().await?.into_parts();
            let mut body = BytesMut::new();
            while let Some(mut data) = stream.recv_data().await? {
                body.extend_from_slice(&data.copy_to_bytes(data.remaining()));
            }
            let trailer = stream.recv_trailers().await?;
            Ok(Answer3 {
                status: head.status.as_u16(),
                fields: head.headers,
                body: body.freeze(),
                trailer,
            })
        })
    }

    pub(crate) fn answer(&self, stream: Stream3) -> Answer3 {
        self.whole(stream).unwrap()
    }

    /// Goes on from another port, as after a NAT has forgotten it.
    pub(crate) fn move_away(&self) {
        let _inside = self.runtime.enter();
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        self.endpoint.rebind(socket).unwrap();
    }

    /// Waits for the end of the connection.
    pub(crate) fn end(&mut self) -> ConnectionError {
        let driver = self.driver.take().unwrap();
        self.wait(driver).unwrap()
    }

    /// Closes the connection, and returns once that has been sent.
    pub(crate) fn leave(self) {
        self.connection.close(0_u32.into(), b"");
        self.wait(self.endpoint.wait_idle());
    }

    /// Looks at the connection's statistics until they are as wanted: quinn tells nobody when they change.
    pub(crate) fn until(&self, wanted: impl Fn(&quinn::ConnectionStats) -> bool) {
        self.wait(async {
            while !wanted(&self.connection.stats()) {
                tokio::time::sleep(std::time::Duration::from_millis(2)).await;
            }
        });
    }
}

/// Begins a handshake that nobody goes on with: the first packet of a client is sent from the socket returned, once it
/// has been answered.
pub(crate) fn begin_handshake(
    address: SocketAddr,
    certificate: &CertificateDer<'static>,
) -> UdpSocket {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();
    let mut packet = [0; 2048];
    let (count, client) = {
        let _inside = runtime.enter();
        let endpoint = Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
        let config = config(certificate, TransportConfig::default());
        let to = socket.local_addr().unwrap();
        let _connecting = endpoint.connect_with(config, to, NAME).unwrap();
        socket.recv_from(&mut packet).unwrap()
    };
    socket.send_to(&packet[..count], address).unwrap();
    while socket.recv_from(&mut packet).unwrap().1 == client {}
    socket
}

/// The whole answer to one GET over TLS and HTTP/1.1.
pub(crate) fn tls_get(address: SocketAddr, certificate: &CertificateDer<'static>) -> String {
    let mut roots = RootCertStore::empty();
    roots.add(certificate.clone()).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let name = NAME.try_into().unwrap();
    let session = rustls::ClientConnection::new(Arc::new(config), name).unwrap();
    let socket = TcpStream::connect(address).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut stream = rustls::StreamOwned::new(session, socket);
    let request = format!("GET / HTTP/1.1\r\nHost: {NAME}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}
