//! The one error type of this crate: a kind to act on, and a text for people.

/// What a caller can act on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// A file descriptor, a shape or a slot that is not what it should be.
    Invalid,
    /// This kernel or configuration cannot do it.
    Unsupported,
    /// The machine has no memory (or no huge pages) left for it.
    NoSpace,
    /// The kernel refused for another reason.
    Internal,
}

/// What went wrong with shared memory, in lower case, with what to do.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{text}")]
pub struct Error {
    kind: ErrorKind,
    text: String,
}

impl Error {
    /// What a caller can act on.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    pub(crate) fn new(kind: ErrorKind, text: impl Into<String>) -> Self {
        Self {
            kind,
            text: text.into(),
        }
    }

    pub(crate) fn invalid(text: impl Into<String>) -> Self {
        Self::new(ErrorKind::Invalid, text)
    }

    /// A system call that failed while doing `what`.
    pub(crate) fn os(what: &str, errno: rustix::io::Errno) -> Self {
        use rustix::io::Errno;
        let kind = match errno {
            Errno::NOMEM | Errno::NOSPC | Errno::DQUOT => ErrorKind::NoSpace,
            Errno::NOSYS | Errno::OPNOTSUPP => ErrorKind::Unsupported,
            Errno::BADF | Errno::INVAL | Errno::PERM | Errno::ACCESS => ErrorKind::Invalid,
            _ => ErrorKind::Internal,
        };
        Self::new(kind, format!("{what}: {errno}"))
    }
}
