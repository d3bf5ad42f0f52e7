//! Moves the stores of the slower tier on: opens them when a daemon starts, turns them, brings what they answer to the node, lets
//! their disks fail, and brings them to rest. What `kvd-serve` does around a store, one small step at a time.

use kvd_core::tier::{OpId, StoreDone, StoreOp};
use kvd_core::{BlockHash, StoreId};
use kvd_nvme::store::OpenError;

use crate::ask::Ask;
use crate::content;
use crate::daemon::SessionInfo;
use crate::kept::{Asked, Known, Places};
use crate::model::Key;
use crate::options::Fault;
use crate::plant::Plant;
use crate::report::{Check, ensure};
use crate::tier::Held;
use crate::world::World;

/// What a store tells the node.
pub(crate) enum News {
    Done(StoreDone),
    Switched(bool),
}

/// What was true when a load was asked for.
#[derive(Clone, Debug)]
pub(crate) struct Wait {
    /// By when it must be answered.
    pub(crate) deadline: u64,
    /// For each hash: a store held it then, and host memory did not.
    pub(crate) below: Vec<bool>,
    /// Calls of the node before it.
    pub(crate) call: u64,
}

impl World {
    /// Opens all stores, and tells the node what they hold, before anybody is served.
    pub(crate) fn open_stores(&mut self) -> Check {
        for at in 0..self.tier.count() {
            let held = self.open_store(at)?;
            let store = StoreId(at as u8);
            self.event("store opens", [at as u64, held.blocks.len() as u64, 0]);
            if let Some(daemon) = &mut self.daemon {
                daemon.on.push(true);
            }
            self.call(|node| node.store_opened(store, held.shape))?;
            for record in &held.namespaces {
                self.call(|node| node.store_has_namespace(store, record))?;
            }
            let some = self.rng.range(1, 16) as usize;
            for blocks in held.blocks.chunks(some) {
                self.call(|node| node.store_has_blocks(store, blocks))?;
            }
        }
        Ok(())
    }

    /// Opens one, judges what it held, and makes it anew if its disk has lost both superblocks.
    fn open_store(&mut self, at: usize) -> Check<Held> {
        let (now, plant) = (self.clock.us(), self.options.store_plant);
        let media = self.tier.media_faults(at) > 0;
        let mut opened = self.tier.open(at, now, plant);
        if media && matches!(opened, Err(OpenError::Damaged | OpenError::Foreign)) {
            self.counters.add("stores made anew");
            self.tier.format_next(at, self.rng.id());
            self.kept.stores[at] = Places::default();
            opened = self.tier.open(at, now, plant);
        }
        match opened {
            Ok(held) => {
                self.counters
                    .add_n("blocks found", held.blocks.len() as u64);
                self.kept.stores[at].reopened(&held.blocks, media)?;
                for block in &held.blocks {
                    self.read_back(at, block)?;
                }
                let until = self.tier.arm(at);
                self.clock.advance(until.saturating_sub(now));
                Ok(held)
            }
            Err(error) => {
                ensure!(false, 4, "store {at} does not open: {error}");
                Ok(Held::default())
            }
        }
    }

    /// The stores die with the daemon.
    pub(crate) fn kill_stores(&mut self) {
        if self.tier.count() == 0 {
            return;
        }
        self.forget_asked();
        self.count_stores();
        let power = self.config.faults.has(Fault::PowerCut) && self.rng.one_in(2);
        if power {
            self.counters.add("power cuts");
        }
        self.tier.kill(power);
    }

    fn count_stores(&mut self) {
        for at in 0..self.tier.count() {
            for (name, n) in self.tier.counts(at) {
                if ["checkpoints", "switched_off", "journal_jams"].contains(&name) {
                    self.counters.add_n(name, n);
                }
                if name == "checkpoint_pages_unreadable" {
                    self.kept.stores[at].unreadable = n as usize;
                }
            }
        }
    }

    /// A step of the slower tier.
    pub(crate) fn step_stores(&mut self) -> Check {
        let count = self.tier.count();
        if count == 0 {
            return Ok(());
        }
        if self.rng.one_in(2) {
            let at = self.rng.below(count);
            self.turn_store(at)?;
        }
        if self.rng.one_in(2) {
            self.hear_of_store()?;
        }
        if !self.quiet && self.rng.one_in(100) {
            let at = self.rng.below(count);
            self.strike_disk(at);
        }
        Ok(())
    }

