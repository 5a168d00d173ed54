//! Reads one task from its origin, for everybody who waits for it here.
//!
//! [`OriginReads`] decides which spans to ask for; this actor opens them at the [`Source`] and puts their bytes where all
//! readers find them. Bytes that follow the hashed prefix become pieces at once, with the hash running. All other bytes are
//! *loose*: written to the task's file and shown to local readers, but neither verified nor offered to peers, until the prefix
//! gets to them and they are hashed from the file.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use hawker_core::Time;
use hawker_core::node::Failure;
use hawker_core::origin_reads::{Demand, OriginReads, Span, SpanEnd, SpanId, first_range};
use hawker_core::piece::{PieceIndex, PieceLayout};
use hawker_oci::digest::{Chain, Digest};
use tokio::sync::{mpsc, watch};
use tokio::task::AbortHandle;
use tracing::debug;

use super::Event;
use crate::buffer::{BufferPool, PieceBuffer};
use crate::download::Shared;
use crate::source::{Ask, Source, SourceError};
use crate::store::Partial;
use hawker_lanes::{self as lanes, Lane};

mod in_order;
mod slots;
mod spans;
#[cfg(test)]
mod tests;

use in_order::InOrder;
use slots::Slot;
pub(super) use slots::Slots;
use spans::{Head, News, Request, SpanTask};

/// Loose bytes are written in blocks of this size at least, except at the end of a span.
const BLOCK_BYTES: usize = 256 << 10;

/// Chunks that spans have read and this actor has not taken yet, all spans together. A task that waits for memory holds them for as
/// long as it waits, and there may be hundreds of such tasks.
const CHUNKS: usize = 2;

/// An origin that answers ranges with shorter parts than this, again and again, is asked for the whole.
const PART_BYTES_MIN: u64 = 1 << 20;
const SHORT_PARTS_MAX: u32 = 8;

/// Requests for the size without an answer before the origin counts as failed.
const SIZING_TRIES: u32 = 3;

/// Between two waits for a rate, the in-order read takes one piece at the link's speed. It counts as held back in this time, too.
const RATED_WITHIN: Duration = Duration::from_secs(1);

/// The wait after the first such request; the next one waits twice as long.
const SIZING_WAIT: Duration = Duration::from_millis(200);

/// The bytes that the driver wants read.
#[derive(Clone, Default)]
pub(super) struct Wishes {
    /// The rest of the blob from the first piece that is missing on, in order.
    pub(super) rest: Option<Rest>,
    /// Bytes that clients wait for and that only the origin can give.
    pub(super) readers: Vec<Range<u64>>,
    /// The task's file, once it is open. Without one, nothing is read out of order.
    pub(super) file: Option<LooseFile>,
    /// The task's size, once it is known.
    pub(super) layout: Option<PieceLayout>,
    /// A size that may be wrong.
    pub(super) size_guess: Option<u64>,
}

/// The start of the in-order read.
#[derive(Clone)]
pub(super) struct Rest {
    /// Tells this read from earlier ones of the same task.
    pub(super) generation: u64,
    pub(super) from: PieceIndex,
    /// The hash at the start of `from`.
    pub(super) chain: Chain,
}

/// The partial file as far as loose bytes go.
#[derive(Clone)]
pub(super) struct LooseFile(pub(super) Partial);

/// How to read.
pub(super) struct Setup {
    pub(super) task: Digest,
    pub(super) source: Arc<dyn Source>,
    pub(super) layout: Option<PieceLayout>,
    pub(super) pool: BufferPool,
    pub(super) shared: Arc<Shared>,
    /// Connections that this node has to each place.
    pub(super) slots: Slots,
    /// Pieces from this one on must wait.
    pub(super) window: watch::Receiver<PieceIndex>,
    /// When to read on, for the rates' sake; it may become sooner.
    pub(super) resumes: watch::Receiver<tokio::time::Instant>,
    pub(super) events: mpsc::Sender<Event>,
}

