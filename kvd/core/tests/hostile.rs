//! Requests and sessions of any shape, extremes included: one reply each, never a panic, and `Core::check` holds after each.

mod common;
use common::*;
use kvd_core::*;
use proptest::prelude::*;

#[derive(Clone, Debug)]
enum Wild {
    Open {
        session: u64,
        tenant: u16,
        instance: u8,
        role: u8,
        rank: u32,
        world: u32,
        past: u64,
    },
    End {
        session: u64,
        how: u8,
    },
    Register {
        session: u64,
        weights: bool,
        layers: Vec<u32>,
        heads: Vec<u32>,
        part: u32,
        group: u32,
    },
    Garbage {
        session: u64,
        bytes: Vec<u8>,
    },
    Lookup {
        session: u64,
        namespace: u32,
        group: u32,
        list: Vec<u8>,
        lease_ms: u32,
        scope: u8,
    },
    Reserve {
        session: u64,
        namespace: u32,
        group: u32,
        list: Vec<u8>,
        parent: Option<u8>,
    },
    Load {
        session: u64,
        namespace: u32,
        list: Vec<u8>,
    },
    Commit {
        session: u64,
        namespace: u32,
        group: u32,
        pairs: Vec<(u32, u64)>,
        crcs: usize,
    },
    Abort {
        session: u64,
        pairs: Vec<(u32, u64)>,
        uneven: bool,
    },
    Release {
        session: u64,
        pairs: Vec<(u32, u64)>,
        corrupt: Vec<u32>,
        lease: u64,
    },
    Fence {
        session: u64,
        past: u64,
    },
    Extent {
        tenant: u16,
        extent: u32,
        failed: bool,
    },
    Wait {
        micros: u64,
    },
}

/// Mostly small, at times extreme.
fn number() -> impl Strategy<Value = u32> {
    prop_oneof![6 => 0u32..4, 2 => 0u32..40, 1 => Just(u32::MAX), 1 => any::<u32>()]
}

fn long() -> impl Strategy<Value = u64> {
    prop_oneof![8 => 0u64..6, 1 => Just(u64::MAX), 1 => any::<u64>()]
}

fn wild() -> impl Strategy<Value = Wild> {
    let session = || prop_oneof![20 => 1u64..6, 1 => Just(0u64), 1 => Just(u64::MAX)];
    let namespace = || prop_oneof![10 => Just(0u32), 1 => number()];
    let list = || prop::collection::vec(0u8..40, 0..20);
    let bounds = || {
        let good = prop_oneof![Just(vec![0, 4]), Just(vec![0, 2, 4])];
        prop_oneof![20 => good, 1 => prop::collection::vec(number(), 0..5)]
    };
    let pairs = || prop::collection::vec((0u32..6, 0u64..6), 0..40);
    let tenant = || prop_oneof![9 => 0u16..2, 1 => any::<u16>()];
    let sessions = prop_oneof![
        8 => (session(), tenant(), 0u8..2, 0u8..5, number(), number(), session()).prop_map(
            |(session, tenant, instance, role, rank, world, past)| Wild::Open {
                session, tenant, instance, role, rank, world, past,
            }
        ),
        1 => (session(), 0u8..3).prop_map(|(session, how)| Wild::End { session, how }),
        8 => (session(), any::<bool>(), bounds(), bounds(), number(), namespace()).prop_map(
            |(session, weights, layers, heads, part, group)| Wild::Register {
                session, weights, layers, heads, part, group,
            }
        ),
        1 => (session(), prop::collection::vec(any::<u8>(), 0..60))
            .prop_map(|(session, bytes)| Wild::Garbage { session, bytes }),
        2 => (session(), session()).prop_map(|(session, past)| Wild::Fence { session, past }),
        1 => (tenant(), number(), any::<bool>())
            .prop_map(|(tenant, extent, failed)| Wild::Extent { tenant, extent, failed }),
        1 => long().prop_map(|micros| Wild::Wait { micros: micros.wrapping_mul(7_000_000) }),
    ];
    let blocks = prop_oneof![
        4 => (session(), namespace(), namespace(), list(), number(), 0u8..3).prop_map(
            |(session, namespace, group, list, lease_ms, scope)| Wild::Lookup {
                session, namespace, group, list, lease_ms, scope,
            }
        ),
        8 => (session(), namespace(), namespace(), list(), prop::option::of(0u8..40)).prop_map(
            |(session, namespace, group, list, parent)| Wild::Reserve {
                session, namespace, group, list, parent,
            }
        ),
        4 => (session(), namespace(), list())
            .prop_map(|(session, namespace, list)| Wild::Load { session, namespace, list }),
        8 => (session(), namespace(), namespace(), pairs(), 0usize..6).prop_map(
            |(session, namespace, group, pairs, crcs)| Wild::Commit {
                session, namespace, group, pairs, crcs,
            }
        ),
        3 => (session(), pairs(), any::<bool>())
            .prop_map(|(session, pairs, uneven)| Wild::Abort { session, pairs, uneven }),
        4 => (session(), pairs(), prop::collection::vec(number(), 0..4), long()).prop_map(
            |(session, pairs, corrupt, lease)| Wild::Release { session, pairs, corrupt, lease }
        ),
    ];
    prop_oneof![1 => sessions, 4 => blocks]
}

fn open(world: &mut World, wild: &Wild) {
    let Wild::Open {
        session,
        tenant,
        instance,
        role,
        rank,
        world: ranks,
        past,
    } = *wild
    else {
        return;
    };
    let role = [
        Role::Scheduler,
        Role::Worker,
        Role::Both,
        Role::Both,
        Role::Observer,
    ][usize::from(role)];
    // Mostly what makes sense, or nothing would ever get further.
    let (rank, ranks) = if rank < 4 {
        (rank % 2, 1 + u32::from(instance))
    } else {
        (rank, ranks)
    };
    let past = (past != session).then_some(past);
    world.open_after(session, TenantId(tenant), instance, role, rank, ranks, past);
}

