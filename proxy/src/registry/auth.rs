//! Access before bytes: makes sure of both facts that [`super::access`] remembers, and learns them from what the origin says.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use hawker_core::digest::Digest;
use hawker_core::manifest::parts;
use hawker_core::reference::Source;
use http::header::{ACCEPT, CONTENT_TYPE};
use http::{Extensions, HeaderMap, Response, StatusCode};
use tokio::time::{Instant, timeout};

use super::access::{Access, Caller, Standing};
use super::error::Problem;
use super::forward::DOCKER_CONTENT_DIGEST;
use super::manifest::{ANY_TYPE, Manifest};
use super::room::SHORT_BYTES;
use super::{Answer, Ask, Inner};
use crate::applications::Turn;
use crate::origin::{ByCredentials, Content, OriginError, Target, content_length};

/// For an origin to answer where what it said before would do as well.
const WITH_ANOTHER_ANSWER: Duration = Duration::from_secs(5);

/// What an origin is asked; no longer than a client gladly waits where there is `another` answer than its own.
pub(super) async fn unless_slow<T>(
    another: bool,
    ask: impl Future<Output = Result<T, Problem>>,
) -> Result<T, Problem> {
    if !another {
        return ask.await;
    }
    timeout(WITH_ANOTHER_ANSWER, ask).await.unwrap_or(Err(Problem::Slow))
}

/// What is confirmed of a digest that a caller may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Confirmed {
    /// The registry has it in this repository; its size in bytes, where known.
    Here(Option<u64>),
    /// A manifest of the repository, which the caller may read, names URLs for it, and the registry does not have it: whoever
    /// wrote the manifest need not have had it either, so only what the URLs give may be given. So many bytes, as it says.
    Elsewhere(Option<u64>),
}

/// Makes sure that the caller may read the repository and that `digest` belongs to it: from memory, or by a HEAD at the origin
/// with the caller's own right. If the origin can't be asked, what anybody could read within `public_grace` counts; what needs
/// credentials does not.
pub(super) async fn confirm(
    mirror: &Inner,
    ask: &Ask,
    digest: &Digest,
    content: Content,
) -> Result<Confirmed, Problem> {
    let source = &ask.grant.source;
    let live = mirror.live.load_full();
    let standing = |caller| mirror.access.standing(caller, source, digest, &live, Instant::now());
    if let Standing::Confirmed(size) = standing(ask.caller) {
        return Ok(Confirmed::Here(size));
    }
    let target = Target { source: source.clone(), content };
    let another = standing(Caller::Anybody) != Standing::Unknown;
    let problem = match unless_slow(another, head(mirror, ask, &target)).await {
        Ok(head) => {
            let size = content_length(head.headers());
            if !is_about(mirror, digest, head.headers()) {
                let (registry, reason) =
                    (source.registry.clone(), format!("it answers with something else than {digest}"));
                return Err(OriginError::Broken { registry, reason }.into());
            }
            readable(mirror, ask, head.extensions());
            mirror.access.belongs(source, digest, size, Instant::now());
            return Ok(Confirmed::Here(size));
        }
        Err(problem) if problem.status() == StatusCode::NOT_FOUND => {
            let Some(elsewhere) = mirror.origin.elsewhere(&target) else {
                mirror.access.gone(source, digest);
                return Err(problem);
            };
            let content = Content::Manifest(elsewhere.manifest.to_string());
            match head(mirror, ask, &Target { source: source.clone(), content }).await {
                // What a URL has given before may be given again.
                Ok(head) if is_about(mirror, &elsewhere.manifest, head.headers()) => {
                    readable(mirror, ask, head.extensions());
                    return Ok(match standing(ask.caller) {
                        Standing::Confirmed(size) => Confirmed::Here(size),
                        _ => Confirmed::Elsewhere(elsewhere.size_bytes),
                    });
                }
                Ok(_) => problem,
                Err(problem) => problem,
            }
        }
        Err(problem) => problem,
    };
    match standing(Caller::Anybody) {
        Standing::Confirmed(size) | Standing::Stale(size) if problem.is_out_of_order() => {
            tracing::info!(reason = %problem, "the origin can't be asked; what it confirmed before counts");
            Ok(Confirmed::Here(size))
        }
        _ => Err(problem),
    }
}

/// Asks the origin whether the caller may have this.
async fn head(mirror: &Inner, ask: &Ask, target: &Target) -> Result<Response<()>, Problem> {
    let mut headers = ask.for_origin();
    headers.insert(ACCEPT, ANY_TYPE);
    let head = mirror.origin.head(target, &headers).await?;
    if head.status() == StatusCode::OK {
        return Ok(head);
    }
    note_refusal(mirror, ask, head.status());
    Err(Problem::refusal(head.status(), head.headers()))
}

