//! The ranges that a reader with several ranges reads after the current one.

use std::collections::VecDeque;
use std::ops::Range;

use crate::piece::{PieceLayout, PieceSet};

/// Reading through a gap this long takes less time than another request.
const GAP_BYTES: u64 = 256 << 10;

/// Ranges that come after the current one, in the order in which they were asked for. None is empty.
#[derive(Debug)]
pub(super) struct Ahead {
    ranges: VecDeque<Range<u64>>,
    layout: PieceLayout,
    pieces: Option<PieceSet>,
}

impl Ahead {
    pub(super) fn new(ranges: impl Into<VecDeque<Range<u64>>>, layout: PieceLayout) -> Self {
        let mut ahead = Self {
            ranges: ranges.into(),
            layout,
            pieces: None,
        };
        ahead.survey();
        ahead
    }

    /// The next one, which is the current one now.
    pub(super) fn next(&mut self) -> Option<Range<u64>> {
        let next = self.ranges.pop_front();
        self.survey();
        next
    }

    /// The pieces that it takes; `None` when nothing comes any more.
    pub(super) const fn pieces(&self) -> Option<&PieceSet> {
        self.pieces.as_ref()
    }

    /// The ranges themselves.
    pub(super) fn ranges(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        self.ranges.iter().cloned()
    }

    /// The bytes to read for `current` and the ranges after it: in the blob's order, with short gaps between them read
    /// through.
    pub(super) fn to_read(&self, current: Range<u64>) -> Vec<Range<u64>> {
        let mut ranges: Vec<Range<u64>> = std::iter::once(current).chain(self.ranges()).collect();
        ranges.sort_unstable_by_key(|range| range.start);
        let mut bridged: Vec<Range<u64>> = Vec::new();
        for range in ranges {
            match bridged.last_mut() {
                Some(last) if range.start <= last.end.saturating_add(GAP_BYTES) => {
                    last.end = last.end.max(range.end);
                }
                _ => bridged.push(range),
            }
        }
        bridged
    }

    fn survey(&mut self) {
        let mut pieces = PieceSet::empty(self.layout.count());
        self.ranges
            .iter()
            .for_each(|range| pieces.insert_range(self.layout.covering(range.clone())));
        self.pieces = (!pieces.is_empty()).then_some(pieces);
    }

    /// The best end of a request to the origin that begins in the current range, which ends at `end`. It is the end of
    /// the last of the ranges that follow each other with nothing but short gaps between them.
    pub(super) fn stretch(&self, end: u64) -> u64 {
        let follows = |end: &mut u64, next: &Range<u64>| {
            let gap_bytes = next.start.checked_sub(*end)?;
            (gap_bytes <= GAP_BYTES).then(|| *end = next.end)?;
            Some(*end)
        };
        self.ranges.iter().scan(end, follows).last().unwrap_or(end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stretch_bridges_short_gaps_and_goes_forward_only() {
        let near = GAP_BYTES;
        for (ranges, expected) in [
            (vec![], 10),
            (vec![10..20, 20..30], 30),
            (vec![10 + near..20 + near, 30 + near..40 + near], 40 + near),
            (vec![11 + near..20 + near, 20 + near..30 + near], 10),
            (vec![9..20, 20..30], 10),
            (vec![10..20, 5..8, 20..30], 20),
        ] {
            let ahead = Ahead::new(ranges.clone(), PieceLayout::new(1 << 30));
            assert_eq!(ahead.stretch(10), expected, "{ranges:?}");
        }
    }

    #[test]
    fn ranges_are_read_in_the_blobs_order_with_short_gaps() {
        let far = 10 + 2 * GAP_BYTES;
        let ahead = Ahead::new(
            vec![far..far + 10, 3..8, 8 + GAP_BYTES..9 + GAP_BYTES],
            PieceLayout::new(1 << 30),
        );
        assert_eq!(ahead.to_read(5..6), [3..9 + GAP_BYTES, far..far + 10]);
    }

    #[test]
    fn the_pieces_ahead_are_those_of_the_ranges_that_are_left() {
        let layout = PieceLayout::new(8 << 20);
        let mut ahead = Ahead::new(vec![0..1, 5 << 20..6 << 20, 10..20], layout);
        let pieces = |ahead: &Ahead| ahead.pieces().map(|set| set.iter().collect::<Vec<_>>());
        let both = pieces(&ahead).unwrap();
        assert_eq!(
            (both[0], both.len()),
            (0, 5),
            "the first, and the four of the sixth MiB"
        );
        ahead.next();
        ahead.next();
        assert_eq!(pieces(&ahead), Some(vec![0]));
        assert_eq!(ahead.next(), Some(10..20));
        assert_eq!((pieces(&ahead), ahead.next()), (None, None));
    }
}
