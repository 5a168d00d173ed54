//! One download a task, many readers.
//!
//! The driver downloads; a [`Reader`] takes bytes in order as they are shown: from memory while they are being
//! written, from the file afterwards, so that a slow client holds no memory. Bytes that the flight can't give in time
//! the reader gets from the origin by itself ([`direct`]). [`hawker_core::reader`] decides when it waits, asks or
//! gives up.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use hawker_core::Time;
use hawker_core::application::Purpose;
use hawker_core::piece::{MAX_BLOB_BYTES, PieceIndex, PieceLayout};
use hawker_core::reader::{self, Facts, Here, Reason, SIZE_WITHIN, Step, Stretch};
use hawker_oci::digest::Digest;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use crate::download::{FlightError, Segment, Shared};
use crate::driver::Event;
use crate::grant::Grant;
use crate::origin::Origin;
use crate::store::Blob;

mod direct;
mod gate;

use direct::{Direct, Stopped};
pub(crate) use gate::Gate;

/// All downloads of this node. Cheap to clone.
#[derive(Clone)]
pub struct Flights {
    events: mpsc::Sender<Event>,
    origin: Origin,
    next_reader: Arc<AtomicU64>,
}

impl Flights {
    pub(crate) fn new(events: mpsc::Sender<Event>, origin: Origin) -> Self {
        Self {
            events,
            origin,
            next_reader: Arc::default(),
        }
    }

    /// Hashes the bytes of this range on the disk again, and tells whether all were right; `None`: not all are there.
    /// If not, the blob's bytes here are gone: a present reader ends short, and a download that begins after this
    /// begins anew.
    pub async fn recheck(&self, task: Digest, bytes: Range<u64>) -> Option<bool> {
        let (reply, right) = oneshot::channel();
        // Without a driver nothing is downloaded any more.
        self.events
            .send(Event::Recheck { task, bytes, reply })
            .await
            .ok()?;
        right.await.ok()
    }

    /// Says that a committed blob has wrong bytes: a download that begins after this begins anew.
    pub(crate) async fn rotten(&self, blob: &Blob) {
        tell_rotten(&self.events, blob.clone()).await;
    }

    /// A blob of this size was streamed past the pieces and matched its digest.
    pub fn size_proven(&self, task: Digest, size_bytes: u64) {
        // If this gets lost, the next client that streams the blob says it again.
        let _ = self.events.try_send(Event::SizeProven { task, size_bytes });
    }

    /// Joins the download of `task`, or starts it; waits until the size is known (from the hint, peers or the origin).
    /// `partial`: only a range will be read, so the rest is not downloaded for it. `purpose`: for whom, and how urgent.
    pub async fn open(
        &self,
        task: Digest,
        grant: Grant,
        purpose: Purpose,
        size_hint: Option<u64>,
        partial: bool,
    ) -> Result<Flight, FlightError> {
        // A size above the limit of blobs is ignored: it would cost memory for each of its pieces.
        let size_hint = size_hint.filter(|size| *size <= MAX_BLOB_BYTES);
        let id = self.next_reader.fetch_add(1, Ordering::Relaxed);
        let (reply, answer) = oneshot::channel();
        let open = Event::Open {
            task,
            grant: grant.clone(),
            purpose: purpose.clone(),
            size_hint,
            partial,
            reader: id,
            reply,
        };
        self.events
            .send(open)
            .await
            .map_err(|_| FlightError::Stopping)?;
        let shared = answer.await.map_err(|_| FlightError::Stopping)?;
        let (events, origin) = (self.events.clone(), self.origin.clone());
        let flight = Flight {
            shared,
            grant,
            purpose,
            partial,
            id,
            events,
            origin,
        };
        flight.sized().await?;
        if flight
            .shared
            .lock()
            .is_other_size(size_hint, &flight.grant.source.registry)
        {
            return Err(FlightError::OtherSize(task));
        }
        // A blob of no bytes has no piece that could be verified.
        if flight.size_bytes() == 0 && Digest::of(task.algorithm(), &[]) != task {
            return Err(FlightError::WrongDigest(task));
        }
        Ok(flight)
    }
}

