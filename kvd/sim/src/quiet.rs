//! The end of a run: the faults stop, everything must come to rest, and what is still held must be right.
//!
//! First with the honest engines alive and idle, then with all of them gone. Time is virtual, so "within N seconds" is a bound
//! on the clock of the simulation.

use kvd_core::TenantId;
use kvd_core::status::StatusView;

use crate::content;
use crate::report::{Check, ensure};
use crate::world::World;

/// Virtual microseconds in which everything must have come to rest, beyond the longest of the drawn times.
const REST: u64 = 5_000_000;

impl World {
    /// Lets the world come to rest, and checks that it has.
    pub(crate) fn come_to_rest(&mut self) -> Check {
        self.quiet = true;
        self.event("quiet", [0; 3]);
        self.tier.heal();
        for p in 0..self.procs.len() {
            self.procs[p].stalled_until = 0;
            let honest = self.instances[self.procs[p].instance].honest();
            let whole = self.instances[self.procs[p].instance]
                .procs
                .iter()
                .all(|p| self.procs[*p].alive);
            if !honest || !whole {
                self.kill(p);
            }
        }
        if !self.config.tight {
            self.run_until("the engines are idle", |w| w.engines_idle())?;
            self.let_times_pass()?;
            self.check_rest(false)?;
        }
        self.check_held()?;
        for p in 0..self.procs.len() {
            if self.procs[p].alive {
                self.say_bye(p);
            }
        }
        self.run_until("all sessions are over", |w| {
            w.deaths.is_empty() && w.sockets_quiet()
        })?;
        self.let_times_pass()?;
        self.check_rest(true)?;
        self.check_stores_end()
    }

    fn sockets_quiet(&self) -> bool {
        self.conns.values().all(|c| !c.daemon_open)
    }

    fn engines_idle(&self) -> bool {
        let open = self
            .conns
            .values()
            .any(|c| c.daemon_open && (!c.to_daemon.is_empty() || !c.client_open));
        // One whose connection is lost has not noticed that yet, and has a past to fence.
        let online = |p: &crate::engine::Proc| {
            let conn = p.conn.and_then(|at| self.conns.get(&at));
            conn.is_some_and(|conn| conn.daemon_open)
        };
        let idle = |p: &crate::engine::Proc| !p.alive || p.idle() && online(p);
        let jobs = self.daemon.as_ref().is_none_or(|d| !d.jobs.is_empty());
        !open
            && !jobs
            && self.stores_idle()
            && self.deaths.is_empty()
            && self.procs.iter().all(idle)
    }

    fn longest(&self) -> u64 {
        let core = &self.config.node.core;
        let lookup = u64::from(core.max_lookup_lease_ms) * 1000;
        core.fill_deadline_us
            .max(core.lease_us)
            .max(lookup)
            .max(u64::from(core.tiers.max_wait_ms) * 1000)
            .max(self.config.node.adopt_grace_us)
    }

    fn run_until(&mut self, what: &str, done: impl Fn(&World) -> bool) -> Check {
        let end = self.clock.us() + self.longest() + REST;
        let mut steps = 0u64;
        while !done(self) {
            self.step()?;
            self.serve_some()?;
            self.turn_some()?;
            self.step_stores()?;
            steps += 1;
            if steps > 100_000 {
                self.clock.advance(1_000);
            }
            if self.clock.us() > end {
                let busy: Vec<String> = self
                    .procs
                    .iter()
                    .enumerate()
                    .filter(|(_, p)| p.alive && !p.idle())
                    .map(|(at, p)| self.words(at, p))
                    .collect();
                ensure!(
                    false,
                    0,
                    "faults have stopped, but it is not true after {steps} steps that {what}: {busy:?}"
                );
            }
        }
        Ok(())
    }

    fn words(&self, at: usize, p: &crate::engine::Proc) -> String {
        format!(
            "proc {at} instance {} ready {} past {:x?} pending {:?} stores {} reads {} orders {} leases {}",
            p.instance,
            p.ready,
            p.past,
            p.pending,
            p.stores.len(),
            p.reads.len(),
            p.orders.len(),
            p.leases.len()
        )
    }

