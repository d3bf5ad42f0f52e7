//! Wakes the link's thread, and costs a system call only when it sleeps.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU8, Ordering, fence};

use rustix::event::EventfdFlags;
use rustix::io::Errno;

/// How the link's thread is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sleep {
    /// It sleeps until it is woken, or is about to and will look again first.
    Deep,
    /// It looks again by itself before long.
    Light,
}

const AWAKE: u8 = 0;
const LIGHT: u8 = 1;
const DEEP: u8 = 2;

#[derive(Debug)]
pub(crate) struct Notify {
    fd: OwnedFd,
    state: AtomicU8,
}

impl Notify {
    pub(crate) fn new() -> Result<Self, Errno> {
        let fd = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self {
            fd,
            state: AtomicU8::new(AWAKE),
        })
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// After something was put where the thread looks for it.
    pub(crate) fn wake(&self) {
        self.wake_from(LIGHT);
    }

    /// The same for what can wait until the thread looks by itself, if it does.
    pub(crate) fn wake_soon(&self) {
        self.wake_from(DEEP);
    }

    fn wake_from(&self, sleep: u8) {
        fence(Ordering::SeqCst);
        let asleep = self.state.load(Ordering::Relaxed) >= sleep;
        if asleep && self.state.swap(AWAKE, Ordering::SeqCst) != AWAKE {
            // A full counter wakes too.
            let _ = rustix::io::write(&self.fd, &1u64.to_ne_bytes());
        }
    }

    /// The thread says that it is about to sleep; it then looks everywhere once more.
    pub(crate) fn will_sleep(&self, sleep: Sleep) {
        let state = match sleep {
            Sleep::Deep => DEEP,
            Sleep::Light => LIGHT,
        };
        self.state.store(state, Ordering::SeqCst);
        fence(Ordering::SeqCst);
    }

    /// The thread is awake.
    pub(crate) fn awake(&self, signalled: bool) {
        self.state.store(AWAKE, Ordering::SeqCst);
        if signalled {
            let _ = rustix::io::read(&self.fd, &mut [0u8; 8]);
        }
    }
}
