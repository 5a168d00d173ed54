//! Several nodes, one seed and an origin in one process: messages arrive at once, pieces take time on serial links.

use super::*;
use crate::application::Limits;
use crate::application::tests::{limited, purpose};
use crate::message::Offer;
use crate::piece::SignedPrefix;
use hawker_oci::digest::{Algorithm, Chain};
use rand::SeedableRng;

/// Signs with nothing but a name: here members are honest about who they are.
#[derive(Clone)]
pub(super) struct Names {
    pub(super) me: PeerId,
    pub(super) roles: BTreeMap<PeerId, Role>,
}

impl TableSigner for Names {
    fn check(&self, signed: &SignedPrefix, statement: &[u8]) -> Option<Role> {
        let good = signed.signature == Digest::of(Algorithm::Sha256, statement).as_bytes();
        good.then(|| self.roles.get(&signed.issuer).copied())
            .flatten()
    }

    fn sign(&self, table: &mut PieceTable, sealed: bool) {
        let statement = table.statement(sealed, 0, &["r.example".to_owned()]);
        table.sign(SignedPrefix {
            count: table.values().len() as u32,
            sealed,
            signed_at_s: 0,
            issuer: self.me,
            registries: vec!["r.example".to_owned()],
            certificate: Vec::new().into(),
            signature: Digest::of(Algorithm::Sha256, &statement)
                .as_bytes()
                .to_vec(),
        });
    }
}

/// Bytes a second of each host's link, each way.
const LINK: f64 = 12_500_000.0;

struct Host {
    node: Node<Names>,
    up_free: Time,
    down_free: Time,
    origin: Option<(PieceIndex, u64)>,
    generation: u64,
    requests: BTreeMap<(PeerId, u32), (Digest, PieceIndex)>,
    shown: BTreeSet<PieceIndex>,
    wakes: Option<Time>,
    done: Option<Time>,
    failed: Option<Failure>,
    lies: bool,
    /// The memory of a host whose disk takes nothing, in bytes.
    without_disk: Option<u64>,
    in_memory: BTreeSet<PieceIndex>,
    /// How far a host without disk reads the origin, and the reading that waits for that.
    read_until: PieceIndex,
    origin_waits: Option<(u64, PieceIndex)>,
    /// Its reader takes nothing any more.
    stands_still: bool,
}

enum What {
    Arrive {
        to: PeerId,
        from: PeerId,
        message: Message,
    },
    Piece {
        to: PeerId,
        from: PeerId,
        request: u32,
        piece: PieceIndex,
    },
    Sent {
        from: PeerId,
        to: PeerId,
        request: u32,
        piece: PieceIndex,
    },
    Origin {
        to: PeerId,
        generation: u64,
        piece: PieceIndex,
    },
    Wake(PeerId),
}

struct World {
    data: Vec<u8>,
    task: Digest,
    layout: PieceLayout,
    hosts: BTreeMap<PeerId, Host>,
    queue: BTreeMap<(Time, u64), What>,
    next: u64,
    now: Time,
    origin_free: Time,
    origin_bytes: u64,
    origin_works: bool,
    elect: Option<PeerId>,
    dead: BTreeSet<PeerId>,
    trace: Chain,
    sent: BTreeMap<PeerId, u64>,
}

pub(super) fn id(n: u8) -> PeerId {
    PeerId([n; 16])
}

const SEED: u8 = 200;

/// Over the bytes of a piece, from its start.
fn chain_over(node: &Node<Names>, task: &Digest, piece: PieceIndex, bytes: &[u8]) -> Option<Chain> {
    let mut chain = node.table(task)?.chain_at(piece)?;
    chain.update(bytes);
    Some(chain)
}

fn config(me: PeerId, role: Role, in_flight_bytes: u64) -> Config {
    Config {
        me,
        role,
        upload_slots: 4,
        in_flight_bytes,
        layout: PieceLayout::new,
    }
}

impl World {
    fn new(nodes: u8, seed: bool, size: usize, rng: u64) -> Self {
        let data: Vec<u8> = (0..size)
            .map(|i| (i.wrapping_mul(2_654_435_761) >> 7) as u8)
            .collect();
        let task = Digest::of(Algorithm::Sha256, &data);
        let mut roles: BTreeMap<PeerId, Role> = (0..nodes).map(|n| (id(n), Role::Peer)).collect();
        if seed {
            roles.insert(id(SEED), Role::Seed);
        }
        let now = Time::default();
        let hosts = roles.iter().map(|(me, role)| {
            let mut node = Node::new(
                config(*me, *role, 32 << 20),
                Names {
                    me: *me,
                    roles: roles.clone(),
                },
                StdRng::seed_from_u64(rng + u64::from(me.0[0])),
            );
            node.handle(
                now,
                Input::Seeds(if seed {
                    vec![Named::near(id(SEED))]
                } else {
                    Vec::new()
                }),
            );
            let host = Host {
                node,
                up_free: Time::default(),
                down_free: Time::default(),
                origin: None,
                generation: 0,
                requests: BTreeMap::new(),
                shown: BTreeSet::new(),
                wakes: None,
                done: None,
                failed: None,
                lies: false,
                without_disk: None,
                in_memory: BTreeSet::new(),
                read_until: 0,
                origin_waits: None,
                stands_still: false,
            };
            (*me, host)
        });
        Self {
            hosts: hosts.collect(),
            layout: PieceLayout::new(size as u64),
            data,
            task,
            queue: BTreeMap::new(),
            next: 0,
            now: Time::default(),
            origin_free: Time::default(),
            origin_bytes: 0,
            origin_works: true,
            elect: None,
            dead: BTreeSet::new(),
            trace: Chain::new(Algorithm::Sha256),
            sent: BTreeMap::new(),
        }
    }

    fn at(&mut self, when: Time, what: What) {
        self.next += 1;
        self.queue.insert((when, self.next), what);
    }

    fn source() -> Source {
        Source {
            registry: "registry.test".into(),
            repository: "library/image".into(),
        }
    }

    /// These nodes want the task at once.
    fn pull(&mut self, nodes: u8) {
        (0..nodes).for_each(|n| self.want(id(n)));
        (0..nodes).for_each(|n| self.settle(id(n)));
    }

    fn want(&mut self, peer: PeerId) {
        let (now, task, count) = (self.now, self.task, self.layout.count());
        let node = &mut self.hosts.get_mut(&peer).unwrap().node;
        let opening = Opening {
            source: Self::source(),
            right: Right::Own,
            known: None,
            is_committed: false,
            announce: true,
        };
        node.handle(
            now,
            Input::Open {
                task,
                opening: Box::new(opening),
            },
        );
        node.handle(
            now,
            Input::Run {
                task,
                whole: true,
                as_owner: false,
            },
        );
        node.handle(
            now,
            Input::Reader {
                task,
                reader: 1,
                pieces: Some(0..count),
                ahead: None,
                partial: false,
            },
        );
    }

    fn settle(&mut self, peer: PeerId) {
        if self.dead.contains(&peer) {
            return;
        }
        let now = self.now;
        self.hosts
            .get_mut(&peer)
            .unwrap()
            .node
            .handle(now, Input::Decide);
        while let Some(output) = self.hosts.get_mut(&peer).unwrap().node.poll() {
            self.carry_out(peer, output);
        }
        let host = self.hosts.get_mut(&peer).unwrap();
        let soonest = host
            .node
            .deadline(now)
            .filter(|at| host.wakes.is_none_or(|wakes| wakes <= now || *at < wakes));
        if let Some(at) = soonest {
            host.wakes = Some(at);
            self.at(at, What::Wake(peer));
        }
    }

