//! What holds the bytes: a file of a directory, all of its space taken beforehand, or a block device. Opened for direct I/O and
//! by one process only.
//!
//! A file never grows later, so a full file system is an error here, at the start, and not in the middle of a write. Deliberately
//! absent: what the bytes mean (`store`), and how they move (the adapters).

use std::fs::DirBuilder;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt};
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, FallocateFlags, FileType, FlockOperation, Mode, OFlags, SeekFrom, StatxFlags,
};
use rustix::io::Errno;

use super::{OpenError, OpenErrorKind, PAGE};

/// Name of the file in a directory.
pub const FILE_NAME: &str = "kvd.nvme";

/// What was there when it was opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// Nothing: the file was made, and reads as zeros.
    New,
    /// A file of the wanted size, or a block device.
    Same,
    /// A file of so many bytes, fewer than wanted, which has been lengthened.
    Lengthened(u64),
    /// A file of so many bytes, more than wanted. It stays as it is: a store may lie there that needs all of them.
    Longer(u64),
}

/// An open file or block device that nobody else has. Unlocked when dropped.
#[derive(Debug)]
pub struct Backing {
    file: OwnedFd,
    path: PathBuf,
    bytes: u64,
    found: Found,
    filesystem: &'static str,
}

impl Backing {
    /// Opens what `path` names: a directory, made if missing, in which the file [`FILE_NAME`] gets `bytes` bytes
    /// (rounded down to pages) if it has fewer; or a block device, of which the first `bytes` bytes, or all, are used.
    ///
    /// # Errors
    /// `Busy` when another process has it, `NoSpace` when the file system has no room, `Unsupported` when it can't do direct I/O
    /// or take space beforehand, `Invalid` for paths and sizes that can't be, else `Unavailable`.
    pub fn open(path: &Path, bytes: Option<u64>) -> Result<Self, OpenError> {
        let bytes = bytes.map(|b| b - b % PAGE as u64);
        if bytes == Some(0) {
            return Err(invalid(format!(
                "{}: a store of less than {PAGE} bytes",
                path.display()
            )));
        }
        match std::fs::metadata(path) {
            Ok(found) if found.file_type().is_block_device() => Self::device(path, bytes),
            Ok(found) if !found.is_dir() => Err(invalid(format!(
                "{} is neither a directory nor a block device",
                path.display()
            ))),
            Ok(_) => Self::directory(path, bytes),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                if path.starts_with("/dev") {
                    return Err(invalid(format!("there is no device {}", path.display())));
                }
                DirBuilder::new()
                    .recursive(true)
                    .mode(0o700)
                    .create(path)
                    .map_err(|e| cannot("make", path, &e))?;
                Self::directory(path, bytes)
            }
            Err(e) => Err(cannot("look at", path, &e)),
        }
    }

    /// Opens what is there as it is: nothing is made, cut or lengthened.
    ///
    /// # Errors
    /// As [`Backing::open`]; also when there is nothing.
    pub fn existing(path: &Path) -> Result<Self, OpenError> {
        let found = std::fs::metadata(path).map_err(|e| cannot("look at", path, &e))?;
        if !found.is_dir() {
            return Self::open(path, None);
        }
        let path = path.join(FILE_NAME);
        let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let os = |e| OpenError::os(&format!("cannot open {}", path.display()), e);
        let file = rustix::fs::open(&path, flags, Mode::empty()).map_err(os)?;
        lock(&file, &path)?;
        let stat = rustix::fs::fstat(&file).map_err(os)?;
        let size = u64::try_from(stat.st_size).unwrap_or(0);
        let bytes = size - size % PAGE as u64;
        if bytes == 0 || FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(invalid(format!("{} holds no store", path.display())));
        }
        let backing = Self {
            filesystem: filesystem(&file),
            file,
            path,
            bytes,
            found: Found::Same,
        };
        backing.direct()?;
        check_alignment(&backing.file, &backing.path)?;
        Ok(backing)
    }

    fn device(path: &Path, bytes: Option<u64>) -> Result<Self, OpenError> {
        // Without CREATE, EXCL on a block device asks that nothing has it mounted or otherwise in use.
        let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::EXCL | OFlags::DIRECT;
        let file = rustix::fs::open(path, flags, Mode::empty()).map_err(|e| match e {
            Errno::BUSY => OpenError::new(
                OpenErrorKind::Busy,
                format!(
                    "the device {} is mounted or in use: take one that is free",
                    path.display()
                ),
            ),
            e => OpenError::os(&format!("cannot open {}", path.display()), e),
        })?;
        lock(&file, path)?;
        let size = rustix::fs::seek(&file, SeekFrom::End(0))
            .map_err(|e| OpenError::os(&format!("cannot measure {}", path.display()), e))?;
        let bytes = bytes.unwrap_or(size - size % PAGE as u64);
        if bytes == 0 || bytes > size {
            return Err(invalid(format!(
                "the device {} has {size} bytes, not {bytes}: set a smaller size",
                path.display()
            )));
        }
        check_alignment(&file, path)?;
        Ok(Self {
            file,
            path: path.to_owned(),
            bytes,
            found: Found::Same,
            filesystem: "block device",
        })
    }

    fn directory(directory: &Path, bytes: Option<u64>) -> Result<Self, OpenError> {
        let path = directory.join(FILE_NAME);
        let Some(bytes) = bytes else {
            return Err(invalid(format!(
                "{} is a directory: say how many bytes to use",
                directory.display()
            )));
        };
        let (file, new) = open_locked(&path)?;
        let stat = rustix::fs::fstat(&file)
            .map_err(|e| OpenError::os(&format!("cannot look at {}", path.display()), e))?;
        let size = u64::try_from(stat.st_size).unwrap_or(0);
        let found = match size {
            _ if new => Found::New,
            size if size == bytes => Found::Same,
            size if size < bytes => Found::Lengthened(size),
            size => Found::Longer(size),
        };
        let backing = Self {
            filesystem: filesystem(&file),
            file,
            path,
            bytes,
            found,
        };
        let ready = backing
            .direct()
            .and_then(|()| check_alignment(&backing.file, &backing.path))
            .and_then(|()| backing.take_space())
            .and_then(|()| backing.settle(directory));
        match ready {
            Ok(()) => Ok(backing),
            Err(error) => {
                backing.undo(size);
                Err(error)
            }
        }
    }

    fn direct(&self) -> Result<(), OpenError> {
        let set = rustix::fs::fcntl_getfl(&self.file)
            .and_then(|flags| rustix::fs::fcntl_setfl(&self.file, flags | OFlags::DIRECT));
        set.map_err(|e| match e {
            Errno::INVAL | Errno::OPNOTSUPP => self.no_direct_io(),
            e => OpenError::os(
                &format!("cannot set direct I/O on {}", self.path.display()),
                e,
            ),
        })?;
        let _ = rustix::fs::fchmod(&self.file, Mode::RUSR | Mode::WUSR);
        Ok(())
    }

    fn no_direct_io(&self) -> OpenError {
        OpenError::new(
            OpenErrorKind::Unsupported,
            format!(
                "{}: the file system ({}) refuses direct I/O: put the directory on ext4 or xfs, or give a block device",
                self.path.display(),
                self.filesystem
            ),
        )
    }

    /// Makes the file as long as wanted, and takes all of its space.
    fn take_space(&self) -> Result<(), OpenError> {
        let bytes = self.bytes;
        self.check_room()?;
        loop {
            match rustix::fs::fallocate(&self.file, FallocateFlags::empty(), 0, bytes) {
                Ok(()) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(Errno::NOSPC | Errno::DQUOT | Errno::FBIG) => return Err(self.no_room()),
                Err(Errno::OPNOTSUPP | Errno::NOSYS) => {
                    return Err(OpenError::new(
                        OpenErrorKind::Unsupported,
                        format!(
                            "{}: the file system ({}) can't take space beforehand: put the directory on ext4 or xfs, or give a block device",
                            self.path.display(),
                            self.filesystem
                        ),
                    ));
                }
                Err(e) => {
                    return Err(OpenError::os(
                        &format!("cannot take {bytes} bytes for {}", self.path.display()),
                        e,
                    ));
                }
            }
        }
    }

    /// Refuses what can't be there before any space is taken: some file systems would take all that is left, for everybody, and only
    /// then say no.
    fn check_room(&self) -> Result<(), OpenError> {
        let (Ok(fs), Ok(stat)) = (
            rustix::fs::fstatvfs(&self.file),
            rustix::fs::fstat(&self.file),
        ) else {
            return Ok(());
        };
        let taken = u64::try_from(stat.st_blocks)
            .unwrap_or(0)
            .saturating_mul(512);
        let free = fs.f_bavail.saturating_mul(fs.f_frsize);
        if self.bytes.saturating_sub(taken) > free {
            return Err(self.no_room());
        }
        Ok(())
    }

    fn no_room(&self) -> OpenError {
        OpenError::new(
            OpenErrorKind::NoSpace,
            format!(
                "{}: the file system ({}) has no room for {} bytes{}: free space or set a smaller size",
                self.path.display(),
                self.filesystem,
                self.bytes,
                free(&self.file)
            ),
        )
    }

    /// Makes the file's name and size durable, so that a power cut leaves what later flushes have promised.
    fn settle(&self, directory: &Path) -> Result<(), OpenError> {
        if matches!(self.found, Found::Same | Found::Longer(_)) {
            return Ok(());
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        rustix::fs::fsync(&self.file)
            .and_then(|()| rustix::fs::open(directory, flags, Mode::empty()))
            .and_then(rustix::fs::fsync)
            .map_err(|e| OpenError::os(&format!("cannot make {} durable", self.path.display()), e))
    }

    /// Leaves the file system as it was, as far as that goes.
    fn undo(&self, size: u64) {
        let _ = match self.found {
            Found::New => rustix::fs::unlink(&self.path),
            _ if size < self.bytes => rustix::fs::ftruncate(&self.file, size),
            _ => Ok(()),
        };
    }

    /// How many bytes it has, a multiple of [`PAGE`].
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// What was opened: the file or the device.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What was there before.
    pub fn found(&self) -> Found {
        self.found
    }

    /// Name of the file system, for status.
    pub fn filesystem(&self) -> &'static str {
        self.filesystem
    }

    /// The same for a file that a test has opened by itself.
    #[cfg(test)]
    pub(super) fn over(file: OwnedFd, path: &Path, bytes: u64) -> Self {
        Self {
            file,
            path: path.to_owned(),
            bytes,
            found: Found::Same,
            filesystem: "test",
        }
    }
}

