//! What every [`BlockIo`] must show, in one suite: call [`run`] from an adapter's tests.
//!
//! Deliberately absent: speed, and what only one adapter has.

use std::collections::BTreeMap;
use std::sync::mpsc::sync_channel;
use std::time::Duration;

use rustix::io::Errno;

use super::{Aligned, BlockIo, Buffer, DEPTH_MAX, Done, HostBytes, IoError, Op, PAGE};

/// Long enough that a wait which nothing ends fails a test.
const LONG: Duration = Duration::from_secs(60);
const PAGES: u64 = 4096;

/// An adapter under test, and the world around it.
pub trait Subject {
    /// The adapter.
    type Io: BlockIo;

    /// A new device of so many pages, all zeros.
    fn open(&mut self, pages: u64) -> Self::Io;

    /// Fresh host memory that begins with these bytes, of as many.
    fn host(&mut self, bytes: &[u8]) -> <Self::Io as BlockIo>::Host;

    /// Cuts the device that was opened last to so many pages, behind its adapter's back.
    fn cut(&mut self, pages: u64);

    /// A new device that reads and refuses every write.
    fn read_only(&mut self, pages: u64) -> Self::Io;
}

type HostOf<S> = <<S as Subject>::Io as BlockIo>::Host;

/// The whole suite.
///
/// # Panics
/// When the adapter does not conform.
pub fn run<S: Subject>(subject: &mut S) {
    comes_back_as_written(subject);
    many_at_once(subject);
    a_device_that_ends(subject);
    an_error_is_an_error(subject);
    what_can_not_be(subject);
    waits(subject);
    wakers(subject);
    depth(subject);
    drops(subject);
}

/// Bytes that no other seed has.
pub(super) fn content(seed: u64, bytes: usize) -> Vec<u8> {
    let mut state = seed;
    let mut out = Vec::with_capacity(bytes + 8);
    while out.len() < bytes {
        out.extend_from_slice(&mix(&mut state).to_le_bytes());
    }
    out.truncate(bytes);
    out
}

/// A step of a generator of numbers that look random.
fn mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

pub(super) fn own<H>(bytes: &[u8]) -> Buffer<H> {
    let mut memory = Aligned::new(bytes.len().div_ceil(PAGE));
    memory.bytes_mut()[..bytes.len()].copy_from_slice(bytes);
    Buffer::Own(memory)
}

pub(super) fn bytes_of<H: HostBytes>(buffer: &Buffer<H>) -> Vec<u8> {
    match buffer {
        Buffer::Own(memory) => memory.bytes().to_vec(),
        Buffer::Host(host) => {
            let mut all = Vec::new();
            host.read(0, host.len(), &mut |bytes| all.extend_from_slice(bytes));
            all
        }
    }
}

fn buffer<S: Subject>(subject: &mut S, host: bool, bytes: &[u8]) -> Buffer<HostOf<S>> {
    if host {
        Buffer::Host(subject.host(bytes))
    } else {
        own(bytes)
    }
}

/// Waits until so many are over.
fn wait<B: BlockIo>(io: &mut B, wanted: usize) -> Vec<Done<B::Host>> {
    let mut done = Vec::new();
    let mut idle = 0;
    while done.len() < wanted {
        let before = done.len();
        io.poll(Duration::from_secs(1), &mut done);
        idle = if done.len() == before { idle + 1 } else { 0 };
        assert!(idle < 60_000, "{} of {wanted} are over", done.len());
    }
    assert_eq!(done.len(), wanted, "each once");
    done
}

pub(super) fn one<B: BlockIo>(io: &mut B, op: Op<B::Host>) -> Done<B::Host> {
    io.start(op);
    wait(io, 1).remove(0)
}

pub(super) fn read<H>(token: u64, page: u64, buffer: Buffer<H>) -> Op<H> {
    Op::Read {
        token,
        offset: page * PAGE as u64,
        buffer,
    }
}

