//! Judges every reply against the model, at the moment it leaves the node.

use std::rc::Rc;

use kvd_core::record::NamespaceRecord;
use kvd_core::{
    ArenaShape, BlockHash, CommitState, LoadReply, LoadState, LookupReply, NamespaceId, Reply,
    ReserveReply, ReserveState, Where,
};

use crate::ask::{Ask, OwnChain};
use crate::config::{self, NamespaceSpec};
use crate::model::{Held, Key};
use crate::report::{Broken, Check, ensure};
use crate::rng::mix;
use crate::tiers::Wait;
use crate::world::World;

impl World {
    /// Checks a reply, and hands back what the model knows of the slots in it.
    pub(crate) fn judge_reply(
        &mut self,
        session: u64,
        ask: &Ask,
        wait: Option<&Wait>,
        reply: &Reply,
    ) -> Check<Vec<Held>> {
        let mut held = Vec::new();
        let code = match (ask, reply) {
            (_, Reply::Failure(failure)) => {
                self.counters.add("failures");
                100 + failure.kind as u64
            }
            (
                Ask::Register { record, .. },
                Reply::Registered {
                    namespace,
                    id,
                    arena,
                },
            ) => {
                self.judge_registered(session, record, *namespace, *id, *arena)?;
                1
            }
            (
                Ask::Lookup {
                    namespace,
                    chains,
                    leading,
                    ..
                },
                Reply::Lookup(found),
            ) => {
                self.judge_lookup(session, *namespace, chains, *leading, found)?;
                2
            }
            (Ask::Reserve { namespace, chains }, Reply::Reserve(given)) => {
                held = self.judge_reserve(session, *namespace, chains, given)?;
                3
            }
            (Ask::Commit { slots, .. }, Reply::Commit(states)) => {
                ensure!(
                    states.len() == slots.len(),
                    5,
                    "{} states for {} slots",
                    states.len(),
                    slots.len()
                );
                let stale = states.iter().filter(|s| **s == CommitState::Stale).count();
                self.counters.add_n("commits stale", stale as u64);
                4
            }
            (Ask::Abort { .. }, Reply::Aborted { .. }) => 5,
            (
                Ask::Load {
                    namespace,
                    group,
                    hashes,
                    ..
                },
                Reply::Load(found),
            ) => {
                held = self.judge_load((session, wait), *namespace, *group, hashes, found)?;
                6
            }
            (Ask::Release { .. }, Reply::Released) => 7,
            (Ask::Fence { .. }, Reply::Fenced) => 8,
            _ => {
                ensure!(false, 5, "{ask:?} was answered {reply:?}");
                0
            }
        };
        self.event("reply", [session, code, held.len() as u64]);
        Ok(held)
    }

    fn judge_registered(
        &mut self,
        session: u64,
        record: &[u8],
        short: u32,
        id: NamespaceId,
        arena: ArenaShape,
    ) -> Check {
        let tenant = self.session(session).map_or(0, |info| info.tenant);
        let known = NamespaceRecord::parse(record).ok();
        ensure!(
            known.is_some(),
            8,
            "a record that can't be read was registered"
        );
        if let Some(record) = known {
            let name = config::tenant_name(usize::from(tenant));
            let own = record.get("tenant") == Some(name.as_str());
            ensure!(own, 10, "a record of another tenant was registered");
            ensure!(
                record.id() == id,
                10,
                "registered as {id}, not as {}",
                record.id()
            );
            self.learn_name(session, short, tenant, &record);
        }
        let shape = self.arenas.current(tenant).map(|m| m.shape);
        ensure!(
            shape == Some(arena),
            10,
            "the arena of the reply is not the tenant's"
        );
        Ok(())
    }

    fn learn_name(&mut self, session: u64, short: u32, tenant: u16, record: &NamespaceRecord) {
        let spec = NamespaceSpec {
            tenant,
            record: Vec::new(),
            id: record.id(),
            groups: record.groups().to_vec(),
        };
        if let Some(info) = self
            .daemon
            .as_mut()
            .and_then(|d| d.sessions.get_mut(&session))
        {
            info.names.insert(short, Rc::new(spec));
        }
    }

    /// The namespace that a session means; a reply that is no failure must have one.
    fn meant(&self, session: u64, short: u32) -> Check<Rc<NamespaceSpec>> {
        let spec = self
            .session(session)
            .and_then(|info| info.names.get(&short))
            .cloned();
        spec.ok_or_else(|| Broken {
            invariant: 10,
            text: format!(
                "session {session:x} was served for namespace {short}, which it has not registered"
            ),
        })
    }

