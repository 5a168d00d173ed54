//! One task's download: which piece to ask of which parent next.
//!
//! The rule, in order. First comes the piece that a waiting reader needs. Then comes, from a parent that is not busy
//! with this node, the piece that the fewest peers offer, so that copies of everything spread. At the very end a slow
//! piece is requested a second time. A piece that the piece table cannot verify yet is never requested. From parents
//! in other zones only this node's share is requested, and of that only pieces that nobody near offers.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::time::Duration;

use rand::{Rng, RngExt};

use crate::Time;
use crate::parents::Parents;
use crate::peers::PeerMap;
use crate::piece::{PeerId, PieceCounts, PieceIndex, PieceLayout, PieceSet};
use crate::share::Share;

/// Requests under way for one task that fill a link without planning too far ahead: a choice made early is a choice made on
/// stale news about which pieces are rare. More where pieces are so short that these would not fill a long way to one parent alone.
const REQUESTS_AIM: usize = 8;
const REQUESTS_AIM_BYTES: u64 = 4 << 20;

/// Requests under way at one parent at least. With as many parents as a swarm names, one request at each keeps both
/// links busy. A request that waits longer was chosen on staler news: 16 nodes with four layers were a tenth slower
/// with two.
const REQUESTS_A_PARENT_MIN: usize = 1;

/// How many pieces after a reader's position count as what it needs first.
const IN_ORDER_WINDOW: u32 = 2;

/// A sequential reader that has not moved for this long comes before rarity. It keeps clients far from their own deadlines
/// (the shortest known is 20 s without a byte) while leaving most choices to rarity.
const READER_PATIENCE: Duration = Duration::from_secs(1);

/// A reader that has not moved on from a piece in memory for this long holds no memory any more: it reads the origin by itself when
/// it comes back.
const READER_STANDS_STILL_AFTER: Duration = Duration::from_secs(5);

/// How long a request is left alone before the endgame doubles it, at least; and as a multiple of what the piece should take.
const HEDGE_AFTER_MIN: Duration = Duration::from_millis(300);
const HEDGE_AFTER_FACTOR: f64 = 2.0;

/// The endgame: this few pieces are missing. Earlier, a slow request costs nothing that others don't make up for, and a double
/// costs a piece of somebody's uplink; then only what looks stalled is doubled.
const ENDGAME_PIECES: u32 = 6;
const STALLED_AFTER: Duration = Duration::from_secs(4);

/// No parent counts for less than this part of the fastest: an old measurement may be wrong by now.
const SLOWEST: f64 = 0.1;

/// Candidates looked at for the rarest: enough to see all of a common layer or find something rare in it, and a bound for huge ones.
const CANDIDATES: usize = 256;

/// A piece asked of a parent and not yet there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InFlightRequest {
    /// The parent.
    pub peer: PeerId,
    /// Under which number.
    pub request: u32,
    /// When.
    pub at: Time,
}

/// A client's position in the blob.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Reader {
    pieces: Range<PieceIndex>,
    /// It reads a part only: the pieces it waits for always come first.
    partial: bool,
    /// The pieces it reads after `pieces`: further parts, in any order.
    ahead: Option<PieceSet>,
    moved: Time,
}

impl Reader {
    /// It has left a piece lying that is there for it.
    fn stands_still(&self, now: Time, since: &impl Fn(PieceIndex) -> Option<Time>) -> bool {
        let there_since = since(self.pieces.start);
        there_since.is_some_and(|at| now.since(at.max(self.moved)) >= READER_STANDS_STILL_AFTER)
    }

    fn wants(&self, piece: PieceIndex) -> bool {
        self.pieces.contains(&piece)
            || self
                .ahead
                .as_ref()
                .is_some_and(|ahead| ahead.contains(piece))
    }
}

/// A parent, as far as this task goes.
#[derive(Clone, Debug)]
struct Parent {
    offered: PieceSet,
    /// It is busy: nothing is asked of it before this moment.
    rests_until: Time,
}

/// A parent that may be asked now.
struct Ready<'a> {
    peer: PeerId,
    /// Of what it offers, what may be asked of it.
    offered: Cow<'a, PieceSet>,
    /// Shunned, no issuer with news, far, requests at it, a lot: the lowest is asked first.
    rank: (bool, bool, bool, usize, u64),
    /// There are fewer requests at it than it needs to be busy.
    has_room: bool,
}

