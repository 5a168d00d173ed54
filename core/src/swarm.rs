//! The scheduler's view of all peers: the holders of each task, the parents to name, the reader of the origin, the
//! isolated peers.
//!
//! Soft state only: peers say everything again when the scheduler comes back. Drive a [`Swarm`] with
//! [`Swarm::handle`] and, when [`Swarm::deadline`] has come, [`Swarm::tick`]; then carry out what [`Swarm::poll`] gives.
//!
//! - **Parents.** Every peer that wants a task is a future holder of it, so wanters are named to each other. Up to
//!   [`MAX_PARENTS`] of them (with zones, three quarters of that) are all named to all; beyond that they form a random
//!   mesh of [`MESH_DEGREE`] links a peer. Links run both ways: a peer that is named to a newcomer is told of the
//!   newcomer. Complete holders come on top, a few each.
//! - **Zones.** Parents are of the child's own zone. A few of each zone bring the task in: see the `gateways` module.
//! - **Sources.** A peer that can read the origin is named first: the seed that rendezvous hashing picks, or a seed
//!   that has the task already. Without any seed one peer is elected and its table counts. Only so many children get a
//!   source directly.
//! - **Spreading.** A task that [`HOT_WANTERS`] peers want is spread over more schedulers: peers are told the number,
//!   and each asks one of them. Holders announce to all schedulers; the first one alone elects the issuer, and peers
//!   that move name it to the others. The same message brings it back after a restart.
//! - **Evidence** decides on isolation: see the `reputation` module.
//!
//! Every decision looks at [`SAMPLE`] copies at most, however many there are.

mod choose;
mod election;
mod gateways;
mod parents;
mod reputation;
mod slab;
mod task;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use rand::Rng;

use crate::Time;
use crate::application::{Applications, Labels, Priority, Purpose};
use crate::message::Role;
use crate::piece::PeerId;
use crate::place::{Nearness, Place};
use crate::share::Share;
use hawker_oci::digest::Digest;

pub use reputation::{
    EVIDENCE_WINDOW, ISOLATION, IsolationReason, LONE_ACCUSATIONS, REPORTERS_TO_ISOLATE,
    REPORTERS_TO_ISOLATE_SEED, STALL_ISOLATION, STALL_WINDOW, SUSPICION_HALF_LIFE,
    VERDICTS_PER_REPORTER,
};
use reputation::{Reputation, Standing};
use slab::{Slab, Slot};
use task::Task;

/// Parents of one child of one task at most.
pub const MAX_PARENTS: usize = 32;
/// Parents that a child gets in a swarm too big for everybody to know everybody; as many again get it. Rarest-first works on
/// random graphs of twice this degree as well as on complete ones, and a peer's messages about availability stay few.
pub const MESH_DEGREE: usize = 12;
/// Complete holders among a child's parents at most: they don't take anything back, so few must do for many.
pub const MAX_COMPLETE: usize = 8;
/// Seeds among a child's parents at most: the one that reads the origin, and one more that has the task.
pub const MAX_SEEDS: usize = 2;
/// Children of one task that get a source (a seed or the elected peer) directly. The others get the pieces from these: a
/// source sends each piece about once whatever their number, and says what it has to each of them.
pub const SOURCE_CHILDREN: u32 = 64;
/// Copies looked at for one decision.
pub const SAMPLE: usize = 128;
/// How long a peer whose stream broke still counts: a reconnect takes less, and the dead are found out by their children.
pub const GRACE: Duration = Duration::from_secs(3);
/// Without new pieces for this long an elected peer is replaced. Pieces are announced once a second.
pub const ELECTION_STALL: Duration = Duration::from_secs(10);
/// How often those are looked at whose application has as many elected peers as it may. They hear of it each time, and wait: a
/// node that heard nothing, or has waited for as long as a client can, reads the origin by itself.
pub const POSTPONED_FOR: Duration = Duration::from_secs(1);
/// How long a task waits for its application's turn at most. A client that heard nothing for ten seconds has its node read the
/// origin: one who is elected before that reads it once, and not each of them.
pub const POSTPONED_AT_MOST: Duration = Duration::from_secs(5);
/// A swarm that has just come up elects nobody: peers that have the task, or are reading it, are still coming back.
pub const WARM_UP: Duration = Duration::from_secs(2);
/// How long the issuer whom peers name is waited for after a start. It comes back as they do; meanwhile its word counts on.
pub const ISSUER_RETURNS: Duration = Duration::from_secs(20);
/// Peers that want a task at one scheduler, from when on it is spread over one scheduler more: the messages of that many are
/// a few hundred a second.
pub const HOT_WANTERS: u32 = 1000;
/// Schedulers over which a task is spread at most.
pub const MAX_SPREAD: u32 = 8;
/// The time between two steps of spreading. The peers told in the last step have moved by then.
const SPREAD_EVERY: Duration = Duration::from_secs(2);
/// How long news about a peer's parents wait for more of them. It doubles with each message: in a burst the first matter.
const PUSH_DELAY: Duration = Duration::from_millis(20);
/// As far as it doubles: 32 times, two thirds of a second.
const PUSH_DOUBLINGS: u32 = 5;
/// A task that nobody wanted or announced for this long is forgotten; a later pull finds the seed.
pub const IDLE_TTL: Duration = Duration::from_secs(7 * 24 * 3600);
/// How precisely idleness is known.
const IDLE_GRAIN: Duration = Duration::from_secs(60);
/// Tasks kept at most; beyond that the longest idle one goes.
pub const MAX_TASKS: usize = 4_000_000;
/// Tasks in which one peer has a part, at most; beyond that nothing new of it is noted.
pub const MAX_TASKS_PER_PEER: usize = 1_000_000;
/// Tasks that one peer wants at a time, at most.
pub const MAX_WANTS_PER_PEER: u32 = 4096;
/// Reports taken from one peer a second, and at once.
const REPORTS_PER_SECOND: f32 = 32.0;
const REPORTS_BURST: f32 = 256.0;
/// Former parents of a peer that are remembered, since reports come a second later. The number is that of an image of
/// twenty layers with a dozen parents each.
const NAMED_KEPT: usize = 256;
/// A peer with limited upload counts as one slot for each of these many bytes a second.
const SLOT_RATE_BYTES: f32 = 4_194_304.0;

