//! The `kvd` binary: arguments, then configuration, then a command. What commands do is in `commands`; no logic here.

mod commands;
mod config;

use std::process::ExitCode;

fn main() -> ExitCode {
    commands::main()
}
