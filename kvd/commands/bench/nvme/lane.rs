//! One store under load: a device with its thread, memory for as many blocks as are under way, and blocks that it is asked to store
//! and load. Deliberately absent: what is compared with what.

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use kvd_arena::{Arena, ArenaView, HugePages};
use kvd_core::tier::{
    BlockHeader, BlockKey, HostRange, OpId, Place, ReadBlock, STORE_PAGE, StoreDone, StoreOp,
    StoreShape, stride_of,
};
use kvd_core::{BlockHash, Cut, GroupGeometry, NamespaceId, NamespaceRecord, TenantId};
use kvd_device::{Device as _, HostDevice, OwnedPages, PartGeometry, StoreJob};
use kvd_nvme::device::{Device, DeviceConfig, DeviceNews};
use kvd_nvme::io::{
    ArenaRange, IoOptions, RAW_BLOCKS, RawReport, cpu_seconds, raw_blocks, scattered,
};
use kvd_nvme::store::Found;

use super::super::{Random, Shape, progress};

/// Most blocks asked for: as many as a daemon lets be written at once.
const DEPTH_MOST: usize = RAW_BLOCKS;
/// Operations of the device for one block: its header and its bytes. And those that a store keeps for flushes and records.
const OPERATIONS: usize = 2;
const RESERVED: usize = kvd_nvme::store::RESERVE;
/// How long one answer may take.
const PATIENCE: Duration = Duration::from_secs(30);

pub(super) struct Lane {
    device: Device,
    path: PathBuf,
    capacity: u64,
    answers: Receiver<Vec<StoreDone>>,
    arena: Arc<Arena>,
    shape: StoreShape,
    geometry: GroupGeometry,
    namespace: NamespaceId,
    record: Arc<[u8]>,
    /// Of what each piece of memory holds that blocks are stored from.
    crcs: Vec<Vec<u64>>,
    /// Blocks that are stored: from which piece.
    stored: Vec<usize>,
    /// What came back with reads, to go down with others.
    #[expect(clippy::vec_box, reason = "the boxes travel")]
    spare: Vec<Box<ReadBlock>>,
    /// From the place of a block to that of the next.
    step: u64,
    next_op: u64,
}

#[derive(Clone, Copy, PartialEq)]
enum Doing {
    Store,
    Load,
    Drop,
}

impl Lane {
    /// A new store with room for so many bytes of blocks of one shape.
    pub(super) fn open(
        directory: &Path,
        shape: &Shape,
        bytes: u64,
        pages: HugePages,
    ) -> Result<Self> {
        let parsed = NamespaceRecord::parse(&shape.record()?)?;
        let geometry = parsed.groups()[0].clone();
        // Segments do not end where blocks do.
        let capacity = bytes + bytes / 4 + (128 << 20);
        let directory = directory.join("store");
        let _ = std::fs::remove_dir_all(&directory);
        let (device, answers, made) = device(&directory, capacity, IoOptions::default().depth)?;
        // All in one extent, so that there is nothing between the pieces.
        let extent = (2 * depth(&geometry) as u64 * geometry.slot_bytes()).next_power_of_two();
        let arena = Arena::create(extent, Some(extent), pages)?;
        arena.populate(0)?;
        let mut lane = Lane {
            device,
            path: directory,
            capacity,
            answers,
            arena: Arc::new(arena),
            shape: made,
            namespace: parsed.id(),
            record: shape.record()?.into(),
            geometry,
            crcs: Vec::new(),
            stored: Vec::new(),
            spare: Vec::new(),
            step: 1,
            next_op: 0,
        };
        lane.fill(shape.part)?;
        Ok(lane)
    }

    /// Opens the store again, for a device that is given at most `depth` blocks at a time.
    pub(super) fn reopen(self, depth: usize) -> Result<Self> {
        let Lane {
            device: old, path, ..
        } = self;
        drop(old);
        let (device, answers, shape) = device(&path, self.capacity, depth * OPERATIONS + RESERVED)?;
        Ok(Lane {
            device,
            path,
            answers,
            shape,
            ..self
        })
    }

    /// The store's file.
    pub(super) fn file(&self) -> PathBuf {
        self.device.status().path
    }

    /// Where in that file the bytes of a block begin, by the number of its place.
    pub(super) fn offsets(&self) -> impl Fn(u64) -> u64 + use<> {
        let (first, segment) = (self.device.status().segments_at, self.shape.segment_bytes);
        let (stride, each) = (stride_of(self.geometry.block_bytes()), self.per_segment());
        move |at| first + at / each * segment + at % each * stride + STORE_PAGE
    }

