//! One stream after another to each scheduler.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hawker_api::convert::{self, ConvertError};
use hawker_api::v1;
use hawker_api::v1::from_peer::Event as Say;
use hawker_api::v1::scheduler_client::SchedulerClient;
use hawker_api::v1::to_peer::Event as Said;
use hawker_core::message::Role;
use hawker_core::piece::PeerId;
use hawker_core::share::Share;
use hawker_core::swarm::ISOLATION;
use hawker_identity::join::{self, Connection};
use hawker_identity::member_file;
use rand::RngExt;
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tracing::{info, warn};

use super::outbox::{Announcement, Answer};
use super::{Holding, Isolation, Member, Shared, TrackerEvent};
use hawker_lanes::{self as lanes, Lane};

/// Waits between tries grow from the first to the last, each doubled and then changed at random by up to a half: after a
/// scheduler's restart not all come at once.
const FIRST_WAIT: Duration = Duration::from_millis(200);
const LAST_WAIT: Duration = Duration::from_secs(15);
/// A stream that lasted this long was a good one: the next try comes soon.
const GOOD_STREAM: Duration = Duration::from_secs(10);
/// To open a stream, to hand a message to it, to hand an event to the node.
const OPEN_TIMEOUT: Duration = Duration::from_secs(10);
const SAY_TIMEOUT: Duration = Duration::from_secs(10);
const EVENT_TIMEOUT: Duration = Duration::from_secs(30);
/// Between two messages with holdings and reports.
const NEWS_INTERVAL: Duration = Duration::from_secs(1);
/// Between two documents of one scheduler.
const CONFIGURATION_INTERVAL: Duration = Duration::from_secs(1);
/// Messages on their way into a stream.
const STREAM_QUEUE: usize = 32;
/// Holdings in one message: about half a megabyte.
const HOLDINGS_PER_MESSAGE: usize = 4096;
/// Schedulers kept connected at most.
const MAX_SCHEDULERS: usize = 32;
/// How often the list of schedulers is compared with the streams.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// The addresses of a scheduler: one that the configuration names has one address, a member several.
type Target = Vec<String>;

/// Sends the member list from the disk, then keeps a stream to each scheduler that is known.
pub(super) async fn keep_all(shared: Arc<Shared>) {
    let file = &shared.config.members_file;
    let saved = member_file::load(file).unwrap_or_else(|error| {
        warn!(file = %file.display(), %error, "the member list cannot be read; it comes again from a scheduler");
        Vec::new()
    });
    shared.outboxes().heard_members(None, saved.clone());
    tell(&shared, TrackerEvent::Members(saved)).await;
    let mut running = JoinSet::new();
    let mut targets = BTreeSet::new();
    loop {
        while let Some(Ok(ended)) = running.try_join_next() {
            targets.remove(&ended);
        }
        for target in wanted(&shared) {
            if targets.len() < MAX_SCHEDULERS && targets.insert(target.clone()) {
                running.spawn(keep_one(Arc::clone(&shared), target));
            }
        }
        sleep(LOOK_INTERVAL).await;
    }
}

/// All schedulers, from the configuration and from the member list.
fn wanted(shared: &Shared) -> BTreeSet<Target> {
    let named = shared
        .config
        .schedulers
        .iter()
        .map(|address| vec![address.clone()]);
    let members = shared.outboxes().members();
    let listed = members
        .into_iter()
        .filter(|member| member.role == Role::Scheduler && !member.addresses.is_empty());
    named.chain(listed.map(|member| member.addresses)).collect()
}

/// Stream after stream to one scheduler, as long as it is known.
async fn keep_one(shared: Arc<Shared>, target: Target) -> Target {
    let mut wait = FIRST_WAIT;
    while wanted(&shared).contains(&target) {
        let started = Instant::now();
        match connect(&shared, &target).await {
            Ok((address, connection)) => {
                let scheduler = connection.peer;
                let opened = shared.outboxes().open(scheduler, &address);
                if let Some(wake) = opened {
                    let begun = Instant::now();
                    let ended = Session {
                        shared: &shared,
                        scheduler,
                        target: &target,
                        address: &address,
                    }
                    .run(connection, &wake)
                    .await;
                    shared.outboxes().close(scheduler);
                    let reason = ended
                        .err()
                        .unwrap_or_else(|| "it ended the stream".to_owned());
                    info!(
                        address,
                        reason,
                        lasted_s = begun.elapsed().as_secs(),
                        "a scheduler's stream is over"
                    );
                    shared.note_problem(&target, &reason);
                } else {
                    // Another address of a scheduler that has a stream: this one is for later.
                    drop(connection);
                    while shared.outboxes().is_connected(scheduler) {
                        sleep(LOOK_INTERVAL).await;
                    }
                }
            }
            Err(error) => shared.note_problem(&target, &error),
        }
        if started.elapsed() >= GOOD_STREAM {
            wait = FIRST_WAIT;
        }
        let jittered = wait.mul_f64(rand::rng().random_range(0.5..1.5));
        sleep(jittered).await;
        wait = (wait * 2).min(LAST_WAIT);
    }
    shared.problems().remove(&target);
    target
}

