//! From a fresh socket to an established session: rustls shakes hands, we carry the bytes.
//!
//! Bounded in time by the caller and in bytes by rustls. Buffers live only as long as the handshake.

use std::cell::RefCell;
use std::future::poll_fn;
use std::io::{self, IoSlice};

use rustls::client::{ClientConnectionData, UnbufferedClientConnection};
use rustls::pki_types::CertificateDer;
use rustls::server::{ServerConnectionData, UnbufferedServerConnection};
use rustls::unbuffered::{ConnectionState, EncodeError, EncodeTlsData, UnbufferedStatus};
use rustls::{CommonState, HandshakeKind, ProtocolVersion};

use super::SessionError;
use super::record::HEADER_BYTES;
use super::session::{Keys, Session};
use crate::stream::Socket;

/// A whole flight of most peers.
const READ_BYTES: usize = 4096;
/// More than any flight with client certificates; rustls bounds each message to 64 KiB itself.
const INCOMING_BYTES_MAX: usize = 128 * 1024;

thread_local! {
    /// The name that the client hello named which the certificate resolver of this thread saw last. rustls calls
    /// the resolver while it processes a hello, and this kind of connection does not keep the name.
    static NAMED: RefCell<Option<Box<str>>> = const { RefCell::new(None) };
}

/// To be called by certificate resolvers.
pub(super) fn note_server_name(name: Option<&str>) {
    NAMED.set(name.map(Box::from));
}

/// What both sides settled on.
#[derive(Debug, Clone)]
pub(crate) struct Agreed {
    /// The application protocol, if one was negotiated.
    pub(crate) protocol: Option<Box<[u8]>>,
    /// The name the client asked for; none on connections to upstreams.
    pub(crate) server_name: Option<Box<str>>,
    /// The peer's own certificate, if it showed one.
    pub(crate) certificate: Option<CertificateDer<'static>>,
    /// TLS 1.2 or 1.3.
    pub(crate) version: ProtocolVersion,
    /// Whether an earlier session was taken up again.
    pub(crate) resumed: bool,
}

/// What a handshake leaves behind.
pub(super) struct Shaken {
    pub(super) session: Session,
    pub(super) agreed: Agreed,
    /// Records received and not opened.
    pub(super) incoming: Vec<u8>,
    /// Data that came with the end of the handshake.
    pub(super) plain: Vec<u8>,
    /// Our last flight, not sent: it goes out with the first data, or when somebody waits for the peer.
    pub(super) outgoing: Vec<u8>,
}

/// Whether a handshake needs the peer to go on.
#[derive(Debug, PartialEq, Eq)]
enum Stage {
    Waiting,
    Done,
}

/// One side of a handshake.
pub(super) trait Side: Sized {
    type Data;

    fn process<'c, 'i>(
        &'c mut self,
        incoming: &'i mut [u8],
    ) -> UnbufferedStatus<'c, 'i, Self::Data>;

    fn common(&self) -> &CommonState;

    fn into_session(self) -> Result<Session, SessionError>;
}

impl Side for UnbufferedServerConnection {
    type Data = ServerConnectionData;

    fn process<'c, 'i>(
        &'c mut self,
        incoming: &'i mut [u8],
    ) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(incoming)
    }

    fn common(&self) -> &CommonState {
        self
    }

    fn into_session(self) -> Result<Session, SessionError> {
        let (secrets, keys) = self.dangerous_into_kernel_connection()?;
        Session::new(Keys::Server(keys), secrets)
    }
}

impl Side for UnbufferedClientConnection {
    type Data = ClientConnectionData;

    fn process<'c, 'i>(
        &'c mut self,
        incoming: &'i mut [u8],
    ) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(incoming)
    }

    fn common(&self) -> &CommonState {
        self
    }

    fn into_session(self) -> Result<Session, SessionError> {
        let (secrets, keys) = self.dangerous_into_kernel_connection()?;
        Session::new(Keys::Client(keys), secrets)
    }
}

#[derive(Debug, Default)]
struct Bytes {
    incoming: Vec<u8>,
    outgoing: Vec<u8>,
    plain: Vec<u8>,
    server_name: Option<Box<str>>,
}

/// Shakes hands over a connected socket.
///
/// # Errors
/// The socket failed, the peer closed, or the two could not agree; the last is a [`SessionError`] inside, and the
/// peer has been told.
pub(super) async fn shake<S: Side>(mut side: S, socket: &Socket) -> io::Result<Shaken> {
    let (mut bytes, mut first) = (Bytes::default(), true);
    loop {
        match advance(&mut side, &mut bytes) {
            Ok(Stage::Done) => break,
            Ok(Stage::Waiting) => {
                send(socket, &mut bytes.outgoing).await?;
                receive(socket, &mut bytes.incoming, &mut first).await?;
            }
            Err(error) => {
                // The peer learns why from the alert, if it still listens.
                send(socket, &mut bytes.outgoing).await.ok();
                return Err(invalid(error));
            }
        }
    }
    let agreed = agreed(side.common(), bytes.server_name.take());
    Ok(Shaken {
        session: side.into_session().map_err(invalid)?,
        agreed,
        incoming: bytes.incoming,
        plain: bytes.plain,
        outgoing: bytes.outgoing,
    })
}

