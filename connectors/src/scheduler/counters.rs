//! Numbers of the scheduler half, for tests and for people.

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// Counters since the start.
        #[derive(Debug, Default, Clone, PartialEq, Eq)]
        pub struct Counters {
            $($(#[$doc])* pub $name: u64,)*
        }

        impl Counters {
            /// Names and values.
            pub fn list(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($name), self.$name),)*]
            }
        }
    };
}

counters! {
    /// Requests seen.
    requests,
    /// Lookups sent.
    lookups,
    /// Lookups without an answer in time.
    lookup_timeouts,
    /// Lookups that could not be sent, or were lost with the connection.
    lookup_failures,
    /// Lookup leases given back.
    leases_released,
    /// Answers "ask again later".
    asked_to_wait,
    /// Loads ordered.
    loads,
    /// Blocks of those loads.
    loaded_blocks,
    /// Tokens that those loads stand for.
    loaded_tokens,
    /// Blocks that loads brought and the engine can use.
    usable_blocks,
    /// Tokens of loads, by where the lookup found them: in host memory,
    hit_host_tokens,
    /// on their way up,
    hit_fetching_tokens,
    /// on NVMe,
    hit_nvme_tokens,
    /// or in an object store.
    hit_object_tokens,
    /// Loads that some rank could not complete.
    load_failures,
    /// Requests that waited for another request's load.
    loads_shared,
    /// Reserve requests sent.
    reserves,
    /// Blocks whose slots were asked for.
    reserve_blocks,
    /// Of those: already held.
    present_blocks,
    /// Of those: being stored by somebody else.
    filling_blocks,
    /// Of those: no room.
    no_space_blocks,
    /// Of those: reservation failed or lost.
    failed_blocks,
    /// Store orders given to the workers.
    orders,
    /// Blocks of those orders.
    ordered_blocks,
    /// Blocks of orders that all ranks have reported.
    done_blocks,
    /// Finished requests whose blocks were held for a while.
    held,
    /// Of those: given up by deadline.
    hold_timeouts,
    /// Preempted requests that had reservations.
    preempted_reservations,
    /// Resets of the cache: new weights epochs.
    resets,
}
