//! What every [`Device`] must show, in one suite: call [`run`] from an adapter's tests.
//!
//! Blocks are stored by every rank of one parallel degree and loaded by every rank of another, between engine memory of
//! several orders. What is compared is computed here, from the definition of the stored block, byte by byte.

use kvd_arena::SlotBytes;
use kvd_core::{Cut, GroupGeometry, GroupKind, Rect};

use crate::{Device, Error, LayerView, LoadJob, LoadPlan, Loaded, Pages, PartGeometry, StoreJob};

/// Memory that a device calls the engine's. Tests reach it only through this.
pub trait Memory {
    /// `bytes` bytes of zeros; the address is what a [`LayerView`] gets. Lives as long as `self`.
    fn allocate(&mut self, bytes: usize) -> usize;
    /// Writes bytes.
    fn write(&mut self, address: usize, bytes: &[u8]);
    /// Reads bytes.
    fn read(&self, address: usize, bytes: &mut [u8]);
}

/// Ordinary memory.
#[derive(Debug, Default)]
pub struct HostMemory(Vec<Vec<u64>>);

impl Memory for HostMemory {
    fn allocate(&mut self, bytes: usize) -> usize {
        let mut chunk = vec![0u64; bytes.div_ceil(8)];
        let address = chunk.as_mut_ptr() as usize;
        self.0.push(chunk);
        address
    }

    fn write(&mut self, address: usize, bytes: &[u8]) {
        // SAFETY: tests write only inside what `allocate` gave, which lives as long as `self`.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), address as *mut u8, bytes.len());
        }
    }

    fn read(&self, address: usize, bytes: &mut [u8]) {
        // SAFETY: tests read only inside what `allocate` gave, which lives as long as `self`.
        unsafe {
            std::ptr::copy_nonoverlapping(address as *const u8, bytes.as_mut_ptr(), bytes.len());
        }
    }
}

/// Order of a page in engine memory.
#[derive(Debug, Clone, Copy)]
enum Order {
    /// `[head][token][cell]`.
    Hnd,
    /// `[token][head][cell]`.
    Nhd,
    /// `[head][token][cell]` with gaps after cells, heads and pages.
    Padded,
    /// All layers of a page together: `[page][layer][head][token][cell]`.
    PageOuter,
}

/// One rank: its part of the group and its pages.
struct Rank {
    rect: Rect,
    pages: Pages,
    bases: Vec<usize>,
    /// Page, head and token strides.
    strides: [usize; 3],
    page_tokens: u32,
}

const PAGES: u32 = 7;
/// Pages of the tested block, on purpose neither in order nor neighbours.
const BLOCK: [u32; 4] = [5, 2, 3, 1];

impl Rank {
    fn new(
        memory: &mut dyn Memory,
        geometry: &GroupGeometry,
        rect: Rect,
        order: Order,
        page_tokens: u32,
    ) -> Self {
        let cell = geometry.cell_bytes as usize;
        let (heads, tokens) = (rect.heads.len(), page_tokens as usize);
        let layers = rect.layers.len();
        let page = heads * tokens * cell;
        let strides = match order {
            Order::Hnd => [page, tokens * cell, cell],
            Order::Nhd => [page, cell, heads * cell],
            Order::Padded => {
                let token = cell + 16;
                let head = tokens * token + 64;
                [heads * head + 128, head, token]
            }
            Order::PageOuter => [layers * page, tokens * cell, cell],
        };
        let len = strides[0] * PAGES as usize;
        let bases: Vec<usize> = match order {
            Order::PageOuter => {
                let base = memory.allocate(len);
                (0..layers).map(|l| base + l * page).collect()
            }
            _ => (0..layers).map(|_| memory.allocate(len)).collect(),
        };
        let views = bases
            .iter()
            .map(|base| {
                let len = match order {
                    Order::PageOuter => len - (base - bases[0]),
                    _ => len,
                };
                // SAFETY: `allocate` gave this memory, which outlives the test.
                unsafe { LayerView::new(*base, len, strides[0], strides[1], strides[2]) }
            })
            .collect();
        let part = PartGeometry {
            layers: layers as u32,
            heads: heads as u32,
            tokens: geometry.block_tokens,
            cell_bytes: geometry.cell_bytes,
        };
        let pages = Pages::new(views, part, page_tokens).expect("a legal layout");
        assert_eq!(pages.pages(), PAGES, "{order:?}");
        Self {
            rect,
            pages,
            bases,
            strides,
            page_tokens,
        }
    }

