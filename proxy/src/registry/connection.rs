//! The life of the mirror's connections: accepted up to a bound, watched while they live, ended without a reset.

use std::convert::Infallible;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use http::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::Instrument;

use super::Inner;
use super::auth::Underway;
use super::body::Body;
use super::route::answer;
use super::token;
use super::wire::{Line, Wire, hang_up};

/// Connections served at once.
const MAX_CONNECTIONS: usize = 4096;
/// Connections told at once that there are too many.
const MAX_REFUSALS: usize = 256;
/// A request's head at most.
const HEAD_BYTES: usize = 64 << 10;
/// Headers of a request at most.
const MAX_HEADERS: usize = 100;
/// Between two looks at whether a connection is overdue.
const WATCH: Duration = Duration::from_secs(1);
/// For a client to hang up after we have.
const LINGER: Duration = Duration::from_secs(2);
/// What a client may still send after we have hung up, in bytes.
const LINGER_BYTES: usize = 1 << 20;
/// After a failure to accept, before trying again.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

const TOO_MANY: &[u8] = b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nRetry-After: 1\r\n\
    Content-Type: application/json\r\nContent-Length: 76\r\n\r\n\
    {\"errors\":[{\"code\":\"UNKNOWN\",\"message\":\"too many connections, come again\"}]}";

/// When to end.
#[derive(Clone)]
struct Stop {
    begun: CancellationToken,
    drain: Duration,
}

pub(super) async fn serve(
    mirror: &Arc<Inner>,
    listener: TcpListener,
    stop: CancellationToken,
    drain: Duration,
) {
    let stop = Stop { begun: stop, drain };
    let (places, refusals) =
        (Arc::new(Semaphore::new(MAX_CONNECTIONS)), Arc::new(Semaphore::new(MAX_REFUSALS)));
    let tasks = TaskTracker::new();
    loop {
        let (socket, client) = tokio::select! {
            () = stop.begun.cancelled() => break,
            accepted = listener.accept() => match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "a connection can't be accepted");
                    sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            },
        };
        if let Ok(place) = Arc::clone(&places).try_acquire_owned() {
            tasks.spawn(live(Arc::clone(mirror), socket, client, stop.clone(), place));
        } else {
            mirror.metrics.connections_refused.inc();
            // Beyond that, closing without a word is all there is left to do.
            if let Ok(place) = Arc::clone(&refusals).try_acquire_owned() {
                tasks.spawn(refuse(socket, place));
            }
        }
    }
    drop(listener);
    tasks.close();
    tasks.wait().await;
}

/// Serves one connection until it is over, however that comes.
async fn live(
    mirror: Arc<Inner>,
    socket: TcpStream,
    client: SocketAddr,
    stop: Stop,
    _place: OwnedSemaphorePermit,
) {
    let _open = mirror.metrics.connection();
    // Only latency depends on it.
    let _ = socket.set_nodelay(true);
    let socket = Arc::new(socket);
    let why = converse(&mirror, &socket, client.ip(), &stop).await;
    tracing::debug!(%client, why, "connection over");
    end(&socket).await;
}

/// Requests and responses; why they are over.
async fn converse(mirror: &Arc<Inner>, socket: &Arc<TcpStream>, client: IpAddr, stop: &Stop) -> &'static str {
    let line = Arc::new(Line::new());
    let wire = Wire { socket: Arc::clone(socket), line: Arc::clone(&line) };
    let service = service_fn(|request| respond(Arc::clone(mirror), Arc::clone(&line), request, client));
    let mut requests = Box::pin(
        http1::Builder::new()
            .max_buf_size(HEAD_BYTES)
            .max_headers(MAX_HEADERS)
            .header_read_timeout(None)
            .serve_connection(wire, service),
    );
    let mut watch = interval(WATCH);
    watch.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut until = None;
    loop {
        tokio::select! {
            result = requests.as_mut() => {
                return if result.is_ok() { "it ended" } else { "it failed" };
            }
            _ = watch.tick() => {
                let now = Instant::now();
                if until.is_some_and(|until| now >= until) {
                    return "the daemon stops";
                }
                if let Some(why) = line.overdue(now) {
                    return why;
                }
            }
            () = stop.begun.cancelled(), if until.is_none() => {
                until = Some(Instant::now() + stop.drain);
                requests.as_mut().graceful_shutdown();
            }
        }
    }
}

async fn respond(
    mirror: Arc<Inner>,
    line: Arc<Line>,
    request: Request<Incoming>,
    client: IpAddr,
) -> Result<http::Response<Body>, Infallible> {
    line.begin();
    let (request, body) = request.into_parts();
    let span = tracing::info_span!(
        "pull",
        id = format_args!("{:08x}", rand::random::<u32>()),
        method = %request.method,
        path = request.uri.path(),
        %client,
    );
    async {
        let answer = match token::is_for_token(&request) {
            true => Box::pin(token::answer(&mirror, request, body)).await,
            false => Box::pin(answer(&mirror, request, client)).await,
        };
        let underway = Underway::of(&mirror, &answer);
        let metrics = Arc::clone(&mirror.metrics);
        Ok(answer.map(|payload| Body::new(payload, line, metrics, underway)))
    }
    .instrument(span)
    .await
}

/// Ends a connection so that what was sent arrives: FIN, and no reset while the client still talks.
async fn end(socket: &TcpStream) {
    if hang_up(socket).is_err() {
        return;
    }
    let listen = async {
        let (mut bytes, mut heard) = ([0; 8 << 10], 0);
        while heard < LINGER_BYTES && socket.readable().await.is_ok() {
            match socket.try_read(&mut bytes) {
                Ok(0) => return,
                Ok(n) => heard += n,
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(_) => return,
            }
        }
    };
    // A client that does not hang up in time is left to the kernel.
    let _ = timeout(LINGER, listen).await;
}

async fn refuse(socket: TcpStream, _place: OwnedSemaphorePermit) {
    // It fits into the socket's buffer, or the client gets nothing.
    let _ = socket.writable().await;
    let _ = socket.try_write(TOO_MANY);
    end(&socket).await;
}
