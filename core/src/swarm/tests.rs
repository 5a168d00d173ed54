//! The scheduler's messages, and the consistency of its books whatever happens.

use std::collections::BTreeMap;

use proptest::prelude::*;
use rand::SeedableRng;
use rand::rngs::StdRng;

use super::*;
use crate::application::Limits;
use crate::application::tests::{limited, purpose};
use crate::rendezvous;
use hawker_oci::digest::Algorithm;

const MIB: u64 = 1 << 20;

fn peer(n: u32) -> PeerId {
    let mut id = [0; 16];
    id[..4].copy_from_slice(&n.to_be_bytes());
    PeerId(id)
}

fn task(n: u32) -> Digest {
    Digest::of(Algorithm::Sha256, &n.to_be_bytes())
}

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn registration(n: u32, role: Role, zone: &str) -> Registration {
    Registration {
        peer: peer(n),
        role,
        place: Place {
            zone: zone.into(),
            ..Place::default()
        },
        upload_slots: 8,
        upload_rate_bytes: 0,
        reads_origins: true,
    }
}

/// The last that a peer was told of a task.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Told {
    parents: Vec<PeerId>,
    issuer: Option<PeerId>,
    fetch_from_origin: bool,
    spread: u32,
    share: Share,
    later: bool,
}

/// A swarm with a clock, and everything it said.
struct World {
    swarm: Swarm,
    rng: StdRng,
    now: Time,
    said: Vec<Output>,
    told: BTreeMap<(PeerId, Digest), Told>,
    isolated: Vec<PeerId>,
}

impl World {
    /// Past the warm-up.
    fn new() -> Self {
        let mut world = Self::cold();
        world.wait(WARM_UP);
        world
    }

    fn cold() -> Self {
        Self {
            swarm: Swarm::new(Time::default()),
            rng: StdRng::seed_from_u64(7),
            now: Time::default(),
            said: Vec::new(),
            told: BTreeMap::new(),
            isolated: Vec::new(),
        }
    }

    fn input(&mut self, input: Input) {
        self.swarm.handle(self.now, &mut self.rng, input);
        self.listen();
    }

    fn listen(&mut self) {
        while let Some(output) = self.swarm.poll() {
            match output.clone() {
                Output::Parents {
                    to,
                    task,
                    parents,
                    issuer,
                    fetch_from_origin,
                    spread,
                    share,
                    later,
                } => {
                    let told = Told {
                        parents,
                        issuer,
                        fetch_from_origin,
                        spread,
                        share,
                        later,
                    };
                    self.told.insert((to, task), told);
                }
                Output::Isolated(all) => self.isolated = all,
                Output::Vouched { .. } => {}
            }
            self.said.push(output);
        }
    }

    /// Lets time go by, with all timers in between.
    fn wait(&mut self, time: Duration) {
        let end = self.now + time;
        while let Some(deadline) = self.swarm.deadline().filter(|deadline| *deadline <= end) {
            assert!(
                deadline >= self.now || deadline == Time::default(),
                "a deadline in the past"
            );
            self.now = deadline.max(self.now);
            self.swarm.tick(self.now, &mut self.rng);
            assert!(
                self.swarm.deadline().is_none_or(|next| next > self.now),
                "a timer that does not go away"
            );
            self.listen();
        }
        self.now = end;
    }

    fn join(&mut self, peers: impl IntoIterator<Item = u32>) {
        for n in peers {
            self.input(Input::Joined(registration(n, Role::Peer, "")));
        }
    }

    fn join_seed(&mut self, n: u32) {
        self.input(Input::Joined(registration(n, Role::Seed, "")));
    }

    fn want(&mut self, n: u32, t: u32) {
        self.want_on(n, t, Terms::default());
    }

    fn want_on(&mut self, n: u32, t: u32, terms: Terms) {
        let (peer, task, size_bytes) = (peer(n), task(t), Some(20 * MIB));
        self.input(Input::Want {
            peer,
            task,
            size_bytes,
            again: false,
            reads: false,
            terms,
        });
    }

    /// A question for an application.
    fn want_for(&mut self, n: u32, t: u32, purpose: &Purpose) {
        self.want_on(
            n,
            t,
            Terms {
                purpose: purpose.clone(),
                ..Terms::default()
            },
        );
    }

    /// A question of somebody who was told who the issuer is, here before a restart or, as a guest, elsewhere.
    fn want_naming(&mut self, n: u32, t: u32, issuer: u32, guest: bool) {
        self.want_on(
            n,
            t,
            Terms {
                issuer: Some(peer(issuer)),
                guest,
                ..Terms::default()
            },
        );
    }

    fn hold(&mut self, n: u32, t: u32, pieces: u32, complete: bool) {
        let holding = Holding {
            task: task(t),
            size_bytes: 20 * MIB,
            pieces,
            complete,
        };
        self.input(Input::Holdings {
            peer: peer(n),
            replaces_all: false,
            holdings: vec![holding],
        });
    }

    fn leave(&mut self, n: u32) {
        self.input(Input::Left(peer(n)));
    }

    fn report(&mut self, reporter: u32, accused: u32, kind: ReportKind, is_vouched_for: bool) {
        let (reporter, peer) = (peer(reporter), peer(accused));
        self.input(Input::Report {
            reporter,
            peer,
            task: task(1),
            kind,
            is_vouched_for,
        });
    }

    /// Wrong bytes in task 1.
    fn accuse(&mut self, reporter: u32, accused: u32) {
        self.report(reporter, accused, ReportKind::WrongBytes, false);
    }

    /// Wrong bytes in a task that another scheduler tracks.
    fn accuse_elsewhere(&mut self, reporter: u32, accused: u32) {
        self.report(reporter, accused, ReportKind::WrongBytes, true);
    }

    fn told(&self, n: u32, t: u32) -> &Told {
        &self.told[&(peer(n), task(t))]
    }

    fn parents(&self, n: u32, t: u32) -> &[PeerId] {
        &self.told(n, t).parents
    }

