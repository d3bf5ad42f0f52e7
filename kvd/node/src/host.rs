//! Arenas in real shared memory, and the thread `kvd-populate` that faults them in.
//!
//! The thread takes one extent at a time from a bounded queue; the node asks for the next when one is done, so the queue
//! never fills. Faulting in takes a third of a second for each GiB, and nothing else waits for it.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

use kvd_arena::{Arena, HugePages};
use kvd_core::tier::HostRange;
use kvd_core::{ArenaShape, TenantId};

use crate::ports::{AdoptedArena, ArenaPort, Pages, PortError};

/// What a tenant's arena is to be.
#[derive(Debug, Clone, Copy)]
pub struct HostSpec {
    /// Bytes.
    pub capacity: u64,
    /// Bytes of an extent; `None`: by the capacity.
    pub extent_bytes: Option<u64>,
    /// Whether to take 2 MiB pages.
    pub huge_pages: HugePages,
}

/// An arena that a client brings.
#[derive(Debug)]
pub struct Offer {
    /// The memory.
    pub arena: OwnedFd,
    /// The former daemon's generation table.
    pub generations: OwnedFd,
    /// What the client says of it.
    pub shape: ArenaShape,
}

/// What a client needs to map an arena.
#[derive(Debug)]
pub struct Descriptors {
    /// The memory.
    pub arena: OwnedFd,
    /// The generation table, which can't be written by who gets it.
    pub generations: OwnedFd,
}

/// A part of an arena.
#[derive(Debug, Clone)]
pub struct HostSpan {
    /// Which arena.
    pub arena: Arc<Arena>,
    /// From its start, in bytes.
    pub offset: u64,
    /// How many.
    pub bytes: u64,
}

/// An extent has been faulted in, or not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Populated {
    /// Whose.
    pub tenant: TenantId,
    /// Of which arena.
    pub arena: [u8; 16],
    /// Which.
    pub extent: u32,
    /// Why not.
    pub failed: Option<String>,
}

struct Job {
    tenant: TenantId,
    arena: Arc<Arena>,
    extent: u32,
}

/// All tenants' arenas.
pub struct HostArenas {
    specs: Vec<HostSpec>,
    arenas: Vec<Option<Arc<Arena>>>,
    jobs: Option<SyncSender<Job>>,
    thread: Option<JoinHandle<()>>,
}

impl HostArenas {
    /// One arena for each of these, by the number of the tenant; none is made yet. `done` is called in the thread
    /// `kvd-populate`, once for each extent that was asked for.
    ///
    /// # Errors
    /// When the thread can't be started.
    pub fn new(
        specs: Vec<HostSpec>,
        done: impl Fn(Populated) + Send + 'static,
    ) -> std::io::Result<Self> {
        let (sender, receiver) = sync_channel(1);
        let thread = std::thread::Builder::new()
            .name("kvd-populate".to_owned())
            .stack_size(256 << 10)
            .spawn(move || populate_all(&receiver, done))?;
        let arenas = specs.iter().map(|_| None).collect();
        Ok(Self {
            specs,
            arenas,
            jobs: Some(sender),
            thread: Some(thread),
        })
    }

    /// Descriptors of the tenant's arena, to be passed to a client.
    ///
    /// # Errors
    /// When there is no arena, or the process has no descriptors left.
    pub fn descriptors(&self, tenant: TenantId) -> Result<Descriptors, PortError> {
        let arena = self
            .get(tenant)
            .ok_or_else(|| PortError("there is no arena yet: register again".to_owned()))?;
        let dup = |fd: std::os::fd::BorrowedFd<'_>| {
            fd.try_clone_to_owned()
                .map_err(|e| PortError(format!("no descriptor to pass: {e}")))
        };
        Ok(Descriptors {
            arena: dup(arena.fd())?,
            generations: dup(arena.generation_fd())?,
        })
    }

    /// Why the tenant's arena has no 2 MiB pages although they were wanted.
    pub fn fallback(&self, tenant: TenantId) -> Option<&str> {
        self.get(tenant)?.fallback()
    }

    fn get(&self, tenant: TenantId) -> Option<&Arc<Arena>> {
        self.arenas.get(usize::from(tenant.0))?.as_ref()
    }

    fn spec(&self, tenant: TenantId) -> HostSpec {
        self.specs[usize::from(tenant.0)]
    }
}

impl Drop for HostArenas {
    fn drop(&mut self) {
        // The thread ends once its queue is closed. It may be faulting a large extent in, and is not waited for.
        self.jobs.take();
        self.thread.take();
    }
}

fn populate_all(jobs: &Receiver<Job>, done: impl Fn(Populated)) {
    while let Ok(Job {
        tenant,
        arena,
        extent,
    }) = jobs.recv()
    {
        let failed = arena.populate(extent).err().map(|e| e.to_string());
        done(Populated {
            tenant,
            arena: arena.shape().id,
            extent,
            failed,
        });
    }
}

impl ArenaPort for HostArenas {
    type Offer = Offer;
    type Span = HostSpan;

