//! The node's daemon, put together.

use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant, SystemTime};

use arc_swap::ArcSwap;
use hawker_core::message::Role;
use hawker_core::rendezvous;
use hawker_identity::member::{Identity, IdentityError};
use hawker_oci::digest::Digest;
use tokio::net::{TcpListener, TcpSocket};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use crate::admin::{
    Admin, CertificateStatus, MemberStatus, SchedulerStatus, Status, StatusSource, StoreStatus,
    TaskStatus, disk_used_percent,
};
use crate::applications::Desk;
use crate::driver::{Driver, DriverConfig, EVENTS, Event, Members, Running};
use crate::flight::Flights;
use crate::grant::Grant;
use crate::intercept::{self, ForwardProxy};
use crate::limits::Limits;
use crate::metrics::Metrics;
use crate::origin::Origin;
use crate::peer::{Dial, Peers, PeersConfig, TlsPeers};
use crate::proof::Proofs;
use crate::recent::RecentPage;
use crate::registry::{Mirror, MirrorConfig, SeedAnswer, SeedManifests};
use crate::settings::{LiveSettings, Settings};
use crate::source::RegistryBlob;
use crate::store::{Store, StoreError};
use hawker_tracker::{Capacity, Holding, Tracker, TrackerConfig};

/// Connections that wait to be accepted.
const BACKLOG: u32 = 1024;

/// Connections with peers at most.
const PEER_CONNECTIONS: usize = 1024;

/// How often the store's watermarks are looked at.
const EVICT_EVERY: Duration = Duration::from_secs(5);

/// How often answers of origins are looked at whose clients do not read.
const SWEEP_EVERY: Duration = Duration::from_secs(1);

/// How often a seed that the configuration names is tried while it does not answer.
const STATIC_SEED_EVERY: Duration = Duration::from_secs(3);

/// Peers get this long to take what is on its way to them after the last client is served.
const PEER_DRAIN: Duration = Duration::from_secs(3);

