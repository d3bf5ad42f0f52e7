//! A scheduler half that may fail by a bug without harm to the engine. What the engine was promised is written down here, outside of
//! the half: should the half panic, the engine's next step carries last orders that settle it, and from then on nothing is done.

use std::collections::HashSet;
use std::panic::{AssertUnwindSafe, catch_unwind};

use bytes::Bytes;
use prost::Message;

use super::{Match, Port, Scheduler, Settings};
use crate::meta::{LoadOrder, StepMeta, VERSION};

/// No namespace: a load from it fails.
const NOWHERE: u32 = u32::MAX;

/// What the engine waits for.
#[derive(Default)]
struct Promises {
    /// How often it was asked to keep each block of its pool for us, by the block's number: a step may name hundreds.
    kept: Vec<u32>,
    /// Finished requests whose blocks it holds until the workers, who have not been told yet, report them.
    leaving: HashSet<String>,
    /// Requests that wait for loads which the workers have not heard of yet, and by KV-cache group their blocks that nobody else has.
    loading: Vec<(String, Vec<Vec<u32>>)>,
    /// What was last asked about: a request, and how many units of it the engine has.
    asked: (String, u32),
}

impl Promises {
    fn keep(&mut self, block: u32) {
        let at = block as usize;
        if self.kept.len() <= at {
            self.kept.resize(at + 1, 0);
        }
        self.kept[at] += 1;
    }

    /// One reference to a block is given back. Whether there was one.
    fn give_back(&mut self, block: u32) -> bool {
        match self.kept.get_mut(block as usize) {
            Some(times) if *times > 0 => {
                *times -= 1;
                true
            }
            _ => false,
        }
    }
}

/// Where the half is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Health {
    Well,
    /// It has panicked, and the workers have not been told.
    Failed,
    /// The workers have been told to finish what is under way, or the half was closed.
    Over,
}

/// A scheduler half, and what is owed to the engine should it fail. See the module.
pub struct Guarded<P: Port> {
    half: Option<Scheduler<P>>,
    settings: Settings,
    promises: Promises,
    health: Health,
    /// Nobody has been told of the failure.
    untold: bool,
}

impl<P: Port> Guarded<P> {
    /// Guards this half.
    pub fn new(half: Scheduler<P>) -> Self {
        Guarded {
            settings: half.settings().clone(),
            half: Some(half),
            promises: Promises::default(),
            health: Health::Well,
            untold: false,
        }
    }

    /// The half, if it is still there.
    pub fn half(&self) -> Option<&Scheduler<P>> {
        self.half.as_ref()
    }

    /// Runs with the half, if it is still there; for what promises the engine nothing.
    pub fn with<R>(&mut self, run: impl FnOnce(&mut Scheduler<P>) -> R) -> Option<R> {
        let half = self.half.as_mut()?;
        match catch_unwind(AssertUnwindSafe(|| run(half))) {
            Ok(result) => Some(result),
            Err(_) => {
                self.fail();
                None
            }
        }
    }

    /// The half can't go on, though it has not panicked.
    pub fn fail(&mut self) {
        if let Some(half) = self.half.take() {
            // What a bug has left behind may well panic again.
            let _ = catch_unwind(AssertUnwindSafe(|| drop(half)));
            self.health = Health::Failed;
            self.untold = true;
        }
    }

    /// The engine could not keep these blocks, although it was asked to: the half can't go on.
    pub fn not_kept(&mut self, blocks: &[u32]) {
        for block in blocks {
            self.promises.give_back(*block);
        }
        self.fail();
    }

    /// Whether the half has failed; true once.
    pub fn take_failure(&mut self) -> bool {
        std::mem::take(&mut self.untold)
    }

    /// Whether [`Guarded::take_failure`] would say so.
    pub fn has_failure(&self) -> bool {
        self.untold
    }

