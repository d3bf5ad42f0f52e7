//! Names of things: plain numbers and digests, each with a type of its own so that one can't be passed for another.
//! Deliberately absent: making them. Tokens and instance ids are random and come from outside; core draws no randomness.

use std::fmt;

/// Microseconds on a monotonic clock that the driver injects. Never goes back inside core: an earlier value is ignored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Now(pub u64);

/// A store of a slower tier, counted from 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StoreId(pub u8);

/// The engine's own chained hash of a block: which tokens, and all tokens before them.
///
/// Lists of hashes in requests are `&[[u8; 32]]`, so that a frame's bytes are used where they lie (`as_chunks::<32>()`).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct BlockHash(pub [u8; 32]);

impl BlockHash {
    /// The low 8 bytes, big-endian: the form that engines publish to routers. Also picks the writer among replicas.
    pub fn low64(&self) -> u64 {
        low64(&self.0)
    }
}

/// [`BlockHash::low64`] of a hash that lies in a list.
pub fn low64(hash: &[u8; 32]) -> u64 {
    let mut low = [0; 8];
    low.copy_from_slice(&hash[24..]);
    u64::from_be_bytes(low)
}

/// Which of `replicas` processes (in ascending rank order) writes this block's part: `low64(hash) % replicas`.
/// Both core and connectors use this function, so that they agree without a message.
pub fn replica_of(hash: &[u8; 32], replicas: usize) -> usize {
    (low64(hash) % replicas.max(1) as u64) as usize
}

/// BLAKE3 of a canonical namespace record.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NamespaceId(pub [u8; 32]);

/// One engine instance: the same for its scheduler and all its workers.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct InstanceId(pub [u8; 16]);

/// Token of one session, random, never 0, given by the node.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionId(pub u64);

/// A tenant of this daemon, numbered by the node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TenantId(pub u16);

/// Number of a request inside its session; given back in the reply, otherwise meaningless here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub u32);

/// What a process of an engine instance is there for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// Reserves and asks; copies nothing.
    Scheduler,
    /// Copies.
    Worker,
    /// A script: one process that does both.
    Both,
    /// Status only; never gets the arena.
    #[default]
    Observer,
}

impl Role {
    /// Whether a session of this role may write into the arena.
    pub fn copies(self) -> bool {
        matches!(self, Role::Worker | Role::Both)
    }
}

fn hex(bytes: &[u8], f: &mut fmt::Formatter<'_>) -> fmt::Result {
    bytes.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
}

macro_rules! hex_names {
    ($($name:ident),*) => {$(
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                hex(&self.0, f)
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                hex(&self.0, f)
            }
        }
    )*};
}
hex_names!(BlockHash, NamespaceId, InstanceId);

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl fmt::Debug for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn low64_is_the_last_eight_bytes_big_endian() {
        let mut hash = [0u8; 32];
        hash[31] = 7;
        hash[24] = 1;
        assert_eq!(BlockHash(hash).low64(), (1 << 56) | 7);
        assert_eq!(replica_of(&hash, 4), 3);
        assert_eq!(replica_of(&hash, 0), 0);
    }

    #[test]
    fn names_print_as_hex() {
        assert_eq!(InstanceId([0xab; 16]).to_string(), "ab".repeat(16));
        assert_eq!(SessionId(10).to_string(), "000000000000000a");
    }
}
