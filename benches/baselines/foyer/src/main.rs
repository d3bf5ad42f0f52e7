//! foyer's disk tier, as it is tuned for blocks of this size, beside `kvd bench nvme`: the same blocks, orders and depths against the same
//! plain direct transfers, so that the two tables can be laid side by side.
//!
//! Of several turns the best of each counts. The plain runs come before foyer is opened, because the thread of its ring never sleeps.
//! Deliberately absent: foyer's memory half, eviction, compression.

mod disk;

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use clap::{Arg, ArgAction, ArgMatches, Command};
use comfy_table::{Table, presets};
use kvd_nvme::io::{RawReport, RawRun, raw, raw_memory};

use self::disk::{Disk, Engine, Plan, take_space};

/// Turns of each row.
const TURNS: usize = 5;
/// Blocks that a run moves are no more than this for each block of depth, so that small blocks at depth 1 end some day.
const BLOCKS_PER_DEPTH: u64 = 400;
const BLOCKS: [u64; 3] = [2 << 20, 1152 << 10, 64 << 10];
const DEPTHS: [usize; 3] = [1, 4, 16];

/// One row, named as those of `kvd bench nvme --json` are.
#[derive(Debug, serde::Serialize)]
struct Row {
    engine: &'static str,
    /// Bytes of a block. foyer writes a page more for each.
    block: u64,
    /// Of the plain transfers and of loads; foyer appends what it stores.
    order: &'static str,
    depth: usize,
    /// Blocks of one run.
    blocks: u64,
    /// Plain transfers, 10^9 bytes a second.
    raw_write_gbps: f64,
    raw_read_gbps: f64,
    store_gbps: f64,
    load_gbps: f64,
    store_ratio: f64,
    load_ratio: f64,
    /// Seconds of CPU for 10^9 bytes that are stored and loaded again, and of the plain transfers for the same.
    cpu_s_per_gb: f64,
    raw_cpu_s_per_gb: f64,
}

fn command() -> Command {
    let text = |name, value| Arg::new(name).long(name).value_name(value);
    Command::new("kvd-baseline-foyer")
        .about("foyer's disk tier under the load of `kvd bench nvme`")
        .arg(text("dir", "DIR").help("Where: a directory on the device; what is made there is removed afterwards [default: the system's for temporary files]"))
        .arg(text("bytes", "SIZE").default_value("512MiB").help("Most bytes that one run moves; about four times as many are taken on the device"))
        .arg(text("block", "SIZE").help("Only blocks of this size: 2MiB, 1152KiB or 64KiB"))
        .arg(text("depth", "N").value_parser(clap::value_parser!(usize)).help("Only this depth: 1, 4 or 16"))
        .arg(text("engine", "NAME").value_parser(["io_uring", "psync"]).help("Only with foyer talking to the kernel like this"))
        .arg(Arg::new("json").long("json").action(ArgAction::SetTrue).help("Print JSON"))
}

fn size(args: &ArgMatches, name: &str) -> Result<Option<u64>> {
    let Some(text) = args.get_one::<String>(name) else {
        return Ok(None);
    };
    let size: bytesize::ByteSize = text
        .parse()
        .map_err(|error| anyhow!("--{name}: {error}; write it like 512MiB"))?;
    Ok(Some(size.as_u64()))
}

fn progress(what: &str) {
    let _ = writeln!(std::io::stderr(), "foyer: {what}");
}

fn main() -> Result<()> {
    let args = command().get_matches();
    let bytes = size(&args, "bytes")?.unwrap_or(512 << 20).max(64 << 20);
    let only = size(&args, "block")?;
    let depth = args.get_one::<usize>("depth").copied();
    let engine = args.get_one::<String>("engine").map(String::as_str);
    let wanted = |e: &Engine| engine.is_none_or(|one| one == e.name());
    let parent = args
        .get_one::<String>("dir")
        .map_or_else(std::env::temp_dir, PathBuf::from);
    let scratch = tempfile::Builder::new()
        .prefix("kvd-bench-foyer-")
        .tempdir_in(&parent)
        .with_context(|| format!("cannot make a directory in {}", parent.display()))?;
    let mut rows = Vec::new();
    for engine in [Engine::IoUring, Engine::Psync].into_iter().filter(wanted) {
        for block in BLOCKS {
            if only.is_none_or(|one| one == block) {
                measure(scratch.path(), engine, block, bytes, depth, &mut rows)?;
            }
        }
    }
    let text = if args.get_flag("json") {
        serde_json::to_string_pretty(&rows)? + "\n"
    } else {
        render(&rows)
    };
    std::io::stdout().write_all(text.as_bytes())?;
    Ok(())
}

