//! Reservations, orders, holds, preemption, weights epochs.

use super::*;

#[test]
fn a_request_that_skips_the_cache_takes_no_lookup_but_is_stored() {
    let mut half = ready(1);
    half.on_new_request(0, "a", Adapter::Base, &[], true);
    assert_eq!(half.matched(1, "a", 0), Match::Blocks(0));
    assert_eq!(half.port().count(is_lookup), 0);
    assert_eq!(half.begin_step(2, &[], &["a"], &[8], &[]), [(0, 0, 0)]);
}

#[test]
fn an_engine_that_only_loads_stores_nothing() {
    let mut half = ready(1);
    half.settings.stores = false;
    half.on_new_request(0, "a", Adapter::Base, &hashes(1, 0..2), false);
    assert_eq!(half.port().count(is_lookup), 1);
    assert_eq!(half.begin_step(2, &[], &["a"], &[8], &[]), []);
    assert_eq!(half.finish_from(3, "a", 8), []);
    assert!(
        half.capture(3, "a", one(0, hashes(1, 0..1), [3]), [])
            .is_empty()
    );
    assert!(!half.finished(3, "a"));
    assert_eq!(half.port().count(is_reserve), 0);
}

#[test]
fn what_is_asked_for_in_a_step_is_sent_with_it() {
    let sent = |half: &Scheduler<Fake>| (half.port().sent.get(), half.port().asked.borrow().len());
    let mut half = ready(1);
    let before = sent(&half).0;
    for id in ["a", "b"] {
        half.on_new_request(0, id, Adapter::Base, &[], true);
    }
    half.begin_step(1, &[], &["a", "b"], &[8, 8], &[]);
    half.capture(1, "a", one(0, hashes(1, 0..1), [7]), []);
    half.capture(1, "b", one(0, hashes(2, 0..1), [8]), []);
    assert_eq!(
        sent(&half),
        (before, before + 2),
        "the thread is woken once"
    );
    half.end_step(1);
    assert_eq!(sent(&half), (before + 2, before + 2));
    for at in 1..=300 {
        half.capture(2, "b", one(0, hashes(2, at..at + 1), [at]), []);
    }
    assert_eq!(
        sent(&half),
        (before + 258, before + 302),
        "the queue is finite"
    );
    assert_eq!(half.port().woken.get(), 1, "and must not fill up meanwhile");
    half.end_step(2);
    let before = sent(&half).1;
    assert!(finish(&mut half, 2, "a", &hashes(1, 1..2), &[9]));
    half.on_new_request(2, "c", Adapter::Base, &hashes(3, 0..2), false);
    assert_eq!(sent(&half), (before, before + 2));
    half.end_step(3);
    assert_eq!(sent(&half), (before + 2, before + 2));
}

#[test]
fn with_the_last_request_what_is_asked_is_sent_at_once() {
    let mut half = ready(1);
    let unsent = |half: &Scheduler<Fake>| half.port().asked.borrow().len() - half.port().sent.get();
    for id in ["a", "b"] {
        half.on_new_request(0, id, Adapter::Base, &hashes(1, 0..2), false);
        half.port().answer(half.port().last(), present(2, 77));
        assert_eq!(half.matched(1, id, 0), Match::Blocks(2));
    }
    half.end_step(1);
    assert!(!half.finished(2, "a"));
    assert_eq!(unsent(&half), 1, "its lease, with the next step");
    assert!(!half.finished(2, "b"));
    assert_eq!(unsent(&half), 0, "no step may come for long");
    assert_eq!(half.port().count(is_release), 2);
}

