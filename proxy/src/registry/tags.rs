//! Tags: where each one is now is asked of the origin every time, by a HEAD, which registries do not count. When it is where it
//! was, or where something is that this node has already, the manifest comes from here.
//!
//! While the origin is down or wants to be left alone, a tag may be answered as it was last confirmed, for as long as the
//! configuration lets it (`stale_tags`), and only to a caller whose own right, or that of anybody, is still remembered.

use std::num::NonZeroUsize;
use std::sync::{Mutex, MutexGuard, PoisonError};

use hawker_core::accept::Accept;
use hawker_core::digest::Digest;
use hawker_core::reference::Source;
use http::header::{ACCEPT, CONTENT_LENGTH, CONTENT_TYPE, ETAG, IF_NONE_MATCH, WARNING};
use http::{HeaderMap, HeaderValue, Method, StatusCode};
use lru::LruCache;
use tokio::time::Instant;

use super::access::Caller;
use super::auth::{digest_of, is_page, note_refusal, readable, unless_slow};
use super::body::Payload;
use super::error::Problem;
use super::forward::{forward, forward_head, passed_on, with};
use super::manifest::{Manifest, cached, confirmed, identity, keep, read, unchanged};
use super::{Answer, Ask, Inner, not_modified};
use crate::origin::{Content, Target, content_length};

/// Tags remembered.
const CAPACITY: NonZeroUsize = NonZeroUsize::new(4096).expect("not zero");

/// Longest media type and `ETag` that are remembered.
const MAX_HEADER_BYTES: usize = 256;

/// What comes with a tag that nobody has confirmed just now (RFC 9111, 5.5).
const STALE: HeaderValue = HeaderValue::from_static("110 - \"Response is Stale\"");

/// Where tags were when the origin was last asked.
pub(super) struct Tags(Mutex<LruCache<Key, Pointer>>);

/// What an answer about a tag depends on.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Key {
    caller: Caller,
    source: Source,
    tag: String,
    /// The hash of what the client accepts: what it says may be long.
    accept: Digest,
}

/// Where a tag leads.
#[derive(Clone, Debug)]
struct Pointer {
    digest: Digest,
    media_type: HeaderValue,
    size_bytes: Option<u64>,
    /// What the origin calls this state.
    etag: Option<HeaderValue>,
    confirmed: Instant,
}

impl Tags {
    pub(super) fn new() -> Self {
        Self(Mutex::new(LruCache::new(CAPACITY)))
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

    fn forget(&self, key: &Key) {
        self.all().pop(key);
    }
}

/// A copy of a header that may be remembered: one as it came holds on to all of its message's head.
fn kept(value: &HeaderValue) -> Option<HeaderValue> {
    HeaderValue::from_bytes(value.as_bytes()).ok().filter(|value| value.len() <= MAX_HEADER_BYTES)
}

impl Pointer {
    /// What the head of an answer says; `None` when it does not say which digest.
    fn of(head: &HeaderMap) -> Option<Self> {
        let media_type = head.get(CONTENT_TYPE).and_then(kept);
        Some(Self {
            digest: digest_of(head)?,
            media_type: media_type.unwrap_or(HeaderValue::from_static("application/octet-stream")),
            size_bytes: content_length(head),
            etag: head.get(ETAG).and_then(kept),
            confirmed: Instant::now(),
        })
    }

    /// What a manifest that was read by its tag shows.
    fn to(found: &Manifest, etag: Option<HeaderValue>) -> Option<Self> {
        Some(Self {
            digest: found.digest,
            media_type: HeaderValue::try_from(&found.media_type).ok()?,
            size_bytes: Some(found.body.len() as u64),
            etag,
            confirmed: Instant::now(),
        })
    }
}

/// The answer to a request by tag.
pub(super) async fn by_tag(mirror: &Inner, ask: &Ask, tag: &str) -> Result<Answer, Problem> {
    let lines = ask.headers.get_all(ACCEPT).iter().map(|line| line.to_str().unwrap_or_default());
    let request = Request {
        mirror,
        ask,
        target: Target { source: ask.grant.source.clone(), content: Content::Manifest(tag.to_owned()) },
        key: Accept::parse(lines).map(|accept| Key {
            caller: ask.caller,
            source: ask.grant.source.clone(),
            tag: tag.to_owned(),
            accept: accept.digest(),
        }),
    };
    match unless_slow(request.was().is_some(), request.confirm()).await {
        Ok(Confirmed::At(pointer, head)) => Box::pin(request.answer(pointer, head)).await,
        Ok(Confirmed::Head(answer)) => Ok(answer),
        Ok(Confirmed::Unclear) => request.ask_origin().await,
        Err(problem) => request.stale(&problem).await.ok_or(problem),
    }
}

/// A request by tag.
struct Request<'a> {
    mirror: &'a Inner,
    ask: &'a Ask,
    target: Target,
    /// `None`: what it accepts is not understood, and nothing is remembered of it.
    key: Option<Key>,
}

/// What a HEAD found out.
enum Confirmed {
    /// The tag is here, and this is what the origin says besides.
    At(Pointer, HeaderMap),
    /// The origin does not say which digest that is, but a client that asks for no more gets what it says.
    Head(Answer),
    /// The origin did not say.
    Unclear,
}

