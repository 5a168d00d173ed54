//! TCP and TLS in front of gRPC.
//!
//! A connection passes three stages. During the handshake it takes a place behind `handshakes`. A client without a certificate
//! (a *stranger*, which may only join) then takes a place behind `strangers` and is served with small buffers for a short time.
//! A member has a place of its own: strangers never use it up.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::task::{Context, Poll};
use std::time::Duration;

use hawker_core::message::Role;
use hawker_core::piece::PeerId;
use hawker_identity::join::ALPN;
use hawker_identity::member::{Identity, member_of, validity_s};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::server::Connected;
use tracing::{debug, warn};

use crate::door::{Door, Guest, MemberConnection, MemberConnections};

/// Connections of members at most.
const MAX_MEMBERS: usize = 65_536;
/// Connections in the middle of their handshake, in all and from one address. A handshake takes one round trip.
const MAX_HANDSHAKES: usize = 256;
const MAX_HANDSHAKES_PER_CLIENT: usize = 64;
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(3);
/// Connections of strangers after their handshake, in all and from one address. Each can hold about 100 KiB.
const MAX_STRANGERS: usize = 128;
const MAX_STRANGERS_PER_CLIENT: usize = 32;
/// A stranger has this long to join.
pub(crate) const STRANGER_STAYS: Duration = Duration::from_secs(10);
/// A member that was removed is told so within this time.
const REMOVED_STAYS: Duration = Duration::from_secs(2);
/// After accepting failed, most likely for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The other end of a connection.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Caller {
    /// The member and its role by its certificate; `None` for a stranger.
    pub(crate) member: Option<(PeerId, Role)>,
    /// The member was removed from the cluster: it is told so, and gets nothing else.
    pub(crate) is_removed: bool,
    /// When the certificate ends, in seconds since 1970; 0 for a stranger.
    pub(crate) certificate_until_s: u64,
    /// The client's address.
    pub(crate) from: SocketAddr,
    /// Our address, as the client dialled it.
    pub(crate) local: SocketAddr,
}

/// The queues for connections that are ready for gRPC.
#[derive(Clone)]
pub(crate) struct Ready {
    pub(crate) members: mpsc::Sender<io::Result<Connection>>,
    pub(crate) strangers: mpsc::Sender<io::Result<Connection>>,
}

/// Accepts on `listener` until `shutdown`.
pub(crate) async fn accept(
    listener: TcpListener,
    identity: Identity,
    ready: Ready,
    limits: Limits,
    shutdown: CancellationToken,
) {
    let acceptor = TlsAcceptor::from(identity.server_config(ALPN, true));
    loop {
        let accepted = tokio::select! {
            () = shutdown.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, address)) => {
                let guest = limits.handshakes.enter(address.ip());
                let (acceptor, ready, limits) = (acceptor.clone(), ready.clone(), limits.clone());
                let identity = identity.clone();
                tokio::spawn(async move {
                    let shown_out = guest.shown_out();
                    let handshake = handshake(acceptor, stream, address, &identity, &limits);
                    let connection = tokio::select! {
                        connection = timeout(HANDSHAKE_TIMEOUT, handshake) => connection,
                        () = shown_out.cancelled() => return,
                    };
                    drop(guest);
                    match connection {
                        Ok(Ok(connection)) => {
                            let queue = match connection.caller.member {
                                Some(_) => &ready.members,
                                None => &ready.strangers,
                            };
                            drop(queue.send(Ok(connection)).await);
                        }
                        Ok(Err(error)) => debug!(%address, %error, "no TLS connection"),
                        Err(_) => debug!(%address, "no TLS handshake in time"),
                    }
                });
            }
            Err(error) => {
                warn!(%error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Bounds of the connections of all listeners.
#[derive(Clone)]
pub(crate) struct Limits {
    handshakes: Door,
    strangers: Door,
    members: Arc<Semaphore>,
    numbers: Arc<AtomicU64>,
    /// Each member's live connections.
    pub(crate) connections: MemberConnections,
}

impl Limits {
    pub(crate) fn new() -> Self {
        Self {
            handshakes: Door::new(MAX_HANDSHAKES, MAX_HANDSHAKES_PER_CLIENT),
            strangers: Door::new(MAX_STRANGERS, MAX_STRANGERS_PER_CLIENT),
            members: Arc::new(Semaphore::new(MAX_MEMBERS)),
            numbers: Arc::default(),
            connections: MemberConnections::default(),
        }
    }
}

async fn handshake(
    acceptor: TlsAcceptor,
    stream: TcpStream,
    from: SocketAddr,
    identity: &Identity,
    limits: &Limits,
) -> io::Result<Connection> {
    stream.set_nodelay(true)?;
    let local = stream.local_addr()?;
    let stream = acceptor.accept(stream).await?;
    let certificate = stream
        .get_ref()
        .1
        .peer_certificates()
        .and_then(|chain| chain.first());
    let as_guest = |stays: Duration| {
        let guest = limits.strangers.enter(from.ip());
        let shown_out = guest.shown_out();
        let end: End = Box::pin(async move {
            let _ = timeout(stays, shown_out.cancelled_owned()).await;
        });
        (end, Place::Stranger(guest))
    };
    let Some(certificate) = certificate else {
        let caller = Caller {
            member: None,
            is_removed: false,
            certificate_until_s: 0,
            from,
            local,
        };
        let (end, place) = as_guest(STRANGER_STAYS);
        return Ok(Connection {
            stream,
            caller,
            end,
            _place: place,
        });
    };
    let (peer, role) = member_of(certificate).map_err(io::Error::other)?;
    let (_, certificate_until_s) = validity_s(certificate).map_err(io::Error::other)?;
    let permit = Arc::clone(&limits.members)
        .try_acquire_owned()
        .map_err(|_| io::Error::other("too many members are connected"))?;
    let number = limits.numbers.fetch_add(1, Relaxed);
    let entered = limits
        .connections
        .enter(peer, number, || !identity.removed().contains(peer));
    let is_removed = entered.is_none();
    let caller = Caller {
        member: Some((peer, role)),
        is_removed,
        certificate_until_s,
        from,
        local,
    };
    let (end, place) = match entered {
        Some(connection) => {
            let end: End = Box::pin(connection.closed().cancelled_owned());
            (end, Place::Member(connection, permit))
        }
        None => as_guest(REMOVED_STAYS),
    };
    Ok(Connection {
        stream,
        caller,
        end,
        _place: place,
    })
}

type End = Pin<Box<dyn Future<Output = ()> + Send>>;

/// The place that a connection occupies as long as it lives.
enum Place {
    Stranger(#[expect(dead_code, reason = "held for its drop")] Guest),
    Member(
        #[expect(dead_code, reason = "held for its drop")] MemberConnection,
        #[expect(dead_code, reason = "held for its drop")] OwnedSemaphorePermit,
    ),
}

/// A TLS connection with a known client.
pub(crate) struct Connection {
    stream: TlsStream<TcpStream>,
    caller: Caller,
    /// Ready when the connection is to break off.
    end: End,
    _place: Place,
}

impl Connected for Connection {
    type ConnectInfo = Caller;

    fn connect_info(&self) -> Caller {
        self.caller
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.end.as_mut().poll(cx).is_ready() {
            // The future is over and must not be polled again; a second read fails as the first did.
            self.end = Box::pin(std::future::ready(()));
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
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// The addresses of bound listeners, for people and for members that are told no other.
pub(crate) fn addresses(listeners: &[TcpListener]) -> Vec<SocketAddr> {
    listeners
        .iter()
        .filter_map(|listener| listener.local_addr().ok())
        .collect()
}
