//! What an engine process links: sessions with the daemon of its node, the mapped arena, and whole-block stores and loads.
//!
//! - [`Session`]: blocking calls, for command lines, benches and plain scripts.
//! - [`Link`]: a session kept by a thread of its own, for engines: nothing blocks the caller, and the daemon may be absent,
//!   hang, die and come back.
//! - [`BlockMover`]: reserve, copy, commit; load, copy, check, release. Over either of the two.
//!
//! Deliberately absent: when to store or load what, and the threads that copy (both are the connectors').

mod connection;
mod encode;
mod epoch;
mod error;
mod handshake;
mod link;
mod mover;
mod pending;
mod session;

pub use epoch::CopyGuard;
pub use error::{Error, ErrorKind};
pub use handshake::Identity;
pub use kvd_wire::session::{
    CommitReply, GroupLayout, HelloReply, LoadReply, LookupReply, ReserveReply, Role, reply,
    request,
};
pub use link::{Link, LinkCaller, LinkConfig, LinkRegistered, NamespaceSlot, Registration, Ticket};
pub use mover::{
    BlockMover, BlockRef, Caller, FailReason, LoadOutcome, MoverConfig, ReservedSlot, StoreOutcome,
};
pub use session::{ChainRef, Registered, Session};
