//! Decides for each frame whether packing it pays, and how strongly.
//!
//! A ladder of ever stronger methods; on the last rung frames are linked. All collectors of a session stand on one rung of
//! it, and move by what they see when they hand a frame over. What a rung gives is the less of two: what its packers make in a
//! second, and what the wire takes in a second, unpacked. While frames wait, the wire's speed is measured, and they step to the
//! rung beside them that gives more, if one does. While streams are idle because of the packing, the wire is faster than was
//! thought, nobody knows by how much: they think more and more of it, until a weaker rung would give more, and more
//! slowly each time that was wrong. While streams are idle because frames come slowly, some packing costs nothing.
//! A sample of each frame says first whether it can shrink at all.

use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use cutover_protocol::plan::Compress;

use tokio::sync::Semaphore;

use super::linked::{self, Linker, Turn};
use super::wire::Codec;

/// What can be done to a frame, weakest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Method {
    Plain,
    Lz4,
    Zstd(i32),
    /// As zstd at this level where frames cannot be linked.
    Linked(i32),
}

/// A rung of the ladder, and how it compares with the others: what is measured of one tells of those that were not.
struct Rung {
    method: Method,
    /// MB/s of one thread on a modest core.
    speed: u32,
    /// What it leaves of bytes that can shrink, against what zstd's weakest leaves, in percent.
    leaves_percent: u32,
}

const fn rung(method: Method, speed: u32, leaves_percent: u32) -> Rung {
    Rung {
        method,
        speed,
        leaves_percent,
    }
}

const LADDER: [Rung; 6] = [
    rung(Method::Plain, u32::MAX, 100),
    rung(Method::Lz4, 600, 140),
    rung(Method::Zstd(1), 350, 100),
    rung(Method::Zstd(3), 180, 95),
    rung(Method::Zstd(6), 70, 90),
    rung(Method::Linked(9), 40, 80),
];
/// The weakest rung of zstd.
const ZSTD_RUNG: usize = 2;
/// The one where frames are linked, the last.
const LINKED_RUNG: usize = LADDER.len() - 1;
/// Where everybody begins: on a slow link the first megabytes count, and a fast one is known by its idle streams within
/// some tens of milliseconds.
const FIRST_RUNG: usize = LINKED_RUNG;
/// Packing threads of a round, see `plan`.
const THREADS: f64 = 2.0;
/// Packers reach this part of their measured speed: they also read and hash.
const PACKING_SHARE: f64 = 0.6;
/// A step is worth it when the other rung gives so much more.
const WORTH_A_STEP: f64 = 1.02;
/// Idle streams met by frames in a row are added up, and the wire is thought so much faster when they come to this many
/// more than streams, for each stream there is. The first frames of a round always meet idle streams: half as many.
const IDLE_BEYOND_STREAMS: u32 = 4;
const FASTER: f64 = 1.5;
/// How often that must come about, at most, before the wire is thought faster.
const PATIENCE_MAX: u32 = 32;
/// Streams are idle because of the packing when it takes more than this part of a packer's time; a step up because
/// frames come slowly must leave it at half of that.
const BUSY: f64 = 0.1;
/// The strongest rung for frames that come slowly: with a stronger one a burst of them would have to wait.
const LEISURE_RUNG: usize = ZSTD_RUNG;
/// A longer pause before a frame tells nothing of the next one.
const GAP_MAX: Duration = Duration::from_millis(50);
/// Packing is strong, and large frames are worth it, when it leaves less than this, in thousandths.
const STRONG_PERMILLE: u32 = 600;
/// A frame is sampled at so many places, so many bytes each.
const SAMPLES: usize = 4;
const SAMPLE_BYTES: usize = 4 << 10;
/// What does not shrink to this share of itself is not worth unpacking.
const WORTH_PERCENT: usize = 94;
/// Who sends so few bytes while every stream is idle waits for them alone, and a packer may have its tables yet to make.
const SMALL_BYTES: usize = 16 << 10;
/// A rate is looked at over at least this long.
const WINDOW: Duration = Duration::from_millis(50);