    /// Bytes of a page of its memory.
    pub(super) fn page_bytes(&self) -> u64 {
        self.arena.shape().page_bytes
    }

    /// The memory that blocks are stored from while so many are under way.
    pub(super) fn source(&self, depth: usize) -> Result<ArenaRange> {
        self.pieces(0, depth)
    }

    /// The memory that blocks are loaded into.
    pub(super) fn target(&self) -> Result<ArenaRange> {
        self.pieces(self.depth(), self.depth())
    }

    fn pieces(&self, first: usize, count: usize) -> Result<ArenaRange> {
        let bytes = count * self.geometry.block_bytes() as usize;
        let range = ArenaRange::new(Arc::clone(&self.arena), self.piece(first).0, bytes);
        range.context("the arena is too small")
    }

    /// Most blocks under way.
    pub(super) fn depth(&self) -> usize {
        depth(&self.geometry)
    }

    /// Blocks that fit.
    pub(super) fn places(&self) -> u64 {
        u64::from(self.shape.segments) * self.per_segment()
    }

    fn per_segment(&self) -> u64 {
        self.shape.segment_bytes / stride_of(self.geometry.block_bytes())
    }

    /// Where a piece of memory begins, and its number as a slot.
    fn piece(&self, piece: usize) -> (u64, u32) {
        (piece as u64 * self.geometry.slot_bytes(), piece as u32)
    }

    fn fill(&mut self, part: PartGeometry) -> Result<()> {
        let dup = |fd: BorrowedFd<'_>| fd.try_clone_to_owned();
        let (arena, table) = (dup(self.arena.fd())?, dup(self.arena.generation_fd())?);
        let view = ArenaView::map(arena, table, self.arena.shape())?;
        let mut random = Random(11);
        let mut block = OwnedPages::new(part, 1)?;
        for piece in 0..self.depth() {
            let salt = random.next() | 1;
            block.fill(0, |at| ((at as u64).wrapping_mul(salt) >> 32) as u8);
            let (offset, slot) = self.piece(piece);
            let job = StoreJob {
                from: block.pages(),
                pages: &[0],
                part: view.slot(slot, offset, part.bytes())?,
            };
            let mut crcs = Vec::new();
            HostDevice.store(&[job], &mut crcs)?;
            self.crcs.push(crcs);
        }
        Ok(())
    }

    fn key(&self, number: usize) -> BlockKey {
        BlockKey {
            namespace: self.namespace,
            group: 0,
            hash: BlockHash(Random(number as u64 + 1).hash()),
        }
    }

    fn place(&self, number: usize, of: usize) -> Place {
        let at = number as u64 * self.step % of as u64;
        Place {
            segment: (at / self.per_segment()) as u32,
            index: (at % self.per_segment()) as u32,
            stride: stride_of(self.geometry.block_bytes()),
        }
    }

    fn op(
        &mut self,
        doing: Doing,
        op: OpId,
        number: usize,
        of: usize,
        range: HostRange,
    ) -> StoreOp {
        let (place, key) = (self.place(number, of), self.key(number));
        match doing {
            Doing::Store => StoreOp::Write {
                op,
                to: place,
                from: range,
                header: Box::new(BlockHeader {
                    key,
                    parent: None,
                    cut: Cut::whole(&self.geometry),
                    crcs: self.crcs[self.stored[number]].clone(),
                }),
                geometry: Box::new(self.geometry.clone()),
                record: Arc::clone(&self.record),
            },
            Doing::Load => StoreOp::Read {
                op,
                from: place,
                into: range,
                key,
                block: self
                    .spare
                    .pop()
                    .unwrap_or_else(|| ReadBlock::new(self.geometry.clone())),
            },
            Doing::Drop => StoreOp::Drop { op, place, key },
        }
    }

    /// Stores so many new blocks, of which `asked` are asked for and not answered.
    pub(super) fn store(&mut self, blocks: u64, asked: usize, random: bool) -> Result<RawReport> {
        self.step = if random { scattered(blocks) } else { 1 };
        self.stored = vec![0; blocks as usize];
        self.run(Doing::Store, asked)
    }

    /// Loads the blocks that were stored, in the order in which they were.
    pub(super) fn load(&mut self, asked: usize) -> Result<RawReport> {
        self.run(Doing::Load, asked)
    }

    /// Has the store forget them all.
    pub(super) fn drop_all(&mut self) -> Result<()> {
        self.run(Doing::Drop, self.depth())?;
        self.stored.clear();
        Ok(())
    }

