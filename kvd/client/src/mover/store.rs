//! Out of the engine: reserve, copy, commit.
//!
//! A slot is written only while its generation is the odd one that came with the reservation, and nothing is committed once
//! the connection under which the copy began is lost.

use kvd_device::StoreJob;
use kvd_wire::session::{
    Abort, Chain, Commit, CommitReply, CommitState, Reserve, ReserveReply, ReserveState, reply,
    request,
};

use super::{BlockMover, BlockRef, Caller, FailReason};
use crate::{ChainRef, CopyGuard, Error};

/// What became of one block that was to be stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum StoreOutcome {
    /// Stored, and every part is there: it can be loaded.
    Visible,
    /// This part is stored; others are still to come.
    Waiting,
    /// It was there already.
    Present,
    /// Somebody else is storing it.
    Filling,
    /// The daemon has no room now.
    NoSpace,
    /// The reservation was gone before the copy was committed. Nothing was stored.
    Stale,
    /// Nothing was stored.
    Failed(FailReason),
}

/// A slot that was reserved, to be filled by this process or by another of its instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ReservedSlot {
    /// Index in the generation table.
    pub slot: u32,
    /// The odd generation that it has while it may be written.
    pub generation: u64,
    /// Bytes from the start of the arena.
    pub offset: u64,
}

