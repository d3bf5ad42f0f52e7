//! `/healthz`, `/readyz`, `/metrics` and `/status`, on a current-thread runtime in the thread `kvd-http`.
//!
//! What is shown belongs to the node's thread: each request asks it through the doorbell and waits at most [`PATIENCE`], so
//! that a hung node shows as unhealthy. Connections are bounded in number and in time. TLS, authentication and anything
//! that changes state are deliberately absent: it listens on the loopback interface unless it is told otherwise.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::thread::JoinHandle;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tokio::time::{Instant, Sleep, sleep_until, timeout};

use crate::doorbell::Doorbell;
use crate::message::Message;
use crate::metrics::{self, Snapshot};

/// How long the node's thread may take to answer.
const PATIENCE: Duration = Duration::from_secs(2);
/// Most connections at a time; more wait in the backlog.
const CONNECTIONS: usize = 64;
/// How long one connection may live.
const CONNECTION_LIFE: Duration = Duration::from_secs(300);

/// The HTTP thread. Stops when this is dropped.
#[derive(Debug)]
pub(crate) struct Http {
    address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Clone)]
struct Node {
    bell: Doorbell<Message>,
    ready: Arc<AtomicBool>,
}

impl Http {
    /// Listens and answers, until dropped. `ready` is what `/readyz` says.
    pub(crate) fn start(
        at: SocketAddr,
        bell: Doorbell<Message>,
        ready: Arc<AtomicBool>,
    ) -> io::Result<Self> {
        let listener = std::net::TcpListener::bind(at)?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let (stop, stopped) = oneshot::channel();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .enable_time()
            .build()?;
        let thread = std::thread::Builder::new()
            .name("kvd-http".to_owned())
            .stack_size(1 << 20)
            .spawn(move || {
                let served = runtime.block_on(serve(listener, Node { bell, ready }, stopped));
                if let Err(error) = served {
                    tracing::error!(%error, "http has ended");
                }
                // Connections that are still open are not waited for.
                runtime.shutdown_background();
            })?;
        Ok(Self {
            address,
            stop: Some(stop),
            thread: Some(thread),
        })
    }

    /// Where it listens; the port is a real one even when 0 was asked for.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Http {
    fn drop(&mut self) {
        self.stop.take();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

async fn serve(
    listener: std::net::TcpListener,
    node: Node,
    stopped: oneshot::Receiver<()>,
) -> io::Result<()> {
    let listener = Bounded {
        listener: TcpListener::from_std(listener)?,
        room: Arc::new(Semaphore::new(CONNECTIONS)),
    };
    let app = Router::new()
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics_page))
        .route("/status", get(status))
        .with_state(node);
    tokio::select! {
        served = axum::serve(listener, app).into_future() => served,
        _ = stopped => Ok(()),
    }
}

/// Asks the node's thread for something, or says 503.
async fn ask<T>(
    node: &Node,
    question: impl FnOnce(oneshot::Sender<T>) -> Message,
) -> Result<T, Response> {
    let unavailable = |text: &'static str| (StatusCode::SERVICE_UNAVAILABLE, text).into_response();
    let (answer, answered) = oneshot::channel();
    if node.bell.try_ring(question(answer)).is_err() {
        return Err(unavailable("the node's queue is full\n"));
    }
    match timeout(PATIENCE, answered).await {
        Ok(Ok(answer)) => Ok(answer),
        _ => Err(unavailable("the node does not answer\n")),
    }
}

async fn healthz(State(node): State<Node>) -> Response {
    match ask(&node, Message::Alive).await {
        Ok(()) => "ok\n".into_response(),
        Err(refusal) => refusal,
    }
}

async fn readyz(State(node): State<Node>) -> Response {
    if node.ready.load(Ordering::Acquire) {
        "ready\n".into_response()
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "not ready\n").into_response()
    }
}

async fn metrics_page(State(node): State<Node>) -> Response {
    let snapshot: Box<Snapshot> = match ask(&node, Message::Metrics).await {
        Ok(snapshot) => snapshot,
        Err(refusal) => return refusal,
    };
    match metrics::encode(*snapshot) {
        Ok(text) => ([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], text).into_response(),
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}

async fn status(State(node): State<Node>) -> Response {
    match ask(&node, Message::Status).await {
        Ok(json) => ([(header::CONTENT_TYPE, "application/json")], json).into_response(),
        Err(refusal) => refusal,
    }
}

/// A listener with room for so many connections.
struct Bounded {
    listener: TcpListener,
    room: Arc<Semaphore>,
}

impl axum::serve::Listener for Bounded {
    type Io = Connection;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Connection, SocketAddr) {
        let permit = Arc::clone(&self.room)
            .acquire_owned()
            .await
            .expect("the semaphore is never closed");
        let (stream, address) = axum::serve::Listener::accept(&mut self.listener).await;
        let end = Box::pin(sleep_until(Instant::now() + CONNECTION_LIFE));
        (
            Connection {
                stream,
                end,
                _room: permit,
            },
            address,
        )
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

/// A connection that holds its place and has an end.
struct Connection {
    stream: TcpStream,
    end: Pin<Box<Sleep>>,
    _room: OwnedSemaphorePermit,
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.end.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        if self.end.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
