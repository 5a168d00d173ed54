//! Byte ranges of requests (RFC 9110, section 14): parsed once without the blob's size, resolved when it is known.
//!
//! If the RFC leaves a choice, this does as registries do today: senseless ranges are answered 416 rather than
//! ignored, and ranges are neither merged nor reordered.

use std::ops::Range;

/// Longest header value looked at. The 1024 ranges of a zstd:chunked client take about 25 KB.
pub const MAX_HEADER_BYTES: usize = 64 << 10;

/// Most ranges in one request: as many as containers/image sends at once.
pub const MAX_RANGES: usize = 1024;

/// Why a Range header can't be served, whatever the size. The client's fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RangeError {
    /// Another unit than bytes, an end before its start, or no range at all.
    #[error(
        "bad Range header: expected bytes=FIRST-LAST, bytes=FIRST- or bytes=-LENGTH, separated by commas"
    )]
    Malformed,
    /// More than a request may ask for. A client that gets a 400 asks for fewer.
    #[error("too many ranges: at most {MAX_RANGES} in at most {MAX_HEADER_BYTES} bytes")]
    TooMany,
}

impl RangeError {
    /// The HTTP status of the answer.
    pub const fn status(self) -> u16 {
        match self {
            RangeError::Malformed => 416,
            RangeError::TooMany => 400,
        }
    }
}

/// One range as asked for (RFC 9110, 14.1.1 and 14.1.2). Positions are of bytes, from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spec {
    /// `FIRST-`: from there to the end.
    From(u64),
    /// `FIRST-LAST`: both included, the last not before the first.
    Between(u64, u64),
    /// `-LENGTH`: the last so many.
    Suffix(u64),
}

/// The ranges of a request, in the order in which they were asked for; one at least.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ranges(Vec<Spec>);

/// The bytes to send, once the size is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Resolved {
    /// 200 and everything: there is nothing of which a part could be sent.
    Whole,
    /// 206 with this range, which is not empty.
    One(Range<u64>),
    /// 206 `multipart/byteranges` with these two or more parts, none empty, in this order.
    Many(Vec<Range<u64>>),
    /// 400: several that together are longer than all there is (RFC 9110, 14.2: overlaps are an attack, or a mistake).
    TooMuch,
    /// 416 with `Content-Range:` [`unsatisfied`].
    Unsatisfiable,
}

impl Ranges {
    /// Understands the value of a Range header.
    pub fn parse(header: &str) -> Result<Self, RangeError> {
        if header.len() > MAX_HEADER_BYTES {
            return Err(RangeError::TooMany);
        }
        let (unit, set) = header.split_once('=').ok_or(RangeError::Malformed)?;
        if !unit.eq_ignore_ascii_case("bytes") {
            return Err(RangeError::Malformed);
        }
        // A list may have empty elements and blanks around the commas (RFC 9110, 5.6.1).
        let elements = set
            .split(',')
            .map(|element| element.trim_matches([' ', '\t']))
            .filter(|e| !e.is_empty());
        let specs = elements
            .map(Spec::parse)
            .take(MAX_RANGES + 1)
            .collect::<Result<Vec<_>, _>>()?;
        match specs.len() {
            0 => Err(RangeError::Malformed),
            1..=MAX_RANGES => Ok(Self(specs)),
            _ => Err(RangeError::TooMany),
        }
    }

    /// The ranges as asked for.
    pub fn specs(&self) -> &[Spec] {
        &self.0
    }

    /// The first byte asked for, if it is known without the size: the first byte to fetch.
    pub fn start_hint(&self) -> Option<u64> {
        match self.0.first()? {
            Spec::From(first) | Spec::Between(first, _) => Some(*first),
            Spec::Suffix(_) => None,
        }
    }

    /// From the first byte asked for to the end of the last; `size_bytes` of all there is, where that is known.
    pub fn span(&self, size_bytes: Option<u64>) -> Range<u64> {
        let first = |spec: &Spec| match spec {
            Spec::From(first) | Spec::Between(first, _) => *first,
            Spec::Suffix(len) => size_bytes.map_or(0, |size| size.saturating_sub(*len)),
        };
        let end = |spec: &Spec| match spec {
            Spec::Between(_, last) => last.saturating_add(1),
            Spec::From(_) | Spec::Suffix(_) => u64::MAX,
        };
        self.0.iter().map(first).min().unwrap_or(0)
            ..self.0.iter().map(end).max().unwrap_or(u64::MAX)
    }

