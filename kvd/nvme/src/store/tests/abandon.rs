//! A store that is given up after a panic: each operation is answered once; reads whose memory the device may still write are lost.

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

/// Gives it up: what was answered before the device ended, what after, all of it with `Io` but what is lost; and that.
fn abandon(test: &mut Test) -> [Vec<u64>; 3] {
    let (mut first, mut lost) = (Vec::new(), Vec::new());
    let store = test.store.take().unwrap();
    let (done, counters) = store.abandon(|done| first = done);
    let mut op = |done: StoreDone| {
        let (op, error) = match done {
            StoreDone::Written { op, result } => (op, result.unwrap_err()),
            StoreDone::Read { op, result, .. } => (op, result.unwrap_err()),
            other => panic!("{other:?}"),
        };
        match error {
            StoreError::Io => return Some(op.0),
            StoreError::Lost => lost.push(op.0),
            other => panic!("{other:?}"),
        }
        None
    };
    let mut ops = |done: Vec<StoreDone>| {
        let mut ops: Vec<u64> = done.into_iter().filter_map(&mut op).collect();
        ops.sort_unstable();
        ops
    };
    let (first, then) = (ops(first), ops(done));
    lost.sort_unstable();
    assert_eq!(counters.lost, lost.len() as u64);
    [first, then, lost]
}

#[test]
fn what_the_device_may_still_write_is_lost_and_all_else_is_answered_at_once() {
    let mut test = Test::new();
    let (small, at) = written(&mut test, 15);
    test.store().io.hangs.set(true);
    let first = test.op + 1;
    for n in 0..20 {
        let operation = match n {
            0..15 => test.read_op(&small, at(n), n as u8),
            _ => test.write_op(&small, at(n), n as u8),
        };
        test.ask(operation);
    }
    let mut done = Vec::new();
    test.turn(10_000, &mut done);
    assert_eq!(done, []);
    // Both parts of 14 are with the device, which takes one operation more: not enough for the next.
    let lost = Vec::from_iter(first..first + 14);
    let others = Vec::from_iter(first + 14..first + 20);
    assert_eq!(abandon(&mut test), [others, vec![], lost]);
}

#[test]
fn a_block_that_is_written_is_no_memory_that_the_device_writes() {
    let mut test = Test::new();
    let (small, at) = written(&mut test, 1);
    test.store().io.hangs.set(true);
    let operation = test.write_op(&small, at(1), 1);
    let op_id = operation.0.op().0;
    test.ask(operation);
    test.turn(10_000, &mut Vec::new());
    assert_eq!(abandon(&mut test), [vec![op_id], vec![], vec![]]);
}

#[test]
fn a_device_that_ends_its_reads_loses_none() {
    let mut test = Test::new();
    let (small, at) = written(&mut test, 1);
    test.store().io.hangs.set(true);
    let operation = test.read_op(&small, at(0), 0);
    let op_id = operation.0.op().0;
    test.ask(operation);
    test.turn(10_000, &mut Vec::new());
    test.store().io.hangs.set(false);
    assert_eq!(abandon(&mut test), [vec![], vec![op_id], vec![]]);
}

#[test]
fn what_waits_for_a_flush_that_hangs_is_answered() {
    let mut test = Test::new();
    let (small, at) = written(&mut test, 1);
    let first = test.op + 1;
    for n in 1..4 {
        let operation = test.write_op(&small, at(n), 1);
        test.ask(operation);
    }
    let flushes = test.store().counters().flushes;
    let mut done = Vec::new();
    test.turn(10_000, &mut done);
    assert_eq!(test.store().counters().flushes, flushes + 1);
    test.store().io.hangs.set(true);
    test.turn(10_000, &mut done);
    assert_eq!(done, []);
    // The device has all of their bytes, and nothing of their memory.
    let all = vec![first, first + 1, first + 2];
    assert_eq!(abandon(&mut test), [all, vec![], vec![]]);
}

#[test]
fn a_panic_over_the_bytes_of_a_block_loses_no_answer() {
    let mut test = Test::new();
    let (small, at) = written(&mut test, 3);
    test.store().io.shrinks.set(true);
    let first = test.op + 1;
    for n in 0..3 {
        let operation = test.read_op(&small, at(n), n as u8);
        test.ask(operation);
    }
    let mut done = Vec::new();
    let turned = catch_unwind(AssertUnwindSafe(|| test.turn(10_000, &mut done)));
    assert!(turned.is_err(), "it looks at memory that is not there");
    assert_eq!(done, []);
    assert!((first..first + 3).all(|op| test.store().has(OpId(op))));
    let all = vec![first, first + 1, first + 2];
    assert_eq!(abandon(&mut test), [all, vec![], vec![]]);
}
