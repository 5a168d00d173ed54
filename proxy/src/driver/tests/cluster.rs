//! Several nodes in one process, joined by peers in memory.

use std::time::SystemTime;

use hawker_identity::member::AuthorityKey;

use super::*;
use crate::peer::memory::Conduct;

/// A blob that all nodes can have from a source of their own.
struct Cluster {
    content: Content,
    network: MemoryNetwork,
    authority: AuthorityKey,
}

struct Node {
    daemon: Daemon,
    identity: Identity,
    role: Role,
    source: MemorySource,
    place: Memory,
}

impl Cluster {
    fn new(size: u64) -> Self {
        let authority = AuthorityKey::generate("test").expect("the system has randomness");
        Self {
            content: Content::new(size),
            network: MemoryNetwork::default(),
            authority,
        }
    }

    fn identity(&self, role: Role) -> Identity {
        let pending = Identity::request().expect("the system has randomness");
        let (request, life) = (&pending.certificate_request, Duration::from_secs(3600));
        let certificate = self
            .authority
            .issue(request, role, life, SystemTime::now())
            .expect("a request");
        pending
            .complete(certificate, self.authority.certificate().clone())
            .expect("its own certificate")
    }

    /// A node that knows these seeds.
    async fn join(&self, role: Role, behaviour: Behaviour, seeds: &[&Node]) -> Node {
        let source = MemorySource::new(self.content.bytes.clone(), behaviour);
        self.start(self.identity(role), role, source, Memory::new(), seeds)
            .await
    }

    async fn start(
        &self,
        identity: Identity,
        role: Role,
        source: MemorySource,
        place: Memory,
        seeds: &[&Node],
    ) -> Node {
        let membership = Some((identity.clone(), role, self.network.clone()));
        let daemon = Daemon::start(Setup {
            membership,
            ..Setup::new(&source, place.open())
        });
        let node = Node {
            daemon,
            identity,
            role,
            source,
            place,
        };
        node.learn(seeds).await;
        node
    }

    async fn seed(&self) -> Node {
        self.join(Role::Seed, Behaviour::default(), &[]).await
    }

    async fn peer(&self, seeds: &[&Node]) -> Node {
        self.join(Role::Peer, Behaviour::default(), seeds).await
    }

    /// The same node after a restart of its daemon.
    async fn restarted(&self, node: Node, seeds: &[&Node]) -> Node {
        let Node {
            daemon,
            identity,
            role,
            source,
            place,
        } = node;
        daemon.stop().await;
        self.network.remove(identity.peer_id());
        self.start(identity, role, source, place, seeds).await
    }

    async fn read_whole(&self, node: &Node) -> Result<(), FlightError> {
        node.daemon.read_whole(&self.content).await
    }

    async fn reader(&self, node: &Node) -> Reader {
        let (task, size) = (self.content.task, self.content.size());
        node.daemon
            .reader(task, 0..size, false, Some(size))
            .await
            .expect("it is opened")
    }

    fn size(&self) -> u64 {
        self.content.size()
    }
}

impl Node {
    fn id(&self) -> PeerId {
        self.identity.peer_id()
    }

    fn member(&self) -> Member {
        let (peer, name, zone) = (self.id(), "test".to_owned(), String::new());
        Member {
            peer,
            name,
            addresses: vec![address_of(peer)],
            role: self.role,
            zone,
        }
    }

    async fn tell(&self, event: TrackerEvent) {
        let _ = self.daemon.events.send(Event::Tracker(event)).await;
    }

    /// The seeds of the cluster, as a scheduler says them.
    async fn learn(&self, seeds: &[&Node]) {
        self.tell(TrackerEvent::Members(
            seeds.iter().map(|seed| seed.member()).collect(),
        ))
        .await;
    }

