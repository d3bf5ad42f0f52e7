//! Lookups, loads, and what a request waits for.

use super::*;
use crate::observed::Observed;

#[test]
fn a_hit_is_loaded_and_its_lease_given_back() {
    let mut half = ready(1);
    half.on_new_request(0, "a", Adapter::Base, &hashes(1, 0..5), false);
    assert_eq!(half.matched(1, "a", 1), Match::Wait);
    half.port().answer(half.port().last(), present(4, 77));
    assert_eq!(half.matched(2, "a", 1), Match::Blocks(3));
    half.allocated("a", 3, &[vec![10, 11, 12, 13, 14]]);
    let meta = step(&mut half, 3);
    assert_eq!(meta.namespaces.len(), 1);
    assert_eq!(meta.loads.len(), 1);
    assert_eq!(meta.loads[0].blocks, [11, 12, 13]);
    assert_eq!(meta.loads[0].hashes, hashes(1, 1..4));
    half.allocated("a", 0, &[vec![]]);
    assert_eq!(half.port().count(is_release), 0);
    half.on_output(&[], &["a"], &[], &[], &[]).unwrap();
    assert_eq!(half.port().count(is_release), 1);
    assert!(
        half.begin_step(5, &[], &["a"], &[16], &[]).is_empty(),
        "what was loaded is not stored"
    );
    assert_eq!(half.begin_step(5, &[], &["a"], &[20], &[]), [(0, 0, 4)]);
    assert!(!finish(&mut half, 6, "a", &[], &[]));
    assert_eq!(half.load_and_hold(), (0, 0, 0));
}

#[test]
fn no_answer_in_time_is_absent_and_a_silent_daemon_is_not_waited_for() {
    let mut half = ready(1);
    half.on_new_request(0, "a", Adapter::Base, &hashes(1, 0..2), false);
    let paused = 500_000;
    assert_eq!(half.matched(paused, "a", 0), Match::Wait, "not sent yet");
    step(&mut half, paused);
    assert_eq!(half.matched(paused + 19_999, "a", 0), Match::Wait);
    assert_eq!(half.matched(paused + 20_000, "a", 0), Match::Blocks(0));
    assert_eq!(half.matched(paused + 20_001, "a", 0), Match::Blocks(0));
    half.on_new_request(20_002, "b", Adapter::Base, &hashes(2, 0..2), false);
    assert_eq!(
        half.matched(20_003, "b", 0),
        Match::Blocks(0),
        "no lookup, no wait"
    );
    assert_eq!(half.port().count(is_lookup), 1);
    assert!(
        half.begin_step(30_000, &[], &["b"], &[8], &[]).is_empty(),
        "nothing is reserved"
    );
    // The late answer to the first lookup is an answer, and its lease is given back.
    half.port().answer(0, present(2, 5));
    assert_eq!(half.begin_step(40_000, &[], &["b"], &[8], &[]), [(0, 0, 0)]);
    assert_eq!(half.port().count(is_release), 1);
    half.on_new_request(40_001, "d", Adapter::Base, &hashes(4, 0..2), false);
    assert_eq!(half.port().count(is_lookup), 2, "the daemon speaks again");
    assert_eq!(half.counters().lookup_timeouts, 1);
}

/// A worker that is served by no connector says nothing, ever.
#[test]
fn requests_wait_once_for_workers_that_say_nothing() {
    let fake = Fake::default();
    fake.connected.set(true);
    let settings = Settings {
        world: 2,
        groups: vec![full(TOKENS)],
        ..Settings::default()
    };
    let mut half = Scheduler::new(settings, fake);
    half.set_facts(facts(), "instance");
    half.on_hello(hello(0, 2, 0, 0, 2, (0, 1, 2)));
    for (now, id, found) in [
        (5, "a", Match::Wait),
        (900_000, "b", Match::Wait),
        (1_000_005, "a", Match::Blocks(0)),
        (1_000_006, "b", Match::Blocks(0)),
        (1_000_007, "c", Match::Blocks(0)),
    ] {
        if !half.requests.contains_key(id) {
            half.on_new_request(now, id, Adapter::Base, &hashes(1, 0..2), false);
        }
        assert_eq!(half.matched(now, id, 0), found, "{id} at {now}");
    }
}

