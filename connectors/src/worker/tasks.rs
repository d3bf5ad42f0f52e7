//! The copy threads and what they do. Stores have threads of their own, so that a load that waits for the daemon delays no
//! copy out of a block that the engine wants back.

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use kvd_client::{
    BlockMover, BlockRef, Caller, CommitReply, CopyGuard, Error, Link, LinkCaller, LinkRegistered,
    LoadOutcome, MoverConfig, NamespaceSlot, ReservedSlot, reply, request,
};
use kvd_core::geometry::{Cut, GroupGeometry};
use kvd_core::replica_of;
use kvd_device::{Device, Pages, Point};
use kvd_wire::session::{Abort, CommitState, ErrorKind, Failure, ReleaseReply};

use super::queue::Queue;
use super::state::Shared;
use super::{Clock, Settings};
use crate::HASH_BYTES;
use crate::meta::{LoadOrder, StoreOrder};

/// Bytes of one task of a store, about: small enough to spread an order over the threads.
const TASK_BYTES: usize = 8 << 20;
/// Bytes of blocks that a load asks for at a time, about.
const WINDOW_BYTES: usize = 32 << 20;

/// A namespace that this rank copies for.
pub(crate) struct Joined {
    pub(crate) slot: NamespaceSlot,
    pub(crate) group: u32,
    pub(crate) geometry: GroupGeometry,
    pub(crate) cut: Cut,
    pub(crate) part: u32,
    pub(crate) rank: u32,
    /// Ranks that hold the same part, in ascending order.
    pub(crate) replicas: Vec<u32>,
}

impl Joined {
    /// The positions in a part of an order whose blocks this rank writes: replicas take turns.
    fn own(&self, order: &StoreOrder, part: Range<usize>) -> Vec<usize> {
        let part = part.start..part.end.min(order.blocks());
        if self.replicas == [self.rank] {
            return part.collect();
        }
        let (hashes, _) = order.hashes.as_chunks::<HASH_BYTES>();
        let turn = |hash| self.replicas.get(replica_of(hash, self.replicas.len()));
        let is_own = |at: &usize| hashes.get(*at).map(turn) == Some(Some(&self.rank));
        part.filter(is_own).collect()
    }

    fn mover(&self, device: &Arc<dyn Device>, deadline: Duration) -> Result<BlockMover, Error> {
        BlockMover::new(
            device.clone(),
            MoverConfig {
                geometry: self.geometry.clone(),
                cut: self.cut.clone(),
                part: self.part,
                group: self.group,
                window_bytes: WINDOW_BYTES,
                load_deadline: deadline,
            },
        )
    }
}

/// Blocks of one group to copy out.
pub(crate) struct StoreTask {
    joined: Arc<Joined>,
    pages: Pages,
    order: Arc<StoreOrder>,
    /// What the engine does until then fills the blocks.
    after: Point,
    /// Positions in the order whose blocks this rank writes.
    own: Vec<usize>,
    clock: Clock,
    /// When (us) it came.
    ordered: u64,
    /// Blocks copied so far.
    copied: AtomicUsize,
}

impl StoreTask {
    pub(crate) fn new(
        joined: Arc<Joined>,
        pages: Pages,
        (order, part): (Arc<StoreOrder>, Range<usize>),
        after: Point,
        clock: Clock,
    ) -> Self {
        let own = joined.own(&order, part);
        StoreTask {
            joined,
            pages,
            order,
            after,
            own,
            ordered: clock(),
            clock,
            copied: AtomicUsize::new(0),
        }
    }

    /// The connection on which this rank may write into the order's slots.
    fn epoch(&self) -> u64 {
        let rank = self.joined.rank as usize;
        self.order.epochs.get(rank).copied().unwrap_or(0)
    }
}

/// A piece of a [`StoreTask`].
struct StorePiece {
    task: Arc<StoreTask>,
    range: Range<usize>,
    left: Arc<AtomicUsize>,
}