/// The state of one download.
#[derive(Clone, Debug)]
pub struct Fetch {
    layout: PieceLayout,
    held: PieceSet,
    /// Every piece is wanted, reader or not.
    whole: bool,
    /// Only pieces in here may be requested: the pieces of this task are held in memory, not on disk.
    window: Option<Range<PieceIndex>>,
    readers: BTreeMap<u64, Reader>,
    parents: PeerMap<Parent>,
    /// The peers that offer each new piece to one child only.
    issuers: BTreeSet<PeerId>,
    /// The peers in other zones, parents or not.
    far: BTreeSet<PeerId>,
    share: Share,
    /// How many parents offer each piece, which pieces any does, and which only one.
    offers: PieceCounts,
    available: PieceSet,
    lone: PieceSet,
    asked: BTreeMap<PieceIndex, Vec<InFlightRequest>>,
    asked_set: PieceSet,
    asked_bytes: u64,
    /// Duplicate requests made in the endgame so far.
    duplicates: u64,
}

impl Fetch {
    /// A download that holds `held` already.
    pub fn new(layout: PieceLayout, held: PieceSet) -> Self {
        let count = layout.count();
        Self {
            layout,
            held,
            whole: false,
            window: None,
            readers: BTreeMap::new(),
            parents: PeerMap::default(),
            issuers: BTreeSet::new(),
            far: BTreeSet::new(),
            share: Share::ALL,
            offers: PieceCounts::new(count),
            available: PieceSet::empty(count),
            lone: PieceSet::empty(count),
            asked: BTreeMap::new(),
            asked_set: PieceSet::empty(count),
            asked_bytes: 0,
            duplicates: 0,
        }
    }

    /// The pieces held: verified.
    pub const fn held(&self) -> &PieceSet {
        &self.held
    }

    /// How the task is cut.
    pub const fn layout(&self) -> PieceLayout {
        self.layout
    }

    /// Bytes asked for and not there yet.
    pub const fn asked_bytes(&self) -> u64 {
        self.asked_bytes
    }

    /// Requests doubled in the endgame so far.
    pub const fn duplicates(&self) -> u64 {
        self.duplicates
    }

    /// From now on everything is wanted, or only what readers read.
    pub const fn want_whole(&mut self, whole: bool) {
        self.whole = whole;
    }

    /// From now on nothing outside these pieces is asked for.
    pub fn keep_within(&mut self, window: Range<PieceIndex>) {
        self.window = Some(window);
    }

    /// A peer stands in another zone, or in this one.
    pub fn is_far(&mut self, peer: PeerId, far: bool) {
        match far {
            true => self.far.insert(peer),
            false => self.far.remove(&peer),
        };
    }

    /// Sets the share of pieces to fetch from peers in other zones.
    pub const fn share(&mut self, share: Share) {
        self.share = share;
    }

    /// A reader has come, moved, or (`None`) gone. `partial`: it reads a range.
    pub fn reader(&mut self, now: Time, id: u64, pieces: Option<Range<PieceIndex>>, partial: bool) {
        match pieces {
            Some(pieces) => {
                self.readers.insert(
                    id,
                    Reader {
                        pieces,
                        partial,
                        ahead: None,
                        moved: now,
                    },
                );
            }
            None => {
                self.readers.remove(&id);
            }
        }
    }

    /// Sets the pieces that a reader, announced just before, reads next.
    pub fn reads_ahead(&mut self, id: u64, pieces: PieceSet) {
        if let Some(reader) = self.readers.get_mut(&id) {
            reader.ahead = Some(pieces);
        }
    }

    /// Whether anybody reads.
    pub fn has_readers(&self) -> bool {
        !self.readers.is_empty()
    }

    /// Whether a piece is still to be got.
    pub fn wants(&self, piece: PieceIndex) -> bool {
        !self.held.contains(piece)
            && piece < self.layout.count()
            && (self.whole || self.readers.values().any(|r| r.wants(piece)))
    }

    /// Whether a piece is here or asked for.
    pub fn is_on_its_way(&self, piece: PieceIndex) -> bool {
        self.held.contains(piece) || self.asked_set.contains(piece)
    }

    /// Whether anything is still to be got.
    pub fn is_wanting(&self) -> bool {
        self.first_wanted().is_some()
    }

