//! The thread `kvd-link`: the only one that touches the socket, and the only one here that reads the clock.
//!
//! Down: waits out the backoff, connects, says Hello (offering the arena it holds, naming its past session). Up: registers
//! every namespace, fences past epochs once the copies of all of them are over, carries requests. When the connection is lost everything
//! under way is answered `Unavailable` and the epoch ends.
//!
//! A request whose deadline passes is answered here. If it was sent, its id stays known, so that the late reply can be
//! undone; if not, it is never sent. So a daemon that hangs costs a bounded table and nothing else.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::{Duration, Instant};

use kvd_arena::ArenaView;
use kvd_wire::frame;
use kvd_wire::session::{Bye, Fence, HelloReply, Limits, Register, RegisterReply, reply, request};
use rustix::event::{PollFd, PollFlags, Timespec};

use super::ticket::{Cell, Submitted};
use super::{LinkConfig, LinkRegistered, Namespace, NamespaceState, Shared, lock};
use crate::connection::{Connection, Mode, Progress, now};
use crate::epoch::Epoch;
use crate::handshake::{self, Past};
use crate::pending::{Kind, nobody_asked, undo};
use crate::{Error, ErrorKind};

mod sleep;

const BACKOFF_MIN: Duration = Duration::from_millis(10);
const BACKOFF_MAX: Duration = Duration::from_secs(1);
/// How long a Hello may take.
const HELLO_WITHIN: Duration = Duration::from_secs(5);
/// How long the last frame of a stopping link may take to be written.
const BYE_WITHIN: Duration = Duration::from_millis(200);
/// Most past sessions that are remembered to be fenced.
const PAST_MAX: usize = 64;
/// Requests are handed to the socket while less than this is unsent, in bytes.
const UNSENT_MAX: usize = 256 << 10;

/// Who a reply is for.
enum Owner {
    /// This thread itself.
    Hello,
    Namespace(Arc<Namespace>),
    Fence(u64),
    Ticket {
        cell: Arc<Cell>,
        deadline: Instant,
    },
}

struct Waiting {
    kind: Kind,
    owner: Owner,
}

/// A connection: before the Hello is answered, and after.
struct Session {
    connection: Connection,
    next_id: u32,
    waiting: HashMap<u32, Waiting>,
    limits: Limits,
    /// Until then the Hello must be answered.
    hello_by: Option<Instant>,
    epoch: Option<Arc<Epoch>>,
    since: Instant,
    /// How many of the link's namespaces were sent.
    registered: usize,
}

pub(super) struct Worker {
    config: LinkConfig,
    shared: Arc<Shared>,
    requests: Receiver<Submitted>,
    /// Requests that are not handed to the socket yet; at most as many as the queue holds.
    backlog: VecDeque<Submitted>,
    /// Until then it sleeps lightly.
    light_until: Instant,
    session: Option<Session>,
    /// What is offered to the next daemon.
    arena: Option<Arc<ArenaView>>,
    /// Past epochs whose Fence is still to be answered.
    past: Vec<Arc<Epoch>>,
    retry_at: Instant,
    backoff: Duration,
}

impl Worker {
    pub(super) fn new(
        config: LinkConfig,
        shared: Arc<Shared>,
        requests: Receiver<Submitted>,
    ) -> Self {
        Self {
            config,
            shared,
            requests,
            backlog: VecDeque::new(),
            light_until: now(),
            session: None,
            arena: None,
            past: Vec::new(),
            retry_at: now(),
            backoff: BACKOFF_MIN,
        }
    }

    pub(super) fn run(mut self) {
        while !self.shared.stop.load(Ordering::SeqCst) {
            if let Err(error) = self.turn() {
                self.lose(error);
            }
            self.sleep();
        }
        self.goodbye();
    }

    /// Does everything that can be done now.
    fn turn(&mut self) -> Result<(), Error> {
        if self.session.is_none() && now() >= self.retry_at {
            self.connect()?;
        }
        self.receive()?;
        self.expire()?;
        self.register()?;
        self.fence()?;
        self.take_requests();
        self.send_requests();
        if let Some(session) = &mut self.session {
            session.connection.flush(Mode::Now)?;
        }
        Ok(())
    }

