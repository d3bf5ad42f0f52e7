//! Frames: `u32 length of what follows (LE) | u32 request id (LE) | one protobuf message`.
//!
//! [`encode`] appends a frame to a buffer. [`Decoder`] takes bytes as they come off a stream and gives frames whose bodies
//! are slices of the receive buffer: nothing is copied, and the buffer is used again once a body has been dropped.
//!
//! The decoder trusts nobody. A length over the limit is refused before a byte is allocated for it, and a legal length
//! allocates nothing by itself: the buffer grows with the bytes that have come. File descriptors are deliberately absent.

use std::sync::Arc;

use bytes::Bytes;
use prost::Message;

/// Bytes before the body: length and request id.
pub const HEADER_BYTES: usize = 8;
/// What the decoder offers to read into at first, in bytes.
const FIRST_BYTES: usize = 16 << 10;
/// A buffer that grew beyond this is given back as soon as it is empty, in bytes.
const KEEP_BYTES: usize = 512 << 10;

/// A peer that does not keep to the framing. There is no way to find the next frame: the stream has to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The length field is over the limit.
    #[error("a frame of {length} bytes is over the limit of {limit}: send fewer hashes at a time")]
    TooLong {
        /// What the frame says of itself, in bytes.
        length: u32,
        /// The limit, in bytes.
        limit: u32,
    },
    /// The length field leaves no room for the request id.
    #[error("a frame of {length} bytes is too short to have a request id: this is no kvd session")]
    TooShort {
        /// What the frame says of itself, in bytes.
        length: u32,
    },
}

/// One frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// The request this is, or answers.
    pub id: u32,
    /// The protobuf message; a slice of the receive buffer.
    pub body: Bytes,
}

/// Appends a frame with this message to `out`.
///
/// The caller has made sure that the message is not longer than the other end accepts; see [`encoded_len`].
///
/// # Panics
/// When the message has 4 GiB or more.
pub fn encode(id: u32, message: &impl Message, out: &mut Vec<u8>) {
    let body = message.encoded_len();
    let length = u32::try_from(body + 4).expect("a message is shorter than 4 GiB");
    out.reserve(HEADER_BYTES + body);
    out.extend_from_slice(&length.to_le_bytes());
    out.extend_from_slice(&id.to_le_bytes());
    // A Vec grows, so the only error there is (no room) cannot come.
    message.encode(out).expect("a growing buffer has room");
}

/// What the length field of a frame with this message says, in bytes.
pub fn encoded_len(message: &impl Message) -> usize {
    message.encoded_len() + 4
}

/// Most fields of one message, an element of a packed list not counted.
pub const FIELDS: usize = 4096;

/// A message of very many small parts, or one that is cut off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FieldsError {
    /// Decoded, it would take many times its own size.
    #[error(
        "a message has more than {FIELDS} fields: send lists packed, and fewer chains or groups at a time"
    )]
    TooMany,
    /// It is no protobuf.
    #[error("a message is cut off or garbled: this is no kvd session")]
    Garbled,
}

/// Looks at the outline of a `Request` or `Reply` before it is decoded: one byte of a hostile message may else become a
/// hundred of decoded ones. Looks two levels deep, where all that can be repeated in these messages is.
///
/// # Errors
/// For messages that should not be decoded.
pub fn check_fields(body: &[u8]) -> Result<(), FieldsError> {
    let mut count = 0;
    let mut outer = body;
    while let Some((field, rest)) = take_field(outer)? {
        outer = rest;
        let mut inner = field.unwrap_or_default();
        count += 1;
        // What is no message inside may be the text of a field that only later versions know; decoding tells.
        while let Ok(Some((_, rest))) = take_field(inner) {
            inner = rest;
            count += 1;
            if count > FIELDS {
                return Err(FieldsError::TooMany);
            }
        }
    }
    if count > FIELDS {
        Err(FieldsError::TooMany)
    } else {
        Ok(())
    }
}

/// The first field's bytes, if it has a length, and what follows it. `None` at the end.
#[allow(clippy::type_complexity, reason = "one private function gives it")]
fn take_field(bytes: &[u8]) -> Result<Option<(Option<&[u8]>, &[u8])>, FieldsError> {
    if bytes.is_empty() {
        return Ok(None);
    }
    let (tag, rest) = take_varint(bytes)?;
    let skip = |n: usize| rest.get(n..).ok_or(FieldsError::Garbled);
    match tag & 7 {
        0 => Ok(Some((None, take_varint(rest)?.1))),
        1 => Ok(Some((None, skip(8)?))),
        2 => {
            let (length, rest) = take_varint(rest)?;
            let length = usize::try_from(length).map_err(|_| FieldsError::Garbled)?;
            let (field, rest) = rest.split_at_checked(length).ok_or(FieldsError::Garbled)?;
            Ok(Some((Some(field), rest)))
        }
        5 => Ok(Some((None, skip(4)?))),
        _ => Err(FieldsError::Garbled),
    }
}

