//! Access before bytes: makes sure of both facts that [`super::access`] remembers, and learns them from what the origin says.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use hawker_oci::digest::Digest;
use hawker_oci::manifest::parts;
use hawker_oci::reference::Source;
use http::header::{ACCEPT, RANGE};
use http::{Extensions, HeaderMap, HeaderValue, Method, Response, StatusCode};
use tokio::time::{Instant, timeout};

use super::access::{Access, Caller, Standing, short_parts};
use super::error::Problem;
use super::forward::{DOCKER_CONTENT_DIGEST, is_encoded};
use super::manifest::{Manifest, fetch_once};
use super::room::SHORT_BYTES;
use super::{Answer, Ask, Inner};
use crate::applications::Turn;
use crate::flight::Flights;
use crate::origin::ranges::content_range_size;
use crate::origin::{
    ByCredentials, Content, FromElsewhere, OriginError, Target, content_length, has_content,
    is_page,
};
use crate::proof::Proofs;
use hawker_lanes::{self as lanes, Lane};

/// For an origin to answer where what it said before would do as well.
const WITH_ANOTHER_ANSWER: Duration = Duration::from_secs(5);

/// The time for which the registry's word counts that a manifest is in a repository: a manifest deleted there is
/// served from here no longer.
pub(super) const MANIFEST_BELONGS: Duration = Duration::from_secs(5 * 60);

/// Waits for an origin's answer, but no longer than a client gladly waits if there is `another` answer.
pub(super) async fn unless_slow<T>(
    another: bool,
    ask: impl Future<Output = Result<T, Problem>>,
) -> Result<T, Problem> {
    if !another {
        return ask.await;
    }
    timeout(WITH_ANOTHER_ANSWER, ask)
        .await
        .unwrap_or(Err(Problem::Slow))
}

/// The confirmed fact about a digest that a caller may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Confirmed {
    /// The registry has it in this repository; its size in bytes, where known.
    Here(Option<u64>),
    /// A manifest of the repository, which the caller may read, names URLs for it, and the registry does not have it.
    /// The author of the manifest need not have had it either, so only the bytes from the URLs may be given. So many
    /// bytes, as it says.
    Elsewhere(Option<u64>),
}

/// Makes sure that the caller may read the repository and that `digest` belongs to it: from memory, or by asking the
/// origin with the caller's own right. If the origin can't be asked, content that anybody could read within
/// `public_grace` counts; content that needs credentials does not.
///
/// A manifest may be deleted at its registry. So what is remembered of one counts for [`MANIFEST_BELONGS`] only, and a client's
/// HEAD, which asks whether it exists, is always asked of the registry.
pub(super) async fn confirm(
    mirror: &Inner,
    ask: &Ask,
    digest: &Digest,
    content: Content,
) -> Result<Confirmed, Problem> {
    let source = &ask.grant.source;
    let live = mirror.live.load_full();
    let standing = |caller| {
        mirror
            .access
            .standing(caller, source, digest, &live, Instant::now())
    };
    let remembered = standing(ask.caller);
    if let Standing::Confirmed(size) = remembered
        && !is_due(mirror, ask, digest, &content)
    {
        return Ok(Confirmed::Here(size));
    }
    let target = Target {
        source: source.clone(),
        content,
    };
    let another = remembered != Standing::Unknown || standing(Caller::Anybody) != Standing::Unknown;
    let problem = match unless_slow(another, claimed(mirror, ask, digest, &target)).await {
        Ok(size) => {
            mirror.access.belongs(source, digest, size, Instant::now());
            return Ok(Confirmed::Here(size));
        }
        Err(problem) if problem.status() == StatusCode::NOT_FOUND => {
            let Some(elsewhere) = mirror.origin.elsewhere(&target) else {
                mirror.access.gone(source, digest);
                return Err(problem);
            };
            let content = Content::Manifest(elsewhere.manifest.to_string());
            let target = Target {
                source: source.clone(),
                content,
            };
            match head(mirror, ask, &target).await {
                // Bytes that a URL has given before may be given again.
                Ok(head) if is_about(mirror, source, &elsewhere.manifest, &head).await => {
                    readable(mirror, ask, head.extensions());
                    return Ok(match standing(ask.caller) {
                        Standing::Confirmed(size) => Confirmed::Here(size),
                        _ => Confirmed::Elsewhere(elsewhere.size_bytes),
                    });
                }
                Ok(_) => problem,
                Err(problem) => {
                    note_refusal(mirror, ask, problem.status());
                    problem
                }
            }
        }
        Err(problem) => problem,
    };
    match (standing(ask.caller), standing(Caller::Anybody)) {
        (Standing::Confirmed(size), _) | (_, Standing::Confirmed(size) | Standing::Stale(size))
            if problem.is_out_of_order() =>
        {
            tracing::info!(reason = %problem, "the origin can't be asked; what it confirmed before counts");
            Ok(Confirmed::Here(size))
        }
        _ => Err(problem),
    }
}

