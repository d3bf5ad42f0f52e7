//! The whole simulated node, and one step of it: some process takes a turn, or the daemon reads a frame, or time or a fault
//! strikes. One stream of chance decides everything, so a seed is a run.

use std::collections::{BTreeMap, BTreeSet};

use crate::checks::ActiveWrite;
use crate::clock::SimClock;
use crate::config::Config;
use crate::daemon::{Conn, Daemon, SessionInfo};
use crate::engine::{Instance, Proc};
use crate::kept::AllKept;
use crate::memory::SimArena;
use crate::model::Model;
use crate::options::{Fault, Options};
use crate::plant::Plant;
use crate::report::{Check, Counters, EventLog};
use crate::rng::Rng;
use crate::tier::SimStores;

/// Everything.
pub(crate) struct World {
    pub(crate) options: Options,
    pub(crate) config: Config,
    pub(crate) rng: Rng,
    pub(crate) clock: SimClock,
    pub(crate) log: EventLog,
    pub(crate) step: u64,
    pub(crate) counters: Counters,
    pub(crate) arenas: SimArena,
    pub(crate) tier: SimStores,
    /// What must be true of the stores.
    pub(crate) kept: AllKept,
    pub(crate) daemon: Option<Daemon>,
    /// By tenant: serial of the table that clients were given last. Outlives daemons, as the real one's file does.
    pub(crate) given: Vec<Option<u64>>,
    /// When a dead daemon starts again.
    pub(crate) restart_at: u64,
    pub(crate) conns: BTreeMap<u64, Conn>,
    pub(crate) next_conn: u64,
    pub(crate) instances: Vec<Instance>,
    pub(crate) procs: Vec<Proc>,
    pub(crate) model: Model,
    /// Who is writing, truly.
    pub(crate) writers: Vec<ActiveWrite>,
    pub(crate) next_job: u64,
    pub(crate) versions: u64,
    /// Reservations (by seed) whose reply no scheduler has read.
    pub(crate) untold: BTreeSet<u64>,
    /// Whose each session is, of this daemon and former ones.
    pub(crate) owners: BTreeMap<u64, usize>,
    /// Deaths that the node has not heard of: when it will, and the session.
    pub(crate) deaths: Vec<(u64, u64)>,
    /// No more faults, no more new work.
    pub(crate) quiet: bool,
}

impl World {
    /// A world before its first step.
    pub(crate) fn new(options: Options) -> World {
        let config = Config::draw(&options);
        let arenas = SimArena::new(config.arenas.clone(), options.plant);
        let tier = SimStores::new(&config.tier, options.seed, arenas.clone());
        World {
            kept: AllKept::new(tier.count()),
            tier,
            rng: Rng::new(options.seed, 0),
            clock: SimClock::new(),
            log: EventLog::new(options.tail),
            step: 0,
            counters: Counters::default(),
            arenas,
            daemon: None,
            given: vec![None; config.limits.len()],
            restart_at: 0,
            conns: BTreeMap::new(),
            next_conn: 0,
            instances: Vec::new(),
            procs: Vec::new(),
            model: Model::new(config.limits.len()),
            writers: Vec::new(),
            next_job: 0,
            versions: 0,
            untold: BTreeSet::new(),
            owners: BTreeMap::new(),
            deaths: Vec::new(),
            quiet: false,
            config,
            options,
        }
    }

    pub(crate) fn event(&mut self, what: &'static str, numbers: [u64; 3]) {
        self.log.add(self.step, self.clock.us(), what, numbers);
    }

    /// What is known of a session of the running daemon.
    pub(crate) fn session(&self, token: u64) -> Option<&SessionInfo> {
        self.daemon.as_ref()?.sessions.get(&token)
    }

    /// One step.
    pub(crate) fn step(&mut self) -> Check {
        self.step += 1;
        let us = self.rng.spread(1, 100);
        self.clock.advance(us);
        if self.daemon.is_none() && self.clock.us() >= self.restart_at {
            self.start_daemon()?;
        }
        match self.rng.below(32) {
            0..=9 => self.serve_some()?,
            10..=27 => self.turn_some()?,
            28 | 29 => self.finish_job(false)?,
            30 => self.hear_of_deaths()?,
            _ if !self.quiet => self.strike()?,
            _ => {}
        }
        if self.rng.one_in(3) {
            self.tick_if_due()?;
        }
        self.step_stores()?;
        if self.step.is_multiple_of(64) {
            self.conns
                .retain(|_, conn| conn.client_open || conn.daemon_open);
            self.respawn();
        }
        Ok(())
    }

    /// Keeps the number of living engines up.
    fn respawn(&mut self) {
        let alive = self
            .instances
            .iter()
            .filter(|i| i.procs.iter().any(|p| self.procs[*p].alive));
        if alive.count() < self.config.instances && !self.quiet {
            self.spawn_instance();
        }
    }

    pub(crate) fn serve_some(&mut self) -> Check {
        let work =
            |conn: &Conn| conn.daemon_open && (!conn.to_daemon.is_empty() || !conn.client_open);
        let ready: Vec<u64> = self
            .conns
            .iter()
            .filter(|(_, conn)| work(conn))
            .map(|(at, _)| *at)
            .collect();
        if ready.is_empty() {
            return Ok(());
        }
        let at = *self.rng.pick(&ready);
        self.serve(at)
    }

