//! One task's download: which piece to ask of which parent next.
//!
//! The rule, in order: what a waiting reader needs first; then the piece that the fewest peers offer, so that copies of
//! everything spread; at the very end a second request for what is slow to come. Nothing is asked for that the piece table
//! cannot verify yet.

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::Duration;

use rand::{Rng, RngExt};

use crate::Time;
use crate::parents::Parents;
use crate::piece::{PeerId, PieceIndex, PieceLayout, PieceSet};

/// Requests under way for one task that fill a link without planning too far ahead: a choice made early is a choice made on
/// stale news about which pieces are rare.
const REQUESTS_AIM: usize = 8;

/// Requests under way at one parent at least: one being served and one waiting, so that it never idles for a round trip.
const REQUESTS_A_PARENT_MIN: usize = 2;

/// How many pieces after a reader's position count as what it needs first.
const IN_ORDER_WINDOW: u32 = 2;

/// A sequential reader that has not moved for this long comes before rarity. It keeps clients far from their own deadlines
/// (the shortest known is 20 s without a byte) while leaving most choices to rarity.
const READER_PATIENCE: Duration = Duration::from_secs(1);

/// How long a request is left alone before the endgame doubles it, at least; and as a multiple of what the piece should take.
const HEDGE_AFTER_MIN: Duration = Duration::from_millis(300);
const HEDGE_AFTER_FACTOR: f64 = 2.0;

/// The endgame: this few pieces are missing. Earlier, a slow request costs nothing that others don't make up for, and a double
/// costs a piece of somebody's uplink; then only what looks stalled is doubled.
const ENDGAME_PIECES: u32 = 6;
const STALLED_AFTER: Duration = Duration::from_secs(4);

/// Candidates looked at for the rarest: enough to see all of a common layer, and a bound for huge ones.
const CANDIDATES: usize = 256;

/// A piece asked of a parent and not yet there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Asked {
    /// Whom.
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
    /// Reads a part only: what it waits for always comes first.
    partial: bool,
    /// What it reads after `pieces`: further parts, in whatever order.
    ahead: Option<PieceSet>,
    moved: Time,
}

impl Reader {
    fn wants(&self, piece: PieceIndex) -> bool {
        self.pieces.contains(&piece) || self.ahead.as_ref().is_some_and(|ahead| ahead.contains(piece))
    }
}

/// A parent, as far as this task goes.
#[derive(Clone, Debug)]
struct Parent {
    offered: PieceSet,
    /// It is busy: nothing is asked of it before this moment.
    rests_until: Time,
}

/// The state of one download.
#[derive(Clone, Debug)]
pub struct Fetch {
    layout: PieceLayout,
    held: PieceSet,
    /// Every piece is wanted, reader or not.
    whole: bool,
    /// Only pieces in here may be asked for: what is held does not go to the disk.
    window: Option<Range<PieceIndex>>,
    readers: BTreeMap<u64, Reader>,
    parents: BTreeMap<PeerId, Parent>,
    /// How many parents offer each piece.
    offers: Vec<u16>,
    asked: BTreeMap<PieceIndex, Vec<Asked>>,
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
            parents: BTreeMap::new(),
            offers: vec![0; count as usize],
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

    /// A reader has come, moved, or (`None`) gone. `partial`: it reads a range.
    pub fn reader(&mut self, now: Time, id: u64, pieces: Option<Range<PieceIndex>>, partial: bool) {
        match pieces {
            Some(pieces) => {
                self.readers.insert(id, Reader { pieces, partial, ahead: None, moved: now });
            }
            None => {
                self.readers.remove(&id);
            }
        }
    }

    /// What a reader, who has just been told of, reads after that.
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

    /// Whether anything is still to be got.
    pub fn is_wanting(&self) -> bool {
        self.first_wanted().is_some()
    }

