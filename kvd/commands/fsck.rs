//! `kvd fsck`: checks a store that no daemon has open, every byte of it, and repairs what can be repaired.
//!
//! Its exit status is for scripts, so it prints its own errors. Deliberately absent: what a sound store is (`kvd_nvme::store`), and
//! making a store anew, which would throw away what is still good.

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use clap::{Arg, ArgAction, ArgMatches, Command, value_parser};
use kvd_nvme::io::{Backing, DiskIo, IoOptions, OpenErrorKind};
use kvd_nvme::store::{Finding, Flaw, FsckReport, fsck};
use rustix::event::Timespec;
use serde_json::{Value, json};

use super::status::{finish, size, table};

/// How often, and at what distance, a store in use is asked for again: a killed daemon's lock goes a little later than its process.
const TRIES: u32 = 200;
const PAUSE_NS: i64 = 10_000_000;

pub(super) fn command() -> Command {
    Command::new("fsck")
        .about("Checks an NVMe store that no daemon has open")
        .after_help(
            "Exit status:\n  0  nothing is wrong, or --repair left nothing wrong\n  1  damage was found, or --repair could not mend \
             all of it\n  2  the store could not be checked: a daemon has it open, there is none, or its device fails",
        )
        .arg(
            Arg::new("path")
                .value_name("DIR_OR_DEVICE")
                .required(true)
                .value_parser(value_parser!(PathBuf))
                .help("What `nvme` names: a directory with a store, or a block device"),
        )
        .arg(
            Arg::new("repair")
                .long("repair")
                .action(ArgAction::SetTrue)
                .help("Forget damaged blocks, and write a damaged superblock again from the other"),
        )
}

/// Checks, prints, and says by the exit status what was found.
pub(super) fn run(args: &ArgMatches) -> ExitCode {
    let repair = args.get_flag("repair");
    let path = args.get_one::<PathBuf>("path");
    let checked = path
        .ok_or_else(|| "name a directory or a device".to_owned())
        .and_then(|path| check(path, repair));
    let (store, report) = match checked {
        Ok(checked) => checked,
        Err(error) => {
            // Nothing can be done about a standard error that is closed.
            let _ = writeln!(std::io::stderr(), "error: {error}");
            return ExitCode::from(2);
        }
    };
    let text = match args.get_flag("json") {
        true => format!("{}\n", as_json(&store, &report, repair)),
        false => as_text(&store, &report, repair),
    };
    let clean = report.is_clean() || repair && left(&report) == 0;
    match super::print(&text) {
        Ok(()) => ExitCode::from(u8::from(!clean)),
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "error: {error:#}");
            ExitCode::from(2)
        }
    }
}

/// What was checked, and what was found.
fn check(path: &Path, repair: bool) -> Result<(PathBuf, FsckReport), String> {
    let backing = open(path)?;
    let store = backing.path().to_owned();
    let config = super::stores::store_config(backing.bytes()).map_err(|error| error.to_string())?;
    let (io, _) = DiskIo::open(Arc::new(backing), &IoOptions::default())
        .map_err(|error| error.to_string())?;
    let mut shown = None;
    let terminal = std::io::stderr().is_terminal();
    let report = fsck(io, &config, repair, &mut |done, all| {
        let percent = done * 100 / all.max(1);
        if terminal && shown != Some(percent) {
            shown = Some(percent);
            let _ = write!(
                std::io::stderr(),
                "\r{done} of {all} blocks, {percent} % \x1b[K"
            );
        }
    });
    if shown.is_some() {
        let _ = write!(std::io::stderr(), "\r\x1b[K");
    }
    match report {
        Ok(report) => Ok((store, report)),
        Err(error) => Err(format!("{}: {error}", store.display())),
    }
}

fn open(path: &Path) -> Result<Backing, String> {
    let pause = Timespec {
        tv_sec: 0,
        tv_nsec: PAUSE_NS,
    };
    let mut tries = 0;
    loop {
        match Backing::existing(path) {
            Err(error) if error.kind() == OpenErrorKind::Busy && tries < TRIES => {
                tries += 1;
                let _ = rustix::event::poll(&mut [], Some(&pause));
            }
            Err(error) if error.kind() == OpenErrorKind::Busy => {
                return Err(format!(
                    "{} is in use, by a daemon or another check: stop that first",
                    path.display()
                ));
            }
            result => return result.map_err(|error| error.to_string()),
        }
    }
}

