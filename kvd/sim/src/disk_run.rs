//! Drives the real store on the simulated disk, cuts its life short, and compares what comes back with the model.
//!
//! # What is checked
//!
//! - 1: a read that succeeds has the bytes that were last written there, and every checksum.
//! - 4: without media faults, what a start finds is sound; every write that was answered is found, nothing that was dropped and
//!   answered ever is.
//! - 5: every operation is answered once, and the store has no hold on its memory afterwards.
//! - 7: damage is `Corrupt`, failure `Io` or `Off`; neither without a cause.
//! - Everything comes to rest when the faults stop, and the store is then whole by `fsck`.

mod flips;

use std::collections::BTreeMap;
use std::time::Duration;

use kvd_core::tier::{
    HostRange, OpId, Place, ReadBlock, Recovered, StoreDone, StoreError, StoreOp,
};
use kvd_core::{Cut, TenantId};
use kvd_nvme::store::{Counters, Found, Store, StoreConfig, fsck};

use crate::disk::{DiskFaults, SimDisk, SimHost};
use crate::disk_model::{Block, Known, Model};
use crate::rng::Rng;
use crate::run::catching;
use crate::tier::next_start;

pub use flips::{FlipReport, flips};

/// A run.
#[derive(Clone, Copy, Debug)]
pub struct DiskOptions {
    /// Everything follows from it.
    pub seed: u64,
    /// Steps.
    pub steps: u32,
    /// What goes wrong.
    pub faults: DiskFaults,
    /// Lives are cut short: one step in so many; 0 is never.
    pub cuts: usize,
    /// Called with every store that is opened: plants a mistake in it.
    pub plant: Option<fn(&mut Store<SimDisk>)>,
}

/// What happened in a run.
#[derive(Clone, Debug, Default)]
pub struct DiskReport {
    /// Writes that were answered as durable.
    pub written: u64,
    /// Reads that were answered with bytes.
    pub read: u64,
    /// Reads that found damage.
    pub corrupt: u64,
    /// Drops that were answered.
    pub dropped: u64,
    /// Operations that failed or were refused.
    pub failed: u64,
    /// Times the power was cut, the process killed, the store closed in good order.
    pub cuts: u64,
    /// Blocks that starts found.
    pub found: u64,
    /// What the last store counted.
    pub counters: Counters,
    /// Checkpoints, of all stores of the run.
    pub checkpoints: u64,
    /// Times a store was switched off, of all.
    pub switched_off: u64,
    /// Pages that checkpoints could not read, of all: what was on them is forgotten by the next start.
    pub unreadable: u64,
}

enum Asked {
    Write(Place, SimHost),
    Read(Place, SimHost),
    Drop(Place),
}

const BYTES: u64 = 12 << 20;

struct Run {
    options: DiskOptions,
    rng: Rng,
    disk: SimDisk,
    config: StoreConfig,
    store: Option<Store<SimDisk>>,
    model: Model,
    asked: BTreeMap<OpId, Asked>,
    serial: u64,
    report: DiskReport,
}

/// More than there are operations, each of which may be checked in a turn of its own.
const TURNS_TO_REST: usize = 200;

fn config() -> StoreConfig {
    StoreConfig {
        segment_bytes: 1 << 20,
        journal_bytes: Some(1),
        max_queue: 48,
        flush_us: 300,
        flush_blocks: 6,
        deadline_us: 50_000,
        ..StoreConfig::new(BYTES, *b"a simulated disk")
    }
}

/// Runs a store. An error says what went wrong, by the number of the invariant.
pub fn run_disk(options: &DiskOptions) -> Result<DiskReport, String> {
    let mut step = 0;
    let result = catching(|| {
        let mut run = Run::new(options, SimDisk::new(options.seed, BYTES))?;
        run.begin();
        while step < options.steps {
            run.step()?;
            step += 1;
        }
        run.end()?;
        Ok(run.report)
    });
    result
        .unwrap_or_else(|text| Err(format!("2: the store panicked: {text}")))
        .map_err(|text| format!("seed {} step {step}: {text}", options.seed))
}

impl Run {
    fn new(options: &DiskOptions, disk: SimDisk) -> Result<Run, String> {
        let config = config();
        let opened = Store::open(disk.clone(), &config, &mut |_| {}).map_err(|e| e.to_string())?;
        Ok(Run {
            options: *options,
            rng: Rng::new(options.seed, 0x6469_736c),
            disk,
            config,
            store: Some(opened.store),
            model: Model::new(opened.shape),
            asked: BTreeMap::new(),
            serial: 0,
            report: DiskReport::default(),
        })
    }

