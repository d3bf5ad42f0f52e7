//! Stores: from a full block in the engine to the ranks' reports that it has been copied.
//!
//! Reserve -> (reply) -> order -> (reports of all ranks). A running request's blocks are reserved as they fill; a finished
//! request's last blocks likewise, while the engine holds them for us, for a bounded time.

use kvd_wire::session::{Chain, Reserve, ReserveReply, ReserveState, reply, request::Body};

use super::Scheduler;
use super::namespaces::Standing;
use super::port::{Fault, Port};
use super::request::{Blocks, Leaving, Reservation};
use crate::HASH_BYTES;
use crate::meta::StoreOrder;

/// For how long (us) nothing is reserved after the daemon had no room.
const NO_ROOM_PAUSE: u64 = 100_000;

/// An order that not all ranks have reported.
#[derive(Debug)]
pub(crate) struct OpenOrder {
    request: String,
    blocks: u32,
    ranks: u32,
}

impl<P: Port> Scheduler<P> {
    /// Whether a reservation can be sent at all now.
    pub(crate) fn can_reserve(&self, now: u64) -> bool {
        self.port.connected()
            && !self.silence.lasts()
            && now >= self.no_room_until
            && self.in_flight < self.settings.max_in_flight
    }

    /// Blocks of a running request that are full: their hashes (32 bytes each) and the engine's numbers, from the block that
    /// [`Scheduler::begin_step`] said. One more hash in front is that of the block before them: the daemon keeps chains
    /// together by it. Slots are asked for.
    pub fn capture(&mut self, now: u64, id: &str, hashes: &[u8], blocks: &[u32]) {
        let Some(request) = self.requests.get(id) else {
            return;
        };
        if request.leaving != Leaving::No || !self.may_store(request) {
            return;
        }
        let room = self.settings.max_in_flight.saturating_sub(self.in_flight);
        let mut all = Blocks::new(hashes, blocks);
        let taken = all.split_front(self.settings.batch.min(room) as usize);
        let count = taken.len();
        if self.reserve(now, id, taken).is_ok()
            && let Some(request) = self.requests.get_mut(id)
        {
            request.next += count as u32;
        }
    }

