//! The native module of the Python package `kvdaemon`: a session for scripts, and the two halves of the vLLM connector.
//!
//! Everything here translates; what is decided is decided in `kvd-connectors` and `kvd-client`. The GIL is released around
//! everything that waits or copies. Of vLLM it knows the form of a few objects (`engine`, `lists`, `capture`), of torch nothing; addresses come in as numbers.

mod cache;
mod capture;
mod clock;
mod digest;
mod engine;
mod errors;
mod lists;
mod observed;
mod scheduler;
mod session;
mod worker;

use pyo3::prelude::*;

/// The native module.
#[pymodule]
fn _native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("KvdError", module.py().get_type::<errors::KvdError>())?;
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add_class::<session::Session>()?;
    module.add_class::<session::Namespace>()?;
    module.add_class::<scheduler::SchedulerHalf>()?;
    module.add_class::<worker::WorkerHalf>()?;
    module.add_class::<cache::KvCache>()?;
    module.add_function(wrap_pyfunction!(digest::file_digest, module)?)?;
    module.add_function(wrap_pyfunction!(digest::digest, module)?)?;
    module.add_function(wrap_pyfunction!(digest::crc64nvme, module)?)?;
    module.add_function(wrap_pyfunction!(cache::canary_block, module)?)?;
    module.add_function(wrap_pyfunction!(session::opaque_block, module)?)?;
    Ok(())
}
