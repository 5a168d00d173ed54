//! Tags: the origin is asked for the present digest of a tag every time, by a HEAD, which registries do not count. If
//! the digest has not changed, or this node has its manifest already, the manifest comes from here.
//!
//! While the origin is down or wants to be left alone, a tag may be answered as it was last confirmed, for as long as the
//! configuration lets it (`stale_tags`), and only to a caller whose own right, or that of anybody, is still remembered.

use std::num::NonZeroUsize;
use std::sync::{Mutex, MutexGuard, PoisonError};

use ::lru::LruCache;
use hawker_core::lru;
use hawker_oci::accept::Accept;
use hawker_oci::digest::Digest;
use hawker_oci::media_type;
use hawker_oci::reference::Source;
use http::header::{
    ACCEPT, ACCEPT_RANGES, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, ETAG, IF_NONE_MATCH,
    WARNING,
};
use http::{HeaderMap, HeaderValue, Method, StatusCode};
use tokio::time::Instant;

use super::access::Caller;
use super::auth::{digest_of, may_get, note_refusal, readable, unless_slow};
use super::body::Payload;
use super::error::Problem;
use super::forward::{is_encoded, passed_on, with};
use super::manifest::{
    Manifest, cached, confirmed, identity, is_for_clients_of, keep, read, unchanged,
};
use super::told::told;
use super::{Answer, Ask, Inner, not_modified};
use crate::origin::{Content, Target, content_length, has_content};

/// Tags remembered.
const CAPACITY: NonZeroUsize = NonZeroUsize::new(4096).expect("not zero");

/// Longest media type and `ETag` that are remembered.
const MAX_HEADER_BYTES: usize = 256;

/// The warning with a tag that nobody has confirmed just now (RFC 9111, 5.5).
const STALE: HeaderValue = HeaderValue::from_static("110 - \"Response is Stale\"");

/// The digests of tags when the origin was last asked.
pub(super) struct Tags(Mutex<LruCache<Key, Pointer>>);

/// The facts on which an answer about a tag depends.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Key {
    caller: Caller,
    source: Source,
    tag: String,
    /// The hash of the types that the client accepts: the list may be long.
    accept: Digest,
}

/// The digest of a tag.
#[derive(Clone, Debug)]
struct Pointer {
    digest: Digest,
    media_type: HeaderValue,
    size_bytes: Option<u64>,
    /// The origin's name for this state.
    etag: Option<HeaderValue>,
    confirmed: Instant,
    /// Media type and size are those of the manifest itself, not what a HEAD told of it.
    is_read: bool,
}

impl Tags {
    pub(super) fn new() -> Self {
        Self(Mutex::new(lru::bounded(CAPACITY)))
    }

    fn all(&self) -> MutexGuard<'_, LruCache<Key, Pointer>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn get(&self, key: &Key) -> Option<Pointer> {
        self.all().get(key).cloned()
    }

    fn put(&self, key: Key, pointer: Pointer) {
        self.all().put(key, pointer);
    }

    fn forget(&self, key: &Key) -> Option<Pointer> {
        self.all().pop(key)
    }
}

/// A copy of a header that may be remembered: one as it came holds on to all of its message's head.
fn kept(value: &HeaderValue) -> Option<HeaderValue> {
    HeaderValue::from_bytes(value.as_bytes())
        .ok()
        .filter(|value| value.len() <= MAX_HEADER_BYTES)
}

impl Pointer {
    /// The pointer in the head of an answer; `None` when it names no digest. Some registries tell a length of 0, or
    /// that of the compressed body.
    fn of(head: &HeaderMap) -> Option<Self> {
        let media_type = told(head).and_then(|told| HeaderValue::try_from(told).ok());
        Some(Self {
            digest: digest_of(head)?,
            media_type: media_type.unwrap_or(HeaderValue::from_static(media_type::UNKNOWN)),
            size_bytes: content_length(head).filter(|size| *size > 0 && !is_encoded(head)),
            etag: head.get(ETAG).and_then(kept),
            confirmed: Instant::now(),
            is_read: false,
        })
    }

