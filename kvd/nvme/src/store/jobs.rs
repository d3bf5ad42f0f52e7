//! Operations that were asked for: whether they are taken, their parts on the device, their answers. Deliberately absent: when a
//! write is durable (`cycle`).

use std::collections::BTreeSet;
use std::sync::Arc;

use kvd_core::tier::{
    BlockHeader, BlockKey, OpId, Place, STORE_PAGE, StoreDone, StoreError, StoreOp, stride_of,
};
use kvd_core::{GroupGeometry, NamespaceRecord};

use super::block::{block_fits, encode_block};
use super::format::{encode_name, name_bytes};
use super::names::Slotted;
use super::read::ReadJob;
use super::{Purpose, Store, slots};
use crate::io::{Aligned, BlockIo, Buffer, HostBytes, Op, PAGE};

/// Operations of the device that parts of blocks leave free for flushes, records, checkpoints.
pub const RESERVE: usize = 3;

/// One operation.
pub(crate) struct Piece {
    pub(crate) job: u64,
    pub(crate) what: What,
}

/// Which part of its job.
pub(crate) enum What {
    Name { slot: u32, record: Arc<[u8]> },
    WriteHead,
    WriteBody,
    ReadHead,
    ReadBody,
}

/// A write from its taking to its answer.
pub(crate) struct WriteJob<H> {
    pub(crate) op: OpId,
    pub(crate) to: Place,
    pub(crate) header: Box<BlockHeader>,
    pub(crate) geometry: Box<GroupGeometry>,
    /// Slot of its namespace.
    pub(crate) name: u32,
    host: Option<H>,
    pub(crate) header_crc: u64,
}

/// What is done.
pub(crate) enum Work<H> {
    Write(WriteJob<H>),
    Read(ReadJob<H>),
    Drop {
        op: OpId,
        place: Place,
        key: BlockKey,
    },
}

/// An operation that was taken.
pub(crate) struct Job<H> {
    pub(crate) work: Work<H>,
    /// Parts that are not over.
    pub(crate) left: u32,
    /// One part has begun.
    pub(crate) begun: bool,
    /// It will be answered with `Io` as soon as its parts are over.
    pub(crate) failed: bool,
}

impl<H> Job<H> {
    /// What was asked for.
    pub(crate) fn op(&self) -> OpId {
        match &self.work {
            Work::Write(WriteJob { op, .. })
            | Work::Read(ReadJob { op, .. })
            | Work::Drop { op, .. } => *op,
        }
    }

    /// The answer with an error.
    pub(crate) fn refusal(self, error: StoreError) -> StoreDone {
        let result = Err(error);
        match self.work {
            Work::Write(WriteJob { op, .. }) => StoreDone::Written { op, result },
            Work::Read(ReadJob { op, block, .. }) => StoreDone::Read { op, block, result },
            Work::Drop { op, .. } => StoreDone::Dropped { op, result },
        }
    }
}

impl<I: BlockIo> Store<I> {
    /// Takes an operation, or answers it.
    pub(crate) fn take(&mut self, op: StoreOp, host: Option<I::Host>) -> Result<(), StoreDone> {
        if self.health.off {
            self.counters.refused_off += 1;
            return Err(op.refused(StoreError::Off));
        }
        if self.jobs.len() >= self.config.max_queue.min(slots::MOST) {
            self.counters.refused_queue += 1;
            return Err(op.refused(StoreError::Off));
        }
        if self.cycle.wedged && !matches!(op, StoreOp::Read { .. }) {
            self.counters.refused_full += 1;
            return Err(op.refused(StoreError::Off));
        }
        if !self.makes_sense(&op, host.as_ref()) {
            self.counters.refused_invalid += 1;
            return Err(op.refused(StoreError::Io));
        }
        match op {
            StoreOp::Write { .. } => self.take_write(op, host),
            StoreOp::Read {
                op,
                from,
                into,
                key,
                block,
            } => {
                let read = ReadJob::new(op, from, into.bytes, key, block, host);
                self.add(Work::Read(read), [What::ReadHead, What::ReadBody]);
                Ok(())
            }
            StoreOp::Drop { op, place, key } => {
                let job = self.add(Work::Drop { op, place, key }, []);
                self.cycle.drops.push_back(job);
                Ok(())
            }
        }
    }

