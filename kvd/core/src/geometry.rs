//! How a stored block lies in its slot: `[part][layer][head in part][token][cell]`.
//!
//! A part is a cell of a grid over (layers x heads), layer ranges outermost. Offsets and checksum positions follow from the
//! bounds alone, in closed form, so core, client and devices agree without a table. Deliberately absent: copying, and any
//! notion of how an engine lays out its own pages.

use std::ops::Range;

use thiserror::Error;

/// Most parts of one block.
pub const MAX_PARTS: usize = 128;
/// Most checksums of one block (layer ranges x heads).
pub const MAX_CRCS: u32 = 4096;
/// Granularity of slots, bytes.
pub const SLOT_ALIGN: u64 = 4096;

const MAX_LAYERS: u32 = 4096;
const MAX_HEADS: u32 = 4096;
/// Most tokens that a block spans.
pub(crate) const MAX_TOKENS: u32 = 1 << 20;
const MAX_CELL: u32 = 1 << 24;

/// Why a geometry, a cut or an arena shape is refused.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum GeometryError {
    /// A number is zero or beyond its limit.
    #[error("{what} is {value}; it must be from 1 to {most}")]
    Range {
        /// Which number.
        what: &'static str,
        /// What was given.
        value: u64,
        /// The greatest legal value.
        most: u64,
    },
    /// Bounds do not run from 0 to the end in ascending order.
    #[error("{what} bounds must rise strictly from 0 to {end}")]
    Bounds {
        /// "layer" or "head".
        what: &'static str,
        /// What the last bound must be.
        end: u32,
    },
    /// Too many parts or checksums.
    #[error("the cut makes {value} {what}; at most {most} are supported")]
    TooFine {
        /// "parts" or "checksums".
        what: &'static str,
        /// How many the cut makes.
        value: u64,
        /// The limit.
        most: u64,
    },
}

/// What kind of attention (or other state) a KV-cache group holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GroupKind {
    /// Every block matters to what follows.
    Full,
    /// Only a window of blocks matters.
    SlidingWindow,
    /// Recurrent state.
    State,
    /// Bytes that can't be cut or interpreted.
    Opaque,
}

impl GroupKind {
    /// The word used in records and in status.
    pub fn word(self) -> &'static str {
        match self {
            GroupKind::Full => "full",
            GroupKind::SlidingWindow => "sliding_window",
            GroupKind::State => "state",
            GroupKind::Opaque => "opaque",
        }
    }

    /// Cells that a head keeps of a block spanning so many tokens: one each, but a state is a single cell whatever led to it.
    pub fn cells(self, span: u32) -> u32 {
        match self {
            GroupKind::State => 1,
            _ => span,
        }
    }

    /// The kind that `word` names.
    pub fn from_word(word: &str) -> Option<Self> {
        Some(match word {
            "full" => GroupKind::Full,
            "sliding_window" => GroupKind::SlidingWindow,
            "state" => GroupKind::State,
            "opaque" => GroupKind::Opaque,
            _ => return None,
        })
    }
}

/// Sizes of one KV-cache group of a namespace, whole model (not one rank's part).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupGeometry {
    /// Kind of the group.
    pub kind: GroupKind,
    /// Layers in the group.
    pub layers: u32,
    /// KV heads of each layer.
    pub heads: u32,
    /// Tokens of a block, each with a cell; 1 for a state, which is one cell however many tokens led to it.
    pub block_tokens: u32,
    /// Bytes that one head of one token of one layer takes (K and V together).
    pub cell_bytes: u32,
    /// Window in tokens, for sliding-window groups.
    pub window: Option<u32>,
}

