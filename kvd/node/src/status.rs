//! What `kvd status` shows, as JSON types. `docs/formats.md` describes them; fields are only ever added.
//!
//! Made from snapshots on a thread of its own, because comparing namespaces and asking the kernel for pages takes time.
//! Session tokens are deliberately absent: they let others speak for a session.

use std::collections::BTreeMap;

use kvd_core::record::{NamespaceRecord, diff};
use kvd_core::status::{SessionView, SlotCounts};
use kvd_core::{EvictionPolicy, NamespaceId, Role, SessionId, TierCounters};
use serde::{Deserialize, Serialize};

use crate::counts::Counts;
use crate::tenant::{ArenaState, TenantSnapshot};

/// Up to so many namespaces, each is compared with every other; with more, each with the one most like it.
const COMPARE_ALL: usize = 8;

/// A daemon.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// Version of the daemon.
    pub version: String,
    /// Name of this start of the daemon, in hex.
    pub incarnation: String,
    /// Process id of the daemon, as it sees itself.
    pub pid: u32,
    /// Seconds since it started.
    pub uptime_s: f64,
    /// Over a session: only the asker's. Over HTTP: all.
    pub tenants: Vec<TenantStatus>,
    /// The stores of the slower tier, of all tenants together.
    #[serde(default)]
    pub stores: Vec<StoreStatus>,
    /// What went to them and came from them since the start.
    #[serde(default)]
    pub tier: TierStatus,
}

/// A store of the slower tier.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct StoreStatus {
    /// Its directory or device.
    pub path: String,
    /// `on`, or `off` because its device fails.
    pub state: String,
    /// How bytes get there: `io_uring` or `threads`.
    pub io: String,
    /// Why not what is faster, if so.
    pub io_reason: Option<String>,
    /// Size of the store.
    pub bytes: u64,
    /// Blocks that a restart would find.
    pub blocks: u64,
    /// Whether it was empty when it was opened.
    pub formatted: bool,
    /// Blocks that were there when it was opened.
    pub recovered: u64,
    /// How long opening it took, seconds.
    pub open_s: f64,
    /// Everything that it counts, by name.
    pub counts: BTreeMap<String, u64>,
}

/// Blocks between host memory and the stores.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct TierStatus {
    /// Every count there is, by name.
    pub counts: BTreeMap<String, u64>,
}

impl TierStatus {
    /// From core's counters.
    pub fn of(counters: &TierCounters) -> Self {
        let counts = counters
            .each()
            .map(|(name, value)| (name.to_owned(), value));
        TierStatus {
            counts: counts.into(),
        }
    }
}

/// A tenant.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TenantStatus {
    /// Its name.
    pub name: String,
    /// Its socket.
    pub socket: String,
    /// Its tiers.
    pub tiers: Tiers,
    /// What it holds blocks for.
    pub namespaces: Vec<NamespaceStatus>,
    /// Who is attached, or was and may still be copying.
    pub sessions: Vec<SessionStatus>,
    /// Blocks looked up.
    pub lookups: Lookups,
    /// Blocks loaded.
    pub loads: Loads,
    /// Blocks stored.
    pub stores: Stores,
    /// Every count there is, by name.
    pub counts: BTreeMap<String, u64>,
}

/// The tiers there are.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Tiers {
    /// Host memory.
    pub host: HostTier,
}

/// Host memory.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct HostTier {
    /// `absent`, `waiting` (for an engine that brings the former daemon's arena), `failed`, `faulting` or `ready`.
    pub state: String,
    /// Why it failed.
    pub reason: Option<String>,
    /// Whether the arena came from a former daemon.
    pub adopted: bool,
    /// Size of the arena.
    pub bytes: u64,
    /// Size of an extent.
    pub extent_bytes: u64,
    /// Size of the pages that the arena was made of.
    pub page_bytes: u64,
    /// What the kernel says: size of a page of the mapping, 0 when unknown.
    pub kernel_page_bytes: u64,
    /// What the kernel says: bytes in the daemon's page tables.
    pub resident_bytes: u64,
    /// What the kernel says: bytes on huge pages.
    pub huge_bytes: u64,
    /// Extents by state.
    pub extents: ExtentStatus,
    /// Slots by state, of extents that have a size class.
    pub slots: SlotStatus,
    /// The same in bytes.
    pub slot_bytes: SlotStatus,
    /// Size classes.
    pub classes: Vec<ClassStatus>,
    /// `lru` or `s3fifo`.
    pub eviction: String,
    /// Bytes that leases, loads that wait for NVMe, and writes to it keep.
    pub pinned_bytes: u64,
    /// Bytes of blocks that came up ahead of loads, or are on their way, and that nobody has claimed.
    pub ahead_bytes: u64,
    /// Blocks among them that are on their way.
    pub ahead_reads: u32,
    /// Most bytes that may be quarantined.
    pub quarantine_limit_bytes: u64,
    /// Writers of the former daemon's time that have not said that their copies are over.
    pub unfenced_writers: u32,
}

