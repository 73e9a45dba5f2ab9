//! TLS as clients meet it: which certificate they see, what they have to show, what they can take up again.

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use hopgate_proxy::Proxy;
use hopgate_proxy::config::Config;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, CertifiedIssuer, DnType,
    IsCa, KeyPair,
};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{
    ClientConfig, ClientConnection, DigitallySignedStruct, HandshakeKind, RootCertStore,
    ServerConfig, SignatureScheme, StreamOwned, SupportedProtocolVersion,
};
use tempfile::TempDir;

use crate::world::{Origin, PATIENCE, World};

/// Somebody who signs certificates.
pub(crate) struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    pub(crate) fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params
            .distinguished_name
            .push(DnType::CommonName, "authority");
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    pub(crate) fn pem(&self) -> String {
        self.0.pem()
    }

    /// A certificate for these names, and its key.
    pub(crate) fn signs(&self, names: &[&str]) -> (String, String) {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let mut params = CertificateParams::new(names.clone()).unwrap();
        params
            .distinguished_name
            .push(DnType::CommonName, names[0].clone());
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.0).unwrap();
        (certificate.pem(), key.serialize_pem())
    }

    /// A server with such a certificate.
    pub(crate) fn server(&self, names: &[&str]) -> Arc<ServerConfig> {
        let (chain, key) = self.signs(names);
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(
                vec![CertificateDer::from_pem_slice(chain.as_bytes()).unwrap()],
                PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap(),
            )
            .unwrap();
        Arc::new(config)
    }

    /// A certificate, begun a while ago and good for a while.
    pub(crate) fn signs_until(
        &self,
        names: &[&str],
        age: Duration,
        left: Duration,
    ) -> (String, String) {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let mut params = CertificateParams::new(names).unwrap();
        let now = SystemTime::now();
        params.not_before = (now - age).into();
        params.not_after = (now + left).into();
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.0).unwrap();
        (certificate.pem(), key.serialize_pem())
    }

    /// What was asked for, as it was asked for.
    pub(crate) fn signs_request(&self, request: CertificateSigningRequestParams) -> String {
        request.signed_by(&self.0).unwrap().pem()
    }

    pub(crate) fn writes(&self, folder: &Path, name: &str, names: &[&str]) {
        let (chain, key) = self.signs(names);
        // The old pair is whole until both new files are there.
        std::fs::write(folder.join(format!("{name}.key.new")), key).unwrap();
        std::fs::write(folder.join(format!("{name}.pem.new")), chain).unwrap();
        for end in ["key", "pem"] {
            let file = folder.join(format!("{name}.{end}"));
            std::fs::rename(folder.join(format!("{name}.{end}.new")), file).unwrap();
        }
    }

    fn roots(&self) -> RootCertStore {
        let mut roots = RootCertStore::empty();
        roots.add(self.0.der().clone()).unwrap();
        roots
    }
}

/// A proxy with one TLS listener, whose profile is `profile`, in front of an origin.
pub(crate) fn start(folder: TempDir, profile: &str, address: SocketAddr) -> World {
    let text = format!(
        "state_dir = \"state\"\ncontrol = \"control.sock\"\nworkers = 1\n[[tls]]\nname = \"public\"\n{profile}\n\
         [[service]]\nname = \"web\"\nsource = \"{address}\"\ntarget = \"{address}\"\n\
         [[service.listen]]\naddress = \"127.0.0.1:0\"\ntls = \"public\"\n"
    );
    let path = folder.path().join("proxy.toml");
    std::fs::write(&path, text).unwrap();
    let proxy = Proxy::start(&Config::load(&path).unwrap()).unwrap();
    World {
        proxy: Some(proxy),
        folder,
    }
}

/// A folder in which the authority has put a certificate `a` for `names`.
pub(crate) fn folder(authority: &Authority, names: &[&str]) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    authority.writes(folder.path(), "a", names);
    folder
}

pub(crate) const ONE: &str = "certificates = [{ chain = \"a.pem\", key = \"a.key\" }]";

