//! How good each parent is: measured rate, recent failures, bans. Punish fast, forgive slowly.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::Time;
use crate::piece::PeerId;

/// The fault of a parent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Fault {
    /// It sent bytes that do not match the table: a lie or broken memory. Banned at once.
    WrongBytes,
    /// It stopped sending.
    Stalled,
    /// It refused what it had offered: it lied, or its disk lost it.
    NotHeld,
    /// It could not be reached, or broke off.
    Failed,
}

impl Fault {
    /// Weight of one fault. At [`SHUNNED`] a parent is asked only when nobody else offers the piece.
    const fn weight(self) -> f64 {
        match self {
            Fault::WrongBytes => 8.0,
            // A stall costs the child seconds; a refused request or a reset costs a round trip.
            Fault::Stalled => 2.0,
            Fault::NotHeld | Fault::Failed => 1.0,
        }
    }
}

/// Faults are half forgotten after this long: a deploy later a node that was restarted is trusted again.
const HALF_LIFE: Duration = Duration::from_secs(60);

/// Faults that make a parent the last choice: two stalls within two minutes, or three failures within half of one.
const SHUNNED: f64 = 2.5;

/// All requests under way at a peer stall or break off together. Failures of one cause count once, else a restart of
/// the only seed would make all its children shun it for minutes.
const AT_ONCE: Duration = Duration::from_secs(1);

/// How long wrong bytes keep a parent out on this node. The scheduler decides for everybody else.
const BAN: Duration = Duration::from_secs(600);

/// A request that was cancelled before this time gives no rate sample.
const WAITED: Duration = Duration::from_secs(1);

/// How much of what was measured before stays when a piece comes: four pieces or so make the estimate.
const RATE_MEMORY: f64 = 0.75;

/// The facts known about one peer, over all tasks.
#[derive(Clone, Debug, Default)]
struct Record {
    /// Bytes received and the seconds they took. Both fade piece by piece. Short pieces, whose time is mostly the time
    /// to answer, count for little.
    bytes: f64,
    seconds: f64,
    faults: f64,
    faults_at: Time,
    /// The weight of the last sample.
    last: f64,
    banned_until: Option<Time>,
}

impl Record {
    fn faults(&self, now: Time) -> f64 {
        let lives = now.since(self.faults_at).as_secs_f64() / HALF_LIFE.as_secs_f64();
        self.faults * 0.5f64.powf(lives)
    }
}

/// The facts this node knows about its parents.
#[derive(Clone, Debug, Default)]
pub struct Parents {
    records: BTreeMap<PeerId, Record>,
    /// The latest moment to which anybody is banned: hardly ever is anybody.
    banned_until: Time,
    /// Whether anybody did anything wrong so far.
    faulty: bool,
}

/// Peers remembered at most; past it the one with the fewest faults goes.
const REMEMBERED: usize = 4096;

impl Parents {
    /// A piece of `bytes` came in `took`, from the request to its last byte.
    pub fn served(&mut self, peer: PeerId, bytes: u64, took: Duration) {
        let record = self.record(peer);
        record.bytes = RATE_MEMORY * record.bytes + bytes as f64;
        record.seconds = RATE_MEMORY * record.seconds + took.as_secs_f64().max(1e-4);
    }

    /// A piece of `bytes` had not come after so long, and is not waited for any more: it is no faster than that.
    pub fn did_not_serve(&mut self, peer: PeerId, bytes: u64, waited: Duration) {
        let at_most = bytes as f64 / waited.as_secs_f64();
        if waited >= WAITED && self.rate_bytes(peer).is_none_or(|rate| rate > at_most) {
            self.served(peer, bytes, waited);
        }
    }

    /// It did something wrong.
    pub fn punish(&mut self, now: Time, peer: PeerId, fault: Fault) {
        self.faulty = true;
        if fault == Fault::WrongBytes {
            self.banned_until = now + BAN;
        }
        let record = self.record(peer);
        let same_cause = matches!(fault, Fault::Stalled | Fault::Failed)
            && now.since(record.faults_at) < AT_ONCE;
        let counted = if same_cause { record.last } else { 0.0 };
        if fault.weight() <= counted {
            return;
        }
        record.faults = record.faults(now) + fault.weight() - counted;
        (record.faults_at, record.last) = (now, fault.weight());
        if fault == Fault::WrongBytes {
            record.banned_until = Some(now + BAN);
        }
    }

    /// Whether nothing may be asked of it.
    pub fn banned(&self, now: Time, peer: PeerId) -> bool {
        now < self.banned_until
            && self
                .records
                .get(&peer)
                .and_then(|r| r.banned_until)
                .is_some_and(|until| now < until)
    }

