//! The change log: what became loadable and what ceased to be, in order, so that a reader can follow the index.
//!
//! A bounded ring with an incarnation and a sequence. A reader that falls behind is told so and starts over from a snapshot.
//! Deliberately absent: tokens and parents for routers, and publishing; they come with the readers that need them.

use std::collections::VecDeque;

use crate::ids::{BlockHash, NamespaceId, TenantId};

/// Where a block is or was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Tier {
    /// Host memory.
    Host,
    /// A store on NVMe.
    Nvme,
}

/// What happened to a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ChangeKind {
    /// It became loadable.
    Stored,
    /// It ceased to be.
    Removed,
}

/// One change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change {
    /// What happened.
    pub kind: ChangeKind,
    /// In which tier.
    pub tier: Tier,
    /// Whose block.
    pub tenant: TenantId,
    /// Its namespace.
    pub namespace: NamespaceId,
    /// Its KV-cache group.
    pub group: u32,
    /// Its hash.
    pub hash: BlockHash,
}

/// A stretch of the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Changes {
    /// Names this start of the daemon; sequences of another are not comparable.
    pub incarnation: [u8; 16],
    /// Changes between what was asked for and the first of these have been forgotten: take a snapshot.
    pub lost: bool,
    /// Sequence to ask with next time.
    pub next: u64,
    /// The changes, oldest first.
    pub changes: Vec<Change>,
}

/// The ring. Sequences count from 1.
#[derive(Debug)]
pub(crate) struct ChangeLog {
    incarnation: [u8; 16],
    most: usize,
    newest: u64,
    ring: VecDeque<Change>,
}

impl ChangeLog {
    pub(crate) fn new(incarnation: [u8; 16], most: u32) -> Self {
        ChangeLog {
            incarnation,
            most: most as usize,
            newest: 0,
            ring: VecDeque::new(),
        }
    }

    pub(crate) fn newest(&self) -> u64 {
        self.newest
    }

    pub(crate) fn push(&mut self, change: Change) {
        self.newest += 1;
        if self.ring.len() >= self.most {
            self.ring.pop_front();
        }
        if self.most > 0 {
            self.ring.push_back(change);
        }
    }

    /// Up to `most` of the tenant's changes after sequence `after`.
    pub(crate) fn after(&self, tenant: TenantId, after: u64, most: usize) -> Changes {
        let oldest = self.newest - self.ring.len() as u64 + 1;
        let lost = after + 1 < oldest || after > self.newest;
        let skip = after
            .saturating_add(1)
            .saturating_sub(oldest)
            .min(self.ring.len() as u64) as usize;
        let mut next = oldest - 1 + skip as u64;
        let mut changes = Vec::new();
        for change in self.ring.iter().skip(skip) {
            if changes.len() == most {
                break;
            }
            next += 1;
            if change.tenant == tenant {
                changes.push(*change);
            }
        }
        Changes {
            incarnation: self.incarnation,
            lost,
            next,
            changes,
        }
    }

    pub(crate) fn check(&self) {
        assert!(self.ring.len() <= self.most, "change log beyond its limit");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn change(n: u8, tenant: u16) -> Change {
        Change {
            kind: ChangeKind::Stored,
            tier: Tier::Host,
            tenant: TenantId(tenant),
            namespace: NamespaceId([0; 32]),
            group: 0,
            hash: BlockHash([n; 32]),
        }
    }

    #[test]
    fn a_reader_follows_and_is_told_what_it_lost() {
        let mut log = ChangeLog::new([7; 16], 4);
        assert_eq!(
            log.after(TenantId(0), 0, 10),
            Changes {
                incarnation: [7; 16],
                lost: false,
                next: 0,
                changes: vec![]
            }
        );
        for n in 1..=6 {
            log.push(change(n, 0));
        }
        let all = log.after(TenantId(0), 0, 10);
        assert!(all.lost);
        assert_eq!((all.next, all.changes.len()), (6, 4));
        let some = log.after(TenantId(0), 3, 2);
        assert!(!some.lost);
        assert_eq!((some.next, some.changes[0].hash.0[0]), (5, 4));
        assert!(
            log.after(TenantId(0), u64::MAX - 1, 2).lost,
            "a sequence of another incarnation"
        );
        assert!(
            log.after(TenantId(1), 2, 10).changes.is_empty(),
            "another tenant's changes"
        );
    }
}
