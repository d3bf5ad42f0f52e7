//! Which block goes first: policies behind one trait.
//!
//! A policy sees only entries that may be evicted at all: visible ends of chains ("leaves"); `chain` decides that. Its lists
//! live in the entries' own links, so a policy owns almost no memory. One policy object serves one size class of one
//! tenant. Deliberately absent: byte accounting and the act of evicting.

pub(crate) mod chain;
mod lru;
mod next;
mod s3fifo;
#[cfg(test)]
mod tests;

use crate::index::{Entries, Entry};
use crate::settings::EvictionPolicy;

/// Most entries looked at for one victim. Keeps a step short however much is pinned.
pub(crate) const SCAN: u32 = 4096;
/// In `Entry::list`: the entry was in the list that the other bits name, and is in none now.
const AWAY: u8 = 0x80;
/// In `Entry::list`: the entry is one of the next to go. Such a leaf is in the list of those, and in none of the policy's own.
const NEXT: u8 = 0x40;

/// Where an entry joins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// Just stored.
    New,
    /// It was here before, and was touched after the child that left it.
    Hot,
    /// It was here before, and is as cold as the child that left it.
    Cold,
}

/// An order of eviction.
pub(crate) trait Eviction: Send {
    /// Takes an entry in.
    fn insert(&mut self, entries: &mut Entries, id: u32, place: Place);

    /// An entry it has was looked up or used.
    fn touch(&mut self, entries: &mut Entries, id: u32);

    /// Lets an entry go.
    fn remove(&mut self, entries: &mut Entries, id: u32);

    /// The entry to evict, which stays until removed. Entries that `keep` names are passed over and count as touched. About `most`
    /// entries are looked at; beyond, there is none.
    fn victim(
        &mut self,
        entries: &mut Entries,
        keep: &mut dyn FnMut(&Entry) -> bool,
        most: u32,
    ) -> Option<u32>;

    /// One more of those that go next: the block that would be evicted if all that were chosen before had gone, unless `keep` names it.
    fn choose(
        &mut self,
        _entries: &mut Entries,
        _keep: &mut dyn FnMut(&Entry) -> bool,
    ) -> Option<u32> {
        None
    }

    /// A chosen block does not go next, nor do those, by that, that come before it in its chain.
    fn stays(&mut self, _entries: &mut Entries, _id: u32) {}

    /// How many blocks are chosen, leaves or not.
    fn chosen(&self) -> u64 {
        0
    }

    /// About the coldest entry, to compare classes by.
    fn coldest(&self) -> Option<u32>;

    /// Entries it has.
    fn len(&self) -> u64;

    /// All of them, for checks.
    fn all(&self, entries: &Entries) -> Vec<u32>;
}

/// A policy object, which never chooses ahead.
pub(crate) fn policy(kind: EvictionPolicy) -> Box<dyn Eviction> {
    match kind {
        EvictionPolicy::Lru => Box::new(lru::Lru::new()),
        EvictionPolicy::S3Fifo => Box::new(s3fifo::S3Fifo::new()),
    }
}

/// One that can choose what goes next before it has to go.
pub(crate) fn choosing(kind: EvictionPolicy) -> Box<dyn Eviction> {
    Box::new(next::Next::new(policy(kind)))
}

/// Whether a policy has this entry.
pub(crate) fn listed(entry: &Entry) -> bool {
    entry.list != 0 && entry.list & AWAY == 0
}

/// Whether the block is one of the next to go.
pub(crate) fn chosen(entry: &Entry) -> bool {
    entry.list & NEXT != 0
}
