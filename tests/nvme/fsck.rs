//! `kvd fsck` from outside: what it finds, what it mends, what it leaves alone, and what its exit status says.

use serde_json::Value;

use crate::common::kvd;
use crate::kit::{Areas, Engine, HEADS, Home, PAGE, flip, header_of, offloaded, page, run, store};

const BLOCKS: u32 = 40;

fn filled() -> Home {
    let home = Home::new();
    let daemon = home.serve(&[]);
    Engine::new(&daemon).store(1, 0..BLOCKS);
    offloaded(&daemon, BLOCKS.into());
    drop(daemon);
    home
}

fn checked(home: &Home, flags: &[&str], code: i32) -> Value {
    let flags: Vec<_> = flags.iter().copied().chain(["--json"]).collect();
    let (found, out, err) = home.fsck(&flags);
    assert_eq!(found, code, "{out}{err}");
    assert_eq!(err, "", "no progress where there is no terminal");
    serde_json::from_str(&out).unwrap_or_else(|e| panic!("{e}: {out}"))
}

#[test]
fn a_flipped_byte_is_found_dropped_and_the_rest_served() {
    let home = filled();
    let clean = checked(&home, &[], 0);
    assert_eq!(clean["clean"], true, "{clean}");
    assert_eq!(clean["sound"], BLOCKS, "{clean}");
    assert_eq!(clean["sound_bytes"], BLOCKS * (64 << 10), "{clean}");

    flip(
        &home.file(),
        header_of(&home.file(), 1, 7) + PAGE + 12_345,
        1,
    );
    flip(&home.file(), header_of(&home.file(), 1, 9) + 64, 0x80);
    let before = std::fs::read(home.file()).expect("reads");
    let found = checked(&home, &[], 1);
    assert_eq!(found["damaged"], 2, "{found}");
    assert_eq!(found["sound"], BLOCKS - 2, "{found}");
    let flaws: Vec<_> = found["findings"]
        .as_array()
        .expect("a list")
        .iter()
        .map(|one| one["flaw"].as_str().expect("a block"))
        .collect();
    assert!(
        flaws.contains(&"payload") && flaws.contains(&"header"),
        "{found}"
    );
    let after = std::fs::read(home.file()).expect("reads");
    assert!(before == after, "a check writes nothing");

    let mended = checked(&home, &["--repair"], 0);
    assert_eq!(
        (&mended["dropped"], &mended["left"]),
        (&2.into(), &0.into()),
        "{mended}"
    );
    let clean = checked(&home, &[], 0);
    assert_eq!(clean["clean"], true, "{clean}");
    assert_eq!(clean["sound"], BLOCKS - 2, "{clean}");

    let daemon = home.serve(&[]);
    assert_eq!(store(&daemon).recovered, u64::from(BLOCKS) - 2);
    let loads = Engine::new(&daemon).load(1, 0..BLOCKS);
    assert_eq!(loads.absent, [7, 9], "{loads:?}");
    assert!(loads.failed.is_empty(), "{loads:?}");
}

#[test]
fn a_superblock_is_written_again_from_the_other() {
    let home = filled();
    for (copy, at) in HEADS.into_iter().enumerate() {
        flip(&home.file(), at + 100, 4);
        let found = checked(&home, &[], 1);
        assert_eq!(found["findings"][0]["what"], "superblock", "{found}");
        assert_eq!(found["findings"][0]["copy"], copy, "{found}");
        let mended = checked(&home, &["--repair"], 0);
        assert_eq!(mended["superblocks_repaired"], 1, "{mended}");
        assert_eq!(page(&home.file(), HEADS[0]), page(&home.file(), HEADS[1]));
        checked(&home, &[], 0);
    }
}

#[test]
fn what_a_repair_can_not_bring_back_is_said() {
    let home = filled();
    // The only page of records whose loss is certain to be noticed is one with a sound one behind it.
    let journal = Areas::read(&home.file()).journal_at;
    let bytes = std::fs::read(home.file()).expect("reads");
    let mut pages = (journal..bytes.len() as u64).step_by(PAGE as usize);
    let first = pages
        .find(|at| bytes[*at as usize..].starts_with(b"KVDPAGE1"))
        .expect("a page of records");
    flip(&home.file(), first + 128 + 40, 1);
    let found = checked(&home, &[], 1);
    assert_eq!(found["records_damaged"], 1, "{found}");
    assert_eq!(found["sound"], BLOCKS - 1, "{found}");
    let mended = checked(&home, &["--repair"], 1);
    assert_eq!(mended["left"], 1, "{mended}");
    let (code, out, _) = home.fsck(&["--repair"]);
    assert_eq!(code, 1, "{out}");
    assert!(out.contains("repaired in part: 1 left"), "{out}");
    let daemon = home.serve(&[]);
    let loads = Engine::new(&daemon).load(1, 0..BLOCKS);
    assert_eq!(loads.loaded.len(), BLOCKS as usize - 1, "{loads:?}");
}

#[test]
fn people_can_read_it_and_help_names_the_exit_status() {
    let home = filled();
    let (code, out, err) = home.fsck(&[]);
    assert_eq!((code, err.as_str()), (0, ""));
    assert!(
        out.contains("kvd.nvme") && out.ends_with("clean\n"),
        "{out}"
    );
    flip(&home.file(), header_of(&home.file(), 1, 0) + PAGE, 1);
    let (code, out, _) = home.fsck(&[]);
    assert_eq!(code, 1);
    assert!(out.contains("its bytes are damaged"), "{out}");
    let mut help = kvd();
    help.args(["fsck", "--help"]);
    let out = run(help);
    let said = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(out.status.success());
    for line in [
        "Exit status",
        "0  nothing is wrong",
        "1  damage",
        "2  the store could not",
    ] {
        assert!(said.contains(line), "{said}");
    }
    let mut missing = kvd();
    missing.args(["fsck", "/no/such/place"]);
    let out = run(missing);
    assert_eq!(out.status.code(), Some(2));
    let mut nothing = kvd();
    nothing.arg("fsck");
    assert_eq!(run(nothing).status.code(), Some(2));
}
