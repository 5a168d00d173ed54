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
use hawker_core::Time;
use hawker_core::application::Purpose;
use hawker_core::message::{Message, Refusal, Role};
use hawker_core::node::{
    Child, Config, Failure, Input, Named, Node, Opening, Phase, TableSigner, Verdict,
};
use hawker_core::parents::Fault;
use hawker_core::piece::{PeerId, PieceIndex, PieceLayout, PieceSet, PieceTable, SignedPrefix};
use hawker_core::share::Share;
use hawker_identity::member::Identity;
use hawker_oci::digest::{Chain, Digest};
use hawker_oci::reference::Source;
use rand::SeedableRng;
use rand::rngs::StdRng;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::applications::Desk;
use crate::buffer::{BufferPool, PieceBuffer};
use crate::download::{FlightError, Shared};
use crate::grant::Grant;
use crate::metrics::{Metrics, Moved, Refused};
use crate::origin::Origin;
use crate::peer::{PeerError, PeerEvent, Peers, PieceSource, Received};
use crate::proof::Proofs;
use crate::settings::LiveSettings;
use crate::store::{Blob, Partial, StoreError, TaskStore};
use hawker_lanes::{self as lanes, Lane};
use hawker_tracker::{Member, ReportKind, Tracker, TrackerEvent};

mod disk;
mod members;
mod memory;
mod origin;
mod origin_reader;
mod output;
mod task;
#[cfg(test)]
mod tests;

pub(crate) use members::Members;

use origin_reader::{LooseFile, Slots};
use task::{OnDisk, Reading, TaskState};

/// Events that wait for the driver at most; senders wait in turn.
pub(crate) const EVENTS: usize = 4096;

/// Events taken in before the core decides again.
const BATCH: usize = 256;

/// How often idle tasks are looked at.
const SWEEP_EVERY: Duration = Duration::from_secs(1);

/// Memory of pieces that was not used for so long goes back to the system.
const TRIM_EVERY: Duration = Duration::from_secs(10);

/// Tasks remembered whose size was told wrong.
const SIZES_DOUBTED: usize = 4096;

/// Tasks in play at most: past it, peers that ask for further ones are told to ask elsewhere.
const TASKS: usize = 4096;

/// A task that a peer complained about is hashed again at most this often.
const RECHECK_EVERY: Duration = Duration::from_secs(600);

/// A task that nobody reads and no peer asks for is let go after this long.
const LET_GO_AFTER: Duration = Duration::from_secs(30);

/// A download for peers, of which none waits any more, rests after this long: a child may come back.
const REST_AFTER: Duration = Duration::from_secs(3);

/// An event for the driver.
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
    Found {
        task: Digest,
        generation: u64,
        found: Found,
    },
    /// A connection did something.
    Peer(PeerEvent),
    /// The scheduler said something.
    Tracker(TrackerEvent),
    /// A seed that the configuration names answered.
    StaticSeed { peer: PeerId },
    /// A dial is over.
    Dialled { peer: PeerId, reached: bool },
    /// A request to a peer is over.
    Piece {
        task: Digest,
        peer: PeerId,
        request: u32,
        outcome: Result<Received, PeerError>,
    },
    /// The origin told the size.
    OriginSized {
        task: Digest,
        generation: u64,
        size_bytes: u64,
        registry: String,
    },
    /// The origin gave a piece.
    OriginPiece {
        task: Digest,
        generation: u64,
        /// The registry that gave it; empty where several gave parts of it.
        registry: Arc<str>,
        piece: PieceIndex,
        buffer: PieceBuffer,
        chain: Chain,
        /// Its bytes are in the file already.
        is_on_disk: bool,
    },
    /// The in-order read of the origin is over.
    OriginOver { task: Digest, generation: u64 },
    /// The origin gives no more, in order (then with a generation) or at all.
    OriginFailed {
        task: Digest,
        generation: Option<u64>,
        failure: Failure,
        reason: String,
    },
    /// The origin knows no ranges: it answers a request for any part with the whole blob.
    OriginWholeOnly { task: Digest },
    /// The disk takes no loose bytes.
    DiskRefused { task: Digest, error: StoreError },
    /// A reader waits for these bytes, and only the origin can give them.
    ReadAtOrigin {
        task: Digest,
        reader: u64,
        ranges: Vec<Range<u64>>,
    },
    /// The origin is so slow that its stream took memory from others: it is over.
    OriginHogging { task: Digest, generation: u64 },
    /// A piece is on disk, or not.
    Written {
        task: Digest,
        generation: u64,
        piece: PieceIndex,
        outcome: Result<(), StoreError>,
    },
    /// The disk was tried after it had refused.
    DiskTried { takes_writes: bool },
    /// A task is committed, or not.
    Committed {
        task: Digest,
        generation: u64,
        outcome: Result<Blob, StoreError>,
    },
    /// A client doubts these bytes of a task.
    Recheck {
        task: Digest,
        bytes: Range<u64>,
        reply: oneshot::Sender<bool>,
    },
    /// A blob was streamed from an origin, without pieces, and matched its digest.
    SizeProven { task: Digest, size_bytes: u64 },
    /// The bytes of a task on the disk were hashed again: of the task as it was `seen` in play then, if it was.
    Rechecked {
        task: Digest,
        seen: Option<Arc<Shared>>,
        right: bool,
        reply: Option<oneshot::Sender<bool>>,
    },
    /// A committed blob has wrong bytes, and the store has let it go.
    Rotten {
        blob: Blob,
        reply: oneshot::Sender<()>,
    },
    /// A piece of a committed blob was hashed before it is uploaded for the first time.
    Checked {
        task: Digest,
        peer: PeerId,
        request: u32,
        piece: PieceIndex,
        blob: Blob,
        right: bool,
    },
    /// The store let these tasks go.
    Gone(Vec<Digest>),
    /// The disk needs room: blobs without a reader should not be kept from being evicted.
    Crowded,
    /// For people: the downloads under way.
    List(oneshot::Sender<Vec<Running>>),
}