/// The registration of a peer at the start of its stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Registration {
    /// The peer, by its certificate.
    pub peer: PeerId,
    /// [`Role::Peer`] or [`Role::Seed`], by its certificate.
    pub role: Role,
    /// Its place.
    pub place: Place,
    /// Pieces that it sends at once.
    pub upload_slots: u32,
    /// Bytes a second, 0 when not limited.
    pub upload_rate_bytes: u64,
    /// It may be elected to read the origin.
    pub reads_origins: bool,
}

/// The pieces that a peer offers of one task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Holding {
    /// The task.
    pub task: Digest,
    /// Its size.
    pub size_bytes: u64,
    /// How many pieces; 0: none any more.
    pub pieces: u32,
    /// Committed.
    pub complete: bool,
}

/// The outcome with a parent.
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

/// The terms of a peer's question.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Terms {
    /// The issuer that it was told: by this scheduler before it started anew, or by another one.
    pub issuer: Option<PeerId>,
    /// The task is spread over several schedulers, and this one is not the first of them: it elects nobody.
    pub guest: bool,
    /// It fetches ranges only: it brings the task to nobody.
    pub partial: bool,
    /// For whom it fetches, and how urgent that is.
    pub purpose: Purpose,
}

/// An input of the scheduler.
#[derive(Clone, Debug)]
pub enum Input {
    /// A peer's stream has started.
    Joined(Registration),
    /// A seed that was there before this scheduler started: it counts for so long, as if its stream had just broken.
    Expected(Registration, Duration),
    /// A peer's stream is over.
    Left(PeerId),
    /// A peer tells the tasks that it holds.
    Holdings {
        /// The holder.
        peer: PeerId,
        /// Forget what it said before.
        replaces_all: bool,
        /// The tasks.
        holdings: Vec<Holding>,
    },
    /// A peer asks for parents.
    Want {
        /// The wanter.
        peer: PeerId,
        /// The task.
        task: Digest,
        /// Its size, when known.
        size_bytes: Option<u64>,
        /// The parents named before did not suffice.
        again: bool,
        /// The seeds may not read it at its origin; this peer may.
        reads: bool,
        /// Its terms.
        terms: Terms,
    },
    /// A peer no longer fetches.
    Forget {
        /// The former wanter.
        peer: PeerId,
        /// The task.
        task: Digest,
    },
    /// A peer tells what became of a parent.
    Report {
        /// The reporter.
        reporter: PeerId,
        /// Of whom.
        peer: PeerId,
        /// The task that they met in.
        task: Digest,
        /// The outcome.
        kind: ReportKind,
        /// Another scheduler knows that the two met, and passes this on.
        is_vouched_for: bool,
    },
    /// A member was removed from the cluster: it is gone at once.
    Removed(PeerId),
    /// Two sealed statements of an issuer contradict each other; both signatures have been checked.
    Contradicted(PeerId),
}

