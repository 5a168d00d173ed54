//! The downloads that one member can cause at a seed, and those that two seeds cause for each other.

use super::table::UNPROVEN_A_PEER_BYTES;
use super::tests::{Names, id};
use super::*;
use crate::message::Offer;
use hawker_oci::digest::{Algorithm, ChainValue};
use rand::SeedableRng;

const SEED: u8 = 200;
const OTHER_SEED: u8 = 201;
const ROGUE: u8 = 1;
const MEMBER: u8 = 2;
const TIB: u64 = 1 << 40;

/// A seed, with a driver that opens and runs what members ask for.
struct Seed {
    node: Node<Names>,
    now: Time,
    said: Vec<(PeerId, Message)>,
    reading: BTreeSet<Digest>,
    reads: usize,
}

fn task(n: u32) -> Digest {
    Digest::of(Algorithm::Sha256, &n.to_be_bytes())
}

fn interest(task: Digest) -> Message {
    Message::Interest {
        task,
        source: Source {
            registry: "registry.test".into(),
            repository: "a/b".into(),
        },
        size_bytes: None,
        token: None,
        purpose: Purpose::default(),
        far: None,
        passive: false,
        partial: false,
    }
}

impl Seed {
    fn new(me: u8) -> Self {
        let roles = [
            (SEED, Role::Seed),
            (OTHER_SEED, Role::Seed),
            (ROGUE, Role::Peer),
            (MEMBER, Role::Peer),
        ];
        let roles: BTreeMap<PeerId, Role> =
            roles.into_iter().map(|(n, role)| (id(n), role)).collect();
        let config = Config {
            me: id(me),
            role: Role::Seed,
            upload_slots: 4,
            in_flight_bytes: 32 << 20,
            layout: PieceLayout::new,
        };
        let mut node = Node::new(
            config,
            Names {
                me: id(me),
                roles: roles.clone(),
            },
            StdRng::seed_from_u64(1),
        );
        let now = Time(Duration::from_secs(1));
        for (peer, role) in roles.into_iter().filter(|(peer, _)| *peer != id(me)) {
            node.handle(now, Input::PeerUp { peer, role });
        }
        Self {
            node,
            now,
            said: Vec::new(),
            reading: BTreeSet::new(),
            reads: 0,
        }
    }

    fn hear(&mut self, from: u8, message: Message) {
        self.node.handle(
            self.now,
            Input::Message {
                peer: id(from),
                message,
            },
        );
        self.settle();
    }

    fn wait(&mut self, time: Duration) {
        self.now = self.now + time;
        self.settle();
    }

    fn settle(&mut self) {
        self.node.handle(self.now, Input::Decide);
        while let Some(output) = self.node.poll() {
            match output {
                Output::Load {
                    task,
                    source,
                    child,
                    ..
                } => {
                    let known = None;
                    let opening = Opening {
                        source,
                        right: Right::Own,
                        known,
                        is_committed: false,
                        announce: true,
                    };
                    let as_owner = self.node.connected.get(&child.peer) == Some(&Role::Seed);
                    self.node.handle(
                        self.now,
                        Input::Open {
                            task,
                            opening: Box::new(opening),
                        },
                    );
                    self.node.handle(
                        self.now,
                        Input::Read {
                            task,
                            is_read: false,
                        },
                    );
                    self.node.handle(
                        self.now,
                        Input::Run {
                            task,
                            whole: true,
                            as_owner,
                        },
                    );
                    self.node.handle(self.now, Input::Adopt { task, child });
                    self.node.handle(self.now, Input::Decide);
                }
                Output::Send(peer, message) => self.said.push((peer, message)),
                Output::ReadOrigin { task, .. } => {
                    self.reading.insert(task);
                    self.reads += 1;
                }
                Output::StopOrigin(task) => {
                    self.reading.remove(&task);
                }
                Output::LetGo(task) => {
                    self.node.handle(self.now, Input::Close(task));
                }
                _ => {}
            }
        }
    }

