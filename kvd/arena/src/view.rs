//! The client's side of an arena: slots readable and writable, generations readable.
//!
//! Gives addresses, never references: other processes write these bytes. Deliberately absent: who may write which slot;
//! that is what the daemon's replies say.

use std::marker::PhantomData;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{Ordering, fence};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use rustix::fs::SealFlags;

use crate::arena::{check_shape, extents};
use crate::generations::{HEADER_BYTES, Header, atom, table_bytes};
use crate::mapping::Mapping;
use crate::{ArenaShape, Error, SLOT_MIN_BYTES, memfd};

/// What a driver gave for memory that it was told of; dropping it takes that back.
pub type Registered = Box<dyn Send + Sync>;

/// An extent whose pages are in this process' page tables, and what a driver gave for it.
#[derive(Default)]
struct Extent(Option<Option<Registered>>);

/// The mapped memory and which file it is.
struct Memory {
    /// Dropped first: a driver must not know of memory that is not mapped. Read-locked while copies go there.
    extents: Vec<RwLock<Extent>>,
    map: Mapping,
    device: u64,
    inode: u64,
}

/// Extents that copies go to or come from: as long as this lives, drivers know of them.
pub struct Prepared<'a> {
    _extents: Vec<RwLockReadGuard<'a, Extent>>,
}

impl std::fmt::Debug for Prepared<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Prepared")
            .field(&self._extents.len())
            .finish()
    }
}

impl std::fmt::Debug for Memory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Memory")
            .field("map", &self.map)
            .field("inode", &self.inode)
            .finish_non_exhaustive()
    }
}

/// A client's mapping of an arena and its generation table. Dropping it unmaps both.
#[derive(Debug)]
pub struct ArenaView {
    shape: ArenaShape,
    fd: OwnedFd,
    generation_fd: OwnedFd,
    memory: Arc<Memory>,
    table: Mapping,
}

impl ArenaView {
    /// Maps what the daemon has passed, after checking that both files are sealed and as long as `shape` says.
    ///
    /// # Errors
    /// `Invalid`, with what does not fit; `NoSpace` when there is no address space; else what the kernel said.
    pub fn map(arena: OwnedFd, generations: OwnedFd, shape: &ArenaShape) -> Result<Self, Error> {
        Self::build(arena, generations, shape, None)
    }

    /// As [`ArenaView::map`], but when `arena` is the file that this view has mapped, its mapping is shared: the addresses
    /// stay what they are, and so does what a driver knows of them. For a daemon that has adopted this client's offer.
    ///
    /// # Errors
    /// As [`ArenaView::map`].
    pub fn renew(
        &self,
        arena: OwnedFd,
        generations: OwnedFd,
        shape: &ArenaShape,
    ) -> Result<Self, Error> {
        Self::build(arena, generations, shape, Some(&self.memory))
    }

    fn build(
        fd: OwnedFd,
        generation_fd: OwnedFd,
        shape: &ArenaShape,
        known: Option<&Arc<Memory>>,
    ) -> Result<Self, Error> {
        check_shape(shape)?;
        let refused = SealFlags::WRITE | SealFlags::FUTURE_WRITE;
        let memory = memfd::check("arena", fd.as_fd(), memfd::ARENA_SEALS, refused)?;
        let table = memfd::check(
            "generation table",
            generation_fd.as_fd(),
            memfd::TABLE_SEALS,
            SealFlags::empty(),
        )?;
        if memory.bytes != shape.bytes || table.bytes != table_bytes(shape) {
            return Err(Error::invalid(format!(
                "the arena has {} bytes and its table {}, not {} and {}: daemon and client disagree",
                memory.bytes,
                table.bytes,
                shape.bytes,
                table_bytes(shape)
            )));
        }
        let table = Mapping::new(generation_fd.as_fd(), table.bytes as usize, false)
            .map_err(|e| Error::os("cannot map the generation table", e))?;
        let mut header = [0u8; Header::BYTES];
        for (at, chunk) in (0u64..).step_by(8).zip(header.as_chunks_mut::<8>().0) {
            *chunk = atom(&table, at).load(Ordering::Relaxed).to_ne_bytes();
        }
        Header::check(&header, shape)?;
        let same = known.filter(|k| {
            (k.device, k.inode) == (memory.device, memory.inode)
                && k.map.len() as u64 == memory.bytes
        });
        let memory = match same {
            Some(known) => Arc::clone(known),
            None => {
                let map = Mapping::new(fd.as_fd(), memory.bytes as usize, true)
                    .map_err(|e| Error::os("cannot map the arena", e))?;
                map.advise_huge();
                Arc::new(Memory {
                    map,
                    device: memory.device,
                    inode: memory.inode,
                    extents: (0..extents(shape)).map(|_| RwLock::default()).collect(),
                })
            }
        };
        Ok(Self {
            shape: *shape,
            fd,
            generation_fd,
            memory,
            table,
        })
    }

    /// The shape that the daemon gave.
    pub fn shape(&self) -> &ArenaShape {
        &self.shape
    }

