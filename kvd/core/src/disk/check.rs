//! Checks of the slower tier's books, for [`Core::check`]. Deliberately absent: repair.

use std::collections::{BTreeMap, BTreeSet};

use super::{Disk, Doing};
use crate::api::NIL;
use crate::evict::{chosen, listed};
use crate::index::{EntryState, Found};
use crate::pool::SlotState;
use crate::state::Core;

impl Core {
    pub(crate) fn check_disks(&self) {
        let (mut writes, mut drops) = (BTreeMap::new(), BTreeMap::new());
        let (mut reads, mut left) = (0, self.tier_counters.slots_lost);
        for doing in self.disks.doing.iter().map(|(_, doing)| doing) {
            match doing {
                Doing::Write { store, entry, .. } => {
                    *writes.entry(*store).or_insert(0) += 1;
                    let entry = &self.disks.all[*store].index.entries.hot[*entry];
                    assert_eq!(entry.state, EntryState::Filling, "a block is written twice");
                }
                Doing::Drop { store, .. } => *drops.entry(*store).or_insert(0u32) += 1,
                Doing::Read { host } => {
                    let fetch = self.disks.fetches.get((*host).into());
                    let on = fetch.map(|fetch| self.disks.all[fetch.store].on);
                    assert_eq!(
                        on,
                        Some(true),
                        "a read for nobody, or of a store that is off"
                    );
                    reads += 1;
                }
                Doing::Left { t, slot } => {
                    let pool = self.tenants[*t].pool.as_ref();
                    let slot = pool.and_then(|pool| pool.slot(*slot));
                    let found = slot.map(|slot| (slot.state, slot.owner));
                    assert_eq!(found, Some((SlotState::Quarantined, NIL)));
                    left += 1;
                }
            }
        }
        assert_eq!(self.disks.fetches.len(), reads, "fetches and reads");
        let spare = &self.disks.spare;
        let most = self.disks.fetches.most();
        assert!(
            spare.blocks.len() + reads <= most,
            "more than was ever read at once"
        );
        assert!(spare.waiters.len() + reads <= most);
        assert!(spare.waiters.iter().all(Vec::is_empty));
        let kept: u64 = self.tenants.iter().map(|tenant| tenant.left_slots).sum();
        assert_eq!(kept, left, "slots of reads that nobody waits for");
        for (at, disk) in self.disks.all.iter().enumerate() {
            assert_eq!(disk.writes, writes.get(&at).copied().unwrap_or(0));
            let asked = drops.get(&at).copied().unwrap_or(0);
            assert_eq!(disk.drops, asked);
            let dropping: u64 = disk.dropping.values().sum();
            assert_eq!(dropping, u64::from(asked) + disk.undropped.len() as u64);
            let side = &self.index.entries.side;
            let reads = self.disks.fetches.iter();
            let reads = reads.filter(|(host, f)| f.store == at && !side[*host as u32].ahead);
            assert_eq!(disk.reads as usize, reads.count(), "reads of loads");
            assert!(disk.reads <= self.settings.tiers.max_reads);
            self.check_disk(at, disk);
        }
        self.check_waits();
        self.check_ahead();
        self.check_chosen();
    }

    /// What goes next: visible, counted in its class, and no more than a leaf and what follows it.
    fn check_chosen(&self) {
        let mut counts: BTreeMap<(usize, u16), u64> = BTreeMap::new();
        let mut followed = BTreeSet::new();
        for id in self.index.entries.hot.range() {
            let entry = &self.index.entries.hot[id];
            if entry.state == EntryState::Vacant || !chosen(entry) {
                continue;
            }
            assert!(self.on_demotion(), "chosen for nothing");
            assert_eq!(entry.state, EntryState::Resident);
            assert!(entry.children <= 1, "a block of two chains is chosen");
            *counts.entry(self.class_of(id)).or_default() += 1;
            followed.extend(self.index.entries.parent(id));
        }
        for id in self.index.entries.hot.range() {
            let entry = &self.index.entries.hot[id];
            let alone = entry.state == EntryState::Vacant || !chosen(entry) || listed(entry);
            assert!(alone || followed.contains(&id), "chosen before its child");
        }
        for (t, tenant) in self.tenants.iter().enumerate() {
            let classes = tenant.pool.iter().flat_map(|pool| &pool.classes);
            for (class, found) in (0..).zip(classes) {
                let counted = counts.get(&(t, class)).copied().unwrap_or(0);
                assert_eq!(found.policy.chosen(), counted, "blocks that go next");
            }
        }
    }

