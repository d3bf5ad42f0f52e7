//! Sessions and the engine instances that they belong to: opening, detaching, ending, fencing.
//!
//! A session whose socket closed while it may be copying is kept as *detached* until it is gone, closed or fenced, because its
//! copy records keep slots from being reused. Deliberately absent: sockets and pidfds, by which the node knows what happened.

use crate::api::{ErrorKind, Failure, Output, Reply};
use crate::crews::Team;
use crate::fills::ByInstance;
use crate::ids::{InstanceId, Role, SessionId, TenantId};
use crate::list::List;
use crate::settings::{MAX_WRITERS, OBSERVERS};
use crate::state::Core;
use crate::step::Caller;

/// Longest label that is kept, bytes.
const LABEL: usize = 128;
/// Most ranks of an instance.
const MAX_WORLD: u32 = 256;

/// How a session's instance cuts one group, and what the session copies of it.
#[derive(Debug)]
pub(crate) struct Layout {
    pub(crate) group: u8,
    pub(crate) cut: u16,
    pub(crate) part: Option<u32>,
}

/// A namespace that a session has registered; its position in the session's list is its short name.
#[derive(Debug)]
pub(crate) struct Joined {
    pub(crate) space: u32,
    pub(crate) layouts: Vec<Layout>,
}

/// One process. A place with token 0 is vacant.
#[derive(Debug, Default)]
pub(crate) struct Session {
    pub(crate) token: SessionId,
    pub(crate) tenant: usize,
    pub(crate) instance: u32,
    pub(crate) role: Role,
    pub(crate) rank: u32,
    pub(crate) world: u32,
    pub(crate) label: String,
    pub(crate) past: Option<SessionId>,
    /// Its socket is open.
    pub(crate) attached: bool,
    pub(crate) opened: u64,
    pub(crate) joined: Vec<Joined>,
    /// Parts it may be writing.
    pub(crate) writing: u32,
    /// Read leases it holds, whatever their counts.
    pub(crate) reads: u32,
    pub(crate) lookups: u32,
    /// Loads that wait for a slower tier.
    pub(crate) waits: u32,
}

impl Session {
    /// Its part of a group, if it copies one.
    pub(crate) fn layout(&self, space: u32, group: u8) -> Option<&Layout> {
        let joined = self.joined.iter().find(|joined| joined.space == space)?;
        joined.layouts.iter().find(|layout| layout.group == group)
    }

    fn idle(&self) -> bool {
        self.writing == 0 && self.reads == 0 && self.lookups == 0
    }
}

/// One engine instance: claims are its, not its sessions'. It lives while it has sessions.
#[derive(Debug, Default)]
pub(crate) struct Instance {
    pub(crate) id: InstanceId,
    pub(crate) tenant: usize,
    pub(crate) sessions: Vec<u32>,
    pub(crate) teams: Vec<Team>,
    /// Crews it has, retired ones included.
    pub(crate) crews: u32,
    /// What it is filling, quarantined slots included.
    pub(crate) claims: List<ByInstance>,
}

/// A good Hello.
pub(crate) struct Opening<'a> {
    pub(crate) session: SessionId,
    pub(crate) tenant: TenantId,
    pub(crate) instance: InstanceId,
    pub(crate) role: Role,
    pub(crate) rank: u32,
    pub(crate) world: u32,
    pub(crate) label: &'a str,
    pub(crate) past: Option<SessionId>,
}

impl Core {
    pub(crate) fn opened(&mut self, opening: Opening<'_>, out: &mut Vec<Output>) {
        let tenant = match self.admit(&opening, out) {
            Ok(tenant) => tenant,
            Err(failure) => {
                self.counters.sessions_ended += 1;
                out.push(Output::EndSession {
                    session: opening.session,
                    failure,
                });
                return;
            }
        };
        let key = (tenant, opening.instance);
        let instance = self.instance_ids.get(&key).copied().unwrap_or_else(|| {
            let id = opening.instance;
            let at = self.instances.insert(Instance {
                id,
                tenant,
                ..Instance::default()
            });
            self.instance_ids.insert(key, at);
            at
        });
        let cut = (0..=LABEL.min(opening.label.len()))
            .rev()
            .find(|n| opening.label.is_char_boundary(*n));
        let session = self.sessions.insert(Session {
            token: opening.session,
            tenant,
            instance,
            role: opening.role,
            rank: opening.rank,
            world: opening.world,
            label: opening.label[..cut.unwrap_or(0)].to_owned(),
            past: opening.past,
            attached: true,
            opened: self.now,
            ..Session::default()
        });
        self.tokens.insert(opening.session, session);
        self.instances[instance].sessions.push(session);
        *self.sessions_of(tenant, opening.role) += 1;
        self.counters.sessions_opened += 1;
        self.write_table(tenant, out);
    }

