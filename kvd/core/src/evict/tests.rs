//! Both policies alone: order, pinned entries, returns, and their hit ratios on a skewed trace.

use super::*;
use crate::api::NIL;
use crate::index::{EntryState, Found, Index};

fn hash(n: u64) -> [u8; 32] {
    let mut hash = [0; 32];
    hash[24..].copy_from_slice(&n.wrapping_mul(0x9E37_79B9_7F4A_7C15).to_be_bytes());
    hash[..8].copy_from_slice(&n.to_be_bytes());
    hash
}

struct Cache {
    index: Index,
    policy: Box<dyn Eviction>,
    stamp: u32,
}

impl Cache {
    fn new(kind: EvictionPolicy) -> Self {
        Cache {
            index: Index::new(1),
            policy: policy(kind),
            stamp: 0,
        }
    }

    /// One that can choose what goes next.
    fn choosing(kind: EvictionPolicy) -> Self {
        let policy = choosing(kind);
        Cache {
            policy,
            ..Cache::new(kind)
        }
    }

    fn choose(&mut self) -> Option<u32> {
        let entries = &mut self.index.entries;
        self.policy.choose(entries, &mut |entry| entry.pins > 0)
    }

    fn add(&mut self, n: u64, parent: Option<u32>) -> u32 {
        let entry = Entry {
            hash: hash(n),
            parent: NIL,
            stamp: self.stamp,
            ..Entry::default()
        };
        let entry = Entry {
            state: EntryState::Filling,
            ..entry
        };
        let id = self.index.insert(entry, 0);
        if let Some(parent) = parent {
            self.index.entries.adopt(id, parent);
            chain::gains_child(&mut *self.policy, &mut self.index.entries, parent);
        }
        chain::visible(&mut *self.policy, &mut self.index.entries, id);
        id
    }

    fn touch(&mut self, id: u32) {
        self.stamp += 1;
        chain::touch(
            &mut *self.policy,
            &mut self.index.entries,
            id,
            self.stamp,
            true,
        );
    }

    fn evict(&mut self) -> Option<u32> {
        let id = self
            .policy
            .victim(&mut self.index.entries, &mut |entry| entry.pins > 0, SCAN)?;
        chain::leaves(&mut *self.policy, &mut self.index.entries, id, true);
        self.index.remove(id);
        Some(id)
    }

    /// Share of accesses that hit, keeping at most `room` entries.
    fn replay(&mut self, trace: impl Iterator<Item = u64>, room: usize) -> f64 {
        let (mut hits, mut all) = (0u32, 0u32);
        for n in trace {
            all += 1;
            if let Found::Entry(id) = self.index.find(0, 0, &hash(n)) {
                self.touch(id);
                hits += 1;
                continue;
            }
            if self.index.len() >= room {
                self.evict().expect("something can go");
            }
            self.stamp += 1;
            self.add(n, None);
        }
        f64::from(hits) / f64::from(all)
    }
}

#[test]
fn lru_evicts_in_order_of_use() {
    let mut cache = Cache::new(EvictionPolicy::Lru);
    let ids: Vec<u32> = (0..4).map(|n| cache.add(n, None)).collect();
    cache.touch(ids[0]);
    cache.index.entries.hot[ids[1]].pins = 1;
    assert_eq!(cache.evict(), Some(ids[2]));
    assert_eq!(cache.evict(), Some(ids[3]));
    assert_eq!(cache.evict(), Some(ids[0]));
    assert_eq!(cache.evict(), None, "the last one is pinned");
    cache.index.entries.hot[ids[1]].pins = 0;
    assert_eq!(cache.evict(), Some(ids[1]));
    assert_eq!(cache.policy.len(), 0);
}

#[test]
fn chains_go_tail_first_in_both() {
    for kind in [EvictionPolicy::Lru, EvictionPolicy::S3Fifo] {
        let mut cache = Cache::new(kind);
        let (mut parent, mut ids) = (None, Vec::new());
        for n in 0..8 {
            parent = Some(cache.add(n, parent));
            ids.extend(parent);
        }
        assert_eq!(cache.policy.len(), 1, "one leaf");
        for id in ids.into_iter().rev() {
            assert_eq!(cache.evict(), Some(id));
        }
    }
}

