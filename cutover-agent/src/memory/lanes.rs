//! Turns on the link: who of several containers sends next, by the plan's schedule. It blocks threads, never tasks, and
//! nobody waits for a container that has nothing to send.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use cutover_protocol::schedule::{Lane, Schedule, Standing};

use super::wire::FRAME_DATA_MAX;

/// A container that had something to send so recently will have more: reading and hashing the next frame takes a few
/// milliseconds, on a busy machine some tens. What the streams' queue holds lasts longer at 1 Gbit/s, so the link does
/// not run dry meanwhile.
const READY_FOR: Duration = Duration::from_millis(100);
/// One whose last frame took longer may take twice as long for the next one, up to this long in all.
const READY_FOR_MAX: Duration = Duration::from_secs(1);
/// Lanes turn idle, and streams too, without a word: who waits for a turn looks so often.
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// When turns are kept to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Turns {
    /// Always: where everything moves, whoever ran ahead would be done early, however fast the link.
    Always,
    /// While every stream is busy: where little of what is read has to move, a turn that leaves a stream idle only costs
    /// time.
    WhileBusy,
}

/// What one container moves, as somebody watching sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Moved {
    /// The container.
    pub(crate) container: String,
    /// Bytes of its memory that were looked at and, where needed, sent.
    pub(crate) done_bytes: u64,
    /// Bytes of its memory, as far as known.
    pub(crate) total_bytes: u64,
    /// How long it waited for its turns and for room on the link.
    pub(crate) waited: Duration,
    /// When it was done, after the beginning.
    pub(crate) took: Option<Duration>,
}

/// The lanes of one round, or of one dump.
#[derive(Debug)]
pub(crate) struct Lanes {
    schedule: Schedule,
    turns: Turns,
    began: Instant,
    state: Mutex<Vec<State>>,
    moved: Condvar,
}

#[derive(Debug)]
struct State {
    container: String,
    total_bytes: u64,
    done_bytes: u64,
    is_waiting: bool,
    /// When it sent last.
    sent: Instant,
    ready_until: Instant,
    waited: Duration,
    took: Option<Duration>,
}

impl State {
    fn lane(&self, now: Instant) -> Lane {
        let standing = if self.took.is_some() {
            Standing::Over
        } else if self.is_waiting || now < self.ready_until {
            Standing::Ready
        } else {
            Standing::Idle
        };
        Lane {
            total_bytes: self.total_bytes,
            done_bytes: self.done_bytes,
            standing,
        }
    }
}

impl Lanes {
    /// One lane for each container, with the bytes it will look at.
    pub(crate) fn new(
        (schedule, turns): (Schedule, Turns),
        containers: Vec<(String, u64)>,
    ) -> Arc<Self> {
        let now = Instant::now();
        let state = containers
            .into_iter()
            .map(|(container, total_bytes)| State {
                container,
                total_bytes,
                done_bytes: 0,
                is_waiting: false,
                sent: now,
                ready_until: now + READY_FOR,
                waited: Duration::ZERO,
                took: None,
            })
            .collect();
        Arc::new(Self {
            schedule,
            turns,
            began: now,
            state: Mutex::new(state),
            moved: Condvar::new(),
        })
    }

    /// A container's own lane. Dropped, it is over, and nobody waits for it.
    pub(crate) fn enter(self: &Arc<Self>, index: usize) -> OwnLane {
        OwnLane {
            lanes: Arc::clone(self),
            index,
        }
    }

    /// How long ago the round, or the dump, began.
    pub(crate) fn elapsed(&self) -> Duration {
        self.began.elapsed()
    }

