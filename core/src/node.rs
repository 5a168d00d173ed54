//! All tasks of one peer: the requests to make, the child to serve next, the pieces to offer, the moment to read the
//! origin.
//!
//! A node has no I/O and no clock. The shell feeds in events with [`Node::handle`], carries out what [`Node::poll`] gives, and
//! sends [`Input::Decide`] after events and at [`Node::deadline`]. Bytes never come here: the shell moves and hashes them, this
//! module says what they count for.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use rand::rngs::StdRng;

use crate::Time;
use crate::application::{Applications, Labels, Priority, Purpose};
use crate::fetch::Fetch;
use crate::limit::{Rates, TokenBucket};
use crate::message::{Message, Refusal, Role};
use crate::offer::Offers;
use crate::parents::{Fault, Parents};
use crate::peers::PeerMap;
use crate::piece::{PeerId, PieceIndex, PieceLayout, PieceSet, PieceTable};
use crate::rendezvous;
use crate::right::{Bearer, Right};
use crate::share::Share;
use hawker_oci::digest::Digest;
use hawker_oci::reference::Source;

mod decide;
mod fair;
mod input;
mod memory;
mod messages;
mod pace;
mod phase;
mod pieces;
mod table;
mod task;
mod uploads;

#[cfg(test)]
mod fair_tests;
#[cfg(test)]
mod tests;

use fair::{Admission, Failures, Waits};
pub use input::Input;
use pace::{Pace, Quotas};
use phase::Change;
pub use phase::Phase;
pub use table::{TableSigner, Trust};
use task::{Advice, OriginState, Task};
use uploads::Uploads;

/// News for peers is gathered for this long: each time a piece is passed on waits for it, and at a high rate several pieces go into one
/// message. With 50 ms a thousand nodes took 5 % longer, for a tenth fewer messages.
const NEWS_EVERY: Duration = Duration::from_millis(20);

/// How often a node looks whether anybody has taken too long: all that it looks for is counted in hundreds of milliseconds.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// The first pieces are told of sooner: a client waits for the first byte, and they are few and small.
const FIRST_NEWS_EVERY: Duration = Duration::from_millis(5);
const FIRST_PIECES: u32 = 8;

/// How long a scheduler may say nothing before it is no longer waited for: it is advice.
const ANSWER_WITHIN: Duration = Duration::from_millis(1500);

/// How long it may take until one of those who may read the origin is elected, where the seed may not: a scheduler that has just
/// come up listens for its `swarm::WARM_UP` before it elects anybody, and its first answer names nobody.
const ELECTED_WITHIN: Duration = Duration::from_millis(2500);

/// How long a seed, or the issuer, may take to be reached and to answer. A deploy hits it with everybody's handshakes at once, and
/// giving up on it early costs another copy from the origin; a client can wait this long.
const SEED_ANSWERS_WITHIN: Duration = Duration::from_secs(5);

/// How long a peer's "working on it" is believed without a piece.
const WORKING_FOR: Duration = Duration::from_secs(8);

/// How often a peer that waits for pieces is told that they will come.
const SAY_WORKING_EVERY: Duration = Duration::from_secs(2);

/// A download that has not moved for this long reads from the origin, whatever hope there is (invariant: a client that has
/// waited 10 s is served from the origin).
const PATIENCE: Duration = Duration::from_secs(10);

/// After the origin failed it is tried again after this long, as long as somebody waits.
const ORIGIN_RETRY: Duration = Duration::from_secs(2);

/// Readers of ranges wait this long for peers that bring nothing yet.
const RANGE_PATIENCE: Duration = Duration::from_millis(250);

/// The scheduler is asked for other parents when a download has not moved for this long.
const ASK_AGAIN: Duration = Duration::from_secs(3);

/// A peer that answered "busy" is left alone for this long.
const BUSY_REST: Duration = Duration::from_millis(200);

/// A download that has not moved for this long takes all pieces from any zone: the gateway that was to bring them does
/// not. This time ends well before [`PATIENCE`].
const TAKES_ALL_AFTER: Duration = Duration::from_secs(4);

/// Patience while requests are under way: the transport gives up on those that do not move well before.
const PATIENCE_IN_FLIGHT: Duration = Duration::from_secs(25);

/// Requests of lower priority and prefetches may add to the requests under way only up to this part of the room, while
/// a more urgent download waits.
const LESS_URGENT_ROOM: u64 = 4;

/// The identity and limits of this node.
#[derive(Clone, Debug)]
pub struct Config {
    /// Its id.
    pub me: PeerId,
    /// Its role.
    pub role: Role,
    /// Pieces sent at once.
    pub upload_slots: usize,
    /// Bytes asked for at once, over all tasks.
    pub in_flight_bytes: u64,
    /// How a blob of so many bytes is cut: alike by all of a swarm.
    pub layout: fn(u64) -> PieceLayout,
}

