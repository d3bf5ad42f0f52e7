//! What these tests share: a place for a store and its daemons, an engine that checks every byte it loads, and a look into the
//! store's file. Deliberately absent: the crates of the daemon itself; the file is read by `docs/formats.md`.

use std::cell::RefCell;
use std::io::Read;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::time::Duration;

use kvd_client::{BlockMover, BlockRef, ChainRef, Identity, LoadOutcome, MoverConfig, Session};
use kvd_client::{FailReason, StoreOutcome};
use kvd_core::Cut;
use kvd_device::{HostDevice, OwnedPages};
use kvd_node::StoreStatus;

use crate::common::{Daemon, PATIENCE, eventually, geometry, hash, kvd, layout, pages, record};

/// Blocks that fit into the host memory of [`Home::serve`].
pub(crate) const HOST_BLOCKS: u32 = 256;
/// Blocks of one request.
const WINDOW: u32 = 32;
pub(crate) const PAGE: u64 = 4096;

/// Whether the long runs are wanted.
pub(crate) fn soak() -> bool {
    std::env::var_os("KVD_TEST_SOAK").is_some_and(|v| v == "1")
}

/// Numbers that look random and are the same in every run.
pub(crate) struct Dice(u64);

impl Dice {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
}

fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

thread_local! {
    /// One window, for all engines of a thread: such memory is never given back.
    static BUFFER: RefCell<OwnedPages> = RefCell::new(pages(WINDOW));
}

/// What a block holds: no two blocks have a word in common but by chance.
fn content(owner: u32, number: u32) -> impl Fn(usize) -> u8 {
    let seed = mix(u64::from(owner) << 32 | u64::from(number));
    move |at| mix(seed.wrapping_add((at as u64 / 8) << 1)).to_le_bytes()[at % 8]
}

/// A store's directory, where direct I/O works, and one for the sockets, whose paths must be short.
pub(crate) struct Home {
    pub(crate) store: tempfile::TempDir,
    pub(crate) run: Arc<tempfile::TempDir>,
}

impl Home {
    pub(crate) fn new() -> Self {
        let target = Path::new(env!("CARGO_TARGET_TMPDIR"));
        Self {
            store: tempfile::tempdir_in(target).expect("a directory"),
            run: Arc::new(tempfile::tempdir().expect("a directory")),
        }
    }

    /// The store's file.
    pub(crate) fn file(&self) -> PathBuf {
        self.store.path().join("kvd.nvme")
    }

    fn command(&self, flags: &[&str]) -> Command {
        let mut command = kvd();
        command
            .args(["serve", "--http", "127.0.0.1:0", "--adopt-grace", "1ms"])
            .args(["--host-capacity", "16MiB"])
            .args(flags);
        command.arg("--runtime-dir").arg(self.run.path());
        if !flags.contains(&"--nvme") {
            command.arg("--nvme").arg(self.store.path());
        }
        if !flags.contains(&"--nvme-capacity") {
            command.args(["--nvme-capacity", "128MiB"]);
        }
        command
    }

    /// A daemon with 16 MiB of host memory and this store.
    pub(crate) fn serve(&self, flags: &[&str]) -> Daemon {
        Daemon::spawn(self.command(flags), Arc::clone(&self.run))
    }

    /// A daemon of a user with this home, told nothing of stores.
    pub(crate) fn serve_at(&self, home: &Path) -> Daemon {
        let mut command = self.command(&["--nvme", "auto"]);
        command.env("HOME", home);
        Daemon::spawn(command, Arc::clone(&self.run))
    }

    /// One that does not come to serve: its exit status, and what it said.
    pub(crate) fn refused(&self, flags: &[&str]) -> (i32, String) {
        let out = run(self.command(flags));
        let code = out.status.code().expect("it was not killed");
        (code, String::from_utf8_lossy(&out.stderr).into_owned())
    }

    /// `kvd fsck` of the store: exit status, standard output, standard error.
    pub(crate) fn fsck(&self, flags: &[&str]) -> (i32, String, String) {
        let mut command = kvd();
        command.arg("fsck").arg(self.store.path()).args(flags);
        let out = run(command);
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let code = out.status.code().expect("it was not killed");
        (code, text(&out.stdout), text(&out.stderr))
    }
}

/// A child that does not outlive its test.
struct Reaper(Child);

