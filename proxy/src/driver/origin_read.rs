//! Reading a task from the origin, in order, piece by piece, with the hash running.

use std::pin::pin;
use std::time::{Duration, Instant};

use bytes::Bytes;
use hawker_core::digest::{Chain, Digest};
use hawker_core::node::Failure;
use hawker_core::piece::{MAX_BLOB_BYTES, PieceIndex, PieceLayout};
use http::{HeaderMap, HeaderValue, StatusCode, header};
use tokio::sync::{mpsc, watch};

use super::Event;
use crate::buffer::{BufferPool, PieceBuffer};
use crate::flight::direct::{content_range_size, content_range_start, skip};
use crate::grant::Grant;
use crate::origin::{Content, Origin, OriginBody, OriginError, Target};

/// Tries without a new piece before the origin counts as failed.
const TRIES: u32 = 3;

/// While others wait for memory, a piece has to be on its way to come within this time, and is looked at after so long.
const PIECE_WITHIN: Duration = Duration::from_secs(30);
const PIECE_LOOKED_AT: Duration = Duration::from_secs(5);

/// The wait before the second try; it doubles.
const FIRST_WAIT: Duration = Duration::from_millis(200);

pub(super) struct Read {
    pub(super) task: Digest,
    pub(super) generation: u64,
    /// The newest last: clients bring fresh tokens while it is read.
    pub(super) grants: watch::Receiver<Vec<Grant>>,
    pub(super) layout: Option<PieceLayout>,
    pub(super) from: PieceIndex,
    /// The hash at the start of `from`.
    pub(super) chain: Chain,
    pub(super) origin: Origin,
    pub(super) pool: BufferPool,
    /// Pieces from this one on must wait.
    pub(super) window: watch::Receiver<PieceIndex>,
    /// When to read on, for the rates' sake; it may become sooner.
    pub(super) resumes: watch::Receiver<tokio::time::Instant>,
    pub(super) events: mpsc::Sender<Event>,
}

/// A reading under way; dropping it ends it.
pub(super) struct Reading {
    pub(super) generation: u64,
    handle: tokio::task::JoinHandle<()>,
}

impl Drop for Reading {
    fn drop(&mut self) {
        self.handle.abort();
    }
}

pub(super) fn start(read: Read) -> Reading {
    let generation = read.generation;
    Reading { generation, handle: tokio::spawn(read.run()) }
}

/// Why one try ended.
enum Ended {
    /// At the blob's end.
    Whole,
    /// Nothing that another try would mend.
    Final(Failure, String),
    /// Worth another try.
    Broken(String),
    /// It is so slow that others wait for the memory it takes.
    Hogging,
    /// The driver is gone.
    Unheard,
}

impl Read {
    async fn run(mut self) {
        let mut last = (Failure::Unreachable, "no registry is known for it".to_owned());
        let mut tried: Vec<Grant> = Vec::new();
        while let Some(grant) = self.untried(&tried) {
            match self.read(&grant).await {
                Ended::Whole => return self.over(None).await,
                Ended::Unheard => return,
                Ended::Hogging => {
                    let (task, generation) = (self.task, self.generation);
                    let _ = self.events.send(Event::OriginHogging { task, generation }).await;
                    return;
                }
                Ended::Final(failure, reason) => last = (failure, reason),
                Ended::Broken(reason) => last = (Failure::Unreachable, reason),
            }
            tried.push(grant);
        }
        self.over(Some(last)).await;
    }

    /// The newest grant that has not been tried.
    fn untried(&self, tried: &[Grant]) -> Option<Grant> {
        self.grants.borrow().iter().rev().find(|grant| !tried.contains(grant)).cloned()
    }

    /// Reads with one right, as far as that leads.
    async fn read(&mut self, grant: &Grant) -> Ended {
        let mut tries = 0;
        loop {
            let before = self.from;
            let ended = self.attempt(grant).await;
            tries = if self.from > before { 0 } else { tries + 1 };
            if tries >= TRIES || !matches!(ended, Ended::Broken(_)) {
                return ended;
            }
            tokio::time::sleep(FIRST_WAIT * (1 << tries)).await;
        }
    }

    async fn over(&self, failure: Option<(Failure, String)>) {
        let over = Event::OriginOver { task: self.task, generation: self.generation, failure };
        let _ = self.events.send(over).await;
    }