    /// The first piece that is still to be got.
    pub fn first_wanted(&self) -> Option<PieceIndex> {
        let after = |from: PieceIndex, end: PieceIndex| {
            Some(self.held.first_missing(from)).filter(|p| *p < end)
        };
        if self.whole {
            return after(0, self.layout.count());
        }
        let next = self
            .readers
            .values()
            .filter_map(|r| after(r.pieces.start, r.pieces.end));
        let ahead = self
            .readers
            .values()
            .filter_map(|r| r.ahead.as_ref()?.minus(&self.held).next());
        next.chain(ahead).min()
    }

    /// A piece is there, verified; the requests for it that are now for nothing.
    pub fn got(&mut self, piece: PieceIndex) -> Vec<InFlightRequest> {
        self.held.insert(piece);
        let rest = self.asked.remove(&piece).unwrap_or_default();
        rest.iter().for_each(|_| self.settle(piece));
        self.asked_set.remove(piece);
        rest
    }

    /// A piece that was held is not any more.
    pub fn lost(&mut self, piece: PieceIndex) {
        self.held.remove(piece);
    }

    /// Whether a reader that moves still reads `piece`. A reader stands still when it leaves a piece lying that is there for it:
    /// `since` says since when a piece has been.
    pub fn is_read(
        &self,
        now: Time,
        piece: PieceIndex,
        since: impl Fn(PieceIndex) -> Option<Time>,
    ) -> bool {
        self.readers
            .values()
            .any(|reader| reader.wants(piece) && !reader.stands_still(now, &since))
    }

    /// The first piece that a reader which moves still reads.
    pub fn read_first(
        &self,
        now: Time,
        since: impl Fn(PieceIndex) -> Option<Time>,
    ) -> Option<PieceIndex> {
        let moving = self
            .readers
            .values()
            .filter(|reader| !reader.stands_still(now, &since));
        moving.map(|reader| reader.pieces.start).min()
    }

    /// Whether a reader lacks one of the next pieces. A reader that stands still has had them.
    pub fn has_readers_in_want(&self) -> bool {
        let lacks = |piece| piece < self.layout.count() && !self.held.contains(piece);
        self.readers
            .values()
            .any(|reader| (reader.pieces.start..reader.pieces.start + IN_ORDER_WINDOW).any(lacks))
    }

    /// The first piece that is missing and that no parent which will do offers; `None` when parents can bring all that is missing.
    pub fn first_offered_by_nobody(
        &self,
        verifiable: u32,
        will_do: impl Fn(PeerId) -> bool,
    ) -> Option<PieceIndex> {
        let mut offered = PieceSet::empty(self.layout.count());
        self.parents
            .iter()
            .filter(|(peer, _)| will_do(**peer))
            .for_each(|(_, parent)| offered.unite(&parent.offered));
        self.held
            .missing()
            .find(|piece| *piece >= verifiable || !offered.contains(*piece))
    }

    /// `peer` offers these pieces, in addition to what it offered before.
    pub fn offered(&mut self, peer: PeerId, pieces: impl IntoIterator<Item = PieceIndex>) {
        let count = self.layout.count();
        let parent = self.parents.entry(peer).or_insert_with(|| Parent {
            offered: PieceSet::empty(count),
            rests_until: Time::default(),
        });
        for piece in pieces {
            if parent.offered.insert(piece) {
                let offers = self.offers.add(piece);
                self.available.insert(piece);
                note_lone(&mut self.lone, piece, offers);
            }
        }
    }

    /// `peer` issues the task to the others: it offers each new piece to one child only.
    pub fn issues(&mut self, peer: PeerId) {
        self.issuers.insert(peer);
    }

    /// `peer` offers this one no more.
    pub fn withdrawn(&mut self, peer: PeerId, piece: PieceIndex) {
        if self
            .parents
            .get_mut(&peer)
            .is_some_and(|p| p.offered.remove(piece))
        {
            self.one_fewer(piece);
        }
    }

    fn one_fewer(&mut self, piece: PieceIndex) {
        let offers = self.offers.subtract(piece);
        if offers == 0 {
            self.available.remove(piece);
        }
        note_lone(&mut self.lone, piece, offers);
    }

    /// Leaves a parent alone for a while.
    pub fn rest(&mut self, peer: PeerId, until: Time) {
        if let Some(parent) = self.parents.get_mut(&peer) {
            parent.rests_until = until;
        }
    }

