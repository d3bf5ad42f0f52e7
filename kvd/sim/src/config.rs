//! What a seed draws before anything happens: limits and times of the daemon, tenants, arenas, namespaces, engines.

use kvd_core::record::NamespaceRecord;
use kvd_core::{Cut, EvictionPolicy, GroupGeometry, NamespaceId, Settings, TenantLimits};
use kvd_node::NodeSettings;

use crate::memory::ArenaSpec;
use crate::options::{Fault, Faults, Options};
use crate::rng::Rng;
use crate::tier::TierConfig;

/// A namespace that engines use.
#[derive(Clone, Debug)]
pub(crate) struct NamespaceSpec {
    /// Whose.
    pub(crate) tenant: u16,
    /// Canonical record.
    pub(crate) record: Vec<u8>,
    /// Its name.
    pub(crate) id: NamespaceId,
    /// Its groups.
    pub(crate) groups: Vec<GroupGeometry>,
}

/// The drawn world.
#[derive(Clone, Debug)]
pub(crate) struct Config {
    /// For the node.
    pub(crate) node: NodeSettings,
    /// For each tenant.
    pub(crate) limits: Vec<TenantLimits>,
    /// Limits are so low that not every engine gets in.
    pub(crate) tight: bool,
    /// For each tenant.
    pub(crate) arenas: Vec<ArenaSpec>,
    /// Of all tenants.
    pub(crate) namespaces: Vec<NamespaceSpec>,
    /// How many engine instances there are at once.
    pub(crate) instances: usize,
    /// Which faults happen.
    pub(crate) faults: Faults,
    /// Prompt families; engines of all tenants draw from the same.
    pub(crate) families: usize,
    /// Longest prompt in blocks.
    pub(crate) prompt: usize,
    /// Most bytes that a copy moves in one step.
    pub(crate) window: usize,
    /// Every so many calls of the node, core checks itself.
    pub(crate) check_every: u64,
    /// The slower tier.
    pub(crate) tier: TierConfig,
}

/// Name of a tenant.
pub(crate) fn tenant_name(tenant: usize) -> String {
    format!("tenant-{tenant}")
}

/// A record of this tenant and model.
pub(crate) fn record(
    tenant: usize,
    model: &str,
    groups: &[(u32, u32, u32)],
    tokens: u32,
) -> NamespaceRecord {
    let mut fields = vec![
        ("tenant".to_owned(), tenant_name(tenant)),
        ("model".to_owned(), model.to_owned()),
        ("weights".to_owned(), "blake3:00".to_owned()),
        ("kv_dtype".to_owned(), "bfloat16".to_owned()),
        ("cell_encoding".to_owned(), "sim:1".to_owned()),
        ("hash".to_owned(), "sim:0".to_owned()),
        ("block_tokens".to_owned(), tokens.to_string()),
        ("groups".to_owned(), groups.len().to_string()),
    ];
    for (at, (layers, heads, cell)) in groups.iter().enumerate() {
        let kind = if at == 0 { "full" } else { "sliding_window" };
        fields.push((format!("group.{at}.kind"), kind.to_owned()));
        fields.push((format!("group.{at}.layers"), layers.to_string()));
        fields.push((format!("group.{at}.heads"), heads.to_string()));
        fields.push((format!("group.{at}.cell_bytes"), cell.to_string()));
        if at > 0 {
            fields.push((format!("group.{at}.window"), "64".to_owned()));
        }
    }
    NamespaceRecord::build(fields).expect("the simulator's own records are valid")
}

