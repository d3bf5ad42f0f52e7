//! Pages of an engine that is not there, in any device's memory: for tests and benches that have none.
//!
//! Deliberately absent: giving the memory back. It lives as long as the process, so that no copy of a [`Pages`] can
//! outlive it.

use std::mem::ManuallyDrop;

use crate::conformance::Memory;
use crate::{Error, LayerView, Pages, PartGeometry};

/// How a page lies in an engine's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PageOrder {
    /// `[head][token][cell]`.
    ByHead,
    /// `[token][head][cell]`.
    ByToken,
}

/// Pages that nobody else has, one to a block: `[layer][page]`, each layer in a piece of its own, as engines have them.
pub struct EnginePages {
    pages: Pages,
    /// Never given back: copies of `pages` may be about.
    memory: ManuallyDrop<Box<dyn Memory>>,
    bases: Vec<usize>,
    order: PageOrder,
}

impl std::fmt::Debug for EnginePages {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EnginePages")
            .field("pages", &self.pages)
            .field("order", &self.order)
            .finish_non_exhaustive()
    }
}

impl EnginePages {
    /// So many blocks of zeros in memory of its own.
    ///
    /// # Errors
    /// `Invalid` when numbers are zero or too large.
    pub fn new(
        memory: impl Memory + 'static,
        part: PartGeometry,
        blocks: u32,
        order: PageOrder,
    ) -> Result<Self, Error> {
        let mut memory: ManuallyDrop<Box<dyn Memory>> = ManuallyDrop::new(Box::new(memory));
        let page = part.heads as usize * part.head_bytes();
        let bytes = page
            .checked_mul(blocks as usize)
            .filter(|bytes| *bytes > 0 && isize::try_from(*bytes).is_ok())
            .ok_or_else(|| Error::invalid(format!("{blocks} blocks of {part:?}")))?;
        let cell = part.cell_bytes as usize;
        let (head, token) = match order {
            PageOrder::ByHead => (part.head_bytes(), cell),
            PageOrder::ByToken => (cell, cell * part.heads as usize),
        };
        let bases: Vec<usize> = (0..part.layers).map(|_| memory.allocate(bytes)).collect();
        let views = bases.iter().map(|base| {
            // SAFETY: just allocated, and never given back. It is written and read only through `&mut self` and
            // `&self`, whose users know not to do so during a copy.
            unsafe { LayerView::new(*base, bytes, page, head, token) }
        });
        let pages = Pages::new(views.collect(), part, part.tokens)?;
        Ok(Self {
            pages,
            memory,
            bases,
            order,
        })
    }

    /// To be copied from and to.
    pub fn pages(&self) -> &Pages {
        &self.pages
    }

    /// Writes one block, given as it is stored: `[layer][head][token][cell]`. Not while it is being copied.
    ///
    /// # Panics
    /// When there is no such block, or it is not so long.
    pub fn write(&mut self, block: u32, stored: &[u8]) {
        let part = *self.pages.part();
        assert!(block < self.pages.pages() && stored.len() == part.bytes());
        let page = part.heads as usize * part.head_bytes();
        for (base, rows) in self.bases.iter().zip(stored.chunks(page)) {
            let mut bytes = vec![0; page];
            for (stored, at) in cells(&part, self.order) {
                let cell = part.cell_bytes as usize;
                bytes[at..at + cell].copy_from_slice(&rows[stored..stored + cell]);
            }
            self.memory.write(base + block as usize * page, &bytes);
        }
    }

    /// Reads one block, as it would be stored. Not while it is being copied.
    ///
    /// # Panics
    /// When there is no such block.
    pub fn read(&self, block: u32) -> Vec<u8> {
        let part = *self.pages.part();
        assert!(block < self.pages.pages());
        let page = part.heads as usize * part.head_bytes();
        let mut all = vec![0; part.bytes()];
        for (base, rows) in self.bases.iter().zip(all.chunks_mut(page)) {
            let mut bytes = vec![0; page];
            self.memory.read(base + block as usize * page, &mut bytes);
            for (stored, at) in cells(&part, self.order) {
                let cell = part.cell_bytes as usize;
                rows[stored..stored + cell].copy_from_slice(&bytes[at..at + cell]);
            }
        }
        all
    }
}

/// Each cell of a page: where it begins in the stored order, and in this one.
fn cells(part: &PartGeometry, order: PageOrder) -> impl Iterator<Item = (usize, usize)> {
    let (heads, tokens) = (part.heads as usize, part.tokens as usize);
    let cell = part.cell_bytes as usize;
    (0..heads * tokens).map(move |i| {
        let (head, token) = (i / tokens, i % tokens);
        let at = match order {
            PageOrder::ByHead => i,
            PageOrder::ByToken => token * heads + head,
        };
        (i * cell, at * cell)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conformance::HostMemory;
    use crate::{Device, HostDevice, StoreJob};

    #[test]
    fn what_is_written_is_what_is_stored() {
        let part = PartGeometry {
            layers: 2,
            heads: 3,
            tokens: 4,
            cell_bytes: 16,
        };
        let bytes: Vec<u8> = (0..part.bytes()).map(|i| (i * 7 % 251) as u8).collect();
        for order in [PageOrder::ByHead, PageOrder::ByToken] {
            let mut engine = EnginePages::new(HostMemory::default(), part, 3, order).expect("fits");
            engine.write(1, &bytes);
            assert_eq!(engine.read(1), bytes);
            assert_eq!(engine.read(2), vec![0; part.bytes()]);
            let mut slot = vec![0; part.bytes()];
            // SAFETY: the slot is ours alone until the copy is over.
            let to = unsafe { kvd_arena::SlotBytes::from_raw(slot.as_mut_ptr(), slot.len()) };
            let job = StoreJob {
                from: engine.pages(),
                pages: &[1],
                part: to,
            };
            HostDevice.store(&[job], &mut Vec::new()).expect("stored");
            assert_eq!(slot, bytes, "{order:?}");
        }
        assert!(EnginePages::new(HostMemory::default(), part, 0, PageOrder::ByHead).is_err());
    }
}