/// Verifies as usual and notes what it saw.
#[derive(Debug)]
struct Witness {
    verifier: Arc<WebPkiServerVerifier>,
    seen: Mutex<Option<(CertificateDer<'static>, Vec<u8>)>>,
}

impl ServerCertVerifier for Witness {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        chain: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        *self.seen.lock().unwrap() = Some((certificate.clone().into_owned(), ocsp.to_vec()));
        self.verifier
            .verify_server_cert(certificate, chain, name, &[], now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.verifier
            .verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.verifier
            .verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.verifier.supported_verify_schemes()
    }
}

/// A browser, as far as TLS goes.
pub(crate) struct Browser {
    config: Arc<ClientConfig>,
    witness: Arc<Witness>,
}

/// One of its connections.
pub(crate) struct Visit(BufReader<StreamOwned<ClientConnection, TcpStream>>);

impl Browser {
    pub(crate) fn trusting(authority: &Authority) -> Self {
        Self::with(authority, rustls::ALL_VERSIONS, None)
    }

    fn with(
        authority: &Authority,
        versions: &[&'static SupportedProtocolVersion],
        own: Option<(String, String)>,
    ) -> Self {
        use rustls::pki_types::pem::PemObject;
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let roots = Arc::new(authority.roots());
        let verifier =
            WebPkiServerVerifier::builder_with_provider(roots, Arc::clone(&provider)).build();
        let witness = Arc::new(Witness {
            verifier: verifier.unwrap(),
            seen: Mutex::new(None),
        });
        let builder = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(versions)
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(Arc::clone(&witness) as Arc<_>);
        let config = match own {
            None => builder.with_no_client_auth(),
            Some((chain, key)) => builder
                .with_client_auth_cert(
                    vec![CertificateDer::from_pem_slice(chain.as_bytes()).unwrap()],
                    PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap(),
                )
                .unwrap(),
        };
        Self {
            config: Arc::new(config),
            witness,
        }
    }

    /// A connection on which nothing has been said.
    pub(crate) fn connect(
        &self,
        address: SocketAddr,
        host: &str,
    ) -> StreamOwned<ClientConnection, TcpStream> {
        let name = ServerName::try_from(host.to_owned()).unwrap();
        let session = ClientConnection::new(Arc::clone(&self.config), name).unwrap();
        let socket = TcpStream::connect(address).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        StreamOwned::new(session, socket)
    }

    /// A connection on which one request has been answered, or why there is none.
    pub(crate) fn visit(&self, address: SocketAddr, host: &str) -> Result<Visit, String> {
        let mut visit = Visit(BufReader::new(self.connect(address, host)));
        visit.get("/").map(|_| visit)
    }

    /// The same without sessions to take up again: those show no certificate.
    fn without_memory(&self) -> Self {
        let mut config = ClientConfig::clone(&self.config);
        config.resumption = Resumption::disabled();
        Self {
            config: Arc::new(config),
            witness: Arc::clone(&self.witness),
        }
    }

    /// The certificate it was shown last.
    fn saw(&self) -> CertificateDer<'static> {
        self.witness.seen.lock().unwrap().clone().unwrap().0
    }
}

impl Visit {
    fn get(&mut self, path: &str) -> Result<String, String> {
        self.say(&format!("GET {path} HTTP/1.1\r\nHost: h\r\n\r\n"))?;
        self.body()
    }

    fn say(&mut self, text: &str) -> Result<(), String> {
        let written = self.0.get_mut().write_all(text.as_bytes());
        written.map_err(|error| error.to_string())
    }

    fn body(&mut self) -> Result<String, String> {
        let mut length = 0;
        loop {
            let mut line = String::new();
            let read = self.0.read_line(&mut line);
            match read.map_err(|error| error.to_string())? {
                0 => return Err("closed".to_owned()),
                2 => break,
                _ => {}
            }
            if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                length = value.trim().parse().unwrap();
            }
        }
        let mut body = vec![0; length];
        self.0.read_exact(&mut body).unwrap();
        Ok(String::from_utf8(body).unwrap())
    }

