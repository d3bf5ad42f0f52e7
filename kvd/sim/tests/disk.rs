//! The NVMe store on a simulated disk: lives cut short at any point, failing and lying disks, damaged images. See `disk_run` for
//! what is checked.
//!
//! `KVD_SIM_SEED=n` begins the fresh seeds with n; `KVD_TEST_SOAK=1` runs many more.

mod common;

use kvd_sim::{DiskFaults, DiskOptions, DiskReport, StorePlant, flips, run_disk};

use common::{fresh_seed, soak};

fn options(seed: u64, faults: DiskFaults) -> DiskOptions {
    DiskOptions {
        seed,
        steps: 3_000,
        faults,
        cuts: 150,
        plant: None,
    }
}

/// Runs many seeds, and gives the sum of what happened.
fn many(seeds: u64, faults: DiskFaults) -> DiskReport {
    let seeds = if soak() { seeds * 100 } else { seeds };
    let first = fresh_seed();
    let mut sum = DiskReport::default();
    for seed in first..first + seeds {
        let report = run_disk(&options(seed, faults)).unwrap_or_else(|text| panic!("{text}"));
        sum.written += report.written;
        sum.read += report.read;
        sum.dropped += report.dropped;
        sum.corrupt += report.corrupt;
        sum.failed += report.failed;
        sum.cuts += report.cuts;
        sum.checkpoints += report.checkpoints;
        sum.switched_off += report.switched_off;
    }
    assert!(sum.written > 100 && sum.read > 100 && sum.dropped > 100);
    assert!(sum.cuts > 5 && sum.checkpoints > 0, "{sum:?}");
    sum
}

#[test]
fn nothing_answered_is_lost_and_nothing_dropped_comes_back() {
    let sum = many(20, DiskFaults::default());
    assert_eq!(sum.corrupt, 0);
}

#[test]
fn errors_and_short_transfers_cost_only_what_they_hit() {
    let faults = DiskFaults {
        eio: 200,
        short: 300,
        ..DiskFaults::default()
    };
    let sum = many(15, faults);
    assert!(sum.failed > 0 && sum.corrupt == 0);
}

#[test]
fn a_disk_that_stalls_or_keeps_failing_is_switched_off_and_on() {
    let faults = DiskFaults {
        stall: 500,
        sticky: 2_000,
        ..DiskFaults::default()
    };
    assert!(many(15, faults).switched_off > 0);
}

#[test]
fn a_full_disk_fails_writes_and_nothing_else() {
    let faults = DiskFaults {
        full: true,
        ..DiskFaults::default()
    };
    let report = run_disk(&options(fresh_seed(), faults)).unwrap_or_else(|text| panic!("{text}"));
    // What was still under way when the disk had room again.
    assert!(report.written < 100 && report.failed > 100, "{report:?}");
}

#[test]
fn lost_and_misdirected_writes_are_damage_and_never_wrong_bytes() {
    let faults = DiskFaults {
        lost: 300,
        misdirected: 300,
        ..DiskFaults::default()
    };
    assert!(many(15, faults).corrupt > 0);
}

#[test]
fn flipped_bits_in_blocks_cost_at_most_a_block_each() {
    let images = if soak() { 2_000 } else { 15 };
    for bits in [1, 20] {
        let report =
            flips(fresh_seed(), images, bits, true).unwrap_or_else(|text| panic!("{text}"));
        assert_eq!(report.refused, 0);
    }
}

#[test]
fn flipped_bits_anywhere_leave_what_they_did_not_hit() {
    let images = if soak() { 3_000 } else { 20 };
    let report = flips(fresh_seed(), images, 12, false).unwrap_or_else(|text| panic!("{text}"));
    assert!(report.opened > report.refused, "{report:?}");
    assert!(report.served * 10 > report.blocks * 6, "{report:?}");
}

#[test]
fn planted_mistakes_are_found() {
    let plants: [(Option<StorePlant>, DiskFaults, &[&str]); 5] = [
        (
            Some(StorePlant::JournalFirst),
            DiskFaults::default(),
            &["4:"],
        ),
        (
            Some(StorePlant::EarlyAnswer),
            DiskFaults::default(),
            &["4:"],
        ),
        (
            Some(StorePlant::ForgetDrops),
            DiskFaults::default(),
            &["4:", "7:"],
        ),
        (
            Some(StorePlant::SkipCrc),
            DiskFaults {
                lost: 100,
                misdirected: 100,
                ..DiskFaults::default()
            },
            &["1:"],
        ),
        (
            None,
            DiskFaults {
                deaf: true,
                ..DiskFaults::default()
            },
            &["4:"],
        ),
    ];
    for (plant, faults, shows_as) in plants {
        let run = |seed| {
            run_disk(&DiskOptions {
                plant,
                ..options(seed, faults)
            })
        };
        let found = (1..200).find_map(|seed| run(seed).err());
        let text = found.unwrap_or_else(|| panic!("{plant:?} {faults:?} was not found"));
        assert!(
            shows_as.iter().any(|number| text.contains(number)),
            "{plant:?} was found as {text}"
        );
    }
}
