//! Bytes of the store's file that change while no daemon runs, everywhere. The daemon starts, serves what is sound, and never a wrong
//! byte; only without any superblock it refuses, and leaves the file as it is.

use std::io::Write;
use std::os::unix::fs::FileExt;

use crate::common::eventually;
use crate::kit::{
    Areas, Dice, Engine, HEADS, Home, PAGE, flip, offloaded, page, soak, store, tier,
};

/// Bytes that are changed in all, in a normal run and in a long one. One to five in each trial.
const CORRUPTIONS: u32 = 90;
const SOAK_CORRUPTIONS: u32 = 30_000;
/// Blocks of each of two models. All fit into host memory.
const BLOCKS: u32 = 96;

/// A store's file with two models' blocks in it, as it was before it was damaged.
struct Sample {
    home: Home,
    bytes: Vec<u8>,
    areas: Areas,
    /// Where the models' names lie, pages of records that count, and headers of blocks.
    names: [u64; 2],
    /// With how many records, and whether of a checkpoint.
    records: Vec<(u64, u64, bool)>,
    headers: Vec<u64>,
}

impl Sample {
    fn new() -> Self {
        let home = Home::new();
        let mut daemon = home.serve(&["--nvme-capacity", "64MiB"]);
        let (mut one, mut two) = (Engine::of(&daemon, "one"), Engine::of(&daemon, "two"));
        for n in 0..BLOCKS {
            // Many small batches make many pages of records, and in the end a checkpoint.
            one.store(1, n..n + 1);
            offloaded(&daemon, u64::from(n) * 2 + 1);
            two.store(2, n..n + 1);
            offloaded(&daemon, u64::from(n) * 2 + 2);
        }
        eventually("a checkpoint is made", || {
            store(&daemon).counts["checkpoints"] > 0
        });
        daemon.signal(rustix::process::Signal::TERM);
        assert!(daemon.wait().success());
        let file = home.file();
        let areas = Areas::read(&file);
        let bytes = std::fs::read(&file).expect("reads");
        let find = |from: u64, to: u64, magic: &[u8]| -> Vec<u64> {
            let begins = |at: &u64| bytes[*at as usize..].starts_with(magic);
            (from..to).step_by(PAGE as usize).filter(begins).collect()
        };
        let headers = find(areas.segments_at, bytes.len() as u64, b"KVDBLK01");
        assert_eq!(headers.len(), 2 * BLOCKS as usize);
        let mut records = Vec::new();
        for at in find(areas.journal_at, areas.segments_at, b"KVDPAGE1") {
            let long = |at: u64| {
                let field = &bytes[at as usize..][..8];
                u64::from_le_bytes(field.try_into().expect("8 bytes"))
            };
            let (of_checkpoint, epoch) = (bytes[at as usize + 24] == 2, long(at + 32));
            let counts = match of_checkpoint {
                true => epoch == long(112),
                false => epoch >= long(136),
            };
            if counts {
                records.push((at, bytes[at as usize + 28].into(), of_checkpoint));
            }
        }
        assert!(records.len() >= 8, "{records:?}");
        assert!(records.iter().any(|page| page.2) && records.iter().any(|page| !page.2));
        let slots = find(areas.names_at, areas.journal_at, b"KVDNAME1");
        assert_eq!(slots.len(), 2);
        let of = |weights: &[u8]| {
            let has = |at: &&u64| {
                let page = &bytes[**at as usize..][..PAGE as usize];
                page.windows(weights.len()).any(|w| w == weights)
            };
            *slots.iter().find(has).expect("the model is named")
        };
        let names = [of(b"one"), of(b"two")];
        assert_ne!(names[0], names[1]);
        drop(daemon);
        Self {
            names,
            home,
            bytes,
            areas,
            records,
            headers,
        }
    }

    /// Writes back every page that differs.
    fn restore(&self) {
        let now = std::fs::read(self.home.file()).expect("reads");
        assert_eq!(now.len(), self.bytes.len(), "its size is as it was");
        let file = std::fs::File::options()
            .write(true)
            .open(self.home.file())
            .expect("opens");
        let (old, new) = (self.bytes.chunks(PAGE as usize), now.chunks(PAGE as usize));
        for ((at, was), _) in (0u64..).zip(old).zip(new).filter(|((_, w), n)| w != n) {
            file.write_all_at(was, at * PAGE).expect("writes");
        }
        file.sync_all().expect("written");
    }
}

/// How many bytes were changed where.
#[derive(Debug, Default)]
struct Tally {
    superblock: u32,
    names: u32,
    journal: u32,
    checkpoint: u32,
    headers: u32,
    data: u32,
    elsewhere: u32,
}

impl Tally {
    fn all(&self) -> u32 {
        let Self {
            superblock,
            names,
            journal,
            checkpoint,
            headers,
            data,
            elsewhere,
        } = *self;
        let each = [superblock, names, journal, checkpoint, headers, data];
        assert!(each.iter().all(|count| *count > 0), "{self:?}");
        each.iter().sum::<u32>() + elsewhere
    }
}

/// What a trial may cost at most.
#[derive(Debug, Default)]
struct Cost {
    blocks: u64,
    /// Models of which nothing may be left.
    models: [bool; 2],
}

