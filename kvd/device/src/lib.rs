//! Engine memory <-> slots of the arena: copies of whole blocks, with the checksums that prove them.
//!
//! [`Device`] is the port; [`HostDevice`] is the adapter for engines whose KV cache is in ordinary memory, [`CudaDevice`] that
//! for NVIDIA GPUs (what other accelerators will share with it is in `gpu/`). They are used inside the engine's process, on
//! threads of the caller. [`conformance`] holds what every adapter must show.
//!
//! Deliberately absent, until they are built: hip, level_zero and staged adapters. Also absent: which slot and which
//! block (the caller's), threads (the connectors'), and conversions of what is inside a cell (the namespace forbids the need).

pub mod conformance;
mod cuda;
mod engine;
mod error;
mod gpu;
mod host;
mod owned;
mod plan;
mod point;
mod view;

use kvd_arena::{Registered, SlotBytes};

pub use cuda::{CudaDevice, CudaMemory, EngineWork, Link};
pub use engine::{EnginePages, PageOrder};
pub use error::Error;
pub use host::HostDevice;
pub use owned::OwnedPages;
pub use plan::LoadPlan;
pub use point::{Passed, Point, StreamHandle};
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

impl StoreJob<'_> {
    /// Refuses what does not fit its memory.
    fn check(&self) -> Result<(), Error> {
        self.from.check_block(self.pages)?;
        if self.part.len() != self.from.part().bytes() {
            return Err(Error::invalid(format!(
                "the part of the slot has {} bytes and the rank's part {}",
                self.part.len(),
                self.from.part().bytes()
            )));
        }
        Ok(())
    }
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

impl LoadJob<'_> {
    /// Refuses what does not fit its memory.
    fn check(&self) -> Result<(), Error> {
        self.to.check_block(self.pages)?;
        if self.plan.part() != self.to.part()
            || self.slot.len() < self.plan.slot_bytes()
            || self.crcs.len() != self.plan.crcs()
        {
            return Err(Error::invalid(format!(
                "a block of {} bytes and {} checksums as {:?} is not one of {} bytes and {} as {:?}",
                self.slot.len(),
                self.crcs.len(),
                self.to.part(),
                self.plan.slot_bytes(),
                self.plan.crcs(),
                self.plan.part()
            )));
        }
        Ok(())
    }
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

    /// Tells the driver of mapped memory, before the first copy from or to it; it stays mapped until what comes back is
    /// dropped. Nothing comes back where there is nobody to tell. Slots should not lie in two registrations.
    ///
    /// # Errors
    /// When the driver refuses; copies work all the same, slower.
    fn register(&self, address: usize, bytes: usize) -> Result<Option<Registered>, Error>;

    /// The point that the engine's own work on this stream has come to: copies out of what it writes, or into what it reads, wait
    /// for it. Ordinary memory has no streams, and its work is over when it is asked.
    ///
    /// # Errors
    /// When the driver refuses.
    fn point(&self, stream: StreamHandle) -> Result<Point, Error>;

    /// Copies blocks out of the engine. Appends to `crcs` the CRC-64/NVME of every head of the part over
    /// `[layer][token][cell]`, of the very words that were copied, job after job: in the slot, or on the way there in the device.
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
