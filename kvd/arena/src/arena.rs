//! The daemon's side of an arena: made, faulted in, handed out by descriptor.
//!
//! Deliberately absent: slots and their states (`kvd-core`), the thread that faults extents in (`kvd-node`).

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU8, Ordering};

use rustix::fs::FallocateFlags;
use rustix::io::Errno;
use rustix::rand::GetRandomFlags;

use crate::checksum::{Engine, State};
use crate::generations::GenerationTable;
use crate::mapping::{Mapping, PageReport};
use crate::{ArenaShape, Error, ErrorKind, HUGE_PAGE_BYTES, SLOT_MIN_BYTES, memfd};

const EXTENT_MIN: u64 = 2 << 20;
const EXTENT_MAX: u64 = 1 << 30;

/// Whether 2 MiB pages are wanted from the machine's pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum HugePages {
    /// If the pool has enough of them, else pages of 4 KiB; [`Arena::fallback`] says why.
    #[default]
    Auto,
    /// No.
    Off,
    /// Yes, or an error.
    Require,
}

/// One tenant's shared memory. Dropping it unmaps it here; clients keep their own mappings.
#[derive(Debug)]
pub struct Arena {
    shape: ArenaShape,
    fd: OwnedFd,
    map: Mapping,
    generations: GenerationTable,
    fallback: Option<String>,
}

/// The extent size for an arena of `capacity` bytes: a power of two from 2 MiB to 1 GiB, so that there are about 64.
pub fn default_extent_bytes(capacity: u64) -> u64 {
    (capacity / 64)
        .clamp(EXTENT_MIN, EXTENT_MAX)
        .next_power_of_two()
}

pub(crate) fn extents(shape: &ArenaShape) -> u32 {
    u32::try_from(shape.bytes / shape.extent_bytes).expect("a checked shape")
}

/// Refuses shapes that cannot be, whoever claims them.
pub(crate) fn check_shape(shape: &ArenaShape) -> Result<(), Error> {
    let whole = shape.extent_bytes.is_power_of_two()
        && shape.extent_bytes >= SLOT_MIN_BYTES
        && shape.page_bytes.is_power_of_two()
        && shape.extent_bytes >= shape.page_bytes
        && shape.bytes > 0
        && shape.bytes.is_multiple_of(shape.extent_bytes);
    let words = shape.bytes / SLOT_MIN_BYTES;
    if !whole
        || words > u64::from(u32::MAX)
        || usize::try_from(shape.bytes).is_err()
        || u64::from(shape.slots_per_extent) != shape.extent_bytes / SLOT_MIN_BYTES
    {
        return Err(Error::invalid(format!(
            "no arena has this shape: {} bytes in extents of {} with {} slots, pages of {}",
            shape.bytes, shape.extent_bytes, shape.slots_per_extent, shape.page_bytes
        )));
    }
    Ok(())
}

impl Arena {
    /// New memory for `capacity` bytes, rounded down to whole extents (`None`: [`default_extent_bytes`]). Nothing is
    /// faulted in yet: see [`Arena::populate`].
    ///
    /// # Errors
    /// `Invalid` for sizes that cannot be, `NoSpace` when 2 MiB pages are required and not there, else what the kernel said.
    pub fn create(
        capacity: u64,
        extent_bytes: Option<u64>,
        huge: HugePages,
    ) -> Result<Self, Error> {
        let extent_bytes = extent_bytes.unwrap_or_else(|| default_extent_bytes(capacity));
        if !extent_bytes.is_power_of_two() || extent_bytes < SLOT_MIN_BYTES {
            return Err(Error::invalid(format!(
                "an extent of {extent_bytes} bytes: take a power of two from {SLOT_MIN_BYTES} on"
            )));
        }
        let bytes = capacity - capacity % extent_bytes;
        if bytes == 0 {
            return Err(Error::invalid(format!(
                "a host capacity of {capacity} bytes holds no extent of {extent_bytes}: give more memory or set a smaller extent"
            )));
        }
        let mut id = [0; 16];
        rustix::rand::getrandom(&mut id, GetRandomFlags::empty())
            .map_err(|e| Error::os("cannot draw an arena id", e))?;
        let mut shape = ArenaShape {
            id,
            bytes,
            extent_bytes,
            page_bytes: rustix::param::page_size() as u64,
            slots_per_extent: u32::try_from(extent_bytes / SLOT_MIN_BYTES)
                .map_err(|_| Error::invalid("an extent is at most 16 TiB"))?,
        };
        check_shape(&shape)?;
        let (fd, map, fallback) = Self::memory(&mut shape, huge)?;
        let generations = GenerationTable::create(&shape)?;
        Ok(Self {
            shape,
            fd,
            map,
            generations,
            fallback,
        })
    }

