//! Which blocks are here: from (namespace, group, hash) to an entry.
//!
//! A table of (tag, entry) pairs, in shards so that growing one costs little, over a slab of 64-byte entries. The tag is a
//! secretly seeded mix of the low 8 bytes of the hash; all 32 are compared before an entry is given out. Lookups go in
//! batches of stages, so that the memory latencies of a batch overlap. Deliberately absent: who may look; policy.

use crate::api::NIL;
use crate::ids::low64;
use crate::list::{Link, Linked};
use crate::slab::{Chunked, Slab};
use crate::table::{Look, Table};

const SHARDS: usize = 64;
/// Hashes that are probed before any entry is compared.
pub(crate) const BATCH: usize = 16;
/// Most different keys under one tag. Honest hashes never get near; made-up ones can't make probing slow.
const CROWD: u32 = 8;
/// Most uses that are counted.
const MAX_USES: u8 = 3;

/// Whether a block can be loaded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum EntryState {
    #[default]
    Vacant,
    Filling,
    Resident,
}

/// What a lookup looks at; one cache line.
#[derive(Debug, Default)]
#[repr(C, align(64))]
pub(crate) struct Entry {
    pub(crate) hash: [u8; 32],
    pub(crate) space: u32,
    pub(crate) slot: u32,
    /// The entry of the block before it, good only while `Side::parent_serial` is that entry's serial.
    pub(crate) parent: u32,
    /// Number of the step that last touched it.
    pub(crate) stamp: u32,
    /// Entries whose parent this is.
    pub(crate) children: u32,
    /// Leases that keep it.
    pub(crate) pins: u32,
    pub(crate) crcs: u32,
    pub(crate) group: u8,
    pub(crate) state: EntryState,
    /// Belongs to the eviction policy: in which of its lists the entry is.
    pub(crate) list: u8,
    /// Uses since the policy last looked, up to [`MAX_USES`].
    pub(crate) uses: u8,
}

impl Entry {
    pub(crate) fn used(&mut self) {
        self.uses = (self.uses + 1).min(MAX_USES);
    }
}

/// What a lookup does not look at.
#[derive(Debug, Default)]
pub(crate) struct Side {
    pub(crate) link: Link,
    /// Rises whenever the place of an entry is freed.
    pub(crate) serial: u32,
    pub(crate) parent_serial: u32,
    /// Which of its namespace's cuts it was stored by.
    pub(crate) cut: u16,
    /// It was brought up from a store ahead of any load, or is on its way, and no load or lease has claimed it.
    pub(crate) ahead: bool,
}

/// Lists of the eviction policies.
pub(crate) struct ByPolicy;

impl Linked<ByPolicy> for Side {
    fn link(&self) -> &Link {
        &self.link
    }
    fn link_mut(&mut self) -> &mut Link {
        &mut self.link
    }
}

/// The entries, in two arrays with the same indices.
#[derive(Debug)]
pub(crate) struct Entries {
    pub(crate) hot: Slab<Entry, 4096>,
    pub(crate) side: Chunked<Side, 4096>,
}

impl Entries {
    pub(crate) fn new() -> Self {
        Entries {
            hot: Slab::new(),
            side: Chunked::new(),
        }
    }

    pub(crate) fn insert(&mut self, entry: Entry, cut: u16) -> u32 {
        let id = self.hot.insert(entry);
        self.side.reach(id);
        let serial = self.side[id].serial;
        self.side[id] = Side {
            serial,
            cut,
            ..Side::default()
        };
        id
    }

    pub(crate) fn remove(&mut self, id: u32) {
        self.hot.remove(id);
        let side = &mut self.side[id];
        side.serial = side.serial.wrapping_add(1);
    }

    /// Makes `parent` the parent of `child`, which must have none.
    pub(crate) fn adopt(&mut self, child: u32, parent: u32) {
        self.hot[child].parent = parent;
        self.side[child].parent_serial = self.side[parent].serial;
        self.hot[parent].children += 1;
    }

    /// The parent of `child`, if it still exists.
    pub(crate) fn parent(&self, child: u32) -> Option<u32> {
        let parent = self.hot[child].parent;
        (parent != NIL && self.side[parent].serial == self.side[child].parent_serial)
            .then_some(parent)
    }
}

/// Where a key would be.
#[derive(Clone, Copy, Default)]
struct Place {
    shard: usize,
    tag: u32,
}

