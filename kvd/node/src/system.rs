//! The real clock and real randomness.
#![allow(
    clippy::disallowed_methods,
    reason = "the home of the clock: everything else takes it as an argument"
)]

use std::time::Instant;

use kvd_core::Now;
use rustix::rand::{GetRandomFlags, getrandom};

use crate::{Clock, Entropy};

/// Microseconds since it was made, by the monotonic clock.
#[derive(Debug, Clone, Copy)]
pub struct SystemClock {
    start: Instant,
}

impl SystemClock {
    /// A clock that begins now, at one second: 0 is left to mean "never".
    pub fn new() -> Self {
        Self {
            start: Instant::now(),
        }
    }
}

impl Default for SystemClock {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock for SystemClock {
    fn now(&self) -> Now {
        Now(1_000_000 + u64::try_from(self.start.elapsed().as_micros()).unwrap_or(u64::MAX))
    }
}

/// The kernel's randomness.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemEntropy;

impl Entropy for SystemEntropy {
    fn fill(&mut self, bytes: &mut [u8]) {
        let mut rest = bytes;
        while !rest.is_empty() {
            match getrandom(&mut *rest, GetRandomFlags::empty()) {
                Ok(n) => rest = &mut rest[n..],
                Err(rustix::io::Errno::INTR) => {}
                // No daemon may run with tokens that can be guessed.
                Err(e) => panic!("the kernel gives no randomness: {e}"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clock_rises_and_randomness_differs() {
        let clock = SystemClock::new();
        assert!(clock.now() <= clock.now());
        let (mut a, mut b) = ([0; 32], [0; 32]);
        SystemEntropy.fill(&mut a);
        SystemEntropy.fill(&mut b);
        assert_ne!(a, b);
    }
}
