//! Ranges of a blob at its origin: how they are asked for, and the meaning of the answer.

use std::ops::Range;

use bytes::Bytes;
use hawker_oci::range::parse_content_range;
use http::{HeaderMap, HeaderValue, StatusCode, header};

use super::{OriginBody, OriginError};

/// `bytes=A-B`. Some registries understand no open range, `bytes=A-`.
pub(crate) fn range_header(start: u64, end: u64) -> Option<HeaderValue> {
    HeaderValue::from_str(&format!("bytes={start}-{}", end.checked_sub(1)?)).ok()
}

/// The meaning of an origin's answer to a request for a blob from some position on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Answered {
    /// Its body begins here, at the position or before it.
    From(u64),
    /// It does not understand the range, and is to be asked for the whole.
    NoRanges,
    /// It gives nothing.
    Nothing(StatusCode),
}

impl Answered {
    /// The start of an answer with these headers, for the bytes from `at` on. `ranged`: the request named a range.
    pub(crate) fn of(status: StatusCode, headers: &HeaderMap, at: u64, ranged: bool) -> Self {
        match status {
            StatusCode::PARTIAL_CONTENT => match content_range(headers) {
                // Skipping within a part costs no more than skipping within the whole.
                Some((sent, _)) if sent.start <= at => Answered::From(sent.start),
                _ if ranged => Answered::NoRanges,
                _ => Answered::Nothing(StatusCode::BAD_GATEWAY),
            },
            StatusCode::OK | StatusCode::NON_AUTHORITATIVE_INFORMATION => Answered::From(0),
            // Not understood, in the words of various servers; the same may be said of other things.
            StatusCode::RANGE_NOT_SATISFIABLE
            | StatusCode::BAD_REQUEST
            | StatusCode::METHOD_NOT_ALLOWED
            | StatusCode::NOT_ACCEPTABLE
            | StatusCode::NOT_IMPLEMENTED
                if ranged =>
            {
                Answered::NoRanges
            }
            status if status.is_success() && ranged => Answered::NoRanges,
            status => Answered::Nothing(status),
        }
    }
}

/// The range that a 206 says it holds, and the size of the whole where that is told.
pub(crate) fn content_range(headers: &HeaderMap) -> Option<(Range<u64>, Option<u64>)> {
    parse_content_range(headers.get(header::CONTENT_RANGE)?.to_str().ok()?)
}

/// The start in a 206's Content-Range.
pub(crate) fn content_range_start(headers: &HeaderMap) -> Option<u64> {
    content_range(headers).map(|(range, _)| range.start)
}

/// The whole size that a 206 tells.
pub(crate) fn content_range_size(headers: &HeaderMap) -> Option<u64> {
    content_range(headers)?.1
}

/// Throws away the first `bytes` of a body. The answer holds the rest of the chunk in which they ended.
pub(crate) async fn skip(
    mut body: OriginBody,
    bytes: u64,
) -> Result<(OriginBody, Bytes), OriginError> {
    let mut left = bytes;
    while left > 0 {
        match body.next().await {
            Some(Ok(chunk)) if (chunk.len() as u64) <= left => left -= chunk.len() as u64,
            Some(Ok(mut chunk)) => return Ok((body, chunk.split_off(left as usize))),
            Some(Err(error)) => return Err(error),
            None => {
                let (registry, reason) = (body.registry.clone(), "its answer was short".to_owned());
                return Err(OriginError::Broken { registry, reason });
            }
        }
    }
    Ok((body, Bytes::new()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_to_ranges_are_understood_and_odd_ones_lead_to_the_whole() {
        for (status, range, at, ranged, expected) in [
            (206, Some("bytes 5-9/10"), 5, true, Answered::From(5)),
            (206, Some("Bytes 5-9/*"), 5, true, Answered::From(5)),
            (206, Some("bytes=5-9/10"), 5, true, Answered::From(5)),
            (206, Some("bytes 0-9/10"), 5, true, Answered::From(0)),
            (206, Some("bytes 6-9/10"), 5, true, Answered::NoRanges),
            (206, Some("items 5-9/10"), 5, true, Answered::NoRanges),
            (206, None, 5, true, Answered::NoRanges),
            (
                206,
                None,
                5,
                false,
                Answered::Nothing(StatusCode::BAD_GATEWAY),
            ),
            (200, None, 5, true, Answered::From(0)),
            (416, None, 5, true, Answered::NoRanges),
            (
                416,
                None,
                5,
                false,
                Answered::Nothing(StatusCode::RANGE_NOT_SATISFIABLE),
            ),
            (400, None, 5, true, Answered::NoRanges),
            (501, None, 5, true, Answered::NoRanges),
            (404, None, 5, true, Answered::Nothing(StatusCode::NOT_FOUND)),
            (
                401,
                None,
                5,
                true,
                Answered::Nothing(StatusCode::UNAUTHORIZED),
            ),
            (
                429,
                None,
                5,
                true,
                Answered::Nothing(StatusCode::TOO_MANY_REQUESTS),
            ),
            (
                503,
                None,
                5,
                true,
                Answered::Nothing(StatusCode::SERVICE_UNAVAILABLE),
            ),
        ] {
            let value = range.map(|range| (header::CONTENT_RANGE, HeaderValue::from_static(range)));
            let status = StatusCode::from_u16(status).unwrap();
            let judged = Answered::of(status, &value.into_iter().collect(), at, ranged);
            assert_eq!(judged, expected, "{status} {range:?}");
        }
    }
}