/// The content of the disk for a task.
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
struct Keys {
    identity: Option<Identity>,
    proofs: Arc<Proofs>,
}

impl TableSigner for Keys {
    fn check(&self, signed: &SignedPrefix, statement: &[u8]) -> Option<Role> {
        self.identity.as_ref()?.check(signed, statement)
    }

    fn sign(&self, table: &mut PieceTable, sealed: bool) {
        if let Some(identity) = &self.identity {
            let pieces = if sealed {
                table.layout().count()
            } else {
                table.values().len() as u32
            };
            let registries = self.proofs.givers(table.task(), pieces);
            identity.sign(table, sealed, registries, SystemTime::now());
        }
    }
}

/// The place that a task can be had from, with the rights of the clients who want it.
pub(crate) type Sources = Arc<
    dyn Fn(Digest, watch::Receiver<Vec<Grant>>) -> Arc<dyn crate::source::Source> + Send + Sync,
>;

/// How to run the driver.
pub(crate) struct DriverConfig {
    pub(crate) identity: Option<Identity>,
    pub(crate) seed: bool,
    pub(crate) memory_bytes: u64,
    /// Clients' tokens may be lent to seeds.
    pub(crate) lends_tokens: bool,
    pub(crate) live: Arc<ArcSwap<LiveSettings>>,
    pub(crate) desk: Arc<Desk>,
    pub(crate) store: Arc<dyn TaskStore>,
    pub(crate) origin: Origin,
    pub(crate) sources: Sources,
    pub(crate) proofs: Arc<Proofs>,
    pub(crate) peers: Option<Arc<dyn Peers>>,
    pub(crate) tracker: Option<Tracker>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) members: Arc<Members>,
    pub(crate) events: mpsc::Sender<Event>,
}

pub(crate) struct Driver {
    config: DriverConfig,
    node: Node<Keys>,
    started: Instant,
    pool: BufferPool,
    slots: Slots,
    tasks: HashMap<Digest, TaskState>,
    generation: u64,
    swept: Instant,
    /// When the memory of pieces was trimmed last.
    trimmed: Instant,
    /// The memory is to be divided anew among the tasks without disk.
    memory_changed: bool,
    /// It is being looked whether the disk takes writes again.
    trying_disk: bool,
    /// Tasks whose size the origin told wrong once: remembered sizes do not count.
    sizes_doubted: HashSet<Digest>,
    /// Sizes of blobs that matched their digest, where registries disagree.
    sizes_proven: HashMap<Digest, u64>,
    /// Tasks that peers complained about, and when they were hashed again.
    rechecked: HashMap<Digest, Instant>,
}

