//! A request with its own memory, as it waits in a simulated socket.

use kvd_core::{BlockHash, Chain, GroupLayout, Request, Scope, SessionId};

/// One group of a Register.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    pub(crate) group: u32,
    pub(crate) layer_bounds: Vec<u32>,
    pub(crate) head_bounds: Vec<u32>,
    pub(crate) copies: bool,
    pub(crate) part: u32,
}

/// Blocks of one group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct OwnChain {
    pub(crate) group: u32,
    pub(crate) hashes: Vec<[u8; 32]>,
    pub(crate) parent: Option<[u8; 32]>,
}

impl OwnChain {
    fn lend(&self) -> Chain<'_> {
        Chain {
            group: self.group,
            hashes: &self.hashes,
            parent: self.parent.map(BlockHash),
        }
    }
}

/// As [`Request`], variant for variant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Ask {
    Register {
        record: Vec<u8>,
        groups: Vec<Layout>,
    },
    Lookup {
        namespace: u32,
        chains: Vec<OwnChain>,
        lease_ms: u32,
        leading: bool,
    },
    Reserve {
        namespace: u32,
        chains: Vec<OwnChain>,
    },
    Commit {
        namespace: u32,
        group: u32,
        slots: Vec<u32>,
        generations: Vec<u64>,
        crcs: Vec<u64>,
    },
    Abort {
        slots: Vec<u32>,
        generations: Vec<u64>,
    },
    Load {
        namespace: u32,
        group: u32,
        hashes: Vec<[u8; 32]>,
        deadline_ms: u32,
    },
    Release {
        slots: Vec<u32>,
        generations: Vec<u64>,
        corrupt: Vec<u32>,
        lease: u64,
    },
    Fence {
        past: u64,
    },
}

impl Ask {
    /// A number for the event log.
    pub(crate) fn code(&self) -> u64 {
        match self {
            Ask::Register { .. } => 1,
            Ask::Lookup { .. } => 2,
            Ask::Reserve { .. } => 3,
            Ask::Commit { .. } => 4,
            Ask::Abort { .. } => 5,
            Ask::Load { .. } => 6,
            Ask::Release { .. } => 7,
            Ask::Fence { .. } => 8,
        }
    }

    /// Calls `f` with the request as core takes it.
    pub(crate) fn lend<R>(&self, f: impl FnOnce(Request<'_>) -> R) -> R {
        match self {
            Ask::Register { record, groups } => lend_register(record, groups, f),
            Ask::Lookup {
                namespace,
                chains,
                lease_ms,
                leading,
            } => {
                let chains: Vec<Chain<'_>> = chains.iter().map(OwnChain::lend).collect();
                f(Request::Lookup {
                    namespace: *namespace,
                    chains: &chains,
                    lease_ms: *lease_ms,
                    scope: match leading {
                        true => Scope::Leading,
                        false => Scope::All,
                    },
                })
            }
            Ask::Reserve { namespace, chains } => {
                let chains: Vec<Chain<'_>> = chains.iter().map(OwnChain::lend).collect();
                f(Request::Reserve {
                    namespace: *namespace,
                    chains: &chains,
                })
            }
            Ask::Commit {
                namespace,
                group,
                slots,
                generations,
                crcs,
            } => f(Request::Commit {
                namespace: *namespace,
                group: *group,
                slots,
                generations,
                crcs,
            }),
            Ask::Abort { slots, generations } => f(Request::Abort { slots, generations }),
            Ask::Load {
                namespace,
                group,
                hashes,
                deadline_ms,
            } => f(Request::Load {
                namespace: *namespace,
                group: *group,
                hashes,
                deadline_ms: *deadline_ms,
            }),
            Ask::Release {
                slots,
                generations,
                corrupt,
                lease,
            } => f(Request::Release {
                slots,
                generations,
                corrupt,
                lease: *lease,
            }),
            Ask::Fence { past } => f(Request::Fence {
                past: SessionId(*past),
            }),
        }
    }
}

fn lend_register<R>(record: &[u8], groups: &[Layout], f: impl FnOnce(Request<'_>) -> R) -> R {
    let groups: Vec<GroupLayout<'_>> = groups
        .iter()
        .map(|g| GroupLayout {
            group: g.group,
            layer_bounds: &g.layer_bounds,
            head_bounds: &g.head_bounds,
            copies: g.copies,
            part: g.part,
        })
        .collect();
    f(Request::Register {
        record,
        groups: &groups,
    })
}
