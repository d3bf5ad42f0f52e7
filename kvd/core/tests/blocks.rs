//! Reserving, eviction, size classes, lookups, leases, the change log, limits, and requests that make no sense.

mod common;
use common::*;
use kvd_core::*;

#[test]
fn reserving_twice_says_filling_and_then_present() {
    let mut world = World::new(Settings::default(), 2);
    world.script(1, 0);
    world.script(2, 1);
    let list = [hash(1), hash(1), hash(2), hash(1)];
    use ReserveState::*;
    let got = world.reserve(1, &list, None);
    assert_eq!(got.states, [Reserved, Filling, Reserved, Filling]);
    assert_eq!(world.reserve(2, &list, None).states, [Filling; 4]);
    assert_eq!(world.load(2, &list).states, [LoadState::Absent; 4]);
    world.commit(1, &got.slots[..1], &got.generations[..1], &[0; 4]);
    assert_eq!(
        world.reserve(2, &list, None).states,
        [Present, Present, Filling, Present]
    );
    let seen = world.lookup(2, &list, 0, false).chains.remove(0);
    assert_eq!((seen.start, seen.length), (vec![0, 2, 3], vec![2, 1, 1]));
    assert_eq!(seen.place, [Where::Host, Where::Filling, Where::Host]);
    let leading = world.lookup(2, &[hash(1), hash(9), hash(2)], 0, true);
    assert_eq!(leading.chains[0].length, [1]);
}

#[test]
fn several_chains_are_answered_one_after_the_other_or_not_at_all() {
    let mut world = World::new(Settings::default(), 2);
    world.script(1, 0);
    let list = hashes(0..4);
    let chain = |group, hashes| Chain {
        group,
        hashes,
        parent: None,
    };
    let mut ask = |chains: &[Chain<'_>]| {
        world.ask(
            1,
            Request::Reserve {
                namespace: 0,
                chains,
            },
        )
    };
    let refused = ask(&[chain(0, &list), chain(1, &list)]);
    assert_eq!(kind(&refused), Some(ErrorKind::Invalid));
    assert_eq!(ask(&[]), Reply::Reserve(ReserveReply::default()));
    // Of what was refused nothing was reserved.
    let Reply::Reserve(got) = ask(&[chain(0, &list[..2]), chain(0, &list[1..])]) else {
        panic!("refused");
    };
    use ReserveState::*;
    let states = [Reserved, Reserved, Filling, Reserved, Reserved];
    assert_eq!(got.states, states);
    world.commit(1, &got.slots, &got.generations, &[0; 16]);
    assert_eq!(world.load(1, &list).slots.len(), 4);
}

#[test]
fn the_chains_of_a_request_make_no_room_out_of_each_other() {
    let mut world = World::new(Settings::default(), 1);
    world.script(1, 0);
    let room = world.store(1, &hashes(0..1_000)).slots.len() as u64;
    assert!(room < 900, "the arena is full");
    let (one, other) = (hashes(0..2), hashes(5_000..5_000 + room));
    let parent = one.last().map(|hash| BlockHash(*hash));
    let chains = [(&one, None), (&other, parent)].map(|(hashes, parent)| Chain {
        group: 0,
        hashes,
        parent,
    });
    let Reply::Reserve(got) = world.ask(
        1,
        Request::Reserve {
            namespace: 0,
            chains: &chains,
        },
    ) else {
        panic!("refused");
    };
    use ReserveState::*;
    assert_eq!(got.states[..2], [Present; 2]);
    let given = got.slots.len() as u64;
    assert_eq!(given, room - 2, "all but those two, which are still here");
    assert_eq!(world.hits(1, &one), 2);
    assert_eq!(got.states[given as usize + 2..], [NoSpace; 2]);
}

#[test]
fn tails_go_first_and_the_coldest_chain_before_others() {
    let mut world = World::new(Settings::default(), 1);
    world.script(1, 0);
    world.store(1, &hashes(0..8));
    world.store(1, &hashes(100..108));
    world.lookup(1, &hashes(0..8), 0, true);
    let reply = world.store(1, &hashes(200..205));
    assert!(
        reply
            .states
            .iter()
            .all(|state| *state == ReserveState::Reserved)
    );
    let left = world
        .lookup(1, &hashes(100..108), 0, false)
        .chains
        .remove(0);
    assert_eq!(
        (left.start, left.length),
        (vec![0], vec![3]),
        "its first three remain"
    );
    assert_eq!(world.hits(1, &hashes(0..8)), 8);
    assert_eq!(world.core.counters().evicted, 5);
}

