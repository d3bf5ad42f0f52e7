//! Stores and loads against memcpy, in interleaved rounds.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Result, ensure};
use kvd_client::{BlockMover, BlockRef, ChainRef, LoadOutcome, Session, StoreOutcome};
use kvd_device::{HostDevice, OwnedPages};

use super::daemon::{Daemon, MIB};
use super::{Random, Results, Shape, median, progress};

/// Bytes moved in each turn: far more than the caches hold.
const TURN_BYTES: usize = 128 << 20;
/// Measured rounds; each is one turn of memcpy, store and load.
const ROUNDS: usize = 9;
/// The daemon's memory. Rounds that are not measured touch all of it first.
const CAPACITY: u64 = 768 * MIB;

/// Memcpy in 10^9 bytes a second, and the ratios of store and load to it.
struct Measured {
    memcpy: f64,
    store: f64,
    load: f64,
}

/// Measures with blocks of 2 MiB and of 64 KiB.
pub(super) fn measure(results: &mut Results) -> Result<()> {
    progress("storing and loading blocks of 2 MiB");
    // 32 layers, 8 heads of 16 tokens, K and V of 128 numbers of 2 bytes.
    let large = rounds(&Shape::new(32, 8, 512))?;
    (results.memcpy_gbps, results.store_ratio, results.load_ratio) =
        (large.memcpy, large.store, large.load);
    progress("storing and loading blocks of 64 KiB");
    let small = rounds(&Shape::new(8, 1, 512))?;
    (
        results.memcpy_gbps_64k,
        results.store_ratio_64k,
        results.load_ratio_64k,
    ) = (small.memcpy, small.store, small.load);
    Ok(())
}

struct Bench {
    session: Session,
    namespace: u32,
    mover: BlockMover,
    source: OwnedPages,
    target: OwnedPages,
    /// What memcpy moves.
    plain: (Vec<u8>, Vec<u8>),
    block_bytes: usize,
    random: Random,
}

fn rounds(shape: &Shape) -> Result<Measured> {
    let daemon = Daemon::start(CAPACITY)?;
    let (session, namespace) = shape.open(&daemon)?;
    daemon.wait_until_faulted()?;
    let block_bytes = shape.part.bytes();
    let blocks = u32::try_from(TURN_BYTES / block_bytes)?;
    let mut source = OwnedPages::new(shape.part, blocks)?;
    let mut random = Random(1);
    for block in 0..blocks {
        let salt = random.next();
        source.fill(block, |at| (salt >> (at % 57)) as u8 ^ (at / 64) as u8);
    }
    let mover = BlockMover::new(Arc::new(HostDevice), shape.mover())?;
    let mut bench = Bench {
        session,
        namespace,
        mover,
        source,
        target: OwnedPages::new(shape.part, blocks)?,
        plain: (vec![1; TURN_BYTES], vec![2; TURN_BYTES]),
        block_bytes,
        random,
    };
    let warm = 2 * CAPACITY as usize / TURN_BYTES;
    let (mut memcpy, mut store, mut load) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..warm + ROUNDS {
        let plain = bench.memcpy();
        let hashes: Vec<u8> = (0..blocks).flat_map(|_| bench.random.hash()).collect();
        let stored = bench.store(&hashes)?;
        let loaded = bench.load(&hashes)?;
        if round >= warm {
            memcpy.push(plain);
            store.push(stored / plain);
            load.push(loaded / plain);
        }
    }
    bench.compare()?;
    bench.session.close()?;
    Ok(Measured {
        memcpy: median(&mut memcpy),
        store: median(&mut store),
        load: median(&mut load),
    })
}

fn gbps(begun: Instant) -> f64 {
    TURN_BYTES as f64 / begun.elapsed().as_secs_f64() / 1e9
}

/// Stores blocks from these pages, all of which must become visible.
pub(super) fn store(
    mover: &mut BlockMover,
    session: &mut Session,
    namespace: u32,
    chain: ChainRef<'_>,
    (source, pages): (&OwnedPages, Range<u32>),
) -> Result<()> {
    let numbers: Vec<[u32; 1]> = pages.map(|n| [n]).collect();
    let at = source.pages();
    let from: Vec<_> = numbers.iter().map(|n| BlockRef { at, pages: n }).collect();
    let outcomes = mover.store(session, namespace, chain, &from)?;
    ensure!(
        outcomes.iter().all(|o| *o == StoreOutcome::Visible),
        "not every block was stored: {:?}",
        outcomes.last()
    );
    Ok(())
}

impl Bench {
    fn memcpy(&mut self) -> f64 {
        let (from, to) = &mut self.plain;
        let begun = Instant::now();
        for (from, to) in from
            .chunks(self.block_bytes)
            .zip(to.chunks_mut(self.block_bytes))
        {
            to.copy_from_slice(from);
        }
        let speed = gbps(begun);
        std::hint::black_box(&self.plain.1);
        speed
    }

    fn store(&mut self, hashes: &[u8]) -> Result<f64> {
        let chain = ChainRef {
            group: 0,
            hashes,
            parent: None,
        };
        let pages = 0..self.source.pages().pages();
        let begun = Instant::now();
        store(
            &mut self.mover,
            &mut self.session,
            self.namespace,
            chain,
            (&self.source, pages),
        )?;
        Ok(gbps(begun))
    }

    fn load(&mut self, hashes: &[u8]) -> Result<f64> {
        let numbers: Vec<[u32; 1]> = (0..self.target.pages().pages()).map(|n| [n]).collect();
        let to: Vec<_> = numbers
            .iter()
            .map(|n| BlockRef {
                at: self.target.pages(),
                pages: n,
            })
            .collect();
        let begun = Instant::now();
        let outcomes = self
            .mover
            .load(&mut self.session, self.namespace, hashes, &to)?;
        let speed = gbps(begun);
        ensure!(
            outcomes.iter().all(|o| *o == LoadOutcome::Loaded),
            "not every block was loaded: {:?}",
            outcomes.last()
        );
        Ok(speed)
    }

    /// What was loaded last is what was stored.
    fn compare(&self) -> Result<()> {
        for block in 0..self.source.pages().pages() {
            ensure!(
                self.source.read(block) == self.target.read(block),
                "block {block} came back different"
            );
        }
        Ok(())
    }
}
