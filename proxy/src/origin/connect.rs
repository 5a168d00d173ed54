//! Connections to upstream registries: resolve once, keep the addresses that may be reached, connect to these and no others.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use hawker_network::names::{self, NamedBy};
use http::Uri;
use hyper::rt::{Read, ReadBufCursor, Write};
use hyper_util::client::legacy::connect::proxy::Tunnel;
use hyper_util::client::legacy::connect::{Connected, Connection};
use hyper_util::client::proxy::matcher::{Intercept, Matcher};
use hyper_util::rt::TokioIo;
use rustls_pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, ReadBuf, Take};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tower::Service;

use super::policy::{Reach, Trust, is_in_configuration};
use super::request::reasons;
use super::{socks, tls};
use crate::settings::LiveSettings;

/// For one address to take a connection.
const CONNECT: Duration = Duration::from_secs(5);
/// For a proxy to connect, its own look-up of the name included.
const PROXY: Duration = Duration::from_secs(15);
/// Before the next address is tried beside the last one (RFC 8305, section 5).
const STAGGER: Duration = Duration::from_millis(250);
/// Read at once at most, in bytes. hyper's buffer grows when a read fills it, up to the longest head that is taken
/// ([`super::MAX_HEAD_BYTES`]). One byte less than a power of two keeps the buffer of a body at 64 KiB.
const READ_BYTES: usize = (64 << 10) - 1;
/// Addresses of one name that are tried.
const MAX_ADDRESSES: usize = 8;

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub(super) enum ConnectError {
    /// Every address of the host is one that may not be reached.
    #[error("{0} has only loopback, private or link-local addresses")]
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
    /// Entries `HOST:PORT` of `NO_PROXY`, which the matcher does not know.
    without: Vec<String>,
    /// The addresses of this daemon's mirror and forward proxy: a proxy setting that points there is for the runtime,
    /// not for us.
    own: Vec<SocketAddr>,
}

impl Proxies {
    pub(super) fn new(matcher: Matcher, own: Vec<SocketAddr>) -> Self {
        Self {
            matcher,
            without: Vec::new(),
            own,
        }
    }

    /// The proxies that the environment names.
    pub(super) fn from_env(own: Vec<SocketAddr>) -> Self {
        let listed = ["NO_PROXY", "no_proxy"]
            .into_iter()
            .find_map(|name| std::env::var(name).ok());
        let without = with_ports(&listed.unwrap_or_default());
        for name in [
            "HTTPS_PROXY",
            "https_proxy",
            "HTTP_PROXY",
            "http_proxy",
            "ALL_PROXY",
            "all_proxy",
        ] {
            if std::env::var(name).is_ok_and(|proxy| proxy.starts_with("socks4")) {
                tracing::warn!(
                    variable = name,
                    "socks4 proxies are not supported; use socks5:// or http://"
                );
            }
        }
        Self {
            without,
            ..Self::new(Matcher::from_env(), own)
        }
    }

    /// The proxy to use for `uri`, if any.
    pub(super) fn to(&self, uri: &Uri) -> Option<Intercept> {
        if !self.without.is_empty()
            && let Ok((host, port)) = host_port(uri)
            && is_without(&self.without, bare(&host), port)
        {
            return None;
        }
        self.matcher
            .intercept(uri)
            .filter(|proxy| !self.is_own(proxy.uri()))
    }

    /// Whether a connection has come back to this daemon: from one of its own addresses to a listener of its own.
    pub(super) fn leads_back(&self, stream: &TcpStream) -> bool {
        let (Ok(here), Ok(there)) = (stream.local_addr(), stream.peer_addr()) else {
            return true;
        };
        let local = there.ip() == here.ip() || there.ip().to_canonical().is_loopback();
        local
            && self
                .own
                .iter()
                .any(|listener| listener.port() == there.port())
    }

    fn is_own(&self, proxy: &Uri) -> bool {
        let Some(host) = proxy.host().map(bare) else {
            return false;
        };
        let port = proxy.port_u16().unwrap_or(80);
        self.own.iter().any(|listener| {
            listener.port() == port
                && match host.parse::<IpAddr>() {
                    Ok(ip) => {
                        ip == listener.ip() || (ip.is_loopback() && listener.ip().is_unspecified())
                    }
                    Err(_) => host.eq_ignore_ascii_case("localhost"),
                }
        })
    }
}