/// Whether the head of a 200 can be about this content: what stands before a registry may lead those who may not read it to a
/// page of its own, which is a 200 too.
fn is_about(mirror: &Inner, digest: &Digest, head: &HeaderMap) -> bool {
    if head.contains_key(&DOCKER_CONTENT_DIGEST) {
        return digest_of(head).is_some_and(|told| told == *digest);
    }
    let held_bytes = mirror.store.blob_bytes(digest);
    let same = held_bytes.zip(content_length(head)).is_none_or(|(held, told)| held == told);
    same && !is_page(head)
}

/// Whether an answer is for people's eyes.
pub(super) fn is_page(head: &HeaderMap) -> bool {
    head.get(CONTENT_TYPE)
        .is_some_and(|given| given.as_bytes().to_ascii_lowercase().starts_with(b"text/html"))
}

/// The origin gave the caller something of the repository, in an answer with these extensions.
pub(super) fn readable(mirror: &Inner, ask: &Ask, answer: &Extensions) {
    let authorization = ask.grant.authorization.as_ref();
    let life = authorization.map(|a| a.life(SystemTime::now())).unwrap_or_default();
    let by = answer.get::<ByCredentials>().map(|by| Arc::clone(&by.0));
    mirror.access.readable(ask.caller, &ask.grant.source, life, by, Instant::now());
}

/// A manifest belongs to the repository that it was read through, and what the registry vouches for with it.
pub(super) async fn note_parts(mirror: &Inner, ask: &Ask, found: &Manifest) {
    let (source, now) = (&ask.grant.source, Instant::now());
    mirror.access.belongs(source, &found.digest, Some(found.body.len() as u64), now);
    if !mirror.access.is_to_be_read(source, &found.digest, now) {
        return;
    }
    let body = found.body.clone();
    let parts = match body.len() {
        ..=SHORT_BYTES => parts(&body),
        _ => tokio::task::spawn_blocking(move || parts(&body)).await.unwrap_or_default(),
    };
    for part in parts {
        if part.vouched {
            mirror.access.belongs(source, &part.digest, part.size_bytes, now);
        }
        mirror.origin.note_urls(source, &found.digest, &part);
    }
}

/// A blob that is on its way from one of its URLs.
pub(crate) struct Given {
    access: Arc<Access>,
    source: Source,
    digest: Digest,
}

impl Given {
    /// What a manifest of the repository that is asked for says is to be had elsewhere.
    pub(super) fn elsewhere(mirror: &Inner, ask: &Ask, digest: &Digest) -> Self {
        Self { access: Arc::clone(&mirror.access), source: ask.grant.source.clone(), digest: *digest }
    }

    /// All of it has come, and is what its digest says: it belongs to the repository like any other.
    pub(super) fn whole(self, size_bytes: u64) {
        self.access.belongs(&self.source, &self.digest, Some(size_bytes), Instant::now());
    }
}

/// The digest that an answer says its content has.
pub(super) fn digest_of(headers: &HeaderMap) -> Option<Digest> {
    headers.get(&DOCKER_CONTENT_DIGEST)?.to_str().ok()?.parse().ok()
}

/// A refusal takes the caller's right back.
pub(super) fn note_refusal(mirror: &Inner, ask: &Ask, status: StatusCode) {
    if matches!(status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) {
        mirror.access.refused(ask.caller, &ask.grant.source);
    }
}

/// An answer that is on its way to a client with credentials: its pull goes on.
pub(super) struct Underway {
    mirror: Arc<Inner>,
    ask: Option<Asker>,
    turn: Option<Arc<Turn>>,
}

#[derive(Clone)]
struct Asker(Caller, Source);

/// Marks an answer as one that a client's credentials got.
pub(super) fn mark(answer: &mut Answer, ask: &Ask) {
    if ask.caller != Caller::Anybody {
        answer.extensions_mut().insert(Asker(ask.caller, ask.grant.source.clone()));
    }
}

/// An answer has taken its application's turn.
pub(super) fn counted(answer: &mut Answer, turn: Turn) {
    answer.extensions_mut().insert(Arc::new(turn));
}

impl Underway {
    /// Goes with a marked answer from here on.
    pub(super) fn begin(mirror: &Arc<Inner>, answer: &mut Answer) {
        let ask = answer.extensions_mut().remove::<Asker>();
        let turn = answer.extensions_mut().remove::<Arc<Turn>>();
        if let Some(ask) = &ask {
            mirror.access.answering(ask.0, &ask.1, true, Instant::now());
        }
        if ask.is_some() || turn.is_some() {
            answer.extensions_mut().insert(Arc::new(Self { mirror: Arc::clone(mirror), ask, turn }));
        }
    }

    /// Of an answer that is about to be sent; to be kept until it is.
    pub(super) fn take(answer: &mut Answer) -> Option<Arc<Self>> {
        answer.extensions_mut().remove()
    }

    /// Bytes of it went out.
    pub(super) fn served(&self, bytes: u64) {
        self.turn.iter().for_each(|turn| turn.served(bytes));
    }
}

impl Drop for Underway {
    fn drop(&mut self) {
        if let Some(ask) = &self.ask {
            self.mirror.access.answering(ask.0, &ask.1, false, Instant::now());
        }
    }
}
