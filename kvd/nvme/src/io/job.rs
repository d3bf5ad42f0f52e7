//! An operation as the adapters keep it while it is under way. Deliberately absent: how it is done.

use rustix::io::Errno;

use super::{ArenaRange, Buffer, Done, HostBytes, IoError, Op, PAGE};

/// The kernel moves at most this much in one call, and one call is all that an operation gets.
const TRANSFER_MAX: usize = (1 << 31) - PAGE;

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verb {
    /// Fill the buffer.
    Read,
    /// Write the buffer.
    Write,
    /// Make durable.
    Flush,
}

/// An operation, and the buffer that it owns.
pub(super) struct Job<H> {
    pub(super) token: u64,
    pub(super) verb: Verb,
    pub(super) offset: u64,
    pub(super) buffer: Option<Buffer<H>>,
}

impl<H> From<Op<H>> for Job<H> {
    fn from(op: Op<H>) -> Self {
        let (token, verb, offset, buffer) = match op {
            Op::Read {
                token,
                offset,
                buffer,
            } => (token, Verb::Read, offset, Some(buffer)),
            Op::Write {
                token,
                offset,
                buffer,
            } => (token, Verb::Write, offset, Some(buffer)),
            Op::Flush { token } => (token, Verb::Flush, 0, None),
        };
        Self {
            token,
            verb,
            offset,
            buffer,
        }
    }
}

impl<H> Job<H> {
    /// It is over.
    pub(super) fn done(self, result: Result<(), IoError>) -> Done<H> {
        Done {
            token: self.token,
            buffer: self.buffer,
            result,
        }
    }

    /// It is over before it began.
    pub(super) fn refused(self, errno: Errno) -> Done<H> {
        self.done(Err(IoError::Os(errno)))
    }

    /// How many bytes its buffer has.
    pub(super) fn bytes(&self) -> usize
    where
        H: HostBytes,
    {
        match &self.buffer {
            Some(Buffer::Own(own)) => own.bytes().len(),
            Some(Buffer::Host(host)) => host.len(),
            None => 0,
        }
    }

    /// Back to what it was made from.
    pub(super) fn into_op(self) -> Op<H> {
        let Self {
            token,
            verb,
            offset,
            buffer,
        } = self;
        match (verb, buffer) {
            (Verb::Read, Some(buffer)) => Op::Read {
                token,
                offset,
                buffer,
            },
            (Verb::Write, Some(buffer)) => Op::Write {
                token,
                offset,
                buffer,
            },
            _ => Op::Flush { token },
        }
    }
}

impl Job<ArenaRange> {
    /// How many bytes are to be moved: whole pages.
    pub(super) fn len(&self) -> usize {
        match &self.buffer {
            Some(Buffer::Own(own)) => own.bytes().len(),
            Some(Buffer::Host(range)) => range.pages_len(),
            None => 0,
        }
    }

    /// Where they go to or come from. Valid for [`Job::len`] bytes until the buffer is touched or dropped.
    pub(super) fn address(&mut self) -> *mut u8 {
        match &mut self.buffer {
            Some(Buffer::Own(own)) => own.bytes_mut().as_mut_ptr(),
            Some(Buffer::Host(range)) => range.address(),
            None => std::ptr::null_mut(),
        }
    }

    /// Refuses what no device of `bytes` bytes can do: a file would grow otherwise.
    pub(super) fn check(&self, bytes: u64) -> Result<(), Errno> {
        if self.verb == Verb::Flush {
            return Ok(());
        }
        let len = self.len();
        let inside = self
            .offset
            .checked_add(len as u64)
            .is_some_and(|end| end <= bytes);
        if inside && len > 0 && len <= TRANSFER_MAX && self.offset.is_multiple_of(PAGE as u64) {
            Ok(())
        } else {
            Err(Errno::INVAL)
        }
    }

    /// What the kernel's answer to a transfer means: an error, or a number of bytes that must be all of them.
    pub(super) fn judge(&self, answer: Result<usize, Errno>) -> Result<(), IoError> {
        match answer {
            Err(errno) => Err(IoError::Os(errno)),
            Ok(got) if got != self.len() => Err(IoError::Short {
                got,
                wanted: self.len(),
            }),
            Ok(_) => Ok(()),
        }
    }
}
