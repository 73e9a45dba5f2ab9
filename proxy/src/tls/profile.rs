//! A `[[tls]]` profile at work: the settings that rustls wants, always up to date with the files behind them.
//!
//! Connections that are established keep what they began with; the next one gets what is on disk now.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::version::{TLS12, TLS13};
use rustls::{ServerConfig, SupportedProtocolVersion};

use super::certificates::{CertificateFiles, Certificates};
use super::count::Handshakes;
use super::files::{self, TlsError};
use super::tickets::Tickets;
use super::watch::Stamp;
use crate::acme;
use crate::config::{ClientsConfig, Demand, TlsConfig, TlsVersion};

/// How often files are looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// What is spoken inside of a listener's TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Offer {
    /// HTTP over TCP.
    Http,
    /// Anything: nothing is negotiated.
    Raw,
    /// HTTP/3, whose keys QUIC keeps itself.
    #[allow(dead_code, reason = "for QUIC listeners")]
    Http3,
}

/// One profile.
#[derive(Debug)]
pub(crate) struct Profile {
    config: TlsConfig,
    certificates: Arc<Certificates>,
    current: ArcSwap<Offers>,
    files: Mutex<Files>,
    /// How handshakes ended.
    pub(crate) handshakes: Handshakes,
}

#[derive(Debug)]
struct Offers {
    http: Arc<ServerConfig>,
    raw: Arc<ServerConfig>,
    http3: Arc<ServerConfig>,
    tickets: Arc<Tickets>,
}

struct Files {
    certificates: CertificateFiles,
    clients: Stamp,
    tickets: Stamp,
}

impl std::fmt::Debug for Files {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Files").finish_non_exhaustive()
    }
}

impl Profile {
    /// Loads everything the profile names.
    ///
    /// # Errors
    /// A file that is listed by name cannot be used, or there is not one usable certificate and none to be ordered.
    pub(crate) fn load(config: &TlsConfig) -> Result<Arc<Self>, TlsError> {
        let challenge = config.acme.as_ref().map(acme::challenge_certificates);
        let certificates = Arc::new(Certificates::new(challenge));
        let mut folder_files = CertificateFiles::new(
            config.certificates.clone(),
            config.folder.clone(),
            config.acme.as_ref().map(acme::certificate_files),
        );
        let (_, errors) = folder_files.refresh(&certificates);
        let mut strays = Vec::new();
        for error in errors {
            if names_one(config, &error) {
                return Err(error);
            }
            strays.push(error);
        }
        for error in &strays {
            complain(config, error);
        }
        if folder_files.usable() == 0 && config.acme.is_none() {
            return Err(strays
                .into_iter()
                .next()
                .unwrap_or_else(|| TlsError::NoneUsable {
                    profile: config.name.clone(),
                    folder: config.folder.clone().unwrap_or_default(),
                }));
        }
        let files = Files {
            certificates: folder_files,
            clients: clients_stamp(config),
            tickets: Stamp::of([config.ticket_keys.as_ref()]),
        };
        let (verifier, policy) = verifier(config)?;
        let tickets = Arc::new(Tickets::new(config.ticket_keys.clone(), policy)?);
        let offers = Offers::new(config, &certificates, &tickets, verifier)?;
        Ok(Arc::new(Self {
            config: config.clone(),
            certificates,
            current: ArcSwap::from_pointee(offers),
            files: Mutex::new(files),
            handshakes: Handshakes::default(),
        }))
    }

    /// Its name in the configuration.
    pub(crate) fn name(&self) -> &str {
        &self.config.name
    }

    /// The settings for the next connection.
    pub(crate) fn server_config(&self, offer: Offer) -> Arc<ServerConfig> {
        let current = self.current.load();
        Arc::clone(match offer {
            Offer::Http => &current.http,
            Offer::Raw => &current.raw,
            Offer::Http3 => &current.http3,
        })
    }

    /// Looks at the files and takes over what has changed. What cannot be used is logged, once, and leaves what was
    /// there before.
    pub(crate) fn refresh(&self) {
        let mut files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        let (changed, errors) = files.certificates.refresh(&self.certificates);
        if changed {
            tracing::info!(profile = self.name(), "certificates replaced");
        }
        for error in &errors {
            complain(&self.config, error);
        }
        let clients = clients_stamp(&self.config);
        if clients != files.clients {
            files.clients = clients;
            self.report("authorities of clients replaced", self.replace_clients());
        }
        let tickets = Stamp::of([self.config.ticket_keys.as_ref()]);
        if tickets != files.tickets {
            files.tickets = tickets;
            self.report("ticket keys replaced", self.current.load().tickets.reload());
        }
        if let Err(error) = self.current.load().tickets.renew() {
            complain(&self.config, &error);
        }
    }

