//! What a daemon finds where its store should be: another daemon, a newer format, another size, nothing, or a place that it can't use.

use crate::common::kvd;
use crate::kit::{Engine, HEADS, Home, PAGE, crc64, offloaded, page, run, store, write_at};

#[test]
fn two_daemons_do_not_share_a_store() {
    let (home, other) = (Home::new(), Home::new());
    let daemon = home.serve(&[]);
    let path = home.store.path().display().to_string();
    let (code, said) = other.refused(&["--nvme", &path]);
    assert_eq!(code, 1, "{said}");
    assert!(said.contains("another process uses"), "{said}");
    let mut engine = Engine::new(&daemon);
    engine.store(1, 0..16);
    offloaded(&daemon, 16);
    let (code, _, said) = home.fsck(&["--repair"]);
    assert_eq!(code, 2, "{said}");
    assert!(said.contains("is in use"), "{said}");
    engine.load_all(1, 0..16);
}

#[test]
fn unasked_blocks_are_kept_in_the_users_cache_directory() {
    let (one, two) = (Home::new(), Home::new());
    let home = one.store.path();
    let daemon = one.serve_at(home);
    Engine::new(&daemon).store(1, 0..16);
    offloaded(&daemon, 16);
    let second = two.serve_at(home);
    assert!(
        second.status().stores.is_empty(),
        "one has it, the other goes on without"
    );
    Engine::new(&second).store(1, 0..16);
    drop(second);
    drop(daemon); // by SIGKILL
    let file = home.join(".cache/kvd/kvd.nvme");
    assert_eq!(std::fs::metadata(file).expect("there").len(), 128 << 20);
    let daemon = one.serve_at(home);
    assert_eq!(store(&daemon).blocks, 16);
    Engine::new(&daemon).load_all(1, 0..16);
    drop(daemon);
    // What is no store of ours is left alone.
    let file = home.join(".cache/kvd/kvd.nvme");
    for at in HEADS {
        write_at(&file, at, &[0x55; PAGE as usize]);
    }
    let before = std::fs::read(&file).expect("reads");
    assert!(one.serve_at(home).status().stores.is_empty());
    assert!(before == std::fs::read(&file).expect("reads"));
    // Memory is no disk.
    let memory = tempfile::tempdir_in("/dev/shm").expect("a directory");
    assert!(two.serve_at(memory.path()).status().stores.is_empty());
}

#[test]
fn a_newer_format_is_refused_and_left_untouched() {
    let home = Home::new();
    drop(home.serve(&[]));
    let file = home.file();
    for at in HEADS {
        let mut head = page(&file, at);
        let sum = crc64(&head[..PAGE as usize - 8]).to_le_bytes();
        assert_eq!(head[PAGE as usize - 8..], sum, "the sum is as documented");
        head[8] = 2;
        let sum = crc64(&head[..PAGE as usize - 8]).to_le_bytes();
        head[PAGE as usize - 8..].copy_from_slice(&sum);
        write_at(&file, at, &head);
    }
    let before = std::fs::read(&file).expect("reads");
    // Whatever size is asked for now.
    for capacity in ["128MiB", "64MiB"] {
        let (code, said) = home.refused(&["--nvme-capacity", capacity]);
        assert_eq!(code, 1, "{said}");
        assert!(said.contains("format version 2"), "{said}");
        let after = std::fs::read(&file).expect("reads");
        assert!(before == after, "it was left as it is");
    }
    let (code, _, said) = home.fsck(&["--repair"]);
    assert_eq!(code, 2, "{said}");
    assert!(said.contains("format version 2"), "{said}");
    assert!(before == std::fs::read(&file).expect("reads"));
}

#[test]
fn a_smaller_size_costs_no_block_and_a_larger_one_neither() {
    let home = Home::new();
    let daemon = home.serve(&["--nvme-capacity", "128MiB"]);
    Engine::new(&daemon).store(1, 0..64);
    offloaded(&daemon, 64);
    drop(daemon);
    let (code, said) = home.refused(&["--nvme-capacity", "64MiB"]);
    assert_eq!(code, 1, "{said}");
    assert!(said.contains("the store takes 134217728 bytes"), "{said}");
    let length = std::fs::metadata(home.file()).expect("there").len();
    assert_eq!(length, 128 << 20, "it was not cut");
    for capacity in ["128MiB", "256MiB"] {
        let daemon = home.serve(&["--nvme-capacity", capacity]);
        let store = store(&daemon);
        assert_eq!((store.recovered, store.bytes), (64, 128 << 20));
        assert_eq!(
            daemon.log().contains("keeps that size"),
            capacity != "128MiB"
        );
        Engine::new(&daemon).load_all(1, 0..64);
        let length = std::fs::metadata(home.file()).expect("there").len();
        assert_eq!(
            length,
            128 << 20,
            "no space is taken that would not be used"
        );
    }
}

