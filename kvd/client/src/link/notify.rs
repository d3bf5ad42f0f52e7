//! Wakes the link's thread, and costs a system call only when it sleeps.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering, fence};

use rustix::event::EventfdFlags;
use rustix::io::Errno;

#[derive(Debug)]
pub(crate) struct Notify {
    fd: OwnedFd,
    /// The thread sleeps, or is about to and will look again first.
    asleep: AtomicBool,
}

impl Notify {
    pub(crate) fn new() -> Result<Self, Errno> {
        let fd = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self {
            fd,
            asleep: AtomicBool::new(false),
        })
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// After something was put where the thread looks for it.
    pub(crate) fn wake(&self) {
        fence(Ordering::SeqCst);
        if self.asleep.load(Ordering::Relaxed) && self.asleep.swap(false, Ordering::SeqCst) {
            // A full counter wakes too.
            let _ = rustix::io::write(&self.fd, &1u64.to_ne_bytes());
        }
    }

    /// The thread says that it is about to sleep; it then looks everywhere once more.
    pub(crate) fn will_sleep(&self) {
        self.asleep.store(true, Ordering::SeqCst);
        fence(Ordering::SeqCst);
    }

    /// The thread is awake.
    pub(crate) fn awake(&self, signalled: bool) {
        self.asleep.store(false, Ordering::SeqCst);
        if signalled {
            let _ = rustix::io::read(&self.fd, &mut [0u8; 8]);
        }
    }
}
