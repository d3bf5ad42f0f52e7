//! The simulated arena port: real bytes, a generation table and a session table for each arena, which outlive the daemon as long
//! as somebody holds them. Writes down what the node does, for the checkers.
//!
//! Deliberately absent: judging. Whether a word may change, or a byte may be written, is decided in `model` and `checks`.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvd_core::settings::MAX_WRITERS;
use kvd_core::tier::HostRange;
use kvd_core::{ArenaShape, TenantId};
use kvd_node::{AdoptedArena, ArenaPort, Pages, PortError};

use crate::content;
use crate::disk::{SharedBytes, SimHost};
use crate::plant::Plant;

/// Granularity of the taint map.
const PAGE: u64 = 4096;

/// The bytes of an arena. The same object under every daemon that adopts it.
pub(crate) struct Memory {
    /// Tells memories apart.
    pub(crate) serial: u64,
    bytes: SharedBytes,
    taint: RefCell<Vec<bool>>,
    /// Serial of the newest generation table over these bytes.
    pub(crate) table: Cell<u64>,
    /// Number of the last daemon that had these bytes.
    daemon: Cell<u64>,
    /// Some daemon has been skipped: fences that were given to it are lost to those after it.
    pub(crate) gap: Cell<bool>,
}

impl Memory {
    fn new(serial: u64, bytes: u64) -> Self {
        let mut data = vec![0; bytes as usize];
        content::poison(0, &mut data);
        let pages = bytes.div_ceil(PAGE) as usize;
        Memory {
            serial,
            bytes: Arc::new(Mutex::new(data)),
            taint: RefCell::new(vec![false; pages]),
            table: Cell::new(serial),
            daemon: Cell::new(0),
            gap: Cell::new(false),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<u8>> {
        self.bytes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes as a process with a mapping does.
    pub(crate) fn write(&self, offset: u64, bytes: &[u8]) {
        let from = offset as usize;
        self.lock()[from..from + bytes.len()].copy_from_slice(bytes);
    }

    /// Reads as a process with a mapping does.
    pub(crate) fn read(&self, offset: u64, out: &mut [u8]) {
        let from = offset as usize;
        out.copy_from_slice(&self.lock()[from..from + out.len()]);
    }

    /// How many bytes there are.
    pub(crate) fn len(&self) -> u64 {
        self.lock().len() as u64
    }

    /// Flips one bit.
    pub(crate) fn flip(&self, offset: u64, bit: u32) {
        self.lock()[offset as usize] ^= 1 << (bit % 8);
        self.mark(offset, 1);
    }

    /// Writes the pattern of unused memory and forgets that these bytes were tampered with.
    pub(crate) fn poison(&self, offset: u64, len: u64, word: u64) {
        let (from, to) = (offset as usize, (offset + len) as usize);
        content::poison(word, &mut self.lock()[from..to]);
        for page in offset / PAGE..(offset + len).div_ceil(PAGE) {
            self.taint.borrow_mut()[page as usize] = false;
        }
    }

    /// Remembers that somebody wrote here who had no right to.
    pub(crate) fn mark(&self, offset: u64, len: u64) {
        for page in offset / PAGE..(offset + len).div_ceil(PAGE) {
            self.taint.borrow_mut()[page as usize] = true;
        }
    }

    /// Whether somebody did, since these bytes were last handed out.
    pub(crate) fn tainted(&self, offset: u64, len: u64) -> bool {
        (offset / PAGE..(offset + len).div_ceil(PAGE)).any(|p| self.taint.borrow()[p as usize])
    }
}

/// A part of an arena that a store reads or writes. It reads what is there when the device takes it, not when it is asked to.
#[derive(Clone)]
pub(crate) struct SimSpan {
    /// Of which memory.
    pub(crate) memory: Rc<Memory>,
    /// From where on.
    pub(crate) offset: u64,
    /// Bytes, in whole pages.
    pub(crate) len: u64,
}

impl SimSpan {
    /// As the device has it.
    pub(crate) fn host(&self) -> SimHost {
        let bytes = Arc::clone(&self.memory.bytes);
        SimHost::part(bytes, self.offset as usize, self.len as usize)
    }
}

/// A generation table: words that only its daemon writes.
pub(crate) struct Table {
    /// Tells tables apart.
    pub(crate) serial: u64,
    words: RefCell<Vec<u64>>,
    writers: RefCell<Vec<u64>>,
}

/// An arena as a process maps it: bytes and one table.
#[derive(Clone)]
pub(crate) struct Mapping {
    /// Its sizes.
    pub(crate) shape: ArenaShape,
    /// Its bytes.
    pub(crate) memory: Rc<Memory>,
    /// Its table.
    pub(crate) table: Rc<Table>,
}

impl Mapping {
    /// The generation word of a slot, as a client reads it.
    pub(crate) fn word(&self, slot: u32) -> u64 {
        self.table
            .words
            .borrow()
            .get(slot as usize)
            .copied()
            .unwrap_or(0)
    }

    /// Tokens of the sessions that may be writing, as a client reads them.
    pub(crate) fn writers(&self) -> Vec<u64> {
        self.table.writers.borrow().clone()
    }

    /// Whether a later daemon has put another table over the same bytes.
    pub(crate) fn superseded(&self) -> bool {
        self.memory.table.get() != self.table.serial
    }
}

/// What a client offers: its mapping, and what it says of it.
pub(crate) struct Offer {
    /// The descriptors, so to speak.
    pub(crate) mapping: Mapping,
    /// The claim.
    pub(crate) claimed: ArenaShape,
}

/// Something the node did to an arena.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// A generation word changed.
    Word {
        /// Whose.
        tenant: u16,
        /// Which.
        slot: u32,
        /// From.
        old: u64,
        /// To.
        new: u64,
    },
    /// A tenant has another arena now.
    Arena {
        /// Whose.
        tenant: u16,
        /// It came from a former daemon.
        adopted: bool,
        /// It came under the table of a daemon before the last.
        stale: bool,
    },
    /// The node wants this extent faulted in.
    Populate(Job),
}

/// An extent to be faulted in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Job {
    /// Whose.
    pub(crate) tenant: u16,
    /// Of which arena.
    pub(crate) arena: [u8; 16],
    /// Which.
    pub(crate) extent: u32,
    /// It has been faulted in before under this daemon: its bytes are given back first.
    pub(crate) again: bool,
}

/// Sizes of a tenant's arena.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ArenaSpec {
    /// Bytes; whole extents.
    pub(crate) bytes: u64,
    /// Bytes of an extent.
    pub(crate) extent_bytes: u64,
}

