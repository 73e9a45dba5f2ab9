//! Token buckets: how many requests a second a client, or all clients of a route together, may make.
//!
//! A bucket is one number: the instant at which it will be full again. That is the generic cell rate algorithm of
//! ITU-T I.371 (its "virtual scheduling" form), which gives exactly what a bucket of tokens gives and needs no
//! refilling. Never gives more than `burst + rate * t` in any time `t`.

use std::hash::BuildHasher;
use std::hash::RandomState;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::address::AddressKey;

/// Parts of a table with a lock of their own: far more than workers, so that two hardly ever want the same.
const SHARDS: usize = 64;
/// Places an address may have. Eight of 16 bytes are two cache lines.
const SET: usize = 8;

/// How much a bucket holds, and how fast it fills.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Rate {
    /// Time that one request costs, rounded up so that the rate is never exceeded.
    cost_ns: u64,
    /// Time that a full bucket is worth.
    capacity_ns: u64,
}

impl Rate {
    /// `requests_per_s` from a thousandth to a million, `burst` at least one.
    pub(crate) fn new(requests_per_s: f64, burst: u32) -> Self {
        // Between a microsecond and a thousand seconds: no cast loses anything.
        let cost_ns = (1e9 / requests_per_s.clamp(0.001, 1e6)).ceil() as u64;
        Self {
            cost_ns,
            capacity_ns: cost_ns.saturating_mul(u64::from(burst.max(1))),
        }
    }

    /// One request at `now_ns` from a bucket that is full again at `full_at_ns`: when it will be full then.
    ///
    /// # Errors
    /// The bucket is empty: nanoseconds until it gives again.
    fn take(self, full_at_ns: u64, now_ns: u64) -> Result<u64, u64> {
        let full_at = full_at_ns.max(now_ns) + self.cost_ns;
        match full_at.saturating_sub(now_ns + self.capacity_ns) {
            0 => Ok(full_at),
            wait => Err(wait),
        }
    }
}

/// A request beyond the rate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TooMany {
    /// When the bucket gives again.
    pub wait: Duration,
}

impl TooMany {
    const fn after_ns(wait_ns: u64) -> Self {
        Self {
            wait: Duration::from_nanos(wait_ns),
        }
    }

    /// What Retry-After says: whole seconds, at least one, never too few.
    #[must_use]
    pub const fn retry_after_s(self) -> u64 {
        let whole = self.wait.as_secs();
        if self.wait.subsec_nanos() > 0 || whole == 0 {
            whole + 1
        } else {
            whole
        }
    }
}

/// A limit, its buckets, and what they belong to. Shared by all workers: a rate is that of the proxy, however many
/// workers it has.
#[derive(Debug)]
pub(crate) struct RateLimit {
    rate: Rate,
    began: Instant,
    buckets: Buckets,
}

#[derive(Debug)]
enum Buckets {
    /// One for everybody.
    Together(AtomicU64),
    /// One for each client.
    ByAddress(AddressBuckets),
}

impl RateLimit {
    /// One bucket for all clients together.
    pub(crate) fn together(rate: Rate, began: Instant) -> Self {
        Self {
            rate,
            began,
            buckets: Buckets::Together(AtomicU64::new(0)),
        }
    }

    /// A bucket for each client; about `addresses_max` of them are told apart at once, in 16 bytes each.
    pub(crate) fn by_address(rate: Rate, addresses_max: usize, began: Instant) -> Self {
        Self {
            rate,
            began,
            buckets: Buckets::ByAddress(AddressBuckets::new(addresses_max)),
        }
    }

    /// One request of a client.
    ///
    /// # Errors
    /// It is one too many.
    pub(crate) fn take(&self, client: IpAddr, now: Instant) -> Result<(), TooMany> {
        let now_ns = now.saturating_duration_since(self.began).as_nanos();
        // 584 years.
        let now_ns = u64::try_from(now_ns).unwrap_or(u64::MAX / 2);
        let taken = match &self.buckets {
            Buckets::Together(bucket) => self.take_together(bucket, now_ns),
            Buckets::ByAddress(buckets) => buckets.take(self.rate, AddressKey::of(client), now_ns),
        };
        taken.map_err(TooMany::after_ns)
    }

    fn take_together(&self, bucket: &AtomicU64, now_ns: u64) -> Result<(), u64> {
        let mut wait = 0;
        let taken = bucket.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |full_at| {
            let taken = self.rate.take(full_at, now_ns);
            wait = taken.err().unwrap_or(0);
            taken.ok()
        });
        taken.map(|_| ()).map_err(|_| wait)
    }
}

/// A table of fixed size. An address has eight possible places; of these its own is used, else a full bucket is
/// forgotten (a new one would be full, too), else the one that is full soonest. So only a flood from more
/// addresses than the table has places lets anybody have more than the rate, and those the least indebted.
struct AddressBuckets {
    shards: Box<[Mutex<Box<[Place]>>]>,
    /// Seeded by the system, so that nobody can choose addresses that meet in the same places.
    hasher: RandomState,
}

#[derive(Debug, Clone, Copy)]
struct Place {
    key: AddressKey,
    /// Zero in a place never used: a full bucket.
    full_at_ns: u64,
}

impl AddressBuckets {
    fn new(addresses_max: usize) -> Self {
        let per_shard = addresses_max.div_ceil(SHARDS * SET).next_power_of_two() * SET;
        let unused = Place {
            key: AddressKey::of(IpAddr::from([0, 0, 0, 0])),
            full_at_ns: 0,
        };
        Self {
            shards: (0..SHARDS)
                .map(|_| Mutex::new(vec![unused; per_shard].into_boxed_slice()))
                .collect(),
            hasher: RandomState::new(),
        }
    }

