//! Whom to serve next, and whom to send elsewhere: few at a time, what somebody waits for and the fewest hold first.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::Time;
use crate::digest::Digest;
use crate::piece::{PeerId, PieceIndex};

/// Requests that wait at most, over all children; past it the answer is "busy".
const WAITING: usize = 1024;

/// Requests that one child may have waiting.
const WAITING_A_CHILD: usize = 32;

/// How long a request may wait: past it the answer is "busy" too, well before the child takes the silence for a stall.
const WAITS_AT_MOST: Duration = Duration::from_secs(10);

/// A request that waits for a slot.
#[derive(Clone, Debug)]
pub(super) struct Waiting {
    pub(super) peer: PeerId,
    pub(super) request: u32,
    pub(super) task: Digest,
    pub(super) piece: PieceIndex,
    /// Nobody waits for it there.
    pub(super) prefetch: bool,
    pub(super) since: Time,
}

/// The upload slots and who waits for them.
#[derive(Clone, Debug)]
pub(super) struct Uploads {
    slots: usize,
    waiting: Vec<Waiting>,
    /// And whether each is of what nobody waits for.
    active: BTreeMap<(PeerId, u32), bool>,
}

impl Uploads {
    pub(super) const fn new(slots: usize) -> Self {
        Self { slots: if slots == 0 { 1 } else { slots }, waiting: Vec::new(), active: BTreeMap::new() }
    }

