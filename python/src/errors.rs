//! Errors as Python sees them: one exception class, with a `kind` to decide by.

use kvd_client::{Error, ErrorKind};
use pyo3::exceptions::PyException;
use pyo3::prelude::*;

pyo3::create_exception!(
    kvdaemon,
    KvdError,
    PyException,
    "Something that kvd could not do. `kind` says why: one of not_found, busy, no_space, corrupt, unavailable, \
     indeterminate, invalid, unsupported, internal."
);

/// The word for a kind.
fn word(kind: ErrorKind) -> &'static str {
    match kind {
        ErrorKind::NotFound => "not_found",
        ErrorKind::Busy => "busy",
        ErrorKind::NoSpace => "no_space",
        ErrorKind::Corrupt => "corrupt",
        ErrorKind::Unavailable => "unavailable",
        ErrorKind::Indeterminate => "indeterminate",
        ErrorKind::Invalid => "invalid",
        ErrorKind::Unsupported => "unsupported",
        ErrorKind::Internal => "internal",
    }
}

/// An exception of this kind.
pub(crate) fn error(py: Python<'_>, kind: ErrorKind, text: impl Into<String>) -> PyErr {
    let raised = KvdError::new_err(text.into());
    match raised.value(py).setattr("kind", word(kind)) {
        Ok(()) => raised,
        Err(other) => other,
    }
}

/// The exception for an error of the client.
pub(crate) fn from_client(py: Python<'_>, failure: &Error) -> PyErr {
    error(py, failure.kind(), failure.to_string())
}

/// What the caller passed is not right.
pub(crate) fn invalid(py: Python<'_>, text: impl Into<String>) -> PyErr {
    error(py, ErrorKind::Invalid, text)
}
