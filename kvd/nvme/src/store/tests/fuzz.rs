//! The fuzz targets' work on stable and without a fuzzer: on their corpora, on what the store's own code wrote, and on random changes
//! of all these.

use std::path::{Path, PathBuf};

use kvd_core::tier::{BlockHeader, BlockKey, Place, stride_of};
use kvd_core::{BlockHash, Cut};

use super::space;
use crate::io::PAGE;
use crate::store::block::encode_block;
use crate::store::format::Superblock;
use crate::store::format::{Kind, List, Record, encode_name, encode_page, name_bytes};
use crate::store::fuzzing::{STORE, config, decoders, device};
use crate::store::layout::Layout;
use crate::store::open::head_page;

fn corpus(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../fuzz")
        .join(name)
}

/// Its name, what kind, where, and its bytes without the zeros at the end.
type Piece = (&'static str, u8, u16, Vec<u8>);

/// Pieces that belong together, as the store's code writes them.
fn sound() -> Vec<Piece> {
    let layout = Layout::of(&config()).unwrap();
    let (id, record, geometry) = space("m", 4, 2);
    let stride = stride_of(geometry.block_bytes());
    let key = |n: u8| BlockKey {
        namespace: id,
        group: 0,
        hash: BlockHash([n; 32]),
    };
    let place = |index: u32| Place {
        segment: 0,
        index,
        stride,
    };
    let header = BlockHeader {
        key: key(1),
        parent: Some(BlockHash([9; 32])),
        cut: Cut::grid(&geometry, 1, 2).unwrap(),
        crcs: vec![crate::store::format::crc(&[0; 2048]); 4],
    };
    let at = layout.block_at(place(0));
    let mut block = vec![0; PAGE];
    let sum = encode_block(&mut block, &STORE, &header, &geometry, at).unwrap();
    let mut name = vec![0; name_bytes(record.len())];
    encode_name(&mut name, &STORE, 0, id, &record);
    let line = |kind, seq, n: u8| {
        let record = Record::new(kind, seq, 0, &key(n), place(u32::from(n) - 1));
        record.with_block(header.parent, sum).sealed(3)
    };
    let list = |list, number, records: &[Record]| {
        let mut page = vec![0; PAGE];
        encode_page(&mut page, &STORE, list, number, 0, records);
        page
    };
    let next = [line(Kind::Stored, 5, 4), line(Kind::Dropped, 6, 3)];
    let checkpoint = [line(Kind::Stored, 1, 1), line(Kind::Stored, 2, 2)];
    let journal = [line(Kind::Dropped, 3, 2), line(Kind::Stored, 4, 3)];
    let mut head = Superblock::new();
    (head.id, head.generation, head.next_seq) = (STORE, 2.into(), 3.into());
    (head.checkpoint, head.checkpoint_used) = (1.into(), 1.into());
    (head.checkpoint_records, head.first_epoch) = (2.into(), 2.into());
    layout.write(&mut head);
    let pages = |list: u64| u16::try_from(list).unwrap();
    let mut all = vec![
        ("superblock", 0, 0, head_page(&head).bytes().to_vec()),
        ("superblock", 0, 1, head_page(&head).bytes().to_vec()),
        ("name", 1, 0, name),
        // The first half is full and to be listed in a checkpoint, the other is being written.
        ("journal", 2, 0, list(List::Journal, 2, &journal)),
        (
            "journal-next",
            2,
            pages(layout.half_pages),
            list(List::Journal, 3, &next),
        ),
        (
            "checkpoint",
            3,
            pages(layout.checkpoint_pages),
            list(List::Checkpoint, 1, &checkpoint),
        ),
        ("block", 4, 0, block),
    ];
    for (.., bytes) in &mut all {
        let end = bytes.iter().rposition(|byte| *byte != 0);
        bytes.truncate(end.map_or(0, |last| last + 1));
    }
    all
}

fn pieces() -> Vec<(&'static str, Vec<u8>)> {
    let input = |(name, kind, _, bytes)| (name, [vec![kind, 0], bytes].concat());
    sound().into_iter().map(input).collect()
}

fn whole(how: u8) -> Vec<u8> {
    lay(sound(), |_| how)
}

fn lay(pieces: Vec<Piece>, how: impl Fn(u8) -> u8) -> Vec<u8> {
    let input = |(_, kind, at, bytes): Piece| {
        let length = bytes.len() as u16;
        let head = [
            &[kind, how(kind)][..],
            &at.to_le_bytes(),
            &length.to_le_bytes(),
        ];
        [head.concat(), bytes].concat()
    };
    pieces.into_iter().flat_map(input).collect()
}

fn with(mut bytes: Vec<u8>, at: usize, value: u64) -> Vec<u8> {
    bytes.resize(bytes.len().max(at + 8), 0);
    bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
    bytes
}

fn files(name: &str) -> Vec<Vec<u8>> {
    let found = std::fs::read_dir(corpus(name)).unwrap();
    let all: Vec<_> = found
        .map(|file| std::fs::read(file.unwrap().path()).unwrap())
        .collect();
    assert!(!all.is_empty());
    all
}

/// Numbers that are as large as they can be, under sums that hold.
#[test]
fn numbers_at_their_limits_do_no_harm() {
    for target in 0..sound().len() {
        for at in (8..256).step_by(4) {
            for value in [
                u64::MAX,
                u64::MAX - 1,
                1 << 63,
                (1 << 48) - 1,
                (1 << 48) - 2,
                1 << 47,
            ] {
                let mut all = sound();
                let kind = all[target].1;
                for (n, piece) in all.iter_mut().enumerate() {
                    // Both superblocks, that the one which counts has it.
                    if n == target || (piece.1 == 0 && kind == 0) {
                        piece.3 = with(std::mem::take(&mut piece.3), at, value);
                    }
                }
                // Sums are put right, sizes of areas are not.
                device(&lay(all, |kind| if kind == 0 { 4 } else { 6 }));
            }
        }
    }
}

/// The same in every run.
struct Dice(u64);

impl Dice {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        ((z ^ (z >> 27)) % end as u64) as usize
    }
}

