//! When things are durable. Blocks that are written wait for company; one flush makes them durable; their records go to the journal
//! together with those of drops, on fresh pages; the next flush makes these durable and at the same time the blocks that are written
//! by then. Those wait for company again before their records go, so that under load there are one or two flushes for each company and
//! not one for every block. One such cycle is under way at a time. Deliberately absent: the journal's other half, once this one is full (`merge`).

use std::collections::VecDeque;

use kvd_core::tier::{StoreDone, StoreError};

use super::config::StoreConfig;
use super::format::{Kind, List, PER_PAGE, Record, Superblock, encode_page};
use super::jobs::Work;
use super::merge::Merge;
use super::recover::Epoch;
use super::{Flight, Purpose, Store};
use crate::io::{Aligned, BlockIo, Buffer, Op, PAGE};

/// Most pages of one batch of records. Less than the smallest half of a journal.
const MOST_PAGES: usize = 16;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Idle,
    /// Records are under way.
    Records,
    /// Records are written and wait for a flush.
    Recorded,
    /// A flush is under way.
    Flush,
}

/// A job whose record is in the journal, or under way to it.
pub(crate) struct Named {
    pub(crate) job: u64,
    seq: u64,
}

/// Batches.
pub(crate) struct Cycle {
    stage: Stage,
    /// Writes whose bytes the device has, in order of completion.
    written: VecDeque<u64>,
    /// Drops without a record.
    pub(crate) drops: VecDeque<u64>,
    /// Writes that the flush under way makes durable.
    covered: Vec<u64>,
    /// Writes whose bytes are durable, without a record.
    durable: VecDeque<u64>,
    /// Those were company enough before they were made durable.
    ripe: bool,
    /// Jobs whose records are under way or wait for the flush.
    pub(crate) named: Vec<Named>,
    /// A flush failed that may have been to the credit of `named`.
    spoilt: bool,
    /// Since when something waits for company.
    since: Option<u64>,
    /// Since when the half is full and the other not yet free.
    jammed: Option<u64>,
    /// That takes too long: nothing new is taken before the other half is free.
    pub(crate) wedged: bool,
    epoch: u64,
    /// Next page of this epoch's half.
    at: u64,
}

impl Cycle {
    pub(crate) fn new(head: &Superblock, last: Option<&Epoch>) -> Self {
        let (epoch, at) = match last {
            Some(last) => (last.epoch, last.used),
            None => (head.first_epoch.get(), 0),
        };
        Cycle {
            stage: Stage::Idle,
            written: VecDeque::new(),
            drops: VecDeque::new(),
            covered: Vec::new(),
            durable: VecDeque::new(),
            ripe: false,
            named: Vec::new(),
            spoilt: false,
            since: None,
            jammed: None,
            wedged: false,
            epoch,
            at,
        }
    }

    /// All bytes of a write are with the device.
    pub(crate) fn is_written(&mut self, job: u64) {
        self.written.push_back(job);
    }

    /// A job is over before its time.
    pub(crate) fn forget(&mut self, job: u64) {
        self.written.retain(|other| *other != job);
        self.covered.retain(|other| *other != job);
        self.durable.retain(|other| *other != job);
        self.drops.retain(|other| *other != job);
    }

    /// Writes that wait for company.
    fn writes(&self) -> usize {
        self.written.len() + self.durable.len()
    }

    fn waiting(&self) -> usize {
        self.writes() + self.drops.len()
    }

    /// When the batch that is being collected must go, or must be given up.
    pub(crate) fn due(&self, config: &StoreConfig) -> Option<u64> {
        if let (Some(since), false) = (self.jammed, self.wedged) {
            return Some(since + config.deadline_us + 1);
        }
        let collecting = self.stage == Stage::Idle && self.jammed.is_none() && self.waiting() > 0;
        // What came after the last turn waits from the next one on.
        collecting.then(|| self.since.map_or(0, |since| since + config.flush_us))
    }
}

impl<I: BlockIo> Store<I> {
    /// Begins what the cycle needs next.
    pub(crate) fn move_cycle(&mut self, now: u64, done: &mut Vec<StoreDone>) {
        self.look_at_jam(now, done);
        let cycle = &mut self.cycle;
        // What waited may have failed meanwhile.
        cycle.since = (cycle.waiting() > 0).then(|| cycle.since.unwrap_or(now));
        if self.health.off || !self.has_room() {
            return;
        }
        let cycle = &self.cycle;
        let late = cycle
            .since
            .is_some_and(|since| now >= since + self.config.flush_us);
        let due = late || cycle.waiting() >= self.config.flush_blocks.max(1) || self.is_much();
        // Once all that was taken is written, there is no company to wait for.
        let alone = self.unlisted == cycle.writes() as u64;
        match cycle.stage {
            Stage::Recorded => self.begin_flush(now),
            Stage::Idle if !cycle.durable.is_empty() && (due || alone || cycle.ripe) => {
                self.begin_records(now);
            }
            Stage::Idle
                if !cycle.drops.is_empty() && (due || (alone && cycle.written.is_empty())) =>
            {
                self.begin_records(now);
            }
            Stage::Idle if !cycle.written.is_empty() && (due || alone) => {
                self.begin_flush(now);
            }
            _ => {}
        }
    }

