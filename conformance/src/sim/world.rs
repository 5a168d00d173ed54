//! All hosts, their scheduler and the origin: the events, and their effects.

use std::collections::BTreeMap;
use std::time::Duration;

use hawker_core::Time;
use hawker_core::message::{Message, Refusal, Role};
use hawker_core::node::{self, Child, Config, Named, Node, Opening, Output, Verdict};
use hawker_core::parents::Fault;
use hawker_core::piece::{PeerId, PieceIndex, PieceLayout};
use hawker_core::place::Place;
use hawker_core::right::Right;
use hawker_core::swarm::{self, Holding, Input, Registration, Swarm, Terms};
use hawker_oci::digest::Digest;
use hawker_oci::reference::Source;
use rand::rngs::StdRng;
use rand::seq::SliceRandom as _;
use rand::{RngExt as _, SeedableRng as _};
use rayon::prelude::*;

use super::content::{Blob, Keys, index_of, peer_id};
use super::event::{Calendar, Queue};
use super::host::{Content, DECIDES_WITHIN, Host, Letter, Local, ReportKey, Sending};
use super::link::{Link, Links};
use super::{Checks, DIAL_ROUND_TRIPS, Finish, Outcome, Progress, Scenario};

/// Counts for the scheduler are gathered for so long, as the daemon's tracker does.
const NEWS_EVERY: Duration = Duration::from_secs(1);

/// A zone's link to the outside, as a part of the sum of its hosts'.
const ZONE_LINK: f64 = 0.1;

/// Events between two looks at how far a run is.
const WATCHED_EVERY: u64 = 1 << 18;

/// Nodes that one thread takes at a time: the decisions of fewer are worked out sooner than another thread has begun.
const DECIDE_AT_LEAST: usize = 8;

/// Pieces on offer per reader: each node has one client a blob.
const READER: u64 = 1;

enum Event {
    /// A host's uplink has room.
    Pump(u32),
    /// A turn has left a host's uplink.
    Left {
        from: u32,
        to: u32,
        request: u32,
        blob: usize,
        piece: PieceIndex,
        bytes: u64,
        last: bool,
    },
    /// The last turn of a piece is there.
    Piece {
        to: u32,
        from: u32,
        request: u32,
        blob: usize,
        piece: PieceIndex,
    },
    /// Two hosts are connected.
    Connected(u32, u32),
    /// No connection led to the second.
    Unreached(u32, u32),
    /// The first notices that the second is gone.
    Lost(u32, u32),
    /// A piece is there from the origin.
    Origin {
        to: u32,
        stream: u64,
        blob: usize,
        piece: PieceIndex,
    },
    /// A peer said something to the scheduler.
    Said {
        life: u32,
        input: Input,
    },
    /// The scheduler said something to a peer.
    Told {
        life: u32,
        to: u32,
        output: swarm::Output,
    },
    /// The scheduler's deadline has come.
    Tick,
    /// A host tells the scheduler what it has gathered.
    News(u32),
    /// A host dies.
    Die(u32),
    SchedulerDown,
    SchedulerUp,
}

/// A zone's link to the outside.
struct Zone {
    up: Link,
    down: Link,
    /// From the origin, past the link.
    origin_bytes: u64,
}

pub(super) struct World<'a> {
    scenario: &'a Scenario,
    now: Time,
    queue: Queue<Event>,
    calendar: Calendar,
    rng: StdRng,
    blobs: Vec<Blob>,
    by_digest: BTreeMap<Digest, usize>,
    hosts: Vec<Host>,
    links: Vec<Links>,
    zones: Vec<Zone>,
    origin: Link,
    streams: u64,
    swarm: Option<Swarm>,
    /// The number of schedulers so far: messages to an earlier one are lost.
    life: u32,
    ticks_at: Option<Time>,
    scheduler_messages: u64,
    peer_messages: u64,
    wrong_pieces: u64,
    unfinished: u32,
    checks: Checks,
    trace: u64,
}

/// Mixes a word into a sum, as Fowler, Noll and Vo do, and spreads it.
fn mix(sum: u64, word: u64) -> u64 {
    (sum ^ word)
        .wrapping_mul(0x9e37_79b9_7f4a_7c15)
        .rotate_left(29)
}

