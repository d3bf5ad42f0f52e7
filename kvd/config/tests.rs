//! Layers, units, unknown keys, and what must hold between values.

use std::path::PathBuf;

use super::*;

fn surroundings() -> Surroundings {
    Surroundings {
        cache_dir: None,
        uid: 7,
        ram_bytes: 8 << 30,
        xdg_runtime_dir: None,
        run_writable: false,
    }
}

fn inputs(
    file: Option<&str>,
    env: &[(&str, &str)],
    flags: &[(&'static str, &str)],
) -> (Inputs, tempfile::TempDir) {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("kvd.toml");
    if let Some(text) = file {
        std::fs::write(&path, text).expect("written");
    }
    let inputs = Inputs {
        file: file.is_some().then_some(path),
        env: env
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
            .collect(),
        flags: flags.iter().map(|(k, v)| (*k, (*v).to_owned())).collect(),
    };
    (inputs, directory)
}

fn load(
    file: Option<&str>,
    env: &[(&str, &str)],
    flags: &[(&'static str, &str)],
) -> Result<Config> {
    let (inputs, _directory) = inputs(file, env, flags);
    Config::load(&inputs, &surroundings())
}

fn refusal(file: Option<&str>, env: &[(&str, &str)], flags: &[(&'static str, &str)]) -> String {
    format!("{:#}", load(file, env, flags).expect_err("refused"))
}

#[test]
fn nothing_at_all_is_a_configuration() {
    let config = load(None, &[], &[]).expect("defaults hold together");
    assert_eq!(config.values.host_capacity, 2 << 30, "a quarter of memory");
    assert_eq!(
        config.values.default_socket(),
        PathBuf::from("/tmp/kvd-7/default/kvd.sock")
    );
    assert!(
        config
            .rows()
            .iter()
            .all(|(_, _, source)| *source == Source::Default)
    );
    assert_eq!(config.rows().len(), SETTINGS.len());
}

#[test]
fn the_runtime_directory_follows_the_surroundings() {
    let mut here = surroundings();
    here.run_writable = true;
    let at = |here: &Surroundings| {
        Config::load(&Inputs::default(), here)
            .expect("loads")
            .values
            .runtime_dir
    };
    assert_eq!(at(&here), PathBuf::from("/run/kvd"));
    here.xdg_runtime_dir = Some(PathBuf::from("/run/user/7"));
    assert_eq!(at(&here), PathBuf::from("/run/user/7/kvd"));
}

#[test]
fn flags_win_over_the_environment_and_that_over_the_file() {
    let file = "host_capacity = \"1GiB\"\nlease = \"10s\"\nhttp = \"off\"\nmax_sessions = 9\n";
    let config = load(
        Some(file),
        &[
            ("KVD_LEASE", "20s"),
            ("KVD_HTTP", "127.0.0.1:0"),
            ("HOME", "/"),
        ],
        &[("http", "[::1]:1")],
    )
    .expect("loads");
    assert_eq!(config.values.host_capacity, 1 << 30);
    assert_eq!(config.values.lease.as_secs(), 20);
    assert_eq!(
        config.values.http.map(|a| a.to_string()).as_deref(),
        Some("[::1]:1")
    );
    assert_eq!(config.values.max_sessions, 9);
    let from = |key: &str| {
        config
            .rows()
            .into_iter()
            .find(|r| r.0 == key)
            .expect("a row")
            .2
            .to_string()
    };
    assert!(from("host_capacity").ends_with("kvd.toml:1"));
    assert_eq!(from("lease"), "env KVD_LEASE");
    assert_eq!(from("http"), "flag --http");
    assert_eq!(from("eviction"), "default");
}

#[test]
fn the_file_may_come_from_the_environment() {
    let (inputs, _directory) = inputs(Some("lease = \"3s\""), &[], &[]);
    let path = inputs.file.expect("a file").display().to_string();
    let config = load(None, &[("KVD_CONFIG", &path)], &[]).expect("loads");
    assert_eq!(config.values.lease.as_secs(), 3);
    assert!(
        refusal(None, &[("KVD_CONFIG", "/nowhere/kvd.toml")], &[])
            .contains("cannot read /nowhere/kvd.toml")
    );
}

#[test]
fn what_is_unknown_is_refused_with_its_place() {
    let text = refusal(Some("\nhost_capacty = \"1GiB\""), &[], &[]);
    assert!(
        text.contains("kvd.toml:2") && text.contains("did you mean host_capacity?"),
        "{text}"
    );
    let text = refusal(None, &[("KVD_LEESE", "1s")], &[]);
    assert!(
        text.contains("unknown variable KVD_LEESE") && text.contains("did you mean lease?"),
        "{text}"
    );
    assert!(
        refusal(
            Some("[tenants.a]\nhost_capacity = \"2MiB\"\nspeed = 1"),
            &[],
            &[]
        )
        .contains("unknown key \"speed\"")
    );
    assert!(refusal(Some("a = ["), &[], &[]).contains("kvd.toml"));
    assert!(refusal(Some("lease = [1]"), &[], &[]).contains("one string or number"));
}

#[test]
fn service_links_of_kubernetes_are_passed_over() {
    let env = [
        ("KVD_SERVICE_HOST", "10.0.0.1"),
        ("KVD_PORT", "tcp://10.0.0.1:1"),
        ("KVD_PORT_1_TCP", "x"),
    ];
    load(None, &env, &[]).expect("they mean somebody else");
}

#[test]
fn units_are_needed_and_bounds_hold() {
    for (key, value, why) in [
        ("host_capacity", "4096", "has a unit"),
        ("host_capacity", "1MiB", "too small"),
        ("host_capacity", "lots", "like 512MiB"),
        ("lease", "30", "with a unit"),
        ("lease", "2days", "a day is the longest"),
        ("lease_share", "1.5", "between 0 and 1"),
        ("extent_size", "3MiB", "power of two"),
        ("huge_pages", "maybe", "choose auto or off or require"),
        ("http", "localhost", "write IP:PORT"),
        ("socket_mode", "999", "octal"),
        ("socket", "kvd.sock", "with a directory"),
        ("max_sessions", "0", "nobody could attach"),
        ("max_frame", "4KiB", "do not fit in max_frame"),
        ("max_hashes", "-1", "write a number"),
    ] {
        let text = refusal(None, &[], &[(key, value)]);
        assert!(text.contains(why), "{key}={value}: {text}");
    }
    let long = format!("/{}/kvd.sock", "x".repeat(200));
    assert!(refusal(None, &[], &[("socket", &long)]).contains("choose a shorter path"));
}

#[test]
fn tenants_have_sockets_and_capacities_of_their_own() {
    let file = "[tenants.team-a]\nhost_capacity = \"64MiB\"\n[tenants.b]\nhost_capacity = \"2MiB\"\nsocket = \"/run/b/s\"\n";
    let config = load(Some(file), &[("KVD_RUNTIME_DIR", "/r")], &[]).expect("loads");
    let all: Vec<_> = config
        .values
        .all_tenants()
        .into_iter()
        .map(|t| (t.name, t.socket.expect("resolved")))
        .collect();
    assert_eq!(
        all,
        [
            ("default".to_owned(), PathBuf::from("/r/default/kvd.sock")),
            ("b".to_owned(), PathBuf::from("/run/b/s")),
            ("team-a".to_owned(), PathBuf::from("/r/team-a/kvd.sock")),
        ]
    );
    for (file, why) in [
        (
            "[tenants.default]\nhost_capacity = \"2MiB\"",
            "stand at the top",
        ),
        (
            "[tenants.\"../x\"]\nhost_capacity = \"2MiB\"",
            "no tenant name",
        ),
        ("[tenants.a]", "too small"),
        ("tenants = 1", "no table"),
        (
            "[tenants.a]\nhost_capacity=\"2MiB\"\nsocket=\"/tmp/kvd-7/default/b.sock\"",
            "a directory of its own",
        ),
    ] {
        let text = refusal(Some(file), &[], &[]);
        assert!(text.contains(why), "{file}: {text}");
    }
}

#[test]
fn every_default_reads_back_as_itself() {
    let config = load(None, &[], &[]).expect("loads");
    for setting in SETTINGS {
        let shown = (setting.show)(&config.values);
        let mut again = config.values.clone();
        (setting.set)(&mut again, &shown).unwrap_or_else(|e| panic!("{}: {e}", setting.key));
        assert_eq!((setting.show)(&again), shown, "{}", setting.key);
        assert!(
            setting.help.len() > 10
                && setting.variable() == format!("KVD_{}", setting.key.to_uppercase())
        );
    }
}
