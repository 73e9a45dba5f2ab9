//! When to order: at once where there is no certificate, in time before one ends, and after a failure again, ever
//! more rarely and never together with the other proxies.

use std::fmt::Write as _;
use std::time::Duration;

use aws_lc_rs::rand;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use tokio::task::JoinSet;
use tokio::time::sleep;

use super::folder::Folder;
use super::lease::{Lease, now_s};
use super::order::order;
use crate::config::AcmeConfig;
use crate::tls;

/// How often the folder is looked at while nothing is due: another proxy may have ordered, an operator removed.
const LOOK_EVERY: Duration = Duration::from_secs(3600);
/// How often while another proxy orders.
const LOOK_AT_LEASE: Duration = Duration::from_secs(10);
/// After the first failure.
const BACKOFF_FIRST: Duration = Duration::from_secs(60);
/// Authorities allow a few failed orders an hour; six hours still leave a hundred attempts in 30 days.
const BACKOFF_MAX: Duration = Duration::from_secs(6 * 3600);

/// Keeps the certificates ordered, for ever.
pub(crate) async fn keep(configs: Vec<AcmeConfig>) {
    let mut keepers = JoinSet::new();
    for config in configs {
        keepers.spawn_local(keep_one(config));
    }
    while keepers.join_next().await.is_some() {}
}

async fn keep_one(config: AcmeConfig) {
    let mut failures = 0;
    loop {
        let pause = match attempt(&config).await {
            Outcome::NotDue(left) => {
                failures = 0;
                left.min(LOOK_EVERY)
            }
            Outcome::Busy => LOOK_AT_LEASE,
            Outcome::Failed => {
                failures += 1;
                backoff(failures)
            }
        };
        sleep(jittered(pause, random())).await;
    }
}

/// What came of a look at the folder.
#[derive(Debug)]
enum Outcome {
    /// The certificate is good for so long.
    NotDue(Duration),
    /// Another proxy orders.
    Busy,
    Failed,
}

async fn attempt(config: &AcmeConfig) -> Outcome {
    if let Some(left) = time_left(config) {
        return Outcome::NotDue(left);
    }
    let folder = Folder::new(config);
    let name = config.names.first().map_or("", |name| &**name);
    let lease = folder.make().and_then(|()| Lease::take(&folder.lease()));
    let _lease = match lease {
        Ok(Some(lease)) => lease,
        Ok(None) => return Outcome::Busy,
        Err(error) => {
            let folder = config.folder.display();
            tracing::error!(name, "cannot use {folder} for certificates: {error}");
            return Outcome::Failed;
        }
    };
    // Another proxy may have finished between the two looks.
    if let Some(left) = time_left(config) {
        return Outcome::NotDue(left);
    }
    tracing::info!(name, directory = %config.directory, "ordering a certificate");
    match order(config).await {
        Ok(()) => {
            tracing::info!(name, "certificate ordered");
            // One that has to be replaced at once is as bad as none: no haste with the next.
            time_left(config).map_or(Outcome::Failed, Outcome::NotDue)
        }
        Err(error) => {
            tracing::error!(name, "no certificate: {}", with_causes(&error));
            Outcome::Failed
        }
    }
}

/// How long the certificate in the folder need not be replaced. `None` when it has to be now.
fn time_left(config: &AcmeConfig) -> Option<Duration> {
    let bytes = std::fs::read(Folder::new(config).certificate()).ok()?;
    let own = CertificateDer::from_pem_slice(&bytes).ok()?;
    let facts = tls::facts(&own).ok()?;
    // One that lives for six days cannot be renewed thirty days before its end.
    let third = (facts.not_after_s - facts.not_before_s) / 3;
    let before = i64::try_from(config.renew_before.as_secs())
        .ok()?
        .min(third);
    let renewed_at = facts.not_after_s - before;
    let left = renewed_at - i64::try_from(now_s()).ok()?;
    let left = u64::try_from(left).ok().filter(|left| *left > 0)?;
    facts
        .is_for(&config.names)
        .then(|| Duration::from_secs(left))
}

fn backoff(failures: u32) -> Duration {
    let doubled = BACKOFF_FIRST.saturating_mul(1 << failures.saturating_sub(1).min(16));
    doubled.min(BACKOFF_MAX)
}

/// Up to a fifth longer.
fn jittered(pause: Duration, random: u8) -> Duration {
    pause + pause / 5 * u32::from(random) / 256
}

fn random() -> u8 {
    let mut byte = [0];
    // Without randomness there is no jitter.
    rand::fill(&mut byte).ok();
    byte[0]
}

fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            write!(text, ": {more}").ok();
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_are_followed_by_ever_longer_pauses_up_to_a_limit() {
        let pauses: Vec<u64> = (1..=12)
            .map(|failures| backoff(failures).as_secs())
            .collect();
        assert_eq!(pauses[..4], [60, 120, 240, 480]);
        assert_eq!(pauses[10..], [21_600, 21_600]);
        assert_eq!(jittered(Duration::from_secs(100), 0).as_secs(), 100);
        assert_eq!(jittered(Duration::from_secs(100), 255).as_secs(), 119);
    }
}
