//! What a device holds: which superblock counts, which pages of the journal do, what is where. Reads only, so that checking a store
//! is the same walk as opening one. Order: namespaces, the checkpoint, then the halves of the journal by epoch; the newest record of a
//! place wins. Two walks over the records, so that no key has to be kept: the first finds the newest of each place, the second tells.
//! Deliberately absent: what is written at a start (`open`).

use kvd_core::tier::{BlockKey, Recovered, StoreShape};
use kvd_core::{BlockHash, NamespaceId, NamespaceRecord};

use super::config::{OpenError, RecoveryReport, StoreConfig};
use super::format::{
    Kind, List, NameRead, Record, SuperRead, Superblock, VERSION, decode_name, page_header,
    page_records,
};
use super::layout::{HEADS, HEADS_BYTES, Layout, NAME_SLOT};
use super::names::Names;
use super::start::is_file_system;
use super::table::Table;
use super::wire::Wire;
use crate::io::{BlockIo, PAGE};

/// Highest sequence number that counts: half of what 48 bits hold, so that there are numbers for what comes after it.
const MOST_SEQ: u64 = 1 << 47;

/// Something that a store held when it was opened.
#[derive(Clone, Copy, Debug)]
pub enum Found<'a> {
    /// How the store is divided. Comes first.
    Shape(StoreShape),
    /// A namespace and its canonical record. All of them come before the first block.
    Namespace(NamespaceId, &'a [u8]),
    /// A block.
    Block(Recovered),
}

/// The superblock that counts.
pub(crate) struct Heads {
    pub(crate) head: Superblock,
    pub(crate) layout: Layout,
    /// Which of [`HEADS`] must be written again.
    pub(crate) stale: [bool; 2],
}

/// Looks at the first pages. `None`: an empty device, or one that may be formatted.
pub(crate) fn heads<I: BlockIo>(
    wire: &mut Wire<'_, I>,
    config: &StoreConfig,
) -> Result<Option<Heads>, OpenError> {
    let mut found = [None, None];
    let (mut blank, mut unreadable) = (true, None);
    for page in 0..HEADS_BYTES / PAGE as u64 {
        match wire.read(page * PAGE as u64, 1)? {
            Ok(bytes) => {
                blank &= bytes.bytes().iter().all(|byte| *byte == 0);
                if let Some(at) = HEADS.iter().position(|h| *h == page * PAGE as u64) {
                    found[at] = Some(Superblock::decode(bytes.bytes()));
                }
            }
            Err(error) => (blank, unreadable) = (false, Some(error)),
        }
    }
    if blank && let Ok(next) = wire.read(HEADS_BYTES, 1)? {
        blank = !is_file_system(next.bytes());
    }
    for copy in &found {
        if let Some(SuperRead::Newer(found)) = copy {
            return Err(OpenError::Newer {
                found: *found,
                known: VERSION,
            });
        }
    }
    let read = |copy: &Option<SuperRead>| match copy {
        Some(SuperRead::Sound(head)) => Some((**head, Layout::read(head)?)),
        _ => None,
    };
    let sound = [read(&found[0]), read(&found[1])];
    let generation = |n: usize| sound[n].as_ref().map(|(head, _)| head.generation.get());
    let best = usize::from(generation(1) > generation(0));
    let Some((head, layout)) = sound[best] else {
        return no_head(&found, blank, unreadable, config);
    };
    if layout.capacity > config.capacity {
        return Err(OpenError::Short {
            store: layout.capacity,
            device: config.capacity,
        });
    }
    Ok(Some(Heads {
        head,
        layout,
        stale: [
            generation(0) != generation(best),
            generation(1) != generation(best),
        ],
    }))
}

fn no_head(
    found: &[Option<SuperRead>; 2],
    blank: bool,
    unreadable: Option<crate::io::IoError>,
    config: &StoreConfig,
) -> Result<Option<Heads>, OpenError> {
    if blank || config.format {
        return Ok(None);
    }
    let was_ours =
        |copy: &Option<SuperRead>| matches!(copy, Some(SuperRead::Damaged | SuperRead::Sound(_)));
    match unreadable {
        Some(error) => Err(OpenError::Io(error)),
        None if found.iter().any(was_ours) => Err(OpenError::Damaged),
        None => Err(OpenError::Foreign),
    }
}

/// Pages of one epoch in its half.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Epoch {
    pub(crate) epoch: u64,
    /// Pages up to the last that is sound.
    pub(crate) used: u64,
}

/// A store as it was found.
pub(crate) struct State {
    pub(crate) head: Superblock,
    pub(crate) layout: Layout,
    pub(crate) table: Table,
    pub(crate) names: Names,
    /// Those with pages, in ascending order.
    pub(crate) epochs: Vec<Epoch>,
    pub(crate) next_seq: u64,
    pub(crate) report: RecoveryReport,
}

