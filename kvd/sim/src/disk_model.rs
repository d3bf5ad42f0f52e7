//! What a store must remember: every place, what was written there, and how sure that is. Stands in for core too: picks places so
//! that a segment holds one stride, drops what is unsure, and never writes where something durable may be.
//!
//! Deliberately absent: driving the store (`disk_run`).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use kvd_core::tier::{BlockHeader, BlockKey, Place, StoreShape, stride_of};
use kvd_core::{BlockHash, Cut, GroupGeometry, NamespaceId, NamespaceRecord};

use crate::content;
use crate::rng::{Rng, mix};

/// A namespace that blocks are of.
pub(crate) struct Space {
    pub(crate) id: NamespaceId,
    pub(crate) record: Arc<[u8]>,
    pub(crate) geometry: GroupGeometry,
}

/// Some namespaces with blocks of different sizes, whole pages and not.
pub(crate) fn spaces() -> Vec<Space> {
    let sizes = [
        (2, 2, 4, 256),
        (3, 4, 5, 100),
        (4, 2, 16, 256),
        (1, 1, 16, 300),
        (6, 8, 4, 160),
    ];
    let space = |(n, (layers, heads, tokens, cell)): (usize, (u32, u32, u32, u32))| {
        let fields = [
            ("tenant", "default".to_owned()),
            ("model", format!("m{n}")),
            ("weights", "blake3:00".to_owned()),
            ("kv_dtype", "bfloat16".to_owned()),
            ("cell_encoding", "flash:1".to_owned()),
            ("hash", "sha256_cbor:1f2e".to_owned()),
            ("block_tokens", tokens.to_string()),
            ("groups", "1".to_owned()),
            ("group.0.kind", "full".to_owned()),
            ("group.0.layers", layers.to_string()),
            ("group.0.heads", heads.to_string()),
            ("group.0.cell_bytes", cell.to_string()),
        ];
        let record = NamespaceRecord::build(fields).expect("a good record");
        Space {
            id: record.id(),
            record: record.encode().into(),
            geometry: record.groups()[0].clone(),
        }
    };
    sizes.into_iter().enumerate().map(space).collect()
}

/// What is known of a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Known {
    /// A write is under way.
    Writing,
    /// A write was answered, and nothing since.
    There,
    /// It may be there or not.
    Unsure,
    /// A drop is under way; before it the place was this sure to be there.
    Dropping(bool),
}

/// A block in its place.
#[derive(Clone, Debug)]
pub(crate) struct Block {
    pub(crate) key: BlockKey,
    pub(crate) parent: Option<BlockHash>,
    pub(crate) space: usize,
    /// From which its bytes follow.
    pub(crate) seed: u64,
    pub(crate) cut: Cut,
    pub(crate) known: Known,
    /// Reads under way. Core drops nothing that is being read.
    pub(crate) readers: u32,
}

/// All places of one store.
pub(crate) struct Model {
    pub(crate) spaces: Vec<Space>,
    shape: StoreShape,
    /// Stride and used places of each segment.
    segments: Vec<(u64, BTreeSet<u32>)>,
    pub(crate) blocks: BTreeMap<Place, Block>,
    /// Everything that was ever written to a place under a hash.
    history: BTreeMap<(Place, BlockHash), Vec<Block>>,
    serial: u64,
}

impl Model {
    pub(crate) fn new(shape: StoreShape) -> Self {
        Model {
            spaces: spaces(),
            shape,
            segments: vec![(0, BTreeSet::new()); shape.segments as usize],
            blocks: BTreeMap::new(),
            history: BTreeMap::new(),
            serial: 0,
        }
    }

    pub(crate) fn shape(&self) -> StoreShape {
        self.shape
    }