impl Driver {
    pub(crate) fn new(config: DriverConfig) -> Self {
        let me = config
            .identity
            .as_ref()
            .map_or(PeerId([0; 16]), Identity::peer_id);
        let role = if config.seed { Role::Seed } else { Role::Peer };
        let core = Config {
            me,
            role,
            upload_slots: *config.live.load().config.upload_slots as usize,
            // The rest of the memory is for pieces that are being written or read from the origin.
            in_flight_bytes: config.memory_bytes / 3 * 2,
            layout: PieceLayout::new,
        };
        Self {
            node: Node::new(
                core,
                Keys {
                    identity: config.identity.clone(),
                    proofs: Arc::clone(&config.proofs),
                },
                StdRng::from_rng(&mut rand::rng()),
            ),
            started: Instant::now(),
            pool: BufferPool::new(config.memory_bytes),
            slots: Slots::default(),
            tasks: HashMap::new(),
            generation: 0,
            swept: Instant::now(),
            trimmed: Instant::now(),
            memory_changed: false,
            trying_disk: false,
            sizes_doubted: HashSet::new(),
            sizes_proven: HashMap::new(),
            rechecked: HashMap::new(),
            config,
        }
    }

    fn now(&self) -> Time {
        Time(self.started.elapsed())
    }

    /// Runs until `shutdown`.
    pub(crate) async fn run(
        mut self,
        mut events: mpsc::Receiver<Event>,
        shutdown: CancellationToken,
    ) {
        loop {
            let deadline = self
                .node
                .deadline(self.now())
                .map_or(SWEEP_EVERY, |at| at.since(self.now()));
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
            let listens = self
                .config
                .tracker
                .as_ref()
                .is_some_and(|t| !t.connected().is_empty());
            self.tell(Input::Scheduler(listens));
            self.set_rates();
            self.share_memory();
            self.tell(Input::Decide);
            while let Some(output) = self.node.poll() {
                self.carry_out(output);
            }
        }
        for task in self.tasks.values() {
            task.shared
                .update(|state| state.failed = Some(FlightError::Stopping));
        }
    }

    /// Follows the settings.
    fn set_rates(&mut self) {
        let live = self.config.live.load_full();
        self.tell(Input::UploadSlots(*live.config.upload_slots as usize));
        self.tell(Input::Rates {
            each_task: live.task_rates,
            prefetch: live.rates.prefetch,
        });
        self.tell(Input::Applications(self.config.desk.rules()));
    }

    /// Tells the core what happened.
    fn tell(&mut self, input: Input) {
        let now = self.now();
        self.node.handle(now, input);
    }

    // ---- events -------------------------------------------------------------------------------------------------

