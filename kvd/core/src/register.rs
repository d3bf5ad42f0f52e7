//! Register: a session joins a namespace and says how its instance cuts the blocks.
//! Deliberately absent: leaving; a session leaves when it ends.

use crate::api::{ErrorKind, Failure, GroupLayout, Output, Reply};
use crate::crews::Team;
use crate::geometry::Cut;
use crate::ids::NamespaceId;
use crate::record::NamespaceRecord;
use crate::sessions::{Joined, Layout};
use crate::spaces::no_arena;
use crate::state::Core;
use crate::step::Caller;

/// A layout that fits its group, before its cut has a number.
struct Checked {
    group: u8,
    cut: Cut,
    part: Option<u32>,
}

impl Core {
    pub(crate) fn register(
        &mut self,
        caller: Caller,
        record: &[u8],
        groups: &[GroupLayout<'_>],
        out: &mut Vec<Output>,
    ) -> Result<Reply, Failure> {
        let record = NamespaceRecord::parse(record).map_err(|e| Failure::invalid(e.to_string()))?;
        self.check_fits(caller, &record)?;
        let layouts = self.check_layouts(caller, &record, groups)?;
        let id = record.id();
        let known = self.spaces.find(caller.tenant, id);
        let joined = &self.sessions[caller.session].joined;
        if let Some(at) = joined.iter().position(|j| Some(j.space) == known) {
            return self.register_again(caller, at, id, &layouts);
        }
        let most = self.settings.max_session_namespaces;
        if joined.len() >= most as usize {
            let text = format!("this session has {most} namespaces already; open another session");
            return Err(Failure::new(ErrorKind::Busy, text));
        }
        if let Some(space) = known {
            self.check_team(caller, space, &layouts)?;
        }
        let space = match known {
            Some(space) => space,
            None => self.add_space(caller.tenant, id, record, out)?,
        };
        let joined = self.join(caller, space, layouts);
        self.drop_space_if_idle(space);
        self.write_table(caller.tenant, out);
        Ok(self.registered(caller, joined?, id))
    }

    fn registered(&self, caller: Caller, namespace: usize, id: NamespaceId) -> Reply {
        match &self.tenants[caller.tenant].pool {
            Some(pool) => Reply::Registered {
                namespace: namespace as u32,
                id,
                arena: pool.shape,
            },
            None => Reply::Failure(no_arena()),
        }
    }

    /// The record is of this tenant, and a block of each group fits an extent.
    fn check_fits(&self, caller: Caller, record: &NamespaceRecord) -> Result<(), Failure> {
        let tenant = &self.tenants[caller.tenant];
        let named = record.get("tenant").unwrap_or_default();
        if named != tenant.name {
            let (name, own) = (named.escape_debug(), &tenant.name);
            let text = format!(
                "the record is of tenant '{name}', this socket of '{own}'; use that tenant's socket"
            );
            return Err(Failure::invalid(text));
        }
        let Some(pool) = &tenant.pool else {
            return Err(no_arena());
        };
        let extent = pool.shape.extent_bytes;
        for (group, geometry) in record.groups().iter().enumerate() {
            let bytes = geometry.slot_bytes();
            if bytes > extent {
                let text = format!(
                    "a block of group {group} takes {bytes} bytes but an extent has {extent}; raise host.extent_size"
                );
                return Err(Failure::new(ErrorKind::Unsupported, text));
            }
        }
        Ok(())
    }

    fn check_layouts(
        &self,
        caller: Caller,
        record: &NamespaceRecord,
        groups: &[GroupLayout<'_>],
    ) -> Result<Vec<Checked>, Failure> {
        let known = record.groups();
        if groups.len() > known.len() {
            let text = format!(
                "{} layouts for {} groups; give one each",
                groups.len(),
                known.len()
            );
            return Err(Failure::invalid(text));
        }
        let mut checked: Vec<Checked> = Vec::with_capacity(groups.len());
        for layout in groups {
            let group = layout.group;
            let Some(geometry) = known.get(group as usize) else {
                let text = format!(
                    "a layout for group {group}, but the record has {}",
                    known.len()
                );
                return Err(Failure::invalid(text));
            };
            if checked.iter().any(|other| u32::from(other.group) == group) {
                let text = format!("two layouts for group {group}; give one");
                return Err(Failure::invalid(text));
            }
            let cut = Cut::new(layout.layer_bounds, layout.head_bounds, geometry)
                .map_err(|e| Failure::invalid(format!("layout of group {group}: {e}")))?;
            if layout.copies && !self.sessions[caller.session].role.copies() {
                let text = "a scheduler copies nothing; register it with copies off";
                return Err(Failure::invalid(text));
            }
            if layout.copies && layout.part >= cut.parts() {
                let (part, parts) = (layout.part, cut.parts());
                let text = format!("part {part} of group {group}, but its cut has {parts}");
                return Err(Failure::invalid(text));
            }
            let part = layout.copies.then_some(layout.part);
            checked.push(Checked {
                group: group as u8,
                cut,
                part,
            });
        }
        Ok(checked)
    }

    /// The same session registers the same record again: fine if nothing else is said than before.
    fn register_again(
        &self,
        caller: Caller,
        at: usize,
        id: NamespaceId,
        layouts: &[Checked],
    ) -> Result<Reply, Failure> {
        let joined = &self.sessions[caller.session].joined[at];
        let space = self.spaces.get(joined.space);
        let same = |old: &Layout, new: &Checked| {
            let cut = &space.cuts[usize::from(old.cut)].cut;
            old.group == new.group && old.part == new.part && *cut == new.cut
        };
        let pairs = joined.layouts.iter().zip(layouts);
        if joined.layouts.len() != layouts.len() || !pairs.into_iter().all(|(o, n)| same(o, n)) {
            let text =
                "this session registered the namespace with another layout; open a new session";
            return Err(Failure::invalid(text));
        }
        Ok(self.registered(caller, at, id))
    }

    /// All processes of an instance cut alike.
    fn check_team(&self, caller: Caller, space: u32, new: &[Checked]) -> Result<(), Failure> {
        let cuts = &self.spaces.get(space).cuts;
        for team in self.instances[caller.instance]
            .teams
            .iter()
            .filter(|t| t.space == space)
        {
            let cut = &cuts[usize::from(team.cut)].cut;
            if new
                .iter()
                .any(|layout| layout.group == team.group && layout.cut != *cut)
            {
                let group = team.group;
                let text = format!(
                    "another process of this instance cuts group {group} differently; give all the same bounds"
                );
                return Err(Failure::invalid(text));
            }
        }
        Ok(())
    }

    /// Joins and returns the short name.
    fn join(&mut self, caller: Caller, space: u32, new: Vec<Checked>) -> Result<usize, Failure> {
        let namespace = self.spaces.get_mut(space);
        let mut layouts = Vec::with_capacity(new.len());
        for layout in new {
            let Some(cut) = namespace.intern_cut(layout.group, &layout.cut) else {
                let text = "blocks of this namespace are cut in too many ways; use fewer layouts";
                return Err(Failure::new(ErrorKind::Busy, text));
            };
            layouts.push(Layout {
                group: layout.group,
                cut,
                part: layout.part,
            });
        }
        namespace.sessions += 1;
        namespace.used = self.now;
        self.tenants[caller.tenant].joined += 1;
        for layout in &layouts {
            let (group, cut) = (layout.group, layout.cut);
            let teams = &mut self.instances[caller.instance].teams;
            if !teams
                .iter()
                .any(|team| team.space == space && team.group == group)
            {
                teams.push(Team::new(space, group, cut));
            }
        }
        let session = &mut self.sessions[caller.session];
        session.joined.push(Joined { space, layouts });
        let (at, role) = (session.joined.len() - 1, session.role);
        self.disband(caller.instance, space, role);
        Ok(at)
    }

    /// The namespace that a session calls `short`.
    pub(crate) fn space_of(&self, caller: Caller, short: u32) -> Result<u32, Failure> {
        let joined = self.sessions[caller.session].joined.get(short as usize);
        joined.map(|joined| joined.space).ok_or_else(|| {
            let text = format!("namespace {short} is not registered in this session; register it");
            Failure::new(ErrorKind::NotFound, text)
        })
    }

    /// The group as the index has it, if the namespace has such a group.
    pub(crate) fn group_of(&self, space: u32, group: u32) -> Result<u8, Failure> {
        let groups = self.spaces.get(space).groups.len();
        if group as usize >= groups {
            let text = format!("group {group}, but the namespace has {groups}; count from 0");
            return Err(Failure::invalid(text));
        }
        Ok(group as u8)
    }
}