/// What the streams of a session make of frames, and on which rung their packers stand.
#[derive(Debug)]
pub(crate) struct Gauge {
    rung: AtomicUsize,
    idle_in_a_row: AtomicU32,
    /// Speed of each rung, MB/s of one thread.
    speeds: Measured,
    /// What each rung leaves of frames that can shrink, in thousandths.
    left_permille: Measured,
    flow: Mutex<Flow>,
    /// Of rounds whose frames are linked.
    places: Arc<Semaphore>,
}

/// A figure of each rung; 0 until it was measured.
#[derive(Debug)]
struct Measured([AtomicU32; LADDER.len()]);

#[derive(Debug)]
struct Flow {
    since: Instant,
    sent: u64,
    /// What the wire takes, at least; nothing as long as frames have never waited for it.
    bytes_per_second: Option<f64>,
    /// Whether that was raised by a guess since it was measured.
    is_raised: bool,
    /// How often streams were idle for long since then, and how often they have to be before it is raised.
    long_idle: u32,
    patience: u32,
}

/// What somebody with a frame in hand sees of the streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Look {
    /// Streams with nothing to send.
    pub(crate) idle: usize,
    /// All streams.
    pub(crate) streams: usize,
    /// Whether frames wait, half a queue or more.
    pub(crate) is_backlog: bool,
    /// All bytes that streams have taken so far.
    pub(crate) sent: u64,
}

impl Gauge {
    pub(crate) fn new() -> Self {
        Self {
            rung: AtomicUsize::new(FIRST_RUNG),
            idle_in_a_row: AtomicU32::new(0),
            speeds: Measured::none(),
            left_permille: Measured::none(),
            flow: Mutex::new(Flow {
                since: Instant::now(),
                sent: 0,
                bytes_per_second: None,
                is_raised: false,
                long_idle: 0,
                patience: 1,
            }),
            places: Arc::new(Semaphore::new(linked::ROUNDS_MAX)),
        }
    }

    /// Whether frames are packed so strongly that large ones are worth it.
    pub(super) fn is_strong(&self) -> bool {
        let rung = self.rung.load(Ordering::Relaxed);
        rung > ZSTD_RUNG && self.left(rung) * 1e3 < f64::from(STRONG_PERMILLE)
    }

    /// Takes note of what a collector sees with a frame of so many bytes, so long after the one before, and moves the rung
    /// when there is reason to.
    fn look(&self, look: Look, (bytes, gap): (usize, Duration), now: Instant) {
        if look.idle == 0 {
            self.idle_in_a_row.store(0, Ordering::Relaxed);
            let wire = self.flow(|flow| flow.measure(look, now));
            if wire.is_some() && look.is_backlog {
                self.step(|rung| self.better(rung, wire, &[-1, 1]));
            }
            return;
        }
        let busy = |rung: usize| {
            let took = bytes as f64 / self.speed(rung);
            took / (took + gap.min(GAP_MAX).as_secs_f64())
        };
        if look.idle == look.streams {
            self.step(|rung| {
                let mut stronger = (rung + 1..=LEISURE_RUNG).rev();
                stronger.find(|next| busy(*next) < BUSY / 2.0)
            });
        }
        let (idle, streams) = (look.idle as u32, look.streams as u32);
        let idle = self.idle_in_a_row.fetch_add(idle, Ordering::Relaxed) + idle;
        let is_long = idle >= streams * (streams + IDLE_BEYOND_STREAMS);
        let is_slow = is_long && busy(self.rung.load(Ordering::Relaxed)) > BUSY;
        let wire = self.flow(|flow| flow.rest(look, now, is_slow));
        if is_long {
            // Half the way again until the next step.
            self.idle_in_a_row.store(idle / 2, Ordering::Relaxed);
        }
        if is_slow {
            self.step(|rung| self.better(rung, wire, &[-1]));
        }
    }

    /// Bytes a second that one thread packs on a rung: as measured, or as the nearest one that was lets expect.
    fn speed(&self, rung: usize) -> f64 {
        let usual = |rung: usize| f64::from(LADDER[rung].speed) * 1e6;
        let like = self.speeds.nearest(rung);
        like.map_or(usual(rung), |(like, speed)| {
            speed * 1e6 * usual(rung) / usual(like)
        })
    }

