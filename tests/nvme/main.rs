//! The NVMe tier from outside: the real binary, real files, real sessions. What the daemon said is stored comes back with the right
//! bytes or not at all, whatever happens to the process, the file or the device. Long runs: `KVD_TEST_SOAK=1`.
//!
//! Deliberately absent: power cuts and reordered writes, which need a simulated disk (`kvd-sim`).

#[path = "../common/mod.rs"]
mod common;

mod crash;
mod faults;
mod flips;
mod fsck;
mod kit;
mod rot;
mod serve;
mod start;
