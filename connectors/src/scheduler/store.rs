//! Stores: from a full block in the engine to the ranks' reports that it has been copied.
//!
//! Reserve -> (reply) -> order -> (reports of all ranks). A running request's blocks are reserved as they fill; a finished
//! request's last blocks likewise, while the engine holds them for us, for a bounded time.

use bytes::Bytes;
use kvd_wire::session::{Chain, Reserve, ReserveReply, ReserveState, reply, request::Body};

use super::Scheduler;
use super::namespaces::Standing;
use super::port::{Fault, Port};
use super::request::{Blocks, Leaving, Reservation, Tail};
use crate::HASH_BYTES;
use crate::meta::StoreOrder;

/// For how long (us) nothing is reserved after the daemon had no room.
const NO_ROOM_PAUSE: u64 = 100_000;
/// Most requests that wait to be sent: the port's queue is finite, and its thread wakes in the time that the next ones take.
const UNSENT_MOST: u32 = 256;

/// An order that not all ranks have reported.
#[derive(Debug)]
pub(crate) struct OpenOrder {
    request: String,
    blocks: u32,
    ranks: u32,
    /// Blocks that the engine keeps for it.
    held: Vec<u32>,
}

impl<P: Port> Scheduler<P> {
    /// Whether a reservation can be sent at all now.
    pub(crate) fn can_reserve(&self, now: u64) -> bool {
        self.port.connected()
            && !self.silence.lasts()
            && now >= self.no_room_until
            && self.in_flight < self.settings.max_in_flight
    }

    /// Blocks of a running request's KV-cache group that are full: their hashes (32 bytes each) and the engine's numbers, from the
    /// block that [`Scheduler::begin_step`] said. One more hash in front is that of the block before them: the daemon keeps chains
    /// together by it. Slots are asked for.
    ///
    /// The engine must keep the blocks that are returned, whatever becomes of the request, until [`Scheduler::released`] has said
    /// them.
    pub fn capture(
        &mut self,
        now: u64,
        id: &str,
        group: u32,
        hashes: impl Into<Bytes>,
        blocks: impl Into<Vec<u32>>,
    ) -> Vec<u32> {
        let Some(rule) = self.settings.groups.get(group as usize) else {
            return Vec::new();
        };
        let alone = rule.stands_alone();
        let mut room = self.settings.max_in_flight.saturating_sub(self.in_flight);
        room = room.min(self.settings.batch);
        let mut all = Blocks::new(hashes.into(), blocks.into());
        let (taken, count) = if alone {
            // What does not fit is left out for good: these blocks go with their step. Hits end at the end of it rather than before.
            room = room.min(self.room_to_hold());
            let count = all.len() as u32;
            let mut taken = all.without_gaps();
            taken.split_front(taken.len().saturating_sub(room as usize));
            (taken, count)
        } else {
            let taken = all.split_front(room as usize);
            let count = taken.len() as u32;
            (taken, count)
        };
        let held = match alone {
            true => taken.blocks.clone(),
            false => Vec::new(),
        };
        if !self.capturable(id) || self.reserve(now, id, group, taken, alone).is_err() {
            return Vec::new();
        }
        if let Some(request) = self.requests.get_mut(id) {
            request.next[group as usize] += count;
        }
        held
    }

    /// A block of a running request that holds its state at the end of a block, to be stored under that hash (32 bytes). The
    /// engine may give it up any time: it must keep it as with [`Scheduler::capture`], if it is returned.
    pub fn capture_state(
        &mut self,
        now: u64,
        id: &str,
        group: u32,
        hash: &[u8],
        block: u32,
    ) -> Vec<u32> {
        let blocks = Blocks::new(Bytes::copy_from_slice(hash), vec![block]).without_gaps();
        let held = blocks.blocks.clone();
        let room = self.in_flight < self.settings.max_in_flight
            && self.held < self.settings.max_held
            && self.settings.groups.len() > group as usize;
        if !room || !self.capturable(id) || self.is_silent(now) {
            return Vec::new();
        }
        match self.reserve(now, id, group, blocks, true) {
            Ok(()) => held,
            Err(_) => Vec::new(),
        }
    }

    /// How many more blocks of one group the engine may keep for us: every group that outgrows its blocks has a share.
    fn room_to_hold(&self) -> u32 {
        let groups = self
            .settings
            .groups
            .iter()
            .filter(|rule| rule.stands_alone());
        let share = self.settings.max_held / groups.count().max(1) as u32;
        let left = self.settings.max_held.saturating_sub(self.held);
        left.min(share.max(1))
    }

