//! What can be loaded for a request: asked when it comes, polled when the engine wants to know, believed only for so long.

use bytes::Bytes;
use kvd_core::hit::{self, GroupRule, Run};
use kvd_wire::session::{Chain, Lookup as LookupBody, Presence, Release, reply, request::Body};

use super::Scheduler;
use super::namespaces::Standing;
use super::port::{Fault, Port};
use super::request::Lookup;
use super::watch::tier;
use crate::HASH_BYTES;
use crate::observed;

/// Most lookups for a request before it restarts.
const MOST_ASKS: u32 = 4;

/// What can be loaded for a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Match {
    /// Not known yet: ask again in the next step.
    Wait,
    /// Give the hashes to [`Scheduler::ask`], then ask again.
    NeedHashes,
    /// So many [units](super::Settings::unit) beyond those that the engine has: blocks, where all groups have blocks of one size.
    Blocks(u32),
}

impl<P: Port> Scheduler<P> {
    /// Asks for a request's blocks, with the step's end at the latest: `hashes` of all that may be loaded, from its first block on, one
    /// for every [grain](super::Settings::grain) of tokens.
    pub fn ask(&mut self, now: u64, id: &str, hashes: &[u8]) {
        let Some(request) = self.requests.get(id) else {
            return;
        };
        let adapter = request.adapter.clone();
        let standing = self.standing(&adapter);
        let lookup = self.queue_lookup(now, standing, hashes);
        let Some(request) = self.requests.get_mut(id) else {
            return;
        };
        if matches!(lookup, Lookup::Asked { .. }) {
            request.asks += 1;
            self.asking.push(id.to_owned());
        }
        request.lookup = lookup;
    }

    /// What was asked for has been sent: from now on its answers are waited for.
    pub(crate) fn asked(&mut self, now: u64) {
        for id in self.asking.drain(..) {
            if let Some(request) = self.requests.get_mut(&id)
                && let Lookup::Asked { at, .. } = &mut request.lookup
            {
                at.get_or_insert(now);
            }
        }
    }

    fn queue_lookup(&mut self, now: u64, standing: Standing, hashes: &[u8]) -> Lookup<P::Ticket> {
        let (index, name) = match standing {
            Standing::Ready { index, name } => (index, name),
            Standing::Soon => return Lookup::None,
            Standing::Not => return Lookup::Settled,
        };
        if hashes.is_empty() || self.is_silent(now) {
            return Lookup::Settled;
        }
        let hashes = Bytes::copy_from_slice(hashes);
        let body = Body::Lookup(LookupBody {
            namespace: name.namespace,
            chains: self.chains(&hashes),
            lease_ms: self.settings.lease_ms,
            leading: true,
            hit: self.settings.groups.len() > 1
                || self.settings.groups.iter().any(GroupRule::stands_alone),
            drop_last: self.settings.drop_last,
        });
        match self.port.queue_on(&name, body) {
            Ok(ticket) => {
                self.queued();
                self.counters.lookups += 1;
                Lookup::Asked {
                    ticket,
                    at: None,
                    hashes,
                    namespace: index,
                    belief: self.belief,
                }
            }
            Err(_) => {
                self.counters.lookup_failures += 1;
                Lookup::Settled
            }
        }
    }

    /// The chain of each group: the hash of a block is that at its end.
    fn chains(&self, hashes: &Bytes) -> Vec<Chain> {
        let (all, _) = hashes.as_chunks::<HASH_BYTES>();
        let grain = self.settings.grain();
        let chain = |(group, rule): (u32, &GroupRule)| {
            let each = (rule.span() / grain) as usize;
            let hashes = match each {
                1 => hashes.clone(),
                _ => all
                    .chunks_exact(each)
                    .flat_map(|block| block[each - 1])
                    .collect::<Vec<u8>>()
                    .into(),
            };
            Chain {
                group,
                hashes,
                parent: Bytes::new(),
            }
        };
        (0..).zip(&self.settings.groups).map(chain).collect()
    }

    /// What can be loaded for a request of which the engine has `computed` units. The engine asks this only for requests that
    /// start from nothing (again), and perhaps in every step.
    pub fn matched(&mut self, now: u64, id: &str, computed: u32) -> Match {
        let answer = self.answer(now, id, computed);
        if answer == Match::Wait {
            self.counters.asked_to_wait += 1;
        }
        answer
    }

    fn answer(&mut self, now: u64, id: &str, computed: u32) -> Match {
        let (epoch, mixed) = (self.namespaces.epoch(), self.namespaces.mixed());
        let Some(request) = self.requests.get_mut(id) else {
            return Match::Blocks(0);
        };
        request.epoch = epoch;
        request.tainted = mixed && computed > 0;
        request.offer = None;
        if std::mem::replace(&mut request.ran, false) {
            // It has lost its blocks since it ran. Of a preemption in this very step we hear when the step begins for us.
            request.start_over();
        }
        let wanted_at = *request.wanted_at.get_or_insert(now);
        if request.skip || matches!(request.lookup, Lookup::Settled) {
            return Match::Blocks(0);
        }
        let adapter = request.adapter.clone();
        match self.standing(&adapter) {
            Standing::Ready { index, .. } => self.answer_from(now, id, computed, index),
            Standing::Soon => self.wait_for_standing(now, wanted_at, id),
            Standing::Not => self.settle(id),
        }
    }

