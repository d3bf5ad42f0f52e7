//! A worker of a simulated engine that loads: asks for blocks in a bounded window, copies its rectangle out of them window by
//! window, looks at the generation again, checks the checksums, releases.
//!
//! Here invariant 1 is judged: what passes the reader's own checks must be the bytes that were committed, and what fails them
//! must have a reason that the simulation knows of.

use kvd_core::{LoadReply, LoadState, Rect};

use crate::ask::Ask;
use crate::config;
use crate::content;
use crate::engine::Pending;
use crate::memory::Mapping;
use crate::model::Held;
use crate::plant::Plant;
use crate::report::{Check, ensure};
use crate::world::World;

/// One head of a stored part, all its layers: what one checksum covers.
struct Column {
    head: u32,
    first_layer: u32,
    crc: u64,
    /// Place in the buffer.
    from: usize,
    to: usize,
}

/// A block being read.
pub(crate) struct Read {
    held: Held,
    mapping: Mapping,
    pub(crate) token: u64,
    columns: Vec<Column>,
    /// (offset in the arena, place in the buffer), each one head of one layer.
    pieces: Vec<(u64, usize)>,
    buffer: Vec<u8>,
    done: usize,
}

impl World {
    /// Asks for the next few blocks, while few are being read.
    pub(crate) fn ask_to_load(&mut self, p: usize) {
        let proc = &mut self.procs[p];
        let waits = proc
            .pending
            .values()
            .any(|what| matches!(what, Pending::Load { .. }));
        if !proc.ready || waits || proc.reads.len() >= 4 {
            return;
        }
        let Some((space, group, first)) = proc.to_load.pop_front() else {
            return;
        };
        let mut hashes = vec![first];
        while hashes.len() < 4 {
            match proc.to_load.front() {
                Some((s, g, hash)) if (*s, *g) == (space, group) => {
                    hashes.push(*hash);
                    proc.to_load.pop_front();
                }
                _ => break,
            }
        }
        let Some(namespace) = self.short(p, space) else {
            return;
        };
        let deadline_ms = self.some_deadline();
        self.send(
            p,
            Ask::Load {
                namespace,
                group,
                hashes,
                deadline_ms,
            },
            Pending::Load { space },
        );
    }

    /// Blocks were given to read.
    pub(crate) fn may_read(&mut self, p: usize, _space: usize, found: &LoadReply, held: Vec<Held>) {
        let Some(mapping) = self.procs[p].mapping.clone() else {
            return;
        };
        let mut crcs = found.crcs.as_slice();
        for (held, cut) in held.into_iter().zip(&found.cut) {
            let cut = &found.cuts[*cut as usize];
            let (own, rest) = crcs.split_at(cut.crc_count() as usize);
            crcs = rest;
            if *cut != held.cut {
                continue;
            }
            let instance = &self.instances[self.procs[p].instance];
            let (mine, part) =
                config::cut_of(&held.geometry, instance.pp, instance.tp, self.procs[p].rank);
            let read = plan(
                held,
                &mine.part(part),
                own,
                mapping.clone(),
                self.procs[p].token,
            );
            self.procs[p].reads.push(read);
        }
        let failed = found
            .states
            .iter()
            .filter(|s| **s == LoadState::Failed)
            .count();
        self.counters.add_n("blocks refused", failed as u64);
    }

    /// Copies one window of one block out.
    pub(crate) fn read_some(&mut self, p: usize, at: usize) -> Check {
        let most = self.window();
        let mut left = self.rng.range(1, most) as usize;
        let read = &mut self.procs[p].reads[at];
        let size = read.held.geometry.head_bytes() as usize;
        while left > 0 && read.done < read.buffer.len() {
            let (offset, to) = read.pieces[read.done / size];
            let inside = read.done % size;
            let n = left.min(size - inside);
            let memory = &read.mapping.memory;
            memory.read(
                offset + inside as u64,
                &mut read.buffer[to + inside..to + inside + n],
            );
            read.done += n;
            left -= n;
        }
        if read.done < read.buffer.len() {
            return Ok(());
        }
        let read = self.procs[p].reads.remove(at);
        self.finish_read(p, &read)
    }

