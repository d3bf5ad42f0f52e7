//! The scheduler half against a scripted daemon: a fake that answers exactly what a test tells it to.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;

use kvd_client::{GroupLayout, reply, request};
use kvd_wire::session::{LookupReply, Presence, ReserveReply, ReserveState, Where, request::Body};
use prost::Message;

use super::*;
use crate::fleet::tests::hello;
use crate::meta::StepMeta;

/// A fake daemon: remembers what it was asked, answers when told.
#[derive(Default)]
struct Fake {
    asked: RefCell<Vec<Body>>,
    answers: RefCell<HashMap<usize, Result<reply::Body, Fault>>>,
    registered: Cell<bool>,
    connected: Cell<bool>,
    records: RefCell<Vec<Vec<u8>>>,
}

impl Fake {
    fn answer(&self, at: usize, body: reply::Body) {
        self.answers.borrow_mut().insert(at, Ok(body));
    }

    fn last(&self) -> usize {
        self.asked.borrow().len() - 1
    }

    fn count(&self, wanted: fn(&Body) -> bool) -> usize {
        self.asked
            .borrow()
            .iter()
            .filter(|body| wanted(body))
            .count()
    }
}

impl Port for Fake {
    type Ticket = usize;
    type Namespace = usize;

    fn submit(&self, body: request::Body) -> Result<usize, Fault> {
        if !self.connected.get() {
            return Err(Fault::Unavailable);
        }
        self.asked.borrow_mut().push(body);
        Ok(self.last())
    }

    fn submit_and_forget(&self, body: request::Body) -> Result<(), Fault> {
        self.submit(body).map(drop)
    }

    fn poll(&self, ticket: &mut usize) -> Option<Result<reply::Body, Fault>> {
        self.answers.borrow_mut().remove(ticket)
    }

    fn register(&self, record: Vec<u8>, _: Vec<GroupLayout>) -> Result<usize, Fault> {
        self.records.borrow_mut().push(record);
        Ok(self.records.borrow().len() - 1)
    }

    fn current(&self, namespace: &usize) -> Option<Registered> {
        (self.connected.get() && self.registered.get()).then_some(Registered {
            namespace: *namespace as u32 + 10,
            epoch: 1,
        })
    }

    fn refused(&self, _: &usize) -> Option<String> {
        None
    }

    fn connected(&self) -> bool {
        self.connected.get()
    }
}

const TOKENS: u32 = 4;

fn hash(chain: u8, at: u32) -> [u8; 32] {
    let mut hash = [chain; 32];
    hash[..4].copy_from_slice(&at.to_le_bytes());
    hash
}

fn hashes(chain: u8, range: std::ops::Range<u32>) -> Vec<u8> {
    range.flat_map(|at| hash(chain, at)).collect()
}

fn facts() -> crate::record::Fields {
    [
        ("tenant", "default"),
        ("model", "m"),
        ("weights", "blake3:00"),
        ("kv_dtype", "bfloat16"),
        ("hash", "sha256_cbor:1f2e"),
    ]
    .map(|(name, value)| (name.to_owned(), value.to_owned()))
    .to_vec()
}

/// A scheduler half with `world` workers that knows everything and whose workers have registered.
fn ready(world: u32) -> Scheduler<Fake> {
    let fake = Fake::default();
    fake.connected.set(true);
    fake.registered.set(true);
    let mut half = Scheduler::new(
        Settings {
            world,
            block_tokens: TOKENS,
            ..Settings::default()
        },
        fake,
    );
    for rank in 0..world {
        half.on_hello(hello(rank, world, 0, 0, 2, (rank, 1, world)));
    }
    half.set_facts(facts(), "instance");
    report(&mut half, world, &[0], &[]);
    half
}

