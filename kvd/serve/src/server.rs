//! A daemon from its configuration: what is made in which order, and what thread runs it.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use kvd_node::{HostArenas, Node, SystemClock, SystemEntropy, TenantSpec};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::config::ServeConfig;
use crate::doorbell::doorbell;
use crate::given::Given;
use crate::http::Http;
use crate::listen::{ListenError, Listener};
use crate::message::Message;
use crate::reactor::{Parts, Reactor};
use crate::report::Reporter;
use crate::stores::{self, StoreOpener, StoreSet};

/// Most messages of other threads that wait for the node's.
const DOORBELL: usize = 64;
/// Why there is no daemon.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// A socket can't be had.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// HTTP can't listen.
    #[error("cannot listen on {address} for http: {source}; choose another --http, or off")]
    Http {
        /// Where.
        address: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
    /// The system refused something else.
    #[error("cannot {what}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// A store can't be used.
    #[error("{0}")]
    Store(String),
    /// The node's thread ended by a bug.
    #[error("the node has failed; see the log")]
    Failed,
}

/// A daemon that listens and does not answer yet.
pub struct Server {
    reactor: Reactor,
    http: Option<Http>,
}

impl Server {
    /// Makes everything and listens. To be called before other threads are started: it blocks the signals that stop the
    /// daemon (SIGTERM and SIGINT), and takes them itself.
    ///
    /// # Errors
    /// When a socket, a port or a thread can't be had.
    pub fn bind(
        config: ServeConfig,
        openers: Vec<Box<dyn StoreOpener>>,
    ) -> Result<Self, ServeError> {
        let system = |what| move |source: io::Error| ServeError::System { what, source };
        raise_descriptor_limit();
        let signals = stop_signals().map_err(|e| system("take signals")(e.into()))?;
        let (bell, door) = doorbell::<Message>(DOORBELL).map_err(system("make an eventfd"))?;
        let mut listeners = Vec::new();
        for tenant in &config.tenants {
            listeners.push(Listener::bind(
                &tenant.socket,
                config.directory_mode,
                config.socket_mode,
            )?);
        }
        let populated = bell.clone();
        let specs = config.tenants.iter().map(|t| t.host).collect();
        let arenas = HostArenas::new(specs, move |done| {
            // Nobody listens any more when the daemon stops.
            let _ = populated.ring(Message::Populated(done));
        })
        .map_err(system("start a thread"))?;
        let mut node = Node::with_stores(
            config.node.clone(),
            SystemClock::new(),
            SystemEntropy,
            arenas,
            StoreSet::default(),
        );
        let mut given = Vec::new();
        for tenant in &config.tenants {
            let former = Given::read(&tenant.socket);
            given.push(former);
            node.add_tenant(TenantSpec {
                name: tenant.name.clone(),
                limits: tenant.limits,
                expect_offers: former.is_some(),
            });
        }
        for opener in openers {
            let optional = opener.optional();
            match stores::open(&mut node, opener, bell.clone()) {
                Err(error) if optional => {
                    tracing::warn!("no blocks are kept below host memory: {error}");
                }
                opened => opened.map_err(ServeError::Store)?,
            }
        }
        let reporter = Reporter::start(bell.clone()).map_err(system("start a thread"))?;
        let ready = Arc::new(AtomicBool::new(false));
        let http = match config.http {
            Some(address) => Some(
                Http::start(address, bell, Arc::clone(&ready))
                    .map_err(|source| ServeError::Http { address, source })?,
            ),
            None => None,
        };
        // The sockets are listened on; memory is taken when it is needed.
        ready.store(true, Ordering::Release);
        let reactor = Reactor::new(Parts {
            config,
            node,
            reporter,
            door,
            ready,
            signals,
            listeners,
            given,
        })
        .map_err(system("watch the sockets"))?;
        Ok(Self { reactor, http })
    }

    /// Where HTTP listens.
    pub fn http_address(&self) -> Option<SocketAddr> {
        self.http.as_ref().map(Http::address)
    }

    /// Where the tenants' sockets are, in their order.
    pub fn sockets(&self) -> &[PathBuf] {
        &self.reactor.sockets
    }

    /// Serves in the thread `kvd-node` until a signal says to stop, then drains. Blocks.
    ///
    /// # Errors
    /// When the thread fails.
    pub fn run(self) -> Result<(), ServeError> {
        let Self { mut reactor, http } = self;
        let thread = std::thread::Builder::new()
            .name("kvd-node".to_owned())
            .spawn(move || reactor.run())
            .map_err(|source| ServeError::System {
                what: "start a thread",
                source,
            })?;
        let ended = thread.join();
        drop(http);
        match ended {
            Ok(Ok(())) => Ok(()),
            Ok(Err(source)) => Err(ServeError::System {
                what: "wait for events",
                source,
            }),
            Err(_) => Err(ServeError::Failed),
        }
    }
}

fn stop_signals() -> nix::Result<SignalFd> {
    let mut set = SigSet::empty();
    set.add(Signal::SIGTERM);
    set.add(Signal::SIGINT);
    set.thread_block()?;
    SignalFd::with_flags(&set, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)
}

/// A session takes up to two descriptors; the usual soft limit is 1024.
fn raise_descriptor_limit() {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    if setrlimit(Resource::Nofile, raised).is_err() {
        tracing::debug!("the limit on file descriptors stays as it is");
    }
}
