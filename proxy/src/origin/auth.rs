//! This node's own right at a registry: what its realm gives to anybody or, where the configuration says so, for this node's
//! credentials. It is got when the registry asks for it, kept no longer than it lives, and got once for all who need it.

use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hawker_core::challenge::{self, Bearer, Challenge};
use http::header::{AUTHORIZATION, CONTENT_LENGTH, RETRY_AFTER, WWW_AUTHENTICATE};
use http::{HeaderMap, HeaderValue, Method, Response, StatusCode};
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use lru::LruCache;
use tokio::time::{Instant, timeout};
use url::Url;

use super::request::Asked;
use super::token::{self, Denied, Wanted};
use super::{Content, OriginError, content_length, join};
use crate::coalesce::Coalesced;
use crate::credentials::{Credential, Keychain};
use crate::settings::{AuthorizationMode, LiveSettings};

/// How long a refusal counts before the realm is asked again.
const REFUSED: Duration = Duration::from_secs(10);
/// How long name and password count before they are looked up again.
const BASIC: Duration = Duration::from_secs(5 * 60);
/// Rights that are kept.
const CAPACITY: NonZeroUsize = NonZeroUsize::new(1024).expect("not zero");
/// A refusal's body is read to its end if it is no longer than this, and comes in [`LEFTOVER`]: the connection is used again.
const LEFTOVER_BYTES: u64 = 64 << 10;
const LEFTOVER: Duration = Duration::from_secs(1);

/// What a client's name and password are worth at a registry.
#[derive(Clone, Debug)]
pub enum Exchanged {
    /// The right to read.
    Granted(Granted),
    /// The registry wants none for this repository: anybody may read.
    Open,
    /// The registry or its realm refuses them, with this status.
    Refused(StatusCode),
    /// The realm wants to be left alone, for as long as its `Retry-After` says.
    Busy(Option<HeaderValue>),
}

/// A right, as it is shown to a registry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Granted {
    /// The header; sensitive.
    pub authorization: HeaderValue,
    /// How long it counts, from now on.
    pub life: Duration,
}

/// The rights this node has, and how it gets them.
pub(super) struct Rights {
    settings: Arc<LiveSettings>,
    keychain: Keychain,
    held: Mutex<LruCache<Place, Held>>,
    getting: Coalesced<Place, Result<Right, Denied>>,
}

/// What a right is for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Place {
    endpoint: Url,
    repository: String,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Right {
    /// This header opens it, or should. Whether this node's credentials were needed for it.
    Shown(HeaderValue, bool),
    /// There is none to be had.
    Refused,
}

/// Goes with what this node's own credentials opened, under these settings: nobody else is known to be let in.
#[derive(Clone)]
pub(crate) struct ByCredentials(pub(crate) Arc<LiveSettings>);

struct Held {
    right: Right,
    until: Instant,
}

impl Rights {
    pub(super) fn new(settings: Arc<LiveSettings>) -> Self {
        let keychain = Keychain::new(settings.credentials.clone());
        let held = Mutex::new(LruCache::new(CAPACITY));
        Self { settings, keychain, held, getting: Coalesced::default() }
    }

