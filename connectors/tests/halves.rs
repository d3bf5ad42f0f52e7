//! Both halves together, over real links, against the client's fake daemon: what an engine would do step by step is scripted
//! here. One rank unless a test says otherwise, and blocks of the client's test support.

#[path = "../../kvd/client/tests/common/blocks.rs"]
#[allow(
    dead_code,
    reason = "the client's test support; a part of it is used here"
)]
mod blocks;
#[path = "../../kvd/client/tests/common/mod.rs"]
mod common;

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

use blocks::{Buffers, hashes};
use common::{FakeDaemon, LOAD, LONG, RESERVE, Script};
use kvd_client::{Identity, Link, LinkConfig, Role, request};
use kvd_connectors::meta::{
    GroupIntro, LoadOrder, NamespaceIntro, RankGroup, RankHello, StepMeta, StoreEntry, StoreOrder,
    VERSION,
};
use kvd_connectors::scheduler::{Adapter, Match, Scheduler, Settings};
use kvd_connectors::worker::{Results, Settings as WorkerSettings, Worker};
use kvd_core::{GroupKind, GroupRule};
use kvd_device::{
    Device, Error, HostDevice, LoadJob, Loaded, Passed, Point, StoreJob, StreamHandle,
};
use kvd_wire::session::Ping;
use prost::Message;

const COMMIT: u32 = 5;

fn link(socket: &Path, role: Role, rank: u32, world: u32) -> Link {
    let identity = Identity {
        role,
        rank,
        world,
        ..Identity::script("test")
    };
    Link::start(LinkConfig::new(socket.to_owned(), identity)).expect("a link")
}

fn hello(rank: u32, world: u32) -> RankHello {
    RankHello {
        version: VERSION,
        rank,
        world,
        stage: 0,
        refusal: String::new(),
        encoding: "test".into(),
        scales: String::new(),
        machine: String::new(),
        groups: vec![RankGroup {
            group: 0,
            kind: "full".into(),
            layers: 2,
            layer_names: vec!["layer.0".into(), "layer.1".into()],
            head_first: 0,
            heads: 2,
            heads_total: 2,
            block_tokens: 16,
            page_tokens: 16,
            cell_bytes: 128,
            window: 0,
        }],
    }
}

fn facts() -> Vec<(String, String)> {
    ["tenant", "model", "weights", "kv_dtype", "hash"]
        .map(|name| (name.to_owned(), "x".to_owned()))
        .to_vec()
}

/// An engine of one rank whose KV cache has one block.
struct Engine {
    scheduler: Scheduler<Link>,
    worker: Worker,
    worker_link: Arc<Link>,
    cache: Buffers,
    now: Arc<AtomicU64>,
    results: Results,
}

impl Engine {
    fn start(socket: &Path, fill: u8, load_deadline: Duration) -> Engine {
        Self::start_on(Arc::new(HostDevice), socket, fill, load_deadline)
    }

    fn start_on(
        device: Arc<dyn Device>,
        socket: &Path,
        fill: u8,
        load_deadline: Duration,
    ) -> Engine {
        let cache = Buffers::new(1, |_| fill);
        let now = Arc::new(AtomicU64::new(0));
        let clock = now.clone();
        let settings = WorkerSettings {
            load_deadline,
            ..WorkerSettings::default()
        };
        let worker_link = Arc::new(link(socket, Role::Worker, 0, 1));
        let worker = Worker::new(
            settings,
            worker_link.clone(),
            device,
            Arc::new(move || clock.load(Ordering::Relaxed)),
            hello(0, 1),
            vec![cache.refs()[0].at.clone()],
        )
        .expect("threads");
        let settings = Settings {
            groups: vec![GroupRule::new(GroupKind::Full, 16, None).expect("a rule")],
            lookup_deadline: u64::MAX,
            hold_deadline: u64::MAX,
            ..Settings::default()
        };
        let mut scheduler = Scheduler::new(settings, link(socket, Role::Scheduler, 0, 1));
        scheduler.on_hello(hello(0, 1));
        scheduler.set_facts(facts(), "test");
        Engine {
            scheduler,
            worker,
            worker_link,
            cache,
            now,
            results: Results::default(),
        }
    }

