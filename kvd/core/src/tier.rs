//! What core and the store of a slower tier say to each other: plans of copies, and what became of them. Plain data, so that
//! the store may be a disk, a simulated disk, or a script of a test.
//!
//! The store keeps bytes where core says. It decides nothing: core knows which places are free, whose block is where, and what is
//! to go. A place is written, then named in the store's journal, then (once dropped from the journal again) written anew.
//! Deliberately absent: file offsets of anything but blocks, journals, checkpoints; they are the store's own affair.

use crate::geometry::{Cut, GroupGeometry};
use crate::ids::{BlockHash, NamespaceId, TenantId};

/// Bytes that every stored block's size is a multiple of, and that its header takes.
pub const STORE_PAGE: u64 = 4096;

/// Names an operation under way; never used twice by one start of the daemon.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct OpId(pub u64);

/// How a store is divided. Its blocks lie in segments; one segment holds blocks of one stride.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StoreShape {
    /// Segments that can hold blocks.
    pub segments: u32,
    /// Bytes of each; a power of two.
    pub segment_bytes: u64,
}

/// The place of one block: byte `index * stride` of a segment, where `stride` is [`stride_of`] its block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Place {
    /// Which segment.
    pub segment: u32,
    /// Which place in it.
    pub index: u32,
    /// Bytes from one place of this segment to the next: header and block.
    pub stride: u64,
}

/// Bytes that a block of so many bytes takes in a store: its header, and the block in whole pages.
pub const fn stride_of(block_bytes: u64) -> u64 {
    STORE_PAGE + block_bytes.next_multiple_of(STORE_PAGE)
}

/// Which block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockKey {
    /// What its bytes mean.
    pub namespace: NamespaceId,
    /// KV-cache group.
    pub group: u8,
    /// Which tokens.
    pub hash: BlockHash,
}

/// What is kept with a block's bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockHeader {
    /// Which block.
    pub key: BlockKey,
    /// The block before it in its chain, if known.
    pub parent: Option<BlockHash>,
    /// How its bytes are cut into parts.
    pub cut: Cut,
    /// CRC-64/NVME of each head of each part, parts in order.
    pub crcs: Vec<u64>,
}

/// What goes down with a read and comes back with its answer, whatever that is, so that core uses it again: reading a block takes
/// no memory. Boxed, because it is handed on from thread to thread.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReadBlock {
    /// Sizes of its group.
    pub geometry: GroupGeometry,
    /// How its bytes are cut into parts. Of no meaning but in the answer to a read that succeeded, as `crcs`.
    pub cut: Cut,
    /// CRC-64/NVME of each head of each part, parts in order, against which its bytes were checked.
    pub crcs: Vec<u64>,
}

impl ReadBlock {
    /// For a block of this group.
    pub fn new(geometry: GroupGeometry) -> Box<Self> {
        let (cut, crcs) = (Cut::whole(&geometry), Vec::new());
        Box::new(ReadBlock {
            geometry,
            cut,
            crcs,
        })
    }
}

/// A block's bytes in host memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostRange {
    /// In whose arena.
    pub tenant: TenantId,
    /// From the start of the arena.
    pub offset: u64,
    /// How many; [`GroupGeometry::block_bytes`].
    pub bytes: u64,
}

/// One step of a plan. Each gets exactly one [`StoreDone`] with its `op`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StoreOp {
    /// Store a block in a place that nothing durable names. Answered when block and journal entry are durable.
    Write {
        /// Names it.
        op: OpId,
        /// Where to.
        to: Place,
        /// Where from. Nobody writes there until this is answered.
        from: HostRange,
        /// What goes with it.
        header: Box<BlockHeader>,
        /// Sizes of its group.
        geometry: Box<GroupGeometry>,
        /// The canonical record of its namespace. The store keeps each once.
        record: std::sync::Arc<[u8]>,
    },
    /// Read a block, and check that it is the one that is meant, and sound, before this is answered.
    Read {
        /// Names it.
        op: OpId,
        /// Where from.
        from: Place,
        /// Where to. Nobody else writes there until this is answered.
        into: HostRange,
        /// Which block it must be.
        key: BlockKey,
        /// Sizes of its group, and room for what is kept with it.
        block: Box<ReadBlock>,
    },
    /// Forget a block. Answered when no restart can bring it back; only then may its place be written again.
    Drop {
        /// Names it.
        op: OpId,
        /// Its place.
        place: Place,
        /// Which block it was.
        key: BlockKey,
    },
}

impl StoreOp {
    /// Its name.
    pub fn op(&self) -> OpId {
        match self {
            StoreOp::Write { op, .. } | StoreOp::Read { op, .. } | StoreOp::Drop { op, .. } => *op,
        }
    }

    /// That it failed so.
    pub fn refused(self, error: StoreError) -> StoreDone {
        match self {
            StoreOp::Write { op, .. } => StoreDone::Written {
                op,
                result: Err(error),
            },
            StoreOp::Read { op, block, .. } => StoreDone::Read {
                op,
                block,
                result: Err(error),
            },
            StoreOp::Drop { op, .. } => StoreDone::Dropped {
                op,
                result: Err(error),
            },
        }
    }
}

/// Why an operation failed. Never the same as absence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum StoreError {
    /// What lies there is not that block, or not what was stored.
    Corrupt,
    /// The device failed, or answered short.
    Io,
    /// The store is switched off, or has no room for more operations now. Nothing was begun.
    Off,
    /// Of a read: the store is given up, and the device may still write the memory, now or later. Nobody else may ever write there.
    Lost,
}

/// What became of an operation. After it, the store does not write the operation's host memory any more, unless the read is
/// [`StoreError::Lost`]; nor does it read there, unless it is given up: then the device may, to write a place that nothing names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StoreDone {
    /// Of a write.
    Written {
        /// Which.
        op: OpId,
        /// Whether it will be there after a restart. After an error other than `Off` it may be or not: drop the place.
        result: Result<(), StoreError>,
    },
    /// Of a read.
    Read {
        /// Which.
        op: OpId,
        /// What went with the read. If that succeeded: how the block is cut, and its checksums.
        block: Box<ReadBlock>,
        /// Whether the block is there, and sound.
        result: Result<(), StoreError>,
    },
    /// Of a drop.
    Dropped {
        /// Which.
        op: OpId,
        /// After an error the place must not be used.
        result: Result<(), StoreError>,
    },
}

impl StoreDone {
    /// Of which operation.
    pub fn op(&self) -> OpId {
        match self {
            StoreDone::Written { op, .. }
            | StoreDone::Read { op, .. }
            | StoreDone::Dropped { op, .. } => *op,
        }
    }
}

/// A block that a store found when it was opened. Its bytes are checked when they are first read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Recovered {
    /// Which block.
    pub key: BlockKey,
    /// The block before it.
    pub parent: Option<BlockHash>,
    /// Where it lies.
    pub place: Place,
}
