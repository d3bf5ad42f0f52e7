//! Blocks of two layers and two heads in ordinary memory.

use kvd_client::{BlockMover, BlockRef, MoverConfig};
use kvd_core::{Cut, GroupGeometry, GroupKind};
use kvd_device::{HostDevice, Pages, PartGeometry};

pub(crate) const BLOCK: usize = 2 * 2 * 16 * 128;

pub(crate) fn geometry() -> GroupGeometry {
    GroupGeometry {
        kind: GroupKind::Full,
        layers: 2,
        heads: 2,
        block_tokens: 16,
        cell_bytes: 128,
        window: None,
    }
}

pub(crate) fn mover(window_bytes: usize) -> BlockMover {
    let cut = Cut::whole(&geometry());
    let config = MoverConfig {
        window_bytes,
        ..MoverConfig::new(0, geometry(), cut, 0)
    };
    BlockMover::new(std::sync::Arc::new(HostDevice), config).expect("a mover")
}

/// Some blocks, each in a buffer of its own.
pub(crate) struct Buffers {
    bytes: Vec<Vec<u8>>,
    pages: Vec<Pages>,
}

impl Buffers {
    pub(crate) fn new(count: usize, fill: impl Fn(usize) -> u8) -> Self {
        let mut bytes: Vec<Vec<u8>> = (0..count).map(|i| vec![fill(i); BLOCK]).collect();
        let part = PartGeometry {
            layers: 2,
            heads: 2,
            tokens: 16,
            cell_bytes: 128,
        };
        let pages = bytes
            .iter_mut()
            // SAFETY: the buffers live in the same struct and are read only between copies.
            .map(|b| unsafe { Pages::contiguous(b.as_mut_ptr() as usize, BLOCK, part) })
            .collect::<Result<_, _>>()
            .expect("whole blocks");
        Self { bytes, pages }
    }

    pub(crate) fn refs(&self) -> Vec<BlockRef<'_>> {
        let pages = &[0u32];
        self.pages.iter().map(|at| BlockRef { at, pages }).collect()
    }

    pub(crate) fn holds(&self, i: usize, value: u8) -> bool {
        let at = self.bytes[i].as_ptr();
        // Copies went by address, so look again by address.
        // SAFETY: inside the buffer.
        (0..BLOCK).all(|k| unsafe { at.add(k).read_volatile() } == value)
    }
}

pub(crate) fn hashes(range: std::ops::Range<u32>) -> Vec<u8> {
    range
        .flat_map(|i| {
            let mut hash = [7u8; 32];
            hash[..4].copy_from_slice(&i.to_be_bytes());
            hash
        })
        .collect()
}
