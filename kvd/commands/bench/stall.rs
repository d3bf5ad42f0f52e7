//! `kvd bench stall`: what a device that hangs costs those who store to host memory and look up there.
//!
//! Rounds of three kinds take turns, so that noise hits all alike: the device takes what is written; it hangs (told by
//! `--nvme-faults`); there is no device at all, in a daemon of its own. A round in which the device should hang counts only if the
//! daemon's own counts show that blocks were taken for the device, that none came back before it was let go, that all did
//! afterwards, and that others were dropped meanwhile; else the bench fails. Deliberately absent: loads of what only
//! the device has; they end by their deadline, which is tested (`tests/nvme/faults.rs`) and not measured.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::{Arg, ArgMatches, Command};
use comfy_table::{Table, presets};
use kvd_client::{BlockMover, ChainRef, Session};
use kvd_device::{HostDevice, OwnedPages};

use super::copies::store;
use super::daemon::{Daemon, GIB, MIB};
use super::lookups::lookup;
use super::scratch::Scratch;
use super::{Random, Shape, progress, quantile};

/// Host memory of each daemon: the blocks that are looked up, as many as may hang (half of it), and some more.
const CAPACITY: u64 = 768 * MIB;
/// Size of the store: full after about half of the usual rounds. Until then what hangs is limited by the queue, then by the places
/// that are kept free.
const STORE: u64 = 8 * GIB;
/// Blocks that are looked up.
const HOT: u32 = 128;
/// Blocks stored in a round: more than may hang, so that the last ones are dropped.
const STORES: usize = 256;
/// Lookups after each of them.
const LOOKUPS: usize = 4;
/// Rounds of each kind that are not measured: they touch all memory, and fill host memory with blocks that must go.
const WARM: usize = 2;
/// Blocks that bytes are copied from, in turn.
const SOURCE: u32 = 32;
/// How long the device may take for what was written in a round.
const PATIENCE: Duration = Duration::from_secs(60);

/// What was measured. The names are what `--json` prints; they are only ever added to.
#[derive(Debug, Default, serde::Serialize)]
struct Results {
    /// Blocks of 2 MiB that were stored in each kind of round, one at a time, and lookups of 128 blocks in host memory.
    stores: u64,
    lookups: u64,
    /// Reserving, copying and committing one block, microseconds, while the device takes what is written.
    healthy_store_us_p50: f64,
    healthy_store_us_p99: f64,
    healthy_lookup_us_p50: f64,
    healthy_lookup_us_p99: f64,
    /// The same while it hangs.
    stalled_store_us_p50: f64,
    stalled_store_us_p99: f64,
    stalled_lookup_us_p50: f64,
    stalled_lookup_us_p99: f64,
    /// The same in a daemon without a store.
    bare_store_us_p50: f64,
    bare_store_us_p99: f64,
    bare_lookup_us_p50: f64,
    bare_lookup_us_p99: f64,
    /// Stalled against healthy.
    store_p50_ratio: f64,
    store_p99_ratio: f64,
    lookup_p50_ratio: f64,
    lookup_p99_ratio: f64,
    /// Stalled against a daemon without a store.
    store_p50_ratio_bare: f64,
    store_p99_ratio_bare: f64,
    lookup_p50_ratio_bare: f64,
    lookup_p99_ratio_bare: f64,
    /// Of the blocks of all stalled rounds: those whose writes hung until the device was let go, those that were dropped because too
    /// much was being written already, and those because no place was free.
    hung: u64,
    dropped_queue_full: u64,
    dropped_no_place: u64,
    /// Blocks that healthy rounds dropped because the device was slower than the stores.
    healthy_dropped: u64,
    /// Seconds of CPU that the daemon took in the healthy, the stalled and the bare rounds.
    healthy_cpu_s: f64,
    stalled_cpu_s: f64,
    bare_cpu_s: f64,
}

/// Its flags.
pub(crate) fn command() -> Command {
    Command::new("stall")
        .about("Stores and looks up while the NVMe device hangs, against the same while it does not")
        .arg(Arg::new("dir").long("dir").value_name("DIR").help(
            "Where: a directory on the device; what is made there is removed afterwards [default: the system's for temporary files]",
        ))
        .arg(
            Arg::new("rounds")
                .long("rounds")
                .value_name("N")
                .default_value("20")
                .value_parser(clap::value_parser!(u64).range(1..=1_000))
                .help("How many of each kind; each stores half a GiB"),
        )
}

