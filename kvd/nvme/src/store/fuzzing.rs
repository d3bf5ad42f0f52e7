//! What fuzzers call, behind the feature `fuzzing`: every decoder of the store on bytes that anybody made, and a start on a device of
//! such bytes. Checksums keep random bytes out of what lies behind them, so an input says which of them to put right first.
//! Deliberately absent: damage to what a store wrote itself, and what it may cost (the simulated disk, `kvd-sim`).

use std::collections::BTreeMap;
use std::time::Duration;

use kvd_core::tier::{
    BlockKey, HostRange, OpId, ReadBlock, Recovered, StoreDone, StoreOp, stride_of,
};
use kvd_core::{BlockHash, GroupGeometry, NamespaceId, NamespaceRecord, TenantId};

use super::block::{BLOCK_MAGIC, BlockPage, encode_block};
use super::format::{
    List, NAME_MAGIC, NameRead, PAGE_MAGIC, PER_PAGE, RECORD, SUPER_MAGIC, SuperRead, Superblock,
    VERSION, crc, decode_name, page_header, page_records, records_crc,
};
use super::layout::{HEADS, Layout, NAME_SLOT};
use super::memory::{MemoryIo, Owned, Pages};
use super::read::check_header;
use super::recover::legal;
use super::table::Table;
use super::verify::Verifier;
use super::{Found, Store, StoreConfig, fsck};
use crate::io::PAGE;

/// The store that all pieces are of.
pub(super) const STORE: [u8; 16] = *b"a store to fuzz!";
const CAPACITY: u64 = 16 << 20;
const DEVICE_PAGES: u64 = CAPACITY / PAGE as u64;

/// Put right: magic, store, and where the piece lies.
const NAMED: u8 = 1;
/// The sums inside, and what must agree with other numbers of the piece.
const INNER: u8 = 2;
/// The sum over all.
const SEALED: u8 = 4;

/// Decodes one piece. The first byte says of which kind, the second what to put right in it; the others are its bytes, as many as it
/// takes, and zeros after them. Whether it is sound.
///
/// # Panics
/// When what was decoded does not agree with the bytes, or is more than they can mean.
pub fn decoders(data: &[u8]) -> bool {
    let [kind, how, bytes @ ..] = data else {
        return false;
    };
    let kind = Kind::of(*kind);
    let piece = piece(kind, *how, bytes, 0, 0);
    match kind {
        Kind::Superblock => superblock(&piece),
        Kind::Name => name(&piece),
        Kind::Journal => records(&piece, List::Journal),
        Kind::Checkpoint => records(&piece, List::Checkpoint),
        Kind::Block => block(&piece),
    }
}

/// Lays pieces on an empty device, opens a store there, looks at it from outside, and reads and drops some of what it says to hold.
/// Each piece: kind, what to put right, 16 bits of where, 16 bits of length, bytes. Whether it is a store.
///
/// # Panics
/// When a start does not give what a check from outside gives, tells a block twice, or leaves the device.
pub fn device(data: &[u8]) -> bool {
    let pages = lay(data);
    let config = config();
    let checked = fsck(MemoryIo::over(&pages), &config, false, &mut |_, _| {});
    let (mut blocks, mut groups) = (Vec::new(), BTreeMap::new());
    let opened = Store::open(MemoryIo::over(&pages), &config, &mut |found| match found {
        Found::Shape(_) => {}
        Found::Namespace(id, record) => {
            let record = NamespaceRecord::parse(record).expect("was checked");
            groups.insert(id, record.groups().to_vec());
        }
        Found::Block(block) => blocks.push(block),
    });
    let Ok(mut opened) = opened else {
        return false;
    };
    if let Ok(checked) = checked {
        opened.report.superblocks_repaired = 0;
        assert_eq!(
            checked.recovery, opened.report,
            "a check sees what a start sees"
        );
    }
    assert_eq!(blocks.len() as u64, opened.report.blocks);
    assert_eq!(opened.store.blocks(), opened.report.blocks);
    let mut places: Vec<_> = blocks.iter().map(|block| block.place).collect();
    places.sort_unstable();
    places.dedup();
    assert_eq!(places.len(), blocks.len(), "one block in one place");
    use_some(opened.store, &blocks, &groups);
    let inside = pages.borrow().keys().all(|page| *page < DEVICE_PAGES);
    assert!(inside, "nothing was written behind the end");
    true
}