    fn kind(&self) -> HandshakeKind {
        self.0.get_ref().conn.handshake_kind().unwrap()
    }
}

#[test]
fn the_certificate_is_that_of_the_name_or_of_the_wildcard_above_it_or_else_the_first() {
    let authority = Authority::new();
    let folder = folder(&authority, &["first.example"]);
    std::fs::create_dir(folder.path().join("more")).unwrap();
    for (name, names) in [
        ("b", &["site.example", "www.site.example"][..]),
        ("c", &["*.site.example"]),
    ] {
        authority.writes(&folder.path().join("more"), name, names);
    }
    let origin = Origin::new("source");
    let world = start(
        folder,
        &format!("{ONE}\nfolder = \"more\""),
        origin.address(),
    );
    let browser = Browser::trusting(&authority);
    let mut seen = Vec::new();
    for host in [
        "first.example",
        "www.site.example",
        "any.site.example",
        "SITE.example",
    ] {
        browser
            .visit(world.address(), host)
            .unwrap_or_else(|error| panic!("{host}: {error}"));
        seen.push(browser.saw());
    }
    // Verification says that the names fit; here is that no other certificate would have fitted, too.
    assert_eq!(seen[1], seen[3]);
    assert_ne!(seen[1], seen[2]);
    for host in ["other.example", "two.labels.site.example"] {
        let refused = browser.visit(world.address(), host).err().unwrap();
        assert!(refused.contains("not valid for name"), "{refused}");
        assert_eq!(browser.saw(), seen[0], "{host}");
    }
}

#[test]
fn a_replaced_certificate_is_shown_to_new_connections_while_old_ones_go_on() {
    let authority = Authority::new();
    let origin = Origin::new("source");
    let world = start(folder(&authority, &["site.example"]), ONE, origin.address());
    let browser = Browser::trusting(&authority);
    let mut old = browser.visit(world.address(), "site.example").unwrap();
    let first = browser.saw();
    authority.writes(world.folder.path(), "a", &["site.example"]);
    until_shown(&browser, &world, |certificate| *certificate != first);
    assert_eq!(old.get("/old").unwrap(), "source GET /old");
}

