//! What an inference engine's connector does, without any engine in it: the half that lives beside the engine's scheduler
//! and the half that lives in each of its workers.
//!
//! The scheduler half ([`scheduler::Scheduler`]) asks the daemon what it holds, reserves slots and hands out orders; the worker
//! half ([`worker::Worker`]) copies. Orders travel from one to the other as opaque bytes ([`meta`]) with whatever the engine
//! itself sends to its workers, and reports travel back the same way. Nothing here knows Python, tensors or an engine's
//! classes: a thin shim in the engine's language translates its hooks into calls of these halves.

pub mod canary;
pub mod fleet;
pub mod meta;
pub mod notice;
pub mod observed;
pub mod record;
pub mod scheduler;
pub mod worker;

/// Bytes of a block hash.
pub const HASH_BYTES: usize = 32;
