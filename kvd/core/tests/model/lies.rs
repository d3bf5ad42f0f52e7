//! Processes that name slots, words and sessions that are not theirs.

use std::collections::BTreeSet;

use kvd_core::*;

use crate::common::*;
use crate::model::Model;

impl Model {
    /// Slots and words that may be anybody's.
    pub(crate) fn lie(&mut self, process: usize, kind: u8, pick: usize, off: u64) {
        let Some(session) = self.session(process) else {
            return;
        };
        let known: BTreeSet<(u32, u64)> = self
            .world
            .words
            .iter()
            .map(|((_, s), w)| (*s, *w))
            .collect();
        let Some((slot, word)) = known.iter().nth(pick % known.len().max(1)).copied() else {
            return;
        };
        let word = word.wrapping_sub(off);
        let scheduler = self.processes[process].role == Role::Scheduler;
        match kind {
            0 => self.commit_lie(process, slot, word),
            1 if !scheduler => self.abort_slot(process, slot, word),
            2 => {
                let engine = self.processes[process].engine;
                let held = self
                    .reads
                    .iter()
                    .any(|r| (r.session, r.slot, r.word) == (session, slot, word));
                if !held && self.claim_of(engine, slot, word).is_none() {
                    let before = self.resident.len();
                    self.release_lie(session, slot, word);
                    self.follow_log();
                    assert!(self.resident.len() == before || self.tampered);
                }
            }
            _ => {
                let past = SessionId(pick as u64 % (self.tokens + 2));
                if !self.live[process].pasts.contains(&past.0) {
                    let reply = self.world.ask(session, Request::Fence { past });
                    assert!(reply == Reply::Fenced || kind_is_invalid(&reply));
                }
            }
        }
    }

    /// Commits without having copied, unless the slot really is its own to write.
    pub(crate) fn commit_lie(&mut self, process: usize, slot: u32, word: u64) {
        let engine = self.processes[process].engine;
        if let Some(at) = self.claim_of(engine, slot, word) {
            let session = self.live[process].session;
            let part = self.processes[process].part.unwrap_or(0) as usize;
            if self.claims[at].writers[part] == session {
                return;
            }
        }
        self.commit(process, &[(slot, word)]);
    }

    /// A word that it may have leased earlier and let go of in the model, but not in the core, is left alone.
    pub(crate) fn release_lie(&mut self, session: u64, slot: u32, word: u64) {
        if word % 2 == 1 {
            self.world.release(session, &[slot], &[word], &[0]);
        }
    }
}

fn kind_is_invalid(reply: &Reply) -> bool {
    kind(reply) == Some(ErrorKind::Invalid)
}
