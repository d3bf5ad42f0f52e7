//! Sessions that break the rules: each gets a clear error or its end, nobody else notices, and memory stays bounded.

mod common;

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use kvd_arena::ArenaView;

use common::{Daemon, PATIENCE, Raw, eventually, framed, hash, hello, kvd, layout, record};
use kvd_client::{ChainRef, Identity, Session};
use kvd_wire::frame;
use kvd_wire::session::{
    Abort, ArenaOffer, ArenaShape, Chain, Commit, ErrorKind, Failure, Hello, Load, Lookup, Ping,
    Register, Release, Reserve, Role, reply, request,
};

/// The daemon's memory beside the arena, whatever it is sent.
const MEMORY_MB: f64 = 100.0;

fn failure(answer: Option<reply::Body>) -> Failure {
    match answer {
        Some(reply::Body::Failure(failure)) => failure,
        other => panic!("no failure: {other:?}"),
    }
}

/// The session is told why, and ends.
fn ends(raw: &mut Raw, why: &str) {
    let (_, reply) = raw.hear().expect("it is told why");
    let failure = failure(Some(reply));
    assert!(
        failure.ends_session && failure.text.contains(why),
        "{failure:?}"
    );
    assert!(raw.hear().is_none(), "and ends");
}

/// The request is refused, and the session goes on.
fn refused(raw: &mut Raw, body: request::Body, kind: ErrorKind, why: &str) {
    let failure = failure(raw.ask(body));
    assert_eq!(failure.kind, i32::from(kind), "{failure:?}");
    assert!(
        !failure.ends_session && failure.text.contains(why),
        "{failure:?}"
    );
    alive(raw);
}

fn alive(raw: &mut Raw) {
    assert!(matches!(
        raw.ask(request::Body::Ping(Ping {})),
        Some(reply::Body::Pong(_))
    ));
}

fn file() -> OwnedFd {
    std::fs::File::open("/dev/null").expect("opens").into()
}

fn hashes(count: usize) -> request::Body {
    let chain = Chain {
        hashes: vec![3; 32 * count].into(),
        ..Chain::default()
    };
    request::Body::Lookup(Lookup {
        chains: vec![chain],
        ..Lookup::default()
    })
}

#[test]
fn frames_that_are_none_end_their_session_only() {
    let daemon = Daemon::start(&[]);
    let mut good = Raw::hello(&daemon.socket, Role::Both);
    good.register();

    let mut raw = Raw::hello(&daemon.socket, Role::Both);
    raw.send(&u32::MAX.to_le_bytes());
    ends(&mut raw, "over the limit");

    let mut raw = Raw::hello(&daemon.socket, Role::Both);
    raw.send(&[2, 0, 0, 0, 1, 0, 0, 0]);
    ends(&mut raw, "too short");

    let mut raw = Raw::hello(&daemon.socket, Role::Both);
    raw.send(&[20, 0, 0, 0, 1, 0, 0, 0]);
    raw.send(&[0xff; 16]);
    ends(&mut raw, "no kvd session");

    // Cut off in the middle, at every length.
    let whole = framed(1, request::Body::Hello(hello(Role::Both)));
    for cut in 1..whole.len() {
        let mut raw = Raw::connect(&daemon.socket);
        raw.send(&whole[..cut]);
    }
    // Something else altogether.
    let mut raw = Raw::connect(&daemon.socket);
    raw.send(b"GET / HTTP/1.1\r\nHost: kvd\r\n\r\n");
    ends(&mut raw, "over the limit");

    alive(&mut good);
    eventually("those sessions are forgotten", || {
        daemon.tenant().sessions.len() == 1
    });
}

#[test]
fn who_says_no_hello_is_not_served() {
    let daemon = Daemon::start(&["--handshake-timeout", "200ms"]);
    let mut silent = Raw::connect(&daemon.socket);
    ends(&mut silent, "say Hello first");
    let mut early = Raw::connect(&daemon.socket);
    early.say(request::Body::Ping(Ping {}));
    ends(&mut early, "not a Hello");
    let mut twice = Raw::hello(&daemon.socket, Role::Both);
    twice.say(request::Body::Hello(hello(Role::Both)));
    ends(&mut twice, "second Hello");
}

