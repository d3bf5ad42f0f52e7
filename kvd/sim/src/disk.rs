//! A simulated disk: a [`BlockIo`] with faults that follow from a seed.
//!
//! # Fault model
//!
//! - Operations under way are completed in any order, each after a time of its own. A few take a thousand times
//!   as long, and end.
//! - A **completed write** is seen by every later read. A **flush** makes durable what was completed before it began, and nothing else.
//! - After a **power cut**, each page that was not made durable is old, new, or torn at 512 bytes: any mix of old and new sectors. What
//!   was under way counts as not durable.
//! - After a **kill** of the process everything completed is there, durable or not; of writes under way, any sectors are.
//! - **Errors**: an operation fails with EIO once; a page fails every time; no write succeeds for lack of space. Of a failed write any
//!   sectors may have been written. After a failed flush, pages that were not durable may be old again.
//! - **Short** completions: the first part of the transfer was done.
//! - **Media faults**: a write is reported done and never happens; a write goes to another page; bits flip. A test that has them can ask
//!   whether there were any.
//! - **Planted**: flushes that do nothing. Checkers must find that.
//!
//! Deliberately absent: reads that give wrong bytes once and right bytes later; that is a bit flip that somebody mends.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kvd_nvme::io::{BlockIo, Buffer, Done, HostBytes, IoError, Op, PAGE};

use crate::rng::Rng;

const SECTOR: usize = 512;

/// Bytes that a simulated process and a simulated device share.
pub(crate) type SharedBytes = Arc<Mutex<Vec<u8>>>;

/// A part of a simulated arena: the driver keeps one handle, the operation has the other.
#[derive(Clone)]
pub struct SimHost {
    bytes: SharedBytes,
    from: usize,
    len: usize,
    hold: Arc<()>,
}

impl SimHost {
    /// Memory with these bytes, filled up to whole pages.
    pub fn new(mut bytes: Vec<u8>) -> Self {
        bytes.resize(bytes.len().next_multiple_of(PAGE), 0);
        let len = bytes.len();
        SimHost::part(Arc::new(Mutex::new(bytes)), 0, len)
    }