    /// The peers that were told last to read the origin.
    fn readers(&self, t: u32) -> Vec<PeerId> {
        let of_task = self.told.iter().filter(|((_, told), _)| *told == task(t));
        of_task
            .filter(|(_, told)| told.fetch_from_origin)
            .map(|((peer, _), _)| *peer)
            .collect()
    }

    /// Counts again, in the plain way, what the swarm keeps count of.
    fn audit(&self) {
        let swarm = &self.swarm;
        for (id, slot) in &swarm.by_id {
            let here = swarm
                .peers
                .get(*slot)
                .expect("by_id names peers that exist");
            assert_eq!(here.about.peer, *id);
            let copies = || {
                here.tasks
                    .iter()
                    .map(|task| swarm.tasks.get(*task).and_then(|task| task.copy(*slot)))
            };
            assert!(
                copies().all(|copy| copy.is_some()),
                "a peer's tasks have copies of it"
            );
            assert_eq!(
                here.children,
                copies().flatten().map(|copy| copy.children).sum::<u32>()
            );
            assert_eq!(
                here.wants as usize,
                copies()
                    .flatten()
                    .filter(|copy| copy.want.is_some())
                    .count()
            );
        }
        assert_eq!(swarm.by_id.len(), swarm.peers.len());
        assert_eq!(swarm.by_digest.len(), swarm.tasks.len());
        assert_eq!(swarm.idle.len(), swarm.tasks.len());
        for (digest, slot) in &swarm.by_digest {
            let task = swarm
                .tasks
                .get(*slot)
                .expect("by_digest names tasks that exist");
            assert_eq!(task.digest, *digest);
            assert!(task.copies.is_sorted_by_key(|copy| copy.peer) && !task.copies.is_empty());
            let wants = || task.copies.iter().filter_map(|copy| copy.want.as_deref());
            assert_eq!(task.wanting as usize, wants().count());
            assert_eq!(
                task.readers as usize,
                wants().filter(|want| want.reads && !want.guest).count()
            );
            assert_eq!(
                task.guests as usize,
                wants().filter(|want| want.guest).count()
            );
            let naming = wants().filter(|want| want.issuer.is_some() && !want.guest);
            assert_eq!(task.naming as usize, naming.count());
            assert_eq!(swarm.wanted.contains(slot), task.wanting > 0);
            for copy in &task.copies {
                let lists = task
                    .copies
                    .iter()
                    .filter_map(|copy| copy.want.as_ref())
                    .map(|want| &want.parents);
                assert_eq!(
                    copy.children as usize,
                    lists.filter(|list| list.contains(&copy.peer)).count()
                );
                assert!(
                    swarm
                        .peers
                        .get(copy.peer)
                        .is_some_and(|peer| peer.tasks.contains(slot))
                );
                for parent in copy.want.iter().flat_map(|want| &want.parents) {
                    assert!(task.copy(*parent).is_some(), "a parent has a copy");
                    assert_ne!(*parent, copy.peer, "nobody is its own parent");
                }
            }
        }
    }
}

#[test]
fn in_a_small_burst_everybody_gets_everybody_and_the_seed_first() {
    let mut world = World::new();
    world.join_seed(0);
    world.join(1..=30);
    (1..=30).for_each(|n| world.want(n, 1));
    world.wait(ms(2000));
    for n in 1..=30 {
        let parents = world.parents(n, 1);
        assert_eq!(parents.len(), 30);
        assert_eq!(parents[0], peer(0));
        assert!(!parents.contains(&peer(n)));
        assert_eq!(world.told(n, 1).issuer, None, "a seed needs no election");
    }
    assert!(world.readers(1).is_empty());
    assert!(
        world.said.len() < 30 * 7,
        "news are gathered: {}",
        world.said.len()
    );
    world.audit();
}

#[test]
fn news_of_a_burst_come_fast() {
    let mut world = World::new();
    world.join_seed(0);
    world.join(1..=8);
    (1..=8).for_each(|n| world.want(n, 1));
    world.wait(ms(50));
    assert_eq!(world.parents(1, 1).len(), 8);
}

#[test]
fn in_a_big_burst_links_are_bounded_on_both_sides() {
    let mut world = World::new();
    world.join_seed(0);
    world.join(1..=1000);
    (1..=1000).for_each(|n| world.want(n, 1));
    world.wait(ms(5000));
    let mut children: BTreeMap<PeerId, usize> = BTreeMap::new();
    for n in 1..=1000 {
        let parents = world.parents(n, 1);
        assert!(
            (MESH_DEGREE..=MAX_PARENTS).contains(&parents.len()),
            "{n}: {}",
            parents.len()
        );
        parents
            .iter()
            .for_each(|parent| *children.entry(*parent).or_default() += 1);
    }
    assert_eq!(
        children[&peer(0)],
        SOURCE_CHILDREN as usize,
        "the seed talks to some, not to all"
    );
    assert!(
        children.values().all(|count| *count <= 100),
        "nobody is everybody's parent"
    );
    world.audit();
}

#[test]
fn the_seed_asked_is_the_one_that_rendezvous_hashing_names() {
    let mut world = World::new();
    (0..5).for_each(|n| world.join_seed(n));
    world.join([9]);
    for t in 0..50 {
        world.want(9, t);
        assert_eq!(
            world.parents(9, t),
            [rendezvous::owner(&task(t), (0..5).map(peer)).unwrap()]
        );
    }
}

#[test]
fn a_seed_that_has_it_goes_before_the_owner_and_the_owner_is_not_its_own_parent() {
    let mut world = World::new();
    (0..5).for_each(|n| world.join_seed(n));
    world.join([9]);
    let order = rendezvous::order(&task(1), (0..5).map(peer));
    let number = |id: PeerId| (0..5).find(|n| peer(*n) == id).unwrap();
    world.want(number(order[0]), 1);
    assert!(world.parents(number(order[0]), 1).is_empty());
    assert!(world.readers(1).is_empty());
    world.want(number(order[3]), 1);
    assert_eq!(world.parents(number(order[3]), 1), [order[0]]);
    world.hold(number(order[4]), 1, 23, true);
    world.want(9, 1);
    assert_eq!(world.parents(9, 1)[0], order[4]);
}