    /// A parent is gone, and with it its requests.
    pub fn parent_lost(&mut self, peer: PeerId) {
        if let Some(parent) = self.parents.remove(&peer) {
            parent
                .offered
                .iter()
                .for_each(|piece| self.one_fewer(piece));
        }
        let theirs: Vec<(PieceIndex, u32)> = self
            .asked
            .iter()
            .flat_map(|(piece, all)| {
                all.iter()
                    .filter(|a| a.peer == peer)
                    .map(|a| (*piece, a.request))
            })
            .collect();
        for (piece, request) in theirs {
            self.failed(piece, peer, request);
        }
    }

    /// The pieces that `peer` offers; `None` when it is no parent.
    pub fn offers_of(&self, peer: PeerId) -> Option<&PieceSet> {
        self.parents.get(&peer).map(|p| &p.offered)
    }

    /// How many parents offer `piece`.
    pub fn rarity(&self, piece: PieceIndex) -> u16 {
        self.offers.get(piece)
    }

    /// Whether a parent, of those that will do, offers something that is wanted.
    pub fn has_useful_parent(&self, will_do: impl Fn(PeerId) -> bool) -> bool {
        let wanted = self.open(self.layout.count(), None);
        self.parents
            .iter()
            .any(|(peer, p)| p.offered.meets(&wanted) && will_do(*peer))
    }

    /// Whether a piece is under way from a parent that can be counted on.
    pub fn is_moving(&self, now: Time, parents: &Parents) -> bool {
        self.asked
            .values()
            .flatten()
            .any(|asked| parents.trusted(now, asked.peer))
    }

    /// A request was sent.
    pub fn ask(&mut self, piece: PieceIndex, asked: InFlightRequest) {
        let all = self.asked.entry(piece).or_default();
        self.duplicates += u64::from(!all.is_empty());
        all.push(asked);
        self.asked_set.insert(piece);
        self.asked_bytes += self.layout.len_bytes(piece);
    }

    /// A request came to nothing.
    pub fn failed(&mut self, piece: PieceIndex, peer: PeerId, request: u32) {
        let Some(all) = self.asked.get_mut(&piece) else {
            return;
        };
        let before = all.len();
        all.retain(|a| (a.peer, a.request) != (peer, request));
        let gone = all.len() < before;
        if all.is_empty() {
            self.asked.remove(&piece);
            self.asked_set.remove(piece);
        }
        if gone {
            self.settle(piece);
        }
    }

    fn settle(&mut self, piece: PieceIndex) {
        self.asked_bytes = self
            .asked_bytes
            .saturating_sub(self.layout.len_bytes(piece));
    }

