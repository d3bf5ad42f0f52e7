//! A worker of a simulated engine that stores: takes orders, writes its part window by window, commits with the checksums of
//! what it wrote.

use kvd_core::replica_of;

use crate::ask::Ask;
use crate::checks::ActiveWrite;
use crate::config;
use crate::content;
use crate::engine::{Order, Pending};
use crate::memory::Mapping;
use crate::model::Held;
use crate::plant::Plant;
use crate::report::Check;
use crate::world::World;

/// A part being written.
pub(crate) struct Store {
    pub(crate) job: u64,
    pub(crate) space: usize,
    pub(crate) held: Held,
    /// Where the part begins in the arena.
    pub(crate) offset: u64,
    pub(crate) bytes: Vec<u8>,
    pub(crate) done: usize,
    pub(crate) crcs: Vec<u64>,
    /// Under which session.
    pub(crate) token: u64,
    pub(crate) mapping: Mapping,
    /// Its engine lies: nobody may rely on who writes what here, so what it writes counts as tampering.
    pub(crate) suspect: bool,
    /// It must not commit this any more.
    pub(crate) rogue: bool,
    /// Planted: it was committed before it was written.
    pub(crate) committed: bool,
}

impl World {
    /// Takes the next order.
    pub(crate) fn take_order(&mut self, p: usize) -> Check {
        if !self.procs[p].ready {
            return Ok(());
        }
        self.event("order", [p as u64, self.procs[p].token, 0]);
        match self.procs[p].orders.pop_front() {
            Some(Order::Load {
                space,
                group,
                hashes,
            }) => {
                let blocks = hashes.into_iter().map(|hash| (space, group, hash));
                self.procs[p].to_load.extend(blocks);
            }
            Some(Order::Store {
                space,
                blocks,
                token,
                incarnation,
            }) => {
                let stale = self.options.plant == Some(Plant::StaleOrders);
                if token != self.procs[p].token && !stale {
                    // Core may have recorded this connection or the earlier one. Saying that this one will not write is right
                    // in both cases; saying nothing would keep the slots until this connection ends. Another daemon must
                    // not be told: there the same slot and generation may be a reservation that is being filled.
                    self.counters.add("orders for another connection");
                    if incarnation != self.procs[p].incarnation {
                        if self.options.plant != Some(Plant::StaleAborts) {
                            return Ok(());
                        }
                        // Late, so that it meets new reservations.
                        if !self.rng.one_in(8) {
                            let order = Order::Store {
                                space,
                                blocks,
                                token,
                                incarnation,
                            };
                            self.procs[p].orders.push_back(order);
                            return Ok(());
                        }
                    }
                    self.not_written(p, &blocks);
                    return Ok(());
                }
                for held in blocks.iter() {
                    self.begin_store(p, space, held)?;
                }
            }
            None => {}
        }
        Ok(())
    }

    fn not_written(&mut self, p: usize, blocks: &[Held]) {
        let ask = Ask::Abort {
            slots: blocks.iter().map(|b| b.slot).collect(),
            generations: blocks.iter().map(|b| b.generation).collect(),
        };
        self.send(p, ask, Pending::Other);
    }

    fn begin_store(&mut self, p: usize, space: usize, held: &Held) -> Check {
        let proc = &self.procs[p];
        let instance = &self.instances[proc.instance];
        let place = |rank| config::cut_of(&held.geometry, instance.pp, instance.tp, rank).1;
        let part = place(proc.rank);
        let replicas: Vec<u32> = (0..instance.world())
            .filter(|rank| place(*rank) == part)
            .collect();
        if replicas[replica_of(&held.key.hash.0, replicas.len())] != proc.rank {
            return Ok(());
        }
        let Some(mapping) = proc.mapping.clone() else {
            return Ok(());
        };
        let moved_on = mapping.word(held.slot) != held.generation
            && self.options.plant != Some(Plant::StaleOrders);
        if moved_on || self.rng.one_in(20) {
            // The engine has freed the block, or the reservation is over already: say that nothing will be written.
            self.event(
                "not written",
                [p as u64, u64::from(held.slot), held.generation],
            );
            self.not_written(p, std::slice::from_ref(held));
            self.counters.add("parts aborted");
            return Ok(());
        }
        let rect = held.cut.part(part);
        let bytes = content::part(held.seed, &held.geometry, &held.cut, part);
        let crcs = content::part_crcs(&held.geometry, &rect, &bytes);
        self.next_job += 1;
        let store = Store {
            job: self.next_job,
            space,
            offset: held.offset + held.cut.part_offset(part, &held.geometry),
            held: held.clone(),
            bytes,
            done: 0,
            crcs,
            token: self.procs[p].token,
            mapping,
            suspect: held.suspect,
            rogue: false,
            committed: false,
        };
        let write = ActiveWrite {
            job: store.job,
            proc: p,
            memory: store.mapping.memory.serial,
            offset: store.offset,
            len: store.bytes.len() as u64,
            generation: held.generation,
        };
        self.event("store", [p as u64, u64::from(held.slot), held.generation]);
        let suspect = store.suspect;
        self.procs[p].stores.push(store);
        if suspect {
            Ok(())
        } else {
            self.begin_write(write)
        }
    }

