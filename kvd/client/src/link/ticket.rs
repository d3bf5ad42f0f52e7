//! A request under way, as its caller and the link's thread see it.

use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Condvar, Mutex, TryLockError};
use std::time::{Duration, Instant};

use kvd_wire::session::{reply, request};
use rustix::process::Pid;

use super::lock;
use super::notify::Notify;
use crate::Error;
use crate::pending::undo;

pub(super) type Answer = Result<reply::Body, Error>;

#[derive(Debug)]
enum State {
    Waiting,
    Done(Answer),
    /// Nobody waits: the caller has the answer, or has given up.
    Over,
}

/// Where the answer goes.
#[derive(Debug)]
pub(super) struct Cell {
    state: Mutex<State>,
    ready: Condvar,
}

impl Cell {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(State::Waiting),
            ready: Condvar::new(),
        })
    }

    /// A cell whose answer interests nobody.
    pub(super) fn nobody() -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(State::Over),
            ready: Condvar::new(),
        })
    }

    /// Gives the answer; back comes one that nobody waits for.
    pub(super) fn put(&self, answer: Answer) -> Option<Answer> {
        let mut state = lock(&self.state);
        if !matches!(*state, State::Waiting) {
            return Some(answer);
        }
        *state = State::Done(answer);
        drop(state);
        self.ready.notify_all();
        None
    }

    /// Whether somebody still waits.
    pub(super) fn wanted(&self) -> bool {
        matches!(*lock(&self.state), State::Waiting)
    }
}

/// What goes to the link's thread.
#[derive(Debug)]
pub(super) struct Submitted {
    pub(super) body: request::Body,
    pub(super) cell: Arc<Cell>,
    pub(super) deadline: Instant,
    /// Slots and leases mean something in one epoch only.
    pub(super) epoch: u64,
    /// Nobody was woken for it.
    pub(super) quiet: bool,
}

/// A request under way. Dropping it abandons the request: what the reply brings (slots, leases) is given back when it comes.
#[derive(Debug)]
pub struct Ticket {
    cell: Arc<Cell>,
    queue: SyncSender<Submitted>,
    notify: Arc<Notify>,
    epoch: u64,
    pid: Pid,
}

impl Ticket {
    pub(super) fn new(
        cell: Arc<Cell>,
        queue: SyncSender<Submitted>,
        notify: Arc<Notify>,
        epoch: u64,
        pid: Pid,
    ) -> Self {
        Self {
            cell,
            queue,
            notify,
            epoch,
            pid,
        }
    }

    /// The epoch that the request belongs to.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    pub(super) fn poll(&mut self) -> Option<Answer> {
        let mut state = match self.cell.state.try_lock() {
            Ok(state) => state,
            Err(TryLockError::Poisoned(e)) => e.into_inner(),
            // The thread is just putting it.
            Err(TryLockError::WouldBlock) => return None,
        };
        take(&mut state)
    }

    pub(super) fn wait(self, timeout: Duration) -> Answer {
        let state = lock(&self.cell.state);
        let waited = self
            .cell
            .ready
            .wait_timeout_while(state, timeout, |s| matches!(s, State::Waiting));
        let (mut state, _) = waited.unwrap_or_else(std::sync::PoisonError::into_inner);
        match take(&mut state) {
            Some(answer) => answer,
            None => {
                *state = State::Over;
                Err(Error::timeout())
            }
        }
    }
}

fn take(state: &mut State) -> Option<Answer> {
    match state {
        State::Waiting => None,
        State::Done(_) => match std::mem::replace(state, State::Over) {
            State::Done(answer) => Some(answer),
            _ => None,
        },
        State::Over => Some(Err(Error::invalid("this ticket is spent"))),
    }
}

impl Drop for Ticket {
    #[allow(
        clippy::disallowed_methods,
        reason = "requests are timed at this edge; vDSO, no system call"
    )]
    fn drop(&mut self) {
        if self.pid != rustix::process::getpid() {
            // The thread that may have held this lock at fork is not here to let it go.
            return;
        }
        let answer = match std::mem::replace(&mut *lock(&self.cell.state), State::Over) {
            State::Done(answer) => answer,
            State::Waiting | State::Over => return,
        };
        if let Some(body) = answer.ok().and_then(undo) {
            // A full queue drops it: leases and reservations end by themselves.
            let _ = self.queue.try_send(Submitted {
                body,
                cell: Cell::nobody(),
                deadline: Instant::now() + Duration::from_secs(5),
                epoch: self.epoch,
                quiet: false,
            });
            self.notify.wake();
        }
    }
}
