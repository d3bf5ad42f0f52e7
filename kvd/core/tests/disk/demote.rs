//! Writing on demotion: what is written when, what is not, and that nobody waits for it.

use kvd_core::tier::*;
use kvd_core::*;

use crate::common::*;
use crate::script::*;

/// 64 slots, of which eight are to be free or about to be.
const EXTENTS: u64 = 4;

fn demotion() -> TierSettings {
    TierSettings {
        offload: OffloadPolicy::Demotion,
        ..few_spare()
    }
}

fn count(node: &Node) -> TierCounters {
    *node.world.core.tier_counters()
}

fn roomy(settings: Settings) -> Node {
    let shape = StoreShape {
        segments: 16,
        ..store_shape()
    };
    Node::on(settings, EXTENTS, shape)
}

#[test]
fn only_what_does_not_fit_is_written_the_coldest_first() {
    for eviction in [EvictionPolicy::Lru, EvictionPolicy::S3Fifo] {
        let tiers = settings(demotion());
        let mut node = roomy(Settings { eviction, ..tiers });
        for n in 0..56 {
            node.put(&hashes(n..n + 1));
        }
        assert!(node.store.open.is_empty(), "there is room");
        for n in 56..84 {
            node.put(&hashes(n..n + 1));
            node.finish_all();
        }
        let counters = count(&node);
        assert_eq!((counters.offloaded, counters.demote_missed), (28, 0));
        for n in 0..84 {
            let wanted = if n < 20 { Where::Nvme } else { Where::Host };
            assert_eq!(node.place_of(hash(n)), wanted, "block {n}");
        }
        for n in [0, 4] {
            let id = node.ask_load(&hashes(n..n + 4), 0);
            node.finish_all();
            let reply = node.answer(id).expect("answered");
            assert_eq!(reply.states, [LoadState::Ready; 4]);
            node.release(&reply);
        }
        // Eight more had to go for those; what came up is below already.
        assert_eq!(count(&node).demote_missed, 0);
        let written = count(&node).offloaded;
        assert!((32..=36).contains(&written), "{written}");
    }
}

#[test]
fn a_chain_goes_from_its_tail_and_is_written_so() {
    let mut node = roomy(settings(demotion()));
    let mut parent = None;
    for n in 0..64 {
        let got = node.world.reserve(1, &[hash(n)], parent);
        let crcs = crcs_of(&hash(n));
        node.world.commit(1, &got.slots, &got.generations, &crcs);
        node.take();
        node.finish_all();
        parent = Some(hash(n));
    }
    // A chain of its own, whose blocks push out the end of the first.
    let before = count(&node).offloaded;
    for n in 100..120 {
        node.put(&hashes(n..n + 1));
        node.finish_all();
    }
    assert_eq!(count(&node).demote_missed, 0);
    assert!(count(&node).offloaded - before <= 28);
    for n in 0..64 {
        let wanted = if n < 44 { Where::Host } else { Where::Nvme };
        assert_eq!(node.place_of(hash(n)), wanted, "block {n}");
    }
}

#[test]
fn a_chain_longer_than_host_memory_is_kept() {
    let mut node = roomy(settings(demotion()));
    let mut parent = None;
    for at in (0..160u64).step_by(4) {
        let list = hashes(at..at + 4);
        let got = node.world.reserve(1, &list, parent);
        assert_eq!(got.slots.len(), 4, "from block {at}");
        let crcs: Vec<u64> = list.iter().flat_map(crcs_of).collect();
        node.world.commit(1, &got.slots, &got.generations, &crcs);
        node.take();
        node.finish_all();
        parent = list.last().copied();
    }
    let lost = (0..160).filter(|n| node.place_of(hash(*n)) == Where::Absent);
    assert_eq!((lost.count(), count(&node).demote_missed), (0, 0));
    for at in (0..160).step_by(4) {
        let id = node.ask_load(&hashes(at..at + 4), 0);
        node.finish_all();
        let reply = node.answer(id).expect("answered");
        assert_eq!(reply.states, [LoadState::Ready; 4], "from block {at}");
        node.release(&reply);
    }
}

#[test]
fn a_device_that_hangs_holds_up_no_store() {
    let mut node = roomy(settings(TierSettings {
        max_writes: 3,
        ..demotion()
    }));
    for n in 0..200 {
        assert_eq!(node.put(&hashes(n..n + 1)), 1);
    }
    assert_eq!(node.store.open.len(), 3, "no more than may be written");
    let counters = count(&node);
    // Three are being written and stay; all others that left were not written.
    assert_eq!(
        (counters.demote_missed, counters.offload_queue_full),
        (136, 0)
    );
    node.finish_all();
    assert!(count(&node).offloaded >= 3);
    let missed = count(&node).demote_missed;
    for n in 200..220 {
        node.put(&hashes(n..n + 1));
        node.finish_all();
    }
    assert_eq!(count(&node).demote_missed, missed, "it keeps up again");
}

#[test]
fn what_was_refused_is_not_tried_again_and_what_is_below_not_written_again() {
    let mut node = roomy(settings(TierSettings {
        write_bytes_per_day: 24 * 2 * STRIDE,
        ..demotion()
    }));
    node.world.now += 2 * 3_600_000_000;
    node.put(&hashes(0..64));
    for _ in 0..10 {
        node.finish_all();
        node.world.step(Input::Tick);
        node.take();
    }
    let first = count(&node);
    assert_eq!((first.offloaded, first.offload_budget), (2, 6));
    // Touched, they are not the next to go; chosen anew once they are the coldest again, only the refused ones are tried.
    let id = node.ask_load(&hashes(0..8), 0);
    let reply = node.answer(id).expect("answered");
    node.release(&reply);
    node.world.now += 3_600_000_000;
    for n in 100..164 {
        node.put(&hashes(n..n + 1));
        node.finish_all();
    }
    let counters = count(&node);
    assert_eq!(counters.offloaded, 4);
    assert_eq!(counters.demote_missed, 64 - 4);
}

#[test]
fn while_a_store_is_off_nothing_is_chosen_for_it() {
    let mut node = roomy(settings(demotion()));
    let (store, on) = (STORE, false);
    node.world.step(Input::StoreSwitched { store, on });
    node.put(&hashes(0..64));
    node.put(&hashes(100..104));
    let counters = count(&node);
    assert_eq!((counters.offload_off, counters.demote_missed), (0, 4));
    let on = true;
    node.world.step(Input::StoreSwitched { store, on });
    for n in 200..210 {
        node.put(&hashes(n..n + 1));
        node.finish_all();
    }
    let counters = count(&node);
    assert_eq!(counters.offload_failed, 0);
    // The first one came too early for a write to end.
    assert!(counters.demote_missed <= 5, "{counters:?}");
    assert!(counters.offloaded >= 9);
}
