//! An ACME authority (RFC 8555) as strict as a real one: every signature and nonce is checked, a proof is looked for
//! where the world would look for it, and a certificate is signed for nothing but what was proved.

use std::collections::{HashMap, HashSet};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;

use aws_lc_rs::digest::{SHA256, digest};
use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1, ECDSA_P256_SHA256_FIXED, UnparsedPublicKey};
use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD as BASE64;
use rcgen::CertificateSigningRequestParams;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::aws_lc_rs as provider;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{
    ClientConfig, ClientConnection, DigitallySignedStruct, ServerConnection, SignatureScheme,
    StreamOwned,
};
use serde_json::{Value, json};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use crate::tls::Authority;
use crate::world::PATIENCE;

/// The authority and what it remembers.
pub(crate) struct Ca {
    pub(crate) url: String,
    pub(crate) authority: Arc<Authority>,
    shared: Arc<Shared>,
}

struct Shared {
    base: String,
    authority: Arc<Authority>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    nonces: HashSet<String>,
    serial: u64,
    accounts: HashMap<String, Account>,
    orders: HashMap<String, Order>,
    /// Where the world finds the names: port 80 and port 443.
    places: Option<(SocketAddr, SocketAddr)>,
    /// Requests that were not as they should be.
    faults: Vec<String>,
}

#[derive(Clone)]
struct Account {
    key: Vec<u8>,
    thumbprint: String,
}

#[derive(Clone)]
struct Order {
    account: String,
    proofs: Vec<Proof>,
    certificate: Option<String>,
}

#[derive(Clone)]
struct Proof {
    name: String,
    token: String,
    /// `None` while it has not been asked for, then the error, or none.
    outcome: Option<Option<String>>,
}

/// A request whose signature has been verified.
struct Request {
    path: String,
    account: Option<String>,
    jwk: Option<Value>,
    /// Empty for a POST-as-GET.
    payload: Option<Value>,
}

struct Reply {
    status: u16,
    location: Option<String>,
    kind: &'static str,
    body: String,
}

type Stream = BufReader<StreamOwned<ServerConnection, TcpStream>>;

