//! The slower tier: going down, coming up, failing, restarting.

mod ahead;
#[path = "../common/mod.rs"]
mod common;
mod demote;
mod random;
mod script;

use common::*;
use kvd_core::tier::*;
use kvd_core::*;
use script::*;

#[test]
fn a_block_goes_down_and_comes_up_again() {
    let mut node = Node::new(few_spare(), 1);
    let list = hashes(0..10);
    node.put(&list);
    assert_eq!(node.store.open.len(), 10, "written through");
    node.finish_all();
    assert_eq!(node.world.core.tier_counters().offloaded, 10);
    // 16 slots: ten more push the first four out.
    node.put(&hashes(100..110));
    node.finish_all();
    let away: Vec<[u8; 32]> = list
        .iter()
        .copied()
        .filter(|hash| node.place_of(*hash) == Where::Nvme)
        .collect();
    assert_eq!(away.len(), 4);
    let id = node.ask_load(&away, 0);
    assert_eq!(node.answer(id), None, "it has to come up first");
    assert_eq!(node.place_of(away[0]), Where::Fetching);
    node.finish_all();
    let reply = node.answer(id).expect("answered");
    assert_eq!(reply.states, [LoadState::Ready; 4]);
    let wanted: Vec<u64> = away.iter().flat_map(crcs_of).collect();
    assert_eq!(reply.crcs, wanted);
    assert!(reply.generations.iter().all(|word| word % 2 == 0));
    node.release(&reply);
    assert_eq!(node.place_of(away[0]), Where::Host);
}

#[test]
fn a_chain_longer_than_host_memory_comes_up_window_by_window() {
    let mut node = Node::new(few_spare(), 1);
    for at in (0..28u64).step_by(7) {
        let parent = at.checked_sub(1).map(hash);
        let list = hashes(at..at + 7);
        let got = node.world.reserve(1, &list, parent);
        let crcs: Vec<u64> = list.iter().flat_map(crcs_of).collect();
        node.world.commit(1, &got.slots, &got.generations, &crcs);
        node.take();
        node.finish_all();
    }
    for _ in 0..3 {
        for at in (0..28).step_by(7) {
            let id = node.ask_load(&hashes(at..at + 7), 0);
            node.finish_all();
            let reply = node.answer(id).expect("answered");
            assert_eq!(reply.states, [LoadState::Ready; 7], "from {at} on");
            node.release(&reply);
        }
    }
}

#[test]
fn loads_of_one_block_share_a_read() {
    let mut node = Node::new(few_spare(), 1);
    node.put(&hashes(0..1));
    node.finish_all();
    node.put(&hashes(100..116));
    node.finish_all();
    let first = node.ask_load(&hashes(0..1), 0);
    let second = node.ask_load(&hashes(0..1), 0);
    let reads = node.store.open.iter();
    assert_eq!(
        reads
            .filter(|op| matches!(op, StoreOp::Read { .. }))
            .count(),
        1
    );
    node.finish_all();
    for id in [first, second] {
        assert_eq!(
            node.answer(id).expect("answered").states,
            [LoadState::Ready]
        );
    }
}

#[test]
fn failures_are_failures_and_only_wrong_bytes_are_forgotten() {
    for (error, after) in [
        (StoreError::Io, Where::Nvme),
        (StoreError::Off, Where::Nvme),
        (StoreError::Corrupt, Where::Absent),
    ] {
        let mut node = Node::new(few_spare(), 1);
        node.put(&hashes(0..1));
        node.finish_all();
        node.put(&hashes(100..116));
        node.finish_all();
        let id = node.ask_load(&hashes(0..2), 0);
        node.finish(0, Err(error));
        let reply = node.answer(id).expect("answered");
        assert_eq!(reply.states, [LoadState::Failed, LoadState::Absent]);
        assert_eq!(node.place_of(hash(0)), after, "{error:?}");
        node.finish_all();
    }
}

#[test]
fn a_load_is_answered_by_its_deadline_and_the_read_goes_on() {
    let mut node = Node::new(few_spare(), 1);
    node.put(&hashes(0..1));
    node.finish_all();
    node.put(&hashes(100..116));
    node.finish_all();
    let id = node.ask_load(&[hash(0), hash(100), hash(7)], 20);
    let due = node.world.core.next_deadline().expect("it waits");
    assert_eq!(due, Now(node.world.now + 20_000));
    node.world.now += 20_000;
    let replies = node.world.step(Input::Tick);
    node.replies.extend(replies);
    let states = node.answer(id).expect("answered").states;
    assert_eq!(states[0], LoadState::Failed);
    assert_eq!(states[2], LoadState::Absent);
    assert_eq!(node.world.core.tier_counters().fetch_late, 1);
    let reserved = node.world.status().slots.reserved;
    assert_eq!(reserved, 1, "the store may still write there");
    node.finish_all();
    assert_eq!(node.place_of(hash(0)), Where::Host, "it came in the end");
}