impl StorePiece {
    /// The piece is over; this part of the order with its last one.
    fn over(&self, shared: &Shared) {
        if self.left.fetch_sub(1, Ordering::AcqRel) == 1 {
            let task = &self.task;
            if task.copied.load(Ordering::Relaxed) > 0 {
                shared.store_took((task.clock)().saturating_sub(task.ordered));
            }
            shared.store_over(&task.order.request, task.order.order);
        }
    }
}

/// An order of blocks to copy in.
pub(crate) struct LoadTask {
    pub(crate) joined: Arc<Joined>,
    pub(crate) pages: Pages,
    pub(crate) order: LoadOrder,
    /// What the engine does until then may still use the blocks.
    pub(crate) after: Point,
    /// When (us) it came,
    pub(crate) ordered: u64,
    /// and when it has to be over.
    pub(crate) until: u64,
}

/// The threads.
pub(crate) struct Copier {
    stores: Arc<Queue<StorePiece>>,
    loads: Arc<Queue<Box<LoadTask>>>,
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

/// What every thread has.
#[derive(Clone)]
struct Context {
    link: Arc<Link>,
    device: Arc<dyn Device>,
    clock: Clock,
    shared: Arc<Shared>,
    deadline: Duration,
}

impl Copier {
    pub(crate) fn start(
        settings: &Settings,
        link: &Arc<Link>,
        device: &Arc<dyn Device>,
        clock: &Clock,
        shared: &Arc<Shared>,
    ) -> std::io::Result<Copier> {
        let mut copier = Copier {
            stores: Arc::new(Queue::new(settings.queue)),
            loads: Arc::new(Queue::new(settings.queue)),
            shared: shared.clone(),
            threads: Vec::new(),
        };
        let context = Context {
            link: link.clone(),
            device: device.clone(),
            clock: clock.clone(),
            shared: shared.clone(),
            deadline: settings.load_deadline,
        };
        for number in 0..settings.threads.max(1) {
            let (queue, mine) = (copier.stores.clone(), context.clone());
            copier.spawn(format!("kvd-copy-{number}"), move || {
                while let Some(piece) = queue.take() {
                    // Whatever happens, the engine gets its block back.
                    if catch_unwind(AssertUnwindSafe(|| store(&mine, &piece))).is_err() {
                        mine.shared.dropped(piece.range.len());
                    }
                    piece.over(&mine.shared);
                }
            })?;
            let (queue, mine) = (copier.loads.clone(), context.clone());
            copier.spawn(format!("kvd-load-{number}"), move || {
                while let Some(task) = queue.take() {
                    let order = &task.order;
                    let invalid = catch_unwind(AssertUnwindSafe(|| load(&mine, &task)))
                        .unwrap_or_else(|_| order.blocks.clone());
                    let took = (mine.clock)().saturating_sub(task.ordered);
                    mine.shared.load_took(took);
                    mine.shared.load_over(&order.request, invalid);
                }
            })?;
        }
        Ok(copier)
    }

    fn spawn(&mut self, name: String, body: impl FnOnce() + Send + 'static) -> std::io::Result<()> {
        let thread = std::thread::Builder::new().name(name).spawn(body)?;
        self.threads.push(thread);
        Ok(())
    }

    /// Queues a store, in pieces. What does not fit in the queue is given up.
    pub(crate) fn store(&self, task: StoreTask, link: &Link, shared: &Shared) {
        let block = task.pages.part().bytes().max(1);
        let each = (TASK_BYTES / block).clamp(1, 64);
        let count = task.own.len();
        let pieces = count.div_ceil(each);
        if pieces == 0 {
            shared.store_over(&task.order.request, task.order.order);
            return;
        }
        let task = Arc::new(task);
        let left = Arc::new(AtomicUsize::new(pieces));
        for piece in 0..pieces {
            let range = piece * each..((piece + 1) * each).min(count);
            let piece = StorePiece {
                task: task.clone(),
                range,
                left: left.clone(),
            };
            if let Err(piece) = self.stores.put(piece) {
                give_up(link, shared, &piece);
                piece.over(shared);
            }
        }
    }

    /// Queues a load; gives it back when there is no room.
    pub(crate) fn load(&self, task: Box<LoadTask>) -> Result<(), Box<LoadTask>> {
        self.loads.put(task)
    }