#[derive(Clone, Copy)]
enum Kind {
    Superblock,
    Name,
    Journal,
    Checkpoint,
    Block,
}

impl Kind {
    fn of(byte: u8) -> Self {
        match byte % 5 {
            0 => Kind::Superblock,
            1 => Kind::Name,
            2 => Kind::Journal,
            3 => Kind::Checkpoint,
            _ => Kind::Block,
        }
    }
}

pub(super) fn config() -> StoreConfig {
    StoreConfig {
        segment_bytes: 1 << 20,
        flush_us: 0,
        ..StoreConfig::new(CAPACITY, STORE)
    }
}

fn put(piece: &mut [u8], at: usize, bytes: &[u8]) {
    piece[at..at + bytes.len()].copy_from_slice(bytes);
}

fn word(piece: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(piece[at..at + 4].try_into().expect("4 bytes"))
}

/// The bytes of a piece at `position` of its area and `offset` of the device, by `docs/formats.md`.
fn piece(kind: Kind, how: u8, bytes: &[u8], position: u64, offset: u64) -> Vec<u8> {
    let mut piece = bytes[..bytes.len().min(NAME_SLOT as usize)].to_vec();
    let (magic, length, sum_at) = match kind {
        Kind::Superblock => (SUPER_MAGIC, PAGE, PAGE - 8),
        Kind::Name => (NAME_MAGIC, NAME_SLOT as usize, RECORD - 8),
        Kind::Journal | Kind::Checkpoint => (PAGE_MAGIC, PAGE, RECORD - 8),
        Kind::Block => (BLOCK_MAGIC, PAGE, PAGE - 8),
    };
    piece.resize(length, 0);
    if how & NAMED != 0 {
        put(&mut piece, 0, &magic);
        match kind {
            Kind::Superblock => put(&mut piece, 8, &VERSION.to_le_bytes()),
            _ => put(&mut piece, 8, &STORE),
        }
        match kind {
            Kind::Superblock => put(&mut piece, 16, &STORE),
            Kind::Name => put(&mut piece, 56, &(position as u32).to_le_bytes()),
            Kind::Journal => put(&mut piece, 24, &1u32.to_le_bytes()),
            Kind::Checkpoint => put(&mut piece, 24, &2u32.to_le_bytes()),
            Kind::Block => put(&mut piece, 136, &offset.to_le_bytes()),
        }
        if matches!(kind, Kind::Journal | Kind::Checkpoint) {
            put(&mut piece, 40, &position.to_le_bytes());
        }
    }
    if how & INNER != 0 {
        put_right(kind, &mut piece);
    }
    if how & SEALED != 0 {
        let sum = crc(&piece[..sum_at]);
        put(&mut piece, sum_at, &sum.to_le_bytes());
    }
    piece
}