impl<'a> World<'a> {
    pub(super) fn new(scenario: &'a Scenario) -> Self {
        let mut rng = StdRng::seed_from_u64(scenario.rng);
        let layers = scenario.layers.max(1);
        let blobs: Vec<Blob> = (0..layers)
            .map(|n| Blob::new(n, scenario.blob_bytes(), scenario.layout()))
            .collect();
        let (seeds, all) = (scenario.seed_peers, scenario.seed_peers + scenario.hosts);
        let zones = scenario.zones.max(1);
        let seeds_seen_from = |zone| {
            (0..seeds)
                .map(|seed| Named {
                    peer: peer_id(seed),
                    far: seed % zones != zone,
                })
                .collect()
        };
        let mut hosts: Vec<Host> = (0..all)
            .map(|index| {
                let role = if index < seeds {
                    Role::Seed
                } else {
                    Role::Peer
                };
                let config = Config {
                    me: peer_id(index),
                    role,
                    upload_slots: scenario.upload_slots,
                    in_flight_bytes: scenario.in_flight_bytes,
                    layout: scenario.layout(),
                };
                // Its own chance: its draws do not depend on the hosts that decide before it.
                let chance = StdRng::seed_from_u64(rng.random());
                let mut node = Node::new(config, Keys::new(index, seeds), chance);
                let now = Time::default();
                node.handle(now, node::Input::Seeds(seeds_seen_from(index % zones)));
                node.handle(now, node::Input::Scheduler(true));
                Host::new(node, &blobs)
            })
            .collect();
        let in_zone = |zone| (0..all).filter(|index| index % zones == zone).count() as f64;
        let zone_links = (0..zones)
            .map(|zone| scenario.rate * in_zone(zone) * ZONE_LINK)
            .map(|rate| Zone {
                up: Link::new(rate),
                down: Link::new(rate),
                origin_bytes: 0,
            })
            .collect();
        let by_digest = blobs
            .iter()
            .enumerate()
            .map(|(at, blob)| (blob.digest, at))
            .collect();
        afflict(scenario, &mut hosts, &mut rng);
        let links = (0..).zip(&hosts).map(|(index, host): (u32, &Host)| {
            let rate = scenario.rate
                * if host.slow {
                    scenario.faults.slow_rate
                } else {
                    1.0
                };
            Links {
                up: Link::new(rate),
                down: Link::new(rate),
                zone: index % zones,
            }
        });
        let links = links.collect();
        Self {
            scenario,
            now: Time::default(),
            queue: Queue::new(),
            calendar: Calendar::default(),
            rng,
            blobs,
            by_digest,
            hosts,
            links,
            zones: zone_links,
            origin: Link::new(scenario.origin_rate),
            streams: 0,
            swarm: Some(Swarm::new(Time::default())),
            life: 0,
            ticks_at: None,
            scheduler_messages: 0,
            peer_messages: 0,
            wrong_pieces: 0,
            unfinished: scenario.hosts,
            checks: Checks::default(),
            trace: 0,
        }
    }

    pub(super) fn run(mut self, watch: &mut (dyn FnMut(Progress) + Send)) -> Outcome {
        for index in 0..self.hosts.len() as u32 {
            self.register(index);
        }
        for index in self.scenario.seed_peers..self.hosts.len() as u32 {
            self.pull(index);
        }
        let faults = &self.scenario.faults;
        for at in &faults.scheduler_restarts {
            self.queue.put(Time(*at), Event::SchedulerDown);
            self.queue
                .put(Time(*at + faults.scheduler_away), Event::SchedulerUp);
        }
        self.schedule_deaths();
        let limit = Time(self.scenario.limit());
        let mut events: u64 = 0;
        while self.unfinished > 0 {
            let tick_at = self.calendar.next_at();
            if let Some((at, event)) = self.queue.take(tick_at.unwrap_or(limit).min(limit)) {
                self.now = at;
                self.happen(event);
            } else if let Some(at) = tick_at.filter(|at| *at <= limit)
                && let Some((tick, nodes)) = self.calendar.take()
            {
                self.now = at;
                self.look(tick, nodes);
            } else {
                break;
            }
            events += 1;
            if events.is_multiple_of(WATCHED_EVERY) {
                let pieces = self
                    .hosts
                    .iter()
                    .flat_map(|host| &host.blobs)
                    .map(|blob| &blob.verified);
                let (held, all) = pieces.fold((0, 0), |(held, all), set| {
                    (held + set.len(), all + set.count())
                });
                let done = f64::from(held) / f64::from(all.max(1));
                watch(Progress {
                    events,
                    at_s: self.now.0.as_secs_f64(),
                    done,
                    unfinished: self.unfinished,
                });
            }
        }
        self.outcome()
    }

    fn schedule_deaths(&mut self) {
        let dying = (self.scenario.faults.die * f64::from(self.scenario.hosts)).round() as usize;
        let mut all: Vec<u32> = (self.scenario.seed_peers..self.hosts.len() as u32).collect();
        all.shuffle(&mut self.rng);
        for host in all.into_iter().take(dying) {
            let at = self.scenario.bound_s() * self.rng.random_range(0.1..0.9);
            self.queue
                .put(Time(Duration::from_secs_f64(at)), Event::Die(host));
        }
    }

