//! What a device gives without any store: one plain loop of direct transfers through a ring, for benches to print ratios against.
//!
//! Space that was taken but never written reads as zeros without touching the device, so a read run wants a file that a write run has
//! filled. Deliberately absent: everything else that an adapter does.

use std::collections::VecDeque;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::time::Instant;

use io_uring::{IoUring, opcode, types};
use rustix::fs::{FallocateFlags, Mode, OFlags};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};
use rustix::time::{ClockId, clock_gettime};

use super::ring::{answer, begin, build, errno};
use super::{DEPTH_MAX, OpenError, OpenErrorKind, PAGE};

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RawRun {
    /// Bytes of the file, and bytes that are moved.
    pub bytes: u64,
    /// Bytes of one transfer, a multiple of [`PAGE`].
    pub block: usize,
    /// Transfers under way at once.
    pub depth: usize,
    /// Writes; else reads.
    pub write: bool,
    /// Blocks in a scattered order; else one after the other. Each block once.
    pub random: bool,
    /// A flush after each `depth` blocks, which all wait for it, as one would who promises that they are durable; else one flush at
    /// the end. Of writes.
    pub durable: bool,
    /// Bytes of memory that blocks go from or to, one place after the other; at least `depth` blocks. With little of it, it stays in
    /// the caches.
    pub memory: usize,
    /// Whether that is to be of huge pages, of which the pool must have enough, or of small ones.
    pub huge: bool,
}

/// What came of it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RawReport {
    /// 10^9 bytes a second, flush included for writes.
    pub gbps: f64,
    /// Seconds of CPU of this process for 10^9 bytes.
    pub cpu_s_per_gb: f64,
}

/// Moves the blocks of a file, made if missing, once.
///
/// # Errors
/// `Invalid` for sizes that can't be and for reading what was not written, else what the system said.
pub fn raw(path: &Path, run: &RawRun) -> Result<RawReport, OpenError> {
    let RawRun {
        bytes,
        block,
        depth,
        ..
    } = *run;
    let fits = block > 0
        && block.is_multiple_of(PAGE)
        && block <= 1 << 30
        && (1..=DEPTH_MAX).contains(&depth)
        && bytes >= block as u64;
    if !fits {
        return Err(invalid(format!(
            "no run of {bytes} bytes in blocks of {block}, {depth} at once"
        )));
    }
    let blocks = bytes / block as u64;
    let file = open(path, run)?;
    let count = depth.max((run.memory / block).min(usize::try_from(blocks).unwrap_or(usize::MAX)));
    let entries = (depth as u32).next_power_of_two();
    let ring = build(entries).map_err(|e| OpenError::new(OpenErrorKind::Unsupported, e))?;
    begin(&ring).map_err(|e| OpenError::os("cannot begin a ring", e))?;
    let mut load = Load {
        ring,
        buffers: Memory::new(count * block, run.huge)
            .map_err(|e| OpenError::os("no memory to measure with", e))?,
        free: (0..count).collect(),
        fixed: false,
        under_way: 0,
        file,
    };
    // Not zeros, which some devices don't store.
    for (at, byte) in load.buffers.bytes_mut().iter_mut().enumerate() {
        *byte = (at.wrapping_mul(2_654_435_761) >> 7) as u8;
    }
    load.register()?;
    #[expect(clippy::disallowed_methods, reason = "a measurement is of this clock")]
    let start = Instant::now();
    let cpu = cpu_seconds();
    let moved = load.run(run, blocks);
    let seconds = start.elapsed().as_secs_f64();
    let cpu = cpu_seconds() - cpu;
    if load.under_way > 0 {
        // The kernel may still write them.
        std::mem::forget(load);
    }
    moved.map_err(|e| OpenError::os(&format!("cannot measure {}", path.display()), e))?;
    let gb = (blocks * block as u64) as f64 / 1e9;
    Ok(RawReport {
        gbps: gb / seconds,
        cpu_s_per_gb: cpu / gb,
    })
}

fn open(path: &Path, run: &RawRun) -> Result<OwnedFd, OpenError> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::DIRECT;
    let flags = if run.write {
        flags | OFlags::CREATE
    } else {
        flags
    };
    let file = rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR)
        .map_err(|e| OpenError::os(&format!("cannot open {}", path.display()), e))?;
    let size = rustix::fs::seek(&file, rustix::fs::SeekFrom::End(0)).unwrap_or(0);
    if size >= run.bytes {
        return Ok(file);
    }
    if !run.write {
        return Err(invalid(format!(
            "{} has {size} bytes, not {}: write it first",
            path.display(),
            run.bytes
        )));
    }
    rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, run.bytes)
        .map_err(|e| OpenError::os(&format!("cannot take space for {}", path.display()), e))?;
    Ok(file)
}

fn invalid(text: String) -> OpenError {
    OpenError::new(OpenErrorKind::Invalid, text)
}

/// CPU time of all threads of this process so far, seconds.
pub fn cpu_seconds() -> f64 {
    let now = clock_gettime(ClockId::ProcessCPUTime);
    now.tv_sec as f64 + now.tv_nsec as f64 / 1e9
}

/// A step over so many places that comes to each once, because the two have no common divisor, and far from the one before.
pub fn scattered(blocks: u64) -> u64 {
    let gcd = |mut a: u64, mut b: u64| {
        while b > 0 {
            (a, b) = (b, a % b);
        }
        a
    };
    let near = (blocks as f64 * 0.618) as u64;
    (near.max(1)..).find(|s| gcd(*s, blocks) == 1).unwrap_or(1)
}

/// Memory of its own, of one kind of pages.
struct Memory {
    address: *mut u8,
    len: usize,
}

