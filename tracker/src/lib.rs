//! The schedulers' streams, and the list of members that outlives them.
//!
//! Messages to send are kept as state, not as a queue (`outbox`): the open wants, the latest of each holding. So
//! nothing piles up while no scheduler is there, and a new stream starts with the whole. `session` runs one stream
//! after another to one scheduler; `renewal` keeps the certificate fresh.
//!
//! Wants and reports go to the scheduler that rendezvous hashing names for the task among those connected; holdings go
//! to all, so that a task finds its holders whoever tracks it. If too many ask a scheduler for a task, the task is
//! spread: each node asks one of the first few in the order, by its own hash. A node repeats the issuer that it was
//! told with its next question: to the next scheduler, or to the same one after its restart.
//!
//! Reports of wrong bytes go to all schedulers, too: isolation must not depend on the tasks in which two reporters met
//! the peer.
//!
//! Dropped are reports while no scheduler is connected or when too many wait, and wants beyond [`MAX_WANTS`].

mod outbox;
mod renewal;
mod session;

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

pub use hawker_api::convert::Member;
use hawker_core::application::Purpose;
use hawker_core::piece::{PeerId, PieceTable};
use hawker_core::place::Place;
use hawker_core::share::Share;
use hawker_identity::member::Identity;
use hawker_oci::digest::Digest;
use hawker_oci::reference::Source;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tracing::warn;

pub use outbox::MAX_WANTS;
use outbox::Outboxes;

/// Takes configuration that schedulers push to this node.
pub trait Push: fmt::Debug + Send + Sync {
    /// Applies a document of the scheduler `from` as a whole, or leaves everything as it was. `known` are the schedulers whose
    /// documents may stay. Blocking.
    ///
    /// # Errors
    /// The reason, for people.
    fn push(&self, from: PeerId, known: &[PeerId], document: &str) -> Result<(), String>;
}

/// An event from a scheduler.
#[derive(Clone, Debug)]
pub enum TrackerEvent {
    /// Seeds and schedulers, the whole list. Also sent at start, from the disk.
    Members(Vec<Member>),
    /// The parents of a task.
    Parents {
        /// The task.
        task: Digest,
        /// The parents.
        parents: Vec<Member>,
        /// The member whose table counts although it is no seed.
        issuer: Option<PeerId>,
        /// This node is elected to read it from the origin and issue the table.
        fetch_from_origin: bool,
        /// The share to take from parents in other zones.
        share: Share,
    },
    /// Members that nobody fetches from, the whole list.
    Isolated(Vec<Isolation>),
    /// Members that were removed from the cluster just now: their connections are to end.
    Removed(Vec<PeerId>),
    /// The zone of this node.
    Zone(String),
    /// Nobody is elected for this task yet, for its application's sake.
    Postponed(Digest),
}

/// A member that nobody fetches from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Isolation {
    /// The peer.
    pub peer: PeerId,
    /// Why, for people.
    pub why: String,
    /// When it is let back.
    pub until: Instant,
}

/// The outcome with a parent, for the scheduler.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ReportKind {
    /// It sent bytes that do not match the table.
    WrongBytes,
    /// It stopped sending.
    Stalled,
    /// It refused what it had offered.
    NotHeld,
    /// It could not be reached or broke off.
    Failed,
    /// It served this many bytes since the last report.
    Served(u64),
}

/// A task that parents are wanted for.
#[derive(Clone, Debug)]
pub struct Want {
    /// Its size, when known.
    pub size_bytes: Option<u64>,
    /// The registry and repository that have it.
    pub source: Source,
    /// The parents named before did not suffice.
    pub again: bool,
    /// For whom it is fetched, and how urgent that is.
    pub purpose: Purpose,
    /// The seeds may not read it at its origin; this node may.
    pub reads: bool,
    /// Ranges of it only.
    pub partial: bool,
}

/// The pieces that a peer holds of a task.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holding {
    /// The task.
    pub task: Digest,
    /// Its size.
    pub size_bytes: u64,
    /// Pieces offered; 0: none any more.
    pub pieces: u32,
    /// Committed.
    pub complete: bool,
}

/// The capacity of a node to send, for the scheduler.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity {
    /// Pieces sent at once.
    pub upload_slots: u32,
    /// Bytes a second, 0 when not limited.
    pub upload_rate_bytes: u64,
}

