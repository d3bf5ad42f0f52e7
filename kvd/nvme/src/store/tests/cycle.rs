//! How many flushes blocks take that come one after the other, and that none waits for company that does not come.

use std::rc::Rc;

use super::super::memory::Flushes;
use super::*;

/// An empty store whose writes wait so long for company, by the clock and by number.
fn waiting(flush_us: u64, flush_blocks: usize) -> Test {
    let mut test = Test::new();
    (test.config.flush_us, test.config.flush_blocks) = (flush_us, flush_blocks);
    test.open().unwrap();
    test
}

/// Writes so many blocks, each asked for as soon as less than `most` are asked for and not answered. Turns, flushes.
fn stored(test: &mut Test, blocks: u32, most: u32) -> (u64, u64) {
    let small = space("m", 1, 1);
    let in_segment = (MIB / stride_of(small.2.block_bytes())) as u32;
    let before = test.store().counters().flushes;
    let (mut asked, mut over, mut turns) = (0, 0, 0);
    let mut done = Vec::new();
    while over < blocks {
        while asked < blocks && asked - over < most {
            let at = place(asked / in_segment, asked % in_segment, &small.2);
            let write = test.write_op(&small, at, asked as u8);
            test.ask(write);
            asked += 1;
        }
        test.turn(10, &mut done);
        turns += 1;
        for one in done.drain(..) {
            assert!(matches!(one, StoreDone::Written { result: Ok(()), .. }));
            over += 1;
        }
        assert!(turns < 10_000, "{over} of {blocks} answered");
    }
    (turns, test.store().counters().flushes - before)
}

#[test]
fn under_load_there_are_no_more_than_two_flushes_for_each_company() {
    let mut test = waiting(1_000_000, 100);
    let (_, flushes) = stored(&mut test, 800, 400);
    assert!(
        (8..=16).contains(&flushes),
        "{flushes} for 8 companies, where each turn writes a seventh of one"
    );
}

#[test]
fn nobody_waits_for_company_that_does_not_come() {
    // For ever, by the clock of this test.
    let mut test = waiting(u64::MAX / 2, usize::MAX);
    let (turns, flushes) = stored(&mut test, 30, 1);
    assert_eq!(flushes, 60, "its bytes, then its record");
    assert!(turns <= 30 * 6, "{turns} turns");
    assert!(test.store().next_deadline().is_none());
}

#[test]
fn what_is_durable_waits_for_company_only_so_long() {
    let mut test = waiting(100, usize::MAX);
    // The company is never complete by number, and more always comes.
    let (turns, flushes) = stored(&mut test, 1200, 800);
    assert!(
        turns < 800 && flushes > 4,
        "{turns} turns, {flushes} flushes"
    );
}

#[test]
fn a_name_that_takes_its_time_makes_nothing_due() {
    let mut test = waiting(100, usize::MAX);
    let small = space("m", 1, 1);
    let name_at = test.store().layout.name_at(0);
    let slow = Rc::clone(&test.store().io.slow);
    *slow.borrow_mut() = name_at..name_at + 1;
    // The first writes the name for all.
    for n in 0..3 {
        let write = test.write_op(&small, place(0, n, &small.2), n as u8);
        test.ask(write);
    }
    let mut done = Vec::new();
    for _ in 0..5 {
        test.turn(1_000, &mut done);
        test.turn(0, &mut done);
        let (now, next) = (test.now, test.store().next_deadline());
        assert!(next.is_none_or(|at| at > now), "a thread would spin");
    }
    assert!(done.is_empty());
    *slow.borrow_mut() = 0..0;
    assert_eq!(test.write(&small, place(0, 3, &small.2), 3), Ok(()));
    assert_eq!(test.store().pending(), 0);
}

#[test]
fn what_comes_after_a_turn_is_seen_by_the_next() {
    let mut test = waiting(100, usize::MAX);
    let small = space("m", 1, 1);
    let at = |n| place(0, n, &small.2);
    assert_eq!(test.write(&small, at(0), 0), Ok(()));
    // A drop has company in a write that is not over.
    let slow = Rc::clone(&test.store().io.slow);
    *slow.borrow_mut() = 0..u64::MAX;
    let write = test.write_op(&small, at(1), 1);
    test.ask(write);
    let (now, mut done) = (test.now, Vec::new());
    test.turn(0, &mut done);
    let drop = test.drop_op(small.0, at(0), 0);
    test.ask((drop, None));
    assert_eq!(test.store().next_deadline(), Some(0));
    test.turn(0, &mut done);
    assert_eq!(test.store().next_deadline(), Some(now + 100));
    assert!(done.is_empty());
}

#[test]
fn what_failed_while_it_waited_for_company_makes_nothing_due() {
    let mut test = waiting(100, usize::MAX);
    let small = space("m", 1, 1);
    let at = |n| place(0, n, &small.2);
    assert_eq!(test.write(&small, at(0), 0), Ok(()));
    let flushes = Rc::clone(&test.store().io.flushes);
    flushes.set(Flushes::Held);
    let mut done = Vec::new();
    for n in 1..3 {
        // The first is being flushed when the second is written.
        let write = test.write_op(&small, at(n), n as u8);
        test.ask(write);
        for _ in 0..3 {
            test.turn(10, &mut done);
        }
    }
    assert!(done.is_empty());
    flushes.set(Flushes::Failing);
    for _ in 0..3 {
        test.turn(1_000, &mut done);
    }
    assert_eq!(done.len(), 2, "both may be gone");
    let (now, next) = (test.now, test.store().next_deadline());
    assert!(next.is_none_or(|at| at > now), "a thread would spin");
    flushes.set(Flushes::Good);
    assert_eq!(test.write(&small, at(3), 3), Ok(()));
}