    fn received_bytes(&self) -> u64 {
        self.daemon.metrics.received_seeds.get() + self.daemon.metrics.received_peers.get()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cold_blob_leaves_the_source_once_for_a_seed_and_its_nodes() {
    let cluster = Cluster::new(6 * MIB);
    let seed = cluster.seed().await;
    let nodes = [
        cluster.peer(&[&seed]).await,
        cluster.peer(&[&seed]).await,
        cluster.peer(&[&seed]).await,
    ];
    let [a, b, c] = &nodes;
    let read = tokio::join!(
        cluster.read_whole(a),
        cluster.read_whole(b),
        cluster.read_whole(c)
    );
    assert!(matches!(read, (Ok(()), Ok(()), Ok(()))), "{read:?}");
    for node in &nodes {
        node.daemon.until_committed(&cluster.content.task).await;
        assert_eq!(
            (node.source.sent_bytes(), node.received_bytes()),
            (0, cluster.size())
        );
    }
    seed.daemon.until_committed(&cluster.content.task).await;
    assert_eq!(seed.source.sent_bytes(), cluster.size());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_of_two_seeds_reads_the_source() {
    let cluster = Cluster::new(4 * MIB);
    let (one, other) = (cluster.seed().await, cluster.seed().await);
    one.learn(&[&one, &other]).await;
    other.learn(&[&one, &other]).await;
    let node = cluster.peer(&[&one, &other]).await;
    cluster.read_whole(&node).await.expect("it comes");
    let sent = [
        node.source.sent_bytes(),
        one.source.sent_bytes() + other.source.sent_bytes(),
    ];
    assert_eq!(sent, [0, cluster.size()]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_seed_that_can_not_be_reached_is_not_waited_for() {
    let cluster = Cluster::new(4 * MIB);
    let seed = cluster.seed().await;
    cluster.network.remove(seed.id());
    let node = cluster.peer(&[&seed]).await;
    let began = Instant::now();
    cluster
        .read_whole(&node)
        .await
        .expect("it comes from the source");
    assert!(
        began.elapsed() < Duration::from_secs(2),
        "{:?}",
        began.elapsed()
    );
    assert_eq!(node.source.sent_bytes(), cluster.size());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_seed_a_node_shares_what_it_was_elected_to_read() {
    let cluster = Cluster::new(4 * MIB);
    let issuer = cluster.peer(&[]).await;
    let task = cluster.content.task;
    let parents = |parents, fetch_from_origin| TrackerEvent::Parents {
        task,
        parents,
        issuer: Some(issuer.id()),
        fetch_from_origin,
        share: Share::ALL,
    };
    let mut reader = cluster.reader(&issuer).await;
    issuer.tell(parents(Vec::new(), true)).await;
    cluster
        .content
        .take_rest(&mut reader, 0)
        .await
        .expect("it comes from the source");
    let behaviour = Behaviour {
        rate_bytes: Some(MIB / 2),
        ..Behaviour::default()
    };
    let child = cluster.join(Role::Peer, behaviour, &[]).await;
    let mut reader = cluster.reader(&child).await;
    child.tell(parents(vec![issuer.member()], false)).await;
    cluster
        .content
        .take_rest(&mut reader, 0)
        .await
        .expect("it comes from the issuer");
    assert_eq!(issuer.source.sent_bytes(), cluster.size());
    assert!(
        child.source.sent_bytes() < cluster.size() / 2,
        "{}",
        child.source.sent_bytes()
    );
    assert!(
        child.received_bytes() > cluster.size() / 2,
        "{}",
        child.received_bytes()
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_seed_that_is_lost_in_the_middle_is_replaced_by_the_source() {
    let cluster = Cluster::new(6 * MIB);
    let seed = cluster.seed().await;
    cluster.network.conduct(
        seed.id(),
        Conduct {
            rate_bytes: Some(4 * MIB),
            ..Conduct::default()
        },
    );
    let node = cluster.peer(&[&seed]).await;
    let mut reader = cluster.reader(&node).await;
    let at = cluster
        .content
        .take(&mut reader, 0, MIB)
        .await
        .expect("the seed gives the first bytes");
    assert_eq!(node.source.sent_bytes(), 0);
    cluster.network.remove(seed.id());
    let began = Instant::now();
    cluster
        .content
        .take_rest(&mut reader, at)
        .await
        .expect("the source gives the rest");
    assert!(
        began.elapsed() < Duration::from_secs(2),
        "{:?}",
        began.elapsed()
    );
    let sent_bytes = node.source.sent_bytes();
    assert!(sent_bytes <= cluster.size() - MIB, "{sent_bytes}");
    node.daemon.until_committed(&cluster.content.task).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wrong_bytes_of_a_parent_reach_nobody() {
    let cluster = Cluster::new(4 * MIB);
    let seed = cluster.seed().await;
    cluster
        .read_whole(&seed)
        .await
        .expect("it comes from the source");
    cluster.network.conduct(
        seed.id(),
        Conduct {
            lies: true,
            ..Conduct::default()
        },
    );
    let node = cluster.peer(&[&seed]).await;
    cluster
        .read_whole(&node)
        .await
        .expect("it comes from the source");
    assert_eq!(node.received_bytes(), 0);
    assert!(node.daemon.metrics.pieces_rejected.get() >= 1);
    assert_eq!(node.source.sent_bytes(), cluster.size());
    node.daemon.until_committed(&cluster.content.task).await;
    // Its blob was hashed on the complaint, and was right.
    assert!(seed.daemon.store.has(&cluster.content.task));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_seed_that_restarted_hashes_its_blob_before_it_serves_it() {
    let cluster = Cluster::new(3 * MIB);
    for is_rotten in [false, true] {
        let seed = cluster.seed().await;
        cluster
            .read_whole(&seed)
            .await
            .expect("it comes from the source");
        seed.daemon.until_committed(&cluster.content.task).await;
        if is_rotten {
            let blob = seed
                .daemon
                .store
                .committed(&cluster.content.task)
                .expect("it is committed");
            blob.file
                .write_all_at(&[cluster.content.bytes[7] ^ 1], 7)
                .expect("the file is there");
        }
        let seed = cluster.restarted(seed, &[]).await;
        let node = cluster.peer(&[&seed]).await;
        cluster.read_whole(&node).await.expect("it comes");
        assert_eq!(node.daemon.metrics.pieces_rejected.get(), 0, "{is_rotten}");
        let copies = if is_rotten { 2 } else { 1 };
        let sent_bytes = seed.source.sent_bytes() + node.source.sent_bytes();
        assert!(
            sent_bytes <= copies * cluster.size(),
            "{is_rotten}: {sent_bytes}"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn scattered_ranges_come_from_the_seed_alone() {
    let cluster = Cluster::new(8 * MIB);
    let seed = cluster.seed().await;
    cluster
        .read_whole(&seed)
        .await
        .expect("it comes from the source");
    let node = cluster.peer(&[&seed]).await;
    let ranges: Vec<Range<u64>> = (0..16)
        .map(|n| n * MIB / 2 + 7..n * MIB / 2 + 7 + (16 << 10))
        .collect();
    let began = Instant::now();
    for ranges in ranges.chunks(4) {
        let [a, b, c, d] = ranges else {
            panic!("sixteen ranges")
        };
        let read = |range: &Range<u64>| node.daemon.read(&cluster.content, range.clone());
        let read = tokio::join!(read(a), read(b), read(c), read(d));
        assert!(matches!(read, (Ok(()), Ok(()), Ok(()), Ok(()))), "{read:?}");
    }
    assert!(
        began.elapsed() < Duration::from_secs(1),
        "{:?}",
        began.elapsed()
    );
    assert_eq!(node.source.sent_bytes(), 0);
    assert!(
        node.received_bytes() <= 6 * MIB,
        "{}",
        node.received_bytes()
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_leaves_disturbs_no_other_node() {
    let cluster = Cluster::new(6 * MIB);
    let seed = cluster.join(
        Role::Seed,
        Behaviour {
            rate_bytes: Some(20 * MIB),
            ..Behaviour::default()
        },
        &[],
    );
    let seed = seed.await;
    let (left, stays) = (cluster.peer(&[&seed]).await, cluster.peer(&[&seed]).await);
    let mut leaves = cluster.reader(&left).await;
    cluster
        .content
        .take(&mut leaves, 0, MIB)
        .await
        .expect("the first bytes come");
    let whole = cluster.read_whole(&stays);
    let leaving = async { drop(leaves) };
    let (whole, ()) = tokio::join!(whole, leaving);
    whole.expect("the other client gets all of it");
    cluster
        .read_whole(&left)
        .await
        .expect("the client comes back");
    let sent = [&seed, &left, &stays].map(|node| node.source.sent_bytes());
    assert_eq!(sent, [cluster.size(), 0, 0]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_client_holds_up_neither_seed_nor_nodes() {
    let cluster = Cluster::new(6 * MIB);
    let seed = cluster.seed().await;
    let (one, other) = (cluster.peer(&[&seed]).await, cluster.peer(&[&seed]).await);
    let mut slow = cluster.reader(&one).await;
    cluster
        .content
        .take(&mut slow, 0, 1)
        .await
        .expect("the first bytes come");
    cluster
        .read_whole(&other)
        .await
        .expect("another node gets all of it");
    cluster
        .read_whole(&one)
        .await
        .expect("another client gets all of it");
    let mut rest = cluster.reader(&one).await;
    cluster
        .content
        .take_rest(&mut rest, 0)
        .await
        .expect("it is here");
    assert_eq!(seed.source.sent_bytes(), cluster.size());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_that_are_removed_or_isolated_give_nothing_more() {
    let cluster = Cluster::new(3 * MIB);
    for is_removed in [true, false] {
        let seed = cluster.seed().await;
        let node = cluster.peer(&[&seed]).await;
        let until = Instant::now() + Duration::from_secs(60);
        let isolation = hawker_tracker::Isolation {
            peer: seed.id(),
            why: "a test".to_owned(),
            until,
        };
        node.tell(match is_removed {
            true => TrackerEvent::Removed(vec![seed.id()]),
            false => TrackerEvent::Isolated(vec![isolation]),
        })
        .await;
        cluster
            .read_whole(&node)
            .await
            .expect("it comes from the source");
        assert_eq!(
            (node.source.sent_bytes(), seed.source.sent_bytes()),
            (cluster.size(), 0),
            "{is_removed}"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_gives_its_pieces_to_nodes_that_a_scheduler_sends() {
    let cluster = Cluster::new(3 * MIB);
    let seed = cluster.seed().await;
    let holder = cluster.peer(&[&seed]).await;
    cluster
        .read_whole(&holder)
        .await
        .expect("it comes from the seed");
    holder.daemon.until_committed(&cluster.content.task).await;
    let before = cluster.network.sent_bytes(holder.id());
    let behaviour = Behaviour {
        rate_bytes: Some(MIB / 2),
        ..Behaviour::default()
    };
    let child = cluster.join(Role::Peer, behaviour, &[]).await;
    let mut reader = cluster.reader(&child).await;
    let (task, parents, share) = (cluster.content.task, vec![holder.member()], Share::ALL);
    child
        .tell(TrackerEvent::Parents {
            task,
            parents,
            issuer: None,
            fetch_from_origin: false,
            share,
        })
        .await;
    cluster
        .content
        .take_rest(&mut reader, 0)
        .await
        .expect("it comes");
    assert!(cluster.network.sent_bytes(holder.id()) - before > cluster.size() / 2);
    assert_eq!(seed.source.sent_bytes(), cluster.size());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn people_see_the_members_and_whether_they_are_connected() {
    let cluster = Cluster::new(MIB);
    let seed = cluster.seed().await;
    let node = cluster.peer(&[&seed]).await;
    let seen = |node: &Node| -> Vec<(PeerId, bool)> {
        let all = node.daemon.members.all().into_iter();
        all.map(|(member, is_connected, _)| (member.peer, is_connected))
            .collect()
    };
    cluster.read_whole(&node).await.expect("it comes");
    assert_eq!(seen(&node), [(seed.id(), true)]);
    assert_eq!(seen(&seed), [(node.id(), true)]);
    cluster.network.remove(seed.id());
    until("the seed is gone", || seen(&node) == [(seed.id(), false)]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_parent_without_the_task_is_no_hindrance() {
    let cluster = Cluster::new(3 * MIB);
    let idle = cluster.peer(&[]).await;
    let behaviour = Behaviour {
        rate_bytes: Some(20 * MIB),
        ..Behaviour::default()
    };
    let child = cluster.join(Role::Peer, behaviour, &[]).await;
    let mut reader = cluster.reader(&child).await;
    let (task, parents, share) = (cluster.content.task, vec![idle.member()], Share::ALL);
    child
        .tell(TrackerEvent::Parents {
            task,
            parents,
            issuer: None,
            fetch_from_origin: false,
            share,
        })
        .await;
    cluster
        .content
        .take_rest(&mut reader, 0)
        .await
        .expect("it comes from the source");
    assert_eq!((idle.source.sent_bytes(), child.received_bytes()), (0, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_see_bytes_of_peers_once_their_registry_is_known_to_have_them() {
    use crate::flight::Gate;
    let cluster = Cluster::new(3 * MIB);
    let seed = cluster.seed().await;
    let node = cluster.peer(&[&seed]).await;
    for (registry, is_known) in [("memory", true), ("other.invalid", false)] {
        let size = cluster.size();
        let flight = node
            .daemon
            .open(registry, cluster.content.task, false, Some(size))
            .await;
        let client = std::net::IpAddr::from([127, 0, 0, 1]);
        let gate = Gate::new(
            Arc::clone(&node.daemon.proofs),
            client,
            http::HeaderMap::new(),
        );
        let whole = std::iter::once(0..size).collect();
        let mut reader = flight
            .expect("the size is the same")
            .read(whole)
            .gated(Some(gate));
        let read = cluster.content.take_rest(&mut reader, 0).await;
        assert_eq!(read.is_ok(), is_known, "{registry}: {read:?}");
    }
    assert_eq!(node.source.sent_bytes(), 0);
}
