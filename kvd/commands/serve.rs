//! `kvd serve`: the daemon. Turns the configuration into what the server is told, says what it uses, and serves.

use anyhow::Result;
use kvd_core::{EvictionPolicy, OffloadPolicy, Settings, TenantLimits, TierSettings};
use kvd_node::{HostSpec, NodeSettings};
use kvd_serve::{ServeConfig, Server, SessionLimits, TenantConfig};
use tracing_subscriber::EnvFilter;

use super::stores::Places;
use crate::config::{Config, Eviction, LogFormat, Offload, Values};

/// Serves until a signal says to stop.
pub(crate) fn run(config: &Config) -> Result<()> {
    start_log(&config.values)?;
    tracing::info!(version = super::VERSION, "kvd");
    for (key, value, source) in config.rows() {
        tracing::info!(%source, "{key} = {value}");
    }
    let places = Places::choose(&config.values);
    let server = Server::bind(
        serve_config(&config.values, &places),
        places.openers(&config.values)?,
    )?;
    let sockets: Vec<_> = server
        .sockets()
        .iter()
        .map(|p| p.display().to_string())
        .collect();
    let http = server
        .http_address()
        .map_or_else(|| "off".to_owned(), |a| a.to_string());
    tracing::info!("ready socket={} http={http}", sockets.join(","));
    server.run()?;
    tracing::info!("stopped");
    Ok(())
}

fn start_log(values: &Values) -> Result<()> {
    let filter = EnvFilter::try_new(&values.log)
        .map_err(|e| anyhow::anyhow!("log = {:?}: {e}", values.log))?;
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    match values.log_format {
        LogFormat::Text => log.with_ansi(false).init(),
        LogFormat::Json => log.json().init(),
    }
    Ok(())
}

fn serve_config(values: &Values, places: &Places) -> ServeConfig {
    let limits = TenantLimits {
        sessions: values.max_sessions,
        // 0: core's own share of the arena.
        quarantine_bytes: values.quarantine_limit.unwrap_or(0),
        ..TenantLimits::default()
    };
    let tenants = values
        .all_tenants()
        .into_iter()
        .map(|tenant| TenantConfig {
            socket: tenant.socket.unwrap_or_default(),
            host: HostSpec {
                capacity: tenant.host_capacity,
                extent_bytes: values.extent_size,
                huge_pages: values.huge_pages,
            },
            limits,
            name: tenant.name,
        })
        .collect();
    ServeConfig {
        tenants,
        socket_mode: values.socket_mode,
        directory_mode: values.directory_mode,
        http: values.http,
        node: node_settings(values, places),
        limits: SessionLimits {
            frame_bytes: values.max_frame,
            hashes: values.max_hashes,
            namespaces: values.max_namespaces,
            in_flight: kvd_wire::limits::IN_FLIGHT,
            sessions: values.max_sessions,
        },
        handshake: values.handshake_timeout,
        drain: values.drain_timeout,
        version: super::VERSION.to_owned(),
    }
}

fn node_settings(values: &Values, places: &Places) -> NodeSettings {
    let micros = |d: std::time::Duration| u64::try_from(d.as_micros()).unwrap_or(u64::MAX);
    let tenants = u32::try_from(values.tenants.len())
        .unwrap_or(u32::MAX)
        .saturating_add(1);
    NodeSettings {
        core: Settings {
            eviction: match values.eviction {
                Eviction::Lru => EvictionPolicy::Lru,
                Eviction::S3Fifo => EvictionPolicy::S3Fifo,
            },
            fill_deadline_us: micros(values.store_deadline),
            lease_us: micros(values.lease),
            lease_fraction: values.lease_share,
            max_hashes: values.max_hashes,
            max_session_namespaces: values.max_namespaces,
            max_sessions: values.max_sessions.saturating_mul(tenants),
            tiers: TierSettings {
                stores: places.count(),
                offload: match values.offload {
                    Offload::WriteThrough => OffloadPolicy::WriteThrough,
                    Offload::SecondUse => OffloadPolicy::SecondUse,
                    Offload::Demotion => OffloadPolicy::Demotion,
                },
                write_bytes_per_day: places.write_budget,
                read_ahead: values.read_ahead,
                ..TierSettings::default()
            },
            ..Settings::default()
        },
        adopt_grace_us: micros(values.adopt_grace),
    }
}
