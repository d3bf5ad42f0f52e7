//! What the two halves say to each other: the scheduler's orders of one step, a rank's report, and what a rank is
//! ([`RankHello`]). Protobuf, so that an addition does not break a half of another build; `version` says when it would.
//!
//! No block bytes, no token ids and no file descriptors travel here.

use prost::Message;

/// The version of these messages. Both halves come from one package, so another version is a broken installation.
pub const VERSION: u32 = 3;

/// A message of the other half that this half can't use.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MetaError {
    /// Not one of these messages.
    #[error(
        "connector metadata can't be read ({0}): install one version of kvdaemon in all processes of the engine"
    )]
    Malformed(String),
    /// Another version.
    #[error(
        "connector metadata has version {theirs}, expected {VERSION}: install one version of kvdaemon in all processes of the engine"
    )]
    Version {
        /// What it says.
        theirs: u32,
    },
}

/// The scheduler half's orders of one step, the same for every rank.
#[derive(Clone, PartialEq, Message)]
pub struct StepMeta {
    /// [`VERSION`].
    #[prost(uint32, tag = "1")]
    pub version: u32,
    /// Namespaces that the workers have not heard of yet.
    #[prost(message, repeated, tag = "2")]
    pub namespaces: Vec<NamespaceIntro>,
    /// Blocks to copy out, once this step's forward pass is over.
    #[prost(message, repeated, tag = "3")]
    pub stores: Vec<StoreOrder>,
    /// Blocks to copy in.
    #[prost(message, repeated, tag = "4")]
    pub loads: Vec<LoadOrder>,
    /// Finished requests: report each once, when no copy out of its blocks is under way.
    #[prost(string, repeated, tag = "5")]
    pub finish: Vec<String>,
    /// Requests whose blocks are taken away in this step: wait for the copies out of them before anything is overwritten.
    #[prost(string, repeated, tag = "6")]
    pub preempted: Vec<String>,
    /// Namespaces that nobody stores to or loads from any more.
    #[prost(uint32, repeated, tag = "7")]
    pub retired: Vec<u32>,
    /// Report your connection, whether or not it has changed: the scheduler half has another one.
    #[prost(bool, tag = "8")]
    pub report: bool,
    /// The scheduler half has failed, and these are its last orders: begin no store any more, and wait for those under way before
    /// anything is overwritten.
    #[prost(bool, tag = "9")]
    pub stop: bool,
}

/// A namespace, and how this engine instance cuts its blocks.
#[derive(Clone, PartialEq, Message)]
pub struct NamespaceIntro {
    /// The instance's own number for it.
    #[prost(uint32, tag = "1")]
    pub index: u32,
    /// Canonical record.
    #[prost(bytes = "vec", tag = "2")]
    pub record: Vec<u8>,
    /// One a KV-cache group.
    #[prost(message, repeated, tag = "3")]
    pub groups: Vec<GroupIntro>,
}

/// The cut of one group and who copies which part.
#[derive(Clone, PartialEq, Message)]
pub struct GroupIntro {
    /// Group number.
    #[prost(uint32, tag = "1")]
    pub group: u32,
    /// `0 = first < … < last = layers`.
    #[prost(uint32, repeated, tag = "2")]
    pub layer_bounds: Vec<u32>,
    /// `0 = first < … < last = heads`.
    #[prost(uint32, repeated, tag = "3")]
    pub head_bounds: Vec<u32>,
    /// Part of each rank, in rank order. Ranks with the same part are replicas.
    #[prost(uint32, repeated, tag = "4")]
    pub parts: Vec<u32>,
}

/// Copy these blocks of a request into these slots.
#[derive(Clone, PartialEq, Message)]
pub struct StoreOrder {
    /// Number to report it by, once for each group.
    #[prost(uint64, tag = "1")]
    pub order: u64,
    /// Whose blocks.
    #[prost(string, tag = "2")]
    pub request: String,
    /// Index of the namespace.
    #[prost(uint32, tag = "3")]
    pub namespace: u32,
    /// Of these KV-cache groups,
    #[prost(uint32, repeated, tag = "4")]
    pub groups: Vec<u32>,
    /// and of each so many blocks, one group's after another's.
    #[prost(uint32, repeated, tag = "12")]
    pub counts: Vec<u32>,
    /// 32 bytes a block; empty where no two ranks hold the same part. Those that do take turns by them.
    #[prost(bytes = "vec", tag = "5")]
    pub hashes: Vec<u8>,
    /// A [`StoreEntry`] for each block.
    #[prost(bytes = "vec", tag = "6")]
    pub entries: Vec<u8>,
    /// The connection of each rank, as it last reported it, when the slots were reserved. A rank with another one is no
    /// writer of these slots and must not touch them.
    #[prost(uint64, repeated, tag = "10")]
    pub epochs: Vec<u64>,
    /// Names the start of the daemon that gave the slots. Another may have given the same slots under the same generations
    /// to somebody else.
    #[prost(bytes = "vec", tag = "11")]
    pub incarnation: Vec<u8>,
}