impl AsFd for Backing {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Drop for Backing {
    fn drop(&mut self) {
        // A ring that had the file may be taken down by the kernel later than this; the lock must not last as long.
        let _ = rustix::fs::flock(&self.file, FlockOperation::Unlock);
    }
}

fn invalid(text: String) -> OpenError {
    OpenError::new(OpenErrorKind::Invalid, text)
}

fn cannot(verb: &str, path: &Path, error: &std::io::Error) -> OpenError {
    let what = format!("cannot {verb} {}", path.display());
    match Errno::from_io_error(error) {
        Some(errno) => OpenError::os(&what, errno),
        None => OpenError::new(OpenErrorKind::Unavailable, format!("{what}: {error}")),
    }
}

fn lock(file: &OwnedFd, path: &Path) -> Result<(), OpenError> {
    rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive).map_err(|e| match e {
        Errno::WOULDBLOCK => OpenError::new(
            OpenErrorKind::Busy,
            format!(
                "another process uses {}: give every daemon a directory or device of its own",
                path.display()
            ),
        ),
        e => OpenError::os(&format!("cannot lock {}", path.display()), e),
    })
}

/// The file, made if missing, and whether it was. Locked, and not one that somebody has removed meanwhile.
fn open_locked(path: &Path) -> Result<(OwnedFd, bool), OpenError> {
    let what = || format!("cannot open {}", path.display());
    let plain = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
    for _ in 0..4 {
        let mode = Mode::RUSR | Mode::WUSR;
        let (file, new) = match rustix::fs::open(path, plain | OFlags::CREATE | OFlags::EXCL, mode)
        {
            Ok(file) => (file, true),
            Err(Errno::EXIST) => match rustix::fs::open(path, plain, mode) {
                Ok(file) => (file, false),
                Err(Errno::NOENT) => continue,
                Err(Errno::LOOP) => {
                    return Err(invalid(format!(
                        "{} is a link: remove it, or give the directory that it leads to",
                        path.display()
                    )));
                }
                Err(e) => return Err(OpenError::os(&what(), e)),
            },
            Err(e) => return Err(OpenError::os(&what(), e)),
        };
        let held = rustix::fs::fstat(&file).map_err(|e| OpenError::os(&what(), e))?;
        if FileType::from_raw_mode(held.st_mode) != FileType::RegularFile {
            return Err(invalid(format!("{} is no plain file", path.display())));
        }
        lock(&file, path)?;
        match rustix::fs::stat(path) {
            Ok(named) if (named.st_dev, named.st_ino) == (held.st_dev, held.st_ino) => {
                return Ok((file, new));
            }
            // Its maker has given up and removed it between our open and our lock.
            Ok(_) | Err(Errno::NOENT) => {}
            Err(e) => return Err(OpenError::os(&what(), e)),
        }
    }
    Err(OpenError::new(
        OpenErrorKind::Busy,
        format!("somebody keeps replacing {}", path.display()),
    ))
}