/// The entries of `NO_PROXY` that name a port. Go's clients know them.
fn with_ports(listed: &str) -> Vec<String> {
    let entries = listed
        .split(',')
        .map(|entry| entry.trim().to_ascii_lowercase());
    let has_port = |entry: &String| {
        entry.rsplit_once(':').is_some_and(|(host, port)| {
            port.parse::<u16>().is_ok() && (!host.contains(':') || host.starts_with('['))
        })
    };
    entries.filter(has_port).collect()
}

fn is_without(entries: &[String], host: &str, port: u16) -> bool {
    let host = host.to_ascii_lowercase();
    entries
        .iter()
        .filter_map(|entry| entry.rsplit_once(':'))
        .any(|(entry, of)| {
            let entry = bare(entry).trim_start_matches("*.").trim_start_matches('.');
            let below = || {
                host.strip_suffix(entry)
                    .is_some_and(|rest| rest.ends_with('.'))
            };
            of.parse() == Ok(port) && (host == entry || below())
        })
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
    pub(super) async fn tunnel(&self, uri: Uri) -> Result<Stream, ConnectError> {
        let host = host_port(&uri)?.0;
        let stream = self.dial(uri).await?.io.into_inner().inner.into_inner();
        if self.proxies.leads_back(stream.tcp()) {
            return Err(ConnectError::Forbidden(host));
        }
        Ok(stream)
    }

    async fn dial(&self, uri: Uri) -> Result<Link, ConnectError> {
        let (host, port) = host_port(&uri)?;
        let Some(proxy) = self.proxies.to(&uri) else {
            let addresses = self.allowed(&host, port, self.resolve(&host, port).await?)?;
            return Ok(Link::new(Stream::Tcp(
                race(addresses).await.map_err(|why| failed(&host, why))?,
            )));
        };
        // The proxy resolves the name; a name that resolves here is checked here all the same.
        if let Ok(addresses) = self.resolve(&host, port).await {
            self.allowed(&host, port, addresses)?;
        }
        let through = |why: String| failed(&host, format!("through the proxy: {why}"));
        if is_socks(proxy.uri()) {
            let stream = timeout(PROXY, async {
                let mut stream = dial_proxy(proxy.uri()).await?;
                let greeted = socks::greet(&mut stream, proxy.raw_auth(), bare(&host), port).await;
                greeted.map_err(|why| through(why.to_string()))?;
                Ok(stream)
            });
            let stream = stream
                .await
                .map_err(|_| through("it did not answer in time".into()))??;
            return Ok(Link::new(stream));
        }
        if uri.scheme_str() == Some("http") {
            return Ok(Link {
                proxied: true,
                ..Link::new(dial_proxy(proxy.uri()).await?)
            });
        }
        let dial = |proxy: Uri| async move { dial_proxy(&proxy).await.map(Link::new) };
        let mut tunnel = Tunnel::new(proxy.uri().clone(), tower::service_fn(dial));
        if let Some(auth) = proxy.basic_auth() {
            tunnel = tunnel.with_auth(auth.clone());
        }
        let link = timeout(PROXY, tunnel.call(uri)).await;
        link.map_err(|_| through("it did not answer in time".into()))?
            .map_err(|why| through(reasons(&why)))
    }

    /// All addresses of a host. Names of the configuration don't wait for names of clients.
    async fn resolve(&self, host: &str, port: u16) -> Result<Vec<SocketAddr>, ConnectError> {
        let registries = &self.settings.registries;
        let is_own = self.reach != Reach::Public && is_in_configuration(registries, host);
        resolve(
            host,
            port,
            if is_own {
                NamedBy::Configuration
            } else {
                NamedBy::Client
            },
        )
        .await
    }

    /// Those of `addresses` that may be reached.
    fn allowed(
        &self,
        host: &str,
        port: u16,
        mut addresses: Vec<SocketAddr>,
    ) -> Result<Vec<SocketAddr>, ConnectError> {
        addresses.retain(|a| {
            self.reach
                .allows(&self.settings.registries, host, port, a.ip())
        });
        if addresses.is_empty() {
            Err(ConnectError::Forbidden(host.to_owned()))
        } else {
            Ok(addresses)
        }
    }
}

fn failed(host: &str, why: impl std::fmt::Display) -> ConnectError {
    ConnectError::Failed(format!("{host}: {why}"))
}

fn is_socks(proxy: &Uri) -> bool {
    matches!(proxy.scheme_str(), Some("socks5" | "socks5h"))
}