impl Sample {
    fn damage(
        &self,
        dice: &mut Dice,
        cost: &mut Cost,
        log: &mut Vec<(u64, u8)>,
        tally: &mut Tally,
    ) {
        let of = |dice: &mut Dice, all: &[u64]| all[dice.below(all.len() as u64) as usize];
        let inside = dice.below(PAGE);
        let end = self.bytes.len() as u64;
        let (at, count) = match dice.below(9) {
            // Always the same copy, so that the other is sound.
            0 => (HEADS[0] + inside, &mut tally.superblock),
            // Header and record take less than this.
            1 => (of(dice, &self.names) + dice.below(600), &mut tally.names),
            // Half of them in the page's header.
            kind @ (2 | 3) => {
                let of_checkpoint = kind == 3;
                let pages = self.records.iter().filter(|page| page.2 == of_checkpoint);
                let pages: Vec<u64> = pages.map(|page| page.0).collect();
                let at = of(dice, &pages) + inside % [PAGE, 128][dice.below(2) as usize];
                match of_checkpoint {
                    true => (at, &mut tally.checkpoint),
                    false => (at, &mut tally.journal),
                }
            }
            4 | 5 => (of(dice, &self.headers) + inside, &mut tally.headers),
            6 | 7 => {
                let at = of(dice, &self.headers) + PAGE + dice.below(64 << 10);
                (at, &mut tally.data)
            }
            // Mostly what nothing names.
            _ => {
                let at = self.areas.names_at + dice.below(end - self.areas.names_at);
                (at, &mut tally.elsewhere)
            }
        };
        *count += 1;
        for (slot, lost) in self.names.iter().zip(&mut cost.models) {
            *lost |= (*slot..*slot + 17 * PAGE).contains(&at);
        }
        let page = self.records.iter().find(|page| page.0 == at - at % PAGE);
        cost.blocks += page.map_or(0, |page| page.1);
        if at >= self.areas.segments_at {
            cost.blocks += 1;
        }
        let with = 1 << dice.below(8);
        log.push((at, with));
        flip(&self.home.file(), at, with);
    }
}

#[test]
fn flipped_bytes_cost_what_they_hit_and_no_more() {
    let sample = Sample::new();
    let mut dice = Dice::new(2);
    let (mut lost, mut corrupt) = (0, 0);
    let (mut trial, mut changed, mut tally) = (0, 0, Tally::default());
    let wanted = if soak() {
        SOAK_CORRUPTIONS
    } else {
        CORRUPTIONS
    };
    while changed < wanted {
        let (mut cost, mut log) = (Cost::default(), Vec::new());
        for _ in 0..=dice.below(5) {
            sample.damage(&mut dice, &mut cost, &mut log, &mut tally);
        }
        trial += 1;
        changed += log.len() as u32;
        let mut daemon = sample.home.serve(&["--nvme-capacity", "64MiB"]);
        let mut there = 0;
        for (model, weights) in ["one", "two"].into_iter().enumerate() {
            let mut engine = Engine::of(&daemon, weights);
            let loads = engine.load(model as u32 + 1, 0..BLOCKS);
            let count = loads.loaded.len() as u64;
            let gone = u64::from(BLOCKS) - count;
            assert!(
                cost.models[model] || gone <= cost.blocks,
                "trial {trial}, {log:?}: {gone} blocks of {weights} are gone: {loads:?}"
            );
            corrupt += loads.failed.len() as u64;
            there += count;
        }
        let gone = 2 * u64::from(BLOCKS) - there;
        let most =
            cost.blocks + cost.models.iter().filter(|m| **m).count() as u64 * u64::from(BLOCKS);
        assert!(
            gone <= most,
            "trial {trial}, {log:?}: {gone} blocks are gone"
        );
        lost += gone;
        assert_eq!(tier(&daemon, "fetch_failed_io"), 0);
        assert_eq!(store(&daemon).state, "on");
        // In order: what a killed process has given to the kernel may be written after its end.
        daemon.signal(rustix::process::Signal::TERM);
        assert!(daemon.wait().success(), "{}", daemon.log());
        sample.restore();
    }
    assert_eq!(tally.all(), changed);
    let _ = writeln!(
        std::io::stderr(),
        "{changed} bytes were changed in {trial} trials ({tally:?}): {lost} blocks were gone, {corrupt} of them seen to be damaged"
    );
    assert!(
        lost > 0 && corrupt > 0,
        "nothing was hit: {lost}, {corrupt}"
    );
}

#[test]
fn one_superblock_is_enough_and_none_is_refused() {
    let home = Home::new();
    let daemon = home.serve(&["--nvme-capacity", "64MiB"]);
    let mut engine = Engine::new(&daemon);
    engine.store(1, 0..16);
    offloaded(&daemon, 16);
    drop(daemon);
    for copy in HEADS {
        flip(&home.file(), copy + 40, 0x10);
        let daemon = home.serve(&["--nvme-capacity", "64MiB"]);
        Engine::new(&daemon).load_all(1, 0..16);
        drop(daemon);
        assert_eq!(
            page(&home.file(), HEADS[0]),
            page(&home.file(), HEADS[1]),
            "both are whole again"
        );
    }
    for copy in HEADS {
        flip(&home.file(), copy + 40, 0x10);
    }
    let before = std::fs::read(home.file()).expect("reads");
    let (code, said) = home.refused(&["--nvme-capacity", "64MiB"]);
    assert_eq!(code, 1, "{said}");
    assert!(said.contains("both superblocks"), "{said}");
    let after = std::fs::read(home.file()).expect("reads");
    assert!(before == after, "it was left as it is");
    let (code, _, said) = home.fsck(&["--repair"]);
    assert_eq!(code, 2, "{said}");
    assert!(said.contains("both superblocks"), "{said}");
    for copy in HEADS {
        flip(&home.file(), copy + 40, 0x10);
    }
    let daemon = home.serve(&["--nvme-capacity", "64MiB"]);
    Engine::new(&daemon).load_all(1, 0..16);
}
