//! What a frame asks, and what is answered: Hello and the few requests that are the server's own; all else is core's.

use kvd_core::{InstanceId, RequestId, Role, SessionId, TenantId};
use kvd_node::{Effect, Offer, Opening};
use kvd_wire::frame::{Frame, check_fields};
use kvd_wire::limits::LABEL_BYTES;
use kvd_wire::session::{self as wire, ErrorKind, Request, reply, request};
use kvd_wire::{VERSION_MAX, VERSION_MIN};
use prost::Message as _;

use crate::connection::{Connection, Stage};
use crate::given::Given;
use crate::peer;
use crate::reactor::Reactor;
use crate::report::Asker;
use crate::translate::{self, Malformed};

/// Why a Hello was refused: kind, text.
type Refusal = (ErrorKind, String);

fn invalid(text: impl Into<String>) -> Refusal {
    (ErrorKind::Invalid, text.into())
}

impl Reactor {
    /// Answers one frame.
    pub(crate) fn frame(&mut self, connection: &mut Connection, frame: Frame) {
        let id = frame.id;
        let begun = self.node.now();
        let request = match check_fields(&frame.body).map(|()| Request::decode(frame.body)) {
            Ok(Ok(request)) => request,
            Ok(Err(_)) => {
                return self.broke(
                    connection,
                    id,
                    "a message that can't be decoded: this is no kvd session",
                );
            }
            Err(error) => return self.broke(connection, id, error.to_string()),
        };
        if !connection.fds.is_empty() && connection.session().is_some() {
            connection.fds.clear();
            return self.broke(
                connection,
                id,
                "file descriptors came that were not asked for: send them with Hello only",
            );
        }
        let kind = request.body.as_ref().map(kind);
        match (connection.stage, request.body) {
            (Stage::Greeting { .. }, Some(request::Body::Hello(hello))) => {
                self.hello(connection, id, hello)
            }
            (Stage::Greeting { .. }, _) => self.broke(
                connection,
                id,
                "the first message is not a Hello: say Hello first",
            ),
            (Stage::Open { session, role }, Some(body)) => {
                self.request(connection, session, role, id, body)
            }
            (Stage::Open { .. }, None) => {
                let text = "this daemon does not know the message: ask for what its version has";
                connection.fail(id, ErrorKind::Unsupported, text, false);
            }
            (Stage::Ending { .. }, _) => {}
        }
        if let Some(kind) = kind {
            self.latency[kind].observe(self.node.now().0 - begun.0);
        }
    }

    fn hello(&mut self, connection: &mut Connection, id: u32, hello: wire::Hello) {
        match self.introduce(connection, &hello) {
            Ok((version, adopted)) => {
                let session = connection
                    .session()
                    .expect("an introduced connection is a session");
                let limits = self.config.limits;
                let reply = wire::HelloReply {
                    version,
                    session: session.0,
                    incarnation: self.node.incarnation().to_vec().into(),
                    tenant: self.config.tenants[usize::from(connection.tenant.0)]
                        .name
                        .clone(),
                    daemon_version: self.config.version.clone(),
                    limits: Some(wire::Limits {
                        frame_bytes: limits.frame_bytes,
                        hashes: limits.hashes,
                        namespaces: limits.namespaces,
                        in_flight: limits.in_flight,
                    }),
                    offer_adopted: adopted,
                };
                connection.reply(id, reply::Body::Hello(reply));
            }
            Err((kind, text)) => {
                tracing::warn!(reason = text, "a session was refused");
                connection.fail(id, kind, text, true);
                self.end(connection);
            }
        }
    }

