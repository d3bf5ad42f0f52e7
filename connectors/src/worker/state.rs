//! What the engine's thread and the copy threads share: which requests have copies under way, what is over, counters.

use std::collections::{HashMap, VecDeque};

use kvd_client::{ErrorKind, FailReason, LoadOutcome, StoreOutcome, Ticket, reply};
use kvd_wire::session::CommitState;
use parking_lot::{Condvar, Mutex};

use crate::observed::{self, Observed};

/// Most commits whose replies are waited for; they only feed counters.
const COMMITS: usize = 4096;

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// Counters of a rank since its start.
        #[derive(Debug, Default, Clone, PartialEq, Eq)]
        pub struct Counters {
            $($(#[$doc])* pub $name: u64,)*
        }

        impl Counters {
            /// Their names, in the order of [`Counters::values`].
            pub fn names() -> &'static [&'static str] {
                &[$(stringify!($name),)*]
            }

            /// Their values.
            pub fn values(&self) -> Vec<u64> {
                vec![$(self.$name,)*]
            }
        }
    };
}

counters! {
    /// Blocks whose part was copied out.
    copied_blocks,
    /// Bytes of those.
    copied_bytes,
    /// Of those blocks: visible to others.
    visible_blocks,
    /// Of those: parts of other ranks were still missing.
    waiting_blocks,
    /// Of those: the reservation was gone.
    stale_blocks,
    /// Blocks not copied: other connection, reservation gone, queue full, or no daemon.
    dropped_blocks,
    /// Blocks copied in and found right.
    loaded_blocks,
    /// Bytes of those.
    loaded_bytes,
    /// Blocks that could not be loaded: not there any more.
    load_absent,
    /// Blocks that could not be loaded: bytes did not match their checksum.
    load_corrupt,
    /// Blocks that could not be loaded: no answer in time.
    load_timeout,
    /// Blocks that could not be loaded: any other reason.
    load_failed,
}

/// What is over.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Results {
    /// Finished requests out of whose blocks no copy is under way.
    pub sent: Vec<String>,
    /// Requests whose loads are over, well or not.
    pub received: Vec<String>,
    /// The engine's numbers of blocks that could not be loaded, where the others can be used.
    pub invalid: Vec<u32>,
    /// Of the received: requests whose loads failed, where one block that lacks spoils the rest
    /// ([`crate::meta::RankHello::fails_as_a_whole`]).
    pub failed: Vec<String>,
}

#[derive(Default)]
struct Inner {
    /// Stores not over, by request: one for each group of each order.
    open: HashMap<String, usize>,
    /// Loads not over, by request: one for each group, and whether one of them went wrong.
    loads: HashMap<String, (usize, bool)>,
    /// Finished requests still to be reported.
    finishing: Vec<String>,
    done: Vec<u64>,
    results: Results,
    counters: Counters,
    /// What the engine's metrics know of the counters, and what they don't know of the times (us) that stores and loads took.
    told: Counters,
    store_times: Vec<u32>,
    load_times: Vec<u32>,
    commits: VecDeque<Ticket>,
}

/// See the module.
#[derive(Default)]
pub(crate) struct Shared {
    inner: Mutex<Inner>,
    closed_one: Condvar,
    /// Of a load that lacks a block nothing can be used.
    whole: bool,
}

impl Shared {
    pub(crate) fn new(whole: bool) -> Self {
        Shared {
            whole,
            ..Shared::default()
        }
    }

    /// An order to store blocks of one group of this request has come.
    pub(crate) fn open_store(&self, request: &str) {
        let mut inner = self.inner.lock();
        match inner.open.get_mut(request) {
            Some(open) => *open += 1,
            None => {
                inner.open.insert(request.to_owned(), 1);
            }
        }
    }

    /// A load has come.
    pub(crate) fn open_load(&self, request: &str) {
        let mut inner = self.inner.lock();
        inner.loads.entry(request.to_owned()).or_default().0 += 1;
    }

    fn wait(&self, over: impl Fn(&Inner) -> bool) {
        let mut inner = self.inner.lock();
        while !over(&inner) {
            self.closed_one.wait(&mut inner);
        }
    }

    /// Waits until nothing is under way.
    pub(crate) fn wait_idle(&self) {
        self.wait(|inner| inner.open.is_empty() && inner.loads.is_empty());
    }

    /// An order is over for one of its groups: copied or given up.
    pub(crate) fn store_over(&self, request: &str, order: u64) {
        let mut inner = self.inner.lock();
        inner.done.push(order);
        if let Some(open) = inner.open.get_mut(request) {
            *open -= 1;
            if *open == 0 {
                inner.open.remove(request);
            }
        }
        drop(inner);
        self.closed_one.notify_all();
    }

