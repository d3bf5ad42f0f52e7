//! A GPU's blocks through a real daemon, beside those of ordinary memory: `make gpu-test`, on a machine with an NVIDIA GPU.

mod common;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use common::{Daemon, PATIENCE, content, eventually, geometry, hash, layout, part, record};
use kvd_client::{
    BlockMover, BlockRef, ChainRef, FailReason, Identity, LoadOutcome, MoverConfig, Session,
    StoreOutcome,
};
use kvd_core::Cut;
use kvd_device::conformance::{HostMemory, Memory};
use kvd_device::{CudaDevice, Device, EnginePages, HostDevice, PageOrder};

/// Blocks of one turn.
const BLOCKS: u32 = 300;
/// Blocks of one request.
const WINDOW: usize = 100;

/// A session with pages as engines lay them.
struct Engine {
    session: Session,
    namespace: u32,
    mover: BlockMover,
    memory: EnginePages,
}

impl Engine {
    fn new(daemon: &Daemon, device: Arc<dyn Device>, memory: impl Memory + 'static) -> Self {
        let identity = Identity::script("an engine");
        let mut session =
            Session::connect(&daemon.socket, &identity, PATIENCE).expect("the daemon serves");
        let registered = session.register(&record(&[]), &[layout()]);
        let namespace = registered.expect("registers").namespace;
        eventually("all memory is there", || {
            daemon.tenant().tiers.host.state == "ready"
        });
        let g = geometry();
        let config = MoverConfig {
            window_bytes: WINDOW * g.slot_bytes() as usize,
            ..MoverConfig::new(0, g.clone(), Cut::whole(&g), 0)
        };
        let memory = EnginePages::new(memory, part(), BLOCKS, PageOrder::ByToken);
        Self {
            session,
            namespace,
            mover: BlockMover::new(device, config).expect("a mover"),
            memory: memory.expect("fits"),
        }
    }

    fn store(&mut self, owner: u32) {
        let order = order(owner);
        for (number, [page]) in (0..).zip(&order) {
            self.memory.write(*page, &block(owner, number));
        }
        let hashes = hashes(owner);
        let chain = ChainRef {
            group: 0,
            hashes: &hashes,
            parent: None,
        };
        let outcomes = self
            .mover
            .store(
                &mut self.session,
                self.namespace,
                chain,
                &refs(&self.memory, &order),
            )
            .expect("fits");
        let visible = outcomes.iter().all(|o| *o == StoreOutcome::Visible);
        assert!(visible, "{outcomes:?}");
    }

    fn load(&mut self, owner: u32) -> Vec<LoadOutcome> {
        let order = order(owner + 5);
        let outcomes = self
            .mover
            .load(
                &mut self.session,
                self.namespace,
                &hashes(owner),
                &refs(&self.memory, &order),
            )
            .expect("fits");
        for ((number, [page]), outcome) in (0..).zip(&order).zip(&outcomes) {
            let right =
                *outcome != LoadOutcome::Loaded || self.memory.read(*page) == block(owner, number);
            assert!(right, "block {number} of {owner}");
        }
        outcomes
    }
}

/// Pages in an order of this turn's own, block after block.
fn order(turn: u32) -> Vec<[u32; 1]> {
    (0..BLOCKS)
        .map(|i| [(i * 7 + turn * 13) % BLOCKS])
        .collect()
}

fn refs<'a>(memory: &'a EnginePages, order: &'a [[u32; 1]]) -> Vec<BlockRef<'a>> {
    let at = memory.pages();
    order.iter().map(|pages| BlockRef { at, pages }).collect()
}

fn hashes(owner: u32) -> Vec<u8> {
    (0..BLOCKS).flat_map(|i| hash(owner, i)).collect()
}

fn block(owner: u32, number: u32) -> Vec<u8> {
    (0..part().bytes()).map(content(owner, number)).collect()
}

/// Two engines of one daemon; what the first one is made of is what is tested.
fn exchange(device: Arc<dyn Device>, memory: impl Memory + 'static) {
    let daemon = Daemon::start(&["--huge-pages", "off"]); // files of huge pages can't be written as such
    let mut one = Engine::new(&daemon, device, memory);
    let mut cpu = Engine::new(&daemon, Arc::new(HostDevice), HostMemory::default());
    let all = |outcome| vec![outcome; BLOCKS as usize];
    one.store(1);
    assert_eq!(cpu.load(1), all(LoadOutcome::Loaded));
    cpu.store(2);
    assert_eq!(one.load(2), all(LoadOutcome::Loaded));
    assert_eq!(one.load(1), all(LoadOutcome::Loaded));
    assert_eq!(one.load(3), all(LoadOutcome::Absent));
    // A faulty neighbour writes all over the arena.
    let arena = one.session.arena().expect("mapped");
    let file = File::from(arena.fd().try_clone_to_owned().expect("dup"));
    for page in (0..arena.shape().bytes).step_by(4096) {
        let mut byte = [0];
        file.read_exact_at(&mut byte, page + 100).expect("read");
        byte[0] ^= 4;
        file.write_all_at(&byte, page + 100).expect("written");
    }
    let loads = one.load(1);
    let corrupt = LoadOutcome::Failed(FailReason::Corrupt);
    assert!(
        loads[..WINDOW].iter().all(|o| *o == corrupt),
        "{:?}",
        loads[0]
    );
    // After a streak the daemon trusts nothing that lies there.
    let gone = |o: &LoadOutcome| *o == corrupt || *o == LoadOutcome::Absent;
    assert!(loads.iter().all(gone));
    assert_eq!(
        one.load(1),
        all(LoadOutcome::Absent),
        "what is corrupt is gone"
    );
}

#[test]
fn what_one_engine_stores_the_other_loads() {
    exchange(Arc::new(HostDevice), HostMemory::default());
}

#[test]
#[ignore = "needs an NVIDIA GPU: make gpu-test"]
fn what_a_gpu_stores_ordinary_memory_loads_and_the_other_way_round() {
    let cuda = Arc::new(CudaDevice::open(0).expect("a GPU"));
    exchange(cuda.clone(), cuda.memory());
}
