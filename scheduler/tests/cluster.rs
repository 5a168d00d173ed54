//! A scheduler and the nodes' trackers over real sockets.
#![allow(clippy::unwrap_used, clippy::panic)] // helpers of tests are tests

use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use arc_swap::ArcSwap;
use hawker_api::v1;
use hawker_api::v1::scheduler_client::SchedulerClient;
use hawker_core::application::Purpose;
use hawker_core::message::Role;
use hawker_core::piece::{PeerId, PieceLayout, PieceTable, SignedPrefix};
use hawker_core::place::{Network, Networks, Place};
use hawker_core::swarm::WARM_UP;
use hawker_identity::authority::{CERTIFICATE_LIFE, create_token, remove_member};
use hawker_identity::join::{self, JoinError, Token};
use hawker_identity::member::{Identity, role_name};
use hawker_oci::digest::{Algorithm, ChainValue, Digest};
use hawker_oci::reference::Source;
use hawker_scheduler::advertise::AllowedAddresses;
use hawker_scheduler::{LiveSettings, Numbers, SchedulerConfig, SchedulerError, bind, run};
use hawker_tracker::Push;
use hawker_tracker::{
    Capacity, Holding, Member, ReportKind, Tracker, TrackerConfig, TrackerEvent, Want,
};
use tempfile::TempDir;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

const MIB: u64 = 1 << 20;
const HOUR: Duration = Duration::from_secs(3600);
/// For what must happen.
const SOON: Duration = Duration::from_secs(30);
/// For what must not.
const A_WHILE: Duration = Duration::from_millis(1500);

fn task(n: u32) -> Digest {
    Digest::of(Algorithm::Sha256, &n.to_be_bytes())
}

fn want(size_bytes: Option<u64>, again: bool) -> Want {
    let source = Source {
        registry: "docker.io".into(),
        repository: "library/debian".into(),
    };
    Want {
        size_bytes,
        source,
        purpose: Purpose::default(),
        again,
        reads: false,
        partial: false,
    }
}

/// Joins with a key of its own.
async fn join_once(
    address: &str,
    token: &Token,
    name: &str,
) -> Result<(Identity, Vec<Member>, String), JoinError> {
    join::join(address, token, name, &Identity::request().unwrap()).await
}

struct Scheduler {
    address: SocketAddr,
    numbers: Arc<Numbers>,
    live: Arc<ArcSwap<LiveSettings>>,
    stop: CancellationToken,
    running: JoinHandle<Result<(), SchedulerError>>,
}

impl Scheduler {
    async fn start(dir: &TempDir) -> Self {
        Self::start_with(dir, "127.0.0.1:0".parse().unwrap(), CERTIFICATE_LIFE, None).await
    }

    async fn start_with(
        dir: &TempDir,
        address: SocketAddr,
        certificate_life: Duration,
        join: Option<(String, Token)>,
    ) -> Self {
        let listeners = bind(&[address]).await.unwrap();
        let address = listeners[0].local_addr().unwrap();
        let numbers = Arc::new(Numbers::default());
        let stop = CancellationToken::new();
        let joins = join.is_some();
        let live = Arc::new(ArcSwap::from_pointee(LiveSettings {
            networks: Arc::new(west(WEST.1)),
            ..LiveSettings::default()
        }));
        let config = SchedulerConfig {
            live: Arc::clone(&live),
            name: "scheduler".into(),
            cluster: "test".into(),
            data_dir: dir.path().to_owned(),
            listeners,
            advertise: Vec::new(),
            schedulers: Vec::new(),
            join,
            allowed_addresses: AllowedAddresses {
                networks: Vec::new(),
                hosts: vec!["*.test".into()],
            },
            certificate_life,
            numbers: Arc::clone(&numbers),
        };
        let running = tokio::spawn(run(config, stop.clone()));
        // Tokens need the authority, which the first start makes.
        while !joins && create_token(dir.path(), Role::Peer, HOUR).is_err() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        Self {
            address,
            numbers,
            live,
            stop,
            running,
        }
    }

    fn address(&self) -> String {
        self.address.to_string()
    }

    async fn stop(self) {
        self.stop.cancel();
        timeout(SOON, self.running)
            .await
            .expect("it stops")
            .unwrap()
            .unwrap();
    }
}

/// A network whose members stand in this zone, if they do not say it.
const WEST: (&str, &str) = ("127.9.0.0", "west");

struct Node {
    identity: Identity,
    tracker: Tracker,
    events: mpsc::Receiver<TrackerEvent>,
    pushed: Arc<Documents>,
    dir: TempDir,
}

/// The documents that came to a node, which refuses those that hold the word "bad".
#[derive(Debug, Default)]
struct Documents(Mutex<Vec<String>>);

