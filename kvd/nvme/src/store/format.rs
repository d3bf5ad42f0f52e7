//! The bytes of a store: superblocks, namespace slots, pages of records. `docs/formats.md` says the same in a table, and so it does of
//! headers of blocks (`block`). Every piece has a CRC-64/NVME of its own, so that damage stays where it is. Deliberately absent: when
//! what is written.

use kvd_core::tier::{BlockKey, Place, STORE_PAGE};
use kvd_core::{BlockHash, NamespaceId};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::io::PAGE;

/// Highest generation, checkpoint or epoch that counts: none comes near it, and what follows it is a number too.
pub(crate) const MOST_NUMBER: u64 = 1 << 62;

/// The format that this build writes and reads.
pub const VERSION: u32 = 1;

pub(crate) const SUPER_MAGIC: [u8; 8] = *b"KVDNVME\0";
pub(crate) const NAME_MAGIC: [u8; 8] = *b"KVDNAME1";
pub(crate) const PAGE_MAGIC: [u8; 8] = *b"KVDPAGE1";

/// Records of one page, after its header.
pub const PER_PAGE: usize = 31;
/// Bytes of a record, and of the header of a page of them.
pub(crate) const RECORD: usize = 128;

pub(crate) fn crc(bytes: &[u8]) -> u64 {
    crc_fast::checksum(crc_fast::CrcAlgorithm::Crc64Nvme, bytes)
}

/// The CRC over the records of a page, CRC-64/XZ. Each record ends with a CRC of the other polynomial: one of that over all of them
/// would not change when a sound record stands in the place of another, as on a page that was torn.
pub(crate) fn records_crc(page: &[u8]) -> u64 {
    crc_fast::checksum(crc_fast::CrcAlgorithm::Crc64Xz, &page[RECORD..])
}

/// The CRC in the last 8 bytes of a piece, over all before it.
pub(crate) fn tail_crc(bytes: &[u8]) -> u64 {
    crc(&bytes[..bytes.len() - 8])
}

pub(crate) fn tail_holds(bytes: &[u8]) -> bool {
    bytes[bytes.len() - 8..] == tail_crc(bytes).to_le_bytes()
}

/// What a store is and where its areas lie. One page; two copies.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct Superblock {
    pub(crate) magic: [u8; 8],
    pub(crate) version: U32,
    zero: U32,
    pub(crate) id: [u8; 16],
    /// Goes up with every change; of two sound copies the higher counts.
    pub(crate) generation: U64,
    pub(crate) capacity: U64,
    pub(crate) segment_bytes: U64,
    pub(crate) segments: U32,
    pub(crate) name_slots: U32,
    pub(crate) names_at: U64,
    pub(crate) journal_at: U64,
    pub(crate) half_pages: U64,
    pub(crate) checkpoints_at: U64,
    pub(crate) checkpoint_pages: U64,
    pub(crate) segments_at: U64,
    /// Number of the current checkpoint; it lies in area `checkpoint % 2`. 0: there is none.
    pub(crate) checkpoint: U64,
    pub(crate) checkpoint_used: U64,
    pub(crate) checkpoint_records: U64,
    /// Journal pages of lower epochs are in the checkpoint.
    pub(crate) first_epoch: U64,
    pub(crate) next_seq: U64,
    rest: [u8; 3936],
    crc: U64,
}

/// What a page where a superblock should be holds.
pub(crate) enum SuperRead {
    Sound(Box<Superblock>),
    /// Of a format that this build does not know.
    Newer(u32),
    /// It begins as one does, but is damaged.
    Damaged,
    Zero,
    Foreign,
}

impl Superblock {
    pub(crate) fn new() -> Self {
        let mut head = Self::new_zeroed();
        head.magic = SUPER_MAGIC;
        head.version = VERSION.into();
        head
    }

    pub(crate) fn encode(&self, page: &mut [u8]) {
        page.copy_from_slice(self.as_bytes());
        let sum = tail_crc(page);
        page[PAGE - 8..].copy_from_slice(&sum.to_le_bytes());
    }

    pub(crate) fn decode(page: &[u8]) -> SuperRead {
        let Ok(head) = Self::read_from_bytes(page) else {
            return SuperRead::Foreign;
        };
        if head.magic != SUPER_MAGIC {
            return match page.iter().all(|byte| *byte == 0) {
                true => SuperRead::Zero,
                false => SuperRead::Foreign,
            };
        }
        match (tail_holds(page), head.version.get()) {
            (false, _) => SuperRead::Damaged,
            (true, version) if version > VERSION => SuperRead::Newer(version),
            (true, _) => SuperRead::Sound(Box::new(head)),
        }
    }
}

/// What stands before a namespace record in its slot.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct NameHeader {
    magic: [u8; 8],
    store: [u8; 16],
    id: [u8; 32],
    slot: U32,
    length: U32,
    record_crc: U64,
    rest: [u8; 48],
    crc: U64,
}

/// Bytes of a namespace slot with a record of so many, in whole pages.
pub(crate) fn name_bytes(record: usize) -> usize {
    (RECORD + record).next_multiple_of(PAGE)
}

