//! Slows writes down at the proxy while memory rounds do not converge: what is not written need not cross. It is the
//! first means, for the proxy knows who waits and reads are as fast as ever; processors are the second (`throttle`).
//!
//! The proxy ends the limit by itself when the gate holds, when the epoch moves, and when nobody renews it. What it never
//! does: refuse a write, or fail a hop.

use std::collections::BTreeMap;
use std::num::NonZeroU64;
use std::time::Instant;

use cutover_protocol::hold::{Command, Refusal};
use cutover_protocol::id::{Epoch, ServiceName};

use super::lease::Lease;
use crate::proxy::{Proxy, ProxyError};
use crate::report::SlowedWrites;

/// No write is delayed for longer, in milliseconds: somebody who waits for a page that long has another look at it.
const DELAY_MS_MAX: u64 = 2_000;

/// Fewer writes a second than that are not what outruns a link.
const WRITES_PER_S_MIN: f64 = 1.0;

/// The writes of a hop's services, and how they are slowed down.
#[derive(Debug)]
pub(super) struct Writes {
    proxy: Proxy,
    services: Vec<(ServiceName, Epoch)>,
    lease_ms: u64,
    /// When each service's counter was read last, and what it was.
    seen: BTreeMap<ServiceName, (Instant, u64)>,
    standing: Standing,
}

/// What the proxy was told.
#[derive(Debug)]
enum Standing {
    /// Nothing.
    Free,
    /// What the agent of before a restart may have told it.
    Unknown,
    /// To admit these services' writes more slowly than so many a second, as they came.
    Slowed {
        rates: Vec<(ServiceName, Epoch, f64)>,
        lease: Lease,
    },
    /// Something it does not know, being older than we are.
    TooOld,
}

/// What came of slowing writes down.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Slowing {
    /// There is nothing to slow down there.
    None,
    /// These are slowed down, as of this round.
    First(Vec<SlowedWrites>),
    /// These were already, and are more so now.
    Further(Vec<SlowedWrites>),
}

impl Writes {
    /// Those of a hop that begins.
    pub(super) fn new(proxy: Proxy, services: Vec<(ServiceName, Epoch)>, lease_ms: u64) -> Self {
        Self {
            proxy,
            services,
            lease_ms,
            seen: BTreeMap::new(),
            standing: Standing::Free,
        }
    }

    /// They are those of a hop that is taken up again.
    pub(super) fn note_restart(&mut self) {
        self.standing = Standing::Unknown;
    }

    /// Begins a round: reads the counters, and has writes admitted `percent` more slowly than they came before they were
    /// first slowed down. 0 leaves everything as it is.
    pub(super) async fn slow(&mut self, percent: u8) -> Slowing {
        let came = self.look().await;
        if percent == 0 || matches!(self.standing, Standing::TooOld) {
            return Slowing::None;
        }
        let (rates, is_first) = match std::mem::replace(&mut self.standing, Standing::Unknown) {
            Standing::Slowed { rates, lease } => {
                // Its renewals would bring the old rate back.
                lease.end().await;
                (rates, false)
            }
            _ => (came, true),
        };
        let (slowed, commands) = self.admit(&rates, percent).await;
        if matches!(self.standing, Standing::TooOld) || slowed.is_empty() {
            return Slowing::None;
        }
        let lease = Lease::repeat(self.proxy.clone(), commands, self.lease_ms);
        self.standing = Standing::Slowed { rates, lease };
        if is_first {
            Slowing::First(slowed)
        } else {
            Slowing::Further(slowed)
        }
    }

    /// How many writes a second came to each service since the last look, where there were any worth mentioning.
    async fn look(&mut self) -> Vec<(ServiceName, Epoch, f64)> {
        let mut rates = Vec::new();
        for (service, epoch) in &self.services {
            let (status, now) = (self.proxy.status(service).await, Instant::now());
            let admitted = match status {
                Ok(status) => status.writes.admitted,
                Err(error) => {
                    tracing::warn!(%service, "its writes could not be counted: {error}");
                    continue;
                }
            };
            if let Some((then, before)) = self.seen.insert(service.clone(), (now, admitted)) {
                let rate = rate(admitted.saturating_sub(before), then, now);
                if rate >= WRITES_PER_S_MIN {
                    rates.push((service.clone(), *epoch, rate));
                }
            }
        }
        rates
    }