    /// The one range `FIRST-` that a resuming client asks for; such a client may stop reading anywhere.
    pub fn open_from(&self) -> Option<u64> {
        match self.0[..] {
            [Spec::From(first)] => Some(first),
            _ => None,
        }
    }

    /// The bytes to send of `size_bytes`. Ranges are cut off at the end; those wholly past it are left out.
    ///
    /// An empty blob asked for from byte 0, as containerd does, is no error.
    pub fn resolve(&self, size_bytes: u64) -> Resolved {
        if size_bytes == 0 && self.0.iter().any(|spec| spec.includes_start()) {
            return Resolved::Whole;
        }
        let mut ranges: Vec<_> = self
            .0
            .iter()
            .filter_map(|spec| spec.resolve(size_bytes))
            .collect();
        let total: u128 = ranges
            .iter()
            .map(|range| u128::from(range.end - range.start))
            .sum();
        match ranges.len() {
            0 => Resolved::Unsatisfiable,
            1 => ranges.pop().map_or(Resolved::Unsatisfiable, Resolved::One),
            _ if total > u128::from(size_bytes) => Resolved::TooMuch,
            _ => Resolved::Many(ranges),
        }
    }
}

impl Spec {
    fn parse(text: &str) -> Result<Self, RangeError> {
        let (first, last) = text.split_once('-').ok_or(RangeError::Malformed)?;
        match (position(first)?, position(last)?) {
            (None, None) => Err(RangeError::Malformed),
            (None, Some(length)) => Ok(Spec::Suffix(length)),
            (Some(first), None) => Ok(Spec::From(first)),
            (Some(first), Some(last)) if first <= last => Ok(Spec::Between(first, last)),
            (Some(_), Some(_)) => Err(RangeError::Malformed),
        }
    }

    /// The part of `size_bytes` that is meant; `None` when that is empty.
    fn resolve(self, size_bytes: u64) -> Option<Range<u64>> {
        let range = match self {
            Spec::From(first) => first..size_bytes,
            Spec::Between(first, last) => first..last.saturating_add(1).min(size_bytes),
            Spec::Suffix(length) => size_bytes.saturating_sub(length)..size_bytes,
        };
        (!range.is_empty()).then_some(range)
    }

    /// Whether it would include the first byte of however short a blob.
    const fn includes_start(self) -> bool {
        match self {
            Spec::From(first) | Spec::Between(first, _) => first == 0,
            Spec::Suffix(length) => length > 0,
        }
    }
}

/// Digits, or nothing. A number too large for a position is past every end.
fn position(digits: &str) -> Result<Option<u64>, RangeError> {
    match digits {
        "" => Ok(None),
        _ if digits.bytes().all(|b| b.is_ascii_digit()) => {
            Ok(Some(digits.parse().unwrap_or(u64::MAX)))
        }
        _ => Err(RangeError::Malformed),
    }
}

/// The Content-Range of a part (RFC 9110, 14.4). `range` is not empty.
pub fn content_range(range: &Range<u64>, size_bytes: u64) -> String {
    format!(
        "bytes {}-{}/{size_bytes}",
        range.start,
        range.end.saturating_sub(1)
    )
}

/// The Content-Range of a 416 (RFC 9110, 15.5.17).
pub fn unsatisfied(size_bytes: u64) -> String {
    format!("bytes */{size_bytes}")
}

