//! The behaviour that all kinds of peers share: over TLS on loopback sockets, and in memory.

use std::time::{Duration, SystemTime};

use hawker_identity::member::AuthorityKey;
use hawker_oci::digest::Algorithm;
use tokio::time::timeout;

use super::memory::{Conduct, MemoryNetwork, MemoryPeers};
use super::*;
use crate::buffer::BufferPool;

pub(super) const MIB: usize = 1 << 20;
pub(super) const SOON: Duration = Duration::from_secs(15);

/// A cluster with an authority of its own.
pub(super) struct Cluster(pub(super) AuthorityKey);

impl Cluster {
    pub(super) fn new() -> Self {
        Self(AuthorityKey::generate("test").unwrap())
    }

    pub(super) fn identity(&self, role: Role) -> Identity {
        let pending = Identity::request().unwrap();
        let life = Duration::from_secs(3600);
        let certificate = self
            .0
            .issue(&pending.certificate_request, role, life, SystemTime::now())
            .unwrap();
        pending
            .complete(certificate, self.0.certificate().clone())
            .unwrap()
    }
}

/// A daemon's transport, with its driver played by the test.
pub(super) struct Node<P> {
    pub(super) peers: P,
    pub(super) events: mpsc::Receiver<PeerEvent>,
    pub(super) identity: Identity,
    pub(super) address: String,
    pool: BufferPool,
}

impl<P: Peers> Node<P> {
    pub(super) fn new(
        peers: P,
        events: mpsc::Receiver<PeerEvent>,
        identity: Identity,
        address: String,
    ) -> Self {
        Self {
            peers,
            events,
            identity,
            address,
            pool: BufferPool::new(256 * MIB as u64),
        }
    }

    pub(super) fn id(&self) -> PeerId {
        self.identity.peer_id()
    }

    pub(super) fn dial_to(&self) -> Dial {
        Dial {
            peer: Some(self.id()),
            addresses: vec![self.address.clone()],
        }
    }

    pub(super) async fn event(&mut self) -> PeerEvent {
        timeout(SOON, self.events.recv())
            .await
            .expect("an event in time")
            .unwrap()
    }

    pub(super) async fn expect_up(&mut self, who: PeerId) {
        assert!(matches!(self.event().await, PeerEvent::Up { peer, .. } if peer == who));
    }

    pub(super) async fn expect_down(&mut self, who: PeerId) {
        loop {
            match self.event().await {
                PeerEvent::Down { peer } => return assert_eq!(peer, who),
                PeerEvent::Up { .. } => panic!("another connection"),
                _ => {}
            }
        }
    }

    /// The next request of a peer.
    pub(super) async fn expect_request(&mut self) -> (PeerId, u32, PieceIndex) {
        loop {
            if let PeerEvent::Message {
                peer,
                message: Message::Request { request, piece, .. },
                ..
            } = self.event().await
            {
                return (peer, request, piece);
            }
        }
    }

    pub(super) async fn expect_uploaded(&mut self) -> (u32, u64, bool) {
        loop {
            if let PeerEvent::Uploaded {
                request,
                bytes,
                complete,
                ..
            } = self.event().await
            {
                return (request, bytes, complete);
            }
        }
    }

    pub(super) async fn ask(
        &self,
        peer: PeerId,
        request: u32,
        len: usize,
    ) -> oneshot::Receiver<Result<Received, PeerError>> {
        let (done, outcome) = oneshot::channel();
        let buffer = self.pool.get(len).await;
        let chain = Chain::new(Algorithm::Sha256);
        self.peers.download(
            peer,
            Download {
                request,
                task: task(),
                piece: request,
                prefetch: false,
                priority: Priority::default(),
                buffer,
                chain,
                done,
            },
        );
        outcome
    }
}

pub(super) fn task() -> Digest {
    Digest::of(Algorithm::Sha256, b"task")
}

pub(super) fn bytes(len: usize) -> Bytes {
    (0..len).map(|at| (at / 7 + at) as u8).collect()
}

pub(super) fn file_with(data: &[u8]) -> Arc<File> {
    use std::io::Write;
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(data).unwrap();
    Arc::new(file)
}

pub(super) async fn outcome(
    receiver: oneshot::Receiver<Result<Received, PeerError>>,
) -> Result<Received, PeerError> {
    timeout(SOON, receiver)
        .await
        .expect("an outcome in time")
        .expect("told once")
}

