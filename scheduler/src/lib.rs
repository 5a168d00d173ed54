//! The scheduler: holders of each task, parents for each peer, isolation; and the authority for the members'
//! certificates.
//!
//! A member's connection comes in through `listener` (TLS, who calls), `service` turns its messages into inputs, `driver`
//! owns `hawker_core::swarm` and answers over the streams. [`authority`] makes certificates, `membership` keeps the list of
//! seeds and schedulers, `links` makes several schedulers known to each other. Nothing here survives a restart but the
//! authority, our own identity and that list: members say the rest again.

pub mod advertise;
mod door;
mod driver;
mod links;
mod listener;
mod membership;
mod service;
mod standing;

use std::io;
use std::path::PathBuf;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use arc_swap::ArcSwap;
use hawker_api::convert::Member;
use hawker_api::v1::authority_server::AuthorityServer;
use hawker_api::v1::scheduler_server::SchedulerServer;
use hawker_core::application::{Applications, Labels};
use hawker_core::message::Role;
use hawker_core::piece::PeerId;
use hawker_core::place::Networks;
use hawker_core::swarm::IsolationReason;
use hawker_identity::join::{self, JoinError, Token};
use hawker_identity::member::{Identity, IdentityError};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, broadcast, mpsc};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;
use tracing::{info, warn};

use advertise::AllowedAddresses;
use driver::{Driver, DriverConfig};
use hawker_identity::authority::{Authority, AuthorityError};
use membership::Membership;
use service::{JOINS_AT_ONCE, Service};

/// Below the data directory: key and certificate of the scheduler itself. A proxy in the same process has its own.
const IDENTITY_DIR: &str = "scheduler/identity";
const MEMBERS_FILE: &str = "scheduler/members.json";
/// A connection over which nothing comes back for twice this long is given up, and its streams with it.
const KEEPALIVE: Duration = Duration::from_secs(10);
/// Streams within one connection: a member needs one, and a few questions. Each may hold a message of the largest size.
const STREAMS_PER_CONNECTION: u32 = 4;
const MAX_HEADER_BYTES: u32 = 16 << 10;
/// A stranger asks one question, whose request has less than 2 KiB.
const STRANGER_STREAMS: u32 = 2;
const STRANGER_WINDOW_BYTES: u32 = 8 << 10;
const STRANGER_HEADER_BYTES: u32 = 4 << 10;
const STRANGER_RESETS: usize = 4;
/// Largest request to the authority, from strangers and members alike.
const MAX_JOIN_BYTES: usize = 4 << 10;
/// Largest message: [`hawker_api::convert`] bounds what is in it. A full announcement comes in several.
const MAX_MESSAGE_BYTES: usize = 4 << 20;
/// How long streams get to end when the scheduler stops.
const DRAIN: Duration = Duration::from_secs(3);
/// How often the authority's folder is looked at for members that were removed, and how often it is read whatever its time says.
const REMOVED_LOOK: Duration = Duration::from_millis(500);
const REMOVED_READ: Duration = Duration::from_secs(10);
/// Accusations that wait for a link to another scheduler.
const VOUCHED_QUEUE: usize = 256;
/// How often our own certificate and old tokens are looked at.
const HOUSEKEEPING: Duration = Duration::from_secs(300);

/// How to run a scheduler.
#[derive(Debug)]
pub struct SchedulerConfig {
    /// For people.
    pub name: String,
    /// The cluster's name, used when this process creates the authority.
    pub cluster: String,
    /// The folder of authority, identity and member list.
    pub data_dir: PathBuf,
    /// The listeners for members. They are bound already, so that the caller knows the ports.
    pub listeners: Vec<TcpListener>,
    /// How members are told to reach this scheduler, `host:port`; empty: by the listeners' addresses.
    pub advertise: Vec<String>,
    /// Other schedulers of the cluster, `host:port`; those on the saved member list are known anyway.
    pub schedulers: Vec<String>,
    /// Join the cluster at this address with this token, unless it was joined before: there is no authority here then.
    pub join: Option<(String, Token)>,
    /// Settings that may change while the scheduler runs.
    pub live: Arc<ArcSwap<LiveSettings>>,
    /// Addresses that members may advertise besides the one that they connect from.
    pub allowed_addresses: AllowedAddresses,
    /// How long certificates live that are made here.
    pub certificate_life: Duration,
    /// Kept up to date while the scheduler runs.
    pub numbers: Arc<Numbers>,
}