/// A message to send.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// The parents of a task for one peer.
    Parents {
        /// To whom this goes.
        to: PeerId,
        /// The task.
        task: Digest,
        /// The parents, sources first, then best first. The whole list.
        parents: Vec<PeerId>,
        /// The elected peer, whose table counts although it is no seed's.
        issuer: Option<PeerId>,
        /// `to` is elected: read it from the origin (what it lacks of it) and issue the table.
        fetch_from_origin: bool,
        /// Over how many schedulers the task is spread, the first ones in rendezvous order; 0: nothing new. To a guest 1
        /// says: ask the first one again, there is nobody here who brings the task.
        spread: u32,
        /// The share to take from parents in other zones.
        share: Share,
        /// Nobody is elected yet, for the application's sake: this comes again in a second.
        later: bool,
    },
    /// An accusation between two peers that met by this scheduler's word: the other schedulers are to know.
    Vouched {
        /// The reporter.
        reporter: PeerId,
        /// Of whom.
        peer: PeerId,
        /// The task that they met in.
        task: Digest,
        /// The outcome.
        kind: ReportKind,
    },
    /// Everybody who is isolated, for all: it has changed.
    Isolated(Vec<PeerId>),
}

/// The state of a peer, for people.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PeerState {
    /// Why it is named to nobody, and for how long from now on.
    pub isolation: Option<(IsolationReason, Duration)>,
    /// Tasks in which it has a part.
    pub tasks: usize,
    /// Bytes that others said it served.
    pub served_bytes: u64,
    /// 0 to 1: how much is held against it.
    pub suspicion: f32,
}

#[derive(Debug)]
struct Peer {
    about: Registration,
    /// Its stream is over; it is forgotten then.
    gone_at: Option<Time>,
    joined_at: Time,
    tasks: BTreeSet<Slot>,
    /// How many children it was given, over all tasks.
    children: u32,
    wants: u32,
    served_bytes: u64,
    /// Reports it may still make, as of `allowance_at`.
    allowance: f32,
    allowance_at: Time,
    /// The last [`NAMED_KEPT`] parents that it was named, each with its task, as hashes.
    named: VecDeque<u32>,
}

impl Peer {
    fn new(about: Registration, now: Time) -> Self {
        Self {
            about,
            gone_at: None,
            joined_at: now,
            tasks: BTreeSet::new(),
            children: 0,
            wants: 0,
            served_bytes: 0,
            allowance: REPORTS_BURST,
            allowance_at: now,
            named: VecDeque::new(),
        }
    }

    /// Notes that it was named this parent for a task.
    fn name(&mut self, parent: PeerId, task: &Digest) {
        if self.named.len() >= NAMED_KEPT {
            self.named.pop_front();
        }
        self.named.push_back(meeting(parent, task));
    }

    fn was_named(&self, parent: PeerId, task: &Digest) -> bool {
        self.named.contains(&meeting(parent, task))
    }

    /// Children over how many it can serve at a time.
    fn load(&self) -> f32 {
        let slots = self.about.upload_slots.max(1) as f32;
        let rate = match self.about.upload_rate_bytes {
            0 => slots,
            rate => rate as f32 / SLOT_RATE_BYTES,
        };
        self.children as f32 / slots.min(rate).max(0.25)
    }

    fn may_report(&mut self, now: Time) -> bool {
        let earned = now.since(self.allowance_at).as_secs_f32() * REPORTS_PER_SECOND;
        self.allowance = (self.allowance + earned).min(REPORTS_BURST);
        self.allowance_at = now;
        let may = self.allowance >= 1.0;
        self.allowance -= f32::from(u8::from(may));
        may
    }
}

/// A peer and a task in four bytes. Two that are confused make one accusation count that should not, once in four billion.
fn meeting(peer: PeerId, task: &Digest) -> u32 {
    let bytes = peer.0.iter().chain(task.as_bytes());
    // FNV-1a. Ids and digests are hashes already.
    bytes.fold(0x811c_9dc5, |hash, byte| {
        (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193)
    })
}