/// Refuses what wants larger steps than pages. An older kernel does not say, and then the first read will.
fn check_alignment(file: &OwnedFd, path: &Path) -> Result<(), OpenError> {
    let Ok(found) = rustix::fs::statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN) else {
        return Ok(());
    };
    if found.stx_mask & StatxFlags::DIOALIGN.bits() == 0 {
        return Ok(());
    }
    let (memory, offset) = (found.stx_dio_mem_align, found.stx_dio_offset_align);
    if memory == 0 || offset == 0 {
        return Err(OpenError::new(
            OpenErrorKind::Unsupported,
            format!(
                "{}: the kernel has no direct I/O for it: put the directory on ext4 or xfs, or give a block device",
                path.display()
            ),
        ));
    }
    if memory as usize > PAGE || offset as usize > PAGE {
        return Err(OpenError::new(
            OpenErrorKind::Unsupported,
            format!(
                "{}: direct I/O in steps of {offset} bytes to memory in steps of {memory}, and kvd makes steps of {PAGE}",
                path.display()
            ),
        ));
    }
    Ok(())
}

fn free(file: &OwnedFd) -> String {
    rustix::fs::fstatvfs(file).map_or_else(
        |_| String::new(),
        |fs| format!(" ({} are free)", fs.f_bavail.saturating_mul(fs.f_frsize)),
    )
}

