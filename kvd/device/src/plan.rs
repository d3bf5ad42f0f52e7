//! Which bytes of a stored block a rank of any parallel degree reads, and which it must look at besides.
//!
//! A checksum covers one head of one stored part over all of that part's layers. Where a part has layers that the reader
//! does not want, they are read all the same, in their place, or the checksum could not be told.

use std::ops::Range;

use kvd_core::{Cut, GroupGeometry, Rect};

use crate::{Error, PartGeometry};

/// How blocks of one stored cut map onto one rank's part. Make it once for each pair.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoadPlan {
    pub(crate) own: Rect,
    pub(crate) part: PartGeometry,
    pub(crate) pieces: Vec<Piece>,
    slot_bytes: usize,
    crcs: usize,
}

/// What one stored part has for the reader.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Piece {
    /// Where the part begins, bytes from the start of the slot.
    pub(crate) offset: usize,
    /// All layers of the part, numbered in the group.
    pub(crate) layers: Range<u32>,
    /// All heads of the part, numbered in the group.
    pub(crate) heads: Range<u32>,
    /// Those heads that the reader wants.
    pub(crate) wanted: Range<u32>,
    /// Position of the first wanted head's checksum in the block's list.
    pub(crate) crc: usize,
}

impl LoadPlan {
    /// For blocks of a group stored by `stored`, read by the rank whose part is `own`.
    ///
    /// # Errors
    /// `Invalid` when `own` is no rectangle of the group.
    pub fn new(geometry: &GroupGeometry, stored: &Cut, own: &Rect) -> Result<Self, Error> {
        geometry
            .validate()
            .map_err(|e| Error::invalid(e.to_string()))?;
        let inside = !own.layers.is_empty()
            && !own.heads.is_empty()
            && own.layers.end <= geometry.layers
            && own.heads.end <= geometry.heads
            && stored.heads() == geometry.heads
            && stored.layer_bounds().last() == Some(&geometry.layers);
        if !inside {
            return Err(Error::invalid(format!(
                "{own:?} is no part of {} layers and {} heads",
                geometry.layers, geometry.heads
            )));
        }
        let pieces = stored
            .overlaps(own)
            .map(|(part, common)| {
                let whole = stored.part(part);
                let skipped = common.heads.start - whole.heads.start;
                Piece {
                    offset: stored.part_offset(part, geometry) as usize,
                    crc: (stored.crc_base(part) + skipped) as usize,
                    layers: whole.layers,
                    heads: whole.heads,
                    wanted: common.heads,
                }
            })
            .collect();
        Ok(Self {
            own: own.clone(),
            part: PartGeometry {
                layers: own.layers.len() as u32,
                heads: own.heads.len() as u32,
                tokens: geometry.block_tokens,
                cell_bytes: geometry.cell_bytes,
            },
            pieces,
            slot_bytes: geometry.block_bytes() as usize,
            crcs: stored.crc_count() as usize,
        })
    }

    /// What the reader holds of a block.
    pub fn part(&self) -> &PartGeometry {
        &self.part
    }

    /// Bytes of a stored block, from the start of its slot.
    pub fn slot_bytes(&self) -> usize {
        self.slot_bytes
    }

    /// Checksums of a stored block.
    pub fn crcs(&self) -> usize {
        self.crcs
    }
}
