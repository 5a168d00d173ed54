//! The transfers of one connection: downloads, uploads asked for, manifests. Shared by its reader, its writer and the
//! daemon's calls; no I/O here.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use hawker_api::v1::peer_message::Message as Wire;
use hawker_api::{convert, v1};
use hawker_core::message::{Message, Refusal, Role};
use hawker_core::piece::PeerId;
use hawker_core::right::Bearer;
use hawker_oci::digest::{Chain, Digest};
use hawker_oci::reference::Source;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use super::member::Member;
use super::{Download, PeerError, PieceSource, Received};
use crate::buffer::PieceBuffer;

/// Control messages that may wait for the socket. A peer that lets more pile up is not listening.
const CONTROL_QUEUE: usize = 4096;
/// Requests of one peer that may wait for their bytes; the core decides more finely.
pub(super) const ASKED_AT_MOST: usize = 64;
/// Manifests under way at most, each way.
const MANIFESTS_AT_MOST: usize = 16;
/// A piece whose bytes have begun to come must go on within this.
pub(super) const STALLED_AFTER: Duration = Duration::from_secs(5);
/// A piece that was asked for must begin to come within this.
const QUEUED_AT_MOST: Duration = Duration::from_secs(20);
/// Requests of ours that were given up and whose bytes may still be on their way.
const GIVEN_UP_AT_MOST: usize = 1024;
/// A connection on which nothing was said for this long loses nothing when it ends.
const QUIET_AFTER: Duration = Duration::from_secs(60);

/// A manifest as it is answered: status, media type, body, whether the registry asked about gave it.
pub(super) type Manifest = (u16, String, Bytes, bool);

/// A control message on its way to the writer, with the room it takes, given back once it is written.
pub(super) struct Outgoing {
    pub(super) message: v1::PeerMessage,
    pub(super) _room: Option<OwnedSemaphorePermit>,
}

/// An order to the writer about pieces.
pub(super) enum Order {
    /// Send this under that number.
    Send(u32, PieceSource),
    /// The asker does not want it any more.
    Drop(u32),
}

/// The other end, from certificate and hello.
pub(super) struct Remote {
    pub(super) peer: PeerId,
    pub(super) role: Role,
    pub(super) name: String,
    pub(super) addresses: Vec<String>,
    /// Which run of the other daemon this is.
    pub(super) instance: u64,
    /// The address we dialled; `None` when it dialled us.
    pub(super) dialled: Option<String>,
}

pub(super) struct Connection {
    pub(super) remote: Remote,
    /// The state shared with the member's other connections.
    pub(super) member: Arc<Member>,
    control: mpsc::Sender<Outgoing>,
    orders: mpsc::Sender<Order>,
    under_way: Mutex<UnderWay>,
    /// Manifests that we ask for.
    pub(super) manifest_room: Arc<Semaphore>,
    /// Manifests that we answer.
    pub(super) manifest_duty: Arc<Semaphore>,
    pub(super) clock: ReadingClock,
    opened: Instant,
    /// When something other than a ping was last said, either way: milliseconds after `opened`.
    traffic_ms: AtomicU64,
    /// Ends the connection.
    pub(super) close: CancellationToken,
    /// Cancelled when it has ended and is registered no more.
    pub(super) gone: CancellationToken,
}

/// The ends of a connection's queues that its writer reads.
pub(super) struct Queues {
    pub(super) control: mpsc::Receiver<Outgoing>,
    pub(super) orders: mpsc::Receiver<Order>,
}

#[derive(Default)]
struct UnderWay {
    closed: bool,
    downloads: HashMap<u32, Entry>,
    given_up: VecDeque<u32>,
    asked: HashSet<u32>,
    manifests: HashMap<u32, oneshot::Sender<Manifest>>,
    next_manifest: u32,
}

struct Entry {
    /// `None` while the reader fills it.
    slot: Option<Slot>,
    /// When bytes last came, or when it was asked for, by the reading clock.
    moved: Duration,
    served: bool,
}

/// A piece being received. Its outcome is told in any case: dropped, it was lost.
pub(super) struct Slot(Option<Box<Filling>>);

struct Filling {
    buffer: PieceBuffer,
    chain: Chain,
    done: oneshot::Sender<Result<Received, PeerError>>,
}

impl Slot {
    pub(super) fn missing(&self) -> usize {
        self.0
            .as_ref()
            .map_or(0, |filling| filling.buffer.missing())
    }

