//! An epoch is one session with one daemon, from its Hello to the loss of its connection. Copies belong to the epoch they
//! began in: when it ends, what they loaded is discarded and what they stored is not committed, and only when the last of
//! them, and of every epoch before, is over may the daemon be told so (Fence).
//!
//! Deliberately absent: sessions themselves, and time.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};

use kvd_arena::ArenaView;

use crate::Error;

/// One epoch's state, shared by its session and its copies.
pub(crate) struct Epoch {
    pub(crate) number: u64,
    /// The token that the daemon gave.
    pub(crate) session: u64,
    /// Names the start of the daemon.
    pub(crate) incarnation: [u8; 16],
    pub(crate) arena: OnceLock<Arc<ArenaView>>,
    ended: AtomicBool,
    copies: AtomicU32,
    /// Called when the last copy of an ended epoch is over.
    quiet: Box<dyn Fn() + Send + Sync>,
}

impl std::fmt::Debug for Epoch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Epoch")
            .field("number", &self.number)
            .field("ended", &self.ended())
            .field("copies", &self.copies())
            .finish_non_exhaustive()
    }
}

impl Epoch {
    pub(crate) fn new(
        number: u64,
        session: u64,
        incarnation: [u8; 16],
        quiet: impl Fn() + Send + Sync + 'static,
    ) -> Arc<Self> {
        Arc::new(Self {
            number,
            session,
            incarnation,
            arena: OnceLock::new(),
            ended: AtomicBool::new(false),
            copies: AtomicU32::new(0),
            quiet: Box::new(quiet),
        })
    }

    pub(crate) fn end(&self) {
        self.ended.store(true, Ordering::SeqCst);
    }

    pub(crate) fn ended(&self) -> bool {
        self.ended.load(Ordering::SeqCst)
    }

    /// Copies under way. Once the epoch has ended this only falls.
    pub(crate) fn copies(&self) -> u32 {
        self.copies.load(Ordering::SeqCst)
    }

    pub(crate) fn begin_copy(self: &Arc<Self>) -> Result<CopyGuard, Error> {
        let Some(arena) = self.arena.get() else {
            return Err(Error::unavailable(
                "there is no arena yet: register a namespace first",
            ));
        };
        // Count first, then look: whoever ends the epoch looks in the other order, so one of the two sees the other.
        self.copies.fetch_add(1, Ordering::SeqCst);
        let guard = CopyGuard {
            arena: Arc::clone(arena),
            epoch: Arc::clone(self),
        };
        if self.ended() {
            return Err(Error::unavailable("the daemon has gone away"));
        }
        Ok(guard)
    }
}

/// A copy under way. Keeps its arena mapped, and holds back the Fence of its epoch until it is dropped.
#[derive(Debug)]
pub struct CopyGuard {
    arena: Arc<ArenaView>,
    epoch: Arc<Epoch>,
}

impl CopyGuard {
    /// The arena that this copy goes to or comes from.
    pub fn arena(&self) -> &Arc<ArenaView> {
        &self.arena
    }

    /// Counts sessions from 1.
    pub fn epoch(&self) -> u64 {
        self.epoch.number
    }

    /// False once the connection under which the copy began is lost: discard what was loaded, do not commit what was
    /// stored.
    pub fn is_current(&self) -> bool {
        !self.epoch.ended()
    }
}

impl Drop for CopyGuard {
    fn drop(&mut self) {
        if self.epoch.copies.fetch_sub(1, Ordering::SeqCst) == 1 && self.epoch.ended() {
            (self.epoch.quiet)();
        }
    }
}
