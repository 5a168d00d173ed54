//! The order of a registry's endpoints. One that can't be reached is asked last for a while, and only if no other one answers.

use std::num::NonZeroUsize;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ::lru::LruCache;
use hawker_core::lru;
use tokio::time::Instant;
use url::Url;

/// How long an endpoint counts as dead after it could not be reached.
const DEAD: Duration = Duration::from_secs(45);
/// For the one request that tries a dead endpoint again. Others go on without it meanwhile.
const PROBE: Duration = Duration::from_secs(15);
/// Endpoints remembered.
const CAPACITY: NonZeroUsize = NonZeroUsize::new(1024).expect("not zero");

/// The endpoints that could not be reached, and until when they count as dead.
pub(super) struct Dead(Mutex<LruCache<String, Instant>>);

impl Dead {
    pub(super) fn new() -> Self {
        Self(Mutex::new(lru::bounded(CAPACITY)))
    }

    fn all(&self) -> MutexGuard<'_, LruCache<String, Instant>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The endpoints in the order to ask them in: the living ones as they are listed, then the dead ones. With each: whether it is
    /// dead.
    pub(super) fn in_order<'a>(&self, endpoints: &'a [Url], now: Instant) -> Vec<(&'a Url, bool)> {
        if endpoints.len() < 2 {
            return endpoints.iter().map(|endpoint| (endpoint, false)).collect();
        }
        let mut all = self.all();
        let mut judged: Vec<_> = endpoints
            .iter()
            .map(|endpoint| {
                let until = all.get_mut(&key(endpoint));
                let is_dead = until.is_some_and(|until| {
                    let is_dead = *until > now;
                    if !is_dead {
                        *until = now + PROBE;
                    }
                    is_dead
                });
                (endpoint, is_dead)
            })
            .collect();
        judged.sort_by_key(|(_, is_dead)| *is_dead);
        judged
    }

    /// An endpoint could not be reached.
    pub(super) fn note(&self, endpoint: &Url, now: Instant) {
        let known = self.all().put(key(endpoint), now + DEAD).is_some();
        if !known {
            let (host, seconds) = (endpoint.host_str(), DEAD.as_secs());
            tracing::warn!(
                host,
                seconds,
                "an endpoint can't be reached; others are asked first for a while"
            );
        }
    }

    /// An endpoint answered.
    pub(super) fn forget(&self, endpoint: &Url) {
        let mut all = self.all();
        if !all.is_empty() {
            all.pop(&key(endpoint));
        }
    }
}

/// Paths of one server live and die together.
fn key(endpoint: &Url) -> String {
    endpoint.origin().ascii_serialization()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dead_endpoints_come_last_and_one_request_tries_them_again() {
        let urls: Vec<Url> = [
            "https://a.example/x",
            "https://b.example",
            "https://c.example",
        ]
        .map(|u| u.parse().unwrap())
        .into();
        let (dead, start) = (Dead::new(), Instant::now());
        let order = |at: Duration| -> String {
            let order = dead.in_order(&urls, start + at);
            order
                .iter()
                .map(|(url, dead)| {
                    format!(
                        "{}{}",
                        &url.host_str().unwrap()[..1],
                        if *dead { "!" } else { "" }
                    )
                })
                .collect()
        };
        assert_eq!(order(Duration::ZERO), "abc");
        dead.note(&urls[0], start);
        assert_eq!(order(Duration::from_secs(1)), "bca!");
        assert_eq!(order(DEAD), "abc", "one request tries it");
        assert_eq!(order(DEAD), "bca!", "others don't meanwhile");
        dead.forget(&urls[0]);
        assert_eq!(order(DEAD), "abc");
        for url in &urls {
            dead.note(url, start);
        }
        assert_eq!(
            order(Duration::from_secs(1)),
            "a!b!c!",
            "all are still asked"
        );
        assert_eq!(
            dead.in_order(&urls[..1], start),
            [(&urls[0], false)],
            "there is no other"
        );
    }
}
