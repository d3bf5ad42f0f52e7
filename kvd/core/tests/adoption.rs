//! A restarted daemon takes over a former one's arena, and extents go bad and come back.

mod common;
use common::*;
use kvd_core::*;

#[test]
fn odd_words_keep_their_extents_out_until_every_writer_fenced() {
    let mut world = World::bare(Settings::default());
    let mut words = vec![0u64; 40];
    (words[0], words[3], words[20]) = (6, 9, 4);
    world.arena(
        A,
        3,
        Some(Adopted {
            words: &words,
            writers: &[0, 71, 72, 0],
        }),
    );
    assert_eq!((world.word(0), world.word(3), world.word(20)), (8, 11, 6));
    let status = world.status();
    assert_eq!((status.extents.held_out, status.extents.free), (1, 2));
    assert_eq!(status.unfenced_writers, 2);
    assert_eq!(
        world.tables[&A],
        [SessionId(71), SessionId(72)],
        "for a further successor"
    );
    assert!(world.core.arena_in_use(A), "a second offer is not taken");
    let rec = record("a", "w", CELL);
    for (session, past, rank) in [(1, 71, 0), (2, 72, 1)] {
        world.open_after(session, A, 0, Role::Both, rank, 2, Some(past));
        world.register(session, &rec, 1, 2, Some(rank));
    }
    let list = hashes(0..40);
    let got = world.reserve(1, &list, None);
    assert_eq!(got.slots.len(), 32);
    assert!(
        got.slots.iter().all(|slot| *slot >= 16),
        "nothing of extent 0"
    );
    assert_eq!(
        world.ask(
            1,
            Request::Fence {
                past: SessionId(71)
            }
        ),
        Reply::Fenced
    );
    assert_eq!(world.status().extents.held_out, 1);
    assert_eq!(
        kind(&world.ask(2, Request::Fence { past: SessionId(1) })),
        Some(ErrorKind::Invalid),
        "a session of this daemon, and of another process"
    );
    assert_eq!(
        world.ask(
            2,
            Request::Fence {
                past: SessionId(72)
            }
        ),
        Reply::Fenced
    );
    assert_eq!((world.status().extents.held_out, world.word(3)), (0, 12));
    assert_eq!(world.tables[&A], [SessionId(1), SessionId(2)]);
    let more = world.reserve(1, &list[32..], None);
    assert_eq!(more.slots.len(), 8);
    assert_eq!(more.generations[0], 9, "words go on above the old ones");
}

#[test]
fn a_former_writer_that_comes_back_and_dies_needs_no_fence() {
    let mut world = World::bare(Settings::default());
    world.arena(
        A,
        2,
        Some(Adopted {
            words: &[5],
            writers: &[71],
        }),
    );
    world.open_after(1, A, 0, Role::Both, 0, 1, Some(71));
    assert_eq!(world.status().extents.held_out, 1);
    world.step(Input::Gone {
        session: SessionId(1),
    });
    assert_eq!(world.status().extents.held_out, 0);
    assert_eq!((world.word(0), world.status().unfenced_writers), (8, 0));
}

#[test]
fn sessions_before_the_last_are_fenced_one_by_one() {
    let mut world = World::bare(Settings::default());
    world.arena(
        A,
        2,
        Some(Adopted {
            words: &[5],
            writers: &[70, 71],
        }),
    );
    world.open_after(1, A, 0, Role::Both, 0, 1, Some(71));
    for (past, held_out) in [(71, 1), (70, 0)] {
        let past = SessionId(past);
        assert_eq!(world.ask(1, Request::Fence { past }), Reply::Fenced);
        assert_eq!(world.status().extents.held_out, held_out);
    }
}

#[test]
fn what_was_fenced_before_the_arena_came_holds_nothing_out() {
    let mut world = World::bare(Settings::default());
    let former = |world: &mut World| {
        let (words, writers) = (&[5], &[70, 71]);
        world.arena(A, 2, Some(Adopted { words, writers }));
        (
            world.status().extents.held_out,
            world.status().unfenced_writers,
        )
    };
    world.open_after(1, A, 0, Role::Both, 0, 1, Some(71));
    let past = SessionId(71);
    assert_eq!(world.ask(1, Request::Fence { past }), Reply::Fenced);
    assert_eq!(former(&mut world), (1, 1), "70 may still write");
    world.open_after(2, A, 1, Role::Both, 0, 1, Some(70));
    world.step(Input::Gone {
        session: SessionId(2),
    });
    assert_eq!((world.status().extents.held_out, world.word(0)), (0, 8));

    let mut world = World::bare(Settings::default());
    for (session, past) in [(1, 70), (2, 71)] {
        world.open_after(session, A, 0, Role::Both, 0, 1, Some(past));
        world.step(Input::Gone {
            session: SessionId(session),
        });
    }
    assert_eq!(former(&mut world), (0, 0));
    assert_eq!(world.word(0) % 2, 0);
}

