//! The one source of chance in a simulation: xoshiro256** from a seed and a stream name. Beside it, a seed to begin with.
//!
//! Own code, because a seed kept in `tests/seeds` must mean the same run for ever; general-purpose crates promise no such thing.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};

/// A stream of numbers that follows from its seed.
#[derive(Clone, Debug)]
pub(crate) struct Rng([u64; 4]);

/// One step of SplitMix64: advances `state`, gives a well mixed number.
pub(crate) fn splitmix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A number that follows from all of `words`, in order.
pub(crate) fn mix(words: &[u64]) -> u64 {
    words.iter().fold(0x6b76_642d_7369_6d00, |sum, word| {
        let mut state = sum ^ word;
        splitmix(&mut state)
    })
}

/// A seed that nobody has had. 48 bits of it, so that every reader of JSON keeps them all.
pub fn fresh_seed() -> u64 {
    RandomState::new().build_hasher().finish() >> 16
}

impl Rng {
    /// The stream `stream` of `seed`.
    pub(crate) fn new(seed: u64, stream: u64) -> Self {
        let mut state = mix(&[seed, stream]);
        Rng(std::array::from_fn(|_| splitmix(&mut state)))
    }

    /// Any number.
    pub(crate) fn next(&mut self) -> u64 {
        let s = &mut self.0;
        let result = s[1].wrapping_mul(5).rotate_left(7).wrapping_mul(9);
        let t = s[1] << 17;
        s[2] ^= s[0];
        s[3] ^= s[1];
        s[1] ^= s[2];
        s[0] ^= s[3];
        s[2] ^= t;
        s[3] = s[3].rotate_left(45);
        result
    }

    /// From 0 to `n - 1`; 0 when `n` is 0.
    pub(crate) fn below(&mut self, n: usize) -> usize {
        ((u128::from(self.next()) * n as u128) >> 64) as usize
    }

    /// From `low` to `high`, both included.
    pub(crate) fn range(&mut self, low: u64, high: u64) -> u64 {
        low + ((u128::from(self.next()) * u128::from(high - low + 1)) >> 64) as u64
    }

    /// True in one of `n` cases.
    pub(crate) fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    /// One of these.
    pub(crate) fn pick<'a, T>(&mut self, list: &'a [T]) -> &'a T {
        &list[self.below(list.len())]
    }

    /// About as often low powers as high ones: numbers of all sizes.
    pub(crate) fn spread(&mut self, low: u64, high: u64) -> u64 {
        let bits = self.range(0, u64::from((high / low.max(1)).max(1).ilog2()));
        let top = (low.max(1) << bits).min(high);
        self.range(low.min(top), top)
    }

    /// Sixteen bytes.
    pub(crate) fn id(&mut self) -> [u8; 16] {
        let mut id = [0; 16];
        id[..8].copy_from_slice(&self.next().to_le_bytes());
        id[8..].copy_from_slice(&self.next().to_le_bytes());
        id
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_repeat_and_differ() {
        let draw = |seed, stream| {
            let mut rng = Rng::new(seed, stream);
            (0..8).map(|_| rng.next()).collect::<Vec<_>>()
        };
        assert_eq!(draw(1, 2), draw(1, 2));
        assert_ne!(draw(1, 2), draw(1, 3));
        assert_ne!(draw(1, 2), draw(2, 2));
        let mut rng = Rng::new(7, 0);
        for _ in 0..1000 {
            assert!((3..=9).contains(&rng.range(3, 9)));
            assert!((2..=100).contains(&rng.spread(2, 100)));
            assert!(rng.below(5) < 5);
        }
    }
}
