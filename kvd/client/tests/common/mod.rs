//! A daemon for tests: it speaks the wire over a real socket and keeps blocks in a real arena, as simply as can be, and it
//! can be told to hold replies back, to freeze, and to die.
//!
//! Deliberately absent: eviction, leases, deadlines, several parts. The real daemon is tested elsewhere.
#![allow(
    dead_code,
    clippy::unwrap_used,
    reason = "test support; each test file uses a part of it"
)]

use std::collections::HashMap;
use std::io::{IoSlice, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use kvd_arena::{Arena, HugePages};
use kvd_wire::session as wire;
use kvd_wire::session::{reply, request};
use prost::Message;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};

/// For what must happen; never reached when all is well.
pub(crate) const LONG: Duration = Duration::from_secs(20);
const EXTENT: u64 = 64 << 10;

/// How a daemon behaves.
#[derive(Clone)]
pub(crate) struct Script {
    pub(crate) adopt: bool,
    pub(crate) in_flight: u32,
    pub(crate) slot_bytes: u64,
    /// Kinds of requests (numbers of `Request.body`) whose replies are held back.
    pub(crate) hold: Vec<u32>,
    /// Sent with every reply, unasked.
    pub(crate) extra_fds: bool,
}

impl Default for Script {
    fn default() -> Self {
        Self {
            adopt: true,
            in_flight: 256,
            slot_bytes: 8192,
            hold: Vec::new(),
            extra_fds: false,
        }
    }
}

pub(crate) const HELLO: u32 = 1;
pub(crate) const LOOKUP: u32 = 3;
pub(crate) const RESERVE: u32 = 4;
pub(crate) const ABORT: u32 = 6;
pub(crate) const LOAD: u32 = 7;
pub(crate) const RELEASE: u32 = 8;
pub(crate) const FENCE: u32 = 9;
pub(crate) const PING: u32 = 11;
pub(crate) const BYE: u32 = 12;

pub(crate) fn kind(body: &request::Body) -> u32 {
    use request::Body;
    match body {
        Body::Hello(_) => HELLO,
        Body::Register(_) => 2,
        Body::Lookup(_) => LOOKUP,
        Body::Reserve(_) => RESERVE,
        Body::Commit(_) => 5,
        Body::Abort(_) => ABORT,
        Body::Load(_) => LOAD,
        Body::Release(_) => RELEASE,
        Body::Fence(_) => FENCE,
        Body::Status(_) => 10,
        Body::Ping(_) => PING,
        Body::Bye(_) => BYE,
    }
}

pub(crate) struct Block {
    pub(crate) slot: u32,
    pub(crate) generation: u64,
    pub(crate) crcs: Vec<u64>,
    pub(crate) committed: bool,
}

#[derive(Default)]
pub(crate) struct Blocks {
    pub(crate) by_hash: HashMap<Vec<u8>, Block>,
    pub(crate) next: u64,
}

struct Inner {
    script: Mutex<Script>,
    arena: Mutex<Option<Arc<Arena>>>,
    blocks: Mutex<Blocks>,
    frozen: Mutex<bool>,
    thaw: Condvar,
    held: Mutex<Vec<(UnixStream, Vec<u8>)>>,
    streams: Mutex<Vec<UnixStream>>,
    seen: SyncSender<request::Body>,
    sessions: Mutex<u64>,
}

pub(crate) struct FakeDaemon {
    inner: Arc<Inner>,
    path: PathBuf,
    seen: Receiver<request::Body>,
    listener: UnixListener,
    threads: Arc<Mutex<Vec<std::thread::JoinHandle<()>>>>,
}

impl FakeDaemon {
    pub(crate) fn start(path: &Path, script: Script) -> Self {
        Self::start_after(path, script, 0)
    }

    /// Session tokens begin above `sessions`.
    pub(crate) fn start_after(path: &Path, script: Script, sessions: u64) -> Self {
        let _ = std::fs::remove_file(path);
        let listener = UnixListener::bind(path).expect("bound");
        let (sender, seen) = sync_channel(100_000);
        let inner = Arc::new(Inner {
            script: Mutex::new(script),
            arena: Mutex::new(None),
            blocks: Mutex::default(),
            frozen: Mutex::new(false),
            thaw: Condvar::new(),
            held: Mutex::default(),
            streams: Mutex::default(),
            seen: sender,
            sessions: Mutex::new(sessions),
        });
        let threads = Arc::new(Mutex::new(Vec::new()));
        let (accepting, shared, all) = (
            listener.try_clone().expect("dup"),
            Arc::clone(&inner),
            Arc::clone(&threads),
        );
        let thread = spawn(move || {
            while let Ok((stream, _)) = accepting.accept() {
                let kept = stream.try_clone().expect("dup");
                shared.streams.lock().unwrap().push(kept);
                let inner = Arc::clone(&shared);
                let thread = spawn(move || serve(&inner, stream));
                all.lock().unwrap().push(thread);
            }
        });
        threads.lock().unwrap().push(thread);
        Self {
            inner,
            path: path.to_owned(),
            seen,
            listener,
            threads,
        }
    }