#[test]
fn complete_holders_are_few_and_from_the_same_zone_first() {
    let mut world = World::new();
    for n in 0..100 {
        world.input(Input::Joined(registration(
            n,
            Role::Peer,
            if n % 2 == 0 { "a" } else { "b" },
        )));
    }
    (0..60).for_each(|n| world.hold(n, 1, 23, true));
    world.want(98, 1);
    let near = world
        .parents(98, 1)
        .iter()
        .filter(|id| (0..60).step_by(2).any(|n| peer(n) == **id))
        .count();
    // The elected peer comes on top.
    assert!(world.parents(98, 1).len() <= MAX_COMPLETE + 1);
    assert!(near >= MAX_COMPLETE - 1, "{near}");
}

#[test]
fn a_new_holder_is_told_to_those_who_wait() {
    let mut world = World::new();
    world.join_seed(0);
    world.join(1..=3);
    world.want(1, 1);
    assert_eq!(world.parents(1, 1), [peer(0)]);
    world.hold(2, 1, 23, true);
    world.wait(ms(1000));
    assert_eq!(world.parents(1, 1), [peer(0), peer(2)]);
}

#[test]
fn without_a_seed_exactly_one_is_elected_and_named_to_all() {
    let mut world = World::new();
    world.join(1..=10);
    (1..=10).for_each(|n| world.want(n, 1));
    world.wait(ms(1000));
    assert_eq!(world.readers(1), [peer(1)], "the first to want it");
    assert!((1..=10).all(|n| world.told(n, 1).issuer == Some(peer(1))));
    assert!(
        (2..=10).all(|n| world.parents(n, 1)[0] == peer(1)),
        "and it comes first"
    );
}

#[test]
fn a_complete_holder_is_elected_before_anybody_else() {
    let mut world = World::new();
    world.join(1..=5);
    world.hold(4, 1, 23, true);
    world.want(1, 1);
    assert_eq!(world.readers(1), [peer(4)]);
    assert_eq!(world.told(1, 1).issuer, Some(peer(4)));
}

#[test]
fn the_elected_peer_is_replaced_when_it_is_gone() {
    let mut world = World::new();
    world.join(1..=5);
    (1..=5).for_each(|n| world.want(n, 1));
    world.hold(3, 1, 5, false);
    world.hold(4, 1, 7, false);
    world.leave(1);
    world.wait(GRACE - ms(100));
    assert_eq!(
        world.told(2, 1).issuer,
        Some(peer(1)),
        "within its grace it counts"
    );
    world.wait(ms(200));
    assert_eq!(
        world.told(4, 1).issuer,
        Some(peer(4)),
        "the one with most pieces"
    );
    assert!(world.told(4, 1).fetch_from_origin && world.told(2, 1).issuer == Some(peer(4)));
    assert!((2..=5).all(|n| !world.parents(n, 1).contains(&peer(1))));
}

#[test]
fn whoever_comes_back_may_be_elected_for_what_it_wanted_while_it_was_away() {
    let mut world = World::new();
    world.join([1]);
    world.leave(1);
    world.want(1, 1);
    assert_eq!(world.told(1, 1).issuer, None, "who is away is not elected");
    world.join([1]);
    world.wait(GRACE + ms(100));
    assert_eq!(world.told(1, 1).issuer, Some(peer(1)));
}

#[test]
fn a_complete_holder_is_elected_where_no_wanter_may_read_the_origin() {
    let mut world = World::new();
    for n in 1..=2 {
        let about = Registration {
            reads_origins: false,
            ..registration(n, Role::Peer, "")
        };
        world.input(Input::Joined(about));
    }
    world.want(1, 1);
    assert_eq!(world.told(1, 1).issuer, None);
    world.hold(2, 1, 23, true);
    world.wait(ms(1000));
    assert_eq!(world.told(1, 1).issuer, Some(peer(2)));
}

#[test]
fn who_may_read_what_seeds_may_not_is_elected_in_spite_of_them() {
    let mut world = World::new();
    world.join_seed(0);
    world.join(1..=3);
    (1..=3).for_each(|n| world.want(n, 1));
    assert_eq!(world.told(3, 1).issuer, None, "a seed is there");
    let input = |n| Input::Want {
        peer: peer(n),
        task: task(1),
        size_bytes: None,
        again: true,
        reads: true,
        terms: Terms::default(),
    };
    world.input(input(2));
    world.wait(ms(1000));
    assert!(world.told(2, 1).fetch_from_origin);
    assert!(
        (1..=3).all(|n| world.told(n, 1).issuer == Some(peer(2))),
        "and by its word for all"
    );
    world.input(input(3));
    world.leave(2);
    world.wait(GRACE + ms(1000));
    assert_eq!(
        world.told(1, 1).issuer,
        Some(peer(3)),
        "only who may read it comes after"
    );
}

#[test]
fn the_elected_peer_is_replaced_when_it_gets_nowhere_or_gives_up() {
    let mut world = World::new();
    world.join(1..=3);
    (1..=3).for_each(|n| world.want(n, 1));
    for pieces in 1..=4 {
        world.wait(ms(9000));
        world.hold(1, 1, pieces, false);
    }
    assert_eq!(world.told(2, 1).issuer, Some(peer(1)), "slow is not stuck");
    world.wait(ELECTION_STALL + ms(100));
    let second = world.told(2, 1).issuer;
    assert!(second.is_some_and(|issuer| issuer != peer(1)));
    world.input(Input::Forget {
        peer: second.unwrap(),
        task: task(1),
    });
    world.wait(ms(10));
    let third = world.told(1, 1).issuer;
    assert!(third.is_some() && third != second);
}

