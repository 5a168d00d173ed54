//! The checks of a request's head before any answer: heads that two programs could read in two ways are refused.
//!
//! hyper has seen to the rest: one framing (a `Content-Length` beside `Transfer-Encoding` counts for nothing and ends the
//! connection), no folded lines, no space before a colon, no control characters, bounds.

use http::header::{HOST, TRANSFER_ENCODING};
use http::uri::Authority;
use http::{HeaderMap, Request, Uri, Version};

use super::error::Problem;

/// Refuses a request whose host or framing is in doubt.
pub(super) fn check<B>(request: &Request<B>) -> Result<(), Problem> {
    let host = host(request.headers(), request.version())?;
    coding(request.headers())?;
    let Some(target) = request.uri().authority() else {
        return Ok(());
    };
    if has_user(target) {
        return Err(Problem::Malformed("it carries a user name in its address"));
    }
    // RFC 9112, 3.2.2, has the target count; a Host that says something else is nobody's honest mistake.
    match host {
        Some(host) if !same(&host, target, default_port(request.uri())) => Err(Problem::Malformed(
            "its address and its Host are not the same",
        )),
        _ => Ok(()),
    }
}

/// The one host that a request names in a header of that name (RFC 9112, 3.2). It may be empty.
pub(crate) fn host(headers: &HeaderMap, version: Version) -> Result<Option<Authority>, Problem> {
    let mut lines = headers.get_all(HOST).iter();
    let (first, second) = (lines.next(), lines.next());
    match (first, second) {
        (None, _) if version < Version::HTTP_11 => Ok(None),
        (None, _) => Err(Problem::Malformed("it has no Host")),
        (Some(_), Some(_)) => Err(Problem::Malformed("it has several Hosts")),
        (Some(line), None) if line.is_empty() => Ok(None),
        (Some(line), None) => match Authority::try_from(line.as_bytes()) {
            Ok(host) if !has_user(&host) => Ok(Some(host)),
            _ => Err(Problem::Malformed("its Host is none")),
        },
    }
}

/// `chunked`, once, is the only coding that is taken off here (RFC 9112, 6.1).
fn coding(headers: &HeaderMap) -> Result<(), Problem> {
    let mut lines = headers.get_all(TRANSFER_ENCODING).iter();
    let (first, second) = (lines.next(), lines.next());
    match (first, second) {
        (None, _) => Ok(()),
        (Some(coding), None) if coding.as_bytes().eq_ignore_ascii_case(b"chunked") => Ok(()),
        _ => Err(Problem::Malformed(
            "its Transfer-Encoding is not just chunked",
        )),
    }
}

fn has_user(authority: &Authority) -> bool {
    authority.as_str().contains('@')
}

/// Whether two say the same, `default` being the port that goes without saying.
pub(crate) fn same(a: &Authority, b: &Authority, default: u16) -> bool {
    let port = |authority: &Authority| authority.port_u16().unwrap_or(default);
    a.host().eq_ignore_ascii_case(b.host()) && port(a) == port(b)
}

fn default_port(uri: &Uri) -> u16 {
    if uri.scheme_str() == Some("http") {
        80
    } else {
        443
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(target: &str, headers: &[(&str, &str)], version: Version) -> bool {
        let mut request = Request::builder().uri(target).version(version);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        check(&request.body(()).unwrap()).is_ok()
    }

    #[test]
    fn a_head_that_can_be_read_in_two_ways_is_refused() {
        let host = ("Host", "a.example");
        for (target, headers, fine) in [
            ("/v2/", &[host][..], true),
            ("/v2/", &[("Host", "")], true),
            ("/v2/", &[], false),
            ("/v2/", &[host, host], false),
            ("/v2/", &[("Host", "a b")], false),
            ("/v2/", &[("Host", "me@a.example")], false),
            ("/v2/", &[host, ("Transfer-Encoding", "Chunked")], true),
            (
                "/v2/",
                &[host, ("Transfer-Encoding", "gzip, chunked")],
                false,
            ),
            (
                "/v2/",
                &[
                    host,
                    ("Transfer-Encoding", "identity"),
                    ("Transfer-Encoding", "chunked"),
                ],
                false,
            ),
            ("http://a.example/v2/", &[host], true),
            ("http://A.example:80/v2/", &[host], true),
            ("http://a.example:81/v2/", &[host], false),
            ("http://b.example/v2/", &[host], false),
            ("http://me:word@a.example/v2/", &[host], false),
            ("https://a.example/v2/", &[("Host", "a.example:443")], true),
            ("a.example:443", &[host], true),
            ("a.example:443", &[("Host", "b.example:443")], false),
        ] {
            assert_eq!(
                checked(target, headers, Version::HTTP_11),
                fine,
                "{target} {headers:?}"
            );
        }
        assert!(checked("/v2/", &[], Version::HTTP_10));
    }
}
