//! What faulty engines do: requests with wrong numbers, other people's slots, absurd sizes; writes where they must not be.
//!
//! A liar knows more than a real one could (the right generations of foreign slots, other sessions' tokens), so that what
//! protects the others is never mere luck. It does not know other instances' ids: those are secrets, and whoever has one is
//! that instance.

use kvd_core::Role;
use kvd_core::record::NamespaceRecord;

use crate::ask::{Ask, Layout, OwnChain};
use crate::daemon::Hello;
use crate::engine::Pending;
use crate::model::Held;
use crate::world::World;

impl World {
    /// A first message with something wrong in it.
    pub(crate) fn lie_in_hello(&mut self, p: usize, hello: &mut Hello) {
        self.counters.add("lies in hello");
        match self.rng.below(6) {
            0 => hello.rank = *self.rng.pick(&[1, 7, u32::MAX]),
            1 => hello.world = *self.rng.pick(&[0, 1, 9, u32::MAX]),
            2 => {
                hello.role =
                    *self
                        .rng
                        .pick(&[Role::Scheduler, Role::Worker, Role::Both, Role::Observer])
            }
            3 => hello.past = self.rng.next(),
            4 => hello.past = self.some_token(p),
            _ => {
                if let Some(offer) = &mut hello.offer {
                    offer.claimed.bytes *= 2;
                }
            }
        }
    }

    /// A token of somebody.
    fn some_token(&mut self, p: usize) -> u64 {
        let tenant = self.instances[self.procs[p].instance].tenant;
        let Some(daemon) = &self.daemon else { return 1 };
        let all = daemon
            .sessions
            .iter()
            .filter(|(_, info)| info.tenant == tenant);
        let all: Vec<u64> = all.map(|(token, _)| *token).collect();
        if all.is_empty() {
            1
        } else {
            *self.rng.pick(&all)
        }
    }

    /// Some slot in use in the tenant's arena.
    fn some_slot(&mut self, p: usize) -> Option<Held> {
        let tenant = self.instances[self.procs[p].instance].tenant;
        let t = &self.model.tenants[usize::from(tenant)];
        let all = t.claims.len() + t.residents.len();
        let at = self.rng.below(all);
        t.claims
            .values()
            .chain(t.residents.values())
            .nth(at)
            .cloned()
    }

    /// Sends something that it must not.
    pub(crate) fn lie(&mut self, p: usize) {
        if self.procs[p].token == 0 || self.procs[p].pending.len() >= 32 {
            return;
        }
        self.counters.add("lies");
        let ask = match self.rng.below(12) {
            0 => Some(self.lie_with_numbers()),
            1 => self.lie_about_foreign_slots(p),
            2 => self.lie_about_own_store(p),
            3 => Some(self.lie_in_chains()),
            4 => Some(self.lie_in_lists()),
            5 => Some(self.lie_in_register(p)),
            6 => Some(self.strange_record(p)),
            7 => Some(Ask::Fence {
                past: self.some_token(p),
            }),
            8 => self.lie_in_release(p),
            9 => Some(self.orphans(p)),
            10 => Some(self.too_much(p)),
            _ => Some(Ask::Fence {
                past: self.rng.next(),
            }),
        };
        if let Some(ask) = ask {
            self.event("lie", [p as u64, ask.code(), 0]);
            self.send(p, ask, Pending::Other);
        }
    }

    fn word(&mut self) -> u32 {
        let any = self.rng.next() as u32;
        *self.rng.pick(&[0, 1, 2, 5, 17, 64, any, u32::MAX])
    }

    fn lie_with_numbers(&mut self) -> Ask {
        let count = self.rng.below(5);
        let slots: Vec<u32> = (0..count).map(|_| self.word()).collect();
        let generations = (0..self.rng.below(5))
            .map(|_| u64::from(self.word()))
            .collect();
        match self.rng.below(3) {
            0 => Ask::Abort { slots, generations },
            1 => Ask::Release {
                slots,
                generations,
                corrupt: vec![self.word()],
                lease: self.rng.next(),
            },
            _ => {
                let crcs = vec![7; self.rng.below(9)];
                Ask::Commit {
                    namespace: self.word() % 4,
                    group: self.word() % 3,
                    slots,
                    generations,
                    crcs,
                }
            }
        }
    }