    fn carry_out(&mut self, me: PeerId, output: Output) {
        let now = self.now;
        self.trace
            .update(format!("{now:?} {me:?} {output:?}").as_bytes());
        match output {
            Output::Dial(peer) if self.dead.contains(&peer) => {
                self.hosts
                    .get_mut(&me)
                    .unwrap()
                    .node
                    .handle(now, Input::DialFailed(peer));
            }
            Output::Dial(peer) => {
                for (a, b) in [(me, peer), (peer, me)] {
                    let role = if b == id(SEED) {
                        Role::Seed
                    } else {
                        Role::Peer
                    };
                    self.hosts
                        .get_mut(&a)
                        .unwrap()
                        .node
                        .handle(now, Input::PeerUp { peer: b, role });
                }
            }
            Output::Send(to, message) => {
                self.at(
                    now + Duration::from_millis(1),
                    What::Arrive {
                        to,
                        from: me,
                        message,
                    },
                );
            }
            Output::Download {
                peer,
                request,
                task,
                piece,
                prefetch,
                priority,
            } => {
                self.hosts
                    .get_mut(&me)
                    .unwrap()
                    .requests
                    .insert((peer, request), (task, piece));
                let message = Message::Request {
                    request,
                    task,
                    piece,
                    prefetch,
                    priority,
                };
                self.at(
                    now + Duration::from_millis(1),
                    What::Arrive {
                        to: peer,
                        from: me,
                        message,
                    },
                );
            }
            Output::Cancel { peer, request } => {
                self.hosts
                    .get_mut(&me)
                    .unwrap()
                    .requests
                    .remove(&(peer, request));
                let message = Message::Cancel { request };
                self.at(
                    now + Duration::from_millis(1),
                    What::Arrive {
                        to: peer,
                        from: me,
                        message,
                    },
                );
            }
            Output::Upload {
                peer,
                request,
                piece,
                ..
            } if self.has_dropped(me, piece) => {
                let message = Message::Reject {
                    request,
                    reason: Refusal::Unable,
                };
                self.at(
                    now + Duration::from_millis(1),
                    What::Arrive {
                        to: peer,
                        from: me,
                        message,
                    },
                );
                self.hosts
                    .get_mut(&me)
                    .unwrap()
                    .node
                    .handle(now, Input::Uploaded { peer, request });
            }
            Output::Upload {
                peer,
                request,
                piece,
                ..
            } => {
                *self.sent.entry(me).or_default() += self.layout.len_bytes(piece);
                let took = Duration::from_secs_f64(self.layout.len_bytes(piece) as f64 / LINK);
                let sent = self.hosts[&me].up_free.max(now) + took;
                self.hosts.get_mut(&me).unwrap().up_free = sent;
                self.at(
                    sent,
                    What::Sent {
                        from: me,
                        to: peer,
                        request,
                        piece,
                    },
                );
            }
            Output::ReadOrigin { from, .. } => {
                let host = self.hosts.get_mut(&me).unwrap();
                host.generation += 1;
                let generation = host.generation;
                host.origin = Some((from, generation));
                if !self.origin_works {
                    host.node.handle(
                        now,
                        Input::OriginOver {
                            task: self.task,
                            failure: Some(Failure::Unreachable),
                        },
                    );
                    return;
                }
                host.node.handle(
                    now,
                    Input::Sized {
                        task: self.task,
                        size_bytes: self.layout.size_bytes(),
                    },
                );
                self.schedule_origin(me, generation, from);
            }
            Output::StopOrigin(_) => self.hosts.get_mut(&me).unwrap().origin = None,
            Output::Contradiction(tables) => panic!("{me:?} shows two tables: {tables:?}"),
            Output::Want { .. } => {
                let others: Vec<PeerId> = self.hosts.keys().copied().filter(|p| *p != me).collect();
                let (task, elect) = (self.task, self.elect);
                let others: Vec<Named> = others.into_iter().map(Named::near).collect();
                let node = &mut self.hosts.get_mut(&me).unwrap().node;
                node.handle(
                    now,
                    Input::Parents {
                        task,
                        parents: others,
                        issuer: elect,
                        elected: elect == Some(me),
                        share: Share::ALL,
                    },
                );
            }
            Output::Load {
                task,
                source,
                token: _,
                size_bytes: _,
                child,
            } => {
                let host = self.hosts.get_mut(&me).unwrap();
                if me == id(SEED) {
                    host.node.handle(
                        now,
                        Input::Open {
                            task,
                            opening: Box::new(Opening {
                                source,
                                right: Right::Own,
                                known: None,
                                is_committed: false,
                                announce: true,
                            }),
                        },
                    );
                    host.node.handle(
                        now,
                        Input::Run {
                            task,
                            whole: true,
                            as_owner: false,
                        },
                    );
                    host.node.handle(now, Input::Adopt { task, child });
                } else if !host.node.is_running(&task) && !host.node.is_complete(&task) {
                    host.node.handle(
                        now,
                        Input::Refuse {
                            peer: child.peer,
                            task,
                            reason: Refusal::NotHeld,
                        },
                    );
                }
            }
            Output::Show(_, piece) => {
                let host = self.hosts.get_mut(&me).unwrap();
                assert!(
                    host.node.held(&self.task).unwrap().contains(piece),
                    "only what is verified is shown"
                );
                host.shown.insert(piece);
                if host.without_disk.is_some() && me != id(SEED) && !host.stands_still {
                    let count = self.layout.count();
                    let at = (0..count).find(|piece| !host.shown.contains(piece));
                    host.node.handle(
                        now,
                        Input::Reader {
                            task: self.task,
                            reader: 1,
                            pieces: at.map(|at| at..count),
                            ahead: None,
                            partial: false,
                        },
                    );
                }
            }
            Output::Drop(_, piece) => {
                let host = self.hosts.get_mut(&me).unwrap();
                assert!(host.in_memory.remove(&piece));
                if !host.node.held(&self.task).unwrap().contains(piece) {
                    host.shown.remove(&piece);
                }
            }
            Output::ReadUntil(_, end) => {
                let host = self.hosts.get_mut(&me).unwrap();
                host.read_until = end;
                if let Some((generation, piece)) = host.origin_waits.take() {
                    self.schedule_origin(me, generation, piece);
                }
            }
            Output::Sized(..) => self.lose_disk(me),
            Output::Complete(_) => {
                let host = self.hosts.get_mut(&me).unwrap();
                assert_eq!(
                    host.shown.len() as u32,
                    self.layout.count(),
                    "a complete blob is shown whole"
                );
                host.done.get_or_insert(now);
            }
            Output::Failed(_, failure) => self.hosts.get_mut(&me).unwrap().failed = Some(failure),
            Output::Poisoned(_) => self.hosts.get_mut(&me).unwrap().shown.clear(),
            Output::Report(..)
            | Output::TableGrew(_)
            | Output::Recheck(_)
            | Output::RatesChanged
            | Output::LetGo(_)
            | Output::Alone(..) => {}
        }
    }

    /// A host whose disk is full loses it for this task too.
    fn lose_disk(&mut self, me: PeerId) {
        let (now, task, count) = (self.now, self.task, self.layout.count());
        let host = self.hosts.get_mut(&me).unwrap();
        if let Some(budget_bytes) = host.without_disk {
            host.node.handle(
                now,
                Input::WithoutDisk {
                    task,
                    on_disk: PieceSet::empty(count),
                    budget_bytes,
                },
            );
            if me != id(SEED) {
                host.node.handle(
                    now,
                    Input::Reader {
                        task,
                        reader: 1,
                        pieces: Some(0..count),
                        ahead: None,
                        partial: false,
                    },
                );
            }
        }
    }

    fn keep_in_memory(&mut self, me: PeerId, piece: PieceIndex, verdict: Option<Verdict>) {
        let layout = self.layout;
        let host = self.hosts.get_mut(&me).unwrap();
        if let (Some(budget_bytes), Some(Verdict::Keep)) = (host.without_disk, verdict) {
            host.in_memory.insert(piece);
            let bytes: u64 = host
                .in_memory
                .iter()
                .map(|piece| layout.len_bytes(*piece))
                .sum();
            assert!(
                bytes <= budget_bytes + layout.piece_bytes(),
                "{me:?} holds {bytes} bytes"
            );
        }
    }

    fn has_dropped(&self, me: PeerId, piece: PieceIndex) -> bool {
        let host = &self.hosts[&me];
        host.without_disk.is_some() && !host.in_memory.contains(&piece)
    }

    fn schedule_origin(&mut self, to: PeerId, generation: u64, piece: PieceIndex) {
        if piece >= self.layout.count() {
            return;
        }
        let host = self.hosts.get_mut(&to).unwrap();
        if host.without_disk.is_some() && piece >= host.read_until {
            host.origin_waits = Some((generation, piece));
            return;
        }
        let took = Duration::from_secs_f64(self.layout.len_bytes(piece) as f64 / LINK);
        let sent = self.origin_free.max(self.now) + took;
        self.origin_free = sent;
        self.origin_bytes += self.layout.len_bytes(piece);
        self.at(
            sent,
            What::Origin {
                to,
                generation,
                piece,
            },
        );
    }

    fn chain(&self, piece: PieceIndex, node: &Node<Names>, corrupt: bool) -> Option<Chain> {
        let range = self.layout.range(piece);
        let mut bytes = self.data[range.start as usize..range.end as usize].to_vec();
        if corrupt {
            bytes[0] ^= 1;
        }
        chain_over(node, &self.task, piece, &bytes)
    }

