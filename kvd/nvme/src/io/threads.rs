//! The adapter for kernels and containers without io_uring: named threads, each making one call for each operation.
//!
//! A call that moves less than all is an error, as with the ring; it is not made again for the rest. The queue is bounded by the
//! depth. Deliberately absent: order. Operations that are under way together may be done in any.

use std::collections::VecDeque;
use std::os::fd::{AsFd, AsRawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use rustix::io::Errno;

use super::job::{Job, Verb};
use super::{ArenaRange, Backing, BlockIo, DEPTH_MAX, Done, IoError, Op, Waker};

/// Most threads.
pub const THREADS_MAX: usize = 64;
/// Longest wait in one call; a caller that wants more calls again.
const WAIT_MAX: Duration = Duration::from_secs(3600);
/// How long an end waits for calls that are under way. Their threads own the memory and end by themselves.
const PATIENCE: Duration = Duration::from_secs(30);

/// Moves pages by `pread` and `pwrite` on a pool of threads.
pub struct ThreadsIo {
    shared: Arc<Shared>,
    depth: usize,
    under_way: usize,
    threads: Vec<JoinHandle<()>>,
    patience: Duration,
}

struct Shared {
    state: Mutex<State>,
    /// There is a job, or no more will come.
    work: Condvar,
    /// Something is over, or somebody rang.
    over: Condvar,
    backing: Arc<Backing>,
}

#[derive(Default)]
struct State {
    jobs: VecDeque<Job<ArenaRange>>,
    /// Tokens of what threads are at.
    taken: Vec<u64>,
    done: Vec<Done<ArenaRange>>,
    rung: bool,
    closed: bool,
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
                    taken: Vec::with_capacity(THREADS_MAX),
                    ..State::default()
                }),
                work: Condvar::new(),
                over: Condvar::new(),
                backing,
            }),
            depth,
            under_way: 0,
            threads: Vec::new(),
            patience: PATIENCE,
        };
        for number in 0..threads.clamp(1, THREADS_MAX) {
            let shared = Arc::clone(&io.shared);
            let thread = std::thread::Builder::new()
                .name(format!("kvd-nvme-{number}"))
                .stack_size(128 << 10)
                .spawn(move || shared.work())?;
            io.threads.push(thread);
        }
        Ok(io)
    }

    /// Ends the threads, once; gives the tokens of what they are still at.
    fn end(&mut self) -> Vec<u64> {
        let mut state = self.shared.state.lock();
        if std::mem::replace(&mut state.closed, true) {
            return Vec::new();
        }
        // What no thread has taken yet was never begun.
        let never = std::mem::take(&mut state.jobs);
        self.shared.work.notify_all();
        self.shared
            .over
            .wait_while_for(&mut state, |state| !state.taken.is_empty(), self.patience);
        let left = state.taken.clone();
        drop(state);
        drop(never);
        if !left.is_empty() {
            tracing::error!(
                operations = left.len(),
                device = %self.shared.backing.path().display(),
                "calls are not over; their threads are left to end by themselves"
            );
            return left;
        }
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
        left
    }
}

/// A call that panics has failed, and its thread goes on. The kernel is not at its memory any more: the call is not under way.
fn outlive(token: u64, call: impl FnOnce() -> Done<ArenaRange>) -> Done<ArenaRange> {
    catch_unwind(AssertUnwindSafe(call)).unwrap_or_else(|_| {
        tracing::error!("a call of the store's device has failed by a bug");
        Done {
            token,
            buffer: None,
            result: Err(IoError::Os(Errno::IO)),
        }
    })
}

impl State {
    /// The next job, for a thread.
    fn take(&mut self) -> Option<Job<ArenaRange>> {
        let job = self.jobs.pop_front()?;
        self.taken.push(job.token);
        Some(job)
    }

    /// A thread is done with its job.
    fn give(&mut self, done: Done<ArenaRange>) {
        if let Some(at) = self.taken.iter().position(|token| *token == done.token) {
            self.taken.swap_remove(at);
        }
        self.done.push(done);
    }
}

impl Shared {
    fn work(&self) {
        let mut state = self.state.lock();
        loop {
            if state.closed {
                return;
            }
            let Some(job) = state.take() else {
                self.work.wait(&mut state);
                continue;
            };
            drop(state);
            let done = outlive(job.token, || self.perform(job));
            state = self.state.lock();
            state.give(done);
            self.over.notify_all();
        }
    }

    /// One call, whatever comes of it.
    fn perform(&self, mut job: Job<ArenaRange>) -> Done<ArenaRange> {
        let fd = self.backing.as_fd();
        if job.verb == Verb::Flush {
            let result = rustix::fs::fdatasync(fd).map_err(IoError::Os);
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

    fn drain(mut self) -> Vec<u64> {
        self.end()
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
        self.end();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::testing::{arena, scratch};
    use crate::io::{Buffer, PAGE};

    #[test]
    fn a_call_that_panics_has_failed_and_is_not_under_way() {
        let scratch = scratch();
        let backing = Arc::new(Backing::open(scratch.path(), Some(1 << 20)).expect("made"));
        let mut io = ThreadsIo::open(backing, 4, 1).expect("threads");
        io.end();
        io.patience = Duration::ZERO;
        let shared = Arc::clone(&io.shared);
        shared.state.lock().closed = false;
        io.start(Op::Flush { token: 1 });
        let job = shared.state.lock().take().expect("it is there");
        let done = outlive(job.token, || panic!("a bug"));
        shared.state.lock().give(done);
        let mut done = Vec::new();
        io.poll(Duration::ZERO, &mut done);
        let done: Vec<_> = done.iter().map(|d| (d.token, d.result.clone())).collect();
        assert_eq!(done, [(1, Err(IoError::Os(Errno::IO)))]);
        assert_eq!(io.drain(), [] as [u64; 0]);
    }

    #[test]
    fn a_call_that_is_not_over_is_told_and_one_that_was_never_begun_is_not() {
        let scratch = scratch();
        let backing = Arc::new(Backing::open(scratch.path(), Some(1 << 20)).expect("made"));
        let arena = arena(1 << 20);
        let range = |page: u64| {
            let range = ArenaRange::new(Arc::clone(&arena), page * PAGE as u64, PAGE);
            Buffer::Host(range.expect("inside"))
        };
        // The test is the thread: the device hangs as long as it likes.
        let mut io = ThreadsIo::open(backing, 4, 1).expect("threads");
        io.end();
        io.shared.state.lock().closed = false;
        io.patience = Duration::ZERO;
        for token in 1..4 {
            io.start(Op::Read {
                token,
                offset: 0,
                buffer: range(token),
            });
        }
        let shared = Arc::clone(&io.shared);
        let first = shared.state.lock().take().expect("the first");
        let second = shared.state.lock().take().expect("the second");
        let done = shared.perform(first);
        shared.state.lock().give(done);
        assert_eq!(io.drain(), [2]);
        let done = shared.perform(second);
        assert_eq!(done.result, Ok(()), "its memory was not given up");
    }
}
