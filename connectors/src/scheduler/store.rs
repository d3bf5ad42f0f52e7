//! Stores: from a full block in the engine to a reservation. What comes of that: `orders`.
//!
//! Reserve -> (reply) -> order -> (reports of all ranks). A running request's blocks are reserved as they fill; a finished
//! request's last blocks likewise, while the engine holds them for us, for a bounded time.

use bytes::Bytes;
use kvd_wire::session::{Chain, Reserve, request::Body};

use super::Scheduler;
use super::namespaces::Standing;
use super::port::Port;
use super::request::{
    Blocks, Kept, Leaving, Part, Reservation, Tail, count, count_held, held_blocks,
};

/// Most requests that wait to be sent: the port's queue is finite, and its thread wakes in the time that the next ones take.
const UNSENT_MOST: u32 = 256;

/// What is asked for in one request.
#[derive(Default)]
struct Wanted {
    parts: Vec<Part>,
    /// With it so many more blocks of these groups are dealt with.
    ends: Vec<(u32, u32)>,
}

impl<P: Port> Scheduler<P> {
    /// Whether a reservation can be sent at all now.
    pub(crate) fn can_reserve(&self, now: u64) -> bool {
        self.port.connected()
            && !self.silence.lasts()
            && now >= self.no_room_until
            && self.in_flight < self.settings.max_in_flight
    }

    /// Blocks of a running request that are full: of each KV-cache group their hashes (32 bytes each) and the engine's numbers, from the
    /// block that [`Scheduler::begin_step`] said. One more hash in front is that of the block before them: the daemon keeps chains
    /// together by it. And `states`, which the engine may give up any time: the group, the hash (32 bytes) to store it under, the block.
    /// Slots are asked for, as a rule in one request.
    ///
    /// The engine must keep the blocks that are returned, whatever becomes of the request, until [`Scheduler::released`] has said
    /// them.
    pub fn capture<'a>(
        &mut self,
        now: u64,
        id: &str,
        full: impl IntoIterator<Item = (u32, Bytes, Vec<u32>)>,
        states: impl IntoIterator<Item = (u32, &'a [u8], u32)>,
    ) -> Vec<u32> {
        let mut kept = Vec::new();
        if !self.capturable(id) {
            return kept;
        }
        let mut wanted = Wanted::default();
        for (group, hashes, blocks) in full {
            let Some(rule) = self.settings.groups.get(group as usize) else {
                continue;
            };
            let alone = rule.stands_alone();
            let mut room = self.settings.max_in_flight.saturating_sub(self.in_flight);
            room = room
                .saturating_sub(count(&wanted.parts))
                .min(self.settings.batch);
            let mut all = Blocks::new(hashes, blocks);
            let end = if alone {
                // What does not fit is left out for good: these blocks go with their step. Hits end at the end of it rather than before.
                room = room.min(self.room_to_hold(count_held(&wanted.parts)));
                let end = all.len() as u32;
                all = all.without_gaps();
                all.split_front(all.len().saturating_sub(room as usize));
                end
            } else {
                if all.len() > room as usize {
                    all = all.split_front(room as usize);
                }
                all.len() as u32
            };
            self.make_room(now, id, &mut wanted, all.len(), &mut kept);
            wanted.ends.push((group, end));
            if all.len() > 0 {
                wanted.parts.push(Part {
                    group,
                    blocks: all,
                    kept: match alone {
                        true => Kept::ByEngine,
                        false => Kept::ByRequest,
                    },
                });
            }
        }
        for (group, hash, block) in states {
            let room = self.in_flight + count(&wanted.parts) < self.settings.max_in_flight
                && self.held_for_copies() + count_held(&wanted.parts) < self.settings.max_held
                && self.settings.groups.len() > group as usize;
            if room && block != 0 && !self.is_silent(now) {
                self.make_room(now, id, &mut wanted, 1, &mut kept);
                wanted.parts.push(Part {
                    group,
                    blocks: Blocks::new(Bytes::copy_from_slice(hash), vec![block]),
                    kept: Kept::ByEngine,
                });
            }
        }
        self.take(now, id, wanted, &mut kept);
        kept
    }

    /// Asks for what is wanted, if so many blocks more would be too many for one request.
    fn make_room(
        &mut self,
        now: u64,
        id: &str,
        wanted: &mut Wanted,
        more: usize,
        kept: &mut Vec<u32>,
    ) {
        if count(&wanted.parts) + more as u32 > self.settings.batch {
            self.take(now, id, std::mem::take(wanted), kept);
        }
    }

