//! Manifests: by tag straight from the origin, by digest from the cache, a seed, or the origin; always what the digest says.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use hawker_core::digest::{Algorithm, Digest};
use hawker_core::reference::{ManifestRef, Source};
use http::header::{ACCEPT, CONTENT_LENGTH, CONTENT_TYPE, ETAG};
use http::{HeaderMap, HeaderValue, Method, Response, StatusCode};
use serde::Deserialize;
use tokio::sync::OnceCell;
use tokio::time::{Instant, timeout};

use super::access::Standing;
use super::body::Payload;
use super::error::Problem;
use super::forward::{DOCKER_CONTENT_DIGEST, forward, forward_head, not_encoded, passed_on, with};
use super::{Answer, Ask, Inner, etag, not_modified};
use crate::origin::{Content, OriginBody, Target, content_length};

/// A manifest's length at most (distribution spec, "Pushing manifests").
const MAX_BYTES: usize = 4 << 20;
/// For a seed to answer before the origin is asked.
const SEED: Duration = Duration::from_secs(10);
/// What a request by digest accepts: the digest says which type it is.
const ANY_TYPE: HeaderValue = HeaderValue::from_static(
    "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, \
     application/vnd.docker.distribution.manifest.list.v2+json, \
     application/vnd.docker.distribution.manifest.v2+json, */*",
);

/// A manifest whose bytes match its digest.
#[derive(Clone, Debug)]
struct Manifest {
    digest: Digest,
    media_type: String,
    body: Bytes,
    /// What else the origin said.
    headers: HeaderMap,
}

/// Downloads of manifests under way: who asks for the same one waits for it.
#[derive(Default)]
pub(super) struct Fetching(Mutex<HashMap<(Source, Digest), Arc<Fetch>>>);

type Fetch = OnceCell<Result<Manifest, Problem>>;

pub(super) async fn manifest(mirror: &Inner, ask: &Ask, reference: &ManifestRef) -> Result<Answer, Problem> {
    match reference {
        ManifestRef::Digest(digest) if !ask.authorized() => {
            let found = by_digest(mirror, &ask.source, digest, true).await?;
            Ok(if not_modified(&ask.headers, digest) { unchanged(digest) } else { found.answer() })
        }
        ManifestRef::Digest(digest) => straight(mirror, ask, digest.to_string(), Some(digest)).await,
        ManifestRef::Tag(tag) => straight(mirror, ask, tag.clone(), None).await,
    }
}

/// For a peer: status, media type, body.
pub(super) async fn for_peer(mirror: &Inner, source: &Source, digest: &Digest) -> (u16, String, Bytes) {
    match by_digest(mirror, source, digest, false).await {
        Ok(found) => (StatusCode::OK.as_u16(), found.media_type, found.body),
        Err(problem) => {
            let kind = crate::metrics::RequestKind::Manifest;
            (problem.status().as_u16(), "application/json".to_owned(), problem.body(kind))
        }
    }
}

/// Asks the origin, whatever is cached: for tags, and for requests with credentials.
async fn straight(
    mirror: &Inner,
    ask: &Ask,
    reference: String,
    digest: Option<&Digest>,
) -> Result<Answer, Problem> {
    let target = Target { source: ask.source.clone(), content: Content::Manifest(reference) };
    let headers = ask.without_ranges();
    if ask.method == Method::HEAD {
        let head = mirror.origin.head(&target, &headers).await?;
        if !ask.authorized() {
            note_head(mirror, &ask.source, &head);
        }
        return Ok(forward_head(&head));
    }
    let response = mirror.origin.get(&target, &headers).await?;
    if response.status() != StatusCode::OK {
        if !ask.authorized() {
            note_refusal(mirror, &ask.source, response.status());
        }
        return forward(response, &ask.source);
    }
    let found = read(response, digest, &ask.source).await?;
    if !ask.authorized() {
        remember(mirror, &ask.source, &found).await;
    }
    Ok(found.answer())
}

/// A manifest that anybody may read: from the cache, a seed if `ask_seed`, or the origin.
async fn by_digest(
    mirror: &Inner,
    source: &Source,
    digest: &Digest,
    ask_seed: bool,
) -> Result<Manifest, Problem> {
    let Some((media_type, body)) = cached(mirror, digest).await else {
        return fetch_once(mirror, source, digest, ask_seed).await;
    };
    let target = Target { source: source.clone(), content: Content::Manifest(digest.to_string()) };
    confirm(mirror, digest, &target).await?;
    let found = Manifest { digest: *digest, media_type, body, headers: HeaderMap::new() };
    // Its parts belong to this repository too, even if it came here through another one.
    note_parts(mirror, source, &found);
    Ok(found)
}

