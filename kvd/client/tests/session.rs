//! The blocking session and whole-block copies over it, against a daemon that can be told to misbehave.

#[path = "common/blocks.rs"]
mod blocks;
mod common;

use std::time::Duration;

use blocks::{Buffers, hashes, mover};
use common::{ABORT, BYE, FakeDaemon, LOAD, LONG, LOOKUP, RELEASE, RESERVE, Script};
use kvd_client::{ChainRef, ErrorKind, FailReason, Identity, LoadOutcome, Session, StoreOutcome};
use kvd_wire::session::{Ping, request};

const SHORT: Duration = Duration::from_millis(30);

fn dir() -> (tempfile::TempDir, std::path::PathBuf) {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("kvd.sock");
    (dir, path)
}

fn connected(path: &std::path::Path) -> Session {
    let mut session = Session::connect(path, &Identity::script("test"), LONG).expect("connected");
    let joined = session.register(b"record", &[]).expect("registered");
    assert_eq!((joined.namespace, joined.namespace_id), (1, [3; 32]));
    session
}

fn chain(hashes: &[u8]) -> ChainRef<'_> {
    ChainRef {
        group: 0,
        hashes,
        parent: None,
    }
}

#[test]
fn without_a_daemon_the_error_says_what_to_do() {
    let (_dir, path) = dir();
    let error = Session::connect(&path, &Identity::script("test"), LONG).expect_err("nobody there");
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.to_string().contains("kvd serve"), "{error}");
    let long = path.join("x".repeat(200));
    let error = Session::connect(&long, &Identity::script("test"), LONG).expect_err("too long");
    assert_eq!(error.kind(), ErrorKind::Invalid);
}

#[test]
fn blocks_go_and_come_back_in_windows() {
    let (_dir, path) = dir();
    let daemon = FakeDaemon::start(&path, Script::default());
    let mut session = connected(&path);
    let names = hashes(0..10);
    let from = Buffers::new(10, |i| i as u8 + 1);
    let mut mover = mover(3 * 8192);
    let stored = mover
        .store(&mut session, 1, chain(&names), &from.refs())
        .unwrap();
    assert_eq!(stored, [StoreOutcome::Visible; 10]);
    let again = mover
        .store(&mut session, 1, chain(&names), &from.refs())
        .unwrap();
    assert_eq!(again, [StoreOutcome::Present; 10]);
    let requests: Vec<usize> = daemon
        .seen()
        .iter()
        .filter_map(|b| match b {
            request::Body::Reserve(r) => Some(r.chains[0].hashes.len() / 32),
            _ => None,
        })
        .collect();
    assert_eq!(requests, [3, 3, 3, 1, 3, 3, 3, 1], "windows");

    let to = Buffers::new(12, |_| 0);
    let loaded = mover
        .load(&mut session, 1, &hashes(0..12), &to.refs())
        .unwrap();
    assert_eq!(loaded[..10], [LoadOutcome::Loaded; 10]);
    assert_eq!(loaded[10..], [LoadOutcome::Absent; 2]);
    assert!((0..10).all(|i| to.holds(i, i as u8 + 1)));
    assert!(to.holds(10, 0));
    let released: usize = daemon
        .seen()
        .iter()
        .filter_map(|b| match b {
            request::Body::Release(r) => Some(r.slots.len()),
            _ => None,
        })
        .sum();
    assert_eq!(released, 10, "every lease is ended");
}

#[test]
fn a_flipped_byte_is_caught_and_reported() {
    let (_dir, path) = dir();
    let daemon = FakeDaemon::start(&path, Script::default());
    let mut session = connected(&path);
    let from = Buffers::new(4, |i| i as u8 + 1);
    let mut mover = mover(1 << 20);
    mover
        .store(&mut session, 1, chain(&hashes(0..4)), &from.refs())
        .unwrap();
    let view = session.arena().unwrap();
    let slot = view.slot(2, 2 * 8192, 8192).unwrap();
    // SAFETY: inside the slot.
    unsafe { slot.as_ptr().add(5000).write_volatile(77) };
    let to = Buffers::new(4, |_| 0);
    let loaded = mover
        .load(&mut session, 1, &hashes(0..4), &to.refs())
        .unwrap();
    let good = LoadOutcome::Loaded;
    let bad = LoadOutcome::Failed(FailReason::Corrupt);
    assert_eq!(loaded, [good, good, bad, good]);
    let request::Body::Release(release) = daemon.expect(RELEASE) else {
        unreachable!()
    };
    assert_eq!(release.corrupt, [2]);
}

