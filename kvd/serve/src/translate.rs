//! Between the messages on the wire and what core takes and gives. Decides nothing but whether a message is well formed.
//!
//! Requests are handed on as borrowed slices of the receive buffer: hashes are cast, never copied.

use kvd_core as core;
use kvd_wire::session as wire;
use kvd_wire::session::{reply, request};

/// A message that is not well formed, or too long. Lower case, says what to do.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Malformed(pub(crate) String);

impl<E: std::error::Error> From<E> for Malformed {
    fn from(error: E) -> Self {
        Self(error.to_string())
    }
}

/// Gives `then` the request as core takes it. `most` is the limit on hashes in one request.
///
/// `None` is for messages that are no affair of core's: Hello, Status, Ping, Bye.
pub(crate) fn with_request<R>(
    body: &request::Body,
    most: u32,
    then: impl FnOnce(core::Request<'_>) -> R,
) -> Result<Option<R>, Malformed> {
    let request = match body {
        request::Body::Register(m) => {
            let groups: Vec<_> = m.groups.iter().map(layout).collect();
            return Ok(Some(then(core::Request::Register {
                record: &m.record,
                groups: &groups,
            })));
        }
        request::Body::Lookup(m) => {
            let chains = chains(&m.chains, most)?;
            return Ok(Some(then(core::Request::Lookup {
                namespace: m.namespace,
                chains: &chains,
                lease_ms: m.lease_ms,
                scope: match (m.hit, m.leading) {
                    (true, _) => core::Scope::Hit {
                        drop_last: m.drop_last,
                    },
                    (false, true) => core::Scope::Leading,
                    (false, false) => core::Scope::All,
                },
            })));
        }
        request::Body::Reserve(m) => {
            if m.chains.is_empty() {
                return Err(Malformed(
                    "a Reserve without a chain: send the hashes to store".to_owned(),
                ));
            }
            let chains = chains(&m.chains, most)?;
            return Ok(Some(then(core::Request::Reserve {
                namespace: m.namespace,
                chains: &chains,
            })));
        }
        request::Body::Commit(m) => {
            within(m.slots.len().max(m.generations.len()), most)?;
            core::Request::Commit {
                namespace: m.namespace,
                group: m.group,
                slots: &m.slots,
                generations: &m.generations,
                crcs: &m.crcs,
            }
        }
        request::Body::Abort(m) => {
            within(m.slots.len().max(m.generations.len()), most)?;
            core::Request::Abort {
                slots: &m.slots,
                generations: &m.generations,
            }
        }
        request::Body::Load(m) => {
            let hashes = kvd_wire::hashes(&m.hashes)?;
            within(hashes.len(), most)?;
            core::Request::Load {
                namespace: m.namespace,
                group: m.group,
                hashes,
                deadline_ms: m.deadline_ms,
            }
        }
        request::Body::Release(m) => {
            within(
                m.slots.len().max(m.generations.len()).max(m.corrupt.len()),
                most,
            )?;
            core::Request::Release {
                slots: &m.slots,
                generations: &m.generations,
                corrupt: &m.corrupt,
                lease: m.lease,
            }
        }
        request::Body::Fence(m) => core::Request::Fence {
            past: core::SessionId(m.past_session),
        },
        request::Body::Hello(_)
        | request::Body::Status(_)
        | request::Body::Ping(_)
        | request::Body::Bye(_) => {
            return Ok(None);
        }
    };
    Ok(Some(then(request)))
}

fn within(count: usize, most: u32) -> Result<(), Malformed> {
    if count > most as usize {
        return Err(Malformed(format!(
            "{count} blocks in one request: send at most {most} at a time"
        )));
    }
    Ok(())
}

fn layout(sent: &wire::GroupLayout) -> core::GroupLayout<'_> {
    core::GroupLayout {
        group: sent.group,
        layer_bounds: &sent.layer_bounds,
        head_bounds: &sent.head_bounds,
        copies: sent.copies,
        part: sent.part,
    }
}

/// Chains, of no more hashes than that in all.
fn chains(sent: &[wire::Chain], most: u32) -> Result<Vec<core::Chain<'_>>, Malformed> {
    let chains = sent.iter().map(chain).collect::<Result<Vec<_>, _>>()?;
    let hashes = chains.iter().map(|c| c.hashes.len()).sum();
    within(hashes, most)?;
    Ok(chains)
}

