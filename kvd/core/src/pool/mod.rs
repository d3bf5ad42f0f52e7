//! Slots of one tenant's arena: extents, the size classes they are cut for, free places, generation words.
//!
//! A generation word is even while nobody may write its slot and odd while somebody may. It never decreases, whatever class
//! its extent has. Every change of a word goes out as `SetGeneration` before anything that depends on it.
//! Deliberately absent: who holds a slot and why; the bytes.

mod extent;
#[cfg(test)]
mod tests;

use crate::api::{NIL, Output};
use crate::evict::{Eviction, choosing, policy};
use crate::geometry::ArenaShape;
use crate::ids::TenantId;
use crate::list::List;
use crate::settings::EvictionPolicy;
use crate::status::{ExtentCounts, SlotCounts};

pub(crate) use extent::{Extent, ExtentState, Extents, Slot};

/// An extent without a size class.
pub(crate) const NO_CLASS: u16 = u16::MAX;

/// Which state a slot is in; exactly one. Sealed and Draining last no time while there is one tier, so they are absent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum SlotState {
    /// Nobody's. The word is even.
    #[default]
    Free,
    /// Given to an instance; no part has come. Odd.
    Reserved,
    /// Some parts have come. Odd.
    Filling,
    /// Visible. Even.
    Resident,
    /// Given up, but some writer may still write. Odd. With no owner: a store that is off.
    Quarantined,
}

impl SlotState {
    /// Whether somebody may be writing.
    pub(crate) fn writable(self) -> bool {
        matches!(
            self,
            SlotState::Reserved | SlotState::Filling | SlotState::Quarantined
        )
    }

    /// Legal steps of a slot's life.
    fn leads_to(self, next: SlotState) -> bool {
        use SlotState::*;
        match self {
            Free => next == Reserved,
            Reserved => matches!(next, Filling | Resident | Quarantined | Free),
            Filling => matches!(next, Resident | Quarantined | Free),
            Quarantined | Resident => next == Free,
        }
    }
}

impl SlotCounts {
    fn writable(&self) -> u64 {
        self.reserved + self.filling + self.quarantined
    }

    pub(crate) fn of(&mut self, state: SlotState) -> &mut u64 {
        match state {
            SlotState::Free => &mut self.free,
            SlotState::Reserved => &mut self.reserved,
            SlotState::Filling => &mut self.filling,
            SlotState::Resident => &mut self.resident,
            SlotState::Quarantined => &mut self.quarantined,
        }
    }
}

/// One slot size.
pub(crate) struct Class {
    pub(crate) slot_bytes: u64,
    /// Slots of one extent.
    pub(crate) per_extent: u32,
    pub(crate) extents: u32,
    pub(crate) counts: SlotCounts,
    pub(crate) policy: Box<dyn Eviction>,
    /// Groups of known namespaces that use it. None and no extents: its place may be reused.
    pub(crate) groups: u32,
    /// Extents with free slots, emptiest at the back.
    partial: List<extent::ByRoom>,
}

/// All slots of one arena.
pub(crate) struct Pool {
    pub(crate) tenant: TenantId,
    pub(crate) shape: ArenaShape,
    pub(crate) extents: Extents,
    pub(crate) classes: Vec<Class>,
    kind: EvictionPolicy,
    /// Its policies choose what goes before it has to.
    choosing: bool,
    /// Usable extents without a class.
    unclassed: List<extent::ByRoom>,
    /// Classed extents all of whose slots are free.
    empty: u32,
    /// Extents that can hold blocks.
    usable: u32,
}

impl Pool {
    /// A pool over a valid shape; no extent is ready.
    pub(crate) fn new(
        tenant: TenantId,
        shape: ArenaShape,
        kind: EvictionPolicy,
        choosing: bool,
    ) -> Self {
        let extents = Extents::new(shape.extents(), shape.slots_per_extent);
        Pool {
            tenant,
            shape,
            extents,
            classes: Vec::new(),
            kind,
            choosing,
            unclassed: List::new(),
            empty: 0,
            usable: 0,
        }
    }

    /// Takes over a former table: words go on above the old ones; extents with odd words are held out. Words keep their
    /// parity, so that a further successor sees the same. Returns whether anything is held.
    pub(crate) fn adopt(&mut self, words: &[u64], out: &mut Vec<Output>) -> bool {
        let mut held = false;
        for (slot, old) in (0u32..).zip(words).filter(|(_, word)| **word != 0) {
            let Some(extent) = self.extents.of(slot) else {
                break;
            };
            let word = old.saturating_add(2);
            let local = self.extents.local(slot);
            self.extents[extent].keep_word(local, word);
            if word % 2 == 1 {
                self.extents[extent].held = true;
                held = true;
            }
            out.push(Output::SetGeneration {
                tenant: self.tenant,
                slot,
                word,
            });
        }
        held
    }