/// Connects two nodes, and takes the events of that.
pub(super) async fn connect<P: Peers>(child: &mut Node<P>, seed: &mut Node<P>) {
    assert_eq!(child.peers.dial(&seed.dial_to()).await, Ok(seed.id()));
    child.expect_up(seed.id()).await;
    seed.expect_up(child.id()).await;
}

/// A kind of peers.
trait Kind {
    type Peers: Peers;

    async fn node(&self, role: Role) -> Node<Self::Peers>;

    async fn pair(&self) -> (Node<Self::Peers>, Node<Self::Peers>) {
        let (mut child, mut seed) = (self.node(Role::Peer).await, self.node(Role::Seed).await);
        connect(&mut child, &mut seed).await;
        (child, seed)
    }
}

struct Tls(Cluster);

impl Tls {
    fn new() -> Self {
        Self(Cluster::new())
    }
}

impl Kind for Tls {
    type Peers = TlsPeers;

    async fn node(&self, role: Role) -> Node<TlsPeers> {
        self.0.node(role).await
    }
}

struct Memory {
    network: MemoryNetwork,
    cluster: Cluster,
}

impl Memory {
    fn new() -> Self {
        Self {
            network: MemoryNetwork::default(),
            cluster: Cluster::new(),
        }
    }
}

impl Kind for Memory {
    type Peers = MemoryPeers;

    async fn node(&self, role: Role) -> Node<MemoryPeers> {
        let (events_in, events) = mpsc::channel(1024);
        let identity = self.cluster.identity(role);
        let address = format!("{}.memory", identity.peer_id());
        let peers = self
            .network
            .join(identity.peer_id(), role, &address, events_in);
        Node::new(peers, events, identity, address)
    }
}

async fn pieces_go_from_memory_and_from_files_and_are_hashed_as_they_come(kind: impl Kind) {
    let (child, mut seed) = kind.pair().await;
    let data = bytes(3 * MIB + 4321);
    for (number, source) in [
        (1, PieceSource::Memory(data.clone())),
        (
            2,
            PieceSource::File {
                file: file_with(&data),
                range: 0..data.len() as u64,
            },
        ),
        (
            3,
            PieceSource::File {
                file: file_with(&data),
                range: 100_000..data.len() as u64,
            },
        ),
        (4, PieceSource::Memory(data.slice(..1))),
    ] {
        let expected = match &source {
            PieceSource::Memory(bytes) => bytes.clone(),
            PieceSource::File { range, .. } => data.slice(range.start as usize..),
        };
        let receiver = child.ask(seed.id(), number, expected.len()).await;
        assert_eq!(seed.expect_request().await, (child.id(), number, number));
        seed.peers.upload(child.id(), number, source);
        let received = outcome(receiver).await.unwrap();
        assert_eq!(received.buffer.filled(), expected);
        assert_eq!(
            received.chain.finish(),
            Digest::of(Algorithm::Sha256, &expected)
        );
        assert_eq!(
            seed.expect_uploaded().await,
            (number, expected.len() as u64, true)
        );
    }
}

async fn up_tells_who_it_is_and_messages_go_both_ways(kind: impl Kind) {
    let (mut child, mut seed) = (kind.node(Role::Peer).await, kind.node(Role::Seed).await);
    child
        .peers
        .dial(&Dial {
            peer: None,
            addresses: vec![seed.address.clone()],
        })
        .await
        .unwrap();
    match child.event().await {
        PeerEvent::Up {
            peer,
            role,
            name,
            addresses,
        } => {
            assert_eq!((peer, role, name.as_str()), (seed.id(), Role::Seed, "test"));
            assert_eq!(addresses, [seed.address.clone()]);
        }
        other => panic!("{other:?}"),
    }
    seed.expect_up(child.id()).await;
    let said = Message::Working { task: task() };
    for (from, to) in [(&child.peers, seed.id()), (&seed.peers, child.id())] {
        assert!(from.send(to, &said));
    }
    for node in [&mut child, &mut seed] {
        assert!(
            matches!(node.event().await, PeerEvent::Message { message, .. } if message == said)
        );
    }
    assert!(!child.peers.send(PeerId([7; 16]), &said));
}