fn report(half: &mut Scheduler<Fake>, world: u32, registered: &[u32], done: &[u64]) {
    for rank in 0..world {
        let bytes = RankReport {
            version: VERSION,
            rank,
            epoch: 5 + u64::from(rank),
            registered: registered.to_vec(),
            done: done.to_vec(),
            hello: None,
            counters: Vec::new(),
        }
        .encode_to_vec();
        half.on_output(0, &[], &[], &[], &[&bytes]).unwrap();
    }
}

fn present(count: u32, lease: u64) -> reply::Body {
    reply::Body::Lookup(LookupReply {
        chains: vec![Presence {
            start: vec![0],
            length: vec![count],
            r#where: vec![Where::Host as i32],
        }],
        lease,
        est_load_us: 0,
    })
}

fn reserved(states: &[ReserveState]) -> reply::Body {
    let count = states
        .iter()
        .filter(|state| **state == ReserveState::Reserved)
        .count() as u32;
    reply::Body::Reserve(ReserveReply {
        states: states.iter().map(|state| *state as i32).collect(),
        slots: (100..100 + count).collect(),
        generations: (0..u64::from(count)).map(|n| 2 * n + 1).collect(),
        offsets: (0..u64::from(count)).map(|n| n * 4096).collect(),
    })
}

fn step(half: &mut Scheduler<Fake>, now: u64) -> StepMeta {
    let bytes = half.end_step(now);
    match bytes.is_empty() {
        true => StepMeta::default(),
        false => meta::decode(&bytes).unwrap(),
    }
}

fn is_lookup(body: &Body) -> bool {
    matches!(body, Body::Lookup(_))
}

fn is_release(body: &Body) -> bool {
    matches!(body, Body::Release(_))
}

fn is_reserve(body: &Body) -> bool {
    matches!(body, Body::Reserve(_))
}

#[test]
fn a_hit_is_loaded_and_its_lease_given_back() {
    let mut half = ready(1);
    half.on_new_request(0, "a", Adapter::Base, &hashes(1, 0..5), false);
    assert_eq!(half.matched(1, "a", 1), Match::Wait);
    half.port().answer(half.port().last(), present(4, 77));
    assert_eq!(half.matched(2, "a", 1), Match::Blocks(3));
    half.allocated("a", 3, &[10, 11, 12, 13, 14]);
    let meta = step(&mut half, 3);
    assert_eq!(meta.namespaces.len(), 1);
    assert_eq!(meta.loads.len(), 1);
    assert_eq!(meta.loads[0].blocks, [11, 12, 13]);
    assert_eq!(meta.loads[0].hashes, hashes(1, 1..4));
    half.allocated("a", 0, &[]);
    assert_eq!(half.port().count(is_release), 0);
    half.on_output(4, &[], &["a"], &[], &[]).unwrap();
    assert_eq!(half.port().count(is_release), 1);
    assert!(
        half.begin_step(5, &[], &["a"], &[16]).is_empty(),
        "what was loaded is not stored"
    );
    assert_eq!(half.begin_step(5, &[], &["a"], &[20]), [(0, 4)]);
    assert!(!half.finished(6, "a", &[], &[]));
    assert_eq!(half.load_and_hold(), (0, 0, 0));
}

#[test]
fn no_answer_in_time_is_absent_and_a_silent_daemon_is_not_waited_for() {
    let mut half = ready(1);
    half.on_new_request(0, "a", Adapter::Base, &hashes(1, 0..2), false);
    assert_eq!(half.matched(19_999, "a", 0), Match::Wait);
    assert_eq!(half.matched(20_000, "a", 0), Match::Blocks(0));
    assert_eq!(half.matched(20_001, "a", 0), Match::Blocks(0));
    half.on_new_request(20_002, "b", Adapter::Base, &hashes(2, 0..2), false);
    assert_eq!(
        half.matched(20_003, "b", 0),
        Match::Blocks(0),
        "no lookup, no wait"
    );
    assert_eq!(half.port().count(is_lookup), 1);
    half.on_new_request(1_100_000, "c", Adapter::Base, &hashes(3, 0..2), false);
    assert_eq!(half.port().count(is_lookup), 2, "probed after a while");
    half.port().answer(half.port().last(), present(2, 0));
    assert_eq!(half.matched(1_100_001, "c", 0), Match::Blocks(2));
    half.on_new_request(1_100_002, "d", Adapter::Base, &hashes(4, 0..2), false);
    assert_eq!(half.port().count(is_lookup), 3, "the daemon speaks again");
    assert_eq!(half.counters().lookup_timeouts, 1);
}

