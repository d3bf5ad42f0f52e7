//! `kvd bench gpu`: storing and loading blocks of an NVIDIA GPU's memory, as an engine's copy threads do it, against the link
//! to that GPU: one large piece at a time, to and from pinned memory.
//!
//! Link, store and load take turns; of several turns the median counts. Deliberately absent: sockets and daemon.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::{Arg, ArgMatches, Command, value_parser};
use comfy_table::{Table, presets};
use kvd_arena::{Arena, ArenaView, HugePages, Registered, SlotBytes};
use kvd_core::Cut;
use kvd_device::{
    CudaDevice, Device, EnginePages, Link, LoadJob, LoadPlan, Loaded, PageOrder, StoreJob,
};
use kvd_nvme::io::cpu_seconds;

use super::{Random, Shape, median, progress};

/// Bytes of one turn.
const TURN: usize = 256 << 20;
const TURNS: usize = 7;

/// One row. The names are what `--json` prints; they are only ever added to.
#[derive(Debug, Default, serde::Serialize)]
struct Row {
    /// Bytes of a block.
    block: usize,
    /// Layers and KV heads of it.
    layers: u32,
    heads: u32,
    /// How a page lies in the GPU: `head` for `[head][token]`, `token` for `[token][head]`.
    order: &'static str,
    /// Blocks of one call.
    blocks: usize,
    /// Threads that call at the same time.
    threads: usize,
    /// The link from and to the GPU, 10^9 bytes a second.
    link_down_gbps: f64,
    link_up_gbps: f64,
    /// The device's, checksums included.
    store_gbps: f64,
    load_gbps: f64,
    store_ratio: f64,
    load_ratio: f64,
    /// Seconds of CPU for 10^9 bytes that are stored and loaded again.
    cpu_s_per_gb: f64,
}

/// What copies cost an engine's own work: with two threads that store and two that load all the while, and without.
#[derive(Debug, Default, serde::Serialize)]
struct Beside {
    /// What the copies moved meanwhile, both ways together, 10^9 bytes a second.
    copies_gbps: f64,
    /// A pass over 512 MiB of the GPU's memory, microseconds.
    pass_us_p50: f64,
    pass_us_p99: f64,
    beside_pass_us_p50: f64,
    beside_pass_us_p99: f64,
    /// 200 small kernels, asked for one by one, as a step of decoding without graphs.
    launches_us_p50: f64,
    launches_us_p99: f64,
    beside_launches_us_p50: f64,
    beside_launches_us_p99: f64,
}

#[derive(Debug, serde::Serialize)]
struct Results {
    rows: Vec<Row>,
    beside: Beside,
}

/// Its flags.
pub(crate) fn command() -> Command {
    Command::new("gpu")
        .about("Stores and loads of a GPU's memory, against the link to it (NVIDIA)")
        .arg(
            Arg::new("device")
                .long("device")
                .value_name("N")
                .default_value("0")
                .value_parser(value_parser!(u32))
                .help("Which GPU"),
        )
}

/// Measures everything and prints it.
pub(crate) fn run(matches: &ArgMatches, json: bool) -> Result<()> {
    let number = matches.get_one::<u32>("device").copied().unwrap_or(0);
    let device = CudaDevice::open(number).context("this bench needs an NVIDIA GPU")?;
    let memory = HostMemory::new(&device)?;
    // 32 layers of 8 heads of 16 tokens, K and V of 128 numbers of 2 bytes; the latent of an MLA model; a small model.
    let large = || Shape::new(32, 8, 512);
    let cases = [
        ("head", large(), 16, 1),
        ("token", large(), 16, 1),
        ("token", large(), 1, 1),
        ("token", large(), 4, 1),
        ("token", large(), 4, 2),
        ("head", Shape::new(61, 1, 1152), 16, 1),
        ("head", Shape::new(61, 1, 1152), 7, 2),
        ("token", Shape::new(8, 1, 512), 64, 1),
        ("token", Shape::new(8, 1, 512), 64, 2),
    ];
    let mut rows = Vec::new();
    for (order, shape, blocks, threads) in cases {
        let bytes = shape.part.bytes();
        progress(&format!(
            "blocks of {} KiB by {order}, {blocks} a call, {threads} threads",
            bytes >> 10
        ));
        let row = Row {
            block: bytes,
            layers: shape.part.layers,
            heads: shape.part.heads,
            order,
            blocks,
            threads,
            ..Row::default()
        };
        rows.push(measure(&device, &memory, &shape, row)?);
    }
    progress("what copies cost an engine's own work");
    let beside = beside(&device, &memory)?;
    let results = Results { rows, beside };
    match json {
        true => super::super::print(&format!("{}\n", serde_json::to_string_pretty(&results)?)),
        false => super::super::print(&format!(
            "{}\n\nAn engine's own work, alone and beside copies:\n{}",
            render(&results.rows),
            super::render(&results.beside)?
        )),
    }
}

/// An arena that the GPU knows of.
struct HostMemory {
    // Dropped first.
    _registered: Option<Registered>,
    view: ArenaView,
}