fn chain(sent: &wire::Chain) -> Result<core::Chain<'_>, Malformed> {
    let parent = match sent.parent.len() {
        0 => None,
        _ => Some(core::BlockHash(sent.parent[..].try_into().map_err(
            |_| {
                Malformed(format!(
                    "a parent hash of {} bytes: send 32, or none",
                    sent.parent.len()
                ))
            },
        )?)),
    };
    Ok(core::Chain {
        group: sent.group,
        hashes: kvd_wire::hashes(&sent.hashes)?,
        parent,
    })
}

/// The role that a Hello states.
pub(crate) fn role(sent: i32) -> Option<core::Role> {
    Some(match wire::Role::try_from(sent).ok()? {
        wire::Role::Unspecified => return None,
        wire::Role::Scheduler => core::Role::Scheduler,
        wire::Role::Worker => core::Role::Worker,
        wire::Role::Both => core::Role::Both,
        wire::Role::Observer => core::Role::Observer,
    })
}

/// The shape that an offer states.
pub(crate) fn offered_shape(sent: &wire::ArenaShape) -> Option<core::ArenaShape> {
    Some(core::ArenaShape {
        id: sent.id[..].try_into().ok()?,
        bytes: sent.bytes,
        extent_bytes: sent.extent_bytes,
        page_bytes: sent.page_bytes,
        slots_per_extent: sent.slots_per_extent,
    })
}

fn shape(shape: &core::ArenaShape) -> wire::ArenaShape {
    wire::ArenaShape {
        bytes: shape.bytes,
        extent_bytes: shape.extent_bytes,
        page_bytes: shape.page_bytes,
        id: shape.id.to_vec().into(),
        slots_per_extent: shape.slots_per_extent,
    }
}

/// Core's kinds of error, on the wire.
pub(crate) fn error_kind(kind: core::ErrorKind) -> wire::ErrorKind {
    match kind {
        core::ErrorKind::NotFound => wire::ErrorKind::NotFound,
        core::ErrorKind::Busy => wire::ErrorKind::Busy,
        core::ErrorKind::NoSpace => wire::ErrorKind::NoSpace,
        core::ErrorKind::Corrupt => wire::ErrorKind::Corrupt,
        core::ErrorKind::Unavailable => wire::ErrorKind::Unavailable,
        core::ErrorKind::Indeterminate => wire::ErrorKind::Indeterminate,
        core::ErrorKind::Invalid => wire::ErrorKind::Invalid,
        core::ErrorKind::Unsupported => wire::ErrorKind::Unsupported,
        core::ErrorKind::Internal => wire::ErrorKind::Internal,
    }
}

/// Core's failure, on the wire.
pub(crate) fn failure(failure: core::Failure) -> wire::Failure {
    wire::Failure {
        kind: error_kind(failure.kind).into(),
        text: failure.text,
        ends_session: failure.ends_session,
    }
}

/// Core's answer, on the wire. `fds` is how many descriptors travel with it.
pub(crate) fn reply(reply: core::Reply, fds: u32) -> reply::Body {
    match reply {
        core::Reply::Failure(f) => reply::Body::Failure(failure(f)),
        core::Reply::Registered {
            namespace,
            id,
            arena,
        } => reply::Body::Register(wire::RegisterReply {
            namespace,
            namespace_id: id.0.to_vec().into(),
            arena: Some(shape(&arena)),
            fds,
        }),
        core::Reply::Lookup(r) => reply::Body::Lookup(wire::LookupReply {
            chains: r.chains.into_iter().map(presence).collect(),
            lease: r.lease,
            est_load_us: r.est_load_us,
            hit_tokens: r.hit_tokens,
        }),
        core::Reply::Reserve(r) => reply::Body::Reserve(wire::ReserveReply {
            states: r.states.into_iter().map(reserve_state).collect(),
            slots: r.slots,
            generations: r.generations,
            offsets: r.offsets,
        }),
        core::Reply::Commit(states) => reply::Body::Commit(wire::CommitReply {
            states: states.into_iter().map(commit_state).collect(),
        }),
        core::Reply::Aborted { count } => reply::Body::Abort(wire::AbortReply { aborted: count }),
        core::Reply::Load(r) => reply::Body::Load(wire::LoadReply {
            states: r.states.into_iter().map(load_state).collect(),
            slots: r.slots,
            generations: r.generations,
            offsets: r.offsets,
            cut: r.cut,
            crcs: r.crcs,
            cuts: r.cuts.iter().map(cut).collect(),
        }),
        core::Reply::Released => reply::Body::Release(wire::ReleaseReply {}),
        core::Reply::Fenced => reply::Body::Fence(wire::FenceReply {}),
    }
}

