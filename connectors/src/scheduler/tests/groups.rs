//! Several KV-cache groups: reservations and orders that they share, and what the engine keeps.

use super::*;
use crate::HASH_BYTES;

/// A half of an engine with full attention (group 0) and two groups with windows, which knows the request "a".
fn of_three_groups() -> Scheduler<Fake> {
    let fake = Fake::default();
    fake.connected.set(true);
    fake.registered.set(true);
    let window = GroupRule::new(GroupKind::SlidingWindow, TOKENS, Some(9)).unwrap();
    let settings = Settings {
        groups: vec![full(TOKENS), window, window],
        batch: 6,
        ..Settings::default()
    };
    let mut half = Scheduler::new(settings, fake);
    let mut rank = hello(0, 1, 0, 0, 2, (0, 1, 1));
    for group in 1..3 {
        let mut one = rank.groups[0].clone();
        (one.group, one.kind, one.window) = (group, "sliding_window".to_owned(), 9);
        one.layer_names = vec![format!("window.{group}.0"), format!("window.{group}.1")];
        rank.groups.push(one);
    }
    half.on_hello(rank);
    half.set_facts(facts(), "instance");
    report(&mut half, 1, &[0], &[]);
    half.on_new_request(0, "a", Adapter::Base, &[], true);
    half
}

/// The first blocks of a request, of this group.
fn first(group: u32, blocks: &[u32]) -> (u32, bytes::Bytes, Vec<u32>) {
    let hashes = hashes(1, 0..blocks.len() as u32);
    (group, hashes.into(), blocks.to_vec())
}

fn chains(half: &Scheduler<Fake>) -> Vec<Vec<(u32, usize)>> {
    let asked = half.port().asked.borrow();
    let chains = asked.iter().filter_map(|body| match body {
        Body::Reserve(one) => Some(&one.chains),
        _ => None,
    });
    let sizes = chains.map(|chains| {
        let of = chains
            .iter()
            .map(|c| (c.group, c.hashes.len() / HASH_BYTES));
        of.collect()
    });
    sizes.collect()
}

#[test]
fn groups_share_a_reservation_and_an_order() {
    use ReserveState::*;
    let mut half = of_three_groups();
    half.begin_step(1, &[], &["a"], &[8], &[8]);
    let state = hashes(9, 0..1);
    let full = [first(0, &[1, 2]), first(1, &[3, 4]), first(2, &[0, 5])];
    let kept = half.capture(1, "a", full, [(2, &state[..], 6)]);
    assert_eq!(kept, [3, 4, 5, 6]);
    assert_eq!((half.held(), half.load_and_hold().1), (4, 6));
    assert_eq!(chains(&half), [[(0, 2), (1, 2), (2, 1), (2, 1)]]);
    let states = [Present, Reserved, Reserved, NoSpace, Reserved, Reserved];
    half.port().answer(half.port().last(), reserved(&states));
    assert!(step(&mut half, 1).stores.is_empty(), "the step is not over");
    half.begin_step(2, &[], &["a"], &[16], &[1]);
    let stores = step(&mut half, 2).stores;
    let parts: Vec<_> = stores[0].parts().collect();
    assert_eq!(parts, [(0, 0..1), (1, 1..2), (2, 2..3), (2, 3..4)]);
    assert_eq!(blocks(&stores[0]), [2, 3, 5, 6]);
    let slots = stores[0].all().map(|one| (one.slot, one.generation));
    let wanted = [(100, 1), (101, 3), (102, 5), (103, 7)];
    assert_eq!(slots.collect::<Vec<_>>(), wanted);
    assert_eq!(half.released(usize::MAX), [4]);
    report(&mut half, 1, &[0], &[stores[0].order; 3]);
    assert_eq!(half.released(usize::MAX), [], "one group is not copied");
    report(&mut half, 1, &[0], &[stores[0].order]);
    assert_eq!(half.released(1), [3]);
    assert_eq!((half.to_release(), half.held()), (2, 2));
    // They go back some at a time, unless they are missed, or many, or nothing else is to be done.
    assert_eq!((half.due(true), half.due(false)), (0, 16));
    half.limit_held(8);
    assert_eq!(half.due(true), 1);
    half.begin_step(3, &[], &[], &[], &[]);
    assert_eq!(half.due(true), 2);
    half.begin_step(3, &[], &["a"], &[16], &[0]);
    assert!(half.due(true) == 1 && half.has_pending_work() && half.lets_go_soon());
    assert_eq!(half.due(true), 2);
    assert_eq!(half.released(usize::MAX), [5, 6]);
    assert_eq!((half.held(), half.load_and_hold().1), (0, 0));
    // All are dealt with.
    half.no_room_until = 0;
    let next = half.begin_step(3, &[], &["a"], &[16], &[1]);
    assert_eq!(next, [(0, 0, 2), (0, 1, 2), (0, 2, 2)]);
}

