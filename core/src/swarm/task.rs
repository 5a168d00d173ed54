//! One task: its holders, its wanters, and its reader of the origin.

use std::collections::BTreeMap;

use crate::Time;
use crate::application::{Labels, Purpose};
use crate::piece::{PeerId, PieceLayout};
use hawker_oci::digest::Digest;

use super::gateways::Zones;
use super::slab::Slot;
use super::{HOT_WANTERS, MAX_SPREAD, SPREAD_EVERY};

/// The scheduler's record of one task.
#[derive(Debug)]
pub(super) struct Task {
    pub(super) digest: Digest,
    pub(super) size_bytes: Option<u64>,
    /// Ascending by peer: a binary search finds one, an index samples one, 24 bytes keep one.
    pub(super) copies: Vec<Copy>,
    /// How many of the copies are wanted.
    pub(super) wanting: u32,
    /// How many of those who want it may read it at its origin where seeds may not.
    pub(super) readers: u32,
    /// How many of those who want it are guests: another scheduler elects for them.
    pub(super) guests: u32,
    /// How many of the others named an issuer when they asked.
    pub(super) naming: u32,
    /// Since when any of them does.
    pub(super) named_at: Time,
    /// Over how many schedulers it is spread, and since when.
    pub(super) spread: u32,
    pub(super) spread_at: Time,
    pub(super) election: Option<Election>,
    /// The gateways of each zone, if there are several zones.
    pub(super) gateways: Zones,
    /// Since when nobody may be elected for it, for its application's sake.
    pub(super) postponed_at: Option<Time>,
    /// When anybody last wanted it or said something of it, give or take a minute.
    pub(super) touched: Time,
}

/// One peer's part in one task.
#[derive(Debug)]
pub(super) struct Copy {
    pub(super) peer: Slot,
    /// Pieces that it offers.
    pub(super) pieces: u32,
    /// How many peers it was named to, and may serve now.
    pub(super) children: u32,
    pub(super) complete: bool,
    /// It is fetching.
    pub(super) want: Option<Box<Want>>,
}

/// A peer's open question.
#[derive(Debug, Default)]
pub(super) struct Want {
    /// The parents named to it. All of them have copies, if only empty ones.
    pub(super) parents: Vec<Slot>,
    /// When it is to be told again.
    pub(super) push_at: Option<Time>,
    /// How often it was told.
    pub(super) told: u32,
    /// When it last said that it wants this.
    pub(super) said_at: Time,
    /// It may read the task at its origin, and seeds may not.
    pub(super) reads: bool,
    /// The issuer that it was told, by another scheduler or before this one started.
    pub(super) issuer: Option<PeerId>,
    /// It asks here because the task is spread.
    pub(super) guest: bool,
    /// The parents that it was named before did not suffice, and it has not got on since.
    pub(super) again: bool,
    /// It fetches ranges only.
    pub(super) partial: bool,
    /// For whom it fetches, if it says.
    pub(super) purpose: Option<Box<Purpose>>,
}

impl Want {
    /// Whether it may read here for others what seeds may not.
    const fn is_reader(&self) -> bool {
        self.reads && !self.guest
    }

    /// Whether its word on the issuer counts here.
    const fn names_issuer(&self) -> bool {
        self.issuer.is_some() && !self.guest
    }
}

/// The election of the peer that reads the task from the origin, if there is no seed.
#[derive(Debug)]
pub(super) struct Election {
    pub(super) peer: Slot,
    /// When it last had more pieces than before.
    pub(super) progress_at: Time,
    /// The peers that were elected before and got nowhere.
    pub(super) tried: Vec<Slot>,
    /// For whom the task was wanted then.
    pub(super) labels: Labels,
}

impl Copy {
    /// It holds nothing (yet).
    pub(super) const fn is_empty(&self) -> bool {
        self.pieces == 0 && !self.complete
    }
}

impl Task {
    pub(super) const fn new(digest: Digest, now: Time) -> Self {
        Self {
            digest,
            size_bytes: None,
            copies: Vec::new(),
            wanting: 0,
            readers: 0,
            guests: 0,
            naming: 0,
            named_at: now,
            spread: 1,
            spread_at: now,
            election: None,
            gateways: Zones::new(),
            postponed_at: None,
            touched: now,
        }
    }

    pub(super) fn copy(&self, peer: Slot) -> Option<&Copy> {
        self.position(peer).ok().and_then(|at| self.copies.get(at))
    }

    pub(super) fn copy_mut(&mut self, peer: Slot) -> Option<&mut Copy> {
        self.position(peer)
            .ok()
            .and_then(|at| self.copies.get_mut(at))
    }

