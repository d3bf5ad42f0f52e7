//! A session kept by a thread of its own, for engines: nothing here blocks the caller but what says so.
//!
//! The thread `kvd-link` (see `worker`) connects, says Hello, registers, carries requests and replies, and does it all again
//! when the daemon comes back. Callers hold tickets. Everything is bounded: the queue of requests (overflow: `Busy`), what
//! the daemon has not answered (its own limit), and the time of each request.
//!
//! Fork: a child has no such thread, so every call there is refused. Deliberately absent: copies (callers make them, and
//! say so by [`Link::begin_copy`]).

mod notify;
mod ticket;
mod worker;

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvd_arena::ArenaView;
use kvd_wire::session::{GroupLayout, reply, request};
use rustix::process::Pid;

use crate::epoch::{CopyGuard, Epoch};
use crate::handshake::Identity;
use crate::mover::Caller;
use crate::{Error, ErrorKind};

use notify::Notify;
pub use ticket::Ticket;
use ticket::{Cell, Submitted};

/// What a link needs to know.
#[derive(Debug, Clone)]
pub struct LinkConfig {
    /// The daemon's socket.
    pub socket: PathBuf,
    /// Who this process is.
    pub identity: Identity,
    /// Most requests that wait to be sent; more are answered `Busy`.
    pub queue: usize,
    /// How long a request may take before it is answered locally.
    pub request_timeout: Duration,
}

impl LinkConfig {
    /// The usual queue (1,024) and timeout (5 s).
    pub fn new(socket: PathBuf, identity: Identity) -> Self {
        Self {
            socket,
            identity,
            queue: 1024,
            request_timeout: Duration::from_secs(5),
        }
    }
}

/// A namespace to be joined, now and after every reconnect.
#[derive(Debug, Clone)]
pub struct Registration {
    /// The canonical record.
    pub record: Vec<u8>,
    /// How this instance cuts blocks, and what this process copies.
    pub groups: Vec<GroupLayout>,
}

/// A namespace as it is registered now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinkRegistered {
    /// Its short name in this session.
    pub namespace: u32,
    /// The session that this is true of.
    pub epoch: u64,
    /// Names the start of the daemon that it is a session of.
    pub incarnation: [u8; 16],
}

#[derive(Debug, Default, Clone)]
struct NamespaceState {
    current: Option<LinkRegistered>,
    refused: Option<Error>,
}

/// One registration and what became of it.
#[derive(Debug)]
struct Namespace {
    registration: Registration,
    state: Mutex<NamespaceState>,
}

/// Follows one namespace through reconnects. Cheap to clone.
#[derive(Debug, Clone)]
pub struct NamespaceSlot(Arc<Namespace>);

impl NamespaceSlot {
    /// What it is called now; `None` while it is not (again) registered.
    pub fn current(&self) -> Option<LinkRegistered> {
        lock(&self.0.state).current
    }

    /// Why the daemon refused it, if it did.
    pub fn refused(&self) -> Option<Error> {
        lock(&self.0.state).refused.clone()
    }
}

/// What callers and the thread share.
#[derive(Debug)]
struct Shared {
    notify: Arc<Notify>,
    stop: AtomicBool,
    /// The number of the current epoch, 0 when there is none: for those who must not wait.
    up: AtomicU64,
    /// Epochs so far.
    epochs: AtomicU64,
    current: Mutex<Current>,
    changed: Condvar,
    namespaces: Mutex<Vec<Arc<Namespace>>>,
}

#[derive(Debug, Default)]
struct Current {
    epoch: Option<Arc<Epoch>>,
    /// Why there is none.
    error: Option<Error>,
}

/// Most namespaces of one link.
const NAMESPACES_MAX: usize = kvd_wire::limits::NAMESPACES as usize;

/// A session with the daemon of this node that survives the daemon. Send + Sync: share it by `Arc`.
#[derive(Debug)]
pub struct Link {
    shared: Arc<Shared>,
    queue: SyncSender<Submitted>,
    thread: Option<JoinHandle<()>>,
    pid: Pid,
    request_timeout: Duration,
}

impl Link {
    /// Starts the thread, which connects in the background and goes on trying: an absent daemon is no error.
    ///
    /// # Errors
    /// `Internal` when the kernel gives no thread or descriptor.
    pub fn start(config: LinkConfig) -> Result<Self, Error> {
        let internal = |what: &str| {
            Error::new(
                ErrorKind::Internal,
                format!("cannot start the link: {what}"),
            )
        };
        let shared = Arc::new(Shared {
            notify: Arc::new(Notify::new().map_err(|e| internal(&e.to_string()))?),
            stop: AtomicBool::new(false),
            up: AtomicU64::new(0),
            epochs: AtomicU64::new(0),
            current: Mutex::default(),
            changed: Condvar::new(),
            namespaces: Mutex::default(),
        });
        let (queue, requests) = sync_channel(config.queue.max(1));
        let request_timeout = config.request_timeout;
        let worker = worker::Worker::new(config, Arc::clone(&shared), requests);
        let thread = std::thread::Builder::new()
            .name("kvd-link".to_owned())
            .spawn(move || worker.run())
            .map_err(|e| internal(&e.to_string()))?;
        Ok(Self {
            shared,
            queue,
            thread: Some(thread),
            pid: rustix::process::getpid(),
            request_timeout,
        })
    }

