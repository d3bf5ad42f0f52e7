//! What the node needs of the world. Each port has a real adapter and a simulated one.

use kvd_core::tier::{HostRange, StoreDone, StoreError, StoreOp};
use kvd_core::{ArenaShape, Now, StoreId, TenantId};

/// A port could not do what it was asked. The text is lower case and says what to do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct PortError(pub String);

/// The time, which never goes back.
pub trait Clock {
    /// Now.
    fn now(&self) -> Now;
}

/// Randomness, for tokens that nobody may guess.
pub trait Entropy {
    /// Fills all of `bytes`.
    fn fill(&mut self, bytes: &mut [u8]);
}

/// What was found in an arena that came from a former daemon.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdoptedArena {
    /// Its sizes.
    pub shape: ArenaShape,
    /// Generation words from slot 0 on; what is left out at the end is 0.
    pub words: Vec<u64>,
    /// Tokens of sessions that may be writing.
    pub writers: Vec<u64>,
}

/// What pages an arena got.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Pages {
    /// Size of a page as the kernel says, in bytes; 0 when unknown.
    pub page_bytes: u64,
    /// Bytes that are faulted in.
    pub resident_bytes: u64,
    /// Bytes that lie on huge pages.
    pub huge_bytes: u64,
}

/// The shared memory of all tenants: at most one arena each.
///
/// No call waits for memory to be faulted in. [`ArenaPort::populate`] only asks; the answer comes back through
/// [`crate::Node::populated`], exactly once for each call, unless the arena was replaced meanwhile.
pub trait ArenaPort {
    /// What a reconnecting client brings.
    type Offer;

    /// A part of an arena, for a store to read or write. Keeps the memory from going away.
    type Span;

    /// Makes the tenant's arena. Replaces the one there was.
    ///
    /// # Errors
    /// When the system gives no such memory. There is no arena then.
    fn create(&mut self, tenant: TenantId) -> Result<ArenaShape, PortError>;

    /// Takes over an arena that a client has brought. Replaces the one there was.
    ///
    /// # Errors
    /// When the offer is not what it claims to be. Nothing has changed then.
    fn adopt(&mut self, tenant: TenantId, offer: Self::Offer) -> Result<AdoptedArena, PortError>;

    /// Writes one generation word. Readers that see it see everything that was done before.
    fn set_generation(&mut self, tenant: TenantId, slot: u32, word: u64);

    /// Replaces the table of sessions that may write.
    fn set_writers(&mut self, tenant: TenantId, tokens: &[u64]);

    /// Asks for an extent to be faulted in, or again after holes were punched.
    fn populate(&mut self, tenant: TenantId, extent: u32);

    /// This part of a tenant's arena; `None` when there is no such memory.
    fn span(&self, range: HostRange) -> Option<Self::Span>;

    /// Something that finds out what pages the tenant's arena got, to be called on another thread: it takes a while.
    fn page_probe(&self, tenant: TenantId) -> Option<Box<dyn FnOnce() -> Pages + Send>>;
}

/// The stores of the slower tier.
///
/// An operation only asks. Its outcome comes back through [`crate::Node::store_done`], exactly once for each operation, from
/// whatever thread the daemon takes it.
pub trait StorePort<Span> {
    /// Begins an operation; `span` is its host memory, if it has any. Never waits: what can't be begun is answered at once.
    fn begin(&mut self, store: StoreId, op: StoreOp, span: Option<Span>) -> Option<StoreDone>;
}

impl<Span, S: StorePort<Span> + ?Sized> StorePort<Span> for Box<S> {
    fn begin(&mut self, store: StoreId, op: StoreOp, span: Option<Span>) -> Option<StoreDone> {
        (**self).begin(store, op, span)
    }
}

/// No store: core never asks.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoStores;

impl<Span> StorePort<Span> for NoStores {
    fn begin(&mut self, _: StoreId, op: StoreOp, _: Option<Span>) -> Option<StoreDone> {
        Some(op.refused(StoreError::Off))
    }
}
