//! The daemon's side of a simulated node: the real [`Node`] on simulated ports, and what `kvd-serve` does around it (sockets,
//! process notices, faulting memory in, ticking), one small step at a time.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::rc::Rc;

use kvd_core::tier::{OpId, Place};
use kvd_core::{InstanceId, Reply, RequestId, Role, SessionId, TenantId};
use kvd_node::{Effect, Node, Opening, TenantSpec};

use crate::ask::Ask;
use crate::clock::{SimClock, SimEntropy};
use crate::config::{self, NamespaceSpec};
use crate::memory::{Event, Job, Mapping, Offer, SimArena};
use crate::model::Held;
use crate::plant::Plant;
use crate::report::{Check, ensure};
use crate::rng::Rng;
use crate::tier::SimStores;
use crate::tiers::{News, Wait};
use crate::world::World;

/// The very node that the daemon runs.
pub(crate) type SimNode = Node<SimClock, SimEntropy, SimArena, SimStores>;

/// What a client says first.
pub(crate) struct Hello {
    pub(crate) instance: [u8; 16],
    pub(crate) role: Role,
    pub(crate) rank: u32,
    pub(crate) world: u32,
    pub(crate) past: u64,
    pub(crate) offer: Option<Offer>,
}

/// From a client.
pub(crate) enum Frame {
    Hello(Hello),
    Ask(u32, Ask),
    Bye,
}

/// To a client.
pub(crate) enum Msg {
    Hello {
        token: u64,
        adopted: bool,
        /// Names this start of the daemon.
        incarnation: [u8; 16],
    },
    Reply {
        id: u32,
        reply: Box<Reply>,
        /// What the model knows of each slot in the reply.
        held: Vec<Held>,
        /// With Registered: the descriptors.
        mapping: Option<Mapping>,
    },
}

/// One socket.
pub(crate) struct Conn {
    pub(crate) proc: usize,
    pub(crate) tenant: u16,
    pub(crate) token: u64,
    pub(crate) to_daemon: VecDeque<Frame>,
    pub(crate) to_client: VecDeque<Msg>,
    pub(crate) client_open: bool,
    pub(crate) daemon_open: bool,
}

/// What the checkers know of a session of the running daemon.
pub(crate) struct SessionInfo {
    pub(crate) conn: u64,
    pub(crate) proc: usize,
    /// By whose socket it came.
    pub(crate) tenant: u16,
    /// Requests without a reply.
    pub(crate) open: BTreeMap<u32, Ask>,
    /// Of the loads among them.
    pub(crate) waits: BTreeMap<u32, Wait>,
    /// Short names.
    pub(crate) names: BTreeMap<u32, Rc<NamespaceSpec>>,
}

/// One start of the daemon.
pub(crate) struct Daemon {
    pub(crate) node: SimNode,
    pub(crate) sessions: BTreeMap<u64, SessionInfo>,
    /// Extents being faulted in.
    pub(crate) jobs: Vec<Job>,
    /// A removal that a planted bug has hidden.
    pub(crate) hidden: u64,
    pub(crate) calls: u64,
    /// What stores have told and the node has not heard.
    pub(crate) news: VecDeque<(usize, News)>,
    /// Which stores are on, as far as the node knows.
    pub(crate) on: Vec<bool>,
    /// Places of drops that the node has not heard of.
    pub(crate) drops: BTreeMap<OpId, Place>,
    /// What a planted bug has told already.
    pub(crate) told: BTreeSet<OpId>,
}

impl World {
    /// Starts a daemon.
    pub(crate) fn start_daemon(&mut self) -> Check {
        let seed = self.rng.next();
        let entropy = SimEntropy::new(Rng::new(seed, 2));
        let node = Node::with_stores(
            self.config.node.clone(),
            self.clock.clone(),
            entropy,
            self.arenas.clone(),
            self.tier.clone(),
        );
        self.daemon = Some(Daemon {
            node,
            sessions: BTreeMap::new(),
            jobs: Vec::new(),
            hidden: 0,
            calls: 0,
            news: VecDeque::new(),
            on: Vec::new(),
            drops: BTreeMap::new(),
            told: BTreeSet::new(),
        });
        self.event("daemon starts", [seed, 0, 0]);
        self.counters.add("daemon starts");
        let again = self.counters.get("daemon starts") > 1;
        for (tenant, limits) in self.config.limits.clone().into_iter().enumerate() {
            let spec = TenantSpec {
                name: config::tenant_name(tenant),
                limits,
                expect_offers: again,
            };
            self.call(|node| {
                node.add_tenant(spec);
            })?;
        }
        self.open_stores()
    }

