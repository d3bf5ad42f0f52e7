//! Parts, copy records, death, detachment, fences, quarantine, adoption: who may write, and until when.

mod common;
use common::*;
use kvd_core::*;

/// A scheduler (session 1) and `world` workers (sessions 10, 11, ...), one part each.
fn engine(world: &mut World, instance: u8, pp: u32, tp: u32) {
    let base = u64::from(instance) * 100;
    let record = record("a", "w", CELL);
    world.open(base + 1, A, instance, Role::Scheduler, 0, pp * tp);
    world.register(base + 1, &record, pp, tp, None);
    for rank in 0..pp * tp {
        let session = base + 10 + u64::from(rank);
        world.open(session, A, instance, Role::Worker, rank, pp * tp);
        let reply = world.register(session, &record, pp, tp, Some(rank));
        assert!(matches!(reply, Reply::Registered { .. }), "{reply:?}");
    }
}

#[test]
fn a_block_is_visible_when_every_part_is_there() {
    let mut world = World::new(Settings::default(), 2);
    engine(&mut world, 0, 2, 2);
    let list = hashes(0..2);
    let got = world.reserve(1, &list, None);
    assert_eq!(got.states, [ReserveState::Reserved; 2]);
    assert!(got.generations.iter().all(|word| word % 2 == 1));
    for (n, session) in (10..14).enumerate() {
        assert_eq!(world.hits(1, &list), 0);
        let crcs: Vec<u64> = (0..4).map(|i| (n as u64) * 10 + i).collect();
        let states = world.commit(session, &got.slots, &got.generations, &crcs);
        let want = if n == 3 {
            CommitState::Visible
        } else {
            CommitState::Waiting
        };
        assert_eq!(states, [want; 2]);
        let again = world.commit(session, &got.slots, &got.generations, &crcs);
        assert_eq!(again, [CommitState::Stale; 2], "a part comes once");
    }
    let loaded = world.load(1, &list);
    assert_eq!(loaded.states, [LoadState::Ready; 2]);
    assert_eq!(loaded.crcs[..8], [0, 1, 10, 11, 20, 21, 30, 31]);
    assert_eq!(loaded.cuts.len(), 1);
    assert_eq!(loaded.cuts[0].parts(), 4);
    assert_eq!(
        loaded.generations,
        [got.generations[0] + 1, got.generations[1] + 1]
    );
}

#[test]
fn nothing_is_reserved_before_every_rank_is_there() {
    let mut world = World::new(Settings::default(), 2);
    let rec = record("a", "w", CELL);
    world.open(1, A, 0, Role::Scheduler, 0, 2);
    world.register(1, &rec, 1, 2, None);
    let list = hashes(0..1);
    let chain = Chain {
        group: 0,
        hashes: &list,
        parent: None,
    };
    let body = Request::Reserve {
        namespace: 0,
        chains: &[chain],
    };
    assert_eq!(
        kind(&world.ask(1, body.clone())),
        Some(ErrorKind::Unavailable)
    );
    world.open(10, A, 0, Role::Worker, 0, 2);
    world.register(10, &rec, 1, 2, Some(0));
    assert_eq!(
        kind(&world.ask(1, body.clone())),
        Some(ErrorKind::Unavailable)
    );
    world.open(11, A, 0, Role::Worker, 1, 2);
    assert_eq!(
        kind(&world.ask(1, body.clone())),
        Some(ErrorKind::Unavailable)
    );
    world.register(11, &rec, 1, 2, Some(1));
    assert!(matches!(world.ask(1, body.clone()), Reply::Reserve(_)));
    world.step(Input::Detached {
        session: SessionId(11),
    });
    assert_eq!(kind(&world.ask(1, body)), Some(ErrorKind::Unavailable));
}

#[test]
fn replicas_take_turns_by_hash() {
    let mut world = World::new(Settings::default(), 2);
    let rec = record("a", "w", CELL);
    for rank in 0..2 {
        world.open(10 + u64::from(rank), A, 0, Role::Both, rank, 2);
        world.register(10 + u64::from(rank), &rec, 1, 1, Some(0));
    }
    let list = hashes(0..8);
    let got = world.reserve(10, &list, None);
    for (at, hash) in list.iter().enumerate() {
        let writer = 10 + replica_of(hash, 2) as u64;
        let (slot, word) = ([got.slots[at]], [got.generations[at]]);
        assert_eq!(
            world.commit(21 - writer, &slot, &word, &[0; 4]),
            [CommitState::Stale]
        );
        assert_eq!(
            world.commit(writer, &slot, &word, &[0; 4]),
            [CommitState::Visible]
        );
    }
}

