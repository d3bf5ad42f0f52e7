//! Judges what core wants of the stores and what they answer.
//!
//! A block that comes up has exactly the bytes that were committed (invariant 1), unless its engine lies about its own checksums;
//! places and host slots are nobody else's (3); what was answered as stored is found by a restart and nothing else is (4, in
//! `kept`); damage and failure have causes that the simulation knows of (7).

use kvd_core::tier::{BlockKey, HostRange, OpId, Place, Recovered, StoreDone, StoreError, StoreOp};
use kvd_core::{Change, ChangeKind, Cut, Tier};

use crate::checks::ActiveWrite;
use crate::content;
use crate::kept::{Asked, Kept, Known};
use crate::memory::SimSpan;
use crate::model::{Held, Key};
use crate::options::Fault;
use crate::report::{Check, ensure};
use crate::tier::Begun;
use crate::world::World;

/// What a process is called that is none, but a store.
const STORE: usize = usize::MAX;

impl World {
    /// What is said to be in a store must be there.
    pub(crate) fn check_stored(&mut self, changes: &[Change]) -> Check {
        for change in changes.iter().filter(|c| c.tier == Tier::Nvme) {
            let key = Key {
                tenant: change.tenant.0,
                namespace: change.namespace,
                group: change.group,
                hash: change.hash,
            };
            match change.kind {
                ChangeKind::Stored => {
                    self.counters.add("blocks kept");
                    let there = self.kept.has(&key);
                    ensure!(there, 4, "{key:?} was announced, but no store has it");
                }
                ChangeKind::Removed => self.counters.add("blocks not kept"),
            }
        }
        Ok(())
    }

    /// The node has begun something.
    pub(crate) fn begun(&mut self, begun: Begun) -> Check {
        let store = begun.store;
        match begun.op {
            StoreOp::Write {
                op,
                to,
                from,
                ref header,
                ..
            } => {
                self.event("goes down", [op.0, u64::from(to.index), from.offset]);
                let t = &self.model.tenants[usize::from(from.tenant.0)];
                let held = t.residents.values().find(|h| h.offset == from.offset);
                ensure!(held.is_some(), 3, "{from:?} goes down, and is not held");
                let Some(held) = held.cloned() else {
                    return Ok(());
                };
                let kept = Kept::of(&held);
                ensure!(kept.is(&header.key), 1, "{header:?} is not {:?}", held.key);
                let same = header.cut == held.cut || held.suspect;
                ensure!(same, 1, "{header:?} is not cut as {:?}", held.cut);
                self.kept.stores[store].write(to, kept)?;
                let asked = Asked::Write {
                    place: to,
                    tenant: held.key.tenant,
                    slot: held.slot,
                    version: held.version,
                };
                self.asked(store, op, asked)
            }
            StoreOp::Read {
                op,
                from,
                into,
                key,
                ..
            } => {
                let kept = self.kept.stores[store].blocks.get(&from);
                let kept = kept.filter(|kept| kept.is(&key)).cloned();
                let known = kept.as_ref().map(|kept| kept.known);
                ensure!(
                    matches!(known, Some(Known::There | Known::Unsure)),
                    3,
                    "{key:?} is read from {from:?}, where it is {known:?}"
                );
                match (kept, begun.span) {
                    (Some(kept), Some(span)) => {
                        self.begun_read((store, op), from, into, &kept, span)
                    }
                    _ => Ok(()),
                }
            }
            StoreOp::Drop { op, place, key } => {
                self.event("is dropped", [op.0, u64::from(place.index), 0]);
                let reads = self.kept.asked.values().any(|(at, asked)| {
                    matches!(asked, Asked::Read { place: p, .. } if (*at, *p) == (store, place))
                });
                ensure!(!reads, 3, "{place:?} is dropped while it is read");
                let kept = self.kept.stores[store].blocks.get_mut(&place);
                let kept = kept.filter(|kept| kept.is(&key));
                let known = kept.as_ref().map(|kept| kept.known);
                ensure!(
                    matches!(known, Some(Known::There | Known::Unsure)),
                    3,
                    "{key:?} is dropped from {place:?}, where it is {known:?}"
                );
                if let Some(kept) = kept {
                    kept.known = Known::Dropping(kept.known == Known::There);
                }
                self.asked(store, op, Asked::Drop { place })?;
                self.note_drop(op);
                Ok(())
            }
        }
    }

    fn asked(&mut self, store: usize, op: OpId, asked: Asked) -> Check {
        let old = self.kept.asked.insert(op, (store, asked));
        ensure!(old.is_none(), 5, "{op:?} was begun twice");
        Ok(())
    }

