//! Simulated engines: instances of several processes, what each process remembers, and one turn of a process.
//!
//! A process does in one turn what a real one does between two looks at the clock: read one message, copy one window of bytes,
//! send one request. So copies of different processes interleave in every way.

use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;

use kvd_core::Role;

use crate::ask::Ask;
use crate::daemon::Frame;
use crate::memory::Mapping;
use crate::model::Held;
use crate::options::Fault;
use crate::reader::Read;
use crate::report::Check;
use crate::worker::Store;
use crate::world::World;

/// An engine instance.
#[derive(Debug)]
pub(crate) struct Instance {
    pub(crate) id: [u8; 16],
    pub(crate) tenant: u16,
    /// Its namespaces, by number in the configuration.
    pub(crate) spaces: Vec<usize>,
    pub(crate) pp: u32,
    pub(crate) tp: u32,
    /// Its processes: workers by rank, then the scheduler, or one that is both.
    pub(crate) procs: Vec<usize>,
    /// Sends what it must not.
    pub(crate) liar: bool,
    /// Writes where it must not.
    pub(crate) rogue: bool,
    /// Comes back without fencing.
    pub(crate) no_fence: bool,
    /// Never releases what it leases.
    pub(crate) hoarder: bool,
}

impl Instance {
    pub(crate) fn world(&self) -> u32 {
        self.pp * self.tp
    }

    /// Whether it keeps to the protocol.
    pub(crate) fn honest(&self) -> bool {
        !(self.liar || self.rogue || self.no_fence)
    }
}

/// One thing that a process may do in a turn.
#[derive(Clone, Copy)]
enum Doing {
    Receive,
    Connect,
    Copy,
    TakeOrder,
    Commit,
    Load,
    Release,
    Schedule,
    Misbehave,
}

/// What a request was for.
#[derive(Clone, Debug)]
pub(crate) enum Pending {
    Register(usize),
    Fence(u64),
    Lookup {
        space: usize,
        group: u32,
        hashes: Vec<[u8; 32]>,
    },
    Reserve {
        space: usize,
        /// Connection of each rank as it was known when this was sent.
        known: Vec<u64>,
    },
    Load {
        space: usize,
    },
    /// Nothing depends on the answer.
    Other,
}

/// From a scheduler to a worker of its instance.
#[derive(Clone, Debug)]
pub(crate) enum Order {
    Store {
        space: usize,
        blocks: Rc<Vec<Held>>,
        /// The connection under which the worker may write these.
        token: u64,
        /// Which start of the daemon gave them. Another may give the same slots under the same generations to others.
        incarnation: [u8; 16],
    },
    Load {
        space: usize,
        group: u32,
        hashes: Vec<[u8; 32]>,
    },
}

/// One process.
pub(crate) struct Proc {
    pub(crate) instance: usize,
    pub(crate) role: Role,
    pub(crate) rank: u32,
    pub(crate) alive: bool,
    pub(crate) stalled_until: u64,
    pub(crate) retry_at: u64,
    pub(crate) conn: Option<u64>,
    /// Its present session; 0: none yet.
    pub(crate) token: u64,
    /// The daemon of that session.
    pub(crate) incarnation: [u8; 16],
    /// Its sessions that it has not fenced, the oldest first.
    pub(crate) past: Vec<u64>,
    /// It has registered all.
    pub(crate) ready: bool,
    pub(crate) names: Vec<Option<u32>>,
    pub(crate) pending: BTreeMap<u32, Pending>,
    pub(crate) next_id: u32,
    pub(crate) mapping: Option<Mapping>,
    pub(crate) orders: VecDeque<Order>,
    pub(crate) stores: Vec<Store>,
    pub(crate) reads: Vec<Read>,
    /// Blocks to load of which no request has been sent yet.
    pub(crate) to_load: VecDeque<(usize, u32, [u8; 32])>,
    /// Slots that were read: slot, generation, corrupt.
    pub(crate) read: Vec<(u32, u64, bool)>,
    pub(crate) leases: Vec<u64>,
    /// A scheduler's knowledge of its ranks' connections.
    pub(crate) known: Vec<u64>,
    /// All sessions it ever had with the running daemon.
    pub(crate) sessions: Vec<u64>,
}

impl Proc {
    pub(crate) fn new(instance: usize, role: Role, rank: u32, world: u32) -> Self {
        Proc {
            instance,
            role,
            rank,
            alive: true,
            stalled_until: 0,
            retry_at: 0,
            conn: None,
            token: 0,
            incarnation: [0; 16],
            past: Vec::new(),
            ready: false,
            names: Vec::new(),
            pending: BTreeMap::new(),
            next_id: 1,
            mapping: None,
            orders: VecDeque::new(),
            stores: Vec::new(),
            reads: Vec::new(),
            to_load: VecDeque::new(),
            read: Vec::new(),
            leases: Vec::new(),
            known: vec![0; world as usize],
            sessions: Vec::new(),
        }
    }

    pub(crate) fn schedules(&self) -> bool {
        matches!(self.role, Role::Scheduler | Role::Both)
    }

    /// Whether it waits for nothing and has nothing to do but invent work.
    pub(crate) fn idle(&self) -> bool {
        let copies = self.stores.len() + self.reads.len() + self.read.len();
        self.ready
            && self.past.is_empty()
            && self.pending.is_empty()
            && copies + self.orders.len() + self.to_load.len() + self.leases.len() == 0
    }
}

