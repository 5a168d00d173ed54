//! Which of the candidates become a child's parents.

use super::Nearness;
use super::slab::Slot;

/// The facts known about a possible parent.
#[derive(Clone, Copy, Debug)]
pub(super) struct Candidate {
    pub(super) peer: Slot,
    /// It holds everything, and committed it.
    pub(super) complete: bool,
    /// How much of the task it holds, 0 to 1.
    pub(super) completeness: f32,
    /// Children that it was given already, over how many it can serve at a time.
    pub(super) load: f32,
    /// How near it is to the child.
    pub(super) nearness: Nearness,
    /// 0 (nothing known against it) to 1.
    pub(super) suspicion: f32,
    /// It was named before and did not suffice.
    pub(super) tried: bool,
    /// Uniform in 0 to 1: equals are told apart by chance, so that children do not all get the same parents.
    pub(super) jitter: f32,
}

/// A link between zones costs more than anything a better peer there could give.
const ZONE_WEIGHT: f32 = 2.0;
/// A link within a rack is shorter, but not so that a loaded peer there is better than an idle one of the next rack.
const RACK_WEIGHT: f32 = 1.0;
/// Enough to put a peer that was isolated behind all others.
const SUSPICION_WEIGHT: f32 = 3.0;
/// Pieces now, rather than a promise of them.
const COMPLETENESS_WEIGHT: f32 = 1.0;
/// As much as completeness: a complete holder with all its slots given away twice over is worth a fellow with none.
const FREE_WEIGHT: f32 = 1.5;
/// A parent that did not suffice is not asked first again, but may be the best there is.
const TRIED_WEIGHT: f32 = 1.0;
/// Less than any of the above, more than small differences in completeness or load.
const JITTER_WEIGHT: f32 = 0.5;

/// Of the parents, one in this many is not among the nearest, if there are others: a piece that exists only far away
/// must come across.
const REMOTE_ONE_IN: usize = 4;

impl Candidate {
    fn score(&self) -> f32 {
        let near = match self.nearness {
            Nearness::Elsewhere => 0.0,
            Nearness::Zone => ZONE_WEIGHT,
            Nearness::Rack => ZONE_WEIGHT + RACK_WEIGHT,
        };
        let tried = if self.tried { TRIED_WEIGHT } else { 0.0 };
        near + COMPLETENESS_WEIGHT * self.completeness + FREE_WEIGHT / (1.0 + self.load)
            - SUSPICION_WEIGHT * self.suspicion
            - tried
            + JITTER_WEIGHT * self.jitter
    }
}

