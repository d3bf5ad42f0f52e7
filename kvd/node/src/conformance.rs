//! What every [`ArenaPort`] must show, in one suite: call [`run`] from an adapter's tests.

use kvd_core::TenantId;

use crate::ports::ArenaPort;

/// What the suite must see of an adapter that the node does not.
pub trait Probe: ArenaPort {
    /// The generation word of a slot, as a client sees it.
    fn word(&self, tenant: TenantId, slot: u32) -> u64;
    /// The tokens of sessions that may write, without zeros.
    fn writers(&self, tenant: TenantId) -> Vec<u64>;
    /// What a client that has mapped the tenant's arena would bring to a next daemon.
    fn offer(&self, tenant: TenantId) -> Self::Offer;
    /// The same with a shape that is not the arena's.
    fn wrong_offer(&self, tenant: TenantId) -> Self::Offer;
    /// Waits for the next extent that was faulted in: tenant, extent, whether it worked.
    fn populated(&mut self) -> (TenantId, u32, bool);
}

const A: TenantId = TenantId(0);
const B: TenantId = TenantId(1);

/// Runs the suite. `make` gives an adapter for two tenants with small arenas, and none made.
///
/// # Panics
/// When the adapter does not conform.
pub fn run<P: Probe>(mut make: impl FnMut() -> P) {
    shapes_and_words(&mut make());
    populating(&mut make());
    adoption(&mut make(), &mut make());
    refusal(&mut make(), &mut make());
}

fn shapes_and_words<P: Probe>(port: &mut P) {
    let (a, b) = (port.create(A).expect("made"), port.create(B).expect("made"));
    assert_ne!(a.id, b.id, "every arena has a name of its own");
    for shape in [a, b] {
        assert!(
            shape.bytes > 0 && shape.bytes.is_multiple_of(shape.extent_bytes),
            "{shape:?}"
        );
        assert!(
            shape.extent_bytes.is_power_of_two() && shape.page_bytes.is_power_of_two(),
            "{shape:?}"
        );
        assert!(
            shape.extents() >= 2,
            "the suite wants two extents: {shape:?}"
        );
    }
    let last = a.extents() * a.slots_per_extent - 1;
    assert_eq!((port.word(A, 0), port.word(A, last)), (0, 0));
    port.set_generation(A, last, 7);
    assert_eq!(
        (port.word(A, last), port.word(B, last), port.word(A, 0)),
        (7, 0, 0)
    );
    port.set_writers(A, &[3, 1, 2]);
    assert_eq!((port.writers(A), port.writers(B)), (vec![3, 1, 2], vec![]));
    port.set_writers(A, &[9]);
    assert_eq!(port.writers(A), [9], "the rest is empty again");
    let again = port.create(A).expect("made again");
    assert_ne!(again.id, a.id);
    assert_eq!(
        (port.word(A, last), port.writers(A)),
        (0, vec![]),
        "a new arena has a new table"
    );
}

fn populating<P: Probe>(port: &mut P) {
    let shape = port.create(A).expect("made");
    for extent in [1, 0] {
        port.populate(A, extent);
        assert_eq!(port.populated(), (A, extent, true));
    }
    // Again: that is how holes are filled.
    port.populate(A, 0);
    assert_eq!(port.populated(), (A, 0, true));
    port.populate(A, shape.extents());
    assert_eq!(
        port.populated(),
        (A, shape.extents(), false),
        "there is no such extent, and that is said"
    );
    let _ = port.page_probe(A).map(|probe| probe());
}

fn adoption<P: Probe>(former: &mut P, next: &mut P) {
    let shape = former.create(A).expect("made");
    for (slot, word) in [(0, 4), (1, 5), (3, 1)] {
        former.set_generation(A, slot, word);
    }
    former.set_writers(A, &[11, 12]);
    let offer = former.offer(A);
    next.create(A).expect("one that is given up");
    let found = next.adopt(A, offer).expect("it is what it claims to be");
    assert_eq!(found.shape, shape, "the very same arena");
    assert_eq!(found.writers, [11, 12]);
    assert_eq!(
        next.writers(A),
        [11, 12],
        "they stay listed until core says otherwise"
    );
    for (slot, word) in [(0, 4), (1, 5), (2, 0), (3, 1)] {
        let now = next.word(A, slot);
        assert_eq!(
            now,
            found.words.get(slot as usize).copied().unwrap_or(0),
            "what is said is what is there"
        );
        assert!(word == 0 || now > word, "words never go down");
        assert_eq!(now % 2, word % 2, "a writer may still be active, or not");
        assert!(word != 0 || now == 0, "what never was stays so");
    }
    next.set_generation(A, 0, 100);
    assert_eq!(former.word(A, 0), 4, "the table is a new one");
    // And once more: the next daemon dies too.
    let offer = next.offer(A);
    drop(
        former
            .adopt(A, offer)
            .expect("an adopted arena can be adopted"),
    );
    assert!(former.word(A, 0) > 100);
}

fn refusal<P: Probe>(former: &mut P, next: &mut P) {
    former.create(A).expect("made");
    let own = next.create(A).expect("made");
    next.set_generation(A, 0, 6);
    assert!(
        next.adopt(A, former.wrong_offer(A)).is_err(),
        "it is not what it claims to be"
    );
    assert_eq!(next.word(A, 0), 6, "nothing has changed");
    next.populate(A, own.extents() - 1);
    assert_eq!(next.populated(), (A, own.extents() - 1, true));
}
