//! Access before bytes: makes sure of both facts that [`super::access`] remembers, and learns them from what the origin says.

use std::sync::Arc;
use std::time::SystemTime;

use hawker_core::digest::Digest;
use hawker_core::manifest::parts;
use http::header::ACCEPT;
use http::{HeaderMap, StatusCode};
use tokio::time::Instant;

use super::access::{Caller, Standing};
use super::error::Problem;
use super::forward::DOCKER_CONTENT_DIGEST;
use super::manifest::{ANY_TYPE, Manifest};
use super::{Answer, Ask, Inner};
use crate::origin::{Content, Target, content_length};

/// Makes sure that the caller may read the repository and that `digest` belongs to it: from memory, or by a HEAD at the origin
/// with the caller's own right. Its size, where known. If the origin can't be asked, what anybody could read within
/// `public_grace` counts; what needs credentials does not.
pub(super) async fn confirm(
    mirror: &Inner,
    ask: &Ask,
    digest: &Digest,
    content: Content,
) -> Result<Option<u64>, Problem> {
    let source = &ask.grant.source;
    let grace = mirror.live.load().staleness.public_grace;
    let standing = mirror.access.standing(ask.caller, source, digest, grace, Instant::now());
    if let Standing::Confirmed(size) = standing {
        return Ok(size);
    }
    let mut target = Target { source: source.clone(), content };
    // A blob that the registry need not have itself is confirmed by the manifest that names it.
    let named = mirror.origin.elsewhere(&target);
    if let Some(elsewhere) = &named {
        target.content = Content::Manifest(elsewhere.manifest.to_string());
    }
    let mut headers = ask.for_origin();
    headers.insert(ACCEPT, ANY_TYPE);
    let problem = match mirror.origin.head(&target, &headers).await {
        Ok(head) if head.status() == StatusCode::OK => {
            let size = content_length(head.headers()).filter(|_| named.is_none());
            readable(mirror, ask);
            mirror.access.belongs(source, digest, size, Instant::now());
            return Ok(size);
        }
        Ok(head) => {
            note_refusal(mirror, ask, head.status());
            if head.status() == StatusCode::NOT_FOUND {
                mirror.access.gone(source, digest);
            }
            Problem::refusal(head.status(), head.headers())
        }
        Err(error) => Problem::from(error),
    };
    let out_of_order =
        problem.status().is_server_error() || problem.status() == StatusCode::TOO_MANY_REQUESTS;
    match mirror.access.standing(Caller::Anybody, source, digest, grace, Instant::now()) {
        Standing::Confirmed(size) | Standing::Stale(size) if out_of_order => {
            tracing::info!(reason = %problem, "the origin can't be asked; what it confirmed before counts");
            Ok(size)
        }
        _ => Err(problem),
    }
}

/// The origin gave the caller something of the repository.
pub(super) fn readable(mirror: &Inner, ask: &Ask) {
    let authorization = ask.grant.authorization.as_ref();
    let life = authorization.map(|a| a.life(SystemTime::now())).unwrap_or_default();
    mirror.access.readable(ask.caller, &ask.grant.source, life, Instant::now());
}

/// A manifest, and all it names, belong to the repository that it was read through.
pub(super) fn note_parts(mirror: &Inner, ask: &Ask, found: &Manifest) {
    let (source, now) = (&ask.grant.source, Instant::now());
    mirror.access.belongs(source, &found.digest, Some(found.body.len() as u64), now);
    for part in parts(&found.body) {
        mirror.access.belongs(source, &part.digest, part.size_bytes, now);
        mirror.origin.note_urls(source, &found.digest, &part.digest, &part.urls);
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
    ask: Asker,
}

#[derive(Clone)]
struct Asker(Caller, hawker_core::reference::Source);

/// Marks an answer as one that a client's credentials got.
pub(super) fn mark(answer: &mut Answer, ask: &Ask) {
    if ask.caller != Caller::Anybody {
        answer.extensions_mut().insert(Asker(ask.caller, ask.grant.source.clone()));
    }
}

impl Underway {
    /// Goes with a marked answer from here on.
    pub(super) fn begin(mirror: &Arc<Inner>, answer: &mut Answer) {
        let Some(ask) = answer.extensions_mut().remove::<Asker>() else { return };
        mirror.access.answering(ask.0, &ask.1, true, Instant::now());
        answer.extensions_mut().insert(Arc::new(Self { mirror: Arc::clone(mirror), ask }));
    }

    /// Of an answer that is about to be sent; to be kept until it is.
    pub(super) fn take(answer: &mut Answer) -> Option<Arc<Self>> {
        answer.extensions_mut().remove()
    }
}

impl Drop for Underway {
    fn drop(&mut self) {
        self.mirror.access.answering(self.ask.0, &self.ask.1, false, Instant::now());
    }
}
