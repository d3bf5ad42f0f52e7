//! Coming up: loads of blocks that only a store holds. The blocks are read into host memory, and the load is answered when all
//! of them have come, failed, or its deadline has passed.
//!
//! A block that comes up has a slot that the store alone writes, and an entry that is Filling. Loads of the same block share one
//! read. A read that fails is a failure, never an absence; the block stays known unless its bytes are wrong. Deliberately absent:
//! reads that nobody waits for (`ahead`); telling a load's blocks one by one.

use super::bring::{Coming, Fetcher};
use super::{Disks, Doing, Fetch, Waiting};
use crate::api::{Failure, LoadState, NIL, Output, Reply};
use crate::evict::chain;
use crate::geometry::Cut;
use crate::ids::{RequestId, StoreId};
use crate::index::{Entry, EntryState, Found};
use crate::log::ChangeKind;
use crate::pool::{Pool, SlotState};
use crate::settings::OffloadPolicy;
use crate::state::Core;
use crate::step::Caller;
use crate::tier::{HostRange, ReadBlock, StoreError, StoreOp};

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
    /// The store's entry of a block that is held there, and which store; whether or not that is on.
    pub(crate) fn stored_entry(
        &self,
        space: u32,
        group: u8,
        hash: &[u8; 32],
    ) -> Option<(usize, u32)> {
        let store = self.disks.store_of(hash)?;
        let disk = &self.disks.all[store];
        let number = disk.space(self.spaces.get(space).id)?;
        Some((store, disk.readable(number, group, hash)?))
    }

    /// Begins to bring up what this load needs; true if it has been answered, or will be once that has come.
    fn wait_for_stores(
        &mut self,
        caller: Caller,
        asked: &Asked<'_>,
        out: &mut Vec<Output>,
    ) -> bool {
        if self.disks.all.is_empty() {
            return false;
        }
        let mut waiting = Waiting {
            session: caller.session,
            token: self.sessions[caller.session].token,
            id: asked.id,
            namespace: asked.namespace,
            group: asked.group,
            hashes: Vec::new(),
            left: 0,
            below: Vec::new(),
            pins: Vec::with_capacity(asked.hashes.len()),
            deadline: self.now.saturating_add(self.longest_wait(asked) * 1000),
        };
        self.look_over(caller, asked, &mut waiting);
        if waiting.below.is_empty() {
            self.unpin_all(caller.tenant, &waiting.pins);
            return false;
        }
        let number = self.disks.last_wait + 1;
        self.disks.last_wait = number;
        let room = self.disks.waiting_hashes + asked.hashes.len()
            <= self.settings.tiers.max_waiting_hashes as usize;
        if room {
            self.bring_up(caller, asked, number, &mut waiting, out);
        }
        waiting.hashes = asked.hashes.to_vec();
        if waiting.left == 0 {
            self.answer(waiting, out);
            return true;
        }
        self.disks.waiting_hashes += waiting.hashes.len();
        self.disks.by_deadline.insert((waiting.deadline, number));
        self.sessions[caller.session].waits += 1;
        self.disks.waiting.insert(number, waiting);
        true
    }

    /// How long a load may wait, in milliseconds.
    fn longest_wait(&self, asked: &Asked<'_>) -> u64 {
        let longest = u64::from(self.settings.tiers.max_wait_ms);
        match asked.deadline_ms {
            0 => longest,
            ms => u64::from(ms).min(longest),
        }
    }

    /// Pins what is in host memory, so that nothing of this load makes room for the rest of it, and notes what is below or coming.
    fn look_over(&mut self, caller: Caller, asked: &Asked<'_>, waiting: &mut Waiting) {
        for (at, hash) in (0u32..).zip(asked.hashes) {
            match self.index.find(asked.space, asked.group, hash) {
                Found::Entry(id) if self.index.entries.hot[id].state == EntryState::Resident => {
                    self.pin(caller.tenant, id);
                    waiting.pins.push((id, self.index.entries.side[id].serial));
                }
                _ if self.below_or_coming(asked.space, asked.group, hash) => {
                    if waiting.below.is_empty() {
                        waiting
                            .below
                            .reserve_exact(asked.hashes.len() - at as usize);
                    }
                    waiting.below.push(at);
                }
                _ => {}
            }
        }
    }

    /// Begins reads of what is below, or joins those that are under way.
    fn bring_up(
        &mut self,
        caller: Caller,
        asked: &Asked<'_>,
        number: u64,
        waiting: &mut Waiting,
        out: &mut Vec<Output>,
    ) {
        let mut by = Fetcher::load(caller.tenant);
        let wanted = (asked.space, asked.group);
        for at in &waiting.below {
            match self.bring(&mut by, wanted, &asked.hashes[*at as usize], number, out) {
                Coming::Waits => waiting.left += 1,
                Coming::Again => {}
                Coming::Refused => self.tier_counters.fetch_busy += 1,
            }
        }
    }

    /// Whether the limits of loads allow one more read.
    pub(super) fn may_load(&self, t: usize, store: usize, slot_bytes: u64) -> bool {
        let tenant = &self.tenants[t];
        let usable = tenant.pool.as_ref().map_or(0, Pool::usable_bytes);
        self.disks.all[store].reads < self.settings.tiers.max_reads
            && tenant.coming_bytes + slot_bytes <= usable / 2
    }

    /// Begins to read one block into host memory. Gives its entry there; none if there is no room or too much under way.
    pub(super) fn fetch(
        &mut self,
        by: &mut Fetcher,
        (space, group): (u32, u8),
        hash: &[u8; 32],
        (store, stored): (usize, u32),
        out: &mut Vec<Output>,
    ) -> Option<u32> {
        let t = by.t;
        let namespace = self.spaces.get(space);
        let found = &namespace.groups[usize::from(group)];
        let (class, slot_bytes) = (found.class, found.slot_bytes);
        let allowed = match by.ahead {
            true => self.may_read_ahead(t, class, slot_bytes),
            false => self.may_load(t, store, slot_bytes),
        };
        if !allowed
            || !self.disks.all[store].on
            || self.index.find(space, group, hash) == Found::Crowded
        {
            return None;
        }
        let slot = self.room_to_fetch(by, class, out)?;
        let groups = self.spaces.get(space).record.groups();
        let geometry = groups[usize::from(group)].clone();
        let bytes = geometry.block_bytes();
        let host = self.enter_coming(t, (space, group), hash, (store, stored), slot);
        if by.ahead {
            self.begin_ahead(t, host, slot_bytes);
        } else {
            self.disks.all[store].reads += 1;
            self.tenants[t].coming_bytes += slot_bytes;
        }
        let disk = &mut self.disks.all[store];
        disk.index.entries.hot[stored].pins += 1;
        let place = disk.places.place(disk.index.entries.hot[stored].slot);
        let key = disk.key(stored);
        let op = self.disks.begin(Doing::Read { host });
        let fetch = Fetch {
            store,
            entry: stored,
            t,
            waiters: self.disks.spare.waiters.pop().unwrap_or_default(),
        };
        self.disks.fetches.insert(host.into(), fetch);
        let offset = self.tenants[t]
            .pool
            .as_ref()
            .map_or(0, |pool| pool.offset(slot));
        let into = HostRange {
            tenant: self.tenants[t].id,
            offset,
            bytes,
        };
        let op = StoreOp::Read {
            op,
            from: place,
            into,
            key,
            block: self.disks.spare.block_for(geometry),
        };
        let store = StoreId(store as u8);
        out.push(Output::Store { store, op });
        Some(host)
    }

    /// A slot for a block that comes up, and a place in the index.
    fn room_to_fetch(
        &mut self,
        by: &mut Fetcher,
        class: u16,
        out: &mut Vec<Output>,
    ) -> Option<u32> {
        while self.index.len() >= self.settings.max_entries as usize {
            if !self.make_room(by.t, class, &mut by.others, out) {
                return None;
            }
        }
        self.room_for(by.t, class, &mut by.others, out)
    }

    /// The entry in the host's index of a block that comes up.
    fn enter_coming(
        &mut self,
        t: usize,
        (space, group): (u32, u8),
        hash: &[u8; 32],
        (store, stored): (usize, u32),
        slot: u32,
    ) -> u32 {
        let entries = &self.disks.all[store].index.entries;
        let parent = entries.parent(stored).map(|id| entries.hot[id].hash);
        let entry = Entry {
            hash: *hash,
            space,
            slot,
            parent: NIL,
            stamp: self.stamp,
            crcs: NIL,
            group,
            state: EntryState::Filling,
            ..Entry::default()
        };
        let id = self.index.insert(entry, 0);
        let namespace = self.spaces.get_mut(space);
        namespace.coming += 1;
        let class = namespace.groups[usize::from(group)].class;
        if let Some(pool) = &mut self.tenants[t].pool {
            if let Some(parent) = parent
                && let Found::Entry(parent) = self.index.find(space, group, &parent)
            {
                let policy = &mut *pool.classes[usize::from(class)].policy;
                chain::gains_child(policy, &mut self.index.entries, parent);
                self.index.entries.adopt(id, parent);
            }
            pool.set_owner(slot, NIL, self.stamp);
        }
        id
    }

    /// A store is off: its device may never answer. Nobody waits for its reads any more, and their blocks can be stored anew; their
    /// slots are nobody's until they are over.
    pub(super) fn leave_reads(&mut self, store: usize, out: &mut Vec<Output>) {
        let Disks { doing, fetches, .. } = &mut self.disks;
        let mut hosts = Vec::new();
        for doing in doing.values_mut() {
            if let Doing::Read { host } = *doing
                && let Some(fetch) = fetches
                    .get(host.into())
                    .filter(|fetch| fetch.store == store)
            {
                let slot = self.index.entries.hot[host].slot;
                *doing = Doing::Left { t: fetch.t, slot };
                hosts.push(host);
            }
        }
        for host in hosts {
            self.read_over(host, None, Err(StoreError::Lost), out);
        }
    }

    /// A read that nobody waits for is over.
    pub(super) fn left_over(&mut self, t: usize, slot: u32, out: &mut Vec<Output>) {
        self.tenants[t].left_slots -= 1;
        if let Some(pool) = &mut self.tenants[t].pool {
            pool.release(slot, out);
        }
    }

    /// A read is over; or `Lost`, and its slot stays taken.
    pub(super) fn read_over(
        &mut self,
        host: u32,
        block: Option<&ReadBlock>,
        result: Result<(), StoreError>,
        out: &mut Vec<Output>,
    ) {
        let Some(mut fetch) = self.disks.fetches.remove(host.into()) else {
            return;
        };
        let stored = &mut self.disks.all[fetch.store].index.entries;
        stored.hot[fetch.entry].pins -= 1;
        let (space, group) = {
            let entry = &self.index.entries.hot[host];
            (entry.space, entry.group)
        };
        let namespace = self.spaces.get_mut(space);
        namespace.coming -= 1;
        let slot_bytes = namespace.groups[usize::from(group)].slot_bytes;
        if self.index.entries.side[host].ahead {
            self.tenants[fetch.t].ahead_reads -= 1;
        } else {
            self.disks.all[fetch.store].reads -= 1;
            self.tenants[fetch.t].coming_bytes -= slot_bytes;
        }
        let left = matches!(result, Err(StoreError::Lost));
        // A box that comes back as it went down says nothing of the block.
        let told = block.filter(|block| block.crcs.len() == block.cut.crc_count() as usize);
        let came = match result.and_then(|()| told.ok_or(StoreError::Io)) {
            Ok(block) => self.came(host, &fetch, &block.cut, &block.crcs, out),
            Err(error) => {
                let failed = &mut self.tier_counters.fetch_failed;
                *match error {
                    StoreError::Corrupt => &mut failed.corrupt,
                    StoreError::Io => &mut failed.io,
                    StoreError::Off | StoreError::Lost => &mut failed.off,
                } += 1;
                if error == StoreError::Corrupt {
                    self.drop_stored(fetch.store, fetch.entry, false, out);
                }
                false
            }
        };
        if !came || !fetch.waiters.is_empty() {
            self.end_ahead(host);
        }
        if !came {
            self.did_not_come(host, fetch.t, left, out);
        }
        for number in fetch.waiters.drain(..) {
            self.came_for(number, came.then_some(host), out);
        }
        self.disks.spare.waiters.push(fetch.waiters);
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

    /// A block could not be had: its slot is free again; or nobody's, if the device may still write there (invariant 3).
    fn did_not_come(&mut self, host: u32, t: usize, left: bool, out: &mut Vec<Output>) {
        let (space, group, slot) = {
            let entry = &self.index.entries.hot[host];
            (entry.space, entry.group, entry.slot)
        };
        let class = self.spaces.get(space).groups[usize::from(group)].class;
        let tenant = &mut self.tenants[t];
        if let Some(pool) = &mut tenant.pool {
            let policy = &mut *pool.classes[usize::from(class)].policy;
            chain::leaves(policy, &mut self.index.entries, host, false);
            if left {
                pool.set_state(slot, SlotState::Quarantined, NIL, out);
                tenant.left_slots += 1;
            } else {
                pool.release(slot, out);
            }
        }
        self.index.remove(host);
    }

    /// Tells one waiting load of one of its blocks: its host entry, if it came.
    pub(super) fn came_for(&mut self, number: u64, host: Option<u32>, out: &mut Vec<Output>) {
        let Some(waiting) = self.disks.waiting.get_mut(&number) else {
            return;
        };
        waiting.left -= 1;
        let left = waiting.left;
        if let Some(host) = host {
            let serial = self.index.entries.side[host].serial;
            waiting.pins.push((host, serial));
            let t = self.sessions[waiting.session].tenant;
            self.pin(t, host);
        }
        if left == 0 {
            self.answer_waiting(number, out);
        }
    }

    /// Takes a waiting load out of everything that knows of it.
    fn take_waiting(&mut self, number: u64) -> Option<Waiting> {
        let waiting = self.disks.waiting.remove(&number)?;
        self.disks.by_deadline.remove(&(waiting.deadline, number));
        self.disks.waiting_hashes -= waiting.hashes.len();
        self.sessions[waiting.session].waits -= 1;
        if waiting.left > 0 {
            for fetch in self.disks.fetches.values_mut() {
                fetch.waiters.retain(|waiter| *waiter != number);
            }
        }
        Some(waiting)
    }

    fn unpin_all(&mut self, t: usize, pins: &[(u32, u32)]) {
        for (id, serial) in pins {
            self.unpin(t, *id, *serial);
        }
    }

    fn answer_waiting(&mut self, number: u64, out: &mut Vec<Output>) {
        if let Some(waiting) = self.take_waiting(number) {
            self.answer(waiting, out);
        }
    }

    /// Whether a store holds the block, or it is on its way up from there.
    fn below_or_coming(&self, space: u32, group: u8, hash: &[u8; 32]) -> bool {
        let coming = match self.index.find(space, group, hash) {
            Found::Entry(id) => self.disks.fetches(id),
            _ => false,
        };
        coming || self.stored_entry(space, group, hash).is_some()
    }

    /// Answers a load with what is in host memory by now. What was below or coming when the load came, or is now, and is not here,
    /// has failed: it is not absent.
    fn answer(&mut self, waiting: Waiting, out: &mut Vec<Output>) {
        let session = waiting.session;
        let tenant = self.sessions[session].tenant;
        // Nothing is evicted before the leases that follow.
        self.unpin_all(tenant, &waiting.pins);
        let caller = Caller {
            session,
            tenant,
            instance: self.sessions[session].instance,
        };
        let reply = self.load_now(
            caller,
            waiting.namespace,
            waiting.group.into(),
            &waiting.hashes,
        );
        let reply = reply.map(|mut reply| {
            self.fail_what_is_below(&waiting, &mut reply.states);
            Reply::Load(reply)
        });
        let reply = Box::new(reply.unwrap_or_else(Reply::Failure));
        let (session, id) = (waiting.token, waiting.id);
        out.push(Output::Reply { session, id, reply });
        self.relieved(caller.session);
    }

    fn fail_what_is_below(&mut self, waiting: &Waiting, states: &mut [LoadState]) {
        let joined = &self.sessions[waiting.session].joined;
        let space = joined.get(waiting.namespace as usize);
        let space = space.map(|joined| joined.space);
        for (at, (state, hash)) in (0u32..).zip(states.iter_mut().zip(&waiting.hashes)) {
            let below = |space| self.below_or_coming(space, waiting.group, hash);
            let held = waiting.below.binary_search(&at).is_ok() || space.is_some_and(below);
            if *state == LoadState::Absent && held {
                *state = LoadState::Failed;
                self.counters.load_absent -= 1;
                self.counters.load_failed.below += 1;
            }
        }
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
