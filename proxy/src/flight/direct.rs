//! A reader's own way to the origin, for what the flight can't give it in time.

use std::collections::VecDeque;
use std::ops::Range;
use std::time::Duration;

use bytes::Bytes;
use hawker_core::piece::PieceLayout;
use hawker_core::reader::Stretch;
use hawker_oci::digest::{Chain, Digest};
use http::{HeaderMap, header};

use crate::buffer::BLOCK_BYTES;
use crate::download::FlightError;
use crate::grant::Grant;
use crate::origin::ranges::{Answered, range_header, skip};
use crate::origin::{Content, Origin, OriginBody, OriginError, PassedBody, Target};

/// An origin that gives smaller parts than this is asked for the whole, if it may be skipped.
const LEAST_PART_BYTES: u64 = 1 << 20;

/// A client that has not read for so long loses the origin's answer, where many clients do not read. The origin is asked for the
/// rest when the client comes back.
const MAY_WAIT: Duration = Duration::from_secs(2);

/// A stretch of a blob read from the origin for one client, and for nobody else.
pub(super) struct Direct {
    origin: Origin,
    target: Target,
    /// The client's right.
    headers: HeaderMap,
    task: Digest,
    layout: PieceLayout,
    /// The bytes that the client is still to get.
    range: Range<u64>,
    /// The end of the request.
    until: u64,
    /// Read from the blob's start and hash, holding the last piece back until the digest matches.
    proof: Option<Proof>,
    skips: bool,
    /// The origin does not understand ranges as they are asked for.
    whole: bool,
    body: Option<PassedBody>,
    /// The position of the body.
    at: u64,
    /// The start of the body.
    asked_at: u64,
    /// Bytes that came and were not given out yet, with their start.
    ready: VecDeque<(u64, Bytes)>,
}

struct Proof {
    chain: Chain,
    held_back: Vec<u8>,
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
        let Stretch {
            range,
            until,
            is_proved,
            may_skip: skips,
        } = stretch;
        let proof = is_proved.then(|| Proof {
            chain: Chain::new(task.algorithm()),
            held_back: Vec::new(),
        });
        let at = if is_proved { 0 } else { range.start };
        let target = Target {
            source: grant.source.clone(),
            content: Content::Blob(task),
        };
        let (headers, ready) = (grant.headers(), VecDeque::new());
        let (whole, body) = (false, None);
        let asked_at = at;
        Self {
            origin,
            target,
            headers,
            task,
            layout,
            range,
            until,
            proof,
            skips,
            whole,
            body,
            at,
            asked_at,
            ready,
        }
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
                self.asked_at = self.at;
                let (body, first) = self.ask().await?;
                self.body = Some(PassedBody::new(body, MAY_WAIT));
                self.take_in(first)?;
            }
            let Some(body) = &mut self.body else { continue };
            match body.next().await {
                Some(Ok(bytes)) => self.take_in(bytes)?,
                Some(Err(OriginError::GaveWay { .. })) => self.body = None,
                Some(Err(error)) => return Err(unreachable(&error).into()),
                // Some give less than they are asked for. As long as they give something, they are asked for the rest.
                None if self.at > self.asked_at => {
                    self.whole |= self.skips && self.at - self.asked_at < LEAST_PART_BYTES;
                    self.body = None;
                }
                None => {
                    return Err(
                        FlightError::Unreachable("the origin's answer was short".into()).into(),
                    );
                }
            }
        }
    }

    /// The ready bytes of the range; earlier ones are dropped.
    fn take_ready(&mut self) -> Option<Bytes> {
        while let Some((mut start, mut bytes)) = self.ready.pop_front() {
            let passed = self
                .range
                .start
                .saturating_sub(start)
                .min(bytes.len() as u64);
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
    async fn ask(&mut self) -> Result<(OriginBody, Bytes), Stopped> {
        let end = if self.proof.is_some() {
            self.layout.size_bytes()
        } else {
            self.until
        };
        loop {
            let mut headers = self.headers.clone();
            let partial = !self.whole && (self.at > 0 || end < self.layout.size_bytes());
            if partial && let Some(range) = range_header(self.at, end) {
                headers.insert(header::RANGE, range);
            }
            let answer = self
                .origin
                .get(&self.target, &headers)
                .await
                .map_err(|e| unreachable(&e))?;
            match Answered::of(answer.status(), answer.headers(), self.at, partial) {
                Answered::From(start) if start == self.at => {
                    return Ok((answer.into_body(), Bytes::new()));
                }
                // The earlier bytes are the rest of a piece at most, or else the client wants them skipped.
                Answered::From(start) if self.skips || start > 0 => {
                    let skipped = skip(answer.into_body(), self.at - start).await;
                    return Ok(skipped.map_err(|error| unreachable(&error))?);
                }
                Answered::From(_) => return Err(Stopped::WholeOnly),
                Answered::NoRanges if self.skips || self.at == 0 => self.whole = true,
                Answered::NoRanges => return Err(Stopped::WholeOnly),
                Answered::Nothing(status) => {
                    return Err(FlightError::Origin(status.as_u16()).into());
                }
            }
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
        let tail = over.then(|| {
            (
                proof.chain.clone().finish() == self.task,
                std::mem::take(&mut proof.held_back),
            )
        });
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

fn unreachable(error: &OriginError) -> FlightError {
    FlightError::Unreachable(error.to_string())
}
