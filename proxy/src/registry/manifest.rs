//! Manifests by digest, from the cache, a seed, or the origin: always what the digest says. Those by tag begin in [`super::tags`].

use std::hash::{Hash, Hasher};
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use hawker_core::digest::{Algorithm, Digest};
use hawker_core::reference::{ManifestRef, Source};
use http::header::{ACCEPT, CONTENT_LENGTH, CONTENT_TYPE, ETAG};
use http::{HeaderMap, HeaderValue, Response, StatusCode};
use tokio::time::timeout;

use super::access::Caller;
use super::auth::{confirm, digest_of, is_page, note_parts, note_refusal, readable};
use super::body::Payload;
use super::error::Problem;
use super::forward::{DOCKER_CONTENT_DIGEST, not_encoded, passed_on, with};
use super::room::{SHORT_BYTES, Taken};
use super::{Answer, Ask, Inner, etag, not_modified, tags};
use crate::coalesce::Coalesced;
use crate::grant::Grant;
use crate::origin::{Content, OriginBody, Target, content_length};
use crate::settings::LiveSettings;
use crate::store::{Place, StoredManifest};

/// A manifest's length at most (distribution spec, "Pushing manifests").
const MAX_BYTES: usize = 4 << 20;
/// From here on a client gets a manifest from its file: one that reads slowly holds no memory.
const FROM_FILE_BYTES: usize = 16 << 10;
/// For a seed to answer before the origin is asked.
const SEED: Duration = Duration::from_secs(10);
/// What a request by digest accepts: the digest says which type it is.
pub(super) const ANY_TYPE: HeaderValue = HeaderValue::from_static(
    "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, \
     application/vnd.docker.distribution.manifest.list.v2+json, \
     application/vnd.docker.distribution.manifest.v2+json, */*",
);

/// A manifest whose bytes match its digest.
#[derive(Clone, Debug)]
pub(super) struct Manifest {
    pub(super) digest: Digest,
    pub(super) media_type: String,
    pub(super) body: Bytes,
    /// Where the body is on disk, if it is there and worth looking for.
    file: Option<Place>,
    /// What else the origin said.
    headers: HeaderMap,
}

/// Downloads of manifests under way: who asks for the same one, with the same right, waits for it.
pub(super) type Fetching = Coalesced<(Caller, Source, Digest, Under), Result<Manifest, Problem>>;

/// The settings that a caller came under. They say what right this node has of its own: what is being fetched with one that it
/// has lost since is not for those who come after.
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

pub(super) async fn manifest(mirror: &Inner, ask: &Ask, reference: &ManifestRef) -> Result<Answer, Problem> {
    match reference {
        ManifestRef::Digest(digest) => {
            let found = by_digest(mirror, ask, digest).await?;
            Ok(if not_modified(&ask.headers, digest) { unchanged(digest) } else { found.answer() })
        }
        ManifestRef::Tag(tag) => Box::pin(tags::by_tag(mirror, ask, tag)).await,
    }
}

/// For a peer, which has made sure of its client's right: status, media type, body.
pub(super) async fn for_peer(mirror: &Inner, grant: Grant, digest: &Digest) -> (u16, String, Bytes) {
    let found = match cached(mirror, digest).await {
        Ok(Some(found)) => Ok(found),
        Err(problem) => Err(problem),
        Ok(None) => fetch_once(mirror, &Ask::of_peer(grant), digest, false).await,
    };
    match found {
        Ok(found) => (StatusCode::OK.as_u16(), found.media_type, found.body),
        Err(problem) => {
            let kind = crate::metrics::RequestKind::Manifest;
            (problem.status().as_u16(), "application/json".to_owned(), problem.body(kind))
        }
    }
}

/// From the cache, a seed, or the origin. Only the origin's own bytes show that the caller may read the repository; whatever is
/// had from elsewhere is confirmed first.
async fn by_digest(mirror: &Inner, ask: &Ask, digest: &Digest) -> Result<Manifest, Problem> {
    if mirror.store.manifest_bytes(digest).is_some() || mirror.seeds.is_some() {
        confirm(mirror, ask, digest, Content::Manifest(digest.to_string())).await?;
        return confirmed(mirror, ask, digest).await;
    }
    fetch_once(mirror, ask, digest, true).await
}

/// The same, once it is confirmed that the caller may have it.
pub(super) async fn confirmed(mirror: &Inner, ask: &Ask, digest: &Digest) -> Result<Manifest, Problem> {
    let Some(found) = cached(mirror, digest).await? else {
        return fetch_once(mirror, ask, digest, true).await;
    };
    // Its parts belong to this repository too, even if it came here through another one.
    note_parts(mirror, ask, &found).await;
    Ok(found)
}

/// Gets a manifest that is not cached; of many who ask at once only one does.
async fn fetch_once(mirror: &Inner, ask: &Ask, digest: &Digest, ask_seed: bool) -> Result<Manifest, Problem> {
    let key = (ask.caller, ask.grant.source.clone(), *digest, Under(mirror.live.load_full()));
    mirror.fetching.run(key, Box::pin(fetch(mirror, ask, digest, ask_seed))).await
}

