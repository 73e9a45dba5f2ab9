//! The old door: how names are turned to the target after a commit, and when nobody comes by the source any more.
//! Pure: times arrive as arguments, in seconds since the commit.

use serde::{Deserialize, Serialize};

/// How names are turned. The source forwards whoever still comes there, whatever the mode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "kebab-case")]
pub enum Redirect {
    /// All names at the commit.
    #[default]
    AtOnce,
    /// One name after the other, in the order of the configuration, a step apart.
    PerService,
    /// Every name gives both sites first, then the target alone: about half of the clients move a step earlier.
    Gradual,
}

/// Where a name points.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Pointing {
    /// To the source alone.
    Source,
    /// To both; resolvers pick one or the other.
    Both,
    /// To the target alone.
    Target,
}

impl Redirect {
    /// Where the name at `index` is to point, so many seconds after the commit; before it, to the source.
    #[must_use]
    pub const fn pointing(self, index: u64, since_s: Option<u64>, step_s: u64) -> Pointing {
        let Some(since_s) = since_s else {
            return Pointing::Source;
        };
        match self {
            Self::AtOnce => Pointing::Target,
            Self::PerService if since_s >= index.saturating_mul(step_s) => Pointing::Target,
            Self::PerService => Pointing::Source,
            Self::Gradual if since_s >= step_s => Pointing::Target,
            Self::Gradual => Pointing::Both,
        }
    }

    /// Seconds after the commit until all of `names` names point to the target alone.
    #[must_use]
    pub const fn turned_s(self, names: u64, step_s: u64) -> u64 {
        match self {
            Self::AtOnce => 0,
            Self::PerService => names.saturating_sub(1).saturating_mul(step_s),
            Self::Gradual => step_s,
        }
    }
}

/// What is known of those who come by the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    /// Seconds since the commit.
    pub since_s: u64,
    /// Seconds since somebody last came.
    pub quiet_s: u64,
    /// Who is there now: requests and connections that are under way.
    pub now: u64,
}

/// Whether the old door can be closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "close")]
pub enum Closing {
    /// Nobody will miss it.
    Now,
    /// Somebody is there.
    Busy,
    /// Nobody is there, but some may still know the old address; safe after so many seconds if nobody comes.
    In {
        /// Seconds.
        seconds: u64,
    },
}

/// When the old door can be closed: every resolver has forgotten the old answer (`ttl_s` after the last name was
/// turned, `turned_s` after the commit), and nobody came for as long.
#[must_use]
pub fn closing(seen: Seen, turned_s: u64, ttl_s: u64) -> Closing {
    if seen.now > 0 {
        return Closing::Busy;
    }
    let forgotten = turned_s.saturating_add(ttl_s).saturating_sub(seen.since_s);
    let quiet = ttl_s.saturating_sub(seen.quiet_s);
    match forgotten.max(quiet) {
        0 => Closing::Now,
        seconds => Closing::In { seconds },
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn mode() -> impl Strategy<Value = Redirect> {
        prop_oneof![
            Just(Redirect::AtOnce),
            Just(Redirect::PerService),
            Just(Redirect::Gradual)
        ]
    }

    fn rank(pointing: Pointing) -> u8 {
        match pointing {
            Pointing::Source => 0,
            Pointing::Both => 1,
            Pointing::Target => 2,
        }
    }

    proptest! {
        #[test]
        fn a_name_never_turns_back_and_is_turned_when_it_was_said(
            mode in mode(), names in 1_u64..10, step_s in 0_u64..600, a in 0_u64..10_000, b in 0_u64..10_000,
        ) {
            let (early, late) = (a.min(b), a.max(b));
            for index in 0..names {
                let at = |since_s| rank(mode.pointing(index, Some(since_s), step_s));
                prop_assert!(at(early) <= at(late));
                prop_assert_eq!(at(mode.turned_s(names, step_s)), 2);
                prop_assert_eq!(mode.pointing(index, None, step_s), Pointing::Source);
            }
        }

        #[test]
        fn the_door_is_never_closed_on_anybody_or_while_an_old_answer_lives(
            since_s in 0_u64..5000, quiet_s in 0_u64..5000, now in 0_u64..3, turned_s in 0_u64..2000, ttl_s in 0_u64..2000,
        ) {
            let closing = closing(Seen { since_s, quiet_s, now }, turned_s, ttl_s);
            if closing == Closing::Now {
                prop_assert!(now == 0 && since_s >= turned_s + ttl_s && quiet_s >= ttl_s);
            }
            // Whoever waits as long as he is told, and nobody comes, may close it.
            if let Closing::In { seconds } = closing {
                let later = Seen { since_s: since_s + seconds, quiet_s: quiet_s + seconds, now };
                prop_assert_eq!(super::closing(later, turned_s, ttl_s), Closing::Now);
            }
        }
    }
}