impl BlockMover {
    /// Stores blocks that follow each other in a chain: reserve, copy, commit, a window at a time. One outcome a block.
    ///
    /// For a process that reserves and copies (a script, a bench). In an engine the scheduler reserves and the workers
    /// [`BlockMover::fill`].
    ///
    /// # Errors
    /// `Invalid` when the arguments do not fit each other; what goes wrong later is in the outcomes.
    pub fn store(
        &mut self,
        caller: &mut dyn Caller,
        namespace: u32,
        chain: ChainRef<'_>,
        from: &[BlockRef<'_>],
    ) -> Result<Vec<StoreOutcome>, Error> {
        self.check(chain.hashes, from)?;
        let window = self.window();
        let mut outcomes = Vec::with_capacity(from.len());
        let mut parent = chain.parent.map_or(&[][..], |p| &p[..]);
        for (hashes, blocks) in chain.hashes.chunks(window * 32).zip(from.chunks(window)) {
            let request = request::Body::Reserve(Reserve {
                namespace,
                chains: vec![Chain {
                    group: chain.group,
                    hashes: hashes.to_vec().into(),
                    parent: parent.to_vec().into(),
                }],
            });
            parent = &hashes[hashes.len() - 32..];
            let reserved = match caller.call(request) {
                Ok(reply::Body::Reserve(reply)) => sort(&reply, blocks.len()),
                Ok(_) => None,
                Err(e) => {
                    let failed = StoreOutcome::Failed(FailReason::of(&e));
                    outcomes.resize(from.len(), failed);
                    return Ok(outcomes);
                }
            };
            let Some((mut some, slots, at)) = reserved else {
                outcomes.resize(from.len(), StoreOutcome::Failed(FailReason::Malformed));
                return Ok(outcomes);
            };
            let chosen: Vec<BlockRef<'_>> = at.iter().map(|i| blocks[*i]).collect();
            let filled = self.fill(caller, namespace, &slots, &chosen)?;
            for (i, outcome) in at.into_iter().zip(filled) {
                some[i] = outcome;
            }
            outcomes.extend(some);
        }
        Ok(outcomes)
    }

    /// Writes this process' part of reserved slots and commits them. One outcome a slot; `from` has one block for each.
    ///
    /// # Errors
    /// `Invalid` when the arguments do not fit each other; what goes wrong later is in the outcomes.
    pub fn fill(
        &mut self,
        caller: &mut dyn Caller,
        namespace: u32,
        slots: &[ReservedSlot],
        from: &[BlockRef<'_>],
    ) -> Result<Vec<StoreOutcome>, Error> {
        if slots.len() != from.len() {
            return Err(Error::invalid(format!(
                "{} slots for {} blocks",
                slots.len(),
                from.len()
            )));
        }
        self.check_blocks(from)?;
        let mut outcomes = Vec::with_capacity(slots.len());
        let window = self.window();
        for (slots, from) in slots.chunks(window).zip(from.chunks(window)) {
            let guard = match caller.begin_copy() {
                Ok(guard) => guard,
                Err(e) => {
                    outcomes.extend(
                        slots
                            .iter()
                            .map(|_| StoreOutcome::Failed(FailReason::of(&e))),
                    );
                    continue;
                }
            };
            self.fill_window(caller, &guard, namespace, slots, from, &mut outcomes);
        }
        Ok(outcomes)
    }

    fn fill_window(
        &mut self,
        caller: &mut dyn Caller,
        guard: &CopyGuard,
        namespace: u32,
        slots: &[ReservedSlot],
        from: &[BlockRef<'_>],
        outcomes: &mut Vec<StoreOutcome>,
    ) {
        let arena = guard.arena();
        let base = outcomes.len();
        outcomes.resize(base + slots.len(), StoreOutcome::Stale);
        let outcomes = &mut outcomes[base..];
        let mut jobs = Vec::with_capacity(slots.len());
        let mut at = Vec::with_capacity(slots.len());
        for (i, (slot, block)) in slots.iter().zip(from).enumerate() {
            let whole = arena.slot(slot.slot, slot.offset, self.block_bytes);
            let part = whole
                .ok()
                .and_then(|w| w.sub(self.part_offset, self.part.bytes()));
            let Some(part) = part.filter(|_| slot.generation % 2 == 1) else {
                outcomes[i] = StoreOutcome::Failed(FailReason::Malformed);
                continue;
            };
            if arena.generation(slot.slot) != Some(slot.generation) {
                continue; // stale: not ours any more
            }
            at.push(i);
            jobs.push(StoreJob {
                from: block.at,
                pages: block.pages,
                part,
            });
        }
        if jobs.is_empty() {
            return;
        }
        let mut crcs = Vec::with_capacity(jobs.len() * self.part.heads as usize);
        let prepared = self.prepare(arena, at.iter().map(|i| slots[*i].slot));
        let copied = self.device.store(&jobs, &mut crcs);
        drop(prepared);
        let numbers: Vec<u32> = at.iter().map(|i| slots[*i].slot).collect();
        let generations: Vec<u64> = at.iter().map(|i| slots[*i].generation).collect();
        let committed = match copied {
            Ok(()) if guard.is_current() => {
                self.commit(caller, guard, namespace, numbers, generations, crcs)
            }
            Ok(()) => Err(FailReason::Lost),
            Err(error) => {
                tracing::warn!(%error, "a copy out of the engine failed");
                let abort = Abort {
                    slots: numbers,
                    generations,
                };
                // If it does not arrive, the reservations end by their deadline.
                let _ = caller.call_after(guard, request::Body::Abort(abort));
                Err(FailReason::Device)
            }
        };
        match committed {
            Ok(states) => {
                for (i, state) in at.into_iter().zip(states) {
                    outcomes[i] = state;
                }
            }
            Err(reason) => {
                for i in at {
                    outcomes[i] = StoreOutcome::Failed(reason);
                }
            }
        }
    }

    fn commit(
        &self,
        caller: &mut dyn Caller,
        guard: &CopyGuard,
        namespace: u32,
        slots: Vec<u32>,
        generations: Vec<u64>,
        crcs: Vec<u64>,
    ) -> Result<Vec<StoreOutcome>, FailReason> {
        let count = slots.len();
        let request = request::Body::Commit(Commit {
            namespace,
            group: self.config.group,
            slots,
            generations,
            crcs,
        });
        let states = match caller.call_after(guard, request) {
            Ok(reply::Body::Commit(CommitReply { states })) if states.len() == count => states,
            Ok(_) => return Err(FailReason::Malformed),
            Err(e) => return Err(FailReason::of(&e)),
        };
        let outcome = |state| match CommitState::try_from(state) {
            Ok(CommitState::Visible) => StoreOutcome::Visible,
            Ok(CommitState::Waiting) => StoreOutcome::Waiting,
            Ok(CommitState::Stale) => StoreOutcome::Stale,
            Err(_) => StoreOutcome::Failed(FailReason::Malformed),
        };
        Ok(states.into_iter().map(outcome).collect())
    }
}

/// Outcomes of a reservation, the slots that came, and which blocks they are for. `None` when the lists do not fit.
#[allow(
    clippy::type_complexity,
    reason = "three lists that belong together, used once"
)]
fn sort(
    reply: &ReserveReply,
    count: usize,
) -> Option<(Vec<StoreOutcome>, Vec<ReservedSlot>, Vec<usize>)> {
    let slots = ReservedSlot::from_reply(reply, count)?;
    let mut some = Vec::with_capacity(count);
    let mut at = Vec::with_capacity(slots.len());
    for (i, state) in reply.states().enumerate() {
        some.push(match state {
            ReserveState::Reserved => {
                at.push(i);
                StoreOutcome::Stale
            }
            ReserveState::Present => StoreOutcome::Present,
            ReserveState::Filling => StoreOutcome::Filling,
            ReserveState::NoSpace => StoreOutcome::NoSpace,
        });
    }
    Some((some, slots, at))
}

impl ReservedSlot {
    /// The slots in a reply to a request for `count` blocks: one for each state that is RESERVED, in order. `None` when the
    /// reply does not fit the request.
    pub fn from_reply(reply: &ReserveReply, count: usize) -> Option<Vec<Self>> {
        let reserved = reply
            .states()
            .filter(|s| *s == ReserveState::Reserved)
            .count();
        let fits = reply.states.len() == count
            && reply
                .states
                .iter()
                .all(|s| ReserveState::try_from(*s).is_ok())
            && reply.slots.len() == reserved
            && reply.generations.len() == reserved
            && reply.offsets.len() == reserved;
        fits.then(|| {
            let lists = reply
                .slots
                .iter()
                .zip(&reply.generations)
                .zip(&reply.offsets);
            lists
                .map(|((slot, generation), offset)| Self {
                    slot: *slot,
                    generation: *generation,
                    offset: *offset,
                })
                .collect()
        })
    }
}