    /// Checks a Hello and makes the session. Says which version is spoken and whether an offered arena was taken.
    fn introduce(
        &mut self,
        connection: &mut Connection,
        hello: &wire::Hello,
    ) -> Result<(u32, bool), Refusal> {
        let theirs = (hello.version_min, hello.version_max);
        let Some(version) = kvd_wire::negotiate((VERSION_MIN, VERSION_MAX), theirs) else {
            let text = format!(
                "protocol versions {} to {} are not spoken here: use a client that speaks {VERSION_MIN} to {VERSION_MAX}",
                theirs.0, theirs.1
            );
            return Err((ErrorKind::Unsupported, text));
        };
        let instance: [u8; 16] = hello.instance[..].try_into().map_err(|_| {
            invalid(format!(
                "an instance of {} bytes: send 16",
                hello.instance.len()
            ))
        })?;
        let role = translate::role(hello.role)
            .ok_or_else(|| invalid("an unknown role: send one of those in the protocol"))?;
        if hello.label.len() > LABEL_BYTES {
            return Err(invalid(format!(
                "a label of {} bytes: send at most {LABEL_BYTES}",
                hello.label.len()
            )));
        }
        let expected = usize::from(hello.has_pidfd) + 2 * usize::from(hello.offer.is_some());
        if connection.fds.len() != expected {
            let came = connection.fds.len();
            connection.fds.clear();
            return Err(invalid(format!(
                "{came} file descriptors came and Hello announces {expected}: send those it announces"
            )));
        }
        let mut fds = std::mem::take(&mut connection.fds).into_iter();
        let sent = if hello.has_pidfd { fds.next() } else { None };
        if sent
            .as_ref()
            .is_some_and(|pidfd| peer::pid_behind(pidfd).is_none())
        {
            return Err(invalid(
                "the descriptor that Hello calls a pidfd is none: send a pidfd or none",
            ));
        }
        connection.pidfd = peer::pidfd_of_peer(&connection.stream).or(sent);
        let mut adopted = false;
        if let (Some(offer), Some(arena), Some(generations)) =
            (&hello.offer, fds.next(), fds.next())
            && role != Role::Observer
        {
            let shape = offer.shape.as_ref().and_then(translate::offered_shape);
            let shape = shape.ok_or_else(|| {
                invalid("an offered arena without a shape: send the one it was given with")
            })?;
            let offer = Offer {
                arena,
                generations,
                shape,
            };
            adopted = self.consider(connection.tenant, offer);
        }
        let opening = Opening {
            tenant: connection.tenant,
            instance: InstanceId(instance),
            role,
            rank: hello.rank,
            world: hello.world,
            label: &hello.label,
            past: (hello.past_session != 0).then_some(SessionId(hello.past_session)),
        };
        let session = self.node.open(&opening);
        self.admitted(session)?;
        connection.stage = Stage::Open { session, role };
        self.by_session.insert(session, connection.key);
        connection.pid = connection
            .pidfd
            .as_ref()
            .and_then(peer::pid_behind)
            .filter(|pid| *pid > 0);
        self.watch_process(connection);
        if adopted {
            self.care_now();
        }
        Ok((version, adopted))
    }

    /// Takes an offered arena over if it is what the former daemon gave to this tenant's clients and none is in use yet.
    /// Says whether the offered arena is this daemon's now.
    fn consider(&mut self, tenant: TenantId, offer: Offer) -> bool {
        let offered = Given::of(offer.shape.id, &offer.arena, &offer.generations).ok();
        let given = self.given[usize::from(tenant.0)];
        let (Some(offered), Some(given)) = (offered, given) else {
            tracing::warn!("an arena was offered, but no former daemon of this tenant gave one");
            return false;
        };
        let own = self.node.arena_shape(tenant).map(|shape| shape.id);
        if (offered.id, offered.inode) == (given.id, given.inode) && own == Some(offered.id) {
            // Another process has brought it before.
            return true;
        }
        if offered != given {
            tracing::warn!("an arena was offered that this tenant's last daemon did not give");
            return false;
        }
        self.node.offer(tenant, offer)
    }

    /// Whether core has taken a new session. What it has for others is delivered on the way.
    fn admitted(&mut self, new: SessionId) -> Result<(), Refusal> {
        let mut refusal = None;
        while let Some(effect) = self.node.take_effect() {
            match effect {
                Effect::End { session, failure } if session == new => {
                    refusal = Some((translate::error_kind(failure.kind), failure.text));
                }
                other => self.route(other, None),
            }
        }
        refusal.map_or(Ok(()), Err)
    }

