//! The election of a peer that reads a task from the origin if no seed may, and the consequences of reports.

use std::time::Duration;

use rand::{Rng, RngExt};

use super::slab::Slot;
use super::task::{Copy, Election, Task};
use super::{
    ELECTION_STALL, GRACE, ISOLATION, ISSUER_RETURNS, IsolationReason, Output, POSTPONED_AT_MOST,
    POSTPONED_FOR, REPORTERS_TO_ISOLATE, ReportKind, Standing, Swarm, Timer,
};
use crate::Time;
use crate::application::{Labels, Rule};
use crate::piece::PeerId;
use hawker_oci::digest::Digest;

/// How many that got nowhere are remembered.
const TRIED: usize = 16;

impl Swarm {
    /// Sees to it that somebody brings the task into the swarm: a seed, or the one elected peer.
    pub(super) fn ensure_source<R: Rng + ?Sized>(
        &mut self,
        now: Time,
        rng: &mut R,
        task_slot: Slot,
    ) {
        let open = self
            .tasks
            .get(task_slot)
            .filter(|task| task.is_ours() && task.election.is_none());
        let Some(task) = open.filter(|_| now >= self.elects_from) else {
            return;
        };
        let named = task.named_issuers();
        let most_named = named.iter().max_by_key(|(peer, count)| (**count, **peer));
        if let Some((issuer, count)) = most_named.map(|(peer, count)| (*peer, *count)) {
            if let Some(until) = self.awaits_issuer(now, task, issuer) {
                self.timers.insert((until, Timer::Elect(task_slot)));
                return;
            }
            // A seed that came after the election leaves it alone, also after a restart; two liars are needed to make it so.
            if count >= REPORTERS_TO_ISOLATE {
                self.elect(now, rng, task_slot, Vec::new());
                return;
            }
        }
        let needs_one = self.live_seeds(now).next().is_none() || task.is_private();
        if needs_one && self.may_elect(now, task_slot) {
            self.elect(now, rng, task_slot, Vec::new());
        }
    }

    /// Whether the task's application and tag have fewer elected peers than they may; else it waits for its turn.
    fn may_elect(&mut self, now: Time, task_slot: Slot) -> bool {
        if self
            .applications
            .rules()
            .iter()
            .all(|rule| rule.limits.origins.is_none())
        {
            return true;
        }
        let Some(purpose) = self.tasks.get(task_slot).map(Task::purpose) else {
            return false;
        };
        let is_full = |rule: &&Rule| {
            let most = rule.limits.origins.map(|most| most as usize);
            most.is_some_and(|most| self.elections(&rule.labels).take(most).count() >= most)
        };
        let full = self
            .applications
            .of(&purpose.labels)
            .find(is_full)
            .map(|rule| rule.labels.clone());
        let Some(task) = self.tasks.get_mut(task_slot) else {
            return false;
        };
        let overdue = task
            .postponed_at
            .is_some_and(|since| now.since(since) >= POSTPONED_AT_MOST);
        let Some(full) = full.filter(|_| !overdue) else {
            return true;
        };
        if task.postponed_at.is_none() {
            *self.postponements.entry(full).or_default() += 1;
        }
        let since = *task.postponed_at.get_or_insert(now);
        self.postponed.insert((purpose.priority, since, task_slot));
        if !std::mem::replace(&mut self.looks_at_postponed, true) {
            self.timers.insert((now + POSTPONED_FOR, Timer::Postponed));
        }
        false
    }

    /// Tasks that an elected peer is reading from the origin for these labels.
    pub(super) fn elections<'a>(&'a self, labels: &'a Labels) -> impl Iterator<Item = Slot> + 'a {
        self.wanted.iter().copied().filter(move |slot| {
            self.tasks.get(*slot).is_some_and(|task| {
                let reads = |election: &Election| {
                    labels.are_among(&election.labels)
                        && task.copy(election.peer).is_some_and(|copy| !copy.complete)
                };
                task.election.as_ref().is_some_and(reads)
            })
        })
    }

    /// Gives postponed wanters their turn, or tells them again to wait.
    pub(super) fn look_at_postponed<R: Rng + ?Sized>(&mut self, now: Time, rng: &mut R) {
        self.looks_at_postponed = false;
        for (_, _, task_slot) in std::mem::take(&mut self.postponed) {
            self.ensure_source(now, rng, task_slot);
            if self
                .tasks
                .get(task_slot)
                .is_some_and(|task| task.postponed_at.is_some())
            {
                self.tell_all(now, task_slot, Duration::ZERO);
            }
        }
    }

