//! A world around the core for tests: it does what outputs say, as a node would, and asserts what every step must keep.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)]

use std::collections::BTreeMap;

use kvd_core::*;

pub const EXTENT: u64 = 64 << 10;

/// Engine geometry of the tests: 4 layers, 4 heads, 4096 bytes a block unless `cell` says otherwise.
pub fn record(tenant: &str, weights: &str, cell: u32) -> Vec<u8> {
    let cell = cell.to_string();
    let fields = [
        ("tenant", tenant),
        ("model", "m"),
        ("weights", weights),
        ("kv_dtype", "bfloat16"),
        ("cell_encoding", "flash:1"),
        ("hash", "sha256_cbor:1f2e"),
        ("block_tokens", "16"),
        ("groups", "1"),
        ("group.0.kind", "full"),
        ("group.0.layers", "4"),
        ("group.0.heads", "4"),
        ("group.0.cell_bytes", &cell),
    ];
    NamespaceRecord::build(fields).unwrap().encode()
}

/// Cells that make a block of exactly one 4 KiB slot.
pub const CELL: u32 = 16;

pub fn hash(n: u64) -> [u8; 32] {
    let mut hash = [0; 32];
    hash[..8].copy_from_slice(&n.to_be_bytes());
    hash[24..].copy_from_slice(&n.wrapping_mul(0x9E37_79B9_7F4A_7C15).to_be_bytes());
    hash
}

pub fn hashes(range: std::ops::Range<u64>) -> Vec<[u8; 32]> {
    range.map(hash).collect()
}

pub struct World {
    pub core: Core,
    pub now: u64,
    pub requests: u32,
    /// The generation tables as clients see them.
    pub words: BTreeMap<(TenantId, u32), u64>,
    pub tables: BTreeMap<TenantId, Vec<SessionId>>,
    /// Everything that came out, in order.
    pub seen: Vec<Output>,
    pub ended: Vec<(SessionId, Failure)>,
    pub refills: Vec<u32>,
    /// What stores were asked to do, in order, until somebody takes it.
    pub store_ops: Vec<(StoreId, tier::StoreOp)>,
    pub checking: bool,
}

pub fn shape(extents: u64) -> ArenaShape {
    ArenaShape {
        id: [1; 16],
        bytes: extents * EXTENT,
        extent_bytes: EXTENT,
        page_bytes: 4096,
        slots_per_extent: (EXTENT / 4096) as u32,
    }
}

pub const A: TenantId = TenantId(0);
pub const B: TenantId = TenantId(1);

impl World {
    /// Two tenants, "a" and "b", with arenas of `extents` extents of 16 slots of 4 KiB each.
    pub fn new(settings: Settings, extents: u64) -> World {
        let mut world = World::bare(settings);
        for tenant in [A, B] {
            world.arena(tenant, extents, None);
        }
        world
    }

    pub fn bare(settings: Settings) -> World {
        let mut world = World {
            core: Core::new(settings),
            now: 1,
            requests: 0,
            words: BTreeMap::new(),
            tables: BTreeMap::new(),
            seen: Vec::new(),
            ended: Vec::new(),
            refills: Vec::new(),
            store_ops: Vec::new(),
            checking: true,
        };
        for (tenant, name) in [(A, "a"), (B, "b")] {
            world.step(Input::Tenant {
                tenant,
                name,
                limits: TenantLimits::default(),
            });
        }
        world
    }

    pub fn arena(&mut self, tenant: TenantId, extents: u64, adopted: Option<Adopted<'_>>) {
        self.step(Input::Arena {
            tenant,
            shape: shape(extents),
            adopted,
        });
        for extent in 0..extents as u32 {
            self.step(Input::ExtentReady { tenant, extent });
        }
    }

    /// One step; returns the replies of it.
    pub fn step(&mut self, input: Input<'_>) -> Vec<(SessionId, RequestId, Reply)> {
        let mut out = Vec::new();
        self.core.step(Now(self.now), input, &mut out);
        if self.checking {
            self.core.check();
        }
        let mut replies = Vec::new();
        for output in &out {
            match output {
                Output::SetGeneration { tenant, slot, word } => {
                    let old = self.words.insert((*tenant, *slot), *word).unwrap_or(0);
                    assert!(*word > old, "a generation went from {old} to {word}");
                }
                Output::Reply { session, id, reply } => {
                    replies.push((*session, *id, (**reply).clone()));
                }
                Output::WriterTable { tenant, tokens } => {
                    self.tables.insert(*tenant, tokens.clone());
                }
                Output::EndSession { session, failure } => {
                    self.ended.push((*session, failure.clone()));
                }
                Output::Refill { extent, .. } => self.refills.push(*extent),
                Output::Store { store, op } => self.store_ops.push((*store, op.clone())),
                Output::ArenaRefused { .. } => {}
            }
        }
        self.seen.extend(out);
        replies
    }

    /// Asks and returns the one reply there must be.
    pub fn ask(&mut self, session: u64, body: Request<'_>) -> Reply {
        self.requests += 1;
        let id = RequestId(self.requests);
        let session = SessionId(session);
        let mut replies = self.step(Input::Request { session, id, body });
        assert_eq!(replies.len(), 1, "exactly one reply");
        let (to, of, reply) = replies.remove(0);
        assert_eq!((to, of), (session, id));
        reply
    }