    /// The peer's copy; an empty one when there was none.
    pub(super) fn copy_or_empty(&mut self, peer: Slot) -> &mut Copy {
        let at = self.position(peer).unwrap_or_else(|at| {
            self.copies.insert(
                at,
                Copy {
                    peer,
                    pieces: 0,
                    children: 0,
                    complete: false,
                    want: None,
                },
            );
            at
        });
        &mut self.copies[at]
    }

    pub(super) fn take_copy(&mut self, peer: Slot) -> Option<Copy> {
        let at = self.position(peer).ok()?;
        let copy = self.copies.remove(at);
        copy.want
            .as_deref()
            .into_iter()
            .for_each(|want| self.uncount(want));
        if self.copies.is_empty() {
            self.copies.shrink_to_fit();
        }
        Some(copy)
    }

    pub(super) fn want_mut(&mut self, peer: Slot) -> Option<&mut Want> {
        self.copy_mut(peer)?.want.as_deref_mut()
    }

    /// A peer's open question, which is over.
    pub(super) fn take_want(&mut self, peer: Slot) -> Option<Box<Want>> {
        let want = self.copy_mut(peer)?.want.take()?;
        self.uncount(&want);
        Some(want)
    }

    /// Opens a peer's question, or changes it. The peer has a copy.
    pub(super) fn change_want(&mut self, peer: Slot, change: impl FnOnce(&mut Want)) {
        let was_named = self.naming > 0;
        let Some(copy) = self.copy_mut(peer) else {
            return;
        };
        let mut want = copy.want.take();
        want.as_deref()
            .into_iter()
            .for_each(|want| self.uncount(want));
        let mut want = want.take().unwrap_or_default();
        change(&mut want);
        self.wanting += 1;
        self.readers += u32::from(want.is_reader());
        self.guests += u32::from(want.guest);
        self.naming += u32::from(want.names_issuer());
        if !was_named && want.names_issuer() {
            self.named_at = want.said_at;
        }
        if let Some(copy) = self.copy_mut(peer) {
            copy.want = Some(want);
        }
    }

    fn uncount(&mut self, want: &Want) {
        self.wanting -= 1;
        self.readers -= u32::from(want.is_reader());
        self.guests -= u32::from(want.guest);
        self.naming -= u32::from(want.names_issuer());
        if self.wanting == 0 {
            self.spread = 1;
            self.gateways.clear();
            self.postponed_at = None;
        }
    }

    /// Spreads it over one scheduler more when too many ask this one.
    pub(super) fn spread_when_hot(&mut self, now: Time) {
        let is_hot = self.wanting - self.guests > HOT_WANTERS && self.spread < MAX_SPREAD;
        if is_hot && (self.spread == 1 || now.since(self.spread_at) >= SPREAD_EVERY) {
            self.spread += 1;
            self.spread_at = now;
        }
    }

    /// Whether anybody wants it for whom this scheduler elects.
    pub(super) const fn is_ours(&self) -> bool {
        self.wanting > self.guests
    }

    /// The issuers that those who want it name, and how many name each.
    pub(super) fn named_issuers(&self) -> BTreeMap<PeerId, usize> {
        let mut named = BTreeMap::new();
        if self.naming > 0 {
            let wants = self.copies.iter().filter_map(|copy| copy.want.as_deref());
            for issuer in wants
                .filter(|want| want.names_issuer())
                .filter_map(|want| want.issuer)
            {
                *named.entry(issuer).or_default() += 1;
            }
        }
        named
    }

    /// The common purpose of all wanters.
    pub(super) fn purpose(&self) -> Purpose {
        let (default, wants) = (
            Purpose::default(),
            self.copies.iter().filter_map(|copy| copy.want.as_deref()),
        );
        let purposes = wants.map(|want| want.purpose.as_deref().unwrap_or(&default));
        Purpose::common(purposes).unwrap_or_default()
    }

    /// The wanters, ascending.
    pub(super) fn wanters(&self) -> impl Iterator<Item = Slot> + '_ {
        self.copies
            .iter()
            .filter(|copy| copy.want.is_some())
            .map(|copy| copy.peer)
    }

    /// Whether seeds may not read it at its origin, by the word of somebody who may.
    pub(super) const fn is_private(&self) -> bool {
        self.readers > 0
    }

    pub(super) fn elected(&self) -> Option<Slot> {
        self.election.as_ref().map(|election| election.peer)
    }

    /// How much of the task a copy is, 0 to 1.
    pub(super) fn completeness(&self, copy: &Copy) -> f32 {
        if copy.complete {
            return 1.0;
        }
        let pieces = self
            .size_bytes
            .map_or(u32::MAX, |size| PieceLayout::new(size).count());
        copy.pieces as f32 / pieces.max(1) as f32
    }

    fn position(&self, peer: Slot) -> Result<usize, usize> {
        self.copies.binary_search_by_key(&peer, |copy| copy.peer)
    }
}
