//! The link against a daemon that is absent, hangs, dies and comes back.

#[path = "common/blocks.rs"]
mod blocks;
mod common;

use std::time::Duration;

use blocks::{Buffers, hashes, mover};
use common::{ABORT, BYE, FENCE, FakeDaemon, HELLO, LOAD, LONG, LOOKUP, RELEASE, RESERVE, Script};
use kvd_client::{
    ChainRef, ErrorKind, FailReason, Identity, Link, LinkCaller, LinkConfig, LoadOutcome,
    NamespaceSlot, Registration, StoreOutcome, reply,
};
use kvd_wire::session::{Chain, Load, Lookup, Ping, Reserve, request};

fn config(path: &std::path::Path) -> LinkConfig {
    LinkConfig {
        request_timeout: LONG,
        ..LinkConfig::new(path.to_owned(), Identity::script("test"))
    }
}

fn dir() -> (tempfile::TempDir, std::path::PathBuf) {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("kvd.sock");
    (dir, path)
}

fn linked(config: LinkConfig) -> (Link, NamespaceSlot) {
    let link = Link::start(config).expect("started");
    let slot = link
        .register(Registration {
            record: b"record".to_vec(),
            groups: Vec::new(),
        })
        .expect("registered");
    let now = link.wait_registered(&slot, 0, LONG).expect("in time");
    assert_eq!((now.namespace, now.epoch), (1, 1));
    (link, slot)
}

fn ping() -> request::Body {
    request::Body::Ping(Ping {})
}

fn reserve(range: std::ops::Range<u32>) -> request::Body {
    let chain = Chain {
        hashes: hashes(range).into(),
        ..Chain::default()
    };
    request::Body::Reserve(Reserve {
        namespace: 1,
        chains: vec![chain],
    })
}

fn load(range: std::ops::Range<u32>) -> request::Body {
    request::Body::Load(Load {
        namespace: 1,
        hashes: hashes(range).into(),
        ..Load::default()
    })
}

fn lookup(range: std::ops::Range<u32>, lease_ms: u32) -> request::Body {
    let chain = Chain {
        hashes: hashes(range).into(),
        ..Chain::default()
    };
    request::Body::Lookup(Lookup {
        namespace: 1,
        chains: vec![chain],
        lease_ms,
        leading: true,
        ..Lookup::default()
    })
}

fn chain(hashes: &[u8]) -> ChainRef<'_> {
    ChainRef {
        group: 0,
        hashes,
        parent: None,
    }
}

#[test]
fn an_absent_daemon_is_no_error_and_a_late_one_is_found() {
    let (_dir, path) = dir();
    let link = Link::start(config(&path)).expect("started");
    let slot = link
        .register(Registration {
            record: vec![1],
            groups: Vec::new(),
        })
        .unwrap();
    let error = link.submit(ping()).expect_err("nobody there");
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(!link.connected() && link.arena().is_none() && slot.current().is_none());
    assert!(link.begin_copy().is_err());
    let _daemon = FakeDaemon::start(&path, Script::default());
    assert!(link.wait_connected(0, LONG));
    let ticket = link.submit(ping()).expect("connected");
    assert!(matches!(link.wait(ticket, LONG), Ok(reply::Body::Pong(_))));
    assert!(link.wait_registered(&slot, 0, LONG).is_some());
    assert!(link.arena().is_some() && link.epoch() == 1);
}

#[test]
fn tickets_are_polled_without_waiting() {
    let (_dir, path) = dir();
    let daemon = FakeDaemon::start(&path, Script::default());
    let (link, _slot) = linked(config(&path));
    daemon.script(|s| s.hold = vec![LOOKUP]);
    let mut ticket = link.submit(lookup(0..4, 0)).unwrap();
    assert!(link.poll(&mut ticket).is_none());
    daemon.expect(LOOKUP);
    assert!(link.poll(&mut ticket).is_none());
    // A reply that comes after it does not wait for it.
    let other = link.submit(ping()).unwrap();
    assert!(link.wait(other, LONG).is_ok());
    assert!(link.poll(&mut ticket).is_none());
    daemon.let_go();
    let answer = loop {
        if let Some(answer) = link.poll(&mut ticket) {
            break answer;
        }
        std::thread::yield_now();
    };
    let Ok(reply::Body::Lookup(reply)) = answer else {
        panic!("{answer:?}")
    };
    assert_eq!(reply.chains[0].length, [4]);
    assert!(link.poll(&mut ticket).unwrap().is_err(), "spent");
}

