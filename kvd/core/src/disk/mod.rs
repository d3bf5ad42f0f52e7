//! The slower tier: which blocks a store holds and where, and what is under way between it and host memory.
//!
//! A store has an index of its own beside the host's: a block may be in one, in the other, or in both. Blocks go down when they
//! become visible, are used again (`offload`) or are about to leave host memory (`demote`), and come up when an engine wants to load them (`fetch`). Nothing here waits:
//! plans go out as [`crate::tier::StoreOp`], and what became of them comes back as an input. Deliberately absent: bytes, journals,
//! deadlines of devices.

mod ahead;
mod bring;
mod check;
mod demote;
mod fetch;
mod offload;
mod places;
mod recover;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use crate::api::{NIL, Output};
use crate::evict::{Eviction, chain, policy};
use crate::geometry::GroupGeometry;
use crate::ids::{BlockHash, NamespaceId, RequestId, SessionId, StoreId, TenantId, low64};
use crate::index::{Entry, EntryState, Found, Index};
use crate::log::{Change, ChangeKind, Tier};
use crate::map::Map;
use crate::settings::EvictionPolicy;
use crate::state::Core;
use crate::tier::{BlockKey, OpId, ReadBlock, StoreOp, StoreShape, stride_of};
pub(crate) use ahead::AHEAD_A_LOOKUP;
pub(crate) use fetch::Asked;
use places::Places;

/// Most drops that a store is asked for at a time.
const DROPS: u32 = 256;
/// How long a store that refuses a drop is left alone, in microseconds.
const DROP_PAUSE: u64 = 10_000;

/// A namespace that a store has blocks of. It needs no session.
#[derive(Debug)]
pub(crate) struct StoredSpace {
    pub(crate) id: NamespaceId,
    pub(crate) tenant: TenantId,
    pub(crate) record: Arc<[u8]>,
    /// By group: the stride of its blocks.
    strides: Vec<u64>,
    /// Blocks, those being written included.
    pub(crate) blocks: u64,
    pub(crate) bytes: u64,
}

/// Bytes that may be written yet: begins with an hour's worth, and fills up to that by the clock.
#[derive(Debug, Default)]
pub(crate) struct Budget {
    level: u64,
    /// When it was filled up last.
    filled: Option<u64>,
}

/// One store.
pub(crate) struct Disk {
    pub(crate) places: Places,
    pub(crate) index: Index,
    /// By stride.
    policies: BTreeMap<u64, Box<dyn Eviction>>,
    pub(crate) spaces: BTreeMap<u32, StoredSpace>,
    by_id: BTreeMap<NamespaceId, u32>,
    next_space: u32,
    /// It takes operations.
    pub(crate) on: bool,
    pub(crate) writes: u32,
    /// For loads; reads ahead are counted apart, by tenant.
    pub(crate) reads: u32,
    /// Drops that the store has been asked for.
    pub(crate) drops: u32,
    /// Places of dropped blocks of which the store has not been asked yet. Bounded by the places there are.
    undropped: VecDeque<(u32, BlockKey)>,
    /// A drop was refused: not before this is the store asked again.
    drop_at: u64,
    /// By stride: places that become free once their drops are over.
    dropping: BTreeMap<u64, u64>,
    budget: Budget,
}

/// What is under way.
#[derive(Debug)]
pub(crate) enum Doing {
    /// A block goes down. `host` and its serial: where from, pinned.
    Write {
        store: usize,
        entry: u32,
        host: u32,
        serial: u32,
        t: usize,
    },
    /// A block comes up into this entry of the host's index.
    Read { host: u32 },
    /// A read that nobody waits for, because its store is off, into a slot that is nobody's until it is over.
    Left { t: usize, slot: u32 },
    /// A place is to become free.
    Drop {
        store: usize,
        slot: u32,
        key: BlockKey,
    },
}

/// A block that comes up from a store that is on, by its entry in the host's index, which is Filling and has no checksums yet.
#[derive(Debug)]
pub(crate) struct Fetch {
    store: usize,
    /// Its entry in the store's index, pinned.
    entry: u32,
    t: usize,
    /// Loads that wait for it.
    waiters: Vec<u64>,
}