/// What a search found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Found {
    Entry(u32),
    Absent,
    /// Absent, and too many other keys look like it for it to be added.
    Crowded,
}

/// The table and its entries.
pub(crate) struct Index {
    seed: u64,
    shards: Vec<Table>,
    pub(crate) entries: Entries,
}

fn fold(a: u64, b: u64) -> u64 {
    let product = u128::from(a).wrapping_mul(u128::from(b));
    (product as u64) ^ ((product >> 64) as u64)
}

impl Index {
    pub(crate) fn new(seed: u64) -> Self {
        let shards = (0..SHARDS).map(|_| Table::default()).collect();
        Index {
            seed,
            shards,
            entries: Entries::new(),
        }
    }

    /// What namespace and group add to the mix; once for a chain.
    fn salt(&self, space: u32, group: u8) -> u64 {
        let name = (u64::from(space) << 8) | u64::from(group);
        fold(name ^ self.seed.rotate_left(32), 0xD6E8_FEB8_6659_FD93) | 1
    }

    fn place(&self, salt: u64, hash: &[u8; 32]) -> Place {
        let mixed = fold(low64(hash) ^ self.seed, salt ^ 0xA076_1D64_78BD_642F);
        Place {
            shard: (mixed >> 58) as usize,
            tag: mixed as u32,
        }
    }

    fn is(&self, entry: u32, space: u32, group: u8, hash: &[u8; 32]) -> bool {
        let entry = &self.entries.hot[entry];
        entry.hash == *hash && entry.space == space && entry.group == group
    }

    fn search(&self, place: Place, space: u32, group: u8, hash: &[u8; 32]) -> Found {
        let mut crowd = 0;
        let found = self.shards[place.shard].find(place.tag, |entry| {
            crowd += 1;
            self.is(entry, space, group, hash)
        });
        match found {
            Some(entry) => Found::Entry(entry),
            None if crowd >= CROWD => Found::Crowded,
            None => Found::Absent,
        }
    }

    pub(crate) fn find(&self, space: u32, group: u8, hash: &[u8; 32]) -> Found {
        self.search(
            self.place(self.salt(space, group), hash),
            space,
            group,
            hash,
        )
    }

    /// Finds up to [`BATCH`] hashes at once; `found` gets an entry or [`NIL`] for each.
    pub(crate) fn find_batch(
        &self,
        space: u32,
        group: u8,
        hashes: &[[u8; 32]],
        found: &mut [u32; BATCH],
    ) {
        let salt = self.salt(space, group);
        let mut looks = [(0, Look::default()); BATCH];
        for (look, hash) in looks.iter_mut().zip(hashes) {
            let place = self.place(salt, hash);
            *look = (place.shard, self.shards[place.shard].look(place.tag));
        }
        let looks = &looks[..hashes.len().min(BATCH)];
        for (found, (shard, look)) in found.iter_mut().zip(looks) {
            *found = self.shards[*shard].search(*look, |_| true).unwrap_or(NIL);
        }
        for ((found, (shard, look)), hash) in found.iter_mut().zip(looks).zip(hashes) {
            if *found != NIL && !self.is(*found, space, group, hash) {
                let own = |entry| self.is(entry, space, group, hash);
                *found = self.shards[*shard].search(*look, own).unwrap_or(NIL);
            }
        }
    }

