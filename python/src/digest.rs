//! BLAKE3 of files and bytes, which weights and adapters are known by; and the checksum of blocks.

use std::fs::File;
use std::io::Read;
use std::path::PathBuf;

use kvd_arena::checksum::Engine;
use pyo3::buffer::PyBuffer;
use pyo3::prelude::*;

use crate::errors::invalid;

/// Bytes read at a time.
const STEP: usize = 4 << 20;

/// BLAKE3 of a file's content, as 64 hexadecimal digits. The GIL is released meanwhile.
#[pyfunction]
pub(crate) fn file_digest(py: Python<'_>, path: PathBuf) -> PyResult<String> {
    py.detach(|| {
        let mut file = File::open(path)?;
        let mut hash = blake3::Hasher::new();
        let mut step = vec![0; STEP];
        loop {
            match file.read(&mut step)? {
                0 => return Ok(hash.finalize().to_hex().to_string()),
                count => hash.update(&step[..count]),
            };
        }
    })
}

/// BLAKE3 of some bytes, as 64 hexadecimal digits.
#[pyfunction]
pub(crate) fn digest(data: &[u8]) -> String {
    blake3::hash(data).to_hex().to_string()
}

/// CRC-64/NVME of a buffer, as blocks are checked with. The GIL is released meanwhile.
#[pyfunction]
pub(crate) fn crc64nvme(py: Python<'_>, data: PyBuffer<u8>) -> PyResult<u64> {
    if !data.is_c_contiguous() {
        return Err(invalid(py, "the buffer has gaps: pass a contiguous one"));
    }
    let (address, bytes) = (data.buf_ptr() as usize, data.len_bytes());
    Ok(py.detach(|| {
        let engine = Engine::new(bytes, false);
        let mut state = engine.start();
        // SAFETY: the buffer is held until after this. Who changes it meanwhile gets some checksum.
        unsafe { engine.scan(address as *const u8, bytes, &mut state) };
        engine.finish(state)
    }))
}
