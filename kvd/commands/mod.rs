//! The command line: which commands there are, their flags, and what a failure looks like from outside.
//!
//! Exit codes: 0 it worked, 1 it did not, 2 it was asked wrongly; `fsck` says more with them. Settings become flags by the table in `config`.

mod bench;
mod check;
mod fsck;
mod serve;
mod sim;
mod status;
mod stores;

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Arg, ArgAction, ArgMatches, Command};

use crate::config::{Config, Inputs, SETTINGS, Surroundings, UsageError};

/// Version and, where it is known, the commit.
pub(crate) const VERSION: &str = env!("KVD_VERSION");

/// Runs the command that the arguments name.
pub(crate) fn main() -> ExitCode {
    let matches = command().get_matches();
    let done = match matches.subcommand() {
        Some(("serve", args)) => load(args).and_then(|config| serve::run(&config)),
        Some(("status", args)) => {
            load(args).and_then(|config| status::run(&config, args.get_flag("json")))
        }
        Some(("fsck", args)) => return fsck::run(args),
        Some(("sim", args)) => return sim::run(args),
        Some(("config", args)) => match args.subcommand() {
            Some(("check", args)) => load(args).and_then(|config| check::run(&config)),
            _ => unreachable!("clap asks for a subcommand"),
        },
        Some(("bench", args)) => match args.subcommand() {
            Some(("session", args)) => bench::run(args.get_flag("json")),
            Some(("nvme", args)) => bench::nvme::run(args),
            Some(("restart", args)) => bench::restart::run(args),
            Some(("stall", args)) => bench::stall::run(args),
            Some(("gpu", args)) => bench::gpu::run(args, args.get_flag("json")),
            _ => unreachable!("clap asks for a subcommand"),
        },
        _ => unreachable!("clap asks for a subcommand"),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let usage = error.downcast_ref::<UsageError>().is_some();
            // Nothing can be done about a standard error that is closed.
            let _ = writeln!(std::io::stderr(), "error: {error:#}");
            ExitCode::from(if usage { 2 } else { 1 })
        }
    }
}

fn command() -> Command {
    Command::new("kvd")
        .about("Keeps the KV-cache blocks of LLM inference engines, for all engines of a node")
        .version(VERSION)
        .subcommand_required(true)
        .arg_required_else_help(true)
        .subcommand(with_settings(
            Command::new("serve").about("Runs the daemon"),
            all,
        ))
        .subcommand(
            with_settings(
                Command::new("status").about("Shows what a daemon holds and who is attached"),
                socket_only,
            )
            .arg(json()),
        )
        .subcommand(fsck::command().arg(json()))
        .subcommand(sim::command())
        .subcommand(
            Command::new("config")
                .about("About the configuration")
                .subcommand_required(true)
                .subcommand(with_settings(
                    Command::new("check").about(
                        "Checks the configuration and prints it, with where each value came from",
                    ),
                    all,
                )),
        )
        .subcommand(
            Command::new("bench")
                .about("Measures")
                .subcommand_required(true)
                .subcommand(
                    Command::new("session")
                        .about("Stores, loads and looks up over a session with a daemon of its own")
                        .arg(json()),
                )
                .subcommand(bench::nvme::command().arg(json()))
                .subcommand(bench::restart::command().arg(json()))
                .subcommand(bench::stall::command().arg(json()))
                .subcommand(bench::gpu::command().arg(json())),
        )
}

fn json() -> Arg {
    Arg::new("json")
        .long("json")
        .action(ArgAction::SetTrue)
        .help("Print JSON")
}

fn all(_: &str) -> bool {
    true
}

fn socket_only(key: &str) -> bool {
    key == "socket" || key == "runtime_dir"
}

fn with_settings(command: Command, wanted: fn(&str) -> bool) -> Command {
    let command = command.arg(
        Arg::new("config")
            .long("config")
            .value_name("FILE")
            .help("TOML file to read before variables and flags [env: KVD_CONFIG]"),
    );
    SETTINGS
        .iter()
        .filter(|s| wanted(s.key))
        .fold(command, |command, setting| {
            command.arg(
                Arg::new(setting.key)
                    .long(setting.flag())
                    .value_name(setting.value)
                    .help(format!("{} [env: {}]", setting.help, setting.variable())),
            )
        })
}

fn load(args: &ArgMatches) -> anyhow::Result<Config> {
    let flags = SETTINGS
        .iter()
        .filter_map(|s| {
            Some((
                s.key,
                args.try_get_one::<String>(s.key).ok().flatten()?.clone(),
            ))
        })
        .collect();
    let file = args.get_one::<String>("config").map(PathBuf::from);
    Config::load(
        &Inputs::of_process(file, flags),
        &Surroundings::of_process(),
    )
}

/// Prints to standard output. A reader that has gone away (`| head`) is no error.
pub(crate) fn print(text: &str) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => Err(e.into()),
        _ => Ok(()),
    }
}
