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

/// A stream that an engine computes on, as its framework calls it: for CUDA a `CUstream`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StreamHandle(usize);

impl StreamHandle {
    /// The default stream; or that of memory that has no streams.
    pub const DEFAULT: Self = Self(0);

    /// The framework's handle.
    ///
    /// # Safety
    /// It is 0 or a stream of the device that it is given to, in the device's primary context, and alive while it is used.
    pub unsafe fn new(handle: usize) -> Self {
        Self(handle)
    }

    pub(crate) fn get(self) -> usize {
        self.0
    }
}

/// A point that an engine's own work has come to, or will come to: see [`crate::Device::point`]. Cheap to clone.
#[derive(Clone)]
pub struct Point(Result<Option<Arc<dyn Passed>>, Error>);

impl Point {
    /// One that has been passed.
    pub fn passed() -> Self {
        Self(Ok(None))
    }

    /// One of which nothing can be said.
    pub fn failed(error: Error) -> Self {
        Self(Err(error))
    }

    /// One that the device looks after.
    pub fn new(passed: impl Passed + 'static) -> Self {
        Self(Ok(Some(Arc::new(passed))))
    }

    /// Sleeps until it has been passed.
    ///
    /// # Errors
    /// As [`Passed::wait`].
    pub fn wait(&self) -> Result<(), Error> {
        match &self.0 {
            Ok(None) => Ok(()),
            Ok(Some(passed)) => passed.wait(),
            Err(error) => Err(error.clone()),
        }
    }
}

impl std::fmt::Debug for Point {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match &self.0 {
            Ok(None) => "Point(passed)",
            Ok(Some(_)) => "Point",
            Err(_) => "Point(failed)",
        })
    }
}
