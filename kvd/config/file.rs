//! The TOML file, as keys, values as text, and lines for messages. What the keys mean is in `settings` and `values`.

use std::path::Path;

use anyhow::{Result, anyhow, bail};
use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// One `key = value`.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) key: String,
    pub(super) value: String,
    pub(super) line: usize,
}

/// One `[tenants.NAME]`.
#[derive(Debug)]
pub(super) struct TenantTable {
    pub(super) name: String,
    pub(super) line: usize,
    pub(super) settings: Vec<Entry>,
}

/// A whole file.
#[derive(Debug, Default)]
pub(super) struct Parsed {
    pub(super) settings: Vec<Entry>,
    pub(super) tenants: Vec<TenantTable>,
}

/// Longest file, in bytes.
const FILE_BYTES: usize = 1 << 20;

/// Reads the text of a file; `path` is for messages.
pub(super) fn parse(path: &Path, text: &str) -> Result<Parsed> {
    if text.len() > FILE_BYTES {
        bail!(
            "{} has {} bytes: no configuration is longer than {FILE_BYTES}",
            path.display(),
            text.len()
        );
    }
    let table = DeTable::parse(text).map_err(|e| anyhow!("{}: {e}", path.display()))?;
    let line = |at: usize| {
        1 + text.as_bytes()[..at.min(text.len())]
            .iter()
            .filter(|b| **b == b'\n')
            .count()
    };
    let place = |at: usize| format!("{}:{}", path.display(), line(at));
    let mut parsed = Parsed::default();
    for (key, value) in table.get_ref() {
        if key.get_ref() == "tenants" {
            let DeValue::Table(tenants) = value.get_ref() else {
                bail!(
                    "tenants is no table: write [tenants.NAME] ({})",
                    place(key.span().start)
                );
            };
            for (name, settings) in tenants {
                let DeValue::Table(settings) = settings.get_ref() else {
                    bail!(
                        "tenants.{} is no table: write [tenants.NAME] ({})",
                        name.get_ref(),
                        place(name.span().start)
                    );
                };
                parsed.tenants.push(TenantTable {
                    name: name.get_ref().to_string(),
                    line: line(name.span().start),
                    settings: entries(settings, &line, &place)?,
                });
            }
        } else {
            parsed.settings.push(entry(key, value, &line, &place)?);
        }
    }
    Ok(parsed)
}

type Key<'i> = Spanned<std::borrow::Cow<'i, str>>;

fn entries<'i>(
    table: &DeTable<'i>,
    line: &impl Fn(usize) -> usize,
    place: &impl Fn(usize) -> String,
) -> Result<Vec<Entry>> {
    table
        .iter()
        .map(|(k, v)| entry(k, v, line, place))
        .collect()
}

fn entry<'i>(
    key: &Key<'i>,
    value: &Spanned<DeValue<'i>>,
    line: &impl Fn(usize) -> usize,
    place: &impl Fn(usize) -> String,
) -> Result<Entry> {
    let at = key.span().start;
    let text = match value.get_ref() {
        DeValue::String(s) => s.to_string(),
        DeValue::Integer(n) => n.as_str().to_owned(),
        DeValue::Float(n) => n.as_str().to_owned(),
        DeValue::Boolean(b) => b.to_string(),
        _ => bail!(
            "{}: write one string or number ({})",
            key.get_ref(),
            place(at)
        ),
    };
    Ok(Entry {
        key: key.get_ref().to_string(),
        value: text,
        line: line(at),
    })
}
