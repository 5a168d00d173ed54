//! Bounds how many lines one place in the code may log, so that no client, peer or registry fills a disk through the log.
//!
//! It holds for lines of level info and above, from every part of the program. A client that sends bad input a
//! thousand times causes a hundred lines, and one that counts the rest. Lines of level debug are not bounded: somebody
//! asked for them.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tracing::callsite::Identifier;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;

/// Lines of one place in the code at once.
const BURST: u32 = 100;
/// Afterwards, the time for another one.
const EVERY: Duration = Duration::from_millis(200);
/// How often the log says what was left out.
const TELL_EVERY: Duration = Duration::from_secs(10);

/// A layer that leaves lines out. Cheap to clone.
#[derive(Clone, Default)]
pub(crate) struct LogLimit(Arc<Mutex<HashMap<Identifier, Place>>>);

/// The lines that one place in the code has logged.
struct Place {
    /// `file:line`
    name: String,
    /// When the whole burst is free again.
    full_at: Instant,
    left_out: u64,
}

impl Place {
    fn admit(&mut self, now: Instant) -> bool {
        let full_at = self.full_at.max(now);
        if full_at - now > EVERY * (BURST - 1) {
            self.left_out += 1;
            return false;
        }
        self.full_at = full_at + EVERY;
        true
    }
}

impl LogLimit {
    fn places(&self) -> MutexGuard<'_, HashMap<Identifier, Place>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lines left out since this was asked last, by place.
    fn take_left_out(&self) -> Vec<(String, u64)> {
        let mut places = self.places();
        let left_out = places.values_mut().filter(|place| place.left_out > 0);
        left_out
            .map(|place| (place.name.clone(), std::mem::take(&mut place.left_out)))
            .collect()
    }

    /// Has the log say what is left out, as long as the program runs.
    pub(crate) fn tell(&self) -> std::io::Result<()> {
        let limit = self.clone();
        let tell = move || {
            loop {
                std::thread::sleep(TELL_EVERY);
                for (place, lines) in limit.take_left_out() {
                    tracing::warn!(
                        lines,
                        place,
                        "too many lines of one kind: these were left out of the log"
                    );
                }
            }
        };
        std::thread::Builder::new()
            .name("log-limit".to_owned())
            .spawn(tell)
            .map(drop)
    }
}

impl<S: Subscriber> Layer<S> for LogLimit {
    fn event_enabled(&self, event: &Event<'_>, _: Context<'_, S>) -> bool {
        let metadata = event.metadata();
        if *metadata.level() > Level::INFO {
            return true;
        }
        let now = Instant::now();
        let new = || Place {
            name: format!(
                "{}:{}",
                metadata.file().unwrap_or_default(),
                metadata.line().unwrap_or_default()
            ),
            full_at: now,
            left_out: 0,
        };
        self.places()
            .entry(metadata.callsite())
            .or_insert_with(new)
            .admit(now)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tracing_subscriber::layer::SubscriberExt;

    use super::*;

    #[derive(Clone, Default)]
    struct Count(Arc<AtomicUsize>);

    impl<S: Subscriber> Layer<S> for Count {
        fn on_event(&self, _: &Event<'_>, _: Context<'_, S>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn a_flood_of_one_line_is_cut_and_counted_and_other_lines_are_not() {
        let (limit, count) = (LogLimit::default(), Count::default());
        let subscriber = tracing_subscriber::registry()
            .with(limit.clone())
            .with(count.clone());
        tracing::subscriber::with_default(subscriber, || {
            for client in 0..10_000 {
                tracing::warn!(client, "bad input");
            }
            let logged = count.0.load(Ordering::Relaxed);
            assert!((100..200).contains(&logged), "{logged}");
            let left_out = limit.take_left_out();
            assert_eq!(
                left_out.iter().map(|(_, lines)| *lines).sum::<u64>(),
                10_000 - logged as u64
            );
            assert!(
                left_out.len() == 1 && left_out[0].0.contains("log_limit.rs:"),
                "{left_out:?}"
            );
            assert_eq!(limit.take_left_out(), []);
            tracing::info!("something else");
            assert_eq!(count.0.load(Ordering::Relaxed), logged + 1);
            for _ in 0..1000 {
                tracing::debug!("asked for");
            }
            assert_eq!(count.0.load(Ordering::Relaxed), logged + 1001);
        });
    }

    #[test]
    fn lines_come_again_at_the_rate() {
        let start = Instant::now();
        let mut place = Place {
            name: String::new(),
            full_at: start,
            left_out: 0,
        };
        let mut admitted = |at: Duration| (0..1000).filter(|_| place.admit(start + at)).count();
        assert_eq!(admitted(Duration::ZERO), 100);
        assert_eq!(admitted(Duration::from_secs(1)), 5);
        assert_eq!(admitted(Duration::from_secs(60)), 100);
        assert_eq!(place.left_out, 3000 - 205);
    }
}
