//! `kvd bench session`: what a session costs, against a daemon of its own. The other benches are in modules of their own.
//!
//! Copies are given as ratios to plain memcpy of the same run, in interleaved rounds, because machines differ and their
//! neighbours too. Progress goes to standard error, results to standard output.
#![allow(clippy::disallowed_methods, reason = "a bench is about time")]

mod copies;
mod daemon;
pub(super) mod gpu;
mod lookups;
pub(super) mod nvme;
pub(super) mod restart;
mod scratch;
pub(super) mod stall;

use std::io::Write;
use std::time::Duration;

use anyhow::Result;
use kvd_client::{GroupLayout, Identity, MoverConfig, Session};
use kvd_core::{Cut, GroupGeometry, GroupKind, NamespaceRecord};
use kvd_device::PartGeometry;

use daemon::{Daemon, GIB};

/// How long one request may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// What was measured. The names are what `--json` prints; they are only ever added to.
#[derive(Debug, Default, serde::Serialize)]
struct Results {
    /// Plain memcpy of 2 MiB blocks, one thread, 10^9 bytes a second.
    memcpy_gbps: f64,
    /// Storing 2 MiB blocks, checksums on, as a share of memcpy.
    store_ratio: f64,
    load_ratio: f64,
    /// Plain memcpy of 64 KiB blocks.
    memcpy_gbps_64k: f64,
    store_ratio_64k: f64,
    load_ratio_64k: f64,
    /// Looking up so many hashes over the socket, microseconds.
    lookup_128_us_p50: f64,
    lookup_128_us_p99: f64,
    lookup_6250_us_p50: f64,
    lookup_6250_us_p99: f64,
    /// The same with hashes that are chosen at random each time.
    lookup_6250_cold_us_p50: f64,
    lookup_6250_cold_us_p99: f64,
    /// Blocks that were held meanwhile.
    lookup_blocks: u64,
    /// A round trip that asks nothing.
    ping_us_p50: f64,
    /// As many bytes over a plain Unix socket to another thread and a short answer, blocking: what the sockets and the sleeping cores
    /// of this machine cost.
    raw_128_us_p50: f64,
    raw_6250_us_p50: f64,
    /// Memory of the daemon beside the pool, with a faulted-in pool of 4 GiB and an empty index, 2^20 bytes.
    idle_rss_mb: f64,
    /// The same with `lookup_blocks` blocks.
    full_rss_mb: f64,
    /// From starting the process to being ready, 4 GiB arena, seconds.
    ready_s: f64,
}

/// Measures everything and prints it.
pub(crate) fn run(json: bool) -> Result<()> {
    let mut results = Results::default();
    progress("how soon a daemon is ready");
    let mut starts = Vec::new();
    for _ in 0..5 {
        let daemon = Daemon::start(4 * GIB)?;
        starts.push(daemon.ready_after.as_secs_f64());
    }
    results.ready_s = median(&mut starts);
    copies::measure(&mut results)?;
    lookups::measure(&mut results)?;
    if json {
        return super::print(&format!("{}\n", serde_json::to_string_pretty(&results)?));
    }
    super::print(&render(&results)?)
}

fn render(results: &impl serde::Serialize) -> Result<String> {
    let mut text = String::new();
    if let serde_json::Value::Object(fields) = serde_json::to_value(results)? {
        for (name, value) in fields {
            text.push_str(&format!(
                "{name:<26} {:.3}\n",
                value.as_f64().unwrap_or_default()
            ));
        }
    }
    Ok(text)
}

/// Says what is being done.
fn progress(what: &str) {
    let _ = writeln!(std::io::stderr(), "bench: {what}");
}

/// The one in the middle.
///
/// # Panics
/// When there is none.
fn median(values: &mut [f64]) -> f64 {
    quantile(values, 0.5)
}

fn quantile(values: &mut [f64], share: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    values[((values.len() - 1) as f64 * share).round() as usize]
}

/// A namespace with one group, of blocks of 16 tokens.
struct Shape {
    part: PartGeometry,
}

impl Shape {
    fn new(layers: u32, heads: u32, cell_bytes: u32) -> Self {
        Self {
            part: PartGeometry {
                layers,
                heads,
                tokens: 16,
                cell_bytes,
            },
        }
    }

    fn record(&self) -> Result<Vec<u8>> {
        let part = self.part;
        let fields = [
            ("tenant", "default".to_owned()),
            ("model", "bench".to_owned()),
            ("weights", "bench".to_owned()),
            ("kv_dtype", "bfloat16".to_owned()),
            ("cell_encoding", "bench-1".to_owned()),
            ("hash", "bench:0".to_owned()),
            ("block_tokens", part.tokens.to_string()),
            ("groups", "1".to_owned()),
            ("group.0.kind", "full".to_owned()),
            ("group.0.layers", part.layers.to_string()),
            ("group.0.heads", part.heads.to_string()),
            ("group.0.cell_bytes", part.cell_bytes.to_string()),
        ];
        Ok(NamespaceRecord::build(fields)?.encode())
    }

    /// One process that holds whole blocks.
    fn mover(&self) -> MoverConfig {
        let part = self.part;
        let geometry = GroupGeometry {
            kind: GroupKind::Full,
            layers: part.layers,
            heads: part.heads,
            block_tokens: part.tokens,
            cell_bytes: part.cell_bytes,
            window: None,
        };
        let cut = Cut::whole(&geometry);
        MoverConfig::new(0, geometry, cut, 0)
    }

    /// Connects and registers.
    fn open(&self, daemon: &Daemon) -> Result<(Session, u32)> {
        let mut session =
            Session::connect(&daemon.socket, &Identity::script("kvd bench"), PATIENCE)?;
        let layout = GroupLayout {
            group: 0,
            layer_bounds: vec![0, self.part.layers],
            head_bounds: vec![0, self.part.heads],
            copies: true,
            part: 0,
        };
        let namespace = session.register(&self.record()?, &[layout])?.namespace;
        Ok((session, namespace))
    }
}

/// Numbers that look random and are the same every time.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        // SplitMix64.
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn hash(&mut self) -> [u8; 32] {
        let mut hash = [0; 32];
        for piece in hash.chunks_mut(8) {
            piece.copy_from_slice(&self.next().to_le_bytes());
        }
        hash
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_of_the_sorted_values() {
        let mut values = [5.0, 1.0, 4.0, 2.0, 3.0];
        assert_eq!(
            (
                median(&mut values),
                quantile(&mut values, 0.99),
                quantile(&mut values, 0.0)
            ),
            (3.0, 5.0, 1.0)
        );
    }

    #[test]
    fn the_benchs_namespace_is_legal() {
        Shape::new(32, 8, 256).record().expect("a legal record");
    }
}