    fn outcome(mut self) -> Outcome {
        let scenario = self.scenario;
        let seeds = scenario.seed_peers as usize;
        let finish = |host: &Host| Finish {
            at_s: host
                .done_at()
                .filter(|_| !host.dead)
                .map(|at| at.0.as_secs_f64()),
            slow: host.slow,
            dead: host.dead,
        };
        for (index, host) in self
            .hosts
            .iter()
            .enumerate()
            .skip(seeds)
            .filter(|(_, host)| !host.dead)
        {
            self.checks.ended(index as u32, host.missing());
        }
        self.checks.origin(
            self.origin.bytes(),
            scenario.size_bytes,
            scenario.origin_copies_max,
        );
        let copies = |bytes: u64| bytes as f64 / scenario.size_bytes as f64;
        let lasted_s = self.now.0.as_secs_f64().max(f64::MIN_POSITIVE);
        let entered = |zone: &Zone| copies(zone.down.bytes() + zone.origin_bytes);
        Outcome {
            bound_s: scenario.bound_s(),
            finishes: self.hosts.iter().skip(seeds).map(finish).collect(),
            origin_copies: copies(self.origin.bytes()),
            seed_copies: copies(
                self.links
                    .iter()
                    .take(seeds)
                    .map(|links| links.up.bytes())
                    .sum(),
            ),
            zone_copies: self.zones.iter().map(entered).fold(0.0, f64::max),
            scheduler_messages_per_s: self.scheduler_messages as f64 / lasted_s,
            peer_messages_per_s: self.peer_messages as f64 / lasted_s / self.hosts.len() as f64,
            duplicates: doubled(&self.hosts, &self.blobs),
            wrong_pieces: self.wrong_pieces,
            events: self.queue.count(),
            lasted_s,
            trace: self.trace,
            checks: self.checks,
        }
    }

    // ---- events ---------------------------------------------------------------------------------------------------

    fn host(&mut self, index: u32) -> &mut Host {
        &mut self.hosts[index as usize]
    }

    fn zone(&self, index: u32) -> u32 {
        self.links[index as usize].zone
    }

    fn dead(&self, index: u32) -> bool {
        self.hosts[index as usize].dead
    }

    fn happen(&mut self, event: Event) {
        let now = self.now;
        match event {
            Event::Pump(index) => {
                if self.host(index).pumps_at == Some(now) {
                    self.host(index).pumps_at = None;
                    self.pump(index);
                }
            }
            Event::Left {
                from,
                to,
                request,
                blob,
                piece,
                bytes,
                last,
            } => {
                let there = self.arrival(from, to, bytes);
                if last {
                    self.queue.put(
                        there,
                        Event::Piece {
                            to,
                            from,
                            request,
                            blob,
                            piece,
                        },
                    );
                }
            }
            Event::Piece {
                to,
                from,
                request,
                blob,
                piece,
            } => self.piece(to, from, request, blob, piece),
            Event::Connected(a, b) => self.connect(a, b),
            Event::Unreached(index, peer) => {
                self.host(index)
                    .node
                    .handle(now, node::Input::DialFailed(peer_id(peer)));
                self.touch(index);
            }
            Event::Lost(index, peer) => {
                self.host(index)
                    .node
                    .handle(now, node::Input::PeerDown(peer_id(peer)));
                self.host(index)
                    .sending
                    .retain(|sending| sending.to != peer);
                self.touch(index);
            }
            Event::Origin {
                to,
                stream,
                blob,
                piece,
            } => self.origin_piece(to, stream, blob, piece),
            Event::Said { life, input } => {
                self.scheduler_messages += 1;
                if life == self.life
                    && let Some(swarm) = &mut self.swarm
                {
                    swarm.handle(now, &mut self.rng, input);
                    self.hear_scheduler();
                }
            }
            Event::Told { life, to, output } => {
                if life == self.life && self.swarm.is_some() && !self.dead(to) {
                    self.told(to, output);
                }
            }
            Event::Tick => {
                if self.ticks_at == Some(now)
                    && let Some(swarm) = &mut self.swarm
                {
                    self.ticks_at = None;
                    swarm.tick(now, &mut self.rng);
                    self.hear_scheduler();
                }
            }
            Event::News(index) => self.tell_news(index),
            Event::Die(index) => self.die(index),
            Event::SchedulerDown => {
                self.swarm = None;
                for host in &mut self.hosts {
                    host.node.handle(now, node::Input::Scheduler(false));
                }
            }
            Event::SchedulerUp => {
                self.life += 1;
                self.swarm = Some(Swarm::new(now));
                for index in 0..self.hosts.len() as u32 {
                    if !self.dead(index) {
                        self.register(index);
                        self.come_back(index);
                    }
                }
            }
        }
    }

    /// The node looks at what came, soon.
    fn touch(&mut self, index: u32) {
        self.host(index).is_stirred = true;
        self.look_at(index, self.now + DECIDES_WITHIN);
    }

    /// The node looks at what came at that moment, if not before.
    fn look_at(&mut self, index: u32, at: Time) {
        let tick = Calendar::tick_of(at);
        let host = &mut self.hosts[index as usize];
        if !host.dead && host.looks_at.is_none_or(|before| tick < before) {
            host.looks_at = Some(tick);
            self.calendar.put(tick, index);
        }
    }

