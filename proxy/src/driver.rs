//! The one actor that owns [`hawker_core::node::Node`]: it feeds in what happens and carries out what comes out.
//!
//! `select` awaits, [`Driver::apply`] tells the core, [`Driver::carry_out`] does what the core asks. Everything slow (disk, network)
//! runs in tasks of its own and comes back as an [`Event`].

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use arc_swap::ArcSwap;
use bytes::Bytes;
use hawker_api::identity::Identity;
use hawker_core::Time;
use hawker_core::application::{Priority, Purpose};
use hawker_core::digest::{Chain, Digest};
use hawker_core::message::{Message, Refusal, Role};
use hawker_core::node::{Child, Config, Failure, Named, Node, Notary, Opening, Output, Verdict};
use hawker_core::parents::Fault;
use hawker_core::piece::{PeerId, PieceIndex, PieceLayout, PieceSet, PieceTable, SignedPrefix};
use hawker_core::reference::Source;
use hawker_core::right::Bearer;
use hawker_core::share::Share;
use rand::SeedableRng;
use rand::rngs::StdRng;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::applications::Desk;
use crate::buffer::{BufferPool, PieceBuffer};
use crate::flight::{FlightError, Shared, State};
use crate::grant::{Authorization, Grant};
use crate::metrics::{Metrics, Moved, Refused};
use crate::origin::Origin;
use crate::peer::{Download, PeerError, PeerEvent, Peers, PieceSource, Received};
use crate::settings::LiveSettings;
use crate::store::{Blob, Partial, Store, StoreError, held_is_right};
use crate::tracker::{Holding, Member, ReportKind, Tracker, TrackerEvent, Want};

mod disk;
mod members;
mod origin_read;
mod output;
mod task;

pub(crate) use members::Members;

use task::{Reading, TaskState};

/// Events that wait for the driver at most; senders wait in turn.
pub(crate) const EVENTS: usize = 4096;

/// Events taken in before the core decides again.
const BATCH: usize = 256;

/// How often idle tasks are looked at.
const SWEEP_EVERY: Duration = Duration::from_secs(1);

/// Pieces held in memory for one task whose disk refuses.
const MEMORY_WINDOW_BYTES: u64 = 12 << 20;

/// Tasks remembered whose size was told wrong.
const SIZES_DOUBTED: usize = 4096;

/// Tasks that may hold such a stretch at once: together half of the default memory.
const MEMORY_TASKS: usize = 2;

/// Tasks in play at most: past it, peers that ask for further ones are told to ask elsewhere.
const TASKS: usize = 4096;

/// A task that a peer complained about is hashed again at most this often.
const RECHECK_EVERY: Duration = Duration::from_secs(600);

/// A task that nobody reads and no peer asks for is let go after this long.
const LET_GO_AFTER: Duration = Duration::from_secs(30);

/// What happens to the driver.
pub(crate) enum Event {
    /// A client wants a blob.
    Open {
        task: Digest,
        grant: Grant,
        purpose: Purpose,
        size_hint: Option<u64>,
        partial: bool,
        reader: u64,
        reply: oneshot::Sender<Arc<Shared>>,
    },
    /// A reader is at these pieces now, and wants those ahead after them; or it is gone.
    Position {
        task: Digest,
        reader: u64,
        pieces: Option<Range<PieceIndex>>,
        ahead: Option<PieceSet>,
        partial: bool,
    },
    /// The disk has been looked at for a task.
    Found { task: Digest, generation: u64, found: Found },
    /// A connection did something.
    Peer(PeerEvent),
    /// The scheduler said something.
    Tracker(TrackerEvent),
    /// A seed that the configuration names answered.
    StaticSeed { peer: PeerId },
    /// A dial is over.
    Dialled { peer: PeerId, reached: bool },
    /// A request to a peer is over.
    Piece { task: Digest, peer: PeerId, request: u32, outcome: Result<Received, PeerError> },
    /// The origin told the size.
    OriginSized { task: Digest, generation: u64, size_bytes: u64 },
    /// The origin gave a piece.
    OriginPiece { task: Digest, generation: u64, piece: PieceIndex, buffer: PieceBuffer, chain: Chain },
    /// The origin's stream is over.
    OriginOver { task: Digest, generation: u64, failure: Option<(Failure, String)> },
    /// The origin is so slow that its stream took memory from others: it is over.
    OriginHogging { task: Digest, generation: u64 },
    /// A piece is on disk, or not.
    Written { task: Digest, generation: u64, piece: PieceIndex, outcome: Result<(), StoreError> },
    /// A task is committed, or not.
    Committed { task: Digest, generation: u64, outcome: Result<Blob, StoreError> },
    /// A client doubts these bytes of a task.
    Recheck { task: Digest, bytes: Range<u64>, reply: oneshot::Sender<bool> },
    /// What the disk has of a task was hashed again: of the task as it was `seen` in play then, if it was.
    Rechecked { task: Digest, seen: Option<Arc<Shared>>, right: bool, reply: Option<oneshot::Sender<bool>> },
    /// The store let these tasks go.
    Gone(Vec<Digest>),
    /// The disk needs room: what nobody reads should not be kept from being evicted.
    Crowded,
    /// For people: what is being downloaded.
    List(oneshot::Sender<Vec<Running>>),
}

