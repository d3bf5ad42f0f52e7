//! Requests with many hashes, written straight into the send buffer: one copy of the packed hashes and nothing for each.
//!
//! The generated messages would have the caller make owned buffers first. Everything else goes through them.

use kvd_wire::frame::HEADER_BYTES;
use prost::encoding::{WireType, encode_key, encode_varint, encoded_len_varint, key_len};

use crate::session::ChainRef;

/// Numbers of `Request.body`.
const LOOKUP: u32 = 3;
const RESERVE: u32 = 4;
const LOAD: u32 = 7;

fn number_len(tag: u32, value: u64) -> usize {
    if value == 0 {
        0
    } else {
        key_len(tag) + encoded_len_varint(value)
    }
}

fn number(tag: u32, value: u64, out: &mut Vec<u8>) {
    if value != 0 {
        encode_key(tag, WireType::Varint, out);
        encode_varint(value, out);
    }
}

fn bytes_len(tag: u32, len: usize) -> usize {
    key_len(tag) + encoded_len_varint(len as u64) + len
}

fn opening(tag: u32, len: usize, out: &mut Vec<u8>) {
    encode_key(tag, WireType::LengthDelimited, out);
    encode_varint(len as u64, out);
}

fn bytes(tag: u32, value: &[u8], out: &mut Vec<u8>) {
    if !value.is_empty() {
        opening(tag, value.len(), out);
        out.extend_from_slice(value);
    }
}

fn optional_len(tag: u32, len: usize) -> usize {
    if len == 0 { 0 } else { bytes_len(tag, len) }
}

fn chain_len(chain: &ChainRef<'_>) -> usize {
    number_len(1, chain.group.into())
        + optional_len(2, chain.hashes.len())
        + optional_len(3, chain.parent.map_or(0, |p| p.len()))
}

fn chain(tag: u32, chain: &ChainRef<'_>, out: &mut Vec<u8>) {
    opening(tag, chain_len(chain), out);
    number(1, chain.group.into(), out);
    bytes(2, chain.hashes, out);
    bytes(3, chain.parent.map_or(&[], |p| &p[..]), out);
}

/// Header and opening of a request whose body has `len` bytes. Returns what the length field says.
fn frame(id: u32, tag: u32, len: usize, out: &mut Vec<u8>) -> usize {
    let whole = bytes_len(tag, len) + 4;
    out.reserve(whole + HEADER_BYTES);
    out.extend_from_slice(&(whole as u32).to_le_bytes());
    out.extend_from_slice(&id.to_le_bytes());
    opening(tag, len, out);
    whole
}

pub(crate) fn lookup(
    id: u32,
    namespace: u32,
    chains: &[ChainRef<'_>],
    lease_ms: u32,
    leading: bool,
    out: &mut Vec<u8>,
) -> usize {
    let len = number_len(1, namespace.into())
        + chains
            .iter()
            .map(|c| bytes_len(2, chain_len(c)))
            .sum::<usize>()
        + number_len(3, lease_ms.into())
        + number_len(4, leading.into());
    let whole = frame(id, LOOKUP, len, out);
    number(1, namespace.into(), out);
    for c in chains {
        chain(2, c, out);
    }
    number(3, lease_ms.into(), out);
    number(4, leading.into(), out);
    whole
}

pub(crate) fn reserve(id: u32, namespace: u32, of: &ChainRef<'_>, out: &mut Vec<u8>) -> usize {
    let len = number_len(1, namespace.into()) + bytes_len(2, chain_len(of));
    let whole = frame(id, RESERVE, len, out);
    number(1, namespace.into(), out);
    chain(2, of, out);
    whole
}

pub(crate) fn load(
    id: u32,
    namespace: u32,
    group: u32,
    hashes: &[u8],
    deadline_ms: u32,
    out: &mut Vec<u8>,
) -> usize {
    let len = number_len(1, namespace.into())
        + number_len(2, group.into())
        + optional_len(3, hashes.len())
        + number_len(4, deadline_ms.into());
    let whole = frame(id, LOAD, len, out);
    number(1, namespace.into(), out);
    number(2, group.into(), out);
    bytes(3, hashes, out);
    number(4, deadline_ms.into(), out);
    whole
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvd_wire::frame::encode;
    use kvd_wire::request;
    use kvd_wire::session::{Chain, Load, Lookup, Reserve, request::Body};

    fn generated(id: u32, body: Body) -> Vec<u8> {
        let mut out = Vec::new();
        encode(id, &request(body), &mut out);
        out
    }

    #[test]
    fn the_bytes_are_those_of_the_generated_messages() {
        let parent = [9u8; 32];
        let many = vec![7u8; 32 * 6250];
        for (namespace, group, hashes, parent, number, flag) in [
            (0, 0, &[][..], None, 0, false),
            (3, 1, &many[..], Some(&parent), 30_000, true),
            (u32::MAX, u32::MAX, &many[..32], None, u32::MAX, false),
        ] {
            let of = ChainRef {
                group,
                hashes,
                parent,
            };
            let message = Chain {
                group,
                hashes: hashes.to_vec().into(),
                parent: parent.map_or(Vec::new(), |p| p.to_vec()).into(),
            };
            let mut out = Vec::new();
            let whole = lookup(5, namespace, &[of, of], number, flag, &mut out);
            let body = Body::Lookup(Lookup {
                namespace,
                chains: vec![message.clone(), message.clone()],
                lease_ms: number,
                leading: flag,
                ..Lookup::default()
            });
            assert!(out == generated(5, body), "lookup");
            assert_eq!(whole + 4, out.len());

            out.clear();
            let whole = reserve(6, namespace, &of, &mut out);
            let body = Body::Reserve(Reserve {
                namespace,
                chains: vec![message.clone()],
            });
            assert!(out == generated(6, body), "reserve");
            assert_eq!(whole + 4, out.len());

            out.clear();
            let whole = load(7, namespace, group, hashes, number, &mut out);
            let body = Body::Load(Load {
                namespace,
                group,
                hashes: message.hashes,
                deadline_ms: number,
            });
            assert!(out == generated(7, body), "load");
            assert_eq!(whole + 4, out.len());
        }
    }
}
