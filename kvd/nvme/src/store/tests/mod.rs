//! The store on a device in memory: formats and refusals, limits, and how fast a start is. What faults do to it is tested on the
//! simulated disk.

mod abandon;
mod cycle;
mod fuzz;
mod speed;

use std::sync::Arc;
use std::time::Duration;

use kvd_core::tier::{
    BlockHeader, BlockKey, HostRange, OpId, Place, ReadBlock, Recovered, StoreDone, StoreError,
    StoreOp, stride_of,
};
use kvd_core::{BlockHash, Cut, GroupGeometry, NamespaceId, NamespaceRecord, TenantId};

use super::format::crc;
use super::memory::{MemoryIo, Owned, Pages};
use super::*;
use crate::io::PAGE;

const MIB: u64 = 1 << 20;

fn config() -> StoreConfig {
    StoreConfig {
        segment_bytes: MIB,
        flush_us: 0,
        ..StoreConfig::new(16 * MIB, [7; 16])
    }
}

type Space = (NamespaceId, Arc<[u8]>, GroupGeometry);

/// A namespace whose blocks have one head of one layer, `pages` pages each.
fn space(name: &str, heads: u32, pages: u32) -> Space {
    let cell = (u64::from(pages) * PAGE as u64 / u64::from(heads)).max(1);
    let fields = [
        ("tenant", "default".to_owned()),
        ("model", name.to_owned()),
        ("weights", "w".to_owned()),
        ("kv_dtype", "u8".to_owned()),
        ("cell_encoding", "plain".to_owned()),
        ("hash", "h".to_owned()),
        ("block_tokens", "1".to_owned()),
        ("groups", "1".to_owned()),
        ("group.0.kind", "full".to_owned()),
        ("group.0.layers", "1".to_owned()),
        ("group.0.heads", heads.to_string()),
        ("group.0.cell_bytes", cell.to_string()),
    ];
    let record = NamespaceRecord::build(fields).unwrap();
    let geometry = record.groups()[0].clone();
    (record.id(), record.encode().into(), geometry)
}

struct Test {
    pages: Pages,
    config: StoreConfig,
    store: Option<Store<MemoryIo>>,
    found: Vec<Recovered>,
    names: Vec<NamespaceId>,
    report: RecoveryReport,
    op: u64,
    now: u64,
}

impl Test {
    fn new() -> Self {
        let mut test = Test {
            pages: Pages::default(),
            config: config(),
            store: None,
            found: Vec::new(),
            names: Vec::new(),
            report: RecoveryReport::default(),
            op: 0,
            now: 0,
        };
        test.open().unwrap();
        test
    }

    fn open(&mut self) -> Result<(), OpenError> {
        self.store = None;
        let (mut found, mut names) = (Vec::new(), Vec::new());
        let io = MemoryIo::over(&self.pages);
        let opened = Store::open(io, &self.config, &mut |one| match one {
            Found::Block(block) => found.push(block),
            Found::Shape(_) => {}
            Found::Namespace(id, _) => names.push(id),
        })?;
        (self.found, self.names, self.report) = (found, names, opened.report);
        self.store = Some(opened.store);
        Ok(())
    }

    fn store(&mut self) -> &mut Store<MemoryIo> {
        self.store.as_mut().unwrap()
    }

    /// Asks for an operation, which is taken.
    fn ask(&mut self, (op, host): (StoreOp, Option<Owned>)) {
        assert_eq!(self.store().submit(op, host), None);
    }

    /// A turn so much later.
    fn turn(&mut self, later: u64, done: &mut Vec<StoreDone>) {
        self.now += later;
        let now = self.now;
        self.store().turn(now, Duration::ZERO, done);
    }

    fn run(&mut self, op: StoreOp, host: Option<Owned>) -> StoreDone {
        if let Some(done) = self.store().submit(op, host) {
            return done;
        }
        let mut done = Vec::new();
        for _ in 0..1000 {
            self.turn(10_000, &mut done);
            if let Some(done) = done.pop() {
                return done;
            }
        }
        panic!("not answered");
    }