/// Tries the addresses in turn; names are resolved anew.
async fn connect(shared: &Shared, target: &Target) -> Result<(String, Connection), String> {
    let mut last = "no address".to_owned();
    for address in target {
        match join::connect(address, &shared.config.identity).await {
            Ok(connection) => return Ok((address.clone(), connection)),
            Err(error) => last = error.to_string(),
        }
    }
    Err(last)
}

/// Hands an event to the node. A node that takes none for so long has worse troubles: the event is dropped.
async fn tell(shared: &Shared, event: TrackerEvent) {
    if shared
        .config
        .events
        .send_timeout(event, EVENT_TIMEOUT)
        .await
        .is_err()
    {
        warn!("the node does not take what a scheduler says");
    }
}

/// One stream to one scheduler.
struct Session<'a> {
    shared: &'a Shared,
    scheduler: PeerId,
    target: &'a [String],
    address: &'a str,
}

impl Session<'_> {
    /// Runs the stream to its end, which is an error's text or the scheduler's wish.
    async fn run(&self, connection: Connection, wake: &Notify) -> Result<(), String> {
        let (say, outgoing) = mpsc::channel(STREAM_QUEUE);
        self.say(&say, Say::Register(self.register())).await?;
        let mut client = SchedulerClient::new(connection.channel);
        let opened = timeout(OPEN_TIMEOUT, client.track(ReceiverStream::new(outgoing))).await;
        let opened = opened
            .map_err(|_| "no answer in time")?
            .map_err(|status| status.message().to_owned())?;
        let mut incoming = opened.into_inner();
        info!(address = self.address, scheduler = %self.scheduler, "connected to a scheduler");
        self.shared.problems().remove(self.target);
        // Holdings come before questions: the election depends on them.
        self.say_news(&say).await?;
        let mut news_at = tokio::time::Instant::now() + NEWS_INTERVAL;
        let mut configured_at: Option<tokio::time::Instant> = None;
        loop {
            if self
                .shared
                .config
                .identity
                .removed()
                .contains(self.scheduler)
            {
                return Err("this scheduler was removed from the cluster".to_owned());
            }
            self.say_questions(&say).await?;
            let has_news = self.shared.outboxes().has_news(self.scheduler);
            tokio::select! {
                message = incoming.message() => match message {
                    Ok(Some(v1::ToPeer { event: Some(Said::Configuration(pushed)) })) => {
                        // Each document costs a write to the disk: one that floods waits, with all that comes after it.
                        if let Some(at) = configured_at {
                            tokio::time::sleep_until(at + CONFIGURATION_INTERVAL).await;
                        }
                        configured_at = Some(tokio::time::Instant::now());
                        let configured = self.on_configuration(pushed).await;
                        self.say(&say, Say::Configured(configured)).await?;
                    }
                    Ok(Some(message)) => self.heard(message).await?,
                    Ok(None) => return Ok(()),
                    Err(status) => return Err(status.message().to_owned()),
                },
                () = wake.notified() => {}
                () = tokio::time::sleep_until(news_at), if has_news => {
                    self.say_news(&say).await?;
                    news_at = tokio::time::Instant::now() + NEWS_INTERVAL;
                }
            }
        }
    }

    fn register(&self) -> v1::Register {
        let config = &self.shared.config;
        let capacity = (config.capacity)();
        v1::Register {
            version: Some(hawker_api::VERSION),
            name: config.name.clone(),
            addresses: config.addresses.clone(),
            zone: config.place.zone.to_string(),
            rack: config.place.rack.to_string(),
            upload_slots: capacity.upload_slots,
            upload_rate_bytes: capacity.upload_rate_bytes,
            reads_origins: true,
        }
    }

    async fn say(&self, to: &mpsc::Sender<v1::FromPeer>, event: Say) -> Result<(), String> {
        let sent = to
            .send_timeout(v1::FromPeer { event: Some(event) }, SAY_TIMEOUT)
            .await;
        sent.map_err(|_| "it does not take what we say".to_owned())
    }

    async fn say_questions(&self, to: &mpsc::Sender<v1::FromPeer>) -> Result<(), String> {
        let questions = self.shared.outboxes().take_questions(self.scheduler);
        for question in questions {
            self.say(to, question).await?;
        }
        Ok(())
    }

    async fn say_news(&self, to: &mpsc::Sender<v1::FromPeer>) -> Result<(), String> {
        let (announcement, reports) = self.shared.outboxes().take_news(self.scheduler);
        let (mut replaces_all, holdings) = match announcement {
            Announcement::All => (true, (self.shared.config.holdings)()),
            Announcement::Changes(changes) => (false, changes),
        };
        if replaces_all && holdings.is_empty() {
            self.say(
                to,
                Say::Holdings(v1::Holdings {
                    replaces_all,
                    holdings: Vec::new(),
                }),
            )
            .await?;
        }
        for some in holdings.chunks(HOLDINGS_PER_MESSAGE) {
            let holdings = some.iter().map(holding).collect();
            self.say(
                to,
                Say::Holdings(v1::Holdings {
                    replaces_all,
                    holdings,
                }),
            )
            .await?;
            replaces_all = false;
        }
        if !reports.is_empty() {
            self.say(to, Say::Reports(v1::Reports { reports })).await?;
        }
        let contradictions = self.shared.outboxes().take_contradictions(self.scheduler);
        for contradiction in contradictions {
            self.say(to, Say::Contradiction(contradiction)).await?;
        }
        Ok(())
    }

    /// Passes on what the scheduler says. One that makes no sense ends the stream.
    async fn heard(&self, message: v1::ToPeer) -> Result<(), String> {
        match message.event {
            // A later version's word.
            None => Ok(()),
            Some(Said::Welcome(welcome)) => {
                convert::check_version(welcome.version).map_err(|error| error.to_string())?;
                if !welcome.refused_addresses.is_empty() {
                    let addresses = convert::from_addresses(welcome.refused_addresses);
                    warn!(
                        addresses = ?addresses.map_err(|error| error.to_string())?,
                        "the scheduler does not pass these addresses of this node on, since the node does not connect from \
                         there: other nodes cannot fetch from it. Correct --advertise, or start the scheduler with \
                         --allow-advertise"
                    );
                }
                self.heard_isolated(Vec::new()).await;
                // A scheduler of an earlier version says nothing.
                if let Some(zone) = welcome.zone {
                    let zone =
                        convert::from_label(zone, "zone").map_err(|error| error.to_string())?;
                    tell(self.shared, TrackerEvent::Zone(zone)).await;
                }
                self.heard_members(welcome.members.unwrap_or_default())
                    .await
            }
            Some(Said::Members(members)) => self.heard_members(members).await,
            Some(Said::Parents(parents)) => {
                let (spread, later) = (parents.spread, parents.later);
                let event = parents_event(parents).map_err(|error| error.to_string())?;
                if let TrackerEvent::Parents {
                    task,
                    issuer,
                    fetch_from_origin,
                    ..
                } = &event
                {
                    let said = Answer {
                        issuer: *issuer,
                        elected: *fetch_from_origin,
                        spread,
                    };
                    if !self
                        .shared
                        .outboxes()
                        .heard_parents(self.scheduler, task, said)
                    {
                        return Ok(());
                    }
                }
                let task = if let TrackerEvent::Parents { task, .. } = &event {
                    Some(*task)
                } else {
                    None
                };
                tell(self.shared, event).await;
                if let Some(task) = task.filter(|_| later) {
                    tell(self.shared, TrackerEvent::Postponed(task)).await;
                }
                Ok(())
            }
            // The caller answers it.
            Some(Said::Configuration(_)) => Ok(()),
            Some(Said::Removed(removed)) => {
                let ids = convert::from_removed(&removed).map_err(|error| error.to_string())?;
                self.heard_removed(ids).await;
                Ok(())
            }
            Some(Said::Isolated(isolated)) => {
                let isolations: Result<_, _> =
                    isolated.isolations.into_iter().map(isolation).collect();
                self.heard_isolated(isolations.map_err(|error| error.to_string())?)
                    .await;
                Ok(())
            }
        }
    }

    /// Applies pushed configuration, or refuses it and keeps what applies now.
    async fn on_configuration(&self, pushed: v1::Configuration) -> v1::Configured {
        let v1::Configuration {
            format,
            revision,
            document,
        } = pushed;
        let applied = match self.shared.config.push.clone() {
            _ if format != convert::DOCUMENT_FORMAT => Err(format!(
                "its form {format} is unknown here: upgrade this node"
            )),
            None => Err("this node takes no pushed configuration".to_owned()),
            Some(push) => {
                let (from, known) = (self.scheduler, self.shared.outboxes().schedulers());
                let applied =
                    lanes::run(Lane::Upkeep, move || push.push(from, &known, &document)).await;
                applied.unwrap_or_else(|| Err("this node is stopping".to_owned()))
            }
        };
        let error = applied.err().unwrap_or_default();
        if !error.is_empty() {
            warn!(scheduler = %self.scheduler, error, "pushed configuration is refused; everything stays as it was");
        }
        v1::Configured { revision, error }
    }

    async fn heard_isolated(&self, isolated: Vec<Isolation>) {
        let news = self
            .shared
            .outboxes()
            .heard_isolated(self.scheduler, isolated);
        if let Some(all) = news {
            tell(self.shared, TrackerEvent::Isolated(all)).await;
        }
    }

    /// From here on no handshake and no signature of these counts.
    async fn heard_removed(&self, ids: Vec<PeerId>) {
        let new = self.shared.config.identity.removed().add(ids);
        if new.is_empty() {
            return;
        }
        info!(removed = ?new, "members were removed from the cluster");
        let (identity, dir) = (
            self.shared.config.identity.clone(),
            self.shared.identity_dir(),
        );
        let saved = tokio::task::spawn_blocking(move || identity.save_removed(&dir)).await;
        if let Ok(Err(error)) = saved {
            warn!(%error, "the list of removed members cannot be saved; it comes again from a scheduler");
        }
        let members = self.shared.outboxes().removed(&new);
        if let Some(all) = members {
            save(self.shared, all.clone()).await;
            tell(self.shared, TrackerEvent::Members(all)).await;
        }
        tell(self.shared, TrackerEvent::Removed(new)).await;
    }

    async fn heard_members(&self, members: v1::MemberList) -> Result<(), String> {
        let mut members =
            convert::from_members(members.members).map_err(|error| error.to_string())?;
        members.retain(|member| !self.shared.config.identity.removed().contains(member.peer));
        let news = self
            .shared
            .outboxes()
            .heard_members(Some(self.scheduler), members);
        let Some(all) = news else { return Ok(()) };
        save(self.shared, all.clone()).await;
        tell(self.shared, TrackerEvent::Members(all)).await;
        Ok(())
    }
}

