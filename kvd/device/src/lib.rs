//! Engine memory <-> slots of the arena: copies of whole blocks, with the checksums that prove them.
//!
//! [`Device`] is the port; [`HostDevice`] is the adapter for engines whose KV cache is in ordinary memory. It is used inside
//! the engine's process, on threads of the caller. [`conformance`] holds what every adapter must show.
//!
//! Deliberately absent, until they are built: cuda, hip, level_zero and staged adapters. Also absent: which slot and which
//! block (the caller's), threads (the connectors'), and conversions of what is inside a cell (the namespace forbids the need).

pub mod conformance;
mod error;
mod host;
mod owned;
mod plan;
mod view;

use kvd_arena::SlotBytes;

pub use error::Error;
pub use host::HostDevice;
pub use owned::OwnedPages;
pub use plan::LoadPlan;
pub use view::{LayerView, Pages, PartGeometry};

/// One block to copy out of the engine.
#[derive(Debug, Clone, Copy)]
pub struct StoreJob<'a> {
    /// The engine's KV cache.
    pub from: &'a Pages,
    /// The pages that hold the block, [`Pages::pages_per_block`] of them, in token order.
    pub pages: &'a [u32],
    /// This rank's part of the slot, [`PartGeometry::bytes`] long.
    pub part: SlotBytes<'a>,
}

/// One block to copy into the engine.
#[derive(Debug, Clone, Copy)]
pub struct LoadJob<'a> {
    /// The slot, from its start, at least [`LoadPlan::slot_bytes`] long.
    pub slot: SlotBytes<'a>,
    /// How the stored cut maps onto this rank's part.
    pub plan: &'a LoadPlan,
    /// The block's checksums: one for each part and head of that part, parts in order.
    pub crcs: &'a [u64],
    /// The engine's KV cache.
    pub to: &'a Pages,
    /// The pages that will hold the block.
    pub pages: &'a [u32],
}

/// What a load of one block came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loaded {
    /// The engine holds what was stored.
    Good,
    /// Some head's bytes do not match their checksum. What the pages hold now is of no use.
    Corrupt,
}

/// A port: what copies between engine memory and slots.
///
/// Calls block; when one returns, with a result or an error, each of its copies is over. Calls from several threads may run
/// at the same time.
pub trait Device: Send + Sync {
    /// For logs and status.
    fn name(&self) -> &'static str;

    /// Tells the driver of the mapped arena, before the first copy. May take long for large ones.
    ///
    /// # Errors
    /// When the driver refuses; copies may still work, slower.
    fn register(&self, address: usize, bytes: usize) -> Result<(), Error>;

    /// Takes back a [`Device::register`], before the arena is unmapped.
    ///
    /// # Errors
    /// When it was not registered or the driver refuses.
    fn unregister(&self, address: usize) -> Result<(), Error>;

    /// Copies blocks out of the engine. Appends to `crcs` the CRC-64/NVME of every head of the part over
    /// `[layer][token][cell]`, as written to the slot, job after job.
    ///
    /// # Errors
    /// `Invalid` when a job does not fit its memory (nothing was copied then); `Failed` when the device fails (slots may
    /// hold anything, nothing is to be committed).
    fn store(&self, jobs: &[StoreJob<'_>], crcs: &mut Vec<u64>) -> Result<(), Error>;

    /// Copies blocks into the engine and checks them as written there. Appends one result a job.
    ///
    /// # Errors
    /// As [`Device::store`]; on `Failed` the pages may hold anything.
    fn load(&self, jobs: &[LoadJob<'_>], results: &mut Vec<Loaded>) -> Result<(), Error>;
}