    /// [`Scheduler::matched`].
    pub fn matched(&mut self, now: u64, id: &str, computed: u32) -> Option<Match> {
        let found = self.with(|half| half.matched(now, id, computed));
        if let Some(Match::Blocks(1..)) = found {
            self.promises.asked = (id.to_owned(), computed);
        }
        found
    }

    /// [`Scheduler::allocated`].
    pub fn allocated(&mut self, id: &str, external: u32, blocks: &[Vec<u32>]) {
        if external > 0 {
            let (asked, computed) = &self.promises.asked;
            let computed = if asked == id { *computed } else { 0 };
            let own = self.settings.beyond(computed, blocks);
            self.promises.loading.push((id.to_owned(), own));
        }
        self.with(|half| half.allocated(id, external, blocks));
    }

    /// [`Scheduler::capture`].
    pub fn capture<'a>(
        &mut self,
        now: u64,
        id: &str,
        full: impl IntoIterator<Item = (u32, Bytes, Vec<u32>)>,
        states: impl IntoIterator<Item = (u32, &'a [u8], u32)>,
    ) -> Vec<u32> {
        let kept = self.with(|half| half.capture(now, id, full, states));
        let kept = kept.unwrap_or_default();
        for block in &kept {
            self.promises.keep(*block);
        }
        kept
    }

    /// [`Scheduler::released`]; of a half that has failed all that the engine keeps, as soon as the workers are told to stop: whoever
    /// gets these blocks then writes them in a later step.
    pub fn released(&mut self, most: usize) -> Vec<u32> {
        if self.health == Health::Over {
            let kept = (0..).zip(std::mem::take(&mut self.promises.kept));
            return kept
                .flat_map(|(block, times)| std::iter::repeat_n(block, times as usize))
                .collect();
        }
        let mut released = self.with(|half| half.released(most)).unwrap_or_default();
        let asked = released.len();
        released.retain(|block| self.promises.give_back(*block));
        if released.len() < asked {
            // The engine would give up what a request of its own has.
            self.fail();
        }
        released
    }

    /// [`Scheduler::finished`].
    pub fn finished(&mut self, now: u64, id: &str) -> bool {
        let hold = self.with(|half| half.finished(now, id)).unwrap_or(false);
        if hold {
            self.promises.leaving.insert(id.to_owned());
        }
        hold
    }

    /// [`Scheduler::end_step`]; once after a failure: the last orders.
    pub fn end_step(&mut self, now: u64) -> Vec<u8> {
        let orders = match self.with(|half| half.orders(now)) {
            Some(orders) => orders,
            None if self.health == Health::Failed => {
                self.health = Health::Over;
                Some(self.last_orders())
            }
            None => None,
        };
        let Some(orders) = orders else {
            return Vec::new();
        };
        for id in &orders.finish {
            self.promises.leaving.remove(id);
        }
        self.promises.loading.clear();
        orders.encode_to_vec()
    }

    /// Copies end, finished requests are reported, and loads that nobody has begun fail.
    fn last_orders(&mut self) -> StepMeta {
        let lost = self.promises.loading.drain(..);
        let loads = lost.flat_map(|(request, blocks)| {
            let groups = (0..).zip(blocks);
            groups.map(move |(group, blocks)| LoadOrder {
                request: request.clone(),
                namespace: NOWHERE,
                group,
                blocks,
                ..LoadOrder::default()
            })
        });
        StepMeta {
            version: VERSION,
            stop: true,
            loads: loads.collect(),
            finish: self.promises.leaving.iter().cloned().collect(),
            ..StepMeta::default()
        }
    }

    /// [`Scheduler::has_pending_work`]; of a half that has failed: until the last orders are out.
    pub fn has_pending_work(&mut self) -> bool {
        let pending = self.with(|half| half.has_pending_work()).unwrap_or(false);
        pending || self.health == Health::Failed
    }

    /// Takes the half out. Everything after this does nothing.
    pub fn close(&mut self) -> Option<Scheduler<P>> {
        self.health = Health::Over;
        self.half.take()
    }
}