fn filesystem(file: &OwnedFd) -> &'static str {
    let magic = rustix::fs::fstatfs(file).map_or(0, |fs| fs.f_type as u32);
    match magic {
        0xef53 => "ext4",
        0x5846_5342 => "xfs",
        0x9123_683e => "btrfs",
        0x0102_1994 => "tmpfs",
        0x8584_58f6 => "ramfs",
        0x794c_7630 => "overlayfs",
        0xf2f5_2010 => "f2fs",
        0x2fc1_2fc1 => "zfs",
        0xca45_1a4e => "bcachefs",
        0x6969 => "nfs",
        0xff53_4d42 | 0xfe53_4d42 => "smb",
        0x6573_5546 => "fuse",
        0x0102_1997 => "9p",
        _ => "unknown",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::testing::scratch;

    const MIB: u64 = 1 << 20;

    fn kind(result: Result<Backing, OpenError>) -> OpenErrorKind {
        result.expect_err("refused").kind()
    }

    #[test]
    fn a_file_is_made_whole_and_private_and_found_again() {
        let scratch = scratch();
        let directory = scratch.path().join("new/er");
        let backing = Backing::open(&directory, Some(MIB + 5)).expect("made");
        assert_eq!((backing.bytes(), backing.found()), (MIB, Found::New));
        let stat = rustix::fs::stat(backing.path()).expect("there");
        assert_eq!((stat.st_mode & 0o7777, stat.st_size), (0o600, MIB as i64));
        assert!(stat.st_blocks * 512 >= MIB as i64, "all space is taken");
        assert!(
            rustix::fs::fcntl_getfl(&backing)
                .expect("flags")
                .contains(OFlags::DIRECT)
        );
        drop(backing);
        let again = Backing::open(&directory, Some(MIB)).expect("there");
        assert_eq!(again.found(), Found::Same);
        drop(again);
        for (bytes, found) in [
            (2 * MIB, Found::Lengthened(MIB)),
            (MIB / 2, Found::Longer(2 * MIB)),
        ] {
            let again = Backing::open(&directory, Some(bytes)).expect("there");
            assert_eq!((again.bytes(), again.found()), (bytes, found));
            let stat = rustix::fs::stat(again.path()).expect("there");
            assert_eq!(stat.st_size, 2 * MIB as i64, "never cut");
        }
        let again = Backing::existing(&directory).expect("there");
        assert_eq!((again.bytes(), again.found()), (2 * MIB, Found::Same));
    }

    #[test]
    fn two_can_not_share_it() {
        let scratch = scratch();
        let first = Backing::open(scratch.path(), Some(MIB)).expect("made");
        let second = Backing::open(scratch.path(), Some(MIB));
        assert_eq!(kind(second), OpenErrorKind::Busy);
        drop(first);
        Backing::open(scratch.path(), Some(MIB)).expect("free again");
    }

    #[test]
    fn a_full_file_system_is_an_error_and_nothing_is_left_behind() {
        let scratch = scratch();
        let error = Backing::open(scratch.path(), Some(1 << 43)).expect_err("8 TiB");
        assert_eq!(error.kind(), OpenErrorKind::NoSpace, "{error}");
        assert!(error.to_string().contains("smaller size"), "{error}");
        assert!(!scratch.path().join(FILE_NAME).exists());
        drop(Backing::open(scratch.path(), Some(MIB)).expect("made"));
        let error = Backing::open(scratch.path(), Some(1 << 43)).expect_err("8 TiB");
        assert_eq!(error.kind(), OpenErrorKind::NoSpace, "{error}");
        let kept = Backing::open(scratch.path(), Some(MIB)).expect("there");
        assert_eq!(kept.found(), Found::Same, "what was there is as it was");
    }

    #[test]
    fn what_can_not_be_is_refused() {
        let scratch = scratch();
        let at = |name: &str| scratch.path().join(name);
        std::fs::write(at("file"), "x").expect("written");
        assert_eq!(
            kind(Backing::open(&at("file"), Some(MIB))),
            OpenErrorKind::Invalid
        );
        assert_eq!(
            kind(Backing::open(scratch.path(), None)),
            OpenErrorKind::Invalid
        );
        assert_eq!(
            kind(Backing::open(scratch.path(), Some(4095))),
            OpenErrorKind::Invalid
        );
        let missing = Backing::open(Path::new("/dev/kvd-no-such"), Some(MIB));
        assert_eq!(kind(missing), OpenErrorKind::Invalid);
        std::os::unix::fs::symlink(at("file"), at(FILE_NAME)).expect("linked");
        let linked = Backing::open(scratch.path(), Some(MIB)).expect_err("a link");
        assert!(linked.to_string().contains("is a link"), "{linked}");
    }

    /// With `KVD_TEST_DEVICE=/dev/...` of a device that may be overwritten.
    #[test]
    #[ignore = "wants a block device"]
    fn a_block_device_is_used_whole_or_in_part_by_one() {
        let path = PathBuf::from(std::env::var_os("KVD_TEST_DEVICE").expect("a device"));
        let whole = Backing::open(&path, None).expect("opened");
        assert!(whole.bytes() >= MIB);
        assert_eq!(kind(Backing::open(&path, None)), OpenErrorKind::Busy);
        let bytes = whole.bytes();
        drop(whole);
        assert_eq!(
            kind(Backing::open(&path, Some(bytes + MIB))),
            OpenErrorKind::Invalid
        );
        let part = Backing::open(&path, Some(MIB)).expect("opened");
        assert_eq!((part.bytes(), part.found()), (MIB, Found::Same));
        let mut part = std::sync::Arc::new(part);
        for _ in 0..20 {
            let io = crate::io::UringIo::open(part, 4).expect("io_uring reads it");
            drop(io);
            part = std::sync::Arc::new(Backing::open(&path, Some(MIB)).expect("free again"));
        }
    }

    #[test]
    fn a_file_system_without_direct_io_is_named() {
        // Whether tmpfs has direct I/O depends on the kernel; /proc and the like can't even have files.
        let Ok(scratch) = tempfile::tempdir_in("/dev/shm") else {
            return;
        };
        match Backing::open(scratch.path(), Some(MIB)) {
            Ok(backing) => assert_eq!(backing.filesystem(), "tmpfs"),
            Err(error) => {
                assert_eq!(error.kind(), OpenErrorKind::Unsupported, "{error}");
                assert!(!scratch.path().join(FILE_NAME).exists());
            }
        }
    }
}
