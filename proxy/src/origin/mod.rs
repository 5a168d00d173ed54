//! Upstream registries: who may be asked, and asking them.
//!
//! [`policy`] says which registries and addresses may be reached, [`connect`] reaches them, [`tls`] believes them or not,
//! [`backoff`] leaves them alone when they ask for it.

mod backoff;
mod connect;
mod policy;
mod tls;

use std::collections::HashMap;
use std::error::Error as _;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use bytes::Bytes;
use hawker_core::digest::Digest;
use hawker_core::reference::Source;
use http::header::{
    ACCEPT, ACCEPT_ENCODING, AUTHORIZATION, CONTENT_LENGTH, IF_NONE_MATCH, IF_RANGE, LOCATION,
    PROXY_AUTHORIZATION, RANGE, RETRY_AFTER, USER_AGENT, VIA,
};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Uri};
use http_body_util::{BodyExt, Empty};
use hyper::body::Incoming;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::{self, Client};
use hyper_util::client::proxy::matcher::Matcher;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use tokio::time::{Instant, timeout, timeout_at};
use url::Url;

use self::backoff::Backoff;
use self::connect::{ConnectError, Dialer, Proxies};
use self::policy::{Reach, Route, Trust};
use crate::limits::{Direction, Limits};
use crate::settings::LiveSettings;

/// From the request to the response's head, all endpoints and redirects together. Runtimes wait for 30 s, and then they must have
/// heard that there is nothing.
const HEAD: Duration = Duration::from_secs(25);
/// The same for an endpoint after which there is another one.
const HEAD_OF_MIRROR: Duration = Duration::from_secs(10);
/// Times that a request is sent to one address when its connection breaks.
const SENDS: u32 = 3;
/// The wait before the third sending; the second one follows at once.
const SEND_AGAIN_AFTER: Duration = Duration::from_millis(200);
/// A request that took longer than this to fail is not sent again.
const SEND_AGAIN_WITHIN: Duration = Duration::from_secs(5);
/// Between two frames of a body.
const BODY_IDLE: Duration = Duration::from_secs(30);
/// A connection that nobody uses.
const POOL_IDLE: Duration = Duration::from_secs(60);
/// Idle connections to one host.
const POOL_PER_HOST: usize = 32;
/// The read buffer of a connection. A response's head that does not fit is refused.
const BUFFER_BYTES: usize = 64 << 10;
/// What is handed out of a body at once, and charged to the rate at once.
const FRAME_BYTES: usize = 64 << 10;
/// Redirects followed.
const MAX_REDIRECTS: usize = 5;
/// What of a client's request an origin gets to see.
const PASSED_ON: [HeaderName; 4] = [RANGE, IF_NONE_MATCH, IF_RANGE, AUTHORIZATION];

/// What to ask of a registry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// Registry and repository.
    pub source: Source,
    /// What in it.
    pub content: Content,
}

/// What in a repository.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// `manifests/<tag or digest>`
    Manifest(String),
    /// `blobs/<digest>`
    Blob(Digest),
    /// `tags/list`
    Tags,
    /// `referrers/<digest>`
    Referrers(Digest),
    /// `/v2/`
    Ping,
}

impl Target {
    /// The path at the registry.
    fn path(&self) -> String {
        let repository = &self.source.repository;
        match &self.content {
            Content::Manifest(reference) => format!("/v2/{repository}/manifests/{reference}"),
            Content::Blob(digest) => format!("/v2/{repository}/blobs/{digest}"),
            Content::Tags => format!("/v2/{repository}/tags/list"),
            Content::Referrers(digest) => format!("/v2/{repository}/referrers/{digest}"),
            Content::Ping => "/v2/".to_owned(),
        }
    }
}

/// Why the origin gave nothing.
#[derive(Clone, Debug, thiserror::Error)]
pub enum OriginError {
    /// The configuration forbids asking this registry. The caller's fault.
    #[error("registry {0} is not allowed here: add it to the configuration's registries")]
    Forbidden(String),
    /// It could not be reached in time. The origin's fault; retry later.
    #[error("registry {registry} can't be reached: {reason}")]
    Unreachable {
        /// Which.
        registry: String,
        /// Why.
        reason: String,
    },
    /// It broke off or lied in mid-answer. The origin's fault; retry may help.
    #[error("registry {registry} broke off: {reason}")]
    Broken {
        /// Which.
        registry: String,
        /// Why.
        reason: String,
    },
}

