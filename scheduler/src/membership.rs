//! The members of the cluster and their addresses: the list of seeds and schedulers that every member keeps.

use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use hawker_api::convert::{self, Member};
use hawker_api::v1;
use hawker_core::message::Role;
use hawker_core::piece::PeerId;
use hawker_identity::member_file;
use tracing::warn;

/// How long a member whose stream broke stays listed: longer than trackers wait before they try again.
pub(crate) const LISTED_AFTER: Duration = Duration::from_secs(20);

/// Everybody whose stream is here, or was a moment ago.
pub(crate) struct Membership {
    ourselves: Member,
    known: BTreeMap<PeerId, Known>,
    /// The members that went, with the times, in order.
    departed: VecDeque<(Instant, PeerId)>,
    file: PathBuf,
    /// The list as it was told and saved last.
    told: Vec<Member>,
}

struct Known {
    member: Member,
    /// As it goes over the wire, made once.
    wire: v1::Member,
    gone_at: Option<Instant>,
}

impl Membership {
    /// Starts with what the file says, and with what others `told`; those members count as just gone.
    pub(crate) fn load(ourselves: Member, file: PathBuf, told: Vec<Member>, now: Instant) -> Self {
        let saved = member_file::load(&file).unwrap_or_else(|error| {
            warn!(file = %file.display(), %error, "the member list cannot be read; it fills again as members come back");
            Vec::new()
        });
        let mut membership = Self {
            ourselves,
            known: BTreeMap::new(),
            departed: VecDeque::new(),
            file,
            told: Vec::new(),
        };
        for member in saved.into_iter().chain(told) {
            let peer = member.peer;
            if peer == membership.ourselves.peer {
                continue;
            }
            membership.arrived(member);
            membership.departed(peer, now);
        }
        membership
    }

    pub(crate) fn arrived(&mut self, member: Member) {
        let wire = convert::member(&member);
        self.known.insert(
            member.peer,
            Known {
                member,
                wire,
                gone_at: None,
            },
        );
    }

    pub(crate) fn departed(&mut self, peer: PeerId, now: Instant) {
        if let Some(known) = self.known.get_mut(&peer) {
            known.gone_at = Some(now);
            self.departed.push_back((now, peer));
        }
    }

    /// Forgets a member that was removed from the cluster.
    pub(crate) fn remove(&mut self, peer: PeerId) {
        self.known.remove(&peer);
    }

    /// Forgets who has been gone too long. Returns when to do that next.
    pub(crate) fn sweep(&mut self, now: Instant) -> Option<Instant> {
        while let Some((gone_at, peer)) = self.departed.front().copied() {
            if now < gone_at + LISTED_AFTER {
                return Some(gone_at + LISTED_AFTER);
            }
            self.departed.pop_front();
            if self
                .known
                .get(&peer)
                .is_some_and(|known| known.gone_at == Some(gone_at))
            {
                self.known.remove(&peer);
            }
        }
        None
    }

    /// How to reach a member.
    pub(crate) fn wire(&self, peer: PeerId) -> Option<v1::Member> {
        self.known.get(&peer).map(|known| known.wire.clone())
    }

    /// Everybody, ourselves first; `true` for those whose stream is here.
    pub(crate) fn all(&self) -> impl Iterator<Item = (&Member, bool)> {
        let others = self
            .known
            .values()
            .map(|known| (&known.member, known.gone_at.is_none()));
        std::iter::once((&self.ourselves, true)).chain(others)
    }

    /// Seeds and schedulers.
    pub(crate) fn list(&self) -> Vec<Member> {
        let listed = self
            .all()
            .map(|(member, _)| member)
            .filter(|member| member.role != Role::Peer);
        listed.take(convert::MAX_MEMBERS).cloned().collect()
    }

    /// The list, if it has changed since this was asked last. It is then on disk, too.
    pub(crate) fn news(&mut self) -> Option<Vec<Member>> {
        let list = self.list();
        if list == self.told {
            return None;
        }
        if let Err(error) = member_file::save(&self.file, &list) {
            warn!(file = %self.file.display(), %error, "the member list cannot be saved");
        }
        self.told.clone_from(&list);
        Some(list)
    }
}
