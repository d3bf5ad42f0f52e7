//! The half beside the engine's scheduler: asks what the daemon holds, decides what is loaded and stored, and turns that into
//! orders for the workers.
//!
//! It runs on the engine's scheduler thread, so **nothing here waits**: a request to the daemon is sent and polled, and time is
//! an argument. It keeps to what the engine guarantees of its blocks: a full block that a request holds is not written again;
//! blocks are taken away by preemption, or given back when the request has finished, and then only after the workers have
//! said that no copy out of them is under way. Blocks that a request outgrows while it runs (of a sliding window, or states) are
//! kept by the engine for as long as this half says. Deliberately absent: copies, threads, clocks, sockets, Python.

mod counters;
mod guard;
mod load;
mod lookup;
mod namespaces;
mod orders;
mod port;
mod request;
mod silence;
mod store;
#[cfg(test)]
mod tests;
mod watch;

use std::collections::{BTreeMap, HashMap};

pub use counters::Counters;
pub use guard::Guarded;
pub use lookup::Match;
pub use namespaces::Standing;
pub(crate) use namespaces::layouts;
pub use port::{Fault, Port, Registered};
pub use request::Adapter;
pub use watch::{ByTier, TIERS};

use kvd_core::hit::{self, GroupRule};
use prost::Message;
use request::{Leaving, Request};

use crate::meta::{self, LoadOrder, MetaError, RankHello, RankReport, StepMeta, VERSION};
use crate::notice::{Notice, Notices};
use load::ActiveLoad;
use namespaces::Namespaces;
use orders::OpenOrder;
use silence::Silence;
use watch::Watch;

/// So many blocks go back to the engine's pool at a time, which takes it a fraction of a microsecond each.
const RELEASED_AT_A_TIME: usize = 16;

/// What can be chosen. Times in microseconds.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Number of workers of the instance.
    pub world: u32,
    /// What a hit needs of each KV-cache group, by number.
    pub groups: Vec<GroupRule>,
    /// Groups whose blocks the engine offers one by one (the states of [`Scheduler::capture`]); their place in a request says nothing.
    pub offered: Vec<u32>,
    /// How long a request waits for the answer to its lookup.
    pub lookup_deadline: u64,
    /// How long the first requests wait until all workers have said what they hold.
    pub startup_deadline: u64,
    /// How long a request waits for another request's load of the same blocks.
    pub share_deadline: u64,
    /// How long blocks are held for slots that were asked for: those of a finished request, and those that a running one outgrew.
    pub hold_deadline: u64,
    /// How long what a lookup found is kept for us, in milliseconds.
    pub lease_ms: u32,
    /// Most blocks reserved or being copied at a time.
    pub max_in_flight: u32,
    /// Most blocks asked for in one request.
    pub batch: u32,
    /// A request that computes token after token is asked for its blocks when they have so many tokens.
    pub gather: u32,
    /// Most blocks that the engine keeps for us beyond what its requests need, until they are copied; an eighth more may wait to be
    /// given back.
    pub max_held: u32,
    /// Whether blocks are stored at all.
    pub stores: bool,
    /// The last unit of a hit is not used: its KV depends on the token after it (speculative drafters with KV of their own).
    pub drop_last: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            world: 1,
            groups: Vec::new(),
            offered: Vec::new(),
            lookup_deadline: 20_000,
            startup_deadline: 1_000_000,
            share_deadline: 10_000_000,
            hold_deadline: 1_000_000,
            lease_ms: 10_000,
            max_in_flight: 4096,
            batch: 1024,
            gather: 0,
            max_held: 4096,
            stores: true,
            drop_last: false,
        }
    }
}

impl Settings {
    /// Tokens of which every hit is a multiple: what the blocks of all groups divide.
    pub fn unit(&self) -> u32 {
        hit::unit(&self.groups).unwrap_or(u32::MAX)
    }

