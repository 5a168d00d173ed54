//! The messages still to be sent, by scheduler. No I/O and no clock: the sessions take from here.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use hawker_api::convert::{self, Member};
use hawker_api::v1;
use hawker_api::v1::report::Kind;
use hawker_core::message::Role;
use hawker_core::piece::{PeerId, PieceTable};
use hawker_core::rendezvous;
use hawker_oci::digest::Digest;
use tokio::sync::Notify;
use tracing::debug;

use super::{Holding, Isolation, ReportKind, Want};

/// Tasks wanted at a time: as many as a scheduler keeps of one peer. Beyond that a task is fetched without a scheduler.
pub const MAX_WANTS: usize = 4096;
/// Changed holdings that wait for one scheduler; beyond that everything is announced afresh instead.
const MAX_HOLDINGS: usize = 16_384;
/// Reports that wait for one scheduler; beyond that they are dropped: they are many, and each says little.
const MAX_REPORTS: usize = 1024;
/// Contradictions that wait for one scheduler: one is enough, and one may have a megabyte.
const MAX_CONTRADICTIONS: usize = 2;
/// Values of a table that is sent as proof: with SHA-512, two such tables fill half of a message.
const MAX_PROOF_VALUES: usize = 16_384;

/// The messages for all schedulers, and their last answers.
pub(super) struct Outboxes {
    me: PeerId,
    wants: BTreeMap<Digest, Wanted>,
    sessions: BTreeMap<PeerId, Outbox>,
    /// Members as each scheduler told them last; under `None` those from the disk.
    members: BTreeMap<Option<PeerId>, Vec<Member>>,
    isolated: BTreeMap<PeerId, Vec<Isolation>>,
}

struct Wanted {
    want: Want,
    /// Which scheduler knows of it.
    asked: Option<Asked>,
    /// The issuer of its table, as far as this node was told.
    issuer: Option<PeerId>,
    /// Over how many schedulers it is spread.
    spread: u32,
    /// It is asked where its issuer is elected, however far it is spread: this node is the issuer, or found none elsewhere.
    stays: bool,
}

/// The scheduler that is asked for a task.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Asked {
    scheduler: PeerId,
    /// It is not the first in the task's order.
    guest: bool,
}

/// A scheduler's answer about a task, besides its parents.
pub(super) struct Answer {
    pub(super) issuer: Option<PeerId>,
    /// This node is the issuer.
    pub(super) elected: bool,
    /// Over how many schedulers the task is spread; 0: nothing new.
    pub(super) spread: u32,
}

/// The messages for one scheduler.
struct Outbox {
    address: String,
    wake: Arc<Notify>,
    wants: BTreeSet<Digest>,
    forgets: BTreeSet<Digest>,
    /// The latest of each that changed; `None`: all are to be announced.
    holdings: Option<BTreeMap<Digest, Holding>>,
    /// Bytes by peer, task and kind: a stall said twice is one stall.
    reports: BTreeMap<(PeerId, Digest, i32), u64>,
    contradictions: Vec<v1::Contradiction>,
}

/// Holdings to send.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Announcement {
    /// Ask the node for everything.
    All,
    /// These have changed.
    Changes(Vec<Holding>),
}

impl Outboxes {
    pub(super) const fn new(me: PeerId) -> Self {
        Self {
            me,
            wants: BTreeMap::new(),
            sessions: BTreeMap::new(),
            members: BTreeMap::new(),
            isolated: BTreeMap::new(),
        }
    }

    pub(super) fn want(&mut self, task: &Digest, want: Want) {
        if self.wants.len() >= MAX_WANTS && !self.wants.contains_key(task) {
            debug!(%task, "too many tasks are wanted; this one is fetched without a scheduler");
            return;
        }
        let wanted = match self.wants.remove(task) {
            Some(wanted) => Wanted { want, ..wanted },
            None => Wanted {
                want,
                asked: None,
                issuer: None,
                spread: 1,
                stays: false,
            },
        };
        let asked = wanted.asked;
        self.wants.insert(*task, wanted);
        self.ask(asked, task);
        self.reassign_one(task);
    }

