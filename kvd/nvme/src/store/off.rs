//! A device that fails or does not answer: the store is switched off, asks once a second whether the device answers again, and is
//! switched on when it does and nothing old is stuck in it. Deliberately absent: retries of single operations; core does without.

use kvd_core::tier::{StoreDone, StoreError};

use super::jobs::What;
use super::layout::HEADS;
use super::{Purpose, Store};
use crate::io::{Aligned, BlockIo, Buffer, IoError, Op};

/// Failed operations in a row that switch a store off.
const MOST_ERRORS: u32 = 8;
/// Time from probe to probe.
const PROBE_US: u64 = 1_000_000;

/// How the device does.
#[derive(Default)]
pub(crate) struct Health {
    pub(crate) off: bool,
    errors: u32,
    pub(crate) probe_at: u64,
    probing: bool,
}

impl<I: BlockIo> Store<I> {
    /// Counts what the device said.
    pub(crate) fn judge(
        &mut self,
        now: u64,
        purpose: &Purpose,
        result: &Result<(), IoError>,
        done: &mut Vec<StoreDone>,
    ) {
        match result {
            Ok(()) if matches!(purpose, Purpose::Probe) => {}
            Ok(()) => self.health.errors = 0,
            Err(error) => {
                match error {
                    IoError::Os(_) => self.counters.io_errors += 1,
                    IoError::Short { .. } => self.counters.io_short += 1,
                }
                // A checkpoint has rests of its own; one bad page there does not stop reads.
                self.health.errors += u32::from(!matches!(purpose, Purpose::Merge));
            }
        }
        if self.health.errors >= MOST_ERRORS && !self.health.off {
            self.switch_off(now, done);
        }
    }

    fn is_stuck(&self, now: u64) -> bool {
        let limit = self.config.deadline_us;
        self.flights
            .values()
            .any(|flight| now > flight.since.saturating_add(limit))
    }

    /// Looks for operations that take too long, and asks a device that is off.
    pub(crate) fn watch(&mut self, now: u64, done: &mut Vec<StoreDone>) {
        if !self.health.off {
            if self.is_stuck(now) {
                self.counters.stalls += 1;
                self.switch_off(now, done);
            }
            return;
        }
        if now < self.health.probe_at {
            return;
        }
        self.health.probe_at = now + PROBE_US;
        if self.health.probing || !self.has_room() {
            return;
        }
        self.health.probing = true;
        let buffer = Buffer::Own(Aligned::new(1));
        self.start(now, Purpose::Probe, |token| Op::Read {
            token,
            offset: HEADS[0],
            buffer,
        });
    }

    /// The device has answered a probe.
    pub(crate) fn probed(&mut self, now: u64, good: bool) {
        self.health.probing = false;
        if !good || self.is_stuck(now) || !self.health.off {
            return;
        }
        self.health.off = false;
        self.health.errors = 0;
        self.counters.switched_on += 1;
    }

    /// From now on nothing is taken. What has not begun is answered `Off`; what waits for a flush, `Io`; what the device has is
    /// answered `Io` when it gives it back, because until then it may use the memory.
    fn switch_off(&mut self, now: u64, done: &mut Vec<StoreDone>) {
        self.health.off = true;
        self.health.probe_at = now + PROBE_US;
        self.counters.switched_off += 1;
        self.stop_cycle(done);
        for piece in std::mem::take(&mut self.pieces) {
            if let What::Name { slot, .. } = piece.what {
                self.names.wrote(slot, false);
            }
            self.job(piece.job).left -= 1;
        }
        let named: std::collections::BTreeSet<u64> =
            self.cycle.named.iter().map(|named| named.job).collect();
        let mut over = Vec::new();
        for (id, job) in self.jobs.iter_mut().filter(|(id, _)| !named.contains(id)) {
            job.failed = true;
            if job.left == 0 {
                let error = if job.begun {
                    StoreError::Io
                } else {
                    StoreError::Off
                };
                over.push((id, error));
            }
        }
        over.sort_unstable_by_key(|(id, _)| *id);
        for (id, error) in over {
            self.finish(id, error, done);
        }
    }
}
