//! Passing an origin's answer on: which of its headers, and its body as it comes.

use hawker_core::reference::Source;
use http::header::{CONTENT_ENCODING, LINK};
use http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode};

use super::Answer;
use super::body::Payload;
use super::error::Problem;
use crate::origin::{OriginBody, OriginError, content_length};

/// What of an origin's answer a client gets to see, besides what concerns rates.
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
pub(super) const DOCKER_CONTENT_DIGEST: HeaderName = HeaderName::from_static("docker-content-digest");

/// Those headers of an origin's answer that a client gets to see.
pub(super) fn passed_on(from: &HeaderMap) -> HeaderMap {
    let wanted =
        |name: &HeaderName| PASSED_ON.contains(&name.as_str()) || name.as_str().starts_with("ratelimit-");
    from.iter().filter(|(name, _)| wanted(name)).map(|(name, value)| (name.clone(), value.clone())).collect()
}

/// An origin's answer as it is.
pub(super) fn forward(response: Response<OriginBody>, source: &Source) -> Result<Answer, Problem> {
    not_encoded(response.headers(), source)?;
    let (head, body) = response.into_parts();
    let mut headers = passed_on(&head.headers);
    if let Some(link) = head.headers.get(LINK).and_then(|link| next_page(link, source)) {
        headers.insert(LINK, link);
    }
    let length = content_length(&head.headers);
    Ok(with(head.status, headers, Payload::Origin(body, length)))
}

/// The head of an origin's answer.
pub(super) fn forward_head(response: &Response<()>) -> Answer {
    with(response.status(), passed_on(response.headers()), Payload::Empty)
}

pub(super) fn with(status: StatusCode, headers: HeaderMap, payload: Payload) -> Answer {
    let mut answer = Response::new(payload);
    *answer.status_mut() = status;
    *answer.headers_mut() = headers;
    answer
}

/// Bytes that an origin has encoded, though asked not to, are not what digests and ranges are about.
pub(super) fn not_encoded(headers: &HeaderMap, source: &Source) -> Result<(), Problem> {
    match headers.get(CONTENT_ENCODING) {
        None => Ok(()),
        Some(encoding) if encoding.as_bytes().eq_ignore_ascii_case(b"identity") => Ok(()),
        Some(_) => Err(Problem::Unasked(OriginError::Broken {
            registry: source.registry.clone(),
            reason: "it encodes what it was asked for as it is".into(),
        })),
    }
}

/// A registry's link to the next page of a list, so that it leads through this mirror to the same registry.
fn next_page(link: &HeaderValue, source: &Source) -> Option<HeaderValue> {
    let (address, parameters) = link.to_str().ok()?.trim().strip_prefix('<')?.split_once('>')?;
    let path = address.find("/v2/").and_then(|at| address.get(at + "/v2/".len()..))?;
    HeaderValue::try_from(format!("</v2/{}/{path}>{parameters}", source.registry)).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_clients_need_is_passed_on() {
        let mut from = HeaderMap::new();
        for name in ["content-type", "docker-content-digest", "warning", "ratelimit-limit", "oci-subject"] {
            from.insert(HeaderName::from_static(name), HeaderValue::from_static("x"));
        }
        let kept = from.len();
        for name in
            ["set-cookie", "content-encoding", "transfer-encoding", "connection", "location", "server"]
        {
            from.insert(HeaderName::from_static(name), HeaderValue::from_static("x"));
        }
        assert_eq!(passed_on(&from).len(), kept);
    }

    #[test]
    fn a_link_to_the_next_page_leads_through_the_mirror() {
        let source = Source { registry: "r.example:5000".into(), repository: "a/b".into() };
        for link in [
            "</v2/a/b/tags/list?last=x&n=2>; rel=\"next\"",
            "<https://r.example:5000/v2/a/b/tags/list?last=x&n=2>; rel=\"next\"",
        ] {
            let rewritten = next_page(&HeaderValue::from_static(link), &source).unwrap();
            assert_eq!(rewritten, "</v2/r.example:5000/a/b/tags/list?last=x&n=2>; rel=\"next\"");
        }
        assert!(next_page(&HeaderValue::from_static("nonsense"), &source).is_none());
    }
}
