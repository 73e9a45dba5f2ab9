//! Where faults strike. Every deed of the simulated world asks here first, so a fault can come before an action,
//! between any two of its deeds, or after its last one, when only the answer is lost.

/// What goes wrong at one point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    /// The action fails here; what it did so far stays done.
    Fails,
    /// The driver dies here.
    Crashes,
    /// A message sent here is given up by its sender, and arrives later.
    Late,
    /// The arbiter cannot write its state, and says so; anything else fails.
    NotDurable,
    /// The target is out of reach for a while, from here on.
    TargetGone,
    /// It never comes back while this hop lasts. Not drawn: after the commit, such a hop cannot end.
    TargetLost,
}

impl Fault {
    pub(super) const ALL: [Self; 5] = [
        Self::Fails,
        Self::Crashes,
        Self::Late,
        Self::NotDurable,
        Self::TargetGone,
    ];
}

/// Xorshift: small, and the same for ever, so that a seed names one run.
#[derive(Debug)]
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        // Seeds differ in few bits; without the product the first draws of neighbours would agree.
        Self(seed.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    /// Evenly from 0 to `below - 1`, near enough.
    pub(super) fn below(&mut self, below: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % below
    }

    pub(super) fn one_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }
}

/// Which faults a run meets.
#[derive(Debug)]
pub(super) enum Faults {
    /// These, each at its point, counted from 0; nothing else.
    At(Vec<(u32, Fault)>),
    /// Drawn; about one in `rarity` points, as long as any are left.
    Drawn {
        random: Random,
        rarity: u64,
        left: u32,
    },
}

impl Faults {
    pub(super) fn drawn(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let rarity = 2 + random.below(30);
        let left = 1 + u32::try_from(random.below(24)).unwrap();
        Self::Drawn {
            random,
            rarity,
            left,
        }
    }

    /// What strikes at this point.
    pub(super) fn strike(&mut self, point: u32) -> Option<Fault> {
        match self {
            Self::At(faults) => faults
                .iter()
                .find(|(at, _)| *at == point)
                .map(|(_, fault)| *fault),
            Self::Drawn {
                random,
                rarity,
                left,
            } => {
                if *left == 0 || !random.one_in(*rarity) {
                    return None;
                }
                *left -= 1;
                let which = usize::try_from(random.below(Fault::ALL.len() as u64)).unwrap();
                Some(Fault::ALL[which])
            }
        }
    }

    /// True until the last drawn fault has struck: then everything is to come right.
    pub(super) const fn are_left(&self) -> bool {
        match self {
            Self::At(_) => false,
            Self::Drawn { left, .. } => *left > 0,
        }
    }

    /// Whether something happens that only chance brings about: never in a run with chosen faults.
    pub(super) fn chance(&mut self, times: u64) -> bool {
        match self {
            Self::At(_) => false,
            Self::Drawn { random, .. } => random.one_in(times),
        }
    }
}