#[test]
fn a_slot_that_was_given_away_is_an_overrun_or_stale() {
    let (_dir, path) = dir();
    let daemon = FakeDaemon::start(&path, Script::default());
    let mut session = connected(&path);
    let from = Buffers::new(2, |_| 1);
    let mut mover = mover(1 << 20);
    mover
        .store(&mut session, 1, chain(&hashes(0..2)), &from.refs())
        .unwrap();
    // The daemon evicts the second block, and its old answer is still under way.
    daemon.arena().generations().set(1, 4);
    let to = Buffers::new(2, |_| 0);
    let loaded = mover
        .load(&mut session, 1, &hashes(0..2), &to.refs())
        .unwrap();
    assert_eq!(
        loaded,
        [
            LoadOutcome::Loaded,
            LoadOutcome::Failed(FailReason::Overrun)
        ]
    );
    let request::Body::Release(release) = daemon.expect(RELEASE) else {
        unreachable!()
    };
    assert!(release.corrupt.is_empty(), "that is no corruption");

    let reserved = session.reserve(1, chain(&hashes(5..6))).unwrap();
    let slots = kvd_client::ReservedSlot::from_reply(&reserved, 1).unwrap();
    daemon
        .arena()
        .generations()
        .set(slots[0].slot, slots[0].generation + 1);
    let filled = mover
        .fill(&mut session, 1, &slots, &from.refs()[..1])
        .unwrap();
    assert_eq!(filled, [StoreOutcome::Stale]);
    let view = session.arena().unwrap();
    let bytes = view.slot(slots[0].slot, slots[0].offset, 1).unwrap();
    // SAFETY: inside the slot.
    assert_eq!(unsafe { bytes.as_ptr().read() }, 0, "nothing was written");
}

#[test]
fn answers_that_make_no_sense_fail_and_touch_nothing() {
    let (_dir, path) = dir();
    let daemon = FakeDaemon::start(&path, Script::default());
    let mut session = connected(&path);
    let from = Buffers::new(2, |_| 1);
    let mut mover = mover(1 << 20);
    mover
        .store(&mut session, 1, chain(&hashes(0..2)), &from.refs())
        .unwrap();
    // Too few checksums.
    daemon.blocks(|b| b.by_hash.values_mut().for_each(|b| b.crcs.truncate(1)));
    let to = Buffers::new(2, |_| 0);
    let loaded = mover
        .load(&mut session, 1, &hashes(0..2), &to.refs())
        .unwrap();
    assert_eq!(loaded, [LoadOutcome::Failed(FailReason::Malformed); 2]);
    // A slot beyond the arena.
    daemon.blocks(|b| {
        b.by_hash.values_mut().for_each(|b| {
            b.crcs.push(0);
            b.slot = 1 << 30;
        });
    });
    let loaded = mover
        .load(&mut session, 1, &hashes(0..2), &to.refs())
        .unwrap();
    assert_eq!(loaded, [LoadOutcome::Failed(FailReason::Malformed); 2]);
    assert!(to.holds(0, 0) && to.holds(1, 0));
    assert!(
        mover
            .load(&mut session, 1, &hashes(0..3), &to.refs())
            .is_err(),
        "3 hashes, 2 places"
    );
    session.ping().expect("the session goes on");
}

