//! The engine's KV cache, given as addresses and strides: what the canary packs and unpacks, and what the worker half copies.

use std::sync::Arc;

use kvd_arena::SlotBytes;
use kvd_core::GroupKind;
use kvd_core::geometry::{Cut, GroupGeometry};
use kvd_device::{
    CudaDevice, Device, HostDevice, LayerView, LoadJob, LoadPlan, Loaded, Pages, PartGeometry,
    StoreJob, StreamHandle,
};
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::errors::{error, invalid};

/// Address, length, and strides from page to page, head to head and token to token; all in bytes.
type Layer = (usize, usize, usize, usize, usize);

/// See `kvdaemon/_native.pyi`.
#[pyclass(frozen, module = "kvdaemon._native")]
pub(crate) struct KvCache {
    pub(crate) pages: Pages,
    pub(crate) device: Arc<dyn Device>,
}

#[pymethods]
impl KvCache {
    /// The caller keeps the memory alive and in place until every user of this object is gone. `device` is where it is: `cpu`,
    /// or `cuda:N`.
    #[new]
    #[pyo3(signature = (layers, *, heads, block_tokens, page_tokens, cell_bytes, device="cpu"))]
    fn new(
        py: Python<'_>,
        layers: Vec<Layer>,
        heads: u32,
        block_tokens: u32,
        page_tokens: u32,
        cell_bytes: u32,
        device: &str,
    ) -> PyResult<Self> {
        let device = open(py, device)?;
        let part = PartGeometry {
            layers: layers.len() as u32,
            heads,
            tokens: block_tokens,
            cell_bytes,
        };
        let views = layers
            .into_iter()
            .map(|(base, len, block, head, token)| {
                // SAFETY: the caller's promise above; `vllm/caches.py` takes these numbers from tensors that the engine keeps
                // until its workers shut down, which stops the worker half first.
                unsafe { LayerView::new(base, len, block, head, token) }
            })
            .collect();
        let pages = Pages::new(views, part, page_tokens)
            .map_err(|failure| invalid(py, failure.to_string()))?;
        Ok(KvCache { pages, device })
    }

    /// Blocks that every layer has.
    fn blocks(&self) -> u32 {
        self.pages.pages() / self.pages.pages_per_block() as u32
    }

    /// A block as it would be stored: `[layer][head][token][cell]`, once what was asked of `stream` is done. The GIL is released
    /// meanwhile.
    #[pyo3(signature = (block, stream=0))]
    fn pack<'py>(
        &self,
        py: Python<'py>,
        block: u32,
        stream: usize,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let mut bytes = vec![0u8; self.pages.part().bytes()];
        py.detach(|| {
            let pages = self.pages_of(block);
            // SAFETY: `bytes` is ours alone and lives until the copy has returned.
            let part = unsafe { SlotBytes::from_raw(bytes.as_mut_ptr(), bytes.len()) };
            let job = StoreJob {
                from: &self.pages,
                pages: &pages,
                part,
            };
            // SAFETY: the caller's promise: 0 or a live stream of this device.
            let stream = unsafe { StreamHandle::new(stream) };
            self.device.point(stream)?.wait()?;
            self.device.store(&[job], &mut Vec::new())
        })
        .map_err(|failure| invalid(py, failure.to_string()))?;
        Ok(PyBytes::new(py, &bytes))
    }

    /// Writes a packed block into a block of the cache, once what was asked of `stream` is done. The GIL is released meanwhile.
    #[pyo3(signature = (block, bytes, stream=0))]
    fn unpack(&self, py: Python<'_>, block: u32, bytes: &[u8], stream: usize) -> PyResult<()> {
        let mut bytes = bytes.to_vec();
        let part = *self.pages.part();
        if bytes.len() != part.bytes() {
            return Err(invalid(
                py,
                format!("a packed block has {} bytes", part.bytes()),
            ));
        }
        let loaded = py
            .detach(|| self.unpack_checked(block, &mut bytes, &part, stream))
            .map_err(|text| invalid(py, text))?;
        match loaded {
            true => Ok(()),
            false => Err(error(
                py,
                kvd_client::ErrorKind::Corrupt,
                "an unpacked block does not have the checksums it was packed with",
            )),
        }
    }
}