struct State {
    current: Vec<Option<Mapping>>,
    asked: Vec<Vec<bool>>,
    events: Vec<Event>,
    /// For [`Plant::LateWords`]: of this call, and of the one before.
    late: Vec<(u16, u32, u64)>,
    held_back: Vec<(u16, u32, u64)>,
}

/// What all ports of one simulation share.
pub(crate) struct Shared {
    specs: Vec<ArenaSpec>,
    plant: Option<Plant>,
    serial: Cell<u64>,
    /// How many daemons there were.
    daemons: Cell<u64>,
    /// The daemon dies after so many more writes to its tables; `Some(0)`: it is dead in the middle of what it was doing.
    fuse: Cell<Option<u32>>,
    state: RefCell<State>,
}

/// The port that one daemon is given. The simulation keeps a copy of it to look through.
#[derive(Clone)]
pub(crate) struct SimArena(Rc<Shared>);

impl SimArena {
    /// Memory for these tenants; no arena is made yet.
    pub(crate) fn new(specs: Vec<ArenaSpec>, plant: Option<Plant>) -> Self {
        let state = State {
            current: specs.iter().map(|_| None).collect(),
            asked: specs.iter().map(|_| Vec::new()).collect(),
            events: Vec::new(),
            late: Vec::new(),
            held_back: Vec::new(),
        };
        SimArena(Rc::new(Shared {
            specs,
            plant,
            serial: Cell::new(0),
            daemons: Cell::new(0),
            fuse: Cell::new(None),
            state: RefCell::new(state),
        }))
    }

    /// The daemon is dead: nobody holds its arenas but the clients.
    pub(crate) fn forget(&self) {
        let mut state = self.0.state.borrow_mut();
        state.current.iter_mut().for_each(|c| *c = None);
        state.events.clear();
        state.late.clear();
        state.held_back.clear();
        self.0.fuse.set(None);
        self.0.daemons.set(self.0.daemons.get() + 1);
    }

    /// Lets the daemon die after `writes` more writes to its tables.
    pub(crate) fn light_fuse(&self, writes: u32) {
        self.0.fuse.set(Some(writes));
    }

    /// Whether it has.
    pub(crate) fn burnt(&self) -> bool {
        self.0.fuse.get() == Some(0)
    }

    /// Takes one write off the fuse. False: the daemon is dead and writes nothing.
    fn alive(&self) -> bool {
        match self.0.fuse.get() {
            Some(0) => return false,
            Some(left) => self.0.fuse.set(Some(left - 1)),
            None => {}
        }
        true
    }

    /// The tenant's arena as it is now.
    pub(crate) fn current(&self, tenant: u16) -> Option<Mapping> {
        self.0.state.borrow().current[usize::from(tenant)].clone()
    }

    /// What the node has done since last asked.
    pub(crate) fn take_events(&self) -> Vec<Event> {
        let mut state = self.0.state.borrow_mut();
        let events = std::mem::take(&mut state.events);
        let (held_back, late) = (
            std::mem::take(&mut state.held_back),
            std::mem::take(&mut state.late),
        );
        state.held_back = late;
        for (tenant, slot, word) in held_back {
            if let Some(mapping) = &state.current[usize::from(tenant)] {
                mapping.table.words.borrow_mut()[slot as usize] = word;
            }
        }
        events
    }

    fn serial(&self) -> u64 {
        self.0.serial.set(self.0.serial.get() + 1);
        self.0.serial.get()
    }

