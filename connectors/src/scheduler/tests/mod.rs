//! The scheduler half against a scripted daemon: a fake that answers exactly what a test tells it to.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;

use kvd_client::{GroupLayout, reply, request};
use kvd_core::GroupKind;
use kvd_wire::session::{LookupReply, Presence, ReserveReply, ReserveState, Where, request::Body};
use prost::Message;

mod groups;
mod guard;
mod loads;
mod stores;

use super::*;
use crate::fleet::tests::hello;
use crate::meta::{StepMeta, StoreOrder};

/// A fake daemon: remembers what it was asked, answers when told.
#[derive(Default)]
struct Fake {
    asked: RefCell<Vec<Body>>,
    /// How many of those have been sent.
    sent: Cell<usize>,
    /// How often its thread was woken at once.
    woken: Cell<usize>,
    answers: RefCell<HashMap<usize, Result<reply::Body, Fault>>>,
    registered: Cell<bool>,
    connected: Cell<bool>,
    epoch: Cell<u64>,
    records: RefCell<Vec<Vec<u8>>>,
}

impl Fake {
    fn answer(&self, at: usize, body: reply::Body) {
        self.answers.borrow_mut().insert(at, Ok(body));
    }

    fn last(&self) -> usize {
        self.asked.borrow().len() - 1
    }

    fn count(&self, wanted: fn(&Body) -> bool) -> usize {
        self.asked
            .borrow()
            .iter()
            .filter(|body| wanted(body))
            .count()
    }
}

/// Blocks of one group.
fn one(
    group: u32,
    hashes: Vec<u8>,
    blocks: impl Into<Vec<u32>>,
) -> [(u32, bytes::Bytes, Vec<u32>); 1] {
    [(group, hashes.into(), blocks.into())]
}

impl Port for Fake {
    type Ticket = usize;
    type Namespace = usize;

    fn queue(&self, body: request::Body) -> Result<usize, Fault> {
        if !self.connected.get() {
            return Err(Fault::Unavailable);
        }
        self.asked.borrow_mut().push(body);
        Ok(self.last())
    }

    fn queue_on(&self, _: &Registered, body: request::Body) -> Result<usize, Fault> {
        self.queue(body)
    }

    fn wake(&self) {
        self.woken.set(self.woken.get() + 1);
        self.wake_soon();
    }

    fn wake_soon(&self) {
        self.sent.set(self.asked.borrow().len());
    }

    fn queue_and_forget(&self, body: request::Body) -> Result<(), Fault> {
        self.queue(body).map(drop)
    }

    fn poll(&self, ticket: &mut usize) -> Option<Result<reply::Body, Fault>> {
        self.answers.borrow_mut().remove(ticket)
    }

    fn register(&self, record: Vec<u8>, _: Vec<GroupLayout>) -> Result<usize, Fault> {
        self.records.borrow_mut().push(record);
        Ok(self.records.borrow().len() - 1)
    }

    fn current(&self, namespace: &usize) -> Option<Registered> {
        (self.connected.get() && self.registered.get()).then_some(Registered {
            namespace: *namespace as u32 + 10,
            epoch: 1,
            incarnation: [7; 16],
        })
    }

    fn refused(&self, _: &usize) -> Option<String> {
        None
    }

    fn connected(&self) -> bool {
        self.connected.get()
    }

    fn epoch(&self) -> u64 {
        self.epoch.get()
    }
}

const TOKENS: u32 = 4;

fn full(tokens: u32) -> GroupRule {
    GroupRule::new(GroupKind::Full, tokens, None).unwrap()
}

/// Finishes a request whose last full blocks of group 0 these are.
fn finish(half: &mut Scheduler<Fake>, now: u64, id: &str, hashes: &[u8], blocks: &[u32]) -> bool {
    half.last_blocks(id, 0, hashes.to_vec(), blocks);
    half.finished(now, id)
}

