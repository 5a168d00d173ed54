//! One task of this node, and what each peer has to do with it.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use super::fair::Admission;
use super::memory::Memory;
use super::pace::Pace;
use super::phase::{Change, Phase};
use super::table::Unproven;
use super::{
    ANSWER_WITHIN, FIRST_NEWS_EVERY, FIRST_PIECES, Failure, NEWS_EVERY, Output, TAKES_ALL_AFTER,
    TableSigner, Trust,
};
use crate::Time;
use crate::application::Purpose;
use crate::fetch::Fetch;
use crate::message::{Message, Role};
use crate::offer::Offers;
use crate::peers::PeerMap;
use crate::piece::{PeerId, PieceIndex, PieceLayout, PieceSet, PieceTable};
use crate::right::Right;
use crate::share::Share;
use hawker_oci::digest::Digest;
use hawker_oci::reference::Source;

/// The origin, as far as one task goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum OriginState {
    No,
    /// The piece that comes next.
    At(PieceIndex),
    FailedAt(Time, Failure),
}

/// The scheduler's advice about one download.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Advice {
    #[default]
    NotAsked,
    /// The scheduler was asked at that time, and has not answered.
    Asked(Time),
    /// The scheduler has answered. It may have been asked again since, and may answer without a question.
    Given { asked: Option<Time> },
}

impl Advice {
    pub(super) const fn asked_at(self) -> Option<Time> {
        match self {
            Self::NotAsked => None,
            Self::Asked(at) => Some(at),
            Self::Given { asked } => asked,
        }
    }

    pub(super) const fn is_given(self) -> bool {
        matches!(self, Self::Given { .. })
    }

    /// The scheduler is asked.
    pub(super) const fn ask(&mut self, now: Time) {
        *self = if self.is_given() {
            Self::Given { asked: Some(now) }
        } else {
            Self::Asked(now)
        };
    }

    /// The scheduler answers.
    pub(super) const fn give(&mut self) {
        *self = Self::Given {
            asked: self.asked_at(),
        };
    }
}

/// The relation of one peer to one task.
#[derive(Clone, Debug, Default)]
pub(super) struct Link {
    /// We told it of our interest at that time.
    pub(super) asked: Option<Time>,
    /// It last said that it is working on it.
    pub(super) working: Option<Time>,
    /// The scheduler named it, or it is the seed to ask.
    pub(super) named: bool,
    /// It stands in another zone.
    pub(super) far: bool,
    /// It can't help.
    pub(super) unavailable: bool,
    /// How many values of our table it was sent, and under which statement.
    pub(super) table_sent: u32,
    pub(super) signed_sent: Option<(bool, u32)>,
    /// When it was last told anything.
    pub(super) told: Option<Time>,
    /// Values it sent that do not count yet.
    pub(super) unproven: Unproven,
    /// The child's purpose.
    pub(super) purpose: Purpose,
    /// It waits for the task here: its role. Nobody else's interest keeps a task in play.
    pub(super) waits: Option<Role>,
}

/// All that children are told of: while it stays as it is, there is nothing to tell them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct News {
    held: u32,
    signed: Option<(bool, u32)>,
    joined: u64,
    failed: bool,
}