/// The reader of one task's origin; dropping it ends all its requests.
pub(super) struct OriginReader {
    wishes: watch::Sender<Wishes>,
    actor: AbortHandle,
}

impl OriginReader {
    pub(super) fn start(setup: Setup) -> Self {
        let (wishes, receiver) = watch::channel(Wishes::default());
        let actor = tokio::spawn(Actor::new(setup, receiver).run()).abort_handle();
        Self { wishes, actor }
    }

    /// Changes what is wanted.
    pub(super) fn wish(&self, change: impl FnOnce(&mut Wishes)) {
        self.wishes.send_modify(change);
    }
}

impl Drop for OriginReader {
    fn drop(&mut self) {
        self.actor.abort();
    }
}

/// The driver is gone.
struct Unheard;

/// The task, and the ends of its channels: all parts of its reader use them.
struct Context {
    task: Digest,
    layout: Option<PieceLayout>,
    pool: BufferPool,
    shared: Arc<Shared>,
    window: watch::Receiver<PieceIndex>,
    resumes: watch::Receiver<tokio::time::Instant>,
    events: mpsc::Sender<Event>,
    wishes: watch::Receiver<Wishes>,
}

impl Context {
    async fn tell(&self, event: Event) -> Result<(), Unheard> {
        self.events.send(event).await.map_err(|_| Unheard)
    }

    /// Whether there is no file, so that nothing can be read out of order.
    fn has_no_file(&self) -> bool {
        self.wishes.borrow().file.is_none()
    }

    /// Writes the first part of a piece as loose bytes.
    pub(super) async fn write_part(
        &self,
        piece: PieceIndex,
        buffer: PieceBuffer,
        place: &Arc<str>,
    ) {
        let Some(layout) = self.layout else { return };
        let Some(LooseFile(partial)) = self.wishes.borrow().file.clone() else {
            return;
        };
        let start = layout.start(piece);
        let range = start..start + buffer.filled().len() as u64;
        let write = move || partial.write_loose(start, buffer.filled());
        if let Some(Ok(())) = lanes::run(Lane::Downloads, write).await {
            self.shared.update(|state| state.loose.insert(place, range));
        }
    }
}

struct Actor {
    context: Context,
    source: Arc<dyn Source>,
    slots: Slots,
    started: Instant,
    /// Known once the size is.
    reads: Option<OriginReads>,
    spans: BTreeMap<SpanId, SpanTask>,
    /// A request that is to tell the size; the span that it became; failures of it so far.
    sizing: Option<Request>,
    sizing_span: Option<SpanId>,
    sizing_failures: u32,
    in_order: InOrder,
    /// The last moment at which a rate held the in-order read back.
    held_back_at: Option<Instant>,
    /// Loose bytes were written since the prefix last looked for some.
    is_loose_new: bool,
    /// Something has changed that spans depend on.
    is_to_plan: bool,
    short_parts: u32,
    /// Bytes have come from this source.
    has_moved: bool,
    last_error: Option<SourceError>,
    news: mpsc::Sender<(SpanId, News)>,
    heard: mpsc::Receiver<(SpanId, News)>,
}

/// The name under which the news of the sizing request come.
const SIZING: SpanId = SpanId(u32::MAX);

impl Actor {
    fn new(setup: Setup, wishes: watch::Receiver<Wishes>) -> Self {
        let Setup {
            task,
            source,
            layout,
            pool,
            shared,
            slots,
            window,
            resumes,
            events,
        } = setup;
        let (news, heard) = mpsc::channel(CHUNKS);
        Self {
            context: Context {
                task,
                layout,
                pool,
                shared,
                window,
                resumes,
                events,
                wishes,
            },
            source,
            slots,
            started: Instant::now(),
            reads: None,
            spans: BTreeMap::new(),
            sizing: None,
            sizing_span: None,
            sizing_failures: 0,
            in_order: InOrder::new(),
            held_back_at: None,
            is_loose_new: false,
            is_to_plan: false,
            short_parts: 0,
            has_moved: false,
            last_error: None,
            news,
            heard,
        }
    }