    pub(crate) fn script(&self, change: impl FnOnce(&mut Script)) {
        change(&mut self.inner.script.lock().unwrap());
    }

    /// Stops reading, as under SIGSTOP.
    pub(crate) fn freeze(&self) {
        *self.inner.frozen.lock().unwrap() = true;
    }

    pub(crate) fn thaw(&self) {
        *self.inner.frozen.lock().unwrap() = false;
        self.inner.thaw.notify_all();
    }

    /// Sends the replies that were held back, and holds no more.
    pub(crate) fn let_go(&self) {
        self.script(|s| s.hold.clear());
        for (mut stream, frame) in self.inner.held.lock().unwrap().drain(..) {
            let _ = stream.write_all(&frame);
        }
    }

    pub(crate) fn held(&self) -> usize {
        self.inner.held.lock().unwrap().len()
    }

    /// The next request of this kind; skips others.
    pub(crate) fn expect(&self, wanted: u32) -> request::Body {
        loop {
            let body = self.seen.recv_timeout(LONG).expect("the request comes");
            if kind(&body) == wanted {
                return body;
            }
        }
    }

    /// What has come so far.
    pub(crate) fn seen(&self) -> Vec<request::Body> {
        self.seen.try_iter().collect()
    }

    pub(crate) fn blocks(&self, f: impl FnOnce(&mut Blocks)) {
        f(&mut self.inner.blocks.lock().unwrap());
    }

    pub(crate) fn arena(&self) -> Arc<Arena> {
        arena_of(&self.inner)
    }

    pub(crate) fn sessions(&self) -> u64 {
        *self.inner.sessions.lock().unwrap()
    }

    /// Closes every session, and goes on listening.
    pub(crate) fn hang_up(&self) {
        for stream in self.inner.streams.lock().unwrap().drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// Dies as under SIGKILL.
    pub(crate) fn kill(self) {}
}

impl Drop for FakeDaemon {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
        let _ = rustix::net::shutdown(&self.listener, rustix::net::Shutdown::Both);
        self.thaw();
        loop {
            self.hang_up();
            let Some(thread) = self.threads.lock().unwrap().pop() else {
                break;
            };
            let _ = thread.join();
        }
    }
}

pub(crate) fn spawn(f: impl FnOnce() + Send + 'static) -> std::thread::JoinHandle<()> {
    std::thread::Builder::new()
        .name("fake-daemon".into())
        .spawn(f)
        .expect("a thread")
}

fn arena_of(inner: &Inner) -> Arc<Arena> {
    let mut arena = inner.arena.lock().unwrap();
    let arena = arena.get_or_insert_with(|| {
        Arc::new(Arena::create(16 * EXTENT, Some(EXTENT), HugePages::Off).expect("an arena"))
    });
    Arc::clone(arena)
}

fn serve(inner: &Inner, stream: UnixStream) {
    let mut decoder = kvd_wire::frame::Decoder::new(16 << 20);
    let mut fds = Vec::new();
    let mut arena_sent = false;
    loop {
        let frozen = inner.frozen.lock().unwrap();
        drop(inner.thaw.wait_while(frozen, |f| *f).unwrap());
        while let Some(frame) = decoder.next().expect("well framed") {
            let message = wire::Request::decode(frame.body).expect("a request");
            let body = message.body.expect("a known request");
            let _ = inner.seen.try_send(body.clone());
            let number = kind(&body);
            let is_register = matches!(body, request::Body::Register(_));
            let mut reply = answer(inner, body, &mut fds);
            let mut out_fds = Vec::new();
            if is_register {
                let arena = arena_of(inner);
                if let reply::Body::Register(r) = &mut reply
                    && !arena_sent
                {
                    arena_sent = true;
                    r.fds = 2;
                    out_fds = vec![dup(arena.fd()), dup(arena.generation_fd())];
                }
            } else if inner.script.lock().unwrap().extra_fds {
                let arena = arena_of(inner);
                out_fds = (0..8).map(|_| dup(arena.fd())).collect();
            }
            let mut bytes = Vec::new();
            kvd_wire::frame::encode(frame.id, &kvd_wire::reply(reply), &mut bytes);
            if inner.script.lock().unwrap().hold.contains(&number) {
                let kept = stream.try_clone().expect("dup");
                inner.held.lock().unwrap().push((kept, bytes));
            } else if send(&stream, &bytes, &out_fds).is_err() {
                return;
            }
        }
        match receive(&stream, decoder.space(), &mut fds) {
            Ok(n) if n > 0 => decoder.filled(n),
            _ => return,
        }
    }
}

