//! What the fuzz target does with its bytes. `tests/frames.rs` does the same with a corpus, on stable.

use kvd_wire::frame::{Decoder, check_fields, encode};
use kvd_wire::session::{Reply, Request, reply, request};
use prost::Message;

/// Longest frame, as a daemon takes them.
const LIMIT: u32 = 1 << 20;

/// Reads the bytes as a stream that comes in pieces, as the daemon and the client do. The first byte says how large the
/// pieces are.
///
/// # Panics
/// When the decoder takes more memory than the bytes are worth, loses some, or decodes what it should have refused.
pub(crate) fn frames(data: &[u8]) {
    let Some((size, mut rest)) = data.split_first() else {
        return;
    };
    let mut decoder = Decoder::new(LIMIT);
    let mut seen = 0;
    while !rest.is_empty() {
        let space = decoder.space();
        let piece = (1 + usize::from(*size)).min(rest.len()).min(space.len());
        let (now, later) = rest.split_at(piece);
        space[..piece].copy_from_slice(now);
        decoder.filled(piece);
        rest = later;
        loop {
            match decoder.next() {
                Ok(Some(frame)) => {
                    assert!(
                        frame.body.len() + 4 <= LIMIT as usize,
                        "a frame over the limit"
                    );
                    seen += frame.body.len() + 8;
                    message(&frame.body);
                }
                Ok(None) => break,
                Err(_) => return,
            }
        }
        assert!(
            decoder.allocated() <= (2 * data.len()).max(16 << 10),
            "memory for bytes that have not come"
        );
    }
    assert_eq!(seen + decoder.pending(), data.len() - 1, "bytes were lost");
}

fn message(body: &[u8]) {
    if check_fields(body).is_err() {
        return;
    }
    if let Ok(request) = Request::decode(body) {
        for hashes in packed(&request) {
            let _ = kvd_wire::hashes(hashes);
        }
        again(&request);
    }
    if let Ok(reply) = Reply::decode(body) {
        if let Some(reply::Body::Lookup(found)) = &reply.body {
            assert!(found.chains.len() <= body.len());
        }
        again(&reply);
    }
}

fn packed(request: &Request) -> Vec<&[u8]> {
    match &request.body {
        Some(request::Body::Lookup(m)) => m.chains.iter().map(|c| &c.hashes[..]).collect(),
        Some(request::Body::Reserve(m)) => m.chains.iter().map(|c| &c.hashes[..]).collect(),
        Some(request::Body::Load(m)) => vec![&m.hashes],
        _ => Vec::new(),
    }
}

/// What was decoded is the same once encoded and decoded again.
fn again<M: Message + Default + PartialEq>(message: &M) {
    let mut bytes = Vec::new();
    encode(1, message, &mut bytes);
    let decoded = M::decode(&bytes[8..]).expect("what was encoded can be decoded");
    assert!(
        decoded == *message,
        "a message that changes when it is sent on"
    );
}
