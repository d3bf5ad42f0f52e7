//! Bytes of a shared arena as what an operation reads from or writes to: the memory of the real daemon.
//!
//! A range keeps its arena mapped, so an address that a kernel has been given stays good until the range comes back. Engines
//! may write there meanwhile, so there is never a reference. Deliberately absent: whose slot it is (`kvd-core`).

use std::sync::Arc;

use kvd_arena::Arena;
use kvd_arena::checksum::{Engine, State};

use super::{HostBytes, PAGE};

/// How much is copied at a time for [`HostBytes::read`], on the stack.
const CHUNK: usize = 16 << 10;

/// Some bytes of an arena, from the start of a page on.
#[derive(Debug, Clone)]
pub struct ArenaRange {
    arena: Arc<Arena>,
    offset: u64,
    len: usize,
}

impl ArenaRange {
    /// `len` bytes from `offset` on; `None` when they, up to the end of their last page, are not all inside, or don't begin with
    /// a page, or are none. What is transferred is whole pages.
    pub fn new(arena: Arc<Arena>, offset: u64, len: usize) -> Option<Self> {
        let whole = len.checked_next_multiple_of(PAGE)?;
        let fits =
            len > 0 && offset.is_multiple_of(PAGE as u64) && arena.range(offset, whole).is_some();
        fits.then_some(Self { arena, offset, len })
    }

    /// Whose bytes.
    pub fn arena(&self) -> &Arc<Arena> {
        &self.arena
    }

    /// Where they begin in the arena.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Length of the transfer: whole pages.
    pub(super) fn pages_len(&self) -> usize {
        self.len.next_multiple_of(PAGE)
    }

    /// Where they begin, valid for [`ArenaRange::pages_len`] bytes while `self` lives.
    pub(super) fn address(&self) -> *mut u8 {
        self.arena
            .range(self.offset, self.pages_len())
            .expect("checked when it was made")
    }
}

impl HostBytes for ArenaRange {
    fn len(&self) -> usize {
        self.len
    }

    fn read(&self, from: usize, bytes: usize, see: &mut dyn FnMut(&[u8])) {
        let end = from.checked_add(bytes).expect("a length");
        assert!(end <= self.len, "{bytes} bytes at {from} of {}", self.len);
        let mut chunk = [0; CHUNK];
        for at in (from..end).step_by(CHUNK) {
            let copy = &mut chunk[..CHUNK.min(end - at)];
            if let Err(error) = self.arena.read(self.offset + at as u64, copy) {
                // Not what was stored, so its checksum will say so.
                tracing::error!(%error, "bytes of an arena can't be read; zeros are seen instead");
                copy.fill(0);
            }
            see(copy);
        }
    }

    fn can_sum(&self, engine: Engine) -> bool {
        self.arena.can_sum(engine)
    }

    fn sum(&self, from: usize, bytes: usize, engine: Engine, state: &mut State) {
        let end = from.checked_add(bytes).expect("a length");
        assert!(end <= self.len, "{bytes} bytes at {from} of {}", self.len);
        let at = self.offset + from as u64;
        if let Err(error) = self.arena.sum(at, bytes, engine, state) {
            // What was not taken is missing in the checksum.
            tracing::error!(%error, "bytes of an arena can't be read and count as damaged");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvd_arena::HugePages;

    #[test]
    fn ranges_are_whole_pages_of_their_arena_and_read_what_is_there() {
        let arena = Arena::create(4 << 20, Some(2 << 20), HugePages::Off).expect("memory");
        let arena = Arc::new(arena);
        let range = |offset, len| ArenaRange::new(Arc::clone(&arena), offset, len);
        assert!(range(1, 4096).is_none(), "not at a page");
        assert!(range(0, 0).is_none(), "nothing");
        assert!(range(4 << 20, 1).is_none(), "behind the end");
        assert!(range(0, usize::MAX).is_none(), "more than there can be");
        let last = range((4 << 20) - 4096, 4095).expect("inside");
        assert_eq!((last.len(), last.pages_len()), (4095, 4096));
        let all = range(4096, 50_000).expect("inside");
        for at in 0..50_000 {
            // SAFETY: inside the range, whose arena lives; nobody else has it.
            unsafe { all.address().add(at).write((at % 251) as u8) };
        }
        let mut seen = Vec::new();
        all.read(3, 40_000, &mut |bytes| seen.extend_from_slice(bytes));
        let wanted: Vec<u8> = (3..40_003).map(|at| (at % 251) as u8).collect();
        assert!(seen == wanted);
        let engine = Engine::new(16, false);
        assert_eq!(all.can_sum(engine), engine != Engine::Portable);
        if all.can_sum(engine) {
            let (mut there, mut copied) = (engine.start(), engine.start());
            all.sum(3, 40_000, engine, &mut there);
            engine.take(&wanted, &mut copied);
            assert_eq!(engine.finish(there), engine.finish(copied));
        }
    }
}
