//! One store under load: a device with its thread, memory for as many blocks as are under way, and blocks that it is asked to store
//! and load. Deliberately absent: what is compared with what.

use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use crc_fast::{CrcAlgorithm::Crc64Nvme, Digest};
use kvd_arena::{Arena, HugePages};
use kvd_core::tier::{
    BlockHeader, BlockKey, HostRange, OpId, Place, ReadBlock, StoreDone, StoreOp, StoreShape,
    stride_of,
};
use kvd_core::{BlockHash, Cut, GroupGeometry, NamespaceId, NamespaceRecord, TenantId};
use kvd_nvme::device::{Device, DeviceConfig, DeviceNews};
use kvd_nvme::io::{ArenaRange, IoOptions, RawReport, cpu_seconds, scattered};
use kvd_nvme::store::Found;

use super::super::{Random, Shape, progress};

/// Bytes of blocks under way, at most, and most blocks.
const MEMORY: u64 = 128 << 20;
const DEPTH_MOST: usize = 256;
/// How long one answer may take.
const PATIENCE: Duration = Duration::from_secs(30);

pub(super) struct Lane {
    device: Device,
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
        let config = DeviceConfig {
            path: directory,
            io: IoOptions::default(),
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
        let arena = Arena::create(
            (2 * depth(&geometry) as u64 * geometry.slot_bytes()).next_multiple_of(2 << 20),
            Some(2 << 20),
            pages,
        )?;
        for extent in 0..arena.extents() {
            arena.populate(extent)?;
        }
        let mut lane = Lane {
            device,
            answers,
            arena: Arc::new(arena),
            shape: made,
            namespace: parsed.id(),
            record: shape.record()?.into(),
            geometry,
            crcs: Vec::new(),
            stored: Vec::new(),
            step: 1,
            next_op: 0,
        };
        lane.fill()?;
        Ok(lane)
    }

    /// Bytes of a page of its memory.
    pub(super) fn page_bytes(&self) -> u64 {
        self.arena.shape().page_bytes
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

    /// Where a piece of memory begins.
    fn offset(&self, piece: usize) -> u64 {
        piece as u64 * self.geometry.slot_bytes()
    }

    fn fill(&mut self) -> Result<()> {
        let mut random = Random(11);
        let head = self.geometry.head_bytes() as usize;
        let heads = self.geometry.heads as usize;
        let mut block = vec![0; self.geometry.block_bytes() as usize];
        for piece in 0..self.depth() {
            for word in block.chunks_mut(8) {
                word.copy_from_slice(&random.next().to_le_bytes()[..word.len()]);
            }
            let mut sums: Vec<Digest> = (0..heads).map(|_| Digest::new(Crc64Nvme)).collect();
            for (at, run) in block.chunks(head).enumerate() {
                sums[at % heads].update(run);
            }
            self.crcs.push(sums.iter().map(Digest::finalize).collect());
            let wrote = rustix::io::pwrite(self.arena.fd(), &block, self.offset(piece))?;
            ensure!(wrote == block.len(), "the arena took {wrote} bytes");
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

    fn op(&self, doing: Doing, op: OpId, number: usize, of: usize, range: HostRange) -> StoreOp {
        let (place, key) = (self.place(number, of), self.key(number));
        let geometry = self.geometry.clone();
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
                geometry: Box::new(geometry),
                record: Arc::clone(&self.record),
            },
            Doing::Load => StoreOp::Read {
                op,
                from: place,
                into: range,
                key,
                block: ReadBlock::new(geometry),
            },
            Doing::Drop => StoreOp::Drop { op, place, key },
        }
    }

    /// Stores so many new blocks.
    pub(super) fn store(&mut self, blocks: u64, depth: usize, random: bool) -> Result<RawReport> {
        self.step = if random { scattered(blocks) } else { 1 };
        self.stored = vec![0; blocks as usize];
        self.run(Doing::Store, depth)
    }

    /// Loads the blocks that were stored, in the order in which they were.
    pub(super) fn load(&mut self, depth: usize) -> Result<RawReport> {
        self.run(Doing::Load, depth)
    }

    /// Has the store forget them all.
    pub(super) fn drop_all(&mut self) -> Result<()> {
        self.run(Doing::Drop, self.depth())?;
        self.stored.clear();
        Ok(())
    }

    fn run(&mut self, doing: Doing, depth: usize) -> Result<RawReport> {
        let of = self.stored.len();
        let mut free: Vec<usize> = (0..depth).rev().collect();
        let mut last = vec![None; depth];
        let (mut next, mut over) = (0, 0);
        let (begun, cpu) = (Instant::now(), cpu_seconds());
        while over < of {
            while next < of
                && let Some(piece) = free.pop()
            {
                if doing == Doing::Store {
                    self.stored[next] = piece;
                }
                last[piece] = Some(next);
                self.begin(doing, next, of, piece)?;
                next += 1;
            }
            for done in self.answers.recv_timeout(PATIENCE).context("no answer")? {
                let op = judge(&done)?;
                free.push((op.0 % DEPTH_MOST as u64) as usize);
                over += 1;
            }
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
            offset: self.offset(memory),
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
                .read(self.offset(self.depth() + piece), &mut there)?;
            self.arena
                .read(self.offset(self.stored[*number]), &mut wanted)?;
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

fn depth(geometry: &GroupGeometry) -> usize {
    DEPTH_MOST.min((MEMORY / geometry.slot_bytes()) as usize)
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
