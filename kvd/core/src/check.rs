//! Every invariant of the state, as asserts over all of it, by counting again what the code keeps count of. For tests and the
//! simulator, after any step. Numbers are those of docs/invariants.md. Deliberately absent: repair.

use std::collections::BTreeMap;

use crate::Role;
use crate::api::NIL;
use crate::evict::listed;
use crate::index::{Entry, EntryState};
use crate::pool::{Extent, ExtentState, NO_CLASS, Pool, SlotState};
use crate::settings::{MAX_WRITERS, OBSERVERS};
use crate::state::Core;
use crate::status::SlotCounts;

impl Core {
    /// Panics unless every invariant of the state holds. For tests and the simulator: it walks everything.
    pub fn check(&self) {
        self.index.check();
        self.log.check();
        for t in 0..self.tenants.len() {
            self.check_pool(t);
        }
        self.check_entries();
        self.check_fills();
        self.check_sessions();
        self.check_leases();
        self.check_spaces();
        self.check_bounds();
        self.check_disks();
    }

    fn entry(&self, id: u32) -> &Entry {
        &self.index.entries.hot[id]
    }

    /// Invariant 2: each slot is in exactly one state, and the sums agree.
    fn check_pool(&self, t: usize) {
        let tenant = &self.tenants[t];
        let Some(pool) = &tenant.pool else { return };
        let mut counts = vec![SlotCounts::default(); pool.classes.len()];
        let mut extents = vec![0; pool.classes.len()];
        let (mut pinned, mut quarantined, mut left) = (0, 0, 0);
        for (id, extent) in (0..).zip(pool.extents.iter()) {
            pool.check_extent(extent);
            if extent.class == NO_CLASS {
                continue;
            }
            let class = &pool.classes[usize::from(extent.class)];
            extents[usize::from(extent.class)] += 1;
            let own = &mut counts[usize::from(extent.class)];
            own.free += u64::from(class.per_extent - extent.fresh);
            let mut held = 0;
            for local in 0..extent.fresh {
                let slot = extent.slots[local as usize];
                *own.of(slot.state) += 1;
                let index = pool.extents.slot(id, local);
                let pins = self.check_owner(t, index, slot.owner, slot.state, slot.word);
                held += u32::from(pins);
                if slot.state == SlotState::Quarantined {
                    match slot.owner {
                        NIL => left += 1,
                        _ => quarantined += class.slot_bytes,
                    }
                }
            }
            assert_eq!(held, extent.pinned, "pinned blocks of an extent");
            pinned += u64::from(held) * class.slot_bytes;
        }
        for (at, class) in pool.classes.iter().enumerate() {
            assert_eq!(class.counts, counts[at], "slots of a class by state");
            assert_eq!(class.extents, extents[at], "extents of a class");
            let total = u64::from(class.extents) * u64::from(class.per_extent);
            assert_eq!(class.counts.total(), total, "a class lost or gained slots");
            self.check_policy(t, at as u16);
        }
        pool.check_lists();
        assert_eq!(tenant.pinned_bytes, pinned, "pinned bytes of a tenant");
        assert_eq!(
            tenant.quarantined_bytes, quarantined,
            "quarantined bytes of a tenant"
        );
        assert_eq!(tenant.left_slots, left, "slots that a store may write");
    }

    /// A slot and who has it name each other. Returns whether its block has pins.
    fn check_owner(&self, t: usize, slot: u32, owner: u32, state: SlotState, word: u64) -> bool {
        assert_eq!(word % 2 == 1, state.writable(), "parity of a generation");
        match state {
            SlotState::Free => false,
            SlotState::Resident => {
                let entry = self.entry(owner);
                assert_eq!((entry.state, entry.slot), (EntryState::Resident, slot));
                assert_eq!(
                    self.spaces.get(entry.space).tenant,
                    t,
                    "a block in a foreign arena"
                );
                entry.pins > 0
            }
            SlotState::Reserved if owner == NIL => {
                self.check_coming(t, slot);
                false
            }
            // A store that is off may write there.
            SlotState::Quarantined if owner == NIL => false,
            SlotState::Reserved | SlotState::Filling | SlotState::Quarantined => {
                let fill = &self.fills[owner];
                assert_eq!(
                    (fill.slot, fill.tenant as usize),
                    (slot, t),
                    "a fill elsewhere"
                );
                assert_ne!(
                    fill.writing, 0,
                    "nobody writes a slot that is kept from others"
                );
                assert_eq!(fill.entry == NIL, state == SlotState::Quarantined);
                let started = fill.writing != self.crews[fill.crew].all();
                assert!(
                    state == SlotState::Quarantined || started == (state == SlotState::Filling)
                );
                if fill.entry != NIL {
                    let entry = self.entry(fill.entry);
                    assert_eq!((entry.state, entry.slot), (EntryState::Filling, slot));
                }
                false
            }
        }
    }