impl World {
    /// A new instance with all its processes.
    pub(crate) fn spawn_instance(&mut self) {
        let at = self.instances.len();
        let tenant = self.rng.below(self.config.limits.len()) as u16;
        let own = |w: &World| -> Vec<usize> {
            let all = w.config.namespaces.iter().enumerate();
            all.filter(|(_, ns)| ns.tenant == tenant)
                .map(|(n, _)| n)
                .collect()
        };
        let mut spaces = own(self);
        let keep = self.rng.range(1, spaces.len() as u64) as usize;
        let turn = self.rng.below(spaces.len());
        spaces.rotate_left(turn);
        spaces.truncate(keep);
        let (pp, tp) = (
            *self.rng.pick(&[1u32, 1, 2]),
            *self.rng.pick(&[1u32, 1, 2, 4]),
        );
        let (world, faults) = (pp * tp, self.config.faults);
        let mut one_in = |n: usize, fault: Fault| faults.has(fault) && self.rng.one_in(n);
        let mut instance = Instance {
            id: [0; 16],
            tenant,
            spaces,
            pp,
            tp,
            procs: Vec::new(),
            liar: one_in(5, Fault::Lie),
            rogue: one_in(6, Fault::Rogue),
            no_fence: one_in(6, Fault::NoFence),
            hoarder: one_in(6, Fault::Lie),
        };
        instance.id = self.rng.id();
        let solo = world == 1 && self.rng.one_in(2);
        for rank in 0..world {
            instance.procs.push(self.procs.len());
            let role = if solo { Role::Both } else { Role::Worker };
            self.procs.push(Proc::new(at, role, rank, world));
        }
        if !solo {
            instance.procs.push(self.procs.len());
            self.procs.push(Proc::new(at, Role::Scheduler, 0, world));
        }
        self.event("instance", [at as u64, u64::from(tenant), u64::from(world)]);
        self.counters.add("instances");
        self.instances.push(instance);
    }

    /// Sends a request, if there is a session to send it in.
    pub(crate) fn send(&mut self, p: usize, ask: Ask, what: Pending) -> bool {
        let proc = &mut self.procs[p];
        let Some(conn) = proc.conn.and_then(|at| self.conns.get_mut(&at)) else {
            return false;
        };
        if proc.token == 0 {
            return false;
        }
        let id = proc.next_id;
        proc.next_id += 1;
        proc.pending.insert(id, what);
        conn.to_daemon.push_back(Frame::Ask(id, ask));
        true
    }

    /// The short name of a namespace in the present session.
    pub(crate) fn short(&self, p: usize, space: usize) -> Option<u32> {
        let proc = &self.procs[p];
        let at = self.instances[proc.instance]
            .spaces
            .iter()
            .position(|s| *s == space)?;
        proc.names.get(at).copied().flatten()
    }

    /// One turn of a process.
    pub(crate) fn turn(&mut self, p: usize) -> Check {
        let proc = &self.procs[p];
        if !proc.alive || proc.stalled_until > self.clock.us() {
            return Ok(());
        }
        let conn = proc.conn.and_then(|at| self.conns.get(&at));
        let news = conn.is_some_and(|c| !c.to_client.is_empty() || !c.daemon_open);
        let copies = proc.stores.len() + proc.reads.len();
        // Only what there is to do, the copies twice: most of a worker's time goes there.
        let doings = [
            (news, Doing::Receive),
            (!proc.ready || !proc.past.is_empty(), Doing::Connect),
            (copies > 0, Doing::Copy),
            (copies > 0, Doing::Copy),
            (!proc.orders.is_empty(), Doing::TakeOrder),
            (!proc.stores.is_empty(), Doing::Commit),
            (!proc.to_load.is_empty(), Doing::Load),
            (!proc.read.is_empty(), Doing::Release),
            (proc.schedules(), Doing::Schedule),
            (true, Doing::Misbehave),
        ];
        let all: Vec<Doing> = doings
            .iter()
            .filter(|(can, _)| *can)
            .map(|(_, doing)| *doing)
            .collect();
        let doing = *self.rng.pick(&all);
        self.do_one(p, doing)
    }

    fn do_one(&mut self, p: usize, doing: Doing) -> Check {
        match doing {
            Doing::Receive => return self.receive(p),
            Doing::Connect => return self.connect(p),
            Doing::Copy => return self.copy_some(p),
            Doing::TakeOrder => return self.take_order(p),
            Doing::Commit => self.commit(p),
            Doing::Load => self.ask_to_load(p),
            Doing::Release => self.release(p),
            Doing::Schedule => self.schedule(p),
            Doing::Misbehave => self.misbehave(p),
        }
        Ok(())
    }

    /// Most bytes that a copy moves in one turn.
    pub(crate) fn window(&self) -> u64 {
        if self.quiet {
            1 << 16
        } else {
            self.config.window as u64
        }
    }

    fn copy_some(&mut self, p: usize) -> Check {
        let stores = self.procs[p].stores.len();
        let at = self.rng.below(stores + self.procs[p].reads.len());
        match at.checked_sub(stores) {
            None => self.write_some(p, at),
            Some(at) => self.read_some(p, at),
        }
    }

    fn misbehave(&mut self, p: usize) {
        let instance = &self.instances[self.procs[p].instance];
        let (liar, rogue) = (instance.liar, instance.rogue);
        if self.quiet || !self.rng.one_in(3) {
            return;
        }
        if liar {
            self.lie(p);
        } else if rogue {
            self.scribble(p);
        }
    }
}
