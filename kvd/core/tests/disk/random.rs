//! Operations in any order, ending in any way.

use kvd_core::tier::*;
use kvd_core::*;
use proptest::prelude::*;

use crate::common::*;
use crate::script::*;

/// What may happen to a node with a store.
#[derive(Clone, Debug)]
enum Op {
    Put(u64, u64),
    Load(u64, u64, u32),
    Finish(usize, u8),
    Look(u64, u64),
    Wait(u64),
    Switch(bool),
    Leave,
    Corrupt(usize),
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let (base, len) = (0u64..40, 1u64..8);
    let op = prop_oneof![
        6 => (base.clone(), len.clone()).prop_map(|(b, l)| Op::Put(b, l)),
        6 => (base.clone(), len.clone(), 0u32..3).prop_map(|(b, l, d)| Op::Load(b, l, d * 50)),
        16 => (0usize..100, any::<u8>()).prop_map(|(at, how)| Op::Finish(at, how)),
        6 => (base, len).prop_map(|(b, l)| Op::Look(b, l)),
        2 => (1u64..100_000).prop_map(Op::Wait),
        1 => any::<bool>().prop_map(Op::Switch),
        1 => Just(Op::Leave),
        1 => (0usize..8).prop_map(Op::Corrupt),
    ];
    prop::collection::vec(op, 1..150)
}

fn error(how: u8) -> Result<(), StoreError> {
    match how {
        0..=8 => Err(StoreError::Io),
        9..=16 => Err(StoreError::Corrupt),
        17..=24 => Err(StoreError::Off),
        25 => Err(StoreError::Lost),
        _ => Ok(()),
    }
}

/// What a run is drawn with.
#[derive(Clone, Copy, Debug)]
struct Drawn {
    extents: u64,
    max_ahead: u32,
    full: bool,
    demote: bool,
    s3: bool,
    low_water: u32,
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, max_shrink_iters: 2000, ..ProptestConfig::default() })]

    /// Whatever order operations end in and however they fail: the books are right after every step, each load gets one answer
    /// while its session lives, and what is Ready has the checksums it was stored with.
    #[test]
    fn nothing_breaks_the_books(ops in ops(), extents in 1u64..3, max_ahead in 2u32..16, full: bool, demote: bool, s3: bool, low_water in 1u32..9) {
        run(ops, Drawn { extents, max_ahead, full, demote, s3, low_water });
    }
}

fn run(ops: Vec<Op>, drawn: Drawn) {
    let Drawn {
        extents,
        max_ahead,
        full,
        demote,
        s3,
        low_water,
    } = drawn;
    let offload = if demote {
        OffloadPolicy::Demotion
    } else {
        OffloadPolicy::WriteThrough
    };
    let eviction = if s3 {
        EvictionPolicy::S3Fifo
    } else {
        EvictionPolicy::Lru
    };
    let tiers = TierSettings {
        max_ahead,
        offload,
        low_water,
        ..few_spare()
    };
    let mut node = Node::with(
        Settings {
            eviction,
            ..settings(tiers)
        },
        extents,
    );
    for base in [0, 14, 28].into_iter().filter(|_| full) {
        node.put(&hashes(base..base + 14));
        node.finish_all();
    }
    let mut asked: Vec<(RequestId, Vec<[u8; 32]>)> = Vec::new();
    let mut session_lives = true;
    for op in ops {
        match op {
            Op::Put(base, len) if session_lives => drop(node.put(&hashes(base..base + len))),
            Op::Load(base, len, deadline) if session_lives => {
                let list = hashes(base..base + len);
                let id = node.ask_load(&list, deadline);
                asked.push((id, list));
            }
            Op::Look(base, len) if session_lives => {
                node.world.lookup(1, &hashes(base..base + len), 1000, true);
            }
            Op::Finish(at, how) if !node.store.open.is_empty() => {
                let at = at % node.store.open.len();
                let read = matches!(node.store.open[at], StoreOp::Read { .. });
                let outcome = error(how);
                // Nothing else is lost.
                let lost = outcome == Err(StoreError::Lost) && !read;
                node.finish(at, if lost { Ok(()) } else { outcome });
            }
            Op::Wait(micros) => {
                node.world.now += micros;
                let replies = node.world.step(Input::Tick);
                node.replies.extend(replies);
            }
            Op::Switch(on) => {
                node.switch(on);
            }
            Op::Leave if session_lives => {
                let session = SessionId(1);
                node.world.step(Input::Gone { session });
                session_lives = false;
                asked.retain(|(id, _)| node.replies.iter().any(|(_, of, _)| of == id));
            }
            Op::Corrupt(at) if session_lives => {
                let id = node.ask_load(&[hash(at as u64)], 1);
                if let Some(reply) = node.answer(id) {
                    let bad: Vec<u32> = (0..reply.slots.len() as u32).collect();
                    node.world
                        .release(1, &reply.slots, &reply.generations, &bad);
                } else {
                    asked.push((id, vec![hash(at as u64)]));
                }
                for extent in std::mem::take(&mut node.world.refills) {
                    node.world.step(Input::ExtentReady { tenant: A, extent });
                }
                node.take();
            }
            _ => {}
        }
        node.take();
        asked.retain(|(id, list)| {
            let Some(reply) = node.answer(*id) else {
                return true;
            };
            let ready = list
                .iter()
                .zip(&reply.states)
                .filter(|(_, s)| **s == LoadState::Ready);
            let wanted: Vec<u64> = ready.flat_map(|(hash, _)| crcs_of(hash)).collect();
            assert_eq!(reply.crcs, wanted);
            node.release(&reply);
            false
        });
    }
    node.finish_all();
    for extent in std::mem::take(&mut node.world.refills) {
        node.world.step(Input::ExtentReady { tenant: A, extent });
    }
    asked.retain(|(id, _)| node.answer(*id).is_none());
    assert!(asked.is_empty(), "loads without an answer: {asked:?}");
    let slots = node.world.status().slots;
    let lost = node.world.core.tier_counters().slots_lost;
    assert_eq!((slots.reserved, slots.quarantined), (0, lost));
}

#[test]
fn kept_runs_hold() {
    use Op::*;
    let ops = vec![
        Put(31, 4),
        Load(4, 1, 0),
        Load(15, 3, 0),
        Finish(1, 25),
        Load(3, 6, 0),
        Switch(false),
        Finish(7, 0),
        Finish(11, 0),
        Finish(10, 0),
        Finish(44, 25),
        Load(33, 2, 0),
        Put(0, 1),
        Finish(86, 25),
        Switch(true),
        Put(14, 1),
        Look(0, 1),
        Finish(14, 0),
        Put(0, 1),
        Put(33, 4),
        Finish(37, 25),
        Finish(4, 25),
        Finish(20, 25),
        Finish(0, 0),
        Finish(3, 25),
        Finish(0, 0),
        Finish(2, 25),
        Finish(74, 25),
    ];
    run(
        ops,
        Drawn {
            extents: 1,
            max_ahead: 2,
            full: true,
            demote: true,
            s3: false,
            low_water: 1,
        },
    );
}