#[test]
fn without_a_daemon_nothing_waits_and_nothing_is_held() {
    let mut half = ready(1);
    half.port().connected.set(false);
    half.on_new_request(0, "a", Adapter::Base, &hashes(1, 0..2), false);
    assert_eq!(half.matched(1, "a", 0), Match::Blocks(0));
    assert!(half.begin_step(2, &[], &["a"], &[8]).is_empty());
    assert_eq!(half.finish_from(3, "a", 2), None);
    assert!(!half.finished(3, "a", &[], &[]));
    assert!(!half.has_pending_work());
}

#[test]
fn a_request_that_skips_the_cache_takes_no_lookup_but_is_stored() {
    let mut half = ready(1);
    half.on_new_request(0, "a", Adapter::Base, &[], true);
    assert_eq!(half.matched(1, "a", 0), Match::Blocks(0));
    assert_eq!(half.port().count(is_lookup), 0);
    assert_eq!(half.begin_step(2, &[], &["a"], &[8]), [(0, 0)]);
}

#[test]
fn the_second_of_two_waits_for_the_first_ones_load() {
    let mut half = ready(1);
    for id in ["a", "b"] {
        half.on_new_request(0, id, Adapter::Base, &hashes(1, 0..3), false);
        half.port().answer(half.port().last(), present(3, 1));
        assert_eq!(half.matched(1, id, 0), Match::Blocks(3));
    }
    half.allocated("a", 3, &[1, 2, 3]);
    assert_eq!(half.matched(2, "b", 0), Match::Wait);
    assert_eq!(half.matched(3, "b", 0), Match::Wait);
    step(&mut half, 4);
    half.on_output(5, &[], &["a"], &[], &[]).unwrap();
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
    half.allocated("a", 3, &[1, 2, 3]);
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
    half.allocated("a", 3, &[1, 2, 3]);
    assert_eq!(half.matched(2, "b", 0), Match::Wait);
    step(&mut half, 3);
    half.on_output(4, &[], &[], &[2, 3], &[]).unwrap();
    half.on_output(5, &[], &["a"], &[], &[]).unwrap();
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
    assert_eq!(half.begin_step(7, &[], &["a"], &[12]), [(0, 1)]);
}

#[test]
fn an_old_answer_is_asked_again() {
    let mut half = ready(1);
    half.on_new_request(0, "a", Adapter::Base, &hashes(1, 0..3), false);
    half.port().answer(half.port().last(), present(3, 9));
    assert_eq!(half.matched(1, "a", 0), Match::Blocks(3));
    assert_eq!(half.matched(9_000_000, "a", 0), Match::NeedHashes);
    assert_eq!(half.port().count(is_release), 1);
    half.ask(9_000_001, "a", &hashes(1, 0..3));
    half.port().answer(half.port().last(), present(2, 0));
    assert_eq!(half.matched(9_000_002, "a", 0), Match::Blocks(2));
}

#[test]
fn a_load_given_to_another_connector_gives_the_lease_back() {
    let mut half = ready(1);
    half.on_new_request(0, "a", Adapter::Base, &hashes(1, 0..3), false);
    half.port().answer(half.port().last(), present(3, 9));
    assert_eq!(half.matched(1, "a", 0), Match::Blocks(3));
    half.allocated("a", 0, &[1, 2, 3]);
    assert_eq!(half.port().count(is_release), 1);
    assert!(step(&mut half, 2).loads.is_empty());
}