    /// One turn of a store. What it answers is judged now; the node hears of it later.
    pub(crate) fn turn_store(&mut self, at: usize) -> Check {
        if self.daemon.is_none() {
            return Ok(());
        }
        let mut done = Vec::new();
        let switched = self.tier.turn(at, self.clock.us(), &mut done);
        for mut one in done {
            self.store_answered(at, &one)?;
            let Some(daemon) = &mut self.daemon else {
                return Ok(());
            };
            if daemon.told.remove(&op_of(&one)) {
                continue;
            }
            if self.options.plant == Some(Plant::FailedWrite)
                && let StoreDone::Written { result, .. } = &mut one
            {
                *result = Ok(());
            }
            daemon.news.push_back((at, News::Done(one)));
        }
        if let (Some(on), Some(daemon)) = (switched, &mut self.daemon) {
            daemon.news.push_back((at, News::Switched(on)));
        }
        Ok(())
    }

    /// The node hears the next thing that a store has told.
    pub(crate) fn hear_of_store(&mut self) -> Check {
        let Some(daemon) = &mut self.daemon else {
            return Ok(());
        };
        let Some((at, news)) = daemon.news.pop_front() else {
            return Ok(());
        };
        let store = StoreId(at as u8);
        match news {
            News::Switched(on) => {
                self.event("store switched", [at as u64, u64::from(on), 0]);
                self.counters.add("stores switched");
                self.call(|node| node.store_switched(store, on))?;
                // Only now: what the clock brought in that call came before.
                if let Some(daemon) = &mut self.daemon {
                    daemon.on[at] = on;
                }
            }
            News::Done(done) => {
                if let StoreDone::Dropped { op, result: Ok(()) } = &done {
                    let gone = daemon.drops.remove(op);
                    let blocks = &mut self.kept.stores[at].blocks;
                    if let Some(place) = gone
                        && blocks.get(&place).is_some_and(|k| k.known == Known::Gone)
                    {
                        blocks.remove(&place);
                    }
                }
                self.event("store answers", [at as u64, op_of(&done).0, 0]);
                self.call(|node| node.store_done(store, done))?;
            }
        }
        Ok(())
    }

    /// For planted bugs: the node is told at once, and not when the store answers.
    pub(crate) fn tell_early(&mut self, store: usize, op: &StoreOp) {
        let done = match (self.options.plant, op) {
            (Some(Plant::EarlyDrop), StoreOp::Drop { op, .. }) => StoreDone::Dropped {
                op: *op,
                result: Ok(()),
            },
            (
                Some(Plant::EarlyRead),
                StoreOp::Read {
                    op, from, block, ..
                },
            ) => {
                let Some(kept) = self.kept.stores[store].blocks.get(from) else {
                    return;
                };
                let crcs = content::block_crcs(kept.seed, &kept.geometry, &kept.cut);
                let mut block = block.clone();
                (block.cut, block.crcs) = (kept.cut.clone(), crcs);
                StoreDone::Read {
                    op: *op,
                    block,
                    result: Ok(()),
                }
            }
            _ => return,
        };
        if let Some(daemon) = self.daemon.as_mut().filter(|d| d.calls.is_multiple_of(2)) {
            daemon.told.insert(op.op());
            daemon.news.push_back((store, News::Done(done)));
        }
    }

    fn strike_disk(&mut self, at: usize) {
        let fault = *self.rng.pick(Fault::of_disks());
        if !self.config.faults.has(fault) {
            return;
        }
        let (worst, on) = (self.config.tier.worst, self.rng.one_in(2));
        let rate = |rate| if on { rate } else { 0 };
        let which = self.rng.below(4);
        match fault {
            Fault::DiskIo => self.tier.change_faults(at, |f| match which {
                0 => f.eio = rate(worst.eio),
                1 => f.sticky = rate(worst.sticky),
                2 => f.short = rate(worst.short),
                _ => f.full = on,
            }),
            Fault::DiskStall => self.tier.change_faults(at, |f| f.stall = rate(worst.stall)),
            Fault::DiskLost => self.tier.change_faults(at, |f| {
                f.lost = rate(worst.lost);
                f.misdirected = rate(worst.misdirected);
            }),
            Fault::DiskRot => self.tier.flip(at, &mut self.rng),
            Fault::PowerCut if self.kept.writes() && self.daemon.is_some() => self.kill_daemon(),
            _ => return,
        }
        self.event("disk fault", [at as u64, fault as u64, u64::from(on)]);
        self.counters.add("disk faults");
    }