    /// How many sessions of the tenant are counted with one of this role.
    fn sessions_of(&mut self, tenant: usize, role: Role) -> &mut u32 {
        let tenant = &mut self.tenants[tenant];
        match role {
            Role::Observer => &mut tenant.observers,
            Role::Scheduler | Role::Worker | Role::Both => &mut tenant.sessions,
        }
    }

    /// Whether this session may open. Its own past session, if still attached here, is detached by this.
    fn admit(&mut self, opening: &Opening<'_>, out: &mut Vec<Output>) -> Result<usize, Failure> {
        let refuse = |kind, text: String| Err(Failure::fatal(kind, text));
        let Some(t) = self.tenant_ids.get(&opening.tenant).copied() else {
            return refuse(ErrorKind::NotFound, "there is no such tenant here".into());
        };
        if opening.session.0 == 0 || self.knows(opening.session) {
            return refuse(
                ErrorKind::Internal,
                "the session token is taken; connect again".into(),
            );
        }
        let copies = opening.role.copies();
        if copies && (opening.world > MAX_WORLD || opening.rank >= opening.world) {
            let (rank, world) = (opening.rank, opening.world);
            let text =
                format!("rank {rank} of {world}; ranks count from 0 and {MAX_WORLD} are the most");
            return refuse(ErrorKind::Invalid, text);
        }
        self.detach_past(t, opening, out);
        let (limit, remedy) = match opening.role {
            Role::Observer => (OBSERVERS, ""),
            Role::Scheduler | Role::Worker | Role::Both => {
                (self.tenants[t].limits.sessions, ", or raise max_sessions")
            }
        };
        if *self.sessions_of(t, opening.role) >= limit {
            let text = format!("the limit of {limit} sessions is reached: close one{remedy}");
            return refuse(ErrorKind::Busy, text);
        }
        let all: u32 = self.tenants.iter().map(|tenant| tenant.sessions).sum();
        if opening.role != Role::Observer && all >= self.settings.max_sessions {
            let text = format!("the daemon has {all} sessions, as many as it may: close one");
            return refuse(ErrorKind::Busy, text);
        }
        if !copies {
            return Ok(t);
        }
        if self.copiers(t).count() + self.tenants[t].unfenced.len() >= MAX_WRITERS {
            let text = format!("{MAX_WRITERS} sessions may copy already; close one");
            return refuse(ErrorKind::Busy, text);
        }
        for other in self.copying(t, opening.instance) {
            if other.world != opening.world {
                let (world, theirs) = (opening.world, other.world);
                let text = format!(
                    "a world of {world}, but this instance has {theirs}; give each engine its own instance id"
                );
                return refuse(ErrorKind::Invalid, text);
            }
            if other.rank == opening.rank {
                let rank = opening.rank;
                let text = format!(
                    "rank {rank} of this instance is attached already; wait for it to end or use another instance id"
                );
                return refuse(ErrorKind::Busy, text);
            }
        }
        Ok(t)
    }

    /// Attached sessions of an instance that copy.
    fn copying(&self, t: usize, instance: InstanceId) -> impl Iterator<Item = &Session> {
        let at = self.instance_ids.get(&(t, instance));
        let list = at.map_or(&[][..], |at| &self.instances[*at].sessions);
        let sessions = list.iter().map(|s| &self.sessions[*s]);
        sessions.filter(|s| s.attached && s.role.copies())
    }

    /// A process that comes back before its old socket was seen to close.
    fn detach_past(&mut self, t: usize, opening: &Opening<'_>, out: &mut Vec<Output>) {
        let Some(past) = opening
            .past
            .and_then(|past| self.tokens.get(&past).copied())
        else {
            return;
        };
        let found = &self.sessions[past];
        let same = found.tenant == t
            && self.instances[found.instance].id == opening.instance
            && (found.role, found.rank) == (opening.role, opening.rank);
        if same && found.attached {
            let text = "the same process attached again";
            let failure = Failure::fatal(ErrorKind::Unavailable, text);
            out.push(Output::EndSession {
                session: found.token,
                failure,
            });
            self.detach(past, out);
        }
    }

    /// Its socket is closed: it gets no new copies, but what it may be copying stays its.
    fn detach(&mut self, session: u32, out: &mut Vec<Output>) {
        self.sessions[session].attached = false;
        self.end_waits_of(session);
        let (instance, role) = (self.sessions[session].instance, self.sessions[session].role);
        for at in 0..self.sessions[session].joined.len() {
            let space = self.sessions[session].joined[at].space;
            self.disband(instance, space, role);
        }
        self.relieved(session);
        self.sweep(out);
    }

    pub(crate) fn detached(&mut self, token: SessionId, out: &mut Vec<Output>) {
        if let Some(session) = self.tokens.get(&token).copied()
            && self.sessions[session].attached
        {
            self.detach(session, out);
        }
    }

    /// It said that its copies are over.
    pub(crate) fn closed(&mut self, token: SessionId, out: &mut Vec<Output>) {
        if let Some(session) = self.tokens.get(&token).copied() {
            self.end_session(session, out);
        }
    }

