//! The host adapter holds what every adapter must, and views refuse what leaves their memory.

use kvd_core::{Cut, GroupGeometry, GroupKind, Rect};
use kvd_device::conformance::{self, HostMemory};
use kvd_device::{HostDevice, LayerView, LoadPlan, Pages, PartGeometry};

#[test]
fn the_host_device_conforms() {
    conformance::run(&HostDevice, &mut HostMemory::default());
}

const PART: PartGeometry = PartGeometry {
    layers: 1,
    heads: 2,
    tokens: 16,
    cell_bytes: 8,
};

fn view(len: usize, block: usize, head: usize, token: usize) -> LayerView {
    // SAFETY: never copied from or to in these tests.
    unsafe { LayerView::new(4096, len, block, head, token) }
}

#[test]
fn only_whole_pages_count() {
    let pages = |len| Pages::new(vec![view(len, 256, 128, 8)], PART, 16).map(|p| p.pages());
    assert_eq!(pages(256), Ok(1));
    assert_eq!(pages(511), Ok(1));
    assert_eq!(pages(512), Ok(2));
    assert!(pages(255).is_err());
    assert!(pages(0).is_err());
    // The last page of an interleaved layout may end before a whole stride.
    let nhd = Pages::new(vec![view(1024 + 256, 1024, 8, 16)], PART, 16).unwrap();
    assert_eq!(nhd.pages(), 2);
}

#[test]
fn layouts_that_cannot_be_are_refused() {
    let new = |v: LayerView, part, tokens| Pages::new(vec![v], part, tokens);
    assert!(
        new(view(1 << 20, 256, 128, 4), PART, 16).is_err(),
        "tokens overlap"
    );
    assert!(
        new(view(1 << 20, 256, 4, 16), PART, 16).is_err(),
        "heads overlap"
    );
    assert!(
        new(view(1 << 20, 256, usize::MAX, 8), PART, 16).is_err(),
        "overflow"
    );
    assert!(
        new(view(usize::MAX, 256, 128, 8), PART, 16).is_err(),
        "beyond the address space"
    );
    assert!(new(view(1 << 20, 256, 128, 8), PART, 0).is_err());
    assert!(new(view(1 << 20, 256, 128, 8), PART, 5).is_err());
    for zero in [
        PartGeometry { layers: 0, ..PART },
        PartGeometry { heads: 0, ..PART },
        PartGeometry { tokens: 0, ..PART },
        PartGeometry {
            cell_bytes: 0,
            ..PART
        },
        PartGeometry {
            heads: u32::MAX,
            tokens: u32::MAX,
            cell_bytes: u32::MAX,
            ..PART
        },
    ] {
        assert!(
            new(view(1 << 20, 256, 128, 8), zero, 16).is_err(),
            "{zero:?}"
        );
    }
    assert!(Pages::new(vec![], PART, 16).is_err());
    // SAFETY: never copied from or to.
    let contiguous = |base, len| unsafe { Pages::contiguous(base, len, PART) };
    assert!(contiguous(4096, PART.bytes()).is_ok());
    assert!(contiguous(4096, PART.bytes() - 1).is_err());
    assert!(contiguous(usize::MAX - 8, PART.bytes()).is_err());
}

#[test]
fn plans_are_only_made_for_parts_of_the_group() {
    let geometry = GroupGeometry {
        kind: GroupKind::Full,
        layers: 4,
        heads: 4,
        block_tokens: 16,
        cell_bytes: 8,
        window: None,
    };
    let cut = Cut::whole(&geometry);
    let plan = |layers, heads| LoadPlan::new(&geometry, &cut, &Rect { layers, heads });
    assert!(plan(1..3, 0..4).is_ok());
    assert!(plan(0..5, 0..4).is_err());
    assert!(plan(0..4, 2..2).is_err());
    let small = GroupGeometry {
        layers: 2,
        ..geometry.clone()
    };
    let own = cut.part(0);
    assert!(
        LoadPlan::new(&small, &cut, &own).is_err(),
        "a cut of another group"
    );
}
