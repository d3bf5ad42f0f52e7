//! The adapter for KV caches in ordinary memory: one pass copies a run and takes its checksum.
//!
//! Deliberately absent: threads. One call uses one core; callers that want more give parts of the work to several.

use kvd_arena::checksum::{Engine, State};
use kvd_arena::{Registered, SlotBytes};

use crate::view::LayerView;
use crate::{Device, Error, LoadJob, Loaded, Pages, PartGeometry, Point, StoreJob, StreamHandle};

/// A batch that is at least this long goes past the caches on its way into the engine: it would not stay in them. Bytes.
const STREAM_LOADS_FROM: usize = 8 << 20;

/// Engine memory that the CPU copies.
#[derive(Debug, Default, Clone, Copy)]
pub struct HostDevice;

impl Device for HostDevice {
    fn name(&self) -> &'static str {
        "host"
    }

    fn register(&self, _address: usize, _bytes: usize) -> Result<Option<Registered>, Error> {
        Ok(None)
    }

    fn point(&self, _stream: StreamHandle) -> Result<Point, Error> {
        Ok(Point::passed())
    }

    fn store(&self, jobs: &[StoreJob<'_>], crcs: &mut Vec<u64>) -> Result<(), Error> {
        for job in jobs {
            job.check()?;
        }
        let mut states = Vec::new();
        for job in jobs {
            // Nobody reads a slot soon after it was written: always past the caches.
            let runs = Runs::new(job.from, job.pages, true);
            store_block(&runs, job.part, &mut states);
            crcs.extend(states.iter().map(|s| runs.engine.finish(*s)));
            runs.engine.fence();
        }
        Ok(())
    }

    fn load(&self, jobs: &[LoadJob<'_>], results: &mut Vec<Loaded>) -> Result<(), Error> {
        let mut bytes = 0;
        for job in jobs {
            job.check()?;
            bytes += job.plan.part().bytes();
        }
        let stream = bytes >= STREAM_LOADS_FROM;
        let mut scratch = Scratch::default();
        for job in jobs {
            let runs = Runs::new(job.to, job.pages, stream);
            results.push(load_block(&runs, job, &mut scratch));
            runs.engine.fence();
        }
        Ok(())
    }
}

/// One block in the engine, as runs.
struct Runs<'a> {
    at: &'a Pages,
    pages: &'a [u32],
    part: PartGeometry,
    /// Bytes of one page of one head of one layer.
    run: usize,
    engine: Engine,
    /// Whether one row (a cell) may be given to the engine by itself.
    rows: bool,
}

impl<'a> Runs<'a> {
    fn new(at: &'a Pages, pages: &'a [u32], stream: bool) -> Self {
        let part = *at.part();
        let cell = part.cell_bytes as usize;
        let run = at.page_tokens() as usize * cell;
        let by_row = Engine::new(cell, stream);
        let rows = by_row != Engine::Portable;
        Self {
            at,
            pages,
            part,
            run,
            engine: if rows {
                by_row
            } else {
                Engine::new(run, stream)
            },
            rows,
        }
    }

    /// Every page of one head of one layer: its address in the engine, and where its run begins in the head's bytes.
    fn of(&self, layer: &LayerView, head: u32) -> impl Iterator<Item = (usize, usize)> {
        self.pages
            .iter()
            .enumerate()
            .map(move |(i, page)| (layer.address(*page, head), i * self.run))
    }

    /// Copies rows that lie `from_stride` and `to_stride` bytes apart, and takes them into `state`.
    ///
    /// # Safety
    /// Both sides have all the rows of one run, and do not overlap.
    unsafe fn rows(
        &self,
        (from, from_stride): (*const u8, usize),
        (to, to_stride): (*mut u8, usize),
        state: Option<&mut State>,
    ) {
        let cell = self.part.cell_bytes as usize;
        let tokens = self.at.page_tokens() as usize;
        match state {
            Some(state) => {
                for token in 0..tokens {
                    let (from, to) = (
                        from.wrapping_add(token * from_stride),
                        to.wrapping_add(token * to_stride),
                    );
                    // SAFETY: the caller's promise.
                    unsafe { self.engine.copy(from, to, cell, state) };
                }
            }
            None => {
                for token in 0..tokens {
                    let (from, to) = (
                        from.wrapping_add(token * from_stride),
                        to.wrapping_add(token * to_stride),
                    );
                    // SAFETY: the caller's promise.
                    unsafe { std::ptr::copy_nonoverlapping(from, to, cell) };
                }
            }
        }
    }
}

/// Which way bytes go.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Store,
    Load,
}

impl Runs<'_> {
    /// Whether the heads of a token lie closer together than the tokens of a head: then the engine's memory is walked token
    /// by token, or it would be walked as often as there are heads.
    fn by_token(&self, layer: &LayerView) -> bool {
        self.rows && self.part.heads > 1 && layer.head_stride() < layer.token_stride()
    }

    /// Copies one layer of heads `first_head..` (of the engine's), one for each state, row by row in the order of tokens.
    ///
    /// # Safety
    /// The pages have these heads; `slot` has the bytes of as many heads.
    unsafe fn layer_by_token(
        &self,
        way: Way,
        layer: &LayerView,
        first_head: u32,
        slot: *mut u8,
        states: &mut [State],
    ) {
        let cell = self.part.cell_bytes as usize;
        let head_bytes = self.part.head_bytes();
        for (i, page) in self.pages.iter().enumerate() {
            let page = layer.address(*page, first_head) as *mut u8;
            for token in 0..self.at.page_tokens() as usize {
                let row = page.wrapping_add(token * layer.token_stride());
                let stored = slot.wrapping_add(i * self.run + token * cell);
                for (head, state) in states.iter_mut().enumerate() {
                    let row = row.wrapping_add(head * layer.head_stride());
                    let stored = stored.wrapping_add(head * head_bytes);
                    let (from, to) = match way {
                        Way::Store => (row, stored),
                        Way::Load => (stored, row),
                    };
                    // SAFETY: the caller's promise: rows of pages and heads that there are.
                    unsafe { self.engine.copy(from, to, cell, state) };
                }
            }
        }
    }
}

