//! What the scheduler half reads of vLLM's objects, and the references that it takes to blocks. Native, because Python code that has not
//! run since the last step costs several times what it does in a loop.

use pyo3::intern;
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;
use pyo3::types::{PyDict, PyList};

/// A step as vLLM has planned it: `SchedulerOutput`.
#[derive(Default)]
pub(crate) struct Step<'py> {
    /// Requests that have lost their blocks.
    pub(crate) preempted: Vec<PyBackedStr>,
    /// Those that compute.
    pub(crate) ids: Vec<PyBackedStr>,
    /// The same, as vLLM has them: what it keeps by them is found quicker.
    pub(crate) names: Vec<Bound<'py, PyAny>>,
    /// How many of their tokens are computed before it.
    pub(crate) computed: Vec<u32>,
    /// And how many it adds, if that was asked for.
    pub(crate) ahead: Vec<u32>,
}

impl<'py> Step<'py> {
    /// # Errors
    /// What Python raises when the object is another.
    pub(crate) fn read(output: &Bound<'py, PyAny>, ahead: bool) -> PyResult<Self> {
        let py = output.py();
        let mut step = Step::default();
        let new = output.getattr(intern!(py, "scheduled_new_reqs"))?;
        for new in new.cast::<PyList>()? {
            let computed = new.getattr(intern!(py, "num_computed_tokens"))?;
            step.add(new.getattr(intern!(py, "req_id"))?, &computed)?;
        }
        let cached = output.getattr(intern!(py, "scheduled_cached_reqs"))?;
        let ids = cached.getattr(intern!(py, "req_ids"))?;
        let computed = cached.getattr(intern!(py, "num_computed_tokens"))?;
        for (id, computed) in ids.cast::<PyList>()?.iter().zip(computed.cast::<PyList>()?) {
            step.add(id, &computed)?;
        }
        let preempted = output.getattr(intern!(py, "preempted_req_ids"))?;
        if !preempted.is_none() {
            for id in preempted.try_iter()? {
                step.preempted.push(id?.extract()?);
            }
        }
        if ahead {
            let scheduled = output.getattr(intern!(py, "num_scheduled_tokens"))?;
            let scheduled = scheduled.cast::<PyDict>()?;
            for id in &step.names {
                let tokens = scheduled.get_item(id)?;
                step.ahead
                    .push(tokens.map_or(Ok(0), |tokens| tokens.extract())?);
            }
        }
        Ok(step)
    }

    fn add(&mut self, id: Bound<'py, PyAny>, computed: &Bound<'py, PyAny>) -> PyResult<()> {
        self.ids.push(id.extract()?);
        self.names.push(id);
        self.computed.push(computed.extract()?);
        Ok(())
    }
}

/// Where vLLM keeps requests and their blocks.
pub(crate) struct Lists<'a, 'py> {
    /// `SchedulerOutput`.
    pub(crate) output: &'a Bound<'py, PyAny>,
    /// Requests by their ids.
    pub(crate) requests: &'a Bound<'py, PyDict>,
    /// `KVCacheManager`, or None.
    pub(crate) manager: &'a Bound<'py, PyAny>,
    /// Of each of vLLM's groups, what it has the blocks of requests in, by their ids; empty where that is not known.
    pub(crate) tables: &'a [Bound<'py, PyDict>],
}

impl<'py> Lists<'_, 'py> {
    /// A request's blocks, or their numbers, by vLLM's groups. Not copied where that can be helped: they are many.
    ///
    /// # Errors
    /// What Python raises when the objects are others.
    pub(crate) fn blocks(&self, id: &Bound<'py, PyAny>) -> PyResult<Vec<Bound<'py, PyAny>>> {
        let py = self.output.py();
        if !self.tables.is_empty() {
            let blocks = self.tables.iter().map(|table| match table.get_item(id)? {
                Some(blocks) => Ok(blocks),
                None => Ok(PyList::empty(py).into_any()),
            });
            return blocks.collect();
        }
        let (output, manager) = (self.output, self.manager);
        let blocks = if manager.is_none() {
            let state = output.getattr(intern!(py, "kv_connector_block_state"))?;
            state.call_method1(intern!(py, "resolve_block_ids"), (id,))?
        } else {
            let blocks = manager.call_method1(intern!(py, "get_blocks"), (id,))?;
            blocks.getattr(intern!(py, "blocks"))?
        };
        groups(&blocks)
    }
}