/// A peer that asks for a task, and on what terms.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Child {
    /// The peer.
    pub peer: PeerId,
    /// For whom, and how urgent.
    pub purpose: Purpose,
    /// It stands in another zone, and takes this share.
    pub far: Option<Share>,
    /// It only wants to hear what is held here.
    pub passive: bool,
    /// Its clients read ranges only.
    pub partial: bool,
}

/// A peer that may be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Named {
    /// The peer.
    pub peer: PeerId,
    /// It stands in another zone than this node.
    pub far: bool,
}

impl Named {
    /// A peer in this node's zone, or where there are none.
    pub const fn near(peer: PeerId) -> Self {
        Self { peer, far: false }
    }
}

/// An order to the shell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// Connect to a peer; `peer_up` or `dial_failed` follows.
    Dial(PeerId),
    /// Say this.
    Send(PeerId, Message),
    /// Ask for a piece and receive it; `piece` follows.
    Download {
        /// The peer to ask.
        peer: PeerId,
        /// Under which number.
        request: u32,
        /// Of which task.
        task: Digest,
        /// Which.
        piece: PieceIndex,
        /// Nobody here waits for it.
        prefetch: bool,
        /// How urgent it is.
        priority: Priority,
    },
    /// Give that request up; nothing follows.
    Cancel {
        /// The peer whose piece it is.
        peer: PeerId,
        /// Which.
        request: u32,
    },
    /// Send a piece; `uploaded` follows.
    Upload {
        /// To whom.
        peer: PeerId,
        /// Under the asker's number.
        request: u32,
        /// Of which task.
        task: Digest,
        /// Which.
        piece: PieceIndex,
    },
    /// Read the origin from the start of this piece on; `origin_piece` and at the end `origin_over` follow.
    ReadOrigin {
        /// Of which task.
        task: Digest,
        /// From where.
        from: PieceIndex,
    },
    /// Stop reading it; nothing follows.
    StopOrigin(Digest),
    /// Ask the scheduler for parents.
    Want {
        /// For which task.
        task: Digest,
        /// Not for the first time.
        again: bool,
        /// The seeds may not read it, and this node may: one that may is to be elected.
        reads: bool,
        /// Ranges of it only.
        partial: bool,
    },
    /// Tell the scheduler what became of a parent.
    Report(PeerId, Digest, Fault),
    /// Show the schedulers two tables that one issuer sealed and that contradict each other.
    Contradiction(Box<[PieceTable; 2]>),
    /// Look for this task: another peer asks for it. `open` follows when it is here or to be got, else `refuse`.
    Load {
        /// The task.
        task: Digest,
        /// The registry and repository where it may be had.
        source: Source,
        /// With what it may be read there.
        token: Option<Bearer>,
        /// Its size as the asker tells it, who need not be right.
        size_bytes: Option<u64>,
        /// The child that asks.
        child: Child,
    },
    /// A peer got wrong bytes of this task from us: hash what is on disk again.
    Recheck(Digest),
    /// A task without disk keeps this piece in memory no longer.
    Drop(Digest, PieceIndex),
    /// A task without disk may read the origin up to this piece.
    ReadUntil(Digest, PieceIndex),
    /// The rates of tasks or applications have changed: the waits before the next bytes of the origin are to be looked up again.
    RatesChanged,
    /// The size has become known.
    Sized(Digest, u64),
    /// Clients may see this piece.
    Show(Digest, PieceIndex),
    /// Whether readers of ranges need not wait for peers: nobody but the origin is about to bring their pieces.
    Alone(Digest, bool),
    /// The table has grown or was signed anew: keep it.
    TableGrew(Digest),
    /// No member waits for this task any more, and nothing of it should be kept in play unless clients here read it.
    LetGo(Digest),
    /// Every piece is held and verified: commit.
    Complete(Digest),
    /// The table was poisoned: throw away every piece of this task.
    Poisoned(Digest),
    /// Nobody can give this task, and the origin said this.
    Failed(Digest, Failure),
}

