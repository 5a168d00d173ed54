//! Blobs: from the store, else from the download that all who ask share, else, where that can't be, straight from the origin.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use hawker_oci::digest::Digest;
use hawker_oci::range::{RangeError, Ranges, Resolved, content_range};
use hawker_oci::reference::Source;
use http::header::{ACCEPT_RANGES, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, IF_RANGE, RANGE};
use http::{HeaderMap, HeaderValue, Method, Response, StatusCode};
use tokio::time::Instant;

use super::access::Caller;
use super::auth::{self, Confirmed, Given, claimed_by_get, confirm, note_refusal, size_told};
use super::body::Payload;
use super::error::{Problem, is_refusal};
use super::forward::{forward, is_whole_range, not_encoded, passed_on, with};
use super::manifest::{identity, is_for_clients_of, unchanged};
use super::multipart::Multipart;
use super::stored::{Again, Stored};
use super::{Answer, Ask, Inner, etag, not_modified};
use crate::coalesce::Coalesced;
use crate::download::{FlightError, Segment};
use crate::flight::{Gate, Reader};
use crate::origin::ranges::content_range_start;
use crate::origin::{Content, OriginBody, Target, content_length};
use crate::proof::{Asking, Unproved};
use crate::store::{Blob, TaskStore};
use hawker_lanes::{self as lanes, Lane};

const OCTETS: HeaderValue = HeaderValue::from_static("application/octet-stream");

/// Proofs under way: of many clients with the same right, one makes the registry prove what it has.
pub(super) type Proving = Coalesced<(Caller, Source, Digest), Result<(), Unproved>>;

pub(super) async fn blob(mirror: &Inner, ask: &Ask, digest: &Digest) -> Result<Answer, Problem> {
    if ask.method == Method::HEAD {
        return given(mirror, ask, digest).await;
    }
    let turn = mirror
        .desk
        .admit(&ask.purpose)
        .ok_or(Problem::ApplicationFull)?;
    let mut answer = given(mirror, ask, digest).await?;
    auth::counted(&mut answer, turn);
    Ok(answer)
}

async fn given(mirror: &Inner, ask: &Ask, digest: &Digest) -> Result<Answer, Problem> {
    let confirmed = confirm(mirror, ask, digest, Content::Blob(*digest)).await?;
    if not_modified(&ask.headers, digest) {
        return Ok(unchanged(digest));
    }
    let size = match confirmed {
        Confirmed::Here(size) => size,
        Confirmed::Elsewhere(size) => return elsewhere(mirror, ask, digest, size).await,
    };
    let range = asked_range(&ask.headers, digest);
    let is_theirs = is_for_clients_of(mirror, ask, digest).await;
    if ask.method == Method::HEAD && !is_theirs {
        return head(mirror, ask, digest, size, range).await;
    }
    if !is_theirs && let Some(blob) = committed(mirror, digest).await {
        match prove(mirror, ask, digest, size, &blob).await {
            Ok(()) => {}
            Err(Unproved::Unclear(_)) => return straight(mirror, ask, digest).await,
            Err(reason) => return Err(unproved(reason)),
        }
    }
    if ask.method == Method::GET {
        doubt(mirror, ask, digest, range, size).await;
    }
    if let Some(blob) = committed(mirror, digest).await {
        let (size, wanted) = (blob.size_bytes(), resolve(range, blob.size_bytes())?);
        // A blob that the disk let rot while no daemon ran is downloaded like one that is not there.
        if ask.method == Method::HEAD
            || Stored::is_sound(&blob, &wanted.ranges(size), &mirror.flights).await
        {
            let (flights, grant) = (mirror.flights.clone(), ask.grant.clone());
            let again = Again {
                flights,
                grant,
                purpose: ask.purpose.clone(),
            };
            return Ok(content(digest, size, wanted, Held::Store(blob, again)));
        }
    }
    if ask.method == Method::HEAD {
        return head(mirror, ask, digest, size, range).await;
    }
    download(mirror, ask, digest, size, range, is_theirs).await
}