impl Ca {
    pub(crate) fn new() -> Self {
        let authority = Arc::new(Authority::new());
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let base = format!("https://{}", listener.local_addr().unwrap());
        let config = authority.server(&["127.0.0.1"]);
        let url = format!("{base}/directory");
        let shared = Arc::new(Shared {
            base,
            authority: Arc::clone(&authority),
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        let ours = Arc::clone(&shared);
        thread::spawn(move || {
            for socket in listener.incoming() {
                let session = ServerConnection::new(Arc::clone(&config)).unwrap();
                let stream = BufReader::new(StreamOwned::new(session, socket.unwrap()));
                let shared = Arc::clone(&shared);
                thread::spawn(move || shared.serve(stream));
            }
        });
        Self {
            url,
            authority,
            shared: ours,
        }
    }

    /// From now on the names are found there: HTTP and HTTPS. Until then the authority takes its time.
    pub(crate) fn finds(&self, http: SocketAddr, https: SocketAddr) {
        self.shared.state().places = Some((http, https));
        self.shared.changed.notify_all();
    }

    /// Waits until somebody has said that a proof is there.
    pub(crate) fn until_asked(&self) {
        let wanted = |state: &mut State| !state.orders.values().any(Order::is_asked);
        let waited = self
            .shared
            .changed
            .wait_timeout_while(self.shared.state(), PATIENCE, wanted);
        assert!(!waited.unwrap().1.timed_out(), "nobody asks for a proof");
    }

    /// How many accounts and orders there were; nothing about any request may have been wrong.
    pub(crate) fn count(&self) -> (usize, usize) {
        let state = self.shared.state();
        assert_eq!(state.faults, Vec::<String>::new());
        (state.accounts.len(), state.orders.len())
    }
}

impl Order {
    fn is_asked(&self) -> bool {
        self.proofs.iter().any(|proof| proof.outcome.is_some())
    }

    fn status(&self) -> &'static str {
        let failed = |proof: &Proof| matches!(proof.outcome, Some(Some(_)));
        let proved = |proof: &Proof| matches!(proof.outcome, Some(None));
        match &self.certificate {
            Some(_) => "valid",
            None if self.proofs.iter().any(failed) => "invalid",
            None if self.proofs.iter().all(proved) => "ready",
            None => "pending",
        }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    fn fresh(&self, what: &str) -> String {
        let mut state = self.state();
        state.serial += 1;
        format!("{what}-{}", state.serial)
    }

    fn serve(&self, mut stream: Stream) {
        while let Some(reply) = self.next(&mut stream) {
            let nonce = self.fresh("nonce");
            self.state().nonces.insert(nonce.clone());
            let location = reply
                .location
                .map_or_else(String::new, |location| format!("Location: {location}\r\n"));
            let head = format!(
                "HTTP/1.1 {} X\r\nReplay-Nonce: {nonce}\r\n{location}Content-Type: {}\r\nContent-Length: {}\r\n\r\n",
                reply.status,
                reply.kind,
                reply.body.len()
            );
            let whole = head + &reply.body;
            if stream.get_mut().write_all(whole.as_bytes()).is_err() {
                return;
            }
        }
    }

    /// `None` when the client has gone.
    fn next(&self, stream: &mut Stream) -> Option<Reply> {
        let mut line = String::new();
        stream
            .read_line(&mut line)
            .ok()
            .filter(|count| *count > 0)?;
        let mut words = line.split(' ').map(str::to_owned);
        let (method, path) = (words.next()?, words.next()?);
        let (mut length, mut kind) = (0, String::new());
        loop {
            let mut field = String::new();
            stream.read_line(&mut field).ok()?;
            let Some((name, value)) = field.trim_end().split_once(": ") else {
                break;
            };
            match name.to_ascii_lowercase().as_str() {
                "content-length" => length = value.parse().ok()?,
                "content-type" => value.clone_into(&mut kind),
                _ => {}
            }
        }
        let mut body = vec![0; length];
        stream.read_exact(&mut body).ok()?;
        Some(match (method.as_str(), path.as_str()) {
            ("GET", "/directory") => self.directory(),
            ("HEAD", "/new-nonce") => reply(200, json!(null), None).without_body(),
            ("POST", _) if kind == "application/jose+json" => {
                let verified = self.verify(path, &body);
                verified.and_then(|request| self.answer(&request)).unwrap_or_else(|fault| {
                    self.state().faults.push(fault.clone());
                    let problem = json!({"type": "urn:ietf:params:acme:error:malformed", "detail": fault});
                    reply(400, problem, None)
                })
            }
            _ => reply(
                405,
                json!({"detail": format!("{method} {path} {kind}")}),
                None,
            ),
        })
    }

    fn directory(&self) -> Reply {
        let at = |path: &str| format!("{}/{path}", self.base);
        let directory = json!({
            "newNonce": at("new-nonce"), "newAccount": at("new-account"), "newOrder": at("new-order"),
        });
        reply(200, directory, None)
    }

    /// RFC 8555, section 6.
    fn verify(&self, path: String, body: &[u8]) -> Result<Request, String> {
        let jws: Value = serde_json::from_slice(body).map_err(|error| error.to_string())?;
        let part = |name: &str| jws[name].as_str().ok_or(format!("no {name}"));
        let (protected, payload) = (part("protected")?, part("payload")?);
        let header: Value =
            serde_json::from_slice(&decode(protected)?).map_err(|error| error.to_string())?;
        if header["alg"] != "ES256" || header["url"] != format!("{}{path}", self.base) {
            return Err(format!("wrong header {header}"));
        }
        let nonce = header["nonce"].as_str().ok_or("no nonce")?;
        if !self.state().nonces.remove(nonce) {
            return Err(format!("the nonce {nonce} is not mine, or used"));
        }
        let (key, account, jwk) = match (header["jwk"].as_object(), header["kid"].as_str()) {
            (Some(_), None) if path == "/new-account" => (
                public_key(&header["jwk"])?,
                None,
                Some(header["jwk"].clone()),
            ),
            (None, Some(kid)) if path != "/new-account" => {
                let known = self.state().accounts.get(kid).cloned();
                (
                    known.ok_or("unknown account")?.key,
                    Some(kid.to_owned()),
                    None,
                )
            }
            _ => return Err(format!("wrong key in {header}")),
        };
        let signed = format!("{protected}.{payload}");
        UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, key)
            .verify(signed.as_bytes(), &decode(part("signature")?)?)
            .map_err(|_| "wrong signature")?;
        let payload = decode(payload)?;
        let payload = match payload.as_slice() {
            [] => None,
            text => Some(serde_json::from_slice(text).map_err(|error| error.to_string())?),
        };
        Ok(Request {
            path,
            account,
            jwk,
            payload,
        })
    }

    fn answer(&self, request: &Request) -> Result<Reply, String> {
        let path: Vec<&str> = request.path.trim_start_matches('/').split('/').collect();
        match (path.as_slice(), &request.payload) {
            (["new-account"], Some(wish)) => self.new_account(request, wish),
            (["new-order"], Some(wish)) => self.new_order(request, wish),
            (["order", id], None) => Ok(reply(200, self.show(request, id)?, None)),
            (["authorization", id, index], None) => self.authorization(request, id, index),
            (["challenge", id, index, kind], Some(_)) => self.challenge(request, id, index, kind),
            (["finalize", id], Some(wish)) => self.finalize(request, id, wish),
            (["certificate", id], None) => self.certificate(request, id),
            other => Err(format!("no such request: {other:?}")),
        }
    }

    fn new_account(&self, request: &Request, wish: &Value) -> Result<Reply, String> {
        if wish["termsOfServiceAgreed"] != true {
            return Err("terms not agreed to".to_owned());
        }
        let jwk = request.jwk.as_ref().ok_or("no key")?;
        // RFC 7638: the members in this order, without white space.
        let (x, y) = (&jwk["x"], &jwk["y"]);
        let canonical = format!("{{\"crv\":\"P-256\",\"kty\":\"EC\",\"x\":{x},\"y\":{y}}}");
        let thumbprint = BASE64.encode(digest(&SHA256, canonical.as_bytes()));
        let kid = format!("{}/account/{}", self.base, self.fresh("account"));
        let account = Account {
            key: public_key(jwk)?,
            thumbprint,
        };
        self.state().accounts.insert(kid.clone(), account);
        Ok(reply(201, json!({"status": "valid"}), Some(kid)))
    }

    fn new_order(&self, request: &Request, wish: &Value) -> Result<Reply, String> {
        let mut proofs = Vec::new();
        for identifier in wish["identifiers"].as_array().ok_or("no identifiers")? {
            if identifier["type"] != "dns" {
                return Err(format!("not a name: {identifier}"));
            }
            proofs.push(Proof {
                name: identifier["value"].as_str().ok_or("no value")?.to_owned(),
                token: self.fresh("token"),
                outcome: None,
            });
        }
        let id = self.fresh("order");
        let order = Order {
            account: request.account.clone().ok_or("no account")?,
            proofs,
            certificate: None,
        };
        self.state().orders.insert(id.clone(), order);
        let location = format!("{}/order/{id}", self.base);
        Ok(reply(201, self.show(request, &id)?, Some(location)))
    }

    fn order(&self, request: &Request, id: &str) -> Result<Order, String> {
        let order = self
            .state()
            .orders
            .get(id)
            .cloned()
            .ok_or("no such order")?;
        if Some(&order.account) != request.account.as_ref() {
            return Err("an order of another account".to_owned());
        }
        Ok(order)
    }

    fn show(&self, request: &Request, id: &str) -> Result<Value, String> {
        let order = self.order(request, id)?;
        let at = |path: &str| format!("{}/{path}", self.base);
        let names = order
            .proofs
            .iter()
            .map(|proof| json!({"type": "dns", "value": proof.name}));
        let authorizations =
            (0..order.proofs.len()).map(|index| at(&format!("authorization/{id}/{index}")));
        let mut shown = json!({
            "status": order.status(),
            "identifiers": names.collect::<Vec<_>>(),
            "authorizations": authorizations.collect::<Vec<_>>(),
            "finalize": at(&format!("finalize/{id}")),
        });
        if order.certificate.is_some() {
            shown["certificate"] = json!(at(&format!("certificate/{id}")));
        }
        Ok(shown)
    }

    fn authorization(&self, request: &Request, id: &str, index: &str) -> Result<Reply, String> {
        let proof = self.proof(request, id, index)?;
        let challenge = |kind: &str| self.show_challenge(&proof, id, index, kind);
        let authorization = json!({
            "status": proof.status(),
            "identifier": {"type": "dns", "value": proof.name},
            "challenges": [challenge("dns-01"), challenge("http-01"), challenge("tls-alpn-01")],
        });
        Ok(reply(200, authorization, None))
    }

    fn proof(&self, request: &Request, id: &str, index: &str) -> Result<Proof, String> {
        let index: usize = index.parse().map_err(|_| "no such authorization")?;
        let order = self.order(request, id)?;
        order
            .proofs
            .get(index)
            .cloned()
            .ok_or("no such authorization".to_owned())
    }

    fn show_challenge(&self, proof: &Proof, id: &str, index: &str, kind: &str) -> Value {
        let mut challenge = json!({
            "type": kind, "url": format!("{}/challenge/{id}/{index}/{kind}", self.base),
            "status": proof.status(), "token": proof.token,
        });
        if let Some(Some(why)) = &proof.outcome {
            challenge["error"] =
                json!({"type": "urn:ietf:params:acme:error:unauthorized", "detail": why});
        }
        challenge
    }

    fn challenge(
        &self,
        request: &Request,
        id: &str,
        index: &str,
        kind: &str,
    ) -> Result<Reply, String> {
        let mut proof = self.proof(request, id, index)?;
        let account = request.account.as_ref().ok_or("no account")?;
        let thumbprint = self.state().accounts[account].thumbprint.clone();
        let expected = format!("{}.{thumbprint}", proof.token);
        proof.outcome = Some(Some("still looking".to_owned()));
        self.note(id, &proof);
        let places = self
            .changed
            .wait_timeout_while(self.state(), PATIENCE, |state| state.places.is_none());
        let places = places.unwrap().0.places;
        let (http, https) = places.ok_or("the test said nowhere to look")?;
        let found = match kind {
            "http-01" => look_by_http(http, &proof, &expected),
            "tls-alpn-01" => look_by_tls(https, &proof.name, &expected),
            other => return Err(format!("{other} is not what we can prove")),
        };
        proof.outcome = Some(found.err());
        self.note(id, &proof);
        Ok(reply(
            200,
            self.show_challenge(&proof, id, index, kind),
            None,
        ))
    }

    fn note(&self, id: &str, proof: &Proof) {
        let mut state = self.state();
        let order = state.orders.get_mut(id).unwrap();
        let known = order
            .proofs
            .iter_mut()
            .find(|known| known.token == proof.token);
        *known.unwrap() = proof.clone();
        drop(state);
        self.changed.notify_all();
    }

    fn finalize(&self, request: &Request, id: &str, wish: &Value) -> Result<Reply, String> {
        let order = self.order(request, id)?;
        if order.status() != "ready" {
            return Err(format!("the order is {}", order.status()));
        }
        let csr = decode(wish["csr"].as_str().ok_or("no csr")?)?;
        let csr = CertificateSigningRequestParams::from_der(&csr.into())
            .map_err(|error| error.to_string())?;
        let asked: Vec<String> = csr
            .params
            .subject_alt_names
            .iter()
            .map(|name| match name {
                rcgen::SanType::DnsName(name) => name.to_string(),
                other => format!("{other:?}"),
            })
            .collect();
        let proved: Vec<String> = order
            .proofs
            .iter()
            .map(|proof| proof.name.clone())
            .collect();
        if asked != proved {
            return Err(format!("asked for {asked:?}, proved {proved:?}"));
        }
        let certificate = self.authority.signs_request(csr);
        self.state().orders.get_mut(id).unwrap().certificate = Some(certificate);
        Ok(reply(200, self.show(request, id)?, None))
    }

    fn certificate(&self, request: &Request, id: &str) -> Result<Reply, String> {
        let certificate = self.order(request, id)?.certificate;
        Ok(Reply {
            status: 200,
            location: None,
            kind: "application/pem-certificate-chain",
            body: certificate.ok_or("not signed")?,
        })
    }
}

impl Proof {
    fn status(&self) -> &'static str {
        match self.outcome {
            None => "pending",
            Some(None) => "valid",
            Some(Some(_)) => "invalid",
        }
    }
}

