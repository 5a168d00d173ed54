//! The attacks: by clients of a mirror, by strangers, by members. Each consists of tries that are repeated until it ends.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;
use clap::ValueEnum;
use hawker_conformance::attacker::{Attacker, Line, Membership, interest, invented};
use hawker_conformance::lab::{Hawker, Host};
use hawker_conformance::origin::Content;
use hawker_conformance::rogue::{Conduct, Rogue};
use hawker_core::message::Role;
use hawker_core::piece::PeerId;
use hawker_identity::member::role_name;
use hawker_oci::digest::Digest;
use http_body_util::StreamBody;
use hyper::body::Frame;
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustix::process::setpriority_process;
use rustls::ClientConfig;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::runtime::Runtime;
use tokio::sync::broadcast;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsConnector;
use tokio_stream::StreamExt as _;

use super::Arena;
use crate::measure::MIB;
use crate::stage::REPOSITORY;

/// A blob that no disk here holds.
const HUGE_BYTES: u64 = 2 << 40;
/// All begin within this time.
const BEGINNING: Duration = Duration::from_secs(2);
/// After a try, before the next one.
const PAUSE: Duration = Duration::from_secs(1);
/// A try that waits for the other side to end it waits so long.
const PATIENCE: Duration = Duration::from_secs(20);

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Attack {
    /// Clients that ask for blobs of 2 TB and do not read
    SlowReaders,
    /// Clients that ask a registry for each new blob that tells a wrong size
    LyingSizes,
    /// 1,500 clients that name registries whose DNS never answers
    SilentDns,
    /// 4,200 connections to a mirror without a whole request
    HalfOpenClients,
    /// Strangers' join requests of 4 MiB that are not completed
    JoinFlood,
    /// Strangers' connections to the scheduler and the peers that say nothing
    IdleStrangers,
    /// A member that wants blobs of 2 TB and leaves
    EndlessInterests,
    /// A member that tells tables of invented blobs
    InventedTables,
    /// A member that wants 6,000 blobs of a registry that it names
    NamedRegistry,
    /// A member with 1,100 connections to a node
    ManyConnections,
    /// Two members that report both seeds
    Slander,
    /// Nothing: the noise of this machine, and the memory that pulls alone take (only if named)
    Control,
}

impl Attack {
    /// Every attack; the control is none.
    pub(super) fn all() -> impl Iterator<Item = Self> {
        Self::value_variants()
            .iter()
            .copied()
            .filter(|attack| *attack != Attack::Control)
    }

    pub(super) fn name(self) -> String {
        self.to_possible_value()
            .map(|value| value.get_name().to_owned())
            .unwrap_or_default()
    }