    /// A free place for a block of this stride, now taken; none if there is none.
    fn take_place(&mut self, rng: &mut Rng, stride: u64) -> Option<Place> {
        let places = (self.shape.segment_bytes / stride) as u32;
        let open = |(_, (s, used)): &(usize, &(u64, BTreeSet<u32>))| {
            *s == 0 || *s == stride && used.len() < places as usize
        };
        let found: Vec<usize> = self
            .segments
            .iter()
            .enumerate()
            .filter(open)
            .map(|x| x.0)
            .collect();
        // Mostly the first, so that places are used again soon.
        let first = *found.first()?;
        let segment = if rng.one_in(4) {
            *rng.pick(&found)
        } else {
            first
        };
        let (s, used) = &mut self.segments[segment];
        let free: Vec<u32> = (0..places)
            .filter(|at| !used.contains(at))
            .take(8)
            .collect();
        let index = *rng.pick(&free);
        *s = stride;
        used.insert(index);
        let segment = segment as u32;
        Some(Place {
            segment,
            index,
            stride,
        })
    }

    /// A new block in a free place; none if all is taken.
    pub(crate) fn place_block(&mut self, rng: &mut Rng) -> Option<(Place, BlockHeader)> {
        let space = rng.below(self.spaces.len());
        let (id, geometry) = (self.spaces[space].id, self.spaces[space].geometry.clone());
        let place = self.take_place(rng, stride_of(geometry.block_bytes()))?;
        self.serial += 1;
        // Few keys, so that the same is stored again elsewhere, with other bytes.
        let name = rng.below(64) as u64;
        let mut hash = [0; 32];
        hash[24..].copy_from_slice(&name.to_be_bytes());
        let key = BlockKey {
            namespace: id,
            group: 0,
            hash: BlockHash(hash),
        };
        let rows = 1 + rng.below(geometry.layers.min(2) as usize) as u32;
        let columns = 1 + rng.below(geometry.heads.min(2) as usize) as u32;
        let block = Block {
            key,
            parent: rng.one_in(2).then_some(BlockHash([name as u8; 32])),
            space,
            seed: mix(&[name, self.serial]),
            cut: Cut::grid(&geometry, rows, columns).expect("a good cut"),
            known: Known::Writing,
            readers: 0,
        };
        let header = BlockHeader {
            key,
            parent: block.parent,
            cut: block.cut.clone(),
            crcs: self.crcs(&block),
        };
        let history = self.history.entry((place, key.hash)).or_default();
        history.push(block.clone());
        self.blocks.insert(place, block);
        Some((place, header))
    }

    fn crcs(&self, block: &Block) -> Vec<u64> {
        let (bytes, cut) = (self.bytes(block), &block.cut);
        let geometry = &self.spaces[block.space].geometry;
        let of_part = |part| {
            let rect = cut.part(part);
            let from = cut.part_offset(part, geometry) as usize;
            let bytes = &bytes[from..from + rect.bytes(geometry) as usize];
            content::part_crcs(geometry, &rect, bytes)
        };
        (0..cut.parts()).flat_map(of_part).collect()
    }

    /// The bytes that must be there.
    pub(crate) fn bytes(&self, block: &Block) -> Vec<u8> {
        content::block(block.seed, &self.spaces[block.space].geometry, &block.cut)
    }

    /// Nothing is there any more; the place may be used again.
    pub(crate) fn free(&mut self, place: Place) {
        self.blocks.remove(&place);
        let (stride, used) = &mut self.segments[place.segment as usize];
        used.remove(&place.index);
        if used.is_empty() {
            *stride = 0;
        }
    }

    /// What was written to this place under this key, the newest last.
    pub(crate) fn history(&self, place: Place, key: &BlockKey) -> &[Block] {
        let all = self.history.get(&(place, key.hash));
        all.map_or(&[], Vec::as_slice)
    }

    /// Begins again with just these blocks.
    pub(crate) fn restart(&mut self, blocks: BTreeMap<Place, Block>) {
        self.segments.fill((0, BTreeSet::new()));
        for place in blocks.keys() {
            let (stride, used) = &mut self.segments[place.segment as usize];
            *stride = place.stride;
            used.insert(place.index);
        }
        self.blocks = blocks;
    }

    /// A place that is known like this.
    pub(crate) fn pick(&self, rng: &mut Rng, which: impl Fn(&Block) -> bool) -> Option<Place> {
        let all: Vec<Place> = self
            .blocks
            .iter()
            .filter(|(_, b)| which(b))
            .map(|(p, _)| *p)
            .collect();
        (!all.is_empty()).then(|| *rng.pick(&all))
    }
}