async fn tell_rotten(events: &mpsc::Sender<Event>, blob: Blob) {
    let (reply, done) = oneshot::channel();
    // Without a driver nothing is downloaded any more.
    if events.send(Event::Rotten { blob, reply }).await.is_ok() {
        let _ = done.await;
    }
}

/// A download that a client takes part in. It goes on for a while after the last of these is dropped.
pub struct Flight {
    shared: Arc<Shared>,
    grant: Grant,
    purpose: Purpose,
    partial: bool,
    id: u64,
    events: mpsc::Sender<Event>,
    origin: Origin,
}

impl Flight {
    async fn sized(&self) -> Result<(), FlightError> {
        let deadline = Instant::now() + SIZE_WITHIN;
        loop {
            let changed = self.shared.changed.notified();
            {
                let state = self.shared.lock();
                if state.layout.is_some() {
                    return Ok(());
                }
                if let Some(error) = &state.failed {
                    return Err(error.clone());
                }
            }
            if tokio::time::timeout_at(deadline, changed).await.is_err() {
                return Err(FlightError::Unreachable(
                    "nobody told the blob's size in time".into(),
                ));
            }
        }
    }

    /// Whether all bytes were compared with the digest by somebody: then the size is right.
    pub fn is_size_proven(&self) -> bool {
        self.shared.lock().is_size_proven
    }

    /// The blob's size in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.shared
            .lock()
            .layout
            .map_or(0, |layout| layout.size_bytes())
    }

    /// Reads byte ranges, each in order, one after the other: [`Reader::next_part`] goes on to the next.
    pub fn read(self, ranges: Vec<Range<u64>>) -> Reader {
        let layout = PieceLayout::new(self.size_bytes());
        let epoch = self.shared.lock().epoch;
        let reader = Reader {
            began: Instant::now(),
            decisions: reader::Reader::new(Time::default(), ranges, layout, self.partial, epoch),
            announced: None,
            direct: None,
            first: None,
            gate: None,
            flight: self,
        };
        reader.with_position()
    }

    /// The rest is to be downloaded too, as if somebody read all of it.
    async fn want_whole(&self) {
        let (reply, answer) = oneshot::channel();
        let (task, grant, purpose) = (self.shared.task, self.grant.clone(), self.purpose.clone());
        let open = Event::Open {
            task,
            grant,
            purpose,
            size_hint: None,
            partial: false,
            reader: self.id,
            reply,
        };
        // Without a driver there is no download any more, and the flight says so.
        if self.events.send(open).await.is_ok() {
            let _ = answer.await;
        }
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        let left = Event::Position {
            task: self.shared.task,
            reader: self.id,
            pieces: None,
            ahead: None,
            partial: self.partial,
        };
        if let Err(mpsc::error::TrySendError::Full(left)) = self.events.try_send(left)
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            let events = self.events.clone();
            runtime.spawn(async move { events.send(left).await });
        }
    }
}

/// Reads verified bytes in order, as they come.
pub struct Reader {
    flight: Flight,
    /// The decisions, by a clock that begins with this reader.
    decisions: reader::Reader,
    began: Instant,
    announced: Option<PieceIndex>,
    direct: Option<Direct>,
    /// Bytes that were waited for before anybody wanted them.
    first: Option<Segment>,
    /// The gate that holds back bytes that the registry has not given or proved to have; `None`: the registry is
    /// believed.
    gate: Option<Gate>,
}

impl Reader {
    /// Shows only what the registry gave or has proved to have.
    pub(crate) fn gated(mut self, gate: Option<Gate>) -> Self {
        self.gate = gate;
        self
    }

    fn now(&self) -> Time {
        Time(self.began.elapsed())
    }