    /// All former writers are terminal: held extents are usable again.
    pub(crate) fn lift_holds(&mut self, out: &mut Vec<Output>) {
        for id in 0..self.extents.len() {
            if !self.extents[id].held {
                continue;
            }
            self.extents[id].held = false;
            for local in 0..self.extents[id].slots.len() as u32 {
                let slot = self.extents.slot(id, local);
                let word = &mut self.extents[id].slots[local as usize].word;
                if *word % 2 == 1 {
                    *word += 1;
                    let word = *word;
                    out.push(Output::SetGeneration {
                        tenant: self.tenant,
                        slot,
                        word,
                    });
                }
            }
            self.usable += u32::from(self.extents[id].state == ExtentState::Ready);
            self.offer(id);
        }
    }

    /// Puts a usable extent without a class on offer.
    fn offer(&mut self, id: u32) {
        let extent = &self.extents[id];
        if extent.state == ExtentState::Ready && !extent.held {
            self.unclassed.push_back(&mut self.extents, id);
        }
    }

    /// The extent's pages are there (or `failed`). Repeated or unknown news is ignored.
    pub(crate) fn populated(&mut self, id: u32, failed: bool) {
        let known = id < self.extents.len();
        if known && self.extents[id].state == ExtentState::Pending {
            let extent = &mut self.extents[id];
            extent.state = if failed {
                ExtentState::Failed
            } else {
                ExtentState::Ready
            };
            extent.streak = 0;
            self.usable += u32::from(!failed && !extent.held);
            self.offer(id);
        }
    }

    /// The class of this slot size, made if need be, with one group more; `None` when classes are used up.
    pub(crate) fn join_class(&mut self, slot_bytes: u64) -> Option<u16> {
        let same = self
            .classes
            .iter()
            .position(|class| class.slot_bytes == slot_bytes);
        let dead = || {
            self.classes
                .iter()
                .position(|class| class.groups == 0 && class.extents == 0)
        };
        let at = match same.or_else(dead) {
            Some(at) => at,
            None if self.classes.len() < usize::from(NO_CLASS) => self.classes.len(),
            None => return None,
        };
        if same.is_none() {
            let class = Class {
                slot_bytes,
                per_extent: (self.shape.extent_bytes / slot_bytes) as u32,
                extents: 0,
                counts: SlotCounts::default(),
                policy: match self.choosing {
                    true => choosing(self.kind),
                    false => policy(self.kind),
                },
                groups: 0,
                partial: List::new(),
            };
            match self.classes.get_mut(at) {
                Some(place) => *place = class,
                None => self.classes.push(class),
            }
        }
        self.classes[at].groups += 1;
        Some(at as u16)
    }

    /// A group of this class is forgotten. The last one gives the class's empty extents back.
    pub(crate) fn leave_class(&mut self, class: u16) {
        self.classes[usize::from(class)].groups -= 1;
        if self.classes[usize::from(class)].groups == 0 {
            for id in 0..self.extents.len() {
                if self.extents[id].class == class && self.extents[id].used == 0 {
                    self.unclass(id);
                    self.offer(id);
                }
            }
        }
    }

    /// A free slot of this class without evicting anything: from its own extents, else from an extent that nobody uses.
    pub(crate) fn take(&mut self, class: u16, owner: u32, out: &mut Vec<Output>) -> Option<u32> {
        let own = self.classes[usize::from(class)].partial.front();
        let id = own.or_else(|| self.claim_extent(class))?;
        let local = self.extents[id].pop()?;
        let slot = self.extents.slot(id, local);
        let extent = &mut self.extents[id];
        extent.used += 1;
        self.empty -= u32::from(extent.used == 1);
        if extent.used == self.classes[usize::from(class)].per_extent {
            self.classes[usize::from(class)]
                .partial
                .remove(&mut self.extents, id);
        }
        self.set_state(slot, SlotState::Reserved, owner, out);
        Some(slot)
    }

