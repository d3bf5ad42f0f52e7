//! The canary: bytes that say where they belong, to prove that copies see a block as the framework does.
//!
//! The shim writes [`byte`] of every place into a block through the framework's own `[block, head, token, cell]` indexing and
//! packs the block; what comes out must be [`block`]. Then a block with another seed is unpacked, and read back through the
//! same indexing. It proves strides and order. It proves nothing about what the bytes of a cell mean.

use kvd_device::PartGeometry;

/// What stands at this place. Neighbours in every direction differ, and so do places that share a position in two of the
/// four directions. The shim computes the same with the framework's own arithmetic: see `kvdaemon/vllm/canary.py`.
pub fn byte(seed: u32, layer: u32, head: u32, token: u32, at: u32) -> u8 {
    let sum = u64::from(seed)
        + u64::from(layer) * 131
        + u64::from(head) * 37
        + u64::from(token) * 11
        + u64::from(at) * 3
        + (u64::from(token) * u64::from(at) + u64::from(layer) * u64::from(head)) % 17;
    (sum % 251) as u8
}

/// A packed block, `[layer][head][token][cell]`, with [`byte`] everywhere.
pub fn block(seed: u32, part: &PartGeometry) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(part.bytes());
    for layer in 0..part.layers {
        for head in 0..part.heads {
            for token in 0..part.tokens {
                for at in 0..part.cell_bytes {
                    bytes.push(byte(seed, layer, head, token, at));
                }
            }
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transposed_block_is_another_block() {
        let part = PartGeometry {
            layers: 3,
            heads: 2,
            tokens: 8,
            cell_bytes: 16,
        };
        let straight = block(1, &part);
        assert_eq!(straight.len(), part.bytes());
        assert_ne!(straight, block(2, &part));
        let mut swapped = Vec::new();
        for layer in 0..part.layers {
            for token in 0..part.tokens {
                for head in 0..part.heads {
                    for at in 0..part.cell_bytes {
                        swapped.push(byte(1, layer, head, token, at));
                    }
                }
            }
        }
        assert_ne!(straight, swapped);
    }
}