    fn create(&mut self, tenant: TenantId) -> Result<ArenaShape, PortError> {
        let spec = self.spec(tenant);
        let place = &mut self.arenas[usize::from(tenant.0)];
        *place = None;
        let arena = Arena::create(spec.capacity, spec.extent_bytes, spec.huge_pages)
            .map_err(|e| PortError(e.to_string()))?;
        let shape = *arena.shape();
        *place = Some(Arc::new(arena));
        Ok(shape)
    }

    fn adopt(&mut self, tenant: TenantId, offer: Offer) -> Result<AdoptedArena, PortError> {
        let limit = self.spec(tenant).capacity;
        let found = Arena::adopt(offer.arena, offer.generations, &offer.shape, limit)
            .map_err(|e| PortError(e.to_string()))?;
        let shape = *found.arena.shape();
        self.arenas[usize::from(tenant.0)] = Some(Arc::new(found.arena));
        Ok(AdoptedArena {
            shape,
            words: found.words,
            writers: found.writers,
        })
    }

    fn set_generation(&mut self, tenant: TenantId, slot: u32, word: u64) {
        if let Some(arena) = self.get(tenant) {
            arena.generations().set(slot, word);
        }
    }

    fn set_writers(&mut self, tenant: TenantId, tokens: &[u64]) {
        if let Some(arena) = self.get(tenant)
            && let Err(error) = arena.generations().set_writers(tokens)
        {
            // Core keeps to the same limit as the table.
            tracing::error!(%error, "the table of writers was not written");
        }
    }

    fn populate(&mut self, tenant: TenantId, extent: u32) {
        let Some(arena) = self.get(tenant).cloned() else {
            return;
        };
        if let Some(jobs) = &self.jobs {
            // The node asks for one at a time, and the queue has room for one beside the one under way.
            let _ = jobs.send(Job {
                tenant,
                arena,
                extent,
            });
        }
    }

    fn span(&self, range: HostRange) -> Option<HostSpan> {
        let arena = self.get(range.tenant)?.clone();
        let end = range.offset.checked_add(range.bytes)?;
        (end <= arena.shape().bytes).then_some(HostSpan {
            arena,
            offset: range.offset,
            bytes: range.bytes,
        })
    }

    fn page_probe(&self, tenant: TenantId) -> Option<Box<dyn FnOnce() -> Pages + Send>> {
        let arena = self.get(tenant).cloned()?;
        Some(Box::new(move || {
            arena.pages().map_or_else(
                |_| Pages::default(),
                |found| Pages {
                    page_bytes: found.kernel_page_bytes,
                    resident_bytes: found.resident_bytes,
                    huge_bytes: found.huge_bytes,
                },
            )
        }))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::Receiver;

    use super::*;
    use crate::conformance::{self, Probe};

    /// The adapter, and what comes back from its thread.
    struct Tested(HostArenas, Receiver<Populated>);

    impl ArenaPort for Tested {
        type Offer = Offer;
        type Span = HostSpan;

        fn create(&mut self, tenant: TenantId) -> Result<ArenaShape, PortError> {
            self.0.create(tenant)
        }

        fn adopt(&mut self, tenant: TenantId, offer: Offer) -> Result<AdoptedArena, PortError> {
            self.0.adopt(tenant, offer)
        }

        fn set_generation(&mut self, tenant: TenantId, slot: u32, word: u64) {
            self.0.set_generation(tenant, slot, word);
        }

        fn set_writers(&mut self, tenant: TenantId, tokens: &[u64]) {
            self.0.set_writers(tenant, tokens);
        }

        fn populate(&mut self, tenant: TenantId, extent: u32) {
            self.0.populate(tenant, extent);
        }

        fn span(&self, range: HostRange) -> Option<HostSpan> {
            self.0.span(range)
        }

        fn page_probe(&self, tenant: TenantId) -> Option<Box<dyn FnOnce() -> Pages + Send>> {
            self.0.page_probe(tenant)
        }
    }

    impl Probe for Tested {
        fn word(&self, tenant: TenantId, slot: u32) -> u64 {
            self.0.get(tenant).expect("made").generations().get(slot)
        }

        fn writers(&self, tenant: TenantId) -> Vec<u64> {
            let table = self.0.get(tenant).expect("made").generations().writers();
            table.into_iter().filter(|token| *token != 0).collect()
        }

        fn offer(&self, tenant: TenantId) -> Offer {
            let fds = self.0.descriptors(tenant).expect("made");
            let shape = *self.0.get(tenant).expect("made").shape();
            Offer {
                arena: fds.arena,
                generations: fds.generations,
                shape,
            }
        }

        fn wrong_offer(&self, tenant: TenantId) -> Offer {
            let mut offer = self.offer(tenant);
            offer.shape.bytes /= 2;
            offer
        }

        fn populated(&mut self) -> (TenantId, u32, bool) {
            let done = self.1.recv().expect("the thread lives");
            (done.tenant, done.extent, done.failed.is_none())
        }
    }

    #[test]
    fn real_memory_conforms() {
        conformance::run(|| {
            let spec = HostSpec {
                capacity: 8 << 20,
                extent_bytes: Some(2 << 20),
                huge_pages: HugePages::Off,
            };
            let (sender, receiver) = sync_channel(16);
            let arenas = HostArenas::new(vec![spec; 2], move |done| drop(sender.send(done)))
                .expect("a thread");
            Tested(arenas, receiver)
        });
    }
}
