//! Deliberate mistakes around the node must be found, each by the invariant that it breaks. A checker that never fails proves
//! nothing.

use kvd_sim::{Failure, Options, Plant, run_with, shrink};

/// By which invariants a mistake may show first; 0: the world does not come to rest.
fn shows_as(plant: Plant) -> &'static [u8] {
    match plant {
        Plant::DropEvictionWords | Plant::LateWords | Plant::EarlyDeath | Plant::EarlyFence => &[3],
        Plant::StaleOrders | Plant::EarlyCommit | Plant::SkipGeneration | Plant::ForgetOdd => &[3],
        Plant::NoDeath | Plant::NoTicks => &[0],
        Plant::SkipCrc => &[1],
        Plant::LoseReply => &[0, 3, 5],
        Plant::DoubleReply => &[5],
        Plant::HideRemoval => &[6],
        Plant::MixTenants => &[10],
    }
}

/// The first run of many seeds in which something is found.
fn find(options: impl Fn(u64) -> Options, seeds: u64) -> Option<Box<Failure>> {
    (0..seeds).find_map(|seed| run_with(&options(seed)).err())
}

#[test]
fn every_planted_bug_is_found() {
    for plant in Plant::ALL {
        let found = find(|seed| Options::new(seed, 6_000).with_plant(plant), 300);
        let found = found.unwrap_or_else(|| panic!("{plant:?} was not found"));
        assert!(
            shows_as(plant).contains(&found.invariant),
            "{plant:?} was found as {found}"
        );
    }
}

#[test]
fn a_failing_run_shrinks_and_says_how_to_see_it_again() {
    let found = find(
        |seed| Options::new(seed, 6_000).with_plant(Plant::EarlyCommit),
        300,
    )
    .expect("it is found");
    let small = shrink(found.clone(), 40);
    assert!(small.options.steps <= found.options.steps);
    assert_eq!(small.invariant, found.invariant);
    let again = run_with(&small.options).expect_err("it fails again");
    assert_eq!((again.step, &again.text), (small.step, &small.text));
    let text = small.to_string();
    assert!(
        text.contains(&format!("seed {}", small.options.seed))
            && text.contains(&format!("step {}", small.step)),
        "{text}"
    );
}
