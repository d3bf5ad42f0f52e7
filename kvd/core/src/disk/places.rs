//! Places of one store: segments, the strides they are cut for, which places are free.
//!
//! A segment holds blocks of one stride; an empty one takes another. A place that a dropped block had is free only once the
//! store has said that no restart brings the block back. Deliberately absent: what is in a place beyond the number of its entry.

use std::collections::{BTreeMap, BTreeSet};

use crate::api::NIL;
use crate::tier::{Place, STORE_PAGE, StoreShape};

/// The smallest stride: a header and one page.
const STRIDE_MIN: u64 = 2 * STORE_PAGE;

#[derive(Debug, Default)]
struct Segment {
    /// 0: it has none.
    stride: u64,
    /// Places from here on were never given out.
    fresh: u32,
    free: Vec<u32>,
    /// Places that are not free.
    used: u32,
    /// By place: the entry that has it, [`NIL`] while none has.
    owners: Vec<u32>,
    /// Places that an entry has.
    owned: u32,
    /// Places that can't be used: the segment never becomes empty.
    lost: u32,
    /// Step that last touched one of its blocks.
    touched: u32,
}

/// All places. A place is named by a u32, "slot", as in an arena.
#[derive(Debug)]
pub(crate) struct Places {
    pub(crate) shape: StoreShape,
    shift: u32,
    segments: Vec<Segment>,
    /// By stride: segments with room.
    open: BTreeMap<u64, BTreeSet<u32>>,
    /// Segments without a stride.
    unused: BTreeSet<u32>,
    /// Places that can't be used until the next start: what became of them is not known.
    pub(crate) lost: u64,
}

impl Places {
    /// All free. `None` when a store of this shape would have more places than can be named.
    pub(crate) fn new(shape: StoreShape) -> Option<Self> {
        if !shape.segment_bytes.is_power_of_two() || shape.segment_bytes < STRIDE_MIN {
            return None;
        }
        let shift = (shape.segment_bytes / STRIDE_MIN).trailing_zeros();
        u32::try_from((u64::from(shape.segments) + 1) << shift).ok()?;
        Some(Places {
            shape,
            shift,
            segments: (0..shape.segments).map(|_| Segment::default()).collect(),
            open: BTreeMap::new(),
            unused: (0..shape.segments).collect(),
            lost: 0,
        })
    }

    /// Places of this stride that the whole store would have.
    pub(crate) fn most(&self, stride: u64) -> u64 {
        u64::from(self.room(stride)) * u64::from(self.shape.segments)
    }

    fn room(&self, stride: u64) -> u32 {
        u32::try_from(self.shape.segment_bytes / stride.max(1)).unwrap_or(u32::MAX)
    }

    fn split(&self, slot: u32) -> (u32, u32) {
        (slot >> self.shift, slot & ((1 << self.shift) - 1))
    }

    fn slot(&self, segment: u32, index: u32) -> u32 {
        (segment << self.shift) | index
    }

    pub(crate) fn place(&self, slot: u32) -> Place {
        let (segment, index) = self.split(slot);
        Place {
            segment,
            index,
            stride: self.segments[segment as usize].stride,
        }
    }

    /// A free place for a block of this stride.
    pub(crate) fn take(&mut self, stride: u64) -> Option<u32> {
        let room = self.room(stride);
        if room == 0 {
            return None;
        }
        let open = self.open.get(&stride).and_then(BTreeSet::first).copied();
        let segment = match open {
            Some(segment) => segment,
            None => {
                let segment = self.unused.pop_first()?;
                self.cut(segment, stride);
                segment
            }
        };
        let found = &mut self.segments[segment as usize];
        let index = found.free.pop().unwrap_or_else(|| {
            found.fresh += 1;
            found.owners.push(NIL);
            found.fresh - 1
        });
        found.used += 1;
        if found.used == room {
            self.close(segment);
        }
        Some(self.slot(segment, index))
    }

    fn cut(&mut self, segment: u32, stride: u64) {
        let found = &mut self.segments[segment as usize];
        debug_assert!(found.used == 0, "only an empty segment is cut anew");
        *found = Segment {
            stride,
            touched: found.touched,
            ..Segment::default()
        };
        self.open.entry(stride).or_default().insert(segment);
    }

    fn close(&mut self, segment: u32) {
        let stride = self.segments[segment as usize].stride;
        if let Some(open) = self.open.get_mut(&stride) {
            open.remove(&segment);
            if open.is_empty() {
                self.open.remove(&stride);
            }
        }
    }

    /// Takes the place that a recovered block has; `None` when that can't be.
    pub(crate) fn claim(&mut self, place: Place) -> Option<u32> {
        let room = self.room(place.stride);
        let fits = place.segment < self.shape.segments
            && place.stride >= STRIDE_MIN
            && place.stride.is_multiple_of(STORE_PAGE)
            && place.index < room;
        if !fits {
            return None;
        }
        if self.unused.remove(&place.segment) {
            self.cut(place.segment, place.stride);
        }
        let slot = self.slot(place.segment, place.index);
        let found = &mut self.segments[place.segment as usize];
        if found.stride != place.stride {
            return None;
        }
        if place.index < found.fresh {
            let at = found.free.iter().position(|free| *free == place.index)?;
            found.free.swap_remove(at);
        } else {
            found.free.extend(found.fresh..place.index);
            found.fresh = place.index + 1;
            found.owners.resize(found.fresh as usize, NIL);
        }
        found.used += 1;
        if found.used == room {
            self.close(place.segment);
        }
        Some(slot)
    }

