//! The places of a daemon's client connections, on all its listeners together: the holders, and the choice of the one
//! that gives way.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv4Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hawker_core::Time;
use hawker_core::connections::{self, Crowd, Occupant, Taken, give_way, too_many_waiting};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::wire::Line;

/// Connections served at once, where the limit on open files is far away.
const MAX_CONNECTIONS: usize = 4096;
/// Those that wait for a request are counted once for so many that come.
const COUNTED_EVERY: u32 = 32;

/// One client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Client {
    /// This host: all loopback addresses are one client, the node's own runtimes. Only the places of everybody bound it.
    Own,
    V4(Ipv4Addr),
    /// An IPv6 host chooses among the addresses of its /64 freely.
    V6([u16; 4]),
}

impl Client {
    fn of(address: IpAddr) -> Self {
        match address.to_canonical() {
            address if address.is_loopback() => Client::Own,
            IpAddr::V4(address) => Client::V4(address),
            IpAddr::V6(address) => {
                let [a, b, c, d, ..] = address.segments();
                Client::V6([a, b, c, d])
            }
        }
    }
}

/// All places.
pub(super) struct Places {
    bounds: connections::Places,
    started: Instant,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    next: u64,
    held: BTreeMap<u64, Held>,
    by_client: HashMap<Client, usize>,
    remote: usize,
    /// Connections that came since those that wait were counted.
    uncounted: u32,
}

struct Held {
    client: Client,
    line: Arc<Line>,
    leave: CancellationToken,
}

/// The place of one connection, free again when it is dropped.
pub(super) struct Place {
    places: Arc<Places>,
    id: u64,
    /// The line between the connection's parts.
    pub(super) line: Arc<Line>,
    /// Cancelled when somebody else needs the place more.
    pub(super) leave: CancellationToken,
}

impl Places {
    /// As many as the limit on open files allows.
    pub(super) fn new() -> Self {
        let files = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
        let files = files
            .and_then(|files| usize::try_from(files).ok())
            .unwrap_or(usize::MAX);
        Self::within(connections::Places::within(MAX_CONNECTIONS, files))
    }

