//! Decides for each frame whether packing it pays, and how strongly; never so that the streams wait for the packer.
//!
//! A ladder of ever stronger methods. All collectors of a session stand on one rung of it, and move by what they see
//! when they hand a frame over: while streams are idle it is the packer that is too slow, and they step down; while
//! frames wait it is the wire, and they step up if the next rung, at its measured speed, would still outrun it. A sample
//! of each frame says first whether it can shrink at all.

use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use cutover_protocol::plan::Compress;

use super::wire::Codec;

/// What can be done to a frame, weakest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Method {
    Plain,
    Lz4,
    Zstd(i32),
}

/// The rungs, with the speed each is taken to have until it was measured: MB/s of one thread on a modest core.
const LADDER: [(Method, u32); 7] = [
    (Method::Plain, u32::MAX),
    (Method::Lz4, 600),
    (Method::Zstd(1), 350),
    (Method::Zstd(3), 180),
    (Method::Zstd(6), 70),
    (Method::Zstd(9), 40),
    (Method::Zstd(12), 15),
];
/// The weakest rung of zstd.
const ZSTD_RUNG: usize = 2;
/// Where everybody begins: on a slow link the first megabytes count, and a fast one is known by its idle streams within
/// some tens of milliseconds.
const FIRST_RUNG: usize = 5;
/// Packing threads of a round, see `plan`.
const THREADS: f64 = 2.0;
/// By how much a rung must outrun the wire before it is stepped on: the threads also read and hash.
const MARGIN: f64 = 1.6;
/// Idle streams met by frames in a row are added up, and everybody steps down when they come to this many more than
/// streams, for each stream there is. The first frames of a round always meet idle streams: half as many.
const IDLE_BEYOND_STREAMS: u32 = 4;
/// Packing is strong, and large frames are worth it, when it leaves less than this, in thousandths.
const STRONG_PERMILLE: u32 = 600;
/// A frame is sampled at so many places, so many bytes each.
const SAMPLES: usize = 4;
const SAMPLE_BYTES: usize = 4 << 10;
/// What does not shrink to this share of itself is not worth unpacking.
const WORTH_PERCENT: usize = 94;
/// A rate is looked at over at least this long.
const WINDOW: Duration = Duration::from_millis(50);

/// What the streams of a session make of frames, and on which rung their packers stand.
#[derive(Debug)]
pub(crate) struct Gauge {
    rung: AtomicUsize,
    idle_in_a_row: AtomicU32,
    /// Measured speed of each rung, MB/s of one thread.
    speeds: [AtomicU32; LADDER.len()],
    /// What packing leaves of frames that can shrink, in thousandths.
    left_permille: AtomicU32,
    flow: Mutex<Flow>,
}

#[derive(Debug)]
struct Flow {
    since: Instant,
    sent: u64,
    bytes_per_second: Option<f64>,
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
            speeds: LADDER.map(|(_, speed)| AtomicU32::new(speed)),
            left_permille: AtomicU32::new(500),
            flow: Mutex::new(Flow {
                since: Instant::now(),
                sent: 0,
                bytes_per_second: None,
            }),
        }
    }

    /// Whether frames are packed so strongly that large ones are worth it.
    pub(super) fn is_strong(&self) -> bool {
        self.rung.load(Ordering::Relaxed) > ZSTD_RUNG
            && self.left_permille.load(Ordering::Relaxed) < STRONG_PERMILLE
    }

    /// Takes note of what a collector sees, and moves the rung when there is reason to.
    fn look(&self, look: Look, now: Instant) {
        let rate = self.flow(look, now);
        if look.idle > 0 {
            let (idle, streams) = (look.idle as u32, look.streams as u32);
            let idle = self.idle_in_a_row.fetch_add(idle, Ordering::Relaxed) + idle;
            if idle >= streams * (streams + IDLE_BEYOND_STREAMS) {
                // Half the way again until the next step.
                self.idle_in_a_row.store(idle / 2, Ordering::Relaxed);
                self.step(|rung| rung.saturating_sub(1));
            }
            return;
        }
        self.idle_in_a_row.store(0, Ordering::Relaxed);
        let Some(rate) = rate.filter(|_| look.is_backlog) else {
            return;
        };
        let left = f64::from(self.left_permille.load(Ordering::Relaxed).max(1)) / 1e3;
        let outruns = |rung: usize, margin: f64| {
            let speed = f64::from(self.speeds[rung].load(Ordering::Relaxed)) * 1e6;
            speed * THREADS > margin * rate / left
        };
        self.step(|rung| {
            let next = (rung + 1).min(LADDER.len() - 1);
            if rung > 0 && !outruns(rung, 1.0) {
                rung - 1
            } else if outruns(next, MARGIN) {
                next
            } else {
                rung
            }
        });
    }

    fn step(&self, to: impl Fn(usize) -> usize) {
        let rung = self.rung.load(Ordering::Relaxed);
        // Two collectors that step at once step once.
        let _ = self
            .rung
            .compare_exchange(rung, to(rung), Ordering::Relaxed, Ordering::Relaxed);
    }

    /// What the streams take in a second while frames wait for them; nothing while they wait for frames.
    fn flow(&self, look: Look, now: Instant) -> Option<f64> {
        let mut flow = self.flow.lock().unwrap_or_else(PoisonError::into_inner);
        if look.idle > 0 {
            *flow = Flow {
                since: now,
                sent: look.sent,
                bytes_per_second: None,
            };
        } else if now.duration_since(flow.since) >= WINDOW {
            let seconds = now.duration_since(flow.since).as_secs_f64();
            *flow = Flow {
                since: now,
                sent: look.sent,
                bytes_per_second: Some(look.sent.saturating_sub(flow.sent) as f64 / seconds),
            };
        }
        flow.bytes_per_second
    }

    fn learn(&self, rung: usize, before: usize, after: usize, took: Duration) {
        let speed = before as f64 / took.as_secs_f64().max(1e-6) / 1e6;
        blend(&self.speeds[rung], speed);
        blend(&self.left_permille, after as f64 * 1e3 / before as f64);
    }
}

