//! Stamps the version and, where there is one, the git commit into the binary. No network, no compiler of anything else.

#![allow(
    clippy::disallowed_macros,
    reason = "a build script speaks to cargo by printing"
)]

use std::path::Path;
use std::process::Command;

/// What git says, if there is a git and a repository.
fn git(args: &[&str]) -> Option<String> {
    let output = Command::new("git").args(args).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?.trim().to_owned();
    (output.status.success() && !text.is_empty()).then_some(text)
}

fn main() {
    let version = match git(&["describe", "--always", "--dirty", "--abbrev=12"]) {
        Some(commit) => format!("{} ({commit})", env!("CARGO_PKG_VERSION")),
        None => env!("CARGO_PKG_VERSION").to_owned(),
    };
    println!("cargo::rustc-env=KVD_VERSION={version}");
    // HEAD names a branch; that the branch has moved shows in its log. And what is built may differ from what was committed.
    let moves = ["HEAD", "logs/HEAD"]
        .iter()
        .filter_map(|name| git(&["rev-parse", "--git-path", name]))
        .filter(|path| Path::new(path).exists());
    for path in moves.chain(["build.rs", "Cargo.lock", "kvd"].map(str::to_owned)) {
        println!("cargo::rerun-if-changed={path}");
    }
}