/// Makes the registry prove that it has a blob which came here from elsewhere. `told`: its size, as the registry says.
async fn prove(
    mirror: &Inner,
    ask: &Ask,
    digest: &Digest,
    told: Option<u64>,
    blob: &Blob,
) -> Result<(), Unproved> {
    let size = blob.size_bytes();
    // A registry that is wrong about the size is not shown that.
    if told.is_some_and(|told| told != size) {
        return Err(Unproved::Wrong(*digest));
    }
    let source = &ask.grant.source;
    let proof = async {
        let asking = Asking {
            source,
            headers: ask.for_origin(),
            client: ask.client,
        };
        let (whole, drawn): (Range<u64>, Mutex<Range<u64>>) = (0..size, Mutex::new(0..0));
        let read = |range: &Range<u64>| {
            drawn
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .clone_from(range);
            Some(Segment::File {
                file: Arc::clone(&blob.file),
                range: range.clone(),
            })
        };
        let proved = mirror
            .proofs
            .challenge(&asking, digest, std::slice::from_ref(&whole), read)
            .await;
        match proved {
            Ok(()) => mirror.proofs.note(&source.registry, digest),
            // It may be this node that is wrong.
            Err(Unproved::Wrong(_)) => {
                let drawn = drawn.into_inner().unwrap_or_else(PoisonError::into_inner);
                if !Stored::is_sound(blob, &[drawn], &mirror.flights).await {
                    mirror.proofs.forget_failure(&source.registry, digest);
                    return Err(Unproved::Unclear(*digest));
                }
            }
            Err(_) => {}
        }
        proved
    };
    mirror
        .proving
        .run((ask.caller, source.clone(), *digest), proof)
        .await
}

fn unproved(reason: Unproved) -> Problem {
    match reason {
        Unproved::Refused(status, headers) => Problem::refusal(status, &headers),
        Unproved::Origin(error) => error.into(),
        Unproved::Slow => Problem::Slow,
        // The difference is not told: it is about content that only others may have.
        Unproved::Wrong(_) | Unproved::Unclear(_) => Problem::Unproved(reason.to_string()),
    }
}

fn target(ask: &Ask, digest: &Digest) -> Target {
    Target {
        source: ask.grant.source.clone(),
        content: Content::Blob(*digest),
    }
}

/// The answer to a HEAD for what is not here: never a reason to download it.
async fn head(
    mirror: &Inner,
    ask: &Ask,
    digest: &Digest,
    size: Option<u64>,
    range: Option<&str>,
) -> Result<Answer, Problem> {
    let size = match size {
        Some(size) => Some(size),
        None => {
            let head = mirror
                .origin
                .head(&target(ask, digest), &ask.for_origin())
                .await?;
            match head.status() {
                StatusCode::OK => size_told(digest, &head),
                StatusCode::UNAUTHORIZED
                | StatusCode::NOT_FOUND
                | StatusCode::TOO_MANY_REQUESTS => {
                    note_refusal(mirror, ask, head.status());
                    return Err(Problem::refusal(head.status(), head.headers()));
                }
                // It gives the blob, which is confirmed, and answers no HEAD.
                _ => None,
            }
        }
    };
    Ok(match size {
        Some(size) => content(digest, size, resolve(range, size)?, Held::Elsewhere),
        None => with(StatusCode::OK, described(digest), Payload::Empty),
    })
}

