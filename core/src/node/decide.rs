//! The next steps: the peers to ask, to tell and to serve, and the moment to read the origin.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};

use super::memory::Memory;
use super::pace::{self, Kind};
use super::phase::Change;
use super::task::{Link, OriginState, Task};
use super::uploads::Waiting;
use super::{
    ANSWER_WITHIN, ASK_AGAIN, ELECTED_WITHIN, Failure, LESS_URGENT_ROOM, LOOK_EVERY, Named, Node,
    ORIGIN_RETRY, Output, PATIENCE, PATIENCE_IN_FLIGHT, RANGE_PATIENCE, SAY_WORKING_EVERY,
    SEED_ANSWERS_WITHIN, TAKES_ALL_AFTER, TableSigner, WORKING_FOR,
};
use crate::application::{Priority, Purpose};
use crate::fetch::{Fetch, InFlightRequest};
use crate::message::{Message, Offer, Refusal, Role};
use crate::piece::{PeerId, PieceIndex, PieceSet, PieceTable};
use crate::share::Share;
use crate::{Time, rendezvous};
use hawker_oci::digest::Digest;

impl<N: TableSigner> Node<N> {
    /// Works out what follows from all that was told.
    pub(super) fn decide(&mut self, now: Time) {
        let busy =
            |task: &Task| task.is_running() || !task.offers.is_empty() || task.memory.is_some();
        let tasks: Vec<Digest> = self
            .tasks
            .iter()
            .filter(|(_, task)| busy(task))
            .map(|(digest, _)| *digest)
            .collect();
        for digest in &tasks {
            self.balance_memory(now, digest);
        }
        self.admit(now, &tasks);
        let is_admitted = |digest: &&Digest| self.tasks.get(digest).is_some_and(Task::is_admitted);
        let admitted: Cow<'_, [Digest]> = match self.config.role {
            Role::Seed => tasks.iter().filter(is_admitted).copied().collect(),
            _ => Cow::Borrowed(&tasks),
        };
        for digest in admitted.iter() {
            self.seek_parents(now, digest);
        }
        for digest in self.in_turn(now, &admitted) {
            self.read_origin(now, &digest);
        }
        self.ask(now, &admitted);
        for digest in admitted.iter() {
            self.weigh_patience(now, digest);
        }
        for digest in &tasks {
            self.tell(now, digest);
        }
        self.serve(now);
    }

    /// When to decide again though nothing happened.
    pub fn deadline(&self, now: Time) -> Option<Time> {
        let tells = self
            .tasks
            .values()
            .filter_map(|task| task.tells_at(self.config.role))
            .min();
        // A node that fetches, or on which somebody waits, checks now and then whether anybody has taken too long.
        let looks = self.uploads.is_waited_for() || self.tasks.values().any(Task::is_running);
        let looks_at = looks.then_some(now + LOOK_EVERY);
        tells
            .map(|at| at.max(now))
            .into_iter()
            .chain(looks_at)
            .min()
    }

    /// The next order to the shell.
    pub fn poll(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// Asks the scheduler, and the seeds in turn.
    pub(super) fn seek_parents(&mut self, now: Time, digest: &Digest) {
        let Some(task) = self
            .tasks
            .get_mut(digest)
            .filter(|t| t.is_running() && !t.is_passed_through())
        else {
            return;
        };
        let asked_at = task.advice.asked_at();
        let stale = asked_at
            .is_none_or(|at| now.since(at) >= ASK_AGAIN && now.since(task.moved) >= ASK_AGAIN);
        if self.scheduler && stale {
            let again = asked_at.is_some();
            task.advice.ask(now);
            self.outputs.push_back(Output::Want {
                task: *digest,
                again,
                reads: task.is_closed_to_seeds,
                partial: !task.whole && !task.elected,
            });
        }
        if task.takes_all(now) {
            self.take(digest, Share::ALL);
        }
        if self.tasks.get(digest).is_none_or(|task| task.elected) {
            return;
        }
        // The owner first; the next seed only when those before it can't help, or not be counted on.
        if !self.orders.contains_key(digest) {
            self.orders
                .insert(*digest, rendezvous::order(digest, self.candidates()));
        }
        let before = || {
            self.orders[digest]
                .iter()
                .copied()
                .take_while(|seed| *seed != self.config.me)
        };
        let can_help = |seed: &PeerId| !self.gave_up_on(now, digest, *seed);
        // A seed that is asked by one that owns nothing takes itself for the owner: seeds don't do so as long as the owner lives.
        let counted_on =
            |seed: &PeerId| self.config.role == Role::Seed || self.parents.trusted(now, *seed);
        let trusted = before().find(|seed| can_help(seed) && counted_on(seed));
        let next = trusted.or_else(|| before().find(can_help));
        let asked = |seed: &PeerId| {
            let link = self.tasks.get(digest).and_then(|t| t.links.get(seed));
            link.is_some_and(|link| link.named && link.asked.is_some())
        };
        if let Some(seed) = next.filter(|seed| !asked(seed)) {
            self.approach_seed(now, *digest, seed);
        }
    }

    pub(super) fn approach_seed(&mut self, now: Time, digest: Digest, peer: PeerId) {
        let far = self.seeds.iter().any(|seed| seed.peer == peer && seed.far);
        self.approach(now, digest, Named { peer, far });
    }

    /// The seeds that could own a task: those known, and this node if it is one.
    pub(super) fn candidates(&self) -> impl Iterator<Item = PeerId> + '_ {
        let me = (self.config.role == Role::Seed).then_some(self.config.me);
        self.seeds
            .iter()
            .map(|seed| seed.peer)
            .filter(|seed| !self.isolated.contains(seed))
            .chain(me)
    }

    pub(super) fn gave_up_on(&self, now: Time, digest: &Digest, peer: PeerId) -> bool {
        let unreachable = self
            .undialled
            .get(&peer)
            .is_some_and(|at| now.since(*at) < PATIENCE);
        let link = self.tasks.get(digest).and_then(|t| t.links.get(&peer));
        unreachable || self.parents.banned(now, peer) || link.is_some_and(|l| l.unavailable)
    }

    /// Makes a peer a parent: dials it if need be, tells it of our interest.
    pub(super) fn approach(&mut self, now: Time, digest: Digest, named: Named) {
        let Named { peer, far } = named;
        if self.isolated.contains(&peer) || self.parents.banned(now, peer) {
            return;
        }
        let Some(task) = self.tasks.get_mut(&digest) else {
            return;
        };
        let link = task.links.entry(peer).or_default();
        link.named = true;
        let told_otherwise = link.far != far && link.asked.is_some();
        task.is_far(peer, far);
        if told_otherwise {
            self.ask_again(&digest, |other, _| *other == peer);
        }
        if self.connected.contains_key(&peer) {
            self.interest(now, digest, peer);
        } else if !self.dialling.contains_key(&peer)
            && self
                .undialled
                .get(&peer)
                .is_none_or(|at| now.since(*at) >= ANSWER_WITHIN)
        {
            self.dialling.insert(peer, now);
            self.outputs.push_back(Output::Dial(peer));
        }
    }

    pub(super) fn interest(&mut self, now: Time, digest: Digest, peer: PeerId) {
        let Some(task) = self.tasks.get_mut(&digest) else {
            return;
        };
        let Some(role) = self.connected.get(&peer).filter(|_| task.is_running()) else {
            return;
        };
        let may_announce = task.may_announce(self.config.role);
        let link = task.links.entry(peer).or_default();
        if link.asked.is_none() {
            link.asked = Some(now);
            if may_announce {
                // A parent learns the wishes of this node from its requests. The issuer of a task also hears which
                // pieces have spread, and may never ask.
                let far = link.far;
                let far = far.then_some(if task.is_brought_by(peer, *role) {
                    Share::ALL
                } else {
                    Share::NONE
                });
                task.offers.join(peer, !self.isolated.contains(&peer), far);
            }
            let interest = task.interest(digest, self.config.role, peer, *role);
            self.outputs.push_back(Output::Send(peer, interest));
        }
    }

    /// Goes to the origin when this node is elected, when there is no other source left, or when it has waited enough.
    pub(super) fn read_origin(&mut self, now: Time, digest: &Digest) {
        let Some(task) = self
            .tasks
            .get(digest)
            .filter(|t| t.is_running() && !t.is_passed_through())
        else {
            return;
        };
        // For readers of ranges alone the blob is not read from its start: they read theirs from the origin themselves.
        if !(task.whole || task.elected) || matches!(task.reading, OriginState::At(_)) {
            return;
        }
        let from = match &task.fetch {
            Some(fetch) if !fetch.is_wanting() => return,
            // The values are known up to the first piece that is missing: read on from there.
            Some(fetch) => {
                let known = task
                    .table
                    .as_ref()
                    .map_or(0, |table| table.values().len() as u32);
                let verifiable = task.table.as_ref().map_or(0, PieceTable::verifiable);
                let will_do = |peer| self.parents.trusted(now, peer);
                // Peers bring to a seed or issuer what they offer: after a time without disk that is most of it.
                let offered_by_nobody = || fetch.first_offered_by_nobody(verifiable, will_do);
                let bringing = task.is_issuer(self.config.role) && task.refills;
                let first = bringing.then(offered_by_nobody).flatten();
                first
                    .unwrap_or_else(|| fetch.held().first_missing(0))
                    .min(known)
            }
            None => 0,
        };
        let bringing = task.is_issuer(self.config.role);
        if bringing && self.peers_bring_the_rest(now, task) {
            return;
        }
        // A request to a stalled parent gives no more reason to wait than no request at all.
        let moving = task
            .fetch
            .as_ref()
            .is_some_and(|fetch| fetch.is_moving(now, &self.parents));
        let overdue = now.since(task.moved) >= if moving { PATIENCE_IN_FLIGHT } else { PATIENCE };
        let waited = overdue || task.in_vain;
        let reading = task.reading;
        // Most of the time it moves, and whoever was asked may bring it: no more is worked out.
        let will_do = |peer| !self.parents.banned(now, peer);
        let has_source = moving
            || !(task.elected && reading == OriginState::No)
                && self.has_pending_source(now, digest, will_do);
        let Some(task) = self.tasks.get_mut(digest) else {
            return;
        };
        match reading {
            OriginState::At(_) => return,
            OriginState::FailedAt(at, failure) => {
                let useless = task
                    .fetch
                    .as_ref()
                    .is_none_or(|f| !f.has_useful_parent(will_do));
                if useless && (!has_source || overdue) {
                    task.enter(Change::GaveUp(failure));
                    self.outputs.push_back(Output::Failed(*digest, failure));
                    return;
                }
                if now.since(at) < ORIGIN_RETRY || !task.elected && has_source && !waited {
                    return;
                }
            }
            OriginState::No => {
                if !task.elected && has_source && !waited {
                    return;
                }
            }
        }
        if self.quotas.limit_origins() && !self.may_read_origin(now, digest) {
            return;
        }
        let Some(task) = self.tasks.get_mut(digest) else {
            return;
        };
        task.held_back = None;
        task.in_vain = waited;
        task.reading = OriginState::At(from);
        self.outputs.push_back(Output::ReadOrigin {
            task: *digest,
            from,
        });
    }

    /// Whether whoever brings a task need not read it: its peers offer all that is missing, or it only gets back what it once held
    /// and nobody waits for that.
    fn peers_bring_the_rest(&self, now: Time, task: &Task) -> bool {
        let (Some(fetch), Some(table)) = (&task.fetch, &task.table) else {
            return false;
        };
        let in_vain = task.in_vain || now.since(task.moved) >= TAKES_ALL_AFTER;
        let will_do = |peer| self.parents.trusted(now, peer);
        let offered = || {
            fetch
                .first_offered_by_nobody(table.verifiable(), will_do)
                .is_none()
        };
        let waited_for = task.is_read || task.offers.hungry() > 0;
        task.refills && !waited_for || !in_vain && offered()
    }

    /// Tells the shell whether readers of ranges should wait for peers, where that has changed.
    fn weigh_patience(&mut self, now: Time, digest: &Digest) {
        let is_for_parts = |task: &&Task| task.is_running() && !task.whole && !task.elected;
        let Some(task) = self.tasks.get(digest).filter(is_for_parts) else {
            return;
        };
        let Some(fetch) = task.fetch.as_ref().filter(|fetch| fetch.is_wanting()) else {
            return;
        };
        let will_do = |peer| self.parents.trusted(now, peer);
        let is_served = fetch.is_moving(now, &self.parents);
        let has_source = || {
            now.since(task.moved) < RANGE_PATIENCE && self.has_pending_source(now, digest, will_do)
        };
        let is_alone = !is_served && !has_source();
        if let Some(task) = self
            .tasks
            .get_mut(digest)
            .filter(|task| task.is_alone != is_alone)
        {
            task.is_alone = is_alone;
            self.outputs.push_back(Output::Alone(*digest, is_alone));
        }
    }

    /// The tasks in the order in which they get to read the origin, where that is limited: the most urgent first, and before
    /// these whoever has waited for long already.
    fn in_turn(&self, now: Time, tasks: &[Digest]) -> Vec<Digest> {
        let mut tasks = tasks.to_vec();
        if self.quotas.limit_origins() {
            tasks.sort_by_cached_key(|digest| {
                let task = &self.tasks[digest];
                let overdue = task.held_back.filter(|since| now.since(*since) >= PATIENCE);
                (
                    overdue.is_none(),
                    overdue,
                    task.is_prefetch(self.config.role),
                    self.priority(digest),
                )
            });
        }
        tasks
    }

    /// Whether no application or tag that this task is for reads as many from their origins as it may.
    fn may_read_origin(&mut self, now: Time, digest: &Digest) -> bool {
        let role = self.config.role;
        let reading = self
            .tasks
            .values()
            .filter(|task| matches!(task.reading, OriginState::At(_)));
        let reading: Vec<Purpose> = reading.map(|task| task.purpose(role)).collect();
        let Some(task) = self.tasks.get_mut(digest) else {
            return false;
        };
        let may = self.quotas.may_read_origin(&task.purpose(role), &reading);
        if !may {
            // On purpose: it is not taken for a download that does not move.
            task.moved = now;
            task.held_back.get_or_insert(now);
        }
        may
    }

    /// How urgent a task is.
    fn priority(&self, digest: &Digest) -> Priority {
        self.tasks
            .get(digest)
            .map(|task| task.purpose(self.config.role).priority)
            .unwrap_or_default()
    }

    /// Whether anybody else, of those that will do, may still bring what is missing.
    pub(super) fn has_pending_source(
        &self,
        now: Time,
        digest: &Digest,
        will_do: impl Fn(PeerId) -> bool,
    ) -> bool {
        let Some(task) = self.tasks.get(digest) else {
            return false;
        };
        let (open, patience) = match task.is_closed_to_seeds {
            true => (task.issuer.is_none(), ELECTED_WITHIN),
            false => (!task.advice.is_given(), ANSWER_WITHIN),
        };
        let scheduler = self.scheduler
            && open
            && task
                .advice
                .asked_at()
                .is_none_or(|at| now.since(at) < patience);
        let offers = || {
            task.fetch
                .as_ref()
                .is_some_and(|f| f.has_useful_parent(&will_do))
        };
        let may_help = |(peer, link): (&PeerId, &Link)| {
            let dialling = self
                .dialling
                .get(peer)
                .is_some_and(|at| now.since(*at) < SEED_ANSWERS_WITHIN);
            let reads = self.connected.get(peer) == Some(&Role::Seed) || task.issuer == Some(*peer);
            // A peer that asked us is asked in turn, but nobody said that it has anything.
            let patience = if reads {
                SEED_ANSWERS_WITHIN
            } else {
                ANSWER_WITHIN
            };
            let asked =
                link.asked.is_some_and(|at| now.since(at) < patience) && (reads || link.named);
            let working = link.working.is_some_and(|at| now.since(at) < WORKING_FOR) && reads;
            !link.unavailable && (dialling || asked || working) && will_do(*peer)
        };
        // The cheapest check comes first.
        let peers = || task.links.iter().any(may_help);
        scheduler || offers() || peers()
    }

    /// Bytes asked for and not there yet, of all tasks.
    pub(super) fn in_flight_bytes(&self) -> u64 {
        self.tasks.values().map(Task::asked_bytes).sum()
    }

    /// Sends requests as long as there is room in flight. The most urgent tasks come first, tasks of equal priority
    /// take turns, and prefetches come last. While a more urgent task waits, less urgent ones get the rest of a part
    /// of the room. One request of each priority may always be under way, so that nobody waits for ever.
    pub(super) fn ask(&mut self, now: Time, tasks: &[Digest]) {
        let mut levels: BTreeMap<(bool, Priority), Vec<Digest>> = BTreeMap::new();
        for digest in tasks {
            let task = &self.tasks[digest];
            if task.is_running() && task.fetch.is_some() {
                let prefetch = task.is_prefetch(self.config.role);
                // All prefetches are of one priority.
                let priority = if prefetch {
                    Priority::LAST
                } else {
                    self.priority(digest)
                };
                levels
                    .entry((prefetch, priority))
                    .or_default()
                    .push(*digest);
            }
        }
        let mut under_way = None;
        let mut room = self.config.in_flight_bytes;
        for ((prefetch, priority), open) in levels {
            self.ask_in_turn(now, open, room, prefetch, priority, &mut under_way);
            room = self.config.in_flight_bytes / LESS_URGENT_ROOM;
        }
    }

    fn ask_in_turn(
        &mut self,
        now: Time,
        mut open: Vec<Digest>,
        room: u64,
        prefetch: bool,
        priority: Priority,
        under_way: &mut Option<BTreeMap<PeerId, usize>>,
    ) {
        let mut in_flight = self.in_flight_bytes();
        let mut own: u64 = open
            .iter()
            .filter_map(|digest| self.tasks.get(digest))
            .map(Task::asked_bytes)
            .sum();
        // The task with the fewest bytes under way is first: else one task would get each place that comes free, and
        // the issuers of the others would idle.
        open.sort_by_key(|digest| self.tasks.get(digest).map(Task::asked_bytes));
        while !open.is_empty() {
            open.retain(|digest| {
                let Some(task) = self.tasks.get_mut(digest) else {
                    return false;
                };
                let purpose = task.purpose(self.config.role);
                let (Some(fetch), Some(table)) = (&mut task.fetch, &task.table) else {
                    return false;
                };
                let prefetched = prefetch.then_some(&mut self.prefetch);
                let mut buckets = pace::buckets(
                    Kind::Download,
                    &mut task.pace,
                    &mut self.quotas,
                    &purpose,
                    prefetched,
                );
                if !buckets.all(|bucket| bucket.is_free(now)) {
                    // Held back on purpose: no parent is to blame for it, and the origin no way out of it.
                    task.moved = now;
                    return false;
                }
                drop(buckets);
                let taken = if let OriginState::At(piece) = task.reading {
                    Some(piece)
                } else {
                    None
                };
                let asked_bytes = fetch.asked_bytes();
                let fits = |memory: &Memory| {
                    memory.room_bytes(asked_bytes) >= fetch.layout().piece_bytes()
                };
                if !task.memory.as_ref().is_none_or(fits) {
                    return false;
                }
                // At least one request is always allowed: a piece may be longer than the room. Without that, nothing
                // is worked out.
                let has_one = if prefetch { in_flight > 0 } else { own > 0 };
                if has_one && in_flight + fetch.layout().piece_bytes() > room {
                    // Held back as well, if it could go on.
                    let held_back = prefetch || room < self.config.in_flight_bytes;
                    if held_back && fetch.has_useful_parent(|peer| self.parents.trusted(now, peer))
                    {
                        task.moved = now;
                    }
                    return false;
                }
                let verifiable = table.verifiable();
                // Often there is no room for anything, or nothing to ask for: they are counted when there is.
                let under_way = under_way.get_or_insert_with(|| count_by_peer(self.asked.keys()));
                let chosen = fetch.choose(
                    now,
                    &self.parents,
                    under_way,
                    verifiable,
                    taken,
                    &mut self.rng,
                );
                let Some((peer, piece)) = chosen else {
                    return false;
                };
                let len = fetch.layout().len_bytes(piece);
                in_flight += len;
                own += len;
                let prefetched = prefetch.then_some(&mut self.prefetch);
                for bucket in pace::buckets(
                    Kind::Download,
                    &mut task.pace,
                    &mut self.quotas,
                    &purpose,
                    prefetched,
                ) {
                    bucket.reserve(now, len);
                }
                let request = self.next_request;
                self.next_request = self.next_request.wrapping_add(1);
                fetch.ask(
                    piece,
                    InFlightRequest {
                        peer,
                        request,
                        at: now,
                    },
                );
                *under_way.entry(peer).or_default() += 1;
                self.asked.insert((peer, request), (*digest, piece, now));
                let task = *digest;
                self.outputs.push_back(Output::Download {
                    peer,
                    request,
                    task,
                    piece,
                    prefetch,
                    priority,
                });
                true
            });
        }
    }

    /// Tells children of new values and pieces.
    pub(super) fn tell(&mut self, now: Time, digest: &Digest) {
        let role = self.config.role;
        let due = |t: &&Task| t.tells_at(role).is_some_and(|at| at <= now);
        let Some(task) = self.tasks.get(digest).filter(due) else {
            return;
        };
        let issuer = task.is_issuer(role);
        // While there is more to come, what is new is not to wait behind what has spread.
        let holds_all = task
            .fetch
            .as_ref()
            .is_some_and(|fetch| fetch.held().is_full());
        let idle = self.uploads.is_idle(!holds_all);
        let mut elsewhere = BTreeMap::new();
        if issuer && task.offers.deals() {
            let others = self.tasks.iter().filter(|(other, _)| *other != digest);
            others.for_each(|(_, task)| task.offers.add_super_seeded(&mut elsewhere));
        }
        let Some(task) = self.tasks.get_mut(digest) else {
            return;
        };
        task.news = now;
        if let Some(failure) = task.phase.failure() {
            let reason = match failure {
                Failure::Status(status) => Refusal::Origin(status),
                Failure::UnknownLength => Refusal::Unable,
                _ => Refusal::OriginUnreachable,
            };
            self.turn_away(digest, reason);
            return;
        }
        if issuer {
            task.issue(&self.notary);
        }
        task.told = Some(task.news());
        if task.may_share() {
            let Some(size_bytes) = task.size_bytes() else {
                return;
            };
            let in_memory = task.memory.as_ref().map(Memory::kept);
            let Some(kept) = in_memory.as_ref().or(task.fetch.as_ref().map(Fetch::held)) else {
                return;
            };
            let count = kept.count();
            let told = task.offers.next(now, kept, issuer, idle, &elsewhere);
            let last = told
                .iter()
                .map(|(peer, pieces)| (*peer, pieces.iter().max().copied()));
            task.send_tables(now, digest, &last.collect(), &mut self.outputs);
            for (peer, pieces) in told {
                // Only those for whom it is brought are told that it is worked on.
                if issuer {
                    task.links.entry(peer).or_default().told = Some(now);
                }
                let offer = offer_of(count, pieces);
                self.outputs.push_back(Output::Send(
                    peer,
                    Message::Have {
                        task: *digest,
                        size_bytes,
                        offer,
                    },
                ));
            }
        }
        if task.is_running() && issuer {
            for peer in task.offers.children() {
                let link = task.links.entry(peer).or_default();
                if link
                    .told
                    .is_none_or(|at| now.since(at) >= SAY_WORKING_EVERY)
                {
                    link.told = Some(now);
                    self.outputs
                        .push_back(Output::Send(peer, Message::Working { task: *digest }));
                }
            }
        }
    }

    /// Fills the upload slots, and tells those who have waited for too long to ask elsewhere. [`Input::Decide`] does it as well;
    /// when all that came were requests, or the ends of uploads, nothing else follows.
    pub(super) fn serve(&mut self, now: Time) {
        if !self.uploads.is_waited_for() {
            return;
        }
        let overdue = self.uploads.overdue(now);
        self.shed(overdue);
        let mut held_back: BTreeSet<Digest> = BTreeSet::new();
        if self.task_rates.upload.is_some() {
            let busy = |(digest, task): (&Digest, &mut Task)| {
                (!task.pace.upload.is_free(now)).then_some(*digest)
            };
            held_back.extend(self.tasks.iter_mut().filter_map(busy));
        }
        loop {
            let tasks = &self.tasks;
            let slow = self.quotas.without_upload(now);
            let spread = |waiting: &Waiting| {
                tasks
                    .get(&waiting.task)
                    .map_or(0, |t| t.offers.spread(waiting.piece))
            };
            let is_slow = |waiting: &Waiting| {
                let link = tasks
                    .get(&waiting.task)
                    .and_then(|task| task.links.get(&waiting.peer));
                link.is_some_and(|link| {
                    slow.iter()
                        .any(|labels| labels.are_among(&link.purpose.labels))
                })
            };
            let may = |waiting: &Waiting| {
                !held_back.contains(&waiting.task) && (slow.is_empty() || !is_slow(waiting))
            };
            let Some(Waiting {
                peer,
                request,
                task,
                piece,
                ..
            }) = self.uploads.next(now, spread, may)
            else {
                break;
            };
            if let Some(state) = self.tasks.get_mut(&task)
                && let Some(len) = state.fetch.as_ref().map(|f| f.layout().len_bytes(piece))
            {
                if !state.pace.upload.reserve(now, len).is_zero() {
                    held_back.insert(task);
                }
                // It will not say so: it knows that it is known here.
                if !state.is_issuer(self.config.role) {
                    state.offers.holds(peer, [piece]);
                }
                if let Some(link) = state.links.get(&peer) {
                    self.quotas.upload(now, &link.purpose, len);
                }
            }
            self.outputs.push_back(Output::Upload {
                peer,
                request,
                task,
                piece,
            });
        }
    }
}

/// How many requests there are at each peer.
fn count_by_peer<'a>(requests: impl Iterator<Item = &'a (PeerId, u32)>) -> BTreeMap<PeerId, usize> {
    let mut counts = BTreeMap::new();
    requests.for_each(|(peer, _)| *counts.entry(*peer).or_default() += 1);
    counts
}

/// The shortest way to say it.
pub(super) fn offer_of(count: u32, pieces: Vec<PieceIndex>) -> Offer {
    if pieces.len() as u32 == count {
        Offer::All
    } else if pieces.len() as u32 > count.div_ceil(16) {
        let mut set = PieceSet::empty(count);
        pieces.iter().for_each(|piece| {
            set.insert(*piece);
        });
        Offer::Bits(set.to_bytes())
    } else {
        Offer::Some(pieces)
    }
}
