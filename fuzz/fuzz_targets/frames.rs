//! Fuzzes what a session's socket reads: `cargo +nightly fuzz run frames fuzz/corpus/frames fuzz/hostile`.
#![no_main]

#[path = "../entry.rs"]
mod entry;

libfuzzer_sys::fuzz_target!(|data: &[u8]| entry::frames(data));
