//! The namespace record: all that must agree for two blocks' bytes to be interchangeable.
//!
//! Canonical bytes: the magic, then every field in ascending order of its name as u32 LE length, name, u32 LE length, value.
//! There is one encoding of a record, so its BLAKE3 is a name for it. Deliberately absent: finding out what to put in it;
//! that is the connector's work.

use thiserror::Error;

use crate::geometry::{GeometryError, GroupGeometry, GroupKind};
use crate::hit::GroupRule;
use crate::ids::NamespaceId;

/// First bytes of every record: the format's name and version.
pub const MAGIC: &[u8] = b"kvd-ns-1\0";
/// Longest record, bytes.
pub const MAX_BYTES: usize = 64 << 10;
/// Most fields of a record.
pub const MAX_FIELDS: usize = 512;
/// Most KV-cache groups of a namespace.
pub const MAX_GROUPS: u32 = 64;

const REQUIRED: [&str; 8] = [
    "tenant",
    "model",
    "weights",
    "kv_dtype",
    "cell_encoding",
    "hash",
    "block_tokens",
    "groups",
];
const OPTIONAL: [&str; 11] = [
    "adapter",
    "scales",
    "rope",
    "overrides",
    "quantization",
    "compute_dtype",
    "speculative",
    "weights_epoch",
    "engine_build",
    "machine_isa",
    "rank_layout",
];
const GROUP_FIELDS: [&str; 8] = [
    "kind",
    "block_tokens",
    "layers",
    "heads",
    "cell_bytes",
    "window",
    "head_size",
    "layer_names",
];

/// Why a record is refused.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum RecordError {
    /// It does not begin with [`MAGIC`].
    #[error("not a namespace record of this format; encode it as kvd-ns-1")]
    Magic,
    /// It ends inside a field, or a length lies.
    #[error("the namespace record ends inside a field")]
    Truncated,
    /// More bytes or fields than allowed.
    #[error("the namespace record has {what} beyond the limit of {most}")]
    TooLarge {
        /// "bytes" or "fields".
        what: &'static str,
        /// The limit.
        most: usize,
    },
    /// Names are not in strictly ascending order, so the encoding is not canonical.
    #[error(
        "field '{0}' of the namespace record is out of order or given twice; sort fields by name"
    )]
    Order(String),
    /// A name or a value has characters that are not allowed.
    #[error(
        "a name or value of the namespace record near '{0}' is not plain UTF-8 text; remove control characters"
    )]
    Text(String),
    /// A field that this format does not know.
    #[error("unknown field '{0}' in the namespace record; begin private names with 'x.'")]
    Unknown(String),
    /// A required field is missing.
    #[error("the namespace record lacks the field '{0}'")]
    Missing(String),
    /// A value is not what its field needs.
    #[error("field '{field}' of the namespace record must be {wanted}")]
    Value {
        /// The field.
        field: String,
        /// What would be right.
        wanted: &'static str,
    },
    /// The sizes of a group are impossible.
    #[error("group {group} of the namespace record: {error}")]
    Geometry {
        /// Which group.
        group: u32,
        /// What is wrong with it.
        error: GeometryError,
    },
}

/// A field in which two records differ: its name and what each has (`None`: not there).
pub type Difference = (String, Option<String>, Option<String>);

/// A valid namespace record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamespaceRecord {
    fields: Vec<(String, String)>,
    groups: Vec<GroupGeometry>,
    rules: Vec<GroupRule>,
}

impl NamespaceRecord {
    /// Builds a record from fields in any order. The same rules as for [`Self::parse`].
    pub fn build<N: Into<String>, V: Into<String>>(
        fields: impl IntoIterator<Item = (N, V)>,
    ) -> Result<Self, RecordError> {
        let mut fields: Vec<(String, String)> = fields
            .into_iter()
            .map(|(n, v)| (n.into(), v.into()))
            .collect();
        fields.sort();
        Self::from_sorted(fields)
    }

