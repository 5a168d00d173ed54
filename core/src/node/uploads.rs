//! The choice of the child to serve next, and of the children to send elsewhere. Few are served at a time. The most
//! urgent request comes first, then the piece that the fewest hold.
//!
//! While a more urgent request is served or waits, no less urgent one is begun beside it: they would share one link.
//! But one request of [`LESS_URGENT_ONE_IN`] is the oldest of the less urgent ones, and they are served when no more
//! urgent one was begun for [`LESS_URGENT_AFTER`]. So none of them waits for ever, and a slow urgent child delays
//! nobody. Prefetches have no such share.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::Time;
use crate::application::Priority;
use crate::piece::{PeerId, PieceIndex};
use hawker_oci::digest::Digest;

/// Requests that wait at most, over all children; past it the answer is "busy".
const WAITING: usize = 1024;

/// Requests that one child may have waiting.
const WAITING_A_CHILD: usize = 32;

/// One child gets half of the slots, and so many at least: one that asks and does not read keeps the rest from nobody. A connection
/// sends no more at once.
const SLOTS_A_CHILD_MIN: usize = 2;

/// How long a request may wait: past it the answer is "busy" too, well before the child takes the silence for a stall.
const WAITS_AT_MOST: Duration = Duration::from_secs(10);

/// The part of all requests that goes to less urgent ones while more urgent ones wait.
const LESS_URGENT_ONE_IN: u32 = 8;

/// When nothing as urgent was begun for so long, what is sent has left room: less urgent requests are begun beside it.
const LESS_URGENT_AFTER: Duration = Duration::from_secs(2);

/// A piece that fewer children than this hold goes first (without news from an issuer: that fewer children are sent).
/// While it is sent, others get half of the slots. Each copy of it soon becomes many: beside seven other pieces it
/// would take eight times as long.
const FEW: u16 = 3;

/// A request that has waited for so long counts as rare: rare pieces may come without end.
const RARE_AFTER: Duration = Duration::from_secs(2);

/// A request that waits for a slot.
#[derive(Clone, Debug)]
pub(super) struct Waiting {
    pub(super) peer: PeerId,
    pub(super) request: u32,
    pub(super) task: Digest,
    pub(super) piece: PieceIndex,
    /// Nobody waits for it there.
    pub(super) prefetch: bool,
    pub(super) priority: Priority,
    pub(super) since: Time,
}

/// The rank of a request; the least is served first.
type Turn = (bool, Priority);

/// A piece that is being sent.
#[derive(Clone, Copy, Debug)]
struct Active {
    task: Digest,
    piece: PieceIndex,
    turn: Turn,
    /// It was begun as what few hold.
    is_rare: bool,
}

impl Waiting {
    /// All prefetches have the same rank.
    fn turn(&self) -> Turn {
        (
            self.prefetch,
            if self.prefetch {
                Priority::LAST
            } else {
                self.priority
            },
        )
    }
}

/// The upload slots and who waits for them.
#[derive(Clone, Debug)]
pub(super) struct Uploads {
    slots: usize,
    waiting: Vec<Waiting>,
    active: BTreeMap<(PeerId, u32), Active>,
    /// How many were begun before less urgent ones since one of these was.
    overtaken: u32,
    /// When one was last begun.
    begun: Time,
}

impl Uploads {
    pub(super) const fn new(slots: usize) -> Self {
        Self {
            slots: if slots == 0 { 1 } else { slots },
            waiting: Vec::new(),
            active: BTreeMap::new(),
            overtaken: 0,
            begun: Time(Duration::ZERO),
        }
    }

    /// Sends at most this many at once from now on.
    pub(super) const fn set_slots(&mut self, slots: usize) {
        self.slots = if slots == 0 { 1 } else { slots };
    }

    /// Puts a request in the queue. If the queue is full, one request goes elsewhere: the last of the least urgent
    /// ones if these are less urgent than the new one, else the new one.
    pub(super) fn wait(&mut self, waiting: Waiting) -> Option<Waiting> {
        let theirs = self
            .waiting
            .iter()
            .filter(|w| w.peer == waiting.peer)
            .count();
        let child_full = theirs >= WAITING_A_CHILD;
        if !child_full && self.waiting.len() < WAITING {
            self.waiting.push(waiting);
            return None;
        }
        let gives_way =
            |w: &Waiting| w.turn() > waiting.turn() && (!child_full || w.peer == waiting.peer);
        let last = self
            .waiting
            .iter()
            .enumerate()
            .filter(|(_, w)| gives_way(w));
        match last.max_by_key(|(at, w)| (w.turn(), *at)).map(|(at, _)| at) {
            Some(at) => {
                let gone = self.waiting.remove(at);
                self.waiting.push(waiting);
                Some(gone)
            }
            None => Some(waiting),
        }
    }

