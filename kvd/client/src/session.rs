//! A blocking session: calls with one timeout, or several requests at once and their replies in any order.
//!
//! A reply that comes after its call has given up is undone when it is seen (slots aborted, leases released). Deliberately
//! absent: reconnecting. When the connection is lost every call says so; make a new session.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use kvd_arena::ArenaView;
use kvd_wire::frame;
use kvd_wire::session::{
    Abort, Bye, Commit, CommitReply, GroupLayout, HelloReply, Limits, LoadReply, LookupReply, Ping,
    Register, RegisterReply, Release, ReserveReply, Status, reply, request,
};
use rustix::process::Pid;

use crate::connection::{Connection, Mode, Progress};
use crate::epoch::{CopyGuard, Epoch};
use crate::handshake::{self, Identity, Past};
use crate::pending::{Kind, nobody_asked, undo};
use crate::{Error, ErrorKind, encode};

/// Block hashes in prompt order, 32 bytes each, packed.
#[derive(Debug, Clone, Copy)]
pub struct ChainRef<'a> {
    /// KV-cache group.
    pub group: u32,
    /// The hashes.
    pub hashes: &'a [u8],
    /// The hash before the first, if known.
    pub parent: Option<&'a [u8; 32]>,
}

/// A namespace that this session has joined.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Registered {
    /// Its short name in this session.
    pub namespace: u32,
    /// BLAKE3 of its record.
    pub namespace_id: [u8; 32],
}

/// A session whose calls block, each for at most the timeout.
///
/// A hash list in a call is packed bytes, 32 for each hash. Every call's errors: `Unavailable` when the daemon is gone or
/// does not answer in time, `Invalid` when it does not keep to the protocol, else what the daemon said.
#[derive(Debug)]
pub struct Session {
    connection: Connection,
    pid: Pid,
    timeout: Duration,
    next_id: u32,
    /// Requests without reply; false: nobody waits for it any more.
    waiting: HashMap<u32, (Kind, bool)>,
    arrived: HashMap<u32, Result<reply::Body, Error>>,
    hello: HelloReply,
    limits: Limits,
    epoch: Arc<Epoch>,
    dead: Option<Error>,
}

macro_rules! expect {
    ($reply:expr, $variant:ident) => {
        match $reply? {
            reply::Body::$variant(body) => Ok(body),
            // `Kind::decode` has refused it already.
            other => Err(Error::new(
                ErrorKind::Internal,
                format!("an unexpected reply: {other:?}"),
            )),
        }
    };
}

impl Session {
    /// Connects and says Hello. `timeout` is also that of every call, until [`Session::set_timeout`].
    ///
    /// # Errors
    /// `Unavailable` when there is no daemon or it does not answer; what it said when it refuses.
    pub fn connect(socket: &Path, identity: &Identity, timeout: Duration) -> Result<Self, Error> {
        let connection = Connection::connect(socket, Mode::Blocking, timeout)?;
        let mut session = Self {
            connection,
            pid: rustix::process::getpid(),
            timeout,
            next_id: 1,
            waiting: HashMap::new(),
            arrived: HashMap::new(),
            hello: HelloReply::default(),
            limits: handshake::limits_of(&HelloReply::default()),
            epoch: Epoch::new(1, 0, [0; 16], || {}),
            dead: None,
        };
        let (body, fds) = handshake::hello(identity, Past::default())?;
        session.connection.attach(fds);
        let id = session.send(body)?;
        let hello: HelloReply = expect!(session.receive(id), Hello)?;
        handshake::check(&hello)?;
        session.limits = handshake::limits_of(&hello);
        let incarnation = hello.incarnation[..].try_into().unwrap_or_default();
        session.epoch = Epoch::new(1, hello.session, incarnation, || {});
        session.hello = hello;
        Ok(session)
    }

    /// What the daemon said of itself.
    pub fn hello(&self) -> &HelloReply {
        &self.hello
    }