    /// Tells the proxy; who is slowed down, and what keeps that so.
    async fn admit(
        &mut self,
        rates: &[(ServiceName, Epoch, f64)],
        percent: u8,
    ) -> (Vec<SlowedWrites>, Vec<Command>) {
        let (mut slowed, mut commands) = (Vec::new(), Vec::new());
        for (service, epoch, rate) in rates {
            let interval_us = interval_us(*rate, percent);
            let command = Command::Admit {
                service: service.clone(),
                epoch: *epoch,
                interval_us,
                delay_ms_max: DELAY_MS_MAX,
                lease_ms: self.lease_ms,
            };
            match self.proxy.command(&command).await {
                Ok(_) => {
                    tracing::info!(%service, interval_us, "its writes are slowed down, because they outrun the link");
                    commands.push(command);
                    slowed.push(SlowedWrites {
                        service: service.clone(),
                        interval_us: interval_us.get(),
                    });
                }
                Err(ProxyError::Refused {
                    reason: Refusal::BadCommand,
                    ..
                }) => {
                    tracing::info!("the proxy is too old to slow writes down: processors are");
                    self.standing = Standing::TooOld;
                    break;
                }
                Err(error) => tracing::warn!(%service, "its writes are not slowed down: {error}"),
            }
        }
        (slowed, commands)
    }

    /// The gates are about to hold, which ends every limit: nothing is renewed any more.
    pub(super) async fn end_renewals(&mut self) {
        if matches!(self.standing, Standing::Slowed { .. }) {
            // Unknown and not free, for the hold may not come about.
            let before = std::mem::replace(&mut self.standing, Standing::Unknown);
            if let Standing::Slowed { lease, .. } = before {
                lease.end().await;
            }
        }
    }

    /// Has writes admitted freely again, where they may not be. A proxy that cannot be told ends the limit by itself.
    pub(super) async fn lift(&mut self) {
        self.end_renewals().await;
        if !matches!(self.standing, Standing::Unknown) {
            return;
        }
        for (service, epoch) in &self.services {
            let command = Command::AdmitFreely {
                service: service.clone(),
                epoch: *epoch,
            };
            if let Err(error) = self.proxy.command(&command).await {
                tracing::warn!(%service, "the limit on its writes was not lifted, and ends with its lease: {error}");
            }
        }
        self.standing = Standing::Free;
    }
}

/// So many in that time, a second.
fn rate(count: u64, then: Instant, now: Instant) -> f64 {
    count as f64 / (now - then).as_secs_f64().max(1e-3)
}