    /// Reads canonical bytes. Anything that [`Self::encode`] could not have written is refused.
    pub fn parse(bytes: &[u8]) -> Result<Self, RecordError> {
        if bytes.len() > MAX_BYTES {
            return Err(RecordError::TooLarge {
                what: "bytes",
                most: MAX_BYTES,
            });
        }
        let mut rest = bytes.strip_prefix(MAGIC).ok_or(RecordError::Magic)?;
        let mut fields = Vec::new();
        while !rest.is_empty() {
            if fields.len() == MAX_FIELDS {
                return Err(RecordError::TooLarge {
                    what: "fields",
                    most: MAX_FIELDS,
                });
            }
            let name = take(&mut rest)?;
            let value = take(&mut rest)?;
            fields.push((name, value));
        }
        Self::from_sorted(fields)
    }

    fn from_sorted(fields: Vec<(String, String)>) -> Result<Self, RecordError> {
        if fields.len() > MAX_FIELDS {
            return Err(RecordError::TooLarge {
                what: "fields",
                most: MAX_FIELDS,
            });
        }
        if let Some(pair) = fields.windows(2).find(|pair| pair[0].0 >= pair[1].0) {
            return Err(RecordError::Order(pair[1].0.clone()));
        }
        for (name, value) in &fields {
            let plain = name.bytes().all(|b| b.is_ascii_graphic())
                && !value.chars().any(|c| c.is_ascii_control());
            if name.is_empty() || !plain {
                return Err(RecordError::Text(
                    name.chars().take(64).filter(|c| !c.is_control()).collect(),
                ));
            }
        }
        let mut record = NamespaceRecord {
            fields,
            groups: Vec::new(),
            rules: Vec::new(),
        };
        if record.encoded_len() > MAX_BYTES {
            return Err(RecordError::TooLarge {
                what: "bytes",
                most: MAX_BYTES,
            });
        }
        for name in REQUIRED {
            if record.get(name).is_none_or(str::is_empty) {
                return Err(RecordError::Missing(name.into()));
            }
        }
        let count = record.number("groups", MAX_GROUPS)?;
        let block_tokens = record.number("block_tokens", u32::MAX)?;
        if let Some((name, _)) = record.fields.iter().find(|(name, _)| !known(name, count)) {
            return Err(RecordError::Unknown(name.clone()));
        }
        for number in 0..count {
            let (geometry, rule) = record.group(number, block_tokens)?;
            record.groups.push(geometry);
            record.rules.push(rule);
        }
        Ok(record)
    }

    fn group(
        &self,
        group: u32,
        block_tokens: u32,
    ) -> Result<(GroupGeometry, GroupRule), RecordError> {
        let name = |field: &str| format!("group.{group}.{field}");
        let word = self
            .get(&name("kind"))
            .ok_or_else(|| RecordError::Missing(name("kind")))?;
        let kind = GroupKind::from_word(word).ok_or_else(|| RecordError::Value {
            field: name("kind"),
            wanted: "one of full, sliding_window, state, opaque",
        })?;
        let window = match self.get(&name("window")) {
            Some(_) => Some(self.number(&name("window"), u32::MAX)?),
            None if kind == GroupKind::SlidingWindow => {
                return Err(RecordError::Missing(name("window")));
            }
            None => None,
        };
        let span = match self.get(&name("block_tokens")) {
            Some(_) => self.number(&name("block_tokens"), u32::MAX)?,
            None => block_tokens,
        };
        let geometry = GroupGeometry {
            kind,
            layers: self.number(&name("layers"), u32::MAX)?,
            heads: self.number(&name("heads"), u32::MAX)?,
            block_tokens: kind.cells(span),
            cell_bytes: self.number(&name("cell_bytes"), u32::MAX)?,
            window,
        };
        geometry
            .validate()
            .map_err(|error| RecordError::Geometry { group, error })?;
        let rule = GroupRule::new(kind, span, window)
            .map_err(|error| RecordError::Geometry { group, error })?;
        Ok((geometry, rule))
    }

    /// A field that must be a decimal number from 1 to `most`, without leading zeros or signs.
    fn number(&self, field: &str, most: u32) -> Result<u32, RecordError> {
        let text = self
            .get(field)
            .ok_or_else(|| RecordError::Missing(field.into()))?;
        let canonical = !text.starts_with(['0', '+']);
        text.parse::<u32>()
            .ok()
            .filter(|n| canonical && *n <= most)
            .ok_or_else(|| RecordError::Value {
                field: field.into(),
                wanted: "a decimal number from 1 up to its limit, without leading zeros",
            })
    }

