//! The offers of one task's holder to its children, and their times.
//!
//! An ordinary peer offers everything it has to everybody. The issuer is frugal while several children are hungry: it offers a
//! new piece to one of them only, until another peer holds it, so that its uplink carries what nobody else can give (receiver-driven
//! choice makes a seed send everything twice). With nothing new to give and nothing to send, it reveals what has spread already.
//!
//! Children in other zones take a share only. New pieces are dealt to those of the issuer's own zone while any of these lacks any: a
//! piece dealt into another zone would come back over the same dear link.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use crate::Time;
use crate::peers::PeerMap;
use crate::piece::{PeerId, PieceCounts, PieceIndex, PieceLayout, PieceSet};
use crate::share::Share;

/// New pieces that one child may have on offer and not hold yet: one on its way and the next.
const QUOTA: usize = 2;

/// New pieces on offer to all children together, at least, where that is more: a child hears of one when news has been gathered and
/// what is in the sockets has gone, and all that time the holder sends what was on offer before. Short of that it idles, and
/// reveals what has spread already: beside two or three children it sent 1.4 copies. No more bytes than go within an offer's life.
const QUOTA_OF_ALL: u64 = 32;
const QUOTA_OF_ALL_BYTES: u64 = 16 << 20;

/// An offer that led to nothing for this long is made to another child.
const OFFER_LIFE: Duration = Duration::from_secs(3);

/// A child that holds less than this part of the others' average, by more than a few pieces, does not keep up. New
/// pieces are dealt to it last, since they would spread late from there.
const KEEPS_UP: f64 = 0.8;
const FEW_PIECES: f64 = 4.0;

/// Spread pieces revealed to a child at a time while the holder idles.
const REVEAL: usize = 2;

/// To how many children at a time: as many as keep it busy. Revealed to each of thousands, they all ask it for what they could
/// have from each other, and what is new waits behind that: with 600 children a seed sent nothing else in the first two seconds.
const SPREAD_TO: usize = 16;

/// The pieces dealt to a child.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SuperSeeded {
    /// New pieces on offer to it that it does not hold yet.
    pub pending: usize,
    /// New pieces it was offered so far.
    pub ever: u32,
}

/// A child to whom new pieces are dealt.
struct Load {
    dealt: SuperSeeded,
    keeps_up: bool,
    /// New pieces that it may have on offer.
    quota: usize,
}

impl Load {
    const fn is_full(&self) -> bool {
        self.dealt.pending >= self.quota
    }
}

#[derive(Clone, Debug)]
struct Child {
    /// The pieces offered to it. A piece that `is_new` no more stands in the common set: see [`Child::know_told`].
    told: PieceSet,
    /// The pieces it says it holds.
    holds: PieceSet,
    /// New pieces it was offered so far.
    dealt: u32,
    /// Its claims about held pieces count, and it passes pieces on.
    believed: bool,
    /// It stands in another zone, and takes this share.
    far: Option<Share>,
    /// It was not told all that others were.
    is_new: bool,
    /// It is told of pieces that it holds as well: it brings the task to all, and has to know what has spread.
    hears_all: bool,
    /// Its clients read ranges: new pieces are not dealt to it, and it is told of all of them.
    reads_parts: bool,
    /// Its disk takes nothing: it passes nothing on, and does not say what it holds.
    has_no_disk: bool,
    /// Pieces that were sent to it while this node keeps pieces in memory only.
    sent: Option<PieceSet>,
    sent_at: Option<Time>,
}

impl Child {
    /// It lacks something, and what it gets comes to others.
    fn is_hungry(&self) -> bool {
        self.believed && !self.holds.is_full()
    }

    /// It was told what `all` were, as far as it takes that, and from now on it is told something else.
    fn know_told(&mut self, all: &PieceSet) {
        if !std::mem::replace(&mut self.is_new, true) {
            let taken: Vec<PieceIndex> = all.iter().filter(|piece| self.takes(*piece)).collect();
            for piece in taken {
                self.told.insert(piece);
            }
        }
    }

    fn needs(&self, piece: PieceIndex) -> bool {
        let is_sent = || self.sent.as_ref().is_some_and(|sent| sent.contains(piece));
        self.believed && !self.holds.contains(piece) && self.takes(piece) && !is_sent()
    }

    fn takes(&self, piece: PieceIndex) -> bool {
        self.hears_all || self.far.is_none_or(|share| share.contains(piece))
    }