    /// Asks for slots, and adds those blocks that the engine must keep.
    fn take(&mut self, now: u64, id: &str, wanted: Wanted, kept: &mut Vec<u32>) {
        let Wanted { parts, ends } = wanted;
        let before = kept.len();
        kept.extend(held_blocks(&parts));
        if self.reserve(now, id, parts).is_err() {
            return kept.truncate(before);
        }
        if let Some(request) = self.requests.get_mut(id) {
            for (group, count) in ends {
                request.next[group as usize] += count;
            }
        }
    }

    /// How many more blocks of one group the engine may keep for us, beside so many that it will: every group that outgrows its blocks
    /// has a share.
    fn room_to_hold(&self, beside: u32) -> u32 {
        let groups = self
            .settings
            .groups
            .iter()
            .filter(|rule| rule.stands_alone());
        let share = self.settings.max_held / groups.count().max(1) as u32;
        let held = self.held_for_copies() + beside;
        let left = self.settings.max_held.saturating_sub(held);
        left.min(share.max(1))
    }

    fn capturable(&self, id: &str) -> bool {
        let request = self.requests.get(id);
        request.is_some_and(|request| request.leaving == Leaving::No && self.may_store(request))
    }

    /// Asks for slots, with the step's end at the latest. Gives the blocks back when that is not possible now.
    fn reserve(&mut self, now: u64, id: &str, parts: Vec<Part>) -> Result<(), Vec<Part>> {
        let Some(request) = self.requests.get(id) else {
            return Ok(());
        };
        if parts.is_empty() {
            return Ok(());
        }
        let adapter = request.adapter.clone();
        let Standing::Ready { index, name } = self.standing(&adapter) else {
            return Err(parts);
        };
        if !self.ranks_ready(index) || !self.can_reserve(now) {
            return Err(parts);
        }
        let chains = parts.iter().map(|part| Chain {
            group: part.group,
            hashes: part.blocks.hashes.clone(),
            parent: part.blocks.parent.clone(),
        });
        let body = Body::Reserve(Reserve {
            namespace: name.namespace,
            chains: chains.collect(),
        });
        let Ok(ticket) = self.port.queue_on(&name, body) else {
            return Err(parts);
        };
        self.queued();
        let blocks = count(&parts);
        self.counters.reserves += 1;
        self.counters.reserve_blocks += u64::from(blocks);
        self.in_flight += blocks;
        self.held += count_held(&parts);
        let epochs = self.ranks.iter().map(|rank| rank.epoch).collect();
        if let Some(request) = self.requests.get_mut(id) {
            request.reservations.push_back(Reservation {
                ticket,
                namespace: index,
                parts,
                since: now,
                step: self.steps,
                epochs,
                incarnation: name.incarnation,
            });
        }
        self.list(id);
        Ok(())
    }

    /// A request waits to be sent, which the end of the step does.
    pub(crate) fn queued(&mut self) {
        self.unsent += 1;
        if self.unsent >= UNSENT_MOST {
            self.unsent = 0;
            self.port.wake();
        }
    }

    /// Queues a request whose reply nobody waits for. Whether that was possible.
    pub(crate) fn forget(&mut self, body: Body) -> bool {
        let taken = self.port.queue_and_forget(body).is_ok();
        if taken {
            self.queued();
        }
        taken
    }

    /// Sends what was queued.
    pub(crate) fn send(&mut self) {
        if std::mem::take(&mut self.unsent) > 0 {
            self.port.wake_soon();
        }
    }

    /// With no request left the engine may not step again for long.
    pub(crate) fn send_if_last(&mut self) {
        if self.requests.is_empty() {
            self.send();
        }
    }

    /// So many blocks are reserved or being copied no more.
    pub(crate) fn flew(&mut self, blocks: u32) {
        debug_assert!(self.in_flight >= blocks, "more blocks land than flew");
        self.in_flight = self.in_flight.saturating_sub(blocks);
    }

    fn list(&mut self, id: &str) {
        if let Some(request) = self.requests.get_mut(id)
            && !request.listed
        {
            request.listed = true;
            self.listed.push(id.to_owned());
        }
    }

    /// Of which groups, and from which block on, a finished request's blocks are wanted by [`Scheduler::last_blocks`], given that so
    /// many tokens are computed.
    pub fn finish_from(&mut self, now: u64, id: &str, computed: u32) -> Vec<(u32, u32)> {
        let Some(request) = self.requests.get(id) else {
            return Vec::new();
        };
        let groups = (0..).zip(self.settings.groups.iter().zip(&request.next));
        let wanted: Vec<(u32, u32)> = groups
            .filter(|(group, (rule, next))| {
                computed / rule.span() > **next && !self.settings.offered.contains(group)
            })
            .map(|(group, (_, next))| (group, *next))
            .collect();
        let able = !wanted.is_empty()
            && request.ran
            && !request.loading
            && self.may_store(request)
            && now >= self.no_room_until
            && !self.silence.lasts();
        let adapter = request.adapter.clone();
        match able && self.standing(&adapter) != Standing::Not {
            true => wanted,
            false => Vec::new(),
        }
    }

