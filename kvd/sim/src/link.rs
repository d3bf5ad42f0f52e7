//! A simulated process and its connection: connecting, fencing the past, registering, reading messages, losing it all again.
//!
//! A fence covers a session and all before it, so a process fences only when every copy of every earlier session is over: the
//! latest, which it has named in its hello, and then the others, of which a new daemon may know only the tokens. It registers first:
//! a daemon that has not got the old arena yet would not know later what was fenced.

use kvd_core::Reply;

use crate::ask::{Ask, Layout};
use crate::config;
use crate::daemon::{Conn, Frame, Hello, Msg};
use crate::engine::Pending;
use crate::memory::{Mapping, Offer};
use crate::options::Fault;
use crate::plant::Plant;
use crate::report::{Check, ensure};
use crate::world::World;

impl World {
    /// The next step towards a session in which everything is registered.
    pub(crate) fn connect(&mut self, p: usize) -> Check {
        let proc = &self.procs[p];
        if proc.conn.is_none() {
            if self.daemon.is_some() && self.clock.us() >= proc.retry_at {
                self.dial(p);
            }
            return Ok(());
        }
        if proc.token == 0 {
            return Ok(());
        }
        match self.procs[p].ready {
            true => self.fence(p),
            false => self.register_next(p),
        }
        Ok(())
    }

    /// Fences the latest of the past sessions, if that can be said now.
    fn fence(&mut self, p: usize) {
        let proc = &self.procs[p];
        let waits = proc
            .pending
            .values()
            .any(|what| matches!(what, Pending::Fence(_)));
        let fences = !waits && !self.instances[proc.instance].no_fence;
        let over = self.copies_over(p) || self.options.plant == Some(Plant::EarlyFence);
        if let Some(past) = self.procs[p]
            .past
            .last()
            .copied()
            .filter(|_| fences && over)
        {
            self.send(p, Ask::Fence { past }, Pending::Fence(past));
        }
    }

    /// Whether no copy of an earlier session is under way.
    fn copies_over(&self, p: usize) -> bool {
        let proc = &self.procs[p];
        let latest = proc.past.last().copied();
        let over = |token: u64| match self.options.plant {
            Some(Plant::LatestFence) => Some(token) != latest,
            _ => token == proc.token,
        };
        let stores = proc.stores.iter().all(|s| over(s.token));
        stores && proc.reads.iter().all(|r| over(r.token))
    }

    fn dial(&mut self, p: usize) {
        let proc = &self.procs[p];
        let instance = &self.instances[proc.instance];
        let mut hello = Hello {
            instance: instance.id,
            role: proc.role,
            rank: proc.rank,
            world: instance.world(),
            past: proc.past.last().copied().unwrap_or(0),
            offer: proc.mapping.clone().and_then(|mapping| self.offer(mapping)),
        };
        let (tenant, liar) = (instance.tenant, instance.liar);
        if liar && !self.quiet && self.rng.one_in(4) {
            self.lie_in_hello(p, &mut hello);
        }
        let conn = Conn {
            proc: p,
            tenant,
            token: 0,
            to_daemon: [Frame::Hello(hello)].into(),
            to_client: std::collections::VecDeque::new(),
            client_open: true,
            daemon_open: true,
        };
        self.next_conn += 1;
        self.conns.insert(self.next_conn, conn);
        let spaces = self.instances[self.procs[p].instance].spaces.len();
        let proc = &mut self.procs[p];
        proc.conn = Some(self.next_conn);
        proc.token = 0;
        proc.ready = false;
        proc.names = vec![None; spaces];
        self.counters.add("connections");
    }

    fn offer(&self, mapping: Mapping) -> Option<Offer> {
        // Where every daemon begins with new memory, slots and generations come again.
        if self.options.plant == Some(Plant::StaleAborts) {
            return None;
        }
        if mapping.superseded() && !self.config.faults.has(Fault::StaleOffer) {
            return None;
        }
        Some(Offer {
            claimed: mapping.shape,
            mapping,
        })
    }