    /// Whether place, sizes and memory fit each other.
    fn makes_sense(&self, op: &StoreOp, host: Option<&I::Host>) -> bool {
        let block = |place: Place, bytes: u64, geometry: &GroupGeometry| {
            geometry.validate().is_ok()
                && geometry.block_bytes() == bytes
                && place.stride == stride_of(bytes)
                && self.layout.has(place)
                && host.is_some_and(|host| host.len() as u64 == bytes.next_multiple_of(STORE_PAGE))
        };
        match op {
            StoreOp::Write {
                to,
                from,
                header,
                geometry,
                ..
            } => {
                block(*to, from.bytes, geometry)
                    && header.cut.crc_count() as usize == header.crcs.len()
                    && header.cut.heads() == geometry.heads
                    && header.cut.layer_bounds().last() == Some(&geometry.layers)
                    && self.table.is_free(*to)
            }
            StoreOp::Read {
                from,
                into,
                block: read,
                ..
            } => block(*from, into.bytes, &read.geometry),
            StoreOp::Drop { place, .. } => self.layout.has(*place),
        }
    }

    fn take_write(&mut self, op: StoreOp, host: Option<I::Host>) -> Result<(), StoreDone> {
        let StoreOp::Write { header, record, .. } = &op else {
            return Err(op.refused(StoreError::Io));
        };
        if self.table.live() + self.unlisted >= self.layout.most_blocks() {
            self.counters.refused_full += 1;
            return Err(op.refused(StoreError::Off));
        }
        if !block_fits(header) {
            self.counters.refused_header += 1;
            return Err(op.refused(StoreError::Io));
        }
        let id = header.key.namespace;
        let (name, new) = match self.names.claim(id) {
            Slotted::Held(slot) => (slot, false),
            Slotted::New(slot) => (slot, true),
            Slotted::Full => {
                self.counters.refused_full += 1;
                return Err(op.refused(StoreError::Off));
            }
        };
        if new && !NamespaceRecord::parse(record).is_ok_and(|record| record.id() == id) {
            self.names.wrote(name, false);
            self.names.release(name);
            self.counters.refused_invalid += 1;
            return Err(op.refused(StoreError::Io));
        }
        let StoreOp::Write {
            op,
            to,
            header,
            geometry,
            record,
            ..
        } = op
        else {
            return Ok(());
        };
        self.unlisted += 1;
        let job = self.add(
            Work::Write(WriteJob {
                op,
                to,
                header,
                geometry,
                name,
                host,
                header_crc: 0,
            }),
            [What::WriteHead, What::WriteBody],
        );
        if new {
            let slot = name;
            let what = What::Name { slot, record };
            self.pieces.push_back(Piece { job, what });
            self.job(job).left += 1;
        }
        Ok(())
    }

    fn add<const N: usize>(&mut self, work: Work<I::Host>, parts: [What; N]) -> u64 {
        let left = N as u32;
        let (begun, failed) = (false, false);
        let job = self.jobs.insert(Job {
            work,
            left,
            begun,
            failed,
        });
        let pieces = parts.into_iter().map(|what| Piece { job, what });
        self.pieces.extend(pieces);
        job
    }

    /// A job that is known to be there.
    pub(crate) fn job(&mut self, job: u64) -> &mut Job<I::Host> {
        self.jobs
            .get_mut(job)
            .expect("a job stays until it is answered")
    }

    /// Begins parts of jobs, as many as the device takes. A block's header and bytes begin together: they lie side by side, and the
    /// system makes one operation of both if it has them at once.
    pub(crate) fn start_pieces(&mut self, now: u64, done: &mut Vec<StoreDone>) {
        let most = self.io.depth().saturating_sub(RESERVE).max(1);
        while self.parts < most && self.has_room() {
            let heads = |piece: &Piece| matches!(piece.what, What::WriteHead | What::ReadHead);
            if most - self.parts < 2.min(most) && self.pieces.front().is_some_and(heads) {
                return;
            }
            let Some(piece) = self.pieces.pop_front() else {
                return;
            };
            self.start_piece(now, piece, done);
        }
    }

