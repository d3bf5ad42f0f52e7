//! Extents and their slots. Slot records are made as slots are first given out, so an unused extent costs nothing, and are
//! kept when the extent changes class, because generation words must never decrease. Deliberately absent: which extent to take; the pool decides.

use std::ops::{Index, IndexMut};

use super::{NO_CLASS, SlotState};
use crate::api::NIL;
use crate::list::{Link, Linked};

/// One slot.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Slot {
    /// Its generation.
    pub(crate) word: u64,
    /// The entry (Resident) or the fill (Reserved, Filling, Quarantined) that has it; the next free slot (Free).
    pub(crate) owner: u32,
    pub(crate) state: SlotState,
}

/// Whether an extent's memory is there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum ExtentState {
    /// Not yet.
    #[default]
    Pending,
    /// It can't be had.
    Failed,
    /// It is.
    Ready,
}

/// A piece of the arena with slots of one size.
#[derive(Debug)]
pub(crate) struct Extent {
    pub(crate) state: ExtentState,
    /// A former daemon's writers may still write here.
    pub(crate) held: bool,
    /// Being emptied in order to be refilled; in no list.
    pub(crate) suspect: bool,
    pub(crate) class: u16,
    pub(crate) slots: Vec<Slot>,
    /// Slots of the present class from here on have not been given out yet.
    pub(crate) fresh: u32,
    /// How many slots the present class makes of it.
    pub(crate) room: u32,
    /// First free slot below `fresh`.
    pub(crate) free: u32,
    /// Slots that are not free.
    pub(crate) used: u32,
    /// Slots that somebody may be writing.
    pub(crate) writing: u32,
    /// Blocks with pins.
    pub(crate) pinned: u32,
    /// Corrupt blocks since the last good one.
    pub(crate) streak: u32,
    /// Step that last touched one of its blocks.
    pub(crate) touched: u32,
    link: Link,
}

/// Lists of extents with room.
#[derive(Debug)]
pub(crate) struct ByRoom;

impl Linked<ByRoom> for Extent {
    fn link(&self) -> &Link {
        &self.link
    }
    fn link_mut(&mut self) -> &mut Link {
        &mut self.link
    }
}

impl Extent {
    fn new() -> Self {
        Extent {
            state: ExtentState::Pending,
            held: false,
            suspect: false,
            class: NO_CLASS,
            slots: Vec::new(),
            fresh: 0,
            room: 0,
            free: NIL,
            used: 0,
            writing: 0,
            pinned: 0,
            streak: 0,
            touched: 0,
            link: Link::default(),
        }
    }

    /// Remembers a word that the slot must go on from.
    pub(super) fn keep_word(&mut self, local: u32, word: u64) {
        if self.slots.len() <= local as usize {
            self.slots.resize(local as usize + 1, Slot::default());
        }
        self.slots[local as usize].word = word;
    }

    /// A free slot.
    pub(super) fn pop(&mut self) -> Option<u32> {
        if self.free != NIL {
            let local = self.free;
            self.free = self.slots[local as usize].owner;
            return Some(local);
        }
        if self.fresh == self.room {
            return None;
        }
        self.fresh += 1;
        if self.slots.len() < self.fresh as usize {
            self.slots.push(Slot::default());
        }
        Some(self.fresh - 1)
    }

    pub(super) fn push(&mut self, local: u32) {
        self.slots[local as usize].owner = self.free;
        self.free = local;
    }
}

/// All extents of an arena.
#[derive(Debug)]
pub(crate) struct Extents {
    list: Vec<Extent>,
    shift: u32,
}

impl Extents {
    /// `per_extent` generation words each: a power of two.
    pub(super) fn new(count: u32, per_extent: u32) -> Self {
        let list = (0..count).map(|_| Extent::new()).collect();
        Extents {
            list,
            shift: per_extent.trailing_zeros(),
        }
    }

    pub(crate) fn len(&self) -> u32 {
        self.list.len() as u32
    }

    pub(crate) fn iter(&self) -> std::slice::Iter<'_, Extent> {
        self.list.iter()
    }

    /// The extent of a slot index, if there is one.
    pub(crate) fn of(&self, slot: u32) -> Option<u32> {
        let id = slot >> self.shift;
        (id < self.len()).then_some(id)
    }

    /// A block in this slot was touched in step `stamp`.
    #[inline]
    pub(crate) fn touch(&mut self, slot: u32, stamp: u32) {
        if let Some(extent) = self.list.get_mut((slot >> self.shift) as usize) {
            extent.touched = stamp;
        }
    }

    pub(crate) fn local(&self, slot: u32) -> u32 {
        slot & ((1 << self.shift) - 1)
    }

    pub(crate) fn slot(&self, id: u32, local: u32) -> u32 {
        (id << self.shift) | local
    }
}

impl Index<u32> for Extents {
    type Output = Extent;
    fn index(&self, id: u32) -> &Extent {
        &self.list[id as usize]
    }
}

impl IndexMut<u32> for Extents {
    fn index_mut(&mut self, id: u32) -> &mut Extent {
        &mut self.list[id as usize]
    }
}