    /// Of a request's blocks, group by group, those beyond so many units that the engine had of it: others may have the former, too.
    pub(crate) fn beyond(&self, units: u32, blocks: &[Vec<u32>]) -> Vec<Vec<u32>> {
        let of_group = |(rule, blocks): (&GroupRule, &Vec<u32>)| {
            let first = units as usize * (self.unit() / rule.span()) as usize;
            blocks.get(first..).unwrap_or_default().to_vec()
        };
        let beyond: Vec<Vec<u32>> = self.groups.iter().zip(blocks).map(of_group).collect();
        // A load of nothing could not fail.
        match beyond.iter().all(Vec::is_empty) {
            true => blocks.to_vec(),
            false => beyond,
        }
    }

    /// Whether there are groups whose blocks a running request gives up. Then blocks are taken in the step that computes them.
    pub fn outgrows(&self) -> bool {
        self.groups.iter().any(GroupRule::stands_alone)
    }

    /// Whether blocks of a group are wanted now, from `first` on. `steps`: tokens that were computed when the step before the last one
    /// began, now, and when this step is over.
    fn wants(&self, rule: &GroupRule, first: u32, steps: [u32; 3]) -> bool {
        let [earlier, now, end] = steps;
        let span = rule.span();
        // Those of a window must still be there when they are wanted: the engine gives them up when the next token does not look at
        // them.
        let may_wait = match rule.window() {
            Some(window) => window >= self.gather + 2 * span,
            None => !rule.stands_alone(),
        };
        let more = now.saturating_sub(earlier).max(end.saturating_sub(now));
        let prompt = more >= span;
        // What was computed last may not be final yet: with asynchronous scheduling its token is not known, with drafts not accepted.
        let known = now.saturating_sub(self.gather / 8);
        let many = (known / span).saturating_sub(first).saturating_mul(span) >= self.gather;
        end / span > first && (!may_wait || prompt || many)
    }

    /// Tokens from hash to hash, as this half is given them: the most that divides the blocks of all groups.
    pub fn grain(&self) -> u32 {
        hit::grain(&self.groups)
    }
}

/// What a rank last said of its connection to the daemon.
#[derive(Debug, Clone, Default)]
pub(crate) struct RankState {
    pub(crate) epoch: u64,
    pub(crate) registered: Vec<u32>,
    pub(crate) counters: Vec<u64>,
}

/// The scheduler half. See the module.
pub struct Scheduler<P: Port> {
    settings: Settings,
    port: P,
    namespaces: Namespaces<P::Namespace>,
    hellos: Vec<Option<RankHello>>,
    ranks: Vec<RankState>,
    requests: HashMap<String, Request<P::Ticket>>,
    /// Requests with reservations, a tail or a hold, in the order in which they got one.
    listed: Vec<String>,
    loads: Vec<ActiveLoad>,
    /// Orders that not all ranks have reported, by number.
    orders: BTreeMap<u64, OpenOrder>,
    next_order: u64,
    /// Counts the engine's steps.
    steps: u64,
    /// Blocks reserved (or asked for) and not yet reported as copied.
    in_flight: u32,
    /// Blocks that the engine keeps for us.
    held: u32,
    /// Of those: blocks that it need not keep any more.
    released: Vec<u32>,
    /// The engine waits for some of them.
    missed: bool,
    /// The engine's last step computed nothing.
    idle: bool,
    /// Requests to the daemon that may not have been sent yet.
    unsent: u32,
    /// Requests of the engine whose lookups are among them.
    asking: Vec<String>,
    /// Until when (us) nothing is reserved, because the daemon had no room.
    no_room_until: u64,
    silence: Silence<P::Ticket>,
    /// Answers to lookups that were sent while this was another number are not believed any more.
    belief: u64,
    /// When (us) a request first waited for the workers to say what they hold.
    waited_for_workers: Option<u64>,
    was_connected: Option<bool>,
    port_epoch: u64,
    meta: StepMeta,
    pending_loads: Vec<LoadOrder>,
    counters: Counters,
    watch: Watch,
    notices: Notices,
}

