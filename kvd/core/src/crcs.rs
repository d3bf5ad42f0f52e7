//! Checksums of blocks, kept beside the index and never in the arena that engines can write.
//!
//! Runs of u64 whose length is rounded up to a power of two, one pool for each power. Deliberately absent: computing them.

use crate::slab::Chunked;

const CHUNK: usize = 8192;
const POOLS: usize = 13;

#[derive(Debug, Default)]
struct Pool {
    chunks: Option<Box<Chunked<u64, CHUNK>>>,
    free: Vec<u32>,
    end: u32,
}

/// All checksums. A handle is only good with the count it was made for.
#[derive(Debug)]
pub(crate) struct Crcs {
    pools: [Pool; POOLS],
}

fn power(count: u32) -> usize {
    count.max(1).next_power_of_two().trailing_zeros() as usize
}

impl Crcs {
    pub(crate) fn new() -> Self {
        Crcs {
            pools: Default::default(),
        }
    }

    /// A run of `count` (up to [`crate::geometry::MAX_CRCS`]); `None` when u32 handles are used up.
    pub(crate) fn insert(&mut self, count: u32) -> Option<u32> {
        let power = power(count);
        let pool = &mut self.pools[power];
        if let Some(at) = pool.free.pop() {
            return Some(at);
        }
        let last = (u64::from(pool.end) + 1) << power;
        let last = u32::try_from(last - 1).ok()?;
        pool.chunks
            .get_or_insert_with(|| Box::new(Chunked::new()))
            .reach(last);
        pool.end += 1;
        Some(pool.end - 1)
    }

    pub(crate) fn remove(&mut self, count: u32, at: u32) {
        self.pools[power(count)].free.push(at);
    }

    pub(crate) fn set(&mut self, count: u32, at: u32, first: u32, values: &[u64]) {
        let power = power(count);
        if let Some(chunks) = &mut self.pools[power].chunks {
            for (n, value) in (first..).zip(values) {
                chunks[(at << power) + n] = *value;
            }
        }
    }

    pub(crate) fn append_to(&self, count: u32, at: u32, list: &mut Vec<u64>) {
        let power = power(count);
        if let Some(chunks) = &self.pools[power].chunks {
            list.extend((0..count).map(|n| chunks[(at << power) + n]));
        }
    }

    /// Runs in use.
    pub(crate) fn len(&self) -> usize {
        self.pools
            .iter()
            .map(|pool| pool.end as usize - pool.free.len())
            .sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::geometry::MAX_CRCS;

    #[test]
    fn runs_keep_what_was_set() {
        let mut crcs = Crcs::new();
        for count in [1, 3, 8, 100, MAX_CRCS] {
            let (a, b) = (crcs.insert(count).unwrap(), crcs.insert(count).unwrap());
            crcs.set(count, a, 0, &vec![1; count as usize]);
            crcs.set(count, b, 0, &vec![2; count as usize]);
            crcs.set(count, a, count - 1, &[9]);
            let mut list = Vec::new();
            crcs.append_to(count, a, &mut list);
            assert_eq!((list.len(), list[list.len() - 1]), (count as usize, 9));
            assert!(list[..list.len() - 1].iter().all(|crc| *crc == 1));
            crcs.remove(count, a);
            assert_eq!(crcs.insert(count), Some(a));
        }
        assert_eq!(crcs.len(), 10);
    }
}