    /// Exactly the visible blocks without children are candidates.
    fn check_policy(&self, t: usize, class: u16) {
        let Some(pool) = &self.tenants[t].pool else {
            return;
        };
        let policy = &pool.classes[usize::from(class)].policy;
        let all = policy.all(&self.index.entries);
        assert_eq!(all.len() as u64, policy.len());
        for id in all {
            let entry = self.entry(id);
            let group = &self.spaces.get(entry.space).groups[usize::from(entry.group)];
            assert_eq!(group.class, class, "a candidate in another class's policy");
            assert!(listed(entry) && entry.state == EntryState::Resident && entry.children == 0);
        }
    }

    fn check_entries(&self) {
        let mut children: BTreeMap<u32, u32> = BTreeMap::new();
        let mut leaves = 0;
        let range = self.index.entries.hot.range();
        for id in range
            .clone()
            .filter(|id| self.entry(*id).state != EntryState::Vacant)
        {
            let entry = self.entry(id);
            if let Some(parent) = self.index.entries.parent(id) {
                *children.entry(parent).or_default() += 1;
            }
            let leaf = entry.state == EntryState::Resident && entry.children == 0;
            assert_eq!(
                listed(entry),
                leaf,
                "a leaf is not a candidate, or a candidate no leaf"
            );
            leaves += u64::from(leaf);
            let tenant = self.spaces.get(entry.space).tenant;
            let pool = self.tenants[tenant].pool.as_ref();
            let slot = pool
                .and_then(|pool| pool.slot(entry.slot))
                .map(|slot| slot.owner);
            let owner = slot.expect("an entry has a slot");
            let named = if entry.state == EntryState::Resident {
                owner
            } else if owner == NIL {
                assert!(self.disks.fetches(id), "nobody fills a slot");
                id
            } else {
                self.fills[owner].entry
            };
            assert_eq!(named, id, "an entry's slot is another's");
        }
        for id in range.filter(|id| self.entry(*id).state != EntryState::Vacant) {
            let counted = children.get(&id).copied().unwrap_or(0);
            assert_eq!(self.entry(id).children, counted, "children of an entry");
        }
        let pools = self
            .tenants
            .iter()
            .filter_map(|tenant| tenant.pool.as_ref());
        let candidates: u64 = pools
            .flat_map(|pool| &pool.classes)
            .map(|c| c.policy.len())
            .sum();
        assert_eq!(candidates, leaves, "candidates for eviction");
        let known = self.index.len() - self.disks.fetching();
        assert_eq!(self.crcs.len(), known, "runs of checksums");
    }