    /// The number of refusals to a member of this kind since the last call.
    fn refused(&mut self, member: u8) -> usize {
        let said = std::mem::take(&mut self.said);
        let is_refusal = |(peer, message): &(PeerId, Message)| {
            *peer == id(member)
                && matches!(
                    message,
                    Message::Unavailable {
                        reason: Refusal::Busy,
                        ..
                    }
                )
        };
        said.iter().filter(|said| is_refusal(said)).count()
    }

    fn fail_all(&mut self) {
        for task in std::mem::take(&mut self.reading) {
            self.node.handle(
                self.now,
                Input::OriginOver {
                    task,
                    failure: Some(Failure::Status(404)),
                },
            );
        }
        self.settle();
    }
}

#[test]
fn one_member_has_a_share_of_the_downloads_and_the_next_member_is_served_at_once() {
    let mut seed = Seed::new(SEED);
    (0..100).for_each(|n| seed.hear(ROGUE, interest(task(n))));
    assert_eq!(seed.reading.len(), 16);
    assert_eq!(
        seed.refused(ROGUE),
        100 - 64,
        "no more tasks are kept for it"
    );
    seed.hear(MEMBER, interest(task(1000)));
    assert!(seed.reading.contains(&task(1000)));
    seed.wait(Duration::from_millis(1900));
    assert_eq!(seed.refused(ROGUE), 0);
    seed.wait(Duration::from_millis(200));
    assert_eq!(
        seed.refused(ROGUE),
        64 - 16,
        "what could not be begun is refused"
    );
    assert_eq!(seed.reading.len(), 17);
}

#[test]
fn a_task_that_an_honest_member_waits_for_as_well_is_downloaded_at_its_expense() {
    let mut seed = Seed::new(SEED);
    (0..40).for_each(|n| seed.hear(ROGUE, interest(task(n))));
    assert!(!seed.reading.contains(&task(30)));
    seed.hear(MEMBER, interest(task(30)));
    assert!(seed.reading.contains(&task(30)));
    // It goes on when the rogue goes, and what only the rogue waited for does not.
    let now = seed.now;
    seed.node.handle(now, Input::PeerDown(id(ROGUE)));
    seed.settle();
    assert_eq!(seed.reading, BTreeSet::from([task(30)]));
}

#[test]
fn huge_blobs_of_one_member_take_a_share_of_the_memory() {
    let mut seed = Seed::new(SEED);
    (0..6).for_each(|n| seed.hear(ROGUE, interest(task(n))));
    assert_eq!(seed.reading.len(), 6);
    for n in 0..6 {
        let now = seed.now;
        seed.node.handle(
            now,
            Input::Sized {
                task: task(n),
                size_bytes: 2 * TIB,
            },
        );
        seed.settle();
    }
    assert_eq!(seed.reading.len(), 1, "one is always allowed");
    assert_eq!(seed.refused(ROGUE), 5);
    assert_eq!(
        seed.node.tasks.len(),
        1,
        "and of the others nothing is kept"
    );
    seed.hear(MEMBER, interest(task(1000)));
    let now = seed.now;
    seed.node.handle(
        now,
        Input::Sized {
            task: task(1000),
            size_bytes: 64 << 20,
        },
    );
    seed.settle();
    assert!(seed.reading.contains(&task(1000)));
}

#[test]
fn huge_blobs_of_one_client_do_not_delay_other_pulls_through_the_same_node() {
    let mut seed = Seed::new(SEED);
    let sized = |seed: &mut Seed, n, size_bytes| {
        let now = seed.now;
        seed.node.handle(
            now,
            Input::Sized {
                task: task(n),
                size_bytes,
            },
        );
        seed.settle();
    };
    seed.hear(MEMBER, interest(task(0)));
    sized(&mut seed, 0, 2 * TIB);
    seed.wait(Duration::from_millis(1));
    // Blobs with pieces of several MiB fill the rest of the member's part of the memory.
    for n in 1..6 {
        seed.hear(MEMBER, interest(task(n)));
        sized(&mut seed, n, TIB >> n);
    }
    for n in 10..14 {
        seed.hear(MEMBER, interest(task(n)));
        assert!(seed.reading.contains(&task(n)), "a common blob waits");
        sized(&mut seed, n, 8 << 20);
        assert!(seed.reading.contains(&task(n)), "a common blob gives way");
    }
    assert!(
        seed.reading.contains(&task(0)),
        "one huge blob goes on beside the others"
    );
}