    fn connect(&mut self) -> Result<(), Error> {
        let mut connection = Connection::connect(&self.config.socket, Mode::Now, HELLO_WITHIN)?;
        let past = Past {
            session: self.past.last().map_or(0, |e| e.session),
            arena: self.arena.as_deref(),
        };
        let (body, fds) = handshake::hello(&self.config.identity, past)?;
        connection.attach(fds);
        let mut session = Session {
            connection,
            next_id: 1,
            waiting: HashMap::new(),
            limits: handshake::limits_of(&HelloReply::default()),
            hello_by: Some(now() + HELLO_WITHIN),
            epoch: None,
            since: now(),
            registered: 0,
        };
        session.send(body, Owner::Hello)?;
        self.session = Some(session);
        Ok(())
    }

    /// Takes every reply that has come.
    fn receive(&mut self) -> Result<(), Error> {
        loop {
            let Some(session) = &mut self.session else {
                return Ok(());
            };
            if let Some(frame) = session.connection.next()? {
                let waiting = session.waiting.remove(&frame.id).ok_or_else(nobody_asked)?;
                let reply = waiting.kind.decode(frame.body)?;
                let ends = reply.as_ref().err().filter(|e| e.ends_session()).cloned();
                self.answered(waiting.owner, reply)?;
                if let Some(error) = ends {
                    return Err(error);
                }
            } else if session.connection.fill(Mode::Now)? == Progress::Wait {
                return Ok(());
            }
        }
    }

    fn answered(&mut self, owner: Owner, reply: Result<reply::Body, Error>) -> Result<(), Error> {
        match owner {
            Owner::Hello => match reply? {
                reply::Body::Hello(hello) => self.begin_epoch(hello),
                _ => Ok(()),
            },
            Owner::Namespace(namespace) => match reply {
                Ok(reply::Body::Register(register)) => self.joined(&namespace, register),
                Ok(_) => Ok(()),
                Err(error) => {
                    tracing::warn!(%error, "the daemon refused a namespace");
                    self.expect_fds();
                    set_namespace(&self.shared, &namespace, None, Some(error));
                    Ok(())
                }
            },
            Owner::Fence(past) => {
                if let Err(error) = reply {
                    tracing::debug!(%error, "the daemon knows nothing of a past session");
                }
                self.past.retain(|e| e.session != past);
                Ok(())
            }
            Owner::Ticket { cell, .. } => {
                let late = cell.put(reply).and_then(Result::ok).and_then(undo);
                match (late, &mut self.session) {
                    (Some(body), Some(session)) => session.send(body, nobody()),
                    _ => Ok(()),
                }
            }
        }
    }

    fn begin_epoch(&mut self, hello: HelloReply) -> Result<(), Error> {
        handshake::check(&hello)?;
        let Some(session) = &mut self.session else {
            return Ok(());
        };
        session.limits = handshake::limits_of(&hello);
        session.hello_by = None;
        if self.arena.is_some() {
            tracing::info!(adopted = hello.offer_adopted, "the daemon is back");
        }
        let number = self.shared.epochs.fetch_add(1, Ordering::AcqRel) + 1;
        let mut current = lock(&self.shared.current);
        let shared = Arc::downgrade(&self.shared);
        // One that names no start is taken for a start of its own: 0 is never the same as another.
        let incarnation = hello.incarnation[..].try_into().unwrap_or_default();
        let epoch = Epoch::new(number, hello.session, incarnation, move || {
            if let Some(shared) = shared.upgrade() {
                shared.notify.wake();
            }
        });
        session.epoch = Some(Arc::clone(&epoch));
        current.epoch = Some(epoch);
        current.error = None;
        self.shared.up.store(number, Ordering::Release);
        drop(current);
        self.shared.changed.notify_all();
        Ok(())
    }

    fn joined(&mut self, namespace: &Arc<Namespace>, register: RegisterReply) -> Result<(), Error> {
        let Some(session) = &mut self.session else {
            return Ok(());
        };
        let Some(epoch) = session.epoch.clone() else {
            return Ok(());
        };
        match register.fds {
            0 => {}
            2 => {
                let (arena, table) = session.connection.take_fds()?;
                let shape = handshake::from_wire(register.arena)?;
                let view = match &self.arena {
                    Some(known) => known.renew(arena, table, &shape)?,
                    None => ArenaView::map(arena, table, &shape)?,
                };
                let view = Arc::new(view);
                // The old one stays mapped as long as copies hold it.
                self.arena = Some(Arc::clone(&view));
                let _ = epoch.arena.set(view);
            }
            n => {
                return Err(Error::protocol(format!(
                    "the daemon sent {n} descriptors and not 2"
                )));
            }
        }
        self.expect_fds();
        let now = LinkRegistered {
            namespace: register.namespace,
            epoch: epoch.number,
            incarnation: epoch.incarnation,
        };
        set_namespace(&self.shared, namespace, Some(now), None);
        Ok(())
    }

