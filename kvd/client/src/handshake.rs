//! Who this process is, and the Hello that says so.

use std::os::fd::OwnedFd;

use kvd_arena::{ArenaShape, ArenaView};
use kvd_wire::session::{self as wire, ArenaOffer, Hello, HelloReply, Role, request};
use kvd_wire::{VERSION_MAX, VERSION_MIN, limits};
use rustix::process::PidfdFlags;

use crate::Error;

/// Who this process is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// The same for all processes of one engine instance.
    pub instance: [u8; 16],
    /// What it does.
    pub role: Role,
    /// Its rank, from 0.
    pub rank: u32,
    /// How many ranks there are.
    pub world: u32,
    /// For people; cut to 256 bytes.
    pub label: String,
}

impl Identity {
    /// A process by itself that stores and loads: a script, a bench. The instance is random.
    pub fn script(label: &str) -> Self {
        Self {
            instance: random(),
            role: Role::Both,
            rank: 0,
            world: 1,
            label: label.to_owned(),
        }
    }

    /// A process that only asks for the status.
    pub fn observer(label: &str) -> Self {
        Self {
            role: Role::Observer,
            ..Self::script(label)
        }
    }
}

fn random() -> [u8; 16] {
    let mut out = [0; 16];
    let flags = rustix::rand::GetRandomFlags::empty();
    rustix::rand::getrandom(&mut out, flags).expect("the kernel has random bytes");
    out
}

/// What a process that was connected before brings along.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Past<'a> {
    pub(crate) session: u64,
    pub(crate) arena: Option<&'a ArenaView>,
}

/// The Hello and the descriptors that go with it.
pub(crate) fn hello(
    identity: &Identity,
    past: Past<'_>,
) -> Result<(request::Body, Vec<OwnedFd>), Error> {
    let mut fds = Vec::new();
    let me = rustix::process::getpid();
    // Before Linux 5.3 there is none; the daemon then has only what the socket says.
    let pidfd = rustix::process::pidfd_open(me, PidfdFlags::empty()).ok();
    let has_pidfd = pidfd.is_some();
    fds.extend(pidfd);
    let mut offer = None;
    if let Some(view) = past.arena {
        for fd in [view.fd(), view.generation_fd()] {
            let fd = rustix::io::fcntl_dupfd_cloexec(fd, 0)
                .map_err(|e| Error::io("cannot offer the arena", e))?;
            fds.push(fd);
        }
        offer = Some(ArenaOffer {
            shape: Some(to_wire(view.shape())),
        });
    }
    let mut label = identity.label.clone();
    label.truncate(label.floor_char_boundary(limits::LABEL_BYTES));
    let body = request::Body::Hello(Hello {
        version_min: VERSION_MIN,
        version_max: VERSION_MAX,
        instance: identity.instance.to_vec().into(),
        role: identity.role.into(),
        rank: identity.rank,
        world: identity.world,
        label,
        has_pidfd,
        offer,
        past_session: past.session,
    });
    Ok((body, fds))
}

/// Refuses an answer that this build cannot live with.
pub(crate) fn check(reply: &HelloReply) -> Result<(), Error> {
    if !(VERSION_MIN..=VERSION_MAX).contains(&reply.version) {
        return Err(Error::protocol(format!(
            "the daemon speaks version {} and this client {VERSION_MIN} to {VERSION_MAX}: use matching builds",
            reply.version
        )));
    }
    Ok(())
}

/// The limits that hold from now on; what the daemon left out is what both assume anyway.
pub(crate) fn limits_of(reply: &HelloReply) -> wire::Limits {
    let given = reply.limits.unwrap_or_default();
    let or = |value: u32, default: u32| if value == 0 { default } else { value };
    wire::Limits {
        frame_bytes: or(given.frame_bytes, limits::FRAME_BYTES),
        hashes: or(given.hashes, limits::HASHES),
        namespaces: or(given.namespaces, limits::NAMESPACES),
        in_flight: or(given.in_flight, limits::IN_FLIGHT),
    }
}

fn to_wire(shape: &ArenaShape) -> wire::ArenaShape {
    wire::ArenaShape {
        bytes: shape.bytes,
        extent_bytes: shape.extent_bytes,
        page_bytes: shape.page_bytes,
        id: shape.id.to_vec().into(),
        slots_per_extent: shape.slots_per_extent,
    }
}

pub(crate) fn from_wire(shape: Option<wire::ArenaShape>) -> Result<ArenaShape, Error> {
    let shape = shape.ok_or_else(|| Error::protocol("the daemon gave an arena without shape"))?;
    let id = shape.id[..]
        .try_into()
        .map_err(|_| Error::protocol("the daemon gave an arena without id"))?;
    Ok(ArenaShape {
        id,
        bytes: shape.bytes,
        extent_bytes: shape.extent_bytes,
        page_bytes: shape.page_bytes,
        slots_per_extent: shape.slots_per_extent,
    })
}
