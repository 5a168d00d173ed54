//! Which answer a request gets, before anything is sent: the registry's part, and the faults that change what is said.

use std::ops::Range;
use std::time::SystemTime;

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};

use super::content::Content;
use super::fault::Fault;
use super::http::Request;
use super::{State, lock};

/// The token that `/token` gives out if tokens live for ever.
const TOKEN: &str = "origin-token";
/// The parts of a token whose life is limited: a JSON web token (RFC 7519), but for a real signature.
const TOKEN_PARTS: [&str; 2] = ["e30", "b3JpZ2lu"];
/// The start of a signed URL's path; the URL's number and the requested path follow.
const SIGNED: &str = "/signed/";
const EXPIRED: &str = "/signed/expired/";

/// An answer: its head, and the bytes that follow.
pub(super) struct Answer {
    pub(super) status: u16,
    pub(super) headers: Vec<(&'static str, String)>,
    pub(super) content: Content,
    /// The part of the content that makes up the body.
    pub(super) range: Range<u64>,
}

impl Answer {
    fn whole(status: u16, content: Content) -> Self {
        Self {
            status,
            headers: Vec::new(),
            range: 0..content.size_bytes(),
            content,
        }
    }

    fn with(mut self, name: &'static str, value: impl ToString) -> Self {
        self.headers.push((name, value.to_string()));
        self
    }