#[test]
fn a_stream_that_breaks_for_a_moment_changes_nothing() {
    let mut world = World::new();
    world.join(1..=3);
    (1..=3).for_each(|n| world.want(n, 1));
    world.wait(ms(2000));
    let before = world.told.clone();
    world.leave(1);
    world.wait(ms(500));
    world.join([1]);
    world.input(Input::Holdings {
        peer: peer(1),
        replaces_all: true,
        holdings: Vec::new(),
    });
    world.want(1, 1);
    world.wait(GRACE + ms(1000));
    assert_eq!(world.told, before);
}

#[test]
fn what_a_peer_does_not_say_again_is_forgotten() {
    let mut world = World::new();
    world.join(1..=3);
    world.want(1, 1);
    world.hold(2, 2, 23, true);
    world.wait(ms(1));
    world.join([1, 2]);
    world.input(Input::Holdings {
        peer: peer(2),
        replaces_all: true,
        holdings: Vec::new(),
    });
    world.wait(GRACE + ms(100));
    assert_eq!(world.swarm.task_count(), 0);
    world.audit();
}

#[test]
fn nobody_is_elected_before_those_who_read_already_are_back() {
    let mut world = World::cold();
    world.join([1]);
    world.want(1, 1);
    assert_eq!(world.told(1, 1).issuer, None);
    world.join([2]);
    world.hold(2, 1, 9, false);
    world.want(2, 1);
    world.wait(WARM_UP);
    assert_eq!(world.readers(1), [peer(2)]);
}

#[test]
fn after_a_restart_the_issuer_is_who_it_was() {
    let mut world = World::cold();
    world.join(1..=4);
    // Another one holds more by now, but the owner of the known table counts.
    world.hold(1, 1, 9, false);
    (1..=3).for_each(|n| world.want_naming(n, 1, 2, false));
    world.want(4, 1);
    assert!(
        (1..=3).all(|n| world.told(n, 1).issuer == Some(peer(2))),
        "its table counts on meanwhile"
    );
    assert!(world.told(2, 1).fetch_from_origin, "and it reads on");
    world.wait(WARM_UP + ms(1000));
    assert_eq!(world.readers(1), [peer(2)]);
    assert!((1..=4).all(|n| world.told(n, 1).issuer == Some(peer(2))));
    world.audit();
}

#[test]
fn an_issuer_that_is_not_back_yet_is_waited_for_and_not_for_ever() {
    for comes_back in [true, false] {
        let mut world = World::cold();
        world.join([1, 3]);
        world.want_naming(1, 1, 2, false);
        world.want_naming(3, 1, 2, false);
        world.wait(WARM_UP + ms(5000));
        assert!(world.readers(1).is_empty());
        assert_eq!(world.told(1, 1).issuer, Some(peer(2)));
        if comes_back {
            world.join([2]);
            world.hold(2, 1, 5, false);
            world.want_naming(2, 1, 2, false);
        }
        world.wait(if comes_back { ms(1000) } else { ISSUER_RETURNS });
        let issuer = world.told(1, 1).issuer;
        assert_eq!(issuer == Some(peer(2)), comes_back);
        assert_eq!(world.readers(1), [issuer.unwrap()]);
    }
}

#[test]
fn a_task_that_moves_here_keeps_its_issuer_whoever_says_so_first() {
    for goes_on in [true, false] {
        let mut world = World::new();
        world.join(1..=3);
        world.hold(2, 1, 3, false);
        world.want_naming(1, 1, 2, false);
        assert_eq!(world.told(1, 1).issuer, Some(peer(2)));
        assert!(world.readers(1).is_empty(), "it has not moved yet");
        if goes_on {
            world.want_naming(2, 1, 2, false);
        }
        // To say it again does not prolong it.
        world.wait(GRACE - ms(1000));
        world.want_naming(1, 1, 2, false);
        world.wait(ms(1000));
        assert_eq!(world.readers(1), [peer(if goes_on { 2 } else { 1 })]);
        world.audit();
    }
}

#[test]
fn beside_a_seed_one_peer_s_word_makes_nobody_the_issuer() {
    let mut world = World::cold();
    world.join_seed(0);
    world.join(1..=5);
    world.wait(WARM_UP);
    world.want_naming(1, 1, 1, false);
    world.want(2, 1);
    assert_eq!(world.told(2, 1).issuer, None);
    // Two who say the same were told so before a restart.
    world.want_naming(3, 1, 1, false);
    world.wait(ms(1000));
    assert_eq!(world.told(2, 1).issuer, Some(peer(1)));
    world.audit();
}

#[test]
fn a_hot_task_is_spread_step_by_step_and_only_while_it_is_hot() {
    let mut world = World::new();
    world.join_seed(0);
    world.join(1..=HOT_WANTERS * 2);
    (1..=HOT_WANTERS).for_each(|n| world.want(n, 1));
    assert_eq!(world.told(HOT_WANTERS, 1).spread, 1);
    world.want(HOT_WANTERS + 1, 1);
    assert_eq!(world.told(HOT_WANTERS + 1, 1).spread, 2);
    (HOT_WANTERS + 2..=HOT_WANTERS + 100).for_each(|n| world.want(n, 1));
    assert_eq!(
        world.told(HOT_WANTERS + 100, 1).spread,
        2,
        "those who were told have time to move"
    );
    world.wait(SPREAD_EVERY);
    world.want(HOT_WANTERS + 101, 1);
    assert_eq!(
        world.told(HOT_WANTERS + 101, 1).spread,
        3,
        "it is still too many"
    );
    (1..=HOT_WANTERS * 2).for_each(|n| {
        world.input(Input::Forget {
            peer: peer(n),
            task: task(1),
        })
    });
    world.want(1, 1);
    assert_eq!(world.told(1, 1).spread, 1);
}