#[test]
fn a_shared_prefix_outlives_its_cold_branch() {
    let mut cache = Cache::new(EvictionPolicy::Lru);
    let root = cache.add(0, None);
    let cold = cache.add(1, Some(root));
    let other = cache.add(2, None);
    cache.touch(other);
    cache.touch(root);
    assert_eq!(cache.evict(), Some(cold));
    assert_eq!(
        cache.evict(),
        Some(other),
        "the root was touched after the branch and this"
    );
    assert_eq!(cache.evict(), Some(root));
}

#[test]
fn s3fifo_keeps_what_is_used_against_a_scan() {
    let mut cache = Cache::new(EvictionPolicy::S3Fifo);
    let hot: Vec<u32> = (0..50).map(|n| cache.add(n, None)).collect();
    hot.iter().for_each(|id| cache.touch(*id));
    let _ = cache.replay(1000..1500, 100);
    let kept = (0..50).filter(|n| matches!(cache.index.find(0, 0, &hash(*n)), Found::Entry(_)));
    assert_eq!(kept.count(), 50);
    let mut lru = Cache::new(EvictionPolicy::Lru);
    for n in 0..50 {
        lru.add(n, None);
    }
    let _ = lru.replay(1000..1500, 100);
    let kept = (0..50).filter(|n| matches!(lru.index.find(0, 0, &hash(*n)), Found::Entry(_)));
    assert_eq!(kept.count(), 0, "a scan empties LRU");
}

#[test]
fn s3fifo_remembers_what_it_dropped() {
    let mut cache = Cache::new(EvictionPolicy::S3Fifo);
    let first = cache.add(0, None);
    for n in 1..20 {
        cache.add(n, None);
    }
    assert_eq!(cache.evict(), Some(first));
    let again = cache.add(0, None);
    assert_eq!(
        cache.index.entries.hot[again].list, 2,
        "a ghost goes to main"
    );
    cache.index.entries.hot[again].pins = 1;
    for _ in 0..19 {
        assert!(cache.evict().is_some());
    }
    assert_eq!(cache.evict(), None);
}

/// xorshift and the inverse of a power law: skewed enough to tell policies apart, and the same on every machine.
fn zipf(len: usize, keys: u64) -> impl Iterator<Item = u64> {
    let mut state = 0x2545_F491_4F6C_DD1D_u64;
    (0..len).map(move |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let unit = (state >> 11) as f64 / (1u64 << 53) as f64;
        ((keys as f64).powf(unit) - 1.0) as u64
    })
}

#[test]
fn hit_ratios_on_a_skewed_trace_are_sane() {
    let ratio = |kind, room| Cache::new(kind).replay(zipf(60_000, 20_000), room);
    let lru = ratio(EvictionPolicy::Lru, 1000);
    let s3 = ratio(EvictionPolicy::S3Fifo, 1000);
    let ideal = (1000f64).ln() / (20_000f64).ln();
    assert!(lru > 0.55 && lru < ideal, "lru {lru:.3} of {ideal:.3}");
    assert!(s3 > lru, "s3-fifo {s3:.3} against lru {lru:.3}");
    assert!(ratio(EvictionPolicy::Lru, 4000) > lru);
    assert!(ratio(EvictionPolicy::S3Fifo, 4000) > s3);
}

#[test]
fn a_queue_of_which_everything_is_pinned_does_not_hide_the_other() {
    for pin_small in [true, false] {
        let mut cache = Cache::new(EvictionPolicy::S3Fifo);
        let used: Vec<u32> = (0..20).map(|n| cache.add(n, None)).collect();
        used.iter().for_each(|id| cache.touch(*id));
        cache.add(20, None);
        assert!(cache.evict().is_some(), "the used ones go to main");
        let fresh: Vec<u32> = (100..103).map(|n| cache.add(n, None)).collect();
        let in_main = |cache: &Cache, id: &u32| cache.index.entries.hot[*id].list == 2;
        let main: Vec<u32> = used.into_iter().filter(|id| in_main(&cache, id)).collect();
        assert!(!main.is_empty());
        assert!(!fresh.iter().any(|id| in_main(&cache, id)));
        let (pinned, free) = if pin_small {
            (&fresh, &main)
        } else {
            (&main, &fresh)
        };
        pinned
            .iter()
            .for_each(|id| cache.index.entries.hot[*id].pins = 1);
        for _ in 0..free.len() {
            let gone = cache.evict().expect("the other queue has some");
            assert!(!pinned.contains(&gone));
        }
    }
}

