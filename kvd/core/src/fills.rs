//! Blocks being filled: a slot that an instance reserved, and who may still be writing it.
//!
//! One bit for each part says that the part's writer is not terminal. A writer ends by committing, aborting, fencing, or dying;
//! all but the first give the block up. A block given up leaves the index at once, but its slot is quarantined, its word odd,
//! until the last writer has ended: then, and only then, may anybody else get it (invariant 3). Deliberately absent: retries.

use crate::api::{CommitState, NIL, Output};
use crate::evict::chain;
use crate::ids::BlockHash;
use crate::index::Entry;
use crate::list::{Link, Linked};
use crate::log::{Change, ChangeKind, Tier};
use crate::pool::SlotState;
use crate::state::Core;
use crate::store::Writer;

/// A slot that somebody may be writing.
#[derive(Debug, Default)]
pub(crate) struct Fill {
    pub(crate) crew: u32,
    pub(crate) slot: u32,
    /// Its block; [`NIL`] once given up.
    pub(crate) entry: u32,
    pub(crate) tenant: u32,
    /// Low 8 bytes of the hash: picks the writers.
    pub(crate) low: u64,
    /// Parts whose writers are not terminal. While there is an entry: the parts that are still to come.
    pub(crate) writing: u128,
    /// One of its writers has spoken of it, so its workers have been told.
    pub(crate) heard: bool,
    /// When it is given up, microseconds.
    pub(crate) deadline: u64,
    by_instance: Link,
    by_deadline: Link,
}

/// All fills of an instance.
#[derive(Debug)]
pub(crate) struct ByInstance;
/// Fills with an entry, the oldest in front.
#[derive(Debug)]
pub(crate) struct ByDeadline;

impl Linked<ByInstance> for Fill {
    fn link(&self) -> &Link {
        &self.by_instance
    }
    fn link_mut(&mut self) -> &mut Link {
        &mut self.by_instance
    }
}

impl Linked<ByDeadline> for Fill {
    fn link(&self) -> &Link {
        &self.by_deadline
    }
    fn link_mut(&mut self) -> &mut Link {
        &mut self.by_deadline
    }
}

/// Why a block was given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum GivenUp {
    Deadline,
    Aborted,
    WriterLost,
    Suspect,
}

fn bits(mut mask: u128) -> impl Iterator<Item = u32> {
    std::iter::from_fn(move || {
        let part = mask.trailing_zeros();
        mask &= mask.wrapping_sub(1);
        (part < 128).then_some(part)
    })
}

impl Core {
    /// Records everyone who may write the slot from now on.
    pub(crate) fn begin_fill(
        &mut self,
        t: usize,
        crew: u32,
        slot: u32,
        entry: u32,
        low: u64,
    ) -> u32 {
        let deadline = self.now.saturating_add(self.settings.fill_deadline_us);
        let writing = self.crews[crew].all();
        let fill = Fill {
            crew,
            slot,
            entry,
            tenant: t as u32,
            low,
            writing,
            deadline,
            ..Fill::default()
        };
        let fill = self.fills.insert(fill);
        let found = &mut self.crews[crew];
        found.fills += 1;
        for part in bits(writing) {
            self.sessions[found.writer(part, low)].writing += 1;
        }
        self.instances[found.instance]
            .claims
            .push_back(&mut self.fills, fill);
        self.deadlines.push_back(&mut self.fills, fill);
        fill
    }

    /// The fill that has this slot under this generation, if it is the instance's.
    pub(crate) fn claimed(&self, t: usize, instance: u32, slot: u32, word: u64) -> Option<u32> {
        let found = self.tenants[t].pool.as_ref()?.slot(slot)?;
        // One into which a block comes up from a store is nobody's.
        let own = found.state.writable() && found.word == word && found.owner != NIL;
        let fill = own.then_some(found.owner)?;
        (self.crews[self.fills[fill].crew].instance == instance).then_some(fill)
    }

    /// A part was written by `by`, who had to write it. The block may become visible by this.
    pub(crate) fn part_written(
        &mut self,
        fill: u32,
        by: Writer,
        crcs: &[u64],
        out: &mut Vec<Output>,
    ) -> CommitState {
        self.fills[fill].heard = true;
        let Fill {
            crew,
            slot,
            entry,
            tenant,
            ..
        } = self.fills[fill];
        let bit = 1u128 << by.part;
        if entry == NIL {
            self.end_writers(fill, bit, out);
            return CommitState::Stale;
        }
        let (count, at) = (self.crews[crew].crcs, self.index.entries.hot[entry].crcs);
        self.crcs.set(count, at, by.crc_base, crcs);
        if self.fills[fill].writing != bit {
            self.fills[fill].writing &= !bit;
            self.sessions[by.session].writing -= 1;
            let pool = self.tenants[tenant as usize].pool.as_mut();
            if let Some(pool) = pool
                && pool
                    .slot(slot)
                    .is_some_and(|slot| slot.state == SlotState::Reserved)
            {
                pool.set_state(slot, SlotState::Filling, fill, out);
            }
            return CommitState::Waiting;
        }
        if self.in_suspect_extent(tenant as usize, slot) {
            self.give_up(fill, GivenUp::Suspect, out);
            self.end_writers(fill, bit, out);
            return CommitState::Stale;
        }
        self.sessions[by.session].writing -= 1;
        self.complete(fill, out);
        CommitState::Visible
    }

    pub(crate) fn in_suspect_extent(&self, t: usize, slot: u32) -> bool {
        let Some(pool) = &self.tenants[t].pool else {
            return false;
        };
        pool.extents
            .of(slot)
            .is_some_and(|extent| pool.extents[extent].suspect)
    }

