//! Prompts whose KV lies in several groups: what one hit needs of each, what a lookup touches, what is evicted.
#![allow(clippy::unwrap_used)]

mod common;

use common::*;
use kvd_core::hit::Run;
use kvd_core::*;
use proptest::prelude::*;

/// Full attention (group 0), a window of 33 tokens (1) and a state of every 32 tokens (2). Blocks of groups 0 and 1 span 16 tokens; all
/// take one slot of 4 KiB.
fn hybrid() -> Vec<u8> {
    let fields = [
        ("tenant", "a"),
        ("model", "m"),
        ("weights", "w"),
        ("kv_dtype", "bfloat16"),
        ("cell_encoding", "flash:1"),
        ("hash", "sha256_cbor:1f2e"),
        ("block_tokens", "16"),
        ("groups", "3"),
        ("group.0.kind", "full"),
        ("group.0.layers", "4"),
        ("group.0.heads", "4"),
        ("group.0.cell_bytes", "16"),
        ("group.1.kind", "sliding_window"),
        ("group.1.window", "33"),
        ("group.1.layers", "4"),
        ("group.1.heads", "4"),
        ("group.1.cell_bytes", "16"),
        ("group.2.kind", "state"),
        ("group.2.block_tokens", "32"),
        ("group.2.layers", "4"),
        ("group.2.heads", "1"),
        ("group.2.cell_bytes", "1024"),
    ];
    NamespaceRecord::build(fields).unwrap().encode()
}

fn attached(world: &mut World) {
    world.open(1, A, 1, Role::Both, 0, 1);
    let heads = [4, 4, 1];
    let bounds: Vec<[u32; 2]> = heads.iter().map(|heads| [0, *heads]).collect();
    let groups: Vec<GroupLayout<'_>> = (0..3)
        .map(|group| GroupLayout {
            group,
            layer_bounds: &[0, 4],
            head_bounds: &bounds[group as usize],
            copies: true,
            part: 0,
        })
        .collect();
    let record = hybrid();
    let reply = world.ask(
        1,
        Request::Register {
            record: &record,
            groups: &groups,
        },
    );
    assert!(matches!(reply, Reply::Registered { .. }), "{reply:?}");
}

fn store(world: &mut World, group: u32, list: &[[u8; 32]]) -> Vec<ReserveState> {
    let chain = Chain {
        group,
        hashes: list,
        parent: None,
    };
    let body = Request::Reserve {
        namespace: 0,
        chains: &[chain],
    };
    let Reply::Reserve(reply) = world.ask(1, body) else {
        panic!("no slots")
    };
    let crcs = vec![7; reply.slots.len() * if group == 2 { 1 } else { 4 }];
    let body = Request::Commit {
        namespace: 0,
        group,
        slots: &reply.slots,
        generations: &reply.generations,
        crcs: &crcs,
    };
    let Reply::Commit(states) = world.ask(1, body) else {
        panic!("no commit")
    };
    assert!(states.iter().all(|state| *state == CommitState::Visible));
    reply.states
}

/// Looks a prompt of so many blocks of 16 tokens up.
fn hit(world: &mut World, blocks: u64, lease_ms: u32) -> LookupReply {
    lookup(world, blocks, lease_ms, HIT)
}

const HIT: Scope = Scope::Hit { drop_last: false };

fn lookup(world: &mut World, blocks: u64, lease_ms: u32, scope: Scope) -> LookupReply {
    let (all, states) = (hashes(0..blocks), states(blocks));
    let chains = [(0, &all), (1, &all), (2, &states)].map(|(group, hashes)| Chain {
        group,
        hashes,
        parent: None,
    });
    let body = Request::Lookup {
        namespace: 0,
        chains: &chains,
        lease_ms,
        scope,
    };
    match world.ask(1, body) {
        Reply::Lookup(reply) => reply,
        other => panic!("{other:?}"),
    }
}

/// The hashes at which a state of such a prompt can be: those of every second block.
fn states(blocks: u64) -> Vec<[u8; 32]> {
    (0..blocks / 2).map(|at| hash(at * 2 + 1)).collect()
}

#[test]
fn a_hit_is_what_every_group_has() {
    let mut world = World::new(Settings::default(), 8);
    attached(&mut world);
    store(&mut world, 0, &hashes(0..8));
    assert_eq!(hit(&mut world, 8, 0).hit_tokens, 0);
    store(&mut world, 1, &hashes(4..8));
    assert_eq!(hit(&mut world, 8, 0).hit_tokens, 0);
    store(&mut world, 2, &[hash(5)]);
    // The state after six blocks, and the window's two blocks before it.
    let found = hit(&mut world, 8, 0);
    assert_eq!(found.hit_tokens, 96);
    assert_eq!(found.chains[1].at(4), Where::Host);
    assert_eq!(found.chains[1].at(3), Where::Absent);
    store(&mut world, 2, &[hash(7)]);
    assert_eq!(hit(&mut world, 8, 0).hit_tokens, 128);
    assert_eq!(hit(&mut world, 7, 0).hit_tokens, 96);
}

