//! The values of the settings, their defaults, and what must hold between them. How they are read is in `settings`.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, bail};
use kvd_arena::HugePages;

use super::DEFAULT_TENANT;
use super::settings::{path, show_size, size};

/// Longest path of a Unix socket, in bytes, less the final zero.
const SOCKET_PATH_BYTES: usize = 107;
/// Smallest arena: one extent, in bytes.
const CAPACITY_MIN: u64 = 2 << 20;
/// Smallest store, in bytes.
const NVME_MIN: u64 = 64 << 20;

/// What the defaults depend on. Made by `main`; by hand in tests.
#[derive(Debug, Clone)]
pub(crate) struct Surroundings {
    pub(crate) uid: u32,
    /// Bytes of RAM in this machine.
    pub(crate) ram_bytes: u64,
    /// `XDG_RUNTIME_DIR`, when set.
    pub(crate) xdg_runtime_dir: Option<PathBuf>,
    /// Whether a directory can be made in `/run`.
    pub(crate) run_writable: bool,
    /// `XDG_CACHE_HOME`, else `.cache` in `HOME`, when set.
    pub(crate) cache_dir: Option<PathBuf>,
}

impl Surroundings {
    /// Those of this process.
    pub(crate) fn of_process() -> Self {
        let info = rustix::system::sysinfo();
        let unit = u64::from(info.mem_unit.max(1));
        let directory = |name| {
            let path = std::env::var_os(name).map(PathBuf::from);
            path.filter(|path| path.is_absolute())
        };
        Self {
            uid: rustix::process::getuid().as_raw(),
            ram_bytes: info.totalram * unit,
            xdg_runtime_dir: directory("XDG_RUNTIME_DIR"),
            run_writable: rustix::fs::access("/run", rustix::fs::Access::WRITE_OK).is_ok(),
            cache_dir: directory("XDG_CACHE_HOME")
                .or_else(|| directory("HOME").map(|home| home.join(".cache"))),
        }
    }

    fn runtime_dir(&self) -> PathBuf {
        match &self.xdg_runtime_dir {
            Some(dir) => dir.join("kvd"),
            None if self.run_writable => PathBuf::from("/run/kvd"),
            None => PathBuf::from(format!("/tmp/kvd-{}", self.uid)),
        }
    }
}

/// How blocks are chosen for eviction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Eviction {
    Lru,
    S3Fifo,
}

/// Where blocks below host memory are kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Nvme {
    /// In a directory of the user's cache directory, if that is fit for it.
    Auto,
    /// In these directories or devices; none: nowhere.
    Paths(Vec<PathBuf>),
}

/// How bytes get to a store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NvmeIo {
    Auto,
    Uring,
    Threads,
}

/// When blocks go down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Offload {
    WriteThrough,
    SecondUse,
    Demotion,
}

/// Form of the log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LogFormat {
    Text,
    Json,
}

/// A tenant of its own: a socket and an arena that no other tenant sees.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Tenant {
    pub(crate) name: String,
    pub(crate) host_capacity: u64,
    pub(crate) socket: Option<PathBuf>,
}

impl Tenant {
    /// A tenant without settings yet. The name becomes a directory.
    pub(super) fn named(name: &str) -> Result<Self, String> {
        let plain = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-';
        if name == DEFAULT_TENANT {
            return Err(
                "the default tenant's settings stand at the top: socket, host_capacity".to_owned(),
            );
        }
        if name.is_empty() || name.len() > 63 || !name.bytes().all(plain) || name.starts_with('-') {
            return Err(format!(
                "{name:?} is no tenant name: use up to 63 of a-z, 0-9 and -"
            ));
        }
        Ok(Self {
            name: name.to_owned(),
            host_capacity: 0,
            socket: None,
        })
    }

    /// Takes one key of `[tenants.NAME]`.
    pub(super) fn set(&mut self, key: &str, value: &str) -> Result<(), String> {
        match key {
            "host_capacity" => self.host_capacity = size(value)?,
            "socket" => self.socket = Some(path(value)?),
            _ => {
                return Err(format!(
                    "unknown key {key:?} in tenants.{}: there are host_capacity and socket",
                    self.name
                ));
            }
        }
        Ok(())
    }

