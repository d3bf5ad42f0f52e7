//! Images of a store's disk with flipped bits: each is opened and read in full, and nothing wrong may come back. Deliberately absent:
//! damage while a store runs.

use super::{BYTES, DiskOptions, Run};
use crate::disk::{DiskFaults, SimDisk};
use crate::rng::Rng;
use crate::run::catching;

/// What became of stores whose image was damaged.
#[derive(Clone, Debug, Default)]
pub struct FlipReport {
    /// Damaged images that were opened.
    pub opened: u64,
    /// Images that were refused, with both superblocks damaged.
    pub refused: u64,
    /// Blocks that all images had, and blocks that were served from them, right.
    pub blocks: u64,
    /// Those that were.
    pub served: u64,
    /// Reads that were answered `Corrupt`.
    pub corrupt: u64,
}

/// Fills a store, then opens `images` copies of it with `bits` flipped bits each, and reads all that is found. `blocks_only` keeps the
/// damage out of everything that is not a block; then each bit costs at most one block.
pub fn flips(seed: u64, images: u32, bits: u32, blocks_only: bool) -> Result<FlipReport, String> {
    catching(|| flip(seed, images, bits, blocks_only))
        .unwrap_or_else(|text| Err(format!("seed {seed}: 2: the store panicked: {text}")))
}

fn flip(seed: u64, images: u32, bits: u32, blocks_only: bool) -> Result<FlipReport, String> {
    let disk = SimDisk::new(seed, BYTES);
    let options = DiskOptions {
        seed,
        steps: 0,
        faults: DiskFaults::default(),
        cuts: 0,
        plant: None,
    };
    let mut run = Run::new(&options, disk)?;
    for _ in 0..1_500 {
        run.step()?;
    }
    run.rest()?;
    let shape = run.model.shape();
    let blocks_from = BYTES - u64::from(shape.segments) * shape.segment_bytes;
    let mut report = FlipReport::default();
    run.store = None;
    run.disk.kill();
    let (image, model) = (run.disk.image(), run.model.blocks.clone());
    let mut rng = Rng::new(seed, 0x666c_6970);
    for _ in 0..images {
        run.disk.set_image(&image);
        for _ in 0..bits {
            let low = if blocks_only { blocks_from } else { 0 };
            // Half of the bits go where the superblocks, namespaces and records are.
            let high = if blocks_only || rng.one_in(2) {
                BYTES - 1
            } else {
                blocks_from
            };
            run.disk.flip(rng.range(low, high), rng.below(8) as u32);
        }
        run.model.restart(model.clone());
        let before = run.report.clone();
        match run.reopen_with(1) {
            Ok(()) => report.opened += 1,
            Err(text) if text.contains("both superblocks") => {
                report.refused += 1;
                continue;
            }
            Err(text) => return Err(format!("seed {seed}: {text}")),
        }
        let served = run.report.read - before.read;
        report.blocks += model.len() as u64;
        report.served += served;
        report.corrupt += run.report.corrupt - before.corrupt;
        if blocks_only && served + u64::from(bits) < model.len() as u64 {
            return Err(format!(
                "seed {seed}: {bits} bits cost {} blocks",
                model.len() as u64 - served
            ));
        }
    }
    Ok(report)
}
