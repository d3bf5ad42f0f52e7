//! The slower tier of a simulated node: the real [`Store`] on simulated disks, as the node's port. The simulation keeps a handle
//! to it, so that it can move the stores on, and so that the disks outlive daemons.
//!
//! What the node begins is queued, as for the thread of a real store, and taken by the store when it is turned. The device takes
//! the bytes of a write from the arena when it does the write, as a real one does: whoever writes there meanwhile had no right to,
//! and the checksums that were committed say so. Deliberately absent: judging (`tier_checks`).

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::time::Duration;

use kvd_core::tier::{
    HostRange, OpId, ReadBlock, Recovered, StoreDone, StoreError, StoreOp, StoreShape,
};
use kvd_core::{Cut, GroupGeometry, OffloadPolicy, StoreId, TenantId, TierSettings};
use kvd_node::StorePort;
use kvd_nvme::store::{Found, OpenError, Store, StoreConfig};

use crate::disk::{DiskFaults, SimDisk, SimHost};
use crate::memory::{SimArena, SimSpan};
use crate::options::{Fault, Faults, Options, StorePlant};
use crate::rng::Rng;

/// The stores that a seed draws.
#[derive(Clone, Debug)]
pub(crate) struct TierConfig {
    /// Each store's numbers; empty: there is no slower tier.
    pub(crate) stores: Vec<StoreConfig>,
    /// For core.
    pub(crate) settings: TierSettings,
    /// How a disk fails while it fails.
    pub(crate) worst: DiskFaults,
    /// Disks do one thing at a time.
    pub(crate) single: bool,
}

impl TierConfig {
    /// Draws it, from a stream of its own: what else a seed means does not depend on it. Each fault of disks is left out
    /// of half of the runs, power cuts of a third.
    pub(crate) fn draw(options: &Options, faults: &mut Faults) -> TierConfig {
        let mut rng = Rng::new(options.seed, 3);
        let count = match rng.one_in(3) {
            true => 0,
            false => rng.range(1, 2).min(options.stores as u64),
        };
        let sound = rng.one_in(3);
        for fault in Fault::of_disks() {
            let cut = *fault == Fault::PowerCut;
            if count == 0 || sound && !cut || rng.one_in(if cut { 3 } else { 2 }) {
                *faults = faults.without(*fault);
            }
        }
        let rate = |rng: &mut Rng| rng.spread(8, 400) as usize;
        let worst = DiskFaults {
            eio: rate(&mut rng),
            sticky: rate(&mut rng),
            short: rate(&mut rng),
            stall: rate(&mut rng),
            lost: rate(&mut rng),
            misdirected: rate(&mut rng),
            ..DiskFaults::default()
        };
        TierConfig {
            stores: (0..count).map(|_| Self::store(&mut rng)).collect(),
            settings: Self::settings(&mut rng, count as u32),
            worst,
            single: rng.one_in(8),
        }
    }

    fn store(rng: &mut Rng) -> StoreConfig {
        let (max_queue, flush_us) = (rng.spread(4, 64) as usize, rng.spread(50, 1_000));
        let flush_blocks = rng.spread(1, 8) as usize;
        StoreConfig {
            segment_bytes: 1 << 20,
            journal_bytes: Some(1),
            max_queue,
            flush_us,
            flush_blocks,
            // Company enough by its bytes, or only by its number.
            flush_bytes: [u64::MAX, 64 << 10][flush_blocks % 2],
            deadline_us: rng.spread(20_000, 100_000),
            ..StoreConfig::new((3 << 19) + (rng.range(1, 2) << 20), rng.id())
        }
    }

    fn settings(rng: &mut Rng, stores: u32) -> TierSettings {
        let drawn = TierSettings {
            stores,
            offload: *rng.pick(&[
                OffloadPolicy::SecondUse,
                OffloadPolicy::Demotion,
                OffloadPolicy::WriteThrough,
            ]),
            low_water: rng.range(1, 8) as u32,
            // Some blocks a second, or no limit.
            write_bytes_per_day: match rng.one_in(4) {
                true => rng.spread(1 << 16, 1 << 24) * 86_400,
                false => 0,
            },
            max_writes: rng.spread(1, 64) as u32,
            max_reads: rng.spread(1, 64) as u32,
            max_ahead: 0,
            // A store of this size has about a hundred places; most of them are kept free now and then.
            spare_places: match rng.one_in(2) {
                true => rng.range(0, 8) as u32,
                false => rng.range(30, 120) as u32,
            },
            max_entries: rng.spread(8, 1024) as u32,
            max_waiting_hashes: rng.spread(4, 256) as u32,
            max_wait_ms: rng.spread(1, 200) as u32,
            read_ahead: !rng.one_in(4),
            load_bytes_per_us: 100,
        };
        TierSettings {
            max_ahead: drawn.max_reads / 2,
            ..drawn
        }
    }
}