#[test]
fn full_blocks_are_reserved_ordered_and_reported_by_all_ranks() {
    let mut half = ready(2);
    half.on_new_request(0, "a", Adapter::Base, &[], false);
    assert_eq!(half.begin_step(1, &[], &["a"], &[13], &[]), [(0, 0, 0)]);
    half.capture(1, "a", one(0, hashes(1, 0..3), [7, 8, 9]), []);
    assert!(step(&mut half, 1).stores.is_empty());
    half.port().answer(
        half.port().last(),
        reserved(&[
            ReserveState::Present,
            ReserveState::Reserved,
            ReserveState::Reserved,
        ]),
    );
    assert!(half.begin_step(2, &[], &["a"], &[14], &[]).is_empty());
    let meta = step(&mut half, 2);
    assert_eq!(meta.stores.len(), 1);
    let order = &meta.stores[0];
    assert_eq!(blocks(order), [8, 9]);
    assert!(
        order.hashes.is_empty(),
        "every rank writes a part of its own"
    );
    let slots = order.all().map(|entry| entry.slot);
    assert_eq!(slots.collect::<Vec<_>>(), [100, 101]);
    assert_eq!(order.epochs, [5, 6]);
    assert_eq!(half.load_and_hold().1, 2);
    assert_eq!(half.counters().present_blocks, 1);
    report(&mut half, 1, &[0], &[order.order]);
    assert_eq!(half.load_and_hold().1, 2, "the other rank still copies");
    assert!(finish(&mut half, 3, "a", &[], &[]));
    assert_eq!(step(&mut half, 3).finish, ["a"]);
    half.on_output(&["a"], &[], &[], &[], &[]).unwrap();
    assert_eq!(half.load_and_hold().0, 0);
    report(&mut half, 2, &[0], &[order.order]);
    assert_eq!(half.load_and_hold(), (0, 0, 0));
    assert!(!half.has_pending_work());
}

#[test]
fn ranks_that_hold_the_same_are_told_whose_turn_it_is() {
    let mut half = ready_of((0..2).map(|rank| hello(rank, 2, 0, 0, 2, (0, 1, 1))));
    half.on_new_request(0, "a", Adapter::Base, &[], false);
    half.begin_step(1, &[], &["a"], &[8], &[]);
    half.capture(1, "a", one(0, hashes(1, 0..2), [7, 8]), []);
    half.port().answer(
        half.port().last(),
        reserved(&[ReserveState::Present, ReserveState::Reserved]),
    );
    let order = step(&mut half, 1).stores.remove(0);
    assert_eq!((blocks(&order), order.hashes), (vec![8], hashes(1, 1..2)));
}

#[test]
fn the_tail_of_a_finished_request_is_stored_before_it_is_told() {
    let mut half = ready(1);
    half.on_new_request(0, "a", Adapter::Base, &[], false);
    assert_eq!(half.finish_from(0, "a", 8), [], "the engine never ran it");
    half.begin_step(0, &[], &["a"], &[0], &[]);
    assert_eq!(half.finish_from(1, "a", 8), [(0, 0)]);
    assert!(finish(&mut half, 1, "a", &hashes(1, 0..2), &[4, 5]));
    assert!(half.has_pending_work());
    assert!(step(&mut half, 2).finish.is_empty(), "no slots yet");
    half.port().answer(
        half.port().last(),
        reserved(&[ReserveState::Reserved, ReserveState::Reserved]),
    );
    let meta = step(&mut half, 3);
    assert_eq!(blocks(&meta.stores[0]), [4, 5]);
    assert_eq!(
        meta.finish,
        ["a"],
        "told in the step that has its last order"
    );
    assert!(step(&mut half, 4).finish.is_empty(), "once");
}

#[test]
fn a_finished_request_is_not_held_for_ever() {
    let mut half = ready(1);
    half.on_new_request(0, "a", Adapter::Base, &[], false);
    assert!(finish(&mut half, 1, "a", &hashes(1, 0..2), &[4, 5]));
    assert!(step(&mut half, 2).finish.is_empty());
    assert_eq!(step(&mut half, 1_000_001).finish, ["a"]);
    assert_eq!(half.counters().hold_timeouts, 1);
    assert_eq!(half.load_and_hold().1, 0);
}

#[test]
fn a_tail_waits_until_the_workers_have_registered() {
    let mut half = ready(1);
    report(&mut half, 1, &[], &[]);
    half.on_new_request(0, "a", Adapter::Base, &[], false);
    assert!(finish(&mut half, 1, "a", &hashes(1, 0..2), &[4, 5]));
    step(&mut half, 2);
    assert_eq!(half.port().count(is_reserve), 0);
    report(&mut half, 1, &[0], &[]);
    step(&mut half, 3);
    assert_eq!(half.port().count(is_reserve), 1);
}