/// An eighth of what was just seen, seven of what was known.
fn blend(known: &AtomicU32, seen: f64) {
    let old = f64::from(known.load(Ordering::Relaxed));
    known.store(
        (old + (seen - old) / 8.0).max(1.0) as u32,
        Ordering::Relaxed,
    );
}

/// One thread's tools. Without them (no memory for their tables) everything is sent as it is.
pub(crate) struct Packer {
    wish: Compress,
    zstd: Option<zstd::bulk::Compressor<'static>>,
    level: i32,
}

impl Packer {
    pub(crate) fn new(wish: Compress) -> Self {
        let level = 1;
        let zstd = match wish {
            Compress::Off | Compress::Lz4 => None,
            Compress::Auto | Compress::Zstd => zstd::bulk::Compressor::new(level).ok(),
        };
        Self { wish, zstd, level }
    }

    /// Packs a frame's bytes, or says that they go as they are.
    pub(crate) fn pack(
        &mut self,
        bytes: &[u8],
        gauge: &Gauge,
        look: Look,
    ) -> Option<(Codec, Vec<u8>)> {
        if self.wish == Compress::Off || bytes.is_empty() {
            return None;
        }
        gauge.look(look, Instant::now());
        let rung = match self.wish {
            Compress::Lz4 => 1,
            Compress::Zstd => gauge.rung.load(Ordering::Relaxed).max(ZSTD_RUNG),
            Compress::Auto | Compress::Off => gauge.rung.load(Ordering::Relaxed),
        };
        if rung == 0 || !self.can_shrink(bytes) {
            return None;
        }
        let start = Instant::now();
        let (codec, packed) = self.apply(LADDER[rung].0, bytes)?;
        gauge.learn(rung, bytes.len(), packed.len(), start.elapsed());
        is_worth(bytes.len(), packed.len()).then_some((codec, packed))
    }

    fn apply(&mut self, method: Method, plain: &[u8]) -> Option<(Codec, Vec<u8>)> {
        // Frames are far below 4 GiB; see DATA_BYTES_MAX.
        let bytes = plain.len() as u32;
        match method {
            Method::Plain => None,
            Method::Lz4 => Some((Codec::Lz4 { bytes }, lz4_flex::block::compress(plain))),
            Method::Zstd(level) => {
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

    const STREAMS: usize = 4;

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

    fn noise() -> Vec<u8> {
        let mut noise = vec![0; 200_000];
        blake3::Hasher::new().finalize_xof().fill(&mut noise);
        noise
    }

    /// A wire that is never idle.
    struct Wire {
        now: Instant,
        sent: u64,
    }

    impl Wire {
        /// A second of frames at so many bytes a second.
        fn carry(&mut self, gauge: &Gauge, bytes_per_second: f64) {
            for _ in 0..20 {
                self.now += WINDOW;
                self.sent += (WINDOW.as_secs_f64() * bytes_per_second) as u64;
                gauge.look(look(0, self.sent), self.now);
            }
        }
    }

    #[test]
    fn a_slow_wire_is_worth_strong_packing_and_one_as_fast_as_memory_none() {
        let gauge = Gauge::new();
        let mut wire = Wire {
            now: Instant::now(),
            sent: 0,
        };
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
    fn idle_streams_bring_everybody_down_but_the_first_frames_do_not() {
        let gauge = Gauge::new();
        for _ in 0..STREAMS {
            gauge.look(look(2, 0), Instant::now());
        }
        assert_eq!(gauge.rung.load(Ordering::Relaxed), FIRST_RUNG);
        for _ in 0..30 * STREAMS {
            gauge.look(look(2, 0), Instant::now());
        }
        assert_eq!(gauge.rung.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn what_can_not_shrink_goes_as_it_is_and_off_means_off() {
        let gauge = Gauge::new();
        for wish in [Compress::Auto, Compress::Zstd, Compress::Lz4] {
            let mut packer = Packer::new(wish);
            assert!(
                packer.pack(&noise(), &gauge, look(0, 0)).is_none(),
                "{wish:?}"
            );
            let (_, packed) = packer.pack(&text(), &gauge, look(0, 0)).unwrap();
            assert!(packed.len() < text().len() / 4, "{wish:?}");
        }
        assert!(
            Packer::new(Compress::Off)
                .pack(&text(), &gauge, look(0, 0))
                .is_none()
        );
    }
}