/// Something to check when its time has come. Its reason may be gone by then: the handler checks that.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Timer {
    /// Check the wanters that wait for their application's turn.
    Postponed,
    /// A peer's grace is over.
    Gone(Slot),
    /// A peer that came back has had the time to say again what it wants.
    Stale(Slot),
    /// Tell a peer (second) of its parents of a task (first).
    Push(Slot, Slot),
    /// Give a peer (second) the shares of a task (first) that nobody else takes into their zone.
    Settle(Slot, Slot),
    /// Look whether a task's elected peer makes progress.
    Stall(Slot),
    /// Elections may begin.
    WarmUp,
    /// The issuer of a task was waited for long enough.
    Elect(Slot),
}

/// The scheduler's view of all peers.
#[derive(Debug)]
pub struct Swarm {
    elects_from: Time,
    peers: Slab<Peer>,
    by_id: BTreeMap<PeerId, Slot>,
    seeds: BTreeMap<PeerId, Slot>,
    /// How many peers stand in each zone.
    zones: BTreeMap<Arc<str>, u32>,
    tasks: Slab<Task>,
    by_digest: BTreeMap<Digest, Slot>,
    /// Tasks that somebody wants.
    wanted: BTreeSet<Slot>,
    /// All tasks, longest idle first.
    idle: BTreeSet<(Time, Slot)>,
    applications: Arc<Applications>,
    /// Tasks whose application has as many elected peers as it may: the most urgent first, then the oldest.
    postponed: BTreeSet<(Priority, Time, Slot)>,
    /// A timer for them runs.
    looks_at_postponed: bool,
    /// How many were postponed so far, by the rule's labels.
    postponements: BTreeMap<Labels, u64>,
    reputation: Reputation,
    isolations: BTreeMap<IsolationReason, u64>,
    timers: BTreeSet<(Time, Timer)>,
    outputs: VecDeque<Output>,
}

impl Swarm {
    /// A scheduler that has just come up.
    pub fn new(now: Time) -> Self {
        let elects_from = now + WARM_UP;
        Self {
            elects_from,
            peers: Slab::new(),
            by_id: BTreeMap::new(),
            seeds: BTreeMap::new(),
            zones: BTreeMap::new(),
            tasks: Slab::new(),
            by_digest: BTreeMap::new(),
            wanted: BTreeSet::new(),
            idle: BTreeSet::new(),
            applications: Arc::default(),
            postponed: BTreeSet::new(),
            looks_at_postponed: false,
            postponements: BTreeMap::new(),
            reputation: Reputation::default(),
            isolations: BTreeMap::new(),
            timers: BTreeSet::from([(elects_from, Timer::WarmUp)]),
            outputs: VecDeque::new(),
        }
    }

    /// Sets the limits of each application from now on.
    pub fn applications(&mut self, applications: Arc<Applications>) {
        self.postponements.retain(|labels, _| {
            applications
                .rules()
                .iter()
                .any(|rule| rule.labels == *labels)
        });
        self.applications = applications;
    }

    /// Of each rule that limits how many are elected at once: how many are, and how many had to wait so far.
    pub fn application_elections(&self) -> Vec<(Labels, usize, u64)> {
        let limited = self
            .applications
            .rules()
            .iter()
            .filter(|rule| rule.limits.origins.is_some());
        let figures = limited.map(|rule| {
            let postponed = self.postponements.get(&rule.labels).copied().unwrap_or(0);
            (
                rule.labels.clone(),
                self.elections(&rule.labels).count(),
                postponed,
            )
        });
        figures.collect()
    }

    /// Takes in what happened.
    pub fn handle<R: Rng + ?Sized>(&mut self, now: Time, rng: &mut R, input: Input) {
        self.tick(now, rng);
        match input {
            Input::Joined(about) => self.joined(now, rng, about),
            Input::Expected(about, wait) => self.expected(now, about, wait),
            Input::Left(peer) => self.left(now, peer),
            Input::Holdings {
                peer,
                replaces_all,
                holdings,
            } => {
                self.holdings(now, rng, peer, replaces_all, &holdings);
            }
            Input::Want {
                peer,
                task,
                size_bytes,
                again,
                reads,
                terms,
            } => self.want(now, rng, peer, task, size_bytes, again, reads, terms),
            Input::Forget { peer, task } => self.forget(now, rng, peer, &task),
            Input::Report {
                reporter,
                peer,
                task,
                kind,
                is_vouched_for,
            } => {
                self.report(now, rng, reporter, peer, &task, kind, is_vouched_for);
            }
            Input::Removed(peer) => {
                if let Some(slot) = self.by_id.get(&peer) {
                    self.expire_peer(*slot, now);
                }
            }
            Input::Contradicted(issuer) => self.contradicted(now, rng, issuer),
        }
        self.tick(now, rng);
    }