    /// Begins it, against node, seeds and scheduler as far as each is within its reach.
    pub(super) fn start(self, arena: &Arena) -> Result<Onslaught> {
        let mut onslaught = Onslaught::default();
        let on = &mut onslaught;
        let mirrors = [&arena.cluster.nodes[0], &arena.cluster.seed];
        match self {
            Attack::Control => {}
            Attack::SlowReaders => {
                let blobs = huge_blobs(arena, 8);
                for victim in mirrors {
                    on.repeat(
                        victim.host(),
                        8,
                        SlowReader(Mirror::of(victim, arena), blobs.clone()),
                    )?;
                }
            }
            Attack::LyingSizes => {
                for victim in mirrors {
                    let liar = LyingSize(Mirror::of(victim, arena), arena.announced.clone());
                    on.repeat(victim.host(), 4, liar)?;
                }
            }
            Attack::SilentDns => {
                for victim in mirrors {
                    on.repeat(victim.host(), 1500, SilentName(Mirror::of(victim, arena)))?;
                }
            }
            Attack::HalfOpenClients => {
                for victim in mirrors {
                    on.repeat(victim.host(), 4200, HalfRequest(victim.mirror()))?;
                }
            }
            Attack::JoinFlood => {
                let scheduler = arena.cluster.authority().scheduler();
                for host in &arena.outsiders {
                    on.repeat(host, 12, LongJoin(scheduler, stranger(host, arena)?))?;
                }
            }
            Attack::IdleStrangers => {
                let scheduler = arena.cluster.authority().scheduler();
                for host in &arena.outsiders {
                    on.repeat(host, 300, IdleTls(scheduler, stranger(host, arena)?))?;
                    on.repeat(host, 300, IdleTcp(scheduler))?;
                    for victim in mirrors {
                        on.repeat(host, 200, IdleTcp(victim.peer()))?;
                    }
                }
            }
            Attack::EndlessInterests => {
                let intruder = Member::new(arena)?;
                for seed in arena.seeds() {
                    let interests = Interests {
                        door: intruder.door(seed)?,
                        registry: arena.evil.address().to_string(),
                        blobs: huge_blobs(arena, 6),
                    };
                    on.repeat(&intruder.host, 1, interests)?;
                }
            }
            Attack::InventedTables => {
                let intruder = Member::new(arena)?;
                for victim in arena.seeds().into_iter().chain([&arena.cluster.nodes[0]]) {
                    let registry = arena.evil.address().to_string();
                    on.repeat(
                        &intruder.host,
                        1,
                        Tables {
                            door: intruder.door(victim)?,
                            registry,
                        },
                    )?;
                }
            }
            Attack::NamedRegistry => {
                let intruder = Member::new(arena)?;
                for seed in arena.seeds() {
                    let registry = arena.evil.address().to_string();
                    on.repeat(
                        &intruder.host,
                        1,
                        ManyInterests {
                            door: intruder.door(seed)?,
                            registry,
                        },
                    )?;
                }
            }
            Attack::ManyConnections => {
                let intruder = Member::new(arena)?;
                for victim in mirrors {
                    on.repeat(&intruder.host, 1100, HeldConnection(intruder.door(victim)?))?;
                }
            }
            Attack::Slander => {
                let authority = arena.cluster.authority();
                let content = Content::generated(0, arena.cached.size_bytes);
                let join = |host: &Host| {
                    Rogue::start(
                        host,
                        authority,
                        "peer",
                        Conduct::Stall,
                        &arena.cached,
                        &content,
                    )
                    .map(Arc::new)
                };
                on.rogues = arena.outsiders.iter().map(join).collect::<Result<_>>()?;
                let seeds = arena
                    .seeds()
                    .map(peer_id)
                    .into_iter()
                    .collect::<Result<Vec<_>>>()?;
                for (rogue, host) in on.rogues.clone().into_iter().zip(&arena.outsiders) {
                    on.repeat(
                        host,
                        1,
                        Slanderer {
                            rogue,
                            seeds: seeds.clone(),
                        },
                    )?;
                }
            }
        }
        Ok(onslaught)
    }
}

/// One part of an attack, tried again and again.
trait Attempt: Send + Sync + 'static {
    /// One try, until either side has had enough. `number` is no other try's.
    fn once(&self, number: u64) -> impl Future<Output = Result<()>> + Send;
}

/// An attack under way; dropping it ends all its connections.
#[derive(Default)]
pub(super) struct Onslaught {
    counts: Arc<Counts>,
    runtimes: Vec<Runtime>,
    /// After the runtimes, whose tasks share them: a rogue ends on a thread that may wait.
    rogues: Vec<Arc<Rogue>>,
}

#[derive(Default)]
struct Counts {
    tries: AtomicU64,
    refused: AtomicU64,
}

impl Onslaught {
    /// Repeats attempts from `host`, this many at a time.
    fn repeat(&mut self, host: &Host, at_once: u32, attempt: impl Attempt) -> Result<()> {
        let (runtime, attempt) = (host.runtime(1)?, Arc::new(attempt));
        // Attackers have processors of their own. Here they share those of the daemons, and get what these leave over.
        runtime.spawn(async { setpriority_process(None, 19) });
        for one in 0..at_once {
            let (attempt, counts) = (Arc::clone(&attempt), Arc::clone(&self.counts));
            runtime.spawn(async move {
                sleep(BEGINNING * one / at_once).await;
                loop {
                    let number = counts.tries.fetch_add(1, Ordering::Relaxed);
                    if attempt.once(number).await.is_err() {
                        counts.refused.fetch_add(1, Ordering::Relaxed);
                    }
                    sleep(PAUSE).await;
                }
            });
        }
        self.runtimes.push(runtime);
        Ok(())
    }

    /// Ends it; how many tries there were, and how many of them the other side ended before their time.
    pub(super) fn end(self) -> (u64, u64) {
        let counts = Arc::clone(&self.counts);
        drop(self);
        (
            counts.tries.load(Ordering::Relaxed),
            counts.refused.load(Ordering::Relaxed),
        )
    }
}

fn huge_blobs(arena: &Arena, count: u32) -> Vec<Digest> {
    let blob = |number: u32| {
        let digest = invented(number);
        arena.evil.add_claimed_blob(
            REPOSITORY,
            &digest,
            Content::generated(u64::from(number), HUGE_BYTES),
        );
        digest
    };
    (0..count).map(blob).collect()
}

