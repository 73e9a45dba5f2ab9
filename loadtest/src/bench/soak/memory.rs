//! Whether memory stayed flat: a line through the samples of the second half, and a bound on what it grew by. Pure.

/// Growth over the second half that is still flat, in bytes: what an allocator may still be filling up.
const GROWTH_BYTES_MAX: f64 = 1_048_576.0;
/// The same as a part of the memory in use; the larger of the two counts.
const GROWTH_PART_MAX: f64 = 0.02;

/// What the samples say.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Memory {
    /// The first sample, in bytes.
    pub first: u64,
    /// The highest, in bytes.
    pub highest: u64,
    /// The last, in bytes.
    pub last: u64,
    /// Bytes a second by which the line through the second half rises.
    pub slope: f64,
    /// Growth of that line over the second half, in bytes.
    pub growth: f64,
    /// How much growth still counts as flat, in bytes.
    pub bound: f64,
}

impl Memory {
    /// Reads samples taken once a second; nothing when there are fewer than four.
    #[must_use]
    pub fn of(samples: &[u64]) -> Option<Self> {
        let half = samples
            .get(samples.len() / 2..)
            .filter(|half| half.len() >= 2)?;
        if samples.len() < 4 {
            return None;
        }
        let slope = slope(half);
        let mean = half.iter().map(|bytes| *bytes as f64).sum::<f64>() / half.len() as f64;
        Some(Self {
            first: *samples.first()?,
            highest: *samples.iter().max()?,
            last: *samples.last()?,
            slope,
            growth: slope * (half.len() - 1) as f64,
            bound: GROWTH_BYTES_MAX.max(mean * GROWTH_PART_MAX),
        })
    }

    /// Whether it stayed flat.
    #[must_use]
    pub fn is_flat(&self) -> bool {
        self.growth <= self.bound
    }
}

/// The least-squares line's rise from one sample to the next.
fn slope(samples: &[u64]) -> f64 {
    let count = samples.len() as f64;
    let middle = (count - 1.0) / 2.0;
    let mean = samples.iter().map(|bytes| *bytes as f64).sum::<f64>() / count;
    let (mut rise, mut run) = (0.0, 0.0);
    for (number, bytes) in samples.iter().enumerate() {
        let distance = number as f64 - middle;
        rise += distance * (*bytes as f64 - mean);
        run += distance * distance;
    }
    rise / run
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn growth_in_the_first_half_is_warming_up() {
        let samples: Vec<u64> = (0..200)
            .map(|second: u64| (10 + second.min(90)) * MIB)
            .collect();
        let memory = Memory::of(&samples).unwrap();
        assert!(memory.is_flat(), "{memory:?}");
        assert_eq!((memory.first, memory.last), (10 * MIB, 100 * MIB));
    }

    #[test]
    fn growth_that_goes_on_is_a_leak() {
        let samples: Vec<u64> = (0..600).map(|second| 20 * MIB + second * 8192).collect();
        let memory = Memory::of(&samples).unwrap();
        assert!((memory.slope - 8192.0).abs() < 1e-6);
        assert!(!memory.is_flat(), "{memory:?}");
    }

    #[test]
    fn noise_is_flat_and_too_few_samples_say_nothing() {
        let samples: Vec<u64> = (0..100)
            .map(|second| 20 * MIB + (second % 2) * MIB)
            .collect();
        assert!(Memory::of(&samples).unwrap().is_flat());
        assert_eq!(Memory::of(&[1, 2, 3]), None);
    }
}