fn take_varint(bytes: &[u8]) -> Result<(u64, &[u8]), FieldsError> {
    let mut value = 0;
    for (at, byte) in bytes.iter().enumerate().take(10) {
        value |= u64::from(byte & 0x7f) << (7 * at as u32).min(63);
        if byte & 0x80 == 0 {
            return Ok((value, &bytes[at + 1..]));
        }
    }
    Err(FieldsError::Garbled)
}

/// The receive buffer, shared with the bodies that were cut from it.
struct Shared(Arc<Vec<u8>>);

impl AsRef<[u8]> for Shared {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

/// Cuts a byte stream into frames.
///
/// ```
/// use kvd_wire::frame::{Decoder, encode};
/// use kvd_wire::session::Ping;
///
/// let mut sent = Vec::new();
/// encode(7, &Ping {}, &mut sent);
/// let mut decoder = Decoder::new(1 << 20);
/// let room = decoder.space();
/// room[..sent.len()].copy_from_slice(&sent);
/// decoder.filled(sent.len());
/// assert_eq!(decoder.next().unwrap().unwrap().id, 7);
/// assert!(decoder.next().unwrap().is_none());
/// ```
pub struct Decoder {
    limit: u32,
    /// Every byte is initialised: its length is its capacity. Shared only between `next` and the drop of the bodies.
    buffer: Arc<Vec<u8>>,
    /// Bodies are cut from this; made at the first frame after bytes came.
    view: Option<Bytes>,
    /// Bytes before this have been given out.
    start: usize,
    /// Bytes before this have come.
    end: usize,
}

impl std::fmt::Debug for Decoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Decoder")
            .field("limit", &self.limit)
            .field("pending", &self.pending())
            .field("allocated", &self.allocated())
            .finish()
    }
}

impl Decoder {
    /// A decoder that refuses frames whose length field is over `limit` bytes. Allocates when bytes are asked for.
    pub fn new(limit: u32) -> Self {
        Self {
            limit,
            buffer: Arc::new(Vec::new()),
            view: None,
            start: 0,
            end: 0,
        }
    }

    /// Changes the limit, from the next frame on: what `HelloReply.limits` said, in bytes.
    pub fn set_limit(&mut self, limit: u32) {
        self.limit = limit;
    }

