//! The half in each of the engine's workers: carries out the orders of the scheduler half.
//!
//! The engine's thread only queues and collects; copies run on threads of this half (`kvd-copy-N`, `kvd-load-N`). What that
//! rests on: a block with an order is not written, moved or given to another request until this half has said that no copy
//! of it is under way: by reporting the request as sent (or received), or by returning from [`Worker::begin`] of the step that
//! takes the blocks away. Deliberately absent: decisions about what is stored or loaded, tensors, Python.

mod queue;
mod state;
mod tasks;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use kvd_client::{Link, Registration};
use kvd_core::geometry::{Cut, GroupGeometry};
use kvd_device::{Device, Pages, Point, StreamHandle};
use prost::Message;

pub use state::{Counters, Results};

use crate::fleet;
use crate::meta::{
    self, LoadOrder, MetaError, RankHello, RankReport, StepMeta, StoreOrder, VERSION,
};
use crate::notice::{Notice, Notices};
use crate::observed::Observed;
use crate::scheduler::layouts;
use state::Shared;
use tasks::{Copier, Joined, LoadTask, StoreTask};

/// A monotonic clock in microseconds.
pub type Clock = Arc<dyn Fn() -> u64 + Send + Sync>;

/// What can be chosen.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Threads that copy out of the engine, and as many that copy into it.
    pub threads: usize,
    /// Most tasks waiting for a thread; beyond that stores are given up and loads fail.
    pub queue: usize,
    /// How long the daemon may take for its first answer to a load, from the order on, and then for each further one.
    pub load_deadline: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            threads: 2,
            queue: 4096,
            load_deadline: Duration::from_secs(2),
        }
    }
}

/// The worker half. See the module.
pub struct Worker {
    settings: Settings,
    link: Arc<Link>,
    device: Arc<dyn Device>,
    clock: Clock,
    hello: RankHello,
    told_hello: bool,
    /// Connection and registered namespaces, as last reported.
    told_state: Option<(u64, Vec<u32>)>,
    /// The KV cache, group by group; empty: this rank refuses.
    pages: Vec<Pages>,
    paused: bool,
    device_failed: bool,
    /// Per namespace, this rank's share of each group.
    namespaces: HashMap<u32, Vec<Arc<Joined>>>,
    shared: Arc<Shared>,
    copier: Copier,
    stores: Vec<StoreOrder>,
    loads: Vec<LoadOrder>,
    notices: Notices,
}

impl Worker {
    /// A worker half. `hello` says what it holds; `pages` is its KV cache, one for each group of `hello`, or none if it refuses.
    /// The threads begin now.
    ///
    /// # Errors
    /// When the system gives no threads.
    pub fn new(
        settings: Settings,
        link: Arc<Link>,
        device: Arc<dyn Device>,
        clock: Clock,
        hello: RankHello,
        pages: Vec<Pages>,
    ) -> std::io::Result<Self> {
        let shared = Arc::new(Shared::new(hello.fails_as_a_whole()));
        let copier = Copier::start(&settings, &link, &device, &clock, &shared)?;
        Ok(Worker {
            settings,
            link,
            device,
            clock,
            hello,
            told_hello: false,
            told_state: Some((0, Vec::new())),
            pages,
            paused: false,
            device_failed: false,
            namespaces: HashMap::new(),
            shared,
            copier,
            stores: Vec::new(),
            loads: Vec::new(),
            notices: Notices::default(),
        })
    }

    /// What this rank says of itself.
    pub fn hello(&self) -> &RankHello {
        &self.hello
    }