#[test]
fn guests_get_parents_and_the_issuer_they_know_and_nobody_is_elected_for_them() {
    let mut world = World::new();
    world.join(1..=5);
    world.hold(4, 1, 3, false);
    (2..=3).for_each(|n| world.want_naming(n, 1, 1, true));
    world.wait(ms(1000));
    for n in 2..=3 {
        let told = world.told(n, 1);
        assert_eq!((told.issuer, told.spread), (Some(peer(1)), 0));
        assert!(
            [1, 4, 5 - n]
                .iter()
                .all(|other| told.parents.contains(&peer(*other))),
            "{told:?}"
        );
    }
    assert!(world.readers(1).is_empty());
    world.leave(1);
    world.wait(GRACE + ELECTION_STALL);
    assert!(world.readers(1).is_empty(), "another scheduler elects");
    assert_eq!(world.told(2, 1).spread, 1, "and there they are sent");
    world.audit();
}

#[test]
fn a_guest_s_right_to_read_counts_for_nothing() {
    let mut world = World::new();
    world.join(1..=2);
    let terms = Terms {
        guest: true,
        ..Terms::default()
    };
    world.input(Input::Want {
        peer: peer(1),
        task: task(1),
        size_bytes: None,
        again: false,
        reads: true,
        terms,
    });
    world.want(2, 1);
    assert_eq!(
        world.readers(1),
        [peer(2)],
        "it is elected elsewhere, or not at all"
    );
}

#[test]
fn a_seed_known_from_before_the_restart_is_waited_for() {
    let mut world = World::cold();
    world.input(Input::Expected(
        registration(0, Role::Seed, ""),
        Duration::from_secs(20),
    ));
    world.join([1]);
    world.wait(WARM_UP);
    world.want(1, 1);
    assert_eq!(world.parents(1, 1), [peer(0)]);
    world.wait(Duration::from_secs(21));
    assert_eq!(world.readers(1), [peer(1)]);
}

#[test]
fn the_last_seed_gone_an_election_follows_and_a_seed_that_comes_leaves_the_elected_alone() {
    let mut world = World::new();
    world.join_seed(0);
    world.join(1..=2);
    world.want(1, 1);
    world.leave(0);
    world.wait(GRACE + ms(1000));
    assert_eq!(
        world.told(1, 1),
        &Told {
            parents: vec![],
            issuer: Some(peer(1)),
            fetch_from_origin: true,
            spread: 1,
            share: Share::ALL,
            later: false
        }
    );
    world.join_seed(0);
    world.want(2, 1);
    assert_eq!(
        world.parents(2, 1),
        [peer(1)],
        "one copy from the origin, not two"
    );
    world.want(2, 2);
    assert_eq!(world.parents(2, 2), [peer(0)], "new tasks are the seed's");
}

#[test]
fn two_reporters_isolate_for_everyone_and_probation_ends_it() {
    let mut world = World::new();
    world.join(1..=6);
    (1..=6).for_each(|n| world.want(n, 1));
    world.wait(ms(1000));
    world.accuse(2, 1);
    world.accuse(2, 1);
    assert!(
        world.isolated.is_empty(),
        "one reporter is not enough, however often"
    );
    world.accuse(3, 1);
    assert_eq!(world.isolated, [peer(1)]);
    world.wait(ms(2000));
    assert!((2..=6).all(|n| !world.parents(n, 1).contains(&peer(1))));
    assert_ne!(
        world.told(2, 1).issuer,
        Some(peer(1)),
        "nor does it read the origin for others"
    );
    world.want(4, 2);
    world.want(1, 2);
    world.wait(ms(2000));
    assert!(world.parents(4, 2).is_empty());
    world.wait(ISOLATION);
    assert!(world.isolated.is_empty());
    world.join_seed(0);
    [1, 2, 3, 5].into_iter().for_each(|n| world.want(n, 3));
    assert_eq!(
        world.parents(5, 3).last(),
        Some(&peer(1)),
        "on probation it comes last"
    );
}

#[test]
fn an_accusation_counts_only_between_peers_that_met_in_that_task() {
    let mut world = World::new();
    world.join(1..=5);
    let vouched = |world: &World| {
        world
            .said
            .iter()
            .filter(|said| matches!(said, Output::Vouched { .. }))
            .count()
    };
    (2..=5).for_each(|n| world.accuse(n, 1));
    (1..=3).for_each(|n| world.want(n, 2));
    (2..=5).for_each(|n| world.accuse(n, 1));
    assert!(
        world.isolated.is_empty(),
        "they met in another task, or not at all"
    );
    assert_eq!(vouched(&world), 0);
    (1..=3).for_each(|n| world.want(n, 1));
    world.accuse(2, 1);
    // A report comes a second after the task is done.
    world.input(Input::Forget {
        peer: peer(3),
        task: task(1),
    });
    world.accuse(4, 1);
    assert!(world.isolated.is_empty());
    world.accuse(3, 1);
    assert_eq!(world.isolated, [peer(1)]);
    assert_eq!(vouched(&world), 2);
}

#[test]
fn two_members_that_lie_isolate_no_seed() {
    let mut world = World::new();
    world.join_seed(100);
    world.join_seed(101);
    world.join(1..=9);
    (1..=9).for_each(|n| world.want(n, 1));
    world.hold(100, 1, 23, true);
    world.hold(101, 1, 23, true);
    for seed in [100, 101] {
        for _ in 0..3 {
            world.report(1, seed, ReportKind::WrongBytes, true);
            world.report(2, seed, ReportKind::WrongBytes, true);
            world.report(1, seed, ReportKind::Stalled, true);
            world.report(2, seed, ReportKind::NotHeld, true);
        }
    }
    assert!(world.isolated.is_empty());
    // Seven of nine: one seed goes, the other one stays whatever they say.
    (3..=9).for_each(|n| world.accuse_elsewhere(n, 100));
    assert_eq!(world.isolated, [peer(100)]);
    (3..=9).for_each(|n| world.accuse_elsewhere(n, 101));
    assert_eq!(world.isolated, [peer(100)], "the last seed stays");
}

#[test]
fn a_removed_member_is_gone_at_once() {
    let mut world = World::new();
    world.join(1..=3);
    (1..=3).for_each(|n| world.want(n, 1));
    world.input(Input::Removed(peer(1)));
    world.wait(ms(1000));
    assert_eq!(world.swarm.peer_count(), 2);
    assert!((2..=3).all(|n| !world.parents(n, 1).contains(&peer(1))));
    assert_ne!(world.told(2, 1).issuer, Some(peer(1)));
    world.audit();
}