    /// A part of memory that others have, too.
    pub(crate) fn part(bytes: SharedBytes, from: usize, len: usize) -> Self {
        SimHost {
            bytes,
            from,
            len,
            hold: Arc::new(()),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<u8>> {
        self.bytes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is there.
    pub fn bytes(&self) -> Vec<u8> {
        self.lock()[self.from..self.from + self.len].to_vec()
    }

    fn put(&self, bytes: &[u8]) {
        self.lock()[self.from..self.from + bytes.len()].copy_from_slice(bytes);
    }

    /// Whether an operation may still use it.
    pub fn in_use(&self) -> bool {
        Arc::strong_count(&self.hold) > 1
    }
}

impl HostBytes for SimHost {
    fn len(&self) -> usize {
        self.len
    }

    fn read(&self, from: usize, bytes: usize, see: &mut dyn FnMut(&[u8])) {
        let all = &self.lock()[self.from..self.from + self.len];
        // In two pieces, as a ring of pages would be.
        let half = bytes / 2 / 16 * 16;
        see(&all[from..from + half]);
        see(&all[from + half..from + bytes]);
    }
}

/// How often what goes wrong: one operation in so many; 0 is never.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DiskFaults {
    /// EIO, once.
    pub eio: usize,
    /// EIO, and from then on always on that page.
    pub sticky: usize,
    /// Short completions.
    pub short: usize,
    /// Operations that take long.
    pub stall: usize,
    /// Writes that never happen.
    pub lost: usize,
    /// Writes that go elsewhere.
    pub misdirected: usize,
    /// No write succeeds.
    pub full: bool,
    /// Flushes do nothing. A planted mistake.
    pub deaf: bool,
}

/// A page as a flush found it.
type Snapshot = Vec<(u64, u64, Vec<u8>)>;

struct Flying {
    op: Op<SimHost>,
    ready_at: u64,
    snapshot: Snapshot,
}

struct Disk {
    rng: Rng,
    /// What reads see.
    seen: Vec<u8>,
    /// What a power cut leaves.
    stable: Vec<u8>,
    /// Pages in which the two may differ, and the number of the last write to each.
    dirty: BTreeMap<u64, u64>,
    writes: u64,
    under_way: Vec<Flying>,
    faults: DiskFaults,
    bad: BTreeSet<u64>,
    media: u64,
    now: u64,
    depth: usize,
    /// Reads into host memory show their first bytes before they are over.
    piecemeal: bool,
}

/// A handle to the disk. The disk outlives the store that drives it.
#[derive(Clone)]
pub struct SimDisk(Rc<RefCell<Disk>>);

impl SimDisk {
    /// An empty disk.
    pub fn new(seed: u64, bytes: u64) -> Self {
        SimDisk(Rc::new(RefCell::new(Disk {
            rng: Rng::new(seed, 0x6469_736b),
            seen: vec![0; bytes as usize],
            stable: vec![0; bytes as usize],
            dirty: BTreeMap::new(),
            writes: 0,
            under_way: Vec::new(),
            faults: DiskFaults::default(),
            bad: BTreeSet::new(),
            media: 0,
            now: 0,
            depth: 16,
            piecemeal: false,
        })))
    }

    /// From now on these things go wrong. Pages that fail every time work again when `sticky` is 0.
    pub fn set_faults(&self, faults: DiskFaults) {
        let mut disk = self.0.borrow_mut();
        disk.faults = faults;
        if faults.sticky == 0 {
            disk.bad.clear();
        }
    }

    /// Most operations at once.
    pub fn set_depth(&self, depth: usize) {
        self.0.borrow_mut().depth = depth;
    }

    /// Microseconds on the disk's clock, which goes on while somebody waits for it.
    pub fn now(&self) -> u64 {
        self.0.borrow().now
    }

    /// Lets time pass until `us`, unless it is later already.
    pub(crate) fn reach(&self, us: u64) {
        let mut disk = self.0.borrow_mut();
        disk.now = disk.now.max(us);
    }

    /// From now on, reads into host memory may show their first bytes before they are over.
    pub(crate) fn set_piecemeal(&self) {
        self.0.borrow_mut().piecemeal = true;
    }

    /// Lets time pass.
    pub fn pass(&self, us: u64) {
        self.0.borrow_mut().now += us;
    }

    /// Media faults so far: lost and misdirected writes, flipped bits.
    pub fn media_faults(&self) -> u64 {
        self.0.borrow().media
    }

    /// The process is gone. What was under way may have happened in part.
    pub fn kill(&self) {
        let disk = &mut *self.0.borrow_mut();
        disk.show_some();
        for flying in std::mem::take(&mut disk.under_way) {
            if let Op::Write { offset, buffer, .. } = &flying.op
                && !disk.rng.one_in(3)
            {
                disk.write_some(*offset, &contents(buffer));
            }
        }
    }

    /// The power is gone, and with it the process.
    pub fn power_cut(&self) {
        self.kill();
        let disk = &mut *self.0.borrow_mut();
        for page in std::mem::take(&mut disk.dirty).into_keys() {
            let mode = disk.rng.below(3);
            for sector in 0..PAGE / SECTOR {
                let from = page as usize * PAGE + sector * SECTOR;
                let keep = mode == 0 || mode == 1 && disk.rng.one_in(2);
                if keep {
                    let new = disk.seen[from..from + SECTOR].to_vec();
                    disk.stable[from..from + SECTOR].copy_from_slice(&new);
                }
            }
            let from = page as usize * PAGE;
            let left = disk.stable[from..from + PAGE].to_vec();
            disk.seen[from..from + PAGE].copy_from_slice(&left);
        }
    }

    /// Flips one bit, for good.
    pub fn flip(&self, offset: u64, bit: u32) {
        let disk = &mut *self.0.borrow_mut();
        disk.seen[offset as usize] ^= 1 << (bit % 8);
        disk.stable[offset as usize] = disk.seen[offset as usize];
        disk.media += 1;
    }

    /// A copy of all that reads would see.
    pub fn image(&self) -> Vec<u8> {
        self.0.borrow().seen.clone()
    }

    /// Puts another image in place.
    pub fn set_image(&self, image: &[u8]) {
        let disk = &mut *self.0.borrow_mut();
        disk.seen.copy_from_slice(image);
        disk.stable.copy_from_slice(image);
        disk.dirty.clear();
    }
}

fn contents(buffer: &Buffer<SimHost>) -> Vec<u8> {
    match buffer {
        Buffer::Own(own) => own.bytes().to_vec(),
        Buffer::Host(host) => host.bytes(),
    }
}

fn fill(buffer: &mut Buffer<SimHost>, bytes: &[u8]) {
    match buffer {
        Buffer::Own(own) => own.bytes_mut()[..bytes.len()].copy_from_slice(bytes),
        Buffer::Host(host) => host.put(bytes),
    }
}

fn eio() -> IoError {
    // EIO and ENOSPC by number: the same on every Linux.
    IoError::Os(rustix::io::Errno::IO)
}

impl Disk {
    fn hit(&mut self, one_in: usize) -> bool {
        one_in > 0 && self.rng.one_in(one_in)
    }

    fn put(&mut self, offset: u64, bytes: &[u8]) {
        let from = offset as usize;
        assert!(
            from + bytes.len() <= self.seen.len() && offset.is_multiple_of(PAGE as u64),
            "a write beyond the disk, or off its pages"
        );
        self.seen[from..from + bytes.len()].copy_from_slice(bytes);
        self.writes += 1;
        let pages = offset / PAGE as u64..(offset + bytes.len() as u64).div_ceil(PAGE as u64);
        for page in pages {
            self.dirty.insert(page, self.writes);
        }
    }

    /// Some sectors of a write.
    fn write_some(&mut self, offset: u64, bytes: &[u8]) {
        let mut mixed = self.seen[offset as usize..offset as usize + bytes.len()].to_vec();
        let mode = self.rng.below(3);
        for (old, new) in mixed.chunks_mut(SECTOR).zip(bytes.chunks(SECTOR)) {
            if mode == 0 || mode == 1 && self.rng.one_in(2) {
                old.copy_from_slice(new);
            }
        }
        self.put(offset, &mixed);
    }

    fn snapshot(&self) -> Snapshot {
        let page = |(page, version): (&u64, &u64)| {
            let from = *page as usize * PAGE;
            (*page, *version, self.seen[from..from + PAGE].to_vec())
        };
        self.dirty.iter().map(page).collect()
    }

    fn flush(&mut self, snapshot: Snapshot) -> Result<(), IoError> {
        if self.hit(self.faults.eio) {
            for page in std::mem::take(&mut self.dirty).into_keys() {
                if self.rng.one_in(4) {
                    let from = page as usize * PAGE;
                    let old = self.stable[from..from + PAGE].to_vec();
                    self.seen[from..from + PAGE].copy_from_slice(&old);
                } else {
                    self.writes += 1;
                    self.dirty.insert(page, self.writes);
                }
            }
            return Err(eio());
        }
        if self.faults.deaf {
            return Ok(());
        }
        for (page, version, bytes) in snapshot {
            let from = page as usize * PAGE;
            self.stable[from..from + PAGE].copy_from_slice(&bytes);
            if self.dirty.get(&page) == Some(&version) {
                self.dirty.remove(&page);
            }
        }
        Ok(())
    }

    /// What is wrong with a transfer: an error, or how many bytes of it are done.
    fn transfer(&mut self, offset: u64, len: usize, write: bool) -> Result<usize, IoError> {
        let pages = offset / PAGE as u64..(offset + len as u64).div_ceil(PAGE as u64);
        if self.hit(self.faults.sticky) {
            self.bad.insert(pages.start);
        }
        if self.bad.range(pages).next().is_some() || self.hit(self.faults.eio) {
            return Err(eio());
        }
        if write && self.faults.full {
            return Err(IoError::Os(rustix::io::Errno::NOSPC));
        }
        if self.hit(self.faults.short) {
            return Ok(self.rng.below(len / SECTOR) * SECTOR);
        }
        Ok(len)
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), IoError> {
        match self.transfer(offset, bytes.len(), true) {
            Err(error) => {
                self.write_some(offset, bytes);
                return Err(error);
            }
            Ok(got) if got < bytes.len() => {
                let from = offset as usize;
                let mut mixed = self.seen[from..from + bytes.len()].to_vec();
                mixed[..got].copy_from_slice(&bytes[..got]);
                self.put(offset, &mixed);
                let wanted = bytes.len();
                return Err(IoError::Short { got, wanted });
            }
            Ok(_) => {}
        }
        if self.hit(self.faults.lost) {
            self.media += 1;
            return Ok(());
        }
        if self.hit(self.faults.misdirected) {
            self.media += 1;
            let room = (self.seen.len() - bytes.len()) / PAGE;
            let elsewhere = (self.rng.below(room + 1) * PAGE) as u64;
            self.put(elsewhere, bytes);
            return Ok(());
        }
        self.put(offset, bytes);
        Ok(())
    }

    /// The first bytes of some reads that are under way.
    fn show_some(&mut self) {
        if !self.piecemeal {
            return;
        }
        for flying in &self.under_way {
            if let Op::Read { offset, buffer, .. } = &flying.op
                && let Buffer::Host(host) = buffer
                && self.rng.one_in(3)
            {
                let from = *offset as usize;
                let some = self.rng.below(host.len / SECTOR + 1) * SECTOR;
                host.put(&self.seen[from..from + some]);
            }
        }
    }

    fn complete(&mut self, flying: Flying) -> Done<SimHost> {
        match flying.op {
            Op::Read {
                token,
                offset,
                mut buffer,
            } => {
                let len = contents(&buffer).len();
                let done = self.transfer(offset, len, false);
                let got = *done.as_ref().unwrap_or(&0);
                let from = offset as usize;
                assert!(from + len <= self.seen.len(), "a read beyond the disk");
                fill(&mut buffer, &self.seen[from..from + got]);
                let result = match done {
                    Ok(got) if got < len => Err(IoError::Short { got, wanted: len }),
                    other => other.map(|_| ()),
                };
                let buffer = Some(buffer);
                Done {
                    token,
                    buffer,
                    result,
                }
            }
            Op::Write {
                token,
                offset,
                buffer,
            } => {
                let result = self.write(offset, &contents(&buffer));
                let buffer = Some(buffer);
                Done {
                    token,
                    buffer,
                    result,
                }
            }
            Op::Flush { token } => Done {
                token,
                buffer: None,
                result: self.flush(flying.snapshot),
            },
        }
    }
}

impl BlockIo for SimDisk {
    type Host = SimHost;

    fn start(&mut self, op: Op<SimHost>) {
        let disk = &mut *self.0.borrow_mut();
        assert!(disk.under_way.len() < disk.depth, "more than the depth");
        let mut ready_at = disk.now + disk.rng.range(5, 200);
        if disk.hit(disk.faults.stall) {
            ready_at += disk.rng.range(5_000, 200_000);
        }
        let snapshot = match op {
            Op::Flush { .. } => disk.snapshot(),
            _ => Vec::new(),
        };
        disk.under_way.push(Flying {
            op,
            ready_at,
            snapshot,
        });
    }

    fn poll(&mut self, wait: Duration, done: &mut Vec<Done<SimHost>>) {
        let disk = &mut *self.0.borrow_mut();
        let first = disk.under_way.iter().map(|f| f.ready_at).min();
        let until = disk.now + wait.as_micros() as u64;
        disk.now = disk.now.max(first.map_or(until, |first| first.min(until)));
        let (mut ready, waiting): (Vec<_>, Vec<_>) = std::mem::take(&mut disk.under_way)
            .into_iter()
            .partition(|flying| flying.ready_at <= disk.now);
        disk.under_way = waiting;
        disk.show_some();
        while !ready.is_empty() {
            let at = disk.rng.below(ready.len());
            let flying = ready.swap_remove(at);
            done.push(disk.complete(flying));
        }
    }

    fn depth(&self) -> usize {
        self.0.borrow().depth
    }

    /// Time stands still here: what is under way is never done.
    fn drain(self) -> Vec<u64> {
        self.0.borrow_mut().under_way.clear();
        Vec::new()
    }
}
