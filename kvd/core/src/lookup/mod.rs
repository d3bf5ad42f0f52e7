//! Lookup: which of these blocks are here, in host memory or below, as runs. A lookup that leases what it finds is followed by a load,
//! so that what is below begins to come up. Deliberately absent: waiting; a block being stored or coming up is said to be so.

mod joint;

use crate::api::{Chain, Failure, LookupReply, NIL, Output, Presence, Reply, Scope, Where};
use crate::disk::AHEAD_A_LOOKUP;
use crate::evict::chain;
use crate::index::{BATCH, EntryState};
use crate::state::Core;
use crate::step::Caller;

impl Presence {
    #[inline]
    fn add(&mut self, at: u32, place: Where) {
        if let (Some(start), Some(length)) = (self.start.last(), self.length.last_mut())
            && self.place.last() == Some(&place)
            && *start + *length == at
        {
            *length += 1;
            return;
        }
        self.start.push(at);
        self.length.push(1);
        self.place.push(place);
    }

    /// Where the block at position `at` of the chain is.
    pub fn at(&self, at: u32) -> Where {
        let runs = self.start.iter().zip(&self.length).zip(&self.place);
        let mut covering =
            runs.filter(|((start, length), _)| (**start..**start + **length).contains(&at));
        covering.next().map_or(Where::Absent, |(_, place)| *place)
    }
}

/// What the lookups of one request found so far.
#[derive(Default)]
struct Hits {
    hit: u64,
    absent: u64,
    filling: u64,
    bytes: u64,
    /// Bytes that have to come up first.
    below: u64,
    /// Entries to be leased; kept only if a lease is wanted.
    blocks: Vec<u32>,
    /// The first blocks below that a load will ask for, if a lease is wanted: of what can be loaded of each chain up to the first block
    /// that can't. Group and hash; at most [`AHEAD_A_LOOKUP`].
    ahead: Vec<(u8, [u8; 32])>,
}

/// How one request looks.
#[derive(Clone, Copy)]
struct Manner {
    space: u32,
    lease: bool,
    scope: Scope,
    /// What is below is noted, to be brought up.
    ahead: bool,
}

impl Core {
    pub(crate) fn lookup(
        &mut self,
        caller: Caller,
        namespace: u32,
        chains: &[Chain<'_>],
        (lease_ms, scope): (u32, Scope),
        out: &mut Vec<Output>,
    ) -> Result<Reply, Failure> {
        let space = self.space_of(caller, namespace)?;
        self.bounded_chains(chains)?;
        for chain in chains {
            self.group_of(space, chain.group)?;
        }
        let manner = Manner {
            space,
            lease: lease_ms > 0,
            scope,
            ahead: lease_ms > 0 && self.settings.tiers.read_ahead,
        };
        let mut hits = Hits::default();
        let mut reply = LookupReply::default();
        if let Scope::Hit { drop_last } = scope {
            let (found, tokens) = self.lookup_hit(caller, manner, chains, drop_last, &mut hits)?;
            (reply.chains, reply.hit_tokens) = (found, tokens);
        } else {
            let looked = chains
                .iter()
                .map(|chain| self.lookup_chain(caller, manner, chain, &mut hits));
            reply.chains = looked.collect();
        }
        self.counters.lookup_hit += hits.hit;
        self.counters.lookup_absent += hits.absent;
        self.counters.lookup_filling += hits.filling;
        reply.est_load_us = (hits.bytes + hits.below) / self.settings.load_bytes_per_us.max(1)
            + hits.below / self.settings.tiers.load_bytes_per_us.max(1);
        if !hits.blocks.is_empty() {
            reply.lease = self.lease_lookup(caller.session, &hits.blocks, lease_ms, hits.bytes);
        }
        if reply.lease != 0 {
            // Who leases it wants it as who loads it.
            hits.blocks.iter().for_each(|id| self.end_ahead(*id));
        }
        // Of what was denied a lease nobody knows whether a load will find it.
        if hits.blocks.is_empty() || reply.lease != 0 {
            self.read_ahead(caller.tenant, space, &hits.ahead, out);
        }
        Ok(Reply::Lookup(reply))
    }

    /// Looks one chain up; if only what leads matters, up to the first block that is absent.
    fn lookup_chain(
        &mut self,
        caller: Caller,
        manner: Manner,
        chain: &Chain<'_>,
        hits: &mut Hits,
    ) -> Presence {
        let (space, group, stamp) = (manner.space, chain.group as u8, self.stamp);
        let class = &self.spaces.get(space).groups[usize::from(group)];
        let (class, slot_bytes) = (class.class, class.slot_bytes);
        let below = self.spaces.get(space).id;
        let Core {
            index,
            tenants,
            disks,
            ..
        } = self;
        let mut presence = Presence::default();
        let Some(pool) = &mut tenants[caller.tenant].pool else {
            return presence;
        };
        let (extents, policy) = pool.recency(class);
        let mut ahead = manner.ahead;
        for (number, batch) in chain.hashes.chunks(BATCH).enumerate() {
            let mut found = [NIL; BATCH];
            index.find_batch(space, group, batch, &mut found);
            for (at, id) in found[..batch.len()].iter().enumerate() {
                let at = (number * BATCH + at) as u32;
                let place = match *id {
                    NIL if disks.look(below, group, &batch[at as usize % BATCH], stamp) => {
                        hits.below += slot_bytes;
                        hits.hit += 1;
                        Where::Nvme
                    }
                    NIL => Where::Absent,
                    id if index.entries.hot[id].state == EntryState::Filling => {
                        match disks.fetches(id) {
                            true => {
                                hits.below += slot_bytes;
                                hits.hit += 1;
                                Where::Fetching
                            }
                            false => Where::Filling,
                        }
                    }
                    id => {
                        extents.touch(index.entries.hot[id].slot, stamp);
                        chain::touch(policy, &mut index.entries, id, stamp, false);
                        hits.bytes += slot_bytes;
                        hits.hit += 1;
                        if manner.lease {
                            hits.blocks.push(id);
                        }
                        Where::Host
                    }
                };
                match place {
                    Where::Nvme if ahead && hits.ahead.len() < AHEAD_A_LOOKUP => {
                        hits.ahead.push((group, batch[at as usize % BATCH]));
                    }
                    Where::Absent | Where::Filling => ahead = false,
                    _ => {}
                }
                match place {
                    Where::Absent if manner.scope == Scope::Leading => {
                        hits.absent += chain.hashes.len() as u64 - u64::from(at);
                        return presence;
                    }
                    Where::Absent => hits.absent += 1,
                    _ => presence.add(at, place),
                }
                hits.filling += u64::from(place == Where::Filling);
            }
        }
        presence
    }
}