#[test]
fn who_is_away_is_not_blamed_for_stalling() {
    let mut world = World::new();
    world.join(1..=4);
    (1..=4).for_each(|n| world.want(n, 1));
    let complain = |world: &mut World, reporter: u32| {
        world.report(reporter, 1, ReportKind::Stalled, false);
    };
    world.leave(1);
    (2..=4).for_each(|n| complain(&mut world, n));
    world.join([1]);
    assert!(world.isolated.is_empty());
    (2..=3).for_each(|n| complain(&mut world, n));
    assert_eq!(world.isolated, [peer(1)]);
    assert_eq!(world.swarm.isolations(IsolationReason::Stalled), 1);
    world.wait(STALL_ISOLATION);
    assert!(world.isolated.is_empty());
}

#[test]
fn an_issuer_that_contradicts_itself_is_isolated_at_once() {
    let mut world = World::new();
    world.join(1..=3);
    (1..=3).for_each(|n| world.want(n, 1));
    world.input(Input::Contradicted(peer(1)));
    world.input(Input::Contradicted(peer(99)));
    assert_eq!(world.isolated, [peer(1)]);
    world.wait(ms(1000));
    assert!(
        world
            .told(2, 1)
            .issuer
            .is_some_and(|issuer| issuer != peer(1))
    );
    assert_eq!(world.swarm.isolations(IsolationReason::Contradiction), 1);
}

#[test]
fn isolation_survives_a_reconnect() {
    let mut world = World::new();
    world.join(1..=3);
    world.accuse_elsewhere(2, 1);
    world.accuse_elsewhere(3, 1);
    world.leave(1);
    world.wait(GRACE * 2);
    world.join([1]);
    world.hold(1, 1, 23, true);
    world.want(2, 1);
    assert!(world.parents(2, 1).is_empty());
}

#[test]
fn a_flood_of_reports_is_cut_off() {
    let mut world = World::new();
    world.join(1..=2);
    for _ in 0..10_000 {
        world.report(1, 2, ReportKind::Served(1), false);
    }
    assert_eq!(
        world.swarm.peer_state(world.now, peer(2)).served_bytes,
        REPORTS_BURST as u64
    );
}

#[test]
fn who_wants_too_much_is_not_answered() {
    let mut world = World::new();
    world.join([1]);
    (0..=MAX_WANTS_PER_PEER).for_each(|t| world.want(1, t));
    assert!(
        !world
            .told
            .contains_key(&(peer(1), task(MAX_WANTS_PER_PEER)))
    );
    assert_eq!(world.swarm.task_count() as u32, MAX_WANTS_PER_PEER);
    world.audit();
}

#[test]
fn idle_tasks_are_forgotten_and_live_ones_are_not() {
    let mut world = World::new();
    world.join(1..=2);
    world.hold(1, 1, 23, true);
    world.hold(1, 2, 23, true);
    world.wait(IDLE_TTL / 2);
    world.want(2, 2);
    world.wait(IDLE_TTL / 2 + ms(1));
    assert_eq!(world.swarm.task_count(), 1);
    world.audit();
}

#[test]
fn asking_again_names_the_seed_and_prefers_others() {
    let mut world = World::new();
    world.join_seed(0);
    world.join(1..=200);
    (1..=200).for_each(|n| world.want(n, 1));
    let before = world.parents(200, 1).to_vec();
    assert!(!before.contains(&peer(0)));
    world.input(Input::Want {
        peer: peer(200),
        task: task(1),
        size_bytes: None,
        again: true,
        reads: false,
        terms: Terms::default(),
    });
    let after = world.parents(200, 1);
    assert_eq!(after[0], peer(0));
    assert!(
        after
            .iter()
            .filter(|parent| before.contains(parent))
            .count()
            < before.len() / 2
    );
    world.audit();
}

/// Two zones, some time after a task was wanted: "a" with the seed, number 1, and eight who want it, and "b" with these many peers,
/// numbers from 100 on, of whom the first `wanters` want it.
fn zoned(peers: u32, wanters: u32) -> World {
    let mut world = World::new();
    world.input(Input::Joined(registration(1, Role::Seed, "a")));
    (2..10).for_each(|n| world.input(Input::Joined(registration(n, Role::Peer, "a"))));
    (100..100 + peers).for_each(|n| world.input(Input::Joined(registration(n, Role::Peer, "b"))));
    (2..10)
        .chain(100..100 + wanters)
        .for_each(|n| world.want(n, 1));
    world.wait(ms(2000));
    world
}

/// The peers of zone "b" that take anything from elsewhere, and those that take nothing.
fn gateways(world: &World, wanters: u32) -> (Vec<u32>, Vec<u32>) {
    (100..100 + wanters).partition(|n| world.told(*n, 1).share != Share::NONE)
}

/// By how many each piece is taken from other zones.
fn takers(world: &World, peers: impl Iterator<Item = u32>) -> Vec<usize> {
    let shares: Vec<Share> = peers.map(|n| world.told(n, 1).share).collect();
    (0..8)
        .map(|piece| shares.iter().filter(|share| share.contains(piece)).count())
        .collect()
}

#[test]
fn in_a_zone_without_a_source_each_piece_is_taken_from_elsewhere_by_one() {
    for wanters in [1, 3, 20] {
        let world = zoned(20, wanters);
        assert_eq!(takers(&world, 100..100 + wanters), [1; 8], "{wanters}");
        assert_eq!(takers(&world, 2..10), [0; 8], "the seed is here");
        let (gateways, others) = gateways(&world, wanters);
        for n in gateways {
            let elsewhere = world
                .parents(n, 1)
                .iter()
                .filter(|parent| (2..10).any(|n| peer(n) == **parent));
            assert_eq!(elsewhere.count(), 8, "{n}");
        }
        for n in others {
            let near =
                |parent: &PeerId| *parent == peer(1) || (100..120).any(|n| peer(n) == *parent);
            assert!(
                world.parents(n, 1).iter().all(near),
                "but for the seed it knows nobody elsewhere"
            );
        }
        world.audit();
    }
}

