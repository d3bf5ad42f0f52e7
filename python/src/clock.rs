//! The one place of this crate that reads a clock.

use std::sync::OnceLock;
use std::time::Instant;

/// Microseconds since the first call, on a monotonic clock.
#[allow(
    clippy::disallowed_methods,
    reason = "the halves take time as an argument; this is where it comes from"
)]
pub(crate) fn now_us() -> u64 {
    static START: OnceLock<Instant> = OnceLock::new();
    let now = Instant::now();
    let start = *START.get_or_init(|| now);
    now.saturating_duration_since(start).as_micros() as u64
}