    /// Waits until no store of this request is under way. They wait for the engine's work that fills their blocks, which was asked of
    /// it before, and are short themselves.
    pub(crate) fn wait_for_stores(&self, request: &str) {
        self.wait(|inner| !inner.open.contains_key(request));
    }

    /// The same of all requests.
    pub(crate) fn wait_for_all_stores(&self) {
        self.wait(|inner| inner.open.is_empty());
    }

    /// These requests are to be reported once, when their stores are over.
    pub(crate) fn finish(&self, requests: Vec<String>) {
        self.inner.lock().finishing.extend(requests);
    }

    /// A load is over; these blocks are not right.
    pub(crate) fn load_over(&self, request: &str, invalid: impl IntoIterator<Item = u32>) {
        let mut inner = self.inner.lock();
        let known = inner.results.invalid.len();
        inner.results.invalid.extend(invalid);
        let wrong = inner.results.invalid.len() > known;
        if self.whole {
            inner.results.invalid.clear();
        }
        let (left, failed) = match inner.loads.get_mut(request) {
            Some((left, failed)) => {
                *left -= 1;
                *failed |= wrong;
                (*left, *failed)
            }
            None => (0, wrong),
        };
        if left == 0 {
            inner.loads.remove(request);
            inner.results.received.push(request.to_owned());
            if failed && self.whole {
                inner.results.failed.push(request.to_owned());
            }
        }
        drop(inner);
        self.closed_one.notify_all();
    }

    /// A load never began.
    pub(crate) fn load_failed(&self, request: &str, blocks: &[u32]) {
        self.failed(blocks.len());
        self.load_over(request, blocks.iter().copied());
    }

    /// So many blocks could not be loaded, for a reason that concerns all of a load.
    pub(crate) fn failed(&self, blocks: usize) {
        self.inner.lock().counters.load_failed += blocks as u64;
    }

    pub(crate) fn results(&self) -> Results {
        let mut inner = self.inner.lock();
        let inner = &mut *inner;
        let mut results = std::mem::take(&mut inner.results);
        inner.finishing.retain(|request| {
            let open = inner.open.contains_key(request);
            if !open {
                results.sent.push(request.clone());
            }
            open
        });
        results
    }

    pub(crate) fn take_done(&self) -> Vec<u64> {
        std::mem::take(&mut self.inner.lock().done)
    }

    pub(crate) fn counters(&self) -> Counters {
        self.inner.lock().counters.clone()
    }

    pub(crate) fn dropped(&self, blocks: usize) {
        self.inner.lock().counters.dropped_blocks += blocks as u64;
    }

    /// What each block's part of `bytes` came to; gives the number of those that were copied.
    pub(crate) fn count_stores(&self, outcomes: &[StoreOutcome], bytes: usize) -> usize {
        let mut copied = 0;
        let counters = &mut self.inner.lock().counters;
        for outcome in outcomes {
            match outcome {
                // The commit's own reply comes later.
                StoreOutcome::Waiting | StoreOutcome::Visible => copied += 1,
                _ => counters.dropped_blocks += 1,
            }
        }
        counters.copied_blocks += copied as u64;
        counters.copied_bytes += (copied * bytes) as u64;
        copied
    }

    pub(crate) fn count_loads(&self, outcomes: &[LoadOutcome], bytes: usize) {
        let counters = &mut self.inner.lock().counters;
        for outcome in outcomes {
            match outcome {
                LoadOutcome::Loaded => {
                    counters.loaded_blocks += 1;
                    counters.loaded_bytes += bytes as u64;
                }
                LoadOutcome::Absent => counters.load_absent += 1,
                LoadOutcome::Failed(FailReason::Corrupt) => counters.load_corrupt += 1,
                LoadOutcome::Failed(FailReason::Timeout) => counters.load_timeout += 1,
                LoadOutcome::Failed(_) => counters.load_failed += 1,
            }
        }
    }

    /// A store of which something was copied took so long.
    pub(crate) fn store_took(&self, us: u64) {
        observed::keep(&mut self.inner.lock().store_times, us);
    }

    /// A load took so long, whatever came of it.
    pub(crate) fn load_took(&self, us: u64) {
        observed::keep(&mut self.inner.lock().load_times, us);
    }