impl Memory {
    fn new(bytes: usize, huge: bool) -> Result<Self, Errno> {
        let len = bytes.next_multiple_of(2 << 20);
        let flags = match huge {
            true => MapFlags::PRIVATE | MapFlags::HUGETLB,
            false => MapFlags::PRIVATE,
        };
        // SAFETY: no address is asked for, so no mapping of this process is replaced.
        let address = unsafe {
            mmap_anonymous(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                flags,
            )
        }?;
        if !huge {
            // SAFETY: it is ours, and the advice changes no content. Where it is not taken, pages are what they are.
            let _ = unsafe { madvise(address, len, Advice::LinuxNoHugepage) };
        }
        let address = address.cast();
        Ok(Memory { address, len })
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: mapped until it is dropped, and nobody else's. The kernel writes only where no reference is used meanwhile.
        unsafe { std::slice::from_raw_parts_mut(self.address, self.len) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: nobody uses it any more: the ring, which does, is dropped before it.
        let _ = unsafe { munmap(self.address.cast(), self.len) };
    }
}

struct Load {
    ring: IoUring,
    /// One after the other.
    buffers: Memory,
    /// Those that are not under way; who was free longest comes first.
    free: VecDeque<usize>,
    fixed: bool,
    under_way: usize,
    file: OwnedFd,
}

impl Load {
    fn register(&mut self) -> Result<(), OpenError> {
        self.ring
            .submitter()
            .register_files(&[self.file.as_fd().as_raw_fd()])
            .map_err(|e| OpenError::os("the ring takes no file", errno(&e)))?;
        let pieces = [libc::iovec {
            iov_base: self.buffers.bytes_mut().as_mut_ptr().cast(),
            iov_len: self.buffers.len,
        }];
        // SAFETY: the buffers live as long as the ring, in the same struct.
        let registered = unsafe { self.ring.submitter().register_buffers(&pieces) };
        self.fixed = registered.is_ok();
        Ok(())
    }

    fn push(&mut self, run: &RawRun, block: u64) {
        let buffer = self.free.pop_front().expect("no more are under way");
        let file = types::Fixed(0);
        let (len, index) = (run.block as u32, 0);
        let offset = block * run.block as u64;
        let address = self.buffers.address.wrapping_add(buffer * run.block);
        let entry = match (run.write, self.fixed) {
            (false, true) => opcode::ReadFixed::new(file, address, len, index)
                .offset(offset)
                .build(),
            (false, false) => opcode::Read::new(file, address, len).offset(offset).build(),
            (true, true) => opcode::WriteFixed::new(file, address, len, index)
                .offset(offset)
                .build(),
            (true, false) => opcode::Write::new(file, address, len)
                .offset(offset)
                .build(),
        };
        // SAFETY: nobody touches this buffer until its completion; all of them outlive the ring, or are forgotten with it.
        let pushed = unsafe { self.ring.submission().push(&entry.user_data(buffer as u64)) };
        pushed.expect("a place for each buffer");
        self.under_way += 1;
    }

    fn run(&mut self, run: &RawRun, blocks: u64) -> Result<(), Errno> {
        let step = if run.random { scattered(blocks) } else { 1 };
        let place =
            |number: u64| (u128::from(number) * u128::from(step) % u128::from(blocks)) as u64;
        let (mut next, mut failed) = (0, None);
        while self.under_way > 0 || (next < blocks && failed.is_none()) {
            if self.under_way == 0 {
                // Not the first: the durable promise for those before.
                if next > 0 {
                    rustix::fs::fdatasync(&self.file)?;
                }
                let left = usize::try_from(blocks - next).unwrap_or(usize::MAX);
                for _ in 0..run.depth.min(left) {
                    self.push(run, place(next));
                    next += 1;
                }
            }
            match self.ring.submit_and_wait(1).map_err(|e| errno(&e)) {
                Ok(_) | Err(Errno::INTR | Errno::AGAIN | Errno::BUSY) => {}
                Err(e) => return Err(e),
            }
            loop {
                let Some(entry) = self.ring.completion().next() else {
                    break;
                };
                self.under_way -= 1;
                self.free.push_back(entry.user_data() as usize);
                match answer(entry.result()) {
                    Ok(moved) if moved == run.block => {}
                    Ok(_) => failed = Some(Errno::IO),
                    Err(e) => failed = Some(e),
                }
                if next < blocks && failed.is_none() && !run.durable {
                    self.push(run, place(next));
                    next += 1;
                }
            }
        }
        match failed {
            Some(e) => Err(e),
            None if run.write => rustix::fs::fdatasync(&self.file),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::testing::scratch;

    #[test]
    fn every_block_is_moved_once_in_any_order() {
        for blocks in [1u64, 2, 3, 10, 64, 1000] {
            let step = scattered(blocks);
            let mut seen: Vec<u64> = (0..blocks).map(|n| n * step % blocks).collect();
            seen.sort_unstable();
            assert!(seen.iter().copied().eq(0..blocks), "{blocks}");
        }
    }

    #[test]
    fn a_run_writes_and_reads_a_file() {
        let scratch = scratch();
        let path = scratch.path().join("raw");
        let mut run = RawRun {
            memory: 0,
            huge: false,
            bytes: 8 << 20,
            block: 64 << 10,
            depth: 4,
            write: false,
            random: true,
            durable: false,
        };
        assert!(raw(&path, &run).is_err(), "nothing to read");
        run.write = true;
        assert!(raw(&path, &run).expect("written").gbps > 0.0);
        run.durable = true;
        assert!(raw(&path, &run).expect("written").gbps > 0.0);
        run.write = false;
        run.random = false;
        assert!(raw(&path, &run).expect("read").gbps > 0.0);
        run.block = 5;
        let refused = raw(&path, &run).expect_err("no page");
        assert_eq!(refused.kind(), OpenErrorKind::Invalid);
    }
}
