//! From a request to who answers it.

use std::net::{IpAddr, Ipv6Addr};
use std::time::Duration;

use hawker_core::application::Purpose;
use hawker_oci::reference::{self, Asked};
use http::header::{
    AUTHORIZATION, CONTENT_LENGTH, IF_NONE_MATCH, IF_RANGE, LINK, RANGE, VIA, WWW_AUTHENTICATE,
};
use http::request::Parts;
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri};
use tokio::time::timeout;

use super::access::Caller;
use super::auth::note_refusal;
use super::body::Payload;
use super::error::Problem;
use super::forward::{forward, forward_head, next_page, with};
use super::token::{self, Admission};
use super::{Answer, Inner, auth, blob, manifest};
use crate::applications;
use crate::grant::{Authorization, Grant};
use crate::metrics::RequestKind;
use crate::origin::{Content, Target};
use crate::recent::RecentRequest;

/// For an answer's head: newer runtimes give up after 30 s, and old ones wait for ever.
const HEAD: Duration = Duration::from_secs(28);

const OCI_NAMESPACE: HeaderName = HeaderName::from_static("oci-namespace");
const API_VERSION: HeaderName = HeaderName::from_static("docker-distribution-api-version");

/// A request for something of a repository.
pub(super) struct Ask {
    pub(super) method: Method,
    pub(super) grant: Grant,
    pub(super) caller: Caller,
    /// For whom, and how urgent.
    pub(super) purpose: Purpose,
    pub(super) headers: HeaderMap,
    pub(super) client: IpAddr,
}

impl Ask {
    fn new(
        mirror: &Inner,
        method: Method,
        source: reference::Source,
        mut headers: HeaderMap,
        client: IpAddr,
    ) -> Result<Self, Problem> {
        let told = applications::told(&headers).map_err(Problem::Malformed)?;
        applications::strip(&mut headers);
        let purpose = mirror.desk.purpose(&source, &told);
        let grant = Grant {
            source,
            authorization: Authorization::of(&headers),
        };
        Ok(Self {
            method,
            caller: Caller::of(&grant),
            grant,
            purpose,
            headers,
            client,
        })
    }

    /// The caller of a peer, for which this node is the seed.
    pub(super) fn of_peer(grant: Grant) -> Self {
        let (headers, client) = (HeaderMap::new(), IpAddr::V6(Ipv6Addr::UNSPECIFIED));
        let (method, purpose) = (Method::GET, Purpose::default());
        Self {
            method,
            caller: Caller::of(&grant),
            grant,
            purpose,
            headers,
            client,
        }
    }

    /// The headers to ask the origin with on the client's behalf: its right, and the way that its request has come, so that a
    /// circle is noticed.
    pub(super) fn for_origin(&self) -> HeaderMap {
        let mut headers = self.grant.headers();
        for via in self.headers.get_all(VIA) {
            headers.append(VIA, via.clone());
        }
        headers
    }

    /// The request's headers without those that make sense for blobs only.
    pub(super) fn without_ranges(&self) -> HeaderMap {
        let mut headers = self.headers.clone();
        headers.remove(RANGE);
        headers.remove(IF_RANGE);
        headers
    }

    /// The headers to ask the origin for this range of a blob with. Conditions are dropped: they are about our `ETag`.
    pub(super) fn for_blob(&self, range: Option<&str>) -> HeaderMap {
        let mut headers = self.without_ranges();
        headers.remove(IF_NONE_MATCH);
        if let Some(range) = range.and_then(|range| HeaderValue::from_str(range).ok()) {
            headers.insert(RANGE, range);
        }
        headers
    }
}

