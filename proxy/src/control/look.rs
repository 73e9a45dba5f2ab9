//! What may be looked at: who is held, and what a hold would cost. Nothing here changes anything.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use cutover_protocol::hold::{InFlight, LINE_BYTES_MAX, Tier};
use cutover_protocol::id::ServiceName;
use tokio::time::{Instant, sleep_until};

use super::commands::{Commander, Unknown};
use super::seen::{FORECAST_MS_MAX, Forecast, HeldEntry, HeldTable, LimitMet, Look, Seen, Share};
use crate::config::{Limits, ServiceConfig};
use crate::service::budget::{BudgetLimits, Keep, Usage};
use crate::service::traffic::{Arrivals, TrafficSum};
use crate::service::{Held, Service, milliseconds};
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
        let held_now = service.gate.with_held(Held::usage);
        let snapshot = self.running.shared.load_full();
        let Some(serving) = snapshot.serving(name) else {
            let message = format!("{name} was taken out of the configuration meanwhile");
            return Seen::Refused { message };
        };
        let watched = Watched {
            duration,
            end: end.into_std(),
            held_now,
            budget: service.gate.with_held(Held::budget),
            limits: &snapshot.config.limits,
            config: &serving.config,
        };
        Seen::Forecast(Box::new(watched.forecast(sums, undrained)))
    }
}

/// What is known beside the sums.
struct Watched<'s> {
    duration: Duration,
    end: std::time::Instant,
    /// Held already, if the gate was not open.
    held_now: Usage,
    budget: BudgetLimits,
    limits: &'s Limits,
    config: &'s ServiceConfig,
}

