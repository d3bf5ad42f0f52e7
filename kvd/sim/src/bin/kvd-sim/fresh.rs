//! Seeds one after the other, on several threads, until their number or their time is over or one fails.
//!
//! A thread takes the next seed, runs it to its end and hands over what came of it, through a queue with room for one result a thread.
//! Deliberately absent: stopping in the middle of a run.
#![allow(
    clippy::disallowed_methods,
    reason = "how long to go on is the one thing here that a real clock decides"
)]

use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Mutex, PoisonError};
use std::thread::{Builder, scope};
use std::time::{Duration, Instant};

use crate::flags::{Many, Wanted};
use crate::one::{Broken, Held, Run};

/// How often progress is told.
const TELL: Duration = Duration::from_secs(3);

/// What was done.
#[derive(Clone, Debug)]
pub(crate) struct Sum {
    /// The first seed.
    pub(crate) first: u64,
    /// How many there were; each follows the one before it.
    pub(crate) seeds: u64,
    /// Those that were worlds. The others were disks.
    pub(crate) worlds: u64,
    /// Steps of worlds.
    pub(crate) world_steps: u64,
    /// Steps of the quiet ends of worlds, which count nowhere else.
    pub(crate) quiet_steps: u64,
    /// Steps of disks.
    pub(crate) disk_steps: u64,
    /// How long it took.
    pub(crate) time: Duration,
    /// What failed, by seed.
    pub(crate) broken: Vec<Broken>,
}

impl Sum {
    /// All steps.
    pub(crate) fn steps(&self) -> u64 {
        self.world_steps + self.disk_steps
    }

    /// Steps a minute.
    pub(crate) fn rate(&self) -> u64 {
        (self.steps() as f64 * 60.0 / self.time.as_secs_f64().max(1e-6)) as u64
    }

    fn add(&mut self, run: Run, result: Result<Held, Box<Broken>>) {
        let steps = match result {
            Ok(held) => {
                self.quiet_steps += held.quiet;
                held.steps
            }
            Err(broken) => {
                let made = broken.step.unwrap_or_default();
                let asked = broken.run.steps();
                self.broken.push(*broken);
                self.quiet_steps += made.saturating_sub(asked);
                made.min(asked)
            }
        };
        self.seeds += 1;
        match run {
            Run::World(_) => {
                self.worlds += 1;
                self.world_steps += steps;
            }
            Run::Disk { .. } => self.disk_steps += steps,
        }
    }
}

/// Which run comes next.
struct Turns<'a> {
    wanted: &'a Wanted,
    first: u64,
    begun: Instant,
    /// How many were taken; `None` when no more are.
    taken: Mutex<Option<u64>>,
}

impl Turns<'_> {
    fn next(&self) -> Option<Run> {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let at = (*taken)?;
        let over = match self.wanted.many {
            Some(Many::Seeds(seeds)) => at >= seeds,
            // One there is in any case.
            Some(Many::For(time)) => at > 0 && self.begun.elapsed() >= time,
            None => at > 0,
        };
        *taken = (!over).then_some(at + 1);
        (!over).then(|| self.wanted.run(self.first, at))
    }

    fn stop(&self) {
        *self.taken.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    fn work(&self, tell: &SyncSender<(Run, Result<Held, Box<Broken>>)>) {
        while let Some(run) = self.next() {
            let result = run.go();
            if result.is_err() {
                self.stop();
            }
            if tell.send((run, result)).is_err() {
                return;
            }
        }
    }
}

/// Runs them all, or until one fails. `see` is called every few seconds.
pub(crate) fn run(wanted: &Wanted, first: u64, see: &mut dyn FnMut(&Sum)) -> std::io::Result<Sum> {
    let begun = Instant::now();
    let turns = Turns {
        wanted,
        first,
        begun,
        taken: Mutex::new(Some(0)),
    };
    let mut sum = Sum {
        first,
        seeds: 0,
        worlds: 0,
        world_steps: 0,
        quiet_steps: 0,
        disk_steps: 0,
        time: Duration::ZERO,
        broken: Vec::new(),
    };
    scope(|scope| {
        let (tell, hear) = sync_channel(wanted.jobs);
        for job in 0..wanted.jobs {
            let (tell, turns) = (tell.clone(), &turns);
            let thread = Builder::new().name(format!("kvd-sim-{job}"));
            if let Err(error) = thread.spawn_scoped(scope, move || turns.work(&tell)) {
                turns.stop();
                return Err(error);
            }
        }
        drop(tell);
        let mut told = begun;
        loop {
            match hear.recv_timeout(TELL) {
                Ok((run, result)) => sum.add(run, result),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
            }
            sum.time = begun.elapsed();
            if told.elapsed() >= TELL {
                told = Instant::now();
                see(&sum);
            }
        }
    })?;
    sum.broken.sort_by_key(|broken| broken.run.seed());
    Ok(sum)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flags::{command, wanted};

    fn parsed(line: &str) -> Wanted {
        let args = command().try_get_matches_from(line.split_whitespace());
        wanted(&args.expect("it is understood")).expect("it is understood")
    }

    #[test]
    fn as_many_seeds_are_run_as_were_asked_for() {
        let wanted = parsed("kvd-sim --seeds 7 --seed 40 --steps 50 --jobs 3");
        let sum = run(&wanted, 40, &mut |_| {}).expect("threads");
        assert_eq!((sum.seeds, sum.worlds), (7, 4));
        assert_eq!((sum.world_steps, sum.disk_steps), (200, 150));
        assert!(sum.quiet_steps > 0 && sum.broken.is_empty(), "{sum:?}");
    }

    #[test]
    fn the_first_failure_is_the_last_seed() {
        let wanted = parsed("kvd-sim --seeds 300 --steps 6000 --jobs 1 --plant EarlyCommit");
        let sum = run(&wanted, 0, &mut |_| {}).expect("threads");
        let seeds: Vec<u64> = sum.broken.iter().map(|broken| broken.run.seed()).collect();
        assert_eq!(seeds, [sum.seeds - 1]);
    }
}
