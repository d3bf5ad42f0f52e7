//! The slower tier as a server sees it: stores that somebody else makes, opened before the first request is served.
//!
//! A store has threads of its own; what it has to say comes through the doorbell. Overflow: its thread waits for the node's, which never
//! waits for a store. Deliberately absent: what a store is (`kvd-nvme`, chosen and wired by the root package).

use kvd_core::StoreId;
use kvd_core::tier::{Recovered, StoreDone, StoreOp, StoreShape};
use kvd_node::{HostSpan, StorePort, StoreStatus};

use crate::doorbell::Doorbell;
use crate::message::Message;
use crate::reactor::HostNode;

/// Something that a store tells while it is being opened. The shape comes first, namespaces before their blocks.
#[derive(Debug, Clone, Copy)]
pub enum StoreFound<'a> {
    /// How it is divided.
    Shape(StoreShape),
    /// Canonical record of a namespace of which it holds blocks.
    Namespace(&'a [u8]),
    /// A block that it holds.
    Block(Recovered),
}

/// Something that a store tells while it runs.
#[derive(Debug, Clone)]
pub enum StoreNews {
    /// Operations that are over. [`RunningStore::give_back`] takes the list again.
    Done(Vec<StoreDone>),
    /// It is off because its device fails, or on again.
    Switched(bool),
}

/// Takes news from a store's thread. May wait. False: nobody listens any more.
pub type TellNews = Box<dyn Fn(StoreNews) -> bool + Send>;

/// A store that is to be opened.
pub trait StoreOpener: Send {
    /// Opens it, and tells what it holds. The text of an error says what to do.
    ///
    /// # Errors
    /// When it can't be used; the daemon does not start then, unless it is optional.
    fn open(
        self: Box<Self>,
        found: &mut dyn FnMut(StoreFound<'_>),
        news: TellNews,
    ) -> Result<Box<dyn RunningStore>, String>;

    /// Whether nobody has asked for it: then a daemon goes on without.
    fn optional(&self) -> bool;
}

/// A store that runs. Dropping it ends it, after what is under way.
pub trait RunningStore: Send {
    /// Begins an operation, or answers it at once. Never waits.
    fn begin(&self, op: StoreOp, span: Option<HostSpan>) -> Option<StoreDone>;

    /// Takes back a list of answers that it told, to be used for others. Never waits.
    fn give_back(&self, list: Vec<StoreDone>);

    /// What people should know of it.
    fn status(&self) -> StoreStatus;
}

/// Blocks that are told to the node at a time.
const FOUND_AT_A_TIME: usize = 4096;

/// All stores, as the node's port.
#[derive(Default)]
pub(crate) struct StoreSet {
    pub(crate) all: Vec<Box<dyn RunningStore>>,
    /// What the store that is just being opened is asked: to forget blocks that are of no use here.
    early: Vec<(StoreOp, Option<HostSpan>)>,
}

impl StorePort<HostSpan> for StoreSet {
    fn begin(&mut self, store: StoreId, op: StoreOp, span: Option<HostSpan>) -> Option<StoreDone> {
        match self.all.get(usize::from(store.0)) {
            Some(running) => running.begin(op, span),
            None => {
                self.early.push((op, span));
                None
            }
        }
    }
}

/// Opens one more store, and tells the node what it holds.
pub(crate) fn open(
    node: &mut HostNode,
    opener: Box<dyn StoreOpener>,
    bell: Doorbell<Message>,
) -> Result<(), String> {
    let number = node.stores().all.len();
    let store =
        StoreId(u8::try_from(number).map_err(|_| "there are 256 stores at most".to_owned())?);
    let failed = bell.clone();
    let news = Box::new(move |news| bell.ring(Message::Store(store, news)));
    let mut blocks = Vec::with_capacity(FOUND_AT_A_TIME);
    let running = opener.open(
        &mut |found| match found {
            StoreFound::Shape(shape) => node.store_opened(store, shape),
            StoreFound::Namespace(record) => node.store_has_namespace(store, record),
            StoreFound::Block(block) => {
                blocks.push(block);
                if blocks.len() == FOUND_AT_A_TIME {
                    node.store_has_blocks(store, &blocks);
                    blocks.clear();
                }
            }
        },
        news,
    );
    let running = running.inspect_err(|_| {
        // It may have told something before it failed: that is not to be asked for.
        failed.ring(Message::Store(store, StoreNews::Switched(false)));
    })?;
    node.store_has_blocks(store, &blocks);
    let set = node.stores_mut();
    set.all.push(running);
    for (op, span) in std::mem::take(&mut set.early) {
        if let Some(done) = node.stores().all[number].begin(op, span) {
            node.store_done(store, done);
        }
    }
    Ok(())
}