    /// Invariant 3: whoever may write is on record.
    fn check_fills(&self) {
        let mut writing: BTreeMap<u32, u32> = BTreeMap::new();
        let mut fills: BTreeMap<u32, u32> = BTreeMap::new();
        let mut seen = 0;
        for at in self.instance_ids.values() {
            for id in self.instances[*at].claims.all(&self.fills) {
                seen += 1;
                let fill = &self.fills[id];
                let crew = &self.crews[fill.crew];
                assert_eq!(crew.instance, *at, "a claim of another instance");
                *fills.entry(fill.crew).or_default() += 1;
                for part in (0..128).filter(|part| fill.writing & (1 << part) != 0) {
                    *writing.entry(crew.writer(part, fill.low)).or_default() += 1;
                }
            }
        }
        assert_eq!(seen, self.fills.len(), "a fill of no instance");
        let open = self.deadlines.all(&self.fills);
        assert!(open.iter().all(|id| self.fills[*id].entry != NIL));
        let given_up = self.tenants.iter().filter_map(|t| t.pool.as_ref());
        let given_up: u64 = given_up
            .flat_map(|p| &p.classes)
            .map(|c| c.counts.quarantined)
            .sum();
        let left: u64 = self.tenants.iter().map(|tenant| tenant.left_slots).sum();
        assert_eq!(
            open.len() as u64 + given_up - left,
            seen as u64,
            "fills with and without a deadline"
        );
        let deadlines: Vec<u64> = open.iter().map(|id| self.fills[*id].deadline).collect();
        assert!(deadlines.is_sorted(), "deadlines out of order");
        for (session, count) in writing {
            assert_eq!(
                self.sessions[session].writing, count,
                "copy records of a session"
            );
        }
        for (crew, count) in fills {
            assert_eq!(self.crews[crew].fills, count, "fills of a crew");
        }
    }

    fn check_sessions(&self) {
        assert_eq!(self.tokens.len(), self.sessions.len());
        let mut counts = vec![(0, 0, 0); self.tenants.len()];
        let mut current = 0;
        for (token, at) in &self.tokens {
            let session = &self.sessions[*at];
            assert_eq!(session.token, *token);
            assert!(self.instances[session.instance].sessions.contains(at));
            let kept = session.attached || self.lingers(*at);
            assert!(kept, "a detached session without a reason to stay");
            let looks = session.role == Role::Observer;
            counts[session.tenant].0 += u32::from(!looks);
            counts[session.tenant].1 += u32::from(looks);
            counts[session.tenant].2 += session.joined.len() as u32;
        }
        for (tenant, counts) in self.tenants.iter().zip(counts) {
            let own = (tenant.sessions, tenant.observers, tenant.joined);
            assert_eq!(own, counts);
        }
        assert_eq!(self.instance_ids.len(), self.instances.len());
        for ((tenant, id), at) in &self.instance_ids {
            let instance = &self.instances[*at];
            assert_eq!((instance.tenant, instance.id), (*tenant, *id));
            assert!(
                !instance.sessions.is_empty(),
                "an instance without sessions"
            );
            for team in instance.teams.iter().filter(|team| team.crew != NIL) {
                let crew = &self.crews[team.crew];
                current += 1;
                assert!(!crew.retired && crew.instance == *at);
            }
        }
        let all = self.crews.range().map(|at| &self.crews[at]);
        let retired = all
            .filter(|crew| crew.retired)
            .inspect(|crew| assert!(crew.fills > 0));
        assert_eq!(
            current + retired.count(),
            self.crews.len(),
            "a crew of nobody"
        );
    }

    fn check_leases(&self) {
        let mut pins: BTreeMap<u32, u32> = BTreeMap::new();
        let mut held: BTreeMap<u32, (u32, u32)> = BTreeMap::new();
        for id in self.reads.all() {
            let lease = &self.reads.leases[id];
            assert!(lease.count > 0);
            held.entry(lease.session).or_default().0 += 1;
            if lease.pinned && self.index.entries.side[lease.entry].serial == lease.serial {
                *pins.entry(lease.entry).or_default() += 1;
            }
        }
        let mut blocks = 0;
        for lease in self.lookups.by_token.values() {
            held.entry(lease.session).or_default().1 += 1;
            blocks += lease.blocks.len();
            for (entry, serial) in &lease.blocks {
                if self.index.entries.side[*entry].serial == *serial {
                    *pins.entry(*entry).or_default() += 1;
                }
            }
        }
        assert_eq!(blocks, self.lookups.blocks, "blocks in lookup leases");
        for at in self.tokens.values() {
            let session = &self.sessions[*at];
            let counted = held.remove(at).unwrap_or_default();
            assert_eq!(
                (session.reads, session.lookups),
                counted,
                "leases of a session"
            );
        }
        assert!(held.is_empty(), "leases of nobody");
        self.tier_pins(&mut pins);
        for id in self.index.entries.hot.range() {
            let counted = pins.get(&id).copied().unwrap_or(0);
            assert_eq!(self.entry(id).pins, counted, "pins of a block");
        }
    }

