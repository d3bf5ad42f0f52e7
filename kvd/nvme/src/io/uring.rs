//! The io_uring adapter: one ring, one registered file, direct I/O, arenas as fixed buffers.
//!
//! The ring belongs to the first thread that starts or polls. Operations are handed to the kernel together, in the next poll or when
//! they are many bytes. What they read or write is kept here until the kernel says that it is over, also when the adapter is dropped: a
//! kernel must never write into freed memory. Deliberately absent: polling threads of the kernel (they burn a core for nothing gained) and polled
//! completions (a device may take them at setup and refuse them at the first read).

use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::time::Duration;

use io_uring::{IoUring, opcode, squeue, types};
use kvd_arena::Arena;
use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;

use super::bell::Bell;
use super::fixed::FixedTable;
use super::job::{Job, Verb};
use super::parts::{Parted, places, room};
use super::ring::{answer, begin, build, errno, probe};
use super::{ArenaRange, Backing, BlockIo, Buffer, DEPTH_MAX, Done, FixedReport, Op, PAGE, Waker};

const FILE: types::Fixed = types::Fixed(0);
const DOORBELL: u64 = u64::MAX;
const NOTHING: u64 = u64::MAX - 1;
/// Bytes that are handed to the kernel in one call, about. Of neighbours in one call it makes operations of up to 4 MiB: with so few for
/// the device, loads of 1 MiB blocks one after the other took a fifth longer (huge pages, where memory does not bound an operation).
const HAND_OVER: usize = 1 << 20;
/// Longest wait in one call; a caller that wants more calls again.
const WAIT_MAX: Duration = Duration::from_secs(3600);
/// How long the next try is put off when the kernel takes nothing.
const RETRY: Duration = Duration::from_millis(10);
/// How many seconds an end waits for operations before it gives their memory up for lost.
const PATIENCE: u32 = 30;

/// Moves pages by io_uring.
pub struct UringIo {
    // Always there, except once it has ended.
    core: Option<Core>,
    patience: u32,
}

/// All that the kernel may still use. Fields are dropped in this order, the ring first.
struct Core {
    ring: IoUring,
    jobs: Vec<Option<Parted>>,
    free: Vec<u32>,
    refused: Vec<Done<ArenaRange>>,
    /// Bytes of operations that are not handed over.
    queued: usize,
    fixed: FixedTable,
    bell: Arc<Bell>,
    /// Parts of operations under way beyond one of each.
    more: usize,
    /// Whether the ring listens to the bell.
    armed: bool,
    /// Whether an operation can be over without a word (from Linux 5.17 on).
    pairs: bool,
    begun: bool,
    broken: Option<Errno>,
    backing: Arc<Backing>,
}

impl UringIo {
    /// A ring for at most `depth` operations on this device, after one that has read from it.
    ///
    /// # Errors
    /// With the reason why there is none, and what to do.
    pub fn open(backing: Arc<Backing>, depth: usize) -> Result<Self, String> {
        probe(&backing)?;
        let depth = depth.clamp(1, DEPTH_MAX) as u32;
        let ring = build(places(depth))?;
        let submitter = ring.submitter();
        submitter
            .register_files(&[backing.as_fd().as_raw_fd()])
            .map_err(|e| format!("io_uring takes no file: {}", errno(&e)))?;
        let fixed = FixedTable::new(&submitter);
        let bell = Bell::new().map_err(|e| format!("no eventfd for a doorbell: {e}"))?;
        let core = Core {
            jobs: (0..depth).map(|_| None).collect(),
            free: (0..depth).rev().collect(),
            refused: Vec::new(),
            queued: 0,
            more: 0,
            fixed,
            bell: Arc::new(bell),
            armed: false,
            pairs: ring.params().is_feature_skip_cqe_on_success(),
            begun: false,
            broken: None,
            backing,
            ring,
        };
        Ok(Self {
            core: Some(core),
            patience: PATIENCE,
        })
    }

    /// How much of the arenas is pinned, and why not more.
    pub fn fixed(&self) -> &FixedReport {
        self.core().fixed.report()
    }

    /// Unpins an arena; what is used of it again is pinned again. For a region whose checksums keep failing: after a hole was
    /// punched, what is mapped and what is pinned are different pages.
    pub fn forget(&mut self, arena: &Arc<Arena>) {
        let core = self.core_mut();
        core.begin();
        core.fixed.forget(&core.ring.submitter(), arena);
    }