/// Measures and prints.
pub(crate) fn run(args: &ArgMatches) -> Result<()> {
    let rounds = args.get_one::<u64>("rounds").copied().unwrap_or(20) as usize;
    let directory = args.get_one::<String>("dir").map(Into::into);
    let scratch = Scratch::new(directory.as_ref(), "stall")?;
    let results = Bench::new(&scratch)?.measure(rounds)?;
    if args.get_flag("json") {
        return crate::commands::print(&format!("{}\n", serde_json::to_string_pretty(&results)?));
    }
    crate::commands::print(&render(&results))
}

/// A daemon, and who stores and looks up there.
struct Lane {
    daemon: Daemon,
    session: Session,
    namespace: u32,
    mover: BlockMover,
    hot: Vec<u8>,
    /// Blocks that were stored so far.
    stored: u64,
}

/// Microseconds of each store and lookup, and seconds of CPU, of one kind of round.
#[derive(Default)]
struct Times {
    stores: Vec<f64>,
    lookups: Vec<f64>,
    cpu: f64,
}

/// p50 and p99.
type Pair = (f64, f64);

impl Times {
    fn quantiles(&mut self) -> (Pair, Pair) {
        let pair = |all: &mut Vec<f64>| (quantile(all, 0.5), quantile(all, 0.99));
        (pair(&mut self.stores), pair(&mut self.lookups))
    }
}

struct Bench {
    /// With a store, and without.
    tiered: Lane,
    bare: Lane,
    source: OwnedPages,
    /// The file that says how the device fails.
    faults: PathBuf,
    random: Random,
}

/// What the daemon says of its blocks on their way to the device.
struct Seen {
    offloaded: u64,
    dropped: u64,
    /// Of those.
    queue_full: u64,
    no_place: u64,
    /// Neither yet.
    under_way: u64,
    on: bool,
    /// Times that the store was switched off because an operation hung for too long.
    stalls: u64,
}

impl Bench {
    fn new(scratch: &Scratch) -> Result<Self> {
        progress("starting a daemon with a store, and one without");
        // 32 layers, 8 heads of 16 tokens, K and V of 128 numbers of 2 bytes: 2 MiB.
        let shape = Shape::new(32, 8, 512);
        let faults = scratch.path().join("faults");
        let flags = [
            "--nvme".to_owned(),
            scratch.path().join("store").display().to_string(),
            "--nvme-capacity".to_owned(),
            format!("{}MiB", STORE / MIB),
            "--nvme-faults".to_owned(),
            faults.display().to_string(),
        ];
        let mut source = OwnedPages::new(shape.part, SOURCE)?;
        for block in 0..SOURCE {
            source.fill(block, |at| (at % 251) as u8 ^ block as u8);
        }
        let mut bench = Bench {
            tiered: Lane::new(Daemon::start_with(CAPACITY, &flags)?, &shape)?,
            bare: Lane::new(Daemon::start(CAPACITY)?, &shape)?,
            source,
            faults,
            random: Random(17),
        };
        let hot: Vec<_> = (0..HOT).map(|_| bench.random.hash()).collect();
        let mut unmeasured = Times::default();
        for lane in [&mut bench.tiered, &mut bench.bare] {
            lane.store_chain(&hot, &bench.source, &mut unmeasured)?;
            lane.hot = hot.as_flattened().to_vec();
        }
        Ok(bench)
    }

    fn measure(mut self, rounds: usize) -> Result<Results> {
        let (mut healthy, mut stalled, mut bare) =
            (Times::default(), Times::default(), Times::default());
        let mut results = Results::default();
        for round in 0..WARM + rounds {
            if round == WARM {
                progress(&format!("{rounds} rounds of each kind"));
                (healthy, stalled, bare) = Default::default();
                results = Results::default();
            }
            // Each kind comes after each other kind.
            for turn in 0..3 {
                match if round % 2 == 0 { turn } else { 2 - turn } {
                    0 => results.healthy_dropped += self.healthy(&mut healthy)?,
                    1 => self.stalled(&mut stalled, &mut results)?,
                    _ => self.bare.round(&mut self.random, &self.source, &mut bare)?,
                }
            }
        }
        results.fill(&mut healthy, &mut stalled, &mut bare);
        self.tiered.session.close()?;
        self.bare.session.close()?;
        Ok(results)
    }

