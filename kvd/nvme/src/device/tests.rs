//! A thread that panics, with answers in hand. What an engine sees of it is tested from outside (`tests/nvme/faults.rs`).

use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::time::Duration;

use kvd_core::tier::{BlockKey, HostRange, Place, STORE_PAGE, stride_of};
use kvd_core::{BlockHash, GroupKind, TenantId};

use super::*;
use crate::io::testing::{arena, scratch};

/// How long any answer may take.
const PATIENCE: Duration = Duration::from_secs(60);

const KEY: BlockKey = BlockKey {
    namespace: NamespaceId([1; 32]),
    group: 0,
    hash: BlockHash([2; 32]),
};

fn place(segment: u32) -> Place {
    Place {
        segment,
        index: 0,
        stride: stride_of(STORE_PAGE),
    }
}

/// Is refused at once: there is no such place.
fn drop_op(op: u64) -> StoreOp {
    StoreOp::Drop {
        op: OpId(op),
        place: place(u32::MAX),
        key: KEY,
    }
}

fn read_op(op: u64) -> StoreOp {
    StoreOp::Read {
        op: OpId(op),
        from: place(0),
        into: HostRange {
            tenant: TenantId(0),
            offset: 0,
            bytes: STORE_PAGE,
        },
        key: KEY,
        block: block(),
    }
}

fn block() -> Box<ReadBlock> {
    ReadBlock::new(GroupGeometry {
        kind: GroupKind::Full,
        layers: 1,
        heads: 1,
        block_tokens: 1,
        cell_bytes: STORE_PAGE as u32,
        window: None,
    })
}

#[test]
fn a_panic_loses_no_answer_and_it_is_switched_off_before_any_is_told() {
    let scratch = scratch();
    let faults = scratch.path().join("faults");
    let config = DeviceConfig {
        path: scratch.path().to_owned(),
        io: IoOptions::default(),
        store: StoreConfig {
            segment_bytes: 1 << 20,
            ..StoreConfig::new(32 << 20, [5; 16])
        },
        faults: Some(faults.clone()),
    };
    let (tell, told) = sync_channel(64);
    let (go, may_go) = sync_channel::<()>(1);
    let device = Device::open(config, &mut |_| {}, move |news| {
        // The thread waits here until it is let go; in the end, never.
        let _ = (tell.send(news), may_go.recv());
        true
    });
    let device = device.expect("opens");
    let next = || told.recv_timeout(PATIENCE).expect("news");
    let arena = arena(1 << 20);
    let host = || ArenaRange::new(Arc::clone(&arena), 0, STORE_PAGE as usize);

    assert_eq!(device.begin(drop_op(0), None), None);
    let refused = |op| StoreDone::Dropped {
        op: OpId(op),
        result: Err(StoreError::Io),
    };
    assert!(matches!(next(), DeviceNews::Done(done) if done == [refused(0)]));
    // All of this is taken in one turn.
    std::fs::write(&faults, "read panic\n").expect("written");
    assert_eq!(device.begin(drop_op(1), None), None);
    assert_eq!(device.begin(read_op(2), host()), None);
    assert_eq!(device.begin(read_op(3), host()), None);
    drop(go);
    assert!(matches!(next(), DeviceNews::Switched(false)));
    let mut done = Vec::new();
    while done.len() < 3 {
        match next() {
            DeviceNews::Done(some) => done.extend(some),
            other => panic!("{other:?}"),
        }
    }
    let read = |op| StoreDone::Read {
        op: OpId(op),
        block: block(),
        result: Err(StoreError::Io),
    };
    assert_eq!(done, [refused(1), read(2), read(3)]);
    assert!(device.status().off);
    // It is still asked, and never at a loss.
    assert_eq!(device.begin(drop_op(4), None), None);
    let off = StoreDone::Dropped {
        op: OpId(4),
        result: Err(StoreError::Off),
    };
    assert!(matches!(next(), DeviceNews::Done(done) if done == [off]));
    drop(device);
    assert!(told.try_recv().is_err(), "none twice");
}
