//! The place of content and the right to it: this node's own right, or that of the client who asks for it.

use std::fmt;
use std::time::{Duration, SystemTime};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use hawker_core::right::{Bearer, Right};
use hawker_oci::digest::{Algorithm, Digest};
use hawker_oci::reference::Source;
use http::header::AUTHORIZATION;
use http::{HeaderMap, HeaderValue};
use serde::Deserialize;

/// How long a token lives that does not say so (distribution spec's token flow: 60 s unless told).
const DEFAULT_LIFE: Duration = Duration::from_secs(60);
/// As long as the origin's yes is remembered at most, whatever a token says of itself.
const LONGEST_LIFE: Duration = Duration::from_secs(15 * 60);

/// A client's `Authorization`. It is never shown.
#[derive(Clone, PartialEq, Eq)]
pub struct Authorization(HeaderValue);

impl Authorization {
    /// The authorization in a request, if any. Of several lines the first counts, as for any server.
    pub fn of(headers: &HeaderMap) -> Option<Self> {
        headers.get(AUTHORIZATION).cloned().map(Self::new)
    }

    fn new(mut value: HeaderValue) -> Self {
        value.set_sensitive(true);
        Self(value)
    }

    /// The authorization by a token.
    pub fn bearer(token: &Bearer) -> Option<Self> {
        HeaderValue::try_from(format!("Bearer {}", token.reveal()))
            .ok()
            .map(Self::new)
    }

    /// The token, if it is one.
    pub fn token(&self) -> Option<Bearer> {
        let (scheme, token) = self.0.to_str().ok()?.split_once(' ')?;
        if scheme.eq_ignore_ascii_case("bearer") {
            Bearer::new(token.trim())
        } else {
            None
        }
    }

    /// The hash to remember in its place.
    pub fn hash(&self) -> Digest {
        Digest::of(Algorithm::Sha256, self.0.as_bytes())
    }

    /// How long a registry's yes to it may be remembered: until it runs out by its own word, where it is a JSON web token
    /// (RFC 7519, 4.1.4), else the time that the token flow grants by default. Nobody's signature is checked for that: the
    /// registry has just believed it.
    pub fn life(&self, now: SystemTime) -> Duration {
        let expires_s = self
            .token()
            .and_then(|token| claims(token.reveal()))
            .and_then(|claims| claims.exp);
        let Some(expires_s) = expires_s else {
            return DEFAULT_LIFE;
        };
        let now_s = now
            .duration_since(SystemTime::UNIX_EPOCH)
            .map_or(0.0, |since| since.as_secs_f64());
        Duration::try_from_secs_f64((expires_s - now_s).max(0.0))
            .unwrap_or(LONGEST_LIFE)
            .min(LONGEST_LIFE)
    }
}

impl fmt::Debug for Authorization {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Authorization(…)")
    }
}

#[derive(Deserialize)]
struct Claims {
    exp: Option<f64>,
}

/// The claims of a JSON web token.
fn claims(token: &str) -> Option<Claims> {
    let payload = token.split('.').nth(1)?;
    serde_json::from_slice(&URL_SAFE_NO_PAD.decode(payload.trim_end_matches('=')).ok()?).ok()
}

/// The place of content, and the right to read it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    /// Registry and repository.
    pub source: Source,
    /// `None`: this node's own right.
    pub authorization: Option<Authorization>,
}

impl Grant {
    /// By this node's own right.
    pub const fn own(source: Source) -> Self {
        Self {
            source,
            authorization: None,
        }
    }

    /// The headers that show the right to the origin.
    pub fn headers(&self) -> HeaderMap {
        let value = self
            .authorization
            .as_ref()
            .map(|authorization| (AUTHORIZATION, authorization.0.clone()));
        value.into_iter().collect()
    }

    /// The same, as the core knows it. `lend`: tokens may go to a seed.
    pub fn right(&self, lend: bool) -> Right {
        match &self.authorization {
            None => Right::Own,
            Some(authorization) => authorization
                .token()
                .filter(|_| lend)
                .map_or(Right::Kept, Right::Token),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn authorization(value: &str) -> Authorization {
        Authorization::new(HeaderValue::try_from(value).unwrap())
    }

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    #[test]
    fn a_yes_is_remembered_no_longer_than_the_token_lives() {
        let jwt = |claims: &str| format!("Bearer e30.{}.c2ln", URL_SAFE_NO_PAD.encode(claims));
        for (value, expected_s) in [
            (jwt(r#"{"exp": 1100}"#), 100),
            (jwt(r#"{"exp": 1100.5, "aud": ["x"], "access": []}"#), 100),
            (jwt(r#"{"exp": 900}"#), 0),
            (jwt(r#"{"exp": 99999999}"#), 900),
            (jwt(r#"{"exp": 1e300}"#), 900),
            (jwt("{}"), 60),
            (jwt("no json"), 60),
            ("Bearer opaque".to_owned(), 60),
            ("Bearer a.%%%.b".to_owned(), 60),
            ("Basic dTpw".to_owned(), 60),
        ] {
            assert_eq!(
                authorization(&value).life(at(1000)).as_secs(),
                expected_s,
                "{value}"
            );
        }
    }

    #[test]
    fn a_password_is_never_lent_and_a_token_only_where_told() {
        let source = Source {
            registry: "r.example".into(),
            repository: "a".into(),
        };
        let right = |value: &str, lend| {
            Grant {
                source: source.clone(),
                authorization: Some(authorization(value)),
            }
            .right(lend)
        };
        assert_eq!(
            right("bearer t", true),
            Right::Token(Bearer::new("t").unwrap())
        );
        assert_eq!(right("Bearer t", false), Right::Kept);
        assert_eq!(right("Basic dTpw", true), Right::Kept);
        assert_eq!(right("Bearer two words", true), Right::Kept);
        assert_eq!(Grant::own(source.clone()).right(true), Right::Own);
    }

    #[test]
    fn credentials_are_not_shown() {
        let source = Source {
            registry: "r.example".into(),
            repository: "a".into(),
        };
        let grant = Grant {
            source,
            authorization: Some(authorization("Basic dTpw")),
        };
        assert!(!format!("{grant:?} {:?}", grant.headers()).contains("dTpw"));
    }
}
