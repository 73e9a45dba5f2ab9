//! Commands that contradict each other, at the same moment and in a thousand orders: one wins, everybody else is told
//! the register, and the file says what was said.

use std::sync::Barrier;
use std::thread;

use cutover_protocol::hold::{Answer, Command, Gate, ServiceStatus};
use cutover_protocol::id::{Epoch, Register, Site};

use crate::holding::balanced;
use crate::seed::Seed;
use crate::world::{Control, Origin, Plan, World, done, hold, web};

const ROUNDS: usize = 1000;

/// What one commander wants of a hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wish {
    /// The other site is to serve.
    Move,
    /// The owner is to go on.
    Reopen,
    /// The other site is to serve, by a commander who missed the last decision.
    MoveLate,
    /// The owner is to go on, by such a commander.
    ReopenLate,
}

/// Who meets in a round, and whether the lease ends while they do.
const MEETINGS: [(&[Wish], Lease); 8] = [
    (&[Wish::Move, Wish::Reopen], Lease::Long),
    (&[Wish::Move, Wish::Move], Lease::Long),
    (&[Wish::Reopen, Wish::Reopen], Lease::Long),
    (&[Wish::Move, Wish::MoveLate], Lease::Long),
    (&[Wish::Move, Wish::ReopenLate], Lease::Long),
    (&[Wish::Move], Lease::Ends),
    (&[Wish::Move, Wish::Reopen], Lease::Ends),
    (&[Wish::Reopen, Wish::MoveLate], Lease::Ends),
];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lease {
    Long,
    Ends,
}

const fn other(site: Site) -> Site {
    match site {
        Site::Source => Site::Target,
        Site::Target => Site::Source,
    }
}

/// Decides and releases at once, whatever came of the decision: a script that does not look.
fn act(control: &mut Control, wish: Wish, before: Register) -> [Answer; 2] {
    let epoch = match wish {
        Wish::Move | Wish::Reopen => before.epoch,
        Wish::MoveLate | Wish::ReopenLate => Epoch(before.epoch.0 - 1),
    };
    let service = web();
    let (decide, to) = match wish {
        Wish::Move | Wish::MoveLate => {
            let to = other(before.owner);
            (Command::Commit { service, epoch, to }, to)
        }
        Wish::Reopen | Wish::ReopenLate => (Command::Abort { service, epoch }, before.owner),
    };
    let release = Command::Release {
        service: web(),
        epoch: epoch.next(),
        to,
    };
    [control.say(&decide), control.say(&release)]
}

/// Whether it took effect; if not, it was told a register that is `possible`.
fn won(answer: &Answer, possible: &[Register]) -> bool {
    match answer {
        Answer::Done { service } => {
            assert!(possible.contains(&service.register), "{answer:?}");
            true
        }
        Answer::Refused { register, .. } => {
            assert!(possible.contains(&register.unwrap()), "{answer:?}");
            false
        }
        other => panic!("{other:?}"),
    }
}

fn on_disk(world: &World) -> (Register, bool) {
    let text = std::fs::read(world.folder.path().join("state/web.json")).unwrap();
    let record: serde_json::Value = serde_json::from_slice(&text).unwrap();
    let register = serde_json::from_value(record["register"].clone()).unwrap();
    (register, record["gate"]["is"] == "open")
}

fn hold_anew(world: &World, lease: Lease, seed: &mut Seed) -> Register {
    let mut control = world.control();
    let before = world.status().register;
    let lease_ms = match lease {
        Lease::Long => 60_000,
        Lease::Ends => 1 + seed.below(5),
    };
    match control.say(&hold(before.epoch, lease_ms, 20_000)) {
        Answer::Done { .. } => {}
        // The lease was shorter than the way of this answer.
        Answer::Refused { .. } if lease == Lease::Ends => {}
        other => panic!("{other:?}"),
    }
    before
}

fn meet(world: &World, wishes: &[Wish], before: Register, seed: &mut Seed) -> Vec<[Answer; 2]> {
    let barrier = Barrier::new(wishes.len());
    thread::scope(|scope| {
        let begin = |wish: &Wish| {
            let (wish, barrier, mut control) = (*wish, &barrier, world.control());
            let head_start = seed.below(300);
            scope.spawn(move || {
                barrier.wait();
                for _ in 0..head_start {
                    thread::yield_now();
                }
                act(&mut control, wish, before)
            })
        };
        let threads: Vec<_> = wishes.iter().map(begin).collect();
        let join = |thread: thread::ScopedJoinHandle<'_, _>| thread.join().unwrap();
        threads.into_iter().map(join).collect()
    })
}

/// Each decision that took effect is the one the register shows; each other one was told so.
fn judge(wishes: &[Wish], answers: &[[Answer; 2]], before: Register, after: Register) -> usize {
    assert_eq!(after.epoch, before.epoch.next(), "{answers:?}");
    let mut winners = 0;
    for (wish, [decided, released]) in wishes.iter().zip(answers) {
        let wins = match wish {
            Wish::Move => after.owner == other(before.owner),
            Wish::Reopen => after.owner == before.owner,
            // It may have been told before anybody has won; the abort it repeats has been, and is done until then.
            Wish::MoveLate | Wish::ReopenLate => {
                let repeats = won(decided, &[before, after]);
                assert!(!repeats || *wish == Wish::ReopenLate, "{answers:?}");
                assert!(!won(released, &[before, after]), "{answers:?}");
                continue;
            }
        };
        assert_eq!(won(decided, &[after]), wins, "{wish:?}: {answers:?}");
        assert_eq!(won(released, &[after]), wins, "{wish:?}: {answers:?}");
        winners += usize::from(wins);
    }
    winners
}

#[test]
fn of_a_thousand_meetings_each_has_one_winner_and_the_losers_are_told() {
    let (source, target) = (Origin::new("source"), Origin::new("target"));
    // In memory where that can be: the disk's pace is no part of this, and its files are the same.
    let folder = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir());
    let world = Plan::new(source.address(), target.address()).start_in(folder.unwrap());
    // So that there is an epoch to be late by.
    done(world.control().say(&Command::Abort {
        service: web(),
        epoch: Epoch(1),
    }));
    let mut seed = Seed::new(8);
    let (mut moved, mut stayed, mut client) = (0, 0, world.client());
    for round in 0..ROUNDS {
        let (wishes, lease) = MEETINGS[round % MEETINGS.len()];
        let before = hold_anew(&world, lease, &mut seed);
        client.post(&format!("/{round}"), "x");
        let answers = meet(&world, wishes, before, &mut seed);
        let is_over = |status: &ServiceStatus| {
            status.gate == Gate::Open && status.register.epoch > before.epoch
        };
        let after = world.until(is_over).register;
        let winners = judge(wishes, &answers, before, after);
        let has_moved = after.owner != before.owner;
        assert!(
            winners > 0 || (lease == Lease::Ends && !has_moved),
            "{answers:?}"
        );
        assert_eq!(on_disk(&world), (after, true));
        let answer = client.message();
        assert_eq!(answer.body, format!("{} POST /{round} x", after.owner));
        moved += usize::from(has_moved);
        stayed += usize::from(!has_moved);
    }
    // Neither side of a meeting always wins, so the orders were many.
    assert!(
        moved > ROUNDS / 10 && stayed > ROUNDS / 10,
        "{moved} {stayed}"
    );
    assert_eq!(source.seen().len() + target.seen().len(), ROUNDS);
    balanced(&world);
}
