//! Traffic that only passes through: requests as a client made them, with their bodies, and connections whose bytes
//! are the client's own business.

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http::header::{
    CONNECTION, CONTENT_LENGTH, EXPECT, HOST, PROXY_AUTHENTICATE, PROXY_AUTHORIZATION, TE, TRAILER,
    TRANSFER_ENCODING, UPGRADE, VIA,
};
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{HeaderMap, HeaderName, Request, Response, Uri};
use http_body_util::{Either, Full};
use hyper::body::{Body, Frame, Incoming, SizeHint};
use tokio::time::{Instant, Sleep, sleep_until, timeout};
use url::Url;

use super::connect::Dialer;
use super::request::forbidden;
use super::{Origin, OriginBody, OriginError, Route, Sent, Stream, join, unreachable};
use crate::applications;

/// For a response's head, from the last byte of the request's body: a registry reads a layer again before it takes it.
const HEAD: Duration = Duration::from_secs(300);
/// For a connection to stand.
const CONNECT: Duration = Duration::from_secs(20);
/// How much a client has to send of its body, and in which time.
const LEAST_BYTES: u64 = 4 << 10;
const LEAST_WITHIN: Duration = Duration::from_secs(60);

/// The headers about one connection, which end there (RFC 9110, 7.6.1).
const HOP_BY_HOP: [HeaderName; 9] = [
    CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    PROXY_AUTHENTICATE,
    PROXY_AUTHORIZATION,
    TE,
    TRAILER,
    TRANSFER_ENCODING,
    UPGRADE,
];

/// The target of a passing request.
#[derive(Clone, Debug)]
pub(crate) struct Upstream {
    /// The host in its one spelling: the key for settings.
    pub(crate) name: String,
    /// As the client asked for it.
    pub(crate) scheme: Scheme,
    /// The same.
    pub(crate) authority: Authority,
    /// It is asked as the configuration says of registries, not just as the client did.
    pub(crate) is_registry: bool,
}

/// Why a passing request got no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PassError {
    /// The origin's doing, or the configuration's.
    #[error(transparent)]
    Origin(#[from] OriginError),
    /// The client's: it does not send the body that it announced.
    #[error("the request's body came too slowly")]
    Slow,
}

impl Origin {
    /// Passes a request on, and its answer back: no redirect is followed, nothing is sent twice. Whether the host may be
    /// asked has been decided; which of its addresses may be reached is decided here.
    pub(crate) async fn pass(
        &self,
        upstream: &Upstream,
        request: Request<Incoming>,
    ) -> Result<Response<OriginBody>, PassError> {
        let settings = self.inner.live.load_full();
        let (name, method) = (upstream.name.as_str(), request.method().clone());
        let (host, port) = (upstream.authority.host(), upstream.port());
        let route = Route::to_named(&settings.registries, name, host, port)?;
        let means = self
            .means(&settings, &route)
            .map_err(|reason| unreachable(name, reason))?;
        let asked = self.asked(&means, &route, name, route.home(name));
        let uri = upstream.uri(&route, request.uri());
        let uri =
            uri.ok_or_else(|| asked.broken("its address can't be used in a request".into()))?;

        let (head, body) = request.into_parts();
        let moved = Arc::new(Mutex::new(Instant::now()));
        let body = match body.is_end_stream() {
            true => Either::Left(Full::default()),
            false => Either::Right(Upload::new(body, Arc::clone(&moved))),
        };
        let mut sent: Request<Sent> = Request::new(body);
        *sent.method_mut() = head.method;
        *sent.headers_mut() = self.passing(&head.headers);
        applications::strip(sent.headers_mut());
        for own in [HOST, CONTENT_LENGTH, EXPECT] {
            sent.headers_mut().remove(own);
        }
        asked.authorize_to_proxy(&uri, sent.headers_mut());
        *sent.uri_mut() = uri;

        let response = tokio::select! {
            response = means.clients.home.request(sent) => response.map_err(|e| match is_slow(&e) {
                true => PassError::Slow,
                false => asked.refused(&e).into(),
            })?,
            () = stalled(&moved) => return Err(unreachable(name, "it did not answer in time".into()).into()),
        };
        let mut response = self.with_body(name, &method, response.map(Some));
        *response.headers_mut() = self.passing(response.headers());
        Ok(response)
    }

