//! What can be loaded for a request: asked when it comes, polled when the engine wants to know, believed only for so long.

use kvd_wire::session::{
    Chain, Lookup as LookupBody, LookupReply, Release, Where, reply, request::Body,
};

use super::Scheduler;
use super::namespaces::Standing;
use super::port::{Fault, Port};
use super::request::Lookup;
use crate::HASH_BYTES;

/// Most lookups for a request before it restarts.
const MOST_ASKS: u32 = 4;

/// What can be loaded for a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Match {
    /// Not known yet: ask again in the next step.
    Wait,
    /// Give the hashes to [`Scheduler::ask`], then ask again.
    NeedHashes,
    /// So many blocks beyond those that the engine has.
    Blocks(u32),
}

impl<P: Port> Scheduler<P> {
    /// Sends a lookup for a request's blocks: `hashes` of all that may be loaded, from its first block on.
    pub fn ask(&mut self, now: u64, id: &str, hashes: &[u8]) {
        let Some(request) = self.requests.get(id) else {
            return;
        };
        let adapter = request.adapter.clone();
        let standing = self.standing(&adapter);
        let lookup = self.send_lookup(now, standing, hashes);
        let Some(request) = self.requests.get_mut(id) else {
            return;
        };
        if matches!(lookup, Lookup::Asked { .. }) {
            request.asks += 1;
        }
        request.lookup = lookup;
    }

    fn send_lookup(&mut self, now: u64, standing: Standing, hashes: &[u8]) -> Lookup<P::Ticket> {
        let (index, name) = match standing {
            Standing::Ready { index, name } => (index, name),
            Standing::Soon => return Lookup::None,
            Standing::Not => return Lookup::Settled,
        };
        if hashes.is_empty() || self.is_silent(now) {
            return Lookup::Settled;
        }
        let body = Body::Lookup(LookupBody {
            namespace: name.namespace,
            chains: vec![Chain {
                group: 0,
                hashes: hashes.to_vec().into(),
                parent: Vec::new().into(),
            }],
            lease_ms: self.settings.lease_ms,
            leading: true,
        });
        match self.port.submit_on(&name, body) {
            Ok(ticket) => {
                self.counters.lookups += 1;
                Lookup::Asked {
                    ticket,
                    at: now,
                    hashes: hashes.to_vec(),
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

    /// What can be loaded for a request of which the engine has `computed` blocks. The engine asks this only for requests that
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
        request.ran = false;
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
        let deadline = match self.namespaces.known() {
            true => self.settings.lookup_deadline,
            false => self.settings.startup_deadline,
        };
        match now.saturating_sub(wanted_at) < deadline {
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
                if now.saturating_sub(*at) < self.settings.lookup_deadline {
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
                present,
                at,
                namespace,
                belief,
                ..
            } => {
                let fresh = *namespace == index
                    && *belief == belief_now
                    && (*present <= computed || now.saturating_sub(*at) < lease_us * 3 / 4);
                if !fresh {
                    self.give_back_lease(id);
                    if let Some(request) = self.requests.get_mut(id) {
                        request.lookup = Lookup::None;
                        if request.asks < MOST_ASKS {
                            return Match::NeedHashes;
                        }
                    }
                    return self.settle(id);
                }
                let present = *present;
                self.offer(now, id, computed, present)
            }
        }
    }

    fn offer(&mut self, now: u64, id: &str, computed: u32, present: u32) -> Match {
        if present <= computed {
            if let Some(request) = self.requests.get_mut(id) {
                request.next = request.next.max(present);
            }
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
                let found = leading(&reply).min((hashes.len() / HASH_BYTES) as u32);
                let present = found.saturating_sub(u32::from(self.settings.drop_last));
                request.lookup = Lookup::Answered {
                    present,
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
        if self.port.submit_and_forget(body).is_ok() {
            self.counters.leases_released += 1;
        }
    }
}

/// How many blocks, from the first one on, can be loaded.
fn leading(reply: &LookupReply) -> u32 {
    let Some(presence) = reply.chains.first() else {
        return 0;
    };
    let mut end = 0;
    for ((start, length), place) in presence
        .start
        .iter()
        .zip(&presence.length)
        .zip(&presence.r#where)
    {
        let loadable = matches!(
            Where::try_from(*place),
            Ok(Where::Host | Where::Nvme | Where::Object | Where::Fetching)
        );
        if *start != end || !loadable {
            break;
        }
        end = start.saturating_add(*length);
    }
    end
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvd_wire::session::Presence;

    fn reply(runs: &[(u32, u32, Where)]) -> LookupReply {
        LookupReply {
            chains: vec![Presence {
                start: runs.iter().map(|run| run.0).collect(),
                length: runs.iter().map(|run| run.1).collect(),
                r#where: runs.iter().map(|run| run.2 as i32).collect(),
            }],
            lease: 0,
            ..LookupReply::default()
        }
    }

    #[test]
    fn only_the_leading_loadable_run_counts() {
        assert_eq!(leading(&reply(&[])), 0);
        assert_eq!(leading(&reply(&[(1, 3, Where::Host)])), 0);
        assert_eq!(
            leading(&reply(&[(0, 3, Where::Host), (3, 2, Where::Nvme)])),
            5
        );
        assert_eq!(
            leading(&reply(&[(0, 3, Where::Host), (3, 2, Where::Filling)])),
            3
        );
        assert_eq!(
            leading(&reply(&[(0, 3, Where::Host), (4, 2, Where::Host)])),
            3
        );
        assert_eq!(leading(&LookupReply::default()), 0);
    }
}