/// Understands the Content-Range of an answer from upstream: the range, and the size where it is told.
/// `None` for anything that is not a non-empty range inside that size.
pub fn parse_content_range(header: &str) -> Option<(Range<u64>, Option<u64>)> {
    // Some servers write the unit as it stands in a request: `bytes=`.
    let (unit, rest) = header.trim().split_once([' ', '='])?;
    let (range, size) = rest.trim_start().split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let strict = |digits: &str| {
        digits
            .bytes()
            .all(|b| b.is_ascii_digit())
            .then(|| digits.parse::<u64>().ok())?
    };
    let range = strict(first)?..strict(last)?.checked_add(1)?;
    let size = if size == "*" {
        None
    } else {
        Some(strict(size)?)
    };
    let inside = !range.is_empty() && size.is_none_or(|size| range.end <= size);
    (unit.eq_ignore_ascii_case("bytes") && inside).then_some((range, size))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_span_is_from_the_first_byte_asked_for_to_the_last() {
        for (header, size, span) in [
            ("bytes=5-9", None, 5..10),
            ("bytes=5-", None, 5..u64::MAX),
            ("bytes=-5", None, 0..u64::MAX),
            ("bytes=-5", Some(100), 95..u64::MAX),
            ("bytes=-500", Some(100), 0..u64::MAX),
            ("bytes=50-59,5-9", Some(100), 5..60),
            ("bytes=0-18446744073709551615", None, 0..u64::MAX),
        ] {
            assert_eq!(Ranges::parse(header).unwrap().span(size), span, "{header}");
        }
    }

    #[test]
    fn headers_and_what_they_mean_of_a_hundred_bytes() {
        use Resolved::{Many, One, TooMuch, Unsatisfiable};
        let table = [
            ("bytes=0-", One(0..100)),
            ("bytes=0-0", One(0..1)),
            ("bytes=0-1", One(0..2)),
            ("bytes=10-19", One(10..20)),
            ("bytes=99-", One(99..100)),
            ("bytes=90-1000", One(90..100)),
            ("bytes=-1", One(99..100)),
            ("bytes=-100", One(0..100)),
            ("bytes=-1000", One(0..100)),
            ("bytes=100-", Unsatisfiable),
            ("bytes=100-200", Unsatisfiable),
            ("bytes=-0", Unsatisfiable),
            ("bytes=99999999999999999999-", Unsatisfiable),
            ("bytes=0-99999999999999999999", One(0..100)),
            ("bytes=-99999999999999999999", One(0..100)),
            ("BYTES=0-1", One(0..2)),
            ("bytes=0-1,5-6", Many(vec![0..2, 5..7])),
            ("bytes=5-6, 0-1\t,", Many(vec![5..7, 0..2])), // in request order
            ("bytes=0-1,2-3", Many(vec![0..2, 2..4])),     // never merged
            ("bytes=0-1,200-300", One(0..2)),
            ("bytes=200-,300-", Unsatisfiable),
            ("bytes=0-49,50-99", Many(vec![0..50, 50..100])),
            ("bytes=0-50,50-99", TooMuch),
            ("bytes=0-,0-", TooMuch),
            ("bytes=0-,0-,200-", TooMuch),
            ("bytes=,0-1", One(0..2)),
        ];
        for (header, expected) in table {
            assert_eq!(
                Ranges::parse(header).unwrap().resolve(100),
                expected,
                "{header}"
            );
        }
    }

    #[test]
    fn what_makes_no_sense_is_416() {
        let table = [
            "",
            "bytes",
            "bytes=",
            "bytes=,",
            "bytes=-",
            "bytes=5-2",
            "bytes=a-b",
            "bytes=1",
            "bytes=+1-2",
            "bytes=0x1-2",
            "bytes=1-2-3",
            "bytes=--1",
            "bytes= 1 - 2",
            "bytes =1-2",
            "bytes:1-2",
            "lines=1-2",
            "=1-2",
            "bytes=0-1;2-3",
            "bytes=0-1,x",
            "bytes=0-1,5-2",
            "bytes=１-２",
        ];
        for header in table {
            assert_eq!(
                Ranges::parse(header),
                Err(RangeError::Malformed),
                "{header}"
            );
        }
        assert_eq!(RangeError::Malformed.status(), 416);
    }

    #[test]
    fn a_thousand_and_twenty_four_ranges_are_accepted_and_no_more() {
        let header = |n: u64| {
            let specs: Vec<_> = (0..n)
                .map(|at| format!("{}-{}", at * 1_000_000_000, at * 1_000_000_000 + 9))
                .collect();
            format!("bytes={}", specs.join(","))
        };
        let ranges = Ranges::parse(&header(1024)).unwrap();
        assert!(matches!(ranges.resolve(u64::MAX), Resolved::Many(parts) if parts.len() == 1024));
        assert_eq!(Ranges::parse(&header(1025)), Err(RangeError::TooMany));
        assert_eq!(
            Ranges::parse(&format!("bytes=0-1{}", ",".repeat(MAX_HEADER_BYTES))),
            Err(RangeError::TooMany)
        );
        assert_eq!(RangeError::TooMany.status(), 400);
    }

    #[test]
    fn an_empty_blob() {
        let table = [
            ("bytes=0-", Resolved::Whole),
            ("bytes=0-1", Resolved::Whole),
            ("bytes=-5", Resolved::Whole),
            ("bytes=1-", Resolved::Unsatisfiable),
            ("bytes=-0", Resolved::Unsatisfiable),
        ];
        for (header, expected) in table {
            assert_eq!(
                Ranges::parse(header).unwrap().resolve(0),
                expected,
                "{header}"
            );
        }
    }

    #[test]
    fn what_is_known_without_the_size() {
        let table = [
            ("bytes=7-", Some(7), Some(7)),
            ("bytes=7-9", Some(7), None),
            ("bytes=-9", None, None),
            ("bytes=7-,1-2", Some(7), None),
        ];
        for (header, start, open) in table {
            let ranges = Ranges::parse(header).unwrap();
            assert_eq!(
                (ranges.start_hint(), ranges.open_from()),
                (start, open),
                "{header}"
            );
        }
    }

    #[test]
    fn content_ranges() {
        assert_eq!(content_range(&(0..1), 10), "bytes 0-0/10");
        assert_eq!(content_range(&(5..10), 10), "bytes 5-9/10");
        assert_eq!(unsatisfied(10), "bytes */10");
        let table = [
            ("bytes 0-0/10", Some((0..1, Some(10)))),
            ("Bytes 5-9/10", Some((5..10, Some(10)))),
            ("bytes 5-9/*", Some((5..10, None))),
            ("bytes=5-9/10", Some((5..10, Some(10)))),
            ("bytes 5-10/10", None),
            ("bytes 5-4/10", None),
            ("bytes */10", None),
            ("bytes 0-18446744073709551615/*", None),
            ("bytes -1/10", None),
            ("lines 0-0/10", None),
            ("bytes 0-0", None),
            ("", None),
        ];
        for (header, expected) in table {
            assert_eq!(parse_content_range(header), expected, "{header}");
        }
    }

    /// The oracle: which positions of a small blob each range selects, by asking each position.
    fn naive(spec: Spec, size: u64) -> Vec<u64> {
        let selected = |at: &u64| match spec {
            Spec::From(first) => *at >= first,
            Spec::Between(first, last) => first <= *at && *at <= last,
            Spec::Suffix(length) => size - at <= length,
        };
        (0..size).filter(selected).collect()
    }

    fn spec() -> impl Strategy<Value = Spec> {
        prop_oneof![
            (0..60u64).prop_map(Spec::From),
            (0..60u64, 0..60u64).prop_map(|(a, b)| Spec::Between(a.min(b), a.max(b))),
            (0..60u64).prop_map(Spec::Suffix),
        ]
    }

    fn written(specs: &[Spec]) -> String {
        let written = specs.iter().map(|spec| match spec {
            Spec::From(first) => format!("{first}-"),
            Spec::Between(first, last) => format!("{first}-{last}"),
            Spec::Suffix(length) => format!("-{length}"),
        });
        format!("bytes={}", written.collect::<Vec<_>>().join(", "))
    }

    proptest! {
        #[test]
        fn ranges_select_the_bytes_that_the_rfc_says(specs in prop::collection::vec(spec(), 1..6), size in 1..50u64) {
            let ranges = Ranges::parse(&written(&specs)).unwrap();
            prop_assert_eq!(ranges.specs(), &specs[..]);
            let expected: Vec<_> = specs.iter().map(|s| naive(*s, size)).filter(|s| !s.is_empty()).collect();
            let resolved = match ranges.resolve(size) {
                Resolved::Whole => return Err(TestCaseError::fail("there is something to send a part of")),
                Resolved::TooMuch => {
                    prop_assert!(expected.len() > 1);
                    prop_assert!(expected.iter().map(Vec::len).sum::<usize>() > size as usize);
                    return Ok(());
                }
                Resolved::One(range) => vec![range],
                Resolved::Many(ranges) => {
                    prop_assert!(ranges.len() > 1);
                    ranges
                }
                Resolved::Unsatisfiable => Vec::new(),
            };
            let resolved: Vec<Vec<u64>> = resolved.into_iter().map(Iterator::collect).collect();
            prop_assert_eq!(resolved, expected);
        }

        #[test]
        fn no_header_makes_it_panic(
            header in "(bytes=)?([0-9]{0,3}-?[0-9]{0,22}[, \t]{0,2}|\\PC{0,2}){0,8}", size in any::<u64>(),
        ) {
            if let Ok(ranges) = Ranges::parse(&header)
                && let Resolved::One(range) = ranges.resolve(size)
            {
                prop_assert!(range.start < range.end && range.end <= size);
            }
            parse_content_range(&header);
        }

        #[test]
        fn a_content_range_reads_as_it_was_written(start in any::<u64>(), length in 1..u64::MAX, more in any::<u64>()) {
            let range = start..start.saturating_add(length);
            prop_assume!(!range.is_empty());
            let size = range.end.saturating_add(more);
            prop_assert_eq!(parse_content_range(&content_range(&range, size)), Some((range, Some(size))));
        }
    }
}
