//! Coming up: loads of blocks that only a store holds. The blocks are read into host memory, and the load is answered when all
//! of them have come, failed, or its deadline has passed.
//!
//! A block that comes up has a slot that the store alone writes, and an entry that is Filling. Loads of the same block share one
//! read. A read that fails is a failure, never an absence; the block stays known unless its bytes are wrong. Deliberately absent:
//! reading ahead of a load, and telling a load's blocks one by one.

use std::collections::BTreeSet;

use super::{Doing, Fetch, Waiting};
use crate::api::{Failure, LoadState, NIL, Output, Reply};
use crate::evict::chain;
use crate::geometry::Cut;
use crate::ids::{RequestId, StoreId};
use crate::index::{Entry, EntryState, Found};
use crate::log::ChangeKind;
use crate::pool::SlotState;
use crate::settings::OffloadPolicy;
use crate::state::Core;
use crate::step::Caller;
use crate::tier::{HostRange, StoreError, StoreOp};

/// What one load asks for.
pub(crate) struct Asked<'a> {
    pub(crate) id: RequestId,
    pub(crate) namespace: u32,
    pub(crate) space: u32,
    pub(crate) group: u8,
    pub(crate) hashes: &'a [[u8; 32]],
    pub(crate) deadline_ms: u32,
}

impl Core {
    /// The store's entry of a block that can be read there, and which store.
    pub(crate) fn stored_entry(
        &self,
        space: u32,
        group: u8,
        hash: &[u8; 32],
    ) -> Option<(usize, u32)> {
        let store = self.disks.store_of(hash)?;
        let disk = &self.disks.all[store];
        let number = disk.space(self.spaces.get(space).id)?;
        let entry = disk.readable(number, group, hash)?;
        disk.on.then_some((store, entry))
    }

    /// Begins to bring up what this load needs; true if it must wait for that.
    pub(crate) fn wait_for_stores(
        &mut self,
        caller: Caller,
        asked: &Asked<'_>,
        out: &mut Vec<Output>,
    ) -> bool {
        if self.disks.all.is_empty() {
            return false;
        }
        let missing =
            |core: &Core, hash: &[u8; 32]| match core.index.find(asked.space, asked.group, hash) {
                Found::Entry(id) => core.disks.fetches.contains_key(&id),
                _ => core.stored_entry(asked.space, asked.group, hash).is_some(),
            };
        if !asked.hashes.iter().any(|hash| missing(self, hash)) {
            return false;
        }
        let number = self.disks.last_wait + 1;
        let room = self.disks.waiting_hashes + asked.hashes.len()
            <= self.settings.tiers.max_waiting_hashes as usize;
        let longest = u64::from(self.settings.tiers.max_wait_ms);
        let wanted = match asked.deadline_ms {
            0 => longest,
            ms => u64::from(ms).min(longest),
        };
        let mut waiting = Waiting {
            session: caller.session,
            token: self.sessions[caller.session].token,
            id: asked.id,
            namespace: asked.namespace,
            group: asked.group.into(),
            hashes: asked.hashes.to_vec(),
            left: 0,
            failed: BTreeSet::new(),
            pins: Vec::new(),
            deadline: self.now.saturating_add(wanted * 1000),
        };
        for (at, hash) in (0u32..).zip(asked.hashes) {
            let found = match self.index.find(asked.space, asked.group, hash) {
                Found::Entry(id) if self.disks.fetches.contains_key(&id) => Some(id),
                Found::Entry(id) if self.index.entries.hot[id].state == EntryState::Resident => {
                    self.pin(caller.tenant, id);
                    waiting.pins.push((id, self.index.entries.side[id].serial));
                    continue;
                }
                Found::Entry(_) => continue,
                _ => match self.stored_entry(asked.space, asked.group, hash) {
                    Some(stored) if room => self.fetch(caller.tenant, asked, hash, stored, out),
                    Some(_) => None,
                    None => continue,
                },
            };
            match found.and_then(|id| self.disks.fetches.get_mut(&id)) {
                Some(fetch) => {
                    if !fetch.waiters.contains(&number) {
                        fetch.waiters.push(number);
                        waiting.left += 1;
                    }
                }
                None => {
                    self.tier_counters.fetch_busy += 1;
                    waiting.failed.insert(at);
                }
            }
        }
        self.disks.last_wait = number;
        self.disks.waiting_hashes += waiting.hashes.len();
        self.disks.by_deadline.insert((waiting.deadline, number));
        self.sessions[caller.session].waits += 1;
        let ready = waiting.left == 0;
        self.disks.waiting.insert(number, waiting);
        if ready {
            self.answer_waiting(number, out);
        }
        true
    }