    /// A connection to a host that may be reached; which of its addresses may be is decided here.
    pub(crate) async fn tunnel(
        &self,
        name: &str,
        authority: &Authority,
    ) -> Result<Stream, OriginError> {
        let settings = self.inner.live.load_full();
        let port = authority.port_u16().unwrap_or(443);
        let reach = Route::to_named(&settings.registries, name, authority.host(), port)?.reach;
        let dialer = Dialer {
            settings,
            reach,
            proxies: Arc::clone(&self.inner.proxies),
        };
        let uri = Uri::builder()
            .scheme(Scheme::HTTPS)
            .authority(authority.clone())
            .path_and_query("/")
            .build();
        let uri = uri.map_err(|e| unreachable(name, e.to_string()))?;
        match timeout(CONNECT, dialer.tunnel(uri)).await {
            Ok(Ok(stream)) => Ok(stream),
            Ok(Err(e @ super::ConnectError::Forbidden(_))) => Err(forbidden(name, &e)),
            Ok(Err(e)) => Err(unreachable(name, e.to_string())),
            Err(_) => Err(unreachable(name, "it did not answer in time".into())),
        }
    }

    /// The headers of a message that pass through, and that it came through here.
    fn passing(&self, headers: &HeaderMap) -> HeaderMap {
        let mut passing = end_to_end(headers);
        passing.append(VIA, self.inner.via.clone());
        passing
    }
}

/// The headers that are about more than one connection.
fn end_to_end(headers: &HeaderMap) -> HeaderMap {
    let mut all = headers.clone();
    let lines = headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|line| line.to_str().ok());
    for name in lines
        .flat_map(|line| line.split(','))
        .filter_map(|name| name.trim().parse().ok())
    {
        let name: HeaderName = name;
        all.remove(name);
    }
    for name in HOP_BY_HOP {
        all.remove(name);
    }
    all
}

impl Upstream {
    /// The port, where the address leaves it out too.
    pub(crate) fn port(&self) -> u16 {
        let default = if self.scheme == Scheme::HTTP { 80 } else { 443 };
        self.authority.port_u16().unwrap_or(default)
    }

    /// The address to ask for what `asked` asks for.
    fn uri(&self, route: &Route, asked: &Uri) -> Option<Uri> {
        let rest = asked.path_and_query().map_or("/", PathAndQuery::as_str);
        let base = match self.endpoint(route) {
            Some(endpoint) => {
                return join(endpoint, asked.path(), asked.query())
                    .as_str()
                    .parse()
                    .ok();
            }
            None if self.is_registry => format!("https://{}", self.authority),
            None => format!("{}://{}", self.scheme, self.authority),
        };
        format!("{base}{rest}").parse().ok()
    }

    /// The registry's own endpoint, unless it was asked under another of its names: Docker Hub's do different things.
    fn endpoint<'a>(&self, route: &'a Route) -> Option<&'a Url> {
        let asked = hawker_oci::reference::api_host(&self.name);
        let same = [asked, &self.name]
            .iter()
            .any(|name| self.authority.host().eq_ignore_ascii_case(bare(name)));
        Some(route.home(&self.name)).filter(|_| self.is_registry && same)
    }
}

/// A host without its port.
fn bare(name: &str) -> &str {
    match name.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|b| b.is_ascii_digit()) => host,
        _ => name,
    }
}

/// Whether the client was too slow with its body.
fn is_slow(error: &dyn std::error::Error) -> bool {
    let mut cause = error.source();
    while let Some(inner) = cause {
        if matches!(inner.downcast_ref(), Some(UploadError::Slow)) {
            return true;
        }
        cause = inner.source();
    }
    false
}

/// Waits until nothing has moved for as long as a response's head may take.
async fn stalled(moved: &Mutex<Instant>) {
    loop {
        let until = *moved.lock().unwrap_or_else(PoisonError::into_inner) + HEAD;
        if Instant::now() >= until {
            return;
        }
        sleep_until(until).await;
    }
}

/// A client's body on its way to an origin, frame by frame. A client that sends next to nothing is given up.
pub(super) struct Upload {
    incoming: Incoming,
    moved: Arc<Mutex<Instant>>,
    pace: Pace,
    /// Until the pace is too slow.
    due: Pin<Box<Sleep>>,
}

/// How much has come, and when the next part must have.
struct Pace {
    due: Instant,
    came_bytes: u64,
}

impl Pace {
    fn new(now: Instant) -> Self {
        Self {
            due: now + LEAST_WITHIN,
            came_bytes: 0,
        }
    }

    fn came(&mut self, bytes: u64, now: Instant) {
        self.came_bytes += bytes;
        if self.came_bytes >= LEAST_BYTES {
            *self = Self::new(now);
        }
    }
}

