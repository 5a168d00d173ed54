//! The links between children and parents: made, told, and taken apart.

use std::time::Duration;

use rand::{Rng, RngExt};

use super::choose::{Candidate, choose};
use super::gateways::FAR_PARENTS;
use super::slab::Slot;
use super::task::{Copy, Task};
use super::{
    MAX_COMPLETE, MAX_PARENTS, MAX_SEEDS, MESH_DEGREE, Nearness, Output, PUSH_DELAY,
    PUSH_DOUBLINGS, Place, SAMPLE, SOURCE_CHILDREN, Swarm, Timer,
};
use crate::Time;
use crate::message::Role;
use crate::piece::PeerId;
use crate::rendezvous;

impl Swarm {
    /// Gives a child the parents that it still has room for. `again`: those that it had, `tried`, did not suffice.
    pub(super) fn find_parents<R: Rng + ?Sized>(
        &mut self,
        now: Time,
        rng: &mut R,
        task_slot: Slot,
        child: Slot,
        tried: &[Slot],
        again: bool,
    ) {
        for source in self.sources(now, task_slot, child, again) {
            self.peers
                .get_mut(source)
                .map(|peer| peer.tasks.insert(task_slot));
            self.tasks
                .get_mut(task_slot)
                .map(|task| task.copy_or_empty(source).peer);
            self.link_both(now, task_slot, child, source);
        }
        self.open_gate(now, task_slot, child);
        for parent in self.far_parents(now, task_slot, child) {
            self.link_both(now, task_slot, child, parent);
        }
        let room = self.room(task_slot, child);
        if room == 0 {
            return;
        }
        let candidates = self.candidates(now, rng, task_slot, child, tried, again);
        let max_complete = MAX_COMPLETE.saturating_sub(self.complete_parents(task_slot, child));
        for parent in choose(candidates, room, max_complete) {
            self.link_both(now, task_slot, child, parent);
        }
    }

    /// A new holder: names it to some who want the task and have room.
    pub(super) fn introduce<R: Rng + ?Sized>(
        &mut self,
        now: Time,
        rng: &mut R,
        task_slot: Slot,
        holder: Slot,
    ) {
        let Some(task) = self.tasks.get(task_slot).filter(|task| task.wanting > 0) else {
            return;
        };
        let Some(copy) = task.copy(holder).filter(|_| self.is_namable(now, holder)) else {
            return;
        };
        let mut room = (MESH_DEGREE as u32).saturating_sub(copy.children);
        let may = |child: Slot| {
            self.is_near(child, holder) || copy.complete && self.is_gateway(task_slot, child)
        };
        let wanters: Vec<Slot> = sample(rng, &task.copies)
            .filter(|copy| copy.want.is_some())
            .map(|copy| copy.peer)
            .filter(|child| may(*child))
            .collect();
        for child in wanters {
            if room > 0 && self.link(task_slot, child, holder) {
                room -= 1;
                self.tell_soon(now, task_slot, child);
            }
        }
    }

    /// Tells everybody who wants the task of their parents, after `delay`.
    pub(super) fn tell_all(&mut self, now: Time, task_slot: Slot, delay: Duration) {
        let Some(task) = self.tasks.get(task_slot) else {
            return;
        };
        for child in task.wanters().collect::<Vec<_>>() {
            self.tell_at(now + delay, task_slot, child);
        }
    }

    /// A timer for news has run out: looks whether it still counts, fills up the list, tells it.
    pub(super) fn push<R: Rng + ?Sized>(
        &mut self,
        now: Time,
        rng: &mut R,
        due: Time,
        task_slot: Slot,
        child: Slot,
    ) {
        let want = self
            .tasks
            .get_mut(task_slot)
            .and_then(|task| task.want_mut(child));
        if want.is_some_and(|want| want.push_at == Some(due)) {
            self.find_parents(now, rng, task_slot, child, &[], false);
            self.tell(now, task_slot, child);
        }
    }

