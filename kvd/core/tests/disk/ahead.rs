//! Reading ahead of loads: what it begins, where it stops, and that it takes nothing from loads.

use kvd_core::tier::*;
use kvd_core::*;

use crate::common::*;
use crate::script::*;

/// Slots of host memory of one extent; a quarter may be taken ahead, a half by what comes for loads.
const SLOTS: u64 = 16;

fn reading(read_ahead: bool) -> TierSettings {
    TierSettings {
        read_ahead,
        ..few_spare()
    }
}

/// A store that has a place for all blocks of these tests.
fn large() -> StoreShape {
    StoreShape {
        segments: 64,
        ..store_shape()
    }
}

/// Blocks 0 to 12 are below only; host memory is full of others, 100 to 116, which are below, too.
fn with(settings: Settings) -> (Node, Vec<[u8; 32]>) {
    let mut node = Node::on(settings, 1, large());
    let away = hashes(0..12);
    node.put(&away);
    node.finish_all();
    node.put(&hashes(100..100 + SLOTS));
    node.finish_all();
    assert!(away.iter().all(|hash| node.place_of(*hash) == Where::Nvme));
    (node, away)
}

fn node_with(tiers: TierSettings) -> (Node, Vec<[u8; 32]>) {
    with(settings(tiers))
}

/// A lookup as a connector's: what leads, with a lease. Gives the reads that it began.
fn look(node: &mut Node, list: &[[u8; 32]]) -> usize {
    look_by(node, 1, list)
}

fn look_by(node: &mut Node, session: u64, list: &[[u8; 32]]) -> usize {
    let before = node.store.open.len();
    node.world.lookup(session, list, 1000, true);
    node.take();
    node.store.open.len() - before
}

/// Ends everything, and gives the states of this load.
fn states(node: &mut Node, id: RequestId) -> Vec<LoadState> {
    node.finish_all();
    let reply = node.answer(id).expect("answered");
    node.release(&reply);
    reply.states
}

fn ready(states: &[LoadState]) -> usize {
    let ready = states.iter().filter(|state| **state == LoadState::Ready);
    ready.count()
}

#[test]
fn a_lookup_that_leases_reads_ahead_of_its_load() {
    let (mut node, away) = node_with(reading(true));
    let away = &away[..4];
    node.world.lookup(1, away, 0, true);
    node.take();
    let open = &node.store.open;
    assert!(open.is_empty(), "who leases nothing loads nothing");
    let found = node.world.lookup(1, away, 1000, true).chains.remove(0);
    assert_eq!(found.at(3), Where::Nvme);
    node.take();
    assert_eq!(node.store.open.len(), 4);
    assert_eq!(node.world.core.tier_counters().fetched_ahead, 4);
    assert_eq!(node.place_of(away[0]), Where::Fetching);
    assert_eq!(look(&mut node, away), 0, "they are coming already");
    let id = node.ask_load(away, 0);
    assert_eq!(node.store.open.len(), 4, "the load joins");
    assert_eq!(node.answer(id), None);
    assert_eq!(states(&mut node, id), [LoadState::Ready; 4]);
}

#[test]
fn it_can_be_switched_off() {
    let (mut node, away) = node_with(reading(false));
    assert_eq!(look(&mut node, &away), 0);
}

#[test]
fn it_stops_at_the_first_block_that_can_not_be_loaded() {
    let (mut node, away) = node_with(reading(true));
    let gap = [away[0], hash(9_999), away[1]];
    node.world.lookup(1, &gap, 1000, false);
    node.take();
    assert_eq!(node.store.open.len(), 1, "behind an absent one");
    let filling = hash(7_777);
    node.world.reserve(1, &[filling], None);
    let (first, behind) = (away[2], away[3]);
    let begun = look(&mut node, &[first, filling, behind]);
    assert_eq!(begun, 1, "behind one that is being stored");
    assert_eq!(node.place_of(behind), Where::Nvme);
    node.finish_all();
}

#[test]
fn without_the_lease_that_was_wanted_nothing_is_begun() {
    let none = Settings {
        max_lookup_leases: 0,
        ..settings(reading(true))
    };
    let (mut node, away) = with(none);
    assert_eq!(look(&mut node, &[hash(100), away[0]]), 0);
    assert_eq!(node.world.core.counters().leases_denied, 1);
    // Where nothing is here to be leased, no lease is denied.
    assert_eq!(look(&mut node, &away[..1]), 1);
    node.finish_all();
}