/// A block of a [`StoreOrder`]. In bytes, as it stands there: these fields in this order, little-endian, [`StoreEntry::BYTES`] in all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StoreEntry {
    /// The engine's number of the block.
    pub block: u32,
    /// Where its bytes go.
    pub slot: u32,
    /// Of the slot.
    pub generation: u64,
    /// Of the slot, in bytes from the start of the arena.
    pub offset: u64,
}

/// Copy these stored blocks into these blocks of the engine.
#[derive(Clone, PartialEq, Message)]
pub struct LoadOrder {
    /// Whose blocks.
    #[prost(string, tag = "1")]
    pub request: String,
    /// Index of the namespace.
    #[prost(uint32, tag = "2")]
    pub namespace: u32,
    /// Group number.
    #[prost(uint32, tag = "3")]
    pub group: u32,
    /// 32 bytes a block.
    #[prost(bytes = "vec", tag = "4")]
    pub hashes: Vec<u8>,
    /// The engine's block numbers.
    #[prost(uint32, repeated, tag = "5")]
    pub blocks: Vec<u32>,
}

/// What a rank tells the scheduler half, in steps in which it has something to tell.
#[derive(Clone, PartialEq, Message)]
pub struct RankReport {
    /// [`VERSION`].
    #[prost(uint32, tag = "1")]
    pub version: u32,
    /// Who.
    #[prost(uint32, tag = "2")]
    pub rank: u32,
    /// Number of its connection to the daemon; 0: none.
    #[prost(uint64, tag = "3")]
    pub epoch: u64,
    /// Namespaces that this connection has registered.
    #[prost(uint32, repeated, tag = "4")]
    pub registered: Vec<u32>,
    /// Store orders that are over, copied or given up: each once for each of its groups.
    #[prost(uint64, repeated, tag = "5")]
    pub done: Vec<u64>,
    /// Who it is, until the scheduler half has been told by other means.
    #[prost(message, optional, tag = "6")]
    pub hello: Option<RankHello>,
    /// Counters since the start: see [`crate::worker::Counters`].
    #[prost(uint64, repeated, tag = "7")]
    pub counters: Vec<u64>,
}

/// What a rank holds of each block and how its bytes are laid. Found out by the rank itself.
#[derive(Clone, PartialEq, Message)]
pub struct RankHello {
    /// [`VERSION`].
    #[prost(uint32, tag = "1")]
    pub version: u32,
    /// Rank among all workers of the instance.
    #[prost(uint32, tag = "2")]
    pub rank: u32,
    /// Number of workers.
    #[prost(uint32, tag = "3")]
    pub world: u32,
    /// Pipeline stage.
    #[prost(uint32, tag = "4")]
    pub stage: u32,
    /// Why this rank neither stores nor loads; empty: it does.
    #[prost(string, tag = "5")]
    pub refusal: String,
    /// Cell encoding id.
    #[prost(string, tag = "6")]
    pub encoding: String,
    /// The KV scales of this rank's layers as text, layers in order, joined by semicolons; empty: none.
    #[prost(string, tag = "7")]
    pub scales: String,
    /// One a KV-cache group.
    #[prost(message, repeated, tag = "8")]
    pub groups: Vec<RankGroup>,
    /// The machine it runs on: ranks on several share no daemon.
    #[prost(string, tag = "9")]
    pub machine: String,
}

/// A rank's share of one group.
#[derive(Clone, PartialEq, Message)]
pub struct RankGroup {
    /// Group number.
    #[prost(uint32, tag = "1")]
    pub group: u32,
    /// `full`, `sliding_window`, `state` or `opaque`.
    #[prost(string, tag = "2")]
    pub kind: String,
    /// Layers of this rank.
    #[prost(uint32, tag = "3")]
    pub layers: u32,
    /// Names of those layers, in order.
    #[prost(string, repeated, tag = "4")]
    pub layer_names: Vec<String>,
    /// First KV head of this rank.
    #[prost(uint32, tag = "5")]
    pub head_first: u32,
    /// KV heads of this rank.
    #[prost(uint32, tag = "6")]
    pub heads: u32,
    /// KV heads of all ranks of a stage together.
    #[prost(uint32, tag = "7")]
    pub heads_total: u32,
    /// Tokens that a block spans.
    #[prost(uint32, tag = "8")]
    pub block_tokens: u32,
    /// Tokens of one page of the KV cache; divides `block_tokens`. 1 for a state, of which a block is one page.
    #[prost(uint32, tag = "9")]
    pub page_tokens: u32,
    /// Bytes of one head of one token, K and V; or of one state.
    #[prost(uint32, tag = "10")]
    pub cell_bytes: u32,
    /// Tokens that a token of a sliding-window group looks at, itself included; 0: it has no window.
    #[prost(uint32, tag = "11")]
    pub window: u32,
}

