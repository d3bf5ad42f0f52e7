//! How bytes get to a device and back. An adapter moves whole pages, takes buffers by ownership and gives them back with the
//! completion, and looks at the length of every completion. Deliberately absent: what the bytes mean; deadlines.
//!
//! [`Backing`] is the file or block device; [`UringIo`] and [`ThreadsIo`] move pages to and from it, [`DiskIo`] is whichever works
//! here, and [`Faulty`] puts faults in front of any. [`conformance`] holds what every adapter must show, the simulator's included.

mod arena;
mod bell;
mod choose;
pub mod conformance;
mod error;
mod faulty;
mod file;
mod fixed;
mod job;
mod parts;
mod raw;
mod ring;
#[cfg(test)]
mod speed;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
mod threads;
mod uring;

use std::time::Duration;

use kvd_arena::checksum::{Engine, State};
use rustix::io::Errno;

pub use arena::ArenaRange;
pub use choose::{Choice, Chosen, DiskIo, IoOptions};
pub use error::{OpenError, OpenErrorKind};
pub use faulty::{Fault, Faults, Faulty, Rules};
pub use file::{Backing, FILE_NAME, Found};
pub use fixed::FixedReport;
pub use raw::{RAW_BLOCKS, RawReport, RawRun, cpu_seconds, raw, raw_blocks, raw_memory, scattered};
pub use threads::{THREADS_MAX, ThreadsIo};
pub use uring::UringIo;

/// Most operations that any adapter has under way at once.
pub const DEPTH_MAX: usize = 4096;

/// Offsets and lengths are multiples of this, and so are the addresses of buffers.
pub const PAGE: usize = 4096;

/// Memory that belongs to somebody else, such as an arena, and stays there while an operation uses it.
pub trait HostBytes: Send + 'static {
    /// How many bytes. A multiple of [`PAGE`], or the last page is shared with nobody: whole pages are moved.
    fn len(&self) -> usize;

    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Calls `see` with copies or views of these bytes, in order, without holding them in between. Another process may write
    /// there at the same time; then what is seen is any mix.
    fn read(&self, from: usize, bytes: usize, see: &mut dyn FnMut(&[u8]));

    /// Whether [`HostBytes::sum`] reads where the bytes lie with this engine. Else they are better looked at in few large pieces, by
    /// [`HostBytes::read`], than in as many as a block has heads.
    fn can_sum(&self, _engine: Engine) -> bool {
        false
    }

    /// Takes these bytes, a multiple of the engine's unit, into a checksum.
    fn sum(&self, from: usize, bytes: usize, engine: Engine, state: &mut State) {
        self.read(from, bytes, &mut |seen| engine.take(seen, state));
    }
}

/// What an operation reads from or writes to. Moves in, and comes back with the completion.
pub enum Buffer<H> {
    /// Memory of the store's own.
    Own(Aligned),
    /// Memory of an arena.
    Host(H),
}

/// One operation. `token` comes back with the completion.
pub enum Op<H> {
    /// Fill the buffer from this offset on.
    Read {
        /// Comes back.
        token: u64,
        /// Bytes from the start of the device.
        offset: u64,
        /// Is filled, whole.
        buffer: Buffer<H>,
    },
    /// Write the buffer at this offset.
    Write {
        /// Comes back.
        token: u64,
        /// Bytes from the start of the device.
        offset: u64,
        /// Is written, whole.
        buffer: Buffer<H>,
    },
    /// Make durable whatever was completed before this was started.
    Flush {
        /// Comes back.
        token: u64,
    },
}

/// An operation that is over.
pub struct Done<H> {
    /// Of the operation.
    pub token: u64,
    /// Its buffer; none of a flush.
    pub buffer: Option<Buffer<H>>,
    /// An error also for a transfer that was shorter than asked.
    pub result: Result<(), IoError>,
}

/// What a device said.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IoError {
    /// An error of the system.
    #[error("{0}")]
    Os(Errno),
    /// Fewer bytes than asked.
    #[error("{got} bytes of {wanted}")]
    Short {
        /// How many came.
        got: usize,
        /// How many were asked.
        wanted: usize,
    },
}

/// Moves pages to and from one device or file. Owned and called by one thread.
pub trait BlockIo {
    /// Host memory that it can reach.
    type Host: HostBytes;

    /// Starts an operation. Never waits; the device may hear of it only in the next [`BlockIo::poll`]. The caller keeps to
    /// [`BlockIo::depth`]: what is beyond comes back with [`Errno::BUSY`], and what does not lie in the device, begins between
    /// pages or has no bytes, with [`Errno::INVAL`].
    fn start(&mut self, op: Op<Self::Host>);

    /// Appends what is over to `done`. With nothing over yet, waits for at most `wait`, or until [`BlockIo::waker`] is rung; not at
    /// all when `wait` is zero. Rung since the last wait ended, it does not wait. May return early with nothing.
    fn poll(&mut self, wait: Duration, done: &mut Vec<Done<Self::Host>>);

    /// Most operations under way at once.
    fn depth(&self) -> usize;

    /// Goes away, after waiting for what the device has as long as the adapter has patience. Gives the tokens of what the device may
    /// still be doing: memory of these must not be used for anything else. All others are over or were never begun; what became of
    /// them is lost.
    fn drain(self) -> Vec<u64>
    where
        Self: Sized;

    /// Ends a wait in [`BlockIo::poll`] from any thread. None where nothing ever waits.
    fn waker(&self) -> Option<Waker> {
        None
    }
}

/// Rings an adapter's doorbell. Cheap to clone and to call.
#[derive(Clone)]
pub struct Waker(pub std::sync::Arc<dyn Fn() + Send + Sync>);

/// Zeroed memory of whole pages, aligned to pages.
pub struct Aligned {
    pages: Box<[AlignedPage]>,
}

/// One page of memory.
#[repr(C, align(4096))]
#[derive(
    Clone,
    Copy,
    zerocopy::FromBytes,
    zerocopy::IntoBytes,
    zerocopy::Immutable,
    zerocopy::KnownLayout,
)]
struct AlignedPage([u8; PAGE]);

impl Aligned {
    /// So many pages.
    pub fn new(pages: usize) -> Self {
        Self {
            pages: <AlignedPage as zerocopy::FromZeros>::new_vec_zeroed(pages)
                .expect("memory for some pages")
                .into_boxed_slice(),
        }
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        zerocopy::IntoBytes::as_bytes(&self.pages[..])
    }

    /// The bytes, to be written.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        zerocopy::IntoBytes::as_mut_bytes(&mut self.pages[..])
    }
}
