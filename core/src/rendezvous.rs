//! Rendezvous hashing: everybody picks the same member for a task without asking, and few tasks move when a member comes
//! or goes (Thaler and Ravishankar, 1998).

use crate::piece::PeerId;
use hawker_oci::digest::{Algorithm, Chain, Digest};

/// The members in the order in which to try them for `task`: the owner first.
pub fn order(task: &Digest, members: impl IntoIterator<Item = PeerId>) -> Vec<PeerId> {
    let mut ranked: Vec<(Digest, PeerId)> = members
        .into_iter()
        .map(|member| (weight(task, member), member))
        .collect();
    ranked.sort_unstable_by(|a, b| b.cmp(a));
    ranked.dedup();
    ranked.into_iter().map(|(_, member)| member).collect()
}

/// The member that owns `task`.
pub fn owner(task: &Digest, members: impl IntoIterator<Item = PeerId>) -> Option<PeerId> {
    members
        .into_iter()
        .max_by_key(|member| (weight(task, *member), *member))
}

/// The member that `asker` asks where `task` is spread over the first `spread` members of its order: each of them gets its
/// share of askers, and few askers move when a member comes or goes. With a spread of one it is the owner.
pub fn share(
    task: &Digest,
    members: impl IntoIterator<Item = PeerId>,
    spread: u32,
    asker: PeerId,
) -> Option<PeerId> {
    if spread <= 1 {
        return owner(task, members);
    }
    let mut own = Chain::new(Algorithm::Sha256);
    own.update(task.as_bytes());
    own.update(&asker.0);
    owner(
        &own.finish(),
        order(task, members).into_iter().take(spread as usize),
    )
}

fn weight(task: &Digest, member: PeerId) -> Digest {
    let mut hash = Chain::new(Algorithm::Sha256);
    hash.update(task.as_bytes());
    hash.update(&member.0);
    hash.finish()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn member(n: u8) -> PeerId {
        PeerId([n; 16])
    }

    #[test]
    fn only_the_tasks_of_a_lost_member_move() {
        for n in 0..200u32 {
            let task = Digest::of(Algorithm::Sha256, &n.to_be_bytes());
            let before = owner(&task, (0..5).map(member));
            let after = owner(&task, (0..4).map(member));
            if before != Some(member(4)) {
                assert_eq!(before, after);
            }
            assert_eq!(
                before,
                order(&task, (0..5).rev().map(member)).first().copied()
            );
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn about_one_task_in_n_moves_when_a_member_comes_and_only_to_it(n in 1u8..12, salt in any::<u32>()) {
            let mut moved = 0;
            for t in 0..1000u32 {
                let task = Digest::of(Algorithm::Sha256, &[salt.to_be_bytes(), t.to_be_bytes()].concat());
                let (before, after) = (owner(&task, (0..n).map(member)), owner(&task, (0..=n).map(member)));
                prop_assert!(before == after || after == Some(member(n)));
                moved += u32::from(before != after);
            }
            // Five standard deviations around 1000 / (n + 1).
            let share = 1.0 / (f64::from(n) + 1.0);
            let margin = 5.0 * (1000.0 * share * (1.0 - share)).sqrt();
            prop_assert!((f64::from(moved) - 1000.0 * share).abs() < margin, "{moved} of 1000");
        }

        #[test]
        fn a_spread_task_is_shared_by_its_first_members_and_few_askers_move(n in 2u8..8, spread in 2u32..5, t in any::<u32>()) {
            let task = Digest::of(Algorithm::Sha256, &t.to_be_bytes());
            let first: Vec<PeerId> = order(&task, (0..n).map(member)).into_iter().take(spread as usize).collect();
            let asker = |a: u32| {
                let mut id = [0; 16];
                id[..4].copy_from_slice(&a.to_be_bytes());
                PeerId(id)
            };
            let at = |a, spread| share(&task, (0..n).map(member), spread, asker(a));
            let mut moved = 0;
            for a in 0..1000 {
                prop_assert!(first.contains(&at(a, spread).unwrap()));
                prop_assert_eq!(at(a, 1), Some(first[0]));
                moved += u32::from(at(a, spread) != at(a, spread + 1));
            }
            for member in &first {
                let share = (0..1000).filter(|a| at(*a, spread) == Some(*member)).count();
                let even = 1000 / first.len();
                prop_assert!((even * 7 / 10..=even * 13 / 10).contains(&share), "{share} of 1000, not {even}");
            }
            prop_assert!(moved <= 1000 * 14 / 10 / (spread + 1), "{moved} of 1000 moved");
        }
    }
}
