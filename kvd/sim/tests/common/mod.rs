//! What the simulator's tests share: long runs and fresh seeds.

/// True in long runs.
pub(crate) fn soak() -> bool {
    std::env::var("KVD_TEST_SOAK").is_ok_and(|v| v == "1")
}

/// A seed to begin with: `KVD_SIM_SEED`, else one that nobody has had.
pub(crate) fn fresh_seed() -> u64 {
    match std::env::var("KVD_SIM_SEED") {
        Ok(text) => text.parse().expect("KVD_SIM_SEED is a number"),
        Err(_) => kvd_sim::fresh_seed(),
    }
}
