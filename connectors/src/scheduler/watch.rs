//! What the engine's own metrics show of the scheduler half, and in which tier its hits lay.

use kvd_wire::session::{Presence, Where};

use super::port::Port;
use super::{Counters, Scheduler};
use crate::observed::Observed;

/// Where blocks lie that can be loaded, the farthest last.
pub const TIERS: [&str; 4] = ["host", "fetching", "nvme", "object"];

/// Tokens by [tier](TIERS).
pub type ByTier = [u32; TIERS.len()];

/// What was told already.
#[derive(Debug, Default)]
pub(crate) struct Watch {
    told: Counters,
    connected: Option<bool>,
    /// How long (us) lookups took until their answers were seen.
    pub(crate) lookups: Vec<u32>,
}

impl<P: Port> Scheduler<P> {
    /// What has happened since the last call, if anything.
    pub fn observed(&mut self) -> Option<Observed> {
        let ranks = || self.ranks.iter().all(|rank| rank.epoch != 0);
        let connected = Some(self.port.connected() && ranks());
        let watch = &mut self.watch;
        let changed = watch.connected != connected;
        if !changed && watch.lookups.is_empty() && watch.told == self.counters {
            return None;
        }
        let (old, new) = (&watch.told, &self.counters);
        let mut observed = Observed::grown([
            ("lookups", old.lookups, new.lookups),
            ("lookup_timeout", old.lookup_timeouts, new.lookup_timeouts),
            ("lookup_failed", old.lookup_failures, new.lookup_failures),
            ("hit_host", old.hit_host_tokens, new.hit_host_tokens),
            (
                "hit_fetching",
                old.hit_fetching_tokens,
                new.hit_fetching_tokens,
            ),
            ("hit_nvme", old.hit_nvme_tokens, new.hit_nvme_tokens),
            ("hit_object", old.hit_object_tokens, new.hit_object_tokens),
            ("load_blocks", old.usable_blocks, new.usable_blocks),
            ("store_present", old.present_blocks, new.present_blocks),
            ("store_no_space", old.no_space_blocks, new.no_space_blocks),
            ("store_failed", old.failed_blocks, new.failed_blocks),
        ]);
        watch.told.clone_from(new);
        observed.take("lookup_seconds", &mut watch.lookups);
        observed.connected = connected.filter(|_| changed);
        watch.connected = connected;
        observed.some()
    }

    /// Tokens that the request's last load brings, by [tier](TIERS), as the lookup said.
    pub fn sources(&self, id: &str) -> ByTier {
        self.requests
            .get(id)
            .map_or(ByTier::default(), |request| request.sources)
    }

    pub(super) fn count_sources(&mut self, sources: ByTier) {
        let [host, fetching, nvme, object] = sources.map(u64::from);
        self.counters.hit_host_tokens += host;
        self.counters.hit_fetching_tokens += fetching;
        self.counters.hit_nvme_tokens += nvme;
        self.counters.hit_object_tokens += object;
    }
}

impl super::Settings {
    /// In which tier the tokens of these units (from, up to before) lie, given where the blocks of each group are. What several
    /// groups need is as far away as the farthest of it; what none needs counts as near.
    pub(super) fn sources(&self, places: &[Presence], (from, to): (u32, u32)) -> ByTier {
        let unit = self.unit();
        let mut farthest = vec![0u8; to.saturating_sub(from) as usize];
        for (rule, presence) in self.groups.iter().zip(places) {
            let (first, end) = rule.needs(to.saturating_mul(unit), from.saturating_mul(unit));
            let each = (unit / rule.span()).max(1);
            let all = presence.start.iter().zip(&presence.length);
            for ((start, length), place) in all.zip(&presence.r#where) {
                let last = start.saturating_add(*length).min(end);
                let start = (*start).max(first);
                let Some(tier) = tier(*place).filter(|tier| start < last && *tier > 0) else {
                    continue;
                };
                let at = (start / each).saturating_sub(from) as usize;
                let until = last.div_ceil(each).saturating_sub(from) as usize;
                let until = until.min(farthest.len());
                for one in farthest.get_mut(at..until).unwrap_or_default() {
                    *one = (*one).max(tier);
                }
            }
        }
        let mut tokens = ByTier::default();
        for tier in farthest {
            tokens[usize::from(tier)] += unit;
        }
        tokens
    }
}

/// Number of a tier from which blocks can be loaded.
pub(super) fn tier(place: i32) -> Option<u8> {
    match Where::try_from(place) {
        Ok(Where::Host) => Some(0),
        Ok(Where::Fetching) => Some(1),
        Ok(Where::Nvme) => Some(2),
        Ok(Where::Object) => Some(3),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::presence;
    use super::*;
    use kvd_core::{GroupKind, GroupRule};

    fn settings(groups: &[(GroupKind, u32, Option<u32>)]) -> super::super::Settings {
        let rule = |(kind, tokens, window): &(_, _, _)| GroupRule::new(*kind, *tokens, *window);
        super::super::Settings {
            groups: groups.iter().map(|one| rule(one).unwrap()).collect(),
            ..super::super::Settings::default()
        }
    }

    #[test]
    fn tokens_count_where_their_blocks_lie() {
        let one = settings(&[(GroupKind::Full, 16, None)]);
        let runs = presence(&[
            (0, 3, Where::Host),
            (3, 2, Where::Nvme),
            (5, 1, Where::Fetching),
        ]);
        let places = std::slice::from_ref(&runs);
        assert_eq!(one.sources(places, (0, 6)), [48, 16, 32, 0]);
        assert_eq!(one.sources(places, (2, 5)), [16, 0, 32, 0]);
        assert_eq!(one.sources(places, (4, 4)), [0; 4]);
        assert_eq!(one.sources(&[], (0, 2)), [32, 0, 0, 0]);
        let odd = presence(&[(u32::MAX, 5, Where::Nvme), (1, u32::MAX, Where::Object)]);
        assert_eq!(one.sources(&[odd], (0, 3)), [16, 0, 0, 32]);
    }

    #[test]
    fn what_several_groups_need_is_as_far_as_the_farthest() {
        // Hits are multiples of 8 tokens; the window needs the last two of its blocks.
        let two = settings(&[
            (GroupKind::Full, 8, None),
            (GroupKind::SlidingWindow, 4, Some(9)),
        ]);
        let full = presence(&[(0, 4, Where::Host)]);
        let window = presence(&[(0, 8, Where::Nvme)]);
        let found = two.sources(&[full, window], (0, 4));
        assert_eq!(found.iter().sum::<u32>(), 32);
        assert_eq!(found, [24, 0, 8, 0]);
    }
}
