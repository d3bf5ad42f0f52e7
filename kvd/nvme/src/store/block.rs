//! The header page of a block: which block lies there, how it is cut, its checksums. `docs/formats.md` says the same in a table.
//! Deliberately absent: whether the bytes after it are those (`verify`).

use kvd_core::geometry::MAX_PARTS;
use kvd_core::tier::{BlockHeader, BlockKey};
use kvd_core::{BlockHash, Cut, GroupGeometry, GroupKind, NamespaceId};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::format::{tail_crc, tail_holds};
use crate::io::PAGE;

pub(crate) const BLOCK_MAGIC: [u8; 8] = *b"KVDBLK01";

const _: () = assert!(size_of::<BlockHead>() == 160);

/// The fixed part of a block's header page. Bounds and checksums follow.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct BlockHead {
    magic: [u8; 8],
    store: [u8; 16],
    namespace: [u8; 32],
    hash: [u8; 32],
    parent: [u8; 32],
    group: u8,
    has_parent: u8,
    layer_bounds: U16,
    head_bounds: U16,
    crcs: U16,
    /// Of the block.
    bytes: U64,
    /// Where this page lies on the device: a write that went astray is noticed.
    offset: U64,
    layers: U32,
    heads: U32,
    block_tokens: U32,
    cell_bytes: U32,
}

/// Most bounds of layers and heads together.
const MOST_BOUNDS: usize = 2 * (MAX_PARTS + 1);

/// Where the checksums begin in the header page of a block with so many bounds.
fn crcs_at(bounds: usize) -> usize {
    (size_of::<BlockHead>() + 4 * bounds).next_multiple_of(8)
}

/// Whether bounds and checksums of a block fit its header page.
pub(crate) fn block_fits(header: &BlockHeader) -> bool {
    let bounds = header.cut.layer_bounds().len() + header.cut.head_bounds().len();
    crcs_at(bounds) + 8 * header.crcs.len() <= PAGE - 8
}

/// Fills the header page of a block. Gives its CRC, or nothing where bounds and checksums don't fit one page.
pub(crate) fn encode_block(
    page: &mut [u8],
    store: &[u8; 16],
    header: &BlockHeader,
    geometry: &GroupGeometry,
    offset: u64,
) -> Option<u64> {
    let (layer_bounds, head_bounds) = (header.cut.layer_bounds(), header.cut.head_bounds());
    if !block_fits(header) {
        return None;
    }
    let crcs_at = crcs_at(layer_bounds.len() + head_bounds.len());
    let mut head = BlockHead::new_zeroed();
    head.magic = BLOCK_MAGIC;
    head.store = *store;
    head.namespace = header.key.namespace.0;
    head.hash = header.key.hash.0;
    head.group = header.key.group;
    if let Some(parent) = header.parent {
        head.has_parent = 1;
        head.parent = parent.0;
    }
    head.layer_bounds = (layer_bounds.len() as u16).into();
    head.head_bounds = (head_bounds.len() as u16).into();
    head.crcs = (header.crcs.len() as u16).into();
    head.bytes = geometry.block_bytes().into();
    head.offset = offset.into();
    head.layers = geometry.layers.into();
    head.heads = geometry.heads.into();
    head.block_tokens = geometry.block_tokens.into();
    head.cell_bytes = geometry.cell_bytes.into();
    page.fill(0);
    page[..size_of::<BlockHead>()].copy_from_slice(head.as_bytes());
    let words = layer_bounds.iter().chain(head_bounds);
    for (word, out) in words.zip(page[size_of::<BlockHead>()..].chunks_exact_mut(4)) {
        out.copy_from_slice(&word.to_le_bytes());
    }
    for (sum, out) in header.crcs.iter().zip(page[crcs_at..].chunks_exact_mut(8)) {
        out.copy_from_slice(&sum.to_le_bytes());
    }
    let sum = tail_crc(page);
    page[PAGE - 8..].copy_from_slice(&sum.to_le_bytes());
    Some(sum)
}

/// What a block's header page says. Made once for many pages, so that decoding one takes no memory.
pub(crate) struct BlockPage {
    pub(crate) header: BlockHeader,
    /// Of its kind nothing is known; everything that has to do with bytes is right.
    pub(crate) geometry: GroupGeometry,
    pub(crate) offset: u64,
    pub(crate) crc: u64,
}

/// What is wrong with a block, or with what lies where it should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Flaw {
    /// There is no sound header of this store.
    Header,
    /// The header is of another block, or of another place.
    OtherBlock,
    /// The header's sizes are not those of the group.
    Geometry,
    /// The bytes are not those that were stored.
    Payload,
}

impl BlockPage {
    /// Of no page yet.
    pub(crate) fn new() -> Self {
        let geometry = GroupGeometry {
            kind: GroupKind::Opaque,
            layers: 1,
            heads: 1,
            block_tokens: 1,
            cell_bytes: 1,
            window: None,
        };
        let key = BlockKey {
            namespace: NamespaceId([0; 32]),
            group: 0,
            hash: BlockHash([0; 32]),
        };
        BlockPage {
            header: BlockHeader {
                key,
                parent: None,
                cut: Cut::whole(&geometry),
                crcs: Vec::new(),
            },
            geometry,
            offset: 0,
            crc: 0,
        }
    }

    /// Takes in what this page says. After an error it says nothing that may be used.
    pub(crate) fn decode(&mut self, page: &[u8], store: &[u8; 16]) -> Result<(), Flaw> {
        let (head, rest) = BlockHead::ref_from_prefix(page).map_err(|_| Flaw::Header)?;
        if head.magic != BLOCK_MAGIC || head.store != *store || !tail_holds(page) {
            return Err(Flaw::Header);
        }
        let (layers, heads) = (
            usize::from(head.layer_bounds.get()),
            usize::from(head.head_bounds.get()),
        );
        let crcs = usize::from(head.crcs.get());
        let crcs_at = crcs_at(layers + heads);
        if crcs_at + 8 * crcs > PAGE - 8 {
            return Err(Flaw::Header);
        }
        let mut bounds = [0; MOST_BOUNDS];
        let bounds = bounds.get_mut(..layers + heads).ok_or(Flaw::Geometry)?;
        for (bound, word) in bounds.iter_mut().zip(rest.as_chunks::<4>().0) {
            *bound = u32::from_le_bytes(*word);
        }
        let sums = page[crcs_at..crcs_at + 8 * crcs].as_chunks::<8>().0;
        let geometry = GroupGeometry {
            kind: GroupKind::Opaque,
            layers: head.layers.get(),
            heads: head.heads.get(),
            block_tokens: head.block_tokens.get(),
            cell_bytes: head.cell_bytes.get(),
            window: None,
        };
        geometry.validate().map_err(|_| Flaw::Geometry)?;
        let cut = &mut self.header.cut;
        cut.set(&bounds[..layers], &bounds[layers..], &geometry)
            .map_err(|_| Flaw::Geometry)?;
        if cut.crc_count() as usize != crcs || geometry.block_bytes() != head.bytes.get() {
            return Err(Flaw::Geometry);
        }
        let header = &mut self.header;
        header.key = BlockKey {
            namespace: NamespaceId(head.namespace),
            group: head.group,
            hash: BlockHash(head.hash),
        };
        header.parent = (head.has_parent == 1).then_some(BlockHash(head.parent));
        header.crcs.clear();
        header
            .crcs
            .extend(sums.iter().map(|sum| u64::from_le_bytes(*sum)));
        self.geometry = geometry;
        self.offset = head.offset.get();
        self.crc = tail_crc(page);
        Ok(())
    }
}
