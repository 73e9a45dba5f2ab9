//! The certificates of one profile: found by the name a client asks for, replaced when their files change.
//!
//! A file that has become unusable never takes a certificate away: the last good one is shown until a better one is
//! there. Which one a client sees depends on nothing but the name it asks for and the signatures it can check.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arc_swap::ArcSwap;
use rustls::crypto::aws_lc_rs::sign::any_supported_type;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::files::{self, TlsError};
use super::handshake::note_server_name;
use super::watch::Stamp;
use crate::config::CertificateConfig;

/// One usable certificate.
#[derive(Debug)]
pub(super) struct Certificate {
    pub(super) key: Arc<CertifiedKey>,
    /// In lower case; wildcards with their star.
    names: Vec<String>,
}

/// Certificates by name.
#[derive(Default)]
struct Table {
    /// More than one where a host has keys of several kinds.
    exact: HashMap<String, Vec<Arc<CertifiedKey>>>,
    /// By what follows the star and the dot.
    wildcard: HashMap<String, Vec<Arc<CertifiedKey>>>,
    default: Vec<Arc<CertifiedKey>>,
}

/// What a certificate was loaded from, and what came of it.
struct Source {
    stamp: Stamp,
    good: Option<Arc<Certificate>>,
}

/// Answers rustls' question for a certificate.
pub(super) struct Certificates {
    table: ArcSwap<Table>,
    /// Asked before, for certificates that prove control over a name.
    challenge: Option<Arc<dyn ResolvesServerCert>>,
}

/// The files behind it; only the control thread has them.
pub(super) struct CertificateFiles {
    listed: Vec<CertificateConfig>,
    folder: Option<PathBuf>,
    /// The one that is ordered; it need not be there yet.
    ordered: Option<CertificateConfig>,
    sources: BTreeMap<CertificateConfig, Source>,
}

impl Certificates {
    pub(super) fn new(challenge: Option<Arc<dyn ResolvesServerCert>>) -> Self {
        Self {
            table: ArcSwap::default(),
            challenge,
        }
    }
}

impl fmt::Debug for Certificates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Certificates").finish_non_exhaustive()
    }
}

impl ResolvesServerCert for Certificates {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let name = hello.server_name().map(str::to_ascii_lowercase);
        note_server_name(name.as_deref());
        let asks_for_proof = |mut protocols: Box<dyn Iterator<Item = &[u8]> + '_>| {
            protocols.any(|protocol| protocol == crate::acme::ALPN)
        };
        if let Some(challenge) = &self.challenge
            && hello
                .alpn()
                .is_some_and(|alpn| asks_for_proof(Box::new(alpn)))
        {
            return challenge.resolve(hello);
        }
        let table = self.table.load();
        let candidates = name.as_deref().and_then(|name| table.find(name));
        let candidates = candidates.unwrap_or(&table.default);
        let signs =
            |key: &&Arc<CertifiedKey>| key.key.choose_scheme(hello.signature_schemes()).is_some();
        candidates
            .iter()
            .find(signs)
            .or_else(|| candidates.first())
            .cloned()
    }
}

impl Table {
    fn of(certificates: &[Arc<Certificate>]) -> Self {
        let mut table = Self::default();
        for certificate in certificates {
            for name in &certificate.names {
                let (map, name) = match name.strip_prefix("*.") {
                    Some(parent) => (&mut table.wildcard, parent),
                    None => (&mut table.exact, name.as_str()),
                };
                let keys = map.entry(name.to_owned()).or_default();
                keys.push(Arc::clone(&certificate.key));
            }
        }
        let first = certificates.first();
        table.default = first
            .map(|certificate| Arc::clone(&certificate.key))
            .into_iter()
            .collect();
        table
    }

    /// A star stands for exactly one label (RFC 9525, section 6.3).
    fn find(&self, name: &str) -> Option<&Vec<Arc<CertifiedKey>>> {
        let wildcard = || {
            let (_, parent) = name.split_once('.')?;
            self.wildcard.get(parent)
        };
        self.exact.get(name).or_else(wildcard)
    }
}

impl CertificateFiles {
    pub(super) const fn new(
        listed: Vec<CertificateConfig>,
        folder: Option<PathBuf>,
        ordered: Option<CertificateConfig>,
    ) -> Self {
        Self {
            listed,
            folder,
            ordered,
            sources: BTreeMap::new(),
        }
    }