    /// How far each has come.
    pub(crate) fn moved(&self) -> Vec<Moved> {
        let moved = |state: &State| Moved {
            container: state.container.clone(),
            done_bytes: state.done_bytes,
            total_bytes: state.total_bytes.max(state.done_bytes),
            waited: state.waited,
            took: state.took,
        };
        self.lock().iter().map(moved).collect()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<State>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// See [`Lanes::enter`].
#[derive(Debug)]
pub(crate) struct OwnLane {
    lanes: Arc<Lanes>,
    index: usize,
}

impl OwnLane {
    /// Counts bytes that were looked at.
    pub(crate) fn count(&self, bytes: u64) {
        if let Some(state) = self.lanes.lock().get_mut(self.index) {
            state.done_bytes += bytes;
        }
        self.lanes.moved.notify_all();
    }

    /// Waits for a turn, and has something to send until `send` is over. Others may have theirs meanwhile, but none of a
    /// gang goes ahead of one that waits for the link. `is_idle` says whether a stream has nothing to send.
    pub(crate) fn send<T>(&self, is_idle: impl Fn() -> bool, send: impl FnOnce() -> T) -> T {
        let began = Instant::now();
        let took = self.begin_waiting(began);
        let mut states = self.lanes.lock();
        loop {
            let now = Instant::now();
            let lanes: Vec<Lane> = states.iter().map(|state| state.lane(now)).collect();
            let frame = FRAME_DATA_MAX as u64;
            let is_free = || self.lanes.turns == Turns::WhileBusy && is_idle();
            if self.lanes.schedule.may_send(&lanes, self.index, frame) || is_free() {
                break;
            }
            states = self
                .lanes
                .moved
                .wait_timeout(states, LOOK_EVERY)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        drop(states);
        let sent = send();
        self.end_waiting(began, took);
        sent
    }

    /// It has something to send; gives how long that took.
    fn begin_waiting(&self, now: Instant) -> Duration {
        let mut took = Duration::ZERO;
        if let Some(state) = self.lanes.lock().get_mut(self.index) {
            state.is_waiting = true;
            took = now.duration_since(state.sent);
        }
        self.lanes.moved.notify_all();
        took
    }

    /// It has sent what took so long, and waited for it since `began`.
    fn end_waiting(&self, began: Instant, took: Duration) {
        if let Some(state) = self.lanes.lock().get_mut(self.index) {
            state.is_waiting = false;
            state.sent = Instant::now();
            state.waited += state.sent.duration_since(began);
            state.ready_until = state.sent + ready_for(took);
        }
        self.lanes.moved.notify_all();
    }
}

/// How long a container counts as ready whose last frame took so long.
fn ready_for(took: Duration) -> Duration {
    (took * 2).clamp(READY_FOR, READY_FOR_MAX)
}

impl Drop for OwnLane {
    fn drop(&mut self) {
        let took = self.lanes.began.elapsed();
        if let Some(state) = self.lanes.lock().get_mut(self.index) {
            state.took.get_or_insert(took);
        }
        self.lanes.moved.notify_all();
    }
}

/// How far apart containers finished, as a share of the time until the last one did; 0 for one alone.
pub(crate) fn spread_percent(moved: &[Moved]) -> f64 {
    let seconds: Vec<f64> = moved
        .iter()
        .filter_map(|one| one.took)
        .map(|took| took.as_secs_f64())
        .collect();
    let first = seconds.iter().copied().fold(f64::INFINITY, f64::min);
    let last = seconds.iter().copied().fold(0.0, f64::max);
    if last > 0.0 {
        (last - first) / last * 100.0
    } else {
        0.0
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    /// Lanes of two containers of one size.
    fn two(order: (Schedule, Turns)) -> (Arc<Lanes>, OwnLane, OwnLane) {
        let totals = vec![("a".to_owned(), 100), ("b".to_owned(), 100)];
        let lanes = Lanes::new(order, totals);
        let (first, second) = (lanes.enter(0), lanes.enter(1));
        (lanes, first, second)
    }

    #[test]
    fn a_lane_that_is_over_keeps_nobody_waiting() {
        let (lanes, first, second) = two((Schedule::Sequential, Turns::Always));
        let waiting = std::thread::spawn(move || second.send(|| true, || 7));
        first.send(|| true, || ());
        drop(first);
        assert_eq!(waiting.join().unwrap(), 7);
        assert!(lanes.moved().iter().all(|one| one.took.is_some()));
    }

    #[test]
    fn who_is_behind_goes_first() {
        let (_, ahead, behind) = two((Schedule::Gang, Turns::Always));
        ahead.count(50);
        let order = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&order);
        behind.begin_waiting(Instant::now());
        let waiting =
            std::thread::spawn(move || ahead.send(|| true, || seen.lock().unwrap().push("ahead")));
        behind.send(|| true, || order.lock().unwrap().push("behind"));
        drop(behind);
        waiting.join().unwrap();
        assert_eq!(*order.lock().unwrap(), ["behind", "ahead"]);
    }

    #[test]
    fn who_is_ahead_uses_a_stream_that_would_be_idle_where_turns_need_not_be_kept() {
        let (_, ahead, behind) = two((Schedule::Gang, Turns::WhileBusy));
        ahead.count(50);
        behind.begin_waiting(Instant::now());
        // The one behind waits for the link all the time.
        assert_eq!(ahead.send(|| true, || 7), 7);
        let looks = AtomicUsize::new(0);
        let is_idle = || looks.fetch_add(1, Ordering::Relaxed) == 3;
        ahead.send(is_idle, || ());
        assert_eq!(looks.into_inner(), 4);
    }

    #[test]
    fn nobody_goes_ahead_of_one_that_waits_for_the_link() {
        let (lanes, ahead, behind) = two((Schedule::Gang, Turns::Always));
        ahead.count(50);
        let is_sent = Arc::new(AtomicUsize::new(0));
        let sent = Arc::clone(&is_sent);
        let waiting = behind.send(
            || false,
            || {
                let send = move || ahead.send(|| true, || sent.store(1, Ordering::Relaxed));
                let waiting = std::thread::spawn(send);
                // Longer than the other counts as ready by its last frame.
                while lanes.lock()[1].ready_until >= Instant::now() {
                    std::thread::yield_now();
                }
                assert_eq!(is_sent.load(Ordering::Relaxed), 0);
                waiting
            },
        );
        drop(behind);
        waiting.join().unwrap();
        assert_eq!(is_sent.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn who_takes_long_for_a_frame_is_given_time_for_the_next_but_not_for_ever() {
        let millis = Duration::from_millis;
        assert_eq!(ready_for(millis(3)), READY_FOR);
        assert_eq!(ready_for(millis(90)), millis(180));
        assert_eq!(ready_for(Duration::from_secs(60)), READY_FOR_MAX);
    }

    #[test]
    fn the_spread_is_a_share_of_the_whole_time() {
        let moved = |millis| Moved {
            container: String::new(),
            done_bytes: 0,
            total_bytes: 0,
            waited: Duration::ZERO,
            took: Some(Duration::from_millis(millis)),
        };
        assert!((spread_percent(&[moved(970), moved(1000)]) - 3.0).abs() < 1e-9);
        assert!(spread_percent(&[]).abs() < 1e-9);
    }
}