    /// One step of the engine: orders down, results and reports up.
    fn step(&mut self, ids: &[&str], computed: &[u32]) -> Vec<(usize, u32, u32)> {
        let now = self.now.load(Ordering::Relaxed);
        let wanted = self.scheduler.begin_step(now, &[], ids, computed, &[]);
        if wanted.is_empty() {
            self.finish_step();
        }
        wanted
    }

    fn finish_step(&mut self) {
        let now = self.now.load(Ordering::Relaxed);
        let orders = self.scheduler.end_step(now);
        if !orders.is_empty() {
            self.worker.begin(&orders).expect("orders");
        }
        self.worker.start_loads(StreamHandle::DEFAULT);
        self.worker.start_stores(StreamHandle::DEFAULT);
        let results = self.worker.results();
        let report = self.worker.report();
        let texts = |list: &[String]| list.to_vec();
        let (sent, received) = (texts(&results.sent), texts(&results.received));
        let sent: Vec<&str> = sent.iter().map(String::as_str).collect();
        let received: Vec<&str> = received.iter().map(String::as_str).collect();
        let reports: Vec<&[u8]> = report.iter().map(Vec::as_slice).collect();
        self.scheduler
            .on_output(&sent, &received, &results.invalid, &[], &reports)
            .expect("reports");
        self.results.sent.extend(results.sent);
        self.results.received.extend(results.received);
        self.results.invalid.extend(results.invalid);
    }

    /// Steps until something is true; other threads do the rest meanwhile.
    fn until(&mut self, what: &str, done: impl Fn(&Engine) -> bool) {
        for _ in 0..2_000_000 {
            if done(self) {
                return;
            }
            self.step(&[], &[]);
            std::thread::yield_now();
        }
        panic!("never: {what}");
    }

    /// Runs a request whose one block is computed; it is to be stored.
    fn compute(&mut self, id: &str, at: u32) {
        self.scheduler
            .on_new_request(0, id, Adapter::Base, &[], true);
        self.step(&[id], &[0]);
        let wanted = self.scheduler.finish_from(0, id, 16);
        assert_eq!(wanted, [(0, 0)]);
        let hash = hashes(at..at + 1);
        self.scheduler.last_blocks(id, 0, hash.clone(), [0]);
        assert!(self.scheduler.finished(0, id));
    }

    /// The same, and waits until it is stored.
    fn compute_and_finish(&mut self, id: &str, at: u32) {
        self.compute(id, at);
        let name = id.to_owned();
        self.until("it is reported", |engine| {
            engine.results.sent.contains(&name)
        });
        assert_eq!(
            self.results.sent.iter().filter(|sent| **sent == id).count(),
            1
        );
    }

    /// Asks for one block and orders the load.
    fn order_load(&mut self, id: &str, at: u32) {
        let hash = hashes(at..at + 1);
        self.scheduler
            .on_new_request(0, id, Adapter::Base, &hash, false);
        for _ in 0..2_000_000 {
            match self.scheduler.matched(0, id, 0) {
                Match::Blocks(1) => {
                    self.scheduler.allocated(id, 1, &[vec![0]]);
                    return;
                }
                Match::NeedHashes => self.scheduler.ask(0, id, &hash),
                Match::Wait => {
                    self.finish_step();
                    std::thread::yield_now();
                }
                other => panic!("{other:?}"),
            }
        }
        panic!("no answer");
    }

    fn connect(&mut self) {
        self.until("the scheduler is attached", |engine| {
            engine.scheduler.port().connected()
        });
    }
}

fn daemon(script: Script) -> (tempfile::TempDir, std::path::PathBuf, FakeDaemon) {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("kvd.sock");
    let daemon = FakeDaemon::start(&path, script);
    (dir, path, daemon)
}

#[test]
fn what_one_engine_computed_another_loads() {
    let (_dir, path, daemon) = daemon(Script::default());
    let mut first = Engine::start(&path, 42, LONG);
    first.connect();
    first.compute_and_finish("a", 0);
    daemon.expect(COMMIT);
    drop(first);
    let mut second = Engine::start(&path, 0, LONG);
    second.connect();
    // The worker hears of its namespace in the same step in which it is to load.
    second.order_load("b", 0);
    second.until("it is loaded", |engine| !engine.results.received.is_empty());
    assert_eq!(second.results.received, ["b"]);
    assert!(second.results.invalid.is_empty());
    assert!(second.cache.holds(0, 42));
    assert_eq!(second.worker.counters().loaded_blocks, 1);
    assert_eq!(second.scheduler.load_and_hold().2, 0);
}

