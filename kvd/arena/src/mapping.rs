//! A shared mapping of a whole file, and what the kernel says of its pages. Unmaps when dropped.
//!
//! Never lends a reference to the bytes: other processes write them at any time. Callers get addresses.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;

use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags};

use crate::Error;

/// What `/proc/self/smaps` says of a mapping; zeros where it says nothing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PageReport {
    /// Size of the pages that back the mapping, in bytes.
    pub kernel_page_bytes: u64,
    /// Bytes that this process has in its page tables.
    pub resident_bytes: u64,
    /// Bytes that are mapped by transparent huge pages.
    pub huge_bytes: u64,
}

/// A shared mapping from offset 0.
#[derive(Debug)]
pub(crate) struct Mapping {
    address: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping belongs to no thread; whoever uses its address answers for data races.
unsafe impl Send for Mapping {}
// SAFETY: as above; the methods below only read fields or call the kernel.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps the first `len` bytes. The caller has checked that the file has them and cannot shrink.
    pub(crate) fn new(fd: BorrowedFd<'_>, len: usize, writable: bool) -> Result<Self, Errno> {
        let mut protection = ProtFlags::READ;
        if writable {
            protection |= ProtFlags::WRITE;
        }
        // SAFETY: no address is asked for, so no mapping of this process is replaced.
        let address = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                len,
                protection,
                MapFlags::SHARED,
                fd,
                0,
            )
        }?;
        let address = NonNull::new(address.cast()).ok_or(Errno::NOMEM)?;
        Ok(Self { address, len })
    }

    pub(crate) fn address(&self) -> *mut u8 {
        self.address.as_ptr()
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Address of `len` bytes at `offset`, or `None` when they are not all inside.
    pub(crate) fn range(&self, offset: u64, len: usize) -> Option<*mut u8> {
        let offset = usize::try_from(offset).ok()?;
        if offset.checked_add(len)? > self.len {
            return None;
        }
        // SAFETY: offset + len <= self.len was just checked, so the address stays inside the mapping.
        Some(unsafe { self.address.as_ptr().add(offset) })
    }

    /// Asks for transparent huge pages. The kernel says yes and may do nothing: see [`Mapping::report`].
    pub(crate) fn advise_huge(&self) {
        // SAFETY: the range is this mapping; the advice changes no content.
        let _ =
            unsafe { rustix::mm::madvise(self.address().cast(), self.len, Advice::LinuxHugepage) };
    }

    /// Faults pages in for writing and keeps what they hold. `Errno::INVAL`: this kernel cannot (before 5.14).
    pub(crate) fn populate(&self, offset: u64, len: usize) -> Result<(), Errno> {
        let address = self.range(offset, len).ok_or(Errno::FAULT)?;
        loop {
            // SAFETY: the range is inside this mapping; the advice changes no content.
            match unsafe { rustix::mm::madvise(address.cast(), len, Advice::LinuxPopulateWrite) } {
                Err(Errno::INTR | Errno::AGAIN) => {}
                other => return other,
            }
        }
    }

    /// What smaps says of this mapping now.
    pub(crate) fn report(&self) -> Result<PageReport, Error> {
        let file = File::open("/proc/self/smaps").map_err(|e| {
            Error::new(
                crate::ErrorKind::Unsupported,
                format!("cannot read /proc/self/smaps ({e}): page sizes are not verified"),
            )
        })?;
        let wanted = format!("{:x}-", self.address() as usize);
        let mut report = PageReport::default();
        let mut inside = false;
        for line in BufReader::new(file).lines().map_while(Result::ok) {
            let first = line.split(' ').next().unwrap_or_default();
            if !first.ends_with(':') {
                if inside {
                    break;
                }
                inside = line.starts_with(&wanted);
            } else if inside {
                let bytes = kib(&line) << 10;
                match first {
                    "KernelPageSize:" => report.kernel_page_bytes = bytes,
                    "Rss:" | "Shared_Hugetlb:" | "Private_Hugetlb:" => {
                        report.resident_bytes += bytes;
                    }
                    "ShmemPmdMapped:" => report.huge_bytes = bytes,
                    _ => {}
                }
            }
        }
        Ok(report)
    }
}

fn kib(line: &str) -> u64 {
    line.split_ascii_whitespace()
        .nth(1)
        .and_then(|n| n.parse().ok())
        .unwrap_or(0)
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: this mapping was made by `new` and is unmapped once; addresses given out borrow from its owner.
        let _ = unsafe { rustix::mm::munmap(self.address().cast(), self.len) };
    }
}