    /// Begins a step, before anything is overwritten: takes the orders and waits for the copies out of blocks that are taken
    /// away in this step.
    ///
    /// # Errors
    /// When the orders can't be read.
    pub fn begin(&mut self, orders: &[u8]) -> Result<(), MetaError> {
        let meta: StepMeta = meta::decode(orders)?;
        for request in &meta.preempted {
            self.shared.wait_for_stores(request);
        }
        if meta.stop {
            for order in self.stores.drain(..) {
                for _ in order.parts() {
                    self.shared.store_over(&order.request, order.order);
                }
            }
            self.shared.wait_for_all_stores();
        }
        for intro in &meta.namespaces {
            if let Err(error) = self.join(intro) {
                // Its loads will fail and its stores will be given up.
                self.notices.warn(error);
            }
        }
        for index in &meta.retired {
            self.namespaces.remove(index);
        }
        for order in &meta.stores {
            for _ in order.parts() {
                self.shared.open_store(&order.request);
            }
        }
        if meta.report {
            self.told_state = None;
        }
        for order in &meta.loads {
            self.shared.open_load(&order.request);
        }
        self.shared.finish(meta.finish);
        self.stores.extend(meta.stores);
        self.loads.extend(meta.loads);
        Ok(())
    }

    fn join(&mut self, intro: &meta::NamespaceIntro) -> Result<(), String> {
        let rank = self.hello.rank;
        if self.pages.is_empty() {
            return Ok(());
        }
        let misfit = |error: &dyn std::fmt::Display| {
            format!("a namespace of the scheduler does not fit this worker: {error}")
        };
        if intro.groups.len() != self.hello.groups.len() || self.pages.len() != intro.groups.len() {
            return Err(misfit(&"another number of KV-cache groups"));
        }
        let slot = self
            .link
            .register(Registration {
                record: intro.record.clone(),
                groups: layouts(&intro.groups, Some(rank)),
            })
            .map_err(|error| misfit(&error))?;
        let mut joined = Vec::new();
        for (group, own) in intro.groups.iter().zip(&self.hello.groups) {
            let geometry = GroupGeometry {
                layers: group.layer_bounds.last().copied().unwrap_or(0),
                heads: group.head_bounds.last().copied().unwrap_or(0),
                ..fleet::geometry(own).map_err(|error| misfit(&error))?
            };
            let cut = Cut::new(&group.layer_bounds, &group.head_bounds, &geometry)
                .map_err(|error| misfit(&error))?;
            let part = group
                .parts
                .get(rank as usize)
                .copied()
                .filter(|part| *part < cut.parts() && group.group == own.group)
                .ok_or_else(|| misfit(&"no part for this rank"))?;
            joined.push(Arc::new(Joined {
                slot: slot.clone(),
                group: group.group,
                geometry,
                cut,
                part,
                rank,
                replicas: fleet::replicas(group, part),
            }));
        }
        self.namespaces.insert(intro.index, joined);
        Ok(())
    }

    /// This rank's share of a group of a namespace, and where it lies.
    fn share(&self, namespace: u32, group: u32) -> Option<(Arc<Joined>, &Pages)> {
        let joined = self.namespaces.get(&namespace)?;
        let at = joined.iter().position(|joined| joined.group == group)?;
        Some((joined[at].clone(), self.pages.get(at)?))
    }

    /// Where the engine's work on this stream is now. If that can't be told, nothing is copied: loads fail, stores are given up.
    fn point(&mut self, stream: StreamHandle) -> Point {
        if self.paused {
            return Point::failed(kvd_device::Error::Failed("the KV cache is away".into()));
        }
        self.device.point(stream).unwrap_or_else(|error| {
            if !std::mem::replace(&mut self.device_failed, true) {
                self.notices.warn(format!(
                    "the device failed, and what it was to store or load was not: {error}"
                ));
            }
            Point::failed(error)
        })
    }

    /// Whether there are loads for [`Worker::start_loads`].
    pub fn has_loads(&self) -> bool {
        !self.loads.is_empty()
    }

    /// Whether there are stores for [`Worker::start_stores`].
    pub fn has_stores(&self) -> bool {
        !self.stores.is_empty()
    }

    /// Waits until no copy is under way, and lets none begin until [`Worker::resume`]: the KV cache may be unmapped meanwhile, and
    /// mapped again at the same addresses.
    pub fn pause(&mut self) {
        self.paused = true;
        // What was ordered and not begun fails, or is given up.
        self.start_loads(StreamHandle::DEFAULT);
        self.start_stores(StreamHandle::DEFAULT);
        self.shared.wait_idle();
    }