    /// What has happened since the last call, if anything.
    pub(crate) fn observed(&self) -> Option<Observed> {
        let mut inner = self.inner.lock();
        let inner = &mut *inner;
        if inner.told == inner.counters
            && inner.store_times.is_empty()
            && inner.load_times.is_empty()
        {
            return None;
        }
        let (old, new) = (&inner.told, &inner.counters);
        let mut observed = Observed::grown([
            ("store_bytes", old.copied_bytes, new.copied_bytes),
            ("store_blocks", old.visible_blocks, new.visible_blocks),
            ("store_stale", old.stale_blocks, new.stale_blocks),
            ("store_dropped", old.dropped_blocks, new.dropped_blocks),
            ("load_bytes", old.loaded_bytes, new.loaded_bytes),
            ("load_absent", old.load_absent, new.load_absent),
            ("load_corrupt", old.load_corrupt, new.load_corrupt),
            ("load_timeout", old.load_timeout, new.load_timeout),
            ("load_failed", old.load_failed, new.load_failed),
        ]);
        inner.told.clone_from(new);
        observed.take("store_seconds", &mut inner.store_times);
        observed.take("load_seconds", &mut inner.load_times);
        observed.some()
    }

    /// A commit was sent; its reply feeds the counters.
    pub(crate) fn committed(&self, ticket: Ticket) {
        let mut inner = self.inner.lock();
        inner.commits.push_back(ticket);
        if inner.commits.len() > COMMITS {
            inner.commits.pop_front();
        }
    }

    /// Counts the commits whose replies have come.
    pub(crate) fn poll_commits(&self, link: &kvd_client::Link) {
        let mut inner = self.inner.lock();
        let inner = &mut *inner;
        while let Some(ticket) = inner.commits.front_mut() {
            let Some(answer) = link.poll(ticket) else {
                return;
            };
            inner.commits.pop_front();
            match answer {
                Ok(reply::Body::Commit(reply)) => {
                    for state in reply.states {
                        match CommitState::try_from(state) {
                            Ok(CommitState::Visible) => inner.counters.visible_blocks += 1,
                            Ok(CommitState::Waiting) => inner.counters.waiting_blocks += 1,
                            _ => inner.counters.stale_blocks += 1,
                        }
                    }
                }
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::Unavailable => {}
                Err(_) => inner.counters.stale_blocks += 1,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_reported_once_and_only_when_its_stores_are_over() {
        let shared = Shared::default();
        shared.open_store("a");
        shared.open_store("a");
        shared.finish(vec!["a".into(), "b".into()]);
        assert_eq!(shared.results().sent, ["b"]);
        shared.store_over("a", 1);
        assert!(shared.results().sent.is_empty());
        shared.store_over("a", 2);
        assert_eq!(shared.results().sent, ["a"]);
        assert_eq!(shared.results(), Results::default());
        assert_eq!(shared.take_done(), [1, 2]);
        shared.wait_for_stores("a");
    }

    #[test]
    fn a_failed_load_is_over_too() {
        let shared = Shared::default();
        shared.open_load("a");
        shared.load_failed("a", &[3, 4]);
        let results = shared.results();
        assert_eq!(results.received, ["a"]);
        assert_eq!(results.invalid, [3, 4]);
        assert_eq!(shared.counters().load_failed, 2);
        shared.wait_idle();
    }

    #[test]
    fn what_has_happened_is_told_once() {
        let shared = Shared::default();
        assert_eq!(shared.observed(), None);
        let stores = [StoreOutcome::Visible, StoreOutcome::Waiting];
        assert_eq!(shared.count_stores(&stores, 100), 2);
        shared.store_took(70);
        let timeout = LoadOutcome::Failed(FailReason::Timeout);
        shared.count_loads(&[LoadOutcome::Loaded, LoadOutcome::Absent, timeout], 100);
        let seen = shared.observed().unwrap();
        let counts = [
            ("store_bytes", 200),
            ("load_bytes", 100),
            ("load_absent", 1),
            ("load_timeout", 1),
        ];
        assert_eq!(seen.counts, counts);
        assert_eq!(seen.times, [("store_seconds", vec![70])]);
        assert_eq!(shared.observed(), None);
        for _ in 0..5000 {
            shared.load_took(u64::MAX);
        }
        let seen = shared.observed().unwrap();
        assert!(
            seen.times[0].1.len() < 2000,
            "nobody asks: not all are kept"
        );
        assert_eq!(shared.observed(), None);
    }

    #[test]
    fn a_load_of_several_groups_is_over_with_its_last_and_fails_as_a_whole() {
        let shared = Shared::new(true);
        for _ in 0..2 {
            shared.open_load("a");
            shared.open_load("b");
        }
        shared.load_failed("a", &[3, 4]);
        shared.load_over("b", []);
        assert_eq!(shared.results(), Results::default());
        shared.load_over("a", []);
        shared.load_over("b", []);
        let results = shared.results();
        assert_eq!(results.received, ["a", "b"]);
        assert_eq!(results.failed, ["a"]);
        assert!(results.invalid.is_empty());
        shared.wait_idle();
    }
}
