//! An operation as the parts that a ring's kernel is given of it: a device takes so many pages of memory at a time, and what has more
//! waits until the device has nothing else. Deliberately absent: the ring (`uring`).

use kvd_arena::HUGE_PAGE_BYTES;
use rustix::io::Errno;

use super::job::Job;
use super::{ArenaRange, Buffer, Done, PAGE};

/// Most bytes of a part. With a block's header, half a MiB: devices take 128 or 256 pages at a time, some less for themselves. Of more the
/// kernel makes operations as large as the device can take, and then not one of header and bytes, so the bytes wait for
/// the header (a virtual disk: stores and loads of 1152 KiB, one at a time, lost a tenth). It joins parts that do fit.
pub(super) const PART: usize = (512 << 10) - PAGE;

/// Places in a queue beside those of operations: the bell's, and some for pairs' company, should the kernel take a pair by halves.
const BESIDES: usize = 3;
/// Places for parts of operations: nearly all are handed over before they need more.
const PARTS: u32 = 32;

/// Places that a queue needs for so many operations at a time.
pub(super) fn places(depth: u32) -> u32 {
    (depth + BESIDES as u32 + PARTS).next_power_of_two()
}

/// How many parts the next operation may have, so that every other has one place of those that are `left`, also when the kernel takes
/// nothing from the queue while it is done with what it has: each that is over may be followed by another.
pub(super) fn room(left: usize, depth: usize) -> usize {
    left.saturating_sub(depth - 1 + BESIDES)
}

/// One part: where it begins in the operation, and its length, whole pages both.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Part {
    pub(super) at: usize,
    pub(super) len: usize,
}

/// An operation that is under way, in parts.
pub(super) struct Parted {
    job: Job<ArenaRange>,
    len: usize,
    each: usize,
    /// Parts that are not over.
    left: usize,
    got: usize,
    failed: Option<Errno>,
}

impl Parted {
    /// In parts if they help and are no more than `room`, else whole. Memory on huge pages is few things to a device, and stays whole.
    pub(super) fn new(job: Job<ArenaRange>, room: usize) -> Self {
        let len = job.len();
        let small_pages = match &job.buffer {
            Some(Buffer::Host(range)) => range.arena().shape().page_bytes < HUGE_PAGE_BYTES,
            Some(Buffer::Own(_)) | None => false,
        };
        let cut = small_pages && len.div_ceil(PART) <= room;
        // A flush has no bytes and is a part.
        let each = if cut { PART } else { len.max(1) };
        Self {
            left: len.div_ceil(each).max(1),
            job,
            len,
            each,
            got: 0,
            failed: None,
        }
    }

    /// The operation.
    pub(super) fn job(&mut self) -> &mut Job<ArenaRange> {
        &mut self.job
    }

    /// Of the operation.
    pub(super) fn token(&self) -> u64 {
        self.job.token
    }

    /// What to ask the kernel for.
    pub(super) fn parts(&self) -> impl Iterator<Item = Part> + use<> {
        let (len, each) = (self.len, self.each);
        (0..len.max(1)).step_by(each).map(move |at| Part {
            at,
            len: each.min(len - at),
        })
    }

    /// The kernel's answer to one part. Whether it was the last.
    pub(super) fn over(&mut self, answer: Result<usize, Errno>) -> bool {
        match answer {
            Ok(got) => self.got += got,
            Err(errno) => self.failed = self.failed.or(Some(errno)),
        }
        self.left -= 1;
        self.left == 0
    }

