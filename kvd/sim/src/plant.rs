//! Planted bugs: deliberate mistakes in the adapters and engines around the node, one at a time. They prove that the checkers
//! can fail; a simulator that finds nothing in them would find nothing anywhere.

/// A mistake to make.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plant {
    /// The generation word of an evicted block is not moved on.
    DropEvictionWords,
    /// Generation words are written after the replies that rest on them.
    LateWords,
    /// The node is told that a process is dead while it still writes.
    EarlyDeath,
    /// The node is never told that a process is dead.
    NoDeath,
    /// The node never ticks.
    NoTicks,
    /// Engines fence their past before their copies are over.
    EarlyFence,
    /// Engines fence their latest past session while copies of older ones go on. A fence covers those too.
    LatestFence,
    /// Workers give up what an order for an earlier connection names, also when that was with another daemon.
    StaleAborts,
    /// Workers carry out orders that were made for an earlier connection of theirs.
    StaleOrders,
    /// Engines commit a part before they have written all of it.
    EarlyCommit,
    /// Readers take what they read without looking at checksums.
    SkipCrc,
    /// Readers take what they read without looking at the generation again.
    SkipGeneration,
    /// A reply gets lost now and then.
    LoseReply,
    /// A reply is given twice now and then.
    DoubleReply,
    /// A removal is missing from the change log now and then.
    HideRemoval,
    /// An adopted arena comes with even words only, as if nobody could be writing.
    ForgetOdd,
    /// A daemon takes an arena over under any table that comes with it, also one from before the last daemon.
    OldTables,
    /// Now and then a process of one tenant gets to the socket, and the name, of another.
    MixTenants,
    /// The node is told that a store has forgotten a block before it has.
    EarlyDrop,
    /// The node is told that a block could be written when it could not.
    FailedWrite,
    /// The node is told that a block has come up before its bytes are there.
    EarlyRead,
}

impl Plant {
    /// All of them.
    pub const ALL: [Plant; 21] = [
        Plant::DropEvictionWords,
        Plant::LateWords,
        Plant::EarlyDeath,
        Plant::NoDeath,
        Plant::NoTicks,
        Plant::EarlyFence,
        Plant::LatestFence,
        Plant::StaleAborts,
        Plant::StaleOrders,
        Plant::EarlyCommit,
        Plant::SkipCrc,
        Plant::SkipGeneration,
        Plant::LoseReply,
        Plant::DoubleReply,
        Plant::HideRemoval,
        Plant::ForgetOdd,
        Plant::OldTables,
        Plant::MixTenants,
        Plant::EarlyDrop,
        Plant::FailedWrite,
        Plant::EarlyRead,
    ];
}
