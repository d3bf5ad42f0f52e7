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
    /// Not rung, nobody asleep. Reads of it block: a ring waits for them without a thread.
    pub(super) fn new() -> Result<Self, Errno> {
        Ok(Self {
            event: eventfd(0, EventfdFlags::CLOEXEC)?,
            rung: AtomicBool::new(false),
            asleep: AtomicBool::new(false),
        })
    }

    /// Wakes the sleeper, or keeps it from falling asleep.
    pub(super) fn ring(&self) {
        // One order for all four accesses: either this sees `asleep`, or the sleeper sees `rung`.
        self.rung.store(true, Ordering::SeqCst);
        if self.asleep.swap(false, Ordering::SeqCst) {
            self.force();
        }
    }

    /// Writes the eventfd whatever the sleeper does.
    pub(super) fn force(&self) {
        let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
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
