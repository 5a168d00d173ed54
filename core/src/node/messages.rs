//! Messages from peers, and the value of the piece tables in them.

use std::borrow::Cow;

use super::memory::Memory;
use super::table::{self, UNPROVEN_A_PEER_BYTES, Weight};
use super::task::{Advice, Task};
use super::uploads::Waiting;
use super::{Child, Node, Output, TableSigner};
use crate::Time;
use crate::message::{Message, Offer, Refusal, Role};
use crate::piece::{PeerId, PieceIndex, PieceSet, PieceTable, SignedPrefix};
use crate::right::Right;
use hawker_oci::digest::Digest;

impl<N: TableSigner> Node<N> {
    /// Whether a decision may follow from a message at once. News of pieces that this node has no room for can wait for the next one.
    pub fn is_urgent(&self, peer: PeerId, message: &Message) -> bool {
        match message {
            Message::Have { task, offer, .. } => self.may_ask(peer) && self.is_new(task, offer),
            Message::Request { .. } => self.uploads.has_slot(),
            Message::Cancel { .. } | Message::Reject { .. } => false,
            _ => true,
        }
    }

    /// Whether any of the pieces on offer is neither here nor on its way.
    fn is_new(&self, task: &Digest, offer: &Offer) -> bool {
        let Some(task) = self.tasks.get(task) else {
            return false;
        };
        match (&task.fetch, offer) {
            (Some(fetch), Offer::Some(pieces)) => {
                pieces.iter().any(|piece| !fetch.is_on_its_way(*piece))
            }
            _ => true,
        }
    }

    /// Whether more could be asked for, if anybody offered it.
    pub fn has_room(&self) -> bool {
        let in_flight = self.in_flight_bytes();
        let fits = |task: &Task| {
            let piece_bytes = task
                .fetch
                .as_ref()
                .map_or(0, |fetch| fetch.layout().piece_bytes());
            // As in `ask_in_turn`: one request is always allowed.
            task.asked_bytes() == 0 || in_flight + piece_bytes <= self.config.in_flight_bytes
        };
        self.tasks
            .values()
            .any(|task| task.is_running() && fits(task))
    }

    /// Whether there is room for a request, and none at this peer.
    fn may_ask(&self, peer: PeerId) -> bool {
        self.has_room()
            && self
                .asked
                .range((peer, 0)..=(peer, u32::MAX))
                .next()
                .is_none()
    }

    /// A peer sent a message.
    pub(super) fn message(&mut self, now: Time, peer: PeerId, message: Message) {
        match message {
            Message::Interest {
                task,
                source,
                size_bytes,
                token,
                purpose,
                far,
                passive,
                partial,
            } => {
                if !self.may_wait(peer, &task) {
                    self.refuse(peer, task, Refusal::Busy);
                    return;
                }
                let child = Child {
                    peer,
                    purpose,
                    far,
                    passive,
                    partial,
                };
                // A task that has no memory yet may get some for its first child: the shell says, once it has loaded the task. One that
                // rests is begun again first, where it may be.
                let is_settled = |t: &Task| t.memory.as_ref().is_none_or(Memory::has_budget);
                let adopts = |t: &Task| is_settled(t) && t.will_share();
                if passive || self.tasks.get(&task).is_some_and(adopts) {
                    self.adopt(now, &task, &child);
                }
                if passive {
                    return;
                }
                // Also for a task in play: one that is held in part only may be wanted whole from now on.
                self.outputs.push_back(Output::Load {
                    task,
                    source,
                    token,
                    size_bytes,
                    child,
                });
            }
            Message::Have {
                task,
                size_bytes,
                offer,
            } => self.have(now, peer, task, size_bytes, &offer),
            Message::Table {
                task,
                size_bytes,
                first,
                values,
                signed,
            } => {
                // Only from those who were asked for the task or asked for it, and only with a statement.
                if let Some(t) = self.tasks.get_mut(&task)
                    && let Some(link) = t.links.get_mut(&peer)
                    && let Some(signed) = signed
                {
                    // It need not be told what it says itself.
                    link.signed_sent = link.signed_sent.max(Some((signed.sealed, signed.count)));
                    link.table_sent = link.table_sent.max(signed.count);
                    link.unproven.accept_values(
                        size_bytes,
                        first,
                        values,
                        Some(signed),
                        t.table.as_ref(),
                    );
                    self.prove_from(now, &task, peer);
                }
            }
            Message::Working { task } => {
                if let Some(link) = self
                    .tasks
                    .get_mut(&task)
                    .and_then(|t| t.links.get_mut(&peer))
                {
                    link.working = Some(now);
                    link.unavailable = false;
                }
            }
            Message::Unavailable { task, reason } => self.unavailable(peer, &task, reason),
            Message::Leave { task } => self.leaves(&task, peer),
            Message::Wrong { task, piece: _ } => self.outputs.push_back(Output::Recheck(task)),
            Message::Request {
                request,
                task,
                piece,
                prefetch,
                priority,
            } => {
                self.requested(Waiting {
                    peer,
                    request,
                    task,
                    piece,
                    prefetch,
                    priority,
                    since: now,
                });
            }
            Message::Cancel { request } => self.uploads.cancel(peer, request),
            // The transport reports a rejected download as failed: see `piece_failed`.
            Message::Reject { .. } => {}
        }
    }

