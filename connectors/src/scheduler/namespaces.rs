//! Which namespace a request's blocks belong to: one for the base model and one for each adapter, and new ones after every
//! weights epoch. Known only when the shim has found out what the weights are and all workers have said what they hold.

use std::collections::HashMap;

use kvd_client::GroupLayout;

use super::Scheduler;
use super::port::{Port, Registered};
use super::request::{Adapter, Request};
use crate::fleet::{self, Fleet};
use crate::meta::{GroupIntro, NamespaceIntro, RankHello};
use crate::record::{self, Fields};

/// How a request stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// In this namespace, registered with the daemon under this short name.
    Ready {
        /// Index in this instance.
        index: u32,
        /// The daemon's name for it, and the connection that this is true of.
        name: Registered,
    },
    /// Not yet, but soon: workers have not said what they hold, or the daemon has not answered the registration.
    Soon,
    /// Nothing can be stored or loaded for it now.
    Not,
}

struct Namespace<N> {
    slot: N,
    intro: NamespaceIntro,
    introduced: bool,
}

/// All namespaces of this instance.
pub(crate) struct Namespaces<N> {
    refusal: Option<String>,
    facts: Option<Fields>,
    fleet: Option<Fleet>,
    adapters: HashMap<String, String>,
    /// Counts replacements of the weights; 0: as loaded.
    epoch: u64,
    /// The engine's prefix cache may hold blocks of an earlier epoch.
    mixed: bool,
    instance: String,
    by_key: HashMap<(u64, Adapter), Option<u32>>,
    /// Some namespace has not been introduced to the workers.
    unheard: bool,
    all: Vec<Option<Namespace<N>>>,
}

impl<N> Namespaces<N> {
    pub(crate) fn new() -> Self {
        Namespaces {
            refusal: None,
            facts: None,
            fleet: None,
            adapters: HashMap::new(),
            epoch: 0,
            mixed: false,
            instance: String::new(),
            by_key: HashMap::new(),
            unheard: false,
            all: Vec::new(),
        }
    }

    pub(crate) fn refusal(&self) -> Option<&str> {
        self.refusal.as_deref()
    }

    /// True the first time.
    pub(crate) fn refuse(&mut self, reason: &str) -> bool {
        let first = self.refusal.is_none();
        if first {
            self.refusal = Some(reason.to_owned());
        }
        first
    }

    pub(crate) fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Whether all workers have said what they hold.
    pub(crate) fn known(&self) -> bool {
        self.fleet.is_some()
    }

    /// Whether blocks that the engine found in its own cache may be of another epoch.
    pub(crate) fn mixed(&self) -> bool {
        self.mixed
    }

    /// The next weights epoch. The namespaces of the last one are retired: their indexes.
    pub(crate) fn next_epoch(&mut self, clean: bool) -> Vec<u32> {
        self.epoch += 1;
        self.mixed = !clean;
        self.by_key.clear();
        let mut retired = Vec::new();
        for (index, namespace) in (0u32..).zip(&mut self.all) {
            if namespace.take().is_some() {
                retired.push(index);
            }
        }
        retired
    }

    /// Whether several ranks hold the same part of a group's blocks.
    pub(crate) fn replicated(&self, group: u32) -> bool {
        let groups = self.fleet.as_ref().map(|fleet| &fleet.groups[..]);
        let group = groups.and_then(|groups| groups.get(group as usize));
        group.is_some_and(|group| {
            let parts = &group.intro.parts;
            (1..parts.len()).any(|at| parts[..at].contains(&parts[at]))
        })
    }

    /// Namespaces that the workers have not been told of.
    pub(crate) fn introduce(&mut self) -> Vec<NamespaceIntro> {
        let mut intros = Vec::new();
        if !std::mem::take(&mut self.unheard) {
            return intros;
        }
        for namespace in self.all.iter_mut().flatten().filter(|n| !n.introduced) {
            namespace.introduced = true;
            intros.push(namespace.intro.clone());
        }
        intros
    }
}

impl<P: Port> Scheduler<P> {
    /// What the shim found out about model, weights and configuration (record fields), and a name for this engine instance
    /// that no other has; it marks the namespaces of later weights epochs.
    pub fn set_facts(&mut self, facts: Fields, instance: &str) {
        self.namespaces.facts = Some(facts);
        self.namespaces.instance = instance.to_owned();
        self.prepare();
    }

    /// The content digest of an adapter, by the name that requests give.
    pub fn set_adapter(&mut self, name: &str, digest: &str) {
        let before = self
            .namespaces
            .adapters
            .insert(name.to_owned(), digest.to_owned());
        if before.is_some_and(|before| before != digest) {
            let adapter = Adapter::Named(name.to_owned());
            self.namespaces.by_key.retain(|(_, key), _| *key != adapter);
        }
    }