impl<P: Port> Scheduler<P> {
    /// A scheduler half that talks to the daemon through `port`.
    pub fn new(settings: Settings, port: P) -> Self {
        let world = settings.world.max(1) as usize;
        Scheduler {
            namespaces: Namespaces::new(),
            hellos: vec![None; world],
            ranks: vec![RankState::default(); world],
            requests: HashMap::new(),
            listed: Vec::new(),
            loads: Vec::new(),
            orders: BTreeMap::new(),
            next_order: 1,
            steps: 0,
            in_flight: 0,
            held: 0,
            released: Vec::new(),
            missed: false,
            idle: false,
            unsent: 0,
            asking: Vec::new(),
            no_room_until: 0,
            silence: Silence::new(),
            belief: 0,
            waited_for_workers: None,
            was_connected: None,
            port_epoch: port.epoch(),
            meta: StepMeta::default(),
            pending_loads: Vec::new(),
            counters: Counters::default(),
            watch: Watch::default(),
            notices: Notices::default(),
            settings,
            port,
        }
    }

    /// What was chosen.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// The daemon, as this half sees it.
    pub fn port(&self) -> &P {
        &self.port
    }

    /// Why nothing is stored or loaded, whatever the daemon says; `None`: nothing is in the way.
    pub fn refusal(&self) -> Option<&str> {
        self.namespaces.refusal()
    }

    /// Gives up for good, with the reason. The engine goes on without.
    pub fn refuse(&mut self, reason: impl Into<String>) {
        let reason = reason.into();
        if self.namespaces.refuse(&reason) {
            self.notices
                .warn(format!("KV blocks are neither stored nor loaded: {reason}"));
        }
    }

    /// A request has come. `hashes` are those of the full blocks of its prompt that may be loaded (32 bytes each); `skip`: it
    /// reads no cache. What the daemon has of them is asked if that is possible now.
    pub fn on_new_request(
        &mut self,
        now: u64,
        id: &str,
        adapter: Adapter,
        hashes: &[u8],
        skip: bool,
    ) {
        self.counters.requests += 1;
        let (epoch, groups) = (self.namespaces.epoch(), self.settings.groups.len());
        self.requests
            .insert(id.to_owned(), Request::new(adapter, skip, epoch, groups));
        if !skip && !hashes.is_empty() {
            self.ask(now, id, hashes);
        }
    }

    /// The engine has dropped its prefix cache, perhaps because its weights were replaced. `clean`: no block of it is in use or
    /// findable any more. From now on this instance uses namespaces of its own; nothing that others stored is deleted.
    pub fn reset_cache(&mut self, clean: bool) {
        self.counters.resets += 1;
        let retired = self.namespaces.next_epoch(clean);
        self.meta.retired.extend(retired);
        for request in self.requests.values_mut() {
            request.tainted = true;
        }
    }

    /// Begins a step. `preempted` lost their blocks since the last one; `ids` are scheduled, with so many tokens `computed`
    /// before this step, and `ahead` more in it. The result says whose blocks (position in `ids`), of which KV-cache group, and from
    /// which block on, are wanted by [`Scheduler::capture`].
    ///
    /// Blocks that are worth something alone (those of a window, say) are wanted in the step that computes them: the engine may give
    /// them up in the next. Others stay with the request; they are wanted with those, or, if there are none such (nothing is `ahead`
    /// then), once they are computed. While a request computes token after token, they are [gathered](Settings::gather): a block at a
    /// time costs the engine and the daemon as much as several.
    pub fn begin_step(
        &mut self,
        now: u64,
        preempted: &[&str],
        ids: &[&str],
        computed: &[u32],
        ahead: &[u32],
    ) -> Vec<(usize, u32, u32)> {
        self.steps += 1;
        self.idle = ids.is_empty();
        self.note_connection();
        for id in preempted {
            self.preempt(id);
        }
        let can_reserve = self.settings.stores
            && self.refusal().is_none()
            && !self.is_silent(now)
            && self.can_reserve(now);
        let epoch = self.namespaces.epoch();
        let mut wanted = Vec::new();
        for (at, (id, computed)) in ids.iter().zip(computed).enumerate() {
            let Some(request) = self.requests.get_mut(*id) else {
                continue;
            };
            request.ran = true;
            let [last, earlier] = request.computed;
            request.computed = [*computed, last];
            if !can_reserve || !request.may_store(epoch) {
                continue;
            }
            let after = computed.saturating_add(ahead.get(at).copied().unwrap_or(0));
            let steps = [earlier, *computed, after];
            for (group, (rule, next)) in (0..).zip(self.settings.groups.iter().zip(&request.next)) {
                if !self.settings.offered.contains(&group)
                    && self.settings.wants(rule, *next, steps)
                {
                    wanted.push((at, group, *next));
                }
            }
        }
        wanted
    }

