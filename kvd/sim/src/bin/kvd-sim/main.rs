//! `kvd-sim`: the simulator as a command, for one seed or for fresh seeds until a time is over. For developers; nothing that ships needs it.
//!
//! Exit codes: 0 every invariant held, 1 one did not, or nothing could be run, 2 it was asked wrongly. Deliberately absent: what is
//! simulated and checked, which is the library's.
#![forbid(unsafe_code)]

mod flags;
mod fresh;
mod one;
mod show;

use std::io::{IsTerminal, Write};
use std::process::ExitCode;

use flags::Wanted;
use kvd_sim::fresh_seed;

fn main() -> ExitCode {
    let wanted = match flags::wanted(&flags::command().get_matches()) {
        Ok(wanted) => wanted,
        Err(error) => error.exit(),
    };
    let done = match wanted.many {
        Some(_) => fresh_seeds(&wanted),
        None => one_seed(&wanted),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            say(&format!("error: {error}\n"));
            ExitCode::from(1)
        }
    }
}

/// Whether all held.
fn one_seed(wanted: &Wanted) -> std::io::Result<bool> {
    let run = wanted.run(wanted.first.unwrap_or_default(), 0);
    let result = run.go();
    let broken = result.as_ref().err().map(|broken| one::smallest(broken));
    print(&show::one(
        &run,
        result.as_ref().ok(),
        broken.as_ref(),
        wanted.json,
    ))?;
    Ok(broken.is_none())
}

/// Whether all held.
fn fresh_seeds(wanted: &Wanted) -> std::io::Result<bool> {
    let first = wanted.first.unwrap_or_else(fresh_seed);
    let start = show::start(wanted, first);
    match wanted.json {
        true => say(&start),
        false => print(&start)?,
    }
    let terminal = std::io::stderr().is_terminal();
    let sum = fresh::run(wanted, first, &mut |sum| {
        if terminal {
            say(&show::progress(sum));
        }
    })?;
    if terminal {
        say("\r\x1b[K");
    }
    let broken = sum.broken.first().map(one::smallest);
    print(&show::sum(&sum, broken.as_ref(), wanted.json))?;
    Ok(broken.is_none())
}

/// Prints to standard output. A reader that has gone away (`| head`) is no error.
fn print(text: &str) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error),
        _ => Ok(()),
    }
}

/// Prints to standard error. Nothing can be done when that is closed.
fn say(text: &str) {
    let _ = std::io::stderr().write_all(text.as_bytes());
}