fn dup(fd: BorrowedFd<'_>) -> OwnedFd {
    fd.try_clone_to_owned().expect("dup")
}

fn send(mut stream: &UnixStream, bytes: &[u8], fds: &[OwnedFd]) -> std::io::Result<()> {
    let mut sent = 0;
    if !fds.is_empty() {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
        let iov = [IoSlice::new(bytes)];
        sent = rustix::net::sendmsg(stream, &iov, &mut control, SendFlags::NOSIGNAL)?;
    }
    stream.write_all(&bytes[sent..])
}

fn receive(
    stream: &UnixStream,
    space: &mut [u8],
    fds: &mut Vec<OwnedFd>,
) -> std::io::Result<usize> {
    let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(3))];
    let mut control = RecvAncillaryBuffer::new(&mut room);
    let mut iov = [IoSliceMut::new(space)];
    let got = rustix::net::recvmsg(stream, &mut iov, &mut control, RecvFlags::CMSG_CLOEXEC)?;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            fds.extend(received);
        }
    }
    Ok(got.bytes)
}

fn answer(inner: &Inner, body: request::Body, fds: &mut Vec<OwnedFd>) -> reply::Body {
    match body {
        request::Body::Hello(hello) => reply::Body::Hello(greet(inner, &hello, fds)),
        request::Body::Register(_) => {
            let arena = arena_of(inner);
            let shape = arena.shape();
            reply::Body::Register(wire::RegisterReply {
                namespace: 1,
                namespace_id: vec![3; 32].into(),
                arena: Some(wire::ArenaShape {
                    bytes: shape.bytes,
                    extent_bytes: shape.extent_bytes,
                    page_bytes: shape.page_bytes,
                    id: shape.id.to_vec().into(),
                    slots_per_extent: shape.slots_per_extent,
                }),
                fds: 0,
            })
        }
        request::Body::Lookup(lookup) => {
            let chains = lookup.chains.iter().map(|c| wire::Presence {
                start: vec![0],
                length: vec![(c.hashes.len() / 32) as u32],
                r#where: vec![1],
            });
            reply::Body::Lookup(wire::LookupReply {
                chains: chains.collect(),
                lease: u64::from(lookup.lease_ms > 0) * 99,
                est_load_us: 0,
                hit_tokens: 0,
            })
        }
        request::Body::Reserve(reserve) => reply::Body::Reserve(take_slots(inner, reserve)),
        request::Body::Commit(commit) => reply::Body::Commit(finish(inner, &commit)),
        request::Body::Abort(abort) => reply::Body::Abort(wire::AbortReply {
            aborted: abort.slots.len() as u32,
        }),
        request::Body::Load(load) => reply::Body::Load(lend(inner, &load)),
        request::Body::Release(_) => reply::Body::Release(wire::ReleaseReply {}),
        request::Body::Fence(_) => reply::Body::Fence(wire::FenceReply {}),
        request::Body::Status(_) => reply::Body::Status(wire::StatusReply { json: "{}".into() }),
        request::Body::Ping(_) => reply::Body::Pong(wire::PongReply {}),
        request::Body::Bye(_) => reply::Body::Bye(wire::ByeReply {}),
    }
}

