//! One connection: its socket, its buffers, and how far it has come. What requests mean is in `requests`.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use kvd_core::{Now, Role, SessionId, TenantId};
use kvd_wire::frame::{self, Decoder};
use kvd_wire::session::{ErrorKind, Register, Reply, reply};

use crate::stream::Outbox;

/// Nothing more is read from a session that has so many bytes of replies waiting to be sent.
const OUT_HIGH: usize = 1 << 20;

/// How far a connection has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stage {
    /// It has not said who it is, and must before this.
    Greeting { deadline: Now },
    /// It is a session.
    Open { session: SessionId, role: Role },
    /// What is in the outbox is sent, then it is closed; in any case after this.
    Ending { deadline: Now },
}

/// One connection.
#[derive(Debug)]
pub(crate) struct Connection {
    pub(crate) key: u64,
    pub(crate) tenant: TenantId,
    pub(crate) stream: UnixStream,
    pub(crate) stage: Stage,
    pub(crate) decoder: Decoder,
    /// Descriptors that came and belong to no message yet.
    pub(crate) fds: Vec<OwnedFd>,
    pub(crate) out: Outbox,
    /// The process at the other end.
    pub(crate) pidfd: Option<OwnedFd>,
    /// A registration that waits for a former daemon's arena. Nothing is read meanwhile.
    pub(crate) held: Option<(u32, Register)>,
    /// Requests without a reply.
    pub(crate) in_flight: u32,
    /// Whether it has been given the arena.
    pub(crate) has_arena: bool,
    /// Its process as this one sees it.
    pub(crate) pid: Option<u32>,
    /// The other end is closed: what it has sent is still taken, nothing can be answered.
    pub(crate) hung_up: bool,
    /// There is nothing more to be read or sent.
    pub(crate) at_end: bool,
    /// Bytes of its buffers, as they were last added up.
    pub(crate) counted: usize,
    /// What epoll has been told to look for: readable, writable.
    pub(crate) interest: (bool, bool),
}

impl Connection {
    /// A connection that has just been accepted.
    pub(crate) fn new(
        key: u64,
        tenant: TenantId,
        stream: UnixStream,
        frame_bytes: u32,
        deadline: Now,
    ) -> Self {
        Self {
            key,
            tenant,
            stream,
            stage: Stage::Greeting { deadline },
            decoder: Decoder::new(frame_bytes),
            fds: Vec::new(),
            out: Outbox::default(),
            pidfd: None,
            held: None,
            in_flight: 0,
            has_arena: false,
            pid: None,
            hung_up: false,
            at_end: false,
            counted: 0,
            interest: (true, false),
        }
    }

    /// Its session, if it is one.
    pub(crate) fn session(&self) -> Option<SessionId> {
        match self.stage {
            Stage::Open { session, .. } => Some(session),
            _ => None,
        }
    }

    /// Whether more requests may be taken from it now.
    pub(crate) fn may_read(&self, in_flight: u32) -> bool {
        let room =
            self.held.is_none() && self.out.pending() < OUT_HIGH && self.in_flight < in_flight;
        !matches!(self.stage, Stage::Ending { .. }) && (room || self.hung_up)
    }

    /// Appends a reply.
    pub(crate) fn reply(&mut self, id: u32, body: reply::Body) {
        frame::encode(id, &kvd_wire::reply(body), self.out.buffer());
    }

    /// Appends a reply unless it is longer than `limit` bytes, when the client is told to ask for less.
    pub(crate) fn reply_within(&mut self, id: u32, body: reply::Body, limit: u32) {
        let reply = kvd_wire::reply(body);
        if frame::encoded_len(&reply) > limit as usize {
            let text =
                format!("the answer is longer than {limit} bytes: ask for fewer blocks at a time");
            return self.fail(id, ErrorKind::Invalid, text, false);
        }
        frame::encode(id, &reply, self.out.buffer());
    }

    /// Appends a failure.
    pub(crate) fn fail(&mut self, id: u32, kind: ErrorKind, text: impl Into<String>, ends: bool) {
        let reply: Reply = kvd_wire::failure(kind, text, ends);
        frame::encode(id, &reply, self.out.buffer());
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}
