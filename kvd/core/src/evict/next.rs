//! The next to go: victims of a policy, chosen some time before their slots are needed, so that they can be written elsewhere first.
//!
//! The policy is only asked ahead of time: it orders as it always does, and what it has given goes in the order in which it was
//! given. A chosen block stays a block like any other; when it is touched, it goes back to its policy and is touched there. After a
//! chosen leaf comes the block before it in its chain, if that becomes a leaf by it and goes to the cold end; so a chain may be
//! chosen from its tail on, as it will go. Deliberately absent: what becomes of the chosen; how many there should be.

use super::{AWAY, Eviction, NEXT, Place, chain, chosen, listed};
use crate::index::{ByPolicy, Entries, Entry, EntryState};
use crate::list::List;

/// Most entries looked at for one choice, and most of the chosen that are passed over for one victim: those come in again at
/// the other end, so the next call looks at others.
const LOOK: u32 = 64;

pub(super) struct Next {
    policy: Box<dyn Eviction>,
    /// Chosen leaves; the first to go is at the back.
    leaves: List<ByPolicy>,
    chosen: u64,
    /// What was chosen last, and its serial: the block before it in its chain may be next.
    last: Option<(u32, u32)>,
}

impl Next {
    pub(super) fn new(policy: Box<dyn Eviction>) -> Self {
        Next {
            policy,
            leaves: List::new(),
            chosen: 0,
            last: None,
        }
    }

    /// The block that goes after the one that was chosen last, because that is its only child and no colder.
    fn before_last(&self, entries: &Entries) -> Option<u32> {
        let (last, serial) = self.last?;
        if entries.side[last].serial != serial || !chosen(&entries.hot[last]) {
            return None;
        }
        let parent = entries.parent(last)?;
        let (entry, stamp) = (&entries.hot[parent], entries.hot[last].stamp);
        let follows = entry.state == EntryState::Resident
            && entry.children == 1
            && !chosen(entry)
            && !chain::older(stamp, entry.stamp);
        follows.then_some(parent)
    }

    /// Ends the choice of one block, which is in no list then.
    fn take_back(&mut self, entries: &mut Entries, id: u32) {
        if listed(&entries.hot[id]) {
            self.leaves.remove(&mut entries.side, id);
        }
        let list = &mut entries.hot[id].list;
        *list = (*list & !NEXT) | AWAY;
        self.chosen -= 1;
    }
}

impl Eviction for Next {
    fn insert(&mut self, entries: &mut Entries, id: u32, place: Place) {
        if chosen(&entries.hot[id]) && place == Place::Cold {
            entries.hot[id].list &= !AWAY;
            self.leaves.push_back(&mut entries.side, id);
            return;
        }
        self.stays(entries, id);
        self.policy.insert(entries, id, place);
    }

    fn touch(&mut self, entries: &mut Entries, id: u32) {
        self.policy.touch(entries, id);
    }

    fn remove(&mut self, entries: &mut Entries, id: u32) {
        match chosen(&entries.hot[id]) {
            true => self.take_back(entries, id),
            false => self.policy.remove(entries, id),
        }
    }

    fn victim(
        &mut self,
        entries: &mut Entries,
        keep: &mut dyn FnMut(&Entry) -> bool,
        most: u32,
    ) -> Option<u32> {
        for _ in 0..self.leaves.len().min(LOOK) {
            let id = self.leaves.back()?;
            if !keep(&entries.hot[id]) {
                return Some(id);
            }
            self.leaves.remove(&mut entries.side, id);
            self.leaves.push_front(&mut entries.side, id);
        }
        self.policy.victim(entries, keep, most)
    }

    fn choose(
        &mut self,
        entries: &mut Entries,
        keep: &mut dyn FnMut(&Entry) -> bool,
    ) -> Option<u32> {
        let before = self.before_last(entries);
        let id = match before.filter(|id| !keep(&entries.hot[*id])) {
            Some(id) => {
                entries.hot[id].list |= AWAY | NEXT;
                id
            }
            None => {
                let id = self.policy.victim(entries, keep, LOOK)?;
                self.policy.remove(entries, id);
                let list = &mut entries.hot[id].list;
                *list = (*list & !AWAY) | NEXT;
                self.leaves.push_front(&mut entries.side, id);
                id
            }
        };
        self.chosen += 1;
        self.last = Some((id, entries.side[id].serial));
        Some(id)
    }

    fn stays(&mut self, entries: &mut Entries, id: u32) {
        let mut at = Some(id);
        while let Some(id) = at.filter(|id| chosen(&entries.hot[*id])) {
            let leaf = listed(&entries.hot[id]);
            self.take_back(entries, id);
            if leaf {
                self.policy.insert(entries, id, Place::Cold);
            }
            at = entries.parent(id);
        }
    }

    fn chosen(&self) -> u64 {
        self.chosen
    }

    fn coldest(&self) -> Option<u32> {
        self.leaves.back().or_else(|| self.policy.coldest())
    }

    fn len(&self) -> u64 {
        u64::from(self.leaves.len()) + self.policy.len()
    }

    fn all(&self, entries: &Entries) -> Vec<u32> {
        let mut all = self.leaves.all(&entries.side);
        all.extend(self.policy.all(entries));
        all
    }
}
