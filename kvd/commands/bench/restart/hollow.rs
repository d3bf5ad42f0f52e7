//! A store full of blocks, made in seconds: the store's own code over an adapter that keeps superblocks, namespaces, journal and
//! checkpoints and lets the blocks go. Such a store is right until somebody reads a block, and then says that it is corrupt.
//! Deliberately absent: flushes, but for one at the end.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use kvd_core::tier::{
    BlockHeader, BlockKey, HostRange, OpId, Place, STORE_PAGE, StoreDone, StoreOp, stride_of,
};
use kvd_core::{BlockHash, Cut, GroupGeometry, NamespaceId, NamespaceRecord, TenantId};
use kvd_nvme::io::{ArenaRange, Backing, BlockIo, Buffer, DiskIo, Done, HostBytes, IoOptions, Op};
use kvd_nvme::store::{Store, StoreConfig};

use super::super::{Shape, daemon::MIB};

/// Blocks under way.
const AT_ONCE: u64 = 4_096;
/// Most operations of the adapter: almost none of them reach the device.
const DEPTH: usize = 8_192;
/// Turns without an answer after which the device counts as dead.
const PATIENCE: u32 = 1_000;

/// Bytes that are nowhere.
struct Hole(usize);

impl HostBytes for Hole {
    fn len(&self) -> usize {
        self.0
    }

    fn read(&self, _: usize, bytes: usize, see: &mut dyn FnMut(&[u8])) {
        see(&vec![0; bytes]);
    }
}

struct Hollow {
    io: DiskIo,
    /// Where segments begin, once the first block has been written: there.
    segments_at: u64,
    ready: Vec<Done<Hole>>,
    over: Vec<Done<ArenaRange>>,
}

impl Hollow {
    fn let_go(&mut self, token: u64, buffer: Option<Buffer<Hole>>) {
        let result = Ok(());
        self.ready.push(Done {
            token,
            buffer,
            result,
        });
    }

    /// Makes durable what was kept.
    fn flush(mut self) -> Result<()> {
        self.io.start(Op::Flush { token: 0 });
        for _ in 0..PATIENCE {
            self.io.poll(Duration::from_millis(100), &mut self.over);
            if let Some(done) = self.over.pop() {
                return Ok(done.result?);
            }
        }
        bail!("the device does not answer")
    }
}

impl BlockIo for Hollow {
    type Host = Hole;

    fn start(&mut self, op: Op<Hole>) {
        match op {
            Op::Write {
                token,
                offset,
                buffer: Buffer::Host(hole),
            } => {
                self.segments_at = self.segments_at.min(offset - STORE_PAGE);
                self.let_go(token, Some(Buffer::Host(hole)));
            }
            Op::Write {
                token,
                offset,
                buffer: Buffer::Own(own),
            } if offset < self.segments_at => {
                let buffer = Buffer::Own(own);
                self.io.start(Op::Write {
                    token,
                    offset,
                    buffer,
                });
            }
            Op::Read {
                token,
                offset,
                buffer: Buffer::Own(own),
            } => {
                let buffer = Buffer::Own(own);
                self.io.start(Op::Read {
                    token,
                    offset,
                    buffer,
                });
            }
            Op::Write { token, buffer, .. } | Op::Read { token, buffer, .. } => {
                self.let_go(token, Some(buffer));
            }
            Op::Flush { token } => self.let_go(token, None),
        }
    }

    fn poll(&mut self, wait: Duration, done: &mut Vec<Done<Hole>>) {
        let wait = if self.ready.is_empty() {
            wait
        } else {
            Duration::ZERO
        };
        done.append(&mut self.ready);
        self.io.poll(wait, &mut self.over);
        for one in self.over.drain(..) {
            let buffer = match one.buffer {
                Some(Buffer::Own(own)) => Some(Buffer::Own(own)),
                _ => None,
            };
            done.push(Done {
                token: one.token,
                buffer,
                result: one.result,
            });
        }
    }

    fn depth(&self) -> usize {
        DEPTH
    }

