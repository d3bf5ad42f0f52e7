//! `kvd sim`: hands over to `kvd-sim`, the simulator, which is a program of its own so that nothing of it is in the daemon.
//! Deliberately absent: its flags; `kvd sim --help` shows them.

use std::ffi::OsString;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::process::ExitCode;

use clap::{Arg, ArgAction, ArgMatches, Command, value_parser};

const PROGRAM: &str = "kvd-sim";

pub(crate) fn command() -> Command {
    Command::new("sim")
        .about("For developers: simulates nodes, engines and disks that fail, from seeds (runs kvd-sim)")
        .disable_help_flag(true)
        .arg(
            Arg::new("arguments")
                .action(ArgAction::Append)
                .trailing_var_arg(true)
                .allow_hyphen_values(true)
                .value_parser(value_parser!(OsString)),
        )
}

/// Becomes the simulator that lies beside this program. Comes back only if there is none.
pub(crate) fn run(args: &ArgMatches) -> ExitCode {
    let beside = std::env::current_exe().map(|own| own.with_file_name(PROGRAM));
    let error = match beside {
        Ok(program) => {
            let arguments = args.get_many::<OsString>("arguments").unwrap_or_default();
            let error = std::process::Command::new(&program).args(arguments).exec();
            format!("{}: {error}", program.display())
        }
        Err(error) => format!("where this program lies is not known: {error}"),
    };
    let _ = writeln!(
        std::io::stderr(),
        "error: {error}; build it with `cargo build --release -p {PROGRAM}`, it must lie beside kvd"
    );
    ExitCode::from(2)
}