    /// What came up ahead and nobody has claimed, and what comes for loads: bytes and bounds of each tenant (invariant 8).
    fn check_ahead(&self) {
        let mut ahead = vec![0; self.tenants.len()];
        let mut coming = vec![(0, 0); self.tenants.len()];
        for id in self.index.entries.hot.range() {
            let entry = &self.index.entries.hot[id];
            if entry.state == EntryState::Vacant {
                continue;
            }
            let space = self.spaces.get(entry.space);
            let bytes = space.groups[usize::from(entry.group)].slot_bytes;
            let early = self.index.entries.side[id].ahead;
            ahead[space.tenant] += u64::from(early) * bytes;
            if let Some(fetch) = self.disks.fetches.get(id.into()) {
                assert_eq!(fetch.t, space.tenant);
                let (loads, reads) = &mut coming[fetch.t];
                *loads += u64::from(!early) * bytes;
                *reads += u32::from(early);
            } else {
                assert!(!early || entry.state == EntryState::Resident);
            }
        }
        for (t, tenant) in self.tenants.iter().enumerate() {
            assert_eq!(tenant.ahead_bytes, ahead[t], "bytes that came up ahead");
            let counted = (tenant.coming_bytes, tenant.ahead_reads);
            assert_eq!(counted, coming[t], "what comes up for loads, and ahead");
            let arena = tenant.pool.as_ref().map_or(0, |pool| pool.shape.bytes);
            assert!(tenant.ahead_bytes <= arena / 4, "too much came up ahead");
            assert!(tenant.ahead_reads <= self.settings.tiers.max_ahead);
        }
    }

    fn check_disk(&self, at: usize, disk: &Disk) {
        disk.places.check();
        disk.index.check();
        let mut spaces: BTreeMap<u32, (u64, u64)> = BTreeMap::new();
        for id in disk.index.entries.hot.range() {
            let entry = &disk.index.entries.hot[id];
            if entry.state == EntryState::Vacant {
                continue;
            }
            let leaf = entry.state == EntryState::Resident && entry.children == 0;
            assert_eq!(listed(entry), leaf, "a stored leaf is no candidate");
            let place = disk.places.place(entry.slot);
            assert!(disk.places.owners(place.segment).contains(&id));
            let sum = spaces.entry(entry.space).or_default();
            *sum = (sum.0 + 1, sum.1 + place.stride);
            let reads = self.disks.fetches.iter();
            let reads = reads
                .filter(|(_, f)| (f.store, f.entry) == (at, id))
                .count();
            assert_eq!(entry.pins as usize, reads, "pins of a stored block");
        }
        for (number, space) in &disk.spaces {
            let counted = spaces.get(number).copied().unwrap_or_default();
            assert_eq!(
                (space.blocks, space.bytes),
                counted,
                "blocks of a namespace"
            );
        }
        let (places, _) = disk.places.used();
        let dead = disk.places.lost + disk.dropping.values().sum::<u64>();
        assert_eq!(places, disk.index.len() as u64 + dead, "places and blocks");
    }

    /// Bounds of waiting loads (invariant 8), and that each waits for something.
    fn check_waits(&self) {
        let mut by_session: BTreeMap<u32, u32> = BTreeMap::new();
        let mut hashes = 0;
        for (number, waiting) in &self.disks.waiting {
            *by_session.entry(waiting.session).or_default() += 1;
            hashes += waiting.hashes.len();
            let for_it = self.disks.fetches.iter();
            let for_it = for_it.filter(|(_, f)| f.waiters.contains(number)).count();
            assert_eq!(waiting.left as usize, for_it, "blocks a load waits for");
            assert!(waiting.left > 0, "a load waits for nothing");
        }
        assert_eq!(self.disks.waiting_hashes, hashes);
        assert!(hashes <= self.settings.tiers.max_waiting_hashes as usize);
        assert_eq!(self.disks.by_deadline.len(), self.disks.waiting.len());
        for session in self.sessions.range() {
            let counted = by_session.get(&session).copied().unwrap_or(0);
            assert_eq!(self.sessions[session].waits, counted, "loads of a session");
        }
    }

    /// Pins of host entries by writes and waiting loads.
    pub(crate) fn tier_pins(&self, pins: &mut BTreeMap<u32, u32>) {
        for doing in self.disks.doing.iter().map(|(_, doing)| doing) {
            if let Doing::Write { host, serial, .. } = doing
                && self.index.entries.side[*host].serial == *serial
            {
                *pins.entry(*host).or_default() += 1;
            }
        }
        for waiting in self.disks.waiting.values() {
            for (id, serial) in &waiting.pins {
                if self.index.entries.side[*id].serial == *serial {
                    *pins.entry(*id).or_default() += 1;
                }
            }
        }
    }

    /// Whether a slot in this tenant's pool that nobody fills has a block coming up into it.
    pub(crate) fn check_coming(&self, t: usize, slot: u32) {
        let mut fetches = self.disks.fetches.iter();
        let found = fetches.find(|(host, fetch)| {
            fetch.t == t && self.index.entries.hot[*host as u32].slot == slot
        });
        let Some((host, fetch)) = found else {
            panic!("slot {slot} is kept for nobody");
        };
        let host = host as u32;
        let entry = &self.index.entries.hot[host];
        assert_eq!((fetch.t, entry.state), (t, EntryState::Filling));
        let found = self.index.find(entry.space, entry.group, &entry.hash);
        assert_eq!(found, Found::Entry(host));
    }
}
