//! Active checks: what they found so far, and when that brings a server up or down.
//!
//! One check never changes a server: so many in a row do. Checks run on the control thread; workers see nothing of
//! them but whether a server is up. While the gate of a service holds, the servers of its groups are left alone: a
//! check is a connection, and a hold means that there is none.

mod http;
mod mysql;
mod probe;
#[cfg(test)]
mod tests;

use std::future::poll_fn;
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::balance::mix;
use super::group::Group;
use super::moment::Moment;
use super::server::{Server, ServerId};
use crate::config::HealthConfig;
use crate::service::pool::{Counted, close_politely};
use crate::service::{Gate, Mode};
use crate::stream::Stream;

pub(crate) use probe::CheckError;

/// For a server to close its end of a check's connection.
const CLOSE_MAX: Duration = Duration::from_secs(1);
/// An interval is longer or shorter by up to one part in so many.
const JITTER_PARTS: u32 = 10;

/// What the checks of one server found.
#[derive(Debug, Default)]
pub(crate) struct CheckRecord {
    /// Results in a row that speak against the present state.
    against: u32,
    /// The last one.
    pub(crate) last: Option<CheckResult>,
}

/// One check.
#[derive(Debug, Clone)]
pub(crate) struct CheckResult {
    /// Whether the server did as it should.
    pub(crate) good: bool,
    /// What it did, for a person.
    pub(crate) reason: String,
    /// When it was over.
    pub(crate) at: Instant,
}

impl CheckRecord {
    /// Begins anew.
    pub(super) const fn forget(&mut self) {
        self.against = 0;
    }

    /// Takes note; says what the server is from now on, if that changes.
    fn note(&mut self, result: CheckResult, is_up: bool, config: &HealthConfig) -> Option<bool> {
        let good = result.good;
        self.last = Some(result);
        if good == is_up {
            self.against = 0;
            return None;
        }
        self.against += 1;
        let enough = if good { config.rise } else { config.fall };
        (self.against >= enough).then(|| {
            self.against = 0;
            good
        })
    }
}

/// Checks every server of a group, also those that come and go with a name, for ever. Returns at once when the
/// group has no checks.
///
/// # Cancel safety
/// Dropping the future ends all checks; what they found stays with the servers.
pub(super) async fn watch(group: Arc<Group>, gates: Vec<Arc<Gate>>) {
    if group.config().health.is_none() {
        return;
    }
    let mut changes = group.subscribe();
    let mut tasks = JoinSet::new();
    let mut watched = Vec::new();
    loop {
        changes.borrow_and_update();
        let members = group.members();
        let present = |id: ServerId| members.list.iter().any(|member| member.server.id() == id);
        watched.retain(|(id, task): &(ServerId, tokio::task::AbortHandle)| {
            let stays = present(*id);
            if !stays {
                task.abort();
            }
            stays
        });
        for member in &members.list {
            let id = member.server.id();
            if watched.iter().all(|(other, _)| *other != id) {
                let (group, server) = (Arc::clone(&group), Arc::clone(&member.server));
                let task = check_for_ever(group, server, gates.clone());
                watched.push((id, tasks.spawn_local(task)));
            }
        }
        while tasks.try_join_next().is_some() {}
        if changes.changed().await.is_err() {
            return;
        }
    }
}

async fn check_for_ever(group: Arc<Group>, server: Arc<Server>, gates: Vec<Arc<Gate>>) {
    let Some(config) = &group.config().health else {
        return;
    };
    let mut random = mix(server.hash_seed ^ Moment::of(Instant::now()).0);
    // A server that serves already is first checked a little later than the others; one that has to prove itself,
    // at once.
    if server.is_up() {
        sleep(config.interval.mul_f64(share_of(random)) / JITTER_PARTS).await;
    }
    loop {
        check_unless_held(&group, &server, &gates).await;
        random = mix(random.wrapping_add(1));
        sleep(jittered(config.interval, random)).await;
    }
}

/// One check, or none: the gates count its connection, and it ends as soon as one of them holds.
async fn check_unless_held(group: &Group, server: &Server, gates: &[Arc<Gate>]) {
    // Counted before the look at the gates: either a hold sees the connection, or we see the hold.
    let _counted: Vec<Counted> = gates
        .iter()
        .map(|gate| Counted::new(gate, 0, None))
        .collect();
    if gates.iter().any(|gate| gate.word().mode == Mode::Holding) {
        return;
    }
    let checked = async {
        let (found, stream) = check(group, server).await;
        settle(group, server, found, Instant::now());
        if let Some(stream) = stream {
            close_politely(&stream, CLOSE_MAX).await;
        }
    };
    tokio::select! {
        biased;
        () = any_holds(gates) => {}
        () = checked => {}
    }
}

async fn any_holds(gates: &[Arc<Gate>]) {
    let mut holds: Vec<_> = gates
        .iter()
        .map(|gate| {
            let mut words = gate.subscribe();
            // A gate that is gone holds nobody, and its service is gone with it.
            Box::pin(async move { drop(words.wait_for(|word| word.mode == Mode::Holding).await) })
        })
        .collect();
    poll_fn(|context| {
        let held = holds
            .iter_mut()
            .any(|hold| hold.as_mut().poll(context).is_ready());
        if held { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
}

/// One check, within its time, and the connection it leaves.
pub(super) async fn check(
    group: &Group,
    server: &Server,
) -> (Result<String, CheckError>, Option<Stream>) {
    let Some(config) = &group.config().health else {
        return (Ok(String::new()), None);
    };
    let probe = probe::probe(group.config(), &config.check, server, config.timeout);
    let timed_out = CheckError::TimedOut(config.timeout.as_millis());
    let found = timeout(config.timeout, probe).await;
    found.unwrap_or((Err(timed_out), None))
}

/// Takes note of a check; brings the server up or down if that is due.
pub(super) fn settle(
    group: &Group,
    server: &Server,
    found: Result<String, CheckError>,
    now: Instant,
) {
    let Some(config) = &group.config().health else {
        return;
    };
    let (good, reason) = match found {
        Ok(reason) => (true, reason),
        Err(error) => (false, error.to_string()),
    };
    let result = CheckResult {
        good,
        reason,
        at: now,
    };
    let reason = result.reason.clone();
    let change = server.checks().note(result, server.is_up(), config);
    let Some(up) = change else {
        return;
    };
    server.set_up(up, Moment::of(now));
    let (group, server) = (group.name(), server.endpoint());
    if up {
        tracing::info!(group, %server, "up: {reason}");
    } else {
        tracing::warn!(group, %server, "down: {reason}");
    }
}

/// What a database says to a check, from its first byte on; for the fuzz targets.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn database_says(
    bytes: &[u8],
    user: Option<&str>,
) -> Option<Result<String, CheckError>> {
    let mut wire = tokio::io::join(bytes, tokio::io::sink());
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    match std::pin::pin!(mysql::greet(&mut wire, user)).poll(&mut context) {
        Poll::Ready(found) => Some(found),
        Poll::Pending => None,
    }
}

/// A tenth longer or shorter, so that checks of many proxies do not fall on the same moment.
fn jittered(interval: Duration, random: u64) -> Duration {
    let spread = interval / JITTER_PARTS;
    interval - spread + (2 * spread).mul_f64(share_of(random))
}

/// From zero to one.
#[allow(clippy::cast_precision_loss)] // 53 bits fit
fn share_of(random: u64) -> f64 {
    (random >> 11) as f64 / (1_u64 << 53) as f64
}