    /// Kills the daemon: its sockets close, its memory lives on in the clients.
    pub(crate) fn kill_daemon(&mut self) {
        self.kill_stores();
        self.daemon = None;
        self.arenas.forget();
        self.model.daemon_died();
        for conn in self.conns.values_mut() {
            conn.daemon_open = false;
            // What was written to the socket can still be read; what was not taken from it is lost.
            conn.to_daemon.clear();
        }
        self.event("daemon dies", [0; 3]);
        self.counters.add("daemon deaths");
        self.restart_at = self.clock.us() + self.rng.spread(100, 200_000);
    }

    /// Calls the node, and judges and carries out all that came of it.
    pub(crate) fn call<R>(&mut self, f: impl FnOnce(&mut SimNode) -> R) -> Check<Option<R>> {
        let Some(daemon) = &mut self.daemon else {
            return Ok(None);
        };
        daemon.calls += 1;
        let result = f(&mut daemon.node);
        if self.arenas.burnt() {
            self.counters.add("deaths in mid-step");
            self.kill_daemon();
            return Ok(None);
        }
        self.after_call()?;
        Ok(Some(result))
    }

    fn after_call(&mut self) -> Check {
        let events = self.arenas.take_events();
        for event in &events {
            match *event {
                Event::Arena {
                    tenant,
                    adopted,
                    stale,
                } => {
                    let mapping = self.arenas.current(tenant);
                    self.model.arena(tenant, mapping)?;
                    self.counters.add(if adopted {
                        "arenas adopted"
                    } else {
                        "arenas made"
                    });
                    if stale {
                        self.counters.add("arenas adopted under an old table");
                    }
                    self.event(
                        "arena",
                        [u64::from(tenant), u64::from(adopted), u64::from(stale)],
                    );
                }
                Event::Populate(_) => {}
                Event::Word { slot, old, new, .. } => {
                    self.event("word", [u64::from(slot), old, new])
                }
            }
        }
        let changes = self.read_changes()?;
        let settled = self.model.apply(&events, &changes)?;
        self.check_settled(&settled)?;
        self.check_stored(&changes)?;
        for begun in self.tier.take_begun() {
            self.tell_early(begun.store, &begun.op);
            self.begun(begun)?;
        }
        for event in &events {
            if let Event::Populate(job) = *event {
                self.begin_job(job)?;
            }
        }
        while let Some(effect) = self.daemon.as_mut().and_then(|d| d.node.take_effect()) {
            self.effect(effect)?;
        }
        for (tenant, t) in self.model.tenants.iter().enumerate() {
            ensure!(
                t.fresh.is_empty(),
                3,
                "tenant {tenant}: words {:?} went odd for nobody",
                t.fresh
            );
        }
        self.check_daemon()
    }

    /// An extent is to be faulted in. One whose bytes went bad loses its pages first.
    fn begin_job(&mut self, job: Job) -> Check {
        if let Some(daemon) = &mut self.daemon {
            daemon.jobs.push(job);
        }
        if !job.again {
            return Ok(());
        }
        let t = &self.model.tenants[usize::from(job.tenant)];
        let Some(mapping) = &t.mapping else {
            return Ok(());
        };
        let size = mapping.shape.extent_bytes;
        let (from, to) = (
            u64::from(job.extent) * size,
            u64::from(job.extent + 1) * size,
        );
        let held = t.residents.values().chain(t.claims.values());
        let mut inside = held.filter(|h| h.offset < to && h.offset + h.len > from);
        ensure!(
            inside.next().is_none(),
            3,
            "extent {} is refilled while slots in it are in use",
            job.extent
        );
        self.no_writers(mapping.memory.serial, from, size, "refilled")?;
        mapping.memory.poison(from, size, 0);
        self.counters.add("extents refilled");
        Ok(())
    }

    fn effect(&mut self, effect: Effect) -> Check {
        match effect {
            Effect::Reply { session, id, reply } => {
                self.counters.add("replies");
                if self.options.plant == Some(Plant::LoseReply) && self.rng.one_in(500) {
                    return Ok(());
                }
                if self.options.plant == Some(Plant::DoubleReply) && self.rng.one_in(500) {
                    self.reply(session.0, id.0, reply.clone())?;
                }
                self.reply(session.0, id.0, reply)
            }
            Effect::End { session, failure } => {
                self.event("session ended", [session.0, failure.kind as u64, 0]);
                self.counters.add("sessions ended");
                if let Some(info) = self
                    .daemon
                    .as_ref()
                    .and_then(|d| d.sessions.get(&session.0))
                {
                    let conn = info.conn;
                    self.close_conn(conn);
                }
                Ok(())
            }
        }
    }

