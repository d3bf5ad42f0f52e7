//! A device that fails, comes short, is full, or hangs, told by `--nvme-faults`. Loads are answered in bounded time, host memory is
//! served as ever, the store is switched off and comes back by itself.
#![allow(
    clippy::disallowed_methods,
    reason = "how long the daemon takes is what is tested"
)]

use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::common::{Daemon, eventually};
use crate::kit::{Engine, HOST_BLOCKS, Home, offloaded, store, tier};

/// How long a load may be waited for; the daemon has three quarters of it.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long anything may take on a machine that is busy with other things.
const BOUND: Duration = Duration::from_secs(8);
/// Blocks before the fault; more than fit into host memory.
const BEFORE: u32 = HOST_BLOCKS + 128;

struct Faulty {
    home: Home,
    daemon: Daemon,
    engine: Engine,
    rules: PathBuf,
}

impl Faulty {
    /// A store with blocks in it, of which the first are no longer in host memory.
    fn new() -> Self {
        let home = Home::new();
        let rules = home.run.path().join("faults");
        let flag = rules.display().to_string();
        let daemon = home.serve(&["--nvme-faults", &flag]);
        let mut engine = Engine::new(&daemon);
        for first in (0..BEFORE).step_by(64) {
            engine.store(1, first..first + 64);
            offloaded(&daemon, u64::from(first) + 64);
        }
        engine.patience(PATIENCE);
        Self {
            home,
            daemon,
            engine,
            rules,
        }
    }

    /// From now on the device does so.
    fn rule(&self, rules: &str) {
        let next = self.home.run.path().join("faults.next");
        std::fs::write(&next, rules).expect("written");
        std::fs::rename(&next, &self.rules).expect("renamed");
    }

    fn count(&self, name: &str) -> u64 {
        store(&self.daemon).counts[name]
    }

    /// Blocks that host memory has room for are stored and loaded as ever.
    fn host_memory_serves(&mut self, owner: u32) {
        let begun = Instant::now();
        self.engine.store(owner, 0..32);
        self.engine.load_all(owner, 0..32);
        let took = begun.elapsed();
        assert!(took < BOUND, "host memory was held up for {took:?}");
    }

    /// A load of blocks that only the store has: none comes, and none is waited for.
    fn loads_fail_in_time(&mut self) {
        let begun = Instant::now();
        let loads = self.engine.load(1, 0..32);
        let took = begun.elapsed();
        assert!(took < PATIENCE + BOUND, "a load took {took:?}");
        assert!(loads.loaded.is_empty(), "{loads:?}");
        assert!(!loads.failed.is_empty(), "held, and not absent: {loads:?}");
    }

    fn has_panicked(&self) {
        self.is_off();
        self.says("failed by a bug");
    }

    /// The log comes by a pipe, after what it tells of.
    fn says(&self, what: &str) {
        eventually(what, || self.daemon.log().contains(what));
    }

    /// Slots into which a block is to come.
    fn waiting_slots(&self) -> u64 {
        let slots = self.daemon.tenant().tiers.host.slots;
        slots.reserved + slots.filling
    }

    fn quarantined(&self) -> u64 {
        self.daemon.tenant().tiers.host.slots.quarantined
    }

    fn is_off(&self) {
        eventually("it is switched off", || store(&self.daemon).state == "off");
    }

    /// Once nothing fails any more it comes back by itself, and everything with it.
    fn heals(&mut self, owner: u32) {
        self.rule("");
        eventually("it is on again", || store(&self.daemon).state == "on");
        self.engine.patience(Duration::from_secs(60));
        self.engine.load_all(1, 0..BEFORE);
        let before = tier(&self.daemon, "offloaded");
        self.engine.store(owner, 0..16);
        eventually("blocks are written again", || {
            tier(&self.daemon, "offloaded") >= before + 16
        });
    }

    /// A restart finds what was written before and after.
    fn restarts(self, owner: u32) {
        let Self { home, daemon, .. } = self;
        drop(daemon);
        let daemon = home.serve(&[]);
        let mut engine = Engine::new(&daemon);
        engine.load_all(1, 0..BEFORE);
        engine.load_all(owner, 0..16);
    }
}

#[test]
fn reads_that_fail_are_failures_and_switch_it_off() {
    let mut one = Faulty::new();
    one.rule("read eio");
    one.loads_fail_in_time();
    one.is_off();
    assert!(one.count("io_errors") >= 8);
    assert!(tier(&one.daemon, "fetch_failed_io") > 0);
    one.host_memory_serves(2);
    assert!(tier(&one.daemon, "offload_off") >= 32, "while it is off");
    // Off, it is as if it were not there.
    let loads = one.engine.load(1, 0..32);
    assert!(loads.loaded.is_empty(), "{loads:?}");
    assert_eq!(one.daemon.get("/readyz").0, 200);
    one.heals(3);
    assert!(one.count("switched_on") >= 1);
    one.restarts(3);
}

#[test]
fn reads_that_come_short_are_never_taken_for_blocks() {
    let mut one = Faulty::new();
    one.rule("read short");
    one.loads_fail_in_time();
    one.is_off();
    assert!(one.count("io_short") >= 8);
    one.host_memory_serves(2);
    one.heals(3);
    one.restarts(3);
}

#[test]
fn a_full_device_holds_up_nobody() {
    let mut one = Faulty::new();
    one.rule("write enospc");
    one.host_memory_serves(2);
    eventually("failed writes switch it off", || {
        one.count("switched_off") >= 1
    });
    let failed = tier(&one.daemon, "offload_failed") + tier(&one.daemon, "offload_off");
    assert!(failed > 0);
    one.host_memory_serves(3);
    one.heals(4);
    one.restarts(4);
}

