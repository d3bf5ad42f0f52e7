//! Memory of arenas as a ring's fixed buffers: pinned once, so that not every transfer has to look its pages up.
//!
//! An arena is registered piece by piece, each when it is first used: an operation uses only what has been faulted in, and
//! registering more would fault it in here, in the ring's thread. A piece is an extent where extents are neither tiny nor above
//! 1 GiB, which is the most that one buffer may have. Pinning 1 GiB takes 0.1 s on pages of 4 KiB, 5 ms on huge ones.
//!
//! Deliberately absent: buffers of the store's own. They are few and change.

use std::sync::{Arc, Weak};

use io_uring::Submitter;
use kvd_arena::Arena;
use rustix::io::Errno;

use super::ArenaRange;
use super::ring::errno;

/// Most pieces of all arenas together.
const TABLE: u16 = 4096;
/// Most pieces that an arena is cut into while they are below [`PIECE_MAX`].
const PIECES: u64 = 256;
/// Most bytes of one registered buffer.
const PIECE_MAX: u64 = 1 << 30;

/// What is registered, for status.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FixedReport {
    /// Bytes of arenas that are pinned as fixed buffers.
    pub bytes: u64,
    /// Why there are not more; transfers of the rest are plain, and slower.
    pub refused: Option<String>,
}

struct Known {
    // Does not keep it mapped; while this is here, no other arena is at the same address.
    arena: Weak<Arena>,
    piece_bytes: u64,
    pieces: Vec<Option<u16>>,
}

/// The table of one ring.
pub(super) struct FixedTable {
    arenas: Vec<Known>,
    free: Vec<u16>,
    report: FixedReport,
}

impl FixedTable {
    /// An empty table in this ring, or one that stays empty.
    pub(super) fn new(submitter: &Submitter<'_>) -> Self {
        let made = submitter.register_buffers_sparse(u32::from(TABLE));
        let mut table = Self {
            arenas: Vec::new(),
            free: (0..TABLE).rev().collect(),
            report: FixedReport::default(),
        };
        if let Err(error) = made {
            table.report.refused = Some(format!(
                "this kernel gives no table of fixed buffers: {}",
                errno(&error)
            ));
        }
        table
    }

    /// What is registered.
    pub(super) fn report(&self) -> &FixedReport {
        &self.report
    }

    /// The buffer that holds the whole range, registered now if it is not yet. `None`: use a plain transfer.
    pub(super) fn index(&mut self, submitter: &Submitter<'_>, range: &ArenaRange) -> Option<u16> {
        let arena = range.arena();
        let at = match self.find(arena) {
            Some(at) => at,
            None if self.report.refused.is_some() => return None,
            None => {
                self.arenas.push(Known::new(arena));
                self.arenas.len() - 1
            }
        };
        let known = &self.arenas[at];
        let piece = usize::try_from(range.offset() / known.piece_bytes).ok()?;
        let last = range.offset() + range.pages_len() as u64 - 1;
        if last / known.piece_bytes != piece as u64 {
            return None;
        }
        if let Some(index) = known.pieces[piece] {
            return Some(index);
        }
        if self.report.refused.is_some() {
            return None;
        }
        let index = self.register(
            submitter,
            arena,
            piece as u64 * known.piece_bytes,
            known.piece_bytes,
        )?;
        self.arenas[at].pieces[piece] = Some(index);
        Some(index)
    }

    fn register(
        &mut self,
        submitter: &Submitter<'_>,
        arena: &Arena,
        start: u64,
        piece_bytes: u64,
    ) -> Option<u16> {
        let len = piece_bytes.min(arena.shape().bytes - start);
        let Some(index) = self.free.pop() else {
            self.report.refused = Some(format!("the table of {TABLE} fixed buffers is full"));
            return None;
        };
        let address = arena.range(start, len as usize).expect("inside the arena");
        match update(submitter, index, address, len as usize) {
            Ok(()) => {
                self.report.bytes += len;
                Some(index)
            }
            Err(error) => {
                self.free.push(index);
                let text = match error {
                    Errno::NOMEM => format!(
                        "{len} bytes of an arena can't be pinned ({error}): raise the memlock limit (LimitMEMLOCK=, ulimit -l) or give CAP_IPC_LOCK"
                    ),
                    error => format!("{len} bytes of an arena can't be pinned: {error}"),
                };
                tracing::warn!(reason = text, "transfers go on without fixed buffers");
                self.report.refused = Some(text);
                // The limit is the whole user's, and other rings need some of it for themselves.
                while !self.arenas.is_empty() {
                    self.remove(submitter, 0);
                }
                None
            }
        }
    }

    /// Unregisters an arena, of which pieces are registered again when they are used again: after a page was punched out, its
    /// mapping and what is pinned are not the same any more.
    pub(super) fn forget(&mut self, submitter: &Submitter<'_>, arena: &Arc<Arena>) {
        if let Some(at) = self.find(arena) {
            self.remove(submitter, at);
        }
    }

    /// Unregisters what has gone away: its memory is not free before.
    pub(super) fn sweep(&mut self, submitter: &Submitter<'_>) {
        let mut at = 0;
        while at < self.arenas.len() {
            if self.arenas[at].arena.strong_count() == 0 {
                self.remove(submitter, at);
            } else {
                at += 1;
            }
        }
    }

    fn remove(&mut self, submitter: &Submitter<'_>, at: usize) {
        let known = self.arenas.swap_remove(at);
        for index in known.pieces.into_iter().flatten() {
            match update(submitter, index, std::ptr::null_mut(), 0) {
                Ok(()) => self.free.push(index),
                // The place is not used again; closing the ring frees it.
                Err(error) => tracing::warn!(%error, "a fixed buffer stays registered"),
            }
            self.report.bytes = self.report.bytes.saturating_sub(known.piece_bytes);
        }
    }

    fn find(&self, arena: &Arc<Arena>) -> Option<usize> {
        let is = |known: &Known| std::ptr::eq(known.arena.as_ptr(), Arc::as_ptr(arena));
        self.arenas.iter().position(is)
    }
}

impl Known {
    fn new(arena: &Arc<Arena>) -> Self {
        let shape = arena.shape();
        let mut piece_bytes = shape.extent_bytes.min(PIECE_MAX);
        while piece_bytes < PIECE_MAX && shape.bytes.div_ceil(piece_bytes) > PIECES {
            piece_bytes *= 2;
        }
        let pieces = shape.bytes.div_ceil(piece_bytes) as usize;
        Self {
            arena: Arc::downgrade(arena),
            piece_bytes,
            pieces: vec![None; pieces],
        }
    }
}

fn update(
    submitter: &Submitter<'_>,
    index: u16,
    address: *mut u8,
    len: usize,
) -> Result<(), Errno> {
    let piece = libc::iovec {
        iov_base: address.cast(),
        iov_len: len,
    };
    // SAFETY: the kernel pins the pages themselves, so they stay theirs when the mapping goes; and an operation that uses the
    // buffer owns a range of the arena, which keeps it mapped. A null address of no length takes a buffer out.
    unsafe { submitter.register_buffers_update(u32::from(index), &[piece], None) }
        .map_err(|e| errno(&e))
}
