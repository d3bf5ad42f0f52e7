//! The scheduler half as a Python class. Every method is short and non-blocking: it is called on the engine's scheduler
//! thread, so the GIL is kept.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use kvd_client::{Identity, Link, LinkConfig, Role};
use kvd_connectors::meta::{self, RankHello};
use kvd_connectors::notice::Level;
use kvd_connectors::scheduler::{Adapter, ByTier, Guarded, Match, Scheduler, Settings};
use kvd_connectors::worker::Counters;
use kvd_core::{GroupKind, GroupRule};
use parking_lot::Mutex;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::pybacked::{PyBackedBytes, PyBackedStr};
use pyo3::types::{PyBytes, PyDict};

use crate::capture::Reader;
use crate::clock::now_us;
use crate::engine::{self, Ended, Lists, Step};
use crate::errors::{error, from_client, invalid};
use crate::observed::dict;

/// So many tokens of an answer are stored at a time: four blocks of vLLM's usual size. What is left is stored when the request finishes.
const GATHER_TOKENS: u32 = 64;

/// See `kvdaemon/_native.pyi`.
#[pyclass(frozen, module = "kvdaemon._native")]
pub(crate) struct SchedulerHalf {
    inner: Mutex<Guarded<Link>>,
    reader: Reader,
    /// Whether a running request gives blocks up,
    outgrows: bool,
    /// and whether the engine offers some of them.
    offers: bool,
}

/// 16 bytes that are the same for all processes of an engine instance, and for no others.
pub(crate) fn instance_id(py: Python<'_>, bytes: &[u8]) -> PyResult<[u8; 16]> {
    bytes
        .try_into()
        .map_err(|_| invalid(py, "an instance id has 16 bytes"))
}

fn strings(list: &[PyBackedStr]) -> Vec<&str> {
    list.iter().map(|text| -> &str { text }).collect()
}

impl SchedulerHalf {
    /// Runs with the half, if it is still there. Should it panic, the engine goes on without it.
    fn with<R>(&self, run: impl FnOnce(&mut Scheduler<Link>) -> R) -> Option<R> {
        self.inner.lock().with(run)
    }

    /// Takes the last blocks of a request that is over.
    fn last_blocks(
        &self,
        now: u64,
        id: &str,
        request: &Bound<'_, PyAny>,
        tables: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let running = self.reader.running(request)?;
        let computed = request.getattr(intern!(request.py(), "num_computed_tokens"))?;
        let tokens = running.last.min(computed.extract()?);
        let wanted = self.with(|half| half.finish_from(now, id, tokens as u32));
        let (mut read, tables) = (None, engine::groups(tables)?);
        for (group, first) in wanted.unwrap_or_default() {
            let wanted = (group, first);
            let hashes = &running.hashes;
            let (hashes, blocks) = self
                .reader
                .blocks_of(hashes, &tables, wanted, tokens, &mut read)?;
            self.with(|half| half.last_blocks(id, group, hashes, blocks));
        }
        Ok(())
    }

    /// Hashes of a request's units that may be loaded, as the half wants them.
    fn loadable(&self, request: &Bound<'_, PyAny>) -> Vec<u8> {
        self.reader.loadable(request).unwrap_or_else(|error| {
            self.strange(request.py(), &error);
            Vec::new()
        })
    }

    /// Gives back to the engine's pool what is copied, or will not be: some at a time, or none if the hook has done much else, unless they
    /// are missed.
    fn let_go(&self, pool: &Bound<'_, PyAny>, busy: bool) {
        if !self.outgrows {
            return;
        }
        let counts = self.with(|half| (half.to_release(), half.due(busy)));
        let (all, due) = counts.unwrap_or((usize::MAX, usize::MAX));
        let most = match all > due && engine::is_short(pool) {
            true => all,
            false => due,
        };
        let released = self.inner.lock().released(most);
        if !released.is_empty()
            && let Err(error) = engine::let_go(pool, &released)
        {
            self.lost(pool.py(), error);
        }
    }

    /// The engine is so much another than was thought that what it was promised can only be settled. It goes on; the error is shown.
    fn lost(&self, py: Python<'_>, error: PyErr) {
        self.inner.lock().fail();
        error.write_unraisable(py, None);
    }

    /// Nothing is stored or loaded any more, for the engine is another than was thought.
    fn strange(&self, py: Python<'_>, error: &PyErr) {
        let text = format!(
            "this vLLM keeps its lists of blocks in another form: {}",
            error.value(py)
        );
        self.with(|half| half.refuse(text));
    }
}