/// Reads a message of the other half and checks its version.
///
/// # Errors
/// When the bytes are no such message, or one of another version.
pub fn decode<M: Message + Default + Versioned>(bytes: &[u8]) -> Result<M, MetaError> {
    let message = M::decode(bytes).map_err(|error| MetaError::Malformed(error.to_string()))?;
    match message.version() {
        VERSION => Ok(message),
        theirs => Err(MetaError::Version { theirs }),
    }
}

/// A message that says its version.
pub trait Versioned {
    /// The version it says.
    fn version(&self) -> u32;
}

impl Versioned for StepMeta {
    fn version(&self) -> u32 {
        self.version
    }
}

impl Versioned for RankReport {
    fn version(&self) -> u32 {
        self.version
    }
}

impl Versioned for RankHello {
    fn version(&self) -> u32 {
        self.version
    }
}

impl RankHello {
    /// Whether a load that lacks one block has brought nothing that can be used: only a single group of full attention can be used up
    /// to that block.
    pub fn fails_as_a_whole(&self) -> bool {
        self.groups.len() > 1 || self.groups.iter().any(|group| group.kind != "full")
    }
}

impl StoreEntry {
    /// Of one entry.
    pub const BYTES: usize = 24;
}

impl StoreOrder {
    /// Adds a block at the end.
    pub fn push(&mut self, entry: StoreEntry) {
        self.entries.extend_from_slice(&entry.block.to_le_bytes());
        self.entries.extend_from_slice(&entry.slot.to_le_bytes());
        self.entries
            .extend_from_slice(&entry.generation.to_le_bytes());
        self.entries.extend_from_slice(&entry.offset.to_le_bytes());
    }

    /// How many blocks there are.
    pub fn blocks(&self) -> usize {
        self.entries.len() / StoreEntry::BYTES
    }

    /// The block at this position, if there are so many.
    pub fn entry(&self, at: usize) -> Option<StoreEntry> {
        let (entries, _) = self.entries.as_chunks::<{ StoreEntry::BYTES }>();
        let (words, _) = entries.get(at)?.as_chunks::<4>();
        let word = |at: usize| u32::from_le_bytes(words[at]);
        let double = |at: usize| u64::from(word(at)) | u64::from(word(at + 1)) << 32;
        Some(StoreEntry {
            block: word(0),
            slot: word(1),
            generation: double(2),
            offset: double(4),
        })
    }

    /// All blocks.
    #[cfg(test)]
    pub(crate) fn all(&self) -> impl Iterator<Item = StoreEntry> {
        (0..self.blocks()).filter_map(|at| self.entry(at))
    }

    /// Of each group, where its blocks are among all.
    pub fn parts(&self) -> impl Iterator<Item = (u32, std::ops::Range<usize>)> {
        let mut end = 0;
        self.groups
            .iter()
            .zip(&self.counts)
            .map(move |(group, count)| {
                let begin = end;
                end += *count as usize;
                (*group, begin..end)
            })
    }
}

impl StepMeta {
    /// Whether the step has no orders.
    pub fn is_empty(&self) -> bool {
        self.namespaces.is_empty()
            && self.stores.is_empty()
            && self.loads.is_empty()
            && self.finish.is_empty()
            && self.preempted.is_empty()
            && self.retired.is_empty()
            && !self.report
            && !self.stop
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_version_is_refused() {
        let bytes = StepMeta {
            version: VERSION + 1,
            ..StepMeta::default()
        }
        .encode_to_vec();
        assert_eq!(
            decode::<StepMeta>(&bytes),
            Err(MetaError::Version {
                theirs: VERSION + 1
            })
        );
        assert!(matches!(
            decode::<StepMeta>(&[0xff, 0xff]),
            Err(MetaError::Malformed(_))
        ));
    }

    #[test]
    fn entries_are_read_as_they_were_written() {
        let entry = |n: u32| StoreEntry {
            block: n,
            slot: u32::MAX - n,
            generation: 1 << 40 | u64::from(n),
            offset: u64::MAX - u64::from(n),
        };
        let mut order = StoreOrder {
            groups: vec![4, 2],
            counts: vec![1, 2],
            ..StoreOrder::default()
        };
        (0..3).for_each(|n| order.push(entry(n)));
        let back = StoreOrder::decode(order.encode_to_vec().as_slice()).unwrap();
        assert_eq!(back.all().collect::<Vec<_>>(), [0, 1, 2].map(entry));
        assert_eq!(back.parts().collect::<Vec<_>>(), [(4, 0..1), (2, 1..3)]);
        order.entries.truncate(50);
        assert_eq!((order.blocks(), order.entry(2)), (2, None));
    }

    #[test]
    fn an_empty_step_is_two_bytes() {
        let meta = StepMeta {
            version: VERSION,
            ..StepMeta::default()
        };
        assert!(meta.is_empty());
        assert_eq!(meta.encode_to_vec().len(), 2);
    }
}
