//! Where the areas of a store lie: computed once from its capacity when it is formatted, then read from the superblock. The
//! checkpoint areas are made so that a store full of small blocks fits (64 KiB, unless told otherwise). Deliberately absent: what the areas hold.

use kvd_core::tier::{Place, STORE_PAGE, StoreShape, stride_of};

use super::OpenError;
use super::config::StoreConfig;
use super::format::{MOST_NUMBER, PER_PAGE, Superblock};
use crate::io::PAGE;

/// The two superblocks, with room between them.
pub(crate) const HEADS: [u64; 2] = [0, 8 * PAGE as u64];
/// Bytes before the first area.
pub(crate) const HEADS_BYTES: u64 = 16 * PAGE as u64;
/// Bytes of a namespace slot: the longest record and what stands before it.
pub(crate) const NAME_SLOT: u64 = (64 << 10) + PAGE as u64;
/// The smallest half of a journal, pages.
const HALF_LEAST: u64 = 64;
/// So many more are listed in any store.
const LIST_LEAST: u64 = 1024;

/// Areas, in bytes and pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    pub(crate) capacity: u64,
    pub(crate) shape: StoreShape,
    pub(crate) name_slots: u32,
    pub(crate) names_at: u64,
    pub(crate) journal_at: u64,
    pub(crate) half_pages: u64,
    pub(crate) checkpoints_at: u64,
    pub(crate) checkpoint_pages: u64,
    pub(crate) segments_at: u64,
}

impl Layout {
    pub(crate) fn of(config: &StoreConfig) -> Result<Self, OpenError> {
        let (capacity, segment) = (config.capacity, config.segment_bytes);
        if !segment.is_power_of_two() || !(1 << 20..=1 << 40).contains(&segment) {
            return Err(OpenError::Config(
                "segment_bytes must be a power of two from 1 MiB to 1 TiB",
            ));
        }
        let slots = (capacity >> 24).clamp(8, 256);
        let usual = (capacity / 2048).clamp(1 << 20, 128 << 20);
        let half = config.journal_bytes.unwrap_or(usual) / 2 / PAGE as u64;
        let half = half.clamp(HALF_LEAST, 1 << 20);
        let journal_at = HEADS_BYTES + slots * NAME_SLOT;
        let checkpoints_at = journal_at + 2 * half * PAGE as u64;
        let most = capacity.saturating_sub(checkpoints_at) / segment;
        for segments in (1..=most.min(u32::MAX.into())).rev() {
            let listed = segments * segment / stride_of(config.small_block.max(1)) + LIST_LEAST;
            let pages = listed.div_ceil(PER_PAGE as u64);
            let segments_at =
                (checkpoints_at + 2 * pages * PAGE as u64).next_multiple_of(HEADS_BYTES);
            if segments_at + segments * segment <= capacity {
                return Ok(Layout {
                    capacity,
                    shape: StoreShape {
                        segments: segments as u32,
                        segment_bytes: segment,
                    },
                    name_slots: slots as u32,
                    names_at: HEADS_BYTES,
                    journal_at,
                    half_pages: half,
                    checkpoints_at,
                    checkpoint_pages: pages,
                    segments_at,
                });
            }
        }
        Err(OpenError::Config(
            "capacity leaves no room for one segment; give the store more, or smaller segments",
        ))
    }

    /// What a superblock says; nothing if its numbers do not fit each other.
    pub(crate) fn read(head: &Superblock) -> Option<Self> {
        let layout = Layout {
            capacity: head.capacity.get(),
            shape: StoreShape {
                segments: head.segments.get(),
                segment_bytes: head.segment_bytes.get(),
            },
            name_slots: head.name_slots.get(),
            names_at: head.names_at.get(),
            journal_at: head.journal_at.get(),
            half_pages: head.half_pages.get(),
            checkpoints_at: head.checkpoints_at.get(),
            checkpoint_pages: head.checkpoint_pages.get(),
            segments_at: head.segments_at.get(),
        };
        let page = PAGE as u64;
        let fits = |at: u64, count: u64, each: u64, end: u64| {
            at.is_multiple_of(page)
                && count
                    .checked_mul(each)
                    .and_then(|bytes| bytes.checked_add(at))
                    .is_some_and(|last| last <= end)
        };
        let shape = layout.shape;
        let good = layout.names_at >= HEADS_BYTES
            && (1..=256).contains(&layout.name_slots)
            && layout.half_pages >= HALF_LEAST
            && layout.half_pages <= 1 << 20
            && layout.checkpoint_pages <= 1 << 32
            && (1 << 20..=1 << 40).contains(&shape.segment_bytes)
            && shape.segment_bytes.is_power_of_two()
            && shape.segments > 0
            && head.checkpoint_used.get() <= layout.checkpoint_pages
            && [head.generation, head.checkpoint, head.first_epoch]
                .iter()
                .all(|number| number.get() <= MOST_NUMBER)
            && fits(
                layout.names_at,
                layout.name_slots.into(),
                NAME_SLOT,
                layout.journal_at,
            )
            && fits(
                layout.journal_at,
                layout.half_pages,
                2 * page,
                layout.checkpoints_at,
            )
            && fits(
                layout.checkpoints_at,
                layout.checkpoint_pages,
                2 * page,
                layout.segments_at,
            )
            && fits(
                layout.segments_at,
                shape.segments.into(),
                shape.segment_bytes,
                layout.capacity,
            );
        good.then_some(layout)
    }

    pub(crate) fn write(&self, head: &mut Superblock) {
        head.capacity = self.capacity.into();
        head.segments = self.shape.segments.into();
        head.segment_bytes = self.shape.segment_bytes.into();
        head.name_slots = self.name_slots.into();
        head.names_at = self.names_at.into();
        head.journal_at = self.journal_at.into();
        head.half_pages = self.half_pages.into();
        head.checkpoints_at = self.checkpoints_at.into();
        head.checkpoint_pages = self.checkpoint_pages.into();
        head.segments_at = self.segments_at.into();
    }

    /// Most blocks that a checkpoint can list.
    pub(crate) fn most_blocks(&self) -> u64 {
        self.checkpoint_pages * PER_PAGE as u64
    }

    pub(crate) fn name_at(&self, slot: u32) -> u64 {
        self.names_at + u64::from(slot) * NAME_SLOT
    }

    /// Where the pages of an epoch begin.
    pub(crate) fn half_at(&self, epoch: u64) -> u64 {
        self.journal_at + (epoch % 2) * self.half_pages * PAGE as u64
    }

    pub(crate) fn checkpoint_at(&self, number: u64) -> u64 {
        self.checkpoints_at + (number % 2) * self.checkpoint_pages * PAGE as u64
    }

    /// Whether there is such a place.
    pub(crate) fn has(&self, place: Place) -> bool {
        let end = (u64::from(place.index) + 1).checked_mul(place.stride);
        place.segment < self.shape.segments
            && place.stride >= 2 * STORE_PAGE
            && place.stride.is_multiple_of(STORE_PAGE)
            && place.stride <= self.shape.segment_bytes
            && end.is_some_and(|end| end <= self.shape.segment_bytes)
    }

    /// Where a place begins.
    pub(crate) fn block_at(&self, place: Place) -> u64 {
        self.segments_at
            + u64::from(place.segment) * self.shape.segment_bytes
            + u64::from(place.index) * place.stride
    }
}