    /// Nodes take in what came and decide what follows; then that is done, of one after the other.
    fn look(&mut self, tick: u64, nodes: Vec<u32>) {
        let now = self.now;
        // A host that looked at an earlier tick since is not here for this one.
        let is_due = |index: &u32| {
            let host = &mut self.hosts[*index as usize];
            !host.dead && host.looks_at.take_if(|set| *set == tick).is_some()
        };
        let mut due: Vec<u32> = nodes.into_iter().filter(is_due).collect();
        due.sort_unstable();
        self.decide(&due);
        for index in due {
            while let Some(output) = self.host(index).node.poll() {
                self.carry_out(index, output);
            }
            let host = self.host(index);
            let next = host
                .inbox
                .front()
                .map(|letter| letter.at + host.waits(&letter.content));
            if let Some(at) = next.into_iter().chain(host.deadline).min() {
                self.look_at(index, at.max(now + DECIDES_WITHIN));
            }
        }
    }

    /// These nodes, in ascending order, decide. None of them knows yet what others decide at the same moment: so it is worked out by as
    /// many threads as there are cores, and comes out the same as by one.
    fn decide(&mut self, due: &[u32]) {
        let (now, blobs) = (self.now, &self.blobs);
        let mut hosts = Vec::with_capacity(due.len());
        let (mut rest, mut first) = (&mut self.hosts[..], 0);
        for index in due {
            let Some((host, others)) = rest[(index - first) as usize..].split_first_mut() else {
                break;
            };
            hosts.push(host);
            (rest, first) = (others, index + 1);
        }
        hosts
            .into_par_iter()
            .with_min_len(DECIDE_AT_LEAST)
            .for_each(|host| host.decide(now, blobs));
    }

    fn connect(&mut self, a: u32, b: u32) {
        if self.dead(a) || self.dead(b) || self.host(a).connected.contains(&b) {
            return;
        }
        let now = self.now;
        for (one, other) in [(a, b), (b, a)] {
            let role = if other < self.scenario.seed_peers {
                Role::Seed
            } else {
                Role::Peer
            };
            self.host(one).connected.insert(other);
            self.host(one).node.handle(
                now,
                node::Input::PeerUp {
                    peer: peer_id(other),
                    role,
                },
            );
            self.touch(one);
        }
    }

    // ---- a node's orders ------------------------------------------------------------------------------------------

    fn carry_out(&mut self, me: u32, output: Output) {
        let (now, delay) = (self.now, self.scenario.delay);
        self.note(me, &output);
        match output {
            Output::Dial(peer) => {
                let there = index_of(peer);
                let took = 2 * DIAL_ROUND_TRIPS * delay;
                let event = match self.dead(there) {
                    true => Event::Unreached(me, there),
                    false => Event::Connected(me, there),
                };
                self.queue.put(now + took, event);
            }
            Output::Send(peer, message) => {
                if let Message::Have { task, offer, .. } = &message
                    && let Some(blob) = self.by_digest.get(task)
                {
                    self.checks.announced(
                        me,
                        offer,
                        &self.hosts[me as usize].blobs[*blob].verified,
                    );
                }
                self.send(me, index_of(peer), message);
            }
            Output::Download {
                peer,
                request,
                task,
                piece,
                prefetch,
                priority,
            } => {
                let message = Message::Request {
                    request,
                    task,
                    piece,
                    prefetch,
                    priority,
                };
                self.send(me, index_of(peer), message);
            }
            Output::Cancel { peer, request } => {
                self.send(me, index_of(peer), Message::Cancel { request })
            }
            Output::Upload {
                peer,
                request,
                task,
                piece,
            } => self.upload(me, peer, request, &task, piece),
            Output::ReadOrigin { task, from } => self.read_origin(me, &task, from),
            Output::StopOrigin(task) => {
                if let Some(local) = self.local(me, &task) {
                    local.reading = None;
                }
            }
            Output::Want {
                task, again, reads, ..
            } => {
                let size_bytes = self
                    .host(me)
                    .node
                    .table(&task)
                    .map(|table| table.layout().size_bytes());
                let issuer = self.local(me, &task).and_then(|local| local.issuer);
                let terms = Terms {
                    issuer,
                    ..Terms::default()
                };
                self.say(Input::Want {
                    peer: peer_id(me),
                    task,
                    size_bytes,
                    again,
                    reads,
                    terms,
                });
            }
            Output::Report(peer, task, fault) => {
                let kind = match fault {
                    Fault::WrongBytes => ReportKey::WrongBytes,
                    Fault::Stalled => ReportKey::Stalled,
                    Fault::NotHeld => ReportKey::NotHeld,
                    Fault::Failed => ReportKey::Failed,
                };
                self.host(me).reports.entry((peer, task, kind)).or_default();
                self.news(me);
            }
            Output::Load { task, child, .. } => self.load(me, task, &child),
            Output::Show(task, piece) => self.show(me, &task, piece),
            Output::Complete(task) => self.complete(me, &task),
            Output::Poisoned(task) => {
                if let Some(local) = self.local(me, &task) {
                    local.start_over();
                }
            }
            // Nobody can give it now: its client asks again.
            Output::Failed(task, _) => {
                self.host(me).node.handle(
                    now,
                    node::Input::Run {
                        task,
                        whole: true,
                        as_owner: false,
                    },
                );
                self.touch(me);
            }
            // Liars lie about bytes here, not about tables.
            Output::Contradiction(_)
            | Output::Recheck(_)
            | Output::RatesChanged
            | Output::Sized(..)
            | Output::TableGrew(_)
            | Output::LetGo(_)
            | Output::Alone(..)
            | Output::Drop(..)
            | Output::ReadUntil(..) => {}
        }
    }

