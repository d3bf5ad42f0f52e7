//! A session for scripts: lookup, store and load of whole blocks in any buffers. See `kvdaemon/_native.pyi` for what each
//! method takes and gives. The GIL is released around everything that waits or copies.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use kvd_client::{
    BlockMover, BlockRef, ChainRef, Error, ErrorKind, FailReason, GroupLayout, Identity,
    LoadOutcome, MoverConfig, StoreOutcome,
};
use kvd_core::geometry::{Cut, GroupGeometry};
use kvd_core::record::NamespaceRecord;
use kvd_device::{HostDevice, Pages, PartGeometry};
use parking_lot::Mutex;
use pyo3::buffer::PyUntypedBuffer;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::errors::{error, from_client, invalid};

const HASH_BYTES: usize = 32;
/// Largest cell that a record may have, bytes.
const MAX_CELL: usize = 16 << 20;
/// Bytes of blocks moved in one window, about.
const WINDOW_BYTES: usize = 64 << 20;

struct Open {
    session: kvd_client::Session,
    movers: Vec<BlockMover>,
}

/// See `kvdaemon/_native.pyi`.
#[pyclass(frozen, module = "kvdaemon._native")]
pub(crate) struct Session {
    inner: Mutex<Option<Open>>,
    tenant: String,
    daemon_version: String,
    timeout: Duration,
}

/// A namespace that a session has joined. See `kvdaemon/_native.pyi`.
#[pyclass(frozen, module = "kvdaemon._native")]
pub(crate) struct Namespace {
    session: Py<Session>,
    name: u32,
    id: [u8; 32],
    mover: usize,
    part: PartGeometry,
}

impl Session {
    /// Runs with the open session, without the GIL.
    fn run<R: Send>(
        &self,
        py: Python<'_>,
        work: impl FnOnce(&mut Open) -> Result<R, Error> + Send,
    ) -> PyResult<R> {
        let result = py.detach(|| self.inner.lock().as_mut().map(work));
        match result {
            Some(result) => result.map_err(|failure| from_client(py, &failure)),
            None => Err(error(py, ErrorKind::Unavailable, "this session is closed")),
        }
    }
}

#[pymethods]
impl Session {
    #[new]
    #[pyo3(signature = (socket, label="", timeout=5.0))]
    fn new(py: Python<'_>, socket: PathBuf, label: &str, timeout: f64) -> PyResult<Self> {
        let timeout = Duration::try_from_secs_f64(timeout)
            .ok()
            .filter(|timeout| !timeout.is_zero())
            .ok_or_else(|| invalid(py, "timeout must be a positive number of seconds"))?;
        let identity = Identity::script(label);
        let session = py
            .detach(|| kvd_client::Session::connect(&socket, &identity, timeout))
            .map_err(|failure| from_client(py, &failure))?;
        let hello = session.hello();
        Ok(Session {
            tenant: hello.tenant.clone(),
            daemon_version: hello.daemon_version.clone(),
            timeout,
            inner: Mutex::new(Some(Open {
                session,
                movers: Vec::new(),
            })),
        })
    }

    #[getter]
    fn tenant(&self) -> &str {
        &self.tenant
    }

    #[getter]
    fn daemon_version(&self) -> &str {
        &self.daemon_version
    }

    /// Joins a namespace: its record's fields, complete.
    fn register(slf: &Bound<'_, Self>, fields: Vec<(String, String)>) -> PyResult<Namespace> {
        let py = slf.py();
        let me = slf.get();
        let record =
            NamespaceRecord::build(fields).map_err(|failure| invalid(py, failure.to_string()))?;
        let [geometry] = record.groups() else {
            return Err(invalid(
                py,
                "a session for scripts has namespaces of one KV-cache group",
            ));
        };
        let geometry = geometry.clone();
        let part = PartGeometry {
            layers: geometry.layers,
            heads: geometry.heads,
            tokens: geometry.block_tokens,
            cell_bytes: geometry.cell_bytes,
        };
        let cut = Cut::whole(&geometry);
        let layout = GroupLayout {
            group: 0,
            layer_bounds: cut.layer_bounds().to_vec(),
            head_bounds: cut.head_bounds().to_vec(),
            copies: true,
            part: 0,
        };
        let deadline = me.timeout;
        let (registered, mover) = me.run(py, |open| {
            let registered = open.session.register(&record.encode(), &[layout])?;
            open.movers.push(mover(geometry, cut, deadline)?);
            Ok((registered, open.movers.len() - 1))
        })?;
        Ok(Namespace {
            session: slf.clone().unbind(),
            name: registered.namespace,
            id: registered.namespace_id,
            mover,
            part,
        })
    }

