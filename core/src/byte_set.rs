//! Sets of byte offsets, kept as disjoint intervals.

use std::collections::BTreeMap;
use std::ops::Range;

/// Byte offsets of one blob, as disjoint, non-adjacent intervals.
///
/// Every operation takes time in the number of intervals that it touches. The caller bounds the number of intervals with
/// [`ByteSet::intervals`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ByteSet {
    /// Start of each interval to its end.
    ends: BTreeMap<u64, u64>,
}

impl ByteSet {
    /// Adds `range`; an empty range changes nothing.
    pub fn insert(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        let (mut start, mut end) = (range.start, range.end);
        // Every interval that touches the new one melts into it.
        while let Some((&from, &to)) = self
            .ends
            .range(..=end)
            .next_back()
            .filter(|(_, to)| **to >= start)
        {
            start = start.min(from);
            end = end.max(to);
            self.ends.remove(&from);
        }
        self.ends.insert(start, end);
    }

    /// Takes `range` out.
    pub fn remove(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        while let Some((&from, &to)) = self
            .ends
            .range(..range.end)
            .next_back()
            .filter(|(_, to)| **to > range.start)
        {
            self.ends.remove(&from);
            if to > range.end {
                self.ends.insert(range.end, to);
            }
            if from < range.start {
                self.ends.insert(from, range.start);
            }
        }
    }

    /// Whether all of `range` is in the set. An empty range always is.
    pub fn contains(&self, range: &Range<u64>) -> bool {
        range.is_empty() || self.end_of(range.start) >= range.end
    }

    /// The end of the interval that holds `at`; `at` itself when it is not in the set.
    pub fn end_of(&self, at: u64) -> u64 {
        self.ends
            .range(..=at)
            .next_back()
            .map_or(at, |(_, end)| at.max(*end))
    }

    /// The first stretch of `within` that is not in the set.
    pub fn first_gap(&self, within: Range<u64>) -> Option<Range<u64>> {
        let start = self.end_of(within.start);
        if start >= within.end {
            return None;
        }
        let end = self
            .ends
            .range(start..)
            .next()
            .map_or(within.end, |(next, _)| within.end.min(*next));
        Some(start..end)
    }

    /// The intervals, in order.
    pub fn iter(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        self.ends.iter().map(|(start, end)| *start..*end)
    }

    /// How many intervals there are.
    pub fn intervals(&self) -> usize {
        self.ends.len()
    }

    /// How many bytes are in the set.
    pub fn len_bytes(&self) -> u64 {
        self.iter().map(|range| range.end - range.start).sum()
    }

    /// Whether nothing is in the set.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SIZE: usize = 64;

    #[test]
    fn neighbours_melt_into_one_interval() {
        let mut set = ByteSet::default();
        set.insert(0..4);
        set.insert(8..12);
        set.insert(4..8);
        assert_eq!((set.intervals(), set.first_gap(0..20)), (1, Some(12..20)));
        set.remove(3..5);
        assert_eq!(set.iter().collect::<Vec<_>>(), [0..3, 5..12]);
    }

    proptest! {
        #[test]
        fn behaves_like_an_array_of_booleans(
            steps in prop::collection::vec((any::<bool>(), 0..SIZE as u64, 0..SIZE as u64), 0..40),
            probe in (0..SIZE as u64, 0..SIZE as u64),
        ) {
            let (mut set, mut naive) = (ByteSet::default(), [false; SIZE]);
            for (add, a, b) in steps {
                let range = a.min(b)..a.max(b);
                naive[range.start as usize..range.end as usize].fill(add);
                if add { set.insert(range) } else { set.remove(range) }
                prop_assert_eq!(set.len_bytes() as usize, naive.iter().filter(|held| **held).count());
                let intervals = naive.iter().enumerate().filter(|(i, held)| **held && (*i == 0 || !naive[i - 1]));
                prop_assert_eq!(set.intervals(), intervals.count());
                prop_assert_eq!(set.is_empty(), set.len_bytes() == 0);
            }
            let range = probe.0.min(probe.1)..probe.0.max(probe.1);
            let part = &naive[range.start as usize..range.end as usize];
            prop_assert_eq!(set.contains(&range), part.iter().all(|held| *held));
            let gap = part.iter().position(|held| !held).map(|from| {
                let len = part[from..].iter().position(|held| *held).unwrap_or(part.len() - from);
                let from = range.start + from as u64;
                from..from + len as u64
            });
            prop_assert_eq!(set.first_gap(range), gap);
        }
    }
}