    /// An error as the distribution spec words it.
    fn error(status: u16, code: &str) -> Self {
        let text = serde_json::json!({"errors": [{"code": code, "message": "origin: as told"}]})
            .to_string();
        Self::whole(status, Content::bytes(text.into_bytes()))
            .with("Content-Type", "application/json")
    }
}

/// The answer to `request`, given the faults that strike it.
pub(super) fn answer(state: &State, request: &Request, faults: &[Fault]) -> Answer {
    let path = request.path();
    if path == "/token" {
        return token(request, faults);
    }
    for fault in faults {
        if let Some(answer) = refusal(request, fault) {
            return answer;
        }
    }
    if path.starts_with(EXPIRED) {
        return Answer::error(403, "DENIED");
    }
    if path == "/v2/" || path == "/v2" {
        return Answer::whole(200, Content::bytes(*b"{}")).with("Content-Type", "application/json");
    }
    let plain = path
        .strip_prefix(SIGNED)
        .and_then(|rest| rest.find('/').map(|slash| &rest[slash..]));
    let found = find(state, plain.unwrap_or(path));
    if plain.is_none()
        && request.method == "GET"
        && path.contains("/blobs/")
        && let Some(answer) = faults.iter().find_map(|fault| redirect(state, path, fault))
    {
        return answer;
    }
    let range = request.header("range");
    let is_open = range.is_some_and(|range| range.ends_with('-'));
    let refused = faults.contains(&Fault::RefuseRange) && range.is_some()
        || faults.contains(&Fault::ClosedRangeOnly) && is_open;
    if refused && found.status == 200 {
        return Answer::error(416, "BLOB_UNKNOWN");
    }
    if faults.contains(&Fault::IgnoreRange) {
        found
    } else {
        ranged(found, range, faults)
    }
}

/// The errors and challenges among the faults.
fn refusal(request: &Request, fault: &Fault) -> Option<Answer> {
    let authorization = request.header("authorization");
    match fault {
        Fault::Status {
            code,
            retry_after_s,
        } => {
            let answer = Answer::error(*code, "UNKNOWN");
            Some(match retry_after_s {
                Some(seconds) => answer.with("Retry-After", seconds),
                None => answer,
            })
        }
        Fault::Bearer { .. } if !authorization.is_some_and(is_good) => {
            let host = request.header("host").unwrap_or("localhost");
            let challenge = format!(
                r#"Bearer realm="http://{host}/token",service="origin",scope="repository:{}:pull""#,
                repository(request.path()).unwrap_or_default()
            );
            Some(Answer::error(401, "UNAUTHORIZED").with("WWW-Authenticate", challenge))
        }
        Fault::Basic { user, password } if authorization != Some(&basic(user, password)) => Some(
            Answer::error(401, "UNAUTHORIZED").with("WWW-Authenticate", r#"Basic realm="origin""#),
        ),
        _ => None,
    }
}

fn token(request: &Request, faults: &[Fault]) -> Answer {
    let given = faults.iter().find_map(|fault| match fault {
        Fault::Bearer {
            anonymous,
            user,
            password,
            life_s,
        } => {
            let may = *anonymous || request.header("authorization") == Some(&basic(user, password));
            may.then_some(*life_s)
        }
        _ => None,
    });
    let Some(life_s) = given else {
        return Answer::error(401, "UNAUTHORIZED");
    };
    let token = life_s.map_or(TOKEN.to_owned(), |life_s| token_until(now_s() + life_s));
    let text = serde_json::json!({"token": token, "access_token": token, "expires_in": life_s.unwrap_or(300)});
    let text = text.to_string();
    Answer::whole(200, Content::bytes(text.into_bytes())).with("Content-Type", "application/json")
}

/// Whether an `Authorization` has a token of ours that is still good.
fn is_good(authorization: &str) -> bool {
    let Some(token) = authorization.strip_prefix("Bearer ") else {
        return false;
    };
    let parsed = token
        .split('.')
        .nth(1)
        .and_then(|claims| URL_SAFE_NO_PAD.decode(claims).ok());
    let until = parsed.and_then(|claims| {
        serde_json::from_slice::<serde_json::Value>(&claims).ok()?["exp"].as_u64()
    });
    token == TOKEN || until.is_some_and(|until| until > now_s() && token == token_until(until))
}

fn token_until(until_s: u64) -> String {
    let claims = URL_SAFE_NO_PAD.encode(serde_json::json!({ "exp": until_s }).to_string());
    format!("{}.{claims}.{}", TOKEN_PARTS[0], TOKEN_PARTS[1])
}

fn now_s() -> u64 {
    SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs()
}

fn redirect(state: &State, path: &str, fault: &Fault) -> Option<Answer> {
    let Fault::Redirect {
        status,
        base,
        expired,
    } = fault
    else {
        return None;
    };
    let number = state
        .redirects
        .fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let kind = if number < *expired {
        "expired".to_owned()
    } else {
        number.to_string()
    };
    Some(
        Answer::whole(*status, Content::bytes([]))
            .with("Location", format!("{base}{SIGNED}{kind}{path}")),
    )
}

/// The content at this path; 404 if there is none.
fn find(state: &State, path: &str) -> Answer {
    let shelves = lock(&state.shelves);
    let key = |at: usize, kind: &str| {
        Some((
            path.strip_prefix("/v2/")?.get(..at - 4)?.to_owned(),
            path[at + kind.len()..].to_owned(),
        ))
    };
    if let Some(content) = path
        .rfind("/blobs/")
        .and_then(|at| key(at, "/blobs/"))
        .and_then(|key| {
            shelves
                .blobs
                .get(&key)
                .map(|content| (key.1, content.clone()))
        })
    {
        let (digest, content) = content;
        return Answer::whole(200, content)
            .with("Content-Type", "application/octet-stream")
            .with("Docker-Content-Digest", digest)
            .with("Accept-Ranges", "bytes");
    }
    let manifest = path
        .rfind("/manifests/")
        .and_then(|at| key(at, "/manifests/"));
    match manifest.and_then(|key| shelves.manifests.get(&key).cloned()) {
        Some(manifest) => Answer::whole(200, manifest.content)
            .with("Content-Type", manifest.media_type)
            .with("Docker-Content-Digest", manifest.digest),
        None if path.contains("/manifests/") => Answer::error(404, "MANIFEST_UNKNOWN"),
        None if path.contains("/blobs/") => Answer::error(404, "BLOB_UNKNOWN"),
        None => Answer::error(404, "UNSUPPORTED"),
    }
}

fn repository(path: &str) -> Option<&str> {
    let end = path
        .rfind("/blobs/")
        .or_else(|| path.rfind("/manifests/"))?;
    path.get(4..end)
}

/// The part of a 200 that a `Range` asks for (RFC 9110, 14): one range of bytes; anything else gets everything.
fn ranged(mut answer: Answer, range: Option<&str>, faults: &[Fault]) -> Answer {
    let size = answer.content.size_bytes();
    let Some((first, last)) = range
        .and_then(|range| range.strip_prefix("bytes="))
        .and_then(|range| range.split_once('-'))
    else {
        return answer;
    };
    let mut wanted = match (first.parse::<u64>(), last.parse::<u64>()) {
        (Ok(first), Ok(last)) => first..last.saturating_add(1).min(size),
        (Ok(first), Err(_)) if last.is_empty() => first..size,
        (Err(_), Ok(suffix)) if first.is_empty() => size.saturating_sub(suffix)..size,
        _ => return answer,
    };
    if answer.status != 200 {
        return answer;
    }
    if wanted.is_empty() {
        return Answer::error(416, "RANGE_INVALID")
            .with("Content-Range", format!("bytes */{size}"));
    }
    for fault in faults {
        match fault {
            Fault::EarlierRange { bytes } => wanted.start = wanted.start.saturating_sub(*bytes),
            Fault::ShortRange { bytes } => wanted.end = wanted.end.min(wanted.start + bytes),
            _ => {}
        }
    }
    answer.status = 206;
    answer.headers.push((
        "Content-Range",
        format!("bytes {}-{}/{size}", wanted.start, wanted.end - 1),
    ));
    answer.range = wanted;
    answer
}

/// An `Authorization` of scheme Basic (RFC 7617).
fn basic(user: &str, password: &str) -> String {
    format!("Basic {}", STANDARD.encode(format!("{user}:{password}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_good_until_its_time_comes_and_nobody_makes_one() {
        let good = |token: &str| is_good(&format!("Bearer {token}"));
        assert!(good(TOKEN) && good(&token_until(now_s() + 60)));
        assert!(!good(&token_until(now_s())) && !good("x.y.z") && !good("") && !is_good(TOKEN));
        let forged = token_until(now_s() + 60).replace(TOKEN_PARTS[1], "Zm9yZ2Vk");
        assert!(!good(&forged));
    }
}