/// Makes sure that anybody may read `target` and that `digest` belongs to its repository: from memory, or by a HEAD at the
/// origin. Its size, where known. If the origin can't be asked, what was confirmed in the last day counts.
pub(super) async fn confirm(
    mirror: &Inner,
    digest: &Digest,
    target: &Target,
) -> Result<Option<u64>, Problem> {
    let source = &target.source;
    let standing = mirror.access.standing(source, digest, Instant::now());
    if let Standing::Confirmed(size) = standing {
        return Ok(size);
    }
    let accept = HeaderMap::from_iter([(ACCEPT, ANY_TYPE)]);
    let problem = match mirror.origin.head(target, &accept).await {
        Ok(head) if head.status() == StatusCode::OK => {
            let size = content_length(head.headers());
            mirror.access.readable(source, Instant::now());
            mirror.access.belongs(source, digest, size, Instant::now());
            return Ok(size);
        }
        Ok(head) => {
            note_refusal(mirror, source, head.status());
            if head.status() == StatusCode::NOT_FOUND {
                mirror.access.gone(source, digest);
            }
            Problem::refusal(head.status(), head.headers())
        }
        Err(error) => Problem::from(error),
    };
    let out_of_order =
        problem.status().is_server_error() || problem.status() == StatusCode::TOO_MANY_REQUESTS;
    match standing {
        Standing::Stale(size) if out_of_order => {
            tracing::info!(reason = %problem, "the origin can't be asked; what it confirmed before counts");
            Ok(size)
        }
        _ => Err(problem),
    }
}

/// Gets a manifest that is not cached; of many who ask at once only one does.
async fn fetch_once(
    mirror: &Inner,
    source: &Source,
    digest: &Digest,
    ask_seed: bool,
) -> Result<Manifest, Problem> {
    let waiting = mirror.fetching.join((source.clone(), *digest));
    waiting.shared.get_or_init(|| fetch(mirror, source, digest, ask_seed)).await.clone()
}

impl Fetching {
    fn join(&self, key: (Source, Digest)) -> Waiting<'_> {
        let shared = Arc::clone(self.all().entry(key.clone()).or_default());
        Waiting { all: self, key, shared }
    }

    fn all(&self) -> MutexGuard<'_, HashMap<(Source, Digest), Arc<Fetch>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One of those who wait for a manifest. If the one who fetches it goes away, the next one does it.
struct Waiting<'a> {
    all: &'a Fetching,
    key: (Source, Digest),
    shared: Arc<Fetch>,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let mut all = self.all.all();
        // The map's and this one: nobody else waits.
        if Arc::strong_count(&self.shared) <= 2 {
            all.remove(&self.key);
        }
    }
}

async fn fetch(
    mirror: &Inner,
    source: &Source,
    digest: &Digest,
    ask_seed: bool,
) -> Result<Manifest, Problem> {
    if ask_seed && let Some(found) = from_seed(mirror, source, digest).await {
        remember(mirror, source, &found).await;
        return Ok(found);
    }
    let target = Target { source: source.clone(), content: Content::Manifest(digest.to_string()) };
    let accept = HeaderMap::from_iter([(ACCEPT, ANY_TYPE)]);
    let response = mirror.origin.get(&target, &accept).await?;
    if response.status() != StatusCode::OK {
        note_refusal(mirror, source, response.status());
        return Err(Problem::refusal(response.status(), response.headers()));
    }
    let found = read(response, Some(digest), source).await?;
    remember(mirror, source, &found).await;
    Ok(found)
}

/// What the task's seed has; `None` whenever it is not exactly what was asked for.
async fn from_seed(mirror: &Inner, source: &Source, digest: &Digest) -> Option<Manifest> {
    let seeds = mirror.seeds.as_ref()?;
    let (status, media_type, body) = timeout(SEED, seeds.manifest(source, digest)).await.ok()??;
    if status != StatusCode::OK.as_u16() || HeaderValue::try_from(&media_type).is_err() {
        return None;
    }
    if Digest::of(digest.algorithm(), &body) != *digest {
        tracing::warn!(%digest, "a seed gave a manifest that does not match its digest");
        return None;
    }
    Some(Manifest { digest: *digest, media_type, body, headers: HeaderMap::new() })
}

/// Reads a manifest from an origin's answer and compares it with its digest: the one asked for, or the one announced.
async fn read(
    response: Response<OriginBody>,
    digest: Option<&Digest>,
    source: &Source,
) -> Result<Manifest, Problem> {
    not_encoded(response.headers(), source)?;
    let (head, mut incoming) = response.into_parts();
    let announced = content_length(&head.headers).unwrap_or(0);
    if announced > MAX_BYTES as u64 {
        return Err(Problem::TooLong(MAX_BYTES));
    }
    let mut body = BytesMut::new();
    while let Some(data) = incoming.next().await.transpose()? {
        if body.len() + data.len() > MAX_BYTES {
            return Err(Problem::TooLong(MAX_BYTES));
        }
        body.extend_from_slice(&data);
    }
    let body = body.freeze();
    let named = head.headers.get(&DOCKER_CONTENT_DIGEST).and_then(|d| d.to_str().ok()?.parse().ok());
    let expected = digest.copied().or(named);
    let algorithm = expected.map_or(Algorithm::Sha256, |d: Digest| d.algorithm());
    let actual = Digest::of(algorithm, &body);
    if let Some(expected) = expected.filter(|expected| *expected != actual) {
        return Err(Problem::WrongManifest(expected));
    }
    let media_type = head.headers.get(CONTENT_TYPE).and_then(|t| t.to_str().ok());
    let media_type = media_type.unwrap_or("application/octet-stream").to_owned();
    Ok(Manifest { digest: actual, media_type, body, headers: passed_on(&head.headers) })
}