    /// A rank says what it holds.
    pub fn on_hello(&mut self, hello: RankHello) {
        let Some(place) = self.hellos.get_mut(hello.rank as usize) else {
            self.refuse(format!(
                "worker {} is not one of {}",
                hello.rank, self.settings.world
            ));
            return;
        };
        *place = Some(hello);
        if self.namespaces.fleet.is_some() || self.hellos.iter().any(Option::is_none) {
            return;
        }
        let hellos: Vec<RankHello> = self.hellos.iter().flatten().cloned().collect();
        match fleet::assemble(&hellos) {
            Ok(fleet) => {
                let rules = fleet.groups.iter().map(|group| &group.rule);
                if !rules.eq(&self.settings.groups) {
                    return self.refuse("workers and scheduler see different KV-cache groups");
                }
                self.namespaces.fleet = Some(fleet);
                self.prepare();
            }
            Err(reason) => self.refuse(reason),
        }
    }

    /// Registers the base model's namespace as soon as everything is known, so that the first request finds it ready.
    fn prepare(&mut self) {
        if self.namespaces.facts.is_some() && self.namespaces.fleet.is_some() {
            self.index_of(&Adapter::Base);
        }
    }

    /// How a request stands now.
    pub(crate) fn standing(&mut self, adapter: &Adapter) -> Standing {
        if self.namespaces.refusal.is_some() || !self.port.connected() {
            return Standing::Not;
        }
        if self.namespaces.facts.is_none() {
            return Standing::Not;
        }
        if self.namespaces.fleet.is_none() {
            return Standing::Soon;
        }
        let Some(index) = self.index_of(adapter) else {
            return Standing::Not;
        };
        self.standing_of(index)
    }

    /// How a namespace stands now.
    pub(crate) fn standing_of(&self, index: u32) -> Standing {
        let Some(Some(namespace)) = self.namespaces.all.get(index as usize) else {
            return Standing::Not;
        };
        match self.port.current(&namespace.slot) {
            Some(registered) => Standing::Ready {
                index,
                name: registered,
            },
            None if self.port.refused(&namespace.slot).is_some() => Standing::Not,
            None => Standing::Soon,
        }
    }

    /// The namespace of an adapter in this epoch; registers it when it is new.
    fn index_of(&mut self, adapter: &Adapter) -> Option<u32> {
        let key = (self.namespaces.epoch, adapter.clone());
        if let Some(index) = self.namespaces.by_key.get(&key) {
            return *index;
        }
        let digest = match adapter {
            Adapter::Base => None,
            Adapter::Named(name) => Some(self.namespaces.adapters.get(name)?.clone()),
        };
        let index = match self.make(digest.as_deref()) {
            Ok(index) => Some(index),
            Err(reason) => {
                self.notices
                    .warn(format!("a namespace can't be used, so its blocks are neither stored nor loaded: {reason}"));
                None
            }
        };
        self.namespaces.by_key.insert(key, index);
        index
    }

    fn make(&mut self, adapter: Option<&str>) -> Result<u32, String> {
        let (Some(facts), Some(fleet)) = (&self.namespaces.facts, &self.namespaces.fleet) else {
            return Err("the namespace is not known yet".to_owned());
        };
        let epoch = (self.namespaces.epoch > 0)
            .then(|| format!("{}:{}", self.namespaces.instance, self.namespaces.epoch));
        let record = record::build(facts, fleet, adapter, epoch.as_deref())
            .map_err(|error| error.to_string())?;
        let groups: Vec<GroupIntro> = fleet.groups.iter().map(|g| g.intro.clone()).collect();
        let slot = self
            .port
            .register(record.clone(), layouts(&groups, None))
            .map_err(|fault| format!("the namespace can't be registered: {fault:?}"))?;
        let index = self.namespaces.all.len() as u32;
        self.namespaces.unheard = true;
        self.namespaces.all.push(Some(Namespace {
            slot,
            intro: NamespaceIntro {
                index,
                record,
                groups,
            },
            introduced: false,
        }));
        Ok(index)
    }

    /// Whether every rank can copy into this namespace's slots on the connection it last reported.
    pub(crate) fn ranks_ready(&self, index: u32) -> bool {
        self.ranks
            .iter()
            .all(|rank| rank.epoch != 0 && rank.registered.contains(&index))
    }

    /// Whether blocks of this request may be stored, as far as it is concerned.
    pub(crate) fn may_store(&self, request: &Request<P::Ticket>) -> bool {
        self.settings.stores && request.may_store(self.namespaces.epoch)
    }
}

/// The layout message of each group, for the rank that copies (or none: the scheduler).
pub(crate) fn layouts(groups: &[GroupIntro], rank: Option<u32>) -> Vec<GroupLayout> {
    groups
        .iter()
        .map(|group| {
            let part = rank.and_then(|rank| group.parts.get(rank as usize).copied());
            GroupLayout {
                group: group.group,
                layer_bounds: group.layer_bounds.clone(),
                head_bounds: group.head_bounds.clone(),
                copies: part.is_some(),
                part: part.unwrap_or(0),
            }
        })
        .collect()
}