    fn report(&self, done: &str, outcome: Result<(), TlsError>) {
        match outcome {
            Ok(()) => tracing::info!(profile = self.name(), "{done}"),
            Err(error) => complain(&self.config, &error),
        }
    }

    fn replace_clients(&self) -> Result<(), TlsError> {
        let (verifier, policy) = verifier(&self.config)?;
        // Sessions that the former authorities let in are not taken up again.
        let tickets = Arc::new(Tickets::new(self.config.ticket_keys.clone(), policy)?);
        let offers = Offers::new(&self.config, &self.certificates, &tickets, verifier)?;
        self.current.store(Arc::new(offers));
        Ok(())
    }
}

/// Keeps profiles up to date, for ever.
pub(crate) async fn keep(profiles: Vec<Arc<Profile>>) {
    let mut looks = tokio::time::interval(LOOK_EVERY);
    looks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        looks.tick().await;
        profiles.iter().for_each(|profile| profile.refresh());
    }
}

fn complain(config: &TlsConfig, error: &TlsError) {
    tracing::error!(profile = %config.name, "{error}; what was in force before stays");
}

fn names_one(config: &TlsConfig, error: &TlsError) -> bool {
    let path: &PathBuf = match error {
        TlsError::Unreadable { path, .. }
        | TlsError::NotPem { path, .. }
        | TlsError::NoCertificate { path }
        | TlsError::NoKey { path }
        | TlsError::BadCertificate { path, .. }
        | TlsError::BadKey { path, .. }
        | TlsError::Mismatch { chain: path, .. } => path,
        _ => return false,
    };
    config.certificates.iter().any(|files| {
        *path == files.chain || *path == files.key || files.ocsp.as_ref() == Some(path)
    })
}

fn clients_stamp(config: &TlsConfig) -> Stamp {
    Stamp::of([config.clients.as_ref().map(|clients| &clients.ca)])
}

type Verifier = Option<Arc<dyn ClientCertVerifier>>;

/// Who checks clients, and what sessions are bound to because of that.
fn verifier(config: &TlsConfig) -> Result<(Verifier, Vec<u8>), TlsError> {
    let Some(ClientsConfig { ca, demand }) = &config.clients else {
        return Ok((None, Vec::new()));
    };
    let roots = Arc::new(files::roots(ca)?);
    let builder = WebPkiClientVerifier::builder_with_provider(roots, provider());
    let builder = match demand {
        Demand::Required => builder,
        Demand::Optional => builder.allow_unauthenticated(),
    };
    let verifier = builder.build().map_err(|error| TlsError::BadCertificate {
        path: ca.clone(),
        why: error.to_string(),
    })?;
    let mut policy = format!("{demand:?} ").into_bytes();
    policy.extend(files::read(ca)?);
    Ok((Some(verifier), policy))
}

pub(super) fn provider() -> Arc<CryptoProvider> {
    Arc::new(aws_lc_rs::default_provider())
}

impl Offers {
    fn new(
        config: &TlsConfig,
        certificates: &Arc<Certificates>,
        tickets: &Arc<Tickets>,
        verifier: Verifier,
    ) -> Result<Self, TlsError> {
        let build = |versions: &[&'static SupportedProtocolVersion], protocols: &[&[u8]]| {
            let builder = ServerConfig::builder_with_provider(provider())
                .with_protocol_versions(versions)
                .map_err(|source| TlsError::SetUp {
                    what: config.name.clone(),
                    source,
                })?;
            let builder = match &verifier {
                Some(verifier) => builder.with_client_cert_verifier(Arc::clone(verifier)),
                None => builder.with_no_client_auth(),
            };
            let mut built = builder.with_cert_resolver(Arc::clone(certificates) as Arc<_>);
            built.alpn_protocols = protocols.iter().map(|name| name.to_vec()).collect();
            built.session_storage = Arc::new(NoServerSessionStorage {});
            built.ticketer = Arc::clone(tickets) as Arc<_>;
            // The session takes the keys over after the handshake.
            built.enable_secret_extraction = true;
            Ok(Arc::new(built))
        };
        let versions: &[_] = match config.versions_min {
            TlsVersion::Tls12 => &[&TLS13, &TLS12],
            TlsVersion::Tls13 => &[&TLS13],
        };
        let mut http: Vec<&[u8]> = vec![b"h2", b"http/1.1"];
        if config.acme.is_some() {
            http.push(acme::ALPN);
        }
        Ok(Self {
            http: build(versions, &http)?,
            raw: build(versions, &[])?,
            http3: build(&[&TLS13], &[b"h3"])?,
            tickets: Arc::clone(tickets),
        })
    }
}
