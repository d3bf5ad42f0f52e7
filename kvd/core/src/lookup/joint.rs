//! The chains of one prompt, one for each KV-cache group, looked up together: what matters is the longest hit, and of each group
//! just the blocks that it needs. Blocks that a window has left behind are seen, but not touched, so that they grow cold.

use super::{Hits, Manner};
use crate::api::{Chain, Failure, NIL, Presence, Where};
use crate::disk::AHEAD_A_LOOKUP;
use crate::hit::{self, GroupRule, Run};
use crate::index::{BATCH, EntryState};
use crate::state::Core;
use crate::step::Caller;

/// What a group's chain shows.
#[derive(Default)]
struct Seen {
    /// Entry in the index (or [`NIL`]) and place, block by block; what is beyond any hit is left out.
    blocks: Vec<(u32, Where)>,
    runs: Vec<Run>,
}

impl Core {
    /// What is there of each chain, and the tokens of the longest hit.
    pub(super) fn lookup_hit(
        &mut self,
        caller: Caller,
        manner: Manner,
        chains: &[Chain<'_>],
        drop_last: bool,
        hits: &mut Hits,
    ) -> Result<(Vec<Presence>, u32), Failure> {
        let rules = self.rules_of(manner.space, chains)?;
        let Some(unit) = hit::unit(&rules) else {
            let text = "block sizes of the KV-cache groups that no prompt is a multiple of";
            return Err(Failure::invalid(text.to_owned()));
        };
        let tokens = |rule: &GroupRule, blocks: usize| {
            u32::try_from(blocks as u64 * u64::from(rule.span())).unwrap_or(u32::MAX)
        };
        let lengths = chains.iter().zip(&rules);
        let most = lengths.map(|(chain, rule)| tokens(rule, chain.hashes.len()));
        let mut most = most.min().unwrap_or(0);
        let mut seen: Vec<Seen> = Vec::new();
        seen.resize_with(chains.len(), Seen::default);
        // What needs all blocks says how far the others need to be looked at.
        for alone in [false, true] {
            for (at, (chain, rule)) in chains.iter().zip(&rules).enumerate() {
                if rule.stands_alone() != alone {
                    continue;
                }
                seen[at] = self.see(manner, chain, rule, most, hits);
                let end = seen[at].runs.first().filter(|run| run.0 == 0);
                if !alone {
                    most = most.min(tokens(rule, end.map_or(0, |run| run.1 as usize)));
                }
            }
            if !alone && drop_last {
                most = most.saturating_sub(unit);
            }
        }
        let groups: Vec<(GroupRule, &[Run])> = rules
            .iter()
            .zip(&seen)
            .map(|(rule, seen)| (*rule, &seen.runs[..]))
            .collect();
        let found = hit::longest(&groups, unit, most, 0);
        for (at, chain) in chains.iter().enumerate() {
            let needs = rules[at].needs(found, 0);
            self.use_needed(caller, manner, chain, (&seen[at], needs), hits);
        }
        let show = |seen: &Seen| {
            let mut presence = Presence::default();
            for (at, (_, place)) in (0u32..).zip(&seen.blocks) {
                if *place != Where::Absent {
                    presence.add(at, *place);
                }
            }
            presence
        };
        Ok((seen.iter().map(show).collect(), found))
    }

    /// The rule of each chain's group: every group of the namespace has one chain.
    fn rules_of(&self, space: u32, chains: &[Chain<'_>]) -> Result<Vec<GroupRule>, Failure> {
        let rules = self.spaces.get(space).record.rules();
        let mut given = vec![false; rules.len()];
        for chain in chains {
            given[chain.group as usize] = true;
        }
        if chains.len() != rules.len() || given.contains(&false) {
            let text = format!(
                "a hit needs one chain for each of the {} KV-cache groups",
                rules.len()
            );
            return Err(Failure::invalid(text));
        }
        Ok(chains.iter().map(|c| rules[c.group as usize]).collect())
    }

    /// Looks at the blocks of a chain that are within `most` tokens; where all blocks are needed, up to the first that can't be loaded.
    fn see(
        &mut self,
        manner: Manner,
        chain: &Chain<'_>,
        rule: &GroupRule,
        most: u32,
        hits: &mut Hits,
    ) -> Seen {
        let (space, group) = (manner.space, chain.group as u8);
        let below = self.spaces.get(space).id;
        let within = chain.hashes.len().min((most / rule.span()) as usize);
        let mut seen = Seen::default();
        'chain: for batch in chain.hashes[..within].chunks(BATCH) {
            let mut found = [NIL; BATCH];
            self.index.find_batch(space, group, batch, &mut found);
            for (hash, id) in batch.iter().zip(found) {
                let place = match id {
                    NIL if self.disks.has(below, group, hash) => Where::Nvme,
                    NIL => Where::Absent,
                    id if self.index.entries.hot[id].state != EntryState::Filling => Where::Host,
                    id if self.disks.fetches(id) => Where::Fetching,
                    _ => Where::Filling,
                };
                let at = seen.blocks.len() as u32;
                hits.filling += u64::from(place == Where::Filling);
                seen.blocks.push((id, place));
                if matches!(place, Where::Absent | Where::Filling) {
                    if rule.stands_alone() {
                        continue;
                    }
                    break 'chain;
                }
                match seen.runs.last_mut() {
                    Some(run) if run.1 == at => run.1 += 1,
                    _ => seen.runs.push((at, at + 1)),
                }
            }
        }
        if !rule.stands_alone() {
            let there = seen.runs.first().map_or(0, |run| run.1 as usize);
            hits.absent += (chain.hashes.len() - there) as u64;
        }
        seen
    }

    /// Marks what a hit needs of a chain as used, and notes it for the lease.
    fn use_needed(
        &mut self,
        caller: Caller,
        manner: Manner,
        chain: &Chain<'_>,
        (seen, (first, end)): (&Seen, Run),
        hits: &mut Hits,
    ) {
        let group = chain.group as u8;
        let space = self.spaces.get(manner.space);
        let (class, slot_bytes) = {
            let group = &space.groups[usize::from(group)];
            (group.class, group.slot_bytes)
        };
        let below = space.id;
        for at in first as usize..end as usize {
            let (id, place) = seen.blocks[at];
            hits.hit += 1;
            match place {
                Where::Host => {
                    self.touch(caller.tenant, class, id, false);
                    hits.bytes += slot_bytes;
                    if manner.lease {
                        hits.blocks.push(id);
                    }
                }
                Where::Nvme => {
                    hits.below += slot_bytes;
                    self.disks.look(below, group, &chain.hashes[at], self.stamp);
                    if manner.ahead && hits.ahead.len() < AHEAD_A_LOOKUP {
                        hits.ahead.push((group, chain.hashes[at]));
                    }
                }
                _ => hits.below += slot_bytes,
            }
        }
    }
}