    fn apply(&mut self, event: Event) {
        let now = self.now();
        match event {
            Event::Open {
                task,
                grant,
                purpose,
                size_hint,
                partial,
                reader,
                reply,
            } => {
                // A registry that says another size has no part in this download, until one of them is proved right.
                if let Some(state) = self.tasks.get(&task)
                    && state
                        .shared
                        .lock()
                        .is_other_size(size_hint, &grant.source.registry)
                {
                    let _ = reply.send(Arc::clone(&state.shared));
                    return;
                }
                let state = self.enter(task, grant, size_hint);
                state.readers.insert(
                    reader,
                    Reading {
                        pieces: None,
                        at_origin: Vec::new(),
                        purpose,
                    },
                );
                state.whole |= !partial;
                state.was_read = true;
                let _ = reply.send(Arc::clone(&state.shared));
                self.opened(task);
            }
            Event::Position {
                task,
                reader,
                pieces,
                ahead,
                partial,
            } => {
                self.position(task, reader, pieces, ahead, partial);
            }
            Event::Found {
                task,
                generation,
                found,
            } => self.found(task, generation, found),
            Event::Peer(event) => self.peer(event),
            Event::Tracker(event) => self.tracker(event),
            Event::StaticSeed { peer } => {
                self.config
                    .members
                    .with(|state| state.static_seeds.insert(peer));
                self.tell(Input::Seeds(self.config.members.named_seeds()));
            }
            Event::Dialled { peer, reached } => {
                if !reached {
                    self.node.handle(now, Input::DialFailed(peer));
                }
            }
            Event::Piece {
                task,
                peer,
                request,
                outcome,
            } => self.piece(task, peer, request, outcome),
            Event::OriginSized {
                task,
                generation,
                size_bytes,
                registry,
            } => {
                if self.reading(&task, generation) {
                    if let Some(state) = self.tasks.get(&task) {
                        let mut shared = state.shared.lock();
                        if shared.layout.is_none() {
                            shared.sized_by = Some(registry);
                        }
                    }
                    self.node.handle(now, Input::Sized { task, size_bytes });
                }
            }
            Event::OriginPiece {
                task,
                generation,
                registry,
                piece,
                buffer,
                chain,
                is_on_disk,
            } => {
                if self.reading(&task, generation) {
                    // Before the piece counts: an issuer signs at once, and readers see it at once.
                    let count = self
                        .node
                        .table(&task)
                        .map_or(0, |table| table.layout().count());
                    self.config
                        .proofs
                        .gave(&task, &registry, piece..piece + 1, count);
                    self.moved(&task, Moved::Origin, buffer.filled().len() as u64);
                    let verdict = self
                        .node
                        .handle(now, Input::OriginPiece { task, piece, chain });
                    let verdict = verdict.unwrap_or(Verdict::Drop);
                    if verdict == Verdict::Wrong {
                        self.config.proofs.forget(&task);
                    }
                    let resumes = tokio::time::Instant::now() + self.node.origin_waits(now, &task);
                    if let Some(state) = self.tasks.get(&task) {
                        state.resumes.send_replace(resumes);
                    }
                    match (verdict, is_on_disk) {
                        (Verdict::Keep, true) => self.note_on_disk(task, piece, buffer),
                        _ => self.take(task, piece, buffer, verdict),
                    }
                }
            }
            Event::OriginOver { task, generation } => {
                if self.reading(&task, generation) {
                    if let Some(state) = self.tasks.get_mut(&task) {
                        state.reading = None;
                    }
                    self.node.handle(
                        now,
                        Input::OriginOver {
                            task,
                            failure: None,
                        },
                    );
                }
            }
            Event::OriginFailed {
                task,
                generation,
                failure,
                reason,
            } => {
                self.origin_failed(task, generation, failure, reason);
            }
            Event::OriginWholeOnly { task } => {
                if let Some(state) = self.tasks.get_mut(&task) {
                    state.whole = true;
                    self.run_task(task, false);
                }
            }
            Event::DiskRefused { task, error } => self.disk_refused(task, &error),
            Event::ReadAtOrigin {
                task,
                reader,
                ranges,
            } => self.read_at_origin(task, reader, ranges),
            Event::OriginHogging { task, generation } => {
                if self.reading(&task, generation) {
                    self.starve(now, &task);
                }
            }
            Event::Written {
                task,
                generation,
                piece,
                outcome,
            } => self.written(task, generation, piece, outcome),
            Event::DiskTried { takes_writes } => self.disk_tried(takes_writes),
            Event::Committed {
                task,
                generation,
                outcome,
            } => self.committed(task, generation, outcome),
            Event::SizeProven { task, size_bytes } => self.size_proven(task, size_bytes),
            Event::Recheck { task, bytes, reply } => self.recheck(task, bytes, Some(reply)),
            Event::Rechecked {
                task,
                seen,
                right,
                reply,
            } => {
                if !right {
                    self.rotten(task, seen);
                }
                reply.map(|reply| reply.send(right));
            }
            Event::Rotten { blob, reply } => {
                self.rotten_blob(&blob);
                let _ = reply.send(());
            }
            Event::Checked {
                task,
                peer,
                request,
                piece,
                blob,
                right,
            } => {
                if !right {
                    self.rotten_blob(&blob);
                }
                self.upload(peer, request, task, piece, !right);
            }
            Event::Gone(tasks) => tasks.iter().for_each(|task| self.evicted(task)),
            Event::Crowded => drop(self.let_idle_go(None)),
            Event::List(reply) => {
                let _ = reply.send(self.list());
            }
        }
    }

    /// The store let a task go. A download of it that has begun anew since goes on.
    fn evicted(&mut self, task: &Digest) {
        if self
            .tasks
            .get(task)
            .is_some_and(|state| state.generation > 0 && state.disk.blob().is_none())
        {
            return;
        }
        self.gone(task);
    }

    /// The store has nothing of a task any more.
    fn gone(&mut self, task: &Digest) {
        self.tell(Input::Close(*task));
        self.config.proofs.forget(task);
        if let Some(state) = self.tasks.remove(task) {
            state
                .shared
                .update(|s| s.failed = Some(FlightError::Rotten(*task)));
        }
        self.holding(task, 0, 0, false);
    }

    fn reading(&self, task: &Digest, generation: u64) -> bool {
        self.tasks
            .get(task)
            .is_some_and(|t| t.reading == Some(generation))
    }