/// What the disk has of a task.
pub(crate) enum Found {
    /// All of it.
    Blob(Blob),
    /// A part, maybe empty, of known size.
    Partial(Partial),
    /// Nothing, and the size is not known.
    Nothing,
    /// The disk refuses; the size where it is known.
    Refused(StoreError, Option<u64>),
}

/// A download, for people.
#[derive(Clone, Debug)]
pub struct Running {
    /// The task.
    pub task: Digest,
    /// Its size, 0 when not known.
    pub size_bytes: u64,
    /// Pieces held.
    pub pieces: u32,
    /// Out of.
    pub of: u32,
    /// In a word.
    pub state: &'static str,
    /// Clients that read it.
    pub readers: usize,
    /// Peers that are children.
    pub shared: bool,
}

/// Signs and checks with this node's identity; alone, nothing is signed.
struct Keys(Option<Identity>);

impl Notary for Keys {
    fn check(&self, signed: &SignedPrefix, statement: &[u8]) -> Option<Role> {
        self.0.as_ref()?.check(signed, statement)
    }

    fn sign(&self, table: &mut PieceTable, sealed: bool) {
        if let Some(identity) = &self.0 {
            identity.sign(table, sealed, SystemTime::now());
        }
    }
}

/// How to run the driver.
pub(crate) struct DriverConfig {
    pub(crate) identity: Option<Identity>,
    pub(crate) seed: bool,
    pub(crate) upload_slots: u32,
    pub(crate) memory_bytes: u64,
    pub(crate) linger: Duration,
    /// Clients' tokens may be lent to seeds.
    pub(crate) lends_tokens: bool,
    pub(crate) live: Arc<ArcSwap<LiveSettings>>,
    pub(crate) desk: Arc<Desk>,
    pub(crate) store: Store,
    pub(crate) origin: Origin,
    pub(crate) peers: Option<Peers>,
    pub(crate) tracker: Option<Tracker>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) members: Arc<Members>,
    pub(crate) events: mpsc::Sender<Event>,
}

pub(crate) struct Driver {
    config: DriverConfig,
    node: Node<Keys>,
    rng: StdRng,
    started: Instant,
    pool: BufferPool,
    tasks: HashMap<Digest, TaskState>,
    generation: u64,
    swept: Instant,
    /// Tasks whose size the origin told wrong once: what anybody remembers of it does not count.
    sizes_doubted: HashSet<Digest>,
    /// Tasks that peers complained about, and when they were hashed again.
    rechecked: HashMap<Digest, Instant>,
}

impl Driver {
    pub(crate) fn new(config: DriverConfig) -> Self {
        let me = config.identity.as_ref().map_or(PeerId([0; 16]), Identity::peer_id);
        let role = if config.seed { Role::Seed } else { Role::Peer };
        let core = Config {
            me,
            role,
            upload_slots: config.upload_slots as usize,
            // The rest of the memory is for pieces that are being written or read from the origin.
            in_flight_bytes: config.memory_bytes / 3 * 2,
            layout: PieceLayout::new,
        };
        Self {
            node: Node::new(core, Keys(config.identity.clone())),
            rng: StdRng::from_rng(&mut rand::rng()),
            started: Instant::now(),
            pool: BufferPool::new(config.memory_bytes),
            tasks: HashMap::new(),
            generation: 0,
            swept: Instant::now(),
            sizes_doubted: HashSet::new(),
            rechecked: HashMap::new(),
            config,
        }
    }