#[test]
fn an_arena_is_replaced_only_while_unused() {
    let mut world = World::bare(Settings::default());
    world.arena(A, 2, None);
    world.arena(
        A,
        3,
        Some(Adopted {
            words: &[2, 4],
            writers: &[5],
        }),
    );
    assert_eq!(world.status().arena.unwrap().bytes, 3 * EXTENT);
    assert_eq!(
        world.status().extents.held_out,
        0,
        "even words hold nothing"
    );
    assert_eq!(world.status().unfenced_writers, 0);
    world.script(1, 0);
    world.arena(A, 4, None);
    assert_eq!(world.status().arena.unwrap().bytes, 3 * EXTENT);
    let refused = world
        .seen
        .iter()
        .filter(|o| matches!(o, Output::ArenaRefused { .. }))
        .count();
    assert_eq!(refused, 1);
}

#[test]
fn forged_or_impossible_arenas_are_refused() {
    let mut world = World::bare(Settings::default());
    let tokens: Vec<u64> = (1..300).collect();
    for (words, writers) in [
        (vec![u64::MAX], vec![]),
        (vec![0; 100], vec![]),
        (vec![1], tokens),
    ] {
        world.arena(
            A,
            1,
            Some(Adopted {
                words: &words,
                writers: &writers,
            }),
        );
        assert!(world.status().arena.is_none());
    }
    let bad = ArenaShape {
        slots_per_extent: 7,
        ..shape(1)
    };
    world.step(Input::Arena {
        tenant: A,
        shape: bad,
        adopted: None,
    });
    world.step(Input::Arena {
        tenant: TenantId(77),
        shape: shape(1),
        adopted: None,
    });
    assert!(world.status().arena.is_none());
    world.open(1, A, 0, Role::Both, 0, 1);
    let reply = world.register(1, &record("a", "w", CELL), 1, 1, Some(0));
    assert_eq!(kind(&reply), Some(ErrorKind::Unavailable), "no arena yet");
}

#[test]
fn only_populated_extents_are_handed_out() {
    let mut world = World::bare(Settings::default());
    world.step(Input::Arena {
        tenant: A,
        shape: shape(3),
        adopted: None,
    });
    world.script(1, 0);
    let list = hashes(0..40);
    assert_eq!(
        world.reserve(1, &list[..1], None).states,
        [ReserveState::NoSpace]
    );
    world.step(Input::ExtentFailed {
        tenant: A,
        extent: 0,
    });
    world.step(Input::ExtentReady {
        tenant: A,
        extent: 2,
    });
    world.step(Input::ExtentReady {
        tenant: A,
        extent: 0,
    });
    world.step(Input::ExtentReady {
        tenant: A,
        extent: u32::MAX,
    });
    let got = world.reserve(1, &list, None);
    assert_eq!(got.slots.len(), 16);
    assert!(
        got.offsets
            .iter()
            .all(|at| (2 * EXTENT..3 * EXTENT).contains(at))
    );
    let extents = world.status().extents;
    assert_eq!(
        (extents.pending, extents.failed, extents.classed),
        (1, 1, 1)
    );
}

#[test]
fn a_streak_of_corrupt_blocks_refills_the_extent() {
    let mut world = World::new(
        Settings {
            lease_fraction: 1.0,
            ..Settings::default()
        },
        2,
    );
    world.script(1, 0);
    let list = hashes(0..10);
    world.store(1, &list);
    let open = world.reserve(1, &hashes(50..51), None);
    let got = world.load(1, &list);
    world.release(1, &got.slots[..2], &got.generations[..2], &[0, 1]);
    assert_eq!(world.hits(1, &list), 8);
    assert!(world.refills.is_empty());
    world.release(1, &got.slots[2..4], &got.generations[2..4], &[1]);
    assert_eq!(
        world.hits(1, &list),
        7,
        "a sound one in between ends the streak"
    );
    world.release(1, &got.slots[4..7], &got.generations[4..7], &[0, 1]);
    assert_eq!(world.hits(1, &list), 0, "all of the extent is dropped");
    assert_eq!(world.status().extents.refilling, 1);
    assert!(world.refills.is_empty(), "someone is writing there");
    let late = world.commit(1, &open.slots, &open.generations, &[0; 4]);
    assert_eq!(late, [CommitState::Stale]);
    assert_eq!(world.refills, [0]);
    assert_eq!(world.status().extents.pending, 1);
    world.step(Input::ExtentReady {
        tenant: A,
        extent: 0,
    });
    assert_eq!(
        world.store(1, &hashes(0..32)).slots.len(),
        32,
        "the extent is of use again"
    );
    assert_eq!(world.core.counters().load_failed.crc, 5);
}
