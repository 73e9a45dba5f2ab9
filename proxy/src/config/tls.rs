//! What the file says about TLS: `[[tls]]` profiles of listeners, `[upstream.tls]` of server groups.
//!
//! Only shapes and names are checked here. Whether the named files hold certificates shows when they are loaded.

use std::path::{Path, PathBuf};
use std::time::Duration;

use rustls::pki_types::{DnsName, ServerName};
use toml::Table;

use super::ServerConfig;
use super::table::{Problem, Section};
use crate::upstream::Address;

pub(super) const TLS_KEYS: &[&str] = &[
    "name",
    "certificates",
    "folder",
    "versions_min",
    "client_ca",
    "client_certificates",
    "ticket_keys",
    "acme",
];
const CERTIFICATE_KEYS: &[&str] = &["chain", "key", "ocsp"];
const ACME_KEYS: &[&str] = &[
    "directory",
    "contact",
    "names",
    "folder",
    "ca",
    "renew_before_days",
    "challenges",
];
/// Of `[upstream.tls]`.
pub(super) const UPSTREAM_TLS_KEYS: &[&str] = &["name", "ca", "certificate", "key"];

/// One `[[tls]]`: what listeners show and demand.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsConfig {
    /// Listeners name it.
    pub name: Box<str>,
    /// The first is shown to clients that name no host, or one that nobody has a certificate for.
    pub certificates: Vec<CertificateConfig>,
    /// A folder of further certificates: NAME.pem, NAME.key and perhaps NAME.ocsp.
    pub folder: Option<PathBuf>,
    /// The oldest version spoken.
    pub versions_min: TlsVersion,
    /// Whether clients show certificates, and whose.
    pub clients: Option<ClientsConfig>,
    /// Keys of session tickets, shared with other proxies.
    pub ticket_keys: Option<PathBuf>,
    /// Certificates ordered from an authority.
    pub acme: Option<AcmeConfig>,
}

/// The files of one certificate.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CertificateConfig {
    /// The certificate and those between it and the root, in PEM.
    pub chain: PathBuf,
    /// Its private key, in PEM.
    pub key: PathBuf,
    /// A stapled OCSP response, in DER.
    pub ocsp: Option<PathBuf>,
}

/// A version of the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TlsVersion {
    /// RFC 5246.
    Tls12,
    /// RFC 8446.
    Tls13,
}

/// Certificates of clients.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientsConfig {
    /// The authorities that may have signed them, in PEM.
    pub ca: PathBuf,
    /// Whether a client without one is let in.
    pub demand: Demand,
}

/// What becomes of a client without a certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Demand {
    /// It is turned away.
    Required,
    /// It is served; one with a wrong certificate is not.
    Optional,
}

/// `[tls.acme]`: certificates ordered over RFC 8555.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AcmeConfig {
    /// The URL of the authority's directory.
    pub directory: Box<str>,
    /// URLs such as `mailto:admin@example.org`.
    pub contact: Vec<Box<str>>,
    /// The host names of the one certificate that is ordered.
    pub names: Vec<Box<str>>,
    /// The account, the certificate, its key and open challenges; all proxies of these names share it.
    pub folder: PathBuf,
    /// The root of a private authority's own server, in PEM.
    pub ca: Option<PathBuf>,
    /// How long before its end a certificate is replaced.
    pub renew_before: Duration,
    /// In the order of preference, at least one.
    pub challenges: Vec<Challenge>,
}

/// How control over a name is proved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Challenge {
    /// A file under `/.well-known/acme-challenge/` at port 80.
    Http01,
    /// A certificate at port 443, RFC 8737.
    TlsAlpn01,
}

/// How servers of an upstream group are spoken to over TLS. They are verified in any case.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct UpstreamTlsConfig {
    /// The name their certificates must have, if it is not that of their address.
    pub name: Option<ServerName<'static>>,
    /// The authorities that may have signed them, in PEM; those of the system if absent.
    pub ca: Option<PathBuf>,
    /// What we show them, chain and key.
    pub certificate: Option<(PathBuf, PathBuf)>,
}

/// Reads all `[[tls]]`.
pub(super) fn profiles(root: &Section<'_>, folder: &Path) -> Result<Vec<TlsConfig>, Problem> {
    let mut profiles: Vec<TlsConfig> = Vec::new();
    for section in root.sections("tls", TLS_KEYS)? {
        let next = profile(&section, folder)?;
        if profiles.iter().any(|other| other.name == next.name) {
            return Err(Problem::NameTwice {
                kind: "[[tls]]",
                name: next.name.into(),
            });
        }
        profiles.push(next);
    }
    Ok(profiles)
}

fn profile(section: &Section<'_>, folder: &Path) -> Result<TlsConfig, Problem> {
    let name = section.required_text("name", "name = \"public\"")?;
    let within = format!("[[tls]] \"{name}\"");
    let certificates = certificates(section, &within, folder)?;
    let acme = section.section_at("acme", format!("[tls.acme] of \"{name}\""), ACME_KEYS)?;
    let acme = acme.map(|acme| read_acme(&acme, folder)).transpose()?;
    if certificates.is_empty() && !section.has("folder") && acme.is_none() {
        let example = "certificates = [{ chain = \"a.pem\", key = \"a.key\" }]";
        return Err(section.missing("certificates", example));
    }
    let versions = [("1.2", TlsVersion::Tls12), ("1.3", TlsVersion::Tls13)];
    let versions_min = section
        .choice("versions_min", &versions, "\"1.2\" or \"1.3\"")?
        .unwrap_or(TlsVersion::Tls12);
    Ok(TlsConfig {
        name: name.into(),
        certificates,
        folder: path(section, "folder", folder)?,
        versions_min,
        clients: clients(section, folder)?,
        ticket_keys: path(section, "ticket_keys", folder)?,
        acme,
    })
}

