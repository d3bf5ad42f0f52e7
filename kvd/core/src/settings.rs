//! Limits and times. Everything that grows has its limit here, and it is looked at before memory is taken.
//! Deliberately absent: parsing and units; the root reads configuration and hands this over.

/// Places in the session table of a generation table.
pub const MAX_WRITERS: usize = 256;
/// Most sessions of a tenant that only look. The limits of sessions count those that do more.
pub const OBSERVERS: u32 = 16;

/// Which blocks are dropped first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EvictionPolicy {
    /// Least recently used.
    #[default]
    Lru,
    /// Small, main and ghost queues: resists scans.
    S3Fifo,
}

/// When a block goes down to the slower tier.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OffloadPolicy {
    /// As soon as it is visible in host memory.
    #[default]
    WriteThrough,
    /// When it is loaded for the first time: what is never used again is never written.
    SecondUse,
    /// When it is about to leave host memory: what never has to leave is never written, and is gone after a restart.
    Demotion,
}

/// Settings of the slower tier.
#[derive(Clone, Debug, PartialEq)]
pub struct TierSettings {
    /// How many stores there will be; 0: as many as are opened. Blocks are divided among them.
    pub stores: u32,
    /// When blocks go down.
    pub offload: OffloadPolicy,
    /// On demotion: one in so many slots of host memory is to be free, or its block to be on its way down. Engines store a chunk of a
    /// prompt at once, and so many slots must be had without a wait: at 4 GiB, 2 MiB a block and one in 8 this is 256 blocks, or 4096
    /// tokens. More would write what may be used again yet.
    pub low_water: u32,
    /// Bytes that each store may write in a day; 0: no limit.
    pub write_bytes_per_day: u64,
    /// Most blocks that are being written to a store. More are not offloaded, and counted.
    pub max_writes: u32,
    /// Most blocks that are being read from a store for loads. Loads of more fail.
    pub max_reads: u32,
    /// Most blocks that are being read ahead of loads, from all stores together and beside `max_reads`. Tenants have equal shares of
    /// it, of at least one block. Reads of loads queue behind these at the device.
    pub max_ahead: u32,
    /// Places that are kept free in each store, so that writes need not wait for drops.
    pub spare_places: u32,
    /// Most blocks of a store.
    pub max_entries: u32,
    /// Most hashes in loads that wait.
    pub max_waiting_hashes: u32,
    /// Longest that a load waits, milliseconds.
    pub max_wait_ms: u32,
    /// Lookups that lease begin to bring up what is below, where half of the tenant's host memory is left to loads. What no load has
    /// claimed of it takes at most a quarter.
    pub read_ahead: bool,
    /// For the estimate in lookups: bytes that a store gives per microsecond.
    pub load_bytes_per_us: u64,
}

impl Default for TierSettings {
    fn default() -> Self {
        TierSettings {
            stores: 0,
            offload: OffloadPolicy::default(),
            low_water: 8,
            write_bytes_per_day: 0,
            max_writes: 1024,
            max_reads: 4096,
            max_ahead: 256,
            spare_places: 64,
            max_entries: 1 << 26,
            max_waiting_hashes: 262_144,
            max_wait_ms: 5_000,
            read_ahead: true,
            load_bytes_per_us: 2_000,
        }
    }
}

/// Typed settings of the core. All durations are microseconds.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// Names this start of the daemon in its change log; random, given by the node.
    pub incarnation: [u8; 16],
    /// Random, secret: keeps hash collisions from being constructed. Given by the node.
    pub index_seed: u64,
    /// Which blocks go first.
    pub eviction: EvictionPolicy,
    /// A block one of whose parts is missing for so long is aborted.
    pub fill_deadline_us: u64,
    /// How long a read lease holds unless released.
    pub lease_us: u64,
    /// Longest lookup lease, milliseconds; longer ones are cut to this.
    pub max_lookup_lease_ms: u32,
    /// Most of the arena's bytes that leases, and writes to NVMe, may pin, 0.0 to 1.0.
    pub lease_fraction: f64,
    /// Corrupt blocks in a row that take an extent out of use until refilled.
    pub corrupt_streak: u32,
    /// For the estimate in lookups: bytes that a load brings in per microsecond.
    pub load_bytes_per_us: u64,
    /// Most hashes, slots or generations in one request.
    pub max_hashes: u32,
    /// Most chains in one request.
    pub max_chains: u32,
    /// Most sessions of the daemon that do more than look.
    pub max_sessions: u32,
    /// Most namespaces one session may register.
    pub max_session_namespaces: u32,
    /// Most blocks that one instance may be filling (quarantined ones count).
    pub max_claims: u32,
    /// Most (session, slot) read leases of one session.
    pub max_read_leases: u32,
    /// Most read leases of all sessions.
    pub max_read_leases_total: u32,
    /// Most lookup leases of one session.
    pub max_lookup_leases: u32,
    /// Most blocks in lookup leases of all sessions, counted as often as they are leased.
    pub max_lookup_blocks: u32,
    /// Most blocks in the index.
    pub max_entries: u32,
    /// Changes that the change log remembers.
    pub change_log: u32,
    /// The slower tier.
    pub tiers: TierSettings,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            incarnation: [0; 16],
            index_seed: 0,
            eviction: EvictionPolicy::default(),
            fill_deadline_us: 60_000_000,
            lease_us: 30_000_000,
            max_lookup_lease_ms: 60_000,
            lease_fraction: 0.5,
            corrupt_streak: 3,
            load_bytes_per_us: 8_000,
            max_hashes: 65_536,
            max_chains: 256,
            max_sessions: 1024,
            max_session_namespaces: 32,
            max_claims: 65_536,
            max_read_leases: 65_536,
            max_read_leases_total: 262_144,
            max_lookup_leases: 1024,
            max_lookup_blocks: 1_048_576,
            max_entries: 1 << 26,
            change_log: 65_536,
            tiers: TierSettings::default(),
        }
    }
}
