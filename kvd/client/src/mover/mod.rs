//! Whole blocks of one KV-cache group between engine memory and the arena, with everything that makes them right: slots are
//! reserved and committed, leases taken and ended, generations and checksums looked at.
//!
//! Blocking; call it on a copy thread. Deliberately absent: which blocks, when, and on how many threads.

mod load;
mod store;

use std::sync::Arc;
use std::time::Duration;

use kvd_arena::{ArenaView, Prepared};
use kvd_core::geometry::{MAX_CRCS, MAX_PARTS};
use kvd_core::{Cut, GroupGeometry, Rect};
use kvd_device::{Device, LoadPlan, Pages, PartGeometry, Point};
use kvd_wire::session::{reply, request};

use crate::epoch::CopyGuard;
use crate::{Error, Session};

pub use load::LoadOutcome;
pub use store::{ReservedSlot, StoreOutcome};

/// Why a block was not stored or loaded, though nobody said no. Never to be remembered as absence.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FailReason {
    /// Bytes do not match their checksum. The daemon has been told.
    Corrupt,
    /// The slot was given to somebody else during the copy.
    Overrun,
    /// The daemon says that it failed.
    Daemon,
    /// The daemon went away.
    Lost,
    /// The daemon did not answer in time, or had no room in its queue.
    Timeout,
    /// The daemon's answer makes no sense.
    Malformed,
    /// The device failed.
    Device,
}

impl FailReason {
    /// For counters.
    pub fn word(self) -> &'static str {
        match self {
            Self::Corrupt => "crc",
            Self::Overrun => "overrun",
            Self::Daemon => "daemon",
            Self::Lost => "lost",
            Self::Timeout => "timeout",
            Self::Malformed => "malformed",
            Self::Device => "device",
        }
    }

    fn of(error: &Error) -> Self {
        use crate::ErrorKind;
        match error.kind() {
            _ if error.timed_out() => Self::Timeout,
            ErrorKind::Busy => Self::Timeout,
            ErrorKind::Unavailable => Self::Lost,
            ErrorKind::Invalid if error.ends_session() => Self::Malformed,
            _ => Self::Daemon,
        }
    }
}

/// One block in engine memory.
#[derive(Debug, Clone, Copy)]
pub struct BlockRef<'a> {
    /// The KV cache.
    pub at: &'a Pages,
    /// The pages that hold it.
    pub pages: &'a [u32],
}

/// What a mover talks through: a blocking session, or a link.
pub trait Caller {
    /// One request and its reply.
    ///
    /// # Errors
    /// What the daemon said; `Unavailable` when it is gone or did not answer in time.
    fn call(&mut self, body: request::Body) -> Result<reply::Body, Error>;

    /// The same about slots that a copy under this guard went to: they mean nothing in any other session.
    ///
    /// # Errors
    /// As [`Caller::call`]; `Unavailable` also when the guard's session is over.
    fn call_after(&mut self, guard: &CopyGuard, body: request::Body) -> Result<reply::Body, Error>;

    /// Says that a copy begins.
    ///
    /// # Errors
    /// `Unavailable` when there is no session or no arena.
    fn begin_copy(&mut self) -> Result<CopyGuard, Error>;
}

impl Caller for Session {
    fn call(&mut self, body: request::Body) -> Result<reply::Body, Error> {
        let id = self.send(body)?;
        self.receive(id)
    }

    /// There is no other session.
    fn call_after(&mut self, _: &CopyGuard, body: request::Body) -> Result<reply::Body, Error> {
        Caller::call(self, body)
    }

    fn begin_copy(&mut self) -> Result<CopyGuard, Error> {
        Session::begin_copy(self)
    }
}

/// What a mover needs to know.
#[derive(Debug, Clone)]
pub struct MoverConfig {
    /// Number of the group.
    pub group: u32,
    /// Its sizes, whole model.
    pub geometry: GroupGeometry,
    /// How this engine instance cuts blocks.
    pub cut: Cut,
    /// The part that this process holds.
    pub part: u32,
    /// Most bytes of slots that one request takes or leases: what cannot starve others.
    pub window_bytes: usize,
    /// How long the daemon may take to make blocks ready.
    pub load_deadline: Duration,
}

impl MoverConfig {
    /// Windows of 64 MiB, 10 s for the daemon.
    pub fn new(group: u32, geometry: GroupGeometry, cut: Cut, part: u32) -> Self {
        Self {
            group,
            geometry,
            cut,
            part,
            window_bytes: 64 << 20,
            load_deadline: Duration::from_secs(10),
        }
    }
}