#[test]
fn a_silent_daemon_fails_a_load_and_holds_nothing() {
    let (_dir, path, daemon) = daemon(Script::default());
    let mut engine = Engine::start(&path, 42, Duration::from_millis(50));
    engine.connect();
    engine.compute_and_finish("a", 0);
    daemon.script(|script| script.hold.push(LOAD));
    engine.order_load("b", 0);
    engine.until("it has failed", |engine| {
        !engine.results.received.is_empty()
    });
    assert_eq!(engine.results.invalid, [0]);
    assert_eq!(engine.scheduler.counters().load_failures, 1);
    daemon.let_go();
}

#[test]
fn a_lost_daemon_fails_a_load_at_once_and_stores_resume_by_themselves() {
    let (_dir, path, daemon) = daemon(Script::default());
    let mut engine = Engine::start(&path, 42, LONG);
    engine.connect();
    engine.compute_and_finish("a", 0);
    daemon.script(|script| script.hold.push(LOAD));
    engine.order_load("b", 0);
    engine.step(&[], &[]);
    daemon.expect(LOAD);
    daemon.hang_up();
    engine.until("it has failed", |engine| {
        !engine.results.received.is_empty()
    });
    assert_eq!(engine.results.invalid, [0]);
    engine.connect();
    engine.compute_and_finish("c", 7);
    assert_eq!(engine.scheduler.counters().hold_timeouts, 0);
}

/// A fake device: it copies as the host does, and what an engine computes is over when the test says so.
#[derive(Clone, Default)]
struct FakeStream(Arc<(Mutex<Work>, Condvar)>);

#[derive(Default)]
struct Work {
    over: bool,
    broken: bool,
    /// How often somebody waited for it to be over.
    waits: u32,
    /// Copies that did not.
    early: u32,
}

impl FakeStream {
    fn work(&self) -> MutexGuard<'_, Work> {
        self.0.0.lock().expect("nobody panics")
    }

    fn set(&self, over: bool) {
        self.work().over = over;
        self.0.1.notify_all();
    }

    fn copies(&self) {
        let mut work = self.work();
        work.early += u32::from(!work.over);
    }
}

impl Passed for FakeStream {
    fn wait(&self) -> Result<(), Error> {
        let mut work = self.work();
        work.waits += 1;
        let waited = self.0.1.wait_timeout_while(work, LONG, |work| !work.over);
        assert!(!waited.expect("nobody panics").1.timed_out());
        Ok(())
    }
}

