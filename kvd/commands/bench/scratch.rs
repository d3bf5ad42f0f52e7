//! A directory of a bench's own on the file system that is measured; gone when this is dropped. Deliberately absent: choosing the
//! file system.

use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

pub(super) struct Scratch(PathBuf);

impl Scratch {
    /// Makes one in this directory, or in the usual one for such things.
    pub(super) fn new(parent: Option<&PathBuf>, name: &str) -> Result<Self> {
        let parent = parent.cloned().unwrap_or_else(std::env::temp_dir);
        let path = parent.join(format!("kvd-bench-{name}-{}", std::process::id()));
        fs::DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .with_context(|| format!("cannot make {}", path.display()))?;
        Ok(Self(path))
    }

    pub(super) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
