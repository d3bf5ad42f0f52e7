//! The mixes of disk faults that are tried with fresh seeds, by name: by the tests and by the command `kvd-sim`. Deliberately absent:
//! the faults that show planted mistakes, which belong to the mistakes.

use crate::disk::DiskFaults;
use crate::disk_run::DiskOptions;

/// Faults of a disk that go together. All mixes have kills and power cuts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskMix {
    /// Its name.
    pub name: &'static str,
    /// What goes wrong.
    pub faults: DiskFaults,
}

const NONE: DiskFaults = DiskFaults {
    eio: 0,
    sticky: 0,
    short: 0,
    stall: 0,
    lost: 0,
    misdirected: 0,
    full: false,
    deaf: false,
};

impl DiskMix {
    /// A disk without faults of its own.
    pub const CUTS: DiskMix = DiskMix {
        name: "cuts",
        faults: NONE,
    };
    /// Errors and short transfers.
    pub const ERRORS: DiskMix = DiskMix {
        name: "errors",
        faults: DiskFaults {
            eio: 200,
            short: 300,
            ..NONE
        },
    };
    /// A disk that stalls, and pages that keep failing.
    pub const FAILING: DiskMix = DiskMix {
        name: "failing",
        faults: DiskFaults {
            stall: 500,
            sticky: 2_000,
            ..NONE
        },
    };
    /// No room for any write.
    pub const FULL: DiskMix = DiskMix {
        name: "full",
        faults: DiskFaults { full: true, ..NONE },
    };
    /// Writes that get lost or go elsewhere.
    pub const LOST: DiskMix = DiskMix {
        name: "lost",
        faults: DiskFaults {
            lost: 300,
            misdirected: 300,
            ..NONE
        },
    };
    /// Everything at once.
    pub const EVERYTHING: DiskMix = DiskMix {
        name: "everything",
        faults: DiskFaults {
            eio: 400,
            sticky: 4_000,
            short: 600,
            stall: 1_000,
            lost: 1_000,
            misdirected: 1_000,
            ..NONE
        },
    };

    /// All of them.
    pub const ALL: [DiskMix; 6] = [
        DiskMix::CUTS,
        DiskMix::ERRORS,
        DiskMix::FAILING,
        DiskMix::FULL,
        DiskMix::LOST,
        DiskMix::EVERYTHING,
    ];

    /// The usual run with these faults.
    pub fn options(&self, seed: u64) -> DiskOptions {
        DiskOptions {
            seed,
            steps: 3_000,
            faults: self.faults,
            cuts: 150,
            plant: None,
        }
    }
}
