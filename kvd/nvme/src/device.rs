//! The named thread that owns a store and its device: takes operations from a bounded queue, turns the store, tells what is over.
//!
//! Overflow of the queue: the operation is answered `Off` at once, and its memory given back. The thread sleeps in its adapter, until a
//! completion, a new operation or a deadline of the store. Deliberately absent: what is stored where (`kvd-core`).

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvd_core::tier::{OpId, ReadBlock, Recovered, StoreDone, StoreError, StoreOp, StoreShape};
use kvd_core::{GroupGeometry, NamespaceId};
use rustix::event::Timespec;
use rustix::fs::OFlags;

use crate::io::{
    ArenaRange, Backing, BlockIo, Chosen, DiskIo, FILE_NAME, IoOptions, OpenErrorKind, PAGE, Waker,
};
use crate::store::{
    Counters, Found, OpenError, RecoveryReport, START_BYTES, Start, Store, StoreConfig,
};

/// Longest wait of the thread: then it looks whether it should end.
const NAP: Duration = Duration::from_secs(1);
/// How long another daemon's lock is waited for.
const LOCK_WITHIN: Duration = Duration::from_secs(5);
/// Most empty lists that wait for answers.
const LISTS: usize = 64;
/// How long an orderly end may take.
const CLOSE_WITHIN: Duration = Duration::from_secs(5);

/// What a device is told.
#[derive(Debug, Clone)]
pub struct DeviceConfig {
    /// A directory, or a block device.
    pub path: PathBuf,
    /// How bytes get there.
    pub io: IoOptions,
    /// The store on it.
    pub store: StoreConfig,
    /// For tests and benches: a file that says which faults happen.
    pub faults: Option<PathBuf>,
}

/// What a device tells while it runs.
#[derive(Debug, Clone)]
pub enum DeviceNews {
    /// Operations that are over. [`Device::give_back`] takes the list again.
    Done(Vec<StoreDone>),
    /// It was switched off because it fails, or on again.
    Switched(bool),
}

/// What people should know of a device.
#[derive(Debug, Clone)]
pub struct DeviceStatus {
    /// Its path.
    pub path: PathBuf,
    /// Bytes of the store.
    pub bytes: u64,
    /// Where in it the first segment begins, bytes.
    pub segments_at: u64,
    /// Which adapter, and why.
    pub chosen: Chosen,
    /// What was found when it was opened.
    pub recovered: RecoveryReport,
    /// How long opening it took.
    pub opened_in: Duration,
    /// Whether it is switched off.
    pub off: bool,
    /// Blocks that a restart would find.
    pub blocks: u64,
    /// Everything that it counts.
    pub counters: Counters,
}

type Job = (StoreOp, Option<ArenaRange>);
type Shared = Arc<Mutex<DeviceStatus>>;

/// A store that runs on a thread of its own. Dropping it ends the thread, after what is under way.
pub struct Device {
    queue: Option<SyncSender<Job>>,
    lists: SyncSender<Vec<StoreDone>>,
    waker: Option<Waker>,
    stop: Arc<AtomicBool>,
    status: Shared,
    thread: Option<JoinHandle<()>>,
}

/// What the thread has. It outlives a panic.
struct Runner<N> {
    store: Store<DiskIo>,
    /// Answers that are not told yet.
    done: Vec<StoreDone>,
    /// What the store is just being given.
    taking: Option<Taking>,
    queue: Receiver<Job>,
    /// Empty ones, for answers.
    lists: Receiver<Vec<StoreDone>>,
    stop: Arc<AtomicBool>,
    status: Shared,
    news: N,
    began: Instant,
}

/// An operation of which nobody knows any more, should the store panic over it: enough to answer it.
enum Taking {
    Write(OpId),
    Read(OpId, GroupGeometry),
    Drop(OpId),
}

impl Taking {
    fn of(op: &StoreOp) -> Self {
        match op {
            StoreOp::Write { op, .. } => Taking::Write(*op),
            StoreOp::Read { op, block, .. } => Taking::Read(*op, block.geometry.clone()),
            StoreOp::Drop { op, .. } => Taking::Drop(*op),
        }
    }