    fn reply(&mut self, session: u64, id: u32, reply: Box<Reply>) -> Check {
        let info = self
            .daemon
            .as_mut()
            .and_then(|d| d.sessions.get_mut(&session));
        ensure!(
            info.is_some(),
            5,
            "a reply to session {session:x}, which is not there"
        );
        let Some(info) = info else { return Ok(()) };
        let ask = info.open.remove(&id);
        ensure!(
            ask.is_some(),
            5,
            "a reply to request {id} of {session:x}, which does not wait for one"
        );
        let Some(ask) = ask else { return Ok(()) };
        let (conn, tenant) = (info.conn, info.tenant);
        let wait = info.waits.remove(&id);
        let held = self.judge_reply(session, &ask, wait.as_ref(), &reply)?;
        let mapping = match *reply {
            Reply::Registered { .. } => self.arenas.current(tenant),
            _ => None,
        };
        if let Some(mapping) = &mapping {
            self.given[usize::from(tenant)] = Some(mapping.table.serial);
        }
        let ends = matches!(&*reply, Reply::Failure(f) if f.ends_session);
        if let Some(conn) = self.conns.get_mut(&conn) {
            conn.to_client.push_back(Msg::Reply {
                id,
                reply,
                held,
                mapping,
            });
        }
        if ends {
            self.close_conn(conn);
        }
        Ok(())
    }

    /// The daemon closes a socket. The requests in it, read or not, need no reply any more.
    pub(crate) fn close_conn(&mut self, at: u64) {
        let Some(conn) = self.conns.get_mut(&at) else {
            return;
        };
        conn.daemon_open = false;
        conn.to_daemon.clear();
        let token = conn.token;
        if let Some(info) = self
            .daemon
            .as_mut()
            .and_then(|d| d.sessions.get_mut(&token))
        {
            info.open.clear();
            info.waits.clear();
        }
    }

    /// The daemon reads one frame of this socket, or sees that it is closed.
    pub(crate) fn serve(&mut self, at: u64) -> Check {
        let Some(conn) = self.conns.get_mut(&at).filter(|c| c.daemon_open) else {
            return Ok(());
        };
        let (tenant, token) = (conn.tenant, conn.token);
        let Some(frame) = conn.to_daemon.pop_front() else {
            if !conn.client_open {
                conn.daemon_open = false;
                self.event("detached", [token, 0, 0]);
                if token != 0 {
                    self.close_conn(at);
                    self.call(|node| node.detached(TenantId(tenant), SessionId(token)))?;
                }
            }
            return Ok(());
        };
        match frame {
            Frame::Hello(hello) => self.serve_hello(at, tenant, hello),
            Frame::Ask(id, ask) => self.serve_ask(at, id, ask),
            Frame::Bye => {
                self.close_conn(at);
                self.event("closed", [token, 0, 0]);
                self.call(|node| node.closed(TenantId(tenant), SessionId(token)))?;
                Ok(())
            }
        }
    }

    fn serve_hello(&mut self, at: u64, tenant: u16, mut hello: Hello) -> Check {
        let mut socket = tenant;
        if self.options.plant == Some(Plant::MixTenants) && self.rng.one_in(4) {
            socket = (tenant + 1) % self.config.limits.len() as u16;
        }
        let mut adopted = false;
        let any = self.options.plant == Some(Plant::OldTables);
        let given = self.given[usize::from(socket)];
        if let Some(offer) = hello
            .offer
            .take()
            .filter(|offer| any || Some(offer.mapping.table.serial) == given)
        {
            adopted = self
                .call(|node| node.offer(TenantId(socket), offer))?
                .unwrap_or(false);
        }
        let proc = self.conns[&at].proc;
        let label = format!("proc-{proc}");
        let opening = Opening {
            tenant: TenantId(socket),
            instance: InstanceId(hello.instance),
            role: hello.role,
            rank: hello.rank,
            world: hello.world,
            label: &label,
            past: (hello.past != 0).then_some(SessionId(hello.past)),
        };
        // The session must be known to the checkers before its first effects are looked at.
        let Some(daemon) = &mut self.daemon else {
            return Ok(());
        };
        daemon.calls += 1;
        let token = daemon.node.open(&opening).0;
        let info = SessionInfo {
            conn: at,
            proc,
            tenant: socket,
            open: BTreeMap::new(),
            waits: BTreeMap::new(),
            names: BTreeMap::new(),
        };
        let incarnation = daemon.node.incarnation();
        let admitted = daemon.node.knows(SessionId(token));
        daemon.sessions.insert(token, info);
        if let Some(conn) = self.conns.get_mut(&at).filter(|_| admitted) {
            conn.token = token;
            conn.to_client.push_back(Msg::Hello {
                token,
                adopted,
                incarnation,
            });
            self.owners.insert(token, proc);
            self.procs[proc].sessions.push(token);
            if !self.procs[proc].alive {
                // It died with its first message in the socket.
                self.notify_death(token);
            }
        }
        self.event("opened", [token, proc as u64, u64::from(admitted)]);
        if self.arenas.burnt() {
            self.kill_daemon();
            return Ok(());
        }
        self.after_call()
    }

