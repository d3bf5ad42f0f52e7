//! The worker half as a Python class. The GIL is released where it waits: for copies out of blocks that the engine takes
//! back, and at the end.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use kvd_client::{Identity, Role};
use kvd_connectors::meta::{RankGroup, RankHello, VERSION};
use kvd_connectors::notice::Level;
use kvd_connectors::worker::{Counters, Settings, Worker};
use kvd_device::{Device, HostDevice, StreamHandle};
use parking_lot::Mutex;
use prost::Message;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};

use crate::cache::KvCache;
use crate::errors::{error, from_client};
use crate::observed::dict;
use crate::scheduler::{clock, instance_id, start_link};

/// What a step brought to an end: requests sent, requests received, blocks that could not be loaded, requests of the received whose
/// loads failed.
type Results = (Vec<String>, Vec<String>, Vec<u32>, Vec<String>);

/// What this rank holds of a KV-cache group: attributes of `kvdaemon.vllm.caches.Share`.
#[derive(FromPyObject)]
struct Group {
    kind: String,
    layer_names: Vec<String>,
    head_first: u32,
    heads: u32,
    heads_total: u32,
    block_tokens: u32,
    page_tokens: u32,
    cell_bytes: u32,
    window: u32,
    cache: Py<KvCache>,
}

impl Group {
    fn share(&self, group: u32) -> RankGroup {
        RankGroup {
            group,
            kind: self.kind.clone(),
            layers: self.layer_names.len() as u32,
            layer_names: self.layer_names.clone(),
            head_first: self.head_first,
            heads: self.heads,
            heads_total: self.heads_total,
            block_tokens: self.block_tokens,
            page_tokens: self.page_tokens,
            cell_bytes: self.cell_bytes,
            window: self.window,
        }
    }
}

/// See `kvdaemon/_native.pyi`.
#[pyclass(frozen, module = "kvdaemon._native")]
pub(crate) struct WorkerHalf {
    inner: Mutex<Option<Worker>>,
}

impl WorkerHalf {
    fn with<R>(&self, run: impl FnOnce(&mut Worker) -> R) -> Option<R> {
        self.inner.lock().as_mut().map(run)
    }
}