impl HostMemory {
    fn new(device: &CudaDevice) -> Result<Self> {
        let arena = Arena::create(2 * TURN as u64, None, HugePages::Auto)?;
        for extent in 0..arena.extents() {
            arena.populate(extent)?;
        }
        let view = ArenaView::map(
            arena.fd().try_clone_to_owned()?,
            arena.generation_fd().try_clone_to_owned()?,
            arena.shape(),
        )?;
        let (address, bytes) = view.region();
        Ok(Self {
            _registered: device.register(address, bytes)?,
            view,
        })
    }

    /// Slots for blocks of so many bytes, [`TURN`] bytes of them.
    fn slots(&self, block: usize) -> Vec<SlotBytes<'_>> {
        let shape = *self.view.shape();
        let slot_bytes = block.next_multiple_of(4096) as u64;
        let in_extent = shape.extent_bytes / slot_bytes;
        let all = (0..shape.bytes / shape.extent_bytes)
            .flat_map(|extent| (0..in_extent).map(move |i| (extent, i)));
        let slot = |(extent, i): (u64, u64)| {
            let number = extent * u64::from(shape.slots_per_extent) + i;
            let offset = extent * shape.extent_bytes + i * slot_bytes;
            self.view.slot(number as u32, offset, block).ok()
        };
        all.filter_map(slot).take(TURN / block).collect()
    }
}

fn rate(bytes: usize, run: impl FnOnce() -> Result<(), kvd_device::Error>) -> Result<f64> {
    let begin = Instant::now();
    run()?;
    Ok(bytes as f64 / begin.elapsed().as_secs_f64() / 1e9)
}

/// Gives each thread its share of `jobs`, in calls of `blocks`, and the results in order.
fn calls<J: Sync, R: Send>(
    row: &Row,
    jobs: &[J],
    call: impl Fn(&[J], &mut Vec<R>) -> Result<(), kvd_device::Error> + Sync,
) -> Result<Vec<R>, kvd_device::Error> {
    let share = jobs.len().div_ceil(row.threads);
    std::thread::scope(|scope| {
        let threads: Vec<_> = jobs
            .chunks(share)
            .map(|jobs| {
                let call = &call;
                scope.spawn(move || {
                    let mut results = Vec::new();
                    let mut all = jobs.chunks(row.blocks);
                    all.try_for_each(|jobs| call(jobs, &mut results))?;
                    Ok::<_, kvd_device::Error>(results)
                })
            })
            .collect();
        let mut results = Vec::new();
        for thread in threads {
            let some = thread
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            results.extend(some);
        }
        Ok(results)
    })
}

fn measure(device: &CudaDevice, host: &HostMemory, shape: &Shape, mut row: Row) -> Result<Row> {
    let block = shape.part.bytes();
    let slots = host.slots(block);
    let count = u32::try_from(slots.len())?;
    let order = match row.order {
        "token" => PageOrder::ByToken,
        _ => PageOrder::ByHead,
    };
    let mut engine = EnginePages::new(device.memory(), shape.part, count, order)?;
    let mut random = Random(7);
    for number in 0..count {
        let salt = random.next() | 1;
        let words = (0..block as u64 / 8).map(|i| i.wrapping_mul(salt).to_le_bytes());
        engine.write(number, &words.flatten().collect::<Vec<u8>>());
    }
    let geometry = shape.mover().geometry;
    let cut = Cut::whole(&geometry);
    let plan = LoadPlan::new(&geometry, &cut, &cut.part(0))?;
    // In no order, as an engine's blocks are.
    let step = kvd_nvme::io::scattered(count.into());
    let numbers: Vec<u32> = (0..u64::from(count))
        .map(|i| (i * step % u64::from(count)) as u32)
        .collect();
    let pages = engine.pages();
    let stores: Vec<StoreJob<'_>> = numbers
        .iter()
        .zip(slots)
        .map(|(page, part)| StoreJob {
            from: pages,
            pages: std::slice::from_ref(page),
            part,
        })
        .collect();
    let link = device.link(TURN)?;
    warm(&link)?;
    let bytes = stores.len() * block;
    let (mut up, mut down, mut store, mut load, mut cpu) = (vec![], vec![], vec![], vec![], vec![]);
    for _ in 0..TURNS {
        up.push(rate(TURN, || link.up())?);
        down.push(rate(TURN, || link.down())?);
        let begin = cpu_seconds();
        let mut crcs = Vec::new();
        store.push(rate(bytes, || {
            crcs = calls(&row, &stores, |jobs, crcs| device.store(jobs, crcs))?;
            Ok(())
        })?);
        let loads = loads(&stores, &crcs, &plan);
        let mut results = Vec::new();
        load.push(rate(bytes, || {
            results = calls(&row, &loads, |jobs, results| device.load(jobs, results))?;
            Ok(())
        })?);
        cpu.push((cpu_seconds() - begin) / (bytes as f64 / 1e9));
        ensure!(
            results.len() == stores.len() && results.iter().all(|r| *r == Loaded::Good),
            "blocks came back wrong"
        );
    }
    row.link_up_gbps = median(&mut up);
    row.link_down_gbps = median(&mut down);
    row.store_gbps = median(&mut store);
    row.load_gbps = median(&mut load);
    row.store_ratio = row.store_gbps / row.link_down_gbps;
    row.load_ratio = row.load_gbps / row.link_up_gbps;
    row.cpu_s_per_gb = median(&mut cpu);
    Ok(row)
}