    fn serve_ask(&mut self, at: u64, id: u32, ask: Ask) -> Check {
        let (tenant, token) = (self.conns[&at].tenant, self.conns[&at].token);
        let Some(daemon) = &mut self.daemon else {
            return Ok(());
        };
        let socket = daemon.sessions[&token].tenant;
        if matches!(ask, Ask::Register { .. }) && daemon.node.registrations_wait(TenantId(socket)) {
            if let Some(conn) = self.conns.get_mut(&at) {
                conn.to_daemon.push_front(Frame::Ask(id, ask));
            }
            return Ok(());
        }
        let given = if socket == tenant {
            ask.clone()
        } else {
            self.translated(&ask, socket)
        };
        let info = self.session(token);
        let wait = info.and_then(|info| self.wait_of(info, &ask));
        if let Some(info) = self
            .daemon
            .as_mut()
            .and_then(|d| d.sessions.get_mut(&token))
        {
            info.open.insert(id, ask);
            info.waits.extend(wait.map(|wait| (id, wait)));
        }
        self.event("request", [token, u64::from(id), given.code()]);
        self.counters.add("requests");
        self.call(|node| {
            given.lend(|body| node.request(TenantId(socket), SessionId(token), RequestId(id), body))
        })?;
        self.check_waits()
    }

    /// For [`Plant::MixTenants`]: the same model's record as the other tenant has it.
    fn translated(&self, ask: &Ask, socket: u16) -> Ask {
        let Ask::Register { record, groups } = ask else {
            return ask.clone();
        };
        let all = &self.config.namespaces;
        let per_tenant = all.len() / self.config.limits.len();
        let record = match all.iter().position(|ns| ns.record == *record) {
            Some(at) => all[usize::from(socket) * per_tenant + at % per_tenant]
                .record
                .clone(),
            None => record.clone(),
        };
        Ask::Register {
            record,
            groups: groups.clone(),
        }
    }

    /// The node hears that a process is dead.
    pub(crate) fn notice_death(&mut self, token: u64) -> Check {
        let Some(info) = self.daemon.as_ref().and_then(|d| d.sessions.get(&token)) else {
            return Ok(());
        };
        let (tenant, conn) = (info.tenant, info.conn);
        self.close_conn(conn);
        self.event("gone", [token, 0, 0]);
        self.call(|node| {
            if node.knows(SessionId(token)) {
                node.gone(TenantId(tenant), SessionId(token));
            }
        })?;
        Ok(())
    }

    /// One extent has been faulted in, or could not be.
    pub(crate) fn finish_job(&mut self, failed: bool) -> Check {
        let Some(daemon) = self.daemon.as_mut().filter(|d| !d.jobs.is_empty()) else {
            return Ok(());
        };
        let job = daemon.jobs.remove(0);
        self.event(
            "populated",
            [
                u64::from(job.tenant),
                u64::from(job.extent),
                u64::from(failed),
            ],
        );
        let reason = failed.then_some("no memory");
        self.call(|node| node.populated(TenantId(job.tenant), job.arena, job.extent, reason))?;
        Ok(())
    }

    /// Ticks if it is time to.
    pub(crate) fn tick_if_due(&mut self) -> Check {
        if self.options.plant == Some(Plant::NoTicks) {
            return Ok(());
        }
        let now = self.clock.us();
        let due = self.daemon.as_ref().and_then(|d| d.node.next_deadline());
        if due.is_some_and(|due| due.0 <= now) {
            self.event("tick", [0; 3]);
            self.call(|node| node.tick())?;
            self.check_waits()?;
        }
        Ok(())
    }
}