    /// Descriptors are received only while a registration is under way.
    fn expect_fds(&mut self) {
        if let Some(session) = &mut self.session {
            let more = session.waiting.values().any(|w| w.kind == Kind::Register);
            session.connection.expect_fds(more);
        }
    }

    /// Sends what was not sent of the namespaces.
    fn register(&mut self) -> Result<(), Error> {
        let Some(session) = self.session.as_mut().filter(|s| s.epoch.is_some()) else {
            return Ok(());
        };
        let all = lock(&self.shared.namespaces);
        let due: Vec<_> = all[session.registered.min(all.len())..].to_vec();
        drop(all);
        for namespace in due {
            let body = request::Body::Register(Register {
                record: namespace.registration.record.clone().into(),
                groups: namespace.registration.groups.clone(),
            });
            session.registered += 1;
            session.connection.expect_fds(true);
            session.send(body, Owner::Namespace(namespace))?;
        }
        Ok(())
    }

    /// Says that the copies of all past epochs are over, the latest first: it is the one that Hello named. A daemon knows of
    /// the earlier ones through it, or by their tokens in the arena's table.
    fn fence(&mut self) -> Result<(), Error> {
        let Some(session) = self.session.as_mut().filter(|s| s.epoch.is_some()) else {
            return Ok(());
        };
        if fence_is_due(&self.past, session, &self.shared) {
            for epoch in self.past.iter().rev() {
                let past_session = epoch.session;
                let body = request::Body::Fence(Fence { past_session });
                session.send(body, Owner::Fence(past_session))?;
            }
        }
        Ok(())
    }

    /// Empties the queue into the backlog, as far as that has room.
    fn take_requests(&mut self) {
        let mut quiet = false;
        while self.backlog.len() < self.config.queue.max(1) {
            match self.requests.try_recv() {
                Ok(request) => {
                    quiet |= request.quiet;
                    self.backlog.push_back(request);
                }
                Err(TryRecvError::Empty | TryRecvError::Disconnected) => break,
            }
        }
        if quiet {
            self.light_until = now() + sleep::LIGHT_FOR;
        }
    }

    /// Hands the backlog to the socket, as far as the daemon's limits and the socket's buffer allow.
    fn send_requests(&mut self) {
        let epoch = self.session.as_ref().and_then(|s| s.epoch.clone());
        let (Some(session), Some(epoch)) = (&mut self.session, epoch) else {
            for request in self.backlog.drain(..) {
                request
                    .cell
                    .put(Err(Error::unavailable("the daemon has gone away")));
            }
            return;
        };
        while session.waiting.len() < session.limits.in_flight as usize
            && session.connection.unsent() < UNSENT_MAX
        {
            let Some(request) = self.backlog.pop_front() else {
                break;
            };
            if request.epoch != epoch.number {
                let gone = Error::unavailable("the daemon it was meant for has gone away");
                request.cell.put(Err(gone));
                continue;
            }
            let owner = Owner::Ticket {
                cell: Arc::clone(&request.cell),
                deadline: request.deadline,
            };
            if let Err(error) = session.send(request.body, owner) {
                request.cell.put(Err(error));
            }
        }
    }

    /// Answers what has waited too long.
    fn expire(&mut self) -> Result<(), Error> {
        let now = now();
        self.backlog.retain(|request| {
            let keep = request.deadline > now;
            if !keep {
                request.cell.put(Err(Error::timeout()));
            }
            keep
        });
        let Some(session) = &mut self.session else {
            return Ok(());
        };
        if session.hello_by.is_some_and(|by| now >= by) {
            return Err(Error::timeout());
        }
        for waiting in session.waiting.values_mut() {
            if let Owner::Ticket { cell, deadline } = &waiting.owner
                && *deadline <= now
                && cell.wanted()
            {
                cell.put(Err(Error::timeout()));
                // The id stays: what the reply brings is undone.
            }
        }
        Ok(())
    }