fn agreed(common: &CommonState, server_name: Option<Box<str>>) -> Agreed {
    let certificates = common.peer_certificates().unwrap_or_default();
    Agreed {
        protocol: common.alpn_protocol().map(Box::from),
        server_name,
        certificate: certificates.first().map(|own| own.clone().into_owned()),
        version: common
            .protocol_version()
            .unwrap_or(ProtocolVersion::TLSv1_2),
        resumed: common.handshake_kind() == Some(HandshakeKind::Resumed),
    }
}

/// Lets rustls take what has come and say what is to be sent, until it needs more or is done.
fn advance<S: Side>(side: &mut S, bytes: &mut Bytes) -> Result<Stage, SessionError> {
    let mut failed = None;
    loop {
        NAMED.take();
        // What has come behind the handshake is for the session: data, and perhaps a close or worse right behind it.
        let shakes = side.common().is_handshaking();
        let incoming: &mut [u8] = if shakes { &mut bytes.incoming } else { &mut [] };
        let UnbufferedStatus { discard, state } = side.process(incoming);
        if let Some(name) = NAMED.take() {
            bytes.server_name = Some(name);
        }
        let stage = match state {
            Ok(ConnectionState::EncodeTlsData(mut record)) => {
                encode(&mut record, &mut bytes.outgoing)?;
                None
            }
            Ok(ConnectionState::TransmitTlsData(sent)) => {
                sent.done();
                None
            }
            Ok(ConnectionState::ReadTraffic(mut traffic)) => {
                while let Some(record) = traffic.next_record() {
                    bytes.plain.extend_from_slice(record?.payload);
                }
                None
            }
            Ok(ConnectionState::BlockedHandshake) => Some(Stage::Waiting),
            Ok(ConnectionState::WriteTraffic(_)) => Some(Stage::Done),
            Ok(_) => return Err(SessionError::OutOfPlace),
            // Once more, for the alert.
            Err(error) if failed.is_none() => {
                failed = Some(error);
                None
            }
            Err(error) => return Err(failed.unwrap_or(error).into()),
        };
        bytes.incoming.drain(..discard);
        match (stage, failed.take()) {
            (None, kept) => failed = kept,
            (Some(_), Some(error)) => return Err(error.into()),
            // Half a message was decrypted in place; the rest of it is on its way.
            (Some(Stage::Done), None) if shakes && holds_whole_record(&bytes.incoming) => {
                return Ok(Stage::Waiting);
            }
            (Some(stage), None) => return Ok(stage),
        }
    }
}

fn encode<D>(
    record: &mut EncodeTlsData<'_, D>,
    outgoing: &mut Vec<u8>,
) -> Result<(), SessionError> {
    let start = outgoing.len();
    let needed = match record.encode(&mut []) {
        Err(EncodeError::InsufficientSize(size)) => size.required_size,
        Err(EncodeError::AlreadyEncoded) | Ok(_) => return Ok(()),
    };
    outgoing.resize(start + needed, 0);
    record
        .encode(&mut outgoing[start..])
        .map_err(|_| SessionError::Cipher)?;
    Ok(())
}

fn holds_whole_record(bytes: &[u8]) -> bool {
    let header = bytes.first_chunk::<HEADER_BYTES>();
    header.is_some_and(|header| {
        bytes.len() >= HEADER_BYTES + usize::from(u16::from_be_bytes([header[3], header[4]]))
    })
}

async fn send(socket: &Socket, outgoing: &mut Vec<u8>) -> io::Result<()> {
    let mut from = 0;
    while from < outgoing.len() {
        match socket.try_write(&[IoSlice::new(&outgoing[from..])]) {
            Ok(count) => from += count,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                poll_fn(|context| socket.poll_writable(context)).await?;
            }
            Err(error) => return Err(error),
        }
    }
    outgoing.clear();
    Ok(())
}

/// Reads more of a flight. The first read goes straight to the kernel: a client mostly sends at once, and the reactor
/// has not heard of a socket that is so new.
async fn receive(socket: &Socket, incoming: &mut Vec<u8>, first: &mut bool) -> io::Result<()> {
    let filled = incoming.len();
    if filled > INCOMING_BYTES_MAX {
        return Err(invalid(SessionError::Overlong));
    }
    loop {
        incoming.resize(filled + READ_BYTES, 0);
        let attempt = if std::mem::take(first) {
            socket.read_now(&mut incoming[filled..])
        } else {
            socket.try_read(&mut incoming[filled..])
        };
        incoming.truncate(filled + attempt.as_ref().copied().unwrap_or(0));
        match attempt {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                poll_fn(|context| socket.poll_readable(context)).await?;
            }
            Err(error) => return Err(error),
        }
    }
}

fn invalid(error: impl Into<SessionError>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error.into())
}
