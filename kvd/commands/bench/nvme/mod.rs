//! `kvd bench nvme`: storing and loading through a store on a real file, against plain direct transfers on the same file system.
//!
//! Every figure stands beside its limit, measured in turns. Of several turns the best of each is shown, because neighbours only ever
//! slow things down; but a ratio is the median of those of single turns, in which the two follow each other: a disk that is faster
//! for a moment would be a limit that nothing else had. Depth is how many blocks the device is given at a time. A store gives it two operations for a block, its header
//! and its bytes, so it is given room for as many pairs; a header that is over early makes room for another block. The store is
//! asked for more, as a daemon's is, and a run is over when the last block is durable. Plain transfers are from and to the very memory
//! that blocks are stored from and loaded into, and in the very places of the store's file where blocks lie (plain writes while it is
//! empty): both find the same in whatever caches there are, and not all of a disk is equally fast. Each goes first in every other turn.
//!
//! Apart from that (`answered`): at most `depth` blocks asked for and not answered. A store is answered when block and record are
//! durable; the plain run beside it flushes after each `depth` blocks. Deliberately absent: sockets, and the core that decides.

mod lane;

use anyhow::Result;
use clap::{Arg, ArgMatches, Command};
use comfy_table::{Table, presets};
use kvd_arena::HugePages;
use kvd_nvme::io::{ArenaRange, RawReport, RawRun, raw};

use self::lane::Lane;
use super::median;
use super::scratch::Scratch;
use super::{Shape, progress};

/// Turns of each row.
const TURNS: usize = 9;
/// Blocks that a run moves are no more than this for each block of depth, so that small blocks at depth 1 end some day.
const BLOCKS_PER_DEPTH: u64 = 1600;
const DEPTHS: [usize; 5] = [1, 4, 16, 64, 256];

/// One row. The names are what `--json` prints; they are only ever added to.
#[derive(Debug, serde::Serialize)]
struct Row {
    /// Bytes of a block. Its header takes 4 KiB more, which are moved and not counted.
    block: u64,
    /// Of the pages of the memory that blocks are stored from and loaded into.
    page: u64,
    order: &'static str,
    depth: usize,
    /// Blocks of one run.
    blocks: u64,
    /// Plain transfers, 10^9 bytes a second; of writes with one flush at the end.
    raw_write_gbps: f64,
    raw_read_gbps: f64,
    /// The store's, checks included, flushes and records too.
    store_gbps: f64,
    load_gbps: f64,
    /// Medians of those of single turns.
    store_ratio: f64,
    load_ratio: f64,
    /// With no more than `depth` blocks asked for and not answered.
    answered_store_gbps: f64,
    answered_load_gbps: f64,
    /// Plain writes with a flush after each `depth` blocks: what a store promises when it answers; and the answered store's to it.
    raw_durable_gbps: f64,
    durable_ratio: f64,
    /// Seconds of CPU for 10^9 bytes that are stored and loaded again, and of the plain transfers for the same.
    cpu_s_per_gb: f64,
    raw_cpu_s_per_gb: f64,
}

/// Its flags.
pub(crate) fn command() -> Command {
    let text = |name, value| Arg::new(name).long(name).value_name(value);
    Command::new("nvme")
        .about("Stores and loads through an NVMe store, against plain transfers on the same file system")
        .arg(text("dir", "DIR").help("Where: a directory on the device; what is made there is removed afterwards [default: the system's for temporary files]"))
        .arg(text("bytes", "SIZE").default_value("512MiB").help("Most bytes that one run moves; a quarter more and 128 MiB are taken on the device"))
        .arg(text("block", "SIZE").help("Only blocks of this size: 2MiB, 1152KiB or 64KiB"))
        .arg(text("depth", "N").value_parser(clap::value_parser!(usize)).help("Only this depth: 1, 4, 16, 64 or, for the smallest blocks, 256"))
}

fn size(args: &ArgMatches, name: &str) -> Result<Option<u64>> {
    let Some(text) = args.get_one::<String>(name) else {
        return Ok(None);
    };
    let size: bytesize::ByteSize = text
        .parse()
        .map_err(|error| anyhow::anyhow!("--{name}: {error}; write it like 512MiB"))?;
    Ok(Some(size.as_u64()))
}

/// Measures and prints.
pub(crate) fn run(args: &ArgMatches) -> Result<()> {
    let bytes = size(args, "bytes")?.unwrap_or(512 << 20).max(64 << 20);
    let block = size(args, "block")?;
    let depth = args.get_one::<usize>("depth").copied();
    let directory = args.get_one::<String>("dir").map(Into::into);
    let scratch = Scratch::new(directory.as_ref(), "nvme")?;
    let mut rows = Vec::new();
    // 8 heads of 16 tokens, K and V of 128 numbers of 2 bytes; as many layers as make the size.
    for layers in [32, 18, 1] {
        let shape = Shape::new(layers, 8, 512);
        if block.is_none_or(|block| block == shape.part.bytes() as u64) {
            for pages in [HugePages::Off, HugePages::Require] {
                measure(&scratch, &shape, bytes, pages, depth, &mut rows)?;
            }
        }
    }
    if args.get_flag("json") {
        return crate::commands::print(&format!("{}\n", serde_json::to_string_pretty(&rows)?));
    }
    crate::commands::print(&render(&rows))
}