    /// What the daemon accepts.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Sets the timeout of later calls.
    ///
    /// # Errors
    /// When the session is over.
    pub fn set_timeout(&mut self, timeout: Duration) -> Result<(), Error> {
        self.timeout = timeout;
        self.connection.set_timeout(timeout)
    }

    /// The arena, once a namespace is registered.
    pub fn arena(&self) -> Option<Arc<ArenaView>> {
        self.epoch.arena.get().cloned()
    }

    /// Says that a copy begins; keep the guard until it is over.
    ///
    /// # Errors
    /// `Unavailable` when no namespace was registered or the session is over.
    pub fn begin_copy(&self) -> Result<CopyGuard, Error> {
        self.alive()?;
        self.epoch.begin_copy()
    }

    /// Joins the namespace of this record; the first time, maps the arena.
    ///
    /// # Errors
    /// As all calls.
    pub fn register(&mut self, record: &[u8], groups: &[GroupLayout]) -> Result<Registered, Error> {
        let id = self.send(request::Body::Register(Register {
            record: Bytes::copy_from_slice(record),
            groups: groups.to_vec(),
        }))?;
        let reply: RegisterReply = expect!(self.receive(id), Register)?;
        let namespace_id = reply.namespace_id[..]
            .try_into()
            .map_err(|_| Error::protocol("the daemon gave a namespace without id"))?;
        Ok(Registered {
            namespace: reply.namespace,
            namespace_id,
        })
    }

