//! Blobs: from the store, else from the download that all who ask share, else, where that can't be, straight from the origin.

use std::ops::Range;

use hawker_core::digest::Digest;
use hawker_core::range::{RangeError, Ranges, Resolved, content_range};
use hawker_core::reference::Source;
use http::header::{ACCEPT_RANGES, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, IF_RANGE, RANGE};
use http::{HeaderMap, HeaderValue, Method, Response, StatusCode};
use tokio::time::Instant;

use super::auth::{self, Confirmed, Given, confirm, note_refusal};
use super::body::Payload;
use super::error::Problem;
use super::forward::{forward, not_encoded, passed_on, with};
use super::manifest::{identity, unchanged};
use super::multipart::Multipart;
use super::{Answer, Ask, Inner, etag, not_modified};
use crate::flight::{FlightError, Reader};
use crate::origin::{Content, OriginBody, Target, content_length};
use crate::store::Blob;

const OCTETS: HeaderValue = HeaderValue::from_static("application/octet-stream");

pub(super) async fn blob(mirror: &Inner, ask: &Ask, digest: &Digest) -> Result<Answer, Problem> {
    if ask.method == Method::HEAD {
        return given(mirror, ask, digest).await;
    }
    let turn = mirror.desk.admit(&ask.purpose).ok_or(Problem::ApplicationFull)?;
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
    if ask.method == Method::GET {
        doubt(mirror, ask, digest, range, size).await;
    }
    if let Some(blob) = committed(mirror, digest).await {
        let wanted = resolve(range, blob.size_bytes())?;
        let size = blob.size_bytes();
        return Ok(content(digest, size, wanted, Held::Store(blob)));
    }
    if ask.method == Method::HEAD {
        return head(mirror, ask, digest, size, range).await;
    }
    download(mirror, ask, digest, size, range).await
}

fn target(ask: &Ask, digest: &Digest) -> Target {
    Target { source: ask.grant.source.clone(), content: Content::Blob(*digest) }
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
            let head = mirror.origin.head(&target(ask, digest), &ask.for_origin()).await?;
            if head.status() != StatusCode::OK {
                note_refusal(mirror, ask, head.status());
                return Err(Problem::refusal(head.status(), head.headers()));
            }
            content_length(head.headers())
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
) -> Result<Answer, Problem> {
    // What can be refused is refused before anything is downloaded for it.
    if let Some(size) = size {
        resolve(range, size)?;
    }
    // Who reads from somewhere to the end reads the whole, in one go or in several.
    let partial = range.and_then(|r| Ranges::parse(r).ok()).is_some_and(|r| r.open_from().is_none());
    let open = mirror.flights.open(*digest, ask.grant.clone(), ask.purpose.clone(), size, partial);
    let flight = match open.await {
        Ok(flight) => flight,
        Err(FlightError::UnknownLength) => return straight(mirror, ask, digest).await,
        Err(error) => return Err(error.into()),
    };
    let known = size;
    let size = flight.size_bytes();
    if known.is_some_and(|known| known != size) {
        mirror.access.belongs(&ask.grant.source, digest, Some(size), Instant::now());
    }
    let wanted = resolve(range, size)?;
    let mut reader = Box::new(flight.read(wanted.ranges(size)));
    reader.begin().await?;
    Ok(content(digest, size, wanted, Held::Flight(reader)))
}

/// A committed blob under lease.
async fn committed(mirror: &Inner, digest: &Digest) -> Option<Blob> {
    if !mirror.store.has(digest) {
        return None;
    }
    let (store, task) = (mirror.store.clone(), *digest);
    tokio::task::spawn_blocking(move || store.committed(&task)).await.ok()?
}

/// Has what this client asks for again hashed first. What is to be the whole and is not yet is hashed once it is.
async fn doubt(mirror: &Inner, ask: &Ask, digest: &Digest, range: Option<&str>, size: Option<u64>) {
    let (bytes, held) = match range.map(Ranges::parse) {
        None => (0..u64::MAX, mirror.store.has(digest)),
        Some(Ok(ranges)) => (ranges.span(size), true),
        Some(Err(_)) => return,
    };
    mirror.rechecks.asked(ask.client, *digest, bytes, held).await;
}

/// Passes on what the blob's own URLs give, all of it, compared with its digest on the way. What is held here already shows
/// nothing of that, and is not given.
async fn elsewhere(mirror: &Inner, ask: &Ask, digest: &Digest, size: Option<u64>) -> Result<Answer, Problem> {
    if let (&Method::HEAD, Some(size)) = (&ask.method, size) {
        return Ok(content(digest, size, Wanted::Whole, Held::Elsewhere));
    }
    let target = target(ask, digest);
    let response = mirror.origin.get(&target, &ask.for_blob(None)).await?;
    if response.status() != StatusCode::OK {
        return forward(response, &target.source);
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
    let payload = Payload::Checked(body, length, *digest, given);
    Ok(with(StatusCode::OK, merged(digest, &head.headers), payload))
}

/// Passes the origin's blob on, uncached, where nobody says how long it is. A whole one is compared with its digest on the way.
async fn straight(mirror: &Inner, ask: &Ask, digest: &Digest) -> Result<Answer, Problem> {
    let target = target(ask, digest);
    let headers = ask.for_blob(asked_range(&ask.headers, digest));
    if ask.method == Method::HEAD {
        let head = mirror.origin.head(&target, &headers).await?;
        if head.status() != StatusCode::OK {
            return Err(Problem::refusal(head.status(), head.headers()));
        }
        return Ok(with(StatusCode::OK, merged(digest, head.headers()), Payload::Empty));
    }
    let response = mirror.origin.get(&target, &headers).await?;
    match response.status() {
        StatusCode::OK => checked(response, digest, &target.source, None),
        StatusCode::PARTIAL_CONTENT => {
            not_encoded(response.headers(), &target.source)?;
            let (head, body) = response.into_parts();
            let (headers, length) = (merged(digest, &head.headers), content_length(&head.headers));
            Ok(with(StatusCode::PARTIAL_CONTENT, headers, Payload::Origin(body, length)))
        }
        _ => forward(response, &target.source),
    }
}

/// What of a blob to send.
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

/// Where its bytes are.
enum Held {
    /// Not here, and only its head is asked for.
    Elsewhere,
    Store(Blob),
    Flight(Box<Reader>),
}

impl Held {
    fn range(self, range: Range<u64>) -> Payload {
        let len = range.end - range.start;
        match self {
            _ if range.is_empty() => Payload::Empty,
            Held::Elsewhere => Payload::Empty,
            Held::Store(blob) => Payload::Blob(blob, range),
            Held::Flight(reader) => Payload::Flight(reader, len),
        }
    }

    fn parts(self, multipart: Multipart) -> Payload {
        match self {
            Held::Elsewhere => Payload::Empty,
            Held::Store(blob) => multipart.of_blob(blob),
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
    let Some(range) = range else { return Ok(Wanted::Whole) };
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
            (StatusCode::PARTIAL_CONTENT, range.end - range.start, held.range(range))
        }
        Wanted::Parts(ranges) => {
            let multipart = Multipart::new(ranges, size);
            headers.insert(CONTENT_TYPE, multipart.content_type());
            (StatusCode::PARTIAL_CONTENT, multipart.len_bytes(), held.parts(multipart))
        }
    };
    headers.insert(CONTENT_LENGTH, len.into());
    with(status, headers, payload)
}