/// Extents by state.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExtentStatus {
    /// Not faulted in yet.
    pub pending: u32,
    /// The system gave no memory.
    pub failed: u32,
    /// A former daemon's writers may still write there.
    pub held_out: u32,
    /// Being emptied or faulted in again after corrupt blocks.
    pub refilling: u32,
    /// Of no size class yet.
    pub free: u32,
    /// In use.
    pub classed: u32,
}

/// Slots, or their bytes, by state.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlotStatus {
    /// Empty.
    pub free: u64,
    /// Given out; nothing has come.
    pub reserved: u64,
    /// Some parts have come.
    pub filling: u64,
    /// Visible.
    pub resident: u64,
    /// Given up, but a writer may still write.
    pub quarantined: u64,
}

/// Slots of one size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClassStatus {
    /// Size of a slot.
    pub slot_bytes: u64,
    /// Extents it has.
    pub extents: u32,
    /// Slots by state.
    pub slots: SlotStatus,
    /// Blocks that end a chain: those that can be evicted first.
    pub leaves: u64,
}

/// A namespace.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NamespaceStatus {
    /// BLAKE3 of its record, in hex.
    pub id: String,
    /// The model's name.
    pub model: String,
    /// Visible blocks.
    pub blocks: u64,
    /// Bytes of their slots.
    pub bytes: u64,
    /// Sessions that have registered it.
    pub sessions: u32,
    /// Its record.
    pub fields: BTreeMap<String, String>,
    /// In what it differs from others: all of them when they are few, else the one most like it.
    pub differs: Vec<Differs>,
}

/// In what a namespace differs from another one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Differs {
    /// Id of the other.
    pub from: String,
    /// The fields, by name.
    pub fields: Vec<Difference>,
}

/// A field in which two namespaces differ.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Difference {
    /// Its name.
    pub field: String,
    /// Its value here; null when it is not there.
    pub here: Option<String>,
    /// Its value in the other one.
    pub there: Option<String>,
}

/// A session.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SessionStatus {
    /// Its engine instance, in hex.
    pub instance: String,
    /// For people.
    pub label: String,
    /// `scheduler`, `worker`, `both` or `observer`.
    pub role: String,
    /// Its rank among the workers.
    pub rank: u32,
    /// Workers of its instance.
    pub world: u32,
    /// Its process as the daemon sees it; null when it can't.
    pub pid: Option<u32>,
    /// False: its socket is closed, but its process may still copy.
    pub attached: bool,
    /// Seconds since it attached.
    pub age_s: f64,
    /// Ids of its namespaces.
    pub namespaces: Vec<String>,
    /// Parts that it may be writing.
    pub writing: u32,
    /// Blocks that its instance is storing.
    pub claims: u32,
    /// Blocks it holds for reading.
    pub read_leases: u32,
    /// Lookups whose blocks it holds.
    pub lookup_leases: u32,
}

/// Blocks looked up.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lookups {
    /// They were there.
    pub hit: u64,
    /// They were not.
    pub absent: u64,
    /// They were being stored.
    pub filling: u64,
}

/// Blocks loaded.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Loads {
    /// They were there.
    pub hit: u64,
    /// They were not.
    pub absent: u64,
    /// They could not be had, by reason.
    pub failed: BTreeMap<String, u64>,
    /// Bytes of those that were there.
    pub bytes: u64,
}

/// Blocks stored.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stores {
    /// They became visible.
    pub stored: u64,
    /// They were there already.
    pub present: u64,
    /// Somebody else was storing them.
    pub filling: u64,
    /// They did not become visible, by reason.
    pub failed: BTreeMap<String, u64>,
    /// Bytes of those that became visible.
    pub bytes: u64,
    /// Blocks that were dropped to make room.
    pub evicted: u64,
}

impl TenantSnapshot {
    /// The status of this tenant. `pid` tells a session's process; `socket` is where the tenant is served.
    pub fn into_status(
        mut self,
        socket: String,
        pid: impl Fn(SessionId) -> Option<u32>,
    ) -> TenantStatus {
        let host = self.host();
        let counts = self.counts;
        let by_reason = |prefix| {
            counts
                .with_prefix(prefix)
                .map(|(k, n)| (k.to_owned(), n))
                .collect()
        };
        TenantStatus {
            socket,
            tiers: Tiers { host },
            namespaces: namespaces(&self.view),
            sessions: self
                .view
                .sessions
                .iter()
                .map(|s| session(s, pid(s.session)))
                .collect(),
            lookups: Lookups {
                hit: counts.get("lookup_hit"),
                absent: counts.get("lookup_absent"),
                filling: counts.get("lookup_filling"),
            },
            loads: Loads {
                hit: counts.get("load_hit"),
                absent: counts.get("load_absent"),
                failed: by_reason("load_failed_"),
                bytes: counts.get("loaded_bytes"),
            },
            stores: Stores {
                stored: counts.get("stored"),
                present: counts.get("present"),
                filling: counts.get("filling"),
                failed: by_reason("store_failed_"),
                bytes: counts.get("stored_bytes"),
                evicted: counts.get("evicted"),
            },
            counts: counts_by_name(&counts),
            name: self.view.tenant,
        }
    }

