//! Session sockets: their directories, their permissions, and what to do with a socket file that is already there.
//!
//! A daemon holds a lock on the directory of each of its sockets, so that two that start at once can't take each other's
//! file away. A socket file that nobody listens on is what a killed daemon left, and is replaced. Reading from sockets is
//! not here.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, Mode, OFlags};

/// Why a socket can't be listened on.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Somebody serves there.
    #[error("{0} is in use: another daemon serves it; stop that one or choose another --socket")]
    InUse(PathBuf),
    /// There is a file that is no socket.
    #[error("{0} is there and is no socket: remove it or choose another --socket")]
    NotASocket(PathBuf),
    /// Somebody else could exchange the socket for their own.
    #[error("{path} belongs to user {owner}: use a directory of your own")]
    ForeignDirectory {
        /// The directory.
        path: PathBuf,
        /// Its owner.
        owner: u32,
    },
    /// The system refused.
    #[error("cannot {what} {path}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// With which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// A socket that is listened on, nonblocking. Its file goes when this does.
#[derive(Debug)]
pub(crate) struct Listener {
    listener: UnixListener,
    path: PathBuf,
    /// Locked for as long as the socket is ours.
    _directory: OwnedFd,
}

impl Listener {
    /// Makes the directory if need be, and listens.
    pub(crate) fn bind(
        path: &Path,
        directory_mode: u32,
        socket_mode: u32,
    ) -> Result<Self, ListenError> {
        let system = |what, path: &Path| {
            let path = path.to_owned();
            move |source: io::Error| ListenError::System { what, path, source }
        };
        let directory = path
            .parent()
            .filter(|d| !d.as_os_str().is_empty())
            .unwrap_or(Path::new("."));
        fs::DirBuilder::new()
            .recursive(true)
            .mode(directory_mode)
            .create(directory)
            .map_err(system("make directory", directory))?;
        check_owner(directory)?;
        if let Some(above) = directory.parent().filter(|d| !d.as_os_str().is_empty()) {
            check_owner(above)?;
        }
        let lock = rustix::fs::open(
            directory,
            OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .map_err(|e| system("open", directory)(e.into()))?;
        rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive)
            .map_err(|_| ListenError::InUse(path.to_owned()))?;
        remove_stale(path)?;
        let listener = UnixListener::bind(path).map_err(system("listen on", path))?;
        fs::set_permissions(path, fs::Permissions::from_mode(socket_mode))
            .map_err(system("set permissions of", path))?;
        listener
            .set_nonblocking(true)
            .map_err(system("listen on", path))?;
        Ok(Self {
            listener,
            path: path.to_owned(),
            _directory: lock,
        })
    }

    /// The next connection, nonblocking and closed on exec; `None` when there is none now.
    pub(crate) fn accept(&self) -> io::Result<Option<UnixStream>> {
        match self.listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(true)?;
                Ok(Some(stream))
            }
            Err(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                ) =>
            {
                Ok(None)
            }
            // The peer went away between connecting and now.
            Err(e) if e.kind() == io::ErrorKind::ConnectionAborted => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Where it listens.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // Ours: the lock on the directory is still held.
        let _ = fs::remove_file(&self.path);
    }
}

fn check_owner(directory: &Path) -> Result<(), ListenError> {
    let found = fs::metadata(directory).map_err(|source| ListenError::System {
        what: "look at",
        path: directory.to_owned(),
        source,
    })?;
    let owner = found.uid();
    if owner == 0 || owner == rustix::process::geteuid().as_raw() {
        return Ok(());
    }
    Err(ListenError::ForeignDirectory {
        path: directory.to_owned(),
        owner,
    })
}

/// Removes a socket file on which nobody listens, if there is one.
fn remove_stale(path: &Path) -> Result<(), ListenError> {
    let found = match fs::symlink_metadata(path) {
        Ok(found) => found,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(source) => {
            return Err(ListenError::System {
                what: "look at",
                path: path.to_owned(),
                source,
            });
        }
    };
    if !found.file_type().is_socket() {
        return Err(ListenError::NotASocket(path.to_owned()));
    }
    match UnixStream::connect(path) {
        Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {}
        // Anything else, a full backlog too, means that somebody is there.
        _ => return Err(ListenError::InUse(path.to_owned())),
    }
    fs::remove_file(path).map_err(|source| ListenError::System {
        what: "remove",
        path: path.to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn temp() -> (tempfile::TempDir, PathBuf) {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("default").join("kvd.sock");
        (directory, path)
    }

    #[test]
    fn makes_the_directory_with_its_mode_and_cleans_up() {
        let (_keep, path) = temp();
        let listener = Listener::bind(&path, 0o700, 0o600).expect("binds");
        let mode = |p: &Path| fs::metadata(p).expect("there").permissions().mode() & 0o777;
        assert_eq!(mode(path.parent().expect("has one")), 0o700);
        assert_eq!(mode(&path), 0o600);
        assert!(listener.accept().expect("nothing wrong").is_none());
        let _client = UnixStream::connect(&path).expect("somebody listens");
        assert!(listener.accept().expect("nothing wrong").is_some());
        drop(listener);
        assert!(!path.exists());
    }

    #[test]
    fn refuses_where_somebody_serves() {
        let (_keep, path) = temp();
        let _first = Listener::bind(&path, 0o700, 0o600).expect("binds");
        let second = Listener::bind(&path, 0o700, 0o600);
        assert!(matches!(second, Err(ListenError::InUse(_))), "{second:?}");
        assert!(path.exists(), "and leaves the other's socket alone");
    }

    #[test]
    fn refuses_where_another_program_listens() {
        let (_keep, path) = temp();
        fs::create_dir(path.parent().expect("has one")).expect("made");
        let _other = UnixListener::bind(&path).expect("binds");
        assert!(matches!(
            Listener::bind(&path, 0o700, 0o600),
            Err(ListenError::InUse(_))
        ));
    }

    #[test]
    fn replaces_what_a_killed_daemon_left() {
        let (_keep, path) = temp();
        fs::create_dir(path.parent().expect("has one")).expect("made");
        drop(UnixListener::bind(&path).expect("binds"));
        assert!(path.exists(), "the file stays when the process ends");
        let listener = Listener::bind(&path, 0o700, 0o600).expect("binds");
        UnixStream::connect(&path).expect("somebody listens again");
        drop(listener);
    }

    #[test]
    fn leaves_files_that_are_no_sockets() {
        let (_keep, path) = temp();
        fs::create_dir(path.parent().expect("has one")).expect("made");
        fs::write(&path, "precious").expect("written");
        assert!(matches!(
            Listener::bind(&path, 0o700, 0o600),
            Err(ListenError::NotASocket(_))
        ));
        assert_eq!(fs::read_to_string(&path).expect("still there"), "precious");
    }
}
