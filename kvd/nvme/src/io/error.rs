//! Why a device could not be opened: a kind to act on, and a text for people. Deliberately absent: what an operation on an
//! open device says ([`super::IoError`]).

/// What a caller can act on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OpenErrorKind {
    /// The path or the size is not what it should be.
    Invalid,
    /// Another process uses it.
    Busy,
    /// The file system is too full for it.
    NoSpace,
    /// The file system, the kernel or the container can't do what is needed.
    Unsupported,
    /// The system refused for another reason.
    Unavailable,
}

/// Why a device can't be used, in lower case, with what to do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text}")]
pub struct OpenError {
    kind: OpenErrorKind,
    text: String,
}

impl OpenError {
    /// What a caller can act on.
    pub fn kind(&self) -> OpenErrorKind {
        self.kind
    }

    pub(super) fn new(kind: OpenErrorKind, text: impl Into<String>) -> Self {
        Self {
            kind,
            text: text.into(),
        }
    }

    /// A system call that failed while doing `what`.
    pub(super) fn os(what: &str, errno: rustix::io::Errno) -> Self {
        use rustix::io::Errno;
        let kind = match errno {
            Errno::NOSPC | Errno::DQUOT | Errno::NOMEM => OpenErrorKind::NoSpace,
            Errno::NOSYS | Errno::OPNOTSUPP | Errno::PERM => OpenErrorKind::Unsupported,
            Errno::BUSY => OpenErrorKind::Busy,
            Errno::INVAL | Errno::NOENT | Errno::NOTDIR => OpenErrorKind::Invalid,
            _ => OpenErrorKind::Unavailable,
        };
        Self::new(kind, format!("{what}: {errno}"))
    }
}
