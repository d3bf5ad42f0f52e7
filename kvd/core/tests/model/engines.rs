//! The engines that take part, and what they may do.

use kvd_core::{Role, TenantId};
use proptest::prelude::*;

use crate::common::{A, B, CELL};

/// One engine instance: how it cuts blocks, and its processes.
pub struct Engine {
    pub tenant: TenantId,
    pub weights: &'static str,
    /// Bytes of a cell: the size of blocks.
    pub cell: u32,
    pub pp: u32,
    pub tp: u32,
    /// Processes for each part.
    pub replicas: u32,
    pub scheduler: bool,
}

pub const ENGINES: [Engine; 5] = [
    Engine {
        tenant: A,
        weights: "w",
        cell: CELL,
        pp: 1,
        tp: 2,
        replicas: 1,
        scheduler: true,
    },
    Engine {
        tenant: A,
        weights: "w",
        cell: CELL,
        pp: 1,
        tp: 1,
        replicas: 1,
        scheduler: false,
    },
    Engine {
        tenant: A,
        weights: "w",
        cell: CELL,
        pp: 2,
        tp: 4,
        replicas: 1,
        scheduler: true,
    },
    Engine {
        tenant: B,
        weights: "w",
        cell: CELL,
        pp: 1,
        tp: 1,
        replicas: 1,
        scheduler: false,
    },
    Engine {
        tenant: A,
        weights: "big",
        cell: CELL * 4,
        pp: 2,
        tp: 1,
        replicas: 2,
        scheduler: false,
    },
];

/// A process of one of them.
#[derive(Clone, Copy)]
pub struct Process {
    pub engine: usize,
    pub role: Role,
    pub rank: u32,
    pub part: Option<u32>,
}

pub fn processes() -> Vec<Process> {
    let mut all = Vec::new();
    for (engine, e) in ENGINES.iter().enumerate() {
        if e.scheduler {
            all.push(Process {
                engine,
                role: Role::Scheduler,
                rank: 0,
                part: None,
            });
        }
        let role = if e.scheduler {
            Role::Worker
        } else {
            Role::Both
        };
        for rank in 0..e.pp * e.tp * e.replicas {
            all.push(Process {
                engine,
                role,
                rank,
                part: Some(rank / e.replicas),
            });
        }
    }
    all
}

/// What happens next. Numbers pick among what there is.
#[derive(Clone, Debug)]
pub enum Op {
    Reserve {
        process: usize,
        base: u64,
        len: u64,
    },
    Tell {
        engine: usize,
    },
    Scribble {
        process: usize,
        pick: usize,
    },
    Store {
        process: usize,
        count: usize,
    },
    Abort {
        process: usize,
        pick: usize,
    },
    Untell {
        engine: usize,
    },
    Detach {
        process: usize,
    },
    Kill {
        process: usize,
    },
    Close {
        process: usize,
    },
    Open {
        process: usize,
        fence: bool,
    },
    Revive {
        engine: usize,
    },
    Lookup {
        process: usize,
        base: u64,
        len: u64,
        lease: bool,
        leading: bool,
    },
    Load {
        process: usize,
        base: u64,
        len: u64,
    },
    Copy {
        pick: usize,
    },
    Finish {
        pick: usize,
    },
    Tamper {
        pick: usize,
    },
    Lie {
        process: usize,
        kind: u8,
        pick: usize,
        off: u64,
    },
    Wait {
        micros: u64,
    },
    Hurry {
        engine: usize,
    },
}

pub fn ops(most: usize) -> impl Strategy<Value = Vec<Op>> {
    let process = 0..processes().len();
    let engine = 0..ENGINES.len();
    let (base, len) = (0u64..14, 1u64..10);
    let pick = 0usize..1000;
    let op = prop_oneof![
        14 => (process.clone(), base.clone(), len.clone())
            .prop_map(|(process, base, len)| Op::Reserve { process, base, len }),
        10 => engine.clone().prop_map(|engine| Op::Hurry { engine }),
        4 => engine.clone().prop_map(|engine| Op::Tell { engine }),
        3 => (process.clone(), pick.clone()).prop_map(|(process, pick)| Op::Scribble { process, pick }),
        8 => (process.clone(), 1usize..8).prop_map(|(process, count)| Op::Store { process, count }),
        3 => (process.clone(), pick.clone()).prop_map(|(process, pick)| Op::Abort { process, pick }),
        2 => engine.clone().prop_map(|engine| Op::Untell { engine }),
        8 => engine.prop_map(|engine| Op::Revive { engine }),
        2 => process.clone().prop_map(|process| Op::Detach { process }),
        1 => process.clone().prop_map(|process| Op::Kill { process }),
        1 => process.clone().prop_map(|process| Op::Close { process }),
        5 => (process.clone(), any::<bool>()).prop_map(|(process, fence)| Op::Open { process, fence }),
        4 => (process.clone(), base.clone(), len.clone(), any::<bool>(), any::<bool>()).prop_map(
            |(process, base, len, lease, leading)| Op::Lookup { process, base, len, lease, leading }
        ),
        10 => (process.clone(), base, len).prop_map(|(process, base, len)| Op::Load { process, base, len }),
        8 => pick.clone().prop_map(|pick| Op::Copy { pick }),
        8 => pick.clone().prop_map(|pick| Op::Finish { pick }),
        1 => pick.clone().prop_map(|pick| Op::Tamper { pick }),
        4 => (process, 0u8..4, pick, 0u64..4)
            .prop_map(|(process, kind, pick, off)| Op::Lie { process, kind, pick, off }),
        2 => prop_oneof![1u64..1000, Just(10_000_000u64), Just(40_000_000)]
            .prop_map(|micros| Op::Wait { micros }),
    ];
    prop::collection::vec(op, 1..most)
}
