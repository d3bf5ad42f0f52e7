//! Two processes' views of one arena, and everything that somebody could pass instead of one.

#![allow(clippy::unwrap_used, reason = "tests, helpers too")]

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use kvd_arena::{
    Arena, ArenaShape, ArenaView, ErrorKind, HugePages, WRITERS_MAX, default_extent_bytes,
};
use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};

const EXTENT: u64 = 64 << 10;

fn arena(extents: u64) -> Arena {
    Arena::create(extents * EXTENT, Some(EXTENT), HugePages::Off).expect("an arena")
}

fn fds(arena: &Arena) -> (OwnedFd, OwnedFd) {
    let dup = |fd: std::os::fd::BorrowedFd<'_>| fd.try_clone_to_owned().expect("dup");
    (dup(arena.fd()), dup(arena.generation_fd()))
}

fn view(arena: &Arena) -> ArenaView {
    let (memory, table) = fds(arena);
    ArenaView::map(memory, table, arena.shape()).expect("a view")
}

fn memfd(bytes: u64, seals: SealFlags) -> OwnedFd {
    let fd =
        rustix::fs::memfd_create("t", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    rustix::fs::ftruncate(&fd, bytes).unwrap();
    rustix::fs::fcntl_add_seals(&fd, seals).unwrap();
    fd
}

fn write(view: &ArenaView, slot: u32, offset: u64, value: u8) {
    let bytes = view.slot(slot, offset, 4096).expect("in range");
    // SAFETY: the slot is inside the live view.
    unsafe { bytes.as_ptr().write_bytes(value, bytes.len()) };
}

fn read(view: &ArenaView, slot: u32, offset: u64) -> u8 {
    let bytes = view.slot(slot, offset, 4096).expect("in range");
    // SAFETY: the slot is inside the live view.
    unsafe { bytes.as_ptr().read() }
}

#[test]
fn capacity_is_whole_extents_of_a_sensible_size() {
    assert_eq!(default_extent_bytes(1 << 20), 2 << 20);
    assert_eq!(default_extent_bytes(4 << 30), 64 << 20);
    assert_eq!(default_extent_bytes(5 << 30), 128 << 20);
    assert_eq!(default_extent_bytes(1 << 40), 1 << 30);
    let arena = Arena::create(3 * EXTENT + 5000, Some(EXTENT), HugePages::Off).unwrap();
    assert_eq!(arena.shape().bytes, 3 * EXTENT);
    assert_eq!(arena.extents(), 3);
    assert_eq!(arena.shape().slots_per_extent, 16);
    assert_eq!(arena.generations().slots(), 48);
    for bad in [0, 1000, 3 << 20] {
        let error = Arena::create(1 << 20, Some(bad), HugePages::Off).expect_err("no power of two");
        assert_eq!(error.kind(), ErrorKind::Invalid);
    }
    assert!(Arena::create(4096, Some(EXTENT), HugePages::Off).is_err());
    assert!(
        Arena::create(1 << 50, None, HugePages::Off).is_err(),
        "more slots than a u32 counts"
    );
}

#[test]
fn what_one_view_writes_another_reads_and_generations_are_seen() {
    let arena = arena(4);
    let (a, b) = (view(&arena), view(&arena));
    write(&a, 17, EXTENT + 4096, 9);
    assert_eq!(read(&b, 17, EXTENT + 4096), 9);
    assert_eq!(b.generation(17), Some(0));
    arena.generations().set(17, 3);
    assert_eq!(b.generation(17), Some(3));
    assert_eq!(b.generation_after_copy(17), Some(3));
    assert_eq!(b.generation(64), None, "beyond the last slot");
    assert_eq!(b.generation(u32::MAX), None);
}

#[test]
fn slots_out_of_range_are_refused() {
    let arena = arena(2);
    let view = view(&arena);
    assert!(view.slot(0, 0, EXTENT as usize).is_ok());
    assert!(view.slot(16, EXTENT, 1).is_ok());
    for (slot, offset, bytes) in [
        (0, 0, EXTENT as usize + 1),       // beyond the extent
        (0, 4096, 4096),                   // slot 0 begins its extent
        (16, 0, 4096),                     // another extent
        (1, 100, 1),                       // not aligned
        (2, 4096, 1),                      // slots are at least 4 KiB
        (3, 4 * 4096, 1),                  // no multiple of the index
        (32, 2 * EXTENT, 1),               // no such extent
        (u32::MAX, u64::MAX - 4095, 4096), // overflow
        (1, 4096, usize::MAX),
    ] {
        let error = view.slot(slot, offset, bytes).expect_err("out of range");
        assert_eq!(error.kind(), ErrorKind::Invalid, "{slot} {offset} {bytes}");
    }
}

#[test]
fn seals_refuse_truncation_and_a_writable_table() {
    let arena = arena(2);
    let (memory, table) = fds(&arena);
    for fd in [&memory, &table] {
        assert!(rustix::fs::ftruncate(fd, 0).is_err());
        assert!(rustix::fs::ftruncate(fd, 1 << 30).is_err());
        assert!(
            rustix::fs::fcntl_add_seals(fd, SealFlags::WRITE).is_err(),
            "sealed for good"
        );
    }
    assert!(rustix::io::pwrite(&table, &[1; 8], 4096).is_err());
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    assert!(rustix::fs::fallocate(&table, punch, 0, 4096).is_err());
    use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap, mprotect, munmap};
    let null = std::ptr::null_mut();
    // SAFETY: a new mapping at an address of the kernel's choice, never dereferenced.
    unsafe {
        assert!(
            mmap(
                null,
                4096,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                &table,
                0
            )
            .is_err()
        );
        let read = mmap(null, 4096, ProtFlags::READ, MapFlags::SHARED, &table, 0).unwrap();
        assert!(mprotect(read, 4096, MprotectFlags::READ | MprotectFlags::WRITE).is_err());
        munmap(read, 4096).unwrap();
    }
    arena.generations().set(1, 7);
    assert_eq!(
        arena.generations().get(1),
        7,
        "the daemon's own mapping still writes"
    );
}