/// From one write to the next, for a service that had so many a second and is to have `percent` less. Both bounds are far
/// from what happens: a rate is [`WRITES_PER_S_MIN`] at least, and a plan's `percent` 95 at most.
fn interval_us(rate: f64, percent: u8) -> NonZeroU64 {
    let left = rate * (100.0 - f64::from(percent.min(99))) / 100.0;
    NonZeroU64::new((1e6 / left) as u64).unwrap_or(NonZeroU64::MIN)
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::path::Path;
    use std::sync::{Arc, Mutex};
    use std::time::Duration;

    use cutover_protocol::hold::{Answer, Order, ServiceStatus};
    use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
    use tokio::net::UnixListener;

    use super::*;

    /// Long enough for no renewal but the one at its beginning.
    const LEASE_MS: u64 = 3_600_000;

    /// A proxy whose services have had so many writes when it is asked, one number a question, and that knows what it
    /// knows; what it was told besides.
    #[derive(Clone)]
    struct Gate {
        admitted: Arc<Mutex<VecDeque<u64>>>,
        told: Arc<Mutex<Vec<Command>>>,
    }

    #[derive(Clone, Copy, PartialEq)]
    enum Age {
        New,
        Old,
    }

    impl Gate {
        fn new(path: &Path, age: Age, admitted: &[u64]) -> Self {
            let gate = Self {
                admitted: Arc::new(Mutex::new(admitted.iter().copied().collect())),
                told: Arc::default(),
            };
            let (ours, listener) = (gate.clone(), UnixListener::bind(path).unwrap());
            tokio::spawn(async move {
                loop {
                    let mut stream = BufReader::new(listener.accept().await.unwrap().0);
                    let mut line = String::new();
                    stream.read_line(&mut line).await.unwrap();
                    let order: Order = serde_json::from_str(&line).unwrap();
                    let answer = ours.answer(age, order.command);
                    let mut answer = serde_json::to_vec(&answer).unwrap();
                    answer.push(b'\n');
                    stream.write_all(&answer).await.unwrap();
                }
            });
            gate
        }

        fn answer(&self, age: Age, command: Command) -> Answer {
            if let Command::Status { .. } = command {
                let admitted = self.admitted.lock().unwrap().pop_front().unwrap();
                return Answer::Status {
                    services: vec![status(admitted)],
                };
            }
            self.told.lock().unwrap().push(command);
            match age {
                Age::New => Answer::Done { service: status(0) },
                Age::Old => Answer::Refused {
                    reason: Refusal::BadCommand,
                    message: "not a command".to_owned(),
                    register: None,
                },
            }
        }

        /// The intervals that were asked for, renewals left out.
        fn intervals(&self) -> Vec<u64> {
            let told = self.told.lock().unwrap();
            let mut intervals: Vec<u64> = told
                .iter()
                .filter_map(|command| match command {
                    Command::Admit { interval_us, .. } => Some(interval_us.get()),
                    _ => None,
                })
                .collect();
            intervals.dedup();
            intervals
        }

        fn last(&self) -> Option<Command> {
            self.told.lock().unwrap().last().cloned()
        }
    }

    fn status(admitted: u64) -> ServiceStatus {
        let text = r#"{"service":"web","register":{"epoch":7,"owner":"source"},"gate":"open","in_flight":0,"upstream_connections":0,"held_now":0,"held":0,"released":0,"gave_up":0,"evicted":0}"#;
        let mut status: ServiceStatus = serde_json::from_str(text).unwrap();
        status.writes.admitted = admitted;
        status
    }

    fn web() -> (ServiceName, Epoch) {
        ("web".parse().unwrap(), Epoch(7))
    }

    fn freely() -> Command {
        let (service, epoch) = web();
        Command::AdmitFreely { service, epoch }
    }

    /// The writes of `web` at such a proxy.
    fn at(folder: &tempfile::TempDir, age: Age, admitted: &[u64]) -> (Writes, Gate) {
        let path = folder.path().join("control.sock");
        let gate = Gate::new(&path, age, admitted);
        (Writes::new(Proxy::new(&path), vec![web()], LEASE_MS), gate)
    }

    /// As if the last look had been a second earlier.
    fn a_second_passes(writes: &mut Writes) {
        for (then, _) in writes.seen.values_mut() {
            *then -= Duration::from_secs(1);
        }
    }

    #[tokio::test]
    async fn writes_are_slowed_down_by_what_they_came_at_before_anything_was_slowed() {
        let folder = tempfile::tempdir().unwrap();
        let (mut writes, gate) = at(&folder, Age::New, &[1000, 1100, 1180]);
        assert_eq!(writes.slow(0).await, Slowing::None);
        a_second_passes(&mut writes);
        let Slowing::First(slowed) = writes.slow(20).await else {
            panic!("{writes:?}")
        };
        // A hundred in a second less a fifth; a machine that stands still makes that second longer.
        assert!(
            (12_500..125_000).contains(&slowed[0].interval_us),
            "{slowed:?}"
        );
        a_second_passes(&mut writes);
        let Slowing::Further(more) = writes.slow(50).await else {
            panic!("{writes:?}")
        };
        let by = more[0].interval_us as f64 / slowed[0].interval_us as f64;
        assert!(
            (by - 1.6).abs() < 0.01,
            "50 % of the same rate, not of 80 %"
        );
        writes.lift().await;
        assert_eq!(gate.last(), Some(freely()));
        assert_eq!(
            gate.intervals(),
            [slowed[0].interval_us, more[0].interval_us]
        );
    }

    #[tokio::test]
    async fn a_service_without_writes_worth_mentioning_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let (mut writes, gate) = at(&folder, Age::New, &[1000, 1000]);
        writes.slow(0).await;
        a_second_passes(&mut writes);
        assert_eq!(writes.slow(20).await, Slowing::None);
        assert_eq!(gate.last(), None);
    }

    #[tokio::test]
    async fn a_proxy_that_is_too_old_is_asked_once() {
        let folder = tempfile::tempdir().unwrap();
        let (mut writes, gate) = at(&folder, Age::Old, &[0, 100, 200]);
        writes.slow(0).await;
        for _ in 0..2 {
            a_second_passes(&mut writes);
            assert_eq!(writes.slow(20).await, Slowing::None);
        }
        writes.lift().await;
        assert_eq!(gate.told.lock().unwrap().len(), 1);
    }

    #[tokio::test]
    async fn whoever_takes_a_hop_up_again_lifts_what_may_be_there_and_nobody_else_asks_in_vain() {
        let folder = tempfile::tempdir().unwrap();
        let (mut writes, gate) = at(&folder, Age::New, &[]);
        writes.lift().await;
        assert_eq!(gate.last(), None);
        writes.note_restart();
        writes.lift().await;
        assert_eq!(gate.last(), Some(freely()));
    }

    #[test]
    fn intervals_are_what_is_left_of_a_rate() {
        assert_eq!(interval_us(100.0, 20).get(), 12_500);
        assert_eq!(interval_us(1.0, 95).get(), 20_000_000);
        assert_eq!(interval_us(1e9, 0).get(), 1);
        assert_eq!(interval_us(1.0, 100).get(), 100_000_000);
    }
}