    fn step(&mut self) -> bool {
        let Some(((when, _), what)) = self.queue.pop_first() else {
            return false;
        };
        self.now = when;
        let now = when;
        let whom = match what {
            What::Arrive { to, from, message } => {
                if self.dead.contains(&to) || self.dead.contains(&from) {
                    return true;
                }
                if let Message::Reject { request, reason } = message {
                    let node = &mut self.hosts.get_mut(&to).unwrap().node;
                    node.handle(
                        now,
                        Input::PieceFailed {
                            peer: from,
                            request,
                            refused: Some(reason),
                            fault: Fault::Failed,
                        },
                    );
                } else {
                    self.hosts.get_mut(&to).unwrap().node.handle(
                        now,
                        Input::Message {
                            peer: from,
                            message,
                        },
                    );
                }
                to
            }
            What::Piece {
                to,
                from,
                request,
                piece,
            } => {
                if self.dead.contains(&to) || self.dead.contains(&from) {
                    return true;
                }
                if self
                    .hosts
                    .get_mut(&to)
                    .unwrap()
                    .requests
                    .remove(&(from, request))
                    .is_some()
                {
                    let lies = self.hosts[&from].lies;
                    let node = &self.hosts[&to].node;
                    if let Some(chain) = self.chain(piece, node, lies) {
                        let verdict = self.hosts.get_mut(&to).unwrap().node.handle(
                            now,
                            Input::Piece {
                                peer: from,
                                request,
                                chain,
                            },
                        );
                        assert!(
                            !lies || verdict != Some(Verdict::Keep),
                            "wrong bytes are never kept"
                        );
                        self.keep_in_memory(to, piece, verdict);
                    }
                }
                to
            }
            What::Sent {
                from,
                to,
                request,
                piece,
            } => {
                let took = Duration::from_secs_f64(self.layout.len_bytes(piece) as f64 / LINK);
                let link = self.hosts.get_mut(&to).unwrap();
                let came = now.max(link.down_free + took);
                link.down_free = came;
                self.at(
                    came,
                    What::Piece {
                        to,
                        from,
                        request,
                        piece,
                    },
                );
                let node = &mut self.hosts.get_mut(&from).unwrap().node;
                node.handle(now, Input::Delivered { peer: to, request });
                node.handle(now, Input::Uploaded { peer: to, request });
                from
            }
            What::Origin {
                to,
                generation,
                piece,
            } => {
                let host = &self.hosts[&to];
                if host.origin.is_none_or(|(_, g)| g != generation) || self.dead.contains(&to) {
                    return true;
                }
                let chain = self
                    .chain(piece, &host.node, false)
                    .expect("the origin is read in order");
                let node = &mut self.hosts.get_mut(&to).unwrap().node;
                let verdict = node.handle(
                    now,
                    Input::OriginPiece {
                        task: self.task,
                        piece,
                        chain,
                    },
                );
                self.keep_in_memory(to, piece, verdict);
                if self.hosts[&to].origin.is_some() {
                    self.schedule_origin(to, generation, piece + 1);
                }
                to
            }
            What::Wake(peer) => peer,
        };
        self.settle(whom);
        true
    }

    fn run_until(&mut self, end: Duration, mut over: impl FnMut(&Self) -> bool) {
        while self.now.0 < end && !over(self) && self.step() {}
    }

    fn all_done(&self, nodes: u8) -> bool {
        (0..nodes).all(|n| self.dead.contains(&id(n)) || self.hosts[&id(n)].done.is_some())
    }

    fn kill(&mut self, peer: PeerId) {
        self.dead.insert(peer);
        let now = self.now;
        let others: Vec<PeerId> = self.hosts.keys().copied().filter(|p| *p != peer).collect();
        for other in others {
            self.hosts
                .get_mut(&other)
                .unwrap()
                .node
                .handle(now, Input::PeerDown(peer));
            self.settle(other);
        }
    }

    fn with_scheduler(&mut self) {
        for host in self.hosts.values_mut() {
            host.node.handle(self.now, Input::Scheduler(true));
        }
    }
}

const MIB: usize = 1 << 20;

/// Seconds that one copy takes on one link.
fn one_copy(size: usize) -> f64 {
    size as f64 / LINK
}

#[test]
fn a_node_alone_reads_from_the_origin() {
    let mut world = World::new(1, false, 3 * MIB + 17, 1);
    world.pull(1);
    world.run_until(Duration::from_secs(60), |w| w.all_done(1));
    assert!(world.all_done(1));
    assert_eq!(world.origin_bytes, world.layout.size_bytes());
}

#[test]
fn eight_nodes_at_once_cost_one_copy_and_little_more_than_its_time() {
    let mut world = World::new(8, true, 64 * MIB, 7);
    world.with_scheduler();
    world.pull(8);
    world.run_until(Duration::from_secs(120), |w| w.all_done(8));
    assert!(
        world.all_done(8),
        "{:?}",
        world.hosts.values().map(|h| h.done).collect::<Vec<_>>()
    );
    assert_eq!(world.origin_bytes, world.layout.size_bytes());
    let last = world.hosts.values().filter_map(|h| h.done).max().unwrap();
    let ratio = last.0.as_secs_f64() / one_copy(64 * MIB);
    assert!(ratio < 1.3, "{ratio}");
}

#[test]
fn without_a_scheduler_the_seed_alone_still_costs_one_copy() {
    let mut world = World::new(4, true, 8 * MIB, 3);
    world.pull(4);
    world.run_until(Duration::from_secs(120), |w| w.all_done(4));
    assert!(world.all_done(4));
    assert_eq!(world.origin_bytes, world.layout.size_bytes());
}

#[test]
fn without_a_seed_the_elected_node_reads_for_all() {
    let mut world = World::new(4, false, 16 * MIB, 5);
    world.with_scheduler();
    world.elect = Some(id(2));
    world.pull(4);
    world.run_until(Duration::from_secs(120), |w| w.all_done(4));
    assert!(world.all_done(4));
    assert_eq!(world.origin_bytes, world.layout.size_bytes());
}

/// Hosts without disk, and how many copies all nodes cost in how many times the time of one.
fn pull_without_disks(hosts: &[u8], nodes: u8, size: usize) -> (f64, f64) {
    let mut world = World::new(nodes, true, size, 21);
    world.with_scheduler();
    for host in hosts {
        world.hosts.get_mut(&id(*host)).unwrap().without_disk = Some(4 << 20);
    }
    world.pull(nodes);
    world.run_until(Duration::from_secs(300), |w| w.all_done(nodes));
    assert!(
        world.all_done(nodes),
        "{:?}",
        world.hosts.values().map(|h| h.done).collect::<Vec<_>>()
    );
    let last = world.hosts.values().filter_map(|h| h.done).max().unwrap();
    (
        world.origin_bytes as f64 / size as f64,
        last.0.as_secs_f64() / one_copy(size),
    )
}

#[test]
fn a_seed_without_disk_feeds_its_children_once() {
    for nodes in [1, 2, 4, 8] {
        let (copies, time_ratio) = pull_without_disks(&[SEED], nodes, 32 * MIB);
        assert!(
            copies == 1.0 && time_ratio < 1.6,
            "{nodes} nodes: {copies} copies, {time_ratio}"
        );
    }
}

#[test]
fn a_node_without_disk_costs_no_further_copy() {
    for hosts in [&[0][..], &[0, SEED], &[0, 1, SEED]] {
        let (copies, time_ratio) = pull_without_disks(hosts, 4, 32 * MIB);
        assert!(
            copies < 1.1 && time_ratio < 2.5,
            "{hosts:?}: {copies} copies, {time_ratio}"
        );
    }
}

#[test]
fn where_nobody_has_a_disk_all_are_fed_by_the_seed() {
    let (copies, time_ratio) = pull_without_disks(&[0, 1, 2, SEED], 3, 32 * MIB);
    assert!(
        copies < 1.3 && time_ratio < 4.5,
        "{copies} copies, {time_ratio}"
    );
}

#[test]
fn a_reader_that_stands_still_holds_no_memory() {
    let mut world = World::new(1, false, 32 * MIB, 27);
    world.hosts.get_mut(&id(0)).unwrap().without_disk = Some(4 << 20);
    world.pull(1);
    world.run_until(Duration::from_millis(1300), |_| false);
    let task = world.task;
    let host = world.hosts.get_mut(&id(0)).unwrap();
    assert!(host.node.needs_memory(&task));
    host.stands_still = true;
    world.run_until(Duration::from_secs(5), |_| false);
    assert!(
        !world.hosts[&id(0)].in_memory.is_empty(),
        "it may come back soon"
    );
    world.run_until(Duration::from_secs(60), |_| false);
    let host = &world.hosts[&id(0)];
    assert!(
        host.in_memory.is_empty() && !host.node.needs_memory(&task),
        "{:?}",
        host.in_memory
    );
}

#[test]
fn a_node_without_disk_whose_share_shrinks_fetches_again_what_it_had_to_drop() {
    let mut world = World::new(2, true, 32 * MIB, 22);
    world.with_scheduler();
    world.hosts.get_mut(&id(0)).unwrap().without_disk = Some(8 << 20);
    world.pull(2);
    world.run_until(Duration::from_millis(1200), |_| false);
    let task = world.task;
    let now = world.now;
    let host = world.hosts.get_mut(&id(0)).unwrap();
    host.without_disk = Some(8 << 20);
    host.node.handle(
        now,
        Input::MemoryBudget {
            task,
            budget_bytes: 1 << 20,
        },
    );
    world.settle(id(0));
    world.run_until(Duration::from_secs(60), |w| w.all_done(2));
    assert!(
        world.all_done(2),
        "{:?}",
        world.hosts.values().map(|h| h.done).collect::<Vec<_>>()
    );
    assert!(world.origin_bytes as f64 / (32 * MIB) as f64 <= 1.1);
}