/// Settings of a scheduler that may change while it runs.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LiveSettings {
    /// The rules of applications: the scheduler enforces its limits here.
    pub applications: Arc<Applications>,
    /// The places of members that name none, by their addresses.
    pub networks: Arc<Networks>,
    /// The configuration that all members get, as TOML.
    pub document: Arc<str>,
}

/// A peer that nobody is sent to, for people.
#[derive(Clone, Debug)]
pub struct Isolation {
    /// Its id.
    pub peer: PeerId,
    /// Its name, empty when it is gone.
    pub name: String,
    /// Why.
    pub reason: IsolationReason,
    /// When it is let back.
    pub until: Instant,
}

/// The counters of a scheduler, for metrics.
#[derive(Debug, Default)]
pub struct Numbers {
    /// Peers and seeds, those that just lost their stream included.
    pub peers: AtomicU64,
    /// Tasks of which something is known.
    pub tasks: AtomicU64,
    /// Isolated peers.
    pub isolated: AtomicU64,
    /// The isolated members. Bounded by the members there are.
    pub isolations: Mutex<Vec<Isolation>>,
    /// Of each application whose elected peers are limited: its labels, how many there are, how many had to wait since the start.
    pub applications: Mutex<Vec<(Labels, usize, u64)>>,
    /// Peers isolated since the start for wrong bytes.
    pub isolated_for_wrong_bytes: AtomicU64,
    /// Peers isolated since the start because they stalled.
    pub isolated_for_stalls: AtomicU64,
    /// Peers isolated since the start because they sealed two tables of one task.
    pub isolated_for_contradictions: AtomicU64,
    /// Members that refuse the pushed configuration: name and reason.
    pub refusals: Mutex<Vec<(String, String)>>,
    /// Open streams.
    pub streams: AtomicU64,
    /// Messages received since the start.
    pub received: AtomicU64,
    /// Messages sent since the start.
    pub sent: AtomicU64,
    /// Streams closed because their peer read too slowly.
    pub dropped: AtomicU64,
    /// Nodes that joined.
    pub joins: AtomicU64,
    /// Attempts to join that were refused.
    pub joins_refused: AtomicU64,
}