    fn core(&self) -> &Core {
        self.core.as_ref().expect("not ended")
    }

    fn core_mut(&mut self) -> &mut Core {
        self.core.as_mut().expect("not ended")
    }

    /// Waits for what is under way, once; gives the tokens of what still is.
    fn end(&mut self) -> Vec<u64> {
        let Some(core) = self.core.take() else {
            return Vec::new();
        };
        // Nor does a panic here free what the kernel may use.
        let mut core = ManuallyDrop::new(core);
        core.drain(self.patience);
        let left: Vec<u64> = core.under_way().map(Parted::token).collect();
        // The kernel takes a ring down later than this, and until then a device that it has would be in use.
        let _ = core.ring.submitter().unregister_files();
        if left.is_empty() {
            drop(ManuallyDrop::into_inner(core));
        } else {
            tracing::error!(
                operations = left.len(),
                device = %core.backing.path().display(),
                "operations are not over; their memory is given up, because the device may still write it"
            );
        }
        left
    }
}

impl Core {
    /// Makes the calling thread the ring's own, once.
    fn begin(&mut self) {
        if !self.begun {
            self.begun = true;
            if let Err(errno) = begin(&self.ring) {
                self.fail(errno);
            }
            self.arm();
        }
    }

    fn fail(&mut self, errno: Errno) {
        tracing::error!(%errno, device = %self.backing.path().display(), "the ring is broken");
        self.broken = Some(errno);
    }

    fn start(&mut self, op: Op<ArenaRange>) {
        self.begin();
        let job = Job::from(op);
        let refused = self
            .broken
            .map_or_else(|| job.check(self.backing.bytes()), Err);
        if let Err(errno) = refused {
            self.refused.push(job.refused(errno));
            return;
        }
        let Some(place) = self.free.pop() else {
            self.refused.push(job.refused(Errno::BUSY));
            return;
        };
        let fixed = match &job.buffer {
            Some(Buffer::Host(range)) => self.fixed.index(&self.ring.submitter(), range),
            _ => None,
        };
        let (verb, len, room) = (job.verb, job.len(), self.room());
        let parted = self.jobs[place as usize].insert(Parted::new(job, room));
        self.more += parted.parts().count() - 1;
        let (start, offset) = (parted.job().address(), parted.job().offset);
        for part in parted.parts() {
            let address = start.wrapping_add(part.at);
            let (len, offset) = (part.len as u32, offset + part.at as u64);
            let entry = match (verb, fixed) {
                (Verb::Read, Some(index)) => opcode::ReadFixed::new(FILE, address, len, index)
                    .offset(offset)
                    .build(),
                (Verb::Read, None) => opcode::Read::new(FILE, address, len).offset(offset).build(),
                (Verb::Write, Some(index)) => opcode::WriteFixed::new(FILE, address, len, index)
                    .offset(offset)
                    .build(),
                (Verb::Write, None) => opcode::Write::new(FILE, address, len)
                    .offset(offset)
                    .build(),
                (Verb::Flush, _) => opcode::Fsync::new(FILE)
                    .flags(types::FsyncFlags::DATASYNC)
                    .build(),
            };
            // SAFETY: the address is of a buffer that `jobs` owns and nobody touches until the completions of all parts have been
            // seen; `jobs` is dropped only when nothing is under way (see `UringIo::end`).
            unsafe { self.push(&entry.user_data(u64::from(place))) };
        }
        self.queued += len;
        // A page alone may be the header of what comes next.
        if self.queued >= HAND_OVER && len > PAGE {
            let _ = self.enter(None);
        }
    }

    /// How many parts the next operation may have.
    fn room(&mut self) -> usize {
        let answers = self.ring.params().cq_entries() as usize - self.more;
        let queue = self.ring.submission();
        let places = queue.capacity() - queue.len();
        room(places.min(answers), self.jobs.len())
    }

    /// Has the bell wait in the ring.
    fn arm(&mut self) {
        if self.broken.is_some() {
            return;
        }
        let fd = types::Fd(self.bell.as_fd().as_raw_fd());
        // One shot: an eventfd that doesn't block can't be read through a ring that is to wait for it.
        let listen = opcode::PollAdd::new(fd, u32::from(PollFlags::IN.bits())).build();
        // SAFETY: points to nothing.
        unsafe { self.push(&listen.user_data(DOORBELL)) };
        self.armed = true;
    }