#[test]
fn a_daemon_that_never_answers_is_pinged() {
    let mut half = ready(1);
    half.on_new_request(0, "a", Adapter::Base, &[], false);
    assert!(finish(&mut half, 1, "a", &hashes(1, 0..1), &[4]));
    step(&mut half, 2);
    assert_eq!(step(&mut half, 1_000_001).finish, ["a"], "given up");
    half.begin_step(1_400_000, &[], &[], &[], &[]);
    assert_eq!(half.port().count(is_ping), 0);
    half.begin_step(1_600_000, &[], &[], &[], &[]);
    half.begin_step(1_700_000, &[], &[], &[], &[]);
    assert_eq!(half.port().count(is_ping), 1);
    let pong = reply::Body::Pong(kvd_wire::session::PongReply {});
    half.port().answer(half.port().last(), pong);
    half.on_new_request(1_700_001, "b", Adapter::Base, &hashes(4, 0..2), false);
    assert_eq!(half.port().count(is_lookup), 1);
    let said: Vec<String> = half.notices().into_iter().map(|n| n.text).collect();
    assert!(
        said.iter().any(|text| text.contains("answers again")),
        "{said:?}"
    );
}

#[test]
fn without_a_daemon_nothing_waits_and_nothing_is_held() {
    let mut half = ready(1);
    half.port().connected.set(false);
    half.on_new_request(0, "a", Adapter::Base, &hashes(1, 0..2), false);
    assert_eq!(half.matched(1, "a", 0), Match::Blocks(0));
    assert!(half.begin_step(2, &[], &["a"], &[8], &[]).is_empty());
    assert_eq!(half.finish_from(3, "a", 8), []);
    assert!(!finish(&mut half, 3, "a", &[], &[]));
    assert!(!half.has_pending_work());
}

#[test]
fn the_second_of_two_waits_for_the_first_ones_load() {
    let mut half = ready(1);
    for id in ["a", "b"] {
        half.on_new_request(0, id, Adapter::Base, &hashes(1, 0..3), false);
        half.port().answer(half.port().last(), present(3, 1));
        assert_eq!(half.matched(1, id, 0), Match::Blocks(3));
    }
    half.allocated("a", 3, &[vec![1, 2, 3]]);
    assert_eq!(half.matched(2, "b", 0), Match::Wait);
    assert_eq!(half.matched(3, "b", 0), Match::Wait);
    step(&mut half, 4);
    half.on_output(&[], &["a"], &[], &[], &[]).unwrap();
    assert_eq!(
        half.matched(6, "b", 3),
        Match::Blocks(0),
        "the engine has them now"
    );
    assert_eq!(half.counters().loads_shared, 1);
}

#[test]
fn a_load_of_the_same_blocks_is_not_waited_for_for_ever() {
    let mut half = ready(1);
    half.settings.share_deadline = 100;
    for id in ["a", "b"] {
        half.on_new_request(0, id, Adapter::Base, &hashes(1, 0..3), false);
        half.port().answer(half.port().last(), present(3, 1));
        half.matched(1, id, 0);
    }
    half.allocated("a", 3, &[vec![1, 2, 3]]);
    assert_eq!(half.matched(2, "b", 0), Match::Wait);
    assert_eq!(half.matched(102, "b", 0), Match::Blocks(3));
}

#[test]
fn after_a_failed_load_answers_are_asked_again_and_the_rest_is_stored() {
    let mut half = ready(1);
    for id in ["a", "b"] {
        half.on_new_request(0, id, Adapter::Base, &hashes(1, 0..3), false);
        half.port().answer(half.port().last(), present(3, 1));
        half.matched(1, id, 0);
    }
    half.allocated("a", 3, &[vec![1, 2, 3]]);
    assert_eq!(half.matched(2, "b", 0), Match::Wait);
    step(&mut half, 3);
    half.on_output(&[], &[], &[2, 3], &[], &[]).unwrap();
    half.on_output(&[], &["a"], &[], &[], &[]).unwrap();
    assert_eq!(half.counters().load_failures, 1);
    assert_eq!(
        half.matched(6, "b", 0),
        Match::NeedHashes,
        "what was promised is gone"
    );
    assert_eq!(
        half.matched(6, "a", 0),
        Match::Blocks(0),
        "the failed one does not try again"
    );
    assert_eq!(half.begin_step(7, &[], &["a"], &[12], &[]), [(0, 0, 1)]);
}