    /// What a rung leaves of frames that can shrink, as a part of them: as measured, or as the nearest one that was lets
    /// expect.
    fn left(&self, rung: usize) -> f64 {
        if rung == 0 {
            return 1.0;
        }
        let leaves = |rung: usize| f64::from(LADDER[rung].leaves_percent);
        let (like, left) = self
            .left_permille
            .nearest(rung)
            .unwrap_or((ZSTD_RUNG, 500.0));
        let left = left / 1e3 * leaves(rung) / leaves(like);
        // What frames have in common shows only when many are packed.
        let below = self.left_permille.of(LINKED_RUNG - 1);
        match below.filter(|_| rung == LINKED_RUNG) {
            Some(below) => left.min(below / 1e3 * leaves(rung) / leaves(rung - 1)),
            None => left.min(1.0),
        }
    }

    /// Bytes a second that a rung gives, before packing, over a wire that takes so many after it.
    fn gives(&self, rung: usize, wire: Option<f64>) -> f64 {
        let wire = wire.map_or(f64::INFINITY, |wire| wire / self.left(rung));
        (self.speed(rung) * THREADS * PACKING_SHARE).min(wire)
    }

    /// Whether a frame arrives sooner as it is: it is small, nothing else is on its way, and the wire takes more in a second
    /// than packing spares it.
    fn is_sooner_plain(&self, rung: usize, bytes: usize, look: Look) -> bool {
        let spares = self.speed(rung) * (1.0 - self.left(rung));
        bytes <= SMALL_BYTES
            && look.idle == look.streams
            && self.flow(|_| ()).is_none_or(|wire| wire > spares)
    }

    /// The first of these neighbours that gives more.
    fn better(&self, rung: usize, wire: Option<f64>, ways: &[isize]) -> Option<usize> {
        let enough = self.gives(rung, wire) * WORTH_A_STEP;
        let neighbours = ways.iter().filter_map(|way| rung.checked_add_signed(*way));
        neighbours
            .filter(|next| *next < LADDER.len())
            .find(|next| self.gives(*next, wire) > enough)
    }

    fn step(&self, to: impl Fn(usize) -> Option<usize>) {
        let rung = self.rung.load(Ordering::Relaxed);
        if let Some(next) = to(rung) {
            // Two collectors that step at once step once.
            let _ = self
                .rung
                .compare_exchange(rung, next, Ordering::Relaxed, Ordering::Relaxed);
        }
    }

    fn flow(&self, see: impl FnOnce(&mut Flow)) -> Option<f64> {
        let mut flow = self.flow.lock().unwrap_or_else(PoisonError::into_inner);
        see(&mut flow);
        flow.bytes_per_second
    }

    fn learn(&self, rung: usize, before: usize, after: usize, took: Duration) {
        let speed = before as f64 / took.as_secs_f64().max(1e-6) / 1e6;
        self.speeds.blend(rung, speed);
        self.left_permille
            .blend(rung, after as f64 * 1e3 / before as f64);
    }
}

impl Measured {
    fn none() -> Self {
        Self(std::array::from_fn(|_| AtomicU32::new(0)))
    }

    /// The figure of a rung that was measured.
    fn of(&self, rung: usize) -> Option<f64> {
        let known = self.0[rung].load(Ordering::Relaxed);
        (known > 0).then_some(f64::from(known))
    }

    /// The rung next to this one that was measured, and its figure.
    fn nearest(&self, rung: usize) -> Option<(usize, f64)> {
        (0..LADDER.len())
            .filter_map(|other| Some((other, self.of(other)?)))
            .min_by_key(|(other, _)| other.abs_diff(rung))
    }

    /// Takes an eighth of what was just seen, and seven of what was known, if anything was.
    fn blend(&self, rung: usize, seen: f64) {
        let old = self.of(rung).unwrap_or(seen);
        let blended = (old + (seen - old) / 8.0).max(1.0) as u32;
        self.0[rung].store(blended, Ordering::Relaxed);
    }
}

