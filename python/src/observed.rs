//! What has happened in a half, as a dictionary for the engine's metrics.

use kvd_connectors::observed::Observed;
use pyo3::prelude::*;
use pyo3::types::PyDict;

/// What a half's `observed` gives: counts by name, lists of seconds by name, `connected` if that has changed.
pub(crate) fn dict<'py>(
    py: Python<'py>,
    observed: Option<Observed>,
) -> PyResult<Option<Bound<'py, PyDict>>> {
    let Some(observed) = observed else {
        return Ok(None);
    };
    let all = PyDict::new(py);
    for (name, count) in observed.counts {
        all.set_item(name, count)?;
    }
    for (name, times) in observed.times {
        let seconds: Vec<f64> = times.iter().map(|us| f64::from(*us) / 1e6).collect();
        all.set_item(name, seconds)?;
    }
    if let Some(connected) = observed.connected {
        all.set_item("connected", u8::from(connected))?;
    }
    Ok(Some(all))
}