    /// Takes out those who have waited for too long.
    pub(super) fn overdue(&mut self, now: Time) -> Vec<Waiting> {
        self.waiting
            .extract_if(.., |w| now.since(w.since) >= WAITS_AT_MOST)
            .collect()
    }

    /// The next request to serve, if a slot is free and it `may` go: the most urgent, of these what [`FEW`] hold, the rarest first,
    /// then the child that is sent least, then the oldest; and now and then the oldest of the less urgent ones (see the module).
    /// By how rare a piece is beyond that, some would wait for ever while newer ones come; the askers choose what is rare.
    pub(super) fn next(
        &mut self,
        now: Time,
        spread: impl Fn(&Waiting) -> u16,
        may: impl Fn(&Waiting) -> bool,
    ) -> Option<Waiting> {
        if !self.has_slot() {
            return None;
        }
        let rarity = |w: &Waiting| {
            if now.since(w.since) >= RARE_AFTER {
                0
            } else {
                spread(w).min(FEW)
            }
        };
        let sent_to = |peer: PeerId| self.active.keys().filter(|(whom, _)| *whom == peer).count();
        let slots_a_child = self.slots.div_ceil(2).max(SLOTS_A_CHILD_MIN);
        let may = |w: &Waiting| sent_to(w.peer) < slots_a_child && may(w);
        let all = || self.waiting.iter().enumerate().filter(|(_, w)| may(w));
        let active = self.active.values().map(|active| active.turn);
        let most_urgent = all().map(|(_, w)| w.turn()).chain(active).min()?;
        let overtaken = all().filter(|(_, w)| !w.prefetch && w.turn() > most_urgent);
        let overtaken = overtaken.min_by_key(|(_, w)| w.since).map(|(at, _)| at);
        let others_turn = match all().any(|(_, w)| w.turn() == most_urgent) {
            true => self.overtaken + 1 >= LESS_URGENT_ONE_IN,
            false => now.since(self.begun) >= LESS_URGENT_AFTER,
        };
        let at = match overtaken {
            Some(at) if others_turn => {
                self.overtaken = 0;
                at
            }
            _ => {
                let ordinary = self
                    .active
                    .values()
                    .filter(|active| !active.is_rare)
                    .count();
                let rare_only = ordinary >= self.slots.div_ceil(2)
                    && self
                        .active
                        .values()
                        .any(|active| active.is_rare && active.turn <= most_urgent);
                let equals = all()
                    .filter(|(_, w)| w.turn() == most_urgent)
                    .map(|(at, w)| (at, w, rarity(w)));
                let first = equals.filter(|(.., rarity)| !rare_only || *rarity < FEW);
                let (at, ..) =
                    first.min_by_key(|(_, w, rarity)| (*rarity, sent_to(w.peer), w.since))?;
                self.overtaken = if overtaken.is_some() {
                    self.overtaken + 1
                } else {
                    0
                };
                self.begun = now;
                at
            }
        };
        let next = self.waiting.remove(at);
        let active = Active {
            task: next.task,
            piece: next.piece,
            turn: next.turn(),
            is_rare: rarity(&next) < FEW,
        };
        self.active.insert((next.peer, next.request), active);
        Some(next)
    }

    /// Whether more could be sent at once.
    pub(super) fn has_slot(&self) -> bool {
        self.active.len() < self.slots
    }

