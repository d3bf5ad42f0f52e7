//! Reading ahead: a lookup that leases begins to bring up what it has found below, because a load will ask for it, and then joins.
//!
//! Nobody waits for such a read, so it takes nothing that a load needs: it is counted apart from the reads of loads until one joins,
//! and begun only where as much memory as loads may have coming is left to them, neither pinned nor being written. What is pinned or
//! stored after that may yet take it: then a load finds no slot that it would have found, and is refused at once, as any other.
//! Blocks that were brought ahead, or are under way, and that no load or lease has claimed, take at most a quarter of the tenant's host memory;
//! tenants share no memory, so that holds for all together, too. Of the reads ahead under way each tenant may have an equal share.
//! Deliberately absent: leases of what has come; it may go before its load comes, as anything that nobody leases.

use super::bring::Fetcher;
use crate::api::Output;
use crate::index::Found;
use crate::state::Core;

/// Most blocks that one lookup begins to bring up. Enough to keep a device busy until the load comes, which begins the rest; and few
/// enough for one step of core, and for loads of others, whose reads queue behind them at the device.
pub(crate) const AHEAD_A_LOOKUP: usize = 64;

impl Core {
    /// Begins to bring up blocks that a lookup has found below (group and hash), as far as there is room for reading ahead. The rest is
    /// left for the load to begin.
    pub(crate) fn read_ahead(
        &mut self,
        t: usize,
        space: u32,
        wanted: &[(u8, [u8; 32])],
        out: &mut Vec<Output>,
    ) {
        let mut by = Fetcher::ahead(t);
        for (group, hash) in wanted {
            // Another chain of the same lookup may have it, too.
            if matches!(self.index.find(space, *group, hash), Found::Entry(_)) {
                continue;
            }
            let Some(stored) = self.stored_entry(space, *group, hash) else {
                continue;
            };
            if self
                .fetch(&mut by, (space, *group), hash, stored, out)
                .is_none()
            {
                return;
            }
            self.tier_counters.fetched_ahead += 1;
        }
    }

    /// Whether one more block may be brought up ahead. Never by making room in the index.
    pub(super) fn may_read_ahead(&self, t: usize, class: u16, slot_bytes: u64) -> bool {
        let tenant = &self.tenants[t];
        let Some(pool) = &tenant.pool else {
            return false;
        };
        let usable = pool.usable_bytes();
        let most = self.settings.tiers.max_ahead;
        let share = (most / self.tenants.len() as u32).max(1).min(most);
        // What loads may have coming, and have not yet, is left to them.
        let for_loads = (usable / 2).saturating_sub(tenant.coming_bytes);
        let taken = tenant.pinned_bytes + pool.writable_bytes();
        tenant.ahead_reads < share
            && tenant.ahead_bytes + slot_bytes <= usable / 4
            && taken + slot_bytes + for_loads <= usable
            && pool.has_half(class)
            && self.index.len() < self.settings.max_entries as usize
    }

    /// Counts a block that is about to be read ahead.
    pub(super) fn begin_ahead(&mut self, t: usize, host: u32, slot_bytes: u64) {
        self.index.entries.side[host].ahead = true;
        self.tenants[t].ahead_bytes += slot_bytes;
        self.tenants[t].ahead_reads += 1;
    }

    /// A load or a lease has claimed the block, or it goes: it is no longer one that was brought ahead for nobody.
    pub(crate) fn end_ahead(&mut self, id: u32) {
        if std::mem::take(&mut self.index.entries.side[id].ahead) {
            let entry = &self.index.entries.hot[id];
            let space = self.spaces.get(entry.space);
            let slot_bytes = space.groups[usize::from(entry.group)].slot_bytes;
            self.tenants[space.tenant].ahead_bytes -= slot_bytes;
        }
    }
}