    /// The first piece that is still to be got.
    pub fn first_wanted(&self) -> Option<PieceIndex> {
        let after =
            |from: PieceIndex, end: PieceIndex| Some(self.held.first_missing(from)).filter(|p| *p < end);
        if self.whole {
            return after(0, self.layout.count());
        }
        let next = self.readers.values().filter_map(|r| after(r.pieces.start, r.pieces.end));
        let ahead = self.readers.values().filter_map(|r| r.ahead.as_ref()?.minus(&self.held).next());
        next.chain(ahead).min()
    }

    /// A piece is there, verified; the requests for it that are now for nothing.
    pub fn got(&mut self, piece: PieceIndex) -> Vec<Asked> {
        self.held.insert(piece);
        let rest = self.asked.remove(&piece).unwrap_or_default();
        rest.iter().for_each(|_| self.settle(piece));
        self.asked_set.remove(piece);
        rest
    }

    /// `peer` offers these pieces, in addition to what it offered before.
    pub fn offered(&mut self, peer: PeerId, pieces: impl IntoIterator<Item = PieceIndex>) {
        let count = self.layout.count();
        let parent = self
            .parents
            .entry(peer)
            .or_insert_with(|| Parent { offered: PieceSet::empty(count), rests_until: Time::default() });
        for piece in pieces {
            if parent.offered.insert(piece) {
                self.offers[piece as usize] = self.offers[piece as usize].saturating_add(1);
            }
        }
    }

