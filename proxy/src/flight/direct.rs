//! A reader's own way to the origin, for what the flight can't give it in time.

use std::collections::VecDeque;
use std::ops::Range;

use bytes::Bytes;
use hawker_core::digest::{Chain, Digest};
use hawker_core::piece::PieceLayout;
use http::{HeaderMap, HeaderValue, StatusCode, header};

use super::FlightError;
use crate::buffer::BLOCK_BYTES;
use crate::grant::Grant;
use crate::origin::{Content, Origin, OriginBody, OriginError, Target};

/// A stretch of a blob read from the origin for one client, and for nobody else.
pub(super) struct Direct {
    origin: Origin,
    target: Target,
    /// The client's right.
    headers: HeaderMap,
    task: Digest,
    layout: PieceLayout,
    /// What the client is still to get.
    range: Range<u64>,
    /// Where the request ends.
    until: u64,
    /// Read from the blob's start and hash, holding the last piece back until the digest matches.
    proof: Option<Proof>,
    skips: bool,
    body: Option<OriginBody>,
    /// Where the body is.
    at: u64,
    /// What came and was not given out yet, and where it begins.
    ready: VecDeque<(u64, Bytes)>,
}

struct Proof {
    chain: Chain,
    held_back: Vec<u8>,
}

/// What to read.
pub(super) struct Stretch {
    /// What the client is to get first.
    pub(super) range: Range<u64>,
    /// Where the request ends: past the range, when more is read after it.
    pub(super) until: u64,
    /// Read all before it too, so that the last piece can be shown.
    pub(super) prove: bool,
    /// Where the origin ignores ranges, read what comes before and throw it away.
    pub(super) skip: bool,
}

/// Why there are no bytes.
pub(super) enum Stopped {
    /// The origin sends the whole, whatever part it is asked for.
    WholeOnly,
    /// It failed.
    Failed(FlightError),
}

impl From<FlightError> for Stopped {
    fn from(error: FlightError) -> Self {
        Stopped::Failed(error)
    }
}

impl Direct {
    pub(super) fn new(
        origin: Origin,
        grant: &Grant,
        task: Digest,
        layout: PieceLayout,
        stretch: Stretch,
    ) -> Self {
        let Stretch { range, until, prove, skip: skips } = stretch;
        let proof = prove.then(|| Proof { chain: Chain::new(task.algorithm()), held_back: Vec::new() });
        let at = if prove { 0 } else { range.start };
        let target = Target { source: grant.source.clone(), content: Content::Blob(task) };
        let (headers, ready) = (grant.headers(), VecDeque::new());
        Self { origin, target, headers, task, layout, range, until, proof, skips, body: None, at, ready }
    }

    /// Goes on with another range after the one before is over; `false` if that takes another request.
    pub(super) fn go_on(&mut self, range: &Range<u64>) -> bool {
        let within = self.range.end <= range.start && range.end <= self.until;
        if within {
            self.range = range.clone();
        }
        within
    }

    /// The next bytes, at most 64 KiB; `None` at the end of the range.
    pub(super) async fn next(&mut self) -> Result<Option<Bytes>, Stopped> {
        loop {
            if self.range.is_empty() {
                return Ok(None);
            }
            if let Some(bytes) = self.take_ready() {
                return Ok(Some(bytes));
            }
            if self.body.is_none() {
                let (body, first) = self.ask().await?;
                self.body = Some(body);
                self.take_in(first)?;
            }
            let Some(body) = &mut self.body else { continue };
            match body.next().await {
                Some(Ok(bytes)) => self.take_in(bytes)?,
                Some(Err(error)) => return Err(unreachable(&error).into()),
                None => return Err(FlightError::Unreachable("the origin's answer was short".into()).into()),
            }
        }
    }

    /// What is ready of the range; what comes before it is dropped.
    fn take_ready(&mut self) -> Option<Bytes> {
        while let Some((mut start, mut bytes)) = self.ready.pop_front() {
            let passed = self.range.start.saturating_sub(start).min(bytes.len() as u64);
            drop(bytes.split_to(passed as usize));
            start += passed;
            let wanted = self.range.end.saturating_sub(start).min(BLOCK_BYTES as u64);
            let rest = bytes.split_off(bytes.len().min(wanted as usize));
            if !rest.is_empty() {
                self.ready.push_front((start + bytes.len() as u64, rest));
            }
            if !bytes.is_empty() {
                self.range.start += bytes.len() as u64;
                return Some(bytes);
            }
        }
        None
    }

