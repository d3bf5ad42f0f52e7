//! The limits that both ends assume until `HelloReply.limits` says otherwise. Where a limit comes from configuration, the
//! daemon does that; only the defaults are here.

/// Longest frame, in bytes after the length field.
pub const FRAME_BYTES: u32 = 4 << 20;
/// Most hashes in one request, over all of its chains.
pub const HASHES: u32 = 65_536;
/// Most namespaces that one session may register.
pub const NAMESPACES: u32 = 64;
/// Most requests of one session that have no reply yet.
pub const IN_FLIGHT: u32 = 256;
/// Longest label in a Hello, in bytes; a longer one is refused.
pub const LABEL_BYTES: usize = 256;
/// Most file descriptors that come with one message: a pidfd, an arena and its generation table.
pub const FDS: usize = 3;