async fn download(
    mirror: &Inner,
    ask: &Ask,
    digest: &Digest,
    size: Option<u64>,
    range: Option<&str>,
    is_theirs: bool,
) -> Result<Answer, Problem> {
    // A request that can be refused is refused before anything is downloaded for it.
    if let Some(size) = size
        && let Err(problem) = resolve(range, size)
    {
        // The registry said that size in an answer to a HEAD, which may be wrong: its answer to the range counts.
        let is_longer = |answer: &Answer| match answer.status() {
            StatusCode::PARTIAL_CONTENT => true,
            StatusCode::OK => content_length(answer.headers()) != Some(size),
            _ => false,
        };
        let answer = straight(mirror, ask, digest).await;
        return answer.ok().filter(is_longer).ok_or(problem);
    }
    // A client that reads from somewhere to the end reads the whole, in one go or in several.
    let partial = range
        .and_then(|r| Ranges::parse(r).ok())
        .is_some_and(|r| r.open_from().is_none());
    // Nobody else asks for the size where only a part is read.
    let size = match size {
        None if partial => match claimed_by_get(mirror, ask, digest, &target(ask, digest)).await {
            Ok(Some(size)) => Some(size),
            Ok(None) | Err(_) => return straight(mirror, ask, digest).await,
        },
        size => size,
    };
    let open = || {
        mirror.flights.open(
            *digest,
            ask.grant.clone(),
            ask.purpose.clone(),
            size,
            partial,
        )
    };
    let flight = match open().await {
        Ok(flight) => flight,
        Err(FlightError::UnknownLength | FlightError::OtherSize(_)) => {
            return straight(mirror, ask, digest).await;
        }
        Err(error) => return Err(error.into()),
    };
    let known = size;
    let size = flight.size_bytes();
    let gate = || {
        (!is_theirs).then(|| Gate::new(Arc::clone(&mirror.proofs), ask.client, ask.for_origin()))
    };
    if known.is_some_and(|known| known != size) && flight.is_size_proven() && is_theirs {
        mirror
            .access
            .belongs(&ask.grant.source, digest, Some(size), Instant::now());
    }
    let wanted = match resolve(range, size) {
        // The size may be known from elsewhere: the registry itself says what it has to say.
        Err(Problem::Unsatisfiable(_)) if !is_theirs => return straight(mirror, ask, digest).await,
        wanted => wanted?,
    };
    let mut reader = Box::new(flight.read(wanted.ranges(size)).gated(gate()));
    match reader.begin().await {
        // Nothing was promised yet, and the registry's own bytes decide what is right.
        Err(FlightError::Unprovable(_) | FlightError::WrongSize(_)) => {
            return straight(mirror, ask, digest).await;
        }
        // A commit came between, and the disk has let it rot: the next one begins anew.
        Err(FlightError::Rotten(_)) => {
            reader = Box::new(open().await?.read(wanted.ranges(size)).gated(gate()));
            reader.begin().await?;
        }
        begun => begun?,
    }
    Ok(content(digest, size, wanted, Held::Flight(reader)))
}

/// A committed blob under lease.
async fn committed(mirror: &Inner, digest: &Digest) -> Option<Blob> {
    if !mirror.store.has(digest) {
        return None;
    }
    let (store, task) = (mirror.store.clone(), *digest);
    if let Some(blob) = store.opened(&task) {
        return Some(blob);
    }
    lanes::run(Lane::Clients, move || store.committed(&task)).await?
}

/// Has the bytes that this client asks for again hashed first. A blob that is not whole yet is hashed once it is.
async fn doubt(mirror: &Inner, ask: &Ask, digest: &Digest, range: Option<&str>, size: Option<u64>) {
    let (bytes, held) = match range.map(Ranges::parse) {
        None => (0..u64::MAX, mirror.store.has(digest)),
        Some(Ok(ranges)) => (ranges.span(size), true),
        Some(Err(_)) => return,
    };
    mirror
        .rechecks
        .asked(ask.client, *digest, bytes, held)
        .await;
}

