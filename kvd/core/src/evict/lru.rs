//! Least recently used: one list, touched entries go to its front, victims come from its back.
//! Deliberately absent: any resistance to scans; that is what S3-FIFO is for.

use super::{AWAY, Eviction, Place};
use crate::index::{ByPolicy, Entries, Entry};
use crate::list::List;

const LISTED: u8 = 1;

pub(super) struct Lru {
    list: List<ByPolicy>,
}

impl Lru {
    pub(super) fn new() -> Self {
        Lru { list: List::new() }
    }
}

impl Eviction for Lru {
    fn insert(&mut self, entries: &mut Entries, id: u32, place: Place) {
        entries.hot[id].list = LISTED;
        match place {
            Place::New | Place::Hot => self.list.push_front(&mut entries.side, id),
            Place::Cold => self.list.push_back(&mut entries.side, id),
        }
    }

    fn touch(&mut self, entries: &mut Entries, id: u32) {
        self.list.remove(&mut entries.side, id);
        self.list.push_front(&mut entries.side, id);
    }

    fn remove(&mut self, entries: &mut Entries, id: u32) {
        entries.hot[id].list |= AWAY;
        self.list.remove(&mut entries.side, id);
    }

    fn victim(
        &mut self,
        entries: &mut Entries,
        keep: &mut dyn FnMut(&Entry) -> bool,
        most: u32,
    ) -> Option<u32> {
        for _ in 0..self.list.len().min(most) {
            let id = self.list.back()?;
            if !keep(&entries.hot[id]) {
                return Some(id);
            }
            self.touch(entries, id);
        }
        None
    }

    fn coldest(&self) -> Option<u32> {
        self.list.back()
    }

    fn len(&self) -> u64 {
        self.list.len().into()
    }

    fn all(&self, entries: &Entries) -> Vec<u32> {
        self.list.all(&entries.side)
    }
}
