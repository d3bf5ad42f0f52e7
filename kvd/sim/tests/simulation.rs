//! The simulator's runs: the same seed gives the same events, kept seeds hold, fresh seeds hold.
//!
//! `KVD_SIM_SEED=n` begins the fresh seeds with n; `KVD_TEST_SOAK=1` runs many more.

mod common;

use kvd_sim::{Counters, Failure, run, shrink};

use common::{fresh_seed, soak};

/// Looks for a smaller run that fails alike, and fails the test with it.
fn fail(failure: Box<Failure>) -> ! {
    let first = failure.to_string();
    let small = shrink(failure, 60);
    panic!("{first}\nthe smallest run found that fails alike:\n{small}");
}

#[test]
fn the_same_seed_gives_the_same_events() {
    for seed in [1, 2, 3] {
        let (a, b) = (run(seed, 5_000), run(seed, 5_000));
        let a = a.unwrap_or_else(|failure| fail(failure));
        assert_eq!(Ok(&a), b.as_ref(), "seed {seed}");
        let other = run(seed + 100, 5_000).unwrap_or_else(|failure| fail(failure));
        assert_ne!(
            a.event_log_hash,
            other.event_log_hash,
            "seeds {seed} and {}",
            seed + 100
        );
    }
}

#[test]
fn kept_seeds_hold() {
    for line in include_str!("seeds")
        .lines()
        .filter(|line| !line.starts_with('#'))
    {
        let mut words = line.split_whitespace();
        let mut number = || words.next().and_then(|word| word.parse().ok());
        let (Some(seed), Some(steps)) = (number(), number()) else {
            panic!("a line of tests/seeds begins with seed and steps: {line}");
        };
        run(seed, steps).unwrap_or_else(|failure| fail(failure));
    }
}

#[test]
fn fresh_seeds_hold() {
    let first = fresh_seed();
    let (seeds, steps) = if soak() {
        (5_000, 20_000)
    } else {
        (180, 10_000)
    };
    eprintln_seed(first, seeds);
    let mut sum = Counters::default();
    for seed in first..first + seeds {
        match run(seed, steps) {
            Ok(report) => sum.merge(&report.counters),
            Err(failure) => fail(failure),
        }
    }
    // A run in which nothing happens holds too: see to it that things happen.
    for what in HAPPENS {
        assert!(
            sum.get(what) > 0,
            "'{what}' never happened in {seeds} seeds from {first} on"
        );
    }
}

const HAPPENS: [&str; 20] = [
    "arenas adopted",
    "blocks fetched",
    "blocks found",
    "blocks kept",
    "blocks not kept",
    "blocks loaded",
    "blocks stored",
    "byes",
    "daemon deaths",
    "deaths",
    "detaches",
    "disk faults",
    "lies",
    "lookup hits",
    "orders for another connection",
    "parts aborted in mid-copy",
    "reads corrupt",
    "reads overrun",
    "reservations of several lists",
    "scribbles",
];

/// Said before the runs, so that it is there whatever happens in them.
#[allow(
    clippy::disallowed_macros,
    reason = "the test harness shows this when the test fails"
)]
fn eprintln_seed(first: u64, seeds: u64) {
    println!(
        "seeds {first} to {}; again with KVD_SIM_SEED={first}",
        first + seeds - 1
    );
}