/// Passes on the answer of the blob's own URLs, all of it, compared with its digest on the way. Bytes held here
/// already show nothing of that, and are not given.
async fn elsewhere(
    mirror: &Inner,
    ask: &Ask,
    digest: &Digest,
    size: Option<u64>,
) -> Result<Answer, Problem> {
    if let (&Method::HEAD, Some(size)) = (&ask.method, size) {
        return Ok(content(digest, size, Wanted::Whole, Held::Elsewhere));
    }
    let target = target(ask, digest);
    let response = mirror.origin.get(&target, &ask.for_blob(None)).await?;
    if !is_entire(&response) {
        return refused(response, &target.source);
    }
    let given = Given::elsewhere(mirror, ask, digest);
    checked(response, digest, &target.source, Some(given))
}

/// An origin's blob, which ends short if it is another.
fn checked(
    response: Response<OriginBody>,
    digest: &Digest,
    source: &Source,
    given: Option<Given>,
) -> Result<Answer, Problem> {
    not_encoded(response.headers(), source)?;
    let (head, body) = response.into_parts();
    let length = content_length(&head.headers);
    let payload = Payload::Checked(body, length, *digest, given.map(Box::new));
    let mut headers = merged(digest, &head.headers);
    headers.remove(CONTENT_RANGE);
    Ok(with(StatusCode::OK, headers, payload))
}

/// Passes the origin's blob on, uncached, where nobody says how long it is, or registries disagree on that. A whole one is compared with its digest on the way.
async fn straight(mirror: &Inner, ask: &Ask, digest: &Digest) -> Result<Answer, Problem> {
    let target = target(ask, digest);
    let headers = ask.for_blob(asked_range(&ask.headers, digest));
    let is_range_asked = headers.contains_key(RANGE);
    if ask.method == Method::HEAD {
        let head = mirror.origin.head(&target, &headers).await?;
        if head.status() != StatusCode::OK {
            return Err(Problem::refusal(head.status(), head.headers()));
        }
        return Ok(with(
            StatusCode::OK,
            merged(digest, head.headers()),
            Payload::Empty,
        ));
    }
    let response = mirror.origin.get(&target, &headers).await?;
    match response.status() {
        StatusCode::PARTIAL_CONTENT
            if is_range_asked && content_range_start(response.headers()).is_some() =>
        {
            not_encoded(response.headers(), &target.source)?;
            let (head, body) = response.into_parts();
            let (headers, length) = (merged(digest, &head.headers), content_length(&head.headers));
            Ok(with(
                StatusCode::PARTIAL_CONTENT,
                headers,
                Payload::Origin(body, length),
            ))
        }
        _ if is_entire(&response) => {
            let given = Given::elsewhere(mirror, ask, digest).proving_size(&mirror.flights);
            checked(response, digest, &target.source, Some(given))
        }
        _ => refused(response, &target.source),
    }
}

/// Whether an answer brings the whole blob. Its bytes are still compared with the digest.
fn is_entire(response: &Response<OriginBody>) -> bool {
    let is_all = || {
        content_length(response.headers())
            .is_some_and(|len| is_whole_range(response.headers(), len))
    };
    match response.status() {
        StatusCode::OK => true,
        StatusCode::PARTIAL_CONTENT => is_all(),
        _ => false,
    }
}

/// The registry's refusal; an error for any other answer, since nothing compares it with the digest.
fn refused(response: Response<OriginBody>, source: &Source) -> Result<Answer, Problem> {
    match is_refusal(response.status()) {
        true => forward(response, source, false),
        false => Err(Problem::Odd(response.status())),
    }
}

/// The part of a blob to send.
enum Wanted {
    /// 200
    Whole,
    /// 206
    Part(Range<u64>),
    /// 206 with several parts
    Parts(Vec<Range<u64>>),
}

impl Wanted {
    fn ranges(&self, size: u64) -> Vec<Range<u64>> {
        match self {
            Wanted::Whole => std::iter::once(0..size).collect(),
            Wanted::Part(range) => std::iter::once(range.clone()).collect(),
            Wanted::Parts(ranges) => ranges.clone(),
        }
    }
}

