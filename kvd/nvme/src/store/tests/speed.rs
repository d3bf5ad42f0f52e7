//! How fast a start is, and how much memory the store keeps for it.

use std::io::Write;
use std::time::{Duration, Instant};

use kvd_core::tier::{BlockHeader, BlockKey, OpId, Place, StoreOp, stride_of};
use kvd_core::{BlockHash, Cut, GroupGeometry, GroupKind, NamespaceId};

use super::{MIB, space};
use crate::io::{Aligned, PAGE};
use crate::store::block::BlockPage;
use crate::store::format::{
    Kind, List, PER_PAGE, Record, crc, encode_name, encode_page, name_bytes,
};
use crate::store::memory::{MemoryIo, Pages};
use crate::store::open::{format, head_page};
use crate::store::verify::Verifier;
use crate::store::wire::Wire;
use crate::store::{Found, Store, StoreConfig, layout};

const BLOCKS: u64 = 1_000_000;

fn name(seq: u64) -> u64 {
    seq.wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

fn record(seq: u64, namespace: NamespaceId, per_segment: u64) -> Record {
    let mut hash = [0; 32];
    hash[24..].copy_from_slice(&name(seq).to_be_bytes());
    let at = seq - 1;
    let place = Place {
        segment: (at / per_segment) as u32,
        index: (at % per_segment) as u32,
        stride: stride_of(64 << 10),
    };
    let key = BlockKey {
        namespace,
        group: 0,
        hash: BlockHash(hash),
    };
    Record::new(Kind::Stored, seq, 0, &key, place)
        .with_block(Some(BlockHash([1; 32])), 5)
        .sealed(0)
}

/// A store with a full checkpoint and a full half of the journal, as one that crashed late would be.
fn make(pages: &Pages, config: &StoreConfig) {
    let mut io = MemoryIo::over(pages);
    let mut wire = Wire::new(&mut io);
    let mut state = format(&mut wire, config).unwrap();
    let (layout, id) = (state.layout, config.start);
    let per_segment = layout.shape.segment_bytes / stride_of(64 << 10);
    let space = space("m", 1, 16);
    let mut bytes = Aligned::new(name_bytes(space.1.len()) / PAGE);
    encode_name(bytes.bytes_mut(), &id, 0, space.0, &space.1);
    wire.write(layout.name_at(0), bytes).unwrap();
    let journalled = layout.half_pages * PER_PAGE as u64;
    let listed = BLOCKS - journalled;
    let mut seq = 1;
    let mut put = |list, epoch, base: u64, end: u64| {
        let mut at = 0;
        while seq < end {
            let some: Vec<Record> = (seq..end.min(seq + PER_PAGE as u64))
                .map(|seq| record(seq, space.0, per_segment))
                .collect();
            let mut page = Aligned::new(1);
            encode_page(page.bytes_mut(), &id, list, epoch, at, &some);
            wire.write(base + at * PAGE as u64, page).unwrap();
            (seq, at) = (seq + some.len() as u64, at + 1);
        }
        at
    };
    let used = put(List::Checkpoint, 1, layout.checkpoint_at(1), listed + 1);
    put(List::Journal, 2, layout.half_at(2), BLOCKS + 1);
    state.head.checkpoint = 1.into();
    state.head.checkpoint_used = used.into();
    state.head.first_epoch = 2.into();
    for at in layout::HEADS {
        wire.write(at, head_page(&state.head)).unwrap();
    }
}

#[test]
#[allow(clippy::disallowed_methods, reason = "it measures")]
fn a_million_blocks_are_found_in_well_under_a_second() {
    let config = StoreConfig::new(72_000 * MIB, [7; 16]);
    let pages = Pages::default();
    make(&pages, &config);
    let (mut blocks, mut hashes) = (0u64, 0u64);
    let begun = Instant::now();
    let opened = Store::open(MemoryIo::over(&pages), &config, &mut |found| {
        if let Found::Block(block) = found {
            blocks += 1;
            hashes ^= block.key.hash.low64();
        }
    });
    let took = begun.elapsed();
    let mut opened = opened.map_err(|error| error.to_string()).unwrap();
    let report = opened.report;
    // Shown with --nocapture.
    let _ = writeln!(std::io::stderr(), "{BLOCKS} blocks were found in {took:?}");
    let expected = (1..=BLOCKS).fold(0, |sum, seq| sum ^ name(seq));
    assert_eq!((blocks, hashes), (BLOCKS, expected));
    assert_eq!(opened.store.blocks(), BLOCKS);
    assert_eq!((report.orphans, report.pages_damaged), (0, 0));
    // On an idle machine it is a sixth of this.
    assert!(took.as_millis() < 2_000, "{BLOCKS} blocks took {took:?}");
    checkpoint(&mut opened.store);
}

/// A checkpoint of all of them, begun by a drop, and how long a turn takes meanwhile.
#[allow(clippy::disallowed_methods, reason = "it measures")]
fn checkpoint(store: &mut Store<MemoryIo>) {
    let place = Place {
        segment: 0,
        index: 0,
        stride: stride_of(64 << 10),
    };
    let key = BlockKey {
        namespace: space("m", 1, 16).0,
        group: 0,
        hash: BlockHash([0; 32]),
    };
    let op = OpId(1);
    assert_eq!(store.submit(StoreOp::Drop { op, place, key }, None), None);
    let (mut done, mut longest) = (Vec::new(), Duration::ZERO);
    let begun = Instant::now();
    let mut turns = 0;
    while store.counters().checkpoints == 0 {
        let turn = Instant::now();
        turns += 1;
        store.turn(turns * 10_000, Duration::ZERO, &mut done);
        longest = longest.max(turn.elapsed());
        assert!(turns < 100_000);
    }
    let took = begun.elapsed();
    let _ = writeln!(
        std::io::stderr(),
        "a checkpoint of them took {took:?} in {turns} turns, the longest {longest:?}"
    );
    assert_eq!((done.len(), store.blocks()), (1, BLOCKS - 1));
    assert!(longest.as_millis() < 200, "a turn took {longest:?}");
}

/// How fast bytes are checked. Only shown: the machine may be busy.
#[test]
#[allow(clippy::disallowed_methods, reason = "it measures")]
fn a_block_is_checked_at_the_speed_of_memory() {
    let geometry = GroupGeometry {
        kind: GroupKind::Full,
        layers: 32,
        heads: 8,
        block_tokens: 16,
        cell_bytes: 512,
        window: None,
    };
    let bytes = vec![7; geometry.block_bytes() as usize];
    let head = vec![7; 32 * geometry.head_bytes() as usize];
    let page = BlockPage {
        header: BlockHeader {
            key: BlockKey {
                namespace: NamespaceId([1; 32]),
                group: 0,
                hash: BlockHash([2; 32]),
            },
            parent: None,
            cut: Cut::whole(&geometry),
            crcs: vec![crc(&head); 8],
        },
        geometry,
        offset: 0,
        crc: 0,
    };
    let begun = Instant::now();
    for _ in 0..100 {
        let mut verifier = Verifier::new(&page, Vec::new());
        verifier.feed(&bytes);
        assert!(verifier.finish().0);
    }
    let each = begun.elapsed() / 100;
    let _ = writeln!(std::io::stderr(), "2 MiB were checked in {each:?}");
}