    /// Deadlines and leases run out.
    fn let_times_pass(&mut self) -> Check {
        self.settle_stores()?;
        for _ in 0..8 {
            let us = self.longest() / 4 + 1_000;
            self.clock.advance(us);
            self.step += 1;
            self.tick_if_due()?;
            self.finish_job(false)?;
        }
        for _ in 0..200 {
            self.finish_job(false)?;
            self.tick_if_due()?;
        }
        self.settle_stores()
    }

    fn check_rest(&mut self, ended: bool) -> Check {
        for tenant in 0..self.model.tenants.len() {
            let Some(daemon) = &self.daemon else {
                return Ok(());
            };
            let Some(view) = daemon.node.core().status(TenantId(tenant as u16)) else {
                continue;
            };
            self.check_tenant_rest(tenant, &view, ended)?;
        }
        let Some(daemon) = &self.daemon else {
            return Ok(());
        };
        for (token, info) in &daemon.sessions {
            ensure!(
                info.open.is_empty(),
                5,
                "requests of session {token:x} have no reply: {:?}",
                info.open
            );
        }
        if ended {
            let first = daemon
                .sessions
                .keys()
                .find(|token| daemon.node.knows(kvd_core::SessionId(**token)));
            ensure!(
                first.is_none(),
                0,
                "session {first:x?} is still there, though its process is gone"
            );
        }
        Ok(())
    }

    fn check_tenant_rest(&self, tenant: usize, view: &StatusView, ended: bool) -> Check {
        let s = view.slots;
        ensure!(
            s.reserved + s.filling == 0,
            0,
            "tenant {tenant}: slots are still being filled: {s:?}"
        );
        ensure!(
            view.pinned_bytes == 0,
            0,
            "tenant {tenant}: {} bytes are still pinned",
            view.pinned_bytes
        );
        let leases = view
            .sessions
            .iter()
            .map(|v| v.read_leases + v.lookup_leases)
            .sum::<u32>();
        ensure!(
            leases == 0,
            0,
            "tenant {tenant}: {leases} leases are still held"
        );
        // An extent is refilled once nothing in it is in use.
        let refilling = view.extents.refilling > 0 && s.quarantined == 0;
        ensure!(!refilling, 0, "tenant {tenant}: {:?}", view.extents);
        // A scheduler that lost its connection before it read the reply knows nothing of those slots, and told nobody.
        let mut unknown = self.model.tenants[tenant]
            .claims
            .values()
            .filter(|held| ended || !self.untold.contains(&held.seed));
        self.check_held_out(tenant, view)?;
        let first = unknown.next();
        ensure!(
            first.is_none(),
            0,
            "tenant {tenant}: slots are still quarantined: {s:?}, such as {first:?}"
        );
        ensure!(!ended || s.quarantined == 0, 0, "tenant {tenant}: {s:?}");
        Ok(())
    }

    /// What a former daemon's writers may still write stays out of use until all of them have fenced. The living have.
    fn check_held_out(&self, tenant: usize, view: &StatusView) -> Check {
        let held_out = view.extents.held_out;
        ensure!(
            held_out == 0 || view.unfenced_writers > 0,
            0,
            "tenant {tenant}: {held_out} extents are held out for nobody"
        );
        let (Some(daemon), Some(mapping)) = (&self.daemon, &self.model.tenants[tenant].mapping)
        else {
            return Ok(());
        };
        if mapping.memory.gap.get() {
            return Ok(());
        }
        for token in mapping.writers() {
            let owner = self.owners.get(&token).map(|p| &self.procs[*p]);
            let former = !daemon.sessions.contains_key(&token);
            ensure!(
                !former || owner.is_none_or(|p| !p.alive),
                0,
                "session {token:x} of a former daemon has not fenced, but its process lives"
            );
        }
        Ok(())
    }

    /// Every block that is held has the bytes that were stored, unless somebody is known to have tampered with them.
    fn check_held(&self) -> Check {
        for t in &self.model.tenants {
            let Some(mapping) = &t.mapping else { continue };
            for held in t.residents.values() {
                if held.suspect || mapping.memory.tainted(held.offset, held.len) {
                    continue;
                }
                let expected = content::block(held.seed, &held.geometry, &held.cut);
                let mut found = vec![0; expected.len()];
                mapping.memory.read(held.offset, &mut found);
                ensure!(
                    found == expected,
                    1,
                    "{:?} in slot {} is not what was stored",
                    held.key,
                    held.slot
                );
            }
        }
        Ok(())
    }
}