async fn fetch(mirror: &Inner, ask: &Ask, digest: &Digest, ask_seed: bool) -> Result<Manifest, Problem> {
    if ask_seed && let Some(found) = from_seed(mirror, &ask.grant, digest).await {
        return Ok(keep(mirror, ask, found).await);
    }
    let source = &ask.grant.source;
    let target = Target { source: source.clone(), content: Content::Manifest(digest.to_string()) };
    let mut headers = ask.for_origin();
    headers.insert(ACCEPT, ANY_TYPE);
    let response = mirror.origin.get(&target, &headers).await?;
    if response.status() != StatusCode::OK {
        note_refusal(mirror, ask, response.status());
        return Err(Problem::refusal(response.status(), response.headers()));
    }
    let extensions = response.extensions().clone();
    let found = read(mirror, response, Some(digest), source).await?;
    readable(mirror, ask, &extensions);
    Ok(keep(mirror, ask, found).await)
}

/// What the task's seed has; `None` whenever it is not exactly what was asked for.
async fn from_seed(mirror: &Inner, grant: &Grant, digest: &Digest) -> Option<Manifest> {
    let seeds = mirror.seeds.as_ref()?;
    let (status, media_type, body) = timeout(SEED, seeds.manifest(grant, digest)).await.ok()??;
    if status != StatusCode::OK.as_u16() || HeaderValue::try_from(&media_type).is_err() {
        return None;
    }
    if Digest::of(digest.algorithm(), &body) != *digest {
        tracing::warn!(%digest, "a seed gave a manifest that does not match its digest");
        return None;
    }
    Some(Manifest { digest: *digest, media_type, body, file: None, headers: HeaderMap::new() })
}

/// Reads a manifest from an origin's answer and compares it with its digest: the one asked for, or the one announced.
pub(super) async fn read(
    mirror: &Inner,
    response: Response<OriginBody>,
    digest: Option<&Digest>,
    source: &Source,
) -> Result<Manifest, Problem> {
    not_encoded(response.headers(), source)?;
    if is_page(response.headers()) {
        return Err(Problem::NoManifest);
    }
    let (head, mut incoming) = response.into_parts();
    let announced = content_length(&head.headers).unwrap_or(0);
    if announced > MAX_BYTES as u64 {
        return Err(Problem::TooLong(MAX_BYTES));
    }
    let mut taken = mirror.room.take(announced as usize).await?;
    let mut body = BytesMut::with_capacity(announced as usize);
    while let Some(data) = incoming.next().await.transpose()? {
        let before = body.len();
        if before + data.len() > MAX_BYTES {
            return Err(Problem::TooLong(MAX_BYTES));
        }
        // It did not say how long it is.
        if announced == 0 && before <= SHORT_BYTES && before + data.len() > SHORT_BYTES {
            taken = mirror.room.take(MAX_BYTES).await?;
        }
        body.extend_from_slice(&data);
    }
    let body = taken.by(body.freeze());
    if body.trim_ascii_start().first() != Some(&b'{') {
        return Err(Problem::NoManifest);
    }
    let expected = digest.copied().or_else(|| digest_of(&head.headers));
    let algorithm = expected.map_or(Algorithm::Sha256, |d: Digest| d.algorithm());
    let actual = Digest::of(algorithm, &body);
    if let Some(expected) = expected.filter(|expected| *expected != actual) {
        return Err(Problem::WrongManifest(expected));
    }
    let media_type = head.headers.get(CONTENT_TYPE).and_then(|t| t.to_str().ok());
    let media_type = media_type.unwrap_or("application/octet-stream").to_owned();
    Ok(Manifest { digest: actual, media_type, body, file: None, headers: passed_on(&head.headers) })
}

impl Manifest {
    /// One that the store has.
    fn kept(digest: Digest, kept: StoredManifest, taken: Taken) -> Self {
        let StoredManifest { media_type, body, place } = kept;
        let file = (body.len() >= FROM_FILE_BYTES).then_some(place);
        Self { digest, media_type, body: taken.by(body), file, headers: HeaderMap::new() }
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

    /// What a client gets of it.
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

/// What is cached of it; an error only when there is no room for it in memory.
pub(super) async fn cached(mirror: &Inner, digest: &Digest) -> Result<Option<Manifest>, Problem> {
    let Some(bytes) = mirror.store.manifest_bytes(digest) else { return Ok(None) };
    let taken = mirror.room.take(usize::try_from(bytes).unwrap_or(usize::MAX)).await?;
    let (store, digest) = (mirror.store.clone(), *digest);
    let read = move || store.manifest(&digest).map(|kept| Manifest::kept(digest, kept, taken));
    Ok(tokio::task::spawn_blocking(read).await.ok().flatten())
}

/// Keeps a manifest, and the knowledge of what belongs to its repository.
pub(super) async fn keep(mirror: &Inner, ask: &Ask, mut found: Manifest) -> Manifest {
    note_parts(mirror, ask, &found).await;
    let (store, kept) = (mirror.store.clone(), found.clone());
    let put = move || store.put_manifest(&kept.digest, &kept.media_type, &kept.body);
    match tokio::task::spawn_blocking(put).await {
        Ok(Ok(place)) => found.file = place.filter(|_| found.body.len() >= FROM_FILE_BYTES),
        Ok(Err(reason)) => tracing::warn!(%reason, "the manifest is not kept"),
        Err(_) => {}
    }
    found
}