impl Output {
    /// The task whose state at this node it is about. Other outputs are about peers, and about requests under way.
    const fn task_here(&self) -> Option<&Digest> {
        match self {
            Output::ReadOrigin { task, .. }
            | Output::Want { task, .. }
            | Output::Drop(task, _)
            | Output::ReadUntil(task, _)
            | Output::Sized(task, _)
            | Output::Show(task, _)
            | Output::Alone(task, _)
            | Output::TableGrew(task)
            | Output::LetGo(task)
            | Output::Complete(task)
            | Output::Poisoned(task)
            | Output::Failed(task, _) => Some(task),
            Output::Dial(_)
            | Output::Send(..)
            | Output::Download { .. }
            | Output::Cancel { .. }
            | Output::StopOrigin(_)
            | Output::Upload { .. }
            | Output::Report(..)
            | Output::Contradiction(_)
            | Output::Load { .. }
            | Output::Recheck(_)
            | Output::RatesChanged => None,
        }
    }
}

/// Why the origin gave nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// It answered with this status.
    Status(u16),
    /// It could not be reached, or broke off.
    Unreachable,
    /// Its bytes have another digest.
    WrongDigest,
    /// It does not say how long the blob is.
    UnknownLength,
    /// It says another length than was known.
    WrongSize,
}

/// The effect of a piece that came in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is right: keep it, show it as told.
    Keep,
    /// It is here already, or nobody wants it any more: drop it.
    Drop,
    /// It is wrong: drop it.
    Wrong,
}

/// A task as it is opened.
#[derive(Clone, Debug)]
pub struct Opening {
    /// The registry and repository where it can be had.
    pub source: Source,
    /// With what right.
    pub right: Right,
    /// The table and the pieces held, if the size is known.
    pub known: Option<(PieceTable, PieceSet)>,
    /// All of it is held, and the blob is committed.
    pub is_committed: bool,
    /// Whether pieces may be offered (not when the disk refuses them).
    pub announce: bool,
}

/// The decisions of one peer.
pub struct Node<N> {
    config: Config,
    notary: N,
    rng: StdRng,
    tasks: BTreeMap<Digest, Task>,
    connected: PeerMap<Role>,
    dialling: BTreeMap<PeerId, Time>,
    undialled: BTreeMap<PeerId, Time>,
    seeds: Vec<Named>,
    /// In which order to try them for a task, as far as it was needed since they or the isolated changed.
    orders: BTreeMap<Digest, Vec<PeerId>>,
    isolated: BTreeSet<PeerId>,
    /// Issuers of poisoned tables: no statement of theirs counts here any more.
    poisoners: BTreeSet<PeerId>,
    scheduler: bool,
    parents: Parents,
    uploads: Uploads,
    /// Of each task.
    task_rates: Rates,
    /// All that is prefetched.
    prefetch: TokenBucket,
    /// The limits of each application and each tag.
    quotas: Quotas,
    asked: BTreeMap<(PeerId, u32), (Digest, PieceIndex, Time)>,
    next_request: u32,
    /// The tasks that each member asked for here and has not left.
    waits: Waits,
    /// Downloads for each member that came to nothing.
    failures: Failures,
    outputs: VecDeque<Output>,
}

impl<N: TableSigner> Node<N> {
    /// A node that knows nobody yet. `rng`: its own, so that the same events lead to the same outputs.
    pub fn new(config: Config, notary: N, rng: StdRng) -> Self {
        let uploads = Uploads::new(config.upload_slots);
        Self {
            config,
            notary,
            rng,
            tasks: BTreeMap::new(),
            connected: PeerMap::default(),
            dialling: BTreeMap::new(),
            undialled: BTreeMap::new(),
            seeds: Vec::new(),
            orders: BTreeMap::new(),
            isolated: BTreeSet::new(),
            poisoners: BTreeSet::new(),
            scheduler: false,
            parents: Parents::default(),
            uploads,
            task_rates: Rates::default(),
            prefetch: TokenBucket::new(None, Time::default()),
            quotas: Quotas::default(),
            asked: BTreeMap::new(),
            next_request: 0,
            waits: Waits::default(),
            failures: Failures::default(),
            outputs: VecDeque::new(),
        }
    }

    // ---- the members ---------------------------------------------------------------------------------------------

    /// The live seeds, as the member list has them.
    fn seeds(&mut self, seeds: Vec<Named>) {
        self.seeds = seeds;
        self.seeds.retain(|seed| seed.peer != self.config.me);
        self.orders.clear();
    }

    /// Whether a scheduler listens.
    const fn scheduler(&mut self, listens: bool) {
        self.scheduler = listens;
    }

    fn rates(&mut self, now: Time, each_task: Rates, prefetch: Option<u64>) {
        let prefetch = prefetch.filter(|rate| *rate > 0);
        if (self.task_rates, self.prefetch.rate_bytes()) == (each_task, prefetch) {
            return;
        }
        self.task_rates = each_task;
        self.prefetch.set_rate(prefetch, now);
        self.tasks
            .values_mut()
            .for_each(|task| task.pace.set(&each_task, now));
        self.outputs.push_back(Output::RatesChanged);
    }