    /// A round while the device takes what is written. How many blocks were not.
    fn healthy(&mut self, times: &mut Times) -> Result<u64> {
        let before = self.settled()?;
        self.tiered.round(&mut self.random, &self.source, times)?;
        let after = self.settled()?;
        ensure!(
            after.on && after.stalls == before.stalls,
            "the device hung without being told to; run this on a device that answers within 5 seconds"
        );
        Ok(after.dropped - before.dropped)
    }

    /// A round while the device hangs.
    fn stalled(&mut self, times: &mut Times, results: &mut Results) -> Result<()> {
        let before = self.settled()?;
        self.rule("all stall")?;
        let round = self.tiered.round(&mut self.random, &self.source, times);
        let during = self.tiered.seen();
        self.rule("")?;
        round?;
        let during = during?;
        let hung = during.under_way;
        let dropped = during.dropped - before.dropped;
        ensure!(
            during.on && during.stalls == before.stalls,
            "the store was given up during a round, which must take less than 5 seconds; run this on a machine with less to do"
        );
        ensure!(
            during.offloaded == before.offloaded && hung > 0 && dropped > 0,
            "the device did not hang as told: {} blocks were written meanwhile, {hung} hung, {dropped} were dropped",
            during.offloaded - before.offloaded
        );
        let after = self.settled()?;
        ensure!(
            after.offloaded == before.offloaded + hung,
            "{hung} blocks hung, and {} were written once the device was let go",
            after.offloaded - before.offloaded
        );
        results.hung += hung;
        results.dropped_queue_full += during.queue_full - before.queue_full;
        results.dropped_no_place += during.no_place - before.no_place;
        Ok(())
    }

    /// From now on the device does so.
    fn rule(&self, rules: &str) -> Result<()> {
        let next = self.faults.with_extension("next");
        std::fs::write(&next, rules)?;
        std::fs::rename(&next, &self.faults)?;
        Ok(())
    }

