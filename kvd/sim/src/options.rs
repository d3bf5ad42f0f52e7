//! What a run is told from outside: seed, steps, which faults are allowed, how large the world may be. All else is drawn.

use std::fmt;

use kvd_nvme::store::Store;

use crate::disk::SimDisk;
use crate::plant::Plant;

/// A class of faults. Each seed draws which of the allowed ones happen in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Processes die in the middle of anything; the notice comes late.
    Death,
    /// Processes stop for a while, and go on where they were.
    Stall,
    /// Sockets break; the process lives, comes back and fences.
    Detach,
    /// Some processes come back without ever fencing.
    NoFence,
    /// Some processes send what they must not.
    Lie,
    /// Some processes write where they must not.
    Rogue,
    /// Bits flip.
    Flip,
    /// The daemon dies, also in the middle of an answer, and starts again.
    Crash,
    /// Clients that come back late offer memory under the table of a daemon before the last.
    StaleOffer,
    /// Time makes jumps, so that deadlines pass.
    Jump,
    /// Memory can't be faulted in.
    NoMemory,
    /// A disk fails operations, ends them too early, or takes no writes.
    DiskIo,
    /// Bits of a disk flip.
    DiskRot,
    /// A disk loses writes, or puts them elsewhere.
    DiskLost,
    /// A disk takes its time.
    DiskStall,
    /// The daemon dies in the middle of a write, and then or at other deaths of it the disk loses its power.
    PowerCut,
}

impl Fault {
    /// All of them.
    pub const ALL: [Fault; 16] = [
        Fault::Death,
        Fault::Stall,
        Fault::Detach,
        Fault::NoFence,
        Fault::Lie,
        Fault::Rogue,
        Fault::Flip,
        Fault::Crash,
        Fault::StaleOffer,
        Fault::Jump,
        Fault::NoMemory,
        Fault::DiskIo,
        Fault::DiskRot,
        Fault::DiskLost,
        Fault::DiskStall,
        Fault::PowerCut,
    ];

    /// Those of processes and memory.
    pub(crate) fn of_host() -> &'static [Fault] {
        &Self::ALL[..11]
    }

    /// Those of disks.
    pub(crate) fn of_disks() -> &'static [Fault] {
        &Self::ALL[11..]
    }
}

/// Which faults are allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Faults(u32);

impl Faults {
    /// Every one.
    pub const fn all() -> Self {
        Faults((1 << Fault::ALL.len()) - 1)
    }

    /// None.
    pub const fn none() -> Self {
        Faults(0)
    }

    /// Without this one.
    #[must_use]
    pub const fn without(self, fault: Fault) -> Self {
        Faults(self.0 & !(1 << fault as u32))
    }

    /// Whether this one is allowed.
    pub const fn has(self, fault: Fault) -> bool {
        self.0 & (1 << fault as u32) != 0
    }
}

/// One run. Equal options give equal runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// From which all is drawn.
    pub seed: u64,
    /// Steps with faults; the quiet end comes after them.
    pub steps: u64,
    /// Which faults may be drawn.
    pub faults: Faults,
    /// Most tenants.
    pub tenants: usize,
    /// Most engine instances at once.
    pub instances: usize,
    /// Most extents of an arena.
    pub extents: u32,
    /// Most stores of the slower tier.
    pub stores: usize,
    /// How many of the last events a failure shows.
    pub tail: usize,
    /// A mistake to make.
    pub plant: Option<Plant>,
    /// A mistake of the store.
    pub store_plant: Option<StorePlant>,
}

/// Plants a mistake in every store that is opened.
#[derive(Clone, Copy)]
pub struct StorePlant(pub fn(&mut Store<SimDisk>));

impl PartialEq for StorePlant {
    fn eq(&self, other: &Self) -> bool {
        std::ptr::fn_addr_eq(self.0, other.0)
    }
}

impl Eq for StorePlant {}

impl fmt::Debug for StorePlant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a mistake of the store")
    }
}

impl Options {
    /// The full fault model.
    pub fn new(seed: u64, steps: u64) -> Self {
        Options {
            seed,
            steps,
            faults: Faults::all(),
            tenants: 3,
            instances: 8,
            extents: 8,
            stores: 2,
            tail: 60,
            plant: None,
            store_plant: None,
        }
    }

    /// The same with a planted bug.
    #[must_use]
    pub fn with_plant(self, plant: Plant) -> Self {
        Options {
            plant: Some(plant),
            ..self
        }
    }

    /// Simpler runs that may fail alike, the largest cuts first.
    pub(crate) fn simpler(&self, failed_at: u64) -> Vec<Options> {
        let mut list = Vec::new();
        if failed_at + 1 < self.steps {
            list.push(Options {
                steps: failed_at + 1,
                ..*self
            });
        }
        list.push(Options {
            steps: self.steps / 2,
            ..*self
        });
        list.push(Options {
            steps: self.steps - self.steps / 8,
            ..*self
        });
        for fault in Fault::ALL {
            let faults = self.faults.without(fault);
            list.push(Options { faults, ..*self });
        }
        list.push(Options {
            tenants: self.tenants - 1,
            ..*self
        });
        list.push(Options {
            instances: self.instances - 1,
            ..*self
        });
        list.push(Options {
            extents: self.extents / 2,
            ..*self
        });
        list.push(Options {
            stores: self.stores.saturating_sub(1),
            ..*self
        });
        list.retain(|o| {
            o != self && o.steps > 0 && o.tenants > 0 && o.instances > 0 && o.extents > 0
        });
        list
    }
}

impl fmt::Display for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "seed {} steps {} tenants {} instances {} extents {} stores {}",
            self.seed, self.steps, self.tenants, self.instances, self.extents, self.stores
        )?;
        let off: Vec<_> = Fault::ALL
            .iter()
            .filter(|x| !self.faults.has(**x))
            .collect();
        if !off.is_empty() {
            write!(f, " without {off:?}")?;
        }
        if let Some(plant) = self.plant {
            write!(f, " planted {plant:?}")?;
        }
        if let Some(plant) = self.store_plant {
            write!(f, " planted {plant:?}")?;
        }
        Ok(())
    }
}