#[test]
fn what_is_queued_goes_out_without_waking_anybody_for_each() {
    let (_dir, path) = dir();
    let _daemon = FakeDaemon::start(&path, Script::default());
    let (link, _slot) = linked(config(&path));
    let first = link.queue(ping()).expect("queued");
    let second = link.queue(ping()).expect("queued");
    link.wake_soon();
    for ticket in [first, second] {
        link.wait(ticket, LONG).expect("the thread was asleep");
    }
    // For a tenth of a second it looks by itself: this process may not run for that long.
    let by_itself = (0..50).any(|_| {
        let woken = link.queue(ping()).expect("queued");
        link.wake_soon();
        link.wait(woken, LONG).expect("answered");
        let third = link.queue(ping()).expect("queued");
        link.wait(third, Duration::from_millis(500)).is_ok()
    });
    assert!(by_itself);
    let fourth = link.submit(ping()).expect("sent");
    link.wait(fourth, LONG).expect("it is woken");
}

#[test]
fn blocks_go_and_come_back_over_a_link() {
    let (_dir, path) = dir();
    let _daemon = FakeDaemon::start(&path, Script::default());
    let (link, _slot) = linked(config(&path));
    let mut caller = LinkCaller {
        link: &link,
        timeout: LONG,
    };
    let from = Buffers::new(5, |i| i as u8 + 1);
    let mut mover = mover(2 * 8192);
    let stored = mover
        .store(&mut caller, 1, chain(&hashes(0..5)), &from.refs())
        .unwrap();
    assert_eq!(stored, [StoreOutcome::Visible; 5]);
    let to = Buffers::new(5, |_| 0);
    let loaded = mover
        .load(&mut caller, 1, &hashes(0..5), &to.refs())
        .unwrap();
    assert_eq!(loaded, [LoadOutcome::Loaded; 5]);
    assert!((0..5).all(|i| to.holds(i, i as u8 + 1)));
}

#[test]
fn a_frozen_daemon_never_blocks_and_its_late_replies_are_undone() {
    let (_dir, path) = dir();
    let daemon = FakeDaemon::start(
        &path,
        Script {
            in_flight: 16,
            ..Script::default()
        },
    );
    let (link, _slot) = linked(LinkConfig {
        queue: 8,
        ..config(&path)
    });
    let from = Buffers::new(1, |_| 1);
    let mut caller = LinkCaller {
        link: &link,
        timeout: LONG,
    };
    mover(1 << 20)
        .store(&mut caller, 1, chain(&hashes(0..1)), &from.refs())
        .unwrap();
    daemon.seen();

    daemon.freeze();
    let short = Duration::from_millis(20);
    let timed = [reserve(5..8), load(0..1), lookup(0..1, 1000)]
        .map(|body| link.submit_within(body, short).expect("handed over"));
    for ticket in timed {
        let error = link.wait(ticket, LONG).expect_err("nobody answers");
        assert!(error.timed_out(), "{error}");
    }
    // Nothing waits for an answer, but 3 of 16 places are taken; the rest, two queues, and then no more.
    let mut kept = Vec::new();
    let error = loop {
        match link.submit(ping()) {
            Ok(ticket) => kept.push(ticket),
            Err(error) => break error,
        }
        assert!(kept.len() <= 13 + 2 * 8, "bounded");
    };
    assert_eq!(error.kind(), ErrorKind::Busy);
    assert!(link.connected());

    daemon.thaw();
    for ticket in kept {
        assert!(link.wait(ticket, LONG).is_ok(), "what had time is answered");
    }
    let request::Body::Abort(abort) = daemon.expect(ABORT) else {
        unreachable!()
    };
    assert_eq!(abort.slots.len(), 3);
    let request::Body::Release(release) = daemon.expect(RELEASE) else {
        unreachable!()
    };
    assert_eq!(release.slots, [0]);
    let request::Body::Release(release) = daemon.expect(RELEASE) else {
        unreachable!()
    };
    assert_eq!(release.lease, 99);
}

