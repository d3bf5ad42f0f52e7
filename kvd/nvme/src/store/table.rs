//! Which places hold a block, and which record says so: eight bytes a place. Keys are not kept: core has them, and a checkpoint
//! is made from the records on the device. Deliberately absent: which place to take next (core).

use kvd_core::tier::{Place, STORE_PAGE, StoreShape};

const SEQ_BITS: u32 = 48;
const SEQ_MASK: u64 = (1 << SEQ_BITS) - 1;
const SEEN: u64 = 1 << 63;

/// Sequence number of a record, 48 bits, and the slot of its namespace, 8 bits. 0: no block there.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Entry(u64);

impl Entry {
    const NONE: Entry = Entry(0);

    fn new(seq: u64, name: u32) -> Self {
        assert!(seq > 0 && seq <= SEQ_MASK && name < 256);
        Entry(seq | u64::from(name) << SEQ_BITS)
    }

    fn seq(self) -> u64 {
        self.0 & SEQ_MASK
    }

    fn name(self) -> u32 {
        ((self.0 >> SEQ_BITS) & 0xff) as u32
    }
}

#[derive(Clone, Default)]
struct Segment {
    /// Bytes from place to place; 0 while nothing is there.
    stride: u64,
    live: u32,
    /// Highest sequence number of what was stored here.
    newest: u64,
    entries: Vec<Entry>,
}

/// All places of a store.
pub(crate) struct Table {
    segment_bytes: u64,
    segments: Vec<Segment>,
    live: u64,
}

impl Table {
    pub(crate) fn new(shape: StoreShape) -> Self {
        Table {
            segment_bytes: shape.segment_bytes,
            segments: vec![Segment::default(); shape.segments as usize],
            live: 0,
        }
    }

    /// Blocks that are there.
    pub(crate) fn live(&self) -> u64 {
        self.live
    }

    fn entry(&self, place: Place) -> Entry {
        let segment = &self.segments[place.segment as usize];
        if segment.stride != place.stride {
            return Entry::NONE;
        }
        segment.entries[place.index as usize]
    }

    /// The record that says what is there: its number and its namespace's slot.
    pub(crate) fn get(&self, place: Place) -> Option<(u64, u32)> {
        let entry = self.entry(place);
        (entry.seq() > 0).then_some((entry.seq(), entry.name()))
    }

    /// Whether a block may be written there: nothing is there, and all else in the segment is of the same stride.
    pub(crate) fn is_free(&self, place: Place) -> bool {
        let segment = &self.segments[place.segment as usize];
        segment.stride == 0 || segment.stride == place.stride && self.entry(place) == Entry::NONE
    }

    /// Takes what a record says, if no newer one has been seen. A block of another stride ends all older ones of the segment.
    pub(crate) fn store(&mut self, place: Place, seq: u64, name: u32) {
        assert!(place.stride.is_multiple_of(STORE_PAGE) && seq > 0);
        let segment = &mut self.segments[place.segment as usize];
        if segment.stride != place.stride {
            if segment.newest > seq {
                return;
            }
            self.live -= u64::from(segment.live);
            let places = (self.segment_bytes / place.stride) as usize;
            segment.entries = vec![Entry::NONE; places];
            (segment.stride, segment.live) = (place.stride, 0);
        }
        segment.newest = segment.newest.max(seq);
        let entry = &mut segment.entries[place.index as usize];
        if entry.seq() < seq {
            if *entry == Entry::NONE {
                segment.live += 1;
                self.live += 1;
            }
            *entry = Entry::new(seq, name);
        }
    }

    /// Forgets what is there, if it is older than this. Gives the namespace's slot of what was there.
    pub(crate) fn drop_older(&mut self, place: Place, seq: u64) -> Option<u32> {
        let (there, name) = self.get(place)?;
        if there >= seq {
            return None;
        }
        self.clear(place);
        Some(name)
    }

    fn clear(&mut self, place: Place) {
        let segment = &mut self.segments[place.segment as usize];
        segment.entries[place.index as usize] = Entry::NONE;
        segment.live -= 1;
        self.live -= 1;
        if segment.live == 0 {
            segment.stride = 0;
            segment.entries = Vec::new();
        }
    }

    /// Marks the block that the record `seq` put there as told. False if that is not what is there, or it was told before.
    pub(crate) fn tell(&mut self, place: Place, seq: u64) -> bool {
        let segment = &mut self.segments[place.segment as usize];
        if segment.stride != place.stride {
            return false;
        }
        let entry = &mut segment.entries[place.index as usize];
        let first = entry.seq() == seq && entry.0 & SEEN == 0;
        if first {
            entry.0 |= SEEN;
        }
        first
    }

    /// Forgets what was not told, and the marks.
    pub(crate) fn keep_told(&mut self) {
        for segment in &mut self.segments {
            for entry in &mut segment.entries {
                if entry.0 & SEEN != 0 {
                    entry.0 &= !SEEN;
                } else if *entry != Entry::NONE {
                    *entry = Entry::NONE;
                    segment.live -= 1;
                    self.live -= 1;
                }
            }
            if segment.live == 0 {
                segment.stride = 0;
                segment.entries = Vec::new();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(segment: u32, index: u32, pages: u64) -> Place {
        Place {
            segment,
            index,
            stride: pages * STORE_PAGE,
        }
    }

    #[test]
    fn the_newest_record_of_a_place_wins() {
        let shape = StoreShape {
            segments: 2,
            segment_bytes: 1 << 20,
        };
        let mut table = Table::new(shape);
        table.store(place(0, 3, 2), 5, 1);
        table.store(place(0, 3, 2), 4, 2);
        assert_eq!(table.get(place(0, 3, 2)), Some((5, 1)));
        assert_eq!(table.drop_older(place(0, 3, 2), 5), None);
        assert!(!table.is_free(place(0, 4, 3)) && table.is_free(place(0, 4, 2)));
        // Another stride: what was there is gone, and older records of the first stride come too late.
        table.store(place(0, 0, 8), 9, 1);
        table.store(place(0, 4, 2), 6, 1);
        assert_eq!((table.live(), table.get(place(0, 3, 2))), (1, None));
        assert!(table.tell(place(0, 0, 8), 9) && !table.tell(place(0, 0, 8), 9));
        table.store(place(1, 0, 8), 10, 1);
        table.keep_told();
        assert_eq!((table.live(), table.get(place(1, 0, 8))), (1, None));
        assert_eq!(table.drop_older(place(0, 0, 8), 11), Some(1));
        assert_eq!(table.live(), 0);
        assert!(table.is_free(place(0, 4, 3)));
    }
}