/// What a repair did not mend.
fn left(report: &FsckReport) -> u64 {
    let recovery = &report.recovery;
    let superblocks = report
        .findings
        .iter()
        .filter(|one| matches!(one, Finding::Superblock(_)))
        .count() as u64;
    superblocks.saturating_sub(report.superblocks_repaired)
        + (report.damaged + report.unreadable).saturating_sub(report.dropped)
        + recovery.namespaces_damaged
        + recovery.pages_damaged
        + recovery.records_damaged
        + recovery.orphans
}

fn counts(report: &FsckReport) -> [(&'static str, u64); 10] {
    let recovery = &report.recovery;
    [
        ("sound", report.sound),
        ("damaged", report.damaged),
        ("unreadable", report.unreadable),
        ("orphans", recovery.orphans),
        ("namespaces", recovery.namespaces),
        ("namespaces_damaged", recovery.namespaces_damaged),
        ("records_damaged", recovery.records_damaged),
        ("pages_damaged", recovery.pages_damaged),
        ("dropped", report.dropped),
        ("superblocks_repaired", report.superblocks_repaired),
    ]
}

fn as_json(store: &Path, report: &FsckReport, repair: bool) -> Value {
    let mut all = json!({
        "path": store.display().to_string(),
        "clean": report.is_clean(),
        "repair": repair,
        "sound_bytes": report.sound_bytes,
        "findings": report.findings.iter().map(finding).collect::<Vec<_>>(),
    });
    for (name, count) in counts(report) {
        all[name] = count.into();
    }
    if repair {
        all["left"] = left(report).into();
    }
    all
}

fn finding(one: &Finding) -> Value {
    match one {
        Finding::Superblock(copy) => json!({ "what": "superblock", "copy": copy }),
        Finding::Namespaces(count) => json!({ "what": "namespaces", "count": count }),
        Finding::Pages(count) => json!({ "what": "pages", "count": count }),
        Finding::Records(count) => json!({ "what": "records", "count": count }),
        Finding::Orphans(count) => json!({ "what": "orphans", "count": count }),
        Finding::Block { key, place, flaw } => json!({
            "what": "block",
            "namespace": hex(&key.namespace.0),
            "group": key.group,
            "hash": hex(&key.hash.0),
            "segment": place.segment,
            "index": place.index,
            "stride": place.stride,
            "flaw": match flaw {
                Flaw::Header => "header",
                Flaw::OtherBlock => "other_block",
                Flaw::Geometry => "geometry",
                Flaw::Payload => "payload",
            },
        }),
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn as_text(store: &Path, report: &FsckReport, repair: bool) -> String {
    let mut text = format!("{}\n", store.display());
    let mut rows = table(&["what", "count"]);
    for (name, count) in counts(report) {
        if count > 0 || name == "sound" {
            rows.add_row([name.replace('_', " "), count.to_string()]);
        }
    }
    rows.add_row(["sound bytes".to_owned(), size(report.sound_bytes)]);
    text.push_str(&finish(&rows));
    for one in &report.findings {
        text.push_str(&format!("{}\n", line(one)));
    }
    let blocks = report.damaged + report.unreadable;
    let ending = match (report.is_clean(), repair, left(report)) {
        (true, _, _) => "clean".to_owned(),
        (false, false, _) if blocks > 0 => {
            "damaged; --repair forgets the damaged blocks, and a daemon never serves them"
                .to_owned()
        }
        (false, false, _) => "damaged; a daemon serves the blocks that are sound".to_owned(),
        (false, true, 0) => "repaired; nothing is left".to_owned(),
        (false, true, left) => format!(
            "repaired in part: {left} left. What journal or namespaces have lost does not come back; the sound blocks are served, and the next checkpoints write over it"
        ),
    };
    text.push_str(&ending);
    text.push('\n');
    text
}

fn line(one: &Finding) -> String {
    match one {
        Finding::Superblock(copy) => format!("copy {copy} of the superblock is damaged or old"),
        Finding::Namespaces(count) => format!("{count} namespace slots are damaged"),
        Finding::Pages(count) => format!("{count} pages of checkpoint or journal are damaged"),
        Finding::Records(count) => format!("{count} records are damaged"),
        Finding::Orphans(count) => format!("{count} blocks have lost their namespace"),
        Finding::Block { key, place, flaw } => {
            let what = match flaw {
                Flaw::Header => "its header is damaged",
                Flaw::OtherBlock => "another block lies there",
                Flaw::Geometry => "its sizes are not those of its namespace",
                Flaw::Payload => "its bytes are damaged",
            };
            format!(
                "block {} in segment {}, place {}: {what}",
                hex(&key.hash.0[..8]),
                place.segment,
                place.index
            )
        }
    }
}