    /// Its process is dead, and with it whatever it began under its past session.
    pub(crate) fn gone(&mut self, token: SessionId, out: &mut Vec<Output>) {
        let Some(session) = self.tokens.get(&token).copied() else {
            return;
        };
        self.counters.sessions_gone += 1;
        self.end_past(session, out);
        self.end_session(session, out);
    }

    /// Whatever this process began under its past session, and under those before it, is over.
    fn end_past(&mut self, session: u32, out: &mut Vec<Output>) {
        let t = self.sessions[session].tenant;
        let (mut at, mut olds, mut tokens) = (session, Vec::new(), Vec::new());
        while let Some(past) = self.sessions[at].past {
            tokens.push(past);
            match self.past_of(at, past) {
                Some(old) if !olds.contains(&old) && old != session => olds.push(old),
                _ => break,
            }
            at = olds[olds.len() - 1];
        }
        olds.into_iter().for_each(|old| self.end_session(old, out));
        tokens
            .into_iter()
            .for_each(|token| self.fence_former(t, token, out));
    }

    /// The detached session that `past` names, if it is of the same process as `session`.
    fn past_of(&self, session: u32, past: SessionId) -> Option<u32> {
        let old = self.tokens.get(&past).copied()?;
        let (own, found) = (&self.sessions[session], &self.sessions[old]);
        let same = (found.tenant, found.instance) == (own.tenant, own.instance)
            && (found.role, found.rank) == (own.role, own.rank);
        (same && !found.attached).then_some(old)
    }

    /// The session's copies are terminal. Ends its leases and copy records and forgets it.
    fn end_session(&mut self, session: u32, out: &mut Vec<Output>) {
        self.end_waits_of(session);
        self.end_reads_of(session);
        self.end_lookups_of(session);
        self.end_writing_of(session, out);
        let old = self.sessions.remove(session);
        debug_assert!(old.idle(), "a session ended with records");
        self.tokens.remove(&old.token);
        *self.sessions_of(old.tenant, old.role) -= 1;
        self.tenants[old.tenant].joined -= old.joined.len() as u32;
        let instance = old.instance;
        self.instances[instance]
            .sessions
            .retain(|other| *other != session);
        for joined in &old.joined {
            self.disband(instance, joined.space, old.role);
            self.forget_teams(instance, joined.space);
            let space = self.spaces.get_mut(joined.space);
            space.sessions -= 1;
            space.used = self.now;
            self.drop_space_if_idle(joined.space);
        }
        if self.instances[instance].sessions.is_empty() {
            let gone = self.instances.remove(instance);
            debug_assert!(
                gone.claims.len() == 0 && gone.teams.is_empty(),
                "claims of nobody"
            );
            self.instance_ids.remove(&(gone.tenant, gone.id));
        }
        self.relieve_successors(old.token);
        self.write_table(old.tenant, out);
    }

    /// Every copy that this process began under `past`, or before it, is over.
    pub(crate) fn fence(
        &mut self,
        caller: Caller,
        past: SessionId,
        out: &mut Vec<Output>,
    ) -> Result<Reply, Failure> {
        let named = self.sessions[caller.session].past == Some(past);
        let own = named && self.past_of(caller.session, past).is_some();
        if self.knows(past) && !own {
            let text = "a process fences only its own past session, which it must name in hello";
            return Err(Failure::invalid(text));
        }
        match named {
            true => self.end_past(caller.session, out),
            // Of a former daemon, or forgotten: what can be left of it is its place in an adopted session table. Tokens are
            // secrets of their processes, so whoever has one may say this.
            false => self.fence_former(caller.tenant, past, out),
        }
        self.counters.fences += 1;
        Ok(Reply::Fenced)
    }

    /// Whether a detached session must be remembered: it has records or leases, or is the link to a past that has them.
    pub(crate) fn lingers(&self, session: u32) -> bool {
        let found = &self.sessions[session];
        let unfenced = &self.tenants[found.tenant].unfenced;
        let past = |p| unfenced.contains(&p) || self.past_of(session, p).is_some();
        !found.idle() || found.past.is_some_and(past)
    }

    /// Something that kept this session ended: if it is detached and that was the last, the end of the step forgets it.
    pub(crate) fn relieved(&mut self, session: u32) {
        let found = &self.sessions[session];
        if !found.attached && found.idle() {
            self.idle.push(session);
        }
    }

    /// The token is of no session any more: sessions that came after it may not have to be remembered.
    pub(crate) fn relieve_successors(&mut self, past: SessionId) {
        for session in self.sessions.range() {
            if self.sessions[session].token.0 != 0 && self.sessions[session].past == Some(past) {
                self.relieved(session);
            }
        }
    }

    pub(crate) fn sweep(&mut self, out: &mut Vec<Output>) {
        while let Some(session) = self.idle.pop() {
            let found = &self.sessions[session];
            if found.token.0 != 0 && !found.attached && !self.lingers(session) {
                self.end_session(session, out);
            }
        }
    }
}