    /// Copies may begin again.
    pub fn resume(&mut self) {
        self.paused = false;
    }

    /// Hands this step's loads to the threads. `stream` is what the engine computes on: blocks are written when what it was asked
    /// up to now is done.
    pub fn start_loads(&mut self, stream: StreamHandle) {
        if self.loads.is_empty() {
            return;
        }
        let after = self.point(stream);
        for order in std::mem::take(&mut self.loads) {
            let Some((joined, pages)) = self.share(order.namespace, order.group) else {
                self.shared.load_failed(&order.request, &order.blocks);
                continue;
            };
            let ordered = (self.clock)();
            let task = Box::new(LoadTask {
                joined,
                pages: pages.clone(),
                after: after.clone(),
                ordered,
                until: ordered + self.settings.load_deadline.as_micros() as u64,
                order,
            });
            if let Err(task) = self.copier.load(task) {
                self.shared
                    .load_failed(&task.order.request, &task.order.blocks);
            }
        }
    }

    /// Hands this step's stores to the threads: the forward pass that completes their blocks is over, or asked of `stream`.
    pub fn start_stores(&mut self, stream: StreamHandle) {
        if self.stores.is_empty() {
            return;
        }
        let after = self.point(stream);
        for order in std::mem::take(&mut self.stores) {
            let order = Arc::new(order);
            for (group, range) in order.parts() {
                match self.share(order.namespace, group) {
                    Some((joined, pages)) => {
                        let (pages, clock) = (pages.clone(), self.clock.clone());
                        let part = (order.clone(), range);
                        let task = StoreTask::new(joined, pages, part, after.clone(), clock);
                        self.copier.store(task, &self.link, &self.shared);
                    }
                    None => self.shared.store_over(&order.request, order.order),
                }
            }
        }
    }

    /// What is over since the last call: each request once.
    pub fn results(&mut self) -> Results {
        self.shared.results()
    }

    /// What the scheduler half should know, if there is something new.
    pub fn report(&mut self) -> Option<Vec<u8>> {
        self.shared.poll_commits(&self.link);
        let state = self.state();
        let done = self.shared.take_done();
        let same = self.told_state.as_ref() == Some(&state);
        if self.told_hello && done.is_empty() && same {
            return None;
        }
        let report = RankReport {
            version: VERSION,
            rank: self.hello.rank,
            epoch: state.0,
            registered: state.1.clone(),
            done,
            hello: (!self.told_hello).then(|| self.hello.clone()),
            counters: self.shared.counters().values(),
        };
        self.told_hello = true;
        self.told_state = Some(state);
        Some(report.encode_to_vec())
    }

    /// The connection, and the namespaces that are registered on it.
    fn state(&self) -> (u64, Vec<u32>) {
        if !self.link.connected() {
            return (0, Vec::new());
        }
        let epoch = self.link.epoch();
        let mut registered: Vec<u32> = self
            .namespaces
            .iter()
            .filter(|(_, joined)| {
                let slot = joined.first().map(|joined| &joined.slot);
                let current = slot.and_then(|slot| slot.current());
                current.is_some_and(|registered| registered.epoch == epoch)
            })
            .map(|(index, _)| *index)
            .collect();
        registered.sort_unstable();
        (epoch, registered)
    }

    /// What has happened since the last call, if anything.
    pub fn observed(&self) -> Option<Observed> {
        self.shared.poll_commits(&self.link);
        self.shared.observed()
    }

    /// Counters since the start.
    pub fn counters(&self) -> Counters {
        self.shared.counters()
    }

    /// Takes what people should read.
    pub fn notices(&mut self) -> Vec<Notice> {
        self.notices.drain()
    }

    /// Waits until no copy is under way or queued. Without further orders the KV cache may be unmapped and mapped again.
    pub fn wait_idle(&self) {
        self.shared.wait_idle();
    }

    /// Ends the threads, after the copies that are under way; what is queued is given up or fails.
    pub fn stop(&mut self) {
        self.copier.stop();
        self.namespaces.clear();
        self.pages.clear();
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.stop();
    }
}
