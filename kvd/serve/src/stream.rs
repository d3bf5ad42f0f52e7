//! Bytes and file descriptors over a nonblocking Unix stream socket. What the bytes mean is not known here.

use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};

use kvd_wire::limits::FDS;
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

/// What one read gave.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Received {
    /// So many bytes.
    Bytes(usize),
    /// Nothing now.
    Nothing,
    /// The peer has closed.
    Closed,
}

/// Reads once into `space`. Descriptors that came are added to `fds`, closed on exec.
///
/// # Errors
/// `InvalidData` when more descriptors came than any message has: the kernel has closed the rest.
pub(crate) fn receive(
    socket: &impl AsFd,
    space: &mut [u8],
    fds: &mut Vec<OwnedFd>,
) -> io::Result<Received> {
    let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut room);
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let message = match recvmsg(socket, &mut [IoSliceMut::new(space)], &mut control, flags) {
        Ok(message) => message,
        Err(Errno::AGAIN | Errno::INTR) => return Ok(Received::Nothing),
        Err(Errno::CONNRESET) => return Ok(Received::Closed),
        Err(e) => return Err(e.into()),
    };
    for part in control.drain() {
        if let RecvAncillaryMessage::ScmRights(came) = part {
            fds.extend(came);
        }
    }
    if message.flags.contains(ReturnFlags::CTRUNC) || fds.len() > FDS {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "too many file descriptors",
        ));
    }
    Ok(if message.bytes == 0 {
        Received::Closed
    } else {
        Received::Bytes(message.bytes)
    })
}

/// Bytes that are to be sent, with descriptors at some of them.
#[derive(Debug, Default)]
pub(crate) struct Outbox {
    bytes: Vec<u8>,
    sent: usize,
    /// Descriptors, and the place in `bytes` of the first byte that they travel with.
    fds: VecDeque<(usize, Vec<OwnedFd>)>,
}

/// A buffer that grew beyond this is given back as soon as it is empty, in bytes.
const KEEP_BYTES: usize = 256 << 10;

impl Outbox {
    /// Where the next frame is to be appended.
    pub(crate) fn buffer(&mut self) -> &mut Vec<u8> {
        &mut self.bytes
    }

    /// Lets these descriptors travel with the first byte that is appended after this call.
    pub(crate) fn attach(&mut self, fds: Vec<OwnedFd>) {
        self.fds.push_back((self.bytes.len(), fds));
    }

    /// Bytes that have not been sent.
    pub(crate) fn pending(&self) -> usize {
        self.bytes.len() - self.sent
    }

    /// Bytes held allocated.
    pub(crate) fn allocated(&self) -> usize {
        self.bytes.capacity()
    }

    /// Sends what the socket takes. `true`: everything has gone.
    pub(crate) fn send(&mut self, socket: &impl AsFd) -> io::Result<bool> {
        while self.sent < self.bytes.len() {
            let here = self.fds.front().is_some_and(|(at, _)| *at == self.sent);
            let next = self
                .fds
                .get(usize::from(here))
                .map_or(self.bytes.len(), |(at, _)| *at);
            let slice = &self.bytes[self.sent..next];
            let fds = if here {
                self.fds.front().map_or(&[][..], |(_, fds)| fds)
            } else {
                &[]
            };
            match send_once(socket, slice, fds) {
                Ok(n) => {
                    self.sent += n;
                    if here {
                        self.fds.pop_front();
                    }
                }
                Err(Errno::AGAIN) => return Ok(false),
                Err(Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        self.bytes.clear();
        self.sent = 0;
        if self.bytes.capacity() > KEEP_BYTES {
            self.bytes = Vec::new();
        }
        Ok(true)
    }
}

fn send_once(socket: &impl AsFd, bytes: &[u8], fds: &[OwnedFd]) -> Result<usize, Errno> {
    let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS))];
    let mut control = SendAncillaryBuffer::new(&mut room);
    let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    if !borrowed.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&borrowed)) {
        return Err(Errno::MSGSIZE);
    }
    sendmsg(
        socket,
        &[IoSlice::new(bytes)],
        &mut control,
        SendFlags::NOSIGNAL | SendFlags::DONTWAIT,
    )
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::net::UnixStream;

    use super::*;

    fn file() -> OwnedFd {
        File::open("/dev/null").expect("opens").into()
    }

    #[test]
    fn descriptors_come_with_the_first_byte_of_their_frame() {
        let (a, b) = UnixStream::pair().expect("a pair");
        let mut out = Outbox::default();
        out.buffer().extend_from_slice(b"before");
        out.attach(vec![file(), file()]);
        out.buffer().extend_from_slice(b"with");
        assert!(out.send(&a).expect("sends"));
        assert_eq!(out.pending(), 0);
        let (mut got, mut fds, mut at) = (vec![0; 64], Vec::new(), 0);
        while at < 10 {
            match receive(&b, &mut got[at..], &mut fds).expect("receives") {
                Received::Bytes(n) => at += n,
                other => panic!("{other:?} after {at} bytes"),
            }
        }
        assert_eq!(&got[..10], b"beforewith");
        assert_eq!(fds.len(), 2);
        assert_eq!(
            receive(&b, &mut got, &mut fds).expect("receives"),
            Received::Nothing
        );
        drop(a);
        assert_eq!(
            receive(&b, &mut got, &mut fds).expect("receives"),
            Received::Closed
        );
    }

    #[test]
    fn more_descriptors_than_any_message_has_are_refused() {
        let (a, b) = UnixStream::pair().expect("a pair");
        let files: Vec<_> = (0..8).map(|_| file()).collect();
        let borrowed: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut control = SendAncillaryBuffer::new(&mut room);
        assert!(control.push(SendAncillaryMessage::ScmRights(&borrowed)));
        sendmsg(&a, &[IoSlice::new(b"x")], &mut control, SendFlags::empty()).expect("sends");
        let error = receive(&b, &mut [0; 8], &mut Vec::new()).expect_err("refused");
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }

    #[test]
    fn a_full_socket_keeps_the_rest_and_a_big_buffer_is_given_back() {
        let (a, b) = UnixStream::pair().expect("a pair");
        b.set_nonblocking(true).expect("set");
        let mut out = Outbox::default();
        out.buffer()
            .extend((0..4_000_000u32).map(|i| (i % 251) as u8));
        let (mut got, mut fds, mut space) = (Vec::new(), Vec::new(), vec![0; 1 << 20]);
        assert!(!out.send(&a).expect("sends"), "the socket is full");
        while got.len() < 4_000_000 {
            match receive(&b, &mut space, &mut fds).expect("receives") {
                Received::Bytes(n) => got.extend_from_slice(&space[..n]),
                Received::Nothing => drop(out.send(&a).expect("sends")),
                Received::Closed => panic!("closed"),
            }
        }
        assert!(out.send(&a).expect("sends"));
        assert!(got.iter().enumerate().all(|(i, b)| *b == (i % 251) as u8));
        assert!(out.allocated() <= KEEP_BYTES);
    }
}