    /// Notes a scheduler's answer about a task; if that means to ask another one from now on, it is asked. `false`: it
    /// is not the one that was asked, and its word no longer counts.
    pub(super) fn heard_parents(&mut self, scheduler: PeerId, task: &Digest, said: Answer) -> bool {
        // Elected for what it holds, a node need not want it.
        let Some(wanted) = self.wants.get_mut(task) else {
            return true;
        };
        let Some(asked) = wanted.asked.filter(|asked| asked.scheduler == scheduler) else {
            return false;
        };
        wanted.issuer = said.issuer;
        match (asked.guest, said.spread) {
            (true, 1) => wanted.stays = true,
            (false, spread @ 1..) => wanted.spread = spread,
            _ => {}
        }
        wanted.stays |= said.elected;
        self.reassign_one(task);
        true
    }

    pub(super) fn forget(&mut self, task: &Digest) {
        if let Some(asked) = self.wants.remove(task).and_then(|want| want.asked) {
            self.withdraw(asked.scheduler, task);
        }
    }

    pub(super) fn holding(&mut self, holding: &Holding) {
        for outbox in self.sessions.values_mut() {
            if let Some(changes) = &mut outbox.holdings {
                changes.insert(holding.task, holding.clone());
                if changes.len() > MAX_HOLDINGS {
                    outbox.holdings = None;
                }
            }
            outbox.wake.notify_one();
        }
    }

    pub(super) fn report(&mut self, peer: PeerId, task: &Digest, kind: ReportKind) {
        let (kind, bytes) = match kind {
            ReportKind::WrongBytes => (Kind::WrongBytes, 0),
            ReportKind::Stalled => (Kind::Stalled, 0),
            ReportKind::NotHeld => (Kind::NotHeld, 0),
            ReportKind::Failed => (Kind::Failed, 0),
            ReportKind::Served(bytes) => (Kind::Served, bytes),
        };
        let Some(owner) = self.owner(task) else {
            return;
        };
        let is_told = |scheduler: &PeerId| kind == Kind::WrongBytes || *scheduler == owner;
        for (_, outbox) in self
            .sessions
            .iter_mut()
            .filter(|(scheduler, _)| is_told(scheduler))
        {
            let key = (peer, *task, i32::from(kind));
            if outbox.reports.len() < MAX_REPORTS || outbox.reports.contains_key(&key) {
                let sum = outbox.reports.entry(key).or_default();
                *sum = sum.saturating_add(bytes);
                outbox.wake.notify_one();
            }
        }
    }

    pub(super) fn contradiction(&mut self, tables: &[PieceTable; 2]) {
        if tables
            .iter()
            .any(|table| table.values().len() > MAX_PROOF_VALUES)
        {
            debug!("two tables contradict each other that are too long to be shown");
            return;
        }
        let [one, other] = tables.each_ref().map(|table| Some(convert::table(table)));
        for outbox in self.sessions.values_mut() {
            if outbox.contradictions.len() < MAX_CONTRADICTIONS {
                outbox.contradictions.push(v1::Contradiction {
                    one: one.clone(),
                    other: other.clone(),
                });
                outbox.wake.notify_one();
            }
        }
    }

    /// Addresses of the connected, ascending.
    pub(super) fn connected(&self) -> Vec<String> {
        let mut addresses: Vec<String> = self
            .sessions
            .values()
            .map(|outbox| outbox.address.clone())
            .collect();
        addresses.sort_unstable();
        addresses
    }

    pub(super) fn is_connected(&self, scheduler: PeerId) -> bool {
        self.sessions.contains_key(&scheduler)
    }

    /// A stream to this scheduler has begun; gives the notifier for new messages. `None`: it has one already.
    pub(super) fn open(&mut self, scheduler: PeerId, address: &str) -> Option<Arc<Notify>> {
        if self.is_connected(scheduler) {
            return None;
        }
        let wake = Arc::new(Notify::new());
        let outbox = Outbox {
            address: address.to_owned(),
            wake: Arc::clone(&wake),
            wants: BTreeSet::new(),
            forgets: BTreeSet::new(),
            holdings: None,
            reports: BTreeMap::new(),
            contradictions: Vec::new(),
        };
        self.sessions.insert(scheduler, outbox);
        self.reassign();
        Some(wake)
    }

    pub(super) fn close(&mut self, scheduler: PeerId) {
        self.sessions.remove(&scheduler);
        self.reassign();
    }