#[test]
fn a_dead_writer_frees_its_slots_and_hides_its_blocks() {
    let mut world = World::new(Settings::default(), 2);
    engine(&mut world, 0, 1, 2);
    let got = world.reserve(1, &hashes(0..3), None);
    world.commit(10, &got.slots, &got.generations, &[0; 6]);
    world.step(Input::Gone {
        session: SessionId(11),
    });
    assert_eq!(world.status().slots.total(), world.status().slots.free);
    assert_eq!(world.hits(1, &hashes(0..3)), 0);
    assert_eq!(world.core.counters().store_failed.writer_lost, 3);
    assert_eq!(
        world.commit(10, &got.slots, &got.generations, &[0; 6]),
        [CommitState::Stale; 3]
    );
}

#[test]
fn a_late_part_leads_to_quarantine_until_its_writer_ends() {
    let mut world = World::new(Settings::default(), 2);
    engine(&mut world, 0, 1, 2);
    let got = world.reserve(1, &hashes(0..2), None);
    world.commit(10, &got.slots, &got.generations, &[0; 4]);
    world.now += world.core.settings().fill_deadline_us;
    assert_eq!(world.core.next_deadline(), Some(Now(world.now)));
    world.step(Input::Tick);
    assert_eq!(world.status().slots.quarantined, 2);
    assert_eq!(
        world.word(got.slots[0]),
        got.generations[0],
        "the word stays odd"
    );
    let again = world.reserve(1, &hashes(0..2), None);
    assert_eq!(again.states, [ReserveState::Reserved; 2]);
    assert!(
        again.slots.iter().all(|slot| !got.slots.contains(slot)),
        "not while 11 may write"
    );
    let late = world.commit(11, &got.slots[..1], &got.generations[..1], &[0; 2]);
    assert_eq!(late, [CommitState::Stale]);
    assert_eq!(world.status().slots.quarantined, 1);
    assert_eq!(world.abort(11, &got.slots[1..], &got.generations[1..]), 1);
    assert_eq!(world.status().slots.quarantined, 0);
    assert_eq!(world.word(got.slots[1]) % 2, 0);
}

#[test]
fn quarantine_is_capped() {
    let mut world = World::bare(Settings::default());
    let limits = TenantLimits {
        quarantine_bytes: 8192,
        ..TenantLimits::default()
    };
    world.core = Core::new(Settings::default());
    world.step(Input::Tenant {
        tenant: A,
        name: "a",
        limits,
    });
    world.arena(A, 4, None);
    world.script(1, 0);
    world.reserve(1, &hashes(0..3), None);
    world.now += 100_000_000;
    world.step(Input::Tick);
    let got = world.reserve(1, &hashes(10..11), None);
    assert_eq!(
        got.states,
        [ReserveState::NoSpace],
        "three slots are quarantined, two are allowed"
    );
}

#[test]
fn a_detached_session_keeps_its_records_until_fenced() {
    let mut world = World::new(Settings::default(), 2);
    engine(&mut world, 0, 1, 2);
    let got = world.reserve(1, &hashes(0..2), None);
    world.step(Input::Detached {
        session: SessionId(11),
    });
    assert!(world.core.knows(SessionId(11)));
    assert!(world.tables[&A].contains(&SessionId(11)));
    world.open_after(12, A, 0, Role::Worker, 1, 2, Some(11));
    world.register(12, &record("a", "w", CELL), 1, 2, Some(1));
    let stale = world.commit(12, &got.slots, &got.generations, &[0; 4]);
    assert_eq!(
        stale,
        [CommitState::Stale; 2],
        "the new session has no claim to write these"
    );
    assert_eq!(world.status().slots.reserved, 2);
    let wrong = world.ask(
        10,
        Request::Fence {
            past: SessionId(11),
        },
    );
    assert_eq!(
        kind(&wrong),
        Some(ErrorKind::Invalid),
        "only the same process fences"
    );
    assert_eq!(
        world.ask(
            12,
            Request::Fence {
                past: SessionId(11)
            }
        ),
        Reply::Fenced
    );
    assert!(!world.core.knows(SessionId(11)));
    assert_eq!(
        world.status().slots.quarantined,
        2,
        "rank 0 may still write"
    );
    assert_eq!(world.abort(10, &got.slots, &got.generations), 2);
    assert_eq!(world.status().slots.free, world.status().slots.total());
    assert_eq!(
        world.ask(
            12,
            Request::Fence {
                past: SessionId(11)
            }
        ),
        Reply::Fenced,
        "again"
    );
}