    fn begin(&mut self) {
        self.disk.set_faults(self.options.faults);
        let depth = match self.rng.one_in(4) {
            true => self.rng.range(1, 6) as usize,
            false => 12,
        };
        self.disk.set_depth(depth);
        if let (Some(plant), Some(store)) = (self.options.plant, &mut self.store) {
            plant(store);
        }
    }

    fn step(&mut self) -> Result<(), String> {
        match self.rng.below(16) {
            0..=4 => self.write()?,
            5..=6 => self.read()?,
            7..=8 => self.drop_one()?,
            _ => self.turn()?,
        }
        let cuts = self.options.cuts;
        if cuts > 0 && self.rng.one_in(cuts) {
            self.cut_short()?;
        }
        Ok(())
    }

    fn op(&mut self) -> OpId {
        self.serial += 1;
        OpId(self.serial)
    }

    fn submit(&mut self, op: StoreOp, host: Option<SimHost>, asked: Asked) -> Result<(), String> {
        self.asked.insert(op.op(), asked);
        let store = self.store.as_mut().ok_or("no store")?;
        match store.submit(op, host) {
            Some(done) => self.answered(done),
            None => Ok(()),
        }
    }

    fn range(&self, bytes: u64) -> HostRange {
        HostRange {
            tenant: TenantId(0),
            offset: 0,
            bytes,
        }
    }

    fn write(&mut self) -> Result<(), String> {
        if self.model.blocks.len() > 250 {
            return self.drop_one();
        }
        let Some((to, header)) = self.model.place_block(&mut self.rng) else {
            return self.drop_one();
        };
        let block = &self.model.blocks[&to];
        let space = &self.model.spaces[block.space];
        let host = SimHost::new(self.model.bytes(block));
        let (geometry, record) = (Box::new(space.geometry.clone()), space.record.clone());
        let from = self.range(geometry.block_bytes());
        let op = StoreOp::Write {
            op: self.op(),
            to,
            from,
            header: Box::new(header),
            geometry,
            record,
        };
        let asked = Asked::Write(to, host.clone());
        self.submit(op, Some(host), asked)
    }

    fn read(&mut self) -> Result<(), String> {
        let there = |block: &Block| block.known == Known::There;
        let Some(place) = self.model.pick(&mut self.rng, there) else {
            return Ok(());
        };
        self.read_at(place)
    }

    fn read_at(&mut self, from: Place) -> Result<(), String> {
        let block = self.model.blocks.get_mut(&from).ok_or("no block")?;
        block.readers += 1;
        let (key, space) = (block.key, block.space);
        let geometry = self.model.spaces[space].geometry.clone();
        let into = self.range(geometry.block_bytes());
        let host = SimHost::new(vec![0xaa; geometry.block_bytes() as usize]);
        let op = StoreOp::Read {
            op: self.op(),
            from,
            into,
            key,
            block: ReadBlock::new(geometry),
        };
        let asked = Asked::Read(from, host.clone());
        self.submit(op, Some(host), asked)
    }

    fn drop_one(&mut self) -> Result<(), String> {
        let unsure = |block: &Block| block.known == Known::Unsure && block.readers == 0;
        let there = |block: &Block| block.known == Known::There && block.readers == 0;
        let place = match self.model.pick(&mut self.rng, unsure) {
            Some(place) => Some(place),
            None => self.model.pick(&mut self.rng, there),
        };
        let Some(place) = place else {
            return self.turn();
        };
        let block = self.model.blocks.get_mut(&place).ok_or("no block")?;
        block.known = Known::Dropping(block.known == Known::There);
        let key = block.key;
        let op = self.op();
        self.submit(StoreOp::Drop { op, place, key }, None, Asked::Drop(place))
    }

    fn turn(&mut self) -> Result<(), String> {
        let store = self.store.as_mut().ok_or("no store")?;
        let off = store.is_off();
        let wait = Duration::from_micros(match off {
            true => self.rng.range(1_000, 3_000_000),
            false => self.rng.range(0, 1_000),
        });
        let before = self.disk.now();
        let mut done = Vec::new();
        store.turn(before, wait, &mut done);
        // Nobody woke it.
        if off || self.rng.one_in(40) {
            let most = 100 * wait.as_micros() as u64;
            self.disk.pass(self.rng.range(0, most));
        }
        if self.rng.one_in(16) {
            self.comes_to_rest(&mut done)?;
        }
        done.into_iter().try_for_each(|done| self.answered(done))
    }

