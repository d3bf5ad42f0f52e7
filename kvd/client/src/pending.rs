//! What kind of reply a request gets, and how to undo a reply that nobody waits for any more.

use bytes::Bytes;
use kvd_wire::session::{Abort, Release, Reply, reply, request};
use prost::Message;

use crate::Error;

/// Kinds of requests, as far as their replies go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Hello,
    Register,
    Lookup,
    Reserve,
    Commit,
    Abort,
    Load,
    Release,
    Fence,
    Status,
    Ping,
    Bye,
}

impl Kind {
    pub(crate) fn of(body: &request::Body) -> Self {
        use request::Body;
        match body {
            Body::Hello(_) => Self::Hello,
            Body::Register(_) => Self::Register,
            Body::Lookup(_) => Self::Lookup,
            Body::Reserve(_) => Self::Reserve,
            Body::Commit(_) => Self::Commit,
            Body::Abort(_) => Self::Abort,
            Body::Load(_) => Self::Load,
            Body::Release(_) => Self::Release,
            Body::Fence(_) => Self::Fence,
            Body::Status(_) => Self::Status,
            Body::Ping(_) => Self::Ping,
            Body::Bye(_) => Self::Bye,
        }
    }

    fn answers(self, body: &reply::Body) -> bool {
        use reply::Body;
        matches!(
            (self, body),
            (_, Body::Failure(_))
                | (Self::Hello, Body::Hello(_))
                | (Self::Register, Body::Register(_))
                | (Self::Lookup, Body::Lookup(_))
                | (Self::Reserve, Body::Reserve(_))
                | (Self::Commit, Body::Commit(_))
                | (Self::Abort, Body::Abort(_))
                | (Self::Load, Body::Load(_))
                | (Self::Release, Body::Release(_))
                | (Self::Fence, Body::Fence(_))
                | (Self::Status, Body::Status(_))
                | (Self::Ping, Body::Pong(_))
                | (Self::Bye, Body::Bye(_))
        )
    }

    /// The reply in a frame, which must be one that this kind of request gets. The outer error ends the session.
    pub(crate) fn decode(self, frame: Bytes) -> Result<Result<reply::Body, Error>, Error> {
        let reply = Reply::decode(frame)
            .map_err(|e| Error::protocol(format!("the daemon sent no reply: {e}")))?;
        match reply.body {
            Some(reply::Body::Failure(failure)) => Ok(Err(failure.into())),
            Some(body) if self.answers(&body) => Ok(Ok(body)),
            _ => Err(Error::protocol(format!(
                "the daemon answered a {self:?} with something else"
            ))),
        }
    }
}

/// What a frame means that answers no request.
pub(crate) fn unasked(frame: Bytes) -> Error {
    match Reply::decode(frame).ok().and_then(|reply| reply.body) {
        Some(reply::Body::Failure(failure)) => Error::from(failure).ending(),
        _ => nobody_asked(),
    }
}

/// An answer to no request that waits for one.
pub(crate) fn nobody_asked() -> Error {
    Error::protocol("the daemon answered what nobody asked")
}

/// What takes back the side effect of a reply that came too late, if it had one.
pub(crate) fn undo(reply: reply::Body) -> Option<request::Body> {
    match reply {
        reply::Body::Reserve(r) if !r.slots.is_empty() => Some(request::Body::Abort(Abort {
            slots: r.slots,
            generations: r.generations,
        })),
        reply::Body::Load(r) if !r.slots.is_empty() => Some(request::Body::Release(Release {
            slots: r.slots,
            generations: r.generations,
            corrupt: Vec::new(),
            lease: 0,
        })),
        reply::Body::Lookup(r) if r.lease != 0 => Some(request::Body::Release(Release {
            lease: r.lease,
            ..Release::default()
        })),
        _ => None,
    }
}
