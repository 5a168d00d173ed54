//! The gateways of a zone: the peers that bring a task into it. Each takes a share of the pieces from other zones; all
//! others take their pieces from their own zone. So each piece comes over the dear link once.
//!
//! The first peers that want the task in a zone become its gateways, one share each. The first of them also takes the
//! shares left over at [`SETTLES_AFTER`]. The share of a peer that is gone falls to the next peer that is told its
//! parents. In the zone of a source, and if a near parent holds everything, nothing is taken from elsewhere: gateways
//! there only give.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use super::slab::Slot;
use super::task::Copy;
use super::{Swarm, Timer};
use crate::Time;
use crate::share::{SHARES, Share};

/// How long shares that nobody took wait for more gateways: in a burst they come within this time.
const SETTLES_AFTER: Duration = Duration::from_millis(50);

/// Parents in other zones for one gateway: the one there with the same share, who has its pieces first, and some more.
pub(super) const FAR_PARENTS: usize = 8;

/// The gateways of one zone with their shares.
#[derive(Clone, Debug)]
pub(super) struct Gateways {
    takers: [Option<Slot>; SHARES as usize],
    since: Time,
}

impl Gateways {
    const fn new(now: Time) -> Self {
        Self {
            takers: [None; SHARES as usize],
            since: now,
        }
    }

    fn shares(&self, taker: Option<Slot>) -> impl Iterator<Item = usize> + '_ {
        (0..)
            .zip(&self.takers)
            .filter(move |(_, other)| **other == taker)
            .map(|(share, _)| share)
    }

    fn has(&self, slot: Slot) -> bool {
        self.takers.contains(&Some(slot))
    }

    /// Gives one more peer the free shares, `most` of them, or one share of a peer that has several; returns the
    /// former owner.
    fn add(&mut self, slot: Slot, most: usize) -> Option<Slot> {
        let free: Vec<usize> = self.shares(None).take(most).collect();
        free.iter()
            .for_each(|share| self.takers[*share] = Some(slot));
        if !free.is_empty() || self.has(slot) {
            return None;
        }
        let count = |taker: Slot| self.shares(Some(taker)).count();
        let richest = self
            .takers
            .iter()
            .flatten()
            .copied()
            .max_by_key(|taker| count(*taker))?;
        let share = self
            .shares(Some(richest))
            .last()
            .filter(|_| count(richest) > 1)?;
        self.takers[share] = Some(slot);
        Some(richest)
    }
}

/// The gateways of one task, by zone.
pub(super) type Zones = BTreeMap<Arc<str>, Gateways>;

impl Swarm {
    /// Whether there is more than one zone.
    pub(super) fn has_zones(&self) -> bool {
        self.zones.len() > 1
    }

    /// Makes a child a gateway of its zone where that needs one.
    pub(super) fn open_gate(&mut self, now: Time, task_slot: Slot, child: Slot) {
        let (Some(task), Some(peer)) = (self.tasks.get(task_slot), self.peers.get(child)) else {
            return;
        };
        let wants = task
            .copy(child)
            .and_then(|copy| copy.want.as_deref())
            .is_some_and(|want| !want.partial);
        if !self.has_zones() || !wants || self.is_seed(child) {
            return;
        }
        let zone = Arc::clone(&peer.about.place.zone);
        let here = self.zones.get(&zone).copied().unwrap_or(1).clamp(1, SHARES);
        let is_new = !task.gateways.contains_key(&zone);
        let mut gateways = task
            .gateways
            .get(&zone)
            .cloned()
            .unwrap_or_else(|| Gateways::new(now));
        for taker in &mut gateways.takers {
            let brings = |copy: &Copy| copy.complete || copy.want.is_some();
            let counts =
                |slot: &Slot| task.copy(*slot).is_some_and(brings) && self.is_namable(now, *slot);
            *taker = taker.filter(|slot| counts(slot) && self.is_near(*slot, child));
        }
        let settled = now.since(gateways.since) >= SETTLES_AFTER;
        let most = if settled {
            SHARES
        } else {
            SHARES.div_ceil(here)
        };
        let most = if gateways.has(child) && !settled {
            0
        } else {
            most as usize
        };
        let poorer = gateways.add(child, most);
        if let Some(task) = self.tasks.get_mut(task_slot) {
            task.gateways.insert(zone, gateways);
        }
        if let Some(poorer) = poorer {
            self.tell_soon(now, task_slot, poorer);
        }
        if is_new && here > 1 {
            self.timers
                .insert((now + SETTLES_AFTER, Timer::Settle(task_slot, child)));
        }
    }

