//! The NVMe store on a simulated disk: lives cut short at any point, failing and lying disks, damaged images. See `disk_run` for
//! what is checked.
//!
//! `KVD_SIM_SEED=n` begins the fresh seeds with n; `KVD_TEST_SOAK=1` runs many more.

mod common;

use kvd_nvme::store::{Plant, Store};
use kvd_sim::{DiskFaults, DiskMix, DiskOptions, DiskReport, SimDisk, flips, run_disk};

use common::{fresh_seed, soak};

/// Runs many seeds, and gives the sum of what happened.
fn many(seeds: u64, mix: DiskMix) -> DiskReport {
    let seeds = if soak() { 1_600 } else { seeds };
    let first = fresh_seed();
    let mut sum = DiskReport::default();
    for seed in first..first + seeds {
        let report = run_disk(&mix.options(seed)).unwrap_or_else(|text| panic!("{text}"));
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
    let sum = many(8, DiskMix::CUTS);
    assert_eq!(sum.corrupt, 0);
}

#[test]
fn errors_and_short_transfers_cost_only_what_they_hit() {
    let sum = many(5, DiskMix::ERRORS);
    assert!(sum.failed > 0 && sum.corrupt == 0);
}

#[test]
fn a_disk_that_stalls_or_keeps_failing_is_switched_off_and_on() {
    // Nearly half of the seeds have no fault that lasts for long enough.
    assert!(many(20, DiskMix::FAILING).switched_off > 0);
}

#[test]
fn a_full_disk_fails_writes_and_nothing_else() {
    let report =
        run_disk(&DiskMix::FULL.options(fresh_seed())).unwrap_or_else(|text| panic!("{text}"));
    // What was still under way when the disk had room again.
    assert!(report.written < 100 && report.failed > 100, "{report:?}");
}

#[test]
fn lost_and_misdirected_writes_are_damage_and_never_wrong_bytes() {
    assert!(many(5, DiskMix::LOST).corrupt > 0);
}

#[test]
fn everything_at_once_never_gives_wrong_bytes() {
    let sum = many(5, DiskMix::EVERYTHING);
    assert!(sum.failed > 0);
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
    type Planted = Option<fn(&mut Store<SimDisk>)>;
    let none = DiskFaults::default();
    let damage = DiskFaults {
        lost: 100,
        misdirected: 100,
        ..none
    };
    let deaf = DiskFaults { deaf: true, ..none };
    let plants: [(&str, Planted, DiskFaults, &[&str]); 5] = [
        (
            "journal first",
            Some(|s| s.plant(Plant::JournalFirst)),
            none,
            &[" 4: "],
        ),
        (
            "early answers",
            Some(|s| s.plant(Plant::EarlyAnswer)),
            none,
            &[" 4: "],
        ),
        (
            "forgotten drops",
            Some(|s| s.plant(Plant::ForgetDrops)),
            none,
            &[" 4: ", " 7: "],
        ),
        (
            "unchecked reads",
            Some(|s| s.plant(Plant::SkipCrc)),
            damage,
            &[" 1: "],
        ),
        ("deaf flushes", None, deaf, &[" 4: "]),
    ];
    for (name, plant, faults, shows_as) in plants {
        let run = |seed| {
            run_disk(&DiskOptions {
                plant,
                cuts: 30,
                faults,
                ..DiskMix::CUTS.options(seed)
            })
        };
        let found = (1..200).find_map(|seed| run(seed).err());
        let text = found.unwrap_or_else(|| panic!("{name}: not found"));
        assert!(
            shows_as.iter().any(|number| text.contains(number)) && !text.contains("panicked"),
            "{name}: found as {text}"
        );
    }
}