/// Comes again and again until the certificate is as wanted.
fn until_shown(browser: &Browser, world: &World, wanted: impl Fn(&CertificateDer<'_>) -> bool) {
    let begun = std::time::Instant::now();
    loop {
        let fresh = browser.without_memory();
        fresh.visit(world.address(), "site.example").unwrap();
        if wanted(&fresh.saw()) {
            return;
        }
        assert!(begun.elapsed() < PATIENCE, "never so");
    }
}

#[test]
fn a_broken_replacement_leaves_the_former_certificate_and_does_not_stop_others() {
    let authority = Authority::new();
    let folder = folder(&authority, &["other.example"]);
    authority.writes(folder.path(), "b", &["site.example"]);
    let origin = Origin::new("source");
    let both = "certificates = [{ chain = \"a.pem\", key = \"a.key\" }, { chain = \"b.pem\", key = \"b.key\" }]";
    let world = start(folder, both, origin.address());
    let browser = Browser::trusting(&authority);
    browser.visit(world.address(), "other.example").unwrap();
    let (former, other_key) = (browser.saw(), authority.signs(&["other.example"]).1);
    browser.visit(world.address(), "site.example").unwrap();
    let replaced = browser.saw();
    // A key of another certificate. Both changes are found by one look.
    std::fs::write(world.folder.path().join("a.key"), other_key).unwrap();
    authority.writes(world.folder.path(), "b", &["site.example"]);
    until_shown(&browser, &world, |certificate| *certificate != replaced);
    let fresh = browser.without_memory();
    fresh.visit(world.address(), "other.example").unwrap();
    assert_eq!(fresh.saw(), former);
}

#[test]
fn a_proxy_does_not_start_with_a_certificate_it_cannot_use() {
    let authority = Authority::new();
    let folder = folder(&authority, &["site.example"]);
    authority.writes(folder.path(), "b", &["site.example"]);
    let origin = Origin::new("source").address();
    for (profile, said) in [
        (
            "certificates = [{ chain = \"a.pem\", key = \"b.key\" }]",
            "is not the one of the certificate in",
        ),
        (
            "certificates = [{ chain = \"c.pem\", key = \"a.key\" }]",
            "c.pem: No such file or directory (os error 2); check that it is there",
        ),
        (
            "certificates = [{ chain = \"a.key\", key = \"a.key\" }]",
            "a.key holds no certificate",
        ),
        (
            "certificates = [{ chain = \"a.pem\", key = \"a.pem\" }]",
            "a.pem holds no private key",
        ),
        ("folder = \"none\"", "none: No such file"),
    ] {
        let text = format!(
            "state_dir = \"state\"\ncontrol = \"control.sock\"\n[[tls]]\nname = \"public\"\n{profile}\n[[service]]\n\
             name = \"web\"\nlisten = \"127.0.0.1:0\"\nsource = \"{origin}\"\ntarget = \"{origin}\"\n"
        );
        let path = folder.path().join("proxy.toml");
        std::fs::write(&path, text).unwrap();
        let error = Proxy::start(&Config::load(&path).unwrap())
            .unwrap_err()
            .to_string();
        assert!(error.contains(said), "{error}");
    }
}

#[test]
fn a_client_without_the_right_certificate_is_refused_where_one_is_required() {
    let (authority, clients) = (Authority::new(), Authority::new());
    let origin = Origin::new("source");
    for (demand, without) in [("required", Err(())), ("optional", Ok(()))] {
        let folder = folder(&authority, &["site.example"]);
        std::fs::write(folder.path().join("clients.pem"), clients.pem()).unwrap();
        let profile = format!(
            "{ONE}\nclient_ca = \"clients.pem\"\nclient_certificates = \"{demand}\"\nticket_keys = \"keys\""
        );
        std::fs::write(folder.path().join("keys"), "a".repeat(64)).unwrap();
        let world = start(folder, &profile, origin.address());
        let visit = |own| {
            let browser = Browser::with(&authority, rustls::ALL_VERSIONS, own);
            browser.visit(world.address(), "site.example").map(drop)
        };
        assert_eq!(visit(Some(clients.signs(&["alice"]))), Ok(()));
        let stranger = visit(Some(authority.signs(&["mallory"]))).unwrap_err();
        assert!(stranger.contains("alert"), "{stranger}");
        assert_eq!(visit(None).map_err(drop), without, "{demand}");
    }
}

#[test]
fn a_profile_speaks_no_version_older_than_its_least() {
    let authority = Authority::new();
    let origin = Origin::new("source");
    let old = Browser::with(&authority, &[&rustls::version::TLS12], None);
    let any = start(folder(&authority, &["site.example"]), ONE, origin.address());
    old.visit(any.address(), "site.example").unwrap();
    let profile = format!("{ONE}\nversions_min = \"1.3\"");
    let new = start(
        folder(&authority, &["site.example"]),
        &profile,
        origin.address(),
    );
    let refused = old.visit(new.address(), "site.example").err().unwrap();
    assert!(refused.contains("ProtocolVersion"), "{refused}");
    let browser = Browser::trusting(&authority);
    browser.visit(new.address(), "site.example").unwrap();
}

#[test]
fn a_session_is_taken_up_by_another_proxy_with_the_same_key_file_and_by_none_after_a_rotation() {
    let authority = Authority::new();
    let origin = Origin::new("source");
    let profile = format!("{ONE}\nticket_keys = \"keys\"");
    let one = |key: &str| {
        let folder = folder(&authority, &["site.example"]);
        std::fs::write(folder.path().join("keys"), key.repeat(64)).unwrap();
        start(folder, &profile, origin.address())
    };
    for versions in [[&rustls::version::TLS13], [&rustls::version::TLS12]] {
        let (ours, theirs, rotated) = (one("a"), one("a"), one("b"));
        let browser = Browser::with(&authority, &versions, None);
        let kind = |world: &World| {
            let visit = browser.visit(world.address(), "site.example").unwrap();
            visit.kind()
        };
        assert_eq!(kind(&ours), HandshakeKind::Full);
        assert_eq!(kind(&theirs), HandshakeKind::Resumed);
        assert_eq!(kind(&rotated), HandshakeKind::Full);
        assert_eq!(kind(&theirs), HandshakeKind::Full);
        assert_eq!(kind(&ours), HandshakeKind::Resumed);
    }
}

#[test]
fn a_stapled_answer_reaches_the_client_byte_for_byte() {
    let authority = Authority::new();
    let folder = folder(&authority, &["site.example"]);
    std::fs::write(folder.path().join("a.ocsp"), [48, 3, 10, 1, 0]).unwrap();
    let origin = Origin::new("source");
    let world = start(folder, "folder = \".\"", origin.address());
    let browser = Browser::trusting(&authority);
    browser.visit(world.address(), "site.example").unwrap();
    let (_, ocsp) = browser.witness.seen.lock().unwrap().clone().unwrap();
    assert_eq!(ocsp, [48, 3, 10, 1, 0]);
}

#[test]
fn a_request_held_behind_tls_is_answered_after_the_release() {
    let authority = Authority::new();
    let origin = Origin::new("source");
    let world = start(folder(&authority, &["site.example"]), ONE, origin.address());
    let browser = Browser::trusting(&authority);
    let mut visit = browser.visit(world.address(), "site.example").unwrap();
    world.hold();
    visit
        .say("POST /held HTTP/1.1\r\nHost: h\r\nContent-Length: 4\r\n\r\nbody")
        .unwrap();
    world.until_held(1);
    world.reopen();
    assert_eq!(visit.body().unwrap(), "source POST /held body");
}

#[test]
fn a_client_in_clear_is_closed_on_by_a_tls_listener() {
    let authority = Authority::new();
    let origin = Origin::new("source");
    let world = start(folder(&authority, &["site.example"]), ONE, origin.address());
    let mut socket = TcpStream::connect(world.address()).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
        .write_all(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
        .unwrap();
    let mut answer = Vec::new();
    match socket.read_to_end(&mut answer) {
        // An alert at most, and no HTTP.
        Ok(_) => assert!(!answer.starts_with(b"HTTP"), "{answer:?}"),
        Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset),
    }
    assert_eq!(origin.connections(), 0);
}

#[test]
fn http2_is_agreed_on_by_alpn_and_http1_with_whoever_does_not_know_it() {
    let authority = Authority::new();
    let origin = Origin::new("source");
    let world = start(folder(&authority, &["site.example"]), ONE, origin.address());
    for (offered, agreed) in [
        (&[&b"h2"[..], b"http/1.1"][..], Some(&b"h2"[..])),
        (&[b"http/1.1", b"h2"], Some(b"h2")),
        (&[b"http/1.1"], Some(b"http/1.1")),
        (&[], None),
    ] {
        let mut browser = Browser::trusting(&authority);
        let config = Arc::make_mut(&mut browser.config);
        config.alpn_protocols = offered.iter().map(|name| name.to_vec()).collect();
        let mut stream = browser.connect(world.address(), "site.example");
        let is_http2 = agreed == Some(b"h2");
        if is_http2 {
            // SETTINGS, and GET / with the authority "h".
            stream
                .write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
                .unwrap();
            stream.write_all(&[0, 0, 0, 4, 0, 0, 0, 0, 0]).unwrap();
            stream
                .write_all(&[0, 0, 6, 1, 5, 0, 0, 0, 1, 0x82, 0x84, 0x87, 0x01, 1, b'h'])
                .unwrap();
        } else {
            stream
                .write_all(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
                .unwrap();
        }
        let mut answer = Vec::new();
        while !answer.ends_with(b"source GET /") {
            let mut byte = [0];
            stream.read_exact(&mut byte).unwrap();
            answer.extend(byte);
        }
        assert_eq!(stream.conn.alpn_protocol(), agreed);
        assert_eq!(answer.starts_with(b"HTTP/1.1 200 OK"), !is_http2);
    }
}
