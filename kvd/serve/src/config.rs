//! What a server is told. The root package makes it from the configuration; nothing is read here.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use kvd_core::TenantLimits;
use kvd_node::{HostSpec, NodeSettings};

/// A tenant: its socket and its memory.
#[derive(Debug, Clone)]
pub struct TenantConfig {
    /// Its name.
    pub name: String,
    /// Where its socket is; its directory belongs to it alone.
    pub socket: PathBuf,
    /// Its arena.
    pub host: HostSpec,
    /// What it may use.
    pub limits: TenantLimits,
}

/// Limits of each session, as HelloReply states them.
#[derive(Debug, Clone, Copy)]
pub struct SessionLimits {
    /// Longest frame, in bytes after the length field.
    pub frame_bytes: u32,
    /// Most hashes in one request.
    pub hashes: u32,
    /// Most namespaces of a session.
    pub namespaces: u32,
    /// Most requests without a reply.
    pub in_flight: u32,
    /// Most sessions of a tenant.
    pub sessions: u32,
}

/// A daemon.
#[derive(Debug, Clone)]
pub struct ServeConfig {
    /// Its tenants; at least one.
    pub tenants: Vec<TenantConfig>,
    /// Permissions of the sockets.
    pub socket_mode: u32,
    /// Permissions of directories that are made for sockets.
    pub directory_mode: u32,
    /// Where HTTP listens, if at all.
    pub http: Option<SocketAddr>,
    /// The node's settings.
    pub node: NodeSettings,
    /// Limits of sessions.
    pub limits: SessionLimits,
    /// How long a connection may take to say who it is.
    pub handshake: Duration,
    /// How long a shutdown waits for answers to be sent.
    pub drain: Duration,
    /// Version of the daemon, for people.
    pub version: String,
}
