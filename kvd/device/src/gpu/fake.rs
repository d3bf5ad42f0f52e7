//! A fake accelerator: ordinary memory, and the kernel said once more in Rust. It shows that plans and arithmetic are right,
//! and nothing about drivers.

use kvd_arena::Registered;

use super::batch::{Batch, Item, NOWHERE, Shape, Way};
use super::{Backend, crc};
use crate::conformance::{self, HostMemory};
use crate::{Error, Point, StreamHandle};

/// A fake accelerator with a staging buffer of so many bytes.
#[derive(Debug)]
struct FakeGpu(usize);

impl FakeGpu {
    /// What a warp of the kernel does, without its lanes.
    fn item(way: Way, batch: &Batch, shape: Shape, item: &Item, staging: &mut [u64]) -> u64 {
        let head_words = shape.head_words() as usize;
        let (tokens, cell) = (shape.page_tokens as usize, shape.cell_words as usize);
        let words = item.layers as usize * head_words;
        let mut sum = 0;
        for i in 0..words {
            let (layer, at) = (i / head_words, i % head_words);
            let (word, token) = (at % cell, at / cell % tokens);
            let page = batch.pages[item.page as usize + at / cell / tokens];
            let staged = (item.staged + layer as u64 * item.staged_step) as usize / 8 + at;
            let engine = (item.layer != NOWHERE).then(|| {
                let layer = &batch.layers[item.layer as usize + layer];
                let address = layer.base
                    + u64::from(page) * layer.block_stride
                    + u64::from(item.head) * layer.head_stride
                    + token as u64 * layer.token_stride;
                (address as usize as *mut u64).wrapping_add(word)
            });
            let value = match (way, engine) {
                // SAFETY: the planner's addresses are inside the pages, which are ordinary memory here.
                (Way::Store, Some(engine)) => unsafe { engine.read() },
                (Way::Store, None) => panic!("a store of layers that the engine has not"),
                (Way::Load, _) => staging[staged],
            };
            match (way, engine) {
                (Way::Store, _) => staging[staged] = value,
                // SAFETY: as above.
                (Way::Load, Some(engine)) => unsafe { engine.write(value) },
                (Way::Load, None) => {}
            }
            let value = value
                ^ if item.begins == 1 && i == 0 {
                    u64::MAX
                } else {
                    0
                };
            sum = crc::multiply(sum ^ value, crc::X64);
        }
        crc::multiply(sum, item.after)
    }
}

impl Backend for FakeGpu {
    fn name(&self) -> &'static str {
        "fake"
    }

    fn room(&self) -> usize {
        self.0
    }

    fn run(&self, way: Way, batch: &Batch) -> Result<Vec<u64>, Error> {
        let mut sums = Vec::new();
        for chunk in &batch.chunks {
            let mut staging = vec![0x5a5a_5a5a_5a5a_5a5a_u64; self.0 / 8];
            let transfers = |way: Way, staging: &mut [u64]| {
                for t in &batch.transfers[chunk.transfers.clone()] {
                    for row in 0..t.rows {
                        let slot = (t.slot + row * t.pitch) as *mut u8;
                        let at = t.staged + row * t.width;
                        let staged = &mut bytes(staging)[at..at + t.width];
                        // SAFETY: the planner's rows are inside the slot, and nobody else has it.
                        unsafe {
                            match way {
                                Way::Store => slot.copy_from(staged.as_ptr(), t.width),
                                Way::Load => slot.copy_to(staged.as_mut_ptr(), t.width),
                            }
                        }
                    }
                }
            };
            if way == Way::Load {
                transfers(way, &mut staging);
            }
            for item in &batch.items[chunk.items.clone()] {
                sums.push(Self::item(way, batch, chunk.shape, item, &mut staging));
            }
            if way == Way::Store {
                transfers(way, &mut staging);
            }
        }
        Ok(sums)
    }

    fn register(&self, _address: usize, _bytes: usize) -> Result<Option<Registered>, Error> {
        Ok(None)
    }

    fn point(&self, _stream: StreamHandle) -> Result<Point, Error> {
        Ok(Point::passed())
    }
}

fn bytes(words: &mut [u64]) -> &mut [u8] {
    // SAFETY: any bytes are words and the other way round; the length is the same.
    unsafe { std::slice::from_raw_parts_mut(words.as_mut_ptr().cast(), words.len() * 8) }
}

#[test]
fn plans_and_sums_conform_on_a_fake_gpu() {
    // Many blocks at a time, a few layers at a time, one layer at a time.
    for room in [1 << 20, 48 << 10, 16 << 10] {
        conformance::run(&FakeGpu(room), &mut HostMemory::default());
    }
}

#[test]
fn what_does_not_fit_a_fake_gpu_is_refused() {
    conformance::too_large(&FakeGpu(4 << 10), &mut HostMemory::default(), 4 << 10);
}
