//! Loads: from the engine's allocation of blocks until every rank has said that its copies into them are over.

use super::Scheduler;
use super::port::Port;
use super::request::Lookup;
use crate::HASH_BYTES;
use crate::meta::LoadOrder;

/// What a load brings into one KV-cache group.
#[derive(Debug)]
struct GroupLoad {
    group: u32,
    /// Position in the group's chain of the first block that is loaded.
    first: u32,
    hashes: Vec<u8>,
    blocks: Vec<u32>,
}

impl GroupLoad {
    fn brings(&self, at: u32, hash: &[u8]) -> bool {
        let from = (at.wrapping_sub(self.first) as usize).saturating_mul(HASH_BYTES);
        at >= self.first && self.hashes.get(from..from + HASH_BYTES) == Some(hash)
    }
}

/// A load under way.
#[derive(Debug)]
pub(crate) struct ActiveLoad {
    request: String,
    groups: Vec<GroupLoad>,
    lease: u64,
    /// Position in the chain of the first block that some rank could not load; 0 where there are several groups.
    failed: Option<u32>,
}

impl ActiveLoad {
    /// Blocks of it that the engine can use, given what has failed.
    fn usable(&self) -> u64 {
        let all = self.groups.iter().map(|own| own.blocks.len() as u64).sum();
        match (self.failed, &self.groups[..]) {
            (None, _) => all,
            (Some(failed), [own]) => all.min(failed.saturating_sub(own.first).into()),
            (Some(_), _) => 0,
        }
    }

    /// Its lookup lease is gone with the session that gave it.
    pub(crate) fn forget_lease(&mut self) {
        self.lease = 0;
    }
}

impl<P: Port> Scheduler<P> {
    /// The engine has allocated blocks for a request: `external` units of it, beyond those that it has, are to be loaded. `blocks` are
    /// all of the request's, group by group. Called with 0 when there is nothing (more) to load.
    pub fn allocated(&mut self, id: &str, external: u32, blocks: &[Vec<u32>]) {
        let Some(request) = self.requests.get_mut(id) else {
            return;
        };
        let offer = request.offer.take();
        if request.loading {
            return;
        }
        let Some((computed, most)) = offer.filter(|_| external > 0) else {
            if offer.is_some() {
                self.give_back_lease(id);
                if let Some(request) = self.requests.get_mut(id) {
                    request.lookup = Lookup::Settled;
                }
            }
            return;
        };
        let Lookup::Answered {
            hashes,
            places,
            lease,
            namespace,
            ..
        } = std::mem::replace(&mut request.lookup, Lookup::Settled)
        else {
            return;
        };
        let units = (computed, computed + external.min(most));
        let groups = self.wanted(&hashes, units, Some(blocks)).unwrap_or_else(|| {
            self.notices.warn(
                "the engine allocated other blocks than it said; a load was given up and is reported as failed",
            );
            let all = (0..).zip(self.settings.beyond(computed, blocks));
            let broken = all.map(|(group, blocks)| GroupLoad {
                group,
                first: 0,
                hashes: Vec::new(),
                blocks,
            });
            broken.collect()
        });
        let sources = self.settings.sources(&places, units);
        self.count_sources(sources);
        if let Some(request) = self.requests.get_mut(id) {
            request.loading = true;
            request.sources = sources;
            self.settings.pass(&mut request.next, units.1);
        }
        self.counters.loads += 1;
        self.counters.loaded_tokens +=
            u64::from(units.1 - units.0) * u64::from(self.settings.unit());
        for group in &groups {
            self.counters.loaded_blocks += group.blocks.len() as u64;
            self.pending_loads.push(LoadOrder {
                request: id.to_owned(),
                namespace,
                group: group.group,
                hashes: group.hashes.clone(),
                blocks: group.blocks.clone(),
            });
        }
        self.loads.push(ActiveLoad {
            request: id.to_owned(),
            groups,
            lease,
            failed: None,
        });
    }

    /// What of each group's chain has to be loaded to come from one number of units to another; `hashes` are all that were asked. With
    /// the engine's `blocks`, or none yet. `None`: there are no such hashes, or no such blocks.
    fn wanted(
        &self,
        hashes: &[u8],
        (computed, units): (u32, u32),
        blocks: Option<&[Vec<u32>]>,
    ) -> Option<Vec<GroupLoad>> {
        let (unit, grain) = (self.settings.unit(), self.settings.grain());
        let (hashes, _) = hashes.as_chunks::<HASH_BYTES>();
        let mut groups = Vec::new();
        for (group, rule) in (0u32..).zip(&self.settings.groups) {
            let (first, end) = rule.needs(units * unit, computed * unit);
            if first == end {
                continue;
            }
            let each = (rule.span() / grain) as usize;
            let hash = |at: u32| hashes.get((at as usize + 1) * each - 1).copied();
            let own = match blocks {
                None => Vec::new(),
                Some(blocks) => {
                    let all = blocks.get(group as usize)?;
                    all.get(first as usize..end as usize)?.to_vec()
                }
            };
            // A block that the engine does not keep is shown as 0.
            if rule.stands_alone() && own.contains(&0) {
                return None;
            }
            groups.push(GroupLoad {
                group,
                first,
                hashes: (first..end)
                    .map(hash)
                    .collect::<Option<Vec<[u8; HASH_BYTES]>>>()?
                    .concat(),
                blocks: own,
            });
        }
        Some(groups)
    }

    /// Whether another request's load under way brings the first block that this one lacks.
    pub(crate) fn loaded_by_another(&self, id: &str, computed: u32) -> bool {
        let Some(request) = self.requests.get(id) else {
            return false;
        };
        let Lookup::Answered { hashes, .. } = &request.lookup else {
            return false;
        };
        if self.loads.is_empty() {
            return false;
        }
        let next = self.wanted(hashes, (computed, computed + 1), None);
        let Some(first) = next.as_ref().and_then(|groups| groups.first()) else {
            return false;
        };
        let hash = &first.hashes[..HASH_BYTES];
        self.loads.iter().any(|load| {
            let mut groups = load.groups.iter();
            load.request != id
                && groups.any(|own| own.group == first.group && own.brings(first.first, hash))
        })
    }

    /// Some ranks could not load these blocks, or what these requests wait for.
    pub(crate) fn loads_failed(&mut self, invalid: &[u32], requests: &[&str]) {
        if invalid.is_empty() && requests.is_empty() {
            return;
        }
        for load in &mut self.loads {
            if requests.contains(&load.request.as_str()) {
                load.failed = Some(0);
            }
            // The engine's numbers say which block only where there is one group.
            let [own] = &load.groups[..] else { continue };
            let failed = (own.first..)
                .zip(&own.blocks)
                .find(|(_, block)| invalid.contains(block))
                .map(|(at, _)| at);
            load.failed = match (load.failed, failed) {
                (Some(a), Some(b)) => Some(a.min(b)),
                (a, b) => a.or(b),
            };
        }
    }

    /// Every rank has said that its copies into the request's blocks are over.
    pub(crate) fn load_over(&mut self, id: &str) {
        let Some(at) = self.loads.iter().position(|load| load.request == id) else {
            return;
        };
        let load = self.loads.remove(at);
        self.release(load.lease);
        self.counters.usable_blocks += load.usable();
        if load.failed.is_some() {
            self.counters.load_failures += 1;
            // Others may have been promised the same blocks.
            self.belief += 1;
        }
        if let Some(request) = self.requests.get_mut(id) {
            request.loading = false;
            if let Some(failed) = load.failed {
                request.next.fill(failed);
            }
        }
    }
}