fn greet(inner: &Inner, hello: &wire::Hello, fds: &mut Vec<OwnedFd>) -> wire::HelloReply {
    if hello.has_pidfd {
        drop(fds.remove(0));
    }
    let script = inner.script.lock().unwrap().clone();
    let mut adopted = false;
    if let Some(offer) = &hello.offer {
        let (memory, table) = (fds.remove(0), fds.remove(0));
        let shape = offer.shape.clone().expect("a shape");
        let shape = kvd_arena::ArenaShape {
            id: shape.id[..].try_into().expect("an id"),
            bytes: shape.bytes,
            extent_bytes: shape.extent_bytes,
            page_bytes: shape.page_bytes,
            slots_per_extent: shape.slots_per_extent,
        };
        let mut arena = inner.arena.lock().unwrap();
        if script.adopt && arena.is_none() {
            let adoption = Arena::adopt(memory, table, &shape, u64::MAX).expect("a good offer");
            *arena = Some(Arc::new(adoption.arena));
            adopted = true;
        }
    }
    assert!(fds.is_empty(), "no descriptor is left over");
    let mut sessions = inner.sessions.lock().unwrap();
    *sessions += 1;
    wire::HelloReply {
        version: 1,
        session: *sessions,
        incarnation: vec![1; 16].into(),
        tenant: "default".into(),
        daemon_version: "fake".into(),
        limits: Some(wire::Limits {
            frame_bytes: 4 << 20,
            hashes: 65536,
            namespaces: 64,
            in_flight: script.in_flight,
        }),
        offer_adopted: adopted,
    }
}

fn take_slots(inner: &Inner, reserve: wire::Reserve) -> wire::ReserveReply {
    let arena = arena_of(inner);
    let slot_bytes = inner.script.lock().unwrap().slot_bytes;
    let mut blocks = inner.blocks.lock().unwrap();
    let mut reply = wire::ReserveReply::default();
    let per_extent = EXTENT / slot_bytes;
    let hashes = reserve
        .chains
        .iter()
        .flat_map(|chain| chain.hashes.chunks(32));
    for hash in hashes {
        if let Some(block) = blocks.by_hash.get(hash) {
            reply.states.push(if block.committed { 1 } else { 2 });
            continue;
        }
        let (extent, index) = (blocks.next / per_extent, blocks.next % per_extent);
        if extent >= 16 {
            reply.states.push(3);
            continue;
        }
        blocks.next += 1;
        let slot = (extent * u64::from(arena.shape().slots_per_extent) + index) as u32;
        let generation = (arena.generations().get(slot) + 1) | 1;
        arena.generations().set(slot, generation);
        reply.states.push(0);
        reply.slots.push(slot);
        reply.generations.push(generation);
        reply.offsets.push(extent * EXTENT + index * slot_bytes);
        let block = Block {
            slot,
            generation,
            crcs: Vec::new(),
            committed: false,
        };
        blocks.by_hash.insert(hash.to_vec(), block);
    }
    reply
}

fn finish(inner: &Inner, commit: &wire::Commit) -> wire::CommitReply {
    let arena = arena_of(inner);
    let mut blocks = inner.blocks.lock().unwrap();
    let heads = commit.crcs.len() / commit.slots.len().max(1);
    let mut states = Vec::new();
    for (i, slot) in commit.slots.iter().enumerate() {
        let found = blocks
            .by_hash
            .values_mut()
            .find(|b| b.slot == *slot && b.generation == commit.generations[i] && !b.committed);
        let Some(block) = found else {
            states.push(2);
            continue;
        };
        block.committed = true;
        block.generation += 1;
        block.crcs = commit.crcs[i * heads..(i + 1) * heads].to_vec();
        arena.generations().set(*slot, block.generation);
        states.push(0);
    }
    wire::CommitReply { states }
}

fn lend(inner: &Inner, load: &wire::Load) -> wire::LoadReply {
    let arena = arena_of(inner);
    let slot_bytes = inner.script.lock().unwrap().slot_bytes;
    let blocks = inner.blocks.lock().unwrap();
    let mut reply = wire::LoadReply::default();
    for hash in load.hashes.chunks(32) {
        match blocks.by_hash.get(hash).filter(|b| b.committed) {
            None => reply.states.push(1),
            Some(block) => {
                let spe = arena.shape().slots_per_extent;
                let (extent, index) = (u64::from(block.slot / spe), u64::from(block.slot % spe));
                reply.states.push(0);
                reply.slots.push(block.slot);
                reply.generations.push(block.generation);
                reply.offsets.push(extent * EXTENT + index * slot_bytes);
                reply.cut.push(0);
                reply.crcs.extend(&block.crcs);
            }
        }
    }
    // One cut: two layers, two heads, not cut.
    reply.cuts.push(wire::Cut {
        layer_bounds: vec![0, 2],
        head_bounds: vec![0, 2],
    });
    reply
}