    /// A client has come to read a task.
    fn opened(&mut self, task: Digest) {
        let Some(state) = self.tasks.get_mut(&task) else {
            return;
        };
        state.idle_since = None;
        state.shared.update(|s| s.failed = None);
        self.claim_memory(task);
        let Some(state) = self.tasks.get(&task) else {
            return;
        };
        if state.is_ready() {
            self.run_task(task, false);
        }
    }

    /// The task's state here; a new one has its disk looked at first.
    fn enter(&mut self, task: Digest, grant: Grant, size_hint: Option<u64>) -> &mut TaskState {
        self.tell(Input::Authorize {
            task,
            source: grant.source.clone(),
            right: grant.right(self.config.lends_tokens),
        });
        let size_hint = size_hint.map(|size_bytes| (size_bytes, grant.source.registry.clone()));
        let state = self.state_of(task, size_hint);
        state.add_grant(grant);
        state
    }

    /// The same where a peer asks for it.
    fn enter_for_peer(&mut self, task: Digest, grant: Grant) -> &mut TaskState {
        let lends_tokens = self.config.lends_tokens;
        self.state_of(task, None).add_peers_grant(grant);
        let best = self
            .tasks
            .get(&task)
            .and_then(|state| state.grants.borrow().last().cloned());
        if let Some(best) = best {
            self.tell(Input::Authorize {
                task,
                source: best.source.clone(),
                right: best.right(lends_tokens),
            });
        }
        self.state_of(task, None)
    }

    fn state_of(&mut self, task: Digest, size_hint: Option<(u64, String)>) -> &mut TaskState {
        if !self.tasks.contains_key(&task) {
            self.look(
                task,
                0,
                size_hint.as_ref().map(|(size_bytes, _)| *size_bytes),
                |_| {},
            );
        }
        let alone = self.config.peers.is_none();
        self.tasks.entry(task).or_insert_with(|| {
            let shared = Arc::new(Shared::new(task));
            shared.update(|s| s.is_alone = alone);
            TaskState {
                size_hint,
                ..TaskState::new(shared)
            }
        })
    }

    fn found(&mut self, task: Digest, generation: u64, found: Found) {
        let now = self.now();
        let Some(state) = self
            .tasks
            .get_mut(&task)
            .filter(|t| t.generation == generation)
        else {
            return;
        };
        let Some(grant) = state.grants.borrow().last().cloned() else {
            return;
        };
        if let Found::Refused(error, size) = &found
            && error.is_for_want_of_room()
        {
            // Blobs that nobody reads any more may still be held here, and are not evicted as long as they are.
            let has_let_go = self.let_idle_go(Some(&task));
            let Some(state) = self.tasks.get_mut(&task) else {
                return;
            };
            if !std::mem::replace(&mut state.has_made_room, true) && has_let_go {
                let size_bytes = *size;
                self.look(task, generation, size_bytes, |_| {});
                return;
            }
        }
        let Some(state) = self.tasks.get_mut(&task) else {
            return;
        };
        let early = state.disk.take_early();
        let is_first = early.is_some();
        let mut opening = Opening {
            right: grant.right(self.config.lends_tokens),
            source: grant.source,
            known: None,
            is_committed: false,
            announce: self.config.peers.is_some(),
        };
        let mut refused = false;
        match found {
            Found::Blob(blob) => {
                let table = (*blob.table).clone();
                let all = PieceSet::full(table.layout().count());
                state.adopt_file(table.layout(), Arc::clone(&blob.file), all.clone());
                state.shared.update(|s| s.blob = Some(blob.clone()));
                opening.is_committed = true;
                opening.known = Some((table, all));
                state.disk = OnDisk::Blob(blob);
            }
            Found::Partial(partial) => {
                let (table, held) = (partial.table(), partial.held());
                self.config.proofs.claims(&table);
                state.adopt_file(table.layout(), partial.file(), held.clone());
                opening.known = Some((table, held));
                state.disk = OnDisk::Partial(partial);
            }
            Found::Nothing => {}
            Found::Refused(error, size) => {
                if state.in_memory() {
                    return;
                }
                warn!(%task, %error, "the disk refuses: this task goes through memory");
                refused = true;
                if let Some(size) = size {
                    let layout = PieceLayout::new(size);
                    state.adopt_memory(layout);
                    opening.known = Some((
                        PieceTable::new(task, layout),
                        PieceSet::empty(layout.count()),
                    ));
                }
            }
        }
        let sized_by = state.size_hint.clone();
        state.shared.update(|s| {
            let size_bytes = s.layout.map(|layout| layout.size_bytes());
            let is_theirs = |(hint, _): &(u64, String)| Some(*hint) == size_bytes;
            if is_first {
                s.sized_by = sized_by.filter(is_theirs).map(|(_, registry)| registry);
            }
            s.is_size_proven |= state.disk.blob().is_some();
        });
        if let (Some(origin), Some(partial)) = (&state.origin, state.disk.partial()) {
            origin.wish(|wishes| wishes.file = Some(LooseFile(partial.clone())));
        }
        let Some(early) = early else {
            // The size came after the start: the disk catches up with what is held in memory.
            match state.in_memory() {
                _ if refused => self.enter_memory(task),
                true => self.leave_memory(task),
                false => {
                    self.keep_table(task);
                    self.flush(task);
                }
            }
            return;
        };
        self.node.handle(
            now,
            Input::Open {
                task,
                opening: Box::new(opening),
            },
        );
        if refused {
            self.enter_memory(task);
        }
        if early.is_elected {
            let me = self.config.identity.as_ref().map(Identity::peer_id);
            self.node.handle(
                now,
                Input::Parents {
                    task,
                    parents: Vec::new(),
                    issuer: me,
                    elected: true,
                    share: Share::ALL,
                },
            );
        }
        if self
            .tasks
            .get(&task)
            .is_some_and(|state| !state.readers.is_empty())
        {
            self.run_task(task, false);
        }
        early
            .asking
            .iter()
            .for_each(|child| self.adopt(task, child));
    }

