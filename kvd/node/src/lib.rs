//! Drives [`kvd_core::Core`] on one thread: takes what happened, asks core, and carries out what core says, in order.
//!
//! The outside is reached through ports ([`Clock`], [`Entropy`], [`ArenaPort`]), so that the simulator drives the very same
//! [`Node`]. The adapters for real memory and the real clock are here too ([`HostArenas`], [`SystemClock`],
//! [`SystemEntropy`]), because they need nothing but the arena. Sockets, frames and threads that serve are deliberately
//! absent; they are in `kvd-serve`.

pub mod conformance;
mod counts;
mod host;
mod node;
mod ports;
mod status;
mod system;
mod tenant;
#[cfg(test)]
mod tests;

pub use counts::{COUNT_NAMES, Counts};
pub use host::{Descriptors, HostArenas, HostSpan, HostSpec, Offer, Populated};
pub use node::{Effect, Node, NodeSettings, Opening};
pub use ports::{AdoptedArena, ArenaPort, Clock, Entropy, NoStores, Pages, PortError, StorePort};
pub use status::{
    ClassStatus, Difference, Differs, ExtentStatus, HostTier, Loads, Lookups, NamespaceStatus,
    SessionStatus, SlotStatus, Status, StoreStatus, Stores, TenantStatus, TierStatus, Tiers,
};
pub use system::{SystemClock, SystemEntropy};
pub use tenant::{ArenaState, TenantSnapshot, TenantSpec};