impl Flow {
    /// Measures what the wire takes, while frames wait for it.
    fn measure(&mut self, look: Look, now: Instant) {
        let took = now.duration_since(self.since);
        if took < WINDOW {
            return;
        }
        let rate = look.sent.saturating_sub(self.sent) as f64 / took.as_secs_f64();
        if self.is_raised {
            let was_right = self
                .bytes_per_second
                .is_some_and(|thought| rate * FASTER.sqrt() > thought);
            self.patience = if was_right {
                1
            } else {
                (self.patience * 2).min(PATIENCE_MAX)
            };
        }
        (self.bytes_per_second, self.is_raised, self.long_idle) = (Some(rate), false, 0);
        (self.since, self.sent) = (now, look.sent);
    }

    /// Begins to measure anew. When streams have been idle for long, the wire is faster than was thought.
    fn rest(&mut self, look: Look, now: Instant, is_slow: bool) {
        (self.since, self.sent) = (now, look.sent);
        self.long_idle += u32::from(is_slow);
        if self.long_idle >= self.patience {
            self.long_idle = 0;
            self.is_raised = self.bytes_per_second.is_some();
            self.bytes_per_second = self.bytes_per_second.map(|wire| wire * FASTER);
        }
    }
}

/// A frame's bytes, packed; a linked one's turn is over when it is queued.
pub(crate) type PackedFrame<'a> = (Codec, Vec<u8>, Option<Turn<'a>>);

/// One thread's tools. Without them (no memory for their tables) everything is sent as it is.
pub(crate) struct Packer {
    wish: Compress,
    zstd: Option<zstd::bulk::Compressor<'static>>,
    level: i32,
    /// When the last frame was done.
    last: Instant,
}

impl Packer {
    pub(crate) fn new(wish: Compress) -> Self {
        let level = 1;
        let zstd = match wish {
            Compress::Off | Compress::Lz4 => None,
            Compress::Auto | Compress::Zstd => zstd::bulk::Compressor::new(level).ok(),
        };
        let last = Instant::now();
        Self {
            wish,
            zstd,
            level,
            last,
        }
    }

    /// Packs a frame's bytes, or says that they go as they are. One of a tree's round may be linked, by its `linker`.
    pub(crate) fn pack<'a>(
        &mut self,
        bytes: &[u8],
        (gauge, look): (&Gauge, Look),
        linker: Option<&'a Linker>,
    ) -> Option<PackedFrame<'a>> {
        if self.wish == Compress::Off || bytes.is_empty() {
            return None;
        }
        let now = Instant::now();
        gauge.look(look, (bytes.len(), now.duration_since(self.last)), now);
        let packed = self.pack_on((gauge, look), bytes, linker);
        self.last = Instant::now();
        packed
    }

    /// Packs on the rung where everybody stands.
    fn pack_on<'a>(
        &mut self,
        (gauge, look): (&Gauge, Look),
        bytes: &[u8],
        linker: Option<&'a Linker>,
    ) -> Option<PackedFrame<'a>> {
        let common = gauge.rung.load(Ordering::Relaxed);
        let rung = match self.wish {
            Compress::Lz4 => 1,
            Compress::Zstd => common.max(ZSTD_RUNG),
            Compress::Auto if gauge.is_sooner_plain(common, bytes.len(), look) => 0,
            Compress::Auto | Compress::Off => common,
        };
        if rung == 0 || !self.can_shrink(bytes) {
            return None;
        }
        let method = LADDER[rung].method;
        let turn = match method {
            Method::Linked(_) => linker.and_then(|linker| linker.turn(&gauge.places)),
            _ => None,
        };
        let start = Instant::now();
        if let Some(mut turn) = turn {
            let (codec, packed) = turn.pack(bytes)?;
            // One packs at a time.
            let took = start.elapsed().mul_f64(THREADS);
            gauge.learn(rung, bytes.len(), packed.len(), took);
            return Some((codec, packed, Some(turn)));
        }
        let (codec, packed) = self.apply(method, bytes)?;
        gauge.learn(rung, bytes.len(), packed.len(), start.elapsed());
        is_worth(bytes.len(), packed.len()).then_some((codec, packed, None))
    }

    fn apply(&mut self, method: Method, plain: &[u8]) -> Option<(Codec, Vec<u8>)> {
        // Frames are far below 4 GiB; see DATA_BYTES_MAX.
        let bytes = plain.len() as u32;
        match method {
            Method::Plain => None,
            Method::Lz4 => Some((Codec::Lz4 { bytes }, lz4_flex::block::compress(plain))),
            Method::Zstd(level) | Method::Linked(level) => {
                let zstd = self.zstd.as_mut()?;
                if level != self.level {
                    zstd.set_compression_level(level).ok()?;
                    self.level = level;
                }
                Some((Codec::Zstd { bytes }, zstd.compress(plain).ok()?))
            }
        }
    }

    /// Tries a few places of the frame first, quickly.
    fn can_shrink(&mut self, bytes: &[u8]) -> bool {
        if bytes.len() <= SAMPLES * SAMPLE_BYTES {
            return true;
        }
        let places = (0..SAMPLES).map(|at| at * (bytes.len() - SAMPLE_BYTES) / (SAMPLES - 1));
        let mut sample = Vec::with_capacity(SAMPLES * SAMPLE_BYTES);
        for start in places {
            sample.extend_from_slice(&bytes[start..start + SAMPLE_BYTES]);
        }
        let method = if self.wish == Compress::Lz4 {
            Method::Lz4
        } else {
            Method::Zstd(1)
        };
        self.apply(method, &sample)
            .is_some_and(|(_, packed)| is_worth(sample.len(), packed.len()))
    }
}