    /// Tells a peer its parents now.
    pub(super) fn tell(&mut self, now: Time, task_slot: Slot, child: Slot) {
        let spread = self.spread_for(now, task_slot, child);
        let named = self.named_issuer(now, task_slot, child);
        let share = self.share(now, task_slot, child);
        let Some(task) = self.tasks.get_mut(task_slot) else {
            return;
        };
        let elected = task.elected();
        let mut parents = Vec::new();
        if let Some(want) = task.want_mut(child) {
            want.push_at = None;
            want.told = want.told.saturating_add(1);
            parents.clone_from(&want.parents);
        }
        let is_seed = |slot: Slot| {
            self.peers
                .get(slot)
                .is_some_and(|peer| peer.about.role == Role::Seed)
        };
        parents.sort_by_key(|parent| (!is_seed(*parent), Some(*parent) != elected));
        let id = |slot: Slot| self.peers.get(slot).map(|peer| peer.about.peer);
        let Some(to) = id(child) else { return };
        let issuer = elected.and_then(id).or(named);
        self.outputs.push_back(Output::Parents {
            to,
            task: task.digest,
            parents: parents.into_iter().filter_map(id).collect(),
            issuer,
            fetch_from_origin: issuer == Some(to),
            spread,
            share,
            later: issuer.is_none() && task.postponed_at.is_some(),
        });
    }

    /// The issuer that a peer named, which counts for it as long as nobody is elected here.
    fn named_issuer(&self, now: Time, task_slot: Slot, child: Slot) -> Option<PeerId> {
        let copy = self.tasks.get(task_slot)?.copy(child)?;
        copy.want
            .as_deref()?
            .issuer
            .filter(|issuer| !self.reputation.is_isolated(now, *issuer))
    }

    /// Over how many schedulers a peer is told that the task is spread.
    fn spread_for(&self, now: Time, task_slot: Slot, child: Slot) -> u32 {
        let Some(task) = self.tasks.get(task_slot) else {
            return 0;
        };
        let is_guest = task
            .copy(child)
            .and_then(|copy| copy.want.as_deref())
            .is_some_and(|want| want.guest);
        match is_guest {
            false => task.spread,
            true => u32::from(self.sources(now, task_slot, child, true).is_empty()),
        }
    }

    /// Takes a parent from all its children, who are told soon. `children`: how many it had.
    pub(super) fn unlink(&mut self, now: Time, task_slot: Slot, parent: Slot, children: u32) {
        let Some(task) = self.tasks.get_mut(task_slot).filter(|_| children > 0) else {
            return;
        };
        let mut orphans = Vec::new();
        for copy in &mut task.copies {
            let Some(want) = copy.want.as_deref_mut() else {
                continue;
            };
            if let Some(at) = want.parents.iter().position(|other| *other == parent) {
                want.parents.remove(at);
                orphans.push(copy.peer);
            }
        }
        for orphan in orphans {
            self.tell_soon(now, task_slot, orphan);
        }
    }

    /// A child fewer for `parent`. A seed's copy that was only expected, and that nobody waits for any more, goes.
    pub(super) fn release(&mut self, task_slot: Slot, parent: Slot) {
        let Some(task) = self.tasks.get_mut(task_slot) else {
            return;
        };
        let Some(copy) = task.copy_mut(parent) else {
            return;
        };
        copy.children = copy.children.saturating_sub(1);
        let is_over = copy.children == 0 && copy.is_empty() && copy.want.is_none();
        if is_over {
            task.take_copy(parent);
        }
        if let Some(peer) = self.peers.get_mut(parent) {
            peer.children = peer.children.saturating_sub(1);
            if is_over {
                peer.tasks.remove(&task_slot);
            }
        }
    }

    /// Whether a peer may be named: it is here and not isolated.
    pub(super) fn is_namable(&self, now: Time, slot: Slot) -> bool {
        self.peers.get(slot).is_some_and(|peer| {
            peer.gone_at.is_none() && !self.reputation.is_isolated(now, peer.about.peer)
        })
    }

    pub(super) fn is_seed(&self, slot: Slot) -> bool {
        self.peers
            .get(slot)
            .is_some_and(|peer| peer.about.role == Role::Seed)
    }

    /// Whether two stand in the same zone.
    pub(super) fn is_near(&self, one: Slot, other: Slot) -> bool {
        let place = |slot: Slot| self.peers.get(slot).map(|peer| &peer.about.place);
        place(one)
            .zip(place(other))
            .is_some_and(|(one, other)| one.nearness(other) >= Nearness::Zone)
    }