impl GroupGeometry {
    /// Checks every number against its limit; after this no product of them overflows.
    pub fn validate(&self) -> Result<(), GeometryError> {
        let range = |what, value: u32, most: u32| {
            if value == 0 || value > most {
                return Err(GeometryError::Range {
                    what,
                    value: value.into(),
                    most: most.into(),
                });
            }
            Ok(())
        };
        range("layers", self.layers, MAX_LAYERS)?;
        range("heads", self.heads, MAX_HEADS)?;
        range("block_tokens", self.block_tokens, MAX_TOKENS)?;
        range("cell_bytes", self.cell_bytes, MAX_CELL)?;
        let most = 1u64 << 40;
        let bytes =
            u128::from(self.layers) * u128::from(self.heads) * u128::from(self.head_bytes());
        if bytes > u128::from(most) {
            return Err(GeometryError::Range {
                what: "block bytes",
                value: bytes.min(u64::MAX.into()) as u64,
                most,
            });
        }
        Ok(())
    }

    /// Bytes of one head of one layer: all tokens of the block.
    pub fn head_bytes(&self) -> u64 {
        u64::from(self.block_tokens) * u64::from(self.cell_bytes)
    }

    /// Bytes of a whole block, whatever the cut.
    pub fn block_bytes(&self) -> u64 {
        u64::from(self.layers) * u64::from(self.heads) * self.head_bytes()
    }

    /// Bytes of the slot that holds one block: [`Self::block_bytes`] rounded up to [`SLOT_ALIGN`].
    pub fn slot_bytes(&self) -> u64 {
        self.block_bytes().next_multiple_of(SLOT_ALIGN)
    }
}

/// A rectangle of a block: some layers, some heads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rect {
    /// Layers of the group.
    pub layers: Range<u32>,
    /// Heads of each layer.
    pub heads: Range<u32>,
}

impl Rect {
    /// What both cover; `None` if nothing.
    pub fn intersect(&self, other: &Rect) -> Option<Rect> {
        let cross = |a: &Range<u32>, b: &Range<u32>| a.start.max(b.start)..a.end.min(b.end);
        let rect = Rect {
            layers: cross(&self.layers, &other.layers),
            heads: cross(&self.heads, &other.heads),
        };
        (!rect.layers.is_empty() && !rect.heads.is_empty()).then_some(rect)
    }

    /// Bytes of this rectangle of a block.
    pub fn bytes(&self, geometry: &GroupGeometry) -> u64 {
        self.layers.len() as u64 * self.heads.len() as u64 * geometry.head_bytes()
    }
}

/// How the blocks of a group are cut into parts: a grid of layer ranges and head ranges.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Cut {
    layer_bounds: Vec<u32>,
    head_bounds: Vec<u32>,
}

impl Cut {
    /// A cut by these bounds (`0 = first < ... < last = layers` or `heads`). Invalid if they are not, or too many.
    pub fn new(
        layer_bounds: &[u32],
        head_bounds: &[u32],
        geometry: &GroupGeometry,
    ) -> Result<Cut, GeometryError> {
        check_cut(layer_bounds, head_bounds, geometry)?;
        Ok(Cut {
            layer_bounds: layer_bounds.to_vec(),
            head_bounds: head_bounds.to_vec(),
        })
    }

    /// Makes this what [`Cut::new`] would give, in the memory that it has. After an error it is as it was.
    pub fn set(
        &mut self,
        layer_bounds: &[u32],
        head_bounds: &[u32],
        geometry: &GroupGeometry,
    ) -> Result<(), GeometryError> {
        check_cut(layer_bounds, head_bounds, geometry)?;
        let bounds = [
            (&mut self.layer_bounds, layer_bounds),
            (&mut self.head_bounds, head_bounds),
        ];
        for (old, new) in bounds {
            old.clear();
            old.extend_from_slice(new);
        }
        Ok(())
    }

    /// The cut with one part: the whole block.
    pub fn whole(geometry: &GroupGeometry) -> Cut {
        Cut {
            layer_bounds: vec![0, geometry.layers],
            head_bounds: vec![0, geometry.heads],
        }
    }