    /// Whether what is written is company enough by its bytes, counted as if all blocks were as large as the last.
    fn is_much(&self) -> bool {
        let cycle = &self.cycle;
        let last = cycle.written.back().or(cycle.durable.back());
        let last = last.and_then(|id| self.jobs.get(*id));
        let bytes = match last.map(|job| &job.work) {
            Some(Work::Write(write)) => write.geometry.block_bytes(),
            _ => 0,
        };
        cycle.writes() as u64 * bytes >= self.config.flush_bytes
    }

    fn begin_records(&mut self, now: u64) {
        let cycle = &self.cycle;
        let count = (cycle.durable.len() + cycle.drops.len()).min(MOST_PAGES * PER_PAGE);
        let pages = count.div_ceil(PER_PAGE);
        if cycle.at + pages as u64 > self.layout.half_pages && !self.begin_half(now) {
            return;
        }
        self.cycle.jammed = None;
        let salt = self.config.salt();
        let mut records = Vec::with_capacity(count);
        while records.len() < count {
            let cycle = &mut self.cycle;
            let Some(id) = cycle
                .durable
                .pop_front()
                .or_else(|| cycle.drops.pop_front())
            else {
                break;
            };
            let Some(job) = self.jobs.get(id) else {
                continue;
            };
            let seq = self.next_seq;
            let record = match &job.work {
                Work::Write(write) => {
                    Record::new(Kind::Stored, seq, write.name, &write.header.key, write.to)
                        .with_block(write.header.parent, write.header_crc)
                }
                Work::Drop { place, key, .. } => Record::new(Kind::Dropped, seq, 0, key, *place),
                Work::Read(_) => continue,
            };
            #[cfg(feature = "planted")]
            let record = match (self.plant, &job.work) {
                (Some(super::Plant::ForgetDrops), Work::Drop { .. }) => record.of_nothing(),
                _ => record,
            };
            self.next_seq += 1;
            self.cycle.named.push(Named { job: id, seq });
            records.push(record.sealed(salt));
        }
        let (epoch, at, id) = (self.cycle.epoch, self.cycle.at, self.head.id);
        let mut buffer = Aligned::new(pages);
        let pieces = records.chunks(PER_PAGE);
        for (n, (page, some)) in buffer.bytes_mut().chunks_mut(PAGE).zip(pieces).enumerate() {
            encode_page(page, &id, List::Journal, epoch, at + n as u64, some);
        }
        self.counters.journal_pages += pages as u64;
        self.cycle.at += pages as u64;
        self.cycle.stage = Stage::Records;
        if self.cycle.durable.is_empty() {
            self.cycle.ripe = false;
        }
        if self.cycle.waiting() == 0 {
            self.cycle.since = None;
        }
        let offset = self.layout.half_at(epoch) + at * PAGE as u64;
        self.start(now, Purpose::Records, |token| Op::Write {
            token,
            offset,
            buffer: Buffer::Own(buffer),
        });
    }

    /// Goes over to the other half of the journal, if it is free. What this half says goes into a checkpoint.
    fn begin_half(&mut self, now: u64) -> bool {
        if self.merge.is_some() {
            self.counters.journal_jams += u64::from(self.cycle.jammed.is_none());
            self.cycle.jammed.get_or_insert(now);
            return false;
        }
        let full = Epoch {
            epoch: self.cycle.epoch,
            used: self.cycle.at,
        };
        self.merge = Some(Merge::new(&self.head, &self.layout, full));
        self.cycle.epoch += 1;
        self.cycle.at = 0;
        true
    }

    /// Gives up what waits for room in the journal too long: a checkpoint that can't be written must not keep core's memory.
    fn look_at_jam(&mut self, now: u64, done: &mut Vec<StoreDone>) {
        let Some(since) = self.cycle.jammed else {
            return;
        };
        if self.merge.is_none() {
            (self.cycle.jammed, self.cycle.wedged) = (None, false);
        } else if now > since + self.config.deadline_us {
            self.cycle.wedged = true;
            self.fail_jobs(done, &|job| !matches!(job.work, Work::Read(_)));
            self.cycle.since = None;
        }
    }