    fn start_piece(&mut self, now: u64, piece: Piece, done: &mut Vec<StoreDone>) {
        let (layout, id) = (self.layout, self.head.id);
        let spare = match piece.what {
            What::WriteHead | What::ReadHead => self.spare.pop(),
            _ => None,
        };
        let job = self.job(piece.job);
        // A namespace may be waited for by others too.
        if job.failed && !matches!(piece.what, What::Name { .. }) {
            return self.piece_done(piece, false, None, done);
        }
        job.begun = true;
        let (offset, read, buffer) = match (&mut job.work, &piece.what) {
            (Work::Write(write), What::Name { slot, record }) => {
                let mut pages = Aligned::new(name_bytes(record.len()) / PAGE);
                let namespace = write.header.key.namespace;
                encode_name(pages.bytes_mut(), &id, *slot, namespace, record);
                (layout.name_at(*slot), false, Some(Buffer::Own(pages)))
            }
            (Work::Write(write), What::WriteHead) => {
                let at = layout.block_at(write.to);
                let mut page = spare.unwrap_or_else(|| Aligned::new(1));
                let (header, geometry) = (&write.header, &write.geometry);
                let sum = encode_block(page.bytes_mut(), &id, header, geometry, at);
                write.header_crc = sum.unwrap_or(0);
                (at, false, sum.map(|_| Buffer::Own(page)))
            }
            (Work::Write(write), _) => {
                let at = layout.block_at(write.to) + STORE_PAGE;
                (at, false, write.host.take().map(Buffer::Host))
            }
            (Work::Read(read), What::ReadHead) => {
                let page = Buffer::Own(spare.unwrap_or_else(|| Aligned::new(1)));
                (layout.block_at(read.from), true, Some(page))
            }
            (Work::Read(read), _) => {
                let at = layout.block_at(read.from) + STORE_PAGE;
                (at, true, read.host.take().map(Buffer::Host))
            }
            (Work::Drop { .. }, _) => (0, true, None),
        };
        let Some(buffer) = buffer else {
            return self.piece_done(piece, false, None, done);
        };
        self.start(now, Purpose::Piece(piece), |token| match read {
            true => Op::Read {
                token,
                offset,
                buffer,
            },
            false => Op::Write {
                token,
                offset,
                buffer,
            },
        });
    }

    /// A part is over, or will not begin.
    pub(crate) fn piece_done(
        &mut self,
        piece: Piece,
        good: bool,
        buffer: Option<Buffer<I::Host>>,
        done: &mut Vec<StoreDone>,
    ) {
        if let What::Name { slot, .. } = piece.what {
            self.names.wrote(slot, good);
            if !good {
                self.fail_writes_of(slot, done);
            }
        }
        let Some(job) = self.jobs.get_mut(piece.job) else {
            return;
        };
        job.left -= 1;
        job.failed |= !good;
        let (is_write, buffer) = match &mut job.work {
            Work::Write(_) => (true, buffer),
            Work::Read(read) => {
                read.got(buffer);
                (false, None)
            }
            Work::Drop { .. } => (false, None),
        };
        let (left, failed) = (job.left, job.failed);
        if let Some(Buffer::Own(page)) = buffer {
            self.give_back(page);
        }
        match (left, failed, is_write) {
            (0, true, _) => self.finish(piece.job, StoreError::Io, done),
            (0, false, true) => self.cycle.is_written(piece.job),
            (0, false, false) => self.unchecked.push_back(piece.job),
            _ => {}
        }
    }

    /// The record of a namespace could not be written: none of the blocks that need it can be listed.
    fn fail_writes_of(&mut self, slot: u32, done: &mut Vec<StoreDone>) {
        self.fail_jobs(done, &|job| match &job.work {
            Work::Write(write) => write.name == slot,
            _ => false,
        });
    }

    /// Fails some of the jobs that are not listed yet: now those whose parts are over, the others when they are.
    pub(crate) fn fail_jobs(
        &mut self,
        done: &mut Vec<StoreDone>,
        which: &dyn Fn(&Job<I::Host>) -> bool,
    ) {
        let listed: BTreeSet<u64> = self.cycle.named.iter().map(|named| named.job).collect();
        let mut over = Vec::new();
        for (id, job) in self.jobs.iter_mut() {
            if which(job) && !listed.contains(&id) {
                job.failed = true;
                over.extend((job.left == 0).then_some(id));
            }
        }
        over.sort_unstable();
        for id in over {
            self.cycle.forget(id);
            self.finish(id, StoreError::Io, done);
        }
    }

    /// Answers a job with an error, and gives up what it holds.
    pub(crate) fn finish(&mut self, job: u64, error: StoreError, done: &mut Vec<StoreDone>) {
        let Some(job) = self.jobs.remove(job) else {
            return;
        };
        let name = match &job.work {
            Work::Write(write) => Some(write.name),
            _ => None,
        };
        done.push(job.refusal(error));
        if let Some(name) = name {
            self.unlisted -= 1;
            self.names.release(name);
        }
    }
}
