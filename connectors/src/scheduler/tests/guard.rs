//! A half that panics: what the engine was promised is settled with its next step.

use super::*;

fn guarded() -> Guarded<Fake> {
    Guarded::new(ready(1))
}

/// With a request whose blocks of a window are taken.
fn outgrown() -> Guarded<Fake> {
    let mut half = ready(1);
    half.settings.groups = vec![GroupRule::new(GroupKind::SlidingWindow, TOKENS, Some(8)).unwrap()];
    let mut guard = Guarded::new(half);
    guard.with(|half| half.on_new_request(0, "a", Adapter::Base, &[], false));
    guard.with(|half| half.begin_step(1, &[], &["a"], &[8], &[]));
    guard
}

fn end(guard: &mut Guarded<Fake>, now: u64) -> StepMeta {
    match guard.end_step(now) {
        bytes if bytes.is_empty() => StepMeta::default(),
        bytes => meta::decode(&bytes).unwrap(),
    }
}

fn begin(guard: &mut Guarded<Fake>, id: &str, chain: u8) {
    guard.with(|half| half.on_new_request(0, id, Adapter::Base, &hashes(chain, 0..3), false));
    let asked = guard.half().unwrap().port().last();
    guard.half().unwrap().port().answer(asked, present(3, 0));
    assert_eq!(guard.matched(1, id, 1), Some(Match::Blocks(2)));
}

fn fail(guard: &mut Guarded<Fake>) {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    assert_eq!(guard.with(|_| -> () { panic!("a bug") }), None);
    std::panic::set_hook(hook);
}

#[test]
fn a_failed_half_says_so_once_and_does_nothing() {
    let mut guard = guarded();
    assert!(!guard.has_pending_work() && !guard.take_failure());
    fail(&mut guard);
    assert!(guard.half().is_none() && guard.has_failure());
    assert!(guard.take_failure() && !guard.take_failure());
    assert!(guard.has_pending_work(), "the workers must hear of it");
    assert!(!guard.finished(1, "a"));
    assert!(
        guard
            .capture(1, "a", one(0, hashes(1, 0..1), [3]), [])
            .is_empty()
    );
    let last = end(&mut guard, 1);
    assert!(last.stop && last.loads.is_empty() && last.finish.is_empty());
    assert!(!guard.has_pending_work());
    assert_eq!(guard.end_step(2), Vec::<u8>::new());
}

#[test]
fn a_load_that_the_workers_have_not_heard_of_is_reported_as_failed() {
    let mut guard = guarded();
    begin(&mut guard, "a", 1);
    guard.allocated("a", 2, &[vec![3, 4, 5]]);
    assert_eq!(end(&mut guard, 1).loads.len(), 1);
    begin(&mut guard, "b", 2);
    guard.allocated("b", 2, &[vec![3, 8, 9]]);
    fail(&mut guard);
    let last = end(&mut guard, 2);
    let lost: Vec<_> = last.loads.iter().map(|load| &load.request[..]).collect();
    assert_eq!(lost, ["b"], "the workers will report a load of theirs");
    assert_eq!(last.loads[0].blocks, [8, 9], "the first is others', too");
    assert_eq!(last.loads[0].namespace, u32::MAX);
}

#[test]
fn a_finished_request_is_reported_once() {
    let mut guard = guarded();
    for id in ["a", "b"] {
        guard.with(|half| half.on_new_request(0, id, Adapter::Base, &[], false));
        guard.with(|half| half.begin_step(1, &[], &[id], &[8], &[]));
        guard.with(|half| half.last_blocks(id, 0, hashes(1, 0..2), [4, 5]));
        assert!(guard.finished(1, id));
        if id == "a" {
            // The daemon takes too long: the workers are told without its slots.
            assert_eq!(end(&mut guard, 2_000_000).finish, ["a"]);
        }
    }
    fail(&mut guard);
    assert_eq!(end(&mut guard, 2).finish, ["b"]);
}

#[test]
fn blocks_that_the_engine_keeps_are_let_go_after_the_workers_have_stopped() {
    let mut guard = outgrown();
    assert_eq!(
        guard.capture(1, "a", one(0, hashes(1, 0..2), [4, 5]), []),
        [4, 5]
    );
    assert_eq!(guard.capture(1, "a", one(0, hashes(1, 1..2), [5]), []), [5]);
    assert!(
        guard.has_pending_work(),
        "the engine steps until they are let go"
    );
    fail(&mut guard);
    assert!(
        guard.released(usize::MAX).is_empty(),
        "they may still be copied"
    );
    end(&mut guard, 2);
    let mut released = guard.released(usize::MAX);
    released.sort_unstable();
    assert_eq!(released, [4, 5, 5]);
    assert!(guard.released(usize::MAX).is_empty());
}

#[test]
fn what_the_engine_could_not_keep_is_not_given_back() {
    let mut guard = outgrown();
    let kept = guard.capture(1, "a", one(0, hashes(1, 0..2), [4, 5]), []);
    assert_eq!(kept, [4, 5]);
    guard.not_kept(&kept);
    assert!(guard.half().is_none() && guard.take_failure());
    assert!(end(&mut guard, 2).stop);
    assert_eq!(guard.released(usize::MAX), [0; 0]);
}

#[test]
fn a_block_is_given_back_no_more_often_than_it_was_kept() {
    let mut guard = outgrown();
    assert_eq!(guard.capture(1, "a", one(0, hashes(1, 0..1), [4]), []), [4]);
    guard.with(|half| half.released.extend([4, 4, 9]));
    assert_eq!(guard.released(usize::MAX), [4], "others have the rest");
    assert!(guard.take_failure(), "such a half is not believed any more");
    assert!(end(&mut guard, 2).stop);
    assert_eq!(guard.released(usize::MAX), [0; 0]);
}
