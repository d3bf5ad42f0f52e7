//! The error of this crate's port.

/// Why nothing, or nothing useful, was copied.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// What was asked for does not fit the memory it names.
    #[error("{0}")]
    Invalid(String),
    /// The device or its driver failed.
    #[error("{0}")]
    Failed(String),
}

impl Error {
    pub(crate) fn invalid(text: impl Into<String>) -> Self {
        Self::Invalid(text.into())
    }
}