    /// The arena's file, to offer to another daemon.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// The table's file, to offer to another daemon.
    pub fn generation_fd(&self) -> BorrowedFd<'_> {
        self.generation_fd.as_fd()
    }

    /// A slot's generation now; `None` when there is no such slot.
    pub fn generation(&self, slot: u32) -> Option<u64> {
        if slot >= extents(&self.shape) * self.shape.slots_per_extent {
            return None;
        }
        Some(atom(&self.table, HEADER_BYTES + u64::from(slot) * 8).load(Ordering::Acquire))
    }

    /// A slot's generation, read after everything that was read from the slot before: if it is still the one that the daemon
    /// gave, nobody had begun to write the slot when the copy ended.
    pub fn generation_after_copy(&self, slot: u32) -> Option<u64> {
        fence(Ordering::Acquire);
        self.generation(slot)
    }

    /// The first `bytes` bytes of a slot, which the daemon says begins at `offset`.
    ///
    /// # Errors
    /// `Invalid` when the offset does not belong to the slot's extent or the bytes reach beyond it.
    pub fn slot(&self, slot: u32, offset: u64, bytes: usize) -> Result<SlotBytes<'_>, Error> {
        let shape = &self.shape;
        let extent = u64::from(slot / shape.slots_per_extent);
        let index = u64::from(slot % shape.slots_per_extent);
        let start = extent * shape.extent_bytes;
        let within = offset.wrapping_sub(start);
        // Slots of an extent have one size, so a slot's size follows from where it begins; the first one's does not.
        let slot_bytes = within.checked_div(index).unwrap_or(shape.extent_bytes);
        let fits = offset >= start
            && slot_bytes >= (bytes as u64).max(SLOT_MIN_BYTES)
            && slot_bytes.is_multiple_of(SLOT_MIN_BYTES)
            && slot_bytes.wrapping_mul(index) == within
            && within + bytes as u64 <= shape.extent_bytes;
        let address = fits.then(|| self.memory.map.range(offset, bytes)).flatten();
        match address {
            Some(address) => Ok(SlotBytes {
                address,
                len: bytes,
                view: PhantomData,
            }),
            None => Err(Error::invalid(format!(
                "slot {slot} does not have {bytes} bytes at {offset}: daemon and client disagree"
            ))),
        }
    }

    /// Address and length of the mapped arena, in bytes.
    pub fn region(&self) -> (usize, usize) {
        (self.memory.map.address() as usize, self.memory.map.len())
    }

    /// Before copies from or to slots that the daemon has handed out, whose extents it has faulted in: puts the pages of each
    /// extent into this process' page tables, once, so that copies do not fault page by page, and lets `register` tell a driver
    /// of them (address and bytes). What that gives is dropped before the arena is unmapped.
    pub fn prepare(
        &self,
        slots: impl Iterator<Item = u32>,
        register: &dyn Fn(usize, usize) -> Option<Registered>,
    ) -> Prepared<'_> {
        // Each once: whoever waits to forget one would stand between two locks of one thread.
        let mut numbers: Vec<u32> = slots.map(|s| s / self.shape.slots_per_extent).collect();
        numbers.sort_unstable();
        numbers.dedup();
        let extents = numbers.into_iter().filter_map(|number| {
            let lock = self.memory.extents.get(number as usize)?;
            let extent = lock.read().unwrap_or_else(PoisonError::into_inner);
            if extent.0.is_some() {
                return Some(extent);
            }
            drop(extent);
            let mut extent = lock.write().unwrap_or_else(PoisonError::into_inner);
            if extent.0.is_none() {
                let offset = u64::from(number) * self.shape.extent_bytes;
                let bytes = self.shape.extent_bytes as usize;
                // Copies fault by themselves where this fails.
                let _ = self.memory.map.populate(offset, bytes);
                let address = self.memory.map.range(offset, bytes)?;
                extent.0 = Some(register(address as usize, bytes));
            }
            Some(RwLockWriteGuard::downgrade(extent))
        });
        Prepared {
            _extents: extents.collect(),
        }
    }

    /// Takes back what a driver was told of this slot's extent, once no copy uses it; the next [`ArenaView::prepare`] tells it anew.
    /// For bytes that are not what was stored: if somebody has punched a hole there, a driver goes on with pages that nobody else
    /// has.
    pub fn forget(&self, slot: u32) {
        let number = slot / self.shape.slots_per_extent;
        if let Some(lock) = self.memory.extents.get(number as usize) {
            lock.write().unwrap_or_else(PoisonError::into_inner).0 = None;
        }
    }
}

/// Some bytes of a slot. Other processes may write them at any time, so there is an address and no slice.
#[derive(Debug, Clone, Copy)]
pub struct SlotBytes<'a> {
    address: *mut u8,
    len: usize,
    view: PhantomData<&'a ArenaView>,
}

// SAFETY: an address and a length of memory that is shared between processes anyway; whoever copies answers for races.
unsafe impl Send for SlotBytes<'_> {}
// SAFETY: as above.
unsafe impl Sync for SlotBytes<'_> {}

impl<'a> SlotBytes<'a> {
    /// Bytes that are no slot of an arena, for tests and benches.
    ///
    /// # Safety
    /// `address..address + len` is valid for reads and writes for all of `'a`.
    pub unsafe fn from_raw(address: *mut u8, len: usize) -> Self {
        Self {
            address,
            len,
            view: PhantomData,
        }
    }

    /// Where they begin. Valid for [`SlotBytes::len`] bytes while the view lives.
    pub fn as_ptr(&self) -> *mut u8 {
        self.address
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// `len` bytes from `start` on; `None` when they are not all inside.
    pub fn sub(&self, start: usize, len: usize) -> Option<SlotBytes<'a>> {
        if start.checked_add(len)? > self.len {
            return None;
        }
        Some(SlotBytes {
            // SAFETY: start <= self.len, so the address stays inside what `self` covers.
            address: unsafe { self.address.add(start) },
            len,
            view: PhantomData,
        })
    }
}