fn certificates(
    section: &Section<'_>,
    within: &str,
    folder: &Path,
) -> Result<Vec<CertificateConfig>, Problem> {
    let place = |index: usize, _: &Table| format!("certificate {} of {within}", index + 1);
    let mut certificates = Vec::new();
    for entry in section.sections_at("certificates", place, CERTIFICATE_KEYS)? {
        certificates.push(CertificateConfig {
            chain: folder.join(entry.required_text("chain", "chain = \"a.pem\"")?),
            key: folder.join(entry.required_text("key", "key = \"a.key\"")?),
            ocsp: path(&entry, "ocsp", folder)?,
        });
    }
    Ok(certificates)
}

fn clients(section: &Section<'_>, folder: &Path) -> Result<Option<ClientsConfig>, Problem> {
    let Some(ca) = path(section, "client_ca", folder)? else {
        section.refuse_useless(&["client_certificates"], "\"client_ca\"")?;
        return Ok(None);
    };
    let demands = [
        ("required", Demand::Required),
        ("optional", Demand::Optional),
    ];
    let wanted = "\"required\" or \"optional\"";
    let demand = section.choice("client_certificates", &demands, wanted)?;
    Ok(Some(ClientsConfig {
        ca,
        demand: demand.unwrap_or(Demand::Required),
    }))
}

fn read_acme(section: &Section<'_>, folder: &Path) -> Result<AcmeConfig, Problem> {
    let directory = section.required_text(
        "directory",
        "directory = \"https://acme-v02.api.letsencrypt.org/directory\"",
    )?;
    if !directory.starts_with("https://") {
        return Err(section.bad_text("directory", directory, "a URL that begins with https://"));
    }
    let names = section.texts("names")?;
    if names.is_empty() {
        return Err(section.missing("names", "names = [\"www.example.org\"]"));
    }
    for name in &names {
        // Neither challenge can prove a wildcard or an address.
        if DnsName::try_from(*name).is_err() || name.contains('*') {
            return Err(section.bad_text("names", name, "host names without wildcards"));
        }
    }
    let mut challenges = Vec::new();
    for challenge in section.texts("challenges")? {
        challenges.push(match challenge {
            "http-01" => Challenge::Http01,
            "tls-alpn-01" => Challenge::TlsAlpn01,
            other => {
                let wanted = "\"http-01\" or \"tls-alpn-01\"";
                return Err(section.bad_text("challenges", other, wanted));
            }
        });
    }
    if challenges.is_empty() {
        challenges = vec![Challenge::TlsAlpn01, Challenge::Http01];
    }
    let days = section.whole("renew_before_days", 1..=90)?.unwrap_or(30);
    let own_folder = section.required_text("folder", "folder = \"/var/lib/hopgate/acme\"")?;
    Ok(AcmeConfig {
        directory: directory.into(),
        contact: section
            .texts("contact")?
            .into_iter()
            .map(Box::from)
            .collect(),
        names: names
            .iter()
            .map(|name| name.to_ascii_lowercase().into())
            .collect(),
        folder: folder.join(own_folder),
        ca: path(section, "ca", folder)?,
        renew_before: Duration::from_secs(days.unsigned_abs() * 24 * 3600),
        challenges,
    })
}

/// Reads one `[upstream.tls]`.
pub(super) fn upstream_tls(
    section: &Section<'_>,
    folder: &Path,
    servers: &[ServerConfig],
) -> Result<UpstreamTlsConfig, Problem> {
    let name = match section.text("name")? {
        None => None,
        Some(text) => {
            let name = ServerName::try_from(text.to_owned());
            Some(name.map_err(|_| section.bad_text("name", text, "a host name or an address"))?)
        }
    };
    let nameless = |server: &ServerConfig| matches!(server.address, Address::Unix(_));
    if name.is_none() && servers.iter().any(nameless) {
        return Err(section.missing("name", "name = \"app.internal\""));
    }
    let certificate = path(section, "certificate", folder)?;
    let key = path(section, "key", folder)?;
    let certificate = match (certificate, key) {
        (None, None) => None,
        (Some(certificate), Some(key)) => Some((certificate, key)),
        (Some(_), None) => return Err(section.missing("key", "key = \"client.key\"")),
        (None, Some(_)) => {
            return Err(section.missing("certificate", "certificate = \"client.pem\""));
        }
    };
    Ok(UpstreamTlsConfig {
        name,
        ca: path(section, "ca", folder)?,
        certificate,
    })
}

fn path(
    section: &Section<'_>,
    key: &'static str,
    folder: &Path,
) -> Result<Option<PathBuf>, Problem> {
    Ok(section.text(key)?.map(|text| folder.join(text)))
}
