//! What should be true, kept apart from the node: which blocks are held where with which bytes, which slots are being filled.
//! Built only from what leaves the node (words, the change log, replies), never from its insides.
//!
//! Checks invariants 2, 3 and 6 as far as they are about slots and announcements. Replies are judged in `replies`.

use std::collections::{BTreeMap, BTreeSet};

use kvd_core::{BlockHash, Change, ChangeKind, Cut, GroupGeometry, NamespaceId, Tier};

use crate::memory::{Event, Mapping};
use crate::report::{Check, ensure};

/// A block's full name; the tenant is part of it, whatever the record says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Key {
    pub(crate) tenant: u16,
    pub(crate) namespace: NamespaceId,
    pub(crate) group: u32,
    pub(crate) hash: BlockHash,
}

/// A slot with an owner: reserved (odd generation) or resident (even generation).
#[derive(Clone, Debug)]
pub(crate) struct Held {
    pub(crate) key: Key,
    pub(crate) slot: u32,
    pub(crate) generation: u64,
    pub(crate) offset: u64,
    /// Bytes of the slot.
    pub(crate) len: u64,
    /// Reservations are numbered as they are given.
    pub(crate) version: u64,
    /// From which its bytes follow; no two reservations have the same.
    pub(crate) seed: u64,
    pub(crate) geometry: GroupGeometry,
    /// How its engine cuts it.
    pub(crate) cut: Cut,
    /// Its engine may have lied about it.
    pub(crate) suspect: bool,
    /// It is not stored by an engine, it comes up from a store.
    pub(crate) coming: bool,
}

/// One tenant's slots under the daemon that runs now.
#[derive(Default)]
pub(crate) struct Tenant {
    pub(crate) mapping: Option<Mapping>,
    pub(crate) claims: BTreeMap<u32, Held>,
    pub(crate) residents: BTreeMap<u32, Held>,
    pub(crate) by_key: BTreeMap<Key, u32>,
    /// Blocks that stores are said to hold.
    pub(crate) stored: BTreeSet<Key>,
    /// When a block was last removed from host memory.
    pub(crate) removed: BTreeMap<Key, u64>,
    /// Words that went odd and that no reply has named yet.
    pub(crate) fresh: BTreeMap<u32, u64>,
    /// Where in the change log its reader is.
    pub(crate) cursor: u64,
    ranges: BTreeMap<u64, (u64, u32)>,
}

impl Tenant {
    /// Whether some reservation of this block is open.
    pub(crate) fn filling(&self, key: &Key) -> bool {
        self.claims.values().any(|held| held.key == *key)
    }

    /// Whether it is an engine that fills it.
    pub(crate) fn being_stored(&self, key: &Key) -> bool {
        self.claims.values().any(|h| h.key == *key && !h.coming)
    }

    /// Whether it is on its way from a store.
    pub(crate) fn coming(&self, key: &Key) -> bool {
        self.claims.values().any(|h| h.key == *key && h.coming)
    }

    fn release(&mut self, held: &Held) {
        self.ranges.remove(&held.offset);
    }

    /// A new reservation. Its bytes must be nobody else's.
    pub(crate) fn claim(&mut self, held: Held) -> Check {
        let end = held.offset + held.len;
        let before = self.ranges.range(..end).next_back();
        let free = before.is_none_or(|(from, (len, _))| from + len <= held.offset);
        ensure!(
            free,
            3,
            "slot {} at {:#x} lies over {before:x?}",
            held.slot,
            held.offset
        );
        ensure!(
            self.fresh.remove(&held.slot) == Some(held.generation),
            3,
            "slot {} was given with generation {}, but its word did not go there",
            held.slot,
            held.generation
        );
        self.ranges.insert(held.offset, (held.len, held.slot));
        self.claims.insert(held.slot, held);
        Ok(())
    }
}

/// All tenants.
pub(crate) struct Model {
    pub(crate) tenants: Vec<Tenant>,
    /// Calls of the node that were taken in.
    pub(crate) calls: u64,
}

/// What one call of the node did to slots, for those who must act on it.
#[derive(Default)]
pub(crate) struct Settled {
    /// Blocks that became visible.
    pub(crate) visible: Vec<Held>,
    /// Slots that are empty now, from which word on: they are to be poisoned.
    pub(crate) emptied: Vec<(Held, u64)>,
}

impl Model {
    pub(crate) fn new(tenants: usize) -> Self {
        Model {
            tenants: (0..tenants).map(|_| Tenant::default()).collect(),
            calls: 0,
        }
    }

    /// The daemon is dead; what it held is not held any more.
    pub(crate) fn daemon_died(&mut self) {
        self.tenants.iter_mut().for_each(|t| *t = Tenant::default());
    }

    /// Another arena.
    pub(crate) fn arena(&mut self, tenant: u16, mapping: Option<Mapping>) -> Check {
        let t = &mut self.tenants[usize::from(tenant)];
        ensure!(
            t.claims.is_empty() && t.residents.is_empty(),
            3,
            "an arena in use was replaced"
        );
        t.mapping = mapping;
        Ok(())
    }