/// Answers a request, whatever it is. `at`: it was sent to this registry, and is answered as from there.
pub(super) async fn answer(
    mirror: &Inner,
    mut request: Parts,
    at: Option<&str>,
    client: IpAddr,
) -> Answer {
    let is_head = request.method == Method::HEAD;
    let method = request.method.as_str();
    let (path, query) = (request.uri.path(), request.uri.query());
    let asked = match at {
        None => reference::parse(method, path, query),
        Some(registry) => reference::parse_at(registry, method, path, query),
    };
    let kind = asked.as_ref().map_or(RequestKind::Other, kind_of);
    let named = asked
        .as_ref()
        .ok()
        .and_then(registry_of)
        .filter(|_| at.is_none())
        .cloned();
    let recent = asked
        .as_ref()
        .ok()
        .and_then(|asked| RecentRequest::of(method, asked, at));
    let mut admission = Admission::default();
    let asked = asked.map_err(Problem::from).and_then(|asked| {
        not_in_a_circle(mirror, &request.headers)?;
        // A caller that asks the registry itself is the registry's own client.
        if at.is_none() {
            admission = token::admit(mirror, &mut request, &asked)?;
        }
        Ok(asked)
    });
    let answered = match asked {
        Ok(asked) => Box::pin(timeout(HEAD, dispatch(mirror, request, asked, client)))
            .await
            .unwrap_or(Err(Problem::Slow)),
        Err(problem) => Err(problem),
    };
    let mut reason = String::new();
    let mut answer = answered.unwrap_or_else(|problem| {
        reason = problem.to_string();
        tracing::info!(status = problem.status().as_u16(), reason = %problem, "not served");
        problem.answer(kind)
    });
    admission.mend(&mut answer);
    let headers = answer.headers_mut();
    headers.insert(API_VERSION, HeaderValue::from_static("registry/2.0"));
    if let Some(namespace) = named.and_then(|name| HeaderValue::try_from(name).ok()) {
        headers.insert(OCI_NAMESPACE, namespace);
    }
    if is_head {
        answer = without_body(answer);
    }
    tracing::debug!(status = answer.status().as_u16(), "answered");
    let status = answer.status().as_u16();
    mirror.metrics.request(kind, status);
    if let Some(recent) = recent {
        mirror.metrics.recent.answered(recent, status, reason);
    }
    answer
}

fn kind_of(asked: &Asked) -> RequestKind {
    match asked {
        Asked::Ping { .. } => RequestKind::Ping,
        Asked::Content(request) => match request.content {
            reference::Content::Manifest(_) => RequestKind::Manifest,
            reference::Content::Blob(_) => RequestKind::Blob,
            reference::Content::Tags { .. } => RequestKind::Tags,
            reference::Content::Referrers { .. } => RequestKind::Referrers,
        },
    }
}

fn registry_of(asked: &Asked) -> Option<&String> {
    match asked {
        Asked::Ping { registry } => registry.as_ref(),
        Asked::Content(request) => request.registry.as_ref(),
    }
}

/// An error if a request has passed through this daemon before.
pub(super) fn not_in_a_circle(mirror: &Inner, headers: &HeaderMap) -> Result<(), Problem> {
    if is_loop(headers, mirror.origin.pseudonym()) {
        Err(Problem::Loop)
    } else {
        Ok(())
    }
}

/// Whether a request has passed through this daemon before.
pub(super) fn is_loop(headers: &HeaderMap, pseudonym: &str) -> bool {
    let lines = headers
        .get_all(VIA)
        .iter()
        .filter_map(|line| line.to_str().ok());
    lines
        .flat_map(|line| line.split(','))
        .any(|hop| hop.split_whitespace().nth(1) == Some(pseudonym))
}

async fn dispatch(
    mirror: &Inner,
    request: Parts,
    asked: Asked,
    client: IpAddr,
) -> Result<Answer, Problem> {
    let default = mirror.live.load().registries.default.clone();
    let authorized = request.headers.contains_key(AUTHORIZATION);
    let offer = token::offer(&request, &asked);
    let asked = match asked {
        Asked::Content(asked) => asked,
        Asked::Ping { registry } if authorized && (registry.is_some() || default.is_some()) => {
            let registry = registry.or(default).ok_or(Problem::NoRegistry)?;
            return ping(mirror, registry, &request.headers).await;
        }
        Asked::Ping { .. } => return Ok(pong(offer)),
    };
    if asked.registry.is_none() && default.is_none() {
        return Err(Problem::NoRegistry);
    }
    let source = asked.source(&default.unwrap_or_default());
    let ask = Ask::new(mirror, request.method, source, request.headers, client)?;
    let mut answer = content(mirror, &ask, &asked, &request.uri).await?;
    if let reference::Content::Blob(digest) = &asked.content {
        auth::mark(&mut answer, &ask, digest);
    }
    Ok(answer)
}

