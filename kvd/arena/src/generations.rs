//! The generation table: one u64 per slot, in a memfd that the daemon writes and everybody else can only read.
//!
//! A word is the version of a slot, as in a seqlock: even = no writer may be active, odd = some session may be writing. It
//! never goes down. The layout (all numbers in the machine's byte order, which is little-endian):
//!
//! | byte | what |
//! |---|---|
//! | 0 | magic `KVDGEN01` |
//! | 8 | version u32, reserved u32 |
//! | 16 | arena id, 16 bytes |
//! | 32 | extents u32, slots per extent u32 |
//! | 2048 | tokens of the sessions that may write into the arena, 256 u64, 0 = none |
//! | 4096 | words: extent * slots per extent + index in extent |
//!
//! The file is sparse: words of extents that were never used cost nothing. What a word should be is the core's affair.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering, fence};

use crate::mapping::Mapping;
use crate::{ArenaShape, Error, memfd};

/// Most sessions that may write into one arena at a time.
pub const WRITERS_MAX: usize = 256;

pub(crate) const HEADER_BYTES: u64 = 4096;
pub(crate) const WRITERS_OFFSET: u64 = 2048;
const MAGIC: u64 = u64::from_le_bytes(*b"KVDGEN01");
const VERSION: u32 = 1;

/// The first 40 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) id: [u8; 16],
    pub(crate) extents: u32,
    pub(crate) slots_per_extent: u32,
}

impl Header {
    pub(crate) const BYTES: usize = 40;

    pub(crate) fn of(shape: &ArenaShape) -> Self {
        Self {
            id: shape.id,
            extents: crate::arena::extents(shape),
            slots_per_extent: shape.slots_per_extent,
        }
    }

    fn encode(&self) -> [u8; Self::BYTES] {
        let mut out = [0; Self::BYTES];
        out[..8].copy_from_slice(&MAGIC.to_ne_bytes());
        out[8..12].copy_from_slice(&VERSION.to_ne_bytes());
        out[16..32].copy_from_slice(&self.id);
        out[32..36].copy_from_slice(&self.extents.to_ne_bytes());
        out[36..40].copy_from_slice(&self.slots_per_extent.to_ne_bytes());
        out
    }

    /// Refuses whatever is not the header of `shape`'s table.
    pub(crate) fn check(bytes: &[u8; Self::BYTES], shape: &ArenaShape) -> Result<(), Error> {
        let expected = Self::of(shape).encode();
        if bytes[..8] != expected[..8] {
            return Err(Error::invalid(
                "the generation table has no kvd header: pass the descriptor that the daemon gave",
            ));
        }
        if bytes[8..16] != expected[8..16] {
            return Err(Error::invalid(
                "the generation table has another version: start with fresh memory",
            ));
        }
        if bytes[16..] != expected[16..] {
            return Err(Error::invalid(
                "the generation table belongs to another arena: pass the two descriptors that came together",
            ));
        }
        Ok(())
    }
}

/// Length of the table of `shape`, in bytes.
pub(crate) fn table_bytes(shape: &ArenaShape) -> u64 {
    let words = u64::from(crate::arena::extents(shape)) * u64::from(shape.slots_per_extent);
    HEADER_BYTES + (words * 8).next_multiple_of(HEADER_BYTES)
}

/// The daemon's writable table. Everyone else has the same memory read-only.
#[derive(Debug)]
pub struct GenerationTable {
    fd: OwnedFd,
    map: Mapping,
    slots: u32,
}

