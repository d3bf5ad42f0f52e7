//! What a device gives without any store: one plain loop of direct transfers through a ring, for benches to print ratios against.
//!
//! Deliberately absent: everything that an adapter does beside.

use std::collections::VecDeque;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use io_uring::{IoUring, opcode, types};
use kvd_arena::{Arena, HugePages};
use rustix::fs::{FallocateFlags, Mode, OFlags};
use rustix::io::Errno;
use rustix::time::{ClockId, clock_gettime};

use super::ring::{answer, begin, build, errno};
use super::{ArenaRange, DEPTH_MAX, OpenError, OpenErrorKind, PAGE};

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
}

/// What came of it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RawReport {
    /// 10^9 bytes a second, flush included for writes.
    pub gbps: f64,
    /// Seconds of CPU of this process for 10^9 bytes.
    pub cpu_s_per_gb: f64,
}

/// Moves the blocks of a file, made if missing, once: from or to this memory, one place after the other, each as long as a block.
/// It must have places for `depth` blocks. What is compared with it should use the same memory: a device fills what the caches hold
/// faster than what they don't, and of little memory they hold all. What is written should not be zeros, which some devices don't store.
/// `place` tells where in the file a block begins, by its number. A read run wants places that have been written: the rest of what
/// a file has taken reads as zeros without touching the device.
///
/// # Errors
/// `Invalid` for sizes that can't be and for reading behind the file's end, else what the system said.
pub fn raw(
    path: &Path,
    run: &RawRun,
    memory: &ArenaRange,
    place: &dyn Fn(u64) -> u64,
) -> Result<RawReport, OpenError> {
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
        && bytes >= block as u64
        && memory.pages_len() / block >= depth;
    if !fits {
        return Err(invalid(format!(
            "no run of {bytes} bytes in blocks of {block}, {depth} at once in {} bytes of memory",
            memory.pages_len()
        )));
    }
    let blocks = bytes / block as u64;
    let end = (0..blocks).map(|number| place(number) + block as u64).max();
    let file = open(path, run.write, end.unwrap_or(0))?;
    let count = memory.pages_len() / block;
    let entries = (depth as u32).next_power_of_two();
    let ring = build(entries).map_err(|e| OpenError::new(OpenErrorKind::Unsupported, e))?;
    begin(&ring).map_err(|e| OpenError::os("cannot begin a ring", e))?;
    let mut load = Load {
        ring,
        memory: memory.clone(),
        free: (0..count).collect(),
        fixed: false,
        under_way: 0,
        file,
    };
    load.register()?;
    #[expect(clippy::disallowed_methods, reason = "a measurement is of this clock")]
    let start = Instant::now();
    let cpu = cpu_seconds();
    let moved = load.run(run, blocks, place);
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

/// Most blocks of the memory of a measurement, and most of its bytes.
pub const RAW_BLOCKS: usize = 1024;
const RAW_BYTES: usize = 128 << 20;

/// How many blocks the memory of a measurement has: the same in every bench that prints a ratio to it, because the caches hold all of
/// less. At least those that are under way at once.
pub fn raw_blocks(block: usize, depth: usize) -> usize {
    (RAW_BYTES / block.max(1)).min(RAW_BLOCKS).max(depth)
}

/// Memory for [`raw`] where what is compared with it can't use the same: small pages, faulted in, not zeros, for [`raw_blocks`].
///
/// # Errors
/// When there is none of so many bytes.
pub fn raw_memory(block: usize, depth: usize) -> Result<ArenaRange, OpenError> {
    let bytes = raw_blocks(block, depth).saturating_mul(block);
    let none = |why: &dyn std::fmt::Display| {
        let text = format!("no memory of {bytes} bytes to measure with: {why}");
        OpenError::new(OpenErrorKind::Unavailable, text)
    };
    let extent = 1 << 20;
    let capacity = (bytes as u64).next_multiple_of(extent);
    let arena = Arena::create(capacity, Some(extent), HugePages::Off).map_err(|e| none(&e))?;
    for extent in 0..arena.extents() {
        arena.populate(extent).map_err(|e| none(&e))?;
    }
    let memory = ArenaRange::new(Arc::new(arena), 0, bytes).ok_or_else(|| none(&"not as many"))?;
    for at in 0..memory.pages_len() {
        let byte = (at.wrapping_mul(2_654_435_761) >> 7) as u8;
        // SAFETY: inside the range, whose arena was made here; nobody else has it yet.
        unsafe { memory.address().wrapping_add(at).write(byte) };
    }
    Ok(memory)
}

/// Opens a file of at least so many bytes, made or grown if it is to be written.
fn open(path: &Path, write: bool, bytes: u64) -> Result<OwnedFd, OpenError> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::DIRECT;
    let flags = if write { flags | OFlags::CREATE } else { flags };
    let file = rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR)
        .map_err(|e| OpenError::os(&format!("cannot open {}", path.display()), e))?;
    let size = rustix::fs::seek(&file, rustix::fs::SeekFrom::End(0)).unwrap_or(0);
    if size >= bytes {
        return Ok(file);
    }
    if !write {
        return Err(invalid(format!(
            "{} has {size} bytes, not {bytes}: write it first",
            path.display()
        )));
    }
    rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, bytes)
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

