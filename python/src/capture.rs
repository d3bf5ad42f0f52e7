//! What the scheduler half is given of vLLM's requests: hashes and numbers of their blocks, as its KV-cache groups have them. The half is
//! not locked meanwhile, for Python may run anything.

use bytes::Bytes;
use kvd_connectors::HASH_BYTES;
use kvd_connectors::scheduler::Settings;
use kvd_core::GroupRule;
use pyo3::exceptions::PyIndexError;
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;
use pyo3::types::PyDict;

use crate::engine::{self, Lists, Running, Step};
use crate::lists;

/// A KV-cache group as the engine has it.
struct Group {
    /// The engine's number of it.
    of: usize,
    /// How many of the engine's hashes a block has.
    ratio: usize,
    rule: GroupRule,
}

/// Blocks of a request: its id, and of each group their hashes and numbers.
pub(crate) type Captured<'a> = (&'a PyBackedStr, Vec<(u32, Bytes, Vec<u32>)>);

/// Hashes for a block, first and end of a range of blocks.
pub(crate) type Range = (usize, usize, usize);

/// A state in a block of its own: the request's id, the group, its hash, the block.
pub(crate) type State = (PyBackedStr, u32, [u8; HASH_BYTES], u32);

/// Knows the half's groups and the engine's.
pub(crate) struct Reader {
    groups: Vec<Group>,
    /// How many of the engine's hashes there are from one that the half is given to the next.
    grain: usize,
    /// And how many of those a unit has.
    grains: usize,
    /// How many of the engine's tokens a hash covers.
    hash_tokens: usize,
}

impl Reader {
    /// `groups`: the engine's number of each of the half's groups, and its rule, whose span is a multiple of `hash_tokens`.
    pub(crate) fn new(
        groups: Vec<(usize, GroupRule)>,
        settings: &Settings,
        hash_tokens: u32,
    ) -> Self {
        let groups = groups.into_iter().map(|(of, rule)| Group {
            of,
            ratio: (rule.span() / hash_tokens) as usize,
            rule,
        });
        Reader {
            groups: groups.collect(),
            grain: (settings.grain() / hash_tokens) as usize,
            grains: settings.unit().checked_div(settings.grain()).unwrap_or(0) as usize,
            hash_tokens: hash_tokens as usize,
        }
    }

    /// # Errors
    /// What Python raises when the request is another.
    pub(crate) fn running<'py>(&self, request: &Bound<'py, PyAny>) -> PyResult<Running<'py>> {
        Running::read(request, self.hash_tokens)
    }

    /// Hashes and numbers of a request's full blocks of a group within so many tokens, from the block `first` on; the hash of the block
    /// before them in front.
    ///
    /// # Errors
    /// What Python raises when the lists are others.
    pub(crate) fn blocks_of(
        &self,
        hashes: &Bound<'_, PyAny>,
        tables: &[Bound<'_, PyAny>],
        (group, first): (u32, u32),
        tokens: usize,
        read: &mut Option<(Range, Bytes)>,
    ) -> PyResult<(Bytes, Vec<u32>)> {
        let group = &self.groups[group as usize];
        let (first, last) = (first as usize, tokens / group.rule.span() as usize);
        let blocks = match tables.get(group.of) {
            Some(table) => lists::blocks(table, first, last)?,
            None => return Err(PyIndexError::new_err("a KV-cache group has no blocks")),
        };
        let range = (group.ratio, first.saturating_sub(1), first + blocks.len());
        let found = match read {
            // Groups alike have the same.
            Some((same, found)) if *same == range => found.clone(),
            _ if blocks.is_empty() => Bytes::new(),
            _ => lists::hashes(hashes, range.0, range.1, range.2)?.into(),
        };
        if !blocks.is_empty() {
            *read = Some((range, found.clone()));
        }
        Ok((found, blocks))
    }

    /// What is wanted of a step's requests.
    ///
    /// # Errors
    /// What Python raises when vLLM's objects are others.
    pub(crate) fn read<'a>(
        &self,
        step: &'a Step<'_>,
        wanted: &[(usize, u32, u32)],
        lists: &Lists<'_, '_>,
    ) -> PyResult<Vec<Captured<'a>>> {
        let mut all = Vec::new();
        for of_request in wanted.chunk_by(|a, b| a.0 == b.0) {
            let at = of_request[0].0;
            let (id, name) = (&step.ids[at], &step.names[at]);
            let Some(request) = lists.requests.get_item(name)? else {
                continue;
            };
            let running = self.running(&request)?;
            let tables = lists.blocks(name)?;
            let ahead = step.ahead.get(at).copied().unwrap_or(0);
            let after = step.computed[at] as usize + ahead as usize;
            let (mut read, mut of_groups) = (None, Vec::with_capacity(of_request.len()));
            let tokens = after.min(running.last);
            for (_, group, first) in of_request {
                let wanted = (*group, *first);
                let (hashes, blocks) =
                    self.blocks_of(&running.hashes, &tables, wanted, tokens, &mut read)?;
                if !blocks.is_empty() {
                    of_groups.push((*group, hashes, blocks));
                }
            }
            if !of_groups.is_empty() {
                all.push((id, of_groups));
            }
        }
        Ok(all)
    }

    /// Recurrent states that a step leaves in blocks of their own, and that may be stored. `with_group`: a hash as vLLM's pool has it.
    ///
    /// With async scheduling and drafts vLLM offers a state when a step's output has come, and may give its block to another request
    /// before the next step tells us: then the pool finds it by another hash.
    ///
    /// # Errors
    /// What Python raises when vLLM's objects are others.
    pub(crate) fn states(
        &self,
        output: &Bound<'_, PyAny>,
        requests: &Bound<'_, PyDict>,
        pool: &Bound<'_, PyAny>,
        with_group: &Bound<'_, PyAny>,
    ) -> PyResult<Vec<State>> {
        let mut states = Vec::new();
        for offer in engine::offers(output)? {
            let Some(request) = requests.get_item(&offer.id)? else {
                continue;
            };
            let running = self.running(&request)?;
            let own = (0..).zip(&self.groups).filter(|(_, g)| g.of == offer.of);
            for (number, group) in own {
                let whole = offer.tokens.is_multiple_of(group.rule.span() as usize);
                // The last token counts here: a state is offered once, with the step that computes it or (drafts) when its output has
                // come.
                if !whole || offer.tokens == 0 || offer.tokens > running.hashed {
                    continue;
                }
                let at = offer.tokens / self.hash_tokens - 1;
                let hash = running.hashes.get_item(at)?;
                let known = engine::found_by(pool, offer.block)?;
                if known.eq(with_group.call1((&hash, offer.of))?)? {
                    let id = offer.id.extract()?;
                    states.push((id, number, lists::hash(&hash)?, offer.block));
                }
            }
        }
        Ok(states)
    }

    /// Hashes of a request's units that may be loaded: never the one with the last token, which is always computed.
    ///
    /// # Errors
    /// What Python raises when the request is another.
    pub(crate) fn loadable(&self, request: &Bound<'_, PyAny>) -> PyResult<Vec<u8>> {
        let running = self.running(request)?;
        let unit = self.grain * self.hash_tokens * self.grains;
        let units = running.last.checked_div(unit).unwrap_or(0);
        lists::hashes(&running.hashes, self.grain, 0, units * self.grains)
    }
}
