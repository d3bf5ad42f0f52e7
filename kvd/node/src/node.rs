//! The node: one core, its ports, and the order in which things happen.
//!
//! Everything is called from one thread. Each call gives core one input and carries out all that core answers before it
//! returns; answers for sessions are kept as [`Effect`]s until the caller takes them.

use std::collections::VecDeque;

use kvd_core::tier::{Recovered, StoreDone, StoreError, StoreOp, StoreShape};
use kvd_core::{
    Adopted, Core, Failure, Input, InstanceId, Now, Output, Reply, Request, RequestId, Role,
    SessionId, Settings, StoreId, TenantId,
};

use crate::counts::Counts;
use crate::ports::{ArenaPort, Clock, Entropy, NoStores, StorePort};
use crate::tenant::{ArenaState, Made, Tenant, TenantSnapshot, TenantSpec};

/// What the node is told beside its tenants.
#[derive(Debug, Clone)]
pub struct NodeSettings {
    /// Core's settings. Incarnation and seed are drawn by the node.
    pub core: Settings,
    /// How long a new daemon waits for engines that bring the former one's arena, in microseconds.
    pub adopt_grace_us: u64,
}

/// A process that attaches.
#[derive(Debug, Clone)]
pub struct Opening<'a> {
    /// By whose socket.
    pub tenant: TenantId,
    /// Which engine instance.
    pub instance: InstanceId,
    /// What it does.
    pub role: Role,
    /// Its rank among the workers.
    pub rank: u32,
    /// How many ranks copy in this instance.
    pub world: u32,
    /// For people.
    pub label: &'a str,
    /// Token of its former session.
    pub past: Option<SessionId>,
}

/// What a session is to be told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// The answer to a request.
    Reply {
        /// Whose.
        session: SessionId,
        /// Which.
        id: RequestId,
        /// What.
        reply: Box<Reply>,
    },
    /// The session is over; say why and close its socket.
    End {
        /// Which.
        session: SessionId,
        /// Why.
        failure: Failure,
    },
}

/// Core and its ports.
pub struct Node<C, E, A, S = NoStores> {
    core: Core,
    clock: C,
    entropy: E,
    arenas: A,
    stores: S,
    /// Operations that could not be begun, to be told to core.
    unbegun: VecDeque<(StoreId, StoreDone)>,
    settings: NodeSettings,
    tenants: Vec<Tenant>,
    out: Vec<Output>,
    effects: VecDeque<Effect>,
    /// Extents to be faulted in; one is under way at a time. Bounded by the extents there are.
    to_populate: VecDeque<(TenantId, u32)>,
    populating: bool,
    /// What came by the clock, of no tenant in particular.
    idle_counts: Counts,
}

impl<C: Clock, E: Entropy, A: ArenaPort> Node<C, E, A> {
    /// A node without tenants, and without a slower tier.
    pub fn new(settings: NodeSettings, clock: C, entropy: E, arenas: A) -> Self {
        Self::with_stores(settings, clock, entropy, arenas, NoStores)
    }
}

impl<C: Clock, E: Entropy, A: ArenaPort, S: StorePort<A::Span>> Node<C, E, A, S> {
    /// A node without tenants. Stores are opened later, after all tenants have been added.
    pub fn with_stores(
        mut settings: NodeSettings,
        clock: C,
        mut entropy: E,
        arenas: A,
        stores: S,
    ) -> Self {
        entropy.fill(&mut settings.core.incarnation);
        let mut seed = [0; 8];
        entropy.fill(&mut seed);
        settings.core.index_seed = u64::from_le_bytes(seed);
        Self {
            core: Core::new(settings.core.clone()),
            clock,
            entropy,
            arenas,
            stores,
            unbegun: VecDeque::new(),
            settings,
            tenants: Vec::new(),
            out: Vec::new(),
            effects: VecDeque::new(),
            to_populate: VecDeque::new(),
            populating: false,
            idle_counts: Counts::default(),
        }
    }