    /// Sends this many pieces at once from now on; pieces under way are finished.
    fn upload_slots(&mut self, slots: usize) {
        self.uploads.set_slots(slots);
    }

    fn applications(&mut self, now: Time, applications: &Arc<Applications>) {
        if self.quotas.set(now, applications) {
            self.outputs.push_back(Output::RatesChanged);
        }
    }

    /// Peers that nobody fetches from.
    fn isolated(&mut self, now: Time, peers: impl IntoIterator<Item = PeerId>) {
        self.isolated = peers.into_iter().collect();
        self.orders.clear();
        for peer in self.isolated.clone() {
            self.forget_parent(now, peer);
        }
        self.tasks
            .values_mut()
            .for_each(|task| task.offers.disbelieve(&self.isolated));
    }

    /// A connection stands.
    fn peer_up(&mut self, now: Time, peer: PeerId, role: Role) {
        self.connected.insert(peer, role);
        self.dialling.remove(&peer);
        self.undialled.remove(&peer);
        let interested: Vec<Digest> = self
            .tasks
            .iter()
            .filter(|(_, t)| t.is_running() && t.links.contains_key(&peer))
            .map(|(d, _)| *d)
            .collect();
        for task in interested {
            self.interest(now, task, peer);
        }
    }

    /// No connection led to that peer.
    fn dial_failed(&mut self, now: Time, peer: PeerId) {
        self.dialling.remove(&peer);
        self.undialled.insert(peer, now);
        for (digest, task) in self.tasks.iter_mut().filter(|(_, t)| t.is_running()) {
            if let Some(link) = task.links.get_mut(&peer) {
                link.unavailable = true;
                self.outputs
                    .push_back(Output::Report(peer, *digest, Fault::Failed));
            }
        }
    }

    /// The last connection with a peer is gone; its transfers fail by themselves.
    fn peer_down(&mut self, now: Time, peer: PeerId) {
        self.connected.remove(&peer);
        self.uploads.peer_gone(peer);
        self.forget_parent(now, peer);
        self.waits.peer_gone(peer);
        let with_it = self
            .tasks
            .iter()
            .filter(|(_, task)| task.links.contains_key(&peer));
        for digest in with_it.map(|(digest, _)| *digest).collect::<Vec<_>>() {
            self.leaves(&digest, peer);
            if let Some(task) = self.tasks.get_mut(&digest) {
                task.links.remove(&peer);
            }
        }
    }

    /// A child hears no more of a task from here. Its parents are told if nobody else waits.
    pub(super) fn leaves(&mut self, digest: &Digest, peer: PeerId) {
        self.waits.leave(peer, digest);
        self.change(digest, |task| task.leave(peer));
    }

    /// Changes something about a task, and tells those who were asked for it if that changes whether anybody waits for it here.
    fn change(&mut self, digest: &Digest, change: impl FnOnce(&mut Task)) {
        let role = self.config.role;
        let Some(task) = self.tasks.get_mut(digest) else {
            return;
        };
        let before = task.is_passive(role);
        change(task);
        if task.is_passive(role) != before {
            self.ask_again(digest, |_, _| true);
        }
    }

    pub(super) fn forget_parent(&mut self, now: Time, peer: PeerId) {
        for task in self.tasks.values_mut() {
            if let Some(fetch) = &mut task.fetch {
                fetch.parent_lost(peer);
            }
            if let Some(link) = task.links.get_mut(&peer) {
                link.unavailable = true;
                link.working = None;
            }
        }
        self.asked.retain(|(whom, _), _| *whom != peer);
        self.undialled.retain(|_, at| now.since(*at) < PATIENCE);
    }

    // ---- tasks --------------------------------------------------------------------------------------------------

