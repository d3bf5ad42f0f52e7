//! Setting up an io_uring, and finding out whether it really works here. Deliberately absent: its use (`uring`, `raw`).

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use io_uring::{IoUring, opcode, types};
use rustix::io::Errno;

use super::{Aligned, Backing, PAGE};

/// For the one thread that both submits and completes, and completions only when it asks for them; kernels before 6.1 don't
/// know that.
#[derive(Clone, Copy)]
enum Mode {
    OneThread,
    Cooperative,
    Plain,
}

/// A ring for so many operations. It begins with the first thread that uses it (see [`begin`]), so that it can be made by
/// another one.
///
/// # Errors
/// With what to do, when there is none to be had.
pub(super) fn build(entries: u32) -> Result<IoUring, String> {
    let mut refused = Errno::INVAL;
    for mode in [Mode::OneThread, Mode::Cooperative, Mode::Plain] {
        let mut builder = IoUring::builder();
        builder.dontfork();
        // An operation may be several.
        builder.setup_cqsize(entries * 4);
        match mode {
            Mode::OneThread => {
                builder
                    .setup_single_issuer()
                    .setup_defer_taskrun()
                    .setup_taskrun_flag()
                    .setup_submit_all()
                    .setup_r_disabled();
            }
            Mode::Cooperative => {
                builder
                    .setup_coop_taskrun()
                    .setup_taskrun_flag()
                    .setup_submit_all()
                    .setup_r_disabled();
            }
            Mode::Plain => {
                builder.setup_r_disabled();
            }
        }
        match builder.build(entries) {
            Ok(ring) if !ring.params().is_feature_ext_arg() => {
                return Err("this kernel's io_uring can't wait with a limit (before 5.11)".into());
            }
            Ok(ring) => return Ok(ring),
            Err(error) => refused = errno(&error),
        }
        if refused != Errno::INVAL {
            break;
        }
    }
    Err(explain(refused))
}

fn explain(refused: Errno) -> String {
    match refused {
        Errno::PERM | Errno::ACCESS => format!(
            "io_uring is denied here ({refused}): the container's seccomp profile or the sysctl kernel.io_uring_disabled forbids it"
        ),
        Errno::NOSYS => format!("this kernel has no io_uring ({refused})"),
        Errno::NOMEM => format!("no memory for an io_uring ({refused}): raise the memlock limit"),
        refused => format!("no io_uring could be set up: {refused}"),
    }
}

/// Makes the calling thread the ring's own.
///
/// # Errors
/// When it has begun already.
pub(super) fn begin(ring: &IoUring) -> Result<(), Errno> {
    ring.submitter()
        .register_enable_rings()
        .map_err(|e| errno(&e))
}

/// What an error of this crate's calls was.
pub(super) fn errno(error: &io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}

/// What a completion says.
pub(super) fn answer(result: i32) -> Result<usize, Errno> {
    usize::try_from(result).map_err(|_| Errno::from_raw_os_error(-result))
}

/// Reads a page through a ring of its own and compares it with the same page read without one: that a ring can be set up
/// does not prove that it reads.
///
/// # Errors
/// With the reason, when it does not.
pub(super) fn probe(backing: &Backing) -> Result<(), String> {
    let mut ring = build(2)?;
    let failed = |what: &str, e: Errno| format!("io_uring was set up, but {what}: {e}");
    begin(&ring).map_err(|e| failed("did not begin", e))?;
    ring.submitter()
        .register_files(&[backing.as_fd().as_raw_fd()])
        .map_err(|e| failed("it takes no file", errno(&e)))?;
    let mut plain = Aligned::new(1);
    let got = rustix::io::pread(backing, plain.bytes_mut(), 0)
        .map_err(|e| format!("{} can't be read: {e}", backing.path().display()))?;
    let mut read = Aligned::new(1);
    read.bytes_mut().fill(!plain.bytes()[0]);
    let address = read.bytes_mut().as_mut_ptr();
    let entry = opcode::Read::new(types::Fixed(0), address, PAGE as u32).build();
    // SAFETY: the page stays where it is until the read is over: nothing below returns before, except by `forget`.
    unsafe { ring.submission().push(&entry) }.expect("an empty queue");
    let completed = loop {
        match ring.submit_and_wait(1).map_err(|e| errno(&e)) {
            Ok(_) => {}
            Err(Errno::INTR | Errno::AGAIN | Errno::BUSY) => {}
            Err(e) => {
                // Whether the kernel will still write the page is not known.
                std::mem::forget((ring, read));
                return Err(failed("it does not submit", e));
            }
        }
        if let Some(entry) = ring.completion().next() {
            break entry.result();
        }
    };
    // The kernel takes a ring down later than this returns, and until then a device that it has would be in use.
    let _ = ring.submitter().unregister_files();
    match answer(completed) {
        Ok(n) if n == got && read.bytes()[..n] == plain.bytes()[..n] => Ok(()),
        Ok(n) => Err(format!(
            "io_uring was set up, but read {n} bytes that are not the {got} bytes there"
        )),
        Err(e) => Err(failed("does not read this device", e)),
    }
}