/// Blocks 0 to 4 are on their way up, two for a load and two ahead, when their store goes off.
fn coming_from_a_store_that_goes_off() -> (Node, Vec<[u8; 32]>, RequestId) {
    let mut node = Node::new(few_spare(), 1);
    let list = hashes(0..4);
    node.put(&list);
    node.finish_all();
    node.put(&hashes(100..116));
    node.finish_all();
    let id = node.ask_load(&list[..2], 0);
    node.world.lookup(1, &list, 1000, true);
    node.take();
    assert_eq!(node.store.open.len(), 4);
    assert_eq!(node.place_of(list[0]), Where::Fetching);
    node.switch(false);
    (node, list, id)
}

/// Blocks can be stored and loaded again and again, beside so many others.
fn stored_anew(node: &mut Node, list: &[[u8; 32]], others: u64) {
    for _ in 0..3 {
        assert_eq!(node.put(list), list.len());
        let id = node.ask_load(list, 0);
        let reply = node.answer(id).expect("answered at once");
        assert_eq!(reply.states, [LoadState::Ready; 4]);
        node.release(&reply);
        for first in [200, 300] {
            let put = node.put(&hashes(first..first + others));
            assert_eq!(put as u64, others);
        }
    }
}

#[test]
fn what_is_on_its_way_has_failed_once_its_store_is_off_and_its_slots_wait() {
    let (mut node, list, id) = coming_from_a_store_that_goes_off();
    let states = node.answer(id).expect("answered at once").states;
    assert_eq!(states, [LoadState::Failed; 2]);
    assert_eq!(node.place_of(list[0]), Where::Absent, "it may never come");
    let slots = node.world.status().slots;
    assert_eq!((slots.quarantined, slots.reserved), (4, 0));
    stored_anew(&mut node, &list, 12);
    // The device answers after all.
    for (left, outcome) in [
        (3, Ok(())),
        (2, Err(StoreError::Io)),
        (1, Ok(())),
        (0, Ok(())),
    ] {
        node.finish(0, outcome);
        assert_eq!(node.world.status().slots.quarantined, left);
    }
    assert_eq!(node.world.core.tier_counters().fetch_failed.off, 4);
    stored_anew(&mut node, &list, 16);
}

#[test]
fn a_read_that_is_lost_is_over_for_all_and_only_its_slot_stays_taken() {
    let (mut node, list, _) = coming_from_a_store_that_goes_off();
    for _ in 0..3 {
        node.finish(0, Err(StoreError::Lost));
    }
    node.finish(0, Ok(()));
    stored_anew(&mut node, &list, 13);
    let session = SessionId(1);
    node.world.step(Input::Gone { session });
    assert_eq!(node.world.status().slots.quarantined, 3, "for ever");
    assert_eq!(node.world.core.tier_counters().slots_lost, 3);
}

#[test]
fn what_an_engine_stores_anew_is_not_absent_while_a_store_holds_it() {
    let mut node = Node::new(few_spare(), 1);
    node.put(&hashes(0..1));
    node.finish_all();
    node.put(&hashes(100..116));
    node.finish_all();
    let got = node.world.reserve(1, &hashes(0..1), None);
    assert_eq!(got.states, [ReserveState::Reserved]);
    let id = node.ask_load(&hashes(0..1), 0);
    let states = node.answer(id).expect("answered at once").states;
    assert_eq!(states, [LoadState::Failed]);
}

#[test]
fn blocks_that_come_up_count_against_the_most_blocks_of_the_index() {
    let few = Settings {
        max_entries: 8,
        ..settings(few_spare())
    };
    let mut node = Node::with(few, 1);
    node.put(&hashes(0..8));
    node.finish_all();
    node.put(&hashes(100..108));
    node.finish_all();
    let id = node.ask_load(&hashes(0..4), 0);
    node.world.core.check();
    node.finish_all();
    let states = node.answer(id).expect("answered").states;
    assert_eq!(states, [LoadState::Ready; 4]);
}

#[test]
fn who_leaves_is_not_answered_and_leaves_nothing_pinned() {
    let mut node = Node::new(few_spare(), 1);
    node.put(&hashes(0..1));
    node.finish_all();
    node.put(&hashes(100..116));
    node.finish_all();
    node.ask_load(&hashes(0..1), 0);
    let session = SessionId(1);
    node.world.step(Input::Detached { session });
    node.world.step(Input::Gone { session });
    node.finish_all();
    assert!(node.replies.is_empty());
    assert_eq!(node.world.status().pinned_bytes, 0);
}