impl Device for FakeStream {
    fn name(&self) -> &'static str {
        "fake"
    }

    fn register(&self, _: usize, _: usize) -> Result<Option<kvd_arena::Registered>, Error> {
        Ok(None)
    }

    fn point(&self, _: StreamHandle) -> Result<Point, Error> {
        match self.work().broken {
            true => Err(Error::Failed("broken".into())),
            false => Ok(Point::new(self.clone())),
        }
    }

    fn store(&self, jobs: &[StoreJob<'_>], crcs: &mut Vec<u64>) -> Result<(), Error> {
        self.copies();
        HostDevice.store(jobs, crcs)
    }

    fn load(&self, jobs: &[LoadJob<'_>], results: &mut Vec<Loaded>) -> Result<(), Error> {
        self.copies();
        HostDevice.load(jobs, results)
    }
}

#[test]
fn copies_wait_for_what_the_engine_computes() {
    let (_dir, path, daemon) = daemon(Script::default());
    let stream = FakeStream::default();
    let mut engine = Engine::start_on(Arc::new(stream.clone()), &path, 42, LONG);
    engine.connect();
    engine.compute("a", 0);
    engine.until("a store waits", |_| stream.work().waits == 1);
    assert!(engine.results.sent.is_empty());
    stream.set(true);
    engine.until("it is stored", |engine| !engine.results.sent.is_empty());
    stream.set(false);
    engine.order_load("b", 0);
    engine.step(&[], &[]);
    // The daemon is asked meanwhile.
    daemon.expect(LOAD);
    engine.until("a load waits", |_| stream.work().waits == 2);
    assert!(engine.results.received.is_empty());
    stream.set(true);
    engine.until("it is loaded", |engine| !engine.results.received.is_empty());
    assert!(engine.results.invalid.is_empty() && engine.cache.holds(0, 42));
    assert_eq!(stream.work().early, 0);
}

/// The scheduler half has failed: what follows may overwrite any block, so that nothing may be under way any more.
#[test]
fn last_orders_are_taken_when_no_store_is_under_way() {
    let (_dir, path, _daemon) = daemon(Script::default());
    let stream = FakeStream::default();
    let mut engine = Engine::start_on(Arc::new(stream.clone()), &path, 42, LONG);
    engine.connect();
    engine.compute("a", 0);
    engine.until("a store waits", |_| stream.work().waits == 1);
    let last = StepMeta {
        version: VERSION,
        stop: true,
        loads: vec![lost("b", &[3])],
        finish: vec!["c".into()],
        ..StepMeta::default()
    };
    std::thread::scope(|threads| {
        threads.spawn(|| stream.set(true));
        engine.worker.begin(&last.encode_to_vec()).expect("orders");
    });
    engine.worker.start_loads(StreamHandle::DEFAULT);
    let results = engine.worker.results();
    assert_eq!(results.sent, ["a", "c"]);
    assert_eq!(
        (results.received, results.invalid),
        (vec!["b".into()], vec![3])
    );
    assert_eq!(engine.worker.counters().copied_blocks, 1);
}

/// An order to load that no namespace can serve.
fn lost(request: &str, blocks: &[u32]) -> LoadOrder {
    LoadOrder {
        request: request.into(),
        namespace: u32::MAX,
        group: 0,
        hashes: Vec::new(),
        blocks: blocks.to_vec(),
    }
}

#[test]
fn nothing_is_copied_while_the_cache_may_be_unmapped_or_the_device_is_broken() {
    let (_dir, path, _daemon) = daemon(Script::default());
    let stream = FakeStream::default();
    stream.set(true);
    let mut engine = Engine::start_on(Arc::new(stream.clone()), &path, 42, LONG);
    engine.connect();
    engine.compute_and_finish("a", 0);
    assert_eq!(engine.worker.counters().copied_blocks, 1);
    engine.worker.pause();
    engine.order_load("b", 0);
    engine.until("it has failed", |engine| {
        !engine.results.received.is_empty()
    });
    assert_eq!(std::mem::take(&mut engine.results.invalid), [0]);
    engine.worker.resume();
    stream.work().broken = true;
    engine.order_load("c", 0);
    engine.until("it has failed", |engine| engine.results.received.len() == 2);
    assert_eq!(engine.results.invalid, [0]);
    engine.compute_and_finish("d", 1);
    let counters = engine.worker.counters();
    assert_eq!((counters.copied_blocks, counters.dropped_blocks), (1, 1));
    assert_eq!(engine.worker.notices().len(), 1, "said once");
    stream.work().broken = false;
    engine.order_load("e", 0);
    engine.until("it is loaded", |engine| engine.results.received.len() == 3);
    assert_eq!(engine.worker.counters().loaded_blocks, 1);
}

/// Aborts that the daemon gets when a worker has another connection than its order says.
fn aborts_of_stale_orders(change: fn(&mut StoreOrder)) -> Vec<Vec<u32>> {
    let (_dir, path, daemon) = daemon(Script::default());
    let mut engine = Engine::start(&path, 42, LONG);
    engine.connect();
    engine.compute_and_finish("a", 0);
    let copied = engine.worker.counters().copied_blocks;
    engine
        .scheduler
        .on_new_request(0, "b", Adapter::Base, &[], true);
    assert_eq!(engine.step(&["b"], &[16]), [(0, 0, 0)]);
    engine
        .scheduler
        .capture(0, "b", [(0, hashes(9..10).into(), vec![0])], []);
    daemon.expect(RESERVE);
    // The scheduler has its slots, then the worker's connection is another one.
    for _ in 0..2_000_000 {
        if engine.scheduler.counters().orders == 2 {
            break;
        }
        let orders = engine.scheduler.end_step(0);
        if orders.is_empty() {
            std::thread::yield_now();
            continue;
        }
        let mut meta = StepMeta::decode(orders.as_slice()).expect("orders");
        meta.stores[0].epochs = vec![77];
        change(&mut meta.stores[0]);
        engine.worker.begin(&meta.encode_to_vec()).expect("orders");
    }
    engine.worker.start_stores(StreamHandle::DEFAULT);
    engine.worker.wait_idle();
    assert_eq!(engine.worker.counters().copied_blocks, copied);
    assert_eq!(engine.worker.counters().dropped_blocks, 1);
    // Whatever was sent on this connection has come once this is answered.
    let ping = request::Body::Ping(Ping {});
    let ping = engine.worker_link.submit(ping).expect("sent");
    engine.worker_link.wait(ping, LONG).expect("answered");
    let aborts = daemon.seen().into_iter().filter_map(|body| match body {
        request::Body::Abort(abort) => Some(abort.slots),
        _ => None,
    });
    aborts.collect()
}

#[test]
fn slots_of_an_earlier_connection_are_not_written_and_given_back_to_the_daemon_that_gave_them() {
    assert_eq!(aborts_of_stale_orders(|_| {}), [[1]]);
}

#[test]
fn slots_of_another_start_of_the_daemon_are_not_written_and_not_given_back() {
    let none: [Vec<u32>; 0] = [];
    let other = |order: &mut StoreOrder| order.incarnation = vec![9; 16];
    assert_eq!(aborts_of_stale_orders(other), none);
}

#[test]
fn replicas_take_turns_by_hash() {
    let (_dir, path, daemon) = daemon(Script::default());
    let mut written = 0;
    for rank in 0..2 {
        let cache = Buffers::new(1, |_| 1);
        let mut worker = Worker::new(
            WorkerSettings::default(),
            Arc::new(link(&path, Role::Worker, rank, 2)),
            Arc::new(HostDevice),
            Arc::new(|| 0),
            hello(rank, 2),
            vec![cache.refs()[0].at.clone()],
        )
        .expect("threads");
        let mut order = StoreOrder {
            order: 1,
            request: "a".into(),
            namespace: 3,
            groups: vec![0],
            counts: vec![1],
            hashes: hashes(0..1),
            epochs: vec![1, 1],
            ..StoreOrder::default()
        };
        order.push(StoreEntry {
            block: 0,
            slot: 0,
            generation: 1,
            offset: 0,
        });
        let meta = StepMeta {
            version: VERSION,
            namespaces: vec![NamespaceIntro {
                index: 3,
                record: b"record".to_vec(),
                groups: vec![GroupIntro {
                    group: 0,
                    layer_bounds: vec![0, 2],
                    head_bounds: vec![0, 2],
                    parts: vec![0, 0],
                }],
            }],
            stores: vec![order],
            finish: vec!["a".into()],
            ..StepMeta::default()
        };
        worker.begin(&meta.encode_to_vec()).expect("orders");
        worker.start_stores(StreamHandle::DEFAULT);
        worker.wait_idle();
        assert_eq!(worker.results().sent, ["a"], "both report, one writes");
        let counters = worker.counters();
        written += counters.copied_blocks + counters.dropped_blocks;
    }
    assert_eq!(written, 1);
    drop(daemon);
}

#[test]
fn what_can_not_be_loaded_is_still_over() {
    let (_dir, path, _daemon) = daemon(Script::default());
    let mut worker = Worker::new(
        WorkerSettings::default(),
        Arc::new(link(&path, Role::Worker, 0, 1)),
        Arc::new(HostDevice),
        Arc::new(|| 0),
        hello(0, 1),
        Vec::new(),
    )
    .expect("threads");
    let meta = StepMeta {
        version: VERSION,
        loads: vec![lost("a", &[4, 5])],
        ..StepMeta::default()
    };
    worker.begin(&meta.encode_to_vec()).expect("orders");
    worker.start_loads(StreamHandle::DEFAULT);
    let results = worker.results();
    assert_eq!(results.received, ["a"]);
    assert_eq!(results.invalid, [4, 5]);
    assert!(worker.begin(&[1, 2, 3]).is_err());
}