#[test]
fn a_fence_covers_all_that_came_before() {
    let mut world = World::new(Settings::default(), 2);
    world.script(1, 0);
    world.reserve(1, &hashes(0..2), None);
    let detach = |world: &mut World, session| {
        world.step(Input::Detached {
            session: SessionId(session),
        });
    };
    detach(&mut world, 1);
    world.open_after(2, A, 0, Role::Both, 0, 1, Some(1));
    detach(&mut world, 2);
    assert!(world.core.knows(SessionId(2)), "the link from 3 to 1");
    world.open_after(3, A, 0, Role::Both, 0, 1, Some(2));
    let body = Request::Fence { past: SessionId(2) };
    assert_eq!(world.ask(3, body), Reply::Fenced);
    assert!(!world.core.knows(SessionId(1)) && !world.core.knows(SessionId(2)));
    assert_eq!(world.status().slots.free, world.status().slots.total());
}

#[test]
fn a_session_without_records_is_forgotten_when_it_detaches() {
    let mut world = World::new(Settings::default(), 2);
    world.script(1, 0);
    let list = hashes(0..2);
    world.store(1, &list);
    world.load(1, &list);
    world.step(Input::Detached {
        session: SessionId(1),
    });
    assert!(world.core.knows(SessionId(1)), "it has read leases");
    world.now += world.core.settings().lease_us;
    world.step(Input::Tick);
    assert!(!world.core.knows(SessionId(1)));
    assert_eq!(world.tables[&A], []);
    world.script(2, 1);
    assert_eq!(world.hits(2, &list), 2, "its blocks stay");
}

#[test]
fn a_process_that_comes_back_first_detaches_its_old_socket() {
    let mut world = World::new(Settings::default(), 2);
    engine(&mut world, 0, 1, 1);
    world.reserve(1, &hashes(0..1), None);
    world.open(20, A, 0, Role::Worker, 0, 1);
    assert_eq!(
        world.ended.pop().map(|(s, f)| (s.0, f.kind)),
        Some((20, ErrorKind::Busy))
    );
    world.open_after(21, A, 0, Role::Worker, 0, 1, Some(10));
    assert_eq!(world.ended.pop().map(|(s, _)| s.0), Some(10));
    assert!(world.core.knows(SessionId(10)) && world.core.knows(SessionId(21)));
    assert_eq!(
        kind(&world.ask(
            10,
            Request::Abort {
                slots: &[],
                generations: &[]
            }
        )),
        Some(ErrorKind::NotFound)
    );
    assert_eq!(
        world.ask(
            21,
            Request::Fence {
                past: SessionId(10)
            }
        ),
        Reply::Fenced
    );
    assert_eq!(world.status().slots.quarantined, 0);
}

#[test]
fn openings_that_make_no_sense_are_refused() {
    let mut world = World::new(
        Settings {
            max_sessions: 3,
            ..Settings::default()
        },
        2,
    );
    world.open(1, A, 0, Role::Worker, 0, 2);
    world.open(1, A, 0, Role::Worker, 1, 2);
    world.open(0, A, 0, Role::Worker, 1, 2);
    world.open(2, TenantId(9), 0, Role::Worker, 1, 2);
    world.open(3, A, 0, Role::Worker, 2, 2);
    world.open(4, A, 0, Role::Worker, 1, 3);
    world.open(5, A, 0, Role::Worker, u32::MAX, u32::MAX);
    world.open(6, A, 0, Role::Worker, 0, 0);
    assert_eq!(world.ended.len(), 7);
    world.open(7, A, 0, Role::Worker, 1, 2);
    world.open(8, B, 0, Role::Worker, 0, 1);
    assert_eq!(world.ended.len(), 7);
    world.open(9, A, 0, Role::Scheduler, 0, 0);
    assert_eq!(world.ended.len(), 8, "too many");
    assert!(
        !world.tables.contains_key(&A),
        "who has not registered may not know its token, and nobody could fence it"
    );
    for (session, rank) in [(1, 0), (7, 1)] {
        world.register(session, &record("a", "w", CELL), 1, 2, Some(rank));
    }
    assert_eq!(world.tables[&A], [SessionId(1), SessionId(7)]);
}

