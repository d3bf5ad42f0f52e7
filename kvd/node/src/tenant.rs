//! One tenant as the node sees it: what it was given, and where its arena stands.
//!
//! The policy on arenas: a daemon that may have had a predecessor waits a moment for engines that bring the old arena,
//! because taking new memory while they still map the old would double what is in use. Otherwise the arena is made when the
//! first session needs it, or after that moment, and is faulted in behind everybody's back.

use kvd_core::{ArenaShape, Now, StatusView, TenantLimits};

use crate::counts::Counts;
use crate::ports::Pages;

/// A tenant as it is configured.
#[derive(Debug, Clone)]
pub struct TenantSpec {
    /// Its name; namespace records must state it.
    pub name: String,
    /// What it may use.
    pub limits: TenantLimits,
    /// Engines of a former daemon may come and bring its arena: registrations wait for them, for the grace period.
    pub expect_offers: bool,
}

/// Where a tenant's arena stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ArenaState {
    /// None yet: it is made when a session needs it, or when the grace period is over.
    Absent,
    /// None yet: registrations wait for an engine that brings the former daemon's.
    Waiting,
    /// It could not be made, for this reason; the next registration tries again.
    Failed(String),
    /// It is there.
    Made {
        /// It came from a former daemon.
        adopted: bool,
        /// Extents that have been faulted in, or could not be.
        settled: u32,
        /// Extents there are.
        extents: u32,
    },
}

#[derive(Debug)]
pub(crate) struct Made {
    pub(crate) shape: ArenaShape,
    pub(crate) adopted: bool,
    pub(crate) settled: u32,
}

#[derive(Debug)]
pub(crate) struct Tenant {
    pub(crate) spec: TenantSpec,
    /// When the grace period is over.
    pub(crate) grace_until: Now,
    pub(crate) made: Option<Made>,
    pub(crate) failed: Option<String>,
    pub(crate) counts: Counts,
}

impl Tenant {
    /// Whether registrations have to wait for an offer.
    pub(crate) fn waits(&self, now: Now) -> bool {
        self.spec.expect_offers && self.made.is_none() && now < self.grace_until
    }

    pub(crate) fn state(&self, now: Now) -> ArenaState {
        match (&self.made, &self.failed) {
            (Some(made), _) => ArenaState::Made {
                adopted: made.adopted,
                settled: made.settled,
                extents: made.shape.extents(),
            },
            (None, Some(reason)) => ArenaState::Failed(reason.clone()),
            (None, None) if self.waits(now) => ArenaState::Waiting,
            (None, None) => ArenaState::Absent,
        }
    }
}

/// One tenant at one moment, owned, so that the text is made on another thread.
pub struct TenantSnapshot {
    /// What core says.
    pub view: StatusView,
    /// This tenant's counts.
    pub counts: Counts,
    /// Where the arena stands.
    pub arena: ArenaState,
    /// Finds out what pages there are. Slow on large arenas: never to be called on the node's thread.
    pub probe: Option<Box<dyn FnOnce() -> Pages + Send>>,
}

impl std::fmt::Debug for TenantSnapshot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TenantSnapshot")
            .field("view", &self.view)
            .field("arena", &self.arena)
            .finish_non_exhaustive()
    }
}
