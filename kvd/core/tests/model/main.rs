//! Random engines against a model that knows who may write what: the invariants 1, 2, 3, 5, 6, 7, 8 and 10 under every order
//! of reserving, copying, dying, detaching, fencing, reading late, lying and running out of time.
//!
//! The model's arena remembers, for every 256 bytes, what was last written there, so a slot that is reused too early shows as
//! wrong bytes, whatever the core believes. `World` runs `Core::check` after every step and asserts one reply a request.

#![allow(unreachable_pub, clippy::unwrap_used)]

#[path = "../common/mod.rs"]
mod common;
mod engines;
mod lies;
mod lives;
mod model;
mod readers;

use engines::{Op, ops};
use model::Model;
use proptest::prelude::*;

fn run(ops: &[Op], policy: kvd_core::EvictionPolicy) -> Model {
    let mut model = Model::new(policy);
    ops.iter().for_each(|op| model.apply(op));
    model.quiesce();
    model
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, max_shrink_iters: 4000, ..ProptestConfig::default() })]

    #[test]
    fn engines_of_every_kind_never_break_the_invariants(ops in ops(300), lru in any::<bool>()) {
        let policy = if lru { kvd_core::EvictionPolicy::Lru } else { kvd_core::EvictionPolicy::S3Fifo };
        run(&ops, policy);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    #[test]
    fn equal_inputs_give_equal_outputs(ops in ops(300)) {
        let first = run(&ops, kvd_core::EvictionPolicy::S3Fifo).world.seen;
        let second = run(&ops, kvd_core::EvictionPolicy::S3Fifo).world.seen;
        prop_assert_eq!(first, second);
    }
}