    /// A peer gives up, or is gone: somebody of its zone is told soon, and takes its share over.
    pub(super) fn close_gate(&mut self, now: Time, task_slot: Slot, slot: Slot) {
        if !self.has_zones() || !self.is_gateway(task_slot, slot) {
            return;
        }
        let Some(task) = self.tasks.get(task_slot) else {
            return;
        };
        let heir = task
            .wanters()
            .find(|wanter| *wanter != slot && self.is_near(*wanter, slot));
        if let Some(heir) = heir {
            self.tell_soon(now, task_slot, heir);
        }
    }

    /// The gateways of a peer's zone.
    fn gateways(&self, task_slot: Slot, slot: Slot) -> Option<&Gateways> {
        self.tasks
            .get(task_slot)?
            .gateways
            .get(&self.peers.get(slot)?.about.place.zone)
    }

    /// Whether a peer is a gateway of its zone.
    pub(super) fn is_gateway(&self, task_slot: Slot, slot: Slot) -> bool {
        self.gateways(task_slot, slot)
            .is_some_and(|gateways| gateways.has(slot))
    }

    /// Parents in other zones for a gateway: gateways there.
    pub(super) fn far_parents(&self, now: Time, task_slot: Slot, child: Slot) -> Vec<Slot> {
        let (Some(task), Some(peer)) = (self.tasks.get(task_slot), self.peers.get(child)) else {
            return Vec::new();
        };
        let own = self.gateways(task_slot, child).into_iter();
        let shares: BTreeSet<usize> = own.flat_map(|own| own.shares(Some(child))).collect();
        if shares.is_empty() {
            return Vec::new();
        }
        let elsewhere = task
            .gateways
            .iter()
            .filter(|(zone, _)| **zone != peer.about.place.zone);
        let mut ranked: BTreeMap<Slot, (bool, Slot)> = BTreeMap::new();
        for (share, taker) in elsewhere.flat_map(|(_, gateways)| (0..).zip(gateways.takers)) {
            let Some(taker) =
                taker.filter(|taker| task.copy(*taker).is_some() && self.is_namable(now, *taker))
            else {
                continue;
            };
            // After those with the same share by a lot of this pair, so that not all name the same.
            let lot = (taker ^ child).wrapping_mul(0x9e37_79b1);
            let rank = ranked.entry(taker).or_insert((true, lot));
            rank.0 &= !shares.contains(&share);
        }
        let mut ranked: Vec<((bool, Slot), Slot)> = ranked
            .into_iter()
            .map(|(slot, rank)| (rank, slot))
            .collect();
        ranked.sort_unstable();
        ranked
            .into_iter()
            .take(FAR_PARENTS)
            .map(|(_, slot)| slot)
            .collect()
    }

    /// The share that a child takes from other zones.
    pub(super) fn share(&self, now: Time, task_slot: Slot, child: Slot) -> Share {
        let Some(task) = self.tasks.get(task_slot) else {
            return Share::ALL;
        };
        let want = task.copy(child).and_then(|copy| copy.want.as_deref());
        // A child whose own zone did not suffice takes all from anywhere.
        if !self.has_zones() || self.is_seed(child) || want.is_none_or(|want| want.again) {
            return Share::ALL;
        }
        let has_all = |parent: &Slot| {
            self.is_near(*parent, child) && task.copy(*parent).is_some_and(|copy| copy.complete)
        };
        let brings = |source: Slot| {
            let is_complete = task.copy(source).is_some_and(|copy| copy.complete);
            let reads = match task.elected() {
                Some(elected) => source == elected,
                None => self.is_namable(now, source),
            };
            (is_complete || reads) && self.is_near(source, child)
        };
        if want.is_some_and(|want| want.parents.iter().any(has_all))
            || self
                .sources(now, task_slot, child, true)
                .into_iter()
                .any(brings)
        {
            return Share::NONE;
        }
        let gateways = self.gateways(task_slot, child);
        gateways.map_or(Share::NONE, |gateways| {
            Share::of(gateways.shares(Some(child)))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_share_has_one_taker_and_who_has_several_gives_way() {
        let mut gateways = Gateways::new(Time::default());
        assert_eq!(gateways.add(1, SHARES as usize), None);
        assert_eq!(Share::of(gateways.shares(Some(1))), Share::ALL);
        for newcomer in 2..=SHARES {
            let poorer = gateways.add(newcomer, 1);
            assert!(poorer.is_some_and(|poorer| poorer < newcomer), "{newcomer}");
            assert_eq!(gateways.shares(Some(newcomer)).count(), 1);
        }
        assert_eq!(gateways.add(SHARES + 1, 1), None);
        assert!(!gateways.has(SHARES + 1), "there are enough");
        assert!((1..=SHARES).all(|taker| gateways.shares(Some(taker)).count() == 1));
    }
}