/// A load some of whose blocks are coming up.
#[derive(Debug)]
pub(crate) struct Waiting {
    session: u32,
    token: SessionId,
    id: RequestId,
    namespace: u32,
    group: u8,
    hashes: Vec<[u8; 32]>,
    /// Blocks that have not come.
    left: u32,
    /// Ascending positions whose blocks were held below, or coming up, when the load came: what is not here in the end has failed.
    below: Vec<u32>,
    /// Host entries and their serials, pinned until the answer.
    pins: Vec<(u32, u32)>,
    deadline: u64,
}

/// What reads that are over have left to those that come. There is never more of it than reads were under way at once.
#[derive(Default)]
struct Spare {
    #[allow(clippy::vec_box, reason = "the boxes are what is kept")]
    blocks: Vec<Box<ReadBlock>>,
    /// Empty lists of waiters.
    waiters: Vec<Vec<u64>>,
}

/// All stores, and what is under way.
#[derive(Default)]
pub(crate) struct Disks {
    pub(crate) all: Vec<Disk>,
    /// How many there will be.
    pub(crate) expected: usize,
    /// By operation.
    doing: Map<Doing>,
    last_op: u64,
    fetches: Map<Fetch>,
    spare: Spare,
    waiting: BTreeMap<u64, Waiting>,
    last_wait: u64,
    by_deadline: BTreeSet<(u64, u64)>,
    /// Hashes in all waiting loads.
    waiting_hashes: usize,
    /// Tenants and classes that had a slot taken, got a block or ended a write in this step, once for each time. For writing on
    /// demotion; empty between steps.
    pub(crate) short_of_room: Vec<(usize, u16)>,
}

impl Spare {
    /// What goes down with a read of a block of this group, without checksums.
    fn block_for(&mut self, geometry: GroupGeometry) -> Box<ReadBlock> {
        let Some(mut block) = self.blocks.pop() else {
            return ReadBlock::new(geometry);
        };
        block.geometry = geometry;
        block.crcs.clear();
        block
    }
}

impl Disks {
    /// None yet, of so many; 0: of as many as there will be.
    pub(crate) fn expecting(stores: u32) -> Self {
        Disks {
            expected: stores as usize,
            ..Disks::default()
        }
    }

    pub(crate) fn next_deadline(&self) -> Option<u64> {
        let wait = self.by_deadline.first().map(|(deadline, _)| *deadline);
        let refused = |disk: &&Disk| disk.on && disk.drops < DROPS && !disk.undropped.is_empty();
        let drops = self.all.iter().filter(refused).map(|disk| disk.drop_at);
        drops.chain(wait).min()
    }

    /// Which store a block belongs in: always the same one.
    pub(crate) fn store_of(&self, hash: &[u8; 32]) -> Option<usize> {
        let count = self.expected.max(self.all.len()) as u64;
        let store = (low64(hash) >> 8).checked_rem(count)? as usize;
        (store < self.all.len()).then_some(store)
    }

    /// Whether a block could come up from a store, which counts as a touch.
    pub(crate) fn look(&mut self, id: NamespaceId, group: u8, hash: &[u8; 32], stamp: u32) -> bool {
        let Some((store, entry)) = self.find(id, group, hash) else {
            return false;
        };
        let disk = &mut self.all[store];
        let slot = disk.index.entries.hot[entry].slot;
        disk.places.touch(slot, stamp);
        let stride = disk.places.place(slot).stride;
        if let Some(policy) = disk.policies.get_mut(&stride) {
            chain::touch(&mut **policy, &mut disk.index.entries, entry, stamp, false);
        }
        true
    }

    /// Whether a store has the block; looking at it so does not count as a use.
    pub(crate) fn has(&self, id: NamespaceId, group: u8, hash: &[u8; 32]) -> bool {
        self.find(id, group, hash).is_some()
    }

    /// The store that has the block, and its entry there.
    fn find(&self, id: NamespaceId, group: u8, hash: &[u8; 32]) -> Option<(usize, u32)> {
        let store = self.store_of(hash)?;
        let disk = &self.all[store];
        let space = disk.space(id).filter(|_| disk.on)?;
        Some((store, disk.readable(space, group, hash)?))
    }

    /// What came back with a read is kept for another, if there were ever as many reads at once.
    fn take_back(&mut self, block: Box<ReadBlock>) {
        if self.spare.blocks.len() + self.fetches.len() < self.fetches.most() {
            self.spare.blocks.push(block);
        }
    }

