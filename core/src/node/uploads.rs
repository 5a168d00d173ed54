//! Whom to serve next: few at a time, what the fewest hold first.

use std::collections::BTreeSet;

use crate::Time;
use crate::digest::Digest;
use crate::piece::{PeerId, PieceIndex};

/// Requests that wait at most, over all children; past it the answer is "busy".
const WAITING: usize = 1024;

/// Requests that one child may have waiting.
const WAITING_A_CHILD: usize = 32;

/// A request that waits for a slot.
#[derive(Clone, Debug)]
pub(super) struct Waiting {
    pub(super) peer: PeerId,
    pub(super) request: u32,
    pub(super) task: Digest,
    pub(super) piece: PieceIndex,
    pub(super) since: Time,
}

/// The upload slots and who waits for them.
#[derive(Clone, Debug)]
pub(super) struct Uploads {
    slots: usize,
    waiting: Vec<Waiting>,
    active: BTreeSet<(PeerId, u32)>,
}

impl Uploads {
    pub(super) const fn new(slots: usize) -> Self {
        Self { slots: if slots == 0 { 1 } else { slots }, waiting: Vec::new(), active: BTreeSet::new() }
    }

    /// Puts a request in the queue; `false` when it is full.
    pub(super) fn wait(&mut self, waiting: Waiting) -> bool {
        let theirs = self.waiting.iter().filter(|w| w.peer == waiting.peer).count();
        let room = self.waiting.len() < WAITING && theirs < WAITING_A_CHILD;
        if room {
            self.waiting.push(waiting);
        }
        room
    }

    /// The next request to serve, if a slot is free: what nobody else holds, then the child that is sent least, then the oldest.
    /// By how rare a piece is beyond that, some would wait for ever while newer ones come; the askers choose what is rare.
    pub(super) fn next(&mut self, spread: impl Fn(&Waiting) -> u16) -> Option<Waiting> {
        if self.active.len() >= self.slots {
            return None;
        }
        let sent_to = |peer: PeerId| self.active.iter().filter(|(whom, _)| *whom == peer).count();
        let (at, _) = self
            .waiting
            .iter()
            .enumerate()
            .min_by_key(|(_, w)| (spread(w).min(1), sent_to(w.peer), w.since))?;
        let next = self.waiting.remove(at);
        self.active.insert((next.peer, next.request));
        Some(next)
    }

    /// Whether nothing is sent and nothing waits.
    pub(super) fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.active.len() < self.slots
    }

    pub(super) fn over(&mut self, peer: PeerId, request: u32) {
        self.active.remove(&(peer, request));
    }

    pub(super) fn cancel(&mut self, peer: PeerId, request: u32) {
        // One that is being sent is ended by the transport, which then says that it is over.
        self.waiting.retain(|w| (w.peer, w.request) != (peer, request));
    }

    pub(super) fn peer_gone(&mut self, peer: PeerId) {
        self.waiting.retain(|w| w.peer != peer);
        self.active.retain(|(whom, _)| *whom != peer);
    }

    pub(super) fn task_gone(&mut self, task: &Digest) {
        self.waiting.retain(|w| w.task != *task);
    }
}