    /// A peer asks for a task that is ready here.
    fn adopt(&mut self, task: Digest, child: &Child) {
        let (now, peer) = (self.now(), child.peer);
        // It may have gone while the disk was looked at.
        if !self.node.is_connected(peer) {
            return;
        }
        let held = self.node.held(&task).is_some_and(|held| !held.is_empty());
        if self.config.seed {
            let as_owner = self.config.members.with(|s| {
                s.listed
                    .iter()
                    .any(|m| m.peer == peer && m.role == Role::Seed)
            });
            if let Some(state) = self.tasks.get_mut(&task) {
                state.whole = true;
                state.for_peers = true;
            }
            self.run_task(task, as_owner);
        } else if !held && !self.node.is_running(&task) {
            self.tell(Input::Refuse {
                peer,
                task,
                reason: Refusal::NotHeld,
            });
            return;
        }
        self.claim_memory(task);
        self.node.handle(
            now,
            Input::Adopt {
                task,
                child: child.clone(),
            },
        );
    }

    fn run_task(&mut self, task: Digest, as_owner: bool) {
        let now = self.now();
        if let Some(state) = self.tasks.get_mut(&task) {
            state.idle_since = None;
            self.node.handle(
                now,
                Input::Read {
                    task,
                    is_read: !state.readers.is_empty(),
                },
            );
            if let Some(purpose) = state.purpose() {
                self.node.handle(now, Input::Purpose { task, purpose });
            }
            state
                .resumes
                .send_replace(tokio::time::Instant::now() + self.node.origin_waits(now, &task));
            self.node.handle(
                now,
                Input::Run {
                    task,
                    whole: state.whole,
                    as_owner,
                },
            );
        }
    }

    fn position(
        &mut self,
        task: Digest,
        reader: u64,
        pieces: Option<Range<PieceIndex>>,
        ahead: Option<PieceSet>,
        partial: bool,
    ) {
        let now = self.now();
        let Some(state) = self.tasks.get_mut(&task) else {
            return;
        };
        let state_in_memory = state.in_memory();
        match &pieces {
            Some(pieces) => {
                if let Some(reading) = state.readers.get_mut(&reader) {
                    reading.pieces = Some(pieces.clone());
                }
            }
            None => {
                state.readers.remove(&reader);
                match state.purpose() {
                    Some(purpose) => {
                        self.node.handle(now, Input::Purpose { task, purpose });
                    }
                    None => {
                        state.idle_since = Some(Instant::now());
                        self.node.handle(
                            now,
                            Input::Read {
                                task,
                                is_read: false,
                            },
                        );
                    }
                }
            }
        }
        self.memory_changed |= pieces.is_none() && state_in_memory;
        self.node.handle(
            now,
            Input::Reader {
                task,
                reader,
                pieces,
                ahead,
                partial,
            },
        );
        self.wish_ranges(&task);
    }

