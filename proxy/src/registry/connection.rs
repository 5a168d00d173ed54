//! The life of a listener's connections: accepted up to a bound, with TLS or without, watched while they live, ended without a
//! reset.

use std::convert::Infallible;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use http::{HeaderMap, Request, StatusCode};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::upgrade::OnUpgrade;
use rustls::ServerConfig;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::yield_now;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::Instrument;

use super::auth::Underway;
use super::body::{Body, Payload};
use super::forward::with;
use super::places::{Place, Places};
use super::wire::{Channel, Line, Plain, Wire, hang_up};
use super::{Answer, head, tunnel};
use crate::metrics::{Metrics, RequestKind};
use crate::origin::Stream;

/// A request's head at most.
const HEAD_BYTES: usize = 64 << 10;
/// Headers of a request at most.
const MAX_HEADERS: usize = 100;
/// For a connection to begin, and for TLS to be agreed on.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Between two looks at whether a connection is overdue.
const WATCH: Duration = Duration::from_secs(1);
/// For a client to hang up after we have.
const LINGER: Duration = Duration::from_secs(2);
/// Bytes that a client may still send after we have hung up.
const LINGER_BYTES: usize = 1 << 20;
/// Pipelined requests in a row that are answered without a pause, and the pause before each later one. Runtimes do not pipeline.
const PIPELINED_AT_ONCE: u32 = 16;
const PIPELINE_PAUSE: Duration = Duration::from_millis(10);
/// After a failure to accept, before trying again.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// The type of a TLS record that begins a handshake (RFC 8446, 5.1). No method of HTTP begins with it.
const TLS_HANDSHAKE: u8 = 22;

const TOO_MANY: &[u8] =
    b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nRetry-After: 1\r\n\
    Content-Type: application/json\r\nContent-Length: 76\r\n\r\n\
    {\"errors\":[{\"code\":\"UNKNOWN\",\"message\":\"too many connections, come again\"}]}";

/// A reply that is awaited.
pub(crate) type Replying<'a> = Pin<Box<dyn Future<Output = Reply> + Send + 'a>>;

/// Answers the requests of a listener's connections.
pub(crate) trait Service: Send + Sync + 'static {
    /// Answers a request of any kind. The unread rest of its body is not waited for.
    fn answer(&self, request: Request<Incoming>, client: IpAddr) -> Replying<'_>;

    /// How to speak TLS with connections that begin with it; `None`: none may.
    fn tls(&self) -> Option<Arc<ServerConfig>> {
        None
    }
}

/// The answer to a request.
#[expect(
    clippy::large_enum_variant,
    reason = "there is one at a time, for a moment, and it is nearly always an answer"
)]
pub(crate) enum Reply {
    /// This.
    Answer(Answer),
    /// To CONNECT only: 200, and from then on the connection is something else.
    Connected(Becomes),
}

/// The state of a connection after CONNECT.
pub(crate) enum Becomes {
    /// Its bytes go there and back.
    Tunnel(Stream, OwnedSemaphorePermit),
    /// TLS ends here, and this answers the requests inside.
    Tls(Arc<ServerConfig>, Arc<dyn Service>),
}

/// When to end.
#[derive(Clone)]
pub(super) struct Stop {
    begun: CancellationToken,
    drain: Duration,
}

impl Stop {
    /// Waits until even what was under way must end.
    pub(super) async fn over(&self) {
        self.begun.cancelled().await;
        sleep(self.drain).await;
    }
}