pub(super) fn write<H>(token: u64, page: u64, buffer: Buffer<H>) -> Op<H> {
    Op::Write {
        token,
        offset: page * PAGE as u64,
        buffer,
    }
}

/// Every size, from and to every kind of memory.
fn comes_back_as_written<S: Subject>(subject: &mut S) {
    let mut io = subject.open(PAGES);
    for (round, pages) in [1, 2, 3, 16, 64, 513, 1024].into_iter().enumerate() {
        for (from, to) in [(false, false), (false, true), (true, false), (true, true)] {
            let at = round as u64 * 7 + u64::from(from) * 1100;
            let bytes = content(at, pages * PAGE);
            let done = one(&mut io, write(5, at, buffer(subject, from, &bytes)));
            assert_eq!((done.token, done.result), (5, Ok(())));
            let back = done.buffer.expect("it comes back");
            assert!(bytes_of(&back) == bytes, "and is as it was");
            let done = one(&mut io, Op::Flush { token: 6 });
            assert_eq!((done.token, done.result), (6, Ok(())));
            assert!(done.buffer.is_none());
            let empty = buffer(subject, to, &vec![0; pages * PAGE]);
            let done = one(&mut io, read(u64::MAX, at, empty));
            assert_eq!((done.token, done.result), (u64::MAX, Ok(())));
            let got = bytes_of(&done.buffer.expect("it comes back"));
            assert!(got == bytes, "{pages} pages, host {from} to host {to}");
        }
    }
    let done = one(&mut io, read(0, PAGES - 1, own(&[1; PAGE])));
    assert_eq!(done.result, Ok(()));
    let last = bytes_of(&done.buffer.expect("it comes back"));
    assert!(last.iter().all(|b| *b == 0), "a new device is zeros");
    // A last page that is not full moves whole.
    let host = subject.host(&content(9, PAGE + 100));
    assert_eq!(one(&mut io, write(0, 3, Buffer::Host(host))).result, Ok(()));
    let done = one(&mut io, read(0, 3, own(&vec![0; 2 * PAGE])));
    let got = bytes_of(&done.buffer.expect("it comes back"));
    assert!(got[..PAGE + 100] == content(9, PAGE + 100));
}

/// Reads, writes and flushes of every size at once, in a scattered order, each in a lane of its own.
fn many_at_once<S: Subject>(subject: &mut S) {
    const LANE: u64 = 32;
    let mut io = subject.open(PAGES);
    let lanes = (PAGES / LANE).min(io.depth() as u64);
    let mut held: BTreeMap<u64, Vec<u8>> = BTreeMap::new();
    let mut under_way: BTreeMap<u64, Option<Vec<u8>>> = BTreeMap::new();
    let mut random = 11;
    let mut done = Vec::new();
    let mut started = 0u32;
    while started < 3000 || !under_way.is_empty() {
        while started < 3000 && (under_way.len() as u64) < lanes {
            let lane = mix(&mut random) % lanes;
            if under_way.contains_key(&lane) {
                break;
            }
            started += 1;
            let host = mix(&mut random).is_multiple_of(2);
            let (op, wrote) = match (mix(&mut random) % 8, held.get(&lane)) {
                (0, _) => (Op::Flush { token: lane }, None),
                (1..5, Some(bytes)) => {
                    let empty = buffer(subject, host, &vec![0; bytes.len()]);
                    (read(lane, lane * LANE, empty), None)
                }
                _ => {
                    let pages = 1 + mix(&mut random) as usize % LANE as usize;
                    let bytes = content(random, pages * PAGE);
                    let full = buffer(subject, host, &bytes);
                    (write(lane, lane * LANE, full), Some(bytes))
                }
            };
            io.start(op);
            under_way.insert(lane, wrote);
        }
        io.poll(Duration::from_secs(1), &mut done);
        for done in done.drain(..) {
            assert_eq!(done.result, Ok(()));
            let wrote = under_way.remove(&done.token).expect("each once");
            match (wrote, done.buffer) {
                (Some(bytes), _) => drop(held.insert(done.token, bytes)),
                (None, Some(buffer)) => {
                    assert!(
                        bytes_of(&buffer) == held[&done.token],
                        "lane {}",
                        done.token
                    );
                }
                (None, None) => {}
            }
        }
    }
}

