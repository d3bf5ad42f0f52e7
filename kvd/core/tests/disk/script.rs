//! A node of core alone with a fake store: a script of these tests, which remembers what was written where and asserts that no
//! place is used twice.

use std::collections::{BTreeMap, BTreeSet};

use kvd_core::tier::*;
use kvd_core::*;

use crate::common::*;

pub(crate) const STORE: StoreId = StoreId(0);
pub(crate) const STRIDE: u64 = stride_of(4096);

/// Checksums of a block, by its hash.
pub(crate) fn crcs_of(hash: &[u8; 32]) -> Vec<u64> {
    (0..4).map(|head| low64(hash) ^ head).collect()
}

/// A fake store.
#[derive(Default)]
pub(crate) struct Script {
    pub(crate) held: BTreeMap<Place, BlockHeader>,
    pub(crate) open: Vec<StoreOp>,
    /// Reads that were under way when it was switched off. Nobody believes what they bring, so that their places may be used anew.
    pub(crate) left: BTreeSet<OpId>,
}

pub(crate) struct Node {
    pub(crate) world: World,
    pub(crate) store: Script,
    pub(crate) replies: Vec<(SessionId, RequestId, Reply)>,
}

pub(crate) fn store_shape() -> StoreShape {
    StoreShape {
        segments: 2,
        segment_bytes: 128 << 10,
    }
}

pub(crate) fn settings(tiers: TierSettings) -> Settings {
    Settings {
        tiers,
        // The arenas are so small that half of one would be too little for a test's writes.
        lease_fraction: 1.0,
        ..Settings::default()
    }
}

pub(crate) fn few_spare() -> TierSettings {
    TierSettings {
        spare_places: 2,
        ..TierSettings::default()
    }
}

impl Node {
    pub(crate) fn new(tiers: TierSettings, extents: u64) -> Node {
        Node::with(settings(tiers), extents)
    }

    pub(crate) fn with(settings: Settings, extents: u64) -> Node {
        Node::on(settings, extents, store_shape())
    }

    pub(crate) fn on(settings: Settings, extents: u64, shape: StoreShape) -> Node {
        let mut world = World::new(settings, extents);
        let store = STORE;
        world.step(Input::StoreOpened { store, shape });
        world.script(1, 0);
        Node {
            world,
            store: Script::default(),
            replies: Vec::new(),
        }
    }

    /// Takes what the store is asked to do; two operations at one place at once would be a fault.
    pub(crate) fn take(&mut self) {
        for (store, op) in std::mem::take(&mut self.world.store_ops) {
            assert_eq!(store, STORE);
            if let StoreOp::Write { to, header, .. } = &op {
                assert!(
                    !self.store.held.contains_key(to),
                    "a place in use is written"
                );
                let same = |other: &StoreOp| match other {
                    StoreOp::Write { to: at, .. } | StoreOp::Drop { place: at, .. } => at == to,
                    StoreOp::Read { op, from: at, .. } => at == to && !self.store.left.contains(op),
                };
                assert!(
                    !self.store.open.iter().any(same),
                    "a place under way is written"
                );
                assert_eq!(header.crcs, crcs_of(&header.key.hash.0));
            }
            self.store.open.push(op);
        }
    }

    pub(crate) fn put(&mut self, list: &[[u8; 32]]) -> usize {
        self.put_by(1, list)
    }

    pub(crate) fn put_by(&mut self, session: u64, list: &[[u8; 32]]) -> usize {
        let got = self.world.reserve(session, list, None);
        let mut crcs = Vec::new();
        for (hash, state) in list.iter().zip(&got.states) {
            if *state == ReserveState::Reserved {
                crcs.extend(crcs_of(hash));
            }
        }
        let states = self
            .world
            .commit(session, &got.slots, &got.generations, &crcs);
        assert!(states.iter().all(|s| *s == CommitState::Visible));
        self.take();
        got.slots.len()
    }

    /// Ends one operation with this outcome.
    pub(crate) fn finish(&mut self, at: usize, outcome: Result<(), StoreError>) {
        let op = self.store.open.remove(at);
        let done = match op {
            StoreOp::Write { op, to, header, .. } => {
                if outcome.is_ok() {
                    self.store.held.insert(to, *header);
                }
                let result = outcome;
                StoreDone::Written { op, result }
            }
            StoreOp::Read {
                op,
                from,
                key,
                mut block,
                ..
            } => {
                let result = outcome;
                if self.store.left.remove(&op) {
                    // What it brings is of whoever was there meanwhile.
                    block.crcs.extend(crcs_of(&[0xee; 32]));
                } else {
                    let header = &self.store.held[&from];
                    assert_eq!(header.key, key, "another block was asked for");
                    assert!(block.crcs.is_empty(), "of the block before");
                    block.cut = header.cut.clone();
                    block.crcs.extend(&header.crcs);
                }
                StoreDone::Read { op, block, result }
            }
            StoreOp::Drop { op, place, .. } => {
                if outcome.is_ok() {
                    self.store.held.remove(&place);
                }
                let result = outcome;
                StoreDone::Dropped { op, result }
            }
        };
        let store = STORE;
        let replies = self.world.step(Input::StoreDone { store, done });
        self.replies.extend(replies);
        self.take();
    }

    pub(crate) fn finish_all(&mut self) {
        while !self.store.open.is_empty() {
            self.finish(0, Ok(()));
        }
    }

    /// Asks for a load; the answer is among the replies, now or later.
    pub(crate) fn ask_load(&mut self, list: &[[u8; 32]], deadline_ms: u32) -> RequestId {
        self.ask_load_by(1, list, deadline_ms)
    }

    pub(crate) fn ask_load_by(
        &mut self,
        session: u64,
        list: &[[u8; 32]],
        deadline_ms: u32,
    ) -> RequestId {
        self.world.requests += 1;
        let id = RequestId(self.world.requests);
        let body = Request::Load {
            namespace: 0,
            group: 0,
            hashes: list,
            deadline_ms,
        };
        let session = SessionId(session);
        let replies = self.world.step(Input::Request { session, id, body });
        self.replies.extend(replies);
        self.take();
        id
    }

    pub(crate) fn switch(&mut self, on: bool) {
        let store = STORE;
        if !on {
            let reads = self.store.open.iter().filter_map(|one| match one {
                StoreOp::Read { op, .. } => Some(*op),
                _ => None,
            });
            self.store.left.extend(reads);
        }
        let replies = self.world.step(Input::StoreSwitched { store, on });
        self.replies.extend(replies);
    }

    pub(crate) fn answer(&mut self, id: RequestId) -> Option<LoadReply> {
        let at = self.replies.iter().position(|(_, of, _)| *of == id)?;
        match self.replies.remove(at).2 {
            Reply::Load(reply) => Some(reply),
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn place_of(&mut self, hash: [u8; 32]) -> Where {
        self.world.lookup(1, &[hash], 0, false).chains[0].at(0)
    }

    /// Ends a load's leases.
    pub(crate) fn release(&mut self, reply: &LoadReply) {
        self.world.release(1, &reply.slots, &reply.generations, &[]);
    }
}
