//! One run, of a world or of a disk, and what came of it.

use kvd_sim::{DiskMix, DiskOptions, Failure, Options, catching, run_disk, run_with, shrink};

/// Most runs that are tried to make a failing one smaller.
const TRIES: usize = 60;

/// What to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Run {
    /// A whole node.
    World(Options),
    /// A store on a disk.
    Disk {
        /// What goes wrong.
        mix: DiskMix,
        /// All follows from it.
        seed: u64,
        /// How many.
        steps: u32,
    },
}

/// Every invariant held.
#[derive(Clone, Debug)]
pub(crate) struct Held {
    /// Steps in which anything could go wrong.
    pub(crate) steps: u64,
    /// Steps of the quiet end of a world, in which nothing new begins.
    pub(crate) quiet: u64,
    /// Digest of the event log. Disks have none.
    pub(crate) hash: Option<u64>,
    /// What happened how often.
    pub(crate) counters: Vec<(&'static str, u64)>,
}

/// An invariant did not hold.
#[derive(Clone, Debug)]
pub(crate) struct Broken {
    /// The run.
    pub(crate) run: Run,
    /// In which step; unknown when the simulator itself panicked.
    pub(crate) step: Option<u64>,
    /// Its number in `docs/invariants.md`; 0: it did not come to rest. Unknown when the simulator itself went wrong.
    pub(crate) invariant: Option<u8>,
    /// What was seen.
    pub(crate) text: String,
    /// The last events. Disks have none.
    pub(crate) events: Vec<String>,
    /// What can be made smaller.
    failure: Option<Box<Failure>>,
}

/// A run that failed, and the smallest one found that fails alike.
#[derive(Clone, Debug)]
pub(crate) struct Smallest {
    /// As it was found.
    pub(crate) found: Broken,
    /// If there is a smaller one.
    pub(crate) small: Option<Broken>,
}

impl Run {
    /// Its seed.
    pub(crate) fn seed(&self) -> u64 {
        match self {
            Run::World(options) => options.seed,
            Run::Disk { seed, .. } => *seed,
        }
    }

    /// Steps that it was told to make, without the quiet end.
    pub(crate) fn steps(&self) -> u64 {
        match self {
            Run::World(options) => options.steps,
            Run::Disk { steps, .. } => u64::from(*steps),
        }
    }

    /// Runs it. A panic outside of what the library catches is a failure of this seed, too.
    pub(crate) fn go(&self) -> Result<Held, Box<Broken>> {
        catching(|| self.go_on()).unwrap_or_else(|text| {
            Err(Box::new(Broken {
                run: *self,
                step: None,
                invariant: None,
                text: format!("the simulator panicked: {text}"),
                events: Vec::new(),
                failure: None,
            }))
        })
    }

    fn go_on(&self) -> Result<Held, Box<Broken>> {
        match self {
            Run::World(options) => match run_with(options) {
                Ok(report) => Ok(Held {
                    steps: options.steps,
                    quiet: report.steps.saturating_sub(options.steps),
                    hash: Some(report.event_log_hash),
                    counters: report.counters.each().collect(),
                }),
                Err(failure) => Err(Box::new(Broken::of_world(failure))),
            },
            Run::Disk { mix, seed, steps } => {
                let options = DiskOptions {
                    steps: *steps,
                    ..mix.options(*seed)
                };
                match run_disk(&options) {
                    Ok(report) => Ok(Held {
                        steps: u64::from(*steps),
                        quiet: 0,
                        hash: None,
                        counters: vec![
                            ("blocks dropped", report.dropped),
                            ("blocks found", report.found),
                            ("blocks read", report.read),
                            ("blocks written", report.written),
                            ("checkpoints", report.checkpoints),
                            ("lives cut short", report.cuts),
                            ("operations failed", report.failed),
                            ("reads corrupt", report.corrupt),
                            ("switched off", report.switched_off),
                        ],
                    }),
                    Err(text) => Err(Box::new(Broken::of_disk(*self, &text))),
                }
            }
        }
    }
}

impl Broken {
    fn of_world(failure: Box<Failure>) -> Broken {
        Broken {
            run: Run::World(failure.options),
            step: Some(failure.step),
            invariant: Some(failure.invariant),
            text: failure.text.clone(),
            events: failure.tail.clone(),
            failure: Some(failure),
        }
    }

    /// Takes `seed 5 step 77: 4: what was seen` apart. What has no number is the simulator's own trouble.
    fn of_disk(run: Run, text: &str) -> Broken {
        let place = format!("seed {} step ", run.seed());
        let placed = text.strip_prefix(&place).and_then(|rest| {
            let (step, rest) = rest.split_once(": ")?;
            Some((step.parse().ok()?, rest))
        });
        let (step, rest) = placed.map_or((None, text), |(step, rest)| (Some(step), rest));
        let numbered = rest.split_once(": ").and_then(|(number, rest)| {
            let number = number.parse().ok()?;
            Some((number, rest))
        });
        let (invariant, rest) = numbered.map_or((None, rest), |(n, rest)| (Some(n), rest));
        Broken {
            run,
            step,
            invariant,
            text: rest.to_owned(),
            events: Vec::new(),
            failure: None,
        }
    }
}

/// Looks for a smaller run of a world that fails alike. Panics on the way are expected, and say nothing; no other run may be under way.
pub(crate) fn smallest(found: &Broken) -> Smallest {
    let found = found.clone();
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let small = found.failure.clone().and_then(|failure| {
        let before = failure.options;
        let small = catching(|| shrink(failure, TRIES)).ok()?;
        (small.options != before).then(|| Broken::of_world(small))
    });
    std::panic::set_hook(hook);
    Smallest { found, small }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flags::repeat;
    use kvd_sim::Plant;

    #[test]
    fn a_planted_bug_is_made_smaller_and_can_be_repeated() {
        let planted = |seed| Run::World(Options::new(seed, 6_000).with_plant(Plant::EarlyCommit));
        let found = (0..300).find_map(|seed| planted(seed).go().err());
        let found = smallest(&found.expect("it is found"));
        assert_eq!(found.found.invariant, Some(3));
        let small = found.small.expect("fewer steps do");
        let again = small.run.go().expect_err("it fails again");
        assert_eq!((again.step, &again.text), (small.step, &small.text));
        assert!(!small.events.is_empty());
        assert!(repeat(&small.run).ends_with("--plant EarlyCommit"));
    }

    #[test]
    fn what_a_disk_says_is_taken_apart() {
        let run = Run::Disk {
            mix: DiskMix::CUTS,
            seed: 5,
            steps: 100,
        };
        let parts = |text: &str| {
            let broken = Broken::of_disk(run, text);
            (broken.step, broken.invariant, broken.text)
        };
        assert_eq!(
            parts("seed 5 step 77: 4: it was lost: k"),
            (Some(77), Some(4), "it was lost: k".into())
        );
        assert_eq!(
            parts("seed 5 step 0: no store"),
            (Some(0), None, "no store".into())
        );
        assert_eq!(
            parts("it does not open: why"),
            (None, None, "it does not open: why".into())
        );
    }
}
