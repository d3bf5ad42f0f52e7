//! How far a prompt is covered, when its model keeps KV in several groups: a hit is a number of tokens at whose end **every** group
//! has what the next token needs. Full attention needs all blocks, a sliding window those that the window reaches, a recurrent
//! state the one at the boundary.
//!
//! Pure arithmetic over runs of present blocks; the daemon and the engine's half share it, so that both mean the same by a hit.
//! Deliberately absent: what is looked up, and where.

use crate::geometry::{GeometryError, GroupKind, MAX_TOKENS};

/// A run of blocks that are there: first, and one past the last.
pub type Run = (u32, u32);

/// What a hit needs of one KV-cache group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupRule {
    kind: GroupKind,
    span: u32,
    window: u32,
}

impl GroupRule {
    /// A group of this kind whose blocks span `span` tokens. `window`: how many tokens, the next one included, a token of a sliding
    /// window group looks at.
    ///
    /// # Errors
    /// When a number is 0 or too large, or a sliding window has no size.
    pub fn new(kind: GroupKind, span: u32, window: Option<u32>) -> Result<Self, GeometryError> {
        let window = match (kind, window) {
            (GroupKind::SlidingWindow, window) => window.unwrap_or(0),
            _ => 1,
        };
        for (what, value, most) in [
            ("block_tokens", span, MAX_TOKENS),
            ("window", window, u32::MAX),
        ] {
            if value == 0 || value > most {
                return Err(GeometryError::Range {
                    what,
                    value: value.into(),
                    most: most.into(),
                });
            }
        }
        Ok(GroupRule { kind, span, window })
    }

    /// Kind of the group.
    pub fn kind(&self) -> GroupKind {
        self.kind
    }

    /// Tokens that a block spans.
    pub fn span(&self) -> u32 {
        self.span
    }

    /// Tokens of a sliding window.
    pub fn window(&self) -> Option<u32> {
        (self.kind == GroupKind::SlidingWindow).then_some(self.window)
    }

    /// Whether blocks are worth something without those before them, so that a chain of them has no tail.
    pub fn stands_alone(&self) -> bool {
        matches!(self.kind, GroupKind::SlidingWindow | GroupKind::State)
    }

    /// The blocks (first, one past the last) that a hit of `tokens` needs, beyond the `computed` tokens that the engine has. Both are
    /// multiples of the span.
    pub fn needs(&self, tokens: u32, computed: u32) -> Run {
        let end = tokens / self.span;
        let first = match self.kind {
            GroupKind::Full | GroupKind::Opaque => 0,
            GroupKind::SlidingWindow => tokens.saturating_sub(self.window - 1) / self.span,
            GroupKind::State => end.saturating_sub(1),
        };
        (first.max(computed / self.span).min(end), end)
    }
}

/// Tokens of which every hit is a multiple: the least that all spans divide; `None` when that is too large to ever be met.
pub fn unit<'a>(rules: impl IntoIterator<Item = &'a GroupRule>) -> Option<u32> {
    rules.into_iter().try_fold(1u32, |unit, rule| {
        (unit / gcd(unit, rule.span)).checked_mul(rule.span)
    })
}

/// The most tokens that divide all spans; 0 without rules.
pub fn grain<'a>(rules: impl IntoIterator<Item = &'a GroupRule>) -> u32 {
    rules
        .into_iter()
        .fold(0, |grain, rule| gcd(grain, rule.span))
}

fn gcd(mut a: u32, mut b: u32) -> u32 {
    while b > 0 {
        (a, b) = (b, a % b);
    }
    a
}

/// The longest hit, in tokens: a multiple of `unit`, at most `most`. `groups` gives each group's rule and the runs of its blocks that
/// are there, in ascending order and apart from each other. Not more than `computed`: nothing beyond what the engine has.
pub fn longest(groups: &[(GroupRule, &[Run])], unit: u32, most: u32, computed: u32) -> u32 {
    if groups.is_empty() || unit == 0 {
        return 0;
    }
    let mut tokens = most - most % unit;
    'shorter: while tokens > computed {
        for (rule, runs) in groups {
            let needs = rule.needs(tokens, computed);
            let Some(hole) = last_hole(runs, needs) else {
                continue;
            };
            // No shorter hit needs less of what is before the hole, so the next candidate ends with a run that ends there.
            let end = runs[..runs.partition_point(|run| run.1 <= hole)]
                .last()
                .map_or(0, |run| run.1);
            let shorter = u64::from(end.min(hole)) * u64::from(rule.span);
            let shorter = shorter.min(u64::from(tokens) - 1) as u32;
            tokens = shorter - shorter % unit;
            continue 'shorter;
        }
        return tokens;
    }
    computed.min(most)
}

