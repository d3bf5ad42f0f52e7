//! The scheduler of a simulated engine: prompts of families with shared prefixes, lookups, reservations, orders to the workers.
//!
//! As in the connector, a store order names the connection that each rank had when the reservation was *sent*: a rank with
//! another one is no writer of those slots.

use std::rc::Rc;

use kvd_core::{LookupReply, Presence, Where};

use crate::ask::{Ask, OwnChain};
use crate::engine::{Order, Pending};
use crate::model::Held;
use crate::rng::mix;
use crate::world::World;

/// The hash of block `at` of a prompt that leaves its family's trunk at `branch`. Hashes of all families share a few endings,
/// so that the index must compare all of a hash.
fn block_hash(family: u64, branch: u64, fork: u64, at: u64) -> [u8; 32] {
    let place = if at < fork {
        [family, u64::MAX, at]
    } else {
        [family, branch, at]
    };
    let mut hash = [0; 32];
    for (word, chunk) in hash.chunks_mut(8).enumerate() {
        let full = mix(&[place[0], place[1], place[2], word as u64]);
        let value = if word == 3 { full % 13 } else { full };
        chunk.copy_from_slice(&value.to_be_bytes());
    }
    hash
}

impl World {
    /// A prompt.
    pub(crate) fn prompt(&mut self) -> Vec<[u8; 32]> {
        let family = self.rng.below(self.config.families) as u64;
        let branch = self.rng.below(6) as u64;
        let length = self.rng.range(1, self.config.prompt as u64);
        let fork = 2 + branch;
        (0..length)
            .map(|at| block_hash(family, branch, fork, at))
            .collect()
    }

    /// Something of what a scheduler does.
    pub(crate) fn schedule(&mut self, p: usize) {
        // The client library has a bound too.
        if !self.procs[p].ready || self.procs[p].pending.len() >= 16 {
            return;
        }
        match self.rng.below(8) {
            0 | 1 => self.hear_ranks(p),
            2 => self.end_lease(p),
            3 if !self.quiet => self.reserve_unasked(p),
            _ if !self.quiet => self.look_up(p),
            _ => self.end_lease(p),
        }
    }

    /// Reads what the workers say of their connections.
    fn hear_ranks(&mut self, p: usize) {
        let instance = &self.instances[self.procs[p].instance];
        let known = instance.procs[..instance.world() as usize]
            .iter()
            .map(|w| &self.procs[*w])
            .map(|worker| {
                if worker.alive && worker.ready {
                    worker.token
                } else {
                    0
                }
            })
            .collect();
        self.procs[p].known = known;
    }

    fn end_lease(&mut self, p: usize) {
        if self.instances[self.procs[p].instance].hoarder && !self.quiet {
            self.procs[p].leases.clear();
        }
        if let Some(lease) = self.procs[p].leases.pop() {
            let ask = Ask::Release {
                slots: vec![],
                generations: vec![],
                corrupt: vec![],
                lease,
            };
            self.send(p, ask, Pending::Other);
        }
    }

    fn some_group(&mut self, p: usize) -> (usize, u32) {
        let spaces = &self.instances[self.procs[p].instance].spaces;
        let space = spaces[self.rng.below(spaces.len())];
        let group = self.rng.below(self.config.namespaces[space].groups.len()) as u32;
        (space, group)
    }

    fn look_up(&mut self, p: usize) {
        let most = self.config.node.core.max_hashes as usize;
        let (space, group) = self.some_group(p);
        let mut hashes = self.prompt();
        hashes.truncate(most);
        let Some(namespace) = self.short(p, space) else {
            return;
        };
        let ask = Ask::Lookup {
            namespace,
            chains: vec![chain_from(group, &hashes, 0)],
            lease_ms: if self.rng.one_in(2) {
                0
            } else {
                self.rng.range(1, 500) as u32
            },
            leading: self.rng.one_in(2),
        };
        self.send(
            p,
            ask,
            Pending::Lookup {
                space,
                group,
                hashes,
            },
        );
    }