    /// Writes one window of one store.
    pub(crate) fn write_some(&mut self, p: usize, at: usize) -> Check {
        let most = self.window();
        let window = self.rng.range(1, most) as usize;
        let store = &mut self.procs[p].stores[at];
        let to = (store.done + window).min(store.bytes.len());
        let (from, offset) = (store.done, store.offset + store.done as u64);
        store.mapping.memory.write(offset, &store.bytes[from..to]);
        if store.suspect {
            store.mapping.memory.mark(offset, (to - from) as u64);
        }
        store.done = to;
        let (job, over, stale) = (
            store.job,
            to == store.bytes.len(),
            store.token != self.procs[p].token,
        );
        if over {
            self.end_write(job);
            let done = &self.procs[p].stores[at];
            if stale || done.rogue || done.committed {
                // Nobody can commit it any more.
                self.procs[p].stores.remove(at);
            }
        }
        Ok(())
    }

    /// Commits what is written, a few blocks of one group at a time; now and then gives a copy up in the middle.
    pub(crate) fn commit(&mut self, p: usize) {
        self.drop_stale_stores(p);
        if self.rng.one_in(60) && !self.procs[p].stores.is_empty() {
            self.abort_one(p);
            return;
        }
        let early = self.options.plant == Some(Plant::EarlyCommit);
        let token = self.procs[p].token;
        let fit = |s: &Store| {
            let written = s.done == s.bytes.len() || early && s.done > 0;
            s.token == token && !s.rogue && !s.committed && written
        };
        let Some(first) = self.procs[p].stores.iter().find(|s| fit(s)) else {
            return;
        };
        let (space, group) = (first.space, first.held.key.group);
        let Some(namespace) = self.short(p, space) else {
            return;
        };
        let most = self.rng.range(1, 8) as usize;
        let (mut slots, mut generations, mut crcs, mut jobs) = (vec![], vec![], vec![], vec![]);
        for store in &mut self.procs[p].stores {
            if fit(store)
                && store.space == space
                && store.held.key.group == group
                && slots.len() < most
            {
                slots.push(store.held.slot);
                generations.push(store.held.generation);
                crcs.extend_from_slice(&store.crcs);
                store.committed = true;
                jobs.push(store.job);
            }
        }
        self.procs[p]
            .stores
            .retain(|s| !s.committed || s.done < s.bytes.len());
        let ask = Ask::Commit {
            namespace,
            group,
            slots,
            generations,
            crcs,
        };
        if self.send(p, ask, Pending::Other) {
            self.counters.add_n("parts committed", jobs.len() as u64);
        }
    }

    /// What was written under a session that is over can't be committed.
    fn drop_stale_stores(&mut self, p: usize) {
        let token = self.procs[p].token;
        let over = |s: &Store| s.token != token && s.done == s.bytes.len();
        self.procs[p].stores.retain(|s| !over(s));
    }

    fn abort_one(&mut self, p: usize) {
        let at = self.rng.below(self.procs[p].stores.len());
        if self.procs[p].stores[at].token != self.procs[p].token
            || self.procs[p].stores[at].committed
        {
            return;
        }
        let store = self.procs[p].stores.remove(at);
        self.end_write(store.job);
        self.not_written(p, &[store.held]);
        self.counters.add("parts aborted in mid-copy");
    }
}
