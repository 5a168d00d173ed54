//! Several ranges in one answer: `multipart/byteranges` (RFC 9110, 14.6; RFC 2046, 5.1.1), made here from single ranges, so
//! that it does not matter what the origin can do.
//!
//! A client of zstd:chunked layers takes the parts as they come for the ranges that it asked for: one part a range, in that
//! order, never merged. How long the whole is follows from the ranges, so it is told and nothing is chunked.

use std::ops::Range;

use hawker_oci::range::content_range;
use http::HeaderValue;

use super::body::Payload;
use super::stored::Stored;
use crate::download::{FlightError, Segment};
use crate::flight::Reader;
use crate::metrics::ServedFrom;

/// Which parts of a blob an answer has, and what stands between them.
pub(super) struct Multipart {
    boundary: String,
    size_bytes: u64,
    ranges: Vec<Range<u64>>,
}

impl Multipart {
    /// These parts, none empty, of a blob of `size_bytes`.
    pub(super) fn new(ranges: Vec<Range<u64>>, size_bytes: u64) -> Self {
        // It must not occur in the parts, and nobody can look through them beforehand: 128 random bits do not.
        let boundary = format!("{:032x}", rand::random::<u128>());
        Self {
            boundary,
            size_bytes,
            ranges,
        }
    }

    /// The answer's `Content-Type`. Some clients know the boundary only without quotes.
    pub(super) fn content_type(&self) -> HeaderValue {
        let text = format!("multipart/byteranges; boundary={}", self.boundary);
        HeaderValue::try_from(text).expect("hex digits are a header's value")
    }

    /// The length of the whole body.
    pub(super) fn len_bytes(&self) -> u64 {
        let heads: usize = (0..self.ranges.len())
            .filter_map(|part| self.head(part))
            .map(|head| head.len())
            .sum();
        let parts: u64 = self
            .ranges
            .iter()
            .map(|range| range.end - range.start)
            .sum();
        parts + (heads + self.end().len()) as u64
    }

    /// The body, with the bytes from a blob in the store.
    pub(super) fn of_blob(self, stored: Stored) -> Payload {
        self.of(Source::Blob(Box::new(stored)))
    }

    /// The body, with the bytes from a download that reads the same ranges.
    pub(super) fn of_flight(self, reader: Box<Reader>) -> Payload {
        self.of(Source::Flight(reader))
    }

    fn of(self, source: Source) -> Payload {
        let len_bytes = self.len_bytes();
        Payload::Parts(
            Box::new(Parts {
                multipart: self,
                source,
                next: 0,
                inside: false,
            }),
            len_bytes,
        )
    }

    /// The header before the bytes of a part.
    fn head(&self, part: usize) -> Option<String> {
        let range = content_range(self.ranges.get(part)?, self.size_bytes);
        let (line_end, boundary) = (if part == 0 { "" } else { "\r\n" }, &self.boundary);
        Some(format!(
            "{line_end}--{boundary}\r\nContent-Type: application/octet-stream\r\nContent-Range: {range}\r\n\r\n"
        ))
    }

    /// The text after the last part.
    fn end(&self) -> String {
        format!("\r\n--{}--\r\n", self.boundary)
    }
}

/// The body, one segment after the other.
pub(crate) struct Parts {
    multipart: Multipart,
    source: Source,
    /// The part whose head comes next; past the last one comes the end.
    next: usize,
    /// Bytes of the part before that are still to come.
    inside: bool,
}

/// The source of the bytes. The lease lives as long as the body.
enum Source {
    Blob(Box<Stored>),
    Flight(Box<Reader>),
}

impl Parts {
    pub(super) const fn served_from(&self) -> ServedFrom {
        match self.source {
            Source::Blob(_) => ServedFrom::Cache,
            Source::Flight(_) => ServedFrom::Flight,
        }
    }

    /// The next segment; `None` at the end.
    pub(super) async fn next(&mut self) -> Result<Option<Segment>, FlightError> {
        if self.inside
            && let Some(bytes) = self.bytes().await?
        {
            return Ok(Some(bytes));
        }
        let (part, count) = (self.next, self.multipart.ranges.len());
        if part > count {
            return Ok(None);
        }
        self.next += 1;
        self.inside = part < count;
        match &mut self.source {
            Source::Flight(reader) if part > 0 => {
                reader.next_part();
            }
            Source::Blob(stored) => {
                stored.read(self.multipart.ranges.get(part).cloned().unwrap_or(0..0))
            }
            Source::Flight(_) => {}
        }
        let text = self
            .multipart
            .head(part)
            .unwrap_or_else(|| self.multipart.end());
        Ok(Some(Segment::Memory(text.into())))
    }

    /// The bytes of the part that has begun; `None` when it is over.
    async fn bytes(&mut self) -> Result<Option<Segment>, FlightError> {
        match &mut self.source {
            Source::Flight(reader) => reader.next().await,
            Source::Blob(stored) => stored.next().await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_length_is_that_of_all_heads_parts_and_the_end() {
        let multipart = Multipart::new(vec![0..1, 5..1000], 1 << 40);
        let between: usize = [multipart.head(0), multipart.head(1)]
            .iter()
            .flatten()
            .map(String::len)
            .sum();
        assert_eq!(
            multipart.len_bytes(),
            (between + multipart.end().len()) as u64 + 1 + 995
        );
        let other = Multipart::new(vec![0..1, 5..1000], 1 << 40);
        assert_ne!(other.boundary, multipart.boundary);
        assert_eq!(
            other.len_bytes(),
            multipart.len_bytes(),
            "HEAD tells what GET sends"
        );
    }

    #[test]
    fn the_boundary_is_one_that_clients_find() {
        let text = Multipart::new(vec![0..1, 2..3], 9).content_type();
        let boundary = text
            .to_str()
            .unwrap()
            .strip_prefix("multipart/byteranges; boundary=")
            .unwrap();
        // containers/image looks for `[A-Za-z-0-9:]+`.
        assert!(
            boundary.len() == 32 && boundary.bytes().all(|b| b.is_ascii_alphanumeric()),
            "{boundary}"
        );
    }
}
