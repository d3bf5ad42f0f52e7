//! Things that happen to a store while a daemon uses it and that no fault of a single operation is: bytes that rot, a file that is cut,
//! engines that leave, two engines that want the same, two stores, an orderly end in the middle of writes.

use kvd_client::{FailReason, Identity, Session};
use kvd_wire::session::{Load, request};

use crate::common::{PATIENCE, eventually, hash, layout, record};
use crate::kit::{Engine, HOST_BLOCKS, Home, PAGE, flip, header_of, offloaded, store, tier};

/// More blocks than fit into host memory, so that the first are in the store alone.
const BLOCKS: u32 = HOST_BLOCKS + 128;

fn fill(daemon: &crate::common::Daemon, engine: &mut Engine) {
    for first in (0..BLOCKS).step_by(64) {
        engine.store(1, first..first + 64);
        offloaded(daemon, u64::from(first) + 64);
    }
}

#[test]
fn bytes_that_rot_under_a_daemon_are_failures_once_and_then_stored_anew() {
    let home = Home::new();
    let daemon = home.serve(&[]);
    let mut engine = Engine::new(&daemon);
    fill(&daemon, &mut engine);
    flip(&home.file(), header_of(&home.file(), 1, 3) + PAGE + 777, 2);
    flip(&home.file(), header_of(&home.file(), 1, 5) + 200, 2);
    let loads = engine.load(1, 0..8);
    let failed = [(3, FailReason::Daemon), (5, FailReason::Daemon)];
    assert_eq!(loads.failed, failed, "{loads:?}");
    assert_eq!(loads.loaded.len(), 6, "{loads:?}");
    assert_eq!(tier(&daemon, "fetch_failed_corrupt"), 2);
    let counts = store(&daemon).counts;
    assert_eq!(
        (counts["corrupt_payload"], counts["corrupt_header"]),
        (1, 1)
    );
    let loads = engine.load(1, 0..8);
    assert_eq!(loads.absent, [3, 5], "they are forgotten: {loads:?}");
    assert_eq!(store(&daemon).state, "on", "that is no failing device");
    engine.store(1, 3..4);
    engine.store(1, 5..6);
    offloaded(&daemon, u64::from(BLOCKS) + 2);
    drop(daemon);
    let daemon = home.serve(&[]);
    Engine::new(&daemon).load_all(1, 0..BLOCKS);
}

#[test]
fn a_file_cut_under_a_daemon_gives_no_wrong_byte() {
    let home = Home::new();
    let daemon = home.serve(&[]);
    let mut engine = Engine::new(&daemon);
    fill(&daemon, &mut engine);
    let half = header_of(&home.file(), 1, 10);
    let file = std::fs::File::options().write(true).open(home.file());
    file.expect("opens").set_len(half).expect("cut");
    let loads = engine.load(1, 0..BLOCKS);
    assert!(!loads.failed.is_empty(), "{loads:?}");
    engine.store(2, 0..32);
    engine.load_all(2, 0..32);
    drop(daemon);
    // The file is made as long as it was; what was cut off reads as zeros.
    let daemon = home.serve(&[]);
    let mut engine = Engine::new(&daemon);
    let loads = engine.load(1, 0..BLOCKS);
    assert!(
        loads.loaded.len() >= 10,
        "what lies before the cut: {loads:?}"
    );
    engine.load(2, 0..32);
}

#[test]
fn an_engine_that_leaves_while_its_load_waits_leaves_nothing_behind() {
    let home = Home::new();
    let rules = home.run.path().join("faults");
    let flag = rules.display().to_string();
    let daemon = home.serve(&["--nvme-faults", &flag]);
    let mut engine = Engine::new(&daemon);
    fill(&daemon, &mut engine);
    std::fs::write(&rules, "read stall").expect("written");
    let identity = Identity::script("to leave");
    let mut leaver = Session::connect(&daemon.socket, &identity, PATIENCE).expect("connects");
    let namespace = leaver
        .register(&record(&[]), &[layout()])
        .expect("registers")
        .namespace;
    let hashes: Vec<u8> = (0..32).flat_map(|n| hash(1, n)).collect();
    let load = Load {
        namespace,
        group: 0,
        hashes: hashes.into(),
        deadline_ms: 60_000,
    };
    leaver.send(request::Body::Load(load)).expect("sent");
    eventually("its blocks are coming", || {
        let slots = daemon.tenant().tiers.host.slots;
        slots.reserved + slots.filling >= 32
    });
    drop(leaver);
    eventually("it has left", || daemon.tenant().sessions.len() == 1);
    std::fs::write(&rules, "").expect("written");
    eventually("all slots are free or resident", || {
        let slots = daemon.tenant().tiers.host.slots;
        slots.filling + slots.reserved + slots.quarantined == 0
    });
    eventually("the store is on", || store(&daemon).state == "on");
    engine.load_all(1, 0..BLOCKS);
    eventually("nothing stays pinned", || {
        daemon.tenant().tiers.host.pinned_bytes == 0
    });
}

#[test]
fn engines_that_want_the_same_blocks_share_their_reads() {
    let home = Home::new();
    let daemon = home.serve(&[]);
    let mut engine = Engine::new(&daemon);
    fill(&daemon, &mut engine);
    drop(daemon);
    let daemon = home.serve(&[]);
    let mut engines: Vec<_> = (0..4).map(|_| Engine::new(&daemon)).collect();
    std::thread::scope(|scope| {
        for engine in &mut engines {
            let load = || engine.load_all(1, 0..128);
            std::thread::Builder::new()
                .name("engine".to_owned())
                .spawn_scoped(scope, load)
                .expect("a thread");
        }
    });
    assert_eq!(tier(&daemon, "fetched"), 128, "each block was read once");
}

#[test]
fn two_stores_share_the_blocks_and_hold_them_over_a_restart() {
    let (home, other) = (Home::new(), Home::new());
    let both = format!(
        "{},{}",
        home.store.path().display(),
        other.store.path().display()
    );
    let daemon = home.serve(&["--nvme", &both]);
    let mut engine = Engine::new(&daemon);
    fill(&daemon, &mut engine);
    engine.load_all(1, 0..BLOCKS);
    let stores = daemon.status().stores;
    let (one, two) = (stores[0].blocks, stores[1].blocks);
    assert_eq!(one + two, u64::from(BLOCKS));
    assert!(one > 0 && two > 0, "{one} and {two}");
    drop(daemon);
    let daemon = home.serve(&["--nvme", &both]);
    Engine::new(&daemon).load_all(1, 0..BLOCKS);
    drop(daemon);
    // With one of them gone, what the other has is served.
    std::fs::remove_file(other.file()).expect("removed");
    let daemon = home.serve(&["--nvme", &both]);
    let loads = Engine::new(&daemon).load(1, 0..BLOCKS);
    assert_eq!(loads.loaded.len() as u64, one, "{loads:?}");
    assert!(loads.failed.is_empty(), "{loads:?}");
}

#[test]
fn an_orderly_end_in_the_middle_of_writes_keeps_what_was_written() {
    let home = Home::new();
    let mut known = 0;
    for owner in 0..4 {
        let mut daemon = home.serve(&[]);
        let recovered = tier(&daemon, "recovered");
        assert!(recovered >= known, "{recovered} of {known}");
        Engine::new(&daemon).store(owner, 0..96);
        known = recovered + tier(&daemon, "offloaded");
        daemon.signal(rustix::process::Signal::TERM);
        assert!(daemon.wait().success(), "{}", daemon.log());
    }
}