    /// Begins to read one block into host memory. Gives its entry there; `None` when there is no room or too much under way.
    fn fetch(
        &mut self,
        t: usize,
        asked: &Asked<'_>,
        hash: &[u8; 32],
        (store, stored): (usize, u32),
        out: &mut Vec<Output>,
    ) -> Option<u32> {
        if self.disks.all[store].reads >= self.settings.tiers.max_reads
            || self.index.find(asked.space, asked.group, hash) == Found::Crowded
        {
            return None;
        }
        let namespace = self.spaces.get(asked.space);
        let class = namespace.groups[usize::from(asked.group)].class;
        let geometry = namespace.record.groups()[usize::from(asked.group)].clone();
        let slot = self.room_for(t, class, &mut true, out)?;
        let host = self.enter_coming(t, asked, hash, (store, stored), slot);
        let disk = &mut self.disks.all[store];
        disk.reads += 1;
        disk.index.entries.hot[stored].pins += 1;
        let place = disk.places.place(disk.index.entries.hot[stored].slot);
        let key = disk.key(stored);
        let op = self.disks.begin(Doing::Read { host });
        let fetch = Fetch {
            store,
            entry: stored,
            t,
            waiters: Vec::new(),
        };
        self.disks.fetches.insert(host, fetch);
        let offset = self.tenants[t]
            .pool
            .as_ref()
            .map_or(0, |pool| pool.offset(slot));
        let into = HostRange {
            tenant: self.tenants[t].id,
            offset,
            bytes: geometry.block_bytes(),
        };
        let op = StoreOp::Read {
            op,
            from: place,
            into,
            key,
            geometry: Box::new(geometry),
        };
        let store = StoreId(store as u8);
        out.push(Output::Store { store, op });
        Some(host)
    }

    /// The entry in the host's index of a block that comes up.
    fn enter_coming(
        &mut self,
        t: usize,
        asked: &Asked<'_>,
        hash: &[u8; 32],
        (store, stored): (usize, u32),
        slot: u32,
    ) -> u32 {
        let entries = &self.disks.all[store].index.entries;
        let parent = entries.parent(stored).map(|id| entries.hot[id].hash);
        let entry = Entry {
            hash: *hash,
            space: asked.space,
            slot,
            parent: NIL,
            stamp: self.stamp,
            crcs: NIL,
            group: asked.group,
            state: EntryState::Filling,
            ..Entry::default()
        };
        let id = self.index.insert(entry, 0);
        let namespace = self.spaces.get_mut(asked.space);
        namespace.coming += 1;
        let class = namespace.groups[usize::from(asked.group)].class;
        if let Some(pool) = &mut self.tenants[t].pool {
            if let Some(parent) = parent
                && let Found::Entry(parent) = self.index.find(asked.space, asked.group, &parent)
            {
                let policy = &mut *pool.classes[usize::from(class)].policy;
                chain::gains_child(policy, &mut self.index.entries, parent);
                self.index.entries.adopt(id, parent);
            }
            pool.set_owner(slot, NIL, self.stamp);
        }
        id
    }

