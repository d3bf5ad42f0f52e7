//! Who is at the other end of a session: a descriptor of its process that becomes readable when the process is gone.
//!
//! `SO_PEERPIDFD` is preferred, because the kernel says it. A pidfd that the client sends is taken where the kernel is older.
//! Credentials by number (`SO_PEERCRED`) are deliberately absent: the pid there is 0 across pid namespaces, and numbers are
//! used again.

use std::fs;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::sys::socket::{getsockopt, sockopt};

/// The process at the other end, if the kernel tells.
pub(crate) fn pidfd_of_peer(socket: &impl AsFd) -> Option<OwnedFd> {
    getsockopt(&socket.as_fd(), sockopt::PeerPidfd).ok()
}

/// The process id behind a pidfd as this process sees it, 0 when it can't see it; `None` when it is no pidfd.
pub(crate) fn pid_behind(pidfd: &OwnedFd) -> Option<u32> {
    let text = fs::read_to_string(format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd())).ok()?;
    let pid = text.lines().find_map(|l| l.strip_prefix("Pid:"))?.trim();
    // -1: it has been reaped. 0: it lives in another pid namespace.
    Some(pid.parse::<u32>().unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_peer_is_a_process_and_a_file_is_not() {
        let (ours, _theirs) = UnixStream::pair().expect("a pair");
        if let Some(pidfd) = pidfd_of_peer(&ours) {
            assert_eq!(pid_behind(&pidfd), Some(std::process::id()));
        }
        let file = OwnedFd::from(fs::File::open("/dev/null").expect("opens"));
        assert_eq!(pid_behind(&file), None);
    }
}