    fn install(&self, tenant: TenantId, mapping: Mapping, adopted: bool, stale: bool) {
        let at = usize::from(tenant.0);
        let mut state = self.0.state.borrow_mut();
        state.asked[at] = vec![false; mapping.shape.extents() as usize];
        mapping.memory.table.set(mapping.table.serial);
        let daemon = self.0.daemons.get();
        let skipped = adopted && mapping.memory.daemon.get() + 1 != daemon;
        mapping.memory.gap.set(mapping.memory.gap.get() || skipped);
        mapping.memory.daemon.set(daemon);
        state.current[at] = Some(mapping);
        state.events.push(Event::Arena {
            tenant: tenant.0,
            adopted,
            stale,
        });
    }
}

impl ArenaPort for SimArena {
    type Offer = Offer;
    type Span = SimSpan;

    fn create(&mut self, tenant: TenantId) -> Result<ArenaShape, PortError> {
        let spec = self.0.specs[usize::from(tenant.0)];
        let serial = self.serial();
        let mut id = [0; 16];
        id[..8].copy_from_slice(&serial.to_le_bytes());
        let shape = ArenaShape {
            id,
            bytes: spec.bytes,
            extent_bytes: spec.extent_bytes,
            page_bytes: PAGE,
            slots_per_extent: (spec.extent_bytes / PAGE) as u32,
        };
        let words = (shape.bytes / PAGE) as usize;
        let table = Table {
            serial,
            words: RefCell::new(vec![0; words]),
            writers: RefCell::new(Vec::new()),
        };
        let memory = Rc::new(Memory::new(serial, spec.bytes));
        let mapping = Mapping {
            shape,
            memory,
            table: Rc::new(table),
        };
        self.install(tenant, mapping, false, false);
        Ok(shape)
    }

    /// As the real adapter: even words and odd ones go up by 2, zeros stay, the old session table is the new one's first content.
    fn adopt(&mut self, tenant: TenantId, offer: Offer) -> Result<AdoptedArena, PortError> {
        let spec = self.0.specs[usize::from(tenant.0)];
        let old = offer.mapping;
        let stale = old.superseded();
        if offer.claimed != old.shape || old.shape.bytes > spec.bytes {
            return Err(PortError(
                "the offered arena is not what it claims to be".to_owned(),
            ));
        }
        let up = |w: &u64| if *w == 0 { 0 } else { *w + 2 };
        let mut words: Vec<u64> = old.table.words.borrow().iter().map(up).collect();
        let writers = old.table.writers.borrow().clone();
        if self.0.plant == Some(Plant::ForgetOdd) {
            words.iter_mut().for_each(|w| *w = w.next_multiple_of(2));
        }
        let table = Rc::new(Table {
            serial: self.serial(),
            words: RefCell::new(words.clone()),
            writers: RefCell::new(writers.clone()),
        });
        let shape = old.shape;
        let mapping = Mapping {
            shape,
            memory: old.memory,
            table,
        };
        self.install(tenant, mapping, true, stale);
        Ok(AdoptedArena {
            shape,
            words,
            writers,
        })
    }

    fn set_generation(&mut self, tenant: TenantId, slot: u32, word: u64) {
        if !self.alive() {
            return;
        }
        let mut state = self.0.state.borrow_mut();
        let Some(mapping) = state.current[usize::from(tenant.0)].clone() else {
            return;
        };
        let old = mapping.word(slot);
        state.events.push(Event::Word {
            tenant: tenant.0,
            slot,
            old,
            new: word,
        });
        let dropped = word.is_multiple_of(2) && old.is_multiple_of(2);
        match self.0.plant {
            Some(Plant::DropEvictionWords) if dropped => {}
            Some(Plant::LateWords) => state.late.push((tenant.0, slot, word)),
            _ => mapping.table.words.borrow_mut()[slot as usize] = word,
        }
    }

    fn set_writers(&mut self, tenant: TenantId, tokens: &[u64]) {
        assert!(
            tokens.len() <= MAX_WRITERS,
            "more writers than the table has room for"
        );
        if !self.alive() {
            return;
        }
        if let Some(mapping) = &self.0.state.borrow().current[usize::from(tenant.0)] {
            *mapping.table.writers.borrow_mut() = tokens.to_vec();
        }
    }

    fn populate(&mut self, tenant: TenantId, extent: u32) {
        let at = usize::from(tenant.0);
        let mut state = self.0.state.borrow_mut();
        let Some(arena) = state.current[at].as_ref().map(|m| m.shape.id) else {
            return;
        };
        let again = std::mem::replace(&mut state.asked[at][extent as usize], true);
        let job = Job {
            tenant: tenant.0,
            arena,
            extent,
            again,
        };
        state.events.push(Event::Populate(job));
    }

    fn span(&self, range: HostRange) -> Option<SimSpan> {
        let memory = self.current(range.tenant.0)?.memory;
        let (offset, len) = (range.offset, range.bytes.next_multiple_of(PAGE));
        (offset + len <= memory.len()).then_some(SimSpan {
            memory,
            offset,
            len,
        })
    }

    fn page_probe(&self, _tenant: TenantId) -> Option<Box<dyn FnOnce() -> Pages + Send>> {
        None
    }
}
