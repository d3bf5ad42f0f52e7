//! A checkpoint: every record that still counts, of the checkpoint before and of the half of the journal that is full, copied to the
//! other checkpoint area under a salt of its own. One operation of at most 64 pages is under way at a time, between other work, so
//! that nobody waits for it; keys are read from the device, not kept. Then a flush, and the two superblocks one after the other, each
//! with a flush: from then on the half is free.
//!
//! What is stored or dropped meanwhile is in the other half. A record that is dropped there already is left out, which is the same.

use kvd_core::tier::StoreDone;

use super::format::{
    Kind, List, PER_PAGE, Record, Superblock, encode_page, page_header, page_records,
};
use super::layout::{HEADS, Layout};
use super::open::head_page;
use super::recover::{Epoch, legal};
use super::{Purpose, Store};
use crate::io::{Aligned, BlockIo, Buffer, Op, PAGE};

/// Most pages of one operation.
const CHUNK: u64 = 64;
/// Failures of one step in a row before it is given up.
const MOST_FAILURES: u32 = 3;
/// How long a checkpoint rests after the device has failed it.
const REST_US: u64 = 1_000_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Reads records, from this page of this source on.
    Read,
    /// Writes what it kept.
    Write,
    Flush,
    /// Writes this copy of the superblock.
    Head(usize),
    HeadFlush(usize),
}

/// Where records are read.
#[derive(Clone, Copy)]
struct Source {
    list: List,
    number: u64,
    offset: u64,
    pages: u64,
}

/// A checkpoint that is being written.
pub(crate) struct Merge {
    full: Epoch,
    sources: [Source; 2],
    source: usize,
    at: u64,
    /// Pages of the next read.
    chunk: u64,
    kept: Vec<Record>,
    /// Pages and records that are written.
    written: u64,
    records: u64,
    stage: Stage,
    /// Pages of the operation under way.
    under_way: Option<u64>,
    failures: u32,
    rests_until: Option<u64>,
    /// A flush failed while an operation was under way: begin again when it is over.
    spoilt: bool,
}

impl Merge {
    pub(crate) fn new(head: &Superblock, layout: &Layout, full: Epoch) -> Self {
        let number = head.checkpoint.get();
        let sources = [
            Source {
                list: List::Checkpoint,
                number,
                offset: layout.checkpoint_at(number),
                pages: if number > 0 {
                    head.checkpoint_used.get()
                } else {
                    0
                },
            },
            Source {
                list: List::Journal,
                number: full.epoch,
                offset: layout.half_at(full.epoch),
                pages: full.used,
            },
        ];
        Merge {
            full,
            sources,
            source: 0,
            at: 0,
            chunk: CHUNK,
            kept: Vec::new(),
            written: 0,
            records: 0,
            stage: Stage::Read,
            under_way: None,
            failures: 0,
            rests_until: None,
            spoilt: false,
        }
    }

    /// Until when it does nothing.
    pub(crate) fn not_before(&self) -> Option<u64> {
        self.rests_until.filter(|_| self.under_way.is_none())
    }

    /// Which step is next.
    fn settle(&mut self, most_pages: u64) {
        if self.stage != Stage::Read {
            return;
        }
        if self.written >= most_pages {
            // Only after damage that brought dropped blocks back: the newest are left out.
            (self.source, self.kept) = (2, Vec::new());
        }
        while self.source < 2 && self.at >= self.sources[self.source].pages {
            (self.source, self.at) = (self.source + 1, 0);
        }
        let read_all = self.source == 2;
        if self.kept.len() >= CHUNK as usize * PER_PAGE || (read_all && !self.kept.is_empty()) {
            self.stage = Stage::Write;
        } else if read_all {
            self.stage = Stage::Flush;
        }
    }
}

impl<I: BlockIo> Store<I> {
    /// Begins the next step of the checkpoint, if there is one to write.
    pub(crate) fn move_merge(&mut self, now: u64) {
        if self.health.off || !self.has_room() {
            return;
        }
        let (layout, mut head) = (self.layout, self.head);
        let Some(merge) = &mut self.merge else {
            return;
        };
        if merge.under_way.is_some() || merge.rests_until.is_some_and(|until| now < until) {
            return;
        }
        merge.rests_until = None;
        merge.settle(layout.checkpoint_pages);
        let number = head.checkpoint.get() + 1;
        let mut pages = 0;
        let (offset, buffer) = match merge.stage {
            Stage::Read => {
                let source = merge.sources[merge.source];
                pages = merge.chunk.min(source.pages - merge.at);
                let buffer = Aligned::new(pages as usize);
                (source.offset + merge.at * PAGE as u64, buffer)
            }
            Stage::Write => {
                let some = merge.kept.len().min(CHUNK as usize * PER_PAGE);
                pages = some.div_ceil(PER_PAGE) as u64;
                pages = pages.min(layout.checkpoint_pages - merge.written);
                let mut buffer = Aligned::new(pages as usize);
                let pieces = merge.kept[..some].chunks(PER_PAGE);
                let out = buffer.bytes_mut().chunks_mut(PAGE);
                for (n, (page, some)) in out.zip(pieces).enumerate() {
                    let at = merge.written + n as u64;
                    encode_page(page, &head.id, List::Checkpoint, number, at, some);
                }
                let at = layout.checkpoint_at(number) + merge.written * PAGE as u64;
                (at, buffer)
            }
            Stage::Head(copy) => {
                head = next_head(&head, merge, self.next_seq);
                (HEADS[copy], head_page(&head))
            }
            Stage::Flush | Stage::HeadFlush(_) => (0, Aligned::new(0)),
        };
        merge.under_way = Some(pages);
        let buffer = Buffer::Own(buffer);
        let stage = merge.stage;
        self.start(now, Purpose::Merge, |token| match stage {
            Stage::Read => Op::Read {
                token,
                offset,
                buffer,
            },
            Stage::Write | Stage::Head(_) => Op::Write {
                token,
                offset,
                buffer,
            },
            Stage::Flush | Stage::HeadFlush(_) => Op::Flush { token },
        });
    }

