//! What other threads asked of the node's thread, and what they are told.

use std::time::Duration;

use kvd_core::TenantId;
use kvd_node::{ArenaState, Populated, TenantSnapshot, TierStatus};
use kvd_wire::session::{self as wire, reply};

use crate::connection::{Connection, Stage};
use crate::given::Given;
use crate::message::Message;
use crate::metrics::{Snapshot, TenantMetrics};
use crate::reactor::Reactor;
use crate::report::{Asker, Report};
use crate::stores::StoreNews;

impl Reactor {
    /// Takes what came through the doorbell.
    pub(crate) fn messages(&mut self) {
        self.door.quiet();
        while let Some(message) = self.door.next() {
            match message {
                Message::Alive(answer) => drop(answer.send(())),
                Message::Status(answer) => {
                    // Refused: the sender is dropped, and HTTP says that nobody answers.
                    self.report(Asker::Http(answer), None);
                }
                Message::Metrics(answer) => drop(answer.send(Box::new(self.metrics()))),
                Message::Populated(Populated {
                    tenant,
                    arena,
                    extent,
                    failed,
                }) => {
                    self.node
                        .populated(tenant, arena, extent, failed.as_deref());
                    self.deliver(None);
                }
                Message::Store(store, StoreNews::Done(mut all)) => {
                    for done in all.drain(..) {
                        self.node.store_done(store, done);
                    }
                    if let Some(running) = self.node.stores().all.get(usize::from(store.0)) {
                        running.give_back(all);
                    }
                    self.deliver(None);
                }
                Message::Store(store, StoreNews::Switched(on)) => {
                    self.node.store_switched(store, on);
                }
                Message::StatusMade { key, id, json } => {
                    let Some(mut connection) = self.connections.remove(&key) else {
                        continue;
                    };
                    if matches!(connection.stage, Stage::Open { .. }) {
                        connection.in_flight = connection.in_flight.saturating_sub(1);
                        let body = reply::Body::Status(wire::StatusReply { json: json.into() });
                        connection.reply_within(id, body, self.config.limits.frame_bytes);
                    }
                    self.work(&mut connection);
                    self.keep(connection);
                }
            }
        }
    }

    /// Asks for a status text: of all tenants, or of the one whose connection asks. `false`: too many are waiting.
    pub(crate) fn report(&self, asker: Asker, whose: Option<&Connection>) -> bool {
        let tenants = self
            .tenants()
            .filter(|tenant| whose.is_none_or(|c| c.tenant == *tenant))
            .filter_map(|t| {
                Some((
                    self.node.snapshot(t)?,
                    self.sockets[usize::from(t.0)].display().to_string(),
                ))
            })
            .collect();
        let pids = self
            .connections
            .values()
            .map(|c| &**c)
            .chain(whose)
            .filter_map(|c| Some((c.session()?, c.pid?)))
            .collect();
        self.reporter.ask(Report {
            version: self.config.version.clone(),
            incarnation: self.node.incarnation(),
            // The clock begins at one second.
            uptime: Duration::from_micros(self.node.now().0.saturating_sub(1_000_000)),
            tenants,
            stores: self.node.stores().all.iter().map(|s| s.status()).collect(),
            tier: TierStatus::of(self.node.core().tier_counters()),
            pids,
            asker,
        })
    }

    fn tenants(&self) -> impl Iterator<Item = TenantId> + use<> {
        (0..self.config.tenants.len()).map(|n| TenantId(u16::try_from(n).expect("tenants are few")))
    }

    fn metrics(&self) -> Snapshot {
        let mut snapshot = Snapshot {
            version: self.config.version.clone(),
            tenants: self
                .tenants()
                .filter_map(|t| self.node.snapshot(t))
                .map(tenant_metrics)
                .collect(),
            idle: self.node.idle_counts().clone(),
            stores: self.node.stores().all.iter().map(|s| s.status()).collect(),
            tier: TierStatus::of(self.node.core().tier_counters()),
            latency: self.latency,
            refused: self.refused,
            broken: self.broken,
            ..Snapshot::default()
        };
        for connection in self.connections.values() {
            snapshot.greeting += u64::from(matches!(connection.stage, Stage::Greeting { .. }));
            snapshot.held += u64::from(connection.held.is_some());
            snapshot.receive_bytes += connection.decoder.allocated() as u64;
            snapshot.send_bytes += connection.out.allocated() as u64;
        }
        snapshot
    }
}

fn tenant_metrics(snapshot: TenantSnapshot) -> TenantMetrics {
    let view = snapshot.view;
    TenantMetrics {
        counts: snapshot.counts,
        slots: view.slots.into(),
        slot_bytes: view.slot_bytes.into(),
        extents: vec![
            ("pending", view.extents.pending.into()),
            ("failed", view.extents.failed.into()),
            ("held_out", view.extents.held_out.into()),
            ("refilling", view.extents.refilling.into()),
            ("free", view.extents.free.into()),
            ("classed", view.extents.classed.into()),
        ],
        arena_bytes: view.arena.map_or(0, |a| a.bytes),
        page_bytes: view.arena.map_or(0, |a| a.page_bytes),
        adopted: matches!(snapshot.arena, ArenaState::Made { adopted: true, .. }),
        pinned_bytes: view.pinned_bytes,
        ahead_bytes: view.ahead_bytes,
        ahead_reads: view.ahead_reads.into(),
        namespaces: view.namespaces.len() as u64,
        sessions: view.sessions.iter().filter(|s| s.attached).count() as u64,
        sessions_detached: view.sessions.iter().filter(|s| !s.attached).count() as u64,
        name: view.tenant,
    }
}

impl Reactor {
    /// Leaves word beside the tenant's socket that its arena is with clients.
    pub(crate) fn leave_word(&mut self, tenant: TenantId, given: Given) {
        let number = usize::from(tenant.0);
        if self.given[number] != Some(given) {
            given.leave(&self.sockets[number]);
            self.given[number] = Some(given);
        }
    }

    /// Takes that back where nobody is left who could bring the arena.
    pub(crate) fn take_word_back(&self) {
        for (number, socket) in self.sockets.iter().enumerate() {
            let busy = self
                .connections
                .values()
                .any(|c| usize::from(c.tenant.0) == number && c.has_arena)
                || self
                    .ghosts
                    .values()
                    .any(|g| usize::from(g.tenant.0) == number);
            let served = self.node.arena_shape(TenantId(number as u16)).is_some();
            if served && !busy {
                Given::forget(socket);
            }
        }
    }
}