struct One {
    disk: SimDisk,
    config: StoreConfig,
    store: Option<Store<SimDisk>>,
    queue: VecDeque<(StoreOp, Option<SimSpan>)>,
    off: bool,
    faults: DiskFaults,
}

/// Something the node has begun.
pub(crate) struct Begun {
    pub(crate) store: usize,
    pub(crate) op: StoreOp,
    pub(crate) span: Option<SimSpan>,
}

/// Other random bytes for another start.
pub(crate) fn next_start(config: &mut StoreConfig) {
    let next = u128::from_le_bytes(config.start).wrapping_add(1);
    config.start = next.to_le_bytes();
}

/// What a store held when it was opened.
#[derive(Default)]
pub(crate) struct Held {
    pub(crate) shape: StoreShape,
    pub(crate) namespaces: Vec<Vec<u8>>,
    pub(crate) blocks: Vec<Recovered>,
}

struct Shared {
    all: Vec<One>,
    begun: Vec<Begun>,
    arenas: SimArena,
}

/// All stores. Copies show the same.
#[derive(Clone)]
pub(crate) struct SimStores(Rc<RefCell<Shared>>);

impl SimStores {
    /// Empty disks; nothing is opened yet.
    pub(crate) fn new(config: &TierConfig, seed: u64, arenas: SimArena) -> Self {
        let one = |(at, store): (u64, &StoreConfig)| {
            let disk = SimDisk::new(seed ^ at << 32, store.capacity);
            disk.set_piecemeal();
            disk.set_depth(if config.single { 1 } else { 12 });
            One {
                disk,
                config: store.clone(),
                store: None,
                queue: VecDeque::new(),
                off: false,
                faults: DiskFaults::default(),
            }
        };
        SimStores(Rc::new(RefCell::new(Shared {
            all: (0..).zip(&config.stores).map(one).collect(),
            begun: Vec::new(),
            arenas,
        })))
    }

    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        self.0.borrow().all.len()
    }

    /// What the node has begun since last asked.
    pub(crate) fn take_begun(&self) -> Vec<Begun> {
        std::mem::take(&mut self.0.borrow_mut().begun)
    }

    /// Faults of the medium that this disk has had.
    pub(crate) fn media_faults(&self, at: usize) -> u64 {
        self.0.borrow().all[at].disk.media_faults()
    }

    /// Flips a bit of a disk: mostly where its first blocks are.
    pub(crate) fn flip(&self, at: usize, rng: &mut Rng) {
        let one = &self.0.borrow().all[at];
        let blocks = one.config.capacity % (1 << 20) + (1 << 20);
        let offset = match rng.one_in(4) {
            true => rng.range(0, one.config.capacity - 1),
            false => rng.range(blocks, blocks + (1 << 18)),
        };
        one.disk.flip(offset, rng.below(8) as u32);
    }

    /// Changes what goes wrong with a disk.
    pub(crate) fn change_faults(&self, at: usize, change: impl FnOnce(&mut DiskFaults)) {
        let one = &mut self.0.borrow_mut().all[at];
        change(&mut one.faults);
        one.disk.set_faults(one.faults);
    }

    /// From now on nothing goes wrong.
    pub(crate) fn heal(&self) {
        for at in 0..self.count() {
            self.change_faults(at, |faults| *faults = DiskFaults::default());
        }
    }

    /// Opens a store, and gives what it held. Its disk does not fail until it is armed.
    pub(crate) fn open(
        &self,
        at: usize,
        now: u64,
        plant: Option<StorePlant>,
    ) -> Result<Held, OpenError> {
        let one = &mut self.0.borrow_mut().all[at];
        one.disk.set_faults(DiskFaults::default());
        one.disk.reach(now);
        next_start(&mut one.config);
        let mut held = Held::default();
        let opened = Store::open(
            one.disk.clone(),
            &one.config,
            &mut |found: Found<'_>| match found {
                Found::Shape(shape) => held.shape = shape,
                Found::Namespace(_, record) => held.namespaces.push(record.to_vec()),
                Found::Block(block) => held.blocks.push(block),
            },
        )?;
        let store = one.store.insert(opened.store);
        if let Some(StorePlant(plant)) = plant {
            plant(store);
        }
        one.config.format = false;
        one.off = false;
        Ok(held)
    }

    /// Reads one block beside all that the node does. Gives how it is cut, and its bytes.
    pub(crate) fn read_back(
        &self,
        at: usize,
        block: &Recovered,
        geometry: &GroupGeometry,
    ) -> (Result<Cut, StoreError>, Vec<u8>) {
        let one = &mut self.0.borrow_mut().all[at];
        let bytes = geometry.block_bytes();
        let host = SimHost::new(vec![0xaa; bytes as usize]);
        let Some(store) = &mut one.store else {
            return (Err(StoreError::Off), Vec::new());
        };
        let op = StoreOp::Read {
            op: OpId(u64::MAX),
            from: block.place,
            into: HostRange {
                tenant: TenantId(0),
                offset: 0,
                bytes,
            },
            key: block.key,
            block: ReadBlock::new(geometry.clone()),
        };
        let mut done = Vec::new();
        done.extend(store.submit(op, Some(host.clone())));
        for _ in 0..1_000 {
            if let Some(StoreDone::Read { block, result, .. }) = done.pop() {
                return (result.map(|()| block.cut), host.bytes());
            }
            store.turn(one.disk.now(), Duration::from_millis(1), &mut done);
        }
        (Err(StoreError::Off), Vec::new())
    }

    /// From now on a disk fails as it did before its store was opened. Gives the time by the disk.
    pub(crate) fn arm(&self, at: usize) -> u64 {
        let one = &self.0.borrow().all[at];
        one.disk.set_faults(one.faults);
        one.disk.now()
    }

    /// The next time this store is opened, it is made anew, under the name after this.
    pub(crate) fn format_next(&self, at: usize, id: [u8; 16]) {
        let one = &mut self.0.borrow_mut().all[at];
        one.config.format = true;
        one.config.start = id;
    }

    /// The process is gone, perhaps with the disks' power.
    pub(crate) fn kill(&self, power: bool) {
        let shared = &mut *self.0.borrow_mut();
        shared.begun.clear();
        for one in &mut shared.all {
            one.store = None;
            one.queue.clear();
            match power {
                true => one.disk.power_cut(),
                false => one.disk.kill(),
            }
        }
    }

    /// One turn of a store. Says if it was switched off or on by it.
    pub(crate) fn turn(&self, at: usize, now: u64, done: &mut Vec<StoreDone>) -> Option<bool> {
        let one = &mut self.0.borrow_mut().all[at];
        let store = one.store.as_mut()?;
        one.disk.reach(now);
        for (op, span) in one.queue.drain(..) {
            done.extend(store.submit(op, span.map(|span| span.host())));
        }
        store.turn(now, Duration::ZERO, done);
        let off = store.is_off();
        let switched = off != std::mem::replace(&mut one.off, off);
        switched.then_some(!off)
    }

    /// Whether nothing is under way, and every store is on.
    pub(crate) fn idle(&self) -> bool {
        let all = &self.0.borrow().all;
        all.iter().all(|one| {
            let store = one.store.as_ref();
            one.queue.is_empty() && store.is_none_or(|s| s.pending() == 0 && !s.is_off())
        })
    }

    /// What the stores did since they were opened.
    pub(crate) fn counts(&self, at: usize) -> Vec<(&'static str, u64)> {
        let one = &self.0.borrow().all[at];
        let store = one.store.as_ref();
        store.map_or(Vec::new(), |store| store.counters().each())
    }
}

impl StorePort<SimSpan> for SimStores {
    fn begin(&mut self, store: StoreId, op: StoreOp, span: Option<SimSpan>) -> Option<StoreDone> {
        let shared = &mut *self.0.borrow_mut();
        let at = usize::from(store.0);
        if shared.arenas.burnt() {
            return None;
        }
        let one = &mut shared.all[at];
        if one.queue.len() >= one.config.max_queue {
            return Some(op.refused(StoreError::Off));
        }
        one.queue.push_back((op.clone(), span.clone()));
        shared.begun.push(Begun {
            store: at,
            op,
            span,
        });
        None
    }
}
