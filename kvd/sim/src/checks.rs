//! The checkers that look after every call of the node: the change log, what became visible, who is writing where, bounds, and
//! core's own check.

use kvd_core::{Change, ChangeKind, OBSERVERS, Role, StatusView, TenantId};

use crate::content;
use crate::model::{Held, Settled};
use crate::plant::Plant;
use crate::report::{Broken, Check, ensure};
use crate::world::World;

/// A process that is writing into an arena now, or will go on to when it wakes up.
#[derive(Clone, Debug)]
pub(crate) struct ActiveWrite {
    pub(crate) job: u64,
    pub(crate) proc: usize,
    /// Serial of the bytes.
    pub(crate) memory: u64,
    pub(crate) offset: u64,
    pub(crate) len: u64,
    pub(crate) generation: u64,
}

impl ActiveWrite {
    fn words(&self) -> String {
        let (from, to) = (self.offset, self.offset + self.len);
        format!(
            "process {} at {from:#x}..{to:#x} under generation {}",
            self.proc, self.generation
        )
    }
}

impl World {
    /// What is new in the change log. The log must be complete: it is read after every call.
    pub(crate) fn read_changes(&mut self) -> Check<Vec<Change>> {
        let mut all = Vec::new();
        let Some(daemon) = &mut self.daemon else {
            return Ok(all);
        };
        for (tenant, t) in self.model.tenants.iter_mut().enumerate() {
            let found = daemon
                .node
                .core()
                .changes(TenantId(tenant as u16), t.cursor, usize::MAX);
            ensure!(
                !found.lost,
                6,
                "tenant {tenant}: the change log lost changes after {}",
                t.cursor
            );
            t.cursor = found.next;
            for change in found.changes {
                ensure!(
                    usize::from(change.tenant.0) == tenant,
                    10,
                    "tenant {tenant} was told of {change:?}"
                );
                all.push(change);
            }
        }
        if self.options.plant == Some(Plant::HideRemoval)
            && let Some(at) = all.iter().position(|c| c.kind == ChangeKind::Removed)
        {
            daemon.hidden += 1;
            if daemon.hidden.is_multiple_of(3) {
                all.remove(at);
            }
        }
        Ok(all)
    }

    /// Visible blocks are complete, nobody writes them; emptied slots get the pattern of memory that is nobody's.
    pub(crate) fn check_settled(&mut self, settled: &Settled) -> Check {
        for (held, word) in &settled.emptied {
            if let Some(mapping) = &self.model.tenants[usize::from(held.key.tenant)].mapping {
                mapping.memory.poison(held.offset, held.len, *word);
            }
            self.event("emptied", [u64::from(held.slot), *word, 0]);
            self.counters.add("slots emptied");
        }
        for held in &settled.visible {
            self.event(
                "visible",
                [u64::from(held.slot), held.generation, held.seed],
            );
            self.counters.add("blocks stored");
            self.check_visible(held)?;
        }
        Ok(())
    }

    fn check_visible(&self, held: &Held) -> Check {
        let t = &self.model.tenants[usize::from(held.key.tenant)];
        let Some(mapping) = &t.mapping else {
            return Ok(());
        };
        ensure!(
            held.generation.is_multiple_of(2),
            3,
            "slot {} is readable under an odd generation",
            held.slot
        );
        self.no_writers(mapping.memory.serial, held.offset, held.len, "readable")?;
        if held.suspect || mapping.memory.tainted(held.offset, held.len) {
            return Ok(());
        }
        let expected = content::block(held.seed, &held.geometry, &held.cut);
        let mut found = vec![0; expected.len()];
        mapping.memory.read(held.offset, &mut found);
        if let Some(at) = (0..found.len()).find(|at| found[*at] != expected[*at]) {
            let text = format!(
                "slot {} became readable, but byte {at} of {} is not there",
                held.slot,
                found.len()
            );
            return Err(Broken { invariant: 1, text });
        }
        Ok(())
    }

