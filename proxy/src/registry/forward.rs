//! Passing an origin's answer on: which of its headers, and its body as it comes.

use hawker_oci::reference::{self, Source};
use http::header::{CONTENT_ENCODING, CONTENT_RANGE, LINK};
use http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode, Uri};

use super::Answer;

use super::body::Payload;
use super::error::{Problem, is_refusal};
use crate::origin::ranges::{content_range_size, content_range_start};
use crate::origin::{OriginBody, OriginError, content_length, is_page};

/// The headers of an origin's answer that a client gets to see, besides those about rates.
const PASSED_ON: [&str; 11] = [
    "accept-ranges",
    "content-length",
    "content-range",
    "content-type",
    "docker-content-digest",
    "etag",
    "oci-filters-applied",
    "oci-subject",
    "retry-after",
    "warning",
    "www-authenticate",
];
/// `Docker-Content-Digest`
pub(super) const DOCKER_CONTENT_DIGEST: HeaderName =
    HeaderName::from_static("docker-content-digest");

/// Those headers of an origin's answer that a client gets to see.
pub(super) fn passed_on(from: &HeaderMap) -> HeaderMap {
    let wanted = |name: &HeaderName| {
        PASSED_ON.contains(&name.as_str()) || name.as_str().starts_with("ratelimit-")
    };
    from.iter()
        .filter(|(name, _)| wanted(name))
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect()
}

/// An origin's answer as it is: a list, a ping or an error, which count as no content. `conditional`: the client told what it has.
pub(super) fn forward(
    response: Response<OriginBody>,
    source: &Source,
    conditional: bool,
) -> Result<Answer, Problem> {
    let (head, body) = response.into_parts();
    let status = status_for_client(head.status, &head.headers, conditional)?;
    if let Err(encoded) = not_encoded(&head.headers, source) {
        // A refusal needs no body.
        return Err(if is_refusal(status) {
            Problem::refusal(status, &head.headers)
        } else {
            encoded
        });
    }
    let length = content_length(&head.headers);
    let mut answer = with(
        status,
        passed_on(&head.headers),
        Payload::Passed(body, length),
    );
    if status == StatusCode::OK {
        answer.headers_mut().remove(CONTENT_RANGE);
    }
    Ok(answer)
}

/// The head of an origin's answer.
pub(super) fn forward_head(response: &Response<()>, conditional: bool) -> Result<Answer, Problem> {
    let status = status_for_client(response.status(), response.headers(), conditional)?;
    let mut answer = with(status, passed_on(response.headers()), Payload::Empty);
    if status == StatusCode::OK {
        answer.headers_mut().remove(CONTENT_RANGE);
    }
    Ok(answer)
}

/// The status with which a client gets an answer whose bytes are not compared with anything. An error for what is neither the
/// whole content nor a refusal.
fn status_for_client(
    status: StatusCode,
    head: &HeaderMap,
    conditional: bool,
) -> Result<StatusCode, Problem> {
    let is_all = || content_length(head).is_some_and(|bytes| is_whole_range(head, bytes));
    match status {
        StatusCode::OK | StatusCode::NON_AUTHORITATIVE_INFORMATION if is_page(head) => {
            Err(Problem::NoManifest)
        }
        StatusCode::OK | StatusCode::NON_AUTHORITATIVE_INFORMATION => Ok(StatusCode::OK),
        StatusCode::PARTIAL_CONTENT if is_all() => Ok(StatusCode::OK),
        StatusCode::NOT_MODIFIED if conditional => Ok(status),
        status if is_refusal(status) => Ok(status),
        status => Err(Problem::Odd(status)),
    }
}

/// Whether a 206 whose body has so many bytes brings the whole content.
pub(super) fn is_whole_range(head: &HeaderMap, bytes: u64) -> bool {
    content_range_start(head) == Some(0) && content_range_size(head) == Some(bytes)
}

pub(super) fn with(status: StatusCode, headers: HeaderMap, payload: Payload) -> Answer {
    let mut answer = Response::new(payload);
    *answer.status_mut() = status;
    *answer.headers_mut() = headers;
    answer
}

/// Bytes that an origin has encoded, though asked not to, are not what digests and ranges are about.
pub(super) fn not_encoded(headers: &HeaderMap, source: &Source) -> Result<(), Problem> {
    match is_encoded(headers) {
        false => Ok(()),
        true => Err(Problem::Unasked(OriginError::Broken {
            registry: source.registry.clone(),
            reason: "it encodes what it was asked for as it is".into(),
        })),
    }
}

/// Whether an answer is about content as it was encoded for the way.
pub(super) fn is_encoded(headers: &HeaderMap) -> bool {
    let mut lines = headers.get_all(CONTENT_ENCODING).iter();
    lines.any(|line| !line.is_empty() && !line.as_bytes().eq_ignore_ascii_case(b"identity"))
}

/// The link to the next page of a list, so that it leads the same way as the request at `uri` did.
pub(super) fn next_page(uri: &Uri, head: &HeaderMap) -> Option<HeaderValue> {
    let lines = head
        .get_all(LINK)
        .iter()
        .filter_map(|line| line.to_str().ok());
    let links: Vec<_> = lines.flat_map(links).collect();
    let next = match links.as_slice() {
        [(address, None)] => Some(*address),
        links => links
            .iter()
            .find(|(_, rel)| rel.is_some_and(is_next))
            .map(|(address, _)| *address),
    };
    let target = reference::next_page(uri.path(), uri.query(), next?)?;
    HeaderValue::try_from(format!("<{target}>; rel=\"next\"")).ok()
}

