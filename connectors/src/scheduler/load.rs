//! Loads: from the engine's allocation of blocks until every rank has said that its copies into them are over.

use super::Scheduler;
use super::port::Port;
use super::request::Lookup;
use crate::HASH_BYTES;
use crate::meta::LoadOrder;

/// A load under way.
#[derive(Debug)]
pub(crate) struct ActiveLoad {
    request: String,
    /// Position in the chain of the first block that is loaded.
    first: u32,
    hashes: Vec<u8>,
    blocks: Vec<u32>,
    lease: u64,
    /// Position in the chain of the first block that some rank could not load.
    failed: Option<u32>,
}

impl ActiveLoad {
    /// Its lookup lease is gone with the session that gave it.
    pub(crate) fn forget_lease(&mut self) {
        self.lease = 0;
    }
}

impl<P: Port> Scheduler<P> {
    /// The engine has allocated blocks for a request: `external` of them, beyond those that it has, are to be loaded. `blocks`
    /// are all of the request's. Called with 0 when there is nothing (more) to load.
    pub fn allocated(&mut self, id: &str, external: u32, blocks: &[u32]) {
        let Some(request) = self.requests.get_mut(id) else {
            return;
        };
        let offer = request.offer.take();
        if request.loading {
            return;
        }
        let Some((first, most)) = offer.filter(|_| external > 0) else {
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
            lease,
            namespace,
            ..
        } = std::mem::replace(&mut request.lookup, Lookup::Settled)
        else {
            return;
        };
        let (from, to) = (first as usize, (first + external.min(most)) as usize);
        if blocks.len() < to || hashes.len() < to * HASH_BYTES {
            self.release(lease);
            self.notices.warn(
                "the engine allocated fewer blocks than it said; a load was given up and will be reported as failed",
            );
            return;
        }
        request.loading = true;
        request.next = to as u32;
        let load = ActiveLoad {
            request: id.to_owned(),
            first,
            hashes: hashes[from * HASH_BYTES..to * HASH_BYTES].to_vec(),
            blocks: blocks[from..to].to_vec(),
            lease,
            failed: None,
        };
        self.counters.loads += 1;
        self.counters.loaded_blocks += load.blocks.len() as u64;
        self.pending_loads.push(LoadOrder {
            request: load.request.clone(),
            namespace,
            group: 0,
            hashes: load.hashes.clone(),
            blocks: load.blocks.clone(),
        });
        self.loads.push(load);
    }

    /// Whether another request's load under way covers the first block that this one lacks.
    pub(crate) fn loaded_by_another(&self, id: &str, computed: u32) -> bool {
        let Some(request) = self.requests.get(id) else {
            return false;
        };
        let Lookup::Answered { hashes, .. } = &request.lookup else {
            return false;
        };
        let at = computed as usize * HASH_BYTES;
        let Some(wanted) = hashes.get(at..at + HASH_BYTES) else {
            return false;
        };
        self.loads.iter().any(|load| {
            let at = (computed.wrapping_sub(load.first) as usize).saturating_mul(HASH_BYTES);
            computed >= load.first
                && load.request != id
                && load.hashes.get(at..at + HASH_BYTES) == Some(wanted)
        })
    }

    /// Some ranks could not load these blocks.
    pub(crate) fn loads_failed(&mut self, invalid: &[u32]) {
        if invalid.is_empty() {
            return;
        }
        for load in &mut self.loads {
            let first = load.first;
            let failed = (first..)
                .zip(&load.blocks)
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
        if load.failed.is_some() {
            self.counters.load_failures += 1;
            // Others may have been promised the same blocks.
            self.belief += 1;
        }
        if let Some(request) = self.requests.get_mut(id) {
            request.loading = false;
            if let Some(failed) = load.failed {
                request.next = failed;
            }
        }
    }
}