#[test]
fn one_lookup_begins_few_reads() {
    let mut node = Node::on(settings(reading(true)), 20, large());
    let away = hashes(0..100);
    node.put(&away);
    node.finish_all();
    node.put(&hashes(1000..1000 + 20 * SLOTS));
    node.finish_all();
    // A quarter of memory, and the share of one of two tenants, are more.
    assert_eq!(look(&mut node, &away), 64);
    assert_eq!(node.place_of(away[64]), Where::Nvme);
    node.finish_all();
}

/// The load of other blocks than those of the lookup before it: as if that had begun nothing.
#[test]
fn it_takes_no_reads_and_no_bytes_from_loads() {
    for (max_reads, served) in [(100, 8), (5, 5)] {
        for read_ahead in [false, true] {
            let (mut node, away) = node_with(TierSettings {
                max_reads,
                ..reading(read_ahead)
            });
            assert_eq!(look(&mut node, &away[..4]), 4 * usize::from(read_ahead));
            let id = node.ask_load(&away[4..], 0);
            let states = states(&mut node, id);
            assert_eq!(ready(&states), served, "{max_reads}, {read_ahead}");
        }
    }
}

/// A load that joins reads has them counted as its own: the next one finds as much room as if it had begun them.
#[test]
fn what_a_load_joins_counts_as_its_own() {
    for read_ahead in [false, true] {
        let (mut node, away) = node_with(TierSettings {
            max_reads: 6,
            ..reading(read_ahead)
        });
        look(&mut node, &away[..4]);
        let first = node.ask_load(&away[..4], 0);
        let second = node.ask_load(&away[4..8], 0);
        let counted = ready(&states(&mut node, first));
        assert_eq!((counted, ready(&states(&mut node, second))), (4, 2));
    }
}

/// A load beyond its limits is served what is coming anyway, and takes nothing from others by it.
#[test]
fn what_is_joined_beyond_the_limits_is_not_counted_there() {
    let (mut node, away) = node_with(TierSettings {
        max_reads: 2,
        ..reading(true)
    });
    assert_eq!(look(&mut node, &away[..4]), 4);
    let first = node.ask_load(&away[4..6], 0);
    let second = node.ask_load(&away[..4], 0);
    // One of the first load's reads is over: there is room for one again.
    node.finish(4, Ok(()));
    let third = node.ask_load(&away[6..8], 0);
    let first = ready(&states(&mut node, first));
    let second = ready(&states(&mut node, second));
    assert_eq!((first, second, ready(&states(&mut node, third))), (2, 4, 1));
}

/// Leases so many blocks of host memory.
fn lease(node: &mut Node, blocks: usize) {
    if blocks == 0 {
        return;
    }
    let here: Vec<[u8; 32]> = hashes(100..100 + SLOTS)
        .into_iter()
        .filter(|hash| node.place_of(*hash) == Where::Host)
        .take(blocks)
        .collect();
    assert_eq!(here.len(), blocks);
    assert_ne!(node.world.lookup(1, &here, 1000, true).lease, 0);
}

/// A half of host memory is what loads may have coming: as much is left to them by what is begun ahead.
#[test]
fn it_leaves_to_loads_what_they_may_have_coming() {
    for (leased, begun) in [(0, 4), (4, 4), (6, 2), (8, 0)] {
        let (mut node, away) = node_with(reading(true));
        lease(&mut node, leased);
        assert_eq!(look(&mut node, &away[..4]), begun, "{leased} are leased");
        let id = node.ask_load(&away[4..], 0);
        assert_eq!(node.store.open.len(), begun + 8);
        assert_eq!(states(&mut node, id), [LoadState::Ready; 8]);
        assert_eq!(node.world.core.tier_counters().fetch_busy, 0);
    }
}

#[test]
fn what_loads_have_coming_is_theirs_already() {
    let (mut node, away) = node_with(reading(true));
    lease(&mut node, 4);
    let first = node.ask_load(&away[..3], 0);
    assert_eq!(look(&mut node, &away[3..7]), 4);
    let second = node.ask_load(&away[7..], 0);
    assert_eq!(states(&mut node, first), [LoadState::Ready; 3]);
    assert_eq!(states(&mut node, second), [LoadState::Ready; 5]);
}

/// What is leased after reads ahead were begun takes what was left to loads. Those that find no slot are refused: they do not wait for
/// reads ahead, which may never end.
#[test]
fn no_load_waits_for_slots_that_reads_ahead_hold() {
    let (mut node, away) = node_with(reading(true));
    assert_eq!(look(&mut node, &away[..4]), 4);
    lease(&mut node, 8);
    let first = node.ask_load(&away[4..], 0);
    assert_eq!(node.store.open.len(), 4 + 4);
    let second = node.ask_load(&away[8..], 0);
    assert_eq!(node.world.core.tier_counters().fetch_busy, 4 + 4);
    let second = node.answer(second).expect("answered at once").states;
    assert_eq!(second, [LoadState::Failed; 4]);
    for _ in 0..4 {
        node.finish(4, Ok(()));
    }
    let first = node.answer(first).expect("its reads are over").states;
    assert_eq!(ready(&first), 4);
    node.finish_all();
}