    /// The same, of what a request is about that was answered before.
    fn after(self, known: Option<&Self>) -> Self {
        match known.filter(|known| known.is_read && known.digest == self.digest) {
            Some(known) => {
                let (media_type, size_bytes) = (known.media_type.clone(), known.size_bytes);
                Self {
                    media_type,
                    size_bytes,
                    is_read: true,
                    ..self
                }
            }
            None => self,
        }
    }

    /// The same, with what the manifest itself shows.
    fn read(self, found: &Manifest) -> Self {
        let media_type = HeaderValue::try_from(&found.media_type).unwrap_or(self.media_type);
        Self {
            media_type,
            size_bytes: Some(found.body.len() as u64),
            is_read: true,
            ..self
        }
    }

    /// Whether it is enough for the answer to a HEAD. containerd records the type for good.
    fn is_complete(&self) -> bool {
        let is_specific = self.media_type.to_str().is_ok_and(media_type::is_specific);
        self.is_read || is_specific && self.size_bytes.is_some()
    }

    /// The pointer to a manifest that was read by its tag.
    fn to(found: &Manifest, etag: Option<HeaderValue>) -> Option<Self> {
        Some(Self {
            digest: found.digest,
            media_type: HeaderValue::try_from(&found.media_type).ok()?,
            size_bytes: Some(found.body.len() as u64),
            etag,
            confirmed: Instant::now(),
            is_read: true,
        })
    }
}

/// The answer to a request by tag.
pub(super) async fn by_tag(mirror: &Inner, ask: &Ask, tag: &str) -> Result<Answer, Problem> {
    let lines = ask
        .headers
        .get_all(ACCEPT)
        .iter()
        .map(|line| line.to_str().unwrap_or_default());
    let request = Request {
        mirror,
        ask,
        target: Target {
            source: ask.grant.source.clone(),
            content: Content::Manifest(tag.to_owned()),
        },
        key: Accept::parse(lines).map(|accept| Key {
            caller: ask.caller,
            source: ask.grant.source.clone(),
            tag: tag.to_owned(),
            accept: accept.digest(),
        }),
    };
    let another = request.was().is_some();
    let answered = match unless_slow(another, request.confirm()).await {
        Ok(Some((pointer, head))) => return Box::pin(request.answer(pointer, head)).await,
        Ok(None) => unless_slow(another, Box::pin(request.ask_origin())).await,
        Err(problem) => Err(problem),
    };
    match answered {
        Err(problem) => request.stale(&problem).await.ok_or(problem),
        answered => answered,
    }
}

/// A request by tag.
struct Request<'a> {
    mirror: &'a Inner,
    ask: &'a Ask,
    target: Target,
    /// `None`: its accepted types are not understood, and nothing is remembered of it.
    key: Option<Key>,
}