    /// Hands a request over, to be answered within the configured timeout. Never waits.
    ///
    /// # Errors
    /// `Unavailable` when there is no daemon now, `Busy` when the queue is full, `Unsupported` in a forked child.
    pub fn submit(&self, body: request::Body) -> Result<Ticket, Error> {
        self.submit_within(body, self.request_timeout)
    }

    /// As [`Link::submit`], with a timeout of its own.
    ///
    /// # Errors
    /// As [`Link::submit`].
    pub fn submit_within(&self, body: request::Body, timeout: Duration) -> Result<Ticket, Error> {
        let epoch = self.shared.up.load(Ordering::Acquire);
        self.submit_on_within(epoch, body, timeout)
    }

    /// As [`Link::submit`], but only in the session of this epoch: for what names its namespaces, slots or leases.
    ///
    /// # Errors
    /// As [`Link::submit`]; `Unavailable` also when that session is over.
    pub fn submit_on(&self, epoch: u64, body: request::Body) -> Result<Ticket, Error> {
        self.submit_on_within(epoch, body, self.request_timeout)
    }

    /// As [`Link::submit`], but the thread is not woken for it: see [`Link::queue_on`].
    ///
    /// # Errors
    /// As [`Link::submit`].
    pub fn queue(&self, body: request::Body) -> Result<Ticket, Error> {
        self.queue_on(self.shared.up.load(Ordering::Acquire), body)
    }

    /// As [`Link::submit_on`], but the thread is not woken for it: of several requests in a row only the last need pay for that. It goes
    /// out with the next request that is submitted, with [`Link::wake`] or [`Link::wake_soon`], or when the thread looks by itself.
    ///
    /// # Errors
    /// As [`Link::submit_on`].
    pub fn queue_on(&self, epoch: u64, body: request::Body) -> Result<Ticket, Error> {
        self.put(epoch, body, self.request_timeout, true)
    }

    /// Sends what was only queued. Never waits.
    pub fn wake(&self) {
        self.shared.notify.wake();
    }

    /// Sends what was only queued within a millisecond. Never waits, and costs a system call only when nothing was queued for
    /// a tenth of a second.
    pub fn wake_soon(&self) {
        self.shared.notify.wake_soon();
    }

    fn submit_on_within(
        &self,
        epoch: u64,
        body: request::Body,
        timeout: Duration,
    ) -> Result<Ticket, Error> {
        let ticket = self.put(epoch, body, timeout, false)?;
        self.wake();
        Ok(ticket)
    }

