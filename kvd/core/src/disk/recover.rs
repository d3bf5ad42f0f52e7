//! What a store found when it was opened, and what it says of its operations. Deliberately absent: trust in the bytes; they are
//! checked when they are first read.

use std::sync::Arc;

use super::Doing;
use crate::api::Output;
use crate::evict::chain;
use crate::ids::StoreId;
use crate::index::{BATCH, Found};
use crate::log::ChangeKind;
use crate::record::NamespaceRecord;
use crate::state::Core;
use crate::tier::{Recovered, StoreDone, StoreError};

impl Core {
    /// A namespace of which a store holds blocks. One of a tenant that is not served here is not taken, nor are its blocks.
    pub(crate) fn store_has_namespace(&mut self, store: StoreId, record: &[u8]) {
        let at = usize::from(store.0);
        let Ok(parsed) = NamespaceRecord::parse(record) else {
            return;
        };
        let name = parsed.get("tenant").unwrap_or_default();
        let tenant = self.tenants.iter().find(|tenant| tenant.name == name);
        if let (Some(tenant), Some(disk)) = (tenant, self.disks.all.get_mut(at)) {
            disk.add_space(parsed.id(), tenant.id, Arc::from(record), parsed.groups());
        }
    }

    /// Blocks that a store holds. Those that can't be used here are dropped from it.
    pub(crate) fn store_has_blocks(
        &mut self,
        store: StoreId,
        blocks: &[Recovered],
        out: &mut Vec<Output>,
    ) {
        let at = usize::from(store.0);
        if at >= self.disks.all.len() {
            return;
        }
        for blocks in blocks.chunks(BATCH) {
            let spaces = self.warm_for(at, blocks);
            for (block, space) in blocks.iter().zip(spaces) {
                if !space.is_some_and(|space| self.recover_one(at, block, space)) {
                    self.drop_unknown(at, block);
                }
            }
        }
        self.ask_drops(at, out);
    }

    /// Numbers of the namespaces of some blocks. A million searches that each wait for memory are what a start would take longest
    /// for, so the index begins to search for all of these at once.
    fn warm_for(&self, at: usize, blocks: &[Recovered]) -> [Option<u32>; BATCH] {
        let disk = &self.disks.all[at];
        let mut spaces = [None; BATCH];
        let mut last = None;
        for (space, block) in spaces.iter_mut().zip(blocks) {
            *space = match last {
                Some((id, space)) if id == block.key.namespace => space,
                _ => disk.space(block.key.namespace),
            };
            last = Some((block.key.namespace, *space));
        }
        let keys = spaces.iter().zip(blocks).filter_map(|(space, block)| {
            space.map(|space| (space, block.key.group, &block.key.hash.0))
        });
        disk.index.warm(keys);
        spaces
    }

    fn recover_one(&mut self, at: usize, block: &Recovered, space: u32) -> bool {
        let kind = self.settings.eviction;
        let most = self.settings.tiers.max_entries as usize;
        let (group, hash) = (block.key.group, block.key.hash.0);
        // Another number of stores divides the blocks otherwise: this one would never be looked for here.
        let elsewhere = self.disks.expected > 0 && self.disks.store_of(&hash) != Some(at);
        let disk = &mut self.disks.all[at];
        let stride = disk.spaces[&space].strides.get(usize::from(group));
        if elsewhere || stride != Some(&block.place.stride) {
            return false;
        }
        if disk.index.len() >= most || disk.index.find(space, group, &hash) != Found::Absent {
            return false;
        }
        let Some(slot) = disk.places.claim(block.place) else {
            return false;
        };
        let parent = block.parent.map(|parent| parent.0);
        let entry = disk.enter((space, group, hash), parent, slot, self.stamp, kind);
        let (policy, index) = disk.policy(block.place.stride, kind);
        chain::visible(policy, &mut index.entries, entry);
        self.tier_counters.recovered += 1;
        self.announce_stored(at, entry, ChangeKind::Stored);
        true
    }

    /// A block that is of no use here: its place becomes free once the store has forgotten it.
    fn drop_unknown(&mut self, at: usize, block: &Recovered) {
        let disk = &mut self.disks.all[at];
        if let Some(slot) = disk.places.claim(block.place) {
            self.tier_counters.not_recovered += 1;
            disk.must_drop(slot, block.key);
        }
    }

    /// A store is off, or on again. What it holds is not looked for while it is off, and not forgotten.
    pub(crate) fn store_switched(&mut self, store: StoreId, on: bool, out: &mut Vec<Output>) {
        let at = usize::from(store.0);
        let Some(disk) = self.disks.all.get_mut(at) else {
            return;
        };
        disk.on = on;
        disk.drop_at = 0;
        if !on {
            self.leave_reads(at, out);
        }
        self.ask_drops(at, out);
    }

    /// An operation is over.
    pub(crate) fn store_done(&mut self, done: StoreDone, out: &mut Vec<Output>) {
        match done {
            StoreDone::Written { op, result } => {
                if let Some(doing @ Doing::Write { .. }) = self.over(op) {
                    self.written(doing, result, out);
                }
            }
            StoreDone::Read { op, block, result } => {
                let doing = self.over(op);
                let lost = result == Err(StoreError::Lost);
                self.tier_counters.slots_lost += u64::from(lost && doing.is_some());
                match doing {
                    Some(Doing::Read { host }) => self.read_over(host, Some(&block), result, out),
                    Some(Doing::Left { t, slot }) if !lost => self.left_over(t, slot, out),
                    _ => {}
                }
                if doing.is_some() {
                    self.disks.take_back(block);
                }
            }
            StoreDone::Dropped { op, result } => {
                if let Some(doing @ Doing::Drop { .. }) = self.over(op) {
                    self.dropped(doing, result);
                }
            }
        }
        self.drops_due(out);
    }
}