    /// Ends a step: what the workers shall do; empty when they shall do nothing.
    pub fn end_step(&mut self, now: u64) -> Vec<u8> {
        self.orders(now)
            .map(|orders| orders.encode_to_vec())
            .unwrap_or_default()
    }

    pub(crate) fn orders(&mut self, now: u64) -> Option<StepMeta> {
        self.collect_reservations(now);
        self.push_tails(now);
        self.send();
        self.asked(now);
        self.tell_finished(now);
        self.meta.loads.append(&mut self.pending_loads);
        self.meta.namespaces = self.namespaces.introduce();
        if self.meta.is_empty() {
            return None;
        }
        self.meta.version = VERSION;
        Some(std::mem::take(&mut self.meta))
    }

    /// What came back from the workers with a step's output: requests whose blocks are free of copies, requests whose loads
    /// are over, blocks that could not be loaded, requests whose loads failed, and the ranks' reports.
    ///
    /// # Errors
    /// When a report can't be read; the others have been taken.
    pub fn on_output(
        &mut self,
        sent: &[&str],
        received: &[&str],
        invalid: &[u32],
        failed: &[&str],
        reports: &[&[u8]],
    ) -> Result<(), MetaError> {
        let mut result = Ok(());
        for report in reports {
            match meta::decode::<RankReport>(report) {
                Ok(report) => self.take_report(report),
                Err(error) => result = Err(error),
            }
        }
        self.loads_failed(invalid, failed);
        for id in received {
            self.load_over(id);
        }
        for id in sent {
            if self
                .requests
                .get(*id)
                .is_some_and(|r| r.leaving == Leaving::Told)
            {
                self.requests.remove(*id);
            }
        }
        self.send_if_last();
        result
    }

    /// Whether the engine should keep stepping although it has nothing to compute.
    pub fn has_pending_work(&self) -> bool {
        // What is held is let go in a step, and a pause or a reset of the engine waits for it.
        self.held > 0
            || self
                .listed
                .iter()
                .filter_map(|id| self.requests.get(id))
                .any(|request| request.leaving != Leaving::No)
    }

    /// Counters since the start.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// The workers' counters, as each last reported them.
    pub fn rank_counters(&self) -> impl Iterator<Item = &[u64]> {
        self.ranks.iter().map(|rank| rank.counters.as_slice())
    }

    /// Takes up to so many of the blocks that the engine kept for us (see [`Scheduler::capture`]) and need not keep any more, each as
    /// often as it was asked to keep it.
    pub fn released(&mut self, most: usize) -> Vec<u32> {
        let rest = self.released.split_off(most.min(self.released.len()));
        let released = std::mem::replace(&mut self.released, rest);
        self.held = self.held.saturating_sub(released.len() as u32);
        self.missed = false;
        released
    }

    /// How many [`Scheduler::released`] would give.
    pub fn to_release(&self) -> usize {
        self.released.len()
    }