    /// `peer` offers this one no more.
    pub fn withdrawn(&mut self, peer: PeerId, piece: PieceIndex) {
        if self.parents.get_mut(&peer).is_some_and(|p| p.offered.remove(piece)) {
            self.offers[piece as usize] = self.offers[piece as usize].saturating_sub(1);
        }
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
            for piece in parent.offered.iter() {
                self.offers[piece as usize] = self.offers[piece as usize].saturating_sub(1);
            }
        }
        let theirs: Vec<(PieceIndex, u32)> = self
            .asked
            .iter()
            .flat_map(|(piece, all)| all.iter().filter(|a| a.peer == peer).map(|a| (*piece, a.request)))
            .collect();
        for (piece, request) in theirs {
            self.failed(piece, peer, request);
        }
    }

    /// What `peer` offers; `None` when it is no parent.
    pub fn offers_of(&self, peer: PeerId) -> Option<&PieceSet> {
        self.parents.get(&peer).map(|p| &p.offered)
    }

    /// How many parents offer `piece`.
    pub fn rarity(&self, piece: PieceIndex) -> u16 {
        self.offers.get(piece as usize).copied().unwrap_or(0)
    }

    /// Whether a parent that is not banned offers something that is wanted.
    pub fn has_useful_parent(&self, now: Time, parents: &Parents) -> bool {
        self.parents
            .iter()
            .any(|(peer, p)| !parents.banned(now, *peer) && p.offered.iter().any(|piece| self.wants(piece)))
    }

    /// A request was sent.
    pub fn ask(&mut self, piece: PieceIndex, asked: Asked) {
        let all = self.asked.entry(piece).or_default();
        self.duplicates += u64::from(!all.is_empty());
        all.push(asked);
        self.asked_set.insert(piece);
        self.asked_bytes += self.layout.len_bytes(piece);
    }

    /// A request came to nothing.
    pub fn failed(&mut self, piece: PieceIndex, peer: PeerId, request: u32) {
        let Some(all) = self.asked.get_mut(&piece) else { return };
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
        self.asked_bytes = self.asked_bytes.saturating_sub(self.layout.len_bytes(piece));
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
        let asked = |peer: &PeerId| under_way.get(peer).copied().unwrap_or(0);
        let a_parent = (REQUESTS_AIM / self.parents.len().max(1)).max(REQUESTS_A_PARENT_MIN);
        let mut ready: Vec<(bool, usize, u32, PeerId)> = self
            .parents
            .iter()
            .filter(|(peer, p)| {
                // What one parent alone offers is asked for beyond the limit: nobody else can begin to spread it.
                asked(peer) < 2 * a_parent && p.rests_until <= now && !parents.banned(now, **peer)
            })
            // Least busy first, and by lot among equals, so that children do not all start at the same parent.
            .map(|(peer, _)| (parents.shunned(now, *peer), asked(peer), rng.random(), *peer))
            .collect();
        ready.sort_unstable();
        let within = |piece: PieceIndex| self.window.as_ref().is_none_or(|w| w.contains(&piece));
        let open = |piece: PieceIndex| {
            piece < verifiable && Some(piece) != taken && within(piece) && self.wants(piece)
        };
        ready.iter().find_map(|(_, asked, _, peer)| {
            let offered = &self.parents[peer].offered;
            if *asked >= a_parent {
                let only_here = |piece: PieceIndex| self.offers[piece as usize] == 1 && open(piece);
                return self.rarest(offered, &only_here, rng).map(|piece| (*peer, piece));
            }
            self.needed_first(now, offered, &open)
                .or_else(|| self.rarest(offered, &open, rng))
                .or_else(|| self.overdue(now, *peer, offered, parents, &open))
                .map(|piece| (*peer, piece))
        })
    }

    /// What a reader waits for.
    fn needed_first(
        &self,
        now: Time,
        offered: &PieceSet,
        open: &dyn Fn(PieceIndex) -> bool,
    ) -> Option<PieceIndex> {
        self.readers
            .values()
            .filter(|r| r.partial || r.pieces.start == 0 || now.since(r.moved) >= READER_PATIENCE)
            .flat_map(|r| {
                let from = self.held.first_missing(r.pieces.start);
                from..from.saturating_add(IN_ORDER_WINDOW).min(r.pieces.end)
            })
            .find(|piece| offered.contains(*piece) && !self.asked_set.contains(*piece) && open(*piece))
    }

    /// The piece that the fewest offer; among equals the first when there is one parent, by lot when there are several.
    fn rarest<R: Rng + ?Sized>(
        &self,
        offered: &PieceSet,
        open: &dyn Fn(PieceIndex) -> bool,
        rng: &mut R,
    ) -> Option<PieceIndex> {
        let alone = self.parents.len() < 2;
        let from = if alone { 0 } else { rng.random_range(0..self.layout.count().max(1)) };
        offered
            .iter_from(from)
            .filter(|piece| !self.asked_set.contains(*piece) && open(*piece))
            .take(if alone { 1 } else { CANDIDATES })
            .min_by_key(|piece| self.offers[*piece as usize])
    }

    /// In the endgame: a piece that another parent takes too long over. One double at a time.
    fn overdue(
        &self,
        now: Time,
        peer: PeerId,
        offered: &PieceSet,
        parents: &Parents,
        open: &dyn Fn(PieceIndex) -> bool,
    ) -> Option<PieceIndex> {
        let endgame = self.layout.count() - self.held.len() <= ENDGAME_PIECES;
        self.asked
            .iter()
            .filter(|(piece, all)| {
                all.len() == 1 && all[0].peer != peer && offered.contains(**piece) && open(**piece)
            })
            .map(|(piece, all)| (now.since(all[0].at), *piece, all[0].peer))
            .filter(|(waited, piece, other)| {
                *waited >= if endgame { self.hedge_after(*piece, *other, parents) } else { STALLED_AFTER }
            })
            .max()
            .map(|(_, piece, _)| piece)
    }

    fn hedge_after(&self, piece: PieceIndex, peer: PeerId, parents: &Parents) -> Duration {
        let expected =
            parents.rate_bytes(peer).map_or(0.0, |rate| self.layout.len_bytes(piece) as f64 / rate);
        HEDGE_AFTER_MIN.max(Duration::from_secs_f64((expected * HEDGE_AFTER_FACTOR).min(20.0)))
    }
}
