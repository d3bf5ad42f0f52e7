//! What goes into the core and what comes out: the whole interface of [`crate::Core::step`], mirroring the session protocol.
//!
//! Deliberately absent: frames, sockets, file descriptors, text for logs. The node turns bytes into these and back.

use crate::geometry::{ArenaShape, Cut};
use crate::ids::{
    BlockHash, InstanceId, NamespaceId, RequestId, Role, SessionId, StoreId, TenantId,
};
use crate::tier::{Recovered, StoreDone, StoreOp, StoreShape};

/// No parent, no slot, nobody.
pub(crate) const NIL: u32 = u32::MAX;

/// Something that happened outside. Outputs of one input are complete before the next is given.
#[derive(Clone, Debug)]
pub enum Input<'a> {
    /// A tenant this daemon serves. Given once, before anything else that names it.
    Tenant {
        /// Its number.
        tenant: TenantId,
        /// Its name, as records must state it.
        name: &'a str,
        /// What it may use.
        limits: TenantLimits,
    },
    /// The tenant's shared memory exists. Every extent is unusable until [`Input::ExtentReady`].
    /// Refused ([`Output::ArenaRefused`]) when [`crate::Core::arena_in_use`].
    Arena {
        /// Whose.
        tenant: TenantId,
        /// Its sizes.
        shape: ArenaShape,
        /// Set when the memory comes from a former daemon.
        adopted: Option<Adopted<'a>>,
    },
    /// All pages of this extent are there and charged to the daemon. Also the answer to [`Output::Refill`].
    ExtentReady {
        /// Whose.
        tenant: TenantId,
        /// Which.
        extent: u32,
    },
    /// This extent could not be populated; it stays unused.
    ExtentFailed {
        /// Whose.
        tenant: TenantId,
        /// Which.
        extent: u32,
    },
    /// A process attached (its Hello is good).
    Opened {
        /// Its new token.
        session: SessionId,
        /// By whose socket.
        tenant: TenantId,
        /// Which engine instance.
        instance: InstanceId,
        /// What it does.
        role: Role,
        /// Its rank among the workers.
        rank: u32,
        /// How many ranks copy in this instance.
        world: u32,
        /// For people.
        label: &'a str,
        /// Token of its former session, also with a former daemon.
        past: Option<SessionId>,
    },
    /// Its socket closed, but the process may live and its copies may go on.
    Detached {
        /// Which.
        session: SessionId,
    },
    /// Its process is provably dead, and with it all that the process began, also under past sessions it named.
    Gone {
        /// Which.
        session: SessionId,
    },
    /// It said goodbye in order: its copies are terminal.
    Closed {
        /// Which.
        session: SessionId,
    },
    /// It asks something. Gets exactly one [`Output::Reply`].
    Request {
        /// Who asks.
        session: SessionId,
        /// Its number for this.
        id: RequestId,
        /// What.
        body: Request<'a>,
    },
    /// A store of the slower tier can be used. Stores are numbered from 0 on, without gaps, and opened after all tenants are known.
    StoreOpened {
        /// Which.
        store: StoreId,
        /// How it is divided.
        shape: StoreShape,
    },
    /// It holds blocks of this namespace (canonical record). Given before those blocks.
    StoreNamespace {
        /// Which store.
        store: StoreId,
        /// Canonical record.
        record: &'a [u8],
    },
    /// It holds these blocks.
    StoreBlocks {
        /// Which store.
        store: StoreId,
        /// Parents best before their children.
        blocks: &'a [Recovered],
    },
    /// It was switched off because its device fails, or on again.
    StoreSwitched {
        /// Which.
        store: StoreId,
        /// Whether it takes operations.
        on: bool,
    },
    /// One of its operations is over.
    StoreDone {
        /// Which store.
        store: StoreId,
        /// What became of it.
        done: StoreDone,
    },
    /// Time passed. Deadlines are looked at on every input; this is for idle times.
    Tick,
}

/// What one tenant may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TenantLimits {
    /// Most sessions at once.
    pub sessions: u32,
    /// Most namespaces with blocks or sessions.
    pub namespaces: u32,
    /// Most bytes of slots whose writers are neither terminal nor gone; beyond, reservations answer NO_SPACE.
    /// 0: a quarter of the arena.
    pub quarantine_bytes: u64,
}

impl Default for TenantLimits {
    fn default() -> Self {
        TenantLimits {
            sessions: 256,
            namespaces: 256,
            quarantine_bytes: 0,
        }
    }
}

/// What a former daemon left behind in the generation table of an offered arena.
#[derive(Clone, Copy, Debug)]
pub struct Adopted<'a> {
    /// Its generation words from slot 0 on; words left out at the end are 0.
    pub words: &'a [u64],
    /// Its session table: tokens of sessions that might have been writing. Zeros are skipped.
    pub writers: &'a [u64],
}