    /// Adds a tenant; they are numbered from 0 on.
    ///
    /// # Panics
    /// From the 65,536th tenant on.
    pub fn add_tenant(&mut self, spec: TenantSpec) -> TenantId {
        let tenant = TenantId(u16::try_from(self.tenants.len()).expect("tenants are few"));
        let grace_until = Now(self.clock.now().0 + self.settings.adopt_grace_us);
        let (name, limits) = (spec.name.clone(), spec.limits);
        self.tenants.push(Tenant {
            spec,
            grace_until,
            made: None,
            failed: None,
            counts: Counts::default(),
        });
        self.step(
            Some(tenant),
            Input::Tenant {
                tenant,
                name: &name,
                limits,
            },
        );
        tenant
    }

    /// A name for this start of the daemon.
    pub fn incarnation(&self) -> [u8; 16] {
        self.settings.core.incarnation
    }

    /// The time by the node's clock.
    pub fn now(&self) -> Now {
        self.clock.now()
    }

    /// The arenas, for what only the adapter knows, such as descriptors.
    pub fn arenas(&self) -> &A {
        &self.arenas
    }

    /// Core, to look at.
    pub fn core(&self) -> &Core {
        &self.core
    }

    /// Whether core still knows this session, attached or not.
    pub fn knows(&self, session: SessionId) -> bool {
        self.core.knows(session)
    }

    /// Whether registrations of this tenant have to wait: an engine may still bring the former daemon's arena.
    pub fn registrations_wait(&self, tenant: TenantId) -> bool {
        self.tenant(tenant).waits(self.clock.now())
    }

    /// Takes over an arena that a reconnecting client brings, unless there is one in use. Says whether it was taken.
    pub fn offer(&mut self, tenant: TenantId, offer: A::Offer) -> bool {
        if self.core.arena_in_use(tenant)
            || self.tenant(tenant).made.as_ref().is_some_and(|m| m.adopted)
        {
            return false;
        }
        match self.arenas.adopt(tenant, offer) {
            Ok(found) => {
                tracing::info!(
                    tenant = %self.tenant(tenant).spec.name,
                    bytes = found.shape.bytes,
                    writers = found.writers.len(),
                    "the former daemon's arena has been taken over"
                );
                let adopted = Adopted {
                    words: &found.words,
                    writers: &found.writers,
                };
                self.arena_made(tenant, found.shape, Some(adopted));
                true
            }
            Err(error) => {
                tracing::warn!(tenant = %self.tenant(tenant).spec.name, %error, "an offered arena was not taken");
                false
            }
        }
    }

    /// A process attaches. What core has against it is among the effects; otherwise it is a session now.
    pub fn open(&mut self, opening: &Opening<'_>) -> SessionId {
        let session = self.new_token();
        self.step(
            Some(opening.tenant),
            Input::Opened {
                session,
                tenant: opening.tenant,
                instance: opening.instance,
                role: opening.role,
                rank: opening.rank,
                world: opening.world,
                label: opening.label,
                past: opening.past,
            },
        );
        session
    }

    /// A session asks something. The answer is among the effects, now or later.
    pub fn request(
        &mut self,
        tenant: TenantId,
        session: SessionId,
        id: RequestId,
        body: Request<'_>,
    ) {
        if matches!(body, Request::Register { .. }) {
            self.need_arena(tenant);
        }
        self.step(Some(tenant), Input::Request { session, id, body });
    }

    /// A session's socket has closed; its process may live and copy.
    pub fn detached(&mut self, tenant: TenantId, session: SessionId) {
        self.step(Some(tenant), Input::Detached { session });
    }

    /// A session's process is dead.
    pub fn gone(&mut self, tenant: TenantId, session: SessionId) {
        self.step(Some(tenant), Input::Gone { session });
    }

    /// A session has ended in order.
    pub fn closed(&mut self, tenant: TenantId, session: SessionId) {
        self.step(Some(tenant), Input::Closed { session });
    }

    /// An extent of the arena with this id has been faulted in, or not, for this reason.
    pub fn populated(
        &mut self,
        tenant: TenantId,
        arena: [u8; 16],
        extent: u32,
        failed: Option<&str>,
    ) {
        self.populating = false;
        let current = self
            .tenants
            .get_mut(usize::from(tenant.0))
            .and_then(|t| t.made.as_mut());
        if let Some(made) = current.filter(|m| m.shape.id == arena) {
            made.settled = (made.settled + 1).min(made.shape.extents());
            let input = match failed {
                None => Input::ExtentReady { tenant, extent },
                Some(reason) => {
                    tracing::error!(%reason, extent, "host memory could not be taken; this part of the arena stays unused");
                    Input::ExtentFailed { tenant, extent }
                }
            };
            self.step(Some(tenant), input);
        }
        self.populate_next();
    }