    fn finish_read(&mut self, p: usize, read: &Read) -> Check {
        let (slot, generation) = (read.held.slot, read.held.generation);
        if read.token != self.procs[p].token {
            self.counters.add("reads of an earlier connection");
            return Ok(());
        }
        let plant = self.options.plant;
        let overrun = read.mapping.word(slot) != generation;
        if overrun && plant != Some(Plant::SkipGeneration) {
            self.event("overrun", [p as u64, u64::from(slot), generation]);
            self.counters.add("reads overrun");
            self.procs[p].read.push((slot, generation, false));
            return Ok(());
        }
        let sound = |c: &Column| {
            crc_fast::checksum(
                crc_fast::CrcAlgorithm::Crc64Nvme,
                &read.buffer[c.from..c.to],
            ) == c.crc
        };
        if !read.columns.iter().all(sound) && plant != Some(Plant::SkipCrc) {
            self.event("corrupt", [p as u64, u64::from(slot), generation]);
            self.counters.add("reads corrupt");
            let known = read.held.suspect
                || read.mapping.superseded()
                || read.mapping.memory.tainted(read.held.offset, read.held.len);
            ensure!(
                known,
                3,
                "slot {slot} generation {generation} fails its checksum, and nobody has tampered with it"
            );
            self.procs[p].read.push((slot, generation, true));
            return Ok(());
        }
        self.check_bytes(read)?;
        self.event("loaded", [p as u64, u64::from(slot), generation]);
        self.counters.add("blocks loaded");
        self.counters
            .add_n("bytes loaded", read.buffer.len() as u64);
        self.procs[p].read.push((slot, generation, false));
        Ok(())
    }

    /// Invariant 1.
    fn check_bytes(&self, read: &Read) -> Check {
        let size = read.held.geometry.head_bytes() as usize;
        let mut expected = vec![0; size];
        for column in &read.columns {
            for (layer, found) in
                (column.first_layer..).zip(read.buffer[column.from..column.to].chunks(size))
            {
                content::head(read.held.seed, layer, column.head, &mut expected);
                ensure!(
                    found == expected,
                    1,
                    "{:?} was loaded from slot {} with other bytes than were stored (layer {layer}, head {})",
                    read.held.key,
                    read.held.slot,
                    column.head
                );
            }
        }
        Ok(())
    }

    /// Releases what has been read.
    pub(crate) fn release(&mut self, p: usize) {
        let hoarder = self.instances[self.procs[p].instance].hoarder;
        let proc = &mut self.procs[p];
        if hoarder && !self.quiet {
            proc.read.retain(|(_, _, corrupt)| *corrupt);
        }
        if proc.read.is_empty() || proc.token == 0 {
            return;
        }
        let read = std::mem::take(&mut proc.read);
        let corrupt = (0u32..)
            .zip(&read)
            .filter(|(_, r)| r.2)
            .map(|(at, _)| at)
            .collect();
        let ask = Ask::Release {
            slots: read.iter().map(|r| r.0).collect(),
            generations: read.iter().map(|r| r.1).collect(),
            corrupt,
            lease: 0,
        };
        self.send(p, ask, Pending::Other);
    }
}

/// Which bytes of the slot must be read for `rect`: whole columns, because a checksum covers all layers of its part.
fn plan(held: Held, rect: &Rect, crcs: &[u64], mapping: Mapping, token: u64) -> Read {
    let (g, cut) = (&held.geometry, &held.cut);
    let size = g.head_bytes() as usize;
    let (mut columns, mut pieces, mut end) = (Vec::new(), Vec::new(), 0);
    for (part, overlap) in cut.overlaps(rect) {
        let stored = cut.part(part);
        for head in overlap.heads.clone() {
            let from = end;
            for layer in stored.layers.clone() {
                pieces.push((held.offset + cut.head_offset(part, layer, head, g), end));
                end += size;
            }
            let at = cut.crc_base(part) + head - stored.heads.start;
            columns.push(Column {
                head,
                first_layer: stored.layers.start,
                crc: crcs[at as usize],
                from,
                to: end,
            });
        }
    }
    Read {
        held,
        mapping,
        token,
        columns,
        pieces,
        buffer: vec![0; end],
        done: 0,
    }
}
