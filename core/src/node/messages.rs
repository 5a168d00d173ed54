//! What peers say, and what their piece tables are worth.

use std::borrow::Cow;

use super::*;

impl<N: Notary> Node<N> {
    /// A peer said something. Whether anything may follow from it at once: most of what is heard of pieces can wait for the next
    /// decision.
    pub fn message(&mut self, now: Time, peer: PeerId, message: Message) -> bool {
        let matters = match &message {
            Message::Have { task, offer, .. } => self.may_ask(peer) && self.is_new(task, offer),
            Message::Request { .. } => self.uploads.has_slot(),
            Message::Cancel { .. } | Message::Reject { .. } => false,
            _ => true,
        };
        self.take_in(now, peer, message);
        matters || !self.outputs.is_empty()
    }

    /// Whether any of the pieces on offer is neither here nor on its way.
    fn is_new(&self, task: &Digest, offer: &Offer) -> bool {
        let Some(task) = self.tasks.get(task) else { return false };
        match (&task.fetch, offer) {
            (Some(fetch), Offer::Some(pieces)) => pieces.iter().any(|piece| !fetch.is_on_its_way(*piece)),
            _ => true,
        }
    }

    /// Whether more could be asked for, if anybody offered it.
    pub fn has_room(&self) -> bool {
        let in_flight = self.in_flight_bytes();
        let fits = |task: &Task| {
            let piece_bytes = task.fetch.as_ref().map_or(0, |fetch| fetch.layout().piece_bytes());
            // As in `ask_in_turn`: one request is always allowed.
            task.asked_bytes() == 0 || in_flight + piece_bytes <= self.config.in_flight_bytes
        };
        self.tasks.values().any(|task| task.running && fits(task))
    }

    /// Whether there is room for a request, and none at this peer.
    fn may_ask(&self, peer: PeerId) -> bool {
        self.has_room() && self.asked.range((peer, 0)..=(peer, u32::MAX)).next().is_none()
    }

    fn take_in(&mut self, now: Time, peer: PeerId, message: Message) {
        match message {
            Message::Interest { task, source, size_bytes: _, token, purpose, far } => {
                let child = Child { peer, purpose, far };
                if self.tasks.contains_key(&task) {
                    self.adopt(now, &task, &child);
                }
                // Also for a task in play: one that is held in part only may be wanted whole from now on.
                self.outputs.push_back(Output::Load { task, source, token, child });
            }
            Message::Have { task, size_bytes, offer } => self.have(now, peer, task, size_bytes, &offer),
            Message::Table { task, size_bytes, first, values, signed } => {
                if let Some(t) = self.tasks.get_mut(&task) {
                    let link = t.links.entry(peer).or_default();
                    // It need not be told what it says itself.
                    if let Some(signed) = &signed {
                        link.signed_sent = link.signed_sent.max(Some((signed.sealed, signed.count)));
                        link.table_sent = link.table_sent.max(signed.count);
                    }
                    link.unproven.take_in(size_bytes, first, values, signed, t.table.as_ref());
                    self.prove_from(now, &task, peer);
                }
            }
            Message::Working { task } => {
                if let Some(link) = self.tasks.get_mut(&task).and_then(|t| t.links.get_mut(&peer)) {
                    link.working = Some(now);
                    link.unavailable = false;
                }
            }
            Message::Unavailable { task, reason } => self.unavailable(peer, &task, reason),
            Message::Leave { task } => {
                if let Some(t) = self.tasks.get_mut(&task) {
                    t.leave(peer);
                }
            }
            Message::Wrong { task, piece: _ } => self.outputs.push_back(Output::Recheck(task)),
            Message::Request { request, task, piece, prefetch, priority } => {
                self.requested(Waiting { peer, request, task, piece, prefetch, priority, since: now });
            }
            Message::Cancel { request } => self.uploads.cancel(peer, request),
            // The transport reports a rejected download as failed: see `piece_failed`.
            Message::Reject { .. } => {}
        }
    }