/// The last block of a range that no run covers.
fn last_hole(runs: &[Run], (first, end): Run) -> Option<u32> {
    if first >= end {
        return None;
    }
    let last = end - 1;
    // The last run that begins at or before the last block.
    match runs[..runs.partition_point(|run| run.0 <= last)].last() {
        Some(run) if run.1 > last => (run.0 > first).then(|| run.0 - 1),
        _ => Some(last),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn rule(kind: GroupKind, span: u32, window: u32) -> GroupRule {
        GroupRule::new(kind, span, Some(window)).unwrap()
    }

    /// What [`longest`] says, tried candidate by candidate and block by block.
    fn plainly(groups: &[(GroupRule, &[Run])], unit: u32, most: u32, computed: u32) -> u32 {
        let there = |runs: &[Run], at: u32| runs.iter().any(|run| (run.0..run.1).contains(&at));
        (computed / unit + 1..=most / unit)
            .rev()
            .map(|count| count * unit)
            .find(|tokens| {
                groups.iter().all(|(rule, runs)| {
                    let (first, end) = rule.needs(*tokens, computed);
                    (first..end).all(|at| there(runs, at))
                })
            })
            .unwrap_or(computed.min(most))
    }

    #[test]
    fn each_kind_needs_what_the_next_token_reads() {
        let full = rule(GroupKind::Full, 16, 1);
        assert_eq!(full.needs(64, 0), (0, 4));
        assert_eq!(full.needs(64, 32), (2, 4));
        // A window of 33: the next token and 32 before it.
        let window = rule(GroupKind::SlidingWindow, 16, 33);
        assert_eq!(window.needs(64, 0), (2, 4));
        assert_eq!(window.needs(64, 48), (3, 4));
        assert_eq!(rule(GroupKind::SlidingWindow, 16, 34).needs(64, 0), (1, 4));
        assert_eq!(rule(GroupKind::SlidingWindow, 16, 1).needs(64, 0), (4, 4));
        assert_eq!(window.needs(16, 0), (0, 1));
        let state = rule(GroupKind::State, 32, 1);
        assert_eq!(state.needs(64, 0), (1, 2));
        assert_eq!(state.needs(64, 64), (2, 2));
        assert_eq!(state.needs(0, 0), (0, 0));
        assert!(GroupRule::new(GroupKind::SlidingWindow, 16, None).is_err());
        assert!(GroupRule::new(GroupKind::Full, 0, None).is_err());
    }

    #[test]
    fn a_hit_ends_where_all_groups_agree() {
        let full = (rule(GroupKind::Full, 16, 1), [(0, 10)]);
        let window = (rule(GroupKind::SlidingWindow, 16, 33), [(1, 3), (6, 7)]);
        let groups = [(full.0, &full.1[..]), (window.0, &window.1[..])];
        assert_eq!(longest(&groups, 16, 160, 0), 48);
        // With 5 blocks at hand the window of 7 lacks only what is there.
        assert_eq!(longest(&groups, 16, 160, 80), 80);
        assert_eq!(longest(&groups, 16, 160, 96), 112);
        let state = (rule(GroupKind::State, 32, 1), [(0, 1), (3, 4)]);
        let groups = [(full.0, &full.1[..]), (state.0, &state.1[..])];
        assert_eq!(longest(&groups, 32, 160, 0), 128);
        assert_eq!(longest(&groups, 32, 127, 0), 32);
        assert_eq!(longest(&groups, 32, 31, 0), 0);
        assert_eq!(longest(&[], 16, 160, 0), 0);
    }

    #[test]
    fn the_unit_is_what_all_spans_divide() {
        let rules = [16, 24, 4].map(|span| rule(GroupKind::Full, span, 1));
        assert_eq!(unit(&rules), Some(48));
        assert_eq!(grain(&rules), 4);
        let odd = [1_048_575, 1_048_573].map(|span| rule(GroupKind::Full, span, 1));
        assert_eq!(unit(&odd), None);
    }

    fn runs() -> impl Strategy<Value = Vec<Run>> {
        proptest::collection::vec(any::<bool>(), 0..24).prop_map(|there| {
            let mut runs: Vec<Run> = Vec::new();
            for (at, _) in (0u32..).zip(&there).filter(|(_, there)| **there) {
                match runs.last_mut() {
                    Some(run) if run.1 == at => run.1 += 1,
                    _ => runs.push((at, at + 1)),
                }
            }
            runs
        })
    }

    fn group() -> impl Strategy<Value = (GroupRule, Vec<Run>)> {
        let kind = prop_oneof![
            Just(GroupKind::Full),
            Just(GroupKind::SlidingWindow),
            Just(GroupKind::State)
        ];
        let span = prop_oneof![Just(1u32), Just(2), Just(3), Just(4)];
        (kind, span, 1u32..12, runs())
            .prop_map(|(kind, span, window, runs)| (rule(kind, span, window), runs))
    }

    proptest! {
        #[test]
        fn the_longest_hit_is_what_trying_all_finds(
            groups in proptest::collection::vec(group(), 1..4),
            most in 0u32..64,
            computed in 0u32..64,
        ) {
            let groups: Vec<(GroupRule, &[Run])> =
                groups.iter().map(|(rule, runs)| (*rule, &runs[..])).collect();
            let unit = unit(groups.iter().map(|(rule, _)| rule)).unwrap();
            let computed = computed / unit * unit;
            prop_assert_eq!(
                longest(&groups, unit, most, computed),
                plainly(&groups, unit, most, computed)
            );
        }
    }
}