    /// The memory to append to.
    pub(super) fn vec(&mut self) -> &mut Vec<u8> {
        self.0
            .as_mut()
            .expect("only `finish` and `fail` take it, and end the slot")
            .buffer
            .as_mut_vec()
    }

    /// Runs the hash over the last `count` bytes of the memory.
    pub(super) fn hash_last(&mut self, count: usize) {
        if let Some(filling) = &mut self.0 {
            let filled = filling.buffer.filled();
            filling.chain.update(&filled[filled.len() - count..]);
        }
    }

    pub(super) fn finish(mut self) {
        if let Some(filling) = self.0.take() {
            let Filling {
                buffer,
                chain,
                done,
            } = *filling;
            // Nobody may wait any more: the memory goes back to the pool.
            let _ = done.send(Ok(Received { buffer, chain }));
        }
    }

    pub(super) fn fail(mut self, error: PeerError) {
        if let Some(filling) = self.0.take() {
            let _ = filling.done.send(Err(error));
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        if let Some(filling) = self.0.take() {
            let _ = filling.done.send(Err(PeerError::Lost));
        }
    }
}

/// The target of a data frame's bytes.
pub(super) enum Taken {
    Slot(Slot),
    /// It was given up here.
    Skip,
    /// It was never asked for, or has come whole already.
    NotAsked,
}

/// The fate of a peer's request.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Asked {
    Noted,
    TooMany,
    Twice,
}

impl Connection {
    pub(super) fn new(
        remote: Remote,
        member: Arc<Member>,
        close: CancellationToken,
    ) -> (Arc<Self>, Queues) {
        let (control, control_queue) = mpsc::channel(CONTROL_QUEUE);
        let (orders, order_queue) = mpsc::channel(2 * ASKED_AT_MOST);
        let connection = Self {
            remote,
            member,
            control,
            orders,
            under_way: Mutex::default(),
            manifest_room: Arc::new(Semaphore::new(MANIFESTS_AT_MOST)),
            manifest_duty: Arc::new(Semaphore::new(MANIFESTS_AT_MOST)),
            clock: ReadingClock::new(),
            opened: Instant::now(),
            traffic_ms: AtomicU64::new(0),
            close,
            gone: CancellationToken::new(),
        };
        (
            Arc::new(connection),
            Queues {
                control: control_queue,
                orders: order_queue,
            },
        )
    }

    /// Says something about pieces; `false` when that is impossible.
    pub(super) fn say(&self, message: &Message) -> bool {
        self.say_raw(convert::peer_message(message), None)
    }

    /// Says something. A connection whose control queue is full is closed.
    pub(super) fn say_raw(
        &self,
        message: v1::PeerMessage,
        room: Option<OwnedSemaphorePermit>,
    ) -> bool {
        let said = self
            .control
            .try_send(Outgoing {
                message,
                _room: room,
            })
            .is_ok();
        if !said {
            self.close.cancel();
        }
        said
    }

    /// Asks for a piece.
    pub(super) fn download(&self, download: Download) {
        let Download {
            request,
            task,
            piece,
            prefetch,
            priority,
            buffer,
            chain,
            done,
        } = download;
        let slot = Slot(Some(Box::new(Filling {
            buffer,
            chain,
            done,
        })));
        {
            let mut under_way = self.under_way();
            if under_way.closed {
                return; // dropping the slot tells
            }
            under_way.given_up.retain(|number| *number != request);
            let entry = Entry {
                slot: Some(slot),
                moved: self.clock.now(),
                served: false,
            };
            under_way.downloads.insert(request, entry);
        }
        self.say(&Message::Request {
            request,
            task,
            piece,
            prefetch,
            priority,
        });
    }

    /// Gives up one of our requests; `false` when it is not under way here.
    pub(super) fn give_up(&self, request: u32, error: PeerError) -> bool {
        let given_up = self.under_way().give_up(request);
        let Some(entry) = given_up else { return false };
        if let Some(slot) = entry.slot {
            slot.fail(error);
        }
        self.say(&Message::Cancel { request });
        true
    }

    /// The other side refused one of our requests.
    pub(super) fn refused(&self, request: u32, reason: Refusal) {
        let entry = self.under_way().downloads.remove(&request);
        if let Some(slot) = entry.and_then(|entry| entry.slot) {
            slot.fail(PeerError::Refused(reason));
        }
    }