    fn now(&self) -> Time {
        Time(self.started.elapsed())
    }

    /// Runs until `shutdown`.
    pub(crate) async fn run(mut self, mut events: mpsc::Receiver<Event>, shutdown: CancellationToken) {
        loop {
            let deadline = self.node.deadline(self.now()).map_or(SWEEP_EVERY, |at| at.since(self.now()));
            tokio::select! {
                () = shutdown.cancelled() => break,
                event = events.recv() => match event {
                    Some(event) => self.apply(event),
                    None => break,
                },
                () = tokio::time::sleep(deadline.min(SWEEP_EVERY)) => {}
            }
            for _ in 0..BATCH {
                let Ok(event) = events.try_recv() else { break };
                self.apply(event);
            }
            self.sweep();
            self.node.scheduler(self.config.tracker.as_ref().is_some_and(|t| !t.connected().is_empty()));
            self.set_rates();
            let now = self.now();
            self.node.decide(now, &mut self.rng);
            while let Some(output) = self.node.poll() {
                self.carry_out(output);
            }
        }
        for task in self.tasks.values() {
            task.shared.update(|state| state.failed = Some(FlightError::Stopping));
        }
    }

    /// Follows the settings; who waits for the origin's rate looks again at how long.
    fn set_rates(&mut self) {
        let (now, live) = (self.now(), self.config.live.load());
        let rates = self.node.rates(now, live.task_rates, live.rates.prefetch);
        if self.node.applications(now, &self.config.desk.rules()) || rates {
            let reading = self.tasks.values().filter(|state| state.origin.is_some());
            for state in reading {
                state.resumes.send_replace(tokio::time::Instant::now());
            }
        }
    }

    // ---- what happens -------------------------------------------------------------------------------------------

    fn apply(&mut self, event: Event) {
        let now = self.now();
        match event {
            Event::Open { task, grant, purpose, size_hint, partial, reader, reply } => {
                let state = self.enter(task, grant, size_hint);
                state.readers.insert(reader, Reading { pieces: None, purpose });
                state.whole |= !partial;
                let _ = reply.send(Arc::clone(&state.shared));
                self.opened(task);
            }
            Event::Position { task, reader, pieces, ahead, partial } => {
                self.position(task, reader, pieces, partial);
                if let Some(ahead) = ahead {
                    self.node.reads_ahead(&task, reader, ahead);
                }
            }
            Event::Found { task, generation, found } => self.found(task, generation, found),
            Event::Peer(event) => self.peer(event),
            Event::Tracker(event) => self.tracker(event),
            Event::StaticSeed { peer } => {
                self.config.members.with(|state| state.static_seeds.insert(peer));
                self.node.seeds(self.config.members.named_seeds());
            }
            Event::Dialled { peer, reached } => {
                if !reached {
                    self.node.dial_failed(now, peer);
                }
            }
            Event::Piece { task, peer, request, outcome } => self.piece(task, peer, request, outcome),
            Event::OriginSized { task, generation, size_bytes } => {
                if self.reading(&task, generation) {
                    self.node.sized(now, task, size_bytes);
                }
            }
            Event::OriginPiece { task, generation, piece, buffer, chain } => {
                if self.reading(&task, generation) {
                    self.moved(&task, Moved::Origin, buffer.filled().len() as u64);
                    let verdict = self.node.origin_piece(now, &task, piece, &chain);
                    let resumes = tokio::time::Instant::now() + self.node.origin_waits(now, &task);
                    if let Some(state) = self.tasks.get(&task) {
                        state.resumes.send_replace(resumes);
                    }
                    self.take(task, piece, buffer, verdict);
                }
            }
            Event::OriginOver { task, generation, failure } => {
                if self.reading(&task, generation) {
                    if let Some((failure, reason)) = &failure {
                        info!(%task, ?failure, reason, "the origin gave no more");
                        if let Some(state) = self.tasks.get_mut(&task) {
                            state.last_failure.clone_from(reason);
                        }
                    }
                    self.node.origin_over(now, &task, failure.map(|(failure, _)| failure));
                }
            }
            Event::OriginHogging { task, generation } => {
                if self.reading(&task, generation) {
                    self.starve(now, &task);
                }
            }
            Event::Written { task, generation, piece, outcome } => {
                self.written(task, generation, piece, outcome)
            }
            Event::Committed { task, generation, outcome } => self.committed(task, generation, outcome),
            Event::Recheck { task, bytes, reply } => self.recheck(task, bytes, Some(reply)),
            Event::Rechecked { task, seen, right, reply } => {
                if !right {
                    self.rotten(task, seen);
                }
                reply.map(|reply| reply.send(right));
            }
            Event::Gone(tasks) => tasks.iter().for_each(|task| self.gone(task)),
            Event::Crowded => self.let_idle_go(),
            Event::List(reply) => {
                let _ = reply.send(self.list());
            }
        }
    }

