//! Frames and file descriptors over a Unix stream socket. Works blocking (with the socket's timeouts) or not.
//!
//! Trusts nobody: a frame over the limit is refused before a byte is allocated for it, descriptors are received only when
//! some are expected and at most as many, and whatever else comes is closed. Deliberately absent: what messages mean.

use std::collections::VecDeque;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use kvd_wire::frame::{Decoder, Frame};
use kvd_wire::limits;
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_send_buffer_size, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};

use crate::{Error, pending};

/// Descriptors that one reply may bring: an arena and its table.
const REPLY_FDS: usize = 2;
/// What the socket is asked to buffer of what we send, in bytes: 6,250 hashes fit. The kernel may give less.
const SEND_BUFFER_BYTES: usize = 512 << 10;
/// How long a blocking receive looks for bytes before it sleeps. Most answers come within that, and being woken costs as much: on a
/// virtual machine a core that has gone idle takes 30 us and more to come back.
const LOOK_FOR: Duration = Duration::from_micros(50);
/// How often a connection that the daemon has closed is read from for why.
const PARTING_READS: usize = 64;
/// A send buffer that grew beyond this is given back once it is empty, in bytes.
const KEEP_BYTES: usize = 1 << 20;

/// Whether a call may wait for the other side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    /// As long as the socket's timeout.
    Blocking,
    /// Not at all.
    Now,
}

/// How far a call came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Progress {
    /// Everything written, or something read.
    Done,
    /// It would have to wait (longer).
    Wait,
}

/// One end of a session's socket.
#[derive(Debug)]
pub(crate) struct Connection {
    socket: OwnedFd,
    decoder: Decoder,
    out: Vec<u8>,
    written: usize,
    /// Descriptors that go with the first byte of what is in `out` (only a Hello has some).
    fds_out: Vec<OwnedFd>,
    fds_in: VecDeque<OwnedFd>,
    /// Whether replies that bring descriptors are still to come.
    expect_fds: bool,
}

impl Connection {
    /// Connects; with [`Mode::Blocking`] within `timeout`, which also becomes the socket's.
    pub(crate) fn connect(path: &Path, mode: Mode, timeout: Duration) -> Result<Self, Error> {
        let address = SocketAddrUnix::new(path).map_err(|_| {
            Error::invalid(format!(
                "the socket path {} is too long: keep it under 108 bytes",
                path.display()
            ))
        })?;
        let flags = match mode {
            Mode::Blocking => SocketFlags::CLOEXEC,
            Mode::Now => SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        };
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
            .map_err(|e| Error::io("cannot make a socket", e))?;
        let connection = Self::over(socket);
        if mode == Mode::Blocking {
            connection.set_timeout(timeout)?;
        }
        rustix::net::connect(&connection.socket, &address).map_err(|e| match e {
            Errno::AGAIN => Error::timeout(),
            e => Error::unavailable(format!(
                "no kvd daemon at {}: {e}; start one with `kvd serve`",
                path.display()
            )),
        })?;
        let _ = set_socket_send_buffer_size(&connection.socket, SEND_BUFFER_BYTES);
        Ok(connection)
    }

