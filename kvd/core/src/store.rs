//! Reserve, Commit, Abort: an engine instance stores blocks. Deliberately absent: copying; the instance's processes do that.

use crate::api::{
    Chain, CommitState, ErrorKind, Failure, NIL, Output, Reply, ReserveReply, ReserveState,
};
use crate::evict::chain;
use crate::fills::GivenUp;
use crate::ids::{Role, low64};
use crate::index::{BATCH, Entry, EntryState, Found};
use crate::state::Core;
use crate::step::{Caller, SlotList};

/// Whose part of which group a commit is about.
#[derive(Clone, Copy)]
pub(crate) struct Writer {
    pub(crate) session: u32,
    pub(crate) part: u32,
    /// Where its checksums begin in the block's list.
    pub(crate) crc_base: u32,
}

/// One chain of a Reserve under way.
struct Storing {
    tenant: usize,
    instance: u32,
    space: u32,
    group: u8,
    class: u16,
    crew: u32,
    cut: u16,
    crcs: u32,
    /// The block before the present one, if it is here.
    parent: u32,
    /// Nothing more fits: the rest answers NO_SPACE.
    full: bool,
    /// That is so because no slot of this class can be had.
    no_slot: bool,
    /// Another class's extents may be colder than this class's blocks.
    others: bool,
    /// Blocks of this group are worth something without those before them: they are linked to none.
    alone: bool,
}