    /// `layer_ranges` x `head_ranges` parts of sizes as equal as can be.
    pub fn grid(
        geometry: &GroupGeometry,
        layer_ranges: u32,
        head_ranges: u32,
    ) -> Result<Cut, GeometryError> {
        let spread = |what, total: u32, n: u32| {
            if n == 0 || n > total.min(MAX_PARTS as u32) {
                let most = total.min(MAX_PARTS as u32).into();
                return Err(GeometryError::Range {
                    what,
                    value: n.into(),
                    most,
                });
            }
            Ok((0..=n)
                .map(|i| (u64::from(total) * u64::from(i) / u64::from(n)) as u32)
                .collect::<Vec<_>>())
        };
        let layers = spread("layer ranges", geometry.layers, layer_ranges)?;
        let heads = spread("head ranges", geometry.heads, head_ranges)?;
        Cut::new(&layers, &heads, geometry)
    }

    /// Bounds of the layer ranges, ends included.
    pub fn layer_bounds(&self) -> &[u32] {
        &self.layer_bounds
    }

    /// Bounds of the head ranges, ends included.
    pub fn head_bounds(&self) -> &[u32] {
        &self.head_bounds
    }

    fn columns(&self) -> u32 {
        self.head_bounds.len() as u32 - 1
    }

    /// Heads of the whole group.
    pub fn heads(&self) -> u32 {
        self.head_bounds[self.head_bounds.len() - 1]
    }

    /// How many parts there are.
    pub fn parts(&self) -> u32 {
        (self.layer_bounds.len() as u32 - 1) * self.columns()
    }

    /// What part `part` covers. Panics if there is no such part.
    pub fn part(&self, part: u32) -> Rect {
        let (row, column) = (
            (part / self.columns()) as usize,
            (part % self.columns()) as usize,
        );
        Rect {
            layers: self.layer_bounds[row]..self.layer_bounds[row + 1],
            heads: self.head_bounds[column]..self.head_bounds[column + 1],
        }
    }

    /// Where part `part` begins, bytes from the start of the slot.
    pub fn part_offset(&self, part: u32, geometry: &GroupGeometry) -> u64 {
        let rect = self.part(part);
        let above = u64::from(rect.layers.start) * u64::from(geometry.heads);
        let beside = rect.layers.len() as u64 * u64::from(rect.heads.start);
        (above + beside) * geometry.head_bytes()
    }

    /// Where the tokens of one (layer, head) of part `part` begin, bytes from the start of the slot. Both are numbered in the
    /// whole group and must lie in the part. Heads of one layer of one part follow each other without gaps.
    pub fn head_offset(&self, part: u32, layer: u32, head: u32, geometry: &GroupGeometry) -> u64 {
        let rect = self.part(part);
        assert!(
            rect.layers.contains(&layer) && rect.heads.contains(&head),
            "not in this part"
        );
        let row = u64::from(layer - rect.layers.start) * rect.heads.len() as u64
            + u64::from(head - rect.heads.start);
        self.part_offset(part, geometry) + row * geometry.head_bytes()
    }

    /// Checksums of a whole block: one for each (part, head of that part).
    pub fn crc_count(&self) -> u32 {
        (self.layer_bounds.len() as u32 - 1) * self.heads()
    }

    /// Position of the first checksum of part `part` in the block's list.
    pub fn crc_base(&self, part: u32) -> u32 {
        let (row, column) = (part / self.columns(), (part % self.columns()) as usize);
        row * self.heads() + self.head_bounds[column]
    }

    /// The parts that `rect` touches, in order, each with what it has of it.
    pub fn overlaps<'a>(&'a self, rect: &'a Rect) -> impl Iterator<Item = (u32, Rect)> + 'a {
        (0..self.parts()).filter_map(move |part| Some((part, self.part(part).intersect(rect)?)))
    }
}