    pub(super) fn rows(&self) -> [(&'static str, String); 2] {
        let socket = self
            .socket
            .as_ref()
            .map(|p| p.display().to_string())
            .unwrap_or_default();
        [
            ("host_capacity", show_size(self.host_capacity)),
            ("socket", socket),
        ]
    }
}

/// Every setting's value.
#[derive(Debug, Clone)]
pub(crate) struct Values {
    pub(crate) runtime_dir: PathBuf,
    pub(crate) socket: Option<PathBuf>,
    pub(crate) host_capacity: u64,
    pub(crate) extent_size: Option<u64>,
    pub(crate) huge_pages: HugePages,
    pub(crate) nvme: Nvme,
    /// What `auto` means, when there is a home.
    pub(crate) cache_dir: Option<PathBuf>,
    pub(crate) nvme_capacity: u64,
    pub(crate) nvme_io: NvmeIo,
    /// Bytes a day, 0 for no limit; or what fits the place.
    pub(crate) nvme_write_budget: Option<u64>,
    pub(crate) nvme_faults: Option<PathBuf>,
    pub(crate) offload: Offload,
    /// Lookups that lease begin to bring up what is below.
    pub(crate) read_ahead: bool,
    pub(crate) http: Option<SocketAddr>,
    pub(crate) socket_mode: u32,
    pub(crate) directory_mode: u32,
    pub(crate) eviction: Eviction,
    pub(crate) lease: Duration,
    pub(crate) lease_share: f64,
    pub(crate) store_deadline: Duration,
    pub(crate) quarantine_limit: Option<u64>,
    pub(crate) adopt_grace: Duration,
    pub(crate) handshake_timeout: Duration,
    pub(crate) drain_timeout: Duration,
    pub(crate) max_sessions: u32,
    pub(crate) max_namespaces: u32,
    pub(crate) max_hashes: u32,
    pub(crate) max_frame: u32,
    pub(crate) log: String,
    pub(crate) log_format: LogFormat,
    /// Beside the default tenant.
    pub(crate) tenants: BTreeMap<String, Tenant>,
}

impl Values {
    /// What holds when nobody says anything.
    pub(super) fn defaults(surroundings: &Surroundings) -> Self {
        Self {
            runtime_dir: surroundings.runtime_dir(),
            socket: None,
            host_capacity: (surroundings.ram_bytes / 4).min(4 << 30) & !(CAPACITY_MIN - 1),
            extent_size: None,
            huge_pages: HugePages::Auto,
            nvme: Nvme::Auto,
            cache_dir: surroundings.cache_dir.as_ref().map(|dir| dir.join("kvd")),
            nvme_capacity: 16 << 30,
            nvme_io: NvmeIo::Auto,
            nvme_write_budget: None,
            nvme_faults: None,
            offload: Offload::WriteThrough,
            read_ahead: true,
            http: Some(SocketAddr::from(([127, 0, 0, 1], 9440))),
            socket_mode: 0o600,
            directory_mode: 0o700,
            eviction: Eviction::Lru,
            lease: Duration::from_secs(30),
            lease_share: 0.5,
            store_deadline: Duration::from_secs(30),
            quarantine_limit: None,
            adopt_grace: Duration::from_secs(2),
            handshake_timeout: Duration::from_secs(5),
            drain_timeout: Duration::from_secs(5),
            max_sessions: 256,
            max_namespaces: kvd_wire::limits::NAMESPACES,
            max_hashes: kvd_wire::limits::HASHES,
            max_frame: kvd_wire::limits::FRAME_BYTES,
            log: "info".to_owned(),
            log_format: LogFormat::Text,
            tenants: BTreeMap::new(),
        }
    }

    /// Fills in what follows from other values.
    pub(super) fn resolve(&mut self) {
        let socket_of = |name: &str| self.runtime_dir.join(name).join("kvd.sock");
        let default = socket_of(DEFAULT_TENANT);
        for tenant in self.tenants.values_mut() {
            if tenant.socket.is_none() {
                tenant.socket = Some(self.runtime_dir.join(&tenant.name).join("kvd.sock"));
            }
        }
        self.socket.get_or_insert(default);
    }

    /// The default tenant's socket.
    pub(crate) fn default_socket(&self) -> PathBuf {
        self.socket
            .clone()
            .unwrap_or_else(|| self.runtime_dir.join(DEFAULT_TENANT).join("kvd.sock"))
    }

    /// All tenants, the default one first.
    pub(crate) fn all_tenants(&self) -> Vec<Tenant> {
        let default = Tenant {
            name: DEFAULT_TENANT.to_owned(),
            host_capacity: self.host_capacity,
            socket: Some(self.default_socket()),
        };
        std::iter::once(default)
            .chain(self.tenants.values().cloned())
            .collect()
    }

    /// What must hold between the values.
    pub(super) fn validate(&self) -> Result<()> {
        let mut directories = BTreeMap::new();
        for tenant in self.all_tenants() {
            let name = &tenant.name;
            if tenant.host_capacity < CAPACITY_MIN {
                bail!(
                    "tenant {name}: host_capacity {} is too small: give it 2MiB or more",
                    show_size(tenant.host_capacity)
                );
            }
            let socket = tenant.socket.clone().unwrap_or_default();
            let bytes = socket.as_os_str().len();
            if bytes > SOCKET_PATH_BYTES {
                bail!(
                    "socket {} has {bytes} bytes and the system takes {SOCKET_PATH_BYTES}: choose a shorter path",
                    socket.display()
                );
            }
            let Some(directory) = socket.parent().filter(|d| !d.as_os_str().is_empty()) else {
                bail!("socket {}: write a path with a directory", socket.display());
            };
            if let Some(other) = directories.insert(directory.to_owned(), name.clone()) {
                bail!(
                    "tenants {other} and {name} have sockets in one directory: each needs a directory of its own"
                );
            }
        }
        if let Some(extent) = self.extent_size
            && (!extent.is_power_of_two() || extent < CAPACITY_MIN)
        {
            bail!(
                "extent_size {} is no power of two from 2MiB on",
                show_size(extent)
            );
        }
        if self.nvme_capacity < NVME_MIN {
            bail!(
                "nvme_capacity {} is too small: give it {} or more",
                show_size(self.nvme_capacity),
                show_size(NVME_MIN)
            );
        }
        if let Nvme::Paths(paths) = &self.nvme {
            for (at, path) in paths.iter().enumerate() {
                if paths[..at].contains(path) {
                    bail!("nvme names {} twice: name each once", path.display());
                }
            }
        }
        if !(0.0..=1.0).contains(&self.lease_share) {
            bail!("lease_share {} is not between 0 and 1", self.lease_share);
        }
        if u64::from(self.max_hashes) * 40 > u64::from(self.max_frame) {
            bail!(
                "max_hashes {} do not fit in max_frame {}: a hash takes up to 40 bytes",
                self.max_hashes,
                self.max_frame
            );
        }
        if self.max_sessions == 0 {
            bail!("max_sessions is 0: nobody could attach");
        }
        Ok(())
    }
}
