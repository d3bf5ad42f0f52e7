//! The NVMe stores of the configuration, made for the server; and, where it names none, whether there is a place for one.

use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use bytesize::ByteSize;
use kvd_core::tier::{STORE_PAGE, StoreDone, StoreError, StoreOp};
use kvd_node::{HostSpan, StoreStatus};
use kvd_nvme::device::{Device, DeviceConfig, DeviceNews, backing, stored_bytes};
use kvd_nvme::io::{ArenaRange, Choice, IoOptions};
use kvd_nvme::store::{Found, StoreConfig};
use kvd_serve::{RunningStore, StoreFound, StoreNews, StoreOpener, TellNews};

use crate::config::{Nvme, NvmeIo, Values};

/// Operations that a store takes before it answers any: more than core ever has under way, so that no kind of them takes another's room.
const QUEUE: usize = 8192;
/// Segments are as large as this, or smaller where the store would have few of them, in bytes.
const SEGMENT_MAX: u64 = 64 << 20;
const SEGMENT_MIN: u64 = 8 << 20;

/// A store in the user's cache directory is no larger, in bytes, nor more than this share of what is free there; and no smaller.
const AUTO_MOST: u64 = 8 << 30;
const AUTO_SHARE: u64 = 10;
const AUTO_LEAST: u64 = 512 << 20;
/// How often a day it may be written over, if nobody says how much: a drive that stands one a day, and is a hundred times as large,
/// does not notice.
const AUTO_WRITES: u64 = 16;

/// Where stores are to be.
pub(crate) struct Places {
    paths: Vec<PathBuf>,
    capacity: u64,
    /// Most bytes that each takes in a day; 0: no limit.
    pub(crate) write_budget: u64,
    /// Nobody has named them.
    optional: bool,
}

impl Places {
    /// Those that the configuration names; or one that is found, of which it is said what it is, or why there is none.
    pub(crate) fn choose(values: &Values) -> Self {
        let capacity = values.nvme_capacity;
        let found = match &values.nvme {
            Nvme::Paths(paths) => {
                return Places {
                    paths: paths.clone(),
                    capacity,
                    write_budget: values.nvme_write_budget.unwrap_or(0),
                    optional: false,
                };
            }
            Nvme::Auto => match &values.cache_dir {
                None => Err("there is no HOME".to_owned()),
                Some(path) => fit(path, capacity).map(|bytes| (path.clone(), bytes)),
            },
        };
        match found {
            Ok((path, capacity)) => {
                let write_budget = values.nvme_write_budget.unwrap_or(AUTO_WRITES * capacity);
                let (size, day) = (ByteSize::b(capacity), ByteSize::b(write_budget));
                tracing::info!(
                    "blocks are kept in {} too: {size}, at most {day} written a day; nvme = \"off\" ends that, a path of yours is better",
                    path.display(),
                );
                Places {
                    paths: vec![path],
                    capacity,
                    write_budget,
                    optional: true,
                }
            }
            Err(reason) => {
                tracing::info!(
                    "no blocks are kept below host memory: {reason}; name a place with nvme"
                );
                Places {
                    paths: Vec::new(),
                    capacity,
                    write_budget: 0,
                    optional: true,
                }
            }
        }
    }

    /// How many.
    pub(crate) fn count(&self) -> u32 {
        u32::try_from(self.paths.len()).unwrap_or(u32::MAX)
    }

    /// One opener for each.
    pub(crate) fn openers(&self, values: &Values) -> anyhow::Result<Vec<Box<dyn StoreOpener>>> {
        let open = |path: &PathBuf| {
            let config = DeviceConfig {
                path: path.clone(),
                io: IoOptions {
                    choice: match values.nvme_io {
                        NvmeIo::Auto => Choice::Auto,
                        NvmeIo::Uring => Choice::Uring,
                        NvmeIo::Threads => Choice::Threads,
                    },
                    ..IoOptions::default()
                },
                store: store_config(self.capacity)?,
                faults: values.nvme_faults.clone(),
            };
            let optional = self.optional;
            Ok(Box::new(Opener { config, optional }) as Box<dyn StoreOpener>)
        };
        self.paths.iter().map(open).collect()
    }
}

/// How large a store in this directory would be, if it is fit for one: of a file system that does direct transfers to a disk, with
/// room, and nobody else's. A store that is there keeps its size.
fn fit(path: &Path, most: u64) -> Result<u64, String> {
    let why =
        |what: &dyn std::fmt::Display| format!("{} is not fit for it: {what}", path.display());
    let mut builder = std::fs::DirBuilder::new();
    let made = builder.recursive(true).mode(0o700).create(path);
    made.map_err(|e| why(&e))?;
    let system = rustix::fs::statfs(path).map_err(|e| why(&e))?;
    if !DISK_SYSTEMS.contains(&(system.f_type as u64 & 0xffff_ffff)) {
        return Err(why(&"it is on neither ext4 nor XFS"));
    }
    let room = rustix::fs::statvfs(path).map_err(|e| why(&e))?;
    let free = room.f_bavail * room.f_frsize;
    let there = stored_bytes(path);
    let bytes = match there {
        0 => most.min(AUTO_MOST).min(free / AUTO_SHARE),
        _ => there,
    };
    if there == 0 && bytes < AUTO_LEAST.min(most) {
        return Err(why(&format!(
            "{} are free, and a tenth of that is too little",
            ByteSize::b(free)
        )));
    }
    // Takes the space and the lock, and gives the lock back.
    drop(backing(path, bytes)?);
    Ok(bytes)
}