    /// Goes on to the next range, once the current one is over; `false` when there is none.
    pub fn next_part(&mut self) -> bool {
        let Some(range) = self.decisions.next_range() else {
            return false;
        };
        if self
            .direct
            .as_mut()
            .is_some_and(|direct| !direct.go_on(&range))
        {
            self.direct = None;
        }
        self.tell_position();
        true
    }

    /// Waits for the first bytes: a failure is known before anything is promised.
    pub async fn begin(&mut self) -> Result<(), FlightError> {
        self.first = self.next().await?;
        Ok(())
    }

    /// The next bytes of the range; `None` at its end.
    pub async fn next(&mut self) -> Result<Option<Segment>, FlightError> {
        if let Some(first) = self.first.take() {
            return Ok(Some(first));
        }
        let shared = Arc::clone(&self.flight.shared);
        loop {
            let rest = self.decisions.rest();
            if rest.is_empty() {
                return Ok(None);
            }
            let changed = shared.changed.notified();
            let Found {
                facts,
                segment,
                blob,
                failed,
            } = self.look(&shared);
            let epoch = self.decisions.epoch();
            let step = self.decisions.next(self.now(), &facts);
            if self.decisions.epoch() != epoch {
                self.gate.iter_mut().for_each(Gate::begin_anew);
            }
            match (step, segment) {
                (Step::End, _) => return Ok(None),
                (Step::Give, Some(segment)) => {
                    let blob = blob.filter(|_| facts.here == Here::Verified);
                    let Some(segment) = self.checked(segment, blob).await else {
                        return Err(FlightError::Rotten(shared.task));
                    };
                    self.direct = None;
                    return Ok(Some(self.advance(segment, false)));
                }
                // There is always a segment to give.
                (Step::Give, None) => {}
                (Step::Prove, _) => {
                    if let Some(gate) = &mut self.gate {
                        gate.pass(&self.flight, self.decisions.layout(), rest.start)
                            .await?;
                    }
                }
                (Step::Wait(until), _) => {
                    let _ = tokio::time::timeout_at(self.began + until.0, changed).await;
                }
                (Step::AskOrigin(ranges), _) => {
                    let (task, reader) = (shared.task, self.flight.id);
                    // Without a driver the flight itself says so.
                    let _ = self
                        .flight
                        .events
                        .send(Event::ReadAtOrigin {
                            task,
                            reader,
                            ranges,
                        })
                        .await;
                }
                (Step::ReadDirect(stretch), _) => {
                    if let Some(segment) = self.read_direct(stretch).await? {
                        return Ok(Some(self.advance(segment, true)));
                    }
                }
                (Step::WantWhole, _) => self.want_whole().await,
                (Step::GiveUp(reason), _) => return Err(self.error(reason, failed)),
            }
        }
    }

    /// The bytes here at this reader's position.
    fn look(&self, shared: &Shared) -> Found {
        let (rest, layout) = (self.decisions.rest(), self.decisions.layout());
        let open_to = match &self.gate {
            Some(gate) => gate.open_to(&self.flight, layout, rest.clone()),
            None => rest.end,
        };
        let state = shared.lock();
        let verified = state.bytes_at(rest.start, open_to.max(rest.start + 1));
        let registry = &self.flight.grant.source.registry;
        let loose = || state.loose_at(registry, rest.start, self.decisions.loose_end());
        let (here, segment) = match verified {
            Some(segment) if self.gate.is_some() && open_to <= rest.start => {
                (Here::Unproved, Some(segment))
            }
            Some(segment) => (Here::Verified, Some(segment)),
            None => match loose() {
                Some(segment) => (Here::Loose, Some(segment)),
                None if state.loose.run_at(rest.start).is_some() => (Here::HiddenLoose, None),
                None => (Here::Nothing, None),
            },
        };
        let facts = Facts {
            epoch: state.epoch,
            here,
            storage: state.storage,
            is_to_come: state.is_to_come(layout, rest.start),
            is_alone: state.is_alone,
            is_direct: self.direct.is_some(),
            has_failed: state.failed.is_some(),
            origin_failures: state.loose_failures,
        };
        Found {
            facts,
            segment,
            blob: state.blob.clone(),
            failed: state.failed.clone(),
        }
    }