/// The sums inside, and numbers that must agree with others.
fn put_right(kind: Kind, piece: &mut [u8]) {
    match kind {
        Kind::Superblock => {
            let mut head = Superblock::new();
            if let Ok(layout) = Layout::of(&config()) {
                layout.write(&mut head);
            }
            let mut page = vec![0; PAGE];
            head.encode(&mut page);
            piece[40..112].copy_from_slice(&page[40..112]);
        }
        Kind::Name => {
            let length = word(piece, 60) as usize % (NAME_SLOT as usize - RECORD + 1);
            put(piece, 60, &(length as u32).to_le_bytes());
            let record = &piece[RECORD..RECORD + length];
            let (sum, id) = (crc(record), NamespaceRecord::parse(record).map(|r| r.id()));
            put(piece, 64, &sum.to_le_bytes());
            if let Ok(id) = id {
                put(piece, 24, &id.0);
            }
        }
        Kind::Journal | Kind::Checkpoint => {
            for record in piece[RECORD..].chunks_exact_mut(RECORD) {
                let sum = crc(&record[..RECORD - 8]);
                put(record, RECORD - 8, &sum.to_le_bytes());
            }
            let sum = records_crc(piece);
            put(piece, 56, &sum.to_le_bytes());
        }
        Kind::Block => {
            // As many checksums as heads and one range of layers want, and the bytes that the sizes make.
            let [layers, heads, tokens, cell] = [144, 148, 152, 156].map(|at| word(piece, at));
            let bytes = u64::from(layers)
                .wrapping_mul(heads.into())
                .wrapping_mul(tokens.into())
                .wrapping_mul(cell.into());
            put(piece, 122, &2u16.to_le_bytes());
            put(piece, 124, &2u16.to_le_bytes());
            put(piece, 126, &(heads as u16).to_le_bytes());
            put(piece, 128, &bytes.to_le_bytes());
            for (at, bound) in [(160, 0), (164, layers), (168, 0), (172, heads)] {
                put(piece, at, &bound.to_le_bytes());
            }
        }
    }
}

fn superblock(page: &[u8]) -> bool {
    let SuperRead::Sound(head) = Superblock::decode(page) else {
        return false;
    };
    let mut again = vec![0; PAGE];
    head.encode(&mut again);
    assert!(again == page, "a superblock that changes");
    let Some(layout) = Layout::read(&head) else {
        return false;
    };
    let shape = layout.shape;
    let end = u64::from(shape.segments) * shape.segment_bytes + layout.segments_at;
    assert!(end <= layout.capacity && layout.name_slots <= 256);
    for number in [head.checkpoint.get(), head.first_epoch.get(), u64::MAX] {
        let list = layout.checkpoint_at(number) + head.checkpoint_used.get() * PAGE as u64;
        assert!(layout.half_at(number) < layout.checkpoints_at && list <= layout.segments_at);
    }
    assert!(layout.most_blocks() <= layout.capacity / RECORD as u64);
    true
}

fn name(slot: &[u8]) -> bool {
    let NameRead::Sound(_, record) = decode_name(slot, &STORE, 0) else {
        return false;
    };
    assert!(record.len() <= slot.len() - RECORD);
    NamespaceRecord::parse(record).is_ok_and(|parsed| {
        assert!(parsed.encode() == record, "a record that changes");
        true
    })
}

fn records(page: &[u8], list: List) -> bool {
    let Some(header) = page_header(page, &STORE, list, 0) else {
        return false;
    };
    let layout = Layout::of(&config()).expect("a layout");
    let mut table = Table::new(layout.shape);
    let mut sound = 0;
    let bad = page_records(page, header, list, &mut |record| {
        sound += 1;
        if !legal(&layout, record) {
            return;
        }
        let (place, seq) = (record.place(), record.seq.get());
        assert!(layout.block_at(place) + place.stride <= CAPACITY);
        table.store(place, seq, record.name.get());
        assert!(table.get(place).is_none_or(|(newest, _)| newest >= seq));
        table.tell(place, seq);
    });
    table.keep_told();
    let count = u64::from(header.count.get());
    assert!(count <= PER_PAGE as u64 && sound + bad == count);
    assert!(table.live() <= sound);
    bad == 0
}