    /// Which of these blocks are there?
    ///
    /// # Errors
    /// As all calls.
    pub fn lookup(
        &mut self,
        namespace: u32,
        chains: &[ChainRef<'_>],
        lease_ms: u32,
        leading: bool,
    ) -> Result<LookupReply, Error> {
        let id = self.send_with(Kind::Lookup, |id, out| {
            encode::lookup(id, namespace, chains, lease_ms, leading, out)
        })?;
        expect!(self.receive(id), Lookup)
    }

    /// Takes slots for blocks that are to be stored.
    ///
    /// # Errors
    /// As all calls.
    pub fn reserve(&mut self, namespace: u32, chain: ChainRef<'_>) -> Result<ReserveReply, Error> {
        let id = self.send_with(Kind::Reserve, |id, out| {
            encode::reserve(id, namespace, &chain, out)
        })?;
        expect!(self.receive(id), Reserve)
    }

    /// Says that this process' part of these slots is written.
    ///
    /// # Errors
    /// As all calls.
    pub fn commit(
        &mut self,
        namespace: u32,
        group: u32,
        slots: &[u32],
        generations: &[u64],
        crcs: &[u64],
    ) -> Result<CommitReply, Error> {
        let id = self.send(request::Body::Commit(Commit {
            namespace,
            group,
            slots: slots.to_vec(),
            generations: generations.to_vec(),
            crcs: crcs.to_vec(),
        }))?;
        expect!(self.receive(id), Commit)
    }

    /// Gives slots back that will not be written. Returns how many were still reserved.
    ///
    /// # Errors
    /// As all calls.
    pub fn abort(&mut self, slots: &[u32], generations: &[u64]) -> Result<u32, Error> {
        let id = self.send(request::Body::Abort(Abort {
            slots: slots.to_vec(),
            generations: generations.to_vec(),
        }))?;
        Ok(expect!(self.receive(id), Abort)?.aborted)
    }

    /// Leases blocks for reading.
    ///
    /// # Errors
    /// As all calls.
    pub fn load(
        &mut self,
        namespace: u32,
        group: u32,
        hashes: &[u8],
        deadline_ms: u32,
    ) -> Result<LoadReply, Error> {
        let id = self.send_with(Kind::Load, |id, out| {
            encode::load(id, namespace, group, hashes, deadline_ms, out)
        })?;
        expect!(self.receive(id), Load)
    }

    /// Ends read leases, and the lookup lease `lease` unless it is 0. `corrupt` has positions in `slots`.
    ///
    /// # Errors
    /// As all calls.
    pub fn release(
        &mut self,
        slots: &[u32],
        generations: &[u64],
        corrupt: &[u32],
        lease: u64,
    ) -> Result<(), Error> {
        let id = self.send(request::Body::Release(Release {
            slots: slots.to_vec(),
            generations: generations.to_vec(),
            corrupt: corrupt.to_vec(),
            lease,
        }))?;
        expect!(self.receive(id), Release).map(|_| ())
    }

    /// The daemon's status, as JSON.
    ///
    /// # Errors
    /// As all calls.
    pub fn status(&mut self) -> Result<Bytes, Error> {
        let id = self.send(request::Body::Status(Status {}))?;
        Ok(expect!(self.receive(id), Status)?.json)
    }

    /// A round trip.
    ///
    /// # Errors
    /// As all calls.
    pub fn ping(&mut self) -> Result<(), Error> {
        let id = self.send(request::Body::Ping(Ping {}))?;
        expect!(self.receive(id), Pong).map(|_| ())
    }

    /// Sends a request without waiting for its reply; give the id to [`Session::receive`]. Do so for each.
    ///
    /// # Errors
    /// `Busy` when the daemon's limit of requests without reply is reached, `Invalid` when the request is too long; else as
    /// all calls.
    pub fn send(&mut self, body: request::Body) -> Result<u32, Error> {
        self.send_with(Kind::of(&body), |id, out| {
            let message = kvd_wire::request(body);
            frame::encode(id, &message, out);
            frame::encoded_len(&message)
        })
    }

    fn send_with(
        &mut self,
        kind: Kind,
        encode: impl FnOnce(u32, &mut Vec<u8>) -> usize,
    ) -> Result<u32, Error> {
        self.alive()?;
        // Replies that have come make room, and late ones want to be undone.
        if self.waiting.len() >= self.limits.in_flight as usize {
            while self.connection.fill(Mode::Now).map_err(|e| self.die(e))? == Progress::Done {
                self.sort()?;
            }
            if self.waiting.len() >= self.limits.in_flight as usize {
                return Err(Error::new(
                    ErrorKind::Busy,
                    "too many requests without reply: receive some first",
                ));
            }
        }
        let id = self.next_id;
        let start = self.connection.out().len();
        let length = encode(id, self.connection.out());
        if length > self.limits.frame_bytes as usize {
            self.connection.out().truncate(start);
            return Err(Error::invalid(format!(
                "a request of {length} bytes is over the daemon's limit of {}: ask for fewer blocks at a time",
                self.limits.frame_bytes
            )));
        }
        self.next_id = self.next_id.wrapping_add(1).max(1);
        self.waiting.insert(id, (kind, true));
        if kind == Kind::Register {
            self.connection.expect_fds(true);
        }
        match self.connection.flush(Mode::Blocking) {
            Ok(Progress::Done) => Ok(id),
            // Half a frame is written: nothing can follow it.
            Ok(Progress::Wait) => Err(self.die(Error::timeout().ending())),
            Err(e) => Err(self.die(e)),
        }
    }

    /// Waits for the reply to a request, for at most the timeout. A failure that the daemon reports is an error.
    ///
    /// # Errors
    /// As all calls; after a timeout the reply is undone when it comes.
    #[allow(
        clippy::disallowed_methods,
        reason = "a blocking call with a timeout is an edge: it reads the clock"
    )]
    pub fn receive(&mut self, id: u32) -> Result<reply::Body, Error> {
        let began = Instant::now();
        loop {
            if let Some(reply) = self.arrived.remove(&id) {
                return reply;
            }
            self.alive()?;
            if !self.waiting.contains_key(&id) {
                return Err(Error::invalid(format!("no reply is due for request {id}")));
            }
            let late = self.connection.unsent() == 0 && began.elapsed() >= self.timeout;
            let progress = if late {
                Ok(Progress::Wait)
            } else {
                self.connection.fill(Mode::Blocking)
            };
            match progress {
                Ok(Progress::Done) => self.sort()?,
                Ok(Progress::Wait) => {
                    if let Some((_, wanted)) = self.waiting.get_mut(&id) {
                        *wanted = false;
                    }
                    return Err(Error::timeout());
                }
                Err(e) => return Err(self.die(e)),
            }
        }
    }

    /// Ends the session in good order: the daemon may take back at once what it had reserved and leased. Dropping the
    /// session does the same and ignores errors. While a copy is under way nothing is said.
    ///
    /// # Errors
    /// As all calls; the session is over in any case.
    pub fn close(mut self) -> Result<(), Error> {
        let said = match self.goodbye()? {
            Some(id) => expect!(self.receive(id), Bye).map(|_| ()),
            None => Ok(()),
        };
        self.dead = Some(Error::unavailable("the session is closed"));
        said
    }

    /// Sends a Bye, if no copy is under way.
    fn goodbye(&mut self) -> Result<Option<u32>, Error> {
        self.alive()?;
        self.epoch.end();
        if self.epoch.copies() > 0 {
            return Ok(None);
        }
        self.send(request::Body::Bye(Bye {})).map(Some)
    }

    fn alive(&self) -> Result<(), Error> {
        if self.pid != rustix::process::getpid() {
            return Err(Error::forked());
        }
        self.dead.clone().map_or(Ok(()), Err)
    }

    fn die(&mut self, error: Error) -> Error {
        self.epoch.end();
        self.dead = Some(error.clone());
        error
    }

    /// Takes every frame that has come to who waits for it, and undoes what nobody waits for.
    fn sort(&mut self) -> Result<(), Error> {
        let mut late = Vec::new();
        let result = self.take_frames(&mut late);
        if let Err(e) = result {
            return Err(self.die(e));
        }
        for body in late {
            // Its reply is of no interest either.
            let Ok(id) = self.send(body) else {
                continue; // full or gone: leases and reservations end by themselves
            };
            if let Some((_, wanted)) = self.waiting.get_mut(&id) {
                *wanted = false;
            }
        }
        Ok(())
    }

    fn take_frames(&mut self, late: &mut Vec<request::Body>) -> Result<(), Error> {
        while let Some(frame) = self.connection.next()? {
            let (kind, wanted) = self.waiting.remove(&frame.id).ok_or_else(nobody_asked)?;
            let mut reply = kind.decode(frame.body)?;
            if let Ok(reply::Body::Register(register)) = &mut reply {
                self.take_arena(register)?;
            }
            if kind == Kind::Register {
                let more = self.waiting.values().any(|(k, _)| *k == Kind::Register);
                self.connection.expect_fds(more);
            }
            if let Err(error) = &reply
                && error.ends_session()
            {
                return Err(error.clone());
            }
            if wanted {
                self.arrived.insert(frame.id, reply);
            } else if let Some(body) = reply.ok().and_then(undo) {
                late.push(body);
            }
        }
        Ok(())
    }

    fn take_arena(&mut self, register: &mut RegisterReply) -> Result<(), Error> {
        match register.fds {
            0 => return Ok(()),
            2 => {}
            n => {
                return Err(Error::protocol(format!(
                    "the daemon sent {n} descriptors and not 2"
                )));
            }
        }
        let (arena, table) = self.connection.take_fds()?;
        let shape = handshake::from_wire(register.arena.take())?;
        let view = ArenaView::map(arena, table, &shape)?;
        // A second one would be the daemon's mistake; the first stays.
        let _ = self.epoch.arena.set(Arc::new(view));
        Ok(())
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // In a forked child the socket is the parent's: say nothing. The daemon reads a Bye also after the socket closed.
        if self.hello.session != 0 {
            let _ = self.goodbye();
        }
        self.epoch.end();
    }
}