/// Finds out what is there, and tells it.
pub(crate) fn recover<I: BlockIo>(
    wire: &mut Wire<'_, I>,
    heads: &Heads,
    found: &mut dyn FnMut(Found<'_>),
    header_crcs: &mut dyn FnMut(&Recovered, u64),
) -> Result<State, OpenError> {
    let (head, layout) = (heads.head, heads.layout);
    let mut state = State {
        head,
        layout,
        table: Table::new(layout.shape),
        names: Names::new(layout.name_slots),
        epochs: Vec::new(),
        next_seq: head.next_seq.get().clamp(1, MOST_SEQ),
        report: RecoveryReport {
            shape: layout.shape,
            ..RecoveryReport::default()
        },
    };
    read_names(wire, &mut state, found)?;
    for half in 0..2 {
        state.epochs.extend(read_half(wire, &state, half)?);
    }
    state.epochs.sort_by_key(|epoch| epoch.epoch);
    let damage = walk(wire, &mut state, &mut |state, record| {
        state.report.records += 1;
        let (place, seq) = (record.place(), record.seq.get());
        state.next_seq = state.next_seq.max(seq + 1);
        match record.kind() {
            Some(Kind::Stored) => state.table.store(place, seq, record.name.get()),
            _ => drop(state.table.drop_older(place, seq)),
        }
    })?;
    (state.report.pages_damaged, state.report.records_damaged) = damage;
    walk(wire, &mut state, &mut |state, record| {
        if record.kind() != Some(Kind::Stored) {
            return;
        }
        let (place, slot) = (record.place(), record.name.get());
        let Some(namespace) = state.names.id(slot, &record.name_check) else {
            let newest = state.table.get(place).map(|(seq, _)| seq);
            state.report.orphans += u64::from(newest == Some(record.seq.get()));
            return;
        };
        if !state.table.tell(place, record.seq.get()) {
            return;
        }
        state.names.add(slot);
        state.report.blocks += 1;
        let block = Recovered {
            key: BlockKey {
                namespace,
                group: record.group,
                hash: BlockHash(record.hash),
            },
            parent: record.parent(),
            place,
        };
        header_crcs(&block, record.header_crc.get());
        found(Found::Block(block));
    })?;
    state.table.keep_told();
    Ok(state)
}

fn read_names<I: BlockIo>(
    wire: &mut Wire<'_, I>,
    state: &mut State,
    found: &mut dyn FnMut(Found<'_>),
) -> Result<(), OpenError> {
    let layout = state.layout;
    let per_slot = NAME_SLOT / PAGE as u64;
    let mut bytes = Vec::with_capacity(NAME_SLOT as usize);
    let pages = per_slot * u64::from(layout.name_slots);
    wire.scan(layout.names_at, pages, &mut |page, read| {
        match read {
            Some(read) => bytes.extend_from_slice(read),
            // Its checksum will not hold.
            None => bytes.resize(bytes.len() + PAGE, 0xff),
        }
        if (page + 1) % per_slot != 0 {
            return;
        }
        let slot = (page / per_slot) as u32;
        match decode_name(&bytes, &state.head.id, slot) {
            NameRead::Empty => {}
            NameRead::Sound(id, record)
                if NamespaceRecord::parse(record).is_ok_and(|record| record.id() == id) =>
            {
                state.names.found(slot, id);
                state.report.namespaces += 1;
                found(Found::Namespace(id, record));
            }
            _ => state.report.namespaces_damaged += 1,
        }
        bytes.clear();
    })
}

/// The epoch whose pages count in a half of the journal: the latest, unless the checkpoint has it.
fn read_half<I: BlockIo>(
    wire: &mut Wire<'_, I>,
    state: &State,
    half: u64,
) -> Result<Option<Epoch>, OpenError> {
    let (head, layout) = (&state.head, &state.layout);
    let mut best: Option<Epoch> = None;
    wire.scan(layout.half_at(half), layout.half_pages, &mut |at, page| {
        let header = page.and_then(|page| page_header(page, &head.id, List::Journal, at));
        let epoch = header.map_or(0, |header| header.epoch.get());
        let counts = epoch >= head.first_epoch.get() && epoch % 2 == half && epoch > 0;
        if counts && best.is_none_or(|best| best.epoch <= epoch) {
            let used = at + 1;
            best = Some(Epoch { epoch, used });
        }
    })?;
    Ok(best)
}

/// Calls `each` with every sound record that counts, oldest first. Gives how many pages and single records are damaged.
fn walk<I: BlockIo>(
    wire: &mut Wire<'_, I>,
    state: &mut State,
    each: &mut dyn FnMut(&mut State, &Record),
) -> Result<(u64, u64), OpenError> {
    let (head, layout) = (state.head, state.layout);
    let number = head.checkpoint.get();
    let mut lists = Vec::new();
    if number > 0 {
        let at = layout.checkpoint_at(number);
        lists.push((List::Checkpoint, number, at, head.checkpoint_used.get()));
    }
    for epoch in &state.epochs {
        let at = layout.half_at(epoch.epoch);
        lists.push((List::Journal, epoch.epoch, at, epoch.used));
    }
    let (mut bad_pages, mut bad_records) = (0, 0);
    for (list, number, at, pages) in lists {
        wire.scan(at, pages, &mut |position, page| {
            let header = page.and_then(|page| page_header(page, &head.id, list, position));
            let header = header.filter(|header| header.epoch.get() == number);
            let (Some(page), Some(header)) = (page, header) else {
                bad_pages += 1;
                return;
            };
            bad_records += page_records(page, header, list, &mut |record| {
                if legal(&layout, record) {
                    each(state, record);
                }
            });
        })?;
    }
    Ok((bad_pages, bad_records))
}

/// Whether a sound record makes sense in this store. One that does not was written by a mistake, not by damage.
pub(crate) fn legal(layout: &Layout, record: &Record) -> bool {
    let seq = (1..MOST_SEQ).contains(&record.seq.get());
    seq && record.kind().is_some()
        && layout.has(record.place())
        && record.name.get() < layout.name_slots
}