async fn content(
    mirror: &Inner,
    ask: &Ask,
    asked: &reference::Request,
    uri: &Uri,
) -> Result<Answer, Problem> {
    match &asked.content {
        reference::Content::Manifest(reference) => manifest::manifest(mirror, ask, reference).await,
        reference::Content::Blob(digest) => blob::blob(mirror, ask, digest).await,
        reference::Content::Tags { query } => list(mirror, ask, Content::Tags, query, uri).await,
        reference::Content::Referrers { digest, query } => {
            list(mirror, ask, Content::Referrers(*digest), query, uri).await
        }
    }
}

/// The answer to `/v2/`: this mirror speaks the API.
fn pong(offer: Option<HeaderValue>) -> Answer {
    let mut headers = HeaderMap::from_iter([(
        http::header::CONTENT_TYPE,
        HeaderValue::from_static("application/json"),
    )]);
    headers.extend(offer.map(|challenge| (WWW_AUTHENTICATE, challenge)));
    with(StatusCode::OK, headers, Payload::Notice("{}".into()))
}

/// `/v2/` with credentials: whether they are good is for the registry to say.
async fn ping(mirror: &Inner, registry: String, headers: &HeaderMap) -> Result<Answer, Problem> {
    let source = reference::Source {
        registry,
        repository: String::new(),
    };
    let target = Target {
        source,
        content: Content::Ping,
    };
    forward(
        mirror.origin.get(&target, headers).await?,
        &target.source,
        false,
    )
}

/// Tags and referrers, as the origin has them now. `uri` is the client's own, from which the next page is to be had as well.
async fn list(
    mirror: &Inner,
    ask: &Ask,
    content: Content,
    query: &str,
    uri: &Uri,
) -> Result<Answer, Problem> {
    let target = Target {
        source: ask.grant.source.clone(),
        content,
    };
    let headers = ask.without_ranges();
    let query = Some(query).filter(|query| !query.is_empty());
    let conditional = headers.contains_key(IF_NONE_MATCH);
    let (mut answer, next) = if ask.method == Method::HEAD {
        let head = mirror.origin.head_page(&target, query, &headers).await?;
        (
            forward_head(&head, conditional)?,
            next_page(uri, head.headers()),
        )
    } else {
        let response = mirror.origin.get_page(&target, query, &headers).await?;
        note_refusal(mirror, ask, response.status());
        let next = next_page(uri, response.headers());
        (forward(response, &target.source, conditional)?, next)
    };
    if let Some(next) = next {
        answer.headers_mut().insert(LINK, next);
    }
    Ok(answer)
}

/// The same answer for HEAD: it says how long the body would be.
fn without_body(mut answer: Answer) -> Answer {
    if let Some(len) = answer
        .body()
        .len_bytes()
        .filter(|_| !answer.headers().contains_key(CONTENT_LENGTH))
        && !matches!(answer.body(), Payload::Empty)
    {
        answer.headers_mut().insert(CONTENT_LENGTH, len.into());
    }
    *answer.body_mut() = Payload::Empty;
    answer
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_that_passed_here_is_a_loop() {
        for (lines, is) in [
            (&[][..], false),
            (&["1.1 hawker-2"], false),
            (&["1.1 hawker-1"], true),
            (&["1.0 fred, 1.1 hawker-1 (node)"], true),
            (&["1.1 fred", "1.1 hawker-1"], true),
            (&["1.1 hawker-12"], false),
            (&["hawker-1"], false),
        ] {
            let mut all = HeaderMap::new();
            for line in lines {
                all.append(VIA, HeaderValue::from_static(line));
            }
            assert_eq!(is_loop(&all, "hawker-1"), is, "{lines:?}");
        }
    }
}
