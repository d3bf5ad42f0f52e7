//! Whether a block's bytes are those that were stored: one CRC-64/NVME a head of each part, over `[layer][token][cell]`, taken in
//! one pass over the bytes as they lie. Deliberately absent: reading them.

use crc_fast::{CrcAlgorithm::Crc64Nvme, Digest};

use super::format::BlockPage;

/// Takes a block's bytes in order, in pieces of any length.
pub(crate) struct Verifier<'a> {
    page: &'a BlockPage,
    head_bytes: u64,
    part: u32,
    /// Heads and layers of the part.
    sums: Vec<Digest>,
    layers: usize,
    /// Where in the part the next byte belongs.
    layer: usize,
    head: usize,
    /// Bytes that are missing of this head of this layer.
    left: u64,
    good: bool,
}

impl<'a> Verifier<'a> {
    pub(crate) fn new(page: &'a BlockPage) -> Self {
        let head_bytes = page.geometry.head_bytes();
        let mut verifier = Verifier {
            page,
            head_bytes,
            part: 0,
            sums: Vec::new(),
            layers: 0,
            layer: 0,
            head: 0,
            left: head_bytes,
            good: true,
        };
        verifier.begin_part();
        verifier
    }

    fn begin_part(&mut self) {
        (self.layer, self.head) = (0, 0);
        let cut = &self.page.header.cut;
        if self.part == cut.parts() {
            self.sums.clear();
            return;
        }
        let rect = cut.part(self.part);
        self.layers = rect.layers.len();
        self.sums.clear();
        self.sums
            .resize_with(rect.heads.len(), || Digest::new(Crc64Nvme));
    }

    /// The next bytes. What comes after the block's last byte is not looked at.
    pub(crate) fn feed(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() && !self.sums.is_empty() {
            let take = self.left.min(bytes.len() as u64);
            let (now, rest) = bytes.split_at(take as usize);
            self.sums[self.head].update(now);
            (bytes, self.left) = (rest, self.left - take);
            if self.left == 0 {
                self.next_head();
            }
        }
    }

    fn next_head(&mut self) {
        self.left = self.head_bytes;
        self.head += 1;
        if self.head < self.sums.len() {
            return;
        }
        (self.head, self.layer) = (0, self.layer + 1);
        if self.layer < self.layers {
            return;
        }
        let base = self.page.header.cut.crc_base(self.part) as usize;
        let kept = &self.page.header.crcs[base..base + self.sums.len()];
        self.good &= self
            .sums
            .iter()
            .zip(kept)
            .all(|(sum, k)| sum.finalize() == *k);
        self.part += 1;
        self.begin_part();
    }

    /// Whether all of the block came, and every checksum is right.
    pub(crate) fn finish(self) -> bool {
        self.good && self.part == self.page.header.cut.parts()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvd_core::tier::{BlockHeader, BlockKey};
    use kvd_core::{BlockHash, Cut, GroupGeometry, GroupKind, NamespaceId};

    /// By the definition: for each head of each part, its layers in order.
    fn by_definition(cut: &Cut, g: &GroupGeometry, bytes: &[u8]) -> Vec<u64> {
        let mut all = Vec::new();
        for part in 0..cut.parts() {
            let rect = cut.part(part);
            for head in rect.heads.clone() {
                let mut run = Vec::new();
                for layer in rect.layers.clone() {
                    let from = cut.head_offset(part, layer, head, g) as usize;
                    run.extend_from_slice(&bytes[from..from + g.head_bytes() as usize]);
                }
                all.push(super::super::format::crc(&run));
            }
        }
        all
    }

    #[test]
    fn it_follows_the_definition_for_any_cut_and_any_pieces() {
        let g = GroupGeometry {
            kind: GroupKind::Full,
            layers: 6,
            heads: 4,
            block_tokens: 3,
            cell_bytes: 7,
            window: None,
        };
        let bytes: Vec<u8> = (0..g.block_bytes()).map(|i| (i * i % 251) as u8).collect();
        for (rows, columns) in [(1, 1), (2, 1), (1, 4), (3, 2), (6, 4)] {
            let cut = Cut::grid(&g, rows, columns).unwrap();
            let mut page = BlockPage {
                header: BlockHeader {
                    key: BlockKey {
                        namespace: NamespaceId([1; 32]),
                        group: 0,
                        hash: BlockHash([2; 32]),
                    },
                    parent: None,
                    crcs: by_definition(&cut, &g, &bytes),
                    cut,
                },
                geometry: g.clone(),
                offset: 0,
                crc: 0,
            };
            let check = |page: &BlockPage, step: usize, bytes: &[u8]| {
                let mut verifier = Verifier::new(page);
                bytes.chunks(step).for_each(|piece| verifier.feed(piece));
                verifier.finish()
            };
            for step in [1, 5, 21, 100, 10_000] {
                assert!(check(&page, step, &bytes));
            }
            assert!(!check(&page, 100, &bytes[..bytes.len() - 1]));
            let mut flipped = bytes.clone();
            flipped[77] ^= 4;
            assert!(!check(&page, 100, &flipped));
            page.header.crcs[0] ^= 1;
            assert!(!check(&page, 100, &bytes));
        }
    }
}
