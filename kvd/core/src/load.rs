//! Load and Release: an engine's processes read blocks of host memory. Deliberately absent: waiting for slower tiers (`disk`).

use crate::api::{Failure, LoadReply, LoadState, NIL, Output, Reply};
use crate::index::{BATCH, EntryState};
use crate::state::Core;
use crate::step::{Caller, SlotList};

/// One Load under way.
struct Loading {
    space: u32,
    group: u8,
    class: u16,
    slot_bytes: u64,
    /// Numbers of the namespace's cuts, in the order of the reply's.
    cuts: Vec<u16>,
}

impl Core {
    /// Answers a load with what is in host memory now.
    pub(crate) fn load_now(
        &mut self,
        caller: Caller,
        namespace: u32,
        group: u32,
        hashes: &[[u8; 32]],
    ) -> Result<LoadReply, Failure> {
        self.bounded("hashes", hashes.len())?;
        let space = self.space_of(caller, namespace)?;
        let group = self.group_of(space, group)?;
        let found = &self.spaces.get(space).groups[usize::from(group)];
        let (class, slot_bytes) = (found.class, found.slot_bytes);
        let mut loading = Loading {
            space,
            group,
            class,
            slot_bytes,
            cuts: Vec::new(),
        };
        let mut reply = LoadReply::default();
        reply.states.reserve_exact(hashes.len());
        for batch in hashes.chunks(BATCH) {
            let mut found = [NIL; BATCH];
            self.index.find_batch(space, group, batch, &mut found);
            for id in &found[..batch.len()] {
                let state = self.load_one(caller, &mut loading, *id, &mut reply);
                reply.states.push(state);
                *match state {
                    LoadState::Ready => &mut self.counters.load_hit,
                    LoadState::Absent => &mut self.counters.load_absent,
                    LoadState::Failed => &mut self.counters.load_failed.busy,
                } += 1;
            }
        }
        let stored = &self.spaces.get(space).cuts;
        reply.cuts = loading
            .cuts
            .iter()
            .map(|at| stored[usize::from(*at)].cut.clone())
            .collect();
        Ok(reply)
    }

    fn load_one(
        &mut self,
        caller: Caller,
        loading: &mut Loading,
        id: u32,
        reply: &mut LoadReply,
    ) -> LoadState {
        if id == NIL || self.index.entries.hot[id].state != EntryState::Resident {
            return LoadState::Absent;
        }
        let (slot, crcs) = (
            self.index.entries.hot[id].slot,
            self.index.entries.hot[id].crcs,
        );
        let Some(pool) = &self.tenants[caller.tenant].pool else {
            return LoadState::Absent;
        };
        let (word, offset) = (
            pool.slot(slot).map_or(0, |slot| slot.word),
            pool.offset(slot),
        );
        if !self.lease_read(caller.session, id, slot, word, loading.slot_bytes) {
            return LoadState::Failed;
        }
        self.touch(caller.tenant, loading.class, id, true);
        self.end_ahead(id);
        self.counters.loaded_bytes += loading.slot_bytes;
        let stored = self.index.entries.side[id].cut;
        let cut = loading
            .cuts
            .iter()
            .position(|cut| *cut == stored)
            .unwrap_or_else(|| {
                loading.cuts.push(stored);
                loading.cuts.len() - 1
            });
        let found = &self.spaces.get(loading.space).cuts[usize::from(stored)];
        debug_assert_eq!(found.group, loading.group);
        self.crcs.append_to(found.crcs, crcs, &mut reply.crcs);
        if reply.slots.is_empty() {
            // Each list is made once, however many blocks there are.
            let most = reply.states.capacity();
            reply.slots.reserve_exact(most);
            reply.generations.reserve_exact(most);
            reply.offsets.reserve_exact(most);
            reply.cut.reserve_exact(most);
        }
        reply.slots.push(slot);
        reply.generations.push(word);
        reply.offsets.push(offset);
        reply.cut.push(cut as u32);
        LoadState::Ready
    }

    pub(crate) fn release(
        &mut self,
        caller: Caller,
        list: SlotList<'_>,
        corrupt: &[u32],
        lease: u64,
        out: &mut Vec<Output>,
    ) -> Result<Reply, Failure> {
        self.bounded("positions", corrupt.len())?;
        let mut bad = vec![false; list.len()];
        for at in corrupt {
            let Some(bad) = bad.get_mut(*at as usize) else {
                let text = format!(
                    "corrupt position {at} of {} slots; count from 0",
                    list.len()
                );
                return Err(Failure::invalid(text));
            };
            *bad = true;
        }
        for ((slot, word), bad) in list.iter().zip(bad) {
            let Some((id, serial)) = self.release_read(caller.session, slot, word) else {
                continue;
            };
            if self.index.entries.side[id].serial != serial {
                continue;
            }
            match bad {
                true => self.corrupt(caller.tenant, id, out),
                false => self.sound(caller.tenant, slot),
            }
        }
        if lease != 0 {
            self.release_lookup(caller.session, lease);
        }
        Ok(Reply::Released)
    }
}