/// Why a client's body did not go out whole.
#[derive(Debug, thiserror::Error)]
pub(super) enum UploadError {
    /// It broke off.
    #[error("the client broke off: {0}")]
    Broken(#[from] hyper::Error),
    /// It is too slow.
    #[error("the client sends next to nothing")]
    Slow,
}

impl Upload {
    fn new(incoming: Incoming, moved: Arc<Mutex<Instant>>) -> Self {
        let pace = Pace::new(Instant::now());
        let due = Box::pin(sleep_until(pace.due));
        Self {
            incoming,
            moved,
            pace,
            due,
        }
    }
}

impl Body for Upload {
    type Data = Bytes;
    type Error = UploadError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, UploadError>>> {
        let Poll::Ready(frame) = Pin::new(&mut self.incoming).poll_frame(cx) else {
            let due = self.pace.due;
            if self.due.deadline() != due {
                self.due.as_mut().reset(due);
            }
            ready!(self.due.as_mut().poll(cx));
            return Poll::Ready(Some(Err(UploadError::Slow)));
        };
        let now = Instant::now();
        *self.moved.lock().unwrap_or_else(PoisonError::into_inner) = now;
        if let Some(Ok(data)) = frame
            .as_ref()
            .map(|frame| frame.as_ref().map(Frame::data_ref))
        {
            self.pace
                .came(data.map_or(0, |data| data.len() as u64), now);
        }
        Poll::Ready(frame.map(|frame| frame.map_err(UploadError::from)))
    }

    fn is_end_stream(&self) -> bool {
        self.incoming.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.incoming.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_sends_next_to_nothing_runs_out_of_time() {
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        let mut pace = Pace::new(start);
        for second in 0..59 {
            pace.came(1, after(second));
        }
        assert_eq!(pace.due, after(60), "a byte a second is next to nothing");
        pace.came(4096, after(59));
        assert_eq!(pace.due, after(59 + 60));
    }

    #[test]
    fn what_is_about_one_connection_ends_there() {
        let mut headers = HeaderMap::new();
        for (name, value) in [
            ("connection", "close, X-Own"),
            ("x-own", "1"),
            ("keep-alive", "timeout=5"),
            ("proxy-connection", "keep-alive"),
            ("proxy-authorization", "Basic eA=="),
            ("te", "trailers"),
            ("transfer-encoding", "chunked"),
            ("upgrade", "websocket"),
            ("authorization", "Bearer x"),
            ("cookie", "a=b"),
            ("content-encoding", "gzip"),
        ] {
            headers.append(name, value.parse().unwrap());
        }
        let kept = end_to_end(&headers);
        let mut kept: Vec<&str> = kept.keys().map(HeaderName::as_str).collect();
        kept.sort_unstable();
        assert_eq!(kept, ["authorization", "content-encoding", "cookie"]);
    }

    #[test]
    fn a_registry_is_asked_where_the_configuration_says_and_others_where_the_client_does() {
        let mut registries = crate::settings::Registries::default();
        for (name, endpoint) in [
            ("reg:5000", "http://10.0.0.1:5000/"),
            ("docker.io", "https://registry-1.docker.io/"),
            ("corp.example", "https://corp.example/sub"),
        ] {
            let endpoints = vec![endpoint.parse().unwrap()];
            let own = crate::settings::RegistrySettings {
                endpoints,
                ..Default::default()
            };
            registries.known.insert(name.to_owned(), own);
        }
        for (name, base, is_registry, expected) in [
            (
                "reg:5000",
                "https://reg:5000",
                true,
                "http://10.0.0.1:5000/a?b=%2f",
            ),
            (
                "docker.io",
                "https://registry-1.docker.io",
                true,
                "https://registry-1.docker.io/a?b=%2f",
            ),
            (
                "docker.io",
                "https://index.docker.io",
                true,
                "https://index.docker.io/a?b=%2f",
            ),
            (
                "corp.example",
                "https://corp.example",
                true,
                "https://corp.example/sub/a?b=%2f",
            ),
            // nydusd's `use_http`: the proxy speaks TLS for it.
            ("quay.io", "http://quay.io", true, "https://quay.io/a?b=%2f"),
            (
                "web.example",
                "http://web.example:8080",
                false,
                "http://web.example:8080/a?b=%2f",
            ),
        ] {
            let base: Uri = base.parse().unwrap();
            let upstream = Upstream {
                name: name.to_owned(),
                scheme: base.scheme().unwrap().clone(),
                authority: base.authority().unwrap().clone(),
                is_registry,
            };
            let route = Route::to_allowed(&registries, name).unwrap();
            let uri = upstream.uri(&route, &"/a?b=%2f".parse().unwrap()).unwrap();
            assert_eq!(uri, expected, "{name} {base}");
        }
    }
}
