//! The forward proxy, for runtimes that know `HTTP_PROXY` and `HTTPS_PROXY` but no mirror for all registries: dockerd, nydusd.
//!
//! Connections that rules name are opened: [`authority`] makes the certificate that they show, and requests for blobs and
//! manifests inside are answered as by the mirror. All else on such a host passes through to it. Connections to other hosts
//! that may be reached are tunnels. [`target`] says what a request is for, [`hawker_core::intercept`] what becomes of it.

mod authority;
mod target;

use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use hawker_core::intercept::{Action, Way};
use hawker_identity::member::IdentityError;
use hawker_oci::reference::{self, Asked, Content};
use http::{Method, Request, StatusCode};
use hyper::body::Incoming;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use self::authority::Authority;
pub use self::authority::{CERTIFICATE_FILE, authority_dir};
use crate::metrics::RequestKind;
use crate::origin::{Origin, Upstream, content_length};
use crate::registry::{Answer, Becomes, Mirror, Payload, Problem, Reply, Replying, Service, head};
use crate::settings::LiveSettings;

const HTTPS_PORT: u16 = 443;
/// Tunnels at once: each holds two sockets and two buffers.
const MAX_TUNNELS: usize = 512;

/// The forward proxy. Cheap to clone.
#[derive(Clone)]
pub struct ForwardProxy {
    inner: Arc<Inner>,
}

struct Inner {
    mirror: Mirror,
    origin: Origin,
    live: Arc<ArcSwap<LiveSettings>>,
    authority: Authority,
    tunnels: Arc<Semaphore>,
}

impl ForwardProxy {
    /// A forward proxy in front of `mirror`, with the authority in `dir`; made there if there is none.
    pub fn open(
        dir: &Path,
        name: &str,
        mirror: Mirror,
        origin: Origin,
        live: Arc<ArcSwap<LiveSettings>>,
    ) -> Result<Self, IdentityError> {
        let authority = Authority::open_or_create(dir, name)?;
        let tunnels = Arc::new(Semaphore::new(MAX_TUNNELS));
        Ok(Self {
            inner: Arc::new(Inner {
                mirror,
                origin,
                live,
                authority,
                tunnels,
            }),
        })
    }

    /// Serves until `stop` is cancelled; then what is under way may go on for `drain`, and ends short after that.
    pub async fn serve(&self, listener: TcpListener, stop: CancellationToken, drain: Duration) {
        let service = Arc::new(self.clone());
        self.inner
            .mirror
            .serve_as(service, listener, stop, drain)
            .await;
    }

    /// Answers a request that names a host; the connection may become one to that host.
    async fn proxied(&self, request: Request<Incoming>, client: IpAddr) -> Result<Reply, Problem> {
        if self.inner.mirror.has_seen(request.headers()) {
            return Err(Problem::Loop);
        }
        let settings = self.inner.live.load_full();
        let mut upstream = target::of(&request, &settings.registries)?;
        let allowed = target::is_allowed(&upstream, &settings.registries);
        let way = settings.intercept.way(&upstream.name, allowed);
        upstream.is_registry = way == Way::Open;
        match way {
            Way::Refuse => Err(Problem::RefusedHost {
                host: upstream.name,
                scheme: upstream.scheme,
            }),
            _ if *request.method() != Method::CONNECT => {
                Box::pin(self.inner.hand_on(&upstream, request, client)).await
            }
            Way::Open => self.opened(upstream),
            Way::Tunnel => self.tunnel(&upstream).await,
        }
    }

    /// TLS ends here.
    fn opened(&self, upstream: Upstream) -> Result<Reply, Problem> {
        let host = upstream.authority.host();
        let host = host
            .strip_prefix('[')
            .and_then(|host| host.strip_suffix(']'))
            .unwrap_or(host);
        let config = self.inner.authority.server_config(host, SystemTime::now());
        let config = config.map_err(|error| {
            tracing::warn!(%host, %error, "there is no certificate for the host");
            Problem::NoCertificate(host.to_owned())
        })?;
        let inside = Inside {
            inner: Arc::clone(&self.inner),
            upstream,
        };
        Ok(Reply::Connected(Becomes::Tls(config, Arc::new(inside))))
    }