fn beside(device: &CudaDevice, host: &HostMemory) -> Result<Beside> {
    let shape = Shape::new(32, 8, 512);
    let block = shape.part.bytes();
    let slots = host.slots(block);
    let engine = EnginePages::new(
        device.memory(),
        shape.part,
        u32::try_from(slots.len())?,
        PageOrder::ByToken,
    )?;
    let geometry = shape.mover().geometry;
    let cut = Cut::whole(&geometry);
    let plan = LoadPlan::new(&geometry, &cut, &cut.part(0))?;
    let numbers: Vec<u32> = (0..slots.len() as u32).collect();
    let stores: Vec<StoreJob<'_>> = (numbers.iter().zip(slots))
        .map(|(page, part)| StoreJob {
            from: engine.pages(),
            pages: std::slice::from_ref(page),
            part,
        })
        .collect();
    let mut crcs = Vec::new();
    device.store(&stores, &mut crcs)?;
    let loads = loads(&stores, &crcs, &plan);
    let work = device.engine_work(512 << 20)?;
    let times = |run: &dyn Fn() -> Result<(), kvd_device::Error>| {
        let mut all = Vec::new();
        for _ in 0..300 {
            let begin = Instant::now();
            run()?;
            all.push(begin.elapsed().as_secs_f64() * 1e6);
        }
        Ok::<_, kvd_device::Error>((median(&mut all), super::quantile(&mut all, 0.99)))
    };
    let pass = || work.pass();
    let launches = || work.launches(200);
    times(&pass)?;
    let mut beside = Beside::default();
    (beside.pass_us_p50, beside.pass_us_p99) = times(&pass)?;
    (beside.launches_us_p50, beside.launches_us_p99) = times(&launches)?;
    let (stop, moved) = (AtomicBool::new(false), AtomicUsize::new(0));
    // Each thread has blocks of its own, so that nobody stores what another loads.
    let quarter = stores.len() / 4;
    let copy = |thread: usize| {
        let mine = thread * quarter..(thread + 1) * quarter;
        while !stop.load(Ordering::Relaxed) {
            for at in mine.clone().step_by(4) {
                let call = at..(at + 4).min(mine.end);
                moved.fetch_add(call.len() * block, Ordering::Relaxed);
                match thread % 2 {
                    0 => device.store(&stores[call], &mut Vec::new())?,
                    _ => device.load(&loads[call], &mut Vec::new())?,
                }
            }
        }
        Ok::<_, kvd_device::Error>(())
    };
    std::thread::scope(|scope| {
        let copy = &copy;
        let threads: Vec<_> = (0..4).map(|i| scope.spawn(move || copy(i))).collect();
        let begin = Instant::now();
        let measured = times(&pass).and_then(|pass| Ok((pass, times(&launches)?)));
        stop.store(true, Ordering::Relaxed);
        let seconds = begin.elapsed().as_secs_f64();
        for thread in threads {
            thread
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        }
        let (pass, launches) = measured?;
        (beside.beside_pass_us_p50, beside.beside_pass_us_p99) = pass;
        (beside.beside_launches_us_p50, beside.beside_launches_us_p99) = launches;
        beside.copies_gbps = moved.load(Ordering::Relaxed) as f64 / seconds / 1e9;
        Ok::<_, kvd_device::Error>(())
    })?;
    Ok(beside)
}

/// Loads of what these stores have stored, into the same pages.
fn loads<'a>(stores: &[StoreJob<'a>], crcs: &'a [u64], plan: &'a LoadPlan) -> Vec<LoadJob<'a>> {
    let each = stores.iter().zip(crcs.chunks(plan.crcs()));
    each.map(|(job, crcs)| LoadJob {
        slot: job.part,
        plan,
        crcs,
        to: job.from,
        pages: job.pages,
    })
    .collect()
}

/// The link may sleep until it is used.
fn warm(link: &Link) -> Result<()> {
    for _ in 0..3 {
        link.up()?;
        link.down()?;
    }
    Ok(())
}

fn render(rows: &[Row]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::ASCII_MARKDOWN).set_header([
        "block",
        "order",
        "a call",
        "threads",
        "link down",
        "link up",
        "store",
        "load",
        "store ratio",
        "load ratio",
        "CPU s/GB",
    ]);
    for row in rows {
        table.add_row([
            format!("{} KiB", row.block >> 10),
            row.order.to_owned(),
            row.blocks.to_string(),
            row.threads.to_string(),
            format!("{:.1}", row.link_down_gbps),
            format!("{:.1}", row.link_up_gbps),
            format!("{:.1}", row.store_gbps),
            format!("{:.1}", row.load_gbps),
            format!("{:.2}", row.store_ratio),
            format!("{:.2}", row.load_ratio),
            format!("{:.3}", row.cpu_s_per_gb),
        ]);
    }
    table
}
