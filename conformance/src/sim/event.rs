//! The one queue of what is to come.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::time::Duration;

use hawker_core::Time;

/// Events in the order of their times; those of one time in the order in which they were put in.
pub(super) struct Queue<E> {
    /// Time, number, place in `events`: small, as a heap moves them about.
    heap: BinaryHeap<Reverse<(Time, u64, u32)>>,
    events: Vec<Option<E>>,
    free: Vec<u32>,
    next: u64,
}

impl<E> Queue<E> {
    pub(super) const fn new() -> Self {
        Self { heap: BinaryHeap::new(), events: Vec::new(), free: Vec::new(), next: 0 }
    }

    pub(super) fn put(&mut self, at: Time, event: E) {
        let place = self.free.pop().unwrap_or(self.events.len() as u32);
        match self.events.get_mut(place as usize) {
            Some(empty) => *empty = Some(event),
            None => self.events.push(Some(event)),
        }
        self.heap.push(Reverse((at, self.next, place)));
        self.next += 1;
    }

    /// When the next is.
    pub(super) fn next_at(&self) -> Option<Time> {
        self.heap.peek().map(|Reverse((at, ..))| *at)
    }

    pub(super) fn take(&mut self) -> Option<(Time, E)> {
        let Reverse((at, _, place)) = self.heap.pop()?;
        self.free.push(place);
        Some((at, self.events.get_mut(place as usize)?.take()?))
    }

    /// How many were ever put in.
    pub(super) const fn count(&self) -> u64 {
        self.next
    }
}

/// Nodes decide at multiples of this: a list for each such tick costs less than a heap of all who decide.
const TICK: Duration = Duration::from_micros(250);

/// Which nodes decide at which tick.
#[derive(Default)]
pub(super) struct Calendar {
    /// The number of the first tick in `ticks`.
    first: u64,
    ticks: VecDeque<Vec<u32>>,
}

impl Calendar {
    /// The first tick that is not before `at`.
    pub(super) fn tick_of(at: Time) -> u64 {
        at.0.as_nanos().div_ceil(TICK.as_nanos()) as u64
    }

    /// Node `index` decides at a tick, which is not over.
    pub(super) fn put(&mut self, tick: u64, index: u32) {
        let at = tick.saturating_sub(self.first) as usize;
        if self.ticks.len() <= at {
            self.ticks.resize_with(at + 1, Vec::new);
        }
        self.ticks[at].push(index);
    }

    /// When the next decide.
    pub(super) fn next_at(&self) -> Option<Time> {
        let at = self.ticks.iter().position(|nodes| !nodes.is_empty())?;
        Some(Time(TICK.saturating_mul((self.first + at as u64) as u32)))
    }

    /// The next tick and who decides then, in the order in which they were put in.
    pub(super) fn take(&mut self) -> Option<(u64, Vec<u32>)> {
        while let Some(nodes) = self.ticks.pop_front() {
            self.first += 1;
            if !nodes.is_empty() {
                return Some((self.first - 1, nodes));
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_decide_at_their_ticks() {
        let mut calendar = Calendar::default();
        let tick = Calendar::tick_of(Time(TICK + Duration::from_nanos(1)));
        for (tick, index) in [(tick, 1), (7, 2), (tick, 3)] {
            calendar.put(tick, index);
        }
        assert_eq!(calendar.next_at(), Some(Time(2 * TICK)));
        assert_eq!(calendar.take(), Some((2, vec![1, 3])));
        calendar.put(3, 4);
        assert_eq!(calendar.take(), Some((3, vec![4])));
        assert_eq!(calendar.take(), Some((7, vec![2])));
        assert_eq!(calendar.take(), None);
        assert_eq!(calendar.next_at(), None);
    }

    #[test]
    fn events_come_by_time_and_then_by_turn() {
        let mut queue = Queue::new();
        for (at, event) in [(2, 'c'), (1, 'a'), (2, 'd'), (1, 'b')] {
            queue.put(Time(Duration::from_secs(at)), event);
        }
        assert_eq!(queue.take().unwrap().1, 'a');
        queue.put(Time(Duration::from_secs(2)), 'e');
        let rest: String = std::iter::from_fn(|| queue.take()).map(|(_, event)| event).collect();
        assert_eq!(rest, "bcde");
    }
}