async fn messages_come_in_the_order_in_which_they_were_sent(kind: impl Kind) {
    let (child, mut seed) = kind.pair().await;
    let tasks: Vec<Digest> = (0..100_u8)
        .map(|n| Digest::of(Algorithm::Sha256, &[n]))
        .collect();
    tasks
        .iter()
        .for_each(|task| assert!(child.peers.send(seed.id(), &Message::Leave { task: *task })));
    for task in tasks {
        let said = Message::Leave { task };
        assert!(
            matches!(seed.event().await, PeerEvent::Message { message, .. } if message == said)
        );
    }
}

async fn a_warm_connection_is_reused(kind: impl Kind) {
    let (child, seed) = kind.pair().await;
    let any = Dial {
        peer: None,
        addresses: vec![seed.address.clone()],
    };
    assert_eq!(child.peers.dial(&any).await, Ok(seed.id()));
    assert_eq!(child.peers.dial(&seed.dial_to()).await, Ok(seed.id()));
    assert_eq!(child.peers.connected(), [seed.id()]);
    assert_eq!(seed.peers.connected(), [child.id()]);
}

async fn another_member_role_or_oneself_is_not_reached(kind: impl Kind) {
    let (child, other) = (kind.node(Role::Peer).await, kind.node(Role::Peer).await);
    for dial in [
        Dial {
            peer: None,
            addresses: vec![other.address.clone()],
        },
        Dial {
            peer: Some(PeerId([1; 16])),
            addresses: vec![other.address.clone()],
        },
        Dial {
            peer: Some(other.id()),
            addresses: vec![],
        },
        Dial {
            peer: Some(other.id()),
            addresses: vec!["nowhere.invalid:1".to_owned()],
        },
        child.dial_to(),
    ] {
        let result = child.peers.dial(&dial).await;
        assert!(
            matches!(result, Err(PeerError::Unreachable(_))),
            "{dial:?} {result:?}"
        );
    }
    assert!(child.peers.connected().is_empty());
}

async fn the_next_address_is_tried_when_one_fails(kind: impl Kind) {
    let (child, seed) = (kind.node(Role::Peer).await, kind.node(Role::Seed).await);
    let addresses = vec![
        "127.0.0.1:1".to_owned(),
        child.address.clone(),
        seed.address.clone(),
    ];
    assert_eq!(
        child
            .peers
            .dial(&Dial {
                peer: Some(seed.id()),
                addresses
            })
            .await,
        Ok(seed.id())
    );
}

async fn a_refusal_is_the_outcome_of_its_request(kind: impl Kind) {
    let (child, mut seed) = kind.pair().await;
    let receiver = child.ask(seed.id(), 1, 10).await;
    seed.expect_request().await;
    assert!(seed.peers.send(
        child.id(),
        &Message::Reject {
            request: 1,
            reason: Refusal::Busy
        }
    ));
    assert!(matches!(
        outcome(receiver).await,
        Err(PeerError::Refused(Refusal::Busy))
    ));
}

async fn too_many_requests_are_told_busy(kind: impl Kind) {
    let (child, mut seed) = kind.pair().await;
    let mut receivers = Vec::new();
    for request in 0..65 {
        receivers.push(child.ask(seed.id(), request, 10).await);
    }
    let last = receivers.pop().unwrap();
    assert!(matches!(
        outcome(last).await,
        Err(PeerError::Refused(Refusal::Busy))
    ));
    for _ in 0..64 {
        let (_, request, _) = seed.expect_request().await;
        seed.peers
            .upload(child.id(), request, PieceSource::Memory(bytes(10)));
    }
    for receiver in receivers {
        outcome(receiver).await.unwrap();
    }
}

async fn a_cancelled_request_ends_at_both_sides(kind: impl Kind) {
    let (child, mut seed) = kind.pair().await;
    let receiver = child.ask(seed.id(), 1, 10).await;
    seed.expect_request().await;
    child.peers.cancel(seed.id(), 1);
    assert!(matches!(outcome(receiver).await, Err(PeerError::Cancelled)));
    let told = seed.event().await;
    assert!(
        matches!(
            told,
            PeerEvent::Message {
                message: Message::Cancel { request: 1 },
                ..
            }
        ),
        "{told:?}"
    );
    // An upload that is handed over after the cancel ends like every other one.
    seed.peers
        .upload(child.id(), 1, PieceSource::Memory(bytes(10)));
    assert_eq!(seed.expect_uploaded().await, (1, 0, false));
    // The number is free again.
    let receiver = child.ask(seed.id(), 1, 10).await;
    seed.expect_request().await;
    seed.peers
        .upload(child.id(), 1, PieceSource::Memory(bytes(10)));
    assert_eq!(outcome(receiver).await.unwrap().buffer.filled(), bytes(10));
    assert_eq!(seed.expect_uploaded().await, (1, 10, true));
}