/// A body from the origin, frame by frame, each wait with a deadline, charged to the origin's rate.
pub struct OriginBody {
    incoming: Option<Incoming>,
    /// Bytes that came and are not handed out yet.
    pending: Bytes,
    /// What the origin still owes, if it said how much there is.
    remaining_bytes: Option<u64>,
    registry: String,
    limits: Limits,
}

impl OriginBody {
    /// The next bytes, at most 64 KiB; `None` at the end. A body that ends before its Content-Length is `Broken`.
    pub async fn next(&mut self) -> Option<Result<Bytes, OriginError>> {
        let frame = self.frame().await.transpose()?;
        if frame.is_err() {
            self.incoming = None;
            self.pending.clear();
        }
        Some(frame)
    }

    async fn frame(&mut self) -> Result<Option<Bytes>, OriginError> {
        if self.pending.is_empty() {
            match self.receive().await? {
                Some(data) => self.pending = data,
                None => return Ok(None),
            }
        }
        let frame = self.pending.split_to(self.pending.len().min(FRAME_BYTES));
        self.limits.take(Direction::Origin, frame.len() as u64).await;
        Ok(Some(frame))
    }

    /// What the connection has read; not empty.
    async fn receive(&mut self) -> Result<Option<Bytes>, OriginError> {
        loop {
            let Some(incoming) = &mut self.incoming else { return Ok(None) };
            let frame = match timeout(BODY_IDLE, incoming.frame()).await {
                Err(_) => return Err(self.broken(format!("nothing came for {} s", BODY_IDLE.as_secs()))),
                Ok(Some(Err(e))) => return Err(self.broken(reasons(&e))),
                Ok(Some(Ok(frame))) => frame,
                Ok(None) => {
                    self.incoming = None;
                    return match self.remaining_bytes {
                        Some(missing @ 1..) => Err(self.broken(format!("{missing} bytes are missing"))),
                        _ => Ok(None),
                    };
                }
            };
            let Ok(data) = frame.into_data() else { continue };
            if data.is_empty() {
                continue;
            }
            if let Some(remaining) = &mut self.remaining_bytes {
                let Some(rest) = remaining.checked_sub(data.len() as u64) else {
                    return Err(self.broken("it sent more than it said".to_owned()));
                };
                *remaining = rest;
            }
            return Ok(Some(data));
        }
    }

    fn broken(&self, reason: String) -> OriginError {
        OriginError::Broken { registry: self.registry.clone(), reason }
    }
}

/// The client of all upstream registries. Cheap to clone.
#[derive(Clone)]
pub struct Origin {
    inner: Arc<Inner>,
}

struct Inner {
    live: Arc<ArcSwap<LiveSettings>>,
    limits: Limits,
    proxies: Arc<Proxies>,
    pseudonym: String,
    clients: Mutex<Clients>,
    backoff: Backoff,
}

type HttpClient = Client<HttpsConnector<Dialer>, Empty<Bytes>>;

/// Connections are shared only among requests that trust and may reach the same; new settings start anew.
struct Clients {
    settings: Arc<LiveSettings>,
    by_right: HashMap<(Trust, Reach), HttpClient>,
}

impl Origin {
    /// A client that reads `live` at each request, and uses the proxy that the environment names.
    pub fn new(live: Arc<ArcSwap<LiveSettings>>, limits: Limits) -> Self {
        Self::beside(live, limits, Vec::new())
    }

    /// The same, in a daemon whose mirror listens at `own`: a proxy setting that leads there is not followed.
    pub fn beside(live: Arc<ArcSwap<LiveSettings>>, limits: Limits, own: Vec<SocketAddr>) -> Self {
        Self::through(live, limits, Proxies::new(Matcher::from_env(), own))
    }

    fn through(live: Arc<ArcSwap<LiveSettings>>, limits: Limits, proxies: Proxies) -> Self {
        let clients = Clients { settings: live.load_full(), by_right: HashMap::new() };
        let inner = Inner {
            live,
            limits,
            proxies: Arc::new(proxies),
            pseudonym: format!("hawker-{:016x}", rand::random::<u64>()),
            clients: Mutex::new(clients),
            backoff: Backoff::new(),
        };
        Self { inner: Arc::new(inner) }
    }