    fn write_op(&mut self, space: &Space, to: Place, name: u8) -> (StoreOp, Option<Owned>) {
        let (id, record, geometry) = space.clone();
        let bytes = vec![name; geometry.block_bytes() as usize];
        let heads = bytes.chunks(geometry.head_bytes() as usize);
        let header = BlockHeader {
            key: BlockKey {
                namespace: id,
                group: 0,
                hash: BlockHash([name; 32]),
            },
            parent: Some(BlockHash([1; 32])),
            cut: Cut::whole(&geometry),
            crcs: heads.map(crc).collect(),
        };
        self.op += 1;
        let op = StoreOp::Write {
            op: OpId(self.op),
            to,
            from: range(&geometry),
            header: Box::new(header),
            geometry: Box::new(geometry),
            record,
        };
        let mut bytes = bytes;
        bytes.resize(bytes.len().next_multiple_of(PAGE), 0);
        (op, Some(Owned(bytes)))
    }

    fn write(&mut self, space: &Space, to: Place, name: u8) -> Result<(), StoreError> {
        let (op, host) = self.write_op(space, to, name);
        match self.run(op, host) {
            StoreDone::Written { result, .. } => result,
            other => panic!("{other:?}"),
        }
    }

    fn read_op(&mut self, space: &Space, from: Place, name: u8) -> (StoreOp, Option<Owned>) {
        let geometry = space.2.clone();
        self.op += 1;
        let op = StoreOp::Read {
            op: OpId(self.op),
            from,
            into: range(&geometry),
            key: BlockKey {
                namespace: space.0,
                group: 0,
                hash: BlockHash([name; 32]),
            },
            block: ReadBlock::new(geometry.clone()),
        };
        let room = geometry.slot_bytes() as usize;
        (op, Some(Owned(vec![0; room])))
    }

    fn read(&mut self, space: &Space, from: Place, name: u8) -> Result<(), StoreError> {
        let (op, host) = self.read_op(space, from, name);
        match self.run(op, host) {
            StoreDone::Read { result, .. } => result,
            other => panic!("{other:?}"),
        }
    }

    fn drop_op(&mut self, namespace: NamespaceId, place: Place, name: u8) -> StoreOp {
        self.op += 1;
        let hash = BlockHash([name; 32]);
        StoreOp::Drop {
            op: OpId(self.op),
            place,
            key: BlockKey {
                namespace,
                group: 0,
                hash,
            },
        }
    }

    fn forget(&mut self, namespace: NamespaceId, place: Place, name: u8) {
        let op = self.drop_op(namespace, place, name);
        match self.run(op, None) {
            StoreDone::Dropped { result: Ok(()), .. } => {}
            other => panic!("{other:?}"),
        }
    }

    fn flip(&self, offset: u64) {
        let mut pages = self.pages.borrow_mut();
        let page = pages.get_mut(&(offset / PAGE as u64)).unwrap();
        page[(offset % PAGE as u64) as usize] ^= 1;
    }
}

fn range(geometry: &GroupGeometry) -> HostRange {
    HostRange {
        tenant: TenantId(0),
        offset: 0,
        bytes: geometry.block_bytes(),
    }
}

fn place(segment: u32, index: u32, geometry: &GroupGeometry) -> Place {
    let stride = stride_of(geometry.block_bytes());
    Place {
        segment,
        index,
        stride,
    }
}

#[test]
fn what_was_written_is_found_and_reads_back() {
    let mut test = Test::new();
    assert!(test.report.formatted);
    let small = space("m", 3, 1);
    let at = place(2, 5, &small.2);
    assert_eq!(test.write(&small, at, 9), Ok(()));
    assert_eq!(test.read(&small, at, 9), Ok(()));
    assert_eq!(test.read(&small, at, 8), Err(StoreError::Corrupt));
    test.open().unwrap();
    assert_eq!(test.names, [small.0]);
    let key = BlockKey {
        namespace: small.0,
        group: 0,
        hash: BlockHash([9; 32]),
    };
    let block = Recovered {
        key,
        parent: Some(BlockHash([1; 32])),
        place: at,
    };
    assert_eq!(test.found, [block]);
    assert_eq!(test.read(&small, at, 9), Ok(()));
    test.forget(small.0, at, 9);
    test.open().unwrap();
    assert!(test.found.is_empty() && test.store().blocks() == 0);
}