    fn note(&mut self, me: u32, output: &Output) {
        let (kind, peer, detail) = match output {
            Output::Dial(peer) => (1, index_of(*peer), 0),
            Output::Send(peer, _) => (2, index_of(*peer), 0),
            Output::Download { peer, piece, .. } => (3, index_of(*peer), *piece),
            Output::Cancel { peer, request } => (4, index_of(*peer), *request),
            Output::Upload { peer, piece, .. } => (5, index_of(*peer), *piece),
            Output::ReadOrigin { from, .. } => (6, 0, *from),
            Output::Show(_, piece) => (7, 0, *piece),
            Output::Want { .. } => (8, 0, 0),
            Output::Report(peer, ..) => (9, index_of(*peer), 0),
            Output::Complete(_) => (10, 0, 0),
            _ => (11, 0, 0),
        };
        let words = [
            self.now.0.as_nanos() as u64,
            u64::from(me) << 8 | kind,
            u64::from(peer) << 32 | u64::from(detail),
        ];
        self.trace = words.into_iter().fold(self.trace, mix);
    }

    fn local(&mut self, me: u32, task: &Digest) -> Option<&mut Local> {
        let blob = *self.by_digest.get(task)?;
        self.hosts[me as usize].blobs.get_mut(blob)
    }

    /// A message waits behind what is committed to the uplink.
    fn send(&mut self, from: u32, to: u32, message: Message) {
        self.peer_messages += 1;
        let at = self.now + self.links[from as usize].up.backlog(self.now) + self.scenario.delay;
        let content = Content::new(message, |task| self.by_digest.get(task).copied());
        let host = self.host(to);
        if !host.dead {
            let looks_at = at + host.waits(&content);
            host.expect(Letter { at, from, content });
            self.look_at(to, looks_at);
        }
    }

    fn pull(&mut self, index: u32) {
        for blob in 0..self.blobs.len() {
            self.open(index, blob);
            let (now, task, count) = (
                self.now,
                self.blobs[blob].digest,
                self.blobs[blob].layout.count(),
            );
            self.host(index).node.handle(
                now,
                node::Input::Run {
                    task,
                    whole: true,
                    as_owner: false,
                },
            );
            self.host(index).node.handle(
                now,
                node::Input::Reader {
                    task,
                    reader: READER,
                    pieces: Some(0..count),
                    ahead: None,
                    partial: false,
                },
            );
        }
        self.touch(index);
    }

    fn open(&mut self, index: u32, blob: usize) {
        let (now, task) = (self.now, self.blobs[blob].digest);
        let source = Source {
            registry: "registry.test".into(),
            repository: "library/image".into(),
        };
        let opening = Opening {
            source,
            right: Right::Own,
            known: None,
            is_committed: false,
            announce: true,
        };
        self.host(index).node.handle(
            now,
            node::Input::Open {
                task,
                opening: Box::new(opening),
            },
        );
    }

    /// As `proxy::driver` does: a seed gets what it is asked for, a node gives what it has.
    fn load(&mut self, me: u32, task: Digest, child: &Child) {
        let Some(blob) = self.by_digest.get(&task).copied() else {
            return;
        };
        let now = self.now;
        if me < self.scenario.seed_peers {
            self.open(me, blob);
            let as_owner = index_of(child.peer) < self.scenario.seed_peers;
            self.host(me).node.handle(
                now,
                node::Input::Run {
                    task,
                    whole: true,
                    as_owner,
                },
            );
        } else if self.host(me).blobs[blob].verified.is_empty()
            && !self.host(me).node.is_running(&task)
        {
            self.host(me).node.handle(
                now,
                node::Input::Refuse {
                    peer: child.peer,
                    task,
                    reason: Refusal::NotHeld,
                },
            );
            return;
        }
        self.host(me).node.handle(
            now,
            node::Input::Adopt {
                task,
                child: child.clone(),
            },
        );
        self.touch(me);
    }

    fn show(&mut self, me: u32, task: &Digest, piece: PieceIndex) {
        let now = self.now;
        let Some(local) = self.local(me, task) else {
            return;
        };
        let count = local.verified.count();
        if let Some(next) = local.show(piece) {
            let pieces = (next < count).then_some(next..count);
            self.host(me).node.handle(
                now,
                node::Input::Reader {
                    task: *task,
                    reader: READER,
                    pieces,
                    ahead: None,
                    partial: false,
                },
            );
        }
    }

    fn complete(&mut self, me: u32, task: &Digest) {
        let now = self.now;
        let Some(local) = self.local(me, task) else {
            return;
        };
        local.done_at.get_or_insert(now);
        local.changed = true;
        let all_done = self
            .host(me)
            .blobs
            .iter()
            .all(|local| local.done_at.is_some());
        if me >= self.scenario.seed_peers && all_done {
            self.unfinished -= 1;
        }
        self.news(me);
    }