#[test]
fn hellos_that_make_no_sense_are_refused() {
    let daemon = Daemon::start(&[]);
    let mut wrong = Vec::new();
    let mut with = |why: &'static str, change: &dyn Fn(&mut Hello)| {
        let mut hello = hello(Role::Both);
        change(&mut hello);
        wrong.push((why, hello));
    };
    with("not spoken here", &|h| {
        (h.version_min, h.version_max) = (7, 9)
    });
    with("send 16", &|h| h.instance = vec![1; 15].into());
    with("unknown role", &|h| h.role = 77);
    with("unknown role", &|h| h.role = 0);
    with("a label of", &|h| h.label = "x".repeat(300));
    with("file descriptors", &|h| h.has_pidfd = true);
    with("file descriptors", &|h| {
        h.offer = Some(ArenaOffer::default())
    });
    for (why, hello) in wrong {
        let mut raw = Raw::connect(&daemon.socket);
        raw.say(request::Body::Hello(hello));
        ends(&mut raw, why);
    }
    assert!(daemon.tenant().sessions.is_empty());
}

#[test]
fn descriptors_that_nobody_asked_for_end_the_session() {
    let daemon = Daemon::start(&[]);
    let mut raw = Raw::hello(&daemon.socket, Role::Both);
    raw.send_with(&framed(9, request::Body::Ping(Ping {})), &[file()]);
    ends(&mut raw, "not asked for");

    let mut raw = Raw::hello(&daemon.socket, Role::Both);
    raw.send_with(
        &framed(9, request::Body::Ping(Ping {})),
        &(0..10).map(|_| file()).collect::<Vec<_>>(),
    );
    ends(&mut raw, "file descriptors");

    // A file that is called a pidfd, and files that are called an arena.
    let mut raw = Raw::connect(&daemon.socket);
    let hello_with_pidfd = Hello {
        has_pidfd: true,
        ..hello(Role::Both)
    };
    raw.send_with(
        &framed(1, request::Body::Hello(hello_with_pidfd)),
        &[file()],
    );
    ends(&mut raw, "is none");

    let shape = ArenaShape {
        bytes: 64 << 20,
        extent_bytes: 2 << 20,
        page_bytes: 4096,
        id: vec![1; 16].into(),
        slots_per_extent: 512,
    };
    let offer = Hello {
        offer: Some(ArenaOffer { shape: Some(shape) }),
        ..hello(Role::Both)
    };
    let mut raw = Raw::connect(&daemon.socket);
    raw.send_with(&framed(1, request::Body::Hello(offer)), &[file(), file()]);
    match raw.hear() {
        Some((1, reply::Body::Hello(reply))) => assert!(!reply.offer_adopted),
        other => panic!("a bad offer is only not taken: {other:?}"),
    }
    alive(&mut raw);
    let open = || {
        std::fs::read_dir(format!("/proc/{}/fd", daemon.pid()))
            .expect("it lives")
            .count()
    };
    let before = open();
    drop(raw);
    eventually("their descriptors are closed", || open() < before);
}

#[test]
fn a_million_hashes_do_not_take_a_million_hashes_of_memory() {
    let daemon = Daemon::start(&[]);
    let mut raw = Raw::hello(&daemon.socket, Role::Both);
    // Over the limit on hashes, within the limit on frames: refused.
    refused(
        &mut raw,
        hashes(70_000),
        ErrorKind::Invalid,
        "at most 65536",
    );
    // 32 MB: over the limit on frames. The daemon hangs up while it is being sent.
    let frame = framed(1, hashes(1_000_000));
    raw.send(&frame);
    ends(&mut raw, "over the limit");

    // As many connections as there may be, each with a frame that never ends.
    let big = [(4u32 << 20).to_le_bytes().as_slice(), &[0; 300_000]].concat();
    let mut slow: Vec<_> = (0..100).map(|_| Raw::connect(&daemon.socket)).collect();
    for raw in &mut slow {
        raw.send(&big);
    }
    assert!(daemon.rss_mb() < MEMORY_MB, "{} MB", daemon.rss_mb());

    // One byte each that would be a hundred when decoded.
    let mut raw = Raw::hello(&daemon.socket, Role::Both);
    let lookup = Lookup {
        chains: vec![Chain::default(); 1_000_000],
        ..Lookup::default()
    };
    raw.say(request::Body::Lookup(lookup));
    ends(&mut raw, "more than");
    assert!(daemon.rss_mb() < MEMORY_MB, "{} MB", daemon.rss_mb());
}

