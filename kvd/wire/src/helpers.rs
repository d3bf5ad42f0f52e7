//! Small constructors and checks that both ends of a session need. Nothing here knows what a message means.

use crate::session::{ErrorKind, Failure, Reply, Request};
use crate::session::{reply, request};

/// Length of a block hash, in bytes.
pub const HASH_BYTES: usize = 32;

/// A packed list of hashes whose length is no multiple of [`HASH_BYTES`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a list of hashes has {0} bytes: send 32 bytes for each hash")]
pub struct HashesError(pub usize);

/// The hashes in one packed `bytes` field, without a copy.
///
/// # Errors
/// When the length is no multiple of 32.
pub fn hashes(packed: &[u8]) -> Result<&[[u8; HASH_BYTES]], HashesError> {
    let (whole, rest) = packed.as_chunks::<HASH_BYTES>();
    if rest.is_empty() {
        Ok(whole)
    } else {
        Err(HashesError(packed.len()))
    }
}

/// A request with this body.
pub fn request(body: request::Body) -> Request {
    Request { body: Some(body) }
}

/// A reply with this body.
pub fn reply(body: reply::Body) -> Reply {
    Reply { body: Some(body) }
}

/// A reply that says why a request was not served. `text` is lower case and says what to do.
pub fn failure(kind: ErrorKind, text: impl Into<String>, ends_session: bool) -> Reply {
    reply(reply::Body::Failure(Failure {
        kind: kind.into(),
        text: text.into(),
        ends_session,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hashes_are_cast_in_place_or_refused() {
        let packed = [7u8; 64];
        let list = hashes(&packed).expect("two hashes");
        assert_eq!(list.len(), 2);
        assert_eq!(list.as_ptr().cast::<u8>(), packed.as_ptr());
        assert_eq!(hashes(&packed[..33]), Err(HashesError(33)));
        assert_eq!(hashes(&[]), Ok(&[][..]));
    }
}
