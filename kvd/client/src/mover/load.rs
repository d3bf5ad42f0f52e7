//! Into the engine: load, copy, check, release, a window at a time.
//!
//! A block counts as loaded only when, after the copy, its slot still has the generation that came with the lease, every
//! checksum of a wanted head matches, and the connection is still the one that the lease came over.

use std::sync::Arc;

use kvd_core::Cut;
use kvd_device::{LoadJob, LoadPlan, Loaded};
use kvd_wire::session::{Load, LoadReply, LoadState, Release, reply, request};

use super::{BlockMover, BlockRef, Caller, FailReason};
use crate::{CopyGuard, Error};

/// What became of one block that was to be loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum LoadOutcome {
    /// The engine holds what was stored.
    Loaded,
    /// The daemon does not have it.
    Absent,
    /// Its pages hold nothing of use.
    Failed(FailReason),
}

/// Cuts whose plans are kept.
const PLANS_MAX: usize = 16;
/// Cuts in one reply.
const CUTS_MAX: usize = 4096;

/// One READY block of a reply.
struct Ready<'a> {
    /// Position in the window.
    at: usize,
    slot: u32,
    generation: u64,
    offset: u64,
    plan: Arc<LoadPlan>,
    crcs: &'a [u64],
}

impl BlockMover {
    /// Loads blocks. One outcome a block; `to` has one place for each hash (packed, 32 bytes each).
    ///
    /// # Errors
    /// `Invalid` when the arguments do not fit each other; what goes wrong later is in the outcomes.
    pub fn load(
        &mut self,
        caller: &mut dyn Caller,
        namespace: u32,
        hashes: &[u8],
        to: &[BlockRef<'_>],
    ) -> Result<Vec<LoadOutcome>, Error> {
        self.check(hashes, to)?;
        let window = self.window();
        // A daemon that has to wait for a slower tier answers before this caller stops waiting.
        let deadline = self.config.load_deadline.as_millis() * 3 / 4;
        let mut outcomes = Vec::with_capacity(to.len());
        for (hashes, to) in hashes.chunks(window * 32).zip(to.chunks(window)) {
            let guard = match caller.begin_copy() {
                Ok(guard) => guard,
                Err(e) => {
                    outcomes.extend(to.iter().map(|_| LoadOutcome::Failed(FailReason::of(&e))));
                    continue;
                }
            };
            let request = request::Body::Load(Load {
                namespace,
                group: self.config.group,
                hashes: hashes.to_vec().into(),
                deadline_ms: u32::try_from(deadline).unwrap_or(u32::MAX),
            });
            match caller.call(request) {
                Ok(reply::Body::Load(reply)) => {
                    let (some, release) = self.receive(&guard, &reply, to)?;
                    outcomes.extend(some);
                    if !release.slots.is_empty() {
                        // If it does not arrive, the leases end by time.
                        let _ = caller.call(request::Body::Release(release));
                    }
                }
                Ok(_) => {
                    outcomes.extend(
                        to.iter()
                            .map(|_| LoadOutcome::Failed(FailReason::Malformed)),
                    );
                }
                Err(e) => {
                    let failed = LoadOutcome::Failed(FailReason::of(&e));
                    outcomes.extend(to.iter().map(|_| failed));
                }
            }
        }
        Ok(outcomes)
    }

    /// The middle of a load, for callers that send the requests themselves: copies and checks what a reply made ready. The
    /// caller sends the Release, whatever the outcomes; `guard` was taken before the Load was sent.
    ///
    /// # Errors
    /// `Invalid` when `to` is not of this rank's part.
    pub fn receive(
        &mut self,
        guard: &CopyGuard,
        reply: &LoadReply,
        to: &[BlockRef<'_>],
    ) -> Result<(Vec<LoadOutcome>, Release), Error> {
        self.check_blocks(to)?;
        let mut release = Release {
            slots: reply.slots.clone(),
            generations: reply.generations.clone(),
            ..Release::default()
        };
        let malformed = LoadOutcome::Failed(FailReason::Malformed);
        let Some((mut outcomes, ready)) = self.sort(reply, to.len()) else {
            release.generations.resize(release.slots.len(), 0);
            return Ok((vec![malformed; to.len()], release));
        };
        let arena = guard.arena();
        let mut jobs = Vec::with_capacity(ready.len());
        let mut copied = Vec::with_capacity(ready.len());
        for (position, block) in ready.iter().enumerate() {
            match arena.slot(block.slot, block.offset, self.block_bytes) {
                Ok(slot) if block.generation % 2 == 0 => {
                    copied.push(position);
                    jobs.push(LoadJob {
                        slot,
                        plan: &block.plan,
                        crcs: block.crcs,
                        to: to[block.at].at,
                        pages: to[block.at].pages,
                    });
                }
                _ => outcomes[block.at] = malformed,
            }
        }
        let mut results = Vec::with_capacity(jobs.len());
        let slots = copied.iter().map(|position| ready[*position].slot);
        // Once before, so that it is done when the engine has come to that point; and not held while it has not.
        drop(self.prepare(arena, slots.clone()));
        let after = self.after.wait();
        let prepared = self.prepare(arena, slots);
        let loaded = after.and_then(|()| self.device.load(&jobs, &mut results));
        drop(prepared);
        if let Err(error) = loaded {
            tracing::warn!(%error, "a copy into the engine failed");
            for position in copied {
                outcomes[ready[position].at] = LoadOutcome::Failed(FailReason::Device);
            }
            return Ok((outcomes, release));
        }
        for (position, result) in copied.into_iter().zip(results) {
            let block = &ready[position];
            let same = arena.generation_after_copy(block.slot) == Some(block.generation);
            outcomes[block.at] = if !guard.is_current() {
                LoadOutcome::Failed(FailReason::Lost)
            } else if !same {
                LoadOutcome::Failed(FailReason::Overrun)
            } else if result == Loaded::Corrupt {
                release.corrupt.push(position as u32);
                arena.forget(block.slot);
                LoadOutcome::Failed(FailReason::Corrupt)
            } else {
                LoadOutcome::Loaded
            };
        }
        Ok((outcomes, release))
    }

    /// Takes a reply apart. `None` when its lists do not fit each other or the request.
    fn sort<'a>(
        &mut self,
        reply: &'a LoadReply,
        count: usize,
    ) -> Option<(Vec<LoadOutcome>, Vec<Ready<'a>>)> {
        let ready = reply.slots.len();
        let fits = reply.states.len() == count
            && reply.states().filter(|s| *s == LoadState::Ready).count() == ready
            && reply.generations.len() == ready
            && reply.offsets.len() == ready
            && reply.cut.len() == ready
            && reply.cuts.len() <= CUTS_MAX;
        if !fits {
            return None;
        }
        let plans: Vec<Arc<LoadPlan>> = reply
            .cuts
            .iter()
            .map(|cut| self.plan(&cut.layer_bounds, &cut.head_bounds))
            .collect::<Option<_>>()?;
        let mut crcs = &reply.crcs[..];
        let mut outcomes = Vec::with_capacity(count);
        let mut blocks = Vec::with_capacity(ready);
        for (at, state) in reply.states.iter().enumerate() {
            outcomes.push(match LoadState::try_from(*state).ok()? {
                LoadState::Absent => LoadOutcome::Absent,
                LoadState::Failed => LoadOutcome::Failed(FailReason::Daemon),
                LoadState::Ready => {
                    let position = blocks.len();
                    let plan = plans.get(reply.cut[position] as usize)?;
                    let (own, rest) = crcs.split_at_checked(plan.crcs())?;
                    crcs = rest;
                    blocks.push(Ready {
                        at,
                        slot: reply.slots[position],
                        generation: reply.generations[position],
                        offset: reply.offsets[position],
                        plan: Arc::clone(plan),
                        crcs: own,
                    });
                    LoadOutcome::Failed(FailReason::Malformed)
                }
            });
        }
        crcs.is_empty().then_some((outcomes, blocks))
    }

    fn plan(&mut self, layers: &[u32], heads: &[u32]) -> Option<Arc<LoadPlan>> {
        let known = self
            .plans
            .iter()
            .find(|(cut, _)| cut.layer_bounds() == layers && cut.head_bounds() == heads);
        if let Some((_, plan)) = known {
            return Some(Arc::clone(plan));
        }
        let cut = Cut::new(layers, heads, &self.config.geometry).ok()?;
        let plan = Arc::new(LoadPlan::new(&self.config.geometry, &cut, &self.own).ok()?);
        if self.plans.len() >= PLANS_MAX {
            self.plans.remove(1); // the first is our own
        }
        self.plans.push((cut, Arc::clone(&plan)));
        Some(plan)
    }
}
