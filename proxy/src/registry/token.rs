//! Token mode: this mirror is the realm. Clients that answer only the challenge of `/v2/`, and send no credentials to a realm
//! that is not the mirror's own (podman, CRI-O, skopeo, buildah), get their tokens here, for what they give, from the
//! registry's own realm.
//!
//! A token is random, lives in memory only, and stands for the registry's own `Authorization` for one repository. One that was
//! got without name and password stands for anybody: it is no secret, and takes no memory.

use std::num::NonZeroUsize;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ::lru::LruCache;
use hawker_core::lru;
use hawker_oci::challenge::{Bearer, Challenge, pull_scope, repository_of};
use hawker_oci::reference::{self, Asked, Refused, Source, canonical_host};
use http::header::{
    AUTHORIZATION, CACHE_CONTROL, CONTENT_TYPE, HOST, RETRY_AFTER, WWW_AUTHENTICATE,
};
use http::request::Parts;
use http::uri::Authority;
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use tokio::time::{Instant, timeout};
use url::form_urlencoded;

use super::access::LONGEST_PULL;
use super::body::Payload;
use super::error::Problem;
use super::forward::with;
use super::route::not_in_a_circle;
use super::{Answer, Inner};
use crate::metrics::RequestKind;
use crate::origin::{Exchanged, Granted};
use crate::settings::{AuthorizationMode, Registries};
use hawker_credentials::{Credential, Secret};

/// The path of the token endpoint.
const PATH: &str = "/hawker/token";
/// The service of a token when its request names no registry. No host is called that.
const SERVICE: &str = "hawker mirror";
/// How each token of ours begins.
const PREFIX: &str = "hawker-";
/// The token that stands for anybody.
const ANYBODY: &str = "hawker-anybody";
/// How long clients keep that one.
const ANYBODY_LIFE: Duration = Duration::from_secs(300);
/// Tokens remembered, and what they stand for, in bytes of its headers.
const CAPACITY: NonZeroUsize = NonZeroUsize::new(2048).expect("not zero");
const CAPACITY_BYTES: usize = 8 << 20;
/// Repositories of one token.
const MAX_SCOPES: usize = 4;
/// Longest form.
const MAX_FORM_BYTES: usize = 16 << 10;
/// For a form to arrive.
const FORM: Duration = Duration::from_secs(10);
/// The time for a token, all upstream requests included.
const ANSWER: Duration = Duration::from_secs(28);

const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");

/// The tokens given out.
pub(super) struct Tokens(Mutex<Book>);

struct Book {
    all: LruCache<String, Minted>,
    bytes: usize,
}

/// The right behind a token.
struct Minted {
    /// By repository: the registry's own `Authorization`; `None` where it wants none.
    rights: Vec<(Source, Option<HeaderValue>)>,
    /// The end of the token's recognition: its life and `LONGEST_PULL`, so that a pull outlives the token. After its
    /// life, the remembered facts decide which blobs it still reads, and the registry refuses the rest.
    until: Instant,
}

impl Minted {
    fn bytes(&self) -> usize {
        self.rights
            .iter()
            .filter_map(|(_, right)| right.as_ref())
            .map(HeaderValue::len)
            .sum()
    }
}

impl Book {
    fn put(&mut self, token: String, minted: Minted) {
        self.bytes += minted.bytes();
        let over = self.all.push(token, minted);
        self.bytes -= over.map_or(0, |(_, minted)| minted.bytes());
        while self.bytes > CAPACITY_BYTES {
            let Some((_, oldest)) = self.all.pop_lru() else {
                break;
            };
            self.bytes -= oldest.bytes();
        }
    }

    fn remove(&mut self, token: &str) {
        self.bytes -= self.all.pop(token).map_or(0, |minted| minted.bytes());
    }
}

impl Tokens {
    pub(super) fn new() -> Self {
        Self(Mutex::new(Book {
            all: lru::bounded(CAPACITY),
            bytes: 0,
        }))
    }

    fn book(&self) -> MutexGuard<'_, Book> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn mint(&self, rights: Vec<(Source, Option<HeaderValue>)>, life: Duration) -> String {
        let random: [u8; 32] = rand::random();
        let hex: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
        let token = format!("{PREFIX}{hex}");
        self.book().put(
            token.clone(),
            Minted {
                rights,
                until: Instant::now() + life + LONGEST_PULL,
            },
        );
        token
    }

    /// The right behind `token` at `source` (nowhere: at `/v2/`); the outer `None` when there is none.
    fn right(&self, token: &str, source: Option<&Source>) -> Option<Option<HeaderValue>> {
        if token == ANYBODY {
            return Some(None);
        }
        let mut book = self.book();
        let minted = book.all.get(token)?;
        if minted.until <= Instant::now() {
            book.remove(token);
            return None;
        }
        let Some(source) = source else {
            return Some(None);
        };
        minted
            .rights
            .iter()
            .find(|(of, _)| of == source)
            .map(|(_, right)| right.clone())
    }
}

