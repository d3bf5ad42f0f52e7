//! What travels between an engine process and the daemon: the messages, generated from `proto/session.proto`, and the
//! frames that carry them.
//!
//! Everything here is a pure function over bytes. Sockets, file descriptors and time are deliberately absent: the daemon's
//! half is in `kvd-serve`, the engine's in `kvd-client`.

pub mod frame;
pub mod limits;

/// The messages of the session protocol, as generated from `proto/session.proto`.
#[allow(missing_docs, clippy::all, clippy::unwrap_used)]
pub mod session {
    include!(concat!(env!("OUT_DIR"), "/kvd.session.v1.rs"));
}

mod helpers;
pub use helpers::{HASH_BYTES, HashesError, failure, hashes, reply, request};

/// The oldest session protocol version that this build speaks.
pub const VERSION_MIN: u32 = 1;
/// The newest session protocol version that this build speaks.
pub const VERSION_MAX: u32 = 1;

/// The version that two parties should speak, or `None` when their ranges do not meet.
///
/// ```
/// assert_eq!(kvd_wire::negotiate((1, 3), (2, 5)), Some(3));
/// assert_eq!(kvd_wire::negotiate((1, 1), (2, 5)), None);
/// ```
pub fn negotiate(ours: (u32, u32), theirs: (u32, u32)) -> Option<u32> {
    let low = ours.0.max(theirs.0);
    let high = ours.1.min(theirs.1);
    (low <= high).then_some(high)
}