    fn all(&self) -> MutexGuard<'_, LruCache<Place, Held>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn held(&self, place: &Place) -> Option<Right> {
        let mut all = self.all();
        let held = all.get(place)?;
        if held.until > Instant::now() {
            return Some(held.right.clone());
        }
        all.pop(place);
        None
    }

    fn keep(&self, place: &Place, right: Right, life: Duration) {
        self.all().put(place.clone(), Held { right, until: Instant::now() + life });
    }

    /// Gets a right after a refusal with these challenges, unless somebody else has got one since. `used` is what was refused.
    async fn get(
        &self,
        asked: &Asked<'_>,
        place: &Place,
        challenges: &[Challenge],
        used: Option<&HeaderValue>,
    ) -> Result<Right, Denied> {
        match self.held(place) {
            Some(Right::Shown(held, _)) if Some(&held) == used => drop(self.all().pop(place)),
            Some(right) => return Ok(right),
            None => {}
        }
        let earn = async {
            let (right, life) = match self.earn(asked, place, challenges).await {
                Ok((granted, by_credentials)) => {
                    (Right::Shown(granted.authorization, by_credentials), granted.life)
                }
                Err(Denied::Refused(_)) => (Right::Refused, REFUSED),
                Err(denied) => return Err(denied),
            };
            self.keep(place, right.clone(), life);
            Ok(right)
        };
        self.getting.run(place.clone(), earn).await
    }

    /// A right, and whether it took this node's credentials.
    async fn earn(
        &self,
        asked: &Asked<'_>,
        place: &Place,
        challenges: &[Challenge],
    ) -> Result<(Granted, bool), Denied> {
        let credential = self.credential(asked, &place.repository).await;
        let Some((bearer, realm)) = asked.bearer(challenges) else {
            let wants_basic = challenges.iter().any(|c| matches!(c, Challenge::Basic { .. }));
            let basic = credential.and_then(|c| c.to_basic()).filter(|_| wants_basic);
            let authorization = basic.ok_or(Denied::Refused(StatusCode::UNAUTHORIZED))?;
            return Ok((Granted { authorization, life: BASIC }, true));
        };
        let scopes = bearer.scopes(&place.repository);
        let wanted = Wanted { realm: &realm, service: bearer.service.as_deref(), scopes: &scopes };
        if let Some(credential) = &credential {
            match token::get(asked, &wanted, Some(credential)).await {
                Err(Denied::Refused(status)) => {
                    let (registry, status) = (asked.registry, status.as_u16());
                    tracing::warn!(
                        registry,
                        status,
                        "this node's credentials are refused; asking without any"
                    );
                    self.keychain.doubt(registry).await;
                }
                other => return other.map(|granted| (granted, true)),
            }
        }
        token::get(asked, &wanted, None).await.map(|granted| (granted, false))
    }

    /// What this node may show there on its own.
    async fn credential(&self, asked: &Asked<'_>, repository: &str) -> Option<Credential> {
        let registry = asked.registry;
        let may = self.settings.registries.authorization(registry) == AuthorizationMode::Node
            && asked.endpoint == asked.route.home(registry);
        if may { self.keychain.find(registry, repository).await } else { None }
    }

    /// Says of an answer whether this node's credentials opened it.
    fn mark(&self, answer: &mut Response<Incoming>, by_credentials: bool) {
        if by_credentials {
            answer.extensions_mut().insert(ByCredentials(Arc::clone(&self.settings)));
        }
    }

    /// What was got is not good enough.
    async fn disappointed(&self, asked: &Asked<'_>, place: &Place) {
        self.keep(place, Right::Refused, REFUSED);
        self.keychain.doubt(asked.registry).await;
    }
}