#[test]
fn a_full_store_drops_ends_of_chains_and_reuses_a_place_only_when_the_store_says_so() {
    let mut node = Node::new(few_spare(), 8);
    let places = 2 * (128 << 10) / STRIDE;
    for base in 0..8 {
        node.put(&hashes(base * 10..base * 10 + 10));
        while node.store.open.len() > 3 {
            node.finish(0, Ok(()));
        }
    }
    node.finish_all();
    let counters = *node.world.core.tier_counters();
    assert!(counters.evicted > 0 && node.store.held.len() as u64 <= places);
    assert_eq!(counters.offloaded + counters.offload_no_place, 80);
    // A drop whose outcome is not known takes the place out of use.
    let before = node.store.held.len();
    node.put(&hashes(500..510));
    let drop = node.store.open.iter();
    if let Some(at) = drop
        .clone()
        .position(|op| matches!(op, StoreOp::Drop { .. }))
    {
        node.finish(at, Err(StoreError::Io));
    }
    node.finish_all();
    assert!(node.store.held.len() <= before + 10);
}

#[test]
fn a_drop_that_a_store_refuses_because_it_is_off_is_asked_again() {
    let mut node = Node::new(few_spare(), 1);
    node.put(&hashes(0..1));
    node.finish_all();
    node.put(&hashes(100..116));
    node.finish_all();
    node.ask_load(&hashes(0..1), 0);
    node.finish(0, Err(StoreError::Corrupt));
    assert!(matches!(node.store.open[..], [StoreOp::Drop { .. }]));
    let store = STORE;
    node.world.step(Input::StoreSwitched { store, on: false });
    node.finish(0, Err(StoreError::Off));
    assert!(node.store.open.is_empty());
    let held = node.store.held.len();
    node.world.step(Input::StoreSwitched { store, on: true });
    node.take();
    node.finish_all();
    assert_eq!(node.store.held.len(), held - 1);
}

#[test]
fn what_is_in_the_way_drops_the_offload_and_is_counted() {
    let mut node = Node::new(
        TierSettings {
            max_writes: 2,
            ..few_spare()
        },
        2,
    );
    node.put(&hashes(0..5));
    assert_eq!(node.world.core.tier_counters().offload_queue_full, 3);
    node.finish_all();
    let (store, on) = (STORE, false);
    node.world.step(Input::StoreSwitched { store, on });
    node.put(&hashes(10..11));
    assert_eq!(node.world.core.tier_counters().offload_off, 1);
    let mut node = Node::new(
        TierSettings {
            write_bytes_per_day: 24 * 3 * STRIDE,
            ..few_spare()
        },
        2,
    );
    node.put(&hashes(0..5));
    assert_eq!(
        node.world.core.tier_counters().offload_budget,
        2,
        "an hour's worth at first"
    );
    node.world.now += 3_600_000_000;
    node.put(&hashes(20..21));
    assert_eq!(node.world.core.tier_counters().offload_budget, 2);
}

#[test]
fn second_use_writes_only_what_is_loaded() {
    let mut node = Node::new(
        TierSettings {
            offload: OffloadPolicy::SecondUse,
            ..few_spare()
        },
        2,
    );
    node.put(&hashes(0..5));
    assert!(node.store.open.is_empty());
    let id = node.ask_load(&hashes(1..3), 0);
    assert_eq!(
        node.answer(id).expect("answered").states,
        [LoadState::Ready; 2]
    );
    assert_eq!(node.store.open.len(), 2);
    node.finish_all();
}

#[test]
fn a_store_that_is_opened_again_serves_what_it_holds() {
    let mut node = Node::new(few_spare(), 2);
    node.put(&hashes(0..6));
    node.finish_all();
    let held = std::mem::take(&mut node.store.held);
    let mut blocks: Vec<Recovered> = Vec::new();
    for (place, header) in &held {
        blocks.push(Recovered {
            key: header.key,
            parent: header.parent,
            place: *place,
        });
    }
    let mut again = Node {
        world: World::new(settings(few_spare()), 1),
        store: Script::default(),
        replies: Vec::new(),
    };
    let store = STORE;
    let shape = store_shape();
    again.world.step(Input::StoreOpened { store, shape });
    let record = record("a", "w", CELL);
    again.world.step(Input::StoreNamespace {
        store,
        record: &record,
    });
    let foreign = BlockKey {
        namespace: NamespaceId([9; 32]),
        ..blocks[0].key
    };
    let odd = Recovered {
        key: foreign,
        parent: None,
        place: Place {
            segment: 1,
            index: 3,
            stride: STRIDE,
        },
    };
    again.store.held = held;
    let mut header = again.store.held.values().next().expect("some").clone();
    header.key = foreign;
    again.store.held.insert(odd.place, header);
    blocks.push(odd);
    again.world.step(Input::StoreBlocks {
        store,
        blocks: &blocks,
    });
    again.take();
    let counters = *again.world.core.tier_counters();
    assert_eq!((counters.recovered, counters.not_recovered), (6, 1));
    assert_eq!(again.store.open.len(), 1, "what is of no use is dropped");
    again.finish_all();
    again.world.script(1, 3);
    let id = again.ask_load(&hashes(0..7), 0);
    again.finish_all();
    let mut wanted = vec![LoadState::Ready; 6];
    wanted.push(LoadState::Absent);
    assert_eq!(again.answer(id).expect("answered").states, wanted);
}