#[test]
fn what_is_not_ours_is_refused_and_left_as_it_is() {
    let mut test = Test::new();
    let sound = test.pages.borrow().clone();
    let refused = |test: &mut Test| {
        let before = test.pages.borrow().clone();
        let error = test.open().unwrap_err();
        assert!(*test.pages.borrow() == before, "{error} and changed");
        error
    };
    // Of a later kvd: in either copy.
    for at in layout::HEADS {
        *test.pages.borrow_mut() = sound.clone();
        let mut page = sound[&(at / PAGE as u64)].clone();
        page[8] = 2;
        let sum = crc(&page[..PAGE - 8]);
        page[PAGE - 8..].copy_from_slice(&sum.to_le_bytes());
        test.pages.borrow_mut().insert(at / PAGE as u64, page);
        test.config.format = true;
        assert_eq!(refused(&mut test), OpenError::Newer { found: 2, known: 1 });
        test.config.format = false;
    }
    // Both superblocks damaged; then formatted when asked.
    *test.pages.borrow_mut() = sound.clone();
    layout::HEADS.iter().for_each(|at| test.flip(at + 77));
    assert_eq!(refused(&mut test), OpenError::Damaged);
    // Something else.
    *test.pages.borrow_mut() = Default::default();
    test.pages.borrow_mut().insert(3, Box::new([1; PAGE]));
    assert_eq!(refused(&mut test), OpenError::Foreign);
    // btrfs leaves blank what is before its superblock.
    let mut head = [0; PAGE];
    head[64..72].copy_from_slice(b"_BHRfS_M");
    *test.pages.borrow_mut() = Default::default();
    test.pages.borrow_mut().insert(16, Box::new(head));
    assert_eq!(refused(&mut test), OpenError::Foreign);
    test.config.format = true;
    test.open().unwrap();
    assert!(test.report.formatted);
    // A sound store is never formatted over, and never opened on a shorter device.
    test.open().unwrap();
    assert!(!test.report.formatted);
    test.config.capacity -= 1;
    assert!(matches!(refused(&mut test), OpenError::Short { .. }));
    test.config.capacity = 100;
    *test.pages.borrow_mut() = Default::default();
    assert!(matches!(refused(&mut test), OpenError::Config(_)));
}

#[test]
fn one_damaged_superblock_is_written_again_from_the_other() {
    let mut test = Test::new();
    let small = space("m", 1, 1);
    test.write(&small, place(0, 0, &small.2), 1).unwrap();
    for at in layout::HEADS {
        test.flip(at + 4000);
        test.open().unwrap();
        assert_eq!((test.report.superblocks_repaired, test.found.len()), (1, 1));
        test.open().unwrap();
        assert_eq!(test.report.superblocks_repaired, 0);
    }
}

#[test]
fn places_and_memory_that_do_not_fit_are_refused() {
    let mut test = Test::new();
    let (small, large) = (space("m", 1, 1), space("n", 1, 3));
    let good = place(0, 0, &small.2);
    test.write(&small, good, 1).unwrap();
    let last = test.store().layout.shape.segments - 1;
    for bad in [
        good,
        place(last + 1, 0, &small.2),
        place(0, 128, &small.2),
        place(0, u32::MAX, &small.2),
        place(1, 0, &large.2),
    ] {
        assert_eq!(test.write(&small, bad, 2), Err(StoreError::Io), "{bad:?}");
    }
    // Another stride in a segment that is in use.
    let bad = place(0, 20, &large.2);
    assert_eq!(test.write(&large, bad, 2), Err(StoreError::Io));
    assert_eq!(test.store().counters().refused_invalid, 6);
    // More checksums than a page holds.
    let many = space("o", 600, 1);
    let at = place(1, 0, &many.2);
    assert_eq!(test.write(&many, at, 2), Err(StoreError::Io));
    assert_eq!(test.store().counters().refused_header, 1);
    // A record that is not the namespace's.
    let mut wrong = small.clone();
    wrong.0 = NamespaceId([3; 32]);
    assert_eq!(
        test.write(&wrong, place(0, 1, &small.2), 2),
        Err(StoreError::Io)
    );
    assert_eq!(test.write(&small, place(0, 1, &small.2), 2), Ok(()));
    assert_eq!(test.read(&small, good, 1), Ok(()));
}

