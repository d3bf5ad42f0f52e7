//! The conformance suite on every adapter, what the fault adapter does, and what is chosen where io_uring is denied.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use kvd_arena::Arena;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use tempfile::TempDir;

use super::conformance::{self, Subject};
use super::testing::{arena, fill, scratch};
use super::*;

const ARENA: u64 = 64 << 20;

/// An adapter over files.
struct Files<F> {
    open: F,
    scratch: TempDir,
    opened: u32,
    path: PathBuf,
    arena: Arc<Arena>,
    next: u64,
}

impl<F> Files<F> {
    fn new(open: F) -> Self {
        Self {
            open,
            scratch: scratch(),
            opened: 0,
            path: PathBuf::new(),
            arena: arena(ARENA),
            next: 0,
        }
    }

    fn backing(&mut self, pages: u64) -> Backing {
        self.opened += 1;
        let directory = self.scratch.path().join(self.opened.to_string());
        let backing = Backing::open(&directory, Some(pages * PAGE as u64)).expect("made");
        self.path = backing.path().to_owned();
        backing
    }
}

impl<F, B> Subject for Files<F>
where
    F: Fn(Arc<Backing>) -> B,
    B: BlockIo<Host = ArenaRange>,
{
    type Io = B;

    fn open(&mut self, pages: u64) -> B {
        let backing = self.backing(pages);
        (self.open)(Arc::new(backing))
    }

    fn host(&mut self, bytes: &[u8]) -> ArenaRange {
        let whole = bytes.len().next_multiple_of(PAGE) as u64;
        if self.next + whole > ARENA {
            self.next = 0;
        }
        let range = ArenaRange::new(Arc::clone(&self.arena), self.next, bytes.len());
        self.next += whole;
        let range = range.expect("inside");
        fill(&range, bytes);
        range
    }

    fn cut(&mut self, pages: u64) {
        let file = std::fs::File::options().write(true).open(&self.path);
        let cut = file.and_then(|f| f.set_len(pages * PAGE as u64));
        cut.expect("cut");
    }

    fn read_only(&mut self, pages: u64) -> B {
        drop(self.backing(pages));
        let flags = OFlags::RDONLY | OFlags::DIRECT | OFlags::CLOEXEC;
        let file: OwnedFd = rustix::fs::open(&self.path, flags, Mode::empty()).expect("opened");
        (self.open)(Arc::new(Backing::over(
            file,
            &self.path,
            pages * PAGE as u64,
        )))
    }
}

fn options(choice: Choice, depth: usize) -> IoOptions {
    IoOptions {
        choice,
        depth,
        threads: 4,
    }
}

fn open(backing: Arc<Backing>, choice: Choice) -> DiskIo {
    DiskIo::open(backing, &options(choice, 32))
        .expect("opened")
        .0
}

#[test]
fn io_uring_conforms() {
    conformance::run(&mut Files::new(|backing| open(backing, Choice::Uring)));
}

#[test]
fn io_uring_of_little_depth_conforms() {
    conformance::run(&mut Files::new(|backing| {
        UringIo::open(backing, 2).expect("io_uring works here")
    }));
}

#[test]
fn threads_conform() {
    conformance::run(&mut Files::new(|backing| open(backing, Choice::Threads)));
}

#[test]
fn a_fault_adapter_without_faults_conforms() {
    for choice in [Choice::Uring, Choice::Threads] {
        conformance::run(&mut Files::new(|backing| {
            Faulty::new(open(backing, choice)).0
        }));
    }
}

/// Memory outlives an adapter here, so it can be seen that nobody writes it any more.
#[test]
fn after_a_drop_nothing_is_half_done() {
    const MIB: usize = 1 << 20;
    for choice in [Choice::Uring, Choice::Threads] {
        let mut files = Files::new(|backing| open(backing, choice));
        let mut io = files.open((16 * MIB / PAGE) as u64);
        let filled = vec![9; 16 * MIB];
        let full = Buffer::Host(files.host(&filled));
        io.start(Op::Write {
            token: 0,
            offset: 0,
            buffer: full,
        });
        assert_eq!(next(&mut io), (0, Ok(())));
        let ranges: Vec<_> = (0..16).map(|_| files.host(&vec![1; MIB])).collect();
        for (token, range) in (0..).zip(&ranges) {
            io.start(Op::Read {
                token,
                offset: token * MIB as u64,
                buffer: Buffer::Host(range.clone()),
            });
        }
        io.poll(Duration::ZERO, &mut Vec::new());
        drop(io);
        for range in ranges {
            let mut seen = Vec::new();
            range.read(0, MIB, &mut |bytes| seen.extend_from_slice(bytes));
            let first = seen[0];
            assert!(seen.iter().all(|b| *b == first), "all or nothing");
            assert!(first == 9 || choice == Choice::Threads, "the ring waits");
        }
    }
}

