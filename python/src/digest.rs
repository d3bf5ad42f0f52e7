//! BLAKE3 of files and bytes: what weights and adapters are known by.

use std::fs::File;
use std::io::Read;
use std::path::PathBuf;

use pyo3::prelude::*;

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