    /// Gives the class an extent that is usable and empty.
    fn claim_extent(&mut self, class: u16) -> Option<u32> {
        let id = match self.unclassed.front() {
            Some(id) => {
                self.unclassed.remove(&mut self.extents, id);
                id
            }
            None if self.empty > 0 => {
                let usable = |e: &Extent| {
                    e.class != NO_CLASS && e.class != class && e.used == 0 && !e.suspect
                };
                let id = (0..self.extents.len()).find(|id| usable(&self.extents[*id]))?;
                self.unclass(id);
                id
            }
            None => return None,
        };
        let place = &mut self.classes[usize::from(class)];
        place.extents += 1;
        place.counts.free += u64::from(place.per_extent);
        let extent = &mut self.extents[id];
        extent.class = class;
        extent.room = place.per_extent;
        extent.fresh = 0;
        extent.free = NIL;
        extent.streak = 0;
        self.empty += 1;
        place.partial.push_front(&mut self.extents, id);
        Some(id)
    }

    /// Takes an empty extent's class away.
    pub(crate) fn unclass(&mut self, id: u32) {
        let class = self.extents[id].class;
        assert!(
            class != NO_CLASS && self.extents[id].used == 0,
            "only an empty extent moves"
        );
        let place = &mut self.classes[usize::from(class)];
        if !self.extents[id].suspect {
            place.partial.remove(&mut self.extents, id);
        }
        place.extents -= 1;
        place.counts.free -= u64::from(place.per_extent);
        self.extents[id].class = NO_CLASS;
        self.empty -= 1;
    }

    /// Frees a slot. From Resident its word rises by two, so that readers see it before anybody else gets the slot; from a
    /// writable state it becomes even. A suspect extent that is empty by this goes to be refilled.
    pub(crate) fn release(&mut self, slot: u32, out: &mut Vec<Output>) {
        self.set_state(slot, SlotState::Free, NIL, out);
        let Some(id) = self.extents.of(slot) else {
            return;
        };
        let local = self.extents.local(slot);
        let full = self.classes[usize::from(self.extents[id].class)].per_extent;
        let extent = &mut self.extents[id];
        extent.push(local);
        let (was_full, suspect, class) = (extent.used == full, extent.suspect, extent.class);
        extent.used -= 1;
        let empty = extent.used == 0;
        self.empty += u32::from(empty);
        let partial = &mut self.classes[usize::from(class)].partial;
        if suspect {
            if empty {
                self.refill(id, out);
            }
            return;
        }
        if was_full {
            partial.push_front(&mut self.extents, id);
        }
        if empty {
            partial.remove(&mut self.extents, id);
            partial.push_back(&mut self.extents, id);
        }
    }

    /// Moves a slot to another state and its word with it.
    pub(crate) fn set_state(
        &mut self,
        slot: u32,
        next: SlotState,
        owner: u32,
        out: &mut Vec<Output>,
    ) {
        let Some(id) = self.extents.of(slot) else {
            return;
        };
        let local = self.extents.local(slot);
        let extent = &mut self.extents[id];
        let place = &mut extent.slots[local as usize];
        let before = place.state;
        assert!(
            before.leads_to(next),
            "a slot went from {before:?} to {next:?}"
        );
        place.state = next;
        place.owner = owner;
        // Never wraps in practice: a word that rises a million times a second lasts for 500,000 years.
        let step = match (before.writable(), next.writable()) {
            (false, true) | (true, false) => 1,
            (true, true) => 0,
            (false, false) => 2,
        };
        place.word += step;
        let word = place.word;
        debug_assert_eq!(word % 2 == 1, next.writable());
        extent.writing += u32::from(next.writable());
        extent.writing -= u32::from(before.writable());
        let counts = &mut self.classes[usize::from(extent.class)].counts;
        *counts.of(before) -= 1;
        *counts.of(next) += 1;
        if step > 0 {
            out.push(Output::SetGeneration {
                tenant: self.tenant,
                slot,
                word,
            });
        }
    }

    /// What a touch of a block of this class needs.
    pub(crate) fn recency(&mut self, class: u16) -> (&mut Extents, &mut dyn Eviction) {
        (
            &mut self.extents,
            &mut *self.classes[usize::from(class)].policy,
        )
    }

    /// Says who fills a slot that was just taken, and in which step.
    pub(crate) fn set_owner(&mut self, slot: u32, owner: u32, stamp: u32) {
        let Some(id) = self.extents.of(slot) else {
            return;
        };
        let local = self.extents.local(slot);
        let extent = &mut self.extents[id];
        extent.touched = stamp;
        extent.slots[local as usize].owner = owner;
    }

