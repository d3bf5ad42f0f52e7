//! A fault adapter: another adapter, in front of which operations fail, come short or hang as told from outside. For black-box tests
//! and benches of the daemon, never for service; the daemon says at start that it runs with one.
//!
//! It is told by a handle ([`Faults`]) in the same process, or by a file that it looks at again whenever it is called. Deliberately
//! absent: corruption and lost or torn writes (those are made in the file itself, or in the simulator).

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;
use rustix::io::Errno;

use super::job::{Job, Verb};
use super::{BlockIo, Done, IoError, Op, PAGE, Waker};

/// How often a file is looked at while the caller sleeps.
const LOOK: Duration = Duration::from_millis(20);
/// Operations that [`Fault::PanicLate`] waits for, and those of them that fail: both parts of a block that is read.
const LATE: usize = 4;
const LATE_FAIL: usize = 2;

/// What becomes of an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Fault {
    /// It is done.
    #[default]
    None,
    /// It is not done, and comes back with this error.
    Error(Errno),
    /// It is not done, and comes back short, with nothing but its first page said to be moved.
    Short,
    /// It is kept until this changes.
    Stall,
    /// The thread panics, as it would for a bug.
    Panic,
    /// It is kept until there are four. Then two fail, the others are done, all come back together, and the thread panics in its next
    /// call: while it has these in hand.
    PanicLate,
}

/// What becomes of each kind of operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Rules {
    /// Of reads.
    pub read: Fault,
    /// Of writes.
    pub write: Fault,
    /// Of flushes.
    pub flush: Fault,
}

impl Rules {
    /// The same for all.
    pub fn all(fault: Fault) -> Self {
        Self {
            read: fault,
            write: fault,
            flush: fault,
        }
    }

    fn of(&self, verb: Verb) -> Fault {
        match verb {
            Verb::Read => self.read,
            Verb::Write => self.write,
            Verb::Flush => self.flush,
        }
    }

    /// Lines of an operation (`read`, `write`, `flush`, `all`) and a fault (`none`, `stall`, `short`, `panic`, `panic-late`, `eio`,
    /// `enospc`, or a number of an error). Later lines override; what is not named is done.
    ///
    /// # Errors
    /// With the line that is none of these.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut rules = Self::default();
        for line in text.lines().map(str::trim).filter(|l| !l.is_empty()) {
            let bad = || format!("no rule of faults: {line:?}");
            let (verb, fault) = line.split_once(' ').ok_or_else(bad)?;
            let fault = match fault.trim() {
                "none" => Fault::None,
                "stall" => Fault::Stall,
                "short" => Fault::Short,
                "panic" => Fault::Panic,
                "panic-late" => Fault::PanicLate,
                "eio" => Fault::Error(Errno::IO),
                "enospc" => Fault::Error(Errno::NOSPC),
                number => match number.parse::<u16>() {
                    Ok(number @ 1..4096) => {
                        Fault::Error(Errno::from_raw_os_error(i32::from(number)))
                    }
                    _ => return Err(bad()),
                },
            };
            match verb {
                "read" => rules.read = fault,
                "write" => rules.write = fault,
                "flush" => rules.flush = fault,
                "all" => rules = Self::all(fault),
                _ => return Err(bad()),
            }
        }
        Ok(rules)
    }
}

/// Tells a fault adapter what to do, from any thread.
#[derive(Clone)]
pub struct Faults {
    rules: Arc<Mutex<Rules>>,
    waker: Option<Waker>,
}

impl Faults {
    /// From now on. Operations that were kept are done, or fail, by the new rules.
    pub fn set(&self, rules: Rules) {
        *self.rules.lock() = rules;
        if let Some(waker) = &self.waker {
            (waker.0)();
        }
    }
}

/// The adapter.
pub struct Faulty<B: BlockIo> {
    inner: B,
    faults: Faults,
    file: Option<ControlFile>,
    kept: VecDeque<Job<B::Host>>,
    over: Vec<Done<B::Host>>,
    /// Handed to the inner adapter and not back yet.
    below: usize,
    /// The next call panics.
    doomed: bool,
}

struct ControlFile {
    path: PathBuf,
    seen: Option<(SystemTime, u64)>,
}

impl<B: BlockIo> Faulty<B> {
    /// Nothing fails until the handle says so.
    pub fn new(inner: B) -> (Self, Faults) {
        let faults = Faults {
            rules: Arc::default(),
            waker: inner.waker(),
        };
        let handle = faults.clone();
        let io = Self {
            inner,
            faults,
            file: None,
            kept: VecDeque::new(),
            over: Vec::new(),
            below: 0,
            doomed: false,
        };
        (io, handle)
    }

