//! Checks a store from outside: superblocks, namespaces, checkpoint, journal, and every byte of every block. With `repair`, damaged
//! blocks are dropped from the journal and a damaged superblock is written again from the other. Keeps a list of all blocks in memory
//! (about 120 bytes each); it is meant for a store that nobody uses. Deliberately absent: looking for blocks that no record names.

use std::collections::BTreeMap;
use std::time::Duration;

use kvd_core::tier::{BlockKey, OpId, Place, Recovered, STORE_PAGE, StoreDone, StoreOp, stride_of};
use kvd_core::{GroupGeometry, NamespaceId, NamespaceRecord};

use super::block::{BlockPage, Flaw};
use super::config::{OpenError, RecoveryReport, StoreConfig};
use super::read::check_header;
use super::recover::{Found, Heads, State, heads, recover};
use super::verify::Verifier;
use super::wire::Wire;
use super::{Store, open};
use crate::io::BlockIo;

/// Longest list of findings.
const MOST_FINDINGS: usize = 100;
/// One wait for the device while repairing, and how many may pass without an answer.
const WAIT: Duration = Duration::from_millis(100);
const MOST_WAITS: u32 = 600;

/// One thing that is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finding {
    /// This copy of the superblock is damaged or old.
    Superblock(usize),
    /// So many namespace slots are damaged.
    Namespaces(u64),
    /// So many pages of checkpoint and journal are damaged.
    Pages(u64),
    /// So many single records are.
    Records(u64),
    /// So many blocks have lost their namespace.
    Orphans(u64),
    /// A block is not what its record says.
    Block {
        /// Which should be there.
        key: BlockKey,
        /// Where.
        place: Place,
        /// What is wrong.
        flaw: Flaw,
    },
}

/// What was found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FsckReport {
    /// As a start would see it.
    pub recovery: RecoveryReport,
    /// Blocks that are sound, and their bytes.
    pub sound: u64,
    /// Bytes of those.
    pub sound_bytes: u64,
    /// Blocks that are damaged.
    pub damaged: u64,
    /// Blocks that could not be read.
    pub unreadable: u64,
    /// Damaged and unreadable blocks that were dropped.
    pub dropped: u64,
    /// Superblocks that were written again.
    pub superblocks_repaired: u64,
    /// The first hundred.
    pub findings: Vec<Finding>,
}

impl FsckReport {
    fn found(&mut self, finding: Finding) {
        if self.findings.len() < MOST_FINDINGS {
            self.findings.push(finding);
        }
    }

    /// Whether nothing at all is wrong.
    pub fn is_clean(&self) -> bool {
        self.findings.is_empty() && self.unreadable == 0
    }
}

/// A block and the CRC of its header page.
type Listed = (Recovered, u64);
/// Sizes of the groups of each namespace.
type Groups = BTreeMap<NamespaceId, Vec<GroupGeometry>>;