    fn judge_lookup(
        &mut self,
        session: u64,
        short: u32,
        chains: &[OwnChain],
        leading: bool,
        found: &LookupReply,
    ) -> Check {
        let spec = self.meant(session, short)?;
        ensure!(
            found.chains.len() == chains.len(),
            5,
            "{} answers for {} chains",
            found.chains.len(),
            chains.len()
        );
        let t = &self.model.tenants[usize::from(spec.tenant)];
        let (mut hits, mut absent) = (0, 0);
        for (chain, runs) in chains.iter().zip(&found.chains) {
            let mut place = vec![Where::Absent; chain.hashes.len()];
            let mut end = 0;
            for ((start, length), at) in runs.start.iter().zip(&runs.length).zip(&runs.place) {
                ensure!(
                    *start >= end && *length > 0,
                    7,
                    "runs of a lookup overlap: {runs:?}"
                );
                end = start + length;
                ensure!(
                    end as usize <= place.len(),
                    7,
                    "a run beyond the chain: {runs:?}"
                );
                place[*start as usize..end as usize].fill(*at);
            }
            let mut exact = true;
            for (hash, at) in chain.hashes.iter().zip(place) {
                let key = Key {
                    tenant: spec.tenant,
                    namespace: spec.id,
                    group: chain.group,
                    hash: BlockHash(*hash),
                };
                let held = t.by_key.contains_key(&key);
                match at {
                    Where::Host => {
                        hits += 1;
                        ensure!(
                            held,
                            if self.others_hold(&key) { 10 } else { 7 },
                            "{key:?} was found, but nobody stored it"
                        );
                    }
                    Where::Filling => ensure!(
                        !held && t.being_stored(&key),
                        7,
                        "{key:?} is not being filled"
                    ),
                    Where::Fetching => {
                        ensure!(!held && t.coming(&key), 7, "{key:?} is not coming up")
                    }
                    Where::Nvme => {
                        hits += 1;
                        let below = !held && self.is_below(&key);
                        ensure!(below, 7, "{key:?} is not in a store, or in host memory too");
                    }
                    Where::Absent => {
                        absent += 1;
                        let held = held || self.is_below(&key);
                        ensure!(!held || !exact, 7, "{key:?} was said to be absent");
                        exact &= !leading;
                    }
                    other => ensure!(false, 7, "{key:?} is said to be in {other:?}"),
                }
            }
        }
        self.counters.add_n("lookup hits", hits);
        self.counters.add_n("lookup misses", absent);
        Ok(())
    }

    fn others_hold(&self, key: &Key) -> bool {
        let keys = self.model.tenants.iter().flat_map(|t| t.by_key.keys());
        keys.into_iter().any(|other| other.hash == key.hash)
    }

    fn judge_reserve(
        &mut self,
        session: u64,
        short: u32,
        chains: &[OwnChain],
        given: &ReserveReply,
    ) -> Check<Vec<Held>> {
        let spec = self.meant(session, short)?;
        let count = given
            .states
            .iter()
            .filter(|s| **s == ReserveState::Reserved)
            .count();
        let lists = [
            given.slots.len(),
            given.generations.len(),
            given.offsets.len(),
        ];
        let asked = chains
            .iter()
            .flat_map(|chain| chain.hashes.iter().map(|hash| (chain.group, hash)));
        ensure!(
            given.states.len() == asked.clone().count() && lists == [count; 3],
            5,
            "a reservation with lists of wrong lengths"
        );
        let proc = self.session(session).map_or(0, |info| info.proc);
        let mut all = Vec::new();
        for ((group, hash), state) in asked.zip(&given.states) {
            let key = Key {
                tenant: spec.tenant,
                namespace: spec.id,
                group,
                hash: BlockHash(*hash),
            };
            let t = &self.model.tenants[usize::from(spec.tenant)];
            match state {
                ReserveState::Present => ensure!(
                    t.by_key.contains_key(&key),
                    7,
                    "{key:?} is said to be present"
                ),
                ReserveState::Filling => {
                    ensure!(t.filling(&key), 7, "{key:?} is said to be being filled")
                }
                ReserveState::NoSpace => self.counters.add("no space"),
                ReserveState::Reserved => {
                    ensure!(
                        !t.by_key.contains_key(&key),
                        6,
                        "{key:?} is held and was reserved again"
                    );
                    let at = all.len();
                    let held = self.new_claim(proc, &spec, key, given, at)?;
                    all.push(held);
                }
            }
        }
        self.counters.add_n("slots reserved", count as u64);
        Ok(all)
    }

