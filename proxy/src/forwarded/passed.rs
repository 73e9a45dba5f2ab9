//! The loop guard of raw connections: which proxies one has passed, in a TLV of the PROXY protocol's version 2, as
//! CDN-Loop says it of requests.
//!
//! After a hop a client that comes by the source is led on to the target; after a mistake in one's configuration the two
//! might lead it to and fro, a connection more each time, until one has no more to give. Raw bytes have no room for a
//! word about that, but the header in front of them has.

use std::sync::Arc;

use super::loop_guard::LoopId;

/// Of the types that are left to applications (PP2_TYPE_MIN_CUSTOM to PP2_TYPE_MAX_CUSTOM, 0xE0 to 0xEF,
/// proxy-protocol.txt, section 2.2.7), one that no large balancer uses.
pub(crate) const TLV: u8 = 0xE7;

/// What the value begins with: another's TLV of this type is none of ours.
const PREFIX: &[u8] = b"cdn-loop:";

/// Most proxies that one connection may pass; more would be a circle in any case.
const PROXIES_MAX: usize = 16;
/// Longest value, in bytes. With both addresses, at most 52 bytes, and the 3 of the TLV's own head it stays below the 536
/// that every reader takes (section 2.2).
pub(crate) const VALUE_BYTES_MAX: usize = 400;

/// The proxies that a connection has passed, in order. Nothing is kept of those without a name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Passed(Option<Arc<String>>);

/// A value that begins like ours, and is not.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Malformed;

/// Why a connection goes no further: it has been here, or has passed as many proxies as it may.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Circle;

impl Passed {
    /// What the value of a TLV says; `None` where it is another's.
    ///
    /// # Errors
    /// It has no name in it, or one that is none, or more than may be.
    pub(crate) fn read(value: &[u8]) -> Result<Option<Self>, Malformed> {
        let Some(names) = value.strip_prefix(PREFIX) else {
            return Ok(None);
        };
        let names = std::str::from_utf8(names).map_err(|_| Malformed)?;
        let count = names.split(',').count();
        let are_names = names.split(',').all(|name| LoopId::new(name).is_some());
        if value.len() > VALUE_BYTES_MAX || count > PROXIES_MAX || !are_names {
            return Err(Malformed);
        }
        Ok(Some(Self(Some(Arc::new(names.to_owned())))))
    }

    /// The value of the TLV, where there is anything to say.
    pub(crate) fn value(&self) -> Option<Vec<u8>> {
        let names = self.0.as_ref()?;
        Some([PREFIX, names.as_bytes()].concat())
    }

    /// The same and this proxy behind them, if it has a name.
    ///
    /// # Errors
    /// Its name is among them, or there is no room for it.
    pub(crate) fn and(&self, ours: Option<&LoopId>) -> Result<Self, Circle> {
        let Some(ours) = ours else {
            return Ok(self.clone());
        };
        let Some(names) = &self.0 else {
            return Ok(Self(Some(Arc::new(ours.as_str().to_owned()))));
        };
        let mut all = names.split(',');
        let is_full = names.split(',').count() >= PROXIES_MAX
            || PREFIX.len() + names.len() + 1 + ours.as_str().len() > VALUE_BYTES_MAX;
        if is_full || all.any(|name| ours.is_called(name.as_bytes())) {
            return Err(Circle);
        }
        Ok(Self(Some(Arc::new(format!("{names},{}", ours.as_str())))))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(names: &str) -> Result<Option<Passed>, Malformed> {
        Passed::read(&[PREFIX, names.as_bytes()].concat())
    }

    fn passed(names: &str) -> Passed {
        read(names).unwrap().unwrap()
    }

    fn id(text: &str) -> LoopId {
        LoopId::new(text).unwrap()
    }

    #[test]
    fn a_connection_gathers_the_names_of_the_proxies_it_passes() {
        let first = Passed::default().and(Some(&id("edge.a"))).unwrap();
        assert_eq!(first.value().unwrap(), b"cdn-loop:edge.a");
        let nameless = first.and(None).unwrap();
        assert_eq!(nameless, first);
        let second = nameless.and(Some(&id("edge-b"))).unwrap();
        assert_eq!(second.value().unwrap(), b"cdn-loop:edge.a,edge-b");
        assert_eq!(second, passed("edge.a,edge-b"));
        assert_eq!(Passed::default().and(None).unwrap().value(), None);
    }

    #[test]
    fn whoever_comes_back_is_known_by_the_whole_name_in_any_case() {
        for been in ["edge-a", "x,edge-a", "EDGE-A,y"] {
            assert_eq!(passed(been).and(Some(&id("edge-a"))), Err(Circle), "{been}");
        }
        for new in ["edge-ab", "x,edge", "edge.a"] {
            passed(new).and(Some(&id("edge-a"))).unwrap();
        }
    }

    #[test]
    fn the_last_place_is_taken_and_the_next_one_is_a_circle() {
        let names = |count: usize| {
            let names: Vec<String> = (0..count).map(|number| format!("p{number}")).collect();
            names.join(",")
        };
        let full = passed(&names(PROXIES_MAX - 1)).and(Some(&id("last")));
        assert_eq!(full.unwrap().and(Some(&id("one-more"))), Err(Circle));
        assert_eq!(read(&names(PROXIES_MAX + 1)), Err(Malformed));
        // Six of 64 letters, with what is between them and before them, leave room for one of a single letter.
        let long = ["a", "b", "c", "d", "e", "f"].map(|letter| letter.repeat(64));
        let long = passed(&long.join(","));
        assert_eq!(long.and(Some(&id("gg"))), Err(Circle));
        let full = long.and(Some(&id("g"))).unwrap();
        assert_eq!(full.value().unwrap().len(), VALUE_BYTES_MAX);
        assert_eq!(full.and(Some(&id("h"))), Err(Circle));
    }

    #[test]
    fn what_begins_like_a_list_and_is_none_is_malformed_and_anothers_is_not_read() {
        for names in ["", ",", "a,", "a b", "a;b", "a,,b", "ä", &"a".repeat(65)] {
            assert_eq!(read(names), Err(Malformed), "{names:?}");
        }
        assert_eq!(Passed::read(b"cdn-loop:\xff"), Err(Malformed));
        for value in [&b""[..], b"cdn-loop", b"vpce-1234", b"\x01\x02"] {
            assert_eq!(Passed::read(value), Ok(None), "{value:?}");
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_again_and_never_too_long(
            names in proptest::collection::vec("[a-z0-9._-]{1,64}", 1..20)
        ) {
            let mut passed = Passed::default();
            for name in &names {
                let Ok(more) = passed.and(Some(&id(name))) else { continue };
                let value = more.value().unwrap();
                prop_assert!(value.len() <= VALUE_BYTES_MAX);
                prop_assert_eq!(Passed::read(&value), Ok(Some(more.clone())));
                prop_assert_eq!(more.and(Some(&id(name))), Err(Circle));
                passed = more;
            }
        }

        #[test]
        fn no_value_does_any_harm(value in proptest::collection::vec(any::<u8>(), 0..600)) {
            let ours = [PREFIX, &value[..]].concat();
            if let Ok(Some(passed)) = Passed::read(&ours) {
                prop_assert_eq!(passed.value().unwrap(), ours);
            }
        }
    }
}
