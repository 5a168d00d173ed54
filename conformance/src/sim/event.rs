//! The one queue of what is to come.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

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

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

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
