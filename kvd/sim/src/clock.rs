//! The node's clock and entropy in a simulation: virtual microseconds, and numbers that follow from the seed.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use kvd_core::Now;
use kvd_node::{Clock, Entropy};

use crate::rng::Rng;

/// Virtual time. Copies show the same time; only the simulation moves it.
#[derive(Clone, Debug)]
pub(crate) struct SimClock(Rc<Cell<u64>>);

impl SimClock {
    /// A clock that begins at one second, as the real one does: 0 is left to mean "never".
    pub(crate) fn new() -> Self {
        SimClock(Rc::new(Cell::new(1_000_000)))
    }

    /// Microseconds now.
    pub(crate) fn us(&self) -> u64 {
        self.0.get()
    }

    /// Moves on.
    pub(crate) fn advance(&self, us: u64) {
        self.0.set(self.0.get() + us);
    }
}

impl Clock for SimClock {
    fn now(&self) -> Now {
        Now(self.0.get())
    }
}

/// Tokens that nobody in the simulation can guess but that are the same in every run of a seed.
#[derive(Clone, Debug)]
pub(crate) struct SimEntropy(Rc<RefCell<Rng>>);

impl SimEntropy {
    /// From this stream.
    pub(crate) fn new(rng: Rng) -> Self {
        SimEntropy(Rc::new(RefCell::new(rng)))
    }
}

impl Entropy for SimEntropy {
    fn fill(&mut self, bytes: &mut [u8]) {
        let mut rng = self.0.borrow_mut();
        for chunk in bytes.chunks_mut(8) {
            chunk.copy_from_slice(&rng.next().to_le_bytes()[..chunk.len()]);
        }
    }
}
