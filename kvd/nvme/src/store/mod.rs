//! What lies where on a device, what is durable when, and what is found after a crash. Sans-IO above [`BlockIo`]: it never waits
//! but in `poll`, reads no clock, and starts no thread; the same calls give the same operations.
//!
//! A write goes: header and bytes to their place (and the namespace's record to its slot, once) - a flush - the journal's record - a
//! flush - the answer. So the journal is never ahead of the data (invariant 4). One flush serves as the second of one batch and as
//! the first of the next. When a half of the journal is full, the other is begun, and a checkpoint of all before is written from the
//! records on the device, piece by piece, between other work; then the superblock names it, and the first half is free again.
//!
//! Bytes are checked when they are read, against the header beside them; recovery looks at records alone.
//! Deliberately absent: which place to take, and what to forget (core); threads and real devices ([`crate::io`]).

mod block;
mod config;
mod cycle;
mod format;
mod fsck;
#[cfg(any(test, feature = "fuzzing"))]
#[doc(hidden)]
pub mod fuzzing;
mod jobs;
mod layout;
#[cfg(any(test, feature = "fuzzing"))]
mod memory;
mod merge;
mod names;
mod off;
mod open;
#[cfg(feature = "planted")]
mod plant;
mod read;
mod recover;
mod slots;
mod start;
mod table;
#[cfg(test)]
mod tests;
mod verify;
mod wire;

use std::collections::{BTreeSet, VecDeque};
use std::time::Duration;

use kvd_arena::checksum::State as Sum;
use kvd_core::tier::{OpId, StoreDone, StoreError, StoreOp, StoreShape};

pub use self::block::Flaw;
pub use self::config::{Counters, OpenError, RecoveryReport, StoreConfig};
pub use self::format::PER_PAGE;
pub use self::format::VERSION;
pub use self::fsck::{Finding, FsckReport, fsck};
pub use self::jobs::RESERVE;
#[cfg(feature = "planted")]
pub use self::plant::Plant;
pub use self::recover::Found;
pub use self::start::{START_BYTES, Start};

use self::block::BlockPage;
use self::cycle::Cycle;
use self::format::Superblock;
use self::jobs::{Job, Piece, What};
use self::layout::Layout;
use self::merge::Merge;
use self::names::Names;
use self::off::Health;
use self::recover::State;
use self::slots::Slots;
use self::table::Table;
use self::wire::Wire;
use crate::io::{Aligned, BlockIo, Done, Op, PAGE};

/// A store that is ready, and what it held.
pub struct Opened<I: BlockIo> {
    /// The store.
    pub store: Store<I>,
    /// How it is divided.
    pub shape: StoreShape,
    /// What was found.
    pub report: RecoveryReport,
}

/// What an operation of the device is for.
pub(crate) enum Purpose {
    /// A part of a job.
    Piece(Piece),
    /// Records of a batch.
    Records,
    /// The flush of a batch.
    Flush,
    /// A step of a checkpoint.
    Merge,
    /// Whether the device answers again.
    Probe,
}

/// An operation of the device.
pub(crate) struct Flight {
    since: u64,
    purpose: Purpose,
}

/// The store on one device. Owned and driven by one thread.
pub struct Store<I: BlockIo> {
    io: I,
    config: StoreConfig,
    layout: Layout,
    /// As it is on the device.
    head: Superblock,
    table: Table,
    names: Names,
    next_seq: u64,
    /// What was taken and not answered. Bounded by `max_queue`. A job leaves as its answer is told, with nothing in between that could
    /// panic.
    jobs: Slots<Job<I::Host>>,
    /// Writes among them that have no record yet.
    unlisted: u64,
    /// Parts of jobs that wait for the device.
    pieces: VecDeque<Piece>,
    flights: Slots<Flight>,
    /// Of those: parts of jobs.
    parts: usize,
    cycle: Cycle,
    merge: Option<Merge>,
    health: Health,
    counters: Counters,
    over: Vec<Done<I::Host>>,
    /// Pages for headers, to be used again.
    spare: Vec<Aligned>,
    /// Memory for sums of what is checked, to be used again.
    sums: Vec<Sum>,
    /// The header of what was checked last.
    page: BlockPage,
    /// Reads whose bytes are there and not checked.
    unchecked: VecDeque<u64>,
    #[cfg(feature = "planted")]
    plant: Option<Plant>,
}