#[test]
fn what_is_too_much_for_one_request_goes_in_several() {
    let mut half = of_three_groups();
    half.begin_step(1, &[], &["a"], &[0], &[16]);
    let four = |group: u8, first: u32| {
        let blocks = (first..first + 4).collect::<Vec<_>>();
        (u32::from(group), hashes(group, 0..4).into(), blocks)
    };
    let state = hashes(9, 0..1);
    let states = [
        (2, &state[..], 20),
        (2, &state[..], 21),
        (2, &state[..], 22),
    ];
    let kept = half.capture(1, "a", [four(1, 1), four(2, 5)], states);
    assert_eq!(kept.len(), 11);
    assert_eq!(
        chains(&half),
        [vec![(1, 4)], vec![(2, 4), (2, 1), (2, 1)], vec![(2, 1)]]
    );
}

#[test]
fn what_is_kept_is_given_up_before_the_rest() {
    let mut half = of_three_groups();
    half.begin_step(1, &[], &["a"], &[4], &[4]);
    let full = [first(0, &[1]), first(1, &[2])];
    assert_eq!(half.capture(1, "a", full, []), [2]);
    let asked = half.port().last();
    half.begin_step(1_100_000, &[], &["a"], &[8], &[1]);
    assert!(step(&mut half, 1_100_000).stores.is_empty());
    assert_eq!((half.released(usize::MAX), half.held()), (vec![2], 0));
    assert_eq!(half.load_and_hold().1, 1);
    let both = [ReserveState::Reserved, ReserveState::Reserved];
    half.port().answer(asked, reserved(&both));
    let order = step(&mut half, 1_100_001).stores.remove(0);
    assert_eq!((blocks(&order), order.groups), (vec![1], vec![0]));
    let body = half.port().asked.borrow().last().cloned();
    assert!(matches!(body, Some(Body::Abort(one)) if one.slots == [101]));
    report(&mut half, 1, &[0], &[order.order]);
    assert_eq!(half.load_and_hold().1, 0);
}

#[test]
fn an_answer_to_something_else_is_given_back() {
    let mut half = of_three_groups();
    half.begin_step(1, &[], &["a"], &[0], &[4]);
    let full = [first(1, &[1]), first(2, &[2])];
    assert_eq!(half.capture(1, "a", full, []), [1, 2]);
    let asked = half.port().last();
    half.port()
        .answer(asked, reserved(&[ReserveState::Reserved]));
    half.begin_step(2, &[], &["a"], &[4], &[1]);
    assert!(step(&mut half, 2).stores.is_empty());
    assert_eq!((half.released(usize::MAX), half.held()), (vec![1, 2], 0));
    let asked = half.port().asked.borrow();
    assert!(matches!(&asked[asked.len() - 1], Body::Abort(one) if one.slots == [100]));
}

#[test]
fn last_blocks_of_all_groups_are_asked_for_at_once() {
    let mut half = of_three_groups();
    half.begin_step(1, &[], &["a"], &[8], &[]);
    for group in 0..3 {
        half.last_blocks("a", group, hashes(1, 0..3), [1, 2, 3]);
    }
    assert!(half.finished(1, "a"));
    assert_eq!(chains(&half), [vec![(0, 3), (1, 3)], vec![(2, 3)]]);
}