    fn unavailable(&mut self, peer: PeerId, digest: &Digest, reason: Refusal) {
        let is_seed = self.connected.get(&peer) == Some(&Role::Seed);
        let Some(task) = self.tasks.get_mut(digest) else {
            return;
        };
        let Some(link) = task.links.get_mut(&peer) else {
            return;
        };
        link.unavailable = true;
        link.working = None;
        // Should somebody name it again, it is asked again.
        link.asked = None;
        if reason == Refusal::Unable {
            task.offers.has_no_disk(peer);
        }
        // A registry says 404 as well to those who may not know that something is there.
        let may_not_read =
            matches!(reason, Refusal::Origin(401 | 403 | 404)) && task.right != Right::Own;
        // A seed without disk and without memory leaves it to the others: one of them is to read it for all.
        let leaves_it = reason == Refusal::Unable && task.memory.is_none();
        if is_seed && (may_not_read || leaves_it) && !task.is_closed_to_seeds {
            task.is_closed_to_seeds = true;
            task.advice = Advice::NotAsked;
        }
    }

    pub(super) fn have(
        &mut self,
        now: Time,
        peer: PeerId,
        digest: Digest,
        size_bytes: u64,
        offer: &Offer,
    ) {
        let isolated = self.isolated.contains(&peer);
        let Some(task) = self.tasks.get_mut(&digest) else {
            return;
        };
        let brings = self
            .connected
            .get(&peer)
            .is_some_and(|role| task.is_brought_by(peer, *role));
        task.links.entry(peer).or_default().working = Some(now);
        let Some(fetch) = &mut task.fetch else {
            if self.unproven_bytes(peer) + offer.bytes() <= UNPROVEN_A_PEER_BYTES
                && let Some(link) = self
                    .tasks
                    .get_mut(&digest)
                    .and_then(|task| task.links.get_mut(&peer))
            {
                link.unproven.early(size_bytes, offer);
            }
            return;
        };
        if fetch.layout().size_bytes() != size_bytes {
            task.links.entry(peer).or_default().unavailable = true;
            return;
        }
        let count = fetch.layout().count();
        let pieces: Cow<'_, [PieceIndex]> = match offer {
            Offer::Some(some) => some.into(),
            Offer::All => (0..count).collect(),
            Offer::Bits(bits) => PieceSet::from_bytes(count, bits).iter().collect(),
        };
        let pieces = || pieces.iter().copied().filter(|piece| *piece < count);
        task.offers.holds(peer, pieces());
        if !isolated {
            if brings {
                fetch.issues(peer);
                task.offers.hears_all(peer);
            }
            fetch.offered(peer, pieces());
        }
    }

    pub(super) fn requested(&mut self, asked: Waiting) {
        let Waiting {
            peer,
            request,
            piece,
            since,
            ..
        } = asked;
        let role = self.config.role;
        let task = self.tasks.get_mut(&asked.task);
        let (offered, without_disk) = task.as_ref().map_or((false, false), |t| {
            (
                t.may_announce(role) && t.keeps(piece) && t.may_share(),
                t.memory.is_some(),
            )
        });
        match task.filter(|_| offered) {
            Some(task) => {
                task.offers.asked(since, peer, piece);
                let sent_away = self.uploads.wait(asked);
                self.shed(sent_away);
            }
            None => {
                // A piece that had to leave the memory may have been offered rightly.
                let reason = if without_disk {
                    Refusal::Unable
                } else {
                    Refusal::NotHeld
                };
                self.outputs
                    .push_back(Output::Send(peer, Message::Reject { request, reason }));
            }
        }
    }

    /// Tells these to ask elsewhere: there is more to send than can be sent.
    pub(super) fn shed(&mut self, sent_away: impl IntoIterator<Item = Waiting>) {
        for Waiting { peer, request, .. } in sent_away {
            let reason = Refusal::Busy;
            self.outputs
                .push_back(Output::Send(peer, Message::Reject { request, reason }));
        }
    }

    /// Takes in what peers sent of the table as far as it counts now.
    pub(super) fn prove(&mut self, now: Time, digest: &Digest) {
        let Some(task) = self.tasks.get(digest) else {
            return;
        };
        let news = task
            .links
            .iter()
            .filter(|(_, link)| link.unproven.has_news());
        for peer in news.map(|(peer, _)| *peer).collect::<Vec<_>>() {
            self.prove_from(now, digest, peer);
        }
    }

    /// Takes in what one peer sent of the table, if it counts.
    fn prove_from(&mut self, now: Time, digest: &Digest, peer: PeerId) {
        let Some(task) = self.tasks.get_mut(digest) else {
            return;
        };
        let named = task.issuer;
        let Some(link) = task
            .links
            .get_mut(&peer)
            .filter(|link| link.unproven.has_news())
        else {
            return;
        };
        if task
            .table
            .as_ref()
            .is_some_and(|table| link.unproven.repeats(table))
        {
            link.unproven.settle();
            let early = link.unproven.take_early();
            self.have_early(now, peer, digest, early);
            return;
        }
        let complete = link.unproven.complete();
        let believed =
            |issuer: &PeerId| !self.isolated.contains(issuer) && !self.poisoners.contains(issuer);
        let Some((size_bytes, values, signed)) =
            complete.filter(|(.., signed)| believed(&signed.issuer))
        else {
            link.unproven.forget_table();
            return;
        };
        let statement = SignedPrefix::statement(
            digest,
            size_bytes,
            &values[..signed.count as usize],
            signed.sealed,
            signed.signed_at_s,
            &signed.registries,
        );
        let trust = match table::weigh(&self.notary, &signed, &statement, named) {
            Weight::Counts(trust) => trust,
            Weight::Undecided => return self.bound_unproven(digest, peer),
            Weight::Nothing => return link.unproven.forget_table(),
        };
        link.unproven.settle();
        let early = link.unproven.take_early();
        if task.fetch.is_none() {
            task.set_size(digest, (self.config.layout)(size_bytes), None);
            self.outputs.push_back(Output::Sized(*digest, size_bytes));
        }
        let Some(known) = &mut task.table else { return };
        if signed.sealed && known.is_sealed() {
            let mut other = PieceTable::new(*digest, (self.config.layout)(size_bytes));
            values[..signed.count as usize]
                .iter()
                .for_each(|value| other.push(*value));
            other.sign(signed.clone());
            if known.contradiction(&other).is_some() {
                self.outputs
                    .push_back(Output::Contradiction(Box::new([known.clone(), other])));
            }
        }
        if known.layout().size_bytes() != size_bytes {
            link_unavailable(task, peer);
            return;
        }
        match known.extend(0, &values[..signed.count as usize], Some(signed)) {
            Ok(grew) => {
                task.trust = task.trust.max(Some(trust));
                if grew {
                    task.show(digest, &mut self.outputs);
                    self.outputs.push_back(Output::TableGrew(*digest));
                }
            }
            // Two statements that count contradict each other: the origin decides, see `origin_piece`.
            Err(_) => link_unavailable(task, peer),
        }
        self.have_early(now, peer, digest, early);
    }

    /// Memory for what one peer said that does not count yet.
    pub(super) fn unproven_bytes(&self, peer: PeerId) -> usize {
        let links = self.tasks.values().filter_map(|task| task.links.get(&peer));
        links.map(|link| link.unproven.bytes()).sum()
    }

    /// A table may count once its issuer is named. It is kept till then if the peer does not say too much.
    fn bound_unproven(&mut self, digest: &Digest, peer: PeerId) {
        if self.unproven_bytes(peer) > UNPROVEN_A_PEER_BYTES
            && let Some(link) = self
                .tasks
                .get_mut(digest)
                .and_then(|task| task.links.get_mut(&peer))
        {
            link.unproven.forget_table();
        }
    }

    /// Takes the offers of a peer from before its table counted.
    fn have_early(&mut self, now: Time, peer: PeerId, digest: &Digest, early: Vec<(u64, Offer)>) {
        for (size_bytes, offer) in early {
            self.have(now, peer, *digest, size_bytes, &offer);
        }
    }
}

pub(super) fn link_unavailable(task: &mut Task, peer: PeerId) {
    if let Some(link) = task.links.get_mut(&peer) {
        link.unavailable = true;
    }
}
