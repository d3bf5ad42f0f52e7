//! What one step costs with 1,000,000 blocks resident: lookups hot and cold, reservations that evict, loads.
//! Hot: the same chain again. Cold: a chain that no lookup has touched for as long as possible.
#![allow(missing_docs)]

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use kvd_core::*;

const BLOCKS: u64 = 1_000_000;
const SESSION: SessionId = SessionId(1);
const TENANT: TenantId = TenantId(0);

struct Bench {
    core: Core,
    out: Vec<Output>,
    now: u64,
}

/// Like a real hash: nothing about it is ordered.
fn hash(n: u64) -> [u8; 32] {
    let mut state = n.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut hash = [0; 32];
    for eight in hash.chunks_exact_mut(8) {
        state = (state ^ (state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        state = (state ^ (state >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        eight.copy_from_slice(&(state ^ (state >> 31)).to_be_bytes());
    }
    hash
}

fn hashes(first: u64, count: u64) -> Vec<[u8; 32]> {
    (first..first + count).map(hash).collect()
}

fn record() -> Vec<u8> {
    let fields = [
        ("tenant", "t"),
        ("model", "m"),
        ("weights", "w"),
        ("kv_dtype", "bfloat16"),
        ("cell_encoding", "flash:1"),
        ("hash", "sha256_cbor:0"),
        ("block_tokens", "16"),
        ("groups", "1"),
        ("group.0.kind", "full"),
        ("group.0.layers", "4"),
        ("group.0.heads", "2"),
        ("group.0.cell_bytes", "32"),
    ];
    NamespaceRecord::build(fields)
        .expect("a good record")
        .encode()
}

impl Bench {
    fn new(eviction: EvictionPolicy) -> Bench {
        let settings = Settings {
            eviction,
            lease_fraction: 1.0,
            ..Settings::default()
        };
        let mut bench = Bench {
            core: Core::new(settings),
            out: Vec::new(),
            now: 0,
        };
        let extent_bytes = 64 << 20;
        let extents = (BLOCKS * 4096u64).div_ceil(extent_bytes);
        let shape = ArenaShape {
            id: [0; 16],
            bytes: extents * extent_bytes,
            extent_bytes,
            page_bytes: 4096,
            slots_per_extent: (extent_bytes / 4096) as u32,
        };
        let limits = TenantLimits::default();
        bench.step(Input::Tenant {
            tenant: TENANT,
            name: "t",
            limits,
        });
        bench.step(Input::Arena {
            tenant: TENANT,
            shape,
            adopted: None,
        });
        for extent in 0..extents as u32 {
            bench.step(Input::ExtentReady {
                tenant: TENANT,
                extent,
            });
        }
        bench.step(Input::Opened {
            session: SESSION,
            tenant: TENANT,
            instance: InstanceId([1; 16]),
            role: Role::Both,
            rank: 0,
            world: 1,
            label: "bench",
            past: None,
        });
        let record = record();
        let groups = [GroupLayout {
            group: 0,
            layer_bounds: &[0, 4],
            head_bounds: &[0, 2],
            copies: true,
            part: 0,
        }];
        bench.ask(Request::Register {
            record: &record,
            groups: &groups,
        });
        for first in (0..BLOCKS).step_by(10_000) {
            bench.store(&hashes(first, 10_000));
        }
        bench
    }

    fn step(&mut self, input: Input<'_>) {
        self.now += 1;
        self.out.clear();
        self.core.step(Now(self.now), input, &mut self.out);
    }

    fn ask(&mut self, body: Request<'_>) -> &Reply {
        self.step(Input::Request {
            session: SESSION,
            id: RequestId(0),
            body,
        });
        match self.out.last() {
            Some(Output::Reply { reply, .. }) => reply,
            other => panic!("{other:?}"),
        }
    }

    fn reserve(&mut self, list: &[[u8; 32]]) -> ReserveReply {
        let chain = Chain {
            group: 0,
            hashes: list,
            parent: None,
        };
        match self.ask(Request::Reserve {
            namespace: 0,
            chains: &[chain],
        }) {
            Reply::Reserve(reply) => reply.clone(),
            other => panic!("{other:?}"),
        }
    }

    fn store(&mut self, list: &[[u8; 32]]) {
        let ReserveReply {
            slots, generations, ..
        } = self.reserve(list);
        let crcs = vec![7; slots.len() * 2];
        let body = Request::Commit {
            namespace: 0,
            group: 0,
            slots: &slots,
            generations: &generations,
            crcs: &crcs,
        };
        assert!(matches!(self.ask(body), Reply::Commit(states) if states.len() == list.len()));
    }

    fn lookup(&mut self, list: &[[u8; 32]]) {
        let chains = [Chain {
            group: 0,
            hashes: list,
            parent: None,
        }];
        let body = Request::Lookup {
            namespace: 0,
            chains: &chains,
            lease_ms: 0,
            scope: Scope::Leading,
        };
        match self.ask(body) {
            Reply::Lookup(reply) => assert_eq!(reply.chains[0].length, [list.len() as u32]),
            other => panic!("{other:?}"),
        }
    }

    fn load_and_release(&mut self, list: &[[u8; 32]]) {
        let body = Request::Load {
            namespace: 0,
            group: 0,
            hashes: list,
            deadline_ms: 0,
        };
        let Reply::Load(got) = self.ask(body).clone() else {
            panic!("no load")
        };
        assert_eq!(got.slots.len(), list.len());
        let (slots, generations) = (&got.slots[..], &got.generations[..]);
        self.ask(Request::Release {
            slots,
            generations,
            corrupt: &[],
            lease: 0,
        });
    }
}

/// Stored in this order and looked up in another, so that entries of a chain are not neighbours in memory.
fn scattered(at: u64, count: u64) -> Vec<[u8; 32]> {
    (0..count)
        .map(|n| hash((at * count + n).wrapping_mul(611_953) % BLOCKS))
        .collect()
}

fn lookups(c: &mut Criterion) {
    let mut bench = Bench::new(EvictionPolicy::Lru);
    for count in [128, 6_250] {
        let hot = hashes(0, count);
        c.bench_function(&format!("lookup {count} hot"), |b| {
            b.iter(|| bench.lookup(&hot))
        });
        let mut at = 0;
        c.bench_function(&format!("lookup {count} cold"), |b| {
            b.iter_batched(
                || {
                    at += 1;
                    scattered(at, count)
                },
                |list| bench.lookup(&list),
                BatchSize::PerIteration,
            )
        });
    }
    let hot = hashes(0, 6_250);
    c.bench_function("load and release 6250 hot", |b| {
        b.iter(|| bench.load_and_release(&hot))
    });
}

fn stores(c: &mut Criterion) {
    for (name, policy) in [
        ("lru", EvictionPolicy::Lru),
        ("s3-fifo", EvictionPolicy::S3Fifo),
    ] {
        let mut bench = Bench::new(policy);
        let mut first = BLOCKS;
        c.bench_function(&format!("store 6250 evicting, {name}"), |b| {
            b.iter_batched(
                || {
                    first += 6_250;
                    hashes(first, 6_250)
                },
                |list| bench.store(&list),
                BatchSize::PerIteration,
            )
        });
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(30).without_plots();
    targets = lookups, stores
}
criterion_main!(benches);
