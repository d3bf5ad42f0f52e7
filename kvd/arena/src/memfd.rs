//! Making sealed memfds, and telling them from anything else that somebody may pass instead.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{FileType, MemfdFlags, SealFlags};
use rustix::io::Errno;

use crate::{Error, HUGE_PAGE_BYTES};

/// Seals of an arena: its length is for ever.
pub(crate) const ARENA_SEALS: SealFlags = SealFlags::SHRINK
    .union(SealFlags::GROW)
    .union(SealFlags::SEAL);
/// Seals of a generation table: nobody but who has mapped it already can write it.
pub(crate) const TABLE_SEALS: SealFlags = ARENA_SEALS.union(SealFlags::FUTURE_WRITE);

const HUGETLBFS_MAGIC: i64 = 0x958458f6;
const TMPFS_MAGIC: i64 = 0x01021994;

/// An empty memfd that may be sealed; with 2 MiB pages if `huge`.
pub(crate) fn create(name: &str, huge: bool) -> Result<OwnedFd, Errno> {
    let mut flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    if huge {
        flags |= MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    }
    match rustix::fs::memfd_create(name, flags | MemfdFlags::NOEXEC_SEAL) {
        // Before Linux 6.3 that flag is unknown.
        Err(Errno::INVAL) => rustix::fs::memfd_create(name, flags),
        other => other,
    }
}

/// What was found out of a descriptor that really is a sealed memfd.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Checked {
    pub(crate) bytes: u64,
    pub(crate) page_bytes: u64,
    pub(crate) device: u64,
    pub(crate) inode: u64,
}

/// Checks that `fd` is a memfd whose seals include `needed` and none of `refused`.
pub(crate) fn check(
    what: &str,
    fd: BorrowedFd<'_>,
    needed: SealFlags,
    refused: SealFlags,
) -> Result<Checked, Error> {
    let stat =
        rustix::fs::fstat(fd).map_err(|e| Error::os(&format!("cannot stat the {what}"), e))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(Error::invalid(format!(
            "the {what} is no memory file: pass the descriptor that the daemon gave"
        )));
    }
    let seals = rustix::fs::fcntl_get_seals(fd).map_err(|_| {
        Error::invalid(format!(
            "the {what} cannot be sealed, so it is no memfd: pass the descriptor that the daemon gave"
        ))
    })?;
    if !seals.contains(needed) {
        return Err(Error::invalid(format!(
            "the {what} lacks seals (has {seals:?}, needs {needed:?}): its length could change under us"
        )));
    }
    if seals.intersects(refused) {
        return Err(Error::invalid(format!(
            "the {what} has seals {seals:?}, which forbid to write it: pass the descriptor that the daemon gave"
        )));
    }
    let fs =
        rustix::fs::fstatfs(fd).map_err(|e| Error::os(&format!("cannot statfs the {what}"), e))?;
    #[allow(
        clippy::unnecessary_cast,
        reason = "the type of f_type differs between targets"
    )]
    let page_bytes = match fs.f_type as i64 {
        TMPFS_MAGIC => rustix::param::page_size() as u64,
        HUGETLBFS_MAGIC => fs.f_bsize as u64,
        other => {
            return Err(Error::invalid(format!(
                "the {what} lives on an unknown file system ({other:#x}): pass the descriptor that the daemon gave"
            )));
        }
    };
    let bytes = u64::try_from(stat.st_size)
        .map_err(|_| Error::invalid(format!("the {what} has a negative length")))?;
    Ok(Checked {
        bytes,
        page_bytes,
        device: stat.st_dev,
        inode: stat.st_ino,
    })
}

/// Gives a fresh memfd its length and, when `seals` is not empty, its seals.
pub(crate) fn set_len(fd: &OwnedFd, bytes: u64) -> Result<(), Error> {
    rustix::fs::ftruncate(fd, bytes)
        .map_err(|e| Error::os(&format!("cannot make a memory file of {bytes} bytes"), e))
}

/// Seals for ever.
pub(crate) fn seal(fd: &OwnedFd, seals: SealFlags) -> Result<(), Error> {
    rustix::fs::fcntl_add_seals(fd.as_fd(), seals)
        .map_err(|e| Error::os("cannot seal a memory file", e))
}

/// Whether 2 MiB is the huge page size of `page_bytes`.
pub(crate) fn is_huge(page_bytes: u64) -> bool {
    page_bytes == HUGE_PAGE_BYTES
}