    fn register_next(&mut self, p: usize) {
        let proc = &self.procs[p];
        if proc
            .pending
            .values()
            .any(|what| matches!(what, Pending::Register(_)))
        {
            return;
        }
        let Some(at) = proc.names.iter().position(Option::is_none) else {
            self.procs[p].ready = true;
            self.event("ready", [p as u64, self.procs[p].token, 0]);
            return;
        };
        let instance = &self.instances[proc.instance];
        let spec = &self.config.namespaces[instance.spaces[at]];
        let groups = (0u32..)
            .zip(&spec.groups)
            .map(|(group, geometry)| {
                let (cut, part) = config::cut_of(geometry, instance.pp, instance.tp, proc.rank);
                Layout {
                    group,
                    layer_bounds: cut.layer_bounds().to_vec(),
                    head_bounds: cut.head_bounds().to_vec(),
                    copies: proc.role.copies(),
                    part: if proc.role.copies() { part } else { 0 },
                }
            })
            .collect();
        let record = spec.record.clone();
        self.send(p, Ask::Register { record, groups }, Pending::Register(at));
    }

    /// Reads one message, or sees that the daemon has closed the socket.
    pub(crate) fn receive(&mut self, p: usize) -> Check {
        let Some(conn) = self.procs[p].conn.and_then(|at| self.conns.get_mut(&at)) else {
            return Ok(());
        };
        let Some(msg) = conn.to_client.pop_front() else {
            if !conn.daemon_open {
                self.hang_up(p);
            }
            return Ok(());
        };
        match msg {
            Msg::Hello {
                token,
                adopted,
                incarnation,
            } => {
                self.procs[p].token = token;
                self.procs[p].incarnation = incarnation;
                self.event("hello", [p as u64, token, u64::from(adopted)]);
            }
            Msg::Reply {
                id,
                reply,
                held,
                mapping,
            } => {
                let Some(what) = self.procs[p].pending.remove(&id) else {
                    return Ok(());
                };
                return self.answered(p, what, *reply, held, mapping);
            }
        }
        Ok(())
    }

    fn answered(
        &mut self,
        p: usize,
        what: Pending,
        reply: Reply,
        held: Vec<crate::model::Held>,
        mapping: Option<Mapping>,
    ) -> Check {
        match (what, reply) {
            (Pending::Register(at), Reply::Registered { namespace, .. }) => {
                let proc = &mut self.procs[p];
                proc.names[at] = Some(namespace);
                if proc.role.copies() {
                    proc.mapping = mapping;
                }
            }
            (Pending::Fence(past), Reply::Fenced) => {
                self.procs[p].past.retain(|token| *token != past)
            }
            (Pending::Fence(past), Reply::Failure(failure)) => {
                // Only a liar's past can be refused; it goes on as if there were none.
                let honest = self.instances[self.procs[p].instance].honest();
                ensure!(
                    !honest || failure.ends_session,
                    0,
                    "an honest process could not fence its past: {}",
                    failure.text
                );
                self.event("fence refused", [p as u64, failure.kind as u64, 0]);
                self.procs[p].past.retain(|token| *token != past);
            }
            (Pending::Register(_), Reply::Failure(_)) => {
                // Limits: nothing to be done but to come back later.
                self.hang_up(p);
                let pause = self.rng.spread(100, 100_000);
                self.procs[p].retry_at = self.clock.us() + pause;
            }
            (
                Pending::Lookup {
                    space,
                    group,
                    hashes,
                },
                Reply::Lookup(found),
            ) => {
                self.looked_up(p, space, group, &hashes, &found);
            }
            (Pending::Reserve { space, known }, Reply::Reserve(_)) => {
                self.reserved(p, space, known, held)
            }
            (Pending::Load { space }, Reply::Load(found)) => self.may_read(p, space, &found, held),
            _ => {}
        }
        Ok(())
    }

    /// The process gives its connection up, or sees that it is gone. Copies under way go on.
    pub(crate) fn hang_up(&mut self, p: usize) {
        let proc = &mut self.procs[p];
        if let Some(at) = proc.conn.take()
            && let Some(conn) = self.conns.get_mut(&at)
        {
            conn.client_open = false;
            conn.to_client.clear();
        }
        if proc.token != 0 {
            proc.past.push(proc.token);
        }
        proc.token = 0;
        proc.ready = false;
        proc.pending.clear();
        proc.read.clear();
        proc.leases.clear();
        proc.to_load.clear();
        proc.retry_at = self.clock.us() + self.rng.spread(10, 50_000);
        let past = self.procs[p].past.last().copied().unwrap_or(0);
        self.event("hangs up", [p as u64, past, 0]);
    }
}