#[test]
fn a_punched_hole_is_populated_again() {
    let arena = arena(2);
    arena.populate(0).unwrap();
    let view = view(&arena);
    write(&view, 1, 4096, 5);
    write(&view, 2, 8192, 6);
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(view.fd(), punch, 4096, 4096).unwrap();
    arena.populate(0).unwrap();
    assert_eq!(read(&view, 1, 4096), 0, "what was punched is gone");
    assert_eq!(read(&view, 2, 8192), 6, "the rest is kept");
    write(&view, 1, 4096, 8);
    assert_eq!(read(&view, 1, 4096), 8);
    assert!(arena.populate(2).is_err());
}

#[test]
fn populate_faults_in_and_smaps_says_so() {
    let arena = arena(4);
    assert_eq!(arena.pages().unwrap().resident_bytes, 0);
    arena.populate(1).unwrap();
    arena.populate(3).unwrap();
    let report = arena.pages().unwrap();
    assert_eq!(report.resident_bytes, 2 * EXTENT);
    assert_eq!(report.kernel_page_bytes, 4096);
    let view = view(&arena);
    drop(view.prepare([16, 17, 16].into_iter(), &|_, _| None));
    drop(view.prepare([u32::MAX].into_iter(), &|_, _| {
        panic!("there is no such extent")
    }));
}

#[test]
fn a_driver_is_told_once_of_each_extent_and_again_before_it_is_unmapped() {
    struct Told(Arc<AtomicU32>, usize);
    impl Drop for Told {
        fn drop(&mut self) {
            // SAFETY: what was registered is mapped as long as this lives.
            unsafe { std::ptr::write_volatile(self.1 as *mut u8, 1) };
            self.0.fetch_sub(1, Ordering::SeqCst);
        }
    }
    let arena = arena(4);
    let view = view(&arena);
    let told = Arc::new(AtomicU32::new(0));
    let tell = |at: usize, bytes: usize| {
        assert_eq!(bytes as u64, EXTENT);
        told.fetch_add(1, Ordering::SeqCst);
        Some(Box::new(Told(Arc::clone(&told), at)) as kvd_arena::Registered)
    };
    let per = view.shape().slots_per_extent;
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| drop(view.prepare([per + 1, per].into_iter(), &tell)));
        }
    });
    assert_eq!(told.load(Ordering::SeqCst), 1, "one extent, whoever comes");
    let both = view.prepare([3 * per, per].into_iter(), &tell);
    assert_eq!(told.load(Ordering::SeqCst), 2);
    std::thread::scope(|scope| {
        scope.spawn(|| view.forget(per));
        assert_eq!(told.load(Ordering::SeqCst), 2, "a copy may be under way");
        drop(both);
    });
    assert_eq!(told.load(Ordering::SeqCst), 1, "one is forgotten");
    drop(view.prepare([per].into_iter(), &tell));
    assert_eq!(told.load(Ordering::SeqCst), 2, "and told anew");
    drop(view);
    assert_eq!(told.load(Ordering::SeqCst), 0, "taken back");
}

