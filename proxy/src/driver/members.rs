//! The known members of the cluster.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use hawker_core::message::Role;
use hawker_core::node::Named;
use hawker_core::piece::PeerId;

use crate::peer::Dial;
use hawker_tracker::{Isolation, Member};

/// The known members of the cluster, for the driver, manifests and people.
#[derive(Debug, Default)]
pub(crate) struct Members {
    state: std::sync::Mutex<MembersState>,
}

#[derive(Debug, Default)]
pub(super) struct MembersState {
    /// This node's zone; empty when not told.
    pub(super) zone: String,
    pub(super) listed: Vec<Member>,
    pub(super) met: HashMap<PeerId, Member>,
    pub(super) static_seeds: BTreeSet<PeerId>,
    pub(super) connected: BTreeSet<PeerId>,
    pub(super) isolated: BTreeMap<PeerId, Isolation>,
}

/// Members met remembered at most, beyond the list.
const MET: usize = 8192;

impl MembersState {
    fn named(&self, member: &Member) -> Named {
        Named {
            peer: member.peer,
            far: member.zone != self.zone,
        }
    }
}

impl Members {
    pub(crate) fn of(zone: String) -> Self {
        let state = MembersState {
            zone,
            ..MembersState::default()
        };
        Self {
            state: std::sync::Mutex::new(state),
        }
    }

    /// A member as a parent: far when it stands in another zone.
    pub(super) fn named(&self, member: &Member) -> Named {
        self.with(|state| state.named(member))
    }

    /// The seeds as parents. One that was configured and is not on the list yet counts as near.
    pub(super) fn named_seeds(&self) -> Vec<Named> {
        let seeds = self.seeds();
        self.with(|state| {
            let listed = |seed| state.listed.iter().find(|member| member.peer == seed);
            seeds
                .into_iter()
                .map(|seed| listed(seed).map_or(Named::near(seed), |member| state.named(member)))
                .collect()
        })
    }

    pub(super) fn with<T>(&self, act: impl FnOnce(&mut MembersState) -> T) -> T {
        act(&mut self
            .state
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner))
    }

    /// Forgets members that were removed from the cluster.
    pub(super) fn forget(&self, removed: &[PeerId]) {
        self.with(|state| {
            state
                .listed
                .retain(|member| !removed.contains(&member.peer));
            state.met.retain(|peer, _| !removed.contains(peer));
            state.static_seeds.retain(|peer| !removed.contains(peer));
        });
    }

    /// Notes a member that was met. Addresses that are known stay where it says none.
    pub(super) fn learn(&self, mut member: Member) {
        self.with(|state| {
            if member.addresses.is_empty()
                && let Some(known) = state.met.get(&member.peer)
            {
                member.addresses.clone_from(&known.addresses);
            }
            if state.met.len() < MET || state.met.contains_key(&member.peer) {
                state.met.insert(member.peer, member);
            }
        });
    }

    fn addresses(&self, peer: PeerId) -> Vec<String> {
        self.with(|state| {
            let listed = state
                .listed
                .iter()
                .find(|m| m.peer == peer)
                .or_else(|| state.met.get(&peer));
            listed.map(|m| m.addresses.clone()).unwrap_or_default()
        })
    }

    /// Seeds, by list and by configuration.
    pub(crate) fn seeds(&self) -> Vec<PeerId> {
        self.with(|state| {
            let listed = state
                .listed
                .iter()
                .filter(|m| m.role == Role::Seed)
                .map(|m| m.peer);
            let all: BTreeSet<PeerId> = listed.chain(state.static_seeds.iter().copied()).collect();
            all.into_iter().collect()
        })
    }

    /// How to dial a member; `None` when no address is known.
    pub(crate) fn dial(&self, peer: PeerId) -> Option<Dial> {
        let addresses = self.addresses(peer);
        (!addresses.is_empty()).then_some(Dial {
            peer: Some(peer),
            addresses,
        })
    }

    /// Everybody known: member, connected, isolated.
    pub(crate) fn all(&self) -> Vec<(Member, bool, Option<Isolation>)> {
        self.with(|state| {
            let mut all: HashMap<PeerId, Member> = state.met.clone();
            all.extend(state.listed.iter().map(|m| (m.peer, m.clone())));
            let mut all: Vec<_> = all
                .into_values()
                .map(|m| {
                    let (connected, isolated) = (
                        state.connected.contains(&m.peer),
                        state.isolated.get(&m.peer).cloned(),
                    );
                    (m, connected, isolated)
                })
                .collect();
            all.sort_by(|a, b| (&a.0.name, a.0.peer).cmp(&(&b.0.name, b.0.peer)));
            all
        })
    }
}
