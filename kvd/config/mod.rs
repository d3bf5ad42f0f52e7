//! What the daemon is told: defaults, then a TOML file, then `KVD_*` variables, then flags; the later one wins.
//!
//! Every setting is declared once, in [`settings`]: its key, from which the name of the variable and of the flag follow, how
//! it is read and how it is shown. An unknown key or `KVD_*` variable is an error, because a misspelt limit is no limit.
//! Nothing outside the root package reads configuration.

mod file;
mod settings;
#[cfg(test)]
mod tests;
mod values;

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

pub(crate) use settings::{SETTINGS, Setting};
pub(crate) use values::{Eviction, LogFormat, Nvme, NvmeIo, Offload, Surroundings, Tenant, Values};

/// The tenant that is there without configuration.
pub(crate) const DEFAULT_TENANT: &str = "default";

/// A mistake on the command line itself, not in what it names.
#[derive(Debug)]
pub(crate) struct UsageError(String);

impl fmt::Display for UsageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for UsageError {}

/// Where a value came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Source {
    Default,
    File(PathBuf, usize),
    Env(String),
    Flag(String),
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File(path, line) => write!(f, "{}:{line}", path.display()),
            Self::Env(name) => write!(f, "env {name}"),
            Self::Flag(name) => write!(f, "flag --{name}"),
        }
    }
}

/// The effective configuration: immutable once loaded.
#[derive(Debug, Clone)]
pub(crate) struct Config {
    pub(crate) values: Values,
    sources: BTreeMap<&'static str, Source>,
    tenant_lines: BTreeMap<String, Source>,
}

/// What there is to read from.
#[derive(Debug, Default)]
pub(crate) struct Inputs {
    /// `--config`, or else `KVD_CONFIG`.
    pub(crate) file: Option<PathBuf>,
    /// The process environment; names that do not begin with `KVD_` are passed over.
    pub(crate) env: Vec<(String, String)>,
    /// Flags that were given: key, value.
    pub(crate) flags: Vec<(&'static str, String)>,
}

impl Inputs {
    /// The environment of this process, and these flags.
    pub(crate) fn of_process(file: Option<PathBuf>, flags: Vec<(&'static str, String)>) -> Self {
        let env = std::env::vars_os()
            .filter_map(|(k, v)| Some((k.into_string().ok()?, v.to_string_lossy().into_owned())))
            .collect();
        Self { file, env, flags }
    }
}

impl Config {
    /// Reads everything there is and checks it.
    ///
    /// # Errors
    /// For what can't be read, is unknown, or makes no sense together; the text names the place.
    pub(crate) fn load(inputs: &Inputs, surroundings: &Surroundings) -> Result<Self> {
        let mut config = Self {
            values: Values::defaults(surroundings),
            sources: SETTINGS.iter().map(|s| (s.key, Source::Default)).collect(),
            tenant_lines: BTreeMap::new(),
        };
        let from_env = inputs
            .env
            .iter()
            .find(|(k, _)| k == "KVD_CONFIG")
            .map(|(_, v)| PathBuf::from(v));
        if let Some(path) = inputs.file.clone().or(from_env) {
            let text = std::fs::read_to_string(&path)
                .with_context(|| format!("cannot read {}", path.display()))?;
            config.apply_file(&path, &text)?;
        }
        config.apply_env(&inputs.env)?;
        for (key, value) in &inputs.flags {
            let setting = settings::find(key).expect("flags are made from the table");
            config.apply(setting, value, Source::Flag(setting.flag()))?;
        }
        config.values.resolve();
        config.values.validate()?;
        Ok(config)
    }

    fn apply(&mut self, setting: &'static Setting, value: &str, source: Source) -> Result<()> {
        if let Err(reason) = (setting.set)(&mut self.values, value) {
            let text = format!(
                "{}: {value:?} is no {}: {reason} ({source})",
                setting.key, setting.value
            );
            match source {
                Source::Flag(_) => bail!(UsageError(text)),
                _ => bail!(text),
            }
        }
        self.sources.insert(setting.key, source);
        Ok(())
    }

    fn apply_file(&mut self, path: &Path, text: &str) -> Result<()> {
        let parsed = file::parse(path, text)?;
        for entry in parsed.settings {
            let at = Source::File(path.to_owned(), entry.line);
            let Some(setting) = settings::find(&entry.key) else {
                bail!(
                    "unknown key {:?} ({at}){}",
                    entry.key,
                    settings::did_you_mean(&entry.key)
                );
            };
            self.apply(setting, &entry.value, at)?;
        }
        for tenant in parsed.tenants {
            let at = Source::File(path.to_owned(), tenant.line);
            let mut made =
                Tenant::named(&tenant.name).map_err(|reason| anyhow::anyhow!("{reason} ({at})"))?;
            for entry in tenant.settings {
                let at = Source::File(path.to_owned(), entry.line);
                made.set(&entry.key, &entry.value)
                    .map_err(|reason| anyhow::anyhow!("{reason} ({at})"))?;
            }
            self.tenant_lines.insert(tenant.name.clone(), at);
            self.values.tenants.insert(tenant.name, made);
        }
        Ok(())
    }

    fn apply_env(&mut self, env: &[(String, String)]) -> Result<()> {
        let mut names: Vec<_> = env.iter().filter(|(k, _)| k.starts_with("KVD_")).collect();
        names.sort();
        for (name, value) in names {
            if name == "KVD_CONFIG" || is_service_link(name) {
                continue;
            }
            let key = name["KVD_".len()..].to_lowercase();
            let Some(setting) = settings::find(&key) else {
                bail!(
                    "unknown variable {name}{}: unset it",
                    settings::did_you_mean(&key)
                );
            };
            self.apply(setting, value, Source::Env(name.clone()))?;
        }
        Ok(())
    }

    /// Key, value as it would be written, and where it came from; one for each setting, then the tenants.
    pub(crate) fn rows(&self) -> Vec<(String, String, Source)> {
        let mut rows: Vec<_> = SETTINGS
            .iter()
            .map(|s| {
                (
                    s.key.to_owned(),
                    (s.show)(&self.values),
                    self.sources[s.key].clone(),
                )
            })
            .collect();
        for (name, tenant) in &self.values.tenants {
            if let Some(source) = self.tenant_lines.get(name) {
                for (key, value) in tenant.rows() {
                    rows.push((format!("tenants.{name}.{key}"), value, source.clone()));
                }
            }
        }
        rows
    }
}

/// Kubernetes gives every pod `KVD_SERVICE_HOST`, `KVD_PORT_...` when a Service is called `kvd`. Nobody meant us by them.
fn is_service_link(name: &str) -> bool {
    name == "KVD_PORT" || name.starts_with("KVD_PORT_") || name.starts_with("KVD_SERVICE_")
}
