//! Upstream registries: the right to ask them, and the requests to them.
//!
//! [`policy`] says which registries and addresses may be reached, [`connect`] reaches them, [`tls`] believes them or
//! not, [`backoff`] leaves them alone when they ask for it. [`request`] asks one endpoint, by [`auth`] with this
//! node's own right if the client brings none; [`token`] gets that from the registry's realm. [`pass`] hands on the
//! requests of others to them. A blob that a registry does not have itself may be [`elsewhere`]. [`ranges`]
//! understands answers to range requests.

mod auth;
mod backoff;
mod body;
mod connect;
pub(crate) mod elsewhere;
mod endpoints;
pub(crate) mod parking;
mod pass;
mod policy;
pub(crate) mod ranges;
mod request;
mod socks;
mod tls;
mod token;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use bytes::Bytes;
use hawker_oci::digest::Digest;
use hawker_oci::manifest::Part;
use hawker_oci::media_type;
use hawker_oci::reference::Source;
use http::header::{
    ACCEPT, ACCEPT_ENCODING, AUTHORIZATION, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE,
    IF_NONE_MATCH, IF_RANGE, RANGE, USER_AGENT, VIA,
};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Response, StatusCode};
use http_body_util::{Either, Full};
use hyper::body::Incoming;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use tokio::time::{Instant, timeout_at};
use url::Url;

pub(crate) use self::auth::ByCredentials;
use self::auth::Rights;
pub use self::auth::{Exchanged, Granted};
use self::backoff::Backoff;
pub(crate) use self::backoff::is_retry_after;
pub use self::body::OriginBody;
pub(crate) use self::body::PassedBody;
pub(crate) use self::connect::Stream;
use self::connect::{ConnectError, Dialer, Proxies};
use self::elsewhere::{Elsewhere, Remembered};
use self::endpoints::Dead;
use self::parking::Lot;
use self::pass::Upload;
pub(crate) use self::pass::{PassError, Upstream};
pub(crate) use self::policy::is_listed_realm;
use self::policy::{Reach, Route, Trust};
use self::request::{Asked, unreachable};
pub use self::tls::check_identity;
use crate::grant::Authorization;
use crate::limits::Limits;
use crate::metrics::Metrics;
use crate::settings::LiveSettings;
use hawker_credentials::{Credential, Stamp};

/// From the request to the response's head, all endpoints and redirects together. Runtimes wait for 30 s, and then they must have
/// heard that there is nothing.
const HEAD: Duration = Duration::from_secs(25);
/// The same for an endpoint after which there is another one.
const HEAD_OF_MIRROR: Duration = Duration::from_secs(10);
/// A connection that nobody uses.
const POOL_IDLE: Duration = Duration::from_secs(60);
/// Between looks at the files of certificates.
const LOOK_AT_FILES: Duration = Duration::from_millis(200);
/// Idle connections to one host.
const POOL_PER_HOST: usize = 32;
/// Longest head of a response, in bytes. Go's client takes more; registries behind balancers with many cookies send a quarter of it.
const MAX_HEAD_BYTES: usize = 256 << 10;
/// Header lines of a response at most. Each costs 64 bytes while the head is parsed.
const MAX_HEADERS: usize = 2048;
/// The headers of a client's request that an origin gets to see.
const PASSED_ON: [HeaderName; 4] = [RANGE, IF_NONE_MATCH, IF_RANGE, AUTHORIZATION];
/// Our name for registries.
const OWN_NAME: HeaderValue =
    HeaderValue::from_static(concat!("hawker/", env!("CARGO_PKG_VERSION")));

/// The target of a request to a registry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// Registry and repository.
    pub source: Source,
    /// The content in it.
    pub content: Content,
}

/// The content within a repository.
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

impl Content {
    /// The path at the registry.
    fn path(&self, repository: &str) -> String {
        match self {
            Content::Manifest(reference) => format!("/v2/{repository}/manifests/{reference}"),
            Content::Blob(digest) => format!("/v2/{repository}/blobs/{digest}"),
            Content::Tags => format!("/v2/{repository}/tags/list"),
            Content::Referrers(digest) => format!("/v2/{repository}/referrers/{digest}"),
            Content::Ping => "/v2/".to_owned(),
        }
    }
}