/// Checks the store on `io`; `progress` is called with blocks done and blocks in all. Writes only with `repair`.
pub fn fsck<I: BlockIo>(
    mut io: I,
    config: &StoreConfig,
    repair: bool,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<FsckReport, OpenError> {
    let mut wire = Wire::new(&mut io);
    let asked = StoreConfig {
        format: false,
        ..config.clone()
    };
    let heads = heads(&mut wire, &asked)?.ok_or(OpenError::Empty)?;
    let (mut blocks, mut groups) = (Vec::<Listed>::new(), Groups::new());
    let state = recover(
        &mut wire,
        &heads,
        &mut |found| {
            if let Found::Namespace(id, record) = found
                && let Ok(record) = NamespaceRecord::parse(record)
            {
                groups.insert(id, record.groups().to_vec());
            }
        },
        &mut |block, crc| blocks.push((*block, crc)),
    )?;
    let mut report = FsckReport::default();
    list_damage(&mut report, &heads, &state);
    let mut bad = Vec::new();
    for (n, listed) in blocks.iter().enumerate() {
        match check_block(&mut wire, &state, &groups, listed)? {
            Ok(bytes) => {
                report.sound += 1;
                report.sound_bytes += bytes;
            }
            Err(flaw) => {
                let Recovered { key, place, .. } = listed.0;
                report.damaged += u64::from(flaw.is_some());
                report.unreadable += u64::from(flaw.is_none());
                if let Some(flaw) = flaw {
                    report.found(Finding::Block { key, place, flaw });
                }
                bad.push((key, place));
            }
        }
        progress(n as u64 + 1, blocks.len() as u64);
    }
    if repair {
        report.superblocks_repaired = open::mend(&mut wire, &heads)?;
        report.dropped = drop_blocks(io, config, state, &bad)?;
    }
    Ok(report)
}

fn list_damage(report: &mut FsckReport, heads: &Heads, state: &State) {
    let recovery = &state.report;
    for copy in (0..2).filter(|copy| heads.stale[*copy]) {
        report.found(Finding::Superblock(copy));
    }
    let counts = [
        (
            recovery.namespaces_damaged,
            Finding::Namespaces as fn(u64) -> Finding,
        ),
        (recovery.pages_damaged, Finding::Pages),
        (recovery.records_damaged, Finding::Records),
        (recovery.orphans, Finding::Orphans),
    ];
    for (count, finding) in counts.into_iter().filter(|(count, _)| *count > 0) {
        report.found(finding(count));
    }
    report.recovery = recovery.clone();
}

/// Bytes of the block, or what is wrong with it; nothing where the device does not give it.
fn check_block<I: BlockIo>(
    wire: &mut Wire<'_, I>,
    state: &State,
    groups: &Groups,
    (block, crc): &Listed,
) -> Result<Result<u64, Option<Flaw>>, OpenError> {
    let (place, key) = (block.place, &block.key);
    let at = state.layout.block_at(place);
    let Ok(head) = wire.read(at, 1)? else {
        return Ok(Err(None));
    };
    let group = groups.get(&key.namespace);
    let geometry = group.and_then(|groups| groups.get(usize::from(key.group)));
    let (mut page, store) = (BlockPage::new(), &state.head.id);
    if let Err(flaw) = check_header(&mut page, head.bytes(), store, at, key, geometry) {
        return Ok(Err(Some(flaw)));
    }
    let bytes = page.geometry.block_bytes();
    if page.crc != *crc || page.header.parent != block.parent {
        return Ok(Err(Some(Flaw::OtherBlock)));
    }
    if geometry.is_none() || stride_of(bytes) != place.stride {
        return Ok(Err(Some(Flaw::Geometry)));
    }
    let mut verifier = Verifier::new(&page, Vec::new());
    let mut readable = true;
    let pages = bytes.div_ceil(STORE_PAGE);
    wire.scan(at + STORE_PAGE, pages, &mut |_, page| match page {
        Some(page) => verifier.feed(page),
        None => readable = false,
    })?;
    Ok(match (readable, verifier.finish().0) {
        (false, _) => Err(None),
        (true, false) => Err(Some(Flaw::Payload)),
        (true, true) => Ok(bytes),
    })
}

/// Drops these from the journal; gives how many that was.
fn drop_blocks<I: BlockIo>(
    io: I,
    config: &StoreConfig,
    state: State,
    bad: &[(BlockKey, Place)],
) -> Result<u64, OpenError> {
    let config = StoreConfig {
        flush_us: 0,
        ..config.clone()
    };
    let mut store = Store::ready(io, &config, state).store;
    let (mut dropped, mut waits) = (0, 0);
    let mut left = bad.iter().enumerate().peekable();
    let mut done = Vec::new();
    while left.peek().is_some() || store.pending() > 0 {
        while store.pending() < config.max_queue.max(1) {
            let Some((n, (key, place))) = left.next() else {
                break;
            };
            let op = StoreOp::Drop {
                op: OpId(n as u64),
                place: *place,
                key: *key,
            };
            done.extend(store.submit(op, None));
        }
        store.turn(0, WAIT, &mut done);
        waits = if done.is_empty() { waits + 1 } else { 0 };
        if waits > MOST_WAITS {
            return Err(OpenError::Stalled);
        }
        let good = |one: &StoreDone| matches!(one, StoreDone::Dropped { result: Ok(()), .. });
        dropped += done.drain(..).filter(good).count() as u64;
    }
    Ok(dropped)
}
