//! `kill -9` while blocks are being written, again and again over one store. What was said to be written is there with the right
//! bytes; what was not is there or absent, and never half.

use crate::common::eventually;
use crate::kit::{Dice, Engine, Home, offloaded, soak, tier};

/// Kills in a normal run, in a long one, and over one store before it would be full.
const KILLS: u32 = 15;
const SOAK_KILLS: u32 = 1_000;
const KILLS_A_STORE: u32 = 15;
/// Blocks of a round whose writing is waited for, and most that are stored when the daemon is killed.
const SAFE: u32 = 16;
const MOST: u32 = 96;

#[test]
fn what_was_written_outlives_kill_9_at_any_point() {
    let kills = if soak() { SOAK_KILLS } else { KILLS };
    let mut dice = Dice::new(1);
    let mut done = 0;
    let mut caught = 0;
    while done < kills {
        let rounds = KILLS_A_STORE.min(kills - done);
        caught += one_store(rounds, &mut dice);
        done += rounds;
    }
    assert!(
        caught >= kills / KILLS_A_STORE,
        "only {caught} of {kills} kills came while blocks were being written"
    );
}

/// How many of the kills came while blocks were being written.
fn one_store(rounds: u32, dice: &mut Dice) -> u32 {
    let home = Home::new();
    // Of every round: blocks that were stored.
    let mut stored: Vec<u32> = Vec::new();
    // Blocks that a restart must find at least.
    let mut known = 0;
    let mut caught = 0;
    for round in 0..=rounds {
        // In the first round of each store flushes hang from some block on, so that one kill at least comes in the middle.
        let rules = home.run.path().join("faults");
        let faults = match round {
            0 => rules.display().to_string(),
            _ => "off".to_owned(),
        };
        let mut daemon = home.serve(&["--nvme-capacity", "256MiB", "--nvme-faults", &faults]);
        let recovered = tier(&daemon, "recovered");
        assert!(
            recovered >= known,
            "{recovered} blocks are there, and {known} had been written"
        );
        assert_eq!(tier(&daemon, "not_recovered"), 0);
        let mut engine = Engine::new(&daemon);
        let mut found = 0;
        for (owner, blocks) in (0..).zip(&stored) {
            engine.load_all(owner, 0..SAFE);
            let rest = engine.load(owner, SAFE..*blocks);
            assert!(
                rest.failed.is_empty(),
                "half-written blocks of {owner}: {:?}",
                rest.failed
            );
            found += u64::from(SAFE) + rest.loaded.len() as u64;
        }
        assert_eq!(found, recovered, "all that is there can be loaded");
        if round == rounds {
            break;
        }
        engine.store(round, 0..SAFE);
        offloaded(&daemon, u64::from(SAFE));
        if round == 0 {
            std::fs::write(&rules, "flush stall").expect("written");
        }
        let more = 1 + dice.below(u64::from(MOST - SAFE)) as u32;
        for first in (SAFE..SAFE + more).step_by(8) {
            engine.store(round, first..(first + 8).min(SAFE + more));
        }
        stored.push(SAFE + more);
        // Somewhere between the first and the last of these.
        let until = match round {
            0 => u64::from(SAFE),
            _ => u64::from(SAFE) + dice.below(u64::from(more) + 1),
        };
        let mut written = 0;
        eventually("so many are written", || {
            written = tier(&daemon, "offloaded");
            written >= until
        });
        caught += u32::from(written < u64::from(SAFE + more));
        daemon.kill();
        known = recovered + written;
    }
    caught
}
