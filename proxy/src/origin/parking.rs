//! Bodies of origins that wait for their clients.
//!
//! A body that is passed through to one client holds a connection to the origin and some hundred KiB of buffers. A client that
//! stops reading would hold these for minutes. Each body is therefore parked while its client takes the last bytes. The number
//! of parked bodies is bounded: beyond the bound, the body that has waited longest is dropped. A reader that knows its position
//! asks the origin again when its client comes back.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// So many bodies may wait as long as they like.
const FREE_PLACES: usize = 64;
/// More bodies than this never wait at the same time.
const PLACES: usize = 512;

/// The parked bodies of one daemon, in the order of their arrival.
pub(crate) struct Lot<B> {
    parked: Mutex<Parked<B>>,
}

struct Parked<B> {
    next: u64,
    bodies: BTreeMap<u64, Body<B>>,
}

struct Body<B> {
    since: Instant,
    may_wait: Duration,
    body: B,
}

impl<B> Default for Lot<B> {
    fn default() -> Self {
        Self {
            parked: Mutex::new(Parked {
                next: 0,
                bodies: BTreeMap::new(),
            }),
        }
    }
}

impl<B> Lot<B> {
    /// Takes a body until its client has taken the bytes read of it. If many bodies wait, this one may be dropped
    /// after `may_wait`.
    pub(crate) fn park(self: &Arc<Self>, now: Instant, body: B, may_wait: Duration) -> Ticket<B> {
        let mut parked = self.lock();
        let number = parked.next;
        parked.next += 1;
        parked.bodies.insert(
            number,
            Body {
                since: now,
                may_wait,
                body,
            },
        );
        let gone = parked.overdue(now);
        drop(parked);
        drop(gone);
        Ticket {
            lot: Arc::clone(self),
            number,
        }
    }

    /// Drops the bodies that have waited too long, where too many wait.
    pub(crate) fn sweep(&self, now: Instant) {
        let gone = self.lock().overdue(now);
        drop(gone);
    }

    fn lock(&self) -> MutexGuard<'_, Parked<B>> {
        self.parked.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<B> Parked<B> {
    /// Takes out what gives way. The caller drops it without the lock: a body's end may do much.
    fn overdue(&mut self, now: Instant) -> Vec<Body<B>> {
        let excess = self.bodies.len().saturating_sub(FREE_PLACES);
        if excess == 0 {
            return Vec::new();
        }
        let overdue = self
            .bodies
            .iter()
            .filter(|(_, body)| now.duration_since(body.since) >= body.may_wait);
        let mut numbers: Vec<u64> = overdue.map(|(number, _)| *number).take(excess).collect();
        let left = self.bodies.len() - numbers.len();
        if left > PLACES {
            let oldest = self
                .bodies
                .keys()
                .filter(|number| numbers.binary_search(number).is_err());
            let oldest: Vec<u64> = oldest.copied().take(left - PLACES).collect();
            numbers.extend(oldest);
        }
        numbers
            .iter()
            .filter_map(|number| self.bodies.remove(number))
            .collect()
    }
}

/// A body's place. The body goes with it.
pub(crate) struct Ticket<B> {
    lot: Arc<Lot<B>>,
    number: u64,
}

impl<B> Ticket<B> {
    /// The body; `None`: it gave way.
    pub(crate) fn take(self) -> Option<B> {
        self.leave().map(|parked| parked.body)
    }

    /// Gives the place up. The lock is free again before the caller drops the body.
    fn leave(&self) -> Option<Body<B>> {
        self.lot.lock().bodies.remove(&self.number)
    }
}

impl<B> Drop for Ticket<B> {
    fn drop(&mut self) {
        drop(self.leave());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_secs(2);

    fn parked(lot: &Arc<Lot<usize>>, now: Instant, count: usize) -> Vec<Ticket<usize>> {
        (0..count).map(|body| lot.park(now, body, SOON)).collect()
    }

    fn left(tickets: Vec<Ticket<usize>>) -> Vec<usize> {
        tickets.into_iter().filter_map(Ticket::take).collect()
    }

    #[test]
    fn a_few_bodies_wait_as_long_as_they_like() {
        let (lot, now) = (Arc::new(Lot::default()), Instant::now());
        let tickets = parked(&lot, now, FREE_PLACES);
        lot.sweep(now + Duration::from_secs(3600));
        assert_eq!(left(tickets).len(), FREE_PLACES);
        assert!(lot.lock().bodies.is_empty());
    }

    #[test]
    fn of_many_bodies_the_longest_waiting_give_way_after_their_time() {
        let (lot, now) = (Arc::new(Lot::default()), Instant::now());
        let tickets = parked(&lot, now, FREE_PLACES + 10);
        lot.sweep(now + SOON / 2);
        assert_eq!(
            lot.lock().bodies.len(),
            FREE_PLACES + 10,
            "none has waited long"
        );
        lot.sweep(now + SOON);
        assert_eq!(left(tickets), (10..FREE_PLACES + 10).collect::<Vec<_>>());
    }

    #[test]
    fn never_more_bodies_than_places_wait() {
        let lot = Arc::new(Lot::default());
        let tickets = parked(&lot, Instant::now(), PLACES + 100);
        assert_eq!(left(tickets), (100..PLACES + 100).collect::<Vec<_>>());
    }

    #[test]
    fn a_body_goes_with_its_ticket() {
        let lot = Arc::new(Lot::default());
        drop(parked(&lot, Instant::now(), 3));
        assert!(lot.lock().bodies.is_empty());
    }
}