/// The best of `candidates`, best first: at most `count`, of them at most `max_complete` complete holders, and not all
/// as near as the nearest: from the child's own rack, or zone.
pub(super) fn choose(
    mut candidates: Vec<Candidate>,
    count: usize,
    max_complete: usize,
) -> Vec<Slot> {
    candidates.sort_by(|a, b| b.score().total_cmp(&a.score()).then(a.peer.cmp(&b.peer)));
    let mut complete = 0;
    candidates.retain(|candidate| {
        complete += usize::from(candidate.complete);
        !candidate.complete || complete <= max_complete
    });
    let nearest = candidates.iter().map(|candidate| candidate.nearness).max();
    let max_near = count - count / REMOTE_ONE_IN;
    let (mut near, mut chosen, mut spare) = (0, Vec::new(), Vec::new());
    for candidate in candidates {
        let is_near = Some(candidate.nearness) == nearest;
        near += usize::from(is_near);
        let list = if is_near && near > max_near {
            &mut spare
        } else {
            &mut chosen
        };
        list.push(candidate.peer);
    }
    chosen.truncate(count);
    spare.truncate(count - chosen.len());
    chosen.append(&mut spare);
    chosen
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PLAIN: Candidate = Candidate {
        peer: 0,
        complete: false,
        completeness: 0.5,
        load: 1.0,
        nearness: Nearness::Elsewhere,
        suspicion: 0.0,
        tried: false,
        jitter: 0.5,
    };

    #[test]
    fn the_better_parent_comes_first() {
        let cases = [
            (
                "same zone before complete",
                Candidate {
                    nearness: Nearness::Zone,
                    ..PLAIN
                },
                Candidate {
                    complete: true,
                    completeness: 1.0,
                    load: 0.0,
                    ..PLAIN
                },
            ),
            (
                "same rack before same zone",
                Candidate {
                    nearness: Nearness::Rack,
                    jitter: 0.0,
                    ..PLAIN
                },
                Candidate {
                    nearness: Nearness::Zone,
                    ..PLAIN
                },
            ),
            (
                "an idle one of the zone before a loaded one of the rack",
                Candidate {
                    nearness: Nearness::Zone,
                    load: 0.0,
                    jitter: 0.0,
                    ..PLAIN
                },
                Candidate {
                    nearness: Nearness::Rack,
                    load: 16.0,
                    ..PLAIN
                },
            ),
            (
                "complete before partial",
                Candidate {
                    complete: true,
                    completeness: 1.0,
                    jitter: 0.0,
                    ..PLAIN
                },
                PLAIN,
            ),
            (
                "idle before loaded",
                Candidate {
                    load: 0.0,
                    jitter: 0.0,
                    ..PLAIN
                },
                Candidate { load: 8.0, ..PLAIN },
            ),
            (
                "an idle fellow before a holder that everybody has",
                Candidate {
                    completeness: 0.0,
                    load: 0.0,
                    ..PLAIN
                },
                Candidate {
                    complete: true,
                    completeness: 1.0,
                    load: 8.0,
                    ..PLAIN
                },
            ),
            (
                "not tried before tried",
                Candidate {
                    completeness: 0.0,
                    ..PLAIN
                },
                Candidate {
                    tried: true,
                    ..PLAIN
                },
            ),
            (
                "anybody before one on probation",
                Candidate {
                    completeness: 0.0,
                    load: 20.0,
                    jitter: 0.0,
                    ..PLAIN
                },
                Candidate {
                    suspicion: 0.9,
                    complete: true,
                    completeness: 1.0,
                    load: 0.0,
                    ..PLAIN
                },
            ),
        ];
        for (name, better, worse) in cases {
            let candidates = vec![
                Candidate { peer: 1, ..worse },
                Candidate { peer: 2, ..better },
            ];
            assert_eq!(choose(candidates, 2, 8), [2, 1], "{name}");
        }
    }

    #[test]
    fn some_parents_are_from_elsewhere() {
        let near = (0..40).map(|peer| Candidate {
            peer,
            nearness: Nearness::Zone,
            ..PLAIN
        });
        let far = (40..80).map(|peer| Candidate { peer, ..PLAIN });
        let chosen = choose(near.clone().chain(far).collect(), 24, 8);
        assert_eq!(chosen.iter().filter(|peer| **peer >= 40).count(), 6);
        assert_eq!(
            choose(near.clone().collect(), 24, 8).len(),
            24,
            "unless there is nobody elsewhere"
        );
        let rack = (80..120).map(|peer| Candidate {
            peer,
            nearness: Nearness::Rack,
            ..PLAIN
        });
        let chosen = choose(near.chain(rack).collect(), 24, 8);
        assert_eq!(
            chosen.iter().filter(|peer| **peer < 80).count(),
            6,
            "from other racks, too"
        );
    }

    fn candidate() -> impl Strategy<Value = Candidate> {
        let nearness = prop_oneof![
            Just(Nearness::Elsewhere),
            Just(Nearness::Zone),
            Just(Nearness::Rack)
        ];
        (
            any::<bool>(),
            0.0f32..1.0,
            0.0f32..9.0,
            nearness,
            0.0f32..1.0,
            any::<bool>(),
            0.0f32..1.0,
        )
            .prop_map(
                |(complete, completeness, load, nearness, suspicion, tried, jitter)| Candidate {
                    peer: 0,
                    complete,
                    completeness,
                    load,
                    nearness,
                    suspicion,
                    tried,
                    jitter,
                },
            )
    }

    proptest! {
        #[test]
        fn as_many_as_allowed_and_nobody_twice(
            candidates in proptest::collection::vec(candidate(), 0..60), count in 0usize..40, max_complete in 0usize..10,
        ) {
            let candidates: Vec<Candidate> =
                candidates.into_iter().zip(0..).map(|(c, peer)| Candidate { peer, ..c }).collect();
            let complete = candidates.iter().filter(|c| c.complete).count();
            let eligible = candidates.len() - complete + complete.min(max_complete);
            let mut chosen = choose(candidates.clone(), count, max_complete);
            prop_assert_eq!(chosen.len(), eligible.min(count));
            prop_assert!(chosen.iter().filter(|p| candidates[**p as usize].complete).count() <= max_complete);
            chosen.sort_unstable();
            chosen.dedup();
            prop_assert_eq!(chosen.len(), eligible.min(count));
        }
    }
}