    fn take(&self, rate: Rate, key: AddressKey, now_ns: u64) -> Result<(), u64> {
        let hash = self.hasher.hash_one(key);
        // The remainder and the quotient of a hash below SHARDS fit an index.
        let shard = usize::try_from(hash % SHARDS as u64).unwrap_or(0);
        let mut places = self.shards[shard]
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let sets = places.len() / SET;
        let set = usize::try_from(hash / SHARDS as u64 % sets as u64).unwrap_or(0) * SET;
        let places = &mut places[set..set + SET];
        let own = places.iter().position(|place| place.key == key);
        let (place, full_at) = match own {
            Some(own) => (own, places[own].full_at_ns),
            None => (soonest_full(places), 0),
        };
        let full_at_ns = rate.take(full_at, now_ns)?;
        places[place] = Place { key, full_at_ns };
        Ok(())
    }
}

fn soonest_full(places: &[Place]) -> usize {
    let by_time = (0..places.len()).min_by_key(|place| places[*place].full_at_ns);
    by_time.unwrap_or(0)
}

impl std::fmt::Debug for AddressBuckets {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("AddressBuckets")
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const CLIENT: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 1));
    const OTHER: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 2));

    fn limits(rate: Rate, began: Instant) -> [RateLimit; 2] {
        [
            RateLimit::together(rate, began),
            RateLimit::by_address(rate, 512, began),
        ]
    }

    #[test]
    fn a_burst_passes_and_the_next_one_waits_for_its_token() {
        let began = Instant::now();
        for limit in limits(Rate::new(2.0, 3), began) {
            let later = |ms| began + Duration::from_millis(ms);
            for _ in 0..3 {
                assert_eq!(limit.take(CLIENT, began), Ok(()));
            }
            let refused = limit.take(CLIENT, began).unwrap_err();
            assert_eq!(refused.wait, Duration::from_millis(500));
            assert_eq!(refused.retry_after_s(), 1);
            assert!(
                limit
                    .take(CLIENT, later(499))
                    .is_err_and(|refused| refused.wait == Duration::from_millis(1))
            );
            assert_eq!(limit.take(CLIENT, later(500)), Ok(()));
            assert!(
                limit
                    .take(CLIENT, later(500))
                    .is_err_and(|refused| refused.wait == Duration::from_millis(500))
            );
        }
    }

    #[test]
    fn a_rate_below_one_a_second_says_how_many_seconds_to_wait() {
        let began = Instant::now();
        let limit = RateLimit::together(Rate::new(0.1, 1), began);
        assert_eq!(limit.take(CLIENT, began), Ok(()));
        assert_eq!(limit.take(CLIENT, began).unwrap_err().retry_after_s(), 10);
        let later = began + Duration::from_millis(9_001);
        assert_eq!(limit.take(CLIENT, later).unwrap_err().retry_after_s(), 1);
    }

    #[test]
    fn clients_have_buckets_of_their_own_unless_they_share_one() {
        let began = Instant::now();
        let [together, by_address] = limits(Rate::new(1.0, 1), began);
        assert_eq!(by_address.take(CLIENT, began), Ok(()));
        assert_eq!(by_address.take(OTHER, began), Ok(()));
        assert_eq!(together.take(CLIENT, began), Ok(()));
        assert!(
            together
                .take(OTHER, began)
                .is_err_and(|refused| refused.retry_after_s() == 1)
        );
    }

    #[test]
    fn a_flood_of_addresses_leaves_the_table_as_large_as_it_was_and_debtors_in_it() {
        let began = Instant::now();
        let limit = RateLimit::by_address(Rate::new(0.001, 5), 512, began);
        for _ in 0..5 {
            assert_eq!(limit.take(CLIENT, began), Ok(()));
        }
        for number in 0..100_000_u32 {
            // Addresses that have asked once owe less than the one that has asked five times.
            let _ = limit.take(IpAddr::from(number.to_be_bytes()), began);
        }
        assert!(
            limit
                .take(CLIENT, began)
                .is_err_and(|refused| refused.retry_after_s() == 1000)
        );
    }

    proptest! {
        #[test]
        fn a_bucket_never_gives_more_than_burst_and_rate_allow(
            per_s in 0.01_f64..5_000.0, burst in 1_u32..50, steps in proptest::collection::vec(0_u64..50_000_000, 1..400)
        ) {
            let began = Instant::now();
            for limit in limits(Rate::new(per_s, burst), began) {
                let (mut at_ns, mut given) = (0_u64, 0_u32);
                for step in &steps {
                    at_ns += step;
                    let now = began + Duration::from_nanos(at_ns);
                    given += u32::from(limit.take(CLIENT, now).is_ok());
                    let allowed = f64::from(burst) + per_s * Duration::from_nanos(at_ns).as_secs_f64();
                    prop_assert!(f64::from(given) <= allowed + 1e-6, "{given} of {allowed}");
                }
            }
        }

        #[test]
        fn whoever_waits_as_long_as_told_is_served(
            per_s in 0.01_f64..5_000.0, burst in 1_u32..50, asked in 1_usize..100
        ) {
            let began = Instant::now();
            for limit in limits(Rate::new(per_s, burst), began) {
                let refused = (0..asked).find_map(|_| limit.take(CLIENT, began).err());
                if let Some(refused) = refused {
                    prop_assert!(limit.take(CLIENT, began + refused.wait).is_ok());
                }
            }
        }
    }
}