#[test]
fn a_member_with_too_many_failures_is_refused_at_once() {
    let mut seed = Seed::new(SEED);
    for n in 0..200 {
        seed.hear(MEMBER, interest(task(n)));
        seed.fail_all();
    }
    seed.refused(MEMBER);
    seed.hear(MEMBER, interest(task(1000)));
    assert!(!seed.reading.contains(&task(1000)));
    assert_eq!(
        seed.refused(MEMBER),
        1,
        "it may read the origin itself, and does not wait to hear so"
    );
}

#[test]
fn a_registry_that_a_member_names_is_probed_at_a_bounded_rate() {
    let mut seed = Seed::new(SEED);
    for n in 0..6000 {
        seed.hear(ROGUE, interest(task(n)));
        if n % 8 == 7 {
            seed.fail_all();
            seed.wait(Duration::from_millis(5));
        }
    }
    // 750 steps of 5 ms and what a download that failed waits for.
    assert!((32..100).contains(&seed.reads), "{} reads", seed.reads);
    seed.hear(MEMBER, interest(task(10_000)));
    assert!(seed.reading.contains(&task(10_000)));
}

/// Delivers what two seeds say to each other until they are silent.
fn exchange(a: &mut Seed, b: &mut Seed) {
    for _ in 0..20 {
        let (from_a, from_b) = (std::mem::take(&mut a.said), std::mem::take(&mut b.said));
        let to = |said: Vec<(PeerId, Message)>, whom: u8| {
            said.into_iter()
                .filter(move |(peer, _)| *peer == id(whom))
                .map(|(_, message)| message)
        };
        to(from_a, OTHER_SEED).for_each(|message| b.hear(SEED, message));
        to(from_b, SEED).for_each(|message| a.hear(OTHER_SEED, message));
    }
}

/// As the driver does with a task that nobody waits for.
fn rest_unwaited(seed: &mut Seed) {
    let unwaited = seed
        .node
        .tasks
        .keys()
        .filter(|task| !seed.node.is_waited_for(task))
        .copied();
    for task in unwaited.collect::<Vec<_>>() {
        seed.node.handle(seed.now, Input::Pause(task));
    }
    seed.settle();
}

#[test]
fn two_seeds_do_not_keep_a_task_in_play_for_each_other() {
    let (mut a, mut b) = (Seed::new(SEED), Seed::new(OTHER_SEED));
    a.node
        .handle(a.now, Input::Seeds(vec![Named::near(id(OTHER_SEED))]));
    b.node
        .handle(b.now, Input::Seeds(vec![Named::near(id(SEED))]));
    for n in 0..6 {
        a.hear(ROGUE, interest(task(n)));
        b.hear(ROGUE, interest(task(n)));
    }
    exchange(&mut a, &mut b);
    assert_eq!(
        a.reading.len() + b.reading.len(),
        6,
        "each is read by its owner"
    );
    for seed in [&mut a, &mut b] {
        let now = seed.now;
        seed.node.handle(now, Input::PeerDown(id(ROGUE)));
        seed.settle();
    }
    for _ in 0..3 {
        exchange(&mut a, &mut b);
        rest_unwaited(&mut a);
        rest_unwaited(&mut b);
    }
    for seed in [&a, &b] {
        assert!(
            seed.node.tasks.values().all(|task| !task.is_running()),
            "one is kept in play"
        );
        assert_eq!(seed.reading.len(), 0);
    }
}