impl Asked<'_> {
    /// Asks with this node's own right: with the one it has; if it has none, or the registry will not have it, with a new one,
    /// once.
    pub(super) async fn by_own_right(
        &self,
        rights: &Rights,
        repository: &str,
        method: &Method,
        url: Url,
        mut headers: HeaderMap,
    ) -> Result<Response<Option<Incoming>>, OriginError> {
        let place = Place { endpoint: self.endpoint.clone(), repository: repository.to_owned() };
        let held = rights.held(&place);
        let mut by_credentials = false;
        if let Some(Right::Shown(value, is_ours)) = &held {
            headers.insert(AUTHORIZATION, value.clone());
            by_credentials = *is_ours;
        }
        let mut first = self.follow(method, url.clone(), headers.clone()).await?;
        rights.mark(&mut first, by_credentials);
        if first.status() != StatusCode::UNAUTHORIZED || held == Some(Right::Refused) {
            return Ok(first.map(Some));
        }
        let challenges = challenges(first.headers());
        match rights.get(self, &place, &challenges, headers.get(AUTHORIZATION)).await {
            Ok(Right::Shown(value, is_ours)) => {
                headers.insert(AUTHORIZATION, value);
                by_credentials = is_ours;
            }
            Ok(Right::Refused) | Err(Denied::Refused(_)) => return Ok(first.map(Some)),
            Err(Denied::Busy(retry_after)) => return Ok(too_many(retry_after)),
            Err(Denied::Failed(error)) => return Err(error),
        };
        finish(first).await;
        let mut second = self.follow(method, url, headers).await?;
        rights.mark(&mut second, by_credentials);
        if second.status() == StatusCode::UNAUTHORIZED {
            rights.disappointed(self, &place).await;
        }
        Ok(second.map(Some))
    }

    /// What a client's name and password are worth here, by what `/v2/` asks for or, where that is open, the repository.
    pub(super) async fn exchange(
        &self,
        repository: &str,
        credential: &Credential,
        mut headers: HeaderMap,
    ) -> Result<Exchanged, OriginError> {
        let mut refusal = None;
        for content in [Content::Ping, Content::Tags] {
            let url = join(self.endpoint, &content.path(repository), None);
            let answer = self.follow(&Method::GET, url.clone(), headers.clone()).await?;
            match answer.status() {
                StatusCode::UNAUTHORIZED => {
                    refusal = Some((url, answer));
                    break;
                }
                StatusCode::TOO_MANY_REQUESTS => {
                    return Ok(Exchanged::Busy(answer.headers().get(RETRY_AFTER).cloned()));
                }
                status if status.is_server_error() => {
                    return Err(super::unreachable(self.registry, format!("it answered {status}")));
                }
                _ => finish(answer).await,
            }
        }
        let Some((url, first)) = refusal else { return Ok(Exchanged::Open) };
        let challenges = challenges(first.headers());
        finish(first).await;
        if let Some((bearer, realm)) = self.bearer(&challenges) {
            let scopes = bearer.scopes(repository);
            let wanted = Wanted { realm: &realm, service: bearer.service.as_deref(), scopes: &scopes };
            return match token::get(self, &wanted, Some(credential)).await {
                Ok(granted) => Ok(Exchanged::Granted(granted)),
                Err(Denied::Refused(status)) => Ok(Exchanged::Refused(status)),
                Err(Denied::Busy(retry_after)) => Ok(Exchanged::Busy(retry_after)),
                Err(Denied::Failed(error)) => Err(error),
            };
        }
        let wants_basic = challenges.iter().any(|c| matches!(c, Challenge::Basic { .. }));
        let Some(authorization) = credential.to_basic().filter(|_| wants_basic) else {
            return Err(self.broken("it asks for a right that can't be got here".to_owned()));
        };
        headers.insert(AUTHORIZATION, authorization.clone());
        let second = self.follow(&Method::GET, url, headers).await?;
        Ok(match second.status() {
            status @ (StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) => Exchanged::Refused(status),
            _ => Exchanged::Granted(Granted { authorization, life: BASIC }),
        })
    }

    /// The first challenge that sends us to a realm that may be trusted.
    fn bearer<'c>(&self, challenges: &'c [Challenge]) -> Option<(&'c Bearer, Url)> {
        challenges.iter().find_map(|challenge| match challenge {
            Challenge::Bearer(bearer) => Some((bearer, self.trusted(bearer)?)),
            Challenge::Basic { .. } => None,
        })
    }

    fn trusted(&self, bearer: &Bearer) -> Option<Url> {
        let realm = self.route.realm(self.registry, &bearer.realm);
        realm
            .inspect_err(|reason| {
                tracing::warn!(registry = self.registry, %reason, "the registry's realm is not trusted");
            })
            .ok()
    }

    /// Leaves those challenges in a response whose realm may be trusted, written anew: clients read no more into them than we do.
    /// What they say of a token that was this node's `own` is not about the client.
    pub(super) fn keep_trusted(&self, headers: &mut HeaderMap, own: bool) {
        if !headers.contains_key(WWW_AUTHENTICATE) {
            return;
        }
        let all = challenges(headers);
        headers.remove(WWW_AUTHENTICATE);
        for mut challenge in all {
            if let Challenge::Bearer(bearer) = &mut challenge {
                if self.trusted(bearer).is_none() {
                    continue;
                }
                bearer.error.take_if(|_| own);
            }
            headers.extend(
                HeaderValue::try_from(challenge.to_string()).ok().map(|line| (WWW_AUTHENTICATE, line)),
            );
        }
    }
}

fn challenges(headers: &HeaderMap) -> Vec<Challenge> {
    challenge::parse(headers.get_all(WWW_AUTHENTICATE).iter().map(HeaderValue::as_bytes))
}

/// A 429 that nobody sent.
pub(super) fn too_many(retry_after: Option<HeaderValue>) -> Response<Option<Incoming>> {
    let mut response = Response::new(None);
    *response.status_mut() = StatusCode::TOO_MANY_REQUESTS;
    response.headers_mut().insert(CONTENT_LENGTH, 0.into());
    if let Some(retry_after) = retry_after {
        response.headers_mut().insert(RETRY_AFTER, retry_after);
    }
    response
}

/// Reads the rest of a response that nobody needs, so that its connection can be used again.
async fn finish(response: Response<Incoming>) {
    if content_length(response.headers()).is_some_and(|length| length > LEFTOVER_BYTES) {
        return;
    }
    let rest = Limited::new(response.into_body(), LEFTOVER_BYTES as usize).collect();
    // Whatever goes wrong closes the connection, which is all that happens.
    let _ = timeout(LEFTOVER, rest).await;
}

#[cfg(test)]
mod tests;