    /// Puts a request in the queue. Who has to go elsewhere when that is full: whoever asked last for what nobody waits for,
    /// else this one.
    pub(super) fn wait(&mut self, waiting: Waiting) -> Option<Waiting> {
        let theirs = self.waiting.iter().filter(|w| w.peer == waiting.peer).count();
        let child_full = theirs >= WAITING_A_CHILD;
        if !child_full && self.waiting.len() < WAITING {
            self.waiting.push(waiting);
            return None;
        }
        if waiting.prefetch {
            return Some(waiting);
        }
        let gives_way = |w: &Waiting| w.prefetch && (!child_full || w.peer == waiting.peer);
        match self.waiting.iter().rposition(gives_way) {
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
        self.waiting.extract_if(.., |w| now.since(w.since) >= WAITS_AT_MOST).collect()
    }

    /// The next request to serve, if a slot is free and its task `may` go: what nobody else holds, then the child that is sent
    /// least, then the oldest. What nobody waits for is begun while nothing else is sent or waits: all share one link.
    /// By how rare a piece is beyond that, some would wait for ever while newer ones come; the askers choose what is rare.
    pub(super) fn next(
        &mut self,
        spread: impl Fn(&Waiting) -> u16,
        may: impl Fn(&Digest) -> bool,
    ) -> Option<Waiting> {
        if self.active.len() >= self.slots {
            return None;
        }
        let sent_to = |peer: PeerId| self.active.keys().filter(|(whom, _)| *whom == peer).count();
        let others_wait = self.active.values().any(|prefetch| !prefetch);
        let (at, _) = self
            .waiting
            .iter()
            .enumerate()
            .filter(|(_, w)| may(&w.task) && !(w.prefetch && others_wait))
            .min_by_key(|(_, w)| (w.prefetch, spread(w).min(1), sent_to(w.peer), w.since))?;
        let next = self.waiting.remove(at);
        self.active.insert((next.peer, next.request), next.prefetch);
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

    /// Whether nothing is sent and nothing waits.
    pub(super) fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.active.len() < self.slots
    }

    pub(super) fn over(&mut self, peer: PeerId, request: u32) {
        self.active.remove(&(peer, request));
    }

    pub(super) fn cancel(&mut self, peer: PeerId, request: u32) {
        // One that is being sent is ended by the transport, which then says that it is over.
        self.waiting.retain(|w| (w.peer, w.request) != (peer, request));
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
    use super::*;
    use crate::digest::Algorithm;

    const SLOTS: usize = 2;

    fn at(millis: u64) -> Time {
        Time(Duration::from_millis(millis))
    }

    fn task(n: u8) -> Digest {
        Digest::of(Algorithm::Sha256, &[n])
    }

    fn asks(peer: u8, request: u32, prefetch: bool) -> Waiting {
        let since = at(u64::from(request));
        Waiting { peer: PeerId([peer; 16]), request, task: task(1), piece: request, prefetch, since }
    }

    /// The numbers of all that are served, one after the other.
    fn served(uploads: &mut Uploads, may: impl Fn(&Digest) -> bool) -> Vec<u32> {
        let mut served = Vec::new();
        while let Some(next) = uploads.next(|_| 1, &may) {
            uploads.over(next.peer, next.request);
            served.push(next.request);
        }
        served
    }

    #[test]
    fn what_somebody_waits_for_goes_before_what_is_prefetched() {
        let mut uploads = Uploads::new(SLOTS);
        for waiting in [asks(1, 1, true), asks(2, 2, false), asks(1, 3, true), asks(3, 4, false)] {
            assert!(uploads.wait(waiting).is_none());
        }
        assert_eq!(served(&mut uploads, |_| true), [2, 4, 1, 3]);
    }

    #[test]
    fn what_is_prefetched_is_not_begun_beside_anything_else() {
        let mut uploads = Uploads::new(SLOTS);
        for waiting in [asks(1, 1, true), asks(2, 2, false)] {
            let _ = uploads.wait(waiting);
        }
        assert_eq!(uploads.next(|_| 1, |_| true).map(|w| w.request), Some(2));
        // The next request of the one who is served may be on its way.
        assert!(uploads.next(|_| 1, |_| true).is_none());
        uploads.over(PeerId([2; 16]), 2);
        assert_eq!(uploads.next(|_| 1, |_| true).map(|w| w.request), Some(1));
    }

    #[test]
    fn a_full_queue_sends_away_what_nobody_waits_for_first() {
        let a_child = WAITING_A_CHILD as u32;
        let mut uploads = Uploads::new(SLOTS);
        (0..a_child).for_each(|request| assert!(uploads.wait(asks(1, request, request == 3)).is_none()));
        // (the request, whether it is prefetched, who has to go)
        for (request, prefetch, gone) in [(100, true, 100), (101, false, 3), (102, false, 102)] {
            let told = uploads.wait(asks(1, request, prefetch)).map(|w| w.request);
            assert_eq!(told, Some(gone), "{request}");
        }
        // Another child still finds room, until all of it is taken.
        let more = (WAITING as u32 - a_child) / a_child;
        for (child, request) in (2..2 + more).flat_map(|child| (0..a_child).map(move |r| (child, r))) {
            assert!(uploads.wait(asks(child as u8, request, child == 2)).is_none());
        }
        let gone = uploads.wait(asks(200, 1, false)).expect("it is full");
        assert_eq!((gone.peer, gone.prefetch), (PeerId([2; 16]), true));
    }

    #[test]
    fn who_has_waited_for_too_long_is_sent_elsewhere() {
        let mut uploads = Uploads::new(SLOTS);
        let late = WAITS_AT_MOST + Duration::from_millis(5);
        for request in 0..10 {
            let _ = uploads.wait(asks(1, request, false));
        }
        let overdue: Vec<u32> = uploads.overdue(Time(late)).iter().map(|w| w.request).collect();
        assert_eq!(overdue, [0, 1, 2, 3, 4, 5]);
        assert_eq!(served(&mut uploads, |_| true), [6, 7, 8, 9]);
    }

    #[test]
    fn a_task_that_may_not_go_keeps_no_other_from_its_turn() {
        let mut uploads = Uploads::new(SLOTS);
        let other = Waiting { task: task(2), ..asks(2, 7, false) };
        for waiting in [asks(1, 1, false), other] {
            let _ = uploads.wait(waiting);
        }
        assert_eq!(served(&mut uploads, |digest| *digest == task(2)), [7]);
        assert!(!uploads.is_idle());
    }
}
