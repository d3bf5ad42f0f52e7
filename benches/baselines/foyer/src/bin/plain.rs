//! What the device gives without any store, as one line of JSON: the limit of the same run for baselines that are not written in Rust.
//! Deliberately absent: a loop of its own; it is the one that `kvd bench nvme` prints ratios against.

use std::io::Write;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{Arg, Command, value_parser};
use kvd_nvme::io::{RawRun, raw, raw_memory};

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
            bytes: of("bytes")?,
            block: of("block")? as usize,
            depth: of("depth")? as usize,
            write,
            random: false,
            durable: false,
        })
    };
    let block = of("block")?;
    let (size, depth) = (usize::try_from(block)?, usize::try_from(of("depth")?)?);
    let memory = raw_memory(size, depth)?;
    let plain = |run: RawRun| raw(file, &run, &memory, &|number| number * block);
    let (write, read) = (plain(run(true)?)?, plain(run(false)?)?);
    let line = serde_json::json!({
        "write_gbps": write.gbps,
        "read_gbps": read.gbps,
        "cpu_s_per_gb": write.cpu_s_per_gb + read.cpu_s_per_gb,
    });
    writeln!(std::io::stdout(), "{line}")?;
    Ok(())
}
