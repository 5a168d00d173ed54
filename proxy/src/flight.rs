//! One download a task, many readers.
//!
//! The driver downloads; a [`Reader`] takes bytes in order as they are shown: from memory while they are being written, from the
//! file afterwards, so that a slow client holds no memory. What the flight can't give in time the reader gets from the origin
//! by itself ([`direct`]).

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use hawker_core::application::Purpose;
use hawker_core::digest::Digest;
use hawker_core::piece::{MAX_BLOB_BYTES, PieceIndex, PieceLayout, PieceSet};
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::time::Instant;

use crate::buffer::BLOCK_BYTES;
use crate::driver::Event;
use crate::grant::Grant;
use crate::origin::Origin;

mod ahead;
pub(crate) mod direct;

use ahead::Ahead;
use direct::{Direct, Stopped, Stretch};

/// How long a client waits for the size of a blob.
const SIZE_WITHIN: Duration = Duration::from_secs(30);

/// A range whose pieces are not there after this long is read from the origin.
const RANGE_PATIENCE: Duration = Duration::from_millis(1500);

/// A whole blob that stands still for this long is read from the origin: the download itself went there two seconds sooner, if it
/// could, and what comes that way is shown at once.
const WHOLE_PATIENCE: Duration = Duration::from_secs(12);

/// No byte for this long, from nowhere: the body ends short, and the client falls through.
const STALLED: Duration = Duration::from_secs(45);

/// Longest stretch of the file handed out at once.
const FILE_SEGMENT_BYTES: u64 = 8 << 20;

/// Why a reader gets no (more) bytes.
#[derive(Clone, Debug, thiserror::Error)]
pub enum FlightError {
    /// Peers had nothing and the origin answered with this status: pass it on.
    #[error("the origin answered {0}")]
    Origin(u16),
    /// Peers had nothing and the origin could not be reached, is forbidden, or broke off.
    #[error("{0}")]
    Unreachable(String),
    /// The origin's bytes do not hash to the digest.
    #[error("the origin's bytes do not match {0}")]
    WrongDigest(Digest),
    /// The disk let what it had of it rot. Asked again, it is fetched anew.
    #[error("what was on disk of {0} was rotten and is gone: ask again")]
    Rotten(Digest),
    /// The origin does not say how long the blob is: stream it without pieces.
    #[error("the origin does not say how long the blob is")]
    UnknownLength,
    /// The origin says another length than was known; what is known of it has been thrown away.
    #[error("the origin says another length of {0} than before")]
    WrongSize(Digest),
    /// The daemon is stopping.
    #[error("the daemon is stopping")]
    Stopping,
}

/// Verified bytes of a blob, for a client.
#[derive(Clone, Debug)]
pub enum Segment {
    /// From memory, at most 64 KiB.
    Memory(Bytes),
    /// In a file: this range of it.
    File {
        /// The file.
        file: Arc<File>,
        /// Where in the file.
        range: Range<u64>,
    },
}

/// What the driver and a task's readers share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) task: Digest,
    state: Mutex<State>,
    changed: Notify,
}

/// How far a task's download is, as its readers see it.
#[derive(Debug, Default)]
pub(crate) struct State {
    pub(crate) layout: Option<PieceLayout>,
    /// Pieces that clients may see.
    pub(crate) shown: Option<PieceSet>,
    /// Verified pieces that are not in the file yet.
    pub(crate) hot: BTreeMap<PieceIndex, Bytes>,
    /// Grows when all that was shown turns out to be wrong: bytes from before and after then make no blob together.
    pub(crate) epoch: u64,
    /// Pieces in the file.
    pub(crate) written: Option<PieceSet>,
    pub(crate) file: Option<Arc<File>>,
    pub(crate) failed: Option<FlightError>,
    /// The disk refuses: pieces before the slowest reader are gone.
    pub(crate) in_memory: bool,
    /// Nor is there memory for it: readers go to the origin at once.
    pub(crate) no_memory: bool,
    /// Waiting makes no sense: there is no peer and no scheduler, so ranges are read from the origin at once.
    pub(crate) alone: bool,
}

impl Shared {
    pub(crate) fn new(task: Digest) -> Self {
        Self { task, state: Mutex::default(), changed: Notify::new() }
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The file, and which pieces are in it.
    pub(crate) fn on_disk(&self) -> Option<(Arc<File>, PieceSet)> {
        let state = self.lock();
        state.file.clone().zip(state.written.clone())
    }

    /// Changes the state and wakes all readers.
    pub(crate) fn update<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let out = change(&mut self.lock());
        self.changed.notify_waiters();
        out
    }
}

impl State {
    /// All that was shown turns out to be wrong.
    pub(crate) fn take_back(&mut self) {
        self.epoch += 1;
        self.hot.clear();
        for set in [&mut self.shown, &mut self.written].into_iter().flatten() {
            *set = PieceSet::empty(set.count());
        }
    }