/// What is not there any more is short, and says how short.
fn a_device_that_ends<S: Subject>(subject: &mut S) {
    for host in [false, true] {
        let mut io = subject.open(64);
        let bytes = content(3, 64 * PAGE);
        assert_eq!(one(&mut io, write(1, 0, own(&bytes))).result, Ok(()));
        subject.cut(10);
        for (page, got) in [
            (2, Some(8)),
            (9, Some(1)),
            (10, Some(0)),
            (30, Some(0)),
            (0, None),
        ] {
            let pages = if got.is_some() { 16 } else { 10 };
            let empty = buffer(subject, host, &vec![0; pages * PAGE]);
            let done = one(&mut io, read(7, page, empty));
            let wanted = got.map_or(Ok(()), |got| {
                Err(IoError::Short {
                    got: got * PAGE,
                    wanted: 16 * PAGE,
                })
            });
            assert_eq!((done.token, done.result), (7, wanted), "from page {page}");
            assert!(done.buffer.is_some(), "it comes back all the same");
        }
    }
}

/// Whatever the device refuses comes back as that, with its buffer, and spoils nothing else.
fn an_error_is_an_error<S: Subject>(subject: &mut S) {
    let mut io = subject.read_only(64);
    for host in [false, true] {
        let bytes = content(4, 8 * PAGE);
        io.start(write(1, 0, buffer(subject, host, &bytes)));
        io.start(read(2, 0, buffer(subject, host, &bytes)));
        for done in wait(&mut io, 2) {
            let refused = matches!(done.result, Err(IoError::Os(_)));
            assert_eq!(refused, done.token == 1, "{:?}", done.result);
            let back = bytes_of(&done.buffer.expect("it comes back"));
            let wanted = if refused {
                bytes.clone()
            } else {
                vec![0; 8 * PAGE]
            };
            assert!(back == wanted);
        }
    }
}

/// Places and sizes that no device has are refused, and the file does not grow.
fn what_can_not_be<S: Subject>(subject: &mut S) {
    let mut io = subject.open(64);
    let page = PAGE as u64;
    for offset in [1, 512, 64 * page, 63 * page, u64::MAX, u64::MAX - page + 1] {
        for reads in [true, false] {
            let buffer = own(&[1; 2 * PAGE]);
            let token = offset;
            let op = match reads {
                true => Op::Read {
                    token,
                    offset,
                    buffer,
                },
                false => Op::Write {
                    token,
                    offset,
                    buffer,
                },
            };
            let done = one(&mut io, op);
            assert_eq!(done.token, offset);
            assert_eq!(done.result, Err(IoError::Os(Errno::INVAL)), "at {offset}");
            assert!(done.buffer.is_some());
        }
    }
    let done = one(&mut io, read(0, 0, own(&[])));
    assert_eq!(done.result, Err(IoError::Os(Errno::INVAL)), "no bytes");
    let done = one(&mut io, read(0, 62, own(&[1; 2 * PAGE])));
    assert_eq!(done.result, Ok(()), "the last two pages");
}

/// A wait of nothing does not wait, and a wait for what does not come ends.
fn waits<S: Subject>(subject: &mut S) {
    let mut io = subject.open(64);
    let mut done = Vec::new();
    for _ in 0..1000 {
        io.poll(Duration::ZERO, &mut done);
    }
    for _ in 0..20 {
        io.poll(Duration::from_millis(1), &mut done);
    }
    assert!(done.is_empty(), "from nothing comes nothing");
    io.start(write(1, 0, own(&[5; PAGE])));
    // Only ever asked, never waited for.
    while done.is_empty() {
        io.poll(Duration::ZERO, &mut done);
        std::thread::yield_now();
    }
    assert_eq!(done[0].result, Ok(()));
    done.clear();
    // One wait may end early, but not all of them.
    io.start(read(2, 0, own(&[0; PAGE])));
    for _ in 0..1000 {
        io.poll(Duration::from_secs(1), &mut done);
        if !done.is_empty() {
            return;
        }
    }
    panic!("a wait does not end with a completion");
}

