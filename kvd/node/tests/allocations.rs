//! How often memory is allocated for a load whose blocks a store holds, once everything is warm: from the request to the operations of
//! the store, and from its answers to the reply. The node and core in it are counted; the store is a list here, and its own side is
//! counted in `kvd-nvme`. A program of its own, because it counts all allocations of the process. Deliberately absent: times.

use std::alloc::System;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io::Write;
use std::rc::Rc;

use kvd_core::tier::{BlockHeader, HostRange, Place, StoreDone, StoreOp, StoreShape};
use kvd_core::{
    ArenaShape, Chain, EvictionPolicy, GroupLayout, InstanceId, LoadState, NamespaceRecord, Now,
    Reply, Request, RequestId, ReserveState, Role, SessionId, Settings, StoreId, TenantId,
    TenantLimits, TierSettings,
};
use kvd_node::{
    AdoptedArena, ArenaPort, Clock, Effect, Entropy, Node, NodeSettings, Opening, Pages, PortError,
    StorePort, TenantSpec,
};
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};

#[global_allocator]
static HEAP: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// Blocks of one load; host memory has room for two loads and a half, and the store for all.
const MANY: usize = 512;
const FEW: usize = 64;
const LOADS: usize = 8;
/// Rounds over all loads before any is counted, and counted ones.
const WARM: usize = 4;
const COUNTED: usize = 4;
const SLOT: u64 = 4096;
const STORE: StoreId = StoreId(0);

/// Most that a load may cost, however many blocks it has: its own lists and those of its reply, of which that of checksums grows as
/// blocks are added to it.
const MOST_A_LOAD: f64 = 32.0;

struct Still;

impl Clock for Still {
    fn now(&self) -> Now {
        Now(1_000_000)
    }
}

impl Entropy for Still {
    fn fill(&mut self, bytes: &mut [u8]) {
        bytes.fill(7);
    }
}

/// An arena of plain numbers.
struct Numbers;

impl ArenaPort for Numbers {
    type Offer = ();
    type Span = HostRange;

    fn create(&mut self, _: TenantId) -> Result<ArenaShape, PortError> {
        Ok(ArenaShape {
            id: [1; 16],
            bytes: (5 * MANY as u64 / 2) * SLOT,
            extent_bytes: 64 * SLOT,
            page_bytes: 4096,
            slots_per_extent: 64,
        })
    }

    fn adopt(&mut self, _: TenantId, (): ()) -> Result<AdoptedArena, PortError> {
        Err(PortError("there is none".to_owned()))
    }

    fn set_generation(&mut self, _: TenantId, _: u32, _: u64) {}

    fn set_writers(&mut self, _: TenantId, _: &[u64]) {}

    fn populate(&mut self, _: TenantId, _: u32) {}

    fn span(&self, range: HostRange) -> Option<HostRange> {
        Some(range)
    }

    fn page_probe(&self, _: TenantId) -> Option<Box<dyn FnOnce() -> Pages + Send>> {
        None
    }
}

/// What the store was asked to do and has not answered.
#[derive(Clone, Default)]
struct Asked(Rc<RefCell<Vec<StoreOp>>>);

impl StorePort<HostRange> for Asked {
    fn begin(&mut self, _: StoreId, op: StoreOp, _: Option<HostRange>) -> Option<StoreDone> {
        self.0.borrow_mut().push(op);
        None
    }
}

/// Allocations in the whole process while this is done.
fn count<T>(times: &mut usize, work: impl FnOnce() -> T) -> T {
    let region = Region::new(HEAP);
    let result = work();
    let change = region.change();
    *times += change.allocations + change.reallocations;
    result
}

/// By load: to ask, and to take its last answer; and by block: to take all other answers.
#[derive(Default)]
struct Count {
    loads: usize,
    load: usize,
    blocks: usize,
}

struct World {
    node: Node<Still, Still, Numbers, Asked>,
    asked: Asked,
    tenant: TenantId,
    session: SessionId,
    held: BTreeMap<Place, BlockHeader>,
    done: Vec<StoreDone>,
}

fn record() -> Vec<u8> {
    let fields = [
        ("tenant", "t"),
        ("model", "m"),
        ("weights", "w"),
        ("kv_dtype", "bfloat16"),
        ("cell_encoding", "x"),
        ("hash", "h:0"),
        ("block_tokens", "16"),
        ("groups", "1"),
        ("group.0.kind", "full"),
        ("group.0.layers", "4"),
        ("group.0.heads", "4"),
        ("group.0.cell_bytes", "16"),
    ];
    NamespaceRecord::build(fields).expect("legal").encode()
}

fn settings(eviction: EvictionPolicy) -> Settings {
    Settings {
        eviction,
        // Full soon, as it is in a daemon that has run for a while.
        change_log: 1024,
        lease_fraction: 1.0,
        tiers: TierSettings {
            read_ahead: false,
            ..TierSettings::default()
        },
        ..Settings::default()
    }
}