/// A connection to the proxy itself, through TLS where its address says `https`.
async fn dial_proxy(proxy: &Uri) -> Result<Stream, ConnectError> {
    let (host, port) = host_port(proxy)?;
    let because = |why: String| failed(&host, format!("the proxy: {why}"));
    let is_tls = proxy.scheme_str() == Some("https");
    if !is_tls && !is_socks(proxy) && proxy.scheme_str() != Some("http") {
        return Err(because(
            "write its address in HTTPS_PROXY, HTTP_PROXY or ALL_PROXY with http://, https://, socks5:// or socks5h://".into(),
        ));
    }
    let addresses = resolve(&host, port, NamedBy::Configuration).await?;
    let stream = race(addresses)
        .await
        .map_err(|why| because(why.to_string()))?;
    if !is_tls {
        return Ok(Stream::Tcp(stream));
    }
    let config = tls::client_config(&Trust::default()).map_err(&because)?;
    let name =
        ServerName::try_from(bare(&host).to_owned()).map_err(|error| because(error.to_string()))?;
    let handshake = TlsConnector::from(Arc::new(config)).connect(name, stream);
    match timeout(CONNECT, handshake).await {
        Ok(Ok(stream)) => Ok(Stream::Tls(Box::new(stream))),
        Ok(Err(error)) => Err(because(error.to_string())),
        Err(_) => Err(because("its TLS handshake took too long".into())),
    }
}

/// A host without the brackets of an IPv6 literal.
fn bare(host: &str) -> &str {
    host.strip_prefix('[')
        .and_then(|h| h.strip_suffix(']'))
        .unwrap_or(host)
}

fn host_port(uri: &Uri) -> Result<(String, u16), ConnectError> {
    let host = uri
        .host()
        .ok_or_else(|| ConnectError::Failed("the address has no host".into()))?;
    let default = match uri.scheme_str() {
        Some("http") => 80,
        Some("socks5" | "socks5h") => 1080,
        _ => 443,
    };
    Ok((host.to_owned(), uri.port_u16().unwrap_or(default)))
}

/// All addresses of a host, IPv6 and IPv4 in turn.
async fn resolve(
    host: &str,
    port: u16,
    named_by: NamedBy,
) -> Result<Vec<SocketAddr>, ConnectError> {
    let found = names::resolve(host, port, named_by)
        .await
        .map_err(|e| failed(host, e))?;
    let (v6, v4): (Vec<_>, Vec<_>) = found.into_iter().partition(SocketAddr::is_ipv6);
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
        .map_err(|_| {
            io::Error::new(
                io::ErrorKind::TimedOut,
                format!("{address} did not answer in time"),
            )
        })?
        .map_err(|e| io::Error::new(e.kind(), format!("{address}: {e}")))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// A connection, as far as the registry, or the proxy before it.
pub(crate) enum Stream {
    /// Straight, or through a proxy that adds nothing to the bytes.
    Tcp(TcpStream),
    /// Through a proxy that is spoken to by TLS.
    Tls(Box<TlsStream<TcpStream>>),
}

impl Stream {
    fn tcp(&self) -> &TcpStream {
        match self {
            Stream::Tcp(stream) => stream,
            Stream::Tls(stream) => stream.get_ref().0,
        }
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match &mut *self {
            Stream::Tcp(stream) => Pin::new(stream).poll_read(cx, buf),
            Stream::Tls(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        match &mut *self {
            Stream::Tcp(stream) => Pin::new(stream).poll_write(cx, buf),
            Stream::Tls(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut *self {
            Stream::Tcp(stream) => Pin::new(stream).poll_flush(cx),
            Stream::Tls(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut *self {
            Stream::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
            Stream::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}

/// A stream of which [`READ_BYTES`] at most are read at once.
struct Capped {
    inner: Take<Stream>,
}

impl AsyncRead for Capped {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.inner.set_limit(READ_BYTES as u64);
        Pin::new(&mut self.inner).poll_read(cx, buf)
    }
}

impl AsyncWrite for Capped {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(self.inner.get_mut()).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(self.inner.get_mut()).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(self.inner.get_mut()).poll_shutdown(cx)
    }
}

/// A connection to a registry or to a proxy.
pub(super) struct Link {
    io: TokioIo<Capped>,
    /// Requests in the clear go to a proxy: they name the whole address.
    proxied: bool,
}

impl Link {
    fn new(stream: Stream) -> Self {
        Self {
            io: TokioIo::new(Capped {
                inner: stream.take(0),
            }),
            proxied: false,
        }
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
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}