/// A list that cannot be saved is still good for today.
async fn save(shared: &Shared, members: Vec<Member>) {
    let file = shared.config.members_file.clone();
    let saved = lanes::run(Lane::Upkeep, move || member_file::save(&file, &members)).await;
    if let Some(Err(error)) = saved {
        warn!(file = %shared.config.members_file.display(), %error, "the member list cannot be saved");
    }
}

fn holding(holding: &Holding) -> v1::Holding {
    v1::Holding {
        task: holding.task.to_string(),
        size_bytes: holding.size_bytes,
        pieces: holding.pieces,
        complete: holding.complete,
    }
}

fn parents_event(parents: v1::Parents) -> Result<TrackerEvent, ConvertError> {
    let issuer = convert::from_optional_peer_id(&parents.issuer)?;
    Ok(TrackerEvent::Parents {
        task: convert::from_task(&parents.task)?,
        parents: convert::from_members(parents.parents)?,
        issuer,
        fetch_from_origin: parents.fetch_from_origin,
        share: parents.share.map_or(Share::ALL, Share::from_bits),
    })
}

fn isolation(said: v1::Isolation) -> Result<Isolation, ConvertError> {
    // However much longer it says: it is no longer than this until it is said again.
    let left = Duration::from_secs(said.for_s).min(ISOLATION);
    let (peer, why) = (
        convert::from_peer_id(&said.peer_id)?,
        convert::from_label(said.why, "why")?,
    );
    Ok(Isolation {
        peer,
        why,
        until: Instant::now() + left,
    })
}