impl<I: BlockIo> Store<I> {
    /// Makes a store on an empty device, or opens the one that is there, and tells what it holds: namespaces first, then blocks,
    /// each once, mostly in the order in which they were stored. Waits for the device; a device that is dead is given up after a
    /// minute.
    pub fn open(
        mut io: I,
        config: &StoreConfig,
        found: &mut dyn FnMut(Found<'_>),
    ) -> Result<Opened<I>, OpenError> {
        let mut wire = Wire::new(&mut io);
        let state = match recover::heads(&mut wire, config)? {
            None => {
                let state = open::format(&mut wire, config)?;
                found(Found::Shape(state.layout.shape));
                state
            }
            Some(heads) => {
                found(Found::Shape(heads.layout.shape));
                let repaired = open::mend(&mut wire, &heads)?;
                let mut state = recover::recover(&mut wire, &heads, found, &mut |_, _| {})?;
                state.report.superblocks_repaired = repaired;
                state
            }
        };
        Ok(Self::ready(io, config, state))
    }

    fn ready(io: I, config: &StoreConfig, state: State) -> Opened<I> {
        let (shape, report) = (state.layout.shape, state.report);
        let merge = match state.epochs[..] {
            [old, _] => Some(Merge::new(&state.head, &state.layout, old)),
            _ => None,
        };
        let cycle = Cycle::new(&state.head, state.epochs.last());
        let store = Store {
            io,
            config: config.clone(),
            layout: state.layout,
            head: state.head,
            table: state.table,
            names: state.names,
            next_seq: state.next_seq,
            jobs: Slots::new(),
            unlisted: 0,
            pieces: VecDeque::new(),
            flights: Slots::new(),
            parts: 0,
            cycle,
            merge,
            health: Health::default(),
            counters: Counters::default(),
            over: Vec::new(),
            spare: Vec::new(),
            sums: Vec::new(),
            page: BlockPage::new(),
            unchecked: VecDeque::new(),
            #[cfg(feature = "planted")]
            plant: None,
        };
        Opened {
            store,
            shape,
            report,
        }
    }

    /// Takes an operation; `host` is its memory (none for a drop). Never waits. What is not taken is answered at once, and its
    /// memory given up: `Off` if the store is switched off or has too many operations, `Io` if the operation makes no sense.
    #[must_use]
    pub fn submit(&mut self, op: StoreOp, host: Option<I::Host>) -> Option<StoreDone> {
        let answer = self.take(op, host).err();
        self.counters.queue_most = self.counters.queue_most.max(self.jobs.len() as u64);
        answer
    }

    /// Moves everything on: starts operations of the device, waits for at most `wait` if nothing is over, and appends what is.
    pub fn turn(&mut self, now_us: u64, wait: Duration, done: &mut Vec<StoreDone>) {
        self.advance(now_us, done);
        let wait = if done.is_empty() && self.unchecked.is_empty() {
            wait
        } else {
            Duration::ZERO
        };
        self.look(now_us, wait, done);
        // Only now: what the device has finished while nobody looked is not late.
        self.watch(now_us, done);
        self.advance(now_us, done);
        if !self.unchecked.is_empty() {
            // The device gets its next operations before this thread turns to checksums.
            self.look(now_us, Duration::ZERO, done);
            self.check_some(done);
        }
    }

    /// Takes what the device has finished.
    fn look(&mut self, now: u64, wait: Duration, done: &mut Vec<StoreDone>) {
        let mut over = std::mem::take(&mut self.over);
        self.io.poll(wait, &mut over);
        for one in over.drain(..) {
            self.completed(now, one, done);
        }
        self.over = over;
    }

    fn advance(&mut self, now: u64, done: &mut Vec<StoreDone>) {
        self.move_cycle(now, done);
        self.move_merge(now);
        self.start_pieces(now, done);
    }

    fn completed(&mut self, now: u64, one: Done<I::Host>, done: &mut Vec<StoreDone>) {
        let Some(flight) = self.flights.remove(one.token) else {
            return;
        };
        let good = one.result.is_ok();
        self.judge(now, &flight.purpose, &one.result, done);
        match flight.purpose {
            Purpose::Piece(piece) => {
                self.parts -= 1;
                self.piece_done(piece, good, one.buffer, done);
            }
            Purpose::Records => self.records_written(good, done),
            Purpose::Flush => self.flushed(now, good, done),
            Purpose::Merge => self.merge_step_done(now, good, one.buffer, done),
            Purpose::Probe => self.probed(now, good),
        }
    }

    /// A page may be used for another header. As many are kept as may be under way.
    pub(crate) fn give_back(&mut self, page: Aligned) {
        if page.bytes().len() == PAGE && self.spare.len() < self.io.depth() {
            self.spare.push(page);
        }
    }

    /// Whether one more operation of the device may begin.
    fn has_room(&self) -> bool {
        self.flights.len() < self.io.depth().max(1)
    }

    fn start(&mut self, now: u64, purpose: Purpose, op: impl FnOnce(u64) -> Op<I::Host>) {
        match purpose {
            Purpose::Piece(_) => self.parts += 1,
            Purpose::Flush => self.counters.flushes += 1,
            _ => {}
        }
        let since = now;
        let token = self.flights.insert(Flight { since, purpose });
        self.io.start(op(token));
    }

    /// When to turn next by the clock, whatever the device does. Turn at once after [`Store::submit`].
    pub fn next_deadline(&self) -> Option<u64> {
        let oldest = self.flights.values().map(|flight| flight.since).min();
        let late = oldest.filter(|_| !self.health.off);
        let begins = !self.health.off && self.has_room();
        let rest = self.merge.as_ref().and_then(Merge::not_before);
        [
            (!self.unchecked.is_empty()).then_some(0),
            late.map(|since| since + self.config.deadline_us + 1),
            self.cycle.due(&self.config).filter(|_| begins),
            rest.filter(|_| begins),
            self.health.off.then_some(self.health.probe_at),
        ]
        .into_iter()
        .flatten()
        .min()
    }

    /// Operations that are taken and not answered.
    pub fn pending(&self) -> usize {
        self.jobs.len()
    }

    /// Whether this operation is one of them.
    pub fn has(&self, op: OpId) -> bool {
        self.jobs.values().any(|job| job.op() == op)
    }

    /// Whether the store is switched off.
    pub fn is_off(&self) -> bool {
        self.health.off
    }

    /// How large it was made, in bytes.
    pub fn bytes(&self) -> u64 {
        self.layout.capacity
    }

    /// Where the first segment begins, bytes.
    pub fn segments_at(&self) -> u64 {
        self.layout.segments_at
    }

    /// Blocks that a restart would find.
    pub fn blocks(&self) -> u64 {
        self.table.live()
    }

    /// What the store did.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// The device, for its own gauges and its waker.
    pub fn io(&self) -> &I {
        &self.io
    }

    /// Gives everything up after a panic, and answers what is still listed as taken. First (`tell`) all but reads into host memory that
    /// are with the device: it can write no memory of these. Then ends the device, which waits for what is under way as long as its
    /// adapter has patience, and gives the answers of the rest. Reads that the device may still be doing even then are `Lost`, and
    /// counted: their memory must not be used for anything else (invariant 3).
    pub fn abandon(self, tell: impl FnOnce(Vec<StoreDone>)) -> (Vec<StoreDone>, Counters) {
        let Self {
            io,
            mut jobs,
            flights,
            mut counters,
            ..
        } = self;
        let into_host = |flight: &Flight| match &flight.purpose {
            Purpose::Piece(Piece {
                job,
                what: What::ReadBody,
            }) => Some(*job),
            _ => None,
        };
        let reads = flights.values().filter_map(into_host);
        let reads: Vec<_> = reads
            .filter_map(|job| Some((job, jobs.remove(job)?)))
            .collect();
        let io_error = |job: Job<I::Host>| job.refusal(StoreError::Io);
        tell(jobs.into_values().map(io_error).collect());
        let left = io.drain().into_iter();
        let left = left.filter_map(|token| into_host(flights.get(token)?));
        let left: BTreeSet<u64> = left.collect();
        counters.lost = left.len() as u64;
        let answer = |(id, job): (u64, Job<I::Host>)| match left.contains(&id) {
            true => job.refusal(StoreError::Lost),
            false => io_error(job),
        };
        (reads.into_iter().map(answer).collect(), counters)
    }

    /// Finishes and makes durable what is under way, in at most `turns` waits of `wait` each, and gives the device and the last counts
    /// back. A checkpoint under way is left where it is: the next start goes on from the one before.
    pub fn close(
        mut self,
        now_us: u64,
        wait: Duration,
        turns: usize,
        done: &mut Vec<StoreDone>,
    ) -> (I, Counters) {
        self.config.flush_us = 0;
        let mut over = Vec::new();
        for _ in 0..turns {
            if self.jobs.is_empty() {
                break;
            }
            self.turn(now_us, wait, &mut over);
            done.append(&mut over);
        }
        (self.io, self.counters)
    }
}