#[test]
fn a_task_without_disk_and_memory_asks_nobody_until_it_gets_memory() {
    let (now, task) = (Time::default(), Digest::of(Algorithm::Sha256, b"huge"));
    let names = Names {
        me: id(0),
        roles: BTreeMap::new(),
    };
    let mut node = Node::new(
        config(id(0), Role::Peer, 1 << 20),
        names,
        StdRng::seed_from_u64(1),
    );
    let layout = PieceLayout::new(32 << 20);
    let opening = Opening {
        source: World::source(),
        right: Right::Own,
        known: None,
        is_committed: false,
        announce: true,
    };
    node.handle(now, Input::Scheduler(true));
    node.handle(
        now,
        Input::Open {
            task,
            opening: Box::new(opening),
        },
    );
    node.handle(
        now,
        Input::Sized {
            task,
            size_bytes: layout.size_bytes(),
        },
    );
    node.handle(
        now,
        Input::Run {
            task,
            whole: true,
            as_owner: false,
        },
    );
    node.handle(
        now,
        Input::WithoutDisk {
            task,
            on_disk: PieceSet::empty(layout.count()),
            budget_bytes: 0,
        },
    );
    let asks = |node: &mut Node<Names>, from: u64| {
        let mut asks = 0;
        for second in from..from + 60 {
            node.handle(Time(Duration::from_secs(second)), Input::Decide);
            asks += std::iter::from_fn(|| node.poll())
                .filter(|output| matches!(output, Output::Want { .. } | Output::ReadOrigin { .. }))
                .count();
        }
        asks
    };
    assert_eq!(asks(&mut node, 0), 0);
    node.handle(
        Time(Duration::from_secs(60)),
        Input::MemoryBudget {
            task,
            budget_bytes: 4 << 20,
        },
    );
    assert!(asks(&mut node, 60) > 1);
}

#[test]
fn a_child_that_takes_nothing_does_not_stop_a_seed_without_disk() {
    let mut world = World::new(3, true, 32 * MIB, 23);
    world.with_scheduler();
    world.hosts.get_mut(&id(SEED)).unwrap().without_disk = Some(4 << 20);
    world.pull(3);
    world.run_until(Duration::from_millis(800), |_| false);
    // It says nothing more, and its connections stand.
    world.dead.insert(id(2));
    world.run_until(Duration::from_secs(60), |w| w.all_done(2));
    assert!(
        world.all_done(2),
        "{:?}",
        world.hosts.values().map(|h| h.done).collect::<Vec<_>>()
    );
    let copies = world.origin_bytes as f64 / (32 * MIB) as f64;
    assert!(copies < 1.3, "{copies} copies");
}

#[test]
fn a_seed_whose_disk_has_room_again_gets_the_rest_from_its_children() {
    let mut world = World::new(3, true, 32 * MIB, 25);
    world.with_scheduler();
    world.hosts.get_mut(&id(SEED)).unwrap().without_disk = Some(4 << 20);
    world.pull(3);
    world.run_until(Duration::from_millis(1500), |_| false);
    let (now, task, count) = (world.now, world.task, world.layout.count());
    let seed = world.hosts.get_mut(&id(SEED)).unwrap();
    seed.without_disk = None;
    seed.node.handle(
        now,
        Input::DiskAgain {
            task,
            on_disk: PieceSet::empty(count),
        },
    );
    if let Some((generation, piece)) = seed.origin_waits.take() {
        world.schedule_origin(id(SEED), generation, piece);
    }
    world.settle(id(SEED));
    let all = |w: &World| w.all_done(3) && w.hosts[&id(SEED)].node.is_complete(&w.task);
    world.run_until(Duration::from_secs(120), all);
    assert!(
        all(&world),
        "{:?}",
        world.hosts.values().map(|h| h.done).collect::<Vec<_>>()
    );
    let copies = world.origin_bytes as f64 / (32 * MIB) as f64;
    assert!(copies < 1.1, "{copies} copies");
}

#[test]
fn a_reader_of_parts_gets_their_pieces_and_no_others() {
    let mut world = World::new(1, true, 16 * MIB, 3);
    let (now, task, layout) = (world.now, world.task, world.layout);
    let node = &mut world.hosts.get_mut(&id(0)).unwrap().node;
    let opening = Opening {
        source: World::source(),
        right: Right::Own,
        known: None,
        is_committed: false,
        announce: true,
    };
    node.handle(
        now,
        Input::Open {
            task,
            opening: Box::new(opening),
        },
    );
    node.handle(
        now,
        Input::Sized {
            task,
            size_bytes: layout.size_bytes(),
        },
    );
    node.handle(
        now,
        Input::Run {
            task,
            whole: false,
            as_owner: false,
        },
    );
    node.handle(
        now,
        Input::Reader {
            task,
            reader: 1,
            pieces: Some(6..7),
            ahead: None,
            partial: true,
        },
    );
    let mut ahead = PieceSet::empty(layout.count());
    for piece in [2, 9] {
        ahead.insert(piece);
    }
    node.reads_ahead(&task, 1, ahead);
    world.settle(id(0));
    world.run_until(Duration::from_secs(20), |_| false);
    let held: Vec<_> = world.hosts[&id(0)]
        .node
        .held(&task)
        .unwrap()
        .iter()
        .collect();
    assert_eq!(held, [2, 6, 9]);
}

/// A node whose clients read these pieces only.
fn read_parts(world: &mut World, peer: PeerId, reader: u64, pieces: Range<PieceIndex>) {
    let (now, task, size_bytes) = (world.now, world.task, world.layout.size_bytes());
    let node = &mut world.hosts.get_mut(&peer).unwrap().node;
    let opening = Opening {
        source: World::source(),
        right: Right::Own,
        known: None,
        is_committed: false,
        announce: true,
    };
    node.handle(
        now,
        Input::Open {
            task,
            opening: Box::new(opening),
        },
    );
    node.handle(now, Input::Sized { task, size_bytes });
    node.handle(
        now,
        Input::Run {
            task,
            whole: false,
            as_owner: false,
        },
    );
    node.handle(
        now,
        Input::Reader {
            task,
            reader,
            pieces: Some(pieces),
            ahead: None,
            partial: true,
        },
    );
    world.settle(peer);
}

#[test]
fn several_readers_of_parts_get_any_piece_of_a_seed_at_once() {
    let mut world = World::new(3, true, 32 * MIB, 3);
    let task = world.task;
    // The third node wants the whole blob, and new pieces are dealt to it alone.
    for whole in [false, true] {
        for peer in [id(0), id(1)] {
            read_parts(&mut world, peer, 1, 3..4);
        }
        if whole {
            world.want(id(2));
            world.settle(id(2));
        }
        world.run_until(world.now.0 + Duration::from_secs(4), |_| false);
        let origin_bytes = world.origin_bytes;
        for piece in 4 * u32::from(whole) + 8..4 * u32::from(whole) + 12 {
            let held = |world: &World| {
                world.hosts[&id(1)]
                    .node
                    .held(&task)
                    .unwrap()
                    .contains(piece)
            };
            let began = world.now;
            read_parts(&mut world, id(1), u64::from(piece), piece..piece + 1);
            world.run_until(began.0 + Duration::from_secs(10), held);
            let took = world.now.since(began);
            assert!(
                held(&world) && took < Duration::from_millis(500),
                "piece {piece} took {took:?}"
            );
        }
        assert_eq!(world.origin_bytes, origin_bytes, "the seed has all of it");
    }
}

#[test]
fn an_unsealed_table_of_an_elected_peer_shows_clients_nothing() {
    let mut world = World::new(2, false, 16 * MIB, 5);
    world.with_scheduler();
    world.elect = Some(id(1));
    world.pull(2);
    world.run_until(Duration::from_millis(700), |_| false);
    assert!(
        !world.hosts[&id(0)]
            .node
            .held(&world.task)
            .unwrap()
            .is_empty()
    );
    assert!(world.hosts[&id(0)].shown.is_empty());
    assert!(
        !world.hosts[&id(1)].shown.is_empty(),
        "what a node read itself it may show"
    );
}

#[test]
fn a_dead_seed_does_not_fail_a_pull() {
    for when in [0, 300, 2000] {
        let mut world = World::new(3, true, 32 * MIB, 11);
        world.with_scheduler();
        world.pull(3);
        world.run_until(Duration::from_millis(when), |_| false);
        world.kill(id(SEED));
        world.run_until(Duration::from_secs(120), |w| w.all_done(3));
        assert!(world.all_done(3), "killed after {when} ms");
    }
}

#[test]
fn a_liar_harms_nobody() {
    let mut world = World::new(5, true, 16 * MIB, 13);
    world.with_scheduler();
    world.hosts.get_mut(&id(4)).unwrap().lies = true;
    world.pull(5);
    world.run_until(Duration::from_secs(120), |w| w.all_done(5));
    assert!(world.all_done(5));
    assert_eq!(world.origin_bytes, world.layout.size_bytes());
}

#[test]
fn a_dead_origin_ends_in_an_error_and_soon() {
    let mut world = World::new(1, false, MIB, 1);
    world.origin_works = false;
    world.pull(1);
    world.run_until(Duration::from_secs(5), |w| w.hosts[&id(0)].failed.is_some());
    assert_eq!(world.hosts[&id(0)].failed, Some(Failure::Unreachable));
}

#[test]
fn the_same_seed_gives_the_same_trace() {
    let trace = |rng| {
        let mut world = World::new(5, true, 24 * MIB, rng);
        world.with_scheduler();
        world.pull(5);
        world.run_until(Duration::from_secs(60), |w| w.all_done(5));
        world.trace.finish()
    };
    assert_eq!(trace(1), trace(1));
}