#[test]
fn something_else_is_left_as_it_is() {
    let home = Home::new();
    // As long as the store would be, shorter, and too short for anything.
    for length in [128 << 20, (1 << 20) + 1, 9] {
        let mut bytes = vec![0; length];
        bytes[..9].copy_from_slice(b"my photos");
        std::fs::write(home.file(), &bytes).expect("written");
        let (code, said) = home.refused(&[]);
        assert_eq!(code, 1, "{said}");
        assert!(said.contains("not a kvd store"), "{said}");
        assert!(bytes == std::fs::read(home.file()).expect("reads"));
        let (code, _, said) = home.fsck(&["--repair"]);
        assert_eq!(code, 2, "{said}");
        assert!(bytes == std::fs::read(home.file()).expect("reads"));
    }
    // What a start that was cut short has left is nothing yet.
    std::fs::write(home.file(), vec![0; 1 << 20]).expect("written");
    let (code, _, said) = home.fsck(&[]);
    assert_eq!(code, 2, "{said}");
    assert!(said.contains("no store yet"), "{said}");
    let found = store(&home.serve(&[]));
    assert_eq!((found.formatted, found.bytes), (true, 128 << 20));
}

#[test]
fn a_removed_file_is_made_anew_and_a_place_without_room_for_it_is_an_error() {
    let home = Home::new();
    let daemon = home.serve(&[]);
    Engine::new(&daemon).store(1, 0..8);
    offloaded(&daemon, 8);
    drop(daemon);
    std::fs::remove_file(home.file()).expect("removed");
    let daemon = home.serve(&[]);
    let found = store(&daemon);
    assert_eq!((found.formatted, found.recovered), (true, 0));
    let loads = Engine::new(&daemon).load(1, 0..8);
    assert_eq!(loads.absent.len(), 8, "{loads:?}");
    drop(daemon);
    // No directory can be made there, whoever asks.
    let (code, said) = home.refused(&["--nvme", "/proc/kvd"]);
    assert_eq!(code, 1, "{said}");
    assert!(said.contains("cannot make /proc/kvd"), "{said}");
    let plain = home.run.path().join("plain");
    std::fs::write(&plain, "").expect("written");
    let (code, said) = home.refused(&["--nvme", &plain.display().to_string()]);
    assert_eq!(code, 1, "{said}");
    assert!(said.contains("neither a directory nor a block"), "{said}");
    let (code, said) = Home::new().refused(&["--nvme-capacity", "8192GiB"]);
    assert_eq!(code, 1, "{said}");
    assert!(said.contains("set a smaller size"), "{said}");
}

#[test]
fn a_directory_that_may_not_be_written_is_an_error() {
    use std::os::unix::fs::PermissionsExt;
    let home = Home::new();
    let mode = |bits| std::fs::Permissions::from_mode(bits);
    std::fs::set_permissions(home.store.path(), mode(0o555)).expect("set");
    if std::fs::File::create(home.store.path().join("probe")).is_ok() {
        // Root may write anywhere.
        return;
    }
    let (code, said) = home.refused(&[]);
    std::fs::set_permissions(home.store.path(), mode(0o755)).expect("set");
    assert_eq!(code, 1, "{said}");
    assert!(said.contains("kvd.nvme: Permission denied"), "{said}");
}

#[test]
fn a_file_deleted_under_a_daemon_breaks_nothing() {
    let home = Home::new();
    let daemon = home.serve(&[]);
    let mut engine = Engine::new(&daemon);
    engine.store(1, 0..128);
    offloaded(&daemon, 128);
    std::fs::remove_file(home.file()).expect("removed");
    for first in [128, 256] {
        engine.store(1, first..first + 128);
        offloaded(&daemon, u64::from(first) + 128);
    }
    engine.load_all(1, 0..384);
    assert_eq!(store(&daemon).state, "on");
    drop(daemon);
    let (code, _, said) = home.fsck(&[]);
    assert_eq!(code, 2, "{said}");
    let daemon = home.serve(&[]);
    assert!(store(&daemon).formatted);
    assert_eq!(Engine::new(&daemon).load(1, 0..4).absent.len(), 4);
}

#[test]
fn nonsense_of_the_command_line_is_told_apart() {
    let mut command = kvd();
    command.args(["serve", "--nvme", "/somewhere", "--nvme-io", "fast"]);
    let out = run(command);
    assert_eq!(out.status.code(), Some(2));
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(said.contains("nvme_io"), "{said}");
}