impl Reply {
    fn without_body(self) -> Self {
        Self {
            body: String::new(),
            ..self
        }
    }
}

fn reply(status: u16, body: Value, location: Option<String>) -> Reply {
    Reply {
        status,
        location,
        kind: if status < 400 {
            "application/json"
        } else {
            "application/problem+json"
        },
        body: body.to_string(),
    }
}

fn decode(text: &str) -> Result<Vec<u8>, String> {
    BASE64.decode(text).map_err(|error| error.to_string())
}

fn public_key(jwk: &Value) -> Result<Vec<u8>, String> {
    if jwk["kty"] != "EC" || jwk["crv"] != "P-256" {
        return Err(format!("wrong key {jwk}"));
    }
    let half = |name: &str| decode(jwk[name].as_str().unwrap_or_default());
    Ok([vec![4], half("x")?, half("y")?].concat())
}

/// RFC 8555, section 8.3.
fn look_by_http(place: SocketAddr, proof: &Proof, expected: &str) -> Result<(), String> {
    let mut socket = TcpStream::connect(place).map_err(|error| error.to_string())?;
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let (token, name) = (&proof.token, &proof.name);
    let request =
        format!("GET /.well-known/acme-challenge/{token} HTTP/1.1\r\nHost: {name}\r\n\r\n");
    socket.write_all(request.as_bytes()).unwrap();
    let mut answer = BufReader::new(socket);
    let (mut status, mut length, mut body) = (String::new(), 0, Vec::new());
    answer
        .read_line(&mut status)
        .map_err(|error| error.to_string())?;
    loop {
        let mut field = String::new();
        answer
            .read_line(&mut field)
            .map_err(|error| error.to_string())?;
        let Some((name, value)) = field.trim_end().split_once(": ") else {
            break;
        };
        if name.eq_ignore_ascii_case("content-length") {
            length = value.parse().map_err(|_| "wrong length")?;
        }
    }
    answer
        .take(length)
        .read_to_end(&mut body)
        .map_err(|error| error.to_string())?;
    let body = String::from_utf8_lossy(&body);
    if !status.starts_with("HTTP/1.1 200 ") || body.trim_end() != expected {
        return Err(format!("wrong answer {status:?} {body:?}"));
    }
    Ok(())
}