    fn within(bounds: connections::Places) -> Self {
        Self {
            bounds,
            started: Instant::now(),
            state: Mutex::default(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Connections told at once that there is no place for them.
    pub(super) const fn refusals(&self) -> usize {
        self.bounds.all / 16
    }

    /// A place for a connection, if need be that of another one, which is told to leave. `None`: there is none.
    pub(super) fn take(self: &Arc<Self>, address: IpAddr) -> Option<Place> {
        let client = Client::of(address);
        let is_remote = client != Client::Own;
        let mut state = self.state();
        let taken = Taken {
            all: state.held.len(),
            remote: state.remote,
            same_client: state.by_client.get(&client).copied().unwrap_or(0),
        };
        if let Some(crowd) = self.bounds.crowd(taken, is_remote) {
            let leaving = give_way(state.occupants(crowd, client, self.started));
            if leaving.is_empty() {
                return None;
            }
            leaving.into_iter().for_each(|id| state.remove(id, true));
        }
        state.bound_waiting(self.bounds.waiting, self.started);
        Some(state.add(self, client))
    }
}

impl State {
    fn occupants(&self, crowd: Crowd, client: Client, started: Instant) -> Vec<Occupant<u64>> {
        let now = Instant::now();
        let is_in = |held: &Held| match crowd {
            Crowd::SameClient => held.client == client,
            Crowd::Remote => held.client != Client::Own,
            Crowd::All => true,
        };
        let occupant = |(id, held): (&u64, &Held)| {
            let (doing, since) = held.line.doing(now);
            Occupant {
                id: *id,
                doing,
                since: Time(since.saturating_duration_since(started)),
            }
        };
        self.held
            .iter()
            .filter(|(_, held)| is_in(held))
            .map(occupant)
            .collect()
    }

    /// Ends the connections that have waited longest where too many wait: they cost memory.
    fn bound_waiting(&mut self, most: usize, started: Instant) {
        self.uncounted += 1;
        if self.held.len() < most || self.uncounted < COUNTED_EVERY {
            return;
        }
        self.uncounted = 0;
        // Any client will do here.
        let leaving = too_many_waiting(self.occupants(Crowd::All, Client::Own, started), most);
        leaving.into_iter().for_each(|id| self.remove(id, true));
    }

    fn add(&mut self, places: &Arc<Places>, client: Client) -> Place {
        let (id, line, leave) = (self.next, Arc::new(Line::new()), CancellationToken::new());
        self.next += 1;
        *self.by_client.entry(client).or_default() += 1;
        self.remote += usize::from(client != Client::Own);
        self.held.insert(
            id,
            Held {
                client,
                line: Arc::clone(&line),
                leave: leave.clone(),
            },
        );
        Place {
            places: Arc::clone(places),
            id,
            line,
            leave,
        }
    }

    fn remove(&mut self, id: u64, asked_to_leave: bool) {
        let Some(Held { client, leave, .. }) = self.held.remove(&id) else {
            return;
        };
        if asked_to_leave {
            leave.cancel();
        }
        self.remote -= usize::from(client != Client::Own);
        if let Some(count) = self.by_client.get_mut(&client) {
            *count -= 1;
            if *count == 0 {
                self.by_client.remove(&client);
            }
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.places.state().remove(self.id, false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn places(all: usize, remote: usize, one_remote: usize) -> Arc<Places> {
        Arc::new(Places::within(connections::Places {
            all,
            remote,
            one_remote,
            waiting: all,
        }))
    }

    const FAR: [IpAddr; 2] = [
        IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)),
        IpAddr::V4(Ipv4Addr::new(192, 0, 2, 2)),
    ];

    #[tokio::test]
    async fn a_silent_connection_gives_way_and_one_with_a_request_stays() {
        let places = places(3, 2, 2);
        let own = |last| IpAddr::V4(Ipv4Addr::new(127, 0, 0, last));
        let busy = places.take(own(1)).unwrap();
        busy.line.begin();
        let silent = [2, 3].map(|last| places.take(own(last)).unwrap());
        let newcomer = places.take(own(4)).unwrap();
        assert!(silent[0].leave.is_cancelled() && !silent[1].leave.is_cancelled());
        assert!(!busy.leave.is_cancelled());
        newcomer.line.begin();
        silent[1].line.begin();
        assert!(places.take(own(5)).is_none(), "all are busy");
        drop(busy);
        assert!(places.take(own(5)).is_some());
    }

    #[tokio::test]
    async fn clients_elsewhere_leave_places_for_this_host_and_for_each_other() {
        let places = places(4, 3, 2);
        let busy = |address| {
            let place = places.take(address)?;
            place.line.begin();
            Some(place)
        };
        let _first = [busy(FAR[0]).unwrap(), busy(FAR[0]).unwrap()];
        assert!(busy(FAR[0]).is_none());
        let _second = busy(FAR[1]).unwrap();
        assert!(busy(FAR[1]).is_none());
        let _own = busy(IpAddr::from([127, 0, 0, 1])).unwrap();
        drop(_first);
        assert_eq!(places.state().held.len(), 2);
        assert_eq!(places.state().remote, 1);
        assert_eq!(places.state().by_client.len(), 2);
    }

    #[tokio::test]
    async fn few_connections_may_wait_for_a_request() {
        let bounds = connections::Places {
            all: 4096,
            remote: 4096,
            one_remote: 4096,
            waiting: 50,
        };
        let places = Arc::new(Places::within(bounds));
        let all: Vec<_> = (0..500).map(|_| places.take(FAR[0]).unwrap()).collect();
        let staying = all
            .iter()
            .filter(|place| !place.leave.is_cancelled())
            .count();
        assert!(
            (50..50 + 2 * COUNTED_EVERY as usize).contains(&staying),
            "{staying}"
        );
        assert!(
            all[450..].iter().all(|place| !place.leave.is_cancelled()),
            "the oldest leave"
        );
        drop(all);
        assert!(places.state().by_client.is_empty() && places.state().remote == 0);
    }

    #[test]
    fn addresses_of_one_client_count_together() {
        let client = |text: &str| Client::of(text.parse().unwrap());
        assert_eq!(client("127.0.0.1"), client("127.200.3.4"));
        assert_eq!(client("127.0.0.1"), client("::1"));
        assert_eq!(client("::ffff:192.0.2.1"), client("192.0.2.1"));
        assert_eq!(client("2001:db8::1"), client("2001:db8::2:3"));
        assert_ne!(client("2001:db8::1"), client("2001:db8:0:1::1"));
        assert_ne!(client("192.0.2.1"), client("192.0.2.2"));
    }
}