#[test]
fn preemption_gives_reservations_up_and_tells_the_workers() {
    let mut half = ready(1);
    half.on_new_request(0, "a", Adapter::Base, &[], false);
    half.capture(1, "a", one(0, hashes(1, 0..2), [4, 5]), []);
    assert_eq!(half.load_and_hold().1, 2);
    half.port().answer(
        half.port().last(),
        reserved(&[ReserveState::Reserved, ReserveState::Reserved]),
    );
    assert!(half.begin_step(2, &["a"], &[], &[], &[]).is_empty());
    let meta = step(&mut half, 2);
    assert_eq!(meta.preempted, ["a"]);
    assert!(meta.stores.is_empty(), "its blocks are somebody else's now");
    assert_eq!(half.load_and_hold().1, 0);
    assert_eq!(half.matched(3, "a", 0), Match::NeedHashes, "it starts over");
    assert_eq!(half.begin_step(4, &[], &["a"], &[8], &[]), [(0, 0, 0)]);
}

#[test]
fn a_request_that_is_preempted_and_resumed_in_one_step_asks_again() {
    let mut half = ready(1);
    half.on_new_request(0, "a", Adapter::Base, &[], false);
    half.port().answer(0, present(0, 0));
    half.matched(0, "a", 0);
    half.ask(0, "a", &hashes(1, 0..3));
    half.port().answer(half.port().last(), present(0, 0));
    assert_eq!(half.matched(0, "a", 0), Match::Blocks(0));
    assert_eq!(half.begin_step(1, &[], &["a"], &[0], &[]), []);
    // The engine asks before it says why.
    assert_eq!(half.matched(2, "a", 0), Match::NeedHashes);
    half.begin_step(2, &["a"], &[], &[], &[]);
    assert_eq!(step(&mut half, 2).preempted, ["a"]);
    assert_eq!(half.matched(3, "a", 0), Match::NeedHashes);
    half.ask(3, "a", &hashes(1, 0..3));
    half.port().answer(half.port().last(), present(3, 9));
    assert_eq!(half.matched(4, "a", 0), Match::Blocks(3));
}

#[test]
fn nothing_is_stored_of_a_load_that_never_began() {
    let mut half = ready(1);
    half.on_new_request(0, "a", Adapter::Base, &hashes(1, 0..3), false);
    half.port().answer(half.port().last(), present(3, 9));
    assert_eq!(half.matched(1, "a", 0), Match::Blocks(3));
    // The engine has blocks for it and counts them as computed, but defers the load, and then aborts the request.
    step(&mut half, 2);
    assert_eq!(half.finish_from(3, "a", 12), []);
    assert!(!finish(&mut half, 3, "a", &[], &[]));
    assert_eq!(half.port().count(is_release), 1);
    assert_eq!(half.load_and_hold(), (0, 0, 0));
}

#[test]
fn a_reset_moves_to_a_namespace_of_its_own_and_stores_nothing_mixed() {
    let mut half = ready(1);
    half.on_new_request(0, "old", Adapter::Base, &[], false);
    half.matched(0, "old", 0);
    assert_eq!(half.begin_step(1, &[], &["old"], &[8], &[]), [(0, 0, 0)]);
    step(&mut half, 1);
    half.reset_cache(false);
    assert!(
        half.begin_step(2, &[], &["old"], &[8], &[]).is_empty(),
        "its KV mixes weights"
    );
    assert_eq!(half.finish_from(2, "old", 8), []);
    half.on_new_request(3, "new", Adapter::Base, &hashes(1, 0..3), false);
    let meta = step(&mut half, 3);
    assert_eq!(meta.retired, [0]);
    assert_eq!(meta.namespaces[0].index, 1);
    let records = half.port().records.borrow().clone();
    assert_ne!(records[0], records[1]);
    report(&mut half, 1, &[1], &[]);
    half.port().answer(half.port().last(), present(0, 0));
    assert_eq!(half.matched(4, "new", 2), Match::Blocks(0));
    assert!(
        half.begin_step(5, &[], &["new"], &[12], &[]).is_empty(),
        "it began in a mixed cache"
    );
    half.on_new_request(6, "clean", Adapter::Base, &[], false);
    half.matched(6, "clean", 0);
    assert_eq!(half.begin_step(7, &[], &["clean"], &[12], &[]), [(0, 0, 0)]);
    half.reset_cache(true);
    half.matched(8, "clean", 2);
    assert_eq!(half.begin_step(9, &[], &["clean"], &[12], &[]).len(), 1);
}

