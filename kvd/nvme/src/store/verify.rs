//! Whether a block's bytes are those that were stored: one CRC-64/NVME a head of each part, over `[layer][token][cell]`, taken in
//! one pass over the bytes as they lie. Deliberately absent: reading them.

use kvd_arena::checksum::{Engine, State};

use super::block::BlockPage;

/// Takes a block's bytes in order, in pieces.
pub(crate) struct Verifier<'a> {
    page: &'a BlockPage,
    engine: Engine,
    head_bytes: u64,
    part: u32,
    /// Heads and layers of the part.
    sums: Vec<State>,
    layers: usize,
    /// Where in the block the next byte lies.
    at: u64,
    /// Where in the part it belongs.
    layer: usize,
    head: usize,
    /// Bytes that are missing of this head of this layer.
    left: u64,
    good: bool,
}

impl<'a> Verifier<'a> {
    /// `sums` is memory to use.
    pub(crate) fn new(page: &'a BlockPage, sums: Vec<State>) -> Self {
        let head_bytes = page.geometry.head_bytes();
        let mut verifier = Verifier {
            page,
            engine: Engine::new(head_bytes as usize, false),
            head_bytes,
            part: 0,
            sums,
            layers: 0,
            at: 0,
            layer: 0,
            head: 0,
            left: head_bytes,
            good: true,
        };
        verifier.begin_part();
        verifier
    }

    /// What takes the sums.
    pub(crate) fn engine(&self) -> Engine {
        self.engine
    }

    fn begin_part(&mut self) {
        (self.layer, self.head) = (0, 0);
        let cut = &self.page.header.cut;
        self.sums.clear();
        if self.part < cut.parts() {
            let rect = cut.part(self.part);
            self.layers = rect.layers.len();
            self.sums.resize(rect.heads.len(), self.engine.start());
        }
    }

    /// The next `bytes` bytes: `sum` takes so many of the block, from this offset of it on, into the state of a head. What comes
    /// after the block's last byte is not looked at. Where heads are multiples of 16 bytes, `bytes` must be one.
    pub(crate) fn advance(
        &mut self,
        mut bytes: u64,
        sum: &mut dyn FnMut(u64, usize, Engine, &mut State),
    ) {
        while bytes > 0 && !self.sums.is_empty() {
            let take = self.left.min(bytes);
            sum(
                self.at,
                take as usize,
                self.engine,
                &mut self.sums[self.head],
            );
            self.at += take;
            (bytes, self.left) = (bytes - take, self.left - take);
            if self.left == 0 {
                self.next_head();
            }
        }
    }

    /// The next bytes, as [`Verifier::advance`].
    pub(crate) fn feed(&mut self, bytes: &[u8]) {
        let base = self.at;
        self.advance(bytes.len() as u64, &mut |at, len, engine, state| {
            let from = (at - base) as usize;
            engine.take(&bytes[from..from + len], state);
        });
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
        let engine = self.engine;
        let mut pairs = self.sums.iter().zip(kept);
        self.good &= pairs.all(|(sum, kept)| engine.finish(*sum) == *kept);
        self.part += 1;
        self.begin_part();
    }

    /// Whether all of the block came, and every checksum is right; and the memory back.
    pub(crate) fn finish(self) -> (bool, Vec<State>) {
        let good = self.good && self.part == self.page.header.cut.parts();
        (good, self.sums)
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
        follows(7, &[1, 5, 21, 100, 10_000]);
        // Runs of whole vectors.
        follows(160, &[16, 48, 480, 4096, 100_000]);
    }

    fn follows(cell_bytes: u32, steps: &[usize]) {
        let g = GroupGeometry {
            kind: GroupKind::Full,
            layers: 6,
            heads: 4,
            block_tokens: 3,
            cell_bytes,
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
                let mut verifier = Verifier::new(page, Vec::new());
                bytes.chunks(step).for_each(|piece| verifier.feed(piece));
                verifier.finish().0
            };
            for step in steps {
                assert!(check(&page, *step, &bytes));
            }
            let step = steps[3];
            assert!(!check(&page, step, &bytes[..bytes.len() - 16]));
            let mut flipped = bytes.clone();
            flipped[77] ^= 4;
            assert!(!check(&page, step, &flipped));
            page.header.crcs[0] ^= 1;
            assert!(!check(&page, step, &bytes));
        }
    }
}