    pub fn open(
        &mut self,
        session: u64,
        tenant: TenantId,
        instance: u8,
        role: Role,
        rank: u32,
        world: u32,
    ) {
        self.open_after(session, tenant, instance, role, rank, world, None);
    }

    #[allow(clippy::too_many_arguments)]
    pub fn open_after(
        &mut self,
        session: u64,
        tenant: TenantId,
        instance: u8,
        role: Role,
        rank: u32,
        world: u32,
        past: Option<u64>,
    ) {
        self.step(Input::Opened {
            session: SessionId(session),
            tenant,
            instance: InstanceId([instance; 16]),
            role,
            rank,
            world,
            label: "test",
            past: past.map(SessionId),
        });
    }

    /// Registers with a cut of `pp` x `tp` parts; `part`: what it copies.
    pub fn register(
        &mut self,
        session: u64,
        record: &[u8],
        pp: u32,
        tp: u32,
        part: Option<u32>,
    ) -> Reply {
        let layers: Vec<u32> = (0..=pp).map(|i| i * 4 / pp).collect();
        let heads: Vec<u32> = (0..=tp).map(|i| i * 4 / tp).collect();
        let groups = [GroupLayout {
            group: 0,
            layer_bounds: &layers,
            head_bounds: &heads,
            copies: part.is_some(),
            part: part.unwrap_or(0),
        }];
        self.ask(
            session,
            Request::Register {
                record,
                groups: &groups,
            },
        )
    }

    /// A session that does everything, in tenant "a", with blocks of one slot.
    pub fn script(&mut self, session: u64, instance: u8) {
        self.open(session, A, instance, Role::Both, 0, 1);
        let reply = self.register(session, &record("a", "w", CELL), 1, 1, Some(0));
        assert!(
            matches!(reply, Reply::Registered { namespace: 0, .. }),
            "{reply:?}"
        );
    }

    pub fn reserve(
        &mut self,
        session: u64,
        list: &[[u8; 32]],
        parent: Option<[u8; 32]>,
    ) -> ReserveReply {
        let chain = Chain {
            group: 0,
            hashes: list,
            parent: parent.map(BlockHash),
        };
        match self.ask(
            session,
            Request::Reserve {
                namespace: 0,
                chains: &[chain],
            },
        ) {
            Reply::Reserve(reply) => reply,
            other => panic!("{other:?}"),
        }
    }

    pub fn commit(
        &mut self,
        session: u64,
        slots: &[u32],
        generations: &[u64],
        crcs: &[u64],
    ) -> Vec<CommitState> {
        match self.ask(
            session,
            Request::Commit {
                namespace: 0,
                group: 0,
                slots,
                generations,
                crcs,
            },
        ) {
            Reply::Commit(states) => states,
            other => panic!("{other:?}"),
        }
    }

    /// Reserves and commits what is not there, as one writer of whole blocks.
    pub fn store(&mut self, session: u64, list: &[[u8; 32]]) -> ReserveReply {
        let reply = self.reserve(session, list, None);
        let crcs: Vec<u64> = (0..reply.slots.len() as u64 * 4).collect();
        let states = self.commit(session, &reply.slots, &reply.generations, &crcs);
        assert!(
            states.iter().all(|state| *state == CommitState::Visible),
            "{states:?}"
        );
        reply
    }

    pub fn load(&mut self, session: u64, list: &[[u8; 32]]) -> LoadReply {
        let body = Request::Load {
            namespace: 0,
            group: 0,
            hashes: list,
            deadline_ms: 0,
        };
        match self.ask(session, body) {
            Reply::Load(reply) => reply,
            other => panic!("{other:?}"),
        }
    }

    pub fn lookup(
        &mut self,
        session: u64,
        list: &[[u8; 32]],
        lease_ms: u32,
        leading: bool,
    ) -> LookupReply {
        let chains = [Chain {
            group: 0,
            hashes: list,
            parent: None,
        }];
        match self.ask(
            session,
            Request::Lookup {
                namespace: 0,
                chains: &chains,
                lease_ms,
                scope: match leading {
                    true => Scope::Leading,
                    false => Scope::All,
                },
            },
        ) {
            Reply::Lookup(reply) => reply,
            other => panic!("{other:?}"),
        }
    }

    /// How many of these are loadable.
    pub fn hits(&mut self, session: u64, list: &[[u8; 32]]) -> usize {
        let reply = self.lookup(session, list, 0, false);
        (0..list.len() as u32)
            .filter(|at| reply.chains[0].at(*at) == Where::Host)
            .count()
    }

    pub fn abort(&mut self, session: u64, slots: &[u32], generations: &[u64]) -> u32 {
        match self.ask(session, Request::Abort { slots, generations }) {
            Reply::Aborted { count } => count,
            other => panic!("{other:?}"),
        }
    }

    pub fn release(&mut self, session: u64, slots: &[u32], generations: &[u64], corrupt: &[u32]) {
        let body = Request::Release {
            slots,
            generations,
            corrupt,
            lease: 0,
        };
        assert_eq!(self.ask(session, body), Reply::Released);
    }

    pub fn status(&self) -> StatusView {
        self.core.status(A).unwrap()
    }

    pub fn word(&self, slot: u32) -> u64 {
        self.words.get(&(A, slot)).copied().unwrap_or(0)
    }
}

pub fn kind(reply: &Reply) -> Option<ErrorKind> {
    match reply {
        Reply::Failure(failure) => Some(failure.kind),
        _ => None,
    }
}
