//! What a run hands back: a report, or a failure that says how to see it again.

use std::collections::BTreeMap;
use std::fmt;

use crate::options::Options;
use crate::rng::mix;

/// How often things happened, by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters(BTreeMap<&'static str, u64>);

impl Counters {
    pub(crate) fn add(&mut self, name: &'static str) {
        self.add_n(name, 1);
    }

    pub(crate) fn add_n(&mut self, name: &'static str, n: u64) {
        *self.0.entry(name).or_default() += n;
    }

    /// How often this happened.
    pub fn get(&self, name: &str) -> u64 {
        self.0.get(name).copied().unwrap_or(0)
    }

    /// All, by name.
    pub fn each(&self) -> impl Iterator<Item = (&'static str, u64)> + '_ {
        self.0.iter().map(|(name, n)| (*name, *n))
    }

    /// Adds another run's.
    pub fn merge(&mut self, other: &Counters) {
        for (name, n) in other.each() {
            self.add_n(name, n);
        }
    }
}

/// A run in which every invariant held.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// Digest of everything that happened, in order.
    pub event_log_hash: u64,
    /// Steps made, those of the quiet end included.
    pub steps: u64,
    /// What happened how often.
    pub counters: Counters,
}

/// An invariant that did not hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Broken {
    /// Its number in `docs/invariants.md`; 0: the world did not come to rest.
    pub(crate) invariant: u8,
    /// What was seen.
    pub(crate) text: String,
}

/// Most checks: all is well, or this is broken.
pub(crate) type Check<T = ()> = Result<T, Broken>;

/// Breaks the invariant with this number unless the condition holds.
macro_rules! ensure {
    ($condition:expr, $invariant:expr, $($text:tt)+) => {
        if !$condition {
            return Err($crate::report::Broken { invariant: $invariant, text: format!($($text)+) });
        }
    };
}
pub(crate) use ensure;

/// A run in which an invariant was broken. Prints what is needed to see it again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// How the run was made.
    pub options: Options,
    /// In which step it was seen.
    pub step: u64,
    /// Number of the invariant in `docs/invariants.md`; 0: the world did not come to rest after the faults had stopped.
    pub invariant: u8,
    /// What was seen.
    pub text: String,
    /// The last events before it.
    pub tail: Vec<String>,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.invariant {
            0 => write!(f, "not at rest")?,
            n => write!(f, "invariant {n} broken")?,
        }
        writeln!(
            f,
            " in step {} of ({}): {}",
            self.step, self.options, self.text
        )?;
        self.tail
            .iter()
            .try_for_each(|line| writeln!(f, "  {line}"))
    }
}

impl std::error::Error for Failure {}

/// Digest of all events, and the last of them in words.
#[derive(Debug)]
pub(crate) struct EventLog {
    hash: u64,
    tail: Vec<(u64, u64, &'static str, [u64; 3])>,
    next: usize,
    most: usize,
}

impl EventLog {
    /// Keeps the last `most` events in words.
    pub(crate) fn new(most: usize) -> Self {
        EventLog {
            hash: 0,
            tail: Vec::new(),
            next: 0,
            most: most.max(1),
        }
    }

    /// Adds an event.
    pub(crate) fn add(&mut self, step: u64, now: u64, what: &'static str, numbers: [u64; 3]) {
        let [a, b, c] = numbers;
        let first = what
            .as_bytes()
            .iter()
            .fold(0u64, |sum, b| sum.wrapping_mul(131) + u64::from(*b));
        self.hash = mix(&[self.hash, step, now, first, a, b, c]);
        let event = (step, now, what, numbers);
        if self.tail.len() < self.most {
            self.tail.push(event);
        } else {
            self.tail[self.next] = event;
        }
        self.next = (self.next + 1) % self.most;
    }

    pub(crate) fn hash(&self) -> u64 {
        self.hash
    }

    /// The last events, oldest first.
    pub(crate) fn words(&self) -> Vec<String> {
        let split = if self.tail.len() < self.most {
            0
        } else {
            self.next
        };
        let (new, old) = self.tail.split_at(split);
        old.iter()
            .chain(new)
            .map(|(step, now, what, [a, b, c])| {
                format!("{step:>7} {now:>10} us  {what} {a:x} {b:x} {c:x}")
            })
            .collect()
    }
}