    // ---- pieces -------------------------------------------------------------------------------------------------

    fn upload(&mut self, me: u32, peer: PeerId, request: u32, task: &Digest, piece: PieceIndex) {
        let Some(blob) = self.by_digest.get(task).copied() else {
            return;
        };
        let left_bytes = self.blobs[blob].layout.len_bytes(piece);
        let to = index_of(peer);
        let host = &mut self.hosts[me as usize];
        if !host.connected.contains(&to) {
            host.node
                .handle(self.now, node::Input::Uploaded { peer, request });
            return;
        }
        host.sending.push_back(Sending {
            to,
            request,
            blob,
            piece,
            left_bytes,
        });
        let verified = host.blobs[blob].verified.contains(piece);
        self.checks
            .uploads(me, verified, host.sending.len(), self.scenario.upload_slots);
        self.pump(me);
    }

    /// Fills the uplink's buffer: a turn for each piece, round and round.
    fn pump(&mut self, index: u32) {
        let (now, buffer) = (self.now, self.scenario.buffer);
        while !self.dead(index) && !self.hosts[index as usize].sending.is_empty() {
            let backlog = self.links[index as usize].up.backlog(now);
            if backlog > buffer {
                return self.pump_at(index, now + (backlog - buffer));
            }
            // Senders whose receiver's downlink has room come first, in turn.
            let waits =
                |sending: &Sending| self.congestion(index, sending.to).saturating_sub(buffer);
            let sending = &self.hosts[index as usize].sending;
            let Some((at, wait)) = sending
                .iter()
                .map(waits)
                .enumerate()
                .min_by_key(|(at, wait)| (*wait, *at))
            else {
                return;
            };
            if wait > Duration::ZERO {
                return self.pump_at(index, now + wait);
            }
            self.send_turn(index, at);
        }
    }

    fn send_turn(&mut self, index: u32, at: usize) {
        let now = self.now;
        let host = &mut self.hosts[index as usize];
        let Some(mut sending) = host.sending.remove(at) else {
            return;
        };
        let bytes = sending.left_bytes.min(self.scenario.turn_bytes);
        sending.left_bytes -= bytes;
        let leaves = self.links[index as usize].up.send(now, bytes);
        let Sending {
            to,
            request,
            blob,
            piece,
            left_bytes,
        } = sending;
        let last = left_bytes == 0;
        self.queue.put(
            leaves,
            Event::Left {
                from: index,
                to,
                request,
                blob,
                piece,
                bytes,
                last,
            },
        );
        if last {
            let node = &mut self.host(index).node;
            node.handle(
                now,
                node::Input::Uploaded {
                    peer: peer_id(to),
                    request,
                },
            );
            if node.has_waiting_uploads() {
                self.look_at(index, now + DECIDES_WITHIN);
            }
        } else {
            self.hosts[index as usize].sending.push_back(sending);
        }
    }

    fn pump_at(&mut self, index: u32, at: Time) {
        let host = self.host(index);
        if host.pumps_at.is_none_or(|before| at < before) {
            host.pumps_at = Some(at);
            self.queue.put(at, Event::Pump(index));
        }
    }

    /// How far behind the links on the way are.
    fn congestion(&self, from: u32, to: u32) -> Duration {
        let (sender, receiver) = (&self.links[from as usize], &self.links[to as usize]);
        let down = receiver.down.backlog(self.now);
        if sender.zone == receiver.zone {
            return down;
        }
        let out = self.zones[sender.zone as usize].up.backlog(self.now);
        let into = self.zones[receiver.zone as usize].down.backlog(self.now);
        down.max(out).max(into)
    }

    /// When bytes that leave an uplink now are there.
    fn arrival(&mut self, from: u32, to: u32, bytes: u64) -> Time {
        let (mut at, delay) = (self.now + self.scenario.delay, self.scenario.delay);
        let (there, here) = (self.zone(from), self.zone(to));
        if there != here {
            at = self.zones[there as usize].up.pass(at, bytes) + delay;
            at = self.zones[here as usize].down.pass(at, bytes) + delay;
        }
        self.links[to as usize].down.pass(at, bytes)
    }

    fn piece(&mut self, to: u32, from: u32, request: u32, blob: usize, piece: PieceIndex) {
        let now = self.now;
        if self.dead(to)
            || self
                .host(to)
                .node
                .asked_for(peer_id(from), request)
                .is_none()
        {
            return;
        }
        let right = !self.host(from).lies;
        let chain = self.blobs[blob].chain_after(piece, right);
        let verdict = self.host(to).node.handle(
            now,
            node::Input::Piece {
                peer: peer_id(from),
                request,
                chain,
            },
        );
        self.wrong_pieces += u64::from(verdict == Some(Verdict::Wrong));
        if verdict == Some(Verdict::Keep) {
            self.checks.kept(to, right);
            self.keep(to, blob, piece, right);
            let bytes = self.blobs[blob].layout.len_bytes(piece);
            let task = self.blobs[blob].digest;
            *self
                .host(to)
                .reports
                .entry((peer_id(from), task, ReportKey::Served))
                .or_default() += bytes;
        }
        self.touch(to);
    }

