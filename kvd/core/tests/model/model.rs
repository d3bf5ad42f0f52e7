//! What must be so: the memory, everyone who may write it, and what was promised to readers.

use std::collections::BTreeMap;

use kvd_core::*;

use crate::common::*;
use crate::engines::{ENGINES, Op, Process, processes};

const EXTENTS: u64 = 2;
/// Grain of the model's memory.
pub(crate) const GRAIN: u64 = 256;
const DEADLINE: u64 = 60_000_000;

pub(crate) type Key = (TenantId, &'static str, [u8; 32]);

/// A slot that an instance was given.
pub(crate) struct Claim {
    pub(crate) engine: usize,
    pub(crate) key: Key,
    pub(crate) slot: u32,
    pub(crate) word: u64,
    pub(crate) offset: u64,
    pub(crate) deadline: u64,
    /// Workers know of it.
    pub(crate) told: bool,
    /// One of its writers has committed or aborted it.
    pub(crate) heard: bool,
    pub(crate) given_up: bool,
    /// Session that has to write each part; `None` once it is terminal or has committed.
    pub(crate) writers: Vec<Option<u64>>,
    /// The part's bytes are as they should be.
    pub(crate) copied: Vec<bool>,
}

/// A load under way.
pub(crate) struct Read {
    pub(crate) process: usize,
    pub(crate) session: u64,
    pub(crate) key: Key,
    pub(crate) slot: u32,
    pub(crate) word: u64,
    pub(crate) offset: u64,
    pub(crate) cut: Cut,
    pub(crate) crcs: Vec<u64>,
    /// What the reader's copy got.
    pub(crate) got: Option<Vec<u64>>,
}

#[derive(Clone, Default)]
pub(crate) struct Live {
    pub(crate) session: Option<u64>,
    pub(crate) attached: bool,
    /// Its former sessions that it has not fenced.
    pub(crate) pasts: Vec<u64>,
}

pub struct Model {
    pub world: World,
    pub(crate) processes: Vec<Process>,
    pub(crate) live: Vec<Live>,
    pub(crate) tokens: u64,
    pub(crate) memory: BTreeMap<TenantId, Vec<u64>>,
    pub(crate) tampered: bool,
    pub(crate) claims: Vec<Claim>,
    pub(crate) reads: Vec<Read>,
    /// By the change log.
    pub(crate) resident: BTreeMap<Key, (u64, u64)>,
    pub(crate) places: BTreeMap<Key, (u64, u64)>,
    pub(crate) seen: u64,
}

pub(crate) fn cut_of(engine: usize) -> (Cut, GroupGeometry) {
    let e = &ENGINES[engine];
    let (kind, window) = (GroupKind::Full, None);
    let geometry = GroupGeometry {
        kind,
        layers: 4,
        heads: 4,
        block_tokens: 16,
        cell_bytes: e.cell,
        window,
    };
    (Cut::grid(&geometry, e.pp, e.tp).unwrap(), geometry)
}

/// What belongs at (layer, head) of a block.
pub(crate) fn print(key: &Key, layer: u32, head: u32) -> u64 {
    let weights = key.1.len() as u64;
    let mut print = low64(&key.2) ^ (u64::from(key.0.0) << 60) ^ (weights << 56);
    for n in [layer, head] {
        print = (print ^ u64::from(n + 1))
            .wrapping_mul(0x100_0000_01B3)
            .rotate_left(17);
    }
    print | 1
}

/// Stands for the checksum of one head of a part.
pub(crate) fn crc(prints: impl Iterator<Item = u64>) -> u64 {
    prints.fold(7, |crc, print| {
        (crc ^ print).wrapping_mul(0x9E37_79B9_7F4A_7C15)
    })
}

impl Model {
    pub fn new(eviction: EvictionPolicy) -> Model {
        let settings = Settings {
            eviction,
            fill_deadline_us: DEADLINE,
            max_claims: 24,
            max_read_leases: 40,
            corrupt_streak: 2,
            ..Settings::default()
        };
        let processes = processes();
        let memory = [A, B].map(|tenant| (tenant, vec![0; (EXTENTS * EXTENT / GRAIN) as usize]));
        let mut model = Model {
            world: World::new(settings, EXTENTS),
            live: processes.iter().map(|_| Live::default()).collect(),
            processes,
            tokens: 0,
            memory: memory.into(),
            tampered: false,
            claims: Vec::new(),
            reads: Vec::new(),
            resident: BTreeMap::new(),
            places: BTreeMap::new(),
            seen: 0,
        };
        (0..model.processes.len()).for_each(|process| model.open(process, false));
        model
    }

    pub(crate) fn session(&self, process: usize) -> Option<u64> {
        let live = &self.live[process];
        live.session.filter(|_| live.attached)
    }

    pub(crate) fn key(&self, process: usize, hash: [u8; 32]) -> Key {
        let engine = &ENGINES[self.processes[process].engine];
        (engine.tenant, engine.weights, hash)
    }

    pub fn apply(&mut self, op: &Op) {
        self.world.now += 1;
        self.pass_deadlines();
        match *op {
            Op::Reserve { process, base, len } => self.reserve(process, base, len),
            Op::Tell { engine } => self.tell(engine),
            Op::Scribble { process, pick } => self.scribble(process, pick),
            Op::Store { process, count } => self.store(process, count),
            Op::Abort { process, pick } => self.abort(process, pick),
            Op::Untell { engine } => self.untell(engine),
            Op::Detach { process } => self.detach(process),
            Op::Kill { process } => self.end(process, true),
            Op::Close { process } => self.end(process, false),
            Op::Open { process, fence } => self.open(process, fence),
            Op::Revive { engine } => {
                for process in 0..self.processes.len() {
                    if self.processes[process].engine == engine {
                        self.open(process, true);
                    }
                }
            }
            Op::Lookup {
                process,
                base,
                len,
                lease,
                leading,
            } => {
                self.lookup(process, &hashes(base..base + len), lease, leading);
            }
            Op::Load { process, base, len } => self.load(process, base, len),
            Op::Copy { pick } => self.copy_out(pick),
            Op::Finish { pick } => self.finish(pick),
            Op::Tamper { pick } => self.tamper(pick),
            Op::Lie {
                process,
                kind,
                pick,
                off,
            } => self.lie(process, kind, pick, off),
            Op::Wait { micros } => {
                self.world.now += micros;
                self.pass_deadlines();
                self.world.step(Input::Tick);
            }
            Op::Hurry { engine } => {
                self.tell(engine);
                for process in 0..self.processes.len() {
                    if self.processes[process].engine == engine {
                        self.store(process, usize::MAX);
                    }
                }
            }
        }
        self.follow_log();
        while let Some(extent) = self.world.refills.pop() {
            for tenant in [A, B] {
                self.world.step(Input::ExtentReady { tenant, extent });
            }
        }
    }

    /// Everyone dies: every slot must come home.
    pub fn quiesce(&mut self) {
        (0..self.processes.len()).for_each(|process| self.end(process, true));
        self.world.now += 100_000_000;
        self.world.step(Input::Tick);
        for tenant in [A, B] {
            let status = self.world.core.status(tenant).unwrap();
            let slots = status.slots;
            assert_eq!(
                (slots.reserved, slots.filling, slots.quarantined),
                (0, 0, 0)
            );
            assert_eq!((status.pinned_bytes, status.sessions.len()), (0, 0));
        }
        self.follow_log();
    }

    pub(crate) fn pass_deadlines(&mut self) {
        let now = self.world.now;
        let open = self.claims.iter_mut();
        open.filter(|claim| claim.deadline <= now)
            .for_each(|claim| claim.given_up = true);
        self.drop_ended();
    }

    pub(crate) fn drop_ended(&mut self) {
        self.claims
            .retain(|claim| claim.writers.iter().any(Option::is_some));
    }

    /// The log says what is resident; it must never name what was not stored.
    pub(crate) fn follow_log(&mut self) {
        for tenant in [A, B] {
            let log = self.world.core.changes(tenant, self.seen, usize::MAX);
            assert!(!log.lost);
            for change in log.changes {
                let weights = self.weights_of(tenant, change.namespace);
                let key = (tenant, weights, change.hash.0);
                match change.kind {
                    ChangeKind::Stored => {
                        let place = self
                            .places
                            .remove(&key)
                            .expect("stored what nobody completed");
                        assert!(self.resident.insert(key, place).is_none());
                    }
                    ChangeKind::Removed => assert!(self.resident.remove(&key).is_some()),
                }
            }
        }
        self.seen = self.world.core.changes(A, self.seen, usize::MAX).next;
        assert!(self.places.is_empty(), "completed, but not in the log");
    }

    pub(crate) fn weights_of(&self, tenant: TenantId, id: NamespaceId) -> &'static str {
        let name = if tenant == A { "a" } else { "b" };
        let engine = ENGINES.iter().find(|engine| {
            let record = record(name, engine.weights, engine.cell);
            engine.tenant == tenant && NamespaceRecord::parse(&record).unwrap().id() == id
        });
        engine.expect("a namespace of this tenant").weights
    }

    pub(crate) fn reserve(&mut self, process: usize, base: u64, len: u64) {
        let Some(session) = self.session(process) else {
            return;
        };
        if self.processes[process].role == Role::Worker {
            return;
        }
        let list = hashes(base..base + len);
        let chain = Chain {
            group: 0,
            hashes: &list,
            parent: base.checked_sub(1).map(|n| BlockHash(hash(n))),
        };
        let engine = self.processes[process].engine;
        let everyone = (0..self.processes.len()).all(|p| {
            let other = self.processes[p];
            other.engine != engine || other.part.is_none() || self.live[p].attached
        });
        let before = self.resident.clone();
        let got = match self.world.ask(
            session,
            Request::Reserve {
                namespace: 0,
                chains: &[chain],
            },
        ) {
            Reply::Reserve(got) => got,
            reply => {
                assert_eq!(kind(&reply), Some(ErrorKind::Unavailable));
                return assert!(!everyone, "refused though every rank is there");
            }
        };
        assert!(everyone, "reserved while a rank is missing");
        self.follow_log();
        let mut given = 0;
        for (hash, state) in list.iter().zip(&got.states) {
            let key = self.key(process, *hash);
            let filling = self
                .claims
                .iter()
                .any(|claim| claim.key == key && !claim.given_up);
            match state {
                ReserveState::Present => assert!(before.contains_key(&key)),
                ReserveState::Filling => assert!(filling),
                ReserveState::NoSpace => assert!(!before.contains_key(&key) && !filling),
                ReserveState::Reserved => {
                    assert!(!before.contains_key(&key) && !filling);
                    self.claim(engine, key, &got, given);
                    given += 1;
                }
            }
        }
        assert_eq!(
            (given, given, given),
            (got.slots.len(), got.generations.len(), got.offsets.len())
        );
    }

    /// Invariant 3, where it counts: nobody else may write here, and nothing visible is here.
    pub(crate) fn claim(&mut self, engine: usize, key: Key, got: &ReserveReply, at: usize) {
        let (slot, word, offset) = (got.slots[at], got.generations[at], got.offsets[at]);
        let bytes = u64::from(ENGINES[engine].cell) * 256;
        let overlaps = |start: u64, length: u64| start < offset + bytes && offset < start + length;
        for claim in self.claims.iter().filter(|claim| claim.key.0 == key.0) {
            let length = u64::from(ENGINES[claim.engine].cell) * 256;
            assert!(
                !overlaps(claim.offset, length),
                "given while another may write it"
            );
        }
        for (other, (start, length)) in &self.resident {
            assert!(
                other.0 != key.0 || !overlaps(*start, *length),
                "given while it is visible"
            );
        }
        let (cut, _) = cut_of(engine);
        let writer = |part: u32| {
            let all = (0..self.processes.len()).filter(|p| {
                let process = self.processes[*p];
                process.engine == engine && process.part == Some(part)
            });
            let all: Vec<usize> = all.collect();
            self.live[all[replica_of(&key.2, all.len())]].session
        };
        let writers: Vec<Option<u64>> = (0..cut.parts()).map(writer).collect();
        let copied = vec![false; writers.len()];
        let deadline = self.world.now + DEADLINE;
        let told = !ENGINES[engine].scheduler;
        let (heard, given_up) = (false, false);
        let claim = Claim {
            engine,
            key,
            slot,
            word,
            offset,
            deadline,
            told,
            heard,
            given_up,
            writers,
            copied,
        };
        self.claims.push(claim);
    }

    pub(crate) fn tell(&mut self, engine: usize) {
        let own = self
            .claims
            .iter_mut()
            .filter(|claim| claim.engine == engine);
        own.for_each(|claim| claim.told = true);
    }

    /// Parts that a process (attached or not) has to write.
    pub(crate) fn writable(&self, process: usize) -> Vec<(usize, usize)> {
        let sessions: Vec<u64> = self.live[process].session.into_iter().collect();
        self.parts_of(&sessions)
    }

    /// Parts of blocks that workers know of, which one of these sessions may be writing.
    fn parts_of(&self, sessions: &[u64]) -> Vec<(usize, usize)> {
        let mut found = Vec::new();
        for (at, claim) in self.claims.iter().enumerate() {
            let parts = claim.writers.iter().enumerate();
            let own = parts.filter(|(_, w)| claim.told && w.is_some_and(|w| sessions.contains(&w)));
            found.extend(own.map(|(part, _)| (at, part)));
        }
        found
    }

    pub(crate) fn write(&mut self, claim: usize, part: usize, right: bool) {
        let claim = &mut self.claims[claim];
        claim.copied[part] = right;
        let (cut, geometry) = cut_of(claim.engine);
        let rect = cut.part(part as u32);
        let memory = self.memory.get_mut(&claim.key.0).unwrap();
        for layer in rect.layers.clone() {
            for head in rect.heads.clone() {
                let at = claim.offset + cut.head_offset(part as u32, layer, head, &geometry);
                let value = if right {
                    print(&claim.key, layer, head)
                } else {
                    0xDEAD
                };
                let grains = (geometry.head_bytes() / GRAIN) as usize;
                memory[(at / GRAIN) as usize..][..grains].fill(value);
            }
        }
    }

    /// A copy under way, also by a process whose socket is closed, or that has not fenced an earlier one.
    pub(crate) fn scribble(&mut self, process: usize, pick: usize) {
        let live = &self.live[process];
        let sessions: Vec<u64> = live.session.iter().chain(&live.pasts).copied().collect();
        let parts = self.parts_of(&sessions);
        if let Some((claim, part)) = parts.get(pick % parts.len().max(1)) {
            self.write(*claim, *part, false);
        }
    }

    pub(crate) fn store(&mut self, process: usize, count: usize) {
        if self.session(process).is_none() {
            return;
        }
        let parts: Vec<_> = self.writable(process).into_iter().take(count).collect();
        for (claim, part) in &parts {
            self.write(*claim, *part, true);
        }
        let list = parts
            .iter()
            .map(|(at, _)| (self.claims[*at].slot, self.claims[*at].word));
        let list: Vec<(u32, u64)> = list.collect();
        self.commit(process, &list);
    }

    /// Commits whatever it is told to, and knows what must come of it.
    pub(crate) fn commit(&mut self, process: usize, list: &[(u32, u64)]) {
        let (Some(session), Some(part)) = (self.session(process), self.processes[process].part)
        else {
            return;
        };
        let engine = self.processes[process].engine;
        let (cut, _) = cut_of(engine);
        let rect = cut.part(part);
        let mut crcs = Vec::new();
        for (slot, word) in list {
            let claim = self.claim_of(engine, *slot, *word);
            for head in rect.heads.clone() {
                let key = claim.map_or((A, "", [0; 32]), |at| self.claims[at].key);
                crcs.push(crc(rect
                    .layers
                    .clone()
                    .map(|layer| print(&key, layer, head))));
            }
        }
        let slots: Vec<u32> = list.iter().map(|(slot, _)| *slot).collect();
        let words: Vec<u64> = list.iter().map(|(_, word)| *word).collect();
        let states = self.world.commit(session, &slots, &words, &crcs);
        assert_eq!(states.len(), list.len());
        for ((slot, word), state) in list.iter().zip(states) {
            let wanted = self.part_done(engine, session, part as usize, *slot, *word, state);
            let suspect =
                self.tampered && wanted == CommitState::Visible && state == CommitState::Stale;
            assert!(wanted == state || suspect, "{state:?} for {wanted:?}");
        }
        self.drop_ended();
    }

    pub(crate) fn claim_of(&self, engine: usize, slot: u32, word: u64) -> Option<usize> {
        self.claims
            .iter()
            .position(|c| (c.engine, c.slot, c.word) == (engine, slot, word))
    }

    pub(crate) fn part_done(
        &mut self,
        engine: usize,
        session: u64,
        part: usize,
        slot: u32,
        word: u64,
        state: CommitState,
    ) -> CommitState {
        let Some(at) = self.claim_of(engine, slot, word) else {
            return CommitState::Stale;
        };
        let claim = &mut self.claims[at];
        if claim.writers[part] != Some(session) {
            return CommitState::Stale;
        }
        claim.writers[part] = None;
        claim.heard = true;
        if claim.given_up {
            return CommitState::Stale;
        }
        if claim.writers.iter().any(Option::is_some) {
            return CommitState::Waiting;
        }
        if state == CommitState::Visible {
            let bytes = u64::from(ENGINES[engine].cell) * 256;
            self.places.insert(claim.key, (claim.offset, bytes));
        }
        CommitState::Visible
    }

    pub(crate) fn abort(&mut self, process: usize, pick: usize) {
        let parts = self.writable(process);
        if let Some((claim, _)) = parts.get(pick % parts.len().max(1)) {
            let claim = &self.claims[*claim];
            let (slot, word) = (claim.slot, claim.word);
            self.abort_slot(process, slot, word);
        }
    }

    pub(crate) fn abort_slot(&mut self, process: usize, slot: u32, word: u64) {
        let Some(session) = self.session(process) else {
            return;
        };
        let count = self.world.abort(session, &[slot], &[word]);
        let mut wanted = 0;
        if let Some(at) = self.claim_of(self.processes[process].engine, slot, word) {
            let claim = &mut self.claims[at];
            for writer in claim
                .writers
                .iter_mut()
                .filter(|writer| **writer == Some(session))
            {
                *writer = None;
                claim.given_up = true;
                claim.heard = true;
                wanted = 1;
            }
        }
        assert_eq!(
            count, wanted,
            "an abort counts exactly what was this session's"
        );
        self.drop_ended();
    }

    /// A scheduler gives back what it has told nobody of.
    pub(crate) fn untell(&mut self, engine: usize) {
        let scheduler = (0..self.processes.len()).find(|p| {
            self.processes[*p].engine == engine && self.processes[*p].role == Role::Scheduler
        });
        let Some(session) = scheduler.and_then(|process| self.session(process)) else {
            return;
        };
        let own = |claim: &Claim| claim.engine == engine && !claim.told;
        let untold = self.claims.iter().filter(|claim| own(claim));
        let (slots, words): (Vec<u32>, Vec<u64>) = untold.map(|c| (c.slot, c.word)).unzip();
        assert_eq!(
            self.world.abort(session, &slots, &words) as usize,
            slots.len()
        );
        for claim in self.claims.iter_mut().filter(|claim| own(claim)) {
            claim.given_up = true;
            if !claim.heard {
                claim.writers.fill(None);
            }
        }
        self.drop_ended();
    }
}