fn ask(world: &mut World, wild: &Wild) {
    let list = |list: &[u8]| list.iter().map(|n| hash(u64::from(*n))).collect::<Vec<_>>();
    let split = |pairs: &[(u32, u64)]| pairs.iter().copied().unzip::<u32, u64, Vec<_>, Vec<_>>();
    match wild {
        Wild::Register {
            session,
            weights,
            layers,
            heads,
            part,
            group,
        } => {
            let weights = if *weights { "w" } else { "v" };
            let record = record("a", weights, if weights == "w" { CELL } else { CELL * 2 });
            let (layer_bounds, head_bounds) = (&layers[..], &heads[..]);
            let copies = *part != 3;
            let layout = GroupLayout {
                group: *group,
                layer_bounds,
                head_bounds,
                copies,
                part: *part,
            };
            world.ask(
                *session,
                Request::Register {
                    record: &record,
                    groups: &[layout],
                },
            );
        }
        Wild::Garbage { session, bytes } => {
            world.ask(
                *session,
                Request::Register {
                    record: bytes,
                    groups: &[],
                },
            );
        }
        Wild::Lookup {
            session,
            namespace,
            group,
            list: l,
            lease_ms,
            scope,
        } => {
            let hashes = list(l);
            let chains = [Chain {
                group: *group,
                hashes: &hashes,
                parent: None,
            }; 2];
            let (namespace, lease_ms) = (*namespace, *lease_ms);
            let scope = match scope % 4 {
                0 => Scope::All,
                1 => Scope::Leading,
                other => Scope::Hit {
                    drop_last: other == 3,
                },
            };
            world.ask(
                *session,
                Request::Lookup {
                    namespace,
                    chains: &chains,
                    lease_ms,
                    scope,
                },
            );
        }
        Wild::Reserve {
            session,
            namespace,
            group,
            list: l,
            parent,
        } => {
            let hashes = list(l);
            let parent = parent.map(|n| BlockHash(hash(u64::from(n))));
            let chain = Chain {
                group: *group,
                hashes: &hashes,
                parent,
            };
            world.ask(
                *session,
                Request::Reserve {
                    namespace: *namespace,
                    chains: &[chain],
                },
            );
        }
        Wild::Load {
            session,
            namespace,
            list: l,
        } => {
            let hashes = &list(l)[..];
            let body = Request::Load {
                namespace: *namespace,
                group: 0,
                hashes,
                deadline_ms: 9,
            };
            world.ask(*session, body);
        }
        Wild::Commit {
            session,
            namespace,
            group,
            pairs,
            crcs,
        } => {
            let (slots, generations) = &split(pairs);
            let crcs = &vec![1; slots.len() * crcs];
            let (namespace, group) = (*namespace, *group);
            let body = Request::Commit {
                namespace,
                group,
                slots,
                generations,
                crcs,
            };
            world.ask(*session, body);
        }
        Wild::Abort {
            session,
            pairs,
            uneven,
        } => {
            let (slots, mut generations) = split(pairs);
            if *uneven {
                generations.pop();
            }
            world.ask(
                *session,
                Request::Abort {
                    slots: &slots,
                    generations: &generations,
                },
            );
        }
        Wild::Release {
            session,
            pairs,
            corrupt,
            lease,
        } => {
            let (slots, generations) = &split(pairs);
            let body = Request::Release {
                slots,
                generations,
                corrupt,
                lease: *lease,
            };
            world.ask(*session, body);
        }
        Wild::Fence { session, past } => {
            world.ask(
                *session,
                Request::Fence {
                    past: SessionId(*past),
                },
            );
        }
        Wild::Open { .. } | Wild::End { .. } | Wild::Extent { .. } | Wild::Wait { .. } => {}
    }
}

fn apply(world: &mut World, wild: &Wild) {
    match *wild {
        Wild::Open { .. } => open(world, wild),
        Wild::End { session, how } => {
            let session = SessionId(session);
            world.step(match how {
                0 => Input::Detached { session },
                1 => Input::Gone { session },
                _ => Input::Closed { session },
            });
        }
        Wild::Extent {
            tenant,
            extent,
            failed,
        } => {
            let tenant = TenantId(tenant);
            world.step(match failed {
                true => Input::ExtentFailed { tenant, extent },
                false => Input::ExtentReady { tenant, extent },
            });
        }
        Wild::Wait { micros } => {
            world.now = world.now.wrapping_add(micros);
            world.step(Input::Tick);
        }
        _ => ask(world, wild),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn nothing_that_is_sent_makes_core_panic(steps in prop::collection::vec(wild(), 1..200)) {
        let settings = Settings { max_hashes: 30, max_sessions: 6, max_claims: 20, ..Settings::default() };
        let mut world = World::new(settings, 3);
        world.script(1, 0);
        world.script(2, 2);
        steps.iter().for_each(|step| apply(&mut world, step));
    }

    #[test]
    fn records_of_any_bytes_parse_or_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..300), cut in 0usize..300) {
        let _ = NamespaceRecord::parse(&bytes);
        let mut near = record("a", "w", CELL);
        for (at, byte) in bytes.iter().enumerate().take(3) {
            let at = (cut * (at + 1) * 7) % near.len();
            near[at] = *byte;
        }
        if let Ok(parsed) = NamespaceRecord::parse(&near) {
            prop_assert_eq!(parsed.encode(), near, "one encoding for each record");
        }
    }
}