    /// The daemon's status as JSON.
    fn status(&self, py: Python<'_>) -> PyResult<String> {
        let bytes = self.run(py, |open| open.session.status())?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Waits for an answer of the daemon.
    fn ping(&self, py: Python<'_>) -> PyResult<()> {
        self.run(py, |open| open.session.ping())
    }

    /// Ends the session.
    fn close(&self, py: Python<'_>) {
        let open = py.detach(|| self.inner.lock().take());
        py.detach(|| drop(open));
    }
}

fn mover(geometry: GroupGeometry, cut: Cut, load_deadline: Duration) -> Result<BlockMover, Error> {
    BlockMover::new(
        Arc::new(HostDevice),
        MoverConfig {
            geometry,
            cut,
            part: 0,
            group: 0,
            window_bytes: WINDOW_BYTES,
            load_deadline,
        },
    )
}

#[pymethods]
impl Namespace {
    /// BLAKE3 of the record.
    #[getter]
    fn id<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.id)
    }

    #[getter]
    fn block_bytes(&self) -> usize {
        self.part.bytes()
    }

    /// Runs of blocks that are not absent: (start, length, where).
    #[pyo3(signature = (hashes, *, leading=false, lease_ms=0))]
    fn lookup(
        &self,
        py: Python<'_>,
        hashes: &[u8],
        leading: bool,
        lease_ms: u32,
    ) -> PyResult<Vec<(u32, u32, &'static str)>> {
        check_hashes(py, hashes)?;
        let name = self.name;
        let chain = ChainRef {
            group: 0,
            hashes,
            parent: None,
        };
        let reply = self.session.get().run(py, |open| {
            open.session.lookup(name, &[chain], lease_ms, leading)
        })?;
        let Some(runs) = reply.chains.first() else {
            return Ok(Vec::new());
        };
        Ok(runs
            .start
            .iter()
            .zip(&runs.length)
            .zip(&runs.r#where)
            .map(|((start, length), place)| (*start, *length, place_word(*place)))
            .collect())
    }

    /// Stores blocks; one word for each.
    fn store(
        &self,
        py: Python<'_>,
        hashes: &[u8],
        buffers: &Bound<'_, PyAny>,
    ) -> PyResult<Vec<&'static str>> {
        let count = check_hashes(py, hashes)?;
        let blocks = Blocks::take(buffers, count, &self.part, false)?;
        let (name, mover) = (self.name, self.mover);
        let outcomes = self.session.get().run(py, |open| {
            let chain = ChainRef {
                group: 0,
                hashes,
                parent: None,
            };
            open.movers[mover].store(&mut open.session, name, chain, &blocks.refs())
        })?;
        Ok(outcomes.iter().map(store_word).collect())
    }

    /// Loads blocks; one word for each.
    fn load(
        &self,
        py: Python<'_>,
        hashes: &[u8],
        buffers: &Bound<'_, PyAny>,
    ) -> PyResult<Vec<&'static str>> {
        let count = check_hashes(py, hashes)?;
        let blocks = Blocks::take(buffers, count, &self.part, true)?;
        let (name, mover) = (self.name, self.mover);
        let outcomes = self.session.get().run(py, |open| {
            open.movers[mover].load(&mut open.session, name, hashes, &blocks.refs())
        })?;
        Ok(outcomes.iter().map(load_word).collect())
    }
}

fn check_hashes(py: Python<'_>, hashes: &[u8]) -> PyResult<usize> {
    match hashes.len() % HASH_BYTES {
        0 => Ok(hashes.len() / HASH_BYTES),
        _ => Err(invalid(
            py,
            format!("hashes have {} bytes: pass 32 bytes for each", hashes.len()),
        )),
    }
}

/// Buffers of the caller, held while they are copied.
struct Blocks {
    pages: Vec<Pages>,
    // Keeps the memory exported, so that its owner can't move or free it.
    _held: Vec<PyUntypedBuffer>,
}