#[test]
fn who_only_looks_is_counted_apart() {
    let mut world = World::new(
        Settings {
            max_sessions: 2,
            ..Settings::default()
        },
        2,
    );
    world.open(1, A, 0, Role::Worker, 0, 1);
    world.open(2, B, 0, Role::Worker, 0, 1);
    let observers = OBSERVERS.into();
    for session in 0..observers {
        world.open(100 + session, A, 0, Role::Observer, 0, 0);
    }
    assert_eq!(world.ended.len(), 0, "let in where nobody else is");
    world.open(99, A, 0, Role::Observer, 0, 0);
    assert_eq!(world.ended.len(), 1, "not without end");
    world.open(98, B, 0, Role::Observer, 0, 0);
    assert_eq!(world.ended.len(), 1, "another tenant has places of its own");
    world.step(Input::Gone {
        session: SessionId(1),
    });
    world.open(3, A, 0, Role::Worker, 0, 1);
    assert_eq!(world.ended.len(), 1, "and in nobody's way");
    world.open(4, A, 0, Role::Scheduler, 0, 0);
    assert_eq!(world.ended.len(), 2);
}

#[test]
fn a_scheduler_aborts_what_it_told_nobody_of() {
    let mut world = World::new(Settings::default(), 2);
    engine(&mut world, 0, 1, 2);
    let got = world.reserve(1, &hashes(0..2), None);
    world.commit(10, &got.slots[..1], &got.generations[..1], &[0; 2]);
    assert_eq!(world.abort(1, &got.slots, &got.generations), 2);
    let slots = world.status().slots;
    assert_eq!(
        (slots.quarantined, slots.reserved, slots.filling),
        (1, 0, 0),
        "one had begun"
    );
    assert_eq!(world.abort(11, &got.slots, &got.generations), 1);
    assert_eq!(world.status().slots.quarantined, 0);
}

#[test]
fn a_scheduler_aborts_what_it_told_nobody_of_also_when_a_rank_has_died() {
    let mut world = World::new(Settings::default(), 2);
    engine(&mut world, 0, 1, 2);
    let got = world.reserve(1, &hashes(0..2), None);
    world.step(Input::Gone {
        session: SessionId(11),
    });
    assert_eq!(world.status().slots.quarantined, 2, "rank 0 may write");
    assert_eq!(world.abort(1, &got.slots, &got.generations), 2);
    assert_eq!(world.status().slots.free, world.status().slots.total());
}

#[test]
fn other_instances_and_tenants_touch_nothing() {
    let mut world = World::new(Settings::default(), 2);
    engine(&mut world, 0, 1, 1);
    engine(&mut world, 1, 1, 1);
    world.open(500, B, 9, Role::Both, 0, 1);
    world.register(500, &record("b", "w", CELL), 1, 1, Some(0));
    let wall = world.register(500, &record("a", "w", CELL), 1, 1, Some(0));
    assert_eq!(kind(&wall), Some(ErrorKind::Invalid));
    let list = hashes(0..2);
    let got = world.reserve(1, &list, None);
    for foreign in [110, 500] {
        let states = world.commit(foreign, &got.slots, &got.generations, &[0; 8]);
        assert_eq!(states, [CommitState::Stale; 2]);
        assert_eq!(world.abort(foreign, &got.slots, &got.generations), 0);
    }
    world.commit(10, &got.slots, &got.generations, &[0; 8]);
    assert_eq!(
        world.hits(101, &list),
        2,
        "another instance of the tenant shares"
    );
    assert_eq!(world.hits(500, &list), 0, "another tenant does not");
    let even = [got.generations[0] + 1, got.generations[1] + 1];
    world.release(110, &got.slots, &even, &[0, 1]);
    assert_eq!(
        world.hits(101, &list),
        2,
        "corruption is reported by who has it leased"
    );
    let other = world.reserve(500, &list, None);
    assert_eq!(other.states, [ReserveState::Reserved; 2]);
}

#[test]
fn the_deadline_does_not_free_what_a_detached_writer_may_write() {
    let mut world = World::new(Settings::default(), 2);
    world.script(1, 0);
    world.reserve(1, &hashes(0..2), None);
    world.step(Input::Detached {
        session: SessionId(1),
    });
    world.now += 10 * world.core.settings().fill_deadline_us;
    world.step(Input::Tick);
    assert_eq!(world.status().slots.quarantined, 2);
    world.step(Input::Gone {
        session: SessionId(1),
    });
    assert_eq!(world.status().slots.quarantined, 0);
    assert!(world.status().sessions.is_empty());
}