/// Why the daemon does not run.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// An address can't be listened on.
    #[error(
        "can't listen on {address} for {what}: {source}; choose another with {flag}, or stop who has it"
    )]
    Listen {
        /// Which.
        address: SocketAddr,
        /// For what.
        what: &'static str,
        /// How to change it.
        flag: &'static str,
        /// Why.
        source: std::io::Error,
    },
    /// The store can't be opened.
    #[error("can't open the store: {0}; choose another folder with --data-dir")]
    Store(#[from] StoreError),
    /// The forward proxy has no authority for its certificates.
    #[error(
        "the forward proxy's authority can't be used: {0}; mend its folder in --data-dir, or remove it to have a new one"
    )]
    Authority(#[from] IdentityError),
    /// A part of the daemon ended though nobody told it to.
    #[error("{0} ended unexpectedly")]
    Ended(&'static str),
}

/// The scheduler that runs in the same process.
#[derive(Clone)]
pub struct Beside {
    /// Its metrics: samples in the same format, without its end.
    pub metrics: Arc<dyn Fn() -> String + Send + Sync>,
    /// Its problem, for people; empty if it has none.
    pub problem: Arc<dyn Fn() -> String + Send + Sync>,
}

/// Runs the daemon until `shutdown`, then drains. `ready` is called once runtimes can pull. Without an identity the node has no
/// peers: a verified pull-through cache.
pub async fn run(
    settings: Settings,
    identity: Option<Identity>,
    shutdown: CancellationToken,
    ready: Box<dyn FnOnce() + Send>,
    beside: Option<Beside>,
) -> Result<(), DaemonError> {
    let mirrors = listen(&settings.mirror, "the mirror", "--mirror")?;
    let forward_listeners = listen(
        &settings.forward_proxy,
        "the forward proxy",
        "--forward-proxy",
    )?;
    let admin = listen(&[settings.admin], "metrics and status", "--admin")?;
    let peer_listeners = match identity {
        Some(_) => listen(&settings.peer_listen, "peers", "--peer-listen")?,
        None => Vec::new(),
    };
    let addresses = advertised(&settings, &peer_listeners);
    let (folder, cache) = (settings.data_dir.join("store"), settings.live.load().cache);
    let store = blocking(move || Store::open(&folder, cache)).await?;
    let limits = Limits::new(Arc::clone(&settings.live));
    let (mirror_addresses, forward_addresses) = (bound(&mirrors), bound(&forward_listeners));
    let own = [mirror_addresses.clone(), forward_addresses.clone()].concat();
    let metrics = Arc::new(Metrics::new());
    let origin = Origin::beside(
        Arc::clone(&settings.live),
        limits.clone(),
        own.clone(),
        Arc::clone(&metrics),
    );
    let desk = Desk::new(Arc::clone(&settings.live), Arc::clone(&metrics));
    let members = Arc::new(Members::of(settings.place.zone.to_string()));
    let (events, heard) = mpsc::channel(EVENTS);
    let flights = Flights::new(events.clone(), origin.clone());
    let proofs = Proofs::new(Arc::new(store.clone()), origin.clone());

    let seeds = Arc::new(Seeds {
        members: Arc::clone(&members),
        peers: OnceLock::new(),
        lends_tokens: settings.seed_uses_client_token,
    });
    let mirror = Mirror::new(MirrorConfig {
        store: store.clone(),
        flights,
        origin: origin.clone(),
        proofs: Arc::clone(&proofs),
        seeds: (identity.is_some() && !settings.seed)
            .then(|| Arc::clone(&seeds) as Arc<dyn SeedManifests>),
        live: Arc::clone(&settings.live),
        metrics: Arc::clone(&metrics),
        desk: Arc::clone(&desk),
        pull_grace: settings.pull_grace,
    });
    let forward_proxy = match forward_listeners.is_empty() {
        true => None,
        false => {
            let (dir, name) = (
                intercept::authority_dir(&settings.data_dir),
                settings.name.clone(),
            );
            let (mirror, origin, live) =
                (mirror.clone(), origin.clone(), Arc::clone(&settings.live));
            Some(blocking(move || ForwardProxy::open(&dir, &name, mirror, origin, live)).await?)
        }
    };
    let peers = identity.clone().map(|identity| {
        let config = PeersConfig {
            identity,
            name: settings.name.clone(),
            addresses: addresses.clone(),
            limits: limits.clone(),
            max_connections: PEER_CONNECTIONS,
            manifests: Arc::new(mirror.clone()),
            events: forward(&events, Event::Peer),
        };
        TlsPeers::start(config, peer_listeners)
    });
    if let Some(peers) = &peers {
        let _ = seeds.peers.set(peers.clone());
    }
    let tracker = identity.clone().map(|identity| {
        let (held, live) = (store.clone(), Arc::clone(&settings.live));
        Tracker::start(TrackerConfig {
            identity,
            name: settings.name.clone(),
            place: settings.place.clone(),
            addresses,
            capacity: Arc::new(move || {
                let live = live.load();
                Capacity {
                    upload_slots: *live.config.upload_slots,
                    upload_rate_bytes: live.rates.upload.unwrap_or(0),
                }
            }),
            push: settings.push.clone(),
            schedulers: settings.schedulers.clone(),
            members_file: settings.data_dir.join("members.json"),
            holdings: Arc::new(move || holdings(&held)),
            events: forward(&events, Event::Tracker),
        })
    });

    // The driver outlives `shutdown`: bodies under way need it.
    let stop_driver = CancellationToken::new();
    let driver = Driver::new(DriverConfig {
        identity: identity.clone(),
        seed: settings.seed,
        memory_bytes: settings.memory_bytes,
        lends_tokens: settings.seed_uses_client_token,
        live: Arc::clone(&settings.live),
        desk: Arc::clone(&desk),
        store: Arc::new(store.clone()),
        sources: {
            let origin = origin.clone();
            Arc::new(move |task, grants| {
                Arc::new(RegistryBlob {
                    origin: origin.clone(),
                    task,
                    grants,
                })
            })
        },
        origin: origin.clone(),
        proofs,
        peers: peers.clone().map(|peers| Arc::new(peers) as Arc<dyn Peers>),
        tracker: tracker.clone(),
        metrics: Arc::clone(&metrics),
        members: Arc::clone(&members),
        events: events.clone(),
    });
    let driving = tokio::spawn(driver.run(heard, stop_driver.clone()));
    let seeking = peers
        .clone()
        .map(|peers| tokio::spawn(static_seeds(settings.seeds.clone(), peers, events.clone())));
    let evicting = tokio::spawn(evict(
        store.clone(),
        Arc::clone(&settings.live),
        events.clone(),
        Arc::clone(&metrics),
    ));

    let status = Arc::new(Overview {
        settings: settings.clone(),
        beside: beside.clone(),
        mirror: mirror_addresses.iter().map(ToString::to_string).collect(),
        forward_proxy: forward_addresses.iter().map(ToString::to_string).collect(),
        identity,
        members,
        tracker,
        store,
        metrics: Arc::clone(&metrics),
        desk,
        running: std::sync::Mutex::default(),
        started: Instant::now(),
        stopping: shutdown.clone(),
    });
    let sweeping = tokio::spawn(sweep_parked(origin));
    let watching = tokio::spawn(watch(Arc::clone(&status), events));
    let stop_admin = CancellationToken::new();
    let admins: Vec<_> = admin
        .into_iter()
        .map(|listener| {
            let (metrics, more) = (Arc::clone(&metrics), beside.clone());
            let admin = Admin {
                status: Arc::clone(&status) as Arc<dyn StatusSource>,
                metrics: Box::new(move || {
                    more.as_ref()
                        .map_or_else(String::new, |more| (more.metrics)())
                        + &metrics.encode()
                }),
            };
            tokio::spawn(admin.serve(listener, stop_admin.clone()))
        })
        .collect();
    ready();

    let serving = mirrors.into_iter().map(|listener| {
        let (mirror, stop, drain) = (mirror.clone(), shutdown.clone(), settings.drain);
        tokio::spawn(async move { mirror.serve(listener, stop, drain).await })
    });
    let forwarding = forward_listeners.into_iter().filter_map(|listener| {
        let (proxy, stop, drain) = (forward_proxy.clone()?, shutdown.clone(), settings.drain);
        Some(tokio::spawn(async move {
            proxy.serve(listener, stop, drain).await
        }))
    });
    for served in serving.chain(forwarding).collect::<Vec<_>>() {
        let _ = served.await;
    }
    if let Some(peers) = &peers {
        peers.drain(PEER_DRAIN).await;
    }
    let unexpected = driving.is_finished();
    stop_driver.cancel();
    stop_admin.cancel();
    evicting.abort();
    sweeping.abort();
    watching.abort();
    if let Some(seeking) = seeking {
        seeking.abort();
    }
    let _ = driving.await;
    for admin in admins {
        let _ = admin.await;
    }
    if unexpected {
        Err(DaemonError::Ended("the driver"))
    } else {
        Ok(())
    }
}

/// Listens at once, so that a port that is taken is told before anything else is done.
fn listen(
    addresses: &[SocketAddr],
    what: &'static str,
    flag: &'static str,
) -> Result<Vec<TcpListener>, DaemonError> {
    let listen = |address: SocketAddr| {
        let socket = if address.is_ipv4() {
            TcpSocket::new_v4()
        } else {
            TcpSocket::new_v6()
        }?;
        socket.set_reuseaddr(true)?;
        socket.bind(address)?;
        socket.listen(BACKLOG)
    };
    addresses
        .iter()
        .map(|address| {
            listen(*address).map_err(|source| DaemonError::Listen {
                address: *address,
                what,
                flag,
                source,
            })
        })
        .collect()
}

/// The addresses that listeners got.
fn bound(listeners: &[TcpListener]) -> Vec<SocketAddr> {
    listeners
        .iter()
        .filter_map(|listener| listener.local_addr().ok())
        .collect()
}

/// How peers are told to reach this node: as told, else the addresses listened on, else the host's own.
fn advertised(settings: &Settings, listeners: &[TcpListener]) -> Vec<String> {
    if !settings.advertise.is_empty() {
        return settings.advertise.clone();
    }
    listeners
        .iter()
        .filter_map(|l| l.local_addr().ok())
        .map(hawker_network::address::advertised)
        .collect()
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

/// A sender of some kind of events that all end up with the driver, in order.
pub(crate) fn forward<T: Send + 'static>(
    events: &mpsc::Sender<Event>,
    kind: fn(T) -> Event,
) -> mpsc::Sender<T> {
    let (sender, mut receiver) = mpsc::channel(EVENTS);
    let events = events.clone();
    tokio::spawn(async move {
        while let Some(event) = receiver.recv().await {
            if events.send(kind(event)).await.is_err() {
                return;
            }
        }
    });
    sender
}

fn holdings(store: &Store) -> Vec<Holding> {
    let held = store.holdings().into_iter();
    held.map(|(task, size_bytes, pieces, complete)| Holding {
        task,
        size_bytes,
        pieces,
        complete,
    })
    .collect()
}

/// Keeps dialling the seeds that the configuration names, each name resolved again every time.
async fn static_seeds(seeds: Vec<String>, peers: TlsPeers, events: mpsc::Sender<Event>) {
    loop {
        for address in &seeds {
            let dial = Dial {
                peer: None,
                addresses: vec![address.clone()],
            };
            match peers.dial(&dial).await {
                Ok(peer) => {
                    let _ = events.send(Event::StaticSeed { peer }).await;
                }
                Err(error) => tracing::debug!(%address, %error, "the seed can't be reached"),
            }
        }
        tokio::time::sleep(STATIC_SEED_EVERY).await;
    }
}

/// Ends answers of origins whose clients have stopped reading, where there are many.
async fn sweep_parked(origin: Origin) {
    loop {
        tokio::time::sleep(SWEEP_EVERY).await;
        origin.sweep_parked();
    }
}

async fn evict(
    store: Store,
    live: Arc<ArcSwap<LiveSettings>>,
    events: mpsc::Sender<Event>,
    metrics: Arc<Metrics>,
) {
    loop {
        tokio::time::sleep(EVICT_EVERY).await;
        let evicting = store.clone();
        store.set_limits(live.load().cache);
        let before = store.usage().bytes;
        let (gone, crowded) = blocking(move || (evicting.evict(), evicting.is_crowded())).await;
        if crowded {
            let _ = events.send(Event::Crowded).await;
        }
        let usage = store.usage();
        metrics.store_bytes.set(usage.bytes);
        metrics.store_blobs.set(usage.blobs);
        metrics.store_degraded.set(u64::from(usage.degraded));
        if gone.is_empty() {
            continue;
        }
        tracing::info!(tasks = gone.len(), "evicted");
        metrics
            .evicted_bytes
            .inc_by(before.saturating_sub(usage.bytes));
        let _ = events.send(Event::Gone(gone)).await;
    }
}

/// Asks a manifest's seed for it.
struct Seeds {
    members: Arc<Members>,
    peers: OnceLock<TlsPeers>,
    lends_tokens: bool,
}

impl SeedManifests for Seeds {
    fn manifest<'a>(&'a self, grant: &'a Grant, digest: &'a Digest) -> SeedAnswer<'a> {
        Box::pin(async move {
            let peers = self.peers.get()?;
            let right = grant.right(self.lends_tokens);
            // The owner, and one more should it be gone: the origin comes soon enough.
            for seed in rendezvous::order(digest, self.members.seeds())
                .into_iter()
                .take(2)
            {
                let Some(dial) = self.members.dial(seed) else {
                    continue;
                };
                if peers.dial(&dial).await.is_ok()
                    && let Ok(answer) = peers
                        .manifest(seed, &grant.source, digest, right.token())
                        .await
                {
                    return Some(answer);
                }
            }
            None
        })
    }
}