/// A request's blocks as vLLM tells them, group by group.
///
/// # Errors
/// What Python raises when the object is another.
pub(crate) fn groups<'py>(blocks: &Bound<'py, PyAny>) -> PyResult<Vec<Bound<'py, PyAny>>> {
    blocks.try_iter()?.collect()
}

/// A recurrent state that vLLM offers once, in a block of its own.
pub(crate) struct Offer<'py> {
    /// The request's id.
    pub(crate) id: Bound<'py, PyAny>,
    /// vLLM's number of the group.
    pub(crate) of: usize,
    pub(crate) block: u32,
    /// How many tokens led to it.
    pub(crate) tokens: usize,
}

/// Recurrent states that a step (`SchedulerOutput`) leaves in blocks of their own.
///
/// # Errors
/// What Python raises when the object is another.
pub(crate) fn offers<'py>(output: &Bound<'py, PyAny>) -> PyResult<Vec<Offer<'py>>> {
    let py = output.py();
    let mut offers = Vec::new();
    let Some(state) = output.getattr_opt(intern!(py, "kv_connector_block_state"))? else {
        return Ok(offers);
    };
    let Some(all) = state.getattr_opt(intern!(py, "boundary_state_offloads"))? else {
        return Ok(offers);
    };
    if all.is_truthy()? {
        for (id, list) in all.cast::<PyDict>()? {
            for one in list.try_iter()? {
                let (of, block, tokens) = one?.extract()?;
                let id = id.clone();
                offers.push(Offer {
                    id,
                    of,
                    block,
                    tokens,
                });
            }
        }
    }
    Ok(offers)
}

/// The hash under which vLLM's pool (`BlockPool`) finds a block: Python's None if it does not, or if the pool is not known.
///
/// # Errors
/// What Python raises when the pool is another.
pub(crate) fn found_by<'py>(pool: &Bound<'py, PyAny>, block: u32) -> PyResult<Bound<'py, PyAny>> {
    if pool.is_none() {
        return Ok(pool.clone());
    }
    of(pool, &[block])?[0].getattr(intern!(pool.py(), "block_hash"))
}

/// A running request: `Request`.
pub(crate) struct Running<'py> {
    /// Of its full blocks, one for so many tokens as the engine hashes at a time.
    pub(crate) hashes: Bound<'py, PyAny>,
    /// So many of its tokens are hashed.
    pub(crate) hashed: usize,
    /// So many of those have KV that is final once it is computed.
    pub(crate) last: usize,
}

impl<'py> Running<'py> {
    /// The last token does not count: its KV may not be computed (async scheduling), and in a streaming session the token may still be
    /// replaced.
    ///
    /// # Errors
    /// What Python raises when the object is another.
    pub(crate) fn read(request: &Bound<'py, PyAny>, hash_tokens: usize) -> PyResult<Self> {
        let py = request.py();
        let hashes = request.getattr(intern!(py, "block_hashes"))?;
        let tokens: usize = request.getattr(intern!(py, "num_tokens"))?.extract()?;
        let hashed = hashes.len()?.saturating_mul(hash_tokens).min(tokens);
        Ok(Running {
            hashed,
            last: tokens.saturating_sub(1).min(hashed),
            hashes,
        })
    }
}

/// What came back from the workers with a step: `KVConnectorOutput`.
pub(crate) struct Ended {
    /// Requests whose blocks are free of copies.
    pub(crate) sent: Vec<PyBackedStr>,
    /// Requests whose loads are over.
    pub(crate) received: Vec<PyBackedStr>,
    /// Blocks that could not be loaded.
    pub(crate) invalid: Vec<u32>,
    /// Requests whose loads failed.
    pub(crate) failed: Vec<PyBackedStr>,
}