    /// Nothing is loaded for this request before it restarts.
    fn settle(&mut self, id: &str) -> Match {
        self.give_back_lease(id);
        if let Some(request) = self.requests.get_mut(id) {
            request.lookup = Lookup::Settled;
        }
        Match::Blocks(0)
    }

    fn wait_for_standing(&mut self, now: u64, wanted_at: u64, id: &str) -> Match {
        let (since, deadline) = match self.namespaces.known() {
            true => (wanted_at, self.settings.lookup_deadline),
            // Once for all requests: a worker that says nothing for so long may never do.
            false => (
                *self.waited_for_workers.get_or_insert(now),
                self.settings.startup_deadline,
            ),
        };
        match now.saturating_sub(since) < deadline {
            true => Match::Wait,
            false => self.settle(id),
        }
    }

    fn answer_from(&mut self, now: u64, id: &str, computed: u32, index: u32) -> Match {
        self.poll_lookup(now, id);
        let lease_us = u64::from(self.settings.lease_ms) * 1000;
        let belief_now = self.belief;
        let Some(request) = self.requests.get_mut(id) else {
            return Match::Blocks(0);
        };
        match &request.lookup {
            Lookup::None if request.asks < MOST_ASKS => Match::NeedHashes,
            Lookup::None => self.settle(id),
            Lookup::Settled => Match::Blocks(0),
            Lookup::Asked { at, .. } => {
                let waited = at.map_or(0, |at| now.saturating_sub(at));
                if waited < self.settings.lookup_deadline {
                    return Match::Wait;
                }
                self.counters.lookup_timeouts += 1;
                let asked = std::mem::replace(&mut request.lookup, Lookup::Settled);
                if let Lookup::Asked { ticket, .. } = asked {
                    self.daemon_silent(now, Some(ticket));
                }
                Match::Blocks(0)
            }
            Lookup::Answered {
                runs,
                at,
                hashes,
                namespace,
                belief,
                ..
            } => {
                let present = self
                    .settings
                    .found(runs, hashes.len() / HASH_BYTES, computed);
                let believed = *namespace == index && *belief == belief_now;
                let lasts = present <= computed || now.saturating_sub(*at) < lease_us * 3 / 4;
                if !(believed && lasts) {
                    self.give_back_lease(id);
                    if let Some(request) = self.requests.get_mut(id) {
                        request.lookup = Lookup::None;
                        if believed {
                            // It waits for room in the engine, as long as that takes.
                            request.asks = 0;
                        }
                        if request.asks < MOST_ASKS {
                            return Match::NeedHashes;
                        }
                    }
                    return self.settle(id);
                }
                self.offer(now, id, computed, present)
            }
        }
    }

    fn offer(&mut self, now: u64, id: &str, computed: u32, present: u32) -> Match {
        if present <= computed {
            self.need_not_store(id);
            return self.settle(id);
        }
        if self.loaded_by_another(id, computed) {
            let deadline = self.settings.share_deadline;
            if let Some(request) = self.requests.get_mut(id) {
                let first = request.shared_since.is_none();
                let since = *request.shared_since.get_or_insert(now);
                self.counters.loads_shared += u64::from(first);
                if now.saturating_sub(since) < deadline {
                    return Match::Wait;
                }
            }
        }
        if let Some(request) = self.requests.get_mut(id) {
            request.offer = Some((computed, present - computed));
        }
        Match::Blocks(present - computed)
    }

    /// What the daemon has of a request need not be stored.
    fn need_not_store(&mut self, id: &str) {
        let settings = &self.settings;
        let Some(request) = self.requests.get_mut(id) else {
            return;
        };
        if let Lookup::Answered { runs, hashes, .. } = &request.lookup {
            let found = settings.found(runs, hashes.len() / HASH_BYTES, 0);
            settings.pass(&mut request.next, found);
        }
    }

    /// Takes the reply of a request's lookup, if it has come.
    fn poll_lookup(&mut self, now: u64, id: &str) {
        let Some(request) = self.requests.get_mut(id) else {
            return;
        };
        let Lookup::Asked { ticket, .. } = &mut request.lookup else {
            return;
        };
        let Some(answer) = self.port.poll(ticket) else {
            return;
        };
        let asked = std::mem::replace(&mut request.lookup, Lookup::Settled);
        let Lookup::Asked {
            at,
            hashes,
            namespace,
            belief,
            ..
        } = asked
        else {
            return;
        };
        match answer {
            Ok(reply::Body::Lookup(reply)) => {
                let mut runs: Vec<Vec<Run>> = reply.chains.iter().map(loadable).collect();
                runs.resize(self.settings.groups.len(), Vec::new());
                // One that goes out with others may be answered before it counts as sent.
                if let Some(at) = at {
                    observed::keep(&mut self.watch.lookups, now.saturating_sub(at));
                }
                request.lookup = Lookup::Answered {
                    runs,
                    places: reply.chains,
                    at: now,
                    lease: reply.lease,
                    hashes,
                    namespace,
                    belief,
                };
                self.daemon_spoke();
            }
            Ok(_) | Err(Fault::Unavailable | Fault::Busy) => self.counters.lookup_failures += 1,
            Err(Fault::Refused(text)) => {
                self.counters.lookup_failures += 1;
                self.notices.warn(format!("a lookup was refused: {text}"));
            }
        }
    }

