//! Connections to upstream registries: resolve once, keep the addresses that may be reached, connect to these and no others.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use http::Uri;
use hyper::rt::{Read, ReadBufCursor, Write};
use hyper_util::client::legacy::connect::proxy::Tunnel;
use hyper_util::client::legacy::connect::{Connected, Connection};
use hyper_util::client::proxy::matcher::{Intercept, Matcher};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tower::Service;

use super::policy::Reach;
use crate::settings::LiveSettings;

/// For one address to take a connection.
const CONNECT: Duration = Duration::from_secs(5);
/// For a name to resolve.
const RESOLVE: Duration = Duration::from_secs(5);
/// Before the next address is tried beside the last one (RFC 8305, section 5).
const STAGGER: Duration = Duration::from_millis(250);
/// Addresses of one name that are tried.
const MAX_ADDRESSES: usize = 8;

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub(super) enum ConnectError {
    /// Every address of the host is one that may not be reached.
    #[error(
        "{0} has only loopback, private or link-local addresses: list the registry, or its network, in the configuration"
    )]
    Forbidden(String),
    /// It does not resolve, or nothing answers.
    #[error("{0}")]
    Failed(String),
}

/// Makes plain connections, directly or through the proxy that the environment names.
#[derive(Clone)]
pub(super) struct Dialer {
    pub(super) settings: Arc<LiveSettings>,
    pub(super) reach: Reach,
    pub(super) proxies: Arc<Proxies>,
}

/// The upstream's own proxy, from `HTTP_PROXY`, `HTTPS_PROXY`, `ALL_PROXY` and `NO_PROXY`.
pub(super) struct Proxies {
    matcher: Matcher,
    /// Where this daemon's mirror and forward proxy listen: a proxy setting that points there is for the runtime, not for us.
    own: Vec<SocketAddr>,
}

impl Proxies {
    pub(super) fn new(matcher: Matcher, own: Vec<SocketAddr>) -> Self {
        Self { matcher, own }
    }

    /// The proxy to use for `uri`, if any.
    pub(super) fn to(&self, uri: &Uri) -> Option<Intercept> {
        self.matcher.intercept(uri).filter(|proxy| !self.is_own(proxy.uri()))
    }

    /// Whether a connection has come back to this daemon: from one of its own addresses to a listener of its own.
    pub(super) fn leads_back(&self, stream: &TcpStream) -> bool {
        let (Ok(here), Ok(there)) = (stream.local_addr(), stream.peer_addr()) else { return true };
        let local = there.ip() == here.ip() || there.ip().to_canonical().is_loopback();
        local && self.own.iter().any(|listener| listener.port() == there.port())
    }

    fn is_own(&self, proxy: &Uri) -> bool {
        let Some(host) = proxy.host().map(bare) else { return false };
        let port = proxy.port_u16().unwrap_or(80);
        self.own.iter().any(|listener| {
            listener.port() == port
                && match host.parse::<IpAddr>() {
                    Ok(ip) => ip == listener.ip() || (ip.is_loopback() && listener.ip().is_unspecified()),
                    Err(_) => host.eq_ignore_ascii_case("localhost"),
                }
        })
    }
}

impl Service<Uri> for Dialer {
    type Response = Link;
    type Error = ConnectError;
    type Future = Pin<Box<dyn Future<Output = Result<Link, ConnectError>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), ConnectError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let dialer = self.clone();
        Box::pin(async move { dialer.dial(uri).await })
    }
}

impl Dialer {
    /// A connection for someone else's bytes.
    pub(super) async fn tunnel(&self, uri: Uri) -> Result<TcpStream, ConnectError> {
        let host = host_port(&uri)?.0;
        let stream = self.dial(uri).await?.io.into_inner();
        if self.proxies.leads_back(&stream) {
            return Err(ConnectError::Forbidden(host));
        }
        Ok(stream)
    }

    async fn dial(&self, uri: Uri) -> Result<Link, ConnectError> {
        let (host, port) = host_port(&uri)?;
        let Some(proxy) = self.proxies.to(&uri) else {
            let addresses = self.allowed(&host, port, resolve(&host, port).await?)?;
            return Ok(Link::direct(race(addresses).await.map_err(|why| failed(&host, why))?));
        };
        // The proxy resolves the name; what resolves here is checked here all the same.
        if let Ok(addresses) = resolve(&host, port).await {
            self.allowed(&host, port, addresses)?;
        }
        if uri.scheme_str() == Some("http") {
            return Ok(Link { proxied: true, ..dial_proxy(proxy.uri().clone()).await? });
        }
        let mut tunnel = Tunnel::new(proxy.uri().clone(), tower::service_fn(dial_proxy));
        if let Some(auth) = proxy.basic_auth() {
            tunnel = tunnel.with_auth(auth.clone());
        }
        tunnel.call(uri).await.map_err(|why| failed(&host, format!("through the proxy: {why}")))
    }