    /// A task comes into play: somebody here reads it, or a peer asked for it.
    fn open(&mut self, now: Time, digest: Digest, opening: Opening) {
        if self.tasks.contains_key(&digest) {
            return;
        }
        let mut task = Task {
            source: opening.source,
            right: opening.right,
            is_closed_to_seeds: false,
            fetch: None,
            table: None,
            trust: None,
            offers: Offers::empty(),
            links: PeerMap::default(),
            issuer: None,
            elected: false,
            announce: opening.announce,
            admission: Admission::Own,
            memory: None,
            refills: false,
            phase: Phase::Idle,
            is_read: true,
            purpose: Purpose::default(),
            childrens_purpose: None,
            held_back: None,
            pace: Pace::new(&self.task_rates, now),
            share: Share::ALL,
            whole: false,
            reading: OriginState::No,
            shown: PieceSet::empty(0),
            in_vain: false,
            moved: now,
            advice: Advice::NotAsked,
            news: Time::default(),
            told: None,
            tables_sent: None,
            last_wrong: BTreeSet::new(),
            is_alone: false,
        };
        if let Some((table, held)) = opening.known {
            task.trust = match table.signed() {
                Some(signed) => {
                    let statement = table.statement_of(signed);
                    table::weigh(&self.notary, signed, &statement, None).trust()
                }
                // This node read it from the origin itself.
                None => Some(Trust::Clients),
            };
            let is_full = held.is_full();
            task.set_size(&digest, table.layout(), Some((table, held)));
            if is_full {
                task.enter(Change::Filled);
            }
            if self.config.role == Role::Seed {
                task.issue(&self.notary);
            }
            self.outputs
                .push_back(Output::Sized(digest, task.size_bytes().unwrap_or(0)));
            task.show(&digest, &mut self.outputs);
            if opening.is_committed {
                task.enter(Change::Committed);
            } else if is_full {
                self.outputs.push_back(Output::Complete(digest));
            }
        }
        self.tasks.insert(digest, task);
    }

    /// Forgets a task: nobody reads it here, nobody asks for it.
    ///
    /// Outputs about it that wait are dropped: the shell may open the task anew before it carries them out.
    fn close(&mut self, digest: &Digest) {
        self.stop(digest);
        self.outputs
            .retain(|output| output.task_here() != Some(digest));
        self.orders.remove(digest);
        self.waits.task_gone(digest);
        if let Some(task) = self.tasks.remove(digest) {
            for peer in task
                .links
                .keys()
                .filter(|peer| self.connected.contains_key(*peer))
            {
                self.outputs
                    .push_back(Output::Send(*peer, Message::Leave { task: *digest }));
            }
        }
        self.uploads.task_gone(digest);
    }

    /// Whether a peer is connected.
    pub fn is_connected(&self, peer: PeerId) -> bool {
        self.connected.contains_key(&peer)
    }

    /// Whether a member waits for this task here. A passive interest does not count as waiting.
    pub fn is_waited_for(&self, digest: &Digest) -> bool {
        self.tasks
            .get(digest)
            .is_some_and(|t| t.waiting().next().is_some())
    }

    /// Whether any peer still hears of this task from us.
    pub fn has_children(&self, digest: &Digest) -> bool {
        self.tasks.get(digest).is_some_and(|t| !t.offers.is_empty())
    }

    /// Whether a peer that hears of this task from us still lacks some of it.
    pub fn has_hungry_children(&self, digest: &Digest) -> bool {
        self.tasks
            .get(digest)
            .is_some_and(|t| t.offers.hungry() > 0)
    }

    /// Notes the registry and the right by which a task can be read. The newest counts, and seeds that lacked a right
    /// are asked again with it.
    fn authorize(&mut self, digest: &Digest, source: Source, right: Right) {
        let Some(task) = self.tasks.get_mut(digest) else {
            return;
        };
        if (&task.source, &task.right) == (&source, &right) {
            return;
        }
        (task.source, task.right) = (source, right);
        for (peer, link) in &mut task.links {
            if self.connected.get(peer) == Some(&Role::Seed) {
                (link.asked, link.unavailable) = (None, false);
            }
        }
    }

    /// Starts or resumes downloading. `whole`: everything, not only what readers read. `as_owner`: another seed asks for it,
    /// so the origin is read here, whoever owns the task by rendezvous (else two seeds with different lists wait for each other).
    fn run(&mut self, now: Time, digest: Digest, whole: bool, as_owner: bool) {
        let Some(task) = self.tasks.get_mut(&digest) else {
            return;
        };
        if whole && !task.whole {
            self.want_whole(&digest);
        }
        let Some(task) = self.tasks.get_mut(&digest) else {
            return;
        };
        if task.is_complete() || task.is_running() {
            return;
        }
        task.enter(Change::Started {
            is_sized: task.fetch.is_some(),
        });
        let is_own = task.is_read || self.config.role != Role::Seed;
        task.admission = if is_own {
            Admission::Own
        } else {
            Admission::Held(now)
        };
        task.moved = now;
        task.in_vain = false;
        task.advice = Advice::NotAsked;
        if let OriginState::FailedAt(..) = task.reading {
            task.reading = OriginState::No;
        }
        for link in task.links.values_mut() {
            link.unavailable = false;
        }
        // The scheduler's answer for an earlier download of it is void; this download waits for its own answer.
        self.take(
            &digest,
            if self.scheduler && whole {
                Share::NONE
            } else {
                Share::ALL
            },
        );
        // A seed that owns the task reads the origin at once; everybody else asks the owner.
        let owner = rendezvous::owner(&digest, self.candidates());
        if owner == Some(self.config.me) || self.config.role == Role::Seed && as_owner {
            self.elect(&digest);
        } else if let Some(seed) = owner {
            self.approach_seed(now, digest, seed);
        }
        let connected: Vec<PeerId> = self.tasks[&digest].links.keys().copied().collect();
        for peer in connected {
            self.interest(now, digest, peer);
        }
    }