    /// The origin's body from where we are, and the first of its bytes if they had to be cut off from others.
    async fn ask(&self) -> Result<(OriginBody, Bytes), Stopped> {
        let mut headers = self.headers.clone();
        let end = if self.proof.is_some() { self.layout.size_bytes() } else { self.until };
        let partial = self.at > 0 || end < self.layout.size_bytes();
        if partial && let Ok(value) = HeaderValue::from_str(&format!("bytes={}-{}", self.at, end - 1)) {
            headers.insert(header::RANGE, value);
        }
        let answer = self.origin.get(&self.target, &headers).await.map_err(|e| unreachable(&e))?;
        let starts_at = content_range_start(answer.headers());
        match answer.status() {
            StatusCode::PARTIAL_CONTENT if starts_at == Some(self.at) => {
                Ok((answer.into_body(), Bytes::new()))
            }
            StatusCode::OK if self.at == 0 => Ok((answer.into_body(), Bytes::new())),
            StatusCode::OK if self.skips => Ok(skip(answer.into_body(), self.at).await?),
            StatusCode::OK => Err(Stopped::WholeOnly),
            status if status.is_success() => {
                let reason = "the origin answered another range than was asked for";
                Err(FlightError::Unreachable(reason.into()).into())
            }
            status => Err(FlightError::Origin(status.as_u16()).into()),
        }
    }

    fn take_in(&mut self, bytes: Bytes) -> Result<(), FlightError> {
        let start = self.at;
        self.at += bytes.len() as u64;
        let Some(proof) = &mut self.proof else {
            self.show(start, bytes);
            return Ok(());
        };
        proof.chain.update(&bytes);
        let last_start = self.layout.last().map_or(0, |last| self.layout.start(last));
        let cut = (last_start.saturating_sub(start) as usize).min(bytes.len());
        proof.held_back.extend_from_slice(&bytes[cut..]);
        if self.at > self.layout.size_bytes() {
            return Err(FlightError::WrongDigest(self.task));
        }
        let over = self.at == self.layout.size_bytes();
        let tail =
            over.then(|| (proof.chain.clone().finish() == self.task, std::mem::take(&mut proof.held_back)));
        self.show(start, bytes.slice(..cut));
        match tail {
            Some((true, tail)) => {
                self.show(last_start, Bytes::from(tail));
                Ok(())
            }
            Some((false, _)) => Err(FlightError::WrongDigest(self.task)),
            None => Ok(()),
        }
    }

    fn show(&mut self, start: u64, bytes: Bytes) {
        if !bytes.is_empty() {
            self.ready.push_back((start, bytes));
        }
    }
}

/// Where a 206 says that it starts.
pub(crate) fn content_range_start(headers: &HeaderMap) -> Option<u64> {
    let value = headers.get(header::CONTENT_RANGE)?.to_str().ok()?;
    value.strip_prefix("bytes ")?.split_once('-')?.0.trim().parse().ok()
}

/// The whole size that a 206 tells.
pub(crate) fn content_range_size(headers: &HeaderMap) -> Option<u64> {
    headers.get(header::CONTENT_RANGE)?.to_str().ok()?.rsplit_once('/')?.1.trim().parse().ok()
}

/// Throws away the first `bytes` of a body; what is left of the chunk in which they ended.
pub(crate) async fn skip(mut body: OriginBody, bytes: u64) -> Result<(OriginBody, Bytes), FlightError> {
    let mut left = bytes;
    while left > 0 {
        match body.next().await {
            Some(Ok(chunk)) if (chunk.len() as u64) <= left => left -= chunk.len() as u64,
            Some(Ok(mut chunk)) => return Ok((body, chunk.split_off(left as usize))),
            Some(Err(error)) => return Err(unreachable(&error)),
            None => return Err(FlightError::Unreachable("the origin's answer was short".into())),
        }
    }
    Ok((body, Bytes::new()))
}

fn unreachable(error: &OriginError) -> FlightError {
    FlightError::Unreachable(error.to_string())
}
