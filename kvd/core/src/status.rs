//! What the core shows of itself: the truth that `kvd status` prints. Owned values, so that formatting happens elsewhere.
//! Deliberately absent: JSON, tables, units; counters, which core keeps for all tenants together.

use crate::geometry::ArenaShape;
use crate::ids::{InstanceId, NamespaceId, Role, SessionId};
use crate::record::{Difference, NamespaceRecord, diff};
use crate::settings::EvictionPolicy;

/// One tenant, now.
#[derive(Clone, Debug)]
pub struct StatusView {
    /// The tenant's name.
    pub tenant: String,
    /// Names this start of the daemon.
    pub incarnation: [u8; 16],
    /// Number of the newest change in the change log; 0: none yet.
    pub sequence: u64,
    /// The arena's sizes; `None` before it exists.
    pub arena: Option<ArenaShape>,
    /// Which blocks go first.
    pub eviction: EvictionPolicy,
    /// Extents by what they can be used for.
    pub extents: ExtentCounts,
    /// Slots of extents that have a size class.
    pub slots: SlotCounts,
    /// The same in bytes.
    pub slot_bytes: SlotCounts,
    /// Most bytes that may be quarantined.
    pub quarantine_limit: u64,
    /// Bytes pinned by leases, by loads that wait for NVMe, and by writes to it.
    pub pinned_bytes: u64,
    /// Bytes of blocks that came up ahead of loads, or are on their way, and that nobody has claimed.
    pub ahead_bytes: u64,
    /// Blocks among them that are on their way.
    pub ahead_reads: u32,
    /// Tokens of a former daemon's writers that have not fenced yet; their extents are kept out.
    pub unfenced_writers: u32,
    /// By ascending slot size.
    pub classes: Vec<ClassView>,
    /// By number.
    pub namespaces: Vec<NamespaceView>,
    /// By order of opening.
    pub sessions: Vec<SessionView>,
}

impl StatusView {
    /// The namespace most like the `at`-th one, and the fields in which the two differ. Costs time; not for the core's thread.
    pub fn nearest(&self, at: usize) -> Option<(&NamespaceView, Vec<Difference>)> {
        let own = &self.namespaces[at].record;
        let others = self
            .namespaces
            .iter()
            .enumerate()
            .filter(|(i, _)| *i != at)
            .map(|(_, other)| other);
        others
            .map(|other| (other, diff(own, &other.record)))
            .min_by_key(|(_, fields)| fields.len())
    }
}

/// Extents by what they can be used for; the sum is constant.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExtentCounts {
    /// Not yet populated.
    pub pending: u32,
    /// Could not be populated.
    pub failed: u32,
    /// Populated, but a former daemon's writers may still write it.
    pub held_out: u32,
    /// Being emptied or refilled after a streak of corrupt blocks.
    pub refilling: u32,
    /// Usable, without a size class.
    pub free: u32,
    /// Usable, with a size class.
    pub classed: u32,
}

/// Slots (or their bytes) by state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SlotCounts {
    /// Empty.
    pub free: u64,
    /// Given to an instance; no part has come yet.
    pub reserved: u64,
    /// Some parts have come.
    pub filling: u64,
    /// Visible.
    pub resident: u64,
    /// Given up, but a writer may still write.
    pub quarantined: u64,
}

impl SlotCounts {
    /// All of them.
    pub fn total(&self) -> u64 {
        self.free + self.reserved + self.filling + self.resident + self.quarantined
    }
}

/// One size class.
#[derive(Clone, Debug)]
pub struct ClassView {
    /// Bytes of a slot.
    pub slot_bytes: u64,
    /// Extents it has.
    pub extents: u32,
    /// Its slots.
    pub slots: SlotCounts,
    /// Blocks that could be evicted now if nothing pinned them: ends of chains.
    pub leaves: u64,
}

/// One namespace.
#[derive(Clone, Debug)]
pub struct NamespaceView {
    /// BLAKE3 of its record.
    pub id: NamespaceId,
    /// Its fields; see [`crate::record::diff`].
    pub record: NamespaceRecord,
    /// Visible blocks.
    pub blocks: u64,
    /// Bytes of the slots of visible blocks.
    pub bytes: u64,
    /// Sessions that have registered it.
    pub sessions: u32,
}

/// One session.
#[derive(Clone, Debug)]
pub struct SessionView {
    /// Its token.
    pub session: SessionId,
    /// Its engine instance.
    pub instance: InstanceId,
    /// For people.
    pub label: String,
    /// What it does.
    pub role: Role,
    /// Its rank.
    pub rank: u32,
    /// Ranks of its instance.
    pub world: u32,
    /// False: its socket is closed, but it may still be copying.
    pub attached: bool,
    /// Microseconds since it opened.
    pub age_us: u64,
    /// Ids of the namespaces it has registered.
    pub namespaces: Vec<NamespaceId>,
    /// Parts it may be writing.
    pub writing: u32,
    /// Blocks its instance is filling, quarantined ones included.
    pub instance_claims: u32,
    /// Read leases it holds.
    pub read_leases: u32,
    /// Lookup leases it holds.
    pub lookup_leases: u32,
}