/// Stores and loads blocks of one group, as one rank sees them.
pub struct BlockMover {
    device: Arc<dyn Device>,
    after: Point,
    config: MoverConfig,
    own: Rect,
    part: PartGeometry,
    part_offset: usize,
    block_bytes: usize,
    /// Plans for the cuts that were seen, the last one last.
    plans: Vec<(Cut, Arc<LoadPlan>)>,
}

impl std::fmt::Debug for BlockMover {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BlockMover")
            .field("device", &self.device.name())
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

/// Most blocks of one request, whatever their size.
const WINDOW_BLOCKS: usize = 4096;
/// Most bytes of checksums in one message: well below the limit of a frame, whatever cut the blocks were stored by.
const WINDOW_CRC_BYTES: usize = 2 << 20;

impl BlockMover {
    /// A mover for one rank's part.
    ///
    /// # Errors
    /// `Invalid` when there is no such part or the numbers cannot be.
    pub fn new(device: Arc<dyn Device>, config: MoverConfig) -> Result<Self, Error> {
        let geometry = &config.geometry;
        geometry
            .validate()
            .map_err(|e| Error::invalid(e.to_string()))?;
        if config.part >= config.cut.parts() {
            return Err(Error::invalid(format!(
                "part {} of {}",
                config.part,
                config.cut.parts()
            )));
        }
        let own = config.cut.part(config.part);
        let plan = LoadPlan::new(geometry, &config.cut, &own)
            .map_err(|e| Error::invalid(e.to_string()))?;
        let too_large = |_| Error::invalid("a block is larger than the address space");
        Ok(Self {
            device,
            after: Point::passed(),
            part: *plan.part(),
            part_offset: usize::try_from(config.cut.part_offset(config.part, geometry))
                .map_err(too_large)?,
            block_bytes: usize::try_from(geometry.block_bytes()).map_err(too_large)?,
            plans: vec![(config.cut.clone(), Arc::new(plan))],
            own,
            config,
        })
    }

    /// What this rank holds of a block; what [`BlockRef`]s must be of.
    pub fn part(&self) -> &PartGeometry {
        &self.part
    }

    /// Bytes that this rank copies for one block.
    pub fn part_bytes(&self) -> usize {
        self.part.bytes()
    }

    /// What it was made with.
    pub fn config(&self) -> &MoverConfig {
        &self.config
    }

    /// Blocks of one request.
    fn window(&self) -> usize {
        let slot = self.config.geometry.slot_bytes() as usize;
        let geometry = &self.config.geometry;
        let ranges = (geometry.layers as usize).min(MAX_PARTS);
        let crcs = (ranges * geometry.heads as usize).min(MAX_CRCS as usize);
        let most = (WINDOW_CRC_BYTES / (8 * crcs)).min(WINDOW_BLOCKS);
        (self.config.window_bytes / slot).clamp(1, most)
    }

    /// Before copies from or to slots that the daemon has handed out.
    fn prepare<'a>(&self, arena: &'a ArenaView, slots: impl Iterator<Item = u32>) -> Prepared<'a> {
        arena.prepare(slots, &|address, bytes| {
            let told = self.device.register(address, bytes);
            told.unwrap_or_else(|error| {
                tracing::warn!(%error, "copies will be slow: the device can't be told of {} MiB of the arena", bytes >> 20);
                None
            })
        })
    }

    /// Copies into the engine wait for this point, from when there is something to copy.
    pub fn after(&mut self, point: Point) {
        self.after = point;
    }

    fn check(&self, hashes: &[u8], blocks: &[BlockRef<'_>]) -> Result<(), Error> {
        if hashes.len() != blocks.len() * 32 {
            return Err(Error::invalid(format!(
                "{} bytes of hashes for {} blocks: pass 32 for each",
                hashes.len(),
                blocks.len()
            )));
        }
        self.check_blocks(blocks)
    }

    fn check_blocks(&self, blocks: &[BlockRef<'_>]) -> Result<(), Error> {
        match blocks.iter().find(|b| *b.at.part() != self.part) {
            Some(block) => Err(Error::invalid(format!(
                "a block is {:?} and this rank's part {:?}",
                block.at.part(),
                self.part
            ))),
            None => Ok(()),
        }
    }
}