    /// What the store had of a task is no more.
    fn gone(&mut self, task: &Digest) {
        self.node.close(task);
        if let Some(state) = self.tasks.remove(task) {
            state.shared.update(|s| s.failed = Some(FlightError::Rotten(*task)));
        }
        self.holding(task, 0, 0, false);
    }

    fn reading(&self, task: &Digest, generation: u64) -> bool {
        self.tasks.get(task).and_then(|t| t.origin.as_ref()).is_some_and(|o| o.generation == generation)
    }

    /// A client has come to read a task.
    fn opened(&mut self, task: Digest) {
        let Some(state) = self.tasks.get_mut(&task) else { return };
        state.idle_since = None;
        state.shared.update(|s| s.failed = None);
        if state.ready {
            self.run_task(task, false);
        }
    }

    /// The task's state here; a new one has its disk looked at first.
    fn enter(&mut self, task: Digest, grant: Grant, size_hint: Option<u64>) -> &mut TaskState {
        if !self.tasks.contains_key(&task) {
            self.look(task, 0, size_hint, |_| {});
        }
        self.node.authorize(&task, grant.source.clone(), grant.right(self.config.lends_tokens));
        let alone = self.config.peers.is_none();
        let state = self.tasks.entry(task).or_insert_with(|| {
            let shared = Arc::new(Shared::new(task));
            shared.update(|s| s.alone = alone);
            TaskState::new(shared)
        });
        state.add_grant(grant);
        state
    }

    fn found(&mut self, task: Digest, generation: u64, found: Found) {
        let now = self.now();
        let Some(state) = self.tasks.get_mut(&task).filter(|t| t.generation == generation) else { return };
        let Some(grant) = state.grants.borrow().last().cloned() else { return };
        let first = !state.ready;
        state.ready = true;
        let mut opening = Opening {
            right: grant.right(self.config.lends_tokens),
            source: grant.source,
            known: None,
            own_table: false,
            announce: self.config.peers.is_some(),
        };
        match found {
            Found::Blob(blob) => {
                let table = (*blob.table).clone();
                let all = PieceSet::full(table.layout().count());
                state.adopt_file(table.layout(), Arc::clone(&blob.file), all.clone());
                opening.own_table = table.signed().is_none();
                opening.known = Some((table, all));
                state.blob = Some(blob);
            }
            Found::Partial(partial) => {
                let (table, held) = (partial.table(), partial.held());
                state.adopt_file(table.layout(), partial.file(), held.clone());
                opening.own_table = table.signed().is_none();
                opening.known = Some((table, held));
                state.partial = Some(partial);
            }
            Found::Nothing => {}
            Found::Refused(error, size) => {
                warn!(%task, %error, "the disk refuses: this task goes through memory");
                opening.announce = false;
                state.degrade();
                if let Some(size) = size {
                    let layout = PieceLayout::new(size);
                    let table = PieceTable::new(task, layout);
                    state.adopt_memory(layout);
                    opening.own_table = true;
                    opening.known = Some((table, PieceSet::empty(layout.count())));
                }
            }
        }
        if !first {
            // The size came after the start: the disk catches up with what is held in memory.
            self.keep_table(task);
            self.flush(task);
            return;
        }
        let known_complete = opening.known.as_ref().is_some_and(|(_, held)| held.is_full());
        self.node.open(now, task, opening);
        self.set_window(&task);
        if self.tasks.get(&task).is_some_and(|t| t.elected) {
            let me = self.config.identity.as_ref().map(Identity::peer_id);
            self.node.parents(now, task, &[], me, true, Share::ALL);
        }
        // An empty blob, or one whose last piece was written before the commit: nothing is left to fetch.
        if known_complete && self.tasks.get(&task).is_some_and(|t| t.blob.is_none()) {
            self.complete(task);
        }
        let state = self.tasks.get_mut(&task);
        let (readers, children) =
            state.map_or((false, Vec::new()), |s| (!s.readers.is_empty(), std::mem::take(&mut s.asking)));
        if readers {
            self.run_task(task, false);
        }
        children.iter().for_each(|child| self.adopt(task, child));
    }

