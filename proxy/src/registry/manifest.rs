//! Manifests by digest, from the cache, a seed, or the origin: always what the digest says. Those by tag begin in [`super::tags`].

use std::hash::{Hash, Hasher};
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use hawker_oci::digest::{Algorithm, Digest};
use hawker_oci::reference::{ManifestRef, Source};
use hawker_oci::{media_type, schema_1};
use http::header::{ACCEPT, ACCEPT_RANGES, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, ETAG};
use http::{HeaderMap, HeaderValue, Response, StatusCode};
use serde_json::Value;
use tokio::time::{Instant, timeout};

use super::access::Caller;
use super::auth::{confirm, digests_of, note_parts, note_refusal, readable};
use super::body::Payload;
use super::error::Problem;
use super::forward::{DOCKER_CONTENT_DIGEST, is_whole_range, not_encoded, passed_on, with};
use super::room::{SHORT_BYTES, Taken};
use super::told::told;
use super::{Answer, Ask, Inner, etag, not_modified, tags};
use crate::coalesce::Coalesced;
use crate::grant::Grant;
use crate::origin::{Content, OriginBody, Target, content_length, has_content, is_page};
use crate::settings::LiveSettings;
use crate::store::{Place, StoredManifest};
use hawker_lanes::{self as lanes, Lane};

/// A manifest's length at most (distribution spec, "Pushing manifests").
const MAX_BYTES: usize = 4 << 20;
/// From here on a client gets a manifest from its file: one that reads slowly holds no memory.
const FROM_FILE_BYTES: usize = 16 << 10;
/// For a seed to answer before the origin is asked.
const SEED: Duration = Duration::from_secs(10);
/// The types that a request by digest accepts besides the client's: the digest says which type it is.
const ANY_TYPE: [&str; 8] = [
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.docker.distribution.manifest.v2+json",
    "application/vnd.oci.artifact.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v1+prettyjws",
    "application/vnd.docker.distribution.manifest.v1+json",
    "*/*",
];

/// A manifest whose bytes match its digest; of a signed one of docker's first schema, its payload.
#[derive(Clone, Debug)]
pub(super) struct Manifest {
    pub(super) digest: Digest,
    /// A header's value.
    pub(super) media_type: String,
    pub(super) body: Bytes,
    /// The body does not hash to the digest, its payload does: it is passed on and not kept.
    pub(super) is_signed: bool,
    /// The place of the body on disk, if it is there and worth looking for.
    file: Option<Place>,
    /// The other headers of the origin.
    headers: HeaderMap,
}

/// Downloads of manifests under way: requests for the same one, with the same right and the same `Accept`, wait for it.
pub(super) type Fetching =
    Coalesced<(Caller, Source, Digest, HeaderValue, Under), Result<Manifest, Problem>>;

/// The settings that a caller came under. They tell the own right of this node: a fetch by a right that it has lost
/// since is not for later callers.
#[derive(Clone)]
pub(super) struct Under(Arc<LiveSettings>);