    /// Which store a block belongs in, if that is on for the node.
    fn store_on(&self, hash: &BlockHash) -> bool {
        let on = self.daemon.as_ref().map(|d| d.on.as_slice());
        let on = on.unwrap_or(&[]);
        !on.is_empty() && on[((hash.low64() >> 8) % on.len() as u64) as usize]
    }

    /// Whether a store holds the block, on or off: a load must not find it absent.
    pub(crate) fn is_stored(&self, key: &Key) -> bool {
        self.model.tenants[usize::from(key.tenant)]
            .stored
            .contains(key)
    }

    /// Whether the block could come up from a store now.
    pub(crate) fn is_below(&self, key: &Key) -> bool {
        self.is_stored(key) && self.store_on(&key.hash)
    }

    /// What is true when a load is asked for.
    pub(crate) fn wait_of(&self, info: &SessionInfo, ask: &Ask) -> Option<Wait> {
        let Ask::Load {
            namespace,
            group,
            hashes,
            deadline_ms,
        } = ask
        else {
            return None;
        };
        let spec = info.names.get(namespace)?;
        let t = &self.model.tenants[usize::from(spec.tenant)];
        let below = |hash: &[u8; 32]| {
            let key = Key {
                tenant: spec.tenant,
                namespace: spec.id,
                group: *group,
                hash: BlockHash(*hash),
            };
            !t.by_key.contains_key(&key) && (self.is_stored(&key) || t.coming(&key))
        };
        let longest = self.config.node.core.tiers.max_wait_ms;
        let ms = match deadline_ms {
            0 => longest,
            ms => longest.min(*ms),
        };
        Some(Wait {
            deadline: self.clock.us() + u64::from(ms) * 1000,
            below: hashes.iter().map(below).collect(),
            call: self.model.calls,
        })
    }

    /// Nothing waits for a store but loads that need it, and those not beyond their deadline.
    pub(crate) fn check_waits(&self) -> Check {
        let now = self.clock.us();
        let sessions = self.daemon.iter().flat_map(|d| &d.sessions);
        for (token, info) in sessions {
            for (id, ask) in &info.open {
                let wait = info.waits.get(id);
                let may = wait.is_some_and(|w| w.deadline > now && w.below.contains(&true));
                ensure!(
                    may,
                    9,
                    "request {id} of session {token:x} waits: {ask:?}, {wait:?} at {now}"
                );
            }
        }
        Ok(())
    }

    /// A deadline of a load, now and then.
    pub(crate) fn some_deadline(&mut self) -> u32 {
        match self.tier.count() > 0 && self.rng.one_in(4) {
            true => self.rng.spread(1, 50) as u32,
            false => 0,
        }
    }

    /// Whether nothing is under way in the slower tier.
    pub(crate) fn stores_idle(&self) -> bool {
        let news = self.daemon.as_ref().is_none_or(|d| d.news.is_empty());
        news && self.kept.asked.is_empty() && self.tier.idle()
    }

    /// Brings the stores to rest.
    pub(crate) fn settle_stores(&mut self) -> Check {
        let mut turns = 0;
        while !self.stores_idle() {
            for at in 0..self.tier.count() {
                self.turn_store(at)?;
            }
            while self.daemon.as_ref().is_some_and(|d| !d.news.is_empty()) {
                self.hear_of_store()?;
            }
            self.clock.advance(200);
            self.step += 1;
            turns += 1;
            ensure!(turns < 20_000, 0, "the stores do not come to rest");
        }
        Ok(())
    }

    /// The end: what the index says is below is there, and a restart finds what it must.
    pub(crate) fn check_stores_end(&mut self) -> Check {
        for key in self.model.tenants.iter().flat_map(|t| &t.stored) {
            ensure!(self.kept.has(key), 6, "{key:?} is said to be stored");
        }
        if self.tier.count() == 0 {
            return Ok(());
        }
        self.count_stores();
        let power = self.rng.one_in(2);
        self.tier.kill(power);
        for at in 0..self.tier.count() {
            self.open_store(at)?;
        }
        Ok(())
    }

    /// Remembers which place a drop is about.
    pub(crate) fn note_drop(&mut self, op: OpId) {
        let place = match self.kept.asked.get(&op) {
            Some((_, Asked::Drop { place })) => *place,
            _ => return,
        };
        if let Some(daemon) = &mut self.daemon {
            daemon.drops.insert(op, place);
        }
    }
}

fn op_of(done: &StoreDone) -> OpId {
    match done {
        StoreDone::Written { op, .. }
        | StoreDone::Read { op, .. }
        | StoreDone::Dropped { op, .. } => *op,
    }
}
