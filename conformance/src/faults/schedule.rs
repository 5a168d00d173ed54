//! The schedule of a seed: the faults of each member with their times, and the pulls meanwhile.

use std::fmt;
use std::ops::Range;

use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;
use rand::{RngExt as _, SeedableRng as _};

use crate::origin;
use crate::rogue::Conduct;

/// Nodes that clients pull through.
pub const NODES: usize = 4;
pub(super) const BLOBS: usize = 3;
/// All faults lie within this time.
pub(super) const WINDOW_MS: u64 = 6000;
/// How long a fault lasts, but for one that is done at once.
const LASTS_MS: Range<u64> = 400..2500;
/// Between two faults of one member, so that it comes to itself.
const PAUSE_MS: u64 = 300;
const PULLS_PER_NODE: usize = 5;
/// Several pieces, and at the link's rate long enough to be struck in mid-pull.
const SIZE_BYTES: Range<u64> = (3 << 20)..(8 << 20);

/// A member of the run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Member {
    /// The scheduler, which is the authority as well.
    Scheduler,
    /// The seed.
    Seed,
    /// A node, counted from zero.
    Node(usize),
    /// The registry.
    Origin,
}

/// A fault of a member.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// kill -9; in the end it is started again, perhaps with some bytes of a blob's file turned around meanwhile.
    Killed {
        /// The blob whose file rots.
        rots: Option<usize>,
    },
    /// SIGSTOP, and SIGCONT in the end.
    Stopped,
    /// Its cable is pulled, and plugged in again.
    Unplugged,
    /// Its link has another rate.
    Slow {
        /// The rate in each direction, in megabits a second.
        rate_mbit: u32,
    },
    /// Bytes of a blob's file are turned around under the running daemon.
    Rots {
        /// The blob.
        blob: usize,
    },
    /// The origin does something wrong.
    Misbehaves(origin::Fault),
    /// The origin sends wrong bytes of a blob.
    Lies {
        /// The blob.
        blob: usize,
        /// The position in it, in thousandths of its size.
        at_permille: u64,
    },
}

/// A fault of a member, from its beginning to its end: nothing is broken that is not mended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trouble {
    /// The member.
    pub member: Member,
    /// The fault.
    pub fault: Fault,
    /// When it begins, after the pulls' start.
    pub from_ms: u64,
    /// When it is mended.
    pub until_ms: u64,
}

/// A client's pull.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Pull {
    pub(super) at_ms: u64,
    pub(super) node: usize,
    pub(super) blob: usize,
    /// Part of the blob, or else all of it.
    pub(super) range: Option<Range<u64>>,
}

/// A whole run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// The seed that it was made from.
    pub seed: u64,
    /// The node that nothing happens to, but for its link's rate.
    pub survivor: usize,
    /// How a member lies that has joined and says that it holds the first blob.
    pub rogue: Option<Conduct>,
    /// The faults, by time.
    pub troubles: Vec<Trouble>,
    pub(super) sizes: Vec<u64>,
    pub(super) pulls: Vec<Pull>,
}

impl Plan {
    /// The plan of a seed: a pure function.
    #[must_use]
    pub fn of(seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let survivor = rng.random_range(0..NODES);
        let sizes: Vec<u64> = (0..BLOBS).map(|_| rng.random_range(SIZE_BYTES)).collect();
        let conducts = [
            None,
            Some(Conduct::WrongBytes),
            Some(Conduct::TooManyBytes),
            Some(Conduct::Reset),
            Some(Conduct::Stall),
            Some(Conduct::SignsLies),
        ];
        let rogue = conducts[rng.random_range(0..conducts.len())];
        let mut troubles: Vec<Trouble> = Vec::new();
        for _ in 0..rng.random_range(5..10) {
            let trouble = trouble(&mut rng, survivor);
            // Two at once of one member would mend each other.
            let apart = |other: &Trouble| {
                other.until_ms + PAUSE_MS <= trouble.from_ms
                    || trouble.until_ms + PAUSE_MS <= other.from_ms
            };
            if troubles
                .iter()
                .filter(|other| other.member == trouble.member)
                .all(apart)
            {
                troubles.push(trouble);
            }
        }
        troubles.sort_by_key(|trouble| (trouble.from_ms, trouble.member));
        let mut pulls: Vec<Pull> = (0..NODES * PULLS_PER_NODE)
            .map(|number| pull(&mut rng, number / PULLS_PER_NODE, &sizes))
            .collect();
        pulls.sort_by_key(|pull| pull.at_ms);
        Self {
            seed,
            survivor,
            rogue,
            troubles,
            sizes,
            pulls,
        }
    }
}

fn trouble(rng: &mut StdRng, survivor: usize) -> Trouble {
    let member = match rng.random_range(0..10) {
        0 => Member::Scheduler,
        1 | 2 => Member::Seed,
        3 | 4 => Member::Origin,
        _ => Member::Node(rng.random_range(0..NODES)),
    };
    let fault = match member {
        Member::Node(node) if node == survivor => slow(rng),
        Member::Origin => origin_fault(rng),
        Member::Scheduler => match rng.random_range(0..3) {
            0 => Fault::Killed { rots: None },
            1 => Fault::Stopped,
            _ => Fault::Unplugged,
        },
        Member::Seed | Member::Node(_) => match rng.random_range(0..8) {
            0 | 1 => Fault::Killed { rots: None },
            2 => Fault::Killed {
                rots: Some(rng.random_range(0..BLOBS)),
            },
            3 | 4 => Fault::Stopped,
            5 => Fault::Unplugged,
            6 => slow(rng),
            _ => Fault::Rots {
                blob: rng.random_range(0..BLOBS),
            },
        },
    };
    let lasts_ms = rng.random_range(LASTS_MS);
    let from_ms = rng.random_range(200..WINDOW_MS - lasts_ms);
    Trouble {
        member,
        fault,
        from_ms,
        until_ms: from_ms + lasts_ms,
    }
}