fn measure(
    scratch: &Scratch,
    shape: &Shape,
    bytes: u64,
    pages: HugePages,
    depth: Option<usize>,
    rows: &mut Vec<Row>,
) -> Result<()> {
    let block = shape.part.bytes() as u64;
    progress(&format!("blocks of {} KiB: taking space", block >> 10));
    let mut lane = match Lane::open(scratch.path(), shape, bytes, pages) {
        Err(error) if pages == HugePages::Require => {
            progress(&format!("no rows with pages of 2 MiB: {error:#}"));
            return Ok(());
        }
        lane => lane?,
    };
    let lane_depth = lane.depth();
    let most = lane.places().min(bytes / block);
    // Space that was never written is not what a device is like in use: all of it is written once.
    let run = |blocks: u64, depth, random, write, durable| RawRun {
        bytes: blocks * block,
        block: block as usize,
        depth,
        write,
        random,
        durable,
    };
    lane.store(most, lane_depth, false)?;
    lane.drop_all()?;
    let wanted = |d: &usize| *d <= lane_depth && depth.is_none_or(|one| one == *d);
    for depth in DEPTHS.into_iter().filter(wanted) {
        lane = lane.reopen(depth)?;
        for order in ["sequential", "random"] {
            let random = order == "random";
            let blocks = most.min(BLOCKS_PER_DEPTH * depth as u64);
            progress(&format!(
                "blocks of {} KiB, {order}, depth {depth}",
                block >> 10
            ));
            let mut best = [RawReport {
                gbps: 0.0,
                cpu_s_per_gb: f64::MAX,
            }; 7];
            let mut ratios = [[0.0; TURNS]; 3];
            for turn in 0..TURNS {
                let (from, into) = (lane.source(lane_depth)?, lane.target()?);
                // As an answered run does, which has no more under way.
                let less = lane.source(depth)?;
                let (own, offset) = (lane.file(), lane.offsets());
                let plain = |write, durable, memory: &ArenaRange| {
                    let run = run(blocks, depth, random, write, durable);
                    raw(&own, &run, memory, &offset)
                };
                let ahead = turn % 2 == 0;
                let durable = || plain(true, true, &less);
                let durable_first = ahead.then(durable).transpose()?;
                let answered = [lane.store(blocks, depth, random)?, lane.load(depth)?];
                lane.drop_all()?;
                let durable = durable_first.map_or_else(durable, Ok)?;
                let write = || plain(true, false, &from);
                let write_first = ahead.then(write).transpose()?;
                let store = lane.store(blocks, lane_depth, random)?;
                let read = || plain(false, false, &into);
                let read_first = ahead.then(read).transpose()?;
                let load = lane.load(lane_depth)?;
                let read = read_first.map_or_else(read, Ok)?;
                lane.drop_all()?;
                let write = write_first.map_or_else(write, Ok)?;
                for (ratio, (one, limit)) in
                    (ratios.iter_mut()).zip([(store, write), (load, read), (answered[0], durable)])
                {
                    ratio[turn] = one.gbps / limit.gbps;
                }
                let turn = [write, durable, read, store, load, answered[0], answered[1]];
                for (best, one) in best.iter_mut().zip(turn) {
                    best.gbps = best.gbps.max(one.gbps);
                    best.cpu_s_per_gb = best.cpu_s_per_gb.min(one.cpu_s_per_gb);
                }
            }
            let [
                raw_write,
                raw_durable,
                raw_read,
                store,
                load,
                answered,
                answered_load,
            ] = best;
            let [store_ratio, load_ratio, durable_ratio] =
                ratios.map(|mut ratios| median(&mut ratios));
            rows.push(Row {
                block,
                page: lane.page_bytes(),
                order,
                depth,
                blocks,
                raw_write_gbps: raw_write.gbps,
                raw_read_gbps: raw_read.gbps,
                answered_store_gbps: answered.gbps,
                answered_load_gbps: answered_load.gbps,
                raw_durable_gbps: raw_durable.gbps,
                store_gbps: store.gbps,
                load_gbps: load.gbps,
                store_ratio,
                load_ratio,
                durable_ratio,
                cpu_s_per_gb: store.cpu_s_per_gb + load.cpu_s_per_gb,
                raw_cpu_s_per_gb: raw_write.cpu_s_per_gb + raw_read.cpu_s_per_gb,
            });
        }
    }
    lane.report();
    Ok(())
}

fn render(rows: &[Row]) -> String {
    let mut table = Table::new();
    table.load_preset(presets::ASCII_MARKDOWN);
    table.set_header([
        "block",
        "page",
        "order",
        "depth",
        "raw write",
        "store",
        "ratio",
        "raw read",
        "load",
        "ratio",
        "raw durable",
        "answered",
        "ratio",
        "load",
        "CPU s/GB",
        "raw CPU",
    ]);
    for row in rows {
        let number = |value: f64| format!("{value:.2}");
        table.add_row([
            format!("{} KiB", row.block >> 10),
            format!("{} KiB", row.page >> 10),
            row.order.to_owned(),
            row.depth.to_string(),
            number(row.raw_write_gbps),
            number(row.store_gbps),
            number(row.store_ratio),
            number(row.raw_read_gbps),
            number(row.load_gbps),
            number(row.load_ratio),
            number(row.raw_durable_gbps),
            number(row.answered_store_gbps),
            number(row.durable_ratio),
            number(row.answered_load_gbps),
            number(row.cpu_s_per_gb),
            number(row.raw_cpu_s_per_gb),
        ]);
    }
    format!(
        "{table}\nBest of {TURNS} turns, 10^9 bytes a second of payload, and the median of their ratios; each block carries a header of 4 KiB, which is not counted.\n"
    )
}