    /// Gives back what a lookup keeps for us, if it keeps something.
    pub(crate) fn give_back_lease(&mut self, id: &str) {
        if let Some(request) = self.requests.get_mut(id)
            && let Lookup::Answered { lease, .. } = &mut request.lookup
        {
            let lease = std::mem::take(lease);
            self.release(lease);
        }
    }

    /// Ends a lookup lease. Should that not be possible, it ends by itself.
    pub(crate) fn release(&mut self, lease: u64) {
        if lease == 0 {
            return;
        }
        let body = Body::Release(Release {
            lease,
            ..Release::default()
        });
        if self.forget(body) {
            self.counters.leases_released += 1;
        }
    }
}

impl super::Settings {
    /// Units that can be loaded, given what is there of each group, the hashes that were asked, and the `computed` units that the engine
    /// has.
    fn found(&self, runs: &[Vec<Run>], hashes: usize, computed: u32) -> u32 {
        let unit = self.unit();
        let mut most = (hashes as u64 * u64::from(self.grain())).min(u32::MAX.into()) as u32;
        if self.drop_last {
            let whole = self
                .groups
                .iter()
                .zip(runs)
                .filter(|(rule, _)| !rule.stands_alone());
            let ends = whole.map(|(rule, runs)| match runs.first() {
                Some((0, end)) => u64::from(*end) * u64::from(rule.span()),
                _ => 0,
            });
            let end = ends.min().unwrap_or(most.into()).min(most.into()) as u32;
            most = end.saturating_sub(unit);
        }
        let groups: Vec<(GroupRule, &[Run])> = self
            .groups
            .iter()
            .zip(runs)
            .map(|(rule, runs)| (*rule, &runs[..]))
            .collect();
        hit::longest(&groups, unit, most, computed.saturating_mul(unit)) / unit
    }

    /// Of each group, the blocks within so many units need not be stored.
    pub(super) fn pass(&self, next: &mut [u32], units: u32) {
        let tokens = u64::from(units) * u64::from(self.unit());
        for (next, rule) in next.iter_mut().zip(&self.groups) {
            *next = (*next).max((tokens / u64::from(rule.span())) as u32);
        }
    }
}

/// The runs of blocks that can be loaded.
fn loadable(presence: &Presence) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    let all = presence.start.iter().zip(&presence.length);
    for ((start, length), place) in all.zip(&presence.r#where) {
        let loadable = tier(*place).is_some();
        let end = start.saturating_add(*length);
        match runs.last_mut() {
            // Runs that overlap or go back make no sense.
            Some(run) if *start < run.1 => return runs,
            Some(run) if loadable && *start == run.1 => run.1 = end,
            _ if loadable && *length > 0 => runs.push((*start, end)),
            _ => {}
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::super::tests::presence;
    use super::*;
    use kvd_core::GroupKind;
    use kvd_wire::session::Where;

    #[test]
    fn only_what_can_be_loaded_counts() {
        assert_eq!(loadable(&presence(&[])), []);
        assert_eq!(loadable(&presence(&[(1, 3, Where::Host)])), [(1, 4)]);
        let two = [(0, 3, Where::Host), (3, 2, Where::Nvme)];
        assert_eq!(loadable(&presence(&two)), [(0, 5)]);
        let filling = [(0, 3, Where::Host), (3, 2, Where::Filling)];
        assert_eq!(loadable(&presence(&filling)), [(0, 3)]);
        let apart = [(0, 3, Where::Host), (4, 2, Where::Host)];
        assert_eq!(loadable(&presence(&apart)), [(0, 3), (4, 6)]);
        let back = [(4, 2, Where::Host), (0, 3, Where::Host)];
        assert_eq!(loadable(&presence(&back)), [(4, 6)]);
        assert_eq!(loadable(&presence(&[(0, 0, Where::Host)])), []);
    }

    #[test]
    fn a_drafter_that_reads_ahead_costs_a_unit_before_windows_are_asked() {
        let rule = |kind, window| GroupRule::new(kind, 4, window).unwrap();
        let settings = super::super::Settings {
            groups: vec![
                rule(GroupKind::Full, None),
                rule(GroupKind::SlidingWindow, Some(5)),
            ],
            drop_last: true,
            ..super::super::Settings::default()
        };
        let runs = [vec![(0, 6)], vec![(2, 3), (4, 6)]];
        assert_eq!(settings.found(&runs, 8, 0), 5);
        assert_eq!(settings.found(&runs, 5, 0), 3);
        let mut next = [1, 7];
        settings.pass(&mut next, 5);
        assert_eq!(next, [5, 7]);
    }
}
