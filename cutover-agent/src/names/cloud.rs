//! Zones kept by a cloud, changed through its own interface over HTTPS.
//!
//! How each cloud wants to be asked is the `dns-update` crate's business. Ours: a name's addresses of one family are
//! replaced by one call, so that no answer in between is "no such name" where the cloud can do that, and a call that
//! takes too long is given up and made again by [`Names`](super::Names).

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use dns_update::providers::route53::Route53Config;
use dns_update::{DnsRecord, DnsRecordType, DnsUpdater};
use serde::Deserialize;

use super::provider::{Provider, ProviderError, Setting};
use super::update::Change;

/// How long one change may take, with the questions before it that find the zone.
const CHANGE_MAX: Duration = Duration::from_secs(30);

/// A cloud whose interface we know.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Cloud {
    /// Amazon Route 53.
    Route53,
    /// Cloudflare.
    Cloudflare,
    /// DigitalOcean.
    Digitalocean,
    /// Hetzner.
    Hetzner,
}

impl Cloud {
    const fn name(self) -> &'static str {
        match self {
            Self::Route53 => "Route 53",
            Self::Cloudflare => "Cloudflare",
            Self::Digitalocean => "DigitalOcean",
            Self::Hetzner => "Hetzner",
        }
    }
}

/// The key file is not what its cloud gives out.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// Nothing in it.
    #[error("{path} is empty: put the token in it that {cloud} gave out for changing this zone")]
    Empty {
        /// The file.
        path: PathBuf,
        /// The cloud.
        cloud: &'static str,
    },
    /// No key of Amazon's.
    #[error(
        "{path} has no line `{key} = ...`: write it as an AWS credentials file, for a user that may change this zone"
    )]
    Missing {
        /// The file.
        path: PathBuf,
        /// What is not there.
        key: &'static str,
    },
    /// The crate cannot work with it.
    #[error("{path}: {cloud} cannot be asked with this: {reason}")]
    Unusable {
        /// The file.
        path: PathBuf,
        /// The cloud.
        cloud: &'static str,
        /// Why.
        reason: String,
    },
}

/// Zones at a cloud, with the right to change them.
pub struct CloudZones {
    cloud: Cloud,
    updater: DnsUpdater,
}

impl std::fmt::Debug for CloudZones {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // What it holds besides is secret.
        formatter
            .debug_struct("CloudZones")
            .field("cloud", &self.cloud)
            .finish_non_exhaustive()
    }
}

impl CloudZones {
    /// With the contents of a key file: a token, or for Route 53 an AWS credentials file. `endpoint` is where
    /// Route 53 is asked, if not at its usual address; the other clouds have one each.
    ///
    /// # Errors
    /// When the key is none of this cloud's.
    pub fn new(
        cloud: Cloud,
        path: &Path,
        key: &str,
        endpoint: Option<&str>,
    ) -> Result<Self, KeyError> {
        let token = key.trim();
        if token.is_empty() {
            return Err(KeyError::Empty {
                path: path.to_owned(),
                cloud: cloud.name(),
            });
        }
        let limit = Some(CHANGE_MAX);
        let made = match cloud {
            Cloud::Route53 => DnsUpdater::new_route53(route53(path, token, endpoint)?),
            Cloud::Cloudflare => DnsUpdater::new_cloudflare(token, limit),
            Cloud::Digitalocean => DnsUpdater::new_digitalocean(token, limit),
            Cloud::Hetzner => DnsUpdater::new_hetzner(token, limit),
        };
        let updater = made.map_err(|error| KeyError::Unusable {
            path: path.to_owned(),
            cloud: cloud.name(),
            reason: error.to_string(),
        })?;
        Ok(Self { cloud, updater })
    }
}

fn route53(path: &Path, text: &str, endpoint: Option<&str>) -> Result<Route53Config, KeyError> {
    let find = |key: &str| {
        let mut pairs = text.lines().filter_map(|line| line.split_once('='));
        let found = pairs.find(|(name, _)| name.trim() == key);
        found.map(|(_, value)| value.trim().to_owned())
    };
    let need = |key: &'static str| {
        find(key)
            .filter(|value| !value.is_empty())
            .ok_or_else(|| KeyError::Missing {
                path: path.to_owned(),
                key,
            })
    };
    Ok(Route53Config {
        access_key_id: need("aws_access_key_id")?,
        secret_access_key: need("aws_secret_access_key")?,
        session_token: find("aws_session_token"),
        region: find("region"),
        hosted_zone_id: None,
        private_zone_only: None,
        endpoint: endpoint.map(str::to_owned),
    })
}

impl Provider for CloudZones {
    fn set<'a>(&'a self, change: Change<'a>) -> Setting<'a> {
        Box::pin(async move {
            let failed = |reason: String| ProviderError::Cloud {
                cloud: self.cloud.name(),
                reason,
            };
            for (kind, records) in by_family(change.addresses) {
                let setting =
                    self.updater
                        .set_rrset(change.name, kind, change.ttl_s, records, change.zone);
                tokio::time::timeout(CHANGE_MAX, setting)
                    .await
                    .map_err(|_| failed(format!("no answer within {} s", CHANGE_MAX.as_secs())))?
                    .map_err(|error| failed(error.to_string()))?;
            }
            Ok(())
        })
    }
}

/// The families that are there, each with all of its addresses.
fn by_family(addresses: &[IpAddr]) -> Vec<(DnsRecordType, Vec<DnsRecord>)> {
    let (mut four, mut six) = (Vec::new(), Vec::new());
    for address in addresses {
        match address {
            IpAddr::V4(address) => four.push(DnsRecord::A(*address)),
            IpAddr::V6(address) => six.push(DnsRecord::AAAA(*address)),
        }
    }
    [(DnsRecordType::A, four), (DnsRecordType::AAAA, six)]
        .into_iter()
        .filter(|(_, records)| !records.is_empty())
        .collect()
}
