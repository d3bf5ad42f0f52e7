//! foyer's disk tier under load: a cache on one directory, blocks that it is asked to keep, and blocks that it is asked for again.
//!
//! A store counts as answered when foyer lets go of the block that it was given, which it does once the write that carried it has
//! completed: earlier, and for each block by itself, than its own `wait` would say. foyer never flushes the device; as the plain run
//! does, a run of stores flushes once at its end. Loads ask the storage half of the cache alone, and each must answer with an entry
//! that was read from the device, not with one that memory still holds. Deliberately absent: what is compared with what.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use bytes::Bytes;
use foyer::{
    BlockEngineConfig, Code, Compression, DeviceBuilder, FifoPicker, FsDeviceBuilder, HybridCache,
    HybridCacheBuilder, HybridCachePolicy, IoEngineConfig, Load, PsyncIoEngineConfig, RecoverMode,
    UringIoEngineConfig,
};
use kvd_nvme::io::{RawReport, cpu_seconds, scattered};
use tokio::runtime::Runtime;

/// What foyer allots and evicts at once.
const SEGMENT: u64 = 64 << 20;
const PAGE: u64 = 4096;
/// Pairs of buffers that fill and are written in turns. foyer's own bench has as many, its README 2, which stored slower here.
const FLUSHERS: usize = 4;
/// Segments beyond what a run fills: one that each flusher writes, those kept clean, and room so that nothing is ever evicted.
const SPARE: u64 = 14;
/// Blocks of each piece of memory that are stored and loaded before anything is measured, so that buffers are there.
const WARM: usize = 4;
/// How long one answer may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// How foyer talks to the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Engine {
    IoUring,
    Psync,
}

impl Engine {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::IoUring => "io_uring",
            Self::Psync => "psync",
        }
    }
}

/// A block's bytes. Of one that is to be stored, its end tells that foyer is done with it.
pub(crate) struct Value {
    bytes: Bytes,
    answer: Option<(SyncSender<usize>, usize)>,
}

impl Drop for Value {
    fn drop(&mut self) {
        if let Some((tell, piece)) = self.answer.take() {
            // There is room for every block that is under way.
            let _ = tell.try_send(piece);
        }
    }
}

impl Code for Value {
    fn encode(&self, writer: &mut impl std::io::Write) -> foyer::Result<()> {
        self.bytes.encode(writer)
    }

    fn decode(reader: &mut impl std::io::Read) -> foyer::Result<Self> {
        Ok(Self {
            bytes: Bytes::decode(reader)?,
            answer: None,
        })
    }

    fn estimated_size(&self) -> usize {
        self.bytes.estimated_size()
    }
}

/// What one cache is opened for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Plan {
    pub(crate) engine: Engine,
    pub(crate) block: u64,
    /// Blocks of the largest run.
    pub(crate) blocks: u64,
    pub(crate) depth: usize,
}

impl Plan {
    /// Bytes that a block takes there: its own, and a page with its key, length and checksum.
    fn stride(&self) -> u64 {
        self.block + PAGE
    }

    fn capacity(&self) -> u64 {
        let each = (SEGMENT - PAGE) / self.stride();
        ((self.blocks + (WARM * self.depth) as u64).div_ceil(each) + SPARE) * SEGMENT
    }
}

/// Opens a cache once and writes over all of its space: space that was never written is not what a device is like in use.
pub(crate) fn take_space(directory: &Path, plan: Plan) -> Result<()> {
    drop(Disk::open(directory, plan)?);
    let mut bytes = vec![0; 1 << 20];
    for (at, byte) in bytes.iter_mut().enumerate() {
        *byte = (at.wrapping_mul(2_654_435_761) >> 9) as u8;
    }
    for path in files(directory)? {
        let size = std::fs::metadata(&path)?.len();
        let mut file = File::options().write(true).open(&path)?;
        for _ in 0..size / bytes.len() as u64 {
            std::io::Write::write_all(&mut file, &bytes)?;
        }
        file.sync_all()?;
    }
    Ok(())
}

fn files(directory: &Path) -> Result<Vec<PathBuf>> {
    let mut all = Vec::new();
    for entry in std::fs::read_dir(directory)? {
        all.push(entry?.path());
    }
    all.sort();
    Ok(all)
}

pub(crate) struct Disk {
    cache: HybridCache<u64, Value>,
    /// Of this cache alone: its tasks end with it, and its threads with them.
    runtime: Runtime,
    plan: Plan,
    pieces: Vec<Bytes>,
    tell: SyncSender<usize>,
    answers: Receiver<usize>,
    /// Any of its files: a flush through one is a flush of the device.
    file: File,
    /// Of the first block of the present run.
    first_key: u64,
    /// From which piece each was stored.
    stored: Vec<usize>,
}