#[test]
fn a_chain_is_not_evicted_to_store_its_own_tail() {
    let mut world = World::new(Settings::default(), 1);
    world.script(1, 0);
    world.store(1, &hashes(0..12));
    let reply = world.reserve(1, &hashes(0..20), None);
    assert_eq!(reply.states[..12], [ReserveState::Present; 12]);
    assert_eq!(reply.states[12..16], [ReserveState::Reserved; 4]);
    assert_eq!(reply.states[16..], [ReserveState::NoSpace; 4]);
    world.abort(1, &reply.slots, &reply.generations);
    let tail = hashes(12..20);
    let reply = world.reserve(1, &tail, Some(hash(11)));
    assert_eq!(
        reply.slots.len(),
        4,
        "nothing can go: the parent is its last block"
    );
    assert_eq!(world.hits(1, &hashes(0..12)), 12);
    assert_eq!(world.core.counters().store_failed.no_space, 8);
}

#[test]
fn an_extent_moves_to_the_class_that_needs_it() {
    let mut world = World::new(Settings::default(), 4);
    world.script(1, 0);
    world.store(1, &hashes(0..60));
    world.open(2, A, 1, Role::Both, 0, 1);
    world.register(2, &record("a", "big", CELL * 4), 1, 1, Some(0));
    let got = world.store(2, &hashes(0..6));
    assert_eq!(got.slots.len(), 6);
    assert_eq!(
        world.core.counters().extents_moved,
        2,
        "four blocks of 16 KiB an extent"
    );
    let views = world.status().classes;
    assert_eq!(
        views
            .iter()
            .map(|v| (v.slot_bytes, v.extents))
            .collect::<Vec<_>>(),
        [(4096, 2), (16384, 2)]
    );
    world.lookup(1, &hashes(0..60), 0, false);
    let hot = world.hits(1, &hashes(0..60));
    world.store(2, &hashes(100..106));
    assert_eq!(
        world.hits(1, &hashes(0..60)),
        hot,
        "now the big blocks are colder"
    );
    world.step(Input::Closed {
        session: SessionId(2),
    });
    world.store(1, &hashes(1000..1100));
    assert!(world.hits(1, &hashes(1000..1100)) > 32);
}

#[test]
fn leased_blocks_stay_until_released_or_expired() {
    let mut world = World::new(Settings::default(), 1);
    world.script(1, 0);
    let list = hashes(0..4);
    world.store(1, &list);
    let got = world.load(1, &list);
    world.load(1, &list[..1]);
    assert_eq!(world.status().pinned_bytes, 4 * 4096);
    assert_eq!(world.reserve(1, &hashes(10..30), None).slots.len(), 12);
    assert_eq!(world.hits(1, &list), 4);
    world.release(1, &got.slots, &got.generations, &[]);
    assert_eq!(
        world.status().pinned_bytes,
        4096,
        "the first was loaded twice"
    );
    world.now += 30_000_000;
    world.step(Input::Tick);
    assert_eq!(world.status().pinned_bytes, 0);
    assert_eq!(world.core.counters().leases_expired, 1);
    let slot = got.slots[3];
    world.reserve(1, &hashes(50..51), None);
    assert!(
        world.word(slot) > got.generations[3],
        "a late reader sees another word"
    );
}

#[test]
fn pins_are_capped_but_loads_go_on() {
    let mut world = World::new(Settings::default(), 1);
    world.script(1, 0);
    let list = hashes(0..16);
    world.store(1, &list);
    assert_eq!(
        world.lookup(1, &list, 1000, true).lease,
        0,
        "more than half of the arena"
    );
    let lease = world.lookup(1, &list[..8], 1000, true).lease;
    assert_ne!(lease, 0);
    let loaded = world.load(1, &list);
    assert_eq!(loaded.states, [LoadState::Ready; 16]);
    assert_eq!(world.status().pinned_bytes, 8 * 4096);
    world.release(1, &loaded.slots, &loaded.generations, &[]);
    assert_eq!(world.status().pinned_bytes, 8 * 4096);
    let body = Request::Release {
        slots: &[],
        generations: &[],
        corrupt: &[],
        lease,
    };
    world.ask(1, body.clone());
    assert_eq!(world.status().pinned_bytes, 0);
    assert_eq!(world.ask(1, body), Reply::Released, "again is no harm");
    world.lookup(1, &list[..8], u32::MAX, true);
    world.now += 60_000_000;
    world.step(Input::Tick);
    assert_eq!(world.status().pinned_bytes, 0);
    assert_eq!(world.core.counters().leases_denied, 1);
}

