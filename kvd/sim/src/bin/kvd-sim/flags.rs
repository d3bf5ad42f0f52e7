//! The flags, what they ask for, and the way back: the command that repeats a run.

use std::fmt::Write;
use std::time::Duration;

use clap::builder::PossibleValuesParser;
use clap::error::ErrorKind;
use clap::{Arg, ArgAction, ArgGroup, ArgMatches, Command, value_parser};
use kvd_sim::{DiskMix, Fault, Faults, Options, Plant};

use crate::one::Run;

/// Steps of a world, unless told otherwise.
const STEPS: u32 = 10_000;

/// How many seeds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Many {
    /// So many.
    Seeds(u64),
    /// As many as are begun in this time.
    For(Duration),
}

/// What the flags ask for.
#[derive(Clone, Debug)]
pub(crate) struct Wanted {
    /// The seed, or the first of many.
    pub(crate) first: Option<u64>,
    /// More than one seed.
    pub(crate) many: Option<Many>,
    /// Threads.
    pub(crate) jobs: usize,
    /// Print JSON.
    pub(crate) json: bool,
    /// Only disks, with this mix.
    disk: Option<DiskMix>,
    /// Steps of a disk.
    disk_steps: Option<u32>,
    /// All worlds, but for the seed.
    world: Options,
}

impl Wanted {
    /// The run number `at` from the seed `first` on.
    pub(crate) fn run(&self, first: u64, at: u64) -> Run {
        let seed = first.wrapping_add(at);
        let mix = match (self.disk, self.many) {
            (Some(mix), _) => Some(mix),
            (None, Some(_)) if at % 2 == 1 && !self.special_world() => {
                Some(DiskMix::ALL[(at / 2) as usize % DiskMix::ALL.len()])
            }
            _ => None,
        };
        match mix {
            Some(mix) => Run::Disk {
                mix,
                seed,
                steps: self.disk_steps.unwrap_or(mix.options(seed).steps),
            },
            None => Run::World(Options { seed, ..self.world }),
        }
    }

    /// Whether flags say something of worlds. Disks are left out then.
    fn special_world(&self) -> bool {
        self.world != Options::new(self.world.seed, self.world.steps)
    }
}

/// All flags.
pub(crate) fn command() -> Command {
    let number = |name, help| {
        let arg = Arg::new(name).long(name).value_name("N").help(help);
        arg.value_parser(value_parser!(u64))
    };
    let most = |name: &'static str, least: u64, most: u64, help| {
        let arg = Arg::new(name).long(name).value_name("N").help(help);
        arg.value_parser(value_parser!(u64).range(least..=most))
            .conflicts_with("disk")
    };
    let usual = Options::new(0, 1);
    Command::new("kvd-sim")
        .about("Simulates a node with engines and disks that fail, and checks every invariant (docs/invariants.md)")
        .version(env!("CARGO_PKG_VERSION"))
        .after_help(
            "Everything follows from the seed. Fresh seeds are worlds and disks in turns.\n\n\
             Examples:\n  kvd-sim --seed 7 --steps 20000   one world\n  kvd-sim --seed 7 --disk errors   one disk\n  \
             kvd-sim --for 60s                fresh seeds for a minute\n\n\
             Exit status:\n  0  every invariant held\n  1  one was broken: seed, last events and the command that repeats it are printed\n  2  asked wrongly",
        )
        .arg(number("seed", "The seed; with --for or --seeds the first of them [default there: a fresh one]"))
        .arg(
            Arg::new("steps")
                .long("steps")
                .value_name("N")
                .value_parser(value_parser!(u32).range(1..))
                .help("Steps of each run [default: 10000 of a world, 3000 of a disk]"),
        )
        .arg(
            Arg::new("for")
                .long("for")
                .value_name("TIME")
                .value_parser(time)
                .help("Run fresh seeds for that long; runs that have begun are finished"),
        )
        .arg(
            number("seeds", "Run so many seeds")
                .value_parser(value_parser!(u64).range(1..)),
        )
        .group(ArgGroup::new("many").args(["for", "seeds"]))
        .arg(
            number("jobs", "Threads [default: as many as there are cores]")
                .value_parser(value_parser!(u64).range(1..=1024))
                .requires("many"),
        )
        .arg(
            Arg::new("disk")
                .long("disk")
                .value_name("MIX")
                .value_parser(PossibleValuesParser::new(DiskMix::ALL.map(|mix| mix.name)))
                .help("Only the store on a disk, with these faults"),
        )
        .arg(most("tenants", 1, usual.tenants as u64, "Most tenants of a world"))
        .arg(most("instances", 1, usual.instances as u64, "Most engine instances at once"))
        .arg(most("extents", 1, u64::from(usual.extents), "Most extents of an arena"))
        .arg(most("stores", 0, usual.stores as u64, "Most stores of the slower tier"))
        .arg(
            Arg::new("without")
                .long("without")
                .value_name("FAULT,...")
                .value_delimiter(',')
                .action(ArgAction::Append)
                .value_parser(PossibleValuesParser::new(Fault::ALL.map(|fault| format!("{fault:?}"))))
                .hide_possible_values(true)
                .conflicts_with("disk")
                .help("Faults that do not happen in a world, by the names that a failure prints"),
        )
        .arg(
            Arg::new("plant")
                .long("plant")
                .value_name("MISTAKE")
                .value_parser(PossibleValuesParser::new(Plant::ALL.map(|plant| format!("{plant:?}"))))
                .hide_possible_values(true)
                .conflicts_with("disk")
                .help("A mistake to make around the node, which must be found: EarlyCommit, SkipCrc, ..."),
        )
        .arg(
            Arg::new("json")
                .long("json")
                .action(ArgAction::SetTrue)
                .help("Print JSON"),
        )
}

