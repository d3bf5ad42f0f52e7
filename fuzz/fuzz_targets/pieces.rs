//! Fuzzes the decoders of an NVMe store, one piece at a time: `cargo +nightly fuzz run pieces fuzz/corpus/pieces fuzz/pieces`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    kvd_nvme::store::fuzzing::decoders(data);
});
