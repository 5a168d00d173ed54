//! Spans: requests under way to a place that gives a blob. Each runs in a task of its own and sends its news to the reader.

use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use hawker_core::origin_reads::SpanId;
use tokio::sync::{mpsc, watch};
use tokio::task::AbortHandle;

use super::slots::Slot;
use crate::source::{Ask, Opened, Source, SourceError};

/// News of a span.
pub(super) enum News {
    /// The answer's head came.
    Opened(Head),
    /// The next bytes came.
    Chunk(Bytes),
    /// Nothing more comes.
    Over(Result<(), SourceError>),
}

/// The head of an answer.
pub(super) struct Head {
    pub(super) size_bytes: Option<u64>,
    pub(super) is_range: bool,
    pub(super) takes_ranges: bool,
    pub(super) place: Arc<str>,
}

/// A request under way.
pub(super) struct SpanTask {
    pub(super) plain: bool,
    /// The offsets of the first chunk and of the next one.
    pub(super) start: u64,
    pub(super) at: u64,
    /// The place that gives it; empty before the answer comes.
    pub(super) place: Arc<str>,
    /// Loose bytes that are not written yet, and where they begin.
    pub(super) block: BytesMut,
    pub(super) block_at: u64,
    /// Nothing is read of it for now.
    pub(super) is_paused: bool,
    /// The offset up to which its request may read.
    pub(super) until: watch::Sender<u64>,
    _request: AbortOnDrop,
    _slot: Option<Slot>,
}

impl SpanTask {
    pub(super) fn new(plain: bool, start: u64, place: Arc<str>, request: Request) -> Self {
        let (at, block_at, block) = (start, start, BytesMut::new());
        let Request { task, until, slot } = request;
        let is_paused = false;
        Self {
            plain,
            start,
            at,
            place,
            block,
            block_at,
            is_paused,
            until,
            _request: task,
            _slot: slot,
        }
    }
}

/// A request, by whatever name it goes.
pub(super) struct Request {
    task: AbortOnDrop,
    until: watch::Sender<u64>,
    slot: Option<Slot>,
}

impl Request {
    /// Begins a request after this wait. `resumes`: it reads on no sooner than this, for the rates' sake.
    pub(super) fn begin(
        source: &Arc<dyn Source>,
        id: SpanId,
        ask: Ask,
        resumes: Option<watch::Receiver<tokio::time::Instant>>,
        news: &mpsc::Sender<(SpanId, News)>,
        wait: Duration,
        slot: Option<Slot>,
    ) -> Self {
        let until = watch::Sender::new(u64::MAX);
        let gates = Gates {
            until: until.subscribe(),
            resumes,
        };
        let fetch = fetch(Arc::clone(source), id, ask, gates, news.clone());
        let request = async move {
            if !wait.is_zero() {
                tokio::time::sleep(wait).await;
            }
            fetch.await;
        };
        Self {
            task: AbortOnDrop(tokio::spawn(request).abort_handle()),
            until,
            slot,
        }
    }
}

struct AbortOnDrop(AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// The conditions under which a request reads on.
struct Gates {
    /// Not beyond this offset.
    until: watch::Receiver<u64>,
    /// Not before this moment, for the rates' sake.
    resumes: Option<watch::Receiver<tokio::time::Instant>>,
}

/// Opens a span and passes its bytes on.
async fn fetch(
    source: Arc<dyn Source>,
    id: SpanId,
    ask: Ask,
    gates: Gates,
    news: mpsc::Sender<(SpanId, News)>,
) {
    let result = pass_on(&*source, id, ask, gates, &news).await;
    let _ = news.send((id, News::Over(result))).await;
}

async fn pass_on(
    source: &dyn Source,
    id: SpanId,
    ask: Ask,
    mut gates: Gates,
    news: &mpsc::Sender<(SpanId, News)>,
) -> Result<(), SourceError> {
    let start = ask.range.as_ref().map_or(0, |range| range.start);
    let Opened {
        size_bytes,
        is_range,
        takes_ranges,
        place,
        mut body,
    } = source.open(ask).await?;
    let mut at = if is_range { start } else { 0 };
    let head = Head {
        size_bytes,
        is_range,
        takes_ranges,
        place,
    };
    let mut heard = news.send((id, News::Opened(head))).await.is_ok();
    while heard {
        if gates.until.wait_for(|until| at < *until).await.is_err() {
            // The span is over.
            break;
        }
        if let Some(resumes) = &mut gates.resumes {
            rest(resumes).await;
        }
        let Some(bytes) = body.next().await else {
            break;
        };
        let bytes = bytes?;
        at += bytes.len() as u64;
        heard = news.send((id, News::Chunk(bytes))).await.is_ok();
    }
    Ok(())
}

/// Waits as long as the rates say.
async fn rest(gate: &mut watch::Receiver<tokio::time::Instant>) {
    loop {
        let until = *gate.borrow_and_update();
        match tokio::time::timeout_at(until, gate.changed()).await {
            Ok(Ok(())) => {}
            // The moment has come, or the driver is gone.
            _ => return,
        }
    }
}