    fn check_spaces(&self) {
        let mut blocks: BTreeMap<u32, u64> = BTreeMap::new();
        for id in self.index.entries.hot.range() {
            let entry = self.entry(id);
            if entry.state == EntryState::Resident {
                *blocks.entry(entry.space).or_default() += 1;
            }
        }
        assert_eq!(self.spaces.by_id.len(), self.spaces.by_number.len());
        let mut per_tenant = vec![0; self.tenants.len()];
        for (number, space) in &self.spaces.by_number {
            assert_eq!(self.spaces.find(space.tenant, space.id), Some(*number));
            assert_eq!(space.blocks, blocks.get(number).copied().unwrap_or(0));
            let joins = |at: &u32| self.sessions[*at].joined.iter().any(|j| j.space == *number);
            let sessions = self.tokens.values().filter(|at| joins(at)).count();
            assert_eq!(space.sessions as usize, sessions, "sessions of a namespace");
            assert!(
                space.sessions > 0 || space.blocks > 0 || space.coming > 0,
                "a namespace of nobody and nothing"
            );
            per_tenant[space.tenant] += 1;
        }
        for (tenant, count) in self.tenants.iter().zip(per_tenant) {
            assert_eq!(tenant.namespaces, count, "namespaces of a tenant");
        }
    }

    /// Invariant 8: nothing grows beyond its limit.
    fn check_bounds(&self) {
        let most = &self.settings;
        let all: u32 = self.tenants.iter().map(|tenant| tenant.sessions).sum();
        assert!(all <= most.max_sessions);
        assert!(self.index.len() <= most.max_entries as usize);
        assert!(self.reads.len() <= most.max_read_leases_total as usize);
        assert!(self.lookups.blocks <= most.max_lookup_blocks as usize);
        assert!(self.idle.is_empty() && self.disks.short_of_room.is_empty());
        for tenant in &self.tenants {
            assert!(tenant.sessions <= tenant.limits.sessions && tenant.observers <= OBSERVERS);
            assert!(tenant.namespaces <= tenant.limits.namespaces);
            assert!(tenant.table.len() <= MAX_WRITERS);
        }
        for at in self.tokens.values() {
            let session = &self.sessions[*at];
            assert!(session.joined.len() <= most.max_session_namespaces as usize);
            assert!(session.reads <= most.max_read_leases);
            assert!(session.lookups <= most.max_lookup_leases);
        }
        for at in self.instance_ids.values() {
            assert!(self.instances[*at].claims.len() <= most.max_claims);
        }
    }
}

impl Pool {
    fn check_extent(&self, extent: &Extent) {
        assert!(
            !(extent.held && extent.class != NO_CLASS),
            "a held extent is in use"
        );
        assert!(extent.class == NO_CLASS || extent.state == ExtentState::Ready);
        assert!(
            !extent.suspect || extent.used > 0,
            "an empty extent waits to be refilled"
        );
        if extent.class == NO_CLASS {
            assert_eq!(extent.used, 0);
            return;
        }
        let live = &extent.slots[..extent.fresh as usize];
        let used = live
            .iter()
            .filter(|slot| slot.state != SlotState::Free)
            .count();
        let writing = live.iter().filter(|slot| slot.state.writable()).count();
        assert_eq!(
            (extent.used as usize, extent.writing as usize),
            (used, writing)
        );
        let rest = &extent.slots[extent.fresh as usize..];
        assert!(
            rest.iter().all(|slot| slot.state == SlotState::Free),
            "a slot beyond the used ones"
        );
        let (mut free, mut at) = (0, extent.free);
        while at != NIL {
            assert!(free <= live.len(), "the free list runs in a circle");
            assert_eq!(live[at as usize].state, SlotState::Free);
            free += 1;
            at = live[at as usize].owner;
        }
        assert_eq!(free + used, live.len(), "a slot is lost");
    }
}
