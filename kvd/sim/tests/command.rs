//! The command `kvd-sim` from outside: same seed, same run; a planted mistake is told with the command that repeats it; what is asked
//! wrongly is told apart. Deliberately absent: runs for a time, which a clock would decide.

use std::process::{Command, Output};

fn kvd_sim(line: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kvd-sim"));
    let command = command.args(line.split_whitespace());
    command.output().expect("it runs")
}

fn json(out: &Output) -> serde_json::Value {
    serde_json::from_slice(&out.stdout).expect("one JSON object")
}

#[test]
fn the_same_seed_prints_the_same_run() {
    let [a, b] = ["--seed 3 --steps 2000"; 2].map(kvd_sim);
    assert_eq!(a.status.code(), Some(0));
    assert_eq!(a, b);
    let text = String::from_utf8_lossy(&a.stdout);
    assert!(text.contains("\nevent log hash "), "{text}");
    let [one, other] = ["--seed 3", "--seed 4"].map(|seed| {
        let out = json(&kvd_sim(&format!("{seed} --steps 2000 --json")));
        assert_eq!(
            (&out["steps"], out["failure"].is_null()),
            (&2000.into(), true)
        );
        out["event_log_hash"].clone()
    });
    assert!(one.is_string() && one != other && text.contains(one.as_str().expect("text")));
}

#[test]
fn a_disk_is_the_same_twice() {
    let [a, b] = ["--seed 3 --steps 500 --disk everything"; 2].map(kvd_sim);
    assert_eq!((a.status.code(), &a), (Some(0), &b));
}

#[test]
fn many_seeds_are_counted() {
    let out = kvd_sim("--seeds 4 --seed 10 --steps 300 --jobs 2 --json");
    assert_eq!(out.status.code(), Some(0));
    let out = json(&out);
    for (name, number) in [
        ("first_seed", 10),
        ("last_seed", 13),
        ("seeds", 4),
        ("worlds", 2),
        ("disks", 2),
        ("steps", 1200),
    ] {
        assert_eq!(out[name], number, "{name}");
    }
    assert!(out["quiet_steps"].as_u64() > Some(0), "{out}");
}

#[test]
fn a_planted_mistake_is_told_with_the_command_that_repeats_it() {
    let many = "--seeds 300 --seed 0 --steps 6000 --jobs 1 --plant EarlyCommit";
    let out = kvd_sim(many);
    assert_eq!(out.status.code(), Some(1));
    let text = String::from_utf8_lossy(&out.stdout);
    assert!(text.contains("invariant 3 broken in step "), "{text}");
    let out = kvd_sim(&format!("{many} --json"));
    assert_eq!(out.status.code(), Some(1));
    let found = json(&out)["failure"].clone();
    for one in [&found, &found["smallest"]] {
        let line = one["command"].as_str().expect("a command");
        assert!(
            text.contains(&format!("\nagain: {line}\n")),
            "{line} in {text}"
        );
        assert!(line.contains(&format!("--seed {} ", one["seed"])), "{line}");
        let again = kvd_sim(&format!("{} --json", line.trim_start_matches("kvd-sim ")));
        assert_eq!(again.status.code(), Some(1), "{line}");
        for name in ["step", "invariant", "text", "events"] {
            assert_eq!(json(&again)["failure"][name], one[name], "{name} of {line}");
        }
    }
}

#[test]
fn asking_wrongly_is_told() {
    for (line, says) in [
        ("", "say what to run: --seed N"),
        ("--seed x", "--seed"),
        ("--seed 1 --steps 0", "--steps"),
        ("--for 5", "write it like 60s"),
        ("--for 0s", "write it like 60s"),
        ("--for 1m --seeds 3", "cannot be used with"),
        ("--seed 1 --jobs 2", "--for"),
        ("--seed 1 --disk wet", "everything"),
        ("--seed 1 --disk full --tenants 1", "cannot be used with"),
        ("--seed 1 --tenants 9", "1..=3"),
        ("--seed 1 --without Rain", "PowerCut"),
        ("--seed 1 --plant Tree", "EarlyCommit"),
    ] {
        let out = kvd_sim(line);
        let text = String::from_utf8_lossy(&out.stderr);
        assert_eq!(out.status.code(), Some(2), "{line}: {text}");
        assert!(
            text.contains(says) && out.stdout.is_empty(),
            "{line}: {text}"
        );
    }
}
