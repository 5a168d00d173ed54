//! One task that owns the swarm: streams' messages go in, what the swarm decides goes out to the streams.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use hawker_api::convert::{self, Member};
use hawker_api::v1;
use hawker_api::v1::to_peer::Event as Say;
use hawker_core::Time;
use hawker_core::application::Applications;
use hawker_core::message::Role;
use hawker_core::piece::PeerId;
use hawker_core::place::Place;
use hawker_core::share::Share;
use hawker_core::swarm::{Guilt, Input, Output, Registration, Swarm};
use rand::SeedableRng;
use rand::rngs::StdRng;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tracing::{debug, info};

use crate::membership::{LISTED_AFTER, Membership};
use crate::{Isolation, Numbers};

/// Messages from all streams that wait for the driver. Streams wait for room: a flood slows the flooder.
const QUEUE: usize = 4096;
/// Messages that wait for one peer to read them. A peer that lags further behind loses its stream, and starts afresh.
pub(crate) const STREAM_QUEUE: usize = 1024;
/// How often what applications have is counted anew, for people.
const COUNTED_EVERY: Duration = Duration::from_secs(1);
/// How long changes of the member list are gathered.
const NEWS_DELAY: Duration = Duration::from_millis(100);

/// What a stream carries to a peer.
pub(crate) type Outgoing = mpsc::Sender<Result<v1::ToPeer, Status>>;

/// A peer's stream, from the driver's side.
pub(crate) struct Stream {
    /// Told apart from an earlier stream of the same peer.
    pub(crate) id: u64,
    pub(crate) outgoing: Outgoing,
    /// Cancelled when the driver is done with it.
    pub(crate) over: CancellationToken,
}

/// What happens to the driver.
pub(crate) enum Event {
    /// A stream has begun.
    Opened { member: Member, registration: Registration, stream: Stream },
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

/// Where the events go.
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

pub(crate) struct Driver {
    swarm: Swarm,
    rng: StdRng,
    started: Instant,
    membership: Membership,
    streams: BTreeMap<PeerId, (Stream, Instant)>,
    /// Schedulers to which we have a stream ourselves.
    linked: BTreeSet<PeerId>,
    cluster: String,
    /// What the configuration says, and what of it counts.
    configured: Arc<ArcSwap<Applications>>,
    applications: Arc<Applications>,
    counted: Instant,
    numbers: Arc<Numbers>,
    news_at: Option<Instant>,
}

impl Driver {
    /// Seeds that were there before this process started are waited for.
    pub(crate) fn new(
        membership: Membership,
        cluster: String,
        configured: Arc<ArcSwap<Applications>>,
        numbers: Arc<Numbers>,
    ) -> Self {
        let mut driver = Self {
            swarm: Swarm::new(Time::default()),
            rng: StdRng::from_rng(&mut rand::rng()),
            started: Instant::now(),
            membership,
            streams: BTreeMap::new(),
            linked: BTreeSet::new(),
            cluster,
            configured,
            applications: Arc::default(),
            counted: Instant::now(),
            numbers,
            news_at: Some(Instant::now()),
        };
        for seed in driver.membership.list().into_iter().filter(|member| member.role == Role::Seed) {
            let registration = Registration {
                peer: seed.peer,
                role: Role::Seed,
                place: Place { zone: seed.zone.into(), ..Place::default() },
                upload_slots: 1,
                upload_rate_bytes: 0,
                reads_origins: true,
            };
            driver.swarm_input(Input::Expected(registration, LISTED_AFTER));
        }
        driver
    }