    #[allow(
        clippy::disallowed_methods,
        reason = "requests are timed here, at the edge; vDSO, no system call"
    )]
    fn put(
        &self,
        epoch: u64,
        body: request::Body,
        timeout: Duration,
        quiet: bool,
    ) -> Result<Ticket, Error> {
        self.check_pid()?;
        let up = self.shared.up.load(Ordering::Acquire);
        if up == 0 || up != epoch {
            return Err(Error::unavailable("no kvd daemon now: go on without it"));
        }
        let cell = Cell::new();
        let submitted = Submitted {
            body,
            cell: Arc::clone(&cell),
            deadline: Instant::now() + timeout,
            epoch,
            quiet,
        };
        match self.queue.try_send(submitted) {
            Ok(()) => Ok(Ticket::new(
                cell,
                self.queue.clone(),
                Arc::clone(&self.shared.notify),
                epoch,
                self.pid,
            )),
            Err(TrySendError::Full(_)) => Err(Error::new(
                ErrorKind::Busy,
                "the link's queue is full: drop the request or try later",
            )),
            Err(TrySendError::Disconnected(_)) => Err(Error::unavailable("the link has stopped")),
        }
    }

    /// The answer, if it has come. Never waits. After `Some` the ticket is spent.
    pub fn poll(&self, ticket: &mut Ticket) -> Option<Result<reply::Body, Error>> {
        if let Err(e) = self.check_pid() {
            return Some(Err(e));
        }
        ticket.poll()
    }

    /// Waits for the answer, for at most `timeout`; after that, what it brings is undone when it comes.
    ///
    /// # Errors
    /// What the daemon said; `Unavailable` when it is gone or did not answer in time.
    pub fn wait(&self, ticket: Ticket, timeout: Duration) -> Result<reply::Body, Error> {
        self.check_pid()?;
        ticket.wait(timeout)
    }

    /// Joins a namespace, now and after every reconnect. Never waits; follow the slot.
    ///
    /// # Errors
    /// `Busy` when there are 64 already; `Unsupported` in a forked child.
    pub fn register(&self, registration: Registration) -> Result<NamespaceSlot, Error> {
        self.check_pid()?;
        let namespace = Arc::new(Namespace {
            registration,
            state: Mutex::default(),
        });
        let mut all = lock(&self.shared.namespaces);
        if all.len() >= NAMESPACES_MAX {
            return Err(Error::new(
                ErrorKind::Busy,
                format!("one link joins at most {NAMESPACES_MAX} namespaces"),
            ));
        }
        all.push(Arc::clone(&namespace));
        drop(all);
        self.shared.notify.wake();
        Ok(NamespaceSlot(namespace))
    }

    /// The arena of the current epoch, once a namespace is registered.
    pub fn arena(&self) -> Option<Arc<ArenaView>> {
        self.check_pid().ok()?;
        let current = lock(&self.shared.current);
        current.epoch.as_ref()?.arena.get().cloned()
    }

    /// Counts sessions from 1; 0 before the first. Stays while the daemon is gone.
    pub fn epoch(&self) -> u64 {
        self.shared.epochs.load(Ordering::Acquire)
    }

    /// Whether there is a session now. Never waits. A hung daemon counts as connected.
    pub fn connected(&self) -> bool {
        self.shared.up.load(Ordering::Acquire) != 0
    }

    /// Why there is no session now, if that is so.
    pub fn last_error(&self) -> Option<Error> {
        if let Err(e) = self.check_pid() {
            return Some(e);
        }
        lock(&self.shared.current).error.clone()
    }

    /// Says that a copy begins; keep the guard until it is over. May wait some microseconds for the thread.
    ///
    /// # Errors
    /// `Unavailable` when there is no session or no arena now.
    pub fn begin_copy(&self) -> Result<CopyGuard, Error> {
        self.check_pid()?;
        let epoch = lock(&self.shared.current).epoch.clone();
        match epoch {
            Some(epoch) => epoch.begin_copy(),
            None => Err(Error::unavailable("no kvd daemon now: go on without it")),
        }
    }

    /// Waits until there is a session of an epoch after `after`; false when there is none within `timeout`.
    pub fn wait_connected(&self, after: u64, timeout: Duration) -> bool {
        self.wait_until(timeout, || self.shared.up.load(Ordering::Acquire) > after)
    }

    /// Waits until the namespace is registered in an epoch after `after`; `None` when it is not within `timeout`, or refused.
    pub fn wait_registered(
        &self,
        slot: &NamespaceSlot,
        after: u64,
        timeout: Duration,
    ) -> Option<LinkRegistered> {
        let now = || slot.current().filter(|r| r.epoch > after);
        self.wait_until(timeout, || now().is_some() || slot.refused().is_some());
        now()
    }

    fn wait_until(&self, timeout: Duration, done: impl Fn() -> bool) -> bool {
        if self.check_pid().is_err() {
            return false;
        }
        let current = lock(&self.shared.current);
        let waited = self
            .shared
            .changed
            .wait_timeout_while(current, timeout, |_| !done());
        drop(waited);
        done()
    }

    /// Ends the session in good order, if no copy is under way, and the thread. Dropping the link does the same. Waits for
    /// the thread, which takes a fifth of a second at most when the daemon does not read.
    pub fn stop(self) {
        drop(self);
    }

    fn check_pid(&self) -> Result<(), Error> {
        if self.pid == rustix::process::getpid() {
            Ok(())
        } else {
            Err(Error::forked())
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        if self.check_pid().is_err() {
            // The thread is not in this process.
            std::mem::forget(self.thread.take());
            return;
        }
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.notify.wake();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A link as what a mover talks through: each call waits for its answer at most this long.
#[derive(Debug, Clone, Copy)]
pub struct LinkCaller<'a> {
    /// The link.
    pub link: &'a Link,
    /// For each call.
    pub timeout: Duration,
}

impl Caller for LinkCaller<'_> {
    fn call(&mut self, body: request::Body) -> Result<reply::Body, Error> {
        let ticket = self.link.submit_within(body, self.timeout)?;
        self.link.wait(ticket, self.timeout)
    }

    fn call_after(&mut self, guard: &CopyGuard, body: request::Body) -> Result<reply::Body, Error> {
        let ticket = self
            .link
            .submit_on_within(guard.epoch(), body, self.timeout)?;
        self.link.wait(ticket, self.timeout)
    }

    fn begin_copy(&mut self) -> Result<CopyGuard, Error> {
        self.link.begin_copy()
    }
}

/// Nothing here can be left half done by a panic, so a poisoned lock is as good as any.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
