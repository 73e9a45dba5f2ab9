//! What may be looked at: who is held, and what a hold would cost. Nothing here changes anything.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use cutover_protocol::hold::{InFlight, LINE_BYTES_MAX};
use cutover_protocol::id::ServiceName;
use tokio::time::{Instant, sleep_until};

use super::commands::{Commander, Unknown};
use super::seen::{FORECAST_MS_MAX, Forecast, HeldEntry, HeldTable, LimitMet, Look, Seen, Share};
use crate::config::Limits;
use crate::service::Service;
use crate::service::traffic::{Arrivals, TrafficSum};
use crate::worker::Question;

/// Rows of each list of the held.
const ROWS_MAX: usize = 20;
/// Client addresses that a forecast names.
const ADDRESSES_MAX: usize = 10;
/// What a forecast's observers may be late in ending.
const SPARE: Duration = Duration::from_secs(10);
// Forty entries a service, each with less than a kilobyte, leave room for some twenty services in one line.
const _: () = assert!(2 * ROWS_MAX * 1024 * 20 < LINE_BYTES_MAX);

impl Commander {
    /// Looks.
    ///
    /// # Cancel safety
    /// Dropped, a forecast's counting ends by itself.
    pub(super) async fn look(&self, look: Look) -> Seen {
        match look {
            Look::Held { service } => self.held(service.as_ref()).await,
            Look::Forecast {
                service,
                duration_ms,
            } => self.forecast(&service, duration_ms).await,
            // It needs the connection itself, and never comes here.
            Look::Watch => Seen::Watching,
        }
    }

    async fn held(&self, only: Option<&ServiceName>) -> Seen {
        let services: Vec<Arc<Service>> = match only {
            Some(name) => match self.find(name) {
                Ok(service) => vec![service],
                Err(Unknown(message)) => return Seen::Refused { message },
            },
            None => {
                let snapshot = self.running.shared.load();
                let all = snapshot.services.iter();
                all.map(|serving| Arc::clone(&serving.service)).collect()
            }
        };
        let mut tables = Vec::new();
        for service in services {
            tables.push(self.table_of(&service).await);
        }
        Seen::Held { services: tables }
    }

    async fn table_of(&self, service: &Service) -> HeldTable {
        let parts = self.ask(|reply| Question::Held {
            service: service.name().clone(),
            most: ROWS_MAX,
            reply,
        });
        let (mut oldest, mut newest) = (Vec::new(), Vec::new());
        let mut by_route: BTreeMap<String, u64> = BTreeMap::new();
        let mut by_address: BTreeMap<IpAddr, u64> = BTreeMap::new();
        for part in parts.await {
            oldest.extend(part.oldest);
            newest.extend(part.newest);
            for (route, count) in part.by_route {
                *by_route.entry(route).or_default() += count;
            }
            for (address, count) in part.by_address {
                *by_address.entry(address).or_default() += count;
            }
        }
        oldest.sort_by_key(|(since, _)| *since);
        newest.sort_by_key(|(since, _)| std::cmp::Reverse(*since));
        let first = |entries: Vec<(std::time::Instant, HeldEntry)>| {
            let entries = entries.into_iter().take(ROWS_MAX);
            entries.map(|(_, entry)| entry).collect()
        };
        HeldTable {
            service: service.name().clone(),
            held_now: by_route.values().sum(),
            addresses: by_address.len() as u64,
            oldest: first(oldest),
            newest: first(newest),
            by_route: largest(by_route, ROWS_MAX),
            by_address: largest(by_address, ROWS_MAX),
        }
    }