impl Watched<'_> {
    fn forecast(self, sums: Vec<TrafficSum>, mut undrained: Vec<InFlight>) -> Forecast {
        let (mut arrived, mut out_of_time) = (0, 0);
        let mut all = Arrivals::default();
        let mut by_address: BTreeMap<IpAddr, u64> = BTreeMap::new();
        let mut connections: BTreeMap<IpAddr, u64> = BTreeMap::new();
        for sum in sums {
            arrived += sum.arrived;
            let passed = |deadline: &&std::time::Instant| **deadline <= self.end;
            out_of_time += sum.deadlines.iter().filter(passed).count() as u64;
            for client in sum.connections.keys() {
                *connections.entry(client.ip()).or_default() += 1;
            }
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
        let usage = Usage {
            count: all.held + self.held_now.count,
            bytes: all.held * u64::from(Keep::Clear.bytes()) + all.head_bytes + self.held_now.bytes,
        };
        Forecast {
            limits: self.limits_met(usage, &by_address, &connections),
            held_bytes: usage.bytes,
            tier: self.budget.judge(Tier::Park, usage),
            service: self.config.name.clone(),
            duration_ms: milliseconds(self.duration),
            arrived,
            held: all.held,
            connections: connections.values().sum(),
            head_bytes: all.head_bytes,
            out_of_time,
            by_address: largest(by_address, ADDRESSES_MAX),
            undrained,
            undrained_count,
        }
    }

    /// Connections that end while requests are answered stay while they are held.
    fn limits_met(
        &self,
        usage: Usage,
        held: &BTreeMap<IpAddr, u64>,
        connections: &BTreeMap<IpAddr, u64>,
    ) -> Vec<LimitMet> {
        let limits = self.limits;
        let met = |limit: &str, most: u64, wanted: u64, who: Option<String>| {
            (wanted > most).then(|| LimitMet {
                limit: limit.to_owned(),
                most,
                wanted,
                who,
            })
        };
        let all_connections = connections.values().sum();
        let connections_max = limits.connections_max as u64;
        let bytes_max = match self.budget.held_bytes_max {
            0 => u64::MAX,
            most => most,
        };
        let for_all = [
            met("held_max", self.budget.held_max, usage.count, None),
            met("held_bytes_max", bytes_max, usage.bytes, None),
            met("connections_max", connections_max, all_connections, None),
        ];
        let wanted = milliseconds(self.duration);
        let timed = |limit: &str, most: Duration, who: Option<String>| {
            met(limit, milliseconds(most), wanted, who)
        };
        let for_all = for_all.into_iter().chain([
            timed("hold_ms_max", self.config.hold_max, None),
            self.config
                .front_warning()
                .and_then(|most| timed("front_timeout_ms", most, None)),
        ]);
        let routes = self.config.routes.iter().filter_map(|route| {
            let limit = route.hold.limit?;
            timed("hold_ms_max", limit, Some(format!("route {}", route.name)))
        });
        // Those who are trusted speak for many, and are not limited by their address.
        let each = |limit: &'static str, most: u64, counts: &BTreeMap<IpAddr, u64>| {
            let one = counts
                .iter()
                .filter(|(address, _)| most > 0 && !self.config.trusted_from.believes(**address));
            let met = one
                .filter_map(|(address, count)| met(limit, most, *count, Some(address.to_string())));
            met.take(ADDRESSES_MAX).collect::<Vec<_>>()
        };
        let most_of_one = limits.address_connections_max as u64;
        for_all
            .flatten()
            .chain(routes.take(ADDRESSES_MAX))
            .chain(each("address_connections_max", most_of_one, connections))
            .chain(each(
                "held_per_address_max",
                self.budget.held_per_address_max,
                held,
            ))
            .collect()
    }
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
    use std::path::Path;

    use super::*;
    use crate::config::Config;
    use crate::service::GateLimits;

    #[test]
    fn the_largest_come_first_and_equal_ones_by_name() {
        let counts = [("b", 2), ("a", 2), ("c", 9), ("d", 1)];
        let shares = largest(BTreeMap::from(counts), 3);
        let names: Vec<&str> = shares.iter().map(|share| share.name.as_str()).collect();
        assert_eq!(names, ["c", "a", "b"]);
    }

    /// What would be met by three connections of one address and one of a balancer, each with a request.
    fn limits_of(table: &str) -> Vec<(String, u64, u64, Option<String>)> {
        let text = format!(
            "state_dir = \"s\"\ncontrol = \"c\"\n[limits]\n{table}\n[[service]]\nname = \"web\"\nlisten = \"127.0.0.1:0\"\n\
             source = \"127.0.0.1:1\"\ntarget = \"127.0.0.1:2\"\ntrusted_from = [\"10.0.0.9\"]\n"
        );
        let config = Config::parse(&text, Path::new("/nowhere")).unwrap();
        let mut sum = TrafficSum::default();
        for client in [
            "10.0.0.1:1",
            "10.0.0.1:2",
            "10.0.0.1:3",
            "10.0.0.9:1",
            "10.0.0.9:2",
        ] {
            let one = Arrivals {
                held: 1,
                head_bytes: 10,
            };
            sum.connections.insert(client.parse().unwrap(), one);
        }
        let watched = Watched {
            duration: Duration::from_secs(10),
            end: std::time::Instant::now(),
            held_now: Usage::default(),
            budget: GateLimits::of(&config, &config.services[0].name).budget,
            limits: &config.limits,
            config: &config.services[0],
        };
        let forecast = watched.forecast(vec![sum], Vec::new());
        assert_eq!((forecast.held, forecast.connections), (5, 5));
        assert_eq!(forecast.head_bytes, 50);
        let met = forecast.limits.into_iter();
        met.map(|met| (met.limit, met.most, met.wanted, met.who))
            .collect()
    }

    #[test]
    fn a_forecast_names_each_limit_and_who_meets_it() {
        assert_eq!(limits_of("held_max = 5"), []);
        let met = |limit: &str, most, wanted| (limit.to_owned(), most, wanted, None);
        assert_eq!(limits_of("held_max = 4"), [met("held_max", 4, 5)]);
        let hold = met("hold_ms_max", 9999, 10_000);
        assert_eq!(limits_of("hold_ms_max = 9999"), [hold]);
        let connections = met("connections_max", 4, 5);
        assert_eq!(limits_of("connections_max = 4"), [connections]);
        // A balancer's address is nobody's in particular.
        let one = "address_connections_max".to_owned();
        let who = Some("10.0.0.1".to_owned());
        assert_eq!(limits_of("address_connections_max = 1"), [(one, 1, 3, who)]);
    }
}
