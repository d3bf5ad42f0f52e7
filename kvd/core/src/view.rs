//! Fills [`StatusView`] from the state. Deliberately absent: anything that costs more than one pass over small tables.

use crate::ids::TenantId;
use crate::state::Core;
use crate::status::{ClassView, ExtentCounts, NamespaceView, SessionView, SlotCounts, StatusView};

fn add(sum: &mut SlotCounts, counts: &SlotCounts, each: u64) {
    sum.free += counts.free * each;
    sum.reserved += counts.reserved * each;
    sum.filling += counts.filling * each;
    sum.resident += counts.resident * each;
    sum.quarantined += counts.quarantined * each;
}

impl Core {
    /// One tenant's state; `None` if there is no such tenant.
    pub fn status(&self, tenant: TenantId) -> Option<StatusView> {
        let t = *self.tenant_ids.get(&tenant)?;
        let found = &self.tenants[t];
        let classes = self.class_views(t);
        let (mut slots, mut slot_bytes) = (SlotCounts::default(), SlotCounts::default());
        for class in &classes {
            add(&mut slots, &class.slots, 1);
            add(&mut slot_bytes, &class.slots, class.slot_bytes);
        }
        let pool = found.pool.as_ref();
        Some(StatusView {
            tenant: found.name.clone(),
            incarnation: self.settings.incarnation,
            sequence: self.log.newest(),
            arena: pool.map(|pool| pool.shape),
            eviction: self.settings.eviction,
            extents: pool.map_or(ExtentCounts::default(), |pool| pool.extent_counts()),
            slots,
            slot_bytes,
            quarantine_limit: found.quarantine_limit(),
            pinned_bytes: found.pinned_bytes,
            ahead_bytes: found.ahead_bytes,
            ahead_reads: found.ahead_reads,
            unfenced_writers: found.unfenced.len() as u32,
            classes,
            namespaces: self.namespace_views(t),
            sessions: self.session_views(t),
        })
    }

    fn class_views(&self, t: usize) -> Vec<ClassView> {
        let Some(pool) = &self.tenants[t].pool else {
            return Vec::new();
        };
        let live = pool
            .classes
            .iter()
            .filter(|class| class.groups > 0 || class.extents > 0);
        let mut views: Vec<ClassView> = live
            .map(|class| ClassView {
                slot_bytes: class.slot_bytes,
                extents: class.extents,
                slots: class.counts,
                leaves: class.policy.len(),
            })
            .collect();
        views.sort_by_key(|view| view.slot_bytes);
        views
    }

    fn namespace_views(&self, t: usize) -> Vec<NamespaceView> {
        let own = self
            .spaces
            .by_number
            .values()
            .filter(|space| space.tenant == t);
        own.map(|space| NamespaceView {
            id: space.id,
            record: space.record.clone(),
            blocks: space.blocks,
            bytes: space.bytes,
            sessions: space.sessions,
        })
        .collect()
    }

    fn session_views(&self, t: usize) -> Vec<SessionView> {
        let all = self.sessions.range().map(|at| &self.sessions[at]);
        let own = all.filter(|session| session.token.0 != 0 && session.tenant == t);
        let mut views: Vec<(u64, SessionView)> = own
            .map(|session| {
                let instance = &self.instances[session.instance];
                let joined = session.joined.iter();
                let view = SessionView {
                    session: session.token,
                    instance: instance.id,
                    label: session.label.clone(),
                    role: session.role,
                    rank: session.rank,
                    world: session.world,
                    attached: session.attached,
                    age_us: self.now - session.opened,
                    namespaces: joined.map(|j| self.spaces.get(j.space).id).collect(),
                    writing: session.writing,
                    instance_claims: instance.claims.len(),
                    read_leases: session.reads,
                    lookup_leases: session.lookups,
                };
                (session.opened, view)
            })
            .collect();
        views.sort_by_key(|(opened, view)| (*opened, view.session));
        views.into_iter().map(|(_, view)| view).collect()
    }
}