    fn host(&mut self) -> HostTier {
        let pages = self.probe.take().map(|probe| probe()).unwrap_or_default();
        let (state, reason, adopted) = match &self.arena {
            ArenaState::Absent => ("absent", None, false),
            ArenaState::Waiting => ("waiting", None, false),
            ArenaState::Failed(reason) => ("failed", Some(reason.clone()), false),
            ArenaState::Made {
                adopted,
                settled,
                extents,
            } if settled < extents => ("faulting", None, *adopted),
            ArenaState::Made { adopted, .. } => ("ready", None, *adopted),
        };
        let view = &self.view;
        HostTier {
            state: state.to_owned(),
            reason,
            adopted,
            bytes: view.arena.map_or(0, |a| a.bytes),
            extent_bytes: view.arena.map_or(0, |a| a.extent_bytes),
            page_bytes: view.arena.map_or(0, |a| a.page_bytes),
            kernel_page_bytes: pages.page_bytes,
            resident_bytes: pages.resident_bytes,
            huge_bytes: pages.huge_bytes,
            extents: ExtentStatus {
                pending: view.extents.pending,
                failed: view.extents.failed,
                held_out: view.extents.held_out,
                refilling: view.extents.refilling,
                free: view.extents.free,
                classed: view.extents.classed,
            },
            slots: view.slots.into(),
            slot_bytes: view.slot_bytes.into(),
            classes: view
                .classes
                .iter()
                .map(|c| ClassStatus {
                    slot_bytes: c.slot_bytes,
                    extents: c.extents,
                    slots: c.slots.into(),
                    leaves: c.leaves,
                })
                .collect(),
            eviction: match view.eviction {
                EvictionPolicy::Lru => "lru",
                EvictionPolicy::S3Fifo => "s3fifo",
            }
            .to_owned(),
            pinned_bytes: view.pinned_bytes,
            ahead_bytes: view.ahead_bytes,
            ahead_reads: view.ahead_reads,
            quarantine_limit_bytes: view.quarantine_limit,
            unfenced_writers: view.unfenced_writers,
        }
    }
}

impl From<SlotCounts> for SlotStatus {
    fn from(counts: SlotCounts) -> Self {
        Self {
            free: counts.free,
            reserved: counts.reserved,
            filling: counts.filling,
            resident: counts.resident,
            quarantined: counts.quarantined,
        }
    }
}

fn counts_by_name(counts: &Counts) -> BTreeMap<String, u64> {
    counts
        .each()
        .map(|(name, n)| (name.to_owned(), n))
        .collect()
}

fn namespaces(view: &kvd_core::StatusView) -> Vec<NamespaceStatus> {
    let all = &view.namespaces;
    let against = |id: NamespaceId, own: &NamespaceRecord, other: &NamespaceRecord| Differs {
        from: id.to_string(),
        fields: diff(own, other)
            .into_iter()
            .map(|(field, here, there)| Difference { field, here, there })
            .collect(),
    };
    all.iter()
        .enumerate()
        .map(|(at, own)| {
            let differs = if all.len() <= COMPARE_ALL {
                let others = all.iter().enumerate().filter(|(i, _)| *i != at);
                others
                    .map(|(_, other)| against(other.id, &own.record, &other.record))
                    .collect()
            } else {
                view.nearest(at)
                    .map(|(other, _)| against(other.id, &own.record, &other.record))
                    .into_iter()
                    .collect()
            };
            NamespaceStatus {
                id: own.id.to_string(),
                model: own.record.get("model").unwrap_or_default().to_owned(),
                blocks: own.blocks,
                bytes: own.bytes,
                sessions: own.sessions,
                fields: own.record.fields().iter().cloned().collect(),
                differs,
            }
        })
        .collect()
}

fn session(view: &SessionView, pid: Option<u32>) -> SessionStatus {
    SessionStatus {
        instance: view.instance.to_string(),
        label: view.label.clone(),
        role: match view.role {
            Role::Scheduler => "scheduler",
            Role::Worker => "worker",
            Role::Both => "both",
            Role::Observer => "observer",
        }
        .to_owned(),
        rank: view.rank,
        world: view.world,
        pid,
        attached: view.attached,
        age_s: view.age_us as f64 / 1e6,
        namespaces: view.namespaces.iter().map(ToString::to_string).collect(),
        writing: view.writing,
        claims: view.instance_claims,
        read_leases: view.read_leases,
        lookup_leases: view.lookup_leases,
    }
}