/// How a request was let in.
#[derive(Debug, Default)]
pub(super) struct Admission {
    /// The challenge that a refusal carries, in place of the registry's own.
    challenge: Option<HeaderValue>,
}

impl Admission {
    /// A client that has its tokens from here is not sent elsewhere for another one.
    pub(super) fn mend(self, answer: &mut Answer) {
        if let Some(challenge) = self
            .challenge
            .filter(|_| answer.status() == StatusCode::UNAUTHORIZED)
        {
            answer.headers_mut().insert(WWW_AUTHENTICATE, challenge);
        }
    }
}

/// Puts the registry's own `Authorization` in place of a token of ours, or takes the token out if it stands for
/// anybody. If the registry is in token mode, a client without a token is sent to get one.
pub(super) fn admit(
    mirror: &Inner,
    request: &mut Parts,
    asked: &Asked,
) -> Result<Admission, Problem> {
    let live = mirror.live.load();
    let token = own_token(&request.headers).map(str::to_owned);
    if token.is_none() && !needs_token(&live.registries, asked) {
        return Ok(Admission::default());
    }
    let source = match asked {
        Asked::Ping { .. } => None,
        Asked::Content(content) => {
            let default = live.registries.default.as_deref();
            if content.registry.is_none() && default.is_none() {
                return Err(Problem::NoRegistry);
            }
            Some(content.source(default.unwrap_or_default()))
        }
    };
    let challenge = |error| challenge(request, asked, error);
    let Some(token) = token else {
        return Err(Problem::Challenged(challenge(None)?));
    };
    let Some(right) = mirror.tokens.right(&token, source.as_ref()) else {
        return Err(Problem::Challenged(challenge(Some("invalid_token"))?));
    };
    let admission = Admission {
        challenge: Some(challenge(Some("insufficient_scope"))?),
    };
    match right {
        Some(right) => drop(request.headers.insert(AUTHORIZATION, right)),
        None => drop(request.headers.remove(AUTHORIZATION)),
    }
    Ok(admission)
}

/// The challenge that goes with a yes to `/v2/`: clients that learn there where their tokens come from, and from nowhere else (podman,
/// skopeo, CRI-O, buildah, oci-client), bring their password for a registry in the path here. Others don't look at it.
pub(super) fn offer(request: &Parts, asked: &Asked) -> Option<HeaderValue> {
    match asked {
        Asked::Ping { registry: None } if !request.headers.contains_key(AUTHORIZATION) => {
            challenge(request, asked, None).ok()
        }
        _ => None,
    }
}

/// Whether a request that carries no token of ours is refused. `/v2/` without a registry stands for all of them.
fn needs_token(registries: &Registries, asked: &Asked) -> bool {
    let named = match asked {
        Asked::Ping { registry } => registry.as_ref(),
        Asked::Content(content) => content.registry.as_ref().or(registries.default.as_ref()),
    };
    match (named, asked) {
        (Some(registry), _) => is_token(registries.authorization(registry)),
        (None, Asked::Content(_)) => false,
        (None, Asked::Ping { .. }) => {
            let mut own = registries
                .known
                .values()
                .filter_map(|known| known.authorization);
            is_token(registries.authorization) || own.any(is_token)
        }
    }
}

fn is_token(mode: AuthorizationMode) -> bool {
    mode == AuthorizationMode::Token
}

