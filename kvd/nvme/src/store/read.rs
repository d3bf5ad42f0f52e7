//! Reading a block: header and bytes come together, and nothing is answered as good before both were checked. The check is over
//! the memory that the bytes were read into. Deliberately absent: what to do about a damaged block (core drops it).

use kvd_arena::checksum::State;
use kvd_core::GroupGeometry;
use kvd_core::tier::{BlockKey, OpId, Place, StoreDone, StoreError};

use super::Store;
use super::format::{BlockPage, Flaw, decode_block};
use super::jobs::Work;
use super::verify::Verifier;
use crate::io::{Aligned, BlockIo, Buffer, HostBytes};

/// Bytes that are checked before the device is looked after again.
const CHECKED_AT_ONCE: u64 = 512 << 10;

/// A read from its taking to its answer.
pub(crate) struct ReadJob<H> {
    pub(crate) op: OpId,
    pub(crate) from: Place,
    bytes: u64,
    key: BlockKey,
    geometry: Box<GroupGeometry>,
    head: Option<Aligned>,
    pub(crate) host: Option<H>,
}

impl<H> ReadJob<H> {
    pub(crate) fn new(
        op: OpId,
        from: Place,
        bytes: u64,
        key: BlockKey,
        geometry: Box<GroupGeometry>,
        host: Option<H>,
    ) -> Self {
        let head = None;
        ReadJob {
            op,
            from,
            bytes,
            key,
            geometry,
            head,
            host,
        }
    }

    /// A buffer came back.
    pub(crate) fn got(&mut self, buffer: Option<Buffer<H>>) {
        match buffer {
            Some(Buffer::Own(page)) => self.head = Some(page),
            Some(Buffer::Host(host)) => self.host = Some(host),
            None => {}
        }
    }
}

/// Whether a header is that of this block at this offset, and of these sizes.
pub(crate) fn check_header(
    page: &[u8],
    store: &[u8; 16],
    offset: u64,
    key: &BlockKey,
    geometry: Option<&GroupGeometry>,
) -> Result<BlockPage, Flaw> {
    let page = decode_block(page, store)?;
    if page.header.key != *key || page.offset != offset {
        return Err(Flaw::OtherBlock);
    }
    let there = &page.geometry;
    let same = geometry.is_none_or(|wanted| {
        let kind = wanted.kind;
        let window = wanted.window;
        *wanted
            == GroupGeometry {
                kind,
                window,
                ..there.clone()
            }
    });
    if !same {
        return Err(Flaw::Geometry);
    }
    Ok(page)
}

impl<I: BlockIo> Store<I> {
    /// Checks and answers some of what was read; the rest comes in the next turn, so that neither the device nor those who wait
    /// for the first answers wait for the last checksum.
    pub(crate) fn check_some(&mut self, done: &mut Vec<StoreDone>) {
        let mut left = CHECKED_AT_ONCE;
        while left > 0
            && let Some(job) = self.unchecked.pop_front()
        {
            let bytes = match self.jobs.get(job).map(|job| &job.work) {
                Some(Work::Read(read)) => read.bytes,
                _ => 0,
            };
            self.finish_read(job, done);
            left = left.saturating_sub(bytes);
        }
    }

    /// Checks what was read, and answers.
    fn finish_read(&mut self, id: u64, done: &mut Vec<StoreDone>) {
        let Some(Work::Read(read)) = self.jobs.get(id).map(|job| &job.work) else {
            return;
        };
        let (Some(head), Some(host)) = (&read.head, &read.host) else {
            return self.finish(id, StoreError::Io, done);
        };
        let mut sums = std::mem::take(&mut self.sums);
        let checked = self.check_read(read, head, host, &mut sums);
        self.sums = sums;
        let result = match checked {
            Ok(page) => {
                self.counters.reads += 1;
                self.counters.read_bytes += read.bytes;
                Ok(Box::new((page.header.cut, page.header.crcs)))
            }
            Err(flaw) => {
                self.counters.corrupt(flaw);
                Err(StoreError::Corrupt)
            }
        };
        let op = read.op;
        let job = self.jobs.remove(id);
        done.push(StoreDone::Read { op, result });
        if let Some(Work::Read(read)) = job.map(|job| job.work)
            && let Some(page) = read.head
        {
            self.give_back(page);
        }
    }

    fn check_read(
        &self,
        read: &ReadJob<I::Host>,
        head: &Aligned,
        host: &I::Host,
        sums: &mut Vec<State>,
    ) -> Result<BlockPage, Flaw> {
        let offset = self.layout.block_at(read.from);
        let geometry = Some(&*read.geometry);
        let page = check_header(head.bytes(), &self.head.id, offset, &read.key, geometry)?;
        #[cfg(feature = "planted")]
        if self.plant == Some(super::Plant::SkipCrc) {
            return Ok(page);
        }
        let mut verifier = Verifier::new(&page, std::mem::take(sums));
        if host.can_sum(verifier.engine()) {
            verifier.advance(read.bytes, &mut |at, bytes, engine, state| {
                host.sum(at as usize, bytes, engine, state);
            });
        } else {
            host.read(0, read.bytes as usize, &mut |bytes| verifier.feed(bytes));
        }
        let good;
        (good, *sums) = verifier.finish();
        if !good {
            return Err(Flaw::Payload);
        }
        Ok(page)
    }
}