    /// Pieces of `held` that it was not told of and takes.
    fn untold<'a>(&'a self, held: &'a PieceSet) -> impl Iterator<Item = PieceIndex> + 'a {
        held.minus(&self.told).filter(|piece| self.takes(*piece))
    }
}

/// The offers of one task.
#[derive(Clone, Debug)]
pub struct Offers {
    count: u32,
    /// New pieces on offer to all children together, at least.
    quota_of_all: usize,
    children: PeerMap<Child>,
    /// How many children hold each piece.
    spread: PieceCounts,
    /// New pieces on offer to one child.
    pending: BTreeMap<PieceIndex, (PeerId, Time)>,
    /// The pieces that `is_new` no more and that were offered to every child.
    told: PieceSet,
    /// How many children are hungry: it is asked for with each piece, and a seed has thousands of children.
    hungry: usize,
    /// How often a child came so far.
    joined: u64,
}

impl Offers {
    /// No children yet, and nothing known of the task.
    pub fn empty() -> Self {
        Self::of(0, 0)
    }

    fn of(count: u32, quota_of_all: usize) -> Self {
        Self {
            count,
            quota_of_all,
            children: PeerMap::default(),
            spread: PieceCounts::new(count),
            pending: BTreeMap::new(),
            told: PieceSet::empty(count),
            hungry: 0,
            joined: 0,
        }
    }

    /// The same children for a task that turned out to be cut so; the pieces that they hold of it are not known yet.
    pub fn anew(&self, layout: PieceLayout) -> Self {
        let quota_of_all = QUOTA_OF_ALL.min(QUOTA_OF_ALL_BYTES / layout.piece_bytes());
        let mut offers = Self {
            joined: self.joined,
            ..Self::of(layout.count(), quota_of_all as usize)
        };
        for (peer, child) in &self.children {
            offers.join(*peer, child.believed, child.far);
            offers.reads_parts(*peer, child.reads_parts);
        }
        offers
    }

    /// A peer wants to hear of this task. `believed`: see [`Offers::disbelieve`]; `far`: it stands in another zone, and takes this
    /// share, as long as it says no other.
    pub fn join(&mut self, peer: PeerId, believed: bool, far: Option<Share>) {
        let count = self.count;
        let Entry::Vacant(place) = self.children.entry(peer) else {
            return;
        };
        let none = PieceSet::empty(count);
        let told = none.clone();
        let child = place.insert(Child {
            told,
            holds: none,
            dealt: 0,
            believed,
            far,
            is_new: true,
            hears_all: false,
            reads_parts: false,
            has_no_disk: false,
            sent: None,
            sent_at: None,
        });
        self.hungry += usize::from(child.is_hungry());
        self.joined += 1;
    }

    /// A child says that it stands in another zone and takes this share, or (`None`) that it stands in this one.
    pub fn takes(&mut self, peer: PeerId, far: Option<Share>) {
        let Some(child) = self
            .children
            .get_mut(&peer)
            .filter(|child| child.far != far)
        else {
            return;
        };
        child.know_told(&self.told);
        child.far = far;
        self.joined += 1;
        // A piece that was dealt to it and that it does not take any more is for others.
        self.pending
            .retain(|piece, (to, _)| *to != peer || child.takes(*piece));
    }

    /// A child is gone; the pieces on offer to it are new again.
    pub fn leave(&mut self, peer: PeerId) {
        if let Some(child) = self.children.remove(&peer) {
            self.hungry -= usize::from(child.is_hungry());
            uncount(&mut self.spread, &child.holds);
        }
        self.pending.retain(|_, (to, _)| *to != peer);
    }

    /// Sets the peers to disbelieve, and nobody else. A liar that claims everything would otherwise make an issuer
    /// think that all pieces have spread. The claims of such a child count for nothing, and new pieces are dealt to
    /// others.
    pub fn disbelieve(&mut self, liars: &BTreeSet<PeerId>) {
        for (peer, child) in &mut self.children {
            child.believed = !liars.contains(peer);
            if !child.believed {
                uncount(&mut self.spread, &child.holds);
                child.holds = PieceSet::empty(self.count);
            }
        }
        self.pending.retain(|_, (to, _)| !liars.contains(to));
        self.hungry = self
            .children
            .values()
            .filter(|child| child.is_hungry())
            .count();
    }

