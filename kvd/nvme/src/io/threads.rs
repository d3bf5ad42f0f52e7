//! The adapter for kernels and containers without io_uring: named threads, each making one call for each operation.
//!
//! A call that moves less than all is an error, as with the ring; it is not made again for the rest. The queue is bounded by the
//! depth. Deliberately absent: order. Operations that are under way together may be done in any.

use std::collections::VecDeque;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use rustix::io::Errno;

use super::job::{Job, Verb};
use super::{ArenaRange, Backing, BlockIo, DEPTH_MAX, Done, Op, Waker};

/// Most threads.
pub const THREADS_MAX: usize = 64;
/// Longest wait in one call; a caller that wants more calls again.
const WAIT_MAX: Duration = Duration::from_secs(3600);
/// How long a drop waits for calls that are under way. Their threads own the memory and end by themselves.
const PATIENCE: Duration = Duration::from_secs(30);

/// Moves pages by `pread` and `pwrite` on a pool of threads.
pub struct ThreadsIo {
    shared: Arc<Shared>,
    depth: usize,
    under_way: usize,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    state: Mutex<State>,
    /// There is a job, or no more will come.
    work: Condvar,
    /// Something is over, or somebody rang, or a thread has ended.
    over: Condvar,
    backing: Arc<Backing>,
}

#[derive(Default)]
struct State {
    jobs: VecDeque<Job<ArenaRange>>,
    done: Vec<Done<ArenaRange>>,
    rung: bool,
    closed: bool,
    alive: usize,
}

impl ThreadsIo {
    /// So many threads (1 to [`THREADS_MAX`]) named `kvd-nvme-N`, for at most `depth` operations on this device.
    ///
    /// # Errors
    /// When a thread can't be started.
    pub fn open(backing: Arc<Backing>, depth: usize, threads: usize) -> std::io::Result<Self> {
        let depth = depth.clamp(1, DEPTH_MAX);
        let mut io = Self {
            shared: Arc::new(Shared {
                state: Mutex::new(State {
                    jobs: VecDeque::with_capacity(depth),
                    ..State::default()
                }),
                work: Condvar::new(),
                over: Condvar::new(),
                backing,
            }),
            depth,
            under_way: 0,
            threads: Vec::new(),
        };
        for number in 0..threads.clamp(1, THREADS_MAX) {
            let shared = Arc::clone(&io.shared);
            shared.state.lock().alive += 1;
            let thread = std::thread::Builder::new()
                .name(format!("kvd-nvme-{number}"))
                .stack_size(128 << 10)
                .spawn(move || shared.work());
            match thread {
                Ok(thread) => io.threads.push(thread),
                Err(error) => {
                    io.shared.state.lock().alive -= 1;
                    return Err(error);
                }
            }
        }
        Ok(io)
    }
}

impl Shared {
    fn work(&self) {
        let mut state = self.state.lock();
        loop {
            if state.closed {
                state.alive -= 1;
                self.over.notify_all();
                return;
            }
            let Some(job) = state.jobs.pop_front() else {
                self.work.wait(&mut state);
                continue;
            };
            drop(state);
            let done = self.perform(job);
            state = self.state.lock();
            state.done.push(done);
            self.over.notify_all();
        }
    }

    /// One call, whatever comes of it.
    fn perform(&self, mut job: Job<ArenaRange>) -> Done<ArenaRange> {
        let fd = self.backing.as_fd();
        if job.verb == Verb::Flush {
            let result = rustix::fs::fdatasync(fd).map_err(super::IoError::Os);
            return job.done(result);
        }
        let Ok(offset) = libc::off_t::try_from(job.offset) else {
            return job.refused(Errno::INVAL);
        };
        let (len, raw) = (job.len(), fd.as_raw_fd());
        let address = job.address();
        let answer = loop {
            // SAFETY: `address` is good for `len` bytes while `job` owns its buffer, which is beyond this call; what others write
            // there meanwhile is copied by the kernel and never looked at as a reference.
            let moved = unsafe {
                if job.verb == Verb::Read {
                    libc::pread(raw, address.cast(), len, offset)
                } else {
                    libc::pwrite(raw, address.cast(), len, offset)
                }
            };
            match usize::try_from(moved) {
                Ok(moved) => break Ok(moved),
                Err(_) => match super::ring::errno(&std::io::Error::last_os_error()) {
                    // Nothing was moved.
                    Errno::INTR => {}
                    errno => break Err(errno),
                },
            }
        };
        let result = job.judge(answer);
        job.done(result)
    }
}

impl BlockIo for ThreadsIo {
    type Host = ArenaRange;

    fn start(&mut self, op: Op<ArenaRange>) {
        let job = Job::from(op);
        let refused = if self.under_way < self.depth {
            job.check(self.shared.backing.bytes())
        } else {
            Err(Errno::BUSY)
        };
        self.under_way += 1;
        let mut state = self.shared.state.lock();
        match refused {
            Ok(()) => {
                state.jobs.push_back(job);
                self.shared.work.notify_one();
            }
            Err(errno) => state.done.push(job.refused(errno)),
        }
    }

    fn poll(&mut self, wait: Duration, done: &mut Vec<Done<ArenaRange>>) {
        let mut state = self.shared.state.lock();
        if !wait.is_zero() {
            self.shared.over.wait_while_for(
                &mut state,
                |state| state.done.is_empty() && !state.rung,
                wait.min(WAIT_MAX),
            );
            state.rung = false;
        }
        self.under_way -= state.done.len();
        done.append(&mut state.done);
    }

    fn depth(&self) -> usize {
        self.depth
    }

    fn waker(&self) -> Option<Waker> {
        let shared = Arc::clone(&self.shared);
        Some(Waker(Arc::new(move || {
            shared.state.lock().rung = true;
            shared.over.notify_all();
        })))
    }
}

impl Drop for ThreadsIo {
    fn drop(&mut self) {
        let mut state = self.shared.state.lock();
        state.closed = true;
        // What no thread has taken yet was never begun.
        let never = std::mem::take(&mut state.jobs);
        self.shared.work.notify_all();
        let late = self
            .shared
            .over
            .wait_while_for(&mut state, |state| state.alive > 0, PATIENCE)
            .timed_out();
        let alive = state.alive;
        drop(state);
        drop(never);
        if late {
            tracing::error!(
                threads = alive,
                device = %self.shared.backing.path().display(),
                "calls are not over; their threads are left to end by themselves"
            );
            return;
        }
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}
