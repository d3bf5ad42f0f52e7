//! How often memory is allocated for each block that is loaded, once everything is warm: by the thread that has the store, and by
//! who asks it. A program of its own, because it counts all allocations of the process; shown in any run (`make test`).
//!
//! Blocks are loaded through a `Store` that is driven here, and through a `Device` with its thread. That thread is held in its news
//! while loads are asked for, and those who ask wait while it works, so that all that is counted is of one side. Deliberately
//! absent: times.

use std::alloc::System;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

use crc_fast::{CrcAlgorithm::Crc64Nvme, Digest};
use kvd_arena::{Arena, HugePages};
use kvd_core::tier::{
    BlockHeader, BlockKey, HostRange, OpId, Place, ReadBlock, StoreDone, StoreOp, stride_of,
};
use kvd_core::{BlockHash, Cut, GroupGeometry, NamespaceId, NamespaceRecord, TenantId};
use kvd_nvme::device::{Device, DeviceConfig, DeviceNews};
use kvd_nvme::io::{ArenaRange, Backing, Choice, DiskIo, IoOptions};
use kvd_nvme::store::{Store, StoreConfig};
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};

#[global_allocator]
static HEAP: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// Blocks that are asked for at a time.
const BATCH: usize = 32;
/// Batches before any is counted, and counted ones.
const WARM: usize = 8;
const COUNTED: usize = 16;
/// How long any answer may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// Most that a block may cost on each side. Nothing is taken for a block; but when threads run in another order than before, a list
/// grows or one page more is under way than ever, and that stays for later.
const MOST: f64 = 0.05;

/// Allocations, and their bytes.
#[derive(Clone, Copy, Default)]
struct Count {
    times: usize,
    bytes: usize,
}

impl Count {
    /// What happens in the whole process meanwhile.
    fn of<T>(&mut self, work: impl FnOnce() -> T) -> T {
        let region = Region::new(HEAP);
        let result = work();
        let change = region.change();
        self.times += change.allocations + change.reallocations;
        self.bytes += change.bytes_allocated;
        result
    }
}

/// Blocks of one size, memory for a batch of them, and their places in a store.
struct Blocks {
    geometry: GroupGeometry,
    namespace: NamespaceId,
    record: Arc<[u8]>,
    arena: Arc<Arena>,
    crcs: Vec<u64>,
    next_op: u64,
    /// What reads that are over have brought back, as core keeps it.
    #[allow(clippy::vec_box, reason = "the boxes are what is kept")]
    spare: Vec<Box<ReadBlock>>,
}

impl Blocks {
    /// Of 8 heads of 16 tokens, K and V of 128 numbers of 2 bytes: 64 KiB for each layer.
    fn new(layers: u32) -> Self {
        let fields = [
            ("tenant", "default".to_owned()),
            ("model", "test".to_owned()),
            ("weights", "test".to_owned()),
            ("kv_dtype", "bfloat16".to_owned()),
            ("cell_encoding", "test-1".to_owned()),
            ("hash", "test:0".to_owned()),
            ("block_tokens", "16".to_owned()),
            ("groups", "1".to_owned()),
            ("group.0.kind", "full".to_owned()),
            ("group.0.layers", layers.to_string()),
            ("group.0.heads", "8".to_owned()),
            ("group.0.cell_bytes", "512".to_owned()),
        ];
        let record = NamespaceRecord::build(fields).expect("a legal record");
        let geometry = record.groups()[0].clone();
        let bytes = BATCH as u64 * geometry.slot_bytes();
        let arena = Arena::create(
            bytes.next_multiple_of(2 << 20),
            Some(2 << 20),
            HugePages::Off,
        )
        .expect("memory");
        for extent in 0..arena.extents() {
            arena.populate(extent).expect("memory");
        }
        let block: Vec<u8> = (0..geometry.block_bytes())
            .map(|i| (i * i % 251) as u8)
            .collect();
        for slot in 0..BATCH as u64 {
            let wrote = rustix::io::pwrite(arena.fd(), &block, slot * geometry.slot_bytes());
            assert_eq!(wrote, Ok(block.len()));
        }
        let mut sums: Vec<_> = (0..8).map(|_| Digest::new(Crc64Nvme)).collect();
        for (at, run) in block.chunks(geometry.head_bytes() as usize).enumerate() {
            sums[at % 8].update(run);
        }
        Blocks {
            namespace: record.id(),
            record: record.encode().into(),
            arena: Arc::new(arena),
            crcs: sums.iter().map(Digest::finalize).collect(),
            geometry,
            next_op: 0,
            spare: Vec::with_capacity(BATCH),
        }
    }