fn peer_id(hawker: &Hawker) -> Result<PeerId> {
    Ok(hawker.status()?.peer_id.parse()?)
}

/// A mirror as clients of its own host reach it, and the registry that they name.
struct Mirror {
    address: SocketAddr,
    registry: String,
}

impl Mirror {
    fn of(hawker: &Hawker, arena: &Arena) -> Self {
        Self {
            address: hawker.mirror(),
            registry: arena.evil.address().to_string(),
        }
    }

    async fn ask(&self, registry: &str, digest: Digest) -> Result<TcpStream> {
        let mut stream = TcpStream::connect(self.address).await?;
        let ns = registry.replace(':', "%3A");
        let head =
            format!("GET /v2/{REPOSITORY}/blobs/{digest}?ns={ns} HTTP/1.1\r\nHost: mirror\r\n\r\n");
        stream.write_all(head.as_bytes()).await?;
        Ok(stream)
    }
}

/// Reads until the other side closes the connection.
async fn until_closed(mut stream: impl tokio::io::AsyncRead + Unpin) -> Result<()> {
    let mut buffer = vec![0; 16 << 10];
    while stream.read(&mut buffer).await? > 0 {}
    Ok(())
}

struct SlowReader(Mirror, Vec<Digest>);

impl Attempt for SlowReader {
    async fn once(&self, number: u64) -> Result<()> {
        let digest = self.1[number as usize % self.1.len()];
        let mut stream = self.0.ask(&self.0.registry, digest).await?;
        let mut beginning = [0; 12];
        timeout(PATIENCE, stream.read_exact(&mut beginning)).await??;
        ensure!(beginning.ends_with(b"200"), "refused");
        sleep(PATIENCE).await;
        Ok(())
    }
}

struct LyingSize(Mirror, broadcast::Sender<Digest>);

impl Attempt for LyingSize {
    async fn once(&self, _: u64) -> Result<()> {
        let mut announced = self.1.subscribe();
        loop {
            let stream = self
                .0
                .ask(&self.0.registry, announced.recv().await?)
                .await?;
            // It may hang: the next blob counts more.
            let _ = timeout(PAUSE, until_closed(stream)).await;
        }
    }
}

struct SilentName(Mirror);

impl Attempt for SilentName {
    async fn once(&self, number: u64) -> Result<()> {
        let stream = self
            .0
            .ask(
                &format!("n{number}.silent.example"),
                invented(number as u32),
            )
            .await?;
        timeout(PATIENCE, until_closed(stream)).await?
    }
}

struct HalfRequest(SocketAddr);

impl Attempt for HalfRequest {
    async fn once(&self, _: u64) -> Result<()> {
        let mut stream = TcpStream::connect(self.0).await?;
        stream.write_all(b"GET /v2/ HTTP/1.1\r\nHost: m").await?;
        until_closed(stream).await
    }
}

/// TLS without a certificate. The outsider knows the cluster's authority, which alone opens nothing.
fn stranger(host: &Host, arena: &Arena) -> Result<Arc<ClientConfig>> {
    Attacker::join(host, arena.cluster.authority())?
        .membership()
        .stranger()
}

async fn handshake(
    address: SocketAddr,
    config: &Arc<ClientConfig>,
) -> Result<tokio_rustls::client::TlsStream<TcpStream>> {
    let tcp = TcpStream::connect(address).await?;
    Ok(TlsConnector::from(Arc::clone(config))
        .connect(role_name(Role::Scheduler), tcp)
        .await?)
}

struct LongJoin(SocketAddr, Arc<ClientConfig>);