    /// What became of it, once the last part is over.
    pub(super) fn done(self) -> Done<ArenaRange> {
        debug_assert_eq!(self.left, 0, "the kernel still has parts");
        let result = self.job.judge(self.failed.map_or(Ok(self.got), Err));
        self.job.done(result)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::io::testing::arena;
    use crate::io::{Aligned, IoError, Op};

    fn read(len: usize) -> Job<ArenaRange> {
        let range = ArenaRange::new(arena(4 << 20), 0, len).expect("inside");
        let (token, offset) = (7, 0);
        Job::from(Op::Read {
            token,
            offset,
            buffer: Buffer::Host(range),
        })
    }

    #[test]
    fn parts_are_the_operation_in_order_and_no_more_than_there_is_room_for() {
        for (len, room, wanted) in [
            (PAGE, 9, 1),
            (PART, 9, 1),
            (PART + 1, 9, 2),
            (1152 << 10, 9, 3),
            (1152 << 10, 3, 3),
            (1152 << 10, 2, 1),
            (1152 << 10, 0, 1),
            (4 << 20, 9, 9),
        ] {
            let parted = Parted::new(read(len), room);
            let parts: Vec<Part> = parted.parts().collect();
            assert_eq!((parts.len(), parted.left), (wanted, wanted), "{len} {room}");
            let mut end = 0;
            for part in parts {
                assert_eq!(part.at, end);
                assert!(part.len > 0 && part.len.is_multiple_of(PAGE));
                end += part.len;
            }
            assert_eq!(end, len.next_multiple_of(PAGE));
        }
    }

    #[test]
    fn every_operation_has_a_place_whatever_the_kernel_takes() {
        for seed in 1..200_u64 {
            let mut state = seed;
            let mut below = |most: usize| {
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1);
                (state >> 33) as usize % most
            };
            let depth = 1 + below(70);
            let all = places(depth as u32) as usize;
            // Of each operation under way: its entries that the kernel has not taken; the queue, in order.
            let (mut left, mut queue) = (vec![], std::collections::VecDeque::new());
            let greedy = below(2) == 0;
            for _ in 0..3000 {
                match below(8) {
                    0 if !greedy => {
                        for _ in 0..below(queue.len() + 1) {
                            let of: usize = queue.pop_front().expect("counted");
                            left[of] -= 1;
                        }
                    }
                    1 => {
                        for of in &mut left {
                            *of = if *of == 0 && below(2) == 0 {
                                usize::MAX
                            } else {
                                *of
                            };
                        }
                    }
                    _ => {
                        let free = left.iter().position(|of| *of == usize::MAX);
                        let of = free.unwrap_or(left.len());
                        if of == depth {
                            continue;
                        }
                        let room = room(all - queue.len(), depth);
                        let wanted = 1 + below(PARTS as usize + 9);
                        let parts = if wanted <= room { wanted } else { 1 };
                        left.resize(left.len().max(of + 1), 0);
                        left[of] = parts;
                        queue.extend(std::iter::repeat_n(of, parts));
                        assert!(queue.len() + BESIDES <= all, "seed {seed}");
                    }
                }
            }
        }
        assert!(room(places(1) as usize, 1) >= PARTS as usize);
        assert!(room(places(64) as usize, 64) >= PARTS as usize);
    }

    #[test]
    fn what_is_not_an_arena_on_small_pages_stays_whole() {
        let flush = Parted::new(Job::from(Op::Flush { token: 1 }), 9);
        assert!(flush.parts().eq([Part { at: 0, len: 0 }]));
        let buffer = Buffer::Own(Aligned::new(512));
        let (token, offset) = (1, 0);
        let own = Job::from(Op::Write {
            token,
            offset,
            buffer,
        });
        let whole = Part {
            at: 0,
            len: 2 << 20,
        };
        assert!(Parted::new(own, 9).parts().eq([whole]));
    }

    #[test]
    fn it_is_over_with_its_last_part_and_good_only_if_all_are() {
        let len = 1152 << 10;
        let finish = |answers: [Result<usize, Errno>; 3]| {
            let mut parted = Parted::new(read(len), 9);
            assert!(!parted.over(answers[0]) && !parted.over(answers[1]));
            assert!(parted.over(answers[2]));
            let done = parted.done();
            assert!(done.token == 7 && done.buffer.is_some());
            done.result
        };
        let last = len - 2 * PART;
        assert_eq!(finish([Ok(last), Ok(PART), Ok(PART)]), Ok(()), "any order");
        let short = IoError::Short {
            got: len - PAGE,
            wanted: len,
        };
        assert_eq!(finish([Ok(PART), Ok(PART), Ok(last - PAGE)]), Err(short));
        let answers = [Ok(PART), Err(Errno::IO), Err(Errno::NOSPC)];
        assert_eq!(finish(answers), Err(IoError::Os(Errno::IO)), "the first");
    }

    #[test]
    fn its_memory_stays_until_the_last_part_is_over() {
        let arena = arena(2 << 20);
        let range = ArenaRange::new(Arc::clone(&arena), 0, 1 << 20).expect("inside");
        let (token, offset, buffer) = (1, 0, Buffer::Host(range));
        let job = Job::from(Op::Write {
            token,
            offset,
            buffer,
        });
        let mut parted = Parted::new(job, 9);
        assert!(!parted.over(Err(Errno::IO)) && !parted.over(Ok(PART)));
        assert_eq!(Arc::strong_count(&arena), 2);
        assert!(parted.over(Ok(2 * PAGE)));
        drop(parted.done());
        assert_eq!(Arc::strong_count(&arena), 1);
    }
}
