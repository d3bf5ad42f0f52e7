//! The node's thread: one epoll over listeners, connections, processes, the doorbell and signals.
//!
//! Everything that a request needs happens between two waits: read, decode, ask core, encode, send. Nothing here blocks.
//! What one session can make the thread do at a time is bounded by one receive buffer.

mod lifecycle;

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use kvd_core::{Now, SessionId, TenantId};
use kvd_node::{Effect, HostArenas, Node, SystemClock, SystemEntropy};
use kvd_wire::session::ErrorKind;
use nix::sys::signalfd::SignalFd;
use rustix::buffer::spare_capacity;
use rustix::event::{Timespec, epoll};

use crate::config::ServeConfig;
use crate::connection::{Connection, Stage};
use crate::doorbell::Door;
use crate::given::Given;
use crate::listen::Listener;
use crate::message::Message;
use crate::metrics::{KINDS, Latency};
use crate::report::Reporter;
use crate::stores::StoreSet;
use crate::stream::{Outbox, Received, receive};

/// How often deadlines of connections are looked at while there are any.
const CARE_US: u64 = 100_000;
/// Most memory that the buffers of all sessions may take, in bytes.
const BUFFERS_BYTES: usize = 256 << 20;
/// What is a large buffer, in bytes.
const LARGE_BYTES: usize = 1 << 20;

/// What an epoll event is about: the top byte of its data. The rest is a number.
const LISTENER: u64 = 1 << 56;
const CONNECTION: u64 = 2 << 56;
const PROCESS: u64 = 3 << 56;
const DOOR: u64 = 4 << 56;
const SIGNAL: u64 = 5 << 56;
const NUMBER: u64 = (1 << 56) - 1;

/// The real node.
pub(crate) type HostNode = Node<SystemClock, SystemEntropy, HostArenas, StoreSet>;

/// A session whose socket has closed while its process lives: it may still copy.
#[derive(Debug)]
pub(crate) struct Ghost {
    pub(crate) tenant: TenantId,
    pub(crate) session: SessionId,
    /// Kept open: when it becomes readable, the process is gone.
    _pidfd: OwnedFd,
}

/// The thread's state.
pub(crate) struct Reactor {
    /// Goes first: threads of stores that wait to tell something must not be waited for.
    pub(crate) door: Door<Message>,
    pub(crate) config: ServeConfig,
    pub(crate) node: HostNode,
    pub(crate) reporter: Reporter,
    pub(crate) ready: Arc<AtomicBool>,
    epoll: OwnedFd,
    signals: SignalFd,
    listeners: Vec<Listener>,
    pub(crate) sockets: Vec<PathBuf>,
    /// Boxed: they are taken out while they are worked on.
    pub(crate) connections: HashMap<u64, Box<Connection>>,
    pub(crate) by_session: HashMap<SessionId, u64>,
    pub(crate) ghosts: HashMap<u64, Ghost>,
    next_key: u64,
    /// When deadlines of connections are looked at next.
    care_at: Option<Now>,
    /// Accepting failed for want of descriptors: not before this again.
    accept_again: Option<Now>,
    stopping: bool,
    pub(crate) latency: [Latency; KINDS.len()],
    pub(crate) refused: u64,
    pub(crate) broken: u64,
    buffer_bytes: usize,
    /// By tenant: the arena that clients have, from this daemon or the one before.
    pub(crate) given: Vec<Option<Given>>,
}

/// What a reactor is made of.
pub(crate) struct Parts {
    pub(crate) config: ServeConfig,
    pub(crate) node: HostNode,
    pub(crate) reporter: Reporter,
    pub(crate) door: Door<Message>,
    pub(crate) ready: Arc<AtomicBool>,
    pub(crate) signals: SignalFd,
    pub(crate) listeners: Vec<Listener>,
    /// By tenant: the arena that the daemon before this one gave to clients.
    pub(crate) given: Vec<Option<Given>>,
}