#[test]
fn who_never_reads_is_not_answered_for_ever() {
    let daemon = Daemon::start(&[]);
    let mut deaf = Raw::hello(&daemon.socket, Role::Both);
    deaf.stream.set_nonblocking(true).expect("set");
    let status = framed(1, request::Body::Status(kvd_wire::session::Status {}));
    let mut sent = 0;
    // While a status is being made, further ones are refused in a few bytes each.
    while sent < 1_000_000 && deaf.send(&status) {
        sent += 1;
    }
    assert!(sent < 1_000_000, "the daemon stops reading");
    assert!(daemon.rss_mb() < MEMORY_MB, "{} MB", daemon.rss_mb());
    assert_eq!(daemon.get("/healthz").0, 200);
}

#[test]
fn messages_of_a_later_version_are_refused_and_the_session_goes_on() {
    let daemon = Daemon::start(&[]);
    let mut raw = Raw::hello(&daemon.socket, Role::Both);
    // Field 99, one byte long.
    let body = [0x9a, 0x06, 0x01, 0x00];
    let mut bytes = (4 + body.len() as u32).to_le_bytes().to_vec();
    bytes.extend_from_slice(&5u32.to_le_bytes());
    bytes.extend_from_slice(&body);
    raw.send(&bytes);
    let (id, reply) = raw.hear().expect("an answer");
    assert_eq!(id, 5);
    assert_eq!(failure(Some(reply)).kind, i32::from(ErrorKind::Unsupported));
    alive(&mut raw);
    // A field that this version does not know, in a message that it knows, is passed over.
    let mut known = Vec::new();
    frame::encode(
        6,
        &kvd_wire::request(request::Body::Ping(Ping {})),
        &mut known,
    );
    assert_eq!(known[8..], [0x5a, 0x00]);
    known[9] = 4;
    known.extend_from_slice(&body);
    known[0] += 4;
    raw.send(&known);
    assert!(matches!(raw.hear(), Some((6, reply::Body::Pong(_)))));
}

#[test]
fn requests_that_make_no_sense_are_refused_and_the_session_goes_on() {
    let daemon = Daemon::start(&[]);
    let mut raw = Raw::hello(&daemon.socket, Role::Both);
    let half = Chain {
        hashes: vec![0; 33].into(),
        ..Chain::default()
    };
    let of = |namespace, chain: Chain| {
        request::Body::Lookup(Lookup {
            namespace,
            chains: vec![chain],
            ..Lookup::default()
        })
    };
    refused(
        &mut raw,
        of(0, half),
        ErrorKind::Invalid,
        "32 bytes for each",
    );
    refused(
        &mut raw,
        request::Body::Reserve(Reserve::default()),
        ErrorKind::Invalid,
        "without a chain",
    );
    for garbage in [&b""[..], b"kvd-ns-1\0", &[0xff; 4000]] {
        let register = Register {
            record: garbage.to_vec().into(),
            groups: vec![layout()],
        };
        let failure = failure(raw.ask(request::Body::Register(register)));
        assert_eq!(failure.kind, i32::from(ErrorKind::Invalid), "{failure:?}");
    }
    // A namespace that this session has not registered, whoever else has.
    let mut other = Raw::hello(&daemon.socket, Role::Both);
    let theirs = other.register();
    let chain = Chain {
        hashes: hash(1, 1).to_vec().into(),
        ..Chain::default()
    };
    for namespace in [theirs, 1234] {
        let failure = failure(raw.ask(of(namespace, chain.clone())));
        assert!(!failure.ends_session, "{failure:?}");
    }
    alive(&mut raw);
    alive(&mut other);
}