    fn now(&self) -> Time {
        Time(self.started.elapsed())
    }

    async fn run(mut self) {
        // An error means that the driver is gone, and with it everybody who waits.
        let _ = self.work().await;
    }

    async fn work(&mut self) -> Result<(), Unheard> {
        loop {
            let now = self.now();
            let wait = self
                .reads
                .as_ref()
                .and_then(|reads| reads.deadline(now))
                .map(|at| at.since(now));
            let looks_at = self.in_order.looks_at();
            tokio::select! {
                biased;
                changed = self.context.wishes.changed() => {
                    changed.map_err(|_| Unheard)?;
                    self.follow_wishes().await?;
                }
                news = self.heard.recv() => {
                    let Some((span, news)) = news else { return Err(Unheard) };
                    self.hear(span, news).await?;
                }
                changed = self.context.window.changed() => {
                    changed.map_err(|_| Unheard)?;
                    self.is_to_plan = true;
                }
                buffer = self.in_order.room() => self.is_to_plan |= self.in_order.take_room(buffer),
                () = sleep_or_forever(wait) => self.is_to_plan = true,
                () = sleep_or_forever(looks_at.map(|at| at.saturating_duration_since(Instant::now()))) => {
                    self.is_to_plan |= self.in_order.give_memory_back(&self.context).await?;
                }
            }
            if std::mem::take(&mut self.is_loose_new) {
                self.in_order.absorb_loose(&self.context).await?;
            }
            self.set_limits();
            if std::mem::take(&mut self.is_to_plan) {
                self.plan().await?;
                self.set_limits();
            }
        }
    }

    // ---- wishes -------------------------------------------------------------------------------------------------

    /// Begins or ends the in-order read, and ends requests that nobody wants any more.
    async fn follow_wishes(&mut self) -> Result<(), Unheard> {
        let wishes = self.context.wishes.borrow_and_update().clone();
        self.is_to_plan = true;
        if let (None, None, Some(layout)) = (self.context.layout, &self.sizing, wishes.layout) {
            self.context.layout = Some(layout);
        }
        let wished = wishes.rest.as_ref().map(|rest| rest.generation);
        if self.in_order.generation() != wished {
            self.in_order.park(&self.context).await;
            if let Some(rest) = wishes.rest
                && self.in_order.begin(self.context.layout, rest)
            {
                if let Some(reads) = &mut self.reads {
                    reads.forgive();
                }
                self.in_order.absorb_loose(&self.context).await?;
            }
        }
        if !self.in_order.is_active() {
            self.sizing = None;
        }
        let is_wanted = |span: &SpanTask, end: u64| {
            self.in_order.is_active()
                || wishes
                    .readers
                    .iter()
                    .any(|reader| reader.start < end && span.at < reader.end)
        };
        let unwanted: Vec<SpanId> = self
            .spans
            .iter()
            .filter(|(id, span)| {
                let end = self
                    .reads
                    .as_ref()
                    .and_then(|reads| reads.end_of(**id))
                    .unwrap_or(0);
                !is_wanted(span, end)
            })
            .map(|(id, _)| *id)
            .collect();
        for id in unwanted {
            self.end_span(id, SpanEnd::Done).await;
        }
        Ok(())
    }

    /// Whether a rate holds the in-order read back, now or a moment ago.
    fn is_held_back(&mut self) -> bool {
        let is_held_now = self.in_order.is_active()
            && *self.context.resumes.borrow() > tokio::time::Instant::now();
        if is_held_now {
            self.held_back_at = Some(Instant::now());
        }
        self.held_back_at
            .is_some_and(|at| at.elapsed() < RATED_WITHIN)
    }