fn slow(rng: &mut StdRng) -> Fault {
    Fault::Slow {
        rate_mbit: rng.random_range(5..20),
    }
}

fn origin_fault(rng: &mut StdRng) -> Fault {
    let bytes = rng.random_range(0..SIZE_BYTES.end);
    let wrongs = [
        origin::Fault::Refuse,
        origin::Fault::Hang,
        origin::Fault::HangAfter { bytes },
        origin::Fault::ResetAfter { bytes },
        origin::Fault::TruncateAfter { bytes },
        origin::Fault::SlowBody {
            bytes_per_s: rng.random_range(100_000..1_000_000),
        },
        origin::Fault::Status {
            code: 503,
            retry_after_s: None,
        },
        origin::Fault::Status {
            code: 500,
            retry_after_s: None,
        },
    ];
    match rng.random_range(0..4) {
        0 => Fault::Unplugged,
        1 => Fault::Lies {
            blob: rng.random_range(0..BLOBS),
            at_permille: rng.random_range(0..1000),
        },
        _ => wrongs
            .choose(rng)
            .cloned()
            .map_or(Fault::Unplugged, Fault::Misbehaves),
    }
}

fn pull(rng: &mut StdRng, node: usize, sizes: &[u64]) -> Pull {
    let blob = rng.random_range(0..sizes.len());
    let range = rng.random_bool(0.4).then(|| {
        let from = rng.random_range(0..sizes[blob]);
        from..rng.random_range(from..sizes[blob]) + 1
    });
    Pull {
        at_ms: rng.random_range(0..WINDOW_MS),
        node,
        blob,
        range,
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "seed {}: survivor {}, rogue {:?}",
            self.seed, self.survivor, self.rogue
        )?;
        for Trouble {
            member,
            fault,
            from_ms,
            until_ms,
        } in &self.troubles
        {
            writeln!(f, "  {from_ms:>5}..{until_ms:<5} ms  {member:?} {fault:?}")?;
        }
        for Pull {
            at_ms,
            node,
            blob,
            range,
        } in &self.pulls
        {
            let size = self.sizes[*blob];
            writeln!(
                f,
                "  {at_ms:>5} ms         pull of blob {blob} ({size} bytes) at Node({node}), {range:?}"
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    const SEEDS: Range<u64> = 0..500;

    #[test]
    fn the_same_seed_is_the_same_plan_and_another_is_another() {
        for seed in SEEDS {
            assert_eq!(Plan::of(seed), Plan::of(seed));
            assert_ne!(Plan::of(seed).troubles, Plan::of(seed + 1).troubles);
        }
    }

    #[test]
    fn what_breaks_is_mended_in_time_and_before_the_same_member_s_next_trouble() {
        for plan in SEEDS.map(Plan::of) {
            assert!(!plan.troubles.is_empty());
            let mut busy_until = std::collections::BTreeMap::new();
            for trouble in &plan.troubles {
                assert!(
                    trouble.from_ms < trouble.until_ms && trouble.until_ms <= WINDOW_MS,
                    "{plan}"
                );
                let before = busy_until
                    .insert(trouble.member, trouble.until_ms)
                    .unwrap_or(0);
                assert!(before < trouble.from_ms, "{plan}");
            }
        }
    }

    #[test]
    fn one_node_s_process_disk_and_cable_are_spared() {
        for plan in SEEDS.map(Plan::of) {
            let own = plan
                .troubles
                .iter()
                .filter(|trouble| trouble.member == Member::Node(plan.survivor));
            assert!(
                own.into_iter()
                    .all(|trouble| matches!(trouble.fault, Fault::Slow { .. })),
                "{plan}"
            );
            assert!(plan.pulls.iter().any(|pull| pull.node == plan.survivor));
        }
    }

    #[test]
    fn every_range_is_one_of_its_blob() {
        for plan in SEEDS.map(Plan::of) {
            for pull in &plan.pulls {
                let range = pull.range.clone().unwrap_or(0..1);
                assert!(
                    !range.is_empty() && range.end <= plan.sizes[pull.blob],
                    "{plan}"
                );
            }
        }
    }

    #[test]
    fn two_hundred_seeds_have_every_fault_of_every_kind_of_member() {
        let kind = |fault: &Fault| match fault {
            Fault::Killed { rots } => format!("killed, rots: {}", rots.is_some()),
            Fault::Misbehaves(wrong) => format!("{wrong:?}")
                .split(' ')
                .next()
                .unwrap_or_default()
                .to_owned(),
            other => format!("{other:?}")
                .split(' ')
                .next()
                .unwrap_or_default()
                .to_owned(),
        };
        let who = |member: Member| {
            format!("{member:?}")
                .split('(')
                .next()
                .unwrap_or_default()
                .to_owned()
        };
        let seen: BTreeSet<_> = (1..=200)
            .flat_map(|seed| Plan::of(seed).troubles)
            .map(|trouble| (who(trouble.member), kind(&trouble.fault)))
            .collect();
        // Six of nodes, as many of the seed, three of the scheduler; the origin's nine, one of which has two codes.
        assert_eq!(seen.len(), 6 + 6 + 3 + 9, "{seen:#?}");
    }
}