/// A node with a scheduler, and a task of 1 MiB that somebody here reads.
fn wanting(data: &[u8]) -> (Node<Names>, Digest) {
    let roles = (0..3).map(|n| (id(n), Role::Peer)).collect();
    let mut node = Node::new(
        config(id(0), Role::Peer, 32 << 20),
        Names { me: id(0), roles },
        StdRng::seed_from_u64(1),
    );
    let (task, start) = (Digest::of(Algorithm::Sha256, data), Time::default());
    let opening = Opening {
        source: World::source(),
        right: Right::Own,
        known: None,
        is_committed: false,
        announce: true,
    };
    node.handle(
        start,
        Input::Open {
            task,
            opening: Box::new(opening),
        },
    );
    node.handle(
        start,
        Input::Run {
            task,
            whole: true,
            as_owner: false,
        },
    );
    (node, task)
}

fn outputs(node: &mut Node<Names>, now: Time) -> Vec<Output> {
    node.handle(now, Input::Decide);
    std::iter::from_fn(|| node.poll()).collect()
}

/// Whether an input changes the rates of tasks or applications.
fn changes_rates(node: &mut Node<Names>, now: Time, input: Input) -> bool {
    let before = node.outputs.len();
    node.handle(now, input);
    node.outputs
        .range(before..)
        .any(|output| *output == Output::RatesChanged)
}

#[test]
fn outputs_about_a_task_that_is_closed_are_dropped() {
    let (mut node, task) = wanting(&[7; 1 << 20]);
    node.handle(
        Time::default(),
        Input::Sized {
            task,
            size_bytes: 1 << 20,
        },
    );
    node.handle(Time::default(), Input::Decide);
    node.handle(Time::default(), Input::Close(task));
    let left: Vec<Output> = std::iter::from_fn(|| node.poll()).collect();
    assert_eq!(left, [Output::StopOrigin(task)]);
}

#[test]
fn what_is_read_from_the_origin_is_told_to_be_kept() {
    let data = vec![7; MIB];
    let (mut node, task) = wanting(&data);
    let now = Time::default();
    assert!(outputs(&mut node, now).contains(&Output::ReadOrigin { task, from: 0 }));
    node.handle(
        now,
        Input::Sized {
            task,
            size_bytes: data.len() as u64,
        },
    );
    let mut chain = Chain::new(Algorithm::Sha256);
    chain.update(&data[..node.table(&task).unwrap().layout().len_bytes(0) as usize]);
    assert_eq!(
        node.handle(
            now,
            Input::OriginPiece {
                task,
                piece: 0,
                chain
            }
        ),
        Some(Verdict::Keep)
    );
    assert!(outputs(&mut node, now).contains(&Output::TableGrew(task)));
}

#[test]
fn a_peer_that_the_scheduler_named_is_waited_for_but_not_long() {
    let (mut node, task) = wanting(&[7; 1000]);
    let now = Time::default();
    node.handle(now, Input::Scheduler(true));
    outputs(&mut node, now);
    node.handle(
        now,
        Input::Parents {
            task,
            parents: vec![Named::near(id(1))],
            issuer: None,
            elected: false,
            share: Share::ALL,
        },
    );
    assert!(outputs(&mut node, now).contains(&Output::Dial(id(1))));
    node.handle(
        now,
        Input::PeerUp {
            peer: id(1),
            role: Role::Peer,
        },
    );
    let reads = Output::ReadOrigin { task, from: 0 };
    assert!(!outputs(&mut node, now + ANSWER_WITHIN / 2).contains(&reads));
    assert!(outputs(&mut node, now + ANSWER_WITHIN).contains(&reads));
}

#[test]
fn pieces_whose_values_are_unknown_are_read_again() {
    let data = vec![7; MIB];
    let task = Digest::of(Algorithm::Sha256, &data);
    let (mut node, _) = wanting(b"another");
    let (layout, now) = (PieceLayout::new(data.len() as u64), Time::default());
    let mut held = PieceSet::empty(layout.count());
    held.insert(0);
    let known = Some((PieceTable::new(task, layout), held));
    node.handle(
        now,
        Input::Open {
            task,
            opening: Box::new(Opening {
                source: World::source(),
                right: Right::Own,
                known,
                is_committed: false,
                announce: true,
            }),
        },
    );
    node.handle(
        now,
        Input::Run {
            task,
            whole: true,
            as_owner: false,
        },
    );
    assert!(outputs(&mut node, now).contains(&Output::ReadOrigin { task, from: 0 }));
}

/// The interest that was sent to each peer, by the token in it.
fn interests(outputs: &[Output]) -> Vec<(PeerId, Option<&Bearer>)> {
    let mut told = Vec::new();
    for output in outputs {
        if let Output::Send(peer, Message::Interest { token, .. }) = output {
            told.push((*peer, token.as_ref()));
        }
    }
    told
}

#[test]
fn a_clients_token_is_lent_to_seeds_and_to_nobody_else() {
    let (mut node, task) = wanting(&[7; 1000]);
    let (now, token) = (Time::default(), Bearer::new("t").unwrap());
    node.handle(now, Input::Scheduler(true));
    node.handle(now, Input::Seeds(vec![Named::near(id(1))]));
    node.handle(
        now,
        Input::Authorize {
            task,
            source: World::source(),
            right: Right::Token(token.clone()),
        },
    );
    node.handle(
        now,
        Input::PeerUp {
            peer: id(1),
            role: Role::Seed,
        },
    );
    node.handle(
        now,
        Input::PeerUp {
            peer: id(2),
            role: Role::Peer,
        },
    );
    node.handle(
        now,
        Input::Parents {
            task,
            parents: vec![Named::near(id(2))],
            issuer: None,
            elected: false,
            share: Share::ALL,
        },
    );
    let said = outputs(&mut node, now);
    let mut told = interests(&said);
    told.sort_unstable_by_key(|(peer, _)| *peer);
    assert_eq!(told, [(id(1), Some(&token)), (id(2), None)]);
    // A newer one reaches the seed, too.
    let newer = Bearer::new("u").unwrap();
    node.handle(
        now,
        Input::Authorize {
            task,
            source: World::source(),
            right: Right::Token(newer.clone()),
        },
    );
    assert_eq!(interests(&outputs(&mut node, now)), [(id(1), Some(&newer))]);
}

#[test]
fn the_next_seed_is_asked_when_the_owner_cannot_be_counted_on() {
    let data = [7; 1000];
    let (mut node, task) = wanting(&data);
    let at = |s| Time(Duration::from_secs(s));
    node.handle(
        at(0),
        Input::Seeds(vec![Named::near(id(1)), Named::near(id(2))]),
    );
    node.handle(
        at(0),
        Input::PeerUp {
            peer: id(1),
            role: Role::Seed,
        },
    );
    node.handle(
        at(0),
        Input::PeerUp {
            peer: id(2),
            role: Role::Seed,
        },
    );
    let order = rendezvous::order(&task, [id(1), id(2)]);
    assert_eq!(interests(&outputs(&mut node, at(0))), [(order[0], None)]);
    node.punish(at(1), order[0], &task, Fault::Stalled);
    assert_eq!(
        interests(&outputs(&mut node, at(1))),
        [],
        "once is no reason"
    );
    node.punish(at(9), order[0], &task, Fault::Stalled);
    assert_eq!(interests(&outputs(&mut node, at(9))), [(order[1], None)]);
}

#[test]
fn the_only_seed_is_dialled_again_however_it_behaved() {
    let (mut node, task) = wanting(&[7; 1000]);
    let at = |s| Time(Duration::from_secs(s));
    node.handle(at(0), Input::Seeds(vec![Named::near(id(1))]));
    node.handle(
        at(0),
        Input::PeerUp {
            peer: id(1),
            role: Role::Seed,
        },
    );
    outputs(&mut node, at(0));
    for second in [1, 9] {
        node.punish(at(second), id(1), &task, Fault::Stalled);
    }
    node.handle(at(9), Input::PeerDown(id(1)));
    assert!(outputs(&mut node, at(9)).contains(&Output::Dial(id(1))));
}

#[test]
fn a_paused_download_lets_its_parents_go_and_finds_them_again() {
    let (mut node, task) = wanting(&[7; 1000]);
    let now = Time::default();
    node.handle(now, Input::Seeds(vec![Named::near(id(1))]));
    node.handle(
        now,
        Input::PeerUp {
            peer: id(1),
            role: Role::Seed,
        },
    );
    assert_eq!(interests(&outputs(&mut node, now)), [(id(1), None)]);
    node.handle(now, Input::Pause(task));
    let leaves = outputs(&mut node, now);
    assert_eq!(leaves, [Output::Send(id(1), Message::Leave { task })]);
    node.handle(
        now,
        Input::Run {
            task,
            whole: true,
            as_owner: false,
        },
    );
    assert_eq!(interests(&outputs(&mut node, now)), [(id(1), None)]);
}

