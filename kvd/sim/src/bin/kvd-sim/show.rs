//! What is printed: as text for people, as one JSON object for scripts. The names of JSON are only ever added to.

use std::fmt::Write;
use std::time::Duration;

use serde_json::{Value, json};

use crate::flags::{Many, Wanted, repeat};
use crate::fresh::Sum;
use crate::one::{Broken, Held, Run, Smallest};

/// What a step is.
const STEP: &str = "one random action: of a world an engine's turn, a frame that the daemon reads, a copy, a fault; of a disk a write, a read, a \
                    drop, a turn of the store";

/// Said before the first run, so that it is there whatever happens.
pub(crate) fn start(wanted: &Wanted, first: u64) -> String {
    let much = match wanted.many {
        Some(Many::For(time)) => format!("for {}", humantime::format_duration(time)),
        Some(Many::Seeds(seeds)) => format!("{seeds} in all"),
        None => "one".into(),
    };
    format!("seeds from {first} on, {much}, threads: {}\n", wanted.jobs)
}

/// One line, over and over.
pub(crate) fn progress(sum: &Sum) -> String {
    format!(
        "\r{} seeds, {} steps, {}\x1b[K",
        sum.seeds,
        sum.steps(),
        humantime::format_duration(Duration::from_secs(sum.time.as_secs()))
    )
}

/// One run.
pub(crate) fn one(run: &Run, held: Option<&Held>, broken: Option<&Smallest>, json: bool) -> String {
    if json {
        let held = held.map_or(Value::Null, |held| {
            let counters: serde_json::Map<String, Value> = held
                .counters
                .iter()
                .map(|(name, n)| ((*name).to_owned(), json!(n)))
                .collect();
            json!({ "steps": held.steps, "quiet_steps": held.quiet, "event_log_hash": held.hash.map(hash), "counters": counters })
        });
        let mut all = json!({ "seed": run.seed(), "options": options(run), "command": repeat(run), "failure": failure(broken) });
        if let (Some(all), Value::Object(held)) = (all.as_object_mut(), held) {
            all.extend(held);
        }
        return format!("{all}\n");
    }
    let mut text = String::new();
    if let Some(held) = held {
        let _ = writeln!(
            text,
            "{}: every invariant held in {} steps and {} of the quiet end",
            options(run),
            held.steps,
            held.quiet
        );
        if let Some(sum) = held.hash {
            let _ = writeln!(text, "event log hash {}", hash(sum));
        }
        for (name, n) in &held.counters {
            let _ = writeln!(text, "  {n:>8}  {name}");
        }
    }
    text + &broken.map(told).unwrap_or_default()
}

/// Many runs.
pub(crate) fn sum(sum: &Sum, broken: Option<&Smallest>, json: bool) -> String {
    let last = sum.first.wrapping_add(sum.seeds.saturating_sub(1));
    let others = sum.broken.iter().skip(1);
    let others: Vec<String> = others.map(|broken| repeat(&broken.run)).collect();
    if json {
        let all = json!({
            "first_seed": sum.first,
            "last_seed": last,
            "seeds": sum.seeds,
            "worlds": sum.worlds,
            "disks": sum.seeds - sum.worlds,
            "steps": sum.steps(),
            "world_steps": sum.world_steps,
            "disk_steps": sum.disk_steps,
            "quiet_steps": sum.quiet_steps,
            "seconds": sum.time.as_secs_f64(),
            "steps_per_minute": sum.rate(),
            "step": STEP,
            "failure": failure(broken),
            "other_failures": others,
        });
        return format!("{all}\n");
    }
    let mut text = broken.map(told).unwrap_or_default();
    for other in others {
        let _ = writeln!(text, "another failed: {other}");
    }
    let _ = writeln!(
        text,
        "{} seeds, {} to {last} ({} worlds, {} disks): {}",
        sum.seeds,
        sum.first,
        sum.worlds,
        sum.seeds - sum.worlds,
        match sum.broken.len() {
            0 => "every invariant held".into(),
            n => format!("{n} failed"),
        }
    );
    let _ = writeln!(
        text,
        "{} steps in {:.1} s, {} a minute: {} of worlds, {} of disks; not counted: {} of the quiet ends of worlds",
        sum.steps(),
        sum.time.as_secs_f64(),
        sum.rate(),
        sum.world_steps,
        sum.disk_steps,
        sum.quiet_steps
    );
    let _ = writeln!(text, "a step is {STEP}");
    text
}

fn hash(sum: u64) -> String {
    format!("{sum:016x}")
}

fn options(run: &Run) -> String {
    match run {
        Run::World(options) => options.to_string(),
        Run::Disk { mix, seed, steps } => {
            format!("seed {seed} steps {steps} disk {}", mix.name)
        }
    }
}

/// A failure in full, its smallest form too.
fn told(broken: &Smallest) -> String {
    let mut text = String::new();
    tell(&mut text, &broken.found);
    if let Some(small) = &broken.small {
        text.push_str("the smallest run found that fails alike:\n");
        tell(&mut text, small);
    }
    text
}

fn tell(text: &mut String, broken: &Broken) {
    text.push_str(&match broken.invariant {
        None => "failed".into(),
        Some(0) => "not at rest".into(),
        Some(n) => format!("invariant {n} broken"),
    });
    if let Some(step) = broken.step {
        let _ = write!(text, " in step {step}");
    }
    let _ = writeln!(text, " of ({}): {}", options(&broken.run), broken.text);
    for event in &broken.events {
        let _ = writeln!(text, "  {event}");
    }
    let _ = writeln!(text, "again: {}", repeat(&broken.run));
}

fn failure(broken: Option<&Smallest>) -> Value {
    let all = |broken: &Broken| {
        json!({
            "seed": broken.run.seed(),
            "options": options(&broken.run),
            "step": broken.step,
            "invariant": broken.invariant,
            "text": broken.text,
            "events": broken.events,
            "command": repeat(&broken.run),
        })
    };
    let Some(broken) = broken else {
        return Value::Null;
    };
    let mut found = all(&broken.found);
    found["smallest"] = broken.small.as_ref().map_or(Value::Null, all);
    found
}
