//! The namespace slots: which namespace each holds, and how many blocks need it. A slot that no block needs may be given to another
//! namespace. Deliberately absent: the bytes (`format`), and writing them (`jobs`).

use kvd_core::NamespaceId;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Empty,
    /// Under way to the device.
    Writing,
    /// There, but not yet by a flush.
    Written,
    /// A flush that covers it is under way.
    Covered,
    Durable,
}

struct Slot {
    id: NamespaceId,
    state: State,
    /// Blocks that are there or under way, of this namespace.
    users: u64,
    /// Writes of the slot that failed, one after the other.
    failures: u32,
}

/// Where a namespace's record is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Slotted {
    /// There, or under way.
    Held(u32),
    /// To be written into this slot now.
    New(u32),
    /// Every slot is needed.
    Full,
}

/// All slots of a store.
pub(crate) struct Names(Vec<Slot>);

impl Names {
    pub(crate) fn new(slots: u32) -> Self {
        let empty = |_| Slot {
            id: NamespaceId([0; 32]),
            state: State::Empty,
            users: 0,
            failures: 0,
        };
        Names((0..slots).map(empty).collect())
    }

    /// At the start: what was found in a slot.
    pub(crate) fn found(&mut self, slot: u32, id: NamespaceId) {
        let slot = &mut self.0[slot as usize];
        (slot.id, slot.state) = (id, State::Durable);
    }

    /// The namespace in a slot, if its id begins like this.
    pub(crate) fn id(&self, slot: u32, check: &[u8; 8]) -> Option<NamespaceId> {
        let slot = self.0.get(slot as usize)?;
        (slot.state != State::Empty && slot.id.0[..8] == *check).then_some(slot.id)
    }

    /// Claims a slot for one block more.
    pub(crate) fn claim(&mut self, id: NamespaceId) -> Slotted {
        let held = |slot: &Slot| slot.state != State::Empty && slot.id == id;
        if let Some(at) = self.0.iter().position(held) {
            self.0[at].users += 1;
            return Slotted::Held(at as u32);
        }
        let unused = |(_, slot): &(usize, &Slot)| slot.users == 0 && slot.state != State::Writing;
        // A slot that can't be written is tried last, one that holds a namespace after those that are empty.
        let cost = |(_, slot): &(usize, &Slot)| (slot.failures, slot.state != State::Empty);
        let best = self.0.iter().enumerate().filter(unused).min_by_key(cost);
        let Some((at, slot)) = best else {
            return Slotted::Full;
        };
        let failures = slot.failures;
        self.0[at] = Slot {
            id,
            state: State::Writing,
            users: 1,
            failures,
        };
        Slotted::New(at as u32)
    }

    /// One more block at the start.
    pub(crate) fn add(&mut self, slot: u32) {
        self.0[slot as usize].users += 1;
    }

    /// One block less.
    pub(crate) fn release(&mut self, slot: u32) {
        self.0[slot as usize].users -= 1;
    }

    /// The device is done with the write of a slot.
    pub(crate) fn wrote(&mut self, slot: u32, good: bool) {
        let slot = &mut self.0[slot as usize];
        (slot.state, slot.failures) = match good {
            true => (State::Written, 0),
            false => (State::Empty, slot.failures.saturating_add(1)),
        };
    }

    /// Whether a flush that begins now makes it durable, or it is.
    pub(crate) fn is_written(&self, slot: u32) -> bool {
        !matches!(self.0[slot as usize].state, State::Empty | State::Writing)
    }

    /// A flush begins.
    pub(crate) fn cover(&mut self) {
        for slot in self.0.iter_mut().filter(|s| s.state == State::Written) {
            slot.state = State::Covered;
        }
    }

    /// That flush is over.
    pub(crate) fn covered(&mut self) {
        for slot in self.0.iter_mut().filter(|s| s.state == State::Covered) {
            slot.state = State::Durable;
        }
    }

    /// A flush failed: what was not durable may be gone.
    pub(crate) fn lose(&mut self) {
        let shaky = |slot: &&mut Slot| matches!(slot.state, State::Written | State::Covered);
        for slot in self.0.iter_mut().filter(shaky) {
            slot.state = State::Empty;
        }
    }
}
