//! Which answer a request gets, before anything is sent: the registry's part, and the faults that change what is said.

use std::ops::Range;

use super::content::Content;
use super::fault::Fault;
use super::http::Request;
use super::{State, lock};

/// The only token that `/token` gives out.
const TOKEN: &str = "origin-token";
/// What a signed URL's path begins with; the URL's number and the path asked for follow.
const SIGNED: &str = "/signed/";
const EXPIRED: &str = "/signed/expired/";

/// An answer: what its head says, and which bytes follow.
pub(super) struct Answer {
    pub(super) status: u16,
    pub(super) headers: Vec<(&'static str, String)>,
    pub(super) content: Content,
    /// The part of the content that makes up the body.
    pub(super) range: Range<u64>,
}

impl Answer {
    fn whole(status: u16, content: Content) -> Self {
        Self { status, headers: Vec::new(), range: 0..content.size_bytes(), content }
    }

    fn with(mut self, name: &'static str, value: impl ToString) -> Self {
        self.headers.push((name, value.to_string()));
        self
    }

    /// An error as the distribution spec words it.
    fn error(status: u16, code: &str) -> Self {
        let text = serde_json::json!({"errors": [{"code": code, "message": "origin: as told"}]}).to_string();
        Self::whole(status, Content::bytes(text.into_bytes())).with("Content-Type", "application/json")
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
    let plain = path.strip_prefix(SIGNED).and_then(|rest| rest.find('/').map(|slash| &rest[slash..]));
    let found = find(state, plain.unwrap_or(path));
    if plain.is_none()
        && request.method == "GET"
        && path.contains("/blobs/")
        && let Some(answer) = faults.iter().find_map(|fault| redirect(state, path, fault))
    {
        return answer;
    }
    if faults.contains(&Fault::IgnoreRange) { found } else { ranged(found, request.header("range")) }
}

/// The errors and challenges among the faults.
fn refusal(request: &Request, fault: &Fault) -> Option<Answer> {
    let authorization = request.header("authorization");
    match fault {
        Fault::Status { code, retry_after_s } => {
            let answer = Answer::error(*code, "UNKNOWN");
            Some(match retry_after_s {
                Some(seconds) => answer.with("Retry-After", seconds),
                None => answer,
            })
        }
        Fault::Bearer { .. } if authorization != Some(&format!("Bearer {TOKEN}")) => {
            let host = request.header("host").unwrap_or("localhost");
            let challenge = format!(
                r#"Bearer realm="http://{host}/token",service="origin",scope="repository:{}:pull""#,
                repository(request.path()).unwrap_or_default()
            );
            Some(Answer::error(401, "UNAUTHORIZED").with("WWW-Authenticate", challenge))
        }
        Fault::Basic { user, password } if authorization != Some(&basic(user, password)) => {
            Some(Answer::error(401, "UNAUTHORIZED").with("WWW-Authenticate", r#"Basic realm="origin""#))
        }
        _ => None,
    }
}

fn token(request: &Request, faults: &[Fault]) -> Answer {
    let given = faults.iter().any(|fault| match fault {
        Fault::Bearer { anonymous, user, password } => {
            *anonymous || request.header("authorization") == Some(&basic(user, password))
        }
        _ => false,
    });
    if !given {
        return Answer::error(401, "UNAUTHORIZED");
    }
    let text = serde_json::json!({"token": TOKEN, "access_token": TOKEN, "expires_in": 300}).to_string();
    Answer::whole(200, Content::bytes(text.into_bytes())).with("Content-Type", "application/json")
}

fn redirect(state: &State, path: &str, fault: &Fault) -> Option<Answer> {
    let Fault::Redirect { status, base, expired } = fault else { return None };
    let number = state.redirects.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let kind = if number < *expired { "expired".to_owned() } else { number.to_string() };
    Some(Answer::whole(*status, Content::bytes([])).with("Location", format!("{base}{SIGNED}{kind}{path}")))
}

/// What lies at this path; 404 where there is nothing.
fn find(state: &State, path: &str) -> Answer {
    let shelves = lock(&state.shelves);
    let key = |at: usize, kind: &str| {
        Some((path.strip_prefix("/v2/")?.get(..at - 4)?.to_owned(), path[at + kind.len()..].to_owned()))
    };
    if let Some(content) = path
        .rfind("/blobs/")
        .and_then(|at| key(at, "/blobs/"))
        .and_then(|key| shelves.blobs.get(&key).map(|content| (key.1, content.clone())))
    {
        let (digest, content) = content;
        return Answer::whole(200, content)
            .with("Content-Type", "application/octet-stream")
            .with("Docker-Content-Digest", digest)
            .with("Accept-Ranges", "bytes");
    }
    let manifest = path.rfind("/manifests/").and_then(|at| key(at, "/manifests/"));
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
    let end = path.rfind("/blobs/").or_else(|| path.rfind("/manifests/"))?;
    path.get(4..end)
}

/// The part of a 200 that a `Range` asks for (RFC 9110, 14): one range of bytes; anything else gets everything.
fn ranged(mut answer: Answer, range: Option<&str>) -> Answer {
    let size = answer.content.size_bytes();
    let Some((first, last)) =
        range.and_then(|range| range.strip_prefix("bytes=")).and_then(|range| range.split_once('-'))
    else {
        return answer;
    };
    let wanted = match (first.parse::<u64>(), last.parse::<u64>()) {
        (Ok(first), Ok(last)) => first..last.saturating_add(1).min(size),
        (Ok(first), Err(_)) if last.is_empty() => first..size,
        (Err(_), Ok(suffix)) if first.is_empty() => size.saturating_sub(suffix)..size,
        _ => return answer,
    };
    if answer.status != 200 {
        return answer;
    }
    if wanted.is_empty() {
        return Answer::error(416, "RANGE_INVALID").with("Content-Range", format!("bytes */{size}"));
    }
    answer.status = 206;
    answer.headers.push(("Content-Range", format!("bytes {}-{}/{size}", wanted.start, wanted.end - 1)));
    answer.range = wanted;
    answer
}

/// An `Authorization` of scheme Basic (RFC 7617).
fn basic(user: &str, password: &str) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::from("Basic ");
    for chunk in format!("{user}:{password}").as_bytes().chunks(3) {
        let bits =
            chunk.iter().fold(0, |bits, byte| bits << 8 | usize::from(*byte)) << (8 * (3 - chunk.len()));
        for place in 0..4 {
            let letter = ALPHABET[bits >> (18 - 6 * place) & 63];
            text.push(if place <= chunk.len() { letter as char } else { '=' });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::basic;

    #[test]
    fn basic_credentials_are_encoded_as_rfc_7617_shows() {
        assert_eq!(basic("Aladdin", "open sesame"), "Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ==");
        assert_eq!(basic("test", "123\u{a3}"), "Basic dGVzdDoxMjPCow==");
        assert_eq!(basic("ab", "cd1"), "Basic YWI6Y2Qx");
    }
}
