//! The metadata of a node's KV-cache blocks: identity, index, slots and their lifecycle, claims of engine instances, leases,
//! eviction. Sans-IO: [`Core::step`] takes what happened and says what to do; equal inputs give equal outputs.
//!
//! Deliberately absent: bytes (others move them), clocks, randomness, threads, files, sockets, logging.
#![forbid(unsafe_code)]

pub mod api;
mod blocks;
mod check;
pub mod counters;
mod crcs;
mod crews;
mod disk;
mod evict;
mod fills;
pub mod geometry;
pub mod hit;
pub mod ids;
mod index;
mod leases;
mod list;
mod load;
pub mod log;
mod lookup;
mod map;
mod pool;
pub mod record;
mod register;
mod sessions;
pub mod settings;
mod slab;
mod spaces;
mod state;
pub mod status;
mod step;
mod store;
mod table;
mod tenants;
pub mod tier;
mod view;

pub use crate::api::*;
pub use crate::counters::{Counters, FetchFailures, TierCounters};
pub use crate::geometry::{ArenaShape, Cut, GeometryError, GroupGeometry, GroupKind, Rect};
pub use crate::hit::GroupRule;
pub use crate::ids::{
    BlockHash, InstanceId, NamespaceId, Now, RequestId, Role, SessionId, StoreId, TenantId, low64,
    replica_of,
};
pub use crate::log::{Change, ChangeKind, Changes, Tier};
pub use crate::record::{NamespaceRecord, RecordError};
pub use crate::settings::{
    EvictionPolicy, MAX_WRITERS, OBSERVERS, OffloadPolicy, Settings, TierSettings,
};
pub use crate::state::Core;
pub use crate::status::StatusView;