#[test]
fn late_replies_are_undone() {
    let (_dir, path) = dir();
    let daemon = FakeDaemon::start(&path, Script::default());
    let mut session = connected(&path);
    let from = Buffers::new(1, |_| 1);
    let mut mover = mover(1 << 20);
    mover
        .store(&mut session, 1, chain(&hashes(0..1)), &from.refs())
        .unwrap();
    daemon.script(|s| s.hold = vec![LOOKUP, RESERVE, LOAD]);
    session.set_timeout(SHORT).unwrap();
    let late = [
        session
            .lookup(1, &[chain(&hashes(0..4))], 1000, true)
            .expect_err("held back"),
        session
            .reserve(1, chain(&hashes(7..9)))
            .expect_err("held back"),
        session
            .load(1, 0, &hashes(0..1), 1000)
            .expect_err("held back"),
    ];
    assert!(
        late.iter()
            .all(|e| e.timed_out() && e.kind() == ErrorKind::Unavailable)
    );
    session.set_timeout(LONG).unwrap();
    daemon.let_go();
    session.ping().expect("still good");
    let request::Body::Release(lookup) = daemon.expect(RELEASE) else {
        unreachable!()
    };
    assert_eq!(lookup.lease, 99);
    let request::Body::Abort(abort) = daemon.expect(ABORT) else {
        unreachable!()
    };
    assert_eq!(abort.slots.len(), 2);
    let request::Body::Release(load) = daemon.expect(RELEASE) else {
        unreachable!()
    };
    assert_eq!((load.slots, load.generations), (vec![0], vec![2]));
}

#[test]
fn requests_are_pipelined_and_bounded() {
    let (_dir, path) = dir();
    let daemon = FakeDaemon::start(
        &path,
        Script {
            in_flight: 8,
            ..Script::default()
        },
    );
    let mut session = connected(&path);
    daemon.freeze();
    let ids: Vec<u32> = (0..8)
        .map(|_| session.send(request::Body::Ping(Ping {})).expect("room"))
        .collect();
    let error = session
        .send(request::Body::Ping(Ping {}))
        .expect_err("no room");
    assert_eq!(error.kind(), ErrorKind::Busy);
    daemon.thaw();
    for id in ids.iter().rev() {
        session.receive(*id).expect("a reply");
    }
    assert!(session.receive(ids[0]).is_err(), "each reply once");
    let long = hashes(0..200_000);
    let error = session
        .lookup(1, &[chain(&long)], 0, false)
        .expect_err("too long");
    assert_eq!(error.kind(), ErrorKind::Invalid);
    session.ping().expect("nothing of it was sent");
    assert!(session.limits().in_flight == 8 && session.status().unwrap()[..] == *b"{}");
}

#[test]
fn descriptors_that_nobody_asked_for_are_closed() {
    let (_dir, path) = dir();
    let daemon = FakeDaemon::start(
        &path,
        Script {
            extra_fds: true,
            ..Script::default()
        },
    );
    let mut session = connected(&path);
    // Those with the reply to the first call; how many the process has open now.
    session.ping().unwrap();
    let open = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let mut least = open();
    let mut most = least;
    for _ in 0..50 {
        session.ping().expect("served all the same");
        least = least.min(open());
        most = most.max(open());
    }
    assert!(
        most < least + 50 * 4,
        "{least} to {most}: other tests come and go, 400 would be ours"
    );
    drop(daemon);
}

#[test]
fn a_session_ends_with_bye_unless_a_copy_is_under_way() {
    let (_dir, path) = dir();
    let daemon = FakeDaemon::start(&path, Script::default());
    connected(&path).close().expect("said");
    daemon.expect(BYE);
    drop(connected(&path));
    daemon.expect(BYE);
    let session = connected(&path);
    let guard = session.begin_copy().unwrap();
    assert!(guard.is_current());
    drop(session);
    assert!(!guard.is_current());
    drop(guard);
    connected(&path).close().expect("said");
    let byes = daemon
        .seen()
        .iter()
        .filter(|b| matches!(b, request::Body::Bye(_)))
        .count();
    assert_eq!(byes, 1, "only the last one's");
}

#[test]
fn when_the_daemon_dies_every_call_says_so() {
    let (_dir, path) = dir();
    let daemon = FakeDaemon::start(&path, Script::default());
    let mut session = connected(&path);
    let guard = session.begin_copy().unwrap();
    daemon.kill();
    let error = session.ping().expect_err("gone");
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.ends_session() && !guard.is_current());
    assert!(session.begin_copy().is_err());
    let from = Buffers::new(1, |_| 1);
    let outcomes = mover(1 << 20).store(&mut session, 1, chain(&hashes(0..1)), &from.refs());
    assert_eq!(outcomes.unwrap(), [StoreOutcome::Failed(FailReason::Lost)]);
    let outcomes = mover(1 << 20).load(&mut session, 1, &hashes(0..1), &from.refs());
    assert_eq!(outcomes.unwrap(), [LoadOutcome::Failed(FailReason::Lost)]);
}