async fn an_upload_that_nobody_asked_for_ends_at_once(kind: impl Kind) {
    let (child, mut seed) = kind.pair().await;
    for peer in [child.id(), PeerId([7; 16])] {
        seed.peers.upload(peer, 9, PieceSource::Memory(bytes(10)));
        assert_eq!(seed.expect_uploaded().await, (9, 0, false));
    }
}

async fn a_piece_that_cannot_be_read_is_refused(kind: impl Kind) {
    let (child, mut seed) = kind.pair().await;
    let receiver = child.ask(seed.id(), 1, MIB).await;
    seed.expect_request().await;
    let file = file_with(&bytes(MIB / 2));
    seed.peers.upload(
        child.id(),
        1,
        PieceSource::File {
            file,
            range: 0..MIB as u64,
        },
    );
    assert!(matches!(
        outcome(receiver).await,
        Err(PeerError::Refused(Refusal::Unable))
    ));
    assert!(!seed.expect_uploaded().await.2);
}

async fn a_lost_connection_fails_its_transfers_before_down_is_told(kind: impl Kind) {
    let (mut child, mut seed) = kind.pair().await;
    let receiver = child.ask(seed.id(), 1, 10).await;
    seed.expect_request().await;
    drop(seed.peers);
    child.expect_down(seed.identity.peer_id()).await;
    assert!(matches!(outcome(receiver).await, Err(PeerError::Lost)));
    let receiver = child.ask(seed.identity.peer_id(), 2, 10).await;
    assert!(matches!(outcome(receiver).await, Err(PeerError::Lost)));
}

async fn a_dropped_peer_goes_at_both_sides_and_may_come_back(kind: impl Kind) {
    let (mut child, mut seed) = kind.pair().await;
    let receiver = child.ask(seed.id(), 1, 10).await;
    seed.expect_request().await;
    seed.peers.drop_peer(child.id());
    child.expect_down(seed.id()).await;
    seed.expect_down(child.id()).await;
    assert!(matches!(outcome(receiver).await, Err(PeerError::Lost)));
    assert!(child.peers.connected().is_empty() && seed.peers.connected().is_empty());
    connect(&mut child, &mut seed).await;
}

/// Runs each behaviour on one kind.
macro_rules! suite {
    ($name:ident, $kind:expr, $($behaviour:ident)*) => {
        mod $name {
            use super::*;

            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $behaviour() {
                super::$behaviour($kind).await;
            })*
        }
    };
}

macro_rules! of_all_kinds {
    ($name:ident, $kind:expr) => {
        suite!($name, $kind,
            pieces_go_from_memory_and_from_files_and_are_hashed_as_they_come
            up_tells_who_it_is_and_messages_go_both_ways
            messages_come_in_the_order_in_which_they_were_sent
            a_warm_connection_is_reused
            another_member_role_or_oneself_is_not_reached
            the_next_address_is_tried_when_one_fails
            a_refusal_is_the_outcome_of_its_request
            too_many_requests_are_told_busy
            a_cancelled_request_ends_at_both_sides
            an_upload_that_nobody_asked_for_ends_at_once
            a_piece_that_cannot_be_read_is_refused
            a_lost_connection_fails_its_transfers_before_down_is_told
            a_dropped_peer_goes_at_both_sides_and_may_come_back
        );
    };
}

of_all_kinds!(over_tls, Tls::new());
of_all_kinds!(in_memory, Memory::new());

#[tokio::test]
async fn a_member_in_memory_lies_and_is_slow_on_demand() {
    let kind = Memory::new();
    let (child, mut seed) = kind.pair().await;
    kind.network.conduct(
        seed.id(),
        Conduct {
            lies: true,
            rate_bytes: Some(1 << 20),
        },
    );
    let began = std::time::Instant::now();
    let receiver = child.ask(seed.id(), 1, 100 << 10).await;
    seed.expect_request().await;
    seed.peers
        .upload(child.id(), 1, PieceSource::Memory(bytes(100 << 10)));
    assert_ne!(
        outcome(receiver).await.unwrap().buffer.filled(),
        bytes(100 << 10)
    );
    assert!(
        began.elapsed() >= Duration::from_millis(97)
            && kind.network.sent_bytes(seed.id()) == 100 << 10
    );
}