    /// Every part is there: the block becomes visible.
    fn complete(&mut self, fill: u32, out: &mut Vec<Output>) {
        self.deadlines.remove(&mut self.fills, fill);
        let Fill {
            crew,
            slot,
            entry,
            tenant,
            ..
        } = self.fills[fill];
        self.forget_fill(fill);
        let entries = &mut self.index.entries;
        let (space, group) = (entries.hot[entry].space, entries.hot[entry].group);
        let namespace = self.spaces.get_mut(space);
        let found = &namespace.groups[usize::from(group)];
        if let Some(pool) = &mut self.tenants[tenant as usize].pool {
            pool.set_state(slot, SlotState::Resident, entry, out);
            let policy = &mut *pool.classes[usize::from(found.class)].policy;
            chain::visible(policy, entries, entry);
        }
        namespace.blocks += 1;
        namespace.bytes += found.slot_bytes;
        self.counters.stored += 1;
        self.counters.stored_bytes += found.slot_bytes;
        self.announce(entry, ChangeKind::Stored);
        self.leave_crew(crew);
        self.offload_new(entry, out);
    }

    /// Writes to the change log.
    pub(crate) fn announce(&mut self, entry: u32, kind: ChangeKind) {
        let entry = &self.index.entries.hot[entry];
        let namespace = self.spaces.get(entry.space);
        self.log.push(Change {
            kind,
            tier: Tier::Host,
            tenant: self.tenants[namespace.tenant].id,
            namespace: namespace.id,
            group: entry.group.into(),
            hash: BlockHash(entry.hash),
        });
    }

    fn forget_fill(&mut self, fill: u32) {
        let instance = self.crews[self.fills[fill].crew].instance;
        self.instances[instance]
            .claims
            .remove(&mut self.fills, fill);
        self.fills.remove(fill);
    }

    /// The block will not become visible: it leaves the index, and its slot waits for its writers.
    pub(crate) fn give_up(&mut self, fill: u32, why: GivenUp, out: &mut Vec<Output>) {
        let Fill {
            crew,
            slot,
            entry,
            tenant,
            ..
        } = self.fills[fill];
        if entry == NIL {
            return;
        }
        let failed = &mut self.counters.store_failed;
        *match why {
            GivenUp::Deadline => &mut failed.deadline,
            GivenUp::Aborted => &mut failed.aborted,
            GivenUp::WriterLost => &mut failed.writer_lost,
            GivenUp::Suspect => &mut failed.suspect,
        } += 1;
        self.fills[fill].entry = NIL;
        self.deadlines.remove(&mut self.fills, fill);
        let Entry {
            space, group, crcs, ..
        } = self.index.entries.hot[entry];
        let class = self.spaces.get(space).groups[usize::from(group)].class;
        let tenant = &mut self.tenants[tenant as usize];
        tenant.quarantined_bytes += self.crews[crew].slot_bytes;
        if let Some(pool) = &mut tenant.pool {
            let policy = &mut *pool.classes[usize::from(class)].policy;
            chain::leaves(policy, &mut self.index.entries, entry, false);
            pool.set_state(slot, SlotState::Quarantined, fill, out);
        }
        self.crcs.remove(self.crews[crew].crcs, crcs);
        self.index.remove(entry);
    }

    /// These writers of a block that was given up are terminal. The last one frees the slot.
    pub(crate) fn end_writers(&mut self, fill: u32, mask: u128, out: &mut Vec<Output>) {
        let Fill {
            crew,
            slot,
            entry,
            tenant,
            low,
            writing,
            ..
        } = self.fills[fill];
        assert!(
            entry == NIL && writing & mask == mask,
            "a writer ended twice"
        );
        for part in bits(mask) {
            let session = self.crews[crew].writer(part, low);
            self.sessions[session].writing -= 1;
            self.relieved(session);
        }
        self.fills[fill].writing &= !mask;
        if self.fills[fill].writing == 0 {
            let tenant = &mut self.tenants[tenant as usize];
            tenant.quarantined_bytes -= self.crews[crew].slot_bytes;
            if let Some(pool) = &mut tenant.pool {
                pool.release(slot, out);
            }
            self.forget_fill(fill);
            self.leave_crew(crew);
        }
    }

    /// The parts of a fill that this session may still be writing.
    pub(crate) fn parts_of(&self, fill: u32, session: u32) -> u128 {
        let fill = &self.fills[fill];
        let crew = &self.crews[fill.crew];
        let own = bits(fill.writing).filter(|part| crew.writer(*part, fill.low) == session);
        own.fold(0, |mask, part| mask | 1 << part)
    }

    /// The session is terminal: whatever it had to write will not come from it.
    pub(crate) fn end_writing_of(&mut self, session: u32, out: &mut Vec<Output>) {
        if self.sessions[session].writing == 0 {
            return;
        }
        let instance = self.sessions[session].instance;
        for fill in self.instances[instance].claims.all(&self.fills) {
            let mask = self.parts_of(fill, session);
            if mask != 0 {
                self.give_up(fill, GivenUp::WriterLost, out);
                self.end_writers(fill, mask, out);
            }
        }
    }

    /// Gives up what was not filled in time.
    pub(crate) fn fills_due(&mut self, most: usize, out: &mut Vec<Output>) {
        for _ in 0..most {
            let due = self
                .deadlines
                .front()
                .filter(|fill| self.fills[*fill].deadline <= self.now);
            let Some(fill) = due else { return };
            self.give_up(fill, GivenUp::Deadline, out);
        }
    }
}
