//! The NVMe stores that the configuration names, made for the server. No decisions beyond sizes.

use kvd_core::tier::{StoreDone, StoreError, StoreOp};
use kvd_node::{HostSpan, StoreStatus};
use kvd_nvme::device::{Device, DeviceConfig, DeviceNews};
use kvd_nvme::io::{ArenaRange, Choice, IoOptions};
use kvd_nvme::store::{Found, StoreConfig};
use kvd_serve::{RunningStore, StoreFound, StoreNews, StoreOpener, TellNews};

use crate::config::{NvmeIo, Values};

/// Operations that a store takes before it answers any: more than core ever has under way, so that no kind of them takes another's room.
const QUEUE: usize = 8192;
/// Segments are as large as this, or smaller where the store would have few of them, in bytes.
const SEGMENT_MAX: u64 = 64 << 20;
const SEGMENT_MIN: u64 = 8 << 20;

/// One opener for each path.
pub(crate) fn openers(values: &Values) -> anyhow::Result<Vec<Box<dyn StoreOpener>>> {
    let open = |path: &std::path::PathBuf| {
        let store = store_config(values.nvme_capacity)?;
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
            store,
            faults: values.nvme_faults.clone(),
        };
        Ok(Box::new(Opener(config)) as Box<dyn StoreOpener>)
    };
    values.nvme.iter().map(open).collect()
}

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

struct Opener(DeviceConfig);

impl StoreOpener for Opener {
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
        let device = Device::open(self.0, &mut tell, move |one| {
            news(match one {
                DeviceNews::Done(done) => StoreNews::Done(done),
                DeviceNews::Switched(on) => StoreNews::Switched(on),
            })
        })?;
        let status = device.status();
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
