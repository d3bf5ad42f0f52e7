//! `/metrics`: a snapshot that the node's thread takes, and its text in the OpenMetrics format, made on the HTTP thread.
//!
//! There is no registry that lives on: each scrape makes one from the snapshot, so the node's thread keeps plain numbers.

use std::sync::atomic::AtomicU64;

use kvd_node::{Counts, SlotStatus, StoreStatus, TierStatus};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

/// What the text is.
pub(crate) const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Upper bounds of the latency buckets, in microseconds.
const BUCKETS: [u64; 14] = [
    5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 50_000, 200_000, 1_000_000,
];

/// Kinds of requests, by the place of their histogram.
pub(crate) const KINDS: [&str; 12] = [
    "hello", "register", "lookup", "reserve", "commit", "abort", "load", "release", "fence",
    "status", "ping", "bye",
];

/// How long requests of one kind took, in microseconds.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Latency {
    counts: [u64; BUCKETS.len() + 1],
    sum_us: u64,
}

impl Latency {
    /// Adds one request.
    pub(crate) fn observe(&mut self, us: u64) {
        self.counts[BUCKETS.partition_point(|bound| *bound < us)] += 1;
        self.sum_us += us;
    }
}

/// One tenant at one moment.
#[derive(Debug, Default)]
pub(crate) struct TenantMetrics {
    pub(crate) name: String,
    pub(crate) counts: Counts,
    pub(crate) slots: SlotStatus,
    pub(crate) slot_bytes: SlotStatus,
    /// Name of a state, extents in it.
    pub(crate) extents: Vec<(&'static str, u64)>,
    pub(crate) arena_bytes: u64,
    pub(crate) page_bytes: u64,
    pub(crate) adopted: bool,
    pub(crate) pinned_bytes: u64,
    pub(crate) ahead_bytes: u64,
    pub(crate) ahead_reads: u64,
    pub(crate) namespaces: u64,
    pub(crate) sessions: u64,
    pub(crate) sessions_detached: u64,
}

/// Everything that is shown.
#[derive(Debug, Default)]
pub(crate) struct Snapshot {
    pub(crate) version: String,
    pub(crate) tenants: Vec<TenantMetrics>,
    pub(crate) idle: Counts,
    pub(crate) stores: Vec<StoreStatus>,
    pub(crate) tier: TierStatus,
    pub(crate) latency: [Latency; KINDS.len()],
    /// Connections that have not said who they are.
    pub(crate) greeting: u64,
    /// Registrations that wait for a former daemon's arena.
    pub(crate) held: u64,
    /// Bytes of receive and send buffers.
    pub(crate) receive_bytes: u64,
    pub(crate) send_bytes: u64,
    /// Connections refused because there were too many.
    pub(crate) refused: u64,
    /// Sessions ended because they broke the protocol.
    pub(crate) broken: u64,
}

type Labels = Vec<(&'static str, String)>;
type Gauges = Family<Labels, Gauge<i64>>;
type Counters = Family<Labels, Counter<u64, AtomicU64>>;

/// The text of `/metrics`.
pub(crate) fn encode(snapshot: Snapshot) -> Result<String, std::fmt::Error> {
    let mut registry = Registry::with_prefix("kvd");
    let build = gauges(&mut registry, "build", "Version of the daemon");
    build
        .get_or_create(&vec![("version", snapshot.version.clone())])
        .set(1);
    tenants(&mut registry, &snapshot);
    counts(&mut registry, &snapshot);
    stores(&mut registry, &snapshot);
    connections(&mut registry, &snapshot);
    registry.register_collector(Box::new(Latencies(snapshot.latency)));
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &registry)?;
    Ok(text)
}

fn gauges(registry: &mut Registry, name: &str, help: &str) -> Gauges {
    let family = Gauges::default();
    registry.register(name, help, family.clone());
    family
}

fn counters(registry: &mut Registry, name: &str, help: &str) -> Counters {
    let family = Counters::default();
    registry.register(name, help, family.clone());
    family
}

fn set(family: &Gauges, labels: Labels, value: u64) {
    family
        .get_or_create(&labels)
        .set(i64::try_from(value).unwrap_or(i64::MAX));
}

fn tenants(registry: &mut Registry, snapshot: &Snapshot) {
    let arena = gauges(registry, "arena_bytes", "Size of the arena");
    let page = gauges(registry, "arena_page_bytes", "Size of the arena's pages");
    let adopted = gauges(
        registry,
        "arena_adopted",
        "1 when the arena came from a former daemon",
    );
    let extents = gauges(registry, "extents", "Extents of the arena by state");
    let slots = gauges(registry, "slots", "Slots by state");
    let slot_bytes = gauges(registry, "slot_bytes", "Bytes of slots by state");
    let pinned = gauges(
        registry,
        "pinned_bytes",
        "Bytes that leases, loads that wait for NVMe, and writes to it keep",
    );
    let ahead = gauges(
        registry,
        "ahead_bytes",
        "Bytes of blocks that came up ahead of loads, or are on their way, and that nobody has claimed",
    );
    let ahead_reads = gauges(
        registry,
        "ahead_reads",
        "Blocks that come up ahead of loads",
    );
    let namespaces = gauges(registry, "namespaces", "Namespaces");
    let sessions = gauges(registry, "sessions", "Sessions by state");
    for tenant in &snapshot.tenants {
        let label = || vec![("tenant", tenant.name.clone())];
        let with =
            |key, value: &str| vec![("tenant", tenant.name.clone()), (key, value.to_owned())];
        set(&arena, label(), tenant.arena_bytes);
        set(&page, label(), tenant.page_bytes);
        set(&adopted, label(), u64::from(tenant.adopted));
        set(&pinned, label(), tenant.pinned_bytes);
        set(&ahead, label(), tenant.ahead_bytes);
        set(&ahead_reads, label(), tenant.ahead_reads);
        set(&namespaces, label(), tenant.namespaces);
        set(&sessions, with("state", "attached"), tenant.sessions);
        set(
            &sessions,
            with("state", "detached"),
            tenant.sessions_detached,
        );
        for (state, n) in &tenant.extents {
            set(&extents, with("state", state), *n);
        }
        for (family, by) in [(&slots, &tenant.slots), (&slot_bytes, &tenant.slot_bytes)] {
            let each = [
                ("free", by.free),
                ("reserved", by.reserved),
                ("filling", by.filling),
                ("resident", by.resident),
                ("quarantined", by.quarantined),
            ];
            for (state, n) in each {
                set(family, with("state", state), n);
            }
        }
    }
}

fn counts(registry: &mut Registry, snapshot: &Snapshot) {
    let lookups = counters(registry, "lookup_blocks", "Blocks looked up, by result");
    let loads = counters(
        registry,
        "load_blocks",
        "Blocks asked for, by result and reason",
    );
    let stores = counters(
        registry,
        "store_blocks",
        "Blocks offered for storing, by result and reason",
    );
    let bytes = counters(registry, "block_bytes", "Bytes of blocks stored and loaded");
    let other = counters(registry, "events", "What else happened, by name");
    // What the clock brought belongs to no tenant in particular.
    let idle = (String::new(), &snapshot.idle);
    for (name, counts) in snapshot
        .tenants
        .iter()
        .map(|t| (t.name.clone(), &t.counts))
        .chain([idle])
    {
        for (key, n) in counts.each() {
            let labels = |rest: &[(&'static str, &str)]| {
                let rest = rest.iter().map(|(k, v)| (*k, (*v).to_owned()));
                std::iter::once(("tenant", name.clone()))
                    .chain(rest)
                    .collect::<Labels>()
            };
            let add = |family: &Counters, rest: &[(&'static str, &str)]| {
                family.get_or_create(&labels(rest)).inc_by(n);
            };
            match key {
                "lookup_hit" | "lookup_absent" | "lookup_filling" => {
                    add(&lookups, &[("result", &key[7..])])
                }
                "load_hit" | "load_absent" => add(&loads, &[("result", &key[5..]), ("reason", "")]),
                "stored" | "present" | "filling" | "reserved" => {
                    add(&stores, &[("result", key), ("reason", "")])
                }
                "stored_bytes" | "loaded_bytes" => {
                    add(&bytes, &[("what", key.trim_end_matches("_bytes"))])
                }
                _ => {
                    if let Some(reason) = key.strip_prefix("load_failed_") {
                        add(&loads, &[("result", "failed"), ("reason", reason)]);
                    } else if let Some(reason) = key.strip_prefix("store_failed_") {
                        add(&stores, &[("result", "failed"), ("reason", reason)]);
                    } else {
                        add(&other, &[("event", key)]);
                    }
                }
            }
        }
    }
}

fn stores(registry: &mut Registry, snapshot: &Snapshot) {
    let tier = counters(
        registry,
        "tier",
        "Blocks, or bytes, between host memory and the stores, by event",
    );
    for (event, n) in &snapshot.tier.counts {
        tier.get_or_create(&vec![("event", event.clone())])
            .inc_by(*n);
    }
    let on = gauges(
        registry,
        "nvme_on",
        "1 while the store takes operations; the label io says how bytes get there",
    );
    let bytes = gauges(registry, "nvme_bytes", "Size of the store");
    let blocks = gauges(registry, "nvme_blocks", "Blocks that a restart would find");
    let events = counters(registry, "nvme_events", "What the store did, by name");
    for store in &snapshot.stores {
        let label = || vec![("store", store.path.clone())];
        let io = vec![("store", store.path.clone()), ("io", store.io.clone())];
        set(&on, io, u64::from(store.state == "on"));
        set(&bytes, label(), store.bytes);
        set(&blocks, label(), store.blocks);
        for (event, n) in &store.counts {
            let labels = vec![("store", store.path.clone()), ("event", event.clone())];
            events.get_or_create(&labels).inc_by(*n);
        }
    }
}

fn connections(registry: &mut Registry, snapshot: &Snapshot) {
    let queues = gauges(registry, "queue", "What waits, by queue");
    set(
        &queues,
        vec![("queue", "greeting".to_owned())],
        snapshot.greeting,
    );
    set(
        &queues,
        vec![("queue", "held_registrations".to_owned())],
        snapshot.held,
    );
    let buffers = gauges(registry, "buffer_bytes", "Memory of session buffers");
    set(
        &buffers,
        vec![("direction", "receive".to_owned())],
        snapshot.receive_bytes,
    );
    set(
        &buffers,
        vec![("direction", "send".to_owned())],
        snapshot.send_bytes,
    );
    let ended = counters(
        registry,
        "connections_refused",
        "Connections that were refused or ended, by reason",
    );
    ended
        .get_or_create(&vec![("reason", "limit".to_owned())])
        .inc_by(snapshot.refused);
    ended
        .get_or_create(&vec![("reason", "protocol".to_owned())])
        .inc_by(snapshot.broken);
}

/// The histograms, which are counted elsewhere.
#[derive(Debug)]
struct Latencies([Latency; KINDS.len()]);

impl Collector for Latencies {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let help =
            "How long the node's thread worked on a request; what it then waits for is not in it";
        let mut family =
            encoder.encode_descriptor("request_seconds", help, None, MetricType::Histogram)?;
        for (kind, latency) in KINDS.iter().zip(&self.0) {
            let seconds = |us: u64| us as f64 / 1e6;
            let bounds = BUCKETS.iter().map(|b| seconds(*b)).chain([f64::INFINITY]);
            let buckets: Vec<_> = bounds.zip(latency.counts).collect();
            let count = latency.counts.iter().sum();
            family
                .encode_family(&[("kind", *kind)])?
                .encode_histogram::<NoLabelSet>(seconds(latency.sum_us), count, &buckets, None)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_has_what_dashboards_ask_for() {
        let mut snapshot = Snapshot {
            version: "1".to_owned(),
            ..Snapshot::default()
        };
        snapshot.tenants.push(TenantMetrics {
            name: "default".to_owned(),
            page_bytes: 4096,
            ..TenantMetrics::default()
        });
        snapshot.stores.push(StoreStatus {
            path: "/d".to_owned(),
            state: "on".to_owned(),
            io: "threads".to_owned(),
            counts: [("flushes".to_owned(), 3)].into(),
            ..StoreStatus::default()
        });
        snapshot.latency[2].observe(7);
        snapshot.latency[2].observe(5);
        snapshot.latency[2].observe(u64::MAX / 4);
        let text = encode(snapshot).expect("encodes");
        for line in [
            "kvd_lookup_blocks_total{tenant=\"default\",result=\"hit\"} 0",
            "kvd_load_blocks_total{tenant=\"default\",result=\"failed\",reason=\"crc\"} 0",
            "kvd_nvme_on{store=\"/d\",io=\"threads\"} 1",
            "kvd_nvme_events_total{store=\"/d\",event=\"flushes\"} 3",
            "kvd_slots{tenant=\"default\",state=\"resident\"} 0",
            "kvd_arena_page_bytes{tenant=\"default\"} 4096",
            "kvd_request_seconds_bucket{le=\"0.000005\",kind=\"lookup\"} 1",
            "kvd_request_seconds_bucket{le=\"0.00001\",kind=\"lookup\"} 2",
            "kvd_request_seconds_bucket{le=\"+Inf\",kind=\"lookup\"} 3",
            "kvd_request_seconds_count{kind=\"lookup\"} 3",
        ] {
            assert!(text.contains(line), "{line} is missing in:\n{text}");
        }
        assert!(text.ends_with("# EOF\n"));
    }
}