    fn store_config(&self) -> StoreConfig {
        let segment_bytes = 16 << 20;
        let blocks = BATCH as u64 * stride_of(self.geometry.block_bytes());
        StoreConfig {
            segment_bytes,
            ..StoreConfig::new(2 * blocks + 4 * segment_bytes, [5; 16])
        }
    }

    fn place(&self, number: usize) -> Place {
        let stride = stride_of(self.geometry.block_bytes());
        let per_segment = (16 << 20) / stride;
        Place {
            segment: (number as u64 / per_segment) as u32,
            index: (number as u64 % per_segment) as u32,
            stride,
        }
    }

    fn range(&self, number: usize) -> (HostRange, ArenaRange) {
        let (offset, bytes) = (
            number as u64 * self.geometry.slot_bytes(),
            self.geometry.block_bytes(),
        );
        let range = HostRange {
            tenant: TenantId(0),
            offset,
            bytes,
        };
        let host = ArenaRange::new(Arc::clone(&self.arena), offset, bytes as usize);
        (range, host.expect("inside"))
    }

    fn key(&self, number: usize) -> BlockKey {
        BlockKey {
            namespace: self.namespace,
            group: 0,
            hash: BlockHash([number as u8 + 1; 32]),
        }
    }

    fn write(&mut self, number: usize) -> (StoreOp, Option<ArenaRange>) {
        self.next_op += 1;
        let (from, host) = self.range(number);
        let header = BlockHeader {
            key: self.key(number),
            parent: None,
            cut: Cut::whole(&self.geometry),
            crcs: self.crcs.clone(),
        };
        let op = StoreOp::Write {
            op: OpId(self.next_op),
            to: self.place(number),
            from,
            header: Box::new(header),
            geometry: Box::new(self.geometry.clone()),
            record: Arc::clone(&self.record),
        };
        (op, Some(host))
    }

    fn read(&mut self, number: usize) -> (StoreOp, Option<ArenaRange>) {
        self.next_op += 1;
        let (into, host) = self.range(number);
        let block = self.spare.pop();
        let op = StoreOp::Read {
            op: OpId(self.next_op),
            from: self.place(number),
            into,
            key: self.key(number),
            block: block.unwrap_or_else(|| ReadBlock::new(self.geometry.clone())),
        };
        (op, Some(host))
    }

    /// Looks at answers, and keeps what they have brought back.
    fn check(&mut self, done: &mut Vec<StoreDone>) {
        for one in done.drain(..) {
            match one {
                StoreDone::Written { result: Ok(()), .. } => {}
                StoreDone::Read {
                    block,
                    result: Ok(()),
                    ..
                } => {
                    assert_eq!(block.crcs, self.crcs);
                    self.spare.push(block);
                }
                other => panic!("{other:?}"),
            }
        }
    }
}

fn options(choice: Choice) -> IoOptions {
    IoOptions {
        choice,
        ..IoOptions::default()
    }
}

/// A store that is driven by this thread.
struct Driven {
    store: Store<DiskIo>,
    now: u64,
    done: Vec<StoreDone>,
}

impl Driven {
    fn open(directory: &Path, config: &StoreConfig, choice: Choice) -> Self {
        let backing = Backing::open(directory, Some(config.capacity)).expect("a file");
        let (io, _) = DiskIo::open(Arc::new(backing), &options(choice)).expect("an adapter");
        let opened = Store::open(io, config, &mut |_| {});
        let opened = opened.map_err(|error| error.to_string()).expect("opens");
        Driven {
            store: opened.store,
            now: 0,
            done: Vec::with_capacity(BATCH),
        }
    }

    fn all(&mut self, ops: &mut Vec<(StoreOp, Option<ArenaRange>)>) {
        let wanted = self.done.len() + ops.len();
        for (op, host) in ops.drain(..) {
            self.done.extend(self.store.submit(op, host));
        }
        // The clock stands still but for what makes a batch of writes due: a busy machine's device may take many turns.
        for turn in 0..1_000_000_000 {
            if self.done.len() == wanted {
                return;
            }
            self.now += u64::from(turn < 1_000_000);
            std::thread::yield_now();
            self.store
                .turn(self.now, Duration::from_millis(1), &mut self.done);
        }
        panic!("not answered: {} of {wanted}", self.done.len());
    }
}

/// What asking for a block costs, and what the store does with it.
fn driven(blocks: &mut Blocks, directory: &Path, choice: Choice) -> (Count, Count) {
    let mut lane = Driven::open(directory, &blocks.store_config(), choice);
    let mut ops: Vec<_> = (0..BATCH).map(|n| blocks.write(n)).collect();
    lane.all(&mut ops);
    blocks.check(&mut lane.done);
    let (mut asking, mut storing) = (Count::default(), Count::default());
    for batch in 0..WARM + COUNTED {
        if batch == WARM {
            (asking, storing) = Default::default();
        }
        asking.of(|| ops.extend((0..BATCH).map(|n| blocks.read(n))));
        storing.of(|| lane.all(&mut ops));
        blocks.check(&mut lane.done);
    }
    (asking, storing)
}

