//! Copying and checking in one pass, over memory that others may write: the CRC-64/NVME of what was copied or seen, kept per KV head
//! over many runs.
//!
//! Two ways, chosen once: `fold.rs` where the machine has what it takes and runs are multiples of 16 bytes, else a copy in
//! steps that stay in the first-level caches with crc-fast over the **destination** of each step. Both give the standard checksum.

use crc_fast::CrcAlgorithm::Crc64Nvme;
use crc_fast::Digest;

#[cfg(target_arch = "x86_64")]
use crate::fold;

/// Bytes that are copied before they are read again for the checksum, where that takes two passes.
const STEP_BYTES: usize = 32 << 10;

/// How to copy and check; cheap to copy around.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Engine {
    /// One pass, 256-bit folding.
    #[cfg(target_arch = "x86_64")]
    Fold {
        /// Stores go past the caches.
        stream: bool,
    },
    /// Copy, then crc-fast.
    Portable,
}

/// The checksum of one head, so far. What the words mean is the engine's affair.
#[derive(Debug, Clone, Copy)]
pub struct State([u64; 2]);

impl Engine {
    /// The best for runs that are all multiples of `unit` bytes. `stream` asks for stores past the caches, where that is
    /// possible.
    pub fn new(unit: usize, stream: bool) -> Self {
        #[cfg(target_arch = "x86_64")]
        if unit.is_multiple_of(16) && fold::available() {
            return Self::Fold { stream };
        }
        let _ = (unit, stream);
        Self::Portable
    }

    /// The state of nothing yet.
    pub fn start(self) -> State {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Fold { .. } => State(fold::Remainder::new().0),
            Self::Portable => State([u64::MAX, 0]),
        }
    }

    /// The checksum of all that was taken into `state`.
    pub fn finish(self, state: State) -> u64 {
        match self {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: this engine exists only where the instructions do.
            Self::Fold { .. } => unsafe { fold::finish(fold::Remainder(state.0)) },
            Self::Portable => !state.0[0],
        }
    }

    /// Copies `len` bytes and takes what was written into `state`.
    ///
    /// # Safety
    /// `from..+len` is readable, `to..+len` is writable, they do not overlap, and `len` is a multiple of the engine's unit.
    pub unsafe fn copy(self, from: *const u8, to: *mut u8, len: usize, state: &mut State) {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Fold { stream } => {
                let mut remainder = fold::Remainder(state.0);
                // SAFETY: the caller's promise; this engine exists only where the instructions do.
                unsafe {
                    if stream && (to as usize).is_multiple_of(64) {
                        fold::run::<{ fold::STREAM }>(from, to, len, &mut remainder);
                    } else {
                        fold::run::<{ fold::COPY }>(from, to, len, &mut remainder);
                    }
                }
                state.0 = remainder.0;
            }
            Self::Portable => {
                let mut done = 0;
                while done < len {
                    let n = STEP_BYTES.min(len - done);
                    // SAFETY: done + n <= len, which the caller vouches for.
                    unsafe {
                        std::ptr::copy_nonoverlapping(from.add(done), to.add(done), n);
                        self.scan(to.add(done), n, state);
                    }
                    done += n;
                }
            }
        }
    }

    /// Takes `len` bytes into `state` without copying them.
    ///
    /// # Safety
    /// `from..+len` is readable and `len` is a multiple of the engine's unit.
    pub unsafe fn scan(self, from: *const u8, len: usize, state: &mut State) {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Fold { .. } => {
                let mut remainder = fold::Remainder(state.0);
                // SAFETY: the caller's promise; nothing is written when scanning.
                unsafe {
                    fold::run::<{ fold::SCAN }>(from, std::ptr::null_mut(), len, &mut remainder);
                }
                state.0 = remainder.0;
            }
            Self::Portable => {
                // SAFETY: readable by the caller's promise. Another process may write it meanwhile, which is why the
                // checksum exists: whatever value is read, the comparison later tells.
                let bytes = unsafe { std::slice::from_raw_parts(from, len) };
                let mut digest = Digest::new_with_init_state(Crc64Nvme, state.0[0]);
                digest.update(bytes);
                state.0[0] = !digest.finalize();
            }
        }
    }

    /// Takes these bytes into `state`.
    ///
    /// # Panics
    /// When they are no multiple of the engine's unit.
    pub fn take(self, bytes: &[u8], state: &mut State) {
        self.is_for(bytes.len());
        // SAFETY: readable as a slice is, and of the engine's unit.
        unsafe { self.scan(bytes.as_ptr(), bytes.len(), state) };
    }

    pub(crate) fn is_for(self, len: usize) {
        assert!(
            self == Self::Portable || len.is_multiple_of(16),
            "a run of {len} bytes for an engine of multiples of 16"
        );
    }

    /// Call after the last copy, before anybody is told of the bytes.
    pub fn fence(self) {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Fold { stream } => {
                if stream {
                    fold::fence();
                }
            }
            Self::Portable => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// CRC-64/NVME by its definition.
    fn reference(bytes: &[u8]) -> u64 {
        let mut crc = u64::MAX;
        for byte in bytes {
            crc ^= u64::from(*byte);
            for _ in 0..8 {
                crc = (crc >> 1) ^ (0x9a6c_9329_ac4b_c9b5 * (crc & 1));
            }
        }
        !crc
    }

    fn bytes(n: usize) -> Vec<u8> {
        let mut x = 1u64;
        (0..n)
            .map(|_| {
                x ^= x << 13;
                x ^= x >> 7;
                x ^= x << 17;
                (x >> 24) as u8
            })
            .collect()
    }

    #[test]
    fn it_is_the_standard_checksum() {
        assert_eq!(reference(b"123456789"), 0xae8b_1486_0a79_9888);
        let engine = Engine::new(1, false);
        let mut state = engine.start();
        // SAFETY: nine readable bytes.
        unsafe { engine.scan(b"123456789".as_ptr(), 9, &mut state) };
        assert_eq!(engine.finish(state), 0xae8b_1486_0a79_9888);
    }

    #[test]
    fn every_engine_agrees_however_the_bytes_are_cut() {
        let data = bytes(8192);
        let engines = [
            Engine::new(16, false),
            Engine::new(16, true),
            Engine::Portable,
        ];
        for engine in engines {
            for len in (0..1024).step_by(16).chain([2048, 4096 + 48, 8192]) {
                for cut in [16, 48, 112, 128, 144, 256, 1008, 8192] {
                    let mut to = vec![0u8; len + 128];
                    let mut copied = engine.start();
                    let mut scanned = engine.start();
                    for at in (0..len).step_by(cut) {
                        let n = cut.min(len - at);
                        // SAFETY: at + n <= len, which both buffers have.
                        unsafe {
                            engine.copy(
                                data.as_ptr().add(at),
                                to.as_mut_ptr().add(at),
                                n,
                                &mut copied,
                            );
                            engine.scan(data.as_ptr().add(at), n, &mut scanned);
                        }
                    }
                    engine.fence();
                    let expected = reference(&data[..len]);
                    assert_eq!(
                        engine.finish(copied),
                        expected,
                        "{engine:?} copy {len} by {cut}"
                    );
                    assert_eq!(
                        engine.finish(scanned),
                        expected,
                        "{engine:?} scan {len} by {cut}"
                    );
                    assert_eq!(to[..len], data[..len]);
                    assert!(to[len..].iter().all(|b| *b == 0), "wrote beyond");
                }
            }
        }
    }
}
