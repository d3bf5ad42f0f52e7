//! The counts of one tenant. Core counts for all tenants together; what one step added belongs to the tenant whose step it
//! was, so that a tenant never learns what others do.

use kvd_core::Counters;

macro_rules! counts {
    ($($name:literal = $($field:ident).+;)*) => {
        /// What each place of [`Counts`] counts.
        pub const COUNT_NAMES: &[&str] = &[$($name),*];

        fn flat(counters: &Counters) -> [u64; COUNT_NAMES.len()] {
            [$(counters.$($field).+),*]
        }
    };
}

counts! {
    "requests" = requests;
    "refused" = refused;
    "lookup_hit" = lookup_hit;
    "lookup_absent" = lookup_absent;
    "lookup_filling" = lookup_filling;
    "load_hit" = load_hit;
    "load_absent" = load_absent;
    "load_failed_crc" = load_failed.crc;
    "load_failed_busy" = load_failed.busy;
    "load_failed_below" = load_failed.below;
    "reserved" = reserved;
    "present" = present;
    "filling" = filling;
    "stored" = stored;
    "stored_bytes" = stored_bytes;
    "loaded_bytes" = loaded_bytes;
    "store_failed_no_space" = store_failed.no_space;
    "store_failed_deadline" = store_failed.deadline;
    "store_failed_aborted" = store_failed.aborted;
    "store_failed_writer_lost" = store_failed.writer_lost;
    "store_failed_stale" = store_failed.stale;
    "store_failed_suspect" = store_failed.suspect;
    "evicted" = evicted;
    "evicted_for_class" = evicted_for_class;
    "evicted_with_namespace" = evicted_with_namespace;
    "extents_moved" = extents_moved;
    "extents_refilled" = extents_refilled;
    "sessions_opened" = sessions_opened;
    "sessions_gone" = sessions_gone;
    "sessions_ended" = sessions_ended;
    "fences" = fences;
    "leases_expired" = leases_expired;
    "leases_denied" = leases_denied;
}

/// Numbers that only rise, by the names in [`COUNT_NAMES`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Counts([u64; COUNT_NAMES.len()]);

impl Default for Counts {
    fn default() -> Self {
        Self([0; COUNT_NAMES.len()])
    }
}

impl Counts {
    /// What core counts now.
    pub(crate) fn of(counters: &Counters) -> Self {
        Self(flat(counters))
    }

    /// Adds what came between two moments of core.
    pub(crate) fn add(&mut self, before: &Self, after: &Self) {
        for ((sum, before), after) in self.0.iter_mut().zip(&before.0).zip(&after.0) {
            *sum += after - before;
        }
    }

    /// The count with this name; 0 when there is none.
    pub fn get(&self, name: &str) -> u64 {
        COUNT_NAMES
            .iter()
            .position(|n| *n == name)
            .map_or(0, |i| self.0[i])
    }

    /// Names and counts.
    pub fn each(&self) -> impl Iterator<Item = (&'static str, u64)> + '_ {
        COUNT_NAMES.iter().copied().zip(self.0.iter().copied())
    }

    /// Those whose name begins so, by the rest of the name.
    pub fn with_prefix<'a>(
        &'a self,
        prefix: &'a str,
    ) -> impl Iterator<Item = (&'static str, u64)> + 'a {
        self.each()
            .filter_map(move |(name, n)| Some((name.strip_prefix(prefix)?, n)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_is_counted_for_its_tenant() {
        let mut counters = Counters {
            lookup_hit: 5,
            ..Counters::default()
        };
        let before = Counts::of(&counters);
        counters.lookup_hit += 3;
        counters.load_failed.crc += 1;
        let mut tenant = Counts::default();
        tenant.add(&before, &Counts::of(&counters));
        assert_eq!(
            (
                tenant.get("lookup_hit"),
                tenant.get("load_failed_crc"),
                tenant.get("stored")
            ),
            (3, 1, 0)
        );
        assert_eq!(
            tenant.with_prefix("load_failed_").collect::<Vec<_>>(),
            [("crc", 1), ("busy", 0), ("below", 0)]
        );
    }
}
