//! A store that works: blocks beyond host memory come back, in any way of doing I/O and under every policy of writing.

use crate::kit::{Engine, HOST_BLOCKS, Home, offloaded, store, tier};

#[test]
fn a_chain_longer_than_host_memory_comes_back_now_and_after_a_restart() {
    let home = Home::new();
    let long = 3 * HOST_BLOCKS;
    let mut daemon = home.serve(&[]);
    let mut engine = Engine::new(&daemon);
    for first in (0..long).step_by(128) {
        engine.store(1, first..first + 128);
        offloaded(&daemon, u64::from(first) + 128);
    }
    let left = tier(&daemon, "demoted") + daemon.tenant().stores.evicted;
    assert!(left >= u64::from(long - HOST_BLOCKS), "it does not fit");
    engine.load_all(1, 0..long);
    let fetched = tier(&daemon, "fetched");
    assert!(
        fetched >= u64::from(long - HOST_BLOCKS),
        "only {fetched} came from the store"
    );
    engine.load_all(1, 0..long);
    let now = store(&daemon);
    assert_eq!((now.state.as_str(), now.blocks), ("on", u64::from(long)));
    assert!(now.formatted);
    let unknown = engine.load(2, 0..4);
    assert_eq!(unknown.absent.len(), 4, "{unknown:?}");
    daemon.signal(rustix::process::Signal::TERM);
    assert_eq!(daemon.wait().code(), Some(0), "{}", daemon.log());

    let daemon = home.serve(&[]);
    let again = store(&daemon);
    assert_eq!((again.formatted, again.recovered), (false, u64::from(long)));
    let mut engine = Engine::new(&daemon);
    engine.load_all(1, 0..long);
    assert_eq!(tier(&daemon, "fetch_failed_corrupt"), 0);
    assert_eq!(tier(&daemon, "offloaded"), 0, "nothing is written twice");
    let mut other = Engine::of(&daemon, "other");
    let foreign = other.load(1, 0..8);
    assert_eq!(foreign.absent.len(), 8, "another model's: {foreign:?}");
}

#[test]
fn a_full_store_takes_new_blocks_and_forgets_old_ones() {
    let home = Home::new();
    let daemon = home.serve(&["--nvme-capacity", "64MiB"]);
    let mut engine = Engine::new(&daemon);
    // Chains of their own, so that old ones can go whole.
    for owner in 0..24 {
        engine.store(owner, 0..64);
        crate::common::eventually("nothing is being written", || {
            let counts = daemon.status().tier.counts;
            let over = ["offloaded", "offload_no_place", "offload_failed"];
            over.iter().map(|name| counts[*name]).sum::<u64>() == u64::from(owner + 1) * 64
        });
    }
    assert!(tier(&daemon, "evicted") > 0);
    assert_eq!(tier(&daemon, "offload_failed"), 0);
    let mut there = 0;
    for owner in 0..24 {
        let loads = engine.load(owner, 0..64);
        assert!(loads.failed.is_empty(), "{:?}", loads.failed);
        there += loads.loaded.len();
        if owner == 23 {
            assert_eq!(loads.loaded.len(), 64, "the newest are there");
        }
    }
    assert!(there > 600, "a full store holds more than {there}");
}

#[test]
fn threads_serve_the_same_and_say_why() {
    let home = Home::new();
    let daemon = home.serve(&["--nvme-io", "threads"]);
    let found = store(&daemon);
    assert_eq!(found.io, "threads");
    let reason = found.io_reason.expect("a reason");
    assert!(reason.contains("asks for threads"), "{reason}");
    let mut engine = Engine::new(&daemon);
    for first in [0, 128, 256] {
        engine.store(1, first..first + 128);
        offloaded(&daemon, u64::from(first) + 128);
    }
    engine.load_all(1, 0..384);
    assert!(tier(&daemon, "fetched") > 0);
    drop(daemon);
    // What the one has written the other reads.
    let daemon = home.serve(&[]);
    Engine::new(&daemon).load_all(1, 0..384);
}

#[test]
fn on_second_use_only_what_was_loaded_is_written() {
    let home = Home::new();
    let daemon = home.serve(&["--offload", "second_use"]);
    let mut engine = Engine::new(&daemon);
    engine.store(1, 0..64);
    engine.load_all(1, 0..16);
    offloaded(&daemon, 16);
    engine.load_all(1, 0..16);
    engine.load_all(1, 16..20);
    offloaded(&daemon, 20);
    assert_eq!(store(&daemon).counts["writes"], 20);
    drop(daemon);
    let daemon = home.serve(&[]);
    let loads = Engine::new(&daemon).load(1, 0..64);
    assert_eq!(loads.loaded, (0..20).collect::<Vec<_>>());
    assert_eq!(loads.absent.len(), 44, "{loads:?}");
}

#[test]
fn on_demotion_only_what_does_not_fit_is_written() {
    let home = Home::new();
    let daemon = home.serve(&["--offload", "demotion"]);
    let mut engine = Engine::new(&daemon);
    let settled = || {
        crate::common::eventually("nothing is leased or being written", || {
            daemon.tenant().tiers.host.pinned_bytes == 0
        });
    };
    // An eighth of host memory is kept free or written ahead.
    let (ahead, chains) = (HOST_BLOCKS / 8, HOST_BLOCKS / 16);
    for owner in 0..chains - 2 {
        engine.store(owner, 0..16);
    }
    engine.load_all(0, 0..16);
    assert_eq!(store(&daemon).counts["writes"], 0, "there is room");
    // Half as much again, no faster than it is written. The chain that was loaded stays, the next ones go.
    let more = chains / 2;
    for owner in chains - 2..chains + more {
        engine.store(owner, 0..16);
        settled();
    }
    let over = u64::from(more * 16);
    let written = tier(&daemon, "offloaded");
    assert!(
        (over..=over + u64::from(ahead)).contains(&written),
        "{over} blocks did not fit, {written} were written"
    );
    assert_eq!(tier(&daemon, "demote_missed"), 0);
    engine.load_all(0, 0..16);
    assert_eq!(tier(&daemon, "fetched"), 0, "it stayed");
    for owner in 1..chains + more {
        engine.load_all(owner, 0..16);
        settled();
    }
    assert!(tier(&daemon, "fetched") >= over);
    assert_eq!(tier(&daemon, "demote_missed"), 0);
}

#[test]
fn a_spent_budget_stops_writes_and_counts_them() {
    let home = Home::new();
    // An hour's worth is six blocks.
    let daemon = home.serve(&["--nvme-write-budget", "10MiB"]);
    let mut engine = Engine::new(&daemon);
    engine.store(1, 0..100);
    let refused = tier(&daemon, "offload_budget");
    assert!((94..=100).contains(&refused), "{refused} were not written");
    offloaded(&daemon, 100 - refused);
    engine.load_all(1, 0..100);
}
