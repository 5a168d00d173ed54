//! Pieces that come, from peers and from the origin, and what follows when they are wrong.

use std::time::Duration;

use super::pace::{self, Kind};
use super::phase::Change;
use super::task::OriginState;
use super::{BUSY_REST, Failure, Node, Output, TableSigner, Trust, Verdict};
use crate::Time;
use crate::limit::TokenBucket;
use crate::message::{Message, Refusal};
use crate::parents::Fault;
use crate::piece::{PeerId, PieceIndex, PieceTable};
use hawker_oci::digest::{Chain, Digest};

impl<N: TableSigner> Node<N> {
    /// A piece came from a peer; `chain` ran over its bytes from the piece's start.
    pub(super) fn piece(
        &mut self,
        now: Time,
        peer: PeerId,
        request: u32,
        chain: &Chain,
    ) -> Verdict {
        let Some((digest, piece, at)) = self.asked.remove(&(peer, request)) else {
            return Verdict::Drop;
        };
        let Some(task) = self.tasks.get_mut(&digest) else {
            return Verdict::Drop;
        };
        let (Some(fetch), Some(table)) = (&mut task.fetch, &task.table) else {
            return Verdict::Drop;
        };
        fetch.failed(piece, peer, request);
        if fetch.held().contains(piece) {
            return Verdict::Drop;
        }
        match table.verify(piece, chain) {
            // The table shrank under it (poisoned and begun anew).
            None => Verdict::Drop,
            Some(true) => {
                self.parents
                    .served(peer, fetch.layout().len_bytes(piece), now.since(at));
                self.kept(now, &digest, piece);
                self.leave_origin_to_others(now, &digest, peer);
                Verdict::Keep
            }
            Some(false) => {
                let last = Some(piece) == fetch.layout().last();
                fetch.withdrawn(peer, piece);
                if last {
                    task.last_wrong.insert(peer);
                }
                let poisoned = task.last_wrong.len() >= 2;
                self.outputs.push_back(Output::Send(
                    peer,
                    Message::Wrong {
                        task: digest,
                        piece,
                    },
                ));
                self.punish(now, peer, &digest, Fault::WrongBytes);
                if poisoned {
                    self.poison(now, &digest);
                }
                Verdict::Wrong
            }
        }
    }

    /// A peer brings pieces after all: a node that should not read the origin for others stops reading it. A peer that
    /// brings a piece only now and then does not count.
    fn leave_origin_to_others(&mut self, now: Time, digest: &Digest, peer: PeerId) {
        if !self.parents.trusted(now, peer) {
            return;
        }
        let Some(task) = self.tasks.get_mut(digest) else {
            return;
        };
        task.in_vain = false;
        // Peers may have dropped the next pieces of a node without disk that lags behind them.
        if task.memory.is_some() {
            return;
        }
        let reads = !task.elected && matches!(task.reading, OriginState::At(_));
        if !reads || !self.has_pending_source(now, digest, |peer| self.parents.trusted(now, peer)) {
            return;
        }
        if let Some(task) = self.tasks.get_mut(digest) {
            task.reading = OriginState::No;
            self.outputs.push_back(Output::StopOrigin(*digest));
        }
    }

    /// A request to a peer came to nothing.
    pub(super) fn piece_failed(
        &mut self,
        now: Time,
        peer: PeerId,
        request: u32,
        refused: Option<Refusal>,
        fault: Fault,
    ) {
        let Some((digest, piece, at)) = self.asked.remove(&(peer, request)) else {
            return;
        };
        self.refund(&digest, piece);
        if let Some(fetch) = self.tasks.get_mut(&digest).and_then(|t| t.fetch.as_mut()) {
            fetch.failed(piece, peer, request);
            self.parents
                .did_not_serve(peer, fetch.layout().len_bytes(piece), now.since(at));
            match refused {
                // A busy peer still has it; one that lost it has not.
                Some(Refusal::NotHeld | Refusal::Unable) => fetch.withdrawn(peer, piece),
                Some(Refusal::Draining) => fetch.parent_lost(peer),
                Some(Refusal::Busy) => fetch.rest(peer, now + BUSY_REST),
                _ => {}
            }
        }
        match refused {
            // To shed load is no fault, nor to end in order, nor to have no disk.
            Some(Refusal::Busy | Refusal::Draining | Refusal::Unable) => {}
            Some(Refusal::NotHeld) => self.punish(now, peer, &digest, Fault::NotHeld),
            _ => self.punish(now, peer, &digest, fault),
        }
    }