/// The status for people.
struct Overview {
    settings: Settings,
    beside: Option<Beside>,
    mirror: Vec<String>,
    forward_proxy: Vec<String>,
    identity: Option<Identity>,
    members: Arc<Members>,
    tracker: Option<Tracker>,
    store: Store,
    metrics: Arc<Metrics>,
    desk: Arc<Desk>,
    running: std::sync::Mutex<Vec<Running>>,
    started: Instant,
    stopping: CancellationToken,
}

/// How often the list of downloads is brought up to date.
const WATCH_EVERY: Duration = Duration::from_millis(500);

async fn watch(overview: Arc<Overview>, events: mpsc::Sender<Event>) {
    loop {
        let (reply, answer) = oneshot::channel();
        if events.send(Event::List(reply)).await.is_err() {
            return;
        }
        if let Ok(running) = answer.await {
            *overview
                .running
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner) = running;
        }
        tokio::time::sleep(WATCH_EVERY).await;
    }
}

impl Overview {
    /// The reason why this node serves alone though it was a member, else the problem of the scheduler beside it; empty if there
    /// is none.
    fn problem(&self) -> String {
        let expired = self
            .identity
            .as_ref()
            .is_some_and(|identity| identity.has_expired(SystemTime::now()));
        match &self.settings.problem {
            Some(problem) => problem.clone(),
            None if expired => "this node's certificate has expired: other members refuse it, and pulls go on without them. \
                                Make a token where the authority is (hawker token create) and start this node again with \
                                --join and --token-file"
                .to_owned(),
            None => self.beside.as_ref().map_or_else(String::new, |beside| (beside.problem)()),
        }
    }
}

