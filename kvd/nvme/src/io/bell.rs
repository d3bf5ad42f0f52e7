//! The doorbell of an adapter that sleeps in the kernel: an eventfd that is written only when somebody sleeps on it.
//!
//! A ring before the sleep is remembered, so that who puts a message somewhere and rings is always heard. Deliberately absent:
//! messages.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;

/// Shared by the sleeper and all who ring.
#[derive(Debug)]
pub(super) struct Bell {
    event: OwnedFd,
    rung: AtomicBool,
    asleep: AtomicBool,
}

impl Bell {
    /// Not rung, nobody asleep.
    pub(super) fn new() -> Result<Self, Errno> {
        Ok(Self {
            event: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            rung: AtomicBool::new(false),
            asleep: AtomicBool::new(false),
        })
    }

    /// Wakes the sleeper, or keeps it from falling asleep.
    pub(super) fn ring(&self) {
        // One order for all four accesses: either this sees `asleep`, or the sleeper sees `rung`.
        self.rung.store(true, Ordering::SeqCst);
        if self.asleep.swap(false, Ordering::SeqCst) {
            // Full means that it was woken and has not looked yet.
            let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
        }
    }

    /// Makes the eventfd wait for the next ring.
    pub(super) fn quiet(&self) {
        let _ = rustix::io::read(&self.event, &mut [0; 8]);
    }

    /// Called before sleeping. `false`: it was rung meanwhile; don't.
    pub(super) fn sleep(&self) -> bool {
        self.asleep.store(true, Ordering::SeqCst);
        if self.rung.swap(false, Ordering::SeqCst) {
            self.asleep.store(false, Ordering::SeqCst);
            return false;
        }
        true
    }

    /// Called after sleeping. Whoever has rung until now will be heard: what it put down is looked for next.
    pub(super) fn woke(&self) {
        self.asleep.store(false, Ordering::SeqCst);
        self.rung.store(false, Ordering::SeqCst);
    }
}

impl AsFd for Bell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(bell: &Bell) -> bool {
        rustix::io::read(bell, &mut [0; 8]).is_ok()
    }

    #[test]
    fn it_is_written_only_for_a_sleeper_and_a_ring_before_the_sleep_is_heard() {
        let bell = Bell::new().expect("an eventfd");
        bell.ring();
        bell.ring();
        assert!(!written(&bell), "nobody sleeps");
        assert!(!bell.sleep(), "it was rung");
        assert!(bell.sleep(), "once");
        bell.ring();
        bell.ring();
        let mut count = [0; 8];
        rustix::io::read(&bell, &mut count).expect("written");
        assert_eq!(u64::from_ne_bytes(count), 1, "one write ends a sleep");
        bell.woke();
        assert!(bell.sleep());
    }
}
