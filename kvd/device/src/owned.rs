//! Pages in memory of their own, for benches, scripts and tests that have no engine.
//!
//! Deliberately absent: giving the memory back. It lives as long as the process, so that no copy of a [`Pages`] can
//! outlive it.

use std::sync::atomic::{AtomicU8, Ordering};

use crate::{Error, LayerView, Pages, PartGeometry};

/// Pages that nobody else has: `[page][layer][head][token][cell]`, one page to a block.
#[derive(Debug)]
pub struct OwnedPages {
    pages: Pages,
    memory: &'static [AtomicU8],
    block_bytes: usize,
}

impl OwnedPages {
    /// So many blocks of zeros.
    ///
    /// # Errors
    /// `Invalid` when numbers are zero or too large.
    pub fn new(part: PartGeometry, blocks: u32) -> Result<Self, Error> {
        let bytes = u128::from(part.layers)
            * u128::from(part.heads)
            * u128::from(part.tokens)
            * u128::from(part.cell_bytes)
            * u128::from(blocks);
        if bytes == 0 || bytes > isize::MAX as u128 {
            return Err(Error::invalid(format!(
                "{blocks} blocks of {part:?} are nothing, or too much"
            )));
        }
        let block_bytes = part.bytes();
        let memory: &'static mut [u8] = vec![0; bytes as usize].leak();
        let base = memory.as_mut_ptr() as usize;
        let layer_bytes = part.heads as usize * part.head_bytes();
        let views = (0..part.layers as usize)
            .map(|layer| {
                let at = layer * layer_bytes;
                // SAFETY: inside memory that lives as long as the process. Outside of device copies it is reached only by
                // the atomics below, and `&mut self` of `fill` is what keeps callers from filling under a copy.
                unsafe {
                    LayerView::new(
                        base + at,
                        memory.len() - at,
                        block_bytes,
                        part.head_bytes(),
                        part.cell_bytes as usize,
                    )
                }
            })
            .collect();
        let pages = Pages::new(views, part, part.tokens)?;
        // SAFETY: AtomicU8 has the layout of u8, the memory is never reached as plain bytes of Rust again, and it lives on.
        let memory = unsafe {
            std::slice::from_raw_parts(memory.as_mut_ptr().cast::<AtomicU8>(), memory.len())
        };
        Ok(Self {
            pages,
            memory,
            block_bytes,
        })
    }

    /// To be copied from and to.
    pub fn pages(&self) -> &Pages {
        &self.pages
    }

    /// Writes one block. Not while it is being copied.
    ///
    /// # Panics
    /// When there is no such block.
    pub fn fill(&mut self, block: u32, byte: impl Fn(usize) -> u8) {
        for (at, place) in self.block(block).iter().enumerate() {
            place.store(byte(at), Ordering::Relaxed);
        }
    }

    /// Reads one block. Not while it is being copied.
    ///
    /// # Panics
    /// When there is no such block.
    pub fn read(&self, block: u32) -> Vec<u8> {
        let block = self.block(block).iter();
        block.map(|b| b.load(Ordering::Relaxed)).collect()
    }

    fn block(&self, block: u32) -> &'static [AtomicU8] {
        let at = block as usize * self.block_bytes;
        &self.memory[at..at + self.block_bytes]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_apart() {
        let part = PartGeometry {
            layers: 2,
            heads: 3,
            tokens: 4,
            cell_bytes: 8,
        };
        let mut owned = OwnedPages::new(part, 3).expect("fits");
        assert_eq!(owned.pages().pages(), 3);
        owned.fill(1, |at| at as u8);
        assert_eq!(owned.read(0), vec![0; part.bytes()]);
        assert_eq!(owned.read(1)[191], 191);
        assert!(OwnedPages::new(part, 0).is_err());
    }
}