impl GenerationTable {
    /// A table of zeros for `shape`, mapped here and then sealed against every other writer.
    pub(crate) fn create(shape: &ArenaShape) -> Result<Self, Error> {
        let fd = memfd::create("kvd-generations", false)
            .map_err(|e| Error::os("cannot make a memory file", e))?;
        let bytes = table_bytes(shape);
        memfd::set_len(&fd, bytes)?;
        rustix::io::pwrite(&fd, &Header::of(shape).encode(), 0)
            .map_err(|e| Error::os("cannot write the generation table", e))?;
        let len = usize::try_from(bytes).map_err(|_| Error::invalid("the arena is too large"))?;
        // The writable mapping comes first: the seal lets it live and refuses every later one.
        let map = Mapping::new(fd.as_fd(), len, true)
            .map_err(|e| Error::os("cannot map the generation table", e))?;
        memfd::seal(&fd, memfd::TABLE_SEALS)?;
        let slots = crate::arena::extents(shape) * shape.slots_per_extent;
        Ok(Self { fd, map, slots })
    }

    /// How many words there are.
    pub fn slots(&self) -> u32 {
        self.slots
    }

    /// What clients map read-only.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Publishes a slot's generation: what was written before is seen by who reads this word.
    ///
    /// # Panics
    /// When there is no such slot: numbers of slots are the daemon's own.
    pub fn set(&self, slot: u32, word: u64) {
        self.word(slot).store(word, Ordering::Release);
    }

    /// A slot's generation.
    ///
    /// # Panics
    /// As [`GenerationTable::set`].
    pub fn get(&self, slot: u32) -> u64 {
        self.word(slot).load(Ordering::Acquire)
    }

    /// Replaces the tokens of the sessions that may write into the arena. A successor of this daemon waits for them before
    /// it uses slots that were being written.
    ///
    /// Tokens that are new are written before tokens that are gone are cleared, so a daemon that dies in between leaves too
    /// many rather than too few.
    ///
    /// # Errors
    /// When there are more than [`WRITERS_MAX`]; then nothing is changed.
    pub fn set_writers(&self, tokens: &[u64]) -> Result<(), Error> {
        if tokens.len() > WRITERS_MAX {
            return Err(Error::invalid(format!(
                "{} sessions would write into one arena: {WRITERS_MAX} is the most",
                tokens.len()
            )));
        }
        let held: Vec<u64> = self.entries().map(|e| e.load(Ordering::Relaxed)).collect();
        let mut fresh = tokens.iter().filter(|t| !held.contains(t));
        let mut displaced = Vec::new();
        for (entry, old) in self.entries().zip(&held) {
            if tokens.contains(old) {
                continue;
            }
            match (*old, fresh.next()) {
                (0, Some(token)) => entry.store(*token, Ordering::Release),
                (0, None) => {}
                (_, next) => displaced.push((entry, next.copied().unwrap_or(0))),
            }
        }
        fence(Ordering::Release);
        for (entry, token) in displaced {
            entry.store(token, Ordering::Release);
        }
        Ok(())
    }

    /// The tokens of the sessions that may write into the arena.
    pub fn writers(&self) -> Vec<u64> {
        self.entries()
            .map(|e| e.load(Ordering::Acquire))
            .filter(|t| *t != 0)
            .collect()
    }

    fn entries(&self) -> impl Iterator<Item = &AtomicU64> {
        (0..WRITERS_MAX as u64).map(|i| atom(&self.map, WRITERS_OFFSET + i * 8))
    }

    fn word(&self, slot: u32) -> &AtomicU64 {
        assert!(slot < self.slots, "slot {slot} of {}", self.slots);
        atom(&self.map, HEADER_BYTES + u64::from(slot) * 8)
    }
}

/// The u64 at `offset` of a table.
///
/// # Panics
/// When it lies outside, or between two.
pub(crate) fn atom(map: &Mapping, offset: u64) -> &AtomicU64 {
    let address = map.range(offset, 8).expect("offset inside the table");
    assert!(offset.is_multiple_of(8), "an atom at {offset}");
    // SAFETY: eight bytes inside a live mapping, aligned because mappings are and offsets are multiples of 8; every party
    // accesses them atomically; the reference borrows from the mapping.
    unsafe { AtomicU64::from_ptr(address.cast()) }
}
