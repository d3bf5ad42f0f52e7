//! The one entry point: an input comes in, state changes, outputs go out.
//! Deliberately absent: anything that outlives the step; there is no queue in here.

use crate::api::{Chain, ErrorKind, Failure, Input, NIL, Output, Reply, Request};
use crate::disk::Asked;
use crate::ids::{Now, RequestId, Role, SessionId};
use crate::sessions::Opening;
use crate::state::Core;

/// Deadlines handled in one step at most; the next step goes on.
const DUE: usize = 4096;

/// Who asks, resolved.
#[derive(Clone, Copy)]
pub(crate) struct Caller {
    pub(crate) session: u32,
    pub(crate) tenant: usize,
    pub(crate) instance: u32,
}

impl Core {
    /// Takes one input and appends what must be done to `out`, in order. Time never goes back: an earlier `now` is taken as
    /// the latest one given. Never panics on what a client sent.
    pub fn step(&mut self, now: Now, input: Input<'_>, out: &mut Vec<Output>) {
        self.now = self.now.max(now.0);
        self.stamp = self.stamp.wrapping_add(1);
        self.due(out);
        match input {
            Input::Tenant {
                tenant,
                name,
                limits,
            } => self.add_tenant(tenant, name, limits),
            Input::Arena {
                tenant,
                shape,
                adopted,
            } => self.set_arena(tenant, shape, adopted, out),
            Input::ExtentReady { tenant, extent } => self.populated(tenant, extent, false),
            Input::ExtentFailed { tenant, extent } => self.populated(tenant, extent, true),
            Input::Opened {
                session,
                tenant,
                instance,
                role,
                rank,
                world,
                label,
                past,
            } => {
                let opening = Opening {
                    session,
                    tenant,
                    instance,
                    role,
                    rank,
                    world,
                    label,
                    past,
                };
                self.opened(opening, out);
            }
            Input::Detached { session } => self.detached(session, out),
            Input::Gone { session } => self.gone(session, out),
            Input::Closed { session } => self.closed(session, out),
            Input::Request { session, id, body } => self.request(session, id, body, out),
            Input::StoreOpened { store, shape } => self.store_opened(store, shape),
            Input::StoreNamespace { store, record } => self.store_has_namespace(store, record),
            Input::StoreBlocks { store, blocks } => self.store_has_blocks(store, blocks, out),
            Input::StoreSwitched { store, on } => self.store_switched(store, on, out),
            Input::StoreDone { store: _, done } => self.store_done(done, out),
            Input::Tick => {}
        }
        self.write_what_goes_next(out);
        self.sweep(out);
    }

    /// Fills and leases whose time is up.
    fn due(&mut self, out: &mut Vec<Output>) {
        self.fills_due(DUE, out);
        self.reads_due(DUE);
        self.lookups_due(DUE);
        self.waits_due(DUE, out);
        self.drops_due(out);
    }

    fn request(
        &mut self,
        session: SessionId,
        id: RequestId,
        body: Request<'_>,
        out: &mut Vec<Output>,
    ) {
        self.counters.requests += 1;
        let reply = self
            .caller(session)
            .and_then(|caller| self.serve(caller, id, body, out));
        let reply = match reply {
            Ok(Some(reply)) => reply,
            // A load that waits for a slower tier.
            Ok(None) => return,
            Err(failure) => {
                self.counters.refused += 1;
                Reply::Failure(failure)
            }
        };
        let reply = Box::new(reply);
        out.push(Output::Reply { session, id, reply });
    }

    fn caller(&self, token: SessionId) -> Result<Caller, Failure> {
        let session = self.tokens.get(&token).copied().unwrap_or(NIL);
        if session == NIL || !self.sessions[session].attached {
            let text = "this session is not attached; connect and say hello again";
            return Err(Failure::fatal(ErrorKind::NotFound, text));
        }
        let found = &self.sessions[session];
        if found.role == Role::Observer {
            let text = "an observer may only ask for status; attach as scheduler, worker or both";
            return Err(Failure::invalid(text));
        }
        Ok(Caller {
            session,
            tenant: found.tenant,
            instance: found.instance,
        })
    }

    fn serve(
        &mut self,
        caller: Caller,
        id: RequestId,
        body: Request<'_>,
        out: &mut Vec<Output>,
    ) -> Result<Option<Reply>, Failure> {
        let reply = match body {
            Request::Register { record, groups } => self.register(caller, record, groups, out),
            Request::Lookup {
                namespace,
                chains,
                lease_ms,
                scope,
            } => self.lookup(caller, namespace, chains, (lease_ms, scope), out),
            Request::Reserve { namespace, chains } => self.reserve(caller, namespace, chains, out),
            Request::Commit {
                namespace,
                group,
                slots,
                generations,
                crcs,
            } => {
                let list = self.pairs(slots, generations)?;
                self.commit(caller, namespace, group, list, crcs, out)
            }
            Request::Abort { slots, generations } => {
                let list = self.pairs(slots, generations)?;
                Ok(self.abort(caller, list, out))
            }
            Request::Load {
                namespace,
                group,
                hashes,
                deadline_ms,
            } => {
                self.bounded("hashes", hashes.len())?;
                let space = self.space_of(caller, namespace)?;
                let group = self.group_of(space, group)?;
                let asked = Asked {
                    id,
                    namespace,
                    space,
                    group,
                    hashes,
                    deadline_ms,
                };
                return self.load(caller, &asked, out);
            }
            Request::Release {
                slots,
                generations,
                corrupt,
                lease,
            } => {
                let list = self.pairs(slots, generations)?;
                self.release(caller, list, corrupt, lease, out)
            }
            Request::Fence { past } => self.fence(caller, past, out),
        };
        reply.map(Some)
    }

    /// Refuses lists beyond the limit.
    pub(crate) fn bounded(&self, what: &str, length: usize) -> Result<(), Failure> {
        let most = self.settings.max_hashes;
        if length > most as usize {
            let text = format!("{length} {what} in one request; send at most {most} at a time");
            return Err(Failure::invalid(text));
        }
        Ok(())
    }

    /// Refuses more chains, or more hashes in them, than there may be; else so many hashes there are.
    pub(crate) fn bounded_chains(&self, chains: &[Chain<'_>]) -> Result<usize, Failure> {
        let most = self.settings.max_chains;
        if chains.len() > most as usize {
            let text = format!(
                "{} chains in one request; send at most {most}",
                chains.len()
            );
            return Err(Failure::invalid(text));
        }
        let hashes = chains.iter().map(|chain| chain.hashes.len());
        let hashes = hashes.fold(0, usize::saturating_add);
        self.bounded("hashes", hashes)?;
        Ok(hashes)
    }

    fn pairs<'a>(&self, slots: &'a [u32], generations: &'a [u64]) -> Result<SlotList<'a>, Failure> {
        self.bounded("slots", slots.len())?;
        if slots.len() != generations.len() {
            let (s, g) = (slots.len(), generations.len());
            let text = format!("{s} slots but {g} generations; give one generation for each slot");
            return Err(Failure::invalid(text));
        }
        Ok(SlotList { slots, generations })
    }
}

/// Slots with their generations: as many of one as of the other.
#[derive(Clone, Copy)]
pub(crate) struct SlotList<'a> {
    slots: &'a [u32],
    generations: &'a [u64],
}

impl SlotList<'_> {
    pub(crate) fn len(&self) -> usize {
        self.slots.len()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (u32, u64)> {
        self.slots
            .iter()
            .copied()
            .zip(self.generations.iter().copied())
    }
}