    /// Brings into the caches what searches for these keys will look at first: all at once, not one after the other.
    pub(crate) fn warm<'a>(&self, keys: impl Iterator<Item = (u32, u8, &'a [u8; 32])>) {
        for (space, group, hash) in keys {
            let place = self.place(self.salt(space, group), hash);
            std::hint::black_box(self.shards[place.shard].look(place.tag));
        }
    }

    /// Adds an entry whose key is absent (not crowded).
    pub(crate) fn insert(&mut self, entry: Entry, cut: u16) -> u32 {
        let place = self.place(self.salt(entry.space, entry.group), &entry.hash);
        let id = self.entries.insert(entry, cut);
        self.shards[place.shard].insert(place.tag, id);
        id
    }

    /// Removes an entry and frees its place.
    pub(crate) fn remove(&mut self, id: u32) {
        let entry = &self.entries.hot[id];
        let place = self.place(self.salt(entry.space, entry.group), &entry.hash);
        let held = self.shards[place.shard].remove(place.tag, id);
        assert!(held, "an entry is missing from its table");
        self.entries.remove(id);
    }

    pub(crate) fn len(&self) -> usize {
        self.entries.hot.len()
    }

    /// Every entry is in the table under its own key, and nothing else is.
    pub(crate) fn check(&self) {
        let held: usize = self.shards.iter().map(Table::len).sum();
        assert_eq!(held, self.len(), "table and entries differ in number");
        let mut live = 0;
        for id in self.entries.hot.range() {
            let entry = &self.entries.hot[id];
            if entry.state != EntryState::Vacant {
                live += 1;
                let found = self.find(entry.space, entry.group, &entry.hash);
                assert_eq!(found, Found::Entry(id), "an entry is not found by its key");
            }
        }
        assert_eq!(live, held, "a vacant entry is in use");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(space: u32, group: u8, hash: [u8; 32]) -> Entry {
        Entry {
            hash,
            space,
            group,
            parent: NIL,
            state: EntryState::Resident,
            ..Entry::default()
        }
    }

    fn hash(n: u32) -> [u8; 32] {
        *blake3::hash(&n.to_le_bytes()).as_bytes()
    }

    #[test]
    fn entries_are_one_line() {
        assert_eq!(size_of::<Entry>(), 64);
        assert!(size_of::<Side>() <= 20);
    }

    #[test]
    fn keys_of_other_spaces_and_groups_are_apart() {
        let mut index = Index::new(5);
        let a = index.insert(entry(1, 0, hash(1)), 0);
        let b = index.insert(entry(2, 0, hash(1)), 0);
        let c = index.insert(entry(1, 1, hash(1)), 0);
        assert_eq!(index.find(1, 0, &hash(1)), Found::Entry(a));
        assert_eq!(index.find(2, 0, &hash(1)), Found::Entry(b));
        assert_eq!(index.find(1, 1, &hash(1)), Found::Entry(c));
        assert_eq!(index.find(3, 0, &hash(1)), Found::Absent);
        index.remove(a);
        assert_eq!(index.find(1, 0, &hash(1)), Found::Absent);
        index.check();
    }

    #[test]
    fn batches_agree_with_single_searches() {
        let mut index = Index::new(9);
        for n in 0..5000 {
            index.insert(entry(1, 0, hash(n)), 0);
        }
        let hashes: Vec<[u8; 32]> = (4950..5100).map(hash).collect();
        for batch in hashes.chunks(BATCH) {
            let mut found = [NIL; BATCH];
            index.find_batch(1, 0, batch, &mut found);
            for (hash, found) in batch.iter().zip(found) {
                let single = match index.find(1, 0, hash) {
                    Found::Entry(id) => id,
                    _ => NIL,
                };
                assert_eq!(found, single);
            }
        }
    }

    /// Equal low 8 bytes give equal tags whatever the seed: the worst that a client can make up.
    #[test]
    fn made_up_collisions_are_told_apart_and_limited() {
        let mut index = Index::new(77);
        let same = |n: u8| {
            let mut hash = [0; 32];
            hash[0] = n;
            hash
        };
        for n in 0..CROWD as u8 {
            assert_eq!(index.find(1, 0, &same(n)), Found::Absent);
            index.insert(entry(1, 0, same(n)), 0);
        }
        assert_eq!(index.find(1, 0, &same(CROWD as u8)), Found::Crowded);
        let mut found = [NIL; BATCH];
        let list: Vec<[u8; 32]> = (0..BATCH as u8).map(same).collect();
        index.find_batch(1, 0, &list, &mut found);
        for n in 0..CROWD {
            assert_eq!(index.entries.hot[found[n as usize]].hash, same(n as u8));
        }
        assert!(found[CROWD as usize..].iter().all(|id| *id == NIL));
        index.check();
    }

    #[test]
    fn parent_links_die_with_the_parent() {
        let mut index = Index::new(0);
        let parent = index.insert(entry(1, 0, hash(1)), 0);
        let child = index.insert(entry(1, 0, hash(2)), 0);
        index.entries.adopt(child, parent);
        assert_eq!(index.entries.parent(child), Some(parent));
        index.remove(parent);
        let other = index.insert(entry(1, 0, hash(3)), 0);
        assert_eq!(other, parent, "the place is reused");
        assert_eq!(index.entries.parent(child), None);
    }
}
