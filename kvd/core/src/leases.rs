//! Leases: claims by readers, which keep blocks from being evicted for a while.
//!
//! They are a courtesy, not a safety: a reader re-checks generation and checksum after its copy, so a lease may run out by the
//! clock, and above the cap on pinned bytes a load is served without a pin. Read leases are by (session, slot); lookup leases
//! by token. Deliberately absent: leases over the network.

use std::collections::{BTreeMap, BTreeSet};

use crate::list::{Link, Linked, List};
use crate::slab::Slab;
use crate::state::Core;
use crate::table::Table;

/// One session's claim on one slot's present content.
#[derive(Debug, Default)]
pub(crate) struct ReadLease {
    pub(crate) session: u32,
    pub(crate) slot: u32,
    pub(crate) word: u64,
    pub(crate) entry: u32,
    /// The entry's serial: another one means that the block is gone.
    pub(crate) serial: u32,
    /// Loads that have not been released; 0 marks a vacant place.
    pub(crate) count: u32,
    pub(crate) pinned: bool,
    pub(crate) expires: u64,
    link: Link,
}

/// Read leases, the first to run out in front.
#[derive(Debug)]
pub(crate) struct ByExpiry;

impl Linked<ByExpiry> for ReadLease {
    fn link(&self) -> &Link {
        &self.link
    }
    fn link_mut(&mut self) -> &mut Link {
        &mut self.link
    }
}

/// All read leases.
pub(crate) struct Reads {
    table: Table,
    pub(crate) leases: Slab<ReadLease, 256>,
    order: List<ByExpiry>,
}

fn tag(session: u32, slot: u32) -> u32 {
    let name = (u64::from(session) << 32) | u64::from(slot);
    (name.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32) as u32
}

impl Reads {
    pub(crate) fn new() -> Self {
        Reads {
            table: Table::default(),
            leases: Slab::new(),
            order: List::new(),
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.leases.len()
    }

    pub(crate) fn next_expiry(&self) -> Option<u64> {
        self.order.front().map(|id| self.leases[id].expires)
    }

    fn find(&self, session: u32, slot: u32) -> Option<u32> {
        self.table.find(tag(session, slot), |id| {
            let lease = &self.leases[id];
            (lease.session, lease.slot) == (session, slot)
        })
    }

    fn insert(&mut self, lease: ReadLease) {
        let tag = tag(lease.session, lease.slot);
        let id = self.leases.insert(lease);
        self.table.insert(tag, id);
        self.order.push_back(&mut self.leases, id);
    }

    fn remove(&mut self, id: u32) -> ReadLease {
        self.order.remove(&mut self.leases, id);
        let lease = self.leases.remove(id);
        let held = self.table.remove(tag(lease.session, lease.slot), id);
        debug_assert!(held, "a read lease is missing from its table");
        lease
    }

    pub(crate) fn all(&self) -> Vec<u32> {
        assert_eq!(
            self.table.len(),
            self.leases.len(),
            "read leases and their table differ"
        );
        self.order.all(&self.leases)
    }
}

/// What a lookup found, kept for its asker.
#[derive(Debug)]
pub(crate) struct LookupLease {
    pub(crate) session: u32,
    /// Entries and their serials.
    pub(crate) blocks: Vec<(u32, u32)>,
    pub(crate) expires: u64,
}

/// All lookup leases, by token.
#[derive(Debug, Default)]
pub(crate) struct LookupLeases {
    pub(crate) by_token: BTreeMap<u64, LookupLease>,
    order: BTreeSet<(u64, u64)>,
    last: u64,
    /// Blocks in all of them.
    pub(crate) blocks: usize,
}

impl LookupLeases {
    pub(crate) fn next_expiry(&self) -> Option<u64> {
        self.order.first().map(|(expires, _)| *expires)
    }

    fn insert(&mut self, lease: LookupLease) -> u64 {
        self.last += 1;
        self.blocks += lease.blocks.len();
        self.order.insert((lease.expires, self.last));
        self.by_token.insert(self.last, lease);
        self.last
    }

    fn remove(&mut self, token: u64) -> Option<LookupLease> {
        let lease = self.by_token.remove(&token)?;
        self.blocks -= lease.blocks.len();
        self.order.remove(&(lease.expires, token));
        Some(lease)
    }
}

impl Core {
    /// Leases a block's slot to a session; false when it has too many leases. `bytes`: of the slot.
    pub(crate) fn lease_read(
        &mut self,
        session: u32,
        entry: u32,
        slot: u32,
        word: u64,
        bytes: u64,
    ) -> bool {
        let t = self.sessions[session].tenant;
        let serial = self.index.entries.side[entry].serial;
        let expires = self.now.saturating_add(self.settings.lease_us);
        let mut count = 1u32;
        if let Some(id) = self.reads.find(session, slot) {
            let old = &self.reads.leases[id];
            if (old.word, old.serial) == (word, serial) {
                count = old.count.saturating_add(1);
            }
            self.end_read(id);
        }
        let most = self.settings.max_read_leases;
        if self.sessions[session].reads >= most
            || self.reads.len() >= self.settings.max_read_leases_total as usize
        {
            return false;
        }
        let pins = self.index.entries.hot[entry].pins;
        let pinned = pins > 0 || self.may_pin(t, bytes);
        if pinned {
            self.pin(t, entry);
        }
        self.sessions[session].reads += 1;
        let link = Link::default();
        self.reads.insert(ReadLease {
            session,
            slot,
            word,
            entry,
            serial,
            count,
            pinned,
            expires,
            link,
        });
        true
    }

