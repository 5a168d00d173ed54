//! Proof that a registry has a blob: a random part of the blob, which the registry must send and this node compares.

use std::collections::HashSet;
use std::ops::Range;

/// Length of the part that is compared. A shorter blob is compared whole.
pub const WINDOW_BYTES: u64 = 4 << 10;
/// How often another part is drawn because the one before was guessable.
pub const DRAWS: usize = 16;
/// Length of the blocks in which repetition is looked for.
const BLOCK_BYTES: usize = 8;
/// A window needs one distinct block for so many blocks.
const BLOCKS_PER_DISTINCT: usize = 8;

/// The part of `held` (ranges of the blob that this node holds) that `random` chooses; `None` when nothing is held.
///
/// Each byte that is held is equally likely to be where the part begins, and the part stays within one of the ranges.
/// `random` must come from the operating system: a registry that can predict the part needs to have no more than that.
pub fn window(held: &[Range<u64>], random: u64) -> Option<Range<u64>> {
    let total: u64 = held
        .iter()
        .map(|range| range.end.saturating_sub(range.start))
        .sum();
    let mut offset = random.checked_rem(total)?;
    for range in held {
        let len = range.end.saturating_sub(range.start);
        if offset < len {
            let latest = range.end - len.min(WINDOW_BYTES);
            let start = (range.start + offset).min(latest);
            return Some(start..range.end.min(start + WINDOW_BYTES));
        }
        offset -= len;
    }
    None
}

/// Whether `bytes` are varied enough that nobody guesses them. Padding and other repetition is not.
pub fn is_hard_to_guess(bytes: &[u8]) -> bool {
    let blocks = bytes.chunks(BLOCK_BYTES);
    let needed = blocks.len().div_ceil(BLOCKS_PER_DISTINCT).max(1);
    let distinct: HashSet<&[u8]> = blocks.collect();
    !bytes.is_empty() && distinct.len() >= needed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_stay_within_what_is_held() {
        let held = [0..10, 100..100 + 3 * WINDOW_BYTES, 1_000_000..1_000_001];
        for random in (0..100_000).chain([u64::MAX, u64::MAX - 1]) {
            let window = window(&held, random).unwrap();
            assert!(
                held.iter()
                    .any(|range| range.start <= window.start && window.end <= range.end),
                "{window:?}"
            );
            assert!(
                !window.is_empty() && window.end - window.start <= WINDOW_BYTES,
                "{window:?}"
            );
        }
    }

    #[test]
    fn every_byte_can_be_compared() {
        let held = [5..9, 20_000..30_000];
        let all: HashSet<u64> = (0..10_004)
            .flat_map(|random| window(&held, random).unwrap())
            .collect();
        assert_eq!(all.len(), 10_004);
    }

    #[test]
    fn nothing_held_gives_no_window() {
        assert_eq!(window(&[], 7), None);
        assert_eq!(window(std::slice::from_ref(&(3..3)), 7), None);
    }

    #[test]
    fn a_short_blob_is_compared_whole() {
        assert_eq!(window(std::slice::from_ref(&(0..1000)), 999), Some(0..1000));
    }

    #[test]
    fn padding_is_guessable_and_content_is_not() {
        let mut noise = Vec::new();
        let mut x = 1_u64;
        while noise.len() < WINDOW_BYTES as usize {
            x = x
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            noise.extend_from_slice(&x.to_be_bytes());
        }
        assert!(is_hard_to_guess(&noise));
        assert!(is_hard_to_guess(b"{\"a\": 1}"));
        assert!(!is_hard_to_guess(&[0; WINDOW_BYTES as usize]));
        assert!(!is_hard_to_guess(&b"abcdefgh".repeat(512)));
        assert!(!is_hard_to_guess(&[]));
        noise[..3900].fill(0);
        assert!(
            !is_hard_to_guess(&noise),
            "a header of a tar member and its padding"
        );
    }
}
