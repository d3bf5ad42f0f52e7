//! Which adapter a device gets: io_uring if it works here, else the threads, and why. One type for the store to own.
//!
//! Deliberately absent: where the choice comes from (the configuration).

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use kvd_arena::Arena;

use super::{
    ArenaRange, Backing, BlockIo, Done, Faulty, FixedReport, Op, OpenError, OpenErrorKind,
    ThreadsIo, UringIo, Waker,
};

/// Which adapter is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Choice {
    /// io_uring, or threads where it does not work.
    #[default]
    Auto,
    /// io_uring, or an error.
    Uring,
    /// Threads.
    Threads,
}

/// How a device is to be used.
#[derive(Debug, Clone, Copy)]
pub struct IoOptions {
    /// Which adapter.
    pub choice: Choice,
    /// Most operations under way at once.
    pub depth: usize,
    /// How many threads, if it is to be threads.
    pub threads: usize,
}

impl Default for IoOptions {
    fn default() -> Self {
        Self {
            choice: Choice::Auto,
            depth: 64,
            threads: 8,
        }
    }
}

/// What it came to, for status and metrics.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chosen {
    /// `io_uring` or `threads`.
    pub name: &'static str,
    /// Why not what is faster.
    pub reason: Option<String>,
    /// Whether arenas can be pinned as fixed buffers; [`DiskIo::fixed`] says how it goes.
    pub fixed_buffers: bool,
}

/// An adapter of a real device.
pub enum DiskIo {
    /// By io_uring.
    Uring(Box<UringIo>),
    /// By threads.
    Threads(ThreadsIo),
    /// Either, behind faults.
    Faulty(Box<Faulty<DiskIo>>),
}

impl DiskIo {
    /// The adapter that is wanted and works.
    ///
    /// # Errors
    /// `Unsupported` when only io_uring is wanted and does not work, `Unavailable` when there are no threads to be had.
    pub fn open(backing: Arc<Backing>, options: &IoOptions) -> Result<(Self, Chosen), OpenError> {
        let IoOptions {
            choice,
            depth,
            threads,
        } = *options;
        let reason = if choice == Choice::Threads {
            "the configuration asks for threads".to_owned()
        } else {
            match UringIo::open(Arc::clone(&backing), depth) {
                Ok(io) => {
                    let refused = io.fixed().refused.clone();
                    let chosen = Chosen {
                        name: "io_uring",
                        fixed_buffers: refused.is_none(),
                        reason: refused,
                    };
                    return Ok((Self::Uring(Box::new(io)), chosen));
                }
                Err(reason) if choice == Choice::Uring => {
                    return Err(OpenError::new(OpenErrorKind::Unsupported, reason));
                }
                Err(reason) => reason,
            }
        };
        let io = ThreadsIo::open(backing, depth, threads).map_err(|e| {
            OpenError::new(
                OpenErrorKind::Unavailable,
                format!("no threads for the device: {e}"),
            )
        })?;
        let chosen = Chosen {
            name: "threads",
            reason: Some(reason),
            fixed_buffers: false,
        };
        Ok((Self::Threads(io), chosen))
    }

    /// The same behind faults that a file tells: see [`Faulty::with_file`].
    #[must_use]
    pub fn with_faults(self, file: &Path) -> Self {
        Self::Faulty(Box::new(Faulty::with_file(self, file)))
    }

    /// How much of the arenas is pinned, and why not more.
    pub fn fixed(&self) -> FixedReport {
        match self {
            Self::Uring(io) => io.fixed().clone(),
            Self::Threads(_) => FixedReport::default(),
            Self::Faulty(io) => io.inner().fixed(),
        }
    }

    /// See [`UringIo::forget`].
    pub fn forget(&mut self, arena: &Arc<Arena>) {
        match self {
            Self::Uring(io) => io.forget(arena),
            Self::Threads(_) => {}
            Self::Faulty(io) => io.inner_mut().forget(arena),
        }
    }
}

impl BlockIo for DiskIo {
    type Host = ArenaRange;

    fn start(&mut self, op: Op<ArenaRange>) {
        match self {
            Self::Uring(io) => io.start(op),
            Self::Threads(io) => io.start(op),
            Self::Faulty(io) => io.start(op),
        }
    }

    fn poll(&mut self, wait: Duration, done: &mut Vec<Done<ArenaRange>>) {
        match self {
            Self::Uring(io) => io.poll(wait, done),
            Self::Threads(io) => io.poll(wait, done),
            Self::Faulty(io) => io.poll(wait, done),
        }
    }

    fn depth(&self) -> usize {
        match self {
            Self::Uring(io) => io.depth(),
            Self::Threads(io) => io.depth(),
            Self::Faulty(io) => io.depth(),
        }
    }

    fn drain(self) -> Vec<u64> {
        match self {
            Self::Uring(io) => io.drain(),
            Self::Threads(io) => io.drain(),
            Self::Faulty(io) => io.drain(),
        }
    }

    fn waker(&self) -> Option<Waker> {
        match self {
            Self::Uring(io) => io.waker(),
            Self::Threads(io) => io.waker(),
            Self::Faulty(io) => io.waker(),
        }
    }
}
