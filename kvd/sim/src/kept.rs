//! What should be true of the stores, kept apart from core and store: which block is in which place, with which bytes, and how sure
//! that is. Built from what the node begins and what the stores answer. Deliberately absent: what is announced (`model`).

use std::collections::BTreeMap;
use std::rc::Rc;

use kvd_core::tier::{BlockKey, OpId, Place, Recovered};
use kvd_core::{Cut, GroupGeometry};
use kvd_nvme::store::PER_PAGE;

use crate::memory::Memory;
use crate::model::{Held, Key};
use crate::report::{Check, ensure};

/// How sure it is that a restart finds a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Known {
    /// It is being written.
    Writing,
    /// It will be found.
    There,
    /// It may be.
    Unsure,
    /// It is being dropped; before that it was there, or unsure.
    Dropping(bool),
    /// It will not be, but the node has not heard of it.
    Gone,
}

/// A block in its place.
#[derive(Clone, Debug)]
pub(crate) struct Kept {
    pub(crate) key: Key,
    pub(crate) seed: u64,
    pub(crate) geometry: GroupGeometry,
    pub(crate) cut: Cut,
    pub(crate) known: Known,
    /// Its engine may have lied about it.
    pub(crate) suspect: bool,
    /// Somebody wrote where it was taken from, while or before it was.
    pub(crate) unsound: bool,
}

impl Kept {
    /// What is known of a block when its writing begins.
    pub(crate) fn of(held: &Held) -> Kept {
        Kept {
            key: held.key,
            seed: held.seed,
            geometry: held.geometry.clone(),
            cut: held.cut.clone(),
            known: Known::Writing,
            suspect: held.suspect,
            unsound: false,
        }
    }

    /// Whether a store means this block.
    pub(crate) fn is(&self, key: &BlockKey) -> bool {
        let own = (self.key.namespace, self.key.group, self.key.hash);
        own == (key.namespace, u32::from(key.group), key.hash)
    }
}

/// Something that was begun.
pub(crate) enum Asked {
    Write {
        place: Place,
        /// The slot that is read, and its reservation.
        tenant: u16,
        slot: u32,
        version: u64,
    },
    Read {
        place: Place,
        tenant: u16,
        slot: u32,
        version: u64,
        memory: Rc<Memory>,
        offset: u64,
        job: u64,
    },
    Drop {
        place: Place,
    },
}

/// The places of one store.
#[derive(Default)]
pub(crate) struct Places {
    pub(crate) blocks: BTreeMap<Place, Kept>,
    /// All that ever was written there.
    history: BTreeMap<Place, Vec<Kept>>,
    /// Pages of records that a checkpoint could not read, though nothing had damaged them: the next start does not know what was there.
    pub(crate) unreadable: usize,
}

impl Places {
    /// A block is going to be written.
    pub(crate) fn write(&mut self, place: Place, kept: Kept) -> Check {
        let bytes = |place: &Place| {
            let from = u64::from(place.index) * place.stride;
            (from, from + place.stride)
        };
        let (from, to) = bytes(&place);
        let inside = self.blocks.iter().find(|(other, _)| {
            let (a, b) = bytes(other);
            other.segment == place.segment && a < to && from < b
        });
        ensure!(
            inside.is_none(),
            3,
            "{place:?} is going to be written over {inside:?}"
        );
        self.history.entry(place).or_default().push(kept.clone());
        self.blocks.insert(place, kept);
        Ok(())
    }

    /// Everything that was written to a place under this key, the newest first.
    pub(crate) fn history(&self, place: Place, key: &BlockKey) -> Vec<Kept> {
        let all = self.history.get(&place);
        let all = all.into_iter().flatten().rev();
        all.filter(|kept| kept.is(key)).cloned().collect()
    }

    /// A store was opened and found these. `media`: its disk may have damaged anything.
    pub(crate) fn reopened(&mut self, found: &[Recovered], media: bool) -> Check {
        let mut blocks = BTreeMap::new();
        for one in found {
            let known = self.blocks.get(&one.place);
            let known = known.filter(|kept| kept.is(&one.key) && kept.known != Known::Gone);
            let kept = match known {
                Some(kept) => kept.clone(),
                None => {
                    ensure!(media, 4, "{one:?} was dropped, or never written, and found");
                    let old = self.history(one.place, &one.key);
                    ensure!(!old.is_empty(), 1, "{one:?} was never written, and found");
                    old[0].clone()
                }
            };
            let known = Known::There;
            let twice = blocks.insert(one.place, Kept { known, ..kept });
            ensure!(twice.is_none(), 4, "{one:?} was found twice");
        }
        let lost = self
            .blocks
            .iter()
            .filter(|(place, kept)| kept.known == Known::There && !blocks.contains_key(place));
        let most = std::mem::take(&mut self.unreadable) * PER_PAGE;
        let lost: Vec<_> = lost.collect();
        ensure!(
            media || lost.len() <= most,
            4,
            "stored, but lost: {lost:?}, and {most} may be"
        );
        self.blocks = blocks;
        Ok(())
    }
}

/// All stores, and what is under way.
#[derive(Default)]
pub(crate) struct AllKept {
    pub(crate) stores: Vec<Places>,
    /// With the store of each.
    pub(crate) asked: BTreeMap<OpId, (usize, Asked)>,
}

impl AllKept {
    pub(crate) fn new(stores: usize) -> Self {
        AllKept {
            stores: (0..stores).map(|_| Places::default()).collect(),
            asked: BTreeMap::new(),
        }
    }

    /// Whether a block is being written.
    pub(crate) fn writes(&self) -> bool {
        let mut all = self.asked.values();
        all.any(|(_, asked)| matches!(asked, Asked::Write { .. }))
    }

    /// Whether some store has this block for sure.
    pub(crate) fn has(&self, key: &Key) -> bool {
        let all = self.stores.iter().flat_map(|s| s.blocks.values());
        let mut there = all.filter(|kept| kept.known == Known::There);
        there.any(|kept| kept.key == *key)
    }
}