    /// # Safety
    /// What the entry points to stays until its completion.
    unsafe fn push(&mut self, entry: &squeue::Entry) {
        // SAFETY: promised by the caller.
        let pushed = unsafe { self.ring.submission().push(entry) };
        pushed.expect("the queue has a place for each operation and the bell");
    }

    /// Takes what has completed. Whether there was anything, the bell included.
    fn reap(&mut self, mut over: impl FnMut(Done<ArenaRange>)) {
        let mut rung = false;
        for entry in self.ring.completion() {
            if entry.user_data() == DOORBELL {
                rung = true;
                continue;
            }
            if entry.user_data() == NOTHING {
                continue;
            }
            let place = entry.user_data() as u32;
            let under_way = &mut self.jobs[place as usize];
            let parted = under_way.as_mut().expect("one completion for each part");
            if parted.over(answer(entry.result()))
                && let Some(parted) = under_way.take()
            {
                self.free.push(place);
                self.more -= parted.parts().count() - 1;
                over(parted.done());
            }
        }
        if rung {
            self.bell.quiet();
            self.armed = false;
        }
    }

    /// Two operations are handed over as three: of fewer the kernel makes no batch (`io_submit_state_start`, to 6.18 at least), and only
    /// within a batch does it make one operation for the device of two that lie side by side, as a block's header and its bytes.
    fn pair(&mut self) {
        if self.pairs && self.ring.submission().len() == 2 {
            let nothing = opcode::Nop::new()
                .build()
                .flags(squeue::Flags::SKIP_SUCCESS);
            // SAFETY: points to nothing.
            unsafe { self.push(&nothing.user_data(NOTHING)) };
        }
    }

    /// Hands over what was started, and lets the kernel complete what it can. Waits for one completion if told to.
    fn enter(&mut self, wait: Option<Duration>) -> Result<(), Errno> {
        if self.broken.is_some() {
            return Ok(());
        }
        self.pair();
        self.queued = 0;
        let entered = match wait {
            Some(wait) => {
                let wait = wait.min(WAIT_MAX);
                let limit = types::Timespec::new()
                    .sec(wait.as_secs())
                    .nsec(wait.subsec_nanos());
                let args = types::SubmitArgs::new().timespec(&limit);
                self.ring.submitter().submit_with_args(1, &args)
            }
            None => {
                let queue = self.ring.submission();
                if queue.is_empty() && !queue.taskrun() && !queue.cq_overflow() {
                    return Ok(());
                }
                drop(queue);
                self.ring.submit()
            }
        };
        match entered.map_err(|e| errno(&e)) {
            Ok(_) => Ok(()),
            Err(e @ (Errno::INTR | Errno::TIME | Errno::AGAIN | Errno::BUSY)) => Err(e),
            Err(e) => {
                self.fail(e);
                Err(e)
            }
        }
    }

    /// Sleeps on the bell alone, for a ring that does not work.
    fn sleep_outside(&self, wait: Duration) {
        let wait = wait.min(WAIT_MAX);
        let limit = rustix::time::Timespec {
            tv_sec: wait.as_secs() as i64,
            tv_nsec: i64::from(wait.subsec_nanos()),
        };
        let mut bell = [PollFd::new(&*self.bell, PollFlags::IN)];
        if let Ok(1..) = rustix::event::poll(&mut bell, Some(&limit)) {
            self.bell.quiet();
        }
    }

    fn poll(&mut self, wait: Duration, done: &mut Vec<Done<ArenaRange>>) {
        self.begin();
        self.fixed.sweep(&self.ring.submitter());
        let before = done.len();
        done.append(&mut self.refused);
        self.reap(|over| done.push(over));
        if !self.armed {
            self.arm();
        }
        // What was started while something was over, and before a sleep, goes to the kernel together.
        if wait.is_zero() || done.len() > before || !self.bell.sleep() {
            let _ = self.enter(None);
            self.reap(|over| done.push(over));
            return;
        }
        let entered = self.enter(Some(wait));
        if self.broken.is_some() {
            self.sleep_outside(wait);
        } else if let Err(Errno::AGAIN | Errno::BUSY) = entered {
            // The kernel has no memory for it just now, and has not waited.
            self.sleep_outside(wait.min(RETRY));
        }
        self.bell.woke();
        self.reap(|over| done.push(over));
    }