    /// A read is over.
    pub(super) fn read_over(
        &mut self,
        host: u32,
        result: Result<Box<(Cut, Vec<u64>)>, StoreError>,
        out: &mut Vec<Output>,
    ) {
        let Some(fetch) = self.disks.fetches.remove(&host) else {
            return;
        };
        let disk = &mut self.disks.all[fetch.store];
        disk.reads -= 1;
        disk.index.entries.hot[fetch.entry].pins -= 1;
        let space = self.index.entries.hot[host].space;
        self.spaces.get_mut(space).coming -= 1;
        let came = match result {
            Ok(found) => self.came(host, &fetch, &found.0, &found.1, out),
            Err(error) => {
                let failed = &mut self.tier_counters.fetch_failed;
                *match error {
                    StoreError::Corrupt => &mut failed.corrupt,
                    StoreError::Io => &mut failed.io,
                    StoreError::Off => &mut failed.off,
                } += 1;
                if error == StoreError::Corrupt {
                    self.drop_stored(fetch.store, fetch.entry, false, out);
                }
                false
            }
        };
        let hash = self.index.entries.hot[host].hash;
        if !came {
            self.did_not_come(host, fetch.t, out);
        }
        for number in fetch.waiters {
            self.came_for(number, came.then_some(host), &hash, out);
        }
        self.drop_space_if_idle(space);
    }

    /// A block is in host memory and sound: it becomes visible. False: its namespace has too many cuts.
    fn came(
        &mut self,
        host: u32,
        fetch: &Fetch,
        cut: &Cut,
        crcs: &[u64],
        out: &mut Vec<Output>,
    ) -> bool {
        let (space, group, slot) = {
            let entry = &self.index.entries.hot[host];
            (entry.space, entry.group, entry.slot)
        };
        if self.in_suspect_extent(fetch.t, slot) {
            return false;
        }
        let namespace = self.spaces.get_mut(space);
        let Some(number) = namespace.intern_cut(group, cut) else {
            return false;
        };
        let found = &namespace.groups[usize::from(group)];
        let (class, slot_bytes) = (found.class, found.slot_bytes);
        let Some(run) = self.crcs.insert(cut.crc_count()) else {
            return false;
        };
        namespace.blocks += 1;
        namespace.bytes += slot_bytes;
        self.crcs.set(cut.crc_count(), run, 0, crcs);
        self.index.entries.hot[host].crcs = run;
        self.index.entries.side[host].cut = number;
        if let Some(pool) = &mut self.tenants[fetch.t].pool {
            pool.set_state(slot, SlotState::Resident, host, out);
            let policy = &mut *pool.classes[usize::from(class)].policy;
            chain::visible(policy, &mut self.index.entries, host);
        }
        self.tier_counters.fetched += 1;
        self.tier_counters.fetched_bytes += slot_bytes;
        self.announce(host, ChangeKind::Stored);
        true
    }

    /// A block could not be had: its slot is free again.
    fn did_not_come(&mut self, host: u32, t: usize, out: &mut Vec<Output>) {
        let (space, group, slot) = {
            let entry = &self.index.entries.hot[host];
            (entry.space, entry.group, entry.slot)
        };
        let class = self.spaces.get(space).groups[usize::from(group)].class;
        if let Some(pool) = &mut self.tenants[t].pool {
            let policy = &mut *pool.classes[usize::from(class)].policy;
            chain::leaves(policy, &mut self.index.entries, host, false);
            pool.release(slot, out);
        }
        self.index.remove(host);
    }

    /// Tells one waiting load of one of its blocks: its host entry, if it came.
    fn came_for(&mut self, number: u64, host: Option<u32>, hash: &[u8; 32], out: &mut Vec<Output>) {
        let Some(waiting) = self.disks.waiting.get_mut(&number) else {
            return;
        };
        waiting.left -= 1;
        let left = waiting.left;
        match host {
            Some(host) => {
                let serial = self.index.entries.side[host].serial;
                waiting.pins.push((host, serial));
                let t = self.sessions[waiting.session].tenant;
                self.pin(t, host);
            }
            None => {
                let hashes = (0u32..).zip(&waiting.hashes);
                let lost = hashes.filter(|(_, other)| *other == hash).map(|(at, _)| at);
                waiting.failed.extend(lost);
            }
        }
        if left == 0 {
            self.answer_waiting(number, out);
        }
    }