impl World {
    fn new(eviction: EvictionPolicy) -> Self {
        let settings = NodeSettings {
            core: settings(eviction),
            adopt_grace_us: 0,
        };
        let asked = Asked::default();
        let mut node = Node::with_stores(settings, Still, Still, Numbers, asked.clone());
        let tenant = node.add_tenant(TenantSpec {
            name: "t".to_owned(),
            limits: TenantLimits::default(),
            expect_offers: false,
        });
        let shape = StoreShape {
            segments: 64,
            segment_bytes: 1 << 20,
        };
        node.store_opened(STORE, shape);
        let session = node.open(&Opening {
            tenant,
            instance: InstanceId([1; 16]),
            role: Role::Both,
            rank: 0,
            world: 1,
            label: "",
            past: None,
        });
        let mut world = World {
            node,
            asked,
            tenant,
            session,
            held: BTreeMap::new(),
            done: Vec::new(),
        };
        let layout = GroupLayout {
            group: 0,
            layer_bounds: &[0, 4],
            head_bounds: &[0, 4],
            copies: true,
            part: 0,
        };
        world.ask(Request::Register {
            record: &record(),
            groups: &[layout],
        });
        for extent in 0..(5 * MANY / 2 / 64) as u32 {
            world.node.populated(tenant, [1; 16], extent, None);
        }
        world
    }

    fn reply(&mut self) -> Option<Reply> {
        match self.node.take_effect()? {
            Effect::Reply { reply, .. } => Some(*reply),
            other => panic!("{other:?}"),
        }
    }

    fn request(&mut self, body: Request<'_>) {
        let id = RequestId(1);
        self.node.request(self.tenant, self.session, id, body);
    }

    fn ask(&mut self, body: Request<'_>) -> Reply {
        self.request(body);
        self.reply().expect("answered at once")
    }

    /// Does what the store was asked, and lists the answers.
    fn serve(&mut self) {
        for op in self.asked.0.borrow_mut().drain(..) {
            self.done.push(match op {
                StoreOp::Write { op, to, header, .. } => {
                    self.held.insert(to, *header);
                    let result = Ok(());
                    StoreDone::Written { op, result }
                }
                StoreOp::Read {
                    op,
                    from,
                    key,
                    mut block,
                    ..
                } => {
                    let header = &self.held[&from];
                    assert_eq!(header.key, key);
                    block.cut = header.cut.clone();
                    block.crcs.extend(&header.crcs);
                    let result = Ok(());
                    StoreDone::Read { op, block, result }
                }
                StoreOp::Drop { .. } => panic!("there is room for all"),
            });
        }
    }

    /// Stores blocks in host memory and below.
    fn store(&mut self, hashes: &[[u8; 32]]) {
        let chain = Chain {
            group: 0,
            hashes,
            parent: None,
        };
        let namespace = 0;
        let Reply::Reserve(got) = self.ask(Request::Reserve {
            namespace,
            chains: &[chain],
        }) else {
            panic!("no slots");
        };
        assert!(got.states.iter().all(|s| *s == ReserveState::Reserved));
        let crcs: Vec<u64> = (0..4 * hashes.len() as u64).collect();
        self.ask(Request::Commit {
            namespace,
            group: 0,
            slots: &got.slots,
            generations: &got.generations,
            crcs: &crcs,
        });
        self.serve();
        assert_eq!(self.done.len(), hashes.len());
        while let Some(done) = self.done.pop() {
            self.node.store_done(STORE, done);
        }
    }

    /// Loads blocks of which none is in host memory.
    fn load(&mut self, hashes: &[[u8; 32]], counts: &mut Count) {
        let body = Request::Load {
            namespace: 0,
            group: 0,
            hashes,
            deadline_ms: 0,
        };
        count(&mut counts.load, || self.request(body));
        self.serve();
        assert_eq!(self.done.len(), hashes.len(), "all come from below");
        self.done.reverse();
        count(&mut counts.blocks, || {
            while self.done.len() > 1
                && let Some(done) = self.done.pop()
            {
                self.node.store_done(STORE, done);
            }
        });
        assert!(self.reply().is_none());
        let last = self.done.pop().expect("one is left");
        count(&mut counts.load, || self.node.store_done(STORE, last));
        counts.loads += 1;
        let Some(Reply::Load(reply)) = self.reply() else {
            panic!("no answer");
        };
        assert!(reply.states.iter().all(|s| *s == LoadState::Ready));
        assert_eq!(reply.crcs.len(), 4 * hashes.len());
        self.ask(Request::Release {
            slots: &reply.slots,
            generations: &reply.generations,
            corrupt: &[],
            lease: 0,
        });
    }
}

#[test]
fn blocks_come_up_without_allocations() {
    let mut out = std::io::stderr();
    let _ = writeln!(out, "allocations of a load from a store, and of each block");
    for (eviction, word) in [
        (EvictionPolicy::Lru, "lru"),
        (EvictionPolicy::S3Fifo, "s3-fifo"),
    ] {
        for blocks in [FEW, MANY] {
            let mut world = World::new(eviction);
            let hash = |n: usize| {
                let mut hash = [1; 32];
                hash[24..]
                    .copy_from_slice(&(n as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15).to_le_bytes());
                hash
            };
            let all: Vec<[u8; 32]> = (0..LOADS * MANY).map(hash).collect();
            all.chunks(FEW).for_each(|hashes| world.store(hashes));
            let mut counts = Count::default();
            for round in 0..WARM + COUNTED {
                if round == WARM {
                    counts = Count::default();
                }
                all.chunks(blocks)
                    .for_each(|hashes| world.load(hashes, &mut counts));
            }
            let load = counts.load as f64 / counts.loads as f64;
            let _ = writeln!(
                out,
                "{word:<7} {blocks:>4} blocks: {load:.1}, {}",
                counts.blocks
            );
            assert_eq!(counts.blocks, 0, "answers of blocks");
            assert!(load <= MOST_A_LOAD, "{load} for a load");
        }
    }
}