impl Documents {
    async fn has(&self, what: &str) {
        let came = async {
            while self
                .0
                .lock()
                .unwrap()
                .last()
                .is_none_or(|last| last != what)
            {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(SOON, came)
            .await
            .unwrap_or_else(|_| panic!("{what} comes, after {:?}", self.0.lock().unwrap()));
    }
}

impl Push for Documents {
    fn push(&self, _: PeerId, _: &[PeerId], document: &str) -> Result<(), String> {
        self.0.lock().unwrap().push(document.to_owned());
        if document.contains("bad") {
            Err("it is bad\n".into())
        } else {
            Ok(())
        }
    }
}

/// The one network of the tests, whose members stand in this zone.
fn west(zone: &str) -> Networks {
    let network = WEST
        .0
        .parse()
        .map(|ip| Network::new(ip, 16).unwrap())
        .unwrap();
    Networks::new(vec![(
        network,
        Place {
            zone: zone.into(),
            ..Place::default()
        },
    )])
}

impl Node {
    async fn start(
        name: &str,
        role: Role,
        authority: &TempDir,
        schedulers: &[&Scheduler],
        held: Vec<Holding>,
    ) -> Self {
        let token = create_token(authority.path(), role, HOUR).unwrap();
        let (identity, _, _) = join_once(&schedulers[0].address(), &token, name)
            .await
            .unwrap();
        let dir = tempfile::tempdir().unwrap();
        let (sender, events) = mpsc::channel(256);
        let pushed = Arc::new(Documents::default());
        let tracker = Tracker::start(TrackerConfig {
            identity: identity.clone(),
            name: name.into(),
            place: Place::default(),
            addresses: vec![match name.parse::<IpAddr>() {
                Ok(ip) => format!("{ip}:6501"),
                Err(_) => format!("{name}.test:6501"),
            }],
            capacity: Arc::new(|| Capacity {
                upload_slots: 8,
                upload_rate_bytes: 0,
            }),
            push: Some(Arc::clone(&pushed) as Arc<dyn Push>),
            schedulers: schedulers
                .iter()
                .map(|scheduler| scheduler.address())
                .collect(),
            members_file: dir.path().join("members.json"),
            holdings: Arc::new(move || held.clone()),
            events: sender,
        });
        Self {
            identity,
            tracker,
            events,
            pushed,
            dir,
        }
    }

    fn id(&self) -> PeerId {
        self.identity.peer_id()
    }

    fn want(&self, n: u32) {
        self.tracker.want(&task(n), want(Some(20 * MIB), false));
    }

    /// The first event that `pick` likes.
    async fn hears<T>(&mut self, what: &str, mut pick: impl FnMut(TrackerEvent) -> Option<T>) -> T {
        let found = async {
            loop {
                let event = self.events.recv().await.expect("the tracker lives");
                if let Some(found) = pick(event) {
                    return found;
                }
            }
        };
        timeout(SOON, found)
            .await
            .unwrap_or_else(|_| panic!("{what}"))
    }

    async fn hears_parents(&mut self, what: &str, like: impl Fn(&Told) -> bool) -> Told {
        self.hears(what, |event| Told::of(event).filter(|told| like(told)))
            .await
    }

    async fn hears_members(&mut self, what: &str, like: impl Fn(&[Member]) -> bool) -> Vec<Member> {
        self.hears(what, |event| match event {
            TrackerEvent::Members(members) if like(&members) => Some(members),
            _ => None,
        })
        .await
    }

    /// Nobody is isolated for a while.
    async fn hears_of_no_isolation(&mut self) {
        let isolated = async {
            loop {
                if let Some(TrackerEvent::Isolated(peers)) = self.events.recv().await {
                    return peers;
                }
            }
        };
        assert!(timeout(A_WHILE, isolated).await.is_err());
    }
}

#[derive(Debug)]
struct Told {
    task: Digest,
    parents: Vec<PeerId>,
    issuer: Option<PeerId>,
    fetch_from_origin: bool,
}

impl Told {
    fn of(event: TrackerEvent) -> Option<Self> {
        let TrackerEvent::Parents {
            task,
            parents,
            issuer,
            fetch_from_origin,
            ..
        } = event
        else {
            return None;
        };
        Some(Self {
            task,
            parents: parents.into_iter().map(|parent| parent.peer).collect(),
            issuer,
            fetch_from_origin,
        })
    }
}

#[tokio::test]
async fn a_token_lets_one_node_join_and_a_bad_one_says_why() {
    let dir = tempfile::tempdir().unwrap();
    let scheduler = Scheduler::start(&dir).await;
    let address = scheduler.address();
    let token = create_token(dir.path(), Role::Seed, HOUR).unwrap();
    let wrong_authority = Token {
        authority: [7; 32],
        ..token.clone()
    };
    let wrong_secret = Token {
        secret: "00".repeat(32),
        ..token.clone()
    };

    let error = join_once(&address, &wrong_authority, "n")
        .await
        .unwrap_err();
    assert!(matches!(error, JoinError::WrongAuthority { .. }), "{error}");
    let error = join_once(&address, &wrong_secret, "n").await.unwrap_err();
    assert!(error.to_string().contains("secret is wrong"), "{error}");
    let (identity, members, cluster) = join_once(&address, &token, "n").await.unwrap();
    assert_eq!((identity.role(), cluster.as_str()), (Role::Seed, "test"));
    assert_eq!(
        members.iter().map(|member| member.role).collect::<Vec<_>>(),
        [Role::Scheduler]
    );
    assert_eq!(members[0].addresses, std::slice::from_ref(&address));
    let error = join_once(&address, &token, "n").await.unwrap_err();
    assert!(
        matches!(&error, JoinError::Refused(why) if why.contains("used already")),
        "{error}"
    );
    let expired = create_token(dir.path(), Role::Peer, Duration::ZERO).unwrap();
    let error = join_once(&address, &expired, "n").await.unwrap_err();
    assert!(
        matches!(&error, JoinError::Refused(why) if why.contains("expired")),
        "{error}"
    );
    assert!(!error.is_transient());
    scheduler.stop().await;
}

#[tokio::test]
async fn a_cluster_of_the_same_name_is_another_cluster() {
    let (ours, theirs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (first, second) = (
        Scheduler::start(&ours).await,
        Scheduler::start(&theirs).await,
    );
    let token = create_token(ours.path(), Role::Peer, HOUR).unwrap();
    let error = join_once(&second.address(), &token, "n").await.unwrap_err();
    assert!(matches!(error, JoinError::WrongAuthority { .. }), "{error}");
    let (identity, _, _) = join_once(&first.address(), &token, "n").await.unwrap();
    let error = join::connect(&second.address(), &identity)
        .await
        .unwrap_err();
    assert!(
        matches!(error, join::ConnectError::Stranger { .. }),
        "{error}"
    );
}

/// A gRPC channel that trusts the authority and shows no certificate.
async fn anonymous(scheduler: &Scheduler, member: &Identity) -> tonic::transport::Channel {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(member.authority().clone()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![join::ALPN.to_vec()];
    let tcp = tokio::net::TcpStream::connect(scheduler.address)
        .await
        .unwrap();
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    let tls = connector
        .connect(role_name(Role::Scheduler), tcp)
        .await
        .unwrap();
    let stream = Mutex::new(Some(hyper_util::rt::TokioIo::new(tls)));
    let once = tower::service_fn(move |_| {
        let stream = stream.lock().unwrap().take();
        async move { stream.ok_or_else(|| std::io::Error::other("once")) }
    });
    tonic::transport::Endpoint::from_static("http://s")
        .connect_with_connector(once)
        .await
        .unwrap()
}

#[tokio::test]
async fn without_a_certificate_there_is_joining_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let scheduler = Scheduler::start(&dir).await;
    let token = create_token(dir.path(), Role::Peer, HOUR).unwrap();
    let (identity, _, _) = join_once(&scheduler.address(), &token, "n").await.unwrap();
    let channel = anonymous(&scheduler, &identity).await;
    let mut client = SchedulerClient::new(channel.clone());
    let refused = client.track(tokio_stream::iter([])).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::Unauthenticated);
    let refused = client.members(v1::MembersRequest {}).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::Unauthenticated);
    let mut authority = v1::authority_client::AuthorityClient::new(channel);
    let request = v1::RenewRequest {
        version: Some(hawker_api::VERSION),
        certificate_request: identity.renewal_request().unwrap(),
    };
    assert_eq!(
        authority.renew(request).await.unwrap_err().code(),
        tonic::Code::Unauthenticated
    );
}

#[tokio::test]
async fn who_says_not_where_it_stands_is_told_by_its_network() {
    let dir = tempfile::tempdir().unwrap();
    let scheduler = Scheduler::start(&dir).await;
    let mut a = Node::start("127.9.0.1", Role::Peer, &dir, &[&scheduler], Vec::new()).await;
    let b = Node::start("127.9.0.2", Role::Peer, &dir, &[&scheduler], Vec::new()).await;
    let zone = |event| {
        if let TrackerEvent::Zone(zone) = event {
            Some(zone)
        } else {
            None
        }
    };
    assert_eq!(a.hears("its own zone", zone).await, WEST.1);
    b.want(1);
    a.want(1);
    let fellow = b.id();
    let parent = |event| match event {
        TrackerEvent::Parents { parents, .. } => {
            parents.into_iter().find(|parent| parent.peer == fellow)
        }
        _ => None,
    };
    assert_eq!(a.hears("its fellow", parent).await.zone, WEST.1);
}

#[tokio::test]
async fn members_get_the_configuration_and_their_refusals_are_shown() {
    let dir = tempfile::tempdir().unwrap();
    let scheduler = Scheduler::start(&dir).await;
    let push = |document: &str| {
        let live = LiveSettings {
            document: document.into(),
            ..(**scheduler.live.load()).clone()
        };
        scheduler.live.store(Arc::new(live));
    };
    push("linger = '1s'");
    let a = Node::start("a", Role::Peer, &dir, &[&scheduler], Vec::new()).await;
    a.pushed.has("linger = '1s'").await;
    push("bad = 1");
    a.pushed.has("bad = 1").await;
    let refusals = |expected: &'static [(&'static str, &'static str)]| {
        let numbers = Arc::clone(&scheduler.numbers);
        async move {
            let shown = async {
                let text = |(name, why): &(String, String)| (name.clone(), why.clone());
                let expected: Vec<_> = expected
                    .iter()
                    .map(|(name, why)| ((*name).to_owned(), (*why).to_owned()))
                    .collect();
                while numbers
                    .refusals
                    .lock()
                    .unwrap()
                    .iter()
                    .map(text)
                    .collect::<Vec<_>>()
                    != expected
                {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            };
            timeout(SOON, shown).await.expect("the refusals are shown");
        }
    };
    refusals(&[("a", "it is bad ")]).await;
    push("linger = '2s'");
    a.pushed.has("linger = '2s'").await;
    refusals(&[]).await;
}

#[tokio::test]
async fn members_stand_where_changed_networks_say() {
    let dir = tempfile::tempdir().unwrap();
    let scheduler = Scheduler::start(&dir).await;
    let mut a = Node::start("127.9.0.1", Role::Peer, &dir, &[&scheduler], Vec::new()).await;
    let zone = |event| {
        if let TrackerEvent::Zone(zone) = event {
            Some(zone)
        } else {
            None
        }
    };
    assert_eq!(a.hears("its zone", zone).await, WEST.1);
    let networks = Arc::new(west("east"));
    scheduler.live.store(Arc::new(LiveSettings {
        networks,
        ..(**scheduler.live.load()).clone()
    }));
    assert_eq!(a.hears("its new zone", zone).await, "east");
}

#[tokio::test]
async fn who_wants_the_same_gets_the_seed_and_each_other() {
    let dir = tempfile::tempdir().unwrap();
    let scheduler = Scheduler::start(&dir).await;
    let seed = Node::start("seed", Role::Seed, &dir, &[&scheduler], Vec::new()).await;
    let mut a = Node::start("a", Role::Peer, &dir, &[&scheduler], Vec::new()).await;
    let mut b = Node::start("b", Role::Peer, &dir, &[&scheduler], Vec::new()).await;
    let has_seed = |members: &[Member]| members.iter().any(|member| member.role == Role::Seed);
    let members = a.hears_members("the seed is listed", has_seed).await;
    assert!(
        members
            .iter()
            .any(|member| member.addresses == ["seed.test:6501"])
    );
    assert_eq!(a.tracker.connected(), [scheduler.address()]);
    a.want(1);
    b.want(1);
    let told = a
        .hears_parents("a hears of b", |told| told.parents.len() == 2)
        .await;
    assert_eq!(
        (told.task, told.parents),
        (task(1), vec![seed.id(), b.id()])
    );
    assert_eq!((told.issuer, told.fetch_from_origin), (None, false));
    b.hears_parents("b hears of a", |told| told.parents == [seed.id(), a.id()])
        .await;
    let saved = hawker_identity::member_file::load(&a.dir.path().join("members.json")).unwrap();
    assert!(saved.iter().any(|member| member.peer == seed.id()));

    let connection = join::connect(&scheduler.address(), &a.identity)
        .await
        .unwrap();
    let reply = SchedulerClient::new(connection.channel)
        .members(v1::MembersRequest {})
        .await
        .unwrap();
    let names: Vec<String> = reply
        .into_inner()
        .members
        .into_iter()
        .filter_map(|state| state.member)
        .map(|member| member.name)
        .collect();
    assert_eq!(names.len(), 4);
    assert!(names.contains(&"a".into()) && names.contains(&"scheduler".into()));
    assert_eq!(
        scheduler
            .numbers
            .peers
            .load(std::sync::atomic::Ordering::Relaxed),
        3
    );
    scheduler.stop().await;
}

#[tokio::test]
async fn without_a_seed_one_is_elected_and_replaced_when_it_dies() {
    let dir = tempfile::tempdir().unwrap();
    let scheduler = Scheduler::start(&dir).await;
    let mut a = Node::start("a", Role::Peer, &dir, &[&scheduler], Vec::new()).await;
    let mut b = Node::start("b", Role::Peer, &dir, &[&scheduler], Vec::new()).await;
    a.want(1);
    b.want(1);
    let at_a = a
        .hears_parents("an election", |told| told.issuer.is_some())
        .await;
    let at_b = b
        .hears_parents("an election", |told| told.issuer.is_some())
        .await;
    assert_eq!(at_a.issuer, at_b.issuer);
    assert_ne!(at_a.fetch_from_origin, at_b.fetch_from_origin);
    let (elected, mut other) = if at_a.fetch_from_origin {
        (a, b)
    } else {
        (b, a)
    };
    assert_eq!(at_a.issuer, Some(elected.id()));
    drop(elected);
    let told = other
        .hears_parents("it takes over", |told| told.fetch_from_origin)
        .await;
    assert_eq!(told.issuer, Some(other.id()));
}

#[tokio::test]
async fn after_a_restart_everything_is_said_again() {
    let dir = tempfile::tempdir().unwrap();
    let scheduler = Scheduler::start(&dir).await;
    let address = scheduler.address;
    let held = Holding {
        task: task(1),
        size_bytes: 20 * MIB,
        pieces: 23,
        complete: true,
    };
    let seed = Node::start("seed", Role::Seed, &dir, &[&scheduler], Vec::new()).await;
    let holder = Node::start("holder", Role::Peer, &dir, &[&scheduler], vec![held]).await;
    let mut child = Node::start("child", Role::Peer, &dir, &[&scheduler], Vec::new()).await;
    child.want(1);
    child.want(2);
    let both = [seed.id(), holder.id()];
    child
        .hears_parents("the holder", |told| {
            told.task == task(1) && told.parents == both
        })
        .await;
    scheduler.stop().await;
    let scheduler = Scheduler::start_with(&dir, address, CERTIFICATE_LIFE, None).await;
    child
        .hears_parents("the holder, again", |told| {
            told.task == task(1) && told.parents == both
        })
        .await;
    child.tracker.forget(&task(1));
    child.tracker.want(&task(2), want(None, true));
    let told = child
        .hears_parents("the seed, not an election", |told| told.task == task(2))
        .await;
    assert_eq!((told.parents, told.issuer), (vec![seed.id()], None));
    scheduler.stop().await;
}

#[tokio::test]
async fn two_reporters_isolate_and_one_does_not() {
    let dir = tempfile::tempdir().unwrap();
    let scheduler = Scheduler::start(&dir).await;
    let mut a = Node::start("a", Role::Peer, &dir, &[&scheduler], Vec::new()).await;
    let mut b = Node::start("b", Role::Peer, &dir, &[&scheduler], Vec::new()).await;
    let mut bad = Node::start("bad", Role::Peer, &dir, &[&scheduler], Vec::new()).await;
    for node in [&mut a, &mut b, &mut bad] {
        node.hears_members("connected", |members| !members.is_empty())
            .await;
        node.want(1);
    }
    for node in [&mut a, &mut b] {
        node.hears_parents("the other one", |told| {
            told.parents.contains(&bad.identity.peer_id())
        })
        .await;
    }
    for _ in 0..3 {
        a.tracker.report(bad.id(), &task(1), ReportKind::WrongBytes);
    }
    a.hears_of_no_isolation().await;
    b.tracker.report(bad.id(), &task(1), ReportKind::WrongBytes);
    let isolated = |event| match event {
        TrackerEvent::Isolated(isolated) => {
            Some(isolated.iter().map(|i| i.peer).collect::<Vec<_>>())
        }
        _ => None,
    };
    assert_eq!(a.hears("isolation", isolated).await, [bad.id()]);
    let mut late = Node::start("late", Role::Peer, &dir, &[&scheduler], Vec::new()).await;
    assert_eq!(
        late.hears("isolation, told to a newcomer", isolated).await,
        [bad.id()]
    );
}

/// Reports of members that never met change nothing; two that lie about all seeds isolate none.
#[tokio::test]
async fn two_liars_isolate_neither_strangers_nor_seeds() {
    let dir = tempfile::tempdir().unwrap();
    let scheduler = Scheduler::start(&dir).await;
    let mut nodes = Vec::new();
    for (name, role) in [
        ("a", Role::Peer),
        ("b", Role::Peer),
        ("s", Role::Seed),
        ("t", Role::Seed),
    ] {
        let mut node = Node::start(name, role, &dir, &[&scheduler], Vec::new()).await;
        node.hears_members("connected", |members| !members.is_empty())
            .await;
        nodes.push(node);
    }
    let victim = Node::start("v", Role::Peer, &dir, &[&scheduler], Vec::new()).await;
    for n in 1..=4 {
        nodes[..2].iter().for_each(|liar| liar.want(n));
    }
    nodes[0]
        .hears_parents("a seed", |told| !told.parents.is_empty())
        .await;
    for liar in &nodes[..2] {
        for accused in [nodes[2].id(), nodes[3].id(), victim.id()] {
            (1..=4).for_each(|n| {
                liar.tracker
                    .report(accused, &task(n), ReportKind::WrongBytes)
            });
        }
    }
    nodes[3].hears_of_no_isolation().await;
}

/// A table of `n`s for a task of 20 MiB, signed by `issuer`.
fn signed_table(issuer: &Identity, n: u8, sealed: bool) -> PieceTable {
    let mut table = PieceTable::new(task(1), PieceLayout::new(20 * MIB));
    let value = ChainValue::from_bytes(Algorithm::Sha256, &[n; 32]).unwrap();
    (0..table.full_count()).for_each(|_| table.push(value));
    issuer.sign(&mut table, sealed, Vec::new(), std::time::SystemTime::now());
    table
}

#[tokio::test]
async fn an_issuer_is_isolated_by_two_of_its_own_seals_and_by_nothing_less() {
    let dir = tempfile::tempdir().unwrap();
    let scheduler = Scheduler::start(&dir).await;
    let mut a = Node::start("a", Role::Peer, &dir, &[&scheduler], Vec::new()).await;
    let mut bad = Node::start("bad", Role::Seed, &dir, &[&scheduler], Vec::new()).await;
    for node in [&mut a, &mut bad] {
        node.hears_members("connected", |members| !members.is_empty())
            .await;
    }
    let sealed = |n| signed_table(&bad.identity, n, true);
    let mut forged = sealed(2);
    let other = signed_table(&a.identity, 2, true);
    let signature = other.signed().unwrap().signature.clone();
    forged.sign(SignedPrefix {
        signature,
        ..forged.signed().unwrap().clone()
    });
    a.tracker
        .contradiction([sealed(1), signed_table(&bad.identity, 2, false)]);
    a.tracker.contradiction([sealed(1), forged]);
    a.hears_of_no_isolation().await;
    a.tracker.contradiction([sealed(1), sealed(2)]);
    let isolated = |event| match event {
        TrackerEvent::Isolated(isolated) => {
            Some(isolated.iter().map(|i| i.peer).collect::<Vec<_>>())
        }
        _ => None,
    };
    assert_eq!(a.hears("isolation", isolated).await, [bad.id()]);
    scheduler.stop().await;
}

#[tokio::test]
async fn the_issuer_is_the_same_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let scheduler = Scheduler::start(&dir).await;
    let address = scheduler.address;
    let (mut nodes, mut issuer) = (Vec::new(), None);
    for n in 0..4 {
        // Each that comes later says that it holds more than the issuer.
        let held = Holding {
            task: task(1),
            size_bytes: 20 * MIB,
            pieces: n,
            complete: false,
        };
        let held = if n == 0 { Vec::new() } else { vec![held] };
        let mut node = Node::start(&format!("n{n}"), Role::Peer, &dir, &[&scheduler], held).await;
        node.want(1);
        let told = node
            .hears_parents("an issuer", |told| told.issuer.is_some())
            .await;
        issuer = issuer.or(told.issuer);
        assert_eq!(told.issuer, issuer);
        nodes.push(node);
    }
    scheduler.stop().await;
    let scheduler = Scheduler::start_with(&dir, address, CERTIFICATE_LIFE, None).await;
    let elected_after = WARM_UP + Duration::from_secs(3);
    for (n, node) in nodes.iter_mut().enumerate() {
        let end = tokio::time::Instant::now() + if n == 0 { elected_after } else { A_WHILE };
        let mut heard = 0;
        while let Ok(Some(event)) = tokio::time::timeout_at(end, node.events.recv()).await {
            let Some(told) = Told::of(event) else {
                continue;
            };
            heard += 1;
            assert_eq!(told.issuer, issuer, "node {n}");
            assert_eq!(told.fetch_from_origin, Some(node.id()) == issuer);
        }
        assert!(heard > 0, "node {n} was told nothing");
    }
    scheduler.stop().await;
}

