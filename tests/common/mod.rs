//! A daemon for black-box tests: the real binary in a directory of its own, killed and cleaned up when dropped; and a
//! session without a client, to say what no client would.
#![allow(dead_code, reason = "every test file uses a part of this")]
#![allow(
    clippy::disallowed_methods,
    reason = "another process gives no event to wait for, only states to look at"
)]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use kvd_client::{BlockMover, GroupLayout, MoverConfig};
use kvd_core::{Cut, GroupGeometry, GroupKind, NamespaceRecord};
use kvd_device::{HostDevice, OwnedPages, PartGeometry};
use kvd_node::{Status, TenantStatus};
use kvd_wire::frame::{self, Decoder};
use kvd_wire::session::{Hello, Reply, Role, reply, request};
use prost::Message;

/// The longest that anything here may take; far more than it does.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// The binary under test: the one built beside, or `KVD_BIN` where the tests run on another machine than they were built on.
pub(crate) fn kvd() -> Command {
    let built = || env!("CARGO_BIN_EXE_kvd").into();
    let mut command = Command::new(std::env::var_os("KVD_BIN").unwrap_or_else(built));
    command
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_default());
    command
}

/// Waits until it is so.
pub(crate) fn eventually(what: &str, mut so: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !so() {
        assert!(begun.elapsed() < PATIENCE, "never: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A running daemon.
pub(crate) struct Daemon {
    child: Child,
    log: Arc<Mutex<String>>,
    pub(crate) socket: PathBuf,
    pub(crate) http: String,
    pub(crate) directory: Arc<tempfile::TempDir>,
}

impl Daemon {
    /// One with little memory and these flags beside.
    pub(crate) fn start(flags: &[&str]) -> Self {
        let directory = Arc::new(tempfile::tempdir().expect("a directory"));
        Self::start_in(directory, flags)
    }

    /// The same, in a directory where one may have been before.
    pub(crate) fn start_in(directory: Arc<tempfile::TempDir>, flags: &[&str]) -> Self {
        let mut command = kvd();
        command
            .args(["serve", "--http", "127.0.0.1:0", "--host-capacity", "64MiB"])
            .args(flags);
        command.arg("--runtime-dir").arg(directory.path());
        Self::spawn(command, directory)
    }

    /// Runs this command, which serves in this directory, and waits until it is ready.
    pub(crate) fn spawn(mut command: Command, directory: Arc<tempfile::TempDir>) -> Self {
        let mut child = command
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("starts");
        let stderr = child.stderr.take().expect("piped");
        let log = Arc::new(Mutex::new(String::new()));
        let (sender, receiver) = mpsc::sync_channel(1);
        let written = Arc::clone(&log);
        std::thread::Builder::new()
            .name("daemon-log".to_owned())
            .spawn(move || {
                for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                    if line.contains("ready socket=") {
                        let _ = sender.try_send(line.clone());
                    }
                    let mut log = written.lock().expect("not poisoned");
                    log.push_str(&line);
                    log.push('\n');
                }
            })
            .expect("a thread");
        let Ok(line) = receiver.recv_timeout(PATIENCE) else {
            let _ = child.kill();
            panic!("no ready line:\n{}", log.lock().expect("not poisoned"));
        };
        let word = |key: &str| {
            let at = line.find(key).expect("the ready line has it") + key.len();
            line[at..]
                .split_whitespace()
                .next()
                .unwrap_or_default()
                .to_owned()
        };
        let socket = PathBuf::from(word("socket=").split(',').next().unwrap_or_default());
        Self {
            child,
            log,
            socket,
            http: word("http="),
            directory,
        }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn log(&self) -> String {
        self.log.lock().expect("not poisoned").clone()
    }

    /// The answer to an HTTP GET: status code, body.
    pub(crate) fn get(&self, path: &str) -> (u16, String) {
        let mut stream = TcpStream::connect(&self.http).expect("http listens");
        stream.set_read_timeout(Some(PATIENCE)).expect("set");
        write!(
            stream,
            "GET {path} HTTP/1.1\r\nHost: kvd\r\nConnection: close\r\n\r\n"
        )
        .expect("sent");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("an answer");
        let (head, body) = answer.split_once("\r\n\r\n").expect("head and body");
        let code = head
            .split_whitespace()
            .nth(1)
            .and_then(|c| c.parse().ok())
            .expect("a code");
        (code, body.to_owned())
    }

    /// The status, over HTTP.
    pub(crate) fn status(&self) -> Status {
        let (code, body) = self.get("/status");
        assert_eq!(code, 200, "{body}\n{}", self.threads());
        serde_json::from_str(&body).expect("the status is as documented")
    }

    /// What each thread does just now: name, state, times it ran, and where it waits.
    pub(crate) fn threads(&self) -> String {
        let Ok(tasks) = std::fs::read_dir(format!("/proc/{}/task", self.pid())) else {
            return String::new();
        };
        let read = |path: PathBuf| std::fs::read_to_string(path).unwrap_or_default();
        let line = |task: PathBuf| {
            let stat = read(task.join("stat"));
            let state = stat.rsplit(") ").next().unwrap_or_default();
            let fields: Vec<_> = state.split(' ').collect();
            format!(
                "{} {} ticks {:?} in {} {}\n",
                read(task.join("comm")).trim(),
                fields.first().unwrap_or(&""),
                fields.get(11..13),
                read(task.join("wchan")).trim(),
                read(task.join("syscall")).trim()
            )
        };
        tasks
            .map_while(Result::ok)
            .map(|task| line(task.path()))
            .collect()
    }

    /// The default tenant's status.
    pub(crate) fn tenant(&self) -> TenantStatus {
        self.status().tenants.swap_remove(0)
    }

    pub(crate) fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_raw(self.child.id() as i32).expect("a pid");
        rustix::process::kill_process(pid, signal).expect("it lives");
    }

    /// Waits for its end.
    pub(crate) fn wait(&mut self) -> ExitStatus {
        let mut ended = None;
        eventually("the daemon ends", || {
            ended = self.child.try_wait().expect("waits");
            ended.is_some()
        });
        ended.expect("just seen")
    }

    /// kill -9, and waits.
    pub(crate) fn kill(&mut self) {
        self.child.kill().expect("killed");
        self.wait();
    }

    /// Memory beside shared memory, in 2^20 bytes.
    pub(crate) fn rss_mb(&self) -> f64 {
        let status =
            std::fs::read_to_string(format!("/proc/{}/status", self.pid())).expect("it lives");
        let kb = |line: &str| {
            line.split_whitespace()
                .nth(1)
                .and_then(|n| n.parse::<f64>().ok())
        };
        let lines = status
            .lines()
            .filter(|l| l.starts_with("RssAnon:") || l.starts_with("RssFile:"));
        lines.filter_map(kb).sum::<f64>() / 1024.0
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            let _ = writeln!(std::io::stderr(), "the daemon's log:\n{}", self.log());
        }
    }
}

/// A session without a client.
pub(crate) struct Raw {
    pub(crate) stream: UnixStream,
    decoder: Decoder,
    next: u32,
}

impl Raw {
    /// Connected, and nothing said.
    pub(crate) fn connect(socket: &Path) -> Self {
        let stream = UnixStream::connect(socket).expect("somebody listens");
        stream.set_read_timeout(Some(PATIENCE)).expect("set");
        stream.set_write_timeout(Some(PATIENCE)).expect("set");
        Self {
            stream,
            decoder: Decoder::new(64 << 20),
            next: 1,
        }
    }

    /// Connected and greeted.
    pub(crate) fn hello(socket: &Path, role: Role) -> Self {
        let mut raw = Self::connect(socket);
        match raw.ask(request::Body::Hello(hello(role))) {
            Some(reply::Body::Hello(_)) => raw,
            other => panic!("not greeted: {other:?}"),
        }
    }

    /// Sends bytes as they are. Says whether the other end took them.
    pub(crate) fn send(&mut self, bytes: &[u8]) -> bool {
        self.stream.write_all(bytes).is_ok()
    }

    /// Sends bytes with descriptors.
    pub(crate) fn send_with(&mut self, bytes: &[u8], fds: &[OwnedFd]) {
        use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
        let mut room = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
        let mut control = SendAncillaryBuffer::new(&mut room);
        let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        assert!(control.push(SendAncillaryMessage::ScmRights(&borrowed)));
        sendmsg(
            &self.stream,
            &[std::io::IoSlice::new(bytes)],
            &mut control,
            SendFlags::empty(),
        )
        .expect("sent");
    }

    /// Sends a request; its id.
    pub(crate) fn say(&mut self, body: request::Body) -> u32 {
        let id = self.next;
        self.next += 1;
        let bytes = framed(id, body);
        self.send(&bytes);
        id
    }

    /// The next reply; `None` when the session is over.
    pub(crate) fn hear(&mut self) -> Option<(u32, reply::Body)> {
        loop {
            if let Some(frame) = self
                .decoder
                .next()
                .expect("the daemon keeps to the framing")
            {
                let reply =
                    Reply::decode(frame.body).expect("the daemon's messages can be decoded");
                return Some((
                    frame.id,
                    reply.body.expect("the daemon's messages are known"),
                ));
            }
            match self.stream.read(self.decoder.space()) {
                Ok(0) => return None,
                Ok(n) => self.decoder.filled(n),
                Err(e) if e.kind() == std::io::ErrorKind::ConnectionReset => return None,
                Err(e) => panic!("the daemon says nothing: {e}"),
            }
        }
    }

    /// Asks, and the answer.
    pub(crate) fn ask(&mut self, body: request::Body) -> Option<reply::Body> {
        let id = self.say(body);
        let (answered, reply) = self.hear()?;
        assert_eq!(answered, id, "{reply:?}");
        Some(reply)
    }

    /// Registers [`geometry`]; the namespace's number.
    pub(crate) fn register(&mut self) -> u32 {
        let register = kvd_wire::session::Register {
            record: record(&[]).into(),
            groups: vec![layout()],
        };
        match self.ask(request::Body::Register(register)) {
            Some(reply::Body::Register(r)) => r.namespace,
            other => panic!("not registered: {other:?}"),
        }
    }
}

/// A frame with a request.
pub(crate) fn framed(id: u32, body: request::Body) -> Vec<u8> {
    let mut bytes = Vec::new();
    frame::encode(id, &kvd_wire::request(body), &mut bytes);
    bytes
}

/// A Hello of a process by itself.
pub(crate) fn hello(role: Role) -> Hello {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    let mut instance = vec![7; 16];
    instance[..8].copy_from_slice(&NEXT.fetch_add(1, Ordering::Relaxed).to_le_bytes());
    Hello {
        version_min: 1,
        version_max: 1,
        instance: instance.into(),
        role: role.into(),
        world: 1,
        label: "a test".to_owned(),
        ..Hello::default()
    }
}

/// Blocks of 64 KiB.
pub(crate) fn geometry() -> GroupGeometry {
    GroupGeometry {
        kind: GroupKind::Full,
        layers: 4,
        heads: 2,
        block_tokens: 16,
        cell_bytes: 512,
        window: None,
    }
}

/// What [`geometry`] is in one process.
pub(crate) fn part() -> PartGeometry {
    let g = geometry();
    PartGeometry {
        layers: g.layers,
        heads: g.heads,
        tokens: g.block_tokens,
        cell_bytes: g.cell_bytes,
    }
}

/// The layout of a process that has whole blocks.
pub(crate) fn layout() -> GroupLayout {
    let g = geometry();
    GroupLayout {
        group: 0,
        layer_bounds: vec![0, g.layers],
        head_bounds: vec![0, g.heads],
        copies: true,
        part: 0,
    }
}

/// The record of [`geometry`], with some fields otherwise.
pub(crate) fn record(other: &[(&str, &str)]) -> Vec<u8> {
    let g = geometry();
    let mut fields = vec![
        ("tenant", "default".to_owned()),
        ("model", "test".to_owned()),
        ("weights", "test".to_owned()),
        ("kv_dtype", "bfloat16".to_owned()),
        ("cell_encoding", "test-1".to_owned()),
        ("hash", "test:0".to_owned()),
        ("block_tokens", g.block_tokens.to_string()),
        ("groups", "1".to_owned()),
        ("group.0.kind", "full".to_owned()),
        ("group.0.layers", g.layers.to_string()),
        ("group.0.heads", g.heads.to_string()),
        ("group.0.cell_bytes", g.cell_bytes.to_string()),
    ];
    for (name, value) in other {
        fields.retain(|(n, _)| n != name);
        fields.push((name, (*value).to_owned()));
    }
    NamespaceRecord::build(fields)
        .expect("a legal record")
        .encode()
}

/// Copies whole blocks of [`geometry`].
pub(crate) fn mover() -> BlockMover {
    let g = geometry();
    let cut = Cut::whole(&g);
    BlockMover::new(Arc::new(HostDevice), MoverConfig::new(0, g, cut, 0)).expect("a mover")
}

/// Memory for so many blocks.
pub(crate) fn pages(blocks: u32) -> OwnedPages {
    OwnedPages::new(part(), blocks).expect("fits")
}

/// A hash that nobody else has.
pub(crate) fn hash(owner: u32, number: u32) -> [u8; 32] {
    let mut hash = [0x5a; 32];
    hash[24..28].copy_from_slice(&owner.to_be_bytes());
    hash[28..].copy_from_slice(&number.to_be_bytes());
    hash
}

/// What the block of this hash holds.
pub(crate) fn content(owner: u32, number: u32) -> impl Fn(usize) -> u8 {
    move |at| {
        (at as u32)
            .wrapping_mul(2_654_435_761)
            .wrapping_add(owner * 31 + number * 7)
            .to_be_bytes()[0]
    }
}
