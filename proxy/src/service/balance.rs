//! A property of the gate, tested: whatever comes in whatever order, nobody who was held is lost from the counters.
//!
//! `held = released + gave_up + evicted + held_now` after every step, every held time is in the histogram once, and at
//! the end nothing is in flight.

use std::net::SocketAddr;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use cutover_protocol::id::{Epoch, Register, Site};
use proptest::prelude::*;

use super::budget::{BudgetLimits, WhenFull};
use super::gate::{Admission, Gate, GateLimits};
use super::queue::{Eviction, Held, Parked};
use super::terms::{End, EndsBy, Terms};
use super::ticket::Ticket;
use super::word::Mode;
use crate::config::Release;

const WORKERS: usize = 2;

fn terms() -> Terms {
    Terms::plain(Instant::now(), SocketAddr::from(([127, 0, 0, 1], 1)))
}

/// Something that happens at a gate. Numbers pick one of those there are.
#[derive(Debug, Clone)]
enum Step {
    Arrive,
    Leave(usize),
    Look(usize),
    Hold,
    Release,
    Advance,
    Answered(usize),
    Ended(usize),
    NotConnected(usize),
    TimePasses,
    Limit(usize),
    Shut,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        12 => Just(Step::Arrive),
        3 => any::<usize>().prop_map(Step::Leave),
        6 => any::<usize>().prop_map(Step::Look),
        3 => Just(Step::Hold),
        4 => Just(Step::Release),
        1 => Just(Step::Advance),
        6 => any::<usize>().prop_map(Step::Answered),
        3 => any::<usize>().prop_map(Step::Ended),
        3 => any::<usize>().prop_map(Step::NotConnected),
        2 => Just(Step::TimePasses),
        1 => (0_usize..6).prop_map(Step::Limit),
        1 => Just(Step::Shut),
    ]
}

fn limits(held_max: usize) -> GateLimits {
    GateLimits {
        budget: BudgetLimits {
            held_max: held_max as u64,
            held_bytes_max: 0,
            held_per_address_max: 0,
            when_full: WhenFull::Wait,
        },
        hold_max: Duration::from_millis(1),
        front_timeout: None,
        release: Release {
            window_first: 2,
            window_max: 4,
            backoff_first: Duration::ZERO,
            backoff_max: Duration::ZERO,
            grace: Duration::from_secs(60),
            spread: Duration::ZERO,
            patience: Duration::from_secs(60),
        },
    }
}

struct World<'g> {
    gate: &'g Arc<Gate>,
    epoch: u64,
    waiting: Vec<Parked>,
    tickets: Vec<Ticket<'g>>,
    turn: usize,
}

fn pick<T>(all: &mut Vec<T>, which: usize) -> Option<T> {
    (!all.is_empty()).then(|| all.swap_remove(which % all.len()))
}

impl World<'_> {
    fn register(&self) -> Register {
        Register {
            epoch: Epoch(self.epoch),
            owner: Site::Source,
        }
    }

    fn keep(&mut self, parked: Result<Parked, Eviction>) {
        self.waiting.extend(parked.ok());
    }

    fn take(&mut self, step: &Step) {
        match *step {
            Step::Arrive => {
                self.turn += 1;
                match self.gate.admit(self.turn % WORKERS) {
                    Admission::Pass(ticket) => self.tickets.push(ticket),
                    Admission::Wait => {
                        let parked = self.gate.park(self.turn % WORKERS, terms());
                        self.keep(parked);
                    }
                }
            }
            Step::Leave(which) => drop(pick(&mut self.waiting, which)),
            Step::Look(which) => self.look(which),
            Step::Hold => self.gate.close(self.register()),
            Step::Release => self.gate.release(self.register()),
            Step::Advance => {
                self.epoch += 1;
                self.gate.advance(self.register());
            }
            Step::Answered(which) => {
                if let Some(ticket) = pick(&mut self.tickets, which) {
                    ticket.answered(200);
                }
            }
            Step::Ended(which) => drop(pick(&mut self.tickets, which)),
            Step::NotConnected(which) => {
                if let Some(ticket) = pick(&mut self.tickets, which)
                    && let Some(parked) = ticket.wait_again(self.gate, terms())
                {
                    self.keep(parked);
                }
            }
            Step::TimePasses => drop(self.gate.tend(Instant::now() + Duration::from_millis(2))),
            Step::Limit(held_max) => self.gate.limit(limits(held_max)),
            Step::Shut => self.gate.shut(),
        }
    }

    /// One who waits looks whether there is a verdict.
    fn look(&mut self, which: usize) {
        let Some(mut parked) = pick(&mut self.waiting, which) else {
            return;
        };
        let verdict = {
            let verdict = std::pin::pin!(parked.verdict(self.gate));
            verdict.poll(&mut Context::from_waker(Waker::noop()))
        };
        match verdict {
            Poll::Ready(Ok(ticket)) => self.tickets.push(ticket),
            Poll::Ready(Err(_)) => {}
            Poll::Pending => self.waiting.push(parked),
        }
    }

    fn check(&self) {
        let look = |held: &Held| (held.counts(), held.times().buckets.iter().sum::<u64>());
        let (counts, timed) = self.gate.with_held(look);
        let gone = counts.released + counts.gave_up + counts.evicted;
        assert_eq!(counts.held, gone + counts.held_now, "{counts:?}");
        assert_eq!(timed, gone, "{counts:?}");
        assert!(counts.held_now <= self.waiting.len() as u64, "{counts:?}");
        // Whoever has a verdict on its way is in flight already.
        let most = self.tickets.len() + self.waiting.len();
        assert!(self.gate.in_flight() >= self.tickets.len() as u64);
        assert!(self.gate.in_flight() <= most as u64);
    }
}

proptest! {
    #[test]
    fn the_counters_of_the_held_balance_whatever_happens(
        steps in proptest::collection::vec(step(), 1..200),
    ) {
        let register = Register { epoch: Epoch(1), owner: Site::Source };
        let gate = Arc::new(Gate::new(limits(8), WORKERS, Mode::Open, register));
        let mut world = World {
            gate: &gate,
            epoch: 1,
            waiting: Vec::new(),
            tickets: Vec::new(),
            turn: 0,
        };
        for step in &steps {
            world.take(step);
            world.check();
        }
        world.waiting.clear();
        world.tickets.clear();
        world.check();
        prop_assert_eq!(gate.in_flight(), 0);
        prop_assert_eq!(gate.with_held(Held::counts).held_now, 0);
    }
}

#[test]
fn a_release_refuses_whose_own_time_is_over_and_lets_the_others_through() {
    let register = Register {
        epoch: Epoch(1),
        owner: Site::Source,
    };
    let gate = Arc::new(Gate::new(limits(8), WORKERS, Mode::Holding, register));
    gate.limit(GateLimits {
        hold_max: Duration::from_secs(60),
        ..limits(8)
    });
    let late = Terms {
        end: Some(End {
            at: Instant::now(),
            by: EndsBy::Deadline,
        }),
        ..terms()
    };
    let mut late = gate.park(0, late).unwrap();
    let mut other = gate.park(0, terms()).unwrap();
    gate.release(register);
    let look = |parked: &mut Parked| {
        let verdict = std::pin::pin!(parked.verdict(&gate));
        match verdict.poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(verdict) => verdict.map(drop),
            Poll::Pending => panic!("still held"),
        }
    };
    assert_eq!(look(&mut late), Err(Eviction::OutOfTime));
    assert_eq!(look(&mut other), Ok(()));
    let counts = gate.with_held(Held::counts);
    assert_eq!((counts.evicted, counts.released), (1, 1));
}
