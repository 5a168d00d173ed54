//! Getting a token from a registry's realm: distribution's token and OAuth2 specifications.
//!
//! Name and password go by GET with Basic, as docker and podman send them: every realm knows that way. Those few that know
//! OAuth2's password grant alone get it second. An identity token only fits OAuth2.

use std::time::Duration;

use bytes::Bytes;
use http::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, RETRY_AFTER, USER_AGENT, VIA};
use http::{HeaderMap, HeaderValue, Method, Response, StatusCode};
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use serde::Deserialize;
use serde_json::Value;
use tokio::time::{Instant, timeout};
use url::Url;
use url::form_urlencoded::Serializer;

use super::OriginError;
use super::auth::Granted;
use super::request::{Asked, reasons, unreachable};
use hawker_credentials::Credential;

/// For a realm to give a token, all tries together.
const TOKEN: Duration = Duration::from_secs(10);
/// Longest answer.
const MAX_ANSWER_BYTES: usize = 64 << 10;
/// Longest token. Those of registries are a tenth of that, and many are remembered.
const MAX_TOKEN_BYTES: usize = 16 << 10;
/// A token's life where its realm does not say (token specification, "Token Response Fields").
const DEFAULT_LIFE: Duration = Duration::from_secs(60);
/// A token's life at most, whatever its realm says.
const LONGEST_LIFE: Duration = Duration::from_secs(24 * 60 * 60);
/// Our name in the realm's records.
const CLIENT_ID: &str = "hawker";

/// The wish to a realm.
pub(super) struct Wanted<'a> {
    pub(super) realm: &'a Url,
    pub(super) service: Option<&'a str>,
    pub(super) scopes: &'a [String],
}

/// Why there is no token.
#[derive(Clone, Debug)]
pub(super) enum Denied {
    /// The realm says no, or the node may not ask it.
    Refused(StatusCode),
    /// It wants to be left alone, for as long as its `Retry-After` says.
    Busy(Option<HeaderValue>),
    /// It can't be asked, or talks nonsense.
    Failed(OriginError),
}

#[derive(Deserialize)]
struct Answer {
    token: Option<String>,
    access_token: Option<String>,
    expires_in: Option<Value>,
}

/// A token for what is wanted. Its life counts from before it was asked for, and ends a tenth early.
pub(super) async fn get(
    asked: &Asked<'_>,
    wanted: &Wanted<'_>,
    credential: Option<&Credential>,
) -> Result<Granted, Denied> {
    let realm = Realm {
        asked: Asked {
            clients: asked.realm_clients,
            ..*asked
        },
        wanted,
    };
    let denied = timeout(TOKEN, realm.ask(credential))
        .await
        .unwrap_or_else(|_| {
            Err(Denied::Failed(unreachable(
                asked.registry,
                "it did not answer in time".into(),
            )))
        });
    denied.map_err(|denied| realm.explain(denied))
}

struct Realm<'a> {
    asked: Asked<'a>,
    wanted: &'a Wanted<'a>,
}