    /// A peer asks for a task that is ready here.
    fn adopt(&mut self, task: Digest, child: &Child) {
        let (now, peer) = (self.now(), child.peer);
        let held = self.node.held(&task).is_some_and(|held| !held.is_empty());
        if self.config.seed {
            let as_owner =
                self.config.members.with(|s| s.listed.iter().any(|m| m.peer == peer && m.role == Role::Seed));
            if let Some(state) = self.tasks.get_mut(&task) {
                state.whole = true;
                state.for_peers = true;
            }
            self.run_task(task, as_owner);
        } else if !held && !self.node.is_running(&task) {
            self.node.refuse(peer, task, Refusal::NotHeld);
            return;
        }
        self.node.adopt(now, &task, child);
    }

    fn run_task(&mut self, task: Digest, as_owner: bool) {
        let now = self.now();
        if let Some(state) = self.tasks.get_mut(&task) {
            state.idle_since = None;
            self.node.read(&task, !state.readers.is_empty());
            state.purpose().into_iter().for_each(|purpose| self.node.purpose(&task, purpose));
            state.resumes.send_replace(tokio::time::Instant::now() + self.node.origin_waits(now, &task));
            self.node.run(now, task, state.whole, as_owner);
        }
    }

    fn position(&mut self, task: Digest, reader: u64, pieces: Option<Range<PieceIndex>>, partial: bool) {
        let now = self.now();
        let Some(state) = self.tasks.get_mut(&task) else { return };
        match &pieces {
            Some(pieces) => {
                if let Some(reading) = state.readers.get_mut(&reader) {
                    reading.pieces = Some(pieces.clone());
                }
            }
            None => {
                state.readers.remove(&reader);
                match state.purpose() {
                    Some(purpose) => self.node.purpose(&task, purpose),
                    None => {
                        state.idle_since = Some(Instant::now());
                        self.node.read(&task, false);
                    }
                }
            }
        }
        self.node.reader(now, &task, reader, pieces, partial);
        self.set_window(&task);
    }

    /// Without a disk: a bounded stretch ahead of the slowest reader is held, and nothing before it.
    ///
    /// Few tasks may hold memory so: a slow reader keeps its stretch for as long as it likes, and pieces of all other tasks need
    /// memory on their way. The readers of the rest go to the origin by themselves.
    fn set_window(&mut self, task: &Digest) {
        let others = self.tasks.iter().filter(|(other, t)| *other != task && t.holds_memory).count();
        let Some(state) = self.tasks.get_mut(task).filter(|t| t.in_memory()) else { return };
        let may = !state.starved && (state.holds_memory || others < MEMORY_TASKS);
        state.holds_memory = may && !state.readers.is_empty();
        let bytes = if state.holds_memory { MEMORY_WINDOW_BYTES } else { 0 };
        let window = state.memory_window(bytes);
        self.node.in_memory(task, window);
    }

    /// A task gets no memory any more: its readers go to the origin, each by itself and as slowly as that is.
    fn starve(&mut self, now: Time, task: &Digest) {
        warn!(%task, "the origin is too slow for the memory it takes: this task is only passed through");
        if let Some(state) = self.tasks.get_mut(task) {
            state.origin = None;
            state.starved = true;
            state.degrade();
        }
        self.set_window(task);
        self.holding(task, 0, 0, false);
        self.node.origin_over(now, task, None);
    }