    /// The answer to a lookup: what is there is loaded, what follows is stored.
    pub(crate) fn looked_up(
        &mut self,
        p: usize,
        space: usize,
        group: u32,
        hashes: &[[u8; 32]],
        found: &LookupReply,
    ) {
        if found.lease != 0 {
            self.procs[p].leases.push(found.lease);
        }
        let hits = found.chains.first().map_or(0, leading_hits);
        if self.quiet {
            return;
        }
        if hits > 0 {
            let order = Order::Load {
                space,
                group,
                hashes: hashes[..hits].to_vec(),
            };
            for worker in self.workers_of(p) {
                self.procs[worker].orders.push_back(order.clone());
            }
        }
        let from = hits.min(hashes.len());
        self.reserve(p, space, vec![chain_from(group, hashes, from)]);
    }

    /// A prompt's blocks, of one group or, as the connector asks for them, of all: then of some only the last ones, and a list may come in
    /// two pieces, the second after the first.
    fn reserve_unasked(&mut self, p: usize) {
        let (space, group) = self.some_group(p);
        let hashes = self.prompt();
        let mut chains = vec![chain_from(group, &hashes, 0)];
        if self.rng.one_in(2) {
            let groups = 0..self.config.namespaces[space].groups.len() as u32;
            for other in groups.filter(|other| *other != group) {
                let from = self.rng.below(hashes.len());
                chains.push(chain_from(other, &hashes, from));
            }
            if self.rng.one_in(4) && hashes.len() > 1 {
                let cut = 1 + self.rng.below(hashes.len() - 1);
                chains[0].hashes.truncate(cut);
                chains.insert(1, chain_from(group, &hashes, cut));
            }
        }
        self.reserve(p, space, chains);
    }

    fn reserve(&mut self, p: usize, space: usize, mut chains: Vec<OwnChain>) {
        let mut room = self.config.node.core.max_hashes as usize;
        for chain in &mut chains {
            chain.hashes.truncate(room);
            room -= chain.hashes.len();
        }
        chains.retain(|chain| !chain.hashes.is_empty());
        let Some(namespace) = self.short(p, space).filter(|_| !chains.is_empty()) else {
            return;
        };
        if self.procs[p].role.copies() {
            self.procs[p].known = vec![self.procs[p].token];
        }
        let known = self.procs[p].known.clone();
        if known.contains(&0) {
            return;
        }
        if chains.len() > 1 {
            self.counters.add("reservations of several lists");
        }
        let ask = Ask::Reserve { namespace, chains };
        self.send(p, ask, Pending::Reserve { space, known });
    }

    fn workers_of(&self, p: usize) -> Vec<usize> {
        let instance = &self.instances[self.procs[p].instance];
        instance.procs[..instance.world() as usize].to_vec()
    }

    /// Slots were given: the workers are told, or, the request being gone, nobody is.
    pub(crate) fn reserved(&mut self, p: usize, space: usize, known: Vec<u64>, blocks: Vec<Held>) {
        blocks.iter().for_each(|block| {
            self.untold.remove(&block.seed);
        });
        if blocks.is_empty() {
            return;
        }
        if self.rng.one_in(12) {
            let ask = Ask::Abort {
                slots: blocks.iter().map(|b| b.slot).collect(),
                generations: blocks.iter().map(|b| b.generation).collect(),
            };
            self.send(p, ask, Pending::Other);
            self.counters.add("reservations aborted");
            return;
        }
        let blocks = Rc::new(blocks);
        let incarnation = self.procs[p].incarnation;
        for (worker, token) in self.workers_of(p).into_iter().zip(known) {
            let order = Order::Store {
                space,
                blocks: blocks.clone(),
                token,
                incarnation,
            };
            self.procs[worker].orders.push_back(order);
        }
    }
}

/// A prompt's blocks of a group, from this one on.
fn chain_from(group: u32, hashes: &[[u8; 32]], from: usize) -> OwnChain {
    OwnChain {
        group,
        hashes: hashes[from..].to_vec(),
        parent: from.checked_sub(1).map(|at| hashes[at]),
    }
}

/// Blocks from the first on that can be loaded, from wherever.
fn leading_hits(runs: &Presence) -> usize {
    let mut end = 0;
    for ((start, length), place) in runs.start.iter().zip(&runs.length).zip(&runs.place) {
        if *start != end || !matches!(place, Where::Host | Where::Nvme | Where::Fetching) {
            break;
        }
        end += length;
    }
    end as usize
}
