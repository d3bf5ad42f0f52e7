//! Runs a world from its seed, turns panics of the node into failures, and makes failing runs smaller.

use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::options::Options;
use crate::report::{Broken, Check, Failure, Report};
use crate::world::World;

/// Runs `steps` steps from `seed` with the full fault model, then lets everything come to rest.
///
/// # Errors
/// The first invariant that did not hold.
pub fn run(seed: u64, steps: u64) -> Result<Report, Box<Failure>> {
    run_with(&Options::new(seed, steps))
}

/// The same, as told.
///
/// # Errors
/// The first invariant that did not hold.
pub fn run_with(options: &Options) -> Result<Report, Box<Failure>> {
    let mut world = World::new(*options);
    let result = catching(|| go(&mut world)).unwrap_or_else(|text| {
        let text = format!("the node panicked: {text}");
        Err(Broken { invariant: 2, text })
    });
    match result {
        Ok(()) => Ok(Report {
            event_log_hash: world.log.hash(),
            steps: world.step,
            counters: world.counters,
        }),
        Err(broken) => Err(Box::new(Failure {
            options: *options,
            step: world.step,
            invariant: broken.invariant,
            text: broken.text,
            tail: world.log.words(),
        })),
    }
}

/// Runs it.
///
/// # Errors
/// The text of a panic.
pub fn catching<T>(run: impl FnOnce() -> T) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(run)).map_err(|panic| {
        panic
            .downcast_ref::<String>()
            .cloned()
            .or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned()))
            .unwrap_or_default()
    })
}

fn go(world: &mut World) -> Check {
    world.start_daemon()?;
    for _ in 0..world.options.steps {
        world.step()?;
    }
    world.come_to_rest()
}

/// Looks for a simpler run that breaks the same invariant: fewer steps, fewer faults, fewer engines, smaller arenas.
/// Tries at most `tries` runs.
pub fn shrink(failure: Box<Failure>, tries: usize) -> Box<Failure> {
    let mut best = failure;
    let mut left = tries;
    'again: loop {
        for options in best.options.simpler(best.step) {
            if left == 0 {
                return best;
            }
            left -= 1;
            if let Err(found) = run_with(&options)
                && found.invariant == best.invariant
            {
                best = found;
                continue 'again;
            }
        }
        return best;
    }
}