    /// Takes a piece out to be filled.
    pub(super) fn take(&self, request: u32) -> Taken {
        let mut under_way = self.under_way();
        if let Some(slot) = under_way
            .downloads
            .get_mut(&request)
            .and_then(|entry| entry.slot.take())
        {
            return Taken::Slot(slot);
        }
        if under_way.given_up.contains(&request) {
            Taken::Skip
        } else {
            Taken::NotAsked
        }
    }

    /// Puts a piece back after a frame, or tells that it has come whole.
    pub(super) fn put_back(&self, request: u32, slot: Slot) {
        let mut under_way = self.under_way();
        let whole = slot.missing() == 0;
        let known = match under_way.downloads.get_mut(&request) {
            Some(_) if whole => under_way.downloads.remove(&request).is_some(),
            Some(entry) => {
                entry.moved = self.clock.now();
                entry.served = true;
                entry.slot = Some(slot);
                return;
            }
            None => false,
        };
        drop(under_way);
        if known {
            slot.finish()
        } else {
            slot.fail(PeerError::Cancelled)
        }
    }

    /// Notes that the peer asks for a piece.
    pub(super) fn ask(&self, request: u32) -> Asked {
        let mut under_way = self.under_way();
        if under_way.asked.contains(&request) {
            Asked::Twice
        } else if under_way.asked.len() >= ASKED_AT_MOST {
            Asked::TooMany
        } else {
            under_way.asked.insert(request);
            Asked::Noted
        }
    }

    /// The peer waits for this no more; whether it did.
    pub(super) fn no_more_asked(&self, request: u32) -> bool {
        self.under_way().asked.remove(&request)
    }

    /// The peer cancelled a request of its own.
    pub(super) async fn drop_upload(&self, request: u32) {
        if self.no_more_asked(request) {
            // An error means that the writer has ended, and every upload with it.
            let _ = self.orders.send(Order::Drop(request)).await;
        }
    }

    /// Hands a piece to the writer; gives it back when it was not asked for here, or is not any more.
    pub(super) fn upload(&self, request: u32, piece: PieceSource) -> Result<(), PieceSource> {
        // Under the lock, so that it is ordered before a cancel that comes now.
        let mut under_way = self.under_way();
        if !under_way.asked.contains(&request) {
            return Err(piece);
        }
        match self.orders.try_send(Order::Send(request, piece)) {
            Err(
                TrySendError::Full(Order::Send(_, piece))
                | TrySendError::Closed(Order::Send(_, piece)),
            ) => {
                under_way.asked.remove(&request);
                Err(piece)
            }
            _ => Ok(()),
        }
    }

    /// Whether the peer waits for bytes of ours.
    pub(super) fn is_uploading(&self) -> bool {
        !self.under_way().asked.is_empty()
    }

    /// Asks for a manifest. The caller sets the deadline.
    pub(super) async fn ask_manifest(
        &self,
        source: &Source,
        digest: &Digest,
        token: Option<&Bearer>,
    ) -> Result<Manifest, PeerError> {
        let _room = self
            .manifest_room
            .acquire()
            .await
            .map_err(|_| PeerError::Lost)?;
        let (request, answered) = self.expect_manifest().ok_or(PeerError::Lost)?;
        let _over = Expected {
            connection: self,
            request,
        };
        let source = Some(convert::source(source));
        let token = convert::token(token);
        let asked = v1::ManifestRequest {
            request,
            source,
            digest: digest.to_string(),
            token,
        };
        self.say_raw(
            v1::PeerMessage {
                message: Some(Wire::ManifestRequest(asked)),
            },
            None,
        );
        answered.await.map_err(|_| PeerError::Lost)
    }

    /// Whether a manifest was asked for.
    pub(super) fn expects_manifests(&self) -> bool {
        !self.under_way().manifests.is_empty()
    }

    fn expect_manifest(&self) -> Option<(u32, oneshot::Receiver<Manifest>)> {
        let mut under_way = self.under_way();
        if under_way.closed {
            return None;
        }
        let (answer, answered) = oneshot::channel();
        let request = under_way.next_manifest;
        under_way.next_manifest = request.wrapping_add(1);
        under_way.manifests.insert(request, answer);
        Some((request, answered))
    }

    /// An answer has come, or is waited for no more.
    pub(super) fn manifest_over(&self, request: u32) -> Option<oneshot::Sender<Manifest>> {
        self.under_way().manifests.remove(&request)
    }