/// The change of the configuration that lets a registry be asked, at private addresses too. The text after the
/// registry's name and a space is the reason.
fn how_to_allow(forbidden: &str) -> String {
    let host = forbidden.split(' ').next().unwrap_or_default();
    format!(
        "add [registries.\"{host}\"] with endpoints = [\"https://{host}\"] (http:// if it speaks no TLS) to the daemon's \
         configuration, then send it SIGHUP"
    )
}

/// Marks an answer that came from a URL in a manifest: it says nothing about what the registry has.
#[derive(Clone, Copy)]
pub(crate) struct FromElsewhere;

/// Why the origin gave nothing.
#[derive(Clone, Debug, thiserror::Error)]
pub enum OriginError {
    /// The configuration forbids asking this registry. The caller's fault.
    #[error("registry {0} is not allowed here: {cure}", cure = how_to_allow(.0))]
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
    /// Its body was dropped, since its client did not read while many others waited. The client's fault; asking again helps.
    #[error("the client did not read on while many other responses of registry {registry} waited")]
    GaveWay {
        /// Which.
        registry: String,
    },
}

/// The client of all upstream registries. Cheap to clone.
#[derive(Clone)]
pub struct Origin {
    inner: Arc<Inner>,
}

struct Inner {
    live: Arc<ArcSwap<LiveSettings>>,
    limits: Limits,
    metrics: Arc<Metrics>,
    proxies: Arc<Proxies>,
    pseudonym: String,
    via: HeaderValue,
    current: Mutex<Current>,
    backoff: Backoff,
    dead: Dead,
    elsewhere: Remembered,
    lot: Arc<Lot<OriginBody>>,
}

type HttpClient = Client<HttpsConnector<Dialer>, Sent>;

/// The body of a request: in memory, mostly nothing, or one that passes through.
type Sent = Either<Full<Bytes>, Upload>;

/// The parts that last as long as the settings do.
struct Current {
    settings: Arc<LiveSettings>,
    /// Connections are shared only among requests that trust and may reach the same.
    clients: HashMap<(Trust, Reach), Kept>,
    rights: Arc<Rights>,
}

impl Current {
    fn new(settings: Arc<LiveSettings>) -> Self {
        let rights = Arc::new(Rights::new(Arc::clone(&settings)));
        Self {
            settings,
            clients: HashMap::new(),
            rights,
        }
    }
}

/// A client, and the state of the files that it was made from.
struct Kept {
    client: HttpClient,
    stamps: Vec<Option<Stamp>>,
    /// The time of the last look at the files.
    looked: Instant,
}

/// The clients for one registry, or for its realms.
struct Clients {
    /// For its own hosts: shows the identity that the configuration names.
    home: HttpClient,
    /// For hosts that it redirects to.
    away: HttpClient,
}

/// The means to ask a registry.
struct Means {
    clients: Clients,
    realm_clients: Clients,
    rights: Arc<Rights>,
}

impl Origin {
    /// Whether the configuration lets this registry be asked, as far as that can be told without asking.
    pub(crate) fn may_be_asked(&self, registry: &str) -> bool {
        let registries = &self.inner.live.load().registries;
        Route::to(registries, registry).is_ok_and(|route| route.is_reachable(registries))
    }

    /// A client that reads `live` at each request, and uses the proxy that the environment names.
    pub fn new(live: Arc<ArcSwap<LiveSettings>>, limits: Limits) -> Self {
        Self::beside(live, limits, Vec::new(), Arc::default())
    }

    /// The same, in a daemon whose mirror listens at `own` (a proxy setting that leads there is not followed), and that counts.
    pub fn beside(
        live: Arc<ArcSwap<LiveSettings>>,
        limits: Limits,
        own: Vec<SocketAddr>,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self::through(live, limits, Proxies::from_env(own), metrics)
    }

    fn through(
        live: Arc<ArcSwap<LiveSettings>>,
        limits: Limits,
        proxies: Proxies,
        metrics: Arc<Metrics>,
    ) -> Self {
        let current = Current::new(live.load_full());
        let pseudonym = format!("hawker-{:016x}", rand::random::<u64>());
        let via = HeaderValue::try_from(format!("1.1 {pseudonym}"));
        let inner = Inner {
            live,
            limits,
            metrics,
            proxies: Arc::new(proxies),
            pseudonym,
            via: via.expect("hex digits and a name are a header's value"),
            current: Mutex::new(current),
            backoff: Backoff::new(),
            dead: Dead::new(),
            elsewhere: Remembered::new(),
            lot: Arc::default(),
        };
        Self {
            inner: Arc::new(inner),
        }
    }

