//! One task that owns the swarm: streams' messages go in, what the swarm decides goes out to the streams.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use hawker_api::convert::{self, Member};
use hawker_api::v1;
use hawker_api::v1::to_peer::Event as Say;
use hawker_core::Time;
use hawker_core::message::Role;
use hawker_core::piece::PeerId;
use hawker_core::place::Place;
use hawker_core::share::Share;
use hawker_core::swarm::{Input, IsolationReason, Output, Registration, ReportKind, Swarm};
use hawker_identity::member::Identity;
use hawker_oci::digest::{Algorithm, Digest};
use rand::SeedableRng;
use rand::rngs::StdRng;
use tokio::sync::{broadcast, mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tracing::{debug, info, warn};

use crate::door::MemberConnections;
use crate::membership::{LISTED_AFTER, Membership};
use crate::standing::{self, by_address};
use crate::{Isolation, LiveSettings, Numbers};

/// Messages from all streams that wait for the driver. Streams wait for room: a flood slows the flooder.
const QUEUE: usize = 4096;
/// Messages that wait for one peer to read them. A peer that lags further behind loses its stream, and starts afresh.
pub(crate) const STREAM_QUEUE: usize = 1024;
/// How often what applications have is counted anew, for people.
const COUNTED_EVERY: Duration = Duration::from_secs(1);
/// How long changes of the member list are gathered.
const NEWS_DELAY: Duration = Duration::from_millis(100);

/// The sending end of a peer's stream.
pub(crate) type Outgoing = mpsc::Sender<Result<v1::ToPeer, Status>>;

/// A peer's stream, from the driver's side.
pub(crate) struct Stream {
    /// Told apart from an earlier stream of the same peer.
    pub(crate) id: u64,
    pub(crate) outgoing: Outgoing,
    /// Cancelled when the driver is done with it.
    pub(crate) over: CancellationToken,
}

/// An event for the driver.
pub(crate) enum Event {
    /// A stream has begun.
    Opened {
        member: Member,
        registration: Registration,
        stream: Stream,
        refused_addresses: Vec<String>,
        /// The member leaves its place to the networks of the configuration.
        names_no_place: bool,
        certificate_until_s: u64,
    },
    /// A member has applied or refused a pushed document.
    Configured {
        peer: PeerId,
        revision: String,
        error: String,
    },
    /// These members are removed from the cluster; those that are known already count for nothing.
    Removed(Vec<PeerId>),
    /// A stream has ended.
    Closed { peer: PeerId, stream: u64 },
    /// Our stream to another scheduler has begun.
    Linked(Member),
    /// Our stream to another scheduler has ended.
    Unlinked(PeerId),
    /// A peer says something.
    Said(Input),
    /// Somebody asks for the member list.
    List(oneshot::Sender<Vec<Member>>),
    /// Somebody asks for everybody.
    States(oneshot::Sender<Vec<v1::MemberState>>),
}

/// The sending end of the driver's events.
#[derive(Clone)]
pub(crate) struct Handle(mpsc::Sender<Event>);

impl Handle {
    /// `false`: the driver is gone; the scheduler is stopping.
    pub(crate) async fn send(&self, event: Event) -> bool {
        self.0.send(event).await.is_ok()
    }

    pub(crate) async fn list(&self) -> Option<Vec<Member>> {
        let (answer, asked) = oneshot::channel();
        self.send(Event::List(answer)).await;
        asked.await.ok()
    }

    pub(crate) async fn states(&self) -> Option<Vec<v1::MemberState>> {
        let (answer, asked) = oneshot::channel();
        self.send(Event::States(answer)).await;
        asked.await.ok()
    }
}

/// An open stream.
struct Open {
    stream: Stream,
    since: Instant,
    certificate_until_s: u64,
    /// The place that the networks of the configuration gave to the member, and the addresses that it goes by; `None`: the
    /// member names its place.
    placed: Option<(Place, Vec<String>)>,
    /// The reason why the member refuses the pushed document; empty if it does not.
    configuration_error: String,
}

/// The parts that the driver works with.
pub(crate) struct DriverConfig {
    pub(crate) membership: Membership,
    pub(crate) cluster: String,
    pub(crate) live: Arc<ArcSwap<LiveSettings>>,
    pub(crate) numbers: Arc<Numbers>,
    pub(crate) identity: Identity,
    pub(crate) identity_dir: PathBuf,
    pub(crate) connections: MemberConnections,
    pub(crate) vouched: broadcast::Sender<v1::Report>,
}

pub(crate) struct Driver {
    swarm: Swarm,
    rng: StdRng,
    started: Instant,
    membership: Membership,
    streams: BTreeMap<PeerId, Open>,
    identity: Identity,
    /// The folder of the list of removed members.
    identity_dir: PathBuf,
    connections: MemberConnections,
    /// Accusations that this scheduler vouches for go to the links to the others.
    vouched: broadcast::Sender<v1::Report>,
    /// Schedulers to which we have a stream ourselves.
    linked: BTreeSet<PeerId>,
    cluster: String,
    /// The configuration, and the part of it that counts already.
    configured: Arc<ArcSwap<LiveSettings>>,
    live: Arc<LiveSettings>,
    /// The name of the pushed document.
    revision: String,
    counted: Instant,
    numbers: Arc<Numbers>,
    news_at: Option<Instant>,
}

impl Driver {
    /// Seeds that were there before this process started are waited for.
    pub(crate) fn new(config: DriverConfig) -> Self {
        let DriverConfig {
            membership,
            cluster,
            live: configured,
            numbers,
            ..
        } = config;
        let mut driver = Self {
            swarm: Swarm::new(Time::default()),
            rng: StdRng::from_rng(&mut rand::rng()),
            started: Instant::now(),
            membership,
            identity: config.identity,
            identity_dir: config.identity_dir,
            connections: config.connections,
            vouched: config.vouched,
            streams: BTreeMap::new(),
            linked: BTreeSet::new(),
            cluster,
            configured,
            live: Arc::default(),
            revision: String::new(),
            counted: Instant::now(),
            numbers,
            news_at: Some(Instant::now()),
        };
        for seed in driver
            .membership
            .list()
            .into_iter()
            .filter(|member| member.role == Role::Seed)
        {
            let registration = Registration {
                peer: seed.peer,
                role: Role::Seed,
                place: Place {
                    zone: seed.zone.into(),
                    ..Place::default()
                },
                upload_slots: 1,
                upload_rate_bytes: 0,
                reads_origins: true,
            };
            driver.swarm_input(Input::Expected(registration, LISTED_AFTER));
        }
        driver
    }

    /// Starts the driver's task; it ends with `shutdown`.
    pub(crate) fn start(
        mut self,
        shutdown: CancellationToken,
    ) -> (Handle, tokio::task::JoinHandle<()>) {
        let (sender, mut events) = mpsc::channel(QUEUE);
        let task = tokio::spawn(async move {
            loop {
                let deadline = self.deadline();
                tokio::select! {
                    () = shutdown.cancelled() => break,
                    event = events.recv() => match event {
                        Some(event) => self.apply(event),
                        None => break,
                    },
                    () = tokio::time::sleep_until(deadline.into()) => {}
                }
                self.work();
            }
            self.streams
                .values()
                .for_each(|open| open.stream.over.cancel());
        });
        (Handle(sender), task)
    }

    fn now(&self) -> Time {
        Time(self.started.elapsed())
    }

    fn deadline(&self) -> Instant {
        let swarm = self
            .swarm
            .deadline()
            .map(|deadline| self.started + deadline.0);
        let soon = Instant::now() + Duration::from_secs(1);
        [swarm, self.news_at]
            .into_iter()
            .flatten()
            .fold(soon, Instant::min)
    }

    fn apply(&mut self, event: Event) {
        match event {
            Event::Opened {
                member,
                registration,
                stream,
                refused_addresses,
                names_no_place,
                certificate_until_s,
            } => {
                let placed =
                    names_no_place.then(|| (registration.place.clone(), member.addresses.clone()));
                let (since, configuration_error) = (Instant::now(), String::new());
                let open = Open {
                    stream,
                    since,
                    certificate_until_s,
                    placed,
                    configuration_error,
                };
                self.opened(member, registration, open, refused_addresses);
            }
            Event::Configured {
                peer,
                revision,
                error,
            } => self.on_configured(peer, &revision, error),
            Event::Removed(ids) => self.removed(ids),
            Event::Closed { peer, stream } => {
                if self
                    .streams
                    .get(&peer)
                    .is_some_and(|open| open.stream.id == stream)
                {
                    self.close(peer, None);
                }
            }
            Event::Linked(member) if self.identity.removed().contains(member.peer) => {}
            Event::Linked(member) => {
                self.linked.insert(member.peer);
                self.membership.arrived(member);
                self.tell_news_soon();
            }
            Event::Unlinked(peer) => {
                self.linked.remove(&peer);
                self.departed(peer);
            }
            Event::Said(input) => {
                self.numbers.received.fetch_add(1, Relaxed);
                self.swarm_input(input);
            }
            // The caller may have gone away meanwhile.
            Event::List(answer) => drop(answer.send(self.membership.list())),
            Event::States(answer) => drop(answer.send(self.states())),
        }
    }

    fn opened(
        &mut self,
        member: Member,
        registration: Registration,
        open: Open,
        refused_addresses: Vec<String>,
    ) {
        let peer = member.peer;
        if self.identity.removed().contains(peer) {
            // Its connection is closing already.
            open.stream.over.cancel();
            return;
        }
        if let Some(old) = self.streams.remove(&peer) {
            // Not a departure: the peer is here.
            let old = old.stream;
            let _ = old.outgoing.try_send(Err(Status::aborted(
                "the same member has opened a new stream",
            )));
            old.over.cancel();
        }
        info!(%peer, name = member.name, role = %member.role, "a member is here");
        self.membership.arrived(member);
        self.streams.insert(peer, open);
        self.tell_news_soon();
        let welcome = v1::Welcome {
            version: Some(hawker_api::VERSION),
            cluster: self.cluster.clone(),
            members: Some(convert::member_list(&self.membership.list())),
            zone: Some(registration.place.zone.to_string()),
            refused_addresses,
        };
        self.say(peer, Say::Welcome(welcome));
        let removed = self.identity.removed().all();
        if !removed.is_empty() {
            self.say(peer, Say::Removed(convert::removed(&removed)));
        }
        self.say(peer, self.configuration());
        let isolated = self.swarm.isolated(self.now());
        if !isolated.is_empty() {
            self.say(peer, self.isolated_list(&isolated));
        }
        self.swarm_input(Input::Joined(registration));
    }

    fn close(&mut self, peer: PeerId, why: Option<Status>) {
        let Some(Open { stream, .. }) = self.streams.remove(&peer) else {
            return;
        };
        if let Some(why) = why {
            let _ = stream.outgoing.try_send(Err(why));
        }
        stream.over.cancel();
        info!(%peer, "a member's stream is over");
        self.count_refusals();
        self.departed(peer);
        self.swarm_input(Input::Left(peer));
    }

    /// Ends everything with members that were removed just now, and tells all others.
    fn removed(&mut self, ids: Vec<PeerId>) {
        // From here on the listener gives none of them a member's place.
        let new = self.identity.removed().add(ids);
        if new.is_empty() {
            return;
        }
        if let Err(error) = self.identity.save_removed(&self.identity_dir) {
            warn!(%error, "the list of removed members cannot be saved; it comes again from the authority");
        }
        for peer in new {
            info!(%peer, "a member was removed from the cluster");
            self.close(peer, Some(standing::removed()));
            self.connections.close_all(peer);
            self.membership.remove(peer);
            self.swarm_input(Input::Removed(peer));
        }
        let all = convert::removed(&self.identity.removed().all());
        self.say_all(&Say::Removed(all));
        self.tell_news_soon();
    }

    /// One stream with this member is over; another scheduler may have a second one.
    fn departed(&mut self, peer: PeerId) {
        if !self.linked.contains(&peer) && !self.streams.contains_key(&peer) {
            self.membership.departed(peer, Instant::now());
        }
    }

    fn swarm_input(&mut self, input: Input) {
        let now = self.now();
        self.swarm.handle(now, &mut self.rng, input);
    }

    /// Carries out what has been decided and what has come due.
    fn work(&mut self) {
        self.follow_configuration();
        let now = self.now();
        self.swarm.tick(now, &mut self.rng);
        while let Some(output) = self.swarm.poll() {
            self.carry_out(output);
        }
        let before = self.membership.all().count();
        self.membership.sweep(Instant::now());
        if self.membership.all().count() != before {
            self.tell_news_soon();
        }
        if self.news_at.is_some_and(|at| at <= Instant::now()) {
            self.news_at = None;
            if let Some(list) = self.membership.news() {
                self.say_all(&Say::Members(convert::member_list(&list)));
            }
        }
        self.numbers
            .peers
            .store(self.swarm.peer_count() as u64, Relaxed);
        self.numbers
            .tasks
            .store(self.swarm.task_count() as u64, Relaxed);
        self.numbers
            .streams
            .store(self.streams.len() as u64, Relaxed);
    }

    /// Takes over what SIGHUP has changed, and tells everybody.
    fn follow_configuration(&mut self) {
        let configured = self.configured.load_full();
        if !Arc::ptr_eq(&configured, &self.live) {
            let before = std::mem::replace(&mut self.live, Arc::clone(&configured));
            self.swarm
                .applications(Arc::clone(&configured.applications));
            if configured.document != before.document || self.revision.is_empty() {
                self.revision = revision(&configured.document);
                for open in self.streams.values_mut() {
                    open.configuration_error.clear();
                }
                self.count_refusals();
                self.say_all(&self.configuration());
            }
            if configured.networks != before.networks {
                self.place_anew();
            }
        }
        if self.counted.elapsed() >= COUNTED_EVERY {
            self.counted = Instant::now();
            *self
                .numbers
                .applications
                .lock()
                .unwrap_or_else(PoisonError::into_inner) = self.swarm.application_elections();
        }
    }

    fn configuration(&self) -> Say {
        Say::Configuration(v1::Configuration {
            format: convert::DOCUMENT_FORMAT,
            revision: self.revision.clone(),
            document: self.live.document.to_string(),
        })
    }

    /// Members whose place has changed with the networks lose their streams: they come back at once and stand there then.
    fn place_anew(&mut self) {
        let networks = &self.live.networks;
        let moved = |(peer, open): (&PeerId, &Open)| {
            let (place, addresses) = open.placed.as_ref()?;
            (by_address(networks, addresses).unwrap_or_default() != *place).then_some(*peer)
        };
        for peer in self.streams.iter().filter_map(moved).collect::<Vec<_>>() {
            self.close(
                peer,
                Some(Status::aborted(
                    "the cluster's networks have changed; connect again",
                )),
            );
        }
    }

    fn on_configured(&mut self, peer: PeerId, revision: &str, error: String) {
        let Some(open) = self.streams.get_mut(&peer) else {
            return;
        };
        // An answer to an older document says nothing about this one.
        if revision != self.revision || open.configuration_error == error {
            return;
        }
        if !error.is_empty() {
            let name = self
                .membership
                .wire(peer)
                .map(|member| member.name)
                .unwrap_or_default();
            warn!(%peer, name, error, "a member refuses the pushed configuration");
        }
        open.configuration_error = error;
        self.count_refusals();
    }

    fn count_refusals(&self) {
        let refusing = self
            .streams
            .iter()
            .filter(|(_, open)| !open.configuration_error.is_empty());
        let named = refusing.map(|(peer, open)| {
            let name = self
                .membership
                .wire(*peer)
                .map_or_else(|| peer.to_string(), |member| member.name);
            (name, open.configuration_error.clone())
        });
        *self
            .numbers
            .refusals
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = named.collect();
    }

    fn carry_out(&mut self, output: Output) {
        match output {
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
                debug!(%to, %task, parents = parents.len(), ?issuer, fetch_from_origin, "parents");
                let parents = v1::Parents {
                    task: task.to_string(),
                    parents: parents
                        .into_iter()
                        .filter_map(|peer| self.membership.wire(peer))
                        .collect(),
                    issuer: issuer.map(|peer| peer.0.to_vec()).unwrap_or_default(),
                    fetch_from_origin,
                    spread,
                    share: (share != Share::ALL).then(|| share.bits()),
                    later,
                };
                self.say(to, Say::Parents(parents));
            }
            Output::Vouched {
                reporter,
                peer,
                task,
                kind,
            } => {
                let report = v1::Report {
                    peer_id: peer.0.to_vec(),
                    task: task.to_string(),
                    kind: wire_kind(kind).into(),
                    bytes: 0,
                    reporter: reporter.0.to_vec(),
                };
                // Nobody listens where there is one scheduler.
                let _ = self.vouched.send(report);
            }
            Output::Isolated(isolated) => {
                info!(?isolated, "the isolated members have changed");
                self.numbers.isolated.store(isolated.len() as u64, Relaxed);
                for (reason, number) in [
                    (
                        IsolationReason::WrongBytes,
                        &self.numbers.isolated_for_wrong_bytes,
                    ),
                    (IsolationReason::Stalled, &self.numbers.isolated_for_stalls),
                    (
                        IsolationReason::Contradiction,
                        &self.numbers.isolated_for_contradictions,
                    ),
                ] {
                    number.store(self.swarm.isolations(reason), Relaxed);
                }
                *self
                    .numbers
                    .isolations
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner) = self.isolations(&isolated);
                self.say_all(&self.isolated_list(&isolated));
            }
        }
    }

    /// Why these are isolated, and for how long.
    fn isolations(&self, peers: &[PeerId]) -> Vec<Isolation> {
        let now = self.now();
        let isolation = |peer: &PeerId| {
            let (reason, left) = self.swarm.peer_state(now, *peer).isolation?;
            let name = self
                .membership
                .wire(*peer)
                .map(|member| member.name)
                .unwrap_or_default();
            Some(Isolation {
                peer: *peer,
                name,
                reason,
                until: Instant::now() + left,
            })
        };
        peers.iter().filter_map(isolation).collect()
    }

    fn isolated_list(&self, peers: &[PeerId]) -> Say {
        let said = |isolation: Isolation| v1::Isolation {
            peer_id: isolation.peer.0.to_vec(),
            why: isolation.reason.to_string(),
            for_s: isolation
                .until
                .saturating_duration_since(Instant::now())
                .as_secs(),
        };
        Say::Isolated(v1::Isolated {
            isolations: self.isolations(peers).into_iter().map(said).collect(),
        })
    }

    fn say_all(&mut self, say: &Say) {
        for peer in self.streams.keys().copied().collect::<Vec<_>>() {
            self.say(peer, say.clone());
        }
    }

    fn say(&mut self, peer: PeerId, say: Say) {
        let Some(Open { stream, .. }) = self.streams.get(&peer) else {
            return;
        };
        match stream
            .outgoing
            .try_send(Ok(v1::ToPeer { event: Some(say) }))
        {
            Ok(()) => {
                self.numbers.sent.fetch_add(1, Relaxed);
            }
            Err(mpsc::error::TrySendError::Full(_)) => {
                self.numbers.dropped.fetch_add(1, Relaxed);
                self.close(
                    peer,
                    Some(Status::resource_exhausted(
                        "this member reads too slowly; connect again",
                    )),
                );
            }
            // Its end will be reported by whoever reads it.
            Err(mpsc::error::TrySendError::Closed(_)) => {}
        }
    }

    fn tell_news_soon(&mut self) {
        self.news_at.get_or_insert(Instant::now() + NEWS_DELAY);
    }

    fn states(&self) -> Vec<v1::MemberState> {
        let now = self.now();
        let state = |(member, connected): (&Member, bool)| {
            let state = self.swarm.peer_state(now, member.peer);
            let open = self.streams.get(&member.peer);
            let since = open.map(|open| open.since);
            // Our own stream is this process.
            let since = since
                .or_else(|| (member.role == Role::Scheduler && connected).then_some(self.started));
            v1::MemberState {
                member: Some(convert::member(member)),
                isolated: state.isolation.is_some(),
                isolated_for: state
                    .isolation
                    .map(|(reason, _)| reason.to_string())
                    .unwrap_or_default(),
                isolated_for_s: state.isolation.map_or(0, |(_, left)| left.as_secs()),
                tasks: u32::try_from(state.tasks).unwrap_or(u32::MAX),
                served_bytes: state.served_bytes,
                connected_s: since.map_or(0, |since| since.elapsed().as_secs()),
                suspicion: (state.suspicion * 100.0).round() as u32,
                certificate_until_s: open.map_or(0, |open| open.certificate_until_s),
                configuration_error: open
                    .map(|open| open.configuration_error.clone())
                    .unwrap_or_default(),
            }
        };
        self.membership.all().map(state).collect()
    }
}

/// A short name of a document: the same for the same text.
fn revision(document: &str) -> String {
    let digest = Digest::of(Algorithm::Sha256, document.as_bytes()).to_string();
    digest
        .rsplit(':')
        .next()
        .unwrap_or_default()
        .chars()
        .take(12)
        .collect()
}

const fn wire_kind(kind: ReportKind) -> v1::report::Kind {
    match kind {
        ReportKind::WrongBytes => v1::report::Kind::WrongBytes,
        ReportKind::Stalled => v1::report::Kind::Stalled,
        ReportKind::NotHeld => v1::report::Kind::NotHeld,
        ReportKind::Failed => v1::report::Kind::Failed,
        ReportKind::Served(_) => v1::report::Kind::Served,
    }
}
