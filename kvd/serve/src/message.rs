//! What other threads say to the node's thread.

use kvd_core::StoreId;
use kvd_node::Populated;
use tokio::sync::oneshot;

use crate::metrics::Snapshot;
use crate::stores::StoreNews;

/// One message through the doorbell.
#[derive(Debug)]
pub(crate) enum Message {
    /// Are you there?
    Alive(oneshot::Sender<()>),
    /// The status of all tenants, as JSON.
    Status(oneshot::Sender<Vec<u8>>),
    /// What `/metrics` shows.
    Metrics(oneshot::Sender<Box<Snapshot>>),
    /// An extent has been faulted in, or not.
    Populated(Populated),
    /// A store has something to say.
    Store(StoreId, StoreNews),
    /// The status text that a session asked for.
    StatusMade {
        /// The connection.
        key: u64,
        /// The request.
        id: u32,
        /// JSON.
        json: Vec<u8>,
    },
}
