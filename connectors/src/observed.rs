//! What an engine's own metrics are made of: what has happened in a half since it was last asked.

/// Most times kept from one question to the next; beyond that only counters go on.
const MOST_TIMES: usize = 1024;

/// What has happened since the last question.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Observed {
    /// What has grown, and by how much.
    pub counts: Vec<(&'static str, u64)>,
    /// What was done, and how long (us) each of it took.
    pub times: Vec<(&'static str, Vec<u32>)>,
    /// Whether the whole instance is attached to the daemon, if that has changed.
    pub connected: Option<bool>,
}

impl Observed {
    /// Counts from their names, former and present values.
    pub(crate) fn grown<const N: usize>(all: [(&'static str, u64, u64); N]) -> Observed {
        let grown = |(name, old, new): (_, u64, u64)| (new > old).then(|| (name, new - old));
        Observed {
            counts: all.into_iter().filter_map(grown).collect(),
            ..Observed::default()
        }
    }

    /// Adds what took so long, and forgets it at its source.
    pub(crate) fn take(&mut self, name: &'static str, times: &mut Vec<u32>) {
        if !times.is_empty() {
            self.times.push((name, std::mem::take(times)));
        }
    }

    /// Nothing, if nothing has happened.
    pub(crate) fn some(self) -> Option<Observed> {
        (self != Observed::default()).then_some(self)
    }
}

/// Keeps a time, if there is room.
pub(crate) fn keep(times: &mut Vec<u32>, us: u64) {
    if times.len() < MOST_TIMES {
        times.push(u32::try_from(us).unwrap_or(u32::MAX));
    }
}
