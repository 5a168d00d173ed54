//! How fast: rates, and the token bucket that keeps one of them.

use std::time::Duration;

use crate::Time;

/// How much of its rate a bucket may save up: enough to make up for a timer that fires late, too little to be seen.
pub const BURST: Duration = Duration::from_millis(50);

/// The least a bucket may save up, however low its rate: one frame of the peer protocol.
pub const BURST_MIN_BYTES: u64 = 64 << 10;

const NANOS_PER_SECOND: i128 = 1_000_000_000;

/// How much of each kind of traffic, of a host or of one task, in bytes a second; `None` and zero: as fast as it goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rates {
    /// To peers.
    pub upload: Option<u64>,
    /// From peers.
    pub download: Option<u64>,
    /// From origins.
    pub origin: Option<u64>,
    /// From peers and origins, of what nobody waits for.
    pub prefetch: Option<u64>,
}

/// A token bucket in bytes.
///
/// Senders [`reserve`](TokenBucket::reserve) a frame at a time and wait as long as they are told. An earlier
/// reservation waits less, so streams that reserve frame by frame share the rate frame by frame.
///
/// In any interval of `t` seconds at most `rate * t + burst` bytes are let through, where the burst is
/// [`TokenBucket::burst_bytes`], or one reservation where that is larger. With demand, and timers late by less than
/// [`BURST`], the rate is reached.
#[derive(Clone, Debug)]
pub struct TokenBucket {
    /// Bytes a second; `None`: as fast as it goes.
    rate_bytes: Option<u64>,
    /// Bytes saved up, times 10^9: refilling is exact, whatever the rate and the interval. Below zero: reserved ahead.
    balance: i128,
    refilled_at: Time,
}

impl TokenBucket {
    /// A bucket with its burst saved up. `rate_bytes` is in bytes a second; `None`, and zero, mean no limit.
    pub fn new(rate_bytes: Option<u64>, now: Time) -> Self {
        let mut bucket = Self {
            rate_bytes: rate_bytes.filter(|rate| *rate > 0),
            balance: 0,
            refilled_at: now,
        };
        bucket.balance = bucket.full();
        bucket
    }

    /// The rate in bytes a second; `None` when there is no limit.
    pub const fn rate_bytes(&self) -> Option<u64> {
        self.rate_bytes
    }

    /// How many bytes may go at once after a pause; zero when there is no limit.
    pub fn burst_bytes(&self) -> u64 {
        let burst = |rate: u64| BURST_MIN_BYTES.max(rate / 1000 * BURST.as_millis() as u64);
        self.rate_bytes.map_or(0, burst)
    }

    /// Changes the rate from now on. Earlier reservations stay owed, and are paid at the new rate.
    pub fn set_rate(&mut self, rate_bytes: Option<u64>, now: Time) {
        self.refill(now);
        self.rate_bytes = rate_bytes.filter(|rate| *rate > 0);
        self.balance = match self.rate_bytes {
            Some(_) => self.balance.min(self.full()),
            None => 0,
        };
    }

    /// Takes `bytes` out and says how long to wait before sending them; zero: now.
    pub fn reserve(&mut self, now: Time, bytes: u64) -> Duration {
        let Some(rate) = self.rate_bytes else {
            return Duration::ZERO;
        };
        self.refill(now);
        self.balance -= i128::from(bytes) * NANOS_PER_SECOND;
        let owed = u128::try_from(-self.balance).unwrap_or(0);
        Duration::from_nanos(u64::try_from(owed.div_ceil(u128::from(rate))).unwrap_or(u64::MAX))
    }

    /// Whether nothing is owed: a reservation, however large, may be made and used at once.
    pub fn is_free(&mut self, now: Time) -> bool {
        self.reserve(now, 0).is_zero()
    }

    /// Puts back bytes that were reserved and will not be sent.
    pub fn refund(&mut self, bytes: u64) {
        if self.rate_bytes.is_some() {
            self.balance = (self.balance + i128::from(bytes) * NANOS_PER_SECOND).min(self.full());
        }
    }

    /// The balance of a full bucket.
    fn full(&self) -> i128 {
        i128::from(self.burst_bytes()) * NANOS_PER_SECOND
    }

