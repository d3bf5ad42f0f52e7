//! Lookups, loads, and readers that copy now and check later.

use kvd_core::*;

use crate::common::*;
use crate::model::{GRAIN, Model, Read, crc, cut_of, print};

impl Model {
    pub(crate) fn lookup(&mut self, process: usize, list: &[[u8; 32]], lease: bool, leading: bool) {
        let Some(session) = self.session(process) else {
            return;
        };
        let got = self
            .world
            .lookup(session, list, u32::from(lease) * 5000, leading);
        let mut ended = false;
        for (at, hash) in (0..).zip(list) {
            let key = self.key(process, *hash);
            let wanted = if self.resident.contains_key(&key) {
                Where::Host
            } else if self
                .claims
                .iter()
                .any(|claim| claim.key == key && !claim.given_up)
            {
                Where::Filling
            } else {
                Where::Absent
            };
            ended |= leading && wanted == Where::Absent;
            let wanted = if ended { Where::Absent } else { wanted };
            assert_eq!(got.chains[0].at(at), wanted, "block {at}");
        }
    }

    pub(crate) fn load(&mut self, process: usize, base: u64, len: u64) {
        let Some(session) = self.session(process) else {
            return;
        };
        let list = hashes(base..base + len);
        let got = self.world.load(session, &list);
        let (mut at, mut crcs) = (0, &got.crcs[..]);
        for (hash, state) in list.iter().zip(&got.states) {
            let key = self.key(process, *hash);
            let here = self.resident.contains_key(&key);
            assert_eq!(
                *state == LoadState::Absent,
                !here,
                "a failure is not absence"
            );
            if *state != LoadState::Ready {
                continue;
            }
            let cut = got.cuts[got.cut[at] as usize].clone();
            let (own, rest) = crcs.split_at(cut.crc_count() as usize);
            crcs = rest;
            let (slot, word, offset) = (got.slots[at], got.generations[at], got.offsets[at]);
            assert_eq!(self.resident[&key].0, offset, "another block's place");
            let crcs = own.to_vec();
            self.reads.push(Read {
                process,
                session,
                key,
                slot,
                word,
                offset,
                cut,
                crcs,
                got: None,
            });
            at += 1;
        }
        assert!(crcs.is_empty() && at == got.slots.len());
    }

    /// A rogue process of the tenant writes over visible blocks.
    pub(crate) fn tamper(&mut self, pick: usize) {
        let count = self.resident.len().max(1);
        for (key, (offset, bytes)) in self.resident.iter().cycle().skip(pick % count).take(4) {
            let memory = self.memory.get_mut(&key.0).unwrap();
            memory[(*offset / GRAIN) as usize..][..(*bytes / GRAIN) as usize].fill(0xBAD);
            self.tampered = true;
        }
    }

    /// The reader copies; later it looks at the word again.
    pub(crate) fn copy_out(&mut self, pick: usize) {
        let count = self.reads.len().max(1);
        let Some(read) = self.reads.get_mut(pick % count) else {
            return;
        };
        let (_, geometry) = cut_of(self.processes[read.process].engine);
        let memory = &self.memory[&read.key.0];
        let grains = (geometry.block_bytes() / GRAIN) as usize;
        read.got = Some(memory[(read.offset / GRAIN) as usize..][..grains].to_vec());
    }

    /// Invariant 1: what passes the reader's checks is what was stored under this key.
    pub(crate) fn finish(&mut self, pick: usize) {
        let at = pick % self.reads.len().max(1);
        if self.reads.get(at).is_none_or(|read| read.got.is_none()) {
            return;
        }
        let read = self.reads.swap_remove(at);
        let tenant = read.key.0;
        let unchanged = self.world.words[&(tenant, read.slot)] == read.word;
        let (_, geometry) = cut_of(self.processes[read.process].engine);
        let got = read.got.unwrap();
        let mut sound = true;
        for part in 0..read.cut.parts() {
            let rect = read.cut.part(part);
            for (n, head) in rect.heads.clone().enumerate() {
                let value = |layer| {
                    let at = read.cut.head_offset(part, layer, head, &geometry) / GRAIN;
                    let grains = &got[at as usize..][..(geometry.head_bytes() / GRAIN) as usize];
                    if grains.iter().all(|grain| *grain == grains[0]) {
                        grains[0]
                    } else {
                        0
                    }
                };
                let wanted = read.crcs[read.cut.crc_base(part) as usize + n];
                let matches = crc(rect.layers.clone().map(value)) == wanted;
                let right = rect
                    .layers
                    .clone()
                    .all(|layer| value(layer) == print(&read.key, layer, head));
                assert_eq!(matches, right, "a checksum of another block");
                sound &= right;
            }
        }
        assert!(
            !unchanged || sound || self.tampered,
            "wrong bytes under an unchanged word"
        );
        if self.session(read.process) == Some(read.session) {
            let corrupt: &[u32] = if unchanged && !sound { &[0] } else { &[] };
            self.world
                .release(read.session, &[read.slot], &[read.word], corrupt);
        }
    }
}