#[derive(Clone, Debug)]
pub(super) struct Task {
    pub(super) source: Source,
    pub(super) right: Right,
    /// The seeds may not read it at its origin, so this node may have to.
    pub(super) is_closed_to_seeds: bool,
    /// Known once the size is.
    pub(super) fetch: Option<Fetch>,
    pub(super) table: Option<PieceTable>,
    pub(super) trust: Option<Trust>,
    pub(super) offers: Offers,
    pub(super) links: PeerMap<Link>,
    /// The peer whose statements count besides the seeds'.
    pub(super) issuer: Option<PeerId>,
    /// We are to read the origin and issue the table.
    pub(super) elected: bool,
    pub(super) announce: bool,
    /// For whose sake a seed downloads it.
    pub(super) admission: Admission,
    /// The pieces kept while the disk takes nothing.
    pub(super) memory: Option<Memory>,
    /// It fetches what it once held and let go while the disk took nothing.
    pub(super) refills: bool,
    pub(super) phase: Phase,
    /// Clients of this node read it.
    pub(super) is_read: bool,
    /// The common purpose of the readers; after the last reader has left, its purpose.
    pub(super) purpose: Purpose,
    /// The common purpose of the children that depend on this node.
    pub(super) childrens_purpose: Option<Purpose>,
    /// Since when it may not be read from the origin, for its application's sake.
    pub(super) held_back: Option<Time>,
    pub(super) pace: Pace,
    /// The share of pieces to take from other zones.
    pub(super) share: Share,
    /// All of them.
    pub(super) whole: bool,
    pub(super) reading: OriginState,
    pub(super) shown: PieceSet,
    /// When a piece last came, or the download began.
    pub(super) moved: Time,
    /// It has waited for others in vain: until one that can be counted on brings something, it reads on from the origin wherever
    /// something is missing.
    pub(super) in_vain: bool,
    pub(super) advice: Advice,
    /// When children were last told anything, and of what state of things.
    pub(super) news: Time,
    pub(super) told: Option<News>,
    /// Of which table, after how many had joined, every child has all.
    pub(super) tables_sent: Option<(bool, u32, u64)>,
    /// The last piece's senders that failed the digest: two different ones mean that the table is wrong.
    pub(super) last_wrong: BTreeSet<PeerId>,
    /// The shell was told that readers of ranges need not wait for peers.
    pub(super) is_alone: bool,
}

impl Task {
    /// Something happened that may change the phase.
    pub(super) const fn enter(&mut self, change: Change) {
        self.phase = self.phase.after(change);
    }

    pub(super) const fn is_running(&self) -> bool {
        self.phase.is_running()
    }

    pub(super) const fn is_complete(&self) -> bool {
        self.phase.is_complete()
    }

    /// How often children are told of new pieces.
    pub(super) fn news_every(&self) -> Duration {
        let few = self.is_running()
            && self
                .fetch
                .as_ref()
                .is_some_and(|f| f.held().len() <= FIRST_PIECES);
        if few { FIRST_NEWS_EVERY } else { NEWS_EVERY }
    }

    /// The news for children by now.
    pub(super) fn news(&self) -> News {
        News {
            held: self.fetch.as_ref().map_or(0, |fetch| fetch.held().len()),
            signed: self
                .table
                .as_ref()
                .and_then(PieceTable::signed)
                .map(|s| (s.sealed, s.count)),
            joined: self.offers.joined(),
            failed: self.phase.failure().is_some(),
        }
    }

    /// The next moment to send news to children: news are gathered for a while. A frugal node checks again and again
    /// to which child it may offer more.
    pub(super) fn tells_at(&self, role: Role) -> Option<Time> {
        let brings = self.is_issuer(role) && (self.is_running() || self.offers.hungry() > 0);
        let has_news = || brings || self.told != Some(self.news());
        (self.may_announce(role) && !self.offers.is_empty() && has_news())
            .then(|| self.news + self.news_every())
    }

    /// Whether a node of this `role` is to bring it to the others: it reads the origin for all, issues the table, is frugal.
    pub(super) fn is_issuer(&self, role: Role) -> bool {
        self.elected || role == Role::Seed
    }

    /// Whether pieces may be offered. Without disk only a node that brings the task feeds children.
    pub(super) fn may_announce(&self, role: Role) -> bool {
        let feeds = |memory: &Memory| memory.has_budget() && self.is_issuer(role);
        self.announce && self.memory.as_ref().is_none_or(feeds)
    }

    /// Whether a piece can be given out.
    pub(super) fn keeps(&self, piece: PieceIndex) -> bool {
        let held = self
            .fetch
            .as_ref()
            .is_some_and(|fetch| fetch.held().contains(piece));
        held && self
            .memory
            .as_ref()
            .is_none_or(|memory| memory.contains(piece))
    }

    /// Whether that peer is to bring it here: a seed, or whose statements count besides.
    pub(super) fn is_brought_by(&self, peer: PeerId, role: Role) -> bool {
        role == Role::Seed || self.issuer == Some(peer)
    }

    /// Whether it goes on though nobody waits for it: no client here, and no child of whoever is to bring it to the others.
    pub(super) fn is_prefetch(&self, role: Role) -> bool {
        self.is_running() && !self.is_read && !(self.is_issuer(role) && self.offers.hungry() > 0)
    }