    fn run(&mut self, doing: Doing, depth: usize) -> Result<RawReport> {
        let of = self.stored.len();
        // Who was free longest comes first, as in plain transfers.
        let mut free: VecDeque<usize> = (0..depth).collect();
        let mut last = vec![None; depth];
        let (mut next, mut over) = (0, 0);
        let (begun, cpu) = (Instant::now(), cpu_seconds());
        while over < of {
            while next < of
                && let Some(piece) = free.pop_front()
            {
                if doing == Doing::Store {
                    self.stored[next] = piece;
                }
                last[piece] = Some(next);
                self.begin(doing, next, of, piece)?;
                next += 1;
            }
            let mut all = self.answers.recv_timeout(PATIENCE).context("no answer")?;
            for done in all.drain(..) {
                let op = judge(&done)?;
                free.push_back((op.0 % DEPTH_MOST as u64) as usize);
                over += 1;
                if let StoreDone::Read { block, .. } = done {
                    self.spare.push(block);
                }
            }
            self.device.give_back(all);
        }
        let seconds = begun.elapsed().as_secs_f64();
        let gb = (of as u64 * self.geometry.block_bytes()) as f64 / 1e9;
        let report = RawReport {
            gbps: gb / seconds,
            cpu_s_per_gb: (cpu_seconds() - cpu) / gb,
        };
        if doing == Doing::Load {
            self.compare(&last)?;
        }
        Ok(report)
    }

    fn begin(&mut self, doing: Doing, number: usize, of: usize, piece: usize) -> Result<()> {
        self.next_op += 1;
        let op = OpId(self.next_op * DEPTH_MOST as u64 + piece as u64);
        let memory = match doing {
            Doing::Load => self.depth() + piece,
            Doing::Store | Doing::Drop => piece,
        };
        let range = HostRange {
            tenant: TenantId(0),
            offset: self.piece(memory).0,
            bytes: self.geometry.block_bytes(),
        };
        let bytes = range.bytes as usize;
        let host = (doing != Doing::Drop)
            .then(|| ArenaRange::new(Arc::clone(&self.arena), range.offset, bytes))
            .flatten();
        let op = self.op(doing, op, number, of, range);
        match self.device.begin(op, host) {
            None => Ok(()),
            Some(refused) => bail!("the store refused: {refused:?}"),
        }
    }

    /// What was loaded last is what was stored.
    fn compare(&self, last: &[Option<usize>]) -> Result<()> {
        let bytes = self.geometry.block_bytes() as usize;
        let (mut there, mut wanted) = (vec![0; bytes], vec![0; bytes]);
        for (piece, number) in last.iter().enumerate() {
            let Some(number) = number else { continue };
            self.arena
                .read(self.piece(self.depth() + piece).0, &mut there)?;
            self.arena
                .read(self.piece(self.stored[*number]).0, &mut wanted)?;
            ensure!(there == wanted, "block {number} came back different");
        }
        Ok(())
    }

    /// Says how the bytes got there.
    pub(super) fn report(&self) {
        let status = self.device.status();
        let counts: Vec<String> = status
            .counters
            .each()
            .into_iter()
            .filter(|(_, count)| *count > 0)
            .map(|(name, count)| format!("{name} {count}"))
            .collect();
        progress(&format!("by {}: {}", status.chosen.name, counts.join(", ")));
    }
}

/// A device on the store in this directory, made if missing, with at most so many operations at a time.
fn device(
    path: &Path,
    capacity: u64,
    depth: usize,
) -> Result<(Device, Receiver<Vec<StoreDone>>, StoreShape)> {
    let config = DeviceConfig {
        path: path.to_owned(),
        io: IoOptions {
            depth,
            ..IoOptions::default()
        },
        store: crate::commands::stores::store_config(capacity)?,
        faults: None,
    };
    let mut made = StoreShape::default();
    let (tell, answers) = sync_channel(1024);
    let mut found = |one: Found<'_>| {
        if let Found::Shape(shape) = one {
            made = shape;
        }
    };
    let device = Device::open(config, &mut found, move |news| match news {
        DeviceNews::Done(done) => tell.send(done).is_ok(),
        DeviceNews::Switched(_) => true,
    });
    let device = device.map_err(|error| anyhow::anyhow!("{error}"))?;
    Ok((device, answers, made))
}

fn depth(geometry: &GroupGeometry) -> usize {
    raw_blocks(geometry.slot_bytes() as usize, 1)
}

fn judge(done: &StoreDone) -> Result<OpId> {
    let (op, error) = match done {
        StoreDone::Written { op, result } | StoreDone::Dropped { op, result } => (op, result.err()),
        StoreDone::Read { op, result, .. } => (op, result.err()),
    };
    match error {
        None => Ok(*op),
        Some(error) => bail!("the store failed: {error:?}"),
    }
}