/// Whether the registry is asked although all is remembered.
fn is_due(mirror: &Inner, ask: &Ask, digest: &Digest, content: &Content) -> bool {
    let age = || mirror.access.age(&ask.grant.source, digest, Instant::now());
    matches!(content, Content::Manifest(_))
        && (ask.method == Method::HEAD || age().is_none_or(|age| age > MANIFEST_BELONGS))
}

/// Asks the origin whether the caller may have this, by HEAD. Some registries refuse every HEAD, or redirect it to an address that
/// is signed for GET alone; so where the client sends a GET, a GET decides. The size in bytes, where the origin tells it.
async fn claimed(
    mirror: &Inner,
    ask: &Ask,
    digest: &Digest,
    target: &Target,
) -> Result<Option<u64>, Problem> {
    let problem = match head(mirror, ask, target).await {
        Ok(head) if is_about(mirror, &target.source, digest, &head).await => {
            readable(mirror, ask, head.extensions());
            if matches!(target.content, Content::Manifest(_)) {
                mirror.told.note(&target.source, digest, head.headers());
            }
            return Ok(size_told(digest, &head));
        }
        Ok(_) => something_else(digest, target),
        Err(problem) => problem,
    };
    // A blob that the registry does not have may be had from a URL in its manifest; a GET would go there.
    if !may_get(&ask.method, &problem) || mirror.origin.elsewhere(target).is_some() {
        note_refusal(mirror, ask, problem.status());
        return Err(problem);
    }
    match &target.content {
        Content::Manifest(_) => {
            let found = fetch_once(mirror, ask, digest, false).await?;
            Ok(Some(found.body.len() as u64))
        }
        _ => claimed_by_get(mirror, ask, digest, target).await,
    }
}

/// Whether a GET may be answered although a HEAD was not. A client that sends a HEAD itself hears what the registry says to one,
/// unless that is only that the registry does not understand it.
pub(super) fn may_get(method: &Method, problem: &Problem) -> bool {
    match problem {
        Problem::Odd(_) | Problem::NoManifest | Problem::Unasked(OriginError::Broken { .. }) => {
            true
        }
        Problem::Origin { status, .. } => match *status {
            StatusCode::UNAUTHORIZED | StatusCode::TOO_MANY_REQUESTS => false,
            StatusCode::BAD_REQUEST
            | StatusCode::METHOD_NOT_ALLOWED
            | StatusCode::NOT_IMPLEMENTED => true,
            _ => *method == Method::GET,
        },
        _ => false,
    }
}

/// Asks for the blob's first byte. A registry that sends the whole is read no further than its head.
pub(super) async fn claimed_by_get(
    mirror: &Inner,
    ask: &Ask,
    digest: &Digest,
    target: &Target,
) -> Result<Option<u64>, Problem> {
    let mut headers = ask.for_origin();
    headers.insert(RANGE, HeaderValue::from_static("bytes=0-0"));
    let mut answer = mirror.origin.get(target, &headers).await?;
    // An empty blob has no first byte, and some registries know no ranges.
    if matches!(answer.status().as_u16(), 400 | 416 | 501) {
        headers.remove(RANGE);
        answer = mirror.origin.get(target, &headers).await?;
    }
    let answer = answer.map(drop);
    if !has_content(answer.status()) {
        note_refusal(mirror, ask, answer.status());
        return Err(Problem::refusal(answer.status(), answer.headers()));
    }
    if answer.extensions().get::<FromElsewhere>().is_some() {
        return Err(Problem::refusal(StatusCode::NOT_FOUND, &HeaderMap::new()));
    }
    if !is_about(mirror, &target.source, digest, &answer).await {
        return Err(something_else(digest, target));
    }
    readable(mirror, ask, answer.extensions());
    Ok(size_told(digest, &answer))
}

