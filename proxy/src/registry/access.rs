//! The two facts that come before bytes: this repository may be read by anybody, and this digest belongs to it.
//!
//! Only what the origin gives anonymously counts here; a request with credentials never gets as far.

use std::num::NonZeroUsize;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use hawker_core::digest::Digest;
use hawker_core::reference::Source;
use lru::LruCache;
use tokio::time::Instant;

/// How long a repository counts as readable before the origin is asked again.
const READABLE: Duration = Duration::from_secs(5 * 60);
/// How long a digest counts as part of a repository before the origin is asked again.
const BELONGS: Duration = Duration::from_secs(24 * 60 * 60);
/// How long both count while the origin can't be asked.
const GRACE: Duration = Duration::from_secs(24 * 60 * 60);
/// Facts of each kind that are remembered.
const CAPACITY: NonZeroUsize = NonZeroUsize::new(64 << 10).expect("not zero");

/// What is known about a digest in a repository. Sizes are in bytes, where known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Standing {
    /// Both facts are fresh.
    Confirmed(Option<u64>),
    /// Both were confirmed once: they count if the origin can't be asked.
    Stale(Option<u64>),
    /// The origin has to be asked.
    Unknown,
}

/// The facts remembered.
pub(super) struct Access(Mutex<Facts>);

struct Facts {
    readable: LruCache<Source, Instant>,
    belongs: LruCache<(Source, Digest), Belonging>,
}

#[derive(Clone, Copy)]
struct Belonging {
    confirmed: Instant,
    size_bytes: Option<u64>,
}

impl Access {
    pub(super) fn new() -> Self {
        Self(Mutex::new(Facts { readable: LruCache::new(CAPACITY), belongs: LruCache::new(CAPACITY) }))
    }

    fn facts(&self) -> std::sync::MutexGuard<'_, Facts> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is known at `now`.
    pub(super) fn standing(&self, source: &Source, digest: &Digest, now: Instant) -> Standing {
        let mut facts = self.facts();
        let readable = facts.readable.get(source).copied();
        let belongs = facts.belongs.get(&(source.clone(), *digest)).copied();
        let (Some(readable), Some(belongs)) = (readable, belongs) else { return Standing::Unknown };
        let readable_for = now.saturating_duration_since(readable);
        let belongs_for = now.saturating_duration_since(belongs.confirmed);
        match () {
            () if readable_for <= READABLE && belongs_for <= BELONGS => {
                Standing::Confirmed(belongs.size_bytes)
            }
            () if readable_for.max(belongs_for) <= GRACE => Standing::Stale(belongs.size_bytes),
            () => Standing::Unknown,
        }
    }

    /// The origin gave something of this repository anonymously.
    pub(super) fn readable(&self, source: &Source, now: Instant) {
        self.facts().readable.put(source.clone(), now);
    }

    /// The origin, or a manifest read there, says that `digest` is part of the repository.
    pub(super) fn belongs(&self, source: &Source, digest: &Digest, size_bytes: Option<u64>, now: Instant) {
        let mut facts = self.facts();
        let key = (source.clone(), *digest);
        let size_bytes = size_bytes.or_else(|| facts.belongs.peek(&key).and_then(|b| b.size_bytes));
        facts.belongs.put(key, Belonging { confirmed: now, size_bytes });
    }

    /// The origin refuses the repository to anonymous callers.
    pub(super) fn refused(&self, source: &Source) {
        self.facts().readable.pop(source);
    }

    /// The origin does not have the digest in this repository.
    pub(super) fn gone(&self, source: &Source, digest: &Digest) {
        self.facts().belongs.pop(&(source.clone(), *digest));
    }
}

#[cfg(test)]
mod tests {
    use hawker_core::digest::Algorithm;

    use super::*;

    fn source(repository: &str) -> Source {
        Source { registry: "r.example".into(), repository: repository.into() }
    }

    #[test]
    fn both_facts_are_needed_and_each_grows_old() {
        let (a, digest, t) = (source("a"), Digest::of(Algorithm::Sha256, b"x"), Instant::now());
        let minutes = |m: u64| t + Duration::from_secs(60 * m);
        let access = Access::new();
        assert_eq!(access.standing(&a, &digest, t), Standing::Unknown);
        access.readable(&a, t);
        assert_eq!(access.standing(&a, &digest, t), Standing::Unknown);
        access.belongs(&a, &digest, Some(1), t);
        for (at, expected) in [
            (0, Standing::Confirmed(Some(1))),
            (5, Standing::Confirmed(Some(1))),
            (6, Standing::Stale(Some(1))),
            (24 * 60, Standing::Stale(Some(1))),
            (24 * 60 + 1, Standing::Unknown),
        ] {
            assert_eq!(access.standing(&a, &digest, minutes(at)), expected, "after {at} minutes");
        }
        access.readable(&a, minutes(23 * 60));
        assert_eq!(access.standing(&a, &digest, minutes(23 * 60 + 1)), Standing::Confirmed(Some(1)));
    }

    #[test]
    fn what_belongs_to_one_repository_belongs_to_no_other() {
        let (a, b, digest, t) =
            (source("a"), source("b"), Digest::of(Algorithm::Sha256, b"x"), Instant::now());
        let access = Access::new();
        access.readable(&a, t);
        access.readable(&b, t);
        access.belongs(&a, &digest, None, t);
        assert_eq!(access.standing(&b, &digest, t), Standing::Unknown);
    }

    #[test]
    fn a_refusal_takes_a_fact_back() {
        let (a, digest, t) = (source("a"), Digest::of(Algorithm::Sha256, b"x"), Instant::now());
        let access = Access::new();
        for take_back in [Access::refused as fn(&Access, &Source), |access, source| {
            access.gone(source, &Digest::of(Algorithm::Sha256, b"x"));
        }] {
            access.readable(&a, t);
            access.belongs(&a, &digest, Some(3), t);
            assert_eq!(access.standing(&a, &digest, t), Standing::Confirmed(Some(3)));
            take_back(&access, &a);
            assert_eq!(access.standing(&a, &digest, t), Standing::Unknown);
        }
    }

    #[test]
    fn a_size_once_known_is_not_forgotten() {
        let (a, digest, t) = (source("a"), Digest::of(Algorithm::Sha256, b"x"), Instant::now());
        let access = Access::new();
        access.readable(&a, t);
        access.belongs(&a, &digest, Some(3), t);
        access.belongs(&a, &digest, None, t);
        assert_eq!(access.standing(&a, &digest, t), Standing::Confirmed(Some(3)));
    }
}