    /// Records are written, or could not be.
    pub(crate) fn records_written(&mut self, good: bool, done: &mut Vec<StoreDone>) {
        self.cycle.stage = Stage::Recorded;
        if !good || self.health.off {
            self.fail_named(done);
        }
        #[cfg(feature = "planted")]
        if self.plant == Some(super::Plant::EarlyAnswer) {
            self.answer_named(done);
        }
    }

    fn begin_flush(&mut self, now: u64) {
        let names = &self.names;
        let jobs = &self.jobs;
        let (mut covered, mut left) = (Vec::new(), VecDeque::new());
        for id in self.cycle.written.drain(..) {
            match jobs.get(id).map(|job| &job.work) {
                Some(Work::Write(write)) if names.is_written(write.name) => covered.push(id),
                _ => left.push_back(id),
            }
        }
        self.cycle.written = left;
        let cycle = &mut self.cycle;
        if cycle.named.is_empty() && covered.is_empty() {
            // The name of all that is written is not: they wait once more.
            cycle.stage = Stage::Idle;
            cycle.since = Some(now);
            return;
        }
        cycle.since = (!cycle.drops.is_empty()).then_some(now);
        cycle.ripe = cycle.named.is_empty() || (cycle.ripe && !cycle.durable.is_empty());
        cycle.covered = covered;
        #[cfg(feature = "planted")]
        if self.plant == Some(super::Plant::JournalFirst) && self.cycle.named.is_empty() {
            self.cycle.durable.extend(self.cycle.covered.drain(..));
            return self.begin_records(now);
        }
        self.names.cover();
        self.cycle.stage = Stage::Flush;
        self.start(now, Purpose::Flush, |token| Op::Flush { token });
    }

    /// The flush of the cycle is over.
    pub(crate) fn flushed(&mut self, now: u64, good: bool, done: &mut Vec<StoreDone>) {
        if !good || self.cycle.spoilt {
            self.cycle.spoilt = false;
            self.fail_named(done);
            return self.flush_failed(now, done);
        }
        self.names.covered();
        self.answer_named(done);
        let covered = std::mem::take(&mut self.cycle.covered);
        self.cycle.durable.extend(covered);
        self.cycle.stage = Stage::Idle;
    }

    fn answer_named(&mut self, done: &mut Vec<StoreDone>) {
        for named in std::mem::take(&mut self.cycle.named) {
            let Some(job) = self.jobs.remove(named.job) else {
                continue;
            };
            match job.work {
                Work::Write(write) => {
                    let (op, result) = (write.op, Ok(()));
                    done.push(StoreDone::Written { op, result });
                    self.unlisted -= 1;
                    self.table.store(write.to, named.seq, write.name);
                    self.counters.writes += 1;
                    self.counters.write_bytes += write.geometry.block_bytes();
                }
                Work::Drop { op, place, .. } => {
                    let result = Ok(());
                    done.push(StoreDone::Dropped { op, result });
                    if let Some(name) = self.table.drop_older(place, named.seq) {
                        self.names.release(name);
                    }
                    self.counters.drops += 1;
                }
                Work::Read(_) => {}
            }
        }
    }

    /// What was to be listed may be listed or not.
    pub(crate) fn fail_named(&mut self, done: &mut Vec<StoreDone>) {
        for named in std::mem::take(&mut self.cycle.named) {
            self.finish(named.job, StoreError::Io, done);
        }
        if self.cycle.stage == Stage::Recorded {
            self.cycle.stage = Stage::Idle;
        }
        // What was to be flushed with these records may be so still.
        self.cycle.spoilt &= self.is_flushing();
    }

    /// Whether a flush of the cycle is under way.
    fn is_flushing(&self) -> bool {
        let flush = |flight: &Flight| matches!(flight.purpose, Purpose::Flush);
        self.flights.values().any(flush)
    }

    /// A flush failed, and whatever the device had taken before and not flushed may be gone: no write that is under way can be
    /// trusted any more, nor the checkpoint that is being written.
    pub(crate) fn flush_failed(&mut self, now: u64, done: &mut Vec<StoreDone>) {
        self.names.lose();
        // If it was a checkpoint's, one of the cycle may still be under way.
        let another = self.is_flushing();
        if self.cycle.stage == Stage::Flush && !another {
            self.cycle.stage = Stage::Idle;
        }
        self.cycle.spoilt = another || !self.cycle.named.is_empty();
        self.fail_jobs(done, &|job| matches!(job.work, Work::Write(_)));
        self.restart_merge(now);
    }

    /// Nothing of a batch goes on; what has a record under way waits for the device.
    pub(crate) fn stop_cycle(&mut self, done: &mut Vec<StoreDone>) {
        self.cycle.written.clear();
        self.cycle.drops.clear();
        self.cycle.durable.clear();
        self.cycle.covered.clear();
        self.cycle.since = None;
        if self.cycle.stage == Stage::Recorded {
            self.fail_named(done);
        }
    }
}
