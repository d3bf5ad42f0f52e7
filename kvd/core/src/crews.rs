//! Who writes which part: for one instance, namespace and group, the sessions that copy each part.
//!
//! A crew is made when it is first needed and never changes; when a member comes or goes it is retired, and blocks that were
//! reserved under it keep it until they are filled. Among replicas of a part the hash picks the writer ([`crate::replica_of`]).
//! All ranks must be there before anything is reserved: else core and connectors would count replicas differently, and a
//! process without a record might write. Deliberately absent: choosing another writer when one is lost; the block is given up.

use crate::api::{ErrorKind, Failure, NIL};
use crate::ids::Role;
use crate::sessions::Instance;
use crate::state::Core;

/// Most crews of one instance, retired ones included. A crew retires when a process comes or goes, so an instance gets here
/// only if its processes keep coming back while their copies don't end.
const MAX_CREWS: u32 = 512;

/// How one instance fills the blocks of one group.
#[derive(Debug)]
pub(crate) struct Team {
    pub(crate) space: u32,
    pub(crate) group: u8,
    pub(crate) cut: u16,
    /// The present crew; [`NIL`]: to be made.
    pub(crate) crew: u32,
}

impl Team {
    pub(crate) fn new(space: u32, group: u8, cut: u16) -> Self {
        Team {
            space,
            group,
            cut,
            crew: NIL,
        }
    }
}

/// The writers of each part.
#[derive(Debug, Default)]
pub(crate) struct Crew {
    pub(crate) instance: u32,
    pub(crate) space: u32,
    pub(crate) group: u8,
    pub(crate) cut: u16,
    pub(crate) slot_bytes: u64,
    pub(crate) crcs: u32,
    /// For each part, the sessions that have it, in ascending order of rank.
    pub(crate) parts: Vec<Vec<u32>>,
    /// Blocks that were reserved under it and are not filled.
    pub(crate) fills: u32,
    /// No team has it any more; it goes with its last fill.
    pub(crate) retired: bool,
}

impl Crew {
    /// Who writes this part of the block whose hash ends so.
    pub(crate) fn writer(&self, part: u32, low: u64) -> u32 {
        let replicas = &self.parts[part as usize];
        replicas[(low % replicas.len() as u64) as usize]
    }

    /// One bit for each part.
    pub(crate) fn all(&self) -> u128 {
        u128::MAX >> (128 - self.parts.len())
    }
}

fn unavailable(text: String) -> Failure {
    Failure::new(ErrorKind::Unavailable, text)
}

impl Core {
    /// The crew for new reservations. Unavailable while a rank is missing.
    pub(crate) fn crew(&mut self, instance: u32, space: u32, group: u8) -> Result<u32, Failure> {
        let teams = &self.instances[instance].teams;
        let Some(at) = teams
            .iter()
            .position(|team| team.space == space && team.group == group)
        else {
            let text = format!(
                "no process of this instance copies group {group}; register it in every rank"
            );
            return Err(unavailable(text));
        };
        if teams[at].crew != NIL {
            return Ok(teams[at].crew);
        }
        if self.instances[instance].crews >= MAX_CREWS {
            let text = "too many copies of former processes are unfinished; fence them";
            return Err(unavailable(text.into()));
        }
        let crew = self.muster(instance, space, group, teams[at].cut)?;
        let crew = self.crews.insert(crew);
        self.instances[instance].crews += 1;
        self.instances[instance].teams[at].crew = crew;
        Ok(crew)
    }

    fn muster(&self, instance: u32, space: u32, group: u8, cut: u16) -> Result<Crew, Failure> {
        let namespace = self.spaces.get(space);
        let stored = &namespace.cuts[usize::from(cut)];
        let mut members: Vec<u32> = self.instances[instance].sessions.clone();
        members.retain(|s| {
            let session = &self.sessions[*s];
            let joined = session.joined.iter().any(|joined| joined.space == space);
            session.attached && session.role.copies() && joined
        });
        members.sort_by_key(|s| self.sessions[*s].rank);
        let world = members.first().map_or(1, |s| self.sessions[*s].world) as usize;
        if members.len() < world {
            let count = members.len();
            let text = format!(
                "{count} of {world} ranks have registered this namespace; store once all have"
            );
            return Err(unavailable(text));
        }
        let mut parts = vec![Vec::new(); stored.cut.parts() as usize];
        for s in members {
            if let Some(part) = self.sessions[s].layout(space, group).and_then(|l| l.part) {
                parts[part as usize].push(s);
            }
        }
        if let Some(part) = parts.iter().position(Vec::is_empty) {
            let text =
                format!("no rank copies part {part} of group {group}; give every part to a rank");
            return Err(unavailable(text));
        }
        let slot_bytes = namespace.groups[usize::from(group)].slot_bytes;
        let crcs = stored.crcs;
        Ok(Crew {
            instance,
            space,
            group,
            cut,
            slot_bytes,
            crcs,
            parts,
            fills: 0,
            retired: false,
        })
    }

    /// A session that may be a member came or went: the instance's crews for this namespace are made anew when next needed.
    pub(crate) fn disband(&mut self, instance: u32, space: u32, role: Role) {
        if !role.copies() {
            return;
        }
        let Instance { teams, crews, .. } = &mut self.instances[instance];
        for team in teams.iter_mut().filter(|team| team.space == space) {
            let crew = std::mem::replace(&mut team.crew, NIL);
            if crew == NIL {
                continue;
            }
            self.crews[crew].retired = true;
            if self.crews[crew].fills == 0 {
                self.crews.remove(crew);
                *crews -= 1;
            }
        }
    }

    /// A block reserved under this crew is filled or free.
    pub(crate) fn leave_crew(&mut self, crew: u32) {
        let found = &mut self.crews[crew];
        found.fills -= 1;
        if found.fills == 0 && found.retired {
            let crew = self.crews.remove(crew);
            self.instances[crew.instance].crews -= 1;
        }
    }

    /// Forgets how the instance cuts groups of a namespace that no session of it has (with that group) any more.
    pub(crate) fn forget_teams(&mut self, instance: u32, space: u32) {
        let Core {
            instances,
            sessions,
            ..
        } = self;
        let Instance {
            sessions: members,
            teams,
            ..
        } = &mut instances[instance];
        teams.retain(|team| {
            let has = |s: &u32| sessions[*s].layout(space, team.group).is_some();
            team.space != space || members.iter().any(has)
        });
    }
}