    /// Until when an issuer whom peers name is waited for: it is not here yet, or it has not said yet that it goes on with this
    /// task, which comes to this scheduler just now, by a restart or because another one is gone.
    fn awaits_issuer(&self, now: Time, task: &Task, issuer: PeerId) -> Option<Time> {
        let slot = self.by_id.get(&issuer).copied();
        let is_here = slot
            .and_then(|slot| self.peers.get(slot))
            .is_some_and(|peer| peer.gone_at.is_none());
        let until = match (is_here, slot.and_then(|slot| task.copy(slot))) {
            _ if self.reputation.is_isolated(now, issuer) => return None,
            (false, _) => self.elects_from + ISSUER_RETURNS,
            (true, Some(copy)) if self.is_eligible(now, copy, task.is_private()) => return None,
            (true, _) => task.named_at + GRACE,
        };
        (now < until).then_some(until)
    }

    /// The same for all tasks that are wanted.
    pub(super) fn ensure_sources<R: Rng + ?Sized>(&mut self, now: Time, rng: &mut R) {
        for task in self.wanted.iter().copied().collect::<Vec<_>>() {
            self.ensure_source(now, rng, task);
        }
    }

    /// Ends a peer's election; if it was elected, another peer takes over.
    pub(super) fn dismiss<R: Rng + ?Sized>(
        &mut self,
        now: Time,
        rng: &mut R,
        task_slot: Slot,
        slot: Slot,
    ) {
        let Some(task) = self
            .tasks
            .get_mut(task_slot)
            .filter(|task| task.elected() == Some(slot))
        else {
            return;
        };
        task.election = None;
        // Nobody's word for it counts any more.
        for wanter in task.wanters().collect::<Vec<_>>() {
            task.change_want(wanter, |want| want.issuer = None);
        }
        self.ensure_source(now, rng, task_slot);
        self.tell_all(now, task_slot, Duration::ZERO);
    }

    /// Somebody wants the task again: from now on its elected peer is expected to get on.
    pub(super) fn watch_election(&mut self, now: Time, task_slot: Slot) {
        if let Some(election) = self
            .tasks
            .get_mut(task_slot)
            .and_then(|task| task.election.as_mut())
        {
            election.progress_at = now;
            self.timers
                .insert((now + ELECTION_STALL, Timer::Stall(task_slot)));
        }
    }

    /// Replaces an elected peer that announced nothing new for too long.
    pub(super) fn check_election<R: Rng + ?Sized>(
        &mut self,
        now: Time,
        rng: &mut R,
        task_slot: Slot,
    ) {
        let Some(task) = self.tasks.get(task_slot).filter(|task| task.wanting > 0) else {
            return;
        };
        let Some(election) = &task.election else {
            return;
        };
        if task.copy(election.peer).is_some_and(|copy| copy.complete) {
            // Done; unless it loses its copy.
            self.watch_election(now, task_slot);
            return;
        }
        let overdue = election.progress_at + ELECTION_STALL;
        if now < overdue {
            self.timers.insert((overdue, Timer::Stall(task_slot)));
            return;
        }
        let mut tried = election.tried.clone();
        tried.push(election.peer);
        if tried.len() > TRIED {
            tried.remove(0);
        }
        self.elect(now, rng, task_slot, tried);
    }

    fn elect<R: Rng + ?Sized>(
        &mut self,
        now: Time,
        rng: &mut R,
        task_slot: Slot,
        tried: Vec<Slot>,
    ) {
        let Some(task) = self.tasks.get(task_slot) else {
            return;
        };
        // A peer that issued before is believed already. A complete holder only has to sign. Then comes the peer that
        // has to read least; equals by chance.
        let named = task.named_issuers();
        let named = |copy: &Copy| {
            let peer = self.peers.get(copy.peer).map(|peer| peer.about.peer);
            peer.and_then(|peer| named.get(&peer).copied()).unwrap_or(0)
        };
        let rank = |copy: &Copy| {
            (
                !tried.contains(&copy.peer),
                named(copy),
                copy.complete,
                copy.pieces,
            )
        };
        let private = task.is_private();
        let eligible = task
            .copies
            .iter()
            .filter(|copy| self.is_eligible(now, copy, private));
        let elected = eligible
            .map(|copy| (rank(copy), rng.random::<u32>(), copy.peer))
            .max();
        let Some((_, _, peer)) = elected else { return };
        let is_waiting = task.copy(peer).is_some_and(|copy| copy.want.is_some());
        if let Some(task) = self.tasks.get_mut(task_slot) {
            let labels = task.purpose().labels;
            task.election = Some(Election {
                peer,
                progress_at: now,
                tried,
                labels,
            });
            task.postponed_at = None;
        }
        self.watch_election(now, task_slot);
        self.tell_all(now, task_slot, Duration::ZERO);
        if !is_waiting {
            self.tell(now, task_slot, peer);
        }
    }