    /// Asks for slots. Gives the blocks back when that is not possible now.
    fn reserve(&mut self, now: u64, id: &str, blocks: Blocks) -> Result<(), Blocks> {
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
                group: 0,
                hashes: blocks.hashes.clone().into(),
                parent: blocks.parent.clone().into(),
            }),
        });
        let Ok(ticket) = self.port.submit_on(&name, body) else {
            return Err(blocks);
        };
        self.counters.reserves += 1;
        self.counters.reserve_blocks += blocks.len() as u64;
        self.in_flight += blocks.len() as u32;
        let epochs = self.ranks.iter().map(|rank| rank.epoch).collect();
        if let Some(request) = self.requests.get_mut(id) {
            request.reservations.push_back(Reservation {
                ticket,
                namespace: index,
                blocks,
                epochs,
                incarnation: name.incarnation,
            });
        }
        self.list(id);
        Ok(())
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
            let Some(answer) = self.port.poll(&mut first.ticket) else {
                return;
            };
            let Some(reservation) = request.reservations.pop_front() else {
                return;
            };
            match answer {
                Ok(reply::Body::Reserve(reply)) => {
                    self.daemon_spoke();
                    self.order(now, id, reservation, &reply);
                }
                Ok(_) => self.reservation_lost(&reservation),
                Err(fault) => {
                    self.reservation_lost(&reservation);
                    if let Fault::Refused(text) = fault {
                        self.notices
                            .warn(format!("a reservation was refused: {text}"));
                    }
                }
            }
        }
    }

    fn reservation_lost(&mut self, reservation: &Reservation<P::Ticket>) {
        self.flew(reservation.blocks.len() as u32);
        self.counters.failed_blocks += reservation.blocks.len() as u64;
    }

    fn order(
        &mut self,
        now: u64,
        id: &str,
        reservation: Reservation<P::Ticket>,
        reply: &ReserveReply,
    ) {
        let asked = reservation.blocks.len();
        let mut order = StoreOrder {
            order: self.next_order,
            request: id.to_owned(),
            namespace: reservation.namespace,
            epochs: reservation.epochs,
            incarnation: reservation.incarnation.to_vec(),
            ..StoreOrder::default()
        };
        let mut slots = reply
            .slots
            .iter()
            .zip(&reply.generations)
            .zip(&reply.offsets);
        for (at, state) in reply.states.iter().take(asked).enumerate() {
            match ReserveState::try_from(*state) {
                Ok(ReserveState::Reserved) => {
                    let Some(((slot, generation), offset)) = slots.next() else {
                        break;
                    };
                    order.slots.push(*slot);
                    order.generations.push(*generation);
                    order.offsets.push(*offset);
                    order.blocks.push(reservation.blocks.blocks[at]);
                    let hash = &reservation.blocks.hashes[at * HASH_BYTES..(at + 1) * HASH_BYTES];
                    order.hashes.extend_from_slice(hash);
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
        let count = order.slots.len() as u32;
        self.flew(asked as u32 - count);
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
            },
        );
        self.meta.stores.push(order);
        if let Some(request) = self.requests.get_mut(id) {
            request.orders += 1;
        }
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
            self.counters.done_blocks += u64::from(open.blocks);
            if let Some(request) = self.requests.get_mut(&open.request) {
                request.orders = request.orders.saturating_sub(1);
            }
        }
    }

    /// From which block on a finished request's blocks are wanted by [`Scheduler::finished`], given that the first `full` are
    /// full; `None`: none.
    pub fn finish_from(&mut self, now: u64, id: &str, full: u32) -> Option<u32> {
        let request = self.requests.get(id)?;
        let wanted = request.next < full
            && request.ran
            && !request.loading
            && self.may_store(request)
            && now >= self.no_room_until
            && !self.silence.lasts();
        let (next, adapter) = (request.next, request.adapter.clone());
        (wanted && self.standing(&adapter) != Standing::Not).then_some(next)
    }

    /// The engine is through with a request. `hashes` and `blocks` are those of its last full blocks, from the block that
    /// [`Scheduler::finish_from`] said, with one more hash in front as in [`Scheduler::capture`].
    ///
    /// True: the engine must hold the request's blocks until the workers report it as sent, which they will do exactly once.
    pub fn finished(&mut self, now: u64, id: &str, hashes: &[u8], blocks: &[u32]) -> bool {
        self.give_back_lease(id);
        let Some(request) = self.requests.get_mut(id) else {
            return false;
        };
        if request.loading {
            // The engine holds the blocks until the load is reported, by a rule of its own.
            self.requests.remove(id);
            return false;
        }
        let last = Blocks::new(hashes, blocks);
        if request.tail.len() == 0 {
            request.tail = last;
        } else {
            request.tail.hashes.extend(last.hashes);
            request.tail.blocks.extend(last.blocks);
        }
        if !request.has_pending() && request.orders == 0 {
            self.requests.remove(id);
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
            let Some(request) = self.requests.get_mut(id) else {
                return;
            };
            if request.tail.len() == 0 || count == 0 {
                return;
            }
            let front = request.tail.split_front(count);
            if let Err(mut front) = self.reserve(now, id, front) {
                if let Some(request) = self.requests.get_mut(id) {
                    front.hashes.append(&mut request.tail.hashes);
                    front.blocks.append(&mut request.tail.blocks);
                    request.tail = front;
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
            let mut asked = 0;
            if late || no_hope {
                asked = request.reservations.iter().map(|r| r.blocks.len()).sum();
                request.reservations.clear();
                request.tail = Blocks::default();
            }
            if !request.has_pending() {
                request.leaving = Leaving::Told;
                self.meta.finish.push(id);
            }
            self.flew(asked as u32);
        }
        if silent {
            self.daemon_silent(now, None);
        }
    }
}