#[test]
fn every_change_is_in_the_log() {
    let mut world = World::new(
        Settings {
            incarnation: [3; 16],
            ..Settings::default()
        },
        1,
    );
    world.script(1, 0);
    world.store(1, &hashes(0..16));
    world.store(1, &hashes(100..103));
    let log = world.core.changes(A, 0, 1000);
    assert_eq!(
        (log.incarnation, log.lost, log.changes.len()),
        ([3; 16], false, 16 + 3 + 3)
    );
    let mut held = std::collections::BTreeSet::new();
    for change in &log.changes {
        let fresh = match change.kind {
            ChangeKind::Stored => held.insert(change.hash),
            ChangeKind::Removed => held.remove(&change.hash),
        };
        assert!(fresh, "{change:?}");
    }
    assert_eq!(held.len(), 16);
    let here = held
        .iter()
        .filter(|hash| world.hits(1, &[hash.0]) == 1)
        .count();
    assert_eq!(here, 16);
    assert!(world.core.changes(B, 0, 1000).changes.is_empty());
}

#[test]
fn idle_namespaces_are_forgotten_at_the_limit() {
    let mut world = World::bare(Settings::default());
    world.core = Core::new(Settings::default());
    let limits = TenantLimits {
        namespaces: 2,
        ..TenantLimits::default()
    };
    world.step(Input::Tenant {
        tenant: A,
        name: "a",
        limits,
    });
    world.arena(A, 4, None);
    for (n, weights) in ["v", "w", "x"].into_iter().enumerate() {
        let session = n as u64 + 1;
        world.now += 1;
        world.open(session, A, n as u8, Role::Both, 0, 1);
        world.register(session, &record("a", weights, CELL), 1, 1, Some(0));
        world.store(session, &hashes(0..4));
        world.step(Input::Closed {
            session: SessionId(session),
        });
    }
    let weights: Vec<String> = world
        .status()
        .namespaces
        .iter()
        .map(|n| n.record.get("weights").unwrap().into())
        .collect();
    assert_eq!(weights, ["w", "x"]);
    assert_eq!(world.core.counters().evicted_with_namespace, 4);
    assert_eq!(world.status().nearest(0).unwrap().1[0].0, "weights");
    for session in [10, 11, 12] {
        world.open(session, A, session as u8, Role::Both, 0, 1);
    }
    world.register(10, &record("a", "y", CELL), 1, 1, Some(0));
    world.register(11, &record("a", "z", CELL), 1, 1, Some(0));
    let busy = world.register(12, &record("a", "q", CELL), 1, 1, Some(0));
    assert_eq!(kind(&busy), Some(ErrorKind::Busy));
}

#[test]
fn registering_again_and_differently() {
    let mut world = World::new(Settings::default(), 2);
    let rec = record("a", "w", CELL);
    world.open(1, A, 0, Role::Both, 0, 2);
    world.open(2, A, 0, Role::Both, 1, 2);
    let first = world.register(1, &rec, 1, 2, Some(0));
    assert_eq!(world.register(1, &rec, 1, 2, Some(0)), first);
    assert_eq!(
        kind(&world.register(1, &rec, 1, 2, Some(1))),
        Some(ErrorKind::Invalid)
    );
    assert_eq!(
        kind(&world.register(2, &rec, 2, 1, Some(1))),
        Some(ErrorKind::Invalid)
    );
    assert_eq!(
        kind(&world.register(2, &rec, 1, 2, Some(2))),
        Some(ErrorKind::Invalid)
    );
    assert!(matches!(
        world.register(2, &rec, 1, 2, Some(1)),
        Reply::Registered { .. }
    ));
    let big = world.register(2, &record("a", "w", CELL * 32), 1, 1, Some(0));
    assert_eq!(kind(&big), Some(ErrorKind::Unsupported));
    assert!(matches!(big, Reply::Failure(f) if f.text.contains("host.extent_size")));
    assert_eq!(
        kind(&world.register(2, b"nonsense", 1, 1, Some(0))),
        Some(ErrorKind::Invalid)
    );
    world.open(3, A, 1, Role::Scheduler, 0, 0);
    assert_eq!(
        kind(&world.register(3, &rec, 1, 1, Some(0))),
        Some(ErrorKind::Invalid)
    );
    let rest = world.status().namespaces.len();
    assert_eq!(rest, 1, "refusals leave nothing behind");
}

