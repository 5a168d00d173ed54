//! One task: who holds copies of it, who wants it, who reads it from the origin.

use crate::Time;
use crate::digest::Digest;
use crate::piece::PieceLayout;

use super::slab::Slot;

/// What the scheduler knows of one task.
#[derive(Debug)]
pub(super) struct Task {
    pub(super) digest: Digest,
    pub(super) size_bytes: Option<u64>,
    /// Ascending by peer: a binary search finds one, an index samples one, 24 bytes keep one.
    pub(super) copies: Vec<Copy>,
    /// How many of the copies are wanted.
    pub(super) wanting: u32,
    pub(super) election: Option<Election>,
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
    /// Whom it was told to ask. All of them have copies, if only empty ones.
    pub(super) parents: Vec<Slot>,
    /// When it is to be told again.
    pub(super) push_at: Option<Time>,
    /// How often it was told.
    pub(super) told: u32,
    /// When it last said that it wants this.
    pub(super) said_at: Time,
    /// It may read the task at its origin, and seeds may not.
    pub(super) reads: bool,
}

/// Who reads the task from the origin, where there is no seed.
#[derive(Debug)]
pub(super) struct Election {
    pub(super) peer: Slot,
    /// When it last had more pieces than before.
    pub(super) progress_at: Time,
    /// Who was elected before and got nowhere.
    pub(super) tried: Vec<Slot>,
}

impl Copy {
    /// It holds nothing (yet).
    pub(super) const fn is_empty(&self) -> bool {
        self.pieces == 0 && !self.complete
    }
}

impl Task {
    pub(super) const fn new(digest: Digest, now: Time) -> Self {
        Self { digest, size_bytes: None, copies: Vec::new(), wanting: 0, election: None, touched: now }
    }

    pub(super) fn copy(&self, peer: Slot) -> Option<&Copy> {
        self.position(peer).ok().and_then(|at| self.copies.get(at))
    }

    pub(super) fn copy_mut(&mut self, peer: Slot) -> Option<&mut Copy> {
        self.position(peer).ok().and_then(|at| self.copies.get_mut(at))
    }

    /// The peer's copy; an empty one when there was none.
    pub(super) fn copy_or_empty(&mut self, peer: Slot) -> &mut Copy {
        let at = self.position(peer).unwrap_or_else(|at| {
            self.copies.insert(at, Copy { peer, pieces: 0, children: 0, complete: false, want: None });
            at
        });
        &mut self.copies[at]
    }

    pub(super) fn take_copy(&mut self, peer: Slot) -> Option<Copy> {
        let at = self.position(peer).ok()?;
        let copy = self.copies.remove(at);
        self.wanting -= u32::from(copy.want.is_some());
        if self.copies.is_empty() {
            self.copies.shrink_to_fit();
        }
        Some(copy)
    }

    pub(super) fn want_mut(&mut self, peer: Slot) -> Option<&mut Want> {
        self.copy_mut(peer)?.want.as_deref_mut()
    }

    /// Who wants it, ascending.
    pub(super) fn wanters(&self) -> impl Iterator<Item = Slot> + '_ {
        self.copies.iter().filter(|copy| copy.want.is_some()).map(|copy| copy.peer)
    }

    /// Whether seeds may not read it at its origin, by the word of somebody who may.
    pub(super) fn is_private(&self) -> bool {
        self.copies.iter().any(|copy| copy.want.as_ref().is_some_and(|want| want.reads))
    }

    pub(super) fn elected(&self) -> Option<Slot> {
        self.election.as_ref().map(|election| election.peer)
    }

    /// How much of the task a copy is, 0 to 1.
    pub(super) fn completeness(&self, copy: &Copy) -> f32 {
        if copy.complete {
            return 1.0;
        }
        let pieces = self.size_bytes.map_or(u32::MAX, |size| PieceLayout::new(size).count());
        copy.pieces as f32 / pieces.max(1) as f32
    }

    fn position(&self, peer: Slot) -> Result<usize, usize> {
        self.copies.binary_search_by_key(&peer, |copy| copy.peer)
    }
}