#[pymethods]
impl SchedulerHalf {
    /// A scheduler half whose link connects in the background.
    #[new]
    #[pyo3(signature = (socket, instance, label, *, world, groups, hash_tokens, lookup_deadline_ms=20, startup_deadline_ms=1000,
                        share_deadline_ms=10_000, hold_deadline_ms=1000, lease_ms=10_000, max_in_flight=4096,
                        stores=true, drop_last=false))]
    #[allow(
        clippy::too_many_arguments,
        reason = "keyword arguments of the Python class"
    )]
    fn new(
        py: Python<'_>,
        socket: PathBuf,
        instance: &[u8],
        label: String,
        world: u32,
        groups: Vec<(String, u32, u32, bool, usize)>,
        hash_tokens: u32,
        lookup_deadline_ms: u64,
        startup_deadline_ms: u64,
        share_deadline_ms: u64,
        hold_deadline_ms: u64,
        lease_ms: u32,
        max_in_flight: u32,
        stores: bool,
        drop_last: bool,
    ) -> PyResult<Self> {
        let offered = (0..).zip(&groups).filter(|(_, group)| group.3);
        let offered = offered.map(|(group, _)| group).collect();
        let rules: Vec<GroupRule> = groups
            .iter()
            .map(|(kind, tokens, window, ..)| rule(py, kind, *tokens, *window))
            .collect::<PyResult<_>>()?;
        if hash_tokens == 0 || rules.iter().any(|rule| rule.span() % hash_tokens != 0) {
            let text = "blocks must be multiples of the tokens that a hash covers";
            return Err(invalid(py, text));
        }
        let own = rules.iter().zip(&groups);
        let own = own.map(|(rule, group)| (group.4, *rule)).collect();
        let settings = Settings {
            world,
            groups: rules,
            offered,
            lookup_deadline: lookup_deadline_ms * 1000,
            startup_deadline: startup_deadline_ms * 1000,
            share_deadline: share_deadline_ms * 1000,
            hold_deadline: hold_deadline_ms * 1000,
            lease_ms,
            max_in_flight,
            gather: GATHER_TOKENS,
            stores,
            drop_last,
            ..Settings::default()
        };
        let identity = Identity {
            instance: instance_id(py, instance)?,
            role: Role::Scheduler,
            rank: 0,
            world,
            label,
        };
        let link = start_link(socket, identity).map_err(|failure| from_client(py, &failure))?;
        Ok(SchedulerHalf {
            reader: Reader::new(own, &settings, hash_tokens),
            outgrows: settings.outgrows(),
            offers: !settings.offered.is_empty(),
            inner: Mutex::new(Guarded::new(Scheduler::new(settings, link))),
        })
    }

    fn set_facts(&self, facts: Vec<(String, String)>, instance: &str) {
        self.with(|half| half.set_facts(facts, instance));
    }

    fn set_adapter(&self, name: &str, digest: &str) {
        self.with(|half| half.set_adapter(name, digest));
    }

    fn hello(&self, py: Python<'_>, hello: &[u8]) -> PyResult<()> {
        let hello: RankHello =
            meta::decode(hello).map_err(|failure| invalid(py, failure.to_string()))?;
        self.with(|half| half.on_hello(hello));
        Ok(())
    }

    fn refuse(&self, reason: &str) {
        self.with(|half| half.refuse(reason));
    }

    fn refusal(&self) -> Option<String> {
        self.with(|half| half.refusal().map(str::to_owned))
            .flatten()
    }

    /// `reads`: what is stored may be loaded for it.
    fn on_new_request(
        &self,
        id: &str,
        request: &Bound<'_, PyAny>,
        adapter: Option<&str>,
        reads: bool,
    ) {
        let hashes = match reads {
            true => self.loadable(request),
            false => Vec::new(),
        };
        let adapter = match adapter {
            Some(name) => Adapter::Named(name.to_owned()),
            None => Adapter::Base,
        };
        self.with(|half| half.on_new_request(now_us(), id, adapter, &hashes, !reads));
    }

    /// Tokens of which every hit is a multiple.
    fn unit(&self) -> u32 {
        self.with(|half| half.settings().unit()).unwrap_or(1)
    }

    /// Units that can be loaded; -1: ask again later; -2: `ask` first.
    fn matched(&self, id: &str, computed: u32) -> i64 {
        match self.inner.lock().matched(now_us(), id, computed) {
            Some(Match::Blocks(blocks)) => i64::from(blocks),
            Some(Match::Wait) => -1,
            Some(Match::NeedHashes) => -2,
            None => 0,
        }
    }

    fn ask(&self, id: &str, request: &Bound<'_, PyAny>) {
        let hashes = self.loadable(request);
        self.with(|half| half.ask(now_us(), id, &hashes));
    }

    fn allocated(&self, id: &str, external: u32, blocks: Vec<Vec<u32>>) {
        self.inner.lock().allocated(id, external, &blocks);
    }

    /// A step: takes the blocks that are to be stored, keeps those that the engine would give up, and gives back what is copied. `lists`:
    /// where the engine has requests and blocks. `with_group`: a block's hash as the engine's pool has it. The step's orders, and whether
    /// there are notices.
    fn step<'py>(
        &self,
        output: &Bound<'py, PyAny>,
        requests: &Bound<'py, PyDict>,
        manager: &Bound<'py, PyAny>,
        tables: Vec<Bound<'py, PyDict>>,
        pool: &Bound<'py, PyAny>,
        with_group: &Bound<'py, PyAny>,
    ) -> (Bound<'py, PyBytes>, bool) {
        let py = output.py();
        let lists = Lists {
            output,
            requests,
            manager,
            tables: &tables,
        };
        let step = Step::read(output, self.outgrows).unwrap_or_else(|error| {
            // Nothing is known of whose blocks are whose.
            self.lost(py, error);
            Step::default()
        });
        let states = match self.offers {
            true => self.reader.states(output, requests, pool, with_group),
            false => Ok(Vec::new()),
        };
        let states = states.unwrap_or_else(|error| {
            self.strange(py, &error);
            Vec::new()
        });
        let now = now_us();
        let mut guard = self.inner.lock();
        let begun = |half: &mut Scheduler<Link>| {
            let (preempted, ids) = (strings(&step.preempted), strings(&step.ids));
            half.begin_step(now, &preempted, &ids, &step.computed, &step.ahead)
        };
        let wanted = guard.with(begun).unwrap_or_default();
        let mut busy = false;
        if !wanted.is_empty() || !states.is_empty() {
            drop(guard);
            let captured = self
                .reader
                .read(&step, &wanted, &lists)
                .unwrap_or_else(|error| {
                    self.strange(py, &error);
                    Vec::new()
                });
            guard = self.inner.lock();
            let (mut kept, mut known) = (Vec::new(), Vec::<&str>::new());
            let states_of = |id: &PyBackedStr| {
                let own = states.iter().filter(|state| *state.0 == **id);
                let own = own.map(|state| (state.1, &state.2[..], state.3));
                own.collect::<Vec<_>>()
            };
            for (id, full) in captured {
                known.push(id);
                kept.append(&mut guard.capture(now, id, full, states_of(id)));
            }
            for (id, ..) in &states {
                if !known.contains(&&**id) {
                    known.push(id);
                    kept.append(&mut guard.capture(now, id, [], states_of(id)));
                }
            }
            busy = !kept.is_empty();
            if busy {
                drop(guard);
                if let Err(error) = engine::keep(pool, &kept) {
                    self.inner.lock().not_kept(&kept);
                    self.lost(py, error);
                }
                guard = self.inner.lock();
            }
        }
        let orders = PyBytes::new(py, &guard.end_step(now));
        let notices = guard.has_failure() || guard.half().is_some_and(Scheduler::has_notices);
        drop(guard);
        self.let_go(pool, busy || orders.len().is_ok_and(|len| len > 0));
        (orders, notices)
    }

    /// Fails as by a bug: for tests.
    fn fail(&self) {
        self.with(|_| -> () { panic!("a test asked for it") });
    }

    fn limit_held(&self, most: u32) {
        self.with(|half| half.limit_held(most));
    }

    fn lets_go_soon(&self) -> bool {
        self.with(|half| half.lets_go_soon()).unwrap_or(false)
    }

    /// What came back from the workers with a step (`KVConnectorOutput`), and their reports.
    fn on_output(
        &self,
        output: &Bound<'_, PyAny>,
        reports: Vec<PyBackedBytes>,
        pool: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let py = output.py();
        let ended = match Ended::read(output) {
            Ok(ended) => ended,
            Err(error) => {
                // Nothing is known of what is over.
                self.lost(py, error);
                return Ok(());
            }
        };
        let reports: Vec<&[u8]> = reports.iter().map(|report| -> &[u8] { report }).collect();
        let taken = self.with(|half| {
            half.on_output(
                &strings(&ended.sent),
                &strings(&ended.received),
                &ended.invalid,
                &strings(&ended.failed),
                &reports,
            )
        });
        self.let_go(pool, false);
        taken
            .unwrap_or(Ok(()))
            .map_err(|failure| error(py, kvd_client::ErrorKind::Internal, failure.to_string()))
    }

    /// A request is over that has these blocks by the engine's groups: whether they must be held.
    fn finished(&self, id: &str, request: &Bound<'_, PyAny>, tables: &Bound<'_, PyAny>) -> bool {
        let now = now_us();
        let known = tables.len().is_ok_and(|groups| groups > 0);
        if known && let Err(error) = self.last_blocks(now, id, request, tables) {
            self.strange(request.py(), &error);
        }
        self.inner.lock().finished(now, id)
    }

    fn reset_cache(&self, clean: bool) {
        self.with(|half| half.reset_cache(clean));
    }

    fn has_pending_work(&self) -> bool {
        self.inner.lock().has_pending_work()
    }

    /// What people should read: (is it a warning, text).
    fn notices(&self) -> Vec<(bool, String)> {
        if self.inner.lock().take_failure() {
            let text = "the connector has failed by a bug; the engine goes on without it";
            return vec![(true, text.to_owned())];
        }
        self.with(|half| match half.has_notices() {
            true => half.notices(),
            false => Vec::new(),
        })
        .unwrap_or_default()
        .into_iter()
        .map(|notice| (notice.level == Level::Warning, notice.text))
        .collect()
    }

    /// What has happened since the last call, or None.
    fn observed<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyDict>>> {
        dict(py, self.with(Scheduler::observed).flatten())
    }

    /// Tokens of the request's last load by tier: host memory, on their way up, NVMe, object store.
    fn sources(&self, id: &str) -> ByTier {
        self.with(|half| half.sources(id)).unwrap_or_default()
    }

    /// Counters, for tests and for people.
    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let stats = PyDict::new(py);
        let inner = self.inner.lock();
        let Some(half) = inner.half() else {
            return Ok(stats);
        };
        for (name, value) in half.counters().list() {
            stats.set_item(name, value)?;
        }
        let (requests, in_flight, loads) = half.load_and_hold();
        stats.set_item("requests_known", requests)?;
        stats.set_item("blocks_in_flight", in_flight)?;
        stats.set_item("blocks_held", half.held())?;
        stats.set_item("loads_under_way", loads)?;
        stats.set_item("connected", half.port().connected())?;
        stats.set_item("refusal", half.refusal())?;
        let ranks: Vec<Vec<(&str, u64)>> = half
            .rank_counters()
            .map(|values| {
                Counters::names()
                    .iter()
                    .copied()
                    .zip(values.iter().copied())
                    .collect()
            })
            .collect();
        let list = ranks
            .into_iter()
            .map(|rank| pyo3::types::IntoPyDict::into_py_dict(rank, py))
            .collect::<PyResult<Vec<_>>>()?;
        stats.set_item("ranks", list)?;
        Ok(stats)
    }

    /// Ends the session. Everything after this does nothing.
    fn close(&self, py: Python<'_>) {
        let half = self.inner.lock().close();
        py.detach(|| drop(half));
    }
}

/// What a hit needs of a group; a window of 0 is none.
fn rule(py: Python<'_>, kind: &str, tokens: u32, window: u32) -> PyResult<GroupRule> {
    let kind = GroupKind::from_word(kind)
        .ok_or_else(|| invalid(py, format!("'{kind}' is no kind of KV-cache group")))?;
    GroupRule::new(kind, tokens, (window > 0).then_some(window))
        .map_err(|failure| invalid(py, failure.to_string()))
}

/// A link with this crate's limits.
pub(crate) fn start_link(socket: PathBuf, identity: Identity) -> Result<Link, kvd_client::Error> {
    Link::start(LinkConfig {
        socket,
        identity,
        queue: 4096,
        request_timeout: Duration::from_secs(30),
    })
}

/// A clock for the worker half.
pub(crate) fn clock() -> kvd_connectors::worker::Clock {
    Arc::new(now_us)
}