    /// The value of a field.
    pub fn get(&self, name: &str) -> Option<&str> {
        let at = self
            .fields
            .binary_search_by(|(field, _)| field.as_str().cmp(name))
            .ok()?;
        Some(&self.fields[at].1)
    }

    /// All fields, in ascending order of their names.
    pub fn fields(&self) -> &[(String, String)] {
        &self.fields
    }

    /// Geometry of every KV-cache group, by number.
    pub fn groups(&self) -> &[GroupGeometry] {
        &self.groups
    }

    /// What a hit needs of every KV-cache group, by number.
    pub fn rules(&self) -> &[GroupRule] {
        &self.rules
    }

    fn encoded_len(&self) -> usize {
        MAGIC.len()
            + self
                .fields
                .iter()
                .map(|(name, value)| 8 + name.len() + value.len())
                .sum::<usize>()
    }

    /// The canonical bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.encoded_len());
        bytes.extend_from_slice(MAGIC);
        for text in self.fields.iter().flat_map(|(name, value)| [name, value]) {
            bytes.extend_from_slice(&(text.len() as u32).to_le_bytes());
            bytes.extend_from_slice(text.as_bytes());
        }
        bytes
    }

    /// BLAKE3 of the canonical bytes.
    pub fn id(&self) -> NamespaceId {
        NamespaceId(*blake3::hash(&self.encode()).as_bytes())
    }
}

fn known(name: &str, groups: u32) -> bool {
    if name.starts_with("x.") || REQUIRED.contains(&name) || OPTIONAL.contains(&name) {
        return true;
    }
    let Some((number, field)) = name
        .strip_prefix("group.")
        .and_then(|rest| rest.split_once('.'))
    else {
        return false;
    };
    let canonical = number == "0" || !number.starts_with(['0', '+']);
    canonical && number.parse::<u32>().is_ok_and(|n| n < groups) && GROUP_FIELDS.contains(&field)
}

fn take(rest: &mut &[u8]) -> Result<String, RecordError> {
    let (length, after) = rest
        .split_first_chunk::<4>()
        .ok_or(RecordError::Truncated)?;
    let length = u32::from_le_bytes(*length) as usize;
    let (text, after) = after
        .split_at_checked(length)
        .ok_or(RecordError::Truncated)?;
    *rest = after;
    let text = std::str::from_utf8(text).map_err(|_| RecordError::Text(String::new()))?;
    Ok(text.to_owned())
}

