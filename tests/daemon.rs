//! The daemon from outside: it runs without configuration, says how it is, and goes in order.

mod common;

use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use common::{Daemon, PATIENCE, Raw, kvd, layout, record};
use kvd_client::{Identity, Session};
use kvd_wire::session::{Role, request};
use rustix::process::Signal;

#[test]
fn serves_without_any_configuration() {
    let directory = Arc::new(tempfile::tempdir().expect("a directory"));
    let mut command = kvd();
    // Only so that tests can run beside each other and leave the user's directories alone.
    command
        .arg("serve")
        .env("XDG_RUNTIME_DIR", directory.path())
        .env("KVD_HTTP", "127.0.0.1:0");
    let mut daemon = Daemon::spawn(command, Arc::clone(&directory));
    assert_eq!(daemon.socket, directory.path().join("kvd/default/kvd.sock"));
    let mode =
        |p: &std::path::Path| std::fs::metadata(p).expect("there").permissions().mode() & 0o777;
    assert_eq!(mode(&daemon.socket), 0o600);
    assert_eq!(mode(daemon.socket.parent().expect("has one")), 0o700);
    assert_eq!(daemon.get("/healthz"), (200, "ok\n".to_owned()));
    assert_eq!(daemon.get("/readyz"), (200, "ready\n".to_owned()));
    let (code, metrics) = daemon.get("/metrics");
    assert_eq!(code, 200);
    assert!(
        metrics.contains(
            "kvd_load_blocks_total{tenant=\"default\",result=\"failed\",reason=\"crc\"} 0"
        ),
        "{metrics}"
    );
    assert_eq!(daemon.get("/nothing").0, 404);
    let log = daemon.log();
    for said in [
        "host_capacity = ",
        "socket = ",
        "http = 127.0.0.1:0",
        "lease = 30s",
    ] {
        assert!(log.contains(said), "{said} is not in:\n{log}");
    }
    daemon.signal(Signal::TERM);
    assert_eq!(daemon.wait().code(), Some(0), "{}", daemon.log());
    assert!(!daemon.socket.exists());
}

#[test]
fn status_shows_what_there_is_and_by_which_fields_namespaces_differ() {
    let daemon = Daemon::start(&[]);
    let mut session = Session::connect(&daemon.socket, &Identity::script("the first"), PATIENCE)
        .expect("connects");
    session
        .register(&record(&[]), &[layout()])
        .expect("registers");
    session
        .register(&record(&[("kv_dtype", "fp8")]), &[layout()])
        .expect("registers");
    let json = kvd()
        .args(["status", "--json", "--socket"])
        .arg(&daemon.socket)
        .output()
        .expect("runs");
    assert!(
        json.status.success(),
        "{}",
        String::from_utf8_lossy(&json.stderr)
    );
    let status: kvd_node::Status =
        serde_json::from_slice(&json.stdout).expect("the documented form");
    let tenant = &status.tenants[0];
    assert_eq!((status.tenants.len(), tenant.name.as_str()), (1, "default"));
    assert_eq!(tenant.tiers.host.bytes, 64 << 20);
    assert!(tenant.tiers.host.page_bytes >= 4096);
    let first = tenant
        .sessions
        .iter()
        .find(|s| s.label == "the first")
        .expect("is shown");
    assert_eq!(
        (first.role.as_str(), first.pid, first.attached),
        ("both", Some(std::process::id()), true)
    );
    assert_eq!(tenant.namespaces.len(), 2);
    let differs: Vec<_> = tenant.namespaces[0].differs[0]
        .fields
        .iter()
        .map(|f| f.field.as_str())
        .collect();
    assert_eq!(differs, ["kv_dtype"]);

    let table = kvd()
        .args(["status", "--socket"])
        .arg(&daemon.socket)
        .output()
        .expect("runs");
    let text = String::from_utf8(table.stdout).expect("text");
    assert!(table.status.success());
    for said in [
        "tenant default",
        "host",
        "the first",
        "differs from",
        "kv_dtype (",
        "64.0 MiB",
    ] {
        assert!(text.contains(said), "{said} is not in:\n{text}");
    }
    session.close().expect("closes");
}

#[test]
fn without_a_daemon_status_says_so() {
    let out = kvd()
        .args(["status", "--socket", "/tmp/kvd-nowhere/kvd.sock"])
        .output()
        .expect("runs");
    assert_eq!(out.status.code(), Some(1));
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(said.contains("is kvd serve running?"), "{said}");
}

#[test]
fn a_second_daemon_on_the_same_socket_is_refused() {
    let first = Daemon::start(&[]);
    let second = kvd()
        .args(["serve", "--http", "off", "--runtime-dir"])
        .arg(first.directory.path())
        .output()
        .expect("runs and ends");
    assert_eq!(second.status.code(), Some(1));
    let said = String::from_utf8_lossy(&second.stderr).into_owned();
    assert!(said.contains("another daemon serves it"), "{said}");
    assert_eq!(first.get("/healthz").0, 200, "the first is not disturbed");
    UnixStream::connect(&first.socket).expect("it still listens");
}

#[test]
fn a_killed_daemons_socket_is_replaced() {
    let mut first = Daemon::start(&[]);
    first.kill();
    assert!(first.socket.exists(), "nobody was there to remove it");
    let second = Daemon::start_in(Arc::clone(&first.directory), &[]);
    let mut raw = Raw::hello(&second.socket, Role::Observer);
    assert!(
        raw.ask(request::Body::Ping(kvd_wire::session::Ping {}))
            .is_some()
    );
}