fn cut(cut: &core::Cut) -> wire::Cut {
    wire::Cut {
        layer_bounds: cut.layer_bounds().to_vec(),
        head_bounds: cut.head_bounds().to_vec(),
    }
}

fn presence(presence: core::Presence) -> wire::Presence {
    let place = |place| match place {
        core::Where::Absent => wire::Where::Absent,
        core::Where::Host => wire::Where::Host,
        core::Where::Nvme => wire::Where::Nvme,
        core::Where::Object => wire::Where::Object,
        core::Where::Fetching => wire::Where::Fetching,
        core::Where::Filling => wire::Where::Filling,
    };
    wire::Presence {
        start: presence.start,
        length: presence.length,
        r#where: presence
            .place
            .into_iter()
            .map(|p| place(p).into())
            .collect(),
    }
}

fn reserve_state(state: core::ReserveState) -> i32 {
    match state {
        core::ReserveState::Reserved => wire::ReserveState::Reserved,
        core::ReserveState::Present => wire::ReserveState::Present,
        core::ReserveState::Filling => wire::ReserveState::Filling,
        core::ReserveState::NoSpace => wire::ReserveState::NoSpace,
    }
    .into()
}

fn commit_state(state: core::CommitState) -> i32 {
    match state {
        core::CommitState::Visible => wire::CommitState::Visible,
        core::CommitState::Waiting => wire::CommitState::Waiting,
        core::CommitState::Stale => wire::CommitState::Stale,
    }
    .into()
}

fn load_state(state: core::LoadState) -> i32 {
    match state {
        core::LoadState::Ready => wire::LoadState::Ready,
        core::LoadState::Absent => wire::LoadState::Absent,
        core::LoadState::Failed => wire::LoadState::Failed,
    }
    .into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lookup(hashes: usize) -> request::Body {
        let chains = vec![wire::Chain {
            hashes: vec![1; hashes].into(),
            ..wire::Chain::default()
        }];
        request::Body::Lookup(wire::Lookup {
            chains,
            ..wire::Lookup::default()
        })
    }

    #[test]
    fn hashes_are_counted_and_must_be_whole() {
        let seen = |body: &request::Body| {
            with_request(body, 2, |r| match r {
                core::Request::Lookup { chains, .. } => chains[0].hashes.len(),
                _ => panic!("not a lookup"),
            })
        };
        assert_eq!(seen(&lookup(64)), Ok(Some(2)));
        assert!(
            seen(&lookup(96))
                .expect_err("three")
                .0
                .contains("at most 2")
        );
        assert!(
            seen(&lookup(33))
                .expect_err("half")
                .0
                .contains("32 bytes for each")
        );
    }

    #[test]
    fn what_is_not_cores_is_passed_over() {
        for body in [
            request::Body::Ping(wire::Ping {}),
            request::Body::Bye(wire::Bye {}),
        ] {
            assert_eq!(with_request(&body, 1, |_| ()), Ok(None));
        }
        let no_chain = request::Body::Reserve(wire::Reserve::default());
        assert!(with_request(&no_chain, 1, |_| ()).is_err());
        let short_parent = wire::Chain {
            parent: vec![0; 5].into(),
            ..wire::Chain::default()
        };
        let body = request::Body::Reserve(wire::Reserve {
            chains: vec![short_parent],
            ..wire::Reserve::default()
        });
        assert!(
            with_request(&body, 1, |_| ())
                .expect_err("short")
                .0
                .contains("send 32")
        );
    }
}
