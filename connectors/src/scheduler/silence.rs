//! A daemon that does not answer: as soon as that is noticed, nobody waits for it, nothing is asked and nothing is held for it,
//! until it has answered something. Whoever notices leaves what was not answered here, and what comes late is looked for in
//! every step; besides that the daemon is pinged from time to time.

use kvd_wire::session::{Ping, reply, request::Body};

use super::Scheduler;
use super::port::Port;

/// A silent daemon is pinged this often (us), unless something else waits for its answer.
const PING_EVERY: u64 = 500_000;

/// What is known of the daemon's silence.
#[derive(Debug)]
pub(crate) struct Silence<T> {
    /// When (us) it was last noticed or probed; `None`: the daemon answers.
    since: Option<u64>,
    /// Something that it has not answered.
    open: Option<T>,
}

impl<T> Silence<T> {
    pub(crate) fn new() -> Self {
        Silence {
            since: None,
            open: None,
        }
    }

    /// Whether the daemon was silent when it was last looked at.
    pub(crate) fn lasts(&self) -> bool {
        self.since.is_some()
    }

    /// Another session: nothing is known of it yet.
    pub(crate) fn forget(&mut self) {
        *self = Self::new();
    }
}

impl<P: Port> Scheduler<P> {
    /// The daemon has not answered in time: `open`, if the caller still has it.
    pub(crate) fn daemon_silent(&mut self, now: u64, open: Option<P::Ticket>) {
        if !self.silence.lasts() {
            self.notices
                .warn("the daemon does not answer; requests don't wait for it until it does");
        }
        self.silence.since = Some(now);
        self.silence.open = self.silence.open.take().or(open);
    }

    /// The daemon has answered something.
    pub(crate) fn daemon_spoke(&mut self) {
        if self.silence.lasts() {
            self.silence.forget();
            self.notices.info("the daemon answers again");
        }
    }

    /// Whether the daemon is silent. Looks for late answers, and probes.
    pub(crate) fn is_silent(&mut self, now: u64) -> bool {
        let Some(since) = self.silence.since else {
            return false;
        };
        let answer = match &mut self.silence.open {
            Some(open) => self.port.poll(open),
            None => None,
        };
        match answer {
            Some(Ok(body)) => {
                if let reply::Body::Lookup(late) = body {
                    self.release(late.lease);
                }
                self.daemon_spoke();
                return false;
            }
            Some(Err(_)) => self.silence.open = None,
            None => {}
        }
        if self.silence.open.is_none() && now.saturating_sub(since) >= PING_EVERY {
            self.silence.since = Some(now);
            self.silence.open = self.port.queue(Body::Ping(Ping {})).ok();
            self.queued();
        }
        true
    }
}
