//! `kvd bench restart`: how soon a daemon serves again what a full store holds, and what memory that takes.
//!
//! The store is made by the store's own code, with journal and checkpoints as they would be; only the blocks' bytes are never
//! written, because a start does not read them. Deliberately absent: a cold page cache; the store goes past it anyway.

mod hollow;

use std::path::Path;

use anyhow::{Result, ensure};
use clap::{Arg, ArgMatches, Command};
use kvd_wire::session::Where;

use super::daemon::{Daemon, MIB};
use super::lookups::found;
use super::scratch::Scratch;
use super::{Random, Shape, median, progress};

/// The daemon's host memory.
const CAPACITY: u64 = 64 * MIB;
/// Starts that are measured.
const STARTS: usize = 5;
/// Blocks that are looked up, so many at a time.
const SAMPLE: usize = 20_000;
const AT_A_TIME: usize = 1_000;
/// Blocks of one prompt.
const CHAIN: u64 = 64;

/// What was measured. The names are what `--json` prints; they are only ever added to.
#[derive(Debug, Default, serde::Serialize)]
struct Results {
    /// Blocks that the store holds.
    blocks: u64,
    /// From starting the process to being ready, seconds: the one in the middle of several starts, and the slowest.
    restart_s: f64,
    restart_slowest_s: f64,
    /// Seconds of CPU that the daemon had taken by then: how long it would take with nothing else on the machine, or less.
    restart_cpu_s: f64,
    /// From starting the process to being ready without a store.
    bare_s: f64,
    /// Of the last start, opening the store and telling what it holds.
    open_s: f64,
    /// Memory beside the pool, 2^20 bytes: what the store takes, and the daemon with it and without.
    restart_rss_mb: f64,
    with_store_rss_mb: f64,
    without_store_rss_mb: f64,
    /// The most that the daemon with the store ever had.
    peak_rss_mb: f64,
    /// Blocks that were looked up, and found on NVMe.
    looked_up: u64,
    found: u64,
}

/// Its flags.
pub(crate) fn command() -> Command {
    Command::new("restart")
        .about("Starts a daemon on a store with many blocks, and looks some of them up")
        .arg(
            Arg::new("blocks")
                .long("blocks")
                .value_name("N")
                .default_value("1000000")
                .value_parser(clap::value_parser!(u64).range(1_000..=16_000_000))
                .help("How many; each takes 8 KiB of the file"),
        )
        .arg(
            Arg::new("dir").long("dir").value_name("DIR").help(
                "Where: a directory on the device [default: the system's for temporary files]",
            ),
        )
}

/// Measures and prints.
pub(crate) fn run(args: &ArgMatches) -> Result<()> {
    let blocks = args.get_one::<u64>("blocks").copied().unwrap_or(1_000_000);
    let directory = args.get_one::<String>("dir").map(Into::into);
    let scratch = Scratch::new(directory.as_ref(), "restart")?;
    let shape = Shape::new(1, 1, 256);
    progress(&format!("making a store of {blocks} blocks"));
    let capacity = hollow::make(scratch.path(), &shape, blocks, hash, CHAIN)?;
    let mut results = Results {
        blocks,
        ..Results::default()
    };
    progress("starting");
    let daemon = Daemon::start(CAPACITY)?;
    results.bare_s = daemon.ready_after.as_secs_f64();
    results.without_store_rss_mb = daemon.rss_mb()?;
    drop(daemon);
    let (mut times, mut cpu) = (Vec::new(), Vec::new());
    for start in 1..=STARTS {
        let daemon = start_on(scratch.path(), capacity)?;
        times.push(daemon.ready_after.as_secs_f64());
        cpu.push(daemon.cpu_s()?);
        if start == STARTS {
            look(&daemon, &shape, &mut results)?;
        }
    }
    results.restart_s = median(&mut times);
    results.restart_cpu_s = median(&mut cpu);
    results.restart_slowest_s = times.last().copied().unwrap_or_default();
    results.restart_rss_mb = results.with_store_rss_mb - results.without_store_rss_mb;
    if args.get_flag("json") {
        return crate::commands::print(&format!("{}\n", serde_json::to_string_pretty(&results)?));
    }
    crate::commands::print(&super::render(&results)?)
}

fn start_on(store: &Path, capacity: u64) -> Result<Daemon> {
    let flags = [
        "--nvme".to_owned(),
        store.display().to_string(),
        "--nvme-capacity".to_owned(),
        format!("{}MiB", capacity / MIB),
    ];
    Daemon::start_with(CAPACITY, &flags)
}

/// The hash of a block.
fn hash(number: u64) -> [u8; 32] {
    Random(number).hash()
}

/// What the daemon that has just started takes and knows.
fn look(daemon: &Daemon, shape: &Shape, results: &mut Results) -> Result<()> {
    results.with_store_rss_mb = daemon.rss_mb()?;
    results.peak_rss_mb = daemon.peak_mb()?;
    let status = daemon.status()?;
    results.open_s = status.stores.first().map_or(0.0, |store| store.open_s);
    progress("looking up");
    let (mut session, namespace) = shape.open(daemon)?;
    let mut random = Random(5);
    for _ in 0..SAMPLE / AT_A_TIME {
        let mut packed = Vec::with_capacity(32 * AT_A_TIME);
        for _ in 0..AT_A_TIME {
            packed.extend_from_slice(&hash(random.next() % results.blocks));
        }
        let chain = kvd_client::ChainRef {
            group: 0,
            hashes: &packed,
            parent: None,
        };
        let reply = session.lookup(namespace, &[chain], 0, false)?;
        results.found += found(&reply, Where::Nvme);
        results.looked_up += AT_A_TIME as u64;
    }
    session.close()?;
    ensure!(
        results.found == results.looked_up,
        "only {} of {} blocks were found",
        results.found,
        results.looked_up
    );
    Ok(())
}