/// A ring ends a wait, whether it comes before or after it begins; also while operations are under way.
fn wakers<S: Subject>(subject: &mut S) {
    const ROUNDS: u32 = 500;
    let mut io = subject.open(64);
    let Some(waker) = io.waker() else {
        return;
    };
    let (ask, asked) = sync_channel::<u32>(1);
    let (answer, answered) = sync_channel::<u32>(1);
    let ringer = std::thread::Builder::new()
        .name("kvd-test-ringer".to_owned())
        .spawn(move || {
            while let Ok(round) = asked.recv() {
                // Sometimes the other end sleeps by then.
                for _ in 0..round % 50 {
                    std::thread::yield_now();
                }
                answer.send(round).expect("somebody listens");
                (waker.0)();
            }
        })
        .expect("a thread");
    let mut done = Vec::new();
    for round in 0..ROUNDS {
        if round % 5 == 0 {
            io.start(read(u64::from(round), 0, own(&[0; PAGE])));
        }
        ask.send(round).expect("it lives");
        let mut waits = 0;
        loop {
            // A lost ring shows as a wait that took long: nothing else ends this one.
            #[expect(clippy::disallowed_methods, reason = "a test of a time")]
            let start = std::time::Instant::now();
            io.poll(LONG, &mut done);
            assert!(start.elapsed() < LONG / 2, "round {round}: a ring was lost");
            if answered.try_recv() == Ok(round) {
                break;
            }
            waits += 1;
            assert!(waits < 1000, "round {round}: it does not wait");
        }
    }
    drop(ask);
    ringer.join().expect("no panic");
    let missing = ROUNDS.div_ceil(5) as usize - done.len();
    drop(wait(&mut io, missing));
}

/// As many as it says, at once; one more is refused, and does no harm.
fn depth<S: Subject>(subject: &mut S) {
    let mut io = subject.open(PAGES);
    let depth = io.depth();
    assert!((1..=DEPTH_MAX).contains(&depth));
    for _ in 0..3 {
        for token in 0..depth as u64 {
            io.start(write(token, token % PAGES, own(&[3; PAGE])));
        }
        io.start(write(u64::MAX, 0, own(&[4; PAGE])));
        let done = wait(&mut io, depth + 1);
        let (more, rest): (Vec<_>, Vec<_>) = done.iter().partition(|d| d.token == u64::MAX);
        assert_eq!(more[0].result, Err(IoError::Os(Errno::BUSY)));
        assert!(more[0].buffer.is_some());
        assert!(rest.iter().all(|d| d.result.is_ok()));
    }
}

/// An adapter that goes away with operations under way, heard of by the device or not, takes their memory with it safely.
fn drops<S: Subject>(subject: &mut S) {
    for round in 0..12u64 {
        let mut io = subject.open(PAGES);
        let host = subject.host(&content(round, 64 * PAGE));
        let mut host = Some(host);
        for token in 0..(io.depth() as u64).min(32) {
            let memory = host
                .take()
                .map_or_else(|| own(&vec![1; 64 * PAGE]), Buffer::Host);
            if (token + round) % 2 == 0 {
                io.start(read(token, token * 64, memory));
            } else {
                io.start(write(token, token * 64, memory));
            }
        }
        if round % 3 != 0 {
            io.poll(Duration::ZERO, &mut Vec::new());
        }
        let waker = io.waker();
        match round % 2 {
            0 => drop(io),
            _ => assert_eq!(io.drain(), [0; 0], "the device does not hang"),
        }
        if let Some(waker) = waker {
            // Rings into nothing.
            (waker.0)();
        }
    }
}