#[test]
fn what_was_not_sent_in_time_is_never_sent() {
    let (_dir, path) = dir();
    let daemon = FakeDaemon::start(
        &path,
        Script {
            in_flight: 1,
            ..Script::default()
        },
    );
    let (link, _slot) = linked(config(&path));
    daemon.freeze();
    let first = link.submit(ping()).unwrap();
    let second = link
        .submit_within(reserve(0..1), Duration::from_millis(20))
        .unwrap();
    assert!(
        link.wait(second, LONG)
            .expect_err("behind the first")
            .timed_out()
    );
    daemon.thaw();
    link.wait(first, LONG).expect("answered");
    let third = link.submit(ping()).unwrap();
    link.wait(third, LONG).expect("answered");
    assert!(
        !daemon
            .seen()
            .iter()
            .any(|b| matches!(b, request::Body::Reserve(_)))
    );
}

#[test]
fn dropped_tickets_give_back_what_they_got() {
    let (_dir, path) = dir();
    let daemon = FakeDaemon::start(&path, Script::default());
    let (link, _slot) = linked(config(&path));
    // Before the reply comes …
    daemon.script(|s| s.hold = vec![RESERVE]);
    drop(link.submit(reserve(0..2)).unwrap());
    daemon.expect(RESERVE);
    while daemon.held() == 0 {
        std::thread::yield_now();
    }
    daemon.let_go();
    let request::Body::Abort(abort) = daemon.expect(ABORT) else {
        unreachable!()
    };
    assert_eq!(abort.slots, [0, 1]);
    // … and after it came.
    let ticket = link.submit(reserve(5..6)).unwrap();
    let behind = link.submit(ping()).unwrap();
    link.wait(behind, LONG).expect("replies come in order here");
    drop(ticket);
    let request::Body::Abort(abort) = daemon.expect(ABORT) else {
        unreachable!()
    };
    assert_eq!(abort.slots, [2]);
}

#[test]
fn the_daemon_dies_and_a_new_one_adopts_the_arena() {
    let (_dir, path) = dir();
    let daemon = FakeDaemon::start(&path, Script::default());
    let (link, slot) = linked(config(&path));
    let old = link.arena().unwrap();
    let mut caller = LinkCaller {
        link: &link,
        timeout: LONG,
    };
    let from = Buffers::new(1, |_| 9);
    mover(1 << 20)
        .store(&mut caller, 1, chain(&hashes(0..1)), &from.refs())
        .unwrap();
    let guard = link.begin_copy().unwrap();
    daemon.script(|s| s.hold = vec![LOOKUP]);
    let ticket = link.submit(lookup(0..1, 0)).unwrap();
    daemon.expect(LOOKUP);
    daemon.kill();
    let error = link.wait(ticket, LONG).expect_err("gone");
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(!error.timed_out());
    assert!(!guard.is_current() && slot.current().is_none());

    let daemon = FakeDaemon::start_after(&path, Script::default(), 100);
    let again = link
        .wait_registered(&slot, 1, LONG)
        .expect("registered again");
    assert_eq!((again.epoch, link.epoch()), (2, 2));
    let request::Body::Hello(hello) = daemon.expect(HELLO) else {
        unreachable!()
    };
    assert_eq!(hello.past_session, 1);
    assert!(hello.offer.is_some() && hello.has_pidfd);
    let new = link.arena().unwrap();
    assert_eq!(
        new.region(),
        old.region(),
        "the same memory at the same address"
    );
    assert_eq!(new.shape().id, old.shape().id);
    assert_eq!(new.generation(0), Some(4), "above the old one's 2");

    // Its copies are not over: no Fence yet.
    let ticket = link.submit(ping()).unwrap();
    link.wait(ticket, LONG).unwrap();
    assert!(
        !daemon
            .seen()
            .iter()
            .any(|b| matches!(b, request::Body::Fence(_)))
    );
    drop(guard);
    let request::Body::Fence(fence) = daemon.expect(FENCE) else {
        unreachable!()
    };
    assert_eq!(fence.past_session, 1);
    let stored = mover(1 << 20)
        .store(&mut caller, 1, chain(&hashes(3..4)), &from.refs())
        .unwrap();
    assert_eq!(stored, [StoreOutcome::Visible]);
    link.stop();
    daemon.expect(BYE);
}

