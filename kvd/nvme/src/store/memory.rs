//! A device in memory for the store's own tests and its fuzzers: sparse, completes everything at the next poll, in order. Faults are the simulated
//! disk's affair (`kvd-sim`).

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::rc::Rc;
use std::time::Duration;

use crate::io::{BlockIo, Buffer, Done, HostBytes, IoError, Op, PAGE};

/// Host memory that nobody shares.
pub(crate) struct Owned(pub(crate) Vec<u8>);

impl HostBytes for Owned {
    fn len(&self) -> usize {
        self.0.len()
    }

    fn read(&self, from: usize, bytes: usize, see: &mut dyn FnMut(&[u8])) {
        see(&self.0[from..from + bytes]);
    }
}

/// The pages, which outlive the store.
pub(crate) type Pages = Rc<RefCell<BTreeMap<u64, Box<[u8; PAGE]>>>>;

/// What becomes of flushes.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Flushes {
    #[default]
    Good,
    /// They are not over.
    Held,
    Failing,
}

/// A device over them.
pub(crate) struct MemoryIo {
    pub(crate) pages: Pages,
    queue: VecDeque<Op<Owned>>,
    /// Writes and flushes so far.
    pub(crate) changes: Rc<RefCell<u64>>,
    /// Bytes of the device that can't be written.
    pub(crate) broken: Rc<RefCell<Range<u64>>>,
    /// Bytes of the device whose writes are not over.
    pub(crate) slow: Rc<RefCell<Range<u64>>>,
    pub(crate) flushes: Rc<Cell<Flushes>>,
    /// Nothing completes, also when the device is given up.
    pub(crate) hangs: Rc<Cell<bool>>,
    /// Host memory comes back shorter than it was: a bug, and looking at it panics.
    pub(crate) shrinks: Rc<Cell<bool>>,
}

impl MemoryIo {
    pub(crate) fn over(pages: &Pages) -> Self {
        MemoryIo {
            pages: pages.clone(),
            queue: VecDeque::new(),
            changes: Rc::default(),
            broken: Rc::default(),
            slow: Rc::default(),
            flushes: Rc::default(),
            hangs: Rc::default(),
            shrinks: Rc::default(),
        }
    }

    fn bytes(buffer: &mut Buffer<Owned>) -> &mut [u8] {
        match buffer {
            Buffer::Own(own) => own.bytes_mut(),
            Buffer::Host(host) => &mut host.0,
        }
    }
}

impl BlockIo for MemoryIo {
    type Host = Owned;

    fn start(&mut self, op: Op<Owned>) {
        self.queue.push_back(op);
    }

    fn poll(&mut self, _: Duration, done: &mut Vec<Done<Owned>>) {
        if self.hangs.get() {
            return;
        }
        let mut pages = self.pages.borrow_mut();
        let flushes = self.flushes.get();
        for op in std::mem::take(&mut self.queue) {
            let mut result = Ok(());
            let held = match &op {
                Op::Flush { .. } => flushes == Flushes::Held,
                Op::Write { offset, .. } => self.slow.borrow().contains(offset),
                Op::Read { .. } => false,
            };
            if held {
                self.queue.push_back(op);
                continue;
            }
            let (token, buffer) = match op {
                Op::Read {
                    token,
                    offset,
                    mut buffer,
                } => {
                    for (n, out) in Self::bytes(&mut buffer).chunks_mut(PAGE).enumerate() {
                        match pages.get(&(offset / PAGE as u64 + n as u64)) {
                            Some(page) => out.copy_from_slice(&page[..]),
                            None => out.fill(0),
                        }
                    }
                    if let (true, Buffer::Host(host)) = (self.shrinks.get(), &mut buffer) {
                        host.0.clear();
                    }
                    (token, Some(buffer))
                }
                Op::Write {
                    token,
                    offset,
                    mut buffer,
                } => {
                    *self.changes.borrow_mut() += 1;
                    if self.broken.borrow().contains(&offset) {
                        result = Err(IoError::Os(rustix::io::Errno::IO));
                    }
                    for (n, page) in Self::bytes(&mut buffer).chunks(PAGE).enumerate() {
                        let mut own = Box::new([0; PAGE]);
                        own.copy_from_slice(page);
                        pages.insert(offset / PAGE as u64 + n as u64, own);
                    }
                    (token, Some(buffer))
                }
                Op::Flush { token } => {
                    if flushes == Flushes::Failing {
                        result = Err(IoError::Os(rustix::io::Errno::IO));
                    }
                    *self.changes.borrow_mut() += 1;
                    (token, None)
                }
            };
            done.push(Done {
                token,
                buffer,
                result,
            });
        }
    }

    fn depth(&self) -> usize {
        32
    }

    fn drain(self) -> Vec<u64> {
        let hangs = self.hangs.get();
        let left = self.queue.iter().filter(|_| hangs);
        left.map(|op| match op {
            Op::Read { token, .. } | Op::Write { token, .. } | Op::Flush { token } => *token,
        })
        .collect()
    }
}
