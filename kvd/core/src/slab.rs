//! Growable arrays with stable u32 indices, in chunks: growing never moves what is there, so it never stalls a step, and an
//! empty one costs nothing. Deliberately absent: shrinking; freed places are reused, last freed first.

use std::ops::{Index, IndexMut};

/// An array that grows by chunks of `CHUNK` (a power of two).
#[derive(Debug)]
pub(crate) struct Chunked<T, const CHUNK: usize> {
    chunks: Vec<Box<[T; CHUNK]>>,
}

impl<T: Default, const CHUNK: usize> Chunked<T, CHUNK> {
    pub(crate) fn new() -> Self {
        const { assert!(CHUNK.is_power_of_two()) };
        Chunked { chunks: Vec::new() }
    }

    /// All places, those that never held anything included.
    fn iter_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.chunks.iter_mut().flat_map(|chunk| chunk.iter_mut())
    }

    /// Makes `at` a valid index; new places hold the default.
    pub(crate) fn reach(&mut self, at: u32) {
        while self.chunks.len() <= at as usize / CHUNK {
            let chunk: Vec<T> = (0..CHUNK).map(|_| T::default()).collect();
            let chunk = chunk
                .into_boxed_slice()
                .try_into()
                .ok()
                .expect("chunk has its length");
            self.chunks.push(chunk);
        }
    }
}

impl<T, const CHUNK: usize> Index<u32> for Chunked<T, CHUNK> {
    type Output = T;
    fn index(&self, at: u32) -> &T {
        &self.chunks[at as usize / CHUNK][at as usize % CHUNK]
    }
}

impl<T, const CHUNK: usize> IndexMut<u32> for Chunked<T, CHUNK> {
    fn index_mut(&mut self, at: u32) -> &mut T {
        &mut self.chunks[at as usize / CHUNK][at as usize % CHUNK]
    }
}

/// A [`Chunked`] that gives out places. What a place held stays there until it is given out again.
#[derive(Debug)]
pub(crate) struct Slab<T, const CHUNK: usize> {
    items: Chunked<T, CHUNK>,
    free: Vec<u32>,
    end: u32,
}

impl<T: Default, const CHUNK: usize> Slab<T, CHUNK> {
    pub(crate) fn new() -> Self {
        Slab {
            items: Chunked::new(),
            free: Vec::new(),
            end: 0,
        }
    }

    pub(crate) fn insert(&mut self, item: T) -> u32 {
        let at = self.free.pop().unwrap_or_else(|| {
            self.items.reach(self.end);
            self.end += 1;
            self.end - 1
        });
        self.items[at] = item;
        at
    }

    /// Gives the place back and returns what it held.
    pub(crate) fn remove(&mut self, at: u32) -> T {
        debug_assert!(at < self.end, "no such place");
        self.free.push(at);
        std::mem::take(&mut self.items[at])
    }

    /// All places, in use or not.
    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.items.iter_mut()
    }

    /// Places in use.
    pub(crate) fn len(&self) -> usize {
        self.end as usize - self.free.len()
    }

    /// All indices ever given out, in use or not.
    pub(crate) fn range(&self) -> std::ops::Range<u32> {
        0..self.end
    }
}

impl<T, const CHUNK: usize> Index<u32> for Slab<T, CHUNK> {
    type Output = T;
    fn index(&self, at: u32) -> &T {
        &self.items[at]
    }
}

impl<T, const CHUNK: usize> IndexMut<u32> for Slab<T, CHUNK> {
    fn index_mut(&mut self, at: u32) -> &mut T {
        &mut self.items[at]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_reused_last_first() {
        let mut slab: Slab<u32, 4> = Slab::new();
        let ids: Vec<u32> = (0..10).map(|n| slab.insert(n * 10)).collect();
        assert_eq!(ids, (0..10).collect::<Vec<_>>());
        assert_eq!((slab.remove(3), slab.remove(7)), (30, 70));
        assert_eq!(slab.len(), 8);
        assert_eq!((slab.insert(1), slab.insert(2), slab.insert(3)), (7, 3, 10));
        assert_eq!((slab[7], slab[3], slab[9]), (1, 2, 90));
    }
}