    /// Turns the store as long as it says that it is due, as its thread does: while nothing else happens, that ends.
    fn comes_to_rest(&mut self, done: &mut Vec<StoreDone>) -> Result<(), String> {
        let store = self.store.as_mut().ok_or("no store")?;
        for _ in 0..TURNS_TO_REST {
            let now = self.disk.now();
            if store.next_deadline().is_none_or(|at| at > now) {
                return Ok(());
            }
            store.turn(now, Duration::ZERO, done);
        }
        Err("due again and again, and nothing begins".into())
    }

    /// Whether the disk may fail an operation.
    fn may_fail(&self) -> bool {
        let faults = self.options.faults;
        faults.eio + faults.sticky + faults.short + faults.stall > 0 || faults.full
    }

    fn answered(&mut self, done: StoreDone) -> Result<(), String> {
        let (op, error) = match &done {
            StoreDone::Written { op, result } => (*op, result.err()),
            StoreDone::Read { op, result, .. } => (*op, result.err()),
            StoreDone::Dropped { op, result } => (*op, result.err()),
        };
        let asked = self
            .asked
            .remove(&op)
            .ok_or("5: answered twice, or never asked")?;
        match error {
            Some(StoreError::Io) if !self.may_fail() => {
                return Err("7: failed without a cause".into());
            }
            Some(StoreError::Corrupt) if self.disk.media_faults() == 0 => {
                return Err("4: damaged without a cause".into());
            }
            _ => {}
        }
        self.report.failed += u64::from(matches!(error, Some(StoreError::Io | StoreError::Off)));
        match (asked, done) {
            (Asked::Write(place, host), StoreDone::Written { .. }) => {
                if host.in_use() {
                    return Err("5: a write's memory is in use after its answer".into());
                }
                let block = self.model.blocks.get_mut(&place).ok_or("no block")?;
                match error {
                    None => block.known = Known::There,
                    Some(StoreError::Off) => self.model.free(place),
                    Some(_) => block.known = Known::Unsure,
                }
                self.report.written += u64::from(error.is_none());
            }
            (Asked::Drop(place), StoreDone::Dropped { .. }) => {
                let block = self.model.blocks.get_mut(&place).ok_or("no block")?;
                match (error, block.known) {
                    (None, _) => self.model.free(place),
                    (Some(StoreError::Off), Known::Dropping(true)) => block.known = Known::There,
                    _ => block.known = Known::Unsure,
                }
                self.report.dropped += u64::from(error.is_none());
            }
            (Asked::Read(place, host), StoreDone::Read { block, result, .. }) => {
                if host.in_use() {
                    return Err("5: a read's memory is in use after its answer".into());
                }
                self.read_answered(place, &host, result.map(|()| &block.cut))?;
            }
            _ => return Err("5: an answer of another kind".into()),
        }
        Ok(())
    }

    fn read_answered(
        &mut self,
        place: Place,
        host: &SimHost,
        cut: Result<&Cut, StoreError>,
    ) -> Result<(), String> {
        let block = self.model.blocks.get_mut(&place).ok_or("no block")?;
        block.readers -= 1;
        let block = block.clone();
        match cut {
            Ok(cut) => {
                let there = host.bytes();
                let is = |other: &Block| {
                    let bytes = self.model.bytes(other);
                    other.key == block.key && there[..bytes.len()] == bytes && other.cut == *cut
                };
                // A lost write may leave an older block of the same key, whole and with its own checksums.
                let older = self.model.history(place, &block.key);
                let older = self.disk.media_faults() > 0 && older.iter().any(is);
                if !is(&block) && !older {
                    return Err(format!("1: wrong bytes of {:?}", block.key));
                }
                self.report.read += 1;
            }
            Err(StoreError::Corrupt) => {
                self.report.corrupt += 1;
                if let Some(block) = self.model.blocks.get_mut(&place) {
                    block.known = Known::Unsure;
                }
            }
            Err(_) => {}
        }
        Ok(())
    }

    fn sum(&mut self, counters: &Counters) {
        self.report.checkpoints += counters.checkpoints;
        self.report.switched_off += counters.switched_off;
        self.report.unreadable += counters.checkpoint_pages_unreadable;
    }

    /// A life ends, and the next begins.
    fn cut_short(&mut self) -> Result<(), String> {
        let store = self.store.take().ok_or("no store")?;
        self.report.cuts += 1;
        match self.rng.below(3) {
            0 => {
                self.sum(store.counters());
                drop(store);
                self.disk.power_cut();
            }
            1 => {
                self.sum(store.counters());
                drop(store);
                self.disk.kill();
            }
            _ => {
                let mut done = Vec::new();
                let wait = Duration::from_millis(10);
                let (_, counters) = store.close(self.disk.now(), wait, 200, &mut done);
                self.sum(&counters);
                done.into_iter().try_for_each(|done| self.answered(done))?;
                self.disk.kill();
            }
        }
        for asked in std::mem::take(&mut self.asked).into_values() {
            let (Asked::Write(place, _) | Asked::Read(place, _) | Asked::Drop(place)) = asked;
            if let Some(block) = self.model.blocks.get_mut(&place) {
                match asked {
                    Asked::Read(..) => block.readers -= 1,
                    _ => block.known = Known::Unsure,
                }
            }
        }
        self.reopen()
    }