pub(crate) fn encode_name(
    out: &mut [u8],
    store: &[u8; 16],
    slot: u32,
    id: NamespaceId,
    record: &[u8],
) {
    let mut head = NameHeader::new_zeroed();
    head.magic = NAME_MAGIC;
    head.store = *store;
    head.id = id.0;
    head.slot = slot.into();
    head.length = (record.len() as u32).into();
    head.record_crc = crc(record).into();
    head.crc = tail_crc(head.as_bytes()).into();
    out[..RECORD].copy_from_slice(head.as_bytes());
    out[RECORD..RECORD + record.len()].copy_from_slice(record);
}

/// What a namespace slot holds: nothing of this store, something damaged, or a record and its id.
pub(crate) enum NameRead<'a> {
    Empty,
    Damaged,
    Sound(NamespaceId, &'a [u8]),
}

pub(crate) fn decode_name<'a>(bytes: &'a [u8], store: &[u8; 16], slot: u32) -> NameRead<'a> {
    let Ok((head, rest)) = NameHeader::ref_from_prefix(bytes) else {
        return NameRead::Empty;
    };
    if head.magic != NAME_MAGIC || head.store != *store {
        let blank = head.as_bytes().iter().all(|byte| *byte == 0);
        return match blank || tail_holds(head.as_bytes()) {
            true => NameRead::Empty,
            false => NameRead::Damaged,
        };
    }
    let record = rest.get(..head.length.get() as usize);
    let sound = tail_holds(head.as_bytes()) && head.slot.get() == slot;
    match record.filter(|record| sound && crc(record) == head.record_crc.get()) {
        Some(record) => NameRead::Sound(NamespaceId(head.id), record),
        None => NameRead::Damaged,
    }
}

/// Whether a record says that a block is there, or that it is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Stored,
    Dropped,
}

/// One line of the journal or of a checkpoint.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct Record {
    kind: u8,
    pub(crate) group: u8,
    has_parent: u8,
    zero: u8,
    /// Slot of its namespace.
    pub(crate) name: U32,
    pub(crate) seq: U64,
    segment: U32,
    index: U32,
    stride_pages: U32,
    zero2: U32,
    pub(crate) hash: [u8; 32],
    parent: [u8; 32],
    /// CRC of the block's header page.
    pub(crate) header_crc: U64,
    /// First 8 bytes of the namespace's id: its slot may have been given to another since.
    pub(crate) name_check: [u8; 8],
    /// That of the start that wrote it to its page.
    salt: U64,
    crc: U64,
}

const _: () = assert!(size_of::<Superblock>() == PAGE && STORE_PAGE as usize == PAGE);
const _: () = assert!(size_of::<NameHeader>() == RECORD && size_of::<Record>() == RECORD);
const _: () = assert!(size_of::<PageHeader>() == RECORD && RECORD * (PER_PAGE + 1) == PAGE);

impl Record {
    pub(crate) fn new(kind: Kind, seq: u64, name: u32, key: &BlockKey, place: Place) -> Self {
        let mut record = Self::new_zeroed();
        record.kind = match kind {
            Kind::Stored => 1,
            Kind::Dropped => 2,
        };
        record.group = key.group;
        record.name = name.into();
        record.seq = seq.into();
        record.segment = place.segment.into();
        record.index = place.index.into();
        record.stride_pages = ((place.stride / STORE_PAGE) as u32).into();
        record.hash = key.hash.0;
        record.name_check.copy_from_slice(&key.namespace.0[..8]);
        record
    }

    pub(crate) fn with_block(mut self, parent: Option<BlockHash>, header_crc: u64) -> Self {
        self.header_crc = header_crc.into();
        if let Some(parent) = parent {
            self.has_parent = 1;
            self.parent = parent.0;
        }
        self
    }

    /// A record that no start looks at.
    #[cfg(feature = "planted")]
    pub(crate) fn of_nothing(mut self) -> Self {
        self.kind = 0;
        self
    }

    /// Call last.
    pub(crate) fn sealed(mut self, salt: u64) -> Self {
        self.salt = salt.into();
        self.crc = tail_crc(self.as_bytes()).into();
        self
    }

    pub(crate) fn sound(&self) -> bool {
        tail_holds(self.as_bytes())
    }

    pub(crate) fn kind(&self) -> Option<Kind> {
        match self.kind {
            1 => Some(Kind::Stored),
            2 => Some(Kind::Dropped),
            _ => None,
        }
    }

    pub(crate) fn parent(&self) -> Option<BlockHash> {
        (self.has_parent == 1).then_some(BlockHash(self.parent))
    }

    pub(crate) fn place(&self) -> Place {
        Place {
            segment: self.segment.get(),
            index: self.index.get(),
            stride: u64::from(self.stride_pages.get()) * STORE_PAGE,
        }
    }
}

/// Which list a page of records belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum List {
    Journal,
    Checkpoint,
}