    /// This node's name in `Via` headers, new at each start: a request that carries it has come round in a circle.
    pub fn pseudonym(&self) -> &str {
        &self.inner.pseudonym
    }

    /// HEAD. Whatever status the origin gives is an `Ok`; redirects are followed here.
    pub async fn head(&self, target: &Target, headers: &HeaderMap) -> Result<Response<()>, OriginError> {
        Ok(self.ask(Method::HEAD, target, None, headers).await?.map(drop))
    }

    /// GET, with `headers` (Accept, Range, Authorization …) passed on; redirects are followed here.
    pub async fn get(
        &self,
        target: &Target,
        headers: &HeaderMap,
    ) -> Result<Response<OriginBody>, OriginError> {
        self.ask(Method::GET, target, None, headers).await
    }

    /// GET with a query, for lists that come in pages.
    pub async fn get_page(
        &self,
        target: &Target,
        query: Option<&str>,
        headers: &HeaderMap,
    ) -> Result<Response<OriginBody>, OriginError> {
        self.ask(Method::GET, target, query, headers).await
    }

    /// Asks the registry, unless it wants to be left alone by callers without credentials.
    async fn ask(
        &self,
        method: Method,
        target: &Target,
        query: Option<&str>,
        headers: &HeaderMap,
    ) -> Result<Response<OriginBody>, OriginError> {
        let registry = &target.source.registry;
        if headers.contains_key(AUTHORIZATION) {
            return self.ask_endpoints(method, target, query, headers).await;
        }
        if let Some(rest) = self.inner.backoff.remaining(registry, Instant::now()) {
            return Ok(self.too_many(registry, rest));
        }
        let response = self.ask_endpoints(method, target, query, headers).await?;
        if response.status() == StatusCode::TOO_MANY_REQUESTS {
            self.inner.backoff.begin(registry, response.headers(), Instant::now());
        }
        Ok(response)
    }

    /// What the registry would say, had it been asked.
    fn too_many(&self, registry: &str, rest: Duration) -> Response<OriginBody> {
        let mut response = Response::new(self.body(registry, None, Some(0)));
        *response.status_mut() = StatusCode::TOO_MANY_REQUESTS;
        response.headers_mut().insert(RETRY_AFTER, (rest.as_secs() + 1).into());
        response.headers_mut().insert(CONTENT_LENGTH, 0.into());
        response
    }

    /// Asks the registry's endpoints in order. What the last one says counts, unless only an earlier one said something.
    async fn ask_endpoints(
        &self,
        method: Method,
        target: &Target,
        query: Option<&str>,
        headers: &HeaderMap,
    ) -> Result<Response<OriginBody>, OriginError> {
        let settings = self.inner.live.load_full();
        let registry = &target.source.registry;
        let route = Route::to(&settings.registries, registry)?;
        let client = self.client(&settings, &route).map_err(|reason| unreachable(registry, reason))?;
        let headers = self.outgoing(headers);
        let deadline = Instant::now() + HEAD;
        let endpoints = endpoints_for(&route, registry, headers.contains_key(AUTHORIZATION));
        let mut best = None;
        for (i, endpoint) in endpoints.iter().enumerate() {
            let more = i + 1 < endpoints.len();
            let until = if more { deadline.min(Instant::now() + HEAD_OF_MIRROR) } else { deadline };
            let asked = Asked { client: &client, route: &route, registry, proxies: &self.inner.proxies };
            let url = join(endpoint, &target.path(), query);
            let answer = timeout_at(until, asked.follow(&method, url, headers.clone())).await;
            let answer =
                answer.unwrap_or_else(|_| Err(unreachable(registry, "it did not answer in time".into())));
            match answer {
                Ok(response) if !more || settles(response.status()) => {
                    return Ok(self.with_body(registry, &method, response));
                }
                Ok(response) => best = Some(Ok(response)),
                Err(e) if !matches!(best, Some(Ok(_))) => best = Some(Err(e)),
                Err(_) => {}
            }
        }
        let best = best.unwrap_or_else(|| Err(unreachable(registry, "no endpoint is configured".into())));
        best.map(|response| self.with_body(registry, &method, response))
    }

    fn with_body(
        &self,
        registry: &str,
        method: &Method,
        response: Response<Incoming>,
    ) -> Response<OriginBody> {
        let length = if *method == Method::HEAD { None } else { content_length(response.headers()) };
        response.map(|incoming| self.body(registry, Some(incoming), length))
    }

