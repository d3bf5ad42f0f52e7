//! What the owner of a store decides, what the store counts, and why it may refuse to open. Plain data.

use kvd_core::tier::StoreShape;

use super::format::Flaw;
use crate::io::IoError;

/// How a store is to be made and driven.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoreConfig {
    /// Bytes of the device or file. A store that exists keeps the size it was made with.
    pub capacity: u64,
    /// Bytes of a segment: a power of two from 1 MiB. No block is larger.
    pub segment_bytes: u64,
    /// Bytes of both halves of the journal; by default a 2048th of the capacity, from 1 to 128 MiB.
    pub journal_bytes: Option<u64>,
    /// Most operations taken and not answered.
    pub max_queue: usize,
    /// How long what was written may wait for company before it is made durable.
    pub flush_us: u64,
    /// How many blocks are company enough.
    pub flush_blocks: usize,
    /// How long one operation of the device may take.
    pub deadline_us: u64,
    /// Random bytes that name a store if one is made now.
    pub id: [u8; 16],
    /// Make a store whatever the device holds.
    pub format: bool,
}

impl StoreConfig {
    /// Usual values for a device of so many bytes.
    pub fn new(capacity: u64, id: [u8; 16]) -> Self {
        StoreConfig {
            capacity,
            segment_bytes: 64 << 20,
            journal_bytes: None,
            max_queue: 1024,
            flush_us: 2_000,
            flush_blocks: 64,
            deadline_us: 5_000_000,
            id,
            format: false,
        }
    }
}

/// Why a store does not open. In every case the device is as it was, unless it is `Io`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// Numbers that make no store.
    #[error("{0}")]
    Config(&'static str),
    /// Made by a later kvd.
    #[error(
        "the store has format version {found} and this kvd knows up to {known}; it was left as it is: use a newer kvd, or another device"
    )]
    Newer {
        /// Its version.
        found: u32,
        /// Ours.
        known: u32,
    },
    /// Something else lies there.
    #[error(
        "the device holds something that is not a kvd store; it was left as it is: choose another, or ask for it to be formatted"
    )]
    Foreign,
    /// It was a store, but both superblocks are damaged.
    #[error(
        "both superblocks of the store are damaged; it was left as it is: ask for it to be formatted"
    )]
    Damaged,
    /// The device is shorter than the store on it.
    #[error("the store takes {store} bytes and the device has only {device}")]
    Short {
        /// Bytes of the store.
        store: u64,
        /// Bytes of the device.
        device: u64,
    },
    /// The device fails.
    #[error("the device failed: {0}")]
    Io(IoError),
    /// The device does not answer.
    #[error("the device does not answer")]
    Stalled,
}

/// What was found when a store was opened.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RecoveryReport {
    /// It is new.
    pub formatted: bool,
    /// Blocks that are there.
    pub blocks: u64,
    /// Namespaces that are there.
    pub namespaces: u64,
    /// Namespace slots that hold something damaged.
    pub namespaces_damaged: u64,
    /// Sound records that were read, of checkpoint and journal.
    pub records: u64,
    /// Records that are damaged, or that name impossible places.
    pub records_damaged: u64,
    /// Pages of records that are damaged or could not be read. Pages of the journal that were never written don't count.
    pub pages_damaged: u64,
    /// Blocks whose namespace is damaged or was replaced; they are not served.
    pub orphans: u64,
    /// Superblocks that had to be written again from the other.
    pub superblocks_repaired: u64,
    /// How the store is divided.
    pub shape: StoreShape,
}

/// What a store did since it was opened.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Blocks that were made durable, and their bytes.
    pub writes: u64,
    /// Bytes of those.
    pub write_bytes: u64,
    /// Blocks that were read and found sound.
    pub reads: u64,
    /// Bytes of those.
    pub read_bytes: u64,
    /// Blocks that were durably forgotten.
    pub drops: u64,
    /// Flushes that were begun.
    pub flushes: u64,
    /// Pages of the journal that were written.
    pub journal_pages: u64,
    /// Times that a batch had to wait for a checkpoint to make room in the journal.
    pub journal_jams: u64,
    /// Checkpoints that were finished.
    pub checkpoints: u64,
    /// Pages that a checkpoint should have read and could not.
    pub checkpoint_pages_lost: u64,
    /// Checkpoints that were begun again after the device had failed.
    pub checkpoint_restarts: u64,
    /// Reads that found no sound header.
    pub corrupt_header: u64,
    /// Reads that found another block.
    pub corrupt_other: u64,
    /// Reads that found other sizes.
    pub corrupt_geometry: u64,
    /// Reads that found other bytes.
    pub corrupt_payload: u64,
    /// Operations that the device failed.
    pub io_errors: u64,
    /// Operations that the device ended too early.
    pub io_short: u64,
    /// Operations that were refused because the store was off.
    pub refused_off: u64,
    /// Operations that were refused because too many are under way.
    pub refused_queue: u64,
    /// Blocks that were refused because no more can be listed, or no more namespaces kept.
    pub refused_full: u64,
    /// Operations that name impossible or occupied places, or bring too little memory.
    pub refused_invalid: u64,
    /// Blocks that have more checksums than fit one page.
    pub refused_header: u64,
    /// Times the store was switched off.
    pub switched_off: u64,
    /// Times that was because an operation took too long.
    pub stalls: u64,
    /// Times it was switched on again.
    pub switched_on: u64,
    /// Most operations that were ever under way at once.
    pub queue_most: u64,
}

impl Counters {
    pub(crate) fn corrupt(&mut self, flaw: Flaw) {
        *match flaw {
            Flaw::Header => &mut self.corrupt_header,
            Flaw::OtherBlock => &mut self.corrupt_other,
            Flaw::Geometry => &mut self.corrupt_geometry,
            Flaw::Payload => &mut self.corrupt_payload,
        } += 1;
    }
}