    fn begin(&mut self, doing: Doing) -> OpId {
        self.last_op += 1;
        let op = OpId(self.last_op);
        self.doing.insert(op.0, doing);
        op
    }

    /// Whether a block is coming up into this entry of the host's index.
    pub(crate) fn fetches(&self, host: u32) -> bool {
        self.fetches.contains(host.into())
    }

    /// How many blocks are coming up.
    pub(crate) fn fetching(&self) -> usize {
        self.fetches.len()
    }
}

impl Disk {
    fn new(places: Places, seed: u64) -> Self {
        Disk {
            places,
            index: Index::new(seed),
            policies: BTreeMap::new(),
            spaces: BTreeMap::new(),
            by_id: BTreeMap::new(),
            next_space: 0,
            on: true,
            writes: 0,
            reads: 0,
            drops: 0,
            undropped: VecDeque::new(),
            drop_at: 0,
            dropping: BTreeMap::new(),
            budget: Budget::default(),
        }
    }

    /// The number of a namespace, if the store has blocks of it.
    pub(crate) fn space(&self, id: NamespaceId) -> Option<u32> {
        self.by_id.get(&id).copied()
    }

    fn add_space(
        &mut self,
        id: NamespaceId,
        tenant: TenantId,
        record: Arc<[u8]>,
        groups: &[GroupGeometry],
    ) -> u32 {
        if let Some(number) = self.space(id) {
            return number;
        }
        while self.next_space == NIL || self.spaces.contains_key(&self.next_space) {
            self.next_space = self.next_space.wrapping_add(1);
        }
        let number = self.next_space;
        self.next_space = number.wrapping_add(1);
        let (blocks, bytes) = (0, 0);
        let strides = groups.iter().map(|group| stride_of(group.block_bytes()));
        let strides = strides.collect();
        self.by_id.insert(id, number);
        self.spaces.insert(
            number,
            StoredSpace {
                id,
                tenant,
                record,
                strides,
                blocks,
                bytes,
            },
        );
        number
    }

    fn space_gains(&mut self, number: u32, stride: u64) {
        if let Some(space) = self.spaces.get_mut(&number) {
            space.blocks += 1;
            space.bytes += stride;
        }
    }

    fn space_loses(&mut self, number: u32, stride: u64) {
        let Some(space) = self.spaces.get_mut(&number) else {
            return;
        };
        space.blocks -= 1;
        space.bytes -= stride;
        if space.blocks == 0 {
            self.by_id.remove(&space.id);
            self.spaces.remove(&number);
        }
    }

    /// The policy of a stride, and the entries it orders.
    fn policy(&mut self, stride: u64, kind: EvictionPolicy) -> (&mut dyn Eviction, &mut Index) {
        let policy = self.policies.entry(stride).or_insert_with(|| policy(kind));
        (&mut **policy, &mut self.index)
    }

    /// Enters a block that has this place, as being written. Its parent is linked if it is here.
    fn enter(
        &mut self,
        (space, group, hash): (u32, u8, [u8; 32]),
        parent: Option<[u8; 32]>,
        slot: u32,
        stamp: u32,
        kind: EvictionPolicy,
    ) -> u32 {
        let entry = Entry {
            hash,
            space,
            slot,
            parent: NIL,
            stamp,
            crcs: NIL,
            group,
            state: EntryState::Filling,
            ..Entry::default()
        };
        let entry = self.index.insert(entry, 0);
        let stride = self.places.place(slot).stride;
        self.space_gains(space, stride);
        self.places.set_owner(slot, entry);
        let parent = parent.map(|parent| self.index.find(space, group, &parent));
        if let Some(Found::Entry(parent)) = parent {
            let (policy, index) = self.policy(stride, kind);
            chain::gains_child(policy, &mut index.entries, parent);
            index.entries.adopt(entry, parent);
        }
        entry
    }

    /// The place of a dropped block becomes free once the store has forgotten it.
    fn must_drop(&mut self, slot: u32, key: BlockKey) {
        let stride = self.places.place(slot).stride;
        *self.dropping.entry(stride).or_insert(0) += 1;
        self.undropped.push_back((slot, key));
    }