    fn body(&self, registry: &str, incoming: Option<Incoming>, remaining_bytes: Option<u64>) -> OriginBody {
        let (registry, limits) = (registry.to_owned(), self.inner.limits.clone());
        OriginBody { incoming, pending: Bytes::new(), remaining_bytes, registry, limits }
    }

    /// The headers an origin gets: what is passed on of the client's, and who we are.
    fn outgoing(&self, headers: &HeaderMap) -> HeaderMap {
        let mut out = HeaderMap::new();
        for name in PASSED_ON {
            if let Some(value) = headers.get(&name) {
                out.insert(name, value.clone());
            }
        }
        if let Some(authorization) = out.get_mut(AUTHORIZATION) {
            authorization.set_sensitive(true);
        }
        if let Some(accept) = joined(headers, &ACCEPT) {
            out.insert(ACCEPT, accept);
        }
        for via in headers.get_all(VIA) {
            out.append(VIA, via.clone());
        }
        let own = format!("1.1 {}", self.inner.pseudonym);
        out.append(VIA, HeaderValue::try_from(own).expect("hex digits and a name are a header's value"));
        out.insert(USER_AGENT, HeaderValue::from_static(concat!("hawker/", env!("CARGO_PKG_VERSION"))));
        out.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        out
    }

    fn client(&self, settings: &Arc<LiveSettings>, route: &Route) -> Result<HttpClient, String> {
        let mut clients = self.inner.clients.lock().unwrap_or_else(PoisonError::into_inner);
        if !Arc::ptr_eq(&clients.settings, settings) {
            *clients = Clients { settings: Arc::clone(settings), by_right: HashMap::new() };
        }
        let key = (route.trust.clone(), route.reach);
        if let Some(client) = clients.by_right.get(&key) {
            return Ok(client.clone());
        }
        let dialer = Dialer {
            settings: Arc::clone(settings),
            reach: route.reach,
            proxies: Arc::clone(&self.inner.proxies),
        };
        let client = new_client(dialer, &route.trust)?;
        clients.by_right.insert(key, client.clone());
        Ok(client)
    }
}

fn new_client(dialer: Dialer, trust: &Trust) -> Result<HttpClient, String> {
    let connector = HttpsConnectorBuilder::new()
        .with_tls_config(tls::client_config(trust)?)
        .https_or_http()
        .enable_http1()
        .wrap_connector(dialer);
    Ok(Client::builder(TokioExecutor::new())
        .timer(TokioTimer::new())
        .pool_timer(TokioTimer::new())
        .pool_idle_timeout(POOL_IDLE)
        .pool_max_idle_per_host(POOL_PER_HOST)
        .http1_max_buf_size(BUFFER_BYTES)
        .build(connector))
}

/// The endpoints to ask. Credentials go only to the registry itself: to the endpoint on its own host, or to the last one.
fn endpoints_for<'a>(route: &'a Route, registry: &str, authorized: bool) -> &'a [Url] {
    let all = route.endpoints.as_slice();
    if !authorized {
        return all;
    }
    let host = hawker_core::reference::api_host(registry);
    let own = all.iter().position(|url| url.authority().eq_ignore_ascii_case(host));
    let at = own.unwrap_or(all.len().saturating_sub(1));
    all.get(at..=at).unwrap_or(all)
}

/// Whether an answer makes asking the next endpoint pointless.
fn settles(status: StatusCode) -> bool {
    status.as_u16() < 400 || status == StatusCode::RANGE_NOT_SATISFIABLE
}

fn join(endpoint: &Url, path: &str, query: Option<&str>) -> Url {
    let mut url = endpoint.clone();
    url.set_path(&format!("{}{path}", endpoint.path().trim_end_matches('/')));
    url.set_query(query);
    url
}

/// Repeated lines of a header as one.
fn joined(headers: &HeaderMap, name: &HeaderName) -> Option<HeaderValue> {
    let lines: Vec<&[u8]> = headers.get_all(name).iter().map(HeaderValue::as_bytes).collect();
    if lines.is_empty() {
        return None;
    }
    HeaderValue::from_bytes(&lines.join(&b", "[..])).ok()
}

/// The length a response's head announces.
pub(crate) fn content_length(headers: &HeaderMap) -> Option<u64> {
    headers.get(CONTENT_LENGTH)?.to_str().ok()?.trim().parse().ok()
}

