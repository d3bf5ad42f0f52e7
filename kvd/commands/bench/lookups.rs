//! Lookups over the socket while a million blocks are held.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use anyhow::{Result, ensure};
use kvd_client::{ChainRef, LookupReply, Session};
use kvd_wire::session::Where;

use super::daemon::{Daemon, GIB, MIB};
use super::{Random, Results, Shape, progress, quantile};

/// Blocks that are held.
const BLOCKS: usize = 1_000_000;
/// Blocks of one request while they are stored.
const BATCH: usize = 8_192;
/// Room for them, at 4 KiB each, in whole extents.
const CAPACITY: u64 = 4 * GIB + 256 * MIB;

/// Measures lookups, and the daemon's memory before and after the blocks are there.
pub(super) fn measure(results: &mut Results) -> Result<()> {
    progress("memory of an idle daemon with a pool of 4 GiB");
    let daemon = Daemon::start(CAPACITY)?;
    // One layer, one head: 4 KiB, the smallest slot.
    let (mut session, namespace) = Shape::new(1, 1, 256).open(&daemon)?;
    daemon.wait_until_faulted()?;
    results.idle_rss_mb = daemon.rss_mb()?;

    progress("storing a million blocks of 4 KiB");
    let hashes = fill(&mut session, namespace)?;
    results.lookup_blocks = BLOCKS as u64;
    results.full_rss_mb = daemon.rss_mb()?;

    progress("looking up");
    let mut times = Vec::new();
    for _ in 0..2_000 {
        let begun = Instant::now();
        session.ping()?;
        times.push(begun.elapsed().as_secs_f64() * 1e6);
    }
    results.ping_us_p50 = quantile(&mut times, 0.5);
    let mut bench = Bench {
        session,
        namespace,
        hashes,
        random: Random(7),
    };
    results.raw_128_us_p50 = raw(128 * 32, 5_000)?;
    results.raw_6250_us_p50 = raw(6_250 * 32, 1_000)?;
    (results.lookup_128_us_p50, results.lookup_128_us_p99) = bench.hot(128, 5_000)?;
    (results.lookup_6250_us_p50, results.lookup_6250_us_p99) = bench.hot(6_250, 1_000)?;
    (
        results.lookup_6250_cold_us_p50,
        results.lookup_6250_cold_us_p99,
    ) = bench.cold(6_250, 500)?;
    bench.session.close()?;
    Ok(())
}

/// Sends so many bytes to a thread that answers with a few, again and again. p50 in microseconds.
fn raw(bytes: usize, times: usize) -> Result<f64> {
    let (mut near, mut far) = UnixStream::pair()?;
    let echo = std::thread::spawn(move || -> std::io::Result<()> {
        let mut request = vec![0; bytes];
        for _ in 0..times {
            far.read_exact(&mut request)?;
            far.write_all(&request[..64])?;
        }
        Ok(())
    });
    let (mut request, mut answer) = (vec![0; bytes], [0; 64]);
    let mut taken = Vec::with_capacity(times);
    for turn in 0..times {
        request.fill(turn as u8);
        let begun = Instant::now();
        near.write_all(&request)?;
        near.read_exact(&mut answer)?;
        taken.push(begun.elapsed().as_secs_f64() * 1e6);
    }
    let ended = echo.join();
    ensure!(matches!(ended, Ok(Ok(()))), "the echo failed: {ended:?}");
    Ok(quantile(&mut taken, 0.5))
}

/// Makes a million blocks visible, without writing their bytes: nobody loads them.
fn fill(session: &mut Session, namespace: u32) -> Result<Vec<[u8; 32]>> {
    let mut random = Random(3);
    let hashes: Vec<_> = (0..BLOCKS).map(|_| random.hash()).collect();
    for batch in hashes.chunks(BATCH) {
        let packed = batch.as_flattened();
        let reserved = session.reserve(
            namespace,
            ChainRef {
                group: 0,
                hashes: packed,
                parent: None,
            },
        )?;
        ensure!(
            reserved.slots.len() == batch.len(),
            "only {} of {} slots were given",
            reserved.slots.len(),
            batch.len()
        );
        let crcs = vec![0; reserved.slots.len()];
        session.commit(namespace, 0, &reserved.slots, &reserved.generations, &crcs)?;
    }
    Ok(hashes)
}

struct Bench {
    session: Session,
    namespace: u32,
    hashes: Vec<[u8; 32]>,
    random: Random,
}

impl Bench {
    /// The same hashes each time. p50 and p99 in microseconds.
    fn hot(&mut self, count: usize, times: usize) -> Result<(f64, f64)> {
        let packed = self.hashes[..count].as_flattened().to_vec();
        let mut taken = Vec::with_capacity(times);
        for turn in 0..times + times / 10 {
            let us = self.once(&packed)?;
            if turn >= times / 10 {
                taken.push(us);
            }
        }
        Ok((quantile(&mut taken, 0.5), quantile(&mut taken, 0.99)))
    }

    /// Others each time.
    fn cold(&mut self, count: usize, times: usize) -> Result<(f64, f64)> {
        let mut taken = Vec::with_capacity(times);
        for _ in 0..times {
            let mut packed = Vec::with_capacity(32 * count);
            for _ in 0..count {
                let at = self.random.next() as usize % self.hashes.len();
                packed.extend_from_slice(&self.hashes[at]);
            }
            taken.push(self.once(&packed)?);
        }
        Ok((quantile(&mut taken, 0.5), quantile(&mut taken, 0.99)))
    }

    fn once(&mut self, packed: &[u8]) -> Result<f64> {
        lookup(&mut self.session, self.namespace, packed)
    }
}

/// Blocks of the first chain that are there.
pub(super) fn found(reply: &LookupReply, place: Where) -> u64 {
    let runs = &reply.chains[0];
    let there = runs.length.iter().zip(&runs.r#where);
    let there = there.filter(|(_, at)| **at == place as i32);
    there.map(|(length, _)| u64::from(*length)).sum()
}

/// Looks up blocks that are all in host memory. Microseconds.
pub(super) fn lookup(session: &mut Session, namespace: u32, packed: &[u8]) -> Result<f64> {
    let chain = ChainRef {
        group: 0,
        hashes: packed,
        parent: None,
    };
    let begun = Instant::now();
    let reply = session.lookup(namespace, &[chain], 0, false)?;
    let us = begun.elapsed().as_secs_f64() * 1e6;
    let found = found(&reply, Where::Host);
    ensure!(
        found == packed.len() as u64 / 32,
        "{found} blocks of {} were found in host memory",
        packed.len() / 32
    );
    Ok(us)
}
