//! How other threads speak to the node's thread: a bounded queue and an eventfd that wakes its epoll.
//!
//! Overflow: HTTP is refused (it says 503), a populating thread waits. The node's thread never waits for either.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};

use rustix::event::{EventfdFlags, eventfd};

/// The end that rings. Clones share one queue.
#[derive(Debug)]
pub(crate) struct Doorbell<T> {
    queue: SyncSender<T>,
    event: Arc<OwnedFd>,
}

impl<T> Clone for Doorbell<T> {
    fn clone(&self) -> Self {
        Self {
            queue: self.queue.clone(),
            event: Arc::clone(&self.event),
        }
    }
}

/// The end that is woken.
#[derive(Debug)]
pub(crate) struct Door<T> {
    queue: Receiver<T>,
    event: Arc<OwnedFd>,
}

/// A queue of at most `bound` messages.
pub(crate) fn doorbell<T>(bound: usize) -> std::io::Result<(Doorbell<T>, Door<T>)> {
    let event = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
    let (sender, receiver) = sync_channel(bound);
    Ok((
        Doorbell {
            queue: sender,
            event: Arc::clone(&event),
        },
        Door {
            queue: receiver,
            event,
        },
    ))
}

impl<T> Doorbell<T> {
    /// Hands over a message unless the queue is full or nobody will answer any more.
    pub(crate) fn try_ring(&self, message: T) -> Result<(), T> {
        match self.queue.try_send(message) {
            Ok(()) => {
                self.wake();
                Ok(())
            }
            Err(TrySendError::Full(message) | TrySendError::Disconnected(message)) => Err(message),
        }
    }

    /// Hands over a message, waiting for room. `false`: nobody will answer any more.
    pub(crate) fn ring(&self, message: T) -> bool {
        let sent = self.queue.send(message).is_ok();
        self.wake();
        sent
    }

    fn wake(&self) {
        // Full means that the other end has been woken and has not looked yet.
        let _ = rustix::io::write(&*self.event, &1u64.to_ne_bytes());
    }
}

impl<T> Door<T> {
    /// Forgets that it was rung. To be called before the messages are taken.
    pub(crate) fn quiet(&self) {
        let _ = rustix::io::read(&*self.event, &mut [0u8; 8]);
    }

    /// The next message, if there is one.
    pub(crate) fn next(&self) -> Option<T> {
        self.queue.try_recv().ok()
    }
}

impl<T> AsFd for Door<T> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_queue_refuses_and_a_taken_message_makes_room() {
        let (bell, door) = doorbell(2).expect("an eventfd");
        assert_eq!(
            (bell.try_ring(1), bell.try_ring(2), bell.clone().try_ring(3)),
            (Ok(()), Ok(()), Err(3))
        );
        door.quiet();
        assert_eq!(
            (door.next(), door.next(), door.next()),
            (Some(1), Some(2), None)
        );
        assert!(bell.ring(4));
        drop(door);
        assert!(!bell.ring(5));
    }
}