#[test]
fn an_old_answer_is_asked_again() {
    let mut half = ready(1);
    half.on_new_request(0, "a", Adapter::Base, &hashes(1, 0..3), false);
    half.port().answer(half.port().last(), present(3, 9));
    assert_eq!(half.matched(1, "a", 0), Match::Blocks(3));
    // As often as that takes: it waits for room in the engine.
    for round in 1..10 {
        let now = round * 9_000_000;
        assert_eq!(half.matched(now, "a", 0), Match::NeedHashes);
        assert_eq!(half.port().count(is_release), round as usize);
        half.ask(now + 1, "a", &hashes(1, 0..3));
        half.port().answer(half.port().last(), present(2, 9));
        assert_eq!(half.matched(now + 2, "a", 0), Match::Blocks(2));
    }
}

#[test]
fn a_load_given_to_another_connector_gives_the_lease_back() {
    let mut half = ready(1);
    half.on_new_request(0, "a", Adapter::Base, &hashes(1, 0..3), false);
    half.port().answer(half.port().last(), present(3, 9));
    assert_eq!(half.matched(1, "a", 0), Match::Blocks(3));
    half.allocated("a", 0, &[vec![1, 2, 3]]);
    assert_eq!(half.port().count(is_release), 1);
    assert!(step(&mut half, 2).loads.is_empty());
}

#[test]
fn an_aborted_load_is_not_held_by_us_but_still_ends() {
    let mut half = ready(1);
    half.on_new_request(0, "a", Adapter::Base, &hashes(1, 0..3), false);
    half.port().answer(half.port().last(), present(3, 9));
    half.matched(1, "a", 0);
    half.allocated("a", 3, &[vec![1, 2, 3]]);
    step(&mut half, 2);
    assert_eq!(half.finish_from(3, "a", 12), []);
    assert!(!finish(&mut half, 3, "a", &[], &[]));
    assert_eq!(half.load_and_hold(), (0, 0, 1));
    half.on_output(&[], &["a"], &[], &[], &[]).unwrap();
    assert_eq!(half.load_and_hold(), (0, 0, 0));
    assert_eq!(half.port().count(is_release), 1);
}

#[test]
fn another_session_voids_what_the_old_one_promised() {
    let mut half = ready(1);
    half.on_new_request(0, "a", Adapter::Base, &hashes(1, 0..3), false);
    half.port().answer(half.port().last(), present(3, 9));
    assert_eq!(half.matched(1, "a", 0), Match::Blocks(3));
    half.port().epoch.set(2);
    half.begin_step(2, &[], &[], &[], &[]);
    assert!(
        step(&mut half, 2).report,
        "the workers shall say what connection they have"
    );
    assert_eq!(half.matched(3, "a", 0), Match::NeedHashes);
    assert_eq!(
        half.port().count(is_release),
        0,
        "that lease is of the old session"
    );
    half.on_new_request(4, "b", Adapter::Base, &[], true);
    half.capture(4, "b", one(0, hashes(2, 0..1), [1]), []);
    assert_eq!(
        half.port().count(is_reserve),
        0,
        "they may not be its writers yet"
    );
    report(&mut half, 1, &[0], &[]);
    half.capture(5, "b", one(0, hashes(2, 0..1), [1]), []);
    assert_eq!(half.port().count(is_reserve), 1);
}

