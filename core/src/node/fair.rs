//! The share of this node that one member may use for its downloads.
//!
//! A seed downloads for others. Each such download is charged to one member that waits for it: the one with the fewest
//! downloads. A member has a bounded number of downloads, and a bounded part of the memory for their pieces. A
//! download that is not admitted soon is refused as busy, so that the child goes elsewhere at once. Clients of this
//! node itself are not counted here.

use std::collections::BTreeSet;
use std::time::Duration;

use super::task::Task;
use super::{Node, Output, TableSigner};
use crate::Time;
use crate::admission::Allowance;
use crate::message::{Refusal, Role};
use crate::peers::PeerMap;
use crate::piece::PeerId;
use hawker_oci::digest::Digest;

/// Tasks that one member may wait for while they are not complete here. Runtimes pull three to six layers of an image at once.
const TASKS: usize = 64;

/// Downloads at once for one member.
const DOWNLOADS: usize = 16;

/// A seed asks for all of its own children.
const SEED_FACTOR: usize = 8;

/// Downloads at once for all members: each takes sockets and files.
const DOWNLOADS_IN_ALL: usize = 256;

/// The part of the room in flight that the pieces of one member's downloads may take. A download whose pieces are longer than that part
/// is not counted in it: a member may have one of these beside its other downloads.
const MEMORY_PART: u64 = 3;

/// The charge for a download of unknown size.
const SMALL_PIECE_BYTES: u64 = 256 << 10;

/// A download that was not admitted for so long is refused: its children find another source well before they lose patience.
const HELD_AT_MOST: Duration = Duration::from_secs(2);

/// Downloads for one member that may fail at once, and a second in the long run.
const FAILURES: f64 = 32.0;
const FAILURES_A_SECOND: f64 = 4.0;

/// Members remembered for their failures at most.
const REMEMBERED: usize = 4096;

/// At whose expense a task is downloaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Admission {
    /// Nobody's: clients of this node read it, or nobody waits for it.
    Own,
    /// This member's, since then.
    For(PeerId, Time),
    /// It waits to be admitted, since then.
    Held(Time),
}

/// The tasks that each member waits for.
#[derive(Clone, Debug, Default)]
pub(super) struct Waits(PeerMap<BTreeSet<Digest>>);

impl Waits {
    fn of(&self, peer: PeerId) -> impl Iterator<Item = &Digest> {
        self.0.get(&peer).into_iter().flatten()
    }

    pub(super) fn enter(&mut self, peer: PeerId, task: &Digest) {
        self.0.entry(peer).or_default().insert(*task);
    }

    pub(super) fn leave(&mut self, peer: PeerId, task: &Digest) {
        if let Some(tasks) = self.0.get_mut(&peer) {
            tasks.remove(task);
            if tasks.is_empty() {
                self.0.remove(&peer);
            }
        }
    }

    pub(super) fn peer_gone(&mut self, peer: PeerId) {
        self.0.remove(&peer);
    }

    pub(super) fn task_gone(&mut self, task: &Digest) {
        self.0.retain(|_, tasks| {
            tasks.remove(task);
            !tasks.is_empty()
        });
    }
}

/// How many failed downloads each member may still cause.
#[derive(Clone, Debug, Default)]
pub(super) struct Failures(PeerMap<Allowance>);

impl Failures {
    fn may(&self, now: Time, peer: PeerId) -> bool {
        self.0
            .get(&peer)
            .is_none_or(|allowance| allowance.left(now) >= 1.0)
    }

    fn count(&mut self, now: Time, peer: PeerId, factor: f64) {
        let (at_once, a_second) = (FAILURES * factor, FAILURES_A_SECOND * factor);
        if self.0.len() >= REMEMBERED {
            self.0.retain(|_, allowance| allowance.left(now) < FAILURES);
        }
        if self.0.len() < REMEMBERED || self.0.contains_key(&peer) {
            self.0
                .entry(peer)
                .or_insert_with(|| Allowance::new(at_once, a_second, now))
                .take(now, 1.0);
        }
    }
}

/// The downloads charged to one member.
#[derive(Clone, Copy, Debug, Default)]
struct Use {
    downloads: usize,
    bytes: u64,
    /// Downloads whose pieces are longer than the member's part of the memory.
    long: usize,
}

impl Task {
    /// Whether it may be downloaded now.
    pub(super) const fn is_admitted(&self) -> bool {
        !matches!(self.admission, Admission::Held(_))
    }

    /// The memory that a piece on its way takes.
    fn piece_bytes(&self) -> u64 {
        self.fetch
            .as_ref()
            .map_or(SMALL_PIECE_BYTES, |fetch| fetch.layout().piece_bytes())
    }
}

impl<N: TableSigner> Node<N> {
    /// Whether a member may wait for one more task, or waits for this one already. From now on it does.
    pub(super) fn may_wait(&mut self, peer: PeerId, digest: &Digest) -> bool {
        let limit = TASKS * self.factor(peer);
        let is_open = |task: &Digest| self.tasks.get(task).is_none_or(|task| !task.is_complete());
        let others = || {
            self.waits
                .of(peer)
                .filter(|task| *task != digest && is_open(task))
        };
        let may = !is_open(digest) || others().take(limit).count() < limit;
        if may {
            self.waits.enter(peer, digest);
        }
        may
    }

    fn factor(&self, peer: PeerId) -> usize {
        if self.connected.get(&peer) == Some(&Role::Seed) {
            SEED_FACTOR
        } else {
            1
        }
    }