    /// Tells each request how far it may read. Some wait until the prefix gets to them: all of them while there is no file, and those
    /// that no reader needs while a rate holds the prefix back.
    fn set_limits(&mut self) {
        let in_order_only = self.context.has_no_file();
        let is_held_back = self.is_held_back();
        let readers = match is_held_back {
            true => self.context.wishes.borrow().readers.clone(),
            false => Vec::new(),
        };
        let position = self.in_order.position(self.context.layout);
        for (id, span) in &mut self.spans {
            let end = self
                .reads
                .as_ref()
                .and_then(|reads| reads.end_of(*id))
                .unwrap_or(u64::MAX);
            let is_needed = readers
                .iter()
                .any(|reader| reader.start < end && span.at < reader.end);
            let is_ahead = position.is_some_and(|position| position < span.at);
            let pauses = is_ahead && (in_order_only || is_held_back && !is_needed);
            self.is_to_plan |= std::mem::replace(&mut span.is_paused, pauses) != pauses;
            let until = if pauses { 0 } else { end };
            span.until
                .send_if_modified(|known| std::mem::replace(known, until) != until);
        }
    }

    /// Asks for what is missing, as far as connections allow.
    async fn plan(&mut self) -> Result<(), Unheard> {
        let wishes = self.context.wishes.borrow().clone();
        let Some(layout) = self.context.layout else {
            if self.in_order.is_active() && self.sizing.is_none() {
                self.ask_for_size();
            }
            return Ok(());
        };
        let now = self.now();
        let place = self.source.place();
        match &self.reads {
            Some(reads) => self.slots.learn(&place, reads.experience()),
            None => {
                let experience = self.slots.experience(&place);
                self.reads = Some(OriginReads::new(layout.size_bytes(), experience));
            }
        }
        let mut present = self.context.shared.lock().present();
        present.insert(self.in_order.passed().clone());
        let may_go_on = self
            .in_order
            .piece()
            .is_some_and(|piece| piece < *self.context.window.borrow());
        let rest = match self.in_order.position(Some(layout)) {
            // Nothing is asked for that could not be taken in yet.
            Some(position) if may_go_on => {
                present.insert(self.in_order.passed().start..position);
                position..layout.size_bytes()
            }
            _ => 0..0,
        };
        let in_order_only = wishes.file.is_none();
        let (needs_room, is_open) = (in_order_only && !rest.is_empty(), !self.spans.is_empty());
        let rest = match self
            .in_order
            .has_room(&self.context, layout, needs_room, is_open)
        {
            true => rest,
            false => 0..0,
        };
        // Bytes that are gathered and not written yet are neither loose nor under way.
        self.spans
            .values()
            .for_each(|span| present.insert(span.block_at..span.at));
        let readers = if in_order_only {
            Vec::new()
        } else {
            wishes.readers
        };
        // A rate holds bytes back as they are hashed: read out of order, they would come faster than that.
        let lone = in_order_only || self.is_held_back();
        let paused = self.spans.values().filter(|span| span.is_paused).count();
        while let Some(reads) = &mut self.reads {
            let connections = match in_order_only {
                true => 1,
                false => (self.slots.left(&place) + self.spans.len()).max(1),
            };
            let demand = Demand {
                present: &present,
                readers: &readers,
                rest: rest.clone(),
                connections,
                lone,
                paused,
            };
            let Some(span) = reads.next(now, &demand) else {
                break;
            };
            let slot = self.slots.take(&place);
            if slot.is_none() && !self.spans.is_empty() {
                reads.ended(now, span.id, SpanEnd::Done);
                break;
            }
            self.begin_span(span, slot);
        }
        let failed = self.reads.as_ref().is_some_and(OriginReads::is_failed);
        if failed && self.spans.is_empty() && (self.in_order.is_active() || !readers.is_empty()) {
            let error = self
                .last_error
                .take()
                .unwrap_or_else(|| SourceError::Broken("it gave nothing".to_owned()));
            self.fail(error).await?;
        }
        Ok(())
    }

    // ---- requests -----------------------------------------------------------------------------------------------

