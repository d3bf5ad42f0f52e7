//! The pool alone: words over a slot's life and over changes of class.

use super::*;
use crate::geometry::ArenaShape;

const TENANT: TenantId = TenantId(3);

fn pool(extents: u64) -> Pool {
    let shape = ArenaShape {
        id: [0; 16],
        bytes: extents << 14,
        extent_bytes: 1 << 14,
        page_bytes: 4096,
        slots_per_extent: 4,
    };
    let mut pool = Pool::new(TENANT, shape, EvictionPolicy::Lru, false);
    (0..extents as u32).for_each(|id| pool.populated(id, false));
    pool
}

fn word(pool: &Pool, slot: u32) -> u64 {
    pool.slot(slot).unwrap().word
}

#[test]
fn a_word_is_odd_exactly_while_someone_may_write() {
    let (mut pool, mut out) = (pool(1), Vec::new());
    let class = pool.join_class(4096).unwrap();
    let slot = pool.take(class, 7, &mut out).unwrap();
    assert_eq!(word(&pool, slot), 1);
    pool.set_state(slot, SlotState::Filling, 7, &mut out);
    assert_eq!(word(&pool, slot), 1);
    pool.set_state(slot, SlotState::Resident, 7, &mut out);
    assert_eq!(word(&pool, slot), 2);
    pool.release(slot, &mut out);
    assert_eq!(
        word(&pool, slot),
        4,
        "readers see the change before anyone gets the slot"
    );
    let again = pool.take(class, 7, &mut out).unwrap();
    assert_eq!((again, word(&pool, slot)), (slot, 5));
    pool.set_state(slot, SlotState::Quarantined, 7, &mut out);
    assert_eq!(word(&pool, slot), 5);
    pool.release(slot, &mut out);
    assert_eq!(word(&pool, slot), 6);
    let words: Vec<u64> = out
        .iter()
        .map(|output| match output {
            Output::SetGeneration { word, .. } => *word,
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(words, [1, 2, 4, 5, 6]);
    pool.check_lists();
}

#[test]
fn words_go_on_when_an_extent_changes_class() {
    let (mut pool, mut out) = (pool(1), Vec::new());
    let small = pool.join_class(4096).unwrap();
    let large = pool.join_class(8192).unwrap();
    let slots: Vec<u32> = (0..4)
        .map(|_| pool.take(small, 1, &mut out).unwrap())
        .collect();
    assert_eq!(pool.take(small, 1, &mut out), None);
    assert_eq!(pool.take(large, 1, &mut out), None);
    slots.iter().for_each(|slot| pool.release(*slot, &mut out));
    pool.check_lists();
    let slot = pool.take(large, 1, &mut out).unwrap();
    assert_eq!((slot, word(&pool, slot), pool.offset(slot)), (0, 3, 0));
    let next = pool.take(large, 1, &mut out).unwrap();
    assert_eq!((next, word(&pool, next), pool.offset(next)), (1, 3, 8192));
    assert_eq!(pool.take(large, 1, &mut out), None, "two of 8 KiB");
    assert_eq!(
        pool.slot(2).map(|slot| slot.state),
        None,
        "not a slot of this class"
    );
    pool.check_lists();
}

#[test]
fn dead_classes_are_reused_and_their_extents_given_back() {
    let (mut pool, mut out) = (pool(2), Vec::new());
    let class = pool.join_class(4096).unwrap();
    let slot = pool.take(class, 1, &mut out).unwrap();
    pool.release(slot, &mut out);
    pool.leave_class(class);
    assert_eq!(pool.extent_counts().free, 2);
    for bytes in (1..50).map(|n| n * 4096) {
        let class = pool.join_class(bytes).unwrap();
        pool.leave_class(class);
    }
    assert_eq!(pool.classes.len(), 1);
    pool.check_lists();
}

#[test]
fn a_suspect_extent_is_refilled_when_its_last_slot_is_free() {
    let (mut pool, mut out) = (pool(2), Vec::new());
    let class = pool.join_class(4096).unwrap();
    let slots: Vec<u32> = (0..4)
        .map(|_| pool.take(class, 1, &mut out).unwrap())
        .collect();
    pool.suspect(0, &mut out);
    pool.suspect(0, &mut out);
    assert_eq!(pool.extent_counts().refilling, 1);
    assert!(pool.take(class, 1, &mut out).is_some_and(|slot| slot >= 4));
    slots.iter().for_each(|slot| pool.release(*slot, &mut out));
    assert_eq!(
        out.last(),
        Some(&Output::Refill {
            tenant: TENANT,
            extent: 0
        })
    );
    assert_eq!(pool.extent_counts().pending, 1);
    pool.populated(0, false);
    pool.populated(0, true);
    assert_eq!(
        (pool.extent_counts().free, pool.usable_bytes()),
        (1, 2 << 14)
    );
    pool.check_lists();
}
