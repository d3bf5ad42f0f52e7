//! S3-FIFO (Yang et al., SOSP 2023): new entries wait in a small queue, those used there move to the main one, and a ghost
//! remembers what the small queue dropped, so that it goes to main at once when it comes back.
//!
//! An entry that stopped being a leaf and is one again returns to the queue it was in, at the end where the next look at it
//! comes soon; its uses then decide. Deliberately absent: ageing by time.

use super::{AWAY, Eviction, Place};
use crate::ids::low64;
use crate::index::{ByPolicy, Entries, Entry};
use crate::list::List;

const SMALL: u8 = 1;
const MAIN: u8 = 2;
/// The small queue's share of all entries: one in so many.
const SMALL_SHARE: u32 = 10;
/// Uses in the small queue that lead to the main one.
const PROMOTE: u8 = 1;
const GHOST_LEAST: usize = 1024;
const GHOST_MOST: usize = 1 << 20;

pub(super) struct S3Fifo {
    small: List<ByPolicy>,
    main: List<ByPolicy>,
    ghost: Ghost,
}

impl S3Fifo {
    pub(super) fn new() -> Self {
        S3Fifo {
            small: List::new(),
            main: List::new(),
            ghost: Ghost::default(),
        }
    }

    fn list(&mut self, which: u8) -> &mut List<ByPolicy> {
        if which == SMALL {
            &mut self.small
        } else {
            &mut self.main
        }
    }

    fn move_to_front(&mut self, entries: &mut Entries, id: u32, which: u8) {
        let from = entries.hot[id].list;
        self.list(from).remove(&mut entries.side, id);
        entries.hot[id].list = which;
        self.list(which).push_front(&mut entries.side, id);
    }

    /// Looks at one entry; the victim, if it is one.
    fn judge(&mut self, entries: &mut Entries, keep: bool, id: u32) -> Option<u32> {
        let entry = &mut entries.hot[id];
        let (which, uses) = (entry.list, entry.uses);
        match which {
            _ if keep => self.move_to_front(entries, id, which),
            SMALL if uses >= PROMOTE => {
                entry.uses = 0;
                self.move_to_front(entries, id, MAIN);
            }
            MAIN if uses > 0 => {
                entry.uses -= 1;
                self.move_to_front(entries, id, MAIN);
            }
            _ => return Some(id),
        }
        None
    }
}

impl Eviction for S3Fifo {
    fn insert(&mut self, entries: &mut Entries, id: u32, place: Place) {
        let entry = &mut entries.hot[id];
        let was = entry.list & !AWAY;
        let which = match (place, was) {
            (_, SMALL | MAIN) => was,
            _ if self.ghost.has(&entry.hash) => MAIN,
            _ => SMALL,
        };
        entry.list = which;
        match place {
            Place::New => self.list(which).push_front(&mut entries.side, id),
            Place::Hot | Place::Cold => self.list(which).push_back(&mut entries.side, id),
        }
        if place == Place::Hot {
            entries.hot[id].used();
        }
    }

    fn touch(&mut self, _entries: &mut Entries, _id: u32) {}

    fn remove(&mut self, entries: &mut Entries, id: u32) {
        let which = entries.hot[id].list;
        self.list(which).remove(&mut entries.side, id);
        entries.hot[id].list |= AWAY;
    }

    fn victim(
        &mut self,
        entries: &mut Entries,
        keep: &mut dyn FnMut(&Entry) -> bool,
        most: u32,
    ) -> Option<u32> {
        let total = self.small.len() + self.main.len();
        // An entry is looked at four times at most before its uses are gone, then the scan's limit counts what is kept.
        // What must be kept goes to the front of its queue: a queue of which everything was kept has nothing left to give.
        let (mut kept_small, mut kept_main) = (0, 0);
        for _ in 0..total.saturating_mul(5).min(most) {
            let left_small = self.small.len().saturating_sub(kept_small);
            let left_main = self.main.len().saturating_sub(kept_main);
            if left_small == 0 && left_main == 0 {
                return None;
            }
            let small = left_main == 0 || left_small > total / SMALL_SHARE;
            let id = if small {
                self.small.back()?
            } else {
                self.main.back()?
            };
            let kept = keep(&entries.hot[id]);
            if small {
                kept_small += u32::from(kept);
            } else {
                kept_main += u32::from(kept);
            }
            if let Some(victim) = self.judge(entries, kept, id) {
                if small {
                    self.ghost.add(&entries.hot[victim].hash, total);
                }
                return Some(victim);
            }
        }
        None
    }

    fn coldest(&self) -> Option<u32> {
        self.small.back().or(self.main.back())
    }

    fn len(&self) -> u64 {
        u64::from(self.small.len()) + u64::from(self.main.len())
    }

    fn all(&self, entries: &Entries) -> Vec<u32> {
        let mut all = self.small.all(&entries.side);
        all.extend(self.main.all(&entries.side));
        all
    }
}

/// What the small queue dropped lately: a direct-mapped table of fingerprints with the time they came in, counted in drops.
#[derive(Default)]
struct Ghost {
    table: Vec<(u32, u32)>,
    clock: u32,
}

impl Ghost {
    fn at(&self, hash: &[u8; 32]) -> (usize, u32) {
        let low = low64(hash).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        (
            (low >> 32) as usize & (self.table.len() - 1),
            low as u32 | 1,
        )
    }

    fn add(&mut self, hash: &[u8; 32], entries: u32) {
        let wanted = (entries as usize)
            .next_power_of_two()
            .clamp(GHOST_LEAST, GHOST_MOST);
        if self.table.len() < wanted {
            self.table = vec![(0, 0); wanted];
        }
        self.clock = self.clock.wrapping_add(1);
        let (at, print) = self.at(hash);
        self.table[at] = (print, self.clock);
    }

    fn has(&self, hash: &[u8; 32]) -> bool {
        if self.table.is_empty() {
            return false;
        }
        let (at, print) = self.at(hash);
        let (found, when) = self.table[at];
        found == print && self.clock.wrapping_sub(when) as usize <= self.table.len()
    }
}