    /// Takes in what one call of the node did: words in order, then the change log.
    pub(crate) fn apply(&mut self, events: &[Event], changes: &[Change]) -> Check<Settled> {
        let mut done = Settled::default();
        self.calls += 1;
        // Claims whose word went even, and residents whose word moved on, in this call.
        let (mut ended, mut dropped) = (Vec::new(), Vec::new());
        for event in events {
            if let Event::Word {
                tenant,
                slot,
                old,
                new,
            } = *event
            {
                self.word(tenant, slot, old, new, &mut ended, &mut dropped)?;
            }
        }
        for change in changes {
            self.change(change, &mut ended, &mut dropped, &mut done)?;
        }
        ensure!(
            dropped.is_empty(),
            6,
            "{:?} was dropped and not announced",
            dropped[0].0.key
        );
        for (held, word) in ended {
            self.tenants[usize::from(held.key.tenant)].release(&held);
            done.emptied.push((held, word));
        }
        Ok(done)
    }

    fn word(
        &mut self,
        tenant: u16,
        slot: u32,
        old: u64,
        new: u64,
        ended: &mut Vec<(Held, u64)>,
        dropped: &mut Vec<(Held, u64)>,
    ) -> Check {
        let t = &mut self.tenants[usize::from(tenant)];
        ensure!(
            new > old,
            3,
            "the word of slot {slot} went from {old} to {new}"
        );
        match (old % 2, new % 2) {
            (0, 1) => {
                ensure!(
                    !t.residents.contains_key(&slot),
                    3,
                    "slot {slot} was given away while a block is in it"
                );
                // A block that was stored in this very call and dropped again would be announced; keep what is known of it.
                ensure!(
                    t.fresh.insert(slot, new).is_none(),
                    3,
                    "slot {slot} was given away twice"
                );
            }
            (1, 0) => {
                // Slots that a former daemon left odd have no claim here.
                t.fresh.remove(&slot);
                if let Some(held) = t.claims.remove(&slot) {
                    ensure!(
                        held.generation == old,
                        3,
                        "slot {slot} ended in generation {old}, not {}",
                        held.generation
                    );
                    ended.push((held, new));
                }
            }
            (0, 0) => match t.residents.remove(&slot) {
                Some(held) => dropped.push((held, new)),
                None => {
                    if let Some(at) = ended
                        .iter()
                        .position(|(h, _)| h.slot == slot && h.key.tenant == tenant)
                    {
                        dropped.push(ended.remove(at));
                    }
                }
            },
            // An adopted table's words move on while nobody has a claim.
            _ => ensure!(
                !t.claims.contains_key(&slot),
                3,
                "the word of slot {slot} went from {old} to {new}: odd to odd"
            ),
        }
        Ok(())
    }

    fn change(
        &mut self,
        change: &Change,
        ended: &mut Vec<(Held, u64)>,
        dropped: &mut Vec<(Held, u64)>,
        done: &mut Settled,
    ) -> Check {
        let key = Key {
            tenant: change.tenant.0,
            namespace: change.namespace,
            group: change.group,
            hash: change.hash,
        };
        let calls = self.calls;
        let t = &mut self.tenants[usize::from(key.tenant)];
        if change.tier == Tier::Nvme {
            let (new, what) = match change.kind {
                ChangeKind::Stored => (t.stored.insert(key), "stored"),
                ChangeKind::Removed => (t.stored.remove(&key), "removed"),
            };
            ensure!(new, 6, "{key:?} was announced as {what} twice in a store");
            return Ok(());
        }
        match change.kind {
            ChangeKind::Stored => {
                ensure!(
                    !t.by_key.contains_key(&key),
                    6,
                    "{key:?} was announced twice"
                );
                if let Some((held, _)) = dropped.iter().find(|(h, _)| h.key == key) {
                    // Stored and dropped in one call.
                    t.by_key.insert(key, held.slot);
                    return Ok(());
                }
                // An older reservation of the same block, long given up, may have lost its last writer in this very call.
                let same = ended.iter().enumerate().filter(|(_, (h, _))| h.key == key);
                let at = same.max_by_key(|(_, (h, _))| h.version).map(|(at, _)| at);
                ensure!(
                    at.is_some(),
                    6,
                    "{key:?} was announced, but no slot became readable for it"
                );
                if let Some(at) = at {
                    let (mut held, word) = ended.remove(at);
                    held.generation = word;
                    t.by_key.insert(key, held.slot);
                    t.residents.insert(held.slot, held.clone());
                    done.visible.push(held);
                }
            }
            ChangeKind::Removed => {
                ensure!(
                    t.by_key.remove(&key).is_some(),
                    6,
                    "the removal of {key:?} was announced, but it was not held"
                );
                t.removed.insert(key, calls);
                let at = dropped.iter().position(|(h, _)| h.key == key);
                ensure!(
                    at.is_some(),
                    3,
                    "{key:?} was removed, but the word of its slot did not move on"
                );
                if let Some(at) = at {
                    let (held, word) = dropped.remove(at);
                    t.release(&held);
                    done.visible
                        .retain(|v| v.slot != held.slot || v.key.tenant != held.key.tenant);
                    done.emptied.push((held, word));
                }
            }
        }
        Ok(())
    }
}