    /// Wants and forgets that this scheduler is to be told now.
    pub(super) fn take_questions(&mut self, scheduler: PeerId) -> Vec<v1::from_peer::Event> {
        let Some(outbox) = self.sessions.get_mut(&scheduler) else {
            return Vec::new();
        };
        // First what is held of it, which is said more rarely: else the scheduler would know neither a holder nor a fetcher.
        let holdings = outbox.holdings.as_ref();
        let untold = |task: &Digest| holdings.is_some_and(|changes| changes.contains_key(task));
        let (later, forgets) = std::mem::take(&mut outbox.forgets)
            .into_iter()
            .partition(untold);
        outbox.forgets = later;
        let forgets: BTreeSet<Digest> = forgets;
        let forgets = forgets.into_iter().map(|task| {
            v1::from_peer::Event::Forget(v1::Forget {
                task: task.to_string(),
            })
        });
        let mut questions: Vec<_> = forgets.collect();
        for task in std::mem::take(&mut outbox.wants) {
            let Some(Wanted {
                want,
                asked,
                issuer,
                ..
            }) = self.wants.get_mut(&task)
            else {
                continue;
            };
            questions.push(v1::from_peer::Event::Want(v1::Want {
                task: task.to_string(),
                size_bytes: want.size_bytes.unwrap_or(0),
                source: Some(convert::source(&want.source)),
                // Said once: to a scheduler that starts afresh it is a first question.
                again: std::mem::take(&mut want.again),
                reads: want.reads,
                partial: want.partial,
                purpose: Some(convert::purpose(&want.purpose)),
                issuer: issuer.map(|peer| peer.0.to_vec()).unwrap_or_default(),
                guest: asked.is_some_and(|asked| asked.guest),
            }));
        }
        questions
    }

    /// Whether holdings or reports wait for this scheduler.
    pub(super) fn has_news(&self, scheduler: PeerId) -> bool {
        let has_news = |outbox: &Outbox| {
            !outbox.reports.is_empty()
                || !outbox.contradictions.is_empty()
                || outbox
                    .holdings
                    .as_ref()
                    .is_none_or(|changes| !changes.is_empty())
        };
        self.sessions.get(&scheduler).is_some_and(has_news)
    }

    /// Proofs that this scheduler is to be shown.
    pub(super) fn take_contradictions(&mut self, scheduler: PeerId) -> Vec<v1::Contradiction> {
        self.sessions
            .get_mut(&scheduler)
            .map(|outbox| std::mem::take(&mut outbox.contradictions))
            .unwrap_or_default()
    }

    /// Changed holdings, and reports, that this scheduler is to be told.
    pub(super) fn take_news(&mut self, scheduler: PeerId) -> (Announcement, Vec<v1::Report>) {
        let Some(outbox) = self.sessions.get_mut(&scheduler) else {
            return (Announcement::Changes(Vec::new()), Vec::new());
        };
        let announcement = match outbox.holdings.replace(BTreeMap::new()) {
            None => Announcement::All,
            Some(changes) => Announcement::Changes(changes.into_values().collect()),
        };
        let report = |((peer, task, kind), bytes): ((PeerId, Digest, i32), u64)| v1::Report {
            peer_id: peer.0.to_vec(),
            task: task.to_string(),
            kind,
            bytes,
            reporter: Vec::new(),
        };
        (
            announcement,
            std::mem::take(&mut outbox.reports)
                .into_iter()
                .map(report)
                .collect(),
        )
    }

    /// Notes the members that a scheduler told (`None`: the disk). Everybody, if that changes anything.
    pub(super) fn heard_members(
        &mut self,
        from: Option<PeerId>,
        members: Vec<Member>,
    ) -> Option<Vec<Member>> {
        let before = self.members();
        self.members.insert(from, members);
        if from.is_some() {
            // The live know better than the dead and the disk.
            let sessions = &self.sessions;
            self.members
                .retain(|from, _| from.is_some_and(|scheduler| sessions.contains_key(&scheduler)));
        }
        let now = self.members();
        (now != before).then_some(now)
    }

    /// Forgets members that were removed from the cluster, and wakes all streams: one of them may be with such a member. All
    /// that are left, if that changes anything.
    pub(super) fn removed(&mut self, removed: &[PeerId]) -> Option<Vec<Member>> {
        let before = self.members();
        for members in self.members.values_mut() {
            members.retain(|member| !removed.contains(&member.peer));
        }
        self.sessions
            .values()
            .for_each(|outbox| outbox.wake.notify_one());
        let now = self.members();
        (now != before).then_some(now)
    }

