//! The core's state in one piece. What each part means, and what may be done with it, is in the module of that part.
//! Deliberately absent: logic.

use std::collections::BTreeMap;

use crate::counters::{Counters, TierCounters};
use crate::crcs::Crcs;
use crate::crews::Crew;
use crate::disk::Disks;
use crate::fills::{ByDeadline, Fill};
use crate::ids::{InstanceId, Now, SessionId, TenantId};
use crate::index::Index;
use crate::leases::{LookupLeases, Reads};
use crate::list::List;
use crate::log::{ChangeLog, Changes};
use crate::sessions::{Instance, Session};
use crate::settings::Settings;
use crate::slab::Slab;
use crate::spaces::Spaces;
use crate::tenants::Tenant;

/// The metadata of one daemon. See [`Core::step`].
pub struct Core {
    pub(crate) settings: Settings,
    /// The greatest time that was given, microseconds.
    pub(crate) now: u64,
    /// Number of the present step, wrapping: the clock of recency.
    pub(crate) stamp: u32,
    pub(crate) counters: Counters,
    pub(crate) log: ChangeLog,
    pub(crate) tenants: Vec<Tenant>,
    pub(crate) tenant_ids: BTreeMap<TenantId, usize>,
    pub(crate) spaces: Spaces,
    pub(crate) index: Index,
    pub(crate) crcs: Crcs,
    pub(crate) sessions: Slab<Session, 16>,
    pub(crate) tokens: BTreeMap<SessionId, u32>,
    pub(crate) instances: Slab<Instance, 16>,
    pub(crate) instance_ids: BTreeMap<(usize, InstanceId), u32>,
    pub(crate) crews: Slab<Crew, 16>,
    pub(crate) fills: Slab<Fill, 256>,
    pub(crate) deadlines: List<ByDeadline>,
    pub(crate) reads: Reads,
    pub(crate) lookups: LookupLeases,
    pub(crate) disks: Disks,
    pub(crate) tier_counters: TierCounters,
    /// Where blocks that a store holds too were looked for last, to make room.
    pub(crate) hand: u32,
    /// Detached sessions that may have become idle in this step.
    pub(crate) idle: Vec<u32>,
}

impl Core {
    /// An empty core: no tenants, no memory.
    pub fn new(settings: Settings) -> Self {
        Core {
            now: 0,
            stamp: 0,
            counters: Counters::default(),
            log: ChangeLog::new(settings.incarnation, settings.change_log),
            tenants: Vec::new(),
            tenant_ids: BTreeMap::new(),
            spaces: Spaces::default(),
            index: Index::new(settings.index_seed),
            crcs: Crcs::new(),
            sessions: Slab::new(),
            tokens: BTreeMap::new(),
            instances: Slab::new(),
            instance_ids: BTreeMap::new(),
            crews: Slab::new(),
            fills: Slab::new(),
            deadlines: List::new(),
            reads: Reads::new(),
            lookups: LookupLeases::default(),
            disks: Disks::expecting(settings.tiers.stores),
            tier_counters: TierCounters::default(),
            hand: 0,
            idle: Vec::new(),
            settings,
        }
    }

    /// What it was made with.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Everything counted since start, over all tenants.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Everything counted of the slower tier since start.
    pub fn tier_counters(&self) -> &TierCounters {
        &self.tier_counters
    }

    /// Whether core has this session, attached or detached.
    pub fn knows(&self, session: SessionId) -> bool {
        self.tokens.contains_key(&session)
    }

    /// When the next deadline falls due; `None`: nothing waits. A driver with nothing else to do ticks then.
    pub fn next_deadline(&self) -> Option<Now> {
        let fill = self.deadlines.front().map(|id| self.fills[id].deadline);
        let times = [
            fill,
            self.reads.next_expiry(),
            self.lookups.next_expiry(),
            self.disks.next_deadline(),
        ];
        times.into_iter().flatten().min().map(Now)
    }

    /// Up to `most` of the tenant's changes after sequence `after` (0: from the start).
    pub fn changes(&self, tenant: TenantId, after: u64, most: usize) -> Changes {
        self.log.after(tenant, after, most)
    }
}