/// The token of ours that a request carries.
fn own_token(headers: &HeaderMap) -> Option<&str> {
    let (scheme, token) = headers.get(AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    Some(token.trim())
        .filter(|token| scheme.eq_ignore_ascii_case("bearer") && token.starts_with(PREFIX))
}

fn challenge(request: &Parts, asked: &Asked, error: Option<&str>) -> Result<HeaderValue, Problem> {
    let (registry, scope) = match asked {
        Asked::Ping { registry } => (registry, None),
        Asked::Content(content) => (&content.registry, Some(pull_scope(&content.repository))),
    };
    let challenge = Challenge::Bearer(Bearer {
        realm: format!("{}{PATH}", addressed(request)?),
        service: Some(registry.clone().unwrap_or_else(|| SERVICE.to_owned())),
        scope,
        error: error.map(str::to_owned),
    });
    Ok(HeaderValue::try_from(challenge.to_string())
        .expect("hosts, names and words are a header's value"))
}

/// Scheme and host of this mirror, as the client addressed it.
fn addressed(request: &Parts) -> Result<String, Problem> {
    let text = |name| {
        request
            .headers
            .get(name)
            .and_then(|value: &HeaderValue| value.to_str().ok())
    };
    let host = request
        .uri
        .authority()
        .cloned()
        .or_else(|| text(HOST)?.parse::<Authority>().ok());
    let plain = |host: &Authority| {
        host.as_str()
            .bytes()
            .all(|c| c.is_ascii_alphanumeric() || b".:-_[]".contains(&c))
    };
    let host = host
        .filter(plain)
        .ok_or(Refused::Registry(reference::HostError::Form))?;
    let over_tls =
        request.uri.scheme_str() == Some("https") || text(FORWARDED_PROTO) == Some("https");
    Ok(format!(
        "{}://{host}",
        if over_tls { "https" } else { "http" }
    ))
}

/// Whether a request is for a token.
pub(super) fn is_for_token(request: &Parts) -> bool {
    request.uri.path() == PATH
}

/// Answers a request for a token.
pub(super) async fn answer(mirror: &Inner, request: Parts, body: Incoming) -> Answer {
    let given = timeout(ANSWER, give(mirror, request, body))
        .await
        .unwrap_or(Err(Problem::Slow));
    let answer = given.unwrap_or_else(|problem| {
        tracing::info!(status = problem.status().as_u16(), reason = %problem, "no token given");
        problem.answer(RequestKind::Other)
    });
    mirror
        .metrics
        .request(RequestKind::Other, answer.status().as_u16());
    answer
}

async fn give(mirror: &Inner, request: Parts, body: Incoming) -> Result<Answer, Problem> {
    not_in_a_circle(mirror, &request.headers)?;
    let live = mirror.live.load_full();
    let wish = Wish::read(&request, body).await?;
    let Some(credential) = wish.credential else {
        return Ok(given(ANYBODY, ANYBODY_LIFE));
    };
    let default = live.registries.default.clone();
    let mut sources: Vec<(Source, bool)> = Vec::new();
    for scope in wish.scopes.iter().take(MAX_SCOPES) {
        let source = source_of(scope, wish.service.as_deref(), default.as_deref());
        sources.extend(source.filter(|source| !sources.contains(source)));
    }
    if sources.is_empty() {
        return login(
            mirror,
            &live.registries,
            wish.service.as_deref(),
            &credential,
        )
        .await;
    }
    let mut life = None;
    let mut rights = Vec::new();
    for (source, is_in_its_path) in sources {
        let right = match takes_password(&live.registries, &source.registry, is_in_its_path) {
            true => exchange(mirror, &source, &credential).await?,
            false => None,
        };
        let longest = right.as_ref().map(|granted| granted.life);
        life = longest.into_iter().chain(life).min();
        rights.push((source, right.map(|granted| granted.authorization)));
    }
    // A password that no registry here takes opens what anybody may have. A client that has one for another registry stays here.
    let Some(life) = life else {
        return Ok(given(ANYBODY, ANYBODY_LIFE));
    };
    Ok(given(&mirror.tokens.mint(rights, life), life))
}

/// Whether a client's password goes to this registry's realm: in token mode, and in relay mode where the client itself puts the
/// registry into the path. Clients of the latter kind (podman, skopeo) keep a password of their own for that path.
fn takes_password(registries: &Registries, registry: &str, is_in_its_path: bool) -> bool {
    match registries.authorization(registry) {
        AuthorizationMode::Token => true,
        AuthorizationMode::Relay => is_in_its_path,
        AuthorizationMode::Node => false,
    }
}

/// The value of a password at a registry; `None` if the registry wants none.
async fn exchange(
    mirror: &Inner,
    source: &Source,
    credential: &Credential,
) -> Result<Option<Granted>, Problem> {
    match mirror.origin.exchange(source, credential).await? {
        Exchanged::Granted(granted) => Ok(Some(granted)),
        Exchanged::Open => Ok(None),
        Exchanged::Refused(status) => Err(Problem::refusal(status, &HeaderMap::new())),
        Exchanged::Busy(retry_after) => {
            let headers = retry_after
                .map(|value| (RETRY_AFTER, value))
                .into_iter()
                .collect();
            Err(Problem::refusal(StatusCode::TOO_MANY_REQUESTS, &headers))
        }
    }
}

/// A login names no repository, and mostly no registry. If only one registry is in token mode, that one judges name
/// and password. Of several, no registry is shown a password that is meant for another: the first pull tells.
async fn login(
    mirror: &Inner,
    registries: &Registries,
    service: Option<&str>,
    credential: &Credential,
) -> Result<Answer, Problem> {
    let named = service.and_then(|service| canonical_host(service).ok());
    let all = registries
        .known
        .keys()
        .chain(&registries.default)
        .chain(&named);
    let mut all: Vec<&String> = all
        .filter(|name| is_token(registries.authorization(name)))
        .collect();
    all.retain(|name| named.as_ref().is_none_or(|named| named == *name));
    all.sort_unstable();
    all.dedup();
    if let [registry] = all[..] {
        let source = Source {
            registry: registry.clone(),
            repository: String::new(),
        };
        exchange(mirror, &source, credential).await?;
    }
    Ok(given(ANYBODY, ANYBODY_LIFE))
}

/// The wish of a token request, and its credentials.
#[derive(Debug, Default)]
struct Wish {
    service: Option<String>,
    scopes: Vec<String>,
    credential: Option<Credential>,
}

impl Wish {
    /// GET, with Basic or without (token specification); POST of a form (OAuth2 specification).
    async fn read(request: &Parts, body: Incoming) -> Result<Self, Problem> {
        let basic = request
            .headers
            .get(AUTHORIZATION)
            .and_then(Credential::from_basic);
        let mut wish = match request.method {
            Method::GET => Self::parse(request.uri.query().unwrap_or_default().as_bytes()),
            Method::POST => {
                let form = timeout(FORM, Limited::new(body, MAX_FORM_BYTES).collect()).await;
                let form = form
                    .map_err(|_| Problem::Slow)?
                    .map_err(|_| Refused::Query)?;
                Self::parse(&form.to_bytes())
            }
            _ => return Err(Refused::Method.into()),
        };
        // A password in an address would be in logs; only a form's counts.
        if request.method == Method::GET {
            wish.credential = None;
        }
        wish.credential = basic.or(wish.credential);
        Ok(wish)
    }

    fn parse(form: &[u8]) -> Self {
        let mut wish = Self::default();
        let (mut user, mut password, mut identity) = (None, None, None);
        for (name, value) in form_urlencoded::parse(form) {
            match &*name {
                "service" => wish.service = Some(value.into_owned()),
                "scope" => wish
                    .scopes
                    .extend(value.split_ascii_whitespace().map(str::to_owned)),
                "username" => user = Some(value.into_owned()),
                "password" => password = Some(Secret::new(value)),
                "refresh_token" => identity = Some(Secret::new(value)),
                _ => {}
            }
        }
        wish.credential = match (user, password, identity) {
            (Some(user), Some(password), _) => Some(Credential::Password { user, password }),
            (_, _, identity) => identity.map(Credential::IdentityToken),
        };
        wish
    }
}

/// The repository that a scope is about: at the registry that its name begins with, as podman writes it (then `true`); else at the
/// one that the token is for, as containerd writes it; else at the default one.
fn source_of(scope: &str, service: Option<&str>, default: Option<&str>) -> Option<(Source, bool)> {
    let path = format!("/v2/{}/tags/list", repository_of(scope)?);
    let parsed = |query: Option<&str>| match reference::parse("GET", &path, query) {
        Ok(Asked::Content(asked)) => Some(asked),
        _ => None,
    };
    if let Some(asked) = parsed(None).filter(|asked| asked.registry.is_some()) {
        return Some((asked.source(""), true));
    }
    let registry = service.and_then(|service| canonical_host(service).ok());
    let query = registry.map(|registry| format!("ns={registry}"));
    let asked = parsed(query.as_deref())?;
    let is_known = asked.registry.is_some() || default.is_some();
    is_known.then(|| (asked.source(default.unwrap_or_default()), false))
}

/// "Token Response Fields" of the token specification; `access_token` is OAuth2's name for it.
fn given(token: &str, life: Duration) -> Answer {
    let body = serde_json::json!({
        "token": token,
        "access_token": token,
        "expires_in": life.as_secs(),
        "issued_at": rfc3339(SystemTime::now()),
    });
    let headers = HeaderMap::from_iter([
        (CONTENT_TYPE, HeaderValue::from_static("application/json")),
        (CACHE_CONTROL, HeaderValue::from_static("no-store")),
    ]);
    with(
        StatusCode::OK,
        headers,
        Payload::Notice(body.to_string().into()),
    )
}

/// `2026-11-25T08:30:00Z`: days since 1970 to a date, years counted from March so that leap days come last.
fn rfc3339(time: SystemTime) -> String {
    let seconds = time
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs();
    // Since 0000-03-01; an era is 400 years, 146,097 days.
    let days = seconds / 86_400 + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = era * 400 + year + u64::from(month <= 2);
    let (hour, minute, second) = (seconds / 3_600 % 24, seconds / 60 % 60, seconds % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

#[cfg(test)]
mod tests;