    fn capturable(&self, id: &str) -> bool {
        let request = self.requests.get(id);
        request.is_some_and(|request| request.leaving == Leaving::No && self.may_store(request))
    }

    /// Asks for slots, with the step's end at the latest. Gives the blocks back when that is not possible now. `held`: the engine keeps
    /// the blocks until it is told.
    fn reserve(
        &mut self,
        now: u64,
        id: &str,
        group: u32,
        blocks: Blocks,
        held: bool,
    ) -> Result<(), Blocks> {
        let Some(request) = self.requests.get(id) else {
            return Ok(());
        };
        if blocks.len() == 0 {
            return Ok(());
        }
        let adapter = request.adapter.clone();
        let Standing::Ready { index, name } = self.standing(&adapter) else {
            return Err(blocks);
        };
        if !self.ranks_ready(index) || !self.can_reserve(now) {
            return Err(blocks);
        }
        let body = Body::Reserve(Reserve {
            namespace: name.namespace,
            chain: Some(Chain {
                group,
                hashes: blocks.hashes.clone(),
                parent: blocks.parent.clone(),
            }),
        });
        let Ok(ticket) = self.port.queue_on(&name, body) else {
            return Err(blocks);
        };
        self.queued();
        self.counters.reserves += 1;
        self.counters.reserve_blocks += blocks.len() as u64;
        self.in_flight += blocks.len() as u32;
        self.held += if held { blocks.len() as u32 } else { 0 };
        let epochs = self.ranks.iter().map(|rank| rank.epoch).collect();
        if let Some(request) = self.requests.get_mut(id) {
            request.reservations.push_back(Reservation {
                ticket,
                namespace: index,
                group,
                blocks,
                held,
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

    /// Turns the replies that have come into orders.
    pub(crate) fn collect_reservations(&mut self, now: u64) {
        for id in std::mem::take(&mut self.listed) {
            self.collect_of(now, &id);
            if let Some(request) = self.requests.get_mut(&id) {
                request.listed = false;
                if request.has_pending() || request.leaving != Leaving::No {
                    request.listed = true;
                    self.listed.push(id);
                }
            }
        }
    }

    fn collect_of(&mut self, now: u64, id: &str) {
        loop {
            let Some(request) = self.requests.get_mut(id) else {
                return;
            };
            let Some(first) = request.reservations.front_mut() else {
                return;
            };
            // What the engine keeps for us is right when its step is wholly over: with drafts, states move once tokens are accepted,
            // which may be after this step's stores begin.
            if first.held && first.step == self.steps {
                return;
            }
            let answer = self.port.poll(&mut first.ticket);
            // The engine's blocks are not kept for a daemon that takes its time. Of a finished request see `tell_finished`.
            let late = first.held
                && request.leaving == Leaving::No
                && now.saturating_sub(first.since) >= self.settings.hold_deadline;
            if answer.is_none() && !late {
                return;
            }
            let Some(reservation) = request.reservations.pop_front() else {
                return;
            };
            let Some(answer) = answer else {
                self.counters.hold_timeouts += 1;
                self.reservation_lost(reservation);
                continue;
            };
            match answer {
                Ok(reply::Body::Reserve(reply)) => {
                    self.daemon_spoke();
                    self.order(now, id, reservation, reply);
                }
                Ok(_) => self.reservation_lost(reservation),
                Err(fault) => {
                    self.reservation_lost(reservation);
                    if let Fault::Refused(text) = fault {
                        self.notices
                            .warn(format!("a reservation was refused: {text}"));
                    }
                }
            }
        }
    }

    fn reservation_lost(&mut self, reservation: Reservation<P::Ticket>) {
        self.flew(reservation.blocks.len() as u32);
        self.counters.failed_blocks += reservation.blocks.len() as u64;
        if reservation.held {
            self.let_go(reservation.blocks.blocks);
        }
    }

    fn order(
        &mut self,
        now: u64,
        id: &str,
        reservation: Reservation<P::Ticket>,
        reply: ReserveReply,
    ) {
        let asked = reservation.blocks.len();
        let blocks = &reservation.blocks;
        let all = reply.states.len() == asked
            && (reply.states.iter()).all(|state| *state == ReserveState::Reserved as i32);
        // As a rule all blocks get slots, or none does.
        let (hashes, blocks) = match all {
            true => (blocks.hashes.clone(), blocks.blocks.clone()),
            false => self.reserved(now, blocks, &reply.states),
        };
        let slots = reply.slots.len().min(reply.generations.len());
        let count = blocks.len().min(slots).min(reply.offsets.len());
        let mut order = StoreOrder {
            order: self.next_order,
            request: id.to_owned(),
            namespace: reservation.namespace,
            group: reservation.group,
            epochs: reservation.epochs,
            incarnation: reservation.incarnation.to_vec(),
            hashes: match self.namespaces.replicated(reservation.group) {
                true => hashes.slice(..count * HASH_BYTES),
                false => Bytes::new(),
            },
            blocks,
            slots: reply.slots,
            generations: reply.generations,
            offsets: reply.offsets,
        };
        order.blocks.truncate(count);
        order.slots.truncate(count);
        order.generations.truncate(count);
        order.offsets.truncate(count);
        let count = count as u32;
        self.flew(asked as u32 - count);
        let mut held = Vec::new();
        if reservation.held {
            // What gets no slot is not copied. The ordered ones are in the same order.
            let mut ordered = order.blocks.iter().peekable();
            let all = reservation.blocks.blocks.into_iter();
            let rest = all.filter(|block| ordered.next_if_eq(&block).is_none());
            let rest: Vec<u32> = rest.collect();
            self.let_go(rest);
            held = order.blocks.clone();
        }
        if count == 0 {
            return;
        }
        self.next_order += 1;
        self.counters.orders += 1;
        self.counters.ordered_blocks += u64::from(count);
        self.orders.insert(
            order.order,
            OpenOrder {
                request: order.request.clone(),
                blocks: count,
                ranks: self.ranks.len() as u32,
                held,
            },
        );
        self.meta.stores.push(order);
        if let Some(request) = self.requests.get_mut(id) {
            request.orders += 1;
        }
    }

    /// The blocks that have got slots, and their hashes. The others are counted.
    fn reserved(&mut self, now: u64, blocks: &Blocks, states: &[i32]) -> (Bytes, Vec<u32>) {
        let (all, _) = blocks.hashes.as_chunks::<HASH_BYTES>();
        let (mut hashes, mut numbers) = (Vec::new(), Vec::new());
        for (state, (hash, block)) in states.iter().zip(all.iter().zip(&blocks.blocks)) {
            match ReserveState::try_from(*state) {
                Ok(ReserveState::Reserved) => {
                    hashes.extend_from_slice(hash);
                    numbers.push(*block);
                }
                Ok(ReserveState::Present) => self.counters.present_blocks += 1,
                Ok(ReserveState::Filling) => self.counters.filling_blocks += 1,
                Ok(ReserveState::NoSpace) => {
                    self.counters.no_space_blocks += 1;
                    self.no_room_until = now + NO_ROOM_PAUSE;
                }
                Err(_) => self.counters.failed_blocks += 1,
            }
        }
        (hashes.into(), numbers)
    }

    /// A rank is done with an order.
    pub(crate) fn order_done(&mut self, order: u64) {
        let Some(open) = self.orders.get_mut(&order) else {
            return;
        };
        open.ranks = open.ranks.saturating_sub(1);
        if open.ranks > 0 {
            return;
        }
        if let Some(open) = self.orders.remove(&order) {
            self.flew(open.blocks);
            self.let_go(open.held);
            self.counters.done_blocks += u64::from(open.blocks);
            if let Some(request) = self.requests.get_mut(&open.request) {
                request.orders = request.orders.saturating_sub(1);
            }
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
            let count = room.min(self.settings.batch) as usize;
            let epoch = self.namespaces.epoch();
            let Some(request) = self.requests.get_mut(id) else {
                return;
            };
            if !request.may_store(epoch) {
                // The weights may be others than those it was computed with.
                request.tails.clear();
            }
            let Some(tail) = request.tails.front_mut().filter(|_| count > 0) else {
                return;
            };
            let group = tail.group;
            let front = tail.blocks.split_front(count);
            if tail.blocks.len() == 0 {
                request.tails.pop_front();
            }
            if let Err(blocks) = self.reserve(now, id, group, front, false) {
                if let Some(request) = self.requests.get_mut(id) {
                    // It does not matter that a tail may be in two pieces now.
                    request.tails.push_front(Tail { group, blocks });
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
