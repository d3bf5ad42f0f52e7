//! Generates the session messages from `proto/session.proto`, with protox, so that no `protoc` has to be installed.

#![allow(
    clippy::disallowed_macros,
    reason = "a build script speaks to cargo by printing"
)]

use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=proto");
    println!("cargo::rerun-if-changed=build.rs");
    let files = protox::compile(["session.proto"], ["proto"])?;
    let mut config = prost_build::Config::new();
    // Hashes are most of what travels: they are decoded as slices of the receive buffer, not copied.
    config.bytes(["."]);
    config.compile_fds(files)?;
    Ok(())
}
