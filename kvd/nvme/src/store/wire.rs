//! Operations one after the other, for the time before a store is open and for checking one: each waits for its answer, at most a
//! bounded number of polls. Deliberately absent: everything that happens while a store serves.

use std::time::Duration;

use super::config::OpenError;
use crate::io::{Aligned, BlockIo, Buffer, Done, IoError, Op, PAGE};

/// One wait.
const WAIT: Duration = Duration::from_millis(100);
/// Waits without any answer after which the device counts as dead.
const MOST_WAITS: u32 = 600;
/// Pages of one read of many.
const CHUNK: u64 = 256;
/// Reads under way at once.
const AT_ONCE: usize = 4;
/// Tokens of this module; those of an open store are lower.
const FIRST_TOKEN: u64 = 1 << 63;

/// A device that is asked and waited for.
pub(crate) struct Wire<'a, I: BlockIo> {
    io: &'a mut I,
    token: u64,
    done: Vec<Done<I::Host>>,
}

impl<'a, I: BlockIo> Wire<'a, I> {
    pub(crate) fn new(io: &'a mut I) -> Self {
        Wire {
            io,
            token: FIRST_TOKEN,
            done: Vec::new(),
        }
    }

    fn token(&mut self) -> u64 {
        self.token += 1;
        self.token
    }

    /// Waits for the answer to `token`.
    fn wait(&mut self, token: u64) -> Result<Done<I::Host>, OpenError> {
        let mut waits = 0;
        loop {
            if let Some(at) = self.done.iter().position(|done| done.token == token) {
                return Ok(self.done.swap_remove(at));
            }
            let before = self.done.len();
            self.io.poll(WAIT, &mut self.done);
            waits = if self.done.len() > before {
                0
            } else {
                waits + 1
            };
            if waits > MOST_WAITS {
                return Err(OpenError::Stalled);
            }
        }
    }

    fn start_read(&mut self, offset: u64, buffer: Aligned) -> u64 {
        let token = self.token();
        self.io.start(Op::Read {
            token,
            offset,
            buffer: Buffer::Own(buffer),
        });
        token
    }

    fn finish_read(&mut self, token: u64) -> Result<Result<Aligned, IoError>, OpenError> {
        let done = self.wait(token)?;
        Ok(match (done.result, done.buffer) {
            (Ok(()), Some(Buffer::Own(buffer))) => Ok(buffer),
            (Err(error), _) => Err(error),
            (Ok(()), _) => Err(IoError::Short { got: 0, wanted: 1 }),
        })
    }

    /// Reads so many pages. The inner error is the device's.
    pub(crate) fn read(
        &mut self,
        offset: u64,
        pages: u64,
    ) -> Result<Result<Aligned, IoError>, OpenError> {
        let token = self.start_read(offset, Aligned::new(pages as usize));
        self.finish_read(token)
    }

    pub(crate) fn write(&mut self, offset: u64, buffer: Aligned) -> Result<(), OpenError> {
        let token = self.token();
        self.io.start(Op::Write {
            token,
            offset,
            buffer: Buffer::Own(buffer),
        });
        self.wait(token)?.result.map_err(OpenError::Io)
    }

    pub(crate) fn flush(&mut self) -> Result<(), OpenError> {
        let token = self.token();
        self.io.start(Op::Flush { token });
        self.wait(token)?.result.map_err(OpenError::Io)
    }

    /// Calls `each` with every page from `offset` on, in order: its number and its bytes, or nothing where it can't be read.
    pub(crate) fn scan(
        &mut self,
        offset: u64,
        pages: u64,
        each: &mut dyn FnMut(u64, Option<&[u8]>),
    ) -> Result<(), OpenError> {
        let at = |page: u64| offset + page * PAGE as u64;
        let at_once = AT_ONCE.min(self.io.depth()).max(1);
        let mut under_way = std::collections::VecDeque::new();
        // Whole chunks, to be read into again: fresh memory would cost more than the pages.
        let mut spare: Vec<Aligned> = Vec::new();
        let mut next = 0;
        while next < pages || !under_way.is_empty() {
            while next < pages && under_way.len() < at_once {
                let count = CHUNK.min(pages - next);
                let buffer = spare.pop().filter(|_| count == CHUNK);
                let buffer = buffer.unwrap_or_else(|| Aligned::new(count as usize));
                let token = self.start_read(at(next), buffer);
                under_way.push_back((token, next, count));
                next += count;
            }
            let Some((token, first, count)) = under_way.pop_front() else {
                break;
            };
            match self.finish_read(token)? {
                Ok(buffer) => {
                    for (n, page) in buffer.bytes().chunks_exact(PAGE).enumerate() {
                        each(first + n as u64, Some(page));
                    }
                    if count == CHUNK {
                        spare.push(buffer);
                    }
                }
                Err(_) => self.scan_singly(offset, first, count, each)?,
            }
        }
        Ok(())
    }

    /// A run that could not be read at once: only the pages that are damaged are lost.
    fn scan_singly(
        &mut self,
        offset: u64,
        first: u64,
        count: u64,
        each: &mut dyn FnMut(u64, Option<&[u8]>),
    ) -> Result<(), OpenError> {
        for page in first..first + count {
            let read = self.read(offset + page * PAGE as u64, 1)?;
            each(page, read.as_ref().ok().map(Aligned::bytes));
        }
        Ok(())
    }
}
