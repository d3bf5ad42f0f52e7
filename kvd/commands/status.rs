//! `kvd status`: what a daemon says of itself over its session socket, as tables or as it came.

use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use bytesize::ByteSize;
use comfy_table::{Table, presets};
use kvd_client::{ErrorKind, Identity, Session};
use kvd_node::{HostTier, NamespaceStatus, SessionStatus, SlotStatus, Status, TenantStatus};

use crate::config::Config;

/// How long the daemon may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// Asks the daemon on the configured socket, and prints.
pub(crate) fn run(config: &Config, json: bool) -> Result<()> {
    let socket = config.values.default_socket();
    let identity = Identity::observer("kvd status");
    let mut session = Session::connect(&socket, &identity, PATIENCE).map_err(|error| {
        let at = socket.display();
        let about = match error.kind() {
            ErrorKind::Unavailable => format!("no daemon answers on {at}; is kvd serve running?"),
            _ => format!("cannot ask the daemon on {at}"),
        };
        anyhow!(error).context(about)
    })?;
    let text = session.status()?;
    session.close()?;
    if json {
        let mut text = String::from_utf8(text.to_vec())?;
        text.push('\n');
        return super::print(&text);
    }
    let status: Status = serde_json::from_slice(&text)
        .context("the daemon's status is of another version; use --json")?;
    super::print(&render(&status))
}

fn render(status: &Status) -> String {
    let up = humantime::format_duration(Duration::from_secs(status.uptime_s as u64));
    let mut text = format!(
        "kvd {} up {up}, pid {}, incarnation {}\n",
        status.version,
        status.pid,
        &short(&status.incarnation)
    );
    for tenant in &status.tenants {
        text.push_str(&format!("\ntenant {} on {}\n", tenant.name, tenant.socket));
        text.push_str(&tiers(tenant));
        text.push_str(&stores(status));
        text.push_str(&slots(&tenant.tiers.host));
        text.push_str(&traffic(tenant));
        text.push_str(&namespaces(&tenant.namespaces));
        text.push_str(&sessions(&tenant.sessions));
    }
    text
}

pub(super) fn table(head: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::UTF8_HORIZONTAL_ONLY);
    table.set_header(head.to_vec());
    table
}

pub(super) fn finish(table: &Table) -> String {
    format!("{table}\n")
}

pub(super) fn size(bytes: u64) -> String {
    ByteSize(bytes).display().iec().to_string()
}

/// Enough of an id to tell it from others.
fn short(id: &str) -> &str {
    id.get(..12).unwrap_or(id)
}

fn tiers(tenant: &TenantStatus) -> String {
    let host = &tenant.tiers.host;
    let used = host.slot_bytes.resident;
    let pages = match host.huge_bytes {
        0 => size(host.page_bytes),
        huge => format!("{} ({} on huge pages)", size(host.page_bytes), size(huge)),
    };
    let state = match (&host.reason, host.adopted) {
        (Some(reason), _) => format!("{}: {reason}", host.state),
        (None, true) => format!("{}, adopted", host.state),
        (None, false) => host.state.clone(),
    };
    let mut rows = table(&[
        "tier",
        "state",
        "size",
        "blocks",
        "pinned",
        "quarantined",
        "pages",
        "eviction",
    ]);
    rows.add_row([
        "host".to_owned(),
        state,
        size(host.bytes),
        size(used),
        size(host.pinned_bytes),
        format!(
            "{} of {}",
            size(host.slot_bytes.quarantined),
            size(host.quarantine_limit_bytes)
        ),
        pages,
        host.eviction.clone(),
    ]);
    let mut text = finish(&rows);
    let extents = host.extents;
    let odd = [
        (extents.pending, "not faulted in yet"),
        (extents.failed, "without memory"),
        (
            extents.held_out,
            "kept from use until a former daemon's writers come back",
        ),
        (extents.refilling, "being refilled after corrupt blocks"),
    ];
    for (count, what) in odd.into_iter().filter(|(count, _)| *count > 0) {
        text.push_str(&format!(
            "{count} extents of {} {what}\n",
            size(host.extent_bytes)
        ));
    }
    if host.unfenced_writers > 0 {
        text.push_str(&format!(
            "{} writers of a former daemon have not come back\n",
            host.unfenced_writers
        ));
    }
    text
}

/// The stores below host memory; they serve all tenants.
fn stores(status: &Status) -> String {
    if status.stores.is_empty() {
        return String::new();
    }
    let mut rows = table(&["nvme", "state", "size", "blocks", "found at start", "by"]);
    for store in &status.stores {
        let by = match &store.io_reason {
            Some(reason) => format!("{} ({reason})", store.io),
            None => store.io.clone(),
        };
        rows.add_row([
            store.path.clone(),
            store.state.clone(),
            size(store.bytes),
            store.blocks.to_string(),
            store.recovered.to_string(),
            by,
        ]);
    }
    let count = |name: &str| status.tier.counts.get(name).copied().unwrap_or(0);
    let failed = [
        "fetch_failed_corrupt",
        "fetch_failed_io",
        "fetch_failed_off",
    ];
    let failed: u64 = failed.iter().map(|name| count(name)).sum();
    let missed = match count("demote_missed") {
        0 => String::new(),
        missed => format!(", {missed} left memory before they were written"),
    };
    format!(
        "{}{} blocks went down ({}), {} came up ({}), {failed} could not be read{missed}\n",
        finish(&rows),
        count("offloaded"),
        size(count("offloaded_bytes")),
        count("fetched"),
        size(count("fetched_bytes")),
    )
}