    fn begin_span(&mut self, span: Span, slot: Option<Slot>) {
        let Span { id, bytes, plain } = span;
        debug!(task = %self.context.task, ?id, ?bytes, plain, "a request to the origin begins");
        let resumes = self
            .in_order
            .is_active()
            .then(|| self.context.resumes.clone());
        let size_bytes = self.context.layout.map(|layout| layout.size_bytes());
        let ask = Ask {
            range: (!plain).then(|| bytes.clone()),
            size_bytes,
        };
        let request = Request::begin(
            &self.source,
            id,
            ask,
            resumes,
            &self.news,
            Duration::ZERO,
            slot,
        );
        self.spans.insert(
            id,
            SpanTask::new(plain, bytes.start, Arc::from(""), request),
        );
    }

    fn ask_for_size(&mut self) {
        let slot = self.slots.take(&self.source.place());
        let ask = Ask {
            range: first_range(self.context.wishes.borrow().size_guess),
            size_bytes: None,
        };
        let (resumes, wait) = (
            Some(self.context.resumes.clone()),
            SIZING_WAIT * self.sizing_failures,
        );
        self.sizing = Some(Request::begin(
            &self.source,
            SIZING,
            ask,
            resumes,
            &self.news,
            wait,
            slot,
        ));
    }

    async fn hear(&mut self, id: SpanId, news: News) -> Result<(), Unheard> {
        // The request that told the size is a span like any other afterwards.
        let id = if id == SIZING {
            self.sizing_span.unwrap_or(id)
        } else {
            id
        };
        match news {
            News::Opened(head) => self.opened(id, head).await,
            News::Chunk(bytes) => self.chunk(id, bytes).await,
            News::Over(Ok(())) => {
                self.ended_short(id).await;
                Ok(())
            }
            News::Over(Err(error)) => self.broke(id, error).await,
        }
    }

    /// An answer ended before its span did: its origin gives less than it is asked for, or broke off.
    async fn ended_short(&mut self, id: SpanId) {
        let Some(span) = self.spans.get(&id) else {
            return;
        };
        let came_bytes = span.at - span.start;
        let end = match came_bytes {
            _ if span.plain => SpanEnd::Broken,
            0 => SpanEnd::Broken,
            PART_BYTES_MIN.. => SpanEnd::Done,
            _ => {
                self.short_parts += 1;
                let may_ask_plain = self.reads.as_ref().is_some_and(OriginReads::may_ask_plain);
                let is_too_often = self.short_parts >= SHORT_PARTS_MAX;
                if is_too_often && may_ask_plain && self.in_order.is_active() {
                    SpanEnd::RangeIgnored
                } else {
                    SpanEnd::Done
                }
            }
        };
        self.end_span(id, end).await;
    }

    async fn opened(&mut self, id: SpanId, head: Head) -> Result<(), Unheard> {
        self.is_to_plan = true;
        if id == SIZING {
            return self.sized(head).await;
        }
        let is_only = self.spans.len() == 1;
        let (Some(span), Some(reads)) = (self.spans.get_mut(&id), &mut self.reads) else {
            return Ok(());
        };
        span.place = head.place;
        if head.is_range || span.plain {
            reads.answered(id, head.takes_ranges);
            return Ok(());
        }
        if !is_only {
            // The others bring what they were asked for; another whole would be another copy.
            self.end_span(id, SpanEnd::RangeIgnored).await;
            return Ok(());
        }
        // The whole comes in place of a range. It is read once, from its start, and serves everybody.
        reads.became_plain(id);
        (span.plain, span.start, span.at, span.block_at) = (true, 0, 0, 0);
        if !self.in_order.is_active() {
            self.context
                .tell(Event::OriginWholeOnly {
                    task: self.context.task,
                })
                .await?;
        }
        Ok(())
    }