impl Reactor {
    /// Puts everything under one epoll.
    pub(crate) fn new(parts: Parts) -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let add = |fd: &dyn AsFd, data| {
            epoll::add(
                &epoll,
                fd.as_fd(),
                epoll::EventData::new_u64(data),
                epoll::EventFlags::IN,
            )
        };
        for (number, listener) in parts.listeners.iter().enumerate() {
            add(listener, LISTENER | number as u64)?;
        }
        add(&parts.door, DOOR)?;
        add(&parts.signals, SIGNAL)?;
        Ok(Self {
            sockets: parts
                .listeners
                .iter()
                .map(|l| l.path().to_owned())
                .collect(),
            config: parts.config,
            node: parts.node,
            reporter: parts.reporter,
            door: parts.door,
            ready: parts.ready,
            epoll,
            signals: parts.signals,
            listeners: parts.listeners,
            connections: HashMap::new(),
            by_session: HashMap::new(),
            ghosts: HashMap::new(),
            next_key: 1,
            care_at: None,
            accept_again: None,
            stopping: false,
            latency: Default::default(),
            refused: 0,
            broken: 0,
            buffer_bytes: 0,
            given: parts.given,
        })
    }

    /// Serves until a signal says to stop; then sends what is in flight and returns.
    pub(crate) fn run(&mut self) -> io::Result<()> {
        let mut events = Vec::with_capacity(128);
        while !self.stopping {
            self.turn(&mut events, None)?;
        }
        self.ready.store(false, Ordering::Release);
        self.take_word_back();
        self.drain(&mut events)
    }

    /// One wait and what came of it.
    fn turn(&mut self, events: &mut Vec<epoll::Event>, until: Option<Now>) -> io::Result<()> {
        let deadlines = [
            self.node.next_deadline(),
            self.care_at,
            self.accept_again,
            until,
        ];
        let timeout = deadlines
            .into_iter()
            .flatten()
            .min()
            .map(|at| self.until(at));
        events.clear();
        match epoll::wait(&self.epoll, spare_capacity(events), timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
        for event in events.iter() {
            let (kind, number) = (event.data.u64() & !NUMBER, event.data.u64() & NUMBER);
            match kind {
                CONNECTION => self.connection_event(number, event.flags),
                PROCESS => self.process_gone(number),
                LISTENER => self.accept(number as usize),
                DOOR => self.messages(),
                _ => self.signal(),
            }
        }
        self.by_the_clock();
        Ok(())
    }

    /// From now to `at`, rounded up so that it has come when the wait is over.
    fn until(&self, at: Now) -> Timespec {
        let wait = Duration::from_micros(at.0.saturating_sub(self.node.now().0));
        Timespec {
            tv_sec: wait.as_secs() as i64,
            tv_nsec: i64::from(wait.subsec_nanos()),
        }
    }

    fn by_the_clock(&mut self) {
        let now = self.node.now();
        if self.node.next_deadline().is_some_and(|at| at <= now) {
            self.node.tick();
            self.deliver(None);
        }
        if self.accept_again.is_some_and(|at| at <= now) {
            self.accept_again = None;
            for number in 0..self.listeners.len() {
                self.listen(number, epoll::EventFlags::IN);
            }
        }
        if self.care_at.is_some_and(|at| at <= now) {
            self.care(now);
        }
    }

    /// Looks at everything that has a deadline or waits for something that no event announces.
    fn care(&mut self, now: Now) {
        let node = &self.node;
        self.ghosts.retain(|_, ghost| node.knows(ghost.session));
        let keys: Vec<u64> = self.connections.keys().copied().collect();
        let mut more = !self.ghosts.is_empty();
        for key in keys {
            let Some(mut connection) = self.connections.remove(&key) else {
                continue;
            };
            match connection.stage {
                Stage::Greeting { deadline } if deadline <= now => {
                    connection.fail(
                        0,
                        ErrorKind::Invalid,
                        "no Hello came in time: say Hello first",
                        true,
                    );
                    self.end(&mut connection);
                }
                Stage::Ending { deadline } if deadline <= now => {
                    self.close(*connection);
                    continue;
                }
                _ => {}
            }
            if connection.held.is_some() && !self.node.registrations_wait(connection.tenant) {
                self.release_held(&mut connection);
                self.work(&mut connection);
            }
            more |= !matches!(connection.stage, Stage::Open { .. }) || connection.held.is_some();
            self.keep(connection);
        }
        self.care_at = more.then_some(Now(now.0 + CARE_US));
    }

    /// Something has changed that others wait for: looks at them in this turn.
    pub(crate) fn care_now(&mut self) {
        self.care_at = Some(self.node.now());
    }

    /// From now on there is something to look at by the clock.
    pub(crate) fn needs_care(&mut self) {
        if self.care_at.is_none() {
            self.care_at = Some(Now(self.node.now().0 + CARE_US));
        }
    }

    fn signal(&mut self) {
        if let Ok(Some(signal)) = self.signals.read_signal() {
            tracing::info!(signal = signal.ssi_signo, "stopping");
            self.stopping = true;
        }
    }

    fn connection_event(&mut self, key: u64, flags: epoll::EventFlags) {
        let Some(mut connection) = self.connections.remove(&key) else {
            return;
        };
        if flags.intersects(epoll::EventFlags::HUP | epoll::EventFlags::ERR) {
            connection.hung_up = true;
            connection.held = None;
            connection.at_end |= matches!(connection.stage, Stage::Ending { .. });
        }
        self.work(&mut connection);
        self.keep(connection);
    }

    /// Does all that can be done for a connection now: sends, reads once, answers, sends. Says whether something came.
    pub(crate) fn work(&mut self, connection: &mut Connection) -> bool {
        let mut came = false;
        if connection.out.pending() > 0 {
            self.send(connection);
            // There may be whole requests that were left when the outbox was full.
            self.answer(connection);
        }
        if connection.may_read(self.config.limits.in_flight) && !connection.at_end {
            match receive(
                &connection.stream,
                connection.decoder.space(),
                &mut connection.fds,
            ) {
                Ok(Received::Bytes(count)) => {
                    connection.decoder.filled(count);
                    self.answer(connection);
                    came = true;
                }
                Ok(Received::Nothing) => {}
                Ok(Received::Closed) => connection.at_end = true,
                Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                    connection.fds.clear();
                    self.broke(
                        connection,
                        0,
                        "more file descriptors came than any message has: send none unasked",
                    );
                }
                Err(error) => {
                    tracing::debug!(%error, "a connection failed");
                    connection.at_end = true;
                }
            }
        }
        self.send(connection);
        came
    }

    /// Takes everything that has been sent: there will be no other occasion.
    fn work_out(&mut self, connection: &mut Connection) {
        while !connection.at_end
            && connection.may_read(self.config.limits.in_flight)
            && self.work(connection)
        {}
    }

    /// Answers the whole requests that have come, while the session may send more.
    pub(crate) fn answer(&mut self, connection: &mut Connection) {
        while connection.may_read(self.config.limits.in_flight) {
            match connection.decoder.next() {
                Ok(Some(frame)) => self.frame(connection, frame),
                Ok(None) => return,
                Err(error) => return self.broke(connection, 0, error.to_string()),
            }
        }
    }

    fn send(&mut self, connection: &mut Connection) {
        if connection.hung_up {
            connection.out = Outbox::default();
        }
        if connection.out.pending() == 0 {
            return;
        }
        if let Err(error) = connection.out.send(&connection.stream) {
            tracing::debug!(%error, "a reply could not be sent");
            connection.at_end = true;
        }
    }

    /// Keeps a connection that was worked on, or closes it when it is over.
    pub(crate) fn keep(&mut self, mut connection: Box<Connection>) {
        let ending = matches!(connection.stage, Stage::Ending { .. });
        if connection.at_end || (ending && connection.out.pending() == 0) {
            return self.close(*connection);
        }
        if self.over_budget(&mut connection) {
            tracing::warn!(
                "a session was ended: buffers of all sessions together are over their limit"
            );
            return self.close(*connection);
        }
        let wanted = (
            connection.may_read(self.config.limits.in_flight),
            connection.out.pending() > 0,
        );
        if wanted != connection.interest {
            let mut flags = epoll::EventFlags::empty();
            flags.set(epoll::EventFlags::IN, wanted.0);
            flags.set(epoll::EventFlags::OUT, wanted.1);
            let data = epoll::EventData::new_u64(CONNECTION | connection.key);
            if let Err(error) = epoll::modify(&self.epoll, &connection.stream, data, flags) {
                tracing::error!(%error, "a connection can no longer be watched");
                return self.close(*connection);
            }
            connection.interest = wanted;
        }
        self.connections.insert(connection.key, connection);
    }

    /// Adds up the buffers. A session with a large one is over when there are too many of those.
    fn over_budget(&mut self, connection: &mut Connection) -> bool {
        let bytes = connection.decoder.allocated() + connection.out.allocated();
        self.buffer_bytes = self.buffer_bytes + bytes - connection.counted;
        connection.counted = bytes;
        self.buffer_bytes > BUFFERS_BYTES && bytes > LARGE_BYTES
    }

    /// Gives sessions what core has for them. `current` is a connection that is being worked on.
    pub(crate) fn deliver(&mut self, mut current: Option<&mut Connection>) {
        while let Some(effect) = self.node.take_effect() {
            self.route(effect, current.as_deref_mut());
        }
    }

    /// Gives one session what core has for it.
    pub(crate) fn route(&mut self, effect: Effect, current: Option<&mut Connection>) {
        let (Effect::Reply { session, .. } | Effect::End { session, .. }) = &effect;
        if let Some(connection) = current
            && connection.session() == Some(*session)
        {
            return self.tell(connection, effect);
        }
        // Nobody is there to be told when the session has just ended.
        let Some(key) = self.by_session.get(session).copied() else {
            return;
        };
        let Some(mut other) = self.connections.remove(&key) else {
            return;
        };
        self.tell(&mut other, effect);
        self.send(&mut other);
        self.keep(other);
    }
}
