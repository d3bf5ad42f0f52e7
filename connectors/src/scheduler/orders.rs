//! Orders: from the daemon's reply to a reservation to the ranks' reports that its blocks have been copied.

use bytes::Bytes;
use kvd_wire::session::{Abort, ReserveReply, ReserveState, reply, request::Body};

use super::Scheduler;
use super::port::{Fault, Port};
use super::request::{Blocks, Leaving, Part, Reservation, count, held_blocks};
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
        loop {
            let Some(request) = self.requests.get_mut(id) else {
                return;
            };
            let Some(first) = request.reservations.front_mut() else {
                return;
            };
            // What the engine keeps for us is right when its step is wholly over: with drafts, states move once tokens are accepted,
            // which may be after this step's stores begin.
            let held = first.parts.iter().any(|part| part.held);
            if held && first.step == self.steps {
                return;
            }
            let answer = self.port.poll(&mut first.ticket);
            // The engine's blocks are not kept for a daemon that takes its time. Of a finished request see `tell_finished`.
            let late = held
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
        let blocks = count(&reservation.parts);
        self.flew(blocks);
        self.counters.failed_blocks += u64::from(blocks);
        self.let_go(held_blocks(reservation.parts));
    }

    /// Makes an order of each part that has got slots.
    fn order(
        &mut self,
        now: u64,
        id: &str,
        mut reservation: Reservation<P::Ticket>,
        mut reply: ReserveReply,
    ) {
        if reply.states.len() != count(&reservation.parts) as usize {
            // A daemon of another kind: nobody knows whose these slots are.
            let _ = self.port.queue_and_forget(Body::Abort(Abort {
                slots: reply.slots,
                generations: reply.generations,
            }));
            return self.reservation_lost(reservation);
        }
        for part in std::mem::take(&mut reservation.parts) {
            let states = split_front(&mut reply.states, part.blocks.len());
            let reserved = states
                .iter()
                .filter(|state| **state == ReserveState::Reserved as i32);
            let slots = reserved.count();
            let given = ReserveReply {
                states,
                slots: split_front(&mut reply.slots, slots),
                generations: split_front(&mut reply.generations, slots),
                offsets: split_front(&mut reply.offsets, slots),
            };
            self.order_part(now, id, &reservation, part, given);
        }
    }

    fn order_part(
        &mut self,
        now: u64,
        id: &str,
        reservation: &Reservation<P::Ticket>,
        part: Part,
        reply: ReserveReply,
    ) {
        let asked = part.blocks.len();
        // As a rule all blocks get slots, or none does.
        let (hashes, blocks) = match reply.slots.len() == asked {
            true => (part.blocks.hashes.clone(), part.blocks.blocks.clone()),
            false => self.reserved(now, &part.blocks, &reply.states),
        };
        let slots = reply.slots.len().min(reply.generations.len());
        let count = blocks.len().min(slots).min(reply.offsets.len());
        let mut order = StoreOrder {
            order: self.next_order,
            request: id.to_owned(),
            namespace: reservation.namespace,
            group: part.group,
            epochs: reservation.epochs.clone(),
            incarnation: reservation.incarnation.to_vec(),
            hashes: match self.namespaces.replicated(part.group) {
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
        if part.held {
            // What gets no slot is not copied. The ordered ones are in the same order.
            let mut ordered = order.blocks.iter().peekable();
            let all = part.blocks.blocks.into_iter();
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
}

/// Takes the first so many off, or all.
fn split_front<T>(list: &mut Vec<T>, count: usize) -> Vec<T> {
    let rest = list.split_off(count.min(list.len()));
    std::mem::replace(list, rest)
}