/// The fields in which two records differ, in order of their names.
pub fn diff(a: &NamespaceRecord, b: &NamespaceRecord) -> Vec<Difference> {
    let (mut left, mut right) = (a.fields.iter().peekable(), b.fields.iter().peekable());
    let mut found = Vec::new();
    loop {
        let order = match (left.peek(), right.peek()) {
            (None, None) => return found,
            (Some(_), None) => std::cmp::Ordering::Less,
            (None, Some(_)) => std::cmp::Ordering::Greater,
            (Some(l), Some(r)) => l.0.cmp(&r.0),
        };
        let l = if order.is_le() { left.next() } else { None };
        let r = if order.is_ge() { right.next() } else { None };
        let value = |field: Option<&(String, String)>| field.map(|(_, value)| value.clone());
        if let Some((name, _)) = l.or(r).filter(|_| value(l) != value(r)) {
            found.push((name.clone(), value(l), value(r)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields() -> Vec<(&'static str, &'static str)> {
        vec![
            ("tenant", "default"),
            ("model", "m"),
            ("weights", "blake3:00"),
            ("kv_dtype", "bfloat16"),
            ("cell_encoding", "flash:1"),
            ("hash", "sha256_cbor:1f2e"),
            ("block_tokens", "16"),
            ("groups", "1"),
            ("group.0.kind", "full"),
            ("group.0.layers", "4"),
            ("group.0.heads", "2"),
            ("group.0.cell_bytes", "256"),
        ]
    }

    fn with(name: &'static str, value: &'static str) -> Result<NamespaceRecord, RecordError> {
        let mut all = fields();
        all.retain(|(n, _)| *n != name);
        all.push((name, value));
        NamespaceRecord::build(all)
    }

    #[test]
    fn encoding_round_trips_and_names_the_record() {
        let record = NamespaceRecord::build(fields()).unwrap();
        let again = NamespaceRecord::parse(&record.encode()).unwrap();
        assert_eq!(record, again);
        assert_eq!(record.id(), again.id());
        assert_ne!(record.id(), with("weights", "blake3:01").unwrap().id());
        assert_eq!(record.groups()[0].block_bytes(), 4 * 2 * 16 * 256);
        let mut reversed = fields();
        reversed.reverse();
        assert_eq!(NamespaceRecord::build(reversed).unwrap().id(), record.id());
    }

    #[test]
    fn only_canonical_bytes_parse() {
        let bytes = NamespaceRecord::build(fields()).unwrap().encode();
        for end in 0..bytes.len() {
            assert!(
                NamespaceRecord::parse(&bytes[..end]).is_err(),
                "cut at {end}"
            );
        }
        let mut lying = bytes.clone();
        lying[MAGIC.len()..MAGIC.len() + 4].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(NamespaceRecord::parse(&lying), Err(RecordError::Truncated));
        let mut twice = bytes.clone();
        twice.extend_from_slice(&bytes[MAGIC.len()..]);
        assert!(matches!(
            NamespaceRecord::parse(&twice),
            Err(RecordError::Order(_))
        ));
        assert_eq!(NamespaceRecord::parse(b""), Err(RecordError::Magic));
        assert!(NamespaceRecord::parse(&vec![0; MAX_BYTES + 1]).is_err());
    }

    #[test]
    fn bad_fields_are_refused_by_name() {
        for name in REQUIRED {
            assert!(with(name, "").is_err(), "{name}");
        }
        for number in ["0", "-1", "+1", "01", "1 ", "4294967296", "x"] {
            assert!(
                with(
                    "block_tokens",
                    Box::leak(number.to_string().into_boxed_str())
                )
                .is_err(),
                "{number}"
            );
        }
        assert!(matches!(
            with("groups", "65"),
            Err(RecordError::Value { .. })
        ));
        assert!(matches!(with("groups", "2"), Err(RecordError::Missing(_))));
        assert!(matches!(
            with("colour", "red"),
            Err(RecordError::Unknown(_))
        ));
        assert!(matches!(
            with("group.1.heads", "2"),
            Err(RecordError::Unknown(_))
        ));
        assert!(matches!(
            with("group.00.heads", "2"),
            Err(RecordError::Unknown(_))
        ));
        assert!(matches!(
            with("group.0.kind", "other"),
            Err(RecordError::Value { .. })
        ));
        assert!(matches!(
            with("group.0.kind", "sliding_window"),
            Err(RecordError::Missing(_))
        ));
        assert!(matches!(
            with("group.0.layers", "99999"),
            Err(RecordError::Geometry { .. })
        ));
        assert!(matches!(with("model", "a\nb"), Err(RecordError::Text(_))));
        assert!(with("x.note", "anything").is_ok());
        assert!(with("adapter", "blake3:9").is_ok());
        assert!(with("group.0.block_tokens", "0").is_err());
        assert!(with("group.0.block_tokens", "1048577").is_err());
    }

    #[test]
    fn a_group_may_span_other_tokens_and_a_state_is_one_cell() {
        let wide = with("group.0.block_tokens", "64").unwrap();
        assert_eq!(wide.groups()[0].block_tokens, 64);
        assert_eq!(wide.rules()[0].span(), 64);
        let mut state = fields();
        state[8].1 = "state";
        state.push(("group.0.block_tokens", "256"));
        let state = NamespaceRecord::build(state).unwrap();
        assert_eq!(state.groups()[0].block_bytes(), 4 * 2 * 256);
        assert_eq!(state.rules()[0].span(), 256);
    }

    #[test]
    fn diff_names_the_fields() {
        let a = NamespaceRecord::build(fields()).unwrap();
        let mut other = fields();
        other.push(("adapter", "blake3:9"));
        other[2].1 = "blake3:01";
        let b = NamespaceRecord::build(other).unwrap();
        let d = diff(&a, &b);
        assert_eq!(d[0], ("adapter".into(), None, Some("blake3:9".into())));
        assert_eq!(
            d[1],
            (
                "weights".into(),
                Some("blake3:00".into()),
                Some("blake3:01".into())
            )
        );
        assert_eq!(d.len(), 2);
        assert!(diff(&a, &a).is_empty());
        assert_eq!(diff(&b, &a)[0].1, Some("blake3:9".into()));
    }
}