    /// The next request to make, if any: of whom, and which piece. `under_way`: requests at each parent, for whatever task: a
    /// link is shared by all layers that come over it, and what is asked for early is chosen on stale news. `verifiable`: pieces
    /// below it can be verified; `taken`: the piece that is just being read from the origin.
    pub fn choose<R: Rng + ?Sized>(
        &self,
        now: Time,
        parents: &Parents,
        under_way: &BTreeMap<PeerId, usize>,
        verifiable: u32,
        taken: Option<PieceIndex>,
        rng: &mut R,
    ) -> Option<(PeerId, PieceIndex)> {
        let a_parent = (self.requests_aim() / self.parents.len().max(1)).max(REQUESTS_A_PARENT_MIN);
        let open = self.open(verifiable, taken);
        let mut unasked = open.clone();
        unasked.subtract(&self.asked_set);
        unasked.intersect(&self.available);
        let overdue = self.overdue(now, parents, &open);
        // Often all that is on offer is here or on its way.
        if unasked.is_empty() && overdue.is_empty() {
            return None;
        }
        let mut lone = unasked.clone();
        lone.intersect(&self.lone);
        // Most parents have a request already: these are skipped. A piece that one parent alone offers is requested
        // beyond the limit, since nobody else can begin to spread it.
        let free: Vec<(&PeerId, &Parent, usize, Option<f64>)> = self
            .parents
            .iter()
            .map(|(peer, parent)| (peer, parent, under_way.get(peer).copied().unwrap_or(0)))
            .filter(|(_, parent, asked)| {
                *asked < a_parent || *asked < 2 * a_parent && parent.offered.meets(&lone)
            })
            .filter(|(peer, parent, _)| parent.rests_until <= now && !parents.banned(now, **peer))
            .map(|(peer, parent, asked)| (peer, parent, asked, parents.rate_bytes(*peer)))
            .collect();
        if free.is_empty() {
            return None;
        }
        let mut useful = unasked.clone();
        overdue.iter().for_each(|(piece, _)| {
            useful.insert(*piece);
        });
        let fastest = free
            .iter()
            .filter_map(|(.., rate)| *rate)
            .fold(1.0, f64::max);
        let near = self.near();
        let mut ready: Vec<Ready<'_>> = free
            .into_iter()
            .map(|(peer, parent, asked, rate)| {
                (peer, self.from(peer, parent, near.as_ref()), asked, rate)
            })
            .filter(|(_, offered, asked, _)| {
                offered.meets(if *asked < a_parent { &useful } else { &lone })
            })
            .map(|(peer, offered, asked, rate)| Ready {
                peer: *peer,
                // The least busy parent first, and by lot among equals, so that children do not all start at the same
                // parent. A parent that brings twice as much is first four times as often. The measurement counts from
                // the request on: a parent with many children gives little to each. An issuer that has something new
                // for this node comes before all, since a piece that is not fetched from it spreads nowhere.
                rank: (
                    parents.shunned(now, *peer),
                    !(self.issuers.contains(peer) && offered.meets(&lone)),
                    self.far.contains(peer),
                    asked,
                    lot(rate, fastest, rng),
                ),
                offered,
                has_room: asked < a_parent,
            })
            .collect();
        if ready.is_empty() {
            return None;
        }
        ready.sort_unstable_by_key(|parent| parent.rank);
        let with_room = |piece: PieceIndex, but: Option<PeerId>| {
            let fits =
                |p: &&Ready<'_>| p.has_room && Some(p.peer) != but && p.offered.contains(piece);
            ready.iter().find(fits).map(|p| (p.peer, piece))
        };
        let rarest_of = |parent: &Ready<'_>, wanted: &PieceSet, rng: &mut R| {
            let mut theirs = wanted.clone();
            theirs.intersect(&parent.offered);
            self.rarest(&theirs, rng).map(|piece| (parent.peer, piece))
        };
        let needed = self
            .needed_first(now, &unasked)
            .find_map(|piece| with_room(piece, None));
        if needed.is_some() {
            return needed;
        }
        // The parent first, then the rarest of what it has: to ask for the rarest of all is to wait, with everybody else, for the few
        // who have it, while the links of all others idle.
        let mut with_all = ready.iter().filter(|parent| parent.has_room);
        with_all
            .find_map(|parent| rarest_of(parent, &unasked, rng))
            .or_else(|| {
                let mut busy = ready.iter().filter(|parent| !parent.has_room);
                busy.find_map(|parent| rarest_of(parent, &lone, rng))
            })
            .or_else(|| {
                overdue
                    .iter()
                    .find_map(|(piece, slow)| with_room(*piece, Some(*slow)))
            })
    }

    /// Requests to have under way at all parents together.
    fn requests_aim(&self) -> usize {
        REQUESTS_AIM.max((REQUESTS_AIM_BYTES / self.layout.piece_bytes()) as usize)
    }

    /// Pieces this node must not fetch from other zones, if there are any: shards of other gateways, and pieces
    /// offered within the zone.
    fn near(&self) -> Option<PieceSet> {
        if self.far.is_empty() || self.share == Share::ALL {
            return None;
        }
        let count = self.layout.count();
        let mut near = PieceSet::empty(count);
        (0..count)
            .filter(|piece| !self.share.contains(*piece))
            .for_each(|piece| {
                near.insert(piece);
            });
        let here = self
            .parents
            .iter()
            .filter(|(peer, _)| !self.far.contains(*peer));
        here.for_each(|(_, parent)| near.unite(&parent.offered));
        Some(near)
    }

    /// Of what a parent offers, what may be asked of it.
    fn from<'a>(
        &self,
        peer: &PeerId,
        parent: &'a Parent,
        near: Option<&PieceSet>,
    ) -> Cow<'a, PieceSet> {
        match near.filter(|_| self.far.contains(peer)) {
            None => Cow::Borrowed(&parent.offered),
            Some(near) => {
                let mut offered = parent.offered.clone();
                offered.subtract(near);
                Cow::Owned(offered)
            }
        }
    }

    /// The pieces that are wanted and may be asked for: they can be verified, and are not just being read from the origin.
    fn open(&self, verifiable: u32, taken: Option<PieceIndex>) -> PieceSet {
        let mut open = PieceSet::empty(self.layout.count());
        if self.whole {
            open.insert_range(0..verifiable);
        } else {
            for reader in self.readers.values() {
                open.insert_range(reader.pieces.start..reader.pieces.end.min(verifiable));
                if let Some(ahead) = &reader.ahead {
                    for piece in ahead.iter().take_while(|piece| *piece < verifiable) {
                        open.insert(piece);
                    }
                }
            }
        }
        if let Some(window) = &self.window {
            let mut within = PieceSet::empty(self.layout.count());
            within.insert_range(window.clone());
            open.intersect(&within);
        }
        open.subtract(&self.held);
        if let Some(taken) = taken {
            open.remove(taken);
        }
        open
    }

    /// The requestable pieces that readers wait for.
    fn needed_first(&self, now: Time, unasked: &PieceSet) -> impl Iterator<Item = PieceIndex> {
        self.readers
            .values()
            .filter(move |r| {
                r.partial || r.pieces.start == 0 || now.since(r.moved) >= READER_PATIENCE
            })
            .flat_map(|r| {
                let from = self.held.first_missing(r.pieces.start);
                from..from.saturating_add(IN_ORDER_WINDOW).min(r.pieces.end)
            })
            .filter(|piece| unasked.contains(*piece))
    }

    /// The piece that the fewest offer; among equals the first when there is one parent, by lot when there are several.
    fn rarest<R: Rng + ?Sized>(&self, offered: &PieceSet, rng: &mut R) -> Option<PieceIndex> {
        let alone = self.parents.len() < 2;
        let from = if alone {
            0
        } else {
            rng.random_range(0..self.layout.count().max(1))
        };
        offered
            .iter_from(from)
            .take(if alone { 1 } else { CANDIDATES })
            .min_by_key(|piece| self.offers.get(*piece))
    }

    /// Pieces that the parent who was asked takes too long over, the slowest first. Each is doubled once at most.
    fn overdue(&self, now: Time, parents: &Parents, open: &PieceSet) -> Vec<(PieceIndex, PeerId)> {
        let endgame = self.layout.count() - self.held.len() <= ENDGAME_PIECES;
        let mut overdue: Vec<(Duration, PieceIndex, PeerId)> = self
            .asked
            .iter()
            .filter(|(piece, all)| all.len() == 1 && open.contains(**piece))
            .map(|(piece, all)| (now.since(all[0].at), *piece, all[0].peer))
            .filter(|(waited, piece, peer)| {
                *waited
                    >= if endgame {
                        self.hedge_after(*piece, *peer, parents)
                    } else {
                        STALLED_AFTER
                    }
            })
            .collect();
        overdue.sort_unstable_by(|a, b| b.cmp(a));
        overdue
            .into_iter()
            .map(|(_, piece, peer)| (piece, peer))
            .collect()
    }

    fn hedge_after(&self, piece: PieceIndex, peer: PeerId, parents: &Parents) -> Duration {
        let expected = parents
            .rate_bytes(peer)
            .map_or(0.0, |rate| self.layout.len_bytes(piece) as f64 / rate);
        HEDGE_AFTER_MIN.max(Duration::from_secs_f64(
            (expected * HEDGE_AFTER_FACTOR).min(20.0),
        ))
    }
}

