//! Where an engine keeps its KV cache: per layer an address and strides, checked once so that copies need no checks.
//!
//! Deliberately absent: dtypes, shapes, frameworks. A cell (one token of one head) is contiguous and opaque.

use std::sync::Arc;

use crate::Error;

/// Where one layer of one rank's KV cache lies. A page (one block of the engine) is `[head][token][cell]` in any order of
/// strides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerView {
    base: usize,
    len: usize,
    block_stride: usize,
    head_stride: usize,
    token_stride: usize,
}

impl LayerView {
    /// A layer in `base..base + len`. Strides are in bytes: from page to page, head to head, token to token.
    ///
    /// # Safety
    /// `base..base + len` is memory that the device can read and write for as long as any copy of this view is used, and
    /// nobody else in this process accesses a page while it is being copied.
    pub unsafe fn new(
        base: usize,
        len: usize,
        block_stride: usize,
        head_stride: usize,
        token_stride: usize,
    ) -> Self {
        Self {
            base,
            len,
            block_stride,
            head_stride,
            token_stride,
        }
    }

    /// Address of a page's head, in bytes.
    pub(crate) fn address(&self, page: u32, head: u32) -> usize {
        self.base + page as usize * self.block_stride + head as usize * self.head_stride
    }

    pub(crate) fn head_stride(&self) -> usize {
        self.head_stride
    }

    pub(crate) fn token_stride(&self) -> usize {
        self.token_stride
    }

    /// From page to page, head to head, token to token, in bytes.
    pub(crate) fn strides(&self) -> [usize; 3] {
        [self.block_stride, self.head_stride, self.token_stride]
    }

    /// How many pages lie wholly inside.
    fn pages(&self, part: &PartGeometry, page_tokens: u32) -> Option<u32> {
        let heads = (part.heads as usize - 1).checked_mul(self.head_stride)?;
        let tokens = (page_tokens as usize - 1).checked_mul(self.token_stride)?;
        let page = heads
            .checked_add(tokens)?
            .checked_add(part.cell_bytes as usize)?;
        self.base.checked_add(self.len)?;
        let rest = self.len.checked_sub(page)?;
        let more = rest.checked_div(self.block_stride).unwrap_or(0);
        Some(u32::try_from(more).unwrap_or(u32::MAX).saturating_add(1))
    }
}

/// What one rank holds of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PartGeometry {
    /// Layers of its part.
    pub layers: u32,
    /// KV heads of its part.
    pub heads: u32,
    /// Tokens of a block (kvd's, which may be several pages of the engine).
    pub tokens: u32,
    /// Bytes of one token of one head, K and V together.
    pub cell_bytes: u32,
}

impl PartGeometry {
    /// Bytes of one head of one layer.
    pub fn head_bytes(&self) -> usize {
        self.tokens as usize * self.cell_bytes as usize
    }

    /// Bytes of the part.
    pub fn bytes(&self) -> usize {
        self.layers as usize * self.heads as usize * self.head_bytes()
    }
}

#[derive(Debug, Clone)]
enum Layers {
    Each(Arc<[LayerView]>),
    /// The first, and bytes to the next.
    Even(LayerView, usize),
}

/// The KV cache of one rank and group: pages in every layer. No access by page, layer and head leaves the memory that the
/// views name. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Pages {
    layers: Layers,
    part: PartGeometry,
    page_tokens: u32,
    pages: u32,
}