pub(super) async fn serve(
    service: Arc<dyn Service>,
    metrics: Arc<Metrics>,
    places: Arc<Places>,
    listener: TcpListener,
    stop: CancellationToken,
    drain: Duration,
) {
    let stop = Stop { begun: stop, drain };
    let refusals = Arc::new(Semaphore::new(places.refusals()));
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
        if let Some(place) = places.take(client.ip()) {
            let (metrics, stop) = (Arc::clone(&metrics), stop.clone());
            let visit = Visit {
                socket: Arc::new(socket),
                client,
                metrics,
                stop,
            };
            tasks.spawn(visit.live(Arc::clone(&service), place));
        } else {
            metrics.connections_refused.inc();
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

/// One connection.
struct Visit {
    socket: Arc<TcpStream>,
    client: SocketAddr,
    metrics: Arc<Metrics>,
    stop: Stop,
}

/// How requests and responses on a connection ended.
enum Ended {
    /// With the connection; why.
    Over(&'static str),
    /// With CONNECT.
    Becomes(Becomes, Plain),
}

impl Visit {
    /// Serves the connection until it is over, however that comes.
    async fn live(self, service: Arc<dyn Service>, place: Place) {
        let _open = self.metrics.connection();
        // Only latency depends on it.
        let _ = self.socket.set_nodelay(true);
        let why = tokio::select! {
            why = self.go_on(service, &place.line) => why,
            () = place.leave.cancelled() => {
                self.metrics.connections_displaced.inc();
                tracing::debug!(client = %self.client, "connection over: its place was needed");
                return;
            }
        };
        tracing::debug!(client = %self.client, why, "connection over");
        end(&self.socket).await;
    }

    /// Goes on with whatever the connection becomes; why it is over.
    async fn go_on(&self, mut service: Arc<dyn Service>, line: &Arc<Line>) -> &'static str {
        // A silent connection costs no more than its socket.
        if !matches!(
            self.unless_stopped(self.socket.readable()).await,
            Some(Ok(()))
        ) {
            return "it said nothing";
        }
        let plain = Plain::new(Arc::clone(&self.socket));
        let mut channel = match service.tls() {
            Some(config) if self.begins_with_tls().await => match self.agree(plain, config).await {
                Ok(channel) => channel,
                Err(why) => return why,
            },
            _ => Channel::Plain(plain),
        };
        loop {
            let (becomes, plain) = match Box::pin(self.converse(service, channel, line)).await {
                Ended::Over(why) => return why,
                Ended::Becomes(becomes, plain) => (becomes, plain),
            };
            match becomes {
                Becomes::Tunnel(there, _place) => {
                    line.tunnel();
                    return tunnel::run(plain, there, &self.stop, &self.metrics).await;
                }
                Becomes::Tls(config, inside) => {
                    line.renew();
                    service = inside;
                    channel = match self.agree(plain, config).await {
                        Ok(channel) => channel,
                        Err(why) => return why,
                    };
                }
            }
        }
    }

    async fn begins_with_tls(&self) -> bool {
        let mut first = [0];
        let peeked = self.unless_stopped(self.socket.peek(&mut first)).await;
        matches!(peeked, Some(Ok(1))) && first == [TLS_HANDSHAKE]
    }

    /// Agrees on TLS with the client.
    async fn agree(
        &self,
        plain: Plain,
        config: Arc<ServerConfig>,
    ) -> Result<Channel, &'static str> {
        match self
            .unless_stopped(TlsAcceptor::from(config).accept(plain))
            .await
        {
            Some(Ok(tls)) => Ok(Channel::Tls(Box::new(tls))),
            Some(Err(error)) => {
                tracing::info!(client = %self.client, %error, "no TLS was agreed on");
                Err("no TLS was agreed on")
            }
            None => Err("TLS was not agreed on in time"),
        }
    }

    async fn unless_stopped<T>(&self, what: impl Future<Output = T>) -> Option<T> {
        tokio::select! {
            done = timeout(HANDSHAKE, what) => done.ok(),
            () = self.stop.begun.cancelled() => None,
        }
    }

    /// Requests and responses.
    async fn converse(
        &self,
        service: Arc<dyn Service>,
        channel: Channel,
        line: &Arc<Line>,
    ) -> Ended {
        let wire = Wire {
            channel,
            line: Arc::clone(line),
        };
        let talk = Arc::new(Talk {
            service,
            line: Arc::clone(line),
            metrics: Arc::clone(&self.metrics),
            client: self.client.ip(),
            becomes: Mutex::default(),
            pipelined: AtomicU32::new(0),
        });
        let respond = |request| Arc::clone(&talk).respond(request);
        let mut requests = Box::pin(
            http1::Builder::new()
                .max_buf_size(HEAD_BYTES)
                .max_headers(MAX_HEADERS)
                .header_read_timeout(None)
                .serve_connection(wire, service_fn(respond))
                .with_upgrades(),
        );
        let mut watch = interval(WATCH);
        watch.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut until = None;
        loop {
            tokio::select! {
                result = requests.as_mut() => return match result {
                    Ok(()) => talk.ended().await,
                    Err(_) => Ended::Over("it failed"),
                },
                _ = watch.tick() => {
                    let now = Instant::now();
                    if until.is_some_and(|until| now >= until) {
                        return Ended::Over("the daemon stops");
                    }
                    if let Some(why) = line.overdue(now) {
                        return Ended::Over(why);
                    }
                }
                () = self.stop.begun.cancelled(), if until.is_none() => {
                    until = Some(Instant::now() + self.stop.drain);
                    requests.as_mut().graceful_shutdown();
                }
            }
        }
    }
}

/// The state that the requests of one connection share.
struct Talk {
    service: Arc<dyn Service>,
    line: Arc<Line>,
    metrics: Arc<Metrics>,
    client: IpAddr,
    becomes: Mutex<Option<(OnUpgrade, Becomes)>>,
    /// Requests in a row that were here before the response to the one before was over.
    pipelined: AtomicU32,
}

impl Talk {
    async fn respond(
        self: Arc<Self>,
        mut request: Request<Incoming>,
    ) -> Result<http::Response<Body>, Infallible> {
        self.take_turns(self.line.begin()).await;
        let span = tracing::info_span!(
            "pull",
            id = format_args!("{:08x}", rand::random::<u32>()),
            method = %request.method(),
            path = request.uri().path(),
            client = %self.client,
        );
        async {
            let upgrade = hyper::upgrade::on(&mut request);
            let mut answer = match head::check(&request) {
                Err(problem) => problem.counted(RequestKind::Other, &self.metrics),
                Ok(()) => match self.service.answer(request, self.client).await {
                    Reply::Answer(answer) => answer,
                    Reply::Connected(becomes) => {
                        *self.becomes.lock().unwrap_or_else(PoisonError::into_inner) =
                            Some((upgrade, becomes));
                        with(StatusCode::OK, HeaderMap::new(), Payload::Empty)
                    }
                },
            };
            let underway = Underway::take(&mut answer);
            let (line, metrics) = (Arc::clone(&self.line), Arc::clone(&self.metrics));
            Ok(answer.map(|payload| Body::new(payload, line, metrics, underway)))
        }
        .instrument(span)
        .await
    }

    /// A buffer holds thousands of short requests. Answered one right after the other, those of a few connections would keep all
    /// others waiting.
    async fn take_turns(&self, is_pipelined: bool) {
        if !is_pipelined {
            self.pipelined.store(0, Ordering::Relaxed);
            return;
        }
        match self.pipelined.fetch_add(1, Ordering::Relaxed) {
            ..PIPELINED_AT_ONCE => yield_now().await,
            _ => sleep(PIPELINE_PAUSE).await,
        }
    }

    /// The next state of the connection, if it ended for that.
    async fn ended(&self) -> Ended {
        let taken = self
            .becomes
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        let Some((upgrade, becomes)) = taken else {
            return Ended::Over("it ended");
        };
        // It is there: the connection ended for it.
        let Some(parts) = upgrade
            .await
            .ok()
            .and_then(|upgraded| upgraded.downcast::<Wire>().ok())
        else {
            return Ended::Over("it ended");
        };
        match parts.io.channel {
            Channel::Plain(plain) => Ended::Becomes(
                becomes,
                Plain {
                    early: parts.read_buf,
                    ..plain
                },
            ),
            Channel::Tls(_) => Ended::Over("it asked for a tunnel inside a tunnel"),
        }
    }
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