    fn peer(&mut self, event: PeerEvent) {
        let now = self.now();
        match event {
            PeerEvent::Up { peer, role, name, addresses } => {
                self.config.members.with(|state| state.connected.insert(peer));
                self.config.members.learn(Member { peer, name, addresses, role, zone: String::new() });
                self.node.peer_up(now, peer, role);
            }
            PeerEvent::Down { peer } => {
                self.config.members.with(|state| state.connected.remove(&peer));
                self.node.peer_down(now, peer);
            }
            PeerEvent::Message { peer, message } => {
                if let Message::Unavailable { reason, .. } = &message {
                    self.config.metrics.refused(Refused::Us, *reason);
                }
                self.node.message(now, peer, message);
            }
            PeerEvent::Uploaded { peer, request, bytes, complete: _ } => {
                self.config.metrics.uploaded.inc_by(bytes);
                self.node.uploaded(peer, request);
            }
        }
        let connected = self.config.members.with(|state| state.connected.len());
        self.config.metrics.peers_connected.set(connected as u64);
    }

    fn tracker(&mut self, event: TrackerEvent) {
        let now = self.now();
        match event {
            TrackerEvent::Members(members) => {
                self.config.members.with(|state| state.listed = members);
                self.node.seeds(self.config.members.named_seeds());
            }
            TrackerEvent::Parents { task, parents, issuer, fetch_from_origin, share } => {
                let named: Vec<Named> = parents.iter().map(|m| self.config.members.named(m)).collect();
                parents.into_iter().for_each(|member| self.config.members.learn(member));
                self.node.parents(now, task, &named, issuer, fetch_from_origin, share);
                // Elected for what it holds, though nobody here reads it: it is to issue the table for others.
                if fetch_from_origin && !self.tasks.contains_key(&task) && self.config.store.has(&task) {
                    let source = Source { registry: String::new(), repository: String::new() };
                    self.enter(task, Grant::own(source), None).elected = true;
                }
            }
            TrackerEvent::Zone(zone) => {
                self.config.members.with(|state| state.zone = zone);
                self.node.seeds(self.config.members.named_seeds());
            }
            TrackerEvent::Postponed(task) => self.node.postponed(now, &task),
            TrackerEvent::Applications(applications) => self.config.desk.told(applications),
            TrackerEvent::Isolated(peers) => {
                self.node.isolated(now, peers.iter().map(|isolation| isolation.peer));
                self.config.metrics.peers_isolated.set(peers.len() as u64);
                let isolated = peers.into_iter().map(|isolation| (isolation.peer, isolation)).collect();
                self.config.members.with(|state| state.isolated = isolated);
            }
        }
    }

    fn piece(&mut self, task: Digest, peer: PeerId, request: u32, outcome: Result<Received, PeerError>) {
        let now = self.now();
        match outcome {
            Ok(received) => {
                let Some(piece) = self.node.asked_for(peer, request) else { return };
                let verdict = self.node.piece(now, peer, request, &received.chain);
                if verdict == Verdict::Keep {
                    let seed = self.config.members.seeds().contains(&peer);
                    let bytes = received.buffer.filled().len() as u64;
                    let counter = if seed {
                        &self.config.metrics.received_seeds
                    } else {
                        &self.config.metrics.received_peers
                    };
                    counter.inc_by(bytes);
                    self.moved(&task, Moved::Received, bytes);
                    if let Some(tracker) = &self.config.tracker {
                        tracker.report(peer, &task, ReportKind::Served(bytes));
                    }
                }
                self.take(task, piece, received.buffer, verdict);
            }
            Err(PeerError::Cancelled) => {}
            Err(error) => {
                debug!(%task, %peer, %error, "a piece did not come");
                let refused = if let PeerError::Refused(reason) = error { Some(reason) } else { None };
                if let Some(reason) = refused {
                    self.config.metrics.refused(Refused::Us, reason);
                }
                let fault = if error == PeerError::Stalled { Fault::Stalled } else { Fault::Failed };
                self.node.piece_failed(now, peer, request, refused, fault);
            }
        }
    }

    /// Bytes of a task came.
    fn moved(&self, task: &Digest, how: Moved, bytes: u64) {
        self.config.desk.moved(&self.node.purpose_of(task).labels, how, bytes);
    }

    // ---- housekeeping -------------------------------------------------------------------------------------------