    /// Nobody with a right to write is writing in these bytes.
    pub(crate) fn no_writers(&self, memory: u64, offset: u64, len: u64, what: &str) -> Check {
        let mut writers = self.writers.iter().filter(|w| w.memory == memory);
        let found = writers.find(|w| w.offset < offset + len && offset < w.offset + w.len);
        ensure!(
            found.is_none(),
            3,
            "bytes {offset:#x}+{len:#x} are {what} while written by {}",
            found.map_or(String::new(), ActiveWrite::words)
        );
        Ok(())
    }

    /// A process begins to write what it believes to be its own.
    pub(crate) fn begin_write(&mut self, write: ActiveWrite) -> Check {
        self.no_writers(write.memory, write.offset, write.len, "begun to be written")?;
        self.writers.push(write);
        Ok(())
    }

    /// It has written its last byte there.
    pub(crate) fn end_write(&mut self, job: u64) {
        self.writers.retain(|w| w.job != job);
    }

    /// The daemon from the outside: its own check, the sums, the bounds.
    pub(crate) fn check_daemon(&mut self) -> Check {
        let Some(daemon) = &self.daemon else {
            return Ok(());
        };
        if !daemon.calls.is_multiple_of(self.config.check_every) {
            return Ok(());
        }
        daemon.node.core().check();
        if daemon.calls.is_multiple_of(8) {
            for tenant in 0..self.model.tenants.len() {
                self.check_tenant(tenant)?;
            }
        }
        Ok(())
    }

    fn check_tenant(&self, tenant: usize) -> Check {
        let (Some(daemon), t) = (&self.daemon, &self.model.tenants[tenant]) else {
            return Ok(());
        };
        let Some(view) = daemon.node.core().status(TenantId(tenant as u16)) else {
            return Ok(());
        };
        ensure!(
            view.slots.resident == t.residents.len() as u64,
            6,
            "tenant {tenant}: {} resident slots, {} were announced",
            view.slots.resident,
            t.residents.len()
        );
        let odd = view.slots.reserved + view.slots.filling + view.slots.quarantined;
        ensure!(
            odd == t.claims.len() as u64,
            2,
            "tenant {tenant}: {odd} slots being filled, {} were given",
            t.claims.len()
        );
        let e = view.extents;
        let extents = e.pending + e.failed + e.held_out + e.refilling + e.free + e.classed;
        let all = view.arena.map_or(0, |shape| shape.extents());
        ensure!(
            extents == all,
            2,
            "tenant {tenant}: {extents} of {all} extents"
        );
        for ns in &view.namespaces {
            let held = t.by_key.keys().filter(|key| key.namespace == ns.id).count() as u64;
            ensure!(
                ns.blocks == held,
                6,
                "namespace {}: {} blocks, {held} were announced",
                ns.id,
                ns.blocks
            );
        }
        self.check_bounds(tenant, &view)
    }

    /// Invariant 8.
    fn check_bounds(&self, tenant: usize, view: &StatusView) -> Check {
        let (limits, core) = (self.config.limits[tenant], &self.config.node.core);
        let works = view
            .sessions
            .iter()
            .filter(|session| session.role != Role::Observer);
        let work = works.count();
        let look = view.sessions.len() - work;
        ensure!(
            work as u32 <= limits.sessions,
            8,
            "{work} sessions that do more than look"
        );
        ensure!(look as u32 <= OBSERVERS, 8, "{look} that look");
        ensure!(
            view.namespaces.len() as u32 <= limits.namespaces,
            8,
            "{} namespaces",
            view.namespaces.len()
        );
        for session in &view.sessions {
            ensure!(session.instance_claims <= core.max_claims, 8, "{session:?}");
            ensure!(
                session.read_leases <= core.max_read_leases,
                8,
                "{session:?}"
            );
            ensure!(
                session.lookup_leases <= core.max_lookup_leases,
                8,
                "{session:?}"
            );
            ensure!(
                session.namespaces.len() as u32 <= core.max_session_namespaces,
                8,
                "{session:?}"
            );
        }
        let entries: u64 = view.slots.resident + view.slots.reserved + view.slots.filling;
        ensure!(
            entries <= u64::from(core.max_entries),
            8,
            "{entries} blocks in the index"
        );
        Ok(())
    }
}
