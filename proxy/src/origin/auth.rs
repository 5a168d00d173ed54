//! This node's own right at a registry: the token that its realm gives to anybody or, if the configuration says so,
//! for this node's credentials. It is fetched when the registry asks for it, kept no longer than it lives, and fetched
//! once for all.

use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ::lru::LruCache;
use hawker_core::lru;
use hawker_oci::challenge::{self, Bearer, Challenge};
use http::header::{
    AUTHORIZATION, CONTENT_LENGTH, IF_NONE_MATCH, IF_RANGE, RANGE, RETRY_AFTER, WWW_AUTHENTICATE,
};
use http::{HeaderMap, HeaderValue, Method, Response, StatusCode};
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use tokio::time::{Instant, timeout};
use url::Url;

use super::request::Asked;
use super::token::{self, Denied, Wanted};
use super::{Content, OriginError, content_length, join, remote_name};
use crate::coalesce::Coalesced;
use crate::settings::{AuthorizationMode, LiveSettings};
use hawker_credentials::{Credential, Keychain};

/// How long a refusal counts before the realm is asked again.
const REFUSED: Duration = Duration::from_secs(10);
/// A right that was got less than this ago, and has opened nothing yet, may be too new for a registry whose clock is behind: it is
/// kept when the registry refuses it.
const NEW: Duration = Duration::from_secs(10);
/// How long the challenge that `/v2/` gave, or the lack of one, counts.
const PINGED: Duration = Duration::from_secs(5 * 60);
/// The same where `/v2/` gave no answer.
const PING_FAILED: Duration = Duration::from_secs(10);
/// How long name and password count before they are looked up again.
const BASIC: Duration = Duration::from_secs(5 * 60);
/// Rights that are kept.
const CAPACITY: NonZeroUsize = NonZeroUsize::new(1024).expect("not zero");
/// A refusal's body is read to its end if it is no longer than this, and comes in [`LEFTOVER`]: the connection is used again.
const LEFTOVER_BYTES: u64 = 64 << 10;
const LEFTOVER: Duration = Duration::from_secs(1);

/// The value of a client's name and password at a registry.
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
    /// The last time that a right was replaced because of an answer without a challenge, and that right.
    replaced: Mutex<LruCache<Place, (Instant, Option<HeaderValue>)>>,
    /// The challenges of `/v2/`, by endpoint.
    pinged: Mutex<LruCache<Url, Pinged>>,
    getting: Coalesced<Place, Result<Right, Denied>>,
}

/// The scope of a right. Registries that share an endpoint share no rights: each has a mode and credentials of its
/// own.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Place {
    registry: String,
    endpoint: Url,
    repository: String,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Right {
    /// This header opens it, or should; with the credential of this node that was needed for it.
    Shown(HeaderValue, Option<Credential>),
    /// There is none to be had.
    Refused,
}

/// Goes with what this node's own credentials opened, under these settings: nobody else is known to be let in.
#[derive(Clone)]
pub(crate) struct ByCredentials(pub(crate) Arc<LiveSettings>);

struct Held {
    right: Right,
    since: Instant,
    until: Instant,
    /// It has opened something.
    proven: bool,
}

impl Held {
    /// Whether a refusal may only mean that the right is not valid yet.
    fn is_new(&self) -> bool {
        !self.proven && self.since.elapsed() < NEW
    }
}

struct Pinged {
    challenges: Vec<Challenge>,
    until: Instant,
}

/// The reason for which another right may help.
enum Refusal {
    /// The registry asks for one.
    Asked,
    /// The registry says that there is nothing, or that it may not be read, as some do instead of asking.
    Hidden,
}

