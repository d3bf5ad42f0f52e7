//! x
#[test]
fn list() {
    let v = |k: &str, d: u64| std::env::var(k).ok().and_then(|s| s.parse().ok()).unwrap_or(d);
    for seed in v("FROM", 0)..v("FROM", 0) + v("N", 1000) {
        if std::env::var("SAY").is_ok() { println!("{seed}"); }
        if let Err(f) = kvd_sim::run(seed, v("STEPS", 10000)) { println!("{}", f.to_string().lines().next().unwrap()); }
    }
}