struct Load {
    ring: IoUring,
    memory: ArenaRange,
    /// Its places. Those that are not under way; who was free longest comes first.
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
            iov_base: self.memory.address().cast(),
            iov_len: self.memory.pages_len(),
        }];
        // SAFETY: the memory lives as long as the ring, in the same struct.
        let registered = unsafe { self.ring.submitter().register_buffers(&pieces) };
        self.fixed = registered.is_ok();
        Ok(())
    }

    fn push(&mut self, run: &RawRun, offset: u64) {
        let buffer = self.free.pop_front().expect("no more are under way");
        let file = types::Fixed(0);
        let (len, index) = (run.block as u32, 0);
        let address = self.memory.address().wrapping_add(buffer * run.block);
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
        // SAFETY: inside the memory, which outlives the ring, or is forgotten with it. It is shared, so there is no reference to it.
        let pushed = unsafe { self.ring.submission().push(&entry.user_data(buffer as u64)) };
        pushed.expect("a place for each buffer");
        self.under_way += 1;
    }

    fn run(&mut self, run: &RawRun, blocks: u64, place: &dyn Fn(u64) -> u64) -> Result<(), Errno> {
        let step = if run.random { scattered(blocks) } else { 1 };
        let offset =
            |turn: u64| place((u128::from(turn) * u128::from(step) % u128::from(blocks)) as u64);
        let (mut next, mut failed) = (0, None);
        while self.under_way > 0 || (next < blocks && failed.is_none()) {
            if self.under_way == 0 {
                // Not the first: the durable promise for those before.
                if next > 0 {
                    rustix::fs::fdatasync(&self.file)?;
                }
                let left = usize::try_from(blocks - next).unwrap_or(usize::MAX);
                for _ in 0..run.depth.min(left) {
                    self.push(run, offset(next));
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
                    self.push(run, offset(next));
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
        let memory = raw_memory(64 << 10, 4).expect("memory");
        let place = |number| number * (64 << 10);
        let mut run = RawRun {
            bytes: 8 << 20,
            block: 64 << 10,
            depth: 4,
            write: false,
            random: true,
            durable: false,
        };
        assert!(
            raw(&path, &run, &memory, &place).is_err(),
            "nothing to read"
        );
        run.write = true;
        assert!(raw(&path, &run, &memory, &place).expect("written").gbps > 0.0);
        run.durable = true;
        assert!(raw(&path, &run, &memory, &place).expect("written").gbps > 0.0);
        run.write = false;
        run.random = false;
        assert!(raw(&path, &run, &memory, &place).expect("read").gbps > 0.0);
        run.depth = raw_blocks(64 << 10, 4) + 1;
        let refused = raw(&path, &run, &memory, &place).expect_err("memory for less");
        assert_eq!(refused.kind(), OpenErrorKind::Invalid);
        run.block = 5;
        let refused = raw(&path, &run, &memory, &place).expect_err("no page");
        assert_eq!(refused.kind(), OpenErrorKind::Invalid);
    }
}