#[pymethods]
impl WorkerHalf {
    /// A worker half whose link connects in the background. Without groups it only reports why (`refusal`).
    #[new]
    #[pyo3(signature = (socket, instance, label, *, rank, world, stage, machine, encoding, scales, refusal, groups, copy_threads=2,
                        load_deadline_ms=2000))]
    #[allow(
        clippy::too_many_arguments,
        reason = "keyword arguments of the Python class"
    )]
    fn new(
        py: Python<'_>,
        socket: PathBuf,
        instance: &[u8],
        label: String,
        rank: u32,
        world: u32,
        stage: u32,
        machine: String,
        encoding: String,
        scales: String,
        refusal: String,
        groups: Vec<Group>,
        copy_threads: usize,
        load_deadline_ms: u64,
    ) -> PyResult<Self> {
        let hello = RankHello {
            version: VERSION,
            rank,
            world,
            stage,
            refusal,
            machine,
            encoding,
            scales,
            groups: (0..)
                .zip(&groups)
                .map(|(number, group)| group.share(number))
                .collect(),
        };
        let identity = Identity {
            instance: instance_id(py, instance)?,
            role: Role::Worker,
            rank,
            world,
            label,
        };
        let link = start_link(socket, identity).map_err(|failure| from_client(py, &failure))?;
        // Without a cache nothing is copied.
        let device: Arc<dyn Device> = match groups.first() {
            Some(group) => Arc::clone(&group.cache.get().device),
            None => Arc::new(HostDevice),
        };
        let settings = Settings {
            threads: copy_threads,
            load_deadline: Duration::from_millis(load_deadline_ms),
            ..Settings::default()
        };
        let worker = Worker::new(
            settings,
            Arc::new(link),
            device,
            clock(),
            hello,
            groups
                .iter()
                .map(|group| group.cache.get().pages.clone())
                .collect(),
        )?;
        Ok(WorkerHalf {
            inner: Mutex::new(Some(worker)),
        })
    }

    /// What this rank is, for the scheduler half.
    fn hello<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        let hello = self.with(|half| half.hello().encode_to_vec());
        PyBytes::new(py, &hello.unwrap_or_default())
    }

    /// Begins a step: takes the scheduler half's orders, and waits for the copies out of blocks that are taken away.
    fn begin(&self, py: Python<'_>, orders: &[u8]) -> PyResult<()> {
        py.detach(|| self.with(|half| half.begin(orders)))
            .unwrap_or(Ok(()))
            .map_err(|failure| error(py, kvd_client::ErrorKind::Internal, failure.to_string()))
    }

    /// Waits until no copy is under way.
    fn wait_idle(&self, py: Python<'_>) {
        py.detach(|| self.with(|half| half.wait_idle()));
    }

    /// `stream` gives the handle of the stream that the engine computes on; it is called if there is something to load.
    #[pyo3(signature = (stream=None))]
    fn start_loads(&self, stream: Option<&Bound<'_, PyAny>>) -> PyResult<()> {
        if self.with(|half| half.has_loads()) == Some(true) {
            let stream = handle(stream)?;
            self.with(|half| half.start_loads(stream));
        }
        Ok(())
    }

    /// As `start_loads`.
    #[pyo3(signature = (stream=None))]
    fn start_stores(&self, stream: Option<&Bound<'_, PyAny>>) -> PyResult<()> {
        if self.with(|half| half.has_stores()) == Some(true) {
            let stream = handle(stream)?;
            self.with(|half| half.start_stores(stream));
        }
        Ok(())
    }

    /// Waits until no copy is under way, and lets none begin until `resume`.
    fn pause(&self, py: Python<'_>) {
        py.detach(|| self.with(Worker::pause));
    }

    fn resume(&self) {
        self.with(Worker::resume);
    }

    fn results(&self) -> Results {
        let results = self.with(Worker::results).unwrap_or_default();
        (
            results.sent,
            results.received,
            results.invalid,
            results.failed,
        )
    }

    fn report<'py>(&self, py: Python<'py>) -> Option<Bound<'py, PyBytes>> {
        let report = self.with(Worker::report).flatten()?;
        Some(PyBytes::new(py, &report))
    }

    /// What people should read: (is it a warning, text).
    fn notices(&self) -> Vec<(bool, String)> {
        self.with(Worker::notices)
            .unwrap_or_default()
            .into_iter()
            .map(|notice| (notice.level == Level::Warning, notice.text))
            .collect()
    }

    /// What has happened since the last call, or None.
    fn observed<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyDict>>> {
        dict(py, self.with(|half| half.observed()).flatten())
    }

    /// Counters, for tests and for people.
    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let stats = PyDict::new(py);
        if let Some(counters) = self.with(|half| half.counters()) {
            for (name, value) in Counters::names().iter().zip(counters.values()) {
                stats.set_item(name, value)?;
            }
        }
        Ok(stats)
    }

    /// Waits for the copies under way and ends the session. Everything after this does nothing.
    fn close(&self, py: Python<'_>) {
        let half = self.inner.lock().take();
        py.detach(|| drop(half));
    }
}

/// What the engine's framework says is its stream.
fn handle(stream: Option<&Bound<'_, PyAny>>) -> PyResult<StreamHandle> {
    let Some(stream) = stream else {
        return Ok(StreamHandle::DEFAULT);
    };
    let handle = stream.call0()?.extract()?;
    // SAFETY: `vllm/caches.py` takes it from the framework's current stream on the device of the KV cache, which the engine keeps.
    Ok(unsafe { StreamHandle::new(handle) })
}