#[test]
fn a_namespace_that_no_block_needs_makes_room_for_another() {
    let mut test = Test::new();
    let spaces: Vec<_> = (0..9).map(|n| space(&format!("m{n}"), 1, 1)).collect();
    let at = |n: u32| place(0, n, &spaces[0].2);
    for (n, space) in spaces[..8].iter().enumerate() {
        test.write(space, at(n as u32), n as u8).unwrap();
    }
    assert_eq!(test.write(&spaces[8], at(8), 8), Err(StoreError::Off));
    assert_eq!(test.store().counters().refused_full, 1);
    test.forget(spaces[3].0, at(3), 3);
    assert_eq!(test.write(&spaces[8], at(8), 8), Ok(()));
    test.open().unwrap();
    assert_eq!((test.found.len(), test.names.len()), (8, 8));
    assert_eq!(test.report.orphans, 0);
    assert_eq!(test.read(&spaces[8], at(8), 8), Ok(()));
    // A damaged namespace takes its blocks with it, and nobody else's.
    let names_at = test.store().layout.name_at(0);
    test.flip(names_at + 200);
    test.open().unwrap();
    assert_eq!((test.found.len(), test.report.orphans), (7, 1));
    assert_eq!(test.report.namespaces_damaged, 1);
}

#[test]
fn the_list_of_blocks_has_an_end() {
    let mut test = Test::new();
    let most = test.store().layout.most_blocks();
    let small = space("m", 1, 1);
    let per_segment = MIB / stride_of(small.2.block_bytes());
    let mut written = 0;
    let mut refusal = None;
    for n in 0..most + 5 {
        let at = place((n / per_segment) as u32, (n % per_segment) as u32, &small.2);
        match test.write(&small, at, n as u8) {
            Ok(()) => written += 1,
            Err(error) => refusal = Some(error),
        }
    }
    assert_eq!((written, refusal), (most, Some(StoreError::Off)));
    // Journal halves were filled and checkpoints written on the way; nothing is lost.
    assert!(test.store().counters().checkpoints > 3);
    test.open().unwrap();
    assert_eq!(test.found.len() as u64, most);
    assert_eq!(
        (test.report.pages_damaged, test.report.records_damaged),
        (0, 0)
    );
}

/// A checkpoint that can't be written fails writes and drops in bounded time, and nothing else; when it can, all goes on.
#[test]
fn a_full_journal_does_not_keep_writes_for_ever() {
    let mut test = Test::new();
    let layout = test.store().layout;
    let broken = test.store().io.broken.clone();
    *broken.borrow_mut() = layout.checkpoints_at..layout.segments_at;
    let small = space("m", 1, 1);
    let at = |n: u64| place((n / 128) as u32, (n % 128) as u32, &small.2);
    let room = 2 * layout.half_pages;
    for n in 0..room {
        assert_eq!(test.write(&small, at(n), n as u8), Ok(()), "{n}");
    }
    assert_eq!(test.write(&small, at(room), 1), Err(StoreError::Io));
    assert_eq!(test.write(&small, at(room), 1), Err(StoreError::Off));
    assert_eq!(test.read(&small, at(5), 5), Ok(()));
    assert_eq!(test.store().counters().journal_jams, 1);
    *broken.borrow_mut() = 0..0;
    let mut done = Vec::new();
    for _ in 0..500 {
        test.turn(10_000, &mut done);
    }
    assert_eq!(test.store().counters().checkpoints, 1);
    assert_eq!(test.write(&small, at(room), 1), Ok(()));
    test.open().unwrap();
    assert_eq!(test.found.len() as u64, room + 1);
}

/// A slot that can't be written is passed over.
#[test]
fn a_broken_namespace_slot_costs_one_write() {
    let mut test = Test::new();
    let layout = test.store().layout;
    *test.store().io.broken.borrow_mut() = layout.names_at..layout.name_at(1);
    let small = space("m", 1, 1);
    let at = place(0, 0, &small.2);
    assert_eq!(test.write(&small, at, 1), Err(StoreError::Io));
    assert_eq!(test.write(&small, at, 1), Ok(()));
    test.open().unwrap();
    assert_eq!(test.found.len(), 1);
}

