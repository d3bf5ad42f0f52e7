//! What the scheduler half needs of the daemon: requests that never wait. [`kvd_client::Link`] is the real one; tests bring
//! their own, with a daemon's core or a script behind it.

use kvd_client::{
    ErrorKind, GroupLayout, Link, NamespaceSlot, Registration, Ticket, reply, request,
};

/// Why a request was not answered with what it asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// No daemon, or the connection was lost before the reply.
    Unavailable,
    /// Too much is under way already.
    Busy,
    /// The daemon said no.
    Refused(String),
}

/// A namespace as the daemon knows it on this connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Registered {
    /// The daemon's short name for it.
    pub namespace: u32,
    /// Number of the connection.
    pub epoch: u64,
    /// Names the start of the daemon at its other end.
    pub incarnation: [u8; 16],
}

/// The daemon, as the scheduler half sees it. No call waits. Requests may stay here until [`Port::wake`] or [`Port::wake_soon`]: to wake
/// the thread that sends them is what costs most, and once a step is enough.
pub trait Port {
    /// A request under way. Dropping it gives the request up: what it took is given back when the reply comes.
    type Ticket;
    /// A namespace that is registered now and after every reconnect.
    type Namespace;

    /// Takes a request to be sent.
    ///
    /// # Errors
    /// When it can't be sent now.
    fn queue(&self, body: request::Body) -> Result<Self::Ticket, Fault>;

    /// Takes a request that names a namespace, to be sent on the connection that this name is of.
    ///
    /// # Errors
    /// When it can't be sent now, or there is another connection now.
    fn queue_on(&self, name: &Registered, body: request::Body) -> Result<Self::Ticket, Fault>;

    /// Takes a request whose reply nobody waits for.
    ///
    /// # Errors
    /// When it can't be sent now.
    fn queue_and_forget(&self, body: request::Body) -> Result<(), Fault>;

    /// Sends what was queued.
    fn wake(&self);

    /// The same, within a millisecond.
    fn wake_soon(&self);

    /// The reply, if it has come. The ticket is spent then.
    fn poll(&self, ticket: &mut Self::Ticket) -> Option<Result<reply::Body, Fault>>;

    /// Registers a namespace.
    ///
    /// # Errors
    /// When the record or the layout is refused at once.
    fn register(&self, record: Vec<u8>, groups: Vec<GroupLayout>)
    -> Result<Self::Namespace, Fault>;

    /// The namespace's short name; `None` while it is not registered.
    fn current(&self, namespace: &Self::Namespace) -> Option<Registered>;

    /// Why the daemon refuses this namespace, if it does.
    fn refused(&self, namespace: &Self::Namespace) -> Option<String>;

    /// Whether there is a session now.
    fn connected(&self) -> bool;

    /// Counts sessions.
    fn epoch(&self) -> u64;
}

impl From<kvd_client::Error> for Fault {
    fn from(error: kvd_client::Error) -> Fault {
        match error.kind() {
            ErrorKind::Unavailable => Fault::Unavailable,
            ErrorKind::Busy => Fault::Busy,
            _ => Fault::Refused(error.to_string()),
        }
    }
}

impl Port for Link {
    type Ticket = Ticket;
    type Namespace = NamespaceSlot;

    fn queue(&self, body: request::Body) -> Result<Ticket, Fault> {
        Ok(Link::queue(self, body)?)
    }

    fn queue_on(&self, name: &Registered, body: request::Body) -> Result<Ticket, Fault> {
        Ok(Link::queue_on(self, name.epoch, body)?)
    }

    fn queue_and_forget(&self, body: request::Body) -> Result<(), Fault> {
        // What is sent this way takes nothing that could have to be given back.
        Link::queue(self, body).map(drop).map_err(Fault::from)
    }

    fn wake(&self) {
        Link::wake(self);
    }

    fn wake_soon(&self) {
        Link::wake_soon(self);
    }

    fn poll(&self, ticket: &mut Ticket) -> Option<Result<reply::Body, Fault>> {
        Link::poll(self, ticket).map(|answer| answer.map_err(Fault::from))
    }

    fn register(&self, record: Vec<u8>, groups: Vec<GroupLayout>) -> Result<NamespaceSlot, Fault> {
        Ok(Link::register(self, Registration { record, groups })?)
    }

    fn current(&self, namespace: &NamespaceSlot) -> Option<Registered> {
        namespace.current().map(|registered| Registered {
            namespace: registered.namespace,
            epoch: registered.epoch,
            incarnation: registered.incarnation,
        })
    }

    fn refused(&self, namespace: &NamespaceSlot) -> Option<String> {
        namespace.refused().map(|error| error.to_string())
    }

    fn connected(&self) -> bool {
        Link::connected(self)
    }

    fn epoch(&self) -> u64 {
        Link::epoch(self)
    }
}