#[test]
fn the_past_is_fenced_when_all_of_it_is_over_the_latest_first() {
    let (_dir, path) = dir();
    let daemon = FakeDaemon::start(&path, Script::default());
    let (link, slot) = linked(config(&path));
    let first = link.begin_copy().unwrap();
    daemon.hang_up();
    link.wait_registered(&slot, 1, LONG)
        .expect("registered again");
    let second = link.begin_copy().unwrap();
    daemon.hang_up();
    link.wait_registered(&slot, 2, LONG).expect("and again");
    let no_fence = |why: &str| {
        let ticket = link.submit(ping()).unwrap();
        link.wait(ticket, LONG).unwrap();
        let fence = |b: &request::Body| matches!(b, request::Body::Fence(_));
        assert!(!daemon.seen().iter().any(fence), "{why}");
    };
    no_fence("both are copying");
    drop(second);
    no_fence("a fence of the second would cover the first, which is copying");
    drop(first);
    for past in [2, 1] {
        let request::Body::Fence(fence) = daemon.expect(FENCE) else {
            unreachable!()
        };
        assert_eq!(fence.past_session, past);
    }
    link.stop();
}

#[test]
fn an_offer_that_is_refused_leaves_the_old_arena_to_its_copies() {
    let (_dir, path) = dir();
    let daemon = FakeDaemon::start(&path, Script::default());
    let (link, slot) = linked(config(&path));
    let guard = link.begin_copy().unwrap();
    daemon.kill();
    let _daemon = FakeDaemon::start_after(
        &path,
        Script {
            adopt: false,
            ..Script::default()
        },
        100,
    );
    link.wait_registered(&slot, 1, LONG)
        .expect("registered again");
    let new = link.arena().unwrap();
    assert_ne!(new.region(), guard.arena().region());
    let bytes = guard.arena().slot(0, 0, 4096).unwrap();
    // SAFETY: inside the slot.
    assert_eq!(unsafe { bytes.as_ptr().read_volatile() }, 0, "still mapped");
}

#[test]
fn a_copy_of_an_ended_epoch_counts_for_nothing() {
    let (_dir, path) = dir();
    let daemon = FakeDaemon::start(&path, Script::default());
    let (link, slot) = linked(config(&path));
    let mut caller = LinkCaller {
        link: &link,
        timeout: LONG,
    };
    let from = Buffers::new(1, |_| 9);
    let mut mover = mover(1 << 20);
    mover
        .store(&mut caller, 1, chain(&hashes(0..1)), &from.refs())
        .unwrap();
    let guard = link.begin_copy().unwrap();
    let ticket = link.submit(load(0..1)).unwrap();
    let Ok(reply::Body::Load(reply)) = link.wait(ticket, LONG) else {
        panic!("a LoadReply")
    };
    daemon.hang_up();
    link.wait_registered(&slot, 1, LONG).expect("again");
    let to = Buffers::new(1, |_| 0);
    let (outcomes, _) = mover.receive(&guard, &reply, &to.refs()).unwrap();
    assert_eq!(outcomes, [LoadOutcome::Failed(FailReason::Lost)]);
    // The same daemon has the same arena: nothing is mapped twice.
    assert_eq!(link.arena().unwrap().region(), guard.arena().region());
    daemon.expect(LOAD);
}

#[test]
fn a_link_survives_many_deaths() {
    let (_dir, path) = dir();
    let mut daemon = FakeDaemon::start(&path, Script::default());
    let (link, slot) = linked(config(&path));
    for round in 1..8u64 {
        if round % 2 == 0 {
            daemon.hang_up();
        } else {
            drop(daemon);
            daemon = FakeDaemon::start_after(&path, Script::default(), round * 100);
        }
        let now = link
            .wait_registered(&slot, round, LONG)
            .expect("registered again");
        assert_eq!(now.epoch, round + 1);
        let ticket = link.submit(ping()).unwrap();
        link.wait(ticket, LONG).expect("served");
    }
    let mapped = std::fs::read_to_string("/proc/self/maps").unwrap();
    let (at, _) = link.arena().unwrap().region();
    assert!(mapped.contains(&format!("{at:x}-")));
}

#[test]
fn a_link_stops_while_nobody_is_there() {
    let (_dir, path) = dir();
    let link = Link::start(config(&path)).unwrap();
    link.stop();
    let daemon = FakeDaemon::start(&path, Script::default());
    daemon.freeze();
    let link = Link::start(config(&path)).unwrap();
    link.stop();
}
