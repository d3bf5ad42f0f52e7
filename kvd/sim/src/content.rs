//! What the bytes of a simulated block are: a function of (key, version, layer, head), so that any reader of any cut can be
//! checked without keeping the bytes, and bytes of another key, another version or another place never look right.

use crc_fast::{CrcAlgorithm, Digest};
use kvd_core::{Cut, GroupGeometry, Rect};

use crate::rng::{mix, splitmix};

/// Fills all tokens of one head of one layer.
pub(crate) fn head(seed: u64, layer: u32, head: u32, out: &mut [u8]) {
    let mut state = mix(&[seed, u64::from(layer), u64::from(head)]);
    for chunk in out.chunks_mut(8) {
        chunk.copy_from_slice(&splitmix(&mut state).to_le_bytes()[..chunk.len()]);
    }
}

/// The bytes of part `part`, as they lie in the slot from the part's offset on.
pub(crate) fn part(seed: u64, geometry: &GroupGeometry, cut: &Cut, part: u32) -> Vec<u8> {
    let rect = cut.part(part);
    let mut bytes = vec![0; rect.bytes(geometry) as usize];
    fill(seed, geometry, &rect, &mut bytes);
    bytes
}

/// The bytes of the whole block in a slot.
pub(crate) fn block(seed: u64, geometry: &GroupGeometry, cut: &Cut) -> Vec<u8> {
    (0..cut.parts())
        .flat_map(|p| part(seed, geometry, cut, p))
        .collect()
}

/// All checksums of a block, parts in order.
pub(crate) fn block_crcs(seed: u64, geometry: &GroupGeometry, cut: &Cut) -> Vec<u64> {
    (0..cut.parts())
        .flat_map(|p| part_crcs(geometry, &cut.part(p), &part(seed, geometry, cut, p)))
        .collect()
}

/// Fills `[layer][head]` of `rect`, densely: what a reader of just this rectangle should have got.
pub(crate) fn fill(seed: u64, geometry: &GroupGeometry, rect: &Rect, bytes: &mut [u8]) {
    let size = geometry.head_bytes() as usize;
    let places = rect
        .layers
        .clone()
        .flat_map(|layer| rect.heads.clone().map(move |head| (layer, head)));
    for ((layer, h), out) in places.zip(bytes.chunks_mut(size)) {
        head(seed, layer, h, out);
    }
}

/// One CRC for each head of a part, over `[layer][token][cell]`. `bytes` are the part's, as they lie in the slot.
pub(crate) fn part_crcs(geometry: &GroupGeometry, rect: &Rect, bytes: &[u8]) -> Vec<u64> {
    let size = geometry.head_bytes() as usize;
    let heads = rect.heads.len();
    (0..heads)
        .map(|at| {
            let mut digest = Digest::new(CrcAlgorithm::Crc64Nvme);
            for layer in 0..rect.layers.len() {
                let from = (layer * heads + at) * size;
                digest.update(&bytes[from..from + size]);
            }
            digest.finalize()
        })
        .collect()
}

/// The pattern of memory that belongs to nobody, stamped with a generation.
pub(crate) fn poison(word: u64, out: &mut [u8]) {
    let stamp = (0xdead_0000_0000_0000 | (word & 0xffff_ffff_ffff)).to_be_bytes();
    for chunk in out.chunks_mut(8) {
        chunk.copy_from_slice(&stamp[..chunk.len()]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvd_core::GroupKind;

    #[test]
    fn parts_of_any_cut_hold_the_same_heads() {
        let g = GroupGeometry {
            kind: GroupKind::Full,
            layers: 4,
            heads: 4,
            block_tokens: 2,
            cell_bytes: 12,
            window: None,
        };
        let (whole, cut) = (Cut::whole(&g), Cut::grid(&g, 2, 2).unwrap());
        let (a, b) = (block(9, &g, &whole), block(9, &g, &cut));
        assert_eq!(a.len() as u64, g.block_bytes());
        for layer in 0..4 {
            for h in 0..4 {
                let size = g.head_bytes() as usize;
                let at = |cut: &Cut, bytes: &[u8]| {
                    let rect = Rect {
                        layers: layer..layer + 1,
                        heads: h..h + 1,
                    };
                    let (part, _) = cut.overlaps(&rect).next().unwrap();
                    let from = cut.head_offset(part, layer, h, &g) as usize;
                    bytes[from..from + size].to_vec()
                };
                assert_eq!(at(&whole, &a), at(&cut, &b));
            }
        }
        assert_ne!(block(9, &g, &whole), block(8, &g, &whole));
        let crcs = part_crcs(&g, &cut.part(0), &part(9, &g, &cut, 0));
        assert_eq!(crcs.len(), 2);
    }
}
