//! Deliberate mistakes of the store, for tests that prove that the checkers of the simulated disk can fail. Only with the feature
//! `planted`; nothing that ships has it.

use super::Store;
use crate::io::BlockIo;

/// A mistake to make.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plant {
    /// Records are written without waiting for the flush that makes their blocks durable.
    JournalFirst,
    /// Writes are answered before their records are durable.
    EarlyAnswer,
    /// Drops are answered without a record.
    ForgetDrops,
    /// Reads are answered without looking at the bytes.
    SkipCrc,
}

impl Plant {
    /// All of them.
    pub const ALL: [Plant; 4] = [
        Plant::JournalFirst,
        Plant::EarlyAnswer,
        Plant::ForgetDrops,
        Plant::SkipCrc,
    ];
}

impl<I: BlockIo> Store<I> {
    /// From now on this mistake is made.
    pub fn plant(&mut self, plant: Plant) {
        self.plant = Some(plant);
    }
}