impl Attempt for LongJoin {
    async fn once(&self, _: u64) -> Result<()> {
        const STREAMS: u32 = 32;
        const CHUNK_BYTES: usize = 64 << 10;
        let length = 4 * MIB as u32;
        let tls = handshake(self.0, &self.1).await?;
        let connection =
            hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(tls));
        let (sender, driver) = connection.await?;
        let join = move || {
            let mut sender = sender.clone();
            // One chunk is missing in the end: the message is never whole.
            let head = Bytes::from([&[0][..], &length.to_be_bytes()].concat());
            let chunks = std::iter::repeat_n(
                Bytes::from(vec![0; CHUNK_BYTES]),
                length as usize / CHUNK_BYTES - 1,
            );
            let frames = tokio_stream::iter(std::iter::once(head).chain(chunks).map(Frame::data));
            let body = StreamBody::new(
                frames
                    .chain(tokio_stream::pending())
                    .map(std::io::Result::Ok),
            );
            let request =
                hyper::Request::post("http://scheduler.hawker.internal/hawker.v1.Authority/Join")
                    .header("content-type", "application/grpc")
                    .header("te", "trailers")
                    .body(body);
            async move { anyhow::Ok(sender.send_request(request?).await.map(drop)?) }
        };
        let mut streams = tokio::task::JoinSet::new();
        (0..STREAMS).for_each(|_| drop(streams.spawn(join())));
        let driven = timeout(PATIENCE, async {
            tokio::select! {
                driven = driver => driven.context("the connection"),
                () = async { while streams.join_next().await.is_some() {} } => Ok(()),
            }
        });
        driven.await?
    }
}

struct IdleTls(SocketAddr, Arc<ClientConfig>);

impl Attempt for IdleTls {
    async fn once(&self, _: u64) -> Result<()> {
        until_closed(handshake(self.0, &self.1).await?).await
    }
}

struct IdleTcp(SocketAddr);

impl Attempt for IdleTcp {
    async fn once(&self, _: u64) -> Result<()> {
        let mut stream = TcpStream::connect(self.0).await?;
        // The beginning of a TLS handshake.
        stream.write_all(b"\x16\x03\x01\x02\x00\x01").await?;
        until_closed(stream).await
    }
}

/// A member's certificate, and where it is used.
struct Member {
    membership: Membership,
    host: Host,
}

impl Member {
    fn new(arena: &Arena) -> Result<Self> {
        let host = arena.outsiders[0].clone();
        let membership = Attacker::join(&host, arena.cluster.authority())?
            .membership()
            .clone();
        Ok(Self { membership, host })
    }

    fn door(&self, victim: &Hawker) -> Result<Door> {
        Ok(Door {
            membership: self.membership.clone(),
            address: victim.peer(),
            peer: peer_id(victim)?,
        })
    }
}

/// Another member's peer port.
struct Door {
    membership: Membership,
    address: SocketAddr,
    peer: PeerId,
}

impl Door {
    async fn enter(&self) -> Result<Line> {
        self.membership.connect(self.address, self.peer).await
    }
}

struct Interests {
    door: Door,
    registry: String,
    blobs: Vec<Digest>,
}

impl Attempt for Interests {
    async fn once(&self, _: u64) -> Result<()> {
        let line = self.door.enter().await?;
        for blob in &self.blobs {
            line.tell(&interest(*blob, &self.registry, REPOSITORY), PATIENCE)
                .await?;
        }
        sleep(3 * PAUSE).await;
        Ok(())
    }
}

struct Tables {
    door: Door,
    registry: String,
}

impl Attempt for Tables {
    async fn once(&self, number: u64) -> Result<()> {
        const TABLES: u32 = 1000;
        const BETWEEN: Duration = Duration::from_millis(50);
        let line = self.door.enter().await?;
        for one in 0..TABLES {
            let task = invented(number as u32 * TABLES + one);
            line.tell(&interest(task, &self.registry, REPOSITORY), PATIENCE)
                .await?;
            line.tell(&self.door.membership.table(task, HUGE_BYTES), PATIENCE)
                .await?;
            sleep(BETWEEN).await;
        }
        Ok(())
    }
}

struct ManyInterests {
    door: Door,
    registry: String,
}

impl Attempt for ManyInterests {
    async fn once(&self, number: u64) -> Result<()> {
        const INTERESTS: u32 = 6000;
        let mut line = self.door.enter().await?;
        for one in 0..INTERESTS {
            let task = invented(number as u32 * INTERESTS + one);
            line.tell(&interest(task, &self.registry, REPOSITORY), PATIENCE)
                .await?;
        }
        // Its end by the other side is a refusal, by time none.
        ensure!(timeout(PATIENCE, line.over()).await.is_err(), "dropped");
        Ok(())
    }
}

struct HeldConnection(Door);

impl Attempt for HeldConnection {
    async fn once(&self, _: u64) -> Result<()> {
        self.0.enter().await?.over().await;
        Ok(())
    }
}

struct Slanderer {
    rogue: Arc<Rogue>,
    seeds: Vec<PeerId>,
}

impl Attempt for Slanderer {
    async fn once(&self, _: u64) -> Result<()> {
        self.rogue.want()?;
        sleep(PAUSE).await;
        self.rogue.slander(&self.seeds)
    }
}