    fn peer(&mut self, event: PeerEvent) {
        let now = self.now();
        match event {
            PeerEvent::Up {
                peer,
                role,
                name,
                addresses,
            } => {
                self.config
                    .members
                    .with(|state| state.connected.insert(peer));
                self.config.members.learn(Member {
                    peer,
                    name,
                    addresses,
                    role,
                    zone: String::new(),
                });
                self.node.handle(now, Input::PeerUp { peer, role });
            }
            PeerEvent::Down { peer } => {
                self.config
                    .members
                    .with(|state| state.connected.remove(&peer));
                self.node.handle(now, Input::PeerDown(peer));
            }
            PeerEvent::Message {
                peer,
                message,
                places: _places,
            } => {
                if let Message::Unavailable { reason, .. } = &message {
                    self.config.metrics.refused(Refused::Us, *reason);
                }
                self.node.handle(now, Input::Message { peer, message });
            }
            PeerEvent::Uploaded {
                peer,
                request,
                bytes,
                complete,
            } => {
                self.config.metrics.uploaded.inc_by(bytes);
                if complete {
                    self.node.handle(now, Input::Delivered { peer, request });
                }
                self.tell(Input::Uploaded { peer, request });
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
                self.tell(Input::Seeds(self.config.members.named_seeds()));
            }
            TrackerEvent::Parents {
                task,
                parents,
                issuer,
                fetch_from_origin,
                share,
            } => {
                let named: Vec<Named> = parents
                    .iter()
                    .map(|m| self.config.members.named(m))
                    .collect();
                parents
                    .into_iter()
                    .for_each(|member| self.config.members.learn(member));
                self.node.handle(
                    now,
                    Input::Parents {
                        task,
                        parents: named,
                        issuer,
                        elected: fetch_from_origin,
                        share,
                    },
                );
                // Elected for what it holds, though nobody here reads it: it is to issue the table for others.
                if fetch_from_origin
                    && !self.tasks.contains_key(&task)
                    && self.config.store.has(&task)
                {
                    let source = Source {
                        registry: String::new(),
                        repository: String::new(),
                    };
                    if let Some(early) = self.enter(task, Grant::own(source), None).disk.early() {
                        early.is_elected = true;
                    }
                }
            }
            TrackerEvent::Zone(zone) => {
                self.config.members.with(|state| state.zone = zone);
                self.tell(Input::Seeds(self.config.members.named_seeds()));
            }
            TrackerEvent::Postponed(task) => self.tell(Input::Postponed(task)),
            TrackerEvent::Removed(removed) => {
                self.config.members.forget(&removed);
                for peer in removed {
                    self.config
                        .peers
                        .iter()
                        .for_each(|peers| peers.drop_peer(peer));
                }
                self.tell(Input::Seeds(self.config.members.named_seeds()));
            }
            TrackerEvent::Isolated(peers) => {
                self.tell(Input::Isolated(
                    peers.iter().map(|isolation| isolation.peer).collect(),
                ));
                self.config.metrics.peers_isolated.set(peers.len() as u64);
                let isolated = peers
                    .into_iter()
                    .map(|isolation| (isolation.peer, isolation))
                    .collect();
                self.config.members.with(|state| state.isolated = isolated);
            }
        }
    }

    fn piece(
        &mut self,
        task: Digest,
        peer: PeerId,
        request: u32,
        outcome: Result<Received, PeerError>,
    ) {
        let now = self.now();
        match outcome {
            Ok(received) => {
                let Some(piece) = self.node.asked_for(peer, request) else {
                    return;
                };
                let chain = received.chain;
                let verdict = self.node.handle(
                    now,
                    Input::Piece {
                        peer,
                        request,
                        chain,
                    },
                );
                let verdict = verdict.unwrap_or(Verdict::Drop);
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
                let refused = if let PeerError::Refused(reason) = error {
                    Some(reason)
                } else {
                    None
                };
                if let Some(reason) = refused {
                    self.config.metrics.refused(Refused::Us, reason);
                }
                let fault = if error == PeerError::Stalled {
                    Fault::Stalled
                } else {
                    Fault::Failed
                };
                self.node.handle(
                    now,
                    Input::PieceFailed {
                        peer,
                        request,
                        refused,
                        fault,
                    },
                );
            }
        }
    }

    /// Bytes of a task came.
    fn moved(&self, task: &Digest, how: Moved, bytes: u64) {
        self.config
            .desk
            .moved(&self.node.purpose_of(task).labels, how, bytes);
    }

    // ---- housekeeping -------------------------------------------------------------------------------------------