fn measure(
    scratch: &Path,
    engine: Engine,
    block: u64,
    bytes: u64,
    only: Option<usize>,
    rows: &mut Vec<Row>,
) -> Result<()> {
    let what = format!("{}, blocks of {} KiB", engine.name(), block >> 10);
    progress(&format!("{what}: taking space"));
    let file = scratch.join("raw");
    let directory = scratch.join(format!("blocks-{block}"));
    let most = bytes / block;
    let plan = |blocks, depth| Plan {
        engine,
        block,
        blocks,
        depth,
    };
    let run = |blocks: u64, depth, random, write| RawRun {
        bytes: blocks * block,
        block: block as usize,
        depth,
        write,
        random,
        durable: false,
    };
    let plain = |run: RawRun| {
        let memory = raw_memory(run.block, run.depth)?;
        raw(&file, &run, &memory, &|number| number * block)
    };
    plain(run(most, 16, false, true))?;
    take_space(&directory, plan(most, DEPTHS[DEPTHS.len() - 1]))?;
    for order in ["sequential", "random"] {
        let wanted = |d: &usize| only.is_none_or(|one| one == *d);
        for depth in DEPTHS.into_iter().filter(wanted) {
            let random = order == "random";
            let blocks = most.min(BLOCKS_PER_DEPTH * depth as u64);
            progress(&format!("{what}, {order}, depth {depth}"));
            let mut best = [RawReport {
                gbps: 0.0,
                cpu_s_per_gb: f64::MAX,
            }; 4];
            for _ in 0..TURNS {
                let raw_write = plain(run(blocks, depth, random, true))?;
                let raw_read = plain(run(blocks, depth, random, false))?;
                let mut disk = Disk::open(&directory, plan(blocks, depth))?;
                disk.warm_up()?;
                let turn = [raw_write, raw_read, disk.store(blocks)?, disk.load(random)?];
                for (best, one) in best.iter_mut().zip(turn) {
                    best.gbps = best.gbps.max(one.gbps);
                    best.cpu_s_per_gb = best.cpu_s_per_gb.min(one.cpu_s_per_gb);
                }
            }
            let [raw_write, raw_read, store, load] = best;
            rows.push(Row {
                engine: engine.name(),
                block,
                order,
                depth,
                blocks,
                raw_write_gbps: raw_write.gbps,
                raw_read_gbps: raw_read.gbps,
                store_gbps: store.gbps,
                load_gbps: load.gbps,
                store_ratio: store.gbps / raw_write.gbps,
                load_ratio: load.gbps / raw_read.gbps,
                cpu_s_per_gb: store.cpu_s_per_gb + load.cpu_s_per_gb,
                raw_cpu_s_per_gb: raw_write.cpu_s_per_gb + raw_read.cpu_s_per_gb,
            });
        }
    }
    std::fs::remove_dir_all(&directory)?;
    Ok(())
}

fn render(rows: &[Row]) -> String {
    let mut table = Table::new();
    table.load_preset(presets::ASCII_MARKDOWN);
    table.set_header([
        "engine",
        "block",
        "order",
        "depth",
        "raw write",
        "store",
        "ratio",
        "raw read",
        "load",
        "ratio",
        "CPU s/GB",
        "raw CPU",
    ]);
    for row in rows {
        let number = |value: f64| format!("{value:.2}");
        table.add_row([
            row.engine.to_owned(),
            format!("{} KiB", row.block >> 10),
            row.order.to_owned(),
            row.depth.to_string(),
            number(row.raw_write_gbps),
            number(row.store_gbps),
            number(row.store_ratio),
            number(row.raw_read_gbps),
            number(row.load_gbps),
            number(row.load_ratio),
            number(row.cpu_s_per_gb),
            number(row.raw_cpu_s_per_gb),
        ]);
    }
    format!(
        "{table}\nBest of {TURNS} turns, 10^9 bytes a second of payload; foyer writes a page more for each block, which is not counted.\n"
    )
}