    /// Does what has come due.
    pub fn tick<R: Rng + ?Sized>(&mut self, now: Time, rng: &mut R) {
        while let Some((due, timer)) = self.timers.first().copied().filter(|(due, _)| *due <= now) {
            self.timers.pop_first();
            match timer {
                Timer::Postponed => self.look_at_postponed(now, rng),
                Timer::Gone(peer) => self.gone(now, rng, due, peer),
                Timer::Stale(peer) => self.drop_stale_wants(now, rng, peer),
                Timer::Push(task, peer) => self.push(now, rng, due, task, peer),
                Timer::Settle(task, peer) => self.tell_at(now, task, peer),
                Timer::Stall(task) => self.check_election(now, rng, task),
                Timer::WarmUp => self.ensure_sources(now, rng),
                Timer::Elect(task) => self.ensure_source(now, rng, task),
            }
        }
        if self.reputation.sweep(now) {
            self.outputs
                .push_back(Output::Isolated(self.reputation.isolated(now)));
            self.ensure_sources(now, rng);
        }
        while let Some((touched, task)) = self
            .idle
            .first()
            .copied()
            .filter(|(at, _)| now.since(*at) >= IDLE_TTL)
        {
            match self.tasks.get(task).is_some_and(|task| task.wanting > 0) {
                true => self.touch(now, task),
                false => self.remove_task(task),
            }
            self.idle.remove(&(touched, task));
        }
    }

    /// When [`Swarm::tick`] is to be called next.
    pub fn deadline(&self) -> Option<Time> {
        let timer = self.timers.first().map(|(due, _)| *due);
        let idle = self.idle.first().map(|(touched, _)| *touched + IDLE_TTL);
        [timer, idle, self.reputation.deadline()]
            .into_iter()
            .flatten()
            .min()
    }