impl Drop for Reaper {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs a command that ends by itself, and says little.
pub(crate) fn run(mut command: Command) -> Output {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = Reaper(command.spawn().expect("starts"));
    let mut status = None;
    eventually("the command ends", || {
        status = child.0.try_wait().expect("waits");
        status.is_some()
    });
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    let mut out = child.0.stdout.take().expect("piped");
    out.read_to_end(&mut stdout).expect("reads");
    let mut err = child.0.stderr.take().expect("piped");
    err.read_to_end(&mut stderr).expect("reads");
    Output {
        status: status.expect("just seen"),
        stdout,
        stderr,
    }
}

/// The only store.
pub(crate) fn store(daemon: &Daemon) -> StoreStatus {
    daemon.status().stores.swap_remove(0)
}

/// A count of the tier.
pub(crate) fn tier(daemon: &Daemon, name: &str) -> u64 {
    let counts = daemon.status().tier.counts;
    *counts
        .get(name)
        .unwrap_or_else(|| panic!("no count {name}: {counts:?}"))
}

/// Waits until so many blocks have been written since the start of this daemon, and no more than that.
pub(crate) fn offloaded(daemon: &Daemon, blocks: u64) {
    eventually("all blocks are written", || {
        tier(daemon, "offloaded") >= blocks
    });
    assert_eq!(tier(daemon, "offloaded"), blocks);
}

/// What became of loads. Bytes that were loaded have been compared.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Loads {
    pub(crate) loaded: Vec<u32>,
    pub(crate) absent: Vec<u32>,
    pub(crate) failed: Vec<(u32, FailReason)>,
}

/// A session that stores and loads blocks, and knows what each must hold.
pub(crate) struct Engine {
    session: Session,
    namespace: u32,
    mover: BlockMover,
}

impl Engine {
    pub(crate) fn new(daemon: &Daemon) -> Self {
        Self::of(daemon, "test")
    }

    /// One of a model with these weights.
    pub(crate) fn of(daemon: &Daemon, weights: &str) -> Self {
        let identity = Identity::script("an engine");
        let mut session =
            Session::connect(&daemon.socket, &identity, PATIENCE).expect("the daemon serves");
        let namespace = session
            .register(&record(&[("weights", weights)]), &[layout()])
            .expect("registers")
            .namespace;
        eventually("all memory is there", || {
            daemon.tenant().tiers.host.state == "ready"
        });
        let config = MoverConfig {
            window_bytes: WINDOW as usize * geometry().slot_bytes() as usize,
            load_deadline: Duration::from_secs(30),
            ..MoverConfig::new(0, geometry(), Cut::whole(&geometry()), 0)
        };
        let mover = BlockMover::new(Arc::new(HostDevice), config).expect("a mover");
        Self {
            session,
            namespace,
            mover,
        }
    }

    /// How long the daemon may take for a load; it answers after three quarters of it.
    pub(crate) fn patience(&mut self, patience: Duration) {
        let mut config = self.mover.config().clone();
        config.load_deadline = patience;
        self.mover = BlockMover::new(Arc::new(HostDevice), config).expect("a mover");
    }

    /// Stores blocks of a chain, all of which must become visible.
    pub(crate) fn store(&mut self, owner: u32, numbers: Range<u32>) {
        let mut first = numbers.start;
        while first < numbers.end {
            let end = numbers.end.min(first + WINDOW);
            let outcomes = self.store_window(owner, first..end);
            assert!(
                outcomes.iter().all(|o| *o == StoreOutcome::Visible),
                "blocks {first} to {end} of {owner}: {outcomes:?}"
            );
            first = end;
        }
    }

    /// The same for blocks of one window; it may fail.
    pub(crate) fn store_window(&mut self, owner: u32, numbers: Range<u32>) -> Vec<StoreOutcome> {
        BUFFER.with_borrow_mut(|from| self.store_from(from, owner, numbers))
    }

    fn store_from(
        &mut self,
        from: &mut OwnedPages,
        owner: u32,
        numbers: Range<u32>,
    ) -> Vec<StoreOutcome> {
        for (page, number) in (0..).zip(numbers.clone()) {
            from.fill(page, content(owner, number));
        }
        let places: Vec<[u32; 1]> = (0..numbers.end - numbers.start).map(|n| [n]).collect();
        let hashes = hashes(owner, numbers.clone());
        let parent = numbers.start.checked_sub(1).map(|n| hash(owner, n));
        let chain = ChainRef {
            group: 0,
            hashes: &hashes,
            parent: parent.as_ref(),
        };
        let blocks: Vec<_> = places
            .iter()
            .map(|n| BlockRef {
                at: from.pages(),
                pages: n,
            })
            .collect();
        self.mover
            .store(&mut self.session, self.namespace, chain, &blocks)
            .expect("a store is answered")
    }

    /// How many of these blocks a lookup says to be here, below or coming.
    pub(crate) fn found(&mut self, owner: u32, numbers: Range<u32>) -> u32 {
        let chain = ChainRef {
            group: 0,
            hashes: &hashes(owner, numbers),
            parent: None,
        };
        let looked = self.session.lookup(self.namespace, &[chain], 0, false);
        let runs = &looked.expect("a lookup is answered").chains[0];
        runs.length.iter().sum()
    }

