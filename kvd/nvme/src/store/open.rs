//! What a start writes: a new store on an empty device, or the superblock that was damaged. Deliberately absent: finding out what
//! is there (`recover`).

use super::config::{OpenError, RecoveryReport, StoreConfig};
use super::format::Superblock;
use super::layout::{HEADS, Layout, NAME_SLOT};
use super::names::Names;
use super::recover::{Heads, State};
use super::table::Table;
use super::wire::Wire;
use crate::io::{Aligned, BlockIo, PAGE};

/// Pages of one write of zeros.
const ZEROS: u64 = 256;

/// Makes a store. The superblocks come last, so that a format that was cut short leaves none.
pub(crate) fn format<I: BlockIo>(
    wire: &mut Wire<'_, I>,
    config: &StoreConfig,
) -> Result<State, OpenError> {
    let layout = Layout::of(config)?;
    for at in HEADS {
        wire.write(at, Aligned::new(1))?;
    }
    for slot in 0..layout.name_slots {
        wire.write(
            layout.names_at + u64::from(slot) * NAME_SLOT,
            Aligned::new(1),
        )?;
    }
    let mut page = 0;
    while page < 2 * layout.half_pages {
        let count = ZEROS.min(2 * layout.half_pages - page);
        let zeros = Aligned::new(count as usize);
        wire.write(layout.journal_at + page * PAGE as u64, zeros)?;
        page += count;
    }
    let mut head = Superblock::new();
    head.id = config.start;
    head.generation = 1.into();
    head.first_epoch = 1.into();
    head.next_seq = 1.into();
    layout.write(&mut head);
    wire.flush()?;
    for at in HEADS {
        wire.write(at, head_page(&head))?;
    }
    wire.flush()?;
    Ok(State {
        head,
        layout,
        table: Table::new(layout.shape),
        names: Names::new(layout.name_slots),
        epochs: Vec::new(),
        next_seq: 1,
        report: RecoveryReport {
            formatted: true,
            shape: layout.shape,
            ..RecoveryReport::default()
        },
    })
}

/// Makes durable what a process before this one may have left to the device, and both superblocks the same again. A superblock that
/// can't be written stays as it is: the other counts.
pub(crate) fn mend<I: BlockIo>(wire: &mut Wire<'_, I>, heads: &Heads) -> Result<u64, OpenError> {
    wire.flush()?;
    let mut written = 0;
    for (at, _) in HEADS.iter().zip(heads.stale).filter(|(_, stale)| *stale) {
        match wire.write(*at, head_page(&heads.head)) {
            Ok(()) => written += 1,
            Err(OpenError::Io(_)) => continue,
            Err(error) => return Err(error),
        }
        wire.flush()?;
    }
    Ok(written)
}

pub(crate) fn head_page(head: &Superblock) -> Aligned {
    let mut page = Aligned::new(1);
    head.encode(page.bytes_mut());
    page
}