    /// A request told the size, or did not.
    async fn sized(&mut self, head: Head) -> Result<(), Unheard> {
        let (Some(generation), Some(request)) = (self.in_order.generation(), self.sizing.take())
        else {
            return Ok(());
        };
        let Some(size_bytes) = head.size_bytes else {
            let reason = "it does not say how long the blob is".to_owned();
            return self
                .fail(SourceError::Final {
                    failure: Failure::UnknownLength,
                    reason,
                })
                .await;
        };
        let layout = *self.context.layout.insert(PieceLayout::new(size_bytes));
        let now = self.now();
        let experience = self.slots.experience(&self.source.place());
        let reads = self
            .reads
            .insert(OriginReads::new(layout.size_bytes(), experience));
        let plain = !head.is_range;
        let span = reads.adopt_first(now, plain);
        reads.answered(span.id, head.takes_ranges);
        let registry = head.place.to_string();
        self.spans
            .insert(span.id, SpanTask::new(plain, 0, head.place, request));
        self.sizing_span = Some(span.id);
        self.in_order.start_passing(self.context.layout);
        self.context
            .tell(Event::OriginSized {
                task: self.context.task,
                generation,
                size_bytes,
                registry,
            })
            .await
    }

    async fn chunk(&mut self, id: SpanId, mut bytes: Bytes) -> Result<(), Unheard> {
        let now = self.now();
        let (Some(span), Some(reads)) = (self.spans.get_mut(&id), &mut self.reads) else {
            return Ok(());
        };
        let Some(end) = reads.end_of(id) else {
            return Ok(());
        };
        let at = span.at;
        bytes.truncate(end.saturating_sub(at) as usize);
        span.at += bytes.len() as u64;
        let is_over = span.at >= end;
        self.is_to_plan |= reads.moved(now, id, bytes.len() as u64);
        self.has_moved = true;
        let new_bytes = self.deliver(id, at, bytes).await?;
        if let Some(reads) = &mut self.reads {
            reads.progressed(new_bytes);
        }
        if is_over {
            self.end_span(id, SpanEnd::Done).await;
        }
        Ok(())
    }

    /// A span is over, in whatever way.
    async fn end_span(&mut self, id: SpanId, end: SpanEnd) {
        self.write_block(id).await;
        if let Some(span) = self.spans.remove(&id) {
            debug!(task = %self.context.task, ?id, at = span.at, ?end, "a request to the origin is over");
        }
        self.is_to_plan = true;
        let now = self.now();
        if let Some(reads) = &mut self.reads {
            reads.ended(now, id, end);
        }
    }

    async fn broke(&mut self, id: SpanId, error: SourceError) -> Result<(), Unheard> {
        let is_first = !self.has_moved && self.spans.len() <= 1;
        let end = match &error {
            SourceError::Final {
                failure: Failure::Status(500..),
                ..
            } if self.has_moved => SpanEnd::Refused,
            SourceError::Final { .. } => return self.fail(error).await,
            SourceError::Throttled { .. } if is_first => return self.fail(error).await,
            SourceError::Throttled { status: 503 } => SpanEnd::Unavailable,
            SourceError::Throttled { .. } => SpanEnd::Throttled,
            SourceError::Broken(_) if self.spans.get(&id).is_some_and(|span| span.is_paused) => {
                SpanEnd::Done
            }
            SourceError::Broken(_) => SpanEnd::Broken,
        };
        if id == SIZING {
            self.sizing = None;
            self.sizing_failures += 1;
            if self.sizing_failures >= SIZING_TRIES {
                return self.fail(error).await;
            }
        }
        self.last_error = Some(error);
        self.end_span(id, end).await;
        Ok(())
    }

    /// The origin gives no more: everybody who waits for it hears so.
    async fn fail(&mut self, error: SourceError) -> Result<(), Unheard> {
        let ids: Vec<SpanId> = self.spans.keys().copied().collect();
        for id in ids {
            self.end_span(id, SpanEnd::Done).await;
        }
        self.sizing = None;
        self.sizing_failures = 0;
        if let Some(reads) = &mut self.reads {
            reads.forgive();
        }
        let failure = match &error {
            SourceError::Final { failure, .. } => *failure,
            SourceError::Throttled { status, .. } => Failure::Status(*status),
            SourceError::Broken(_) => Failure::Unreachable,
        };
        let generation = self.in_order.fail();
        let task = self.context.task;
        self.context
            .tell(Event::OriginFailed {
                task,
                generation,
                failure,
                reason: error.to_string(),
            })
            .await
    }