impl Rights {
    pub(super) fn new(settings: Arc<LiveSettings>) -> Self {
        let keychain = Keychain::new(settings.credentials.clone());
        let (held, replaced) = (
            Mutex::new(lru::bounded(CAPACITY)),
            Mutex::new(lru::bounded(CAPACITY)),
        );
        let pinged = Mutex::new(lru::bounded(CAPACITY));
        Self {
            settings,
            keychain,
            held,
            replaced,
            pinged,
            getting: Coalesced::default(),
        }
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
        let since = Instant::now();
        self.all().put(
            place.clone(),
            Held {
                right,
                since,
                until: since + life,
                proven: false,
            },
        );
    }

    /// This header has opened something.
    fn prove(&self, place: &Place, shown: &HeaderValue) {
        if let Some(held) = self.all().get_mut(place)
            && matches!(&held.right, Right::Shown(value, _) if value == shown)
        {
            held.proven = true;
        }
    }

    /// Whether this header is a token that may only be too new.
    fn is_new(&self, place: &Place, shown: &HeaderValue) -> bool {
        self.all().get(place).is_some_and(|held| {
            held.is_new()
                && matches!(&held.right, Right::Shown(value, _) if value == shown && !is_basic(value))
        })
    }

    /// Whether `used` may be replaced though the registry does not ask for another right: once in a while.
    fn may_replace(&self, place: &Place, used: Option<&HeaderValue>) -> bool {
        let mut all = self.replaced.lock().unwrap_or_else(PoisonError::into_inner);
        match all.get(place) {
            Some((when, of)) if when.elapsed() < REFUSED => of.as_ref() == used,
            _ => {
                all.put(place.clone(), (Instant::now(), used.cloned()));
                true
            }
        }
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
                Ok((granted, credential)) => (
                    Right::Shown(granted.authorization, credential),
                    granted.life,
                ),
                Err(Denied::Refused(_)) => (Right::Refused, REFUSED),
                Err(denied) => return Err(denied),
            };
            self.keep(place, right.clone(), life);
            Ok(right)
        };
        self.getting.run(place.clone(), earn).await
    }

    /// A right, and the credential of this node that it took.
    async fn earn(
        &self,
        asked: &Asked<'_>,
        place: &Place,
        challenges: &[Challenge],
    ) -> Result<(Granted, Option<Credential>), Denied> {
        let mut credential = self.credential(asked, &place.repository).await;
        let Some((bearer, realm)) = asked.bearer(challenges) else {
            let wants_basic = challenges
                .iter()
                .any(|c| matches!(c, Challenge::Basic { .. }));
            let basic = credential
                .as_ref()
                .and_then(Credential::to_basic)
                .filter(|_| wants_basic);
            let authorization = basic.ok_or(Denied::Refused(StatusCode::UNAUTHORIZED))?;
            return Ok((
                Granted {
                    authorization,
                    life: BASIC,
                },
                credential,
            ));
        };
        let scopes = bearer.scopes(&remote_name(asked.endpoint, &place.repository));
        let wanted = Wanted {
            realm: &realm,
            service: bearer.service.as_deref(),
            scopes: &scopes,
        };
        let mut again = true;
        while let Some(shown) = credential {
            let status = match token::get(asked, &wanted, Some(&shown)).await {
                Err(Denied::Refused(status)) => status,
                other => return other.map(|granted| (granted, Some(shown))),
            };
            // A helper's answer may be older than the credentials are good for.
            self.keychain.doubt(asked.registry).await;
            let now = self.credential(asked, &place.repository).await;
            credential = now.filter(|now| std::mem::take(&mut again) && *now != shown);
            if credential.is_none() {
                let (registry, status) = (asked.registry, status.as_u16());
                tracing::warn!(
                    registry,
                    status,
                    "this node's credentials are refused; asking without any"
                );
            }
        }
        token::get(asked, &wanted, None)
            .await
            .map(|granted| (granted, None))
    }

    /// The challenges of the endpoint's `/v2/`; none if it is open.
    async fn ping(&self, asked: &Asked<'_>, headers: &HeaderMap) -> Vec<Challenge> {
        let known = |now: Instant| {
            let mut all = self.pinged.lock().unwrap_or_else(PoisonError::into_inner);
            all.get(asked.endpoint)
                .filter(|pinged| pinged.until > now)
                .map(|pinged| pinged.challenges.clone())
        };
        if let Some(challenges) = known(Instant::now()) {
            return challenges;
        }
        let mut headers = headers.clone();
        for name in [AUTHORIZATION, RANGE, IF_RANGE, IF_NONE_MATCH] {
            headers.remove(name);
        }
        let url = join(asked.endpoint, &Content::Ping.path(""), None);
        let (found, life) = match asked.follow(&Method::GET, url, headers).await {
            Ok(answer) if answer.status() == StatusCode::UNAUTHORIZED => {
                let found = challenges(answer.headers());
                finish(answer).await;
                (found, PINGED)
            }
            Ok(answer) if answer.status().is_server_error() => (Vec::new(), PING_FAILED),
            Ok(answer) => {
                finish(answer).await;
                (Vec::new(), PINGED)
            }
            Err(_) => (Vec::new(), PING_FAILED),
        };
        let pinged = Pinged {
            challenges: found.clone(),
            until: Instant::now() + life,
        };
        let mut all = self.pinged.lock().unwrap_or_else(PoisonError::into_inner);
        all.put(asked.endpoint.clone(), pinged);
        found
    }

    /// Whether another right than the one that was shown, if any, could open what a registry hides.
    async fn could_help(
        &self,
        asked: &Asked<'_>,
        place: &Place,
        held: Option<&Right>,
        status: StatusCode,
    ) -> bool {
        let used = match held {
            Some(Right::Refused) => return false,
            // Some say 403 where a token has run out.
            Some(Right::Shown(value, _)) if status == StatusCode::FORBIDDEN => {
                return self.may_replace(place, Some(value));
            }
            Some(Right::Shown(_, None)) => return false,
            Some(Right::Shown(_, used)) => used.as_ref(),
            None => None,
        };
        // The registry may hide content from this caller. Only credentials that were not shown yet could change that.
        let credential = self.credential(asked, &place.repository).await;
        credential.is_some() && credential.as_ref() != used
    }

    /// The credential that this node may show there on its own.
    async fn credential(&self, asked: &Asked<'_>, repository: &str) -> Option<Credential> {
        let registry = asked.registry;
        let may = self.settings.registries.authorization(registry) == AuthorizationMode::Node
            && asked.endpoint == asked.route.home(registry);
        if may {
            self.keychain.find(registry, repository).await
        } else {
            None
        }
    }

    /// Says of an answer whether this node's credentials opened it.
    fn mark(&self, answer: &mut Response<Incoming>, by_credentials: bool) {
        if by_credentials {
            answer
                .extensions_mut()
                .insert(ByCredentials(Arc::clone(&self.settings)));
        }
    }
}

