//! What the owner of a store decides, what the store counts, and why it may refuse to open. Plain data.

use kvd_core::tier::StoreShape;

use super::block::Flaw;
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
    /// Bytes of the smallest blocks that a full store has room to list.
    pub small_block: u64,
    /// Most operations taken and not answered.
    pub max_queue: usize,
    /// How long blocks may wait for company while others are being written: each once for the flush of its bytes or once for its record,
    /// those that came in between for both.
    pub flush_us: u64,
    /// How many blocks are company enough. Records of 496 go to the journal at once.
    pub flush_blocks: usize,
    /// Or how many bytes of them, from one on.
    pub flush_bytes: u64,
    /// How long one operation of the device may take.
    pub deadline_us: u64,
    /// Random bytes, others at every start. They tell the records of this start from those of others, and name the store if one is
    /// made now.
    pub start: [u8; 16],
    /// Make a store whatever the device holds.
    pub format: bool,
}

impl StoreConfig {
    /// Usual values for a device of so many bytes.
    pub fn new(capacity: u64, start: [u8; 16]) -> Self {
        StoreConfig {
            capacity,
            segment_bytes: 64 << 20,
            journal_bytes: None,
            small_block: 64 << 10,
            max_queue: 1024,
            flush_us: 10_000,
            flush_blocks: 480,
            flush_bytes: 32 << 20,
            deadline_us: 5_000_000,
            start,
            format: false,
        }
    }

    /// What the records of this start carry.
    pub(crate) fn salt(&self) -> u64 {
        u64::from_le_bytes(*self.start.first_chunk().unwrap_or(&[0; 8]))
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
    /// Nothing lies there yet, and nothing is to be made.
    #[error("there is no store yet: a daemon makes one when it starts")]
    Empty,
    /// Something else lies there.
    #[error(
        "the device holds something that is not a kvd store; it was left as it is: choose another; or remove the file (of a block device: overwrite the first 64 KiB with zeros)"
    )]
    Foreign,
    /// It was a store, but both superblocks are damaged.
    #[error(
        "both superblocks of the store are damaged; it was left as it is: to make a new one, remove the file (of a block device: overwrite the first 64 KiB with zeros)"
    )]
    Damaged,
    /// The device is shorter than the store on it.
    #[error(
        "the store takes {store} bytes and the device has only {device}: set nvme_capacity to the size that it was made with; or, to make a new store, remove the file (of a block device: overwrite the first 64 KiB with zeros)"
    )]
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

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// What a store did since it was opened.
        #[derive(Clone, Debug, Default, PartialEq, Eq)]
        pub struct Counters {
            $($(#[$doc])* pub $name: u64,)*
        }

        impl Counters {
            /// Name and count, for metrics and status.
            pub fn each(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($name), self.$name),)*]
            }
        }
    };
}

counters! {
    /// Blocks that were made durable, and their bytes.
    writes,
    /// Bytes of those.
    write_bytes,
    /// Blocks that were read and found sound.
    reads,
    /// Bytes of those.
    read_bytes,
    /// Blocks that were durably forgotten.
    drops,
    /// Flushes that were begun.
    flushes,
    /// Pages of the journal that were written.
    journal_pages,
    /// Times that a batch had to wait for a checkpoint to make room in the journal.
    journal_jams,
    /// Checkpoints that were finished.
    checkpoints,
    /// Pages that a checkpoint should have read and could not: the next start will not find their blocks.
    checkpoint_pages_unreadable,
    /// Pages without a sound header that a checkpoint came across. Those that could not be written are among them.
    checkpoint_pages_damaged,
    /// Checkpoints that were begun again after the device had failed.
    checkpoint_restarts,
    /// Reads that found no sound header.
    corrupt_header,
    /// Reads that found another block.
    corrupt_other,
    /// Reads that found other sizes.
    corrupt_geometry,
    /// Reads that found other bytes.
    corrupt_payload,
    /// Operations that the device failed.
    io_errors,
    /// Operations that the device ended too early.
    io_short,
    /// Operations that were refused because the store was off.
    refused_off,
    /// Operations that were refused because too many are under way.
    refused_queue,
    /// Writes and drops that were refused because no more can be listed, no more namespaces kept, or the journal has no room.
    refused_full,
    /// Operations that name impossible or occupied places, or bring too little memory.
    refused_invalid,
    /// Blocks that have more checksums than fit one page.
    refused_header,
    /// Times the store was switched off.
    switched_off,
    /// Times that was because an operation took too long.
    stalls,
    /// Times it was switched on again.
    switched_on,
    /// Reads that the store gave up although the device may still write their memory.
    lost,
    /// Most operations that were ever under way at once.
    queue_most,
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
