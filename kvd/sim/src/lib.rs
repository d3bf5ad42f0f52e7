//! A deterministic simulation of a node: the real [`kvd_node::Node`] on simulated memory and time, with engines that die, stall
//! and lie, and checkers that never sleep. The same seed gives the same run, event for event.
//!
//! # Fault model
//!
//! - **Processes** die at any moment, in the middle of a copy too; their writes stop with them. The node hears of it late, before
//!   or after it has seen the socket close and with or without having read what was left in it. They stall for seconds and go on
//!   where they were, writing. They lose their sockets, come back, and fence when the copies of their past are over; some never
//!   fence. They end in good order.
//! - **Liars** send stale generations, foreign slots with right generations, wrong numbers of checksums, wrong checksums, commits of
//!   what is not written, names of namespaces and sessions that are not theirs, records of other tenants, absurd lists, false reports
//!   of corruption; they reserve what nobody writes and never release what they lease.
//! - **Rogues** write anywhere in their tenant's arena. Bits flip.
//! - **The daemon** dies between two answers or in the middle of one (after any number of writes to its tables) and starts again.
//!   Engines bring the old arena while others, that do not know yet, still write to it.
//! - **Memory** is faulted in late, or can't be; refilled extents lose their bytes. Time jumps.
//! - **Disks** (see `disk`): the node has no store, one or two. They die with the daemon, with any part of what was under way done, and
//!   may lose their power with it. They fail, stall, fill up, lose writes and rot.
//! - Sockets keep order and lose nothing while both ends live. Generation words and session tables are written in order, and what
//!   was written before a word is seen by who sees the word. A dead process writes no more. Engines' instance ids are secret.
//!
//! # What is checked
//!
//! By the numbers of `docs/invariants.md`: 1 (a load that passes its own checks has the bytes that were committed), 2 and 6 (core's own
//! check, and the index rebuilt from words and change log alone), 3 (true writers by byte range, stores among them, and places), 4 (what was
//! stored is found by a restart, nothing else is), 5, 7, 8, 9 (only loads that need a store wait, and not beyond their deadline), 10, and
//! that everything comes to rest once the faults stop. The disk is driven by itself, too: `disk_run`. Deliberately absent: object
//! stores, fabrics; they come with their adapters.
#![forbid(unsafe_code)]

mod ask;
mod checks;
mod clock;
mod config;
mod content;
mod daemon;
mod disk;
mod disk_model;
mod disk_run;
mod engine;
mod kept;
mod lies;
mod link;
mod memory;
mod mixes;
mod model;
mod options;
mod plant;
mod quiet;
mod reader;
mod replies;
mod report;
mod rng;
mod run;
mod scheduler;
mod tier;
mod tier_checks;
mod tiers;
mod worker;
mod world;

pub use disk::{DiskFaults, SimDisk, SimHost};
pub use disk_run::{DiskOptions, DiskReport, FlipReport, flips, run_disk};
pub use mixes::DiskMix;
pub use options::{Fault, Faults, Options, StorePlant};
pub use plant::Plant;
pub use report::{Counters, Failure, Report};
pub use rng::fresh_seed;
pub use run::{catching, run, run_with, shrink};