#[test]
fn full_blocks_are_reserved_ordered_and_reported_by_all_ranks() {
    let mut half = ready(2);
    half.on_new_request(0, "a", Adapter::Base, &[], false);
    assert_eq!(half.begin_step(1, &[], &["a"], &[13]), [(0, 0)]);
    half.capture(1, "a", &hashes(1, 0..3), &[7, 8, 9]);
    assert!(step(&mut half, 1).stores.is_empty());
    half.port().answer(
        half.port().last(),
        reserved(&[
            ReserveState::Present,
            ReserveState::Reserved,
            ReserveState::Reserved,
        ]),
    );
    assert!(half.begin_step(2, &[], &["a"], &[14]).is_empty());
    let meta = step(&mut half, 2);
    assert_eq!(meta.stores.len(), 1);
    let order = &meta.stores[0];
    assert_eq!(order.blocks, [8, 9]);
    assert_eq!(order.hashes, hashes(1, 1..3));
    assert_eq!(order.slots, [100, 101]);
    assert_eq!(order.epochs, [5, 6]);
    assert_eq!(half.load_and_hold().1, 2);
    assert_eq!(half.counters().present_blocks, 1);
    report(&mut half, 1, &[0], &[order.order]);
    assert_eq!(half.load_and_hold().1, 2, "the other rank still copies");
    assert!(half.finished(3, "a", &[], &[]));
    assert_eq!(step(&mut half, 3).finish, ["a"]);
    half.on_output(4, &["a"], &[], &[], &[]).unwrap();
    assert_eq!(half.load_and_hold().0, 0);
    report(&mut half, 2, &[0], &[order.order]);
    assert_eq!(half.load_and_hold(), (0, 0, 0));
    assert!(!half.has_pending_work());
}

#[test]
fn the_tail_of_a_finished_request_is_stored_before_it_is_told() {
    let mut half = ready(1);
    half.on_new_request(0, "a", Adapter::Base, &[], false);
    assert_eq!(half.finish_from(0, "a", 2), None, "the engine never ran it");
    half.begin_step(0, &[], &["a"], &[0]);
    assert_eq!(half.finish_from(1, "a", 2), Some(0));
    assert!(half.finished(1, "a", &hashes(1, 0..2), &[4, 5]));
    assert!(half.has_pending_work());
    assert!(step(&mut half, 2).finish.is_empty(), "no slots yet");
    half.port().answer(
        half.port().last(),
        reserved(&[ReserveState::Reserved, ReserveState::Reserved]),
    );
    let meta = step(&mut half, 3);
    assert_eq!(meta.stores[0].blocks, [4, 5]);
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
    assert!(half.finished(1, "a", &hashes(1, 0..2), &[4, 5]));
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
    assert!(half.finished(1, "a", &hashes(1, 0..2), &[4, 5]));
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
    half.capture(1, "a", &hashes(1, 0..2), &[4, 5]);
    assert_eq!(half.load_and_hold().1, 2);
    half.port().answer(
        half.port().last(),
        reserved(&[ReserveState::Reserved, ReserveState::Reserved]),
    );
    assert!(half.begin_step(2, &["a"], &[], &[]).is_empty());
    let meta = step(&mut half, 2);
    assert_eq!(meta.preempted, ["a"]);
    assert!(meta.stores.is_empty(), "its blocks are somebody else's now");
    assert_eq!(half.load_and_hold().1, 0);
    assert_eq!(half.matched(3, "a", 0), Match::NeedHashes, "it starts over");
    assert_eq!(half.begin_step(4, &[], &["a"], &[8]), [(0, 0)]);
}

#[test]
fn an_aborted_load_is_not_held_by_us_but_still_ends() {
    let mut half = ready(1);
    half.on_new_request(0, "a", Adapter::Base, &hashes(1, 0..3), false);
    half.port().answer(half.port().last(), present(3, 9));
    half.matched(1, "a", 0);
    half.allocated("a", 3, &[1, 2, 3]);
    step(&mut half, 2);
    assert_eq!(half.finish_from(3, "a", 3), None);
    assert!(!half.finished(3, "a", &[], &[]));
    assert_eq!(half.load_and_hold(), (0, 0, 1));
    half.on_output(4, &[], &["a"], &[], &[]).unwrap();
    assert_eq!(half.load_and_hold(), (0, 0, 0));
    assert_eq!(half.port().count(is_release), 1);
}