impl Ended {
    /// # Errors
    /// What Python raises when the object is another.
    pub(crate) fn read(output: &Bound<'_, PyAny>) -> PyResult<Self> {
        let py = output.py();
        let failed = output.getattr_opt(intern!(py, "failed_recving"))?;
        Ok(Ended {
            sent: all(&output.getattr(intern!(py, "finished_sending"))?)?,
            received: all(&output.getattr(intern!(py, "finished_recving"))?)?,
            invalid: all(&output.getattr(intern!(py, "invalid_block_ids"))?)?,
            failed: failed.map_or(Ok(Vec::new()), |failed| all(&failed))?,
        })
    }
}

/// What is in a collection, or in none.
fn all<'py, T: FromPyObjectOwned<'py>>(collection: &Bound<'py, PyAny>) -> PyResult<Vec<T>> {
    if collection.is_none() {
        return Ok(Vec::new());
    }
    let all = collection.try_iter()?;
    all.map(|one| one?.extract().map_err(Into::into)).collect()
}

/// Takes a reference to each of these blocks of vLLM's pool (`BlockPool`). vLLM does not count that as a use of the block.
///
/// # Errors
/// What Python raises when the pool is another; then no reference was taken, unless by a `touch` that stopped half-way.
pub(crate) fn keep(pool: &Bound<'_, PyAny>, ids: &[u32]) -> PyResult<()> {
    let all = of(pool, ids)?;
    // What nobody has is in a queue of free ones, which is vLLM's affair.
    let (taken, rest): (Vec<_>, Vec<_>) = all.into_iter().partition(|block| count(block, 1, 1));
    if !rest.is_empty()
        && let Err(error) = pool.call_method1(intern!(pool.py(), "touch"), (rest,))
    {
        for block in &taken {
            count(block, 2, -1);
        }
        return Err(error);
    }
    Ok(())
}

/// Gives references back.
///
/// # Errors
/// What Python raises when the pool is another; those that could not be given back are lost to it.
pub(crate) fn let_go(pool: &Bound<'_, PyAny>, ids: &[u32]) -> PyResult<()> {
    let mut last = of(pool, ids)?;
    last.retain(|block| !count(block, 2, -1));
    if !last.is_empty() {
        pool.call_method1(intern!(pool.py(), "free_blocks"), (last,))?;
    }
    Ok(())
}

/// Whether less than an eighth of vLLM's pool is free, as far as can be told.
pub(crate) fn is_short(pool: &Bound<'_, PyAny>) -> bool {
    let py = pool.py();
    let free = pool.call_method0(intern!(py, "get_num_free_blocks"));
    let free = free.and_then(|free| free.extract::<u64>());
    let all = pool.getattr(intern!(py, "num_gpu_blocks"));
    let all = all.and_then(|all| all.extract::<u64>());
    !matches!((free, all), (Ok(free), Ok(all)) if free >= all / 8)
}

/// The blocks with these numbers.
fn of<'py>(pool: &Bound<'py, PyAny>, ids: &[u32]) -> PyResult<Vec<Bound<'py, PyAny>>> {
    let blocks = pool.getattr(intern!(pool.py(), "blocks"))?;
    let blocks = blocks.cast::<PyList>()?;
    let all = ids.iter().map(|id| blocks.get_item(*id as usize));
    all.collect()
}

/// Changes how many have a block, if those are `least` or more. Whether it has done so.
fn count(block: &Bound<'_, PyAny>, least: i64, change: i64) -> bool {
    let name = intern!(block.py(), "ref_cnt");
    let count = block.getattr(name).and_then(|count| count.extract::<i64>());
    count.is_ok_and(|count| count >= least && block.setattr(name, count + change).is_ok())
}