#[test]
fn the_first_request_waits_for_the_workers_to_say_what_they_hold() {
    let fake = Fake::default();
    fake.connected.set(true);
    fake.registered.set(true);
    let settings = Settings {
        groups: vec![full(TOKENS)],
        ..Settings::default()
    };
    let mut half = Scheduler::new(settings, fake);
    half.on_new_request(0, "early", Adapter::Base, &hashes(1, 0..2), false);
    assert_eq!(
        half.matched(1, "early", 0),
        Match::Blocks(0),
        "weights are not known"
    );
    half.set_facts(facts(), "i");
    half.on_new_request(2, "a", Adapter::Base, &hashes(1, 0..2), false);
    assert_eq!(half.matched(3, "a", 0), Match::Wait);
    half.on_hello(hello(0, 1, 0, 0, 2, (0, 1, 1)));
    assert_eq!(half.matched(4, "a", 0), Match::NeedHashes);
    half.on_new_request(5, "b", Adapter::Base, &[], false);
}

#[test]
fn adapters_have_namespaces_of_their_own_once_their_content_is_known() {
    let mut half = ready(1);
    let adapter = || Adapter::Named("1:x".into());
    half.on_new_request(0, "a", adapter(), &hashes(1, 0..2), false);
    assert_eq!(half.matched(1, "a", 0), Match::Blocks(0));
    half.set_adapter("1:x", "blake3:22");
    half.on_new_request(2, "b", adapter(), &hashes(1, 0..2), false);
    assert_eq!(half.port().count(is_lookup), 1);
    assert_eq!(half.port().records.borrow().len(), 2);
    assert!(matches!(&half.port().asked.borrow()[0], Body::Lookup(l) if l.namespace == 11));
}

#[test]
fn a_refusing_worker_is_the_end_of_it() {
    let fake = Fake::default();
    fake.connected.set(true);
    let mut half = Scheduler::new(Settings::default(), fake);
    let mut refused = hello(0, 1, 0, 0, 2, (0, 1, 1));
    refused.refusal = "no".into();
    half.on_hello(refused);
    half.set_facts(facts(), "i");
    assert_eq!(half.refusal(), Some("no"));
    half.on_new_request(0, "a", Adapter::Base, &hashes(1, 0..2), false);
    assert_eq!(half.matched(1, "a", 0), Match::Blocks(0));
    assert!(!finish(&mut half, 2, "a", &[], &[]));
    assert_eq!(half.notices().len(), 1);
}

#[test]
fn what_has_happened_is_told_once() {
    let mut half = ready(1);
    let attached = Observed {
        connected: Some(true),
        ..Observed::default()
    };
    assert_eq!(half.observed(), Some(attached));
    assert_eq!(half.observed(), None);
    half.on_new_request(0, "a", Adapter::Base, &hashes(1, 0..5), false);
    assert_eq!(half.matched(1, "a", 0), Match::Wait);
    let presence = Presence {
        start: vec![0, 3],
        length: vec![3, 1],
        r#where: vec![Where::Host as i32, Where::Nvme as i32],
    };
    let answer = LookupReply {
        chains: vec![presence],
        lease: 7,
        ..LookupReply::default()
    };
    half.port()
        .answer(half.port().last(), reply::Body::Lookup(answer));
    step(&mut half, 100);
    assert_eq!(half.matched(1600, "a", 0), Match::Blocks(4));
    half.allocated("a", 4, &[vec![10, 11, 12, 13, 14]]);
    let _ = step(&mut half, 1500);
    assert_eq!(half.sources("a"), [3 * TOKENS, 0, TOKENS, 0]);
    let seen = half.observed().unwrap();
    let tokens = u64::from(TOKENS);
    assert_eq!(
        seen.counts,
        [
            ("lookups", 1),
            ("hit_host", 3 * tokens),
            ("hit_nvme", tokens)
        ]
    );
    assert_eq!(seen.times, [("lookup_seconds", vec![1500])]);
    assert_eq!(seen.connected, None);
    assert_eq!(half.observed(), None);
    // The third block is not right: the engine can use two.
    half.on_output(&[], &["a"], &[12], &[], &[]).unwrap();
    assert_eq!(half.observed().unwrap().counts, [("load_blocks", 2)]);
    half.port().connected.set(false);
    assert_eq!(half.observed().unwrap().connected, Some(false));
}