    fn error(&self, reason: Reason, failed: Option<FlightError>) -> FlightError {
        let task = self.flight.shared.task;
        let stalled =
            || FlightError::Unreachable("no byte came from peers or the origin in time".to_owned());
        match reason {
            Reason::WrongBytes => failed.unwrap_or(FlightError::WrongDigest(task)),
            Reason::DownloadFailed => failed.unwrap_or_else(stalled),
            Reason::OriginFailed => self
                .flight
                .shared
                .lock()
                .loose_failed
                .clone()
                .unwrap_or_else(stalled),
            Reason::Unproved => FlightError::Unproved("it took too long".into()),
            Reason::Stalled => stalled(),
        }
    }

    /// The part of a segment that may be shown. `None`: the blob has wrong bytes there, and the driver knows.
    async fn checked(&self, segment: Segment, blob: Option<Blob>) -> Option<Segment> {
        let (Segment::File { file, range }, Some(blob)) = (&segment, blob) else {
            return Some(segment);
        };
        if blob.is_checked(range) {
            return Some(segment);
        }
        let layout = self.decisions.layout();
        let piece = layout.containing(range.start);
        if !blob.check(piece).await {
            tell_rotten(&self.flight.events, blob).await;
            return None;
        }
        let range = range.start..range.end.min(layout.range(piece).end);
        Some(Segment::File {
            file: Arc::clone(file),
            range,
        })
    }

    /// Bytes of this reader's own request to the origin, which begins here unless it is open; `None` when it gives no more.
    async fn read_direct(&mut self, stretch: Stretch) -> Result<Option<Segment>, FlightError> {
        let flight = &self.flight;
        let direct = self.direct.get_or_insert_with(|| {
            let (origin, layout) = (flight.origin.clone(), self.decisions.layout());
            Direct::new(origin, &flight.grant, flight.shared.task, layout, stretch)
        });
        match direct.next().await {
            Ok(Some(bytes)) => return Ok(Some(Segment::Passed(bytes))),
            Ok(None) => self.direct = None,
            Err(Stopped::WholeOnly) => {
                self.direct = None;
                self.decisions.leave_to_download();
                self.want_whole().await;
            }
            Err(Stopped::Failed(error)) => {
                self.direct = None;
                return Err(error);
            }
        }
        Ok(None)
    }

    /// Missing bytes come by the flight, which may read all of the blob for it.
    async fn want_whole(&mut self) {
        self.flight.want_whole().await;
        self.announced = None;
        self.tell_position();
    }

    fn advance(&mut self, segment: Segment, is_direct: bool) -> Segment {
        let bytes = match &segment {
            Segment::Memory(bytes) | Segment::Passed(bytes) => bytes.len() as u64,
            Segment::File { range, .. } => range.end - range.start,
        };
        self.decisions.advance(self.now(), bytes, is_direct);
        self.tell_position();
        segment
    }

    fn with_position(mut self) -> Self {
        self.tell_position();
        self
    }

    /// The driver learns of each new piece; it is no matter if one word of it is lost.
    fn tell_position(&mut self) {
        let pieces = self.decisions.pieces();
        if self.announced != Some(pieces.start) {
            self.announced = Some(pieces.start);
            let _ = self.flight.events.try_send(Event::Position {
                task: self.flight.shared.task,
                reader: self.flight.id,
                pieces: Some(pieces),
                ahead: self.decisions.pieces_ahead().cloned(),
                partial: self.flight.partial,
            });
        }
    }
}

/// The bytes that a reader finds at its position.
struct Found {
    facts: Facts,
    /// The bytes that are here, if any may ever be given out.
    segment: Option<Segment>,
    blob: Option<Blob>,
    failed: Option<FlightError>,
}