    fn refill(&mut self, now: Time) {
        let nanos = i128::try_from(now.since(self.refilled_at).as_nanos()).unwrap_or(i128::MAX);
        let gained = nanos.saturating_mul(i128::from(self.rate_bytes.unwrap_or(0)));
        self.balance = self.balance.saturating_add(gained).min(self.full());
        self.refilled_at = self.refilled_at.max(now);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn at(nanos: u64) -> Time {
        Time(Duration::from_nanos(nanos))
    }

    fn millis(millis: u64) -> Time {
        Time(Duration::from_millis(millis))
    }

    #[test]
    fn bursts_are_fifty_milliseconds_and_at_least_a_frame() {
        let table = [
            (None, 0),
            (Some(0), 0),
            (Some(1), 65_536),
            (Some(MIB), 65_536),
            (Some(100_000_000), 5_000_000),
        ];
        for (rate, burst) in table {
            assert_eq!(
                TokenBucket::new(rate, millis(0)).burst_bytes(),
                burst,
                "{rate:?}"
            );
        }
    }

    #[test]
    fn without_a_limit_nobody_waits() {
        let mut bucket = TokenBucket::new(None, millis(0));
        assert_eq!(bucket.reserve(millis(0), u64::MAX), Duration::ZERO);
        assert_eq!(bucket.reserve(millis(0), u64::MAX), Duration::ZERO);
    }

    #[test]
    fn who_reserves_first_waits_shortest() {
        let mut bucket = TokenBucket::new(Some(1_000_000), millis(0));
        let waits: Vec<_> = (0..4)
            .map(|_| bucket.reserve(millis(0), 65_536).as_micros())
            .collect();
        assert_eq!(waits, [0, 65_536, 131_072, 196_608]);
    }

    #[test]
    fn a_long_pause_saves_up_no_more_than_the_burst() {
        let mut bucket = TokenBucket::new(Some(100_000_000), millis(0));
        assert_eq!(bucket.reserve(millis(3_600_000), 5_000_000), Duration::ZERO);
        assert_eq!(
            bucket.reserve(millis(3_600_000), 100_000),
            Duration::from_millis(1)
        );
    }

    #[test]
    fn a_new_rate_holds_for_what_is_owed_too() {
        let mut bucket = TokenBucket::new(Some(1_000_000), millis(0));
        assert_eq!(
            bucket.reserve(millis(0), 65_536 + 1_000_000),
            Duration::from_secs(1)
        );
        bucket.set_rate(Some(10_000_000), millis(500));
        assert_eq!(bucket.reserve(millis(500), 0), Duration::from_millis(50));
        bucket.set_rate(None, millis(500));
        assert_eq!(bucket.reserve(millis(500), MIB), Duration::ZERO);
        bucket.set_rate(Some(1_000_000), millis(500));
        assert_eq!(
            bucket.reserve(millis(500), 1_000),
            Duration::from_millis(1),
            "no burst out of nothing"
        );
    }

    #[test]
    fn what_is_not_sent_is_put_back() {
        let mut bucket = TokenBucket::new(Some(1_000_000), millis(0));
        bucket.reserve(millis(0), 1_065_536);
        bucket.refund(1_000_000);
        assert_eq!(bucket.reserve(millis(0), 0), Duration::ZERO);
        bucket.refund(u64::MAX);
        assert_eq!(
            bucket.reserve(millis(0), 65_537),
            Duration::from_micros(1),
            "never above the burst"
        );
    }

    #[test]
    fn time_that_runs_backwards_gives_nothing() {
        let mut bucket = TokenBucket::new(Some(1_000_000), millis(1_000));
        bucket.reserve(millis(1_000), 65_536);
        assert_eq!(bucket.reserve(millis(0), 1_000), Duration::from_millis(1));
        assert_eq!(
            bucket.reserve(millis(1_000), 1_000),
            Duration::from_millis(2)
        );
    }

    /// When each frame is sent, `(time in ns, bytes)`, by streams that pause after each.
    fn sent(rate: u64, frames: &[(u64, u64)], streams: usize) -> Vec<(u64, u64)> {
        let mut bucket = TokenBucket::new(Some(rate), at(0));
        let mut free_at = vec![0u64; streams];
        let mut sent = Vec::new();
        for (bytes, pause) in frames {
            let stream = (0..streams).min_by_key(|stream| free_at[*stream]).unwrap();
            let now = free_at[stream];
            let goes = now + bucket.reserve(at(now), *bytes).as_nanos() as u64;
            sent.push((goes, *bytes));
            free_at[stream] = goes + pause;
        }
        sent
    }

    proptest! {
        #[test]
        fn no_interval_gets_more_than_the_rate_and_a_burst(
            rate in 1_000..2_000_000_000u64,
            frames in prop::collection::vec((1..=65_536u64, 0..300_000_000u64), 1..80),
            streams in 1..5usize,
        ) {
            let burst = TokenBucket::new(Some(rate), at(0)).burst_bytes();
            let mut sent = sent(rate, &frames, streams);
            sent.sort_unstable();
            for first in 0..sent.len() {
                let mut bytes = 0;
                for (end, frame) in &sent[first..] {
                    bytes += frame;
                    let interval = u128::from(end - sent[first].0);
                    let allowed = u128::from(burst) + (u128::from(rate) * interval).div_ceil(1_000_000_000);
                    prop_assert!(bytes as u128 <= allowed, "{bytes} bytes in {interval} ns, {allowed} allowed");
                }
            }
        }

        #[test]
        fn the_rate_is_reached_though_timers_fire_late(
            rate in 100_000..2_000_000_000u64,
            frames in prop::collection::vec((1..=65_536u64, 0..20_000_000u64), 1..200),
        ) {
            let mut bucket = TokenBucket::new(Some(rate), at(0));
            let (mut now, mut bytes) = (0, 0);
            for (frame, late) in &frames {
                let wait = bucket.reserve(at(now), *frame).as_nanos() as u64;
                now += if wait > 0 { wait + late } else { 0 };
                bytes += frame;
            }
            let needed = (u128::from(bytes) * 1_000_000_000).div_ceil(u128::from(rate));
            prop_assert!(u128::from(now) <= needed + 20_000_000, "took {now} ns, {needed} needed");
        }

        #[test]
        fn splitting_a_reservation_does_not_change_when_it_is_paid(
            rate in 1..u64::MAX, parts in prop::collection::vec(0..1_000_000u64, 1..20),
        ) {
            let mut whole = TokenBucket::new(Some(rate), at(0));
            let mut split = whole.clone();
            let total = parts.iter().sum();
            let last = parts.iter().map(|bytes| split.reserve(at(0), *bytes)).last();
            prop_assert_eq!(last, Some(whole.reserve(at(0), total)));
        }
    }
}
