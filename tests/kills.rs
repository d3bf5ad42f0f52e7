//! Processes that die at the worst moment: clients in the middle of a store, the daemon under its clients. No slot is
//! lost, nothing half-written is seen, and memory does not double.
#![allow(
    clippy::disallowed_macros,
    reason = "a child speaks to its test by printing"
)]

mod common;

use std::io::{BufRead, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use common::{Daemon, PATIENCE, content, eventually, geometry, hash, layout, mover, pages, record};
use kvd_client::{
    BlockRef, ChainRef, Identity, Link, LinkCaller, LinkConfig, LoadOutcome, Registration, Session,
    StoreOutcome,
};
use kvd_node::{SlotStatus, TenantStatus};

/// Clients that are killed.
const KILLS: u32 = 100;
/// Blocks of one store.
const BATCH: u32 = 16;
/// Blocks whose hashes a client may have used.
const MOST: u32 = 256;

/// A client that is killed in the end. What it says is what the test waits for.
struct Client {
    child: Child,
    said: BufReader<std::process::ChildStdout>,
}

impl Client {
    /// Starts this very test binary, with only [`child`] to run.
    fn start(daemon: &Daemon, owner: u32, does: &str) -> Self {
        let mut child = Command::new(std::env::current_exe().expect("is there"))
            .args(["--exact", "child", "--ignored", "--nocapture"])
            .env("KVD_TEST_SOCKET", &daemon.socket)
            .env("KVD_TEST_OWNER", owner.to_string())
            .env("KVD_TEST_DOES", does)
            .stdout(Stdio::piped())
            .spawn()
            .expect("starts");
        let said = BufReader::new(child.stdout.take().expect("piped"));
        Self { child, said }
    }

    /// Waits until it has said this so many times.
    fn hear(&mut self, word: &str, times: u32) {
        let mut line = String::new();
        for _ in 0..times {
            line.clear();
            while line.trim() != word {
                line.clear();
                assert!(
                    self.said.read_line(&mut line).expect("reads") > 0,
                    "it has ended before it said {word}"
                );
            }
        }
    }

    fn kill(mut self) {
        self.child.kill().expect("killed");
        assert_eq!(
            self.child.wait().expect("waits").signal(),
            Some(9),
            "it lived until then"
        );
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a client does. No test of its own: other tests start it, and kill it.
#[test]
#[ignore = "started by other tests"]
fn child() {
    let variable = |name: &str| std::env::var(name).expect("given by the test that starts this");
    let owner: u32 = variable("KVD_TEST_OWNER").parse().expect("a number");
    let socket = variable("KVD_TEST_SOCKET");
    let mut session =
        Session::connect(socket.as_ref(), &Identity::script("to be killed"), PATIENCE)
            .expect("connects");
    let namespace = session
        .register(&record(&[]), &[layout()])
        .expect("registers")
        .namespace;
    let (mut mover, mut from) = (mover(), pages(BATCH));
    for round in 0.. {
        let first = (round * BATCH) % MOST;
        let hashes: Vec<u8> = (first..first + BATCH)
            .flat_map(|n| hash(owner, n))
            .collect();
        let chain = ChainRef {
            group: 0,
            hashes: &hashes,
            parent: None,
        };
        if variable("KVD_TEST_DOES") == "reserve" {
            session.reserve(namespace, chain).expect("reserves");
            println!("\nreserved");
            // Held until it is killed.
            loop {
                std::thread::park();
            }
        }
        for n in 0..BATCH {
            from.fill(n, content(owner, first + n));
        }
        let numbers: Vec<[u32; 1]> = (0..BATCH).map(|n| [n]).collect();
        let blocks: Vec<_> = numbers
            .iter()
            .map(|n| BlockRef {
                at: from.pages(),
                pages: n,
            })
            .collect();
        mover
            .store(&mut session, namespace, chain, &blocks)
            .expect("stores");
        println!("\nstored");
    }
}

fn settled(tenant: &TenantStatus) -> bool {
    let SlotStatus {
        reserved,
        filling,
        quarantined,
        ..
    } = tenant.tiers.host.slots;
    reserved + filling + quarantined == 0 && tenant.sessions.len() == 1
}

#[test]
fn a_hundred_clients_killed_in_mid_store_leave_nothing_behind() {
    let daemon = Daemon::start(&[]);
    let mut session = Session::connect(&daemon.socket, &Identity::script("the judge"), PATIENCE)
        .expect("connects");
    let namespace = session
        .register(&record(&[]), &[layout()])
        .expect("registers")
        .namespace;
    eventually("all memory is there", || {
        daemon.tenant().tiers.host.state == "ready"
    });
    let (mut mover, to) = (mover(), pages(MOST));
    let mut loaded = 0;
    for owner in 0..KILLS {
        match owner % 4 {
            0 => {
                let mut client = Client::start(&daemon, owner, "reserve");
                client.hear("reserved", 1);
                client.kill();
            }
            // It is storing the next ones by the time it is killed.
            n => {
                let mut client = Client::start(&daemon, owner, "store");
                client.hear("stored", n);
                client.kill();
            }
        }
        loaded += load_all(&mut session, namespace, &mut mover, &to, owner);
    }
    assert!(loaded > KILLS, "what was stored before is kept: {loaded}");
    eventually("all slots are free or resident", || {
        settled(&daemon.tenant())
    });
    let tenant = daemon.tenant();
    assert_eq!(
        tenant.loads.failed.values().sum::<u64>(),
        0,
        "{:?}",
        tenant.loads.failed
    );
    fill_up(&mut session, namespace, &mut mover);
    let slots = daemon.tenant().tiers.host.slots;
    assert_eq!(slots.free, 0, "every slot can still be used: {slots:?}");
    session.close().expect("closes");
}

/// Loads whatever there is of a client's blocks; each is whole, or absent. How many there were.
fn load_all(
    session: &mut Session,
    namespace: u32,
    mover: &mut kvd_client::BlockMover,
    to: &kvd_device::OwnedPages,
    owner: u32,
) -> u32 {
    let hashes: Vec<u8> = (0..MOST).flat_map(|n| hash(owner, n)).collect();
    let numbers: Vec<[u32; 1]> = (0..MOST).map(|n| [n]).collect();
    let blocks: Vec<_> = numbers
        .iter()
        .map(|n| BlockRef {
            at: to.pages(),
            pages: n,
        })
        .collect();
    let outcomes = mover
        .load(session, namespace, &hashes, &blocks)
        .expect("loads");
    let mut there = 0;
    for (n, outcome) in (0..MOST).zip(outcomes) {
        match outcome {
            LoadOutcome::Loaded => {
                there += 1;
                let wanted = content(owner, n);
                let got = to.read(n);
                assert!(
                    got.iter().enumerate().all(|(at, b)| *b == wanted(at)),
                    "block {n} of client {owner}"
                );
            }
            LoadOutcome::Absent => {}
            LoadOutcome::Failed(why) => panic!("block {n} of client {owner}: {why:?}"),
        }
    }
    there
}

/// Stores as many blocks as the arena has room for.
fn fill_up(session: &mut Session, namespace: u32, mover: &mut kvd_client::BlockMover) {
    let from = pages(1);
    let all = (64u64 << 20) / geometry().slot_bytes();
    let all = u32::try_from(all).expect("few");
    for first in (0..all).step_by(64) {
        let hashes: Vec<u8> = (first..first + 64)
            .flat_map(|n| hash(u32::MAX, n))
            .collect();
        let blocks = vec![
            BlockRef {
                at: from.pages(),
                pages: &[0]
            };
            64
        ];
        let chain = ChainRef {
            group: 0,
            hashes: &hashes,
            parent: None,
        };
        let outcomes = mover
            .store(session, namespace, chain, &blocks)
            .expect("stores");
        assert!(
            outcomes.iter().all(|o| *o == StoreOutcome::Visible),
            "{outcomes:?}"
        );
    }
}

/// Inodes and sizes of the arenas that a process has mapped.
fn arenas(pid: u32) -> Vec<(u64, u64)> {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).expect("it lives");
    let mut found: Vec<_> = maps
        .lines()
        .filter(|line| line.contains("memfd:kvd-arena"))
        .map(|line| {
            let words: Vec<_> = line.split_whitespace().collect();
            let (from, to) = words[0].split_once('-').expect("a range");
            let number = |text| u64::from_str_radix(text, 16).expect("hex");
            (
                words[4].parse().expect("an inode"),
                number(to) - number(from),
            )
        })
        .collect();
    found.sort_unstable();
    found.dedup();
    found
}

#[test]
fn a_killed_daemons_arena_is_taken_over_by_the_next() {
    let mut first = Daemon::start(&[]);
    let socket = first.socket.clone();
    let link = Link::start(LinkConfig::new(socket, Identity::script("survivor"))).expect("starts");
    let registration = Registration {
        record: record(&[]),
        groups: vec![layout()],
    };
    let slot = link.register(registration).expect("registers");
    eventually("it is registered", || slot.current().is_some());
    eventually("all memory is there", || {
        first.tenant().tiers.host.state == "ready"
    });
    store_and_load(&link, slot.current().expect("registered").namespace, 1);
    let before = arenas(first.pid());
    assert_eq!(before.len(), 1);
    assert_eq!(
        arenas(std::process::id())
            .iter()
            .filter(|a| before.contains(a))
            .count(),
        1
    );

    let epoch = link.epoch();
    first.kill();
    eventually("the loss is noticed", || !link.connected());
    assert!(slot.current().is_none());
    let second = Daemon::start_in(Arc::clone(&first.directory), &[]);
    eventually("it is registered again", || {
        slot.current().is_some_and(|r| r.epoch != epoch)
    });
    eventually("all memory is there", || {
        second.tenant().tiers.host.state == "ready"
    });
    let tenant = second.tenant();
    assert!(tenant.tiers.host.adopted, "{:?}", tenant.tiers.host);
    assert_eq!(
        arenas(second.pid()),
        before,
        "the very same memory, and no other"
    );
    assert_eq!(tenant.tiers.host.slots.resident, 0, "taken as empty");
    store_and_load(&link, slot.current().expect("registered").namespace, 2);
    eventually("nothing is kept from use", || {
        second.tenant().tiers.host.extents.held_out == 0
    });
    link.stop();
}

fn store_and_load(link: &Link, namespace: u32, owner: u32) {
    let (mut mover, mut from, to) = (mover(), pages(BATCH), pages(BATCH));
    let mut caller = LinkCaller {
        link,
        timeout: PATIENCE,
    };
    let hashes: Vec<u8> = (0..BATCH).flat_map(|n| hash(owner, n)).collect();
    for n in 0..BATCH {
        from.fill(n, content(owner, n));
    }
    let numbers: Vec<[u32; 1]> = (0..BATCH).map(|n| [n]).collect();
    let source: Vec<_> = numbers
        .iter()
        .map(|n| BlockRef {
            at: from.pages(),
            pages: n,
        })
        .collect();
    let target: Vec<_> = numbers
        .iter()
        .map(|n| BlockRef {
            at: to.pages(),
            pages: n,
        })
        .collect();
    let chain = ChainRef {
        group: 0,
        hashes: &hashes,
        parent: None,
    };
    let outcomes = mover
        .store(&mut caller, namespace, chain, &source)
        .expect("stores");
    assert!(
        outcomes.iter().all(|o| *o == StoreOutcome::Visible),
        "{outcomes:?}"
    );
    let outcomes = mover
        .load(&mut caller, namespace, &hashes, &target)
        .expect("loads");
    assert!(
        outcomes.iter().all(|o| *o == LoadOutcome::Loaded),
        "{outcomes:?}"
    );
    for n in 0..BATCH {
        assert_eq!(to.read(n), from.read(n));
    }
}

#[test]
fn a_stopped_daemons_arena_is_taken_over_too() {
    let mut first = Daemon::start(&[]);
    let link = Link::start(LinkConfig::new(
        first.socket.clone(),
        Identity::script("survivor"),
    ))
    .expect("starts");
    let slot = link
        .register(Registration {
            record: record(&[]),
            groups: vec![layout()],
        })
        .expect("registers");
    eventually("it is registered", || slot.current().is_some());
    let before = arenas(first.pid());
    first.signal(rustix::process::Signal::TERM);
    assert_eq!(first.wait().code(), Some(0), "{}", first.log());
    let second = Daemon::start_in(Arc::clone(&first.directory), &[]);
    // A newcomer that is quicker than the survivor does not make the daemon take new memory.
    let mut session = Session::connect(&second.socket, &Identity::script("newcomer"), PATIENCE)
        .expect("connects");
    session
        .register(&record(&[]), &[layout()])
        .expect("registers");
    assert!(second.tenant().tiers.host.adopted);
    assert_eq!(arenas(second.pid()), before);
    session.close().expect("closes");
    link.stop();
}