    /// Opens the store again and compares what it holds with what it must hold.
    fn reopen(&mut self) -> Result<(), String> {
        self.reopen_with(4)
    }

    /// Reads one in so many of the blocks that are found.
    fn reopen_with(&mut self, one_in: usize) -> Result<(), String> {
        self.disk.set_faults(DiskFaults::default());
        let mut found: Vec<Recovered> = Vec::new();
        next_start(&mut self.config);
        // Company enough by its bytes, or by its number.
        self.config.flush_bytes = if self.rng.one_in(2) {
            64 << 10
        } else {
            u64::MAX
        };
        let opened = Store::open(self.disk.clone(), &self.config, &mut |one| {
            if let Found::Block(block) = one {
                found.push(block);
            }
        });
        let opened = opened.map_err(|e| format!("4: the store does not open: {e}"))?;
        self.store = Some(opened.store);
        self.report.found += found.len() as u64;
        let media = self.disk.media_faults() > 0;
        let mut blocks = BTreeMap::new();
        for one in &found {
            let known = self.model.blocks.get(&one.place);
            let block = match known.filter(|block| block.key == one.key) {
                Some(block) => block.clone(),
                None if media => Block {
                    known: Known::Unsure,
                    ..self
                        .model
                        .history(one.place, &one.key)
                        .last()
                        .ok_or("1: found what was never written")?
                        .clone()
                },
                None => return Err(format!("4: {one:?} was dropped or never written")),
            };
            if one.parent != block.parent && !media {
                return Err(format!("1: {one:?} has another parent"));
            }
            if blocks.insert(one.place, block).is_some() {
                return Err(format!("4: {one:?} was found twice"));
            }
        }
        let lost = |(place, block): &(&Place, &Block)| {
            block.known == Known::There && !blocks.contains_key(place)
        };
        if let Some((place, block)) = self.model.blocks.iter().find(lost)
            && !media
            && self.report.unreadable == 0
        {
            return Err(format!(
                "4: {:?} at {place:?} was answered and is lost",
                block.key
            ));
        }
        let sample: Vec<Place> = blocks
            .iter()
            .filter(|(_, block)| block.known == Known::Unsure || self.rng.one_in(one_in))
            .map(|(place, _)| *place)
            .collect();
        self.model.restart(blocks);
        for place in sample {
            self.read_at(place)?;
            self.rest()?;
        }
        self.begin();
        Ok(())
    }

    /// Turns until nothing is under way.
    fn rest(&mut self) -> Result<(), String> {
        for _ in 0..20_000 {
            let off = self.store.as_ref().is_some_and(Store::is_off);
            if self.asked.is_empty() && !off {
                return Ok(());
            }
            self.turn()?;
        }
        Err("0: the store does not come to rest".into())
    }

    fn end(&mut self) -> Result<(), String> {
        self.disk.set_faults(DiskFaults::default());
        self.rest()?;
        let there: Vec<Place> = self.model.blocks.keys().copied().collect();
        for place in there {
            if self.model.blocks[&place].known == Known::There {
                self.read_at(place)?;
                self.rest()?;
            }
        }
        let store = self.store.take().ok_or("no store")?;
        self.report.counters = store.counters().clone();
        self.sum(store.counters());
        drop(store);
        self.disk.kill();
        next_start(&mut self.config);
        let check = |repair| {
            let report = fsck(self.disk.clone(), &self.config, repair, &mut |_, _| {});
            // Its process ends; a checkpoint that it had begun may still be under way.
            self.disk.kill();
            report.map_err(|e| e.to_string())
        };
        let media = self.disk.media_faults() > 0;
        let report = check(media)?;
        let sure = self
            .model
            .blocks
            .values()
            .filter(|block| block.known == Known::There)
            .count() as u64;
        if !media
            && (report.damaged + report.unreadable > 0
                || report.sound < sure && self.report.unreadable == 0)
        {
            return Err(format!(
                "4: fsck finds {report:?}, and {sure} blocks should be there"
            ));
        }
        if media && check(false)?.damaged > 0 {
            return Err("1: fsck did not repair what it found".into());
        }
        Ok(())
    }
}
