//! The registry mirror that runtimes talk to: HTTP/1.1, the pull side of the OCI distribution spec.
//!
//! A request goes [`head`] → [`route`] → [`tags`], [`manifest`] or [`blob`] → back through [`error`] if it failed → [`body`] onto
//! the [`wire`]. [`auth`] makes sure that the caller may have it, [`access`] remembers that; [`token`] is the realm of token
//! mode; [`recheck`] notices who asks again; [`stored`] reads what an earlier run committed; [`multipart`] makes one body of several ranges; [`connection`] is the life of a connection, [`places`] who gets one, [`tunnel`] what some become.

mod access;
mod auth;
mod blob;
mod body;
mod connection;
mod error;
mod forward;
pub(crate) mod head;
mod manifest;
mod multipart;
mod places;
mod recheck;
mod room;
mod route;
mod stored;
mod tags;
pub mod tls;
mod token;
mod told;
mod tunnel;
mod wire;

use std::future::Future;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use bytes::Bytes;
use hawker_core::right::Bearer;
use hawker_oci::digest::Digest;
use hawker_oci::reference::Source;
use http::header::IF_NONE_MATCH;
use http::request::Parts;
use http::{HeaderMap, HeaderValue, Request, Response};
use hyper::body::Incoming;
use rustls::ServerConfig;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

pub(crate) use self::body::Payload;
pub(crate) use self::connection::{Becomes, Reply, Replying, Service};
pub(crate) use self::error::Problem;
use self::route::Ask;
use crate::applications::Desk;
use crate::flight::Flights;
use crate::grant::{Authorization, Grant};
use crate::metrics::Metrics;
use crate::origin::Origin;
use crate::peer::{ManifestAnswer, ManifestSource};
use crate::proof::Proofs;
use crate::settings::LiveSettings;
use crate::store::Store;

pub(crate) type Answer = Response<Payload>;

/// Status, media type and body of a manifest, and whether the registry asked about gave it to the seed; `None` when there is no
/// seed, or none that answers.
pub type SeedAnswer<'a> =
    Pin<Box<dyn Future<Output = Option<(u16, String, Bytes, bool)>> + Send + 'a>>;

/// Asks the seed that a manifest belongs to.
pub trait SeedManifests: Send + Sync + 'static {
    /// Asks for the manifest with this digest.
    fn manifest<'a>(&'a self, grant: &'a Grant, digest: &'a Digest) -> SeedAnswer<'a>;
}

/// The parts that a [`Mirror`] works with.
pub struct MirrorConfig {
    /// The blobs on disk.
    pub store: Store,
    /// Downloads.
    pub flights: Flights,
    /// Upstream registries.
    pub origin: Origin,
    /// Which of them have which content.
    pub proofs: Arc<Proofs>,
    /// The seeds that are asked for manifests before the origin is; `None` on a node without peers, and on a seed.
    pub seeds: Option<Arc<dyn SeedManifests>>,
    /// Settings that may change.
    pub live: Arc<ArcSwap<LiveSettings>>,
    /// The counters.
    pub metrics: Arc<Metrics>,
    /// The purposes of pulls.
    pub desk: Arc<Desk>,
    /// How long a client's pull goes on without a word after its token has run out.
    pub pull_grace: Duration,
}

/// The registry mirror. Cheap to clone.
#[derive(Clone)]
pub struct Mirror {
    inner: Arc<Inner>,
}

struct Inner {
    store: Store,
    flights: Flights,
    origin: Origin,
    proofs: Arc<Proofs>,
    seeds: Option<Arc<dyn SeedManifests>>,
    live: Arc<ArcSwap<LiveSettings>>,
    metrics: Arc<Metrics>,
    desk: Arc<Desk>,
    access: Arc<access::Access>,
    tokens: token::Tokens,
    fetching: manifest::Fetching,
    proving: blob::Proving,
    room: room::Room,
    tags: tags::Tags,
    told: told::Told,
    rechecks: Arc<recheck::Rechecks>,
    places: Arc<places::Places>,
}

