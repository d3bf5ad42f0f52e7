//! What the scheduler half knows of one request of the engine.

use std::collections::VecDeque;

use bytes::Bytes;
use kvd_core::hit::Run;
use kvd_wire::session::Presence;

use super::watch::ByTier;
use crate::HASH_BYTES;

/// Which adapter computed a request's KV.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Adapter {
    /// None: the base model.
    Base,
    /// A LoRA whose content digest is known by this name, or will be: see `Scheduler::set_adapter`.
    Named(String),
}

/// A range of blocks of one request: hashes and the engine's block numbers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Blocks {
    /// Hash of the block before the first; empty when there is none or it is not known.
    pub(crate) parent: Bytes,
    /// 32 bytes a block.
    pub(crate) hashes: Bytes,
    /// The engine's block numbers.
    pub(crate) blocks: Vec<u32>,
}

impl Blocks {
    /// `hashes` has 32 bytes for each of `blocks`, or 32 more in front: the hash of the block before them.
    pub(crate) fn new(mut hashes: Bytes, mut blocks: Vec<u32>) -> Blocks {
        let extra = hashes.len() == (blocks.len() + 1) * HASH_BYTES;
        let parent = hashes.split_to(if extra { HASH_BYTES } else { 0 });
        let count = blocks.len().min(hashes.len() / HASH_BYTES);
        hashes.truncate(count * HASH_BYTES);
        blocks.truncate(count);
        Blocks {
            parent,
            hashes,
            blocks,
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.blocks.len()
    }

    /// Leaves out the blocks that the engine has given up already: it says 0, which is no block of a request's.
    pub(crate) fn without_gaps(mut self) -> Blocks {
        self.parent = Bytes::new();
        if !self.blocks.contains(&0) {
            return self;
        }
        let (hashes, _) = self.hashes.as_chunks::<HASH_BYTES>();
        let kept = || {
            hashes
                .iter()
                .zip(&self.blocks)
                .filter(|(_, block)| **block != 0)
        };
        Blocks {
            parent: Bytes::new(),
            hashes: kept().flat_map(|(hash, _)| *hash).collect(),
            blocks: kept().map(|(_, block)| *block).collect(),
        }
    }

    /// Takes the first `count` blocks off.
    pub(crate) fn split_front(&mut self, count: usize) -> Blocks {
        let count = count.min(self.len());
        if count == 0 {
            return Blocks::default();
        }
        let rest_hashes = self.hashes.split_off(count * HASH_BYTES);
        let rest_blocks = self.blocks.split_off(count);
        let rest_parent = match self.hashes.len().checked_sub(HASH_BYTES) {
            Some(last) => self.hashes.slice(last..),
            None => self.parent.clone(),
        };
        Blocks {
            parent: std::mem::replace(&mut self.parent, rest_parent),
            hashes: std::mem::replace(&mut self.hashes, rest_hashes),
            blocks: std::mem::replace(&mut self.blocks, rest_blocks),
        }
    }
}

/// What is known of the blocks that the daemon holds of a request.
#[derive(Debug)]
pub(crate) enum Lookup<T> {
    /// Not asked since the request (re)started.
    None,
    /// Asked; no answer yet.
    Asked {
        ticket: T,
        /// When (us) it was sent; `None`: it waits for the end of the step.
        at: Option<u64>,
        hashes: Bytes,
        namespace: u32,
        /// Counts what has made earlier answers void.
        belief: u64,
    },
    /// Answered: of each KV-cache group, these runs of blocks can be loaded.
    Answered {
        runs: Vec<Vec<Run>>,
        /// And where they are.
        places: Vec<Presence>,
        at: u64,
        lease: u64,
        hashes: Bytes,
        namespace: u32,
        belief: u64,
    },
    /// Nothing will be loaded, and nobody is asked again before the request restarts.
    Settled,
}

/// Last blocks of a finished request, of one KV-cache group.
#[derive(Debug)]
pub(crate) struct Tail {
    pub(crate) group: u32,
    pub(crate) blocks: Blocks,
}

/// What is reserved of one KV-cache group.
#[derive(Debug)]
pub(crate) struct Part {
    pub(crate) group: u32,
    pub(crate) blocks: Blocks,
    pub(crate) kept: Kept,
}

/// Who keeps blocks until they are copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kept {
    /// Their request has them.
    ByRequest,
    /// The engine, for us, until it is told that they are not needed any more.
    ByEngine,
    /// Nobody: they took too long. Their slots are given back.
    NoMore,
}

