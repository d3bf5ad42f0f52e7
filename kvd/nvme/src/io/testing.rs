//! Where the tests of this module put their files: beside the test's binary, because `/tmp` may be a tmpfs without direct I/O.

use std::sync::Arc;

use kvd_arena::{Arena, HugePages};
use tempfile::TempDir;

use super::ArenaRange;

/// A directory that goes away.
pub(crate) fn scratch() -> TempDir {
    let binary = std::env::current_exe().expect("a test has a binary");
    tempfile::tempdir_in(binary.parent().expect("a folder")).expect("a directory")
}

/// An arena, faulted in.
pub(crate) fn arena(bytes: u64) -> Arc<Arena> {
    let arena = Arena::create(bytes, Some(1 << 20), HugePages::Off).expect("memory");
    for extent in 0..arena.extents() {
        arena.populate(extent).expect("memory");
    }
    Arc::new(arena)
}

/// Copies bytes into a range.
pub(super) fn fill(range: &ArenaRange, bytes: &[u8]) {
    assert!(bytes.len() <= range.pages_len());
    // SAFETY: inside the range, whose arena lives; only this test has it.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), range.address(), bytes.len()) };
}