impl PartialEq for Under {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for Under {}

impl Hash for Under {
    fn hash<H: Hasher>(&self, state: &mut H) {
        Arc::as_ptr(&self.0).hash(state);
    }
}

pub(super) async fn manifest(
    mirror: &Inner,
    ask: &Ask,
    reference: &ManifestRef,
) -> Result<Answer, Problem> {
    match reference {
        ManifestRef::Digest(digest) => {
            let found = by_digest(mirror, ask, digest).await?;
            Ok(if not_modified(&ask.headers, digest) {
                unchanged(digest)
            } else {
                found.answer()
            })
        }
        ManifestRef::Tag(tag) => Box::pin(tags::by_tag(mirror, ask, tag)).await,
    }
}

/// For a peer, which has made sure of its client's right: status, media type, body, whether the registry that the peer names has
/// given it. Content from elsewhere is asked of that registry once, for all peers.
pub(super) async fn for_peer(
    mirror: &Inner,
    grant: Grant,
    digest: &Digest,
) -> (u16, String, Bytes, bool) {
    let registry = grant.source.registry.clone();
    let ask = Ask::of_peer(grant);
    let given = mirror.proofs.has_proved(&registry, digest).await;
    let is_enough = given
        || mirror.live.load().registries.is_believed(&registry)
        || mirror.proofs.has_failed(&registry, digest);
    let found = match cached(mirror, &ask.grant.source, digest).await {
        Ok(Some(found)) if is_enough => Ok((found, given)),
        Ok(Some(found)) => match fetch_once(mirror, &ask, digest, false).await {
            Ok(found) => Ok((found, true)),
            Err(reason) => {
                tracing::info!(registry, %digest, %reason, "the registry has not given a manifest that is here");
                mirror.proofs.note_failure(&registry, digest);
                Ok((found, false))
            }
        },
        Ok(None) => fetch_once(mirror, &ask, digest, false)
            .await
            .map(|found| (found, true)),
        Err(problem) => Err(problem),
    };
    match found {
        // The peer could not compare it with its digest.
        Ok((found, _)) if found.is_signed => (
            StatusCode::NOT_FOUND.as_u16(),
            "application/json".to_owned(),
            Bytes::new(),
            false,
        ),
        Ok((found, given)) => (StatusCode::OK.as_u16(), found.media_type, found.body, given),
        Err(problem) => {
            let kind = crate::metrics::RequestKind::Manifest;
            (
                problem.status().as_u16(),
                "application/json".to_owned(),
                problem.body(kind),
                false,
            )
        }
    }
}

/// From the cache, a seed, or the origin. Only the origin's own bytes show that the caller may read the repository;
/// bytes from elsewhere are confirmed first.
async fn by_digest(mirror: &Inner, ask: &Ask, digest: &Digest) -> Result<Manifest, Problem> {
    if mirror.store.manifest_bytes(digest).is_some() || mirror.seeds.is_some() {
        confirm(mirror, ask, digest, Content::Manifest(digest.to_string())).await?;
        return confirmed(mirror, ask, digest).await;
    }
    fetch_once(mirror, ask, digest, false).await
}

/// The same, once it is confirmed that the caller may have it.
pub(super) async fn confirmed(
    mirror: &Inner,
    ask: &Ask,
    digest: &Digest,
) -> Result<Manifest, Problem> {
    // A manifest that came here from elsewhere is not for the clients of a registry that has not given it.
    let is_theirs = is_for_clients_of(mirror, ask, digest).await;
    let Some(found) = (if is_theirs {
        cached(mirror, &ask.grant.source, digest).await?
    } else {
        None
    }) else {
        return fetch_once(mirror, ask, digest, true).await;
    };
    // Its parts belong to this repository too, even if it came here through another one.
    note_parts(mirror, ask, &found).await;
    Ok(found)
}

/// Whether the content here may go to a client of this registry: a registry that is believed, or has given it.
pub(super) async fn is_for_clients_of(mirror: &Inner, ask: &Ask, digest: &Digest) -> bool {
    mirror
        .proofs
        .knows(&mirror.live.load_full(), &ask.grant.source.registry, digest)
        .await
}

/// Gets a manifest that is not cached; of many who ask at once only one does.
pub(super) async fn fetch_once(
    mirror: &Inner,
    ask: &Ask,
    digest: &Digest,
    ask_seed: bool,
) -> Result<Manifest, Problem> {
    let under = Under(mirror.live.load_full());
    let key = (
        ask.caller,
        ask.grant.source.clone(),
        *digest,
        ask.accept(),
        under,
    );
    mirror
        .fetching
        .run(key, Box::pin(fetch(mirror, ask, digest, ask_seed)))
        .await
}

async fn fetch(
    mirror: &Inner,
    ask: &Ask,
    digest: &Digest,
    ask_seed: bool,
) -> Result<Manifest, Problem> {
    let source = &ask.grant.source;
    if ask_seed
        && let Some((found, given)) = from_seed(mirror, &ask.grant, digest).await
        && (given || is_for_clients_of(mirror, ask, digest).await)
    {
        let found = keep(mirror, ask, found).await;
        if given {
            mirror.proofs.note(&source.registry, digest);
        }
        return Ok(found);
    }
    let target = Target {
        source: source.clone(),
        content: Content::Manifest(digest.to_string()),
    };
    let mut headers = ask.for_origin();
    headers.insert(ACCEPT, ask.accept());
    let response = mirror.origin.get(&target, &headers).await?;
    if !has_content(response.status()) {
        note_refusal(mirror, ask, response.status());
        if response.status() == StatusCode::NOT_FOUND {
            mirror.access.gone(source, digest);
        }
        return Err(Problem::refusal(response.status(), response.headers()));
    }
    let extensions = response.extensions().clone();
    mirror.told.note(source, digest, response.headers());
    let found = read(mirror, response, Some(digest), source).await?;
    readable(mirror, ask, &extensions);
    mirror.access.belongs(
        source,
        digest,
        Some(found.body.len() as u64),
        Instant::now(),
    );
    let found = keep(mirror, ask, found).await;
    // One that is signed inside was not compared with the digest.
    if !found.is_signed {
        mirror.proofs.note(&source.registry, digest);
    }
    Ok(found)
}

/// The manifest of the task's seed, and whether this registry gave it to the seed; `None` if it is not exactly the
/// requested one.
async fn from_seed(mirror: &Inner, grant: &Grant, digest: &Digest) -> Option<(Manifest, bool)> {
    let seeds = mirror.seeds.as_ref()?;
    // The media type is not the seed's to say: it may know the manifest from another registry.
    let (status, _, body, given) = timeout(SEED, seeds.manifest(grant, digest)).await.ok()??;
    if status != StatusCode::OK.as_u16() {
        return None;
    }
    if Digest::of(digest.algorithm(), &body) != *digest {
        tracing::warn!(%digest, "a seed gave a manifest that does not match its digest");
        return None;
    }
    let told = mirror.told.get(&grant.source, digest);
    let media_type = media_type::media_type(&body, told.as_deref());
    let headers = HeaderMap::new();
    let found = Manifest {
        digest: *digest,
        media_type,
        body,
        is_signed: false,
        file: None,
        headers,
    };
    Some((found, given))
}

/// Reads a manifest from an origin's answer and compares it with its digest: the requested one, or the announced one.
/// A body that matches is right, however the answer describes it.
pub(super) async fn read(
    mirror: &Inner,
    response: Response<OriginBody>,
    digest: Option<&Digest>,
    source: &Source,
) -> Result<Manifest, Problem> {
    let (head, mut incoming) = response.into_parts();
    let announced: Vec<Digest> = match digest {
        Some(digest) => vec![*digest],
        None => digests_of(&head.headers).collect(),
    };
    if announced.is_empty() {
        not_encoded(&head.headers, source)?;
        if is_page(&head.headers) {
            return Err(Problem::NoManifest);
        }
    }
    let length = content_length(&head.headers).unwrap_or(0);
    if length > MAX_BYTES as u64 {
        return Err(Problem::TooLong(MAX_BYTES));
    }
    let mut taken = mirror.room.take(length as usize).await?;
    let mut body = BytesMut::with_capacity(length as usize);
    while let Some(data) = incoming.next().await.transpose()? {
        let before = body.len();
        if before + data.len() > MAX_BYTES {
            return Err(Problem::TooLong(MAX_BYTES));
        }
        // It did not say how long it is.
        if length == 0 && before <= SHORT_BYTES && before + data.len() > SHORT_BYTES {
            taken = mirror.room.take(MAX_BYTES).await?;
        }
        body.extend_from_slice(&data);
    }
    let body = taken.by(body.freeze());
    let (told, seen) = (told(&head.headers), body.clone());
    let judge = move || {
        (
            identified(&seen, &announced),
            media_type::media_type(&seen, told.as_deref()),
            announced,
        )
    };
    let (identified, media_type, announced) = match body.len() {
        ..=SHORT_BYTES => judge(),
        _ => lanes::run(Lane::Clients, judge)
            .await
            .ok_or(Problem::Slow)?,
    };
    let Some((digest, is_signed)) = identified else {
        not_encoded(&head.headers, source)?;
        return Err(match announced.first() {
            Some(digest) if !is_page(&head.headers) && is_object(&body) => {
                Problem::WrongManifest(*digest)
            }
            _ => Problem::NoManifest,
        });
    };
    if announced.is_empty() && is_error(&body) {
        return Err(Problem::NoManifest);
    }
    if announced.is_empty() && !is_all(head.status, &head.headers, body.len()) {
        return Err(Problem::Odd(head.status));
    }
    let mut headers = passed_on(&head.headers);
    headers.remove(CONTENT_RANGE);
    headers.remove(ACCEPT_RANGES);
    Ok(Manifest {
        digest,
        media_type,
        body,
        is_signed,
        file: None,
        headers,
    })
}

/// Whether a document is a registry's error and no manifest.
fn is_error(body: &[u8]) -> bool {
    const OF_MANIFESTS: [&str; 4] = ["schemaVersion", "mediaType", "manifests", "layers"];
    let document = (body.len() <= SHORT_BYTES)
        .then(|| serde_json::from_slice::<Value>(body).ok())
        .flatten();
    let has = |key: &str| {
        document
            .as_ref()
            .is_some_and(|document| document.get(key).is_some())
    };
    has("errors") && !OF_MANIFESTS.into_iter().any(has)
}

fn is_object(body: &[u8]) -> bool {
    body.trim_ascii_start().first() == Some(&b'{')
}

/// The digest of a manifest's body, or of the payload that was signed (`true`), which is one of those announced if any is. `None`
/// for what matches none, or is no whole document.
fn identified(body: &[u8], announced: &[Digest]) -> Option<(Digest, bool)> {
    if !is_object(body) {
        return None;
    }
    if announced.is_empty() && media_type::is_whole(body) {
        let payload = schema_1::digest(body, Algorithm::Sha256);
        return Some(payload.map_or_else(
            || (Digest::of(Algorithm::Sha256, body), false),
            |digest| (digest, true),
        ));
    }
    let is_whole = |announced: &&Digest| Digest::of(announced.algorithm(), body) == **announced;
    let is_payload =
        |announced: &&Digest| schema_1::digest(body, announced.algorithm()) == Some(**announced);
    let whole = announced
        .iter()
        .find(is_whole)
        .map(|digest| (*digest, false));
    whole.or_else(|| {
        announced
            .iter()
            .find(is_payload)
            .map(|digest| (*digest, true))
    })
}

/// Whether an answer whose bytes nothing else proves is a whole one: a 203 comes from a proxy that has looked at it.
fn is_all(status: StatusCode, head: &HeaderMap, bytes: usize) -> bool {
    match status {
        StatusCode::OK | StatusCode::NON_AUTHORITATIVE_INFORMATION => true,
        StatusCode::PARTIAL_CONTENT => is_whole_range(head, bytes as u64),
        _ => false,
    }
}

impl Ask {
    /// The types that the origin is asked for by digest: the client's own first, since some registries take them
    /// literally, then all known ones.
    pub(super) fn accept(&self) -> HeaderValue {
        let lines = self
            .headers
            .get_all(ACCEPT)
            .iter()
            .filter_map(|line| line.to_str().ok());
        let mut accept: Vec<&str> = lines
            .flat_map(|line| line.split(','))
            .map(str::trim)
            .filter(|range| !range.is_empty())
            .collect();
        let bare = |range: &str| {
            range
                .split(';')
                .next()
                .unwrap_or_default()
                .trim()
                .to_ascii_lowercase()
        };
        let named: Vec<String> = accept.iter().map(|range| bare(range)).collect();
        accept.extend(
            ANY_TYPE
                .iter()
                .filter(|known| !named.iter().any(|named| named == *known)),
        );
        HeaderValue::from_str(&accept.join(", ")).unwrap_or(HeaderValue::from_static("*/*"))
    }
}

impl Manifest {
    /// One that the store has.
    fn kept(digest: Digest, kept: StoredManifest, told: Option<&str>, taken: Taken) -> Self {
        let StoredManifest { body, place } = kept;
        let media_type = media_type::media_type(&body, told);
        let file = (body.len() >= FROM_FILE_BYTES).then_some(place);
        let headers = HeaderMap::new();
        Self {
            digest,
            media_type,
            body: taken.by(body),
            is_signed: false,
            file,
            headers,
        }
    }

