//! The one error type of this crate: a kind to act on, and a text for people.

use kvd_wire::session::{ErrorKind as WireKind, Failure};

/// What a caller can act on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// It is not there.
    NotFound,
    /// A bounded queue is full: drop the request or try later.
    Busy,
    /// No room for it now.
    NoSpace,
    /// Bytes that are not what was stored.
    Corrupt,
    /// No daemon, or no answer from it in time; see [`Error::timed_out`].
    Unavailable,
    /// It may have happened or not.
    Indeterminate,
    /// The request makes no sense, or the other side does not keep to the protocol.
    Invalid,
    /// This daemon, kernel or process cannot do it.
    Unsupported,
    /// A bug, here or there.
    Internal,
}

/// What went wrong, in lower case, with what to do.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{text}")]
pub struct Error {
    kind: ErrorKind,
    text: String,
    timed_out: bool,
    ends_session: bool,
}

impl Error {
    /// What a caller can act on.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// Whether no answer came in time. The daemon may still do what was asked; this process then undoes it.
    pub fn timed_out(&self) -> bool {
        self.timed_out
    }

    /// Whether the session is over with this error.
    pub fn ends_session(&self) -> bool {
        self.ends_session
    }

    pub(crate) fn new(kind: ErrorKind, text: impl Into<String>) -> Self {
        Self {
            kind,
            text: text.into(),
            timed_out: false,
            ends_session: false,
        }
    }

    pub(crate) fn invalid(text: impl Into<String>) -> Self {
        Self::new(ErrorKind::Invalid, text)
    }

    pub(crate) fn unavailable(text: impl Into<String>) -> Self {
        Self::new(ErrorKind::Unavailable, text)
    }

    /// The session cannot go on.
    pub(crate) fn ending(mut self) -> Self {
        self.ends_session = true;
        self
    }

    /// The daemon does not keep to the protocol: the session cannot go on.
    pub(crate) fn protocol(text: impl Into<String>) -> Self {
        Self::invalid(text).ending()
    }

    pub(crate) fn timeout() -> Self {
        Self {
            timed_out: true,
            ..Self::unavailable("the daemon did not answer in time: go on without it")
        }
    }

    pub(crate) fn forked() -> Self {
        Self::new(
            ErrorKind::Unsupported,
            "this session belongs to the parent process: connect again after fork",
        )
    }

    pub(crate) fn io(what: &str, errno: rustix::io::Errno) -> Self {
        Self::unavailable(format!("{what}: {errno}")).ending()
    }
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        let kind = match failure.kind() {
            WireKind::NotFound => ErrorKind::NotFound,
            WireKind::Busy => ErrorKind::Busy,
            WireKind::NoSpace => ErrorKind::NoSpace,
            WireKind::Corrupt => ErrorKind::Corrupt,
            WireKind::Unavailable => ErrorKind::Unavailable,
            WireKind::Indeterminate => ErrorKind::Indeterminate,
            WireKind::Invalid => ErrorKind::Invalid,
            WireKind::Unsupported => ErrorKind::Unsupported,
            WireKind::Unspecified | WireKind::Internal => ErrorKind::Internal,
        };
        Self {
            kind,
            text: failure.text,
            timed_out: false,
            ends_session: failure.ends_session,
        }
    }
}

impl From<kvd_arena::Error> for Error {
    fn from(error: kvd_arena::Error) -> Self {
        let kind = match error.kind() {
            kvd_arena::ErrorKind::Invalid => ErrorKind::Invalid,
            kvd_arena::ErrorKind::Unsupported => ErrorKind::Unsupported,
            kvd_arena::ErrorKind::NoSpace => ErrorKind::NoSpace,
            kvd_arena::ErrorKind::Internal => ErrorKind::Internal,
        };
        Self::new(kind, error.to_string())
    }
}