fn is_worth(before: usize, after: usize) -> bool {
    after <= before / 100 * WORTH_PERCENT
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transfer::send::noise;

    const STREAMS: usize = 4;
    /// One frame after the other.
    const HURRY: (usize, Duration) = (1 << 20, Duration::ZERO);

    fn look(idle: usize, sent: u64) -> Look {
        Look {
            idle,
            streams: STREAMS,
            is_backlog: idle == 0,
            sent,
        }
    }

    fn text() -> Vec<u8> {
        b"one row of a table that looks like the next one; ".repeat(5000)
    }

    /// A wire that is never idle.
    struct Wire {
        now: Instant,
        sent: u64,
    }

    impl Wire {
        fn new() -> Self {
            Self {
                now: Instant::now(),
                sent: 0,
            }
        }

        /// A second of frames at so many bytes a second.
        fn carry(&mut self, gauge: &Gauge, bytes_per_second: f64) {
            for _ in 0..20 {
                self.now += WINDOW;
                self.sent += (WINDOW.as_secs_f64() * bytes_per_second) as u64;
                gauge.look(look(0, self.sent), HURRY, self.now);
            }
        }
    }

    #[test]
    fn a_slow_wire_is_worth_strong_packing_and_one_as_fast_as_memory_none() {
        let gauge = Gauge::new();
        let mut wire = Wire::new();
        wire.carry(&gauge, 0.4e6);
        assert_eq!(gauge.rung.load(Ordering::Relaxed), LADDER.len() - 1);
        assert!(gauge.is_strong());
        wire.carry(&gauge, 2e9);
        assert_eq!(gauge.rung.load(Ordering::Relaxed), 0);
        wire.carry(&gauge, 100e6);
        let rung = gauge.rung.load(Ordering::Relaxed);
        assert!((1..=3).contains(&rung), "{rung}");
    }

    #[test]
    fn frames_are_linked_over_a_slow_wire_whatever_the_first_ones_gained_by_it() {
        let gauge = Gauge::new();
        let mut wire = Wire::new();
        gauge.left_permille.blend(LINKED_RUNG, 520.0);
        gauge.left_permille.blend(LINKED_RUNG - 1, 500.0);
        gauge.rung.store(LINKED_RUNG - 1, Ordering::Relaxed);
        wire.carry(&gauge, 0.4e6);
        assert_eq!(gauge.rung.load(Ordering::Relaxed), LINKED_RUNG);
    }

    #[test]
    fn text_over_a_gigabit_is_packed_although_its_streams_are_idle_now_and_then() {
        const WIRE: f64 = 95e6;
        let gauge = Gauge::new();
        gauge.left_permille.blend(ZSTD_RUNG, 120.0);
        gauge.left_permille.blend(1, 330.0);
        let mut wire = Wire::new();
        let mut given = 0.0;
        for _ in 0..400 {
            let rung = gauge.rung.load(Ordering::Relaxed);
            let packed = gauge.gives(rung, None);
            let taken = WIRE / gauge.left(rung);
            given += packed.min(taken) * WINDOW.as_secs_f64();
            if taken < packed {
                wire.now += WINDOW;
                wire.sent += (WIRE * WINDOW.as_secs_f64()) as u64;
                gauge.look(look(0, wire.sent), HURRY, wire.now);
            } else {
                for _ in 0..8 {
                    wire.now += WINDOW / 8;
                    wire.sent += (packed * gauge.left(rung) * WINDOW.as_secs_f64() / 8.0) as u64;
                    gauge.look(look(2, wire.sent), HURRY, wire.now);
                }
            }
        }
        let rate = given / (400.0 * WINDOW.as_secs_f64());
        assert!(rate > 3.0 * WIRE, "{rate}");
    }

    #[test]
    fn idle_streams_bring_everybody_down_but_the_first_frames_do_not() {
        let gauge = Gauge::new();
        for _ in 0..STREAMS {
            gauge.look(look(2, 0), HURRY, Instant::now());
        }
        assert_eq!(gauge.rung.load(Ordering::Relaxed), FIRST_RUNG);
        for _ in 0..30 * STREAMS {
            gauge.look(look(2, 0), HURRY, Instant::now());
        }
        assert_eq!(gauge.rung.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn a_rung_nobody_has_stood_on_is_as_fast_as_its_neighbour_lets_expect() {
        let gauge = Gauge::new();
        // On a better core than the table's this rung does more than the table says of the weaker one.
        let fast = f64::from(LADDER[FIRST_RUNG - 1].speed) * 1.3;
        gauge.speeds.blend(FIRST_RUNG, fast);
        for _ in 0..30 * STREAMS {
            gauge.look(look(2, 0), HURRY, Instant::now());
        }
        assert_eq!(gauge.rung.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn frames_that_come_slowly_are_packed_where_there_is_time_for_it() {
        let gauge = Gauge::new();
        for _ in 0..100 * STREAMS {
            gauge.look(look(2, 0), HURRY, Instant::now());
        }
        assert_eq!(gauge.rung.load(Ordering::Relaxed), 0);
        let slow = (64 << 10, Duration::from_millis(10));
        for _ in 0..100 * STREAMS {
            gauge.look(look(STREAMS, 0), slow, Instant::now());
        }
        let rung = gauge.rung.load(Ordering::Relaxed);
        assert_eq!(rung, LEISURE_RUNG);
    }

    #[test]
    fn a_small_frame_that_nothing_else_waits_for_goes_as_it_is_unless_the_wire_is_slow() {
        let gauge = Gauge::new();
        let small = &text()[..SMALL_BYTES];
        let mut packer = Packer::new(Compress::Auto);
        let mut is_packed =
            |bytes: &[u8], idle| packer.pack(bytes, (&gauge, look(idle, 0)), None).is_some();
        assert!(!is_packed(small, STREAMS));
        assert!(is_packed(small, STREAMS - 1));
        assert!(is_packed(&text(), STREAMS));
        gauge.flow(|flow| flow.bytes_per_second = Some(0.4e6));
        assert!(is_packed(small, STREAMS));
        gauge.flow(|flow| flow.bytes_per_second = Some(1e9));
        assert!(!is_packed(small, STREAMS));
        assert!(
            Packer::new(Compress::Zstd)
                .pack(small, (&gauge, look(STREAMS, 0)), None)
                .is_some()
        );
    }

    #[test]
    fn what_can_not_shrink_goes_as_it_is_and_off_means_off() {
        let gauge = Gauge::new();
        for wish in [Compress::Auto, Compress::Zstd, Compress::Lz4] {
            let mut packer = Packer::new(wish);
            assert!(
                packer
                    .pack(&noise(200_000), (&gauge, look(0, 0)), None)
                    .is_none(),
                "{wish:?}"
            );
            let (_, packed, _) = packer.pack(&text(), (&gauge, look(0, 0)), None).unwrap();
            assert!(packed.len() < text().len() / 4, "{wish:?}");
        }
        assert!(
            Packer::new(Compress::Off)
                .pack(&text(), (&gauge, look(0, 0)), None)
                .is_none()
        );
    }
}