#[test]
fn without_huge_pages_auto_falls_back_and_says_why() {
    let free = std::fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages");
    if free.is_ok_and(|n| n.trim() != "0") {
        return; // this machine has some
    }
    let arena = Arena::create(4 << 20, None, HugePages::Auto).unwrap();
    assert_eq!(arena.shape().page_bytes, 4096);
    assert!(arena.fallback().is_some());
    arena.populate(1).unwrap();
    assert_eq!(arena.pages().unwrap().kernel_page_bytes, 4096);
    let error = Arena::create(4 << 20, None, HugePages::Require).expect_err("none there");
    assert_eq!(error.kind(), ErrorKind::NoSpace);
    assert!(error.to_string().contains("vm.nr_hugepages"), "{error}");
}

#[test]
fn writers_are_replaced_and_bounded() {
    let arena = arena(1);
    let table = arena.generations();
    table.set_writers(&[5, 6, 7]).unwrap();
    table.set_writers(&[7, 8]).unwrap();
    let mut held = table.writers();
    held.sort_unstable();
    assert_eq!(held, [7, 8]);
    let full: Vec<u64> = (1..=WRITERS_MAX as u64).collect();
    table.set_writers(&full).unwrap();
    assert_eq!(table.writers().len(), WRITERS_MAX);
    let other: Vec<u64> = (1000..1000 + WRITERS_MAX as u64).collect();
    table.set_writers(&other).unwrap();
    let mut held = table.writers();
    held.sort_unstable();
    assert_eq!(held, other);
    assert!(table.set_writers(&[1; WRITERS_MAX + 1]).is_err());
    table.set_writers(&[]).unwrap();
    assert!(table.writers().is_empty());
}

#[test]
fn an_arena_is_adopted_with_generations_above_the_old_ones() {
    let old = arena(4);
    let client = view(&old);
    write(&client, 1, 4096, 42);
    old.generations().set(1, 4);
    old.generations().set(2, 5);
    old.generations().set(63, 1);
    old.generations().set_writers(&[77, 78]).unwrap();
    let shape = *old.shape();
    let (memory, table) = fds(&old);
    drop(old);
    let adopted = Arena::adopt(memory, table, &shape, shape.bytes).unwrap();
    assert_eq!(adopted.arena.shape(), &shape);
    assert_eq!(adopted.words.len(), 64);
    assert_eq!(
        (adopted.words[1], adopted.words[2], adopted.words[63]),
        (6, 7, 3)
    );
    assert_eq!(adopted.words.iter().filter(|w| **w != 0).count(), 3);
    let mut writers = adopted.writers.clone();
    writers.sort_unstable();
    assert_eq!(writers, [77, 78]);
    let table = adopted.arena.generations();
    assert_eq!(
        (table.get(1), table.get(2), table.get(3), table.get(63)),
        (6, 7, 0, 3)
    );
    assert_eq!(
        table.writers().len(),
        2,
        "until the new daemon says otherwise"
    );
    assert_eq!(
        client.generation(1),
        Some(4),
        "the old table is nobody's now"
    );

    let (memory, table) = fds(&adopted.arena);
    let renewed = client.renew(memory, table, &shape).unwrap();
    assert_eq!(
        renewed.region(),
        client.region(),
        "the same memory stays where it is mapped"
    );
    assert_eq!(renewed.generation(1), Some(6));
    drop(client);
    assert_eq!(read(&renewed, 1, 4096), 42);
    adopted.arena.populate(0).unwrap();
}

#[test]
fn a_renewed_view_of_other_memory_is_mapped_anew() {
    let (old, new) = (arena(2), arena(2));
    let client = view(&old);
    let (memory, table) = fds(&new);
    let renewed = client.renew(memory, table, new.shape()).unwrap();
    assert_ne!(renewed.region(), client.region());
}

/// Everything that is no arena is refused with `Invalid`, by the daemon and by the client.
fn refused(memory: OwnedFd, table: OwnedFd, shape: &ArenaShape, why: &str) {
    let (m, t) = (memory.try_clone().unwrap(), table.try_clone().unwrap());
    let error = ArenaView::map(m, t, shape).expect_err(why);
    assert_eq!(error.kind(), ErrorKind::Invalid, "client: {why}: {error}");
    let error = Arena::adopt(memory, table, shape, 1 << 40).expect_err(why);
    assert_eq!(error.kind(), ErrorKind::Invalid, "daemon: {why}: {error}");
}