    /// So many of them should be taken now, to keep hooks short: some, or none if much else was done (`busy`). All if nothing is
    /// computed, or if the engine wants them; and no more than an eighth of what may be kept waits.
    pub fn due(&self, busy: bool) -> usize {
        if self.idle || self.missed || self.requests.is_empty() {
            return self.released.len();
        }
        let usual = if busy { 0 } else { RELEASED_AT_A_TIME };
        let most = self.settings.max_held as usize / 8;
        usual.max(self.released.len().saturating_sub(most))
    }

    /// Blocks that the engine keeps for us.
    pub fn held(&self) -> u32 {
        self.held
    }

    /// Of those: blocks that are not copied yet.
    pub(crate) fn held_for_copies(&self) -> u32 {
        self.held.saturating_sub(self.released.len() as u32)
    }

    /// Whether blocks that the engine keeps for us will be let go soon, so that it need not take others from its requests.
    pub fn lets_go_soon(&mut self) -> bool {
        self.missed = !self.released.is_empty();
        let soon = self.port.connected() && !self.silence.lasts();
        self.held > 0 && soon || self.missed
    }

    /// Most blocks that the engine keeps for us.
    pub fn limit_held(&mut self, most: u32) {
        self.settings.max_held = most;
    }

    /// The engine need not keep these any more.
    pub(crate) fn let_go(&mut self, blocks: impl IntoIterator<Item = u32>) {
        self.released.extend(blocks);
    }

    /// Requests known, blocks in flight, loads under way: all zero when the engine is idle.
    pub fn load_and_hold(&self) -> (usize, u32, usize) {
        (self.requests.len(), self.in_flight, self.loads.len())
    }

    /// Takes what people should read.
    pub fn notices(&mut self) -> Vec<Notice> {
        self.notices.drain()
    }

    /// Whether there is something to read.
    pub fn has_notices(&self) -> bool {
        !self.notices.is_empty()
    }

    fn take_report(&mut self, report: RankReport) {
        let Some(rank) = self.ranks.get_mut(report.rank as usize) else {
            return;
        };
        rank.epoch = report.epoch;
        rank.registered = report.registered;
        if !report.counters.is_empty() {
            rank.counters = report.counters;
        }
        if let Some(hello) = report.hello {
            self.on_hello(hello);
        }
        for order in report.done {
            self.order_done(order);
        }
    }

    fn note_connection(&mut self) {
        let epoch = self.port.epoch();
        if epoch != self.port_epoch {
            self.port_epoch = epoch;
            self.other_session();
        }
        let connected = self.port.connected();
        let first = self.was_connected.is_none();
        if self.was_connected == Some(connected) {
            return;
        }
        self.was_connected = Some(connected);
        match (first, connected) {
            (true, true) => self.notices.info("attached to the daemon"),
            (false, true) => self.notices.info("attached to the daemon again"),
            (true, false) => self
                .notices
                .warn("no daemon yet; the engine goes on without and tries again by itself"),
            (false, false) => self
                .notices
                .warn("the daemon is gone; the engine goes on without and tries again by itself"),
        }
    }

    /// Another session, perhaps with another daemon: what the old one promised is void, and what the ranks said of their
    /// connections is old.
    fn other_session(&mut self) {
        self.silence.forget();
        self.belief += 1;
        for request in self.requests.values_mut() {
            request.forget_lease();
        }
        for load in &mut self.loads {
            load.forget_lease();
        }
        for rank in &mut self.ranks {
            rank.epoch = 0;
        }
        self.meta.report = true;
    }

    /// The request has lost its blocks: what was asked for them is given up. Workers are told to finish their copies.
    fn preempt(&mut self, id: &str) {
        let Some(request) = self.requests.get_mut(id) else {
            return;
        };
        let (asked, held) = request.give_up_reservations();
        if asked > 0 {
            self.counters.preempted_reservations += 1;
        }
        self.flew(asked);
        self.let_go(held);
        self.meta.preempted.push(id.to_owned());
        self.give_back_lease(id);
        if let Some(request) = self.requests.get_mut(id) {
            request.restart();
        }
    }
}