#[test]
fn the_share_of_a_gateway_that_is_gone_or_isolated_is_taken_over() {
    let mut world = zoned(20, 20);
    let (gateways, _) = gateways(&world, 20);
    let (gone, liar, weary) = (gateways[0], gateways[1], gateways[2]);
    world.leave(gone);
    [2, 3]
        .into_iter()
        .for_each(|reporter| world.accuse_elsewhere(reporter, liar));
    // One gives up with a part of it.
    world.hold(weary, 1, 3, false);
    world.input(Input::Forget {
        peer: peer(weary),
        task: task(1),
    });
    world.wait(GRACE + ms(2000));
    let others = (100..120).filter(|n| ![gone, liar, weary].contains(n));
    assert_eq!(takers(&world, others), [1; 8]);
    world.audit();
}

#[test]
fn whom_its_zone_does_not_suffice_takes_everything_from_anywhere_and_who_is_near_a_holder_of_all_nothing()
 {
    let mut world = zoned(10, 9);
    let (_, others) = gateways(&world, 9);
    let outsider = others[0];
    let (peer, task, size_bytes) = (peer(outsider), task(1), Some(20 * MIB));
    let terms = Terms::default();
    world.input(Input::Want {
        peer,
        task,
        size_bytes,
        again: true,
        reads: false,
        terms,
    });
    assert_eq!(world.told(outsider, 1).share, Share::ALL);
    world.hold(outsider, 1, 3, false);
    world.wait(ms(2000));
    assert_eq!(
        world.told(outsider, 1).share,
        Share::NONE,
        "it gets on again"
    );
    world.hold(100, 1, 20, true);
    world.want(109, 1);
    assert_eq!(world.told(109, 1).share, Share::NONE);
    world.audit();
}

#[test]
fn where_whoever_alone_could_read_it_is_gone_another_is_elected() {
    let mut world = World::new();
    world.join(0..2);
    let want = |world: &mut World, n, reads| {
        let (peer, task, size_bytes, terms) = (peer(n), task(1), Some(20 * MIB), Terms::default());
        world.input(Input::Want {
            peer,
            task,
            size_bytes,
            again: false,
            reads,
            terms,
        });
    };
    // Its stream is over: it may not be elected, and what it said counts as long as it may come back.
    world.leave(0);
    want(&mut world, 0, true);
    want(&mut world, 1, false);
    assert!(world.readers(1).is_empty());
    world.wait(GRACE + ms(100));
    assert_eq!(world.readers(1), [peer(1)]);
}

#[derive(Clone, Debug)]
enum Step {
    Join(u32),
    Leave(u32),
    Want(u32, u32, bool),
    WantNaming(u32, u32, u32, bool),
    Hold(u32, u32, u32),
    HoldOnly(u32, u32),
    Forget(u32, u32),
    Accuse(u32, u32),
    Remove(u32),
    Wait(u64),
}

const PEERS: u32 = 60;
const SEEDS: u32 = 3;

fn step() -> impl Strategy<Value = Step> {
    let (p, t) = (|| 0..PEERS, || 0u32..4);
    prop_oneof![
        3 => p().prop_map(Step::Join),
        1 => p().prop_map(Step::Leave),
        6 => (p(), t(), any::<bool>()).prop_map(|(p, t, again)| Step::Want(p, t, again)),
        2 => (p(), t(), p(), any::<bool>())
            .prop_map(|(p, t, issuer, guest)| Step::WantNaming(p, t, issuer, guest)),
        4 => (p(), t(), 0u32..24).prop_map(|(p, t, pieces)| Step::Hold(p, t, pieces)),
        1 => (p(), t()).prop_map(|(p, t)| Step::HoldOnly(p, t)),
        1 => (p(), t()).prop_map(|(p, t)| Step::Forget(p, t)),
        1 => (p(), p()).prop_map(|(p, accused)| Step::Accuse(p, accused)),
        1 => p().prop_map(Step::Remove),
        2 => (0u64..5000).prop_map(Step::Wait),
    ]
}

fn apply(world: &mut World, step: &Step) {
    match *step {
        Step::Join(n) if n < SEEDS => world.join_seed(n),
        Step::Join(n) => {
            let zone = ["a", "b"][n as usize % 2];
            world.input(Input::Joined(registration(n, Role::Peer, zone)));
        }
        Step::Leave(n) => world.leave(n),
        Step::Want(n, t, again) => {
            world.input(Input::Want {
                peer: peer(n),
                task: task(t),
                size_bytes: Some(20 * MIB),
                again,
                reads: again,
                terms: Terms::default(),
            });
        }
        Step::WantNaming(n, t, issuer, guest) => world.want_naming(n, t, issuer, guest),
        Step::Hold(n, t, pieces) => world.hold(n, t, pieces, pieces == 23),
        Step::HoldOnly(n, t) => {
            let holdings = vec![Holding {
                task: task(t),
                size_bytes: 20 * MIB,
                pieces: 23,
                complete: true,
            }];
            world.input(Input::Holdings {
                peer: peer(n),
                replaces_all: true,
                holdings,
            });
        }
        Step::Forget(n, t) => world.input(Input::Forget {
            peer: peer(n),
            task: task(t),
        }),
        Step::Accuse(n, accused) => world.accuse_elsewhere(n, accused),
        Step::Remove(n) => world.input(Input::Removed(peer(n))),
        Step::Wait(time) => world.wait(ms(time)),
    }
}