    /// This node's name in `Via` headers, new at each start: a request that carries it has come round in a circle.
    pub fn pseudonym(&self) -> &str {
        &self.inner.pseudonym
    }

    /// Drops bodies whose clients have not read on for long, where there are many. To be called each second or so.
    pub(crate) fn sweep_parked(&self) {
        self.inner.lot.sweep(Instant::now());
    }

    /// HEAD. Every status of the origin is an `Ok`; redirects are followed here.
    ///
    /// As with [`Origin::get`] and [`Origin::get_page`], a request without `Authorization` is made with this node's
    /// own right: the token that the registry's realm gives to anybody or, if the configuration says so, for this
    /// node's credentials. A 401 is then the last word. Its challenges are the registry's own, but for those whose
    /// realm is not to be trusted.
    pub async fn head(
        &self,
        target: &Target,
        headers: &HeaderMap,
    ) -> Result<Response<()>, OriginError> {
        Ok(self
            .ask(Method::HEAD, target, None, headers)
            .await?
            .map(drop))
    }

    /// GET, with `headers` (Accept, Range, Authorization …) passed on; redirects are followed here.
    pub async fn get(
        &self,
        target: &Target,
        headers: &HeaderMap,
    ) -> Result<Response<OriginBody>, OriginError> {
        self.ask(Method::GET, target, None, headers).await
    }