/// So many blocks are still to be stored.
pub(crate) fn count(parts: &[Part]) -> u32 {
    let wanted = parts.iter().filter(|part| part.kept != Kept::NoMore);
    wanted.map(|part| part.blocks.len() as u32).sum()
}

/// And so many that the engine keeps.
pub(crate) fn count_held(parts: &[Part]) -> u32 {
    let held = parts.iter().filter(|part| part.kept == Kept::ByEngine);
    held.map(|part| part.blocks.len() as u32).sum()
}

/// Those that the engine keeps.
pub(crate) fn held_blocks(parts: &[Part]) -> impl Iterator<Item = u32> {
    let held = parts.iter().filter(|part| part.kept == Kept::ByEngine);
    held.flat_map(|part| part.blocks.blocks.iter().copied())
}

/// A reservation under way.
#[derive(Debug)]
pub(crate) struct Reservation<T> {
    pub(crate) ticket: T,
    pub(crate) namespace: u32,
    pub(crate) parts: Vec<Part>,
    /// When (us) it was asked for.
    pub(crate) since: u64,
    /// The engine's step in which it was asked for.
    pub(crate) step: u64,
    /// Connections of the ranks when it was asked for.
    pub(crate) epochs: Vec<u64>,
    /// The start of the daemon that it was asked of.
    pub(crate) incarnation: [u8; 16],
}

impl<T> Reservation<T> {
    /// What the engine keeps is not stored. Those blocks.
    pub(crate) fn give_up_held(&mut self) -> Vec<u32> {
        let held = held_blocks(&self.parts).collect();
        let parts = self.parts.iter_mut();
        for part in parts.filter(|part| part.kept == Kept::ByEngine) {
            part.kept = Kept::NoMore;
        }
        held
    }
}

/// Where a request is on its way out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Leaving {
    /// The engine still runs it.
    No,
    /// Finished at this time (us); its blocks are held until its last blocks have been copied.
    Held { since: u64 },
    /// The workers have been told to report it.
    Told,
}

/// One request.
#[derive(Debug)]
pub(crate) struct Request<T> {
    pub(crate) adapter: Adapter,
    /// Reads nothing from a cache: takes no lookup and no lease.
    pub(crate) skip: bool,
    /// Weights epoch in which its KV began.
    pub(crate) epoch: u64,
    /// Its KV mixes epochs, or began in an engine cache that does: nothing of it is stored.
    pub(crate) tainted: bool,
    pub(crate) lookup: Lookup<T>,
    /// Lookups since the request (re)started.
    pub(crate) asks: u32,
    /// First time (us) the engine wanted to know what can be loaded.
    pub(crate) wanted_at: Option<u64>,
    /// Since when (us) it waits for another request's load.
    pub(crate) shared_since: Option<u64>,
    /// What was last offered to the engine, in units: those it has, and those beyond.
    pub(crate) offer: Option<(u32, u32)>,
    /// A load into its blocks is under way.
    pub(crate) loading: bool,
    /// Where its last load came from.
    pub(crate) sources: ByTier,
    /// The engine has computed something for it since it (re)started: blocks that it says are computed hold what they should.
    pub(crate) ran: bool,
    /// Tokens that were computed when its last step began, and when the one before did.
    pub(crate) computed: [u32; 2],
    /// Of each KV-cache group: blocks before this are stored, reserved, or need not be.
    pub(crate) next: Vec<u32>,
    /// Blocks to reserve as soon as that is possible; only of a finished request.
    pub(crate) tails: VecDeque<Tail>,
    pub(crate) reservations: VecDeque<Reservation<T>>,
    /// Orders that not all ranks have reported.
    pub(crate) orders: u32,
    pub(crate) leaving: Leaving,
    /// Whether it is in the scheduler half's list of requests with reservations.
    pub(crate) listed: bool,
}