    fn under_way(&self) -> impl Iterator<Item = &Parted> {
        self.jobs.iter().flatten()
    }

    /// Waits until nothing is under way, for so many seconds at most.
    fn drain(&mut self, mut patience: u32) {
        loop {
            self.reap(drop);
            if self.under_way().next().is_none() || self.broken.is_some() || patience == 0 {
                return;
            }
            match self.enter(Some(Duration::from_secs(1))) {
                Ok(()) | Err(Errno::INTR) => {}
                Err(Errno::TIME) => patience -= 1,
                Err(_) => {
                    self.sleep_outside(Duration::from_secs(1));
                    patience -= 1;
                }
            }
        }
    }
}

impl BlockIo for UringIo {
    type Host = ArenaRange;

    fn start(&mut self, op: Op<ArenaRange>) {
        self.core_mut().start(op);
    }

    fn poll(&mut self, wait: Duration, done: &mut Vec<Done<ArenaRange>>) {
        self.core_mut().poll(wait, done);
    }

    fn depth(&self) -> usize {
        self.core().jobs.len()
    }

    fn drain(mut self) -> Vec<u64> {
        self.end()
    }

    fn waker(&self) -> Option<Waker> {
        let bell = Arc::clone(&self.core().bell);
        Some(Waker(Arc::new(move || bell.ring())))
    }
}

