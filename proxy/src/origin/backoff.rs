//! Registries that said 429: left alone for as long as they asked, so that many clients' retries do not reach them. A limit is
//! counted for an account, so each credential is held back on its own.

use std::num::NonZeroUsize;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use ::lru::LruCache;
use hawker_core::lru;
use hawker_oci::digest::Digest;
use http::header::RETRY_AFTER;
use http::{HeaderMap, HeaderValue};
use tokio::time::Instant;

/// How long a registry is left alone that does not say for how long.
const DEFAULT: Duration = Duration::from_secs(2);
/// How long a registry is left alone at most, whatever it says: it may change its mind.
const LONGEST: Duration = Duration::from_secs(60);
/// Registries, each with a credential, that are remembered.
const CAPACITY: NonZeroUsize = NonZeroUsize::new(1024).expect("not zero");

/// Until when each registry is not to be asked, and by whom.
pub(super) struct Backoff(Mutex<LruCache<Whose, Instant>>);

/// A registry, and the hash of the credential that it is asked with, if there is one.
pub(super) type Whose = (String, Option<Digest>);

impl Backoff {
    pub(super) fn new() -> Self {
        Self(Mutex::new(lru::bounded(CAPACITY)))
    }

    fn all(&self) -> MutexGuard<'_, LruCache<Whose, Instant>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How long a registry is not to be asked yet; `None` when it may be asked.
    pub(super) fn remaining(&self, whose: &Whose, now: Instant) -> Option<Duration> {
        let until = *self.all().get(whose)?;
        until
            .checked_duration_since(now)
            .filter(|rest| !rest.is_zero())
    }

    /// It answered 429 with these headers.
    pub(super) fn begin(&self, whose: Whose, headers: &HeaderMap, now: Instant) {
        let wait = retry_after(headers, SystemTime::now())
            .unwrap_or(DEFAULT)
            .min(LONGEST);
        self.all().put(whose, now + wait);
    }
}

/// `Retry-After`: seconds, or a date (RFC 9110, 10.2.3).
fn retry_after(headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
    parse_retry_after(headers.get(RETRY_AFTER)?, now)
}

/// Whether a `Retry-After` says anything that clients understand.
pub(crate) fn is_retry_after(value: &HeaderValue) -> bool {
    parse_retry_after(value, SystemTime::UNIX_EPOCH).is_some()
}

fn parse_retry_after(value: &HeaderValue, now: SystemTime) -> Option<Duration> {
    let text = value.to_str().ok()?.trim();
    match text.parse() {
        Ok(seconds) => Some(Duration::from_secs(seconds)),
        Err(_) => Some(
            httpdate::parse_http_date(text)
                .ok()?
                .duration_since(now)
                .unwrap_or_default(),
        ),
    }
}

#[cfg(test)]
mod tests {

    use super::*;

    #[test]
    fn a_registry_is_left_alone_as_long_as_it_asks_within_reason() {
        let later = httpdate::fmt_http_date(SystemTime::now() + Duration::from_secs(31));
        for (said, seconds) in [
            (None, 2),
            (Some("7"), 7),
            (Some("86400"), 60),
            (Some(later.as_str()), 30),
            (Some("Sun, 06 Nov 1994 08:49:37 GMT"), 0),
            (Some("soon"), 2),
        ] {
            let (backoff, now) = (Backoff::new(), Instant::now());
            let headers = said.map(|said| (RETRY_AFTER, HeaderValue::from_str(said).unwrap()));
            let (whose, other) = (("r".to_owned(), None), ("other".to_owned(), None));
            backoff.begin(whose.clone(), &headers.into_iter().collect(), now);
            let remaining = backoff.remaining(&whose, now).unwrap_or_default();
            assert!(
                remaining.as_secs_f64() - f64::from(seconds) < 1.5,
                "{said:?} {remaining:?}"
            );
            assert!(
                remaining.as_secs() >= seconds as u64,
                "{said:?} {remaining:?}"
            );
            assert_eq!(backoff.remaining(&whose, now + LONGEST), None);
            assert_eq!(backoff.remaining(&other, now), None);
        }
    }
}
