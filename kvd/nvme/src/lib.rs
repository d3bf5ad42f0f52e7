//! The NVMe tier: one bounded, preallocated store on one device or in one directory.
//!
//! Three layers, each by itself testable:
//! - [`io`]: how bytes get to a device and back (io_uring, or a thread pool where io_uring is denied). One conformance suite.
//! - [`store`]: what lies where (superblock, namespaces, journal, checkpoints, segments), what is durable when, what is found after a
//!   crash. Sans-IO above [`io::BlockIo`], so that the simulator runs it on a simulated disk.
//! - [`device`]: the named thread that owns the two, its queue and its completions.
//!
//! Deliberately absent: which block goes where, and which goes when (`kvd-core`).

pub mod device;
pub mod io;
pub mod store;