    pub(crate) fn turn_some(&mut self) -> Check {
        let now = self.clock.us();
        let awake = |p: &&usize| self.procs[**p].alive && self.procs[**p].stalled_until <= now;
        let all: Vec<usize> = (0..self.procs.len()).collect();
        let awake: Vec<usize> = all.iter().filter(awake).copied().collect();
        if awake.is_empty() {
            return Ok(());
        }
        let p = *self.rng.pick(&awake);
        self.turn(p)
    }

    pub(crate) fn hear_of_deaths(&mut self) -> Check {
        let now = self.clock.us();
        let due = self.deaths.iter().position(|(when, _)| *when <= now);
        match due {
            Some(at) => {
                let (_, token) = self.deaths.remove(at);
                self.notice_death(token)
            }
            None => Ok(()),
        }
    }

    fn some_proc(&mut self) -> Option<usize> {
        let alive: Vec<usize> = (0..self.procs.len())
            .filter(|p| self.procs[*p].alive)
            .collect();
        (!alive.is_empty()).then(|| *self.rng.pick(&alive))
    }

    /// A fault, perhaps.
    fn strike(&mut self) -> Check {
        let fault = *self.rng.pick(Fault::of_host());
        let Some(p) = self.some_proc().filter(|_| self.config.faults.has(fault)) else {
            return Ok(());
        };
        match fault {
            Fault::Death if self.rng.one_in(6) => self.death(p),
            Fault::Stall if self.rng.one_in(2) => {
                let us = self.rng.spread(1_000, 2_000_000);
                self.procs[p].stalled_until = self.clock.us() + us;
                self.event("stalls", [p as u64, us, 0]);
                self.counters.add("stalls");
            }
            Fault::Detach if self.rng.one_in(2) && self.procs[p].conn.is_some() => {
                self.counters.add("detaches");
                self.hang_up(p);
            }
            Fault::Flip => self.flip(),
            Fault::Crash if self.rng.one_in(8) && self.daemon.is_some() => {
                if self.rng.one_in(2) {
                    self.kill_daemon();
                } else {
                    let writes = self.rng.range(1, 12) as u32;
                    self.arenas.light_fuse(writes);
                }
            }
            Fault::Jump if self.rng.one_in(5) => {
                let us = self.rng.spread(1_000, 1_000_000);
                self.clock.advance(us);
                self.event("jump", [us, 0, 0]);
            }
            Fault::NoMemory if self.rng.one_in(4) => self.finish_job(true)?,
            _ => {}
        }
        Ok(())
    }

    fn death(&mut self, p: usize) {
        let instance = self.procs[p].instance;
        if self.rng.one_in(3) {
            self.kill(p);
        } else if self.rng.one_in(3) {
            for p in self.instances[instance].procs.clone() {
                self.say_bye(p);
            }
        } else {
            for p in self.instances[instance].procs.clone() {
                self.kill(p);
            }
        }
    }

    /// A process dies in the middle of whatever it does. The node hears of it later.
    pub(crate) fn kill(&mut self, p: usize) {
        if !self.procs[p].alive {
            return;
        }
        self.event("dies", [p as u64, 0, 0]);
        self.counters.add("deaths");
        for token in self.procs[p].sessions.clone() {
            self.notify_death(token);
        }
        if self.options.plant == Some(Plant::EarlyDeath)
            && !self.quiet
            && !self.procs[p].stores.is_empty()
        {
            return;
        }
        let conn = self.procs[p].conn.take();
        if let Some(conn) = conn.and_then(|at| self.conns.get_mut(&at)) {
            conn.client_open = false;
            conn.to_client.clear();
        }
        self.bury(p);
    }

    /// The node will hear that the process of this session is dead.
    pub(crate) fn notify_death(&mut self, token: u64) {
        if self.options.plant != Some(Plant::NoDeath) {
            let due = self.clock.us() + self.rng.spread(1, 300_000);
            self.deaths.push((due, token));
        }
    }

    fn bury(&mut self, p: usize) {
        for store in std::mem::take(&mut self.procs[p].stores) {
            self.end_write(store.job);
        }
        let proc = &mut self.procs[p];
        proc.alive = false;
        proc.reads.clear();
        proc.orders.clear();
        proc.pending.clear();
        proc.mapping = None;
    }

    /// A process ends in good order: its copies are over, it says so, and it exits.
    pub(crate) fn say_bye(&mut self, p: usize) {
        let proc = &self.procs[p];
        if !proc.alive || proc.token == 0 || !proc.stores.is_empty() || !proc.reads.is_empty() {
            return self.kill(p);
        }
        if let Some(conn) = proc.conn.and_then(|at| self.conns.get_mut(&at)) {
            conn.to_daemon.push_back(crate::daemon::Frame::Bye);
        }
        self.counters.add("byes");
        self.kill(p);
    }

    fn flip(&mut self) {
        let tenant = self.rng.below(self.config.limits.len());
        let Some(mapping) = self.model.tenants[tenant].mapping.clone() else {
            return;
        };
        let held = &self.model.tenants[tenant].residents;
        let at = self.rng.below(held.len());
        let offset = match held.values().nth(at) {
            Some(held) => held.offset + self.rng.range(0, held.geometry.block_bytes() - 1),
            None => self.rng.range(0, mapping.memory.len() - 1),
        };
        let bit = self.rng.below(8) as u32;
        mapping.memory.flip(offset, bit);
        self.event("flip", [tenant as u64, offset, u64::from(bit)]);
        self.counters.add("bits flipped");
    }
}