    fn new_claim(
        &mut self,
        proc: usize,
        spec: &NamespaceSpec,
        key: Key,
        given: &ReserveReply,
        at: usize,
    ) -> Check<Held> {
        let (slot, generation, offset) =
            (given.slots[at], given.generations[at], given.offsets[at]);
        let geometry = spec.groups[key.group as usize].clone();
        let instance = self.procs[proc].instance;
        let degrees = &self.instances[instance];
        let cut = config::cut_of(&geometry, degrees.pp, degrees.tp, 0).0;
        self.versions += 1;
        let seed = mix(&[self.versions, BlockHash(key.hash.0).low64()]);
        let held = Held {
            key,
            slot,
            generation,
            offset,
            len: geometry.slot_bytes(),
            version: self.versions,
            seed,
            cut,
            suspect: degrees.liar,
            geometry,
            coming: false,
        };
        let t = &mut self.model.tenants[usize::from(spec.tenant)];
        let Some(mapping) = t.mapping.clone() else {
            return Ok(held);
        };
        ensure!(
            generation % 2 == 1,
            3,
            "slot {slot} was given under the even generation {generation}"
        );
        ensure!(
            mapping.word(slot) == generation,
            3,
            "slot {slot} was given before its word said so"
        );
        let size = mapping.shape.extent_bytes;
        let (extent, index) = (
            slot / mapping.shape.slots_per_extent,
            slot % mapping.shape.slots_per_extent,
        );
        let right = u64::from(extent) * size + u64::from(index) * held.len;
        ensure!(
            offset == right,
            2,
            "slot {slot} was said to be at {offset:#x}, not {right:#x}"
        );
        ensure!(
            offset % size + held.len <= size,
            2,
            "slot {slot} sticks out of its extent"
        );
        t.claim(held.clone())?;
        self.untold.insert(seed);
        self.no_writers(mapping.memory.serial, offset, held.len, "given away")?;
        mapping.memory.poison(offset, held.len, generation);
        Ok(held)
    }

    /// A block is Failed only if a tier held it when it was asked for, or does now; Absent only if none does now, and none did then
    /// that could not be asked at once, unless it was dropped from host memory meanwhile.
    fn judge_load(
        &mut self,
        (session, wait): (u64, Option<&Wait>),
        short: u32,
        group: u32,
        hashes: &[[u8; 32]],
        found: &LoadReply,
    ) -> Check<Vec<Held>> {
        let spec = self.meant(session, short)?;
        let count = found
            .states
            .iter()
            .filter(|s| **s == LoadState::Ready)
            .count();
        let lists = [
            found.slots.len(),
            found.generations.len(),
            found.offsets.len(),
            found.cut.len(),
        ];
        ensure!(
            found.states.len() == hashes.len() && lists == [count; 4],
            5,
            "a load with lists of wrong lengths"
        );
        let t = &self.model.tenants[usize::from(spec.tenant)];
        let mut all = Vec::new();
        let mut crcs = 0;
        for (n, (hash, state)) in hashes.iter().zip(&found.states).enumerate() {
            let key = Key {
                tenant: spec.tenant,
                namespace: spec.id,
                group,
                hash: BlockHash(*hash),
            };
            let slot = t.by_key.get(&key);
            let below = self.is_stored(&key) || t.coming(&key);
            let was = wait.is_some_and(|wait| wait.below[n]);
            match state {
                LoadState::Absent => {
                    let removed = t.removed.get(&key).copied().unwrap_or(0);
                    let lost = wait.is_some_and(|wait| removed > wait.call);
                    ensure!(
                        slot.is_none() && !below && (!was || lost),
                        7,
                        "{key:?} is held, but a load found it absent (host {slot:?}, below {below}, was {was})"
                    );
                }
                LoadState::Failed => {
                    ensure!(
                        slot.is_some() || below || was,
                        7,
                        "{key:?} is not held, but a load failed instead of finding it absent"
                    );
                    self.counters.add("loads refused");
                }
                LoadState::Ready => {
                    let at = all.len();
                    let held = slot.and_then(|slot| t.residents.get(slot));
                    let held = self.judge_ready(&key, held, found, at)?;
                    crcs += found.cuts[found.cut[at] as usize].crc_count() as usize;
                    all.push(held);
                }
            }
        }
        ensure!(
            found.crcs.len() == crcs,
            1,
            "{} checksums instead of {crcs}",
            found.crcs.len()
        );
        Ok(all)
    }

    /// One block that a load may read: it is held, where and as the reply says.
    fn judge_ready(
        &self,
        key: &Key,
        held: Option<&Held>,
        found: &LoadReply,
        at: usize,
    ) -> Check<Held> {
        let number = if self.others_hold(key) { 10 } else { 7 };
        let Some(held) = held else {
            let text = format!("{key:?} was given to read, but it is not held");
            return Err(Broken {
                invariant: number,
                text,
            });
        };
        let given = (found.slots[at], found.generations[at], found.offsets[at]);
        let right = (held.slot, held.generation, held.offset);
        ensure!(given == right, 3, "{key:?} is said to be at {given:x?}");
        let cut = found.cuts.get(found.cut[at] as usize);
        let right = cut.is_some_and(|cut| *cut == held.cut || held.suspect);
        ensure!(right, 1, "{key:?} is said to be cut as {cut:?}");
        Ok(held.clone())
    }
}