/// The addresses of a `Link` header (RFC 8288), each with its relation, if it has one. Some registries leave the brackets out.
fn links(line: &str) -> Vec<(&str, Option<&str>)> {
    if !line.contains('<') {
        let (address, parameters) = line.split_once(';').unwrap_or((line, ""));
        return vec![(address.trim(), relation(parameters))];
    }
    let mut links = Vec::new();
    let mut rest = line;
    while let Some((address, after)) = rest
        .split_once('<')
        .and_then(|(_, link)| link.split_once('>'))
    {
        let (parameters, others) = after.split_at(after.find('<').unwrap_or(after.len()));
        links.push((address.trim(), relation(parameters)));
        rest = others;
    }
    links
}

/// The value of `rel` among a link's parameters.
fn relation(parameters: &str) -> Option<&str> {
    let mut is_quoted = false;
    let mut between = parameters.split(|c| {
        is_quoted ^= c == '"';
        !is_quoted && matches!(c, ';' | ',')
    });
    between.find_map(|parameter| {
        let (name, value) = parameter.split_once('=')?;
        name.trim()
            .eq_ignore_ascii_case("rel")
            .then(|| value.trim().trim_matches('"'))
    })
}

fn is_next(relations: &str) -> bool {
    relations
        .split_whitespace()
        .any(|relation| relation.eq_ignore_ascii_case("next"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_clients_need_is_passed_on() {
        let mut from = HeaderMap::new();
        for name in [
            "content-type",
            "docker-content-digest",
            "warning",
            "ratelimit-limit",
            "oci-subject",
        ] {
            from.insert(HeaderName::from_static(name), HeaderValue::from_static("x"));
        }
        let kept = from.len();
        for name in [
            "set-cookie",
            "content-encoding",
            "transfer-encoding",
            "connection",
            "location",
            "server",
        ] {
            from.insert(HeaderName::from_static(name), HeaderValue::from_static("x"));
        }
        assert_eq!(passed_on(&from).len(), kept);
    }

    #[test]
    fn a_link_to_the_next_page_leads_the_way_that_this_request_came() {
        let uri = Uri::from_static("/v2/r.example:5000/a/b/tags/list?n=2");
        for (lines, next) in [
            (
                &["</v2/a/b/tags/list?last=x&n=2>; rel=\"next\""][..],
                Some("last=x&n=2"),
            ),
            (
                &["<https://r.example:5000/v2/a/b/tags/list?last=x>; rel=\"next\""],
                Some("last=x"),
            ),
            (
                &["<?t=a%2Fb%3D%3D>; Rel=NEXT; title=\"x\""],
                Some("t=a%2Fb%3D%3D"),
            ),
            (
                &["</v2/x?p=0>; rel=\"prev\", </v2/x?p=2,3>; rel=\"last next\""],
                Some("p=2,3"),
            ),
            (
                &["</v2/x?p=0>; rel=prev", "</v2/x?p=2>; rel=next"],
                Some("p=2"),
            ),
            (&["</v2/x?p=2>"], Some("p=2")),
            (&["/v2/x?p=2; rel=\"next\""], Some("p=2")),
            (
                &["</v2/x?p=2>; title=\"a, b; rel=prev\"; rel=\"next\""],
                Some("p=2"),
            ),
            (&["</v2/x?p=0>; rel=\"prev\""], None),
            (&["</v2/x?p=0>, </v2/x?p=1>"], None),
            (&["</v2/a/b/tags/list>; rel=\"next\""], None),
            (&["nonsense"], None),
            (&["<"], None),
            (&[""], None),
            (&[], None),
        ] {
            let lines = lines
                .iter()
                .map(|line| (LINK, HeaderValue::from_static(line)));
            let found = next_page(&uri, &lines.clone().collect());
            let expected = next
                .map(|query| format!("</v2/r.example:5000/a/b/tags/list?{query}>; rel=\"next\""));
            assert_eq!(
                found.as_ref().map(|link| link.to_str().unwrap()),
                expected.as_deref(),
                "{:?}",
                lines.collect::<Vec<_>>()
            );
        }
    }

    #[test]
    fn a_client_hears_content_or_a_refusal_and_nothing_in_between() {
        let head = |pairs: &[(&'static str, &'static str)]| {
            pairs
                .iter()
                .map(|(name, value)| {
                    (
                        HeaderName::from_static(name),
                        HeaderValue::from_static(value),
                    )
                })
                .collect()
        };
        let (plain, whole) = (
            head(&[]),
            head(&[("content-range", "bytes 0-4/5"), ("content-length", "5")]),
        );
        let part = head(&[("content-range", "bytes 0-4/9"), ("content-length", "5")]);
        let page = head(&[("content-type", "Text/HTML; charset=utf-8")]);
        for (status, head, conditional, expected) in [
            (200, &plain, false, Some(200)),
            (203, &plain, false, Some(200)),
            (206, &whole, false, Some(200)),
            (206, &part, false, None),
            (206, &plain, false, None),
            (200, &page, false, None),
            (404, &page, false, Some(404)),
            (101, &plain, false, None),
            (201, &plain, false, None),
            (204, &plain, false, None),
            (300, &plain, false, None),
            (302, &plain, true, None),
            (304, &plain, false, None),
            (304, &plain, true, Some(304)),
            (401, &plain, false, Some(401)),
            (501, &plain, false, Some(501)),
        ] {
            let status = StatusCode::from_u16(status).unwrap();
            let found = status_for_client(status, head, conditional)
                .ok()
                .map(|status| status.as_u16());
            assert_eq!(found, expected, "{status} {head:?} {conditional}");
        }
    }
}
