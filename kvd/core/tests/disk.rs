//! The slower tier: going down, coming up, failing, restarting. The store is a script of these tests, which remembers what was
//! written where and asserts that no place is used twice.

mod common;

use std::collections::BTreeMap;

use common::*;
use kvd_core::tier::*;
use kvd_core::*;
use proptest::prelude::*;

const STORE: StoreId = StoreId(0);
const STRIDE: u64 = stride_of(4096);

/// Checksums of a block, by its hash.
fn crcs_of(hash: &[u8; 32]) -> Vec<u64> {
    (0..4).map(|head| low64(hash) ^ head).collect()
}

/// A fake store of two segments.
#[derive(Default)]
struct Script {
    held: BTreeMap<Place, BlockHeader>,
    open: Vec<StoreOp>,
}

struct Node {
    world: World,
    store: Script,
    replies: Vec<(SessionId, RequestId, Reply)>,
}

fn store_shape() -> StoreShape {
    StoreShape {
        segments: 2,
        segment_bytes: 128 << 10,
    }
}

fn settings(tiers: TierSettings) -> Settings {
    Settings {
        tiers,
        // The arenas are so small that half of one would be too little for a test's writes.
        lease_fraction: 1.0,
        ..Settings::default()
    }
}

fn few_spare() -> TierSettings {
    TierSettings {
        spare_places: 2,
        ..TierSettings::default()
    }
}

impl Node {
    fn new(tiers: TierSettings, extents: u64) -> Node {
        Node::with(settings(tiers), extents)
    }

    fn with(settings: Settings, extents: u64) -> Node {
        let mut world = World::new(settings, extents);
        world.step(Input::StoreOpened {
            store: STORE,
            shape: store_shape(),
        });
        world.script(1, 0);
        Node {
            world,
            store: Script::default(),
            replies: Vec::new(),
        }
    }