#[test]
fn another_tenants_namespace_is_out_of_reach() {
    let directory = Arc::new(tempfile::tempdir().expect("a directory"));
    let file = directory.path().join("kvd.toml");
    std::fs::write(&file, "[tenants.a]\nhost_capacity = \"16MiB\"\n").expect("written");
    let daemon = Daemon::start_in(
        directory.clone(),
        &["--config", file.to_str().expect("text")],
    );

    // Something of the default tenant's.
    let mut session =
        Session::connect(&daemon.socket, &Identity::script("default"), PATIENCE).expect("connects");
    let ours = session
        .register(&record(&[]), &[layout()])
        .expect("registers")
        .namespace;
    store_something(&mut session, ours);

    let mut raw = Raw::hello(&directory.path().join("a/kvd.sock"), Role::Both);
    let register = |record: Vec<u8>| {
        request::Body::Register(Register {
            record: record.into(),
            groups: vec![layout()],
        })
    };
    refused(
        &mut raw,
        register(record(&[])),
        ErrorKind::Invalid,
        "tenant",
    );
    // The same record but for the tenant is another namespace.
    let Some(reply::Body::Register(registered)) = raw.ask(register(record(&[("tenant", "a")])))
    else {
        panic!("one's own is registered");
    };
    let chain = Chain {
        hashes: hash(1, 1).to_vec().into(),
        ..Chain::default()
    };
    let lookup = Lookup {
        namespace: registered.namespace,
        chains: vec![chain],
        ..Lookup::default()
    };
    match raw.ask(request::Body::Lookup(lookup)) {
        Some(reply::Body::Lookup(found)) => assert!(found.chains[0].length.is_empty(), "{found:?}"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn one_tenants_memory_can_not_be_carried_to_another() {
    let directory = Arc::new(tempfile::tempdir().expect("a directory"));
    let file = directory.path().join("kvd.toml");
    std::fs::write(&file, "[tenants.a]\nhost_capacity = \"64MiB\"\n").expect("written");
    let flags = ["--config", file.to_str().expect("text")];
    let mut daemon = Daemon::start_in(Arc::clone(&directory), &flags);
    let (ours, theirs) = (daemon.socket.clone(), directory.path().join("a/kvd.sock"));
    let attach = |socket: &Path, tenant: &str| {
        let mut session =
            Session::connect(socket, &Identity::script(tenant), PATIENCE).expect("connects");
        session
            .register(&record(&[("tenant", tenant)]), &[layout()])
            .expect("registers");
        session.arena().expect("the arena came")
    };
    let arenas = [attach(&ours, "default"), attach(&theirs, "a")];
    daemon.kill();
    let _next = Daemon::start_in(Arc::clone(&directory), &flags);
    let offer = |socket: &Path, arena: &ArenaView| {
        let shape = arena.shape();
        let shape = ArenaShape {
            bytes: shape.bytes,
            extent_bytes: shape.extent_bytes,
            page_bytes: shape.page_bytes,
            id: shape.id.to_vec().into(),
            slots_per_extent: shape.slots_per_extent,
        };
        let hello = Hello {
            offer: Some(ArenaOffer { shape: Some(shape) }),
            ..hello(Role::Both)
        };
        let fds =
            [arena.fd(), arena.generation_fd()].map(|fd| fd.try_clone_to_owned().expect("a copy"));
        let mut raw = Raw::connect(socket);
        raw.send_with(&framed(1, request::Body::Hello(hello)), &fds);
        match raw.hear() {
            Some((_, reply::Body::Hello(reply))) => reply.offer_adopted,
            other => panic!("not greeted: {other:?}"),
        }
    };
    assert!(!offer(&ours, &arenas[1]), "another tenant's is not taken");
    assert!(offer(&ours, &arenas[0]), "one's own is");
    assert!(
        offer(&ours, &arenas[0]),
        "and who brings it too is told that it was"
    );
    assert!(!offer(&theirs, &arenas[0]));
}

fn store_something(session: &mut Session, namespace: u32) -> (u32, u64) {
    let one = hash(1, 1);
    let mut given = Vec::new();
    eventually("there is memory", || {
        let chain = ChainRef {
            group: 0,
            hashes: &one,
            parent: None,
        };
        let reply = session.reserve(namespace, chain).expect("reserves");
        given = reply.slots.into_iter().zip(reply.generations).collect();
        !given.is_empty()
    });
    let (slot, generation) = given[0];
    session
        .commit(namespace, 0, &[slot], &[generation], &[0, 0])
        .expect("commits");
    (slot, generation)
}

#[test]
fn slots_of_others_and_of_former_times_are_stale() {
    let daemon = Daemon::start(&[]);
    let mut owner =
        Session::connect(&daemon.socket, &Identity::script("owner"), PATIENCE).expect("connects");
    let namespace = owner
        .register(&record(&[]), &[layout()])
        .expect("registers")
        .namespace;
    let (old_slot, old_generation) = store_something(&mut owner, namespace);
    let two = hash(1, 2);
    let reserved = owner
        .reserve(
            namespace,
            ChainRef {
                group: 0,
                hashes: &two,
                parent: None,
            },
        )
        .expect("reserves");
    let (slot, generation) = (reserved.slots[0], reserved.generations[0]);

    let mut raw = Raw::hello(&daemon.socket, Role::Both);
    let mine = raw.register();
    let commit = |namespace, slot, generation| {
        let (slots, generations) = (vec![slot], vec![generation]);
        request::Body::Commit(Commit {
            namespace,
            group: 0,
            slots,
            generations,
            crcs: vec![0, 0],
        })
    };
    for (what, slot, generation) in [
        ("not its own", slot, generation),
        ("a former time", old_slot, old_generation),
        ("a generation of nobody", slot, generation + 2),
        ("an even generation", slot, generation + 1),
        ("no slot at all", u32::MAX, generation),
    ] {
        match raw.ask(commit(mine, slot, generation)) {
            Some(reply::Body::Commit(c)) => assert_eq!(c.states, [2], "{what} is stale"),
            Some(reply::Body::Failure(f)) => assert!(!f.ends_session, "{what}: {f:?}"),
            other => panic!("{what}: {other:?}"),
        }
        let abort = Abort {
            slots: vec![slot],
            generations: vec![generation],
        };
        match raw.ask(request::Body::Abort(abort)) {
            Some(reply::Body::Abort(a)) => assert_eq!(a.aborted, 0, "{what}"),
            other => panic!("{what}: {other:?}"),
        }
        let release = Release {
            slots: vec![slot],
            generations: vec![generation],
            corrupt: vec![0, 9],
            lease: 99,
        };
        assert!(raw.ask(request::Body::Release(release)).is_some(), "{what}");
    }
    // Lists that don't fit each other.
    let uneven = Commit {
        namespace: mine,
        slots: vec![slot; 3],
        generations: vec![1],
        ..Commit::default()
    };
    assert!(!failure(raw.ask(request::Body::Commit(uneven))).ends_session);
    // The owner's reservation has come through all of this.
    let states = owner
        .commit(namespace, 0, &[slot], &[generation], &[0, 0])
        .expect("commits")
        .states;
    assert_eq!(states, [0], "visible");
    let load = Load {
        namespace: mine,
        group: 0,
        hashes: two.to_vec().into(),
        deadline_ms: 0,
    };
    match raw.ask(request::Body::Load(load)) {
        Some(reply::Body::Load(l)) => assert_eq!(l.states, [0], "ready"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn more_sessions_than_there_may_be_are_told_so() {
    let daemon = Daemon::start(&["--max-sessions", "3"]);
    let held: Vec<_> = (0..3)
        .map(|_| Raw::hello(&daemon.socket, Role::Scheduler))
        .collect();
    let mut fourth = Raw::connect(&daemon.socket);
    fourth.say(request::Body::Hello(hello(Role::Both)));
    ends(&mut fourth, "limit of 3 sessions is reached");
    let status = || {
        let asked = kvd()
            .args(["status", "--socket"])
            .arg(&daemon.socket)
            .output();
        let asked = asked.expect("kvd runs");
        (
            asked.status.success(),
            String::from_utf8_lossy(&asked.stderr).into_owned(),
        )
    };
    assert_eq!(status(), (true, String::new()), "who looks is let in");
    let looking: Vec<_> = (0..16)
        .map(|_| Raw::hello(&daemon.socket, Role::Observer))
        .collect();
    let why = "there are 19 connections already";
    ends(&mut Raw::connect(&daemon.socket), why);
    // Whether the connection is closed before or after it has said something.
    for _ in 0..20 {
        let (answered, said) = status();
        assert!(!answered && said.contains(why), "{said}");
        assert!(!said.contains("is kvd serve running"), "{said}");
    }
    drop(looking);
    eventually("observers are let in again", || status().0);
    drop(held);
    eventually("there is room again", || {
        let mut raw = Raw::connect(&daemon.socket);
        raw.say(request::Body::Hello(hello(Role::Both)));
        matches!(raw.hear(), Some((_, reply::Body::Hello(_))))
    });
}
