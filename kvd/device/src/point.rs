//! Points in an engine's own work.

use std::sync::Arc;

use crate::Error;

/// What a device knows of a point.
pub trait Passed: Send + Sync {
    /// Sleeps until the engine's work has passed it.
    ///
    /// # Errors
    /// When the device fails: then nothing can be said of that work.
    fn wait(&self) -> Result<(), Error>;
}

/// A point that an engine's own work has come to, or will come to: see [`crate::Device::point`]. Cheap to clone.
#[derive(Clone, Default)]
pub struct Point(Option<Arc<dyn Passed>>);

impl Point {
    /// One that has been passed.
    pub fn passed() -> Self {
        Self(None)
    }

    /// One that the device looks after.
    pub fn new(passed: impl Passed + 'static) -> Self {
        Self(Some(Arc::new(passed)))
    }

    /// Sleeps until it has been passed.
    ///
    /// # Errors
    /// As [`Passed::wait`].
    pub fn wait(&self) -> Result<(), Error> {
        self.0.as_ref().map_or(Ok(()), |passed| passed.wait())
    }
}

impl std::fmt::Debug for Point {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if self.0.is_some() {
            "Point"
        } else {
            "Point(passed)"
        })
    }
}