    /// Ends the threads, after the copies that are under way. What waits is given up or fails.
    pub(crate) fn stop(&mut self) {
        for piece in self.stores.close() {
            self.shared.dropped(piece.range.len());
            piece.over(&self.shared);
        }
        for task in self.loads.close() {
            self.shared
                .load_failed(&task.order.request, &task.order.blocks);
        }
        for thread in self.threads.drain(..) {
            // A thread that panicked has nothing under way any more.
            let _ = thread.join();
        }
    }
}

/// Tells the daemon that these slots will not be written, if it is the one that gave them.
///
/// Also when this rank's connection is another one than the order says: the daemon may have recorded either as the writer.
/// That this one will not write is right in both cases, and saying nothing would keep the slots until this connection ends.
fn give_up(link: &Link, shared: &Shared, piece: &StorePiece) {
    let order = &piece.task.order;
    let own = &piece.task.own[piece.range.clone()];
    shared.dropped(own.len());
    let now = piece.task.joined.slot.current();
    let Some(now) = now.filter(|now| now.incarnation[..] == order.incarnation[..]) else {
        return;
    };
    let given = own.iter().filter_map(|at| order.entry(*at));
    let (slots, generations) = given.map(|entry| (entry.slot, entry.generation)).unzip();
    let body = request::Body::Abort(Abort { slots, generations });
    // Without a connection the daemon knows anyway.
    let _ = link.submit_on(now.epoch, body);
}

/// Sends commits without waiting for their replies, and copies only on the connection the slots were reserved for.
struct StoreCaller<'a> {
    link: &'a Link,
    shared: &'a Shared,
    epoch: u64,
    timeout: Duration,
}

impl StoreCaller<'_> {
    fn plain(&self) -> LinkCaller<'_> {
        LinkCaller {
            link: self.link,
            timeout: self.timeout,
        }
    }
}

impl Caller for StoreCaller<'_> {
    fn call(&mut self, body: request::Body) -> Result<reply::Body, Error> {
        self.plain().call(body)
    }

    fn call_after(&mut self, guard: &CopyGuard, body: request::Body) -> Result<reply::Body, Error> {
        let request::Body::Commit(commit) = &body else {
            return self.plain().call_after(guard, body);
        };
        let states = vec![CommitState::Waiting as i32; commit.slots.len()];
        self.shared
            .committed(self.link.submit_on(guard.epoch(), body)?);
        Ok(reply::Body::Commit(CommitReply { states }))
    }

    fn begin_copy(&mut self) -> Result<CopyGuard, Error> {
        let guard = self.link.begin_copy()?;
        match guard.epoch() == self.epoch {
            true => Ok(guard),
            false => Err(Error::from(Failure {
                kind: ErrorKind::Unavailable.into(),
                text: "these slots were reserved for an earlier connection".to_owned(),
                ends_session: false,
            })),
        }
    }
}

fn store(context: &Context, piece: &StorePiece) {
    let task = &piece.task;
    let own = &task.own[piece.range.clone()];
    let give_up = || give_up(&context.link, &context.shared, piece);
    let registered = task.joined.slot.current();
    let Some(registered) = registered.filter(|known| known.epoch == task.epoch()) else {
        return give_up();
    };
    let Ok(mut mover) = task.joined.mover(&context.device, context.deadline) else {
        return give_up();
    };
    if task.after.wait().is_err() {
        return give_up();
    }
    let entries = own.iter().filter_map(|at| task.order.entry(*at));
    let entries = entries.map(|entry| {
        let slot = ReservedSlot {
            slot: entry.slot,
            generation: entry.generation,
            offset: entry.offset,
        };
        (slot, entry.block)
    });
    let (slots, blocks): (Vec<_>, Vec<_>) = entries.unzip();
    let pages = pages_of(&task.pages, &blocks);
    let from = refs(&task.pages, &pages);
    let mut caller = StoreCaller {
        link: &context.link,
        shared: &context.shared,
        epoch: task.epoch(),
        timeout: context.deadline,
    };
    match mover.fill(&mut caller, registered.namespace, &slots, &from) {
        Ok(outcomes) => {
            let bytes = task.pages.part().bytes();
            let copied = context.shared.count_stores(&outcomes, bytes);
            task.copied.fetch_add(copied, Ordering::Relaxed);
        }
        Err(_) => give_up(),
    }
}