/// The place of its bytes.
enum Held {
    /// Not here, and only its head is asked for.
    Elsewhere,
    Store(Blob, Again),
    Flight(Box<Reader>),
}

impl Held {
    fn range(self, range: Range<u64>) -> Payload {
        let len = range.end - range.start;
        match self {
            _ if range.is_empty() => Payload::Empty,
            Held::Elsewhere => Payload::Empty,
            Held::Store(blob, _) if blob.is_checked(&range) => Payload::Blob(blob, range),
            Held::Store(blob, again) => {
                let mut stored = Stored::new(blob, again);
                stored.read(range);
                Payload::Stored(Box::new(stored), len)
            }
            Held::Flight(reader) => Payload::Flight(reader, len),
        }
    }

    fn parts(self, multipart: Multipart) -> Payload {
        match self {
            Held::Elsewhere => Payload::Empty,
            Held::Store(blob, again) => multipart.of_blob(Stored::new(blob, again)),
            Held::Flight(reader) => multipart.of_flight(reader),
        }
    }
}

/// The range asked for, as it came; none where `If-Range` is about other content (RFC 9110, 13.1.5).
fn asked_range<'a>(headers: &'a HeaderMap, digest: &Digest) -> Option<&'a str> {
    let range = headers.get(RANGE)?;
    match headers.get(IF_RANGE) {
        Some(condition) if *condition != etag(digest) => None,
        _ => Some(range.to_str().unwrap_or_default()),
    }
}

fn resolve(range: Option<&str>, size: u64) -> Result<Wanted, Problem> {
    let Some(range) = range else {
        return Ok(Wanted::Whole);
    };
    let ranges = Ranges::parse(range).map_err(|error| match error {
        RangeError::Malformed => Problem::Unsatisfiable(size),
        RangeError::TooMany => Problem::TooManyRanges,
    })?;
    match ranges.resolve(size) {
        Resolved::Whole => Ok(Wanted::Whole),
        Resolved::One(range) => Ok(Wanted::Part(range)),
        Resolved::Many(ranges) => Ok(Wanted::Parts(ranges)),
        Resolved::TooMuch => Err(Problem::TooManyRanges),
        Resolved::Unsatisfiable => Err(Problem::Unsatisfiable(size)),
    }
}

/// An origin's headers, with those of the content's identity.
fn merged(digest: &Digest, from: &HeaderMap) -> HeaderMap {
    let mut headers = passed_on(from);
    headers.extend(identity(digest));
    headers.entry(CONTENT_TYPE).or_insert(OCTETS);
    headers
}

/// The headers of every blob.
fn described(digest: &Digest) -> HeaderMap {
    let mut headers = identity(digest);
    headers.insert(CONTENT_TYPE, OCTETS);
    headers.insert(ACCEPT_RANGES, HeaderValue::from_static("bytes"));
    headers
}

/// A 200 or a 206.
fn content(digest: &Digest, size: u64, wanted: Wanted, held: Held) -> Answer {
    let mut headers = described(digest);
    let (status, len, payload) = match wanted {
        Wanted::Whole => (StatusCode::OK, size, held.range(0..size)),
        Wanted::Part(range) => {
            let text = HeaderValue::try_from(content_range(&range, size));
            headers.insert(CONTENT_RANGE, text.expect("digits are a header's value"));
            (
                StatusCode::PARTIAL_CONTENT,
                range.end - range.start,
                held.range(range),
            )
        }
        Wanted::Parts(ranges) => {
            let multipart = Multipart::new(ranges, size);
            headers.insert(CONTENT_TYPE, multipart.content_type());
            (
                StatusCode::PARTIAL_CONTENT,
                multipart.len_bytes(),
                held.parts(multipart),
            )
        }
    };
    headers.insert(CONTENT_LENGTH, len.into());
    with(status, headers, payload)
}