/// The device that a framework calls `cpu` or `cuda:N`.
fn open(py: Python<'_>, name: &str) -> PyResult<Arc<dyn Device>> {
    let (kind, number) = name.split_once(':').unwrap_or((name, "0"));
    match (kind, number.parse::<u32>()) {
        ("cpu", Ok(_)) => Ok(Arc::new(HostDevice)),
        ("cuda", Ok(number)) => match py.detach(|| CudaDevice::open(number)) {
            Ok(device) => Ok(Arc::new(device)),
            Err(failure) => Err(error(
                py,
                kvd_client::ErrorKind::Unavailable,
                failure.to_string(),
            )),
        },
        _ => Err(error(
            py,
            kvd_client::ErrorKind::Unsupported,
            format!("KV caches on {name} are not supported: cpu and cuda:N are"),
        )),
    }
}

impl KvCache {
    fn pages_of(&self, block: u32) -> Vec<u32> {
        let each = self.pages.pages_per_block() as u32;
        (block.saturating_mul(each)..block.saturating_add(1).saturating_mul(each)).collect()
    }

    fn unpack_checked(
        &self,
        block: u32,
        bytes: &mut [u8],
        part: &PartGeometry,
        stream: usize,
    ) -> Result<bool, String> {
        let text = |failure: &dyn std::fmt::Display| failure.to_string();
        let geometry = GroupGeometry {
            kind: GroupKind::Full,
            layers: part.layers,
            heads: part.heads,
            block_tokens: part.tokens,
            cell_bytes: part.cell_bytes,
            window: None,
        };
        geometry.validate().map_err(|failure| text(&failure))?;
        let cut = Cut::whole(&geometry);
        let plan =
            LoadPlan::new(&geometry, &cut, &cut.part(0)).map_err(|failure| text(&failure))?;
        let (crcs, pages) = (self.checksums(bytes, part)?, self.pages_of(block));
        // SAFETY: `bytes` is the caller's alone and lives until the copy has returned.
        let slot = unsafe { SlotBytes::from_raw(bytes.as_mut_ptr(), bytes.len()) };
        let job = LoadJob {
            slot,
            plan: &plan,
            crcs: &crcs,
            to: &self.pages,
            pages: &pages,
        };
        let mut results = Vec::new();
        // SAFETY: the caller's promise: 0 or a live stream of this device.
        let stream = unsafe { StreamHandle::new(stream) };
        let after = self.device.point(stream).map_err(|e| text(&e))?;
        after.wait().map_err(|e| text(&e))?;
        self.device
            .load(&[job], &mut results)
            .map_err(|failure| text(&failure))?;
        Ok(results == [Loaded::Good])
    }

    /// Checksums of a packed block: those that the host computes, of a copy from it to nowhere in particular.
    fn checksums(&self, bytes: &mut [u8], part: &PartGeometry) -> Result<Vec<u64>, String> {
        let mut scratch = vec![0u8; bytes.len()];
        let mut crcs = Vec::new();
        // SAFETY: both buffers live until the copy has returned, and nobody else has them.
        let (from, to) = unsafe {
            (
                Pages::contiguous(bytes.as_mut_ptr() as usize, bytes.len(), *part),
                SlotBytes::from_raw(scratch.as_mut_ptr(), scratch.len()),
            )
        };
        let from = from.map_err(|failure| failure.to_string())?;
        let job = StoreJob {
            from: &from,
            pages: &[0],
            part: to,
        };
        HostDevice
            .store(&[job], &mut crcs)
            .map_err(|failure| failure.to_string())?;
        Ok(crcs)
    }
}

/// The packed canary with this seed for `layers x heads x tokens x cell_bytes`.
#[pyfunction]
pub(crate) fn canary_block<'py>(
    py: Python<'py>,
    seed: u32,
    layers: u32,
    heads: u32,
    tokens: u32,
    cell_bytes: u32,
) -> Bound<'py, PyBytes> {
    let part = PartGeometry {
        layers,
        heads,
        tokens,
        cell_bytes,
    };
    PyBytes::new(py, &kvd_connectors::canary::block(seed, &part))
}