    /// A store can be used. They are numbered from 0 on.
    pub fn store_opened(&mut self, store: StoreId, shape: StoreShape) {
        self.step(None, Input::StoreOpened { store, shape });
    }

    /// A store holds blocks of this namespace.
    pub fn store_has_namespace(&mut self, store: StoreId, record: &[u8]) {
        self.step(None, Input::StoreNamespace { store, record });
    }

    /// A store holds these blocks.
    pub fn store_has_blocks(&mut self, store: StoreId, blocks: &[Recovered]) {
        self.step(None, Input::StoreBlocks { store, blocks });
    }

    /// A store was switched off because its device fails, or on again.
    pub fn store_switched(&mut self, store: StoreId, on: bool) {
        self.step(None, Input::StoreSwitched { store, on });
    }

    /// One of a store's operations is over.
    pub fn store_done(&mut self, store: StoreId, done: StoreDone) {
        let tenant = self.core.tenant_of(done.op());
        self.step(tenant, Input::StoreDone { store, done });
    }

    /// The stores, for what only the adapter knows.
    pub fn stores(&self) -> &S {
        &self.stores
    }

    /// The same, to be changed.
    pub fn stores_mut(&mut self) -> &mut S {
        &mut self.stores
    }

    /// Time has passed.
    pub fn tick(&mut self) {
        let now = self.clock.now();
        for index in 0..self.tenants.len() {
            let tenant = &self.tenants[index];
            if tenant.made.is_none() && tenant.failed.is_none() && now >= tenant.grace_until {
                self.need_arena(TenantId(u16::try_from(index).expect("tenants are few")));
            }
        }
        self.step(None, Input::Tick);
    }

    /// When to tick next; `None`: nothing waits for the clock.
    pub fn next_deadline(&self) -> Option<Now> {
        let grace = self
            .tenants
            .iter()
            .filter(|t| t.made.is_none() && t.failed.is_none())
            .map(|t| t.grace_until);
        grace.chain(self.core.next_deadline()).min()
    }

    /// The next thing to tell a session.
    pub fn take_effect(&mut self) -> Option<Effect> {
        self.effects.pop_front()
    }

    /// One tenant, now; for status.
    pub fn snapshot(&self, tenant: TenantId) -> Option<TenantSnapshot> {
        let held = self.tenants.get(usize::from(tenant.0))?;
        Some(TenantSnapshot {
            view: self.core.status(tenant)?,
            counts: held.counts.clone(),
            arena: held.state(self.clock.now()),
            probe: self.arenas.page_probe(tenant),
        })
    }

    /// The sizes of a tenant's arena, once it is there.
    pub fn arena_shape(&self, tenant: TenantId) -> Option<kvd_core::ArenaShape> {
        self.tenant(tenant).made.as_ref().map(|made| made.shape)
    }

    /// Where a tenant's arena stands.
    pub fn arena_state(&self, tenant: TenantId) -> ArenaState {
        self.tenant(tenant).state(self.clock.now())
    }

    /// What happened by the clock, of no tenant in particular: expired leases, missed deadlines.
    pub fn idle_counts(&self) -> &Counts {
        &self.idle_counts
    }

    fn tenant(&self, tenant: TenantId) -> &Tenant {
        &self.tenants[usize::from(tenant.0)]
    }

    fn need_arena(&mut self, tenant: TenantId) {
        if self.tenant(tenant).made.is_some() {
            return;
        }
        match self.arenas.create(tenant) {
            Ok(shape) => self.arena_made(tenant, shape, None),
            Err(error) => {
                let held = &mut self.tenants[usize::from(tenant.0)];
                tracing::error!(tenant = %held.spec.name, %error, "there is no arena; nothing can be stored");
                held.failed = Some(error.0);
            }
        }
    }

