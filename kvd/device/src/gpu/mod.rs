//! What all accelerators share: blocks are gathered from the engine's pages into a staging buffer in the accelerator's memory,
//! and go from there to their slots in large transfers; and back. The checksums are taken by the accelerator itself, of the
//! very words that it writes, so that no core of the host reads a block, and what is delivered is what was checked.
//!
//! [`batch`] plans, [`crc`] is the arithmetic, a backend does. Tests run all of it but the driver, on a fake.

pub(crate) mod batch;
pub(crate) mod crc;
#[cfg(test)]
mod fake;

use batch::{Batch, Planner, Way};
use kvd_arena::Registered;

use crate::{Device, Error, LoadJob, Loaded, Point, StoreJob, StreamHandle};

/// What moves bytes; that makes a [`Device`].
pub(crate) trait Backend: Send + Sync {
    /// For logs and status.
    fn name(&self) -> &'static str;

    /// Bytes of a chunk.
    fn room(&self) -> usize;

    /// Does all of a batch and gives the sum of each item. All copies are over when it returns.
    fn run(&self, way: Way, batch: &Batch) -> Result<Vec<u64>, Error>;

    /// As [`Device::register`].
    fn register(&self, address: usize, bytes: usize) -> Result<Option<Registered>, Error>;

    /// As [`Device::point`].
    fn point(&self, stream: StreamHandle) -> Result<Point, Error>;
}

/// Does all of a batch and gives its checksums.
fn crcs(backend: &impl Backend, way: Way, batch: &Batch) -> Result<Vec<u64>, Error> {
    let sums = backend.run(way, batch)?;
    let mut crcs = vec![u64::MAX; batch.crcs];
    for (item, sum) in batch.items.iter().zip(sums) {
        crcs[item.crc as usize] ^= sum;
    }
    Ok(crcs)
}

impl<B: Backend> Device for B {
    fn name(&self) -> &'static str {
        Backend::name(self)
    }

    fn register(&self, address: usize, bytes: usize) -> Result<Option<Registered>, Error> {
        Backend::register(self, address, bytes)
    }

    fn point(&self, stream: StreamHandle) -> Result<Point, Error> {
        Backend::point(self, stream)
    }

    fn store(&self, jobs: &[StoreJob<'_>], crcs: &mut Vec<u64>) -> Result<(), Error> {
        let bytes = jobs.iter().map(|job| job.part.len()).sum();
        let mut planner = Planner::new(self.room(), bytes);
        for job in jobs {
            job.check()?;
            planner.store(job)?;
        }
        crcs.extend(self::crcs(self, Way::Store, &planner.finish())?);
        Ok(())
    }

    fn load(&self, jobs: &[LoadJob<'_>], results: &mut Vec<Loaded>) -> Result<(), Error> {
        let bytes = jobs.iter().map(|job| job.to.part().bytes()).sum();
        let mut planner = Planner::new(self.room(), bytes);
        for job in jobs {
            job.check()?;
            planner.load(job)?;
        }
        let crcs = crcs(self, Way::Load, &planner.finish())?;
        let mut crcs = &crcs[..];
        for job in jobs {
            let mut good = true;
            for piece in &job.plan.pieces {
                let expected = &job.crcs[piece.crc..piece.crc + piece.wanted.len()];
                let (own, rest) = crcs.split_at(expected.len());
                good &= own == expected;
                crcs = rest;
            }
            results.push(if good { Loaded::Good } else { Loaded::Corrupt });
        }
        Ok(())
    }
}
