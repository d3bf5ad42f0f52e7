//! Reading a block: header and bytes come together, and nothing is answered as good before both were checked. The check is over
//! the memory that the bytes were read into. Deliberately absent: what to do about a damaged block (core drops it).

use kvd_arena::checksum::State;
use kvd_core::GroupGeometry;
use kvd_core::tier::{BlockKey, OpId, Place, ReadBlock, StoreDone, StoreError};

use super::Store;
use super::block::{BlockPage, Flaw};
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
    pub(crate) block: Box<ReadBlock>,
    head: Option<Aligned>,
    pub(crate) host: Option<H>,
}

impl<H> ReadJob<H> {
    pub(crate) fn new(
        op: OpId,
        from: Place,
        bytes: u64,
        key: BlockKey,
        block: Box<ReadBlock>,
        host: Option<H>,
    ) -> Self {
        let head = None;
        ReadJob {
            op,
            from,
            bytes,
            key,
            block,
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

/// Whether a header is that of this block at this offset, and of these sizes; `page` is what it says.
pub(crate) fn check_header(
    page: &mut BlockPage,
    bytes: &[u8],
    store: &[u8; 16],
    offset: u64,
    key: &BlockKey,
    geometry: Option<&GroupGeometry>,
) -> Result<(), Flaw> {
    page.decode(bytes, store)?;
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
    Ok(())
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
        let at = (&self.head.id, self.layout.block_at(read.from));
        let sums = match self.skips_sums() {
            true => None,
            false => Some(&mut self.sums),
        };
        let result = match check_read(read, head, host, at, &mut self.page, sums) {
            Ok(()) => {
                self.counters.reads += 1;
                self.counters.read_bytes += read.bytes;
                Ok(())
            }
            Err(flaw) => {
                self.counters.corrupt(flaw);
                Err(StoreError::Corrupt)
            }
        };
        let Some(Work::Read(mut read)) = self.jobs.remove(id).map(|job| job.work) else {
            return;
        };
        if result.is_ok() {
            let kept = &mut self.page.header;
            std::mem::swap(&mut read.block.cut, &mut kept.cut);
            std::mem::swap(&mut read.block.crcs, &mut kept.crcs);
        }
        let (op, block) = (read.op, read.block);
        done.push(StoreDone::Read { op, block, result });
        if let Some(page) = read.head {
            self.give_back(page);
        }
    }

    /// A deliberate mistake.
    fn skips_sums(&self) -> bool {
        #[cfg(feature = "planted")]
        return self.plant == Some(super::Plant::SkipCrc);
        #[cfg(not(feature = "planted"))]
        false
    }
}

/// Whether what was read for the store of this id from this offset is the block that is meant, and sound. `page` and `sums` are
/// memory to use; without `sums`, nobody looks at the bytes.
fn check_read<H: HostBytes>(
    read: &ReadJob<H>,
    head: &Aligned,
    host: &H,
    (store, offset): (&[u8; 16], u64),
    page: &mut BlockPage,
    sums: Option<&mut Vec<State>>,
) -> Result<(), Flaw> {
    let geometry = Some(&read.block.geometry);
    check_header(page, head.bytes(), store, offset, &read.key, geometry)?;
    let Some(sums) = sums else {
        return Ok(());
    };
    let mut verifier = Verifier::new(page, std::mem::take(sums));
    if host.can_sum(verifier.engine()) {
        verifier.advance(read.bytes, &mut |at, bytes, engine, state| {
            host.sum(at as usize, bytes, engine, state);
        });
    } else {
        host.read(0, read.bytes as usize, &mut |bytes| verifier.feed(bytes));
    }
    let good;
    (good, *sums) = verifier.finish();
    good.then_some(()).ok_or(Flaw::Payload)
}
