//! The body of a response: memory, a file, a download, or an origin's body; never more than was promised.

use std::collections::VecDeque;
use std::fs::File;
use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use hawker_oci::digest::{Chain, Digest};
use hyper::body::{Frame, SizeHint};
use tokio_util::sync::ReusableBoxFuture;
use tracing::Span;

use super::auth::{Given, Underway};
use super::multipart::Parts;
use super::stored::Stored;
use super::wire::Line;
use crate::download::{FlightError, Segment};
use crate::flight::Reader;
use crate::metrics::{Metrics, ServedFrom};
use crate::origin::{OriginBody, OriginError, PassedBody};
use crate::store::Blob;

/// How much of a body of unknown length waits until the digest of the whole is known.
const HELD_BACK_BYTES: usize = 64 << 10;

/// A client that has not read for so long loses an answer that is passed through, where many clients do not read.
const MAY_WAIT: Duration = Duration::from_secs(20);

/// Why a body ends short.
#[derive(Debug, thiserror::Error)]
pub(super) enum Cut {
    /// The download failed.
    #[error(transparent)]
    Flight(#[from] FlightError),
    /// The origin failed.
    #[error(transparent)]
    Origin(#[from] OriginError),
    /// The whole does not match.
    #[error("the origin's bytes do not match {0}")]
    WrongDigest(Digest),
    /// There is less than was promised.
    #[error("{0} bytes are missing")]
    Short(u64),
}

/// The source of a body's bytes.
pub(crate) enum Payload {
    /// Nowhere.
    Empty,
    /// Memory.
    Full(Bytes),
    /// Words of this daemon's own, which are no content: not counted as served.
    Notice(Bytes),
    /// Words of an origin's, which are no content: not counted as served. So many bytes, if it said how many.
    Passed(OriginBody, Option<u64>),
    /// A part of a file.
    File(Arc<File>, Range<u64>),
    /// A committed blob; the lease lives as long as the body.
    Blob(Blob, Range<u64>),
    /// A committed blob that is hashed before it leaves: so many bytes.
    Stored(Box<Stored>, u64),
    /// A download: so many bytes.
    Flight(Box<Reader>, u64),
    /// Several ranges of either: so many bytes with all that stands between them.
    Parts(Box<Parts>, u64),
    /// The origin: so many bytes, if it said how many.
    Origin(OriginBody, Option<u64>),
    /// The origin, the last bytes held back until the digest matches, and the note to make then.
    Checked(OriginBody, Option<u64>, Digest, Option<Box<Given>>),
}

impl Payload {
    /// How many bytes it has, if that is known.
    pub(super) fn len_bytes(&self) -> Option<u64> {
        match self {
            Payload::Empty => Some(0),
            Payload::Full(bytes) | Payload::Notice(bytes) => Some(bytes.len() as u64),
            Payload::File(_, range) | Payload::Blob(_, range) => {
                Some(range.end.saturating_sub(range.start))
            }
            Payload::Stored(_, len) | Payload::Flight(_, len) | Payload::Parts(_, len) => {
                Some(*len)
            }
            Payload::Origin(_, len) | Payload::Passed(_, len) | Payload::Checked(_, len, ..) => {
                *len
            }
        }
    }
}

/// A response's body on its connection.
pub(super) struct Body {
    line: Arc<Line>,
    metrics: Arc<Metrics>,
    /// `None`: it is no content.
    from: Option<ServedFrom>,
    span: Span,
    /// A range of a file that is to be sent next.
    file: Option<(Arc<File>, Range<u64>)>,
    /// The rest to come.
    rest: Rest,
    /// The last bytes lie in a buffer of a connection to the origin: no more are taken before these are sent.
    holds_buffer: bool,
    remaining_bytes: Option<u64>,
    sent_bytes: u64,
    ended: bool,
    _lease: Option<Blob>,
    underway: Option<Arc<Underway>>,
}

enum Rest {
    Nothing,
    Memory(Bytes),
    Fed(ReusableBoxFuture<'static, (Feed, Result<Option<Segment>, Cut>)>),
    Failed(Cut),
}

/// A source of segments, one after the other.
enum Feed {
    Stored(Box<Stored>),
    Flight(Box<Reader>),
    Parts(Box<Parts>),
    Origin(PassedBody),
    Checked(Box<Checked>),
}

impl Feed {
    async fn next(mut self) -> (Self, Result<Option<Segment>, Cut>) {
        let next = match &mut self {
            Feed::Stored(stored) => stored.next().await.map_err(Cut::from),
            Feed::Flight(reader) => reader.next().await.map_err(Cut::from),
            Feed::Parts(parts) => parts.next().await.map_err(Cut::from),
            Feed::Origin(body) => body.next().await.transpose().map(passed).map_err(Cut::from),
            Feed::Checked(checked) => checked.next().await.map(passed),
        };
        (self, next)
    }
}

fn passed(bytes: Option<Bytes>) -> Option<Segment> {
    bytes.map(Segment::Passed)
}

impl Body {
    pub(super) fn new(
        payload: Payload,
        line: Arc<Line>,
        metrics: Arc<Metrics>,
        underway: Option<Arc<Underway>>,
    ) -> Self {
        line.owe();
        let remaining_bytes = payload.len_bytes();
        let from = match &payload {
            Payload::Empty
            | Payload::Full(_)
            | Payload::File(..)
            | Payload::Blob(..)
            | Payload::Stored(..) => Some(ServedFrom::Cache),
            Payload::Notice(_) | Payload::Passed(..) => None,
            Payload::Flight(..) => Some(ServedFrom::Flight),
            Payload::Parts(parts, _) => Some(parts.served_from()),
            Payload::Origin(..) | Payload::Checked(..) => Some(ServedFrom::Origin),
        };
        let feed = |feed: Feed| Rest::Fed(ReusableBoxFuture::new(feed.next()));
        let (file, rest, lease) = match payload {
            Payload::Empty => (None, Rest::Nothing, None),
            Payload::Full(bytes) | Payload::Notice(bytes) => (None, Rest::Memory(bytes), None),
            Payload::File(file, range) => (Some((file, range)), Rest::Nothing, None),
            Payload::Blob(blob, range) => (
                Some((Arc::clone(&blob.file), range)),
                Rest::Nothing,
                Some(blob),
            ),
            Payload::Stored(stored, _) => (None, feed(Feed::Stored(stored)), None),
            Payload::Flight(reader, _) => (None, feed(Feed::Flight(reader)), None),
            Payload::Parts(parts, _) => (None, feed(Feed::Parts(parts)), None),
            Payload::Origin(body, _) | Payload::Passed(body, _) => (
                None,
                feed(Feed::Origin(PassedBody::new(body, MAY_WAIT))),
                None,
            ),
            Payload::Checked(body, _, digest, given) => (
                None,
                feed(Feed::Checked(Box::new(Checked::new(body, digest, given)))),
                None,
            ),
        };
        let span = Span::current();
        Self {
            line,
            metrics,
            from,
            span,
            file,
            rest,
            holds_buffer: false,
            remaining_bytes,
            sent_bytes: 0,
            ended: false,
            _lease: lease,
            underway,
        }
    }

    /// The next bytes, or what stands for them; `None` at the end.
    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, Cut>>> {
        loop {
            if let Some(bytes) = self.next_of_file() {
                return Poll::Ready(Some(Ok(bytes)));
            }
            match std::mem::replace(&mut self.rest, Rest::Nothing) {
                Rest::Nothing => {
                    return match self.remaining_bytes.unwrap_or(0) {
                        0 => Poll::Ready(None),
                        missing => {
                            self.rest = Rest::Failed(Cut::Short(missing));
                            continue;
                        }
                    };
                }
                Rest::Memory(bytes) => return Poll::Ready(Some(Ok(bytes))),
                Rest::Failed(cut) => {
                    if self.line.poll_flushed(cx).is_pending() {
                        self.rest = Rest::Failed(cut);
                        return Poll::Pending;
                    }
                    return Poll::Ready(Some(Err(cut)));
                }
                Rest::Fed(mut future) => {
                    if self.holds_buffer && self.line.poll_flushed(cx).is_pending() {
                        self.rest = Rest::Fed(future);
                        return Poll::Pending;
                    }
                    let Poll::Ready((feed, next)) = future.poll(cx) else {
                        self.rest = Rest::Fed(future);
                        return Poll::Pending;
                    };
                    match next {
                        Err(cut) => self.rest = Rest::Failed(cut),
                        Ok(None) => {}
                        Ok(Some(segment)) => {
                            future.set(feed.next());
                            self.rest = Rest::Fed(future);
                            self.holds_buffer = matches!(segment, Segment::Passed(_));
                            match segment {
                                Segment::Memory(bytes) | Segment::Passed(bytes)
                                    if bytes.is_empty() => {}
                                Segment::Memory(bytes) | Segment::Passed(bytes) => {
                                    return Poll::Ready(Some(Ok(bytes)));
                                }
                                Segment::File { file, range } => self.file = Some((file, range)),
                            }
                        }
                    }
                }
            }
        }
    }

    /// The next part of the file that is being sent.
    fn next_of_file(&mut self) -> Option<Bytes> {
        let (file, range) = self.file.as_mut()?;
        let bytes = self
            .line
            .phantom(file, range, self.remaining_bytes.unwrap_or(u64::MAX));
        match &bytes {
            Some(bytes) => range.start += bytes.len() as u64,
            None => self.file = None,
        }
        bytes
    }

    /// Never more than was promised, whatever the source gives.
    fn clip(&mut self, mut bytes: Bytes) -> Bytes {
        if let Some(remaining) = &mut self.remaining_bytes {
            bytes.truncate(usize::try_from(*remaining).unwrap_or(usize::MAX));
            *remaining -= bytes.len() as u64;
        }
        bytes
    }
}

impl hyper::body::Body for Body {
    type Data = Bytes;
    type Error = Cut;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Cut>>> {
        match ready!(self.poll_next(cx)) {
            None => {
                self.ended = true;
                Poll::Ready(None)
            }
            Some(Err(cut)) => {
                let _in = self.span.enter();
                tracing::warn!(reason = %cut, sent_bytes = self.sent_bytes, "the response ends short");
                Poll::Ready(Some(Err(cut)))
            }
            Some(Ok(bytes)) => {
                let bytes = self.clip(bytes);
                self.line.owe();
                self.sent_bytes += bytes.len() as u64;
                self.from
                    .iter()
                    .for_each(|from| self.metrics.served(*from, bytes.len() as u64));
                self.underway
                    .iter()
                    .for_each(|underway| underway.served(bytes.len() as u64));
                Poll::Ready(Some(Ok(Frame::data(bytes))))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.remaining_bytes == Some(0)
    }

    fn size_hint(&self) -> SizeHint {
        self.remaining_bytes
            .map_or_else(SizeHint::default, SizeHint::with_exact)
    }
}

impl Drop for Body {
    fn drop(&mut self) {
        self.line.end();
        let complete = self.ended || self.remaining_bytes == Some(0);
        if !complete {
            self.metrics.bodies_unfinished.inc();
        }
        let _in = self.span.enter();
        tracing::debug!(sent_bytes = self.sent_bytes, complete, from = ?self.from, "response over");
    }
}

/// An origin's body whose last bytes wait until the whole is known to match.
struct Checked {
    body: PassedBody,
    chain: Option<Chain>,
    digest: Digest,
    held: VecDeque<Bytes>,
    held_bytes: usize,
    /// All that came so far.
    size_bytes: u64,
    given: Option<Box<Given>>,
}

impl Checked {
    fn new(body: OriginBody, digest: Digest, given: Option<Box<Given>>) -> Self {
        let chain = Some(Chain::new(digest.algorithm()));
        let body = PassedBody::new(body, MAY_WAIT);
        Self {
            body,
            chain,
            digest,
            held: VecDeque::new(),
            held_bytes: 0,
            size_bytes: 0,
            given,
        }
    }

    async fn next(&mut self) -> Result<Option<Bytes>, Cut> {
        loop {
            if let Some(bytes) = self.release() {
                return Ok(Some(bytes));
            }
            let Some(chain) = &mut self.chain else {
                return Ok(None);
            };
            match self.body.next().await.transpose()? {
                Some(bytes) => {
                    chain.update(&bytes);
                    self.size_bytes += bytes.len() as u64;
                    self.held_bytes += bytes.len();
                    self.held.push_back(bytes);
                }
                None if self
                    .chain
                    .take()
                    .is_some_and(|chain| chain.finish() == self.digest) =>
                {
                    if let Some(given) = self.given.take() {
                        given.whole(self.size_bytes);
                    }
                }
                None => {
                    self.held.clear();
                    return Err(Cut::WrongDigest(self.digest));
                }
            }
        }
    }

    /// The oldest bytes, if enough are held back behind them or all is known to match.
    fn release(&mut self) -> Option<Bytes> {
        let oldest = self.held.front()?.len();
        if self.chain.is_some() && self.held_bytes - oldest < HELD_BACK_BYTES {
            return None;
        }
        self.held_bytes -= oldest;
        self.held.pop_front()
    }
}