    /// Takes what the store is asked to do; two operations at one place at once would be a fault.
    fn take(&mut self) {
        for (store, op) in std::mem::take(&mut self.world.store_ops) {
            assert_eq!(store, STORE);
            if let StoreOp::Write { to, header, .. } = &op {
                assert!(
                    !self.store.held.contains_key(to),
                    "a place in use is written"
                );
                let same = |other: &StoreOp| match other {
                    StoreOp::Write { to: at, .. } | StoreOp::Drop { place: at, .. } => at == to,
                    StoreOp::Read { from: at, .. } => at == to,
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

    fn put(&mut self, list: &[[u8; 32]]) -> usize {
        let got = self.world.reserve(1, list, None);
        let mut crcs = Vec::new();
        for (hash, state) in list.iter().zip(&got.states) {
            if *state == ReserveState::Reserved {
                crcs.extend(crcs_of(hash));
            }
        }
        let states = self.world.commit(1, &got.slots, &got.generations, &crcs);
        assert!(states.iter().all(|s| *s == CommitState::Visible));
        self.take();
        got.slots.len()
    }

    /// Ends one operation with this outcome.
    fn finish(&mut self, at: usize, outcome: Result<(), StoreError>) {
        let op = self.store.open.remove(at);
        let done = match op {
            StoreOp::Write { op, to, header, .. } => {
                if outcome.is_ok() {
                    self.store.held.insert(to, *header);
                }
                let result = outcome;
                StoreDone::Written { op, result }
            }
            StoreOp::Read { op, from, key, .. } => {
                let header = &self.store.held[&from];
                assert_eq!(header.key, key, "another block was asked for");
                let found = Box::new((header.cut.clone(), header.crcs.clone()));
                let result = outcome.map(|()| found);
                StoreDone::Read { op, result }
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

    fn finish_all(&mut self) {
        while !self.store.open.is_empty() {
            self.finish(0, Ok(()));
        }
    }

    /// Asks for a load; the answer is among the replies, now or later.
    fn ask_load(&mut self, list: &[[u8; 32]], deadline_ms: u32) -> RequestId {
        self.world.requests += 1;
        let id = RequestId(self.world.requests);
        let body = Request::Load {
            namespace: 0,
            group: 0,
            hashes: list,
            deadline_ms,
        };
        let session = SessionId(1);
        let replies = self.world.step(Input::Request { session, id, body });
        self.replies.extend(replies);
        self.take();
        id
    }

    fn answer(&mut self, id: RequestId) -> Option<LoadReply> {
        let at = self.replies.iter().position(|(_, of, _)| *of == id)?;
        match self.replies.remove(at).2 {
            Reply::Load(reply) => Some(reply),
            other => panic!("{other:?}"),
        }
    }

    fn place_of(&mut self, hash: [u8; 32]) -> Where {
        self.world.lookup(1, &[hash], 0, false).chains[0].at(0)
    }

    /// Ends a load's leases.
    fn release(&mut self, reply: &LoadReply) {
        self.world.release(1, &reply.slots, &reply.generations, &[]);
    }
}

#[test]
fn a_block_goes_down_and_comes_up_again() {
    let mut node = Node::new(few_spare(), 1);
    let list = hashes(0..10);
    node.put(&list);
    assert_eq!(node.store.open.len(), 10, "written through");
    node.finish_all();
    assert_eq!(node.world.core.tier_counters().offloaded, 10);
    // 16 slots: ten more push the first four out.
    node.put(&hashes(100..110));
    node.finish_all();
    let away: Vec<[u8; 32]> = list
        .iter()
        .copied()
        .filter(|hash| node.place_of(*hash) == Where::Nvme)
        .collect();
    assert_eq!(away.len(), 4);
    let id = node.ask_load(&away, 0);
    assert_eq!(node.answer(id), None, "it has to come up first");
    assert_eq!(node.place_of(away[0]), Where::Fetching);
    node.finish_all();
    let reply = node.answer(id).expect("answered");
    assert_eq!(reply.states, [LoadState::Ready; 4]);
    let wanted: Vec<u64> = away.iter().flat_map(crcs_of).collect();
    assert_eq!(reply.crcs, wanted);
    assert!(reply.generations.iter().all(|word| word % 2 == 0));
    node.release(&reply);
    assert_eq!(node.place_of(away[0]), Where::Host);
}

#[test]
fn a_chain_longer_than_host_memory_comes_up_window_by_window() {
    let mut node = Node::new(few_spare(), 1);
    for at in (0..28u64).step_by(7) {
        let parent = at.checked_sub(1).map(hash);
        let list = hashes(at..at + 7);
        let got = node.world.reserve(1, &list, parent);
        let crcs: Vec<u64> = list.iter().flat_map(crcs_of).collect();
        node.world.commit(1, &got.slots, &got.generations, &crcs);
        node.take();
        node.finish_all();
    }
    for _ in 0..3 {
        for at in (0..28).step_by(7) {
            let id = node.ask_load(&hashes(at..at + 7), 0);
            node.finish_all();
            let reply = node.answer(id).expect("answered");
            assert_eq!(reply.states, [LoadState::Ready; 7], "from {at} on");
            node.release(&reply);
        }
    }
}

#[test]
fn loads_of_one_block_share_a_read() {
    let mut node = Node::new(few_spare(), 1);
    node.put(&hashes(0..1));
    node.finish_all();
    node.put(&hashes(100..116));
    node.finish_all();
    let first = node.ask_load(&hashes(0..1), 0);
    let second = node.ask_load(&hashes(0..1), 0);
    let reads = node.store.open.iter();
    assert_eq!(
        reads
            .filter(|op| matches!(op, StoreOp::Read { .. }))
            .count(),
        1
    );
    node.finish_all();
    for id in [first, second] {
        assert_eq!(
            node.answer(id).expect("answered").states,
            [LoadState::Ready]
        );
    }
}

#[test]
fn failures_are_failures_and_only_wrong_bytes_are_forgotten() {
    for (error, after) in [
        (StoreError::Io, Where::Nvme),
        (StoreError::Off, Where::Nvme),
        (StoreError::Corrupt, Where::Absent),
    ] {
        let mut node = Node::new(few_spare(), 1);
        node.put(&hashes(0..1));
        node.finish_all();
        node.put(&hashes(100..116));
        node.finish_all();
        let id = node.ask_load(&hashes(0..2), 0);
        node.finish(0, Err(error));
        let reply = node.answer(id).expect("answered");
        assert_eq!(reply.states, [LoadState::Failed, LoadState::Absent]);
        assert_eq!(node.place_of(hash(0)), after, "{error:?}");
        node.finish_all();
    }
}

#[test]
fn a_load_is_answered_by_its_deadline_and_the_read_goes_on() {
    let mut node = Node::new(few_spare(), 1);
    node.put(&hashes(0..1));
    node.finish_all();
    node.put(&hashes(100..116));
    node.finish_all();
    let id = node.ask_load(&[hash(0), hash(100), hash(7)], 20);
    let due = node.world.core.next_deadline().expect("it waits");
    assert_eq!(due, Now(node.world.now + 20_000));
    node.world.now += 20_000;
    let replies = node.world.step(Input::Tick);
    node.replies.extend(replies);
    let states = node.answer(id).expect("answered").states;
    assert_eq!(states[0], LoadState::Failed);
    assert_eq!(states[2], LoadState::Absent);
    assert_eq!(node.world.core.tier_counters().fetch_late, 1);
    let reserved = node.world.status().slots.reserved;
    assert_eq!(reserved, 1, "the store may still write there");
    node.finish_all();
    assert_eq!(node.place_of(hash(0)), Where::Host, "it came in the end");
}

#[test]
fn what_is_on_its_way_at_the_deadline_has_failed_though_its_store_went_off() {
    let mut node = Node::new(few_spare(), 1);
    node.put(&hashes(0..1));
    node.finish_all();
    node.put(&hashes(100..116));
    node.finish_all();
    let id = node.ask_load(&hashes(0..1), 20);
    let on = false;
    node.world.step(Input::StoreSwitched { store: STORE, on });
    node.world.now += 20_000;
    let replies = node.world.step(Input::Tick);
    node.replies.extend(replies);
    let states = node.answer(id).expect("answered").states;
    assert_eq!(states, [LoadState::Failed]);
    node.finish_all();
}

#[test]
fn what_an_engine_stores_anew_is_not_absent_while_a_store_holds_it() {
    let mut node = Node::new(few_spare(), 1);
    node.put(&hashes(0..1));
    node.finish_all();
    node.put(&hashes(100..116));
    node.finish_all();
    let got = node.world.reserve(1, &hashes(0..1), None);
    assert_eq!(got.states, [ReserveState::Reserved]);
    let id = node.ask_load(&hashes(0..1), 0);
    let states = node.answer(id).expect("answered at once").states;
    assert_eq!(states, [LoadState::Failed]);
}

#[test]
fn blocks_that_come_up_count_against_the_most_blocks_of_the_index() {
    let few = Settings {
        max_entries: 8,
        ..settings(few_spare())
    };
    let mut node = Node::with(few, 1);
    node.put(&hashes(0..8));
    node.finish_all();
    node.put(&hashes(100..108));
    node.finish_all();
    let id = node.ask_load(&hashes(0..4), 0);
    node.world.core.check();
    node.finish_all();
    let states = node.answer(id).expect("answered").states;
    assert_eq!(states, [LoadState::Ready; 4]);
}

#[test]
fn who_leaves_is_not_answered_and_leaves_nothing_pinned() {
    let mut node = Node::new(few_spare(), 1);
    node.put(&hashes(0..1));
    node.finish_all();
    node.put(&hashes(100..116));
    node.finish_all();
    node.ask_load(&hashes(0..1), 0);
    let session = SessionId(1);
    node.world.step(Input::Detached { session });
    node.world.step(Input::Gone { session });
    node.finish_all();
    assert!(node.replies.is_empty());
    assert_eq!(node.world.status().pinned_bytes, 0);
}

#[test]
fn a_full_store_drops_ends_of_chains_and_reuses_a_place_only_when_the_store_says_so() {
    let mut node = Node::new(few_spare(), 8);
    let places = 2 * (128 << 10) / STRIDE;
    for base in 0..8 {
        node.put(&hashes(base * 10..base * 10 + 10));
        while node.store.open.len() > 3 {
            node.finish(0, Ok(()));
        }
    }
    node.finish_all();
    let counters = *node.world.core.tier_counters();
    assert!(counters.evicted > 0 && node.store.held.len() as u64 <= places);
    assert_eq!(counters.offloaded + counters.offload_no_place, 80);
    // A drop whose outcome is not known takes the place out of use.
    let before = node.store.held.len();
    node.put(&hashes(500..510));
    let drop = node.store.open.iter();
    if let Some(at) = drop
        .clone()
        .position(|op| matches!(op, StoreOp::Drop { .. }))
    {
        node.finish(at, Err(StoreError::Io));
    }
    node.finish_all();
    assert!(node.store.held.len() <= before + 10);
}

#[test]
fn a_drop_that_a_store_refuses_because_it_is_off_is_asked_again() {
    let mut node = Node::new(few_spare(), 1);
    node.put(&hashes(0..1));
    node.finish_all();
    node.put(&hashes(100..116));
    node.finish_all();
    node.ask_load(&hashes(0..1), 0);
    node.finish(0, Err(StoreError::Corrupt));
    assert!(matches!(node.store.open[..], [StoreOp::Drop { .. }]));
    let store = STORE;
    node.world.step(Input::StoreSwitched { store, on: false });
    node.finish(0, Err(StoreError::Off));
    assert!(node.store.open.is_empty());
    let held = node.store.held.len();
    node.world.step(Input::StoreSwitched { store, on: true });
    node.take();
    node.finish_all();
    assert_eq!(node.store.held.len(), held - 1);
}

#[test]
fn what_is_in_the_way_drops_the_offload_and_is_counted() {
    let mut node = Node::new(
        TierSettings {
            max_writes: 2,
            ..few_spare()
        },
        2,
    );
    node.put(&hashes(0..5));
    assert_eq!(node.world.core.tier_counters().offload_queue_full, 3);
    node.finish_all();
    let (store, on) = (STORE, false);
    node.world.step(Input::StoreSwitched { store, on });
    node.put(&hashes(10..11));
    assert_eq!(node.world.core.tier_counters().offload_off, 1);
    let mut node = Node::new(
        TierSettings {
            write_bytes_per_day: 24 * 3 * STRIDE,
            ..few_spare()
        },
        2,
    );
    node.world.now += 2 * 3_600_000_000;
    node.put(&hashes(0..5));
    assert_eq!(node.world.core.tier_counters().offload_budget, 2);
    node.world.now += 3_600_000_000;
    node.put(&hashes(20..21));
    assert_eq!(node.world.core.tier_counters().offload_budget, 2);
}

#[test]
fn second_use_writes_only_what_is_loaded() {
    let mut node = Node::new(
        TierSettings {
            offload: OffloadPolicy::SecondUse,
            ..few_spare()
        },
        2,
    );
    node.put(&hashes(0..5));
    assert!(node.store.open.is_empty());
    let id = node.ask_load(&hashes(1..3), 0);
    assert_eq!(
        node.answer(id).expect("answered").states,
        [LoadState::Ready; 2]
    );
    assert_eq!(node.store.open.len(), 2);
    node.finish_all();
}

#[test]
fn a_store_that_is_opened_again_serves_what_it_holds() {
    let mut node = Node::new(few_spare(), 2);
    node.put(&hashes(0..6));
    node.finish_all();
    let held = std::mem::take(&mut node.store.held);
    let mut blocks: Vec<Recovered> = Vec::new();
    for (place, header) in &held {
        blocks.push(Recovered {
            key: header.key,
            parent: header.parent,
            place: *place,
        });
    }
    let mut again = Node {
        world: World::new(settings(few_spare()), 1),
        store: Script::default(),
        replies: Vec::new(),
    };
    let store = STORE;
    let shape = store_shape();
    again.world.step(Input::StoreOpened { store, shape });
    let record = record("a", "w", CELL);
    again.world.step(Input::StoreNamespace {
        store,
        record: &record,
    });
    let foreign = BlockKey {
        namespace: NamespaceId([9; 32]),
        ..blocks[0].key
    };
    let odd = Recovered {
        key: foreign,
        parent: None,
        place: Place {
            segment: 1,
            index: 3,
            stride: STRIDE,
        },
    };
    again.store.held = held;
    let mut header = again.store.held.values().next().expect("some").clone();
    header.key = foreign;
    again.store.held.insert(odd.place, header);
    blocks.push(odd);
    again.world.step(Input::StoreBlocks {
        store,
        blocks: &blocks,
    });
    again.take();
    let counters = *again.world.core.tier_counters();
    assert_eq!((counters.recovered, counters.not_recovered), (6, 1));
    assert_eq!(again.store.open.len(), 1, "what is of no use is dropped");
    again.finish_all();
    again.world.script(1, 3);
    let id = again.ask_load(&hashes(0..7), 0);
    again.finish_all();
    let mut wanted = vec![LoadState::Ready; 6];
    wanted.push(LoadState::Absent);
    assert_eq!(again.answer(id).expect("answered").states, wanted);
}

/// What may happen to a node with a store.
#[derive(Clone, Debug)]
enum Op {
    Put(u64, u64),
    Load(u64, u64, u32),
    Finish(usize, u8),
    Look(u64, u64),
    Wait(u64),
    Switch(bool),
    Leave,
    Corrupt(usize),
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let (base, len) = (0u64..40, 1u64..8);
    let op = prop_oneof![
        6 => (base.clone(), len.clone()).prop_map(|(b, l)| Op::Put(b, l)),
        6 => (base.clone(), len.clone(), 0u32..3).prop_map(|(b, l, d)| Op::Load(b, l, d * 50)),
        16 => (0usize..100, any::<u8>()).prop_map(|(at, how)| Op::Finish(at, how)),
        2 => (base, len).prop_map(|(b, l)| Op::Look(b, l)),
        2 => (1u64..100_000).prop_map(Op::Wait),
        1 => any::<bool>().prop_map(Op::Switch),
        1 => Just(Op::Leave),
        1 => (0usize..8).prop_map(Op::Corrupt),
    ];
    prop::collection::vec(op, 1..150)
}

fn error(how: u8) -> Result<(), StoreError> {
    match how {
        0..=8 => Err(StoreError::Io),
        9..=16 => Err(StoreError::Corrupt),
        17..=24 => Err(StoreError::Off),
        _ => Ok(()),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, max_shrink_iters: 2000, ..ProptestConfig::default() })]

    /// Whatever order operations end in and however they fail: the books are right after every step, each load gets one answer
    /// while its session lives, and what is Ready has the checksums it was stored with.
    #[test]
    fn nothing_breaks_the_books(ops in ops()) {
        let mut node = Node::new(few_spare(), 2);
        let mut asked: Vec<(RequestId, Vec<[u8; 32]>)> = Vec::new();
        let mut session_lives = true;
        for op in ops {
            match op {
                Op::Put(base, len) if session_lives => drop(node.put(&hashes(base..base + len))),
                Op::Load(base, len, deadline) if session_lives => {
                    let list = hashes(base..base + len);
                    let id = node.ask_load(&list, deadline);
                    asked.push((id, list));
                }
                Op::Look(base, len) if session_lives => {
                    node.world.lookup(1, &hashes(base..base + len), 100, true);
                }
                Op::Finish(at, how) if !node.store.open.is_empty() => {
                    let at = at % node.store.open.len();
                    node.finish(at, error(how));
                }
                Op::Wait(micros) => {
                    node.world.now += micros;
                    let replies = node.world.step(Input::Tick);
                    node.replies.extend(replies);
                }
                Op::Switch(on) => {
                    let store = STORE;
                    node.world.step(Input::StoreSwitched { store, on });
                }
                Op::Leave if session_lives => {
                    let session = SessionId(1);
                    node.world.step(Input::Gone { session });
                    session_lives = false;
                    asked.retain(|(id, _)| node.replies.iter().any(|(_, of, _)| of == id));
                }
                Op::Corrupt(at) if session_lives => {
                    let id = node.ask_load(&[hash(at as u64)], 1);
                    if let Some(reply) = node.answer(id) {
                        let bad: Vec<u32> = (0..reply.slots.len() as u32).collect();
                        node.world.release(1, &reply.slots, &reply.generations, &bad);
                    } else {
                        asked.push((id, vec![hash(at as u64)]));
                    }
                    for extent in std::mem::take(&mut node.world.refills) {
                        node.world.step(Input::ExtentReady { tenant: A, extent });
                    }
                    node.take();
                }
                _ => {}
            }
            node.take();
            asked.retain(|(id, list)| {
                let Some(reply) = node.answer(*id) else { return true };
                let ready = list.iter().zip(&reply.states).filter(|(_, s)| **s == LoadState::Ready);
                let wanted: Vec<u64> = ready.flat_map(|(hash, _)| crcs_of(hash)).collect();
                assert_eq!(reply.crcs, wanted);
                node.release(&reply);
                false
            });
        }
        node.finish_all();
        for extent in std::mem::take(&mut node.world.refills) {
            node.world.step(Input::ExtentReady { tenant: A, extent });
        }
        asked.retain(|(id, _)| node.answer(*id).is_none());
        assert!(asked.is_empty(), "loads without an answer: {asked:?}");
        assert_eq!(node.world.status().slots.reserved, 0);
    }
}