    /// The memfd and its mapping, on huge pages if they are wanted and there; else why not.
    fn memory(
        shape: &mut ArenaShape,
        huge: HugePages,
    ) -> Result<(OwnedFd, Mapping, Option<String>), Error> {
        let mut fallback = None;
        if huge != HugePages::Off {
            let whole = shape.extent_bytes.is_multiple_of(HUGE_PAGE_BYTES);
            let tried = if whole {
                map_memory(shape.bytes, true)
            } else {
                Err(Error::invalid(format!(
                    "extents of {} bytes are no multiple of 2 MiB",
                    shape.extent_bytes
                )))
            };
            match tried {
                Ok((fd, map)) => {
                    shape.page_bytes = HUGE_PAGE_BYTES;
                    return Ok((fd, map, None));
                }
                Err(error) if huge == HugePages::Require => {
                    return Err(Error::new(
                        ErrorKind::NoSpace,
                        format!(
                            "no 2 MiB pages for {} bytes ({error}): raise vm.nr_hugepages to {}, or do not require them",
                            shape.bytes,
                            shape.bytes.div_ceil(HUGE_PAGE_BYTES)
                        ),
                    ));
                }
                Err(error) => fallback = Some(error.to_string()),
            }
        }
        let (fd, map) = map_memory(shape.bytes, false)?;
        map.advise_huge();
        Ok((fd, map, fallback))
    }

    /// An arena over memory that `adopt` has checked.
    pub(crate) fn from_checked(
        shape: ArenaShape,
        fd: OwnedFd,
        map: Mapping,
        generations: GenerationTable,
    ) -> Self {
        Self {
            shape,
            fd,
            map,
            generations,
            fallback: None,
        }
    }

    /// What clients must know.
    pub fn shape(&self) -> &ArenaShape {
        &self.shape
    }

    /// How many extents there are.
    pub fn extents(&self) -> u32 {
        extents(&self.shape)
    }