#[test]
fn hostile_descriptors_are_refused() {
    let good = arena(2);
    let shape = *good.shape();
    let sealed = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
    let memory = || fds(&good).0;
    let table = || fds(&good).1;

    let (read_end, write_end) = rustix::pipe::pipe().unwrap();
    refused(read_end, table(), &shape, "a pipe as arena");
    refused(memory(), write_end, &shape, "a pipe as table");
    let file = std::env::current_exe().unwrap();
    refused(
        std::fs::File::open(&file).unwrap().into(),
        table(),
        &shape,
        "a regular file",
    );
    refused(
        std::fs::File::open("/dev/zero").unwrap().into(),
        table(),
        &shape,
        "a device",
    );
    refused(
        std::fs::File::open("/").unwrap().into(),
        table(),
        &shape,
        "a directory",
    );
    refused(
        memory(),
        std::fs::File::open("/proc/self/maps").unwrap().into(),
        &shape,
        "a proc file",
    );

    refused(
        memfd(shape.bytes, SealFlags::empty()),
        table(),
        &shape,
        "no seals",
    );
    refused(
        memfd(shape.bytes, SealFlags::SHRINK),
        table(),
        &shape,
        "may grow",
    );
    refused(
        memfd(shape.bytes, SealFlags::GROW | SealFlags::SEAL),
        table(),
        &shape,
        "may shrink",
    );
    refused(
        memfd(shape.bytes, sealed | SealFlags::WRITE),
        table(),
        &shape,
        "not writable",
    );
    refused(
        memfd(shape.bytes - 4096, sealed),
        table(),
        &shape,
        "too small",
    );
    refused(memfd(1 << 46, sealed), table(), &shape, "huge");
    refused(memory(), memory(), &shape, "the arena twice");
    refused(table(), table(), &shape, "the table twice");
}

#[test]
fn hostile_tables_are_refused() {
    let good = arena(2);
    let shape = *good.shape();
    let sealed = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
    let table_bytes = 4096 + 4096;
    let memory = || fds(&good).0;

    let future = sealed | SealFlags::FUTURE_WRITE;
    refused(
        memory(),
        memfd(table_bytes, sealed),
        &shape,
        "a table that its owner can write",
    );
    refused(
        memory(),
        memfd(table_bytes, future),
        &shape,
        "a table without header",
    );
    refused(memory(), memfd(4096, future), &shape, "a table too small");
    refused(
        memory(),
        memfd(1 << 46, future),
        &shape,
        "a table too large",
    );
    refused(memory(), fds(&arena(2)).1, &shape, "another arena's table");
    refused(
        memory(),
        fds(&arena(4)).1,
        &shape,
        "a table of another size",
    );
}

#[test]
fn hostile_shapes_are_refused() {
    let good = arena(2);
    let shape = *good.shape();
    let with = |change: fn(&mut ArenaShape)| {
        let mut shape = shape;
        change(&mut shape);
        shape
    };
    for bad in [
        with(|s| s.bytes = 0),
        with(|s| s.bytes += 1),
        with(|s| s.bytes = u64::MAX - EXTENT + 1),
        with(|s| s.bytes *= 2),
        with(|s| s.extent_bytes = 0),
        with(|s| s.extent_bytes = 3),
        with(|s| s.extent_bytes = 1 << 63),
        with(|s| s.slots_per_extent = 0),
        with(|s| s.slots_per_extent = u32::MAX),
        with(|s| s.page_bytes = 0),
        with(|s| s.id[0] ^= 1),
    ] {
        let (memory, table) = fds(&good);
        refused(memory, table, &bad, "a shape that is not so");
    }
    let (memory, table) = fds(&good);
    let huge = with(|s| s.page_bytes = 2 << 20);
    assert!(
        Arena::adopt(memory, table, &huge, 1 << 40).is_err(),
        "pages of another size"
    );
    let (memory, table) = fds(&good);
    let error = Arena::adopt(memory, table, &shape, shape.bytes - 1).expect_err("over the limit");
    assert_eq!(error.kind(), ErrorKind::Invalid);
}

#[test]
fn a_table_of_absurd_generations_is_refused() {
    let old = arena(2);
    old.generations().set(3, u64::MAX);
    let (memory, table) = fds(&old);
    assert!(Arena::adopt(memory, table, old.shape(), 1 << 40).is_err());
}

#[test]
fn a_large_sparse_arena_costs_nothing_to_adopt() {
    let old = Arena::create(64 << 30, None, HugePages::Off).unwrap();
    old.generations().set(12_345_678, 9);
    let (memory, table) = fds(&old);
    let adopted = Arena::adopt(memory, table, old.shape(), u64::MAX).unwrap();
    assert_eq!(adopted.words[12_345_678], 11);
    let stat = rustix::fs::fstat(adopted.arena.generation_fd().as_fd()).unwrap();
    assert!(
        stat.st_blocks * 512 <= 64 << 10,
        "{} blocks",
        stat.st_blocks
    );
}