impl Asked<'_> {
    /// Asks with this node's own right. If there is none, or the registry refuses it, a new one is fetched, and shown
    /// once.
    ///
    /// Registries refuse in several ways: by a 401 with or without a challenge, by a 403 for a token that has run out,
    /// by a 404 for content that only some may know of. If the answer has no challenge, `/v2/` is asked for one.
    pub(super) async fn by_own_right(
        &self,
        rights: &Rights,
        repository: &str,
        method: &Method,
        url: Url,
        mut headers: HeaderMap,
    ) -> Result<Response<Option<Incoming>>, OriginError> {
        let place = Place {
            registry: self.registry.to_owned(),
            endpoint: self.endpoint.clone(),
            repository: repository.to_owned(),
        };
        let held = rights.held(&place);
        let mut by_credentials = false;
        if let Some(Right::Shown(value, credential)) = &held {
            headers.insert(AUTHORIZATION, value.clone());
            by_credentials = credential.is_some();
        }
        let mut first = self.follow(method, url.clone(), headers.clone()).await?;
        rights.mark(&mut first, by_credentials);
        let (used, status) = (headers.get(AUTHORIZATION).cloned(), first.status());
        let refusal = match status {
            StatusCode::UNAUTHORIZED => Refusal::Asked,
            StatusCode::FORBIDDEN | StatusCode::NOT_FOUND => Refusal::Hidden,
            _ => {
                if let Some(used) = used.as_ref().filter(|_| status.is_success()) {
                    rights.prove(&place, used);
                }
                return Ok(first.map(Some));
            }
        };
        let is_final = match refusal {
            Refusal::Asked => {
                held == Some(Right::Refused)
                    || used
                        .as_ref()
                        .is_some_and(|used| rights.is_new(&place, used))
            }
            Refusal::Hidden => !rights.could_help(self, &place, held.as_ref(), status).await,
        };
        if is_final && (matches!(refusal, Refusal::Hidden) || has_challenge(first.headers())) {
            return Ok(first.map(Some));
        }
        let mut challenges = challenges(first.headers());
        if challenges.is_empty() && !repository.is_empty() {
            challenges = rights.ping(self, &headers).await;
            if status == StatusCode::UNAUTHORIZED {
                // Clients need one to know where to get a right of their own.
                add_challenges(first.headers_mut(), &challenges);
            }
        }
        if is_final || challenges.is_empty() {
            return Ok(first.map(Some));
        }
        if by_credentials {
            // They may have been replaced since they were read.
            rights.keychain.doubt(self.registry).await;
        }
        match rights.get(self, &place, &challenges, used.as_ref()).await {
            // The same again would be refused again.
            Ok(Right::Shown(value, _)) if Some(&value) == used.as_ref() => {
                if status == StatusCode::UNAUTHORIZED {
                    rights.keep(&place, Right::Refused, REFUSED);
                }
                return Ok(first.map(Some));
            }
            Ok(Right::Shown(value, credential)) => {
                headers.insert(AUTHORIZATION, value);
                by_credentials = credential.is_some();
            }
            Ok(Right::Refused) | Err(Denied::Refused(_)) => return Ok(first.map(Some)),
            Err(_) if matches!(refusal, Refusal::Hidden) => return Ok(first.map(Some)),
            Err(Denied::Busy(retry_after)) => return Ok(too_many(retry_after)),
            Err(Denied::Failed(error)) => return Err(error),
        };
        finish(first).await;
        let shown = headers.get(AUTHORIZATION).cloned();
        let mut second = self.follow(method, url, headers).await?;
        rights.mark(&mut second, by_credentials);
        match (second.status(), shown) {
            (status, Some(shown)) if status.is_success() => rights.prove(&place, &shown),
            // A token that was got just now may not be valid yet by the registry's clock. It is kept and shown again.
            (StatusCode::UNAUTHORIZED, Some(shown)) => {
                if is_basic(&shown) {
                    rights.keep(&place, Right::Refused, REFUSED);
                }
                rights.keychain.doubt(self.registry).await;
                if !has_challenge(second.headers()) {
                    add_challenges(second.headers_mut(), &challenges);
                }
            }
            _ => {}
        }
        Ok(second.map(Some))
    }

    /// The value of a client's name and password here, by the challenge of `/v2/` or, if that is open, of the
    /// repository.
    pub(super) async fn exchange(
        &self,
        repository: &str,
        credential: &Credential,
        mut headers: HeaderMap,
    ) -> Result<Exchanged, OriginError> {
        let mut refusal = None;
        let places = [Content::Ping, Content::Tags];
        // A login is for no repository.
        let places = if repository.is_empty() {
            &places[..1]
        } else {
            &places[..]
        };
        for content in places {
            let url = join(self.endpoint, &content.path(repository), None);
            let answer = self
                .follow(&Method::GET, url.clone(), headers.clone())
                .await?;
            match answer.status() {
                StatusCode::UNAUTHORIZED => {
                    let asks = has_challenge(answer.headers());
                    refusal = Some((url, answer));
                    if asks {
                        break;
                    }
                }
                StatusCode::TOO_MANY_REQUESTS => {
                    return Ok(Exchanged::Busy(answer.headers().get(RETRY_AFTER).cloned()));
                }
                status if status.is_server_error() => {
                    return Err(super::unreachable(
                        self.registry,
                        format!("it answered {status}"),
                    ));
                }
                _ => finish(answer).await,
            }
        }
        let Some((url, first)) = refusal else {
            return Ok(Exchanged::Open);
        };
        let challenges = challenges(first.headers());
        finish(first).await;
        if let Some((bearer, realm)) = self.bearer(&challenges) {
            let scopes = bearer.scopes(&remote_name(self.endpoint, repository));
            let wanted = Wanted {
                realm: &realm,
                service: bearer.service.as_deref(),
                scopes: &scopes,
            };
            return match token::get(self, &wanted, Some(credential)).await {
                Ok(granted) => Ok(Exchanged::Granted(granted)),
                Err(Denied::Refused(status)) => Ok(Exchanged::Refused(status)),
                Err(Denied::Busy(retry_after)) => Ok(Exchanged::Busy(retry_after)),
                Err(Denied::Failed(error)) => Err(error),
            };
        }
        let wants_basic = challenges
            .iter()
            .any(|c| matches!(c, Challenge::Basic { .. }));
        let Some(authorization) = credential.to_basic().filter(|_| wants_basic) else {
            return Err(self.broken("it asks for a right that can't be got here".to_owned()));
        };
        headers.insert(AUTHORIZATION, authorization.clone());
        let second = self.follow(&Method::GET, url, headers).await?;
        Ok(match second.status() {
            status @ (StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) => {
                Exchanged::Refused(status)
            }
            _ => Exchanged::Granted(Granted {
                authorization,
                life: BASIC,
            }),
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
        let realm = self
            .route
            .realm(self.registry, self.endpoint, &bearer.realm);
        realm
            .inspect_err(|reason| {
                tracing::warn!(registry = self.registry, %reason, "the registry's realm is not trusted");
            })
            .ok()
    }

    /// Leaves those challenges in a response whose realm may be trusted, written anew: clients read no more into them
    /// than we do. A refusal of a token that was this node's `own` says nothing about the client.
    pub(super) fn keep_trusted(&self, headers: &mut HeaderMap, own: bool) {
        if !headers.contains_key(WWW_AUTHENTICATE) {
            return;
        }
        let all = challenges(headers);
        headers.remove(WWW_AUTHENTICATE);
        for mut challenge in all {
            if let Challenge::Bearer(bearer) = &mut challenge {
                let Some(realm) = self.trusted(bearer) else {
                    continue;
                };
                if bearer.realm.starts_with('/') {
                    bearer.realm = realm.into();
                }
                bearer.error.take_if(|_| own);
            }
            headers.extend(
                HeaderValue::try_from(challenge.to_string())
                    .ok()
                    .map(|line| (WWW_AUTHENTICATE, line)),
            );
        }
    }
}

fn is_basic(value: &HeaderValue) -> bool {
    value
        .as_bytes()
        .get(..6)
        .is_some_and(|scheme| scheme.eq_ignore_ascii_case(b"basic "))
}

fn has_challenge(headers: &HeaderMap) -> bool {
    !challenges(headers).is_empty()
}

fn add_challenges(headers: &mut HeaderMap, challenges: &[Challenge]) {
    let lines = challenges
        .iter()
        .filter_map(|challenge| HeaderValue::try_from(challenge.to_string()).ok());
    headers.extend(lines.map(|line| (WWW_AUTHENTICATE, line)));
}

fn challenges(headers: &HeaderMap) -> Vec<Challenge> {
    challenge::parse(
        headers
            .get_all(WWW_AUTHENTICATE)
            .iter()
            .map(HeaderValue::as_bytes),
    )
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
    // Any failure closes the connection, and nothing else happens.
    let _ = timeout(LEFTOVER, rest).await;
}

#[cfg(test)]
mod tests;