    fn arena_made(
        &mut self,
        tenant: TenantId,
        shape: kvd_core::ArenaShape,
        adopted: Option<Adopted<'_>>,
    ) {
        let held = &mut self.tenants[usize::from(tenant.0)];
        held.made = Some(Made {
            shape,
            adopted: adopted.is_some(),
            settled: 0,
        });
        held.failed = None;
        self.to_populate.retain(|(whose, _)| *whose != tenant);
        self.step(
            Some(tenant),
            Input::Arena {
                tenant,
                shape,
                adopted,
            },
        );
        if self.tenant(tenant).made.is_some() {
            self.to_populate
                .extend((0..shape.extents()).map(|extent| (tenant, extent)));
            self.populate_next();
        }
    }

    fn populate_next(&mut self) {
        if self.populating {
            return;
        }
        if let Some((tenant, extent)) = self.to_populate.pop_front() {
            self.populating = true;
            self.arenas.populate(tenant, extent);
        }
    }

    fn new_token(&mut self) -> SessionId {
        loop {
            let mut bytes = [0; 8];
            self.entropy.fill(&mut bytes);
            let session = SessionId(u64::from_le_bytes(bytes));
            // 0 means "no session" wherever a token is written.
            if session.0 != 0 && !self.core.knows(session) {
                return session;
            }
        }
    }

    /// One input, and then, one by one, what could not be begun because of it.
    fn step(&mut self, tenant: Option<TenantId>, input: Input<'_>) {
        self.step_once(tenant, input);
        while let Some((store, done)) = self.unbegun.pop_front() {
            let tenant = self.core.tenant_of(done.op());
            self.step_once(tenant, Input::StoreDone { store, done });
        }
    }

    fn step_once(&mut self, tenant: Option<TenantId>, input: Input<'_>) {
        let before = Counts::of(self.core.counters());
        let mut out = std::mem::take(&mut self.out);
        self.core.step(self.clock.now(), input, &mut out);
        let after = Counts::of(self.core.counters());
        let counts = match tenant {
            Some(tenant) => &mut self.tenants[usize::from(tenant.0)].counts,
            None => &mut self.idle_counts,
        };
        counts.add(&before, &after);
        for output in out.drain(..) {
            self.carry_out(output);
        }
        self.out = out;
    }

    /// Hands an operation to its store, with the memory that it is about.
    fn begin(&mut self, store: StoreId, op: StoreOp) {
        let range = match &op {
            StoreOp::Write { from, .. } => Some(*from),
            StoreOp::Read { into, .. } => Some(*into),
            StoreOp::Drop { .. } => None,
        };
        let span = range.and_then(|range| self.arenas.span(range));
        let refused = if span.is_some() == range.is_some() {
            self.stores.begin(store, op, span)
        } else {
            tracing::error!(?range, "there is no such memory; a store was not asked");
            Some(op.refused(StoreError::Off))
        };
        self.unbegun.extend(refused.map(|done| (store, done)));
    }

    fn carry_out(&mut self, output: Output) {
        match output {
            Output::SetGeneration { tenant, slot, word } => {
                self.arenas.set_generation(tenant, slot, word)
            }
            Output::Reply { session, id, reply } => {
                self.effects.push_back(Effect::Reply { session, id, reply })
            }
            Output::WriterTable { tenant, tokens } => {
                let tokens: Vec<u64> = tokens.into_iter().map(|t| t.0).collect();
                self.arenas.set_writers(tenant, &tokens);
            }
            Output::Refill { tenant, extent } => {
                tracing::warn!(
                    extent,
                    "blocks of this part of the arena were corrupt in a row; it is faulted in again"
                );
                self.to_populate.push_back((tenant, extent));
                self.populate_next();
            }
            Output::Store { store, op } => self.begin(store, op),
            Output::ArenaRefused { tenant, failure } => {
                let held = &mut self.tenants[usize::from(tenant.0)];
                tracing::error!(tenant = %held.spec.name, reason = failure.text, "the arena was refused");
                held.made = None;
                held.failed = Some(failure.text);
            }
            Output::EndSession { session, failure } => {
                self.effects.push_back(Effect::End { session, failure })
            }
        }
    }
}