fn something_else(digest: &Digest, target: &Target) -> Problem {
    let registry = target.source.registry.clone();
    OriginError::Broken {
        registry,
        reason: format!("it answers with something else than {digest}"),
    }
    .into()
}

/// Asks the origin by HEAD.
async fn head(mirror: &Inner, ask: &Ask, target: &Target) -> Result<Response<()>, Problem> {
    let mut headers = ask.for_origin();
    headers.insert(ACCEPT, ask.accept());
    let head = mirror.origin.head(target, &headers).await?;
    match has_content(head.status()) {
        true => Ok(head),
        false => Err(Problem::refusal(head.status(), head.headers())),
    }
}

/// Whether a successful answer can be about this content: a gateway before a registry may lead callers without the
/// right to a page of its own, which is a 200 too. A digest of another algorithm says nothing here; the bytes are
/// compared in any case. The length of the bytes here counts only for a registry that has them: others would learn it.
async fn is_about(mirror: &Inner, source: &Source, digest: &Digest, answer: &Response<()>) -> bool {
    let mut told = digests_of(answer.headers())
        .filter(|told| told.algorithm() == digest.algorithm())
        .peekable();
    if told.peek().is_some() {
        return told.any(|told| told == *digest);
    }
    let is_theirs = mirror
        .proofs
        .knows(&mirror.live.load_full(), &source.registry, digest)
        .await;
    let held_bytes = if is_theirs {
        mirror.store.blob_bytes(digest)
    } else {
        None
    };
    let same = held_bytes
        .zip(size_told(digest, answer))
        .is_none_or(|(held, told)| held == told);
    same && !is_page(answer.headers())
}

/// The size of the whole content, as an answer tells it. Some registries answer a HEAD with a length of 0.
pub(super) fn size_told(digest: &Digest, answer: &Response<()>) -> Option<u64> {
    let size = match answer.status() {
        StatusCode::PARTIAL_CONTENT => content_range_size(answer.headers()),
        _ => content_length(answer.headers()),
    };
    let size = size.filter(|_| !is_encoded(answer.headers()));
    size.filter(|size| *size > 0 || Digest::of(digest.algorithm(), b"") == *digest)
}

/// The origin gave the caller something of the repository, in an answer with these extensions.
pub(super) fn readable(mirror: &Inner, ask: &Ask, answer: &Extensions) {
    let authorization = ask.grant.authorization.as_ref();
    let life = authorization
        .map(|a| a.life(SystemTime::now()))
        .unwrap_or_default();
    let by = answer.get::<ByCredentials>().map(|by| Arc::clone(&by.0));
    mirror
        .access
        .readable(ask.caller, &ask.grant.source, life, by, Instant::now());
}

/// Notes that the content that the registry vouches for with a manifest belongs to the repository that it was read
/// through.
pub(super) async fn note_parts(mirror: &Inner, ask: &Ask, found: &Manifest) {
    let (source, now) = (&ask.grant.source, Instant::now());
    let pulls = |parts| {
        mirror
            .access
            .pulls(ask.caller, source, parts, &mirror.live.load_full(), now)
    };
    if let Some(parts) = mirror.access.parts_of(source, &found.digest, now) {
        return pulls(parts);
    }
    let body = found.body.clone();
    let parts = match body.len() {
        ..=SHORT_BYTES => parts(&body),
        _ => lanes::run(Lane::Clients, move || parts(&body))
            .await
            .unwrap_or_default(),
    };
    let named = short_parts(
        parts
            .iter()
            .filter(|part| part.vouched)
            .map(|part| &part.digest),
    );
    mirror.access.names(source, &found.digest, &named, now);
    pulls(named);
    for part in parts {
        if part.vouched {
            mirror
                .access
                .belongs(source, &part.digest, part.size_bytes, now);
        }
        mirror.origin.note_urls(source, &found.digest, &part);
    }
}

/// A blob that is on its way from one of its URLs.
pub(crate) struct Given {
    access: Arc<Access>,
    proofs: Arc<Proofs>,
    source: Source,
    digest: Digest,
    flights: Option<Flights>,
}

