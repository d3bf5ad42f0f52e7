//! CRC-64/NVME by folding with 256-bit carry-less multiplication, in the same pass that copies the bytes.
//!
//! Why not crc-fast alone: it needs AVX-512 for its wide path (10 GB/s a core without, slower than the copy it follows), it
//! reads the copied bytes a second time, and a call for one short run costs more than the run. Here every byte is loaded
//! once, folded and stored from the same register, so what is checked is what was written even when somebody else changes
//! the source meanwhile; and what is kept between runs is the unreduced remainder, so runs can be as short as 16 bytes.
//!
//! Deliberately absent: runs that are no multiple of 16 bytes, and other machines; `checksum.rs` uses crc-fast for those.
//!
//! How it works. A 16-byte piece is a polynomial A = lo * x^64 + hi (bit 0 of a word is its highest power: the CRC is
//! reflected). Going on by D bits is A * x^D mod P, which is congruent to lo * (x^(D+64) mod P) + hi * (x^D mod P): two
//! carry-less multiplications. (One product of reflected words comes out one power too low, so the constants are those of
//! D + 63 and D - 1.)

use std::arch::x86_64::*;

/// The polynomial, reflected.
const POLY: u64 = 0x9a6c_9329_ac4b_c9b5;

/// x^n mod P, reflected.
const fn power(n: u32) -> u64 {
    let mut word = 1u64 << 63;
    let mut i = 0;
    while i < n {
        word = (word >> 1) ^ (if word & 1 == 1 { POLY } else { 0 });
        i += 1;
    }
    word
}

/// The two factors that carry a 16-byte piece on by `bits`: for its first and for its second word.
const fn factors(bits: u32) -> [u64; 2] {
    [power(bits + 63), power(bits - 1)]
}

/// What to begin with: the register of ones, taken back by 8 bytes, because folding the first piece carries it on by 16.
const START: u64 = {
    let mut word = u64::MAX;
    let mut i = 0;
    while i < 64 {
        // x^-1: undo one step of `power`.
        word = if word >> 63 == 1 {
            ((word ^ POLY) << 1) | 1
        } else {
            word << 1
        };
        i += 1;
    }
    word
};

const BY_8: u64 = power(127);
const BY_16: [u64; 2] = factors(128);
const BY_32: [u64; 2] = factors(256);
const BY_64: [u64; 2] = factors(512);
const BY_96: [u64; 2] = factors(768);
const BY_128: [u64; 2] = factors(1024);

/// The unreduced remainder of what was seen so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Remainder(pub(crate) [u64; 2]);

impl Remainder {
    pub(crate) const fn new() -> Self {
        Self([0, START])
    }
}

/// The checksum: the remainder times x^64, reduced (Barrett), ones added.
#[target_feature(enable = "pclmulqdq,sse2")]
pub(crate) fn finish(remainder: Remainder) -> u64 {
    let [lo, hi] = remainder.0;
    // lo * x^128 + hi * x^64, as two words again.
    let [first, second] = multiply(lo, BY_8);
    let (first, second) = (first ^ hi, second);
    // first * x^64 mod P. Products of reflected words come out one bit low.
    let quotient = first ^ (multiply(first, QUOTIENT)[0] << 1);
    let [low, high] = multiply(quotient, POLY);
    !(second ^ (low >> 63 | high << 1))
}

/// Carry-less product.
#[inline]
#[target_feature(enable = "pclmulqdq,sse2")]
fn multiply(a: u64, b: u64) -> [u64; 2] {
    let product =
        _mm_clmulepi64_si128::<0x00>(_mm_set_epi64x(0, a as i64), _mm_set_epi64x(0, b as i64));
    let high = _mm_unpackhi_epi64(product, product);
    [
        _mm_cvtsi128_si64(product) as u64,
        _mm_cvtsi128_si64(high) as u64,
    ]
}

/// floor(x^128 / P) without its highest term, reflected.
const QUOTIENT: u64 = {
    let (mut rest, mut quotient, mut bit) = (POLY, 0, 0);
    while bit < 64 {
        quotient |= (rest & 1) << bit;
        rest = (rest >> 1) ^ (if rest & 1 == 1 { POLY } else { 0 });
        bit += 1;
    }
    quotient
};

/// Whether this machine has what [`run`] needs.
pub(crate) fn available() -> bool {
    is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("vpclmulqdq")
        && is_x86_feature_detected!("pclmulqdq")
}

/// Where the bytes of a run go.
pub(crate) const SCAN: u8 = 0;
pub(crate) const COPY: u8 = 1;
pub(crate) const STREAM: u8 = 2;

#[inline]
#[target_feature(enable = "pclmulqdq,sse2")]
fn fold128(x: __m128i, k: __m128i) -> __m128i {
    _mm_xor_si128(
        _mm_clmulepi64_si128::<0x00>(x, k),
        _mm_clmulepi64_si128::<0x11>(x, k),
    )
}

#[inline]
#[target_feature(enable = "avx2,vpclmulqdq")]
fn fold256(x: __m256i, k: __m256i) -> __m256i {
    _mm256_xor_si256(
        _mm256_clmulepi64_epi128::<0x00>(x, k),
        _mm256_clmulepi64_epi128::<0x11>(x, k),
    )
}

