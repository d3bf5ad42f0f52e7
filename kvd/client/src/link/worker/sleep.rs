//! When the link's thread looks again: woken, at a deadline, or by itself while it is given requests without being woken.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};

use super::{Owner, UNSENT_MAX, Worker, fence_is_due};
use crate::connection::now;
use crate::link::lock;
use crate::link::notify::Sleep;

/// A thread that is given requests without being woken for each ([`crate::Link::queue`]) looks for the next this often: to wake it costs
/// its caller 2 to 40 us, most in a virtual machine, and such callers are engines' schedulers.
const LIGHT_SLEEP: Duration = Duration::from_millis(1);
/// For how long after the last such request.
pub(super) const LIGHT_FOR: Duration = Duration::from_millis(100);

impl Worker {
    /// Sleeps until something happens or is due.
    pub(super) fn sleep(&mut self) {
        while !self.slept() {}
    }

    /// False: nothing has happened, and it has looked at nothing but the queue.
    fn slept(&mut self) -> bool {
        let begun = now();
        let sleep = match begun < self.light_until {
            true => Sleep::Light,
            false => Sleep::Deep,
        };
        self.shared.notify.will_sleep(sleep);
        // What came since the last look has seen us awake and rung no bell.
        self.take_requests();
        if self.work_is_due() {
            self.shared.notify.awake(false);
            return true;
        }
        let deadline = self.next_deadline();
        let light = (sleep == Sleep::Light).then(|| begun + LIGHT_SLEEP);
        let timeout = deadline.into_iter().chain(light).min().map(|at| {
            let left = at.saturating_duration_since(begun);
            // Up, or a deadline just ahead would be polled for in a spin.
            Timespec::try_from(left + Duration::from_micros(50)).unwrap_or_default()
        });
        let mut fds = vec![PollFd::from_borrowed_fd(
            self.shared.notify.fd(),
            PollFlags::IN,
        )];
        if let Some(session) = &self.session {
            let mut events = PollFlags::IN;
            if session.connection.unsent() > 0 {
                events |= PollFlags::OUT;
            }
            fds.push(PollFd::from_borrowed_fd(session.connection.fd(), events));
        }
        let happened = rustix::event::poll(&mut fds, timeout.as_ref());
        if happened == Ok(0) && light.is_some() && deadline.is_none_or(|at| now() < at) {
            return false;
        }
        // An interrupted poll is a turn for nothing.
        let signalled = fds[0].revents().contains(PollFlags::IN);
        self.shared.notify.awake(signalled);
        true
    }

    /// Whether a turn would do something right now.
    fn work_is_due(&self) -> bool {
        if self.shared.stop.load(Ordering::SeqCst) {
            return true;
        }
        let Some(session) = self.session.as_ref().filter(|s| s.epoch.is_some()) else {
            return !self.backlog.is_empty();
        };
        let may_send = session.waiting.len() < session.limits.in_flight as usize
            && session.connection.unsent() < UNSENT_MAX;
        (may_send && !self.backlog.is_empty())
            || session.registered < lock(&self.shared.namespaces).len()
            || fence_is_due(&self.past, session, &self.shared)
    }

    fn next_deadline(&self) -> Option<Instant> {
        let queued = self.backlog.iter().map(|r| r.deadline).min();
        let Some(session) = &self.session else {
            return queued.into_iter().chain([self.retry_at]).min();
        };
        let sent = session.waiting.values().filter_map(|w| match &w.owner {
            Owner::Ticket { cell, deadline } => cell.wanted().then_some(*deadline),
            _ => None,
        });
        sent.chain(queued).chain(session.hello_by).min()
    }
}