fn page(byte: u8) -> Buffer<ArenaRange> {
    let mut memory = Aligned::new(2);
    memory.bytes_mut().fill(byte);
    Buffer::Own(memory)
}

fn next(io: &mut impl BlockIo<Host = ArenaRange>) -> (u64, Result<(), IoError>) {
    let mut done = Vec::new();
    while done.is_empty() {
        io.poll(Duration::from_secs(10), &mut done);
    }
    assert_eq!(done.len(), 1);
    let done = done.remove(0);
    assert!(done.buffer.is_some());
    (done.token, done.result)
}

fn write(token: u64, byte: u8) -> Op<ArenaRange> {
    Op::Write {
        token,
        offset: 0,
        buffer: page(byte),
    }
}

fn read(token: u64) -> Op<ArenaRange> {
    Op::Read {
        token,
        offset: 0,
        buffer: page(0),
    }
}

#[test]
fn faults_are_what_the_handle_says() {
    let scratch = scratch();
    let backing = Arc::new(Backing::open(scratch.path(), Some(1 << 20)).expect("made"));
    let (mut io, faults) = Faulty::new(open(backing, Choice::Auto));
    io.start(write(1, 1));
    assert_eq!(next(&mut io), (1, Ok(())));
    faults.set(Rules::parse("write enospc\nread short").expect("rules"));
    io.start(write(2, 2));
    assert_eq!(next(&mut io), (2, Err(IoError::Os(Errno::NOSPC))));
    io.start(read(3));
    let short = IoError::Short {
        got: PAGE,
        wanted: 2 * PAGE,
    };
    assert_eq!(next(&mut io), (3, Err(short)));
    faults.set(Rules::all(Fault::Stall));
    io.start(write(4, 4));
    let mut done = Vec::new();
    io.poll(Duration::from_millis(5), &mut done);
    assert!(done.is_empty());
    let release = std::thread::Builder::new().name("kvd-test-release".to_owned());
    let release = release.spawn(move || {
        faults.set(Rules::default());
        faults
    });
    assert_eq!(next(&mut io), (4, Ok(())), "released from outside");
    let faults = release.expect("a thread").join().expect("no panic");
    faults.set(Rules::all(Fault::Stall));
    io.start(read(5));
    faults.set(Rules::all(Fault::Error(Errno::IO)));
    assert_eq!(next(&mut io), (5, Err(IoError::Os(Errno::IO))));
}

#[test]
fn faults_are_what_the_file_says() {
    let scratch = scratch();
    let control = scratch.path().join("faults");
    let backing = Arc::new(Backing::open(scratch.path(), Some(1 << 20)).expect("made"));
    let mut io = open(backing, Choice::Auto).with_faults(&control);
    io.start(write(1, 1));
    assert_eq!(next(&mut io), (1, Ok(())), "there is no file");
    std::fs::write(&control, "all eio\n").expect("written");
    io.start(read(2));
    assert_eq!(next(&mut io), (2, Err(IoError::Os(Errno::IO))));
    std::fs::write(&control, "all stall\n").expect("written");
    io.start(read(3));
    let mut done = Vec::new();
    io.poll(Duration::from_millis(5), &mut done);
    assert!(done.is_empty());
    std::fs::remove_file(&control).expect("removed");
    assert_eq!(next(&mut io), (3, Ok(())));
}

#[test]
fn rules_that_are_none_are_refused() {
    for text in ["read", "read often", "erase eio", "all 0", "all 5000"] {
        assert!(Rules::parse(text).is_err(), "{text}");
    }
    let rules = Rules::parse("all stall\n\nflush 5\n read none").expect("rules");
    assert_eq!(
        (rules.read, rules.write, rules.flush),
        (Fault::None, Fault::Stall, Fault::Error(Errno::IO))
    );
}