    /// Ends a read lease, whatever its count.
    fn end_read(&mut self, id: u32) {
        let lease = self.reads.remove(id);
        self.sessions[lease.session].reads -= 1;
        let t = self.sessions[lease.session].tenant;
        if lease.pinned {
            self.unpin(t, lease.entry, lease.serial);
        }
    }

    /// Takes back one load of a slot. Returns the block that was loaded and its serial, if the session had it leased.
    pub(crate) fn release_read(
        &mut self,
        session: u32,
        slot: u32,
        word: u64,
    ) -> Option<(u32, u32)> {
        let id = self.reads.find(session, slot)?;
        let lease = &mut self.reads.leases[id];
        if lease.word != word {
            return None;
        }
        let block = (lease.entry, lease.serial);
        lease.count -= 1;
        if lease.count == 0 {
            self.end_read(id);
        }
        Some(block)
    }

    /// Leases what a lookup found; 0 when a cap is reached. `bytes`: of all the slots together.
    pub(crate) fn lease_lookup(
        &mut self,
        session: u32,
        found: &[u32],
        lease_ms: u32,
        bytes: u64,
    ) -> u64 {
        let t = self.sessions[session].tenant;
        let room = self.lookups.blocks + found.len() <= self.settings.max_lookup_blocks as usize;
        let few = self.sessions[session].lookups < self.settings.max_lookup_leases;
        if !room || !few || !self.may_pin(t, bytes) {
            self.counters.leases_denied += 1;
            return 0;
        }
        let ms = lease_ms.min(self.settings.max_lookup_lease_ms);
        let expires = self.now.saturating_add(u64::from(ms) * 1000);
        let mut blocks = Vec::with_capacity(found.len());
        for entry in found {
            self.pin(t, *entry);
            blocks.push((*entry, self.index.entries.side[*entry].serial));
        }
        self.sessions[session].lookups += 1;
        self.lookups.insert(LookupLease {
            session,
            blocks,
            expires,
        })
    }

    fn end_lookup(&mut self, token: u64) {
        let Some(lease) = self.lookups.remove(token) else {
            return;
        };
        let t = self.sessions[lease.session].tenant;
        self.sessions[lease.session].lookups -= 1;
        for (entry, serial) in lease.blocks {
            self.unpin(t, entry, serial);
        }
    }

    /// Ends a lookup lease if it is this session's.
    pub(crate) fn release_lookup(&mut self, session: u32, token: u64) {
        let own = |lease: &LookupLease| lease.session == session;
        if self.lookups.by_token.get(&token).is_some_and(own) {
            self.end_lookup(token);
        }
    }

    pub(crate) fn end_reads_of(&mut self, session: u32) {
        if self.sessions[session].reads > 0 {
            for id in self.reads.all() {
                if self.reads.leases[id].session == session {
                    self.end_read(id);
                }
            }
        }
    }

    pub(crate) fn end_lookups_of(&mut self, session: u32) {
        if self.sessions[session].lookups > 0 {
            let all = self.lookups.by_token.iter();
            let own: Vec<u64> = all
                .filter(|(_, lease)| lease.session == session)
                .map(|(t, _)| *t)
                .collect();
            own.into_iter().for_each(|token| self.end_lookup(token));
        }
    }

    pub(crate) fn reads_due(&mut self, most: usize) {
        for _ in 0..most {
            let Some(id) = self.reads.order.front() else {
                return;
            };
            if self.reads.leases[id].expires > self.now {
                return;
            }
            let session = self.reads.leases[id].session;
            self.end_read(id);
            self.counters.leases_expired += 1;
            self.relieved(session);
        }
    }

    pub(crate) fn lookups_due(&mut self, most: usize) {
        for _ in 0..most {
            let Some((expires, token)) = self.lookups.order.first().copied() else {
                return;
            };
            if expires > self.now {
                return;
            }
            let session = self.lookups.by_token.get(&token).map(|lease| lease.session);
            self.end_lookup(token);
            if let Some(session) = session {
                self.relieved(session);
            }
        }
    }
}