#[test]
fn fsck_finds_damage_and_repairs_it() {
    let mut test = Test::new();
    let small = space("m", 2, 3);
    for n in 0..5 {
        test.write(&small, place(0, n, &small.2), n as u8).unwrap();
    }
    let at = |n| {
        test.store
            .as_ref()
            .unwrap()
            .layout
            .block_at(place(0, n, &small.2))
    };
    let (head, body) = (at(1), at(3) + 9000);
    let check = |test: &Test, repair| {
        let io = MemoryIo::over(&test.pages);
        let changes = io.changes.clone();
        let report = fsck(io, &test.config, repair, &mut |_, _| {}).unwrap();
        let changed = *changes.borrow() > 0;
        assert!(repair || !changed);
        report
    };
    assert!(check(&test, false).is_clean());
    test.flip(head);
    test.flip(body);
    let report = check(&test, true);
    assert_eq!((report.sound, report.damaged, report.dropped), (3, 2, 2));
    let flaws = [Flaw::Header, Flaw::Payload];
    for (finding, flaw) in report.findings.iter().zip(flaws) {
        assert!(matches!(finding, Finding::Block { flaw: f, .. } if *f == flaw));
    }
    let again = check(&test, false);
    assert!(again.is_clean() && again.sound == 3);
}

#[test]
fn operations_beyond_the_queue_are_refused_at_once() {
    let mut test = Test::new();
    test.config.max_queue = 2;
    test.open().unwrap();
    let small = space("m", 1, 1);
    let drop_op = |n| StoreOp::Drop {
        op: OpId(n),
        place: place(0, n as u32, &small.2),
        key: BlockKey {
            namespace: small.0,
            group: 0,
            hash: BlockHash([0; 32]),
        },
    };
    assert_eq!(test.store().submit(drop_op(1), None), None);
    assert_eq!(test.store().submit(drop_op(2), None), None);
    let result = Err(StoreError::Off);
    let op = OpId(3);
    let refused = Some(StoreDone::Dropped { op, result });
    assert_eq!(test.store().submit(drop_op(3), None), refused);
    let mut done = Vec::new();
    let store = test.store.take().unwrap();
    store.close(0, Duration::ZERO, 100, &mut done);
    assert_eq!(done.len(), 2);
}

/// Whatever bytes a piece has under a right checksum, reading it neither fails nor goes out of bounds.
#[test]
fn decoders_take_any_bytes() {
    let mut test = Test::new();
    let small = space("m", 2, 1);
    let at = place(0, 0, &small.2);
    test.write(&small, at, 1).unwrap();
    let layout = test.store().layout;
    let page = |at: u64| test.pages.borrow()[&(at / PAGE as u64)].clone();
    let (block, name) = (page(layout.block_at(at)), page(layout.name_at(0)));
    let (journal, head) = (page(layout.half_at(1)), page(0));
    let mut state = 1u64;
    let mut below = |n: usize| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (state >> 33) as usize % n
    };
    let (mut blocks, mut records) = (0, 0);
    for _ in 0..50_000 {
        let mut spoil = |page: &[u8; PAGE], area: usize, sealed: usize| {
            let mut page = *page;
            for _ in 0..1 + below(4) {
                page[below(area)] = [0, 1, 0x7f, 0xff, below(256) as u8][below(5)];
            }
            let sum = crc(&page[..sealed - 8]);
            page[sealed - 8..sealed].copy_from_slice(&sum.to_le_bytes());
            page
        };
        let spoilt = spoil(&block, 240, PAGE);
        let sound = BlockPage::new().decode(&spoilt, &test.config.start);
        blocks += u32::from(sound.is_ok());
        let spoilt = spoil(&name, 128, 128);
        format::decode_name(&spoilt, &test.config.start, 0);
        let spoilt = spoil(&head, 160, PAGE);
        if let format::SuperRead::Sound(head) = format::Superblock::decode(&spoilt) {
            layout::Layout::read(&head);
        }
        let mut spoilt = spoil(&journal, 384, 128);
        let sum = crc(&spoilt[128..248]);
        spoilt[248..256].copy_from_slice(&sum.to_le_bytes());
        let list = format::List::Journal;
        if let Some(head) = format::page_header(&spoilt, &test.config.start, list, 0) {
            format::page_records(&spoilt, head, list, &mut |record| {
                let legal = recover::legal(&layout, record);
                records += u32::from(legal && layout.block_at(record.place()) < layout.capacity);
            });
        }
    }
    assert!(blocks > 0 && records > 0);
}
