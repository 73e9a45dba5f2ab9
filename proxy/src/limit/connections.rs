//! How many connections each client has, and whether it may have one more.
//!
//! A count is exact and lives as long as the connection it counts; there can be no more counts than connections,
//! which are bounded in all by `connections_max`.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

use super::address::AddressKey;

/// Parts of the table with a lock of their own.
const SHARDS: usize = 64;

/// Connections of each address, over all workers and services.
#[derive(Debug)]
pub(crate) struct AddressConnections {
    shards: Box<[Mutex<HashMap<AddressKey, usize>>]>,
    hasher: RandomState,
}

/// One counted connection; given back when dropped.
#[derive(Debug)]
pub(crate) struct Seat {
    table: Arc<AddressConnections>,
    key: AddressKey,
}

impl AddressConnections {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            shards: (0..SHARDS).map(|_| Mutex::default()).collect(),
            hasher: RandomState::new(),
        })
    }

    /// One more connection of an address, or `None` if it has `most` already.
    pub(crate) fn enter(self: &Arc<Self>, address: IpAddr, most: usize) -> Option<Seat> {
        let key = AddressKey::of(address);
        self.change(key, |counts| {
            let count = counts.entry(key).or_insert(0);
            if *count >= most {
                return None;
            }
            *count += 1;
            Some(())
        })?;
        Some(Seat {
            table: Arc::clone(self),
            key,
        })
    }

    fn change<R>(
        &self,
        key: AddressKey,
        change: impl FnOnce(&mut HashMap<AddressKey, usize>) -> R,
    ) -> R {
        let shard = usize::try_from(self.hasher.hash_one(key) % SHARDS as u64).unwrap_or(0);
        let mut counts = self.shards[shard]
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        change(&mut counts)
    }

    #[cfg(test)]
    fn addresses(&self) -> usize {
        self.shards
            .iter()
            .map(|shard| shard.lock().unwrap().len())
            .sum()
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.table.change(self.key, |counts| {
            if let Some(count) = counts.get_mut(&self.key) {
                *count -= 1;
                if *count == 0 {
                    counts.remove(&self.key);
                }
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_has_as_many_connections_as_allowed_and_not_one_more() {
        let table = AddressConnections::new();
        let (one, other) = (IpAddr::from([192, 0, 2, 1]), IpAddr::from([192, 0, 2, 2]));
        let seats: Vec<Seat> = (0..3).map_while(|_| table.enter(one, 3)).collect();
        assert_eq!(seats.len(), 3);
        assert!(table.enter(one, 3).is_none());
        assert!(table.enter(other, 3).is_some());
        drop(seats.into_iter().next());
        let again = table.enter(one, 3).unwrap();
        drop(again);
        assert_eq!(table.addresses(), 0);
    }
}