/// A device whose thread waits in its news, after each, until it is let go.
struct Held {
    device: Device,
    answers: Receiver<Vec<StoreDone>>,
    go: SyncSender<()>,
}

impl Held {
    fn open(directory: &Path, store: StoreConfig, choice: Choice) -> Self {
        let config = DeviceConfig {
            path: directory.to_owned(),
            io: options(choice),
            store,
            faults: None,
        };
        let (tell, answers) = sync_channel(1);
        let (go, may_go) = sync_channel::<()>(1);
        let device = Device::open(config, &mut |_| {}, move |news| match news {
            DeviceNews::Done(done) => tell.send(done).is_ok() && may_go.recv().is_ok(),
            DeviceNews::Switched(_) => true,
        });
        Held {
            device: device.expect("opens"),
            answers,
            go,
        }
    }

    /// Asks; with the thread held, nothing is done yet.
    fn ask(&self, ops: &mut Vec<(StoreOp, Option<ArenaRange>)>) {
        for (op, host) in ops.drain(..) {
            let refused = self.device.begin(op, host);
            assert_eq!(refused, None);
        }
    }

    /// Takes so many answers. The thread is held again after the last.
    fn answers(&self, wanted: usize, done: &mut Vec<StoreDone>) {
        loop {
            let mut some = self.answers.recv_timeout(PATIENCE).expect("an answer");
            done.append(&mut some);
            self.device.give_back(some);
            if done.len() >= wanted {
                return;
            }
            self.go.send(()).expect("the thread is there");
        }
    }
}

/// The same for a device with its thread.
fn threaded(blocks: &mut Blocks, directory: &Path, choice: Choice) -> (Count, Count) {
    let lane = Held::open(directory, blocks.store_config(), choice);
    let mut ops: Vec<_> = (0..BATCH).map(|n| blocks.write(n)).collect();
    let mut done = Vec::with_capacity(BATCH);
    lane.ask(&mut ops);
    lane.answers(BATCH, &mut done);
    blocks.check(&mut done);
    let (mut asking, mut storing) = (Count::default(), Count::default());
    for batch in 0..WARM + COUNTED {
        if batch == WARM {
            (asking, storing) = Default::default();
        }
        asking.of(|| {
            ops.extend((0..BATCH).map(|n| blocks.read(n)));
            lane.ask(&mut ops);
        });
        storing.of(|| {
            lane.go.send(()).expect("the thread is there");
            lane.answers(BATCH, &mut done);
        });
        blocks.check(&mut done);
    }
    drop(lane.go);
    (asking, storing)
}

#[test]
fn blocks_are_loaded_without_allocations() {
    // Beside the binary, because `/tmp` may be a tmpfs without direct I/O.
    let place = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let mut rows = Vec::new();
    for layers in [1, 32] {
        let mut blocks = Blocks::new(layers);
        let kib = blocks.geometry.block_bytes() >> 10;
        // What the daemon chooses here, which is a ring where there may be one, and what it does without.
        for (choice, word) in [(Choice::Auto, "auto"), (Choice::Threads, "threads")] {
            let scratch = tempfile::tempdir_in(place).expect("a directory");
            let counts = driven(&mut blocks, scratch.path(), choice);
            rows.push((kib, word, "store", counts));
            let scratch = tempfile::tempdir_in(place).expect("a directory");
            let counts = threaded(&mut blocks, scratch.path(), choice);
            rows.push((kib, word, "device", counts));
        }
    }
    let mut out = std::io::stderr();
    let _ = writeln!(
        out,
        "allocations for each block that is loaded: to ask for it, and in the store (bytes)"
    );
    for (kib, io, what, (asking, storing)) in rows {
        let blocks = (COUNTED * BATCH) as f64;
        let each = |count: Count| (count.times as f64 / blocks, count.bytes as f64 / blocks);
        let ((ask, ask_bytes), (store, store_bytes)) = (each(asking), each(storing));
        let _ = writeln!(
            out,
            "{kib:>5} KiB, {io:<7}, {what:<6}: {ask:.2} ({ask_bytes:.0}), {store:.2} ({store_bytes:.0})"
        );
        assert!(ask <= MOST, "{ask} to ask for a block");
        assert!(store <= MOST, "{store} in the store for a block");
    }
}