/// Takes any certificate, and keeps it.
#[derive(Debug, Default)]
struct Looking {
    seen: Mutex<Option<CertificateDer<'static>>>,
}

impl ServerCertVerifier for Looking {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        *self.seen.lock().unwrap() = Some(certificate.clone().into_owned());
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("only TLS 1.3 here".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        // The library's own check does not know the extension that makes this certificate a proof.
        let (_, certificate) = X509Certificate::from_der(certificate)
            .map_err(|error| rustls::Error::General(error.to_string()))?;
        let key = &certificate.public_key().subject_public_key.data;
        UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, key)
            .verify(message, signature.signature())
            .map(|()| HandshakeSignatureValid::assertion())
            .map_err(|_| rustls::Error::General("wrong signature".to_owned()))
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ECDSA_NISTP256_SHA256]
    }
}

/// RFC 8737, section 3.
fn look_by_tls(place: SocketAddr, name: &str, expected: &str) -> Result<(), String> {
    let looking = Arc::new(Looking::default());
    let mut config = ClientConfig::builder_with_provider(Arc::new(provider::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::clone(&looking) as Arc<_>)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"acme-tls/1".to_vec()];
    let server = ServerName::try_from(name.to_owned()).unwrap();
    let mut session = ClientConnection::new(Arc::new(config), server).unwrap();
    let mut socket = TcpStream::connect(place).map_err(|error| error.to_string())?;
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    session
        .complete_io(&mut socket)
        .map_err(|error| error.to_string())?;
    if session.alpn_protocol() != Some(b"acme-tls/1") {
        return Err("another protocol".to_owned());
    }
    let seen = looking
        .seen
        .lock()
        .unwrap()
        .clone()
        .ok_or("no certificate")?;
    let (_, certificate) = X509Certificate::from_der(&seen).map_err(|error| error.to_string())?;
    let names = certificate
        .subject_alternative_name()
        .unwrap()
        .ok_or("no names")?;
    if names.value.general_names != [GeneralName::DNSName(name)] {
        return Err(format!("other names {:?}", names.value.general_names));
    }
    let digest = digest(&SHA256, expected.as_bytes());
    let proof = certificate
        .extensions()
        .iter()
        .find(|extension| extension.oid.to_id_string() == "1.3.6.1.5.5.7.1.31")
        .ok_or("no proof")?;
    if !proof.critical || proof.value != [&[4, 32], digest.as_ref()].concat() {
        return Err("wrong proof".to_owned());
    }
    Ok(())
}