    /// Frees a place that nothing durable names.
    pub(crate) fn put_back(&mut self, slot: u32) {
        self.set_owner(slot, NIL);
        let (segment, index) = self.split(slot);
        let found = &mut self.segments[segment as usize];
        let stride = found.stride;
        found.free.push(index);
        found.used -= 1;
        if found.used > 0 {
            self.open.entry(stride).or_default().insert(segment);
            return;
        }
        self.close(segment);
        self.segments[segment as usize].stride = 0;
        self.unused.insert(segment);
    }

    /// A place must not be used any more.
    pub(crate) fn lose(&mut self, slot: u32) {
        self.set_owner(slot, NIL);
        let (segment, _) = self.split(slot);
        self.segments[segment as usize].lost += 1;
        self.lost += 1;
    }

    pub(crate) fn set_owner(&mut self, slot: u32, owner: u32) {
        let (segment, index) = self.split(slot);
        let found = &mut self.segments[segment as usize];
        let before = std::mem::replace(&mut found.owners[index as usize], owner);
        found.owned += u32::from(owner != NIL);
        found.owned -= u32::from(before != NIL);
    }

    pub(crate) fn touch(&mut self, slot: u32, stamp: u32) {
        let (segment, _) = self.split(slot);
        self.segments[segment as usize].touched = stamp;
    }

    /// Places for this stride that can be had without dropping anything.
    pub(crate) fn available(&self, stride: u64) -> u64 {
        let room = self.room(stride);
        let open = self.open.get(&stride).into_iter().flatten();
        let open: u64 = open
            .map(|segment| u64::from(room - self.segments[*segment as usize].used))
            .sum();
        open + self.unused.len() as u64 * u64::from(room)
    }

    /// The segment of another stride that was touched longest ago and could become empty, and when that was.
    pub(crate) fn coldest_other(&self, stride: u64, stamp: u32) -> Option<(u32, u32)> {
        let others = (0u32..).zip(&self.segments);
        let others = others.filter(|(_, s)| {
            s.stride != 0 && s.stride != stride && s.owned > 0 && s.lost == 0 && s.touched != stamp
        });
        others
            .max_by_key(|(_, s)| stamp.wrapping_sub(s.touched))
            .map(|(segment, s)| (segment, s.touched))
    }

    /// Entries that have places in a segment.
    pub(crate) fn owners(&self, segment: u32) -> Vec<u32> {
        let owners = self.segments[segment as usize].owners.iter().copied();
        owners.filter(|owner| *owner != NIL).collect()
    }

    /// Places in use, and their bytes.
    pub(crate) fn used(&self) -> (u64, u64) {
        self.segments.iter().fold((0, 0), |(places, bytes), s| {
            let used = u64::from(s.used);
            (places + used, bytes + used * s.stride)
        })
    }

    /// Every segment is where it belongs. For checks.
    pub(crate) fn check(&self) {
        for (id, segment) in (0u32..).zip(&self.segments) {
            assert_eq!(
                segment.stride == 0,
                self.unused.contains(&id),
                "a segment without a stride is unused"
            );
            let free = segment.free.len() as u32;
            assert_eq!(segment.used, segment.fresh - free, "places of a segment");
            let owned = segment.owners.iter().filter(|owner| **owner != NIL).count();
            assert_eq!(segment.owned as usize, owned, "owned places of a segment");
            let room = segment.stride != 0 && segment.used < self.room(segment.stride);
            let open = self.open.get(&segment.stride);
            assert_eq!(
                room,
                open.is_some_and(|open| open.contains(&id)),
                "a segment with room is open"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn places() -> Places {
        let shape = StoreShape {
            segments: 3,
            segment_bytes: 1 << 20,
        };
        Places::new(shape).expect("a good shape")
    }

    #[test]
    fn places_are_given_once_and_come_back() {
        let mut places = places();
        let stride = (1 << 20) / 4;
        let taken: Vec<u32> = (0..12).filter_map(|_| places.take(stride)).collect();
        assert_eq!(taken.len(), 12);
        assert_eq!((places.take(stride), places.take(8192)), (None, None));
        let unique: BTreeSet<Place> = taken.iter().map(|slot| places.place(*slot)).collect();
        assert_eq!(unique.len(), 12);
        taken[..4].iter().for_each(|slot| places.put_back(*slot));
        places.check();
        assert_eq!(places.available(stride), 4);
        assert!(places.take(8192).is_some(), "an empty segment is cut anew");
        assert_eq!(places.available(stride), 0);
        places.check();
    }

    #[test]
    fn recovered_places_are_claimed_once() {
        let mut places = places();
        let at = |segment, index, stride| Place {
            segment,
            index,
            stride,
        };
        let stride = 64 << 10;
        assert!(places.claim(at(1, 5, stride)).is_some());
        assert!(places.claim(at(1, 2, stride)).is_some());
        for wrong in [
            at(1, 5, stride),
            at(1, 0, 8192),
            at(3, 0, stride),
            at(0, 16, stride),
            at(0, 0, 4096),
            at(0, 0, 8193),
        ] {
            assert_eq!(places.claim(wrong), None, "{wrong:?}");
        }
        places.check();
        assert_eq!(places.used(), (2, 2 * stride));
        let taken = places.take(stride).expect("there is room");
        assert_eq!(places.place(taken).segment, 1, "a segment in use first");
        places.check();
    }

    #[test]
    fn shapes_that_cannot_be_are_refused() {
        for (segments, segment_bytes) in [(1, 0), (1, 4096), (1, 3 << 20), (u32::MAX, 1 << 30)] {
            let shape = StoreShape {
                segments,
                segment_bytes,
            };
            assert!(Places::new(shape).is_none(), "{shape:?}");
        }
    }
}