impl Pages {
    /// Pages of `page_tokens` tokens in these layers. A block is `tokens / page_tokens` pages.
    ///
    /// # Errors
    /// `Invalid` when numbers are zero or do not fit each other or the memory.
    pub fn new(
        layers: Vec<LayerView>,
        part: PartGeometry,
        page_tokens: u32,
    ) -> Result<Self, Error> {
        check(&part, page_tokens)?;
        if layers.len() != part.layers as usize {
            return Err(Error::invalid(format!(
                "{} layers are given and {} expected: name every layer of the group once",
                layers.len(),
                part.layers
            )));
        }
        let mut pages = u32::MAX;
        for (index, layer) in layers.iter().enumerate() {
            if layer.token_stride < part.cell_bytes as usize
                || (part.heads > 1 && layer.head_stride < part.cell_bytes as usize)
            {
                return Err(Error::invalid(format!(
                    "layer {index} has strides of {} and {} bytes for cells of {}: they overlap",
                    layer.head_stride, layer.token_stride, part.cell_bytes
                )));
            }
            let held = layer.pages(&part, page_tokens).ok_or_else(|| {
                Error::invalid(format!(
                    "layer {index} has {} bytes, less than one page",
                    layer.len
                ))
            })?;
            pages = pages.min(held);
        }
        Ok(Self {
            layers: Layers::Each(layers.into()),
            part,
            page_tokens,
            pages,
        })
    }

    /// One block in one piece: `[layer][head][token][cell]` from `base` on. It has one page, number 0. Allocates nothing.
    ///
    /// # Errors
    /// `Invalid` when numbers are zero or `len` is not the part's length.
    ///
    /// # Safety
    /// As [`LayerView::new`].
    pub unsafe fn contiguous(base: usize, len: usize, part: PartGeometry) -> Result<Self, Error> {
        check(&part, part.tokens)?;
        if len != part.bytes() || base.checked_add(len).is_none() {
            return Err(Error::invalid(format!(
                "the buffer has {len} bytes and the block {}: pass one whole block",
                part.bytes()
            )));
        }
        let stride = part.heads as usize * part.head_bytes();
        let first = LayerView {
            base,
            len: stride,
            block_stride: 0,
            head_stride: part.head_bytes(),
            token_stride: part.cell_bytes as usize,
        };
        Ok(Self {
            layers: Layers::Even(first, stride),
            part,
            page_tokens: part.tokens,
            pages: 1,
        })
    }

    /// What a block of these pages is.
    pub fn part(&self) -> &PartGeometry {
        &self.part
    }

    /// Pages of one block.
    pub fn pages_per_block(&self) -> usize {
        (self.part.tokens / self.page_tokens) as usize
    }

    /// Tokens of one page.
    pub fn page_tokens(&self) -> u32 {
        self.page_tokens
    }

    /// How many pages there are: every layer has them.
    pub fn pages(&self) -> u32 {
        self.pages
    }

    /// # Panics
    /// When there is no such layer.
    pub(crate) fn layer(&self, index: u32) -> LayerView {
        match &self.layers {
            Layers::Each(layers) => layers[index as usize],
            Layers::Even(first, stride) => {
                assert!(index < self.part.layers);
                LayerView {
                    base: first.base + index as usize * stride,
                    ..*first
                }
            }
        }
    }

    /// Refuses what is not one block.
    pub(crate) fn check_block(&self, pages: &[u32]) -> Result<(), Error> {
        if pages.len() != self.pages_per_block() {
            return Err(Error::invalid(format!(
                "{} pages for a block of {}",
                pages.len(),
                self.pages_per_block()
            )));
        }
        match pages.iter().find(|p| **p >= self.pages) {
            Some(page) => Err(Error::invalid(format!("page {page} of {}", self.pages))),
            None => Ok(()),
        }
    }
}

fn check(part: &PartGeometry, page_tokens: u32) -> Result<(), Error> {
    let bytes = [part.heads, part.tokens, part.cell_bytes]
        .iter()
        .try_fold(part.layers as usize, |a, b| a.checked_mul(*b as usize));
    if bytes.is_none_or(|b| b == 0) {
        return Err(Error::invalid(format!("a part cannot be {part:?}")));
    }
    if page_tokens == 0 || !part.tokens.is_multiple_of(page_tokens) {
        return Err(Error::invalid(format!(
            "blocks of {} tokens are not made of pages of {page_tokens}",
            part.tokens
        )));
    }
    Ok(())
}
