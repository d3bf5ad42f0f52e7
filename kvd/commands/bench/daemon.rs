//! A daemon as a child process, in a directory of its own; both are gone when this is dropped.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::sync_channel;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use kvd_node::Status;

pub(super) const MIB: u64 = 1 << 20;
pub(super) const GIB: u64 = 1 << 30;

/// How long a daemon may take to be ready.
const PATIENCE: Duration = Duration::from_secs(20);

/// A daemon that serves.
pub(super) struct Daemon {
    child: Child,
    directory: PathBuf,
    http: String,
    pub(super) socket: PathBuf,
    /// From starting the process until `/readyz` said so.
    pub(super) ready_after: Duration,
}

impl Daemon {
    /// Starts one with so many bytes of host memory, and waits until it is ready.
    pub(super) fn start(capacity: u64) -> Result<Self> {
        Self::start_with(capacity, &[])
    }

    /// The same with more flags.
    pub(super) fn start_with(capacity: u64, flags: &[String]) -> Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let directory =
            std::env::temp_dir().join(format!("kvd-bench-{}-{number}", std::process::id()));
        fs::DirBuilder::new()
            .mode(0o700)
            .create(&directory)
            .context("cannot make a directory for the bench")?;
        let begun = Instant::now();
        let child = Command::new(std::env::current_exe()?)
            .args([
                "serve",
                "--http",
                "127.0.0.1:0",
                "--host-capacity",
                &format!("{}MiB", capacity / MIB),
            ])
            .arg("--runtime-dir")
            .arg(&directory)
            .args(flags)
            // Unless a flag names a place.
            .env("KVD_NVME", "off")
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn();
        let child = child.inspect_err(|_| drop(fs::remove_dir_all(&directory)))?;
        let socket = directory.join("default/kvd.sock");
        let mut daemon = Self {
            child,
            directory,
            http: String::new(),
            socket,
            ready_after: Duration::ZERO,
        };
        let line = daemon.ready_line()?;
        daemon.http = line
            .split("http=")
            .nth(1)
            .unwrap_or_default()
            .trim()
            .to_owned();
        let answer = daemon.get("/readyz")?;
        daemon.ready_after = begun.elapsed();
        if !answer.starts_with("HTTP/1.1 200") {
            bail!("the daemon is not ready: {answer}");
        }
        Ok(daemon)
    }

    /// Waits for the line that says where it serves. What the daemon says otherwise is kept for messages.
    fn ready_line(&mut self) -> Result<String> {
        let stderr = self
            .child
            .stderr
            .take()
            .context("the daemon has no standard error")?;
        let (sender, receiver) = sync_channel(1);
        std::thread::Builder::new()
            .name("bench-log".to_owned())
            .spawn(move || {
                let mut said = String::new();
                for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                    if line.contains("ready socket=") {
                        let _ = sender.try_send(Ok(line));
                    } else if said.len() < 10_000 {
                        said.push_str(&line);
                        said.push('\n');
                    }
                }
                let _ = sender.try_send(Err(said));
            })?;
        match receiver.recv_timeout(PATIENCE) {
            Ok(Ok(line)) => Ok(line),
            Ok(Err(said)) => bail!("the daemon ended:\n{said}"),
            Err(_) => bail!("the daemon was not ready in {PATIENCE:?}"),
        }
    }

    /// The answer to an HTTP GET, head and all.
    pub(super) fn get(&self, path: &str) -> Result<String> {
        let mut stream = TcpStream::connect(&self.http)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        write!(
            stream,
            "GET {path} HTTP/1.1\r\nHost: kvd\r\nConnection: close\r\n\r\n"
        )?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    }

    /// What it says of itself.
    pub(super) fn status(&self) -> Result<Status> {
        let answer = self.get("/status")?;
        let body = answer.split("\r\n\r\n").nth(1).unwrap_or_default();
        serde_json::from_str(body).context("/status is not understood")
    }

    /// Waits until the whole arena has been faulted in. There is one after a session has registered.
    pub(super) fn wait_until_faulted(&self) -> Result<()> {
        let begun = Instant::now();
        while begun.elapsed() < 4 * PATIENCE {
            if self.get("/status")?.contains("\"state\":\"ready\"") {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        bail!("the daemon's memory was not there in time")
    }

    /// Memory of the process beside shared memory, in 2^20 bytes.
    pub(super) fn rss_mb(&self) -> Result<f64> {
        self.memory_mb(&["RssAnon:", "RssFile:"])
    }

    /// The most memory that it ever had, shared memory included, in 2^20 bytes.
    pub(super) fn peak_mb(&self) -> Result<f64> {
        self.memory_mb(&["VmHWM:"])
    }

    /// Seconds of CPU that it has taken, to a hundredth.
    pub(super) fn cpu_s(&self) -> Result<f64> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.child.id()))?;
        // The name comes before, in parentheses. Then, from the third field on, user and system time are the 14th and 15th.
        let fields = stat.rsplit(')').next().unwrap_or_default();
        let ticks: f64 = fields
            .split_whitespace()
            .skip(11)
            .take(2)
            .filter_map(|ticks| ticks.parse::<f64>().ok())
            .sum();
        Ok(ticks / 100.0)
    }

    fn memory_mb(&self, lines: &[&str]) -> Result<f64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let kb: f64 = status
            .lines()
            .filter(|l| lines.iter().any(|wanted| l.starts_with(wanted)))
            .filter_map(|l| l.split_whitespace().nth(1)?.parse::<f64>().ok())
            .sum();
        Ok(kb / 1024.0)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_dir_all(&self.directory);
    }
}