#[test]
fn a_port_that_is_taken_is_an_error_that_says_what_to_do() {
    let first = Daemon::start(&[]);
    let directory = tempfile::tempdir().expect("a directory");
    let second = kvd()
        .args(["serve", "--http", &first.http, "--runtime-dir"])
        .arg(directory.path())
        .output()
        .expect("ends");
    assert_eq!(second.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&second.stderr).contains("choose another --http"));
}

#[test]
fn sigterm_answers_what_is_in_flight_and_ends() {
    let mut daemon = Daemon::start(&[]);
    let mut raw = Raw::hello(&daemon.socket, Role::Both);
    raw.register();
    let asked: Vec<u32> = (0..100)
        .map(|_| raw.say(request::Body::Ping(kvd_wire::session::Ping {})))
        .collect();
    daemon.signal(Signal::TERM);
    for id in asked {
        assert_eq!(raw.hear().map(|(answered, _)| answered), Some(id));
    }
    assert!(raw.hear().is_none(), "then the session is over");
    assert_eq!(daemon.wait().code(), Some(0), "{}", daemon.log());
    assert!(!daemon.socket.exists());
}

#[test]
fn config_check_shows_values_and_where_they_come_from() {
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("kvd.toml");
    std::fs::write(
        &file,
        "lease = \"7s\"\n[tenants.a]\nhost_capacity = \"32MiB\"\n",
    )
    .expect("written");
    let out = kvd()
        .args(["config", "check", "--http", "off", "--config"])
        .arg(&file)
        .env("KVD_EVICTION", "s3fifo")
        .output()
        .expect("runs");
    let text = String::from_utf8(out.stdout).expect("text");
    assert!(
        out.status.success(),
        "{}",
        String::from_utf8_lossy(&out.stderr)
    );
    let line = |key: &str| {
        let line = text
            .lines()
            .find(|l| l.starts_with(key))
            .unwrap_or_default()
            .to_owned();
        line.split_whitespace().collect::<Vec<_>>().join(" ")
    };
    assert!(
        line("lease =").ends_with("kvd.toml:1") && line("lease =").contains("\"7s\""),
        "{text}"
    );
    assert_eq!(line("eviction"), "eviction = \"s3fifo\" # env KVD_EVICTION");
    assert_eq!(line("http"), "http = \"off\" # flag --http");
    assert!(line("max_sessions").ends_with("# default"));
    assert!(line("tenants.a.host_capacity").contains("\"32MiB\""));

    std::fs::write(&file, "leese = \"7s\"\n").expect("written");
    let out = kvd()
        .args(["config", "check", "--config"])
        .arg(&file)
        .output()
        .expect("runs");
    assert_eq!(out.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&out.stderr).contains("did you mean lease?"));
}

#[test]
fn asking_wrongly_is_told_apart_from_failing() {
    for wrong in [
        &["serve", "--nonsense"][..],
        &["serve", "--lease", "7"],
        &[],
        &["bench"],
    ] {
        let out = kvd().args(wrong).output().expect("runs");
        assert_eq!(
            out.status.code(),
            Some(2),
            "{wrong:?}: {}",
            String::from_utf8_lossy(&out.stderr)
        );
    }
    let version = kvd().arg("--version").output().expect("runs");
    assert!(version.status.success());
    let version = String::from_utf8_lossy(&version.stdout).into_owned();
    assert!(version.starts_with("kvd 0.1.0"));
    // In a clone it names the commit, whatever was built before.
    let commit = std::process::Command::new("git")
        .args(["describe", "--always", "--abbrev=12"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output();
    if let Ok(commit) = commit
        && commit.status.success()
    {
        let commit = String::from_utf8_lossy(&commit.stdout).into_owned();
        assert!(version.contains(commit.trim()), "{version} is not {commit}");
    }
}

#[test]
fn the_simulator_is_the_program_beside() {
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
    let own = directory.path().join("kvd");
    std::fs::hard_link(env!("CARGO_BIN_EXE_kvd"), &own).expect("linked");
    let sim = |args: &[&str]| {
        let mut command = std::process::Command::new(&own);
        command.arg("sim").args(args).output().expect("runs")
    };
    let out = sim(&["--seed", "1"]);
    assert!(!out.status.success());
    let text = String::from_utf8_lossy(&out.stderr);
    assert!(text.contains("cargo build --release -p kvd-sim"), "{text}");
    // Any program does: all arguments reach it, flags too, and its status comes back.
    std::os::unix::fs::symlink("/bin/sh", directory.path().join("kvd-sim")).expect("linked");
    let out = sim(&["-c", "echo \"$@\"; exit 7", "sh", "--help", "--json", "--"]);
    assert_eq!(out.status.code(), Some(7));
    assert_eq!(String::from_utf8_lossy(&out.stdout), "--help --json --\n");
}

#[test]
fn tenants_have_sockets_of_their_own() {
    let directory = Arc::new(tempfile::tempdir().expect("a directory"));
    let file = directory.path().join("kvd.toml");
    std::fs::write(&file, "[tenants.team-a]\nhost_capacity = \"16MiB\"\n").expect("written");
    let daemon = Daemon::start_in(
        Arc::clone(&directory),
        &["--config", file.to_str().expect("text")],
    );
    let names: Vec<_> = daemon
        .status()
        .tenants
        .into_iter()
        .map(|t| t.name)
        .collect();
    assert_eq!(names, ["default", "team-a"]);
    let socket = directory.path().join("team-a/kvd.sock");
    let out = kvd()
        .args(["status", "--json", "--socket"])
        .arg(&socket)
        .output()
        .expect("runs");
    let status: kvd_node::Status =
        serde_json::from_slice(&out.stdout).expect("the documented form");
    assert_eq!(status.tenants.len(), 1, "over a session only one's own");
    assert_eq!(status.tenants[0].name, "team-a");
}