    /// Gives up what does not move.
    pub(super) fn give_up_stalled(&self) {
        let now = self.clock.now();
        let stalled: Vec<u32> = self
            .under_way()
            .downloads
            .iter()
            .filter(|(_, entry)| {
                let patience = if entry.served {
                    STALLED_AFTER
                } else {
                    QUEUED_AT_MOST
                };
                // One that is being filled has its deadline in the reader.
                entry.slot.is_some() && now.saturating_sub(entry.moved) >= patience
            })
            .map(|(request, _)| *request)
            .collect();
        for request in stalled {
            self.give_up(request, PeerError::Stalled);
        }
    }

    /// Something other than a ping was said.
    pub(super) fn note_traffic(&self) {
        self.traffic_ms
            .store(self.opened.elapsed().as_millis() as u64, Ordering::Relaxed);
    }

    /// For how long nothing but pings was said while nothing is under way; `None` while something is.
    pub(super) fn idle(&self) -> Option<Duration> {
        let under_way = self.under_way();
        let busy = !under_way.downloads.is_empty()
            || !under_way.asked.is_empty()
            || !under_way.manifests.is_empty();
        let traffic = Duration::from_millis(self.traffic_ms.load(Ordering::Relaxed));
        (!busy).then(|| self.opened.elapsed().saturating_sub(traffic))
    }

    /// Whether nothing that was said lately may have been lost, were the connection to end now.
    pub(super) fn is_quiet(&self) -> bool {
        self.idle().is_some_and(|idle| idle >= QUIET_AFTER)
    }

    /// Fails everything that is under way and takes nothing more.
    pub(super) fn shut(&self) {
        let mut under_way = self.under_way();
        let rest = std::mem::take(&mut *under_way);
        under_way.closed = true;
        drop(under_way);
        // Dropped outside of the lock: each slot tells that it was lost.
        drop(rest);
    }

    fn under_way(&self) -> MutexGuard<'_, UnderWay> {
        self.under_way
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// A manifest that is waited for, until the waiting ends for whatever reason.
struct Expected<'a> {
    connection: &'a Connection,
    request: u32,
}

impl Drop for Expected<'_> {
    fn drop(&mut self) {
        self.connection.manifest_over(self.request);
    }
}

impl UnderWay {
    fn give_up(&mut self, request: u32) -> Option<Entry> {
        let entry = self.downloads.remove(&request)?;
        if self.given_up.len() == GIVEN_UP_AT_MOST {
            self.given_up.pop_front();
        }
        self.given_up.push_back(request);
        Some(entry)
    }
}

/// A clock that stands still while we do not read, so that our own rate limit is not held against the other side.
pub(super) struct ReadingClock {
    state: Mutex<ClockState>,
}

struct ClockState {
    started: Instant,
    held: Duration,
    held_since: Option<Instant>,
    heard: Duration,
}

impl ClockState {
    fn now(&self) -> Duration {
        let until = self.held_since.unwrap_or_else(Instant::now);
        until.duration_since(self.started).saturating_sub(self.held)
    }
}

impl ReadingClock {
    fn new() -> Self {
        let state = ClockState {
            started: Instant::now(),
            held: Duration::ZERO,
            held_since: None,
            heard: Duration::ZERO,
        };
        Self {
            state: Mutex::new(state),
        }
    }

    pub(super) fn now(&self) -> Duration {
        self.state().now()
    }

    /// Bytes have come.
    pub(super) fn heard(&self) {
        let mut state = self.state();
        state.heard = state.now();
    }

    /// For how long nothing has come though we were reading.
    pub(super) fn silence(&self) -> Duration {
        let state = self.state();
        state.now().saturating_sub(state.heard)
    }

    /// Waits for something else than the socket.
    pub(super) async fn hold<T>(&self, future: impl Future<Output = T>) -> T {
        self.state().held_since = Some(Instant::now());
        let result = future.await;
        let mut state = self.state();
        if let Some(since) = state.held_since.take() {
            state.held += since.elapsed();
        }
        result
    }

    fn state(&self) -> MutexGuard<'_, ClockState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_reading_clock_stands_still_while_we_hold_back() {
        let clock = ReadingClock::new();
        clock.heard();
        let before = clock.now();
        clock
            .hold(tokio::time::sleep(Duration::from_millis(300)))
            .await;
        assert!(clock.now() - before < Duration::from_millis(100));
        assert!(clock.silence() < Duration::from_millis(100));
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert!(clock.silence() >= Duration::from_millis(20));
    }
}