    /// The connection is lost, or could not be made.
    fn lose(&mut self, error: Error) {
        self.shared.up.store(0, Ordering::Release);
        let mut current = lock(&self.shared.current);
        let epoch = current.epoch.take();
        current.error = Some(error.clone());
        if let Some(epoch) = &epoch {
            epoch.end();
        }
        drop(current);
        for namespace in lock(&self.shared.namespaces).iter() {
            *lock(&namespace.state) = NamespaceState::default();
        }
        if let Some(session) = self.session.take() {
            // One that lasted is tried again at once; a daemon that takes us and drops us is not.
            if epoch.is_some() && session.since.elapsed() >= BACKOFF_MAX {
                self.backoff = BACKOFF_MIN;
            }
            for waiting in session.waiting.into_values() {
                if let Owner::Ticket { cell, .. } = waiting.owner {
                    cell.put(Err(Error::unavailable(error.to_string())));
                }
            }
        }
        self.take_requests();
        for request in self.backlog.drain(..) {
            request.cell.put(Err(Error::unavailable(error.to_string())));
        }
        self.shared.changed.notify_all();
        if let Some(epoch) = epoch {
            tracing::warn!(%error, "the session with the kvd daemon has ended; trying again");
            self.past.push(epoch);
            self.forget_oldest();
        }
        self.retry_at = now() + self.backoff;
        self.backoff = (self.backoff * 2).min(BACKOFF_MAX);
    }

    /// Bounds the list of sessions that no daemon has acknowledged the Fence of.
    fn forget_oldest(&mut self) {
        while self.past.len() > PAST_MAX {
            let Some(quiet) = self.past.iter().position(|e| e.copies() == 0) else {
                return;
            };
            self.past.remove(quiet);
        }
    }

    /// The link stops: say so if nothing is being copied.
    fn goodbye(&mut self) {
        let session = self.session.take();
        self.session = None;
        let quiet = |e: &Arc<Epoch>| {
            e.end();
            e.copies() == 0
        };
        if let Some(mut session) = session {
            if session.epoch.as_ref().is_some_and(quiet)
                && session.send(request::Body::Bye(Bye {}), nobody()).is_ok()
            {
                let by = now() + BYE_WITHIN;
                while matches!(session.connection.flush(Mode::Now), Ok(Progress::Wait))
                    && now() < by
                {
                    let mut fds = [PollFd::from_borrowed_fd(
                        session.connection.fd(),
                        PollFlags::OUT,
                    )];
                    let left = by.saturating_duration_since(now());
                    let left = Timespec::try_from(left).unwrap_or_default();
                    let _ = rustix::event::poll(&mut fds, Some(&left));
                }
            }
            self.session = Some(session);
        }
        self.lose(Error::unavailable("the link has stopped"));
    }
}

impl Session {
    fn send(&mut self, body: request::Body, owner: Owner) -> Result<(), Error> {
        let kind = Kind::of(&body);
        let message = kvd_wire::request(body);
        let length = frame::encoded_len(&message);
        if length > self.limits.frame_bytes as usize {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!(
                    "a request of {length} bytes is over the daemon's limit of {}: ask for fewer blocks at a time",
                    self.limits.frame_bytes
                ),
            ));
        }
        let id = self.next_id;
        self.next_id = self.next_id.wrapping_add(1).max(1);
        frame::encode(id, &message, self.connection.out());
        self.waiting.insert(id, Waiting { kind, owner });
        Ok(())
    }
}

/// Whether the past can be fenced now. A fence covers all that came before it, so the copies of every past epoch must be over.
/// And every namespace must be registered, or refused: until then the daemon may adopt an arena whose table lists the past.
fn fence_is_due(past: &[Arc<Epoch>], session: &Session, shared: &Shared) -> bool {
    let under_way = |w: &Waiting| matches!(w.owner, Owner::Fence(_) | Owner::Namespace(_));
    !past.is_empty()
        && past.iter().all(|epoch| epoch.copies() == 0)
        && session.registered >= lock(&shared.namespaces).len()
        && !session.waiting.values().any(under_way)
}

/// The owner of a request whose answer interests nobody.
fn nobody() -> Owner {
    Owner::Ticket {
        cell: Cell::nobody(),
        deadline: now(),
    }
}

fn set_namespace(
    shared: &Shared,
    namespace: &Namespace,
    current: Option<LinkRegistered>,
    refused: Option<Error>,
) {
    *lock(&namespace.state) = NamespaceState { current, refused };
    // Under the lock that waiters hold while they look, or one could miss it.
    drop(lock(&shared.current));
    shared.changed.notify_all();
}