    /// Address of one cell of the block.
    fn cell(&self, layer: u32, head: u32, token: u32) -> usize {
        let page = BLOCK[(token / self.page_tokens) as usize];
        self.bases[(layer - self.rect.layers.start) as usize]
            + page as usize * self.strides[0]
            + (head - self.rect.heads.start) as usize * self.strides[1]
            + (token % self.page_tokens) as usize * self.strides[2]
    }

    fn each(&self, geometry: &GroupGeometry, mut f: impl FnMut(usize, u32, u32, u32)) {
        for layer in self.rect.layers.clone() {
            for head in self.rect.heads.clone() {
                for token in 0..geometry.block_tokens {
                    f(self.cell(layer, head, token), layer, head, token);
                }
            }
        }
    }

    fn block(&self) -> &[u32] {
        &BLOCK[..self.pages.pages_per_block()]
    }
}

/// The bytes of a cell.
fn pattern(geometry: &GroupGeometry, layer: u32, head: u32, token: u32) -> Vec<u8> {
    let mut x = u64::from(layer) << 40 | u64::from(head) << 20 | u64::from(token) | 1 << 60;
    (0..geometry.cell_bytes)
        .map(|_| {
            x = x.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29) ^ 0xabcd;
            (x >> 32) as u8
        })
        .collect()
}

fn reference_crc(bytes: impl Iterator<Item = u8>) -> u64 {
    let mut crc = u64::MAX;
    for byte in bytes {
        crc ^= u64::from(byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ (0x9a6c_9329_ac4b_c9b5 * (crc & 1));
        }
    }
    !crc
}

/// A slot as the definition says it must be, and its checksums.
fn reference(geometry: &GroupGeometry, cut: &Cut) -> (Vec<u8>, Vec<u64>) {
    let (mut slot, mut crcs) = (Vec::new(), Vec::new());
    for part in 0..cut.parts() {
        let rect = cut.part(part);
        for layer in rect.layers.clone() {
            for head in rect.heads.clone() {
                for token in 0..geometry.block_tokens {
                    slot.extend(pattern(geometry, layer, head, token));
                }
            }
        }
        for head in rect.heads.clone() {
            let layers = rect.layers.clone();
            let bytes = layers.flat_map(|layer| {
                (0..geometry.block_tokens).flat_map(move |t| pattern(geometry, layer, head, t))
            });
            crcs.push(reference_crc(bytes));
        }
    }
    (slot, crcs)
}

fn slot_of(bytes: &mut [u8]) -> SlotBytes<'_> {
    // SAFETY: the slice is exclusively borrowed for as long as the result lives.
    unsafe { SlotBytes::from_raw(bytes.as_mut_ptr(), bytes.len()) }
}

fn store(
    device: &dyn Device,
    memory: &mut dyn Memory,
    geometry: &GroupGeometry,
    cut: &Cut,
    order: Order,
    page_tokens: u32,
) {
    let (expected, expected_crcs) = reference(geometry, cut);
    let mut slot = vec![0u8; geometry.slot_bytes() as usize];
    let mut crcs = Vec::new();
    for part in 0..cut.parts() {
        let rank = Rank::new(memory, geometry, cut.part(part), order, page_tokens);
        rank.each(geometry, |address, l, h, t| {
            memory.write(address, &pattern(geometry, l, h, t));
        });
        let offset = cut.part_offset(part, geometry) as usize;
        let job = StoreJob {
            from: &rank.pages,
            pages: rank.block(),
            part: slot_of(&mut slot)
                .sub(offset, rank.pages.part().bytes())
                .expect("inside"),
        };
        device.store(&[job], &mut crcs).expect("stored");
    }
    assert!(
        slot[..expected.len()] == expected[..],
        "stored bytes, {cut:?} {order:?}"
    );
    assert!(
        slot[expected.len()..].iter().all(|b| *b == 0),
        "wrote beyond the block"
    );
    assert_eq!(crcs, expected_crcs, "checksums, {cut:?} {order:?}");
}