    fn keep(&mut self, index: u32, blob: usize, piece: PieceIndex, right: bool) {
        let local = &mut self.hosts[index as usize].blobs[blob];
        if right {
            local.verified.insert(piece);
        }
        local.changed = true;
        self.news(index);
    }

    // ---- the origin ---------------------------------------------------------------------------------------------

    fn read_origin(&mut self, me: u32, task: &Digest, from: PieceIndex) {
        let Some(blob) = self.by_digest.get(task).copied() else {
            return;
        };
        self.streams += 1;
        let stream = self.streams;
        let (now, size_bytes) = (self.now, self.blobs[blob].layout.size_bytes());
        let host = self.host(me);
        host.blobs[blob].reading = Some(stream);
        host.node.handle(
            now,
            node::Input::Sized {
                task: *task,
                size_bytes,
            },
        );
        self.stream(me, stream, blob, from);
        self.touch(me);
    }

    /// The next piece of a stream leaves the origin.
    fn stream(&mut self, to: u32, stream: u64, blob: usize, piece: PieceIndex) {
        let bytes = self.blobs[blob].layout.len_bytes(piece);
        let left = self.origin.send(self.now, bytes) + self.scenario.delay;
        let zone = self.zone(to) as usize;
        self.zones[zone].origin_bytes += bytes;
        let there = self.links[to as usize].down.pass(left, bytes);
        self.queue.put(
            there,
            Event::Origin {
                to,
                stream,
                blob,
                piece,
            },
        );
    }

    fn origin_piece(&mut self, to: u32, stream: u64, blob: usize, piece: PieceIndex) {
        let (now, task) = (self.now, self.blobs[blob].digest);
        if self.dead(to) || self.host(to).blobs[blob].reading != Some(stream) {
            return;
        }
        let chain = self.blobs[blob].chain_after(piece, true);
        let verdict = self
            .host(to)
            .node
            .handle(now, node::Input::OriginPiece { task, piece, chain });
        if verdict == Some(Verdict::Keep) {
            self.keep(to, blob, piece, true);
        }
        if piece + 1 < self.blobs[blob].layout.count() {
            self.stream(to, stream, blob, piece + 1);
        } else {
            self.host(to).node.handle(
                now,
                node::Input::OriginOver {
                    task,
                    failure: None,
                },
            );
            self.host(to).blobs[blob].reading = None;
        }
        self.touch(to);
    }

    // ---- the scheduler ------------------------------------------------------------------------------------------

    fn say(&mut self, input: Input) {
        if self.swarm.is_some() {
            self.queue.put(
                self.now + self.scenario.delay,
                Event::Said {
                    life: self.life,
                    input,
                },
            );
        }
    }

    fn register(&mut self, index: u32) {
        let seed = index < self.scenario.seed_peers;
        self.say(Input::Joined(Registration {
            peer: peer_id(index),
            role: if seed { Role::Seed } else { Role::Peer },
            place: Place {
                zone: format!("zone-{}", self.zone(index)).into(),
                ..Place::default()
            },
            upload_slots: self.scenario.upload_slots as u32,
            upload_rate_bytes: 0,
            reads_origins: true,
        }));
        let now = self.now;
        self.host(index)
            .node
            .handle(now, node::Input::Scheduler(true));
    }

    /// To a scheduler that has just come up everything is said again.
    fn come_back(&mut self, index: u32) {
        let host = self.host(index);
        host.blobs.iter_mut().for_each(|local| local.changed = true);
        let running: Vec<usize> = (0..host.blobs.len())
            .filter(|at| host.blobs[*at].done_at.is_none())
            .collect();
        self.tell_news(index);
        for blob in running {
            let task = self.blobs[blob].digest;
            if self.host(index).node.is_running(&task) {
                let size_bytes = Some(self.blobs[blob].layout.size_bytes());
                let terms = Terms {
                    issuer: self.host(index).blobs[blob].issuer,
                    ..Terms::default()
                };
                let (peer, again, reads) = (peer_id(index), false, false);
                self.say(Input::Want {
                    peer,
                    task,
                    size_bytes,
                    again,
                    reads,
                    terms,
                });
            }
        }
    }

    /// There is news for the scheduler: it is told within a second. The first at once would be one message a host and piece.
    fn news(&mut self, index: u32) {
        let host = self.host(index);
        if !std::mem::replace(&mut host.news_due, true) {
            self.queue.put(self.now + NEWS_EVERY, Event::News(index));
        }
    }

