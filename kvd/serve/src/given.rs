//! A word from one daemon to the next, beside a tenant's socket: which arena was given to clients, under which table.
//!
//! The next daemon waits for it, and takes over that one only: a client of two tenants must not be able to carry the
//! memory of one into the other, and one that slept through a whole daemon still has the table from before, in which the
//! present writers are missing. Without the word an offer is refused, which costs memory for a while and nothing else.

use std::fmt::Write as _;
use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// The file's name, beside the socket.
const NAME: &str = "arena-given";

/// An arena that was given to clients.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Given {
    /// Its id.
    pub(crate) id: [u8; 16],
    /// The inode of its memory.
    pub(crate) inode: u64,
    /// The inode of its generation table: every daemon that takes the memory over makes a new one.
    pub(crate) table: u64,
}

impl Given {
    /// The arena and the table behind two descriptors.
    pub(crate) fn of(id: [u8; 16], arena: &impl AsFd, table: &impl AsFd) -> io::Result<Self> {
        Ok(Self {
            id,
            inode: rustix::fs::fstat(arena)?.st_ino,
            table: rustix::fs::fstat(table)?.st_ino,
        })
    }

    /// What the daemon before this one has left. Something that can't be read is nothing.
    pub(crate) fn read(socket: &Path) -> Option<Self> {
        Self::parse(&fs::read_to_string(file(socket)).ok()?)
    }

    /// Leaves word for the next daemon.
    pub(crate) fn leave(&self, socket: &Path) {
        let file = file(socket);
        let written = fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&file)
            .and_then(|mut f| io::Write::write_all(&mut f, self.text().as_bytes()));
        if let Err(error) = written {
            tracing::warn!(%error, file = %file.display(), "a next daemon will not know that it should wait for this arena");
        }
    }

    /// Takes it back: nobody is left who could bring the arena.
    pub(crate) fn forget(socket: &Path) {
        let _ = fs::remove_file(file(socket));
    }

    fn text(&self) -> String {
        let mut text = String::new();
        for byte in self.id {
            let _ = write!(text, "{byte:02x}");
        }
        let _ = writeln!(text, " {} {}", self.inode, self.table);
        text
    }

    fn parse(text: &str) -> Option<Self> {
        let mut words = text.split_whitespace();
        let hex = words.next()?;
        let mut id = [0; 16];
        if hex.len() != 32 || !hex.is_ascii() {
            return None;
        }
        for (at, byte) in id.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&hex[2 * at..2 * at + 2], 16).ok()?;
        }
        let mut number = || words.next()?.parse().ok();
        Some(Self {
            id,
            inode: number()?,
            table: number()?,
        })
    }
}

fn file(socket: &Path) -> PathBuf {
    socket.with_file_name(NAME)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_left_is_read_and_taken_back() {
        let directory = tempfile::tempdir().expect("a directory");
        let socket = directory.path().join("kvd.sock");
        assert_eq!(Given::read(&socket), None);
        let given = Given {
            id: *b"0123456789abcdef",
            inode: 77,
            table: 78,
        };
        given.leave(&socket);
        assert_eq!(Given::read(&socket), Some(given));
        let others = [Given { inode: 5, ..given }, Given { table: 5, ..given }];
        for other in others {
            other.leave(&socket);
            assert_eq!(Given::read(&socket), Some(other));
        }
        Given::forget(&socket);
        assert_eq!(Given::read(&socket), None);
    }

    #[test]
    fn garbage_is_nothing() {
        for text in [
            "",
            "00 1",
            "x",
            &"é".repeat(16),
            &format!("{} x", "0".repeat(32)),
            &format!("{} 1", "0".repeat(32)),
            &format!("{} 1 x", "0".repeat(32)),
        ] {
            assert_eq!(Given::parse(text), None, "{text:?}");
        }
    }
}
