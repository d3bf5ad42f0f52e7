//! The thread `kvd-status`, which makes status texts, so that the node's thread does not: comparing namespaces and asking
//! the kernel for pages takes time.
//!
//! Overflow: with [`BOUND`] texts waiting, more are refused.

use std::collections::HashMap;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

use kvd_core::SessionId;
use kvd_node::{Status, StoreStatus, TenantSnapshot, TierStatus};
use tokio::sync::oneshot;

use crate::doorbell::Doorbell;
use crate::message::Message;

/// Most texts that wait.
const BOUND: usize = 4;

/// Who asked.
#[derive(Debug)]
pub(crate) enum Asker {
    /// HTTP.
    Http(oneshot::Sender<Vec<u8>>),
    /// A session: its connection, its request.
    Session(u64, u32),
}

/// A text to be made.
#[derive(Debug)]
pub(crate) struct Report {
    pub(crate) version: String,
    pub(crate) incarnation: [u8; 16],
    pub(crate) uptime: Duration,
    /// Snapshots and where those tenants are served.
    pub(crate) tenants: Vec<(TenantSnapshot, String)>,
    pub(crate) stores: Vec<StoreStatus>,
    pub(crate) tier: TierStatus,
    pub(crate) pids: HashMap<SessionId, u32>,
    pub(crate) asker: Asker,
}

/// The thread's queue. The thread ends when this is dropped.
#[derive(Debug)]
pub(crate) struct Reporter(SyncSender<Report>);

impl Reporter {
    /// Starts the thread. Texts for sessions come back through `bell`.
    pub(crate) fn start(bell: Doorbell<Message>) -> std::io::Result<Self> {
        let (sender, receiver) = sync_channel(BOUND);
        std::thread::Builder::new()
            .name("kvd-status".to_owned())
            .stack_size(1 << 20)
            .spawn(move || work(&receiver, &bell))?;
        Ok(Self(sender))
    }

    /// Asks for a text; `false`: too many are waiting.
    pub(crate) fn ask(&self, report: Report) -> bool {
        self.0.try_send(report).is_ok()
    }
}

fn work(reports: &Receiver<Report>, bell: &Doorbell<Message>) {
    while let Ok(report) = reports.recv() {
        let (json, asker) = text(report);
        match asker {
            Asker::Http(answer) => drop(answer.send(json)),
            Asker::Session(key, id) => {
                if !bell.ring(Message::StatusMade { key, id, json }) {
                    return;
                }
            }
        }
    }
}

fn text(report: Report) -> (Vec<u8>, Asker) {
    let Report {
        version,
        incarnation,
        uptime,
        tenants,
        stores,
        tier,
        pids,
        asker,
    } = report;
    let tenants = tenants
        .into_iter()
        .map(|(snapshot, socket)| {
            snapshot.into_status(socket, |session| pids.get(&session).copied())
        })
        .collect();
    let status = Status {
        version,
        incarnation: incarnation.iter().map(|b| format!("{b:02x}")).collect(),
        pid: std::process::id(),
        uptime_s: uptime.as_secs_f64(),
        tenants,
        stores,
        tier,
    };
    (
        serde_json::to_vec(&status).expect("plain data has a text"),
        asker,
    )
}