    /// What fails is said by a file (see [`Rules::parse`]); nothing while there is none.
    pub fn with_file(inner: B, path: &Path) -> Self {
        let (mut io, _) = Self::new(inner);
        io.file = Some(ControlFile {
            path: path.to_owned(),
            seen: None,
        });
        io
    }

    /// What does the work.
    pub fn inner(&self) -> &B {
        &self.inner
    }

    /// What does the work.
    pub fn inner_mut(&mut self) -> &mut B {
        &mut self.inner
    }

    fn under_way(&self) -> usize {
        self.below + self.kept.len() + self.over.len()
    }

    fn look(&mut self) {
        if self.doomed {
            panic!("the rules of faults say so");
        }
        let Some(file) = &mut self.file else {
            return;
        };
        let found = std::fs::metadata(&file.path)
            .ok()
            .and_then(|m| Some((m.modified().ok()?, m.len())));
        if found == file.seen {
            return;
        }
        file.seen = found;
        let text = std::fs::read_to_string(&file.path).unwrap_or_default();
        match Rules::parse(&text) {
            Ok(rules) => *self.faults.rules.lock() = rules,
            Err(error) => tracing::error!(error, "the file of faults is not followed"),
        }
    }

    /// Does with it what the rules say.
    fn judge(&mut self, job: Job<B::Host>, rules: Rules) {
        match rules.of(job.verb) {
            Fault::None => {
                self.below += 1;
                self.inner.start(job.into_op());
            }
            Fault::Error(errno) => self.over.push(job.refused(errno)),
            Fault::Short => {
                let wanted = job.bytes();
                let got = if wanted > PAGE { PAGE } else { 0 };
                self.over
                    .push(job.done(Err(IoError::Short { got, wanted })));
            }
            Fault::Stall | Fault::PanicLate => self.kept.push_back(job),
            Fault::Panic => panic!("the rules of faults say so"),
        }
    }

    /// Once there are enough that are to be followed by a panic, has them all done.
    fn be_late(&mut self, rules: Rules, done: &mut Vec<Done<B::Host>>) {
        let late = |job: &Job<B::Host>| rules.of(job.verb) == Fault::PanicLate;
        if self.kept.iter().filter(|job| late(job)).count() < LATE {
            return;
        }
        self.doomed = true;
        let (all, others) = self.kept.drain(..).partition::<VecDeque<_>, _>(late);
        self.kept = others;
        for (n, job) in all.into_iter().enumerate() {
            if n < LATE_FAIL {
                self.over.push(job.refused(Errno::IO));
            } else {
                self.below += 1;
                self.inner.start(job.into_op());
            }
        }
        while self.below > 0 {
            self.poll_below(LOOK, done);
        }
    }

    fn poll_below(&mut self, wait: Duration, done: &mut Vec<Done<B::Host>>) {
        let before = done.len();
        self.inner.poll(wait, done);
        self.below -= done.len() - before;
    }
}

impl<B: BlockIo> BlockIo for Faulty<B> {
    type Host = B::Host;

    fn start(&mut self, op: Op<B::Host>) {
        self.look();
        let job = Job::from(op);
        if self.under_way() >= self.depth() {
            self.over.push(job.refused(Errno::BUSY));
            return;
        }
        let rules = *self.faults.rules.lock();
        self.judge(job, rules);
    }

    fn poll(&mut self, wait: Duration, done: &mut Vec<Done<B::Host>>) {
        self.look();
        let rules = *self.faults.rules.lock();
        for _ in 0..self.kept.len() {
            if let Some(job) = self.kept.pop_front() {
                self.judge(job, rules);
            }
        }
        self.be_late(rules, done);
        let wait = match (&self.file, self.over.is_empty()) {
            (_, false) => Duration::ZERO,
            (Some(_), true) => wait.min(LOOK),
            (None, true) => wait,
        };
        done.append(&mut self.over);
        self.poll_below(wait, done);
    }

    fn depth(&self) -> usize {
        self.inner.depth()
    }

    /// What is kept counts as with the device, which hangs.
    fn drain(self) -> Vec<u64> {
        let Self { inner, kept, .. } = self;
        let mut left = inner.drain();
        left.extend(kept.iter().map(|job| job.token));
        left
    }

    fn waker(&self) -> Option<Waker> {
        self.inner.waker()
    }
}
