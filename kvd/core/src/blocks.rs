//! Visible blocks: touching, pinning, dropping, and making room for others.
//! Deliberately absent: copies to and from a slower tier (`disk`).

use crate::api::Output;
use crate::evict::{SCAN, chain};
use crate::index::{Entry, EntryState};
use crate::log::ChangeKind;
use crate::pool::{NO_CLASS, SlotState};
use crate::state::Core;

/// Most entries looked at for a block that a store holds too.
const DEMOTE_SCAN: u32 = 4096;

impl Core {
    /// The block was looked up (`used` false) or used: recency of the block and of its extent.
    pub(crate) fn touch(&mut self, t: usize, class: u16, id: u32, used: bool) {
        let Some(pool) = &mut self.tenants[t].pool else {
            return;
        };
        let (extents, policy) = pool.recency(class);
        extents.touch(self.index.entries.hot[id].slot, self.stamp);
        chain::touch(policy, &mut self.index.entries, id, self.stamp, used);
    }

    /// Whether leases, or writes to NVMe, may pin this much more.
    pub(crate) fn may_pin(&self, t: usize, bytes: u64) -> bool {
        let tenant = &self.tenants[t];
        let usable = tenant.pool.as_ref().map_or(0, |pool| pool.usable_bytes());
        let most = (usable as f64 * self.settings.lease_fraction.clamp(0.0, 1.0)) as u64;
        tenant.pinned_bytes.saturating_add(bytes) <= most
    }

    pub(crate) fn pin(&mut self, t: usize, id: u32) {
        self.index.entries.hot[id].pins += 1;
        if self.index.entries.hot[id].pins == 1 {
            self.count_pinned(t, id, true);
        }
    }

    /// Takes back one pin of a block, unless the block is gone and its pins with it.
    pub(crate) fn unpin(&mut self, t: usize, id: u32, serial: u32) {
        if self.index.entries.side[id].serial == serial {
            self.index.entries.hot[id].pins -= 1;
            if self.index.entries.hot[id].pins == 0 {
                self.count_pinned(t, id, false);
            }
        }
    }

    fn count_pinned(&mut self, t: usize, id: u32, pinned: bool) {
        let tenant = &mut self.tenants[t];
        let Some(pool) = &mut tenant.pool else { return };
        let Some(extent) = pool.extents.of(self.index.entries.hot[id].slot) else {
            return;
        };
        let extent = &mut pool.extents[extent];
        let bytes = pool.classes[usize::from(extent.class)].slot_bytes;
        if pinned {
            extent.pinned += 1;
            tenant.pinned_bytes += bytes;
        } else {
            extent.pinned -= 1;
            tenant.pinned_bytes -= bytes;
        }
    }

    /// Drops a visible block: announced, its slot free, its pins void. Readers see its word change. `cold`: it goes because
    /// it was the coldest.
    pub(crate) fn drop_block(&mut self, id: u32, cold: bool, out: &mut Vec<Output>) {
        self.announce(id, ChangeKind::Removed);
        self.end_ahead(id);
        if cold {
            self.count_missed(id);
        }
        let Entry {
            space,
            group,
            slot,
            crcs,
            pins,
            ..
        } = self.index.entries.hot[id];
        let cut = self.index.entries.side[id].cut;
        let namespace = self.spaces.get_mut(space);
        let t = namespace.tenant;
        let found = &namespace.groups[usize::from(group)];
        namespace.blocks -= 1;
        namespace.bytes -= found.slot_bytes;
        self.crcs
            .remove(namespace.cuts[usize::from(cut)].crcs, crcs);
        let class = found.class;
        if pins > 0 {
            self.count_pinned(t, id, false);
        }
        if let Some(pool) = &mut self.tenants[t].pool {
            let policy = &mut *pool.classes[usize::from(class)].policy;
            chain::leaves(policy, &mut self.index.entries, id, cold);
            pool.release(slot, out);
        }
        self.index.remove(id);
        self.drop_space_if_idle(space);
    }

    /// Makes a slot of this class obtainable: evicts the class's coldest leaf, or empties another class's extent that has
    /// been cold for longer (looked at while `others`, which becomes false once it is not so). False: nothing can go. Leased
    /// blocks and those touched in this step stay.
    pub(crate) fn make_room(
        &mut self,
        t: usize,
        class: u16,
        others: &mut bool,
        out: &mut Vec<Output>,
    ) -> bool {
        if *others {
            let coldest = self.own_coldest(t, class);
            match self.coldest_extent(t, class) {
                Some((extent, touched)) if coldest.is_none_or(|s| chain::older(touched, s)) => {
                    self.empty_extent(t, extent, out);
                    return true;
                }
                _ => *others = false,
            }
        }
        if let Some(id) = self.victim(t, class) {
            self.counters.evicted += 1;
            self.drop_block(id, true, out);
            return true;
        }
        if let Some(id) = self.kept_below(t, class) {
            self.tier_counters.demoted += 1;
            self.drop_block(id, true, out);
            return true;
        }
        let other = self.coldest_extent(t, class);
        if let Some((extent, _)) = other {
            self.empty_extent(t, extent, out);
        }
        other.is_some()
    }