    async fn tunnel(&self, upstream: &Upstream) -> Result<Reply, Problem> {
        let place = Arc::clone(&self.inner.tunnels).try_acquire_owned();
        let place = place.map_err(|_| Problem::TooManyTunnels)?;
        let there = self
            .inner
            .origin
            .tunnel(&upstream.name, &upstream.authority)
            .await?;
        Ok(Reply::Connected(Becomes::Tunnel(there, place)))
    }
}

impl Service for ForwardProxy {
    fn answer(&self, request: Request<Incoming>, client: IpAddr) -> Replying<'_> {
        Box::pin(async move {
            let kind = match *request.method() {
                Method::CONNECT => RequestKind::Tunnel,
                _ => RequestKind::Passed,
            };
            let reply = self.proxied(request, client).await;
            self.inner.counted(kind, reply)
        })
    }
}

/// The handler inside of an opened connection.
struct Inside {
    inner: Arc<Inner>,
    upstream: Upstream,
}

impl Inside {
    async fn asked(&self, request: Request<Incoming>, client: IpAddr) -> Result<Reply, Problem> {
        if *request.method() == Method::CONNECT || !self.leads_there(&request)? {
            return Err(Problem::Misdirected(self.upstream.authority.to_string()));
        }
        if self.inner.mirror.has_seen(request.headers()) {
            return Err(Problem::Loop);
        }
        Box::pin(self.inner.hand_on(&self.upstream, request, client)).await
    }

    /// Whether a request is for the host that the connection was made for.
    fn leads_there(&self, request: &Request<Incoming>) -> Result<bool, Problem> {
        let host = head::host(request.headers(), request.version())?;
        let named = request.uri().authority().cloned().or(host);
        Ok(named.is_none_or(|named| head::same(&named, &self.upstream.authority, HTTPS_PORT)))
    }
}

impl Service for Inside {
    fn answer(&self, request: Request<Incoming>, client: IpAddr) -> Replying<'_> {
        Box::pin(async move {
            let reply = self.asked(request, client).await;
            self.inner.counted(RequestKind::Passed, reply)
        })
    }
}

impl Inner {
    /// Peers answer what they can; the rest passes through.
    async fn hand_on(
        &self,
        upstream: &Upstream,
        request: Request<Incoming>,
        client: IpAddr,
    ) -> Result<Reply, Problem> {
        let action = self
            .live
            .load()
            .intercept
            .action(&upstream.name, request.uri().path());
        if action == Action::P2p && is_content(&upstream.name, &request) {
            let (request, _body) = request.into_parts();
            return Ok(Reply::Answer(
                Box::pin(self.mirror.answer_as(&upstream.name, request, client)).await,
            ));
        }
        let is_head = *request.method() == Method::HEAD;
        let (head, body) = self.origin.pass(upstream, request).await?.into_parts();
        let length = content_length(&head.headers);
        let bodiless = is_head
            || matches!(
                head.status,
                StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED
            );
        let payload = if bodiless {
            Payload::Empty
        } else {
            Payload::Origin(body, length)
        };
        self.mirror
            .metrics()
            .request(RequestKind::Passed, head.status.as_u16());
        let mut answer = Answer::new(payload);
        (*answer.status_mut(), *answer.headers_mut()) = (head.status, head.headers);
        Ok(Reply::Answer(answer))
    }

    /// A reply for better or worse, counted; answers have been, where they come from.
    fn counted(&self, kind: RequestKind, reply: Result<Reply, Problem>) -> Reply {
        if matches!(reply, Ok(Reply::Connected(_))) {
            self.mirror.metrics().request(kind, StatusCode::OK.as_u16());
        }
        reply.unwrap_or_else(|problem| Reply::Answer(problem.counted(kind, self.mirror.metrics())))
    }
}

/// Whether a request is for a blob or a manifest, which peers may have.
fn is_content(registry: &str, request: &Request<Incoming>) -> bool {
    let (method, uri) = (request.method().as_str(), request.uri());
    match reference::parse_at(registry, method, uri.path(), uri.query()) {
        Ok(Asked::Content(asked)) => {
            matches!(asked.content, Content::Manifest(_) | Content::Blob(_))
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests;