fn hash(chain: u8, at: u32) -> [u8; 32] {
    let mut hash = [chain; 32];
    hash[..4].copy_from_slice(&at.to_le_bytes());
    hash
}

fn hashes(chain: u8, range: std::ops::Range<u32>) -> Vec<u8> {
    range.flat_map(|at| hash(chain, at)).collect()
}

fn facts() -> crate::record::Fields {
    [
        ("tenant", "default"),
        ("model", "m"),
        ("weights", "blake3:00"),
        ("kv_dtype", "bfloat16"),
        ("hash", "sha256_cbor:1f2e"),
    ]
    .map(|(name, value)| (name.to_owned(), value.to_owned()))
    .to_vec()
}

/// A scheduler half with `world` workers that knows everything and whose workers have registered.
fn ready(world: u32) -> Scheduler<Fake> {
    ready_of((0..world).map(|rank| hello(rank, world, 0, 0, 2, (rank, 1, world))))
}

/// The same with these workers.
fn ready_of(hellos: impl ExactSizeIterator<Item = RankHello>) -> Scheduler<Fake> {
    let world = hellos.len() as u32;
    let fake = Fake::default();
    fake.connected.set(true);
    fake.registered.set(true);
    let mut half = Scheduler::new(
        Settings {
            world,
            groups: vec![full(TOKENS)],
            ..Settings::default()
        },
        fake,
    );
    for hello in hellos {
        half.on_hello(hello);
    }
    half.set_facts(facts(), "instance");
    report(&mut half, world, &[0], &[]);
    half
}

fn report(half: &mut Scheduler<Fake>, world: u32, registered: &[u32], done: &[u64]) {
    for rank in 0..world {
        let bytes = RankReport {
            version: VERSION,
            rank,
            epoch: 5 + u64::from(rank),
            registered: registered.to_vec(),
            done: done.to_vec(),
            hello: None,
            counters: Vec::new(),
        }
        .encode_to_vec();
        half.on_output(&[], &[], &[], &[], &[&bytes]).unwrap();
    }
}

/// Runs of blocks: first, how many, and where they are.
pub(super) fn presence(runs: &[(u32, u32, Where)]) -> Presence {
    Presence {
        start: runs.iter().map(|run| run.0).collect(),
        length: runs.iter().map(|run| run.1).collect(),
        r#where: runs.iter().map(|run| run.2 as i32).collect(),
    }
}

fn present(count: u32, lease: u64) -> reply::Body {
    reply::Body::Lookup(LookupReply {
        chains: vec![presence(&[(0, count, Where::Host)])],
        lease,
        ..LookupReply::default()
    })
}

fn reserved(states: &[ReserveState]) -> reply::Body {
    let count = states
        .iter()
        .filter(|state| **state == ReserveState::Reserved)
        .count() as u32;
    reply::Body::Reserve(ReserveReply {
        states: states.iter().map(|state| *state as i32).collect(),
        slots: (100..100 + count).collect(),
        generations: (0..u64::from(count)).map(|n| 2 * n + 1).collect(),
        offsets: (0..u64::from(count)).map(|n| n * 4096).collect(),
    })
}

fn step(half: &mut Scheduler<Fake>, now: u64) -> StepMeta {
    let bytes = half.end_step(now);
    match bytes.is_empty() {
        true => StepMeta::default(),
        false => meta::decode(&bytes).unwrap(),
    }
}

/// The engine's numbers of what an order copies.
fn blocks(order: &StoreOrder) -> Vec<u32> {
    order.all().map(|entry| entry.block).collect()
}

fn is_lookup(body: &Body) -> bool {
    matches!(body, Body::Lookup(_))
}

fn is_ping(body: &Body) -> bool {
    matches!(body, Body::Ping(_))
}

fn is_release(body: &Body) -> bool {
    matches!(body, Body::Release(_))
}

fn is_reserve(body: &Body) -> bool {
    matches!(body, Body::Reserve(_))
}