impl Disk {
    /// Opens an empty cache, whatever its files hold.
    pub(crate) fn open(directory: &Path, plan: Plan) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread().build()?;
        let cache = runtime.block_on(build(directory, plan))?;
        let mut state = 11;
        let pieces = (0..plan.depth)
            .map(|_| noise(plan.block as usize, &mut state))
            .collect();
        let (tell, answers) = sync_channel(2 * plan.depth);
        let file = files(directory)?;
        let file = File::open(file.first().context("foyer made no file")?)?;
        Ok(Self {
            cache,
            runtime,
            plan,
            pieces,
            tell,
            answers,
            file,
            first_key: 0,
            stored: Vec::new(),
        })
    }

    /// Has every buffer used once.
    pub(crate) fn warm_up(&mut self) -> Result<()> {
        self.store((WARM * self.plan.depth) as u64)?;
        self.load(false)?;
        Ok(())
    }

    /// Stores so many new blocks, and flushes.
    pub(crate) fn store(&mut self, blocks: u64) -> Result<RawReport> {
        self.first_key += self.stored.len() as u64;
        self.stored.clear();
        let clock = Clock::start();
        let mut free: Vec<usize> = (0..self.plan.depth).collect();
        let mut over = 0;
        while over < blocks {
            while (self.stored.len() as u64) < blocks
                && let Some(piece) = free.pop()
            {
                let key = self.first_key + self.stored.len() as u64;
                self.stored.push(piece);
                let value = Value {
                    bytes: self.pieces[piece].clone(),
                    answer: Some((self.tell.clone(), piece)),
                };
                let kept = self.cache.storage_writer(key).force().insert(value);
                kept.context("foyer refused a block")?;
            }
            let piece = self.answers.recv_timeout(PATIENCE);
            free.push(piece.context("foyer did not answer")?);
            over += 1;
        }
        self.file.sync_data()?;
        let report = clock.stop(blocks * self.plan.block);
        ensure!(
            self.cache.memory().usage() == 0,
            "foyer kept blocks in memory"
        );
        Ok(report)
    }

    /// Loads the blocks that were stored, in the order in which they were or in a scattered one.
    pub(crate) fn load(&self, random: bool) -> Result<RawReport> {
        let blocks = self.stored.len();
        let step = if random {
            scattered(blocks as u64) as usize
        } else {
            1
        };
        let next = Arc::new(AtomicUsize::new(0));
        let before = self.cache.statistics().disk_read_bytes();
        let clock = Clock::start();
        let tasks: Vec<_> = (0..self.plan.depth)
            .map(|_| {
                let (store, next) = (self.cache.storage().clone(), Arc::clone(&next));
                let first = self.first_key;
                self.runtime.spawn(async move {
                    let mut last = None;
                    loop {
                        let at = next.fetch_add(1, Ordering::Relaxed);
                        if at >= blocks {
                            return Ok(last);
                        }
                        let number = at * step % blocks;
                        match store.load(&(first + number as u64)).await {
                            Ok(Load::Entry { value, .. }) => last = Some((number, value)),
                            Ok(Load::Piece { .. }) => bail!("block {number} came out of memory"),
                            Ok(Load::Miss) => bail!("foyer dropped block {number}"),
                            Ok(Load::Throttled) => bail!("foyer would not read block {number}"),
                            Err(error) => bail!("block {number}: {error}"),
                        }
                    }
                })
            })
            .collect();
        let mut lasts = Vec::new();
        for task in tasks {
            lasts.extend(self.runtime.block_on(task)??);
        }
        let bytes = blocks as u64 * self.plan.block;
        let report = clock.stop(bytes);
        let moved = self.cache.statistics().disk_read_bytes() - before;
        ensure!(
            moved as u64 >= bytes,
            "only {moved} bytes of {bytes} were read from the device"
        );
        for (number, value) in lasts {
            ensure!(
                value.bytes == self.pieces[self.stored[number]],
                "block {number} came back different"
            );
        }
        Ok(report)
    }
}

async fn build(directory: &Path, plan: Plan) -> Result<HybridCache<u64, Value>> {
    let failed = |error: foyer::Error| anyhow!("foyer: {error}");
    let device = FsDeviceBuilder::new(directory)
        .with_capacity(plan.capacity() as usize)
        .with_direct(true)
        .build()
        .map_err(failed)?;
    let engine: Box<dyn IoEngineConfig> = match plan.engine {
        Engine::IoUring => UringIoEngineConfig::new().boxed(),
        Engine::Psync => PsyncIoEngineConfig::new().boxed(),
    };
    // Each flusher gets its part of the pool, and may get all the blocks that are under way: what does not fit, foyer drops.
    let buffers = FLUSHERS as u64 * ((plan.depth + 1) as u64 * plan.stride()).max(16 << 20);
    HybridCacheBuilder::new()
        .with_policy(HybridCachePolicy::WriteOnInsertion)
        .memory(64)
        .with_shards(64)
        .storage()
        .with_io_engine_config(engine)
        .with_engine_config(
            BlockEngineConfig::new(device)
                .with_block_size(SEGMENT as usize)
                .with_flushers(FLUSHERS)
                .with_buffer_pool_size(buffers as usize)
                .with_submit_queue_size_threshold(2 * buffers as usize)
                .with_eviction_pickers(vec![Box::<FifoPicker>::default()]),
        )
        .with_compression(Compression::None)
        .with_recover_mode(RecoverMode::None)
        .build()
        .await
        .map_err(failed)
}

fn noise(bytes: usize, state: &mut u64) -> Bytes {
    let mut block = vec![0; bytes];
    for word in block.chunks_mut(8) {
        *state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        let mixed = (*state ^ (*state >> 29)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        word.copy_from_slice(&mixed.to_le_bytes()[..word.len()]);
    }
    block.into()
}

struct Clock {
    begun: Instant,
    cpu: f64,
}

impl Clock {
    #[expect(clippy::disallowed_methods, reason = "a measurement is of this clock")]
    fn start() -> Self {
        Self {
            begun: Instant::now(),
            cpu: cpu_seconds(),
        }
    }

    fn stop(&self, bytes: u64) -> RawReport {
        let gb = bytes as f64 / 1e9;
        RawReport {
            gbps: gb / self.begun.elapsed().as_secs_f64(),
            cpu_s_per_gb: (cpu_seconds() - self.cpu) / gb,
        }
    }
}
