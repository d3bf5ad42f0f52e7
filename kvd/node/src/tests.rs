//! The node with a port of plain numbers: when arenas are made, who waits for whom, what is carried out in which order.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use kvd_core::{
    ArenaShape, GroupLayout, InstanceId, NamespaceRecord, Now, Reply, Request, RequestId, Role,
    SessionId, Settings, TenantId, TenantLimits,
};

use crate::{
    AdoptedArena, ArenaPort, ArenaState, Clock, Effect, Entropy, Node, NodeSettings, Opening,
    Pages, PortError, TenantSpec,
};

#[derive(Clone, Default)]
struct Time(Rc<Cell<u64>>);

impl Clock for Time {
    fn now(&self) -> Now {
        Now(self.0.get())
    }
}

struct Count(u8);

impl Entropy for Count {
    fn fill(&mut self, bytes: &mut [u8]) {
        for byte in bytes {
            self.0 = self.0.wrapping_add(1);
            *byte = self.0;
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Done {
    Created,
    Adopted,
    Populate(u32),
    Word(u32, u64),
    Writers(usize),
}

#[derive(Clone, Default)]
struct Numbers {
    done: Rc<RefCell<Vec<Done>>>,
    broken: Rc<Cell<bool>>,
}

fn shape(id: u8) -> ArenaShape {
    ArenaShape {
        id: [id; 16],
        bytes: 4 << 20,
        extent_bytes: 2 << 20,
        page_bytes: 4096,
        slots_per_extent: 512,
    }
}

impl ArenaPort for Numbers {
    type Offer = bool;
    type Span = ();

    fn create(&mut self, _: TenantId) -> Result<ArenaShape, PortError> {
        if self.broken.get() {
            return Err(PortError("no memory: buy some".to_owned()));
        }
        self.done.borrow_mut().push(Done::Created);
        Ok(shape(1))
    }

    fn adopt(&mut self, _: TenantId, good: bool) -> Result<AdoptedArena, PortError> {
        if !good {
            return Err(PortError("this is none".to_owned()));
        }
        self.done.borrow_mut().push(Done::Adopted);
        Ok(AdoptedArena {
            shape: shape(2),
            words: vec![],
            writers: vec![],
        })
    }

    fn set_generation(&mut self, _: TenantId, slot: u32, word: u64) {
        self.done.borrow_mut().push(Done::Word(slot, word));
    }

    fn set_writers(&mut self, _: TenantId, tokens: &[u64]) {
        self.done.borrow_mut().push(Done::Writers(tokens.len()));
    }

    fn populate(&mut self, _: TenantId, extent: u32) {
        self.done.borrow_mut().push(Done::Populate(extent));
    }

    fn span(&self, _: kvd_core::tier::HostRange) -> Option<()> {
        Some(())
    }

    fn page_probe(&self, _: TenantId) -> Option<Box<dyn FnOnce() -> Pages + Send>> {
        None
    }
}

struct World {
    node: Node<Time, Count, Numbers>,
    time: Time,
    port: Numbers,
    tenant: TenantId,
}

fn world(expect_offers: bool) -> World {
    let (time, port) = (Time::default(), Numbers::default());
    time.0.set(1_000_000);
    let settings = NodeSettings {
        core: Settings::default(),
        adopt_grace_us: 2_000_000,
    };
    let mut node = Node::new(settings, time.clone(), Count(0), port.clone());
    let limits = TenantLimits::default();
    let tenant = node.add_tenant(TenantSpec {
        name: "t".to_owned(),
        limits,
        expect_offers,
    });
    World {
        node,
        time,
        port,
        tenant,
    }
}

fn record() -> Vec<u8> {
    let fields = [
        ("tenant", "t"),
        ("model", "m"),
        ("weights", "w"),
        ("kv_dtype", "bfloat16"),
        ("cell_encoding", "x"),
        ("hash", "h:0"),
        ("block_tokens", "16"),
        ("groups", "1"),
        ("group.0.kind", "full"),
        ("group.0.layers", "1"),
        ("group.0.heads", "1"),
        ("group.0.cell_bytes", "256"),
    ];
    NamespaceRecord::build(fields).expect("legal").encode()
}

impl World {
    fn open(&mut self, number: u8) -> SessionId {
        self.node.open(&Opening {
            tenant: self.tenant,
            instance: InstanceId([number; 16]),
            role: Role::Both,
            rank: 0,
            world: 1,
            label: "",
            past: None,
        })
    }

    fn ask(&mut self, session: SessionId, body: Request<'_>) -> Reply {
        self.node.request(self.tenant, session, RequestId(5), body);
        match self.node.take_effect() {
            Some(Effect::Reply {
                session: whose,
                id: RequestId(5),
                reply,
            }) if whose == session => *reply,
            other => panic!("no answer: {other:?}"),
        }
    }

    fn register(&mut self, session: SessionId) -> Reply {
        let layout = GroupLayout {
            group: 0,
            layer_bounds: &[0, 1],
            head_bounds: &[0, 1],
            copies: true,
            part: 0,
        };
        self.ask(
            session,
            Request::Register {
                record: &record(),
                groups: &[layout],
            },
        )
    }

    fn done(&self) -> Vec<Done> {
        self.port.done.take()
    }

    fn populated(&mut self, arena: u8, extent: u32, failed: Option<&str>) {
        self.node
            .populated(self.tenant, [arena; 16], extent, failed);
    }
}

#[test]
fn memory_is_taken_when_somebody_needs_it_and_one_extent_at_a_time() {
    let mut w = world(false);
    assert_eq!(w.node.arena_state(w.tenant), ArenaState::Absent);
    assert!(!w.node.registrations_wait(w.tenant));
    let session = w.open(1);
    assert!(!w.done().contains(&Done::Created), "not for a Hello");
    assert!(matches!(w.register(session), Reply::Registered { .. }));
    let done = w.done();
    assert!(
        done.contains(&Done::Created)
            && done.contains(&Done::Populate(0))
            && !done.contains(&Done::Populate(1))
    );
    w.populated(1, 0, None);
    assert_eq!(w.done(), [Done::Populate(1)]);
    w.populated(1, 1, Some("no memory"));
    let made = ArenaState::Made {
        adopted: false,
        settled: 2,
        extents: 2,
    };
    assert_eq!(w.node.arena_state(w.tenant), made);
    let snapshot = w.node.snapshot(w.tenant).expect("a tenant");
    assert_eq!(
        (snapshot.view.extents.failed, snapshot.view.extents.pending),
        (1, 0)
    );
    assert!(
        !w.node.offer(w.tenant, true),
        "in use: an offer comes too late"
    );
}

#[test]
fn without_sessions_memory_is_taken_after_the_grace_period() {
    let mut w = world(false);
    assert_eq!(w.node.next_deadline(), Some(Now(3_000_000)));
    w.time.0.set(2_999_999);
    w.node.tick();
    assert_eq!(w.node.arena_state(w.tenant), ArenaState::Absent);
    w.time.0.set(3_000_000);
    w.node.tick();
    assert!(matches!(
        w.node.arena_state(w.tenant),
        ArenaState::Made { adopted: false, .. }
    ));
    assert!(
        w.node.offer(w.tenant, true),
        "nobody uses it yet, so an offer is still welcome"
    );
    assert!(matches!(
        w.node.arena_state(w.tenant),
        ArenaState::Made {
            adopted: true,
            settled: 0,
            ..
        }
    ));
    w.done();
    w.populated(1, 0, None);
    assert_eq!(
        w.done(),
        [Done::Populate(0)],
        "what came for the arena that was given up only makes way"
    );
    assert!(matches!(
        w.node.arena_state(w.tenant),
        ArenaState::Made { settled: 0, .. }
    ));
}

#[test]
fn after_a_former_daemon_registrations_wait_for_its_arena() {
    let mut w = world(true);
    assert_eq!(w.node.arena_state(w.tenant), ArenaState::Waiting);
    assert!(w.node.registrations_wait(w.tenant));
    assert!(
        !w.node.offer(w.tenant, false),
        "a bad one is not taken, and the wait goes on"
    );
    assert!(w.node.registrations_wait(w.tenant));
    assert!(w.node.offer(w.tenant, true));
    assert!(!w.node.registrations_wait(w.tenant));
    assert!(
        !w.node.offer(w.tenant, true),
        "the second one brings the same arena"
    );
    assert_eq!(w.done().iter().filter(|d| **d == Done::Adopted).count(), 1);

    let w = world(true);
    w.time.0.set(3_000_000);
    assert!(
        !w.node.registrations_wait(w.tenant),
        "nobody brought it in time"
    );
}

#[test]
fn where_there_is_no_memory_sessions_are_told_and_can_try_again() {
    let mut w = world(false);
    w.port.broken.set(true);
    let session = w.open(1);
    assert!(matches!(w.register(session), Reply::Failure(_)));
    assert_eq!(
        w.node.arena_state(w.tenant),
        ArenaState::Failed("no memory: buy some".to_owned())
    );
    w.port.broken.set(false);
    assert!(matches!(w.register(session), Reply::Registered { .. }));
}

#[test]
fn generations_are_written_before_the_answer_and_counted_for_the_tenant() {
    let mut w = world(false);
    let session = w.open(1);
    let Reply::Registered { namespace, .. } = w.register(session) else {
        panic!("registered")
    };
    w.populated(1, 0, None);
    w.done();
    let hash = [[9; 32]];
    let chain = kvd_core::Chain {
        group: 0,
        hashes: &hash,
        parent: None,
    };
    let Reply::Reserve(reserved) = w.ask(
        session,
        Request::Reserve {
            namespace,
            chains: &[chain],
        },
    ) else {
        panic!("reserved")
    };
    let word = reserved.generations[0];
    assert_eq!(w.done().last(), Some(&Done::Word(reserved.slots[0], word)));
    assert_eq!(word % 2, 1, "odd while it is written");
    let commit = Request::Commit {
        namespace,
        group: 0,
        slots: &reserved.slots,
        generations: &[word],
        crcs: &[1],
    };
    assert!(matches!(w.ask(session, commit), Reply::Commit(_)));
    assert_eq!(w.done(), [Done::Word(reserved.slots[0], word + 1)]);
    let other = w.node.add_tenant(TenantSpec {
        name: "other".to_owned(),
        limits: TenantLimits::default(),
        expect_offers: false,
    });
    let stored = |w: &World, tenant| {
        w.node
            .snapshot(tenant)
            .expect("a tenant")
            .counts
            .get("stored")
    };
    assert_eq!((stored(&w, w.tenant), stored(&w, other)), (1, 0));
    w.node.core().check();
}

#[test]
fn a_session_is_known_until_it_is_over() {
    let mut w = world(false);
    let (one, two) = (w.open(1), w.open(2));
    assert_ne!(one, two);
    assert!(w.node.knows(one) && w.node.knows(two));
    w.node.closed(w.tenant, one);
    w.node.gone(w.tenant, two);
    assert!(!w.node.knows(one) && !w.node.knows(two));
    assert_eq!(w.node.take_effect(), None);
}