/// Blocks of one group in prompt order.
#[derive(Clone, Copy, Debug)]
pub struct Chain<'a> {
    /// KV-cache group.
    pub group: u32,
    /// Hashes, 32 bytes each.
    pub hashes: &'a [[u8; 32]],
    /// The hash before the first, if known.
    pub parent: Option<BlockHash>,
}

/// How an instance cuts the blocks of one group, and which part this process copies.
#[derive(Clone, Copy, Debug)]
pub struct GroupLayout<'a> {
    /// KV-cache group.
    pub group: u32,
    /// `0 = first < ... < last = layers`.
    pub layer_bounds: &'a [u32],
    /// `0 = first < ... < last = heads`.
    pub head_bounds: &'a [u32],
    /// False: this process copies nothing of the group.
    pub copies: bool,
    /// Its part, layer ranges outermost. Ignored unless `copies`.
    pub part: u32,
}

/// Which of the blocks that a lookup names matter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Scope {
    /// All of them.
    All,
    /// Those of the run from the first hash of a chain on.
    Leading,
    /// Those that the longest hit needs: there is one chain for each KV-cache group, and together they are one prompt from its
    /// first block on. See [`crate::hit`].
    Hit {
        /// The last unit of what is there of full attention can't be used: the hit ends before it.
        drop_last: bool,
    },
}

/// What a session asks. `namespace` is the short name from [`Reply::Registered`], valid in that session only.
#[derive(Clone, Debug)]
pub enum Request<'a> {
    /// Makes a namespace known and joins it.
    Register {
        /// Canonical record.
        record: &'a [u8],
        /// Layouts of the groups this process has to do with.
        groups: &'a [GroupLayout<'a>],
    },
    /// Which of these blocks are here?
    Lookup {
        /// Short name.
        namespace: u32,
        /// What to look for.
        chains: &'a [Chain<'a>],
        /// Above 0: keep what is found until Release, or for so many milliseconds.
        lease_ms: u32,
        /// Which of it matters: recency and lease apply to that alone.
        scope: Scope,
    },
    /// Takes slots for blocks that this instance is about to store. Every rank of the instance must have registered.
    Reserve {
        /// Short name.
        namespace: u32,
        /// What to store.
        chains: &'a [Chain<'a>],
    },
    /// This process's part of these slots is written.
    Commit {
        /// Short name.
        namespace: u32,
        /// KV-cache group.
        group: u32,
        /// Slots.
        slots: &'a [u32],
        /// The odd generations that Reserve gave.
        generations: &'a [u64],
        /// One CRC-64/NVME for each head of the part, slot after slot.
        crcs: &'a [u64],
    },
    /// This process will not write these slots (any more). From a [`Role::Scheduler`] it means: no worker was told of them,
    /// so nobody writes them; a scheduler that has told its workers lets them abort.
    Abort {
        /// Slots.
        slots: &'a [u32],
        /// The odd generations that Reserve gave.
        generations: &'a [u64],
    },
    /// Wants to read these blocks. What is READY is leased until Release or for the settings' lease time.
    Load {
        /// Short name.
        namespace: u32,
        /// KV-cache group.
        group: u32,
        /// Hashes.
        hashes: &'a [[u8; 32]],
        /// How long the caller would wait for slower tiers, milliseconds; 0: as long as the settings allow.
        deadline_ms: u32,
    },
    /// Ends read leases.
    Release {
        /// Slots.
        slots: &'a [u32],
        /// The even generations that Load gave.
        generations: &'a [u64],
        /// Positions in `slots` whose bytes did not match their checksums.
        corrupt: &'a [u32],
        /// Also end this lookup lease; 0: none.
        lease: u64,
    },
    /// Every copy that this process began under its past session, or any before that, is over.
    Fence {
        /// Token of the past session, as it was given in Hello.
        past: SessionId,
    },
}

/// What the driver must do, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// Answer a request.
    Reply {
        /// To whom.
        session: SessionId,
        /// To which request.
        id: RequestId,
        /// The answer.
        reply: Box<Reply>,
    },
    /// Write this word into the tenant's generation table, before anything that follows.
    SetGeneration {
        /// Whose table.
        tenant: TenantId,
        /// Index of the word.
        slot: u32,
        /// Its new value.
        word: u64,
    },
    /// Write these tokens into the session table of the tenant's generation table; the rest becomes 0.
    WriterTable {
        /// Whose table.
        tenant: TenantId,
        /// At most [`crate::settings::MAX_WRITERS`].
        tokens: Vec<SessionId>,
    },
    /// The bytes of this extent go bad: give its pages back, populate it again, then say [`Input::ExtentReady`].
    Refill {
        /// Whose.
        tenant: TenantId,
        /// Which.
        extent: u32,
    },
    /// A store is to do this. It may have to wait, and the order is its own affair.
    Store {
        /// Which.
        store: StoreId,
        /// What.
        op: StoreOp,
    },
    /// This arena is not taken.
    ArenaRefused {
        /// Whose.
        tenant: TenantId,
        /// Why.
        failure: Failure,
    },
    /// End this session and close its socket. Core has already forgotten it, or keeps it as detached.
    EndSession {
        /// Which.
        session: SessionId,
        /// Why; to be sent before closing.
        failure: Failure,
    },
}

