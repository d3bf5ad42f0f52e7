//! Tail first: only a visible block without children in the index is shown to the policy, so a chain loses its last block
//! before the one before it, and what remains is always a prefix.
//!
//! A parent whose last child leaves becomes a candidate at the cold end; if it was touched later than that child (another
//! prompt shares it), at the hot end. Links are made when blocks are reserved and are not repaired: a block whose parent was
//! dropped out of order (corruption, an extent that changed class) starts a tree of its own. That costs hits, never truth.
//! Blocks of windows and states have no links: each is worth something alone, and is a leaf from the start.

use super::{Eviction, Place, chosen, listed};
use crate::index::{Entries, EntryState};

/// Whether step `a` came before step `b`; right as long as they are less than 2^31 steps apart.
pub(crate) fn older(a: u32, b: u32) -> bool {
    (a.wrapping_sub(b) as i32) < 0
}

/// The block became visible.
pub(crate) fn visible(policy: &mut dyn Eviction, entries: &mut Entries, id: u32) {
    entries.hot[id].state = EntryState::Resident;
    if entries.hot[id].children == 0 {
        policy.insert(entries, id, Place::New);
    }
}

/// `parent` gets a child (its link is made elsewhere) and can't be evicted before it.
pub(crate) fn gains_child(policy: &mut dyn Eviction, entries: &mut Entries, parent: u32) {
    if chosen(&entries.hot[parent]) {
        policy.stays(entries, parent);
    }
    if listed(&entries.hot[parent]) {
        policy.remove(entries, parent);
    }
}

/// `child` is about to leave the index: unlinks it, and shows its parent to the policy if that is a leaf now. `cold`: the
/// child goes because it was cold, which says something of its parent.
pub(crate) fn leaves(policy: &mut dyn Eviction, entries: &mut Entries, child: u32, cold: bool) {
    if listed(&entries.hot[child]) || chosen(&entries.hot[child]) {
        policy.remove(entries, child);
    }
    let Some(parent) = entries.parent(child) else {
        return;
    };
    let stamp = entries.hot[child].stamp;
    entries.hot[child].parent = crate::api::NIL;
    let entry = &mut entries.hot[parent];
    entry.children -= 1;
    if entry.children == 0 && entry.state == EntryState::Resident {
        let cold = cold && !older(stamp, entry.stamp);
        let place = if cold { Place::Cold } else { Place::Hot };
        policy.insert(entries, parent, place);
    }
}

/// The block was looked up (`used` false) or used.
#[inline]
pub(crate) fn touch(
    policy: &mut dyn Eviction,
    entries: &mut Entries,
    id: u32,
    stamp: u32,
    used: bool,
) {
    let entry = &mut entries.hot[id];
    entry.stamp = stamp;
    if used {
        entry.used();
    }
    if chosen(entry) {
        policy.stays(entries, id);
    }
    if listed(&entries.hot[id]) {
        policy.touch(entries, id);
    }
}