    /// Whether anybody waits.
    pub(super) const fn is_waited_for(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Whether nothing waits, and nothing is sent either or, as far as that matters, a slot is free.
    pub(super) fn is_idle(&self, entirely: bool) -> bool {
        !self.is_waited_for()
            && if entirely {
                self.active.is_empty()
            } else {
                self.has_slot()
            }
    }

    /// Which piece is being sent under this number.
    pub(super) fn what(&self, peer: PeerId, request: u32) -> Option<(Digest, PieceIndex)> {
        self.active
            .get(&(peer, request))
            .map(|active| (active.task, active.piece))
    }

    pub(super) fn over(&mut self, peer: PeerId, request: u32) {
        self.active.remove(&(peer, request));
    }

    pub(super) fn cancel(&mut self, peer: PeerId, request: u32) {
        // One that is being sent is ended by the transport, which then says that it is over.
        self.waiting
            .retain(|w| (w.peer, w.request) != (peer, request));
    }

    pub(super) fn peer_gone(&mut self, peer: PeerId) {
        self.waiting.retain(|w| w.peer != peer);
        self.active.retain(|(whom, _), _| *whom != peer);
    }

    pub(super) fn task_gone(&mut self, task: &Digest) {
        self.waiting.retain(|w| w.task != *task);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use hawker_oci::digest::Algorithm;

    const SLOTS: usize = 2;

    fn at(millis: u64) -> Time {
        Time(Duration::from_millis(millis))
    }

    fn task(n: u8) -> Digest {
        Digest::of(Algorithm::Sha256, &[n])
    }

    fn asks(peer: u8, request: u32, prefetch: bool) -> Waiting {
        let (since, priority) = (at(u64::from(request)), Priority::default());
        Waiting {
            peer: PeerId([peer; 16]),
            request,
            task: task(1),
            piece: request,
            prefetch,
            priority,
            since,
        }
    }

    fn urgent(peer: u8, request: u32, level: u32) -> Waiting {
        Waiting {
            priority: Priority::new(level).unwrap(),
            ..asks(peer, request, false)
        }
    }

    /// The numbers of all that are served, one after the other.
    fn served(uploads: &mut Uploads, may: impl Fn(&Waiting) -> bool) -> Vec<u32> {
        let mut served = Vec::new();
        while let Some(next) = uploads.next(at(0), |_| 1, &may) {
            uploads.over(next.peer, next.request);
            served.push(next.request);
        }
        served
    }

    #[test]
    fn what_somebody_waits_for_goes_before_what_is_prefetched() {
        let mut uploads = Uploads::new(SLOTS);
        for waiting in [
            asks(1, 1, true),
            asks(2, 2, false),
            asks(1, 3, true),
            asks(3, 4, false),
        ] {
            assert!(uploads.wait(waiting).is_none());
        }
        assert_eq!(served(&mut uploads, |_| true), [2, 4, 1, 3]);
    }

    #[test]
    fn beside_what_few_hold_others_get_half_of_the_slots() {
        let mut uploads = Uploads::new(4);
        for waiting in (1..=8).map(|n| asks(n, u32::from(n), false)) {
            assert!(uploads.wait(waiting).is_none());
        }
        let rare = |waiting: &Waiting| if waiting.request == 8 { 2 } else { FEW };
        let mut begun = Vec::new();
        begun.extend(std::iter::from_fn(|| uploads.next(at(0), rare, |_| true)).map(|w| w.request));
        assert_eq!(
            begun,
            [8, 1, 2],
            "what few hold comes first, whenever it was asked for"
        );
        // One more that few hold finds a slot; when none is sent, all slots are everybody's.
        assert!(uploads.wait(asks(9, 9, false)).is_none());
        let rare = |waiting: &Waiting| if waiting.request == 9 { 2 } else { FEW };
        assert_eq!(
            uploads.next(at(0), rare, |_| true).map(|w| w.request),
            Some(9)
        );
        uploads.over(PeerId([8; 16]), 8);
        assert!(uploads.next(at(0), rare, |_| true).is_none());
        uploads.over(PeerId([9; 16]), 9);
        let rest = std::iter::from_fn(|| uploads.next(at(0), |_| FEW, |_| true)).map(|w| w.request);
        assert_eq!(rest.collect::<Vec<_>>(), [3, 4]);
    }

    #[test]
    fn what_few_hold_holds_nobody_up_for_ever_nor_the_less_urgent() {
        let mut uploads = Uploads::new(4);
        assert!(uploads.wait(urgent(1, 1, 0)).is_none());
        assert!(uploads.wait(urgent(2, 2, 6)).is_none());
        let rare = |waiting: &Waiting| if waiting.request > 2 { 0 } else { FEW };
        let mut begun = Vec::new();
        for n in 3..200 {
            assert!(uploads.wait(urgent(3, n, 0)).is_none());
            let next = uploads
                .next(at(u64::from(n) * 100), rare, |_| true)
                .unwrap();
            uploads.over(next.peer, next.request);
            begun.push(next.request);
        }
        let turn = |n| begun.iter().position(|request| *request == n).unwrap();
        assert!(
            turn(2) < LESS_URGENT_ONE_IN as usize,
            "one in so many is less urgent"
        );
        assert!(turn(1) * 100 < 2 * RARE_AFTER.as_millis() as usize);
    }

    #[test]
    fn what_is_less_urgent_and_rare_does_not_hold_up_what_is_urgent() {
        let mut uploads = Uploads::new(4);
        assert!(uploads.wait(urgent(1, 1, 6)).is_none());
        assert_eq!(
            uploads.next(at(0), |_| 0, |_| true).map(|w| w.request),
            Some(1)
        );
        for waiting in (2..=4).map(|n| urgent(n, u32::from(n), 0)) {
            assert!(uploads.wait(waiting).is_none());
        }
        let begun =
            std::iter::from_fn(|| uploads.next(at(0), |_| FEW, |_| true)).map(|w| w.request);
        assert_eq!(begun.collect::<Vec<_>>(), [2, 3, 4]);
    }

    #[test]
    fn what_is_prefetched_is_not_begun_beside_anything_else() {
        let mut uploads = Uploads::new(SLOTS);
        for waiting in [asks(1, 1, true), asks(2, 2, false)] {
            let _ = uploads.wait(waiting);
        }
        assert_eq!(
            uploads.next(at(0), |_| 1, |_| true).map(|w| w.request),
            Some(2)
        );
        // The next request of the one who is served may be on its way.
        assert!(uploads.next(at(0), |_| 1, |_| true).is_none());
        uploads.over(PeerId([2; 16]), 2);
        assert_eq!(
            uploads.next(at(0), |_| 1, |_| true).map(|w| w.request),
            Some(1)
        );
    }

    #[test]
    fn a_full_queue_sends_away_what_nobody_waits_for_first() {
        let a_child = WAITING_A_CHILD as u32;
        let mut uploads = Uploads::new(SLOTS);
        (0..a_child)
            .for_each(|request| assert!(uploads.wait(asks(1, request, request == 3)).is_none()));
        // (the request, whether it is prefetched, who has to go)
        for (request, prefetch, gone) in [(100, true, 100), (101, false, 3), (102, false, 102)] {
            let told = uploads.wait(asks(1, request, prefetch)).map(|w| w.request);
            assert_eq!(told, Some(gone), "{request}");
        }
        // Another child still finds room, until all of it is taken.
        let more = (WAITING as u32 - a_child) / a_child;
        for (child, request) in
            (2..2 + more).flat_map(|child| (0..a_child).map(move |r| (child, r)))
        {
            assert!(
                uploads
                    .wait(asks(child as u8, request, child == 2))
                    .is_none()
            );
        }
        let gone = uploads.wait(asks(200, 1, false)).expect("it is full");
        assert_eq!((gone.peer, gone.prefetch), (PeerId([2; 16]), true));
    }

    #[test]
    fn a_child_that_does_not_read_leaves_slots_to_others() {
        let mut uploads = Uploads::new(8);
        for request in 0..8 {
            let _ = uploads.wait(asks(1, request, false));
        }
        let begun = std::iter::from_fn(|| uploads.next(at(0), |_| 1, |_| true)).count();
        assert_eq!(begun, 4);
        let _ = uploads.wait(asks(2, 100, false));
        assert_eq!(
            uploads.next(at(0), |_| 1, |_| true).map(|w| w.request),
            Some(100)
        );
    }

    #[test]
    fn changed_slots_count_for_the_next_request() {
        let mut uploads = Uploads::new(2);
        for request in 0..12 {
            let _ = uploads.wait(asks(request as u8, request, false));
        }
        let mut begin = |slots| {
            uploads.set_slots(slots);
            std::iter::from_fn(|| uploads.next(at(0), |_| 1, |_| true)).count()
        };
        assert_eq!([begin(2), begin(6), begin(3), begin(0)], [2, 4, 0, 0]);
        (0..5).for_each(|request| uploads.over(PeerId([request as u8; 16]), request));
        assert_eq!(uploads.active.len(), 1);
        uploads.set_slots(3);
        assert_eq!(
            std::iter::from_fn(|| uploads.next(at(0), |_| 1, |_| true)).count(),
            2
        );
    }

    #[test]
    fn who_has_waited_for_too_long_is_sent_elsewhere() {
        let mut uploads = Uploads::new(SLOTS);
        let late = WAITS_AT_MOST + Duration::from_millis(5);
        for request in 0..10 {
            let _ = uploads.wait(asks(1, request, false));
        }
        let overdue: Vec<u32> = uploads
            .overdue(Time(late))
            .iter()
            .map(|w| w.request)
            .collect();
        assert_eq!(overdue, [0, 1, 2, 3, 4, 5]);
        assert_eq!(served(&mut uploads, |_| true), [6, 7, 8, 9]);
    }

    #[test]
    fn a_task_that_may_not_go_keeps_no_other_from_its_turn() {
        let mut uploads = Uploads::new(SLOTS);
        let other = Waiting {
            task: task(2),
            ..asks(2, 7, false)
        };
        for waiting in [asks(1, 1, false), other] {
            let _ = uploads.wait(waiting);
        }
        assert_eq!(served(&mut uploads, |waiting| waiting.task == task(2)), [7]);
        assert!(!uploads.is_idle(false));
    }

    #[test]
    fn what_is_urgent_goes_first_and_the_rest_gets_its_share() {
        let mut uploads = Uploads::new(SLOTS);
        for n in 0..16 {
            let _ = uploads.wait(urgent(1, n, 6));
            let _ = uploads.wait(urgent(2, 100 + n, 1));
        }
        let order = served(&mut uploads, |_| true);
        let urgent: Vec<usize> = (0..order.len()).filter(|at| order[*at] >= 100).collect();
        // Two of the others go among them, the oldest first, and each after seven.
        assert_eq!(urgent.last(), Some(&17), "{order:?}");
        assert_eq!((order[7], order[15]), (0, 1), "{order:?}");
        let rest: Vec<u32> = order.into_iter().filter(|request| *request < 100).collect();
        assert_eq!(rest, (0..16).collect::<Vec<u32>>());
    }

    #[test]
    fn what_is_less_urgent_is_not_begun_beside_what_is_more_so_unless_that_is_slow() {
        let mut uploads = Uploads::new(4);
        for waiting in [urgent(1, 1, 4), urgent(2, 2, 2), urgent(3, 3, 4)] {
            let _ = uploads.wait(waiting);
        }
        let next = |uploads: &mut Uploads, millis| {
            uploads.next(at(millis), |_| 1, |_| true).map(|w| w.request)
        };
        assert_eq!(next(&mut uploads, 0), Some(2));
        assert_eq!(next(&mut uploads, 1999), None);
        assert_eq!(next(&mut uploads, 2000), Some(1));
        assert_eq!(
            next(&mut uploads, 2000),
            Some(3),
            "what the slow one leaves is theirs, not one request of it"
        );
        let _ = uploads.wait(urgent(4, 4, 2));
        let _ = uploads.wait(urgent(1, 5, 4));
        assert_eq!(
            next(&mut uploads, 2001),
            Some(4),
            "until somebody as urgent comes"
        );
    }

    #[test]
    fn a_full_queue_sends_away_the_least_urgent_first() {
        let a_child = WAITING_A_CHILD as u32;
        let mut uploads = Uploads::new(SLOTS);
        let levels = [4, 6, 5, 6];
        (0..a_child).for_each(|n| {
            assert!(
                uploads
                    .wait(urgent(1, n, *levels.get(n as usize).unwrap_or(&3)))
                    .is_none()
            )
        });
        // (the request, its level, who has to go)
        for (request, level, gone) in [
            (100, 6, 100),
            (101, 3, 3),
            (102, 5, 1),
            (103, 3, 102),
            (104, 3, 2),
        ] {
            let told = uploads.wait(urgent(1, request, level)).map(|w| w.request);
            assert_eq!(told, Some(gone), "{request}");
        }
    }

    proptest! {
        /// Each request is served after a bounded number of others, and equal requests in their order.
        #[test]
        fn nobody_waits_for_ever_and_most_of_what_is_sent_is_the_most_urgent(
            levels in prop::collection::vec(0..=6u32, 1..24), steady in 0..=5u32,
        ) {
            let mut uploads = Uploads::new(SLOTS);
            for (n, level) in levels.iter().enumerate() {
                let _ = uploads.wait(urgent(n as u8, n as u32, *level));
            }
            let less: Vec<u32> = (0..).zip(&levels).filter(|(_, level)| **level > steady).map(|(n, _)| n).collect();
            let (mut late, mut urgent_ones) = (Vec::new(), 0u32);
            // Something more urgent always waits as well.
            for n in 0..LESS_URGENT_ONE_IN * (levels.len() as u32 + 1) {
                let _ = uploads.wait(urgent(200, 1000 + n, steady));
                let next = uploads.next(at(5000), |_| 1, |_| true).unwrap();
                uploads.over(next.peer, next.request);
                if less.contains(&next.request) {
                    late.push(next.request);
                } else {
                    urgent_ones += 1;
                }
            }
            prop_assert_eq!(&late, &less, "each has gone, the oldest first");
            prop_assert!(urgent_ones >= (LESS_URGENT_ONE_IN - 1) * late.len() as u32);
        }
    }
}