    /// One GET, as far as it goes. What is whole of it is kept: the next try starts at the first piece that is missing.
    async fn attempt(&mut self, grant: &Grant) -> Ended {
        // Nothing is asked for that could not be taken in yet.
        if self.layout.is_some() && self.window.wait_for(|end| self.from < *end).await.is_err() {
            return Ended::Unheard;
        }
        let start = self.chain.total_bytes();
        let target = Target { source: grant.source.clone(), content: Content::Blob(self.task) };
        let mut headers: HeaderMap = grant.headers();
        if start > 0
            && let Ok(range) = HeaderValue::from_str(&format!("bytes={start}-"))
        {
            headers.insert(header::RANGE, range);
        }
        let answer = match self.origin.get(&target, &headers).await {
            Ok(answer) => answer,
            Err(error @ OriginError::Forbidden(_)) => {
                return Ended::Final(Failure::Status(403), error.to_string());
            }
            Err(error) => return Ended::Broken(error.to_string()),
        };
        let status = answer.status();
        let told = told_size(status, answer.headers());
        match status {
            StatusCode::OK => {}
            StatusCode::PARTIAL_CONTENT if content_range_start(answer.headers()) == Some(start) => {}
            StatusCode::PARTIAL_CONTENT => {
                return Ended::Broken("it answered another range than was asked for".into());
            }
            status if status.is_server_error() => return self.server_error(status),
            status => return Ended::Final(Failure::Status(status.as_u16()), format!("it answered {status}")),
        }
        let layout = match (self.layout, told) {
            (Some(layout), Some(told)) if layout.size_bytes() != told => {
                let reason = format!("it says {told} bytes where {} are known", layout.size_bytes());
                return Ended::Final(Failure::WrongSize, reason);
            }
            (Some(layout), _) => layout,
            (None, Some(told)) => {
                let sized =
                    Event::OriginSized { task: self.task, generation: self.generation, size_bytes: told };
                if self.events.send(sized).await.is_err() {
                    return Ended::Unheard;
                }
                *self.layout.insert(PieceLayout::new(told))
            }
            (None, None) => {
                return Ended::Final(Failure::UnknownLength, "it does not say how long the blob is".into());
            }
        };
        let body = answer.into_body();
        if status == StatusCode::OK && start > 0 {
            match skip(body, start).await {
                Ok((body, first)) => self.pieces(layout, body, first).await,
                Err(error) => Ended::Broken(error.to_string()),
            }
        } else {
            self.pieces(layout, body, Bytes::new()).await
        }
    }

    /// Waits as long as the rates say; `false`: the driver is gone.
    async fn rest(&mut self) -> bool {
        loop {
            let until = *self.resumes.borrow_and_update();
            match tokio::time::timeout_at(until, self.resumes.changed()).await {
                Err(_) => return true,
                Ok(Ok(())) => {}
                Ok(Err(_)) => return false,
            }
        }
    }

    fn server_error(&self, status: StatusCode) -> Ended {
        // One who is overloaded says so with 503 or 429; trying at once makes it worse.
        match status {
            StatusCode::SERVICE_UNAVAILABLE => {
                Ended::Final(Failure::Status(status.as_u16()), "it is overloaded".into())
            }
            _ if self.chain.total_bytes() > 0 => Ended::Broken(format!("it answered {status}")),
            _ => Ended::Final(Failure::Status(status.as_u16()), format!("it answered {status}")),
        }
    }

    async fn pieces(&mut self, layout: PieceLayout, mut body: OriginBody, mut chunk: Bytes) -> Ended {
        while self.from < layout.count() {
            if self.window.wait_for(|end| self.from < *end).await.is_err() {
                return Ended::Unheard;
            }
            if !self.rest().await {
                return Ended::Unheard;
            }
            let mut buffer = self.pool.get(layout.len_bytes(self.from) as usize).await;
            let mut chain = self.chain.clone();
            if let Err(ended) = fill(&self.pool, &mut buffer, &mut chain, &mut body, &mut chunk).await {
                return ended;
            }
            self.chain = chain.clone();
            let piece = self.from;
            self.from += 1;
            let (task, generation) = (self.task, self.generation);
            if self.events.send(Event::OriginPiece { task, generation, piece, buffer, chain }).await.is_err()
            {
                return Ended::Unheard;
            }
        }
        Ended::Whole
    }
}

/// Fills one piece from the body; not for long if that is slow and others wait for the memory.
async fn fill(
    pool: &BufferPool,
    buffer: &mut PieceBuffer,
    chain: &mut Chain,
    body: &mut OriginBody,
    chunk: &mut Bytes,
) -> Result<(), Ended> {
    let began = Instant::now();
    let mut wanted = pin!(pool.is_wanted(PIECE_LOOKED_AT));
    while buffer.missing() > 0 {
        if chunk.is_empty() {
            let mut next = pin!(body.next());
            let next = loop {
                tokio::select! {
                    biased;
                    next = &mut next => break next,
                    () = &mut wanted => {}
                }
                if !is_on_its_way(buffer, began.elapsed()) {
                    return Err(Ended::Hogging);
                }
                wanted.set(pool.is_wanted(PIECE_LOOKED_AT));
            };
            *chunk = match next {
                Some(Ok(bytes)) => bytes,
                Some(Err(error)) => return Err(Ended::Broken(error.to_string())),
                None => return Err(Ended::Broken("its answer was short".into())),
            };
        }
        let taken = buffer.extend(chunk);
        let bytes = chunk.split_to(taken);
        chain.update(&bytes);
    }
    Ok(())
}

/// Whether a piece that is being filled will be there in time, as it has gone on so far.
fn is_on_its_way(buffer: &PieceBuffer, took: Duration) -> bool {
    let filled = buffer.filled().len() as f64 / buffer.piece_len().max(1) as f64;
    took.as_secs_f64() <= filled * PIECE_WITHIN.as_secs_f64()
}

/// The blob's size, as the answer tells it.
fn told_size(status: StatusCode, headers: &HeaderMap) -> Option<u64> {
    let told = match status {
        StatusCode::PARTIAL_CONTENT => content_range_size(headers),
        _ => headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok(),
    };
    told.filter(|size| *size <= MAX_BLOB_BYTES)
}