    /// A block is going to come up: until then its slot is the store's alone.
    fn begun_read(
        &mut self,
        (store, op): (usize, OpId),
        place: Place,
        into: HostRange,
        kept: &Kept,
        span: SimSpan,
    ) -> Check {
        let t = &mut self.model.tenants[usize::from(into.tenant.0)];
        let Some(mapping) = t.mapping.clone() else {
            return Ok(());
        };
        let (len, size) = (kept.geometry.slot_bytes(), mapping.shape.extent_bytes);
        let extent = (into.offset / size) as u32;
        let slot = extent * mapping.shape.slots_per_extent + (into.offset % size / len) as u32;
        let generation = t.fresh.get(&slot).copied();
        ensure!(
            generation.is_some(),
            3,
            "{into:?} is read into, and its slot {slot} was not taken"
        );
        let generation = generation.unwrap_or(0);
        self.versions += 1;
        let held = Held {
            key: kept.key,
            slot,
            generation,
            offset: into.offset,
            len,
            version: self.versions,
            seed: kept.seed,
            geometry: kept.geometry.clone(),
            cut: kept.cut.clone(),
            suspect: kept.suspect,
            coming: true,
        };
        let version = held.version;
        t.claim(held)?;
        let (memory, offset) = (mapping.memory.serial, into.offset);
        self.no_writers(memory, offset, len, "given to a store")?;
        mapping.memory.poison(offset, len, generation);
        self.next_job += 1;
        let job = self.next_job;
        self.begin_write(ActiveWrite {
            job,
            proc: STORE,
            memory,
            offset,
            len,
            generation,
        })?;
        self.event("comes up", [op.0, u64::from(place.index), u64::from(slot)]);
        let asked = Asked::Read {
            place,
            tenant: kept.key.tenant,
            slot,
            version,
            memory: span.memory,
            offset,
            job,
        };
        self.asked(store, op, asked)
    }

    /// Whether what a write took is what was committed.
    fn taken_sound(&self, tenant: u16, slot: u32, version: u64) -> bool {
        let t = &self.model.tenants[usize::from(tenant)];
        let held = t.residents.get(&slot).filter(|h| h.version == version);
        match (held, &t.mapping) {
            (Some(held), Some(mapping)) => !mapping.memory.tainted(held.offset, held.len),
            _ => false,
        }
    }

    /// A store has answered; the node has not heard of it yet.
    pub(crate) fn store_answered(&mut self, store: usize, done: &StoreDone) -> Check {
        let (op, error) = match done {
            StoreDone::Written { op, result } => (*op, result.err()),
            StoreDone::Read { op, result, .. } => (*op, result.err()),
            StoreDone::Dropped { op, result } => (*op, result.err()),
        };
        let asked = self.kept.asked.remove(&op).map(|(_, asked)| asked);
        ensure!(
            asked.is_some(),
            5,
            "{op:?} was answered twice, or not begun"
        );
        let media = self.tier.media_faults(store) > 0;
        let faults = self.config.faults;
        let may_fail = media || faults.has(Fault::DiskIo) || faults.has(Fault::DiskStall);
        ensure!(
            error != Some(StoreError::Io) || may_fail,
            7,
            "{op:?} failed without a cause"
        );
        self.counters.add(match error {
            None => "store answers",
            Some(StoreError::Off) => "store off",
            Some(StoreError::Io) => "store failures",
            Some(StoreError::Corrupt) => "store corrupt",
            Some(StoreError::Lost) => "store lost",
        });
        match (asked, done) {
            (
                Some(Asked::Write {
                    place,
                    tenant,
                    slot,
                    version,
                }),
                StoreDone::Written { .. },
            ) => {
                let sound = self.taken_sound(tenant, slot, version);
                let blocks = &mut self.kept.stores[store].blocks;
                if error == Some(StoreError::Off) {
                    blocks.remove(&place);
                } else if let Some(kept) = blocks.get_mut(&place) {
                    kept.unsound |= !sound;
                    kept.known = match error {
                        None => Known::There,
                        Some(_) => Known::Unsure,
                    };
                }
            }
            (Some(Asked::Drop { place }), StoreDone::Dropped { .. }) => {
                if let Some(kept) = self.kept.stores[store].blocks.get_mut(&place) {
                    kept.known = match (error, kept.known) {
                        (None, _) => Known::Gone,
                        (Some(StoreError::Off), Known::Dropping(true)) => Known::There,
                        _ => Known::Unsure,
                    };
                }
            }
            (Some(asked @ Asked::Read { .. }), StoreDone::Read { block, result, .. }) => {
                let cut = result.ok().map(|()| &block.cut);
                self.read_answered(store, &asked, cut, error)?;
            }
            _ => ensure!(false, 5, "{op:?} was answered in another way than asked"),
        }
        Ok(())
    }