impl StatusSource for Overview {
    fn requests(&self, after: u64) -> Option<RecentPage> {
        Some(self.metrics.recent.after(after))
    }

    fn status(&self) -> Status {
        let usage = self.store.usage();
        let connected = self
            .tracker
            .as_ref()
            .map(Tracker::connected)
            .unwrap_or_default();
        let mut schedulers: Vec<SchedulerStatus> = connected
            .iter()
            .map(|address| SchedulerStatus {
                address: address.clone(),
                connected: true,
                problem: String::new(),
            })
            .collect();
        for address in self
            .settings
            .schedulers
            .iter()
            .filter(|a| !connected.contains(a))
        {
            let problem = self
                .tracker
                .as_ref()
                .and_then(|tracker| tracker.problem(address));
            let problem = problem.unwrap_or_default();
            schedulers.push(SchedulerStatus {
                address: address.clone(),
                connected: false,
                problem,
            });
        }
        let running = self
            .running
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .clone();
        let role = match (&self.identity, self.settings.seed) {
            (None, _) => "alone".to_owned(),
            (Some(_), true) => Role::Seed.to_string(),
            (Some(_), false) => Role::Peer.to_string(),
        };
        Status {
            name: self.settings.name.clone(),
            peer_id: self
                .identity
                .as_ref()
                .map(|i| i.peer_id().to_string())
                .unwrap_or_default(),
            role,
            cluster: self
                .identity
                .as_ref()
                .map(Identity::cluster)
                .unwrap_or_default(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            uptime_s: self.started.elapsed().as_secs(),
            ready: !self.stopping.is_cancelled(),
            problem: self.problem(),
            mirror: self.mirror.clone(),
            forward_proxy: self.forward_proxy.clone(),
            schedulers,
            members: self
                .members
                .all()
                .into_iter()
                .map(|(member, connected, isolated)| MemberStatus {
                    name: member.name,
                    peer_id: member.peer.to_string(),
                    role: member.role.to_string(),
                    addresses: member.addresses,
                    connected,
                    isolated: isolated.is_some(),
                    isolated_for: isolated.as_ref().map(|i| i.why.clone()).unwrap_or_default(),
                    isolated_for_s: isolated.map_or(0, |i| {
                        i.until.saturating_duration_since(Instant::now()).as_secs()
                    }),
                })
                .collect(),
            bytes: self.metrics.bytes(),
            applications: self.desk.status(),
            store: StoreStatus {
                blobs: usage.blobs,
                partials: usage.partials,
                bytes: usage.bytes,
                degraded: usage.degraded,
                disk_used_percent: disk_used_percent(&self.settings.data_dir),
                high_percent: self.settings.live.load().cache.high_percent,
            },
            tasks: running
                .into_iter()
                .map(|task| TaskStatus {
                    task: task.task.to_string(),
                    size_bytes: task.size_bytes,
                    pieces: u64::from(task.pieces),
                    of: u64::from(task.of),
                    state: task.state.to_owned(),
                    readers: task.readers as u64,
                })
                .collect(),
            certificate: self.identity.as_ref().map(|identity| {
                let (not_before_s, not_after_s) = identity.validity_s();
                CertificateStatus {
                    not_before_s,
                    not_after_s,
                }
            }),
            ..Status::default()
        }
    }
}
