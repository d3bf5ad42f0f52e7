//! The rules of the house as tests: who may import whom, what core may depend on, how long a file may be, what every file
//! must start with. The banned calls are in `clippy.toml`; function length and SAFETY comments are clippy lints.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

const FILE_LINES: usize = 600;

/// Crates of this workspace, and which of them each may depend on outside of tests.
const IMPORTS: &[(&str, &[&str])] = &[
    ("kvd-core", &[]),
    ("kvd-arena", &["kvd-core"]),
    ("kvd-device", &["kvd-core", "kvd-arena"]),
    ("kvd-node", &["kvd-core", "kvd-arena"]),
    ("kvd-nvme", &["kvd-core", "kvd-arena"]),
    ("kvd-wire", &[]),
    (
        "kvd-serve",
        &["kvd-core", "kvd-arena", "kvd-node", "kvd-wire"],
    ),
    (
        "kvd-sim",
        &["kvd-core", "kvd-arena", "kvd-node", "kvd-nvme"],
    ),
    (
        "kvd-client",
        &["kvd-core", "kvd-arena", "kvd-wire", "kvd-device"],
    ),
    (
        "kvd-connectors",
        &[
            "kvd-core",
            "kvd-arena",
            "kvd-wire",
            "kvd-client",
            "kvd-device",
        ],
    ),
    (
        "kvd-python",
        &[
            "kvd-core",
            "kvd-arena",
            "kvd-wire",
            "kvd-client",
            "kvd-device",
            "kvd-connectors",
        ],
    ),
    (
        "kvd",
        &[
            "kvd-core",
            "kvd-arena",
            "kvd-node",
            "kvd-wire",
            "kvd-serve",
            "kvd-client",
            "kvd-device",
            "kvd-nvme",
        ],
    ),
];

/// All that core may pull in from outside. None of these does I/O, reads a clock or draws randomness.
const CORE_MAY_USE: &[&str] = &["blake3", "hashbrown", "thiserror"];

/// Where `unsafe` may stand.
const UNSAFE_HOMES: &[&str] = &[
    "kvd/arena/",
    "kvd/device/",
    "kvd/nvme/src/io/",
    // Its tests stand in for an engine's memory.
    "kvd/client/tests/",
    "python/",
];

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn metadata() -> serde_json::Value {
    let out = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--no-deps"])
        .current_dir(root())
        .output()
        .expect("cargo metadata runs");
    assert!(
        out.status.success(),
        "cargo metadata failed: {}",
        String::from_utf8_lossy(&out.stderr)
    );
    serde_json::from_slice(&out.stdout).expect("cargo metadata prints JSON")
}

/// Package name -> names of its dependencies that are not for tests only.
fn dependencies() -> BTreeMap<String, BTreeSet<String>> {
    let text = |v: &serde_json::Value| v.as_str().expect("a name").to_owned();
    let list = |v: &serde_json::Value| v.as_array().expect("a list").clone();
    list(&metadata()["packages"])
        .iter()
        .map(|package| {
            let uses = list(&package["dependencies"])
                .iter()
                .filter(|d| d["kind"].as_str() != Some("dev"))
                .map(|d| text(&d["name"]))
                .collect();
            (text(&package["name"]), uses)
        })
        .collect()
}

fn walk(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).expect("a readable folder") {
        let path = entry.expect("a folder entry").path();
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        if name.starts_with('.')
            || name == "target"
            || name == "__pycache__"
            || name.starts_with("corpus")
        {
            continue;
        }
        if path.is_dir() {
            walk(&path, found);
        } else {
            found.push(path);
        }
    }
}

fn sources(extensions: &[&str]) -> Vec<PathBuf> {
    let mut all = Vec::new();
    walk(&root(), &mut all);
    all.retain(|p| {
        p.extension()
            .is_some_and(|e| extensions.contains(&e.to_string_lossy().as_ref()))
    });
    assert!(!all.is_empty(), "no sources found under {:?}", root());
    all
}

