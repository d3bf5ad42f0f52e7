//! Fuzzes the start of an NVMe store on a device made of pieces: `cargo +nightly fuzz run device fuzz/corpus/device fuzz/device`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    kvd_nvme::store::fuzzing::device(data);
});