/// How to run the [`Tracker`].
pub struct TrackerConfig {
    /// Our identity.
    pub identity: Identity,
    /// For people.
    pub name: String,
    /// Our place.
    pub place: Place,
    /// How others reach us.
    pub addresses: Vec<String>,
    /// The node's capacity, read at each new stream.
    pub capacity: Arc<dyn Fn() -> Capacity + Send + Sync>,
    /// Takes the configuration that schedulers push; `None`: it is refused.
    pub push: Option<Arc<dyn Push>>,
    /// Schedulers by `host:port`, besides those in the member list.
    pub schedulers: Vec<String>,
    /// The file of the member list.
    pub members_file: PathBuf,
    /// All that this node holds, asked at each new stream.
    pub holdings: Arc<dyn Fn() -> Vec<Holding> + Send + Sync>,
    /// The channel for events.
    pub events: mpsc::Sender<TrackerEvent>,
}

/// The streams to the schedulers: each task is tracked by the one that rendezvous hashing names. Cheap to clone; the streams
/// end when the last clone is dropped.
#[derive(Clone)]
pub struct Tracker {
    shared: Arc<Shared>,
    _stop: Arc<tokio_util::sync::DropGuard>,
}

/// The state that the streams' tasks and the tracker share.
struct Shared {
    config: TrackerConfig,
    outboxes: Mutex<Outboxes>,
    /// The last problem with each scheduler that is not connected, by its addresses.
    problems: Mutex<BTreeMap<Vec<String>, String>>,
}

impl Shared {
    /// The folder of the identity.
    fn identity_dir(&self) -> PathBuf {
        self.config.members_file.with_file_name("identity")
    }

    /// Remembers why there is no stream to a scheduler. A new reason is logged, a known one is not logged again.
    fn note_problem(&self, target: &[String], problem: &str) {
        let old = self.problems().insert(target.to_vec(), problem.to_owned());
        if old.as_deref() != Some(problem) {
            warn!(
                scheduler = target.join(", "),
                problem, "a scheduler is not connected; it is tried again"
            );
        }
    }

    fn problems(&self) -> MutexGuard<'_, BTreeMap<Vec<String>, String>> {
        self.problems.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Held for moments only, never across an await.
    fn outboxes(&self) -> MutexGuard<'_, Outboxes> {
        self.outboxes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Tracker {
    /// Connects, and connects again for ever with growing waits. The first event is the member list from the disk. A renewed
    /// certificate and the list of removed members are saved into `identity/` beside the members file.
    ///
    /// Must be called within a Tokio runtime.
    pub fn start(config: TrackerConfig) -> Self {
        let stop = CancellationToken::new();
        let outboxes = Mutex::new(Outboxes::new(config.identity.peer_id()));
        let shared = Arc::new(Shared {
            config,
            outboxes,
            problems: Mutex::default(),
        });
        tokio::spawn(
            stop.clone()
                .run_until_cancelled_owned(session::keep_all(Arc::clone(&shared))),
        );
        tokio::spawn(
            stop.clone()
                .run_until_cancelled_owned(renewal::keep_fresh(Arc::clone(&shared))),
        );
        Self {
            shared,
            _stop: Arc::new(stop.drop_guard()),
        }
    }

    /// Asks for parents.
    pub fn want(&self, task: &Digest, want: Want) {
        self.shared.outboxes().want(task, want);
    }

    /// No longer fetching it.
    pub fn forget(&self, task: &Digest) {
        self.shared.outboxes().forget(task);
    }

    /// The held pieces of one task have changed; sent at most once a second.
    pub fn holding(&self, holding: Holding) {
        self.shared.outboxes().holding(&holding);
    }

    /// The outcome with a parent; sent batched.
    pub fn report(&self, peer: PeerId, task: &Digest, kind: ReportKind) {
        self.shared.outboxes().report(peer, task, kind);
    }

    /// Two tables that one issuer sealed and that contradict each other: proof for every scheduler.
    pub fn contradiction(&self, tables: [PieceTable; 2]) {
        self.shared.outboxes().contradiction(&tables);
    }

    /// Why there is no stream to the scheduler at this address, if one was tried.
    pub fn problem(&self, address: &str) -> Option<String> {
        let problems = self.shared.problems();
        let of_address = |target: &Vec<String>| target.iter().any(|known| known == address);
        problems
            .iter()
            .find(|(target, _)| of_address(target))
            .map(|(_, problem)| problem.clone())
    }

    /// Schedulers with a live stream, by address.
    pub fn connected(&self) -> Vec<String> {
        self.shared.outboxes().connected()
    }
}
