//! A store that is given up after a panic: each operation is answered once, but those whose memory the device may still use.

use std::panic::{AssertUnwindSafe, catch_unwind};

use super::*;

/// A namespace with so many blocks written, and its places.
fn written(test: &mut Test, blocks: u8) -> (Space, impl Fn(u32) -> Place + use<>) {
    let small = space("m", 1, 1);
    let geometry = small.2.clone();
    let at = move |n| place(0, n, &geometry);
    for n in 0..blocks {
        assert_eq!(test.write(&small, at(n.into()), n), Ok(()));
    }
    (small, at)
}

fn turn(test: &mut Test, done: &mut Vec<StoreDone>) {
    test.now += 10_000;
    let now = test.now;
    test.store().turn(now, Duration::ZERO, done);
}

/// Gives it up: what was answered, all of it with `Io`, and how many were not.
fn abandon(test: &mut Test) -> (Vec<u64>, u64) {
    let (done, counters) = test.store.take().unwrap().abandon();
    let op = |done: StoreDone| match done {
        StoreDone::Written {
            op,
            result: Err(StoreError::Io),
        }
        | StoreDone::Read {
            op,
            block: _,
            result: Err(StoreError::Io),
        } => op.0,
        other => panic!("{other:?}"),
    };
    (done.into_iter().map(op).collect(), counters.unanswered)
}

#[test]
fn what_the_device_may_still_use_is_not_answered_and_all_else_is() {
    let mut test = Test::new();
    let (small, at) = written(&mut test, 1);
    test.store().io.hangs.set(true);
    let first = test.op + 1;
    for n in 1..=20 {
        let (op, host) = match n {
            1 => test.read_op(&small, at(0), 0),
            _ => test.write_op(&small, at(n), n as u8),
        };
        assert_eq!(test.store().submit(op, host), None);
    }
    let mut done = Vec::new();
    turn(&mut test, &mut done);
    assert_eq!(done, []);
    // Both parts of 14 and one of the next are with the device.
    let (mut answered, unanswered) = abandon(&mut test);
    answered.sort_unstable();
    assert_eq!(answered, Vec::from_iter(first + 15..first + 20));
    assert_eq!(unanswered, 15);
}

#[test]
fn what_waits_for_a_flush_that_hangs_is_answered() {
    let mut test = Test::new();
    let (small, at) = written(&mut test, 1);
    let first = test.op + 1;
    for n in 1..4 {
        let (op, host) = test.write_op(&small, at(n), 1);
        assert_eq!(test.store().submit(op, host), None);
    }
    let flushes = test.store().counters().flushes;
    let mut done = Vec::new();
    turn(&mut test, &mut done);
    assert_eq!(test.store().counters().flushes, flushes + 1);
    test.store().io.hangs.set(true);
    turn(&mut test, &mut done);
    assert_eq!(done, []);
    // The device has all of their bytes, and nothing of their memory.
    assert_eq!(abandon(&mut test), (vec![first, first + 1, first + 2], 0));
}

#[test]
fn a_panic_over_the_bytes_of_a_block_loses_no_answer() {
    let mut test = Test::new();
    let (small, at) = written(&mut test, 3);
    test.store().io.shrinks.set(true);
    let first = test.op + 1;
    for n in 0..3 {
        let (op, host) = test.read_op(&small, at(n), n as u8);
        assert_eq!(test.store().submit(op, host), None);
    }
    let mut done = Vec::new();
    let turned = catch_unwind(AssertUnwindSafe(|| turn(&mut test, &mut done)));
    assert!(turned.is_err(), "it looks at memory that is not there");
    assert_eq!(done, []);
    assert!((first..first + 3).all(|op| test.store().has(OpId(op))));
    assert_eq!(abandon(&mut test), (vec![first, first + 1, first + 2], 0));
}