    /// Stops downloading. Held pieces stay on offer. Parents are told, so that a seed does not go on for nobody.
    fn pause(&mut self, digest: &Digest) {
        self.stop(digest);
        let Some(task) = self.tasks.get_mut(digest) else {
            return;
        };
        task.enter(Change::Paused);
        task.whole = false;
        if let Some(fetch) = &mut task.fetch {
            fetch.want_whole(false);
        }
        for (peer, link) in &mut task.links {
            if link.asked.take().is_some() && self.connected.contains_key(peer) {
                self.outputs
                    .push_back(Output::Send(*peer, Message::Leave { task: *digest }));
            }
        }
    }

    fn stop(&mut self, digest: &Digest) {
        let Some(task) = self.tasks.get_mut(digest) else {
            return;
        };
        if let OriginState::At(_) = task.reading {
            self.outputs.push_back(Output::StopOrigin(*digest));
        }
        task.reading = OriginState::No;
        let theirs: Vec<(PeerId, u32)> = self
            .asked
            .iter()
            .filter(|(_, (d, ..))| d == digest)
            .map(|(key, _)| *key)
            .collect();
        for (peer, request) in theirs {
            if let Some((_, piece, _)) = self.asked.remove(&(peer, request))
                && let Some(fetch) = &mut task.fetch
            {
                fetch.failed(piece, peer, request);
            }
            self.outputs.push_back(Output::Cancel { peer, request });
        }
    }

    /// A client's reader has come or moved, or (`None`) gone: the pieces it still needs.
    fn reader(
        &mut self,
        now: Time,
        digest: &Digest,
        id: u64,
        pieces: Option<Range<PieceIndex>>,
        partial: bool,
    ) {
        let Some(task) = self.tasks.get_mut(digest) else {
            return;
        };
        let (Some(fetch), Some(table)) = (&mut task.fetch, &task.table) else {
            return;
        };
        if !fetch.is_wanting() {
            // Its new wishes have not been waited for yet.
            task.moved = now;
        }
        // A reader that reads to the end sees the last piece only when the whole is known to match: without a seal
        // that takes the whole.
        if let (Some(pieces), Some(last)) = (&pieces, fetch.layout().last())
            && pieces.contains(&last)
            && !partial
            && !table.is_sealed()
        {
            self.want_whole(digest);
        }
        if let Some(fetch) = self
            .tasks
            .get_mut(digest)
            .and_then(|task| task.fetch.as_mut())
        {
            fetch.reader(now, id, pieces, partial);
        }
    }

    /// All of a task is wanted from now on, not only what readers read. The peers that were asked are told so.
    fn want_whole(&mut self, digest: &Digest) {
        let Some(task) = self.tasks.get_mut(digest).filter(|task| !task.whole) else {
            return;
        };
        task.whole = true;
        if let Some(fetch) = &mut task.fetch {
            fetch.want_whole(true);
        }
        self.ask_again(digest, |_, _| true);
    }

    /// Notes whether clients of this node wait for it. A download without a waiting client, here or at dependent
    /// children, is a prefetch and comes after everything else.
    fn read(&mut self, digest: &Digest, is_read: bool) {
        self.change(digest, |task| task.is_read = is_read);
    }

    /// Sets the common purpose of all clients here. Parents that were asked before are told.
    fn purpose(&mut self, digest: &Digest, purpose: Purpose) {
        let role = self.config.role;
        let Some(task) = self.tasks.get_mut(digest) else {
            return;
        };
        let before = task.purpose(role);
        task.purpose = purpose;
        if task.purpose(role) == before {
            return;
        }
        self.ask_again(digest, |_, _| true);
    }

    /// Repeats the interest to those asked parents that `meant` selects, since its terms have changed.
    fn ask_again(&mut self, digest: &Digest, meant: impl Fn(&PeerId, &task::Link) -> bool) {
        let Some(task) = self.tasks.get(digest).filter(|task| task.is_running()) else {
            return;
        };
        let asked = task
            .links
            .iter()
            .filter(|(peer, link)| link.asked.is_some() && meant(peer, link));
        for (peer, role) in asked.filter_map(|(peer, _)| Some((*peer, *self.connected.get(peer)?)))
        {
            let interest = task.interest(*digest, self.config.role, peer, role);
            self.outputs.push_back(Output::Send(peer, interest));
        }
    }