    /// Waits until no block is on its way to the device.
    fn settled(&self) -> Result<Seen> {
        let begun = Instant::now();
        while begun.elapsed() < PATIENCE {
            let seen = self.tiered.seen()?;
            if seen.under_way == 0 {
                return Ok(seen);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        bail!("the device has not taken in {PATIENCE:?} what was written; use a faster one")
    }
}

impl Lane {
    fn new(daemon: Daemon, shape: &Shape) -> Result<Self> {
        let (session, namespace) = shape.open(&daemon)?;
        daemon.wait_until_faulted()?;
        Ok(Lane {
            daemon,
            session,
            namespace,
            mover: BlockMover::new(Arc::new(HostDevice), shape.mover())?,
            hot: Vec::new(),
            stored: 0,
        })
    }

    /// One round: blocks of a new chain one at a time, and lookups in between.
    fn round(&mut self, random: &mut Random, source: &OwnedPages, times: &mut Times) -> Result<()> {
        let chain: Vec<_> = (0..STORES).map(|_| random.hash()).collect();
        let cpu = self.daemon.cpu_s()?;
        self.store_chain(&chain, source, times)?;
        times.cpu += self.daemon.cpu_s()? - cpu;
        Ok(())
    }

    fn store_chain(
        &mut self,
        chain: &[[u8; 32]],
        source: &OwnedPages,
        times: &mut Times,
    ) -> Result<()> {
        for (at, hash) in chain.iter().enumerate() {
            let page = at as u32 % SOURCE;
            let link = ChainRef {
                group: 0,
                hashes: hash,
                parent: at.checked_sub(1).map(|before| &chain[before]),
            };
            let from = (source, page..page + 1);
            let begun = Instant::now();
            store(
                &mut self.mover,
                &mut self.session,
                self.namespace,
                link,
                from,
            )?;
            times.stores.push(begun.elapsed().as_secs_f64() * 1e6);
            self.stored += 1;
            if self.hot.is_empty() {
                continue;
            }
            for _ in 0..LOOKUPS {
                let us = lookup(&mut self.session, self.namespace, &self.hot)?;
                times.lookups.push(us);
            }
        }
        Ok(())
    }

    fn seen(&self) -> Result<Seen> {
        let status = self.daemon.status()?;
        let store = status.stores.first().context("the daemon has no store")?;
        let tier = |name: &str| status.tier.counts.get(name).copied().unwrap_or(0);
        let over = ["queue_full", "budget", "no_place", "off", "failed"];
        let dropped = over.iter().map(|why| tier(&format!("offload_{why}"))).sum();
        let offloaded = tier("offloaded");
        Ok(Seen {
            offloaded,
            dropped,
            queue_full: tier("offload_queue_full"),
            no_place: tier("offload_no_place"),
            under_way: self.stored - offloaded - dropped,
            on: store.state == "on",
            stalls: store.counts.get("stalls").copied().unwrap_or(0),
        })
    }
}

impl Results {
    fn fill(&mut self, healthy: &mut Times, stalled: &mut Times, bare: &mut Times) {
        self.stores = stalled.stores.len() as u64;
        self.lookups = stalled.lookups.len() as u64;
        (self.healthy_cpu_s, self.stalled_cpu_s, self.bare_cpu_s) =
            (healthy.cpu, stalled.cpu, bare.cpu);
        let (h_store, h_lookup) = healthy.quantiles();
        let (s_store, s_lookup) = stalled.quantiles();
        let (b_store, b_lookup) = bare.quantiles();
        (self.healthy_store_us_p50, self.healthy_store_us_p99) = h_store;
        (self.healthy_lookup_us_p50, self.healthy_lookup_us_p99) = h_lookup;
        (self.stalled_store_us_p50, self.stalled_store_us_p99) = s_store;
        (self.stalled_lookup_us_p50, self.stalled_lookup_us_p99) = s_lookup;
        (self.bare_store_us_p50, self.bare_store_us_p99) = b_store;
        (self.bare_lookup_us_p50, self.bare_lookup_us_p99) = b_lookup;
        let ratio = |a: Pair, b: Pair| (a.0 / b.0, a.1 / b.1);
        (self.store_p50_ratio, self.store_p99_ratio) = ratio(s_store, h_store);
        (self.lookup_p50_ratio, self.lookup_p99_ratio) = ratio(s_lookup, h_lookup);
        (self.store_p50_ratio_bare, self.store_p99_ratio_bare) = ratio(s_store, b_store);
        (self.lookup_p50_ratio_bare, self.lookup_p99_ratio_bare) = ratio(s_lookup, b_lookup);
    }
}

fn render(r: &Results) -> String {
    let mut table = Table::new();
    table.load_preset(presets::ASCII_MARKDOWN);
    table.set_header([
        "us",
        "no store",
        "healthy",
        "stalled",
        "stalled/healthy",
        "stalled/no store",
    ]);
    let mut row = |name: &str, times: [f64; 3], ratios: [f64; 2]| {
        let times = times.map(|us| format!("{us:.0}"));
        let ratios = ratios.map(|ratio| format!("{ratio:.2}"));
        table.add_row(
            std::iter::once(name.to_owned())
                .chain(times)
                .chain(ratios)
                .collect::<Vec<_>>(),
        );
    };
    row(
        "store of 2 MiB, p50",
        [
            r.bare_store_us_p50,
            r.healthy_store_us_p50,
            r.stalled_store_us_p50,
        ],
        [r.store_p50_ratio, r.store_p50_ratio_bare],
    );
    row(
        "store of 2 MiB, p99",
        [
            r.bare_store_us_p99,
            r.healthy_store_us_p99,
            r.stalled_store_us_p99,
        ],
        [r.store_p99_ratio, r.store_p99_ratio_bare],
    );
    row(
        "lookup of 128, p50",
        [
            r.bare_lookup_us_p50,
            r.healthy_lookup_us_p50,
            r.stalled_lookup_us_p50,
        ],
        [r.lookup_p50_ratio, r.lookup_p50_ratio_bare],
    );
    row(
        "lookup of 128, p99",
        [
            r.bare_lookup_us_p99,
            r.healthy_lookup_us_p99,
            r.stalled_lookup_us_p99,
        ],
        [r.lookup_p99_ratio, r.lookup_p99_ratio_bare],
    );
    format!(
        "{table}\n{} stores and {} lookups of each kind; while the device hung, {} blocks waited for it, {} were dropped because too many did and {} because no place was free (healthy: {} in all).\n\
         Seconds of CPU of the daemon: {:.2} without a store, {:.2} healthy, {:.2} stalled.\n",
        r.stores,
        r.lookups,
        r.hung,
        r.dropped_queue_full,
        r.dropped_no_place,
        r.healthy_dropped,
        r.bare_cpu_s,
        r.healthy_cpu_s,
        r.stalled_cpu_s
    )
}