    /// Those of `addresses` that may be reached.
    fn allowed(
        &self,
        host: &str,
        port: u16,
        mut addresses: Vec<SocketAddr>,
    ) -> Result<Vec<SocketAddr>, ConnectError> {
        addresses.retain(|a| self.reach.allows(&self.settings.registries, host, port, a.ip()));
        if addresses.is_empty() { Err(ConnectError::Forbidden(host.to_owned())) } else { Ok(addresses) }
    }
}

fn failed(host: &str, why: impl std::fmt::Display) -> ConnectError {
    ConnectError::Failed(format!("{host}: {why}"))
}

async fn dial_proxy(proxy: Uri) -> Result<Link, ConnectError> {
    let (host, port) = host_port(&proxy)?;
    if proxy.scheme_str() != Some("http") {
        return Err(failed(
            &host,
            "only http:// proxies are supported; set HTTPS_PROXY and HTTP_PROXY to one",
        ));
    }
    let addresses = resolve(&host, port).await?;
    race(addresses).await.map(Link::direct).map_err(|why| failed(&host, format!("the proxy: {why}")))
}

/// A host without the brackets of an IPv6 literal.
fn bare(host: &str) -> &str {
    host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host)
}

fn host_port(uri: &Uri) -> Result<(String, u16), ConnectError> {
    let host = uri.host().ok_or_else(|| ConnectError::Failed("the address has no host".into()))?;
    let default = if uri.scheme_str() == Some("http") { 80 } else { 443 };
    Ok((host.to_owned(), uri.port_u16().unwrap_or(default)))
}

/// All addresses of a host, IPv6 and IPv4 in turn.
async fn resolve(host: &str, port: u16) -> Result<Vec<SocketAddr>, ConnectError> {
    let found = timeout(RESOLVE, tokio::net::lookup_host((bare(host), port)))
        .await
        .map_err(|_| failed(host, "the name did not resolve in time"))?
        .map_err(|e| failed(host, format!("the name does not resolve: {e}")))?;
    let (v6, v4): (Vec<_>, Vec<_>) = found.partition(SocketAddr::is_ipv6);
    let mut in_turn = Vec::with_capacity(v6.len() + v4.len());
    let (mut v6, mut v4) = (v6.into_iter(), v4.into_iter());
    while in_turn.len() < MAX_ADDRESSES {
        let before = in_turn.len();
        in_turn.extend(v6.next());
        in_turn.extend(v4.next());
        if in_turn.len() == before {
            break;
        }
    }
    Ok(in_turn)
}

/// The first connection that stands; addresses are tried in order, a slow one does not hold up the next.
async fn race(addresses: Vec<SocketAddr>) -> io::Result<TcpStream> {
    let mut attempts = JoinSet::new();
    let mut waiting = addresses.into_iter();
    let mut last = io::Error::new(io::ErrorKind::AddrNotAvailable, "it has no address");
    loop {
        match waiting.next() {
            Some(address) => drop(attempts.spawn(connect(address))),
            None if attempts.is_empty() => return Err(last),
            None => {}
        }
        match timeout(STAGGER, attempts.join_next()).await {
            Ok(Some(Ok(Ok(stream)))) => return Ok(stream),
            Ok(Some(Ok(Err(e)))) => last = e,
            Ok(Some(Err(e))) => last = io::Error::other(e),
            Ok(None) | Err(_) => {}
        }
    }
}

async fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    let stream = timeout(CONNECT, TcpStream::connect(address))
        .await
        .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, format!("{address} did not answer in time")))?
        .map_err(|e| io::Error::new(e.kind(), format!("{address}: {e}")))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// A connection to a registry or to a proxy.
pub(super) struct Link {
    io: TokioIo<TcpStream>,
    /// Requests in the clear go to a proxy: they name the whole address.
    proxied: bool,
}

impl Link {
    fn direct(stream: TcpStream) -> Self {
        Self { io: TokioIo::new(stream), proxied: false }
    }
}

impl Connection for Link {
    fn connected(&self) -> Connected {
        Connected::new().proxy(self.proxied)
    }
}

impl Read for Link {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(cx, buf)
    }
}

impl Write for Link {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}