    /// The bytes at `at`, if clients may see them now.
    fn bytes_at(&self, at: u64, end: u64) -> Option<Segment> {
        let (layout, shown) = (self.layout?, self.shown.as_ref()?);
        let piece = layout.containing(at);
        if !shown.contains(piece) {
            return None;
        }
        let on_disk =
            |piece| shown.contains(piece) && self.written.as_ref().is_some_and(|w| w.contains(piece));
        if let (true, Some(file)) = (on_disk(piece), &self.file) {
            let mut last = piece;
            let limit = end.min(at + FILE_SEGMENT_BYTES);
            while layout.range(last).end < limit && on_disk(last + 1) {
                last += 1;
            }
            return Some(Segment::File {
                file: Arc::clone(file),
                range: at..layout.range(last).end.min(limit),
            });
        }
        let bytes = self.hot.get(&piece)?;
        let from = (at - layout.start(piece)) as usize;
        let to = bytes.len().min(from + BLOCK_BYTES).min((end - layout.start(piece)) as usize);
        // A copy, so that a slow client holds these bytes and not the whole piece.
        Some(Segment::Memory(Bytes::copy_from_slice(&bytes[from..to])))
    }
}

/// All downloads of this node. Cheap to clone.
#[derive(Clone)]
pub struct Flights {
    events: mpsc::Sender<Event>,
    origin: Origin,
    next_reader: Arc<AtomicU64>,
}

impl Flights {
    pub(crate) fn new(events: mpsc::Sender<Event>, origin: Origin) -> Self {
        Self { events, origin, next_reader: Arc::default() }
    }

    /// Hashes again what the disk has of these bytes, and whether all were right; `None`: not all are there. If not, what is there
    /// of the blob is gone: who reads it ends short, and a download that begins after this begins anew.
    pub async fn recheck(&self, task: Digest, bytes: Range<u64>) -> Option<bool> {
        let (reply, right) = oneshot::channel();
        // Without a driver nothing is downloaded any more.
        self.events.send(Event::Recheck { task, bytes, reply }).await.ok()?;
        right.await.ok()
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
        // A size that no blob has is nobody's knowledge, whoever told it: it would cost memory for each of its pieces.
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
        self.events.send(open).await.map_err(|_| FlightError::Stopping)?;
        let shared = answer.await.map_err(|_| FlightError::Stopping)?;
        let (events, origin) = (self.events.clone(), self.origin.clone());
        let flight = Flight { shared, grant, purpose, partial, id, events, origin };
        flight.sized().await?;
        // A blob of no bytes has no piece that could be verified.
        if flight.size_bytes() == 0 && Digest::of(task.algorithm(), &[]) != task {
            return Err(FlightError::WrongDigest(task));
        }
        Ok(flight)
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
                return Err(FlightError::Unreachable("nobody told the blob's size in time".into()));
            }
        }
    }

    /// The blob's size in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.shared.lock().layout.map_or(0, |layout| layout.size_bytes())
    }

    /// Reads byte ranges, each in order, one after the other: [`Reader::next_part`] goes on to the next.
    pub fn read(self, ranges: Vec<Range<u64>>) -> Reader {
        let layout = PieceLayout::new(self.size_bytes());
        let epoch = self.shared.lock().epoch;
        let mut ahead = Ahead::new(ranges, layout);
        let first = ahead.next().unwrap_or(0..0);
        let now = Instant::now();
        let reader = Reader {
            from_start: first.start == 0 && !self.partial,
            at: first.start,
            begun: false,
            epoch,
            end: first.end.min(layout.size_bytes()),
            ahead,
            layout,
            moved: now,
            given: now,
            announced: None,
            direct: None,
            first: None,
            whole_only: false,
            flight: self,
        };
        reader.with_position()
    }

    /// The rest is to be downloaded too, as if somebody read all of it.
    async fn want_whole(&self) {
        let (reply, answer) = oneshot::channel();
        let (task, grant, purpose) = (self.shared.task, self.grant.clone(), self.purpose.clone());
        let open =
            Event::Open { task, grant, purpose, size_hint: None, partial: false, reader: self.id, reply };
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
    layout: PieceLayout,
    at: u64,
    end: u64,
    ahead: Ahead,
    /// Bytes were given out.
    begun: bool,
    /// That of the bytes given out so far.
    epoch: u64,
    /// When bytes last came, and when the flight last gave some.
    moved: Instant,
    given: Instant,
    announced: Option<PieceIndex>,
    direct: Option<Direct>,
    /// Bytes that were waited for before anybody wanted them.
    first: Option<Segment>,
    /// The origin knows no ranges: what is missing comes with the whole.
    whole_only: bool,
    /// It reads the whole, from its first byte, as the download brings it.
    from_start: bool,
}

impl Reader {
    /// Goes on to the next range, once the current one is over; `false` when there is none.
    pub fn next_part(&mut self) -> bool {
        let Some(range) = self.ahead.next() else { return false };
        if self.direct.as_mut().is_some_and(|direct| !direct.go_on(&range)) {
            self.direct = None;
        }
        (self.at, self.end) = (range.start, range.end.min(self.layout.size_bytes()));
        self.tell_position();
        true
    }

    /// Waits for the first bytes: what can't be had is known before anything is promised.
    pub async fn begin(&mut self) -> Result<(), FlightError> {
        self.first = self.next().await?;
        Ok(())
    }