    /// Loads blocks of a chain. Wrong bytes end the test.
    pub(crate) fn load(&mut self, owner: u32, numbers: Range<u32>) -> Loads {
        let mut all = Loads::default();
        let mut first = numbers.start;
        while first < numbers.end {
            let end = numbers.end.min(first + WINDOW);
            BUFFER.with_borrow_mut(|to| self.load_window(to, owner, first..end, &mut all));
            first = end;
        }
        all
    }

    fn load_window(
        &mut self,
        to: &mut OwnedPages,
        owner: u32,
        numbers: Range<u32>,
        all: &mut Loads,
    ) {
        for page in 0..numbers.end - numbers.start {
            to.fill(page, |_| 0xee);
        }
        let places: Vec<[u32; 1]> = (0..numbers.end - numbers.start).map(|n| [n]).collect();
        let blocks: Vec<_> = places
            .iter()
            .map(|n| BlockRef {
                at: to.pages(),
                pages: n,
            })
            .collect();
        let hashes = hashes(owner, numbers.clone());
        let outcomes = self
            .mover
            .load(&mut self.session, self.namespace, &hashes, &blocks)
            .expect("a load is answered");
        for ((page, number), outcome) in (0..).zip(numbers).zip(outcomes) {
            match outcome {
                LoadOutcome::Loaded => {
                    let (got, wanted) = (to.read(page), content(owner, number));
                    assert!(
                        got.iter().enumerate().all(|(at, byte)| *byte == wanted(at)),
                        "wrong bytes in block {number} of {owner}"
                    );
                    all.loaded.push(number);
                }
                LoadOutcome::Absent => all.absent.push(number),
                LoadOutcome::Failed(why) => all.failed.push((number, why)),
            }
        }
    }

    /// Loads blocks all of which must be there.
    pub(crate) fn load_all(&mut self, owner: u32, numbers: Range<u32>) {
        let loads = self.load(owner, numbers.clone());
        assert_eq!(
            loads.loaded.len(),
            numbers.len(),
            "of chain {owner}: absent {:?}, failed {:?}",
            loads.absent,
            loads.failed
        );
    }
}

fn hashes(owner: u32, numbers: Range<u32>) -> Vec<u8> {
    numbers.flat_map(|n| hash(owner, n)).collect()
}

/// The superblock's numbers that a test needs, in bytes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Areas {
    pub(crate) names_at: u64,
    pub(crate) journal_at: u64,
    pub(crate) segments_at: u64,
}

/// Where the two superblocks lie.
pub(crate) const HEADS: [u64; 2] = [0, 8 * PAGE];

impl Areas {
    pub(crate) fn read(file: &Path) -> Self {
        let head = page(file, HEADS[0]);
        assert_eq!(&head[..8], b"KVDNVME\0");
        let number = |at: usize| u64::from_le_bytes(head[at..at + 8].try_into().expect("8 bytes"));
        Self {
            names_at: number(64),
            journal_at: number(72),
            segments_at: number(104),
        }
    }
}

/// One page of a file.
pub(crate) fn page(file: &Path, at: u64) -> Vec<u8> {
    let mut page = vec![0; PAGE as usize];
    let file = std::fs::File::open(file).expect("opens");
    file.read_exact_at(&mut page, at).expect("reads");
    page
}

/// Writes bytes somewhere into a file.
pub(crate) fn write_at(file: &Path, at: u64, bytes: &[u8]) {
    let file = std::fs::File::options()
        .write(true)
        .open(file)
        .expect("opens");
    file.write_all_at(bytes, at).expect("writes");
    file.sync_all().expect("written");
}

/// Changes one byte.
pub(crate) fn flip(file: &Path, at: u64, with: u8) {
    let before = page(file, at - at % PAGE)[(at % PAGE) as usize];
    write_at(file, at, &[before ^ with]);
}

/// Where the header of a block lies.
pub(crate) fn header_of(file: &Path, owner: u32, number: u32) -> u64 {
    let bytes = std::fs::read(file).expect("reads");
    let wanted = hash(owner, number);
    let first = Areas::read(file).segments_at;
    let mut at = (first..bytes.len() as u64).step_by(PAGE as usize);
    at.find(|at| {
        let page = &bytes[*at as usize..];
        &page[..8] == b"KVDBLK01" && page[56..88] == wanted
    })
    .expect("the block is in the file")
}

/// CRC-64/NVME, bit by bit.
pub(crate) fn crc64(bytes: &[u8]) -> u64 {
    let mut crc = u64::MAX;
    for byte in bytes {
        crc ^= u64::from(*byte);
        for _ in 0..8 {
            let odd = crc & 1 == 1;
            crc >>= 1;
            crc ^= if odd { 0x9a6c_9329_ac4b_c9b5 } else { 0 };
        }
    }
    !crc
}
