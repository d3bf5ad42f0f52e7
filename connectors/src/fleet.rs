//! The ranks of one engine instance together: whether their shares fit, and the cut of a block that follows from them.
//!
//! Every rank says what it holds ([`RankHello`]); nobody derives it from a configuration. Deliberately absent: anything that a
//! grid of layer ranges and head ranges can't express (context parallelism); such ranks come with a refusal of their own.

use kvd_core::geometry::{Cut, GroupGeometry, GroupKind};
use kvd_core::hit::GroupRule;

use crate::meta::{GroupIntro, RankGroup, RankHello};

/// One KV-cache group of the whole instance.
#[derive(Debug, Clone, PartialEq)]
pub struct FleetGroup {
    /// Group number.
    pub group: u32,
    /// Sizes of the whole model.
    pub geometry: GroupGeometry,
    /// What a hit needs of it.
    pub rule: GroupRule,
    /// Names of all layers, in order.
    pub layer_names: Vec<String>,
    /// Tokens of a page.
    pub page_tokens: u32,
    /// The cut, and the part of each rank.
    pub intro: GroupIntro,
}

/// What all ranks together hold.
#[derive(Debug, Clone, PartialEq)]
pub struct Fleet {
    /// One a group.
    pub groups: Vec<FleetGroup>,
    /// Cell encoding id, the same on all ranks.
    pub encoding: String,
    /// Digest of all ranks' KV scales; empty: none.
    pub scales: String,
}

/// Puts the shares of all ranks together.
///
/// # Errors
/// Why this instance can't store or load: a rank refused, or the shares make no grid. In words for people.
pub fn assemble(hellos: &[RankHello]) -> Result<Fleet, String> {
    let first = hellos.first().ok_or("no worker has said what it holds")?;
    if let Some(refused) = hellos.iter().find(|hello| !hello.refusal.is_empty()) {
        return Err(refused.refusal.clone());
    }
    for (rank, hello) in hellos.iter().enumerate() {
        if hello.rank as usize != rank || hello.world as usize != hellos.len() {
            return Err(format!(
                "worker {rank} says that it is {} of {}",
                hello.rank, hello.world
            ));
        }
        if hello.machine != first.machine {
            return Err("workers on several machines are not supported yet".to_owned());
        }
        if hello.encoding != first.encoding {
            return Err(format!(
                "workers encode KV differently: '{}' and '{}'",
                first.encoding, hello.encoding
            ));
        }
        if hello.groups.len() != first.groups.len() {
            return Err(format!(
                "worker {rank} has {} KV-cache groups",
                hello.groups.len()
            ));
        }
    }
    let groups = (0..first.groups.len())
        .map(|at| group(hellos, at))
        .collect::<Result<_, _>>()?;
    Ok(Fleet {
        groups,
        encoding: first.encoding.clone(),
        scales: scales(hellos),
    })
}

/// All ranks' scales as one digest: those of all layers in order, whatever the number of stages. Should ranks of one stage
/// differ, all of them count.
fn scales(hellos: &[RankHello]) -> String {
    if hellos.iter().all(|hello| hello.scales.is_empty()) {
        return String::new();
    }
    let mut stages: Vec<(u32, &str)> = hellos
        .iter()
        .map(|hello| (hello.stage, hello.scales.as_str()))
        .collect();
    stages.sort_unstable();
    stages.dedup();
    let all: Vec<&str> = stages.iter().map(|(_, scales)| *scales).collect();
    format!("blake3:{}", blake3::hash(all.join(";").as_bytes()).to_hex())
}

