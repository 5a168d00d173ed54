//! Bounds connections of clients that have not shown a certificate, in all and for each address.
//!
//! A full door lets the newcomer in and shows the oldest guest out. An attacker that holds connections open therefore keeps
//! nobody out, not even from its own address: a handshake takes milliseconds, and so does a join.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hawker_core::piece::PeerId;
use hawker_network::client::Client;
use tokio_util::sync::CancellationToken;

/// Bounds guests in all and for each client.
#[derive(Clone)]
pub(crate) struct Door {
    guests: Arc<Mutex<Guests>>,
    most: usize,
    most_per_client: usize,
}

#[derive(Default)]
struct Guests {
    next: u64,
    by_number: BTreeMap<u64, (Client, CancellationToken)>,
    by_client: HashMap<Client, BTreeSet<u64>>,
}

impl Guests {
    fn remove(&mut self, number: u64) -> Option<CancellationToken> {
        let (client, shown_out) = self.by_number.remove(&number)?;
        if let Some(numbers) = self.by_client.get_mut(&client) {
            numbers.remove(&number);
            if numbers.is_empty() {
                self.by_client.remove(&client);
            }
        }
        Some(shown_out)
    }

    fn oldest_of(&self, client: Client) -> Option<u64> {
        self.by_client.get(&client)?.first().copied()
    }

    /// The oldest guest of the client that has the most.
    fn oldest_of_the_largest(&self) -> Option<u64> {
        self.by_client
            .values()
            .max_by_key(|numbers| numbers.len())?
            .first()
            .copied()
    }
}

impl Door {
    pub(crate) fn new(most: usize, most_per_client: usize) -> Self {
        Self {
            guests: Arc::default(),
            most,
            most_per_client,
        }
    }

    /// Lets a connection from this address in. Its place is free again when the guest is dropped.
    pub(crate) fn enter(&self, from: IpAddr) -> Guest {
        let client = Client::from(from);
        let mut guests = self.lock();
        let of_client = guests.by_client.get(&client).map_or(0, BTreeSet::len);
        let leaves = match () {
            () if of_client >= self.most_per_client => guests.oldest_of(client),
            () if guests.by_number.len() >= self.most => guests.oldest_of_the_largest(),
            () => None,
        };
        if let Some(shown_out) = leaves.and_then(|number| guests.remove(number)) {
            shown_out.cancel();
        }
        let number = guests.next;
        guests.next += 1;
        let shown_out = CancellationToken::new();
        guests.by_number.insert(number, (client, shown_out.clone()));
        guests.by_client.entry(client).or_default().insert(number);
        Guest {
            door: self.clone(),
            number,
            shown_out,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Guests> {
        self.guests.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A place behind a [`Door`].
pub(crate) struct Guest {
    door: Door,
    number: u64,
    shown_out: CancellationToken,
}

impl Guest {
    /// Cancelled when somebody else needs the place.
    pub(crate) fn shown_out(&self) -> CancellationToken {
        self.shown_out.clone()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.door.lock().remove(self.number);
    }
}

/// Live connections of members: bounded for each, and all of one member can be closed at once.
#[derive(Clone, Default)]
pub(crate) struct MemberConnections(Arc<Mutex<ByMember>>);

/// Each connection's number, and what ends it, the oldest first.
type ByMember = BTreeMap<PeerId, Vec<(u64, CancellationToken)>>;

impl MemberConnections {
    /// Connections of one member at most: one with its stream, one that renews, and the same again that broke unnoticed.
    const MOST_PER_MEMBER: usize = 4;

    /// Counts a connection of this member, and ends its oldest one beyond the bound. `number` tells its connections apart.
    /// `may_enter` is asked while nobody can call [`Self::close_all`]: so no connection slips in beside a removal.
    pub(crate) fn enter(
        &self,
        peer: PeerId,
        number: u64,
        may_enter: impl FnOnce() -> bool,
    ) -> Option<MemberConnection> {
        let mut all = self.lock();
        if !may_enter() {
            return None;
        }
        let closed = CancellationToken::new();
        let connections = all.entry(peer).or_default();
        if connections.len() >= Self::MOST_PER_MEMBER {
            connections.remove(0).1.cancel();
        }
        connections.push((number, closed.clone()));
        Some(MemberConnection {
            all: self.clone(),
            peer,
            number,
            closed,
        })
    }

    /// Ends all connections of this member.
    pub(crate) fn close_all(&self, peer: PeerId) {
        for (_, closed) in self.lock().get(&peer).into_iter().flatten() {
            closed.cancel();
        }
    }

    fn lock(&self) -> MutexGuard<'_, ByMember> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A member's connection, counted as long as this lives.
pub(crate) struct MemberConnection {
    all: MemberConnections,
    peer: PeerId,
    number: u64,
    closed: CancellationToken,
}

impl MemberConnection {
    /// Cancelled when the connection is to end.
    pub(crate) fn closed(&self) -> CancellationToken {
        self.closed.clone()
    }
}

impl Drop for MemberConnection {
    fn drop(&mut self) {
        let mut all = self.all.lock();
        if let Some(connections) = all.get_mut(&self.peer) {
            connections.retain(|(number, _)| *number != self.number);
            if connections.is_empty() {
                all.remove(&self.peer);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn out(guests: &[Guest]) -> Vec<usize> {
        (0..guests.len())
            .filter(|at| guests[*at].shown_out.is_cancelled())
            .collect()
    }

    #[test]
    fn a_client_at_its_bound_loses_its_own_oldest_connection() {
        let door = Door::new(10, 2);
        let guests: Vec<_> = [
            "10.0.0.1",
            "10.0.0.2",
            "10.0.0.1",
            "::ffff:10.0.0.1",
            "10.0.0.1",
        ]
        .into_iter()
        .map(|address| door.enter(ip(address)))
        .collect();
        assert_eq!(out(&guests), [0, 2]);
    }

    #[test]
    fn a_full_door_shows_out_the_client_with_the_most_connections() {
        let door = Door::new(4, 3);
        let mut guests: Vec<_> = [
            "2001:db8::1",
            "10.0.0.1",
            "2001:db8::2",
            "2001:db8::3",
            "10.0.0.2",
        ]
        .into_iter()
        .map(|address| door.enter(ip(address)))
        .collect();
        assert_eq!(out(&guests), [0]);
        guests.remove(1);
        guests.push(door.enter(ip("10.0.0.3")));
        assert_eq!(out(&guests), [0], "a place that was given back is free");
        assert_eq!(door.lock().by_number.len(), 4);
        drop(guests);
        assert!(door.lock().by_number.is_empty() && door.lock().by_client.is_empty());
    }

    #[test]
    fn a_member_has_few_connections_and_loses_all_at_once() {
        let (all, peer) = (MemberConnections::default(), PeerId([1; 16]));
        let mut held: Vec<_> = (0..5)
            .map(|number| all.enter(peer, number, || true).unwrap())
            .collect();
        let other = all.enter(PeerId([2; 16]), 9, || true).unwrap();
        assert!(held[0].closed.is_cancelled() && !held[1].closed.is_cancelled());
        assert!(all.enter(peer, 10, || false).is_none());
        all.close_all(peer);
        assert!(held.iter().all(|one| one.closed.is_cancelled()) && !other.closed.is_cancelled());
        held.clear();
        assert_eq!(all.lock().len(), 1);
    }
}
