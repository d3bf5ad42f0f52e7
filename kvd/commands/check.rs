//! `kvd config check`: the effective configuration, and where each value came from.

use crate::config::Config;

/// Prints one `key = value  # source` line for each setting. It is valid TOML.
pub(crate) fn run(config: &Config) -> anyhow::Result<()> {
    let rows = config.rows();
    let width = rows
        .iter()
        .map(|(key, value, _)| key.len() + value.len())
        .max()
        .unwrap_or(0)
        + 5;
    let mut text = String::new();
    for (key, value, source) in rows {
        let line = format!("{key} = {}", toml::Value::String(value));
        text.push_str(&format!("{line:<width$}  # {source}\n"));
    }
    super::print(&text)
}
