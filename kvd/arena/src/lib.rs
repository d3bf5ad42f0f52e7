//! The shared host memory: one sealed memfd of slots per tenant, and beside it a table of slot generations that only the
//! daemon can write.
//!
//! Everything that maps memory which another process may write is here, and so is the judgement of file descriptors that
//! come from somebody else. Nothing here can raise SIGBUS on ordinary pages: a file is mapped only when its seals forbid to
//! shrink it and its size is what it should be. (On 2 MiB pages a hole that a rogue client punched gives its page back to
//! the pool of the machine; touching it again while that pool is empty is the one case left. The daemon never touches
//! slot bytes there: [`Arena::populate`] and a kernel that is given a [`Arena::range`] get an error instead, [`Arena::read`] goes
//! by the file, and [`Arena::sum`] refuses.)
//!
//! Deliberately absent: which slot is whose and what state it is in (`kvd-core`), copies (`kvd-device`; what they and `kvd-nvme` check with is here), and how fds
//! travel (`kvd-serve`, `kvd-client`).

mod adopt;
mod arena;
pub mod checksum;
mod error;
#[cfg(target_arch = "x86_64")]
mod fold;
mod generations;
mod mapping;
mod memfd;
mod view;

pub use adopt::Adoption;
pub use arena::{Arena, HugePages, default_extent_bytes};
pub use error::{Error, ErrorKind};
pub use generations::{GenerationTable, WRITERS_MAX};
pub use mapping::PageReport;
pub use view::{ArenaView, Prepared, Registered, SlotBytes};

pub use kvd_core::ArenaShape;

/// Smallest slot, in bytes: the unit of generations.
pub const SLOT_MIN_BYTES: u64 = 4096;
/// Size of a huge page, in bytes.
pub const HUGE_PAGE_BYTES: u64 = 2 << 20;
