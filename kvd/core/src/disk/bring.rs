//! One block that a load needs from below: its read is begun, or joined if it is under way. If there is no slot because reads ahead
//! hold some, the load is short of it and waits for their end. Deliberately absent: the read itself (`fetch`); the load's answer.

use crate::api::Output;
use crate::index::{EntryState, Found};
use crate::state::Core;

/// For whom blocks are fetched.
pub(super) struct Fetcher {
    pub(super) t: usize,
    /// For nobody yet.
    pub(super) ahead: bool,
    /// Another class's extents may be colder than this class's blocks.
    pub(super) others: bool,
    /// No more reads are begun, and why.
    pub(super) stopped: Option<Coming>,
}

impl Fetcher {
    fn new(t: usize, ahead: bool) -> Self {
        let (others, stopped) = (true, None);
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
    /// No slot, but reads ahead hold some.
    Short,
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
        if let Some(stopped) = by.stopped {
            return stopped;
        }
        let Some(stored) = self.stored_entry(wanted.0, wanted.1, hash) else {
            return Coming::Refused;
        };
        match self.fetch(by, wanted, hash, stored, out) {
            Ok(host) => self.join_read(host, number),
            Err(refusal) => {
                by.stopped = Some(refusal);
                refusal
            }
        }
    }

    /// A load joins a read; one that was begun ahead counts as the load's from now on. If the limits of loads have no room for it, it
    /// stays counted as it is: the load is served all the same, and takes nothing from other loads.
    pub(super) fn join_read(&mut self, host: u32, number: u64) -> Coming {
        let (t, store) = match self.disks.fetches.get_mut(&host) {
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

    /// Tries again to begin reads of loads that were short of slots, first come, first served. Once no read ahead is under way, they
    /// are refused as any load that finds no slot.
    pub(super) fn serve_short(&mut self, t: usize, out: &mut Vec<Output>) {
        let mut by = Fetcher::load(t);
        let mut last = 0;
        while let Some((number, at)) = self.tenants[t].short.front().copied() {
            if number != last {
                (by.stopped, last) = (None, number);
            }
            let coming = match self.short_block(number, at) {
                Some((space, group, hash)) => match self.index.find(space, group, &hash) {
                    Found::Entry(id)
                        if self.index.entries.hot[id].state == EntryState::Resident =>
                    {
                        self.tenants[t].short.pop_front();
                        self.came_for(number, Some(id), out);
                        continue;
                    }
                    _ => self.bring(&mut by, (space, group), &hash, number, out),
                },
                None => Coming::Refused,
            };
            if coming == Coming::Short {
                return;
            }
            self.tenants[t].short.pop_front();
            if coming != Coming::Waits {
                self.tier_counters.fetch_busy += u64::from(coming == Coming::Refused);
                self.came_for(number, None, out);
            }
        }
    }

    /// Which block a load is short of.
    fn short_block(&self, number: u64, at: u32) -> Option<(u32, u8, [u8; 32])> {
        let waiting = self.disks.waiting.get(&number)?;
        let joined = &self.sessions[waiting.session].joined;
        let space = joined.get(waiting.namespace as usize)?.space;
        let hash = waiting.hashes.get(at as usize)?;
        Some((space, waiting.group, *hash))
    }
}