/// `f_type` of ext2 to ext4, and of XFS: statfs(2).
const DISK_SYSTEMS: [u64; 2] = [0xef53, 0x5846_5342];

/// How a store of so many bytes is made and driven.
pub(crate) fn store_config(capacity: u64) -> anyhow::Result<StoreConfig> {
    let mut start = [0; 16];
    rustix::rand::getrandom(&mut start, rustix::rand::GetRandomFlags::empty())?;
    Ok(StoreConfig {
        segment_bytes: (capacity / 32)
            .next_power_of_two()
            .clamp(SEGMENT_MIN, SEGMENT_MAX),
        max_queue: QUEUE,
        ..StoreConfig::new(capacity, start)
    })
}

struct Opener {
    config: DeviceConfig,
    optional: bool,
}

impl StoreOpener for Opener {
    fn optional(&self) -> bool {
        self.optional
    }

    fn open(
        self: Box<Self>,
        found: &mut dyn FnMut(StoreFound<'_>),
        news: TellNews,
    ) -> Result<Box<dyn RunningStore>, String> {
        let mut tell = |one: Found<'_>| {
            found(match one {
                Found::Shape(shape) => StoreFound::Shape(shape),
                Found::Namespace(_, record) => StoreFound::Namespace(record),
                Found::Block(block) => StoreFound::Block(block),
            });
        };
        let (wanted, optional) = (self.config.store.capacity, self.optional);
        let device = Device::open(self.config, &mut tell, move |one| {
            news(match one {
                DeviceNews::Done(done) => StoreNews::Done(done),
                DeviceNews::Switched(on) => StoreNews::Switched(on),
            })
        })?;
        let status = device.status();
        if !optional && status.bytes + STORE_PAGE <= wanted {
            tracing::warn!(
                "{} was made with {} and keeps that size: set nvme_capacity to that; or, for {}, stop the daemon and remove the file (of a block device: overwrite its first 64 KiB with zeros), and all blocks in it are lost",
                status.path.display(),
                ByteSize::b(status.bytes),
                ByteSize::b(wanted),
            );
        }
        tracing::info!(
            path = %status.path.display(),
            io = status.chosen.name,
            reason = status.chosen.reason.as_deref().unwrap_or(""),
            blocks = status.recovered.blocks,
            seconds = status.opened_in.as_secs_f64(),
            "an nvme store is open"
        );
        Ok(Box::new(Running(device)))
    }
}

struct Running(Device);

impl RunningStore for Running {
    fn begin(&self, op: StoreOp, span: Option<HostSpan>) -> Option<StoreDone> {
        let host = match span {
            None => None,
            Some(span) => {
                let bytes = usize::try_from(span.bytes).unwrap_or(usize::MAX);
                let Some(range) = ArenaRange::new(span.arena, span.offset, bytes) else {
                    return Some(op.refused(StoreError::Off));
                };
                Some(range)
            }
        };
        self.0.begin(op, host)
    }

    fn give_back(&self, list: Vec<StoreDone>) {
        self.0.give_back(list);
    }

    fn status(&self) -> StoreStatus {
        let status = self.0.status();
        StoreStatus {
            path: status.path.display().to_string(),
            state: if status.off { "off" } else { "on" }.to_owned(),
            io: status.chosen.name.to_owned(),
            io_reason: status.chosen.reason,
            bytes: status.bytes,
            blocks: status.blocks,
            formatted: status.recovered.formatted,
            recovered: status.recovered.blocks,
            open_s: status.opened_in.as_secs_f64(),
            counts: counts(&status.counters),
        }
    }
}

fn counts(counters: &kvd_nvme::store::Counters) -> std::collections::BTreeMap<String, u64> {
    let all = counters.each();
    all.into_iter()
        .map(|(name, value)| (name.to_owned(), value))
        .collect()
}

#[cfg(test)]
mod tests {
    use kvd_core::TierSettings;

    use super::QUEUE;

    #[test]
    fn a_store_has_room_for_all_that_core_begins() {
        let most = TierSettings::default();
        let moving = most.max_writes + most.max_reads + most.max_ahead;
        // Drops are few, and wait in core.
        assert!(moving as usize + 1024 <= QUEUE);
    }
}