    /// The memory that the pieces of a member's downloads may take.
    fn memory_of(&self, peer: PeerId) -> u64 {
        self.config.in_flight_bytes / MEMORY_PART * if self.factor(peer) > 1 { 2 } else { 1 }
    }

    /// Whether one more download in pieces of `bytes` would be within what a member may have. Long pieces take nothing from short ones:
    /// many clients may stand behind one member, and one of them may ask for huge blobs.
    fn has_share(&self, peer: PeerId, used: Use, bytes: u64) -> bool {
        let memory = self.memory_of(peer);
        let fits = match bytes {
            bytes if bytes > memory => used.long == 0,
            bytes => bytes <= SMALL_PIECE_BYTES || used.bytes + bytes <= memory,
        };
        fits && used.downloads < DOWNLOADS * self.factor(peer)
    }

    /// Counts a download in pieces of `bytes` for a member.
    fn count_use(&self, peer: PeerId, used: &mut Use, bytes: u64) {
        used.downloads += 1;
        if bytes > self.memory_of(peer) {
            used.long += 1;
        } else {
            used.bytes += bytes;
        }
    }

    /// Whether all members that wait for a task have caused too many failed downloads.
    fn has_failed_too_often(&self, now: Time, task: &Task) -> bool {
        let mut waiting = task.waiting().peekable();
        waiting.peek().is_some() && waiting.all(|(peer, _)| !self.failures.may(now, peer))
    }

    /// A download came to nothing: it counts for the member at whose expense it was made.
    pub(super) fn count_failure(&mut self, now: Time, digest: &Digest) {
        if let Some(Admission::For(peer, _)) = self.tasks.get(digest).map(|task| task.admission) {
            self.failures.count(now, peer, self.factor(peer) as f64);
        }
    }

    /// Decides which downloads of a seed go on and which are begun, at whose expense; and refuses those that had to wait.
    pub(super) fn admit(&mut self, now: Time, tasks: &[Digest]) {
        if self.config.role != Role::Seed {
            return;
        }
        let mut open = Vec::new();
        for digest in tasks {
            let Some(task) = self.tasks.get_mut(digest).filter(|task| task.is_running()) else {
                continue;
            };
            // Admitted downloads come first, the smallest before all: a task that turns out to be large gives way.
            let turn = match task.admission {
                _ if task.is_read => None,
                Admission::For(_, since) => Some((false, task.piece_bytes(), since)),
                Admission::Held(since) => Some((true, 0, since)),
                Admission::Own => task
                    .waiting()
                    .next()
                    .map(|_| (false, task.piece_bytes(), now)),
            };
            match turn {
                Some(turn) => open.push((turn, *digest)),
                None => task.admission = Admission::Own,
            }
        }
        open.sort_unstable();
        let (mut used, mut in_all): (PeerMap<Use>, usize) = (PeerMap::default(), 0);
        for ((is_held, _, since), digest) in open {
            let Some(task) = self.tasks.get(&digest) else {
                continue;
            };
            let bytes = task.piece_bytes();
            match self.payer(now, task, &used, is_held && in_all >= DOWNLOADS_IN_ALL) {
                Some(peer) => {
                    self.count_use(peer, used.entry(peer).or_default(), bytes);
                    in_all += 1;
                    self.hold(
                        now,
                        &digest,
                        Admission::For(peer, if is_held { now } else { since }),
                    );
                }
                // A member that has caused too many failures gets no place soon: its clients do not wait for one.
                None if is_held
                    && now.since(since) < HELD_AT_MOST
                    && !self.has_failed_too_often(now, task) =>
                {
                    self.hold(now, &digest, Admission::Held(since));
                }
                None => {
                    let is_waited_for = task.waiting().next().is_some();
                    if !is_held && is_waited_for {
                        // It turned out to be too large beside the others of that member.
                        self.count_failure(now, &digest);
                    }
                    self.hold(
                        now,
                        &digest,
                        Admission::Held(if is_held { since } else { now }),
                    );
                    if is_waited_for {
                        self.turn_away(&digest, Refusal::Busy);
                        self.outputs.push_back(Output::LetGo(digest));
                    }
                }
            }
        }
    }

    /// The member at whose expense a task may be downloaded: the one at whose expense it is, else the one with the fewest downloads.
    fn payer(&self, now: Time, task: &Task, used: &PeerMap<Use>, is_full: bool) -> Option<PeerId> {
        let usage = |peer: PeerId| used.get(&peer).copied().unwrap_or_default();
        let has_share = |peer: PeerId| self.has_share(peer, usage(peer), task.piece_bytes());
        let waits = |peer: PeerId| {
            task.links
                .get(&peer)
                .is_some_and(|link| link.waits.is_some())
        };
        if let Admission::For(peer, _) = task.admission
            && waits(peer)
            && has_share(peer)
        {
            return Some(peer);
        }
        let may = |peer: &PeerId| !is_full && has_share(*peer) && self.failures.may(now, *peer);
        let waiting = task.waiting().map(|(peer, _)| peer).filter(may);
        waiting.min_by_key(|peer| (usage(*peer).downloads, *peer))
    }

    /// Notes at whose expense a task is downloaded. One that has to wait stops, and is not taken for one that does not move.
    fn hold(&mut self, now: Time, digest: &Digest, admission: Admission) {
        let was_admitted = self.tasks.get(digest).is_some_and(Task::is_admitted);
        if let Some(task) = self.tasks.get_mut(digest) {
            if !was_admitted || matches!(admission, Admission::Held(_)) {
                task.moved = now;
            }
            task.admission = admission;
        }
        if was_admitted && matches!(admission, Admission::Held(_)) {
            self.stop(digest);
        }
    }
}