    /// Seeds and schedulers, each once.
    pub(super) fn members(&self) -> Vec<Member> {
        let all = self
            .members
            .values()
            .flatten()
            .map(|member| (member.peer, member.clone()));
        all.collect::<BTreeMap<_, _>>().into_values().collect()
    }

    /// Notes who is isolated according to a scheduler. All who are, if that changes anything.
    pub(super) fn heard_isolated(
        &mut self,
        from: PeerId,
        isolated: Vec<Isolation>,
    ) -> Option<Vec<Isolation>> {
        let before = self.isolated();
        self.isolated.insert(from, isolated);
        let now = self.isolated();
        let who = |all: &BTreeMap<PeerId, Isolation>| -> BTreeSet<PeerId> {
            all.keys().copied().collect()
        };
        (who(&now) != who(&before)).then(|| now.into_values().collect())
    }

    /// Each once, as long as the longest of them.
    fn isolated(&self) -> BTreeMap<PeerId, Isolation> {
        let mut all: Vec<&Isolation> = self.isolated.values().flatten().collect();
        all.sort_by_key(|isolation| isolation.until);
        all.into_iter()
            .map(|isolation| (isolation.peer, isolation.clone()))
            .collect()
    }

    /// The schedulers that are known: those with a stream, and those on the member lists.
    pub(super) fn schedulers(&self) -> Vec<PeerId> {
        let listed = self
            .members()
            .into_iter()
            .filter(|member| member.role == Role::Scheduler);
        listed
            .map(|member| member.peer)
            .chain(self.sessions.keys().copied())
            .collect()
    }

    fn owner(&self, task: &Digest) -> Option<PeerId> {
        rendezvous::owner(task, self.sessions.keys().copied())
    }

    /// The scheduler to ask for a task.
    fn place(&self, task: &Digest, wanted: &Wanted) -> Option<Asked> {
        // A node that may read origins that seeds may not read may be elected, which only the first does.
        let spread = if wanted.stays || wanted.want.reads {
            1
        } else {
            wanted.spread
        };
        let scheduler = rendezvous::share(task, self.sessions.keys().copied(), spread, self.me)?;
        Some(Asked {
            scheduler,
            guest: spread > 1 && self.owner(task) != Some(scheduler),
        })
    }

    fn ask(&mut self, asked: Option<Asked>, task: &Digest) {
        if let Some(outbox) = asked.and_then(|asked| self.sessions.get_mut(&asked.scheduler)) {
            outbox.forgets.remove(task);
            outbox.wants.insert(*task);
            outbox.wake.notify_one();
        }
    }

    fn withdraw(&mut self, scheduler: PeerId, task: &Digest) {
        if let Some(outbox) = self.sessions.get_mut(&scheduler) {
            // A question that was never asked needs no answer; the scheduler ignores a forget of what it does not know.
            outbox.wants.remove(task);
            outbox.forgets.insert(*task);
            outbox.wake.notify_one();
        }
    }

    /// The connected have changed: tasks that another scheduler tracks now are asked for there.
    fn reassign(&mut self) {
        for task in self.wants.keys().copied().collect::<Vec<_>>() {
            self.reassign_one(&task);
        }
    }