    /// Pauses downloads that nobody has read for a while, and lets go of tasks that nobody needs.
    fn sweep(&mut self) {
        if self.swept.elapsed() < SWEEP_EVERY {
            return;
        }
        let now = self.now();
        self.swept = Instant::now();
        self.memory_changed = true;
        self.try_disk();
        if self.trimmed.elapsed() >= TRIM_EVERY {
            self.trimmed = Instant::now();
            self.pool.trim();
        }
        let linger = *self.config.live.load().config.linger;
        let mut gone = Vec::new();
        let mut active = 0;
        for (task, state) in &mut self.tasks {
            let running = self.node.is_running(task);
            active += u64::from(running);
            let is_waited_for = self.node.is_waited_for(task);
            if !state.readers.is_empty() || !state.is_ready() {
                state.idle_since = None;
                continue;
            }
            // A seed goes on for its children's sake.
            if running && state.for_peers && is_waited_for {
                state.idle_since = None;
                continue;
            }
            let idle = state.idle_since.get_or_insert_with(Instant::now).elapsed();
            let memory = state.in_memory();
            let rests_after = if state.was_read {
                linger
            } else {
                linger.min(REST_AFTER)
            };
            if running && (idle >= rests_after || memory) {
                debug!(%task, "nobody reads it: paused");
                state.was_read = false;
                self.node.handle(now, Input::Pause(*task));
                if let Some(tracker) = &self.config.tracker {
                    tracker.forget(task);
                }
            } else if !running
                // A piece that is being written keeps the task, but not the download: one that never rests would never
                // end.
                && state.writing == 0
                && idle >= LET_GO_AFTER.min(linger)
                && (!is_waited_for || idle >= 4 * LET_GO_AFTER)
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
        self.tell(Input::Close(*task));
        self.config.proofs.forget(task);
        let state = self.tasks.remove(task);
        if state.as_ref().is_some_and(TaskState::in_memory) {
            self.holding(task, 0, 0, false);
        }
        let partial = state.and_then(|mut state| state.disk.take_partial());
        if let Some(partial) = partial.filter(|_| !held) {
            let task = *task;
            lanes::start(Lane::Downloads, move || {
                if let Err(error) = partial.discard() {
                    debug!(%task, %error, "could not discard");
                }
            });
        }
    }

    /// Lets go of all that nobody here reads and no peer is waiting for, `but` one; whether there was anything.
    fn let_idle_go(&mut self, but: Option<&Digest>) -> bool {
        let idle = |(task, state): (&Digest, &TaskState)| {
            let busy = !state.is_ready() || !state.readers.is_empty() || state.writing > 0;
            (!busy && !self.node.is_running(task) && !self.node.has_hungry_children(task))
                .then_some(*task)
        };
        let idle: Vec<Digest> = self
            .tasks
            .iter()
            .filter_map(idle)
            .filter(|task| but != Some(task))
            .collect();
        idle.iter().for_each(|task| self.let_go(task));
        !idle.is_empty()
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
                    state: match self.node.phase(task) {
                        Phase::Locating | Phase::Fetching if state.in_memory() => "through memory",
                        Phase::Locating | Phase::Fetching if self.node.is_prefetch(task) => {
                            "prefetching"
                        }
                        Phase::Locating | Phase::Fetching => "downloading",
                        Phase::Committing | Phase::Done => "complete",
                        Phase::Idle | Phase::Failed(_) => "paused",
                    },
                    readers: state.readers.len(),
                    shared: self.node.has_children(task),
                }
            })
            .collect()
    }
}

/// Looks for a task on the disk. If the size is in doubt, only a committed blob counts, and a size that was proved.
/// Blocking.
fn look(
    store: &dyn TaskStore,
    task: &Digest,
    size_hint: Option<u64>,
    proven: Option<u64>,
    doubted: bool,
) -> Found {
    if let Some(blob) = store.committed(task) {
        return Found::Blob(blob);
    }
    match proven.or_else(|| store.partial_size(task).or(size_hint).filter(|_| !doubted)) {
        Some(size) => begin(store, task, size),
        None => Found::Nothing,
    }
}

/// A partial task of known size, or the disk's refusal. Blocking.
fn begin(store: &dyn TaskStore, task: &Digest, size_bytes: u64) -> Found {
    match store.begin(task, size_bytes) {
        Ok(partial) => Found::Partial(partial),
        Err(error) => Found::Refused(error, Some(size_bytes)),
    }
}

/// A piece in memory, for an upload.
fn memory(bytes: &Bytes) -> PieceSource {
    PieceSource::Memory(bytes.clone())
}