fn load(
    device: &dyn Device,
    memory: &mut dyn Memory,
    geometry: &GroupGeometry,
    (stored, own): (&Cut, &Cut),
    order: Order,
    page_tokens: u32,
) {
    let (bytes, crcs) = reference(geometry, stored);
    let mut slot = bytes.clone();
    for part in 0..own.parts() {
        let rank = Rank::new(memory, geometry, own.part(part), order, page_tokens);
        let plan = LoadPlan::new(geometry, stored, &own.part(part)).expect("a plan");
        let again = |slot: &mut [u8], crcs: &[u64]| {
            let job = LoadJob {
                slot: slot_of(slot),
                plan: &plan,
                crcs,
                to: &rank.pages,
                pages: rank.block(),
            };
            let mut results = Vec::new();
            device.load(&[job], &mut results).expect("loaded");
            results[0]
        };
        assert_eq!(
            again(&mut slot, &crcs),
            Loaded::Good,
            "{stored:?} as part {part} of {own:?} {order:?}"
        );
        let mut got = vec![0; geometry.cell_bytes as usize];
        rank.each(geometry, |address, l, h, t| {
            memory.read(address, &mut got);
            assert!(
                got == pattern(geometry, l, h, t),
                "layer {l} head {h} token {t}: {stored:?} as part {part} of {own:?} {order:?}"
            );
        });
        // A flipped bit matters exactly where a checksum of a wanted head covers it.
        let rect = own.part(part);
        for stored_part in 0..stored.parts() {
            let whole = stored.part(stored_part);
            let touched = whole.intersect(&rect).is_some();
            for (layer, head) in corners(&whole) {
                let at = stored.head_offset(stored_part, layer, head, geometry) as usize;
                let last = at + geometry.head_bytes() as usize - 1;
                let matters = touched && rect.heads.contains(&head);
                let expected = if matters {
                    Loaded::Corrupt
                } else {
                    Loaded::Good
                };
                for byte in [at, last] {
                    slot[byte] ^= 0x10;
                    assert_eq!(
                        again(&mut slot, &crcs),
                        expected,
                        "byte {byte}, layer {layer} head {head}: {stored:?} as part {part} of {own:?} {order:?}"
                    );
                    slot[byte] ^= 0x10;
                }
            }
        }
    }
}

/// First and last layer and head of a rectangle.
fn corners(rect: &Rect) -> Vec<(u32, u32)> {
    let mut out = Vec::new();
    for layer in [rect.layers.start, rect.layers.end - 1] {
        for head in [rect.heads.start, rect.heads.end - 1] {
            out.push((layer, head));
        }
    }
    out.dedup();
    out
}

