//! The state that all connections of one member share: the rate of its messages, and the number of them that may wait
//! for the driver.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use hawker_api::v1::peer_message::Message as Wire;
use hawker_core::Time;
use hawker_core::admission::Allowance;
use hawker_core::message::Role;
use tokio::sync::Semaphore;

/// Messages of one member that may wait for the driver: many members together do not fill its queue.
const QUEUE: usize = 256;
/// Messages that a member may send at once, and a second in the long run. A message that makes work costs one.
const AT_ONCE: f64 = 512.0;
const A_SECOND: f64 = 100.0;
/// A seed speaks for all of its children.
const SEED_FACTOR: f64 = 8.0;
/// A manifest may have to be read from a registry that the member names; nodes ask for two an image.
const MANIFEST: f64 = 4.0;
/// Any other message costs so much: a fast peer says thousands a second.
const CHEAP: f64 = 0.005;
/// So many bytes cost one more.
const BYTES: f64 = (64 << 10) as f64;

pub(super) struct Member {
    started: Instant,
    allowance: Mutex<Allowance>,
    /// Places in the driver's queue.
    pub(super) queue: Arc<Semaphore>,
    /// One long message at a time is read and handled: it takes megabytes.
    pub(super) long: Arc<Semaphore>,
}

impl Member {
    pub(super) fn new(role: Role) -> Self {
        let factor = if role == Role::Seed { SEED_FACTOR } else { 1.0 };
        let allowance = Allowance::new(AT_ONCE * factor, A_SECOND * factor, Time::default());
        Self {
            started: Instant::now(),
            allowance: Mutex::new(allowance),
            queue: Arc::new(Semaphore::new(QUEUE)),
            long: Arc::new(Semaphore::new(1)),
        }
    }

    /// Counts a message of `len` bytes; how long to wait before the next one is read.
    pub(super) fn count(&self, message: Option<&Wire>, len: usize) -> Duration {
        let cost = match message {
            Some(Wire::Interest(_) | Wire::Wrong(_)) => 1.0,
            Some(Wire::ManifestRequest(_)) => MANIFEST,
            _ => CHEAP,
        };
        let cost = cost + len as f64 / BYTES;
        let now = Time(self.started.elapsed());
        self.allowance
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take(now, cost)
    }
}

#[cfg(test)]
mod tests {
    use hawker_api::v1;

    use super::*;

    #[test]
    fn a_flood_of_questions_is_slowed_down_and_news_of_pieces_is_not() {
        let interest = Wire::Interest(v1::Interest::default());
        let have = Wire::Have(v1::Have::default());
        let member = Member::new(Role::Peer);
        assert!((0..10_000).all(|_| member.count(Some(&have), 60).is_zero()));
        let waits: Vec<Duration> = (0..6000)
            .map(|_| member.count(Some(&interest), 200))
            .collect();
        assert!(waits[..300].iter().all(Duration::is_zero));
        assert!(waits[5999] > Duration::from_secs(50), "{:?}", waits[5999]);
    }

    #[test]
    fn long_tables_are_counted_by_their_length() {
        let table = Wire::Table(v1::Table::default());
        let member = Member::new(Role::Peer);
        let waits: Vec<Duration> = (0..100)
            .map(|_| member.count(Some(&table), 4 << 20))
            .collect();
        assert!(waits[99] > Duration::from_secs(50), "{:?}", waits[99]);
    }
}
