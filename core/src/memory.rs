//! How memory is divided among the tasks whose pieces the disk does not take.
//!
//! All tasks get the same share. A task whose share would be too small for its pieces gets none: its readers are passed through
//! from the origin instead, which needs no memory. So one task with long pieces takes nothing away from tasks with short ones.

/// Pieces that a task without disk holds at least: one that is given out and one that comes in.
const PIECES_AT_LEAST: u64 = 2;

/// The memory of each task, in bytes, where they divide `total_bytes`. `pieces_bytes` has each task's piece length, the oldest task
/// first. No task gets more than `most_bytes`. Zero means that the task holds nothing in memory.
pub fn shares(total_bytes: u64, most_bytes: u64, pieces_bytes: &[u64]) -> Vec<u64> {
    let needs_bytes = |at: usize| pieces_bytes[at].saturating_mul(PIECES_AT_LEAST);
    let mut by_need: Vec<usize> = (0..pieces_bytes.len()).collect();
    by_need.sort_by_key(|at| needs_bytes(*at));
    let fits = |count: &usize| {
        let share_bytes = (total_bytes / *count as u64).min(most_bytes);
        by_need
            .get(count - 1)
            .is_some_and(|at| needs_bytes(*at) <= share_bytes)
    };
    // With each further task the share shrinks and the longest piece grows: the first count that does not fit ends it.
    let admitted = (1..=by_need.len()).take_while(fits).last().unwrap_or(0);
    let mut shares = vec![0; pieces_bytes.len()];
    for at in by_need.into_iter().take(admitted) {
        shares[at] = (total_bytes / admitted as u64).min(most_bytes);
    }
    shares
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn a_task_with_long_pieces_takes_nothing_from_tasks_with_short_ones() {
        // Two blobs of 2 TB beside two common ones, with the default memory.
        let shares = shares(24 * MIB, 12 * MIB, &[16 * MIB, 16 * MIB, MIB / 4, MIB / 4]);
        assert_eq!(shares, [0, 0, 12 * MIB, 12 * MIB]);
    }

    #[test]
    fn of_too_many_equal_tasks_the_oldest_get_a_share() {
        assert_eq!(shares(6, 6, &[1, 1, 1, 1]), [2, 2, 2, 0]);
        assert!(shares(24, 12, &[]).is_empty());
        assert_eq!(shares(1, 12, &[1]), [0]);
    }

    proptest! {
        /// The oracle tries all sets of tasks: no larger set could have been given equal shares.
        #[test]
        fn as_many_tasks_as_possible_get_equal_shares_that_suffice(
            total in 0..64u64, most in 1..64u64, pieces in prop::collection::vec(1..20u64, 0..9),
        ) {
            let shares = shares(total, most, &pieces);
            let given: Vec<usize> = (0..pieces.len()).filter(|at| shares[*at] > 0).collect();
            prop_assert!(shares.iter().sum::<u64>() <= total);
            prop_assert!(given.iter().all(|at| shares[*at] >= 2 * pieces[*at] && shares[*at] <= most));
            prop_assert!(given.windows(2).all(|pair| shares[pair[0]] == shares[pair[1]]));
            let possible = |set: &u32| {
                let count = u64::from(set.count_ones());
                let members = (0..pieces.len()).filter(|at| set & (1 << at) != 0);
                count == 0 || members.clone().all(|at| 2 * pieces[at] <= (total / count).min(most))
            };
            let best = (0..1u32 << pieces.len()).filter(possible).map(u32::count_ones).max().unwrap_or(0);
            prop_assert_eq!(given.len() as u32, best);
        }
    }
}