#[test]
fn flushes_that_fail_leave_nothing_promised() {
    let mut one = Faulty::new();
    let before = store(&one.daemon).blocks;
    one.rule("flush eio");
    one.host_memory_serves(2);
    eventually("the writes have failed", || {
        let counts = one.daemon.status().tier.counts;
        counts["offload_failed"] + counts["offload_off"] >= 32
    });
    assert_eq!(
        tier(&one.daemon, "offloaded"),
        u64::from(BEFORE),
        "nothing is durable without a flush"
    );
    assert!(store(&one.daemon).blocks <= before);
    one.heals(3);
    one.restarts(3);
}

#[test]
fn a_device_that_hangs_is_switched_off_and_comes_back() {
    let mut one = Faulty::new();
    one.rule("all stall");
    let begun = Instant::now();
    one.loads_fail_in_time();
    let took = begun.elapsed();
    assert!(took >= PATIENCE / 2, "it did not hang: {took:?}");
    assert!(tier(&one.daemon, "fetch_late") > 0);
    one.host_memory_serves(2);
    one.is_off();
    assert!(one.count("stalls") >= 1);
    one.host_memory_serves(3);
    one.heals(4);
    one.restarts(4);
}

#[test]
fn a_thread_that_panics_leaves_host_memory_and_nothing_waiting() {
    panics("read panic");
}

#[test]
fn a_thread_that_panics_with_completions_in_hand_loses_none() {
    panics("read panic-late");
}

/// The thread panics under a load of 32 blocks.
fn panics(rule: &str) {
    let mut one = Faulty::new();
    one.rule(rule);
    one.loads_fail_in_time();
    one.has_panicked();
    eventually("each read is answered", || {
        tier(&one.daemon, "fetch_failed_io") + tier(&one.daemon, "fetch_failed_off") >= 32
    });
    eventually("no slot waits for it", || {
        one.waiting_slots() + one.quarantined() == 0
    });
    assert_eq!(one.count("lost"), 0);
    one.host_memory_serves(2);
    assert!(
        tier(&one.daemon, "offload_off") >= 32,
        "nothing is asked of it"
    );
    let loads = one.engine.load(1, 0..32);
    assert!(loads.loaded.is_empty(), "{loads:?}");
    assert_eq!(one.daemon.get("/readyz").0, 200);
    one.host_memory_serves(3);
    one.rule("");
    let Faulty { home, daemon, .. } = one;
    drop(daemon);
    let daemon = home.serve(&[]);
    Engine::new(&daemon).load_all(1, 0..BEFORE);
}

#[test]
fn a_thread_that_panics_while_its_device_hangs_keeps_only_the_memory_that_may_be_written() {
    let mut one = Faulty::new();
    one.rule("read stall\nwrite panic");
    // Few enough that writes can begin, too.
    let loads = one.engine.load(1, 0..8);
    assert_eq!(loads.failed.len(), 8, "{loads:?}");
    assert_eq!(one.waiting_slots(), 8);
    assert_eq!(one.engine.found(1, 0..8), 8, "they may come yet");
    one.engine.store(2, 0..8);
    one.has_panicked();
    eventually("its reads are lost", || {
        tier(&one.daemon, "slots_lost") == 8
    });
    assert_eq!(tier(&one.daemon, "fetch_failed_off"), 8);
    assert_eq!(one.count("lost"), 8);
    one.says("slots stay taken");
    eventually("each write is answered", || {
        tier(&one.daemon, "offload_failed") + tier(&one.daemon, "offload_off") >= 8
    });
    assert_eq!(one.waiting_slots(), 0);
    assert_eq!(one.quarantined(), 8, "the device may still write there");
    // Nobody waits for these blocks any more: they are stored and loaded again.
    assert_eq!(one.engine.found(1, 0..8), 0);
    let begun = Instant::now();
    assert_eq!(
        one.engine.load(1, 0..8).failed.len(),
        8,
        "held, if not here"
    );
    one.engine.store(1, 0..8);
    one.engine.load_all(1, 0..8);
    let took = begun.elapsed();
    assert!(took < BOUND, "they were waited for: {took:?}");
    // All other slots are used again and again.
    for owner in 3..6 {
        one.engine.store(owner, 0..HOST_BLOCKS / 2);
    }
    one.host_memory_serves(6);
    assert_eq!((one.waiting_slots(), one.quarantined()), (0, 8));
    assert_eq!(one.daemon.get("/readyz").0, 200);
    let log = one.daemon.log();
    assert_eq!(log.matches("slots stay taken").count(), 1, "{log}");
    one.rule("");
    let Faulty { home, daemon, .. } = one;
    drop(daemon);
    let daemon = home.serve(&[]);
    Engine::new(&daemon).load_all(1, 0..BEFORE);
}

#[test]
fn a_daemon_ends_in_time_although_its_device_hangs() {
    let mut one = Faulty::new();
    one.rule("all stall");
    one.engine.store(2, 0..32);
    let begun = Instant::now();
    one.daemon.signal(rustix::process::Signal::TERM);
    let ended = one.daemon.wait();
    assert!(ended.success(), "{ended}: {}", one.daemon.log());
    let took = begun.elapsed();
    assert!(took < Duration::from_secs(30), "it took {took:?}");
    let daemon = one.home.serve(&[]);
    Engine::new(&daemon).load_all(1, 0..BEFORE);
}