#[test]
fn last_blocks_that_wait_over_a_reset_are_not_stored() {
    let mut half = ready(1);
    half.on_new_request(0, "old", Adapter::Base, &[], false);
    half.begin_step(1, &[], &["old"], &[8], &[]);
    half.settings.max_in_flight = 0;
    assert!(finish(&mut half, 2, "old", &hashes(1, 0..2), &[7, 8]));
    half.reset_cache(false);
    half.settings.max_in_flight = 100;
    half.on_new_request(3, "new", Adapter::Base, &[], false);
    half.matched(3, "new", 0);
    step(&mut half, 3);
    report(&mut half, 1, &[0, 1], &[]);
    let meta = step(&mut half, 4);
    assert_eq!(half.port().count(is_reserve), 0, "by no namespace");
    assert!(half.requests["old"].leaving == Leaving::Told || meta.finish == ["old"]);
}

#[test]
fn no_room_pauses_reservations() {
    let mut half = ready(1);
    half.on_new_request(0, "a", Adapter::Base, &[], false);
    half.capture(1, "a", one(0, hashes(1, 0..1), [4]), []);
    half.port()
        .answer(half.port().last(), reserved(&[ReserveState::NoSpace]));
    step(&mut half, 2);
    assert!(half.begin_step(3, &[], &["a"], &[12], &[]).is_empty());
    assert_eq!(
        half.begin_step(200_000, &[], &["a"], &[12], &[]),
        [(0, 0, 1)]
    );
    assert_eq!(half.load_and_hold().1, 0);
}

#[test]
fn reservations_in_flight_are_bounded() {
    let mut half = ready(1);
    half.settings.max_in_flight = 3;
    half.on_new_request(0, "a", Adapter::Base, &[], false);
    half.capture(1, "a", one(0, hashes(1, 0..5), [1, 2, 3, 4, 5]), []);
    assert_eq!(half.load_and_hold().1, 3);
    assert!(half.begin_step(2, &[], &["a"], &[40], &[]).is_empty());
    assert!(finish(&mut half, 3, "a", &hashes(1, 3..5), &[4, 5]));
    half.port()
        .answer(half.port().last(), reserved(&[ReserveState::Present; 3]));
    step(&mut half, 4);
    assert_eq!(
        half.load_and_hold().1,
        2,
        "the tail follows when there is room"
    );
}

/// What a running request outgrows is kept until it is copied, and of more than may be kept the end.
#[test]
fn blocks_of_a_window_are_kept_until_they_are_copied() {
    let fake = Fake::default();
    fake.connected.set(true);
    fake.registered.set(true);
    let window = GroupRule::new(GroupKind::SlidingWindow, TOKENS, Some(9)).unwrap();
    let settings = Settings {
        groups: vec![window],
        max_held: 3,
        ..Settings::default()
    };
    let mut half = Scheduler::new(settings, fake);
    let mut rank = hello(0, 1, 0, 0, 2, (0, 1, 1));
    (rank.groups[0].kind, rank.groups[0].window) = ("sliding_window".to_owned(), 9);
    half.on_hello(rank);
    half.set_facts(facts(), "instance");
    report(&mut half, 1, &[0], &[]);
    half.on_new_request(0, "a", Adapter::Base, &[], false);
    // Wanted in the step that computes them; the first of them is gone already.
    assert_eq!(half.begin_step(1, &[], &["a"], &[0], &[20]), [(0, 0, 0)]);
    let kept = half.capture(1, "a", one(0, hashes(1, 0..5), [0, 5, 6, 7, 8]), []);
    assert_eq!(kept, [6, 7, 8]);
    half.port().answer(
        half.port().last(),
        reserved(&[
            ReserveState::Present,
            ReserveState::Reserved,
            ReserveState::NoSpace,
        ]),
    );
    let same = step(&mut half, 1);
    assert!(same.stores.is_empty(), "their step is not over");
    assert_eq!(half.begin_step(2, &[], &["a"], &[20], &[1]), []);
    let order = step(&mut half, 2).stores.remove(0);
    assert_eq!(blocks(&order), [7]);
    assert_eq!(
        half.released(usize::MAX),
        [6, 8],
        "what gets no slot is let go"
    );
    report(&mut half, 1, &[0], &[order.order]);
    assert_eq!((half.released(usize::MAX), half.held()), (vec![7], 0));
    // Nor are they kept for a daemon that takes its time, or a request that loses its blocks.
    assert_eq!(
        half.capture(200_000, "a", one(0, hashes(1, 5..6), [9]), []),
        [9]
    );
    step(&mut half, 200_001);
    assert_eq!(half.released(usize::MAX), []);
    half.begin_step(1_200_001, &[], &[], &[], &[]);
    step(&mut half, 1_200_001);
    assert_eq!(half.released(usize::MAX), [9]);
    assert_eq!(
        half.capture(1_200_002, "a", one(0, hashes(1, 6..7), [4]), []),
        [4]
    );
    half.begin_step(1_200_003, &["a"], &[], &[], &[]);
    assert_eq!((half.released(usize::MAX), half.held()), (vec![4], 0));
    assert_eq!(half.load_and_hold().1, 0);
}

