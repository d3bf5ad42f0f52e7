//! What happened since start, as plain numbers that only rise. Three answers are kept apart: hit, absent, failed.
//! Deliberately absent: rates, histograms, names for a metrics system.

/// Counts of blocks unless said otherwise, over all tenants.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Requests, of any kind.
    pub requests: u64,
    /// Requests answered with a failure.
    pub refused: u64,
    /// Lookups that found the block loadable.
    pub lookup_hit: u64,
    /// Lookups that did not find it.
    pub lookup_absent: u64,
    /// Lookups that found it being stored.
    pub lookup_filling: u64,
    /// Loads answered READY.
    pub load_hit: u64,
    /// Loads answered ABSENT.
    pub load_absent: u64,
    /// Loads that failed, by reason.
    pub load_failed: LoadFailures,
    /// Reservations given.
    pub reserved: u64,
    /// Reservations answered PRESENT.
    pub present: u64,
    /// Reservations answered FILLING.
    pub filling: u64,
    /// Blocks that became visible.
    pub stored: u64,
    /// Bytes of blocks that became visible.
    pub stored_bytes: u64,
    /// Bytes of blocks answered READY.
    pub loaded_bytes: u64,
    /// Stores that failed, by reason.
    pub store_failed: StoreFailures,
    /// Blocks evicted to make room.
    pub evicted: u64,
    /// Of those, dropped because their whole extent moved to another size class.
    pub evicted_for_class: u64,
    /// Blocks dropped because their namespace was forgotten.
    pub evicted_with_namespace: u64,
    /// Extents that moved to another size class.
    pub extents_moved: u64,
    /// Extents taken out for refilling.
    pub extents_refilled: u64,
    /// Sessions opened.
    pub sessions_opened: u64,
    /// Sessions whose process was found dead.
    pub sessions_gone: u64,
    /// Sessions that were refused or ended by core.
    pub sessions_ended: u64,
    /// Past sessions fenced.
    pub fences: u64,
    /// Read leases that ran out before they were released.
    pub leases_expired: u64,
    /// Lookups that asked for a lease and got none.
    pub leases_denied: u64,
}

/// Why loads failed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LoadFailures {
    /// The reader found bytes that do not match their checksum.
    pub crc: u64,
    /// The session holds too many leases.
    pub busy: u64,
    /// A slower tier holds the block, and could not give it, or not in time.
    pub below: u64,
}

impl LoadFailures {
    /// Reason and count, for metrics and status.
    pub fn each(&self) -> [(&'static str, u64); 3] {
        [
            ("crc", self.crc),
            ("busy", self.busy),
            ("below", self.below),
        ]
    }
}

/// Why stores failed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StoreFailures {
    /// Nothing could be evicted, or a limit was reached.
    pub no_space: u64,
    /// A part did not come in time.
    pub deadline: u64,
    /// The engine gave it up.
    pub aborted: u64,
    /// A process that had to write a part died or was fenced.
    pub writer_lost: u64,
    /// A commit named a reservation that is gone or not its own.
    pub stale: u64,
    /// It completed in an extent that is being taken out.
    pub suspect: u64,
}

impl StoreFailures {
    /// Reason and count, for metrics and status.
    pub fn each(&self) -> [(&'static str, u64); 6] {
        [
            ("no_space", self.no_space),
            ("deadline", self.deadline),
            ("aborted", self.aborted),
            ("writer_lost", self.writer_lost),
            ("stale", self.stale),
            ("suspect", self.suspect),
        ]
    }
}

/// Counts of blocks that went to the slower tier or came from it, over all tenants and stores.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TierCounters {
    /// Blocks written.
    pub offloaded: u64,
    /// Bytes of them, headers included.
    pub offloaded_bytes: u64,
    /// Blocks not written because too much was being written already.
    pub offload_queue_full: u64,
    /// Blocks not written because the budget of the day was spent.
    pub offload_budget: u64,
    /// Blocks not written because no place was free.
    pub offload_no_place: u64,
    /// Blocks not written because the store was off.
    pub offload_off: u64,
    /// Blocks whose write failed.
    pub offload_failed: u64,
    /// Blocks that left host memory and that no store had, where they are written on demotion: the device was too slow, or refused.
    pub demote_missed: u64,
    /// Blocks that left host memory out of turn because a store holds them.
    pub demoted: u64,
    /// Blocks dropped from a store to make room there.
    pub evicted: u64,
    /// Blocks read into host memory and found sound.
    pub fetched: u64,
    /// Bytes of their slots.
    pub fetched_bytes: u64,
    /// Blocks that were begun to be read because a lookup had found them, before any load asked.
    pub fetched_ahead: u64,
    /// Blocks that could not be read, by reason.
    pub fetch_failed: FetchFailures,
    /// Blocks not read because there was no room, or too much was being read.
    pub fetch_busy: u64,
    /// Loads answered before all of their blocks had come.
    pub fetch_late: u64,
    /// Slots that nobody ever gets again: a store was given up that may still write there.
    pub slots_lost: u64,
    /// Blocks that a store held when it was opened.
    pub recovered: u64,
    /// Blocks that it held and that are of no use here.
    pub not_recovered: u64,
}

impl TierCounters {
    /// Name and count, for metrics and status.
    pub fn each(&self) -> [(&'static str, u64); 21] {
        [
            ("offloaded", self.offloaded),
            ("offloaded_bytes", self.offloaded_bytes),
            ("offload_queue_full", self.offload_queue_full),
            ("offload_budget", self.offload_budget),
            ("offload_no_place", self.offload_no_place),
            ("offload_off", self.offload_off),
            ("offload_failed", self.offload_failed),
            ("demote_missed", self.demote_missed),
            ("demoted", self.demoted),
            ("evicted", self.evicted),
            ("fetched", self.fetched),
            ("fetched_bytes", self.fetched_bytes),
            ("fetched_ahead", self.fetched_ahead),
            ("fetch_failed_corrupt", self.fetch_failed.corrupt),
            ("fetch_failed_io", self.fetch_failed.io),
            ("fetch_failed_off", self.fetch_failed.off),
            ("fetch_busy", self.fetch_busy),
            ("fetch_late", self.fetch_late),
            ("slots_lost", self.slots_lost),
            ("recovered", self.recovered),
            ("not_recovered", self.not_recovered),
        ]
    }
}

/// Why blocks could not be read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FetchFailures {
    /// Their bytes are not what was stored.
    pub corrupt: u64,
    /// The device failed.
    pub io: u64,
    /// The store was off.
    pub off: u64,
}