#[test]
fn absurd_requests_get_one_clear_failure() {
    let settings = Settings {
        max_hashes: 8,
        max_chains: 2,
        ..Settings::default()
    };
    let mut world = World::new(settings, 2);
    world.script(1, 0);
    let many = hashes(0..9);
    let long = Chain {
        group: 0,
        hashes: &many,
        parent: None,
    };
    let ok = Chain {
        group: 0,
        hashes: &many[..8],
        parent: None,
    };
    let none = Chain {
        group: u32::MAX,
        hashes: &[],
        parent: None,
    };
    fn lookup<'a>(chains: &'a [Chain<'a>]) -> Request<'a> {
        Request::Lookup {
            namespace: 0,
            chains,
            lease_ms: u32::MAX,
            scope: Scope::Leading,
        }
    }
    let slots = [u32::MAX; 9];
    let chains: [&[Chain<'_>]; 4] = [&[long], &[ok, ok], &[none], &[ok, ok, ok]];
    for chains in chains {
        assert!(matches!(world.ask(1, lookup(chains)), Reply::Failure(_)));
    }
    let bad = [
        Request::Lookup {
            namespace: 7,
            chains: &[],
            lease_ms: 0,
            scope: Scope::All,
        },
        Request::Reserve {
            namespace: u32::MAX,
            chains: &[ok],
        },
        Request::Reserve {
            namespace: 0,
            chains: &[long],
        },
        Request::Reserve {
            namespace: 0,
            chains: &[none],
        },
        Request::Reserve {
            namespace: 0,
            chains: &[ok, ok],
        },
        Request::Load {
            namespace: 0,
            group: 1,
            hashes: &[],
            deadline_ms: 0,
        },
        Request::Load {
            namespace: 0,
            group: 0,
            hashes: &many,
            deadline_ms: u32::MAX,
        },
        Request::Commit {
            namespace: 0,
            group: 0,
            slots: &[1],
            generations: &[],
            crcs: &[],
        },
        Request::Commit {
            namespace: 0,
            group: 0,
            slots: &[1],
            generations: &[1],
            crcs: &[0; 3],
        },
        Request::Commit {
            namespace: 0,
            group: 9,
            slots: &[],
            generations: &[],
            crcs: &[],
        },
        Request::Abort {
            slots: &slots,
            generations: &[0; 9],
        },
        Request::Release {
            slots: &[0],
            generations: &[0],
            corrupt: &[1],
            lease: 0,
        },
        Request::Release {
            slots: &[],
            generations: &[],
            corrupt: &slots,
            lease: 0,
        },
        Request::Fence { past: SessionId(1) }, // itself
    ];
    for body in bad {
        let reply = world.ask(1, body.clone());
        assert!(matches!(reply, Reply::Failure(_)), "{body:?}: {reply:?}");
    }
    let extremes = [0, 1, u64::MAX, u64::MAX - 1];
    let wild = [0, 1, u32::MAX, u32::MAX - 1];
    assert_eq!(world.abort(1, &wild, &extremes), 0);
    assert_eq!(
        world.commit(1, &wild, &extremes, &[9; 16]),
        [CommitState::Stale; 4]
    );
    world.release(1, &wild, &extremes, &[0, 0, 3]);
    let got = world.reserve(1, &many[..2], None);
    let twice = [got.slots[0], got.slots[0]];
    let words = [got.generations[0], got.generations[0]];
    let states = world.commit(1, &twice, &words, &[0; 8]);
    assert_eq!(states, [CommitState::Visible, CommitState::Stale]);
    let (slots, words) = ([got.slots[1]; 2], [got.generations[1]; 2]);
    assert_eq!(world.abort(1, &slots, &words), 1);
    assert_eq!(
        kind(&world.ask(
            99,
            Request::Abort {
                slots: &[],
                generations: &[]
            }
        )),
        Some(ErrorKind::NotFound)
    );
    world.open(5, A, 7, Role::Observer, 0, 0);
    let observer = world.register(5, &record("a", "w", CELL), 1, 1, None);
    assert_eq!(kind(&observer), Some(ErrorKind::Invalid));
}

#[test]
fn limits_of_claims_and_leases_hold() {
    let settings = Settings {
        max_claims: 3,
        max_read_leases: 2,
        ..Settings::default()
    };
    let mut world = World::new(settings, 2);
    world.script(1, 0);
    let list = hashes(0..5);
    let got = world.reserve(1, &list, None);
    assert_eq!(got.slots.len(), 3);
    world.commit(1, &got.slots, &got.generations, &[0; 12]);
    let loaded = world.load(1, &list);
    use LoadState::*;
    assert_eq!(loaded.states, [Ready, Ready, Failed, Absent, Absent]);
    assert_eq!(world.core.counters().load_failed.busy, 1);
    assert_eq!(world.core.counters().load_absent, 2);
}

#[test]
fn time_that_goes_back_is_ignored() {
    let mut world = World::new(Settings::default(), 1);
    world.script(1, 0);
    world.now = 1000;
    world.reserve(1, &hashes(0..1), None);
    world.now = 0;
    world.reserve(1, &hashes(1..2), None);
    assert_eq!(world.core.next_deadline(), Some(Now(1000 + 60_000_000)));
    world.now = u64::MAX;
    world.step(Input::Tick);
    assert_eq!(world.status().slots.quarantined, 2);
    world.reserve(1, &hashes(5..6), None);
}