    /// HEAD with a query, for lists that come in pages.
    pub async fn head_page(
        &self,
        target: &Target,
        query: Option<&str>,
        headers: &HeaderMap,
    ) -> Result<Response<()>, OriginError> {
        Ok(self
            .ask(Method::HEAD, target, query, headers)
            .await?
            .map(drop))
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

    /// A manifest that was read from `source` names this part: its URLs are remembered.
    pub(crate) fn note_urls(&self, source: &Source, manifest: &Digest, part: &Part) {
        self.inner.elsewhere.note(source, manifest, part);
    }

    /// The other places of the blob, if a manifest of its repository names any.
    pub(crate) fn elsewhere(&self, target: &Target) -> Option<Arc<Elsewhere>> {
        self.inner.elsewhere.of(target)
    }

    /// Asks the registry, unless its backoff for this caller still runs. If the registry answers a GET with 404 and a
    /// manifest names other URLs for the blob, asks those.
    async fn ask(
        &self,
        method: Method,
        target: &Target,
        query: Option<&str>,
        headers: &HeaderMap,
    ) -> Result<Response<OriginBody>, OriginError> {
        let registry = &target.source.registry;
        let whose = (
            registry.clone(),
            Authorization::of(headers).map(|authorization| authorization.hash()),
        );
        if let Some(rest) = self.inner.backoff.remaining(&whose, Instant::now()) {
            return Ok(self.too_many(registry, rest));
        }
        let mut response = self.ask_endpoints(&method, target, query, headers).await?;
        let whole_for_part = response.status() == StatusCode::PARTIAL_CONTENT
            && !headers.contains_key(RANGE)
            && !response.headers().contains_key(CONTENT_RANGE);
        if matches!(target.content, Content::Blob(_))
            && (is_whole(response.status()) || whole_for_part)
        {
            // The bytes are compared with the digest, whatever a registry or a proxy before it calls the success.
            *response.status_mut() = StatusCode::OK;
        }
        match response.status() {
            StatusCode::TOO_MANY_REQUESTS => {
                self.inner
                    .backoff
                    .begin(whose, response.headers(), Instant::now());
            }
            StatusCode::NOT_FOUND if method == Method::GET => {
                return Ok(self
                    .ask_elsewhere(target, headers)
                    .await
                    .unwrap_or(response));
            }
            _ => {}
        }
        Ok(response)
    }

    /// The blob, or the part of it that is asked for, from the first of its URLs that gives it.
    async fn ask_elsewhere(
        &self,
        target: &Target,
        headers: &HeaderMap,
    ) -> Option<Response<OriginBody>> {
        let elsewhere = self.elsewhere(target)?;
        let settings = self.inner.live.load_full();
        let mut headers = self.outgoing(headers);
        headers.remove(AUTHORIZATION);
        let deadline = Instant::now() + HEAD_OF_MIRROR;
        for url in &elsewhere.urls {
            let ask = async {
                let route = Route::elsewhere(&settings.registries, url)?;
                let host = url.host_str().unwrap_or_default();
                let means = self
                    .means(&settings, &route)
                    .map_err(|reason| unreachable(host, reason))?;
                let asked = self.asked(&means, &route, host, url);
                Ok::<_, OriginError>(
                    asked
                        .follow(&Method::GET, url.clone(), headers.clone())
                        .await?
                        .map(Some),
                )
            };
            self.inner.metrics.origin_requests.inc();
            let host = url.host_str().unwrap_or_default();
            match timeout_at(deadline, ask).await {
                Ok(Ok(mut response)) if has_content(response.status()) => {
                    response.extensions_mut().insert(FromElsewhere);
                    if is_whole(response.status()) {
                        *response.status_mut() = StatusCode::OK;
                    }
                    return Some(self.with_body(host, &Method::GET, response));
                }
                Ok(Ok(response)) => {
                    tracing::info!(
                        host,
                        status = response.status().as_u16(),
                        "a layer's URL gave nothing"
                    )
                }
                Ok(Err(reason)) => tracing::info!(host, %reason, "a layer's URL gave nothing"),
                Err(_) => tracing::info!(host, "a layer's URL did not answer in time"),
            }
        }
        None
    }

    /// The answer that the registry would give, had it been asked.
    fn too_many(&self, registry: &str, rest: Duration) -> Response<OriginBody> {
        auth::too_many(Some((rest.as_secs() + 1).into()))
            .map(|none| self.body(registry, none, Some(0)))
    }

    /// Asks the registry's endpoints in order. The last one's answer counts, unless only an earlier one answered.
    async fn ask_endpoints(
        &self,
        method: &Method,
        target: &Target,
        query: Option<&str>,
        headers: &HeaderMap,
    ) -> Result<Response<OriginBody>, OriginError> {
        let settings = self.inner.live.load_full();
        let registry = &target.source.registry;
        let route = Route::to(&settings.registries, registry)?;
        let means = self
            .means(&settings, &route)
            .map_err(|reason| unreachable(registry, reason))?;
        let headers = self.outgoing(headers);
        let own = !headers.contains_key(AUTHORIZATION);
        let deadline = Instant::now() + HEAD;
        let endpoints = if own {
            &route.endpoints[..]
        } else {
            std::slice::from_ref(route.home(registry))
        };
        let endpoints = self.inner.dead.in_order(endpoints, Instant::now());
        let mut best = None;
        for (i, (endpoint, is_dead)) in endpoints.iter().copied().enumerate() {
            if is_dead && matches!(best, Some(Ok(_))) {
                break;
            }
            let more = i + 1 < endpoints.len();
            self.inner.metrics.origin_requests.inc();
            let until = if more {
                deadline.min(Instant::now() + HEAD_OF_MIRROR)
            } else {
                deadline
            };
            let asked = self.asked(&means, &route, registry, endpoint);
            let (url, headers) = (
                join(
                    endpoint,
                    &target.content.path(&target.source.repository),
                    query,
                ),
                headers.clone(),
            );
            let answer = async {
                if own {
                    let repository = &target.source.repository;
                    return Box::pin(asked.by_own_right(
                        &means.rights,
                        repository,
                        method,
                        url,
                        headers,
                    ))
                    .await;
                }
                Ok(asked.follow(method, url, headers).await?.map(Some))
            };
            let answer = timeout_at(until, answer).await;
            let answer = answer
                .unwrap_or_else(|_| Err(unreachable(registry, "it did not answer in time".into())));
            match &answer {
                Err(OriginError::Unreachable { .. }) if endpoints.len() > 1 => {
                    self.inner.dead.note(endpoint, Instant::now());
                }
                Err(_) => {}
                Ok(_) => self.inner.dead.forget(endpoint),
            }
            match answer {
                // A page instead of content is that of something in front of the registry.
                Ok(mut response)
                    if !more || settles(response.status()) && !is_page(response.headers()) =>
                {
                    asked.keep_trusted(response.headers_mut(), own);
                    return Ok(self.with_body(registry, method, response));
                }
                Ok(mut response) => {
                    asked.keep_trusted(response.headers_mut(), own);
                    best = Some(Ok(response));
                }
                Err(e) if !matches!(best, Some(Ok(_))) => best = Some(Err(e)),
                Err(_) => {}
            }
        }
        let best =
            best.unwrap_or_else(|| Err(unreachable(registry, "no endpoint is configured".into())));
        best.map(|response| self.with_body(registry, method, response))
    }

    /// The right that the registry, or its realm, gives for a client's name and password: to read one repository.
    pub async fn exchange(
        &self,
        source: &Source,
        credential: &Credential,
    ) -> Result<Exchanged, OriginError> {
        let settings = self.inner.live.load_full();
        let registry = &source.registry;
        let route = Route::to(&settings.registries, registry)?;
        let means = self
            .means(&settings, &route)
            .map_err(|reason| unreachable(registry, reason))?;
        let asked = self.asked(&means, &route, registry, route.home(registry));
        let headers = self.outgoing(&HeaderMap::new());
        let exchange = Box::pin(asked.exchange(&source.repository, credential, headers));
        timeout_at(Instant::now() + HEAD, exchange)
            .await
            .unwrap_or_else(|_| Err(unreachable(registry, "it did not answer in time".into())))
    }

    fn asked<'a>(
        &'a self,
        means: &'a Means,
        route: &'a Route,
        registry: &'a str,
        endpoint: &'a Url,
    ) -> Asked<'a> {
        Asked {
            clients: &means.clients,
            realm_clients: &means.realm_clients,
            route,
            registry,
            endpoint,
            proxies: &self.inner.proxies,
            via: &self.inner.via,
        }
    }

    fn with_body(
        &self,
        registry: &str,
        method: &Method,
        response: Response<Option<Incoming>>,
    ) -> Response<OriginBody> {
        let length = if *method == Method::HEAD {
            None
        } else {
            content_length(response.headers())
        };
        response.map(|incoming| self.body(registry, incoming, length))
    }

    fn body(
        &self,
        registry: &str,
        incoming: Option<Incoming>,
        remaining_bytes: Option<u64>,
    ) -> OriginBody {
        let (registry, limits) = (registry.to_owned(), self.inner.limits.clone());
        let metrics = Arc::clone(&self.inner.metrics);
        let lot = Arc::clone(&self.inner.lot);
        OriginBody {
            incoming,
            pending: Bytes::new(),
            remaining_bytes,
            registry,
            limits,
            metrics,
            lot,
        }
    }

    /// The headers for an origin: those passed on of the client's, and our name.
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
        out.append(VIA, self.inner.via.clone());
        out.insert(USER_AGENT, OWN_NAME);
        out.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        out
    }

    fn means(&self, settings: &Arc<LiveSettings>, route: &Route) -> Result<Means, String> {
        let mut current = self
            .inner
            .current
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if !Arc::ptr_eq(&current.settings, settings) {
            *current = Current::new(Arc::clone(settings));
        }
        Ok(Means {
            clients: self.clients(&mut current, &route.trust, route.reach)?,
            realm_clients: self.clients(&mut current, &route.trust, route.reach.of_realms())?,
            rights: Arc::clone(&current.rights),
        })
    }

    fn clients(
        &self,
        current: &mut Current,
        trust: &Trust,
        reach: Reach,
    ) -> Result<Clients, String> {
        let home = self.client(current, trust, reach)?;
        let away = match trust.identity {
            Some(_) => self.client(current, &trust.without_identity(), reach)?,
            None => home.clone(),
        };
        Ok(Clients { home, away })
    }

    /// The client for these certificates, made anew when their files have changed. New files that can't be used (a new
    /// certificate without its key, as in the middle of a rotation) change nothing.
    fn client(
        &self,
        current: &mut Current,
        trust: &Trust,
        reach: Reach,
    ) -> Result<HttpClient, String> {
        let (key, now) = ((trust.clone(), reach), Instant::now());
        let kept = current.clients.get(&key);
        if let Some(kept) = kept.filter(|kept| now.duration_since(kept.looked) < LOOK_AT_FILES) {
            return Ok(kept.client.clone());
        }
        let stamps: Vec<_> = trust.files().iter().map(|file| Stamp::of(file)).collect();
        if let Some(kept) = current
            .clients
            .get_mut(&key)
            .filter(|kept| kept.stamps == stamps)
        {
            kept.looked = now;
            return Ok(kept.client.clone());
        }
        let settings = Arc::clone(&current.settings);
        let dialer = Dialer {
            settings,
            reach,
            proxies: Arc::clone(&self.inner.proxies),
        };
        let client = match (new_client(dialer, trust), current.clients.get(&key)) {
            (Ok(client), _) => client,
            (Err(reason), Some(kept)) => {
                tracing::warn!(
                    reason,
                    "changed certificate files can't be used; the ones before still are"
                );
                kept.client.clone()
            }
            (Err(reason), None) => return Err(reason),
        };
        current.clients.insert(
            key,
            Kept {
                client: client.clone(),
                stamps,
                looked: now,
            },
        );
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
        .http1_max_buf_size(MAX_HEAD_BYTES)
        .http1_max_headers(MAX_HEADERS)
        // Go's client accepts both, and some middle boxes write them.
        .http1_allow_obsolete_multiline_headers_in_responses(true)
        .http1_allow_spaces_after_header_name_in_responses(true)
        .build(connector))
}

