//! Blocks as work for an accelerator: chunks that fit a staging buffer, transfers between it and slots, and items for the
//! kernel that works between it and the engine's pages.
//!
//! A chunk holds layers of blocks as they lie in slots, without the heads that the reader does not want. Deliberately absent:
//! who moves the bytes; that is the backend's.

use std::ops::Range;

use super::crc;
use crate::{Error, LoadJob, Pages, StoreJob};

/// An item of the kernel has at most about this many bytes, much more than the end of an item costs; and fewer where a call has
/// less than [`ITEMS`] of them, so that few blocks keep many warps busy.
const ITEM_BYTES: usize = 16 << 10;
const ITEMS: usize = 1024;
/// A call has about this many chunks or more, so that one's transfer runs beside another's kernel and the first one begins soon;
/// their sizes are within these bounds.
const CHUNKS: usize = 4;
const CHUNK_BYTES: [usize; 2] = [1 << 20, 4 << 20];
/// An item whose layers the engine has not: only their checksum is wanted.
pub(crate) const NOWHERE: u32 = u32::MAX;
/// Parts of a staging buffer begin at multiples of this.
const ALIGN: usize = 256;

/// One head of some consecutive layers of one block. `kernel.cu` has the same.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Item {
    /// Where the head's first layer begins in the staging buffer.
    pub(crate) staged: u64,
    /// Bytes from layer to layer there.
    pub(crate) staged_step: u64,
    /// What moves this item's sum to its place: x^(64 * words of the head after it).
    pub(crate) after: u64,
    /// How many layers.
    pub(crate) layers: u32,
    /// The first one in the list of layers, or [`NOWHERE`].
    pub(crate) layer: u32,
    /// The head in the engine.
    pub(crate) head: u32,
    /// The block's first page in the list of pages.
    pub(crate) page: u32,
    /// The checksum that it is a part of.
    pub(crate) crc: u32,
    /// 1 if the head begins with it, else 0.
    pub(crate) begins: u32,
}

/// A layer of the engine's KV cache: address and strides in bytes. `kernel.cu` has the same.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Layer {
    pub(crate) base: u64,
    pub(crate) block_stride: u64,
    pub(crate) head_stride: u64,
    pub(crate) token_stride: u64,
}

/// Rows of a slot and the same rows, one after the other, in the staging buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Transfer {
    /// Address of the first row in the slot.
    pub(crate) slot: usize,
    /// Bytes from row to row in the slot.
    pub(crate) pitch: usize,
    /// Where the rows begin in the staging buffer.
    pub(crate) staged: usize,
    /// Bytes of a row.
    pub(crate) width: usize,
    /// How many.
    pub(crate) rows: usize,
}

/// What fits the staging buffer at a time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Chunk {
    /// Of [`Batch::transfers`].
    pub(crate) transfers: Range<usize>,
    /// Of [`Batch::items`].
    pub(crate) items: Range<usize>,
    /// What the pages of all its blocks are.
    pub(crate) shape: Shape,
}

/// Sizes of the pages that a chunk deals with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Shape {
    /// Tokens of a page.
    pub(crate) page_tokens: u32,
    /// Pages of a block.
    pub(crate) pages_per_block: u32,
    /// Words of 8 bytes of one token of one head.
    pub(crate) cell_words: u32,
}

impl Shape {
    /// Words of one head of one layer.
    pub(crate) fn head_words(self) -> u64 {
        let tokens = u64::from(self.page_tokens) * u64::from(self.pages_per_block);
        tokens * u64::from(self.cell_words)
    }
}

/// Which way bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    /// From the engine to slots.
    Store,
    /// From slots to the engine.
    Load,
}

/// All that one call asks for.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    pub(crate) chunks: Vec<Chunk>,
    pub(crate) transfers: Vec<Transfer>,
    pub(crate) items: Vec<Item>,
    pub(crate) layers: Vec<Layer>,
    pub(crate) pages: Vec<u32>,
    /// How many checksums come of it.
    pub(crate) crcs: usize,
}