/// A lot for a parent. The lot of a parent is the lowest of several with the probability rate² / sum of all rates²,
/// like the time until the next of several random events. With the plain rate each parent would have as many requests
/// under way, and the end of a download would wait for the slow parents. A parent that has brought nothing yet counts
/// as the fastest.
fn lot<R: Rng + ?Sized>(rate_bytes: Option<f64>, fastest: f64, rng: &mut R) -> u64 {
    let chance: f64 = 1.0 - rng.random::<f64>();
    let weight = (rate_bytes.unwrap_or(fastest) / fastest)
        .max(SLOWEST)
        .powi(2);
    // Large enough to tell lots of the fastest apart.
    (-chance.ln() / weight * 1e9) as u64
}

/// Keeps the set of pieces that exactly one parent offers.
fn note_lone(lone: &mut PieceSet, piece: PieceIndex, offers: u16) {
    if offers == 1 {
        lone.insert(piece);
    } else {
        lone.remove(piece);
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand::rngs::StdRng;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn peer(n: u8) -> PeerId {
        PeerId([n; 16])
    }

    /// A download of 20 pieces, all wanted, and what each parent offers.
    fn fetch(offers: &[(u8, &[PieceIndex])]) -> Fetch {
        let layout = PieceLayout::new(5 * MIB);
        let mut fetch = Fetch::new(layout, PieceSet::empty(layout.count()));
        fetch.want_whole(true);
        for (parent, pieces) in offers {
            fetch.offered(peer(*parent), pieces.iter().copied());
        }
        fetch
    }

    fn chosen(fetch: &Fetch, under_way: &[(u8, usize)], seed: u64) -> Option<(PeerId, PieceIndex)> {
        let under_way = under_way
            .iter()
            .map(|(parent, n)| (peer(*parent), *n))
            .collect();
        let mut rng = StdRng::seed_from_u64(seed);
        fetch.choose(
            Time::default(),
            &Parents::default(),
            &under_way,
            fetch.layout().count(),
            None,
            &mut rng,
        )
    }

    #[test]
    fn of_the_least_busy_parents_any_is_asked_for_the_rarest_piece_that_it_has() {
        let fetch = fetch(&[(1, &[5, 6, 7]), (2, &[5, 6]), (3, &[6, 7, 8])]);
        let mut all = BTreeSet::new();
        for seed in 0..200 {
            all.extend(chosen(&fetch, &[], seed));
            let (asked, piece) = chosen(&fetch, &[(3, 4)], seed).unwrap();
            assert!(
                asked != peer(3) && [5, 7].contains(&piece),
                "{asked} {piece}: the third is busy"
            );
        }
        assert_eq!(
            all,
            BTreeSet::from([(peer(1), 5), (peer(1), 7), (peer(2), 5), (peer(3), 8)])
        );
    }

    #[test]
    fn a_parent_that_brings_thrice_as_much_is_asked_first_nine_times_as_often() {
        let fetch = fetch(&[(1, &[5, 6]), (2, &[5, 6])]);
        let mut parents = Parents::default();
        parents.served(peer(1), 30 * MIB, Duration::from_secs(1));
        parents.served(peer(2), 10 * MIB, Duration::from_secs(1));
        let mut rng = StdRng::seed_from_u64(1);
        let first = |parents: &Parents, rng: &mut StdRng| {
            let free = BTreeMap::new();
            let asked = (0..2000)
                .filter_map(|_| fetch.choose(Time::default(), parents, &free, 20, None, rng));
            asked.filter(|(asked, _)| *asked == peer(1)).count()
        };
        let often = first(&parents, &mut rng);
        assert!((1740..1860).contains(&often), "{often}");
        let mut parents = Parents::default();
        parents.served(peer(1), 30 * MIB, Duration::from_secs(1));
        let often = first(&parents, &mut rng);
        assert!(
            (900..1100).contains(&often),
            "{often}: who is not known yet counts as the fastest"
        );
        parents.served(peer(2), 1, Duration::from_secs(1));
        let often = first(&parents, &mut rng);
        assert!(often < 1995, "{often}: nobody is given up");
    }

    #[test]
    fn an_issuer_with_something_new_is_asked_before_all_others() {
        let mut fetch = fetch(&[(1, &[5, 6]), (2, &[5, 7]), (3, &[6, 7])]);
        fetch.issues(peer(2));
        fetch.offered(peer(2), [8]);
        assert!((0..20).all(|seed| chosen(&fetch, &[], seed) == Some((peer(2), 8))));
        fetch.got(8);
        assert!(
            (0..20).any(|seed| chosen(&fetch, &[], seed).unwrap().0 != peer(2)),
            "it has nothing new"
        );
    }

    #[test]
    fn what_one_parent_alone_has_is_asked_for_beyond_its_limit_but_not_without_end() {
        let fetch = fetch(&[(1, &[5, 6]), (2, &[5])]);
        let limit = fetch.requests_aim() / 2;
        let busy = |n| [(1, n), (2, 2 * limit)];
        assert_eq!(chosen(&fetch, &busy(limit), 0), Some((peer(1), 6)));
        assert_eq!(chosen(&fetch, &busy(2 * limit), 0), None);
    }

    #[test]
    fn a_slow_piece_is_doubled_at_another_parent_once_when_few_are_missing() {
        let mut fetch = fetch(&[(1, &[19]), (2, &[19])]);
        (0..19).for_each(|piece| drop(fetch.got(piece)));
        fetch.ask(
            19,
            InFlightRequest {
                peer: peer(1),
                request: 1,
                at: Time::default(),
            },
        );
        let choose = |fetch: &Fetch, now| {
            let under_way = BTreeMap::from([(peer(1), 1)]);
            fetch.choose(
                now,
                &Parents::default(),
                &under_way,
                20,
                None,
                &mut StdRng::seed_from_u64(1),
            )
        };
        assert_eq!(choose(&fetch, Time::default()), None, "it is not late");
        let late = Time(HEDGE_AFTER_MIN);
        assert_eq!(choose(&fetch, late), Some((peer(2), 19)));
        fetch.ask(
            19,
            InFlightRequest {
                peer: peer(2),
                request: 2,
                at: late,
            },
        );
        assert_eq!(
            choose(&fetch, Time(2 * HEDGE_AFTER_MIN)),
            None,
            "two are enough"
        );
        assert_eq!(fetch.duplicates(), 1);
    }

    #[test]
    fn nothing_is_asked_for_that_is_held_asked_for_unverifiable_or_outside_the_window() {
        let mut fetch = fetch(&[(1, &[2, 3, 4, 9])]);
        fetch.got(2);
        fetch.ask(
            3,
            InFlightRequest {
                peer: peer(1),
                request: 1,
                at: Time::default(),
            },
        );
        let choose = |fetch: &Fetch, verifiable, taken| {
            let mut rng = StdRng::seed_from_u64(1);
            let free = BTreeMap::new();
            fetch.choose(
                Time::default(),
                &Parents::default(),
                &free,
                verifiable,
                taken,
                &mut rng,
            )
        };
        assert_eq!(choose(&fetch, 9, None), Some((peer(1), 4)));
        assert_eq!(choose(&fetch, 4, None), None);
        assert_eq!(choose(&fetch, 20, Some(4)), Some((peer(1), 9)));
        fetch.keep_within(0..9);
        assert_eq!(choose(&fetch, 20, Some(4)), None);
    }

    #[test]
    fn what_a_reader_waits_for_comes_before_what_is_rare() {
        let mut fetch = fetch(&[(1, &[0, 1, 7]), (2, &[0, 1])]);
        fetch.want_whole(false);
        fetch.reader(Time::default(), 1, Some(0..20), false);
        for seed in 0..20 {
            assert_eq!(chosen(&fetch, &[], seed).map(|(_, piece)| piece), Some(0));
        }
        fetch.reader(Time::default(), 1, Some(8..20), false);
        assert_eq!(
            chosen(&fetch, &[], 0),
            None,
            "nobody reads what is on offer"
        );
    }

    #[test]
    fn a_parent_that_rests_or_lied_is_asked_for_nothing() {
        let mut fetch = fetch(&[(1, &[5])]);
        let mut parents = Parents::default();
        let mut rng = StdRng::seed_from_u64(1);
        let free = BTreeMap::new();
        let (now, later) = (Time::default(), Time(Duration::from_secs(2)));
        fetch.rest(peer(1), Time(Duration::from_secs(1)));
        assert_eq!(fetch.choose(now, &parents, &free, 20, None, &mut rng), None);
        assert!(
            fetch
                .choose(later, &parents, &free, 20, None, &mut rng)
                .is_some()
        );
        parents.punish(later, peer(1), crate::parents::Fault::WrongBytes);
        assert_eq!(
            fetch.choose(later, &parents, &free, 20, None, &mut rng),
            None
        );
    }

    #[test]
    fn of_a_parent_elsewhere_only_what_nobody_here_offers_and_is_this_node_s_share_is_asked_for() {
        let mut fetch = fetch(&[(1, &[1, 9]), (2, &[0, 1, 2, 9, 17])]);
        fetch.is_far(peer(2), true);
        fetch.share(Share::of([1]));
        let all = |fetch: &Fetch, busy| {
            (0..50)
                .filter_map(|seed| chosen(fetch, busy, seed))
                .collect::<BTreeSet<_>>()
        };
        let busy = [(1, fetch.requests_aim())];
        assert_eq!(all(&fetch, &busy), BTreeSet::from([(peer(2), 17)]));
        assert!(
            all(&fetch, &[])
                .iter()
                .all(|(parent, _)| *parent == peer(1)),
            "near ones go first"
        );
        fetch.share(Share::NONE);
        assert_eq!(all(&fetch, &busy), BTreeSet::new());
        fetch.share(Share::ALL);
        assert_eq!(
            all(&fetch, &busy),
            [0, 2, 17].map(|piece| (peer(2), piece)).into(),
            "its own zone did not suffice"
        );
    }
}