    fn is_eligible(&self, now: Time, copy: &Copy, private: bool) -> bool {
        let reads = copy
            .want
            .as_ref()
            .is_some_and(|want| !want.guest && (want.reads || !private))
            && self
                .peers
                .get(copy.peer)
                .is_some_and(|peer| peer.about.reads_origins);
        (copy.complete || reads) && self.is_namable(now, copy.peer)
    }

    /// Takes in a report, as far as the reporter's allowance goes.
    #[expect(
        clippy::too_many_arguments,
        reason = "they are what the peer said, one by one"
    )]
    pub(super) fn report<R: Rng + ?Sized>(
        &mut self,
        now: Time,
        rng: &mut R,
        reporter: PeerId,
        accused: PeerId,
        task: &Digest,
        kind: ReportKind,
        is_vouched_for: bool,
    ) {
        let (Some(from), Some(about)) = (
            self.by_id.get(&reporter).copied(),
            self.by_id.get(&accused).copied(),
        ) else {
            return;
        };
        if !self
            .peers
            .get_mut(from)
            .is_some_and(|peer| peer.may_report(now))
        {
            return;
        }
        let is_accusation = !matches!(kind, ReportKind::Served(_));
        if is_accusation && !is_vouched_for && !self.have_met(from, about, task) {
            return;
        }
        if kind == ReportKind::WrongBytes && !is_vouched_for {
            self.outputs.push_back(Output::Vouched {
                reporter,
                peer: accused,
                task: *task,
                kind,
            });
        }
        let Some(peer) = self.peers.get_mut(about) else {
            return;
        };
        if let ReportKind::Served(bytes) = kind {
            peer.served_bytes = peer.served_bytes.saturating_add(bytes);
        } else if kind != ReportKind::WrongBytes && peer.gone_at.is_some() {
            // Its absence is no fault, and it may be back before its grace is over.
            return;
        }
        let standing = self.standing(now, accused);
        if self
            .reputation
            .report(now, reporter, accused, standing, kind)
        {
            self.isolate(now, rng, about);
        }
    }

    /// Whether one of the two was named to the other for this task: transfers go both ways over a link.
    fn have_met(&self, one: Slot, other: Slot, task: &Digest) -> bool {
        let (Some(one), Some(other)) = (self.peers.get(one), self.peers.get(other)) else {
            return false;
        };
        one.was_named(other.about.peer, task) || other.was_named(one.about.peer, task)
    }

    fn standing(&self, now: Time, accused: PeerId) -> Standing {
        if !self.seeds.contains_key(&accused) {
            return Standing::Peer;
        }
        let is_here = |slot: &Slot| {
            self.peers
                .get(*slot)
                .is_some_and(|peer| peer.gone_at.is_none())
        };
        let others = self
            .seeds
            .iter()
            .filter(|(seed, slot)| **seed != accused && is_here(slot));
        match others
            .map(|(seed, _)| *seed)
            .any(|seed| !self.reputation.is_isolated(now, seed))
        {
            true => Standing::Seed,
            false => Standing::LastSeed,
        }
    }

    /// An issuer that sealed two different tables of one task is isolated by its own word.
    pub(super) fn contradicted<R: Rng + ?Sized>(&mut self, now: Time, rng: &mut R, issuer: PeerId) {
        let slot = self.by_id.get(&issuer).copied();
        if let Some(slot) = slot
            && self
                .reputation
                .convict(now, issuer, IsolationReason::Contradiction, ISOLATION)
        {
            self.isolate(now, rng, slot);
        }
    }

    /// Takes a peer that has just been found guilty out of all lists.
    fn isolate<R: Rng + ?Sized>(&mut self, now: Time, rng: &mut R, slot: Slot) {
        let id = self.peers.get(slot).map(|peer| peer.about.peer);
        if let Some((reason, _)) = id.and_then(|peer| self.reputation.isolation(now, peer)) {
            *self.isolations.entry(reason).or_default() += 1;
        }
        self.outputs
            .push_back(Output::Isolated(self.reputation.isolated(now)));
        let Some(peer) = self.peers.get_mut(slot) else {
            return;
        };
        peer.children = 0;
        for task_slot in peer.tasks.iter().copied().collect::<Vec<_>>() {
            let copy = self
                .tasks
                .get_mut(task_slot)
                .and_then(|task| task.copy_mut(slot));
            let children = copy.map_or(0, |copy| std::mem::take(&mut copy.children));
            self.unlink(now, task_slot, slot, children);
            self.dismiss(now, rng, task_slot, slot);
        }
        self.ensure_sources(now, rng);
    }
}
