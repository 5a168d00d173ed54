//! Host-wide rates of what goes over each kind of connection: the core's token buckets, awaited. The rates of single tasks, and of
//! what is prefetched, are kept by the core itself: it asks for no more than they allow.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use hawker_core::Time;
use hawker_core::limit::TokenBucket;
use tokio::time::Instant;

use crate::settings::{LiveSettings, Rates};

/// Which rate a transfer is charged to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// To peers.
    Upload,
    /// From peers.
    Download,
    /// From origins.
    Origin,
}

impl Direction {
    const ALL: [Direction; 3] = [Direction::Upload, Direction::Download, Direction::Origin];

    /// The rate in `rates`, in bytes a second; `None` when there is no limit.
    fn rate_bytes(self, rates: &Rates) -> Option<u64> {
        let rate = match self {
            Direction::Upload => rates.upload,
            Direction::Download => rates.download,
            Direction::Origin => rates.origin,
        };
        rate.filter(|rate| *rate > 0)
    }
}

/// The three buckets of this host. Cheap to clone.
#[derive(Clone)]
pub struct Limits {
    inner: Arc<Inner>,
}

struct Inner {
    live: Arc<ArcSwap<LiveSettings>>,
    started: Instant,
    buckets: [Mutex<TokenBucket>; 3],
}

impl Limits {
    /// Buckets at the rates that `live` has now and later.
    pub fn new(live: Arc<ArcSwap<LiveSettings>>) -> Self {
        let rates = live.load().rates;
        let bucket =
            |d: Direction| Mutex::new(TokenBucket::new(d.rate_bytes(&rates), Time::default()));
        let buckets = Direction::ALL.map(bucket);
        Self {
            inner: Arc::new(Inner {
                live,
                started: Instant::now(),
                buckets,
            }),
        }
    }

    /// The settings that the rates come from.
    pub fn settings(&self) -> Arc<LiveSettings> {
        self.inner.live.load_full()
    }

    /// Waits until `bytes` (one frame, not a piece) may go. Returns at once when there is no limit.
    pub async fn take(&self, direction: Direction, bytes: u64) {
        let wait = self.reserve(direction, bytes);
        if !wait.is_zero() {
            tokio::time::sleep(wait).await;
        }
    }

    fn reserve(&self, direction: Direction, bytes: u64) -> Duration {
        let rate = direction.rate_bytes(&self.inner.live.load().rates);
        let now = Time(self.inner.started.elapsed());
        let mut bucket = self.inner.buckets[direction as usize]
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if bucket.rate_bytes() != rate {
            bucket.set_rate(rate, now);
        }
        bucket.reserve(now, bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FRAME: u64 = 64 << 10;

    fn limits(rates: Rates) -> (Limits, Arc<ArcSwap<LiveSettings>>) {
        let live = Arc::new(ArcSwap::from_pointee(LiveSettings {
            rates,
            ..LiveSettings::default()
        }));
        (Limits::new(Arc::clone(&live)), live)
    }

    /// How long frames have to wait in all, in seconds, when they are reserved at once.
    fn seconds_for(limits: &Limits, direction: Direction, frames: u32) -> f64 {
        (0..frames)
            .map(|_| limits.reserve(direction, FRAME))
            .max()
            .unwrap_or_default()
            .as_secs_f64()
    }

    #[test]
    fn each_direction_keeps_its_own_rate() {
        let rates = Rates {
            upload: Some(10 * FRAME),
            download: None,
            origin: Some(20 * FRAME),
            prefetch: None,
        };
        let (limits, _) = limits(rates);
        assert!((seconds_for(&limits, Direction::Upload, 100) - 9.9).abs() < 0.3);
        assert!((seconds_for(&limits, Direction::Origin, 100) - 4.9).abs() < 0.3);
        assert_eq!(seconds_for(&limits, Direction::Download, 100), 0.0);
    }

    #[test]
    fn a_changed_rate_holds_from_the_next_frame_on() {
        let (limits, live) = limits(Rates {
            upload: Some(FRAME),
            ..Rates::default()
        });
        assert!(seconds_for(&limits, Direction::Upload, 3) > 1.0);
        let rates = Rates {
            upload: Some(100 * FRAME),
            ..Rates::default()
        };
        live.store(Arc::new(LiveSettings {
            rates,
            ..LiveSettings::default()
        }));
        assert!(seconds_for(&limits, Direction::Upload, 100) < 1.2);
        live.store(Arc::default());
        assert_eq!(seconds_for(&limits, Direction::Upload, 100), 0.0);
    }

    #[tokio::test]
    async fn a_frame_over_the_rate_waits() {
        let (limits, _) = limits(Rates {
            origin: Some(10 * FRAME),
            ..Rates::default()
        });
        let start = Instant::now();
        for _ in 0..4 {
            limits.take(Direction::Origin, FRAME).await;
        }
        assert!(
            start.elapsed() > Duration::from_millis(250),
            "{:?}",
            start.elapsed()
        );
    }
}
