//! What is under way, by numbers that grow and are not used twice: a map that takes memory only when more is under way than ever
//! before, so that a store that is warm allocates nothing for an operation. Deliberately absent: any order but that of places.

/// Most that one of these holds.
pub(crate) const MOST: usize = 1 << INDEX_BITS;
const INDEX_BITS: u32 = 20;
/// Numbers stay below those of the time before a store is open. At a million operations a second they begin anew after half a year.
const SERIAL_BITS: u32 = 63 - INDEX_BITS;

struct Slot<T> {
    id: u64,
    value: Option<T>,
}

/// Values by number.
pub(crate) struct Slots<T> {
    slots: Vec<Slot<T>>,
    free: Vec<u32>,
    next: u64,
}

impl<T> Slots<T> {
    pub(crate) fn new() -> Self {
        Slots {
            slots: Vec::new(),
            free: Vec::new(),
            next: 0,
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Gives its number, which is higher than those before.
    ///
    /// # Panics
    /// When there are [`MOST`] already.
    pub(crate) fn insert(&mut self, value: T) -> u64 {
        let index = self.free.pop().unwrap_or_else(|| {
            assert!(self.slots.len() < MOST, "more is under way than may be");
            self.slots.push(Slot { id: 0, value: None });
            self.slots.len() as u32 - 1
        });
        self.next = (self.next + 1) & ((1 << SERIAL_BITS) - 1);
        let id = self.next << INDEX_BITS | u64::from(index);
        let value = Some(value);
        self.slots[index as usize] = Slot { id, value };
        id
    }

    fn index(id: u64) -> usize {
        id as usize & (MOST - 1)
    }

    pub(crate) fn get(&self, id: u64) -> Option<&T> {
        let slot = self.slots.get(Self::index(id))?;
        slot.value.as_ref().filter(|_| slot.id == id)
    }

    pub(crate) fn get_mut(&mut self, id: u64) -> Option<&mut T> {
        let slot = self.slots.get_mut(Self::index(id))?;
        slot.value.as_mut().filter(|_| slot.id == id)
    }

    pub(crate) fn remove(&mut self, id: u64) -> Option<T> {
        let index = Self::index(id);
        let slot = self.slots.get_mut(index).filter(|slot| slot.id == id)?;
        let value = slot.value.take()?;
        self.free.push(index as u32);
        Some(value)
    }

    pub(crate) fn values(&self) -> impl Iterator<Item = &T> {
        self.slots.iter().filter_map(|slot| slot.value.as_ref())
    }

    pub(crate) fn into_values(self) -> impl Iterator<Item = T> {
        self.slots.into_iter().filter_map(|slot| slot.value)
    }

    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = (u64, &mut T)> {
        let slots = self.slots.iter_mut();
        slots.filter_map(|slot| Some((slot.id, slot.value.as_mut()?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_of_one_value_and_places_are_used_again() {
        let mut slots = Slots::new();
        let (a, b) = (slots.insert('a'), slots.insert('b'));
        assert_eq!(slots.remove(a), Some('a'));
        assert_eq!((slots.remove(a), slots.get(a)), (None, None));
        let c = slots.insert('c');
        assert!(a < b && b < c && c < 1 << 63);
        assert_eq!(slots.get(a), None);
        assert_eq!(slots.get_mut(c), Some(&mut 'c'));
        assert_eq!(slots.get(1 << 63 | c), None);
        assert_eq!(slots.slots.len(), 2, "the place of the first");
        let mut all: Vec<_> = slots.iter_mut().map(|(id, value)| (id, *value)).collect();
        all.sort_unstable();
        assert_eq!(all, [(b, 'b'), (c, 'c')]);
        assert_eq!(slots.values().count(), slots.len());
        assert_eq!((slots.remove(b), slots.remove(c)), (Some('b'), Some('c')));
        assert!(slots.is_empty());
    }
}