    /// A step is over.
    pub(crate) fn merge_step_done(
        &mut self,
        now: u64,
        good: bool,
        buffer: Option<Buffer<I::Host>>,
        done: &mut Vec<StoreDone>,
    ) {
        let Some(merge) = &mut self.merge else {
            return;
        };
        let pages = merge.under_way.take().unwrap_or(0);
        if merge.spoilt {
            return self.restart_merge(now);
        }
        if !good {
            return self.merge_failed(now, done);
        }
        merge.failures = 0;
        match merge.stage {
            Stage::Read => {
                let source = merge.sources[merge.source];
                if let Some(Buffer::Own(buffer)) = &buffer {
                    self.keep(source, buffer);
                }
                if let Some(merge) = &mut self.merge {
                    merge.at += pages;
                    merge.chunk = CHUNK;
                }
            }
            Stage::Write => {
                let some = merge.kept.len().min(CHUNK as usize * PER_PAGE);
                merge.kept.drain(..some);
                merge.written += pages;
                merge.records += some as u64;
                merge.stage = Stage::Read;
            }
            Stage::Flush => merge.stage = Stage::Head(0),
            Stage::Head(copy) => merge.stage = Stage::HeadFlush(copy),
            Stage::HeadFlush(0) => merge.stage = Stage::Head(1),
            Stage::HeadFlush(_) => {
                self.head = next_head(&self.head, merge, self.next_seq);
                self.merge = None;
                self.counters.checkpoints += 1;
            }
        }
    }

    /// Keeps the records that still count.
    fn keep(&mut self, source: Source, buffer: &Aligned) {
        let (id, layout, table) = (self.head.id, &self.layout, &self.table);
        // An area's pages of two checkpoints before are sound, too.
        let salt = self.config.salt() ^ (self.head.checkpoint.get() + 1);
        let Some(merge) = &mut self.merge else {
            return;
        };
        for (n, page) in buffer.bytes().chunks_exact(PAGE).enumerate() {
            let header = page_header(page, &id, source.list, merge.at + n as u64);
            let Some(header) = header.filter(|header| header.epoch.get() == source.number) else {
                self.counters.checkpoint_pages_damaged += 1;
                continue;
            };
            page_records(page, header, source.list, &mut |record| {
                let stored = record.kind() == Some(Kind::Stored) && legal(layout, record);
                let newest = || table.get(record.place()).map(|(seq, _)| seq);
                if stored && newest() == Some(record.seq.get()) {
                    merge.kept.push(record.sealed(salt));
                }
            });
        }
    }

    /// A step failed: again, with fewer pages; a page that can't be read is given up; what can't be written is tried again later.
    fn merge_failed(&mut self, now: u64, done: &mut Vec<StoreDone>) {
        let Some(merge) = &mut self.merge else {
            return;
        };
        merge.failures += 1;
        match merge.stage {
            // Of these pages any may be good.
            Stage::Read if merge.chunk > 1 => {
                (merge.chunk, merge.failures) = ((merge.chunk / 8).max(1), 0)
            }
            Stage::Read if merge.failures >= MOST_FAILURES => {
                merge.at += 1;
                merge.failures = 0;
                self.counters.checkpoint_pages_unreadable += 1;
            }
            Stage::Read => {}
            Stage::Write | Stage::Head(_) if merge.failures < MOST_FAILURES => {}
            Stage::Write | Stage::Head(_) => {
                merge.failures = 0;
                merge.rests_until = Some(now + REST_US);
            }
            Stage::Flush | Stage::HeadFlush(_) => self.flush_failed(now, done),
        }
    }

    /// Begins the checkpoint again, after a rest: what was written of it may be gone. Once a superblock may name it, the checkpoint is
    /// durable and must not be touched: then only the superblocks are written again.
    pub(crate) fn restart_merge(&mut self, now: u64) {
        let Some(merge) = &mut self.merge else {
            return;
        };
        if merge.under_way.is_some() {
            merge.spoilt = true;
            return;
        }
        self.counters.checkpoint_restarts += 1;
        match merge.stage {
            Stage::Head(_) | Stage::HeadFlush(_) => merge.stage = Stage::Head(0),
            _ => *merge = Merge::new(&self.head, &self.layout, merge.full),
        }
        merge.spoilt = false;
        merge.rests_until = Some(now + REST_US);
    }
}

/// The superblock once this checkpoint counts.
fn next_head(head: &Superblock, merge: &Merge, next_seq: u64) -> Superblock {
    let mut next = *head;
    next.generation += 1;
    next.checkpoint += 1;
    next.checkpoint_used = merge.written.into();
    next.checkpoint_records = merge.records.into();
    next.first_epoch = (merge.full.epoch + 1).into();
    next.next_seq = next_seq.into();
    next
}