    /// The children.
    pub fn children(&self) -> impl Iterator<Item = PeerId> + '_ {
        self.children.keys().copied()
    }

    /// Whether nobody does.
    pub fn is_empty(&self) -> bool {
        self.children.is_empty()
    }

    /// A child says that it holds these pieces.
    pub fn holds(&mut self, peer: PeerId, pieces: impl IntoIterator<Item = PieceIndex>) {
        let Some(child) = self.children.get_mut(&peer).filter(|child| child.believed) else {
            return;
        };
        let was_hungry = child.is_hungry();
        child.has_no_disk = false;
        for piece in pieces {
            if child.holds.insert(piece) {
                self.spread.add(piece);
                self.pending.remove(&piece);
            }
        }
        self.hungry -= usize::from(was_hungry && !child.is_hungry());
    }

    /// A child has asked for a piece on offer to it: the offer stands until it is served.
    pub fn asked(&mut self, now: Time, peer: PeerId, piece: PieceIndex) {
        if let Some((to, at)) = self.pending.get_mut(&piece)
            && *to == peer
        {
            *at = now;
        }
    }

    /// A child brings the task to all: it hears also of what it holds.
    pub fn hears_all(&mut self, peer: PeerId) {
        let Some(child) = self
            .children
            .get_mut(&peer)
            .filter(|child| !child.hears_all)
        else {
            return;
        };
        child.know_told(&self.told);
        child.hears_all = true;
        self.joined += 1;
    }

    /// A child's clients read ranges only, or (`false`) the child wants all pieces. A reader of ranges takes few pieces and passes
    /// on none of the others: a piece that is dealt to it alone would reach nobody.
    pub fn reads_parts(&mut self, peer: PeerId, reads_parts: bool) {
        let Some(child) = self
            .children
            .get_mut(&peer)
            .filter(|child| child.reads_parts != reads_parts)
        else {
            return;
        };
        child.know_told(&self.told);
        child.reads_parts = reads_parts;
        self.joined += 1;
        self.pending.retain(|_, (to, _)| *to != peer);
    }

    /// A child without disk passes nothing on: new pieces are dealt to others.
    pub fn has_no_disk(&mut self, peer: PeerId) {
        let Some(child) = self
            .children
            .get_mut(&peer)
            .filter(|child| !child.has_no_disk)
        else {
            return;
        };
        child.has_no_disk = true;
        self.pending.retain(|_, (to, _)| *to != peer);
    }

    /// A piece was sent to a child by a node that keeps it in memory only.
    pub fn sent(&mut self, now: Time, peer: PeerId, piece: PieceIndex) {
        if let Some(child) = self.children.get_mut(&peer).filter(|_| piece < self.count) {
            child.sent_at = Some(now);
            child
                .sent
                .get_or_insert_with(|| PieceSet::empty(self.count))
                .insert(piece);
        }
    }

    /// Children that take `piece`, do not say that they hold it, and were not sent it.
    pub fn needing(&self, piece: PieceIndex) -> usize {
        self.children
            .values()
            .filter(|child| child.needs(piece))
            .count()
    }

    /// Whether any child has `piece`.
    pub fn is_given(&self, piece: PieceIndex) -> bool {
        let is_sent = |child: &Child| child.sent.as_ref().is_some_and(|sent| sent.contains(piece));
        self.spread(piece) > 0 || self.children.values().any(is_sent)
    }

    /// Children without disk that need `piece`.
    pub fn without_disk_needing(&self, piece: PieceIndex) -> impl Iterator<Item = PeerId> + '_ {
        let needing = self
            .children
            .iter()
            .filter(move |(_, child)| child.has_no_disk && child.needs(piece));
        needing.map(|(peer, _)| *peer)
    }

    /// Children that were told of `kept` pieces which they need, and have taken nothing for `patience`.
    pub fn stragglers(&self, now: Time, patience: Duration, kept: &PieceSet) -> Vec<PeerId> {
        let stands_still = |child: &Child| child.sent_at.is_none_or(|at| now.since(at) >= patience);
        let told = |child: &Child, piece: PieceIndex| {
            let all_were_told = !child.is_new && self.told.contains(piece);
            (child.told.contains(piece) || all_were_told) && child.needs(piece)
        };
        let straggles = |(_, child): &(&PeerId, &Child)| {
            stands_still(child) && kept.iter().any(|piece| told(child, piece))
        };
        self.children
            .iter()
            .filter(straggles)
            .map(|(peer, _)| *peer)
            .collect()
    }

    /// Whether a child that says what it holds needs `piece`, and no other child could give it.
    pub fn is_lost(&self, piece: PieceIndex) -> bool {
        self.spread(piece) == 0
            && self
                .children
                .values()
                .any(|child| !child.has_no_disk && child.needs(piece))
    }

    /// How many children hold `piece`.
    pub fn spread(&self, piece: PieceIndex) -> u16 {
        self.spread.get(piece)
    }

    /// Children that still lack something, and are believed.
    pub const fn hungry(&self) -> usize {
        self.hungry
    }

    /// How often a child came, or wanted others, so far: it was not told all of it yet.
    pub const fn joined(&self) -> u64 {
        self.joined
    }

    /// Whether a frugal holder deals new pieces out: to a single hungry child everything is offered.
    pub fn deals(&self) -> bool {
        let mut dealt_to = self.dealt_to();
        // One child that passes pieces on suffices, if there is another one for it to pass them to.
        dealt_to.next().is_some() && (dealt_to.next().is_some() || self.hungry_without_disk())
    }

    fn hungry_without_disk(&self) -> bool {
        self.children
            .values()
            .any(|child| child.has_no_disk && child.is_hungry())
    }

    /// To whom new pieces are dealt: to hungry children here, and where there are none, to those elsewhere.
    fn dealt_to(&self) -> impl Iterator<Item = (&PeerId, &Child)> {
        let hungry = || {
            self.children
                .iter()
                .filter(|(_, child)| child.is_hungry() && !child.has_no_disk && !child.reads_parts)
        };
        let elsewhere = hungry().all(|(_, child)| child.far.is_some());
        hungry().filter(move |(_, child)| {
            child.far.is_none() || elsewhere && child.far.is_some_and(|share| share != Share::NONE)
        })
    }

    /// Adds what each child was dealt of this task.
    pub fn add_super_seeded(&self, sum: &mut BTreeMap<PeerId, SuperSeeded>) {
        for (peer, child) in self.children.iter().filter(|(_, child)| child.dealt > 0) {
            sum.entry(*peer).or_default().ever += child.dealt;
        }
        for (to, _) in self.pending.values() {
            sum.entry(*to).or_default().pending += 1;
        }
    }

    /// The next offers, of the pieces `held`. `frugal`: as the issuer offers. `idle`: there is nothing else to send.
    /// `elsewhere`: the pieces of other tasks dealt to each child, since its link is one for all.
    pub fn next(
        &mut self,
        now: Time,
        held: &PieceSet,
        frugal: bool,
        idle: bool,
        elsewhere: &BTreeMap<PeerId, SuperSeeded>,
    ) -> Vec<(PeerId, Vec<PieceIndex>)> {
        if !(frugal && self.deals()) {
            return self.everything(held);
        }
        self.keep_apart();
        let mut told: BTreeMap<PeerId, Vec<PieceIndex>> = BTreeMap::new();
        self.expire(now);
        self.deal(now, held, elsewhere, &mut told);
        if idle && told.is_empty() {
            self.offer_spread(held, &mut told);
        }
        self.tell_readers_of_parts(held, &mut told);
        told.into_iter().collect()
    }

    /// Each reader of ranges is told of everything: nobody knows what its clients read next.
    fn tell_readers_of_parts(
        &mut self,
        held: &PieceSet,
        told: &mut BTreeMap<PeerId, Vec<PieceIndex>>,
    ) {
        for (peer, child) in self
            .children
            .iter_mut()
            .filter(|(_, child)| child.reads_parts)
        {
            let new: Vec<PieceIndex> = child
                .untold(held)
                .filter(|piece| !child.holds.contains(*piece))
                .collect();
            for piece in &new {
                child.told.insert(*piece);
            }
            if !new.is_empty() {
                told.entry(*peer).or_default().extend(new);
            }
        }
    }

    fn everything(&mut self, held: &PieceSet) -> Vec<(PeerId, Vec<PieceIndex>)> {
        self.pending.clear();
        // Mostly there are a few new pieces, the same for all: the sets of the single children are not consulted.
        let new: Vec<PieceIndex> = held.minus(&self.told).collect();
        self.told.clone_from(held);
        let children = self
            .children
            .iter_mut()
            .filter(|(_, child)| child.hears_all || !child.holds.is_full());
        let told = children.map(|(peer, child)| {
            let lacks = |piece: &PieceIndex| {
                child.takes(*piece) && (child.hears_all || !child.holds.contains(*piece))
            };
            if !child.is_new {
                return (*peer, new.iter().copied().filter(lacks).collect::<Vec<_>>());
            }
            let new: Vec<PieceIndex> = held.minus(&child.told).filter(lacks).collect();
            child.is_new = false;
            (*peer, new)
        });
        told.filter(|(_, new)| !new.is_empty()).collect()
    }

    /// From now on each is told other pieces.
    fn keep_apart(&mut self) {
        self.children
            .values_mut()
            .for_each(|child| child.know_told(&self.told));
    }

    fn expire(&mut self, now: Time) {
        self.pending
            .retain(|_, (_, at)| now.since(*at) < OFFER_LIFE);
    }

    /// Deals new pieces out, each to the child with the fewest on offer.
    fn deal(
        &mut self,
        now: Time,
        held: &PieceSet,
        elsewhere: &BTreeMap<PeerId, SuperSeeded>,
        told: &mut BTreeMap<PeerId, Vec<PieceIndex>>,
    ) {
        let mut dealt = elsewhere.clone();
        self.add_super_seeded(&mut dealt);
        let children = || {
            self.dealt_to()
                .map(|(peer, child)| (*peer, f64::from(child.holds.len())))
        };
        let count = children().count().max(1);
        let usual = children().map(|(_, holds)| holds).sum::<f64>() / count as f64;
        let mut loads: BTreeMap<PeerId, Load> = children()
            .map(|(peer, holds)| {
                let keeps_up = holds + FEW_PIECES >= usual * KEEPS_UP;
                let quota = if keeps_up {
                    QUOTA.max(self.quota_of_all / count)
                } else {
                    QUOTA
                };
                (
                    peer,
                    Load {
                        dealt: dealt.remove(&peer).unwrap_or_default(),
                        keeps_up,
                        quota,
                    },
                )
            })
            .collect();
        for piece in held.iter().filter(|p| self.spread.get(*p) == 0) {
            if loads.values().all(Load::is_full) {
                break;
            }
            if self.pending.contains_key(&piece) {
                continue;
            }
            // Children that keep up come first. Among these comes first the one with the fewest pieces on offer, then
            // with the fewest ever, since each passes on its pieces and all uplinks should be busy. The count is over
            // all tasks, else layers that arrive in step would all start at the same children. A child that let this
            // very offer lapse comes after all others.
            let open = loads
                .iter_mut()
                .filter(|(peer, load)| !load.is_full() && self.children[*peer].takes(piece));
            let Some((to, load)) = open.min_by_key(|(peer, load)| {
                let lapsed = self.children[*peer].told.contains(piece);
                (
                    lapsed,
                    !load.keeps_up,
                    load.dealt.pending,
                    load.dealt.ever,
                    **peer,
                )
            }) else {
                continue;
            };
            load.dealt.pending += 1;
            load.dealt.ever += 1;
            self.pending.insert(piece, (*to, now));
            if let Some(child) = self.children.get_mut(to) {
                child.dealt += 1;
                if child.told.insert(piece) {
                    told.entry(*to).or_default().push(piece);
                }
            }
        }
    }

    /// Tells a few hungry children of a few pieces each that others have too, the least spread first: not the same ones to all.
    fn offer_spread(&mut self, held: &PieceSet, told: &mut BTreeMap<PeerId, Vec<PieceIndex>>) {
        // New pieces will come, and should not wait behind many of these.
        let at_once = if held.is_full() { SPREAD_TO } else { 1 };
        let mut spread = self.spread.clone();
        let mut children: Vec<(&PeerId, &mut Child)> = self
            .children
            .iter_mut()
            .filter(|(_, child)| !child.holds.is_full())
            .collect();
        // The child with the fewest pieces comes first: else the first ones would be offered pieces again and again,
        // and the last ones none.
        children.sort_unstable_by_key(|(peer, child)| (child.holds.len(), **peer));
        for (peer, child) in children {
            let open = child
                .untold(held)
                .filter(|p| !child.holds.contains(*p))
                .count();
            let revealed = child.told.minus(&child.holds).count();
            if open == 0 || revealed >= QUOTA + REVEAL {
                continue;
            }
            let mut rare: Vec<(u16, PieceIndex)> = child
                .untold(held)
                .filter(|p| !child.holds.contains(*p) && !self.pending.contains_key(p))
                .map(|p| (spread.get(p), p))
                .collect();
            rare.sort_unstable();
            for (_, piece) in rare.into_iter().take(REVEAL) {
                spread.add(piece);
                child.told.insert(piece);
                told.entry(*peer).or_default().push(piece);
            }
            if told.len() == at_once {
                return;
            }
        }
    }
}