    /// A request that is about to be [`Scheduler::finished`]: `hashes` and `blocks` of a KV-cache group's last full blocks, from the
    /// block that [`Scheduler::finish_from`] said, with one more hash in front as in [`Scheduler::capture`].
    pub fn last_blocks(
        &mut self,
        id: &str,
        group: u32,
        hashes: impl Into<Bytes>,
        blocks: impl Into<Vec<u32>>,
    ) {
        let Some(rule) = self.settings.groups.get(group as usize) else {
            return;
        };
        let mut blocks = Blocks::new(hashes.into(), blocks.into());
        if rule.stands_alone() {
            blocks = blocks.without_gaps();
        }
        if let Some(request) = self.requests.get_mut(id)
            && blocks.len() > 0
        {
            request.tails.push_back(Tail { group, blocks });
        }
    }

    /// The engine is through with a request.
    ///
    /// True: it must hold the request's blocks until the workers report it as sent, which they will do exactly once.
    pub fn finished(&mut self, now: u64, id: &str) -> bool {
        self.give_back_lease(id);
        let Some(request) = self.requests.get_mut(id) else {
            return false;
        };
        // While it loads, the engine holds the blocks until that is reported, by a rule of its own.
        if request.loading || (!request.has_pending() && request.orders == 0) {
            self.requests.remove(id);
            self.send_if_last();
            return false;
        }
        request.leaving = Leaving::Held { since: now };
        self.counters.held += 1;
        self.list(id);
        self.push_tail(now, id);
        true
    }

    /// Asks for slots for the last blocks of finished requests.
    pub(crate) fn push_tails(&mut self, now: u64) {
        for at in 0..self.listed.len() {
            let id = self.listed[at].clone();
            self.push_tail(now, &id);
        }
    }

    fn push_tail(&mut self, now: u64, id: &str) {
        loop {
            let room = self.settings.max_in_flight.saturating_sub(self.in_flight);
            let mut room = room.min(self.settings.batch) as usize;
            let epoch = self.namespaces.epoch();
            let Some(request) = self.requests.get_mut(id) else {
                return;
            };
            if !request.may_store(epoch) {
                // The weights may be others than those it was computed with.
                request.tails.clear();
            }
            let mut parts = Vec::new();
            while let Some(tail) = request.tails.front_mut().filter(|_| room > 0) {
                let (group, blocks) = (tail.group, tail.blocks.split_front(room));
                room -= blocks.len();
                if tail.blocks.len() == 0 {
                    request.tails.pop_front();
                }
                parts.push(Part {
                    group,
                    blocks,
                    kept: Kept::ByRequest,
                });
            }
            if parts.is_empty() {
                return;
            }
            if let Err(parts) = self.reserve(now, id, parts) {
                if let Some(request) = self.requests.get_mut(id) {
                    // It does not matter that a tail may be in two pieces now: the daemon finds the one by the hash before the other.
                    for Part { group, blocks, .. } in parts.into_iter().rev() {
                        request.tails.push_front(Tail { group, blocks });
                    }
                }
                return;
            }
        }
    }

    /// Tells the workers which requests to report: all slots are there (or given up), so no further order will come.
    pub(crate) fn tell_finished(&mut self, now: u64) {
        let no_hope = !self.port.connected() || now < self.no_room_until || self.silence.lasts();
        let mut silent = false;
        for at in 0..self.listed.len() {
            let id = self.listed[at].clone();
            let Some(request) = self.requests.get_mut(&id) else {
                continue;
            };
            let Leaving::Held { since } = request.leaving else {
                continue;
            };
            let late = now.saturating_sub(since) >= self.settings.hold_deadline;
            if late && request.has_pending() {
                self.counters.hold_timeouts += 1;
                silent |= !request.reservations.is_empty();
            }
            let (mut asked, mut held) = (0, Vec::new());
            if late || no_hope {
                (asked, held) = request.give_up_reservations();
                request.tails.clear();
            }
            if !request.has_pending() {
                request.leaving = Leaving::Told;
                self.meta.finish.push(id);
            }
            self.flew(asked);
            self.let_go(held);
        }
        if silent {
            self.daemon_silent(now, None);
        }
    }
}