/// Every cut x every cut x every order x several cell sizes, with every class of corrupt byte.
///
/// # Panics
/// When the device is wrong, saying where.
pub fn run(device: &dyn Device, memory: &mut dyn Memory) {
    for cell_bytes in [8, 24, 64, 256] {
        let geometry = GroupGeometry {
            kind: GroupKind::Full,
            layers: 6,
            heads: 4,
            block_tokens: 16,
            cell_bytes,
            window: None,
        };
        let mut cuts: Vec<Cut> = [(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (2, 4)]
            .iter()
            .map(|(pp, tp)| Cut::grid(&geometry, *pp, *tp).expect("a cut"))
            .collect();
        cuts.push(Cut::new(&[0, 1, 6], &[0, 3, 4], &geometry).expect("an uneven cut"));
        let orders = [Order::Hnd, Order::Nhd, Order::Padded, Order::PageOuter];
        for (i, stored) in cuts.iter().enumerate() {
            for order in orders {
                for page_tokens in [16, 4] {
                    store(device, memory, &geometry, stored, order, page_tokens);
                }
            }
            for (j, own) in cuts.iter().enumerate() {
                // Every pair of cuts, the orders and page sizes taking turns.
                let order = orders[(i + j) % orders.len()];
                let page_tokens = if (i + j / 4) % 2 == 0 { 16 } else { 4 };
                load(device, memory, &geometry, (stored, own), order, page_tokens);
            }
        }
    }
    batches(device, memory);
    refusals(device, memory);
}

/// A device with staging buffers refuses a layer of a block that is larger than `room` bytes, and takes one that is not.
///
/// # Panics
/// When the device is wrong.
pub fn too_large(device: &dyn Device, memory: &mut dyn Memory, room: usize) {
    for (extra, fits) in [(0, true), (16, false)] {
        let geometry = GroupGeometry {
            kind: GroupKind::Full,
            layers: 2,
            heads: 1,
            block_tokens: 16,
            cell_bytes: (room / 16 + extra) as u32,
            window: None,
        };
        let cut = Cut::whole(&geometry);
        let rank = Rank::new(memory, &geometry, cut.part(0), Order::Hnd, 16);
        let mut slot = vec![0u8; geometry.block_bytes() as usize];
        let job = StoreJob {
            from: &rank.pages,
            pages: &[1],
            part: slot_of(&mut slot),
        };
        let stored = device.store(&[job], &mut Vec::new());
        match fits {
            true => assert_eq!(stored, Ok(())),
            false => assert!(matches!(stored, Err(Error::Invalid(_))), "{stored:?}"),
        }
    }
}

/// Many blocks in one call: results in order, and one corrupt block spoils no other.
fn batches(device: &dyn Device, memory: &mut dyn Memory) {
    let geometry = GroupGeometry {
        kind: GroupKind::Full,
        layers: 2,
        heads: 2,
        block_tokens: 16,
        cell_bytes: 256,
        window: None,
    };
    let cut = Cut::whole(&geometry);
    let rank = Rank::new(memory, &geometry, cut.part(0), Order::Hnd, 16);
    let bytes = geometry.block_bytes() as usize;
    let mut slots = vec![vec![0u8; bytes]; PAGES as usize];
    let pages: Vec<u32> = (0..PAGES).collect();
    for (layer, base) in rank.bases.iter().enumerate() {
        for page in &pages {
            let value = (layer * 16) as u8 + *page as u8 + 1;
            memory.write(
                base + *page as usize * rank.strides[0],
                &vec![value; bytes / 2],
            );
        }
    }
    let jobs: Vec<StoreJob<'_>> = slots
        .iter_mut()
        .zip(&pages)
        .map(|(slot, page)| StoreJob {
            from: &rank.pages,
            pages: std::slice::from_ref(page),
            part: slot_of(slot),
        })
        .collect();
    let mut crcs = vec![7];
    device.store(&jobs, &mut crcs).expect("stored");
    assert_eq!(crcs.len(), 1 + 2 * PAGES as usize, "appended");
    let crcs = &crcs[1..];
    for (slot, page) in slots.iter().zip(&pages) {
        assert!(slot[..bytes / 2].iter().all(|b| *b == *page as u8 + 1));
        assert!(slot[bytes / 2..].iter().all(|b| *b == *page as u8 + 17));
    }
    slots[3][5] ^= 1;
    let plan = LoadPlan::new(&geometry, &cut, &cut.part(0)).expect("a plan");
    let back: Vec<u32> = pages.iter().rev().copied().collect();
    let jobs: Vec<LoadJob<'_>> = slots
        .iter_mut()
        .zip(&back)
        .zip(crcs.chunks(2))
        .map(|((slot, page), crcs)| LoadJob {
            slot: slot_of(slot),
            plan: &plan,
            crcs,
            to: &rank.pages,
            pages: std::slice::from_ref(page),
        })
        .collect();
    let mut results = vec![Loaded::Good];
    device.load(&jobs, &mut results).expect("loaded");
    let bad: Vec<bool> = results[1..].iter().map(|r| *r == Loaded::Corrupt).collect();
    assert_eq!(bad, [false, false, false, true, false, false, false]);
    let mut got = [0];
    memory.read(rank.bases[1] + 6 * rank.strides[0], &mut got);
    assert_eq!(got[0], 17, "page 6 holds what page 0 held");
}

/// What does not fit its memory is refused before a byte is copied.
fn refusals(device: &dyn Device, memory: &mut dyn Memory) {
    let geometry = GroupGeometry {
        kind: GroupKind::Full,
        layers: 2,
        heads: 2,
        block_tokens: 16,
        cell_bytes: 16,
        window: None,
    };
    let cut = Cut::whole(&geometry);
    let rank = Rank::new(memory, &geometry, cut.part(0), Order::Hnd, 16);
    let bytes = geometry.block_bytes() as usize;
    let mut slot = vec![0u8; bytes];
    let plan = LoadPlan::new(&geometry, &cut, &cut.part(0)).expect("a plan");
    let half = Rect {
        layers: 0..1,
        heads: 0..2,
    };
    let other = LoadPlan::new(&geometry, &cut, &half).expect("a plan");
    let crcs = [1, 2];
    for (pages, len) in [
        (&[PAGES][..], bytes),
        (&[u32::MAX], bytes),
        (&[], bytes),
        (&[1, 2], bytes),
        (&[1], bytes - 1),
    ] {
        let part = slot_of(&mut slot).sub(0, len).expect("inside");
        let job = StoreJob {
            from: &rank.pages,
            pages,
            part,
        };
        let refused = device.store(&[job], &mut Vec::new());
        assert!(matches!(refused, Err(Error::Invalid(_))), "{pages:?} {len}");
        let job = LoadJob {
            slot: part,
            plan: &plan,
            crcs: &crcs,
            to: &rank.pages,
            pages,
        };
        let refused = device.load(&[job], &mut Vec::new());
        assert!(matches!(refused, Err(Error::Invalid(_))), "{pages:?} {len}");
    }
    for (plan, crcs) in [(&plan, &[1u64][..]), (&other, &crcs)] {
        let job = LoadJob {
            slot: slot_of(&mut slot),
            plan,
            crcs,
            to: &rank.pages,
            pages: &[1],
        };
        let refused = device.load(&[job], &mut Vec::new());
        assert!(
            matches!(refused, Err(Error::Invalid(_))),
            "{} checksums",
            crcs.len()
        );
    }
}