impl Realm<'_> {
    async fn ask(&self, credential: Option<&Credential>) -> Result<Granted, Denied> {
        let begun = Instant::now();
        let mut response = match credential {
            Some(Credential::IdentityToken(token)) => {
                self.post(&[
                    ("grant_type", "refresh_token"),
                    ("refresh_token", token.reveal()),
                ])
                .await?
            }
            other => self.fetch(other).await?,
        };
        if let Some(Credential::Password { user, password }) = credential
            && matches!(response.status().as_u16(), 400 | 404 | 405)
        {
            let grant = [
                ("grant_type", "password"),
                ("username", user),
                ("password", password.reveal()),
            ];
            response = self.post(&grant).await?;
        }
        match response.status() {
            status if status.is_success() => {}
            StatusCode::TOO_MANY_REQUESTS => {
                return Err(Denied::Busy(response.headers().get(RETRY_AFTER).cloned()));
            }
            status if status.is_client_error() => return Err(Denied::Refused(status)),
            status => return Err(self.failed(format!("it answered {status}"))),
        }
        self.granted(response, begun).await
    }

    /// GET, with name and password if there are any.
    async fn fetch(&self, credential: Option<&Credential>) -> Result<Response<Incoming>, Denied> {
        let mut url = self.wanted.realm.clone();
        let mut headers = own_headers(&self.asked);
        if let Some(basic) = credential.and_then(Credential::to_basic) {
            headers.insert(AUTHORIZATION, basic);
        }
        {
            let mut query = url.query_pairs_mut();
            query.extend_pairs(self.wanted.service.map(|service| ("service", service)));
            query.extend_pairs(self.wanted.scopes.iter().map(|scope| ("scope", scope)));
            if let Some(Credential::Password { user, .. }) = credential {
                query.append_pair("account", user);
            }
        }
        self.asked
            .follow(&Method::GET, url, headers)
            .await
            .map_err(Denied::Failed)
    }

    /// POST of a grant. A redirect that keeps the method is followed on the realm's own host, as it takes a secret along.
    async fn post(&self, grant: &[(&str, &str)]) -> Result<Response<Incoming>, Denied> {
        let mut headers = own_headers(&self.asked);
        headers.insert(
            CONTENT_TYPE,
            HeaderValue::from_static("application/x-www-form-urlencoded"),
        );
        self.asked
            .follow_post(self.wanted.realm, &headers, &self.form(grant))
            .await
            .map_err(Denied::Failed)
    }

    fn form(&self, grant: &[(&str, &str)]) -> Bytes {
        let mut form = Serializer::new(String::new());
        form.extend_pairs(grant).append_pair("client_id", CLIENT_ID);
        form.extend_pairs(self.wanted.service.map(|service| ("service", service)));
        if !self.wanted.scopes.is_empty() {
            form.append_pair("scope", &self.wanted.scopes.join(" "));
        }
        form.finish().into()
    }

    async fn granted(
        &self,
        response: Response<Incoming>,
        begun: Instant,
    ) -> Result<Granted, Denied> {
        let body = Limited::new(response.into_body(), MAX_ANSWER_BYTES)
            .collect()
            .await;
        let body = body.map_err(|e| self.failed(reasons(&*e)))?.to_bytes();
        // The parser's own words may quote the token.
        let answer: Answer = serde_json::from_slice(&body)
            .map_err(|_| self.failed("its answer is no token".into()))?;
        let token = answer
            .token
            .filter(|token| !token.is_empty())
            .or(answer.access_token);
        let authorization = token
            .filter(|token| (1..=MAX_TOKEN_BYTES).contains(&token.len()))
            .filter(|token| token.bytes().all(|c| c.is_ascii_graphic()))
            .and_then(|token| HeaderValue::try_from(format!("Bearer {token}")).ok());
        let mut authorization =
            authorization.ok_or_else(|| self.failed("its answer is no token".into()))?;
        authorization.set_sensitive(true);
        let life = life(answer.expires_in.as_ref());
        Ok(Granted {
            authorization,
            life: (life - life / 10).saturating_sub(begun.elapsed()),
        })
    }

    fn failed(&self, reason: String) -> Denied {
        Denied::Failed(self.asked.broken(reason))
    }

    /// Errors name the realm; one that the node may not reach is as good as one that says no.
    fn explain(&self, denied: Denied) -> Denied {
        let host = self.wanted.realm.host_str().unwrap_or_default();
        let at = |reason: String| format!("its realm {host}: {reason}");
        match denied {
            Denied::Failed(OriginError::Forbidden(reason)) => {
                tracing::warn!(
                    registry = self.asked.registry,
                    reason,
                    "the registry's realm may not be asked"
                );
                Denied::Refused(StatusCode::UNAUTHORIZED)
            }
            Denied::Failed(OriginError::Unreachable { registry, reason }) => {
                Denied::Failed(OriginError::Unreachable {
                    registry,
                    reason: at(reason),
                })
            }
            Denied::Failed(OriginError::Broken { registry, reason }) => {
                Denied::Failed(OriginError::Broken {
                    registry,
                    reason: at(reason),
                })
            }
            other => other,
        }
    }
}

fn own_headers(asked: &Asked<'_>) -> HeaderMap {
    HeaderMap::from_iter([
        (ACCEPT, HeaderValue::from_static("application/json")),
        (USER_AGENT, super::OWN_NAME),
        (VIA, asked.via.clone()),
    ])
}

/// `expires_in`, in seconds; some realms write it as text.
fn life(expires_in: Option<&Value>) -> Duration {
    let seconds = match expires_in {
        Some(Value::Number(number)) => number.as_f64(),
        Some(Value::String(text)) => text.parse().ok(),
        _ => None,
    };
    let life = seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    // A life of nothing is no statement: each request would need a token of its own.
    life.filter(|life| !life.is_zero())
        .unwrap_or(DEFAULT_LIFE)
        .min(LONGEST_LIFE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tokens_life_is_what_its_realm_says_within_reason() {
        for (said, seconds) in [
            ("null", 60),
            ("300", 300),
            ("\"300\"", 300),
            ("300.0", 300),
            ("0", 60),
            ("-1", 60),
            ("1e300", 60),
            ("\"soon\"", 60),
            ("1000000", 86_400),
        ] {
            let said: Value = serde_json::from_str(said).unwrap();
            assert_eq!(life(Some(&said)).as_secs(), seconds, "{said}");
        }
        assert_eq!(life(None), DEFAULT_LIFE);
    }
}