    /// A piece that was asked for will not come: it counts for no rate.
    fn refund(&mut self, digest: &Digest, piece: PieceIndex) {
        let len = self
            .tasks
            .get(digest)
            .and_then(|t| t.fetch.as_ref())
            .map(|f| f.layout().len_bytes(piece));
        if let Some(len) = len {
            self.buckets(Kind::Download, digest)
                .for_each(|bucket| bucket.refund(len));
        }
    }

    /// All that a piece of a task counts for.
    fn buckets(&mut self, kind: Kind, digest: &Digest) -> impl Iterator<Item = &mut TokenBucket> {
        let prefetch = self.is_prefetch(digest);
        let purpose = self.purpose_of(digest);
        let (quotas, all) = (&mut self.quotas, prefetch.then_some(&mut self.prefetch));
        let task = self.tasks.get_mut(digest);
        task.map(|task| pace::buckets(kind, &mut task.pace, quotas, &purpose, all))
            .into_iter()
            .flatten()
    }

    pub(super) fn punish(&mut self, now: Time, peer: PeerId, digest: &Digest, fault: Fault) {
        self.parents.punish(now, peer, fault);
        self.outputs.push_back(Output::Report(peer, *digest, fault));
        if fault == Fault::WrongBytes {
            self.forget_parent(now, peer);
        }
    }

    /// The next piece of the origin's stream is whole; `chain` ran from the piece's start.
    pub(super) fn origin_piece(
        &mut self,
        now: Time,
        digest: &Digest,
        piece: PieceIndex,
        chain: &Chain,
    ) -> Verdict {
        let honest = self.honest_prefix(digest);
        let Some(task) = self.tasks.get_mut(digest) else {
            return Verdict::Drop;
        };
        let (Some(fetch), Some(table), OriginState::At(at)) =
            (&task.fetch, &mut task.table, task.reading)
        else {
            return Verdict::Drop;
        };
        if at != piece {
            return Verdict::Drop;
        }
        let next = piece + 1;
        let last = Some(piece) == fetch.layout().last();
        match (table.verify(piece, chain), chain.value()) {
            (Some(true), _) => {}
            (Some(false), _) if last && honest => {
                // Everything before was read from the origin too: its bytes are not what the digest says.
                self.origin_over(now, digest, Some(Failure::WrongDigest));
                return Verdict::Wrong;
            }
            // Peers' values say otherwise, or peers' pieces make the digest wrong: believe the origin, and start over.
            (Some(false), _) => {
                self.poison(now, digest);
                return Verdict::Wrong;
            }
            (None, Some(value)) if table.values().len() as u32 == piece => {
                table.push(value);
                // Pieces on disk are worth nothing after a restart without the values that verify them.
                self.outputs.push_back(Output::TableGrew(*digest));
                if task.signed_by_nobody() {
                    task.trust = Some(Trust::Clients);
                }
            }
            (None, _) => return Verdict::Drop,
        }
        let Some(task) = self.tasks.get_mut(digest) else {
            return Verdict::Drop;
        };
        let fresh = task
            .fetch
            .as_ref()
            .is_some_and(|f| !f.held().contains(piece));
        task.reading = OriginState::At(next);
        let len = task
            .fetch
            .as_ref()
            .map_or(0, |f| f.layout().len_bytes(piece));
        for bucket in self.buckets(Kind::Origin, digest) {
            bucket.reserve(now, len);
        }
        if fresh {
            self.kept(now, digest, piece);
        }
        self.origin_next(digest, next);
        if fresh { Verdict::Keep } else { Verdict::Drop }
    }

