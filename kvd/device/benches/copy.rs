//! Stores and loads by the host adapter beside plain memcpy, all of them over more memory than the caches hold.
//!
//! `cargo bench -p kvd-device`; the ratio to `memcpy` of the same run is what counts.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use kvd_arena::{Arena, ArenaView, HugePages};
use kvd_core::{Cut, GroupGeometry, GroupKind};
use kvd_device::{
    Device, HostDevice, LayerView, LoadJob, LoadPlan, Loaded, Pages, PartGeometry, StoreJob,
};

const TOTAL: usize = 256 << 20;

struct Setup {
    view: ArenaView,
    engine: Vec<u8>,
    pages: Pages,
    plan: LoadPlan,
    block: usize,
}

fn setup(layers: u32, heads: u32, nhd: bool) -> Setup {
    let geometry = GroupGeometry {
        kind: GroupKind::Full,
        layers,
        heads,
        block_tokens: 16,
        cell_bytes: 256,
        window: None,
    };
    let block = geometry.block_bytes() as usize;
    let arena = Arena::create(TOTAL as u64, Some(64 << 20), HugePages::Auto).expect("an arena");
    for extent in 0..arena.extents() {
        arena.populate(extent).expect("memory");
    }
    let dup = |fd: std::os::fd::BorrowedFd<'_>| fd.try_clone_to_owned().expect("dup");
    let view = ArenaView::map(dup(arena.fd()), dup(arena.generation_fd()), arena.shape());
    let view = view.expect("a view");
    for slot in (0..arena.generations().slots()).step_by(arena.shape().slots_per_extent as usize) {
        drop(view.prepare([slot].into_iter(), &|_, _| None));
    }
    let mut engine: Vec<u8> = (0..TOTAL).map(|i| (i * 31) as u8).collect();
    let (page, cell) = (block / layers as usize, 256);
    let (head, token) = if nhd {
        (cell, cell * heads as usize)
    } else {
        (16 * cell, cell)
    };
    let blocks = TOTAL / block;
    let base = engine.as_mut_ptr() as usize;
    let views = (0..layers as usize)
        .map(|l| {
            let at = base + l * blocks * page;
            // SAFETY: inside the vector, which lives in the same struct as the pages.
            unsafe { LayerView::new(at, blocks * page, page, head, token) }
        })
        .collect();
    let part = PartGeometry {
        layers,
        heads,
        tokens: 16,
        cell_bytes: 256,
    };
    let cut = Cut::whole(&geometry);
    Setup {
        view,
        engine,
        pages: Pages::new(views, part, 16).expect("pages"),
        plan: LoadPlan::new(&geometry, &cut, &cut.part(0)).expect("a plan"),
        block,
    }
}

fn bench(c: &mut Criterion, name: &str, setup: &mut Setup) {
    let block = setup.block;
    let count = (TOTAL / block) as u32;
    let per_extent = setup.view.shape().slots_per_extent;
    let in_extent = (setup.view.shape().extent_bytes as usize / block) as u32;
    let slot = |i: u32| {
        let at = i / in_extent * per_extent + i % in_extent;
        setup
            .view
            .slot(at, u64::from(i) * block as u64, block)
            .expect("a slot")
    };
    let pages: Vec<u32> = (0..count).collect();
    let mut group = c.benchmark_group(name);
    group
        .throughput(Throughput::Bytes(TOTAL as u64))
        .sample_size(10);
    let engine = setup.engine.as_ptr();
    group.bench_function("memcpy", |b| {
        b.iter(|| {
            for i in 0..count {
                // SAFETY: block i is inside both; they do not overlap.
                unsafe {
                    let from = engine.add(i as usize * block);
                    std::ptr::copy_nonoverlapping(from, slot(i).as_ptr(), block);
                }
            }
        });
    });
    let mut crcs = Vec::new();
    group.bench_function("store", |b| {
        b.iter(|| {
            crcs.clear();
            for window in pages.chunks((64 << 20) / block) {
                let jobs: Vec<StoreJob<'_>> = window
                    .iter()
                    .map(|p| StoreJob {
                        from: &setup.pages,
                        pages: std::slice::from_ref(p),
                        part: slot(*p),
                    })
                    .collect();
                HostDevice.store(&jobs, &mut crcs).expect("stored");
            }
        });
    });
    let heads = setup.pages.part().heads as usize;
    let mut results = Vec::new();
    group.bench_function("load", |b| {
        b.iter(|| {
            results.clear();
            for window in pages.chunks((64 << 20) / block) {
                let jobs: Vec<LoadJob<'_>> = window
                    .iter()
                    .map(|p| LoadJob {
                        slot: slot(*p),
                        plan: &setup.plan,
                        crcs: &crcs[*p as usize * heads..][..heads],
                        to: &setup.pages,
                        pages: std::slice::from_ref(p),
                    })
                    .collect();
                HostDevice.load(&jobs, &mut results).expect("loaded");
            }
            assert!(results.iter().all(|r| *r == Loaded::Good));
        });
    });
    group.finish();
}

fn benches(c: &mut Criterion) {
    bench(c, "2MiB-hnd", &mut setup(32, 16, false));
    bench(c, "64KiB-hnd", &mut setup(4, 4, false));
    bench(c, "2MiB-nhd", &mut setup(32, 16, true));
    bench(c, "64KiB-nhd", &mut setup(4, 4, true));
}

criterion_group!(copy, benches);
criterion_main!(copy);