    /// The memory, to pass to clients.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// The generation table, to pass to clients.
    pub fn generation_fd(&self) -> BorrowedFd<'_> {
        self.generations.fd()
    }

    /// The generation table.
    pub fn generations(&self) -> &GenerationTable {
        &self.generations
    }

    /// Why there are no 2 MiB pages although they were wanted.
    pub fn fallback(&self) -> Option<&str> {
        self.fallback.as_deref()
    }

    /// Faults one extent in, for the first time or again after somebody has punched a hole. Keeps what it holds. Blocks for
    /// as long as the kernel needs to clear the pages (about 0.3 s a GiB); any thread may call it.
    ///
    /// # Errors
    /// `NoSpace` when the machine has no memory for it; that extent must not be handed out then. `Invalid` when there is no
    /// such extent.
    pub fn populate(&self, extent: u32) -> Result<(), Error> {
        if extent >= self.extents() {
            return Err(Error::invalid(format!(
                "extent {extent} of {}",
                self.extents()
            )));
        }
        let len = self.shape.extent_bytes;
        let offset = u64::from(extent) * len;
        let what = format!("cannot fault in extent {extent}");
        match self.map.populate(offset, len as usize) {
            Ok(()) => Ok(()),
            Err(Errno::INVAL | Errno::NOSYS) => {
                // Before Linux 5.14. Allocate by the file, which fails with an error where touching would be a signal, then
                // touch for the page tables.
                rustix::fs::fallocate(&self.fd, FallocateFlags::empty(), offset, len)
                    .map_err(|e| Error::os(&what, e))?;
                self.touch(offset, len);
                Ok(())
            }
            // The kernel says FAULT where a touch would have been SIGBUS.
            Err(Errno::FAULT) => Err(Error::new(
                ErrorKind::NoSpace,
                format!("{what}: no memory or no huge page left"),
            )),
            Err(e) => Err(Error::os(&what, e)),
        }
    }

    fn touch(&self, offset: u64, len: u64) {
        for page in (offset..offset + len).step_by(self.shape.page_bytes as usize) {
            let address = self.map.range(page, 1).expect("inside the arena");
            // SAFETY: one byte inside a live mapping whose page was just allocated. Adding nothing atomically faults the
            // page in for writing and leaves what others write there.
            let byte = unsafe { AtomicU8::from_ptr(address) };
            byte.fetch_add(0, Ordering::Relaxed);
        }
    }

    /// Address of `len` bytes at `offset`, for adapters that tell a kernel or a driver where to copy; `None` when they are not
    /// all inside. Valid while this arena lives. Engines may write there at any time, so there is never a reference.
    pub fn range(&self, offset: u64, len: usize) -> Option<*mut u8> {
        self.map.range(offset, len)
    }

    /// Fills `to` with a copy of the bytes from `offset` on. Goes by the file, not by the mapping, so that a page which a
    /// client has punched out and the machine can't replace reads as zeros instead of raising a signal.
    ///
    /// # Errors
    /// `Invalid` when they are not all inside; else what the kernel said.
    pub fn read(&self, offset: u64, mut to: &mut [u8]) -> Result<(), Error> {
        if self.map.range(offset, to.len()).is_none() {
            return Err(Error::invalid(format!(
                "{} bytes at {offset} of an arena of {}",
                to.len(),
                self.shape.bytes
            )));
        }
        let mut at = offset;
        while !to.is_empty() {
            match rustix::io::pread(&self.fd, &mut *to, at) {
                Ok(0) => {
                    return Err(Error::invalid(
                        "the arena's file is shorter than its seals allow",
                    ));
                }
                Ok(got) => {
                    at += got as u64;
                    to = &mut to[got..];
                }
                Err(Errno::INTR) => {}
                Err(e) => return Err(Error::os("cannot read the arena", e)),
            }
        }
        Ok(())
    }

    /// Whether [`Arena::sum`] works here with this engine. Not on 2 MiB pages, where touching what a client has punched out may raise a
    /// signal, and not with an engine that makes references: use [`Arena::read`] there.
    pub fn can_sum(&self, engine: Engine) -> bool {
        self.shape.page_bytes != HUGE_PAGE_BYTES && engine != Engine::Portable
    }

    /// Takes the bytes from `offset` on into a checksum, where they lie. Whatever others write there meanwhile is a mix that the
    /// checksum tells.
    ///
    /// # Errors
    /// `Invalid` when they are not all inside, or where [`Arena::can_sum`] says no.
    ///
    /// # Panics
    /// When `len` is no multiple of the engine's unit.
    pub fn sum(
        &self,
        offset: u64,
        len: usize,
        engine: Engine,
        state: &mut State,
    ) -> Result<(), Error> {
        let address = self.map.range(offset, len);
        let Some(address) = address.filter(|_| self.can_sum(engine)) else {
            return Err(Error::invalid(format!(
                "{len} bytes at {offset} of an arena of {} can't be summed in place",
                self.shape.bytes
            )));
        };
        engine.is_for(len);
        // SAFETY: inside the mapping, which `self` keeps; ordinary pages of a file that can't shrink are always readable.
        unsafe { engine.scan(address, len, state) };
        Ok(())
    }

    /// What smaps says of the pages behind this mapping.
    ///
    /// # Errors
    /// When `/proc` is not there.
    pub fn pages(&self) -> Result<PageReport, Error> {
        self.map.report()
    }
}

fn map_memory(bytes: u64, huge: bool) -> Result<(OwnedFd, Mapping), Error> {
    let fd =
        memfd::create("kvd-arena", huge).map_err(|e| Error::os("cannot make a memory file", e))?;
    memfd::set_len(&fd, bytes)?;
    let len = usize::try_from(bytes).map_err(|_| Error::invalid("the arena is too large"))?;
    // With an empty pool a hugetlb memfd is made without complaint; this is where it fails.
    let map =
        Mapping::new(fd.as_fd(), len, true).map_err(|e| Error::os("cannot map the arena", e))?;
    memfd::seal(&fd, memfd::ARENA_SEALS)?;
    Ok((fd, map))
}