    /// For whom it is fetched: for clients here, and, by whoever is to bring it to the others, for these too.
    pub(super) fn purpose(&self, role: Role) -> Purpose {
        let own = Some(&self.purpose).filter(|_| self.is_read);
        let children = self
            .childrens_purpose
            .as_ref()
            .filter(|_| self.is_issuer(role));
        Purpose::common(own.into_iter().chain(children)).unwrap_or_else(|| self.purpose.clone())
    }

    /// A peer wants no more of it.
    pub(super) fn leave(&mut self, peer: PeerId) {
        self.offers.leave(peer);
        // When it comes back it may have thrown away what it was told of the table.
        if let Some(link) = self.links.get_mut(&peer) {
            (link.table_sent, link.signed_sent, link.waits) = (0, None, None);
        }
        if self.offers.is_empty() {
            self.childrens_purpose = None;
        }
    }

    /// The children that wait for it here.
    pub(super) fn waiting(&self) -> impl Iterator<Item = (PeerId, Role)> + '_ {
        self.links
            .iter()
            .filter_map(|(peer, link)| Some((*peer, link.waits?)))
    }

    /// Whether a seed that asks for it waits for it on nobody's behalf. Two seeds with nothing but each other's interest must not
    /// keep a task in play: so only clients here and children that are no seeds count. An owner reads the origin itself.
    pub(super) fn is_passive(&self, me: Role) -> bool {
        let is_wanted = || self.is_read || self.waiting().any(|(_, role)| role != Role::Seed);
        me == Role::Seed && (self.elected || !is_wanted())
    }

    /// The question for this task, from a node of role `me` to a peer of another role.
    pub(super) fn interest(&self, task: Digest, me: Role, peer: PeerId, role: Role) -> Message {
        let token = self.right.token().filter(|_| role == Role::Seed).cloned();
        let (source, size_bytes) = (self.source.clone(), self.size_bytes());
        let far = self
            .links
            .get(&peer)
            .filter(|link| link.far)
            .map(|_| self.share);
        let (purpose, passive) = (self.purpose(me), self.is_passive(me));
        let partial = !self.whole;
        Message::Interest {
            task,
            source,
            size_bytes,
            token,
            purpose,
            far,
            passive,
            partial,
        }
    }

    /// Whether its own zone does not suffice: the gateway does not bring its share, or nobody names a gateway.
    pub(super) fn takes_all(&self, now: Time) -> bool {
        now.since(self.moved)
            >= if self.advice.is_given() {
                TAKES_ALL_AFTER
            } else {
                ANSWER_WITHIN
            }
    }

    /// A peer stands in another zone, or in this one.
    pub(super) fn is_far(&mut self, peer: PeerId, far: bool) {
        self.links.entry(peer).or_default().far = far;
        if let Some(fetch) = &mut self.fetch {
            fetch.is_far(peer, far);
        }
    }

    /// Bytes asked for and not there yet.
    pub(super) fn asked_bytes(&self) -> u64 {
        self.fetch.as_ref().map_or(0, Fetch::asked_bytes)
    }

    pub(super) fn size_bytes(&self) -> Option<u64> {
        self.fetch.as_ref().map(|f| f.layout().size_bytes())
    }

    pub(super) fn set_size(
        &mut self,
        digest: &Digest,
        layout: PieceLayout,
        known: Option<(PieceTable, PieceSet)>,
    ) {
        let (table, held) = known.unwrap_or_else(|| {
            (
                PieceTable::new(*digest, layout),
                PieceSet::empty(layout.count()),
            )
        });
        self.offers = self.offers.anew(layout);
        self.shown = PieceSet::empty(layout.count());
        self.table = Some(table);
        self.enter(Change::Sized);
        let mut fetch = Fetch::new(layout, held);
        fetch.want_whole(self.whole);
        fetch.share(self.share);
        self.links
            .iter()
            .filter(|(_, link)| link.far)
            .for_each(|(peer, _)| fetch.is_far(*peer, true));
        self.fetch = Some(fetch);
    }

    /// Forgets all that was learned but the size.
    pub(super) fn start_over(&mut self, digest: &Digest) {
        let Some(layout) = self.fetch.as_ref().map(Fetch::layout) else {
            return;
        };
        self.set_size(digest, layout, None);
        self.memory.iter_mut().for_each(Memory::clear);
        self.trust = None;
        (self.told, self.tables_sent) = (None, None);
        self.enter(Change::Discarded);
        self.in_vain = false;
        self.last_wrong.clear();
        for link in self.links.values_mut() {
            link.table_sent = 0;
            link.signed_sent = None;
            link.unproven = Unproven::default();
            link.asked = None;
        }
    }

    pub(super) fn signed_by_nobody(&self) -> bool {
        self.table.as_ref().is_none_or(|t| t.signed().is_none())
    }

    /// Whether peers may have what is held: its table is signed by somebody they may trust.
    pub(super) fn may_share(&self) -> bool {
        self.table.as_ref().is_some_and(|t| t.signed().is_some())
    }

    /// Whether a child may hope for it here. A peer that has all of it and no seal yet gets one with the election; a child may hear of
    /// that before this node does.
    pub(super) fn will_share(&self) -> bool {
        self.is_running() || self.is_complete() || self.may_share()
    }

    /// Signs what has not been signed yet, as the issuer.
    pub(super) fn issue<N: TableSigner>(&mut self, notary: &N) {
        let is_complete = self.is_complete();
        let Some(table) = &mut self.table else { return };
        let count = table.values().len() as u32;
        let fresh = table
            .signed()
            .is_none_or(|s| (s.sealed, s.count) < (is_complete, count));
        if fresh {
            notary.sign(table, is_complete);
            self.trust = Some(Trust::Clients);
        }
    }

    pub(super) fn show(&mut self, digest: &Digest, outputs: &mut VecDeque<Output>) {
        let Some(fetch) = &self.fetch else { return };
        let pieces: Vec<PieceIndex> = fetch.held().minus(&self.shown).collect();
        for piece in pieces {
            self.show_piece(digest, piece, outputs);
        }
    }

    /// Shows a piece to clients if the table counts for them, and the last piece if the whole digest is known to match.
    pub(super) fn show_piece(
        &mut self,
        digest: &Digest,
        piece: PieceIndex,
        outputs: &mut VecDeque<Output>,
    ) {
        let (Some(fetch), Some(table)) = (&self.fetch, &self.table) else {
            return;
        };
        let last = Some(piece) == fetch.layout().last();
        let whole_matches = self.is_complete() || table.is_sealed();
        if self.trust == Some(Trust::Clients)
            && (!last || whole_matches)
            && self.shown.insert(piece)
        {
            outputs.push_back(Output::Show(*digest, piece));
        }
    }

    /// Sends the table to those who need it: for the last piece that they are about to be offered, or to be sure of the whole. It
    /// grows with each piece from the origin; to send it on each time to everybody would be most of what is said.
    pub(super) fn send_tables(
        &mut self,
        now: Time,
        digest: &Digest,
        last_offered: &BTreeMap<PeerId, Option<PieceIndex>>,
        outputs: &mut VecDeque<Output>,
    ) {
        let Some(table) = &self.table else { return };
        let Some(signed) = table.signed() else { return };
        let version = (signed.sealed, signed.count);
        let state = Some((signed.sealed, signed.count, self.offers.joined()));
        if self.tables_sent == state {
            return;
        }
        self.tables_sent = state;
        for peer in self.offers.children() {
            let link = self.links.entry(peer).or_default();
            let last = last_offered.get(&peer).copied().flatten();
            let covers =
                |sent: (bool, u32)| last.is_none_or(|piece| piece < sent.1) && sent.0 == version.0;
            match link.signed_sent {
                Some(sent) if sent >= version => continue,
                Some(sent) if covers(sent) => {
                    self.tables_sent = None;
                    continue;
                }
                _ => {}
            }
            let first = link.table_sent.min(signed.count);
            link.table_sent = signed.count;
            link.signed_sent = Some(version);
            link.told = Some(now);
            outputs.push_back(Output::Send(
                peer,
                Message::Table {
                    task: *digest,
                    size_bytes: table.layout().size_bytes(),
                    first,
                    values: table.values()[first as usize..signed.count as usize].to_vec(),
                    signed: Some(signed.clone()),
                },
            ));
        }
    }
}