    fn drain(self) -> Vec<u64> {
        self.io.drain()
    }
}

/// Makes a store with so many blocks in chains of `chain`; gives its capacity.
pub(super) fn make(
    directory: &Path,
    shape: &Shape,
    blocks: u64,
    hash: fn(u64) -> [u8; 32],
    chain: u64,
) -> Result<u64> {
    let block = shape.part.bytes() as u64;
    let space = blocks * stride_of(block);
    let capacity = (space + space / 8 + 256 * MIB).next_multiple_of(MIB);
    let config = StoreConfig {
        // That of a store as full of blocks of 64 KiB.
        journal_bytes: Some((blocks * stride_of(64 << 10) / 2048).max(MIB)),
        small_block: block,
        max_queue: 2 * AT_ONCE as usize,
        flush_us: 0,
        ..crate::commands::stores::store_config(capacity)?
    };
    let backing = Arc::new(Backing::open(directory, Some(capacity))?);
    let (io, _) = DiskIo::open(backing, &IoOptions::default())?;
    let hollow = Hollow {
        io,
        segments_at: u64::MAX,
        ready: Vec::new(),
        over: Vec::new(),
    };
    let opened = Store::open(hollow, &config, &mut |_| {})?;
    let parsed = NamespaceRecord::parse(&shape.record()?)?;
    let mut filler = Filler {
        geometry: parsed.groups()[0].clone(),
        namespace: parsed.id(),
        record: shape.record()?.into(),
        per_segment: opened.shape.segment_bytes / stride_of(block),
        hash,
        chain,
    };
    filler.fill(opened.store, blocks)?;
    Ok(capacity)
}

struct Filler {
    geometry: GroupGeometry,
    namespace: NamespaceId,
    record: Arc<[u8]>,
    per_segment: u64,
    hash: fn(u64) -> [u8; 32],
    chain: u64,
}

impl Filler {
    fn write(&self, number: u64) -> StoreOp {
        let bytes = self.geometry.block_bytes();
        let parent = (!number.is_multiple_of(self.chain)).then(|| (self.hash)(number - 1));
        StoreOp::Write {
            op: OpId(number),
            to: Place {
                segment: (number / self.per_segment) as u32,
                index: (number % self.per_segment) as u32,
                stride: stride_of(bytes),
            },
            from: HostRange {
                tenant: TenantId(0),
                offset: 0,
                bytes,
            },
            header: Box::new(BlockHeader {
                key: BlockKey {
                    namespace: self.namespace,
                    group: 0,
                    hash: BlockHash((self.hash)(number)),
                },
                parent: parent.map(BlockHash),
                cut: Cut::whole(&self.geometry),
                crcs: vec![0; self.geometry.heads as usize],
            }),
            geometry: Box::new(self.geometry.clone()),
            record: Arc::clone(&self.record),
        }
    }

    fn fill(&mut self, mut store: Store<Hollow>, blocks: u64) -> Result<()> {
        let (mut next, mut over, mut now, mut idle) = (0, 0, 0, 0);
        let mut done = Vec::new();
        while over < blocks {
            // The first one alone: it says where blocks begin.
            let most = if over == 0 { 1 } else { AT_ONCE };
            while next < blocks && next - over < most {
                let hole = Hole(self.geometry.block_bytes() as usize);
                if let Some(refused) = store.submit(self.write(next), Some(hole)) {
                    bail!("the store refused a block: {refused:?}");
                }
                next += 1;
            }
            now += 1;
            store.turn(now, Duration::from_millis(100), &mut done);
            idle = if done.is_empty() { idle + 1 } else { 0 };
            ensure!(idle < PATIENCE, "the store does not answer");
            for one in done.drain(..) {
                let StoreDone::Written { result: Ok(()), .. } = one else {
                    bail!("the store failed: {one:?}");
                };
                over += 1;
            }
        }
        let none = Duration::ZERO;
        store.close(now, none, 1, &mut done).0.flush()
    }
}