fn time(text: &str) -> Result<Duration, String> {
    match humantime::parse_duration(text) {
        Ok(Duration::ZERO) => Err("no time at all; write it like 60s, 10m or 1h".into()),
        Ok(time) => Ok(time),
        Err(error) => Err(format!("{error}; write it like 60s, 10m or 1h")),
    }
}

/// Understands the flags.
pub(crate) fn wanted(args: &ArgMatches) -> Result<Wanted, clap::Error> {
    let number = |name| args.get_one::<u64>(name).copied();
    let (first, seeds) = (number("seed"), number("seeds").map(Many::Seeds));
    let many = args
        .get_one::<Duration>("for")
        .map(|time| Many::For(*time))
        .or(seeds);
    if first.is_none() && many.is_none() {
        return Err(command().error(
            ErrorKind::MissingRequiredArgument,
            "say what to run: --seed N for one seed, --for 60s for fresh ones",
        ));
    }
    let steps = args.get_one::<u32>("steps").copied();
    let text = |name| args.get_one::<String>(name).map(String::as_str);
    let off = args.get_many::<String>("without").unwrap_or_default();
    let usual = Options::new(0, steps.unwrap_or(STEPS).into());
    let world = Options {
        faults: off.fold(Faults::all(), |faults, name| {
            let named = Fault::ALL
                .into_iter()
                .find(|fault| format!("{fault:?}") == *name);
            named.map_or(faults, |fault| faults.without(fault))
        }),
        tenants: number("tenants").map_or(usual.tenants, |n| n as usize),
        instances: number("instances").map_or(usual.instances, |n| n as usize),
        extents: number("extents").map_or(usual.extents, |n| n as u32),
        stores: number("stores").map_or(usual.stores, |n| n as usize),
        plant: Plant::ALL
            .into_iter()
            .find(|plant| text("plant").is_some_and(|name| format!("{plant:?}") == name)),
        ..usual
    };
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    Ok(Wanted {
        first,
        many,
        jobs: number("jobs").map_or(cores, |n| n as usize),
        json: args.get_flag("json"),
        disk: DiskMix::ALL
            .into_iter()
            .find(|mix| text("disk") == Some(mix.name)),
        disk_steps: steps,
        world,
    })
}

/// The command that repeats a run.
pub(crate) fn repeat(run: &Run) -> String {
    let options = match run {
        Run::Disk { mix, seed, steps } => {
            return format!("kvd-sim --seed {seed} --steps {steps} --disk {}", mix.name);
        }
        Run::World(options) => options,
    };
    let usual = Options::new(options.seed, options.steps);
    let mut text = format!("kvd-sim --seed {} --steps {}", options.seed, options.steps);
    let numbers = [
        ("tenants", options.tenants, usual.tenants),
        ("instances", options.instances, usual.instances),
        ("extents", options.extents as usize, usual.extents as usize),
        ("stores", options.stores, usual.stores),
    ];
    for (name, number, usual) in numbers {
        if number != usual {
            let _ = write!(text, " --{name} {number}");
        }
    }
    let off: Vec<String> = Fault::ALL
        .iter()
        .filter(|fault| !options.faults.has(**fault))
        .map(|fault| format!("{fault:?}"))
        .collect();
    if !off.is_empty() {
        let _ = write!(text, " --without {}", off.join(","));
    }
    if let Some(plant) = options.plant {
        let _ = write!(text, " --plant {plant:?}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Result<Wanted, clap::Error> {
        wanted(&command().try_get_matches_from(line.split_whitespace())?)
    }

    #[test]
    fn flags_are_sound() {
        command().debug_assert();
    }

    #[test]
    fn a_repeating_command_asks_for_the_same_run() {
        let mut runs = vec![
            Run::World(Options::new(7, 123)),
            Run::World(Options {
                tenants: 1,
                instances: 2,
                extents: 3,
                stores: 0,
                faults: Faults::none(),
                ..Options::new(u64::MAX, 1).with_plant(Plant::EarlyRead)
            }),
        ];
        runs.extend(DiskMix::ALL.map(|mix| Run::Disk {
            mix,
            seed: 5,
            steps: 77,
        }));
        for run in runs {
            let wanted = parsed(&repeat(&run)).expect("it is understood");
            assert_eq!(wanted.run(wanted.first.expect("a seed"), 0), run);
            assert_eq!(wanted.many, None);
        }
    }

    #[test]
    fn fresh_seeds_are_worlds_and_every_mix_of_disks() {
        let wanted = parsed("kvd-sim --for 1m").expect("it is understood");
        assert_eq!(wanted.many, Some(Many::For(Duration::from_secs(60))));
        let runs: Vec<Run> = (0..12).map(|at| wanted.run(100, at)).collect();
        assert_eq!(runs[4], Run::World(Options::new(104, 10_000)));
        for (run, mix) in runs.iter().skip(1).step_by(2).zip(DiskMix::ALL) {
            assert!(
                matches!(run, Run::Disk { mix: one, .. } if *one == mix),
                "{run:?}"
            );
        }
        let worlds = parsed("kvd-sim --for 1m --stores 0").expect("it is understood");
        assert!((0..12).all(|at| matches!(worlds.run(100, at), Run::World(_))));
    }
}