#[test]
fn where_the_seed_may_not_read_one_that_may_is_to_be_elected() {
    for (right, reason, expected) in [
        (Right::Kept, Refusal::Origin(401), true),
        (Right::Kept, Refusal::Origin(404), true),
        (Right::Kept, Refusal::Origin(500), false),
        (Right::Kept, Refusal::Busy, false),
        (Right::Own, Refusal::Origin(401), false),
    ] {
        let (mut node, task) = wanting(&[7; 1000]);
        let now = Time::default();
        node.handle(now, Input::Scheduler(true));
        node.handle(now, Input::Seeds(vec![Named::near(id(1))]));
        node.handle(
            now,
            Input::Authorize {
                task,
                source: World::source(),
                right: right.clone(),
            },
        );
        node.handle(
            now,
            Input::PeerUp {
                peer: id(1),
                role: Role::Seed,
            },
        );
        let said = outputs(&mut node, now);
        assert_eq!(
            interests(&said),
            [(id(1), None)],
            "a password is never lent"
        );
        node.handle(
            now,
            Input::Parents {
                task,
                parents: vec![Named::near(id(1))],
                issuer: None,
                elected: false,
                share: Share::ALL,
            },
        );
        node.handle(
            now,
            Input::Message {
                peer: id(1),
                message: Message::Unavailable { task, reason },
            },
        );
        let said = outputs(&mut node, now);
        let wants = said.contains(&Output::Want {
            task,
            again: false,
            reads: true,
            partial: false,
        });
        assert_eq!(wants, expected, "{right:?} {reason:?}");
        // Until the scheduler has answered, or had the time to, nobody reads on his own.
        assert_eq!(
            said.contains(&Output::ReadOrigin { task, from: 0 }),
            !expected,
            "{right:?} {reason:?}"
        );
    }
}

/// A node whose seed may not read the task: one of those who may is to be elected.
fn waiting_for_an_election() -> (Node<Names>, Digest) {
    let (mut node, task) = wanting(&[7; 1000]);
    let now = Time::default();
    node.handle(now, Input::Scheduler(true));
    node.handle(now, Input::Seeds(vec![Named::near(id(1))]));
    node.handle(
        now,
        Input::Authorize {
            task,
            source: World::source(),
            right: Right::Kept,
        },
    );
    node.handle(
        now,
        Input::PeerUp {
            peer: id(1),
            role: Role::Seed,
        },
    );
    outputs(&mut node, now);
    node.handle(
        now,
        Input::Parents {
            task,
            parents: vec![Named::near(id(1))],
            issuer: None,
            elected: false,
            share: Share::ALL,
        },
    );
    node.handle(
        now,
        Input::Message {
            peer: id(1),
            message: Message::Unavailable {
                task,
                reason: Refusal::Origin(401),
            },
        },
    );
    let said = outputs(&mut node, now);
    assert!(said.contains(&Output::Want {
        task,
        again: false,
        reads: true,
        partial: false
    }));
    (node, task)
}

#[test]
fn a_scheduler_that_elects_nobody_yet_is_waited_for_until_it_may() {
    let reads = |task| Output::ReadOrigin { task, from: 0 };
    let now = Time::default();
    // It names nobody while it warms up, and says more afterwards.
    assert!(ELECTED_WITHIN > crate::swarm::WARM_UP);
    for answers in [false, true] {
        let (mut node, task) = waiting_for_an_election();
        if answers {
            node.handle(
                now,
                Input::Parents {
                    task,
                    parents: Vec::new(),
                    issuer: None,
                    elected: false,
                    share: Share::ALL,
                },
            );
        }
        let early = outputs(&mut node, now + (ELECTED_WITHIN - Duration::from_millis(1)));
        assert!(!early.contains(&reads(task)));
        assert!(outputs(&mut node, now + ELECTED_WITHIN).contains(&reads(task)));
    }
    let (mut node, task) = waiting_for_an_election();
    node.handle(
        now,
        Input::Parents {
            task,
            parents: Vec::new(),
            issuer: Some(id(0)),
            elected: true,
            share: Share::ALL,
        },
    );
    assert!(
        outputs(&mut node, now).contains(&reads(task)),
        "the elected one reads at once"
    );
}

#[test]
fn who_holds_all_without_a_seal_keeps_the_child_that_hears_of_its_election_first() {
    let data = vec![7; 2 * MIB];
    let (task, layout) = (
        Digest::of(Algorithm::Sha256, &data),
        PieceLayout::new(data.len() as u64),
    );
    let (mut table, mut chain) = (PieceTable::new(task, layout), Chain::new(Algorithm::Sha256));
    for piece in 0..table.full_count() {
        let range = layout.range(piece);
        chain.update(&data[range.start as usize..range.end as usize]);
        table.push(chain.value().unwrap());
    }
    let (mut node, _) = wanting(b"another");
    let now = Time::default();
    let known = Some((table, PieceSet::full(layout.count())));
    let opening = Opening {
        source: World::source(),
        right: Right::Own,
        known,
        is_committed: false,
        announce: true,
    };
    node.handle(
        now,
        Input::Open {
            task,
            opening: Box::new(opening),
        },
    );
    node.handle(now, Input::Scheduler(true));
    node.handle(
        now,
        Input::PeerUp {
            peer: id(1),
            role: Role::Peer,
        },
    );
    let child = Child {
        peer: id(1),
        purpose: Purpose::default(),
        far: None,
        passive: false,
        partial: false,
    };
    node.handle(now, Input::Adopt { task, child });
    let to_child = |said: &[Output], sealed: bool| {
        said.iter().any(|output| match output {
            Output::Send(_, Message::Unavailable { .. }) => panic!("the child was sent away"),
            Output::Send(peer, Message::Table { .. }) => sealed && *peer == id(1),
            _ => false,
        })
    };
    assert!(
        !to_child(&outputs(&mut node, now), true),
        "nobody vouches for it yet"
    );
    node.handle(
        now,
        Input::Parents {
            task,
            parents: Vec::new(),
            issuer: Some(id(0)),
            elected: true,
            share: Share::ALL,
        },
    );
    assert!(to_child(&outputs(&mut node, now + NEWS_EVERY), true));
}

/// A node to whom one peer offers all of several tasks of 16 MiB, each with its table.
fn offered(tasks: u8, in_flight_bytes: u64) -> (Node<Names>, Vec<Digest>) {
    offered_the_rest(tasks, in_flight_bytes, |_| false)
}

/// The same, and it holds some pieces of each already.
fn offered_the_rest(
    tasks: u8,
    in_flight_bytes: u64,
    is_held: impl Fn(PieceIndex) -> bool,
) -> (Node<Names>, Vec<Digest>) {
    let roles = (0..2).map(|n| (id(n), Role::Peer)).collect();
    let (names, now) = (Names { me: id(0), roles }, Time::default());
    let mut node = Node::new(
        config(id(0), Role::Peer, in_flight_bytes),
        names,
        StdRng::seed_from_u64(1),
    );
    node.handle(
        now,
        Input::PeerUp {
            peer: id(1),
            role: Role::Peer,
        },
    );
    let mut digests = Vec::new();
    for n in 0..tasks {
        let data = vec![n; 16 * MIB];
        let (task, layout) = (
            Digest::of(Algorithm::Sha256, &data),
            PieceLayout::new(data.len() as u64),
        );
        let (mut table, mut chain) = (PieceTable::new(task, layout), Chain::new(Algorithm::Sha256));
        for piece in 0..layout.count() - 1 {
            let range = layout.range(piece);
            chain.update(&data[range.start as usize..range.end as usize]);
            table.push(chain.value().unwrap());
        }
        let mut held = PieceSet::empty(layout.count());
        for piece in (0..layout.count()).filter(|piece| is_held(*piece)) {
            held.insert(piece);
        }
        let known = Some((table, held));
        let (source, right) = (World::source(), Right::Own);
        node.handle(
            now,
            Input::Open {
                task,
                opening: Box::new(Opening {
                    source,
                    right,
                    known,
                    is_committed: false,
                    announce: true,
                }),
            },
        );
        node.handle(
            now,
            Input::Run {
                task,
                whole: true,
                as_owner: false,
            },
        );
        node.handle(
            now,
            Input::Parents {
                task,
                parents: vec![Named::near(id(1))],
                issuer: None,
                elected: false,
                share: Share::ALL,
            },
        );
        let size_bytes = data.len() as u64;
        node.handle(
            now,
            Input::Message {
                peer: id(1),
                message: Message::Have {
                    task,
                    size_bytes,
                    offer: Offer::All,
                },
            },
        );
        digests.push(task);
    }
    (node, digests)
}

#[test]
fn a_peer_that_stalls_delays_the_origin_once_and_stops_it_no_more() {
    let (mut node, tasks) = offered(1, 32 << 20);
    let (task, data) = (tasks[0], vec![0; 16 * MIB]);
    let layout = PieceLayout::new(data.len() as u64);
    let at = |ms| Time(Duration::from_millis(ms));
    let (mut open, mut reads_at) = (BTreeMap::new(), None);
    for ms in (0..60_000).step_by(50) {
        // The transport gives up on each request when nothing has come for 5 s.
        for (request, _) in open.extract_if(.., |_, (_, asked)| *asked + 5_000 <= ms) {
            node.handle(
                at(ms),
                Input::PieceFailed {
                    peer: id(1),
                    request,
                    refused: None,
                    fault: Fault::Stalled,
                },
            );
        }
        for output in outputs(&mut node, at(ms)) {
            match output {
                Output::Download { request, piece, .. } => drop(open.insert(request, (piece, ms))),
                Output::ReadOrigin { .. } => drop(reads_at.get_or_insert(ms)),
                Output::StopOrigin(_) => panic!("it stops at {ms}"),
                _ => {}
            }
        }
        // A single piece now and then is no reason to count on the rest.
        if reads_at.is_some_and(|reads| ms == reads + 1_000)
            && let Some((request, (piece, _))) = open.pop_first()
        {
            let chain = chain_over(
                &node,
                &task,
                piece,
                &data[..layout.len_bytes(piece) as usize],
            )
            .unwrap();
            assert_eq!(
                node.handle(
                    at(ms),
                    Input::Piece {
                        peer: id(1),
                        request,
                        chain
                    }
                ),
                Some(Verdict::Keep)
            );
        }
    }
    assert!(reads_at.is_some_and(|ms| ms <= 15_000), "{reads_at:?}");
}