    fn tell_news(&mut self, index: u32) {
        let blobs = &self.blobs;
        let host = &mut self.hosts[index as usize];
        host.news_due = false;
        if host.dead {
            return;
        }
        let changed = host
            .blobs
            .iter_mut()
            .zip(blobs)
            .filter(|(local, _)| local.changed);
        let holdings: Vec<Holding> = changed
            .map(|(local, blob)| {
                local.changed = false;
                let size_bytes = blob.layout.size_bytes();
                // The scheduler knows of no other cut than the usual one.
                let usual = u64::from(PieceLayout::new(size_bytes).count());
                let held = u64::from(local.verified.len());
                Holding {
                    task: blob.digest,
                    size_bytes,
                    pieces: (held * usual / u64::from(blob.layout.count().max(1))) as u32,
                    complete: local.done_at.is_some(),
                }
            })
            .collect();
        let reports = std::mem::take(&mut host.reports);
        let peer = peer_id(index);
        if !holdings.is_empty() {
            self.say(Input::Holdings {
                peer,
                replaces_all: false,
                holdings,
            });
        }
        // They travel in one message: only the first counts as one.
        self.scheduler_messages -= (reports.len() as u64)
            .saturating_sub(1)
            .min(self.scheduler_messages);
        for ((parent, task, kind), bytes) in reports {
            let kind = kind.kind(bytes);
            self.say(Input::Report {
                reporter: peer,
                peer: parent,
                task,
                kind,
                is_vouched_for: false,
            });
        }
    }

    fn hear_scheduler(&mut self) {
        let at = self.now + self.scenario.delay;
        let mut told = Vec::new();
        if let Some(swarm) = &mut self.swarm {
            told.extend(std::iter::from_fn(|| swarm.poll()));
        }
        for output in told {
            match &output {
                swarm::Output::Parents { to, .. } => {
                    self.scheduler_messages += 1;
                    self.queue.put(
                        at,
                        Event::Told {
                            life: self.life,
                            to: index_of(*to),
                            output,
                        },
                    );
                }
                // There is one scheduler.
                swarm::Output::Vouched { .. } => {}
                swarm::Output::Isolated(_) => {
                    for to in 0..self.hosts.len() as u32 {
                        self.scheduler_messages += 1;
                        self.queue.put(
                            at,
                            Event::Told {
                                life: self.life,
                                to,
                                output: output.clone(),
                            },
                        );
                    }
                }
            }
        }
        let deadline = self.swarm.as_ref().and_then(Swarm::deadline);
        if let Some(at) = deadline.filter(|at| self.ticks_at.is_none_or(|before| *at < before)) {
            let at = at.max(self.now);
            self.ticks_at = Some(at);
            self.queue.put(at, Event::Tick);
        }
    }

    fn told(&mut self, to: u32, output: swarm::Output) {
        let now = self.now;
        match output {
            swarm::Output::Parents {
                task,
                parents,
                issuer,
                fetch_from_origin,
                share,
                ..
            } => {
                let zone = self.zone(to);
                let named = parents.into_iter().map(|peer| Named {
                    peer,
                    far: self.zone(index_of(peer)) != zone,
                });
                let named: Vec<Named> = named.collect();
                if let Some(local) = self.local(to, &task) {
                    local.issuer = issuer;
                }
                let node = &mut self.host(to).node;
                node.handle(
                    now,
                    node::Input::Parents {
                        task,
                        parents: named,
                        issuer,
                        elected: fetch_from_origin,
                        share,
                    },
                );
            }
            swarm::Output::Isolated(peers) => {
                self.host(to).node.handle(now, node::Input::Isolated(peers));
            }
            swarm::Output::Vouched { .. } => {}
        }
        self.touch(to);
    }

    // ---- faults -------------------------------------------------------------------------------------------------

    fn die(&mut self, index: u32) {
        if self.host(index).done_at().is_none() {
            self.unfinished -= 1;
        }
        let noticed = self.now + self.scenario.faults.noticed_after;
        let host = self.host(index);
        host.dead = true;
        host.sending.clear();
        host.inbox.clear();
        for other in std::mem::take(&mut host.connected) {
            self.host(other).connected.remove(&index);
            self.queue.put(noticed, Event::Lost(other, index));
        }
        self.queue.put(
            noticed,
            Event::Said {
                life: self.life,
                input: Input::Left(peer_id(index)),
            },
        );
    }
}

/// Requests that were doubled.
fn doubled(hosts: &[Host], blobs: &[Blob]) -> u64 {
    let of = |host: &Host| -> u64 {
        blobs
            .iter()
            .map(|blob| host.node.duplicates(&blob.digest))
            .sum()
    };
    hosts.iter().map(of).sum()
}

/// Draws the slow hosts and the liars by lot.
fn afflict(scenario: &Scenario, hosts: &mut [Host], rng: &mut StdRng) {
    let faults = &scenario.faults;
    let many = |part: f64| (part * f64::from(scenario.hosts)).round() as usize;
    let mut nodes: Vec<&mut Host> = hosts
        .iter_mut()
        .skip(scenario.seed_peers as usize)
        .collect();
    nodes.shuffle(rng);
    for host in nodes.iter_mut().take(many(faults.slow)) {
        host.slow = true;
    }
    nodes.shuffle(rng);
    nodes
        .iter_mut()
        .take(many(faults.lie))
        .for_each(|host| host.lies = true);
}
