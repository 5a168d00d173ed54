//! TCP and TLS in front of gRPC: who calls is known, bounded in number, and a stranger does not stay.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use hawker_api::identity::{Identity, member_of};
use hawker_api::join::ALPN;
use hawker_core::message::Role;
use hawker_core::piece::PeerId;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::{Sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::server::Connected;
use tracing::{debug, warn};

/// Connections of members at most.
const MAX_MEMBERS: usize = 65_536;
/// Connections at most of those who have no certificate (yet), handshakes included.
const MAX_STRANGERS: usize = 512;
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Somebody without certificate has this long to join.
const STRANGER_STAYS: Duration = Duration::from_secs(30);
/// After accepting failed, most likely for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Who is at the other end of a connection.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Caller {
    /// As the certificate says; `None` for a stranger.
    pub(crate) member: Option<(PeerId, Role)>,
}

/// Accepts on `listener` until `shutdown`; connections ready for gRPC go to `ready`.
pub(crate) async fn accept(
    listener: TcpListener,
    identity: Identity,
    ready: mpsc::Sender<io::Result<Connection>>,
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
                // Beyond the limit the connection is closed at once: whoever it is tries again later.
                let Ok(permit) = Arc::clone(&limits.strangers).try_acquire_owned() else { continue };
                let (acceptor, ready, limits) = (acceptor.clone(), ready.clone(), limits.clone());
                tokio::spawn(async move {
                    match timeout(HANDSHAKE_TIMEOUT, handshake(acceptor, stream, permit, &limits)).await {
                        Ok(Ok(connection)) => drop(ready.send(Ok(connection)).await),
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

/// How many may be connected.
#[derive(Clone)]
pub(crate) struct Limits {
    members: Arc<Semaphore>,
    strangers: Arc<Semaphore>,
}

impl Limits {
    pub(crate) fn new() -> Self {
        Self {
            members: Arc::new(Semaphore::new(MAX_MEMBERS)),
            strangers: Arc::new(Semaphore::new(MAX_STRANGERS)),
        }
    }
}

async fn handshake(
    acceptor: TlsAcceptor,
    stream: TcpStream,
    stranger: OwnedSemaphorePermit,
    limits: &Limits,
) -> io::Result<Connection> {
    stream.set_nodelay(true)?;
    let stream = acceptor.accept(stream).await?;
    let certificate = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
    let member = certificate.map(member_of).transpose().map_err(io::Error::other)?;
    let (permit, end) = match member {
        Some(_) => {
            let permit = Arc::clone(&limits.members).try_acquire_owned();
            (permit.map_err(|_| io::Error::other("too many members are connected"))?, None)
        }
        None => (stranger, Some(Box::pin(tokio::time::sleep(STRANGER_STAYS)))),
    };
    Ok(Connection { stream, caller: Caller { member }, end, _permit: permit })
}

/// A TLS connection with a known end.
pub(crate) struct Connection {
    stream: TlsStream<TcpStream>,
    caller: Caller,
    /// When a stranger's connection breaks off.
    end: Option<Pin<Box<Sleep>>>,
    _permit: OwnedSemaphorePermit,
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
        if self.end.as_mut().is_some_and(|end| end.as_mut().poll(cx).is_ready()) {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
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
    listeners.iter().filter_map(|listener| listener.local_addr().ok()).collect()
}
