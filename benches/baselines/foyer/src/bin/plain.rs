//! What the device gives without any store, as one line of JSON: the limit of the same run for baselines that are not written in Rust.
//! Deliberately absent: a loop of its own; it is the one that `kvd bench nvme` prints ratios against.

use std::io::Write;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{Arg, Command, value_parser};
use kvd_nvme::io::{RawRun, raw};

fn main() -> Result<()> {
    let number = |name| {
        Arg::new(name)
            .long(name)
            .required(true)
            .value_parser(value_parser!(u64))
    };
    let args = Command::new("plain")
        .about("Plain direct transfers of a file's blocks, written and read once")
        .arg(
            Arg::new("file")
                .long("file")
                .required(true)
                .value_parser(value_parser!(PathBuf)),
        )
        .arg(number("bytes"))
        .arg(number("block"))
        .arg(number("depth"))
        .get_matches();
    let of = |name: &str| args.get_one::<u64>(name).copied().context("a number");
    let file = args.get_one::<PathBuf>("file").context("a file")?;
    let run = |write| -> Result<RawRun> {
        Ok(RawRun {
            memory: 0,
            huge: false,
            bytes: of("bytes")?,
            block: of("block")? as usize,
            depth: of("depth")? as usize,
            write,
            random: false,
            durable: false,
        })
    };
    let write = raw(file, &run(true)?)?;
    let read = raw(file, &run(false)?)?;
    let line = serde_json::json!({
        "write_gbps": write.gbps,
        "read_gbps": read.gbps,
        "cpu_s_per_gb": write.cpu_s_per_gb + read.cpu_s_per_gb,
    });
    writeln!(std::io::stdout(), "{line}")?;
    Ok(())
}