impl Given {
    /// A blob that a manifest of the repository names as elsewhere.
    pub(super) fn elsewhere(mirror: &Inner, ask: &Ask, digest: &Digest) -> Self {
        let (access, proofs) = (Arc::clone(&mirror.access), Arc::clone(&mirror.proofs));
        Self {
            access,
            proofs,
            source: ask.grant.source.clone(),
            digest: *digest,
            flights: None,
        }
    }

    /// The downloads learn its size as well: registries disagree on that.
    pub(super) fn proving_size(self, flights: &Flights) -> Self {
        Self {
            flights: Some(flights.clone()),
            ..self
        }
    }

    /// All of it has come, and is what its digest says: it belongs to the repository like any other.
    pub(super) fn whole(self, size_bytes: u64) {
        self.proofs.note(&self.source.registry, &self.digest);
        self.access
            .belongs(&self.source, &self.digest, Some(size_bytes), Instant::now());
        if let Some(flights) = self.flights {
            flights.size_proven(self.digest, size_bytes);
        }
    }
}

/// The digests that an answer says its content has. One that can't be read is none.
pub(super) fn digests_of(headers: &HeaderMap) -> impl Iterator<Item = Digest> {
    let lines = headers
        .get_all(&DOCKER_CONTENT_DIGEST)
        .iter()
        .filter_map(|line| line.to_str().ok());
    lines.filter_map(|line| line.trim().parse().ok())
}

/// The one digest that an answer says its content has; `None` if it contradicts itself.
pub(super) fn digest_of(headers: &HeaderMap) -> Option<Digest> {
    let mut told = digests_of(headers);
    let first = told.next()?;
    told.all(|other| other == first || other.algorithm() != first.algorithm())
        .then_some(first)
}

/// A refusal takes the caller's right back.
pub(super) fn note_refusal(mirror: &Inner, ask: &Ask, status: StatusCode) {
    if matches!(status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) {
        mirror
            .access
            .refused(ask.caller, &ask.grant.source, Instant::now());
    }
}

/// How often it is noted that bytes of a blob went to a client.
const NOTE_EVERY: Duration = Duration::from_secs(1);

/// An answer that is on its way to a client: while bytes of a blob go to one with credentials, its pull goes on.
pub(super) struct Underway {
    mirror: Arc<Inner>,
    ask: Option<Asker>,
    /// Bytes that went out since it was last noted, and when that was.
    moved: Mutex<(u64, Instant)>,
    turn: Option<Arc<Turn>>,
}

#[derive(Clone)]
struct Asker(Caller, Source, Digest);

/// Marks an answer as a blob that a client's credentials got.
pub(super) fn mark(answer: &mut Answer, ask: &Ask, blob: &Digest) {
    if ask.caller != Caller::Anybody {
        answer
            .extensions_mut()
            .insert(Asker(ask.caller, ask.grant.source.clone(), *blob));
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
        if ask.is_some() || turn.is_some() {
            let (mirror, moved) = (Arc::clone(mirror), Mutex::new((0, Instant::now())));
            answer.extensions_mut().insert(Arc::new(Self {
                mirror,
                ask,
                moved,
                turn,
            }));
        }
    }

    /// Of an answer that is about to be sent; to be kept until it is.
    pub(super) fn take(answer: &mut Answer) -> Option<Arc<Self>> {
        answer.extensions_mut().remove()
    }

    /// Bytes of it went out.
    pub(super) fn served(&self, bytes: u64) {
        self.turn.iter().for_each(|turn| turn.served(bytes));
        if self.ask.is_some() {
            let mut moved = self.moved.lock().unwrap_or_else(PoisonError::into_inner);
            moved.0 += bytes;
            if moved.1.elapsed() >= NOTE_EVERY {
                self.note(&mut moved);
            }
        }
    }

    fn note(&self, moved: &mut (u64, Instant)) {
        let bytes = std::mem::replace(moved, (0, Instant::now())).0;
        if let Some(Asker(caller, source, blob)) = self.ask.as_ref().filter(|_| bytes > 0) {
            self.mirror
                .access
                .served(*caller, source, blob, bytes, Instant::now());
        }
    }
}

impl Drop for Underway {
    fn drop(&mut self) {
        let mut moved = *self.moved.lock().unwrap_or_else(PoisonError::into_inner);
        self.note(&mut moved);
    }
}