    fn over(socket: OwnedFd) -> Self {
        Self {
            socket,
            decoder: Decoder::new(limits::FRAME_BYTES),
            out: Vec::new(),
            written: 0,
            fds_out: Vec::new(),
            fds_in: VecDeque::new(),
            expect_fds: false,
        }
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// The longest that one blocking send or receive waits.
    pub(crate) fn set_timeout(&self, timeout: Duration) -> Result<(), Error> {
        // Zero would mean for ever.
        let timeout = Some(timeout.max(Duration::from_millis(1)));
        for which in [Timeout::Recv, Timeout::Send] {
            set_socket_timeout(&self.socket, which, timeout)
                .map_err(|e| Error::io("cannot set a timeout", e))?;
        }
        Ok(())
    }

    /// Where frames are appended to; [`Connection::flush`] sends them.
    pub(crate) fn out(&mut self) -> &mut Vec<u8> {
        &mut self.out
    }

    /// Sends these with the first byte that is still to be sent.
    pub(crate) fn attach(&mut self, fds: Vec<OwnedFd>) {
        debug_assert_eq!(self.written, 0);
        self.fds_out = fds;
    }

    /// Bytes that are still to be sent.
    pub(crate) fn unsent(&self) -> usize {
        self.out.len() - self.written
    }

    /// Whether a reply that brings descriptors is still to come: without, none are received.
    pub(crate) fn expect_fds(&mut self, expect: bool) {
        self.expect_fds = expect;
        if !expect {
            self.fds_in.clear();
        }
    }

    /// Sends what was appended. [`Progress::Wait`]: some of it is still to be sent.
    pub(crate) fn flush(&mut self, mode: Mode) -> Result<Progress, Error> {
        let mut flags = SendFlags::NOSIGNAL;
        if mode == Mode::Now {
            flags |= SendFlags::DONTWAIT;
        }
        while self.written < self.out.len() {
            let rest = &self.out[self.written..];
            let sent = if self.fds_out.is_empty() {
                rustix::net::send(&self.socket, rest, flags)
            } else {
                send_with_fds(&self.socket, rest, &self.fds_out, flags)
            };
            match sent {
                Ok(n) => {
                    self.written += n;
                    self.fds_out.clear();
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(Progress::Wait),
                Err(e) => {
                    return Err(self
                        .parting()
                        .unwrap_or_else(|| Error::io("the daemon is gone", e)));
                }
            }
        }
        self.out.clear();
        self.written = 0;
        if self.out.capacity() > KEEP_BYTES {
            self.out = Vec::new();
        }
        Ok(Progress::Done)
    }

    /// Receives something. [`Progress::Wait`]: nothing came (in time).
    pub(crate) fn fill(&mut self, mode: Mode) -> Result<Progress, Error> {
        if mode == Mode::Now {
            return self.receive(Mode::Now);
        }
        let begun = now();
        loop {
            match self.receive(Mode::Now)? {
                Progress::Done => return Ok(Progress::Done),
                // The other side may need this very core.
                Progress::Wait if begun.elapsed() < LOOK_FOR => std::thread::yield_now(),
                Progress::Wait => return self.receive(Mode::Blocking),
            }
        }
    }

    fn receive(&mut self, mode: Mode) -> Result<Progress, Error> {
        let mut flags = RecvFlags::CMSG_CLOEXEC;
        if mode == Mode::Now {
            flags |= RecvFlags::DONTWAIT;
        }
        loop {
            let space = self.decoder.space();
            let got = if self.expect_fds {
                recv_with_fds(&self.socket, space, &mut self.fds_in, flags)
            } else {
                // Without room for them the kernel closes descriptors that nobody asked for.
                rustix::net::recv(&self.socket, space, flags).map(|(n, _)| n)
            };
            match got {
                Ok(0) => return Err(Error::unavailable("the daemon has gone away").ending()),
                Ok(n) => {
                    self.decoder.filled(n);
                    if self.fds_in.len() > REPLY_FDS {
                        return Err(Error::protocol(
                            "the daemon sent file descriptors that nobody asked for",
                        ));
                    }
                    return Ok(Progress::Done);
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(Progress::Wait),
                Err(e) => return Err(Error::io("the daemon is gone", e)),
            }
        }
    }

    /// The next whole frame, if it has come. One that answers no request says why the daemon ends the session: that is the error.
    pub(crate) fn next(&mut self) -> Result<Option<Frame>, Error> {
        let frame = self
            .decoder
            .next()
            .map_err(|e| Error::protocol(e.to_string()))?;
        match frame {
            Some(frame) if frame.id == 0 => Err(pending::unasked(frame.body)),
            frame => Ok(frame),
        }
    }

    /// Of a daemon that closed the connection while something was sent to it: what it said last, if it was of that kind and comes
    /// within what a connection may have under way.
    fn parting(&mut self) -> Option<Error> {
        self.expect_fds(false);
        for _ in 0..PARTING_READS {
            loop {
                match self.next() {
                    Ok(Some(_)) => {}
                    Ok(None) => break,
                    Err(why) => return Some(why),
                }
            }
            match self.receive(Mode::Now) {
                Ok(Progress::Done) => {}
                Ok(Progress::Wait) | Err(_) => break,
            }
        }
        None
    }

    /// The two descriptors that a reply says it brought.
    pub(crate) fn take_fds(&mut self) -> Result<(OwnedFd, OwnedFd), Error> {
        match (self.fds_in.pop_front(), self.fds_in.pop_front()) {
            (Some(arena), Some(table)) => Ok((arena, table)),
            _ => Err(Error::protocol(
                "the daemon's file descriptors did not arrive: is the limit of open files reached?",
            )),
        }
    }
}

#[allow(
    clippy::disallowed_methods,
    reason = "connects, requests and blocking calls are timed at this edge; vDSO, no system call"
)]
pub(crate) fn now() -> Instant {
    Instant::now()
}

fn send_with_fds(
    socket: &OwnedFd,
    bytes: &[u8],
    fds: &[OwnedFd],
    flags: SendFlags,
) -> Result<usize, Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(limits::FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
    if !control.push(SendAncillaryMessage::ScmRights(&fds)) {
        return Err(Errno::TOOBIG);
    }
    rustix::net::sendmsg(socket, &[IoSlice::new(bytes)], &mut control, flags)
}

fn recv_with_fds(
    socket: &OwnedFd,
    space: &mut [u8],
    fds: &mut VecDeque<OwnedFd>,
    flags: RecvFlags,
) -> Result<usize, Errno> {
    let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(REPLY_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut room);
    let mut into = [IoSliceMut::new(space)];
    let got = rustix::net::recvmsg(socket, &mut into, &mut control, flags)?;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            fds.extend(received);
        }
    }
    Ok(got.bytes)
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    use kvd_wire::session::ErrorKind as Wire;
    use kvd_wire::{failure, frame};

    use super::*;
    use crate::ErrorKind;

    fn pair() -> (Connection, UnixStream) {
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        (Connection::over(ours.into()), theirs)
    }

    fn busy(id: u32) -> Vec<u8> {
        let mut out = Vec::new();
        let reply = failure(Wire::Busy, "no room: close one", true);
        frame::encode(id, &reply, &mut out);
        out
    }

    fn ping(connection: &mut Connection) -> Result<Progress, Error> {
        connection.out().extend_from_slice(&[0; 16]);
        connection.flush(Mode::Blocking)
    }

    #[test]
    fn what_a_daemon_says_before_it_closes_is_heard_by_who_sends() {
        let (mut connection, mut theirs) = pair();
        theirs.write_all(&busy(9)).expect("written");
        theirs.write_all(&busy(0)).expect("written");
        drop(theirs);
        let error = ping(&mut connection).expect_err("closed");
        assert_eq!(error.kind(), ErrorKind::Busy);
        assert!(error.ends_session() && error.to_string().contains("close one"));
        let (mut connection, theirs) = pair();
        drop(theirs);
        let error = ping(&mut connection).expect_err("closed");
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    }

    #[test]
    fn a_frame_that_nobody_asked_for_is_a_failure_or_breaks_the_protocol() {
        let (mut connection, mut theirs) = pair();
        theirs.write_all(&busy(0)).expect("written");
        assert_eq!(connection.fill(Mode::Now).expect("read"), Progress::Done);
        let error = connection.next().expect_err("refused");
        assert_eq!(error.kind(), ErrorKind::Busy);
        let mut odd = Vec::new();
        frame::encode(0, &kvd_wire::session::Reply::default(), &mut odd);
        theirs.write_all(&odd).expect("written");
        assert_eq!(connection.fill(Mode::Now).expect("read"), Progress::Done);
        let error = connection.next().expect_err("nobody asked");
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert!(error.ends_session());
    }

    #[test]
    fn a_daemon_that_reads_no_more_and_goes_on_talking_is_not_heard_for_ever() {
        let (mut connection, mut theirs) = pair();
        theirs.shutdown(std::net::Shutdown::Read).expect("shut");
        std::thread::scope(|scope| {
            scope.spawn(move || {
                let frames = busy(9).repeat(1000);
                while theirs.write_all(&frames).is_ok() {}
            });
            let error = ping(&mut connection).expect_err("closed");
            assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
            drop(connection);
        });
    }
}
