//! A map from numbers to what they name: memory is taken only when it holds more than ever before, so that what comes and goes all
//! the time costs none. Deliberately absent: order by number; values come in the order of their places.

use crate::slab::Slab;
use crate::table::Table;

/// Values by number.
#[derive(Debug)]
pub(crate) struct Map<T> {
    table: Table,
    items: Slab<Option<(u64, T)>, 256>,
}

impl<T> Default for Map<T> {
    fn default() -> Self {
        Map {
            table: Table::default(),
            items: Slab::new(),
        }
    }
}

fn tag(number: u64) -> u32 {
    (number.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32) as u32
}

impl<T> Map<T> {
    fn find(&self, number: u64) -> Option<u32> {
        let is = |at| matches!(&self.items[at], Some((other, _)) if *other == number);
        self.table.find(tag(number), is)
    }

    pub(crate) fn len(&self) -> usize {
        self.items.len()
    }

    /// The most that it ever held.
    pub(crate) fn most(&self) -> usize {
        self.items.range().len()
    }

    pub(crate) fn contains(&self, number: u64) -> bool {
        self.find(number).is_some()
    }

    pub(crate) fn get(&self, number: u64) -> Option<&T> {
        let (_, value) = self.items[self.find(number)?].as_ref()?;
        Some(value)
    }

    pub(crate) fn get_mut(&mut self, number: u64) -> Option<&mut T> {
        let at = self.find(number)?;
        let (_, value) = self.items[at].as_mut()?;
        Some(value)
    }

    /// Adds a value under a number that has none.
    pub(crate) fn insert(&mut self, number: u64, value: T) {
        debug_assert!(!self.contains(number), "a number names one value");
        let at = self.items.insert(Some((number, value)));
        self.table.insert(tag(number), at);
    }

    pub(crate) fn remove(&mut self, number: u64) -> Option<T> {
        let at = self.find(number)?;
        self.table.remove(tag(number), at);
        let (_, value) = self.items.remove(at)?;
        Some(value)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (u64, &T)> {
        let items = self.items.range().map(|at| self.items[at].as_ref());
        items.flatten().map(|(number, value)| (*number, value))
    }

    pub(crate) fn values_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.items.iter_mut().flatten().map(|(_, value)| value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_come_and_go() {
        let mut map = Map::default();
        for round in 0..10 {
            for number in 0..600 {
                map.insert(number * 977 + round, number);
            }
            assert_eq!(map.len(), 600);
            assert_eq!(map.iter().count(), 600);
            map.values_mut().for_each(|value| *value += 1);
            for number in (0..600).rev() {
                let name = number * 977 + round;
                assert!(map.contains(name) && !map.contains(name + 1));
                *map.get_mut(name).unwrap() += 1;
                assert_eq!(map.get(name), Some(&(number + 2)));
                assert_eq!(map.remove(name), Some(number + 2));
                assert_eq!(map.remove(name), None);
            }
            assert_eq!(map.len(), 0);
        }
        assert_eq!(map.most(), 600, "places are used again");
    }
}