fn block(page: &[u8]) -> bool {
    let (mut found, mut second) = (BlockPage::new(), BlockPage::new());
    if found.decode(page, &STORE).is_err() {
        return false;
    }
    let (header, geometry) = (&found.header, &found.geometry);
    assert!(8 * header.crcs.len() < PAGE);
    let mut again = vec![0xff; PAGE];
    let sum = encode_block(&mut again, &STORE, header, geometry, found.offset);
    assert!(sum.is_some(), "it came from one page");
    assert_eq!(
        second.decode(&again, &STORE),
        Ok(()),
        "it was encoded just now"
    );
    assert!(second.header == *header && second.geometry == *geometry);
    let key = header.key;
    let mut third = BlockPage::new();
    let right = check_header(&mut third, page, &STORE, found.offset, &key, Some(geometry));
    assert_eq!(right, Ok(()), "it is what it says to be");
    let other = BlockKey {
        hash: BlockHash(key.hash.0.map(|byte| !byte)),
        ..key
    };
    assert!(check_header(&mut third, page, &STORE, found.offset, &other, None).is_err());
    let mut verifier = Verifier::new(&found, Vec::new());
    verifier.feed(page);
    let all = verifier.finish().0;
    assert!(!all || geometry.block_bytes() <= PAGE as u64);
    true
}

fn lay(data: &[u8]) -> Pages {
    let pages = Pages::default();
    let layout = Layout::of(&config()).expect("a layout");
    let mut rest = data;
    while let [kind, how, a, b, c, d, after @ ..] = rest {
        let at = u64::from(u16::from_le_bytes([*a, *b]));
        let length = usize::from(u16::from_le_bytes([*c, *d]));
        let (bytes, after) = after.split_at(length.min(after.len()));
        rest = after;
        let kind = Kind::of(*kind);
        let (list, half) = (layout.checkpoint_pages, layout.half_pages);
        let (position, offset) = match kind {
            Kind::Superblock => (0, HEADS[at as usize % 2]),
            Kind::Name => {
                let slot = at % u64::from(layout.name_slots);
                (slot, layout.name_at(slot as u32))
            }
            Kind::Journal => {
                let page = at % (2 * half);
                (page % half, layout.journal_at + page * PAGE as u64)
            }
            Kind::Checkpoint => {
                let page = at % (2 * list);
                (page % list, layout.checkpoints_at + page * PAGE as u64)
            }
            Kind::Block => {
                let first = layout.segments_at / PAGE as u64;
                (0, (first + at % (DEVICE_PAGES - first)) * PAGE as u64)
            }
        };
        let piece = piece(kind, *how, bytes, position, offset);
        let mut pages = pages.borrow_mut();
        for (n, page) in piece.as_chunks::<PAGE>().0.iter().enumerate() {
            pages.insert(offset / PAGE as u64 + n as u64, Box::new(*page));
        }
    }
    pages
}

/// Reads some of the blocks, drops them, and lets the store go on for a while.
fn use_some(
    mut store: Store<MemoryIo>,
    blocks: &[Recovered],
    groups: &BTreeMap<NamespaceId, Vec<GroupGeometry>>,
) {
    let mut done = Vec::new();
    let mut asked = 0;
    for block in blocks.iter().take(8) {
        let group = usize::from(block.key.group);
        let geometry = groups.get(&block.key.namespace).and_then(|g| g.get(group));
        let same = |g: &&GroupGeometry| stride_of(g.block_bytes()) == block.place.stride;
        if let Some(geometry) = geometry.filter(same) {
            let read = StoreOp::Read {
                op: OpId(asked),
                from: block.place,
                into: HostRange {
                    tenant: TenantId(0),
                    offset: 0,
                    bytes: geometry.block_bytes(),
                },
                key: block.key,
                block: ReadBlock::new(geometry.clone()),
            };
            let memory = Owned(vec![0; geometry.slot_bytes() as usize]);
            done.extend(store.submit(read, Some(memory)));
            asked += 1;
        }
        let drop = StoreOp::Drop {
            op: OpId(asked),
            place: block.place,
            key: block.key,
        };
        done.extend(store.submit(drop, None));
        asked += 1;
    }
    for turn in 1..400 {
        store.turn(turn * 10_000, Duration::ZERO, &mut done);
    }
    assert_eq!(done.len() as u64, asked, "each is answered once");
    let mut ops: Vec<_> = done.iter().map(StoreDone::op).collect();
    ops.sort_unstable();
    ops.dedup();
    assert_eq!(ops.len(), done.len());
}