#[test]
fn what_is_chosen_early_goes_in_the_same_order() {
    for kind in [EvictionPolicy::Lru, EvictionPolicy::S3Fifo] {
        let fill = |cache: &mut Cache| {
            let ids: Vec<u32> = (0..60).map(|n| cache.add(n, None)).collect();
            ids.iter().step_by(3).for_each(|id| cache.touch(*id));
        };
        let mut plain = Cache::new(kind);
        fill(&mut plain);
        let order: Vec<u32> = std::iter::from_fn(|| plain.evict()).collect();
        let mut cache = Cache::choosing(kind);
        fill(&mut cache);
        let mut chosen: Vec<u32> = (0..5).filter_map(|_| cache.choose()).collect();
        let mut gone = Vec::new();
        while let Some(id) = cache.evict() {
            gone.push(id);
            chosen.extend(cache.choose());
        }
        assert_eq!(gone, order, "{kind:?}");
        assert_eq!(chosen, order, "{kind:?}");
        assert_eq!((cache.policy.len(), cache.policy.chosen()), (0, 0));
    }
}

#[test]
fn a_chain_is_chosen_from_its_tail_up_to_what_another_chain_shares() {
    let mut cache = Cache::choosing(EvictionPolicy::Lru);
    let root = cache.add(0, None);
    let a = cache.add(1, Some(root));
    let b = cache.add(2, Some(a));
    let other = cache.add(3, Some(root));
    let chosen: Vec<u32> = std::iter::from_fn(|| cache.choose()).collect();
    assert_eq!(chosen, [b, a, other], "the root has two children");
    for wanted in [b, a, other, root] {
        assert_eq!(cache.evict(), Some(wanted));
    }
}

#[test]
fn a_touch_takes_the_choice_back_of_what_goes_after_it() {
    let mut cache = Cache::choosing(EvictionPolicy::Lru);
    let ids = [0u64, 1, 2].map(|n| (n, n.checked_sub(1)));
    let ids = ids.map(|(n, parent)| cache.add(n, parent.map(|parent| parent as u32)));
    let lone = cache.add(3, None);
    for wanted in [ids[2], ids[1], ids[0], lone] {
        assert_eq!(cache.choose(), Some(wanted));
    }
    assert_eq!((cache.choose(), cache.policy.chosen()), (None, 4));
    // The middle was used, and so goes later than what was chosen with it; its tail still goes.
    cache.touch(ids[1]);
    assert_eq!(cache.policy.chosen(), 2);
    assert_eq!(cache.evict(), Some(ids[2]));
    assert_eq!(cache.evict(), Some(lone));
    // A child makes a block one that can't go.
    assert_eq!(cache.choose(), Some(ids[1]));
    assert_eq!(cache.choose(), Some(ids[0]));
    let child = cache.add(9, Some(ids[1]));
    assert_eq!((cache.policy.chosen(), cache.policy.len()), (0, 1));
    for wanted in [child, ids[1], ids[0]] {
        assert_eq!(cache.evict(), Some(wanted));
    }
}

#[test]
fn the_chosen_that_must_stay_are_passed_over_and_stay_chosen() {
    for kind in [EvictionPolicy::Lru, EvictionPolicy::S3Fifo] {
        let mut cache = Cache::choosing(kind);
        let ids: Vec<u32> = (0..6).map(|n| cache.add(n, None)).collect();
        for id in &ids[..3] {
            assert_eq!(cache.choose(), Some(*id));
        }
        cache.index.entries.hot[ids[0]].pins = 1;
        cache.index.entries.hot[ids[1]].pins = 1;
        assert_eq!(cache.evict(), Some(ids[2]));
        assert_eq!(cache.evict(), Some(ids[3]), "no choice, but it can go");
        cache.index.entries.hot[ids[0]].pins = 0;
        assert_eq!(cache.evict(), Some(ids[0]));
        assert_eq!(cache.policy.chosen(), 1);
    }
}