    /// That nothing was begun of it.
    fn refused(self) -> StoreDone {
        let result = Err(StoreError::Off);
        match self {
            Taking::Write(op) => StoreDone::Written { op, result },
            Taking::Read(op, geometry) => {
                let block = ReadBlock::new(geometry);
                StoreDone::Read { op, block, result }
            }
            Taking::Drop(op) => StoreDone::Dropped { op, result },
        }
    }
}

#[allow(
    clippy::disallowed_methods,
    reason = "the device's thread is an edge: it times its store"
)]
fn clock() -> Instant {
    Instant::now()
}

/// What the thread tells while it opens its store. It does that itself: a ring belongs to the thread that made it.
enum Opening {
    Shape(StoreShape),
    Namespace(NamespaceId, Vec<u8>),
    Blocks(Vec<Recovered>),
    Ready(Option<Waker>, Shared),
    Failed(String),
}

/// Blocks that are told at a time while opening.
const FOUND_AT_A_TIME: usize = 4096;

impl Device {
    /// Starts the thread `kvd-nvme`, which opens what is there or makes it, and tells what it holds. `news` is called on that
    /// thread, and may wait; once it says false nobody listens any more.
    ///
    /// # Errors
    /// A text that says what to do.
    pub fn open(
        config: DeviceConfig,
        found: &mut dyn FnMut(Found<'_>),
        news: impl Fn(DeviceNews) -> bool + Send + 'static,
    ) -> Result<Self, String> {
        let path = config.path.display().to_string();
        let stop = Arc::new(AtomicBool::new(false));
        let (queue, jobs) = sync_channel(config.store.max_queue.max(1));
        let (lists, empty) = sync_channel(LISTS);
        let (tell, opening) = sync_channel(2);
        let stopped = Arc::clone(&stop);
        let thread = std::thread::Builder::new()
            .name("kvd-nvme".to_owned())
            .spawn(move || live(&config, &tell, (jobs, empty), stopped, news))
            .map_err(|error| format!("no thread for {path}: {error}"))?;
        let gone = || format!("{path}: the thread of the store has failed; see the log");
        loop {
            match opening.recv().map_err(|_| gone())? {
                Opening::Shape(shape) => found(Found::Shape(shape)),
                Opening::Namespace(id, record) => found(Found::Namespace(id, &record)),
                Opening::Blocks(blocks) => {
                    blocks
                        .into_iter()
                        .for_each(|block| found(Found::Block(block)));
                }
                Opening::Failed(error) => return Err(error),
                Opening::Ready(waker, status) => {
                    return Ok(Self {
                        queue: Some(queue),
                        lists,
                        waker,
                        stop,
                        status,
                        thread: Some(thread),
                    });
                }
            }
        }
    }

    /// Begins an operation, or answers it at once. Never waits.
    pub fn begin(&self, op: StoreOp, host: Option<ArenaRange>) -> Option<StoreDone> {
        let queue = self.queue.as_ref()?;
        match queue.try_send((op, host)) {
            Ok(()) => {
                self.wake();
                None
            }
            Err(TrySendError::Full((op, _)) | TrySendError::Disconnected((op, _))) => {
                Some(op.refused(StoreError::Off))
            }
        }
    }

    /// Gives back a list of answers that was told, to be used for others. Never waits; what is too many is freed.
    pub fn give_back(&self, mut list: Vec<StoreDone>) {
        list.clear();
        let _ = self.lists.try_send(list);
    }

    /// What people should know of it, as of its last turn.
    pub fn status(&self) -> DeviceStatus {
        self.status
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    fn wake(&self) {
        if let Some(waker) = &self.waker {
            (waker.0)();
        }
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        self.queue.take();
        self.wake();
        if let Some(thread) = self.thread.take() {
            // Its store is as a crash leaves it, should it have panicked.
            let _ = thread.join();
        }
    }
}

/// The thread, from opening to the end.
fn live(
    config: &DeviceConfig,
    tell: &SyncSender<Opening>,
    (queue, lists): (Receiver<Job>, Receiver<Vec<StoreDone>>),
    stop: Arc<AtomicBool>,
    news: impl Fn(DeviceNews) -> bool,
) {
    let opened = open(config, tell);
    // Nobody listens only if whoever opens has failed; then the queue is closed, too.
    let (store, status) = match opened {
        Ok(opened) => opened,
        Err(error) => return drop(tell.send(Opening::Failed(error))),
    };
    let status = Arc::new(Mutex::new(status));
    let waker = store.io().waker();
    if tell
        .send(Opening::Ready(waker, Arc::clone(&status)))
        .is_err()
    {
        return;
    }
    let mut runner = Runner {
        store,
        done: Vec::new(),
        taking: None,
        queue,
        lists,
        stop,
        status,
        news,
        began: clock(),
    };
    match catch_unwind(AssertUnwindSafe(|| runner.run())) {
        Ok(()) => runner.end(),
        Err(_) => runner.give_up(),
    }
}

fn open(
    config: &DeviceConfig,
    tell: &SyncSender<Opening>,
) -> Result<(Store<DiskIo>, DeviceStatus), String> {
    let began = clock();
    let backing = Arc::new(backing(&config.path, config.store.capacity)?);
    let store = StoreConfig {
        capacity: backing.bytes(),
        ..config.store.clone()
    };
    let (io, chosen) =
        DiskIo::open(Arc::clone(&backing), &config.io).map_err(|error| error.to_string())?;
    let io = match &config.faults {
        Some(file) => io.with_faults(file),
        None => io,
    };
    let mut blocks = Vec::with_capacity(FOUND_AT_A_TIME);
    let opened = Store::open(io, &store, &mut |found| {
        let _ = match found {
            Found::Shape(shape) => tell.send(Opening::Shape(shape)),
            Found::Namespace(id, record) => tell.send(Opening::Namespace(id, record.to_vec())),
            Found::Block(block) => {
                blocks.push(block);
                if blocks.len() < FOUND_AT_A_TIME {
                    return;
                }
                let next = Vec::with_capacity(FOUND_AT_A_TIME);
                tell.send(Opening::Blocks(std::mem::replace(&mut blocks, next)))
            }
        };
    });
    let opened = opened.map_err(|error| format!("{}: {error}", config.path.display()))?;
    let _ = tell.send(Opening::Blocks(blocks));
    let status = DeviceStatus {
        path: backing.path().to_owned(),
        bytes: opened.store.bytes(),
        segments_at: opened.store.segments_at(),
        chosen,
        recovered: opened.report,
        opened_in: began.elapsed(),
        off: false,
        blocks: opened.store.blocks(),
        counters: opened.store.counters().clone(),
    };
    Ok((opened.store, status))
}

/// What there is at a store's path, and how many bytes the file has.
fn look(path: &Path) -> (Start, u64) {
    let mut path = path.to_owned();
    if path.is_dir() {
        path.push(FILE_NAME);
    }
    let flags = OFlags::NONBLOCK | OFlags::NOFOLLOW;
    let file = File::options()
        .read(true)
        .custom_flags(flags.bits() as i32)
        .open(path);
    let mut start = Vec::new();
    let read = file.and_then(|file| {
        let bytes = file.metadata()?.len();
        file.take(START_BYTES as u64).read_to_end(&mut start)?;
        Ok(bytes)
    });
    match read {
        Ok(bytes) => (Start::of(&start), bytes),
        // Whoever opens it says why.
        Err(_) => (Start::Blank, 0),
    }
}

/// How many bytes what is in this directory has: a store, or something else; 0: there is nothing.
pub fn stored_bytes(directory: &Path) -> u64 {
    match look(directory) {
        (Start::Blank, _) => 0,
        (Start::Store(made), _) => made,
        (Start::Other, bytes) => bytes,
    }
}

/// Opens a store's file or device. A store that is there keeps its size, if that is within `capacity`, and its file gets back what was
/// cut off; something else stays as long as it is. The kernel lets go of a killed daemon's ring, and with it of its lock, some time
/// after the process is gone: so that is waited for, for a while.
///
/// # Errors
/// As [`Backing::open`], as text; and what is too short to be a store.
pub fn backing(path: &Path, capacity: u64) -> Result<Backing, String> {
    let until = clock() + LOCK_WITHIN;
    loop {
        let bytes = match look(path) {
            (Start::Blank, _) => capacity,
            (Start::Store(made), _) => made.min(capacity),
            (Start::Other, bytes) if path.is_dir() && bytes < PAGE as u64 => {
                return Err(format!("{}: {}", path.display(), OpenError::Foreign));
            }
            (Start::Other, bytes) if path.is_dir() => bytes.min(capacity),
            (Start::Other, _) => capacity,
        };
        match Backing::open(path, Some(bytes)) {
            Err(error) if error.kind() == OpenErrorKind::Busy && clock() < until => {
                let pause = Timespec {
                    tv_sec: 0,
                    tv_nsec: 10_000_000,
                };
                let _ = rustix::event::poll(&mut [], Some(&pause));
            }
            result => return result.map_err(|error| error.to_string()),
        }
    }
}

impl<N: Fn(DeviceNews) -> bool> Runner<N> {
    fn run(&mut self) {
        let mut was_off = false;
        while !self.stop.load(Ordering::Acquire) {
            self.take_jobs();
            let now = self.now();
            let wait = match self.store.next_deadline() {
                _ if !self.done.is_empty() => Duration::ZERO,
                Some(at) => Duration::from_micros(at.saturating_sub(now)).min(NAP),
                None => NAP,
            };
            self.store.turn(now, wait, &mut self.done);
            if !self.done.is_empty() {
                let empty = self.lists.try_recv().unwrap_or_default();
                let all = std::mem::replace(&mut self.done, empty);
                if !(self.news)(DeviceNews::Done(all)) {
                    break;
                }
            }
            let off = self.store.is_off();
            if off != was_off {
                was_off = off;
                log_switch(off);
                (self.news)(DeviceNews::Switched(!off));
            }
            self.note(off);
        }
    }

    fn take_jobs(&mut self) {
        while let Ok((op, host)) = self.queue.try_recv() {
            self.taking = Some(Taking::of(&op));
            self.done.extend(self.store.submit(op, host));
            self.taking = None;
        }
    }

    fn now(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_micros()).unwrap_or(u64::MAX)
    }

    fn note(&self, off: bool) {
        let mut status = self.status.lock().unwrap_or_else(PoisonError::into_inner);
        status.off = off;
        status.blocks = self.store.blocks();
        status.counters.clone_from(self.store.counters());
    }

    /// After a panic: the store is off for the rest of this daemon's life. All that was asked is answered once (invariant 5), and
    /// so is what is asked until nobody asks any more.
    fn give_up(self) {
        tracing::error!(
            "the thread of the store has failed by a bug; blocks there are not found until the daemon is started again"
        );
        // Before anything else is told or seen: nothing more is to be asked of it.
        (self.news)(DeviceNews::Switched(false));
        self.note(true);
        let Self {
            store,
            mut done,
            taking,
            queue,
            status,
            news,
            ..
        } = self;
        let lost = taking.map(Taking::refused);
        done.extend(lost.filter(|answer| !store.has(answer.op())));
        let refused = |(op, _): Job| op.refused(StoreError::Off);
        done.extend(queue.try_iter().map(refused));
        let tell = |done: Vec<StoreDone>| done.is_empty() || news(DeviceNews::Done(done));
        let (done, counters) = store.abandon(|first| {
            done.extend(first);
            // Not after the device, which may take its time.
            tell(done);
        });
        if counters.lost > 0 {
            tracing::error!(
                reads = counters.lost,
                "the device may still write the host memory of reads; their slots stay taken until the daemon is started again"
            );
        }
        status
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .counters = counters;
        tell(done);
        for job in queue.iter() {
            tell(vec![refused(job)]);
        }
    }

    /// Makes durable what is under way, if the device still answers.
    fn end(self) {
        let now = self.now();
        let (each, mut done) = (Duration::from_millis(50), Vec::new());
        let turns = (CLOSE_WITHIN.as_millis() / each.as_millis()) as usize;
        drop(self.store.close(now, each, turns, &mut done));
    }
}

#[cfg(test)]
mod tests;

fn log_switch(off: bool) {
    match off {
        true => tracing::error!(
            "the device fails and is switched off; blocks there are not found until it answers again"
        ),
        false => tracing::info!("the device answers again and is switched on"),
    }
}