/// Heads and layers of a stored part that one rank deals with.
struct Piece {
    /// Address of the part in the slot.
    slot: usize,
    /// All layers of the part.
    layers: Range<u32>,
    /// Heads of the part, as many as a row of the slot has.
    row_heads: usize,
    /// The first wanted head, counted in the part, and how many.
    skipped: usize,
    wanted: usize,
    /// Layers that the engine has, in the numbers of `layers`.
    own: Range<u32>,
    /// The first wanted head in the engine.
    head: u32,
}

/// Makes a [`Batch`].
pub(crate) struct Planner {
    batch: Batch,
    room: usize,
    /// Bytes of a chunk, if a layer of a block has no more.
    chunk_bytes: usize,
    item_bytes: usize,
    used: usize,
    /// Pages of the job before, where their layers begin in the list, and their shape.
    known: Option<(*const Pages, u32, Shape)>,
    /// `powers[1]`^n for n = 0, 1, ..., which is x^(64 * words of a head of one layer).
    powers: Vec<u64>,
}

impl Planner {
    /// For staging buffers of so many bytes, and about `bytes` bytes in all.
    pub(crate) fn new(room: usize, bytes: usize) -> Self {
        Self {
            batch: Batch::default(),
            room,
            chunk_bytes: (bytes / CHUNKS)
                .clamp(CHUNK_BYTES[0], CHUNK_BYTES[1])
                .min(room),
            item_bytes: (bytes / ITEMS).min(ITEM_BYTES),
            used: 0,
            known: None,
            powers: Vec::new(),
        }
    }

    /// Adds a block to store. It has been checked.
    ///
    /// # Errors
    /// `Invalid` when the pages are nothing for this device.
    pub(crate) fn store(&mut self, job: &StoreJob<'_>) -> Result<(), Error> {
        let part = *job.from.part();
        let (layer, page) = self.pages(job.from, job.pages)?;
        let piece = Piece {
            slot: job.part.as_ptr() as usize,
            layers: 0..part.layers,
            row_heads: part.heads as usize,
            skipped: 0,
            wanted: part.heads as usize,
            own: 0..part.layers,
            head: 0,
        };
        self.piece(&piece, layer, page)
    }

    /// Adds a block to load. It has been checked. Its checksums are those of the plan's pieces, one after the other.
    ///
    /// # Errors
    /// As [`Planner::store`].
    pub(crate) fn load(&mut self, job: &LoadJob<'_>) -> Result<(), Error> {
        let (layer, page) = self.pages(job.to, job.pages)?;
        let own = &job.plan.own;
        for piece in &job.plan.pieces {
            let piece = Piece {
                slot: job.slot.as_ptr() as usize + piece.offset,
                layers: piece.layers.clone(),
                row_heads: piece.heads.len(),
                skipped: (piece.wanted.start - piece.heads.start) as usize,
                wanted: piece.wanted.len(),
                own: own.layers.clone(),
                head: piece.wanted.start - own.heads.start,
            };
            self.piece(&piece, layer, page)?;
        }
        Ok(())
    }

    /// The work, as planned.
    pub(crate) fn finish(mut self) -> Batch {
        self.close();
        self.batch
    }

    /// Where the layers of these pages and the pages of this block begin in their lists.
    fn pages(&mut self, at: &Pages, block: &[u32]) -> Result<(u32, u32), Error> {
        let page = index(self.batch.pages.len())?;
        self.batch.pages.extend(block);
        if let Some((known, layer, _)) = self.known
            && std::ptr::eq(known, at)
        {
            return Ok((layer, page));
        }
        let part = at.part();
        let layer = index(self.batch.layers.len())?;
        for number in 0..part.layers {
            let view = at.layer(number);
            let (base, strides) = (view.address(0, 0), view.strides());
            let odd = [base, part.cell_bytes as usize]
                .iter()
                .chain(&strides)
                .any(|n| !n.is_multiple_of(8));
            if odd {
                return Err(Error::invalid(format!(
                    "layer {number} begins at {base:#x} with strides of {strides:?} bytes and cells of {}: \
                     an accelerator copies multiples of 8 bytes",
                    part.cell_bytes
                )));
            }
            let [block_stride, head_stride, token_stride] = strides.map(|s| s as u64);
            self.batch.layers.push(Layer {
                base: base as u64,
                block_stride,
                head_stride,
                token_stride,
            });
        }
        self.close();
        let shape = Shape {
            page_tokens: at.page_tokens(),
            pages_per_block: at.pages_per_block() as u32,
            cell_words: part.cell_bytes / 8,
        };
        if self
            .known
            .is_none_or(|(_, _, s)| s.head_words() != shape.head_words())
        {
            self.powers = vec![crc::ONE, crc::shift(shape.head_words())];
        }
        self.known = Some((at, layer, shape));
        Ok((layer, page))
    }

