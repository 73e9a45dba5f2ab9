//! A connection to the proxy, in clear text or through TLS. It never blocks.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SocketFlags, SocketType, connect, recv, socket_with, sockopt,
};
use rustls::ClientConnection;
use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::aws_lc_rs::{cipher_suite, default_provider, kx_group};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, SignatureScheme};

use crate::bench::client::answer::Fault;
use crate::bench::origin::content::Content;

/// One connection.
#[derive(Debug)]
pub enum Channel {
    /// Plain TCP.
    Clear(TcpStream),
    /// TLS over TCP.
    Tls(Box<Tls>),
}

/// TLS over TCP.
#[derive(Debug)]
pub struct Tls {
    stream: TcpStream,
    session: ClientConnection,
}

impl Channel {
    /// Begins to connect; sends and reads answer [`ErrorKind::WouldBlock`] until that is done.
    ///
    /// # Errors
    /// When the kernel refuses at once, or TLS cannot be set up.
    pub fn open(address: SocketAddr, tls: Option<&Arc<ClientConfig>>) -> Result<Self, Fault> {
        let family = match address {
            SocketAddr::V4(_) => AddressFamily::INET,
            SocketAddr::V6(_) => AddressFamily::INET6,
        };
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket =
            socket_with(family, SocketType::STREAM, flags, None).map_err(io::Error::from)?;
        sockopt::set_tcp_nodelay(&socket, true).map_err(io::Error::from)?;
        match connect(&socket, &address) {
            Ok(()) | Err(Errno::INPROGRESS) => {}
            Err(errno) => return Err(Fault::Io(errno.into())),
        }
        let stream = TcpStream::from(socket);
        let Some(config) = tls else {
            return Ok(Self::Clear(stream));
        };
        let name = ServerName::try_from("bench.test").map_err(|_| Fault::Malformed)?;
        let session = ClientConnection::new(Arc::clone(config), name)?;
        Ok(Self::Tls(Box::new(Tls { stream, session })))
    }

    /// The socket.
    #[must_use]
    pub const fn stream(&self) -> &TcpStream {
        match self {
            Self::Clear(stream) => stream,
            Self::Tls(tls) => &tls.stream,
        }
    }

    /// Sends what the kernel takes of `bytes`, and says how many.
    ///
    /// # Errors
    /// [`ErrorKind::WouldBlock`] when it takes none now; anything else is the end of the connection.
    pub fn send(&mut self, bytes: &[u8]) -> Result<usize, Fault> {
        match self {
            Self::Clear(stream) => Ok(stream.write(bytes)?),
            Self::Tls(tls) => {
                let taken = tls.session.writer().write(bytes)?;
                tls.flush()?;
                if taken == 0 {
                    return Err(Fault::Io(ErrorKind::WouldBlock.into()));
                }
                Ok(taken)
            }
        }
    }

    /// Sends up to `count` bytes of `content`.
    ///
    /// # Errors
    /// As [`Self::send`].
    pub fn send_content(&mut self, content: &Content, count: u64) -> Result<usize, Fault> {
        match self {
            Self::Clear(stream) => Ok(content.send(&*stream, count)?),
            Self::Tls(_) => {
                let piece = [b'x'; 4096];
                let length = usize::try_from(count)
                    .unwrap_or(usize::MAX)
                    .min(piece.len());
                self.send(&piece[..length])
            }
        }
    }

    /// Reads what is there; 0 is the end of the connection.
    ///
    /// # Errors
    /// As [`Self::send`].
    pub fn read(&mut self, buffer: &mut [u8]) -> Result<usize, Fault> {
        match self {
            Self::Clear(stream) => Ok(stream.read(buffer)?),
            Self::Tls(tls) => tls.read(buffer),
        }
    }

    /// Throws away up to `count` bytes, but no more than `buffer` has, without copying them if possible.
    ///
    /// # Errors
    /// As [`Self::send`].
    pub fn discard(&mut self, buffer: &mut [u8], count: u64) -> Result<usize, Fault> {
        let length = usize::try_from(count)
            .unwrap_or(usize::MAX)
            .min(buffer.len());
        match self {
            // TCP counts truncated bytes as read and does not copy them (tcp(7)).
            Self::Clear(stream) => {
                let (_, count) = recv(&*stream, &mut buffer[..length], RecvFlags::TRUNC)
                    .map_err(io::Error::from)?;
                Ok(count)
            }
            Self::Tls(tls) => tls.read(&mut buffer[..length]),
        }
    }
}

impl Tls {
    fn flush(&mut self) -> Result<(), Fault> {
        while self.session.wants_write() {
            match self.session.write_tls(&mut self.stream) {
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn read(&mut self, buffer: &mut [u8]) -> Result<usize, Fault> {
        loop {
            self.flush()?;
            match self.session.reader().read(buffer) {
                Ok(count) => return Ok(count),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => return Err(error.into()),
            }
            if self.session.read_tls(&mut self.stream)? == 0 {
                return Ok(0);
            }
            self.session.process_new_packets()?;
        }
    }
}

/// TLS 1.3 with one cipher suite and one group, so that every proxy does the same arithmetic, and no resumption.
///
/// # Errors
/// When the cryptographic library has none of that.
pub fn tls_config() -> Result<Arc<ClientConfig>, Fault> {
    let mut provider = default_provider();
    provider.cipher_suites = vec![cipher_suite::TLS13_AES_128_GCM_SHA256];
    provider.kx_groups = vec![kx_group::X25519];
    let mut config = ClientConfig::builder_with_provider(Arc::new(provider))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Unverified))
        .with_no_client_auth();
    config.resumption = Resumption::disabled();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

/// Believes every certificate: the lab made it a moment ago, and the client's share of a handshake must stay small.
#[derive(Debug)]
struct Unverified;

impl ServerCertVerifier for Unverified {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ECDSA_NISTP256_SHA256]
    }
}