impl Drop for UringIo {
    fn drop(&mut self) {
        self.end();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::testing::{arena, fill, scratch};
    use crate::io::{Aligned, IoError};

    fn open(backing: &Arc<Backing>, depth: usize) -> UringIo {
        UringIo::open(Arc::clone(backing), depth).expect("io_uring works here")
    }

    fn write(offset: u64, buffer: Buffer<ArenaRange>) -> Op<ArenaRange> {
        Op::Write {
            token: offset,
            offset,
            buffer,
        }
    }

    fn wait(io: &mut UringIo, wanted: usize) -> Vec<Done<ArenaRange>> {
        let mut done = Vec::new();
        while done.len() < wanted {
            io.poll(Duration::from_secs(10), &mut done);
        }
        done
    }

    #[test]
    fn arenas_are_pinned_as_they_are_used_and_let_go_when_they_are_gone() {
        let scratch = scratch();
        let backing = Arc::new(Backing::open(scratch.path(), Some(1 << 20)).expect("made"));
        let mut io = open(&backing, 4);
        let arena = arena(4 << 20);
        let range = |offset, len| {
            let range = ArenaRange::new(Arc::clone(&arena), offset, len).expect("inside");
            fill(&range, &vec![7; len]);
            Buffer::Host(range)
        };
        io.start(write(0, range(0, 8192)));
        io.start(write(8192, range((1 << 20) - 4096, 8192)));
        let done = wait(&mut io, 2);
        assert!(
            done.iter().all(|d| d.result.is_ok()),
            "one across two pieces is plain"
        );
        drop(done);
        let report = io.fixed().clone();
        if report.refused.is_none() {
            assert_eq!(report.bytes, 1 << 20, "one extent");
            io.forget(&arena);
            assert_eq!(io.fixed().bytes, 0);
            io.start(write(0, range(2 << 20, 4096)));
            drop(wait(&mut io, 1));
            assert_eq!(io.fixed().bytes, 1 << 20, "and again");
        }
        drop(arena);
        io.poll(Duration::ZERO, &mut Vec::new());
        assert_eq!(io.fixed().bytes, 0);
    }

    #[test]
    fn a_low_limit_of_pinned_memory_costs_the_fixed_buffers_and_nothing_else() {
        use rustix::process::{Resource, getrlimit};
        use rustix::thread::{CapabilitySet, capabilities, set_capabilities};
        let limit = getrlimit(Resource::Memlock).current.unwrap_or(u64::MAX);
        if !(1 << 20..64 << 20).contains(&limit) {
            return;
        }
        let thread = std::thread::Builder::new().name("kvd-test-limit".to_owned());
        let limited = thread.spawn(|| {
            let mut mine = capabilities(None).expect("known");
            mine.effective.remove(CapabilitySet::IPC_LOCK);
            set_capabilities(None, mine).expect("fewer are always allowed");
            let scratch = scratch();
            let backing = Arc::new(Backing::open(scratch.path(), Some(1 << 20)).expect("made"));
            let mut io = open(&backing, 4);
            let arena = arena(64 << 20);
            for extent in 0..64 {
                let range = ArenaRange::new(Arc::clone(&arena), extent << 20, 8192);
                io.start(write(0, Buffer::Host(range.expect("inside"))));
                assert_eq!(wait(&mut io, 1)[0].result, Ok(()));
            }
            io.fixed().clone()
        });
        let report = limited.expect("a thread").join().expect("no panic");
        assert_eq!(report.bytes, 0, "what was pinned is given back");
        let reason = report.refused.expect("64 MiB are above the limit");
        assert!(reason.contains("memlock limit"), "{reason}");
    }

    #[test]
    fn what_is_much_is_handed_over_before_more_comes_but_no_header_without_its_block() {
        let scratch = scratch();
        let backing = Arc::new(Backing::open(scratch.path(), Some(8 << 20)).expect("made"));
        let arena = arena(8 << 20);
        let mut io = open(&backing, 8);
        let mut queued = |offset: usize, len| {
            let range = ArenaRange::new(Arc::clone(&arena), offset as u64, len);
            io.start(write(offset as u64, Buffer::Host(range.expect("inside"))));
            let core = io.core_mut();
            assert_eq!(core.ring.submission().is_empty(), core.queued == 0);
            core.queued
        };
        let most = HAND_OVER - PAGE;
        assert_eq!(queued(0, PAGE), PAGE);
        assert_eq!(queued(PAGE, most), 0, "a block and its header");
        assert_eq!(queued(HAND_OVER, most), most);
        assert_eq!(queued(2 * HAND_OVER, PAGE), HAND_OVER, "a header waits");
        assert_eq!(queued(2 * HAND_OVER + PAGE, PAGE * 2), 0);
        let done = wait(&mut io, 5);
        assert!(done.iter().all(|done| done.result == Ok(())));
    }

    #[test]
    fn an_end_without_patience_or_with_a_broken_ring_leaves_the_memory_to_the_kernel() {
        let scratch = scratch();
        let backing = Arc::new(Backing::open(scratch.path(), Some(8 << 20)).expect("made"));
        let arena = arena(8 << 20);
        for how in 0..3 {
            let mut io = open(&backing, 8);
            let tokens: Vec<u64> = (0..8).map(|at| at << 20).collect();
            for at in &tokens {
                let range = ArenaRange::new(Arc::clone(&arena), *at, 1 << 20);
                io.start(write(*at, Buffer::Host(range.expect("inside"))));
            }
            match how {
                0 => io.patience = 0,
                1 => io.core_mut().broken = Some(Errno::BADF),
                _ => {
                    let before = Arc::strong_count(&arena);
                    assert_eq!(io.drain(), [0; 0], "with patience nothing is left");
                    assert_eq!(Arc::strong_count(&arena), before - 8);
                    continue;
                }
            }
            let before = Arc::strong_count(&arena);
            assert_eq!(io.drain(), tokens, "all of them");
            assert_eq!(Arc::strong_count(&arena), before, "their memory stays");
        }
    }

    #[test]
    fn a_ring_that_belongs_to_another_thread_refuses_and_does_not_spin() {
        let scratch = scratch();
        let backing = Arc::new(Backing::open(scratch.path(), Some(1 << 20)).expect("made"));
        let mut io = open(&backing, 2);
        io.poll(Duration::ZERO, &mut Vec::new());
        let waker = io.waker().expect("one");
        let thread = std::thread::Builder::new().name("kvd-test-other".to_owned());
        let other = thread.spawn(move || {
            io.start(write(0, Buffer::Own(Aligned::new(1))));
            let mut done = Vec::new();
            io.poll(Duration::ZERO, &mut done);
            io.start(write(0, Buffer::Own(Aligned::new(1))));
            io.poll(Duration::ZERO, &mut done);
            waker.0();
            io.poll(Duration::from_secs(60), &mut Vec::new());
            done.into_iter().map(|d| d.result).collect::<Vec<_>>()
        });
        let results = other.expect("a thread").join().expect("no panic");
        assert!(
            matches!(
                results[..],
                [] | [Err(IoError::Os(Errno::EXIST))] | [Ok(()), ..]
            ),
            "{results:?}"
        );
    }
}