/// Gives the daemon a deadline from the order on for its first answer, and the same again for each later one: one that is slow with
/// much is waited for, one that is silent is not, however many loads stand in line. What the engine and the copies take between two
/// answers is not the daemon's.
struct LoadCaller<'a> {
    context: &'a Context,
    /// Of the first answer.
    until: Option<u64>,
}

impl Caller for LoadCaller<'_> {
    fn call(&mut self, body: request::Body) -> Result<reply::Body, Error> {
        if matches!(body, request::Body::Release(_)) {
            // Should it not arrive, the leases end by themselves.
            drop(self.context.link.submit(body)?);
            return Ok(reply::Body::Release(ReleaseReply {}));
        }
        let timeout = match self.until.take() {
            Some(until) => Duration::from_micros(until.saturating_sub((self.context.clock)())),
            None => self.context.deadline,
        };
        let mut caller = LinkCaller {
            link: &self.context.link,
            timeout,
        };
        caller.call(body)
    }

    /// A load says nothing of what it copied to; its leases are of whoever is asked.
    fn call_after(&mut self, _: &CopyGuard, body: request::Body) -> Result<reply::Body, Error> {
        self.call(body)
    }

    fn begin_copy(&mut self) -> Result<CopyGuard, Error> {
        self.context.link.begin_copy()
    }
}

/// Copies in. Returns the engine's numbers of the blocks that are not right.
fn load(context: &Context, task: &LoadTask) -> Vec<u32> {
    let order = &task.order;
    let registered = registered(context, task);
    let mover = task.joined.mover(&context.device, context.deadline);
    let whole = order.hashes.len() == order.blocks.len() * HASH_BYTES;
    let (Some(registered), Ok(mut mover), true) = (registered, mover, whole) else {
        context.shared.failed(order.blocks.len());
        return order.blocks.clone();
    };
    let pages = pages_of(&task.pages, &order.blocks);
    let to = refs(&task.pages, &pages);
    // The daemon looks for the blocks while the engine comes to that point.
    mover.after(task.after.clone());
    let mut caller = LoadCaller {
        context,
        until: Some(task.until),
    };
    match mover.load(&mut caller, registered.namespace, &order.hashes, &to) {
        Ok(outcomes) => {
            let bytes = task.pages.part().bytes();
            context.shared.count_loads(&outcomes, bytes);
            let wrong = |at: usize| outcomes.get(at) != Some(&LoadOutcome::Loaded);
            (0..)
                .zip(&order.blocks)
                .filter(|(at, _)| wrong(*at))
                .map(|(_, block)| *block)
                .collect()
        }
        Err(_) => {
            context.shared.failed(order.blocks.len());
            order.blocks.clone()
        }
    }
}

/// The namespace as the daemon knows it. The first load may come with the step in which this rank heard of its namespace, and
/// before its link has found the daemon; a daemon that is gone is not waited for.
fn registered(context: &Context, task: &LoadTask) -> Option<LinkRegistered> {
    let link = &context.link;
    task.joined.slot.current().or_else(|| {
        let left = task.until.saturating_sub((context.clock)());
        let left = Duration::from_micros(left);
        let soon = link.connected() || link.epoch() == 0;
        soon.then(|| link.wait_registered(&task.joined.slot, 0, left))?
    })
}

/// The pages of these blocks, block after block.
fn pages_of(pages: &Pages, blocks: &[u32]) -> Vec<u32> {
    let each = pages.pages_per_block() as u32;
    blocks
        .iter()
        .flat_map(|block| block * each..(block + 1) * each)
        .collect()
}

fn refs<'a>(at: &'a Pages, pages: &'a [u32]) -> Vec<BlockRef<'a>> {
    pages
        .chunks(at.pages_per_block().max(1))
        .map(|pages| BlockRef { at, pages })
        .collect()
}