    /// Whether it is asked only when nobody else will do.
    pub fn shunned(&self, now: Time, peer: PeerId) -> bool {
        self.faulty
            && self
                .records
                .get(&peer)
                .is_some_and(|r| r.faults(now) >= SHUNNED)
    }

    /// Whether a request to it will most likely be served.
    pub fn trusted(&self, now: Time, peer: PeerId) -> bool {
        !self.shunned(now, peer) && !self.banned(now, peer)
    }

    /// Measured bytes a second; `None` before the first piece.
    pub fn rate_bytes(&self, peer: PeerId) -> Option<f64> {
        self.records
            .get(&peer)
            .filter(|r| r.seconds > 0.0)
            .map(|r| r.bytes / r.seconds)
    }

    fn record(&mut self, peer: PeerId) -> &mut Record {
        if self.records.len() >= REMEMBERED && !self.records.contains_key(&peer) {
            let mildest = self
                .records
                .iter()
                .min_by(|a, b| a.1.faults.total_cmp(&b.1.faults))
                .map(|(peer, _)| *peer);
            if let Some(mildest) = mildest {
                self.records.remove(&mildest);
            }
        }
        self.records.entry(peer).or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PEER: PeerId = PeerId([1; 16]);

    fn at(seconds: u64) -> Time {
        Time(Duration::from_secs(seconds))
    }

    #[test]
    fn wrong_bytes_ban_at_once_and_for_ten_minutes() {
        let mut parents = Parents::default();
        parents.punish(at(0), PEER, Fault::WrongBytes);
        assert!(parents.banned(at(599), PEER));
        assert!(!parents.banned(at(600), PEER));
    }

    #[test]
    fn stalls_shun_and_are_forgiven_slowly() {
        let mut parents = Parents::default();
        parents.punish(at(0), PEER, Fault::Stalled);
        assert!(!parents.shunned(at(0), PEER));
        // One request after the other: the second is given up after the first.
        parents.punish(at(5), PEER, Fault::Stalled);
        assert!(parents.shunned(at(5), PEER) && !parents.trusted(at(5), PEER));
        assert!(!parents.banned(at(5), PEER));
        assert!(!parents.shunned(at(65), PEER) && parents.trusted(at(65), PEER));
    }

    #[test]
    fn what_fails_at_once_counts_once() {
        let mut parents = Parents::default();
        for _ in 0..16 {
            parents.punish(at(0), PEER, Fault::Failed);
        }
        assert!(parents.trusted(at(0), PEER));
        (0..2).for_each(|_| parents.punish(at(0), PEER, Fault::Stalled));
        assert!(
            parents.trusted(at(0), PEER),
            "what breaks off and what stalls"
        );
        for _ in 0..16 {
            parents.punish(at(1), PEER, Fault::NotHeld);
        }
        assert!(
            parents.shunned(at(1), PEER),
            "each refusal of what was offered is one of its own"
        );
    }

    #[test]
    fn the_rate_follows_what_is_measured() {
        let mut parents = Parents::default();
        assert_eq!(parents.rate_bytes(PEER), None);
        for _ in 0..20 {
            parents.served(PEER, 1 << 20, Duration::from_millis(100));
        }
        let rate = parents.rate_bytes(PEER).unwrap();
        assert!((rate / (10 << 20) as f64 - 1.0).abs() < 0.05, "{rate}");
    }

    #[test]
    fn short_pieces_and_what_never_came_count_for_what_they_are() {
        let mut parents = Parents::default();
        parents.served(PEER, 10 << 20, Duration::from_millis(100));
        parents.served(PEER, 2000, Duration::from_millis(3));
        let rate = parents.rate_bytes(PEER).unwrap();
        assert!(rate > 0.9 * (100 << 20) as f64, "{rate}");
        parents.did_not_serve(PEER, 10 << 20, Duration::from_millis(900));
        assert_eq!(
            parents.rate_bytes(PEER),
            Some(rate),
            "it was not waited for long"
        );
        parents.did_not_serve(PEER, 10 << 20, Duration::from_secs(4));
        assert!(parents.rate_bytes(PEER).unwrap() < rate / 10.0);
    }

    #[test]
    fn memory_is_bounded_and_keeps_the_worst() {
        let mut parents = Parents::default();
        parents.punish(at(0), PEER, Fault::WrongBytes);
        for n in 0..2 * REMEMBERED as u64 {
            let mut id = [0; 16];
            id[..8].copy_from_slice(&n.to_be_bytes());
            parents.served(PeerId(id), 1, Duration::from_secs(1));
        }
        assert!(parents.records.len() <= REMEMBERED);
        assert!(parents.banned(at(1), PEER));
    }
}