#[test]
fn a_lease_covers_what_the_hit_needs_and_no_more() {
    let mut world = World::new(Settings::default(), 8);
    attached(&mut world);
    store(&mut world, 0, &hashes(0..8));
    store(&mut world, 1, &hashes(0..8));
    store(&mut world, 2, &states(8));
    let found = hit(&mut world, 8, 60_000);
    assert_eq!(found.hit_tokens, 128);
    assert_ne!(found.lease, 0);
    // Eight of full attention, two of the window, one state.
    assert_eq!(world.status().pinned_bytes, 11 * 4096);
}

/// A drafter that reads ahead can't use the last unit: what counts is the hit before it, with its own window and state.
#[test]
fn of_a_hit_whose_last_unit_is_dropped_the_one_before_is_leased() {
    let mut world = World::new(Settings::default(), 8);
    attached(&mut world);
    let dropped = Scope::Hit { drop_last: true };
    assert_eq!(lookup(&mut world, 8, 0, dropped).hit_tokens, 0);
    store(&mut world, 0, &hashes(0..8));
    store(&mut world, 1, &hashes(0..8));
    store(&mut world, 2, &states(8));
    let found = lookup(&mut world, 8, 60_000, dropped);
    assert_eq!(found.hit_tokens, 96);
    // Six of full attention, two of the window before the end, one state.
    assert_eq!(world.status().pinned_bytes, 9 * 4096);
    assert_eq!(lookup(&mut world, 2, 0, dropped).hit_tokens, 0);
}

#[test]
fn every_group_must_be_asked_once() {
    let mut world = World::new(Settings::default(), 8);
    attached(&mut world);
    let all = hashes(0..2);
    let chain = |group| Chain {
        group,
        hashes: &all,
        parent: None,
    };
    let wrong: [&[Chain<'_>]; 3] = [
        &[chain(0), chain(1)],
        &[chain(0), chain(1), chain(1)],
        &[chain(0), chain(1), chain(2), chain(2)],
    ];
    for chains in wrong {
        let body = Request::Lookup {
            namespace: 0,
            chains,
            lease_ms: 0,
            scope: HIT,
        };
        assert_eq!(kind(&world.ask(1, body)), Some(ErrorKind::Invalid));
    }
}

/// A window's blocks have no tail: those that no hit asked for go first, wherever in the chain they are.
#[test]
fn what_a_window_left_behind_is_evicted_before_what_hits_need() {
    let mut world = World::new(Settings::default(), 2);
    attached(&mut world);
    store(&mut world, 0, &hashes(0..8));
    store(&mut world, 1, &hashes(0..8));
    store(&mut world, 2, &[hash(7)]);
    assert_eq!(hit(&mut world, 8, 0).hit_tokens, 128);
    // 17 of 32 slots are taken; 21 more push six out.
    store(&mut world, 0, &hashes(100..121));
    let found = hit(&mut world, 8, 0);
    assert_eq!(found.hit_tokens, 128, "{found:?}");
    let left = (0..8).filter(|at| found.chains[1].at(*at) == Where::Host);
    assert_eq!(left.count(), 2);
}

/// What is there of each group, block by block, as a lookup of all says.
fn there(world: &mut World, blocks: u64) -> Vec<Vec<Run>> {
    let reply = lookup(world, blocks, 0, Scope::All);
    let runs = |presence: &Presence| {
        let runs = presence.start.iter().zip(&presence.length);
        runs.map(|(start, length)| (*start, start + length))
            .collect()
    };
    reply.chains.iter().map(runs).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever was stored, evicted and leased: a hit is the longest prompt of which every group has what it needs, each block of
    /// which can be loaded at once, and never more.
    #[test]
    fn a_hit_can_be_loaded_whatever_came_before(
        ops in prop::collection::vec((0u32..4, 0u64..14, 1u64..6, any::<bool>()), 1..60)
    ) {
        let mut world = World::new(Settings::default(), 2);
        attached(&mut world);
        let rules = NamespaceRecord::parse(&hybrid()).unwrap().rules().to_vec();
        for (group, first, count, lease) in ops {
            match group {
                2 => {
                    store(&mut world, 2, &[hash(first * 2 + 1)]);
                }
                3 => world.now += 20_000_000,
                group => {
                    store(&mut world, group, &hashes(first..first + count));
                }
            }
            let blocks = 18;
            let found = hit(&mut world, blocks, if lease { 5000 } else { 0 });
            let runs = there(&mut world, blocks);
            let groups: Vec<(GroupRule, &[Run])> =
                rules.iter().zip(&runs).map(|(rule, runs)| (*rule, &runs[..])).collect();
            prop_assert_eq!(found.hit_tokens, hit::longest(&groups, 32, 16 * blocks as u32, 0));
            // Leases have a limit.
            prop_assert!(found.lease == 0 || lease && found.hit_tokens > 0);
            for (group, rule) in (0u32..).zip(&rules) {
                let (first, end) = rule.needs(found.hit_tokens, 0);
                let chain = if group == 2 { states(blocks) } else { hashes(0..blocks) };
                let body = Request::Load {
                    namespace: 0,
                    group,
                    hashes: &chain[first as usize..end as usize],
                    deadline_ms: 0,
                };
                let Reply::Load(loaded) = world.ask(1, body) else { panic!("no answer") };
                prop_assert!(loaded.states.iter().all(|state| *state == LoadState::Ready));
                world.release(1, &loaded.slots, &loaded.generations, &[]);
            }
        }
    }
}
