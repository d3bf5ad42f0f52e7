//! The table of settings: each is declared once, here. The key is what stands in the file; the variable is `KVD_` and the
//! key in capitals, the flag the key with dashes.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use bytesize::ByteSize;
use kvd_arena::HugePages;

use super::values::{Eviction, LogFormat, Nvme, NvmeIo, Offload, Values};

/// One setting.
#[derive(Debug)]
pub(crate) struct Setting {
    pub(crate) key: &'static str,
    /// What kind of value it takes, for messages and help.
    pub(crate) value: &'static str,
    pub(crate) help: &'static str,
    pub(super) set: fn(&mut Values, &str) -> Result<(), String>,
    pub(super) show: fn(&Values) -> String,
}

impl Setting {
    /// The flag, without the dashes before it.
    pub(crate) fn flag(&self) -> String {
        self.key.replace('_', "-")
    }

    /// The variable.
    pub(crate) fn variable(&self) -> String {
        format!("KVD_{}", self.key.to_uppercase())
    }
}

macro_rules! settings {
    ($($key:ident: $value:literal, $help:literal, $parse:expr, $show:expr;)*) => {
        /// Every setting there is, in the order in which they are shown.
        pub(crate) static SETTINGS: &[Setting] = &[$(Setting {
            key: stringify!($key),
            value: $value,
            help: $help,
            set: |values, text| {
                values.$key = $parse(text)?;
                Ok(())
            },
            show: |values| $show(&values.$key),
        }),*];
    };
}

settings! {
    runtime_dir: "PATH", "Directory that holds a directory with a socket for each tenant", path, show_path;
    socket: "PATH", "Session socket of the default tenant", some_path, show_some_path;
    host_capacity: "SIZE", "Host memory for the default tenant's blocks, like 4GiB", size, |v: &u64| show_size(*v);
    extent_size: "SIZE", "Piece of the arena that holds blocks of one size, a power of two; or auto", auto_size, show_auto_size;
    huge_pages: "CHOICE", "2 MiB pages for the arena: auto, off or require", huge_pages, show_huge_pages;
    nvme: "PATHS", "Directories or block devices for blocks below host memory, with commas between; off; or auto: the user's cache directory, if it is fit for it", nvme, show_nvme;
    nvme_capacity: "SIZE", "Size of the store in each of those directories, taken at once (auto: no more than a tenth of what is free, and 8 GiB); of a block device, how much is used", size, |v: &u64| show_size(*v);
    nvme_io: "CHOICE", "How bytes get to them: auto, uring or threads", nvme_io, show_nvme_io;
    nvme_write_budget: "SIZE", "Most bytes that each of them takes in a day; off; or auto: off for those that are named, 16 times its size for one that is not", budget, show_budget;
    nvme_faults: "PATH", "For tests: a file that says how each of them shall fail; or off", faults, show_faults;
    offload: "CHOICE", "When blocks are written there: write_through, second_use or demotion", offload, show_offload;
    read_ahead: "CHOICE", "Whether a lookup that keeps what it finds begins to bring up what is there: on or off", switch, show_switch;
    http: "ADDRESS", "Where /healthz, /readyz, /metrics and /status listen, like 127.0.0.1:9440; or off", http, show_http;
    socket_mode: "MODE", "Permissions of the sockets, in octal", mode, |v: &u32| format!("{v:04o}");
    directory_mode: "MODE", "Permissions of the sockets' directories, in octal", mode, |v: &u32| format!("{v:04o}");
    eviction: "CHOICE", "Which blocks go first when memory is full: lru or s3fifo", eviction, show_eviction;
    lease: "DURATION", "How long a block given for reading stays, like 30s", duration, show_duration;
    lease_share: "NUMBER", "Share of the arena that leases and writes to NVMe together may keep, from 0 to 1", number, |v: &f64| v.to_string();
    store_deadline: "DURATION", "How long a block may wait for all of its parts", duration, show_duration;
    quarantine_limit: "SIZE", "Most memory that waits for writers that may still write; or auto", auto_size, show_auto_size;
    adopt_grace: "DURATION", "How long a new daemon waits for engines that bring the former one's arena", duration, show_duration;
    handshake_timeout: "DURATION", "How long a connection may take to say who it is", duration, show_duration;
    drain_timeout: "DURATION", "How long a shutdown waits for answers to be sent", duration, show_duration;
    max_sessions: "NUMBER", "Most sessions of a tenant", number, |v: &u32| v.to_string();
    max_namespaces: "NUMBER", "Most namespaces that a session may register", number, |v: &u32| v.to_string();
    max_hashes: "NUMBER", "Most hashes in one request", number, |v: &u32| v.to_string();
    max_frame: "SIZE", "Longest request", frame_size, |v: &u32| show_size(u64::from(*v));
    log: "FILTER", "What is logged, like info or kvd_serve=debug", text, |v: &String| v.clone();
    log_format: "CHOICE", "Form of the log: text or json", log_format, show_log_format;
}

