//! A bounded queue with several takers. Putting never waits: what does not fit comes back.

use std::collections::VecDeque;

use parking_lot::{Condvar, Mutex};

struct Inner<T> {
    items: VecDeque<T>,
    closed: bool,
}

/// See the module.
pub(crate) struct Queue<T> {
    inner: Mutex<Inner<T>>,
    more: Condvar,
    bound: usize,
}

impl<T> Queue<T> {
    pub(crate) fn new(bound: usize) -> Self {
        Queue {
            inner: Mutex::new(Inner {
                items: VecDeque::new(),
                closed: false,
            }),
            more: Condvar::new(),
            bound,
        }
    }

    /// Adds an item; gives it back when the queue is full or closed.
    pub(crate) fn put(&self, item: T) -> Result<(), T> {
        let mut inner = self.inner.lock();
        if inner.closed || inner.items.len() >= self.bound {
            return Err(item);
        }
        inner.items.push_back(item);
        drop(inner);
        self.more.notify_one();
        Ok(())
    }

    /// The next item; waits for one. `None` when the queue is closed and empty.
    pub(crate) fn take(&self) -> Option<T> {
        let mut inner = self.inner.lock();
        loop {
            if let Some(item) = inner.items.pop_front() {
                return Some(item);
            }
            if inner.closed {
                return None;
            }
            self.more.wait(&mut inner);
        }
    }

    /// Nothing more is taken in; what waits is returned.
    pub(crate) fn close(&self) -> Vec<T> {
        let mut inner = self.inner.lock();
        inner.closed = true;
        let left = inner.items.drain(..).collect();
        drop(inner);
        self.more.notify_all();
        left
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_fit_comes_back() {
        let queue = Queue::new(2);
        assert!(queue.put(1).is_ok());
        assert!(queue.put(2).is_ok());
        assert_eq!(queue.put(3), Err(3));
        assert_eq!(queue.take(), Some(1));
        assert!(queue.put(3).is_ok());
        assert_eq!(queue.close(), [2, 3]);
        assert_eq!(queue.put(4), Err(4));
        assert_eq!(queue.take(), None);
    }
}