/// What kind of error, and so what the caller should do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// There is no such thing.
    NotFound,
    /// A limit is reached; try later.
    Busy,
    /// No room can be made.
    NoSpace,
    /// Bytes are not what they should be.
    Corrupt,
    /// Not now; go on without.
    Unavailable,
    /// It may or may not have happened.
    Indeterminate,
    /// The caller is wrong; don't repeat.
    Invalid,
    /// Not built.
    Unsupported,
    /// A bug here.
    Internal,
}

/// A request that could not be served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// What kind.
    pub kind: ErrorKind,
    /// Lower case, says what to do.
    pub text: String,
    /// The session is over as well.
    pub ends_session: bool,
}

impl Failure {
    /// A failure after which the session goes on.
    pub fn new(kind: ErrorKind, text: impl Into<String>) -> Self {
        Failure {
            kind,
            text: text.into(),
            ends_session: false,
        }
    }

    pub(crate) fn fatal(kind: ErrorKind, text: impl Into<String>) -> Self {
        Failure {
            kind,
            text: text.into(),
            ends_session: true,
        }
    }

    pub(crate) fn invalid(text: impl Into<String>) -> Self {
        Failure::new(ErrorKind::Invalid, text)
    }
}

/// Answers, one variant for each [`Request`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// It could not be served.
    Failure(Failure),
    /// To Register. The node adds the descriptors.
    Registered {
        /// Short name for this session.
        namespace: u32,
        /// BLAKE3 of the record.
        id: NamespaceId,
        /// The tenant's arena.
        arena: ArenaShape,
    },
    /// To Lookup.
    Lookup(LookupReply),
    /// To Reserve.
    Reserve(ReserveReply),
    /// To Commit: one state for each slot.
    Commit(Vec<CommitState>),
    /// To Abort.
    Aborted {
        /// How many of the slots were this instance's and are now given up.
        count: u32,
    },
    /// To Load.
    Load(LoadReply),
    /// To Release.
    Released,
    /// To Fence.
    Fenced,
}

/// Where blocks are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LookupReply {
    /// One for each chain, in order.
    pub chains: Vec<Presence>,
    /// Token of the lease; 0: none was given.
    pub lease: u64,
    /// Estimate for loading all that is in a tier, microseconds.
    pub est_load_us: u64,
    /// Tokens of the longest hit; only for [`Scope::Hit`].
    pub hit_tokens: u32,
}

/// Runs of blocks that are not absent, in order; what no run covers is absent.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Presence {
    /// Position of the first block of each run.
    pub start: Vec<u32>,
    /// Blocks in each run.
    pub length: Vec<u32>,
    /// Where each run is.
    pub place: Vec<Where>,
}

/// Where a block is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Where {
    /// Not here.
    Absent,
    /// In host memory.
    Host,
    /// On NVMe.
    Nvme,
    /// In object storage.
    Object,
    /// On its way to a faster tier.
    Fetching,
    /// Being stored; not loadable yet.
    Filling,
}

/// Answer to Reserve.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ReserveReply {
    /// One for each hash, chain after chain.
    pub states: Vec<ReserveState>,
    /// One for each RESERVED, in order.
    pub slots: Vec<u32>,
    /// Odd; to be stated in Commit and Abort.
    pub generations: Vec<u64>,
    /// Bytes from the start of the arena.
    pub offsets: Vec<u64>,
}

/// What became of one reservation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ReserveState {
    /// Yours to fill.
    Reserved,
    /// Already held.
    Present,
    /// Some instance is storing it now.
    Filling,
    /// Nothing could be evicted, or a limit is reached.
    NoSpace,
}

/// What became of one commit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CommitState {
    /// Every part is there.
    Visible,
    /// Other parts are still to come.
    Waiting,
    /// The reservation is gone, or this part is not this process's to write: nothing was stored.
    Stale,
}

/// Answer to Load.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LoadReply {
    /// One for each hash.
    pub states: Vec<LoadState>,
    /// One for each READY, in order.
    pub slots: Vec<u32>,
    /// Even; must be unchanged after the copy.
    pub generations: Vec<u64>,
    /// Bytes from the start of the arena.
    pub offsets: Vec<u64>,
    /// Which of `cuts` the block was stored by.
    pub cut: Vec<u32>,
    /// One for each part and head of that part, parts in order, block after block.
    pub crcs: Vec<u64>,
    /// The cuts that `cut` refers to.
    pub cuts: Vec<Cut>,
}

/// Whether one block can be loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LoadState {
    /// Read it from its slot.
    Ready,
    /// Not here.
    Absent,
    /// It is here but can't be had now; neither hit nor absent.
    Failed,
}