    /// For whom a child wants a task.
    pub fn childs_labels(&self, digest: &Digest, peer: PeerId) -> Labels {
        let link = self
            .tasks
            .get(digest)
            .and_then(|task| task.links.get(&peer));
        link.map(|link| link.purpose.labels.clone())
            .unwrap_or_default()
    }

    /// For whom a task is fetched, and how urgent that is.
    pub fn purpose_of(&self, digest: &Digest) -> Purpose {
        self.tasks
            .get(digest)
            .map(|task| task.purpose(self.config.role))
            .unwrap_or_default()
    }

    /// Whether a task goes on though nobody waits for it.
    pub fn is_prefetch(&self, digest: &Digest) -> bool {
        self.tasks
            .get(digest)
            .is_some_and(|t| t.is_prefetch(self.config.role))
    }

    /// Sets the pieces that a reader, announced just before, reads next.
    fn reads_ahead(&mut self, digest: &Digest, id: u64, pieces: PieceSet) {
        if let Some(fetch) = self.tasks.get_mut(digest).and_then(|t| t.fetch.as_mut()) {
            fetch.reads_ahead(id, pieces);
        }
    }

    /// The shell has learned the size (from the origin's headers or a manifest).
    fn sized(&mut self, now: Time, digest: Digest, size_bytes: u64) {
        let Some(task) = self.tasks.get_mut(&digest) else {
            return;
        };
        if task.fetch.is_none() {
            task.set_size(&digest, (self.config.layout)(size_bytes), None);
            if task.is_issuer(self.config.role) {
                task.issue(&self.notary);
            }
            self.outputs.push_back(Output::Sized(digest, size_bytes));
            self.prove(now, &digest);
        }
    }

    /// Takes the scheduler's answer. `share`: the pieces to take from parents in other zones.
    fn parents(
        &mut self,
        now: Time,
        digest: Digest,
        parents: &[Named],
        issuer: Option<PeerId>,
        elected: bool,
        share: Share,
    ) {
        let Some(task) = self.tasks.get_mut(&digest) else {
            return;
        };
        task.advice.give();
        task.issuer = issuer;
        // A node that reads ranges brings nothing into its zone, and its zone may never have all ranges.
        let share = if !task.whole || task.takes_all(now) {
            Share::ALL
        } else {
            share
        };
        if elected && !task.elected {
            self.elect(&digest);
        } else if self.config.role != Role::Seed {
            task.elected = elected;
        }
        self.prove(now, &digest);
        self.take(&digest, share);
        if self.tasks.get(&digest).is_some_and(Task::is_running) {
            let me = self.config.me;
            for named in parents.iter().copied().filter(|named| named.peer != me) {
                if let Some(link) = self
                    .tasks
                    .get_mut(&digest)
                    .and_then(|t| t.links.get_mut(&named.peer))
                {
                    link.unavailable = false;
                }
                self.approach(now, digest, named);
            }
        }
    }

    /// Sets the share of a task to take from other zones; the parents asked there are told.
    pub(super) fn take(&mut self, digest: &Digest, share: Share) {
        let Some(task) = self
            .tasks
            .get_mut(digest)
            .filter(|task| task.share != share)
        else {
            return;
        };
        task.share = share;
        if let Some(fetch) = &mut task.fetch {
            fetch.share(share);
        }
        self.ask_again(digest, |_, link| link.far);
    }

    /// The scheduler elects a reader for a task later: this node waits for that as for an answer.
    fn postponed(&mut self, now: Time, digest: &Digest) {
        if let Some(task) = self.tasks.get_mut(digest).filter(|task| task.is_running()) {
            task.advice = Advice::Asked(now);
        }
    }

    /// This node is to read the origin and issue the table.
    fn elect(&mut self, digest: &Digest) {
        self.change(digest, |task| task.elected = true);
        if let Some(task) = self
            .tasks
            .get_mut(digest)
            .filter(|task| task.fetch.is_some())
        {
            task.issue(&self.notary);
        }
    }

    /// All children of a task are told not to wait.
    fn turn_away(&mut self, digest: &Digest, reason: Refusal) {
        let children: Vec<PeerId> = self
            .tasks
            .get(digest)
            .map(|task| task.offers.children().collect())
            .unwrap_or_default();
        for peer in children {
            self.leaves(digest, peer);
            self.outputs.push_back(Output::Send(
                peer,
                Message::Unavailable {
                    task: *digest,
                    reason,
                },
            ));
        }
    }