#[test]
fn a_node_that_has_waited_in_vain_reads_whatever_is_missing_from_the_origin() {
    let (mut node, tasks) = offered_the_rest(1, 32 << 20, |piece| piece % 2 == 1);
    let (task, data) = (tasks[0], vec![0; 16 * MIB]);
    let layout = PieceLayout::new(data.len() as u64);
    let at = |ms| Time(Duration::from_millis(ms));
    let (mut open, mut reads, mut done_at) = (BTreeMap::new(), None, None);
    for ms in (0..60_000).step_by(50) {
        for (request, _) in open.extract_if(.., |_, asked| *asked + 5_000 <= ms) {
            node.handle(
                at(ms),
                Input::PieceFailed {
                    peer: id(1),
                    request,
                    refused: None,
                    fault: Fault::Stalled,
                },
            );
        }
        if let Some(piece) = reads {
            let chain = chain_over(
                &node,
                &task,
                piece,
                &data[..layout.len_bytes(piece) as usize],
            )
            .unwrap();
            if node.handle(at(ms), Input::OriginPiece { task, piece, chain }) == Some(Verdict::Keep)
            {
                reads = Some(piece + 1);
            }
        }
        for output in outputs(&mut node, at(ms)) {
            match output {
                Output::Download { request, .. } => drop(open.insert(request, ms)),
                Output::Cancel { request, .. } => drop(open.remove(&request)),
                Output::ReadOrigin { from, .. } => reads = Some(from),
                Output::StopOrigin(_) => reads = None,
                Output::Complete(_) => done_at = Some(ms),
                _ => {}
            }
        }
    }
    // Half of it is here already, a piece after each that is missing: none of these gaps is waited at anew.
    assert!(done_at.is_some_and(|ms| ms <= 20_000), "{done_at:?}");
}

/// The pieces that are asked for of each task, and whether they say that nobody waits for them.
fn asked(node: &mut Node<Names>, now: Time) -> Vec<(Digest, u32, u32, bool)> {
    let asked = outputs(node, now)
        .into_iter()
        .filter_map(|output| match output {
            Output::Download {
                request,
                task,
                piece,
                prefetch,
                ..
            } => Some((task, request, piece, prefetch)),
            _ => None,
        });
    asked.collect()
}

#[test]
fn what_is_prefetched_waits_until_there_is_room_beside_what_clients_read() {
    let room = 4 << 20;
    let (mut node, tasks) = offered(2, room);
    let now = Time::default();
    let (prefetched, read) = (tasks[0], tasks[1]);
    node.handle(
        now,
        Input::Read {
            task: prefetched,
            is_read: false,
        },
    );
    let first = asked(&mut node, now);
    assert!(
        !first.is_empty()
            && first
                .iter()
                .all(|(task, _, _, prefetch)| *task == read && !prefetch),
        "{first:?}"
    );
    // It is not taken for a download that does not move: nothing of it is read from the origin.
    let late = now + PATIENCE + Duration::from_secs(1);
    let origin = Output::ReadOrigin {
        task: prefetched,
        from: 0,
    };
    outputs(&mut node, now + PATIENCE / 2);
    assert!(!outputs(&mut node, late).contains(&origin));
    // The client is done, or turns to the other: then it goes on, and says what it is for.
    node.handle(now, Input::Pause(read));
    let alone = asked(&mut node, late);
    assert!(
        !alone.is_empty()
            && alone
                .iter()
                .all(|(task, _, _, prefetch)| *task == prefetched && *prefetch)
    );
    node.handle(
        now,
        Input::Read {
            task: prefetched,
            is_read: true,
        },
    );
    let (_, request, ..) = alone[0];
    node.handle(
        late,
        Input::PieceFailed {
            peer: id(1),
            request,
            refused: Some(Refusal::Unable),
            fault: Fault::Failed,
        },
    );
    assert!(
        asked(&mut node, late)
            .iter()
            .all(|(_, _, _, prefetch)| !prefetch)
    );
}

#[test]
fn a_seed_does_not_prefetch_what_its_children_wait_for() {
    let mut world = World::new(1, true, 4 * MIB, 3);
    world.pull(1);
    world.run_until(Duration::from_millis(150), |_| false);
    let (task, now) = (world.task, world.now);
    let seed = &mut world.hosts.get_mut(&id(SEED)).unwrap().node;
    seed.handle(
        now,
        Input::Read {
            task,
            is_read: false,
        },
    );
    assert!(seed.is_running(&task) && !seed.is_prefetch(&task));
    seed.handle(
        now,
        Input::Message {
            peer: id(0),
            message: Message::Leave { task },
        },
    );
    assert!(seed.is_prefetch(&task));
}

#[test]
fn rates_hold_piece_by_piece_and_change_at_once() {
    const RATE: u64 = 1 << 20;
    let seconds = 8;
    let bytes = |asked: Vec<(Digest, u32, u32, bool)>, layout: PieceLayout| -> u64 {
        asked
            .iter()
            .map(|(_, _, piece, _)| layout.len_bytes(*piece))
            .sum()
    };
    // (of each task, of all that is prefetched, whether clients read them, bytes a second of two tasks)
    let each = Rates {
        download: Some(RATE),
        ..Rates::default()
    };
    let each_prefetched = Rates {
        prefetch: Some(RATE),
        ..Rates::default()
    };
    let cases = [
        (each, None, true, 2 * RATE),
        (each, None, false, 2 * RATE),
        (each_prefetched, None, false, 2 * RATE),
        (Rates::default(), Some(RATE), false, RATE),
    ];
    for (each, prefetch, is_read, expected) in cases {
        let (mut node, tasks) = offered(2, 1 << 30);
        for task in tasks.iter().copied() {
            node.handle(Time::default(), Input::Read { task, is_read });
        }
        assert!(changes_rates(
            &mut node,
            Time::default(),
            Input::Rates {
                each_task: each,
                prefetch
            }
        ));
        assert!(
            !changes_rates(
                &mut node,
                Time::default(),
                Input::Rates {
                    each_task: each,
                    prefetch
                }
            ),
            "it is known"
        );
        let layout = node.table(&tasks[0]).unwrap().layout();
        let mut came = 0;
        for millis in (0..=seconds * 1000).step_by(50) {
            let now = Time(Duration::from_millis(millis));
            let all = asked(&mut node, now);
            // Each is answered, by whatever: none is to hold up the next.
            all.iter().for_each(|(_, request, ..)| {
                node.asked.remove(&(id(1), *request));
            });
            for task in &tasks {
                let fetch = node
                    .tasks
                    .get_mut(task)
                    .and_then(|t| t.fetch.as_mut())
                    .unwrap();
                all.iter()
                    .filter(|(of, ..)| of == task)
                    .for_each(|(_, _, piece, _)| drop(fetch.got(*piece)));
            }
            came += bytes(all, layout);
        }
        let (expected, burst) = (
            expected * seconds,
            2 * (layout.len_bytes(layout.count() - 1) + RATE / 10),
        );
        assert!(
            came.abs_diff(expected) <= burst,
            "{each:?} {prefetch:?}: {came} where {expected} may come"
        );
        assert!(changes_rates(
            &mut node,
            Time(Duration::from_secs(seconds)),
            Input::Rates {
                each_task: Rates::default(),
                prefetch: None
            }
        ));
        let now = Time(Duration::from_secs(seconds) + Duration::from_millis(50));
        assert!(
            bytes(asked(&mut node, now), layout) > 3 * RATE,
            "the new rate holds at once"
        );
    }
}

#[test]
fn one_tasks_upload_rate_holds_over_all_its_children() {
    let mut world = World::new(1, true, 8 * MIB, 3);
    let rates = Rates {
        upload: Some(1 << 20),
        ..Rates::default()
    };
    world.hosts.get_mut(&id(SEED)).unwrap().node.handle(
        Time::default(),
        Input::Rates {
            each_task: rates,
            prefetch: None,
        },
    );
    world.pull(1);
    world.run_until(Duration::from_secs(60), |w| w.all_done(1));
    assert!(world.all_done(1));
    let took = world.hosts[&id(0)].done.unwrap().0.as_secs_f64();
    assert!((6.0..9.5).contains(&took), "{took} s at 1 MiB/s");
}