/// Why a scheduler does not start or go on.
#[derive(Debug, thiserror::Error)]
pub enum SchedulerError {
    /// The authority's files.
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    /// Our own key or certificate.
    #[error("the scheduler's identity: {0}")]
    Identity(#[from] IdentityError),
    /// Joining an existing cluster as its next scheduler.
    #[error(transparent)]
    Join(#[from] JoinError),
    /// The token made us something else than a scheduler.
    #[error("the token is for a {0}: make one with `hawker token create --role scheduler`")]
    WrongRole(Role),
    /// gRPC.
    #[error("serving failed: {0}")]
    Serve(#[from] tonic::transport::Error),
    /// Something that must not end ended.
    #[error("{0} ended unexpectedly; this is a bug in Hawker")]
    Ended(&'static str),
}

/// Runs a scheduler, and the authority unless another one has it, until `shutdown`.
pub async fn run(
    config: SchedulerConfig,
    shutdown: CancellationToken,
) -> Result<(), SchedulerError> {
    // If one part ends, the rest ends with it.
    let shutdown = shutdown.child_token();
    let _ends_all = shutdown.clone().drop_guard();
    let Start {
        identity,
        authority,
        cluster,
        members,
    } = start(&config).await?;
    let ourselves = ourselves(&config, &identity);
    info!(cluster, peer = %identity.peer_id(), addresses = ?ourselves.addresses, authority = authority.is_some(), "scheduler");

    let file = config.data_dir.join(MEMBERS_FILE);
    let membership = Membership::load(ourselves.clone(), file, members, Instant::now());
    let known = membership.list();
    let limits = listener::Limits::new();
    let (vouched, _) = broadcast::channel(VOUCHED_QUEUE);
    let driver = Driver::new(DriverConfig {
        membership,
        cluster: cluster.clone(),
        live: Arc::clone(&config.live),
        numbers: Arc::clone(&config.numbers),
        identity: identity.clone(),
        identity_dir: config.data_dir.join(IDENTITY_DIR),
        connections: limits.connections.clone(),
        vouched: vouched.clone(),
    });
    let (handle, driver_task) = driver.start(shutdown.clone());
    let service = Service {
        driver: handle,
        identity: identity.clone(),
        authority: authority.clone(),
        cluster,
        numbers: config.numbers,
        streams: Arc::default(),
        live: config.live,
        allowed_addresses: Arc::new(config.allowed_addresses),
        joins: Arc::new(Semaphore::new(JOINS_AT_ONCE)),
        refusals: Arc::default(),
    };

    let mut tasks = JoinSet::new();
    let (members, incoming_members) = mpsc::channel(64);
    let (strangers, incoming_strangers) = mpsc::channel(64);
    let ready = listener::Ready { members, strangers };
    for listener in config.listeners {
        tasks.spawn(listener::accept(
            listener,
            identity.clone(),
            ready.clone(),
            limits.clone(),
            shutdown.clone(),
        ));
    }
    let schedulers = addresses_of_others(&identity, known.iter())
        .chain(config.schedulers)
        .collect();
    let links = links::Links {
        identity: identity.clone(),
        ourselves,
        driver: service.driver.clone(),
        vouched,
    };
    tasks.spawn(links::keep(links, schedulers, shutdown.clone()));
    drop(ready);
    if let Some(authority) = &authority {
        tasks.spawn(watch_removed(
            Arc::clone(authority),
            service.driver.clone(),
            shutdown.clone(),
        ));
    }
    let housekeeping = Housekeeping {
        identity,
        authority,
        dir: config.data_dir.join(IDENTITY_DIR),
        service: service.clone(),
    };
    tasks.spawn(housekeeping.run(shutdown.clone()));

    // Strangers have a server of their own, whose buffers are as small as a join.
    let for_strangers = Box::pin(
        Server::builder()
            .timeout(listener::STRANGER_STAYS)
            .max_concurrent_streams(STRANGER_STREAMS)
            .initial_stream_window_size(STRANGER_WINDOW_BYTES)
            .initial_connection_window_size(u32::from(u16::MAX))
            .http2_max_header_list_size(STRANGER_HEADER_BYTES)
            .http2_max_pending_accept_reset_streams(Some(STRANGER_RESETS))
            .add_service(
                SchedulerServer::new(service.clone()).max_decoding_message_size(MAX_JOIN_BYTES),
            )
            .add_service(
                AuthorityServer::new(service.clone()).max_decoding_message_size(MAX_JOIN_BYTES),
            )
            .serve_with_incoming_shutdown(
                ReceiverStream::new(incoming_strangers),
                shutdown.clone().cancelled_owned(),
            ),
    );
    let for_members = Box::pin(
        Server::builder()
            .http2_keepalive_interval(Some(KEEPALIVE))
            .http2_keepalive_timeout(Some(KEEPALIVE))
            .max_concurrent_streams(STREAMS_PER_CONNECTION)
            .http2_max_header_list_size(MAX_HEADER_BYTES)
            .add_service(
                SchedulerServer::new(service.clone()).max_decoding_message_size(MAX_MESSAGE_BYTES),
            )
            .add_service(AuthorityServer::new(service).max_decoding_message_size(MAX_JOIN_BYTES))
            .serve_with_incoming_shutdown(
                ReceiverStream::new(incoming_members),
                shutdown.clone().cancelled_owned(),
            ),
    );
    let server = async { tokio::try_join!(for_members, for_strangers) };
    tokio::pin!(server);
    tokio::select! {
        ended = &mut server => {
            ended?;
            return if shutdown.is_cancelled() { Ok(()) } else { Err(SchedulerError::Ended("the gRPC server")) };
        }
        _ = driver_task, if !shutdown.is_cancelled() => {}
        () = shutdown.cancelled() => {}
    }
    if !shutdown.is_cancelled() {
        return Err(SchedulerError::Ended("the scheduler's driver"));
    }
    if timeout(DRAIN, server).await.is_err() {
        warn!("some connections did not end in time");
    }
    tasks.shutdown().await;
    Ok(())
}

/// The parts that a scheduler has before it serves.
struct Start {
    identity: Identity,
    authority: Option<Arc<Authority>>,
    cluster: String,
    /// The member list that the cluster gave when we joined it.
    members: Vec<Member>,
}

async fn start(config: &SchedulerConfig) -> Result<Start, SchedulerError> {
    let dir = config.data_dir.join(IDENTITY_DIR);
    let loaded = Identity::load(&dir);
    let authority = match Authority::open(&config.data_dir, config.certificate_life)? {
        None if matches!(loaded, Ok(None)) && config.join.is_none() => Some(
            Authority::open_or_create(&config.data_dir, &config.cluster, config.certificate_life)?,
        ),
        authority => authority,
    };
    if let Some(authority) = authority {
        // With the authority at hand a damaged identity is replaced.
        let saved = loaded.unwrap_or_else(|error| {
            warn!(dir = %dir.display(), %error, "the scheduler's identity is damaged: the authority makes a new one");
            None
        });
        let saved = saved.filter(|identity| identity.authority() == authority.certificate());
        let identity = match saved {
            Some(identity) => identity,
            None => {
                let identity = authority.identity(Role::Scheduler)?;
                identity.save(&dir)?;
                identity
            }
        };
        let cluster = authority.cluster().to_owned();
        let start = Start {
            identity,
            authority: Some(Arc::new(authority)),
            cluster,
            members: Vec::new(),
        };
        renew_here(&start.identity, start.authority.as_deref(), &dir)?;
        if let Some(authority) = &start.authority {
            start.identity.removed().add(authority.removed()?);
        }
        return Ok(start);
    }
    if let Some(identity) = loaded? {
        return Ok(Start {
            identity,
            authority: None,
            cluster: config.cluster.clone(),
            members: Vec::new(),
        });
    }
    let Some((address, token)) = &config.join else {
        return Err(SchedulerError::Ended("the start"));
    };
    let (identity, members, cluster) =
        join::join(address, token, &config.name, &Identity::request()?).await?;
    if identity.role() != Role::Scheduler {
        return Err(SchedulerError::WrongRole(identity.role()));
    }
    identity.save(&dir)?;
    Ok(Start {
        identity,
        authority: None,
        cluster,
        members,
    })
}

/// Renews our own certificate with our own authority, when it is time. `false`: there is none, or it is not time.
fn renew_here(
    identity: &Identity,
    authority: Option<&Authority>,
    dir: &std::path::Path,
) -> Result<bool, SchedulerError> {
    let now = SystemTime::now();
    let Some(authority) = authority.filter(|_| identity.renew_at() <= now) else {
        return Ok(false);
    };
    let request = identity.renewal_request()?;
    match authority.renew((identity.peer_id(), Role::Scheduler), &request, now) {
        Ok(certificate) => identity.renew(certificate)?,
        Err(refusal) => return Err(IdentityError::Unusable(refusal.to_string()).into()),
    }
    identity.save(dir)?;
    Ok(true)
}

/// How the member list names us.
fn ourselves(config: &SchedulerConfig, identity: &Identity) -> Member {
    // Bound to all interfaces, it is the host's own address that others need.
    let bound = listener::addresses(&config.listeners)
        .into_iter()
        .map(hawker_network::address::advertised);
    let addresses = if config.advertise.is_empty() {
        bound.collect()
    } else {
        config.advertise.clone()
    };
    Member {
        peer: identity.peer_id(),
        name: config.name.clone(),
        addresses,
        role: Role::Scheduler,
        zone: String::new(),
    }
}

fn addresses_of_others<'a>(
    identity: &'a Identity,
    members: impl Iterator<Item = &'a Member>,
) -> impl Iterator<Item = String> {
    members
        .filter(|member| member.role == Role::Scheduler && member.peer != identity.peer_id())
        .filter_map(|member| member.addresses.first().cloned())
        .collect::<Vec<_>>()
        .into_iter()
}

/// Tells the driver of members that `hawker member rm` removed.
async fn watch_removed(
    authority: Arc<Authority>,
    driver: driver::Handle,
    shutdown: CancellationToken,
) {
    let (mut changed_at, mut read_at) = (None, None::<Instant>);
    loop {
        let looked = Arc::clone(&authority);
        let now_changed_at = tokio::task::spawn_blocking(move || looked.removed_changed_at()).await;
        let Ok(now_changed_at) = now_changed_at else {
            return;
        };
        if now_changed_at != changed_at || read_at.is_none_or(|at| at.elapsed() >= REMOVED_READ) {
            (changed_at, read_at) = (now_changed_at, Some(Instant::now()));
            let read = Arc::clone(&authority);
            match tokio::task::spawn_blocking(move || read.removed()).await {
                Ok(Ok(ids)) => drop(driver.send(driver::Event::Removed(ids)).await),
                Ok(Err(error)) => warn!(%error, "the list of removed members cannot be read"),
                Err(_) => return,
            }
        }
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = sleep(REMOVED_LOOK) => {}
        }
    }
}

/// Renews our certificate and sweeps old tokens.
struct Housekeeping {
    identity: Identity,
    authority: Option<Arc<Authority>>,
    dir: PathBuf,
    service: Service,
}

impl Housekeeping {
    async fn run(self, shutdown: CancellationToken) {
        loop {
            if let Err(error) = self.once().await {
                warn!(%error, "housekeeping failed; it is tried again in a few minutes");
            }
            let until_renewal = self
                .identity
                .renew_at()
                .duration_since(SystemTime::now())
                .unwrap_or_default();
            let wait = HOUSEKEEPING.min(until_renewal.max(Duration::from_secs(1)));
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = sleep(wait) => {}
            }
        }
    }

    async fn once(&self) -> Result<(), SchedulerError> {
        if let Some(authority) = &self.authority {
            authority.sweep(SystemTime::now())?;
            if renew_here(&self.identity, Some(authority), &self.dir)? {
                info!("our own certificate was renewed");
            }
        } else if self.identity.renew_at() <= SystemTime::now() {
            self.renew_elsewhere().await?;
        }
        Ok(())
    }

    /// Asks the other schedulers in turn, until one has the authority.
    async fn renew_elsewhere(&self) -> Result<(), SchedulerError> {
        let members = self.service.driver.list().await.unwrap_or_default();
        let mut last = JoinError::NoAuthority(
            "no other scheduler is known that could renew our certificate".into(),
        );
        for address in addresses_of_others(&self.identity, members.iter()) {
            match join::renew(&address, &self.identity).await {
                Ok(()) => {
                    self.identity.save(&self.dir)?;
                    info!(address, "our own certificate was renewed");
                    return Ok(());
                }
                Err(error) => last = error,
            }
        }
        Err(last.into())
    }
}

/// Binds what members connect to, with room for a burst of them.
pub async fn bind(addresses: &[std::net::SocketAddr]) -> io::Result<Vec<TcpListener>> {
    let mut listeners = Vec::with_capacity(addresses.len());
    for address in addresses {
        let listener = TcpListener::bind(address).await;
        listeners.push(
            listener
                .map_err(|error| io::Error::new(error.kind(), format!("{address}: {error}")))?,
        );
    }
    Ok(listeners)
}