    async fn forecast(&self, name: &ServiceName, duration_ms: u64) -> Seen {
        let service = match self.find(name) {
            Ok(service) => service,
            Err(Unknown(message)) => return Seen::Refused { message },
        };
        if !(1..=FORECAST_MS_MAX).contains(&duration_ms) {
            let message = format!("watch for 1 to {FORECAST_MS_MAX} ms");
            return Seen::Refused { message };
        }
        let duration = Duration::from_millis(duration_ms);
        let end = Instant::now() + duration;
        let begun = self.ask(|reply| Question::Observe {
            service: name.clone(),
            until: (end + SPARE).into_std(),
            reply,
        });
        if begun.await.contains(&false) {
            let message = format!("somebody watches {name} already; wait for that to end");
            return Seen::Refused { message };
        }
        sleep_until(end).await;
        let sums = self.ask(|reply| Question::Observed {
            service: name.clone(),
            reply,
        });
        let sums = sums.await;
        let mut undrained = self.in_flight(&service).await;
        undrained.retain(|entry| entry.age_ms >= duration_ms);
        let held_now = service.status().held_now;
        let limits = self.running.shared.load().config.limits.clone();
        let watched = Watched {
            service: name.clone(),
            duration,
            held_now,
        };
        Seen::Forecast(Box::new(watched.forecast(sums, undrained, &limits)))
    }
}

/// What is known beside the sums.
struct Watched {
    service: ServiceName,
    duration: Duration,
    /// Held already, if the gate was not open.
    held_now: u64,
}

impl Watched {
    fn forecast(
        self,
        sums: Vec<TrafficSum>,
        mut undrained: Vec<InFlight>,
        limits: &Limits,
    ) -> Forecast {
        let mut arrived = 0;
        let mut all = Arrivals::default();
        let mut by_address: BTreeMap<IpAddr, u64> = BTreeMap::new();
        let mut connections = 0;
        for sum in sums {
            arrived += sum.arrived;
            connections += sum.connections.len() as u64;
            let known = sum.connections.into_iter();
            let address =
                |(client, arrivals): (SocketAddr, Arrivals)| (Some(client.ip()), arrivals);
            for (address, arrivals) in known.map(address).chain([(None, sum.beyond)]) {
                all.held += arrivals.held;
                all.head_bytes += arrivals.head_bytes;
                if let Some(address) = address {
                    *by_address.entry(address).or_default() += arrivals.held;
                }
            }
        }
        let undrained_count = undrained.len() as u64;
        undrained.truncate(super::commands::LEFT_MAX);
        let duration_ms = crate::service::milliseconds(self.duration);
        Forecast {
            limits: limits_met(limits, all.held + self.held_now, duration_ms),
            service: self.service,
            duration_ms,
            arrived,
            held: all.held,
            connections,
            head_bytes: all.head_bytes,
            by_address: largest(by_address, ADDRESSES_MAX),
            undrained,
            undrained_count,
        }
    }
}

fn limits_met(limits: &Limits, held: u64, duration_ms: u64) -> Vec<LimitMet> {
    let hold_ms_max = crate::service::milliseconds(limits.hold_max);
    let all = [
        ("held_max", limits.held_max as u64, held),
        ("hold_ms_max", hold_ms_max, duration_ms),
    ];
    let met = all.into_iter().filter(|(_, most, wanted)| wanted > most);
    met.map(|(limit, most, wanted)| LimitMet {
        limit: limit.to_owned(),
        most,
        wanted,
        who: None,
    })
    .collect()
}

/// The `most` with the highest counts, the highest first.
fn largest<N: ToString + Ord>(counts: BTreeMap<N, u64>, most: usize) -> Vec<Share> {
    let mut counts: Vec<(N, u64)> = counts.into_iter().collect();
    counts.sort_by(|(name, count), (other, than)| than.cmp(count).then_with(|| name.cmp(other)));
    let shares = counts.into_iter().take(most);
    shares
        .map(|(name, count)| Share {
            name: name.to_string(),
            count,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_come_first_and_equal_ones_by_name() {
        let counts = [("b", 2), ("a", 2), ("c", 9), ("d", 1)];
        let shares = largest(BTreeMap::from(counts), 3);
        let names: Vec<&str> = shares.iter().map(|share| share.name.as_str()).collect();
        assert_eq!(names, ["c", "a", "b"]);
    }
}