impl Request<'_> {
    /// Asks the origin by HEAD where the tag is now, and what it says besides. `None`: it does not say which digest that is. A GET
    /// tells, for a HEAD of a client too: one that got an answer to its HEAD would take the failure of the GET after it for the end,
    /// and would not ask another mirror.
    async fn confirm(&self) -> Result<Option<(Pointer, HeaderMap)>, Problem> {
        let known = self.key.as_ref().and_then(|key| self.mirror.tags.get(key));
        let mut headers = self.headers();
        if let Some(etag) = known.as_ref().and_then(|known| known.etag.clone()) {
            headers.insert(IF_NONE_MATCH, etag);
        }
        let head = match self
            .mirror
            .origin
            .head(&self.target, &headers)
            .await
            .map_err(Problem::from)
        {
            Ok(head) => head,
            Err(problem) if may_get(&self.ask.method, &problem) => return Ok(None),
            Err(problem) => return Err(problem),
        };
        let (status, told) = (head.status(), passed_on(head.headers()));
        match (status, known) {
            (status, known) if has_content(status) => match Pointer::of(head.headers()) {
                Some(pointer) => {
                    readable(self.mirror, self.ask, head.extensions());
                    self.mirror
                        .told
                        .note(&self.target.source, &pointer.digest, head.headers());
                    let pointer = pointer.after(known.as_ref());
                    self.remember(&pointer);
                    Ok(Some((pointer, told)))
                }
                None => Ok(None),
            },
            (StatusCode::NOT_MODIFIED, Some(known)) => {
                readable(self.mirror, self.ask, head.extensions());
                let pointer = Pointer {
                    confirmed: Instant::now(),
                    ..known
                };
                self.remember(&pointer);
                Ok(Some((pointer, told)))
            }
            // It does not answer the question, or refuses HEADs and answers GETs.
            _ => match Problem::refusal(status, head.headers()) {
                problem if may_get(&self.ask.method, &problem) => Ok(None),
                problem => {
                    self.refused(status);
                    Err(problem)
                }
            },
        }
    }

    /// The client's headers but those about what it has: these are about our `ETag`.
    fn headers(&self) -> HeaderMap {
        let mut headers = self.ask.without_ranges();
        headers.remove(IF_NONE_MATCH);
        headers
    }

    fn remember(&self, pointer: &Pointer) {
        let source = &self.target.source;
        self.mirror
            .access
            .belongs(source, &pointer.digest, pointer.size_bytes, Instant::now());
        if let Some(key) = &self.key {
            self.mirror.tags.put(key.clone(), pointer.clone());
        }
    }

    fn refused(&self, status: StatusCode) {
        note_refusal(self.mirror, self.ask, status);
        if let (StatusCode::NOT_FOUND, Some(key)) = (status, &self.key)
            && let Some(was) = self.mirror.tags.forget(key)
        {
            // The manifest may be gone as well: the registry is asked before it is served by its digest again.
            self.mirror.access.gone(&key.source, &was.digest);
        }
    }

    /// The tag's manifest: from here, else from the origin.
    async fn answer(&self, pointer: Pointer, told: HeaderMap) -> Result<Answer, Problem> {
        if self.client_has(&pointer) {
            return Ok(unchanged(&pointer.digest));
        }
        let is_head = self.ask.method == Method::HEAD;
        if is_head && pointer.is_complete() {
            return Ok(self.as_held(pointer).await.head(told));
        }
        match confirmed(self.mirror, self.ask, &pointer.digest).await {
            Ok(found) => {
                let pointer = pointer.read(&found);
                self.remember(&pointer);
                Ok(if is_head {
                    pointer.head(told)
                } else {
                    pointer.whole(told, found.payload())
                })
            }
            Err(_) if is_head => Ok(pointer.head(told)),
            // A registry that converts manifests may know them by their tag alone.
            Err(Problem::Origin {
                status: StatusCode::NOT_FOUND,
                ..
            }) => self.ask_origin().await,
            Err(problem) => Err(problem),
        }
    }

    /// The same, with what the manifest shows if it is here: a HEAD may tell another type than the body has.
    async fn as_held(&self, pointer: Pointer) -> Pointer {
        let (mirror, digest) = (self.mirror, pointer.digest);
        if pointer.is_read
            || mirror.store.manifest_bytes(&digest).is_none()
            || !is_for_clients_of(mirror, self.ask, &digest).await
        {
            return pointer;
        }
        match cached(mirror, &self.target.source, &digest).await {
            Ok(Some(found)) => {
                let pointer = pointer.read(&found);
                self.remember(&pointer);
                pointer
            }
            Ok(None) | Err(_) => pointer,
        }
    }

    fn client_has(&self, pointer: &Pointer) -> bool {
        not_modified(&self.ask.headers, &pointer.digest)
            || pointer.etag.is_some()
                && self.ask.headers.get(IF_NONE_MATCH) == pointer.etag.as_ref()
    }

    /// Reads the manifest by its tag, for a HEAD as well, and remembers it.
    async fn ask_origin(&self) -> Result<Answer, Problem> {
        let (mirror, ask) = (self.mirror, self.ask);
        let response = mirror.origin.get(&self.target, &self.headers()).await?;
        if !has_content(response.status()) {
            self.refused(response.status());
            return Err(Problem::refusal(response.status(), response.headers()));
        }
        let etag = response.headers().get(ETAG).and_then(kept);
        let extensions = response.extensions().clone();
        let found = read(mirror, response, None, &self.target.source).await?;
        readable(mirror, ask, &extensions);
        let found = keep(mirror, ask, found).await;
        if !found.is_signed {
            mirror
                .proofs
                .note(&self.target.source.registry, &found.digest);
        }
        match Pointer::to(&found, etag) {
            Some(pointer) => {
                self.remember(&pointer);
                Ok(if self.client_has(&pointer) {
                    unchanged(&pointer.digest)
                } else {
                    found.answer()
                })
            }
            None => Ok(found.answer()),
        }
    }

    /// The former digest of the tag, if the configuration lets that be enough and the caller may know it.
    fn was(&self) -> Option<Pointer> {
        let live = self.mirror.live.load_full();
        let (key, longest) = (self.key.as_ref()?, live.staleness.tags?);
        [key.caller, Caller::Anybody]
            .into_iter()
            .find_map(|caller| {
                let may = self
                    .mirror
                    .access
                    .reads(caller, &key.source, &live, Instant::now());
                let pointer = may.then(|| {
                    self.mirror.tags.get(&Key {
                        caller,
                        ..key.clone()
                    })
                })??;
                (pointer.confirmed.elapsed() <= longest).then_some(pointer)
            })
    }

    /// The tag as it was, if the origin can't be asked and that is enough.
    async fn stale(&self, problem: &Problem) -> Option<Answer> {
        let pointer = self.was().filter(|_| problem.is_out_of_order())?;
        let body = match self.ask.method {
            Method::HEAD => Payload::Empty,
            _ if !is_for_clients_of(self.mirror, self.ask, &pointer.digest).await => return None,
            _ => cached(self.mirror, &self.target.source, &pointer.digest)
                .await
                .ok()??
                .payload(),
        };
        tracing::info!(reason = %problem, digest = %pointer.digest, "the origin can't be asked; the tag is as it was");
        self.mirror.metrics.tags_stale.inc();
        let told = HeaderMap::from_iter([(WARNING, STALE)]);
        Some(match () {
            () if self.client_has(&pointer) => {
                let mut answer = unchanged(&pointer.digest);
                answer.headers_mut().extend(told);
                answer
            }
            () if self.ask.method == Method::HEAD => pointer.head(told),
            () => pointer.whole(told, body),
        })
    }
}

impl Pointer {
    /// The answer to a HEAD: the head of a GET's answer.
    fn head(self, told: HeaderMap) -> Answer {
        let size_bytes = self.size_bytes;
        let mut headers = self.headers(told);
        if let Some(size_bytes) = size_bytes {
            headers.insert(CONTENT_LENGTH, size_bytes.into());
        }
        with(StatusCode::OK, headers, Payload::Empty)
    }

    fn whole(self, told: HeaderMap, body: Payload) -> Answer {
        let mut headers = self.headers(told);
        headers.extend(body.len_bytes().map(|len| (CONTENT_LENGTH, len.into())));
        with(StatusCode::OK, headers, body)
    }

    fn headers(self, mut told: HeaderMap) -> HeaderMap {
        told.remove(CONTENT_LENGTH);
        told.remove(CONTENT_RANGE);
        told.remove(ACCEPT_RANGES);
        told.extend(identity(&self.digest));
        told.insert(CONTENT_TYPE, self.media_type);
        told
    }
}
