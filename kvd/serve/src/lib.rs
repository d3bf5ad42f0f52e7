//! Serves a node: session sockets on the node's own thread, HTTP on another.
//!
//! `kvd-node` (the thread) reads frames, asks core and answers, all between two waits of one epoll. `kvd-http` answers health,
//! metrics and status; `kvd-status` makes status texts; `kvd-populate` faults memory in. Whoever is not the node's thread
//! reaches it by a bounded queue. The core, the arena and the copies are not here; gRPC and events are deliberately absent
//! until their issues come.

mod config;
mod connection;
mod doorbell;
mod given;
mod http;
mod listen;
mod message;
mod messages;
mod metrics;
mod peer;
mod reactor;
mod report;
mod requests;
mod server;
mod stores;
mod stream;
mod translate;

pub use config::{ServeConfig, SessionLimits, TenantConfig};
pub use listen::ListenError;
pub use server::{ServeError, Server};
pub use stores::{RunningStore, StoreFound, StoreNews, StoreOpener, TellNews};