impl<T> Request<T> {
    pub(crate) fn new(adapter: Adapter, skip: bool, epoch: u64, groups: usize) -> Self {
        Request {
            adapter,
            skip,
            epoch,
            tainted: false,
            lookup: Lookup::None,
            asks: 0,
            wanted_at: None,
            shared_since: None,
            offer: None,
            loading: false,
            sources: ByTier::default(),
            ran: false,
            computed: [0; 2],
            next: vec![0; groups],
            tails: VecDeque::new(),
            reservations: VecDeque::new(),
            orders: 0,
            leaving: Leaving::No,
            listed: false,
        }
    }

    /// Forgets what concerned blocks that the request has lost, its reservations apart.
    pub(crate) fn restart(&mut self) {
        self.start_over();
        self.offer = None;
        self.ran = false;
        self.computed = [0; 2];
        self.next.fill(0);
        self.tails.clear();
    }

    /// What can be loaded for it is asked anew.
    pub(crate) fn start_over(&mut self) {
        self.lookup = Lookup::None;
        self.asks = 0;
        self.wanted_at = None;
        self.shared_since = None;
    }

    /// Gives its reservations up: what was asked for is given back when the replies come. Returns how many blocks those were, and the
    /// blocks that the engine keeps for them.
    pub(crate) fn give_up_reservations(&mut self) -> (u32, Vec<u32>) {
        let (mut count, mut held) = (0, Vec::new());
        for reservation in self.reservations.drain(..) {
            count += self::count(&reservation.parts);
            held.extend(held_blocks(&reservation.parts));
        }
        (count, held)
    }

    /// What its lookup found is not kept for it any more.
    pub(crate) fn forget_lease(&mut self) {
        if let Lookup::Answered { lease, .. } = &mut self.lookup {
            *lease = 0;
        }
    }

    /// Whether its blocks may be stored in this weights epoch.
    pub(crate) fn may_store(&self, epoch: u64) -> bool {
        !self.tainted && self.epoch == epoch
    }

    /// Whether blocks wait for a slot.
    pub(crate) fn has_pending(&self) -> bool {
        !self.tails.is_empty() || !self.reservations.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_split_from_the_front() {
        let hashes: Vec<u8> = (0u8..128).collect();
        let hashes = Bytes::from(hashes);
        let mut all = Blocks::new(hashes.slice(32..), vec![7, 8, 9]);
        assert!(all.parent.is_empty());
        let mut led = Blocks::new(hashes.clone(), vec![7, 8, 9]);
        assert_eq!(led.parent, hashes[..32]);
        assert_eq!(led.hashes, all.hashes);
        assert_eq!(led.split_front(1).parent, hashes[..32]);
        assert_eq!(led.parent, hashes[32..64]);
        let front = all.split_front(2);
        assert_eq!(front.blocks, [7, 8]);
        assert_eq!(all.parent, front.hashes[32..]);
        assert_eq!(front.hashes.len(), 64);
        assert_eq!(all.blocks, [9]);
        assert_eq!(all.hashes[0], 96);
        let gaps = Blocks::new(hashes.clone(), vec![0, 8, 0]).without_gaps();
        assert_eq!((gaps.blocks, &gaps.hashes[..]), (vec![8], &hashes[64..96]));
        assert_eq!(all.split_front(9).len(), 1);
        assert_eq!(all.len(), 0);
    }
}
