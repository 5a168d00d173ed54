//! The one queue of what is to come.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::time::Duration;

use hawker_core::Time;

/// As long as one bucket of the queue.
const BUCKET: Duration = Duration::from_micros(100);

/// Buckets at most: later events wait in a heap.
const BUCKETS: usize = 1 << 12;

/// When, which in turn, and what.
type Entry<E> = (Time, u64, E);

/// Events in the order of their times; those of one time in the order in which they were put in. Nearly all come within
/// milliseconds: they lie in buckets, which are sorted when their time has come. One heap of all would be a tenth of a run.
pub(super) struct Queue<E> {
    /// The next events: the last comes first.
    current: Vec<Entry<E>>,
    /// The number of the first of `buckets`; earlier events are in `current`.
    first: u64,
    buckets: VecDeque<Vec<Entry<E>>>,
    /// How many are in `buckets`.
    near: usize,
    far: BinaryHeap<Reverse<(Time, u64, u32)>>,
    places: Vec<Option<E>>,
    next: u64,
}

fn bucket_of(at: Time) -> u64 {
    (at.0.as_nanos() / BUCKET.as_nanos()) as u64
}

impl<E> Queue<E> {
    pub(super) const fn new() -> Self {
        Self {
            current: Vec::new(),
            first: 0,
            buckets: VecDeque::new(),
            near: 0,
            far: BinaryHeap::new(),
            places: Vec::new(),
            next: 0,
        }
    }

    pub(super) fn put(&mut self, at: Time, event: E) {
        let turn = self.next;
        self.next += 1;
        let Some(bucket) = bucket_of(at).checked_sub(self.first) else {
            let later = self.current.partition_point(|(time, ..)| *time > at);
            return self.current.insert(later, (at, turn, event));
        };
        let bucket = bucket as usize;
        if bucket >= BUCKETS {
            self.far.push(Reverse((at, turn, self.places.len() as u32)));
            return self.places.push(Some(event));
        }
        if self.buckets.len() <= bucket {
            self.buckets.resize_with(bucket + 1, Vec::new);
        }
        self.buckets[bucket].push((at, turn, event));
        self.near += 1;
    }

    /// Makes the next bucket the current one, if it is not later than `by`: events put in until then would have to be
    /// sorted in.
    fn advance(&mut self, by: Time) {
        let last = bucket_of(by);
        while self.current.is_empty() && self.first <= last {
            if self.near == 0 {
                let Some(bucket) = self.far.peek().map(|Reverse((at, ..))| bucket_of(*at)) else {
                    return;
                };
                if bucket > last {
                    return;
                }
                (self.first, self.buckets) = (bucket, VecDeque::new());
            }
            let mut bucket = self.buckets.pop_front().unwrap_or_default();
            self.near -= bucket.len();
            self.first += 1;
            while let Some(Reverse((at, turn, place))) = self.far.peek().copied()
                && bucket_of(at) < self.first
            {
                self.far.pop();
                bucket.extend(
                    self.places[place as usize]
                        .take()
                        .map(|event| (at, turn, event)),
                );
            }
            bucket.sort_unstable_by_key(|(at, turn, _)| Reverse((*at, *turn)));
            self.current = bucket;
        }
    }

    /// The next, if it is not later than `by`.
    pub(super) fn take(&mut self, by: Time) -> Option<(Time, E)> {
        self.advance(by);
        self.current
            .pop_if(|(at, ..)| *at <= by)
            .map(|(at, _, event)| (at, event))
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

    const END: Time = Time(Duration::MAX);

    #[test]
    fn events_come_by_time_and_then_by_turn() {
        let mut queue = Queue::new();
        for (at, event) in [(2, 'c'), (1, 'a'), (2, 'd'), (1, 'b')] {
            queue.put(Time(Duration::from_secs(at)), event);
        }
        assert_eq!(queue.take(END).unwrap().1, 'a');
        queue.put(Time(Duration::from_secs(2)), 'e');
        let rest: String = std::iter::from_fn(|| queue.take(END))
            .map(|(_, event)| event)
            .collect();
        assert_eq!(rest, "bcde");
        // Whether they are of one bucket, near or far.
        let times = [
            5_000_000, 2_000_001, 2_000_050, 2_000_060, 2_090_000, 2_400_000, 2_450_000, 9_000_000,
        ];
        times
            .into_iter()
            .for_each(|at| queue.put(Time(Duration::from_micros(at)), 'x'));
        assert_eq!(
            queue.take(END).map(|(at, _)| at),
            Some(Time(Duration::from_micros(2_000_001)))
        );
        queue.put(Time(Duration::from_micros(2_000_055)), 'y');
        queue.put(Time(Duration::from_micros(2_409_000)), 'z');
        let rest: Vec<u128> = std::iter::from_fn(|| queue.take(END))
            .map(|(at, _)| at.0.as_micros())
            .collect();
        let sorted = [
            2_000_050, 2_000_055, 2_000_060, 2_090_000, 2_400_000, 2_409_000, 2_450_000, 5_000_000,
            9_000_000,
        ];
        assert_eq!(rest, sorted);
    }
}