#[test]
fn blocks_of_an_answer_are_gathered() {
    let mut half = ready(1);
    half.settings.gather = 3 * TOKENS;
    half.on_new_request(0, "a", Adapter::Base, &[], true);
    // A prompt's are wanted as soon as they are computed.
    assert_eq!(half.begin_step(1, &[], &["a"], &[0], &[]), []);
    assert_eq!(half.begin_step(1, &[], &["a"], &[9], &[]), [(0, 0, 0)]);
    half.capture(1, "a", one(0, hashes(1, 0..2), [1, 2]), []);
    for computed in 10..21 {
        assert_eq!(half.begin_step(1, &[], &["a"], &[computed], &[]), []);
    }
    assert_eq!(half.begin_step(1, &[], &["a"], &[21], &[]), [(0, 0, 2)]);
    assert_eq!(
        half.finish_from(1, "a", 20),
        [(0, 2)],
        "the rest at the end"
    );
    assert_eq!(half.begin_step(1, &["a"], &[], &[], &[]), []);
    assert_eq!(half.begin_step(1, &[], &["a"], &[0], &[]), []);
    assert_eq!(half.begin_step(1, &[], &["a"], &[4], &[]), [(0, 0, 0)]);
}

#[test]
fn blocks_of_a_window_wait_only_while_they_are_surely_in_it() {
    let rule = |kind, window| GroupRule::new(kind, TOKENS, window).unwrap();
    let settings = Settings {
        gather: 3 * TOKENS,
        ..Settings::default()
    };
    // One more token of an answer.
    let token = |rule: &GroupRule, first, now| settings.wants(rule, first, [now - 2, now, now + 1]);
    let waits = |rule| !token(&rule, 5, 24) && !token(&rule, 5, 32) && token(&rule, 5, 33);
    assert!(waits(rule(GroupKind::Full, None)));
    assert!(waits(rule(GroupKind::SlidingWindow, Some(5 * TOKENS))));
    assert!(!waits(rule(GroupKind::SlidingWindow, Some(5 * TOKENS - 1))));
    assert!(!waits(rule(GroupKind::State, None)));
    // A prompt of 24 tokens: its last may become final only two steps later.
    let window = rule(GroupKind::SlidingWindow, Some(5 * TOKENS));
    let full = rule(GroupKind::Full, None);
    assert!(settings.wants(&window, 0, [0, 0, 24]));
    for steps in [[0, 24, 25], [0, 25, 26]] {
        assert!(settings.wants(&window, 5, steps) && settings.wants(&full, 5, steps));
        assert!(!settings.wants(&window, 6, steps) && !settings.wants(&full, 6, steps));
    }
    assert!(!settings.wants(&window, 5, [24, 26, 27]));
    assert!(!settings.wants(&full, 5, [24, 26, 27]));
}