    /// Pauses downloads that nobody has read for a while, and lets go of tasks that nobody needs.
    fn sweep(&mut self) {
        if self.swept.elapsed() < SWEEP_EVERY {
            return;
        }
        self.swept = Instant::now();
        let linger = self.config.linger;
        let mut gone = Vec::new();
        let mut active = 0;
        for (task, state) in &mut self.tasks {
            let running = self.node.is_running(task);
            active += u64::from(running);
            let children = self.node.has_children(task);
            if !state.readers.is_empty() || !state.ready {
                state.idle_since = None;
                continue;
            }
            // A seed goes on for its children's sake.
            if running && state.for_peers && children {
                state.idle_since = None;
                continue;
            }
            let idle = state.idle_since.get_or_insert_with(Instant::now).elapsed();
            let memory = state.in_memory();
            if running && (idle >= linger || memory) {
                debug!(%task, "nobody reads it: paused");
                self.node.pause(task);
                if let Some(tracker) = &self.config.tracker {
                    tracker.forget(task);
                }
            } else if !running
                // That a piece is being written keeps the task, but not the download: one that never rests would never end.
                && state.writing == 0
                && idle >= LET_GO_AFTER.min(linger)
                && (!children || idle >= 4 * LET_GO_AFTER)
            {
                gone.push(*task);
            }
        }
        self.config.metrics.tasks_active.set(active);
        gone.iter().for_each(|task| self.let_go(task));
    }

    /// Forgets a task that nobody needs. A file without a piece is not worth keeping.
    fn let_go(&mut self, task: &Digest) {
        let held = self.node.held(task).is_some_and(|held| !held.is_empty());
        self.node.close(task);
        let partial = self.tasks.remove(task).and_then(|state| state.partial);
        if let Some(partial) = partial.filter(|_| !held) {
            let task = *task;
            tokio::task::spawn_blocking(move || {
                if let Err(error) = partial.discard() {
                    debug!(%task, %error, "could not discard");
                }
            });
        }
    }

    /// Lets go of all that nobody here reads and no peer is waiting for.
    fn let_idle_go(&mut self) {
        let idle = |(task, state): (&Digest, &TaskState)| {
            let busy = !state.ready || !state.readers.is_empty() || state.writing > 0;
            (!busy && !self.node.is_running(task) && !self.node.has_hungry_children(task)).then_some(*task)
        };
        for task in self.tasks.iter().filter_map(idle).collect::<Vec<_>>() {
            self.let_go(&task);
        }
    }

    fn list(&self) -> Vec<Running> {
        self.tasks
            .iter()
            .map(|(task, state)| {
                let held = self.node.held(task);
                Running {
                    task: *task,
                    size_bytes: self.node.table(task).map_or(0, |t| t.layout().size_bytes()),
                    pieces: held.map_or(0, PieceSet::len),
                    of: held.map_or(0, PieceSet::count),
                    state: match (self.node.is_complete(task), self.node.is_running(task), state.in_memory())
                    {
                        (_, true, false) if self.node.is_prefetch(task) => "prefetching",
                        (true, ..) => "complete",
                        (_, true, true) => "through memory",
                        (_, true, false) => "downloading",
                        (_, false, _) => "paused",
                    },
                    readers: state.readers.len(),
                    shared: self.node.has_children(task),
                }
            })
            .collect()
    }
}

/// What the disk has of a task. Where the size is in doubt only a committed blob counts. Blocking.
fn look(store: &Store, task: &Digest, size_hint: Option<u64>, doubted: bool) -> Found {
    if let Some(blob) = store.committed(task) {
        return Found::Blob(blob);
    }
    match store.partial_size(task).or(size_hint).filter(|_| !doubted) {
        Some(size) => begin(store, task, size),
        None => Found::Nothing,
    }
}

/// A partial task of known size, or the disk's refusal. Blocking.
fn begin(store: &Store, task: &Digest, size_bytes: u64) -> Found {
    match store.begin(task, size_bytes) {
        Ok(partial) => Found::Partial(partial),
        Err(error) => Found::Refused(error, Some(size_bytes)),
    }
}

/// A piece in memory, for an upload.
fn memory(bytes: &Bytes) -> PieceSource {
    PieceSource::Memory(bytes.clone())
}
