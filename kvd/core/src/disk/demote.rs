//! Writing on demotion: blocks go down when they are about to leave host memory, so that a device writes only what would be lost.
//!
//! A store to host memory must never wait for a disk, so blocks are written a little before their slots are needed. While a class
//! has few slots that are free or whose blocks go next, the next victims of its policy are chosen (`evict::next`) and written. A
//! block is chosen once and tried once: what was refused or failed goes unwritten, unless it is touched and chosen again. A
//! victim that could not be written in time goes all the same, and is counted. Each slot taken, block stored and write ended pays for
//! a few choices, so no step looks for long. Deliberately absent: the write itself (`offload`); blocks of another class whose extent is
//! taken away, which go at once.

use crate::api::Output;
use crate::index::Entry;
use crate::settings::OffloadPolicy;
use crate::state::Core;

/// Most blocks chosen for one slot taken: more than one, so that writing catches up with storing.
const CHOICES: usize = 2;

impl Core {
    /// Whether that is the policy.
    pub(crate) fn on_demotion(&self) -> bool {
        self.settings.tiers.offload == OffloadPolicy::Demotion
    }

    /// The tenant and the class of a block of host memory.
    pub(super) fn class_of(&self, host: u32) -> (usize, u16) {
        let entry = &self.index.entries.hot[host];
        let space = self.spaces.get(entry.space);
        (space.tenant, space.groups[usize::from(entry.group)].class)
    }

    /// A slot of this class was taken, or a block of it may be written now: the end of the step looks whether more should be.
    pub(crate) fn wants_room(&mut self, t: usize, class: u16) {
        if self.on_demotion() {
            self.disks.short_of_room.push((t, class));
        }
    }

    /// The write of a block that is still in host memory has ended, well or not.
    pub(super) fn write_is_over(&mut self, host: u32) {
        if self.on_demotion() {
            let (t, class) = self.class_of(host);
            self.wants_room(t, class);
            // What can go although it is no end of a chain is here, among what is mostly held nowhere else.
            self.hand = host;
        }
    }

    /// At the end of a step, when nothing is looked at any more that a write may push out of a store: begins to write what goes next.
    pub(crate) fn write_what_goes_next(&mut self, out: &mut Vec<Output>) {
        let mut classes = std::mem::take(&mut self.disks.short_of_room);
        for (t, class) in classes.drain(..) {
            self.choose_some(t, class, out);
        }
        self.disks.short_of_room = classes;
    }

    fn choose_some(&mut self, t: usize, class: u16, out: &mut Vec<Output>) {
        for _ in 0..CHOICES {
            if !self.should_write(t, class) {
                return;
            }
            let stamp = self.stamp;
            let Some(pool) = &mut self.tenants[t].pool else {
                return;
            };
            let policy = &mut *pool.classes[usize::from(class)].policy;
            let mut keep = |entry: &Entry| entry.pins > 0 || entry.stamp == stamp;
            let Some(next) = policy.choose(&mut self.index.entries, &mut keep) else {
                return;
            };
            self.offload(next, out);
        }
    }

    /// Whether one more block of this class should be written, and can be.
    fn should_write(&self, t: usize, class: u16) -> bool {
        let Some(pool) = &self.tenants[t].pool else {
            return false;
        };
        let free = pool.free_slots(class);
        let found = &pool.classes[usize::from(class)];
        let slots = u64::from(found.extents) * u64::from(found.per_extent);
        let tiers = &self.settings.tiers;
        let low = slots.div_ceil(u64::from(tiers.low_water.max(1)));
        let mut stores = self.disks.all.iter();
        free + found.policy.chosen() < low
            && stores.any(|disk| disk.on && disk.writes < tiers.max_writes)
            && self.may_pin(t, found.slot_bytes)
    }

    /// A block leaves host memory because it is the coldest: whether it is lost by that.
    pub(crate) fn count_missed(&mut self, id: u32) {
        if !self.on_demotion() || self.disks.all.is_empty() {
            return;
        }
        let entry = &self.index.entries.hot[id];
        let held = self.stored_entry(entry.space, entry.group, &entry.hash);
        self.tier_counters.demote_missed += u64::from(held.is_none());
    }
}