/// Whether an answer makes asking the next endpoint pointless.
fn settles(status: StatusCode) -> bool {
    has_content(status)
        || matches!(
            status,
            StatusCode::NOT_MODIFIED | StatusCode::RANGE_NOT_SATISFIABLE
        )
}

/// Whether an answer is for people's eyes.
pub(crate) fn is_page(head: &HeaderMap) -> bool {
    let types = head
        .get_all(CONTENT_TYPE)
        .iter()
        .filter_map(|line| line.to_str().ok());
    types
        .filter_map(media_type::normal)
        .any(|told| media_type::is_page(&told))
}

/// Whether an answer with this status brings content, or a part of it.
pub(crate) fn has_content(status: StatusCode) -> bool {
    status.is_success() && !matches!(status, StatusCode::NO_CONTENT | StatusCode::RESET_CONTENT)
}

/// Whether an answer with this status brings the whole content.
fn is_whole(status: StatusCode) -> bool {
    has_content(status) && status != StatusCode::PARTIAL_CONTENT
}

/// The address of `path`, which begins with `/v2/`, at an endpoint.
///
/// An endpoint's path stands before `/v2/`. A path that has a part `v2` of its own (`https://harbor.example/v2/project`) says what
/// stands between `/v2/` and the repository's name, as containerd's `override_path` has it.
fn join(endpoint: &Url, path: &str, query: Option<&str>) -> Url {
    let mut url = endpoint.clone();
    let (base, project) = split(endpoint);
    let rest = path.strip_prefix("/v2/").filter(|rest| !rest.is_empty());
    let path = match (project, rest) {
        (Some(project), Some(rest)) if !project.is_empty() => format!("{base}/v2/{project}/{rest}"),
        _ => format!("{base}{path}"),
    };
    url.set_path(&path);
    url.set_query(query);
    url
}

