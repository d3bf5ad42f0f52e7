//! What lies in a place before it is opened, by its first pages: so that no file is made longer than its store, nor one that holds
//! something else. Deliberately absent: what is wrong with those pages (`recover`).

use super::format::{SuperRead, Superblock};
use super::layout::{HEADS, HEADS_BYTES, Layout};
use crate::io::PAGE;

/// So many bytes from the start say what lies there.
pub const START_BYTES: usize = HEADS_BYTES as usize + PAGE;

/// What there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// Nothing, or nothing yet.
    Blank,
    /// A store that was made with so many bytes.
    Store(u64),
    /// Something else, or a store whose superblocks can't be read.
    Other,
}

impl Start {
    /// By the first [`START_BYTES`] bytes, or all that there are.
    pub fn of(bytes: &[u8]) -> Start {
        let page = |at: u64| bytes.get(at as usize..)?.get(..PAGE);
        let sound = HEADS.iter().filter_map(|at| {
            let SuperRead::Sound(head) = Superblock::decode(page(*at)?) else {
                return None;
            };
            Some((head.generation.get(), Layout::read(&head)?.capacity))
        });
        if let Some((_, capacity)) = sound.max() {
            return Start::Store(capacity);
        }
        let heads = &bytes[..bytes.len().min(HEADS_BYTES as usize)];
        let blank = heads.iter().all(|byte| *byte == 0);
        match blank && !page(HEADS_BYTES).is_some_and(is_file_system) {
            true => Start::Blank,
            false => Start::Other,
        }
    }
}

/// Whether the page after those of a store's heads is of a file system that leaves blank what is before it.
pub(crate) fn is_file_system(page: &[u8]) -> bool {
    let has = |at: usize, mark: &[u8]| page[at..].starts_with(mark);
    // btrfs: magic of the superblock at 64 KiB. ReiserFS: likewise, of all of its versions.
    has(64, b"_BHRfS_M") || has(52, b"ReIsEr")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::StoreConfig;

    #[test]
    fn the_newest_sound_superblock_says_how_large_a_store_is() {
        let mut bytes = vec![0; START_BYTES];
        assert_eq!(Start::of(&bytes), Start::Blank);
        assert_eq!(Start::of(&bytes[..PAGE + 7]), Start::Blank);
        let layout = Layout::of(&StoreConfig::new(256 << 20, [1; 16])).expect("room");
        for (generation, at, capacity) in [(2, HEADS[1], 512 << 20), (1, HEADS[0], 256 << 20)] {
            let mut head = Superblock::new();
            Layout { capacity, ..layout }.write(&mut head);
            head.generation = generation.into();
            head.encode(&mut bytes[at as usize..][..PAGE]);
            assert_eq!(Start::of(&bytes), Start::Store(512 << 20));
        }
        // A file may end before the second.
        assert_eq!(Start::of(&bytes[..PAGE]), Start::Store(256 << 20));
        bytes[100] ^= 1;
        assert_eq!(Start::of(&bytes), Start::Store(512 << 20));
        assert_eq!(Start::of(&bytes[..PAGE]), Start::Other);
        bytes[HEADS[1] as usize + 100] ^= 1;
        assert_eq!(Start::of(&bytes), Start::Other);
    }
}
