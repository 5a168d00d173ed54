//! Which connection gets a place when places are scarce.
//!
//! A connection with a request that moves is never ended for another one. A connection that waits for a request, or whose client does
//! not take what it asked for, keeps its place only while nobody else needs it.

use crate::Time;

/// Files that a daemon has open for itself: listeners, its store, other members, registries.
const OWN_FILES: usize = 64;

/// The activity of a connection that has a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Doing {
    /// It waits for a request: it is new, half of a request came, or it is kept alive.
    Waiting,
    /// It has a request, and nothing has moved for a while.
    Stalled,
    /// It has a request that is being answered.
    Moving,
}

/// A connection that has a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Occupant<Id> {
    /// Which connection.
    pub id: Id,
    /// The connection's activity.
    pub doing: Doing,
    /// Since when.
    pub since: Time,
}

/// How many places there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Places {
    /// For everybody.
    pub all: usize,
    /// For all clients that are not on this host.
    pub remote: usize,
    /// For one address that is not on this host.
    pub one_remote: usize,
    /// For connections that wait for a request: the rest is kept for those that have one.
    pub waiting: usize,
}

/// How many connections have a place.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Taken {
    /// By anybody.
    pub all: usize,
    /// By clients that are not on this host.
    pub remote: usize,
    /// By the client that comes.
    pub same_client: usize,
}

/// Among whose connections room must be made for a new one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Crowd {
    /// The client's own.
    SameClient,
    /// Those of all clients that are not on this host.
    Remote,
    /// All.
    All,
}

impl Places {
    /// Places where `open_files` files may be open: some are the daemon's own, and each connection may need a second one for what it
    /// asks for.
    pub const fn within(most: usize, open_files: usize) -> Self {
        let half = open_files.saturating_sub(OWN_FILES) / 2;
        let all = if half < most { half } else { most };
        let remote = all / 4 * 3;
        Self {
            all,
            remote,
            one_remote: remote / 3,
            waiting: all / 4,
        }
    }

    /// The reason why a new connection finds no place; `None`: there is room.
    pub const fn crowd(&self, taken: Taken, is_remote: bool) -> Option<Crowd> {
        if is_remote && taken.same_client >= self.one_remote {
            Some(Crowd::SameClient)
        } else if is_remote && taken.remote >= self.remote {
            Some(Crowd::Remote)
        } else if taken.all >= self.all {
            Some(Crowd::All)
        } else {
            None
        }
    }
}

/// Which of these connections give way to one that comes; none: it is refused. Several at once, so that the next ones that come find room.
pub fn give_way<Id>(mut crowd: Vec<Occupant<Id>>) -> Vec<Id> {
    const SHARE: usize = 64;
    let count = crowd.len() / SHARE + 1;
    crowd.retain(|occupant| occupant.doing != Doing::Moving);
    crowd.sort_by_key(|occupant| (occupant.doing, occupant.since));
    crowd
        .into_iter()
        .take(count)
        .map(|occupant| occupant.id)
        .collect()
}

/// Which of these connections must leave since too many wait for a request: those that have waited longest.
pub fn too_many_waiting<Id>(mut connections: Vec<Occupant<Id>>, most: usize) -> Vec<Id> {
    connections.retain(|occupant| occupant.doing == Doing::Waiting);
    connections.sort_by_key(|occupant| occupant.since);
    let excess = connections.len().saturating_sub(most);
    connections
        .into_iter()
        .take(excess)
        .map(|occupant| occupant.id)
        .collect()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const PLACES: Places = Places::within(4096, 1 << 20);

    #[test]
    fn places_follow_the_limit_on_open_files() {
        assert_eq!(
            PLACES,
            Places {
                all: 4096,
                remote: 3072,
                one_remote: 1024,
                waiting: 1024
            }
        );
        let few = Places {
            all: 96,
            remote: 72,
            one_remote: 24,
            waiting: 24,
        };
        assert_eq!(Places::within(4096, 256), few);
    }

    #[test]
    fn remote_clients_leave_room_for_this_host() {
        let taken = Taken {
            all: 3072,
            remote: 3072,
            same_client: 0,
        };
        assert_eq!(PLACES.crowd(taken, true), Some(Crowd::Remote));
        assert_eq!(PLACES.crowd(taken, false), None);
        let one = Taken {
            all: 1024,
            remote: 1024,
            same_client: 1024,
        };
        assert_eq!(PLACES.crowd(one, true), Some(Crowd::SameClient));
        assert_eq!(
            PLACES.crowd(
                Taken {
                    same_client: 1023,
                    ..one
                },
                true
            ),
            None
        );
        let own = Taken {
            all: 4095,
            remote: 0,
            same_client: 4095,
        };
        assert_eq!(PLACES.crowd(own, false), None);
        assert_eq!(
            PLACES.crowd(Taken { all: 4096, ..own }, false),
            Some(Crowd::All)
        );
        assert_eq!(
            PLACES.crowd(
                Taken {
                    all: 4096,
                    ..Taken::default()
                },
                true
            ),
            Some(Crowd::All)
        );
    }

    #[test]
    fn waiting_connections_go_before_stalled_ones_and_moving_ones_stay() {
        let occupant = |id, doing, s| Occupant {
            id,
            doing,
            since: Time(Duration::from_secs(s)),
        };
        let crowd = vec![
            occupant(1, Doing::Moving, 0),
            occupant(2, Doing::Stalled, 1),
            occupant(3, Doing::Waiting, 9),
            occupant(4, Doing::Waiting, 8),
        ];
        assert_eq!(give_way(crowd.clone()), [4]);
        assert_eq!(give_way(crowd[..2].to_vec()), [2]);
        assert_eq!(give_way(crowd[..1].to_vec()), [] as [i32; 0]);
        assert_eq!(too_many_waiting(crowd.clone(), 1), [4]);
        assert_eq!(too_many_waiting(crowd, 2), [] as [i32; 0]);
        let many = (0..640)
            .map(|id| occupant(id, Doing::Waiting, 640 - id as u64))
            .collect();
        assert_eq!(
            give_way(many),
            (629..640).rev().collect::<Vec<i32>>(),
            "the oldest, several at once"
        );
    }
}