    fn unavailable(&mut self, peer: PeerId, digest: &Digest, reason: Refusal) {
        let is_seed = self.connected.get(&peer) == Some(&Role::Seed);
        let Some(task) = self.tasks.get_mut(digest) else { return };
        let Some(link) = task.links.get_mut(&peer) else { return };
        link.unavailable = true;
        link.working = None;
        // Should somebody name it again, it is asked again.
        link.asked = None;
        // A registry says 404 as well to those who may not know that something is there.
        let may_not_read = is_seed && matches!(reason, Refusal::Origin(401 | 403 | 404));
        if may_not_read && task.right != Right::Own && !task.reads {
            task.reads = true;
            (task.wanted, task.answered) = (None, false);
        }
    }

    pub(super) fn have(&mut self, now: Time, peer: PeerId, digest: Digest, size_bytes: u64, offer: &Offer) {
        let isolated = self.isolated.contains(&peer);
        let Some(task) = self.tasks.get_mut(&digest) else { return };
        let brings = self.connected.get(&peer).is_some_and(|role| task.is_brought_by(peer, *role));
        task.links.entry(peer).or_default().working = Some(now);
        let Some(fetch) = &mut task.fetch else {
            task.links.entry(peer).or_default().unproven.early(size_bytes, offer);
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
        let Waiting { peer, request, piece, since, .. } = asked;
        let offered = self.tasks.get_mut(&asked.task).filter(|t| {
            t.announce && t.fetch.as_ref().is_some_and(|f| f.held().contains(piece)) && t.may_share()
        });
        match offered {
            Some(task) => {
                task.offers.asked(since, peer, piece);
                let sent_away = self.uploads.wait(asked);
                self.shed(sent_away);
            }
            None => {
                let reason = Refusal::NotHeld;
                self.outputs.push_back(Output::Send(peer, Message::Reject { request, reason }));
            }
        }
    }

    /// Tells these to ask elsewhere: there is more to send than can be sent.
    pub(super) fn shed(&mut self, sent_away: impl IntoIterator<Item = Waiting>) {
        for Waiting { peer, request, .. } in sent_away {
            let reason = Refusal::Busy;
            self.outputs.push_back(Output::Send(peer, Message::Reject { request, reason }));
        }
    }

    /// Takes in what peers sent of the table as far as it counts now.
    pub(super) fn prove(&mut self, now: Time, digest: &Digest) {
        let Some(task) = self.tasks.get(digest) else { return };
        let news = task.links.iter().filter(|(_, link)| link.unproven.has_news());
        for peer in news.map(|(peer, _)| *peer).collect::<Vec<_>>() {
            self.prove_from(now, digest, peer);
        }
    }

    /// Takes in what one peer sent of the table, if it counts.
    fn prove_from(&mut self, now: Time, digest: &Digest, peer: PeerId) {
        let Some(task) = self.tasks.get_mut(digest) else { return };
        let named = task.issuer;
        let Some(link) = task.links.get_mut(&peer).filter(|link| link.unproven.has_news()) else { return };
        if task.table.as_ref().is_some_and(|table| link.unproven.repeats(table)) {
            link.unproven.settle();
            let early = link.unproven.take_early();
            self.have_early(now, peer, digest, early);
            return;
        }
        let Some((size_bytes, values, signed)) = link.unproven.complete() else { return };
        if self.isolated.contains(&signed.issuer) || self.poisoners.contains(&signed.issuer) {
            return;
        }
        let statement = SignedPrefix::statement(
            digest,
            size_bytes,
            &values[..signed.count as usize],
            signed.sealed,
            signed.signed_at_s,
        );
        let Some(trust) = table::weigh(&self.notary, &signed, &statement, named) else { return };
        link.unproven.settle();
        let early = link.unproven.take_early();
        if task.fetch.is_none() {
            task.set_size(digest, (self.config.layout)(size_bytes), None);
            self.outputs.push_back(Output::Sized(*digest, size_bytes));
        }
        let Some(known) = &mut task.table else { return };
        if signed.sealed && known.is_sealed() {
            let mut other = PieceTable::new(*digest, (self.config.layout)(size_bytes));
            values[..signed.count as usize].iter().for_each(|value| other.push(*value));
            other.sign(signed.clone());
            if known.contradiction(&other).is_some() {
                self.outputs.push_back(Output::Contradiction(Box::new([known.clone(), other])));
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

    /// What a peer offered before its table counted.
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
