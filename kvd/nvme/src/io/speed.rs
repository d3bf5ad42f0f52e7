//! What the adapters reach of what [`raw`] reaches, in the same minute: ignored, to be run by hand.

#![expect(
    clippy::disallowed_macros,
    clippy::disallowed_methods,
    reason = "a measurement is of the clock, and to be seen"
)]

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::testing::{arena, fill, scratch};
use super::*;

const BYTES: u64 = 2 << 30;
const DEPTH: usize = 16;

/// Moves the whole device once, from and to an arena, in 10^9 bytes a second.
fn through(io: &mut DiskIo, block: usize, write: bool) -> f64 {
    let pieces = raw_blocks(block, DEPTH);
    let arena = arena((pieces * block) as u64);
    // Who was free longest comes first, as in plain transfers.
    let mut free: VecDeque<ArenaRange> = (0..pieces)
        .map(|n| ArenaRange::new(Arc::clone(&arena), (n * block) as u64, block).expect("inside"))
        .inspect(|range| fill(range, &vec![7; block]))
        .collect();
    let mut offset = 0;
    let mut done = Vec::new();
    let start = Instant::now();
    while offset < BYTES || free.len() < pieces {
        while offset < BYTES
            && pieces - free.len() < DEPTH
            && let Some(range) = free.pop_front()
        {
            let (token, buffer) = (0, Buffer::Host(range));
            io.start(if write {
                Op::Write {
                    token,
                    offset,
                    buffer,
                }
            } else {
                Op::Read {
                    token,
                    offset,
                    buffer,
                }
            });
            offset += block as u64;
        }
        io.poll(Duration::from_secs(1), &mut done);
        for done in done.drain(..) {
            assert_eq!(done.result, Ok(()));
            if let Some(Buffer::Host(range)) = done.buffer {
                free.push_back(range);
            }
        }
    }
    BYTES as f64 / 1e9 / start.elapsed().as_secs_f64()
}

#[test]
#[ignore = "a measurement"]
fn adapters_against_raw() {
    let scratch = scratch();
    let directory = scratch.path().join("store");
    for block in [2 << 20, 64 << 10] {
        let mut run = RawRun {
            bytes: BYTES,
            block,
            depth: DEPTH,
            write: true,
            random: false,
            durable: false,
        };
        let path = scratch.path().join("raw");
        let memory = raw_memory(block, DEPTH).expect("memory");
        let place = |number| number * block as u64;
        for write in [true, false] {
            run.write = write;
            for random in [false, true] {
                run.random = random;
                println!(
                    "{run:?} {:?}",
                    raw(&path, &run, &memory, &place).expect("measured")
                );
            }
            run.random = false;
            for choice in [Choice::Uring, Choice::Threads] {
                let backing = Backing::open(&directory, Some(BYTES)).expect("made");
                let options = IoOptions {
                    choice,
                    depth: DEPTH,
                    threads: 8,
                };
                let (mut io, chosen) = DiskIo::open(Arc::new(backing), &options).expect("opened");
                let first = through(&mut io, block, write);
                let again = through(&mut io, block, write);
                let raw = raw(&path, &run, &memory, &place).expect("measured").gbps;
                let ratio = again / raw;
                println!(
                    "{choice:?} write {write}: {first:.2} {again:.2} GB/s, raw {raw:.2}, ratio {ratio:.2}, {chosen:?}"
                );
            }
        }
    }
}

#[test]
#[ignore = "a measurement"]
fn host_reads() {
    let arena = arena(256 << 20);
    let range = ArenaRange::new(arena, 0, 256 << 20).expect("inside");
    for _ in 0..3 {
        let start = Instant::now();
        let mut sum = 0u64;
        range.read(0, range.len(), &mut |bytes| sum += u64::from(bytes[0]));
        let seconds = start.elapsed().as_secs_f64();
        println!(
            "copies {:.2} GB/s ({sum})",
            range.len() as f64 / 1e9 / seconds
        );
    }
}