#[tokio::test]
async fn certificates_renew_themselves_and_are_saved() {
    let dir = tempfile::tempdir().unwrap();
    // Two thirds of a minute and the hour before are over at once.
    let life = Duration::from_secs(60);
    let scheduler = Scheduler::start_with(&dir, "127.0.0.1:0".parse().unwrap(), life, None).await;
    let node = Node::start("n", Role::Peer, &dir, &[&scheduler], Vec::new()).await;
    let saved = || {
        Identity::load(&node.dir.path().join("identity"))
            .ok()
            .flatten()
    };
    let renewed = async {
        loop {
            if let Some(saved) = saved() {
                return saved;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let saved = timeout(SOON, renewed).await.expect("it is renewed");
    assert_eq!((saved.peer_id(), saved.role()), (node.id(), Role::Peer));
    scheduler.stop().await;
}

#[tokio::test]
async fn a_second_scheduler_joins_without_authority_and_tasks_are_shared_out() {
    let (dir, second_dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let first = Scheduler::start(&dir).await;
    let token = create_token(dir.path(), Role::Scheduler, HOUR).unwrap();
    let any = "127.0.0.1:0".parse().unwrap();
    let second = Scheduler::start_with(
        &second_dir,
        any,
        CERTIFICATE_LIFE,
        Some((first.address(), token)),
    )
    .await;
    let mut node = Node::start("n", Role::Peer, &dir, &[&first], Vec::new()).await;
    node.hears_members("both are listed", |members| members.len() == 2)
        .await;
    let both = async {
        while node.tracker.connected().len() < 2 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(SOON, both).await.expect("a stream to each");

    let token = create_token(dir.path(), Role::Peer, HOUR).unwrap();
    let error = join_once(&second.address(), &token, "n").await.unwrap_err();
    assert!(
        matches!(&error, JoinError::NoAuthority(why) if why.contains(&first.address())),
        "{error}"
    );
    join_once(&first.address(), &token, "n")
        .await
        .expect("the token was not spent");

    (0..20).for_each(|n| node.want(n));
    let mut told = std::collections::BTreeSet::new();
    while told.len() < 20 {
        told.insert(
            node.hears_parents("an answer for each task", |told| told.fetch_from_origin)
                .await
                .task,
        );
    }
    let tasks = |scheduler: &Scheduler| {
        scheduler
            .numbers
            .tasks
            .load(std::sync::atomic::Ordering::Relaxed)
    };
    assert_eq!(tasks(&first) + tasks(&second), 20);
    assert!(tasks(&first) > 0 && tasks(&second) > 0);
    second.stop().await;
    let elected = node
        .hears_parents("the first takes over", |told| told.fetch_from_origin)
        .await;
    assert!(told.contains(&elected.task));
}

#[tokio::test]
async fn a_removed_member_is_refused_by_every_scheduler_at_once_and_for_good() {
    let (dir, second_dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let first = Scheduler::start(&dir).await;
    let token = create_token(dir.path(), Role::Scheduler, HOUR).unwrap();
    let any = "127.0.0.1:0".parse().unwrap();
    let second = Scheduler::start_with(
        &second_dir,
        any,
        CERTIFICATE_LIFE,
        Some((first.address(), token)),
    )
    .await;
    let mut node = Node::start("n", Role::Peer, &dir, &[&first, &second], Vec::new()).await;
    let mut bad = Node::start("bad", Role::Seed, &dir, &[&first, &second], Vec::new()).await;
    for one in [&mut node, &mut bad] {
        one.hears_members("everybody", |members| members.len() == 3)
            .await;
    }
    let both = async {
        while bad.tracker.connected().len() < 2 || node.tracker.connected().len() < 2 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(SOON, both).await.expect("streams to both");

    remove_member(dir.path(), bad.id()).unwrap();
    let begun = std::time::Instant::now();
    let removed = |event| match event {
        TrackerEvent::Removed(removed) => Some(removed),
        _ => None,
    };
    assert_eq!(node.hears("the removal", removed).await, [bad.id()]);
    assert!(node.identity.removed().contains(bad.id()));
    let alone = async {
        while !bad.tracker.connected().is_empty() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(SOON, alone).await.expect("both streams end");
    assert!(
        begun.elapsed() < Duration::from_secs(10),
        "{:?}",
        begun.elapsed()
    );
    for scheduler in [&first, &second] {
        is_refused(scheduler, &bad.identity).await;
    }
    assert!(join::renew(&first.address(), &bad.identity).await.is_err());
    let saved = Identity::load(&node.dir.path().join("identity")).unwrap();
    assert!(
        saved.is_none(),
        "this identity was never saved here, the list was"
    );
    assert!(node.dir.path().join("identity/removed.json").exists());

    // The second one has no authority: it knows from its own disk.
    let again = (
        first.address(),
        create_token(dir.path(), Role::Scheduler, HOUR).unwrap(),
    );
    second.stop().await;
    first.stop().await;
    let second = Scheduler::start_with(&second_dir, any, CERTIFICATE_LIFE, Some(again)).await;
    is_refused(&second, &bad.identity).await;
    second.stop().await;
    let first = Scheduler::start(&dir).await;
    is_refused(&first, &bad.identity).await;
    first.stop().await;
}

/// A removed member gets no answer from a scheduler but that it was removed.
async fn is_refused(scheduler: &Scheduler, identity: &Identity) {
    let answer = async {
        let connection = join::connect(&scheduler.address(), identity)
            .await
            .expect("it gets in to be told");
        SchedulerClient::new(connection.channel)
            .members(v1::MembersRequest {})
            .await
    };
    let refused = timeout(SOON, answer)
        .await
        .expect("in time")
        .expect_err("it is told nothing else");
    assert_eq!(refused.code(), tonic::Code::PermissionDenied, "{refused}");
    assert!(
        refused.message().contains("delete its identity folder"),
        "{refused}"
    );
}

#[tokio::test]
async fn an_address_that_a_member_does_not_connect_from_is_not_passed_on() {
    let dir = tempfile::tempdir().unwrap();
    let scheduler = Scheduler::start(&dir).await;
    let token = create_token(dir.path(), Role::Seed, HOUR).unwrap();
    let (identity, _, _) = join_once(&scheduler.address(), &token, "s").await.unwrap();
    let connection = join::connect(&scheduler.address(), &identity)
        .await
        .unwrap();
    let register = v1::Register {
        version: Some(hawker_api::VERSION),
        name: "s".into(),
        addresses: vec![
            "192.0.2.7:6501".into(),
            "127.0.0.1:6501".into(),
            "nowhere.invalid:6501".into(),
        ],
        ..v1::Register::default()
    };
    let say = v1::FromPeer {
        event: Some(v1::from_peer::Event::Register(register)),
    };
    let (sender, outgoing) = mpsc::channel(1);
    sender.send(say).await.unwrap();
    let mut client = SchedulerClient::new(connection.channel);
    let mut heard = client
        .track(tokio_stream::wrappers::ReceiverStream::new(outgoing))
        .await
        .unwrap()
        .into_inner();
    let Some(v1::to_peer::Event::Welcome(welcome)) = heard.message().await.unwrap().unwrap().event
    else {
        panic!("no welcome");
    };
    assert_eq!(
        welcome.refused_addresses,
        ["192.0.2.7:6501", "nowhere.invalid:6501"]
    );
    let members = client
        .members(v1::MembersRequest {})
        .await
        .unwrap()
        .into_inner()
        .members;
    let us = members
        .iter()
        .filter_map(|state| state.member.as_ref())
        .find(|member| member.name == "s");
    assert_eq!(us.unwrap().addresses, ["127.0.0.1:6501"]);
    assert!(members.iter().any(|state| state.certificate_until_s > 0));
    scheduler.stop().await;
}

/// Strangers that hold connections open, in the handshake or after it, keep no member and no joiner out.
#[tokio::test]
async fn idle_strangers_keep_nobody_out() {
    let dir = tempfile::tempdir().unwrap();
    let scheduler = Scheduler::start(&dir).await;
    let mut idle = Vec::new();
    for _ in 0..600 {
        idle.push(
            tokio::net::TcpStream::connect(scheduler.address)
                .await
                .unwrap(),
        );
    }
    let mut anonymous = Vec::new();
    for _ in 0..200 {
        anonymous.push(as_stranger(&scheduler).await);
    }
    let mut node = Node::start("n", Role::Peer, &dir, &[&scheduler], Vec::new()).await;
    node.hears_members("connected", |members| !members.is_empty())
        .await;
    drop((idle, anonymous));
    scheduler.stop().await;
}

/// A client without a certificate, after its handshake.
async fn as_stranger(
    scheduler: &Scheduler,
) -> tokio_rustls::client::TlsStream<tokio::net::TcpStream> {
    #[derive(Debug)]
    struct Anybody(Arc<rustls::crypto::CryptoProvider>);
    impl rustls::client::danger::ServerCertVerifier for Anybody {
        fn verify_server_cert(
            &self,
            _: &rustls::pki_types::CertificateDer<'_>,
            _: &[rustls::pki_types::CertificateDer<'_>],
            _: &rustls::pki_types::ServerName<'_>,
            _: &[u8],
            _: rustls::pki_types::UnixTime,
        ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
            Ok(rustls::client::danger::ServerCertVerified::assertion())
        }
        fn verify_tls12_signature(
            &self,
            _: &[u8],
            _: &rustls::pki_types::CertificateDer<'_>,
            _: &rustls::DigitallySignedStruct,
        ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
            Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
        }
        fn verify_tls13_signature(
            &self,
            _: &[u8],
            _: &rustls::pki_types::CertificateDer<'_>,
            _: &rustls::DigitallySignedStruct,
        ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
            Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
        }
        fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
            self.0.signature_verification_algorithms.supported_schemes()
        }
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = rustls::ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anybody(provider)))
        .with_no_client_auth();
    config.alpn_protocols = vec![join::ALPN.to_vec()];
    let stream = tokio::net::TcpStream::connect(scheduler.address)
        .await
        .unwrap();
    tokio_rustls::TlsConnector::from(Arc::new(config))
        .connect(role_name(Role::Scheduler), stream)
        .await
        .unwrap()
}

/// A stranger's request is bounded before anything of it is looked at.
#[tokio::test]
async fn a_stranger_s_large_request_is_refused_unread() {
    let dir = tempfile::tempdir().unwrap();
    let scheduler = Scheduler::start(&dir).await;
    let stream = Mutex::new(Some(hyper_util::rt::TokioIo::new(
        as_stranger(&scheduler).await,
    )));
    let once = tower::service_fn(move |_: tonic::transport::Uri| {
        let taken = stream.lock().unwrap().take();
        async move { taken.ok_or_else(|| std::io::Error::from(std::io::ErrorKind::ConnectionAborted)) }
    });
    let endpoint = tonic::transport::Endpoint::from_static("http://scheduler.hawker.internal");
    let channel = endpoint.connect_with_connector(once).await.unwrap();
    let mut client = v1::authority_client::AuthorityClient::new(channel);
    for (size_bytes, code) in [
        (2 << 10, tonic::Code::Unauthenticated),
        (8 << 10, tonic::Code::OutOfRange),
    ] {
        let request = v1::JoinRequest {
            version: Some(hawker_api::VERSION),
            token_id: "00".into(),
            certificate_request: vec![0; size_bytes],
            ..v1::JoinRequest::default()
        };
        let status = timeout(SOON, client.join(request))
            .await
            .unwrap()
            .unwrap_err();
        assert_eq!(status.code(), code, "{size_bytes} bytes: {status}");
    }
    scheduler.stop().await;
}