    /// A block of this class that a store holds too. It may go wherever it is in its chain, because what is needed of the chain
    /// comes up again; so one chain may be longer than host memory. Looked for by a hand that goes round.
    fn kept_below(&mut self, t: usize, class: u16) -> Option<u32> {
        if self.disks.all.is_empty() {
            return None;
        }
        let end = self.index.entries.hot.range().end;
        for _ in 0..end.min(DEMOTE_SCAN) {
            let id = self.hand.checked_rem(end).unwrap_or(0);
            self.hand = id + 1;
            let entry = &self.index.entries.hot[id];
            if entry.state != EntryState::Resident || entry.pins > 0 || entry.stamp == self.stamp {
                continue;
            }
            let space = self.spaces.get(entry.space);
            let fits = space.tenant == t && space.groups[usize::from(entry.group)].class == class;
            if fits
                && self
                    .stored_entry(entry.space, entry.group, &entry.hash)
                    .is_some()
            {
                return Some(id);
            }
        }
        None
    }

    fn own_coldest(&self, t: usize, class: u16) -> Option<u32> {
        let pool = self.tenants[t].pool.as_ref()?;
        let id = pool.classes[usize::from(class)].policy.coldest()?;
        Some(self.index.entries.hot[id].stamp)
    }

    fn victim(&mut self, t: usize, class: u16) -> Option<u32> {
        let stamp = self.stamp;
        let pool = self.tenants[t].pool.as_mut()?;
        let policy = &mut *pool.classes[usize::from(class)].policy;
        let mut keep = |entry: &Entry| entry.pins > 0 || entry.stamp == stamp;
        policy.victim(&mut self.index.entries, &mut keep, SCAN)
    }

    /// The extent of any other class that was touched longest ago, and when. None of its blocks is leased, being filled or
    /// touched in this step.
    fn coldest_extent(&self, t: usize, class: u16) -> Option<(u32, u32)> {
        let pool = self.tenants[t].pool.as_ref()?;
        let extents = || (0..).zip(pool.extents.iter());
        let candidates = extents().filter(|(_, extent)| {
            let other = extent.class != class && extent.class != NO_CLASS && !extent.suspect;
            other
                && extent.used > 0
                && extent.writing == 0
                && extent.pinned == 0
                && extent.touched != self.stamp
        });
        let coldest = candidates.max_by_key(|(_, e)| self.stamp.wrapping_sub(e.touched));
        coldest.map(|(id, extent)| (id, extent.touched))
    }

    /// Drops every block of an extent, so that another class can have it. Chains that ran through it get holes.
    fn empty_extent(&mut self, t: usize, extent: u32, out: &mut Vec<Output>) {
        self.counters.extents_moved += 1;
        for id in self.resident_in(t, extent) {
            self.counters.evicted += 1;
            self.counters.evicted_for_class += 1;
            self.drop_block(id, true, out);
        }
    }

    fn resident_in(&self, t: usize, extent: u32) -> Vec<u32> {
        let Some(pool) = &self.tenants[t].pool else {
            return Vec::new();
        };
        let extent = &pool.extents[extent];
        let slots = extent.slots.iter().take(extent.fresh as usize);
        slots
            .filter(|slot| slot.state == SlotState::Resident)
            .map(|slot| slot.owner)
            .collect()
    }

    /// A reader found bytes that are not what was stored: the block goes. A streak of such takes the extent out.
    pub(crate) fn corrupt(&mut self, t: usize, id: u32, out: &mut Vec<Output>) {
        self.counters.load_failed.crc += 1;
        let Some(pool) = &mut self.tenants[t].pool else {
            return;
        };
        let Some(at) = pool.extents.of(self.index.entries.hot[id].slot) else {
            return;
        };
        pool.extents[at].streak += 1;
        let streak = pool.extents[at].streak;
        self.drop_block(id, false, out);
        if streak < self.settings.corrupt_streak.max(1) {
            return;
        }
        self.counters.extents_refilled += 1;
        if let Some(pool) = &mut self.tenants[t].pool {
            pool.suspect(at, out);
        }
        for id in self.resident_in(t, at) {
            self.drop_block(id, false, out);
        }
    }

    /// A reader found the bytes of this slot right.
    pub(crate) fn sound(&mut self, t: usize, slot: u32) {
        if let Some(pool) = &mut self.tenants[t].pool
            && let Some(extent) = pool.extents.of(slot)
        {
            pool.extents[extent].streak = 0;
        }
    }
}