    /// Room to read into; never empty. Call [`Decoder::filled`] with what came.
    ///
    /// Bodies that are still alive keep the old buffer to themselves, and a new one is taken.
    pub fn space(&mut self) -> &mut [u8] {
        self.view = None;
        let have = self.end - self.start;
        if Arc::get_mut(&mut self.buffer).is_none() {
            let mut fresh = vec![0; (2 * have).max(FIRST_BYTES)];
            fresh[..have].copy_from_slice(&self.buffer[self.start..self.end]);
            self.buffer = Arc::new(fresh);
            (self.start, self.end) = (0, have);
        }
        let buffer = Arc::get_mut(&mut self.buffer).expect("nobody else has this buffer");
        if have == 0 {
            (self.start, self.end) = (0, 0);
            if buffer.len() > KEEP_BYTES {
                *buffer = Vec::new();
            }
        }
        if self.start > 0 && buffer.len() - self.end < FIRST_BYTES / 2 {
            buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, have);
        }
        if self.end == buffer.len() {
            // Doubling: a frame takes at most twice the bytes that came for it, whatever its length field says.
            let grown = (2 * buffer.len()).max(FIRST_BYTES);
            buffer.reserve_exact(grown - buffer.len());
            buffer.resize(grown, 0);
        }
        &mut buffer[self.end..]
    }

    /// Says that the first `count` bytes of [`Decoder::space`] have come.
    ///
    /// # Panics
    /// When `space` was shorter than that.
    pub fn filled(&mut self, count: usize) {
        assert!(
            count <= self.buffer.len() - self.end,
            "more bytes than there was room for"
        );
        self.end += count;
    }

    /// The next whole frame, if it has come.
    ///
    /// # Errors
    /// When the peer does not keep to the framing. Every later call gives the same error.
    #[allow(
        clippy::should_implement_trait,
        reason = "it is no iterator: it goes on after `None`"
    )]
    pub fn next(&mut self) -> Result<Option<Frame>, FrameError> {
        let bytes = &self.buffer[self.start..self.end];
        let Some(length) = bytes.first_chunk::<4>().map(|b| u32::from_le_bytes(*b)) else {
            return Ok(None);
        };
        if length > self.limit {
            return Err(FrameError::TooLong {
                length,
                limit: self.limit,
            });
        }
        if length < 4 {
            return Err(FrameError::TooShort { length });
        }
        let whole = 4 + length as usize;
        if bytes.len() < whole {
            return Ok(None);
        }
        let id = u32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]);
        let body = self.start + HEADER_BYTES..self.start + whole;
        self.start += whole;
        if body.is_empty() {
            return Ok(Some(Frame {
                id,
                body: Bytes::new(),
            }));
        }
        let view = self
            .view
            .get_or_insert_with(|| Bytes::from_owner(Shared(Arc::clone(&self.buffer))));
        Ok(Some(Frame {
            id,
            body: view.slice(body),
        }))
    }

    /// Bytes that have come and belong to no frame that was given out.
    pub fn pending(&self) -> usize {
        self.end - self.start
    }

    /// Bytes that this decoder holds allocated.
    pub fn allocated(&self) -> usize {
        self.buffer.capacity()
    }

    /// Gives memory back when nothing is pending: for sessions that have gone quiet.
    pub fn shrink(&mut self) {
        if self.pending() == 0 {
            *self = Self::new(self.limit);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::{Chain, Lookup, Ping, Request, request};
    use proptest::prelude::*;

    fn feed(
        decoder: &mut Decoder,
        mut bytes: &[u8],
        out: &mut Vec<(u32, Vec<u8>)>,
    ) -> Result<(), FrameError> {
        while !bytes.is_empty() {
            let space = decoder.space();
            let n = space.len().min(bytes.len());
            space[..n].copy_from_slice(&bytes[..n]);
            decoder.filled(n);
            bytes = &bytes[n..];
            while let Some(frame) = decoder.next()? {
                out.push((frame.id, frame.body.to_vec()));
            }
        }
        Ok(())
    }

    #[test]
    fn a_long_length_is_refused_before_anything_is_allocated_for_it() {
        let mut decoder = Decoder::new(1 << 20);
        let mut got = Vec::new();
        let error =
            feed(&mut decoder, &u32::MAX.to_le_bytes(), &mut got).expect_err("over the limit");
        assert_eq!(
            error,
            FrameError::TooLong {
                length: u32::MAX,
                limit: 1 << 20
            }
        );
        assert!(decoder.allocated() <= FIRST_BYTES);
        assert_eq!(decoder.next(), Err(error), "and it stays refused");
    }

    #[test]
    fn a_legal_length_allocates_only_with_the_bytes_that_come() {
        let mut decoder = Decoder::new(4 << 20);
        let mut bytes = (4u32 << 20).to_le_bytes().to_vec();
        bytes.resize(40_000, 1);
        let mut got = Vec::new();
        feed(&mut decoder, &bytes, &mut got).expect("legal so far");
        assert!(got.is_empty());
        assert!(decoder.allocated() <= 2 * 40_000, "{}", decoder.allocated());
    }

    #[test]
    fn no_room_for_an_id_is_refused() {
        let mut decoder = Decoder::new(100);
        assert_eq!(
            feed(&mut decoder, &[3, 0, 0, 0], &mut Vec::new()),
            Err(FrameError::TooShort { length: 3 })
        );
    }

    #[test]
    fn hashes_are_slices_of_the_receive_buffer() {
        let hashes = Bytes::from(vec![9u8; 32 * 100]);
        let lookup = Lookup {
            chains: vec![Chain {
                hashes,
                ..Chain::default()
            }],
            ..Lookup::default()
        };
        let mut sent = Vec::new();
        encode(3, &crate::request(request::Body::Lookup(lookup)), &mut sent);
        let mut decoder = Decoder::new(1 << 20);
        decoder.space()[..sent.len()].copy_from_slice(&sent);
        decoder.filled(sent.len());
        let frame = decoder.next().expect("well formed").expect("whole");
        let inside = frame.body.as_ptr_range();
        let Some(request::Body::Lookup(got)) = Request::decode(frame.body).expect("decodes").body
        else {
            panic!("not a lookup");
        };
        assert!(inside.contains(&got.chains[0].hashes.as_ptr()));
        let before = decoder.buffer.as_ptr();
        drop(got);
        decoder.space();
        assert_eq!(
            decoder.buffer.as_ptr(),
            before,
            "the buffer is used again once the body is gone"
        );
    }

    #[test]
    fn a_body_that_is_kept_stays_what_it_was() {
        let mut decoder = Decoder::new(1 << 20);
        let mut sent = Vec::new();
        encode(
            1,
            &Chain {
                parent: Bytes::from_static(b"first"),
                ..Chain::default()
            },
            &mut sent,
        );
        decoder.space()[..sent.len()].copy_from_slice(&sent);
        decoder.filled(sent.len());
        let kept = decoder.next().expect("well formed").expect("whole").body;
        let copy = kept.to_vec();
        decoder.space().fill(0xff);
        assert_eq!(kept, copy);
    }

    #[test]
    fn a_buffer_that_grew_is_given_back() {
        let mut decoder = Decoder::new(4 << 20);
        let mut sent = Vec::new();
        encode(
            1,
            &Chain {
                parent: vec![1; 3 << 20].into(),
                ..Chain::default()
            },
            &mut sent,
        );
        let mut got = Vec::new();
        feed(&mut decoder, &sent, &mut got).expect("well formed");
        assert_eq!(got.len(), 1);
        decoder.space();
        assert!(decoder.allocated() <= KEEP_BYTES);
        decoder.shrink();
        assert_eq!(decoder.allocated(), 0);
    }

    proptest! {
        #[test]
        fn frames_come_out_as_they_went_in_however_the_stream_is_cut(
            frames in prop::collection::vec((any::<u32>(), prop::collection::vec(any::<u8>(), 0..40_000)), 0..8),
            cuts in prop::collection::vec(1usize..20_000, 1..40),
        ) {
            let mut sent = Vec::new();
            for (id, parent) in &frames {
                encode(*id, &Chain { parent: parent.clone().into(), ..Chain::default() }, &mut sent);
            }
            let mut decoder = Decoder::new(1 << 20);
            let mut got = Vec::new();
            let mut rest = &sent[..];
            for cut in cuts.iter().cycle() {
                if rest.is_empty() {
                    break;
                }
                let (now, later) = rest.split_at((*cut).min(rest.len()));
                feed(&mut decoder, now, &mut got).expect("well formed");
                rest = later;
            }
            prop_assert_eq!(decoder.pending(), 0);
            prop_assert_eq!(got.len(), frames.len());
            for ((id, body), (sent_id, parent)) in got.into_iter().zip(frames) {
                prop_assert_eq!(id, sent_id);
                prop_assert_eq!(Chain::decode(&body[..]).expect("decodes").parent, parent);
            }
        }

        #[test]
        fn any_bytes_are_frames_or_an_error_and_never_more_memory_than_they_need(
            bytes in prop::collection::vec(any::<u8>(), 0..4_000),
            limit in 4u32..100_000,
        ) {
            let mut decoder = Decoder::new(limit);
            let mut got = Vec::new();
            let _ = feed(&mut decoder, &bytes, &mut got);
            for (_, body) in got {
                prop_assert!(body.len() + 4 <= limit as usize);
                if Request::decode(&body[..]).is_ok() && check_fields(&body) == Err(FieldsError::Garbled) {
                    // Groups (wire types 3 and 4) are skipped by prost and refused here; nobody sends them.
                    prop_assert!(body.iter().any(|b| matches!(b & 7, 3 | 4)));
                }
            }
            prop_assert!(decoder.allocated() <= (2 * bytes.len()).max(FIRST_BYTES));
        }
    }

    #[test]
    fn a_message_of_very_many_parts_is_refused_before_it_is_decoded() {
        let body = |chains: usize, hashes: usize| {
            let chain = Chain {
                hashes: vec![0xff; 32 * hashes].into(),
                ..Chain::default()
            };
            let lookup = Lookup {
                chains: vec![chain; chains],
                ..Lookup::default()
            };
            crate::request(request::Body::Lookup(lookup)).encode_to_vec()
        };
        assert_eq!(check_fields(&body(256, 10)), Ok(()));
        assert_eq!(
            check_fields(&body(1, 65_536)),
            Ok(()),
            "a packed list is one field"
        );
        assert_eq!(
            check_fields(&body(FIELDS + 1, 0)),
            Err(FieldsError::TooMany)
        );
        let whole = body(2, 3);
        for cut in 1..whole.len() {
            assert!(check_fields(&whole[..cut]).is_err(), "cut at {cut}");
        }
        // Field 99, with a byte in it that is no message: of a later version.
        assert_eq!(check_fields(&[0x9a, 0x06, 0x01, 0x00]), Ok(()));
        assert_eq!(check_fields(&[]), Ok(()));
        assert_eq!(check_fields(&[0xff; 40]), Err(FieldsError::Garbled));
    }

    #[test]
    fn an_empty_message_is_a_frame() {
        let mut sent = Vec::new();
        encode(5, &Ping {}, &mut sent);
        assert_eq!(sent, [4, 0, 0, 0, 5, 0, 0, 0]);
        assert_eq!(encoded_len(&Ping {}), 4);
        let mut decoder = Decoder::new(16);
        let mut got = Vec::new();
        feed(&mut decoder, &sent, &mut got).expect("well formed");
        assert_eq!(got, [(5, Vec::new())]);
    }
}