fn group(hellos: &[RankHello], at: usize) -> Result<FleetGroup, String> {
    let shares: Vec<(u32, &RankGroup)> = hellos
        .iter()
        .map(|hello| (hello.stage, &hello.groups[at]))
        .collect();
    let first = shares[0].1;
    for (_, share) in &shares {
        let same = share.group == first.group
            && share.kind == first.kind
            && share.heads_total == first.heads_total
            && share.block_tokens == first.block_tokens
            && share.page_tokens == first.page_tokens
            && share.cell_bytes == first.cell_bytes
            && share.window == first.window;
        if !same {
            return Err(format!(
                "workers differ in the sizes of KV-cache group {}",
                first.group
            ));
        }
    }
    let stages = stages(&shares)?;
    let mut layer_bounds = vec![0];
    let mut layer_names = Vec::new();
    for share in &stages {
        layer_bounds.push(layer_bounds.last().copied().unwrap_or(0) + share.layers);
        layer_names.extend(share.layer_names.iter().cloned());
    }
    let layers = layer_bounds.last().copied().unwrap_or(0);
    let head_bounds = head_bounds(&shares)?;
    let geometry = GroupGeometry {
        layers,
        heads: first.heads_total,
        ..geometry(first)?
    };
    geometry.validate().map_err(|error| error.to_string())?;
    let rule = GroupRule::new(geometry.kind, first.block_tokens, geometry.window)
        .map_err(|error| error.to_string())?;
    Cut::new(&layer_bounds, &head_bounds, &geometry).map_err(|error| error.to_string())?;
    let columns = head_bounds.len() as u32 - 1;
    let parts = shares
        .iter()
        .map(|(stage, share)| {
            let column = head_bounds
                .iter()
                .position(|bound| *bound == share.head_first);
            stage * columns + column.unwrap_or(0) as u32
        })
        .collect();
    Ok(FleetGroup {
        group: first.group,
        geometry,
        rule,
        layer_names,
        page_tokens: first.page_tokens,
        intro: GroupIntro {
            group: first.group,
            layer_bounds,
            head_bounds,
            parts,
        },
    })
}

/// The sizes of what one rank holds of a group.
///
/// # Errors
/// When its kind is none that there is.
pub(crate) fn geometry(share: &RankGroup) -> Result<GroupGeometry, String> {
    let kind = GroupKind::from_word(&share.kind)
        .ok_or_else(|| format!("unknown kind of KV-cache group: '{}'", share.kind))?;
    Ok(GroupGeometry {
        kind,
        layers: share.layers,
        heads: share.heads,
        block_tokens: kind.cells(share.block_tokens),
        cell_bytes: share.cell_bytes,
        window: (share.window > 0).then_some(share.window),
    })
}

/// The share of each pipeline stage; all ranks of a stage hold the same layers.
fn stages<'a>(shares: &[(u32, &'a RankGroup)]) -> Result<Vec<&'a RankGroup>, String> {
    let count = shares.iter().map(|(stage, _)| stage + 1).max().unwrap_or(0);
    (0..count)
        .map(|stage| {
            let mut of_stage = shares
                .iter()
                .filter(|(s, _)| *s == stage)
                .map(|(_, share)| *share);
            let first = of_stage
                .next()
                .ok_or_else(|| format!("pipeline stage {stage} has no worker"))?;
            if of_stage.any(|share| share.layer_names != first.layer_names) {
                return Err(format!(
                    "workers of pipeline stage {stage} hold different layers"
                ));
            }
            if first.layers as usize != first.layer_names.len() || first.layers == 0 {
                return Err(format!(
                    "pipeline stage {stage} says {} layers but names {}",
                    first.layers,
                    first.layer_names.len()
                ));
            }
            Ok(first)
        })
        .collect()
}

/// Where each distinct share of heads begins; they must tile all heads, and every stage must be cut alike.
fn head_bounds(shares: &[(u32, &RankGroup)]) -> Result<Vec<u32>, String> {
    let mut ranges: Vec<(u32, u32)> = shares
        .iter()
        .map(|(_, share)| (share.head_first, share.heads))
        .collect();
    ranges.sort_unstable();
    ranges.dedup();
    let mut bounds = vec![0];
    for (first, heads) in &ranges {
        if *heads == 0 || bounds.last() != Some(first) {
            return Err("the workers' KV heads overlap or leave some out".to_owned());
        }
        bounds.push(first + heads);
    }
    let total = shares[0].1.heads_total;
    if bounds.last() != Some(&total) {
        return Err(format!("the workers hold no {total} KV heads together"));
    }
    let stages = shares.iter().map(|(stage, _)| stage + 1).max().unwrap_or(0);
    for stage in 0..stages {
        let mut firsts: Vec<u32> = shares
            .iter()
            .filter(|(s, _)| *s == stage)
            .map(|(_, share)| share.head_first)
            .collect();
        firsts.sort_unstable();
        firsts.dedup();
        if firsts.len() != ranges.len() {
            return Err(format!("pipeline stage {stage} does not hold all KV heads"));
        }
    }
    Ok(bounds)
}

