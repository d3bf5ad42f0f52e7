//! Namespaces in RAM: a record, interned as a u32, with what its groups need. A namespace lives while a session has it
//! registered or a block of it is held. Deliberately absent: what a record means.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::api::{ErrorKind, Failure, NIL, Output};
use crate::geometry::Cut;
use crate::ids::NamespaceId;
use crate::index::EntryState;
use crate::record::NamespaceRecord;
use crate::state::Core;

/// Most different cuts by which blocks of one namespace are stored.
const MAX_CUTS: usize = 64;

/// One KV-cache group of a namespace.
#[derive(Debug)]
pub(crate) struct Group {
    pub(crate) slot_bytes: u64,
    /// Size class in the tenant's pool.
    pub(crate) class: u16,
}

/// A cut that some instance stores by.
#[derive(Debug)]
pub(crate) struct StoredCut {
    pub(crate) group: u8,
    pub(crate) cut: Cut,
    pub(crate) crcs: u32,
}

/// One namespace.
#[derive(Debug)]
pub(crate) struct Namespace {
    pub(crate) tenant: usize,
    pub(crate) id: NamespaceId,
    pub(crate) record: NamespaceRecord,
    pub(crate) groups: Vec<Group>,
    pub(crate) cuts: Vec<StoredCut>,
    /// Visible blocks.
    pub(crate) blocks: u64,
    pub(crate) bytes: u64,
    pub(crate) sessions: u32,
    /// Blocks that are coming up from a store.
    pub(crate) coming: u32,
    /// The canonical record, once somebody needed it.
    canonical: Option<Arc<[u8]>>,
    /// Time of the last registration or leaving.
    pub(crate) used: u64,
}

impl Namespace {
    /// The canonical record, shared.
    pub(crate) fn canonical(&mut self) -> Arc<[u8]> {
        let record = &self.record;
        let made = || Arc::from(record.encode());
        self.canonical.get_or_insert_with(made).clone()
    }

    /// The number of this cut of this group, made if need be; `None` when there are too many.
    pub(crate) fn intern_cut(&mut self, group: u8, cut: &Cut) -> Option<u16> {
        let same = |stored: &StoredCut| stored.group == group && stored.cut == *cut;
        if let Some(at) = self.cuts.iter().position(same) {
            return Some(at as u16);
        }
        if self.cuts.len() == MAX_CUTS {
            return None;
        }
        self.cuts.push(StoredCut {
            group,
            cut: cut.clone(),
            crcs: cut.crc_count(),
        });
        Some(self.cuts.len() as u16 - 1)
    }
}

/// All namespaces, by number and by id.
#[derive(Debug, Default)]
pub(crate) struct Spaces {
    pub(crate) by_number: BTreeMap<u32, Namespace>,
    pub(crate) by_id: BTreeMap<(usize, NamespaceId), u32>,
    next: u32,
}

impl Spaces {
    pub(crate) fn find(&self, tenant: usize, id: NamespaceId) -> Option<u32> {
        self.by_id.get(&(tenant, id)).copied()
    }

    pub(crate) fn get(&self, number: u32) -> &Namespace {
        &self.by_number[&number]
    }

    pub(crate) fn get_mut(&mut self, number: u32) -> &mut Namespace {
        self.by_number
            .get_mut(&number)
            .expect("a namespace in use is known")
    }

    fn insert(&mut self, namespace: Namespace) -> u32 {
        while self.next == NIL || self.by_number.contains_key(&self.next) {
            self.next = self.next.wrapping_add(1);
        }
        let number = self.next;
        self.next = self.next.wrapping_add(1);
        self.by_id.insert((namespace.tenant, namespace.id), number);
        self.by_number.insert(number, namespace);
        number
    }
}

impl Core {
    /// Makes the namespace known. At the tenant's limit, the one unused for longest and its blocks are forgotten; if all are
    /// in use, Busy.
    pub(crate) fn add_space(
        &mut self,
        t: usize,
        id: NamespaceId,
        record: NamespaceRecord,
        out: &mut Vec<Output>,
    ) -> Result<u32, Failure> {
        let most = self.tenants[t].limits.namespaces;
        if self.tenants[t].namespaces >= most && !self.forget_idle_space(t, out) {
            let text = format!("{most} namespaces are in use; detach an engine or raise the limit");
            return Err(Failure::new(ErrorKind::Busy, text));
        }
        let tenant = &mut self.tenants[t];
        let Some(pool) = &mut tenant.pool else {
            return Err(no_arena());
        };
        let mut groups: Vec<Group> = Vec::with_capacity(record.groups().len());
        for geometry in record.groups() {
            let slot_bytes = geometry.slot_bytes();
            let Some(class) = pool.join_class(slot_bytes) else {
                groups
                    .iter()
                    .for_each(|group| pool.leave_class(group.class));
                let text = "too many different block sizes; detach an engine";
                return Err(Failure::new(ErrorKind::Busy, text));
            };
            groups.push(Group { slot_bytes, class });
        }
        tenant.namespaces += 1;
        Ok(self.spaces.insert(Namespace {
            tenant: t,
            id,
            record,
            groups,
            cuts: Vec::new(),
            blocks: 0,
            bytes: 0,
            sessions: 0,
            coming: 0,
            canonical: None,
            used: self.now,
        }))
    }

    /// Forgets the namespace if nobody has it and no block is of it.
    pub(crate) fn drop_space_if_idle(&mut self, number: u32) {
        let Some(space) = self.spaces.by_number.get(&number) else {
            return;
        };
        if space.sessions > 0 || space.blocks > 0 || space.coming > 0 {
            return;
        }
        let Some(space) = self.spaces.by_number.remove(&number) else {
            return;
        };
        self.spaces.by_id.remove(&(space.tenant, space.id));
        let tenant = &mut self.tenants[space.tenant];
        tenant.namespaces -= 1;
        if let Some(pool) = &mut tenant.pool {
            space
                .groups
                .iter()
                .for_each(|group| pool.leave_class(group.class));
        }
    }

    /// Drops the blocks of the tenant's namespace that no session has and that was unused for longest.
    fn forget_idle_space(&mut self, t: usize, out: &mut Vec<Output>) -> bool {
        let idle = self
            .spaces
            .by_number
            .iter()
            .filter(|(_, s)| s.tenant == t && s.sessions == 0 && s.coming == 0);
        let Some(number) = idle
            .min_by_key(|(number, s)| (s.used, **number))
            .map(|(n, _)| *n)
        else {
            return false;
        };
        for id in self.index.entries.hot.range() {
            let entry = &self.index.entries.hot[id];
            if entry.state == EntryState::Resident && entry.space == number {
                self.counters.evicted_with_namespace += 1;
                self.drop_block(id, true, out);
            }
        }
        true
    }
}

/// The tenant has no memory yet.
pub(crate) fn no_arena() -> Failure {
    Failure::new(
        ErrorKind::Unavailable,
        "the arena is not there yet; try again soon",
    )
}