/// The name of a repository at an endpoint.
fn remote_name(endpoint: &Url, repository: &str) -> String {
    match split(endpoint).1 {
        Some(project) if !project.is_empty() && !repository.is_empty() => {
            format!("{project}/{repository}")
        }
        _ => repository.to_owned(),
    }
}

/// The parts of an endpoint's path before and behind `/v2`, without slashes between them.
fn split(endpoint: &Url) -> (&str, Option<&str>) {
    let path = endpoint.path().trim_end_matches('/');
    match path.strip_suffix("/v2") {
        Some(base) if !base.contains("/v2/") => (base, Some("")),
        _ => match path.split_once("/v2/") {
            Some((base, project)) => (base, Some(project.trim_matches('/'))),
            None => (path, None),
        },
    }
}

/// Repeated lines of a header as one.
fn joined(headers: &HeaderMap, name: &HeaderName) -> Option<HeaderValue> {
    let lines: Vec<&[u8]> = headers
        .get_all(name)
        .iter()
        .map(HeaderValue::as_bytes)
        .collect();
    if lines.is_empty() {
        return None;
    }
    HeaderValue::from_bytes(&lines.join(&b", "[..])).ok()
}

/// The length a response's head announces.
pub(crate) fn content_length(headers: &HeaderMap) -> Option<u64> {
    headers
        .get(CONTENT_LENGTH)?
        .to_str()
        .ok()?
        .trim()
        .parse()
        .ok()
}

#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