    /// A peer that asked could not be helped: the shell has nothing and may get nothing.
    fn refuse(&mut self, peer: PeerId, task: Digest, reason: Refusal) {
        self.leaves(&task, peer);
        self.outputs
            .push_back(Output::Send(peer, Message::Unavailable { task, reason }));
    }

    /// A peer that asked, for whatever purpose, is now a child.
    fn adopt(&mut self, now: Time, digest: &Digest, child: &Child) {
        let Child {
            peer,
            far,
            passive,
            partial,
            ..
        } = *child;
        // It may have gone while the disk was looked at.
        let Some(role) = self.connected.get(&peer).copied() else {
            return;
        };
        let me = self.config.role;
        let Some(task) = self.tasks.get_mut(digest) else {
            return self.refuse(peer, *digest, Refusal::NotHeld);
        };
        let will_share = task.will_share();
        let reason = match (task.may_announce(self.config.role), will_share) {
            (false, _) => Some(Refusal::Unable),
            (true, false) => Some(Refusal::NotHeld),
            (true, true) => None,
        };
        if let Some(reason) = reason {
            self.refuse(peer, *digest, reason);
            return;
        }
        let was_passive = task.is_passive(me);
        task.offers.join(peer, !self.isolated.contains(&peer), far);
        task.offers.takes(peer, far);
        task.offers.reads_parts(peer, partial);
        if far.is_some() {
            task.is_far(peer, true);
        }
        let link = task.links.entry(peer).or_default();
        link.told = None;
        link.waits = (!passive).then_some(role);
        self.waits.enter(peer, digest);
        link.purpose.clone_from(&child.purpose);
        // A child that leaves is not taken out of it before all have left: a task does not live for long.
        task.childrens_purpose =
            Purpose::common(task.childrens_purpose.iter().chain([&child.purpose]));
        if task.is_passive(me) != was_passive {
            self.ask_again(digest, |_, _| true);
        }
        // It wants the task, so it will hold pieces of it: hear of them.
        self.interest(now, *digest, peer);
    }

    /// The shell has committed a blob.
    fn committed(&mut self, digest: &Digest) {
        if let Some(task) = self.tasks.get_mut(digest) {
            task.enter(Change::Committed);
        }
    }

    /// A piece was sent to the last byte: a child of a task without disk has it.
    fn delivered(&mut self, now: Time, peer: PeerId, request: u32) {
        let Some((task, piece)) = self.uploads.what(peer, request) else {
            return;
        };
        if let Some(task) = self
            .tasks
            .get_mut(&task)
            .filter(|task| task.memory.is_some())
        {
            task.offers.sent(now, peer, piece);
        }
    }

    // ---- for the shell and for people ---------------------------------------------------------------------------

    /// Whether a child waits for an upload slot.
    pub const fn has_waiting_uploads(&self) -> bool {
        self.uploads.is_waited_for()
    }

    /// Whether outputs wait to be polled.
    pub fn has_outputs(&self) -> bool {
        !self.outputs.is_empty()
    }

    /// Which piece was asked of a peer under this number, while that stands.
    pub fn asked_for(&self, peer: PeerId, request: u32) -> Option<PieceIndex> {
        self.asked.get(&(peer, request)).map(|(_, piece, _)| *piece)
    }

    /// The table of a task.
    pub fn table(&self, digest: &Digest) -> Option<&PieceTable> {
        self.tasks.get(digest).and_then(|t| t.table.as_ref())
    }

    /// The pieces held of a task.
    pub fn held(&self, digest: &Digest) -> Option<&PieceSet> {
        self.tasks
            .get(digest)
            .and_then(|t| t.fetch.as_ref())
            .map(Fetch::held)
    }

    /// Requests of a task that were doubled in the endgame so far.
    pub fn duplicates(&self, digest: &Digest) -> u64 {
        self.tasks
            .get(digest)
            .and_then(|t| t.fetch.as_ref())
            .map_or(0, Fetch::duplicates)
    }

    /// Whether a task is being downloaded.
    pub fn is_running(&self, digest: &Digest) -> bool {
        self.tasks.get(digest).is_some_and(Task::is_running)
    }

    /// Whether all of a task is held.
    pub fn is_complete(&self, digest: &Digest) -> bool {
        self.tasks.get(digest).is_some_and(Task::is_complete)
    }

    /// How far the download of a task is.
    pub fn phase(&self, digest: &Digest) -> Phase {
        self.tasks
            .get(digest)
            .map_or(Phase::Idle, |task| task.phase)
    }

    /// Whether a task's pieces may go to peers.
    pub fn is_shared(&self, digest: &Digest) -> bool {
        self.tasks
            .get(digest)
            .is_some_and(|t| t.may_announce(self.config.role) && t.may_share())
    }
}
