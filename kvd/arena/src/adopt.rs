//! Taking over the memory of a former daemon, from descriptors that a reconnecting client offers.
//!
//! Nothing the client says is believed: seals, file systems, lengths and headers are read from the descriptors, and both
//! files are read by system call until that is done, so that a hostile one costs an error and never a signal. What the
//! arena holds is taken as empty. Deliberately absent: whether the memory is wanted (`kvd-serve`), and what becomes of
//! slots that were being written (`kvd-core`).

use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{SealFlags, SeekFrom};
use rustix::io::Errno;

use crate::arena::{Arena, check_shape, extents};
use crate::generations::{
    GenerationTable, HEADER_BYTES, Header, WRITERS_MAX, WRITERS_OFFSET, table_bytes,
};
use crate::mapping::Mapping;
use crate::{ArenaShape, Error, memfd};

/// An adopted arena, and what its new table begins with.
#[derive(Debug)]
pub struct Adoption {
    /// The memory of the former daemon under a table of this one.
    pub arena: Arena,
    /// Every word of the new table: above the old one's, odd where the old one's was. 0 where no slot ever was.
    pub words: Vec<u64>,
    /// Tokens of the sessions that could write into the arena when the former daemon died. They are in the new table too,
    /// until [`GenerationTable::set_writers`] says otherwise.
    pub writers: Vec<u64>,
}

impl Arena {
    /// Checks an offer and takes it over. `claimed` is the shape that the client says the former daemon gave; `limit` is the
    /// most bytes that this daemon may hold.
    ///
    /// The words of the new table are those of the old one plus 2: even ones stay even, odd ones (a writer may be active)
    /// stay odd. Zeros stay zero.
    ///
    /// # Errors
    /// `Invalid`, with what does not fit, for everything that is not a sealed arena with its own table; else what the
    /// kernel said.
    pub fn adopt(
        arena: OwnedFd,
        generations: OwnedFd,
        claimed: &ArenaShape,
        limit: u64,
    ) -> Result<Adoption, Error> {
        check_shape(claimed)?;
        if claimed.bytes > limit {
            return Err(Error::invalid(format!(
                "the offered arena has {} bytes and {limit} are allowed: it stays with its client",
                claimed.bytes
            )));
        }
        let memory = memfd::check(
            "offered arena",
            arena.as_fd(),
            memfd::ARENA_SEALS,
            SealFlags::WRITE | SealFlags::FUTURE_WRITE,
        )?;
        let table = memfd::check(
            "offered generation table",
            generations.as_fd(),
            memfd::TABLE_SEALS,
            SealFlags::empty(),
        )?;
        if (memory.device, memory.inode) == (table.device, table.inode) {
            return Err(Error::invalid(
                "the offered arena and its table are one file: pass both",
            ));
        }
        if memory.bytes != claimed.bytes || memory.page_bytes != claimed.page_bytes {
            return Err(Error::invalid(format!(
                "the offered arena has {} bytes in pages of {}, not {} in pages of {}",
                memory.bytes, memory.page_bytes, claimed.bytes, claimed.page_bytes
            )));
        }
        if table.bytes != table_bytes(claimed) || memfd::is_huge(table.page_bytes) {
            return Err(Error::invalid(format!(
                "the offered generation table has {} bytes, not {}",
                table.bytes,
                table_bytes(claimed)
            )));
        }
        let (words, writers) = read_table(&generations, claimed)?;
        let len = usize::try_from(claimed.bytes).map_err(|_| Error::invalid("too large"))?;
        let map = Mapping::new(arena.as_fd(), len, true)
            .map_err(|e| Error::os("cannot map the offered arena", e))?;
        map.advise_huge();
        let table = GenerationTable::create(claimed)?;
        table.set_writers(&writers)?;
        for (slot, word) in (0u32..).zip(&words) {
            if *word != 0 {
                table.set(slot, *word);
            }
        }
        Ok(Adoption {
            arena: Self::from_checked(*claimed, arena, map, table),
            words,
            writers,
        })
    }
}

/// Header, writers and words of an old table. Reads only what the sparse file holds.
fn read_table(fd: &OwnedFd, shape: &ArenaShape) -> Result<(Vec<u64>, Vec<u64>), Error> {
    let mut header = [0; Header::BYTES];
    read_exact(fd, &mut header, 0)?;
    Header::check(&header, shape)?;
    let mut tokens = [0; WRITERS_MAX * 8];
    read_exact(fd, &mut tokens, WRITERS_OFFSET)?;
    let writers = tokens
        .as_chunks::<8>()
        .0
        .iter()
        .map(|b| u64::from_ne_bytes(*b))
        .filter(|t| *t != 0)
        .collect();

    let count = extents(shape) as usize * shape.slots_per_extent as usize;
    let mut words = vec![0u64; count];
    let end = HEADER_BYTES + count as u64 * 8;
    let mut chunk = vec![0u8; 64 << 10];
    let mut at = HEADER_BYTES;
    while at < end {
        // Only written pages are read: reading a hole would cost time, and mapping it would allocate it.
        at = match rustix::fs::seek(fd, SeekFrom::Data(at)) {
            Ok(data) => data & !7,
            Err(Errno::NXIO) => break,
            Err(e) => return Err(Error::os("cannot read the offered generation table", e)),
        };
        if at >= end {
            break;
        }
        let n = chunk.len().min((end - at) as usize);
        read_exact(fd, &mut chunk[..n], at)?;
        let first = ((at - HEADER_BYTES) / 8) as usize;
        for (word, bytes) in words[first..].iter_mut().zip(chunk[..n].as_chunks::<8>().0) {
            let old = u64::from_ne_bytes(*bytes);
            if old > u64::MAX / 2 {
                return Err(Error::invalid(
                    "the offered generation table holds a generation that no daemon has counted to",
                ));
            }
            *word = if old == 0 { 0 } else { old + 2 };
        }
        at += n as u64;
    }
    Ok((words, writers))
}

fn read_exact(fd: &OwnedFd, mut out: &mut [u8], mut at: u64) -> Result<(), Error> {
    while !out.is_empty() {
        match rustix::io::pread(fd, &mut *out, at) {
            Ok(0) => return Err(Error::invalid("the offered generation table is too short")),
            Ok(n) => {
                out = &mut out[n..];
                at += n as u64;
            }
            Err(Errno::INTR) => {}
            Err(e) => return Err(Error::os("cannot read the offered generation table", e)),
        }
    }
    Ok(())
}