    /// Starts the driver's task; it ends with `shutdown`.
    pub(crate) fn start(mut self, shutdown: CancellationToken) -> (Handle, tokio::task::JoinHandle<()>) {
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
            self.streams.values().for_each(|(stream, _)| stream.over.cancel());
        });
        (Handle(sender), task)
    }

    fn now(&self) -> Time {
        Time(self.started.elapsed())
    }

    fn deadline(&self) -> Instant {
        let swarm = self.swarm.deadline().map(|deadline| self.started + deadline.0);
        let soon = Instant::now() + Duration::from_secs(1);
        [swarm, self.news_at].into_iter().flatten().fold(soon, Instant::min)
    }

    fn apply(&mut self, event: Event) {
        match event {
            Event::Opened { member, registration, stream } => self.opened(member, registration, stream),
            Event::Closed { peer, stream } => {
                if self.streams.get(&peer).is_some_and(|(current, _)| current.id == stream) {
                    self.close(peer, None);
                }
            }
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
            // Whoever asked may have gone away meanwhile.
            Event::List(answer) => drop(answer.send(self.membership.list())),
            Event::States(answer) => drop(answer.send(self.states())),
        }
    }

    fn opened(&mut self, member: Member, registration: Registration, stream: Stream) {
        let peer = member.peer;
        if let Some((old, _)) = self.streams.remove(&peer) {
            // Not a departure: the peer is here.
            let _ = old.outgoing.try_send(Err(Status::aborted("the same member has opened a new stream")));
            old.over.cancel();
        }
        info!(%peer, name = member.name, role = %member.role, "a member is here");
        self.membership.arrived(member);
        self.streams.insert(peer, (stream, Instant::now()));
        self.tell_news_soon();
        let welcome = v1::Welcome {
            version: Some(hawker_api::VERSION),
            cluster: self.cluster.clone(),
            members: Some(convert::member_list(&self.membership.list())),
            zone: Some(registration.place.zone.to_string()),
        };
        self.say(peer, Say::Welcome(welcome));
        self.say(peer, Say::Applications(convert::applications(&self.applications)));
        let isolated = self.swarm.isolated(self.now());
        if !isolated.is_empty() {
            self.say(peer, self.isolated_list(&isolated));
        }
        self.swarm_input(Input::Joined(registration));
    }

    fn close(&mut self, peer: PeerId, why: Option<Status>) {
        let Some((stream, _)) = self.streams.remove(&peer) else { return };
        if let Some(why) = why {
            let _ = stream.outgoing.try_send(Err(why));
        }
        stream.over.cancel();
        info!(%peer, "a member's stream is over");
        self.departed(peer);
        self.swarm_input(Input::Left(peer));
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
        self.numbers.peers.store(self.swarm.peer_count() as u64, Relaxed);
        self.numbers.tasks.store(self.swarm.task_count() as u64, Relaxed);
        self.numbers.streams.store(self.streams.len() as u64, Relaxed);
    }

    /// Takes over what SIGHUP has changed, and tells everybody.
    fn follow_configuration(&mut self) {
        let configured = self.configured.load_full();
        if !Arc::ptr_eq(&configured, &self.applications) {
            let is_new = *configured != *self.applications;
            self.applications = Arc::clone(&configured);
            self.swarm.applications(configured);
            if is_new {
                self.say_all(&Say::Applications(convert::applications(&self.applications)));
            }
        }
        if self.counted.elapsed() >= COUNTED_EVERY {
            self.counted = Instant::now();
            *self.numbers.applications.lock().unwrap_or_else(PoisonError::into_inner) =
                self.swarm.application_elections();
        }
    }

    fn carry_out(&mut self, output: Output) {
        match output {
            Output::Parents { to, task, parents, issuer, fetch_from_origin, spread, share, later } => {
                debug!(%to, %task, parents = parents.len(), ?issuer, fetch_from_origin, "parents");
                let parents = v1::Parents {
                    task: task.to_string(),
                    parents: parents.into_iter().filter_map(|peer| self.membership.wire(peer)).collect(),
                    issuer: issuer.map(|peer| peer.0.to_vec()).unwrap_or_default(),
                    fetch_from_origin,
                    spread,
                    share: (share != Share::ALL).then(|| share.bits()),
                    later,
                };
                self.say(to, Say::Parents(parents));
            }
            Output::Isolated(isolated) => {
                info!(?isolated, "the isolated members have changed");
                self.numbers.isolated.store(isolated.len() as u64, Relaxed);
                for (guilt, number) in [
                    (Guilt::WrongBytes, &self.numbers.isolated_for_wrong_bytes),
                    (Guilt::Stalled, &self.numbers.isolated_for_stalls),
                    (Guilt::Contradiction, &self.numbers.isolated_for_contradictions),
                ] {
                    number.store(self.swarm.isolations(guilt), Relaxed);
                }
                *self.numbers.isolations.lock().unwrap_or_else(PoisonError::into_inner) =
                    self.isolations(&isolated);
                self.say_all(&self.isolated_list(&isolated));
            }
        }
    }

    /// Why these are isolated, and for how long.
    fn isolations(&self, peers: &[PeerId]) -> Vec<Isolation> {
        let now = self.now();
        let isolation = |peer: &PeerId| {
            let (guilt, left) = self.swarm.peer_state(now, *peer).isolation?;
            let name = self.membership.wire(*peer).map(|member| member.name).unwrap_or_default();
            Some(Isolation { peer: *peer, name, guilt, until: Instant::now() + left })
        };
        peers.iter().filter_map(isolation).collect()
    }

    fn isolated_list(&self, peers: &[PeerId]) -> Say {
        let said = |isolation: Isolation| v1::Isolation {
            peer_id: isolation.peer.0.to_vec(),
            why: isolation.guilt.to_string(),
            for_s: isolation.until.saturating_duration_since(Instant::now()).as_secs(),
        };
        Say::Isolated(v1::Isolated { isolations: self.isolations(peers).into_iter().map(said).collect() })
    }

    fn say_all(&mut self, say: &Say) {
        for peer in self.streams.keys().copied().collect::<Vec<_>>() {
            self.say(peer, say.clone());
        }
    }

    fn say(&mut self, peer: PeerId, say: Say) {
        let Some((stream, _)) = self.streams.get(&peer) else { return };
        match stream.outgoing.try_send(Ok(v1::ToPeer { event: Some(say) })) {
            Ok(()) => {
                self.numbers.sent.fetch_add(1, Relaxed);
            }
            Err(mpsc::error::TrySendError::Full(_)) => {
                self.numbers.dropped.fetch_add(1, Relaxed);
                self.close(
                    peer,
                    Some(Status::resource_exhausted("this member reads too slowly; connect again")),
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
            let since = self.streams.get(&member.peer).map(|(_, since)| *since);
            // Our own stream is this process.
            let since =
                since.or_else(|| (member.role == Role::Scheduler && connected).then_some(self.started));
            v1::MemberState {
                member: Some(convert::member(member)),
                isolated: state.isolation.is_some(),
                isolated_for: state.isolation.map(|(guilt, _)| guilt.to_string()).unwrap_or_default(),
                isolated_for_s: state.isolation.map_or(0, |(_, left)| left.as_secs()),
                tasks: u32::try_from(state.tasks).unwrap_or(u32::MAX),
                served_bytes: state.served_bytes,
                connected_s: since.map_or(0, |since| since.elapsed().as_secs()),
                suspicion: (state.suspicion * 100.0).round() as u32,
            }
        };
        self.membership.all().map(state).collect()
    }
}