    fn lie_about_foreign_slots(&mut self, p: usize) -> Option<Ask> {
        let held = self.some_slot(p)?;
        let (slots, generations) = (vec![held.slot], vec![held.generation]);
        Some(match self.rng.below(3) {
            0 => Ask::Abort { slots, generations },
            1 => Ask::Release {
                slots,
                generations,
                corrupt: vec![0],
                lease: 0,
            },
            _ => {
                let heads = held.cut.part(0).heads.len();
                let crcs = vec![self.rng.next(); *self.rng.pick(&[heads, heads, 0, heads + 1])];
                Ask::Commit {
                    namespace: 0,
                    group: held.key.group,
                    slots,
                    generations,
                    crcs,
                }
            }
        })
    }

    /// Commits what is not written, or with wrong checksums.
    fn lie_about_own_store(&mut self, p: usize) -> Option<Ask> {
        let proc = &mut self.procs[p];
        let token = proc.token;
        let store = proc
            .stores
            .iter_mut()
            .find(|s| s.token == token && !s.rogue)?;
        store.rogue = true;
        let (space, group) = (store.space, store.held.key.group);
        let (slots, generations, mut crcs) = (
            vec![store.held.slot],
            vec![store.held.generation],
            store.crcs.clone(),
        );
        match self.rng.below(4) {
            0 => crcs.iter_mut().for_each(|crc| *crc ^= 1),
            1 => crcs.push(0),
            2 => crcs.clear(),
            _ => {}
        }
        let namespace = self.short(p, space)?;
        Some(Ask::Commit {
            namespace,
            group,
            slots,
            generations,
            crcs,
        })
    }

    fn lie_in_chains(&mut self) -> Ask {
        let hashes = self.prompt();
        let group = *self.rng.pick(&[0, 1, 2, 255, 256, u32::MAX]);
        let namespace = *self.rng.pick(&[0, 1, 31, u32::MAX]);
        let chain = OwnChain {
            group,
            parent: hashes.last().copied(),
            hashes,
        };
        match self.rng.below(3) {
            0 => Ask::Lookup {
                namespace,
                chains: vec![chain; 3],
                lease_ms: u32::MAX,
                leading: true,
            },
            1 => Ask::Reserve {
                namespace,
                chains: vec![chain],
            },
            _ => Ask::Load {
                namespace,
                group,
                hashes: chain.hashes,
                deadline_ms: 0,
            },
        }
    }

    /// The same hash twice in one list, or none at all.
    fn lie_in_lists(&mut self) -> Ask {
        let mut hashes = self.prompt();
        hashes.extend_from_within(..);
        if self.rng.one_in(4) {
            hashes.clear();
        }
        let chain = OwnChain {
            group: 0,
            parent: hashes.first().copied(),
            hashes,
        };
        match self.rng.below(3) {
            0 => Ask::Lookup {
                namespace: 0,
                chains: vec![chain.clone(), chain],
                lease_ms: 100,
                leading: false,
            },
            1 => Ask::Reserve {
                namespace: 0,
                chains: vec![chain.clone(), chain],
            },
            _ => Ask::Load {
                namespace: 0,
                group: 0,
                hashes: chain.hashes,
                deadline_ms: 0,
            },
        }
    }

    /// Garbage, or the record of another tenant.
    fn lie_in_register(&mut self, p: usize) -> Ask {
        let tenant = self.instances[self.procs[p].instance].tenant;
        let at = self.rng.below(self.config.namespaces.len());
        let mut record = self.config.namespaces[at].record.clone();
        if self.config.namespaces[at].tenant == tenant || self.rng.one_in(2) {
            let cut = self.rng.below(record.len());
            record.truncate(cut);
        }
        Ask::Register {
            record,
            groups: vec![],
        }
    }

