//! Going down: a block that became visible in host memory is written to its store, if that is on, has a place, and may write.
//!
//! A full queue, an empty budget or a full store drops the offload, and counts it: a store to host memory never waits for a disk.
//! Deliberately absent: which blocks are about to leave host memory (`demote`).

use super::{Budget, DROP_PAUSE, Doing};
use crate::api::Output;
use crate::evict::{SCAN, chain};
use crate::ids::{BlockHash, StoreId};
use crate::index::{Entry, EntryState, Found};
use crate::log::ChangeKind;
use crate::settings::OffloadPolicy;
use crate::state::Core;
use crate::tier::{BlockHeader, BlockKey, HostRange, OpId, StoreError, StoreOp, stride_of};

/// Most blocks dropped in one step to keep places free.
const DROPS_A_STEP: usize = 64;
const DAY_US: u128 = 86_400_000_000;

impl Budget {
    /// Takes so many bytes, if they may be written now. `per_day` 0: there is no limit.
    fn take(&mut self, now: u64, per_day: u64, bytes: u64) -> bool {
        if per_day == 0 {
            return true;
        }
        // An hour's worth may be saved up, and at least some blocks.
        let most = (per_day / 24).max(bytes);
        let more = match self.filled {
            None => u128::from(most),
            Some(then) => u128::from(per_day) * u128::from(now.saturating_sub(then)) / DAY_US,
        };
        if more > 0 {
            self.level = most.min(self.level.saturating_add(more.min(u128::from(most)) as u64));
            self.filled = Some(now);
        }
        let enough = self.level >= bytes;
        if enough {
            self.level -= bytes;
        }
        enough
    }
}

impl Core {
    /// A block became visible in host memory by a store of an engine.
    pub(crate) fn offload_new(&mut self, host: u32, out: &mut Vec<Output>) {
        match self.settings.tiers.offload {
            OffloadPolicy::WriteThrough => self.offload(host, out),
            OffloadPolicy::SecondUse => {}
            OffloadPolicy::Demotion => {
                let (t, class) = self.class_of(host);
                self.wants_room(t, class);
            }
        }
    }

    /// Begins to write a block of host memory to its store, unless something is in the way.
    pub(super) fn offload(&mut self, host: u32, out: &mut Vec<Output>) {
        let hash = self.index.entries.hot[host].hash;
        let Some(store) = self.disks.store_of(&hash) else {
            return;
        };
        let (space, group) = {
            let entry = &self.index.entries.hot[host];
            (entry.space, entry.group)
        };
        let namespace = self.spaces.get(space);
        let (t, id) = (namespace.tenant, namespace.id);
        let geometry = namespace.record.groups()[usize::from(group)].clone();
        let stride = stride_of(geometry.block_bytes());
        let disk = &self.disks.all[store];
        if let Some(number) = disk.space(id)
            && disk.index.find(number, group, &hash) != Found::Absent
        {
            return;
        }
        if !disk.on {
            self.tier_counters.offload_off += 1;
            return;
        }
        let slot_bytes = geometry.slot_bytes();
        if disk.writes >= self.settings.tiers.max_writes
            || disk.index.len() >= self.settings.tiers.max_entries as usize
            || !self.may_pin(t, slot_bytes)
        {
            self.tier_counters.offload_queue_full += 1;
            return;
        }
        let counters = &mut self.tier_counters;
        let disk = &mut self.disks.all[store];
        if disk.places.most(stride) == 0 {
            counters.offload_no_place += 1;
            return;
        }
        let Some(slot) = disk.places.take(stride) else {
            counters.offload_no_place += 1;
            self.keep_places(store, stride, out);
            return;
        };
        let per_day = self.settings.tiers.write_bytes_per_day;
        if !disk.budget.take(self.now, per_day, stride) {
            disk.places.put_back(slot);
            counters.offload_budget += 1;
            return;
        }
        let entry = self.enter_stored(store, host, slot, t);
        self.begin_write(store, entry, host, t, geometry, out);
        self.keep_places(store, stride, out);
    }

    /// The block's entry in the store's index, until it is written.
    fn enter_stored(&mut self, store: usize, host: u32, slot: u32, t: usize) -> u32 {
        let kind = self.settings.eviction;
        let tenant = self.tenants[t].id;
        let found = &self.index.entries.hot[host];
        let (hash, group) = (found.hash, found.group);
        let parent = self.index.entries.parent(host);
        let parent = parent.map(|parent| self.index.entries.hot[parent].hash);
        let namespace = self.spaces.get_mut(found.space);
        let (id, record) = (namespace.id, namespace.canonical());
        let disk = &mut self.disks.all[store];
        let space = disk.add_space(id, tenant, record, namespace.record.groups());
        disk.places.touch(slot, self.stamp);
        disk.enter((space, group, hash), parent, slot, self.stamp, kind)
    }