impl Core {
    pub(crate) fn reserve(
        &mut self,
        caller: Caller,
        namespace: u32,
        chains: &[Chain<'_>],
        out: &mut Vec<Output>,
    ) -> Result<Reply, Failure> {
        let hashes = self.bounded_chains(chains)?;
        let space = self.space_of(caller, namespace)?;
        let each = chains
            .iter()
            .map(|chain| self.storing(caller, space, chain.group));
        let mut each = each.collect::<Result<Vec<_>, _>>()?;
        // First all that is here is touched, so that nothing of these chains is evicted to make room for the rest of them.
        let mut known = Vec::with_capacity(hashes);
        for (storing, chain) in each.iter_mut().zip(chains) {
            storing.parent = self.parent(storing, chain);
            if storing.parent != NIL {
                self.touch(caller.tenant, storing.class, storing.parent, false);
            }
            self.find_and_touch(storing, chain.hashes, &mut known);
        }
        let mut reply = ReserveReply::default();
        reply.states.reserve_exact(known.len());
        let mut known = known.into_iter();
        let mut no_slots = Vec::new();
        for (mut storing, chain) in each.into_iter().zip(chains) {
            // It may be in a chain before this one.
            if storing.parent == NIL {
                storing.parent = self.parent(&storing, chain);
            }
            storing.full = no_slots.contains(&storing.class);
            for (hash, known) in chain.hashes.iter().zip(known.by_ref()) {
                let state = self.reserve_one(&mut storing, hash, known, &mut reply, out);
                reply.states.push(state);
                let counters = &mut self.counters;
                *match state {
                    ReserveState::Reserved => &mut counters.reserved,
                    ReserveState::Present => &mut counters.present,
                    ReserveState::Filling => &mut counters.filling,
                    ReserveState::NoSpace => &mut counters.store_failed.no_space,
                } += 1;
            }
            if storing.no_slot {
                no_slots.push(storing.class);
            }
        }
        Ok(Reply::Reserve(reply))
    }

    /// The block before a chain's first, if it is here and they are linked; else [`NIL`].
    fn parent(&self, storing: &Storing, chain: &Chain<'_>) -> u32 {
        match &chain.parent {
            Some(parent) if !storing.alone => {
                match self.index.find(storing.space, storing.group, &parent.0) {
                    Found::Entry(id) => id,
                    _ => NIL,
                }
            }
            _ => NIL,
        }
    }

    fn storing(&mut self, caller: Caller, space: u32, group: u32) -> Result<Storing, Failure> {
        let group = self.group_of(space, group)?;
        let crew = self.crew(caller.instance, space, group)?;
        let class = self.spaces.get(space).groups[usize::from(group)].class;
        Ok(Storing {
            tenant: caller.tenant,
            instance: caller.instance,
            space,
            group,
            class,
            crew,
            cut: self.crews[crew].cut,
            crcs: self.crews[crew].crcs,
            parent: NIL,
            full: false,
            no_slot: false,
            others: true,
            alone: self.spaces.get(space).record.rules()[usize::from(group)].stands_alone(),
        })
    }

    fn find_and_touch(&mut self, storing: &Storing, hashes: &[[u8; 32]], all: &mut Vec<u32>) {
        for batch in hashes.chunks(BATCH) {
            let mut found = [NIL; BATCH];
            self.index
                .find_batch(storing.space, storing.group, batch, &mut found);
            for id in &found[..batch.len()] {
                if *id != NIL {
                    self.touch(storing.tenant, storing.class, *id, true);
                }
                all.push(*id);
            }
        }
    }

    fn reserve_one(
        &mut self,
        storing: &mut Storing,
        hash: &[u8; 32],
        known: u32,
        reply: &mut ReserveReply,
        out: &mut Vec<Output>,
    ) -> ReserveState {
        let found = match known {
            NIL => self.index.find(storing.space, storing.group, hash),
            id => Found::Entry(id),
        };
        if let Found::Entry(id) = found {
            if !storing.alone {
                storing.parent = id;
            }
            return match self.index.entries.hot[id].state {
                EntryState::Resident => ReserveState::Present,
                EntryState::Filling | EntryState::Vacant => ReserveState::Filling,
            };
        }
        if !storing.full && found == Found::Absent {
            let slot = self.slot_for(storing, out);
            storing.no_slot = slot.is_none();
            if let Some(slot) = slot
                && let Some((word, offset)) = self.begin_block(storing, hash, slot, out)
            {
                reply.slots.push(slot);
                reply.generations.push(word);
                reply.offsets.push(offset);
                return ReserveState::Reserved;
            }
        }
        storing.full = true;
        ReserveState::NoSpace
    }

    /// A slot for one more block, if limits allow and room can be made.
    fn slot_for(&mut self, storing: &mut Storing, out: &mut Vec<Output>) -> Option<u32> {
        let Storing {
            tenant: t,
            class,
            instance,
            ..
        } = *storing;
        let tenant = &self.tenants[t];
        if tenant.quarantined_bytes > tenant.quarantine_limit()
            || self.instances[instance].claims.len() >= self.settings.max_claims
        {
            return None;
        }
        while self.index.len() >= self.settings.max_entries as usize {
            if !self.make_room(t, class, &mut storing.others, out) {
                return None;
            }
        }
        self.room_for(t, class, &mut storing.others, out)
    }

    /// A slot of this class, evicting if need be.
    pub(crate) fn room_for(
        &mut self,
        t: usize,
        class: u16,
        others: &mut bool,
        out: &mut Vec<Output>,
    ) -> Option<u32> {
        loop {
            if let Some(slot) = self.tenants[t].pool.as_mut()?.take(class, NIL, out) {
                self.wants_room(t, class);
                return Some(slot);
            }
            if !self.make_room(t, class, others, out) {
                return None;
            }
        }
    }

    /// Enters a block that is going to be filled. Returns its generation and where its slot begins.
    fn begin_block(
        &mut self,
        storing: &mut Storing,
        hash: &[u8; 32],
        slot: u32,
        out: &mut Vec<Output>,
    ) -> Option<(u64, u64)> {
        let Some(crcs) = self.crcs.insert(storing.crcs) else {
            self.tenants[storing.tenant]
                .pool
                .as_mut()?
                .release(slot, out);
            return None;
        };
        let entry = Entry {
            hash: *hash,
            space: storing.space,
            slot,
            parent: NIL,
            stamp: self.stamp,
            crcs,
            group: storing.group,
            state: EntryState::Filling,
            ..Entry::default()
        };
        let id = self.index.insert(entry, storing.cut);
        let fill = self.begin_fill(storing.tenant, storing.crew, slot, id, low64(hash));
        let pool = self.tenants[storing.tenant].pool.as_mut()?;
        if storing.parent != NIL {
            let policy = &mut *pool.classes[usize::from(storing.class)].policy;
            chain::gains_child(policy, &mut self.index.entries, storing.parent);
            self.index.entries.adopt(id, storing.parent);
        }
        if !storing.alone {
            storing.parent = id;
        }
        pool.set_owner(slot, fill, self.stamp);
        let word = pool.slot(slot).map_or(0, |slot| slot.word);
        Some((word, pool.offset(slot)))
    }

    pub(crate) fn commit(
        &mut self,
        caller: Caller,
        namespace: u32,
        group: u32,
        list: SlotList<'_>,
        crcs: &[u64],
        out: &mut Vec<Output>,
    ) -> Result<Reply, Failure> {
        let space = self.space_of(caller, namespace)?;
        let group = self.group_of(space, group)?;
        let own = self.sessions[caller.session].layout(space, group);
        let Some((cut, part)) = own.and_then(|layout| Some((layout.cut, layout.part?))) else {
            let text = format!("this session copies no part of group {group}; register one");
            return Err(Failure::invalid(text));
        };
        let cut = &self.spaces.get(space).cuts[usize::from(cut)].cut;
        let heads = cut.part(part).heads.len();
        let writer = Writer {
            session: caller.session,
            part,
            crc_base: cut.crc_base(part),
        };
        if crcs.len() != list.len() * heads {
            let (got, want) = (crcs.len(), list.len() * heads);
            let text =
                format!("{got} checksums, but {want} are needed: one for each head of each slot");
            return Err(Failure::new(ErrorKind::Invalid, text));
        }
        let states = list
            .iter()
            .zip(crcs.chunks_exact(heads))
            .map(|((slot, word), crcs)| {
                let state = match self.to_write(caller, space, group, slot, word, part) {
                    Some(fill) => self.part_written(fill, writer, crcs, out),
                    None => CommitState::Stale,
                };
                self.counters.store_failed.stale += u64::from(state == CommitState::Stale);
                state
            });
        Ok(Reply::Commit(states.collect()))
    }

    /// The fill that this session has to write this part of.
    fn to_write(
        &self,
        caller: Caller,
        space: u32,
        group: u8,
        slot: u32,
        word: u64,
        part: u32,
    ) -> Option<u32> {
        let fill = self.claimed(caller.tenant, caller.instance, slot, word)?;
        let crew = &self.crews[self.fills[fill].crew];
        let same = (crew.space, crew.group) == (space, group);
        let own = same && self.parts_of(fill, caller.session) & (1 << part) != 0;
        own.then_some(fill)
    }

    pub(crate) fn abort(
        &mut self,
        caller: Caller,
        list: SlotList<'_>,
        out: &mut Vec<Output>,
    ) -> Reply {
        let speaks_for_all = self.sessions[caller.session].role == Role::Scheduler;
        let mut count = 0;
        for (slot, word) in list.iter() {
            let Some(fill) = self.claimed(caller.tenant, caller.instance, slot, word) else {
                continue;
            };
            // A scheduler's word that nobody was told can be true only while no writer has spoken of the slot. Sessions of
            // writers that ended by themselves say nothing about the others.
            let mask = match speaks_for_all && !self.fills[fill].heard {
                true => self.fills[fill].writing,
                false => self.parts_of(fill, caller.session),
            };
            self.fills[fill].heard |= mask != 0 && !speaks_for_all;
            if mask != 0 || speaks_for_all {
                count += 1;
                self.give_up(fill, GivenUp::Aborted, out);
            }
            if mask != 0 {
                self.end_writers(fill, mask, out);
            }
        }
        Reply::Aborted { count }
    }
}
