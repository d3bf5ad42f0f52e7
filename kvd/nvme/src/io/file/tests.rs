//! What opening a file or a device does to it, and what is refused.

use std::fs::File;
use std::os::unix::fs::FileExt;

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
    let look = |wanted, bytes, found| {
        let again = Backing::open(&directory, Some(wanted)).expect("there");
        assert_eq!((again.bytes(), again.found()), (bytes, found));
        let stat = rustix::fs::stat(again.path()).expect("there");
        assert_eq!(stat.st_size, 2 * MIB as i64, "never cut, nor lengthened");
    };
    look(2 * MIB, 2 * MIB, Found::Lengthened(MIB));
    look(MIB / 2, MIB / 2, Found::Longer(2 * MIB));
    let file = File::options().write(true).open(directory.join(FILE_NAME));
    file.and_then(|file| file.write_all_at(b"!", HEADS_BYTES - 1))
        .expect("written");
    look(8 * MIB, 2 * MIB, Found::Shorter(2 * MIB));
    let again = Backing::existing(&directory).expect("there");
    assert_eq!((again.bytes(), again.found()), (2 * MIB, Found::Same));
}

#[test]
fn what_is_no_store_is_left_as_it_is() {
    let scratch = scratch();
    let path = scratch.path().join(FILE_NAME);
    std::fs::write(&path, b"a diary").expect("written");
    assert_eq!(
        kind(Backing::open(scratch.path(), Some(MIB))),
        OpenErrorKind::Invalid
    );
    assert_eq!(std::fs::read(&path).expect("there"), b"a diary");
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