    /// The next bytes of the range; `None` at its end.
    pub async fn next(&mut self) -> Result<Option<Segment>, FlightError> {
        if let Some(first) = self.first.take() {
            return Ok(Some(first));
        }
        loop {
            if self.at >= self.end {
                return Ok(None);
            }
            let shared = Arc::clone(&self.flight.shared);
            let changed = shared.changed.notified();
            let (ready, failed, patience) = {
                let state = shared.lock();
                if self.epoch != state.epoch {
                    if self.begun {
                        return Err(state.failed.clone().unwrap_or(FlightError::WrongDigest(shared.task)));
                    }
                    self.epoch = state.epoch;
                }
                (state.bytes_at(self.at, self.end), state.failed.clone(), self.patience(&state))
            };
            if let Some(segment) = ready {
                self.direct = None;
                self.given = Instant::now();
                return Ok(Some(self.advance(segment)));
            }
            let (waited, in_vain) = (self.moved.elapsed(), self.given.elapsed());
            if self.direct.is_some() || in_vain >= patience {
                match self.read_direct(failed.as_ref()).await {
                    Some(Ok(segment)) => return Ok(Some(self.advance(segment))),
                    Some(Err(error)) => return Err(error),
                    // Only the flight can give these bytes: wait on.
                    None => {}
                }
            }
            if let Some(error) = failed {
                return Err(error);
            }
            if waited >= STALLED {
                return Err(FlightError::Unreachable("no byte came from peers or the origin in time".into()));
            }
            let until = if in_vain < patience { self.given + patience } else { self.moved + STALLED };
            let _ =
                tokio::time::timeout_at(until.min(Instant::now() + Duration::from_secs(1)), changed).await;
        }
    }

    /// How long to wait for the flight before asking the origin.
    fn patience(&self, state: &State) -> Duration {
        if state.no_memory || state.in_memory && !self.flight_will_come(state) {
            Duration::ZERO
        } else if self.from_start {
            WHOLE_PATIENCE
        } else if state.alone {
            Duration::ZERO
        } else {
            RANGE_PATIENCE
        }
    }

    /// In memory, pieces that all readers had passed are gone; this one may have come late.
    fn flight_will_come(&self, state: &State) -> bool {
        let piece = self.layout.containing(self.at);
        state.shown.as_ref().is_none_or(|shown| !shown.contains(piece)) || state.hot.contains_key(&piece)
    }

    /// Bytes from the origin, if it can give these: `None` when only the flight can.
    async fn read_direct(&mut self, failed: Option<&FlightError>) -> Option<Result<Segment, FlightError>> {
        if self.direct.is_none() {
            let last_start = self.layout.last().map_or(0, |last| self.layout.start(last));
            let must_prove = self.at >= last_start;
            let in_memory = self.flight.shared.lock().in_memory;
            if !in_memory && (failed.is_some() || must_prove || self.whole_only) {
                // A flight for ranges alone leaves the origin to their readers, and this one must not show the last piece.
                if must_prove && failed.is_none() && !self.whole_only {
                    self.leave_to_flight().await;
                }
                return None;
            }
            let proven = in_memory && self.end > last_start;
            let range = if proven { self.at..self.end } else { self.at..self.end.min(last_start) };
            let until = self.ahead.stretch(range.end).min(last_start).max(range.end);
            self.direct = Some(Direct::new(
                self.flight.origin.clone(),
                &self.flight.grant,
                self.flight.shared.task,
                self.layout,
                Stretch { range, until, prove: proven, skip: in_memory },
            ));
        }
        let direct = self.direct.as_mut()?;
        match direct.next().await {
            Ok(Some(bytes)) => Some(Ok(Segment::Memory(bytes))),
            Ok(None) => {
                self.direct = None;
                None
            }
            Err(Stopped::WholeOnly) => {
                self.direct = None;
                self.leave_to_flight().await;
                None
            }
            Err(Stopped::Failed(error)) => {
                self.direct = None;
                Some(Err(error))
            }
        }
    }

    /// What is missing here comes by the flight, which may read all of the blob for it.
    async fn leave_to_flight(&mut self) {
        self.whole_only = true;
        self.flight.want_whole().await;
        self.announced = None;
        self.tell_position();
    }

    fn advance(&mut self, segment: Segment) -> Segment {
        self.moved = Instant::now();
        self.begun = true;
        self.at += match &segment {
            Segment::Memory(bytes) => bytes.len() as u64,
            Segment::File { range, .. } => range.end - range.start,
        };
        self.tell_position();
        segment
    }

    fn with_position(mut self) -> Self {
        self.tell_position();
        self
    }

    /// The driver learns of each new piece; it is no matter if one word of it is lost.
    fn tell_position(&mut self) {
        let pieces = self.layout.covering(self.at..self.end);
        if self.announced != Some(pieces.start) {
            self.announced = Some(pieces.start);
            let _ = self.flight.events.try_send(Event::Position {
                task: self.flight.shared.task,
                reader: self.flight.id,
                pieces: Some(pieces),
                ahead: self.ahead.pieces().cloned(),
                partial: self.flight.partial,
            });
        }
    }
}