#[test]
fn nothing_is_stored_of_a_load_that_never_began() {
    let mut half = ready(1);
    half.on_new_request(0, "a", Adapter::Base, &hashes(1, 0..3), false);
    half.port().answer(half.port().last(), present(3, 9));
    assert_eq!(half.matched(1, "a", 0), Match::Blocks(3));
    // The engine has blocks for it and counts them as computed, but defers the load, and then aborts the request.
    step(&mut half, 2);
    assert_eq!(half.finish_from(3, "a", 3), None);
    assert!(!half.finished(3, "a", &[], &[]));
    assert_eq!(half.port().count(is_release), 1);
    assert_eq!(half.load_and_hold(), (0, 0, 0));
}

#[test]
fn a_reset_moves_to_a_namespace_of_its_own_and_stores_nothing_mixed() {
    let mut half = ready(1);
    half.on_new_request(0, "old", Adapter::Base, &[], false);
    half.matched(0, "old", 0);
    assert_eq!(half.begin_step(1, &[], &["old"], &[8]), [(0, 0)]);
    step(&mut half, 1);
    half.reset_cache(false);
    assert!(
        half.begin_step(2, &[], &["old"], &[8]).is_empty(),
        "its KV mixes weights"
    );
    assert_eq!(half.finish_from(2, "old", 2), None);
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
        half.begin_step(5, &[], &["new"], &[12]).is_empty(),
        "it began in a mixed cache"
    );
    half.on_new_request(6, "clean", Adapter::Base, &[], false);
    half.matched(6, "clean", 0);
    assert_eq!(half.begin_step(7, &[], &["clean"], &[12]), [(0, 0)]);
    half.reset_cache(true);
    half.matched(8, "clean", 2);
    assert_eq!(half.begin_step(9, &[], &["clean"], &[12]).len(), 1);
}

#[test]
fn the_first_request_waits_for_the_workers_to_say_what_they_hold() {
    let fake = Fake::default();
    fake.connected.set(true);
    fake.registered.set(true);
    let settings = Settings {
        block_tokens: TOKENS,
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
    assert!(!half.finished(2, "a", &[], &[]));
    assert_eq!(half.notices().len(), 1);
}

#[test]
fn no_room_pauses_reservations() {
    let mut half = ready(1);
    half.on_new_request(0, "a", Adapter::Base, &[], false);
    half.capture(1, "a", &hashes(1, 0..1), &[4]);
    half.port()
        .answer(half.port().last(), reserved(&[ReserveState::NoSpace]));
    step(&mut half, 2);
    assert!(half.begin_step(3, &[], &["a"], &[12]).is_empty());
    assert_eq!(half.begin_step(200_000, &[], &["a"], &[12]), [(0, 1)]);
    assert_eq!(half.load_and_hold().1, 0);
}

#[test]
fn reservations_in_flight_are_bounded() {
    let mut half = ready(1);
    half.settings.max_in_flight = 3;
    half.on_new_request(0, "a", Adapter::Base, &[], false);
    half.capture(1, "a", &hashes(1, 0..5), &[1, 2, 3, 4, 5]);
    assert_eq!(half.load_and_hold().1, 3);
    assert!(half.begin_step(2, &[], &["a"], &[40]).is_empty());
    assert!(half.finished(3, "a", &hashes(1, 3..5), &[4, 5]));
    half.port()
        .answer(half.port().last(), reserved(&[ReserveState::Present; 3]));
    step(&mut half, 4);
    assert_eq!(
        half.load_and_hold().1,
        2,
        "the tail follows when there is room"
    );
}
