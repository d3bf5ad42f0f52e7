//! CRC-64/NVME as arithmetic: polynomials over GF(2) modulo the checksum's, lowest bit first (bit 63 is x^0).
//!
//! With w_0 to w_(n-1) the little-endian words of 8 bytes of some bytes, the first one inverted, the checksum is the inverse of
//! the sum of w_i * x^(64 * (n - i)). So words may be summed in any order and by anybody, as long as each is moved by its
//! distance from the end.

/// The checksum's polynomial (reveng's catalogue, CRC-64/NVME), lowest bit first.
const POLYNOMIAL: u64 = 0x9a6c_9329_ac4b_c9b5;
/// x^0.
pub(crate) const ONE: u64 = 1 << 63;

/// x^64: what is left of it.
pub(crate) const X64: u64 = times_x(1);

const fn times_x(a: u64) -> u64 {
    (a >> 1) ^ (POLYNOMIAL & (a & 1).wrapping_neg())
}

/// The product of two polynomials.
pub(crate) fn multiply(mut a: u64, b: u64) -> u64 {
    let mut product = 0;
    for bit in (0..64).rev() {
        product ^= a & (b >> bit & 1).wrapping_neg();
        a = times_x(a);
    }
    product
}

/// x^(64 * words).
pub(crate) fn shift(mut words: u64) -> u64 {
    let mut square = X64;
    let mut power = ONE;
    while words > 0 {
        if words & 1 == 1 {
            power = multiply(power, square);
        }
        square = multiply(square, square);
        words >>= 1;
    }
    power
}

/// For each byte of a word, its 256 products with `factor`: the product of a word is the sum of eight of them.
pub(crate) fn products(factor: u64) -> Vec<u64> {
    let bit: Vec<u64> = (0..64).map(|bit| multiply(1 << bit, factor)).collect();
    let of = |byte: usize, value: usize| {
        let bits = (0..8).filter(|b| value >> b & 1 == 1);
        bits.fold(0, |sum, b| sum ^ bit[byte * 8 + b])
    };
    (0..8 * 256).map(|i| of(i / 256, i % 256)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_of_moved_words_are_the_checksum() {
        let engine = kvd_arena::checksum::Engine::new(8, false);
        for words in [1, 2, 31, 32, 33, 1000] {
            let bytes: Vec<u8> = (0..words * 8).map(|i| (i * i + 7 * i) as u8).collect();
            let mut state = engine.start();
            engine.take(&bytes, &mut state);
            let sum = bytes
                .as_chunks()
                .0
                .iter()
                .enumerate()
                .fold(0, |sum, (i, word)| {
                    let word = u64::from_le_bytes(*word) ^ if i == 0 { u64::MAX } else { 0 };
                    sum ^ multiply(word, shift((words - i) as u64))
                });
            assert_eq!(!sum, engine.finish(state), "{words} words");
        }
    }

    #[test]
    fn products_add_up() {
        let factor = shift(32);
        let table = products(factor);
        let word = 0x0123_4567_89ab_cdef_u64;
        let sum = (0..8).fold(0, |sum, byte| {
            sum ^ table[byte * 256 + (word >> (8 * byte) & 255) as usize]
        });
        assert_eq!(sum, multiply(word, factor));
        assert_eq!(multiply(word, ONE), word);
        assert_eq!(multiply(shift(5), shift(7)), shift(12));
    }
}