/// One endpoint being asked.
struct Asked<'a> {
    client: &'a HttpClient,
    route: &'a Route,
    registry: &'a str,
    proxies: &'a Proxies,
}

impl Asked<'_> {
    async fn follow(
        &self,
        method: &Method,
        mut url: Url,
        mut headers: HeaderMap,
    ) -> Result<Response<Incoming>, OriginError> {
        for _ in 0..=MAX_REDIRECTS {
            let response = self.send(method, &url, &headers).await?;
            let Some(next) = self.redirect(&url, &response)? else { return Ok(response) };
            if next.origin() != url.origin() {
                headers.remove(AUTHORIZATION);
            }
            url = next;
        }
        Err(self.broken(format!("it redirects more than {MAX_REDIRECTS} times")))
    }

    /// Where the response sends us, if it does.
    fn redirect(&self, from: &Url, response: &Response<Incoming>) -> Result<Option<Url>, OriginError> {
        if !matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308) {
            return Ok(None);
        }
        let Some(location) = response.headers().get(LOCATION) else { return Ok(None) };
        let location = location.to_str().map_err(|_| self.broken("its redirect is no address".into()))?;
        let mut to = from.join(location).map_err(|_| self.broken("its redirect is no address".into()))?;
        to.set_fragment(None);
        // Neither fails on an address with a host; a name and password in a redirect are nobody's to use.
        let _ = to.set_username("");
        let _ = to.set_password(None);
        match (from.scheme(), to.scheme()) {
            (_, "https") | ("http", "http") => Ok(Some(to)),
            ("https", "http") if self.route.trust.insecure => Ok(Some(to)),
            (_, scheme) => Err(self.broken(format!("it redirects to {scheme}, which is not safe"))),
        }
    }

    /// Sends, and sends again when the connection ends before an answer's head: one from the pool may be dead, and a registry
    /// behind a balancer resets some. One that can't be connected to is not tried again.
    async fn send(
        &self,
        method: &Method,
        url: &Url,
        headers: &HeaderMap,
    ) -> Result<Response<Incoming>, OriginError> {
        let started = Instant::now();
        let mut left = SENDS;
        loop {
            left -= 1;
            match self.client.request(self.request(method, url, headers)?).await {
                Ok(response) => return Ok(response),
                Err(e) if left == 0 || e.is_connect() || started.elapsed() > SEND_AGAIN_WITHIN => {
                    return Err(self.refused(&e));
                }
                Err(_) => tokio::time::sleep(SEND_AGAIN_AFTER * (SENDS - left - 1)).await,
            }
        }
    }

    fn request(
        &self,
        method: &Method,
        url: &Url,
        headers: &HeaderMap,
    ) -> Result<Request<Empty<Bytes>>, OriginError> {
        let uri: Uri =
            url.as_str().parse().map_err(|_| self.broken("its address can't be used in a request".into()))?;
        let mut request = Request::new(Empty::new());
        *request.method_mut() = method.clone();
        *request.headers_mut() = headers.clone();
        // In a tunnel the proxy's credentials went with CONNECT.
        if let Some(proxy) = self.proxies.to(&uri).filter(|_| url.scheme() == "http")
            && let Some(auth) = proxy.basic_auth()
        {
            let mut auth = auth.clone();
            auth.set_sensitive(true);
            request.headers_mut().insert(PROXY_AUTHORIZATION, auth);
        }
        *request.uri_mut() = uri;
        Ok(request)
    }

    fn refused(&self, error: &legacy::Error) -> OriginError {
        let mut source = error.source();
        while let Some(inner) = source {
            if let Some(ConnectError::Forbidden(_)) = inner.downcast_ref() {
                return OriginError::Forbidden(format!("{} ({inner})", self.registry));
            }
            source = inner.source();
        }
        match error.is_connect() {
            true => unreachable(self.registry, reasons(error)),
            false => self.broken(reasons(error)),
        }
    }

    fn broken(&self, reason: String) -> OriginError {
        OriginError::Broken { registry: self.registry.to_owned(), reason }
    }
}

fn unreachable(registry: &str, reason: String) -> OriginError {
    OriginError::Unreachable { registry: registry.to_owned(), reason }
}

/// An error with all its causes.
fn reasons(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        let more = inner.to_string();
        if !text.ends_with(&more) {
            text = format!("{text}: {more}");
        }
        source = inner.source();
    }
    text
}

#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