#[inline]
#[target_feature(enable = "avx2")]
fn both(k: [u64; 2]) -> __m256i {
    _mm256_set_epi64x(k[1] as i64, k[0] as i64, k[1] as i64, k[0] as i64)
}

#[inline]
#[target_feature(enable = "sse2")]
fn one(k: [u64; 2]) -> __m128i {
    _mm_set_epi64x(k[1] as i64, k[0] as i64)
}

/// Loads 32 bytes and stores them where `MODE` says.
///
/// # Safety
/// `from..+32` readable, and unless scanning `to..+32` writable; when streaming `to` is a multiple of 32.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn take<const MODE: u8>(from: *const u8, to: *mut u8) -> __m256i {
    // SAFETY: the caller's promise.
    unsafe {
        let piece = _mm256_loadu_si256(from.cast());
        match MODE {
            COPY => _mm256_storeu_si256(to.cast(), piece),
            STREAM => _mm256_stream_si256(to.cast(), piece),
            _ => {}
        }
        piece
    }
}

/// Copies (or only reads) `len` bytes, a multiple of 16, and takes them into `remainder`. With `STREAM` the stores go past
/// the caches: `to` must be a multiple of 64, and the caller fences before anybody is told.
///
/// # Safety
/// `from..+len` is readable, `to..+len` writable unless `MODE` is `SCAN`, they do not overlap, and [`available`] said yes.
#[target_feature(enable = "avx2,vpclmulqdq,pclmulqdq")]
pub(crate) unsafe fn run<const MODE: u8>(
    mut from: *const u8,
    mut to: *mut u8,
    mut len: usize,
    remainder: &mut Remainder,
) {
    let mut acc = one(remainder.0);
    let by_16 = one(BY_16);
    if len >= 128 {
        let by_128 = both(BY_128);
        ahead(from);
        // SAFETY: len >= 128, so four pieces of 32 bytes are inside what the caller promised.
        let [mut a, mut b, mut c, mut d] = unsafe { take4::<MODE>(from, to) };
        a = _mm256_xor_si256(a, _mm256_zextsi128_si256(fold128(acc, by_16)));
        len -= 128;
        from = from.wrapping_add(128);
        to = to.wrapping_add(128);
        while len >= 128 {
            ahead(from);
            // SAFETY: as above.
            let [e, f, g, h] = unsafe { take4::<MODE>(from, to) };
            a = _mm256_xor_si256(fold256(a, by_128), e);
            b = _mm256_xor_si256(fold256(b, by_128), f);
            c = _mm256_xor_si256(fold256(c, by_128), g);
            d = _mm256_xor_si256(fold256(d, by_128), h);
            len -= 128;
            from = from.wrapping_add(128);
            to = to.wrapping_add(128);
        }
        let ab = _mm256_xor_si256(fold256(a, both(BY_96)), fold256(b, both(BY_64)));
        let cd = _mm256_xor_si256(fold256(c, both(BY_32)), d);
        let all = _mm256_xor_si256(ab, cd);
        acc = _mm_xor_si128(
            fold128(_mm256_castsi256_si128(all), by_16),
            _mm256_extracti128_si256::<1>(all),
        );
    }
    while len >= 16 {
        // SAFETY: len >= 16, so 16 bytes are inside what the caller promised.
        let piece = unsafe {
            let piece = _mm_loadu_si128(from.cast());
            if MODE != SCAN {
                _mm_storeu_si128(to.cast(), piece);
            }
            piece
        };
        acc = _mm_xor_si128(fold128(acc, by_16), piece);
        len -= 16;
        from = from.wrapping_add(16);
        to = to.wrapping_add(16);
    }
    assert_eq!(len, 0, "runs are multiples of 16 bytes");
    // SAFETY: two words hold 16 bytes.
    unsafe { _mm_storeu_si128(remainder.0.as_mut_ptr().cast(), acc) };
}

/// Prefetches what 128 bytes from `from` on will be followed by.
#[inline]
#[target_feature(enable = "sse2")]
fn ahead(from: *const u8) {
    _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(PREFETCH).cast());
    _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(PREFETCH + 64).cast());
}

/// How far ahead of the loads to prefetch, in bytes: into the next page, where the machine's own prefetchers stop. What lies
/// there is usually the next run.
const PREFETCH: usize = 4096;

/// # Safety
/// As [`take`], for 128 bytes.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn take4<const MODE: u8>(from: *const u8, to: *mut u8) -> [__m256i; 4] {
    // SAFETY: the caller's promise, 32 bytes at a time.
    unsafe {
        [
            take::<MODE>(from, to),
            take::<MODE>(from.wrapping_add(32), to.wrapping_add(32)),
            take::<MODE>(from.wrapping_add(64), to.wrapping_add(64)),
            take::<MODE>(from.wrapping_add(96), to.wrapping_add(96)),
        ]
    }
}

/// Makes streamed stores visible before anything that follows.
pub(crate) fn fence() {
    // SAFETY: sfence has no preconditions; SSE is part of x86-64.
    unsafe { _mm_sfence() };
}
