//! Whole hops through a small world, with a fault at every point where one can strike, and with thousands of
//! drawn sequences of faults. `HOP_SEED=n` replays one drawn run; `HOP_SEEDS=n` draws n of them.

mod fault;
mod run;
mod world;

use std::env;

use super::Ending;
use fault::{Fault, Faults};
use run::{Account, CALM, Circumstances, Run};
use world::World;

const SEEDS: u64 = 4000;

fn run_with(faults: &[(u32, Fault)], circumstances: Circumstances) -> Account {
    let name = format!("{faults:?} with {circumstances:?}");
    let faults = Faults::At(faults.to_vec());
    Run::new(name, World::new(), faults, circumstances).judge()
}

fn every_circumstance() -> impl Iterator<Item = Circumstances> {
    [false, true].into_iter().flat_map(|lease_is_short| {
        [1, 2, 3, 4, 8, 1000].map(|late_records| Circumstances {
            lease_is_short,
            late_records,
        })
    })
}

#[test]
fn without_faults_the_target_serves() {
    let account = run_with(&[], CALM);
    assert_eq!(account.ending, Ending::Committed);
    assert!(account.points > 60, "only {} points", account.points);
}

#[test]
fn a_hop_survives_each_fault_at_each_point() {
    let mut endings = [0, 0];
    for point in 0..run_with(&[], CALM).points {
        for fault in Fault::ALL {
            for circumstances in every_circumstance() {
                let ending = run_with(&[(point, fault)], circumstances).ending;
                endings[usize::from(ending == Ending::Committed)] += 1;
            }
        }
    }
    assert!(endings.iter().all(|count| *count > 500), "{endings:?}");
}

#[test]
fn a_driver_may_die_at_every_record_and_again_while_it_recovers() {
    for point in run_with(&[], CALM).record_points {
        for circumstances in every_circumstance() {
            let first = (point, Fault::Crashes);
            let recovering = run_with(&[first], circumstances).record_points;
            for next in recovering.into_iter().filter(|next| *next > point) {
                run_with(&[first, (next, Fault::Crashes)], circumstances);
            }
        }
    }
}

#[test]
fn a_target_that_never_comes_back_does_not_keep_the_source_from_serving() {
    let calm = run_with(&[], CALM);
    // The last action before the commit asks the target for the last time; its success is the eleventh record.
    for point in 0..calm.record_points[10] - 2 {
        let account = run_with(&[(point, Fault::TargetLost)], CALM);
        assert_eq!(account.ending, Ending::Undone, "at {point}");
    }
}

#[test]
fn a_hop_survives_every_pair_of_faults() {
    for point in 0..run_with(&[], CALM).points {
        for first in Fault::ALL.map(|fault| (point, fault)) {
            for next in point + 1..run_with(&[first], CALM).points {
                for second in Fault::ALL.map(|fault| (next, fault)) {
                    run_with(&[first, second], CALM);
                }
            }
        }
    }
}

#[test]
fn a_hop_survives_drawn_faults() {
    if let Ok(seed) = env::var("HOP_SEED") {
        let account = drawn(seed.parse().unwrap());
        println!("{}\n{:?}", account.trace.join("\n"), account.ending);
        return;
    }
    let seeds = env::var("HOP_SEEDS").map_or(SEEDS, |count| count.parse().unwrap());
    let endings = (0..seeds).map(|seed| drawn(seed).ending);
    let committed = endings.filter(|one| *one == Ending::Committed).count() as u64;
    assert!(
        committed > seeds / 50 && committed < seeds / 2,
        "{committed} of {seeds} hops were committed: the faults are too rare, or too many"
    );
}

fn drawn(seed: u64) -> Account {
    let name = format!("HOP_SEED={seed}");
    Run::new(name, World::new(), Faults::drawn(seed), CALM).judge()
}