fn slots(host: &HostTier) -> String {
    let mut rows = table(&[
        "slots of",
        "extents",
        "free",
        "reserved",
        "filling",
        "resident",
        "quarantined",
    ]);
    let cells = |name: String, extents: u32, s: SlotStatus| {
        let counts = [s.free, s.reserved, s.filling, s.resident, s.quarantined];
        [name, extents.to_string()]
            .into_iter()
            .chain(counts.map(|n| n.to_string()))
            .collect::<Vec<_>>()
    };
    for class in &host.classes {
        rows.add_row(cells(size(class.slot_bytes), class.extents, class.slots));
    }
    rows.add_row(cells("all".to_owned(), host.extents.classed, host.slots));
    finish(&rows)
}

fn reasons<'a>(failed: impl Iterator<Item = (&'a String, &'a u64)>) -> String {
    let some: Vec<_> = failed
        .filter(|(_, n)| **n > 0)
        .map(|(reason, n)| format!("{reason} {n}"))
        .collect();
    if some.is_empty() {
        "0".to_owned()
    } else {
        some.join(", ")
    }
}

fn traffic(tenant: &TenantStatus) -> String {
    let mut rows = table(&["blocks", "hit", "absent", "filling", "failed", "bytes"]);
    let (lookups, loads, stores) = (tenant.lookups, &tenant.loads, &tenant.stores);
    rows.add_row([
        "looked up".to_owned(),
        lookups.hit.to_string(),
        lookups.absent.to_string(),
        lookups.filling.to_string(),
        String::new(),
        String::new(),
    ]);
    rows.add_row([
        "loaded".to_owned(),
        loads.hit.to_string(),
        loads.absent.to_string(),
        String::new(),
        reasons(loads.failed.iter()),
        size(loads.bytes),
    ]);
    rows.add_row([
        "stored".to_owned(),
        format!("{} ({} were there)", stores.stored, stores.present),
        String::new(),
        stores.filling.to_string(),
        reasons(stores.failed.iter()),
        size(stores.bytes),
    ]);
    format!("{}{} blocks evicted\n", finish(&rows), stores.evicted)
}

fn namespaces(all: &[NamespaceStatus]) -> String {
    if all.is_empty() {
        return "no namespaces\n".to_owned();
    }
    let mut rows = table(&["namespace", "model", "blocks", "bytes", "sessions"]);
    for one in all {
        rows.add_row([
            short(&one.id).to_owned(),
            one.model.clone(),
            one.blocks.to_string(),
            size(one.bytes),
            one.sessions.to_string(),
        ]);
    }
    let mut text = finish(&rows);
    for one in all {
        // Each pair once.
        for other in one
            .differs
            .iter()
            .filter(|other| one.id < other.from || all.len() > 8)
        {
            let fields: Vec<_> = other
                .fields
                .iter()
                .map(|f| {
                    format!(
                        "{} ({} / {})",
                        f.field,
                        value(f.here.as_deref()),
                        value(f.there.as_deref())
                    )
                })
                .collect();
            text.push_str(&format!(
                "{} differs from {} by {}\n",
                short(&one.id),
                short(&other.from),
                fields.join(", ")
            ));
        }
    }
    text
}

fn value(field: Option<&str>) -> String {
    match field {
        None => "none".to_owned(),
        Some(text) if text.chars().count() > 40 => text.chars().take(40).chain(['…']).collect(),
        Some(text) => text.to_owned(),
    }
}

fn sessions(all: &[SessionStatus]) -> String {
    if all.is_empty() {
        return "no sessions\n".to_owned();
    }
    let mut rows = table(&[
        "session", "instance", "role", "rank", "pid", "state", "age", "writing", "leases",
    ]);
    for one in all {
        rows.add_row([
            one.label.clone(),
            short(&one.instance).to_owned(),
            one.role.clone(),
            format!("{}/{}", one.rank, one.world),
            one.pid.map_or_else(String::new, |pid| pid.to_string()),
            if one.attached { "attached" } else { "detached" }.to_owned(),
            humantime::format_duration(Duration::from_secs(one.age_s as u64)).to_string(),
            one.writing.to_string(),
            (one.read_leases + one.lookup_leases).to_string(),
        ]);
    }
    finish(&rows)
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvd_node::{Difference, Differs};

    fn namespace(id: &str, other: &str) -> NamespaceStatus {
        let field = Difference {
            field: "kv_dtype".to_owned(),
            here: Some("fp8".to_owned()),
            there: None,
        };
        NamespaceStatus {
            id: id.repeat(32),
            model: "llama".to_owned(),
            blocks: 3,
            bytes: 6 << 20,
            sessions: 1,
            fields: [("kv_dtype".to_owned(), "fp8".to_owned())].into(),
            differs: vec![Differs {
                from: other.repeat(32),
                fields: vec![field],
            }],
        }
    }

    #[test]
    fn a_pair_of_namespaces_is_told_apart_once_by_its_fields() {
        let text = namespaces(&[namespace("aa", "bb"), namespace("bb", "aa")]);
        assert_eq!(text.matches("differs from").count(), 1, "{text}");
        assert!(
            text.contains("aaaaaaaaaaaa differs from bbbbbbbbbbbb by kv_dtype (fp8 / none)"),
            "{text}"
        );
    }

    #[test]
    fn reasons_are_named_where_there_are_any() {
        let none = [("crc".to_owned(), 0)];
        let some = [
            ("crc".to_owned(), 2),
            ("busy".to_owned(), 0),
            ("lost".to_owned(), 1),
        ];
        assert_eq!(reasons(none.iter().map(|(k, v)| (k, v))), "0");
        assert_eq!(reasons(some.iter().map(|(k, v)| (k, v))), "crc 2, lost 1");
    }
}
