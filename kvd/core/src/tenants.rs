//! Tenants and their arenas. A tenant is the trust domain, its arena the wall around it.
//! Deliberately absent: making memory; the node does that and says when it is there.

use std::collections::VecDeque;

use crate::api::{Adopted, ErrorKind, Failure, Output, TenantLimits};
use crate::geometry::ArenaShape;
use crate::ids::{SessionId, TenantId};
use crate::pool::Pool;
use crate::sessions::Session;
use crate::settings::MAX_WRITERS;
use crate::state::Core;

/// No daemon ever wrote words beyond this, so a table that has them is forged.
const GREATEST_WORD: u64 = 1 << 62;

/// One tenant.
pub(crate) struct Tenant {
    pub(crate) id: TenantId,
    pub(crate) name: String,
    pub(crate) limits: TenantLimits,
    pub(crate) pool: Option<Pool>,
    /// A former daemon's writers that have not fenced.
    pub(crate) unfenced: Vec<SessionId>,
    /// Sessions of former daemons whose copies are known to be over, in case an arena with their tokens is adopted yet. The
    /// oldest make room for new ones.
    pub(crate) over: VecDeque<SessionId>,
    /// The session table as it was last given out.
    pub(crate) table: Vec<SessionId>,
    /// Sessions that do more than look.
    pub(crate) sessions: u32,
    pub(crate) observers: u32,
    /// (session, namespace) pairs.
    pub(crate) joined: u32,
    pub(crate) namespaces: u32,
    /// Bytes of blocks with pins.
    pub(crate) pinned_bytes: u64,
    /// Bytes of slots into which blocks come up for loads.
    pub(crate) coming_bytes: u64,
    /// Bytes of slots with blocks that came up ahead, or are on their way, and that no load or lease has claimed.
    pub(crate) ahead_bytes: u64,
    /// Blocks among them that are on their way.
    pub(crate) ahead_reads: u32,
    /// Bytes of slots that wait for their writers, in quarantine.
    pub(crate) quarantined_bytes: u64,
    /// Slots in quarantine that a store that is off may still write.
    pub(crate) left_slots: u64,
}

impl Tenant {
    pub(crate) fn quarantine_limit(&self) -> u64 {
        match (self.limits.quarantine_bytes, &self.pool) {
            (0, Some(pool)) => pool.shape.bytes / 4,
            (limit, _) => limit,
        }
    }
}

impl Core {
    pub(crate) fn add_tenant(&mut self, id: TenantId, name: &str, limits: TenantLimits) {
        if self.tenant_ids.contains_key(&id) {
            return;
        }
        self.tenant_ids.insert(id, self.tenants.len());
        self.tenants.push(Tenant {
            id,
            name: name.to_owned(),
            limits,
            pool: None,
            unfenced: Vec::new(),
            over: VecDeque::new(),
            table: Vec::new(),
            sessions: 0,
            observers: 0,
            joined: 0,
            namespaces: 0,
            pinned_bytes: 0,
            coming_bytes: 0,
            ahead_bytes: 0,
            ahead_reads: 0,
            quarantined_bytes: 0,
            left_slots: 0,
        });
    }

    /// Whether the tenant's arena may no longer be replaced: a session has registered and so maps it, or it has slots in use.
    pub fn arena_in_use(&self, tenant: TenantId) -> bool {
        let Some(tenant) = self.tenant_ids.get(&tenant).map(|t| &self.tenants[*t]) else {
            return false;
        };
        let used = |pool: &Pool| {
            pool.extents
                .iter()
                .any(|extent| extent.used > 0 || extent.held)
        };
        tenant.joined > 0 || tenant.pool.as_ref().is_some_and(used)
    }

    pub(crate) fn set_arena(
        &mut self,
        id: TenantId,
        shape: ArenaShape,
        adopted: Option<Adopted<'_>>,
        out: &mut Vec<Output>,
    ) {
        if let Err(failure) = self.check_arena(id, shape, adopted.as_ref()) {
            out.push(Output::ArenaRefused {
                tenant: id,
                failure,
            });
            return;
        }
        let t = self.tenant_ids[&id];
        let mut pool = Pool::new(id, shape, self.settings.eviction, self.on_demotion());
        let tenant = &mut self.tenants[t];
        tenant.unfenced.clear();
        if let Some(adopted) = adopted {
            let held = pool.adopt(adopted.words, out);
            if held {
                let tokens = adopted.writers.iter().filter(|token| **token != 0);
                tenant.unfenced = tokens.map(|token| SessionId(*token)).collect();
                tenant.unfenced.sort();
                tenant.unfenced.dedup();
                tenant.unfenced.retain(|token| !tenant.over.contains(token));
                // Odd words without a writer are of blocks that were coming up from a store: that is over when the store can be
                // opened again, which comes first.
                if tenant.unfenced.is_empty() {
                    pool.lift_holds(out);
                }
            }
        }
        tenant.pool = Some(pool);
        tenant.table.clear();
        self.write_table(t, out);
    }