impl Blocks {
    /// One buffer a block, or one buffer with all blocks one after the other.
    fn take(
        buffers: &Bound<'_, PyAny>,
        count: usize,
        part: &PartGeometry,
        writable: bool,
    ) -> PyResult<Blocks> {
        let py = buffers.py();
        let (block, mut pages, mut held) = (part.bytes(), Vec::new(), Vec::new());
        if let Ok(one) = PyUntypedBuffer::get(buffers) {
            let base = check_buffer(py, &one, block * count, writable)?;
            for at in 0..count {
                pages.push(page(py, base + at * block, part)?);
            }
            held.push(one);
        } else {
            for item in buffers.try_iter()? {
                let one = PyUntypedBuffer::get(&item?)?;
                let base = check_buffer(py, &one, block, writable)?;
                pages.push(page(py, base, part)?);
                held.push(one);
            }
        }
        if pages.len() != count {
            let text = format!("{count} hashes but {} buffers", pages.len());
            return Err(invalid(py, text));
        }
        Ok(Blocks { pages, _held: held })
    }

    fn refs(&self) -> Vec<BlockRef<'_>> {
        self.pages
            .iter()
            .map(|at| BlockRef { at, pages: &[0] })
            .collect()
    }
}

fn page(py: Python<'_>, base: usize, part: &PartGeometry) -> PyResult<Pages> {
    // SAFETY: `base` is in a buffer that was checked to be that long and that `Blocks` holds exported during the copy. A
    // script that writes to a buffer while it is being stored or loaded gets what it asked for: bytes of either kind.
    unsafe { Pages::contiguous(base, part.bytes(), *part) }
        .map_err(|failure| invalid(py, failure.to_string()))
}

fn check_buffer(
    py: Python<'_>,
    buffer: &PyUntypedBuffer,
    bytes: usize,
    writable: bool,
) -> PyResult<usize> {
    if buffer.len_bytes() != bytes {
        let text = format!(
            "a buffer has {} bytes, {bytes} are wanted",
            buffer.len_bytes()
        );
        return Err(invalid(py, text));
    }
    if !buffer.is_c_contiguous() {
        return Err(invalid(py, "a buffer is not contiguous"));
    }
    if writable && buffer.readonly() {
        return Err(invalid(py, "a buffer to load into is read-only"));
    }
    Ok(buffer.buf_ptr() as usize)
}

fn place_word(place: i32) -> &'static str {
    match place {
        1 => "host",
        2 => "nvme",
        3 => "object",
        4 => "fetching",
        5 => "filling",
        _ => "absent",
    }
}

fn store_word(outcome: &StoreOutcome) -> &'static str {
    match outcome {
        StoreOutcome::Visible => "stored",
        StoreOutcome::Waiting => "waiting",
        StoreOutcome::Present => "present",
        StoreOutcome::Filling => "filling",
        StoreOutcome::NoSpace => "no_space",
        StoreOutcome::Stale => "stale",
        StoreOutcome::Failed(reason) => fail_word(*reason),
    }
}

fn load_word(outcome: &LoadOutcome) -> &'static str {
    match outcome {
        LoadOutcome::Loaded => "loaded",
        LoadOutcome::Absent => "absent",
        LoadOutcome::Failed(reason) => fail_word(*reason),
    }
}

fn fail_word(reason: FailReason) -> &'static str {
    match reason {
        FailReason::Corrupt => "failed:corrupt",
        FailReason::Overrun => "failed:overrun",
        FailReason::Daemon => "failed:daemon",
        FailReason::Lost => "failed:lost",
        FailReason::Timeout => "failed:timeout",
        FailReason::Malformed => "failed:malformed",
        FailReason::Device => "failed:device",
    }
}

/// How a block of so many bytes is written in a record when its inside does not matter: (tokens, bytes of a cell).
#[pyfunction]
pub(crate) fn opaque_block(py: Python<'_>, block_bytes: usize) -> PyResult<(usize, usize)> {
    let mut tokens = block_bytes.div_ceil(MAX_CELL).max(1);
    while tokens <= 4096 {
        if block_bytes > 0 && block_bytes.is_multiple_of(tokens) {
            return Ok((tokens, block_bytes / tokens));
        }
        tokens += 1;
    }
    Err(invalid(
        py,
        format!(
            "blocks of {block_bytes} bytes are not supported: choose a positive size with small factors"
        ),
    ))
}