#[test]
fn the_origin_is_read_on_when_the_rates_allow() {
    let data = vec![7; MIB];
    let (mut node, task) = wanting(&data);
    let now = Time::default();
    node.handle(
        now,
        Input::Rates {
            each_task: Rates {
                origin: Some(64 << 10),
                ..Rates::default()
            },
            prefetch: None,
        },
    );
    outputs(&mut node, now);
    node.handle(
        now,
        Input::Sized {
            task,
            size_bytes: data.len() as u64,
        },
    );
    assert_eq!(node.origin_waits(now, &task), Duration::ZERO);
    let len = node.table(&task).unwrap().layout().len_bytes(0);
    let mut chain = Chain::new(Algorithm::Sha256);
    chain.update(&data[..len as usize]);
    node.handle(
        now,
        Input::OriginPiece {
            task,
            piece: 0,
            chain,
        },
    );
    // 256 KiB at 64 KiB a second.
    assert_eq!(node.origin_waits(now, &task), Duration::from_secs(4));
    node.handle(
        now,
        Input::Rates {
            each_task: Rates::default(),
            prefetch: None,
        },
    );
    assert_eq!(node.origin_waits(now, &task), Duration::ZERO);
}

#[test]
fn what_is_urgent_is_asked_for_first_and_each_priority_has_a_request_under_way() {
    // Room for a few pieces.
    let (mut node, tasks) = offered(3, 2 << 20);
    let now = Time::default();
    for (task, level) in tasks.iter().zip([6, 1, 4]) {
        node.handle(
            now,
            Input::Purpose {
                task: *task,
                purpose: purpose("", level),
            },
        );
    }
    let count =
        |all: &[(Digest, u32, u32, bool)], task| all.iter().filter(|(of, ..)| *of == task).count();
    let first = asked(&mut node, now);
    assert!(count(&first, tasks[1]) > 2, "{first:?}");
    assert_eq!(
        (count(&first, tasks[0]), count(&first, tasks[2])),
        (1, 1),
        "{first:?}"
    );
    assert_eq!(first[0].0, tasks[1]);
    // It is not taken for a download that does not move.
    let late = now + PATIENCE + Duration::from_secs(1);
    outputs(&mut node, now + PATIENCE / 2);
    assert!(!outputs(&mut node, late).contains(&Output::ReadOrigin {
        task: tasks[0],
        from: 0
    }));
    // The urgent one is done: the others go on, and say how urgent they are.
    node.handle(now, Input::Pause(tasks[1]));
    node.handle(now, Input::Pause(tasks[2]));
    let priorities: Vec<u8> = outputs(&mut node, late)
        .into_iter()
        .filter_map(|output| match output {
            Output::Download { priority, .. } => Some(priority.level()),
            _ => None,
        })
        .collect();
    assert!(
        !priorities.is_empty() && priorities.iter().all(|level| *level == 6),
        "{priorities:?}"
    );
}

#[test]
fn all_tasks_of_an_application_share_its_rate_and_others_do_not() {
    const RATE: u64 = 1 << 20;
    let seconds = 8;
    let (mut node, tasks) = offered(3, 1 << 30);
    let rates = Rates {
        download: Some(RATE),
        ..Rates::default()
    };
    let rules = limited(
        "batch",
        Limits {
            rates,
            ..Limits::default()
        },
    );
    for is_new in [true, false] {
        let input = Input::Applications(Arc::clone(&rules));
        assert_eq!(changes_rates(&mut node, Time::default(), input), is_new);
    }
    for task in tasks[..2].iter().copied() {
        node.handle(
            Time::default(),
            Input::Purpose {
                task,
                purpose: purpose("batch", 3),
            },
        );
    }
    let layout = node.table(&tasks[0]).unwrap().layout();
    let mut came = [0; 3];
    for millis in (0..=seconds * 1000).step_by(50) {
        let all = asked(&mut node, Time(Duration::from_millis(millis)));
        for (task, request, piece, _) in all {
            let n = tasks.iter().position(|other| *other == task).unwrap();
            came[n] += layout.len_bytes(piece);
            node.asked.remove(&(id(1), request));
            drop(
                node.tasks
                    .get_mut(&task)
                    .and_then(|t| t.fetch.as_mut())
                    .unwrap()
                    .got(piece),
            );
        }
    }
    let (expected, burst) = (
        seconds * RATE,
        layout.len_bytes(layout.count() - 1) + RATE / 10,
    );
    assert!((came[0] + came[1]).abs_diff(expected) <= burst, "{came:?}");
    assert!(came[2] > expected, "{came:?}");
    // Somebody else joins one of them: its limit is not his.
    node.handle(
        Time(Duration::from_secs(seconds)),
        Input::Purpose {
            task: tasks[1],
            purpose: purpose("batch", 3).and(&purpose("shop", 3)),
        },
    );
    let now = Time(Duration::from_secs(seconds) + Duration::from_millis(50));
    let all = asked(&mut node, now);
    assert!(
        all.iter().filter(|(task, ..)| *task == tasks[1]).count() > 3,
        "{all:?}"
    );
}

#[test]
fn a_childs_application_keeps_to_its_upload_rate_at_whoever_serves_it() {
    let took = |rules: Arc<Applications>| {
        let mut world = World::new(1, true, 8 * MIB, 3);
        world
            .hosts
            .get_mut(&id(SEED))
            .unwrap()
            .node
            .handle(Time::default(), Input::Applications(Arc::clone(&rules)));
        world.pull(1);
        world.hosts.get_mut(&id(0)).unwrap().node.handle(
            world.now,
            Input::Purpose {
                task: world.task,
                purpose: purpose("batch", 3),
            },
        );
        world.run_until(Duration::from_secs(60), |w| w.all_done(1));
        world.hosts[&id(0)].done.unwrap().0.as_secs_f64()
    };
    let rates = Rates {
        upload: Some(1 << 20),
        ..Rates::default()
    };
    let limits = Limits {
        rates,
        ..Limits::default()
    };
    let (batch, shop) = (
        took(limited("batch", limits)),
        took(limited("shop", limits)),
    );
    assert!(
        (6.0..9.5).contains(&batch) && shop < 3.0,
        "{batch} s and {shop} s"
    );
}

#[test]
fn no_more_of_an_applications_blobs_are_read_from_their_origins_than_may_be_the_urgent_ones_first()
{
    let data: Vec<Vec<u8>> = (0..4u8).map(|n| vec![n; MIB]).collect();
    let tasks: Vec<Digest> = data
        .iter()
        .map(|data| Digest::of(Algorithm::Sha256, data))
        .collect();
    let (mut node, _) = wanting(b"another");
    let now = Time::default();
    let rules = limited(
        "batch",
        Limits {
            origins: Some(1),
            ..Limits::default()
        },
    );
    node.handle(now, Input::Applications(Arc::clone(&rules)));
    for (task, purpose) in tasks.iter().zip([
        purpose("batch", 6),
        purpose("batch", 2),
        purpose("batch", 4),
        purpose("shop", 6),
    ]) {
        let (source, right) = (World::source(), Right::Own);
        node.handle(
            now,
            Input::Open {
                task: *task,
                opening: Box::new(Opening {
                    source,
                    right,
                    known: None,
                    is_committed: false,
                    announce: true,
                }),
            },
        );
        node.handle(
            now,
            Input::Purpose {
                task: *task,
                purpose,
            },
        );
        node.handle(
            now,
            Input::Run {
                task: *task,
                whole: true,
                as_owner: false,
            },
        );
    }
    let reads = |node: &mut Node<Names>, now| -> Vec<Digest> {
        let all = outputs(node, now).into_iter();
        all.filter_map(|output| {
            if let Output::ReadOrigin { task, .. } = output {
                Some(task)
            } else {
                None
            }
        })
        .filter(|task| tasks.contains(task))
        .collect()
    };
    let at = |seconds| now + Duration::from_secs(seconds);
    let first = reads(&mut node, at(3));
    assert!(
        first.contains(&tasks[1]) && first.contains(&tasks[3]) && first.len() == 2,
        "{first:?}"
    );
    assert!(reads(&mut node, at(4)).is_empty());
    node.handle(
        at(5),
        Input::OriginOver {
            task: tasks[1],
            failure: None,
        },
    );
    node.handle(now, Input::Pause(tasks[1]));
    assert_eq!(reads(&mut node, at(5)), [tasks[2]]);
    // The request that has waited for long is next, whatever comes.
    node.handle(
        at(14),
        Input::Run {
            task: tasks[1],
            whole: true,
            as_owner: false,
        },
    );
    reads(&mut node, at(14));
    node.handle(
        at(15),
        Input::OriginOver {
            task: tasks[2],
            failure: None,
        },
    );
    node.handle(now, Input::Pause(tasks[2]));
    assert_eq!(reads(&mut node, at(15)), [tasks[0]]);
}

#[test]
fn a_change_of_purpose_is_told_to_whoever_was_asked_and_a_seed_adds_up_its_childrens() {
    let mut world = World::new(2, true, 8 * MIB, 3);
    world.pull(2);
    world.run_until(Duration::from_millis(100), |_| false);
    let task = world.task;
    for (n, level) in [(0, 5), (1, 1)] {
        world.hosts.get_mut(&id(n)).unwrap().node.handle(
            world.now,
            Input::Purpose {
                task,
                purpose: purpose("batch", level),
            },
        );
        world.settle(id(n));
    }
    world.run_until(Duration::from_millis(150), |_| false);
    let seed = &world.hosts[&id(SEED)].node;
    assert_eq!(seed.childs_labels(&task, id(0)), purpose("batch", 5).labels);
    assert_eq!(seed.purpose_of(&task).priority, Priority::new(1).unwrap());
}
