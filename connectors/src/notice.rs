//! What a half wants people to read: said once per change of state, never once per request. The halves have no logger of
//! their own, because the process they live in has one; the shim drains the notices into it.

use std::collections::VecDeque;

/// How loud.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    /// Good to know.
    Info,
    /// Something does not work as wanted; the engine goes on.
    Warning,
}

/// One line for the engine's log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Notice {
    /// How loud.
    pub level: Level,
    /// Lower case, without a full stop.
    pub text: String,
}

/// Most notices kept until they are drained; later ones are dropped.
const LIMIT: usize = 64;

/// A bounded list of notices.
#[derive(Debug, Default)]
pub struct Notices(VecDeque<Notice>);

impl Notices {
    /// Adds a line, unless too many wait already.
    pub fn add(&mut self, level: Level, text: impl Into<String>) {
        if self.0.len() < LIMIT {
            self.0.push_back(Notice {
                level,
                text: text.into(),
            });
        }
    }

    /// Adds an information.
    pub fn info(&mut self, text: impl Into<String>) {
        self.add(Level::Info, text);
    }

    /// Adds a warning.
    pub fn warn(&mut self, text: impl Into<String>) {
        self.add(Level::Warning, text);
    }

    /// Takes what has been added.
    pub fn drain(&mut self) -> Vec<Notice> {
        self.0.drain(..).collect()
    }

    /// Whether there is nothing to drain.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}
