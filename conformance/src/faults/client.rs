//! A client that asks again for what it lacks, as runtimes do, and compares what it gets.

use std::ops::Range;
use std::time::{Duration, Instant};

use crate::lab::{Answer, End, Host, Request};
use crate::origin::{Blob, Content};

use super::books::{Books, Kind};

/// Before it asks again.
const PAUSE: Duration = Duration::from_millis(200);
/// Longer than any deadline of a pull: all faults of a run, a slow restart among them, and what a pull may take after them.
const ANSWER_WITHIN: Duration = Duration::from_secs(70);

/// A blob and the truth about it.
#[derive(Clone)]
pub(super) struct Known {
    pub(super) index: usize,
    pub(super) blob: Blob,
    pub(super) content: Content,
}

/// One pull.
pub(super) struct Client<'a> {
    pub(super) books: &'a Books,
    pub(super) node: usize,
    pub(super) host: Host,
    /// The GET of the whole blob at the node's mirror.
    pub(super) request: Request,
    pub(super) known: &'a Known,
    /// The wanted range, or else all.
    pub(super) range: Option<Range<u64>>,
}

/// The result of an answer.
enum Came {
    /// These many right bytes, and all that was asked for.
    All,
    /// These many right bytes, and then why no more.
    Some(u64, String),
    /// A wrong byte. `whole`: in an answer that is complete and has the blob's last byte.
    Wrong { at: u64, whole: bool },
}

impl Client<'_> {
    /// Pulls until all is there, or a rule is broken. The time it took.
    pub(super) fn run(&self) -> Duration {
        let start = Instant::now();
        if let Err((kind, what)) = self.pull(start) {
            let (node, blob, range) = (self.node, self.known.index, &self.range);
            let at = start.elapsed();
            self.books.violated(
                kind,
                format!("blob {blob} at Node({node}), {range:?}, after {at:.1?}: {what}"),
            );
        }
        start.elapsed()
    }

    fn pull(&self, start: Instant) -> Result<(), (Kind, String)> {
        let blob = self.known.index;
        let wanted = self.range.clone().unwrap_or(0..self.known.blob.size_bytes);
        let mut from = wanted.start;
        loop {
            let since = Instant::now();
            let came = match self.asking(from..wanted.end).send(&self.host) {
                Ok(answer) => self.judge(&answer, from..wanted.end),
                Err(error) => Came::Some(0, format!("{error:#}")),
            };
            let late = self
                .books
                .deadline(self.node, start)
                .is_some_and(|deadline| Instant::now() > deadline);
            match came {
                Came::Wrong { at, whole } if !self.books.may_be_wrong(self.node, blob, whole) => {
                    return Err((
                        Kind::WrongBytes,
                        format!("byte {at} is wrong (whole: {whole})"),
                    ));
                }
                Came::All if !late => return Ok(()),
                Came::All => return Err((Kind::Hang, "it came too late".to_owned())),
                Came::Wrong { at, .. } if late => {
                    return Err((Kind::Hang, format!("byte {at} is still wrong")));
                }
                Came::Some(_, why) if late => return Err((Kind::Hang, why)),
                Came::Some(_, why) if !self.books.may_fail(self.node, blob, since) => {
                    return Err((
                        Kind::Failed,
                        format!("from byte {from} on, {:.1?}: {why}", since.elapsed()),
                    ));
                }
                // Its first bytes may be wrong, so it asks for the whole, which makes the node look, too.
                Came::Wrong { .. } => from = wanted.start,
                Came::Some(bytes, _) => from += bytes,
            }
            std::thread::sleep(PAUSE);
        }
    }

    fn asking(&self, range: Range<u64>) -> Request {
        let request = self.request.clone().within(ANSWER_WITHIN);
        let size = self.known.blob.size_bytes;
        match (range.start, range.end) {
            (0, end) if end == size => request,
            (from, end) if end == size => request.header("range", format!("bytes={from}-")),
            (from, end) => request.header("range", format!("bytes={from}-{}", end - 1)),
        }
    }

    fn judge(&self, answer: &Answer, asked: Range<u64>) -> Came {
        let size = self.known.blob.size_bytes;
        let ended = |what: &str| {
            let text: String = if answer.status >= 400 {
                answer.text()
            } else {
                String::new()
            };
            format!(
                "{what}: {} {:?}, {} bytes {text}",
                answer.status, answer.end, answer.body_bytes
            )
        };
        let told = answer.header("content-range").unwrap_or_default();
        let right = match answer.status {
            200 => asked == (0..size),
            206 => told == format!("bytes {}-{}/{size}", asked.start, asked.end - 1),
            _ => return Came::Some(0, ended("refused")),
        };
        if !right {
            return Came::Some(0, ended(&format!("not what was asked for, but {told:?}")));
        }
        let mut truth = vec![0; answer.body.len()];
        // A body longer than the rest of the blob differs from the truth's zeros, or else in its length.
        let known = self
            .known
            .content
            .read_at(asked.start, &mut truth)
            .unwrap_or(0) as u64;
        let complete = answer.end == End::Complete && answer.body_bytes == asked.end - asked.start;
        if let Some(at) = answer
            .body
            .iter()
            .zip(&truth)
            .position(|(got, true_byte)| got != true_byte)
        {
            return Came::Wrong {
                at: asked.start + at as u64,
                whole: complete && asked.end == size,
            };
        }
        if complete && known == answer.body_bytes {
            Came::All
        } else {
            Came::Some(known, ended("short"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::Lab;
    use crate::scene::{REPOSITORY, blob_path, start_origin};

    /// Pulls from the origin itself, which answers as a node does, and compares with what the blob is said to be.
    fn violations(origins: &Content, truth: &Content) -> anyhow::Result<Vec<Kind>> {
        let lab = Lab::new()?;
        let host = lab.host("origin")?;
        let origin = start_origin(&host)?;
        let blob = origin.add_blob(REPOSITORY, origins.clone())?;
        let request = Request::get(origin.address(), blob_path(&blob));
        let known = Known {
            index: 0,
            blob,
            content: truth.clone(),
        };
        let books = Books::default();
        Client {
            books: &books,
            node: 0,
            host,
            request,
            known: &known,
            range: None,
        }
        .run();
        Ok(books
            .violations()
            .into_iter()
            .map(|violation| violation.kind)
            .collect())
    }

    #[test]
    fn a_client_sees_a_wrong_byte_and_a_right_blob() -> anyhow::Result<()> {
        let right = Content::generated(1, 100_000);
        assert_eq!(violations(&right, &right)?, []);
        assert_eq!(
            violations(&Content::generated(2, 100_000), &right)?,
            [Kind::WrongBytes]
        );
        Ok(())
    }
}