    /// The next thing to tell.
    pub fn poll(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// How many peers there are, those in grace included.
    pub fn peer_count(&self) -> usize {
        self.peers.len()
    }

    /// How many tasks are known.
    pub fn task_count(&self) -> usize {
        self.tasks.len()
    }

    /// Everybody who is isolated, ascending.
    pub fn isolated(&self, now: Time) -> Vec<PeerId> {
        self.reputation.isolated(now)
    }

    /// How many were isolated so far for this.
    pub fn isolations(&self, reason: IsolationReason) -> u64 {
        self.isolations.get(&reason).copied().unwrap_or(0)
    }

    /// The state of a peer; the default for an unknown one.
    pub fn peer_state(&self, now: Time, peer: PeerId) -> PeerState {
        let here = self.by_id.get(&peer).and_then(|slot| self.peers.get(*slot));
        PeerState {
            isolation: self.reputation.isolation(now, peer),
            tasks: here.map_or(0, |peer| peer.tasks.len()),
            served_bytes: here.map_or(0, |peer| peer.served_bytes),
            suspicion: self.reputation.suspicion(now, peer),
        }
    }

    // Peers come and go.

    fn joined<R: Rng + ?Sized>(&mut self, now: Time, rng: &mut R, about: Registration) {
        if about.role == Role::Scheduler {
            return;
        }
        let known = self.by_id.get(&about.peer).copied();
        let slot = known.unwrap_or_else(|| self.insert_peer(now, &about));
        if known.is_some() {
            self.timers.insert((now + GRACE, Timer::Stale(slot)));
        }
        let is_seed = about.role == Role::Seed;
        let was_seed = match is_seed {
            true => self.seeds.insert(about.peer, slot).is_some(),
            false => self.seeds.remove(&about.peer).is_some(),
        };
        self.move_zone(slot, &about.place.zone);
        if let Some(peer) = self.peers.get_mut(slot) {
            (peer.about, peer.gone_at, peer.joined_at) = (about, None, now);
        }
        if is_seed && !was_seed {
            self.offer_seed(now);
        } else if known.is_some() {
            // It may be the only one who can be elected for what it wanted while it was away.
            self.ensure_sources(now, rng);
        }
    }

    fn expected(&mut self, now: Time, about: Registration, wait: Duration) {
        if about.role == Role::Seed && !self.by_id.contains_key(&about.peer) {
            let slot = self.insert_peer(now, &about);
            self.seeds.insert(about.peer, slot);
            self.expire_peer(slot, now + wait);
        }
    }

    fn insert_peer(&mut self, now: Time, about: &Registration) -> Slot {
        let slot = self.peers.insert(Peer::new(about.clone(), now));
        self.by_id.insert(about.peer, slot);
        *self.zones.entry(Arc::clone(&about.place.zone)).or_default() += 1;
        slot
    }

    /// A peer that came back may stand elsewhere.
    fn move_zone(&mut self, slot: Slot, zone: &Arc<str>) {
        self.leave_zone(slot);
        *self.zones.entry(Arc::clone(zone)).or_default() += 1;
    }

    fn leave_zone(&mut self, slot: Slot) {
        let Some(zone) = self.peers.get(slot).map(|peer| &peer.about.place.zone) else {
            return;
        };
        if let Some(peers) = self.zones.get_mut(zone) {
            *peers -= 1;
            if *peers == 0 {
                self.zones.remove(zone);
            }
        }
    }

    fn left(&mut self, now: Time, peer: PeerId) {
        if let Some(slot) = self.by_id.get(&peer) {
            self.expire_peer(*slot, now + GRACE);
        }
    }

    fn expire_peer(&mut self, slot: Slot, at: Time) {
        if let Some(peer) = self.peers.get_mut(slot) {
            peer.gone_at = Some(at);
            self.timers.insert((at, Timer::Gone(slot)));
        }
    }

    fn gone<R: Rng + ?Sized>(&mut self, now: Time, rng: &mut R, due: Time, slot: Slot) {
        let Some(peer) = self
            .peers
            .get_mut(slot)
            .filter(|peer| peer.gone_at == Some(due))
        else {
            return;
        };
        let (id, tasks) = (peer.about.peer, std::mem::take(&mut peer.tasks));
        let was_seed = self.seeds.remove(&id).is_some();
        for task in tasks {
            self.remove_copy(now, rng, task, slot);
        }
        self.by_id.remove(&id);
        self.leave_zone(slot);
        self.peers.remove(slot);
        if was_seed {
            self.ensure_sources(now, rng);
        }
    }

    /// A seed has come: every wanter without a source gets it with the next news.
    fn offer_seed(&mut self, now: Time) {
        for task in self.wanted.iter().copied().collect::<Vec<_>>() {
            if self
                .tasks
                .get(task)
                .is_some_and(|task| task.election.is_none())
            {
                self.tell_all(now, task, PUSH_DELAY);
            }
        }
    }

    /// A peer that came back has said again what it wants; the rest is over.
    fn drop_stale_wants<R: Rng + ?Sized>(&mut self, now: Time, rng: &mut R, slot: Slot) {
        let Some(peer) = self.peers.get(slot) else {
            return;
        };
        let joined_at = peer.joined_at;
        let is_stale = |task: &Slot| {
            let want = self
                .tasks
                .get(*task)
                .and_then(|task| task.copy(slot))
                .and_then(|copy| copy.want.as_deref());
            want.is_some_and(|want| want.said_at < joined_at)
        };
        for task in peer
            .tasks
            .iter()
            .copied()
            .filter(is_stale)
            .collect::<Vec<_>>()
        {
            self.end_want(now, rng, task, slot);
        }
    }

    // Holdings and wants.

    fn holdings<R: Rng + ?Sized>(
        &mut self,
        now: Time,
        rng: &mut R,
        peer: PeerId,
        replaces_all: bool,
        holdings: &[Holding],
    ) {
        let Some(slot) = self.by_id.get(&peer).copied() else {
            return;
        };
        if replaces_all {
            self.withdraw_others(now, rng, slot, holdings);
        }
        for holding in holdings {
            self.holding(now, rng, slot, holding);
        }
    }

    /// Nothing is held any more but what `holdings` says.
    fn withdraw_others<R: Rng + ?Sized>(
        &mut self,
        now: Time,
        rng: &mut R,
        slot: Slot,
        holdings: &[Holding],
    ) {
        let named: BTreeSet<Slot> = holdings
            .iter()
            .filter_map(|holding| self.by_digest.get(&holding.task).copied())
            .collect();
        let Some(peer) = self.peers.get(slot) else {
            return;
        };
        for task in peer.tasks.difference(&named).copied().collect::<Vec<_>>() {
            self.withdraw(now, rng, task, slot);
        }
    }

    fn holding<R: Rng + ?Sized>(&mut self, now: Time, rng: &mut R, slot: Slot, holding: &Holding) {
        if holding.pieces == 0 && !holding.complete {
            if let Some(task) = self.by_digest.get(&holding.task).copied() {
                self.withdraw(now, rng, task, slot);
            }
            return;
        }
        let Some(task_slot) = self.take_part(now, slot, &holding.task) else {
            return;
        };
        let Some(task) = self.tasks.get_mut(task_slot) else {
            return;
        };
        task.size_bytes = Some(holding.size_bytes);
        let copy = task.copy_or_empty(slot);
        let is_new = copy.pieces == 0 && copy.want.is_none();
        let (grew, completed) = (
            holding.pieces > copy.pieces,
            holding.complete && !copy.complete,
        );
        (copy.pieces, copy.complete) = (holding.pieces, holding.complete);
        if let Some(election) = task
            .election
            .as_mut()
            .filter(|election| election.peer == slot && grew)
        {
            election.progress_at = now;
        }
        // Its zone suffices after all.
        let recovers = grew
            && task
                .want_mut(slot)
                .is_some_and(|want| std::mem::take(&mut want.again));
        if recovers && self.has_zones() {
            self.tell_soon(now, task_slot, slot);
        }
        if holding.complete {
            self.end_want(now, rng, task_slot, slot);
        }
        if is_new || completed {
            self.introduce(now, rng, task_slot, slot);
        }
        if completed {
            // A holder of the whole can sign for it, even if no waiting peer may read the origin.
            self.ensure_source(now, rng, task_slot);
        }
    }

    #[expect(
        clippy::too_many_arguments,
        reason = "they are what the peer said, one by one"
    )]
    fn want<R: Rng + ?Sized>(
        &mut self,
        now: Time,
        rng: &mut R,
        peer: PeerId,
        task: Digest,
        size_bytes: Option<u64>,
        again: bool,
        reads: bool,
        terms: Terms,
    ) {
        let Some(slot) = self.by_id.get(&peer).copied() else {
            return;
        };
        let Some(task_slot) = self.begin_want(now, rng, slot, &task) else {
            return;
        };
        let Some(task) = self.tasks.get_mut(task_slot) else {
            return;
        };
        task.size_bytes = size_bytes.or(task.size_bytes);
        let mut tried = Vec::new();
        task.change_want(slot, |want| {
            want.said_at = now;
            want.reads |= reads;
            want.issuer = terms.issuer;
            want.guest = terms.guest;
            want.again |= again;
            want.partial = terms.partial;
            want.purpose = Some(terms.purpose)
                .filter(|p| *p != Purpose::default())
                .map(Box::new);
            if again {
                tried = std::mem::take(&mut want.parents);
            }
        });
        task.spread_when_hot(now);
        for parent in &tried {
            self.release(task_slot, *parent);
        }
        self.ensure_source(now, rng, task_slot);
        self.find_parents(now, rng, task_slot, slot, &tried, again);
        self.tell(now, task_slot, slot);
    }

    /// Notes that a peer fetches a task; `None` when it wants too many.
    fn begin_want<R: Rng + ?Sized>(
        &mut self,
        now: Time,
        rng: &mut R,
        slot: Slot,
        task: &Digest,
    ) -> Option<Slot> {
        let task_slot = self.take_part(now, slot, task)?;
        let peer = self.peers.get_mut(slot)?;
        let task = self.tasks.get_mut(task_slot)?;
        let copy = task.copy_or_empty(slot);
        copy.complete = false;
        if copy.want.is_some() {
            return Some(task_slot);
        }
        if peer.wants >= MAX_WANTS_PER_PEER {
            if copy.pieces == 0 && copy.children == 0 {
                self.remove_copy(now, rng, task_slot, slot);
            }
            return None;
        }
        task.change_want(slot, |_| ());
        peer.wants += 1;
        if task.wanting == 1 {
            self.wanted.insert(task_slot);
            self.watch_election(now, task_slot);
        }
        Some(task_slot)
    }

    fn forget<R: Rng + ?Sized>(&mut self, now: Time, rng: &mut R, peer: PeerId, task: &Digest) {
        if let (Some(slot), Some(task)) = (self.by_id.get(&peer), self.by_digest.get(task)) {
            self.end_want(now, rng, *task, *slot);
        }
    }

    /// A peer no longer fetches: because it is done, or because it gave up.
    fn end_want<R: Rng + ?Sized>(&mut self, now: Time, rng: &mut R, task_slot: Slot, slot: Slot) {
        let Some(task) = self.tasks.get_mut(task_slot) else {
            return;
        };
        let was_private = task.is_private();
        let Some(want) = task.take_want(slot) else {
            return;
        };
        let Some(copy) = task.copy(slot) else { return };
        let (complete, empty) = (copy.complete, copy.is_empty());
        if task.wanting == 0 {
            self.wanted.remove(&task_slot);
        }
        if let Some(peer) = self.peers.get_mut(slot) {
            peer.wants = peer.wants.saturating_sub(1);
        }
        for parent in want.parents {
            self.release(task_slot, parent);
        }
        if !complete {
            self.close_gate(now, task_slot, slot);
        }
        if empty {
            self.remove_copy(now, rng, task_slot, slot);
        } else if !complete {
            self.dismiss(now, rng, task_slot, slot);
        }
        if was_private {
            // Nobody need be waited for any more who alone may read it: others may.
            self.ensure_source(now, rng, task_slot);
        }
    }

    /// A peer holds nothing of a task any more; it may still want it.
    fn withdraw<R: Rng + ?Sized>(&mut self, now: Time, rng: &mut R, task_slot: Slot, slot: Slot) {
        let Some(copy) = self
            .tasks
            .get_mut(task_slot)
            .and_then(|task| task.copy_mut(slot))
        else {
            return;
        };
        (copy.pieces, copy.complete) = (0, false);
        if copy.want.is_none() {
            self.remove_copy(now, rng, task_slot, slot);
        }
    }

    /// The task, with a copy (if only an empty one) of this peer in it. `None` when the peer has a part in too many.
    fn take_part(&mut self, now: Time, slot: Slot, digest: &Digest) -> Option<Slot> {
        let known = self.by_digest.get(digest).copied();
        let peer = self.peers.get(slot)?;
        if peer.tasks.len() >= MAX_TASKS_PER_PEER
            && known.is_none_or(|task| !peer.tasks.contains(&task))
        {
            return None;
        }
        let task = known.unwrap_or_else(|| self.insert_task(now, digest));
        self.touch(now, task);
        self.peers.get_mut(slot)?.tasks.insert(task);
        self.tasks.get_mut(task)?.copy_or_empty(slot);
        Some(task)
    }

    fn remove_copy<R: Rng + ?Sized>(
        &mut self,
        now: Time,
        rng: &mut R,
        task_slot: Slot,
        slot: Slot,
    ) {
        let Some(task) = self.tasks.get_mut(task_slot) else {
            return;
        };
        let was_private = task.is_private();
        let Some(copy) = task.take_copy(slot) else {
            return;
        };
        if task.wanting == 0 {
            self.wanted.remove(&task_slot);
        }
        if let Some(peer) = self.peers.get_mut(slot) {
            peer.tasks.remove(&task_slot);
            peer.children = peer.children.saturating_sub(copy.children);
            peer.wants = peer.wants.saturating_sub(u32::from(copy.want.is_some()));
        }
        for parent in copy.want.into_iter().flat_map(|want| want.parents) {
            self.release(task_slot, parent);
        }
        self.unlink(now, task_slot, slot, copy.children);
        self.dismiss(now, rng, task_slot, slot);
        if self
            .tasks
            .get(task_slot)
            .is_some_and(|task| task.copies.is_empty())
        {
            self.remove_task(task_slot);
        } else if was_private {
            // As where it ends its want.
            self.ensure_source(now, rng, task_slot);
        }
    }

    // Tasks.

    fn insert_task(&mut self, now: Time, digest: &Digest) -> Slot {
        if self.tasks.len() >= MAX_TASKS
            && let Some((_, idlest)) = self.idle.first().copied()
        {
            self.remove_task(idlest);
        }
        let slot = self.tasks.insert(Task::new(*digest, now));
        self.by_digest.insert(*digest, slot);
        self.idle.insert((now, slot));
        slot
    }

    fn remove_task(&mut self, slot: Slot) {
        let Some(task) = self.tasks.remove(slot) else {
            return;
        };
        self.by_digest.remove(&task.digest);
        self.idle.remove(&(task.touched, slot));
        self.wanted.remove(&slot);
        for copy in task.copies {
            if let Some(peer) = self.peers.get_mut(copy.peer) {
                peer.tasks.remove(&slot);
                peer.children = peer.children.saturating_sub(copy.children);
                peer.wants = peer.wants.saturating_sub(u32::from(copy.want.is_some()));
            }
        }
    }

    fn touch(&mut self, now: Time, slot: Slot) {
        let Some(task) = self
            .tasks
            .get_mut(slot)
            .filter(|task| now.since(task.touched) >= IDLE_GRAIN)
        else {
            return;
        };
        self.idle.remove(&(task.touched, slot));
        task.touched = now;
        self.idle.insert((now, slot));
    }
}