    /// Takes an extent out of use after corrupt blocks. Once its slots are free it is refilled.
    pub(crate) fn suspect(&mut self, id: u32, out: &mut Vec<Output>) {
        let extent = &self.extents[id];
        let (class, used) = (extent.class, extent.used);
        if extent.suspect || class == NO_CLASS {
            return;
        }
        let place = &mut self.classes[usize::from(class)];
        if used < place.per_extent {
            place.partial.remove(&mut self.extents, id);
        }
        self.extents[id].suspect = true;
        self.usable -= 1;
        if used == 0 {
            self.refill(id, out);
        }
    }

    fn refill(&mut self, id: u32, out: &mut Vec<Output>) {
        self.unclass(id);
        let extent = &mut self.extents[id];
        extent.suspect = false;
        extent.state = ExtentState::Pending;
        out.push(Output::Refill {
            tenant: self.tenant,
            extent: id,
        });
    }

    /// The slot, if it is one of an extent's current class and has ever been given out.
    pub(crate) fn slot(&self, slot: u32) -> Option<&Slot> {
        let extent = &self.extents[self.extents.of(slot)?];
        let local = self.extents.local(slot);
        (extent.class != NO_CLASS && local < extent.fresh).then(|| &extent.slots[local as usize])
    }

    /// Where a slot begins, bytes from the start of the arena.
    pub(crate) fn offset(&self, slot: u32) -> u64 {
        let Some(id) = self.extents.of(slot) else {
            return 0;
        };
        let class = &self.classes[usize::from(self.extents[id].class)];
        u64::from(id) * self.shape.extent_bytes
            + u64::from(self.extents.local(slot)) * class.slot_bytes
    }

    /// Bytes of extents that can hold blocks.
    pub(crate) fn usable_bytes(&self) -> u64 {
        u64::from(self.usable) * self.shape.extent_bytes
    }

    /// Slots that this class can have without evicting anything.
    pub(crate) fn free_slots(&self, class: u16) -> u64 {
        let class = &self.classes[usize::from(class)];
        class.counts.free + u64::from(self.unclassed.len()) * u64::from(class.per_extent)
    }

    /// Bytes of slots that somebody may be writing.
    pub(crate) fn writable_bytes(&self) -> u64 {
        let classes = self.classes.iter();
        let bytes = classes.map(|class| class.counts.writable() * class.slot_bytes);
        bytes.sum()
    }

    /// Whether nobody may be writing more than half of a class's slots, with one more, or it gets another extent for nothing.
    pub(crate) fn has_half(&self, class: u16) -> bool {
        let counts = &self.classes[usize::from(class)].counts;
        self.unclassed.front().is_some() || counts.writable() < counts.total() / 2
    }

    /// Extents by what they can be used for.
    pub(crate) fn extent_counts(&self) -> ExtentCounts {
        let mut counts = ExtentCounts::default();
        for extent in self.extents.iter() {
            *match extent.state {
                _ if extent.held => &mut counts.held_out,
                _ if extent.suspect => &mut counts.refilling,
                ExtentState::Pending => &mut counts.pending,
                ExtentState::Failed => &mut counts.failed,
                ExtentState::Ready if extent.class == NO_CLASS => &mut counts.free,
                ExtentState::Ready => &mut counts.classed,
            } += 1;
        }
        counts
    }

    /// Every extent is in the list it belongs in, and in no other. For checks.
    pub(crate) fn check_lists(&self) {
        let extents = || (0..).zip(self.extents.iter());
        let listed = |list: &List<extent::ByRoom>| {
            let mut all = list.all(&self.extents);
            all.sort_unstable();
            all
        };
        let offered = |e: &Extent| e.state == ExtentState::Ready && !e.held && e.class == NO_CLASS;
        let unclassed: Vec<u32> = extents()
            .filter(|(_, e)| offered(e))
            .map(|(id, _)| id)
            .collect();
        assert_eq!(listed(&self.unclassed), unclassed, "extents on offer");
        let empty = extents()
            .filter(|(_, e)| e.class != NO_CLASS && e.used == 0)
            .count();
        assert_eq!(self.empty as usize, empty, "empty extents");
        let counts = self.extent_counts();
        assert_eq!(self.usable, counts.free + counts.classed, "usable extents");
        for (at, class) in (0..).zip(&self.classes) {
            let room = |e: &Extent| e.class == at && e.used < class.per_extent && !e.suspect;
            let partial: Vec<u32> = extents()
                .filter(|(_, e)| room(e))
                .map(|(id, _)| id)
                .collect();
            assert_eq!(listed(&class.partial), partial, "extents with room");
            assert!(
                class.groups > 0 || class.counts.resident == 0,
                "blocks of no group"
            );
        }
    }
}