impl Manifest {
    fn answer(self) -> Answer {
        let mut headers = self.headers;
        headers.insert(CONTENT_LENGTH, self.body.len().into());
        headers.extend(identity(&self.digest));
        if let Ok(media_type) = HeaderValue::try_from(self.media_type) {
            headers.insert(CONTENT_TYPE, media_type);
        }
        with(StatusCode::OK, headers, Payload::Full(self.body))
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

async fn cached(mirror: &Inner, digest: &Digest) -> Option<(String, Bytes)> {
    let (store, digest) = (mirror.store.clone(), *digest);
    tokio::task::spawn_blocking(move || store.manifest(&digest)).await.ok()?
}

/// Keeps a manifest, and what follows from having read it here.
async fn remember(mirror: &Inner, source: &Source, found: &Manifest) {
    mirror.access.readable(source, Instant::now());
    note_parts(mirror, source, found);
    let (store, found) = (mirror.store.clone(), found.clone());
    let kept = tokio::task::spawn_blocking(move || {
        store.put_manifest(&found.digest, &found.media_type, &found.body)
    })
    .await;
    if let Ok(Err(reason)) = kept {
        tracing::warn!(%reason, "the manifest is not kept");
    }
}

/// A manifest, and all it names, belong to the repository that it was read through.
fn note_parts(mirror: &Inner, source: &Source, found: &Manifest) {
    let now = Instant::now();
    mirror.access.belongs(source, &found.digest, Some(found.body.len() as u64), now);
    for (digest, size) in parts(&found.body) {
        mirror.access.belongs(source, &digest, size, now);
    }
}

fn note_head(mirror: &Inner, source: &Source, head: &Response<()>) {
    note_refusal(mirror, source, head.status());
    if head.status() != StatusCode::OK {
        return;
    }
    mirror.access.readable(source, Instant::now());
    let digest = head.headers().get(&DOCKER_CONTENT_DIGEST).and_then(|d| d.to_str().ok()?.parse().ok());
    if let Some(digest) = digest {
        mirror.access.belongs(source, &digest, content_length(head.headers()), Instant::now());
    }
}

pub(super) fn note_refusal(mirror: &Inner, source: &Source, status: StatusCode) {
    if matches!(status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) {
        mirror.access.refused(source);
    }
}

/// What manifests and indexes of the OCI image spec, and docker's of both schemas, name.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Named {
    config: Option<Part>,
    #[serde(default)]
    layers: Vec<Part>,
    #[serde(default)]
    manifests: Vec<Part>,
    #[serde(default)]
    fs_layers: Vec<OldPart>,
}

#[derive(Deserialize)]
struct Part {
    digest: String,
    size: Option<u64>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct OldPart {
    blob_sum: String,
}

/// The digests that a manifest names, with their sizes in bytes. Nothing for what is no manifest.
fn parts(body: &[u8]) -> Vec<(Digest, Option<u64>)> {
    let Ok(named) = serde_json::from_slice::<Named>(body) else { return Vec::new() };
    let new = named.config.into_iter().chain(named.layers).chain(named.manifests).map(|p| (p.digest, p.size));
    let old = named.fs_layers.into_iter().map(|p| (p.blob_sum, None));
    new.chain(old).filter_map(|(digest, size)| Some((digest.parse().ok()?, size))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_that_a_manifest_names_is_found() {
        let digest = |n: u8| Digest::of(Algorithm::Sha256, &[n]);
        let manifest = serde_json::json!({
            "config": { "digest": digest(1).to_string(), "size": 1 },
            "layers": [{ "digest": digest(2).to_string(), "size": 2 }, { "digest": "md5:x", "size": 3 }],
        });
        assert_eq!(parts(manifest.to_string().as_bytes()), [(digest(1), Some(1)), (digest(2), Some(2))]);
        let index = serde_json::json!({ "manifests": [{ "digest": digest(3).to_string() }] });
        assert_eq!(parts(index.to_string().as_bytes()), [(digest(3), None)]);
        let old = serde_json::json!({ "fsLayers": [{ "blobSum": digest(4).to_string() }] });
        assert_eq!(parts(old.to_string().as_bytes()), [(digest(4), None)]);
        assert!(parts(b"no manifest").is_empty());
        assert!(parts(b"[1, 2]").is_empty());
    }
}