    /// How long to wait before reading on from the origin, for the rates' sake.
    pub fn origin_waits(&mut self, now: Time, digest: &Digest) -> Duration {
        self.buckets(Kind::Origin, digest)
            .map(|bucket| bucket.reserve(now, 0))
            .max()
            .unwrap_or_default()
    }

    /// Whether the whole table came from this node's own reading of the origin.
    pub(super) fn honest_prefix(&self, digest: &Digest) -> bool {
        self.tasks.get(digest).is_some_and(|t| {
            t.table
                .as_ref()
                .and_then(PieceTable::signed)
                .is_none_or(|signed| signed.issuer == self.config.me)
        })
    }

    /// Goes on reading, skips what is held, or stops.
    pub(super) fn origin_next(&mut self, digest: &Digest, next: PieceIndex) {
        let Some(task) = self.tasks.get_mut(digest) else {
            return;
        };
        let Some(fetch) = &task.fetch else { return };
        if task.is_complete() || next >= fetch.layout().count() {
            // The stream ends by itself, or there is nothing left to read.
            if !matches!(task.reading, OriginState::No) {
                task.reading = OriginState::No;
                self.outputs.push_back(Output::StopOrigin(*digest));
            }
        } else if fetch.held().contains(next) {
            task.reading = OriginState::No;
            self.outputs.push_back(Output::StopOrigin(*digest));
        }
    }

    /// The origin's stream is over: by itself, or by failure.
    pub(super) fn origin_over(&mut self, now: Time, digest: &Digest, failure: Option<Failure>) {
        if failure.is_some() {
            self.count_failure(now, digest);
        }
        let Some(task) = self.tasks.get_mut(digest) else {
            return;
        };
        if let OriginState::At(_) = task.reading {
            task.reading = match failure {
                Some(failure) => OriginState::FailedAt(now, failure),
                None => OriginState::No,
            };
        }
        if failure == Some(Failure::WrongDigest) {
            task.reading = OriginState::FailedAt(now, Failure::WrongDigest);
            self.outputs.push_back(Output::Poisoned(*digest));
            task.start_over(digest);
        }
    }

    pub(super) fn kept(&mut self, now: Time, digest: &Digest, piece: PieceIndex) {
        let Some(task) = self.tasks.get_mut(digest) else {
            return;
        };
        let Some(fetch) = &mut task.fetch else { return };
        task.moved = now;
        let len_bytes = fetch.layout().len_bytes(piece);
        if let Some(memory) = &mut task.memory {
            memory.keep(now, piece, len_bytes);
        }
        for rest in fetch.got(piece) {
            self.asked.remove(&(rest.peer, rest.request));
            self.parents
                .did_not_serve(rest.peer, len_bytes, now.since(rest.at));
            self.outputs.push_back(Output::Cancel {
                peer: rest.peer,
                request: rest.request,
            });
        }
        if fetch.held().is_full() {
            task.enter(Change::Filled);
            task.refills = false;
            // Every piece matches and the last one ends in the digest: the table is right, whatever its source.
            task.trust = Some(Trust::Clients);
            if task.is_issuer(self.config.role) {
                task.issue(&self.notary);
            }
            task.show(digest, &mut self.outputs);
            if let OriginState::At(_) = task.reading {
                task.reading = OriginState::No;
                self.outputs.push_back(Output::StopOrigin(*digest));
            }
            self.outputs.push_back(Output::Complete(*digest));
        } else {
            task.show_piece(digest, piece, &mut self.outputs);
        }
    }

    pub(super) fn poison(&mut self, now: Time, digest: &Digest) {
        self.stop(digest);
        let Some(task) = self.tasks.get_mut(digest) else {
            return;
        };
        let issuer = task
            .table
            .as_ref()
            .and_then(PieceTable::signed)
            .map(|s| s.issuer);
        task.start_over(digest);
        task.moved = now;
        self.outputs.push_back(Output::Poisoned(*digest));
        if let Some(issuer) = issuer.filter(|i| *i != self.config.me) {
            self.poisoners.insert(issuer);
            self.punish(now, issuer, digest, Fault::WrongBytes);
        }
    }
}