    /// A drop is over; its place is free, or lost.
    fn drop_over(&mut self, slot: u32, free: bool) {
        let stride = self.places.place(slot).stride;
        if let Some(dropping) = self.dropping.get_mut(&stride) {
            *dropping -= 1;
            if *dropping == 0 {
                self.dropping.remove(&stride);
            }
        }
        match free {
            true => self.places.put_back(slot),
            false => self.places.lose(slot),
        }
    }

    /// Takes a block out, and gives its place, which is not free by that.
    fn leave(&mut self, entry: u32, cold: bool, kind: EvictionPolicy) -> u32 {
        let found = &self.index.entries.hot[entry];
        let (slot, space) = (found.slot, found.space);
        let stride = self.places.place(slot).stride;
        let (policy, index) = self.policy(stride, kind);
        chain::leaves(policy, &mut index.entries, entry, cold);
        self.index.remove(entry);
        self.space_loses(space, stride);
        self.places.set_owner(slot, NIL);
        slot
    }

    fn key(&self, entry: u32) -> BlockKey {
        let entry = &self.index.entries.hot[entry];
        BlockKey {
            namespace: self.spaces[&entry.space].id,
            group: entry.group,
            hash: BlockHash(entry.hash),
        }
    }

    /// The block's entry if it can be read.
    pub(crate) fn readable(&self, space: u32, group: u8, hash: &[u8; 32]) -> Option<u32> {
        match self.index.find(space, group, hash) {
            Found::Entry(id) if self.index.entries.hot[id].state == EntryState::Resident => {
                Some(id)
            }
            _ => None,
        }
    }
}

impl Core {
    /// In whose memory an operation under way is; a drop is in nobody's.
    pub fn tenant_of(&self, op: OpId) -> Option<TenantId> {
        let t = match self.disks.doing.get(op.0)? {
            Doing::Write { t, .. } => *t,
            Doing::Read { host } => self.disks.fetches.get((*host).into())?.t,
            Doing::Left { t, .. } => *t,
            Doing::Drop { .. } => return None,
        };
        Some(self.tenants[t].id)
    }

    /// A store can be used from now on. What it holds comes by `store_found`.
    pub(crate) fn store_opened(&mut self, store: StoreId, shape: StoreShape) {
        if usize::from(store.0) != self.disks.all.len() {
            return;
        }
        if let Some(places) = Places::new(shape) {
            let seed = self.settings.index_seed;
            self.disks.all.push(Disk::new(places, seed));
        }
    }

    /// Writes a change of a store to the change log.
    fn announce_stored(&mut self, store: usize, entry: u32, kind: ChangeKind) {
        let disk = &self.disks.all[store];
        let key = disk.key(entry);
        let space = &disk.spaces[&disk.index.entries.hot[entry].space];
        self.log.push(Change {
            kind,
            tier: Tier::Nvme,
            tenant: space.tenant,
            namespace: key.namespace,
            group: key.group.into(),
            hash: key.hash,
        });
    }

    /// Drops a block from a store: at once for whoever looks, its place once the store has forgotten it too.
    fn drop_stored(&mut self, store: usize, entry: u32, cold: bool, out: &mut Vec<Output>) {
        if self.disks.all[store].index.entries.hot[entry].state == EntryState::Resident {
            self.announce_stored(store, entry, ChangeKind::Removed);
        }
        let kind = self.settings.eviction;
        let disk = &mut self.disks.all[store];
        let key = disk.key(entry);
        let slot = disk.leave(entry, cold, kind);
        disk.must_drop(slot, key);
        self.ask_drops(store, out);
    }

    /// Asks a store to forget what is to be dropped, some at a time.
    fn ask_drops(&mut self, store: usize, out: &mut Vec<Output>) {
        loop {
            let disk = &mut self.disks.all[store];
            if !disk.on || disk.drops >= DROPS || self.now < disk.drop_at {
                return;
            }
            let Some((slot, key)) = disk.undropped.pop_front() else {
                return;
            };
            disk.drops += 1;
            let place = disk.places.place(slot);
            let op = self.disks.begin(Doing::Drop { store, slot, key });
            out.push(Output::Store {
                store: StoreId(store as u8),
                op: StoreOp::Drop { op, place, key },
            });
        }
    }

    /// Asks again for drops that were refused, once it is time.
    pub(crate) fn drops_due(&mut self, out: &mut Vec<Output>) {
        for store in 0..self.disks.all.len() {
            self.ask_drops(store, out);
        }
    }
}