fn check_bounds(what: &'static str, bounds: &[u32], end: u32) -> Result<(), GeometryError> {
    let rising = bounds.windows(2).all(|pair| pair[0] < pair[1]);
    if bounds.len() < 2 || bounds[0] != 0 || bounds[bounds.len() - 1] != end || !rising {
        return Err(GeometryError::Bounds { what, end });
    }
    Ok(())
}

fn check_cut(
    layer_bounds: &[u32],
    head_bounds: &[u32],
    geometry: &GroupGeometry,
) -> Result<(), GeometryError> {
    check_bounds("layer", layer_bounds, geometry.layers)?;
    check_bounds("head", head_bounds, geometry.heads)?;
    let ranges = layer_bounds.len() as u64 - 1;
    let parts = ranges * (head_bounds.len() as u64 - 1);
    if parts > MAX_PARTS as u64 {
        return Err(GeometryError::TooFine {
            what: "parts",
            value: parts,
            most: MAX_PARTS as u64,
        });
    }
    let crcs = ranges * u64::from(geometry.heads);
    if crcs > MAX_CRCS.into() {
        return Err(GeometryError::TooFine {
            what: "checksums",
            value: crcs,
            most: MAX_CRCS.into(),
        });
    }
    Ok(())
}

/// The shared memory of one tenant, as everyone who maps it must see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ArenaShape {
    /// 16 random bytes that name this arena.
    pub id: [u8; 16],
    /// Size in bytes: whole extents.
    pub bytes: u64,
    /// Bytes of an extent: a power of two.
    pub extent_bytes: u64,
    /// Page size that was got, bytes.
    pub page_bytes: u64,
    /// Generation words of an extent: `extent_bytes / SLOT_ALIGN`.
    pub slots_per_extent: u32,
}

impl ArenaShape {
    /// Extents in the arena.
    pub fn extents(&self) -> u32 {
        (self.bytes / self.extent_bytes.max(1)).min(u32::MAX.into()) as u32
    }