fn relative(path: &Path) -> String {
    path.strip_prefix(root())
        .expect("below the root")
        .to_string_lossy()
        .into_owned()
}

#[test]
fn crates_import_only_what_they_may() {
    let allowed: BTreeMap<&str, BTreeSet<&str>> = IMPORTS
        .iter()
        .map(|(k, v)| (*k, v.iter().copied().collect()))
        .collect();
    let mut wrong = Vec::new();
    for (package, uses) in dependencies() {
        let Some(may) = allowed.get(package.as_str()) else {
            wrong.push(format!(
                "{package} is a new crate: say in tests/house.rs what it may import"
            ));
            continue;
        };
        for used in uses.iter().filter(|u| allowed.contains_key(u.as_str())) {
            if !may.contains(used.as_str()) {
                wrong.push(format!("{package} must not import {used}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn core_depends_on_nothing_that_does_io() {
    let all = dependencies();
    let wrong: Vec<_> = all["kvd-core"]
        .iter()
        .filter(|d| !CORE_MAY_USE.contains(&d.as_str()))
        .collect();
    assert!(
        wrong.is_empty(),
        "kvd-core must not depend on {wrong:?}: it does no I/O and reads no clock"
    );
}

#[test]
fn files_are_short_and_say_why_they_exist() {
    let mut wrong = Vec::new();
    for path in sources(&["rs", "py"]) {
        let text = std::fs::read_to_string(&path).expect("a text file");
        let name = relative(&path);
        let lines = text.lines().count();
        if lines > FILE_LINES {
            wrong.push(format!(
                "{name}: {lines} lines; split it (limit {FILE_LINES})"
            ));
        }
        let first = text
            .lines()
            .find(|l| !l.is_empty() && !l.starts_with("#!"))
            .unwrap_or("");
        let says_why = first.starts_with("//!") || first.starts_with("\"\"\"");
        if !says_why {
            wrong.push(format!(
                "{name}: starts without a comment that says why it exists"
            ));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn unsafe_stays_in_its_homes() {
    let mut wrong = Vec::new();
    for path in sources(&["rs"]) {
        let name = relative(&path);
        if name == "tests/house.rs" || UNSAFE_HOMES.iter().any(|home| name.starts_with(home)) {
            continue;
        }
        let text = std::fs::read_to_string(&path).expect("a text file");
        let used = text
            .lines()
            .map(|l| l.split("//").next().unwrap_or(""))
            .any(|l| {
                l.contains("unsafe {") || l.contains("unsafe fn") || l.contains("unsafe impl")
            });
        if used {
            wrong.push(name);
        }
    }
    assert!(
        wrong.is_empty(),
        "unsafe outside of its homes {UNSAFE_HOMES:?}: {wrong:?}"
    );
}

#[test]
fn nothing_names_the_machine_it_was_written_on() {
    let mut wrong = Vec::new();
    // Put together here so that this file does not name them itself.
    let banned = [["/wo", "rk/"].concat(), ["/ro", "ot/"].concat()];
    for path in sources(&["rs", "py", "md", "toml", "proto", "sh", "yaml", "pyi"]) {
        let text = std::fs::read_to_string(&path).expect("a text file");
        for (number, line) in text.lines().enumerate() {
            if banned.iter().any(|b| line.contains(b.as_str())) {
                wrong.push(format!("{}:{}", relative(&path), number + 1));
            }
        }
    }
    assert!(wrong.is_empty(), "machine paths in {wrong:?}");
}

#[test]
fn make_knows_every_target_that_the_readme_names() {
    let makefile = std::fs::read_to_string(root().join("Makefile")).expect("a Makefile");
    for target in ["demo", "test", "check", "sim", "soak", "gpu-check"] {
        assert!(
            makefile
                .lines()
                .any(|l| l.starts_with(&format!("{target}:"))),
            "Makefile has no target {target}"
        );
    }
}
