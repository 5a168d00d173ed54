//! Rendezvous hashing: everybody picks the same member for a task without asking, and few tasks move when a member comes
//! or goes (Thaler and Ravishankar, 1998).

use crate::digest::{Algorithm, Chain, Digest};
use crate::piece::PeerId;

/// The members in the order in which to try them for `task`: the owner first.
pub fn order(task: &Digest, members: impl IntoIterator<Item = PeerId>) -> Vec<PeerId> {
    let mut ranked: Vec<(Digest, PeerId)> =
        members.into_iter().map(|member| (weight(task, member), member)).collect();
    ranked.sort_unstable_by(|a, b| b.cmp(a));
    ranked.dedup();
    ranked.into_iter().map(|(_, member)| member).collect()
}

/// The member that owns `task`.
pub fn owner(task: &Digest, members: impl IntoIterator<Item = PeerId>) -> Option<PeerId> {
    members.into_iter().max_by_key(|member| (weight(task, *member), *member))
}

fn weight(task: &Digest, member: PeerId) -> Digest {
    let mut hash = Chain::new(Algorithm::Sha256);
    hash.update(task.as_bytes());
    hash.update(&member.0);
    hash.finish()
}

#[cfg(test)]
mod tests {
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
            assert_eq!(before, order(&task, (0..5).rev().map(member)).first().copied());
        }
    }
}