    /// Checks that the numbers fit each other and that every slot has a u32 index.
    pub fn validate(&self) -> Result<(), GeometryError> {
        let most = 1u64 << 40;
        let extent = self.extent_bytes;
        if !extent.is_power_of_two() || !(SLOT_ALIGN..=most).contains(&extent) {
            return Err(GeometryError::Range {
                what: "extent_bytes (a power of two)",
                value: extent,
                most,
            });
        }
        let slots = extent / SLOT_ALIGN;
        if u64::from(self.slots_per_extent) != slots {
            let value = self.slots_per_extent.into();
            return Err(GeometryError::Range {
                what: "slots_per_extent",
                value,
                most: slots,
            });
        }
        let most = u64::from(u32::MAX) * SLOT_ALIGN;
        if self.bytes == 0 || !self.bytes.is_multiple_of(extent) || self.bytes > most {
            return Err(GeometryError::Range {
                what: "arena bytes (whole extents)",
                value: self.bytes,
                most,
            });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn geometry() -> GroupGeometry {
        GroupGeometry {
            kind: GroupKind::Full,
            layers: 6,
            heads: 4,
            block_tokens: 16,
            cell_bytes: 8,
            window: None,
        }
    }

    /// The definition, word for word, against the closed forms.
    #[test]
    fn offsets_follow_the_order_part_layer_head() {
        let g = geometry();
        for (pp, tp) in [(1, 1), (1, 2), (2, 1), (2, 4), (3, 2), (6, 4)] {
            let cut = Cut::grid(&g, pp, tp).unwrap();
            let (mut at, mut crc) = (0, 0);
            for part in 0..cut.parts() {
                let rect = cut.part(part);
                assert_eq!(cut.part_offset(part, &g), at);
                assert_eq!(cut.crc_base(part), crc);
                for layer in rect.layers.clone() {
                    for head in rect.heads.clone() {
                        assert_eq!(cut.head_offset(part, layer, head, &g), at);
                        at += g.head_bytes();
                    }
                }
                crc += rect.heads.len() as u32;
            }
            assert_eq!(at, g.block_bytes());
            assert_eq!(crc, cut.crc_count());
        }
    }

    #[test]
    fn overlaps_cover_a_rectangle_exactly_once() {
        let g = geometry();
        let cut = Cut::new(&[0, 1, 6], &[0, 3, 4], &g).unwrap();
        let rect = Rect {
            layers: 0..4,
            heads: 2..4,
        };
        let bytes: u64 = cut.overlaps(&rect).map(|(_, piece)| piece.bytes(&g)).sum();
        assert_eq!(bytes, rect.bytes(&g));
        assert_eq!(cut.overlaps(&rect).count(), 4);
        assert!(cut.part(0).intersect(&cut.part(3)).is_none());
    }

    #[test]
    fn bad_bounds_are_refused() {
        let g = geometry();
        let absurd: [&[u32]; 7] = [
            &[],
            &[0],
            &[0, 5],
            &[1, 6],
            &[0, 3, 3, 6],
            &[0, 4, 2, 6],
            &[0, u32::MAX],
        ];
        for bounds in absurd {
            assert!(Cut::new(bounds, &[0, 4], &g).is_err(), "{bounds:?}");
            let mut cut = Cut::whole(&g);
            assert!(cut.set(bounds, &[0, 4], &g).is_err(), "{bounds:?}");
            assert_eq!(cut, Cut::whole(&g));
        }
        let mut cut = Cut::grid(&g, 6, 1).unwrap();
        assert_eq!(cut.set(&[0, 2, 6], &[0, 1, 4], &g), Ok(()));
        assert_eq!(cut, Cut::new(&[0, 2, 6], &[0, 1, 4], &g).unwrap());
        assert!(Cut::grid(&g, 0, 1).is_err() && Cut::grid(&g, 7, 1).is_err());
        let wide = GroupGeometry {
            heads: 4096,
            layers: 4096,
            ..geometry()
        };
        assert!(Cut::grid(&wide, 1, 129).is_err());
        assert!(Cut::grid(&wide, 2, 1).is_err(), "8192 checksums");
        assert!(Cut::grid(&wide, 1, 128).is_ok());
    }

    #[test]
    fn geometry_limits_hold() {
        assert!(geometry().validate().is_ok());
        assert!(
            GroupGeometry {
                layers: 0,
                ..geometry()
            }
            .validate()
            .is_err()
        );
        assert!(
            GroupGeometry {
                cell_bytes: u32::MAX,
                ..geometry()
            }
            .validate()
            .is_err()
        );
        let huge = GroupGeometry {
            layers: 4096,
            heads: 4096,
            block_tokens: 1 << 20,
            cell_bytes: 1 << 24,
            ..geometry()
        };
        assert!(huge.validate().is_err());
        assert_eq!(geometry().block_bytes(), 6 * 4 * 16 * 8);
        assert_eq!(geometry().slot_bytes(), 4096);
    }

    #[test]
    fn shapes_are_checked() {
        let good = ArenaShape {
            id: [1; 16],
            bytes: 8 << 21,
            extent_bytes: 1 << 21,
            page_bytes: 4096,
            slots_per_extent: 512,
        };
        assert!(good.validate().is_ok());
        assert_eq!(good.extents(), 8);
        for bad in [
            ArenaShape { bytes: 0, ..good },
            ArenaShape {
                bytes: (8 << 21) + 1,
                ..good
            },
            ArenaShape {
                extent_bytes: 0,
                ..good
            },
            ArenaShape {
                extent_bytes: 3 << 20,
                ..good
            },
            ArenaShape {
                slots_per_extent: 511,
                ..good
            },
            ArenaShape {
                bytes: 1 << 60,
                ..good
            },
        ] {
            assert!(bad.validate().is_err(), "{bad:?}");
        }
    }
}