    fn reassign_one(&mut self, task: &Digest) {
        let Some(wanted) = self.wants.get(task) else {
            return;
        };
        let (before, now) = (wanted.asked, self.place(task, wanted));
        if before == now {
            return;
        }
        if let Some(before) =
            before.filter(|before| now.is_none_or(|now| now.scheduler != before.scheduler))
        {
            self.withdraw(before.scheduler, task);
        }
        if let Some(wanted) = self.wants.get_mut(task) {
            wanted.asked = now;
        }
        self.ask(now, task);
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use hawker_core::application::Purpose;
    use hawker_oci::digest::Algorithm;
    use hawker_oci::reference::Source;
    use v1::from_peer::Event;

    use super::*;

    fn task(n: u32) -> Digest {
        Digest::of(Algorithm::Sha256, &n.to_be_bytes())
    }

    fn scheduler(n: u8) -> PeerId {
        PeerId([n; 16])
    }

    fn want(again: bool) -> Want {
        let source = Source {
            registry: "docker.io".into(),
            repository: "library/debian".into(),
        };
        Want {
            size_bytes: None,
            source,
            again,
            reads: false,
            partial: false,
            purpose: Purpose::default(),
        }
    }

    fn holding(n: u32, pieces: u32) -> Holding {
        Holding {
            task: task(n),
            size_bytes: 1 << 20,
            pieces,
            complete: false,
        }
    }

    fn wanted(outboxes: &mut Outboxes, from: PeerId) -> BTreeSet<String> {
        let wants =
            outboxes
                .take_questions(from)
                .into_iter()
                .filter_map(|question| match question {
                    Event::Want(want) => Some(want.task),
                    _ => None,
                });
        wants.collect()
    }

    #[test]
    fn each_open_want_is_asked_at_one_scheduler_and_again_when_that_is_gone() {
        let mut outboxes = Outboxes::new(scheduler(200));
        (0..100).for_each(|n| outboxes.want(&task(n), want(false)));
        outboxes.open(scheduler(1), "a:1");
        assert_eq!(wanted(&mut outboxes, scheduler(1)).len(), 100);
        outboxes.open(scheduler(2), "b:1");
        let moved = wanted(&mut outboxes, scheduler(2));
        assert!((20..80).contains(&moved.len()), "{}", moved.len());
        let forgets = outboxes.take_questions(scheduler(1));
        assert_eq!(
            forgets.len(),
            moved.len(),
            "what moved is forgotten where it was"
        );
        outboxes.close(scheduler(2));
        assert_eq!(wanted(&mut outboxes, scheduler(1)), moved);
        outboxes.close(scheduler(1));
        outboxes.forget(&task(7));
        outboxes.open(scheduler(1), "a:1");
        assert_eq!(
            wanted(&mut outboxes, scheduler(1)).len(),
            99,
            "open wants are said again after a reconnect"
        );
    }

    fn parents_said(issuer: Option<PeerId>, elected: bool, spread: u32) -> Answer {
        Answer {
            issuer,
            elected,
            spread,
        }
    }

    fn first_want(outboxes: &mut Outboxes, from: PeerId) -> Option<v1::Want> {
        outboxes
            .take_questions(from)
            .into_iter()
            .find_map(|question| match question {
                Event::Want(want) => Some(want),
                _ => None,
            })
    }

    #[test]
    fn a_scheduler_that_comes_back_hears_who_the_issuer_is() {
        let mut outboxes = Outboxes::new(scheduler(200));
        outboxes.open(scheduler(1), "a:1");
        outboxes.want(&task(1), want(false));
        assert!(
            first_want(&mut outboxes, scheduler(1))
                .unwrap()
                .issuer
                .is_empty()
        );
        assert!(outboxes.heard_parents(
            scheduler(1),
            &task(1),
            parents_said(Some(scheduler(9)), false, 1)
        ));
        outboxes.close(scheduler(1));
        outboxes.open(scheduler(1), "a:1");
        let again = first_want(&mut outboxes, scheduler(1)).unwrap();
        assert_eq!(
            (again.issuer, again.guest),
            (scheduler(9).0.to_vec(), false)
        );
    }

    #[test]
    fn a_spread_task_is_asked_for_at_one_of_the_first_schedulers() {
        let all = || (1..=4).map(scheduler);
        let (mut moved, mut stayed) = (0, 0);
        for me in 0..100 {
            let mut outboxes = Outboxes::new(PeerId([me; 16]));
            all().for_each(|scheduler| drop(outboxes.open(scheduler, "a:1")));
            outboxes.want(&task(1), want(false));
            let order = rendezvous::order(&task(1), all());
            assert!(
                first_want(&mut outboxes, order[0]).is_some(),
                "the first in the order is asked first"
            );
            outboxes.heard_parents(
                order[0],
                &task(1),
                parents_said(Some(scheduler(9)), false, 2),
            );
            let Some(guest) = first_want(&mut outboxes, order[1]) else {
                stayed += 1;
                continue;
            };
            moved += 1;
            assert!(guest.guest && guest.issuer == scheduler(9).0);
            let forgets = outboxes.take_questions(order[0]);
            assert!(matches!(&forgets[..], [Event::Forget(_)]), "{forgets:?}");
            assert!(
                !outboxes.heard_parents(order[0], &task(1), parents_said(None, false, 8)),
                "who is no longer asked says nothing that counts"
            );
            // Nobody there brings it: back, and for good.
            outboxes.heard_parents(order[1], &task(1), parents_said(None, false, 1));
            assert!(first_want(&mut outboxes, order[0]).is_some_and(|want| !want.guest));
            outboxes.heard_parents(order[0], &task(1), parents_said(None, false, 2));
            assert!(first_want(&mut outboxes, order[1]).is_none());
        }
        assert!(moved > 30 && stayed > 30, "{moved} and {stayed}");
    }

    #[test]
    fn a_guest_s_scheduler_that_becomes_the_first_is_asked_as_the_first() {
        let order = rendezvous::order(&task(1), (1..=2).map(scheduler));
        let me = (0..).map(|me| PeerId([me; 16])).find(|me| {
            rendezvous::share(&task(1), order.iter().copied(), 2, *me) == Some(order[1])
        });
        let mut outboxes = Outboxes::new(me.unwrap());
        order
            .iter()
            .for_each(|scheduler| drop(outboxes.open(*scheduler, "a:1")));
        outboxes.want(&task(1), want(false));
        outboxes.heard_parents(order[0], &task(1), parents_said(None, false, 2));
        assert!(first_want(&mut outboxes, order[1]).is_some_and(|want| want.guest));
        outboxes.close(order[0]);
        assert!(first_want(&mut outboxes, order[1]).is_some_and(|want| !want.guest));
    }

    #[test]
    fn the_issuer_stays_where_it_was_elected() {
        for me in 0..20 {
            let mut outboxes = Outboxes::new(PeerId([me; 16]));
            (1..=2).for_each(|n| drop(outboxes.open(scheduler(n), "a:1")));
            outboxes.want(&task(1), want(false));
            let order = rendezvous::order(&task(1), (1..=2).map(scheduler));
            outboxes.heard_parents(
                order[0],
                &task(1),
                parents_said(Some(PeerId([me; 16])), true, 2),
            );
            assert!(first_want(&mut outboxes, order[1]).is_none());
        }
    }

    #[test]
    fn a_want_forgotten_before_it_was_sent_is_not_asked() {
        let mut outboxes = Outboxes::new(scheduler(200));
        outboxes.open(scheduler(1), "a:1");
        outboxes.want(&task(1), want(false));
        outboxes.forget(&task(1));
        assert!(wanted(&mut outboxes, scheduler(1)).is_empty());
        outboxes.want(&task(1), want(true));
        let questions = outboxes.take_questions(scheduler(1));
        assert!(matches!(&questions[..], [Event::Want(want)] if want.again));
    }

    #[test]
    fn what_is_held_is_told_before_it_is_wanted_no_more() {
        let mut outboxes = Outboxes::new(scheduler(200));
        outboxes.open(scheduler(1), "a:1");
        outboxes.take_news(scheduler(1));
        outboxes.want(&task(1), want(false));
        assert_eq!(wanted(&mut outboxes, scheduler(1)).len(), 1);
        outboxes.holding(&holding(1, 1));
        outboxes.forget(&task(1));
        assert!(
            outboxes.take_questions(scheduler(1)).is_empty(),
            "the scheduler does not know the holder yet"
        );
        outboxes.take_news(scheduler(1));
        assert!(matches!(
            &outboxes.take_questions(scheduler(1))[..],
            [Event::Forget(_)]
        ));
    }

    #[test]
    fn a_new_stream_announces_all_and_then_the_latest_of_each() {
        let mut outboxes = Outboxes::new(scheduler(200));
        outboxes.holding(&holding(1, 1));
        outboxes.open(scheduler(1), "a:1");
        assert!(outboxes.has_news(scheduler(1)));
        assert_eq!(outboxes.take_news(scheduler(1)).0, Announcement::All);
        assert!(!outboxes.has_news(scheduler(1)));
        outboxes.holding(&holding(1, 2));
        outboxes.holding(&holding(1, 3));
        assert_eq!(
            outboxes.take_news(scheduler(1)).0,
            Announcement::Changes(vec![holding(1, 3)])
        );
        (0..=MAX_HOLDINGS as u32).for_each(|n| outboxes.holding(&holding(n, 1)));
        assert_eq!(
            outboxes.take_news(scheduler(1)).0,
            Announcement::All,
            "too many changes are all"
        );
    }

    #[test]
    fn reports_add_up_and_are_bounded() {
        let mut outboxes = Outboxes::new(scheduler(200));
        outboxes.report(scheduler(9), &task(1), ReportKind::Stalled);
        outboxes.open(scheduler(1), "a:1");
        for _ in 0..3 {
            outboxes.report(scheduler(9), &task(1), ReportKind::Served(5));
        }
        let (_, reports) = outboxes.take_news(scheduler(1));
        assert_eq!(
            reports
                .iter()
                .map(|report| report.bytes)
                .collect::<Vec<_>>(),
            [15]
        );
        (0..5000).for_each(|n| outboxes.report(scheduler(9), &task(n), ReportKind::Stalled));
        assert_eq!(outboxes.take_news(scheduler(1)).1.len(), MAX_REPORTS);
    }

    #[test]
    fn wrong_bytes_are_told_to_all_schedulers_and_the_rest_to_the_task_s() {
        let mut outboxes = Outboxes::new(scheduler(200));
        (1..=3).for_each(|n| drop(outboxes.open(scheduler(n), "a:1")));
        outboxes.report(scheduler(9), &task(1), ReportKind::WrongBytes);
        outboxes.report(scheduler(9), &task(1), ReportKind::Served(1));
        let told = |outboxes: &mut Outboxes, n| outboxes.take_news(scheduler(n)).1.len();
        let mut counts = [1, 2, 3].map(|n| told(&mut outboxes, n));
        counts.sort_unstable();
        assert_eq!(counts, [1, 1, 2]);
    }

    #[test]
    fn wants_are_bounded() {
        let mut outboxes = Outboxes::new(scheduler(200));
        (0..5000).for_each(|n| outboxes.want(&task(n), want(false)));
        assert_eq!(outboxes.wants.len(), MAX_WANTS);
    }

    #[test]
    fn members_are_those_that_the_connected_name() {
        let seed = |n| Member {
            peer: scheduler(n),
            name: String::new(),
            addresses: Vec::new(),
            role: Role::Seed,
            zone: String::new(),
        };
        let mut outboxes = Outboxes::new(scheduler(200));
        assert_eq!(
            outboxes.heard_members(None, vec![seed(50)]).unwrap(),
            [seed(50)]
        );
        outboxes.open(scheduler(1), "a:1");
        outboxes.open(scheduler(2), "b:1");
        assert_eq!(
            outboxes
                .heard_members(Some(scheduler(1)), vec![seed(51)])
                .unwrap(),
            [seed(51)]
        );
        assert_eq!(
            outboxes.heard_members(Some(scheduler(2)), vec![seed(51)]),
            None
        );
        outboxes.heard_members(Some(scheduler(2)), vec![seed(52)]);
        outboxes.close(scheduler(1));
        assert_eq!(
            outboxes.members(),
            [seed(51), seed(52)],
            "who is gone is believed until somebody says more"
        );
        assert_eq!(
            outboxes
                .heard_members(Some(scheduler(2)), vec![seed(52)])
                .unwrap(),
            [seed(52)]
        );
    }

    #[test]
    fn isolated_is_whom_any_scheduler_isolates() {
        let mut outboxes = Outboxes::new(scheduler(200));
        let (a, b) = (scheduler(50), scheduler(51));
        let start = Instant::now();
        let isolation = |peer: PeerId, seconds: u64| {
            let until = start + Duration::from_secs(seconds);
            Isolation {
                peer,
                why: "stalling".into(),
                until,
            }
        };
        let (brief, long, other) = (isolation(a, 10), isolation(a, 20), isolation(b, 5));
        assert_eq!(outboxes.heard_isolated(scheduler(1), Vec::new()), None);
        assert_eq!(
            outboxes
                .heard_isolated(scheduler(1), vec![brief.clone()])
                .unwrap(),
            [brief]
        );
        let both = vec![long.clone(), other.clone()];
        assert_eq!(
            outboxes.heard_isolated(scheduler(2), both).unwrap(),
            [long, other.clone()]
        );
        assert_eq!(outboxes.heard_isolated(scheduler(1), Vec::new()), None);
        assert_eq!(
            outboxes
                .heard_isolated(scheduler(2), vec![other.clone()])
                .unwrap(),
            [other]
        );
    }
}