    fn read_answered(
        &mut self,
        store: usize,
        asked: &Asked,
        cut: Option<&Cut>,
        error: Option<StoreError>,
    ) -> Check {
        let Asked::Read {
            place,
            tenant,
            slot,
            version,
            memory,
            offset,
            job,
        } = asked
        else {
            return Ok(());
        };
        self.end_write(*job);
        let media = self.tier.media_faults(store) > 0;
        let Some(kept) = self.kept.stores[store].blocks.get(place).cloned() else {
            return Ok(());
        };
        if error == Some(StoreError::Corrupt) {
            // Somebody may have written where it came to, before it was checked there.
            let tampered = memory.tainted(*offset, kept.geometry.slot_bytes());
            ensure!(
                media || kept.unsound || kept.suspect || tampered,
                4,
                "{:?} in {place:?} is damaged without a cause",
                kept.key
            );
            return Ok(());
        }
        let Some(cut) = cut else { return Ok(()) };
        let mut found = vec![0; kept.geometry.block_bytes() as usize];
        memory.read(*offset, &mut found);
        let there = self.find_version(store, *place, &kept, &found);
        ensure!(
            there.is_some() || kept.suspect,
            1,
            "{:?} came up from {place:?} with other bytes than were stored",
            kept.key
        );
        let there = there.unwrap_or(kept);
        ensure!(
            *cut == there.cut || there.suspect,
            1,
            "{:?} came up cut as {cut:?}",
            there.key
        );
        let t = &mut self.model.tenants[usize::from(*tenant)];
        if let Some(held) = t.claims.get_mut(slot).filter(|h| h.version == *version) {
            (held.seed, held.cut, held.suspect) = (there.seed, there.cut, there.suspect);
        }
        self.counters.add("blocks fetched");
        Ok(())
    }

    /// Which of the blocks that were written to a place has come up. A disk that loses writes may give an older one of the same key.
    fn find_version(&self, store: usize, place: Place, kept: &Kept, found: &[u8]) -> Option<Kept> {
        let is = |kept: &Kept| content::block(kept.seed, &kept.geometry, &kept.cut) == found;
        if is(kept) {
            return Some(kept.clone());
        }
        let key = BlockKey {
            namespace: kept.key.namespace,
            group: kept.key.group as u8,
            hash: kept.key.hash,
        };
        let media = self.tier.media_faults(store) > 0;
        let old = self.kept.stores[store].history(place, &key);
        old.into_iter().find(|old| media && is(old))
    }

    /// What a start has found is read at once, beside all that the node does: it is what was stored there, or its damage has a cause.
    pub(crate) fn read_back(&mut self, store: usize, block: &Recovered) -> Check {
        let Some(kept) = self.kept.stores[store].blocks.get(&block.place).cloned() else {
            return Ok(());
        };
        let media = self.tier.media_faults(store) > 0;
        let (result, found) = self.tier.read_back(store, block, &kept.geometry);
        match result {
            Ok(cut) => {
                let found = &found[..kept.geometry.block_bytes() as usize];
                let there = self.find_version(store, block.place, &kept, found);
                let there = there.as_ref().map(|kept| &kept.cut);
                ensure!(
                    there == Some(&cut) || kept.suspect,
                    1,
                    "{:?} was found in {:?} with other bytes than were stored",
                    kept.key,
                    block.place
                );
            }
            Err(error) => ensure!(
                error == StoreError::Corrupt && (media || kept.unsound || kept.suspect),
                4,
                "{:?} was found in {:?}, but {error:?}",
                kept.key,
                block.place
            ),
        }
        Ok(())
    }

    /// The daemon is dying: what was under way, and what it took.
    pub(crate) fn forget_asked(&mut self) {
        for (store, asked) in std::mem::take(&mut self.kept.asked).into_values() {
            match asked {
                Asked::Write {
                    place,
                    tenant,
                    slot,
                    version,
                } => {
                    let sound = self.taken_sound(tenant, slot, version);
                    if let Some(kept) = self.kept.stores[store].blocks.get_mut(&place) {
                        kept.unsound |= !sound;
                    }
                }
                Asked::Read { job, .. } => self.end_write(job),
                Asked::Drop { .. } => {}
            }
        }
    }
}