/// Blocks of another size have extents of their own. A half of such a class is left to loads, too.
#[test]
fn it_leaves_half_of_a_class_to_loads() {
    let mut node = Node::on(settings(reading(true)), 4, large());
    node.world.open(2, A, 2, Role::Both, 0, 1);
    let double = record("a", "w", 2 * CELL);
    node.world.register(2, &double, 1, 1, Some(0));
    // One extent has 8 slots of the double size; all others are full of blocks that are hotter.
    let hot = hashes(100..100 + 3 * SLOTS);
    for first in [0, 8, 16] {
        node.put_by(2, &hashes(first..first + 8));
        node.finish_all();
        node.put(&hot);
        node.finish_all();
    }
    assert_eq!(node.world.status().classes[1].extents, 1);
    assert_eq!(
        look_by(&mut node, 2, &hashes(0..8)),
        4,
        "a quarter of memory is 8"
    );
    let id = node.ask_load_by(2, &hashes(8..12), 0);
    node.finish_all();
    let reply = node.answer(id).expect("answered");
    assert_eq!(reply.states, [LoadState::Ready; 4]);
}

/// What was brought ahead stays within a quarter of host memory until loads claim it or it goes.
#[test]
fn lookups_one_after_the_other_keep_to_a_quarter_of_host_memory() {
    let (mut node, away) = node_with(reading(true));
    for at in 0..3 {
        let begun = look(&mut node, &away[at * 4..at * 4 + 4]);
        assert_eq!(begun, if at == 0 { 4 } else { 0 });
        node.finish_all();
    }
    let kept = node.world.hits(1, &hashes(100..100 + SLOTS));
    assert_eq!(kept as u64, SLOTS - 4, "others keep the rest");
    // Two of the four are claimed: there is room for two.
    let id = node.ask_load(&away[..2], 0);
    assert_eq!(states(&mut node, id), [LoadState::Ready; 2]);
    // They are not what goes for the next ones.
    assert_eq!(node.world.hits(1, &away[..4]), 4);
    assert_eq!(look(&mut node, &away[4..8]), 2);
    node.finish_all();
    // The others go with all that nobody leases: there is room for four.
    node.put(&hashes(200..200 + SLOTS));
    node.finish_all();
    assert_eq!(look(&mut node, &away[8..]), 4);
    node.finish_all();
}

/// Requests that are given up leave what was brought ahead for them. Whoever leases it then claims it, as a load does.
#[test]
fn who_leases_what_was_brought_ahead_claims_it() {
    let (mut node, away) = node_with(reading(true));
    assert_eq!(look(&mut node, &away[..4]), 4);
    let ahead = |node: &Node| {
        let status = node.world.status();
        (status.ahead_bytes / 4096, status.ahead_reads)
    };
    assert_eq!(ahead(&node), (4, 4));
    node.finish_all();
    assert_eq!(node.world.hits(1, &away[..4]), 4, "without a lease");
    assert_eq!(ahead(&node), (4, 0));
    assert_eq!(look(&mut node, &away[4..8]), 0);
    assert_eq!(look(&mut node, &away[..3]), 0);
    assert_eq!(ahead(&node), (1, 0));
    assert_eq!(look(&mut node, &away[4..8]), 3);
    node.finish_all();
}

#[test]
fn a_read_ahead_that_fails_leaves_the_count() {
    let (mut node, away) = node_with(reading(true));
    assert_eq!(look(&mut node, &away[..4]), 4);
    for _ in 0..4 {
        node.finish(0, Err(StoreError::Io));
    }
    assert_eq!(look(&mut node, &away[..4]), 4);
    node.finish_all();
}

#[test]
fn tenants_have_equal_shares_of_the_reads() {
    let few = TierSettings {
        max_ahead: 4,
        ..reading(true)
    };
    let mut node = Node::on(settings(few), 1, large());
    node.world.open(2, B, 2, Role::Both, 0, 1);
    node.world
        .register(2, &record("b", "w", CELL), 1, 1, Some(0));
    let away = hashes(0..4);
    for session in [1, 2] {
        node.put_by(session, &away);
        node.finish_all();
        node.put_by(session, &hashes(100..100 + SLOTS));
        node.finish_all();
    }
    assert_eq!(look_by(&mut node, 1, &away), 2);
    assert_eq!(look_by(&mut node, 2, &away), 2, "the other took only half");
    node.finish_all();
}