/// So many inputs that differ from one of these in a few bytes, or end early.
fn changed(inputs: &[Vec<u8>], count: usize, target: fn(&[u8]) -> bool) -> usize {
    let mut dice = Dice(11);
    let mut sound = 0;
    for _ in 0..count {
        let mut data = inputs[dice.below(inputs.len())].clone();
        for _ in 0..=dice.below(4) {
            let at = dice.below(data.len());
            data[at] = [0, 1, 0x7f, 0x80, 0xff, dice.below(256) as u8][dice.below(6)];
        }
        if dice.below(8) == 0 {
            data.truncate(dice.below(data.len()) + 1);
        }
        sound += usize::from(target(&data));
    }
    sound
}

#[test]
fn pieces_that_were_written_are_sound_and_changed_ones_do_no_harm() {
    let mut inputs = Vec::new();
    for (name, data) in pieces() {
        assert!(decoders(&data), "{name}");
        // Changes that the sums do not catch, and all that an input can have put right.
        for how in 0..8 {
            let mut data = data.clone();
            data[1] = how;
            inputs.push(data);
        }
    }
    inputs.extend(files("pieces"));
    for data in &inputs {
        decoders(data);
    }
    let sound = changed(&inputs, 20_000, decoders);
    assert!(sound > 2_000, "only {sound} came past the sums");
}

#[test]
fn a_device_of_any_pieces_does_no_harm() {
    assert!(device(&whole(0)));
    let mut inputs: Vec<_> = (0..8).map(whole).collect();
    inputs.extend(files("device"));
    for data in &inputs {
        device(data);
    }
    assert!(device(&[]), "an empty device is formatted");
    let stores = changed(&inputs, 3_000, device);
    assert!(stores > 1_000, "only {stores} were stores");
}

#[test]
#[ignore = "writes the corpora that fuzzers begin with"]
fn write_the_corpora() {
    for folder in ["pieces", "device"] {
        std::fs::create_dir_all(corpus(folder)).unwrap();
    }
    for (name, data) in pieces() {
        std::fs::write(corpus("pieces").join(name), data).unwrap();
    }
    std::fs::write(corpus("device").join("whole"), whole(0)).unwrap();
    std::fs::write(corpus("device").join("whole-put-right"), whole(7)).unwrap();
}