/// As a container's seccomp profile does, for the calling thread.
fn deny_io_uring() {
    const fn step(code: u32, jump: u8, value: u32) -> libc::sock_filter {
        libc::sock_filter {
            code: code as u16,
            jt: 0,
            jf: jump,
            k: value,
        }
    }
    let mut filter = [
        // The number of the call is what comes first.
        step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0),
        step(
            libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K,
            1,
            libc::SYS_io_uring_setup as u32,
        ),
        step(
            libc::BPF_RET | libc::BPF_K,
            0,
            libc::SECCOMP_RET_ERRNO | libc::EPERM as u32,
        ),
        step(libc::BPF_RET | libc::BPF_K, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog {
        len: filter.len() as u16,
        filter: filter.as_mut_ptr(),
    };
    rustix::thread::set_no_new_privs(true).expect("always allowed");
    // SAFETY: the kernel copies the program, which lives until the call is over.
    let set = unsafe {
        libc::prctl(
            libc::PR_SET_SECCOMP,
            libc::SECCOMP_MODE_FILTER,
            std::ptr::from_ref(&program),
        )
    };
    assert_eq!(set, 0, "{}", std::io::Error::last_os_error());
}

#[test]
fn where_io_uring_is_denied_threads_serve_and_say_why() {
    let denied = std::thread::Builder::new().name("kvd-test-denied".to_owned());
    let denied = denied.spawn(|| {
        deny_io_uring();
        let scratch = scratch();
        let backing = Arc::new(Backing::open(scratch.path(), Some(1 << 20)).expect("made"));
        let refused = DiskIo::open(Arc::clone(&backing), &options(Choice::Uring, 4))
            .err()
            .expect("only io_uring was wanted");
        assert_eq!(refused.kind(), OpenErrorKind::Unsupported);
        let (mut io, chosen) =
            DiskIo::open(backing, &options(Choice::Auto, 4)).expect("threads serve");
        io.start(write(1, 1));
        assert_eq!(next(&mut io), (1, Ok(())));
        chosen
    });
    let chosen = denied.expect("a thread").join().expect("no panic");
    assert_eq!((chosen.name, chosen.fixed_buffers), ("threads", false));
    let reason = chosen.reason.expect("a reason");
    assert!(reason.contains("seccomp"), "{reason}");
}

#[test]
fn what_is_asked_for_is_chosen() {
    let scratch = scratch();
    let open = |choice| {
        let backing = Backing::open(scratch.path(), Some(1 << 20)).expect("made");
        DiskIo::open(Arc::new(backing), &options(choice, 4))
    };
    let (io, chosen) = open(Choice::Threads).expect("opened");
    assert_eq!((chosen.name, io.depth()), ("threads", 4));
    drop(io);
    let (io, chosen) = open(Choice::Auto).expect("the lock is free again");
    assert_eq!(chosen.name, "io_uring");
    drop(io);
    open(Choice::Uring).expect("the lock is free again, also after a ring");
}

/// Also an operation of more parts than a ring has places for.
#[test]
fn what_is_written_in_parts_is_read_whole_and_the_other_way_round() {
    const MOST: usize = 40 << 20;
    let scratch = scratch();
    let backing = Backing::open(scratch.path(), Some(MOST as u64)).expect("made");
    let options = options(Choice::Uring, 1);
    let (mut io, _) = DiskIo::open(Arc::new(backing), &options).expect("opened");
    let arena = arena(MOST as u64);
    let mut run = |op| {
        let done = conformance::one(&mut io, op);
        assert_eq!(done.result, Ok(()));
        done.buffer.expect("it comes back")
    };
    for len in [1152 << 10, 16 << 20, MOST] {
        let range = ArenaRange::new(Arc::clone(&arena), 0, len).expect("inside");
        let whole = || conformance::own(&vec![0; len]);
        let seen = conformance::content(len as u64, len);
        run(conformance::write(1, 0, conformance::own(&seen)));
        let read = run(conformance::read(2, 0, Buffer::Host(range.clone())));
        let same = conformance::bytes_of(&read) == seen;
        assert!(same, "{len} bytes read in parts");
        let other: Vec<u8> = seen.iter().map(|byte| !byte).collect();
        fill(&range, &other);
        run(conformance::write(3, 0, Buffer::Host(range)));
        let back = run(conformance::read(4, 0, whole()));
        let same = conformance::bytes_of(&back) == other;
        assert!(same, "{len} bytes written in parts");
    }
}
