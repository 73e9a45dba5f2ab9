//! One order, from an account to a certificate in the folder.
//!
//! Whatever comes of it, no answer to a challenge stays behind, and nothing that was there before is touched until
//! the new certificate has been checked.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use instant_acme::{
    Account, AccountCredentials, AuthorizationStatus, ChallengeType, Identifier, NewAccount,
    NewOrder, Order, OrderStatus, RetryPolicy,
};
use rcgen::{CertificateParams, DistinguishedName, KeyPair};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use serde::{Deserialize, Serialize};

use super::folder::{Folder, is_token};
use crate::config::{AcmeConfig, Challenge};
use crate::tls;

/// For the authority to look at our answers, and for it to sign.
const PATIENCE: Duration = Duration::from_secs(300);

/// Why an order came to nothing.
#[derive(Debug, thiserror::Error)]
pub(super) enum OrderError {
    /// The folder is not usable.
    #[error("cannot use {path}: {source}; check the folder of [tls.acme]", path = path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The authority cannot be reached, or refused something.
    #[error("the authority did not {what}: {source}")]
    Authority {
        /// What it should have done.
        what: &'static str,
        /// What it said.
        source: instant_acme::Error,
    },
    /// It does not accept any proof that we may give.
    #[error("the authority offers no challenge for {name} that \"challenges\" allows")]
    NoChallenge {
        /// The host name.
        name: String,
    },
    /// It did not find our proof, or did not like it.
    #[error("the authority found no proof that we control {name}: {why}")]
    NoProof {
        /// The host name.
        name: String,
        /// In its words.
        why: String,
    },
    /// The request for the certificate could not be made.
    #[error("cannot make a certificate request: {0}")]
    Request(#[from] rcgen::Error),
    /// The authority signed something else.
    #[error("the authority answered with something else than a certificate for these names")]
    WrongCertificate,
    /// It took too long.
    #[error("the order took longer than {PATIENCE:?}")]
    TooLong,
}

/// An account as it is kept.
#[derive(Serialize, Deserialize)]
struct KeptAccount {
    directory: String,
    credentials: AccountCredentials,
}

/// Orders a certificate and puts it into the folder.
///
/// # Cancel safety
/// Dropping the future gives the order up; the next one starts anew.
pub(super) async fn order(config: &AcmeConfig) -> Result<(), OrderError> {
    let folder = Folder::new(config);
    folder.make().map_err(|source| OrderError::File {
        path: config.folder.clone(),
        source,
    })?;
    let answers = &mut Answers::default();
    let ordered = tokio::time::timeout(PATIENCE, run(config, &folder, answers));
    ordered.await.unwrap_or(Err(OrderError::TooLong))
}

/// Answers that lie in the folder, for the length of an order.
#[derive(Debug, Default)]
struct Answers(Vec<PathBuf>);

impl Drop for Answers {
    fn drop(&mut self) {
        for path in &self.0 {
            // What cannot be removed proves nothing once the order is over.
            std::fs::remove_file(path).ok();
        }
    }
}

async fn run(
    config: &AcmeConfig,
    folder: &Folder,
    answers: &mut Answers,
) -> Result<(), OrderError> {
    let account = account(config, folder).await?;
    let names: Vec<_> = config
        .names
        .iter()
        .map(|name| Identifier::Dns(name.to_string()))
        .collect();
    let mut order = account
        .new_order(&NewOrder::new(&names))
        .await
        .map_err(refused("take the order"))?;
    prove(config, folder, &mut order, answers).await?;
    let retries = RetryPolicy::new().timeout(PATIENCE);
    let status = order.poll_ready(&retries).await;
    let status = status.map_err(refused("check our proofs"))?;
    if status != OrderStatus::Ready {
        return Err(reason(&account, order).await);
    }
    let key = KeyPair::generate()?;
    let names: Vec<_> = config.names.iter().map(ToString::to_string).collect();
    let mut params = CertificateParams::new(names)?;
    params.distinguished_name = DistinguishedName::new();
    let request = params.serialize_request(&key)?;
    let finalized = order.finalize_csr(request.der()).await;
    finalized.map_err(refused("take the certificate request"))?;
    let chain = order.poll_certificate(&retries).await;
    let chain = chain.map_err(refused("sign the certificate"))?;
    if !is_for(&chain, &config.names) {
        return Err(OrderError::WrongCertificate);
    }
    let both = format!("{chain}\n{}", key.serialize_pem());
    write(folder, &folder.certificate(), both.as_bytes())
}

/// The account that the folder knows, or a new one.
async fn account(config: &AcmeConfig, folder: &Folder) -> Result<Account, OrderError> {
    let builder = match &config.ca {
        None => Account::builder(),
        Some(ca) => Account::builder_with_root(ca),
    };
    let builder = builder.map_err(refused("let us connect"))?;
    let path = folder.account();
    if let Ok(text) = std::fs::read(&path)
        && let Ok(kept) = serde_json::from_slice::<KeptAccount>(&text)
        && *kept.directory == *config.directory
    {
        let known = builder.from_credentials(kept.credentials).await;
        return known.map_err(refused("show its directory"));
    }
    let contact: Vec<&str> = config.contact.iter().map(|url| &**url).collect();
    let new = NewAccount {
        contact: &contact,
        // Whoever configures an authority has read its terms.
        terms_of_service_agreed: true,
        only_return_existing: false,
    };
    let created = builder.create(&new, config.directory.to_string(), None);
    let (account, credentials) = created.await.map_err(refused("make an account"))?;
    let kept = KeptAccount {
        directory: config.directory.to_string(),
        credentials,
    };
    let text = serde_json::to_vec(&kept).map_err(|error| OrderError::File {
        path: path.clone(),
        source: error.into(),
    })?;
    write(folder, &path, &text)?;
    Ok(account)
}

/// Lays the answers out, and says so.
async fn prove(
    config: &AcmeConfig,
    folder: &Folder,
    order: &mut Order,
    answers: &mut Answers,
) -> Result<(), OrderError> {
    let mut authorizations = order.authorizations();
    while let Some(authorization) = authorizations.next().await {
        let mut authorization = authorization.map_err(refused("show what to prove"))?;
        if authorization.status == AuthorizationStatus::Valid {
            continue;
        }
        let name = authorization.identifier().to_string();
        let offered = |wanted: &&Challenge| {
            let mut challenges = authorization.challenges.iter();
            challenges.any(|challenge| challenge.r#type == type_of(**wanted))
        };
        let chosen = config.challenges.iter().find(offered).copied();
        let no_challenge = || OrderError::NoChallenge { name: name.clone() };
        let chosen = chosen.ok_or_else(no_challenge)?;
        let mut challenge = authorization
            .challenge(type_of(chosen))
            .ok_or_else(no_challenge)?;
        let proof = challenge.key_authorization();
        let path = match chosen {
            Challenge::Http01 if is_token(&challenge.token) => folder.http_answer(&challenge.token),
            Challenge::Http01 => return Err(no_challenge()),
            Challenge::TlsAlpn01 => folder.tls_answer(&name),
        };
        answers.0.push(path.clone());
        match chosen {
            Challenge::Http01 => write(folder, &path, proof.as_str().as_bytes())?,
            Challenge::TlsAlpn01 => write(folder, &path, proof.digest().as_ref())?,
        }
        let ready = challenge.set_ready().await;
        ready.map_err(refused("take our word that the proof is there"))?;
    }
    Ok(())
}

const fn type_of(challenge: Challenge) -> ChallengeType {
    match challenge {
        Challenge::Http01 => ChallengeType::Http01,
        Challenge::TlsAlpn01 => ChallengeType::TlsAlpn01,
    }
}

/// What the authority has against us, from the first challenge that failed.
async fn reason(account: &Account, order: Order) -> OrderError {
    let (url, _) = order.into_parts();
    let mut order = match account.order(url).await {
        Ok(order) => order,
        Err(source) => return refused("say why it refuses")(source),
    };
    let mut authorizations = order.authorizations();
    while let Some(Ok(authorization)) = authorizations.next().await {
        let mut failures = authorization.challenges.iter();
        if let Some(problem) = failures.find_map(|challenge| challenge.error.as_ref()) {
            return OrderError::NoProof {
                name: authorization.identifier().to_string(),
                why: problem.to_string(),
            };
        }
    }
    OrderError::NoProof {
        name: "one of the names".to_owned(),
        why: "no reason given".to_owned(),
    }
}

/// Whether the first certificate of a chain is for all the names.
fn is_for(chain: &str, names: &[Box<str>]) -> bool {
    let Ok(own) = CertificateDer::from_pem_slice(chain.as_bytes()) else {
        return false;
    };
    tls::facts(&own).is_ok_and(|facts| facts.is_for(names))
}

fn write(folder: &Folder, path: &Path, bytes: &[u8]) -> Result<(), OrderError> {
    folder
        .write(path, bytes)
        .map_err(|source| OrderError::File {
            path: path.to_owned(),
            source,
        })
}

fn refused(what: &'static str) -> impl Fn(instant_acme::Error) -> OrderError {
    move |source| OrderError::Authority { what, source }
}