    fn check_arena(
        &self,
        id: TenantId,
        shape: ArenaShape,
        adopted: Option<&Adopted<'_>>,
    ) -> Result<(), Failure> {
        let refuse = |text: &str| Err(Failure::invalid(text));
        let Some(t) = self.tenant_ids.get(&id) else {
            return refuse("there is no such tenant; add it first");
        };
        if self.arena_in_use(id) {
            let text = "the present arena is in use; unmap the other once its copies are over";
            return Err(Failure::new(ErrorKind::Busy, text));
        }
        if let Err(error) = shape.validate() {
            return Err(Failure::invalid(error.to_string()));
        }
        let Some(adopted) = adopted else {
            return Ok(());
        };
        let slots = u64::from(shape.extents()) * u64::from(shape.slots_per_extent);
        if adopted.words.len() as u64 > slots {
            return refuse("the generation table is longer than the arena; offer one that fits");
        }
        if adopted.words.iter().any(|word| *word > GREATEST_WORD) {
            return refuse("the generation table was not written by a daemon; take new memory");
        }
        let own = self.copiers(*t).count();
        if adopted.writers.len() + own > MAX_WRITERS {
            return refuse("the session table is too long; take new memory");
        }
        Ok(())
    }

    pub(crate) fn populated(&mut self, id: TenantId, extent: u32, failed: bool) {
        if let Some(t) = self.tenant_ids.get(&id)
            && let Some(pool) = &mut self.tenants[*t].pool
        {
            pool.populated(extent, failed);
        }
    }

    /// Sessions of the tenant that may write now or later, in order of their places.
    pub(crate) fn copiers(&self, t: usize) -> impl Iterator<Item = &Session> {
        let all = self.sessions.range().map(|s| &self.sessions[s]);
        all.filter(move |s| s.token.0 != 0 && s.tenant == t && s.role.copies())
    }

    /// Those of them that may write now: they have registered, and so have the arena and know their own tokens. A token that
    /// its process never heard of could be fenced by nobody.
    fn writers(&self, t: usize) -> impl Iterator<Item = SessionId> {
        let registered = self.copiers(t).filter(|s| !s.joined.is_empty());
        registered.map(|s| s.token)
    }

    /// Gives out the session table if it has changed: whoever may write, of this daemon or a former one.
    pub(crate) fn write_table(&mut self, t: usize, out: &mut Vec<Output>) {
        if self.tenants[t].pool.is_none() {
            return;
        }
        let mut tokens: Vec<SessionId> = self.writers(t).collect();
        tokens.extend(&self.tenants[t].unfenced);
        debug_assert!(tokens.len() <= MAX_WRITERS, "session table overflows");
        let tenant = &mut self.tenants[t];
        if tenant.table != tokens {
            tenant.table.clone_from(&tokens);
            out.push(Output::WriterTable {
                tenant: tenant.id,
                tokens,
            });
        }
    }

    /// One former writer's copies are over; the last one frees what was held out. Remembered while the arena whose table may
    /// list it can still be adopted.
    pub(crate) fn fence_former(&mut self, t: usize, past: SessionId, out: &mut Vec<Output>) {
        let adoptable = !self.arena_in_use(self.tenants[t].id);
        let tenant = &mut self.tenants[t];
        let before = tenant.unfenced.len();
        tenant.unfenced.retain(|token| *token != past);
        if tenant.unfenced.len() == before {
            if adoptable && !tenant.over.contains(&past) {
                tenant.over.push_back(past);
                if tenant.over.len() > MAX_WRITERS {
                    tenant.over.pop_front();
                }
            }
            return;
        }
        if tenant.unfenced.is_empty()
            && let Some(pool) = &mut tenant.pool
        {
            pool.lift_holds(out);
        }
        self.relieve_successors(past);
        self.write_table(t, out);
    }
}