    /// Ends the chunk.
    fn close(&mut self) {
        let Some((_, _, shape)) = self.known else {
            return;
        };
        let (transfers, items) = match self.batch.chunks.last() {
            Some(chunk) => (chunk.transfers.end, chunk.items.end),
            None => (0, 0),
        };
        if items < self.batch.items.len() {
            self.batch.chunks.push(Chunk {
                transfers: transfers..self.batch.transfers.len(),
                items: items..self.batch.items.len(),
                shape,
            });
        }
        self.used = 0;
    }

    fn power(&mut self, layers: usize) -> u64 {
        while self.powers.len() <= layers {
            let last = self.powers[self.powers.len() - 1];
            self.powers.push(crc::multiply(last, self.powers[1]));
        }
        self.powers[layers]
    }

    fn piece(&mut self, piece: &Piece, layer: u32, page: u32) -> Result<(), Error> {
        let Some((_, _, shape)) = self.known else {
            return Ok(());
        };
        let head_bytes = shape.head_words() as usize * 8;
        let width = piece.wanted * head_bytes;
        if width > self.room {
            return Err(Error::invalid(format!(
                "one layer of a block has {width} bytes and the staging buffer {}: use smaller blocks",
                self.room
            )));
        }
        let pitch = piece.row_heads * head_bytes;
        let per_item = (self.item_bytes / head_bytes).max(1) as u32;
        let room = self.chunk_bytes.max(width);
        let crc = index(self.batch.crcs)?;
        self.batch.crcs += piece.wanted;
        let mut from = piece.layers.start;
        while from < piece.layers.end {
            if room.saturating_sub(self.used) < width {
                self.close();
            }
            let fits = (room - self.used) / width;
            let to = piece
                .layers
                .end
                .min(from + u32::try_from(fits).unwrap_or(u32::MAX));
            let done = (from - piece.layers.start) as usize;
            self.batch.transfers.push(Transfer {
                slot: piece.slot + done * pitch + piece.skipped * head_bytes,
                pitch,
                staged: self.used,
                width,
                rows: (to - from) as usize,
            });
            let mut at = from;
            while at < to {
                let inside = piece.own.contains(&at);
                let same = if inside {
                    piece.own.end
                } else if at < piece.own.start {
                    piece.own.start
                } else {
                    to
                };
                let end = to.min(same).min(at + per_item);
                let after = self.power((piece.layers.end - end) as usize);
                for head in 0..piece.wanted {
                    self.batch.items.push(Item {
                        staged: (self.used + (at - from) as usize * width + head * head_bytes)
                            as u64,
                        staged_step: width as u64,
                        after,
                        layers: end - at,
                        layer: if inside {
                            layer + (at - piece.own.start)
                        } else {
                            NOWHERE
                        },
                        head: piece.head + head as u32,
                        page,
                        crc: crc + head as u32,
                        begins: u32::from(at == piece.layers.start),
                    });
                }
                at = end;
            }
            self.used = (self.used + (to - from) as usize * width).next_multiple_of(ALIGN);
            from = to;
        }
        Ok(())
    }
}

fn index(n: usize) -> Result<u32, Error> {
    u32::try_from(n).map_err(|_| Error::invalid("too many blocks in one call"))
}