    fn request(
        &mut self,
        connection: &mut Connection,
        session: SessionId,
        role: Role,
        id: u32,
        body: request::Body,
    ) {
        match body {
            request::Body::Hello(_) => {
                self.broke(connection, id, "a second Hello: open another connection")
            }
            request::Body::Ping(_) => connection.reply(id, reply::Body::Pong(wire::PongReply {})),
            request::Body::Status(_) => {
                connection.in_flight += 1;
                if !self.report(Asker::Session(connection.key, id), Some(connection)) {
                    connection.in_flight -= 1;
                    connection.fail(
                        id,
                        ErrorKind::Busy,
                        "many ask for the status: ask again",
                        false,
                    );
                }
            }
            request::Body::Bye(_) => {
                self.by_session.remove(&session);
                self.node.closed(connection.tenant, session);
                connection.reply(id, reply::Body::Bye(wire::ByeReply {}));
                connection.stage = Stage::Ending {
                    deadline: self.node.now(),
                };
                self.end(connection);
                self.deliver(None);
            }
            request::Body::Register(register) => {
                if role != Role::Observer && self.node.registrations_wait(connection.tenant) {
                    connection.held = Some((id, register));
                    self.needs_care();
                } else {
                    self.core(connection, session, id, &request::Body::Register(register));
                }
            }
            body => self.core(connection, session, id, &body),
        }
    }

    /// The registration that was held is looked at again.
    pub(crate) fn release_held(&mut self, connection: &mut Connection) {
        if let (Some((id, register)), Some(session)) =
            (connection.held.take(), connection.session())
        {
            self.core(connection, session, id, &request::Body::Register(register));
        }
    }

    fn core(
        &mut self,
        connection: &mut Connection,
        session: SessionId,
        id: u32,
        body: &request::Body,
    ) {
        let most = self.config.limits.hashes;
        let (node, tenant) = (&mut self.node, connection.tenant);
        let asked = translate::with_request(body, most, |request| {
            node.request(tenant, session, RequestId(id), request);
        });
        match asked {
            Ok(_) => {
                connection.in_flight += 1;
                self.deliver(Some(connection));
            }
            Err(Malformed(text)) => connection.fail(id, ErrorKind::Invalid, text, false),
        }
    }

    /// Tells a session what core has for it.
    pub(crate) fn tell(&mut self, connection: &mut Connection, effect: Effect) {
        match effect {
            Effect::Reply { id, reply, .. } => {
                connection.in_flight = connection.in_flight.saturating_sub(1);
                let fds = self.arena_for(connection, &reply);
                let body = translate::reply(*reply, fds);
                connection.reply_within(id.0, body, self.config.limits.frame_bytes);
            }
            Effect::End { failure, .. } => {
                tracing::warn!(reason = failure.text, "a session was ended");
                let failure = wire::Failure {
                    ends_session: true,
                    ..translate::failure(failure)
                };
                connection.reply(0, reply::Body::Failure(failure));
                self.end(connection);
            }
        }
    }

    /// Attaches the arena's descriptors to the first registration's reply. Says how many travel with it.
    fn arena_for(&mut self, connection: &mut Connection, reply: &kvd_core::Reply) -> u32 {
        if connection.has_arena || !matches!(reply, kvd_core::Reply::Registered { .. }) {
            return 0;
        }
        match self.node.arenas().descriptors(connection.tenant) {
            Ok(fds) => {
                let id = self.node.arena_shape(connection.tenant).map(|s| s.id);
                if let Some(Ok(given)) = id.map(|id| Given::of(id, &fds.arena, &fds.generations)) {
                    self.leave_word(connection.tenant, given);
                }
                connection.has_arena = true;
                connection.out.attach(vec![fds.arena, fds.generations]);
                2
            }
            Err(error) => {
                tracing::error!(%error, "a session could not be given the arena");
                0
            }
        }
    }
}

/// The place of a request's histogram.
fn kind(body: &request::Body) -> usize {
    match body {
        request::Body::Hello(_) => 0,
        request::Body::Register(_) => 1,
        request::Body::Lookup(_) => 2,
        request::Body::Reserve(_) => 3,
        request::Body::Commit(_) => 4,
        request::Body::Abort(_) => 5,
        request::Body::Load(_) => 6,
        request::Body::Release(_) => 7,
        request::Body::Fence(_) => 8,
        request::Body::Status(_) => 9,
        request::Body::Ping(_) => 10,
        request::Body::Bye(_) => 11,
    }
}
