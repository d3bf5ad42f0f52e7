//! Orders: from the daemon's reply to a reservation to the ranks' reports that its blocks have been copied.

use kvd_wire::session::{Abort, ReserveReply, ReserveState, reply, request::Body};

use super::Scheduler;
use super::port::{Fault, Port};
use super::request::{Kept, Leaving, Reservation, count, count_held, held_blocks};
use crate::HASH_BYTES;
use crate::meta::{StoreEntry, StoreOrder};

/// For how long (us) nothing is reserved after the daemon had no room.
const NO_ROOM_PAUSE: u64 = 100_000;

/// An order that not all ranks have reported.
#[derive(Debug)]
pub(crate) struct OpenOrder {
    request: String,
    blocks: u32,
    /// So many reports are to come: of each rank, one for each group.
    reports: u32,
    /// Blocks that the engine keeps for it.
    held: Vec<u32>,
}

impl<P: Port> Scheduler<P> {
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
        while let Some(request) = self.requests.get_mut(id)
            && let Some(first) = request.reservations.front_mut()
        {
            // What a step computes is right when it is wholly over: with drafts, states move once tokens are accepted, and a drafter
            // writes, which may be after this step's stores begin.
            if first.step == self.steps && self.settings.outgrows() {
                return;
            }
            let Some(answer) = self.port.poll(&mut first.ticket) else {
                return self.give_up_late(now, id);
            };
            let Some(reservation) = request.reservations.pop_front() else {
                return;
            };
            match answer {
                Ok(reply::Body::Reserve(reply)) => {
                    self.daemon_spoke();
                    self.order(now, id, reservation, reply);
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

    /// The engine's blocks are not kept for a daemon that takes its time; what their request has waits. Of a finished request see
    /// `tell_finished`.
    fn give_up_late(&mut self, now: u64, id: &str) {
        let Some(request) = self.requests.get_mut(id) else {
            return;
        };
        let mut held = Vec::new();
        if request.leaving == Leaving::No {
            for reservation in &mut request.reservations {
                let late = now.saturating_sub(reservation.since) >= self.settings.hold_deadline;
                if late && count_held(&reservation.parts) > 0 {
                    self.counters.hold_timeouts += 1;
                    held.append(&mut reservation.give_up_held());
                }
            }
        }
        if !held.is_empty() {
            // What nothing is left of is given back with its ticket.
            let rest = &mut request.reservations;
            rest.retain(|reservation| count(&reservation.parts) > 0);
            self.flew(held.len() as u32);
            self.counters.failed_blocks += held.len() as u64;
            self.let_go(held);
        }
    }

    fn reservation_lost(&mut self, reservation: &Reservation<P::Ticket>) {
        let blocks = count(&reservation.parts);
        self.flew(blocks);
        self.counters.failed_blocks += u64::from(blocks);
        self.let_go(held_blocks(&reservation.parts));
    }

    /// Makes an order of what has got slots.
    fn order(
        &mut self,
        now: u64,
        id: &str,
        reservation: Reservation<P::Ticket>,
        reply: ReserveReply,
    ) {
        let parts = &reservation.parts;
        let all: usize = parts.iter().map(|part| part.blocks.len()).sum();
        if reply.states.len() != all {
            // A daemon of another kind: nobody knows whose these slots are.
            let (slots, generations) = (reply.slots, reply.generations);
            self.forget(Body::Abort(Abort { slots, generations }));
            return self.reservation_lost(&reservation);
        }
        let replicated = parts.iter().any(|p| self.namespaces.replicated(p.group));
        let mut order = StoreOrder {
            entries: Vec::with_capacity(reply.slots.len() * StoreEntry::BYTES),
            groups: Vec::with_capacity(parts.len()),
            counts: Vec::with_capacity(parts.len()),
            ..StoreOrder::default()
        };
        let (mut held, mut rest) = (Vec::with_capacity(all), Vec::new());
        // Slots that nobody will write.
        let mut back = Abort::default();
        let mut states = reply.states.iter();
        let slots = reply.slots.iter().zip(&reply.generations);
        let mut slots = slots.zip(&reply.offsets);
        for part in parts {
            let before = order.blocks();
            let (hashes, _) = part.blocks.hashes.as_chunks::<HASH_BYTES>();
            let blocks = hashes.iter().zip(&part.blocks.blocks);
            for ((hash, block), state) in blocks.zip(&mut states) {
                let slot = match self.has_slot(now, *state) {
                    true => slots.next(),
                    false => None,
                };
                match (slot, part.kept) {
                    (Some(((slot, generation), _)), Kept::NoMore) => {
                        back.slots.push(*slot);
                        back.generations.push(*generation);
                    }
                    (Some(((slot, generation), offset)), kept) => {
                        order.push(StoreEntry {
                            block: *block,
                            slot: *slot,
                            generation: *generation,
                            offset: *offset,
                        });
                        if replicated {
                            order.hashes.extend_from_slice(hash);
                        }
                        if kept == Kept::ByEngine {
                            held.push(*block);
                        }
                    }
                    // What gets no slot is not copied.
                    (None, Kept::ByEngine) => rest.push(*block),
                    (None, _) => {}
                }
            }
            if order.blocks() > before {
                order.groups.push(part.group);
                order.counts.push((order.blocks() - before) as u32);
            }
        }
        let blocks = order.blocks() as u32;
        self.flew(count(parts) - blocks);
        self.let_go(rest);
        if !back.slots.is_empty() {
            self.forget(Body::Abort(back));
        }
        if blocks == 0 {
            return;
        }
        order.order = self.next_order;
        order.request = id.to_owned();
        order.namespace = reservation.namespace;
        order.epochs = reservation.epochs;
        order.incarnation = reservation.incarnation.to_vec();
        self.next_order += 1;
        self.counters.orders += 1;
        self.counters.ordered_blocks += u64::from(blocks);
        let open = OpenOrder {
            request: id.to_owned(),
            blocks,
            reports: (self.ranks.len() * order.groups.len()) as u32,
            held,
        };
        self.orders.insert(order.order, open);
        self.meta.stores.push(order);
        if let Some(request) = self.requests.get_mut(id) {
            request.orders += 1;
        }
    }

    /// Whether a block has got a slot. The others are counted.
    fn has_slot(&mut self, now: u64, state: i32) -> bool {
        match ReserveState::try_from(state) {
            Ok(ReserveState::Reserved) => return true,
            Ok(ReserveState::Present) => self.counters.present_blocks += 1,
            Ok(ReserveState::Filling) => self.counters.filling_blocks += 1,
            Ok(ReserveState::NoSpace) => {
                self.counters.no_space_blocks += 1;
                self.no_room_until = now + NO_ROOM_PAUSE;
            }
            Err(_) => self.counters.failed_blocks += 1,
        }
        false
    }

    /// A rank is done with an order's blocks of one group.
    pub(crate) fn order_done(&mut self, order: u64) {
        let Some(open) = self.orders.get_mut(&order) else {
            return;
        };
        open.reports = open.reports.saturating_sub(1);
        if open.reports > 0 {
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
}