/// Checks all messages since `from` against the present facts about the peers.
fn check_said(world: &World, from: usize) {
    for output in &world.said[from..] {
        let Output::Parents {
            to,
            parents,
            issuer,
            fetch_from_origin,
            spread,
            ..
        } = output
        else {
            continue;
        };
        assert!(parents.len() <= MAX_PARENTS);
        assert!(!parents.contains(to), "nobody is named to itself");
        assert!(
            parents
                .iter()
                .all(|parent| world.swarm.by_id.contains_key(parent)),
            "the gone are not named"
        );
        assert!(
            parents
                .iter()
                .all(|parent| !world.isolated.contains(parent)),
            "the isolated are not named"
        );
        let unique: BTreeSet<_> = parents.iter().collect();
        assert_eq!(unique.len(), parents.len());
        assert_eq!(*fetch_from_origin, *issuer == Some(*to));
        assert!((0..=MAX_SPREAD).contains(spread));
        assert!(issuer.is_none_or(|issuer| !world.isolated.contains(&issuer)));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn whatever_happens_the_books_and_the_words_are_right(steps in proptest::collection::vec(step(), 1..200)) {
        let mut world = World::cold();
        for step in &steps {
            // Words of a long wait are checked at its end, when some of the named may be gone: waits are short then.
            let from = world.said.len();
            if let Step::Wait(time) = step {
                for _ in 0..*time / 50 {
                    let (from, peers) = (world.said.len(), world.swarm.by_id.len());
                    world.wait(ms(50));
                    let nobody_went = world.swarm.by_id.len() == peers;
                    let isolated_as_before = world.isolated == world.swarm.isolated(world.now);
                    if nobody_went && isolated_as_before && world.said.len() == from + 1 {
                        check_said(&world, from);
                    }
                }
            } else {
                apply(&mut world, step);
                check_said(&world, from);
            }
            world.audit();
        }
        // If somebody waits and no seed is there, exactly one eligible peer is elected.
        world.wait(WARM_UP + ISSUER_RETURNS + GRACE + ms(1000));
        for slot in world.swarm.wanted.clone() {
            let elected = world.swarm.tasks.get(slot).and_then(|task| task.elected());
            let task = world.swarm.tasks.get(slot).unwrap();
            let no_seed = world.swarm.live_seeds(world.now).next().is_none();
            let eligible = task.copies.iter().any(|copy| {
                let is_ours = copy.want.as_deref().is_some_and(|want| !want.guest);
                is_ours && world.swarm.is_namable(world.now, copy.peer)
            });
            prop_assert!(elected.is_some() || !no_seed || !eligible);
        }
    }

    #[test]
    fn same_inputs_and_chance_give_the_same_words(steps in proptest::collection::vec(step(), 1..150)) {
        let run = || {
            let mut world = World::cold();
            steps.iter().for_each(|step| apply(&mut world, step));
            world.wait(ms(3000));
            world.said
        };
        prop_assert_eq!(run(), run());
    }
}

#[test]
fn no_more_peers_are_elected_for_an_application_than_may_be_and_the_most_urgent_task_is_next() {
    let mut world = World::new();
    world.swarm.applications(limited(
        "batch",
        Limits {
            origins: Some(1),
            ..Limits::default()
        },
    ));
    world.join(0..6);
    world.want_for(0, 0, &purpose("batch", 3));
    world.want_for(1, 1, &purpose("batch", 6));
    world.want_for(2, 2, &purpose("batch", 1));
    world.want(3, 3);
    assert_eq!(world.readers(0), [peer(0)]);
    assert_eq!(world.readers(3), [peer(3)], "nobody limits it");
    for n in [1, 2] {
        assert!(
            world.readers(n).is_empty() && world.told(n, n).later,
            "{:?}",
            world.told(n, n)
        );
    }
    let labels = purpose("batch", 3).labels;
    assert_eq!(world.swarm.application_elections(), [(labels, 1, 2)]);
    // They hear of it again, and one of them gets the place that becomes free.
    let heard = world.said.len();
    world.wait(POSTPONED_FOR);
    assert!(world.said.len() > heard);
    world.hold(0, 0, 20, true);
    world.wait(POSTPONED_FOR + ms(1));
    assert_eq!(
        (world.readers(2), world.readers(1)),
        (vec![peer(2)], vec![])
    );
    assert!(!world.told(2, 2).later && world.told(1, 1).later);
    // Every wanter gives up, or the limit goes: nothing is left behind.
    world.swarm.applications(Arc::default());
    world.wait(POSTPONED_FOR + ms(1));
    assert_eq!(world.readers(1), [peer(1)]);
    world.audit();
}

#[test]
fn for_a_task_that_has_waited_for_long_one_is_elected_before_each_reads_it_itself() {
    let mut world = World::new();
    world.swarm.applications(limited(
        "batch",
        Limits {
            origins: Some(1),
            ..Limits::default()
        },
    ));
    world.join(0..6);
    world.want_for(0, 0, &purpose("batch", 3));
    (1..4).for_each(|n| world.want_for(n, 1, &purpose("batch", 3)));
    // The first goes on: its place does not become free.
    for pieces in 1..POSTPONED_AT_MOST.as_secs() as u32 {
        world.hold(0, 0, pieces, false);
        world.wait(ms(1000));
        assert_eq!(world.readers(1), [] as [PeerId; 0], "{pieces}");
    }
    world.wait(POSTPONED_FOR + ms(1));
    assert_eq!(world.readers(1).len(), 1);
    world.audit();
}

#[test]
fn an_application_is_named_no_more_seeds_than_it_may_have() {
    let mut world = World::new();
    world.swarm.applications(limited(
        "batch",
        Limits {
            seeds: Some(1),
            ..Limits::default()
        },
    ));
    (100..104).for_each(|seed| world.join_seed(seed));
    world.join(0..2);
    (100..104).for_each(|seed| world.hold(seed, 0, 20, true));
    world.want(0, 0);
    world.want_for(1, 0, &purpose("batch", 3));
    let seeds = |n| {
        let is_seed = |parent: &&PeerId| (100..104).any(|seed| **parent == peer(seed));
        world.parents(n, 0).iter().filter(is_seed).count()
    };
    assert!(seeds(0) > 1);
    assert_eq!(seeds(1), 1);
    assert!(
        world.parents(1, 0).contains(&peer(0)),
        "others are named all the same"
    );
}