impl Request<'_> {
    /// Asks the origin where the tag is now.
    async fn confirm(&self) -> Result<Confirmed, Problem> {
        let known = self.key.as_ref().and_then(|key| self.mirror.tags.get(key));
        let mut headers = self.headers();
        if let Some(etag) = known.as_ref().and_then(|known| known.etag.clone()) {
            headers.insert(IF_NONE_MATCH, etag);
        }
        let head = self.mirror.origin.head(&self.target, &headers).await?;
        let (status, told) = (head.status(), passed_on(head.headers()));
        match (status, known) {
            (StatusCode::OK, _) if is_page(head.headers()) => Err(Problem::NoManifest),
            (StatusCode::OK, _) => {
                readable(self.mirror, self.ask, head.extensions());
                Ok(match Pointer::of(head.headers()) {
                    Some(pointer) => {
                        self.remember(&pointer);
                        Confirmed::At(pointer, told)
                    }
                    None if self.ask.method == Method::HEAD => Confirmed::Head(forward_head(&head)),
                    None => Confirmed::Unclear,
                })
            }
            (StatusCode::NOT_MODIFIED, Some(known)) => {
                readable(self.mirror, self.ask, head.extensions());
                let pointer = Pointer { confirmed: Instant::now(), ..known };
                self.remember(&pointer);
                Ok(Confirmed::At(pointer, told))
            }
            // It does not answer the question, or knows no HEAD.
            (StatusCode::NOT_MODIFIED | StatusCode::METHOD_NOT_ALLOWED | StatusCode::NOT_IMPLEMENTED, _) => {
                Ok(Confirmed::Unclear)
            }
            _ => {
                self.refused(status);
                Err(Problem::refusal(status, head.headers()))
            }
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
        self.mirror.access.belongs(source, &pointer.digest, pointer.size_bytes, Instant::now());
        if let Some(key) = &self.key {
            self.mirror.tags.put(key.clone(), pointer.clone());
        }
    }

    fn refused(&self, status: StatusCode) {
        note_refusal(self.mirror, self.ask, status);
        if let (StatusCode::NOT_FOUND, Some(key)) = (status, &self.key) {
            self.mirror.tags.forget(key);
        }
    }

    /// What the tag leads to: from here, else from the origin.
    async fn answer(&self, pointer: Pointer, told: HeaderMap) -> Result<Answer, Problem> {
        if self.client_has(&pointer) {
            return Ok(unchanged(&pointer.digest));
        }
        if self.ask.method == Method::HEAD {
            return Ok(pointer.head(told));
        }
        match confirmed(self.mirror, self.ask, &pointer.digest).await {
            Ok(found) => Ok(pointer.whole(told, found.payload())),
            // A registry that converts manifests may know them by their tag alone.
            Err(Problem::Origin { status: StatusCode::NOT_FOUND, .. }) => self.ask_origin().await,
            Err(problem) => Err(problem),
        }
    }

    fn client_has(&self, pointer: &Pointer) -> bool {
        not_modified(&self.ask.headers, &pointer.digest)
            || pointer.etag.is_some() && self.ask.headers.get(IF_NONE_MATCH) == pointer.etag.as_ref()
    }

    /// Passes the request on as it is, and remembers what comes back.
    async fn ask_origin(&self) -> Result<Answer, Problem> {
        let (mirror, ask) = (self.mirror, self.ask);
        let headers = self.headers();
        if ask.method == Method::HEAD {
            let head = mirror.origin.head(&self.target, &headers).await?;
            return Ok(forward_head(&head));
        }
        let response = mirror.origin.get(&self.target, &headers).await?;
        if response.status() != StatusCode::OK {
            self.refused(response.status());
            return forward(response, &self.target.source);
        }
        let etag = response.headers().get(ETAG).and_then(kept);
        let extensions = response.extensions().clone();
        let found = read(mirror, response, None, &self.target.source).await?;
        readable(mirror, ask, &extensions);
        let found = keep(mirror, ask, found).await;
        match Pointer::to(&found, etag) {
            Some(pointer) => {
                self.remember(&pointer);
                Ok(if self.client_has(&pointer) { unchanged(&pointer.digest) } else { found.answer() })
            }
            None => Ok(found.answer()),
        }
    }

    /// Where the tag was, if the configuration lets that be enough and the caller may know it.
    fn was(&self) -> Option<Pointer> {
        let live = self.mirror.live.load_full();
        let (key, longest) = (self.key.as_ref()?, live.staleness.tags?);
        [key.caller, Caller::Anybody].into_iter().find_map(|caller| {
            let may = self.mirror.access.reads(caller, &key.source, &live, Instant::now());
            let pointer = may.then(|| self.mirror.tags.get(&Key { caller, ..key.clone() }))??;
            (pointer.confirmed.elapsed() <= longest).then_some(pointer)
        })
    }

    /// The tag as it was, if the origin can't be asked and that is enough.
    async fn stale(&self, problem: &Problem) -> Option<Answer> {
        let pointer = self.was().filter(|_| problem.is_out_of_order())?;
        let body = match self.ask.method {
            Method::HEAD => Payload::Empty,
            _ => cached(self.mirror, &pointer.digest).await.ok()??.payload(),
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
    /// The answer to a HEAD: what a GET would have.
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
        told.extend(identity(&self.digest));
        told.insert(CONTENT_TYPE, self.media_type);
        told
    }
}