    /// Seeds that are not isolated. One in its grace counts: it may be reading the origin all the while.
    pub(super) fn live_seeds(&self, now: Time) -> impl Iterator<Item = PeerId> + '_ {
        self.seeds
            .keys()
            .copied()
            .filter(move |seed| !self.reputation.is_isolated(now, *seed))
    }

    /// Names a parent to a child, and the child to the parent if that wants the task, too: it would have been told of the
    /// child, had it come second.
    fn link_both(&mut self, now: Time, task_slot: Slot, child: Slot, parent: Slot) {
        self.link(task_slot, child, parent);
        if self.is_namable(now, child) && self.link(task_slot, parent, child) {
            self.tell_soon(now, task_slot, parent);
        }
    }

    /// Makes `parent`, which has a copy, a parent of `child`. `false`: it is one, or the child has no room or no wish.
    fn link(&mut self, task_slot: Slot, child: Slot, parent: Slot) -> bool {
        // Near ones leave room for those elsewhere: without these a gateway is none.
        let kept_free = if self.has_zones() && self.is_near(child, parent) {
            FAR_PARENTS
        } else {
            0
        };
        let Some(task) = self.tasks.get_mut(task_slot).filter(|_| child != parent) else {
            return false;
        };
        let Some(want) = task.want_mut(child) else {
            return false;
        };
        if want.parents.len() >= MAX_PARENTS - kept_free || want.parents.contains(&parent) {
            return false;
        }
        want.parents.push(parent);
        if let Some(copy) = task.copy_mut(parent) {
            copy.children += 1;
        }
        let digest = task.digest;
        let Some(peer) = self.peers.get_mut(parent) else {
            return true;
        };
        peer.children += 1;
        let id = peer.about.peer;
        if let Some(peer) = self.peers.get_mut(child) {
            peer.name(id, &digest);
        }
        true
    }

    /// How many parents a child is still to get.
    fn room(&self, task_slot: Slot, child: Slot) -> usize {
        let Some(task) = self.tasks.get(task_slot) else {
            return 0;
        };
        let all_know_all = task.copies.len() <= MAX_PARENTS + 1;
        let target = if all_know_all {
            MAX_PARENTS
        } else {
            MESH_DEGREE
        };
        let Some(want) = task.copy(child).and_then(|copy| copy.want.as_deref()) else {
            return 0;
        };
        let near = want
            .parents
            .iter()
            .filter(|parent| !self.has_zones() || self.is_near(**parent, child));
        target.saturating_sub(near.count())
    }

    fn complete_parents(&self, task_slot: Slot, child: Slot) -> usize {
        let Some(task) = self.tasks.get(task_slot) else {
            return 0;
        };
        let Some(want) = task.copy(child).and_then(|copy| copy.want.as_deref()) else {
            return 0;
        };
        want.parents
            .iter()
            .filter(|parent| task.copy(**parent).is_some_and(|copy| copy.complete))
            .count()
    }

    /// The peers that bring the task into the swarm and may be named to this child: the elected peer; else seeds that
    /// have the task or are getting it; else the seed that owns it.
    pub(super) fn sources(
        &self,
        now: Time,
        task_slot: Slot,
        child: Slot,
        again: bool,
    ) -> Vec<Slot> {
        let Some(task) = self.tasks.get(task_slot) else {
            return Vec::new();
        };
        // A child's own wish makes it no source for itself.
        let part = |slot: Slot| task.copy(slot).filter(|_| slot != child);
        let mut seeds: Vec<Slot> = rendezvous::order(&task.digest, self.live_seeds(now))
            .into_iter()
            .filter_map(|seed| self.seeds.get(&seed).copied())
            .collect();
        // If nobody is elected, the child may know the issuer from elsewhere.
        let named = self
            .named_issuer(now, task_slot, child)
            .and_then(|issuer| self.by_id.get(&issuer).copied());
        let reader = task
            .elected()
            .or(named.filter(|issuer| self.is_namable(now, *issuer)));
        let sources: Vec<Slot> = match reader {
            Some(elected) => {
                let holders = seeds
                    .into_iter()
                    .filter(|seed| part(*seed).is_some_and(|copy| !copy.is_empty()));
                std::iter::once(elected)
                    .chain(holders.take(MAX_SEEDS))
                    .collect()
            }
            None => {
                seeds.sort_by_key(|seed| match part(*seed) {
                    Some(copy) if copy.complete => 0,
                    Some(_) => 1,
                    None => 2,
                });
                let involved = seeds.iter().filter(|seed| part(**seed).is_some()).count();
                seeds.truncate(involved.clamp(1, MAX_SEEDS));
                seeds
            }
        };
        let mut seeds_left = self.seeds_for(task, child).unwrap_or(usize::MAX);
        let is_named = |slot: &Slot| {
            let is_seed = self.is_seed(*slot);
            let may = !is_seed || seeds_left > 0;
            seeds_left = seeds_left.saturating_sub(usize::from(is_seed));
            may
        };
        let has_room = |slot: &Slot| {
            again
                || task
                    .copy(*slot)
                    .is_none_or(|copy| copy.children < SOURCE_CHILDREN)
        };
        sources
            .into_iter()
            .filter(is_named)
            .filter(|slot| *slot != child)
            .filter(has_room)
            .collect()
    }

    /// How many seeds are named to a child, if its application or its tag is limited in that.
    fn seeds_for(&self, task: &Task, child: Slot) -> Option<usize> {
        let purpose = task.copy(child)?.want.as_deref()?.purpose.as_deref()?;
        self.applications
            .of(&purpose.labels)
            .filter_map(|rule| rule.limits.seeds)
            .min()
            .map(|most| most as usize)
    }

    /// Some of those who have or will have pieces, with what speaks for and against them.
    fn candidates<R: Rng + ?Sized>(
        &self,
        now: Time,
        rng: &mut R,
        task_slot: Slot,
        child: Slot,
        tried: &[Slot],
        again: bool,
    ) -> Vec<Candidate> {
        let (Some(task), Some(peer)) = (self.tasks.get(task_slot), self.peers.get(child)) else {
            return Vec::new();
        };
        let named = task
            .copy(child)
            .and_then(|copy| copy.want.as_deref())
            .map_or(&[][..], |want| &want.parents);
        // If seeds are limited, they are named as sources alone.
        let without_seeds = self.seeds_for(task, child).is_some();
        let is_gateway = self.is_gateway(task_slot, child);
        let may = |copy: &&Copy| {
            // For whom those of its zone do not suffice, all may; a gateway has what it brings in from those who have all of it, too.
            let may = again || self.is_near(child, copy.peer) || is_gateway && copy.complete;
            may && !(without_seeds && self.is_seed(copy.peer))
        };
        sample(rng, &task.copies)
            .filter(may)
            .filter(|copy| {
                copy.peer != child
                    && !named.contains(&copy.peer)
                    && Some(copy.peer) != task.elected()
            })
            .filter(|copy| self.is_namable(now, copy.peer))
            .filter_map(|copy| {
                self.candidate(now, task, copy, &peer.about.place, tried, rng.random())
            })
            .collect()
    }

    fn candidate(
        &self,
        now: Time,
        task: &Task,
        copy: &Copy,
        place: &Place,
        tried: &[Slot],
        jitter: f32,
    ) -> Option<Candidate> {
        let peer = self.peers.get(copy.peer)?;
        // A seed that has it all is as good as anybody who has; any other is a source or nothing.
        if peer.about.role == Role::Seed && (!copy.complete || copy.children >= SOURCE_CHILDREN) {
            return None;
        }
        Some(Candidate {
            peer: copy.peer,
            complete: copy.complete,
            completeness: task.completeness(copy),
            load: peer.load(),
            nearness: peer.about.place.nearness(place),
            suspicion: self.reputation.suspicion(now, peer.about.peer),
            tried: tried.contains(&copy.peer),
            jitter,
        })
    }

    pub(super) fn tell_soon(&mut self, now: Time, task_slot: Slot, child: Slot) {
        let told = self
            .tasks
            .get_mut(task_slot)
            .and_then(|task| task.want_mut(child))
            .map_or(0, |want| want.told);
        self.tell_at(
            now + PUSH_DELAY * (1 << told.min(PUSH_DOUBLINGS)),
            task_slot,
            child,
        );
    }

    /// Tells a child its parents at `due`, or when it is told anyway before that.
    pub(super) fn tell_at(&mut self, due: Time, task_slot: Slot, child: Slot) {
        let Some(want) = self
            .tasks
            .get_mut(task_slot)
            .and_then(|task| task.want_mut(child))
        else {
            return;
        };
        if want.push_at.is_none_or(|at| due < at) {
            want.push_at = Some(due);
            self.timers.insert((due, Timer::Push(task_slot, child)));
        }
    }
}

/// All copies when they are few, else [`SAMPLE`] of them (fewer where chance picks one twice).
fn sample<'a, R: Rng + ?Sized>(
    rng: &mut R,
    copies: &'a [Copy],
) -> impl Iterator<Item = &'a Copy> + use<'a, R> {
    let mut picks: Vec<usize> = if copies.len() <= SAMPLE {
        (0..copies.len()).collect()
    } else {
        (0..SAMPLE)
            .map(|_| rng.random_range(0..copies.len()))
            .collect()
    };
    picks.sort_unstable();
    picks.dedup();
    picks.into_iter().filter_map(|at| copies.get(at))
}
