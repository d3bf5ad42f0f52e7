//! Memory of a GPU and the link to it, for tests and benches that have no engine.

use std::sync::Arc;

use super::CudaDevice;
use super::driver::{Context, DeviceMemory, Pieces, PinnedMemory, Stream};
use crate::{Error, conformance};

/// Memory of a device. What was allocated lives as long as this.
#[derive(Debug)]
pub struct CudaMemory {
    context: Arc<Context>,
    chunks: Vec<DeviceMemory>,
}

/// One large piece of pinned memory and as much of the device's: what moves between them is the limit of everything else.
#[derive(Debug)]
pub struct Link {
    context: Arc<Context>,
    pinned: PinnedMemory,
    memory: DeviceMemory,
    stream: Stream,
    bytes: usize,
}

/// A stream of the usual priority, with work like an engine's on it: what copies must not be in the way of.
#[derive(Debug)]
pub struct EngineWork {
    context: Arc<Context>,
    stream: Stream,
    from: DeviceMemory,
    to: DeviceMemory,
    bytes: usize,
}

impl CudaDevice {
    /// Work over so many bytes.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn engine_work(&self, bytes: usize) -> Result<EngineWork, Error> {
        let entered = self.context.enter()?;
        Ok(EngineWork {
            stream: entered.usual_stream()?,
            from: entered.allocate(bytes)?,
            to: entered.allocate(bytes)?,
            context: Arc::clone(&self.context),
            bytes,
        })
    }

    /// Nothing yet.
    pub fn memory(&self) -> CudaMemory {
        CudaMemory {
            context: Arc::clone(&self.context),
            chunks: Vec::new(),
        }
    }

    /// The link, with pieces of so many bytes.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn link(&self, bytes: usize) -> Result<Link, Error> {
        let entered = self.context.enter()?;
        Ok(Link {
            context: Arc::clone(&self.context),
            pinned: entered.allocate_host(bytes)?,
            memory: entered.allocate(bytes)?,
            stream: entered.stream()?,
            bytes,
        })
    }
}

impl EngineWork {
    /// One pass over the GPU's memory; returns when it is over.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn pass(&self) -> Result<(), Error> {
        // SAFETY: both have so many bytes, and live until it is over.
        unsafe {
            let (to, from) = (self.to.address, self.from.address);
            copy(&self.context, &self.stream, to, from, self.bytes)
        }
    }

    /// So many kernels that do next to nothing, asked for one by one; returns when they are over.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn launches(&self, count: usize) -> Result<(), Error> {
        let _entered = self.context.enter()?;
        for _ in 0..count {
            // SAFETY: the memory is longer than that, and lives until the stream has done it.
            unsafe { self.stream.zero(&self.to, 1024)? };
        }
        self.stream.synchronize()
    }
}

impl Link {
    /// One piece to the device; returns when it is there.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn up(&self) -> Result<(), Error> {
        self.copy(self.memory.address, self.pinned.address as u64)
    }

    /// One piece from the device; returns when it is here.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn down(&self) -> Result<(), Error> {
        self.copy(self.pinned.address as u64, self.memory.address)
    }

    fn copy(&self, to: u64, from: u64) -> Result<(), Error> {
        // SAFETY: both have so many bytes, and live until it is over.
        unsafe { copy(&self.context, &self.stream, to, from, self.bytes) }
    }
}

/// Copies one piece; returns when that is over.
///
/// # Safety
/// Both are memory of this device or of this process, and have so many bytes.
unsafe fn copy(
    context: &Arc<Context>,
    stream: &Stream,
    to: u64,
    from: u64,
    bytes: usize,
) -> Result<(), Error> {
    let entered = context.enter()?;
    let mut pieces = Pieces::default();
    pieces.push(to, from, bytes);
    // SAFETY: the caller's promise; it is waited for.
    unsafe { entered.copy_many(&pieces, stream)? };
    stream.synchronize()
}

/// # Panics
/// When the driver refuses: this is for tests and benches.
impl conformance::Memory for CudaMemory {
    fn allocate(&mut self, bytes: usize) -> usize {
        let entered = self.context.enter().expect("a context");
        let chunk = entered.allocate(bytes).expect("memory of the device");
        let address = chunk.address as usize;
        self.chunks.push(chunk);
        entered
            .upload(address as u64, &vec![0; bytes])
            .expect("zeros");
        address
    }

    fn write(&mut self, address: usize, bytes: &[u8]) {
        let entered = self.context.enter().expect("a context");
        entered.upload(address as u64, bytes).expect("written");
    }

    fn read(&self, address: usize, bytes: &mut [u8]) {
        let entered = self.context.enter().expect("a context");
        entered.download(address as u64, bytes).expect("read");
    }
}
