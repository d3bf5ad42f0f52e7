//! vLLM's lists of a request's hashes and blocks, read where they lie: a step may have thousands of entries, and Python objects that the
//! engine has not touched for a step are slow enough to look at once.

use kvd_connectors::HASH_BYTES;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyInt, PySequence};

/// Hashes of the blocks `first..last`, [`HASH_BYTES`] each, of a list in which a block has `ratio` hashes: that at its end covers all
/// before it. Shorter ones have zeros in front.
///
/// # Errors
/// What Python raises when the list is another or too short, or a hash is too long.
pub(crate) fn hashes(
    list: &Bound<'_, PyAny>,
    ratio: usize,
    first: usize,
    last: usize,
) -> PyResult<Vec<u8>> {
    let list = list.cast::<PySequence>()?;
    let mut all = Vec::with_capacity(last.saturating_sub(first).saturating_mul(HASH_BYTES));
    for block in first..last {
        all.extend_from_slice(&hash(&list.get_item(block * ratio + ratio - 1)?)?);
    }
    Ok(all)
}

/// A hash of [`HASH_BYTES`], with zeros in front of a shorter one.
///
/// # Errors
/// `ValueError` when it is longer, `TypeError` when it is no bytes.
pub(crate) fn hash(hash: &Bound<'_, PyAny>) -> PyResult<[u8; HASH_BYTES]> {
    let bytes = hash.cast::<PyBytes>()?.as_bytes();
    let mut hash = [0; HASH_BYTES];
    let Some(pad) = HASH_BYTES.checked_sub(bytes.len()) else {
        let text = format!("a block hash of {} bytes", bytes.len());
        return Err(pyo3::exceptions::PyValueError::new_err(text));
    };
    hash[pad..].copy_from_slice(bytes);
    Ok(hash)
}

/// Numbers of the blocks from `first` up to before `last`, or the list's end, of a list of numbers or of vLLM's `KVCacheBlock`.
///
/// # Errors
/// What Python raises when the list is another.
pub(crate) fn blocks(list: &Bound<'_, PyAny>, first: usize, last: usize) -> PyResult<Vec<u32>> {
    let list = list.cast::<PySequence>()?;
    let last = last.min(list.len()?);
    let number = |at| {
        let item = list.get_item(at)?;
        match item.is_instance_of::<PyInt>() {
            true => item.extract(),
            false => item.getattr(intern!(item.py(), "block_id"))?.extract(),
        }
    };
    (first..last).map(number).collect()
}
