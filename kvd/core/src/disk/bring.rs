//! One block that a load needs from below: its read is begun, or joined if it is under way. Deliberately absent: the read itself
//! (`fetch`); the load's answer; waiting for slots.

use crate::api::Output;
use crate::index::Found;
use crate::state::Core;

/// For whom blocks are fetched.
pub(super) struct Fetcher {
    pub(super) t: usize,
    /// For nobody yet.
    pub(super) ahead: bool,
    /// Another class's extents may be colder than this class's blocks.
    pub(super) others: bool,
    /// No more reads are begun.
    pub(super) stopped: bool,
}

impl Fetcher {
    fn new(t: usize, ahead: bool) -> Self {
        let (others, stopped) = (true, false);
        Fetcher {
            t,
            ahead,
            others,
            stopped,
        }
    }

    pub(super) fn load(t: usize) -> Self {
        Self::new(t, false)
    }

    pub(super) fn ahead(t: usize) -> Self {
        Self::new(t, true)
    }
}

/// What a load may expect of one block that is below or coming.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Coming {
    /// It is one of those that wait for it now.
    Waits,
    /// It was already.
    Again,
    /// It can't be had.
    Refused,
}

impl Core {
    /// Begins a load's read of one block, or joins the one that is under way.
    pub(super) fn bring(
        &mut self,
        by: &mut Fetcher,
        wanted: (u32, u8),
        hash: &[u8; 32],
        number: u64,
        out: &mut Vec<Output>,
    ) -> Coming {
        if let Found::Entry(host) = self.index.find(wanted.0, wanted.1, hash) {
            return self.join_read(host, number);
        }
        let stored = self.stored_entry(wanted.0, wanted.1, hash);
        let Some(stored) = stored.filter(|_| !by.stopped) else {
            return Coming::Refused;
        };
        match self.fetch(by, wanted, hash, stored, out) {
            Some(host) => self.join_read(host, number),
            None => {
                by.stopped = true;
                Coming::Refused
            }
        }
    }

    /// A load joins a read; one that was begun ahead counts as the load's from now on. If the limits of loads have no room for it, it
    /// stays counted as it is: the load is served all the same, and takes nothing from other loads.
    fn join_read(&mut self, host: u32, number: u64) -> Coming {
        let (t, store) = match self.disks.fetches.get_mut(host.into()) {
            Some(fetch) if fetch.waiters.contains(&number) => return Coming::Again,
            Some(fetch) => {
                fetch.waiters.push(number);
                (fetch.t, fetch.store)
            }
            None => return Coming::Refused,
        };
        let entry = &self.index.entries.hot[host];
        let groups = &self.spaces.get(entry.space).groups;
        let slot_bytes = groups[usize::from(entry.group)].slot_bytes;
        if self.index.entries.side[host].ahead && self.may_load(t, store, slot_bytes) {
            self.end_ahead(host);
            self.tenants[t].ahead_reads -= 1;
            self.tenants[t].coming_bytes += slot_bytes;
            self.disks.all[store].reads += 1;
        }
        Coming::Waits
    }
}