    /// Takes a waiting load out, and its pins back.
    fn take_waiting(&mut self, number: u64) -> Option<Waiting> {
        let waiting = self.disks.waiting.remove(&number)?;
        self.disks.by_deadline.remove(&(waiting.deadline, number));
        self.disks.waiting_hashes -= waiting.hashes.len();
        self.sessions[waiting.session].waits -= 1;
        for fetch in self.disks.fetches.values_mut() {
            fetch.waiters.retain(|waiter| *waiter != number);
        }
        Some(waiting)
    }

    fn unpin_all(&mut self, t: usize, pins: &[(u32, u32)]) {
        for (id, serial) in pins {
            self.unpin(t, *id, *serial);
        }
    }

    /// Answers a load with what is here by now. What a store still holds, or held when the load came, is failed, not absent.
    fn answer_waiting(&mut self, number: u64, out: &mut Vec<Output>) {
        let Some(waiting) = self.take_waiting(number) else {
            return;
        };
        let session = waiting.session;
        let t = self.sessions[session].tenant;
        let caller = Caller {
            session,
            tenant: t,
            instance: self.sessions[session].instance,
        };
        let reply = self.load_now(caller, waiting.namespace, waiting.group, &waiting.hashes);
        let reply = reply.map(|mut reply| {
            for (at, state) in (0u32..).zip(&mut reply.states) {
                if *state == LoadState::Absent && !self.was_absent(&waiting, at) {
                    *state = LoadState::Failed;
                }
            }
            Reply::Load(reply)
        });
        self.unpin_all(t, &waiting.pins);
        let reply = Box::new(reply.unwrap_or_else(Reply::Failure));
        let session = waiting.token;
        let id = waiting.id;
        out.push(Output::Reply { session, id, reply });
        self.relieved(caller.session);
    }

    /// Whether a block that is not in host memory now is held nowhere, and was not when the load came.
    fn was_absent(&self, waiting: &Waiting, at: u32) -> bool {
        if waiting.failed.contains(&at) {
            return false;
        }
        let joined = &self.sessions[waiting.session].joined;
        let Some(space) = joined.get(waiting.namespace as usize).map(|j| j.space) else {
            return true;
        };
        let hash = &waiting.hashes[at as usize];
        self.stored_entry(space, waiting.group as u8, hash)
            .is_none()
    }

    /// The session is detached or over: nobody waits for its loads.
    pub(crate) fn end_waits_of(&mut self, session: u32) {
        if self.sessions[session].waits == 0 {
            return;
        }
        let t = self.sessions[session].tenant;
        let own = self.disks.waiting.iter();
        let own: Vec<u64> = own
            .filter(|(_, waiting)| waiting.session == session)
            .map(|(number, _)| *number)
            .collect();
        for number in own {
            if let Some(waiting) = self.take_waiting(number) {
                self.unpin_all(t, &waiting.pins);
            }
        }
    }

    /// Answers loads whose time is up.
    pub(crate) fn waits_due(&mut self, most: usize, out: &mut Vec<Output>) {
        for _ in 0..most {
            let Some((deadline, number)) = self.disks.by_deadline.first().copied() else {
                return;
            };
            if deadline > self.now {
                return;
            }
            self.tier_counters.fetch_late += 1;
            self.answer_waiting(number, out);
        }
    }

    /// A load that can be answered at once, in the form that the step wants.
    pub(crate) fn load(
        &mut self,
        caller: Caller,
        asked: &Asked<'_>,
        out: &mut Vec<Output>,
    ) -> Result<Option<Reply>, Failure> {
        if self.wait_for_stores(caller, asked, out) {
            return Ok(None);
        }
        let reply = self.load_now(caller, asked.namespace, asked.group.into(), asked.hashes)?;
        if self.settings.tiers.offload == OffloadPolicy::SecondUse {
            for (hash, state) in asked.hashes.iter().zip(&reply.states) {
                if *state == LoadState::Ready
                    && let Found::Entry(id) = self.index.find(asked.space, asked.group, hash)
                {
                    self.offload(id, out);
                }
            }
        }
        Ok(Some(Reply::Load(reply)))
    }
}