/// Takes the pieces held by one child out of the count.
fn uncount(spread: &mut PieceCounts, held: &PieceSet) {
    for piece in held.iter() {
        spread.subtract(piece);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OF_ALL: usize = QUOTA_OF_ALL as usize;

    fn peer(n: u8) -> PeerId {
        PeerId([n; 16])
    }

    fn offers(children: u8, count: u32) -> Offers {
        let mut offers = Offers::of(count, OF_ALL);
        (0..children).for_each(|n| offers.join(peer(n), true, None));
        offers
    }

    #[test]
    fn an_ordinary_peer_tells_everybody_everything_once() {
        let mut offers = offers(3, 10);
        let held = PieceSet::full(10);
        let told = offers.next(Time::default(), &held, false, true, &BTreeMap::new());
        assert_eq!(told.len(), 3);
        assert!(told.iter().all(|(_, pieces)| pieces.len() == 10));
        assert!(
            offers
                .next(Time::default(), &held, false, true, &BTreeMap::new())
                .is_empty()
        );
    }

    #[test]
    fn the_issuer_offers_each_new_piece_to_one_child() {
        let mut offers = offers(4, 8);
        let told = offers.next(
            Time::default(),
            &PieceSet::full(8),
            true,
            true,
            &BTreeMap::new(),
        );
        let mut all: Vec<PieceIndex> = told.iter().flat_map(|(_, p)| p.clone()).collect();
        all.sort_unstable();
        assert_eq!(all, (0..8).collect::<Vec<_>>());
        assert!(told.iter().all(|(_, pieces)| pieces.len() == 2));
    }

    #[test]
    fn few_children_have_enough_on_offer_to_keep_the_holder_busy_and_many_two_each() {
        for (children, each) in [(2, 16), (5, 6), (16, QUOTA), (40, QUOTA)] {
            let mut offers = offers(children, 200);
            let told = offers.next(
                Time::default(),
                &PieceSet::full(200),
                true,
                false,
                &BTreeMap::new(),
            );
            assert_eq!(told.len(), usize::from(children));
            assert!(
                told.iter().all(|(_, pieces)| pieces.len() == each),
                "{children} children"
            );
        }
        let gib = PieceLayout::new(3 << 30);
        let mut long = offers(2, 9).anew(gib);
        let told = long.next(
            Time::default(),
            &PieceSet::full(gib.count()),
            true,
            false,
            &BTreeMap::new(),
        );
        assert!(
            told.iter().all(|(_, pieces)| pieces.len() == 2),
            "no more bytes than go in an offer's life"
        );
    }

    #[test]
    fn the_issuer_with_one_hungry_child_holds_nothing_back() {
        let mut offers = offers(1, 50);
        assert_eq!(
            offers.next(
                Time::default(),
                &PieceSet::full(50),
                true,
                false,
                &BTreeMap::new()
            )[0]
            .1
            .len(),
            50
        );
    }

    #[test]
    fn a_child_that_took_its_piece_gets_the_next() {
        let mut offers = offers(2, 100);
        offers.next(
            Time::default(),
            &PieceSet::full(100),
            true,
            false,
            &BTreeMap::new(),
        );
        assert!(
            offers
                .next(
                    Time::default(),
                    &PieceSet::full(100),
                    true,
                    false,
                    &BTreeMap::new()
                )
                .is_empty()
        );
        offers.holds(peer(0), [0]);
        assert_eq!(
            offers.next(
                Time::default(),
                &PieceSet::full(100),
                true,
                false,
                &BTreeMap::new()
            ),
            [(peer(0), vec![OF_ALL as u32])]
        );
    }

    #[test]
    fn an_offer_that_leads_to_nothing_goes_to_another_child() {
        let mut offers = offers(2, 1);
        let first = offers.next(
            Time::default(),
            &PieceSet::full(1),
            true,
            false,
            &BTreeMap::new(),
        );
        let later = Time(OFFER_LIFE);
        let second = offers.next(later, &PieceSet::full(1), true, false, &BTreeMap::new());
        assert_ne!(first[0].0, second[0].0);
    }

    #[test]
    fn what_was_on_offer_to_a_lost_child_is_offered_again() {
        let mut offers = offers(3, 2);
        let first = offers.next(
            Time::default(),
            &PieceSet::full(2),
            true,
            false,
            &BTreeMap::new(),
        );
        offers.leave(first[0].0);
        let again = offers.next(
            Time::default(),
            &PieceSet::full(2),
            true,
            false,
            &BTreeMap::new(),
        );
        assert_eq!(again.len(), 1);
        assert_eq!(again[0].1, first[0].1);
    }

    #[test]
    fn an_idle_issuer_reveals_what_has_spread() {
        let mut offers = offers(2, 2);
        offers.next(
            Time::default(),
            &PieceSet::full(2),
            true,
            false,
            &BTreeMap::new(),
        );
        offers.holds(peer(0), [0]);
        offers.holds(peer(1), [1]);
        assert!(
            offers
                .next(
                    Time::default(),
                    &PieceSet::full(2),
                    true,
                    false,
                    &BTreeMap::new()
                )
                .is_empty()
        );
        let told = offers.next(
            Time::default(),
            &PieceSet::full(2),
            true,
            true,
            &BTreeMap::new(),
        );
        assert_eq!(told, [(peer(0), vec![1]), (peer(1), vec![0])]);
    }

    #[test]
    fn a_liar_that_says_it_has_everything_keeps_no_piece_from_being_dealt() {
        let mut offers = offers(4, 8);
        let liars = BTreeSet::from([peer(0)]);
        offers.holds(peer(0), 0..8);
        let deal = |offers: &mut Offers| {
            let told = offers.next(
                Time::default(),
                &PieceSet::full(8),
                true,
                false,
                &BTreeMap::new(),
            );
            told.iter()
                .map(|(to, pieces)| (*to, pieces.len()))
                .collect::<Vec<_>>()
        };
        assert_eq!(deal(&mut offers), [], "all has spread, by what it says");
        offers.disbelieve(&liars);
        offers.holds(peer(0), [1]);
        assert_eq!(offers.spread(1), 0);
        assert_eq!(
            deal(&mut offers),
            [(peer(1), 3), (peer(2), 3), (peer(3), 2)]
        );
        offers.disbelieve(&BTreeSet::new());
        offers.holds(peer(0), [1]);
        assert_eq!(offers.spread(1), 1, "it is let back");
    }

    #[test]
    fn what_a_child_has_on_offer_of_other_tasks_counts_as_well() {
        let mut offers = offers(2, 8);
        let elsewhere = BTreeMap::from([(
            peer(0),
            SuperSeeded {
                pending: OF_ALL / 2,
                ever: 0,
            },
        )]);
        let told = offers.next(Time::default(), &PieceSet::full(8), true, false, &elsewhere);
        assert_eq!(
            told.iter()
                .map(|(to, pieces)| (*to, pieces.len()))
                .collect::<Vec<_>>(),
            [(peer(1), 8)]
        );
        let mut dealt = BTreeMap::new();
        offers.add_super_seeded(&mut dealt);
        assert_eq!(
            dealt,
            BTreeMap::from([(
                peer(1),
                SuperSeeded {
                    pending: 8,
                    ever: 8
                }
            )])
        );
    }

    #[test]
    fn who_does_not_keep_up_is_dealt_what_is_new_last() {
        let mut offers = offers(4, 64);
        let quota = OF_ALL / 4;
        (0..3).for_each(|n| offers.holds(peer(n), 0..12));
        offers.holds(peer(3), 0..2);
        let mut held = PieceSet::empty(64);
        held.insert_range(0..12 + 3 * quota as u32);
        let next = |offers: &mut Offers| {
            let told = offers.next(Time::default(), &held, true, false, &BTreeMap::new());
            told.iter()
                .map(|(to, pieces)| (*to, pieces.len()))
                .collect::<Vec<_>>()
        };
        assert_eq!(
            next(&mut offers),
            [(peer(0), quota), (peer(1), quota), (peer(2), quota)]
        );
        let held = PieceSet::full(64);
        let told = offers.next(Time::default(), &held, true, false, &BTreeMap::new());
        assert_eq!(
            told,
            [(peer(3), vec![36, 37])],
            "better late than not at all"
        );
    }

    #[test]
    fn layers_that_come_in_step_are_dealt_to_all_children_alike() {
        let mut layers = [offers(8, 64), offers(8, 64)];
        let mut held = PieceSet::empty(64);
        for piece in 0..32 {
            held.insert(piece);
            for (layer, other) in [(0, 1), (1, 0)] {
                let mut elsewhere = BTreeMap::new();
                layers[other].add_super_seeded(&mut elsewhere);
                let told = layers[layer].next(Time::default(), &held, true, false, &elsewhere);
                assert_eq!(told.len(), 1);
                told.iter()
                    .for_each(|(to, pieces)| layers[layer].holds(*to, [pieces[0]]));
            }
        }
        let mut dealt = BTreeMap::new();
        layers
            .iter()
            .for_each(|layer| layer.add_super_seeded(&mut dealt));
        assert!(dealt.values().all(|dealt| dealt.ever == 8), "{dealt:?}");
        // By counting for each layer alone, half of them would have got nothing of a layer, and the others both.
        assert!((0..8).all(|n| dealt.contains_key(&peer(n))));
    }

    #[test]
    fn children_elsewhere_take_their_share_after_those_here_have_got_it() {
        let mut offers = Offers::of(16, OF_ALL);
        let shares = [None, None, Some(Share::of([1])), Some(Share::NONE)];
        (0..)
            .zip(shares)
            .for_each(|(n, far)| offers.join(peer(n), true, far));
        let next = |offers: &mut Offers, idle| {
            offers.next(
                Time::default(),
                &PieceSet::full(16),
                true,
                idle,
                &BTreeMap::new(),
            )
        };
        let dealt: Vec<PeerId> = next(&mut offers, true).iter().map(|(to, _)| *to).collect();
        assert_eq!(dealt, [peer(0), peer(1)], "to those here alone");
        (0..16).for_each(|piece| offers.holds(peer(piece as u8 % 2), [piece]));
        let told: BTreeMap<PeerId, BTreeSet<PieceIndex>> = next(&mut offers, true)
            .into_iter()
            .map(|(to, pieces)| (to, pieces.into_iter().collect()))
            .collect();
        assert_eq!(
            told[&peer(2)],
            BTreeSet::from([1, 9]),
            "what it is to bring to its own zone"
        );
        assert_eq!(told.get(&peer(3)), None, "it has all from those there");
        (0..16).for_each(|piece| (0..2).for_each(|n| offers.holds(peer(n), [piece])));
        offers.takes(peer(3), Some(Share::ALL));
        assert_eq!(
            next(&mut offers, true),
            [(peer(3), vec![0, 1])],
            "until these do not suffice"
        );
    }

    #[test]
    fn who_takes_more_than_before_is_told_of_what_it_did_not_take() {
        let mut offers = Offers::of(16, OF_ALL);
        offers.join(peer(0), true, Some(Share::NONE));
        offers.join(peer(1), true, None);
        let next = |offers: &mut Offers| -> BTreeMap<PeerId, Vec<PieceIndex>> {
            offers
                .next(
                    Time::default(),
                    &PieceSet::full(16),
                    false,
                    false,
                    &BTreeMap::new(),
                )
                .into_iter()
                .collect()
        };
        assert_eq!(
            next(&mut offers).keys().copied().collect::<Vec<_>>(),
            [peer(1)]
        );
        let joined = offers.joined();
        offers.takes(peer(0), Some(Share::of([3])));
        assert!(offers.joined() > joined, "there is something to tell");
        assert_eq!(next(&mut offers), BTreeMap::from([(peer(0), vec![3, 11])]));
        offers.takes(peer(0), Some(Share::ALL));
        assert_eq!(next(&mut offers)[&peer(0)].len(), 14);
        assert_eq!(next(&mut offers), BTreeMap::new());
        // The issuer of the task hears of all, whatever it takes.
        offers.join(peer(2), true, Some(Share::NONE));
        offers.hears_all(peer(2));
        assert_eq!(next(&mut offers)[&peer(2)].len(), 16);
    }

    #[test]
    fn what_was_dealt_to_a_child_that_does_not_take_it_any_more_is_dealt_to_another() {
        let mut offers = Offers::of(16, OF_ALL);
        (0..3).for_each(|n| offers.join(peer(n), true, Some(Share::ALL)));
        let next = |offers: &mut Offers| {
            offers.next(
                Time::default(),
                &PieceSet::full(2),
                true,
                false,
                &BTreeMap::new(),
            )
        };
        let told = next(&mut offers);
        assert_eq!(told, [(peer(0), vec![0]), (peer(1), vec![1])]);
        offers.takes(peer(0), Some(Share::NONE));
        assert_eq!(next(&mut offers), [(peer(2), vec![0])]);
    }

    #[test]
    fn where_all_children_are_elsewhere_new_pieces_are_dealt_by_their_shares() {
        let mut offers = Offers::of(16, OF_ALL);
        (0..8).for_each(|n| offers.join(peer(n), true, Some(Share::of([usize::from(n)]))));
        let told = offers.next(
            Time::default(),
            &PieceSet::full(16),
            true,
            false,
            &BTreeMap::new(),
        );
        let expected: Vec<_> = (0..8).map(|n| (peer(n as u8), vec![n, n + 8])).collect();
        assert_eq!(told, expected);
    }
}