impl Mirror {
    /// A mirror that knows nothing yet.
    pub fn new(config: MirrorConfig) -> Self {
        let MirrorConfig {
            store,
            flights,
            origin,
            proofs,
            seeds,
            live,
            metrics,
            desk,
            pull_grace,
        } = config;
        let rechecks = Arc::new(recheck::Rechecks::new(flights.clone()));
        Self {
            inner: Arc::new(Inner {
                store,
                flights,
                origin,
                proofs,
                seeds,
                live,
                metrics,
                desk,
                access: Arc::new(access::Access::new(pull_grace)),
                tokens: token::Tokens::new(),
                fetching: manifest::Fetching::default(),
                proving: blob::Proving::default(),
                room: room::Room::new(),
                tags: tags::Tags::new(),
                told: told::Told::new(),
                rechecks,
                places: Arc::new(places::Places::new()),
            }),
        }
    }

    /// The counters.
    pub(crate) fn metrics(&self) -> &Metrics {
        &self.inner.metrics
    }

    /// Serves until `stop` is cancelled; then bodies under way may go on for `drain`, and end short after that.
    pub async fn serve(&self, listener: TcpListener, stop: CancellationToken, drain: Duration) {
        self.serve_as(Arc::new(self.clone()), listener, stop, drain)
            .await;
    }

    /// The same for another service, in front of this mirror.
    pub(crate) async fn serve_as(
        &self,
        service: Arc<dyn Service>,
        listener: TcpListener,
        stop: CancellationToken,
        drain: Duration,
    ) {
        let (metrics, places) = (
            Arc::clone(&self.inner.metrics),
            Arc::clone(&self.inner.places),
        );
        connection::serve(service, metrics, places, listener, stop, drain).await;
    }

    /// Whether a request with these headers has passed through this daemon before.
    pub(crate) fn has_seen(&self, headers: &HeaderMap) -> bool {
        route::is_loop(headers, self.inner.origin.pseudonym())
    }

    /// Answers a request that was meant for `registry` (in its one spelling) as that would have.
    pub(crate) async fn answer_as(&self, registry: &str, request: Parts, client: IpAddr) -> Answer {
        self.answered(request, Some(registry), client).await
    }

    async fn answered(&self, request: Parts, at: Option<&str>, client: IpAddr) -> Answer {
        let mut answer = route::answer(&self.inner, request, at, client).await;
        auth::Underway::begin(&self.inner, &mut answer);
        answer
    }
}

impl Service for Mirror {
    fn answer(&self, request: Request<Incoming>, client: IpAddr) -> Replying<'_> {
        Box::pin(async move {
            let (request, body) = request.into_parts();
            Reply::Answer(match token::is_for_token(&request) {
                true => token::answer(&self.inner, request, body).await,
                false => self.answered(request, None, client).await,
            })
        })
    }

    fn tls(&self) -> Option<Arc<ServerConfig>> {
        self.inner.live.load().tls.clone()
    }
}

impl ManifestSource for Mirror {
    fn manifest(
        &self,
        source: Source,
        digest: Digest,
        token: Option<Bearer>,
    ) -> ManifestAnswer<'_> {
        let grant = Grant {
            source,
            authorization: token.as_ref().and_then(Authorization::bearer),
        };
        Box::pin(async move { manifest::for_peer(&self.inner, grant, &digest).await })
    }
}

/// The `ETag` of content with this digest.
fn etag(digest: &Digest) -> HeaderValue {
    HeaderValue::try_from(format!("\"{digest}\"")).expect("a quoted digest is a header's value")
}

/// Whether the client says it has this content already (RFC 9110, 13.1.2).
fn not_modified(headers: &HeaderMap, digest: &Digest) -> bool {
    let own = format!("\"{digest}\"");
    let lines = headers
        .get_all(IF_NONE_MATCH)
        .iter()
        .filter_map(|line| line.to_str().ok());
    lines
        .flat_map(|line| line.split(','))
        .map(str::trim)
        .any(|tag| tag == "*" || tag.strip_prefix("W/").unwrap_or(tag) == own)
}

#[cfg(test)]
mod tests;
