//! Deliberate mistakes around the node must be found, each by the invariant that it breaks. A checker that never fails proves
//! nothing.

use kvd_nvme::store;
use kvd_sim::{Failure, Fault, Faults, Options, Plant, StorePlant, run_with, shrink};

/// By which invariants a mistake may show first; 0: the world does not come to rest.
fn shows_as(plant: Plant) -> &'static [u8] {
    match plant {
        Plant::DropEvictionWords
        | Plant::LateWords
        | Plant::EarlyDeath
        | Plant::EarlyFence
        | Plant::LatestFence
        | Plant::StaleAborts => &[3],
        Plant::OldTables => &[0, 3],
        Plant::StaleOrders => &[1, 3],
        Plant::EarlyCommit | Plant::SkipGeneration | Plant::ForgetOdd => &[3],
        Plant::NoDeath | Plant::NoTicks => &[0],
        Plant::SkipCrc => &[1],
        Plant::LoseReply => &[0, 3, 5, 9, 10],
        Plant::DoubleReply => &[5],
        Plant::HideRemoval => &[6],
        Plant::MixTenants => &[10],
        Plant::EarlyDrop => &[3],
        Plant::FailedWrite => &[4],
        Plant::EarlyRead => &[1, 3],
    }
}

/// Where to look for a mistake, from this seed on. Rare ones are looked for where they are known to show.
fn looked_for(plant: Plant) -> Options {
    let usual = Options::new(0, 6_000).with_plant(plant);
    match plant {
        Plant::LatestFence => Options {
            seed: 500,
            stores: 0,
            ..usual
        },
        // A small world, in which the same engine soon gets the same slot again.
        Plant::StaleAborts => Options {
            seed: 1_300,
            tenants: 1,
            instances: 1,
            extents: 1,
            stores: 0,
            ..usual
        },
        _ => usual,
    }
}

/// The first of many runs in which something is found.
fn find(plant: Plant) -> Option<Box<Failure>> {
    let first = looked_for(plant);
    let run = |seed| run_with(&Options { seed, ..first });
    (first.seed..first.seed + 300).find_map(|seed| run(seed).err())
}

#[test]
fn every_planted_bug_is_found() {
    for plant in Plant::ALL {
        let found = find(plant).unwrap_or_else(|| panic!("{plant:?} was not found"));
        assert!(
            shows_as(plant).contains(&found.invariant),
            "{plant:?} was found as {found}"
        );
    }
}

/// Mistakes of the store itself, and how they may show.
const OF_THE_STORE: [(&str, StorePlant, &[u8]); 4] = [
    (
        "JournalFirst",
        StorePlant(|store| store.plant(store::Plant::JournalFirst)),
        &[4],
    ),
    (
        "EarlyAnswer",
        StorePlant(|store| store.plant(store::Plant::EarlyAnswer)),
        &[4],
    ),
    (
        "ForgetDrops",
        StorePlant(|store| store.plant(store::Plant::ForgetDrops)),
        &[4],
    ),
    (
        "SkipCrc",
        StorePlant(|store| store.plant(store::Plant::SkipCrc)),
        &[1],
    ),
];

/// Worlds in which engines are left in peace, so that the stores have much to do.
fn calm() -> Faults {
    let kept = [Fault::Crash, Fault::Rogue, Fault::DiskRot, Fault::PowerCut];
    let others = Fault::ALL.iter().filter(|fault| !kept.contains(fault));
    others.fold(Faults::all(), |faults, fault| faults.without(*fault))
}

#[test]
fn every_bug_planted_in_the_store_is_found() {
    for (name, plant, shows_as) in OF_THE_STORE {
        let run = |seed| {
            run_with(&Options {
                store_plant: Some(plant),
                faults: calm(),
                ..Options::new(seed, 6_000)
            })
        };
        let found = (0..300).find_map(|seed| run(seed).err());
        let found = found.unwrap_or_else(|| panic!("{name} was not found"));
        assert!(
            shows_as.contains(&found.invariant),
            "{name} was found as {found}"
        );
    }
}

#[test]
fn a_failing_run_shrinks_and_says_how_to_see_it_again() {
    let found = find(Plant::EarlyCommit).expect("it is found");
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
