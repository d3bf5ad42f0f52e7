#[test]
fn first() {
    let from: u64 = std::env::var("FROM").ok().and_then(|s| s.parse().ok()).unwrap_or(0);
    let n: u64 = std::env::var("N").ok().and_then(|s| s.parse().ok()).unwrap_or(20);
    let steps: u64 = std::env::var("STEPS").ok().and_then(|s| s.parse().ok()).unwrap_or(4000);
    let mut all = kvd_sim::Counters::default();
    let (mut total, mut failed) = (0, 0);
    let t = std::time::Instant::now();
    for seed in from..from + n {
        match kvd_sim::run_with(&kvd_sim::Options { tail: if std::env::var("TAIL").is_ok() { 200000 } else { 10 }, ..kvd_sim::Options::new(seed, steps) }) {
            Ok(r) => { all.merge(&r.counters); total += r.steps; }
            Err(f) => { let f = if std::env::var("SHRINK").is_ok() { kvd_sim::shrink(f, 100) } else { f };
                let f2 = f.to_string(); let keep = if std::env::var("TAIL").is_ok() { 300 } else { 1 };
                println!("{}", f2.lines().take(1).collect::<Vec<_>>().join("\n"));
                if keep > 1 { println!("{f2}"); }
                failed += 1; }
        }
    }
    println!("{total} steps in {:?}, {failed} failed", t.elapsed());
    for (k, v) in all.each() { println!("  {k}: {v}"); }
}

#[test]
fn plants() {
    for plant in kvd_sim::Plant::ALL {
        let mut found = std::collections::BTreeMap::<u8, u32>::new();
        let mut first = None;
        for seed in 0..60 {
            let o = kvd_sim::Options::new(seed, 6000).with_plant(plant);
            if let Err(f) = kvd_sim::run_with(&o) { *found.entry(f.invariant).or_default() += 1; first.get_or_insert((seed, f.text.chars().take(150).collect::<String>())); }
        }
        println!("{plant:?}: {found:?} {first:?}");
    }
}