/// Ranks that hold part `part`, in ascending order.
pub fn replicas(intro: &GroupIntro, part: u32) -> Vec<u32> {
    (0..)
        .zip(&intro.parts)
        .filter(|(_, of)| **of == part)
        .map(|(rank, _)| rank)
        .collect()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::meta::VERSION;

    /// A rank of `world` with `layers` layers from `first_layer` and one group.
    pub(crate) fn hello(
        rank: u32,
        world: u32,
        stage: u32,
        first_layer: u32,
        layers: u32,
        heads: (u32, u32, u32),
    ) -> RankHello {
        RankHello {
            version: VERSION,
            rank,
            world,
            stage,
            refusal: String::new(),
            encoding: "test".into(),
            scales: String::new(),
            machine: "here".into(),
            groups: vec![RankGroup {
                group: 0,
                kind: "full".into(),
                layers,
                layer_names: (first_layer..first_layer + layers)
                    .map(|layer| format!("layer.{layer}"))
                    .collect(),
                head_first: heads.0,
                heads: heads.1,
                heads_total: heads.2,
                block_tokens: 4,
                page_tokens: 4,
                cell_bytes: 8,
                window: 0,
            }],
        }
    }

    #[test]
    fn tensor_and_pipeline_shares_make_a_grid() {
        let hellos = [
            hello(0, 4, 0, 0, 3, (0, 2, 4)),
            hello(1, 4, 0, 0, 3, (2, 2, 4)),
            hello(2, 4, 1, 3, 1, (0, 2, 4)),
            hello(3, 4, 1, 3, 1, (2, 2, 4)),
        ];
        let fleet = assemble(&hellos).unwrap();
        let intro = &fleet.groups[0].intro;
        assert_eq!(intro.layer_bounds, [0, 3, 4]);
        assert_eq!(intro.head_bounds, [0, 2, 4]);
        assert_eq!(intro.parts, [0, 1, 2, 3]);
        assert_eq!(fleet.groups[0].geometry.layers, 4);
        assert_eq!(fleet.groups[0].layer_names[3], "layer.3");
    }

    #[test]
    fn replicas_share_a_part() {
        let hellos = [
            hello(0, 4, 0, 0, 2, (0, 1, 2)),
            hello(1, 4, 0, 0, 2, (0, 1, 2)),
            hello(2, 4, 0, 0, 2, (1, 1, 2)),
            hello(3, 4, 0, 0, 2, (1, 1, 2)),
        ];
        let fleet = assemble(&hellos).unwrap();
        let intro = &fleet.groups[0].intro;
        assert_eq!(intro.parts, [0, 0, 1, 1]);
        assert_eq!(replicas(intro, 1), [2, 3]);
    }

    #[test]
    fn shares_that_make_no_grid_are_refused() {
        let gap = [
            hello(0, 2, 0, 0, 2, (0, 1, 4)),
            hello(1, 2, 0, 0, 2, (2, 2, 4)),
        ];
        assert!(assemble(&gap).is_err());
        let missing = [
            hello(0, 2, 0, 0, 2, (0, 2, 4)),
            hello(1, 2, 1, 2, 2, (2, 2, 4)),
        ];
        assert!(assemble(&missing).is_err());
        let mut refused = hello(0, 1, 0, 0, 2, (0, 2, 2));
        refused.refusal = "context parallelism is not supported".into();
        assert_eq!(
            assemble(&[refused]).unwrap_err(),
            "context parallelism is not supported"
        );
        let mut other = [
            hello(0, 2, 0, 0, 2, (0, 1, 2)),
            hello(1, 2, 0, 0, 2, (1, 1, 2)),
        ];
        other[1].encoding = "amx".into();
        assert!(assemble(&other).is_err());
        other[1].encoding = "test".into();
        assert!(assemble(&other).is_ok());
        other[1].machine = "there".into();
        assert!(assemble(&other).is_err());
    }
}