/// The setting with this key.
pub(super) fn find(key: &str) -> Option<&'static Setting> {
    SETTINGS.iter().find(|s| s.key == key)
}

/// A hint for a key that is nearly right; otherwise nothing.
pub(super) fn did_you_mean(key: &str) -> String {
    let near = SETTINGS.iter().map(|s| (distance(key, s.key), s.key)).min();
    match near {
        Some((d, near)) if d <= 3 => format!(", did you mean {near}?"),
        _ => String::new(),
    }
}

/// Levenshtein distance; the words are short.
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.bytes().enumerate() {
            let change = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = change.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

/// A size with a unit.
pub(super) fn size(text: &str) -> Result<u64, String> {
    let text = text.trim();
    if text != "0" && text.bytes().all(|b| b.is_ascii_digit()) {
        return Err("a size has a unit, like 4GiB".to_owned());
    }
    text.parse::<ByteSize>()
        .map(|s| s.as_u64())
        .map_err(|_| "write it like 512MiB or 4GiB".to_owned())
}

fn auto_size(text: &str) -> Result<Option<u64>, String> {
    if text == "auto" {
        Ok(None)
    } else {
        size(text).map(Some)
    }
}

fn frame_size(text: &str) -> Result<u32, String> {
    let bytes = size(text)?;
    match u32::try_from(bytes) {
        Ok(bytes) if (4096..=64 << 20).contains(&bytes) => Ok(bytes),
        _ => Err("choose from 4KiB to 64MiB".to_owned()),
    }
}

/// Bytes in the largest unit that shows them exactly.
pub(super) fn show_size(bytes: u64) -> String {
    for (shift, unit) in [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")] {
        if bytes > 0 && bytes.trailing_zeros() >= shift {
            return format!("{}{unit}", bytes >> shift);
        }
    }
    format!("{bytes}B")
}

fn show_auto_size(value: &Option<u64>) -> String {
    value.map_or_else(|| "auto".to_owned(), show_size)
}

/// A path; an empty one is a mistake.
pub(super) fn path(text: &str) -> Result<PathBuf, String> {
    if text.is_empty() {
        Err("a path is not empty".to_owned())
    } else {
        Ok(PathBuf::from(text))
    }
}

fn some_path(text: &str) -> Result<Option<PathBuf>, String> {
    path(text).map(Some)
}

fn show_path(path: &std::path::Path) -> String {
    path.display().to_string()
}

fn show_some_path(path: &Option<PathBuf>) -> String {
    path.as_deref().map(show_path).unwrap_or_default()
}

fn duration(text: &str) -> Result<Duration, String> {
    let parsed = humantime::parse_duration(text)
        .map_err(|_| "write it with a unit, like 30s or 500ms".to_owned())?;
    if parsed > Duration::from_secs(86_400) {
        return Err("a day is the longest".to_owned());
    }
    Ok(parsed)
}

fn show_duration(value: &Duration) -> String {
    humantime::format_duration(*value).to_string()
}

fn number<N: std::str::FromStr>(text: &str) -> Result<N, String> {
    text.parse().map_err(|_| "write a number".to_owned())
}

fn mode(text: &str) -> Result<u32, String> {
    match u32::from_str_radix(text.trim_start_matches("0o"), 8) {
        Ok(mode) if mode <= 0o777 => Ok(mode),
        _ => Err("write permissions in octal, like 0600".to_owned()),
    }
}

fn text(text: &str) -> Result<String, String> {
    Ok(text.to_owned())
}

fn http(text: &str) -> Result<Option<SocketAddr>, String> {
    if text == "off" {
        return Ok(None);
    }
    text.parse()
        .map(Some)
        .map_err(|_| "write IP:PORT, or off".to_owned())
}

fn show_http(value: &Option<SocketAddr>) -> String {
    value.map_or_else(|| "off".to_owned(), |a| a.to_string())
}

macro_rules! choice {
    ($parse:ident, $show:ident, $type:ty, $($text:literal => $value:path),*) => {
        fn $parse(text: &str) -> Result<$type, String> {
            match text {
                $($text => Ok($value),)*
                _ => Err(format!("choose {}", [$($text),*].join(" or "))),
            }
        }

        fn $show(value: &$type) -> String {
            match value {
                $($value => $text,)*
            }
            .to_owned()
        }
    };
}

choice!(huge_pages, show_huge_pages, HugePages, "auto" => HugePages::Auto, "off" => HugePages::Off, "require" => HugePages::Require);
fn nvme(text: &str) -> Result<Nvme, String> {
    match text {
        "auto" => Ok(Nvme::Auto),
        "off" => Ok(Nvme::Paths(Vec::new())),
        _ => {
            let paths: Result<_, _> = text.split(',').map(|one| path(one.trim())).collect();
            paths.map(Nvme::Paths)
        }
    }
}

fn show_nvme(value: &Nvme) -> String {
    match value {
        Nvme::Auto => "auto".to_owned(),
        Nvme::Paths(paths) if paths.is_empty() => "off".to_owned(),
        Nvme::Paths(paths) => {
            let all: Vec<String> = paths.iter().map(|one| show_path(one)).collect();
            all.join(",")
        }
    }
}

fn budget(text: &str) -> Result<Option<u64>, String> {
    match text {
        "off" => Ok(Some(0)),
        _ => auto_size(text),
    }
}

fn show_budget(value: &Option<u64>) -> String {
    match value {
        Some(0) => "off".to_owned(),
        _ => show_auto_size(value),
    }
}

fn switch(text: &str) -> Result<bool, String> {
    match text {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err("choose on or off".to_owned()),
    }
}

fn show_switch(value: &bool) -> String {
    if *value { "on" } else { "off" }.to_owned()
}

fn faults(text: &str) -> Result<Option<PathBuf>, String> {
    match text {
        "off" => Ok(None),
        _ => some_path(text),
    }
}

fn show_faults(value: &Option<PathBuf>) -> String {
    value.as_deref().map_or_else(|| "off".to_owned(), show_path)
}

choice!(nvme_io, show_nvme_io, NvmeIo, "auto" => NvmeIo::Auto, "uring" => NvmeIo::Uring, "threads" => NvmeIo::Threads);
choice!(offload, show_offload, Offload, "write_through" => Offload::WriteThrough, "second_use" => Offload::SecondUse, "demotion" => Offload::Demotion);
choice!(eviction, show_eviction, Eviction, "lru" => Eviction::Lru, "s3fifo" => Eviction::S3Fifo);
choice!(log_format, show_log_format, LogFormat, "text" => LogFormat::Text, "json" => LogFormat::Json);