    /// Loads whatever is new or has changed. The errors are of this time only: a file that stays as it is is not
    /// complained about again. The flag says whether anything is different for clients.
    pub(super) fn refresh(&mut self, certificates: &Certificates) -> (bool, Vec<TlsError>) {
        let (mut changed, mut errors) = (false, Vec::new());
        let wanted = match self.wanted() {
            Ok(wanted) => wanted,
            // The folder may be back a second later.
            Err(error) => return (false, vec![error]),
        };
        let before = self.sources.len();
        self.sources.retain(|files, _| wanted.contains(files));
        changed |= self.sources.len() != before;
        for files in &wanted {
            let stamp = Stamp::of([Some(&files.chain), Some(&files.key), files.ocsp.as_ref()]);
            let known = self.sources.get_mut(files);
            if known.as_ref().is_some_and(|known| known.stamp == stamp) {
                continue;
            }
            let former = known.and_then(|known| known.good.take());
            let good = match load(files) {
                Ok(certificate) => {
                    changed = true;
                    Some(Arc::new(certificate))
                }
                Err(error) => {
                    errors.push(error);
                    former
                }
            };
            self.sources.insert(files.clone(), Source { stamp, good });
        }
        if changed {
            let usable: Vec<_> = wanted
                .iter()
                .filter_map(|files| self.sources.get(files)?.good.clone())
                .collect();
            certificates.table.store(Arc::new(Table::of(&usable)));
        }
        (changed, errors)
    }

    /// How many certificates can be shown.
    pub(super) fn usable(&self) -> usize {
        let sources = self.sources.values();
        sources.filter(|source| source.good.is_some()).count()
    }

    /// The listed ones in their order, then those of the folder in the order of their names.
    fn wanted(&self) -> Result<Vec<CertificateConfig>, TlsError> {
        let mut wanted = self.listed.clone();
        let ordered = self.ordered.iter().filter(|files| files.chain.exists());
        wanted.extend(ordered.cloned());
        if let Some(folder) = &self.folder {
            wanted.extend(in_folder(folder)?);
        }
        Ok(wanted)
    }
}

fn in_folder(folder: &Path) -> Result<Vec<CertificateConfig>, TlsError> {
    let unreadable = |source| TlsError::Unreadable {
        path: folder.to_owned(),
        source,
    };
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(unreadable)? {
        let chain = entry.map_err(unreadable)?.path();
        if chain.extension().is_some_and(|end| end == "pem") {
            let ocsp = chain.with_extension("ocsp");
            found.push(CertificateConfig {
                key: chain.with_extension("key"),
                ocsp: ocsp.exists().then_some(ocsp),
                chain,
            });
        }
    }
    found.sort();
    Ok(found)
}

fn load(files: &CertificateConfig) -> Result<Certificate, TlsError> {
    let chain = files::chain(&files.chain)?;
    let key = files::key(&files.key)?;
    let key = any_supported_type(&key);
    let key = key.map_err(|source| TlsError::BadKey {
        path: files.key.clone(),
        source,
    })?;
    let bad = |why: String| TlsError::BadCertificate {
        path: files.chain.clone(),
        why,
    };
    let Facts { names, .. } = facts(&chain[0]).map_err(bad)?;
    let mut certified = CertifiedKey::new(chain, key);
    certified.keys_match().map_err(|error| match error {
        rustls::Error::InconsistentKeys(_) => TlsError::Mismatch {
            chain: files.chain.clone(),
            key: files.key.clone(),
        },
        other => bad(other.to_string()),
    })?;
    if let Some(ocsp) = &files.ocsp {
        certified.ocsp = Some(files::read(ocsp)?);
    }
    Ok(Certificate {
        key: Arc::new(certified),
        names,
    })
}

/// What a certificate says about itself.
#[derive(Debug)]
pub(crate) struct Facts {
    /// Host names, in lower case.
    pub(crate) names: Vec<String>,
    /// When it begins and ends, in seconds since 1970.
    pub(crate) not_before_s: i64,
    pub(crate) not_after_s: i64,
}

impl Facts {
    /// Whether it is for all of these names.
    pub(crate) fn is_for(&self, names: &[Box<str>]) -> bool {
        names
            .iter()
            .all(|name| self.names.iter().any(|own| **own == **name))
    }
}

/// Reads what a certificate says about itself.
pub(crate) fn facts(der: &[u8]) -> Result<Facts, String> {
    let (_, parsed) = X509Certificate::from_der(der).map_err(|error| error.to_string())?;
    let alternatives = parsed
        .subject_alternative_name()
        .map_err(|error| error.to_string())?;
    let general = alternatives.map_or(&[][..], |names| &names.value.general_names);
    let names = general.iter().filter_map(|name| match name {
        GeneralName::DNSName(name) => Some(name.to_ascii_lowercase()),
        _ => None,
    });
    Ok(Facts {
        names: names.collect(),
        not_before_s: parsed.validity().not_before.timestamp(),
        not_after_s: parsed.validity().not_after.timestamp(),
    })
}

/// Whom a certificate was issued to, as `CN=alice, O=Example`, without characters that a header may not hold.
pub(crate) fn subject(der: &[u8]) -> Option<String> {
    let (_, parsed) = X509Certificate::from_der(der).ok()?;
    let subject = parsed.subject().to_string();
    let allowed = |character: &char| !character.is_control() && character.is_ascii();
    Some(subject.chars().filter(allowed).collect())
}
