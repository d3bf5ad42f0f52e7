//! How connections begin and end: accepted, ended with a reason, closed, watched until their process is gone, drained.

use std::io;
use std::os::unix::net::UnixStream;

use kvd_core::{Now, OBSERVERS, SessionId, TenantId};
use kvd_wire::session::ErrorKind;
use rustix::event::epoll;

use super::{CARE_US, CONNECTION, Ghost, LISTENER, PROCESS, Reactor};
use crate::connection::{Connection, Stage};

/// How long a connection that is ending may take to read what it was told.
const ENDING_US: u64 = 1_000_000;
/// The kernel's buffer for replies of a session, in bytes.
const SEND_BUFFER_BYTES: usize = 1 << 20;

impl Reactor {
    pub(super) fn listen(&self, number: usize, what: epoll::EventFlags) {
        let data = epoll::EventData::new_u64(LISTENER | number as u64);
        if let Err(error) = epoll::modify(&self.epoll, &self.listeners[number], data, what) {
            tracing::error!(%error, "a socket can no longer be listened on");
        }
    }

    pub(super) fn accept(&mut self, number: usize) {
        let tenant = TenantId(u16::try_from(number).expect("tenants are few"));
        loop {
            match self.listeners[number].accept() {
                Ok(None) => return,
                Ok(Some(stream)) => self.greet(tenant, stream),
                Err(error) => {
                    tracing::warn!(%error, "a connection could not be accepted; trying again in a while");
                    self.listen(number, epoll::EventFlags::empty());
                    self.accept_again = Some(Now(self.node.now().0 + CARE_US));
                    return;
                }
            }
        }
    }

    fn greet(&mut self, tenant: TenantId, stream: UnixStream) {
        let key = self.next_key;
        self.next_key += 1;
        let now = self.node.now();
        let deadline =
            Now(now.0 + u64::try_from(self.config.handshake.as_micros()).unwrap_or(u64::MAX / 2));
        let mut connection = Box::new(Connection::new(
            key,
            tenant,
            stream,
            self.config.limits.frame_bytes,
            deadline,
        ));
        // What kind of session it will be is not known yet: core counts those that look apart.
        let limit = self.config.limits.sessions.saturating_add(OBSERVERS) as usize;
        if self
            .connections
            .values()
            .filter(|c| c.tenant == tenant)
            .count()
            >= limit
        {
            self.refused += 1;
            connection.fail(
                0,
                ErrorKind::Busy,
                format!("there are {limit} connections already: close one, or raise max_sessions"),
                true,
            );
            // What a new socket does not take at once is lost with it.
            let _ = connection.out.send(&connection.stream);
            return;
        }
        // Large replies then go in fewer pieces; the system may give less.
        let _ = rustix::net::sockopt::set_socket_send_buffer_size(
            &connection.stream,
            SEND_BUFFER_BYTES,
        );
        let data = epoll::EventData::new_u64(CONNECTION | key);
        if let Err(error) = epoll::add(&self.epoll, &connection.stream, data, epoll::EventFlags::IN)
        {
            tracing::warn!(%error, "a connection could not be served");
            return;
        }
        self.needs_care();
        self.connections.insert(key, connection);
    }

    /// A peer that broke the protocol: it is told why, and its session ends.
    pub(crate) fn broke(&mut self, connection: &mut Connection, id: u32, why: impl Into<String>) {
        let why = why.into();
        tracing::warn!(reason = why, "a session broke the protocol and was ended");
        self.broken += 1;
        connection.fail(id, ErrorKind::Invalid, why, true);
        self.end(connection);
    }

    /// From now on the connection only sends what it has. Its session, if it is one, is detached when it closes.
    pub(crate) fn end(&mut self, connection: &mut Connection) {
        if let Some(session) = connection.session() {
            self.detach(connection, session);
        }
        connection.held = None;
        connection.stage = Stage::Ending {
            deadline: Now(self.node.now().0 + ENDING_US),
        };
        self.needs_care();
    }

    /// The session's socket is of no more use. Its process may live and copy: it is watched until it is gone.
    fn detach(&mut self, connection: &mut Connection, session: SessionId) {
        self.by_session.remove(&session);
        self.node.detached(connection.tenant, session);
        if self.node.knows(session)
            && let Some(pidfd) = connection.pidfd.take()
        {
            let ghost = Ghost {
                tenant: connection.tenant,
                session,
                _pidfd: pidfd,
            };
            self.ghosts.insert(connection.key, ghost);
            self.needs_care();
        }
        self.deliver(Some(connection));
    }

    /// Closes the socket.
    pub(super) fn close(&mut self, mut connection: Connection) {
        self.buffer_bytes -= connection.counted;
        if let Some(session) = connection.session() {
            self.detach(&mut connection, session);
        }
    }

    /// Watches the process of a connection, if it is known.
    pub(crate) fn watch_process(&self, connection: &Connection) {
        if let Some(pidfd) = &connection.pidfd {
            let data = epoll::EventData::new_u64(PROCESS | connection.key);
            if let Err(error) = epoll::add(&self.epoll, pidfd, data, epoll::EventFlags::IN) {
                tracing::warn!(%error, "a process can't be watched; its slots are kept if it dies in the middle");
            }
        }
    }

    pub(super) fn process_gone(&mut self, key: u64) {
        if let Some(ghost) = self.ghosts.remove(&key) {
            self.node.gone(ghost.tenant, ghost.session);
            return self.deliver(None);
        }
        let Some(mut connection) = self.connections.remove(&key) else {
            return;
        };
        // What it said before it died still counts.
        self.work_out(&mut connection);
        if let Some(session) = connection.session() {
            self.by_session.remove(&session);
            self.node.gone(connection.tenant, session);
            connection.stage = Stage::Ending {
                deadline: self.node.now(),
            };
            self.deliver(Some(&mut connection));
        } else if let Some(ghost) = self.ghosts.remove(&key) {
            self.node.gone(ghost.tenant, ghost.session);
            self.deliver(None);
        }
        self.close(*connection);
    }

    /// Stops accepting, answers what has come, and closes.
    pub(super) fn drain(&mut self, events: &mut Vec<epoll::Event>) -> io::Result<()> {
        self.listeners.clear();
        let end =
            Now(self.node.now().0 + u64::try_from(self.config.drain.as_micros()).unwrap_or(0));
        let keys: Vec<u64> = self.connections.keys().copied().collect();
        for key in keys {
            let Some(mut connection) = self.connections.remove(&key) else {
                continue;
            };
            if let Some((id, _)) = connection.held.take() {
                connection.fail(
                    id,
                    ErrorKind::Unavailable,
                    "the daemon is stopping: connect again later",
                    false,
                );
            }
            self.work_out(&mut connection);
            self.end(&mut connection);
            connection.stage = Stage::Ending { deadline: end };
            self.keep(connection);
        }
        while !self.connections.is_empty() && self.node.now() < end {
            self.turn(events, Some(end))?;
        }
        if !self.connections.is_empty() {
            tracing::warn!(
                sessions = self.connections.len(),
                "some sessions did not take their answers in time"
            );
        }
        Ok(())
    }
}