#[test]
fn a_seed_goes_on_for_another_seed_as_long_as_a_member_waits_there() {
    let (mut a, mut b) = (Seed::new(SEED), Seed::new(OTHER_SEED));
    a.node
        .handle(a.now, Input::Seeds(vec![Named::near(id(OTHER_SEED))]));
    b.node
        .handle(b.now, Input::Seeds(vec![Named::near(id(SEED))]));
    let owned_by_b = (0..)
        .map(task)
        .find(|task| rendezvous::owner(task, [id(SEED), id(OTHER_SEED)]) == Some(id(OTHER_SEED)));
    let task = owned_by_b.unwrap();
    a.hear(MEMBER, interest(task));
    exchange(&mut a, &mut b);
    assert!(b.reading.contains(&task) && b.node.is_waited_for(&task));
    assert!(a.node.is_waited_for(&task));
    a.hear(MEMBER, Message::Leave { task });
    exchange(&mut a, &mut b);
    assert!(!b.node.is_waited_for(&task), "it is told that nobody waits");
    assert!(!a.node.is_waited_for(&task));
}

#[test]
fn a_member_that_went_before_the_disk_was_looked_at_is_no_child() {
    let mut seed = Seed::new(SEED);
    let now = seed.now;
    seed.node.handle(
        now,
        Input::Message {
            peer: id(ROGUE),
            message: interest(task(1)),
        },
    );
    seed.node.handle(now, Input::PeerDown(id(ROGUE)));
    seed.settle();
    assert!(!seed.node.is_waited_for(&task(1)) && !seed.node.has_children(&task(1)));
    assert!(seed.reading.is_empty());
}

/// A table of a blob of this size, signed by a member.
fn table(task: Digest, size_bytes: u64, issuer: u8) -> Message {
    let mut table = PieceTable::new(task, PieceLayout::new(size_bytes));
    (0..table.full_count()).for_each(|_| table.push(ChainValue::initial(Algorithm::Sha256)));
    Names {
        me: id(issuer),
        roles: BTreeMap::new(),
    }
    .sign(&mut table, true);
    let (values, signed) = (table.values().to_vec(), table.signed().cloned());
    Message::Table {
        task,
        size_bytes,
        first: 0,
        values,
        signed,
    }
}

fn unproven_bytes(node: &Node<Names>) -> usize {
    let links = node.tasks.values().flat_map(|task| task.links.values());
    links.map(|link| link.unproven.bytes()).sum()
}

#[test]
fn tables_of_invented_digests_leave_no_memory_behind() {
    let mut seed = Seed::new(SEED);
    for n in 0..200 {
        seed.hear(ROGUE, table(task(n), TIB / 8, ROGUE));
    }
    assert_eq!(
        (seed.node.tasks.len(), unproven_bytes(&seed.node)),
        (0, 0),
        "no task of this node"
    );
    for n in 0..200 {
        seed.hear(ROGUE, interest(task(n)));
        seed.hear(ROGUE, table(task(n), TIB / 8, ROGUE));
    }
    assert!(
        unproven_bytes(&seed.node) <= UNPROVEN_A_PEER_BYTES,
        "{}",
        unproven_bytes(&seed.node)
    );
    // Of a stranger's signature, and of none, nothing at all is kept.
    for n in 0..50 {
        seed.hear(MEMBER, interest(task(1000 + n)));
        seed.hear(MEMBER, table(task(1000 + n), 64 << 20, 77));
        let unsigned = match table(task(1000 + n), 64 << 20, MEMBER) {
            Message::Table {
                task,
                size_bytes,
                first,
                values,
                ..
            } => Message::Table {
                task,
                size_bytes,
                first,
                values,
                signed: None,
            },
            other => other,
        };
        seed.hear(MEMBER, unsigned);
    }
    let kept = |peer: u8| seed.node.unproven_bytes(id(peer));
    assert_eq!(kept(MEMBER), 0);
}

#[test]
fn offers_of_blobs_of_unknown_size_are_bounded_by_their_bytes() {
    let mut seed = Seed::new(SEED);
    for n in 0..64 {
        seed.hear(ROGUE, interest(task(n)));
        for _ in 0..64 {
            let offer = Offer::Bits(vec![1; 100_000]);
            seed.hear(
                ROGUE,
                Message::Have {
                    task: task(n),
                    size_bytes: 10 * TIB,
                    offer,
                },
            );
        }
    }
    assert!(unproven_bytes(&seed.node) <= UNPROVEN_A_PEER_BYTES + 64 * 64 * size_of::<Offer>());
}