/// What stands before the records of a page.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct PageHeader {
    magic: [u8; 8],
    store: [u8; 16],
    list: U32,
    pub(crate) count: U32,
    /// Epoch of the journal, or number of the checkpoint.
    pub(crate) epoch: U64,
    /// Which page of its half or area.
    position: U64,
    first_seq: U64,
    records_crc: U64,
    salt: U64,
    rest: [u8; 48],
    crc: U64,
}

/// Fills a page with at most [`PER_PAGE`] records, all sealed with one salt.
pub(crate) fn encode_page(
    page: &mut [u8],
    store: &[u8; 16],
    list: List,
    epoch: u64,
    position: u64,
    records: &[Record],
) {
    let bytes = records.as_bytes();
    page[RECORD..RECORD + bytes.len()].copy_from_slice(bytes);
    page[RECORD + bytes.len()..].fill(0);
    let mut head = PageHeader::new_zeroed();
    head.magic = PAGE_MAGIC;
    head.store = *store;
    head.list = (list as u32 + 1).into();
    head.count = (records.len() as u32).into();
    head.epoch = epoch.into();
    head.position = position.into();
    let first = records.first();
    head.first_seq = first.map_or(0, |record| record.seq.get()).into();
    head.salt = first.map_or(0, |record| record.salt.get()).into();
    head.records_crc = records_crc(page).into();
    head.crc = tail_crc(head.as_bytes()).into();
    page[..RECORD].copy_from_slice(head.as_bytes());
}

/// The header of a page of this list at this position, if the page has one. Its epoch is for the caller to look at.
pub(crate) fn page_header<'a>(
    page: &'a [u8],
    store: &[u8; 16],
    list: List,
    position: u64,
) -> Option<&'a PageHeader> {
    let (head, _) = PageHeader::ref_from_prefix(page).ok()?;
    let mine = head.magic == PAGE_MAGIC && head.store == *store;
    let here = head.list.get() == list as u32 + 1 && head.position.get() == position;
    let legal =
        (1..=PER_PAGE as u32).contains(&head.count.get()) && head.epoch.get() <= MOST_NUMBER;
    (mine && here && legal && tail_holds(head.as_bytes())).then_some(head)
}

/// Calls `each` with the sound records of a page, in order; gives how many are not sound.
pub(crate) fn page_records(
    page: &[u8],
    head: &PageHeader,
    list: List,
    each: &mut dyn FnMut(&Record),
) -> u64 {
    let whole = records_crc(page) == head.records_crc.get();
    let mut bad = 0;
    for at in 0..head.count.get() as usize {
        let Ok((record, _)) = Record::ref_from_prefix(&page[RECORD * (at + 1)..]) else {
            return bad + 1;
        };
        // Under a damaged page, a record must also be one that this page was made with: the sectors of a torn page may be those of
        // an earlier epoch, or of an earlier start that wrote the same numbers to the same page and was cut short, too.
        let its_turn = list == List::Checkpoint
            || record.seq.get() == head.first_seq.get().wrapping_add(at as u64);
        let its_start = record.salt.get() == head.salt.get();
        if whole || (record.sound() && its_turn && its_start) {
            each(record);
        } else {
            bad += 1;
        }
    }
    bad
}

#[cfg(test)]
mod tests {
    use super::*;

    const STORE: &[u8; 16] = b"a store to teach";

    fn record(seq: u64, salt: u64) -> Record {
        let key = BlockKey {
            namespace: NamespaceId([7; 32]),
            group: 0,
            hash: BlockHash([seq as u8; 32]),
        };
        let place = Place {
            segment: 0,
            index: seq as u32,
            stride: STORE_PAGE,
        };
        Record::new(Kind::Stored, seq, 0, &key, place).sealed(salt)
    }

    fn page(first: u64, salt: u64) -> Vec<u8> {
        let records: Vec<Record> = (first..first + 20).map(|seq| record(seq, salt)).collect();
        let mut page = vec![0; 4096];
        encode_page(&mut page, STORE, List::Journal, 1, 0, &records);
        page
    }

    /// What is taken from a page of which four records, numbers 7 to 10, are those of another.
    fn torn(mut page: Vec<u8>, other: &[u8]) -> (u64, Vec<u64>) {
        page[1024..1536].copy_from_slice(&other[1024..1536]);
        let header = page_header(&page, STORE, List::Journal, 0).expect("a header");
        assert_ne!(records_crc(&page), header.records_crc.get());
        let mut seen = Vec::new();
        let bad = page_records(&page, header, List::Journal, &mut |record| {
            seen.push(record.seq.get());
        });
        (bad, seen)
    }

    fn wanted() -> (u64, Vec<u64>) {
        (4, (400..420).filter(|n| !(407..411).contains(n)).collect())
    }

    #[test]
    fn a_sound_record_of_an_earlier_epoch_is_noticed() {
        assert_eq!(torn(page(400, 1), &page(50, 1)), wanted());
    }

    /// A start was cut short before the header of its page had landed: the next writes the same numbers to the same page.
    #[test]
    fn a_sound_record_of_an_earlier_start_is_noticed() {
        assert_eq!(torn(page(400, 2), &page(400, 1)), wanted());
    }
}