    fn begin_write(
        &mut self,
        store: usize,
        entry: u32,
        host: u32,
        t: usize,
        geometry: crate::geometry::GroupGeometry,
        out: &mut Vec<Output>,
    ) {
        self.pin(t, host);
        let serial = self.index.entries.side[host].serial;
        let found = &self.index.entries.hot[host];
        let namespace = self.spaces.get(found.space);
        let stored = &namespace.cuts[usize::from(self.index.entries.side[host].cut)];
        let mut crcs = Vec::with_capacity(stored.crcs as usize);
        self.crcs.append_to(stored.crcs, found.crcs, &mut crcs);
        let parent = self.index.entries.parent(host);
        let header = BlockHeader {
            key: BlockKey {
                namespace: namespace.id,
                group: found.group,
                hash: BlockHash(found.hash),
            },
            parent: parent.map(|parent| BlockHash(self.index.entries.hot[parent].hash)),
            cut: stored.cut.clone(),
            crcs,
        };
        let offset = self.tenants[t]
            .pool
            .as_ref()
            .map_or(0, |pool| pool.offset(found.slot));
        let from = HostRange {
            tenant: self.tenants[t].id,
            offset,
            bytes: geometry.block_bytes(),
        };
        let op = self.disks.begin(Doing::Write {
            store,
            entry,
            host,
            serial,
            t,
        });
        let disk = &mut self.disks.all[store];
        disk.writes += 1;
        let space = disk.index.entries.hot[entry].space;
        let op = StoreOp::Write {
            op,
            to: disk.places.place(disk.index.entries.hot[entry].slot),
            from,
            header: Box::new(header),
            geometry: Box::new(geometry),
            record: disk.spaces[&space].record.clone(),
        };
        let store = StoreId(store as u8);
        out.push(Output::Store { store, op });
    }

    /// A write is over.
    pub(super) fn written(
        &mut self,
        doing: Doing,
        result: Result<(), StoreError>,
        out: &mut Vec<Output>,
    ) {
        let Doing::Write {
            store,
            entry,
            host,
            serial,
            t,
        } = doing
        else {
            return;
        };
        // Blocks dropped out of order (corruption, a refill) leave despite their pins: what was read of them then is not known.
        let same = self.index.entries.side[host].serial == serial;
        self.unpin(t, host, serial);
        self.disks.all[store].writes -= 1;
        if same {
            self.write_is_over(host);
        }
        match result {
            Ok(()) if same => {
                let kind = self.settings.eviction;
                let disk = &mut self.disks.all[store];
                let stride = disk.places.place(disk.index.entries.hot[entry].slot).stride;
                let (policy, index) = disk.policy(stride, kind);
                chain::visible(policy, &mut index.entries, entry);
                self.tier_counters.offloaded += 1;
                self.tier_counters.offloaded_bytes += stride;
                self.announce_stored(store, entry, ChangeKind::Stored);
            }
            Err(StoreError::Off) => {
                self.tier_counters.offload_off += 1;
                self.forget_unwritten(store, entry);
            }
            Ok(()) | Err(_) => {
                self.tier_counters.offload_failed += 1;
                self.drop_stored(store, entry, false, out);
            }
        }
    }

    /// Nothing was begun of a write: its place is free at once.
    fn forget_unwritten(&mut self, store: usize, entry: u32) {
        let kind = self.settings.eviction;
        let disk = &mut self.disks.all[store];
        let slot = disk.leave(entry, false, kind);
        disk.places.put_back(slot);
    }

    /// Keeps some places of this stride free, so that the next writes find them: drops the coldest ends of chains, or empties a
    /// segment of another stride that has been cold for longer.
    fn keep_places(&mut self, store: usize, stride: u64, out: &mut Vec<Output>) {
        let spare = u64::from(self.settings.tiers.spare_places);
        let low = spare
            .min(self.disks.all[store].places.most(stride) / 8)
            .max(1);
        for _ in 0..DROPS_A_STEP {
            let disk = &self.disks.all[store];
            let coming = disk.dropping.get(&stride).copied().unwrap_or(0);
            if disk.places.available(stride) + coming >= low {
                return;
            }
            let own = disk.policies.get(&stride).and_then(|p| p.coldest());
            let own = own.map(|entry| disk.index.entries.hot[entry].stamp);
            let other = disk.places.coldest_other(stride, self.stamp);
            if let Some((segment, touched)) = other
                && own.is_none_or(|stamp| chain::older(touched, stamp))
            {
                self.empty_segment(store, segment, out);
                return;
            }
            let Some(entry) = self.stored_victim(store, stride) else {
                if let Some((segment, _)) = other {
                    self.empty_segment(store, segment, out);
                }
                return;
            };
            self.tier_counters.evicted += 1;
            self.drop_stored(store, entry, true, out);
        }
    }

    fn empty_segment(&mut self, store: usize, segment: u32, out: &mut Vec<Output>) {
        for entry in self.disks.all[store].places.owners(segment) {
            let found = &self.disks.all[store].index.entries.hot[entry];
            if found.pins == 0 && found.state == EntryState::Resident {
                self.tier_counters.evicted += 1;
                self.drop_stored(store, entry, true, out);
            }
        }
    }

    fn stored_victim(&mut self, store: usize, stride: u64) -> Option<u32> {
        let (kind, stamp) = (self.settings.eviction, self.stamp);
        let (policy, index) = self.disks.all[store].policy(stride, kind);
        let mut keep = |entry: &Entry| entry.pins > 0 || entry.stamp == stamp;
        policy.victim(&mut index.entries, &mut keep, SCAN)
    }

    /// A store has forgotten a block: its place is free; or out of use, if that is not known; or, if nothing was begun, it is asked
    /// again later.
    pub(super) fn dropped(&mut self, doing: Doing, result: Result<(), StoreError>) {
        let Doing::Drop { store, slot, key } = doing else {
            return;
        };
        let disk = &mut self.disks.all[store];
        disk.drops -= 1;
        match result {
            Err(StoreError::Off) => {
                disk.undropped.push_front((slot, key));
                disk.drop_at = self.now.saturating_add(DROP_PAUSE);
            }
            result => disk.drop_over(slot, result.is_ok()),
        }
    }

    /// Whether this operation is one that core knows; says what it was.
    pub(super) fn over(&mut self, op: OpId) -> Option<Doing> {
        self.disks.doing.remove(op.0)
    }
}