    // ---- bytes --------------------------------------------------------------------------------------------------

    /// Bytes of a span: they go on with the prefix, or are loose. Bytes that are here already are dropped. The answer is the number
    /// of new bytes.
    async fn deliver(&mut self, id: SpanId, mut at: u64, mut bytes: Bytes) -> Result<u64, Unheard> {
        let mut new_bytes = 0;
        while !bytes.is_empty() {
            let (place, block_len) = match self.spans.get(&id) {
                Some(span) => (Arc::clone(&span.place), span.block.len() as u64),
                None => return Ok(new_bytes),
            };
            let position = self.in_order.position(self.context.layout);
            let passed = self.in_order.passed().clone();
            let known_until = match position {
                Some(position) if (passed.start..position).contains(&at) => position,
                _ if passed.contains(&at) => passed.end,
                _ => self.context.shared.lock().present_until(at),
            };
            let here = (known_until - at).min(bytes.len() as u64);
            let is_next = position == Some(at) && self.in_order.takes_bytes();
            if here > 0 && !is_next {
                self.write_block(id).await;
                drop(bytes.split_to(here as usize));
                at += here;
                self.skip_block(id, at);
                continue;
            }
            if is_next {
                self.write_block(id).await;
                let before = bytes.len() as u64;
                bytes = self
                    .in_order
                    .extend(&self.context, bytes, &place, false)
                    .await?;
                let taken = before - bytes.len() as u64;
                at += taken;
                new_bytes += taken;
                self.skip_block(id, at);
                if taken > 0 {
                    self.in_order.absorb_loose(&self.context).await?;
                    continue;
                }
                if self.in_order.lacks_room() {
                    // There was no memory for a piece in time.
                    self.end_span(id, SpanEnd::Done).await;
                    return Ok(new_bytes);
                }
                continue;
            }
            // Loose, as far as nothing else begins.
            let end = match position {
                _ if at < passed.start => passed.start,
                Some(position) if at < position => position,
                _ => u64::MAX,
            };
            let part = bytes.split_to(bytes.len().min((end - at).min(usize::MAX as u64) as usize));
            at += part.len() as u64;
            if self.context.has_no_file() {
                self.skip_block(id, at);
                continue;
            }
            new_bytes += part.len() as u64;
            if let Some(span) = self.spans.get_mut(&id) {
                span.block.extend_from_slice(&part);
            }
            if block_len + part.len() as u64 >= BLOCK_BYTES as u64 {
                self.write_block(id).await;
            }
        }
        Ok(new_bytes)
    }

    /// The bytes of a span before `at` need no writing.
    fn skip_block(&mut self, id: SpanId, at: u64) {
        if let Some(span) = self.spans.get_mut(&id) {
            span.block.clear();
            span.block_at = at;
        }
    }

    /// Writes the loose bytes that a span has gathered, and shows them to readers.
    async fn write_block(&mut self, id: SpanId) {
        let Some(span) = self.spans.get_mut(&id) else {
            return;
        };
        let (block, start) = (span.block.split().freeze(), span.block_at);
        if block.is_empty() {
            return;
        }
        span.block_at += block.len() as u64;
        let place = Arc::clone(&span.place);
        let Some(LooseFile(partial)) = self.context.wishes.borrow().file.clone() else {
            return;
        };
        let range = start..start + block.len() as u64;
        match lanes::run(Lane::Downloads, move || partial.write_loose(start, &block)).await {
            Some(Ok(())) => {
                self.context
                    .shared
                    .update(|state| state.loose.insert(&place, range));
                self.is_loose_new = true;
            }
            Some(Err(error)) => {
                // An error here means that the driver is gone.
                let _ = self
                    .context
                    .tell(Event::DiskRefused {
                        task: self.context.task,
                        error,
                    })
                    .await;
            }
            None => {}
        }
    }
}

async fn sleep_or_forever(wait: Option<Duration>) {
    match wait {
        Some(wait) => tokio::time::sleep(wait).await,
        None => std::future::pending().await,
    }
}