    /// A good record with a layout that is not, or a record that nobody else has.
    fn strange_record(&mut self, p: usize) -> Ask {
        let instance = &self.instances[self.procs[p].instance];
        let own = &self.config.namespaces[instance.spaces[0]].record;
        let mut record = own.clone();
        if let Ok(known) = NamespaceRecord::parse(own) {
            let mut fields = known.fields().to_vec();
            fields.push(("x.nonce".to_owned(), self.rng.range(0, 40).to_string()));
            record = NamespaceRecord::build(fields).map_or(record, |r| r.encode());
        }
        let layer_bounds = self
            .rng
            .pick(&[
                vec![0, 2],
                vec![0],
                vec![0, u32::MAX],
                vec![0, 1, 1],
                vec![0, 1, 2],
            ])
            .clone();
        let head_bounds = self
            .rng
            .pick(&[vec![0, 1], vec![0, 2], vec![0, 1, 2]])
            .clone();
        let layout = Layout {
            group: self.word() % 3,
            layer_bounds,
            head_bounds,
            copies: self.rng.one_in(2),
            part: self.word() % 5,
        };
        let count = self.rng.below(3);
        Ask::Register {
            record,
            groups: vec![layout; count],
        }
    }

    /// Releases somebody else's lease, or says that a block is corrupt which is not.
    fn lie_in_release(&mut self, p: usize) -> Option<Ask> {
        let (slot, generation, _) = self.procs[p].read.pop()?;
        let corrupt = vec![0, 0, self.word() % 3];
        Some(Ask::Release {
            slots: vec![slot, slot],
            generations: vec![generation; 2],
            corrupt,
            lease: self.rng.next(),
        })
    }

    /// Reserves what nobody is going to write.
    fn orphans(&mut self, p: usize) -> Ask {
        let hashes = self.prompt();
        let groups = self.config.namespaces[self.instances[self.procs[p].instance].spaces[0]]
            .groups
            .len();
        let group = self.rng.below(groups) as u32;
        Ask::Reserve {
            namespace: 0,
            chains: vec![OwnChain {
                group,
                hashes,
                parent: None,
            }],
        }
    }

    fn too_much(&mut self, p: usize) -> Ask {
        let most = self.config.node.core.max_hashes as usize;
        let hashes = vec![[self.procs[p].rank as u8; 32]; most + 1];
        let chain = OwnChain {
            group: 0,
            hashes,
            parent: None,
        };
        match self.rng.below(4) {
            0 => Ask::Reserve {
                namespace: 0,
                chains: vec![chain],
            },
            1 => Ask::Load {
                namespace: 0,
                group: 0,
                hashes: chain.hashes,
                deadline_ms: 0,
            },
            2 => Ask::Abort {
                slots: vec![0; most + 1],
                generations: vec![1; most + 1],
            },
            _ => {
                let small = OwnChain {
                    group: 0,
                    hashes: vec![],
                    parent: None,
                };
                let count = self.config.node.core.max_chains as usize + 1;
                Ask::Lookup {
                    namespace: 0,
                    chains: vec![small; count],
                    lease_ms: 1,
                    leading: true,
                }
            }
        }
    }

    /// Writes over somebody's slot. The tenant is the trust domain, so nothing stops it; the checksum must tell.
    pub(crate) fn scribble(&mut self, p: usize) {
        let Some(mapping) = self.procs[p].mapping.clone() else {
            return;
        };
        let size = mapping.memory.len();
        let offset = match self.some_slot(p) {
            Some(held) if held.offset + held.len <= size => {
                held.offset + self.rng.range(0, held.len - 1)
            }
            _ => self.rng.range(0, size - 1),
        };
        let most = (size - offset).min(300);
        let len = self.rng.range(1, most) as usize;
        let bytes: Vec<u8> = (0..len).map(|_| self.rng.next() as u8).collect();
        mapping.memory.write(offset, &bytes);
        mapping.memory.mark(offset, len as u64);
        self.event("scribble", [p as u64, offset, len as u64]);
        self.counters.add("scribbles");
    }
}