    pub(super) fn answer(self) -> Answer {
        let mut headers = self.headers.clone();
        headers.insert(CONTENT_LENGTH, self.body.len().into());
        headers.extend(identity(&self.digest));
        if let Ok(media_type) = HeaderValue::try_from(&self.media_type) {
            headers.insert(CONTENT_TYPE, media_type);
        }
        with(StatusCode::OK, headers, self.payload())
    }

    /// The payload for a client.
    pub(super) fn payload(self) -> Payload {
        match self.file {
            Some((file, range)) => Payload::File(file, range),
            None => Payload::Full(self.body),
        }
    }
}

/// The headers that say which content this is.
pub(super) fn identity(digest: &Digest) -> HeaderMap {
    let plain = HeaderValue::try_from(digest.to_string()).expect("a digest is a header's value");
    HeaderMap::from_iter([(DOCKER_CONTENT_DIGEST, plain), (ETAG, etag(digest))])
}

/// 304.
pub(super) fn unchanged(digest: &Digest) -> Answer {
    with(StatusCode::NOT_MODIFIED, identity(digest), Payload::Empty)
}

/// The cached manifest; an error only when there is no room for it in memory.
pub(super) async fn cached(
    mirror: &Inner,
    source: &Source,
    digest: &Digest,
) -> Result<Option<Manifest>, Problem> {
    let Some(bytes) = mirror.store.manifest_bytes(digest) else {
        return Ok(None);
    };
    let taken = mirror
        .room
        .take(usize::try_from(bytes).unwrap_or(usize::MAX))
        .await?;
    let (store, digest) = (mirror.store.clone(), *digest);
    let told = mirror.told.get(source, &digest);
    let read = move || {
        store
            .manifest(&digest)
            .map(|kept| Manifest::kept(digest, kept, told.as_deref(), taken))
    };
    Ok(lanes::run(Lane::Clients, read).await.flatten())
}

/// Keeps a manifest, and the knowledge of what belongs to its repository with it.
pub(super) async fn keep(mirror: &Inner, ask: &Ask, mut found: Manifest) -> Manifest {
    note_parts(mirror, ask, &found).await;
    if found.is_signed {
        return found;
    }
    let (store, kept) = (mirror.store.clone(), found.clone());
    let put = move || store.put_manifest(&kept.digest, &kept.body);
    match lanes::run(Lane::Clients, put).await {
        Some(Ok(place)) => found.file = place.filter(|_| found.body.len() >= FROM_FILE_BYTES),
        Some(Err(reason)) => tracing::warn!(%reason, "the manifest is not kept"),
        None => {}
    }
    found
}