fn store_block(runs: &Runs<'_>, part: SlotBytes<'_>, states: &mut Vec<State>) {
    let head_bytes = runs.part.head_bytes();
    let cell = runs.part.cell_bytes as usize;
    states.clear();
    states.resize(runs.part.heads as usize, runs.engine.start());
    let mut slot = part.as_ptr();
    for layer in 0..runs.part.layers {
        let layer = runs.at.layer(layer);
        if runs.by_token(&layer) {
            // SAFETY: as below; the part of the slot has all heads of this layer from `slot` on.
            unsafe { runs.layer_by_token(Way::Store, &layer, 0, slot, states) };
            slot = slot.wrapping_add(states.len() * head_bytes);
            continue;
        }
        for (head, state) in (0..).zip(states.iter_mut()) {
            for (from, at) in runs.of(&layer, head) {
                let (from, to) = (from as *const u8, slot.wrapping_add(at));
                // SAFETY: `Pages` has checked that pages, layers and heads lie in memory that its maker vouched for;
                // `part` has the part's bytes, and `slot + at + run` walks them from first to last. An arena and the
                // memory of an engine never overlap.
                unsafe {
                    if layer.token_stride() == cell {
                        runs.engine.copy(from, to, runs.run, state);
                    } else if runs.rows {
                        runs.rows((from, layer.token_stride()), (to, cell), Some(state));
                    } else {
                        runs.rows((from, layer.token_stride()), (to, cell), None);
                        runs.engine.scan(to, runs.run, state);
                    }
                }
            }
            slot = slot.wrapping_add(head_bytes);
        }
    }
}

#[derive(Default)]
struct Scratch {
    states: Vec<State>,
    run: Vec<u8>,
}

fn load_block(runs: &Runs<'_>, job: &LoadJob<'_>, scratch: &mut Scratch) -> Loaded {
    let plan = job.plan;
    let head_bytes = runs.part.head_bytes();
    for piece in &plan.pieces {
        scratch.states.clear();
        scratch
            .states
            .resize(piece.wanted.len(), runs.engine.start());
        for layer in piece.layers.clone() {
            let row = (layer - piece.layers.start) as usize * piece.heads.len();
            let first = row + (piece.wanted.start - piece.heads.start) as usize;
            let mut slot = job
                .slot
                .as_ptr()
                .wrapping_add(piece.offset + first * head_bytes);
            let own = plan
                .own
                .layers
                .contains(&layer)
                .then(|| runs.at.layer(layer - plan.own.layers.start));
            if let Some(own) = own.filter(|own| runs.by_token(own)) {
                let first = piece.wanted.start - plan.own.heads.start;
                // SAFETY: as below.
                unsafe {
                    runs.layer_by_token(Way::Load, &own, first, slot, &mut scratch.states);
                }
                continue;
            }
            for (head, state) in piece.wanted.clone().zip(&mut scratch.states) {
                match &own {
                    Some(own) => {
                        let head = head - plan.own.heads.start;
                        // SAFETY: the plan's offsets stay inside a block, and the slot is at least as long as one;
                        // `layer` and `head` are of the reader's part, whose geometry is that of the pages.
                        unsafe { load_head(runs, own, head, slot, state, &mut scratch.run) };
                    }
                    // SAFETY: as above. These bytes are wanted by the checksum alone.
                    None => unsafe { runs.engine.scan(slot, head_bytes, state) },
                }
                slot = slot.wrapping_add(head_bytes);
            }
        }
        let expected = &job.crcs[piece.crc..piece.crc + piece.wanted.len()];
        let same = scratch
            .states
            .iter()
            .zip(expected)
            .all(|(state, crc)| runs.engine.finish(*state) == *crc);
        if !same {
            return Loaded::Corrupt;
        }
    }
    Loaded::Good
}

/// # Safety
/// `slot` has one head's bytes; layer and head are of the pages.
unsafe fn load_head(
    runs: &Runs<'_>,
    layer: &LayerView,
    head: u32,
    slot: *const u8,
    state: &mut State,
    scratch: &mut Vec<u8>,
) {
    let cell = runs.part.cell_bytes as usize;
    for (to, at) in runs.of(layer, head) {
        let (from, to) = (slot.wrapping_add(at), to as *mut u8);
        // SAFETY: the caller's promise; `Pages` has checked the engine's side. An arena and the memory of an engine never
        // overlap, nor does scratch.
        unsafe {
            if layer.token_stride() == cell {
                runs.engine.copy(from, to, runs.run, state);
            } else if runs.rows {
                runs.rows((from, cell), (to, layer.token_stride()), Some(state));
            } else {
                // What is checked must be what is delivered, and rows are too short to check one by one: check a private
                // copy and deliver that.
                scratch.resize(runs.run, 0);
                runs.engine
                    .copy(from, scratch.as_mut_ptr(), runs.run, state);
                runs.rows((scratch.as_ptr(), cell), (to, layer.token_stride()), None);
            }
        }
    }
}
