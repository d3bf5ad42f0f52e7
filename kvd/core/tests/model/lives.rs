//! Processes that attach, detach, come back, fence, and end.

use kvd_core::*;

use crate::common::*;
use crate::engines::{ENGINES, Process};
use crate::model::Model;

impl Model {
    pub(crate) fn detach(&mut self, process: usize) {
        if let Some(session) = self.session(process) {
            self.live[process].attached = false;
            self.world.step(Input::Detached {
                session: SessionId(session),
            });
        }
    }

    /// Its writers are terminal, by death or by word.
    pub(crate) fn writer_ended(&mut self, session: u64) {
        for claim in &mut self.claims {
            for writer in claim
                .writers
                .iter_mut()
                .filter(|writer| **writer == Some(session))
            {
                *writer = None;
                claim.given_up = true;
            }
        }
        self.drop_ended();
        self.reads.retain(|read| read.session != session);
    }

    pub(crate) fn end(&mut self, process: usize, dead: bool) {
        let live = std::mem::take(&mut self.live[process]);
        let mut sessions: Vec<u64> = live
            .session
            .into_iter()
            .chain(live.pasts.into_iter().rev())
            .collect();
        for session in sessions.clone() {
            let session = SessionId(session);
            self.world.step(if dead {
                Input::Gone { session }
            } else {
                Input::Closed { session }
            });
            assert!(!self.world.core.knows(session));
            if dead {
                let known = sessions
                    .iter()
                    .any(|past| self.world.core.knows(SessionId(*past)));
                assert!(!known, "the past dies with its process");
                break;
            }
        }
        sessions
            .drain(..)
            .for_each(|session| self.writer_ended(session));
    }

    /// Attaches; a process that was detached names its past, and says at once or never that its copies are over.
    pub(crate) fn open(&mut self, process: usize, fence: bool) {
        if self.live[process].attached {
            if fence {
                self.fence(process);
            }
            return;
        }
        let Process {
            engine,
            role,
            rank,
            part,
        } = self.processes[process];
        let e = &ENGINES[engine];
        self.tokens += 1;
        let past = self.live[process].session;
        let world = e.pp * e.tp * e.replicas;
        self.world
            .open_after(self.tokens, e.tenant, engine as u8, role, rank, world, past);
        assert!(self.world.ended.is_empty(), "{:?}", self.world.ended);
        let name = if e.tenant == A { "a" } else { "b" };
        let reply = self.world.register(
            self.tokens,
            &record(name, e.weights, e.cell),
            e.pp,
            e.tp,
            part,
        );
        assert!(
            matches!(reply, Reply::Registered { namespace: 0, .. }),
            "{reply:?}"
        );
        let live = &mut self.live[process];
        live.pasts.extend(live.session.replace(self.tokens));
        live.attached = true;
        if fence {
            self.fence(process);
        }
    }

    /// All that it ever began before this session is over.
    fn fence(&mut self, process: usize) {
        let Some(session) = self.session(process) else {
            return;
        };
        let pasts = std::mem::take(&mut self.live[process].pasts);
        let Some(last) = pasts.last() else { return };
        let body = Request::Fence {
            past: SessionId(*last),
        };
        assert_eq!(self.world.ask(session, body), Reply::Fenced);
        for past in pasts {
            assert!(!self.world.core.knows(SessionId(past)));
            self.writer_ended(past);
        }
    }
}