impl Config {
    /// Draws all of it.
    pub(crate) fn draw(options: &Options) -> Config {
        let mut rng = Rng::new(options.seed, 1);
        let mut faults = options.faults;
        for fault in Fault::of_host() {
            // A third of all faults is left out of each run, so that rare ones get the stage now and then.
            if rng.one_in(3) {
                faults = faults.without(*fault);
            }
        }
        let tenants = rng.range(1, 3).min(options.tenants as u64) as usize;
        let extent_bytes = 4096 << rng.range(2, 5);
        let arenas = (0..tenants)
            .map(|_| {
                let extents = rng.range(2, 8).min(u64::from(options.extents)).max(1);
                ArenaSpec {
                    bytes: extents * extent_bytes,
                    extent_bytes,
                }
            })
            .collect();
        let tight = rng.one_in(6);
        let limits = (0..tenants)
            .map(|_| Self::limits(&mut rng, extent_bytes, tight))
            .collect();
        let namespaces = Self::namespaces(&mut rng, tenants);
        let most = options.instances as u64;
        let tier = TierConfig::draw(options, &mut faults);
        let mut node = Self::node(&mut rng, tight);
        node.core.tiers = tier.settings.clone();
        Config {
            node,
            limits,
            tight,
            arenas,
            namespaces,
            instances: rng.range(1.min(most), most.min(8)) as usize,
            faults,
            families: rng.range(1, 4) as usize,
            prompt: rng.range(3, 24) as usize,
            window: 1 << rng.range(8, 14),
            check_every: 1,
            tier,
        }
    }

    fn limits(rng: &mut Rng, extent_bytes: u64, tight: bool) -> TenantLimits {
        TenantLimits {
            sessions: if tight { rng.spread(6, 64) } else { 240 } as u32,
            namespaces: if tight { rng.spread(2, 8) } else { 64 } as u32,
            quarantine_bytes: if rng.one_in(2) {
                0
            } else {
                rng.spread(4096, 8 * extent_bytes)
            },
        }
    }

    fn node(rng: &mut Rng, tight: bool) -> NodeSettings {
        let core = Settings {
            eviction: if rng.one_in(2) {
                EvictionPolicy::Lru
            } else {
                EvictionPolicy::S3Fifo
            },
            fill_deadline_us: rng.spread(50_000, 8_000_000),
            lease_us: rng.spread(10_000, 2_000_000),
            max_lookup_lease_ms: rng.spread(5, 1_000) as u32,
            lease_fraction: [0.1, 0.5, 0.9, 1.0][rng.below(4)],
            corrupt_streak: rng.range(1, 4) as u32,
            max_hashes: rng.spread(32, 256) as u32,
            max_chains: rng.spread(4, 32) as u32,
            max_sessions: if tight { rng.spread(12, 128) } else { 720 } as u32,
            max_session_namespaces: rng.spread(4, 16) as u32,
            max_claims: rng.spread(16, 256) as u32,
            max_read_leases: rng.spread(4, 256) as u32,
            max_lookup_leases: rng.spread(2, 32) as u32,
            max_entries: rng.spread(32, 4096) as u32,
            change_log: 16_384,
            ..Settings::default()
        };
        NodeSettings {
            core,
            adopt_grace_us: rng.spread(1_000, 500_000),
        }
    }

    fn namespaces(rng: &mut Rng, tenants: usize) -> Vec<NamespaceSpec> {
        let mut models = Vec::new();
        for at in 0..rng.range(1, 3) {
            let groups: Vec<_> = (0..if rng.one_in(3) { 2 } else { 1 })
                .map(|_| {
                    let heads = *rng.pick(&[1u32, 2, 4]);
                    (
                        rng.range(2, 4) as u32,
                        heads,
                        *rng.pick(&[8u32, 24, 64, 200]),
                    )
                })
                .collect();
            models.push((format!("model-{at}"), groups, *rng.pick(&[2u32, 4])));
        }
        // Every tenant has the same models, so that only the tenant tells their blocks apart.
        let of_tenant = |tenant: usize| {
            models.iter().map(move |(name, groups, tokens)| {
                let record = record(tenant, name, groups, *tokens);
                NamespaceSpec {
                    tenant: tenant as u16,
                    id: record.id(),
                    groups: record.groups().to_vec(),
                    record: record.encode(),
                }
            })
        };
        (0..tenants).flat_map(of_tenant).collect()
    }
}

/// How an engine with these degrees cuts a group, and the part of `rank`. Heads that can't be cut so far are replicated.
pub(crate) fn cut_of(geometry: &GroupGeometry, pp: u32, tp: u32, rank: u32) -> (Cut, u32) {
    let columns = tp.min(geometry.heads);
    let cut = Cut::grid(geometry, pp, columns).expect("the simulator's own cuts are valid");
    let (stage, at) = (rank / tp, rank % tp);
    (cut, stage * columns + at * columns / tp)
}
